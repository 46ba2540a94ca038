//! The wrapped plugin: finding it, calling it, and handles of its own.

pub mod call;
pub mod cuda_options;
pub mod find;
pub mod handles;
pub mod layouts;
pub mod xla_flags;
