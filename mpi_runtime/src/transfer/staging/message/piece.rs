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
        let array = Buffer::described(self.dtype, shape);
        match &self.memory {
            Some(memory) => {
                assert!(array.bytes() <= memory.bytes);
                // SAFETY: memory of the pool's, with room for it, which is put back when the
                // operation that has the array has returned.
                unsafe { array.placed(memory.data.as_ptr().cast()) }
            }
            None => array,
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
