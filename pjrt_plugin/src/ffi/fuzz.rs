//! Calls of all targets with anything in them: none touches a byte outside its arrays, changes an
//! operand, or panics.

// Buffers point into themselves, so they must stay where they are.
#![allow(clippy::vec_box, clippy::borrowed_box)]

use std::ffi::{CStr, c_void};
use std::sync::Mutex;

use mpi_runtime::Kind;
use pjrt_sys::*;

use super::collective_contract::CollectiveContract;
use super::contract::{Attribute, Contract, Data};
use super::frame::array;
use super::handler::Handler;
use super::replica_groups::{self, Part};
use super::{collectives, contracts, operations, targets};
use crate::inner::call::new_args;
use crate::plugin::start_for_tests;
use crate::random::{Random, cases};

/// What is around arrays, and in them at first.
const GUARD: usize = 64;
const GUARD_BYTE: u8 = 0xa5;

const DTYPES: [XLA_FFI_DataType; 16] = [
    XLA_FFI_DataType_F32,
    XLA_FFI_DataType_F32,
    XLA_FFI_DataType_F64,
    XLA_FFI_DataType_S8,
    XLA_FFI_DataType_S32,
    XLA_FFI_DataType_U32,
    XLA_FFI_DataType_S64,
    XLA_FFI_DataType_PRED,
    XLA_FFI_DataType_C64,
    XLA_FFI_DataType_C128,
    XLA_FFI_DataType_F16,
    XLA_FFI_DataType_BF16,
    XLA_FFI_DataType_F8E5M2,
    XLA_FFI_DataType_F8E4M3,
    XLA_FFI_DataType_S4,
    XLA_FFI_DataType_TOKEN,
];
const NUMBERS: [i64; 16] = [
    0,
    0,
    0,
    1,
    1,
    2,
    2,
    3,
    -1,
    -2,
    5,
    1 << 31,
    1 << 60,
    i64::MIN,
    i64::MAX,
    11,
];
const NAMES: [&str; 8] = [
    "reduction",
    "comm",
    "outer0",
    "outer1",
    "mpi_cuda_reads_status",
    "mpi_cuda_uniform_1_0123456789abcdef",
    "mpi_cuda_uniform_7",
    "",
];

/// A handler and its contract; collectives have theirs in front of any number of arrays.
struct Target {
    handler: Handler,
    contract: &'static Contract,
    arrays: bool,
    /// The kind, of an operation.
    kind: Option<Kind>,
}

fn all_targets() -> Vec<Target> {
    let of = |handler: Handler, contract, kind| Target {
        handler,
        contract,
        arrays: false,
        kind,
    };
    let ours = operations::HANDLERS.iter();
    let mut all: Vec<_> = ours
        .map(|(kind, handler)| of(*handler, &contracts::OURS[*kind as usize], Some(*kind)))
        .collect();
    all.extend(
        operations::MPI4JAX_HANDLERS
            .iter()
            .map(|(kind, handler)| of(*handler, &contracts::MPI4JAX[*kind as usize], Some(*kind))),
    );
    let rules: [&'static CollectiveContract; 9] = [
        &contracts::ALL_REDUCE,
        &contracts::ALL_REDUCE_START,
        &contracts::ALL_REDUCE_DONE,
        &contracts::ALL_GATHER,
        &contracts::REDUCE_SCATTER,
        &contracts::ALL_TO_ALL,
        &contracts::ALL_TO_ALL_ARRAY,
        &contracts::COLLECTIVE_PERMUTE,
        &contracts::COLLECTIVE_BROADCAST,
    ];
    let named = |name: &str| {
        let all = collectives::HANDLERS.iter().chain(collectives::OTHERS);
        all.clone().find(|row| row.0 == name).expect("a handler").1
    };
    all.extend(rules.iter().map(|rule| Target {
        arrays: true,
        ..of(named(rule.call.target), &rule.call, None)
    }));
    for contract in [&contracts::BEGIN, &contracts::ID] {
        all.push(of(named(contract.target), contract, None));
    }
    all.push(of(
        operations::ASYNC_BARRIER,
        &contracts::ASYNC_BARRIER,
        None,
    ));
    assert_eq!(targets::MPI4JAX.len(), operations::MPI4JAX_HANDLERS.len());
    all
}

/// An array with guard bytes around it.
struct Guarded {
    memory: Vec<u8>,
    dims: Vec<i64>,
    buffer: XLA_FFI_Buffer,
}

impl Guarded {
    fn new(random: &mut Random, dtype: XLA_FFI_DataType, dims: Vec<i64>) -> Box<Guarded> {
        let mut buffer = new_args::<XLA_FFI_Buffer>();
        buffer.dtype = dtype;
        let elements: i64 = dims.iter().product();
        let bytes = elements as usize * array(&buffer).dtype().size();
        let mut memory = vec![GUARD_BYTE; GUARD + bytes + GUARD];
        for byte in &mut memory[GUARD..GUARD + bytes] {
            *byte = random.below(4) as u8;
        }
        let mut made = Box::new(Guarded {
            memory,
            dims,
            buffer,
        });
        made.buffer.rank = made.dims.len() as i64;
        made.buffer.dims = made.dims.as_mut_ptr();
        made.buffer.data = match (bytes, dtype) {
            (_, XLA_FFI_DataType_TOKEN) => std::ptr::null_mut(),
            (0, _) if random.percent(50) => std::ptr::null_mut(),
            // SAFETY: inside of the memory.
            _ => unsafe { made.memory.as_mut_ptr().add(GUARD).cast() },
        };
        made
    }

    fn is_intact(&self) -> bool {
        let end = self.memory.len() - GUARD;
        let guards = self.memory[..GUARD].iter().chain(&self.memory[end..]);
        guards.clone().all(|byte| *byte == GUARD_BYTE)
    }
}

fn shape(random: &mut Random) -> Vec<i64> {
    let rank = random.below(4);
    (0..rank).map(|_| *random.of(&[0, 1, 1, 2, 3, 7])).collect()
}

/// An array or a token, rather what is wanted.
fn buffer(random: &mut Random, wanted: Data, like: Option<&Guarded>) -> Box<Guarded> {
    let dims = match (wanted, like) {
        (Data::Number, _) if random.percent(80) => vec![],
        (Data::Empty, _) if random.percent(80) => vec![0],
        (_, Some(like)) if random.percent(85) => like.dims.clone(),
        _ => shape(random),
    };
    let dtype = match (wanted, like) {
        (Data::Number, _) if random.percent(80) => XLA_FFI_DataType_U32,
        (_, Some(like)) if random.percent(85) => like.buffer.dtype,
        _ => *random.of(&DTYPES),
    };
    Guarded::new(random, dtype, dims)
}

fn token(random: &mut Random) -> Box<Guarded> {
    let dtype = *random.of(&[XLA_FFI_DataType_TOKEN, XLA_FFI_DataType_S32]);
    Guarded::new(random, dtype, vec![])
}

/// The values of attributes, and what XLA's lists point to.
#[derive(Default)]
struct Attributes {
    names: Vec<Box<XLA_FFI_ByteSpan>>,
    name_list: Vec<*mut XLA_FFI_ByteSpan>,
    values: Vec<Box<[u64; 3]>>,
    numbers: Vec<Box<[u64; 3]>>,
    value_list: Vec<*mut c_void>,
    types: Vec<XLA_FFI_AttrType>,
}

impl Attributes {
    fn add(&mut self, random: &mut Random, name: &'static str) {
        let mut span = Box::new(XLA_FFI_ByteSpan {
            ptr: name.as_ptr().cast(),
            len: name.len(),
        });
        self.name_list.push(&mut *span);
        self.names.push(span);
        let is_list = name.ends_with("counts") && random.percent(90);
        let mut number = Box::new([(); 3].map(|()| *random.of(&NUMBERS) as u64));
        let data: *mut u64 = number.as_mut_ptr();
        let length = *random.of(&[1, 1, 1, 0, 2, 3]);
        let dtype = if random.percent(93) {
            XLA_FFI_DataType_S64
        } else {
            // No type is wider than the number.
            *random.of(&DTYPES[..9])
        };
        // The layouts of XLA_FFI_Scalar, XLA_FFI_ByteSpan and XLA_FFI_Array.
        let (kind, value) = match random.below(100) {
            _ if is_list => (XLA_FFI_AttrType_ARRAY, [dtype as u64, length, data as u64]),
            0..95 => (XLA_FFI_AttrType_SCALAR, [dtype as u64, data as u64, 0]),
            95 | 96 => (XLA_FFI_AttrType_STRING, [data as u64, 8, 0]),
            97 => (XLA_FFI_AttrType_ARRAY, [dtype as u64, 1, data as u64]),
            98 => (XLA_FFI_AttrType_DICTIONARY, [0; 3]),
            _ => (77, [0; 3]),
        };
        self.numbers.push(number);
        let mut value = Box::new(value);
        self.value_list.push(value.as_mut_ptr().cast());
        self.values.push(value);
        self.types.push(kind);
    }
}

/// What the last call said.
static SAID: Mutex<String> = Mutex::new(String::new());

unsafe extern "C" fn say(args: *mut XLA_FFI_Error_Create_Args) -> *mut XLA_FFI_Error {
    // SAFETY: a handler passes a text that ends with NUL.
    let text = unsafe { CStr::from_ptr((*args).message) };
    *SAID.lock().unwrap() = text.to_string_lossy().into_owned();
    std::ptr::dangling_mut()
}

/// Calls the target; what it said, if it refused.
fn call(
    target: &Target,
    args: &mut [Box<Guarded>],
    rets: &mut [Box<Guarded>],
    attributes: &mut Attributes,
) -> Option<String> {
    let mut api = new_args::<XLA_FFI_Api>();
    api.XLA_FFI_Error_Create = Some(say);
    let pointers = |all: &mut [Box<Guarded>]| -> Vec<*mut c_void> {
        let of = |one: &mut Box<Guarded>| (&raw mut one.buffer).cast();
        all.iter_mut().map(of).collect()
    };
    let (mut args, mut rets) = (pointers(args), pointers(rets));
    let mut frame = new_args::<XLA_FFI_CallFrame>();
    frame.api = &api;
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    (frame.args.size, frame.args.args) = (args.len() as i64, args.as_mut_ptr());
    (frame.rets.size, frame.rets.rets) = (rets.len() as i64, rets.as_mut_ptr());
    frame.attrs.size = attributes.types.len() as i64;
    frame.attrs.types = attributes.types.as_mut_ptr();
    frame.attrs.names = attributes.name_list.as_mut_ptr();
    frame.attrs.attrs = attributes.value_list.as_mut_ptr();
    // SAFETY: a frame as XLA's, whose arrays have their bytes.
    let error = unsafe { (target.handler)(&mut frame) };
    (!error.is_null()).then(|| SAID.lock().unwrap().clone())
}

fn operands(random: &mut Random, target: &Target) -> (Vec<Box<Guarded>>, Vec<Box<Guarded>>) {
    let (mut args, mut rets) = (Vec::new(), Vec::new());
    let count = match target.arrays {
        true => random.below(4),
        false => usize::from(target.contract.operand != Data::Nothing),
    };
    for _ in 0..count {
        let like = args.first().map(|first: &Box<Guarded>| &**first);
        let made = buffer(random, target.contract.operand, like);
        args.push(made);
    }
    let results = match target.arrays {
        true => count,
        false => usize::from(target.contract.result != Data::Nothing),
    };
    for index in 0..results {
        let made = buffer(
            random,
            target.contract.result,
            args.get(index).map(|one| &**one),
        );
        rets.push(made);
    }
    for list in [&mut args, &mut rets] {
        if random.percent(90) {
            let made = token(random);
            list.push(made);
        }
        if random.percent(3) {
            let made = buffer(random, Data::Array, None);
            list.push(made);
        }
        if random.percent(3) && !list.is_empty() {
            list.remove(random.below(list.len()));
        }
    }
    (args, rets)
}

/// A case; whether the call was executed.
fn random_call(random: &mut Random, targets: &[Target], messages: bool) -> bool {
    let target = random.of(targets);
    if !messages && target.kind.is_some_and(|kind| !kind.is_collective()) {
        return false;
    }
    let (mut args, mut rets) = operands(random, target);
    let mut attributes = Attributes::default();
    let optional = if target.contract.is_public { 60 } else { 97 };
    for Attribute { name, .. } in target.contract.attributes {
        if random.percent(optional) {
            attributes.add(random, name);
        }
    }
    if random.percent(15) {
        let name = *random.of(&NAMES);
        attributes.add(random, name);
    }
    let before: Vec<_> = args.iter().map(|one| one.memory.clone()).collect();
    let said = call(target, &mut args, &mut rets, &mut attributes);
    for (one, before) in args.iter().zip(&before) {
        assert!(
            one.memory == *before,
            "an operand of {}",
            target.contract.target
        );
    }
    let intact = rets.iter().all(|one| one.is_intact());
    assert!(intact, "a result of {}: {said:?}", target.contract.target);
    let text = said.as_deref().unwrap_or_default();
    assert!(
        !text.contains("a bug"),
        "{}: {text}",
        target.contract.target
    );
    said.is_none()
}

#[test]
fn fuzz_calls_touch_nothing_but_their_results() {
    let world = start_for_tests();
    let messages = world.family().is_none();
    // Numbers of tables that attributes get: those of one rank, and of more than there are.
    let member = |size, rank| Part::Member {
        group: 1,
        size,
        rank,
    };
    replica_groups::know(0, member(1, 0));
    replica_groups::know(1, member(1, 0));
    replica_groups::know(2, if messages { member(3, 1) } else { Part::None });
    let (to, from) = (Some(0), Some(0));
    replica_groups::know(3, Part::Pair { to, from });
    replica_groups::know(
        5,
        Part::Pair {
            to: None,
            from: None,
        },
    );
    replica_groups::know(11, Part::Value(7));
    let targets = all_targets();
    let mut executed = 0u64;
    let count = cases(|random| {
        executed += u64::from(random_call(random, &targets, messages));
        world.engine.take_unread_error(None);
    });
    println!(
        "{count} calls of {} targets, {executed} executed",
        targets.len()
    );
    assert!(
        count < 1000 || executed > count / 50,
        "too few are right: {executed} of {count}"
    );
}
