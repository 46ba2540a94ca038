//! Reductions as MPI operations; MPI's own, except where its own is wrong.
//!
//! MPICH 4.0 compares unsigned integers as if they were signed: MAX of 1 and 128 in `uint8` is 1.
//! Each such reduction is tried once on this rank alone, and replaced if it fails.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use mpi::ffi;
use mpi_shim_abi::{Datatype, Reduction};

use crate::SUCCESS;
use crate::execute::datatype;

type Function = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut c_int, *mut ffi::MPI_Datatype);

/// The MPI operation that reduces elements of `element`.
pub(crate) fn reduction(reduction: Reduction, element: Datatype) -> ffi::MPI_Op {
    let predefined = predefined(reduction);
    let maximum = match reduction {
        Reduction::Max => true,
        Reduction::Min => false,
        _ => return predefined,
    };
    let kind = datatype(element);
    match element {
        Datatype::U8 => compare::<u8>(predefined, kind, maximum),
        Datatype::U16 => compare::<u16>(predefined, kind, maximum),
        Datatype::U32 => compare::<u32>(predefined, kind, maximum),
        Datatype::U64 => compare::<u64>(predefined, kind, maximum),
        _ => predefined,
    }
}

fn predefined(reduction: Reduction) -> ffi::MPI_Op {
    // SAFETY: constants of the linked MPI.
    unsafe {
        match reduction {
            Reduction::Sum => ffi::RSMPI_SUM,
            Reduction::Prod => ffi::RSMPI_PROD,
            Reduction::Min => ffi::RSMPI_MIN,
            Reduction::Max => ffi::RSMPI_MAX,
            Reduction::Land => ffi::RSMPI_LAND,
            Reduction::Lor => ffi::RSMPI_LOR,
            Reduction::Lxor => ffi::RSMPI_LXOR,
            Reduction::Band => ffi::RSMPI_BAND,
            Reduction::Bor => ffi::RSMPI_BOR,
            Reduction::Bxor => ffi::RSMPI_BXOR,
        }
    }
}

/// A handle of MPI's; any thread may use it.
#[derive(Clone, Copy)]
struct Chosen(ffi::MPI_Op);
// SAFETY: MPI runs with `MPI_THREAD_MULTIPLE`, and an operation is never changed.
unsafe impl Send for Chosen {}
// SAFETY: as above.
unsafe impl Sync for Chosen {}

/// An unsigned integer and, for MIN (0) and MAX (1), the operation that compares it right.
trait Unsigned: Copy + Ord {
    const ONE: Self;
    const LARGEST: Self;
    fn chosen() -> &'static [OnceLock<Chosen>; 2];
}

macro_rules! unsigned {
    ($($kind:ty),+) => {$(
        impl Unsigned for $kind {
            const ONE: Self = 1;
            const LARGEST: Self = Self::MAX;
            fn chosen() -> &'static [OnceLock<Chosen>; 2] {
                static CHOSEN: [OnceLock<Chosen>; 2] = [const { OnceLock::new() }; 2];
                &CHOSEN
            }
        }
    )+};
}

unsigned!(u8, u16, u32, u64);

fn compare<T: Unsigned>(
    predefined: ffi::MPI_Op,
    kind: ffi::MPI_Datatype,
    maximum: bool,
) -> ffi::MPI_Op {
    let chosen = &T::chosen()[usize::from(maximum)];
    if let Some(chosen) = chosen.get() {
        return chosen.0;
    }
    let mut op = predefined;
    if !is_right::<T>(predefined, kind, maximum) {
        let function = if maximum { larger::<T> } else { smaller::<T> };
        // SAFETY: MPI is running; the function lives as long as the process.
        let code = unsafe { ffi::MPI_Op_create(Some(function as Function), 1, &mut op) };
        if code != SUCCESS {
            // No operation at all, which MPI refuses by name (MPI_ERR_OP).
            // SAFETY: a handle is an integer or a pointer, for which zero bytes are valid.
            return unsafe { std::mem::zeroed() };
        }
    }
    chosen.get_or_init(|| Chosen(op)).0
}

/// Whether MPI's own reduction compares without a sign.
fn is_right<T: Unsigned>(op: ffi::MPI_Op, kind: ffi::MPI_Datatype, maximum: bool) -> bool {
    let (mine, mut result) = (T::LARGEST, T::ONE);
    // SAFETY: one element in each buffer; nothing leaves this rank (MPI 4.0, section 6.9.7).
    let code = unsafe {
        ffi::MPI_Reduce_local(
            (&raw const mine).cast(),
            (&raw mut result).cast(),
            1,
            kind,
            op,
        )
    };
    code == SUCCESS && result == if maximum { T::LARGEST } else { T::ONE }
}

unsafe extern "C" fn larger<T: Unsigned>(
    input: *mut c_void,
    output: *mut c_void,
    length: *mut c_int,
    _: *mut ffi::MPI_Datatype,
) {
    // SAFETY: MPI passes two vectors of `length` elements (MPI 4.0, section 6.9.5).
    unsafe { combine(input, output, length, T::max) }
}

unsafe extern "C" fn smaller<T: Unsigned>(
    input: *mut c_void,
    output: *mut c_void,
    length: *mut c_int,
    _: *mut ffi::MPI_Datatype,
) {
    // SAFETY: as above.
    unsafe { combine(input, output, length, T::min) }
}

/// # Safety
/// `input` and `output` must be vectors of `*length` elements.
unsafe fn combine<T: Unsigned>(
    input: *mut c_void,
    output: *mut c_void,
    length: *mut c_int,
    function: fn(T, T) -> T,
) {
    // SAFETY: as the caller promises; MPI's vectors do not overlap and are aligned as its types.
    unsafe {
        let length = usize::try_from(*length).unwrap_or(0);
        for index in 0..length {
            let (left, right) = (input.cast::<T>().add(index), output.cast::<T>().add(index));
            right.write_unaligned(function(left.read_unaligned(), right.read_unaligned()));
        }
    }
}
