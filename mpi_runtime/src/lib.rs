//! The engine of mpi_cuda: communicators, operations, order, checks and the table of what is
//! pending. It knows MPI's semantics and device memory, and nothing of PJRT or HLO.
//!
//! Read [`operation`] first (what an operation is), then [`engine`] (what happens to it).

mod backoff;
pub mod check;
pub mod collectives;
pub mod communicators;
pub mod cuda;
pub mod device;
pub mod direct;
pub mod engine;
pub mod error;
pub mod family;
mod identity;
pub mod launcher;
pub mod log;
pub mod nonblocking;
pub mod operation;
pub mod order;
mod output;
pub mod pending;
pub mod probe_result;
pub mod rendezvous;
mod result_canary;
pub mod shim;
pub mod simulated;
pub mod single_rank;
pub mod staging;
pub mod transfer;
pub mod world;

pub use collectives::CollectiveSequence;
pub use direct::Direct;
pub use engine::{Engine, UniformProgram};
pub use error::{OperationError, StartError};
pub use family::Family;
pub use mpi_shim_abi::{ANY, Kind, PROC_NULL, Reduction};
pub use operation::{Buffer, ElementType, Operation};
pub use order::Ticket;
pub use staging::Staging;
pub use world::{World, WorldOptions};
