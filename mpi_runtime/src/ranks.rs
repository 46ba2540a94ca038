//! Ranks in words: short, however many they are.

#![forbid(unsafe_code)]

use std::fmt;

/// Ranks, written as ranges in their order: `0-3,7,9-11`.
#[derive(Clone, Copy, Debug)]
pub struct Ranks<'a>(pub &'a [i32]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self
            .0
            .chunk_by(|one, next| one.checked_add(1) == Some(*next));
        for (place, run) in runs.enumerate() {
            let comma = if place > 0 { "," } else { "" };
            match *run {
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                [only] => write!(f, "{comma}{only}")?,
                [] => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Ranks;

    #[test]
    fn ranks_are_written_as_ranges() {
        let everybody: Vec<i32> = (0..1024).collect();
        assert_eq!(Ranks(&everybody).to_string(), "0-1023");
        assert_eq!(Ranks(&[0, 1, 2, 3, 7, 9, 10, 11]).to_string(), "0-3,7,9-11");
        assert_eq!(Ranks(&[3, 2, 1, 0, 1]).to_string(), "3,2,1,0-1");
        assert_eq!(Ranks(&[5]).to_string(), "5");
        assert_eq!(Ranks(&[]).to_string(), "");
    }
}
