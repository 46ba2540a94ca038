//! Memory that the ranks of a node share.

pub(crate) mod bell;
pub mod board;
pub(crate) mod combine;
mod lane;
pub mod lent_array;
pub mod local_reduce;
pub(crate) mod mailbox;
pub(crate) mod own_file;
pub(crate) mod patience;
pub mod process;
pub mod rendezvous;
pub mod results;
pub mod segment;
pub(crate) mod shm_collective;
pub mod shm_ring;
pub mod shm_rings;
mod streaming;
