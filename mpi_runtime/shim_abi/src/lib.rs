//! The C contract between the engine (`mpi_runtime`) and an MPI shim.
//!
//! A shim is a shared library built against one MPI. It exports [`ENTRY_POINT`], which returns a
//! [`ShimApi`]: plain C functions over plain structs, so that the engine never sees an MPI type.
//! MPI handles travel as the 64 bits mpi4py's `_handleof` shows (a pointer in Open MPI, an
//! integer in MPICH).
//!
//! What a shim promises: no function panics or aborts; every MPI failure comes back as the MPI
//! error code, whose text is [`ShimApi::error_string`]; only [`ShimApi::execute`] may wait on a
//! peer, except for [`ShimApi::comm_dup`], [`ShimApi::node`], [`ShimApi::init`] and
//! [`ShimApi::finalize`], which are collective at start and end, and
//! [`ShimApi::comm_create_group`].

mod kind;

use std::ffi::{c_char, c_int, c_void};

pub use kind::Kind;

/// Name of the exported function, of type [`Entry`].
pub const ENTRY_POINT: &str = "mpi_cuda_shim";
/// Version of this contract; the engine refuses a shim with another.
pub const ABI_VERSION: u32 = 23;
/// Type of the function named [`ENTRY_POINT`].
pub type Entry = unsafe extern "C" fn() -> *const ShimApi;

/// `MPI_ANY_SOURCE` and `MPI_ANY_TAG` as the engine writes them; each MPI has its own values.
pub const ANY: i32 = i32::MIN;
/// `MPI_PROC_NULL` as the engine writes it.
pub const PROC_NULL: i32 = i32::MIN + 1;

/// Bits of a tag that carry the code of a message's element type, where it has one.
pub const CODE_BITS: u32 = 5;
/// [`ShimOp::recv_code`] of a receive that takes a message of any element type, and says which; no
/// code of any type.
pub const ANY_CODE: i32 = (1 << CODE_BITS) - 1;
/// What [`ShimApi::execute`] returns if [`Idle`] has given up; no code of any MPI's.
pub const GIVEN_UP: c_int = c_int::MIN;

/// Called now and then while [`ShimApi::execute`] waits for a message of `op`, which has waited for
/// so many microseconds. It may sleep. Other than 0: nothing is waited for any more.
pub type Idle = extern "C" fn(op: *const ShimOp, microseconds: u64) -> c_int;

/// Element types MPI reduces or moves (MPI 4.0, section 3.2.2); it knows the 16-bit floats only as
/// integers of that size, and the shim reduces them.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Datatype {
    Bool,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    F32,
    F64,
    C64,
    C128,
    F16,
    BF16,
}

impl Datatype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Datatype::Bool | Datatype::I8 | Datatype::U8 => 1,
            Datatype::I16 | Datatype::U16 | Datatype::F16 | Datatype::BF16 => 2,
            Datatype::I32 | Datatype::U32 | Datatype::F32 => 4,
            Datatype::I64 | Datatype::U64 | Datatype::F64 | Datatype::C64 => 8,
            Datatype::C128 => 16,
        }
    }
}

/// Predefined reductions (MPI 4.0, section 6.9.2).
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Reduction {
    Sum,
    Prod,
    Min,
    Max,
    Land,
    Lor,
    Lxor,
    Band,
    Bor,
    Bxor,
    /// One of the user's, by its handle ([`ShimOp::user_reduction`]).
    User,
}

impl Reduction {
    /// Every reduction, in the order of their numbers.
    pub const ALL: &[Reduction] = &[
        Reduction::Sum,
        Reduction::Prod,
        Reduction::Min,
        Reduction::Max,
        Reduction::Land,
        Reduction::Lor,
        Reduction::Lxor,
        Reduction::Band,
        Reduction::Bor,
        Reduction::Bxor,
        Reduction::User,
    ];
}

/// One operation, ready for MPI: checked, its communicator a handle, its buffers host memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ShimOp {
    /// What to do.
    pub kind: Kind,
    /// Element type of what is sent (and received, except by `Sendrecv`).
    pub datatype: Datatype,
    /// Element type received by `Sendrecv`.
    pub recv_datatype: Datatype,
    /// Reduction, of the reducing kinds.
    pub reduction: Reduction,
    /// Handle of the user's `MPI_Op`, for [`Reduction::User`].
    pub user_reduction: u64,
    /// Communicator handle.
    pub comm: u64,
    /// Elements sent; for gathering and scattering kinds, per rank. May be more than MPI takes in a
    /// call.
    pub count: i64,
    /// Elements received; for gathering and scattering kinds, per rank.
    pub recv_count: i64,
    /// Of the kinds with counts, else null: the rows of each rank's block, as many numbers as the
    /// communicator has ranks. Blocks follow each other. Of `Alltoallv` those that this rank sends,
    /// of the others those of all ranks. `count` and `recv_count` are of all that this rank sends
    /// and receives.
    pub counts: *const i64,
    /// Of `Alltoallv`, else null: the rows that this rank receives from each.
    pub recv_counts: *const i64,
    /// Elements of a row.
    pub row: i64,
    /// Of `Alltoallv`: 1 if it must go in parts, the same on all ranks.
    pub in_parts: c_int,
    /// Of the kinds of neighbourhoods: how many ranks this one receives from, for which there is
    /// room. The communicator's topology must have as many.
    pub sources: c_int,
    /// The same of those that it sends to.
    pub destinations: c_int,
    /// Root, of the kinds that have one.
    pub root: i32,
    /// Destination of a message, or `PROC_NULL`.
    pub dest: i32,
    /// Source, `ANY` or `PROC_NULL`.
    pub source: i32,
    /// Tag of what is sent.
    pub send_tag: i32,
    /// Tag of what is received, or `ANY`.
    pub recv_tag: i32,
    /// The source's rank in `MPI_COMM_WORLD`; -1 if it is not known.
    pub source_in_world: i32,
    /// Codes of the element types sent and received, which travel in the lowest bits of the tag;
    /// 0 if tags are as they are.
    pub send_code: i32,
    /// See `send_code`.
    pub recv_code: i32,
    /// What is sent.
    pub send: *const c_void,
    /// Where to receive; may be null where this rank receives nothing.
    pub recv: *mut c_void,
    /// The user's `MPI_Status`, or null.
    pub status: *mut c_void,
}

impl ShimOp {
    /// An operation on nothing: no elements, no peer in particular, no status.
    pub const fn new(kind: Kind, comm: u64) -> ShimOp {
        ShimOp {
            kind,
            datatype: Datatype::U8,
            recv_datatype: Datatype::U8,
            reduction: Reduction::Sum,
            user_reduction: 0,
            comm,
            count: 0,
            recv_count: 0,
            counts: std::ptr::null(),
            recv_counts: std::ptr::null(),
            row: 0,
            in_parts: 0,
            sources: 0,
            destinations: 0,
            root: 0,
            dest: PROC_NULL,
            source: PROC_NULL,
            send_tag: 0,
            recv_tag: 0,
            source_in_world: -1,
            send_code: 0,
            recv_code: 0,
            send: std::ptr::null(),
            recv: std::ptr::null_mut(),
            status: std::ptr::null_mut(),
        }
    }

    /// Whether a message with that code may be received; 0 is none.
    #[inline]
    pub const fn accepts_code(&self, code: i32) -> bool {
        code == 0 || self.recv_code == ANY_CODE || code == self.recv_code
    }
}

/// What a receive saw.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ShimReceived {
    /// Rank that sent; −1 if nothing was received.
    pub source: i32,
    /// Tag it was sent with.
    pub tag: i32,
    /// Code of the element type that was sent; 0 if it is not known.
    pub code: i32,
    /// Bytes that arrived. If they are more than the buffer has, nothing was written to it.
    pub bytes: i64,
}

/// Room for an `MPI_Status` of any family, in its first bytes.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct ShimStatus(pub [u8; 64]);

impl Default for ShimStatus {
    fn default() -> ShimStatus {
        ShimStatus([0; 64])
    }
}

/// Called when MPI deletes the communicator registered under `number`. Other than 0: it must be
/// kept, and [`ShimApi::comm_free`] will be called for it if [`ShimApi::comm_is_kept`]; only for an
/// MPI that deletes it when an operation ends instead of when the user frees it (MPICH).
pub type CommDeleted = extern "C" fn(number: i64) -> c_int;

/// The function table of a shim.
#[repr(C)]
pub struct ShimApi {
    /// [`ABI_VERSION`] of the shim.
    pub abi_version: u32,
    /// `MPI_Get_library_version`, NUL-terminated.
    pub library_version: unsafe extern "C" fn(text: *mut c_char, capacity: usize),
    /// Whether MPI says that it supports CUDA: 1 yes, 0 no, -1 if it has no function for it. Once
    /// MPI runs.
    pub cuda_aware: unsafe extern "C" fn() -> c_int,
    /// 0: not initialised, 1: initialised, 2: finalized.
    pub state: unsafe extern "C" fn() -> c_int,
    /// `MPI_Init_thread` with `MPI_THREAD_MULTIPLE`.
    pub init: unsafe extern "C" fn() -> c_int,
    /// Thread level: 0 single, 1 funneled, 2 serialized, 3 multiple.
    pub thread_level: unsafe extern "C" fn() -> c_int,
    /// `MPI_Finalize`.
    pub finalize: unsafe extern "C" fn() -> c_int,
    /// `MPI_Abort` on the world communicator.
    pub abort: unsafe extern "C" fn(code: c_int),
    /// The handle of `MPI_COMM_WORLD`.
    pub comm_world: unsafe extern "C" fn() -> u64,
    /// The handle of `MPI_COMM_SELF`.
    pub comm_self: unsafe extern "C" fn() -> u64,
    /// `MPI_Comm_dup`, with errors returned.
    pub comm_dup: unsafe extern "C" fn(comm: u64, new: *mut u64) -> c_int,
    /// `MPI_Comm_free`.
    pub comm_free: unsafe extern "C" fn(comm: u64) -> c_int,
    /// Rank and size; `inter` is 1 for an intercommunicator.
    pub comm_info: unsafe extern "C" fn(
        comm: u64,
        rank: *mut c_int,
        size: *mut c_int,
        inter: *mut c_int,
    ) -> c_int,
    /// Writes the ranks that the members of `comm` have in `MPI_COMM_WORLD` (`MPI_UNDEFINED` for a
    /// process outside it); `members` has as many elements as `comm` has ranks.
    pub comm_members: unsafe extern "C" fn(comm: u64, members: *mut c_int) -> c_int,
    /// `MPI_Comm_create_group`, with errors returned: the communicator of these ranks of `comm`, in
    /// that order. Collective over them alone; of those made at the same time each needs a `tag` of
    /// its own.
    pub comm_create_group: unsafe extern "C" fn(
        comm: u64,
        members: *const c_int,
        count: c_int,
        tag: c_int,
        new: *mut u64,
    ) -> c_int,
    /// Rank among those of this node, their number, and the number of cores that they may use
    /// together.
    pub node: unsafe extern "C" fn(
        comm: u64,
        rank: *mut c_int,
        size: *mut c_int,
        cores: *mut c_int,
    ) -> c_int,
    /// `yielding` is 1: give up the core while waiting, since there are more ranks than cores; 0:
    /// spin. Collectives of more than `part_bytes` go in parts. Both are the same on all ranks.
    /// `idle` is called while a message is waited for.
    pub configure: unsafe extern "C" fn(yielding: c_int, part_bytes: i64, idle: Idle),
    /// The largest tag of MPI's (`MPI_TAG_UB`), once it runs.
    pub largest_tag: unsafe extern "C" fn() -> c_int,
    /// Writes who has sent a message, and with which tag, to an `MPI_Status`.
    pub set_sender: unsafe extern "C" fn(status: *mut c_void, source: c_int, tag: c_int),
    /// Calls `deleted(number)` when the communicator is freed.
    pub comm_watch: unsafe extern "C" fn(comm: u64, number: i64, deleted: CommDeleted) -> c_int,
    /// Whether MPI has kept the communicator of that number, as [`CommDeleted`] said it must: 1 or
    /// 0. Else the handle may be another one's by now.
    pub comm_is_kept: unsafe extern "C" fn(comm: u64, number: i64) -> c_int,
    /// Has MPI move on what is on its way, what the program has started too: `MPI_Iprobe`, which
    /// takes no message (MPI 4.0, section 3.7.4, "progress").
    pub progress: unsafe extern "C" fn(),
    /// Executes an operation and waits until its buffers may be used again.
    pub execute: unsafe extern "C" fn(op: *const ShimOp, received: *mut ShimReceived) -> c_int,
    /// `MPI_Isend` of what `op` sends, which must stay as it is until the request is complete.
    pub start_send: unsafe extern "C" fn(op: *const ShimOp, request: *mut u64) -> c_int,
    /// Starts the collective `op`, whose counts MPI takes in one call: `MPI_Iallreduce` and so on
    /// (MPI 4.0, section 6.12). Its buffers must stay in place, and what it sends as it is, until
    /// the request is complete.
    pub start_collective: unsafe extern "C" fn(op: *const ShimOp, request: *mut u64) -> c_int,
    /// `MPI_Improbe`: whether a message is there that `op` would receive, of whatever element type.
    /// If so it is taken out of the queue, and must be received by `start_receive`.
    pub take: unsafe extern "C" fn(
        op: *const ShimOp,
        found: *mut c_int,
        envelope: *mut ShimReceived,
        message: *mut u64,
    ) -> c_int,
    /// `MPI_Imrecv` of a message of `bytes` bytes into `buffer`, as elements of `datatype`.
    pub start_receive: unsafe extern "C" fn(
        message: u64,
        bytes: i64,
        datatype: Datatype,
        buffer: *mut c_void,
        request: *mut u64,
    ) -> c_int,
    /// `MPI_Test`; fills `status` when the request is complete.
    pub test:
        unsafe extern "C" fn(request: *mut u64, done: *mut c_int, status: *mut ShimStatus) -> c_int,
    /// `MPI_Status_set_elements_x` of an `MPI_Status`, which MPI has filled or which is all zeros:
    /// so many bytes have come.
    pub set_received: unsafe extern "C" fn(status: *mut c_void, bytes: i64) -> c_int,
    /// Bytes of an `MPI_Status`.
    pub status_size: usize,
    /// `MPI_Error_string`, NUL-terminated.
    pub error_string: unsafe extern "C" fn(code: c_int, text: *mut c_char, capacity: usize),
}
