//! How a collective is cut: an array that holds a block for each rank is a matrix with a row for
//! each, any other one has one row, and a chunk is some columns of all rows.

#![forbid(unsafe_code)]

use mpi_shim_abi::Kind;

use crate::buffer::Buffer;
use crate::mpi::communicators::Communicator;
use crate::operation::Operation;

/// The chunks of a collective.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Rows of what this rank sends, and of what it receives; 0 if there is nothing.
    send_rows: usize,
    recv_rows: usize,
    /// Rows that the array described by the operand has (a template's too), and the result.
    shape_rows: [usize; 2],
    /// Elements of a row, and of a chunk's.
    columns: usize,
    width: usize,
    /// This rank's result is its operand.
    pub(super) returns_input: bool,
}

impl Plan {
    pub(super) fn new(op: &Operation<'_>, comm: &Communicator, chunk: usize) -> Plan {
        let size = comm.size as usize;
        let is_root = comm.rank == op.root;
        let at_root = if is_root { size } else { 1 };
        let rows = match op.kind {
            Kind::Allgather => [1, size],
            Kind::Alltoall => [size, size],
            Kind::ReduceScatter => [size, 1],
            Kind::Gather => [1, at_root],
            Kind::Scatter => [at_root, 1],
            _ => [1, 1],
        };
        let (sends, receives) = (op.kind.reads(is_root), op.kind.writes(is_root));
        let columns = op.send.elements().max(0) as usize / rows[0].max(1);
        // The same on all ranks: with the root's row for each rank, even where this rank has one.
        let most = match op.kind {
            Kind::Gather | Kind::Scatter => size,
            _ => rows[0].max(rows[1]),
        };
        let column = most * op.send.dtype().size();
        Plan {
            send_rows: if sends { rows[0] } else { 0 },
            recv_rows: if receives { rows[1] } else { 0 },
            shape_rows: rows,
            columns,
            width: (chunk / column.max(1)).max(1),
            returns_input: !receives,
        }
    }

    /// At least one, since all ranks take part in a collective of nothing too.
    pub(super) fn chunks(&self) -> usize {
        self.columns.div_ceil(self.width).max(1)
    }

    /// Elements of a row of chunk `number`.
    fn elements(&self, number: usize) -> usize {
        self.width.min(self.columns - number * self.width)
    }

    /// Where the rows of a chunk lie in `array`, and their bytes.
    fn rows(&self, array: &Buffer<'_>, rows: usize, number: usize) -> Vec<(usize, usize)> {
        let size = array.dtype().size();
        let bytes = self.elements(number) * size;
        if bytes == 0 {
            return Vec::new();
        }
        let first = array.data() as usize + number * self.width * size;
        (0..rows)
            .map(|row| (first + row * self.columns * size, bytes))
            .collect()
    }

    /// What chunk `number` sends: addresses and bytes.
    pub(super) fn sent(&self, op: &Operation<'_>, number: usize) -> Vec<(usize, usize)> {
        self.rows(&op.send, self.send_rows, number)
    }

    /// What it receives.
    pub(super) fn received(&self, op: &Operation<'_>, number: usize) -> Vec<(usize, usize)> {
        self.rows(&op.recv, self.recv_rows, number)
    }

    /// The shapes of a chunk's operand and result.
    pub(super) fn shapes(&self, number: usize) -> [[i64; 2]; 2] {
        let elements = self.elements(number) as i64;
        self.shape_rows.map(|rows| [rows as i64, elements])
    }
}
