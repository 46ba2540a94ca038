//! Handles of the inner plugin as typed values: what is asked of each, one file for each object.

#[macro_use]
pub(super) mod handle;

mod buffer;
mod client;
mod device;
mod event;
mod executable;

pub use buffer::{AliasFiller, BufferShape, ExternalReference, with_references};
pub use client::{HostArray, Program};
pub use device::Texts;
pub use executable::Output;
pub use handle::{
    BufferHandle, ClientHandle, ContextHandle, DescriptionHandle, Destroy, DeviceHandle,
    EventHandle, ExecutableHandle, FromRaw, Handle, LoadedHandle, MemoryHandle, Owned,
    TopologyHandle,
};
