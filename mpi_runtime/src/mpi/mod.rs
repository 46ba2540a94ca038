//! The MPI library: which one it is, who launched the job, the shim that calls it, and the
//! communicators.

pub mod backoff;
pub mod choice;
pub mod communicators;
pub mod family;
pub mod launcher;
pub mod libraries;
pub mod parents;
pub mod shim;
