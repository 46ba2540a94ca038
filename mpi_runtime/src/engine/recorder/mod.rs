//! The flight recorder: the last operations of this rank, always kept, in memory of the process.
//! With `MPI_CUDA_RECORD_DIR` they are in a file too ([`file`]), which tells, after a job has
//! failed, what each rank was doing; `python -m mpi_cuda report` reads the files.
//!
//! An operation is entered when it begins, so that the last entries without an end are what waits.
//! Nothing here waits for anybody: many threads enter at once, and a signal handler may write the
//! record at any moment.

mod about;
pub mod clock;
mod entry;
pub mod file;
mod layout;
mod profile;
pub mod profiled;
mod ring;
mod signals;
mod system;
mod texts;

pub use about::About;
pub use ring::{Program, RECORDER, Recorder, Recording};
