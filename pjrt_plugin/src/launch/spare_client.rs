//! Programs that must not wait in XLA's queue for what is there: those that a host callback
//! launches while its own program runs in the background, and those of threads other than the first
//! (`thread_order.rs`). XLA:CPU has one queue for all threads of a client. So they run to their end
//! on a spare inner client, which has a queue and threads of its own. Buffers are shared, not
//! copied.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use pjrt_sys::PJRT_Buffer_Type_PRED;

use crate::clients::{self, Client};
use crate::error::Error;
use crate::inner::execute_args::{ExecuteArgs, OwnLaunch};
use crate::inner::handles::{
    BufferHandle, ClientHandle, ExternalReference, Handle, HostArray, LoadedHandle, Owned,
};
use crate::inner::serialized;
use crate::inner::side_table::SideTable;

/// Spare clients; each has threads of its own. Beyond this a program is refused.
const MOST: usize = 32;

/// An empty array.
const NOTHING: HostArray<'_> = HostArray {
    element_type: PJRT_Buffer_Type_PRED,
    dims: &[0],
    data: &[0],
};

/// An inner client that the framework does not know of.
struct Spare {
    /// Its place among the spares.
    number: usize,
    #[expect(dead_code, reason = "held for its drop")]
    made: Owned<ClientHandle>,
    client: Client,
    /// A program runs here; others must go elsewhere.
    busy: AtomicBool,
}

static SPARES: Mutex<Vec<Arc<Spare>>> = Mutex::new(Vec::new());

/// The copies of the framework's executables, by these: each with the number of its spare client.
static COPIES: SideTable<Vec<(usize, Owned<LoadedHandle>)>> = SideTable::new();

/// Runs a program to its end, with results on the framework's own client.
pub fn execute(args: &mut ExecuteArgs<'_>) -> Result<(), Error> {
    let (client, home) = clients::of_executable(args.executable)?;
    let Busy(spare) = &choose(&client)?;
    let away = &spare.client;
    let mut in_use = Vec::with_capacity(args.inputs.len());
    let mut views = Vec::with_capacity(args.inputs.len());
    for &buffer in args.inputs {
        buffer.wait_ready()?;
        in_use.extend(ExternalReference::new(buffer));
        views.push(buffer.view_on(away.handle, away.device(), None)?);
    }
    let (executable, num_outputs) = spare.load(args.executable)?;
    let inputs: Vec<_> = views.iter().map(Owned::get).collect();
    let device = args.device.map(|_| away.device());
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
            if buffer.is_token() {
                // It has no memory; for the framework an empty array is one.
                return home.client.copy_from_host(home.device, &NOTHING);
            }
            buffer.view_on(home.client, home.device, Some(result))
        })
        .collect();
    args.give_results(&mut shared?)?;
    if let Some(event) = event.own() {
        args.give_event(event);
    }
    Ok(())
}

/// The framework has destroyed its client.
pub fn destroy_all() {
    COPIES.clear();
    drop(std::mem::take(&mut *SPARES.lock()));
}

/// A spare client in which nothing runs.
fn choose(home: &Client) -> Result<Busy, Error> {
    let mut spares = SPARES.lock();
    let is_idle = |spare: &&Arc<Spare>| !spare.busy.swap(true, Ordering::AcqRel);
    if let Some(idle) = spares.iter().find(is_idle) {
        return Ok(Busy(idle.clone()));
    }
    if spares.len() == MOST {
        return Err(Error::unimplemented(format!(
            "{MOST} threads or host callbacks run JAX programs at once beside those of the main \
             thread: launch from fewer threads, and use numpy in the innermost callback"
        )));
    }
    let (made, client) = clients::create_inner(home.rank, home.size, 1, &[])?;
    let spare = Arc::new(Spare {
        number: spares.len(),
        made,
        client,
        busy: AtomicBool::new(true),
    });
    spares.push(spare.clone());
    Ok(Busy(spare))
}

/// One program running on a spare client.
struct Busy(Arc<Spare>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Release);
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
            let copy = serialized::copy(original, self.client.handle)?;
            let handle = copy.get();
            copies.push((self.number, copy));
            Ok::<_, Error>(handle)
        })?;
        Ok((copy, num_outputs))
    }
}
