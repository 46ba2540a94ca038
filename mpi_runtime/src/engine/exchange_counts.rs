//! Whether what ranks send in an `alltoallv` is what the others expect. Each rank knows its own
//! counts alone, and MPI leaves it undefined what becomes of others (MPI 4.0, section 6.8). A sum
//! over the ranks tells them all, before anything is sent.
//!
//! The same for collectives between neighbours, where ranks on several nodes do not compare them
//! otherwise: MPI leaves a result as it was where a neighbour sends less than it has room for.

use mpi_shim_abi::{Datatype, Kind, Reduction, ShimOp};

use crate::error::{Failure, MpiError};
use crate::mpi::communicators::Communicator;
use crate::mpi::shim::Shim;
use crate::operation::Operation;

/// Blocks that an error names.
const MOST: usize = 4;

/// Rank, the rank that it receives from, the rows that it gets and those that it expects.
type Wrong = [i64; 4];

/// Bytes of what a rank says of its operand.
const WORDS: usize = 96;

/// Whether the operation is larger than MPI takes on some rank. Collective.
///
/// # Errors
/// The same on all ranks: if one sends other rows than another expects, or rows of another shape or
/// dtype.
pub(super) fn agree(
    shim: &Shim,
    op: &Operation<'_>,
    comm: &Communicator,
    shim_op: &ShimOp,
    part_bytes: i64,
) -> Result<bool, Failure> {
    let elements = shim_op.count.max(shim_op.recv_count);
    let bytes = elements.saturating_mul(shim_op.datatype.size() as i64);
    let row = block(shim_op.datatype as u64, 0, shim_op.row as u64);
    let own = [balance(op, comm.rank), u64::from(bytes > part_bytes), row];
    let mut all = [0; 3];
    add_up(shim, comm, &own, &mut all)?;
    // All ranks have the same sum, and those of the rank that differs are other ones than this.
    if all[2] != row.wrapping_mul(comm.size as u64) {
        let rule = "the rows of all ranks must have the same shape and dtype, also where there are \
                    none";
        return Err(explain_passed(shim, op, comm, rule)?);
    }
    match all[0] {
        0 => Ok(all[1] > 0),
        _ => Err(explain(shim, op, comm)?),
    }
}

/// Whether the blocks for neighbours are the same on all ranks. Collective.
///
/// # Errors
/// The same on all ranks: if one has other blocks than another, or another kind of operation.
pub(super) fn agree_on_blocks(
    shim: &Shim,
    op: &Operation<'_>,
    comm: &Communicator,
    shim_op: &ShimOp,
) -> Result<(), Failure> {
    let what = block(
        op.kind as u64,
        shim_op.datatype as u64,
        shim_op.count as u64,
    );
    let mut all = [0; 3];
    add_up(shim, comm, &[0, 0, what], &mut all)?;
    if all[2] == what.wrapping_mul(comm.size as u64) {
        return Ok(());
    }
    let rule = "all ranks must execute the same collective, with the same shape and dtype for each \
                neighbour";
    Err(explain_passed(shim, op, comm, rule)?)
}

/// The error of ranks that pass different arrays, against a rule. Collective.
fn explain_passed(
    shim: &Shim,
    op: &Operation<'_>,
    comm: &Communicator,
    rule: &str,
) -> Result<Failure, MpiError> {
    let mut own = format!("{} to {}", op.send, op.kind.name()).into_bytes();
    own.resize(WORDS, 0);
    let mut all = vec![0; WORDS * comm.size as usize];
    shim.gather(comm.handle, &own, &mut all)?;
    let all = all.chunks_exact(WORDS);
    let said = (0..).zip(all).map(|(rank, words)| {
        let words = String::from_utf8_lossy(words);
        format!("rank {rank} passes {}", words.trim_end_matches('\0'))
    });
    let said: Vec<String> = said.take(MOST).collect();
    Ok(format!("{rule}: {}", said.join(", ")).into())
}

/// What this rank sends, less what it expects, each block hashed: over all ranks nothing is left if
/// they agree.
fn balance(op: &Operation<'_>, rank: i32) -> u64 {
    let blocks = |counts: &[i64], hash: fn(u64, u64, u64) -> u64| {
        let nonzero = (0u64..).zip(counts).filter(|(_, count)| **count > 0);
        nonzero.fold(0u64, |sum, (other, &count)| {
            sum.wrapping_add(hash(rank as u64, other, count as u64))
        })
    };
    let sent = blocks(op.counts, block);
    sent.wrapping_sub(blocks(op.recv_counts, |to, from, rows| {
        block(from, to, rows)
    }))
}

/// A block, hashed: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014), twice.
fn block(from: u64, to: u64, rows: u64) -> u64 {
    let mix = |bits: u64| {
        let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    };
    mix(mix((from << 32 | to).wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ rows)
}

fn add_up(
    shim: &Shim,
    comm: &Communicator,
    own: &[u64; 3],
    all: &mut [u64; 3],
) -> Result<(), MpiError> {
    let op = ShimOp {
        datatype: Datatype::U64,
        recv_datatype: Datatype::U64,
        reduction: Reduction::Sum,
        count: own.len() as i64,
        recv_count: own.len() as i64,
        send: own.as_ptr().cast(),
        recv: all.as_mut_ptr().cast(),
        ..ShimOp::new(Kind::Allreduce, comm.handle)
    };
    // SAFETY: a communicator that is live, since `op` is checked, and lists as long as is said.
    unsafe { shim.execute(&op) }.map(drop)
}

/// The error of ranks that do not agree. Collective.
fn explain(shim: &Shim, op: &Operation<'_>, comm: &Communicator) -> Result<Failure, MpiError> {
    let mut coming = vec![0i64; op.counts.len()];
    let counts = ShimOp {
        datatype: Datatype::I64,
        recv_datatype: Datatype::I64,
        count: 1,
        recv_count: 1,
        send: op.counts.as_ptr().cast(),
        recv: coming.as_mut_ptr().cast(),
        ..ShimOp::new(Kind::Alltoall, comm.handle)
    };
    // SAFETY: as in `add_up`; both lists have a number for each rank (`check/counts.rs`).
    unsafe { shim.execute(&counts) }?;
    let pairs = coming.iter().zip(op.recv_counts);
    let wrong = pairs
        .clone()
        .position(|(comes, expected)| comes != expected);
    let own: Wrong = match wrong {
        Some(from) => [
            i64::from(comm.rank),
            from as i64,
            coming[from],
            op.recv_counts[from],
        ],
        None => [-1; 4],
    };
    let own = own.map(i64::to_le_bytes);
    let mut all = vec![0; size_of::<Wrong>() * op.counts.len()];
    shim.gather(comm.handle, own.as_flattened(), &mut all)?;
    let all = all.as_chunks().0.iter().copied().map(i64::from_le_bytes);
    let all: Vec<i64> = all.collect();
    Ok(words(all.as_chunks().0).into())
}

fn words(all: &[Wrong]) -> String {
    let wrong = all.iter().filter(|one| one[0] >= 0);
    let mut said: Vec<String> = wrong
        .map(|[to, from, comes, expected]| {
            format!("rank {from} sends {comes} rows to rank {to}, which expects {expected}")
        })
        .collect();
    let more = said.len().saturating_sub(MOST);
    said.truncate(MOST);
    if more > 0 {
        said.push(format!("and {more} more ranks do not get what they expect"));
    }
    format!(
        "the ranks do not agree: {}; send_counts of a rank must have at each place what \
         recv_counts of that rank has for it",
        said.join("; ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Buffer;

    fn total(ranks: [[[i64; 3]; 2]; 3]) -> u64 {
        (0..).zip(&ranks).fold(0, |sum, (rank, [sent, received])| {
            let op = Operation {
                counts: sent,
                recv_counts: received,
                ..Operation::new(Kind::Alltoallv, 0, Buffer::NONE, Buffer::NONE)
            };
            balance(&op, rank).wrapping_add(sum)
        })
    }

    #[test]
    fn nothing_is_left_where_ranks_agree() {
        let sent = [[1, 2, 0], [5, 0, 7], [2, 2, 2]];
        let received = |to: usize| [sent[0][to], sent[1][to], sent[2][to]];
        let agreeing = [0, 1, 2].map(|rank| [sent[rank], received(rank)]);
        assert_eq!(total(agreeing), 0);
        for place in 0..9 {
            let mut other = agreeing;
            other[place / 3][1][place % 3] += 1;
            assert_ne!(total(other), 0);
        }
        // Rows that go elsewhere are no others.
        let mut swapped = agreeing;
        swapped[0][0].swap(0, 1);
        assert_ne!(total(swapped), 0);
    }

    #[test]
    fn the_words_name_both_ranks() {
        let text = words(&[[-1; 4], [1, 2, 3, 4]]);
        assert!(
            text.contains("rank 2 sends 3 rows to rank 1, which expects 4;"),
            "{text}"
        );
        let many: Vec<Wrong> = (0..9).map(|rank| [rank, 0, 1, 2]).collect();
        assert!(words(&many).contains("and 5 more ranks"));
    }
}
