//! How data in device memory reach MPI: directly, or staged through the host's memory.

pub mod choice;
pub mod direct;
pub mod probe_result;
pub mod staging;
pub(crate) mod transport;
