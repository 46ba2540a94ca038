//! Whether this process may start the threads of an inner client. XLA ends the process where it may
//! not, without a word of which limit it is.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::error::Error;

/// Of a thread of XLA's, which it reserves and does not use.
const STACK: usize = 6 << 20;
/// Threads of a client, beside two for each core.
const OTHERS: usize = 12;

/// Checks that a client of so many devices may start its threads.
///
/// # Errors
/// If not: with the number needed, the limits, and the remedy.
pub fn check(devices: usize) -> Result<(), Error> {
    let cores = cores();
    // Of clients of several devices: measured, 1.3 for each.
    let needed = 2 * cores + OTHERS + (devices.saturating_sub(1) * 4).div_ceil(3);
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let mut threads = Vec::new();
    let failed = start(needed, &mut threads, || {
        let gate = gate.clone();
        let waits = move || {
            let open = gate.0.lock().unwrap_or_else(PoisonError::into_inner);
            let _open = gate.1.wait_while(open, |open| !*open);
        };
        thread::Builder::new().stack_size(STACK).spawn(waits)
    });
    *gate.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
    gate.1.notify_all();
    for thread in threads {
        // It cannot panic.
        let _ = thread.join();
    }
    match failed {
        None => Ok(()),
        Some((number, error)) => Err(Error::exhausted(words(needed, number, &error, cores))),
    }
}

/// Starts so many threads; which one could not be started, and why.
fn start(
    needed: usize,
    threads: &mut Vec<JoinHandle<()>>,
    mut spawn: impl FnMut() -> io::Result<JoinHandle<()>>,
) -> Option<(usize, io::Error)> {
    for number in 1..=needed {
        match spawn() {
            Ok(thread) => threads.push(thread),
            Err(error) => return Some((number, error)),
        }
    }
    None
}

/// The cores that XLA starts threads for: those that this process may run on, or `NPROC`.
fn cores() -> usize {
    let asked = std::env::var("NPROC").ok();
    let asked = asked.and_then(|text| text.trim().parse().ok());
    let there = || thread::available_parallelism().map_or(1, usize::from);
    asked.filter(|&cores| cores > 0).unwrap_or_else(there)
}

fn words(needed: usize, number: usize, error: &io::Error, cores: usize) -> String {
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line[name.len()..].split_whitespace().next());
        value.unwrap_or("unknown").to_owned()
    };
    format!(
        "XLA's client needs {needed} threads for {cores} core(s), and this process may not start \
         that many: number {number} failed with {error}. Its limits: processes and threads of the \
         user (ulimit -u) {}, of the control group (pids.max) {}, bytes of addresses (ulimit -v) \
         {}. Have the one that is reached raised, start fewer ranks on a node, or give each fewer \
         cores, such as by NPROC=1: XLA starts two threads for each",
        limit("Max processes"),
        of_control_group().unwrap_or_else(|| "unknown".into()),
        limit("Max address space"),
    )
}

/// How many processes and threads the control group of this process may have (cgroups(7)).
fn of_control_group() -> Option<String> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let limit = fs::read_to_string(format!("/sys/fs/cgroup{group}/pids.max")).ok()?;
    Some(limit.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_may_not_be_started_are_counted() {
        let mut threads = Vec::new();
        let mut left = 3;
        let failed = start(5, &mut threads, || {
            left -= 1;
            match left {
                0 => Err(io::Error::from(io::ErrorKind::WouldBlock)),
                _ => thread::Builder::new().spawn(|| ()),
            }
        });
        let (number, error) = failed.unwrap();
        assert_eq!((number, threads.len()), (3, 2));
        let words = words(16, number, &error, 2);
        assert!(words.contains("needs 16 threads for 2 core(s)"), "{words}");
        assert!(words.contains("number 3 failed with"), "{words}");
        assert!(words.contains("(ulimit -u) ") && !words.contains("(ulimit -u) unknown"));
        assert!(check(1).is_ok());
    }
}
