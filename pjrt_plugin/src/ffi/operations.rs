//! Handlers of our targets: a call frame becomes an [`Operation`], and the engine executes it.
//!
//! Targets, operands, results and attributes are documented in `include/mpi_cuda.h`.

use mpi_runtime::operation::{KINDS, REDUCTIONS};
use mpi_runtime::{ANY, Buffer, Kind, Operation, PROC_NULL, Ticket};
use pjrt_sys::*;

use super::Handler;
use super::frame::{Frame, handle};
use crate::execute::ticket_of;
use crate::plugin::world;

/// `ANY_SOURCE` and `ANY_TAG` as attributes.
const ATTRIBUTE_ANY: i64 = -1;
/// `PROC_NULL` as an attribute.
const ATTRIBUTE_PROC_NULL: i64 = -2;

macro_rules! handlers {
    ($($kind:ident),+) => {
        /// Every operation by the name of its target, without the prefix.
        pub const HANDLERS: &[(&str, Handler)] =
            &[$((name_of(Kind::$kind), operation::<{ Kind::$kind as usize }>)),+];
    };
}

handlers!(
    Allgather, Allreduce, Alltoall, Barrier, Bcast, Gather, Recv, Reduce, Scan, Scatter, Send,
    Sendrecv
);

const fn name_of(kind: Kind) -> &'static str {
    const NAMES: [&str; 12] = [
        "allgather",
        "allreduce",
        "alltoall",
        "barrier",
        "bcast",
        "gather",
        "recv",
        "reduce",
        "scan",
        "scatter",
        "send",
        "sendrecv",
    ];
    NAMES[kind as usize]
}

unsafe extern "C" fn operation<const KIND: usize>(
    frame: *mut XLA_FFI_CallFrame,
) -> *mut XLA_FFI_Error {
    // SAFETY: called by XLA.
    unsafe { handle(frame, |frame| execute(KINDS[KIND], frame)) }
}

/// The gate's custom call; see [`crate::gate`].
pub unsafe extern "C" fn gate(frame: *mut XLA_FFI_CallFrame) -> *mut XLA_FFI_Error {
    // SAFETY: called by XLA.
    unsafe {
        handle(frame, |frame| {
            crate::gate::wait_open(frame.run_id());
            fill_tokens(frame, 0);
            Ok(())
        })
    }
}

fn execute(kind: Kind, frame: &Frame<'_>) -> Result<(), String> {
    let operands = usize::from(!matches!(kind, Kind::Barrier | Kind::Recv));
    let results = usize::from(!matches!(kind, Kind::Barrier | Kind::Send));
    let op = Operation {
        kind,
        comm: frame
            .integer("comm")
            .unwrap_or(mpi_runtime::communicators::DEFAULT),
        send: data(operands, frame.arg(0), "operand")?,
        recv: data(results, frame.ret(0), "result")?,
        reduction: match kind {
            Kind::Allreduce | Kind::Reduce | Kind::Scan => {
                let number = frame.integer("op").unwrap_or(0);
                let reduction = usize::try_from(number).ok().and_then(|n| REDUCTIONS.get(n));
                Some(
                    reduction
                        .ok_or_else(|| format!("mpi_cuda: op={number} is no reduction"))?
                        .0,
                )
            }
            _ => None,
        },
        dest: rank(frame.integer(destination_name(kind)).unwrap_or(0), false)?,
        source: rank(frame.integer("source").unwrap_or(ATTRIBUTE_ANY), true)?,
        send_tag: small(frame.integer("tag").unwrap_or(0), "tag")?,
        recv_tag: match frame.integer("recvtag").unwrap_or(ATTRIBUTE_ANY) {
            ATTRIBUTE_ANY => ANY,
            tag => small(tag, "recvtag")?,
        },
        status: frame.integer("status").map_or(0, crate::status::address),
    };
    let world =
        world().ok_or("mpi_cuda: an operation was executed before the world was started")?;
    let ticket = ticket_of(frame.run_id()).unwrap_or(Ticket(0));
    world
        .engine
        .execute(ticket, &op)
        .map_err(|error| error.to_string())?;
    fill_tokens(frame, results);
    Ok(())
}

fn data<'a>(wanted: usize, found: Option<Buffer<'a>>, what: &str) -> Result<Buffer<'a>, String> {
    match found {
        _ if wanted == 0 => Ok(Buffer::NONE),
        Some(buffer) => Ok(buffer),
        None => Err(format!("mpi_cuda: the custom call lacks its {what}")),
    }
}

fn destination_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Send | Kind::Sendrecv => "dest",
        _ => "root",
    }
}

fn rank(attribute: i64, may_be_any: bool) -> Result<i32, String> {
    match attribute {
        ATTRIBUTE_ANY if may_be_any => Ok(ANY),
        ATTRIBUTE_PROC_NULL => Ok(PROC_NULL),
        rank => small(rank, "rank"),
    }
}

fn small(value: i64, what: &str) -> Result<i32, String> {
    i32::try_from(value).map_err(|_| format!("mpi_cuda: {what}={value} does not fit 32 bits"))
}

/// Results after the data are tokens. XLA's own have no memory; ours are an `s32[]` with value 0.
fn fill_tokens(frame: &Frame<'_>, first: usize) {
    for ret in frame.raw_rets().iter().skip(first) {
        // SAFETY: XLA passes valid buffers; an s32[] has 4 bytes.
        unsafe {
            let ret = &**ret;
            if ret.dtype == XLA_FFI_DataType_S32 && ret.rank == 0 {
                ret.data.cast::<i32>().write(0);
            }
        }
    }
}
