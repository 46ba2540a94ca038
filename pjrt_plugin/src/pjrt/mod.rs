//! The PJRT objects whose functions are replaced, one file each.

pub mod buffer;
pub mod client;
pub mod event;
pub mod execute_context;
pub mod extension;
pub mod keep_alive;
pub mod topology;
