//! Where the buffers of operations are, and how the engine gets at them.

#![forbid(unsafe_code)]

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mpi_runtime::device::{Device, DeviceError, Stream};
use mpi_runtime::simulated::Simulated;
use mpi_runtime::{Kind, Operation, OperationError, Staging, Ticket, World};

use crate::config::Config;
use crate::error::Error;

/// A device that is none: its memory is the host's, but copies come late (`MPI_CUDA_PRETEND_DEVICE`).
struct Pretended {
    device: Arc<Simulated>,
    staging: Staging,
    /// In place of the stream of a program.
    main: Stream,
}

static PRETENDED: OnceLock<Pretended> = OnceLock::new();
/// What its copies take at most.
const DELAY: Duration = Duration::from_micros(50);

/// Prepares staging, once the ranks agree on it.
pub fn start(config: &Config) -> Result<(), Error> {
    let failed = |error: DeviceError| Error::internal(format!("mpi_cuda: {error}"));
    let device = Arc::new(Simulated::over_host(DELAY));
    let pretended = Pretended {
        staging: Staging::new(device.clone(), config.chunk_bytes).map_err(failed)?,
        main: device.stream().map_err(failed)?,
        device,
    };
    PRETENDED.get_or_init(|| pretended);
    Ok(())
}

/// Executes an operation on buffers of XLA's.
pub fn execute(world: &World, ticket: Ticket, op: &Operation<'_>) -> Result<(), OperationError> {
    let halves = matches!(
        op.kind,
        Kind::Isend | Kind::Irecv | Kind::Wait | Kind::WaitSend
    );
    match PRETENDED.get().filter(|_| !halves) {
        Some(pretended) => {
            let (staging, main) = (&pretended.staging, pretended.main);
            let done = world.engine.execute_staged(ticket, op, staging, main);
            // XLA goes on at once, and knows nothing of the stream.
            pretended.device.synchronize(main);
            done
        }
        None => world.engine.execute(ticket, op),
    }
}
