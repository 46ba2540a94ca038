//! Waiting for what another rank or thread does: by looking again and again, with pauses.

#![forbid(unsafe_code)]

use std::time::Duration;

/// Looks before the core is given up between them.
const SPINS: u32 = 64;

/// Between two looks of a thread at something that changes soon; `spins` counts them.
pub fn pause(spins: &mut u32) {
    if *spins < SPINS {
        *spins += 1;
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

/// Calls `look` until it has something, with pauses that grow to 2 ms: for what may take minutes,
/// as another rank's compilation does.
pub fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    const LONGEST: Duration = Duration::from_millis(2);
    let mut pause = Duration::from_micros(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST);
    }
}
