//! The async barrier: XLA:CPU runs a cheap program on the calling thread and waits there, and that
//! thread must never wait for a peer. It does so only if nothing is queued on the device. So before
//! a cheap program with operations we queue a tiny one that waits until the launch is queued behind
//! it, which makes XLA run both on its own threads.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};

use mpi_runtime::log;
use parking_lot::{Condvar, Mutex};
use pjrt_sys::PJRT_Buffer_Type_F32;

use crate::clients::{self, Client, Home};
use crate::error::Error;
use crate::inner::execute_args::OwnLaunch;
use crate::inner::execute_options::ExecuteOptions;
use crate::inner::handles::{BufferHandle, ClientHandle, HostArray, LoadedHandle, Owned, Program};
use crate::plugin::world;

/// The matrix product has 2 · 16³ operations, which is above XLA's limit for cheap programs.
const PROGRAM: Program<'_> = Program {
    format: b"mlir",
    code: br#"module @mpi_cuda_async_barrier {
  func.func public @main(%a: tensor<16x16xf32>) -> tensor<16x16xf32> {
    %t = stablehlo.custom_call @mpi_cuda_async_barrier()
        {api_version = 4 : i32, has_side_effect = true} : () -> tensor<i32>
    %b = stablehlo.dot_general %a, %a, contracting_dims = [1] x [0]
        : (tensor<16x16xf32>, tensor<16x16xf32>) -> tensor<16x16xf32>
    return %b : tensor<16x16xf32>
  }
}"#,
};

/// The operand: a matrix of zeros.
const MATRIX: HostArray<'_> = HostArray {
    element_type: PJRT_Buffer_Type_F32,
    dims: &[16, 16],
    data: &[0; 16 * 16 * size_of::<f32>()],
};

/// The barrier's program and its operand on a client.
struct BarrierProgram {
    client: ClientHandle,
    executable: Owned<LoadedHandle>,
    operand: Owned<BufferHandle>,
}

/// One for each client, made with the first program that may need it.
static PROGRAMS: Mutex<Vec<BarrierProgram>> = Mutex::new(Vec::new());

/// The barriers now held, by run id.
static HELD: Mutex<Option<HashSet<u32>>> = Mutex::new(None);
static RELEASED: Condvar = Condvar::new();
static NEXT: AtomicU32 = AtomicU32::new(1);

/// A barrier that is held; dropping releases it.
pub struct Hold(u32);

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(held) = HELD.lock().as_mut() {
            held.remove(&self.0);
        }
        RELEASED.notify_all();
    }
}

/// Waits until the barrier of that run is released; what its custom call does.
pub fn wait_released(run_id: i64) {
    let mut held = HELD.lock();
    while held
        .as_ref()
        .is_some_and(|held| held.contains(&(run_id as u32)))
    {
        RELEASED.wait(&mut held);
    }
}

/// Queues a held barrier on the device of an executable. Call with the order of launches locked.
pub fn hold(executable: LoadedHandle) -> Option<Hold> {
    let queued = clients::of_executable(executable).and_then(|(client, home)| queue(&client, home));
    queued
        .map_err(|error| {
            log::line(&format!(
                "small programs may block the calling thread: {}",
                error.bare()
            ));
        })
        .ok()
}

/// Makes the program for the client of an executable, if that has not happened. It takes 20 ms,
/// which belong to the compilation of a program that may need it, and not to one of its launches.
pub fn prepare(executable: LoadedHandle) {
    if world().is_some_and(|world| world.size > 1) {
        // The launch that needs it tries again if this fails, and says so.
        let _ = clients::of_executable(executable).and_then(|(client, home)| get(&client, home));
    }
}

/// Destroys the program of a client, before the client is destroyed.
pub fn destroy(client: ClientHandle) {
    PROGRAMS.lock().retain(|program| program.client != client);
}

fn queue(client: &Client, home: Home) -> Result<Hold, Error> {
    let (executable, operand) = get(client, home)?;
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    HELD.lock().get_or_insert_with(HashSet::new).insert(id);
    let held = Hold(id);
    let mut options = ExecuteOptions::of_launch(id as i32);
    let inputs = [operand];
    OwnLaunch::new(executable, &inputs, &mut options).run(&mut [None], |args| args.pass_on())?;
    Ok(held)
}

fn get(client: &Client, home: Home) -> Result<(LoadedHandle, BufferHandle), Error> {
    let mut programs = PROGRAMS.lock();
    let made = programs
        .iter()
        .position(|program| program.client == home.client);
    let index = match made {
        Some(index) => index,
        None => {
            programs.push(make(client, home)?);
            programs.len() - 1
        }
    };
    let program = &programs[index];
    Ok((program.executable.get(), program.operand.get()))
}

fn make(client: &Client, home: Home) -> Result<BarrierProgram, Error> {
    let options = hlo_rewrite::Options::for_one(client.devices.inner_id()).write()?;
    let handle = home.client;
    Ok(BarrierProgram {
        client: handle,
        executable: handle.compile(PROGRAM, &options)?,
        operand: handle.copy_from_host(home.device, &MATRIX)?,
    })
}
