//! The ring of the last operations, and what else a record has.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU32, Ordering, fence};

use mpi_shim_abi::Kind;
use parking_lot::Mutex;

use super::clock::{Moment, Ticks};
use super::entry::{Fields, pair};
use super::layout::{
    COMMS, CommRow, ENDS, ENTRIES, Entry, FOREIGN, LAUNCHES, OF_XLA, Record, STARTED,
};
use super::profile::{Event, PROFILE, Taken};
use super::texts::Texts;
use crate::engine::order::Ticket;
use crate::error::OperationError;
use crate::mpi::communicators::{COLLECTIVES, Communicator};
use crate::operation::{self, Operation};

/// That of this process.
pub static RECORDER: Recorder = Recorder::new();

/// The kind of the entry of a program of several devices that begins.
const BEGIN: u64 = Kind::ALL.len() as u64;
/// No reduction.
pub(super) const NO_REDUCTION: u64 = 255;

/// Why a record was written.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// From time to time.
    Running,
    /// This rank ends the job, with a status.
    Abort,
    /// A signal ends the process.
    Signal,
    /// Somebody asked for it.
    Request,
    /// The process ends after success.
    End,
}

/// Names of the reasons, in the order of their numbers.
pub(super) const REASONS: [&str; 5] = ["running", "abort", "signal", "request", "end"];

/// Keeps the last operations.
pub struct Recorder {
    pub(super) record: Record,
    texts: Texts,
    /// Held to add a communicator.
    adding: Mutex<()>,
}

/// An operation that runs.
#[must_use]
pub struct Recording<'a> {
    recorder: &'a Recorder,
    number: u64,
    /// When it began.
    pub start: Ticks,
}

/// A program for several devices.
pub struct Program<'a> {
    /// Hash of its sequence of collectives.
    pub sequence: u64,
    /// The sequence in words.
    pub summary: &'a str,
    /// The ranks that run it.
    pub members: &'a [i32],
    /// All ranks of the world do.
    pub everybody: bool,
}

thread_local! {
    /// The operation that this thread executes.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

impl Default for Recorder {
    fn default() -> Recorder {
        Recorder::new()
    }
}

impl Recorder {
    /// Nothing is recorded yet.
    pub const fn new() -> Recorder {
        Recorder {
            record: Record::new(),
            texts: Texts::new(),
            adding: Mutex::new(()),
        }
    }

    /// `op` of the launch `ticket` begins; `comm` is its communicator, if it is known yet.
    #[inline]
    pub fn begin(
        &self,
        ticket: Ticket,
        op: &Operation<'_>,
        comm: impl FnOnce() -> Option<Communicator>,
    ) -> Recording<'_> {
        let collective = op.kind.is_collective();
        let position = self.position(op.comm, collective, comm);
        let reduction = op.reduction.map_or(NO_REDUCTION, |one| one as u64);
        let dtypes = (op.send.dtype() as u64) << 16 | (op.recv.dtype() as u64) << 24;
        let foreign = match op.of {
            None => 0,
            Some(operation::OF_XLA) => FOREIGN | OF_XLA,
            Some(_) => FOREIGN,
        };
        let peer = if op.kind.has_root() { op.root } else { op.dest };
        self.enter(&Fields {
            ticket,
            comm: op.comm,
            position,
            sent: op.send.elements() as u64,
            received: op.recv.elements() as u64,
            ranks: pair(peer, op.source),
            tags: pair(op.send_tag, op.recv_tag),
            what: op.kind as u64 | reduction << 8 | dtypes | foreign,
            text: 0,
        })
    }

    /// The launch `ticket` of a program for several devices begins.
    pub fn begin_program(&self, ticket: Ticket, program: &Program<'_>) -> Recording<'_> {
        let (comm, name) = if program.everybody {
            (COLLECTIVES, "all ranks")
        } else {
            (number_of(program.members), "the ranks of a program")
        };
        let position = self.position(comm, true, || {
            Some(Communicator {
                name,
                handle: 0,
                user_handle: 0,
                rank: -1,
                size: program.members.len() as i32,
                members: &[],
                largest_tag: 0,
                freed: false,
            })
        });
        let (sequence, summary) = (program.sequence, program.summary.as_bytes());
        self.enter(&Fields {
            ticket,
            comm,
            position,
            sent: sequence,
            received: 0,
            ranks: 0,
            tags: 0,
            what: BEGIN | NO_REDUCTION << 8 | OF_XLA,
            text: self.texts.of(&self.record, sequence, summary),
        })
    }

    /// The launch `ticket` was dispatched: of the program whose name has a number of
    /// [`Recorder::text`], from `location` in the user's program, if that is known.
    pub fn launch(&self, ticket: Ticket, program: u32, location: &[u8]) {
        let row = &self.record.launches[ticket.0 as usize % LAUNCHES];
        let location = self.text(location);
        row.ticket.store(0, Ordering::Relaxed);
        row.program.store(program, Ordering::Relaxed);
        row.location.store(location, Ordering::Relaxed);
        row.ticks.store(Ticks::now().0, Ordering::Relaxed);
        row.ticket.store(ticket.0, Ordering::Release);
        self.record.header.launches.fetch_add(1, Ordering::Relaxed);
    }

    /// Why this rank ends the job, in words.
    pub fn why(&self, words: &[u8]) {
        let words = u64::from(self.text(words));
        self.record.header.why.store(words, Ordering::Relaxed);
    }

    /// The number of a text that entries have; 0 is none.
    pub fn text(&self, text: &[u8]) -> u32 {
        self.texts.number(&self.record, text)
    }

    /// The operation that this thread executes waits for the message that `started` has started.
    pub fn waits_for(&self, started: &Operation<'_>) {
        let number = CURRENT.get();
        let entry = self.entry(number);
        if number != 0 && entry.number.load(Ordering::Relaxed) == number {
            if started.kind.is_collective() {
                let ends = (started.kind as u64 + 1) << ENDS;
                entry.what.fetch_or(ends, Ordering::Relaxed);
                return;
            }
            let ranks = pair(started.dest, started.source);
            let tags = pair(started.send_tag, started.recv_tag);
            entry.ranks.store(ranks, Ordering::Relaxed);
            entry.tags.store(tags, Ordering::Relaxed);
            entry.what.fetch_or(STARTED, Ordering::Relaxed);
        }
    }

    /// The operation that this thread executes has waited for other ranks, since `start`.
    pub fn waited(&self, start: Ticks) {
        let number = CURRENT.get();
        let entry = self.entry(number);
        if number != 0 && entry.number.load(Ordering::Relaxed) == number {
            let now = Ticks::now();
            let ticks = now.0.saturating_sub(start.0);
            entry.waited.fetch_add(ticks, Ordering::Relaxed);
            if PROFILE.is_taken() {
                PROFILE.waited(start, now);
            }
        }
    }

    /// All ranks have come to the operation that this thread executes, or its message has: what it
    /// still takes is no waiting for them.
    #[inline]
    pub fn met(&self) {
        let number = CURRENT.get();
        if PROFILE.is_taken() && number != 0 {
            PROFILE.met(number);
        }
    }

    /// Whether a profile is taken, which wants to know when messages come.
    #[inline]
    pub fn is_profiled(&self) -> bool {
        PROFILE.is_taken()
    }

    /// From now on every operation is kept for a profile; false if one is taken already.
    pub(super) fn start_profile(&self) -> bool {
        PROFILE.start()
    }

    /// The operations since the start of the profile, with those that have not ended.
    pub(super) fn stop_profile(&self) -> Option<Taken> {
        PROFILE.stop(|| {
            let event = |entry: &Entry| Event::of(entry, None, self.launch_of(entry));
            self.unended().map(event).collect()
        })
    }

    /// Operations that have begun and not ended.
    pub(super) fn running(&self) -> usize {
        self.unended().count()
    }

    fn unended(&self) -> impl Iterator<Item = &Entry> {
        let record = &self.record;
        let all = record.entries.iter().chain(&record.unfinished);
        all.filter(|entry| {
            entry.number.load(Ordering::Relaxed) != 0 && entry.end.load(Ordering::Acquire) == 0
        })
    }

    /// Numbers of texts: the program's name, and the line that launched it; 0 if its launch is
    /// forgotten.
    fn launch_of(&self, entry: &Entry) -> (u32, u32) {
        let ticket = (entry.launch_thread.load(Ordering::Relaxed) >> 32) as u32;
        let row = &self.record.launches[ticket as usize % LAUNCHES];
        let load = |word: &AtomicU32| word.load(Ordering::Relaxed);
        match load(&row.ticket) == ticket && ticket != 0 {
            true => (load(&row.program), load(&row.location)),
            false => (0, 0),
        }
    }

    /// The row of a communicator that has called something.
    pub(super) fn called(&self, number: u64) -> Option<&CommRow> {
        let is_row = |row: &&CommRow| {
            row.used.load(Ordering::Acquire) == 1 && row.number.load(Ordering::Relaxed) == number
        };
        self.record.comms.iter().find(is_row)
    }

    fn entry(&self, number: u64) -> &Entry {
        &self.record.entries[number as usize % ENTRIES]
    }

    #[inline]
    fn enter(&self, fields: &Fields) -> Recording<'_> {
        let header = &self.record.header;
        let number = header.operations.fetch_add(1, Ordering::Relaxed) + 1;
        let entry = self.entry(number);
        if entry.end.load(Ordering::Relaxed) == 0 {
            self.set_aside(entry);
        }
        // A reader goes from the first field to the last, and must see that it is in between.
        entry.number_again.store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        entry.write(fields);
        entry.end.store(0, Ordering::Relaxed);
        let start = Ticks::now();
        entry.start.store(start.0, Ordering::Relaxed);
        entry.number.store(number, Ordering::Release);
        entry.number_again.store(number, Ordering::Release);
        CURRENT.set(number);
        Recording {
            recorder: self,
            number,
            start,
        }
    }

    /// The place of a new operation among those of its communicator.
    #[inline]
    fn position(
        &self,
        number: i64,
        collective: bool,
        comm: impl FnOnce() -> Option<Communicator>,
    ) -> u64 {
        let Some(row) = self.comm_row(number) else {
            return 0;
        };
        if row.name.load(Ordering::Relaxed) == 0
            && let Some(comm) = comm()
        {
            self.describe(row, &comm);
        }
        let count = if collective {
            &row.collectives
        } else {
            &row.messages
        };
        count.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The row of a communicator; none if there are too many.
    #[inline]
    fn comm_row(&self, number: i64) -> Option<&CommRow> {
        let rows = &self.record.comms;
        // The first numbers are in a row, and the others are hashes.
        let first = number as usize % COMMS;
        let row = &rows[first];
        if row.used.load(Ordering::Acquire) == 1
            && row.number.load(Ordering::Relaxed) == number as u64
        {
            return Some(row);
        }
        self.find_comm_row(number, first)
    }

    #[cold]
    fn find_comm_row(&self, number: i64, first: usize) -> Option<&CommRow> {
        let _adding = self.adding.lock();
        for step in 0..COMMS {
            let row = &self.record.comms[(first + step) % COMMS];
            if row.used.load(Ordering::Acquire) == 0 {
                row.number.store(number as u64, Ordering::Relaxed);
                row.used.store(1, Ordering::Release);
                return Some(row);
            }
            if row.number.load(Ordering::Relaxed) == number as u64 {
                return Some(row);
            }
        }
        None
    }

    #[cold]
    fn describe(&self, row: &CommRow, comm: &Communicator) {
        row.rank.store(comm.rank as u32, Ordering::Relaxed);
        row.size.store(comm.size as u32, Ordering::Relaxed);
        let name = u64::from(self.text(comm.name.as_bytes()));
        row.name.store(name, Ordering::Release);
    }

    /// The ring comes round to an operation that has not ended: keeps it elsewhere.
    #[cold]
    fn set_aside(&self, entry: &Entry) {
        let number = entry.number.load(Ordering::Relaxed);
        if number == 0 {
            return;
        }
        let _adding = self.adding.lock();
        let mut rows = self.record.unfinished.iter();
        let free = rows.find(|row| row.number.load(Ordering::Relaxed) == 0);
        if let Some(row) = free {
            row.copy(entry);
        }
    }

    /// Says when and why this is written.
    pub(super) fn mark(&self, reason: Reason, code: i32) {
        let header = &self.record.header;
        // What ended it, not what that led to.
        let before = header.reason.load(Ordering::Relaxed);
        if before != Reason::Abort as u32 && before != Reason::Signal as u32 {
            header.code.store(code as u32, Ordering::Relaxed);
            header.reason.store(reason as u32, Ordering::Relaxed);
        }
        let now = Moment::now();
        header.written_ticks.store(now.ticks.0, Ordering::Relaxed);
        header.written_wall.store(now.wall, Ordering::Relaxed);
    }
}

impl Recording<'_> {
    /// The operation has ended.
    #[inline]
    pub fn end(self, result: &Result<(), Box<OperationError>>) {
        let entry = self.recorder.entry(self.number);
        CURRENT.set(0);
        if let Err(error) = result {
            self.fail(entry, error);
        }
        let end = Ticks::now();
        if entry.number.load(Ordering::Relaxed) == self.number {
            if PROFILE.is_taken() {
                self.keep(entry, end);
            }
            entry.end.store(end.0, Ordering::Release);
        } else {
            self.forget(end);
        }
    }

    /// Keeps it for the profile that is taken.
    #[cold]
    fn keep(&self, entry: &Entry, end: Ticks) {
        let launch = self.recorder.launch_of(entry);
        PROFILE.keep(self.number, Event::of(entry, Some(end), launch));
    }

    #[cold]
    fn fail(&self, entry: &Entry, error: &OperationError) {
        let text = self.recorder.text(error.to_string().as_bytes());
        entry.text.store(u64::from(text), Ordering::Relaxed);
        entry.failed.store(1, Ordering::Relaxed);
    }

    /// It took so long that its entry is another's.
    #[cold]
    fn forget(&self, end: Ticks) {
        let _adding = self.recorder.adding.lock();
        for row in &self.recorder.record.unfinished {
            if row.number.load(Ordering::Relaxed) == self.number {
                if PROFILE.is_taken() {
                    self.keep(row, end);
                }
                row.number.store(0, Ordering::Relaxed);
            }
        }
    }
}

/// The number that stands for the ranks of a program, the same on all of them.
fn number_of(members: &[i32]) -> i64 {
    let mut members = members.to_vec();
    members.sort_unstable();
    let mut hasher = DefaultHasher::new();
    members.hash(&mut hasher);
    // Negative, as no communicator's.
    -1 - (hasher.finish() >> 2) as i64
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
