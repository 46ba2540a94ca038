//! One MPI behind the contract of [`mpi_shim_abi`]; built once for each ABI, and linked to no MPI.
//!
//! Uses the raw layer of the `mpi` crate: its safe layer finalizes MPI when dropped and aborts on
//! errors, and both belong to the engine here.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::Ordering;

use mpi::ffi;
use mpi_shim_abi::{ABI_VERSION, CommDeleted, Idle, ShimApi, ShimOp, ShimReceived};

mod checked;
mod code;
mod collective;
mod datatype;
mod execute;
mod extremum;
mod handle;
mod large;
mod matching;
mod messages;
mod neighbors;
mod node;
mod nonblocking;
mod reduction;
mod topology;
mod vector;
mod waiting;

use checked::Checked;
use code::{SUCCESS, attempt};
use handle::{comm_from_bits, comm_to_bits};

static API: ShimApi = ShimApi {
    abi_version: ABI_VERSION,
    library_version,
    cuda_aware,
    state,
    init,
    thread_level,
    finalize,
    abort,
    comm_world,
    comm_self,
    comm_dup,
    comm_free,
    comm_info,
    comm_members,
    comm_create_group,
    node,
    configure,
    largest_tag,
    set_sender: messages::set_sender,
    comm_watch,
    comm_is_kept,
    progress,
    execute: execute_op,
    start_send: nonblocking::start_send,
    start_collective: nonblocking::start_collective,
    take: nonblocking::take,
    start_receive: nonblocking::start_receive,
    test: nonblocking::test,
    set_received: messages::set_received,
    status_size: size_of::<ffi::MPI_Status>(),
    error_string,
};

/// Returns the function table; it lives as long as the library.
#[unsafe(no_mangle)]
pub extern "C" fn mpi_cuda_shim() -> *const ShimApi {
    &API
}

/// Open MPI and MPICH have `MPIX_Query_cuda_support`, which is in no standard; Cray's MPICH and
/// newer ones have `MPIX_GPU_query_support`, with 0 for CUDA (`mpi_proto.h` of MPICH 4).
unsafe extern "C" fn cuda_aware() -> c_int {
    type Query = unsafe extern "C" fn() -> c_int;
    type QueryKind = unsafe extern "C" fn(kind: c_int, supported: *mut c_int) -> c_int;
    // SAFETY: the names are NUL-terminated; the functions of these names have these types.
    unsafe {
        let query = libc::dlsym(libc::RTLD_DEFAULT, c"MPIX_Query_cuda_support".as_ptr());
        if !query.is_null() {
            return c_int::from(std::mem::transmute::<*mut c_void, Query>(query)() != 0);
        }
        let query = libc::dlsym(libc::RTLD_DEFAULT, c"MPIX_GPU_query_support".as_ptr());
        let mut supported = 0;
        if !query.is_null()
            && std::mem::transmute::<*mut c_void, QueryKind>(query)(0, &mut supported) == SUCCESS
        {
            return c_int::from(supported != 0);
        }
    }
    -1
}

unsafe extern "C" fn library_version(text: *mut c_char, capacity: usize) {
    let mut buffer = [0 as c_char; ffi::MPI_MAX_LIBRARY_VERSION_STRING as usize + 1];
    let mut length = 0;
    // SAFETY: the buffer holds MPI_MAX_LIBRARY_VERSION_STRING; callable before MPI_Init.
    unsafe { ffi::MPI_Get_library_version(buffer.as_mut_ptr(), &mut length) };
    // SAFETY: MPI ended the text with a NUL, and the engine passes `capacity` writable bytes.
    unsafe { copy_text(&buffer, text, capacity) };
}

/// # Safety
/// `to` must be valid for `capacity` bytes; `from` must hold a NUL.
unsafe fn copy_text(from: &[c_char], to: *mut c_char, capacity: usize) {
    if capacity == 0 {
        return;
    }
    // SAFETY: `from` holds a NUL (zero-initialised, one longer than MPI writes).
    let bytes = unsafe { CStr::from_ptr(from.as_ptr()) }.to_bytes();
    let length = bytes.len().min(capacity - 1);
    // SAFETY: `length` is below `capacity`, and the buffers do not overlap.
    unsafe {
        ptr::copy_nonoverlapping(bytes.as_ptr().cast(), to, length);
        *to.add(length) = 0;
    }
}

unsafe extern "C" fn state() -> c_int {
    let (mut started, mut ended) = (0, 0);
    // SAFETY: both are callable at any time.
    unsafe {
        ffi::MPI_Initialized(&mut started);
        ffi::MPI_Finalized(&mut ended);
    }
    if ended != 0 {
        2
    } else {
        c_int::from(started != 0)
    }
}

unsafe extern "C" fn init() -> c_int {
    let mut provided = 0;
    // SAFETY: the engine calls this once, when `state` says 0. Null arguments: MPI 4.0, 11.2.1.
    unsafe {
        ffi::MPI_Init_thread(
            ptr::null_mut(),
            ptr::null_mut(),
            ffi::MPI_THREAD_MULTIPLE as c_int,
            &mut provided,
        )
    }
}

unsafe extern "C" fn thread_level() -> c_int {
    let mut level = 0;
    // SAFETY: MPI is initialised.
    unsafe { ffi::MPI_Query_thread(&mut level) };
    let levels = [
        ffi::MPI_THREAD_SINGLE,
        ffi::MPI_THREAD_FUNNELED,
        ffi::MPI_THREAD_SERIALIZED,
        ffi::MPI_THREAD_MULTIPLE,
    ];
    levels
        .iter()
        .position(|&known| known as c_int == level)
        .unwrap_or(0) as c_int
}

unsafe extern "C" fn finalize() -> c_int {
    // SAFETY: the engine calls this once, after its last operation.
    unsafe { ffi::MPI_Finalize() }
}

unsafe extern "C" fn abort(code: c_int) {
    // SAFETY: MPI is initialised and not finalized; callable while other threads wait.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
}

unsafe extern "C" fn comm_world() -> u64 {
    // SAFETY: a constant of the linked MPI.
    comm_to_bits(unsafe { ffi::RSMPI_COMM_WORLD })
}

unsafe extern "C" fn comm_self() -> u64 {
    // SAFETY: a constant of the linked MPI.
    comm_to_bits(unsafe { ffi::RSMPI_COMM_SELF })
}

unsafe extern "C" fn comm_dup(comm: u64, new: *mut u64) -> c_int {
    let mut made = comm_from_bits(comm);
    // SAFETY: the engine passes a live communicator and writable memory for the new one.
    unsafe {
        attempt! {
            ffi::MPI_Comm_dup(comm_from_bits(comm), &mut made);
            ffi::MPI_Comm_set_errhandler(made, ffi::RSMPI_ERRORS_RETURN);
        };
        *new = comm_to_bits(made);
    }
    SUCCESS
}

unsafe extern "C" fn comm_free(comm: u64) -> c_int {
    let mut comm = comm_from_bits(comm);
    // SAFETY: the engine frees what it duplicated, and what a user freed while launches used it.
    unsafe { ffi::MPI_Comm_free(&mut comm) }
}

unsafe extern "C" fn comm_info(
    comm: u64,
    rank: *mut c_int,
    size: *mut c_int,
    inter: *mut c_int,
) -> c_int {
    let comm = comm_from_bits(comm);
    // SAFETY: the engine passes a live communicator and three writable numbers.
    unsafe {
        attempt! {
            ffi::MPI_Comm_rank(comm, rank);
            ffi::MPI_Comm_size(comm, size);
            ffi::MPI_Comm_test_inter(comm, inter);
        }
    }
}

unsafe extern "C" fn comm_members(comm: u64, members: *mut c_int) -> c_int {
    let mut size = 0;
    // SAFETY: the engine passes a live communicator and room for its ranks; the groups are freed.
    unsafe {
        let (mut own, mut world) = (ffi::RSMPI_GROUP_NULL, ffi::RSMPI_GROUP_NULL);
        attempt! {
            ffi::MPI_Comm_group(comm_from_bits(comm), &mut own);
            ffi::MPI_Comm_group(ffi::RSMPI_COMM_WORLD, &mut world);
            ffi::MPI_Group_size(own, &mut size);
        };
        let ranks: Vec<c_int> = (0..size).collect();
        let code = ffi::MPI_Group_translate_ranks(own, size, ranks.as_ptr(), world, members);
        ffi::MPI_Group_free(&mut own);
        ffi::MPI_Group_free(&mut world);
        code
    }
}

unsafe extern "C" fn comm_create_group(
    comm: u64,
    members: *const c_int,
    count: c_int,
    tag: c_int,
    new: *mut u64,
) -> c_int {
    let comm = comm_from_bits(comm);
    let mut made = comm;
    // SAFETY: the engine passes a live communicator and its own list of `count` ranks, which MPI
    // checks; the groups are freed.
    unsafe {
        let (mut all, mut some) = (ffi::RSMPI_GROUP_NULL, ffi::RSMPI_GROUP_NULL);
        attempt! {
            ffi::MPI_Comm_group(comm, &mut all);
            ffi::MPI_Group_incl(all, count, members, &mut some);
        };
        let code = ffi::MPI_Comm_create_group(comm, some, tag, &mut made);
        ffi::MPI_Group_free(&mut some);
        ffi::MPI_Group_free(&mut all);
        attempt! {
            code;
            ffi::MPI_Comm_set_errhandler(made, ffi::RSMPI_ERRORS_RETURN);
        };
        *new = comm_to_bits(made);
    }
    SUCCESS
}

unsafe extern "C" fn node(
    comm: u64,
    rank: *mut c_int,
    size: *mut c_int,
    cores: *mut c_int,
) -> c_int {
    const WORDS: usize = size_of::<libc::cpu_set_t>() / size_of::<u64>();
    let mut node = comm_from_bits(comm);
    let (mut own, mut all) = ([0u64; WORDS], [0u64; WORDS]);
    // SAFETY: collective over a communicator of the engine's, at start; the pointers are writable,
    // and the arrays have the size of a cpu_set_t.
    unsafe {
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), own.as_mut_ptr().cast());
        attempt! {
            node::split(comm_from_bits(comm), &mut node);
            ffi::MPI_Comm_rank(node, rank);
            ffi::MPI_Comm_size(node, size);
            ffi::MPI_Allreduce(
                own.as_ptr().cast(),
                all.as_mut_ptr().cast(),
                WORDS as c_int,
                ffi::RSMPI_UINT64_T,
                ffi::RSMPI_BOR,
                node,
            );
            ffi::MPI_Comm_free(&mut node);
        };
        *cores = all.iter().map(|word| word.count_ones()).sum::<u32>() as c_int;
    }
    SUCCESS
}

unsafe extern "C" fn configure(yielding: c_int, part_bytes: i64, idle: Idle) {
    waiting::YIELDING.store(yielding != 0, Ordering::Relaxed);
    // Only the first counts: there is one engine.
    let _ = waiting::IDLE.set(idle);
    large::PART.store(part_bytes, Ordering::Relaxed);
}

unsafe extern "C" fn progress() {
    let mut found = 0;
    // SAFETY: MPI runs. Whatever it finds stays where it is.
    unsafe {
        ffi::MPI_Iprobe(
            ffi::MPI_ANY_SOURCE as c_int,
            ffi::MPI_ANY_TAG as c_int,
            ffi::RSMPI_COMM_WORLD,
            &mut found,
            ffi::RSMPI_STATUS_IGNORE,
        );
    }
}

unsafe extern "C" fn largest_tag() -> c_int {
    let (mut value, mut found) = (ptr::null_mut::<c_int>(), 0);
    // SAFETY: MPI runs; it gives a pointer to a number of its own (MPI 4.0, section 9.1.2).
    unsafe {
        let key = ffi::MPI_TAG_UB as c_int;
        let value_place = (&raw mut value).cast();
        let code = ffi::MPI_Comm_get_attr(ffi::RSMPI_COMM_WORLD, key, value_place, &mut found);
        if code == SUCCESS && found != 0 && !value.is_null() {
            return *value;
        }
    }
    // What every MPI has.
    32767
}

/// What a watched communicator carries as its attribute.
struct Watch {
    number: i64,
    deleted: CommDeleted,
}

/// The name of a communicator that MPI was told to keep. One that has its handle later has not.
fn name_of_kept(number: i64) -> CString {
    CString::new(format!("mpi_cuda: freed {number}")).unwrap_or_default()
}

unsafe extern "C" fn comm_is_kept(comm: u64, number: i64) -> c_int {
    let mut name = [0 as c_char; ffi::MPI_MAX_OBJECT_NAME as usize + 1];
    let mut length = 0;
    // SAFETY: the name has the room that MPI wants; a handle of none is an error that is returned.
    let code =
        unsafe { ffi::MPI_Comm_get_name(comm_from_bits(comm), name.as_mut_ptr(), &mut length) };
    // SAFETY: MPI ends the name with a NUL, and there is one behind it.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    c_int::from(code == SUCCESS && name == name_of_kept(number).as_c_str())
}

unsafe extern "C" fn on_delete(
    comm: ffi::MPI_Comm,
    _key: c_int,
    attribute: *mut c_void,
    _extra: *mut c_void,
) -> c_int {
    // SAFETY: `comm_watch` put a boxed Watch there, and MPI calls this once (MPI 4.0, 7.7.2).
    let watch = unsafe { Box::from_raw(attribute.cast::<Watch>()) };
    if (watch.deleted)(watch.number) == 0 {
        SUCCESS
    } else {
        // MPI does not free a communicator whose attribute cannot be deleted (MPI 4.0, 7.7.2). But
        // MPICH looks at the last of its attributes alone, which may be another one's.
        // SAFETY: the communicator is live in here.
        unsafe { ffi::MPI_Comm_set_name(comm, name_of_kept(watch.number).as_ptr()) };
        ffi::MPI_ERR_OTHER as c_int
    }
}

unsafe extern "C" fn comm_watch(comm: u64, number: i64, deleted: CommDeleted) -> c_int {
    let mut key = 0;
    let watch = Box::into_raw(Box::new(Watch { number, deleted }));
    // A null copy function is MPI_COMM_NULL_COPY_FN in both families: duplicates are not watched.
    // SAFETY: the communicator is live; ownership of `watch` goes to the attribute.
    unsafe {
        attempt! {
            ffi::MPI_Comm_create_keyval(
                handle::null_copy_fn(),
                Some(on_delete),
                &mut key,
                ptr::null_mut(),
            );
            ffi::MPI_Comm_set_attr(comm_from_bits(comm), key, watch.cast());
            ffi::MPI_Comm_free_keyval(&mut key);
            ffi::MPI_Comm_set_errhandler(comm_from_bits(comm), ffi::RSMPI_ERRORS_RETURN);
        }
    }
}

unsafe extern "C" fn execute_op(op: *const ShimOp, received: *mut ShimReceived) -> c_int {
    // SAFETY: the engine passes a checked operation whose buffers outlive the call, and memory for
    // what was received.
    unsafe { execute::execute(Checked::new(&*op), &mut *received) }
}

unsafe extern "C" fn error_string(code: c_int, text: *mut c_char, capacity: usize) {
    let mut buffer = [0 as c_char; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length = 0;
    // SAFETY: the buffer holds MPI_MAX_ERROR_STRING, and the engine passes `capacity` bytes.
    unsafe {
        ffi::MPI_Error_string(code, buffer.as_mut_ptr(), &mut length);
        copy_text(&buffer, text, capacity);
    }
}
