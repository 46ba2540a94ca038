//! The state of the process: the configuration, and the world.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::OnceLock;

use mpi_runtime::device::cuda::{self, Found};
use mpi_runtime::engine::recorder::file::RecordOptions;
use mpi_runtime::log;
#[cfg(test)]
use mpi_runtime::mpi::family::Family;
use mpi_runtime::transfer::choice::{Asked, Aware, Through};
use mpi_runtime::transfer::probe_result::ProbeResults;
use mpi_runtime::world::DeviceOptions;
use mpi_runtime::world::library::LibraryOptions;
use mpi_runtime::{World, WorldOptions};
use parking_lot::Mutex;

use crate::config::{self, Config, Log, Pretend, Topology, create_option};
use crate::error::Error;
use crate::fork;
use crate::inner::find::own_folder;
use crate::inner::{inner, library, on_gpu};

static CONFIG: OnceLock<Config> = OnceLock::new();
static WORLD: OnceLock<World> = OnceLock::new();
static STARTING: Mutex<()> = Mutex::new(());

/// The configuration from the environment.
///
/// # Panics
/// Before [`load`] succeeded; the function table exists only after that.
pub fn config() -> &'static Config {
    CONFIG
        .get()
        .expect("the plugin is loaded before its functions are called")
}

/// Reads the configuration and loads the inner plugin, once.
pub fn load() -> Result<&'static Config, Error> {
    let _guard = STARTING.lock();
    if let Some(config) = CONFIG.get() {
        return Ok(config);
    }
    let config = config_with(&[])?;
    library::load(&config)?;
    if config.keep_memory {
        keep_memory();
    }
    Ok(CONFIG.get_or_init(|| config))
}

/// The configuration with create options over the environment.
pub fn config_with(options: &[(String, String)]) -> Result<Config, Error> {
    let given = |name: &str| {
        let option = create_option(name);
        let found = options.iter().find(|(key, _)| *key == option);
        found.map(|(_, value)| value.clone())
    };
    let mut config = Config::read(&[&given, &|name| std::env::var(name).ok()])?;
    let variables = std::env::vars_os();
    let variables = variables.map(|(name, value)| [name, value].map(OsString::into_string));
    config.warnings.extend(config::doubtful(
        variables.filter_map(|[name, value]| Some((name.ok()?, value.ok()?))),
    ));
    Ok(config)
}

/// The world, if it was started.
pub fn world() -> Option<&'static World> {
    WORLD.get()
}

/// Joins the world, once; collective over the ranks of the job.
pub fn start_world(config: &Config) -> Result<&'static World, Error> {
    let _guard = STARTING.lock();
    if let Some(world) = WORLD.get() {
        return Ok(world);
    }
    let options = WorldOptions {
        library: library_options(config),
        singleton: config.singleton,
        warn_after: config.warn_after,
        abort_after: config.abort_after,
        part_bytes: config.part_bytes,
        device: (config.pretend_device != Pretend::Nothing || on_gpu())
            .then(|| device_options(config)),
        local_topology: config.topology == Topology::Local,
        local_devices: config.local_devices,
        shm_collectives: config.shm_collectives,
        shm_messages: config.shm_messages,
        overlap: config.overlap as u64,
        check: config.check,
        pretend_nodes: config.pretend_nodes,
        verbose: config.log >= Log::Debug,
        record: config.record_dir.clone().map(|folder| RecordOptions {
            folder,
            keep: config.record,
        }),
    };
    let world = World::start(&options).map_err(Error::precondition)?;
    log_world(&world, config);
    log_transfer(&world, config);
    fork::watch();
    Ok(WORLD.get_or_init(|| world))
}

/// Where to look for an MPI and for the shims.
pub fn library_options(config: &Config) -> LibraryOptions {
    let own = own_folder();
    // Packages put theirs into the folder that holds Python's, which holds ours.
    let above = own.ancestors().nth(4).map(|lib| lib.to_owned());
    let named = std::env::var_os("MPI_CUDA_PACKAGES").map(PathBuf::from);
    LibraryOptions {
        family: config.mpi,
        library: config.libmpi.clone(),
        packages: named.into_iter().chain(above).collect(),
        own_folder: own,
        shim_folder: config.shim_dir.clone(),
    }
}

/// A world of one rank without an inner plugin: without any MPI, or with that of `FUZZ_MPI` whose
/// shim is in `FUZZ_SHIM_DIR`.
#[cfg(test)]
pub fn start_for_tests() -> &'static World {
    WORLD.get_or_init(|| {
        let config = CONFIG.get_or_init(Config::default);
        let shims = std::env::var_os("FUZZ_SHIM_DIR").map(PathBuf::from);
        let mpi = std::env::var("FUZZ_MPI").ok();
        let family = mpi.map(|name| Family::from_name(&name).expect("openmpi or mpich"));
        World::start(&WorldOptions {
            library: LibraryOptions {
                family,
                shim_folder: shims,
                ..LibraryOptions::default()
            },
            singleton: true,
            warn_after: config.warn_after,
            abort_after: None,
            part_bytes: config.part_bytes,
            device: None,
            local_topology: false,
            local_devices: 1,
            shm_collectives: true,
            shm_messages: true,
            overlap: 0,
            check: false,
            pretend_nodes: None,
            verbose: false,
            record: None,
        })
        .expect("a world of one rank")
    })
}

/// Logs what the user should hear of the variables and create options set, once, on rank 0.
pub fn warn(world: &World, config: &Config) {
    static WARNED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut warned = WARNED.lock();
    for warning in config.warnings.iter().filter(|_| world.rank == 0) {
        if !warned.contains(warning) {
            log::line(warning);
            warned.push(warning.clone());
        }
    }
}

/// Logs what was joined.
fn log_world(world: &World, config: &Config) {
    warn(world, config);
    let doubt = world.mpi.as_ref().and_then(|mpi| mpi.doubt.as_ref());
    if let Some(doubt) = doubt.filter(|_| world.rank == 0) {
        log::line(doubt);
    }
    if config.log >= Log::Info {
        let inner = inner();
        let (major, minor) = inner.version();
        log::line(&format!(
            "rank {} of {} (node-local {}): device {} ({}), inner plugin {} (PJRT \
             {major}.{minor}), MPI {} ({}; thread level {})",
            world.rank,
            world.size,
            world.node_rank,
            if on_gpu() { "cuda" } else { "cpu" },
            inner.reason,
            inner.path.display(),
            world.library,
            world.mpi.as_ref().map_or_else(
                || "none".to_owned(),
                |mpi| format!("{}, {}", mpi.file.display(), mpi.by)
            ),
            world.thread_level,
        ));
    }
}

/// Logs how data of a device travels, if there is one.
fn log_transfer(world: &World, config: &Config) {
    let Some(transfer) = &world.transfer else {
        return;
    };
    if let Some(warning) = config.transfer_warning.as_ref().filter(|_| world.rank == 0) {
        log::line(warning);
    }
    if config.log >= Log::Info {
        let readers = world.shm_rings.as_ref().map_or(0, |all| all.readers());
        log::line(&format!(
            "transfer {transfer}{}",
            match readers {
                0 => String::new(),
                _ => format!("; shares memory with {readers} other rank(s) of this node"),
            }
        ));
    }
    let failure = world.shm_rings.as_ref().and_then(|all| all.failure());
    if let Some(failure) = failure.filter(|_| world.node_rank == 0 && world.node_size > 1) {
        log::line(&format!(
            "long messages within this node go through MPI, which is slower, since memory cannot \
             be shared in /dev/shm ({failure}): make it larger (docker --shm-size), or set \
             MPI_CUDA_SHM_RING=0"
        ));
    }
}

/// How data in device memory may travel.
fn device_options(config: &Config) -> DeviceOptions {
    DeviceOptions {
        asked: if config.probe {
            Asked::Direct
        } else {
            config.transfer
        },
        chunk_bytes: config.chunk_bytes,
        shm_ring: config.shm_ring,
        aware: (config.pretend_device == Pretend::DeviceThatMpiKnows).then_some(Aware::Yes),
        probe_results: probe_results(config),
        trying: config.probe.then_some(Through::Copies),
    }
}

/// Where what is known of direct transfer is kept.
pub fn probe_results(config: &Config) -> ProbeResults {
    let cache = || {
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
        let named = std::env::var_os("XDG_CACHE_HOME").filter(|name| !name.is_empty());
        let named = named.map(PathBuf::from);
        named.or_else(home).unwrap_or_else(std::env::temp_dir)
    };
    let driver = match cuda::find() {
        Found::Devices { version, .. } => format!("CUDA driver {version}"),
        _ => "no CUDA driver".into(),
    };
    let (major, minor) = inner().version();
    let path = &inner().path;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Another version of the plugin may allocate in another way.
    let size = std::fs::metadata(path).map_or(0, |file| file.len());
    ProbeResults {
        folder: match &config.probe_dir {
            Some(folder) => folder.clone(),
            None => cache().join("mpi_cuda"),
        },
        with: format!("{driver}; {name} of {size} bytes, PJRT {major}.{minor}"),
    }
}

/// Large results come from freshly mapped pages otherwise, whose faults cost more than the message
/// (docs/measurements.md). One arena: those of other threads are made of heaps of 64 MiB, which
/// glibc maps and unmaps with every large result. No `M_TOP_PAD`: with it every small program
/// is slower (`docs/decisions.md`).
fn keep_memory() {
    const THRESHOLD: libc::c_int = 1 << 30;
    // SAFETY: mallopt only sets parameters of glibc's allocator (mallopt(3)).
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD);
        libc::mallopt(libc::M_TRIM_THRESHOLD, THRESHOLD);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
