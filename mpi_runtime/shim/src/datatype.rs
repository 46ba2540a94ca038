//! MPI's datatypes: those of elements, and ours for counts and strides that MPI does not take.

use std::ffi::c_int;

use mpi::ffi;
use mpi_shim_abi::Datatype;

use crate::code::SUCCESS;

/// Bytes of the blocks of which [`whole`] makes a datatype.
const BLOCK: i64 = 1 << 30;

#[inline]
pub(crate) fn datatype(datatype: Datatype) -> ffi::MPI_Datatype {
    // SAFETY: constants of the linked MPI.
    unsafe {
        match datatype {
            Datatype::Bool => ffi::RSMPI_C_BOOL,
            Datatype::I8 => ffi::RSMPI_INT8_T,
            Datatype::I16 => ffi::RSMPI_INT16_T,
            Datatype::I32 => ffi::RSMPI_INT32_T,
            Datatype::I64 => ffi::RSMPI_INT64_T,
            Datatype::U8 => ffi::RSMPI_UINT8_T,
            Datatype::U16 | Datatype::F16 | Datatype::BF16 => ffi::RSMPI_UINT16_T,
            Datatype::U32 => ffi::RSMPI_UINT32_T,
            Datatype::U64 => ffi::RSMPI_UINT64_T,
            Datatype::F32 => ffi::RSMPI_FLOAT,
            Datatype::F64 => ffi::RSMPI_DOUBLE,
            Datatype::C64 => ffi::RSMPI_FLOAT_COMPLEX,
            Datatype::C128 => ffi::RSMPI_DOUBLE_COMPLEX,
        }
    }
}

/// Elements of a message as MPI counts them.
pub(crate) struct Elements {
    pub(crate) count: c_int,
    pub(crate) datatype: ffi::MPI_Datatype,
    #[expect(dead_code, reason = "held for its drop")]
    made: Option<OwnDatatype>,
}

impl Elements {
    #[inline]
    pub(crate) fn new(count: i64, element: Datatype) -> Result<Elements, c_int> {
        let Ok(count) = c_int::try_from(count) else {
            let made = whole(count, element)?;
            return Ok(Elements {
                count: 1,
                datatype: made.handle(),
                made: Some(made),
            });
        };
        Ok(Elements {
            count,
            datatype: datatype(element),
            made: None,
        })
    }
}

/// A datatype of ours.
pub(crate) struct OwnDatatype(ffi::MPI_Datatype);

impl OwnDatatype {
    /// Commits what `make` makes.
    fn new(make: impl FnOnce(&mut ffi::MPI_Datatype) -> c_int) -> Result<OwnDatatype, c_int> {
        // SAFETY: a handle is an integer or a pointer, for which zero bytes are valid.
        let mut made = OwnDatatype(unsafe { std::mem::zeroed() });
        let code = make(&mut made.0);
        if code != SUCCESS {
            std::mem::forget(made);
            return Err(code);
        }
        // SAFETY: it was just made.
        let code = unsafe { ffi::MPI_Type_commit(&mut made.0) };
        if code == SUCCESS { Ok(made) } else { Err(code) }
    }

    pub(crate) fn handle(&self) -> ffi::MPI_Datatype {
        self.0
    }
}

impl Drop for OwnDatatype {
    fn drop(&mut self) {
        // SAFETY: made by `new`; MPI keeps it for operations still pending (MPI 4.0, section
        // 5.1.9).
        unsafe { ffi::MPI_Type_free(&mut self.0) };
    }
}

/// `count` elements as one element of a datatype; for counts that are no C `int`.
fn whole(count: i64, element: Datatype) -> Result<OwnDatatype, c_int> {
    let block = BLOCK / element.size() as i64;
    // Both fit, since memory has fewer than 2^61 bytes.
    let (blocks, rest) = ((count / block) as c_int, (count % block) as c_int);
    let kind = datatype(element);
    // SAFETY: predefined datatypes and those just made; arrays of the lengths given.
    unsafe {
        let one = OwnDatatype::new(|new| ffi::MPI_Type_contiguous(block as c_int, kind, new))?;
        let all = OwnDatatype::new(|new| ffi::MPI_Type_contiguous(blocks, one.0, new))?;
        let at_end = (i64::from(blocks) * BLOCK) as ffi::MPI_Aint;
        let (lengths, places, kinds) = ([1, rest], [0, at_end], [all.0, kind]);
        OwnDatatype::new(|new| {
            ffi::MPI_Type_create_struct(2, lengths.as_ptr(), places.as_ptr(), kinds.as_ptr(), new)
        })
    }
}

/// `count` elements that are followed by the next rank's after `stride` bytes.
pub(crate) fn spaced(count: i64, element: Datatype, stride: i64) -> Result<OwnDatatype, c_int> {
    // SAFETY: as in `whole`.
    unsafe {
        let plain = OwnDatatype::new(|new| {
            ffi::MPI_Type_contiguous(count as c_int, datatype(element), new)
        })?;
        OwnDatatype::new(|new| {
            ffi::MPI_Type_create_resized(plain.0, 0, stride as ffi::MPI_Aint, new)
        })
    }
}
