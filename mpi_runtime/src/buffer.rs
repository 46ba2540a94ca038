//! Arrays, their element types, and the memory behind them.

use std::ffi::c_void;
use std::fmt;

use mpi_shim_abi::Datatype;

/// A dense row-major array in memory of the host or of a device.
///
/// Whoever makes one vouches for its memory ([`Buffer::new`]), and nothing can make the array
/// longer since. Everything here that touches the memory relies on it, and is only called for
/// memory of the host.
#[derive(Clone, Copy, Debug)]
pub struct Buffer<'a> {
    /// First element; may be null when the array is empty or absent.
    data: *mut c_void,
    dtype: ElementType,
    shape: &'a [i64],
}

// SAFETY: an address means the same on every thread, and its maker vouches for the memory on all of
// them.
unsafe impl Send for Buffer<'_> {}

impl<'a> Buffer<'a> {
    /// No array: what `barrier` sends and `send` receives.
    pub const NONE: Buffer<'static> = Buffer::described(ElementType::U8, &[0]);

    /// An array at `data`, with dimensions outermost first.
    ///
    /// # Safety
    /// `data` must be null, or hold the array for as long as this or a copy of it is used: until
    /// the operation that has it has returned, all its bytes may be read, and written if it is a
    /// result, and nobody else writes them. XLA gives that for the buffers of a custom call. Memory
    /// of a device must only come to operations that are told so.
    #[inline]
    pub unsafe fn new(data: *mut c_void, dtype: ElementType, shape: &'a [i64]) -> Buffer<'a> {
        Buffer { data, dtype, shape }
    }

    /// What an array is like, without any memory.
    pub const fn described(dtype: ElementType, shape: &'a [i64]) -> Buffer<'a> {
        let data = std::ptr::null_mut();
        Buffer { data, dtype, shape }
    }

    /// An array in this memory, which has room for it.
    pub fn over(memory: &'a mut [u8], dtype: ElementType, shape: &'a [i64]) -> Buffer<'a> {
        let (data, room) = (memory.as_mut_ptr().cast(), memory.len());
        let array = Buffer { data, dtype, shape };
        assert!(array.bytes() <= room);
        array
    }

    /// An array like this elsewhere.
    ///
    /// # Safety
    /// As for [`Buffer::new`].
    #[inline]
    pub unsafe fn placed(self, data: *mut c_void) -> Buffer<'a> {
        Buffer { data, ..self }
    }

    /// The same bytes as elements of another type of that size.
    pub fn as_type(self, dtype: ElementType) -> Buffer<'a> {
        assert_eq!(self.dtype.size(), dtype.size());
        Buffer { dtype, ..self }
    }

    /// The first elements of this one, with another shape.
    pub fn shaped<'b>(self, shape: &'b [i64]) -> Buffer<'b>
    where
        'a: 'b,
    {
        let Buffer { data, dtype, .. } = self;
        let first = Buffer { data, dtype, shape };
        assert!(first.bytes() <= self.bytes());
        first
    }

    /// An array like `like` in the memory of this one, from byte `place` on.
    pub fn part<'b>(&self, place: usize, like: &Buffer<'b>) -> Buffer<'b>
    where
        'a: 'b,
    {
        let end = place.checked_add(like.bytes());
        assert!(end.is_some_and(|end| end <= self.bytes()));
        Buffer {
            data: self.data.wrapping_byte_add(place),
            ..*like
        }
    }

    /// First element; may be null when the array is empty or absent.
    #[inline]
    pub fn data(&self) -> *mut c_void {
        self.data
    }

    /// Element type.
    #[inline]
    pub fn dtype(&self) -> ElementType {
        self.dtype
    }

    /// Dimensions, outermost first.
    #[inline]
    pub fn shape(&self) -> &'a [i64] {
        self.shape
    }

    /// Number of elements.
    #[inline]
    pub fn elements(&self) -> i64 {
        match self.shape {
            [] => 1,
            [length] => *length,
            [first, others @ ..] => others.iter().product::<i64>() * first,
        }
    }

    /// Size in bytes, for dtypes that MPI moves as whole bytes.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.elements() as usize * self.dtype.size()
    }

    /// Where the byte `offset` is, if `length` bytes from there on are the array's.
    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        let end = offset.checked_add(length);
        assert!(end.is_some_and(|end| end <= self.bytes()));
        assert!(length == 0 || !self.data.is_null());
        self.data.cast::<u8>().wrapping_add(offset)
    }

    /// Writes zeros from byte `start` to the end.
    #[inline]
    pub(crate) fn clear_from(&self, start: usize) {
        let length = self.bytes() - start;
        if length > 0 {
            // SAFETY: `at` says that the bytes are the array's, whose maker vouches for them.
            unsafe { self.at(start, length).write_bytes(0, length) };
        }
    }

    /// Writes bytes from byte `start` on.
    pub(crate) fn write(&self, start: usize, bytes: &[u8]) {
        let to = self.at(start, bytes.len());
        if !bytes.is_empty() {
            // SAFETY: as in `clear_from`; a slice of Rust's does not overlap an array of XLA's.
            unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
    }

    /// Reads bytes from byte `start` on.
    pub(crate) fn read<const N: usize>(&self, start: usize) -> [u8; N] {
        // SAFETY: as in `clear_from`; an array of bytes has no alignment.
        unsafe { self.at(start, N).cast::<[u8; N]>().read() }
    }

    /// The bytes of the whole array.
    ///
    /// # Safety
    /// Nobody may write them as long as the slice is used.
    #[inline]
    pub(crate) unsafe fn as_slice(&self) -> &'a [u8] {
        match self.bytes() {
            0 => &[],
            // SAFETY: the maker of the array vouches for its bytes, and the caller for the rest.
            bytes => unsafe { std::slice::from_raw_parts(self.data.cast(), bytes) },
        }
    }

    /// The same of a result, to write them.
    ///
    /// # Safety
    /// Nobody else may read or write them as long as the slice is used.
    #[inline]
    pub(crate) unsafe fn as_slice_mut(&self) -> &'a mut [u8] {
        match self.bytes() {
            0 => &mut [],
            // SAFETY: the maker of the array vouches for its bytes, and the caller for the rest.
            bytes => unsafe { std::slice::from_raw_parts_mut(self.data.cast(), bytes) },
        }
    }

    /// Copies the whole array to other memory.
    ///
    /// # Safety
    /// There must be room for its bytes at `to`, and it must not overlap them.
    pub(crate) unsafe fn copy_to(&self, to: *mut u8) {
        let bytes = self.bytes();
        if bytes > 0 {
            // SAFETY: the maker of the array vouches for its bytes, and the caller for the room.
            unsafe { to.copy_from_nonoverlapping(self.data.cast(), bytes) };
        }
    }
}

impl ElementType {
    /// Types of less than 8 bits, each with the type in which XLA passes its elements, in the order
    /// of their numbers from 1 on (the attribute `type` in `include/mpi_cuda.h`).
    pub const NARROW: [(ElementType, ElementType); 5] = [
        (ElementType::I2, ElementType::I8),
        (ElementType::U2, ElementType::U8),
        (ElementType::I4, ElementType::I8),
        (ElementType::U4, ElementType::U8),
        (ElementType::F4, ElementType::F8E4M3FN),
    ];
}

impl fmt::Display for Buffer<'_> {
    /// `float32[3,4]`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape: Vec<String> = self.shape.iter().map(i64::to_string).collect();
        write!(f, "{}[{}]", self.dtype.name(), shape.join(","))
    }
}

/// What kind of number an element is; decides which reductions it has (MPI 4.0, table 6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// `bool`: every reduction, as in numpy.
    Logical,
    /// Signed and unsigned integers: every reduction.
    Integer,
    /// Real numbers: SUM, PROD, MIN, MAX.
    Real,
    /// Complex numbers: SUM and PROD.
    Complex,
    /// Moved only: no reductions.
    Opaque,
}

macro_rules! element_types {
    ($($variant:ident = $name:literal, $size:literal, $class:ident, $mpi:expr;)+) => {
        /// Element types of arrays; declared once, with what everything else derives from.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)]
        pub enum ElementType { $($variant,)+ }

        impl ElementType {
            /// Every element type, in the order of their numbers.
            pub const ALL: &[ElementType] = &[$(ElementType::$variant,)+];

            /// numpy's name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
            /// Bytes per element.
            pub const fn size(self) -> usize {
                match self { $(Self::$variant => $size,)+ }
            }
            /// Which reductions it has.
            pub const fn class(self) -> Class {
                match self { $(Self::$variant => Class::$class,)+ }
            }
            /// The MPI datatype, where there is one.
            pub const fn datatype(self) -> Option<Datatype> {
                match self { $(Self::$variant => $mpi,)+ }
            }
        }
    };
}

element_types! {
    Bool = "bool", 1, Logical, Some(Datatype::Bool);
    I8 = "int8", 1, Integer, Some(Datatype::I8);
    I16 = "int16", 2, Integer, Some(Datatype::I16);
    I32 = "int32", 4, Integer, Some(Datatype::I32);
    I64 = "int64", 8, Integer, Some(Datatype::I64);
    U8 = "uint8", 1, Integer, Some(Datatype::U8);
    U16 = "uint16", 2, Integer, Some(Datatype::U16);
    U32 = "uint32", 4, Integer, Some(Datatype::U32);
    U64 = "uint64", 8, Integer, Some(Datatype::U64);
    F32 = "float32", 4, Real, Some(Datatype::F32);
    F64 = "float64", 8, Real, Some(Datatype::F64);
    C64 = "complex64", 8, Complex, Some(Datatype::C64);
    C128 = "complex128", 16, Complex, Some(Datatype::C128);
    F16 = "float16", 2, Real, Some(Datatype::F16);
    BF16 = "bfloat16", 2, Real, Some(Datatype::BF16);
    F8E5M2 = "float8_e5m2", 1, Opaque, Some(Datatype::U8);
    F8E4M3 = "float8_e4m3", 1, Opaque, Some(Datatype::U8);
    F8E4M3FN = "float8_e4m3fn", 1, Opaque, Some(Datatype::U8);
    F8E4M3B11FNUZ = "float8_e4m3b11fnuz", 1, Opaque, Some(Datatype::U8);
    F8E5M2FNUZ = "float8_e5m2fnuz", 1, Opaque, Some(Datatype::U8);
    F8E4M3FNUZ = "float8_e4m3fnuz", 1, Opaque, Some(Datatype::U8);
    F8E3M4 = "float8_e3m4", 1, Opaque, Some(Datatype::U8);
    F8E8M0FNU = "float8_e8m0fnu", 1, Opaque, Some(Datatype::U8);
    I2 = "int2", 1, Opaque, Some(Datatype::I8);
    U2 = "uint2", 1, Opaque, Some(Datatype::U8);
    I4 = "int4", 1, Opaque, Some(Datatype::I8);
    U4 = "uint4", 1, Opaque, Some(Datatype::U8);
    F4 = "float4_e2m1fn", 1, Opaque, Some(Datatype::U8);
    Other = "a type of less than 8 bits", 1, Opaque, None;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_is_written_and_read_where_it_is_asked_to_be() {
        let mut memory = [7u8; 6];
        let array = Buffer::over(&mut memory, ElementType::U8, &[5]);
        array.write(1, &[1, 2]);
        array.clear_from(4);
        assert_eq!((array.read::<5>(0), memory[5]), ([7, 1, 2, 7, 0], 7));
    }

    #[test]
    #[should_panic]
    fn an_array_is_no_longer_than_its_memory() {
        Buffer::over(&mut [0; 7], ElementType::F64, &[1]);
    }

    #[test]
    #[should_panic]
    fn nothing_beyond_an_array_is_touched() {
        Buffer::NONE.write(0, &[1]);
    }
}
