//! Operations on device memory through the host: copies down, MPI, copies up.
//!
//! A large operation goes in chunks, each of which is an operation on pinned memory of its own. While
//! MPI moves one, the next are copied down and the ones before are copied up. The chunks are the same
//! on all ranks, since they follow from the operation and [`Staging::chunk`], which ranks agree on.
//!
//! Collectives are cut between the elements of a block ([`Plan`]), messages by their bytes
//! (`message/`). The launching thread waits for MPI and for the copies down, never for the last
//! copies up: the stream of the program does.

mod message;
mod plan;
mod pool;

use std::collections::VecDeque;
use std::sync::Arc;

use mpi_shim_abi::Kind;

use crate::device::{self, Copy, Device, DeviceError, Event, HostMemory, Stream};
use crate::mpi::communicators::Communicator;
use crate::mpi::shim::Request;
use crate::node::shm_ring::ShmRings;
use crate::operation::{Buffer, Operation};
use message::{HEADER_BYTES, RendezvousHeader};
use plan::Plan;
use pool::Pool;

/// Chunks that are on their way down while MPI has one.
const AHEAD: usize = 2;
/// Operations of at most so many bytes are copied in the program's own stream: there is nothing to
/// overlap, and streams that wait for each other take longer than the copies.
const SHORT: usize = 64 << 10;

/// Executes one operation, as MPI does.
pub(crate) type Perform<'a> = dyn FnMut(&Operation<'_>) -> Result<Done, String> + 'a;

/// What staging asks of MPI, all of it on memory of the host.
pub(crate) trait Mpi {
    /// Executes an operation, and waits for it.
    fn perform(&mut self, op: &Operation<'_>) -> Result<Done, String>;

    /// Waits for a message that was started; `beginning` gets that of what has come, whether or not it fits
    /// the result.
    fn wait(&mut self, op: &Operation<'_>, beginning: &mut [u8]) -> Result<Done, String>;

    /// Starts the send of `op`. What is sent must stay as it is until [`Mpi::is_sent`].
    fn start_send(&mut self, op: &Operation<'_>) -> Result<Request, String>;

    /// Whether that has ended; not asked again then.
    fn is_sent(&mut self, request: &mut Request) -> Result<bool, String>;

    /// Receives the message that `op` would receive, if one is there.
    fn try_receive(&mut self, op: &Operation<'_>) -> Result<Option<Done>, String>;

    /// The rank in the world of a rank of the operation's communicator.
    fn world_rank(&self, rank: i32) -> Result<i32, String>;
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
}

/// A device with what staging keeps for it.
pub struct Staging {
    device: Arc<dyn Device>,
    /// Copies to the host and from it, each in an order of their own.
    down: Stream,
    up: Stream,
    pool: Pool,
    chunk: usize,
    /// Of this node's ranks, for long messages among them.
    shm_rings: Option<Arc<ShmRings>>,
}

impl Staging {
    /// Staging for `device` in chunks of `chunk` bytes.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn new(
        device: Arc<dyn Device>,
        chunk: usize,
        shm_rings: Option<Arc<ShmRings>>,
    ) -> Result<Staging, DeviceError> {
        Ok(Staging {
            down: device.stream()?,
            up: device.stream()?,
            pool: Pool::new(device.clone(), chunk),
            device,
            chunk,
            shm_rings,
        })
    }

    /// Bytes of a chunk; the same on all ranks.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// Executes `op`, whose memory is the device's, in the place of `main` where the program is:
    /// what is in `main` now comes before it, and what comes into it later sees the result.
    pub(crate) fn execute(
        &self,
        op: &Operation<'_>,
        comm: &Communicator,
        main: Stream,
        mpi: &mut dyn Mpi,
    ) -> Result<Done, String> {
        let is_short = op.send.bytes() + op.recv.bytes() <= SHORT.min(self.chunk);
        let run = match is_short {
            true => Ok(Run::within(self, main)),
            false => Run::begin(self, main),
        };
        let run = run.map_err(|error| error.to_string())?;
        let done = match op.kind {
            Kind::Barrier => {
                // It says that everything before has happened.
                run.drain().map_err(|error| error.to_string())?;
                mpi.perform(op)
            }
            Kind::Send | Kind::Recv | Kind::Sendrecv => message::execute(&run, op, mpi),
            Kind::Isend | Kind::Irecv | Kind::Wait | Kind::WaitSend => run.whole(op, mpi),
            _ => run.collective(op, comm, mpi).map(|()| Done::default()),
        };
        // Also after a failure: memory that copies use must not be given to others before.
        let ended = run.end().map_err(|error| error.to_string());
        done.and_then(|done| ended.map(|()| done))
    }
}

/// One operation under way.
struct Run<'a> {
    staging: &'a Staging,
    main: Stream,
    /// Where its copies go.
    down: Stream,
    up: Stream,
}

/// A chunk in memory of the host, on its way down.
struct Coming {
    memory: Option<HostMemory>,
    /// Behind its copies; none if there were none.
    copied: Option<Event>,
}

impl<'a> Run<'a> {
    /// What the copies read is written by what is in `main` before, and what they write may be read
    /// by it.
    fn begin(staging: &'a Staging, main: Stream) -> Result<Run<'a>, DeviceError> {
        let device = &staging.device;
        let here = device.record(main)?;
        let both = device
            .wait(staging.down, &here)
            .and_then(|()| device.wait(staging.up, &here));
        device.forget(here);
        let (down, up) = (staging.down, staging.up);
        both.map(|()| Run {
            staging,
            main,
            down,
            up,
        })
    }

    /// Its copies are where the program is.
    fn within(staging: &'a Staging, main: Stream) -> Run<'a> {
        Run {
            staging,
            main,
            down: main,
            up: main,
        }
    }

    /// Later work of the program comes after the copies.
    fn end(self) -> Result<(), DeviceError> {
        let device = &self.staging.device;
        for stream in [self.down, self.up] {
            if stream == self.main {
                continue;
            }
            let behind = device.record(stream)?;
            let waits = device.wait(self.main, &behind);
            device.forget(behind);
            waits?;
        }
        Ok(())
    }

    /// Waits until everything of the program before this operation has ended.
    fn drain(&self) -> Result<(), DeviceError> {
        let here = self.staging.device.record(self.down)?;
        self.pass(here)
    }

    /// Waits for an event.
    fn pass(&self, event: Event) -> Result<(), DeviceError> {
        device::pass(&*self.staging.device, event)
    }

    /// Memory of the host for `bytes`.
    fn memory(&self, bytes: usize) -> Result<Option<HostMemory>, DeviceError> {
        if bytes == 0 {
            return Ok(None);
        }
        self.staging.pool.take(bytes).map(Some)
    }

    /// Starts to copy the rows of a chunk down, one after the other.
    fn come(&self, rows: &[(usize, usize)]) -> Result<Coming, DeviceError> {
        let bytes = rows.iter().map(|row| row.1).sum();
        let Some(memory) = self.memory(bytes)? else {
            return Ok(Coming {
                memory: None,
                copied: None,
            });
        };
        let (device, down) = (&self.staging.device, self.down);
        let mut place = 0;
        for &(from, bytes) in rows {
            let to = memory.data.as_ptr().wrapping_add(place);
            // SAFETY: the operand is valid while the operation runs, and `end` makes the program wait
            // for this copy; the memory is the pool's until the event behind it.
            let copied = unsafe { device.copy(down, Copy::Down { to, from }, bytes) };
            if let Err(error) = copied {
                self.give_back(Some(memory), down);
                return Err(error);
            }
            place += bytes;
        }
        let copied = device.record(down)?;
        Ok(Coming {
            memory: Some(memory),
            copied: Some(copied),
        })
    }

    /// Waits until a chunk is there.
    fn arrive(&self, chunk: Coming) -> Result<Option<HostMemory>, DeviceError> {
        match chunk.copied {
            Some(copied) => self.pass(copied).map(|()| chunk.memory),
            None => Ok(chunk.memory),
        }
    }

    /// Copies what lies in `memory` up, row by row, and gives it back when that has happened.
    fn go(&self, memory: Option<HostMemory>, rows: &[(usize, usize)]) -> Result<(), DeviceError> {
        let Some(memory) = memory else { return Ok(()) };
        let (device, up) = (&self.staging.device, self.up);
        let mut place = 0;
        let mut result = Ok(());
        for &(to, bytes) in rows {
            let from = memory.data.as_ptr().wrapping_add(place);
            // SAFETY: as in `come`.
            result = unsafe { device.copy(up, Copy::Up { to, from }, bytes) };
            if result.is_err() {
                break;
            }
            place += bytes;
        }
        self.give_back(Some(memory), up);
        result
    }

    /// The memory is free once everything in `stream` has happened.
    fn give_back(&self, memory: Option<HostMemory>, stream: Stream) {
        if let Some(memory) = memory {
            self.staging.pool.give_back(memory, stream);
        }
    }

    /// No copy uses the memory any more.
    fn put_back(&self, memory: Option<HostMemory>) {
        if let Some(memory) = memory {
            self.staging.pool.put_back(memory);
        }
    }

    /// A message in two halves, which copies once anyway: the engine's memory is the host's.
    fn whole(&self, op: &Operation<'_>, mpi: &mut dyn Mpi) -> Result<Done, String> {
        let said = |error: DeviceError| error.to_string();
        // An `irecv` has its operand for the shape only.
        let sent = [(op.send.data as usize, op.send.bytes())];
        let reads = op.kind != Kind::Irecv && sent[0].1 > 0;
        let coming = self.come(if reads { &sent } else { &[] }).map_err(said)?;
        let send = self.arrive(coming).map_err(said)?;
        let received = [(op.recv.data as usize, op.recv.bytes())];
        let recv = match self.memory(received[0].1) {
            Ok(memory) => memory,
            Err(error) => {
                self.put_back(send);
                return Err(error.to_string());
            }
        };
        let host = Operation {
            send: at(&send, op.send),
            recv: at(&recv, op.recv),
            ..*op
        };
        let mut beginning = [0; HEADER_BYTES];
        let done = match op.kind {
            Kind::Wait => mpi.wait(&host, &mut beginning),
            _ => mpi.perform(&host),
        };
        let header_sent = RendezvousHeader::read(&beginning);
        self.put_back(send);
        let done = match header_sent {
            Some(header) if header.bytes > self.staging.chunk => {
                header.refuse(self.staging);
                Err(format!(
                    "the message has {} bytes and comes in chunks, which irecv cannot receive: receive it by \
                     recv or sendrecv, send it by isend, or set MPI_CUDA_CHUNK_BYTES, here {}, to more on all \
                     ranks",
                    header.bytes, self.staging.chunk
                ))
            }
            _ => done,
        };
        match done {
            Ok(done) => self.go(recv, &received).map_err(said).map(|()| done),
            Err(error) => {
                self.give_back(recv, self.up);
                Err(error)
            }
        }
    }

    fn collective(
        &self,
        op: &Operation<'_>,
        comm: &Communicator,
        mpi: &mut dyn Mpi,
    ) -> Result<(), String> {
        let plan = Plan::new(op, comm, self.staging.chunk);
        if plan.returns_input {
            let (to, from) = (op.recv.data as usize, op.send.data as usize);
            // mpi4jax's results are empty here.
            if op.send.bytes() > 0 && to != 0 && to != from {
                // SAFETY: operand and result of one operation, which do not overlap.
                unsafe {
                    let across = Copy::Across { to, from };
                    self.staging.device.copy(self.up, across, op.send.bytes())
                }
                .map_err(|error| error.to_string())?;
            }
        }
        let mut coming = VecDeque::new();
        let mut result = Ok(());
        for number in 0..plan.chunks() {
            while result.is_ok() && coming.len() <= AHEAD && number + coming.len() < plan.chunks() {
                match self.come(&plan.sent(op, number + coming.len())) {
                    Ok(chunk) => coming.push_back(chunk),
                    Err(error) => result = Err(error.to_string()),
                }
            }
            if let Some(chunk) = coming.pop_front().filter(|_| result.is_ok()) {
                result = self.chunk(op, &plan, number, chunk, mpi);
            } else {
                break;
            }
        }
        for chunk in coming {
            if let Some(copied) = chunk.copied {
                self.staging.device.forget(copied);
            }
            self.give_back(chunk.memory, self.down);
        }
        result
    }

    /// One chunk of a collective: what was copied down goes through MPI, and its result up.
    fn chunk(
        &self,
        op: &Operation<'_>,
        plan: &Plan,
        number: usize,
        chunk: Coming,
        mpi: &mut dyn Mpi,
    ) -> Result<(), String> {
        let send = self.arrive(chunk).map_err(|error| error.to_string())?;
        let rows = plan.received(op, number);
        let recv = match self.memory(rows.iter().map(|row| row.1).sum()) {
            Ok(memory) => memory,
            Err(error) => {
                self.put_back(send);
                return Err(error.to_string());
            }
        };
        let [sent, received] = plan.shapes(number);
        let sent = Buffer {
            shape: &sent,
            ..op.send
        };
        let received = Buffer {
            shape: &received,
            ..op.recv
        };
        let done = mpi.perform(&Operation {
            send: at(&send, sent),
            recv: at(&recv, received),
            ..*op
        });
        self.put_back(send);
        match done {
            Ok(_) => self.go(recv, &rows).map_err(|error| error.to_string()),
            Err(error) => {
                self.give_back(recv, self.up);
                Err(error)
            }
        }
    }
}

/// The array in memory of the host.
fn at<'a>(memory: &Option<HostMemory>, array: Buffer<'a>) -> Buffer<'a> {
    let data = memory.as_ref().map(|memory| memory.data.as_ptr().cast());
    Buffer {
        data: data.unwrap_or(std::ptr::null_mut()),
        ..array
    }
}

#[cfg(test)]
mod tests;
