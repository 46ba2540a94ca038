//! Random numbers for tests that try what nobody would write, within a time.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// xorshift (Marsaglia, 2003), so that a failure can be repeated.
pub struct Random(u64);

impl Random {
    /// The same numbers for the same seed.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Any number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 33) as usize % bound
    }

    /// One of these.
    pub fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// Yes in so many of 100 cases.
    pub fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// Calls `body` with a generator for each case until `FUZZ_SECONDS` (2) have passed; a failure says
/// its number, with which `FUZZ_FIRST` begins. How many cases there were.
pub fn cases(mut body: impl FnMut(&mut Random)) -> u64 {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let end = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(2));
    let first = number("FUZZ_FIRST").unwrap_or(1);
    let mut case = first;
    while case == first || Instant::now() < end {
        let running = Running(case);
        body(&mut Random::new(case));
        std::mem::forget(running);
        case += 1;
    }
    case - first
}

struct Running(u64);

impl Drop for Running {
    fn drop(&mut self) {
        eprintln!("FUZZ_FIRST={} begins with what failed", self.0);
    }
}
