//! Processes of this machine, and whether they still run.

use std::cell::LazyCell;
use std::fs;
use std::os::unix::fs::MetadataExt;

thread_local! {
    static IS_MAIN: LazyCell<bool> = LazyCell::new(|| {
        // SAFETY: it takes nothing and cannot fail.
        let thread = unsafe { libc::gettid() };
        u32::try_from(thread) == Ok(std::process::id())
    });
}

/// Ends this process without what is to be run at its end.
pub fn leave_at_once(code: i32) -> ! {
    // SAFETY: it takes a number, and does not return.
    unsafe { libc::_exit(code) }
}

/// Whether the calling thread is the first one of this process.
pub fn is_main_thread() -> bool {
    IS_MAIN.with(|is_main| **is_main)
}

/// A process; another one never has the same three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    id: u64,
    /// When it started, in ticks since the machine did (`/proc/PID/stat`, proc(5)).
    started: u64,
    /// The namespace that its id belongs to: containers have ids of their own.
    namespace: u64,
}

impl Process {
    /// This one.
    pub(crate) fn own() -> Process {
        let id = u64::from(std::process::id());
        Process {
            id,
            started: state(id).map_or(0, |(_, started)| started),
            namespace: namespace(),
        }
    }

    /// As numbers, for shared memory.
    pub(crate) fn words(self) -> [u64; 3] {
        [self.id, self.started, self.namespace]
    }

    /// From those numbers.
    pub(crate) fn from_words([id, started, namespace]: [u64; 3]) -> Process {
        Process {
            id,
            started,
            namespace,
        }
    }

    /// Whether it runs, as far as one can see: nothing is known of other namespaces.
    pub(crate) fn is_alive(self) -> bool {
        if self.started == 0 || self.namespace != namespace() {
            return true;
        }
        // A zombie has ended, and waits for its parent to hear of it.
        state(self.id).is_some_and(|(state, started)| {
            started == self.started && !matches!(state, 'Z' | 'X' | 'x')
        })
    }
}

fn namespace() -> u64 {
    fs::metadata("/proc/self/ns/pid").map_or(0, |about| about.ino())
}

/// The state of a process, and when it started.
fn state(id: u64) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name before may have spaces and brackets in it.
    let mut fields = text[text.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // Fields 3 and 22.
    let started = fields.nth(22 - 4)?.parse().ok()?;
    Some((state, started))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_is_known_by_id_and_start() {
        let own = Process::own();
        assert!(own.started > 0 && own.is_alive());
        assert_eq!(Process::from_words(own.words()), own);
        let started = own.started + 1;
        assert!(!Process { started, ..own }.is_alive());
        let namespace = own.namespace + 1;
        assert!(
            Process {
                started,
                namespace,
                ..own
            }
            .is_alive()
        );
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = Command::new("true").spawn().unwrap();
        let id = u64::from(child.id());
        let (_, started) = state(id).unwrap();
        let process = Process {
            id,
            started,
            ..Process::own()
        };
        while state(id).unwrap().0 != 'Z' {
            std::thread::yield_now();
        }
        assert!(!process.is_alive());
        child.wait().unwrap();
        assert!(!process.is_alive());
    }
}
