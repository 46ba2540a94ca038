//! What an operation is: one plain struct that travels from the FFI boundary to the MPI call and
//! that order, checks, the pending table and logging read.

#![forbid(unsafe_code)]

use std::fmt;

use mpi_shim_abi::{ANY, Kind, PROC_NULL, Reduction};

use crate::buffer::{Buffer, ElementType};
use crate::error::Failure;

/// Whose collectives of programs for several devices are.
pub const OF_XLA: &str = "XLA's";

/// An operation on one communicator, as the program asked for it.
#[derive(Clone, Copy, Debug)]
pub struct Operation<'a> {
    /// What to do.
    pub kind: Kind,
    /// Whose it is, if it is no operation of the user's own: `mpi4jax's`.
    pub of: Option<&'static str>,
    /// Number of the communicator (see [`crate::mpi::communicators`]).
    pub comm: i64,
    /// What this rank passes.
    pub send: Buffer<'a>,
    /// Where this rank's result goes.
    pub recv: Buffer<'a>,
    /// Of the kinds with counts, else empty: along the leading dimension, the rows of each rank's
    /// block; of `Alltoallv` those that this rank sends to each.
    pub counts: &'a [i64],
    /// Of `Alltoallv`, else empty: the rows that this rank receives from each.
    pub recv_counts: &'a [i64],
    /// Of the kinds of neighbourhoods: how many ranks this one receives from.
    pub sources: i32,
    /// The same of those that it sends to.
    pub destinations: i32,
    /// Reduction, of the reducing kinds.
    pub reduction: Option<Reduction>,
    /// Handle of the user's own reduction, for [`Reduction::User`].
    pub user_reduction: u64,
    /// Root, of the kinds that have one.
    pub root: i32,
    /// Destination of a send; may be [`PROC_NULL`].
    pub dest: i32,
    /// Source of a receive; may be [`ANY`] or [`PROC_NULL`].
    pub source: i32,
    /// Tag of what is sent.
    pub send_tag: i32,
    /// Tag of what is received; may be [`ANY`].
    pub recv_tag: i32,
    /// Address of an `MPI_Status` to fill, or 0.
    pub status: usize,
    /// Where it stands in a program of which data decides how often it runs: the program in the
    /// bits above the lowest 16, and there the number of the loop. 0 if that is not known.
    pub place: u64,
}

impl<'a> Operation<'a> {
    /// An operation of the user's that asks for nothing in particular: root and destination are
    /// rank 0, any source and any tag will do, what is sent has tag 0, and there is no status.
    pub const fn new(kind: Kind, comm: i64, send: Buffer<'a>, recv: Buffer<'a>) -> Operation<'a> {
        Operation {
            kind,
            of: None,
            comm,
            send,
            recv,
            counts: &[],
            recv_counts: &[],
            sources: 0,
            destinations: 0,
            reduction: None,
            user_reduction: 0,
            root: 0,
            dest: 0,
            source: ANY,
            send_tag: 0,
            recv_tag: ANY,
            status: 0,
            place: 0,
        }
    }

    /// How many bytes at the end of the result of this receive a message of `bytes` leaves
    /// unwritten.
    ///
    /// # Errors
    /// If it does not fit, or is shorter than it may be.
    #[inline]
    pub fn missing(&self, source: i32, tag: i32, bytes: usize) -> Result<usize, Failure> {
        let expected = self.recv.bytes();
        let may_be_shorter = self.source == PROC_NULL || self.status != 0;
        if bytes > expected || bytes < expected && !may_be_shorter {
            return Err(wrong_length(source, tag, bytes, expected));
        }
        Ok(expected - bytes)
    }

    /// What it is, without its arrays.
    pub fn without_arrays(&self) -> Operation<'static> {
        let Operation {
            kind,
            of,
            comm,
            sources,
            destinations,
            reduction,
            user_reduction,
            root,
            dest,
            source,
            send_tag,
            recv_tag,
            status,
            place,
            ..
        } = *self;
        let none = |like: &Buffer<'_>| Buffer::described(like.dtype(), &[0]);
        Operation {
            kind,
            of,
            comm,
            send: none(&self.send),
            recv: none(&self.recv),
            counts: &[],
            recv_counts: &[],
            sources,
            destinations,
            reduction,
            user_reduction,
            root,
            dest,
            source,
            send_tag,
            recv_tag,
            status,
            place,
        }
    }
}

/// What is wrong with a message of `bytes` for a result of `expected` bytes.
pub(crate) fn wrong_length(source: i32, tag: i32, bytes: usize, expected: usize) -> Failure {
    let remedy = if bytes < expected {
        " (pass status= to accept less)"
    } else {
        ""
    };
    format!(
        "the message from rank {source} with tag {tag} has {bytes} bytes, and the result \
         {expected}; both sides must have the same shape and dtype{remedy}"
    )
    .into()
}

/// What is wrong with a message of `bytes` of another dtype than the result's, which is `wanted`.
pub(crate) fn wrong_dtype(
    source: i32,
    tag: i32,
    bytes: usize,
    sent: Option<ElementType>,
    wanted: ElementType,
) -> Failure {
    format!(
        "the message from rank {source} with tag {tag} has {bytes} bytes of {}, and the result is \
         {}; both sides must have the same shape and dtype",
        sent.map_or("an unknown type", ElementType::name),
        wanted.name()
    )
    .into()
}

/// Reductions and their names, in the order of the numbers used by the custom calls.
pub const REDUCTIONS: [(Reduction, &str); 10] = [
    (Reduction::Sum, "SUM"),
    (Reduction::Prod, "PROD"),
    (Reduction::Min, "MIN"),
    (Reduction::Max, "MAX"),
    (Reduction::Land, "LAND"),
    (Reduction::Lor, "LOR"),
    (Reduction::Lxor, "LXOR"),
    (Reduction::Band, "BAND"),
    (Reduction::Bor, "BOR"),
    (Reduction::Bxor, "BXOR"),
];

/// Name of a reduction.
pub fn reduction_name(reduction: Reduction) -> &'static str {
    REDUCTIONS
        .get(reduction as usize)
        .map_or("user-defined reduction", |row| row.1)
}

impl fmt::Display for Operation<'_> {
    /// `send of float32[3,4] to rank 1 with tag 7`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(of) = self.of {
            write!(f, "{of} ")?;
        }
        write!(f, "{}", self.kind.name())?;
        match self.kind {
            Kind::Barrier | Kind::Ibarrier => return Ok(()),
            kind if kind.is_end() => return Ok(()),
            Kind::Irecv => write!(f, " of {}", self.send.dtype().name())?,
            Kind::Recv => write!(f, " into {}", self.recv)?,
            Kind::Sendrecv => {
                write!(f, " of {} into {}", self.send, self.recv)?;
            }
            _ => write!(f, " of {}", self.send)?,
        }
        if let Some(reduction) = self.reduction {
            write!(f, " with {}", reduction_name(reduction))?;
        }
        if !self.recv_counts.is_empty() {
            let (sent, received) = (CountWords(self.counts), CountWords(self.recv_counts));
            write!(f, " with send_counts {sent} and recv_counts {received}")?;
        } else if !self.counts.is_empty() {
            write!(f, " with counts {}", CountWords(self.counts))?;
        }
        if self.kind.has_neighbors() {
            let (from, to) = (self.sources, self.destinations);
            write!(f, " from {from} neighbours and to {to}")?;
        }
        if self.kind.sends() {
            write!(
                f,
                " to rank {} with tag {}",
                PeerWords(self.dest),
                self.send_tag
            )?;
        }
        if self.kind.sends() && self.kind.receives() {
            f.write_str(" and")?;
        }
        if self.kind.receives() {
            let (source, tag) = (PeerWords(self.source), TagWords(self.recv_tag));
            write!(f, " from rank {source} with tag {tag}")?;
        }
        if self.kind.has_root() {
            write!(f, " with root {}", self.root)?;
        }
        Ok(())
    }
}

/// How many counts are shown.
const SHOWN: usize = 8;

/// Counts in words: `(3, 0, 5)`, and of many the first.
pub(crate) struct CountWords<'a>(pub(crate) &'a [i64]);

impl fmt::Display for CountWords<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: Vec<String> = self.0.iter().take(SHOWN).map(i64::to_string).collect();
        write!(f, "({}", shown.join(", "))?;
        match self.0.len() {
            length if length > SHOWN => write!(f, ", and {} more)", length - SHOWN),
            1 => f.write_str(",)"),
            _ => f.write_str(")"),
        }
    }
}

struct PeerWords(i32);
struct TagWords(i32);

impl fmt::Display for PeerWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ANY => f.write_str("ANY_SOURCE"),
            PROC_NULL => f.write_str("PROC_NULL"),
            rank => write!(f, "{rank}"),
        }
    }
}

impl fmt::Display for TagWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == ANY {
            f.write_str("ANY_TAG")
        } else {
            write!(f, "{}", self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::ElementType;

    #[test]
    fn an_operation_describes_itself() {
        let shape = [3, 4];
        let x = Buffer::described(ElementType::F32, &shape);
        let send = Operation {
            dest: 1,
            send_tag: 7,
            ..Operation::new(Kind::Send, 0, x, Buffer::NONE)
        };
        assert_eq!(
            send.to_string(),
            "send of float32[3,4] to rank 1 with tag 7"
        );
        let recv = Operation {
            kind: Kind::Recv,
            recv: x,
            ..send
        };
        assert_eq!(
            recv.to_string(),
            "recv into float32[3,4] from rank ANY_SOURCE with tag ANY_TAG"
        );
        let counts = [1, 2, 0, 3, 4, 5, 6, 7, 8];
        let gatherv = Operation {
            kind: Kind::Gatherv,
            counts: &counts,
            ..send
        };
        assert_eq!(
            gatherv.to_string(),
            "gatherv of float32[3,4] with counts (1, 2, 0, 3, 4, 5, 6, 7, and 1 more) with root 0"
        );
        let foreign = Operation {
            of: Some("mpi4jax's"),
            ..recv
        };
        assert!(foreign.to_string().starts_with("mpi4jax's recv into"));
    }

    #[test]
    fn reductions_are_in_the_order_of_the_contract() {
        for (number, (reduction, _)) in REDUCTIONS.iter().enumerate() {
            assert_eq!(*reduction as usize, number);
        }
    }
}
