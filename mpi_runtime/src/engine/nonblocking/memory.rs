//! Memory of the engine's own for one message, or for what a collective sends or receives.

use std::ffi::c_void;

use crate::error::Failure;

/// Room for what was started, aligned for elements of all types; none by default. It stays where it
/// is when its owner moves.
#[derive(Default)]
pub(super) struct StartedMemory(Vec<u128>);

impl StartedMemory {
    /// Its size is a multiple of this.
    pub(super) const UNIT: usize = size_of::<u128>();

    /// Room for so many bytes.
    pub(super) fn allocate(bytes: usize) -> Result<StartedMemory, Failure> {
        let mut memory = Vec::new();
        memory
            .try_reserve_exact(bytes.div_ceil(Self::UNIT))
            .map_err(|_| format!("no memory for a message of {bytes} bytes"))?;
        Ok(StartedMemory(memory))
    }

    /// Bytes that it has room for.
    pub(super) fn room(&self) -> usize {
        self.0.capacity() * Self::UNIT
    }

    /// Where it begins.
    pub(super) fn start(&mut self) -> *mut c_void {
        self.0.as_mut_ptr().cast()
    }

    /// Makes its first bytes zeros.
    pub(super) fn clear(&mut self, bytes: usize) {
        assert!(bytes <= self.room());
        // SAFETY: inside the allocation.
        unsafe { self.0.as_mut_ptr().cast::<u8>().write_bytes(0, bytes) };
    }

    /// Copies bytes to its beginning.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.room());
        let first = self.0.as_mut_ptr().cast::<u8>();
        // SAFETY: inside the allocation, which nothing else borrows.
        unsafe { first.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Its first bytes.
    ///
    /// # Safety
    /// They must have been written.
    pub(super) unsafe fn bytes(&self, bytes: usize) -> &[u8] {
        assert!(bytes <= self.room());
        // SAFETY: inside the allocation, and written, as this function demands.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), bytes) }
    }
}
