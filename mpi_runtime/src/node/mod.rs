//! Memory that the ranks of a node share.

pub mod rendezvous;
pub mod segment;
pub mod shm_ring;
pub mod shm_rings;
