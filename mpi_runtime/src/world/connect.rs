//! The link between the nodes of this job, made at start.

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use crate::error::StartError;
use crate::link::Link;
use crate::link::invitation::{Invitation, WORDS};
use crate::log;
use crate::node::board::Board;
use crate::world::agree::AllRanks;
use crate::world::join::mpi_error;

/// Connects the nodes, if there are several, or ranks that share no memory. A job without a link
/// runs as well: what is told about one that waits is less. Collective.
pub(super) fn connect(
    ranks: &AllRanks<'_>,
    board: Option<&Arc<Board>>,
) -> Result<Option<Arc<Link>>, StartError> {
    let (rank, size) = (ranks.comm.rank as usize, ranks.comm.size as usize);
    let seen = board.map_or(1, |board| board.ranks());
    if ranks.most(u64::from(seen < size))? == 0 {
        return Ok(None);
    }
    let link = Link::new(rank, size, board.cloned());
    let own = match rank {
        0 => link.listen().map(|invitation| invitation.words()),
        _ => Ok([0; WORDS]),
    };
    let refused = own.as_ref().err().map(io::Error::to_string);
    let words = ranks.largest_of(&own.unwrap_or([0; WORDS]));
    let words = words.map_err(mpi_error("MPI_Allreduce"))?;
    let failed = match Invitation::from_words(&words) {
        Some(invitation) => link.accept(invitation).err().map(|error| error.to_string()),
        None => refused,
    };
    // The rank that says why is the highest of those that cannot.
    let teller = ranks.most(failed.as_ref().map_or(0, |_| rank as u64 + 1))?;
    if teller == 0 {
        return Ok(Some(link));
    }
    if let Some(reason) = failed.filter(|_| teller == rank as u64 + 1) {
        log::line(&format!(
            "rank {rank} cannot connect to rank 0 ({reason}), so reports of jobs that wait leave \
             out other nodes, and deaths there are not noticed"
        ));
    }
    Ok(None)
}
