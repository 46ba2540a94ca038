//! What a rank says of the step that it is about to take, in a few numbers that every rank
//! understands.

#![forbid(unsafe_code)]

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use mpi_shim_abi::{Kind, Reduction, ShimOp};

use crate::buffer::ElementType;
use crate::node::board::RECORD;
use crate::operation::{Operation, reduction_name};

/// A step of a rank on one communicator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// A collective.
    Operation(Compared),
    /// A launch of a program that is one fixed sequence of collectives.
    Launch(Sequence),
    /// A collective of a launch that this rank has refused before it communicated.
    Refused(Kind),
    /// A collective that this rank's program has refused before it launched anything. It may be the
    /// rank's own affair: then the others do none of this kind.
    RefusedUnlaunched(Kind),
}

/// A fixed sequence of collectives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sequence {
    pub(super) hash: u64,
    /// The same, but for how often its loops run; 0 if that is not known.
    pub(super) code: u64,
    /// The first of them, if that is known.
    pub(super) first: Option<Kind>,
}

/// What must be the same on all ranks of a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Compared {
    kind: Kind,
    dtype: ElementType,
    reduction: Option<Reduction>,
    root: i32,
    /// Elements, of one rank where each has a block. Where blocks differ in length, of all; of
    /// `Alltoallv`, where each rank knows its own alone, of a row.
    count: i64,
    /// The counts, hashed, where all ranks have the same; else 0.
    counts: u32,
    /// [`Operation::place`].
    place: u64,
}

/// The code of programs for several devices, of which all ranks run the same.
pub(super) const PROGRAMS: u64 = 1;

/// Bits of a place that say which loop it is; those above say of which program.
const SITE_BITS: u32 = 16;

/// The program of a place; 0 if it is not known.
pub(super) fn program(place: u64) -> u64 {
    place >> SITE_BITS
}

/// The same in every process; never 0.
fn hash(counts: &[i64]) -> u32 {
    let mut hasher = DefaultHasher::new();
    counts.hash(&mut hasher);
    (hasher.finish() as u32).max(1)
}

impl Compared {
    #[inline]
    pub(super) fn new(op: &Operation<'_>, shim_op: &ShimOp) -> Compared {
        let described = if op.kind.has_operand() {
            &op.send
        } else {
            &op.recv
        };
        Compared {
            kind: op.kind,
            dtype: described.dtype(),
            reduction: op.reduction,
            root: if op.kind.has_root() { op.root } else { 0 },
            count: match op.kind {
                Kind::Alltoallv => shim_op.row,
                kind if kind.has_counts() => shim_op.row * op.counts.iter().sum::<i64>(),
                _ => shim_op.count.max(shim_op.recv_count),
            },
            counts: match op.kind {
                kind if kind.has_counts() && kind != Kind::Alltoallv => hash(op.counts),
                _ => 0,
            },
            place: op.place,
        }
    }
}

const OPERATION: u64 = 1;
const LAUNCH: u64 = 2;
const REFUSED: u64 = 3;
const REFUSED_UNLAUNCHED: u64 = 4;
/// Stands for a kind that is not known.
const NO_KIND: u64 = 0xff;

impl Record {
    /// As it stands in shared memory: what it is and the numbers of kind, dtype and reduction (0
    /// for none) in the bytes of the first, then root and hash of the counts, count or hash, and
    /// place.
    #[inline]
    pub(super) fn words(self) -> [u64; RECORD] {
        match self {
            Record::Operation(own) => {
                let reduction = own.reduction.map_or(0, |reduction| reduction as u64 + 1);
                let first =
                    OPERATION | (own.kind as u64) << 8 | (own.dtype as u64) << 16 | reduction << 24;
                let second = u64::from(own.root as u32) | u64::from(own.counts) << 32;
                [first, second, own.count as u64, own.place]
            }
            Record::Launch(own) => {
                let first = own.first.map_or(NO_KIND, |kind| kind as u64);
                [LAUNCH | first << 8, own.code, own.hash, 0]
            }
            Record::Refused(kind) => [REFUSED | (kind as u64) << 8, 0, 0, 0],
            Record::RefusedUnlaunched(kind) => [REFUSED_UNLAUNCHED | (kind as u64) << 8, 0, 0, 0],
        }
    }

    /// Whether these are those of a launch.
    #[inline]
    pub(super) fn is_launch(words: &[u64; RECORD]) -> bool {
        words[0] & 0xff == LAUNCH
    }

    /// Whether these are those of a launch of a program for several devices.
    pub(super) fn is_program(words: &[u64; RECORD]) -> bool {
        Record::is_launch(words) && words[1] == PROGRAMS
    }

    /// Whether two launches run the same code, but differently.
    pub(super) fn clash(one: &[u64; RECORD], other: &[u64; RECORD]) -> bool {
        one[1] != 0 && one[1] == other[1] && one[2] != other[2]
    }

    /// Whether collectives belong together: they are as `own`, and no two of them stand in
    /// different loops of one program.
    pub(super) fn belong_together(
        own: &[u64; RECORD],
        all: impl Iterator<Item = [u64; RECORD]>,
    ) -> bool {
        let mut places = Vec::new();
        for words in all {
            if words[..3] != own[..3] {
                return false;
            }
            places.push(words[3]);
        }
        places.sort_unstable();
        places.windows(2).all(|two| {
            two[0] == two[1] || program(two[0]) != program(two[1]) || program(two[0]) == 0
        })
    }

    pub(super) fn is_refusal(words: &[u64; RECORD]) -> bool {
        words[0] & 0xff == REFUSED
    }

    #[inline]
    pub(super) fn is_unlaunched(words: &[u64; RECORD]) -> bool {
        words[0] & 0xff == REFUSED_UNLAUNCHED
    }

    /// The kind of the collective, or of the first one of a launch, as a bit; 0 if it is not known.
    pub(super) fn kind_bit(words: &[u64; RECORD]) -> u64 {
        let kind = (words[0] >> 8 & 0xff) as u32;
        1u64.checked_shl(kind).unwrap_or(0)
    }

    /// From what another rank has written.
    fn from_words(words: &[u64; RECORD]) -> Option<Record> {
        let byte = |index: u32| (words[0] >> (8 * index)) as u8 as usize;
        let kind = Kind::ALL.get(byte(1)).copied();
        Some(match byte(0) as u64 {
            OPERATION => Record::Operation(Compared {
                kind: kind?,
                dtype: *ElementType::ALL.get(byte(2))?,
                reduction: match byte(3) {
                    0 => None,
                    number => Some(Reduction::ALL.get(number - 1).copied()?),
                },
                root: words[1] as i32,
                count: words[2] as i64,
                counts: (words[1] >> 32) as u32,
                place: words[3],
            }),
            LAUNCH => Record::Launch(Sequence {
                hash: words[2],
                code: words[1],
                first: kind,
            }),
            REFUSED => Record::Refused(kind?),
            REFUSED_UNLAUNCHED => Record::RefusedUnlaunched(kind?),
            _ => return None,
        })
    }

    /// Says what another rank has written.
    pub(super) fn describe(words: &[u64; RECORD]) -> String {
        match Record::from_words(words) {
            Some(record) => record.to_string(),
            None => "something that this rank does not know".into(),
        }
    }
}

impl fmt::Display for Record {
    /// `allreduce of 3 float32 with SUM`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Record::Operation(own) => {
                write!(f, "{}", own.kind.name())?;
                if own.kind.has_operand() {
                    write!(f, " of {} {}", own.count, own.dtype.name())?;
                }
                if let Some(reduction) = own.reduction {
                    write!(f, " with {}", reduction_name(reduction))?;
                }
                if own.counts != 0 {
                    write!(f, " with counts of hash {:08x}", own.counts)?;
                }
                if own.kind.has_root() {
                    write!(f, " with root {}", own.root)?;
                }
                Ok(())
            }
            Record::Launch(..) => f.write_str("another sequence of operations"),
            Record::Refused(kind) | Record::RefusedUnlaunched(kind) => {
                write!(f, "{}, which it refused", kind.name())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(kind: Kind, reduction: Option<Reduction>) -> Record {
        Record::Operation(Compared {
            kind,
            dtype: ElementType::BF16,
            reduction,
            root: 3,
            count: 1 << 40,
            counts: if kind.has_counts() { u32::MAX } else { 0 },
            place: 5 << SITE_BITS | 1,
        })
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let reductions = Reduction::ALL.iter().copied().map(Some);
        for reduction in reductions.chain([None]) {
            for &kind in Kind::ALL {
                let own = operation(kind, reduction);
                assert_eq!(Record::from_words(&own.words()), Some(own));
            }
        }
        let launch = |code| {
            Record::Launch(Sequence {
                hash: u64::MAX,
                code,
                first: None,
            })
        };
        assert!(Record::is_program(&launch(PROGRAMS).words()));
        let launch = launch(3);
        assert!(!Record::is_program(&launch.words()));
        let scatter = Record::Launch(Sequence {
            hash: 1,
            code: 0,
            first: Some(Kind::Scatter),
        });
        let refused = [Record::Refused, Record::RefusedUnlaunched].map(|of| of(Kind::Scatter));
        for record in [launch, scatter, refused[0], refused[1]] {
            assert_eq!(Record::from_words(&record.words()), Some(record));
        }
        assert!(Record::is_launch(&launch.words()) && Record::is_launch(&scatter.words()));
        assert_eq!(Record::kind_bit(&launch.words()), 0);
        for record in [scatter, refused[0], refused[1]] {
            assert_eq!(Record::kind_bit(&record.words()), 1 << Kind::Scatter as u64);
        }
        let first = None;
        let words = |hash, code| Record::Launch(Sequence { hash, code, first }).words();
        assert!(Record::clash(&words(1, 5), &words(2, 5)));
        for other in [words(1, 5), words(2, 6), words(2, 0)] {
            assert!(!Record::clash(&words(1, 5), &other));
        }
        assert!(!Record::clash(&words(1, 0), &words(2, 0)));
        let places = |places: &[u64]| {
            let all = places.iter().map(|&place| [1, 2, 3, place]);
            Record::belong_together(&[1, 2, 3, 0], all)
        };
        let (loop_1, loop_2, other) = (7 << SITE_BITS | 1, 7 << SITE_BITS | 2, 8 << SITE_BITS);
        assert!(places(&[loop_1, 0, loop_1, other, 0]) && places(&[0, 1]));
        assert!(!places(&[loop_1, 0, other, loop_2]));
        assert!(!Record::belong_together(
            &[1, 2, 3, 0],
            [[1, 2, 4, 0]].into_iter()
        ));
        assert!(Record::is_refusal(&refused[0].words()));
        assert!(Record::is_unlaunched(&refused[1].words()));
        for garbage in [0, 9, OPERATION | 0xff << 8, OPERATION | 0xff << 16] {
            assert_eq!(Record::from_words(&[garbage, 0, 0, 0]), None);
        }
    }

    #[test]
    fn a_record_describes_itself() {
        let text = |record: Record| Record::describe(&record.words());
        assert_eq!(
            text(operation(Kind::Reduce, Some(Reduction::Max))),
            "reduce of 1099511627776 bfloat16 with MAX with root 3"
        );
        assert_eq!(text(operation(Kind::Barrier, None)), "barrier");
        assert_eq!(
            text(Record::Refused(Kind::Scatter)),
            "scatter, which it refused"
        );
    }
}
