//! Memory that the ranks of a node share, made at start.

#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::engine::idle;
use crate::error::StartError;
use crate::node::board::Board;
use crate::node::mailbox::Mailboxes;
use crate::node::patience;
use crate::node::rendezvous::Rendezvous;
use crate::node::results::Results;
use crate::node::segment;
use crate::node::shm_rings::ShmRings;
use crate::transfer::choice::Mode;
use crate::world::agree::{Agreed, AllRanks};
use crate::world::options::WorldOptions;

/// What is shared.
pub(super) struct SharedMemory {
    /// Of ranks that stage.
    pub(super) shm_rings: Option<Arc<ShmRings>>,
    /// If all ranks are on this node.
    pub(super) rendezvous: Option<Rendezvous>,
    /// If the ranks of every node share memory.
    pub(super) board: Option<Arc<Board>>,
    /// If the ranks of every node send each other short messages without MPI.
    pub(super) mailboxes: Option<Mailboxes>,
    /// What they make for each other in it.
    pub(super) results: Option<Results>,
}

/// Makes it. Collective.
pub(super) fn share_memory(
    ranks: &AllRanks<'_>,
    options: &WorldOptions,
    agreed: &Agreed,
) -> Result<SharedMemory, StartError> {
    let size = ranks.comm.size;
    if agreed.node_rank == 0 {
        segment::sweep();
    }
    let stages = agreed
        .transfer
        .as_ref()
        .is_some_and(|choice| choice.mode == Mode::Staged);
    let shm_rings = match &options.device {
        // The ranks agree on the transfer, and all of them or none come here.
        Some(device) if size > 1 && stages => {
            let chunk = device.shm_ring.then_some(device.chunk_bytes);
            Some(Arc::new(share_rings(ranks, agreed, chunk)?))
        }
        _ => None,
    };
    let rendezvous = match agreed.node_size == size {
        true if size > 1 => share_rendezvous(ranks)?,
        _ => None,
    };
    patience::configure(agreed.oversubscribed, idle::progress);
    let board = match size {
        1 => None,
        _ => share_board(ranks, agreed)?.map(Arc::new),
    };
    // Messages of a device's memory have ways of their own, where nobody counts those through MPI.
    let mailboxes = match &board {
        Some(board) if options.shm_messages && options.device.is_none() => {
            share_mailboxes(ranks, agreed, board)?
        }
        _ => None,
    };
    Ok(SharedMemory {
        shm_rings,
        rendezvous,
        mailboxes,
        results: board.clone().and_then(Results::new),
        board,
    })
}

/// Memory in which the ranks meet, or none if they cannot share any.
fn share_rendezvous(ranks: &AllRanks<'_>) -> Result<Option<Rendezvous>, StartError> {
    let (rank, size) = (ranks.comm.rank as usize, ranks.comm.size as usize);
    let own = if rank == 0 { segment::new_number() } else { 0 };
    let made = (rank == 0).then(|| Rendezvous::create(own, size));
    let number = ranks.most(own)?;
    let rendezvous = made.unwrap_or_else(|| Rendezvous::open(number, rank, size));
    // In containers of their own, ranks of one node have nothing to share.
    let failed = ranks.most(u64::from(rendezvous.is_err()))? != 0;
    if let Ok(rendezvous) = &rendezvous {
        rendezvous.unlink();
    }
    Ok(rendezvous.ok().filter(|_| !failed))
}

/// What the ranks of a node show each other, or none if those of some node cannot share memory.
fn share_board(ranks: &AllRanks<'_>, agreed: &Agreed) -> Result<Option<Board>, StartError> {
    let (rank, size) = (ranks.comm.rank as usize, ranks.comm.size as usize);
    let own = if rank == 0 { segment::new_number() } else { 0 };
    let number = agreed.of_node(ranks.most(own)?);
    let mut board = Board::make(number, rank, size);
    ranks.most(0)?;
    let seen = board.as_mut().map_or(0, |board| {
        board.open();
        board.ranks()
    });
    let failed = ranks.most(u64::from(seen != agreed.node_size as usize))? != 0;
    if let Ok(board) = &board {
        board.unlink();
    }
    Ok(board.ok().filter(|_| !failed))
}

/// The mailboxes of this node's ranks, or none if those of some node cannot share them.
fn share_mailboxes(
    ranks: &AllRanks<'_>,
    agreed: &Agreed,
    board: &Board,
) -> Result<Option<Mailboxes>, StartError> {
    let rank = ranks.comm.rank as usize;
    let own = if rank == 0 { segment::new_number() } else { 0 };
    let number = agreed.of_node(ranks.most(own)?);
    let here = (0..ranks.comm.size as usize).filter(|&one| board.sees(one));
    let mut mailboxes = Mailboxes::make(number, rank, here.collect());
    ranks.most(0)?;
    let opened = mailboxes.as_mut().is_ok_and(|one| one.open().is_ok());
    let failed = ranks.most(u64::from(!opened))? != 0;
    if let Ok(mailboxes) = &mailboxes {
        mailboxes.unlink();
    }
    Ok(mailboxes.ok().filter(|_| !failed))
}

/// The rings of this node's ranks; a rank makes one for messages in parts of `chunk` bytes, if any.
fn share_rings(
    ranks: &AllRanks<'_>,
    agreed: &Agreed,
    chunk: Option<usize>,
) -> Result<ShmRings, StartError> {
    let (rank, size) = (ranks.comm.rank as usize, ranks.comm.size as usize);
    let own = if rank == 0 { segment::new_number() } else { 0 };
    let number = agreed.of_node(ranks.most(own)?);
    let node_size = agreed.node_size as usize;
    let mut shm_rings = ShmRings::make(number, rank, size, node_size, chunk);
    ranks.most(0)?;
    shm_rings.open();
    ranks.most(0)?;
    shm_rings.unlink();
    Ok(shm_rings)
}
