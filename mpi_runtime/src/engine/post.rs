//! Messages in which ranks tell each other about operations.

#![forbid(unsafe_code)]

use mpi_shim_abi::{Kind, ShimOp};

use crate::error::MpiError;
use crate::mpi::backoff;
use crate::mpi::shim::Shim;

/// Messages between ranks that wait with backoff.
pub(super) struct Post<'a> {
    pub(super) shim: &'a Shim,
    /// Handle of a communicator of our own.
    pub(super) comm: u64,
}

impl Post<'_> {
    fn operation(&self, kind: Kind, peer: i32, tag: i32, bytes: &[u8]) -> ShimOp {
        ShimOp {
            count: bytes.len() as i64,
            dest: peer,
            source: peer,
            send_tag: tag,
            recv_tag: tag,
            send: bytes.as_ptr().cast(),
            ..ShimOp::new(kind, self.comm)
        }
    }

    /// Sends a few bytes to a rank.
    pub(super) fn send(&self, peer: i32, tag: i32, bytes: &[u8]) -> Result<(), MpiError> {
        // Short enough for every MPI's eager protocol, so it does not wait for the receiver.
        self.shim
            .execute(&self.operation(Kind::Send, peer, tag, bytes))
            .map(|_| ())
    }

    /// Receives what a rank has sent.
    pub(super) fn receive(&self, peer: i32, tag: i32) -> Result<Vec<u8>, MpiError> {
        let wanted = self.operation(Kind::Recv, peer, tag, &[]);
        let message = backoff::until(|| self.shim.take(&wanted).transpose())?;
        self.shim.receive_bytes(message)
    }
}

/// The first of four tags of a channel. Every MPI has tags to 32767 (MPI 4.0, section 9.1.2).
pub(super) fn tags_of(channel: u64) -> i32 {
    const FIRST: i32 = 16;
    const CHANNELS: u64 = 8000;
    FIRST + 4 * (channel % CHANNELS) as i32
}
