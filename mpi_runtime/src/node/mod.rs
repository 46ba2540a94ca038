//! Memory that the ranks of a node share.

pub(crate) mod own_file;
pub mod rendezvous;
pub mod segment;
pub mod shm_ring;
pub mod shm_rings;
