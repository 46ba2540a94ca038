//! Arrays of other threads of this process, which wait while one thread executes a collective for
//! all of them.

use crate::buffer::Buffer;
use crate::node::local_reduce;
use mpi_shim_abi::Reduction;

/// An operand or a result that its owner leaves to whoever has this.
pub struct LentArray(Buffer<'static>);

impl LentArray {
    /// Of this array.
    ///
    /// # Safety
    /// It must be valid until this is dropped. Nobody else may write it meanwhile; a result may not
    /// be read by others either, nor share memory with another array that is lent.
    pub unsafe fn new(array: Buffer<'_>) -> LentArray {
        // SAFETY: only the lifetime differs, which the caller answers for.
        LentArray(unsafe { std::mem::transmute::<Buffer<'_>, Buffer<'static>>(array) })
    }

    /// The array.
    pub fn buffer(&self) -> Buffer<'_> {
        self.0
    }

    /// Its bytes, of an operand.
    pub fn bytes(&self) -> &[u8] {
        match self.0.bytes() {
            0 => &[],
            // SAFETY: `new` asks that it be valid and that nobody write it.
            bytes => unsafe { std::slice::from_raw_parts(self.0.data().cast(), bytes) },
        }
    }

    /// Writes it, a result, with bytes of as many that are of no result.
    pub fn write(&self, bytes: &[u8]) {
        assert_eq!(self.0.bytes(), bytes.len());
        if !bytes.is_empty() {
            let to = self.0.data().cast::<u8>();
            // SAFETY: `new` asks that it be valid and nobody else's.
            unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
    }

    /// Fills it, a result, with zeros.
    pub fn clear(&self) {
        if self.0.bytes() > 0 {
            // SAFETY: as in `write`.
            unsafe { self.0.data().cast::<u8>().write_bytes(0, self.0.bytes()) };
        }
    }

    /// This, a result, becomes the reduction of itself and an operand of the same length.
    ///
    /// # Errors
    /// If such elements have no such reduction.
    pub fn reduce(&self, reduction: Reduction, operand: &LentArray) -> Result<(), String> {
        let (bytes, other) = (self.0.bytes(), operand.bytes());
        assert_eq!(bytes, other.len());
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as in `write`; this is the only reference to it while this runs.
        let onto = unsafe { std::slice::from_raw_parts_mut(self.0.data().cast::<u8>(), bytes) };
        local_reduce::reduce(reduction, self.0.dtype(), onto, other)
    }

    /// Copies a result of the same length to this, another one.
    pub fn copy(&self, from: &LentArray) {
        assert_eq!(self.0.bytes(), from.0.bytes());
        if self.0.bytes() > 0 && self.0.data() != from.0.data() {
            let (to, from) = (self.0.data().cast::<u8>(), from.0.data().cast::<u8>());
            // SAFETY: as in `write`; no two results share memory.
            unsafe { to.copy_from_nonoverlapping(from, self.0.bytes()) };
        }
    }
}
