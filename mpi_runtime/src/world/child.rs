//! Children of ranks, which must not join the job.

use std::path::PathBuf;

use crate::error::StartError;
use crate::mpi::launcher::Launched;

/// Marks the environment of a rank, so that its children know that they are none. Holds the
/// process id and the rank's identity by its launcher. In a child that was forked before the rank
/// has joined, the start-up file has written the rank's process id and the child's own there.
const RANK_MARK: &str = "MPI_CUDA_RANK_PROCESS";

/// A child of a rank inherits the launcher's variables; as a second copy of that rank it would
/// hang or corrupt the job.
pub(super) fn refuse(launched: Option<&Launched>, singleton: bool) -> Result<(), StartError> {
    let Some(rank) = launched else {
        return Ok(());
    };
    let own = std::process::id();
    let mark = std::env::var(RANK_MARK).unwrap_or_default();
    if let Some((pid, marked)) = mark.split_once(' ') {
        let parent = pid.parse().unwrap_or(0);
        if marked == format!("forked as {own}") {
            return Err(StartError::Forked { pid: own, parent });
        }
        if is_of_this_job(marked, rank) && parent != own {
            return Err(StartError::Child { pid: own, parent });
        }
    }
    let joined = joined_file().and_then(|file| std::fs::read_to_string(file).ok());
    if let Some(pid) = joined.and_then(|pid| pid.parse().ok())
        && pid != own
    {
        return Err(StartError::JoinedByOther { pid });
    }
    match rank.pmi_fd {
        Some(fd) if rank.size > 1 && !singleton && socket(fd).is_none() => {
            Err(StartError::NotConnected { fd })
        }
        _ => Ok(()),
    }
}

/// Where the process that has joined as this rank writes its id: a folder of the launcher's for
/// this job alone. A child may use JAX before the rank itself does. That is for the launcher of
/// Open MPI 4, which takes no second process of a rank, also if the first one has ended; others
/// may.
fn joined_file() -> Option<PathBuf> {
    std::env::var_os("OMPI_MCA_orte_hnp_uri")?;
    let folder = PathBuf::from(std::env::var_os("PMIX_SERVER_TMPDIR")?);
    let [namespace, rank] = ["PMIX_NAMESPACE", "PMIX_RANK"].map(std::env::var);
    let name = format!("mpi_cuda.{}.{}", namespace.ok()?, rank.ok()?);
    Some(folder.join(name.replace('/', "_")))
}

/// Whether a mark is of this process's own rank. A job that a rank starts under MPICH may have the
/// same numbers as its own, and has a connection of its own to its launcher.
fn is_of_this_job(mark: &str, rank: &Launched) -> bool {
    let (identity, marked) = mark.rsplit_once(SOCKET).unwrap_or((mark, ""));
    let own = rank.pmi_fd.and_then(socket);
    identity == rank.identity && own.is_none_or(|own| marked == own.to_string())
}

/// What stands in a mark before the number of the rank's connection.
const SOCKET: &str = " by socket ";

/// The number of the socket (its inode) that is open by the number `fd`, if one is: the launcher's
/// connection is closed in the children of a rank.
fn socket(fd: i32) -> Option<u64> {
    // SAFETY: zero is valid for this C struct.
    let mut about: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: it takes any number, and fills `about` if it returns 0.
    let is_open = unsafe { libc::fstat(fd, &mut about) } == 0;
    (is_open && about.st_mode & libc::S_IFMT == libc::S_IFSOCK).then_some(about.st_ino)
}

/// Marks this process as a rank.
pub(super) fn mark(launched: Option<&Launched>) {
    let Some(rank) = launched else { return };
    let mut mark = format!("{} {}", std::process::id(), rank.identity);
    if let Some(own) = rank.pmi_fd.and_then(socket) {
        mark += &format!("{SOCKET}{own}");
    }
    // SAFETY: Rust and Python read the environment under locks of their own; this runs while one
    // thread creates the backend, as `MPI_Init` itself (which also sets variables) does.
    unsafe { std::env::set_var(RANK_MARK, mark) };
    if let Some(file) = joined_file() {
        // Where the folder is not this user's, MPI alone says what a second process meets.
        let _ = std::fs::write(file, std::process::id().to_string());
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_mark_is_of_the_same_rank_unless_its_connection_is_another() {
        let pair = std::os::unix::net::UnixStream::pair().unwrap();
        let own = socket(pair.0.as_raw_fd()).unwrap();
        let mut rank = Launched {
            launcher: "mpirun",
            size: 2,
            family: None,
            without_pmi: false,
            identity: "7/0".into(),
            pmi_fd: Some(pair.0.as_raw_fd()),
        };
        assert!(is_of_this_job(&format!("7/0{SOCKET}{own}"), &rank));
        assert!(!is_of_this_job(&format!("7/0{SOCKET}{}", own + 1), &rank));
        assert!(!is_of_this_job(&format!("7/1{SOCKET}{own}"), &rank));
        // A child has the number and not the connection.
        rank.pmi_fd = Some(-1);
        assert!(is_of_this_job(&format!("7/0{SOCKET}{own}"), &rank));
        rank.pmi_fd = None;
        assert!(is_of_this_job("7/0", &rank));
    }
}
