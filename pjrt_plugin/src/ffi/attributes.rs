//! The attributes of a custom call as XLA passes them: a name, and a value of any type.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

use pjrt_sys::*;

use super::frame::dtype_name;
use crate::inner::call::slice;

/// All attributes of a custom call.
#[derive(Clone, Copy)]
pub struct Attributes<'a> {
    types: &'a [XLA_FFI_AttrType],
    names: &'a [&'a XLA_FFI_ByteSpan],
    values: &'a [*mut c_void],
}

impl<'a> Attributes<'a> {
    /// The typed list.
    ///
    /// # Safety
    /// `raw` must be what XLA passed to a handler.
    pub unsafe fn new(raw: &'a XLA_FFI_Attrs) -> Attributes<'a> {
        let size = usize::try_from(raw.size).unwrap_or(0);
        // SAFETY: XLA's three lists have `size` elements (XLA_FFI_Attrs).
        unsafe {
            Attributes {
                types: slice(raw.types, size),
                names: slice(raw.names.cast(), size),
                values: slice(raw.attrs, size),
            }
        }
    }

    /// Names and values, in XLA's order, which is that of the names.
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = (&'a [u8], Value<'a>)> {
        let values = self.types.iter().zip(self.values);
        self.names.iter().zip(values).map(|(name, (&of, &raw))| {
            // SAFETY: a name is as long as it says.
            let name = unsafe { slice(name.ptr.cast::<u8>(), name.len) };
            let lifetime = PhantomData;
            (name, Value { of, raw, lifetime })
        })
    }
}

/// The value of an attribute.
#[derive(Clone, Copy)]
pub struct Value<'a> {
    of: XLA_FFI_AttrType,
    raw: *mut c_void,
    lifetime: PhantomData<&'a ()>,
}

impl<'a> Value<'a> {
    /// The bytes of a string.
    pub fn bytes(&self) -> Option<&'a [u8]> {
        // SAFETY: XLA's value has the type that it says, and is as long as it says.
        (self.of == XLA_FFI_AttrType_STRING).then(|| unsafe {
            let span = &*self.raw.cast::<XLA_FFI_ByteSpan>();
            slice(span.ptr.cast::<u8>(), span.len)
        })
    }

    fn scalar(&self) -> Option<&XLA_FFI_Scalar> {
        // SAFETY: XLA's value has the type that it says (XLA_FFI_AttrType).
        (self.of == XLA_FFI_AttrType_SCALAR).then(|| unsafe { &*self.raw.cast::<XLA_FFI_Scalar>() })
    }

    /// A signed integer of 64 bits, which most are.
    #[inline]
    pub fn int64(&self) -> Option<i64> {
        let scalar = self.scalar()?;
        // SAFETY: a scalar's value has the width of its type.
        (scalar.dtype == XLA_FFI_DataType_S64)
            .then(|| unsafe { scalar.value.cast::<i64>().read_unaligned() })
    }

    /// A list of signed integers of 64 bits.
    pub fn list(&self) -> Option<&'a [i64]> {
        if self.of != XLA_FFI_AttrType_ARRAY {
            return None;
        }
        // SAFETY: XLA's value has the type that it says.
        let array = unsafe { &*self.raw.cast::<XLA_FFI_Array>() };
        let numbers = array.data.cast::<i64>();
        if array.dtype != XLA_FFI_DataType_S64 || !numbers.is_aligned() {
            return None;
        }
        // SAFETY: an array is as long as it says, of elements of its type, and lives as long as the
        // call.
        Some(unsafe { slice(numbers, array.size) })
    }

    /// An integer of 32 or 64 bits.
    #[inline]
    pub fn integer(&self) -> Option<i64> {
        let scalar = self.scalar()?;
        // SAFETY: as in `int64`.
        unsafe {
            match scalar.dtype {
                XLA_FFI_DataType_S64 => Some(scalar.value.cast::<i64>().read_unaligned()),
                XLA_FFI_DataType_S32 => Some(scalar.value.cast::<i32>().read_unaligned().into()),
                XLA_FFI_DataType_U32 => Some(scalar.value.cast::<u32>().read_unaligned().into()),
                XLA_FFI_DataType_U64 => {
                    i64::try_from(scalar.value.cast::<u64>().read_unaligned()).ok()
                }
                _ => None,
            }
        }
    }
}

impl fmt::Display for Value<'_> {
    /// `int8 3`, `the string "MAX"`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(scalar) = self.scalar() {
            let value = scalar.value;
            write!(f, "{}", dtype_name(scalar.dtype))?;
            // SAFETY: as in `int64`.
            return unsafe {
                match scalar.dtype {
                    XLA_FFI_DataType_PRED => write!(f, " {}", value.cast::<u8>().read() != 0),
                    XLA_FFI_DataType_S8 => write!(f, " {}", value.cast::<i8>().read()),
                    XLA_FFI_DataType_U8 => write!(f, " {}", value.cast::<u8>().read()),
                    XLA_FFI_DataType_S16 => write!(f, " {}", value.cast::<i16>().read_unaligned()),
                    XLA_FFI_DataType_U16 => write!(f, " {}", value.cast::<u16>().read_unaligned()),
                    XLA_FFI_DataType_S32 => write!(f, " {}", value.cast::<i32>().read_unaligned()),
                    XLA_FFI_DataType_U32 => write!(f, " {}", value.cast::<u32>().read_unaligned()),
                    XLA_FFI_DataType_S64 => write!(f, " {}", value.cast::<i64>().read_unaligned()),
                    XLA_FFI_DataType_U64 => write!(f, " {}", value.cast::<u64>().read_unaligned()),
                    XLA_FFI_DataType_F32 => write!(f, " {}", value.cast::<f32>().read_unaligned()),
                    XLA_FFI_DataType_F64 => write!(f, " {}", value.cast::<f64>().read_unaligned()),
                    _ => Ok(()),
                }
            };
        }
        if let Some(text) = self.bytes() {
            let shown = &text[..text.len().min(80)];
            return write!(f, "the string {:?}", String::from_utf8_lossy(shown));
        }
        match self.of {
            XLA_FFI_AttrType_ARRAY => {
                // SAFETY: XLA's value has the type that it says.
                let array = unsafe { &*self.raw.cast::<XLA_FFI_Array>() };
                write!(f, "an array of {} {}", array.size, dtype_name(array.dtype))
            }
            XLA_FFI_AttrType_DICTIONARY => f.write_str("a dictionary"),
            other => write!(f, "of the unknown type {other}"),
        }
    }
}
