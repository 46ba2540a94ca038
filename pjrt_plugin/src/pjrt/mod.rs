//! The PJRT objects whose functions are replaced, one file each. Every entry of C is here: it
//! decodes its arguments (`entry.rs`), and the rooms below do the work.

pub mod buffer;
pub mod client;
pub mod device;
pub mod entry;
pub mod error;
pub mod event;
pub mod executable;
pub mod execute_context;
pub mod extension;
pub mod loaded_executable;
pub mod newer;
pub mod topology;
