//! Programs that a host callback launches while its own program runs in the background. XLA:CPU
//! would queue them behind that program, which waits for the callback: they run to their end on a
//! spare inner client instead, which has a queue of its own. Buffers are shared, not copied.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::clients::{self, Client};
use crate::error::Error;
use crate::inner::execute_args::{ExecuteArgs, OwnLaunch};
use crate::inner::handles::{
    BufferHandle, Destroy, ExternalReference, Handle, LoadedHandle, Owned,
};
use crate::inner::side_table::SideTable;

/// Callbacks in callbacks in callbacks; beyond this a program is refused.
const DEEPEST: usize = 8;

/// An inner client that the framework does not know of.
struct Spare {
    /// Its place among the spares.
    number: usize,
    client: Client,
    /// Programs with callbacks now running here; what their callbacks launch must go elsewhere.
    busy: AtomicUsize,
}

static SPARES: Mutex<Vec<Arc<Spare>>> = Mutex::new(Vec::new());

/// The copies of the framework's executables, by these: each with the number of its spare client.
static COPIES: SideTable<Vec<(usize, Owned<LoadedHandle>)>> = SideTable::new();

/// Runs a program to its end, with results on the framework's own client.
pub fn execute(args: &mut ExecuteArgs<'_>, with_callbacks: bool) -> Result<(), Error> {
    let (home, _) = clients::of_executable(args.executable)?;
    let spare = choose(&home, with_callbacks)?;
    let _busy = with_callbacks.then(|| Busy(spare.clone()));
    let away = &spare.client;
    let mut in_use = Vec::with_capacity(args.inputs.len());
    let mut views = Vec::with_capacity(args.inputs.len());
    for &buffer in args.inputs {
        buffer.wait_ready()?;
        in_use.extend(ExternalReference::new(buffer));
        views.push(buffer.view_on(away.handle, away.addressable[0], None)?);
    }
    let (executable, num_outputs) = spare.load(args.executable)?;
    let inputs: Vec<_> = views.iter().map(Owned::get).collect();
    let device = args.device.map(|_| away.addressable[0]);
    let launch = OwnLaunch::like(args, executable, &inputs).on(device);
    let mut results: Vec<Option<Owned<BufferHandle>>> = (0..num_outputs).map(|_| None).collect();
    let event = launch.run(&mut results, |own| own.execute())?;
    let ended = event.handle().wait();
    drop(in_use);
    ended?;
    let shared: Result<Vec<_>, Error> = results
        .into_iter()
        .flatten()
        .map(|result| {
            let buffer = result.get();
            buffer.wait_ready()?;
            buffer.view_on(home.handle, home.addressable[0], Some(result))
        })
        .collect();
    args.give_results(shared?.into_iter().map(Owned::release));
    if let Some(event) = event.own() {
        args.give_event(event);
    }
    Ok(())
}

/// The framework has destroyed its client.
pub fn destroy_all() {
    COPIES.clear();
    for spare in std::mem::take(&mut *SPARES.lock()) {
        spare.client.handle.destroy();
    }
}

/// A spare client in which no program with callbacks runs; counts one there if asked.
fn choose(home: &Client, with_callbacks: bool) -> Result<Arc<Spare>, Error> {
    let mut spares = SPARES.lock();
    let idle = spares
        .iter()
        .find(|spare| spare.busy.load(Ordering::Acquire) == 0);
    let spare = match idle {
        Some(spare) => spare.clone(),
        None if spares.len() == DEEPEST => {
            return Err(Error::unimplemented(format!(
                "{DEEPEST} host callbacks, each in a program launched by another, launch a further \
                 JAX program: use numpy in the innermost callback"
            )));
        }
        None => {
            let spare = Arc::new(Spare {
                number: spares.len(),
                client: clients::create_inner(home.rank, home.size, &[])?,
                busy: AtomicUsize::new(0),
            });
            spares.push(spare.clone());
            spare
        }
    };
    if with_callbacks {
        spare.busy.fetch_add(1, Ordering::AcqRel);
    }
    Ok(spare)
}

/// One program with callbacks running on a spare client.
struct Busy(Arc<Spare>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Spare {
    /// The copy of an executable on this client, and the number of its outputs.
    fn load(&self, original: LoadedHandle) -> Result<(LoadedHandle, usize), Error> {
        let executable = original.executable()?;
        let num_outputs = executable.get().num_outputs()?;
        let copy = COPIES.edit(|rows| {
            let copies = rows.entry(original.address()).or_default();
            if let Some((_, copy)) = copies.iter().find(|(number, _)| *number == self.number) {
                return Ok(copy.get());
            }
            let copy = executable.get().copy_to(self.client.handle)?;
            let handle = copy.get();
            copies.push((self.number, copy));
            Ok::<_, Error>(handle)
        })?;
        Ok((copy, num_outputs))
    }
}
