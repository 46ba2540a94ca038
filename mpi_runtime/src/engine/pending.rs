//! The table of operations that have started and not ended, so that nothing hangs unsaid.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::buffer::Buffer;
use crate::engine::recorder::clock::Ticks;
use crate::mpi::communicators::{Communicator, is_users};
use crate::operation::Operation;

/// Operations now in progress; few (one per thread that executes). Rows are reused, so that
/// entering an operation allocates nothing.
#[derive(Default)]
pub struct PendingTable {
    rows: Mutex<Rows>,
    /// Threads that have launched operations.
    threads: AtomicU64,
}

#[derive(Default)]
struct Rows {
    all: Vec<PendingRow>,
    /// Operations that have ended.
    done: u64,
    /// How many collectives have begun on each communicator, but on those of the user.
    begun: Vec<(i64, u64)>,
    /// Not those on all communicators are counted.
    begun_elsewhere: bool,
}

/// An operation that has begun and not ended.
pub struct Waiting {
    /// It, without its arrays.
    pub operation: Operation<'static>,
    /// The ranks of its communicator in the world; none means all, in order.
    pub members: &'static [i32],
    /// It, in words.
    pub words: String,
    /// How long it has waited.
    pub time: Duration,
    /// See [`Pending::calls_user`].
    pub calls_user: bool,
    /// Of a collective, which one on its communicator it is, from 1; 0 if nobody has counted.
    pub number: u64,
}

/// How many collectives have begun.
#[derive(Default)]
pub struct Begun {
    /// By number of the communicator.
    pub counts: Vec<(i64, u64)>,
    /// On communicators that are not among these none have begun.
    pub all: bool,
}

/// Communicators whose collectives are counted, so that looking for one takes no time.
const MOST_COUNTED: usize = 64;

struct PendingRow {
    /// When the operation started; none in a free row.
    since: Option<Ticks>,
    operation: Operation<'static>,
    send_shape: Vec<i64>,
    recv_shape: Vec<i64>,
    counts: Vec<i64>,
    recv_counts: Vec<i64>,
    comm: &'static str,
    members: &'static [i32],
    /// What is said of it instead of its operation.
    named: String,
    calls_user: bool,
    number: u64,
}

/// Takes its row out of the table when dropped.
pub struct Pending<'a> {
    table: &'a PendingTable,
    row: usize,
}

impl PendingTable {
    /// The calling thread launches an operation.
    pub fn note_thread(&self) {
        thread_local! {
            static NOTED: Cell<bool> = const { Cell::new(false) };
        }
        if !NOTED.replace(true) {
            self.threads.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many threads have launched operations.
    pub fn threads(&self) -> u64 {
        self.threads.load(Ordering::Relaxed)
    }

    /// Enters an operation that begins now, as [`Self::begin_since`] does.
    pub fn begin(&self, operation: &Operation<'_>, comm: &Communicator) -> Pending<'_> {
        self.begin_since(Ticks::now(), operation, comm)
    }

    /// Enters an operation that has begun at a known time, which need not be asked for again, and
    /// counts it if it is a collective: once on every rank.
    #[inline]
    pub fn begin_since(
        &self,
        since: Ticks,
        operation: &Operation<'_>,
        comm: &Communicator,
    ) -> Pending<'_> {
        let mut rows = self.rows.lock();
        let number = match operation.kind.is_collective() && !is_users(operation.comm) {
            true => rows.count(operation.comm),
            false => 0,
        };
        let row = rows.add(since, operation, comm);
        rows.all[row].number = number;
        Pending { table: self, row }
    }

    /// How many collectives have begun on the communicator of that number; 0 if nobody has counted.
    pub fn begun_on(&self, comm: i64) -> u64 {
        let rows = self.rows.lock();
        let row = rows.begun.iter().find(|row| row.0 == comm);
        row.map_or(0, |row| row.1)
    }

    /// How many collectives have begun on each communicator, but on those of the user.
    pub fn begun(&self) -> Begun {
        let rows = self.rows.lock();
        Begun {
            counts: rows.begun.clone(),
            all: !rows.begun_elsewhere,
        }
    }

    /// Enters an operation on a communicator.
    pub fn enter(&self, operation: &Operation<'_>, comm: &Communicator) -> Pending<'_> {
        self.enter_named(operation, comm, "")
    }

    /// Enters something that is waited for as an operation is, and called `name`.
    pub fn enter_named(
        &self,
        operation: &Operation<'_>,
        comm: &Communicator,
        name: &str,
    ) -> Pending<'_> {
        let mut rows = self.rows.lock();
        let row = rows.add(Ticks::now(), operation, comm);
        rows.all[row].named.push_str(name);
        Pending { table: self, row }
    }

    /// What waits, and how many operations have ended.
    pub fn waiting(&self) -> (Vec<Waiting>, u64) {
        let rows = self.rows.lock();
        let all = rows.all.iter();
        let waiting = all.filter_map(|row| {
            Some(Waiting {
                operation: row.operation,
                members: row.members,
                words: row.words(),
                time: row.since?.elapsed(),
                calls_user: row.calls_user,
                number: row.number,
            })
        });
        (waiting.collect(), rows.done)
    }

    /// How long the oldest operation has waited, if any does.
    pub fn longest(&self) -> Option<Duration> {
        let rows = self.rows.lock();
        let times = rows.all.iter().filter_map(|row| Some(row.since?.elapsed()));
        times.max()
    }

    /// Descriptions of all operations older than `age`.
    pub fn longer_than(&self, age: Duration) -> Vec<String> {
        let (waiting, _) = self.waiting();
        let old = waiting.into_iter().filter(|row| row.time >= age);
        old.map(|row| format!("{} for {:.0} s", row.words, row.time.as_secs_f64()))
            .collect()
    }
}

impl Rows {
    /// Counts a collective on a communicator, and says which one it is; 0 if nobody counts it.
    #[inline]
    fn count(&mut self, comm: i64) -> u64 {
        let row = match self.begun.iter().position(|row| row.0 == comm) {
            Some(row) => row,
            None if self.begun.len() < MOST_COUNTED => {
                self.begun.push((comm, 0));
                self.begun.len() - 1
            }
            None => {
                self.begun_elsewhere = true;
                return 0;
            }
        };
        self.begun[row].1 += 1;
        self.begun[row].1
    }

    /// A row for an operation.
    #[inline]
    fn add(&mut self, since: Ticks, operation: &Operation<'_>, comm: &Communicator) -> usize {
        let bare = operation.without_arrays();
        let all = &mut self.all;
        let row = all
            .iter()
            .position(|row| row.since.is_none())
            .unwrap_or_else(|| {
                all.push(PendingRow {
                    since: None,
                    operation: bare,
                    send_shape: Vec::new(),
                    recv_shape: Vec::new(),
                    counts: Vec::new(),
                    recv_counts: Vec::new(),
                    comm: comm.name,
                    members: comm.members,
                    named: String::new(),
                    calls_user: false,
                    number: 0,
                });
                all.len() - 1
            });
        let entry = &mut all[row];
        entry.since = Some(since);
        entry.operation = bare;
        entry.comm = comm.name;
        entry.members = comm.members;
        entry.send_shape.clear();
        entry.send_shape.extend_from_slice(operation.send.shape());
        entry.recv_shape.clear();
        entry.recv_shape.extend_from_slice(operation.recv.shape());
        entry.counts.clear();
        entry.recv_counts.clear();
        if operation.kind.has_counts() {
            entry.counts.extend_from_slice(operation.counts);
            entry.recv_counts.extend_from_slice(operation.recv_counts);
        }
        entry.calls_user = false;
        entry.number = 0;
        entry.named.clear();
        row
    }
}

impl Pending<'_> {
    /// From now on it is in MPI, which calls a function of the user's for it: for as long as that
    /// takes, this rank waits for nobody, whatever the others have done.
    pub fn calls_user(&self) {
        self.table.rows.lock().all[self.row].calls_user = true;
    }

    /// It waits for a collective that was started as that of this number.
    pub fn is_started(&self, number: u64) {
        self.table.rows.lock().all[self.row].number = number;
    }

    /// Says something else of it from now on.
    pub fn rename(&self, name: String) {
        self.table.rows.lock().all[self.row].named = name;
    }
}

impl PendingRow {
    fn words(&self) -> String {
        if !self.named.is_empty() {
            return self.named.clone();
        }
        let mut operation: Operation<'_> = self.operation;
        operation.send = Buffer::described(operation.send.dtype(), &self.send_shape);
        operation.recv = Buffer::described(operation.recv.dtype(), &self.recv_shape);
        (operation.counts, operation.recv_counts) = (&self.counts, &self.recv_counts);
        format!("{operation} on {}", self.comm)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let mut rows = self.table.rows.lock();
        rows.all[self.row].since = None;
        rows.done += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::{Buffer, ElementType};
    use mpi_shim_abi::Kind;

    const WORLD: Communicator = Communicator {
        name: "COMM_WORLD",
        handle: 0,
        user_handle: 0,
        rank: 0,
        size: 4,
        members: &[],
        largest_tag: 0,
        freed: false,
    };

    #[test]
    fn what_waits_is_described_until_it_ends() {
        let table = PendingTable::default();
        let shape = [5];
        let result = Buffer::described(ElementType::F64, &shape);
        let operation = Operation {
            source: 3,
            ..Operation::new(Kind::Recv, 0, Buffer::NONE, result)
        };
        let pending = table.enter(&operation, &WORLD);
        assert!(table.longer_than(Duration::from_secs(60)).is_empty());
        assert_eq!(
            table.longer_than(Duration::ZERO),
            ["recv into float64[5] from rank 3 with tag ANY_TAG on COMM_WORLD for 0 s"]
        );
        let named = table.enter_named(&operation, &WORLD, "a launch");
        let (waiting, done) = table.waiting();
        assert_eq!(
            (waiting.len(), waiting[1].words.as_str(), done),
            (2, "a launch", 0)
        );
        named.rename("a launch, which it refused".into());
        assert_eq!(table.waiting().0[1].words, "a launch, which it refused");
        named.calls_user();
        let calls = |table: &PendingTable| table.waiting().0.last().map(|row| row.calls_user);
        assert_eq!(calls(&table), Some(true));
        assert!(table.longest().is_some());
        drop(named);
        let named = table.enter_named(&operation, &WORLD, "another in its row");
        assert_eq!(calls(&table), Some(false));
        drop(named);
        drop(pending);
        assert!(table.longest().is_none());
        assert_eq!(table.waiting().1, 3);
    }

    #[test]
    fn collectives_are_counted_by_communicator() {
        let table = PendingTable::default();
        let on = |comm| Operation::new(Kind::Barrier, comm, Buffer::NONE, Buffer::NONE);
        let number = |operation: &Operation<'_>| {
            let _pending = table.begin(operation, &WORLD);
            table.waiting().0[0].number
        };
        let receive = Operation::new(Kind::Recv, 0, Buffer::NONE, Buffer::NONE);
        assert_eq!([0, 0, 1, 0].map(|comm| number(&on(comm))), [1, 2, 1, 3]);
        // Messages are not counted, nor what mpi4py may do beside us.
        assert_eq!([number(&receive), number(&on(1 << 61))], [0, 0]);
        assert_eq!((table.begun_on(0), table.begun_on(5)), (3, 0));
        {
            let started = table.enter(&on(1), &WORLD);
            started.is_started(3);
            assert_eq!(table.waiting().0[0].number, 3);
        }
        assert_eq!(table.begun().counts, [(0, 3), (1, 1)]);
        for comm in 2..MOST_COUNTED as i64 {
            assert_eq!(number(&on(comm)), 1);
        }
        assert!(table.begun().all);
        // There is no place for more.
        assert_eq!(number(&on(MOST_COUNTED as i64)), 0);
        assert!(!table.begun().all);
    }
}
