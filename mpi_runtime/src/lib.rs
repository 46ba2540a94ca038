//! The engine of mpi_cuda: communicators, operations, order, checks and the table of what is
//! pending. It knows MPI's semantics and device memory, and nothing of PJRT or HLO.
//!
//! Read [`operation`] first (what an operation is), then [`engine`] (what happens to it).

pub mod alone;
pub mod arrivals;
mod asleep;
pub mod check;
pub mod communicators;
pub mod cuda;
pub mod device;
pub mod direct;
pub mod engine;
pub mod error;
pub mod family;
mod identity;
pub mod launcher;
pub mod native;
pub mod operation;
pub mod order;
mod output;
pub mod pending;
pub mod proof;
pub mod shim;
pub mod simulated;
pub mod split;
pub mod staging;
pub mod transfer;
pub mod world;
mod written;

pub use direct::Direct;
pub use engine::{Alike, Engine};
pub use error::{OperationError, StartError};
pub use family::Family;
pub use mpi_shim_abi::{ANY, Kind, PROC_NULL, Reduction};
pub use native::Program;
pub use operation::{Buffer, ElementType, Operation};
pub use order::Ticket;
pub use staging::Staging;
pub use world::{World, WorldOptions};
