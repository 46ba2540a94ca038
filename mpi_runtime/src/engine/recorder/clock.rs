//! A clock that costs less than the system's: the processor's counter, where Linux itself keeps
//! time by it, and else the monotonic clock.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

/// A moment: ticks of the processor's counter, or nanoseconds of the monotonic clock. They become
/// nanoseconds by two moments that are known in both ([`Moment`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticks(pub u64);

/// A moment in ticks and as the time of day.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// In ticks.
    pub ticks: Ticks,
    /// Nanoseconds since 1970.
    pub wall: u64,
    /// Nanoseconds of the monotonic clock.
    monotonic: u64,
}

/// Not decided yet, the processor's counter, or the system's clock.
const UNDECIDED: u8 = 0;
const COUNTER: u8 = 1;
const SYSTEM: u8 = 2;

static SOURCE: AtomicU8 = AtomicU8::new(UNDECIDED);
static FIRST: OnceLock<Moment> = OnceLock::new();

impl Ticks {
    /// Now.
    #[inline]
    pub fn now() -> Ticks {
        match SOURCE.load(Ordering::Relaxed) {
            COUNTER => Ticks(counter()),
            SYSTEM => Ticks(system(libc::CLOCK_MONOTONIC)),
            _ => decide(),
        }
    }

    /// The time since then.
    pub fn elapsed(self) -> Duration {
        let (first, now) = (first(), Moment::now());
        let ticks = now.ticks.0.saturating_sub(first.ticks.0).max(1);
        let nanoseconds = now.monotonic.saturating_sub(first.monotonic) as f64;
        let since = now.ticks.0.saturating_sub(self.0) as f64;
        Duration::from_nanos((since * nanoseconds / ticks as f64) as u64)
    }
}

impl Moment {
    /// Now. Calls nothing that a signal handler must not, once [`first`] was called.
    pub fn now() -> Moment {
        Moment {
            ticks: Ticks::now(),
            wall: system(libc::CLOCK_REALTIME),
            monotonic: system(libc::CLOCK_MONOTONIC),
        }
    }

    /// Now, with ticks and the time of day as close together as a few attempts find them.
    pub fn exact() -> Moment {
        let mut best: Option<(u64, Moment)> = None;
        for _ in 0..8 {
            let before = Ticks::now();
            let mut moment = Moment::now();
            let gap = Ticks::now().0.saturating_sub(before.0);
            moment.ticks = Ticks(before.0 + gap / 2);
            if best.is_none_or(|(smallest, _)| gap < smallest) {
                best = Some((gap, moment));
            }
        }
        best.map_or_else(Moment::now, |(_, moment)| moment)
    }
}

/// Nanoseconds since 1970 at `ticks`, as the time of day went from the moment `from` to `to`.
pub fn wall_at(ticks: Ticks, from: &Moment, to: &Moment) -> u64 {
    // The differences are small numbers, and may be negative.
    let between = |from: u64, to: u64| to.wrapping_sub(from) as i64 as f64;
    let ticked = between(from.ticks.0, to.ticks.0).max(1.0);
    let since = between(from.ticks.0, ticks.0);
    let passed = since * (between(from.wall, to.wall) / ticked);
    from.wall.saturating_add_signed(passed as i64)
}

/// The first moment that was asked for.
pub fn first() -> Moment {
    // Decides before the moment is taken, so that no moment of this process is before it.
    Ticks::now();
    *FIRST.get_or_init(Moment::now)
}

/// Linux keeps time by the counter only where it runs at one speed and agrees between cores.
#[cold]
fn decide() -> Ticks {
    const FILE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let by_counter = cfg!(all(target_arch = "x86_64", not(miri)))
        && std::fs::read_to_string(FILE).is_ok_and(|name| name.trim() == "tsc");
    SOURCE.store(if by_counter { COUNTER } else { SYSTEM }, Ordering::Relaxed);
    first();
    Ticks::now()
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn counter() -> u64 {
    // SAFETY: every processor of this architecture has the instruction.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    system(libc::CLOCK_MONOTONIC)
}

/// Nanoseconds of one of the system's clocks.
fn system(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the struct is writable. Async-signal-safe (signal-safety(7)).
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_as_the_systems_clock() {
        let (ticks, start) = (Ticks::now(), std::time::Instant::now());
        std::thread::sleep(Duration::from_millis(30));
        let (own, systems) = (ticks.elapsed(), start.elapsed());
        let difference = own.as_secs_f64() - systems.as_secs_f64();
        assert!(difference.abs() < 0.005, "{own:?} {systems:?}");
        assert!(Ticks::now() > ticks);
    }

    #[test]
    fn ticks_become_the_time_of_day() {
        let (from, middle) = (Moment::exact(), Ticks::now());
        let wall = system(libc::CLOCK_REALTIME);
        std::thread::sleep(Duration::from_millis(20));
        let to = Moment::exact();
        let difference = wall_at(middle, &from, &to).abs_diff(wall);
        assert!(difference < 1_000_000, "{difference} ns");
        assert!(wall_at(to.ticks, &from, &to).abs_diff(to.wall) < 1000);
    }
}
