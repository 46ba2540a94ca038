//! A call frame, read by type: operands, results, attributes, and what XLA gives to a custom call.

use std::ffi::{CString, c_void};

use mpi_runtime::{Buffer, ElementType};
use pjrt_sys::*;

use super::attributes::Attributes;
use crate::error::Error;
use crate::inner::call::{new_args, slice};

/// A call frame whose handler is to be executed.
pub struct Frame<'a> {
    raw: &'a XLA_FFI_CallFrame,
    api: &'a XLA_FFI_Api,
    /// Operands as XLA describes them.
    pub args: &'a [&'a XLA_FFI_Buffer],
    /// Results as XLA describes them.
    pub rets: &'a [&'a XLA_FFI_Buffer],
}

/// A function of XLA's table for custom calls.
type Function<Args> = Option<unsafe extern "C" fn(*mut Args) -> *mut XLA_FFI_Error>;

/// Calls a function of XLA's table, which gives something to a custom call, with these members of
/// its arguments beside the context; has what it filled in.
macro_rules! ask {
    ($frame:ident, $function:ident, $what:expr, { $($member:ident: $value:expr),* }) => {
        // SAFETY: the context is the frame's; what members point to outlives the call, and memory
        // that is given back is from `allocate`.
        unsafe {
            $frame.ask($frame.api.$function, $what, |args| {
                args.ctx = $frame.raw.ctx;
                $(args.$member = $value;)*
            })
        }
    };
}

impl<'a> Frame<'a> {
    /// The typed frame.
    ///
    /// # Safety
    /// `raw` must be what XLA passed to a handler that has said its version.
    pub unsafe fn new(raw: &'a XLA_FFI_CallFrame) -> Frame<'a> {
        // SAFETY: XLA's table and lists are valid during the call, and the lists have `size`
        // elements, all of them buffers (XLA_FFI_ArgType, XLA_FFI_RetType).
        unsafe {
            Frame {
                raw,
                api: &*raw.api,
                args: slice(raw.args.args.cast(), size(raw.args.size)),
                rets: slice(raw.rets.rets.cast(), size(raw.rets.size)),
            }
        }
    }

    /// The attributes.
    #[inline]
    pub fn attributes(&self) -> Attributes<'a> {
        // SAFETY: the frame is what XLA passed, see `new`.
        unsafe { Attributes::new(&self.raw.attrs) }
    }

    /// An integer attribute, of 32 or 64 bits.
    pub fn integer(&self, name: &str) -> Option<i64> {
        let found = self
            .attributes()
            .iter()
            .find(|(of, _)| *of == name.as_bytes());
        found.and_then(|(_, value)| value.integer())
    }

    /// The `launch_id` this program was executed with.
    #[inline]
    pub fn run_id(&self) -> i64 {
        ask!(self, XLA_FFI_RunId_Get, "a run id", {}).map_or(0, |args| args.run_id)
    }

    /// The stream in whose order this call is, of a GPU.
    pub fn stream(&self) -> Result<u64, Error> {
        known(
            self.api.XLA_FFI_Stream_Get,
            "this XLA does not tell streams",
        )?;
        ask!(self, XLA_FFI_Stream_Get, "the stream", {}).map(|args| args.stream as u64)
    }

    /// The number of the device that this call is on.
    pub fn device(&self) -> Result<i32, Error> {
        known(
            self.api.XLA_FFI_DeviceOrdinal_Get,
            "this XLA does not tell devices",
        )?;
        ask!(self, XLA_FFI_DeviceOrdinal_Get, "the device", {}).map(|args| args.device_ordinal)
    }

    /// Memory of the device, to be given back by [`Frame::free`].
    pub fn allocate(&self, bytes: usize) -> Result<*mut c_void, Error> {
        known(
            self.api.XLA_FFI_DeviceMemory_Allocate,
            "this XLA gives no memory",
        )?;
        let what = "memory of the device";
        ask!(self, XLA_FFI_DeviceMemory_Allocate, what, { size: bytes, alignment: 16 })
            .map(|args| args.data)
    }

    /// Gives memory of [`Frame::allocate`] back; XLA uses it again for what comes into the stream
    /// later.
    pub fn free(&self, data: *mut c_void, bytes: usize) {
        // There is nobody to tell of a failure; XLA frees what is left with its client.
        let _ = ask!(self, XLA_FFI_DeviceMemory_Free, "memory", { size: bytes, data: data });
    }

    /// What was attached to this execution under `type_id`; null if nothing was.
    pub fn user_data(&self, type_id: i64) -> *mut c_void {
        let mut id = XLA_FFI_TypeId { type_id };
        ask!(self, XLA_FFI_ExecutionContext_Get, "user data", { type_id: &mut id })
            .map_or(std::ptr::null_mut(), |args| args.data)
    }

    /// Calls a function of XLA's table, which gives `what` to a custom call.
    ///
    /// # Safety
    /// `fill` must make the arguments what the function asks for.
    unsafe fn ask<Args>(
        &self,
        function: Function<Args>,
        what: &str,
        fill: impl FnOnce(&mut Args),
    ) -> Result<Args, Error> {
        let refused = || Error::internal(format!("XLA does not give {what} to a custom call"));
        let mut args = new_args::<Args>();
        fill(&mut args);
        // SAFETY: `fill` has made the arguments right; an error is ours to destroy, once.
        unsafe {
            let error = function.ok_or_else(refused)?(&mut args);
            if error.is_null() {
                return Ok(args);
            }
            let mut destroy: XLA_FFI_Error_Destroy_Args = new_args();
            destroy.error = error;
            if let Some(function) = self.api.XLA_FFI_Error_Destroy {
                function(&mut destroy);
            }
        }
        Err(refused())
    }

    /// An FFI error with this text.
    pub fn error(&self, text: &str) -> *mut XLA_FFI_Error {
        let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
        let mut args: XLA_FFI_Error_Create_Args = new_args();
        args.message = text.as_ptr();
        args.errc = XLA_FFI_Error_Code_INTERNAL;
        let create = self.api.XLA_FFI_Error_Create;
        // SAFETY: XLA copies the text.
        create.map_or(std::ptr::null_mut(), |create| unsafe { create(&mut args) })
    }
}

/// An older XLA lacks some functions.
fn known<Args>(function: Function<Args>, otherwise: &str) -> Result<(), Error> {
    match function {
        Some(_) => Ok(()),
        None => Err(Error::internal(otherwise)),
    }
}

fn size(given: i64) -> usize {
    usize::try_from(given).unwrap_or(0)
}

/// The dimensions of a buffer, outermost first.
#[inline]
pub fn dims(buffer: &XLA_FFI_Buffer) -> &[i64] {
    // SAFETY: XLA's buffers are valid during the call, and `dims` has `rank` elements.
    unsafe { slice(buffer.dims, size(buffer.rank)) }
}

/// A buffer as it is given; `contract` says whether it is an array.
#[inline]
pub fn array(buffer: &XLA_FFI_Buffer) -> Buffer<'_> {
    // SAFETY: a buffer of XLA's holds its elements during the call; `contract` refuses others.
    unsafe { Buffer::new(buffer.data, element_type(buffer.dtype), dims(buffer)) }
}

/// numpy's name of one of XLA's element types, or XLA's own.
pub fn dtype_name(dtype: XLA_FFI_DataType) -> String {
    let name = match dtype {
        XLA_FFI_DataType_TOKEN => "token",
        XLA_FFI_DataType_S4 => "int4",
        XLA_FFI_DataType_U4 => "uint4",
        XLA_FFI_DataType_S2 => "int2",
        XLA_FFI_DataType_U2 => "uint2",
        XLA_FFI_DataType_S1 => "int1",
        XLA_FFI_DataType_U1 => "uint1",
        XLA_FFI_DataType_F4E2M1FN => "float4_e2m1fn",
        dtype => match element_type(dtype) {
            ElementType::Other => return format!("type {dtype} of XLA's"),
            known => known.name(),
        },
    };
    name.to_owned()
}

/// XLA's element types as ours.
#[inline]
fn element_type(dtype: XLA_FFI_DataType) -> ElementType {
    match dtype {
        XLA_FFI_DataType_PRED => ElementType::Bool,
        XLA_FFI_DataType_S8 => ElementType::I8,
        XLA_FFI_DataType_S16 => ElementType::I16,
        XLA_FFI_DataType_S32 => ElementType::I32,
        XLA_FFI_DataType_S64 => ElementType::I64,
        XLA_FFI_DataType_U8 => ElementType::U8,
        XLA_FFI_DataType_U16 => ElementType::U16,
        XLA_FFI_DataType_U32 => ElementType::U32,
        XLA_FFI_DataType_U64 => ElementType::U64,
        XLA_FFI_DataType_F32 => ElementType::F32,
        XLA_FFI_DataType_F64 => ElementType::F64,
        XLA_FFI_DataType_C64 => ElementType::C64,
        XLA_FFI_DataType_C128 => ElementType::C128,
        XLA_FFI_DataType_F16 => ElementType::F16,
        XLA_FFI_DataType_BF16 => ElementType::BF16,
        XLA_FFI_DataType_F8E5M2 => ElementType::F8E5M2,
        XLA_FFI_DataType_F8E4M3 => ElementType::F8E4M3,
        XLA_FFI_DataType_F8E4M3FN => ElementType::F8E4M3FN,
        XLA_FFI_DataType_F8E4M3B11FNUZ => ElementType::F8E4M3B11FNUZ,
        XLA_FFI_DataType_F8E5M2FNUZ => ElementType::F8E5M2FNUZ,
        XLA_FFI_DataType_F8E4M3FNUZ => ElementType::F8E4M3FNUZ,
        XLA_FFI_DataType_F8E3M4 => ElementType::F8E3M4,
        XLA_FFI_DataType_F8E8M0FNU => ElementType::F8E8M0FNU,
        _ => ElementType::Other,
    }
}
