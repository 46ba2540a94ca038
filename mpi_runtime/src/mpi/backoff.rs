//! Waiting for something that may take minutes, as another rank's compilation does: asleep.

#![forbid(unsafe_code)]

use std::time::Duration;

/// Calls `look` until it has something, with pauses that grow to 2 ms.
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
