//! The launcher's own MPI libraries: those of the installation whose launcher is among the
//! processes above this one.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use crate::mpi::family::Family;

/// How the files of launchers and of their daemons begin: Open MPI's with ORTE and PRRTE, Hydra of
/// MPICH and Intel MPI, ParaStation's.
const LAUNCHERS: [&str; 8] = [
    "mpirun",
    "mpiexec",
    "orte",
    "ompirun",
    "prte",
    "hydra_",
    "pmi_proxy",
    "psid",
];
/// Where an installation has its libraries, from its prefix. Intel MPI has several builds, Debian a
/// folder for each architecture.
const FOLDERS: [&str; 5] = ["lib", "lib64", "lib/release", DEBIAN, "lib/mpi"];
#[cfg(target_arch = "aarch64")]
const DEBIAN: &str = "lib/aarch64-linux-gnu";
#[cfg(not(target_arch = "aarch64"))]
const DEBIAN: &str = "lib/x86_64-linux-gnu";
/// How many processes above this one are looked at.
const MOST: usize = 16;

/// The MPI libraries of the nearest launcher above this process that has any.
pub fn libraries_of_launcher() -> Vec<PathBuf> {
    let all = above(|id| fs::read_to_string(format!("/proc/{id}/stat")).ok());
    let files = all.iter();
    files
        .filter_map(|id| fs::read_link(format!("/proc/{id}/exe")).ok())
        .map(|file| beside(&file, Path::is_file))
        .find(|libraries| !libraries.is_empty())
        .unwrap_or_default()
}

/// The processes above this one, the nearest first, from what `/proc/PID/stat` says (proc(5)).
fn above(stat: impl Fn(u32) -> Option<String>) -> Vec<u32> {
    let parent = |id: &u32| {
        let text = stat(*id)?;
        // The name before may have spaces and brackets in it.
        let mut fields = text[text.rfind(')')? + 1..].split_ascii_whitespace();
        fields.nth(1)?.parse().ok().filter(|&parent| parent != 0)
    };
    let own = std::process::id();
    let all = std::iter::successors(Some(own), parent);
    all.skip(1).take(MOST).collect()
}

/// The MPI libraries of the installation that has this launcher; none if it is no launcher.
fn beside(launcher: &Path, is_file: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let name = launcher.file_name().unwrap_or_default().to_string_lossy();
    let prefix = launcher.parent().and_then(Path::parent);
    let (true, Some(prefix)) = (LAUNCHERS.iter().any(|own| name.starts_with(own)), prefix) else {
        return Vec::new();
    };
    let names = || Family::ALL.into_iter().flat_map(Family::libraries);
    let folders = FOLDERS.iter().map(|folder| prefix.join(folder));
    folders
        .flat_map(|folder| names().map(move |name| folder.join(name)))
        .filter(|path| is_file(path))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installation_has_its_libraries_beside_its_launcher() {
        let files = [
            "/v/lib/libmpi.so.12",
            "/v/lib/libmpi_abi.so.1",
            "/usr/lib/x86_64-linux-gnu/libmpich.so.12",
            "/i/lib/release/libmpi.so.12",
        ];
        let beside = |launcher: &str| {
            beside(Path::new(launcher), |path| {
                files.iter().any(|file| path == Path::new(file))
            })
        };
        assert_eq!(
            beside("/v/bin/hydra_pmi_proxy"),
            [files[0], files[1]].map(Path::new)
        );
        assert_eq!(beside("/i/bin/mpiexec.hydra"), [Path::new(files[3])]);
        for none in ["/v/bin/bash", "/w/bin/mpirun", "/usr/bin/python3", "mpirun"] {
            assert!(beside(none).is_empty(), "{none}");
        }
        #[cfg(target_arch = "x86_64")]
        assert_eq!(beside("/usr/bin/mpiexec.hydra"), [Path::new(files[2])]);
    }

    #[test]
    fn the_processes_above_are_found() {
        let own = std::process::id();
        let stat = |id: u32| match id {
            7 => Some("7 (a) b) S 5 7".to_owned()),
            5 => Some("5 (init) S 0 5".to_owned()),
            id if id == own => Some(format!("{id} (python 3) R 7 1")),
            _ => None,
        };
        assert_eq!(above(stat), [7, 5]);
    }
}
