//! Reading a call frame, and answering what XLA asks of every handler.

use std::ffi::{CString, c_void};

use mpi_runtime::{Buffer, ElementType};
use pjrt_sys::*;

use crate::boundary::guarded;
use crate::error::Error;
use crate::inner::call::slice;

/// A call frame whose handler is to be executed.
pub struct Frame<'a>(pub &'a XLA_FFI_CallFrame);

/// Runs the body of a handler: answers the metadata query, catches panics, reports errors.
///
/// # Safety
/// `frame` must be what XLA passed.
pub unsafe fn handle(
    frame: *mut XLA_FFI_CallFrame,
    body: impl FnOnce(&Frame<'_>) -> Result<(), Error>,
) -> *mut XLA_FFI_Error {
    // SAFETY: XLA passes a valid frame.
    unsafe {
        if answer_metadata(frame) {
            return std::ptr::null_mut();
        }
        let frame = Frame(&*frame);
        match guarded(|| body(&frame)) {
            Ok(()) => std::ptr::null_mut(),
            Err(error) => frame.error(&error.to_string()),
        }
    }
}

/// XLA asks each handler for its API version before it accepts it; the right answer is the
/// version of the frame itself, whatever headers we were built with.
///
/// # Safety
/// `frame` must be what XLA passed.
pub unsafe fn answer_metadata(frame: *mut XLA_FFI_CallFrame) -> bool {
    // SAFETY: XLA passes a valid frame; a metadata extension has the layout of its type.
    unsafe {
        let extension = (*frame).extension_start;
        if extension.is_null() || (*extension).type_ != XLA_FFI_Extension_Metadata {
            return false;
        }
        let metadata = (*extension.cast::<XLA_FFI_Metadata_Extension>()).metadata;
        let version = &(*(*frame).api).api_version;
        (*metadata).api_version.major_version = version.major_version;
        (*metadata).api_version.minor_version = version.minor_version;
        (*metadata).traits = 0;
        true
    }
}

impl<'a> Frame<'a> {
    /// Operand number `index`.
    pub fn arg(&self, index: usize) -> Option<Buffer<'a>> {
        let args = &self.0.args;
        // SAFETY: XLA's arrays have `size` elements; every argument is a buffer (XLA_FFI_ArgType).
        unsafe {
            slice(args.args, args.size as usize)
                .get(index)
                .map(|arg| read_buffer(*arg))
        }
    }

    /// Result number `index`.
    pub fn ret(&self, index: usize) -> Option<Buffer<'a>> {
        let rets = &self.0.rets;
        // SAFETY: as for `arg`.
        unsafe {
            slice(rets.rets, rets.size as usize)
                .get(index)
                .map(|ret| read_buffer(*ret))
        }
    }

    /// Operands as XLA describes them.
    pub fn raw_args(&self) -> &'a [*mut XLA_FFI_Buffer] {
        // SAFETY: as for `arg`.
        unsafe { slice(self.0.args.args.cast(), self.0.args.size as usize) }
    }

    /// Results as XLA describes them.
    pub fn raw_rets(&self) -> &'a [*mut XLA_FFI_Buffer] {
        // SAFETY: as for `arg`.
        unsafe { slice(self.0.rets.rets.cast(), self.0.rets.size as usize) }
    }

    /// An integer attribute of any width.
    pub fn integer(&self, name: &str) -> Option<i64> {
        let attrs = &self.0.attrs;
        let size = attrs.size as usize;
        // SAFETY: XLA's arrays have `size` elements; a scalar attribute is an XLA_FFI_Scalar whose
        // value has the width of its type.
        unsafe {
            let index = slice(attrs.names, size).iter().position(|span| {
                slice((**span).ptr.cast::<u8>(), (**span).len) == name.as_bytes()
            })?;
            if *attrs.types.add(index) != XLA_FFI_AttrType_SCALAR {
                return None;
            }
            let scalar = &**attrs.attrs.add(index).cast::<*const XLA_FFI_Scalar>();
            Some(match scalar.dtype {
                XLA_FFI_DataType_S64 | XLA_FFI_DataType_U64 => {
                    scalar.value.cast::<i64>().read_unaligned()
                }
                XLA_FFI_DataType_S32 => i64::from(scalar.value.cast::<i32>().read_unaligned()),
                XLA_FFI_DataType_U32 => i64::from(scalar.value.cast::<u32>().read_unaligned()),
                _ => return None,
            })
        }
    }

    /// The `launch_id` this program was executed with.
    pub fn run_id(&self) -> i64 {
        let mut args: XLA_FFI_RunId_Get_Args = crate::inner::call::new_args();
        args.ctx = self.0.ctx;
        // SAFETY: a table of FFI 0.2 or newer has the function; the context is the frame's.
        let error = unsafe {
            (*self.0.api)
                .XLA_FFI_RunId_Get
                .map_or(std::ptr::null_mut(), |function| function(&mut args))
        };
        if error.is_null() { args.run_id } else { 0 }
    }

    /// The stream in whose order this call is, of a GPU.
    pub fn stream(&self) -> Result<u64, Error> {
        let mut args: XLA_FFI_Stream_Get_Args = crate::inner::call::new_args();
        args.ctx = self.0.ctx;
        // SAFETY: as for `run_id`.
        let error = unsafe {
            let get = (*self.0.api).XLA_FFI_Stream_Get;
            get.ok_or_else(|| Error::internal("this XLA does not tell streams"))?(&mut args)
        };
        self.ok(error, "the stream").map(|()| args.stream as u64)
    }

    /// The number of the device that this call is on.
    pub fn device(&self) -> Result<i32, Error> {
        let mut args: XLA_FFI_DeviceOrdinal_Get_Args = crate::inner::call::new_args();
        args.ctx = self.0.ctx;
        // SAFETY: as for `run_id`.
        let error = unsafe {
            let get = (*self.0.api).XLA_FFI_DeviceOrdinal_Get;
            get.ok_or_else(|| Error::internal("this XLA does not tell devices"))?(&mut args)
        };
        self.ok(error, "the device").map(|()| args.device_ordinal)
    }

    /// Memory of the device, to be given back by [`Frame::free`].
    pub fn allocate(&self, bytes: usize) -> Result<*mut c_void, Error> {
        let mut args: XLA_FFI_DeviceMemory_Allocate_Args = crate::inner::call::new_args();
        (args.ctx, args.size, args.alignment) = (self.0.ctx, bytes, 16);
        // SAFETY: as for `run_id`.
        let error = unsafe {
            let allocate = (*self.0.api).XLA_FFI_DeviceMemory_Allocate;
            allocate.ok_or_else(|| Error::internal("this XLA gives no memory"))?(&mut args)
        };
        self.ok(error, "memory of the device").map(|()| args.data)
    }

    /// Gives memory back; XLA uses it again for what comes into the stream later.
    pub fn free(&self, data: *mut c_void, bytes: usize) {
        let mut args: XLA_FFI_DeviceMemory_Free_Args = crate::inner::call::new_args();
        (args.ctx, args.size, args.data) = (self.0.ctx, bytes, data);
        // SAFETY: as for `run_id`; the memory is from `allocate`.
        unsafe {
            if let Some(free) = (*self.0.api).XLA_FFI_DeviceMemory_Free {
                // There is nobody to tell; XLA frees what is left with its client.
                let _ = self.ok(free(&mut args), "");
            }
        }
    }

    fn ok(&self, error: *mut XLA_FFI_Error, what: &str) -> Result<(), Error> {
        if error.is_null() {
            return Ok(());
        }
        let mut destroy: XLA_FFI_Error_Destroy_Args = crate::inner::call::new_args();
        destroy.error = error;
        // SAFETY: an error of XLA's, which is ours to destroy.
        unsafe {
            if let Some(function) = (*self.0.api).XLA_FFI_Error_Destroy {
                function(&mut destroy);
            }
        }
        Err(Error::internal(format!(
            "XLA does not give {what} to a custom call"
        )))
    }

    /// What was attached to this execution under `type_id`; null if nothing was.
    pub fn user_data(&self, type_id: i64) -> *mut c_void {
        let mut id = XLA_FFI_TypeId { type_id };
        let mut args: XLA_FFI_ExecutionContext_Get_Args = crate::inner::call::new_args();
        args.ctx = self.0.ctx;
        args.type_id = &mut id;
        // SAFETY: as for `run_id`.
        unsafe {
            let Some(function) = (*self.0.api).XLA_FFI_ExecutionContext_Get else {
                return std::ptr::null_mut();
            };
            match self.ok(function(&mut args), "user data") {
                Ok(()) => args.data,
                Err(_) => std::ptr::null_mut(),
            }
        }
    }

    /// An FFI error with this text.
    pub fn error(&self, text: &str) -> *mut XLA_FFI_Error {
        let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
        let mut args: XLA_FFI_Error_Create_Args = crate::inner::call::new_args();
        args.message = text.as_ptr();
        args.errc = XLA_FFI_Error_Code_INTERNAL;
        // SAFETY: every table has the function; XLA copies the text.
        unsafe {
            (*self.0.api)
                .XLA_FFI_Error_Create
                .map_or(std::ptr::null_mut(), |function| function(&mut args))
        }
    }
}

/// # Safety
/// `buffer` must be an `XLA_FFI_Buffer` that lives for `'a`.
unsafe fn read_buffer<'a>(buffer: *const c_void) -> Buffer<'a> {
    // SAFETY: as the caller promises; `dims` has `rank` elements.
    unsafe {
        let buffer = &*buffer.cast::<XLA_FFI_Buffer>();
        Buffer {
            data: buffer.data,
            dtype: element_type(buffer.dtype),
            shape: slice(buffer.dims, buffer.rank as usize),
        }
    }
}

/// Whether elements may share a byte.
pub fn is_narrow(dtype: XLA_FFI_DataType) -> bool {
    dtype != XLA_FFI_DataType_TOKEN && element_type(dtype) == ElementType::Other
}

/// XLA's element types as ours.
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
        XLA_FFI_DataType_F8E5M2
        | XLA_FFI_DataType_F8E4M3
        | XLA_FFI_DataType_F8E4M3FN
        | XLA_FFI_DataType_F8E4M3B11FNUZ
        | XLA_FFI_DataType_F8E5M2FNUZ
        | XLA_FFI_DataType_F8E4M3FNUZ
        | XLA_FFI_DataType_F8E3M4
        | XLA_FFI_DataType_F8E8M0FNU => ElementType::F8,
        _ => ElementType::Other,
    }
}
