//! Children of ranks, which must not join the job.

use crate::error::StartError;
use crate::mpi::launcher::Launched;

/// Marks the environment of a rank, so that its children know that they are none. Holds the
/// process id and the rank's identity by its launcher.
const RANK_MARK: &str = "MPI_CUDA_RANK_PROCESS";

/// A child of a rank inherits the launcher's variables; as a second copy of that rank it would
/// hang or corrupt the job.
pub(super) fn refuse(launched: Option<&Launched>) -> Result<(), StartError> {
    let Ok(mark) = std::env::var(RANK_MARK) else {
        return Ok(());
    };
    let Some((pid, marked)) = mark.split_once(' ') else {
        return Ok(());
    };
    let (pid, own) = (pid.parse().unwrap_or(0), std::process::id());
    if launched.is_some() && marked == identity(launched) && pid != own {
        return Err(StartError::Child {
            pid: own,
            parent: pid,
        });
    }
    Ok(())
}

/// Marks this process as a rank.
pub(super) fn mark(launched: Option<&Launched>) {
    let mark = format!("{} {}", std::process::id(), identity(launched));
    // SAFETY: Rust and Python read the environment under locks of their own; this runs while one
    // thread creates the backend, as `MPI_Init` itself (which also sets variables) does.
    unsafe { std::env::set_var(RANK_MARK, mark) };
}

fn identity(launched: Option<&Launched>) -> &str {
    launched.map_or("", |launched| launched.identity.as_str())
}
