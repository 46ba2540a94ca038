//! Finding the inner XLA plugin: everything that depends on which wheel it comes from.

use std::ffi::CStr;
use std::path::{Path, PathBuf};

use mpi_runtime::device::cuda::{self, Found};

use crate::config::{Config, DeviceKind};
use crate::error::Error;

/// Where wheels put their plugin, below `site-packages`, and under which name beside our file.
struct Wheel {
    device: DeviceKind,
    package: &'static str,
    in_site_packages: &'static str,
}

const WHEELS: &[Wheel] = &[
    // The file that JAX's own package uses: what that registers (callbacks, linear algebra) is
    // there then.
    Wheel {
        device: DeviceKind::Cuda,
        package: "jax-cuda13-pjrt",
        in_site_packages: "jax_plugins/xla_cuda13/xla_cuda_plugin.so",
    },
    Wheel {
        device: DeviceKind::Cuda,
        package: "jax-cuda12-pjrt",
        in_site_packages: "jax_plugins/xla_cuda12/xla_cuda_plugin.so",
    },
    Wheel {
        device: DeviceKind::Cuda,
        package: "xla-cuda13-pjrt",
        in_site_packages: "xla_plugins/xla_cuda13_pjrt/xla_gpu_pjrt.so",
    },
    Wheel {
        device: DeviceKind::Cuda,
        package: "xla-cuda12-pjrt",
        in_site_packages: "xla_plugins/xla_cuda12_pjrt/xla_gpu_pjrt.so",
    },
    // The newer one first (docs/compatibility.md, "Plugins for the CPU").
    Wheel {
        device: DeviceKind::Cpu,
        package: "lammps-jax-pjrt-cpu",
        in_site_packages: "lammps_jax_pjrt_cpu/pjrt_c_api_cpu_plugin.so",
    },
    Wheel {
        device: DeviceKind::Cpu,
        package: "xla-cpu-pjrt",
        in_site_packages: "xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so",
    },
];

/// The wheels for one kind of device, the preferred one first.
fn wheels(device: DeviceKind) -> impl Iterator<Item = &'static Wheel> {
    WHEELS.iter().filter(move |wheel| wheel.device == device)
}

/// The wheel that `MPI_CUDA_INNER_PLUGIN` names instead of a file.
fn named(plugin: &Path) -> Option<&'static Wheel> {
    let name = plugin.to_str()?.replace('_', "-");
    WHEELS.iter().find(|wheel| wheel.package == name)
}

/// What the inner plugin's devices are to be, and why.
pub fn choose(config: &Config) -> Result<(DeviceKind, String), Error> {
    if let Some(wheel) = config.inner_plugin.as_deref().and_then(named) {
        return wheel.choose(config.device);
    }
    Ok(match config.device {
        // Of a file that the user names nobody knows what it is for.
        DeviceKind::Auto if config.inner_plugin.is_some() => (
            DeviceKind::Cpu,
            "MPI_CUDA_INNER_PLUGIN without MPI_CUDA_DEVICE".into(),
        ),
        DeviceKind::Auto => automatic(&cuda::find(), || find(config, DeviceKind::Cuda)),
        DeviceKind::Cpu => (DeviceKind::Cpu, "as asked for".into()),
        DeviceKind::Cuda => {
            refuse_without_gpu("MPI_CUDA_DEVICE=cuda")?;
            (DeviceKind::Cuda, "as asked for".into())
        }
    })
}

/// Whoever asks for a GPU hears what is missing here, and not in the words of the inner plugin.
fn refuse_without_gpu(asked: &str) -> Result<(), Error> {
    match missing(&cuda::find()) {
        None => Ok(()),
        Some(missing) => Err(Error::precondition(format!(
            "{asked}, but {missing}; use MPI_CUDA_DEVICE=cpu, without a plugin for GPUs"
        ))),
    }
}

/// What keeps this machine from having a GPU.
fn missing(found: &Found) -> Option<String> {
    match found {
        Found::Devices { count, .. } if *count > 0 => None,
        Found::Devices { .. } => {
            Some("the CUDA driver sees no device (CUDA_VISIBLE_DEVICES?)".into())
        }
        Found::NoDriver => Some("there is no CUDA driver (libcuda.so.1)".into()),
        Found::Broken(reason) => Some(reason.clone()),
    }
}

/// GPUs where there are a driver, a device and a plugin; which, and why.
fn automatic(
    found: &Found,
    plugin: impl FnOnce() -> Result<PathBuf, Error>,
) -> (DeviceKind, String) {
    match missing(found) {
        Some(missing) => (DeviceKind::Cpu, missing),
        None => match plugin() {
            Ok(_) => (
                DeviceKind::Cuda,
                "a driver, a device and a plugin are there".into(),
            ),
            Err(_) => {
                let wheels = "jax-cuda13-pjrt or jax-cuda12-pjrt";
                let reason = format!("there are GPUs, but no plugin for them; install {wheels}");
                (DeviceKind::Cpu, reason)
            }
        },
    }
}

/// A wheel or file that the user names, or the first wheel that is there.
pub fn find(config: &Config, device: DeviceKind) -> Result<PathBuf, Error> {
    let Some(plugin) = &config.inner_plugin else {
        return find_first(wheels(device), device);
    };
    if let Some(wheel) = named(plugin) {
        return find_first(std::iter::once(wheel), wheel.device);
    }
    if plugin.is_file() {
        return Ok(plugin.clone());
    }
    let known: Vec<_> = WHEELS.iter().map(|wheel| wheel.package).collect();
    Err(Error::precondition(format!(
        "MPI_CUDA_INNER_PLUGIN={} is not a file, and not one of the wheels {}",
        plugin.display(),
        known.join(", ")
    )))
}

/// Looks where Python finds its packages (`python/mpi_cuda/_library.py`), then beside our own file,
/// then in the site-packages that we lie in. If Python has not told, last where packages of this
/// process come from, and in virtual environments.
fn find_first(
    wheels: impl Iterator<Item = &'static Wheel>,
    device: DeviceKind,
) -> Result<PathBuf, Error> {
    let variable = match device {
        DeviceKind::Cuda => "MPI_CUDA_PLUGIN_CUDA",
        _ => "MPI_CUDA_PLUGIN_CPU",
    };
    let by_python = std::env::var_os(variable).unwrap_or_default();
    let by_python: Vec<_> = std::env::split_paths(&by_python).collect();
    let own = own_folder();
    let wheels: Vec<_> = wheels.collect();
    let told = |wheel: &&'static Wheel| {
        let mut files = by_python.iter();
        files
            .find(|path| path.ends_with(wheel.in_site_packages) && path.is_file())
            .cloned()
            .or_else(|| wheel.near(&own))
    };
    if let Some(path) = wheels.iter().find_map(told) {
        return Ok(path);
    }
    // Our Python package has looked in all of Python's own, where it is loaded.
    let elsewhere = match std::env::var_os("MPI_CUDA_PACKAGES") {
        None => site_packages(&own),
        Some(_) => Vec::new(),
    };
    let inside = |wheel: &&'static Wheel| {
        let mut files = elsewhere
            .iter()
            .map(|folder| folder.join(wheel.in_site_packages));
        files.find(|path| path.is_file())
    };
    if let Some(path) = wheels.iter().find_map(inside) {
        return Ok(path);
    }
    let missing: Vec<_> = wheels.iter().map(|wheel| wheel.package).collect();
    let places = match std::env::var_os("MPI_CUDA_PACKAGES") {
        None => "in the site-packages of this process and of $VIRTUAL_ENV",
        Some(_) => "and where this Python finds packages",
    };
    Err(Error::precondition(format!(
        "no inner XLA plugin found: install the Python wheel {}, or set MPI_CUDA_INNER_PLUGIN to \
         the path of an XLA PJRT plugin (looked in and above {}, {places})",
        missing.join(" or "),
        own.display()
    )))
}

/// Folders with packages: those of files that this process has loaded, and those of the virtual
/// environments that the shell names or that lie beside a folder above ours.
fn site_packages(own: &Path) -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut found: Vec<PathBuf> = Vec::new();
    for line in maps.lines() {
        let file = line.find('/').map(|start| Path::new(&line[start..]));
        let mut folders = file.into_iter().flat_map(Path::ancestors);
        let folder = folders
            .find(|folder| folder.ends_with("site-packages") || folder.ends_with("dist-packages"));
        if let Some(folder) = folder.filter(|folder| !found.iter().any(|known| known == folder)) {
            found.push(folder.to_owned());
        }
    }
    let named = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let beside = own.ancestors().map(|folder| folder.join(".venv"));
    for environment in named.into_iter().chain(beside) {
        let versions = std::fs::read_dir(environment.join("lib"));
        let versions = versions.into_iter().flatten().flatten();
        found.extend(versions.map(|version| version.path().join("site-packages")));
    }
    found
}

impl Wheel {
    /// It brings its device; another one cannot be asked for.
    fn choose(&self, asked: DeviceKind) -> Result<(DeviceKind, String), Error> {
        let reason = format!("MPI_CUDA_INNER_PLUGIN={}", self.package);
        if asked != DeviceKind::Auto && asked != self.device {
            return Err(Error::precondition(format!(
                "{reason} is for devices of kind {:?}, and MPI_CUDA_DEVICE says {asked:?}: leave \
                 out one of the two",
                self.device
            )));
        }
        if self.device == DeviceKind::Cuda {
            refuse_without_gpu(&reason)?;
        }
        Ok((self.device, reason))
    }

    /// Its file in or above a folder, below `site-packages` or alone.
    fn near(&self, folder: &Path) -> Option<PathBuf> {
        let in_site_packages = Path::new(self.in_site_packages);
        let alone = Path::new(in_site_packages.file_name()?);
        folder
            .ancestors()
            .take(8)
            .flat_map(|folder| [folder.join(alone), folder.join(in_site_packages)])
            .find(|path| path.is_file())
    }
}

/// The folder of this very library.
pub fn own_folder() -> PathBuf {
    let here: fn() -> PathBuf = own_folder;
    // SAFETY: zero is valid for this C struct, which dladdr fills in; the address lies in this
    // library, and the path is NUL-terminated (dladdr(3)).
    let path = unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        let found = libc::dladdr(here as *const libc::c_void, &mut info);
        if found == 0 || info.dli_fname.is_null() {
            return PathBuf::from(".");
        }
        CStr::from_ptr(info.dli_fname)
            .to_string_lossy()
            .into_owned()
    };
    let path = std::fs::canonicalize(&path).unwrap_or_else(|_| PathBuf::from(path));
    path.parent()
        .map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// The wheel prints lines about fusions at every compile; they concern nobody.
pub fn silence_logs() {
    const VARIABLE: &str = "TF_CPP_MIN_LOG_LEVEL";
    // JAX itself sets 1 at import; any other value is the user's.
    if std::env::var(VARIABLE).is_ok_and(|level| level != "1") {
        return;
    }
    // SAFETY: it runs once, while the framework loads plugins, before threads of ours exist.
    unsafe { std::env::set_var(VARIABLE, "3") };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wheel_is_known_by_its_name_and_brings_its_device() {
        let config = |plugin: &str, device| Config {
            inner_plugin: Some(plugin.into()),
            device,
            ..Config::default()
        };
        let chosen = |plugin, device| choose(&config(plugin, device));
        for name in ["lammps-jax-pjrt-cpu", "xla_cpu_pjrt"] {
            for asked in [DeviceKind::Auto, DeviceKind::Cpu] {
                assert_eq!(chosen(name, asked).ok().unwrap().0, DeviceKind::Cpu);
            }
            let error = chosen(name, DeviceKind::Cuda).unwrap_err().to_string();
            assert!(error.contains("is for devices of kind Cpu"), "{error}");
        }
        let error = chosen("jax-cuda12-pjrt", DeviceKind::Cpu).unwrap_err();
        assert!(error.to_string().contains("of kind Cuda"), "{error}");
        let error = find(&config("xla-cpu", DeviceKind::Auto), DeviceKind::Cpu).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("not one of the wheels jax-cuda13-pjrt")
        );
    }

    #[test]
    fn a_wheel_is_found_beside_us_and_above_us() {
        let root = std::env::temp_dir().join(format!("mpi_cuda_find_{}", std::process::id()));
        let own = root.join("mpi_cuda/lib");
        std::fs::create_dir_all(&own).unwrap();
        for wheel in wheels(DeviceKind::Cpu) {
            assert_eq!(wheel.near(&own), None);
            let file = root.join(wheel.in_site_packages);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "").unwrap();
            assert_eq!(wheel.near(&own), Some(file.clone()));
            let beside = own.join(file.file_name().unwrap());
            std::fs::write(&beside, "").unwrap();
            assert_eq!(wheel.near(&own), Some(beside));
        }
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn gpus_are_taken_where_everything_is_there() {
        let here = || Ok(PathBuf::from("/plugin.so"));
        let none = || Err(Error::precondition("no plugin"));
        let devices = |count| Found::Devices {
            count,
            version: 13000,
        };
        assert_eq!(automatic(&devices(2), here).0, DeviceKind::Cuda);
        for (found, text) in [
            (devices(0), "CUDA_VISIBLE_DEVICES"),
            (Found::NoDriver, "no CUDA driver"),
            (Found::Broken("error 999".into()), "error 999"),
        ] {
            let (device, reason) = automatic(&found, here);
            assert!(
                device == DeviceKind::Cpu && reason.contains(text),
                "{reason}"
            );
        }
        let (device, reason) = automatic(&devices(1), none);
        assert!(device == DeviceKind::Cpu && reason.contains("install jax-cuda13-pjrt"));
    }
}
