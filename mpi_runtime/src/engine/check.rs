//! Checks before MPI sees an operation, and the translation into what the shim executes.
//!
//! MPI leaves most of these undefined; here each is an error that says what is wrong.

#![forbid(unsafe_code)]

use mpi_shim_abi::{ANY, ANY_CODE, Datatype, Kind, PROC_NULL, Reduction, ShimOp};

use crate::buffer::{Buffer, Class, ElementType};
use crate::error::Failure;
use crate::mpi::communicators::Communicator;
use crate::operation::{Operation, reduction_name};

mod counts;

/// The operation as the shim executes it, or what is wrong with it.
pub fn prepare(op: &Operation<'_>, comm: &Communicator) -> Result<ShimOp, Failure> {
    let mut shim = ShimOp::new(op.kind, comm.handle);
    prepare_in(&mut shim, op, comm).map(|()| shim)
}

/// The same in a place of the caller's: it is not moved, which takes as long as all checks.
#[inline]
pub fn prepare_in(
    shim: &mut ShimOp,
    op: &Operation<'_>,
    comm: &Communicator,
) -> Result<(), Failure> {
    if comm.freed {
        return Err("the communicator has been freed".into());
    }
    check_ranks(op, comm)?;
    let (elements, collective);
    let op = if op.kind.starts_collective() {
        // Its own result is a number; this is what MPI sees.
        elements = [result_elements(op, comm)];
        collective = Operation {
            kind: op.kind.started(),
            recv: Buffer::described(op.send.dtype(), &elements),
            ..*op
        };
        &collective
    } else {
        op
    };
    *shim = ShimOp {
        user_reduction: op.user_reduction,
        root: op.root,
        dest: op.dest,
        source: op.source,
        sources: op.sources,
        destinations: op.destinations,
        send_tag: op.send_tag,
        recv_tag: op.recv_tag,
        send: op.send.data(),
        recv: op.recv.data(),
        status: op.status as *mut _,
        ..ShimOp::new(op.kind, comm.handle)
    };
    if op.kind == Kind::Barrier {
        return Ok(());
    }
    let described = if op.kind.has_operand() {
        &op.send
    } else {
        &op.recv
    };
    shim.datatype = datatype(described)?;
    shim.recv_datatype = if op.kind == Kind::Sendrecv {
        datatype(&op.recv)?
    } else {
        shim.datatype
    };
    if op.kind.sends() || op.kind.receives() {
        add_codes(shim, op, comm);
    }
    if let Some(reduction) = op.reduction {
        check_reduction(reduction, described)?;
        shim.reduction = reduction;
    }
    if op.kind.has_counts() {
        counts::check(shim, op, comm)?;
    } else {
        (shim.count, shim.recv_count) = counts(op, comm)?;
    }
    let is_root = comm.rank == op.root;
    if op.kind.reads(is_root) && op.kind.writes(is_root) {
        check_apart(&op.send, &op.recv)?;
    }
    // MPI writes nothing there. In a broadcast the null pointer also tells the shim that this rank
    // is the root.
    if !op.kind.writes(is_root) {
        shim.recv = std::ptr::null_mut();
    }
    if matches!(op.kind, Kind::Scatter | Kind::Scatterv) && !is_root {
        shim.send = std::ptr::null_mut();
    }
    Ok(())
}

/// Checks that a collective, which `shim` is, can be started: in one call of MPI's, of at most
/// `most` bytes over all blocks, where there are some, and with a reduction of which any thread may
/// call the function.
pub fn check_start(
    shim: &ShimOp,
    op: &Operation<'_>,
    comm: &Communicator,
    most: i64,
) -> Result<(), Failure> {
    let started = op.kind.started().name();
    if shim.reduction == Reduction::User && op.reduction.is_some() {
        return Err(format!(
            "a started collective cannot have a user-defined reduction: MPI would call its Python \
             function from a thread of this library, maybe after Python has ended; use {started}"
        )
        .into());
    }
    let blocks = if op.kind.has_blocks() { comm.size } else { 1 };
    let count = shim.count.max(shim.recv_count);
    let bytes = count.saturating_mul(shim.datatype.size() as i64);
    let bytes = bytes.saturating_mul(i64::from(blocks));
    if bytes <= most && i32::try_from(count).is_ok() {
        return Ok(());
    }
    Err(format!(
        "a started collective is one call of MPI's, of at most {most} bytes over all blocks, \
         where there are some (MPI_CUDA_PART_BYTES), and this one has {bytes}; use {started}, or \
         start several of a part each"
    )
    .into())
}

/// Elements of the result that the collective started by `op` has on this rank.
pub fn result_elements(op: &Operation<'_>, comm: &Communicator) -> i64 {
    let (sent, size) = (op.send.elements(), i64::from(comm.size));
    let is_root = comm.rank == op.root;
    match op.kind {
        Kind::Ibarrier => 0,
        Kind::Iallgather => sent.saturating_mul(size),
        Kind::Igather if is_root => sent.saturating_mul(size),
        Kind::Iscatter if is_root => sent / size,
        Kind::IreduceScatter => sent / size,
        _ => sent,
    }
}

/// An MPI takes the same memory for both as an error that ends the job, or writes what it reads
/// (MPI 4.0, section 2.5.1).
#[inline]
fn check_apart(operand: &Buffer<'_>, result: &Buffer<'_>) -> Result<(), Failure> {
    let (read, written) = (operand.data().addr(), result.data().addr());
    if read == 0
        || written == 0
        || read >= written + result.bytes()
        || written >= read + operand.bytes()
    {
        return Ok(());
    }
    Err(
        "the result lies in the operand's memory, where MPI would write what it reads; declare no \
         input_output_aliases for it"
            .into(),
    )
}

/// The code of an element type in a tag; never 0.
pub fn code(dtype: ElementType) -> i32 {
    const { assert!((ElementType::ALL.len() as i32) < ANY_CODE) };
    dtype as i32 + 1
}

/// The element type with that code.
pub fn dtype_of(code: i32) -> Option<ElementType> {
    let number = usize::try_from(code.checked_sub(1)?).ok()?;
    ElementType::ALL.get(number).copied()
}

/// A part of a message of `sent`, in whatever elements: its tag says the dtype of the whole. What
/// is received is of any dtype, which whoever puts the parts together compares.
pub fn code_part(shim: &mut ShimOp, sent: ElementType) {
    if shim.send_code != 0 {
        shim.send_code = code(sent);
    }
    if shim.recv_code != 0 {
        shim.recv_code = ANY_CODE;
    }
}

/// The element types that a message carries in its tag, and who it is from.
fn add_codes(shim: &mut ShimOp, op: &Operation<'_>, comm: &Communicator) {
    if comm.largest_tag > 0 {
        shim.send_code = code(op.send.dtype());
        // The dtype of what is started is that of its operand, which gives the shape alone.
        shim.recv_code = code(if op.kind.is_start() {
            op.send.dtype()
        } else {
            op.recv.dtype()
        });
    }
    if let Ok(source) = usize::try_from(op.source) {
        let member = comm.members.get(source).copied();
        shim.source_in_world = member.unwrap_or(op.source);
    }
}

fn check_ranks(op: &Operation<'_>, comm: &Communicator) -> Result<(), Failure> {
    let inside = |what: &str, rank: i32| -> Result<(), Failure> {
        if (0..comm.size).contains(&rank) {
            Ok(())
        } else {
            Err(format!(
                "{what} {rank} is not a rank of the communicator, which has 0 to {}",
                comm.size - 1
            )
            .into())
        }
    };
    let (sends, receives) = (op.kind.sends(), op.kind.receives());
    if op.kind.has_root() {
        inside("root", op.root)?;
    }
    if sends && op.dest != PROC_NULL {
        inside("destination", op.dest)?;
    }
    if receives && op.source != PROC_NULL && op.source != ANY {
        inside("source", op.source)?;
    }
    if sends && op.send_tag < 0 || receives && op.recv_tag < 0 && op.recv_tag != ANY {
        return Err("tags must not be negative".into());
    }
    if comm.largest_tag > 0 {
        let all = [(sends, op.send_tag), (receives, op.recv_tag)];
        if let Some((_, tag)) = all.iter().find(|row| row.0 && row.1 > comm.largest_tag) {
            return Err(format!(
                "tag {tag} is above {}, the largest there is on {}; a communicator of your own has \
                 all tags of MPI",
                comm.largest_tag, comm.name
            )
            .into());
        }
    }
    Ok(())
}

fn datatype(buffer: &Buffer<'_>) -> Result<Datatype, Failure> {
    buffer.dtype().datatype().ok_or_else(|| {
        let name = buffer.dtype().name();
        format!("dtype {name} is not supported; cast to a supported one first").into()
    })
}

fn check_reduction(reduction: Reduction, buffer: &Buffer<'_>) -> Result<(), Failure> {
    use Reduction::{Max, Min, Prod, Sum, User};
    let has = match buffer.dtype().class() {
        // It would see integers (MPI has no type for these).
        Class::Opaque => false,
        _ if reduction == User => !matches!(buffer.dtype(), ElementType::F16 | ElementType::BF16),
        Class::Integer | Class::Logical => true,
        Class::Real => matches!(reduction, Sum | Prod | Min | Max),
        Class::Complex => matches!(reduction, Sum | Prod),
    };
    if has {
        return Ok(());
    }
    Err(format!(
        "there is no {} of {}",
        reduction_name(reduction),
        buffer.dtype().name()
    )
    .into())
}

/// Elements sent and received (per rank for gathering and scattering kinds).
fn counts(op: &Operation<'_>, comm: &Communicator) -> Result<(i64, i64), Failure> {
    let size = i64::from(comm.size);
    let is_root = comm.rank == op.root;
    let (send, recv) = (op.send.elements(), op.recv.elements());
    let (fits, counts) = match op.kind {
        Kind::Allreduce | Kind::Reduce | Kind::Scan | Kind::Exscan | Kind::Bcast => {
            (recv == send, (send, send))
        }
        Kind::ReduceScatter => (send == size * recv, (recv, recv)),
        Kind::Allgather => (recv == size * send, (send, send)),
        Kind::Gather if is_root => (recv == size * send, (send, send)),
        Kind::Gather => (recv == send, (send, send)),
        Kind::Scatter if is_root => (send == size * recv, (recv, recv)),
        Kind::Scatter => (send == recv, (recv, recv)),
        Kind::Alltoall => {
            let leading = op.send.shape().first().copied().unwrap_or(-1);
            if leading != size {
                return Err(format!(
                    "the leading dimension is {leading}, and must be the number of ranks, {size}"
                )
                .into());
            }
            (recv == send, (send / size, send / size))
        }
        Kind::Send | Kind::Isend => (true, (send, 0)),
        Kind::Recv => (true, (0, recv)),
        // The engine knows the lengths of these when the messages have come.
        Kind::Irecv | Kind::Wait | Kind::WaitSend => (true, (0, 0)),
        Kind::Sendrecv => (true, (send, recv)),
        Kind::Barrier => (true, (0, 0)),
        Kind::NeighborAllgather | Kind::NeighborAlltoall => return of_neighbors(op),
        // Those with counts are in `counts::check`, and of a start what it starts is asked for.
        _ => (true, (0, 0)),
    };
    if fits {
        Ok(counts)
    } else {
        Err(format!(
            "the result has {recv} elements, which does not fit the operand's {send} on {size} \
             ranks"
        )
        .into())
    }
}

/// Elements for each neighbour.
fn of_neighbors(op: &Operation<'_>) -> Result<(i64, i64), Failure> {
    let (sent, received) = (op.send.shape(), op.recv.shape());
    let (sources, destinations) = (i64::from(op.sources), i64::from(op.destinations));
    let block = match op.kind {
        Kind::NeighborAllgather => sent,
        _ => sent.get(1..).unwrap_or_default(),
    };
    let has =
        |shape: &[i64], blocks: i64| shape.split_first() == Some((&blocks, block)) && blocks >= 0;
    let fits = op.kind == Kind::NeighborAllgather || has(sent, destinations);
    if !fits || !has(received, sources) {
        return Err(format!(
            "the operand is {} and the result {}, which does not fit {sources} neighbours to \
             receive from and {destinations} to send to",
            op.send, op.recv
        )
        .into());
    }
    let product = block
        .iter()
        .try_fold(1i64, |all, &one| all.checked_mul(one));
    let elements = match block.contains(&0) {
        true => Some(0),
        false => product,
    };
    let elements = elements.filter(|elements| elements.checked_mul(16).is_some());
    elements
        .map(|elements| (elements, elements))
        .ok_or_else(|| format!("no memory can hold a block of {}", op.send).into())
}

#[cfg(test)]
mod tests;
