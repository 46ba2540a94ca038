//! Donation. The inner plugin takes what a launch donates when it gets the launch. One that is
//! deferred it gets later, so the plugin marks the inputs at once: then all ranks see the same,
//! whichever of them runs ahead.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::error::Error;
use crate::inner::execute_args::ExecuteArgs;
use crate::inner::execute_options::ExecuteOptions;
use crate::inner::handles::{BufferHandle, Handle, LoadedHandle};
use crate::inner::side_table::SideTable;
use crate::launch::keep_alive;
use crate::plugin::world;

/// Refuses a launch whose inputs have been deleted or donated, as the inner plugin does.
#[inline]
pub fn refuse_deleted(args: &ExecuteArgs<'_>) -> Result<(), Error> {
    if !keep_alive::any_deleted() {
        return Ok(());
    }
    match args.inputs.iter().position(|&b| keep_alive::is_deleted(b)) {
        None => Ok(()),
        Some(index) => Err(Error::invalid(format!(
            "argument {index} of Execute() is a buffer that has been deleted or donated: an array \
             that was passed to a program which donates it (donate_argnums) cannot be used again; \
             pass that program's result, or a copy"
        ))),
    }
}

/// Refuses any other use of a buffer that has been deleted or donated.
#[inline]
pub fn refuse_use(function: &str, buffer: BufferHandle) -> Result<(), Error> {
    if keep_alive::is_deleted(buffer) {
        return Err(Error::invalid(format!(
            "{function} called on deleted or donated buffer"
        )));
    }
    Ok(())
}

/// The indices of the inputs that a launch donates.
pub fn find(args: &ExecuteArgs<'_>) -> Result<Vec<usize>, Error> {
    let forbidden = args.not_donatable();
    let parameters = parameters(args.executable);
    let donated: Vec<usize> = parameters
        .iter()
        .copied()
        .filter(|&index| index < args.inputs.len() && !forbidden.contains(&(index as i64)))
        .collect();
    for &index in &donated {
        let same = |&other: &usize| other != index && args.inputs[other] == args.inputs[index];
        if let Some(other) = (0..args.inputs.len()).find(same) {
            return Err(Error::invalid(format!(
                "Attempt to donate the same buffer twice in Execute(), or to use it beside: \
                 argument {index} is donated, and argument {other} is the same buffer"
            )));
        }
    }
    Ok(donated)
}

/// Whether the inner plugin will refuse a launch, since it donates an input that it also uses.
pub fn is_refused(args: &ExecuteArgs<'_>) -> bool {
    has_twice(args.inputs) && find(args).is_err()
}

/// Whether a buffer is there twice.
fn has_twice(inputs: &[BufferHandle]) -> bool {
    if inputs.len() <= FEW {
        let mut rest = inputs.iter().enumerate();
        return rest.any(|(index, input)| inputs[..index].contains(input));
    }
    let mut addresses: Vec<usize> = inputs.iter().map(|input| input.address()).collect();
    addresses.sort_unstable();
    addresses.windows(2).any(|two| two[0] == two[1])
}

/// So many are compared with each other faster than they are sorted.
const FEW: usize = 16;

/// Donates those inputs of a launch that is deferred. The caller keeps the inputs until it has
/// ended.
pub fn donate(donated: &[usize], inputs: &[BufferHandle], options: &mut ExecuteOptions) {
    for &index in donated {
        if is_referenced(inputs[index]) {
            // The inner plugin copies such an input, which lives on; also if the reference is gone
            // by then.
            options.forbid_donation(index);
        } else {
            keep_alive::donate(inputs[index]);
        }
    }
}

/// By loaded executable, the parameters that its launches donate.
static PARAMETERS: SideTable<Arc<[usize]>> = SideTable::new();

/// Read at the first launch that is deferred, since few programs have one.
fn parameters(executable: LoadedHandle) -> Arc<[usize]> {
    if let Some(known) = PARAMETERS.get(executable.address()) {
        return known;
    }
    let program = executable
        .executable()
        .and_then(|executable| executable.get().optimized_program());
    let numbers = program.and_then(|program| Ok(hlo_rewrite::donated_parameters(&program)?));
    // A plugin that does not show its program donates when it gets the launch.
    let numbers: Arc<[usize]> = numbers.unwrap_or_default().into();
    PARAMETERS.insert(executable.address(), numbers.clone());
    numbers
}

/// How often the memory of a buffer is referenced from outside, as by a view of numpy's.
static REFERENCES: Mutex<Option<HashMap<usize, usize>>> = Mutex::new(None);
/// How many buffers have references; spares the lock where there are none.
static REFERENCED: AtomicUsize = AtomicUsize::new(0);

fn is_referenced(buffer: BufferHandle) -> bool {
    let references = REFERENCES.lock();
    let rows = references.as_ref();
    rows.is_some_and(|rows| rows.contains_key(&buffer.address()))
}

/// The framework refers to the memory of a buffer once more.
pub fn reference_added(buffer: BufferHandle) {
    if world().is_some_and(|world| world.size > 1) {
        let mut references = REFERENCES.lock();
        let rows = references.get_or_insert_default();
        *rows.entry(buffer.address()).or_default() += 1;
        REFERENCED.store(rows.len(), Ordering::Release);
    }
}

/// It does so once less.
pub fn reference_removed(buffer: BufferHandle) {
    if REFERENCED.load(Ordering::Acquire) == 0 {
        return;
    }
    let mut references = REFERENCES.lock();
    if let Some(rows) = references.as_mut() {
        if let Some(times) = rows.get_mut(&buffer.address()) {
            *times -= 1;
            if *times == 0 {
                rows.remove(&buffer.address());
            }
        }
        REFERENCED.store(rows.len(), Ordering::Release);
    }
}
