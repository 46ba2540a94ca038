//! One message in memory of the host.

use crate::buffer::{Buffer, ElementType};
use crate::device::HostMemory;

/// Memory of the host with one message.
pub(super) struct Piece {
    pub(super) memory: Option<HostMemory>,
    pub(super) elements: i64,
    pub(super) dtype: ElementType,
}

impl Piece {
    pub(super) fn none() -> Piece {
        Piece {
            memory: None,
            elements: 0,
            dtype: ElementType::U8,
        }
    }

    pub(super) fn buffer<'a>(&self, shape: &'a [i64]) -> Buffer<'a> {
        let data = self.memory.as_ref();
        Buffer {
            data: data.map_or(std::ptr::null_mut(), |memory| memory.data.as_ptr().cast()),
            dtype: self.dtype,
            shape,
        }
    }

    /// The first `bytes` bytes.
    pub(super) fn bytes(&self, bytes: usize) -> &[u8] {
        match &self.memory {
            // SAFETY: memory of the pool's that nothing writes now.
            Some(memory) => unsafe {
                std::slice::from_raw_parts(memory.data.as_ptr(), bytes.min(memory.bytes))
            },
            None => &[],
        }
    }
}
