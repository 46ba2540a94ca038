//! What was found out about direct transfer in an earlier job, in a file for each MPI, driver and
//! plugin.

#![forbid(unsafe_code)]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;
use std::{fs, io};

use crate::node::own_file;
use crate::transfer::choice::{ProbeResult, Through};

/// How the texts of a failure and of an attempt begin.
const FAILED: &str = "failed: ";
const TRYING: &str = "trying ";

/// Where probe results are kept, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeResults {
    /// A folder, which need not exist.
    pub folder: PathBuf,
    /// What is used besides MPI: the driver and the plugin, with their versions.
    pub with: String,
}

impl ProbeResults {
    fn key(&self, mpi: &str) -> String {
        format!("{}; {}", mpi.replace('\n', " "), self.with)
    }

    fn file(&self, key: &str) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        self.folder.join(format!("direct-{:016x}", hasher.finish()))
    }

    /// What is known of `mpi`, the library in words.
    pub fn read(&self, mpi: &str) -> ProbeResult {
        match self.state(mpi) {
            Ok(state) => state.map_or(ProbeResult::None, |state| parse(&state)),
            // It would decide what memory MPI is given.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => ProbeResult::Fails(
                format!("{error}: it is not trusted; remove it and run the probe again"),
            ),
            Err(_) => ProbeResult::None,
        }
    }

    /// What was being tried in a job that has not reported.
    pub fn unfinished(&self, mpi: &str) -> Option<String> {
        let state = self.state(mpi).ok()??;
        Some(state.strip_prefix(TRYING)?.to_owned())
    }

    fn state(&self, mpi: &str) -> io::Result<Option<String>> {
        let key = self.key(mpi);
        let mut text = String::new();
        own_file::open(&self.file(&key), false)?.read_to_string(&mut text)?;
        let of_this = text.split_once('\n').filter(|(of, _)| *of == key);
        Ok(of_this.map(|(_, state)| state.trim_end().to_owned()))
    }

    /// Keeps what is known: `arrays`, `copies`, `failed: WHY`, or `trying arrays` before an attempt
    /// that the process may not survive.
    ///
    /// # Errors
    /// If it is none of these, or the file cannot be written.
    pub fn write(&self, mpi: &str, state: &str) -> io::Result<()> {
        if parse(state) == ProbeResult::None {
            let text = format!("`{state}` says nothing about direct transfer");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let key = self.key(mpi);
        let file = self.file(&key);
        // Ranks of several nodes may have one number.
        let unfinished = file.with_extension(format!("{:x}", own_file::random()));
        fs::create_dir_all(&self.folder)?;
        own_file::create(&unfinished)?.write_all(format!("{key}\n{state}\n").as_bytes())?;
        fs::rename(unfinished, file)
    }
}

fn parse(state: &str) -> ProbeResult {
    match state {
        "arrays" => ProbeResult::Works(Through::Arrays),
        "copies" => ProbeResult::Works(Through::Copies),
        _ => match (state.strip_prefix(FAILED), state.strip_prefix(TRYING)) {
            (Some(why), _) => ProbeResult::Fails(why.to_owned()),
            (_, Some(what)) => ProbeResult::Fails(format!(
                "the job that tried it with {what} did not end; run the probe again"
            )),
            _ => ProbeResult::None,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_probe_result_is_of_one_mpi_driver_and_plugin() {
        let folder =
            std::env::temp_dir().join(format!("mpi_cuda_probe_result_{}", std::process::id()));
        let probe_results = |with: &str| ProbeResults {
            folder: folder.clone(),
            with: with.into(),
        };
        let here = probe_results("driver 13000, plugin 0.112");
        assert_eq!(here.read("Open MPI 5.0.7"), ProbeResult::None);
        for (state, probe_result) in [
            ("arrays", ProbeResult::Works(Through::Arrays)),
            ("copies", ProbeResult::Works(Through::Copies)),
            (
                "failed: wrong data",
                ProbeResult::Fails("wrong data".into()),
            ),
        ] {
            here.write("Open MPI 5.0.7", state).unwrap();
            assert_eq!(here.read("Open MPI 5.0.7"), probe_result);
        }
        assert_eq!(here.read("MPICH 4.3"), ProbeResult::None);
        assert_eq!(
            probe_results("driver 12080, plugin 0.112").read("Open MPI 5.0.7"),
            ProbeResult::None
        );
        here.write("Open MPI 5.0.7", "trying arrays").unwrap();
        assert!(
            matches!(here.read("Open MPI 5.0.7"), ProbeResult::Fails(why) if why.contains("again"))
        );
        assert_eq!(here.unfinished("Open MPI 5.0.7").unwrap(), "arrays");
        assert!(here.write("Open MPI 5.0.7", "perhaps").is_err());
        // A file of something else, as where two keys have one hash.
        let file = here.file(&here.key("Open MPI 5.0.7"));
        fs::write(&file, "Open MPI 4\narrays\n").unwrap();
        assert_eq!(here.read("Open MPI 5.0.7"), ProbeResult::None);
        // A file that others may write to decides nothing.
        here.write("Open MPI 5.0.7", "arrays").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o666)).unwrap();
        let read = here.read("Open MPI 5.0.7");
        assert!(matches!(read, ProbeResult::Fails(why) if why.contains("other users")));
        here.write("Open MPI 5.0.7", "arrays").unwrap();
        let works = ProbeResult::Works(Through::Arrays);
        assert_eq!(here.read("Open MPI 5.0.7"), works);
        fs::remove_dir_all(folder).unwrap();
    }
}
