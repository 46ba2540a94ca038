//! How the framework's own XLA is asked to partition a program (`compile/partitioner.rs`).

use std::ffi::{CString, c_char, c_int, c_void};

use parking_lot::Mutex;

use crate::boundary::quiet;
use crate::compile::partitioner;
use crate::ffi;
use crate::inner::call;

/// Partitions a program, and calls [`mpi_cuda_partitioned`] with `result` before it returns.
pub type Partitioner = extern "C" fn(
    program: *const c_char,
    program_size: usize,
    options: *const c_char,
    options_size: usize,
    result: *mut c_void,
);

static PARTITIONER: Mutex<Option<Partitioner>> = Mutex::new(None);

/// What a partitioner has given.
type Given = Option<Result<Vec<u8>, String>>;

/// Installs the function that has the framework's own XLA partition a program for several devices,
/// which stands in MLIR, and optimize it, with a serialized `CompileOptionsProto` for devices
/// numbered from 0. Null removes it.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_set_partitioner(function: Option<Partitioner>) {
    quiet((), || {
        *PARTITIONER.lock() = function;
        partitioner::set_partition(function.map(|_| partition as partitioner::Partition));
    });
}

/// Gives the serialized `HloModuleProto` of a partitioned program or, if `failed` is not 0, words.
///
/// # Safety
/// `result` must be what the partitioner was called with, which has not returned, and `bytes` have
/// `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mpi_cuda_partitioned(
    result: *mut c_void,
    failed: c_int,
    bytes: *const c_char,
    size: usize,
) {
    quiet((), || {
        // SAFETY: the caller's bytes, which nobody changes meanwhile.
        let bytes = unsafe { call::bytes(bytes, size) };
        let given = match failed {
            0 => Ok(bytes.to_vec()),
            _ => Err(String::from_utf8_lossy(bytes).into_owned()),
        };
        // SAFETY: that of `partition`, which waits, and nobody else has it.
        unsafe { *result.cast::<Given>() = Some(given) };
    });
}

/// Tells `visit` the name of each of our custom calls, and a handler that the XLA which partitions
/// them can be given: it refuses to run.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_each_target(visit: Option<extern "C" fn(*const c_char, *mut c_void)>) {
    let Some(visit) = visit else { return };
    quiet((), || {
        for name in ffi::own_targets() {
            let name = CString::new(name).unwrap_or_default();
            visit(name.as_ptr(), ffi::STAND_IN as *mut c_void);
        }
    });
}

fn partition(program: &[u8], options: &[u8]) -> Result<Vec<u8>, String> {
    let function = (*PARTITIONER.lock()).ok_or("it has been removed")?;
    let mut given: Given = None;
    function(
        program.as_ptr().cast(),
        program.len(),
        options.as_ptr().cast(),
        options.len(),
        (&raw mut given).cast(),
    );
    given.unwrap_or_else(|| Err("it has given nothing".into()))
}
