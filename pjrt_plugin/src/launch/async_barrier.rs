//! The async barrier: XLA:CPU runs a cheap program on the calling thread and waits there, and that thread
//! must never wait for a peer. It does so only if nothing is queued on the device. So before a
//! cheap program with operations we queue a tiny one that waits until the launch is queued behind
//! it, which makes XLA run both on its own threads.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::{Condvar, Mutex};
use pjrt_sys::*;

use crate::error::Error;
use crate::inner::call::{call, new_args};
use crate::inner::handles::{destroy_buffer, destroy_event, destroy_loaded};
use crate::pjrt::client::Client;
use crate::plugin::plugin;

/// Target of the barrier's custom call.
pub const TARGET: &str = "mpi_cuda_async_barrier";

/// The matrix product has 2 · 16³ operations, which is above XLA's limit for cheap programs.
const PROGRAM: &str = r#"module @mpi_cuda_async_barrier {
  func.func public @main(%a: tensor<16x16xf32>) -> tensor<16x16xf32> {
    %t = stablehlo.custom_call @mpi_cuda_async_barrier() {api_version = 4 : i32, has_side_effect = true} : () -> tensor<i32>
    %b = stablehlo.dot_general %a, %a, contracting_dims = [1] x [0] : (tensor<16x16xf32>, tensor<16x16xf32>) -> tensor<16x16xf32>
    return %b : tensor<16x16xf32>
  }
}"#;

static MATRIX: [f32; 256] = [0.0; 256];

/// The barriers now held, by run id.
static HELD: Mutex<Option<HashSet<u32>>> = Mutex::new(None);
static RELEASED: Condvar = Condvar::new();
static NEXT: AtomicU32 = AtomicU32::new(1);

/// The barrier's program and its operand; made with the first program that may need it.
#[derive(Default)]
pub struct AsyncBarrier {
    made: Mutex<Option<BarrierProgram>>,
}

#[derive(Clone, Copy)]
struct BarrierProgram {
    executable: *mut PJRT_LoadedExecutable,
    operand: *mut PJRT_Buffer,
}

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

impl AsyncBarrier {
    /// Makes the program, if that has not happened. It takes 20 ms, which belong to the compilation of
    /// a program that may need it, and not to one of its launches.
    pub fn prepare(&self, client: &Client) -> Result<(), Error> {
        self.get(client).map(|_| ())
    }

    fn get(&self, client: &Client) -> Result<BarrierProgram, Error> {
        let mut made = self.made.lock();
        match *made {
            Some(made) => Ok(made),
            None => Ok(*made.insert(make(client)?)),
        }
    }

    /// Queues a held barrier on this rank's device.
    pub fn hold(&self, client: &Client) -> Result<Hold, Error> {
        let made = self.get(client)?;
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        HELD.lock().get_or_insert_with(HashSet::new).insert(id);
        let held = Hold(id);
        let mut options = new_args::<PJRT_ExecuteOptions>();
        options.launch_id = id as i32;
        let arguments = [made.operand];
        let argument_lists = [arguments.as_ptr()];
        let mut outputs: [*mut PJRT_Buffer; 1] = [std::ptr::null_mut()];
        let output_lists = [outputs.as_mut_ptr()];
        let mut args = new_args::<PJRT_LoadedExecutable_Execute_Args>();
        args.executable = made.executable;
        args.options = &mut options;
        args.argument_lists = argument_lists.as_ptr();
        args.num_devices = 1;
        args.num_args = 1;
        args.output_lists = output_lists.as_ptr();
        // SAFETY: live handles and lists of the right lengths.
        unsafe {
            call(
                plugin().inner.api().PJRT_LoadedExecutable_Execute,
                &mut args,
            )
        }?;
        destroy_buffer(outputs[0]);
        Ok(held)
    }

    /// Destroys the program; before its client is destroyed.
    pub fn destroy(&self) {
        let Some(made) = self.made.lock().take() else {
            return;
        };
        destroy_buffer(made.operand);
        destroy_loaded(made.executable);
    }
}

// SAFETY: handles of the inner plugin, which is thread-safe.
unsafe impl Send for BarrierProgram {}

fn make(client: &Client) -> Result<BarrierProgram, Error> {
    let api = plugin().inner.api();
    const FORMAT: &str = "mlir";
    let mut program = new_args::<PJRT_Program>();
    program.code = PROGRAM.as_ptr().cast_mut().cast();
    program.code_size = PROGRAM.len();
    program.format = FORMAT.as_ptr().cast();
    program.format_size = FORMAT.len();
    let options = hlo_rewrite::Options::for_one(i64::from(client.rank)).write()?;
    let mut compile = new_args::<PJRT_Client_Compile_Args>();
    compile.client = client.handle;
    compile.program = &program;
    compile.compile_options = options.as_ptr().cast();
    compile.compile_options_size = options.len();
    let dims = [16i64, 16];
    let mut operand = new_args::<PJRT_Client_BufferFromHostBuffer_Args>();
    operand.client = client.handle;
    operand.data = MATRIX.as_ptr().cast();
    operand.type_ = PJRT_Buffer_Type_F32;
    operand.dims = dims.as_ptr();
    operand.num_dims = dims.len();
    operand.host_buffer_semantics = PJRT_HostBufferSemantics_kImmutableOnlyDuringCall;
    operand.device = client.addressable[0];
    // SAFETY: valid arguments; the matrix is static.
    unsafe {
        call(api.PJRT_Client_Compile, &mut compile)?;
        call(api.PJRT_Client_BufferFromHostBuffer, &mut operand)?;
    }
    destroy_event(operand.done_with_host_buffer);
    Ok(BarrierProgram {
        executable: compile.executable,
        operand: operand.buffer,
    })
}
