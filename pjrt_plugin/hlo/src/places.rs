//! Where the collectives of a program stand, if ranks may execute them in another order although
//! they run the same program: in branches, and in loops whose length data decides.
//!
//! Ranks compare the collectives of such a program one by one (`docs/checks.md`). Those that stand
//! in different loops, or in a loop and outside of it, do not belong together, however alike they
//! are. Branches may differ between ranks and do the same, so a loop in a branch is no place of its
//! own.

use std::collections::{BTreeMap, HashMap};

/// The innermost loop around a computation, and whether ranks may differ in how often it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// 0 outside of all loops.
    site: u64,
    in_branch: bool,
    is_open: bool,
}

impl Place {
    /// That of a branch of a `conditional` which stands here.
    pub(crate) fn in_branch(self) -> Place {
        Place {
            in_branch: true,
            is_open: true,
            ..self
        }
    }
}

/// The places of a program's collectives.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// By computation and instruction; none if one is called from several places.
    sites: HashMap<(i64, i64), Option<u64>>,
    loops: u64,
    /// Some collective stands where ranks may differ.
    is_open: bool,
    /// The number of the program, in the bits above those of a loop.
    program: u64,
}

/// Bits of a place that say which loop it is; the engine knows the same (`compare/record.rs`).
const SITE_BITS: u32 = 16;
/// A place of no program that is known.
const NOWHERE: i64 = 1;

impl Places {
    /// The place of what a loop that stands at `around` calls.
    pub(crate) fn in_loop(&mut self, around: Place, has_known_length: bool) -> Place {
        let is_open = around.is_open || !has_known_length;
        if around.in_branch {
            return Place { is_open, ..around };
        }
        self.loops += 1;
        Place {
            site: self.loops.min((1 << SITE_BITS) - 1),
            is_open,
            in_branch: false,
        }
    }

    /// A collective stands there.
    pub(crate) fn add(&mut self, instruction: (i64, i64), place: Place) {
        self.is_open |= place.is_open;
        let site = self.sites.entry(instruction).or_insert(Some(place.site));
        if *site != Some(place.site) {
            *site = None;
        }
    }

    /// Names the program by the hash of its sequence.
    pub(crate) fn name(&mut self, hash: u64) {
        // The highest bit is that of a sign.
        self.program = (hash >> (SITE_BITS + 1)).max(1) << SITE_BITS;
    }

    /// The place of an instruction as a number, which is not 0; none if ranks compare the program
    /// as a whole.
    pub(crate) fn of(&self, instruction: (i64, i64)) -> Option<i64> {
        let site = self.sites.get(&instruction).filter(|_| self.is_open)?;
        Some(site.map_or(NOWHERE, |site| (self.program | site) as i64))
    }

    /// The places in words, by their numbers.
    pub(crate) fn words(&self) -> BTreeMap<i64, String> {
        let sites = self.sites.values().filter(|_| self.is_open).flatten();
        let words = |site: u64| match site {
            0 => "outside of the loops of its program".to_owned(),
            site => format!("in loop {site} of its program"),
        };
        sites
            .map(|&site| ((self.program | site) as i64, words(site)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: i64 = 5 << SITE_BITS;

    /// The numbers of the places of collectives 0, 1 and so on.
    fn numbers(places: &mut Places, all: &[Place]) -> Vec<Option<i64>> {
        for (index, &place) in all.iter().enumerate() {
            places.add((0, index as i64), place);
        }
        places.name(5 << (SITE_BITS + 1));
        (0..all.len() as i64)
            .map(|index| places.of((0, index)))
            .collect()
    }

    #[test]
    fn collectives_of_fixed_sequences_have_no_places() {
        let mut places = Places::default();
        let top = Place::default();
        let inside = places.in_loop(top, true);
        assert_eq!(numbers(&mut places, &[top, inside]), [None, None]);
        assert!(places.words().is_empty());
    }

    #[test]
    fn all_have_places_if_one_stands_where_ranks_may_differ() {
        let mut places = Places::default();
        let top = Place::default();
        let fixed = places.in_loop(top, true);
        let open = places.in_loop(top, false);
        let inner = places.in_loop(open, true);
        let branch = open.in_branch();
        let in_branch = places.in_loop(branch, true);
        let all = [top, fixed, open, inner, branch, in_branch];
        let expected = [0, 1, 2, 3, 2, 2].map(|site| Some(PROGRAM | site));
        assert_eq!(numbers(&mut places, &all), expected);
        let words = places.words();
        assert_eq!(words[&PROGRAM], "outside of the loops of its program");
        assert_eq!(words[&(PROGRAM | 3)], "in loop 3 of its program");
    }

    #[test]
    fn what_is_called_from_several_places_has_none() {
        let mut places = Places::default();
        let open = places.in_loop(Place::default(), false);
        places.add((1, 1), Place::default());
        assert_eq!(numbers(&mut places, &[open]), [Some(PROGRAM | 1)]);
        places.add((1, 1), open);
        assert_eq!(places.of((1, 1)), Some(NOWHERE));
    }
}
