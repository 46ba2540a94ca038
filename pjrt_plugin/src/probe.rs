//! Whether MPI can be given the device's memory: what `python -m mpi_cuda probe` asks for, one way
//! after the other, and what is kept of the answer. An attempt may end the process, so each is
//! written down before it is made.

#![forbid(unsafe_code)]

use mpi_runtime::mpi::shim::MpiError;
use mpi_runtime::transfer::choice::Through;
use parking_lot::Mutex;

use crate::error::Error;
use crate::ffi::memory;
use crate::plugin::{config, probe_results, world};

/// What to try, in this order.
const WAYS: [(Through, &str); 2] = [(Through::Arrays, "arrays"), (Through::Copies, "copies")];

/// The way that is being tried, by its place.
static TRYING: Mutex<Option<usize>> = Mutex::new(None);

/// Turns to the next way; collective. Its place in [`WAYS`], or their number if none is left.
pub fn next() -> Result<usize, Error> {
    let world = world().filter(|_| config().probe).ok_or_else(|| {
        Error::precondition("the probe needs MPI_CUDA_PROBE=1 and a started world")
    })?;
    if world.transfer.is_none() || world.size < 2 {
        return Err(Error::precondition(
            "the probe needs 2 ranks or more whose arrays lie in the memory of a GPU \
             (MPI_CUDA_DEVICE=cuda)",
        ));
    }
    let mut trying = TRYING.lock();
    // An earlier job died in it.
    let unfinished = probe_results(config()).unfinished(&world.library);
    let died = WAYS
        .iter()
        .position(|(_, name)| unfinished.as_deref() == Some(*name));
    let own = trying.or(died).map_or(0, |place| place + 1);
    let place = world.largest(own as u64).map_err(failed)?;
    let place = usize::try_from(place).unwrap_or(WAYS.len());
    *trying = Some(place);
    if let Some((through, name)) = WAYS.get(place) {
        keep(&format!("trying {name}"))?;
        memory::switch(*through);
    } else if died.is_some() {
        keep("failed: each job that tried it died")?;
    }
    Ok(place)
}

/// Keeps what came of the way that is being tried; collective. Whether it works on all ranks.
pub fn report(failure: Option<&str>) -> Result<bool, Error> {
    let (Some(world), Some(place)) = (world(), *TRYING.lock()) else {
        return Err(Error::precondition("nothing is being tried"));
    };
    let Some((_, name)) = WAYS.get(place) else {
        return Ok(false);
    };
    let works = world
        .largest(u64::from(failure.is_some()))
        .map_err(failed)?
        == 0;
    if works {
        keep(name)?;
    } else {
        let why = failure.unwrap_or("another rank saw wrong data or an error");
        keep(&format!("failed: {name}: {}", why.replace('\n', " ")))?;
    }
    Ok(works)
}

fn failed(error: MpiError) -> Error {
    Error::internal(error.0)
}

fn keep(state: &str) -> Result<(), Error> {
    let library = world().map_or("", |world| &world.library);
    let probe_results = probe_results(config());
    probe_results.write(library, state).map_err(|error| {
        Error::precondition(format!(
            "{} cannot be written ({error}): set MPI_CUDA_PROBE_DIR",
            probe_results.folder.display()
        ))
    })
}
