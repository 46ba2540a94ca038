//! The table of operations that have started and not ended, and the watch over it: an operation
//! that takes longer than `MPI_CUDA_WARN_AFTER` seconds is printed, so that nothing hangs unsaid.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::engine::recorder::clock::Ticks;
use crate::log;
use crate::operation::Operation;

/// Operations now in progress; few (one per thread that executes). Rows are reused, so that
/// entering an operation allocates nothing.
#[derive(Default)]
pub struct PendingTable {
    rows: Mutex<Vec<PendingRow>>,
}

struct PendingRow {
    /// When the operation started; none in a free row.
    since: Option<Ticks>,
    warned: bool,
    operation: Operation<'static>,
    send_shape: Vec<i64>,
    recv_shape: Vec<i64>,
    comm: &'static str,
}

/// Takes its row out of the table when dropped.
pub struct Pending<'a> {
    table: &'a PendingTable,
    row: usize,
}

impl PendingTable {
    /// Enters an operation on the communicator called `comm`.
    #[inline]
    pub fn enter(&self, operation: &Operation<'_>, comm: &'static str) -> Pending<'_> {
        let bare = operation.without_arrays();
        let mut rows = self.rows.lock();
        let row = rows
            .iter()
            .position(|row| row.since.is_none())
            .unwrap_or_else(|| {
                rows.push(PendingRow {
                    since: None,
                    warned: false,
                    operation: bare,
                    send_shape: Vec::new(),
                    recv_shape: Vec::new(),
                    comm,
                });
                rows.len() - 1
            });
        let entry = &mut rows[row];
        entry.since = Some(Ticks::now());
        entry.warned = false;
        entry.operation = bare;
        entry.comm = comm;
        entry.send_shape.clear();
        entry.send_shape.extend_from_slice(operation.send.shape);
        entry.recv_shape.clear();
        entry.recv_shape.extend_from_slice(operation.recv.shape);
        Pending { table: self, row }
    }

    /// Descriptions of all operations older than `age` that were not yet described.
    pub fn overdue(&self, age: Duration) -> Vec<String> {
        let mut texts = Vec::new();
        for row in self.rows.lock().iter_mut() {
            let Some(since) = row.since else { continue };
            if row.warned || since.elapsed() < age {
                continue;
            }
            row.warned = true;
            texts.push(row.words(since));
        }
        texts
    }

    /// Descriptions of all operations older than `age`.
    pub fn longer_than(&self, age: Duration) -> Vec<String> {
        let rows = self.rows.lock();
        let old = |row: &PendingRow| row.since.filter(|since| since.elapsed() >= age);
        rows.iter()
            .filter_map(|row| Some(row.words(old(row)?)))
            .collect()
    }
}

impl PendingRow {
    fn words(&self, since: Ticks) -> String {
        let mut operation: Operation<'_> = self.operation;
        operation.send.shape = &self.send_shape;
        operation.recv.shape = &self.recv_shape;
        let seconds = since.elapsed().as_secs_f64();
        format!("{operation} on {} for {seconds:.0} s", self.comm)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.table.rows.lock()[self.row].since = None;
    }
}

/// Starts the thread that prints overdue operations of `rank` to standard error.
pub fn watch(table: &Arc<PendingTable>, rank: i32, warn_after: Duration) {
    let table = Arc::downgrade(table);
    let pause = (warn_after / 4).clamp(Duration::from_millis(50), Duration::from_secs(1));
    let _ = std::thread::Builder::new()
        .name("mpi_cuda watch".into())
        .spawn(move || {
            loop {
                std::thread::sleep(pause);
                let Some(table) = table.upgrade() else { return };
                for text in table.overdue(warn_after) {
                    log::line(&format!("rank {rank} is waiting in {text}"));
                }
            }
        });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::{Buffer, ElementType};
    use mpi_shim_abi::Kind;

    #[test]
    fn an_overdue_operation_is_described_once() {
        let table = PendingTable::default();
        let shape = [5];
        let result = Buffer {
            data: std::ptr::null_mut(),
            dtype: ElementType::F64,
            shape: &shape,
        };
        let operation = Operation {
            source: 3,
            ..Operation::new(Kind::Recv, 0, Buffer::NONE, result)
        };
        let pending = table.enter(&operation, "COMM_WORLD");
        assert!(table.overdue(Duration::from_secs(60)).is_empty());
        let text = table.overdue(Duration::ZERO);
        assert_eq!(
            text,
            ["recv into float64[5] from rank 3 with tag ANY_TAG on COMM_WORLD for 0 s"]
        );
        assert!(table.overdue(Duration::ZERO).is_empty());
        assert_eq!(table.longer_than(Duration::ZERO), text);
        assert!(table.longer_than(Duration::from_secs(60)).is_empty());
        drop(pending);
        assert!(table.rows.lock()[0].since.is_none());
    }
}
