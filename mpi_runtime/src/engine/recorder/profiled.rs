//! A profile of the operations of this process, as others read it: with names for the numbers that
//! the recorder keeps.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use mpi_shim_abi::{ANY, Kind, PROC_NULL};

use super::clock::{Moment, Ticks, wall_at};
use super::layout::{ENDS, FOREIGN, OF_XLA, STARTED};
use super::profile::{Event, MOST};
use super::ring::{NO_REDUCTION, RECORDER, Recorder};
use super::texts;
use crate::buffer::ElementType;
use crate::operation::REDUCTIONS;

/// All operations of a time, the first to end first, and then those that have not ended.
#[derive(Debug, Default)]
pub struct Profiled {
    /// They.
    pub operations: Vec<ProfiledOperation>,
    /// Nanoseconds since 1970 when the profile began.
    pub start: u64,
    /// And when it ended.
    pub end: u64,
    /// How many operations more there were than [`MOST`].
    pub lost: u64,
}

/// Whose an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The user called it by this package.
    User,
    /// It came by mpi4jax.
    Mpi4jax,
    /// It belongs to a program for several devices.
    Xla,
}

/// A time, in nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// From.
    pub start: u64,
    /// To.
    pub end: u64,
}

/// Elements of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elements {
    /// Their type.
    pub dtype: ElementType,
    /// How many.
    pub count: u64,
}

/// An operation of this rank's.
#[derive(Clone, Debug)]
pub struct ProfiledOperation {
    /// None: a program for several devices begins, whose ranks compare what they will run.
    pub kind: Option<Kind>,
    /// Of a wait, the start of the collective that it ends.
    pub ends: Option<Kind>,
    /// Whose it is.
    pub owner: Owner,
    /// From its begin to its end, within the profile.
    pub time: Span,
    /// It has ended. If not, `time` ends with the profile.
    pub ended: bool,
    /// When it was seen to wait for other ranks.
    pub waits: Vec<Span>,
    /// Since when all ranks are known to have come to it; none if that is not known.
    pub met: Option<u64>,
    /// What this rank passes, of the kinds that have an operand.
    pub operand: Option<Elements>,
    /// What this rank gets, of the kinds that have a result.
    pub result: Option<Elements>,
    /// Name of the reduction.
    pub reduction: Option<&'static str>,
    /// Number of its communicator.
    pub comm: i64,
    /// Name of its communicator; empty if that is not known.
    pub comm_name: String,
    /// Rank in it, and its size.
    pub comm_rank: Option<(i32, i32)>,
    /// Its place among the collectives, or the messages, of the communicator, from 1.
    pub position: u64,
    /// Root, of the kinds that have one.
    pub root: Option<i32>,
    /// Whom it sends to, in words, and with what tag.
    pub dest: Option<(String, i32)>,
    /// Whom it receives from, and with what tag, in words.
    pub source: Option<(String, String)>,
    /// Number of its launch; 0 if it has none.
    pub launch: u32,
    /// Thread that executed it, as Linux numbers it.
    pub thread: u32,
    /// Name of the program; empty if that is not known.
    pub program: String,
    /// The line that launched it; empty if that is not known.
    pub location: String,
    /// What a program that begins will run; empty of operations.
    pub summary: String,
    /// Why it failed; empty if it has not.
    pub error: String,
}

/// From now on every operation is kept for a profile; false if one is taken already.
pub fn start() -> bool {
    RECORDER.start_profile()
}

/// The operations since [`start`]; none if no profile is taken.
pub fn stop() -> Option<Profiled> {
    let taken = RECORDER.stop_profile()?;
    let clock = Clock {
        from: taken.start,
        to: taken.end,
    };
    let events = taken.events.iter();
    Some(Profiled {
        operations: events.map(|one| clock.read(&RECORDER, one)).collect(),
        start: taken.start.wall,
        end: taken.end.wall,
        lost: taken.lost,
    })
}

/// What is said of operations that a profile has no room for; none if it has all.
pub fn said_of_lost(lost: u64) -> Option<String> {
    (lost > 0).then(|| {
        format!(
            "the profile has the first {MOST} operations of this rank that ended, and not the \
             {lost} after them; profile fewer steps"
        )
    })
}

/// What turns ticks into the time of day.
struct Clock {
    from: Moment,
    to: Moment,
}

impl Clock {
    /// Within the profile.
    fn at(&self, ticks: Ticks) -> u64 {
        let within = ticks.clamp(self.from.ticks, self.to.ticks);
        wall_at(within, &self.from, &self.to)
    }

    fn span(&self, [start, end]: [Ticks; 2]) -> Span {
        Span {
            start: self.at(start),
            end: self.at(end),
        }
    }

    fn read(&self, recorder: &Recorder, event: &Event) -> ProfiledOperation {
        let [kind, reduction, operand, result, _, ends, ..] = event.what.to_le_bytes();
        const { assert!(ENDS == 5 * 8) };
        let kind = Kind::ALL.get(usize::from(kind)).copied();
        let ends = usize::from(ends).checked_sub(1);
        let ends = ends.and_then(|kind| Kind::ALL.get(kind).copied());
        let elements = |dtype: u8, count: u64| {
            let dtype = *ElementType::ALL.get(usize::from(dtype))?;
            Some(Elements { dtype, count })
        };
        let has = |question: fn(Kind) -> bool| kind.is_some_and(question);
        let waits_for_started = event.what & STARTED != 0;
        let sends = has(Kind::sends) || waits_for_started && kind == Some(Kind::WaitSend);
        let receives = has(Kind::receives) || waits_for_started && kind == Some(Kind::Wait);
        let text = |number: u64| texts::get(&recorder.record, number);
        let said = text(event.text);
        let (summary, error) = match (kind, event.failed) {
            (_, true) => (String::new(), said),
            (None, false) => (said, String::new()),
            _ => Default::default(),
        };
        let row = recorder.called(event.comm);
        let (upper, lower) = halves(event.ranks);
        let tags = halves(event.tags);
        let source = receives.then(|| (rank_in_words(lower), tag_in_words(tags.1)));
        let mut waits: Vec<Span> = event.waits.iter().map(|wait| self.span(*wait)).collect();
        let met = event.met.map(|met| self.at(met));
        if let (Some(_), Some(met)) = (&source, event.met) {
            waits = vec![self.span([event.start, met])];
        }
        ProfiledOperation {
            kind,
            ends,
            owner: match event.what {
                what if what & OF_XLA != 0 => Owner::Xla,
                what if what & FOREIGN != 0 => Owner::Mpi4jax,
                _ => Owner::User,
            },
            time: self.span([event.start, event.end.unwrap_or(self.to.ticks)]),
            ended: event.end.is_some(),
            waits,
            met,
            operand: elements(operand, event.sent).filter(|_| has(Kind::has_operand)),
            result: elements(result, event.received).filter(|_| has(Kind::has_result)),
            reduction: (u64::from(reduction) != NO_REDUCTION).then(|| {
                let row = REDUCTIONS.get(usize::from(reduction));
                row.map_or("user-defined reduction", |row| row.1)
            }),
            comm: event.comm as i64,
            comm_name: row.map_or(String::new(), |row| text(row.name.load(Ordering::Relaxed))),
            comm_rank: row.map(|row| {
                let load =
                    |word: &std::sync::atomic::AtomicU32| word.load(Ordering::Relaxed) as i32;
                (load(&row.rank), load(&row.size))
            }),
            position: event.position,
            root: has(Kind::has_root).then_some(upper),
            dest: sends.then(|| (rank_in_words(upper), tags.0)),
            source,
            launch: (event.launch_thread >> 32) as u32,
            thread: event.launch_thread as u32,
            program: text(u64::from(event.program)),
            location: text(u64::from(event.location)),
            summary,
            error,
        }
    }
}

fn halves(pair: u64) -> (i32, i32) {
    ((pair >> 32) as i32, pair as i32)
}

fn rank_in_words(rank: i32) -> String {
    match rank {
        ANY => "ANY_SOURCE".into(),
        PROC_NULL => "PROC_NULL".into(),
        rank => rank.to_string(),
    }
}

fn tag_in_words(tag: i32) -> String {
    match tag {
        ANY => "ANY_TAG".into(),
        tag => tag.to_string(),
    }
}

impl Elements {
    /// Bytes of them.
    pub fn bytes(&self) -> u64 {
        self.count * self.dtype.size() as u64
    }
}
