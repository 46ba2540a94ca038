//! Blocks of different lengths: whether the counts fit the ranks, and the arrays the counts.

#![forbid(unsafe_code)]

use mpi_shim_abi::{Kind, ShimOp};

use crate::buffer::Buffer;
use crate::error::Failure;
use crate::mpi::communicators::Communicator;
use crate::operation::{CountWords, Operation};

/// Checks an operation of the kinds with counts, and fills in what the shim has of them.
///
/// # Errors
/// If counts are not one for each rank, negative, or not those of the arrays.
pub(super) fn check(
    shim: &mut ShimOp,
    op: &Operation<'_>,
    comm: &Communicator,
) -> Result<(), Failure> {
    let is_exchange = op.kind == Kind::Alltoallv;
    let names = match is_exchange {
        true => ["send_counts", "recv_counts"],
        false => ["counts", "counts"],
    };
    let own = comm.rank.max(0) as usize;
    let total = sum(names[0], op.counts, comm.size)?;
    let own_rows = op.counts.get(own).copied().unwrap_or(0);
    let (sent, received) = match (op.kind, comm.rank == op.root) {
        (Kind::Alltoallv, _) => {
            let received = sum(names[1], op.recv_counts, comm.size)?;
            let expected = op.recv_counts.get(own).copied().unwrap_or(0);
            if own_rows != expected {
                return Err(format!(
                    "this rank sends {own_rows} rows to itself and expects {expected} of itself: \
                     send_counts is {} and recv_counts {}, and must agree at {own}",
                    CountWords(op.counts),
                    CountWords(op.recv_counts)
                )
                .into());
            }
            (total, received)
        }
        (Kind::Allgatherv, _) | (Kind::Gatherv, true) => (own_rows, total),
        (Kind::Scatterv, true) => (total, own_rows),
        _ => (own_rows, own_rows),
    };
    check_rows("operand", &op.send, sent, names[0], op.counts)?;
    let received_by = match is_exchange {
        true => op.recv_counts,
        false => op.counts,
    };
    check_rows("result", &op.recv, received, names[1], received_by)?;
    if op.send.shape()[1..] != op.recv.shape()[1..] {
        return Err(format!(
            "the operand is {} and the result {}: all dimensions behind the first must be the same",
            op.send, op.recv
        )
        .into());
    }
    let row = row_of(&op.send, total.max(received))?;
    shim.counts = op.counts.as_ptr();
    if is_exchange {
        shim.recv_counts = op.recv_counts.as_ptr();
    }
    shim.row = row;
    shim.count = sent * row;
    shim.recv_count = received * row;
    Ok(())
}

/// The rows of all blocks.
fn sum(name: &str, counts: &[i64], size: i32) -> Result<i64, Failure> {
    let words = CountWords(counts);
    if counts.len() != size as usize {
        return Err(format!(
            "{name} has {} numbers, {words}, and the communicator {size} ranks; pass the rows of \
             each rank's block",
            counts.len()
        )
        .into());
    }
    if let Some(rank) = counts.iter().position(|&count| count < 0) {
        return Err(format!(
            "{name} is {words}, and that of rank {rank} is negative: {}",
            counts[rank]
        )
        .into());
    }
    let total = counts
        .iter()
        .try_fold(0i64, |sum, &count| sum.checked_add(count));
    total.ok_or_else(|| format!("{name} is {words}: no memory can hold so many rows").into())
}

/// Whether an array has as many rows as counts say.
fn check_rows(
    what: &str,
    array: &Buffer<'_>,
    rows: i64,
    name: &str,
    counts: &[i64],
) -> Result<(), Failure> {
    if array.shape().first() == Some(&rows) {
        return Ok(());
    }
    let counts = CountWords(counts);
    Err(format!(
        "the {what} is {array}, and by {name} {counts} its leading dimension must be {rows}"
    )
    .into())
}

/// Elements of a row, if memory can hold so many rows.
fn row_of(array: &Buffer<'_>, rows: i64) -> Result<i64, Failure> {
    let mut lengths = array.shape()[1..].iter();
    let row = match array.shape()[1..].contains(&0) {
        true => Some(0),
        false => lengths.try_fold(1i64, |row, &length| row.checked_mul(length)),
    };
    let size = array.dtype().size() as i64;
    let bytes = row.and_then(|row| row.checked_mul(size)?.checked_mul(rows));
    row.filter(|_| bytes.is_some())
        .ok_or_else(|| format!("no memory can hold {rows} rows as those of {array}").into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::ElementType;
    use crate::engine::check::prepare;

    const COMM: Communicator = Communicator {
        name: "test",
        handle: 5,
        user_handle: 5,
        rank: 1,
        size: 3,
        members: &[],
        largest_tag: 0,
        freed: false,
    };

    fn buffer(shape: &[i64]) -> Buffer<'_> {
        Buffer::described(ElementType::F32, shape)
    }

    fn refusal(kind: Kind, counts: [&[i64]; 2], sent: &[i64], received: &[i64]) -> String {
        let op = Operation {
            counts: counts[0],
            recv_counts: counts[1],
            ..Operation::new(kind, 0, buffer(sent), buffer(received))
        };
        match prepare(&op, &COMM) {
            Ok(shim) => format!("{} {} {}", shim.count, shim.recv_count, shim.row),
            Err(reason) => reason.to_string(),
        }
    }

    #[test]
    fn counts_give_elements() {
        let counts: [&[i64]; 2] = [&[2, 3, 0], &[]];
        assert_eq!(
            refusal(Kind::Allgatherv, counts, &[3, 4], &[5, 4]),
            "12 20 4"
        );
        assert_eq!(refusal(Kind::Gatherv, counts, &[3, 4], &[3, 4]), "12 12 4");
        assert_eq!(refusal(Kind::Scatterv, counts, &[3], &[3]), "3 3 1");
        let both: [&[i64]; 2] = [&[1, 2, 0], &[5, 2, 1]];
        assert_eq!(refusal(Kind::Alltoallv, both, &[3, 0], &[8, 0]), "0 0 0");
        assert_eq!(refusal(Kind::Alltoallv, both, &[3, 7], &[8, 7]), "21 56 7");
    }

    #[test]
    fn counts_that_do_not_fit_are_refused() {
        let of = |counts: &[i64]| refusal(Kind::Allgatherv, [counts, &[]], &[3], &[5]);
        assert!(of(&[2, 3]).contains("counts has 2 numbers, (2, 3), and the communicator 3 ranks"));
        assert!(of(&[2, 3, -1]).contains("(2, 3, -1), and that of rank 2 is negative: -1"));
        assert!(of(&[3, 2, 0]).contains("by counts (3, 2, 0) its leading dimension must be 2"));
        assert!(of(&[3, 3, 0]).contains("the result is float32[5], and by counts (3, 3, 0)"));
        assert!(of(&[i64::MAX, 3, 0]).contains("no memory can hold so many rows"));
        let scalar = refusal(Kind::Allgatherv, [&[1, 1, 1], &[]], &[], &[3]);
        assert!(scalar.contains("the operand is float32[]"), "{scalar}");
        let rows = refusal(Kind::Allgatherv, [&[2, 3, 0], &[]], &[3, 4], &[5, 3]);
        assert!(
            rows.contains("float32[3,4] and the result float32[5,3]"),
            "{rows}"
        );
        let itself = refusal(Kind::Alltoallv, [&[1, 2, 0], &[1, 3, 0]], &[3], &[4]);
        assert!(
            itself.contains("sends 2 rows to itself and expects 3"),
            "{itself}"
        );
        let huge = [0, 1 << 40, 1 << 40];
        let large = refusal(
            Kind::Allgatherv,
            [&[0, 0, 1], &[]],
            &huge,
            &[1, 1 << 40, 1 << 40],
        );
        assert!(large.contains("no memory can hold 1 rows"), "{large}");
    }
}
