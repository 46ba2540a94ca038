//! The wrapped plugin: finding it, calling it, and its objects as typed handles.

pub mod call;
pub mod create_options;
pub mod cuda_options;
pub mod dispatch_thread;
pub mod execute_args;
pub mod execute_options;
pub mod extensions;
pub mod find;
pub mod handles;
mod layouts;
pub mod library;
pub mod room;
pub mod serialized;
pub mod side_table;
pub mod xla_flags;

pub use library::{api, inner, on_gpu};
