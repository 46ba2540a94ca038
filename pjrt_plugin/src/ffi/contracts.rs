//! The targets and what they take and give, in tables: ours (`include/mpi_cuda.h`), mpi4jax's (0.9,
//! the bindings in its `mpi_xla_bridge_cpu.cpp`), and those of rewritten programs (`hlo_rewrite`).

#![forbid(unsafe_code)]

use mpi_runtime::mpi::communicators::DEFAULT;

use super::collective_contract::{CollectiveContract, Rule};
use super::contract::Data::{Array, Empty, Like, Nothing, Number};
use super::contract::{Attribute, Contract, Data, Field, List, Meaning, Of};

/// `ANY_SOURCE` and `ANY_TAG` as attributes.
pub const ATTRIBUTE_ANY: i64 = -1;
/// `PROC_NULL` as an attribute.
pub const ATTRIBUTE_PROC_NULL: i64 = -2;

/// Ours, in the order of the kinds of operations.
#[rustfmt::skip]
pub static OURS: [Contract; 35] = public([
    //    target                     operand  result   attributes
    exact("mpi_cuda_allgather",      Array,   Like,    &[COMM, PLACE, TYPE]),
    exact("mpi_cuda_allreduce",      Array,   Like,    &[COMM, OP, PLACE]),
    exact("mpi_cuda_alltoall",       Array,   Like,    &[COMM, PLACE, TYPE]),
    exact("mpi_cuda_barrier",        Nothing, Nothing, &[COMM, PLACE]),
    exact("mpi_cuda_bcast",          Array,   Like,    &[COMM, PLACE, ROOT, TYPE]),
    exact("mpi_cuda_gather",         Array,   Like,    &[COMM, PLACE, ROOT, TYPE]),
    exact("mpi_cuda_recv",           Nothing, Array,   &[COMM, RECVTAG, SOURCE, STATUS, TYPE]),
    exact("mpi_cuda_reduce",         Array,   Like,    &[COMM, OP, PLACE, ROOT]),
    exact("mpi_cuda_scan",           Array,   Like,    &[COMM, OP, PLACE]),
    exact("mpi_cuda_scatter",        Array,   Like,    &[COMM, PLACE, ROOT, TYPE]),
    exact("mpi_cuda_send",           Array,   Nothing, &[COMM, DEST, TAG, TYPE]),
    exact("mpi_cuda_sendrecv",       Array,   Array,   &[COMM, DEST, RECVTAG, SOURCE,
                                                         STATUS, TAG, TYPE]),
    exact("mpi_cuda_exscan",         Array,   Like,    &[COMM, OP, PLACE]),
    exact("mpi_cuda_reduce_scatter", Array,   Like,    &[COMM, OP, PLACE]),
    exact("mpi_cuda_isend",          Array,   Number,  &[COMM, DEST, TAG, TYPE]),
    exact("mpi_cuda_irecv",          Empty,   Number,  &[COMM, RECVTAG, SOURCE, TYPE]),
    exact("mpi_cuda_wait",           Number,  Array,   &[COMM, STATUS, TYPE]),
    exact("mpi_cuda_wait_send",      Number,  Nothing, &[COMM]),
    exact("mpi_cuda_allgatherv",     Array,   Like,    &[COMM, COUNTS, PLACE, TYPE]),
    exact("mpi_cuda_gatherv",        Array,   Like,    &[COMM, COUNTS, PLACE, ROOT, TYPE]),
    exact("mpi_cuda_scatterv",       Array,   Like,    &[COMM, COUNTS, PLACE, ROOT, TYPE]),
    exact("mpi_cuda_alltoallv",      Array,   Like,    &[COMM, PLACE, RECV_COUNTS, SEND_COUNTS,
                                                         TYPE]),
    exact("mpi_cuda_neighbor_allgather", Array, Like,  &[COMM, DESTINATIONS, PLACE, SOURCES, TYPE]),
    exact("mpi_cuda_neighbor_alltoall", Array, Like,   &[COMM, DESTINATIONS, PLACE, SOURCES, TYPE]),
    exact("mpi_cuda_iallgather",     Array,   Number,  &[COMM, PLACE, TYPE]),
    exact("mpi_cuda_iallreduce",     Array,   Number,  &[COMM, OP, PLACE]),
    exact("mpi_cuda_ialltoall",      Array,   Number,  &[COMM, PLACE, TYPE]),
    exact("mpi_cuda_ibarrier",       Nothing, Number,  &[COMM, PLACE]),
    exact("mpi_cuda_ibcast",         Array,   Number,  &[COMM, PLACE, ROOT, TYPE]),
    exact("mpi_cuda_igather",        Array,   Number,  &[COMM, PLACE, ROOT, TYPE]),
    exact("mpi_cuda_ireduce",        Array,   Number,  &[COMM, OP, PLACE, ROOT]),
    exact("mpi_cuda_iscan",          Array,   Number,  &[COMM, OP, PLACE]),
    exact("mpi_cuda_iscatter",       Array,   Number,  &[COMM, PLACE, ROOT, TYPE]),
    exact("mpi_cuda_iexscan",        Array,   Number,  &[COMM, OP, PLACE]),
    exact("mpi_cuda_ireduce_scatter", Array,  Number,  &[COMM, OP, PLACE]),
]);

/// mpi4jax's, in the order of the kinds of operations. It passes each of its attributes, of which
/// arrays say what they count and their type.
#[rustfmt::skip]
pub static MPI4JAX: [Contract; 12] = [
    //    target                operand  result   attributes
    exact("mpi_allgather_ffi",   Array,   Like,    &[COMM, RECV_X, RECVTYPE, SENDCOUNT, SENDTYPE]),
    exact("mpi_allreduce_ffi",   Array,   Like,    &[COMM, DTYPE, NITEMS, OP]),
    exact("mpi_alltoall_ffi",    Array,   Like,    &[COMM, RECV_ROW, RECVTYPE, SEND_ROW, SENDTYPE]),
    exact("mpi_barrier_ffi",     Nothing, Nothing, &[COMM]),
    exact("mpi_bcast_ffi",       Array,   Like,    &[COMM, DTYPE, NITEMS, ROOT]),
    exact("mpi_gather_ffi",      Array,   Like,    &[COMM, RECV_X, RECVTYPE, ROOT, SENDCOUNT,
                                               SENDTYPE]),
    exact("mpi_recv_ffi",        Nothing, Array,   &[COMM, DTYPE, NITEMS_Y, SOURCE, STATUS,
                                               TAG_RECEIVED]),
    exact("mpi_reduce_ffi",      Array,   Like,    &[COMM, DTYPE, NITEMS, OP, ROOT]),
    exact("mpi_scan_ffi",        Array,   Like,    &[COMM, DTYPE, NITEMS, OP]),
    exact("mpi_scatter_ffi",     Array,   Like,    &[COMM, RECVCOUNT, RECVTYPE, ROOT, SEND_Y,
                                               SENDTYPE]),
    exact("mpi_send_ffi",        Array,   Nothing, &[COMM, DEST, DTYPE, NITEMS, TAG]),
    exact("mpi_sendrecv_ffi",    Array,   Array,   &[COMM, DEST, RECVCOUNT, RECVTAG, RECVTYPE,
                                               SENDCOUNT, SENDTAG, SENDTYPE, SOURCE, STATUS]),
];

/// Those of programs for several devices.
pub static BEGIN: Contract = exact("mpi_cuda_collective_begin", Nothing, Nothing, &[PROGRAM]);
pub static ID: Contract = exact("mpi_cuda_collective_id", Nothing, Number, &[TABLE]);
pub static ALL_REDUCE: CollectiveContract = collective(
    "mpi_cuda_collective_all_reduce",
    Rule::Same,
    &[OP, PLACE, TABLE],
);
pub static ALL_REDUCE_START: CollectiveContract = collective(
    "mpi_cuda_collective_all_reduce_start",
    Rule::Started,
    &[OP, PLACE, TABLE],
);
pub static ALL_REDUCE_DONE: CollectiveContract = collective(
    "mpi_cuda_collective_all_reduce_done",
    Rule::Ended,
    &[OP, PLACE, TABLE],
);
pub static ALL_GATHER: CollectiveContract = collective(
    "mpi_cuda_collective_all_gather",
    Rule::Gathered,
    &[PLACE, TABLE],
);
pub static REDUCE_SCATTER: CollectiveContract = collective(
    "mpi_cuda_collective_reduce_scatter",
    Rule::Scattered,
    &[OP, PLACE, TABLE],
);
pub static ALL_TO_ALL: CollectiveContract = collective(
    "mpi_cuda_collective_all_to_all",
    Rule::Blocks,
    &[PLACE, TABLE],
);
pub static ALL_TO_ALL_ARRAY: CollectiveContract = collective(
    "mpi_cuda_collective_all_to_all_array",
    Rule::Divided,
    &[PLACE, TABLE],
);
pub static COLLECTIVE_PERMUTE: CollectiveContract = collective(
    "mpi_cuda_collective_collective_permute",
    Rule::Same,
    &[PLACE, TABLE],
);
pub static COLLECTIVE_BROADCAST: CollectiveContract = collective(
    "mpi_cuda_collective_collective_broadcast",
    Rule::Same,
    &[PLACE, TABLE],
);

/// That of the async barrier (`launch/async_barrier.rs`).
pub static ASYNC_BARRIER: Contract = exact("mpi_cuda_async_barrier", Nothing, Nothing, &[]);

const COMM: Attribute = value("comm", Field::Comm, DEFAULT);
const OP: Attribute = value("op", Field::Op, 0);
const PLACE: Attribute = value("place", Field::Place, 0);
const ROOT: Attribute = value("root", Field::Peer, 0);
const DEST: Attribute = value("dest", Field::Peer, 0);
const SOURCE: Attribute = value("source", Field::Source, ATTRIBUTE_ANY);
const TAG: Attribute = value("tag", Field::SendTag, 0);
const RECVTAG: Attribute = value("recvtag", Field::RecvTag, ATTRIBUTE_ANY);
const TYPE: Attribute = value("type", Field::Type, 0);
const STATUS: Attribute = value("status", Field::Status, 0);
const SOURCES: Attribute = value("sources", Field::Sources, 0);
const DESTINATIONS: Attribute = value("destinations", Field::Destinations, 0);
const COUNTS: Attribute = list("counts", List::Counts);
const SEND_COUNTS: Attribute = list("send_counts", List::Counts);
const RECV_COUNTS: Attribute = list("recv_counts", List::RecvCounts);

const TAG_RECEIVED: Attribute = value("tag", Field::RecvTag, ATTRIBUTE_ANY);
const SENDTAG: Attribute = value("sendtag", Field::SendTag, 0);
const NITEMS: Attribute = count("nitems", Of::Operand);
const NITEMS_Y: Attribute = count("nitems", Of::Result);
const SENDCOUNT: Attribute = count("sendcount", Of::Operand);
const SEND_ROW: Attribute = count("sendcount", Of::OperandRow);
const SEND_Y: Attribute = count("sendcount", Of::Result);
const RECVCOUNT: Attribute = count("recvcount", Of::Result);
const RECV_X: Attribute = count("recvcount", Of::Operand);
const RECV_ROW: Attribute = count("recvcount", Of::OperandRow);
const DTYPE: Attribute = unused("dtype");
const SENDTYPE: Attribute = unused("sendtype");
const RECVTYPE: Attribute = unused("recvtype");

const TABLE: Attribute = value("table", Field::Table, 0);
const PROGRAM: Attribute = value("program", Field::Program, 0);

const fn value(name: &'static str, field: Field, default: i64) -> Attribute {
    let meaning = Meaning::Value(field);
    attribute(name, meaning, default)
}

const fn count(name: &'static str, of: Of) -> Attribute {
    attribute(name, Meaning::Count(of), 0)
}

const fn list(name: &'static str, list: List) -> Attribute {
    attribute(name, Meaning::List(list), 0)
}

const fn unused(name: &'static str) -> Attribute {
    attribute(name, Meaning::Unused, 0)
}

const fn attribute(name: &'static str, meaning: Meaning, default: i64) -> Attribute {
    Attribute {
        name,
        meaning,
        default,
    }
}

/// Contracts of targets that anybody may call.
const fn public<const COUNT: usize>(mut contracts: [Contract; COUNT]) -> [Contract; COUNT] {
    let mut index = 0;
    while index < COUNT {
        let contract = &mut contracts[index];
        contract.is_public = true;
        contract.zeros = zeros(contract.attributes);
        index += 1;
    }
    contracts
}

const fn collective(
    target: &'static str,
    rule: Rule,
    attributes: &'static [Attribute],
) -> CollectiveContract {
    let mut call = exact(target, Nothing, Nothing, attributes);
    call.zeros = places(attributes);
    CollectiveContract { call, rule }
}

const fn exact(
    target: &'static str,
    operand: Data,
    result: Data,
    attributes: &'static [Attribute],
) -> Contract {
    Contract {
        target,
        operand,
        result,
        attributes,
        is_public: false,
        zeros: 0,
    }
}

/// The bits of attributes whose default is 0.
const fn zeros(attributes: &[Attribute]) -> u32 {
    let (mut bits, mut index) = (0, 0);
    while index < attributes.len() {
        if attributes[index].default == 0 {
            bits |= 1 << index;
        }
        index += 1;
    }
    bits
}

/// The bit of the place, which programs leave out that are compared as a whole.
const fn places(attributes: &[Attribute]) -> u32 {
    let (mut bits, mut index) = (0, 0);
    while index < attributes.len() {
        if matches!(attributes[index].meaning, Meaning::Value(Field::Place)) {
            bits |= 1 << index;
        }
        index += 1;
    }
    bits
}

#[cfg(test)]
mod tests {
    use mpi_runtime::Kind;

    use super::*;
    use crate::ffi::targets::{self, PREFIX};

    #[test]
    fn contracts_are_in_the_order_of_the_kinds() {
        for kind in Kind::ALL {
            let contract = &OURS[*kind as usize];
            assert_eq!(contract.target, format!("{PREFIX}{}", kind.name()));
            assert_eq!(contract.operand != Nothing, kind.has_operand());
            assert_eq!(contract.result != Nothing, kind.has_result());
        }
        for kind in targets::MPI4JAX {
            let contract = &MPI4JAX[kind as usize];
            assert_eq!(contract.target, targets::mpi4jax_target(kind));
            assert_eq!(contract.operand, OURS[kind as usize].operand);
            assert_eq!(contract.result, OURS[kind as usize].result);
        }
    }

    #[test]
    fn attributes_are_in_the_order_of_their_names() {
        for contract in OURS
            .iter()
            .chain(&MPI4JAX)
            .chain([&ALL_REDUCE.call, &REDUCE_SCATTER.call])
        {
            let names: Vec<_> = contract.attributes.iter().map(|row| row.name).collect();
            assert!(names.is_sorted(), "{}: {names:?}", contract.target);
        }
    }
}
