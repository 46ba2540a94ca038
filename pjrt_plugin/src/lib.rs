//! `libpjrt_mpi_cuda.so`: a PJRT plugin that wraps an XLA plugin and makes the ranks of an MPI job
//! its devices.
//!
//! Start at [`api`], the function table with what is replaced and where; `docs/architecture.md`
//! says why. [`exports`] has the functions beside the table, [`ffi`] the custom calls.

// Constants of C keep their names.
#![allow(non_upper_case_globals)]

mod about;
mod api;
mod at_exit;
mod boundary;
mod clients;
mod compile;
mod config;
mod devices;
mod error;
mod exports;
mod ffi;
mod fork;
mod inner;
mod launch;
mod pjrt;
mod plugin;
mod probe;
mod profiler;
#[cfg(test)]
mod random;
mod search;
