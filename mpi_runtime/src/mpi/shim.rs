//! Loading a shim and calling it: results instead of codes.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;

use libloading::Library;
use mpi_shim_abi::{
    ABI_VERSION, CommDeleted, Datatype, ENTRY_POINT, Entry, GIVEN_UP, Idle, Kind, Reduction,
    ShimApi, ShimOp, ShimReceived, ShimStatus,
};

use crate::elf;
pub use crate::error::MpiError;
use crate::error::{Failure, StartError};
use crate::mpi::family::Family;

/// A loaded shim; never unloaded, since MPI libraries do not survive that.
#[derive(Clone, Copy)]
pub struct Shim {
    api: &'static ShimApi,
    /// The family it was built for.
    pub family: Family,
}

/// A message on its way.
#[derive(Debug)]
pub struct Request(pub(crate) u64);

/// A message that was taken out of the queue, and must be received.
#[derive(Debug, Default)]
pub struct Message {
    /// Where it is from, and how long it is.
    pub envelope: ShimReceived,
    handle: u64,
}

/// Whether MPI was started in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum MpiState {
    NotStarted,
    Running,
    Finalized,
}

/// What MPI says of its support for CUDA (`MPIX_Query_cuda_support`, `MPIX_GPU_query_support`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Aware {
    Yes,
    No,
    /// It has no such function.
    Unsaid,
}

/// File name of the shim of `family`.
pub fn file_name(family: Family) -> String {
    format!("libmpi_cuda_shim_{}.so", family.name())
}

thread_local! {
    /// This thread is in a call of MPI's in which it may call us back.
    static IN_CALL: Cell<bool> = const { Cell::new(false) };
}

thread_local! {
    /// Why this thread waits no longer for a message.
    static GIVEN_UP_SINCE: Cell<String> = const { Cell::new(String::new()) };
}

/// Says why this thread waits no longer for a message, before its [`Idle`] returns other than 0.
pub fn give_up(reason: String) {
    GIVEN_UP_SINCE.set(reason);
}

/// Whether this thread is inside a call of MPI's that sends, receives or moves messages on. MPICH
/// frees communicators from there, and its callback must not wait for the operation that it is in.
pub fn is_in_call() -> bool {
    IN_CALL.get()
}

fn in_call<T>(call: impl FnOnce() -> T) -> T {
    let outer = IN_CALL.replace(true);
    let result = call();
    IN_CALL.set(outer);
    result
}

impl Shim {
    /// Loads the shim of `family` from `folder`. The MPI itself has been opened before
    /// ([`libraries::open`](crate::mpi::libraries::open)): a shim is linked to none.
    ///
    /// # Errors
    /// If there is none, it is another version's, or the MPI lacks what it needs.
    pub fn load(family: Family, folder: &Path) -> Result<Shim, StartError> {
        let error = |reason: Failure| StartError::Shim {
            family: family.name(),
            reason,
        };
        let path = folder.join(file_name(family));
        if !path.is_file() {
            return Err(error(format!("there is no {}", path.display()).into()));
        }
        Self::open(family, &path)
            .map_err(|reason| error(format!("{}: {reason}", path.display()).into()))
    }

    fn open(family: Family, path: &Path) -> Result<Shim, Failure> {
        elf::check(path)?;
        // SAFETY: loading runs the initialisers of the shim, nothing else.
        let library = unsafe { Library::new(path) }.map_err(|error| {
            let reason = Failure::from(error);
            let text = reason.to_string();
            match text.split_once("undefined symbol: ") {
                Some((_, symbol)) if symbol.starts_with("ompi_") && family != Family::OpenMpi => {
                    Failure::from(format!(
                        "this MPI has no {symbol}: the file is the shim of another ABI than {}, \
                         or the MPI is older than MPI 3.1",
                        family.name()
                    ))
                }
                Some((_, symbol)) => Failure::from(format!(
                    "this MPI has no {symbol}: it is older than MPI 3.1, or built without it"
                )),
                None => reason,
            }
        })?;
        // SAFETY: the contract gives the symbol this type.
        let entry =
            unsafe { library.get::<Entry>(ENTRY_POINT.as_bytes()) }.map_err(Failure::from)?;
        // SAFETY: the entry point has no requirements; the table is static in the library, which
        // is leaked below.
        let api: &'static ShimApi = unsafe { &*entry() };
        if api.abi_version != ABI_VERSION {
            return Err(format!(
                "it has version {} of the contract, and {ABI_VERSION} is needed",
                api.abi_version
            )
            .into());
        }
        std::mem::forget(library);
        Ok(Shim { api, family })
    }

    /// First line of `MPI_Get_library_version`.
    pub fn library_version(&self) -> String {
        // SAFETY: callable at any time; `text` passes a buffer with its capacity.
        let all = text(|buffer, capacity| unsafe { (self.api.library_version)(buffer, capacity) });
        let line = all.lines().next().unwrap_or_default();
        line.split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
            .replace("MPICH Version:", "MPICH")
    }

    /// What MPI says of its support for CUDA.
    pub fn cuda_aware(&self) -> Aware {
        // SAFETY: callable once MPI runs, as it does where anybody asks.
        match unsafe { (self.api.cuda_aware)() } {
            0 => Aware::No,
            1 => Aware::Yes,
            _ => Aware::Unsaid,
        }
    }

    /// Whether MPI was started.
    pub fn state(&self) -> MpiState {
        // SAFETY: callable at any time.
        match unsafe { (self.api.state)() } {
            0 => MpiState::NotStarted,
            1 => MpiState::Running,
            _ => MpiState::Finalized,
        }
    }

    /// `MPI_Init_thread`.
    pub fn init(&self) -> Result<(), MpiError> {
        // SAFETY: called once, in state NotStarted.
        self.check(unsafe { (self.api.init)() })
    }

    /// Name of the thread level MPI runs with.
    pub fn thread_level(&self) -> &'static str {
        // SAFETY: MPI is running.
        let level = unsafe { (self.api.thread_level)() };
        ["single", "funneled", "serialized", "multiple"]
            .get(level as usize)
            .unwrap_or(&"unknown")
    }

    /// `MPI_Finalize`.
    pub fn finalize(&self) -> Result<(), MpiError> {
        // SAFETY: called once, by whoever initialised, after the last operation.
        self.check(unsafe { (self.api.finalize)() })
    }

    /// `MPI_Abort`: ends the whole job.
    pub fn abort(&self, code: i32) {
        // SAFETY: MPI is running.
        unsafe { (self.api.abort)(code) }
    }

    /// Handle of `MPI_COMM_WORLD`.
    pub fn comm_world(&self) -> u64 {
        // SAFETY: a constant.
        unsafe { (self.api.comm_world)() }
    }

    /// Handle of `MPI_COMM_SELF`.
    pub fn comm_self(&self) -> u64 {
        // SAFETY: a constant.
        unsafe { (self.api.comm_self)() }
    }

    /// `MPI_Comm_dup`; collective.
    pub fn comm_dup(&self, comm: u64) -> Result<u64, MpiError> {
        let mut new = 0;
        // SAFETY: `comm` is a live communicator.
        self.check(unsafe { (self.api.comm_dup)(comm, &mut new) })?;
        Ok(new)
    }

    /// `MPI_Comm_free`.
    pub fn comm_free(&self, comm: u64) -> Result<(), MpiError> {
        // SAFETY: `comm` was made by `comm_dup`, or is one that MPI was told to keep
        // (`comm_watch`).
        self.check(unsafe { (self.api.comm_free)(comm) })
    }

    /// Rank, size, and whether it is an intercommunicator.
    pub fn comm_info(&self, comm: u64) -> Result<(i32, i32, bool), MpiError> {
        let (mut rank, mut size, mut inter) = (0, 0, 0);
        // SAFETY: `comm` is a live communicator.
        self.check(unsafe { (self.api.comm_info)(comm, &mut rank, &mut size, &mut inter) })?;
        Ok((rank, size, inter != 0))
    }

    /// The ranks in `MPI_COMM_WORLD` of the `size` members of `comm`.
    pub fn comm_members(&self, comm: u64, size: i32) -> Result<Vec<i32>, MpiError> {
        let mut members = vec![0; size as usize];
        // SAFETY: `comm` is a live communicator of that size.
        self.check(unsafe { (self.api.comm_members)(comm, members.as_mut_ptr()) })?;
        Ok(members)
    }

    /// The communicator of some ranks of `comm`, in that order; collective over them.
    pub fn comm_create_group(&self, comm: u64, members: &[i32], tag: i32) -> Result<u64, MpiError> {
        let (mut new, count) = (0, members.len() as c_int);
        // SAFETY: `comm` is a live communicator of the engine's; MPI checks the ranks.
        self.check(unsafe {
            (self.api.comm_create_group)(comm, members.as_ptr(), count, tag, &mut new)
        })?;
        Ok(new)
    }

    /// Rank among those of `comm` on this node, their number, and the number of cores that they
    /// may use together; collective.
    pub fn node(&self, comm: u64) -> Result<(i32, i32, i32), MpiError> {
        let (mut rank, mut size, mut cores) = (0, 0, 0);
        // SAFETY: `comm` is a live communicator of the engine's.
        self.check(unsafe { (self.api.node)(comm, &mut rank, &mut size, &mut cores) })?;
        Ok((rank, size, cores))
    }

    /// Whether to give up the core while waiting, the largest part of a collective in bytes, and
    /// what to do while a message is waited for.
    pub fn configure(&self, yielding: bool, part_bytes: i64, idle: Idle) {
        // SAFETY: stores them.
        unsafe { (self.api.configure)(c_int::from(yielding), part_bytes, idle) }
    }

    /// The largest tag of MPI's; once it runs.
    pub fn largest_tag(&self) -> i32 {
        // SAFETY: MPI runs.
        unsafe { (self.api.largest_tag)() }
    }

    /// Calls `deleted(number)` when `comm` is freed.
    pub fn comm_watch(&self, comm: u64, number: i64, deleted: CommDeleted) -> Result<(), MpiError> {
        // SAFETY: `comm` is a live communicator.
        self.check(unsafe { (self.api.comm_watch)(comm, number, deleted) })
    }

    /// Whether MPI has kept `comm`, which the user has freed, for the launches that use it.
    pub fn comm_is_kept(&self, comm: u64, number: i64) -> bool {
        // SAFETY: the shim asks MPI for a name, which refuses a handle that is none.
        unsafe { (self.api.comm_is_kept)(comm, number) == 1 }
    }

    /// Executes an operation; the only call here that waits on a peer after start.
    ///
    /// # Safety
    /// The buffers of `op` must be valid for its counts and types on its communicator, which must
    /// be live, and its status must be null or an `MPI_Status`.
    #[inline]
    pub unsafe fn execute(&self, op: &ShimOp) -> Result<ShimReceived, MpiError> {
        let mut received = ShimReceived::default();
        // SAFETY: as this function demands.
        match in_call(|| unsafe { (self.api.execute)(op, &mut received) }) {
            GIVEN_UP => Err(MpiError(GIVEN_UP_SINCE.take())),
            code => self.check(code).map(|()| received),
        }
    }

    /// The largest of the ranks' numbers, one by one; collective.
    pub fn largest(&self, comm: u64, own: &[u64], largest: &mut [u64]) -> Result<(), MpiError> {
        assert_eq!(own.len(), largest.len());
        let op = ShimOp {
            datatype: Datatype::U64,
            recv_datatype: Datatype::U64,
            reduction: Reduction::Max,
            count: own.len() as i64,
            recv_count: own.len() as i64,
            send: own.as_ptr().cast(),
            recv: largest.as_mut_ptr().cast(),
            ..ShimOp::new(Kind::Allreduce, comm)
        };
        // SAFETY: a communicator of the engine's, and lists as long as is said.
        unsafe { self.execute(&op) }.map(drop)
    }

    /// The bytes of all ranks, one after the other, of which each has as many; collective.
    pub fn gather(&self, comm: u64, own: &[u8], all: &mut [u8]) -> Result<(), MpiError> {
        let (_, size, _) = self.comm_info(comm)?;
        assert_eq!(own.len() * size as usize, all.len());
        let op = ShimOp {
            count: own.len() as i64,
            recv_count: own.len() as i64,
            send: own.as_ptr().cast(),
            recv: all.as_mut_ptr().cast(),
            ..ShimOp::new(Kind::Allgather, comm)
        };
        // SAFETY: a communicator of the engine's, and bytes of ours for each of its ranks.
        unsafe { self.execute(&op) }.map(drop)
    }

    /// Sends bytes.
    pub fn send(&self, comm: u64, dest: i32, tag: i32, bytes: &[u8]) -> Result<(), MpiError> {
        let op = ShimOp {
            count: bytes.len() as i64,
            dest,
            send_tag: tag,
            send: bytes.as_ptr().cast(),
            ..ShimOp::new(Kind::Send, comm)
        };
        // SAFETY: a communicator of the engine's, and as many bytes as is said.
        unsafe { self.execute(&op) }.map(drop)
    }

    /// Receives bytes; as many as there is room for must come.
    pub fn receive(
        &self,
        comm: u64,
        source: i32,
        tag: i32,
        bytes: &mut [u8],
    ) -> Result<(), MpiError> {
        let op = ShimOp {
            recv_count: bytes.len() as i64,
            source,
            recv_tag: tag,
            recv: bytes.as_mut_ptr().cast(),
            ..ShimOp::new(Kind::Recv, comm)
        };
        // SAFETY: a communicator of the engine's, and as much room as is said.
        let received = unsafe { self.execute(&op) }?;
        match usize::try_from(received.bytes) {
            Ok(came) if came == bytes.len() => Ok(()),
            _ => Err(MpiError(format!(
                "{} bytes came from rank {source} in place of {}",
                received.bytes,
                bytes.len()
            ))),
        }
    }

    /// Starts the send of `op`.
    ///
    /// # Safety
    /// What it sends must stay in place, unchanged, until [`Shim::test`] says that it is complete.
    pub unsafe fn start_send(&self, op: &ShimOp) -> Result<Request, MpiError> {
        let mut request = 0;
        // SAFETY: what is sent stays in place until the request is complete, as this function
        // demands.
        self.check(in_call(|| unsafe {
            (self.api.start_send)(op, &mut request)
        }))?;
        Ok(Request(request))
    }

    /// Starts the collective `op`.
    ///
    /// # Safety
    /// As for [`Shim::execute`]; what it sends must stay in place, unchanged, and where it receives
    /// too, until [`Shim::test`] says that it is complete.
    pub unsafe fn start_collective(&self, op: &ShimOp) -> Result<Request, MpiError> {
        let mut request = 0;
        // SAFETY: its buffers stay in place until the request is complete, as this function
        // demands.
        self.check(in_call(|| unsafe {
            (self.api.start_collective)(op, &mut request)
        }))?;
        Ok(Request(request))
    }

    /// Has MPI move on what is on its way, the program's own calls too.
    pub fn progress(&self) {
        // SAFETY: MPI runs as long as an operation does.
        in_call(|| unsafe { (self.api.progress)() });
    }

    /// Takes the message that `op` would receive out of the queue, if one is there.
    pub fn take(&self, op: &ShimOp) -> Result<Option<Message>, MpiError> {
        let (mut found, mut message) = (0, Message::default());
        // SAFETY: whoever made `op` (`check::prepare`, `Post`) took a live communicator.
        self.check(in_call(|| unsafe {
            (self.api.take)(op, &mut found, &mut message.envelope, &mut message.handle)
        }))?;
        Ok((found != 0).then_some(message))
    }

    /// Starts to receive a message as elements of `datatype`.
    ///
    /// # Safety
    /// `buffer` must be valid for the message's bytes until [`Shim::test`] says that it is
    /// complete.
    pub unsafe fn start_receive(
        &self,
        message: Message,
        datatype: Datatype,
        buffer: *mut c_void,
    ) -> Result<Request, MpiError> {
        let mut request = 0;
        let (start, bytes) = (self.api.start_receive, message.envelope.bytes);
        // SAFETY: a `Message` is made by `take` alone and goes into this call; the buffer has room
        // for it, as this function demands.
        self.check(in_call(|| unsafe {
            start(message.handle, bytes, datatype, buffer, &mut request)
        }))?;
        Ok(Request(request))
    }

    /// The bytes of a message, which is there.
    pub fn receive_bytes(&self, message: Message) -> Result<Vec<u8>, MpiError> {
        let mut bytes = vec![0u8; usize::try_from(message.envelope.bytes).unwrap_or(0)];
        // SAFETY: the bytes stay in place until the request is complete, which is waited for.
        let mut request =
            unsafe { self.start_receive(message, Datatype::U8, bytes.as_mut_ptr().cast()) }?;
        while self.test(&mut request)?.is_none() {
            std::thread::yield_now();
        }
        Ok(bytes)
    }

    /// The status of a request, if it is complete; it must not be tested again then.
    pub fn test(&self, request: &mut Request) -> Result<Option<ShimStatus>, MpiError> {
        let (mut done, mut status) = (0, ShimStatus([0; 64]));
        // SAFETY: a live request of the functions above.
        self.check(in_call(|| unsafe {
            (self.api.test)(&mut request.0, &mut done, &mut status)
        }))?;
        Ok((done != 0).then_some(status))
    }

    /// Says in the user's `MPI_Status` at that address, which MPI has filled, how many bytes have
    /// come.
    ///
    /// # Safety
    /// The address must be that of a status.
    pub unsafe fn set_received(&self, address: usize, bytes: usize) -> Result<(), MpiError> {
        // SAFETY: a status is there, as this function demands, and MPI writes no more than its
        // fields.
        self.check(unsafe { (self.api.set_received)(address as *mut c_void, bytes as i64) })
    }

    /// The status of a message that MPI has not received.
    pub fn make_status(&self, received: &ShimReceived) -> Result<ShimStatus, MpiError> {
        let mut status = ShimStatus::default();
        let place = (&raw mut status).cast();
        // SAFETY: an `MPI_Status` fits there, which is plain numbers, and may be all zeros.
        self.check(unsafe { (self.api.set_received)(place, received.bytes) })?;
        Ok(status)
    }

    /// Writes the status of a received message to the user's `MPI_Status` at that address; 0 is
    /// none.
    ///
    /// # Safety
    /// There must be an `MPI_Status`.
    pub unsafe fn write_status(
        &self,
        status: &ShimStatus,
        received: &ShimReceived,
        address: usize,
    ) {
        if address != 0 {
            // SAFETY: a status is there, as this function demands; the shim says how long it is.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    status.0.as_ptr(),
                    address as *mut u8,
                    self.api.status_size.min(status.0.len()),
                );
                (self.api.set_sender)(address as *mut c_void, received.source, received.tag);
            }
        }
    }

    #[inline]
    fn check(&self, code: c_int) -> Result<(), MpiError> {
        match code {
            0 => Ok(()),
            _ => Err(self.error(code)),
        }
    }

    #[cold]
    fn error(&self, code: c_int) -> MpiError {
        // SAFETY: `text` passes a buffer with its capacity.
        MpiError(text(|buffer, capacity| unsafe {
            (self.api.error_string)(code, buffer, capacity);
        }))
    }
}

fn text(fill: impl FnOnce(*mut c_char, usize)) -> String {
    let mut buffer = vec![0 as c_char; 8192];
    fill(buffer.as_mut_ptr(), buffer.len());
    // SAFETY: the shim NUL-terminates within the capacity, and the buffer began as zeros.
    unsafe { CStr::from_ptr(buffer.as_ptr()) }
        .to_string_lossy()
        .trim()
        .to_owned()
}
