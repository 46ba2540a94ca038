//! `libpjrt_mpi_cuda.so`: a PJRT plugin that wraps an XLA plugin and makes the ranks of an MPI job
//! its devices.
//!
//! Start at [`api`], the function table with what is replaced and where; `docs/architecture.md`
//! says why. [`exports`] has the functions beside the table, [`ffi`] the custom calls.

// Constants of C keep their names.
#![allow(non_upper_case_globals)]

mod alias_buffer;
mod api;
mod async_barrier;
mod boundary;
mod buffers;
mod call;
mod client;
mod compile;
mod config;
mod context;
mod deferred;
mod error;
mod events;
mod execute;
mod exports;
mod extension;
mod ffi;
mod fork;
mod gpu;
mod handles;
mod huge_pages;
mod inflight_limit;
mod inner;
mod keep_alive;
mod layouts;
mod memory;
mod nested;
mod options;
mod plugin;
mod probe;
mod replica_groups;
mod search;
mod spmd;
mod status;
mod topology;
mod user_reductions;
mod xla_flags;
