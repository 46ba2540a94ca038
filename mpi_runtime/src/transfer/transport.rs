//! What the transfer of device memory asks of MPI.

#![forbid(unsafe_code)]

use crate::buffer::ElementType;
use crate::error::Failure;
use crate::mpi::shim::Request;
use crate::operation::Operation;

/// What staging asks of MPI, all of it on memory of the host.
pub(crate) trait Transport {
    /// Executes an operation, and waits for it.
    fn perform(&mut self, op: &Operation<'_>) -> Result<Done, Failure>;

    /// Waits for a message that was started; `beginning` gets that of what has come, whether or not
    /// it fits the result.
    fn wait(&mut self, op: &Operation<'_>, beginning: &mut [u8]) -> Result<Done, Failure>;

    /// Starts the send of `op`. What is sent must stay as it is until [`Transport::is_sent`].
    fn start_send(&mut self, op: &Operation<'_>) -> Result<Request, Failure>;

    /// Whether that has ended; not asked again then.
    fn is_sent(&mut self, request: &mut Request) -> Result<bool, Failure>;

    /// Receives the message that `op` would receive, if one is there.
    fn try_receive(&mut self, op: &Operation<'_>) -> Result<Option<Done>, Failure>;

    /// The rank in the world of a rank of the operation's communicator.
    fn world_rank(&self, rank: i32) -> Result<i32, Failure>;
}

/// What came of an operation on the host.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Done {
    /// Who sent the message, of a receive.
    pub(crate) source: i32,
    /// Its tag.
    pub(crate) tag: i32,
    /// Its bytes.
    pub(crate) bytes: usize,
    /// What it was sent as, if it says so: the dtype of the whole message, of which this may be a
    /// part, or the header.
    pub(crate) dtype: Option<ElementType>,
}

/// Executes one operation, as MPI does.
pub(crate) type Perform<'a> = dyn FnMut(&Operation<'_>) -> Result<Done, Failure> + 'a;
