//! The engine of mpi_cuda: communicators, operations, order, checks and the table of what is
//! pending. It knows MPI's semantics and device memory, and nothing of PJRT or HLO.
//!
//! Read [`operation`] first (what an operation is), then [`engine`] (what happens to it). The
//! folders stand on each other in this order: [`mpi`] and [`device`] at the ground, then [`node`],
//! [`link`], [`transfer`], [`engine`], [`watch`], [`world`].

pub mod buffer;
pub mod device;
pub mod elf;
pub mod engine;
pub mod error;
mod link;
pub mod log;
pub mod mpi;
pub mod node;
pub mod operation;
pub mod ranks;
mod time_of_day;
pub mod transfer;
pub mod watch;
pub mod world;

pub use buffer::{Buffer, ElementType};
pub use engine::collective_sequence::CollectiveSequence;
pub use engine::order::{ANY_COMM, LaunchOrder, Ticket};
pub use engine::{Engine, Place, UniformProgram};
pub use error::{OperationError, StartError};
pub use mpi::family::Family;
pub use mpi_shim_abi::{ANY, Kind, PROC_NULL, Reduction};
pub use node::lent_array::LentArray;
pub use operation::Operation;
pub use transfer::direct::Direct;
pub use transfer::staging::Staging;
pub use world::{World, WorldOptions};
