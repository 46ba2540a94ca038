//! The time of day in the time zone of this process, as ISO 8601 writes it.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A moment in a time zone, with milliseconds.
pub(crate) struct TimeOfDay {
    parts: libc::tm,
    milliseconds: u32,
}

impl TimeOfDay {
    pub(crate) fn now() -> TimeOfDay {
        // A clock before 1970 is wrong anyway.
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self::local(since.unwrap_or_default())
    }

    /// In the time zone that TZ or the machine has when this is first asked for.
    fn local(since_1970: Duration) -> TimeOfDay {
        let seconds = since_1970.as_secs() as libc::time_t;
        let mut parts = empty();
        // SAFETY: both are values of ours, of which localtime_r(3) keeps nothing.
        unsafe { libc::localtime_r(&seconds, &mut parts) };
        TimeOfDay {
            parts,
            milliseconds: since_1970.subsec_millis(),
        }
    }

    /// In a time zone so many seconds east of UTC.
    #[cfg(test)]
    pub(crate) fn east_of_utc(since_1970: i64, milliseconds: u32, east: i64) -> TimeOfDay {
        let mut parts = empty();
        // SAFETY: as for localtime_r.
        unsafe { libc::gmtime_r(&(since_1970 + east), &mut parts) };
        parts.tm_gmtoff = east;
        TimeOfDay {
            parts,
            milliseconds,
        }
    }
}

fn empty() -> libc::tm {
    // SAFETY: numbers and a pointer, which are all valid as zeros.
    unsafe { std::mem::zeroed() }
}

impl fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let libc::tm {
            tm_year: year,
            tm_mon: month,
            tm_mday: day,
            tm_hour: hour,
            tm_min: minute,
            tm_sec: second,
            tm_gmtoff: east,
            ..
        } = self.parts;
        let sign = if east < 0 { '-' } else { '+' };
        let minutes = east.abs() / 60;
        write!(
            f,
            "{:04}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}{sign}{:02}:{:02}",
            year + 1900,
            month + 1,
            self.milliseconds,
            minutes / 60,
            minutes % 60,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_says_how_far_from_utc_it_is() {
        let written = |time, ms, east| TimeOfDay::east_of_utc(time, ms, east).to_string();
        assert_eq!(written(0, 0, 0), "1970-01-01T00:00:00.000+00:00");
        assert_eq!(
            written(951_782_399, 999, 0),
            "2000-02-28T23:59:59.999+00:00"
        );
        assert_eq!(
            written(951_782_400, 1, 19_800),
            "2000-02-29T05:30:00.001+05:30"
        );
        assert_eq!(written(0, 12, -12_600), "1969-12-31T20:30:00.012-03:30");
    }

    #[test]
    fn the_local_time_is_the_same_moment() {
        let second = 1_795_989_003;
        let local = TimeOfDay::local(Duration::from_millis(second * 1000 + 456));
        let east = local.parts.tm_gmtoff;
        let other = TimeOfDay::east_of_utc(second as i64, 456, east);
        assert_eq!(local.to_string(), other.to_string());
    }
}
