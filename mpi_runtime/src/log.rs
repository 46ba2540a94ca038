//! The log of this library: lines on standard error, each behind the time, the host and the rank
//! that says it, as `2026-11-29T21:50:03.123+01:00 node01 rank 3: mpi_cuda: ...`
//! (docs/configuration.md).

#![forbid(unsafe_code)]

use std::fmt;
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::time_of_day::TimeOfDay;

const UNKNOWN: i32 = -1;

/// Rank in `COMM_WORLD`, once this process has joined it.
static RANK: AtomicI32 = AtomicI32::new(UNKNOWN);

/// From now on lines say this rank.
pub(crate) fn joined_as(rank: i32) {
    RANK.store(rank, Ordering::Relaxed);
}

/// The name of this machine, as Linux knows it.
pub(crate) fn host() -> &'static str {
    static HOST: OnceLock<String> = OnceLock::new();
    HOST.get_or_init(|| {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
        // A host without a name has a line too.
        let name = name.unwrap_or_default().trim().to_owned();
        if name.is_empty() { "?".into() } else { name }
    })
}

/// What stands before a text of ours, with the library's name.
pub fn prefix() -> String {
    let rank = RANK.load(Ordering::Relaxed);
    let who = match rank {
        UNKNOWN => Who::Process(std::process::id()),
        _ => Who::Rank(rank),
    };
    behind(&TimeOfDay::now(), host(), who)
}

/// Prints a text in one piece, so that ranks do not mix theirs. Only its first line is behind the
/// prefix.
pub fn line(text: &str) {
    let text = format!("{}{text}\n", prefix());
    // There is nowhere to report that standard error is closed.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

#[derive(Clone, Copy)]
enum Who {
    Rank(i32),
    /// Before the rank is known.
    Process(u32),
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Rank(rank) => write!(f, "rank {rank}"),
            Who::Process(id) => write!(f, "pid {id}"),
        }
    }
}

fn behind(time: &TimeOfDay, host: &str, who: Who) -> String {
    format!("{time} {host} {who}: mpi_cuda: ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_begins_with_time_host_and_rank() {
        let time = TimeOfDay::east_of_utc(1_795_989_003, 7, 3600);
        assert_eq!(
            behind(&time, "node01", Who::Rank(3)),
            "2026-11-29T22:50:03.007+01:00 node01 rank 3: mpi_cuda: "
        );
        assert_eq!(
            behind(&time, "node01", Who::Process(4711)),
            "2026-11-29T22:50:03.007+01:00 node01 pid 4711: mpi_cuda: "
        );
    }

    #[test]
    fn what_is_printed_has_this_form() {
        let prefix = prefix();
        let [time, name, _, _, last] = prefix.split_whitespace().collect::<Vec<_>>()[..] else {
            panic!("{prefix}");
        };
        assert_eq!(time.len(), "2026-11-29T22:50:03.007+01:00".len());
        assert_eq!((name, last), (host(), "mpi_cuda:"));
    }
}
