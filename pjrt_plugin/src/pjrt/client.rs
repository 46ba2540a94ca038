//! Creating and destroying clients: joining the world, and the inner client for this rank.

use std::ffi::c_char;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use mpi_runtime::{World, log};
use pjrt_sys::*;

use crate::at_exit;
use crate::clients;
use crate::config::{Config, DeviceKind, Pretend, Topology};
use crate::error::Error;
use crate::ffi::{self, memory};
use crate::inner::call::bytes;
use crate::inner::create_options::GivenOption;
use crate::inner::handles::{ClientHandle, Owned};
use crate::inner::{api, find, inner, on_gpu, xla_flags};
use crate::launch;
use crate::pjrt::entry::entry;
use crate::plugin::{config_with, start_world, warn};

entry! {
    /// `PJRT_Client_Create`: collective over the ranks of the job.
    pub fn create(
        args: PJRT_Client_Create_Args; given: Vec<GivenOption<'_>> = create_options, num_options
    ) {
        let made = create_client(given)?.release().raw();
        // SAFETY: the framework gets the client.
        unsafe { args.members() }.client = made;
        Ok(())
    }

    /// `PJRT_Client_Destroy`: waits for everything dispatched.
    pub fn destroy(args: PJRT_Client_Destroy_Args, client: ClientHandle) {
        if crate::fork::is_child() {
            // Its threads are the parent's, so there is nothing that could be ended here.
            return Ok(());
        }
        launch::finish_client(client);
        clients::remove(client);
        args.pass_on(api().PJRT_Client_Destroy)?;
        // Its callbacks, which may have used them, have ended.
        if clients::is_empty() {
            launch::spare_client::destroy_all();
        }
        Ok(())
    }

    /// `PJRT_Client_PlatformVersion`: the inner one, and who we are. JAX's compilation cache gives
    /// a program to those alone who say the same here.
    pub fn platform_version(args: PJRT_Client_PlatformVersion_Args) {
        static TEXT: OnceLock<String> = OnceLock::new();
        args.pass_on(api().PJRT_Client_PlatformVersion)?;
        let text = TEXT.get_or_init(|| {
            // SAFETY: the inner plugin has filled in a text that lives with the client.
            let inner = unsafe { bytes(args.platform_version, args.platform_version_size) };
            // Without our name: JAX takes a version with "cuda" in it for a GPU's.
            format!(
                "MPI ranks {} over {} ({})",
                env!("CARGO_PKG_VERSION"),
                String::from_utf8_lossy(inner),
                crate::inner::inner().build()
            )
        });
        // SAFETY: the text lives as long as the process.
        let args = unsafe { args.members() };
        args.platform_version = text.as_ptr().cast::<c_char>();
        args.platform_version_size = text.len();
        Ok(())
    }
}

fn create_client(given: Vec<GivenOption<'_>>) -> Result<Owned<ClientHandle>, Error> {
    let (own, given) = split_options(given);
    let config = config_with(&own)?;
    refuse_late_choice(&config)?;
    xla_flags::check(&inner().path)?;
    let world = start_world(&config)?;
    at_exit::watch();
    // The world may have been started before there were create options.
    warn(world, &config);
    memory::start(&config, world)?;
    refuse_distributed(&given, world)?;
    let (rank, size) = match (config.topology, config.pretend_size) {
        (_, Some(size)) => (0, size),
        (Topology::Global, None) => (world.rank, world.size),
        (Topology::Local, None) => (0, 1),
    };
    // What JAX passes for its distributed service is meaningless to an inner client.
    let (mut passed_on, _): (Vec<_>, Vec<_>) = given
        .into_iter()
        .partition(|option| !DISTRIBUTED.contains(&&option.name[..]));
    if !on_gpu() {
        leave_out_those_of_gpus(&mut passed_on, world);
    }
    launch::thread_order::adopt_first(config.thread_order);
    refuse_local_devices(&config)?;
    let (made, client) = clients::create_inner(rank, size, config.local_devices, &passed_on)?;
    ffi::register_all()?;
    clients::add(client);
    at_exit::watch();
    Ok(made)
}

/// Several devices for each rank are for CPUs, and for a world that shows them.
fn refuse_local_devices(config: &Config) -> Result<(), Error> {
    let devices = config.local_devices;
    let agreed = crate::plugin::config().local_devices;
    if devices != agreed {
        return Err(Error::invalid(format!(
            "the create options say local_devices={devices}, and MPI_CUDA_LOCAL_DEVICES, which the \
             ranks have agreed on, {agreed}: set the variable in the environment"
        )));
    }
    let reason = match (devices, config.topology) {
        (1, _) => return Ok(()),
        _ if on_gpu() => {
            "ranks with GPUs have one each; start a rank for each GPU, and leave it out"
        }
        (_, Topology::Local) => {
            "with MPI_CUDA_TOPOLOGY=local each rank shows one device of its own; leave one of the \
             two out"
        }
        _ if config.pretend_device != Pretend::Nothing => {
            "MPI_CUDA_PRETEND_DEVICE has one device on each rank; leave one of the two out"
        }
        _ => return Ok(()),
    };
    Err(Error::unimplemented(format!(
        "MPI_CUDA_LOCAL_DEVICES={devices}: {reason}"
    )))
}

/// Options of XLA's plugins for GPUs alone. Frameworks give them to whatever has "cuda" in its name
/// (`xla/pjrt/plugin/xla_gpu/xla_gpu_client_options.h`).
const OF_GPUS: &[&str] = &[
    "allocator",
    "collective_memory_size",
    "memory_fraction",
    "platform_name",
    "preallocate",
    "should_stage_host_to_device_transfers",
    "use_tfrt_gpu_client",
    "visible_devices",
];

fn leave_out_those_of_gpus(given: &mut Vec<GivenOption<'_>>, world: &World) {
    let (of_gpus, others): (Vec<_>, Vec<_>) = std::mem::take(given)
        .into_iter()
        .partition(|option| OF_GPUS.contains(&&option.name[..]));
    *given = others;
    static SAID: AtomicBool = AtomicBool::new(false);
    if world.rank == 0 && !of_gpus.is_empty() && !SAID.swap(true, Ordering::Relaxed) {
        let names: Vec<_> = of_gpus.iter().map(|option| &option.name[..]).collect();
        log::line(&format!(
            "the options {} are of GPUs, and have no effect here, where the devices are CPUs",
            names.join(", ")
        ));
    }
}

/// Options of JAX's distributed service.
const DISTRIBUTED: &[&str] = &["node_id", "num_nodes", "partition_index"];

/// Our options as text, and the others.
fn split_options(given: Vec<GivenOption<'_>>) -> (Vec<(String, String)>, Vec<GivenOption<'_>>) {
    let ours: Vec<String> = crate::config::VARIABLES
        .iter()
        .flat_map(|variable| std::iter::once(variable.name).chain(variable.old_name))
        .map(crate::config::create_option)
        .collect();
    let (own, others): (Vec<_>, _) = given
        .into_iter()
        .partition(|option| ours.contains(&option.name));
    let own = own.into_iter().map(|option| (option.name, option.text));
    (own.collect(), others)
}

/// Which plugin is wrapped was decided when the framework asked for the table; options that agree
/// with that are fine.
fn refuse_late_choice(config: &Config) -> Result<(), Error> {
    let loaded = inner();
    let is_loaded = |asked: &PathBuf| {
        *asked == loaded.path || find::find(config, loaded.device).is_ok_and(|p| p == loaded.path)
    };
    let other_file = config
        .inner_plugin
        .as_ref()
        .is_some_and(|asked| !is_loaded(asked));
    let other_device = match config.device {
        DeviceKind::Auto => false,
        asked => asked != loaded.device,
    };
    if other_file || other_device {
        return Err(Error::invalid(format!(
            "the create options ask for another inner plugin than {}, which was loaded with the \
             library: set MPI_CUDA_INNER_PLUGIN or MPI_CUDA_DEVICE in the environment",
            loaded.path.display()
        )));
    }
    Ok(())
}

/// `jax.distributed.initialize()` makes JAX pass `node_id` and `num_nodes`; MPI has the say, so
/// they must agree with it.
fn refuse_distributed(given: &[GivenOption<'_>], world: &World) -> Result<(), Error> {
    for (name, own) in [("node_id", world.rank), ("num_nodes", world.size)] {
        let numbers = given.iter().filter(|option| option.name == name);
        let number = numbers.filter_map(|option| option.number).next();
        if let Some(number) = number
            && number != i64::from(own)
        {
            return Err(Error::invalid(format!(
                "jax.distributed says {name}={number}, and MPI says {own}: leave \
                 jax.distributed.initialize() out (the world comes from MPI), or pass \
                 process_id={} and num_processes={}",
                world.rank, world.size
            )));
        }
    }
    Ok(())
}
