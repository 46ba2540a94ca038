//! Ranks that are threads, each with a device of its own, and what they have in place of MPI.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mpi_shim_abi::{ANY, Kind, PROC_NULL};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::buffer::Buffer;
use crate::device::simulated::{NOT_YET, Simulated};
use crate::device::{Device, Stream};
use crate::error::Failure;
use crate::mpi::communicators::Communicator;
use crate::mpi::shim::Request;
use crate::node::segment;
use crate::node::shm_rings::ShmRings;
use crate::operation::Operation;
use crate::transfer::direct::Direct;
use crate::transfer::staging::Staging;
use crate::transfer::transport::{Done, Transport};

pub(super) const CHUNK: usize = 64;
/// Where the result lies in the memory of a device; the operand is at 0.
pub(super) const RESULT: usize = 8192;

/// What ranks exchange, in place of MPI: collectives meet by their number, messages queue.
#[derive(Default)]
struct Network {
    state: Mutex<FakeState>,
    changed: Condvar,
}

#[derive(Default)]
struct FakeState {
    collectives: HashMap<usize, HashMap<i32, Vec<u8>>>,
    messages: HashMap<(i32, i32), Vec<Vec<u8>>>,
    /// Operations of all ranks.
    operations: usize,
    /// What is sent and has not left the sender's memory, by the number of the request.
    sending: BTreeMap<u64, (i32, i32, Late)>,
    under_way: u64,
    looks: usize,
}

/// Memory that is read later: where it is, and its bytes.
struct Late(usize, usize);

pub(super) struct Rank {
    pub(super) comm: Communicator,
    pub(super) device: Arc<Simulated>,
    pub(super) staging: Arc<Staging>,
    /// In place of staging.
    pub(super) direct: Option<Arc<Direct>>,
    pub(super) main: Stream,
    network: Arc<Network>,
    collectives: usize,
    /// Fails at this operation.
    pub(super) fails_at: usize,
    pub(super) performed: usize,
    begun: Instant,
}

/// The bytes of a buffer in memory of the host.
pub(super) fn bytes<'a>(buffer: &Buffer<'_>) -> &'a mut [u8] {
    if buffer.data().is_null() {
        return &mut [];
    }
    // SAFETY: the memory is the pool's, and this operation's.
    unsafe { std::slice::from_raw_parts_mut(buffer.data().cast(), buffer.bytes()) }
}

impl Network {
    /// Waits for a change; for a rank that has failed not for ever.
    fn wait(&self, state: &mut MutexGuard<'_, FakeState>) {
        let waited = self.changed.wait_for(state, Duration::from_secs(10));
        assert!(!waited.timed_out(), "another rank does not come");
    }
}

impl Transport for Rank {
    fn perform(&mut self, op: &Operation<'_>) -> Result<Done, Failure> {
        self.performed += 1;
        if self.performed == self.fails_at {
            return Err("it was told to fail".into());
        }
        self.network.state.lock().operations += 1;
        let (rank, size) = (self.comm.rank, self.comm.size as usize);
        if matches!(op.kind, Kind::Send | Kind::Recv | Kind::Sendrecv) {
            return Ok(self.message(op));
        }
        let number = self.collectives;
        self.collectives += 1;
        let all: Vec<Vec<u8>> = {
            let mut state = self.network.state.lock();
            let met = state.collectives.entry(number).or_default();
            met.insert(rank, bytes(&op.send).to_vec());
            self.network.changed.notify_all();
            while state.collectives[&number].len() < size {
                self.network.wait(&mut state);
            }
            (0..size as i32)
                .map(|rank| state.collectives[&number][&rank].clone())
                .collect()
        };
        let own = rank as usize;
        let block = |of: &[u8], index: usize| {
            let length = of.len() / size;
            of[index * length..][..length].to_vec()
        };
        let sum = |of: &[Vec<u8>]| -> Vec<u8> {
            let length = of.first().map_or(0, Vec::len);
            (0..length)
                .map(|i| of.iter().fold(0u8, |sum, x| sum.wrapping_add(x[i])))
                .collect()
        };
        let root = op.root as usize;
        let result = match op.kind {
            Kind::Allreduce | Kind::Reduce => sum(&all),
            Kind::Allgather | Kind::Gather => all.concat(),
            Kind::Alltoall => all.iter().flat_map(|x| block(x, own)).collect(),
            Kind::Bcast => all[root].clone(),
            Kind::Scatter => block(&all[root], own),
            Kind::Scan => sum(&all[..=own]),
            Kind::Exscan if own == 0 => vec![0; all[0].len()],
            Kind::Exscan => sum(&all[..own]),
            Kind::ReduceScatter => block(&sum(&all), own),
            other => panic!("{other:?}"),
        };
        if !op.recv.data().is_null() {
            bytes(&op.recv).copy_from_slice(&result);
        }
        Ok(Done::default())
    }

    fn wait(&mut self, _: &Operation<'_>, _: &mut [u8]) -> Result<Done, Failure> {
        Err("nothing was started".into())
    }

    fn start_send(&mut self, op: &Operation<'_>) -> Result<Request, Failure> {
        self.performed += 1;
        if self.performed == self.fails_at {
            return Err("it was told to fail".into());
        }
        let mut state = self.network.state.lock();
        state.operations += 1;
        state.under_way += 1;
        let number = state.under_way;
        // Read late, so that memory that is used again too early is seen.
        state.sending.insert(
            number,
            (
                self.comm.rank,
                op.dest,
                Late(op.send.data() as usize, op.send.bytes()),
            ),
        );
        Ok(Request(number))
    }

    fn is_sent(&mut self, request: &mut Request) -> Result<bool, Failure> {
        let mut state = self.network.state.lock();
        // Not at the first look, and in order.
        state.looks += 1;
        let own = |of: &(i32, i32, Late)| of.0 == self.comm.rank;
        let first = state
            .sending
            .iter()
            .find(|(_, of)| own(of))
            .map(|(&number, _)| number);
        if let Some(first) = first.filter(|_| state.looks.is_multiple_of(3)) {
            state.deliver(first);
            self.network.changed.notify_all();
        }
        Ok(!state.sending.contains_key(&request.0))
    }

    fn try_receive(&mut self, op: &Operation<'_>) -> Result<Option<Done>, Failure> {
        assert!(
            self.begun.elapsed() < Duration::from_secs(10),
            "another rank does not come"
        );
        Ok(self.take_message(op, &mut self.network.state.lock()))
    }

    fn world_rank(&self, rank: i32) -> Result<i32, Failure> {
        Ok(rank)
    }
}

impl FakeState {
    /// What is being sent has been.
    fn deliver(&mut self, number: u64) {
        if let Some((from, to, Late(data, bytes))) = self.sending.remove(&number) {
            let text = match bytes {
                0 => Vec::new(),
                // SAFETY: the sender keeps the memory until it hears that it is sent.
                _ => unsafe { std::slice::from_raw_parts(data as *const u8, bytes) }.to_vec(),
            };
            self.messages.entry((from, to)).or_default().push(text);
        }
    }
}

impl Rank {
    /// As an MPI that knows the device, which writes no more than a message has.
    fn perform_on_device(&mut self, op: &Operation<'_>) -> Result<Done, Failure> {
        let place = |buffer: &Buffer<'_>| buffer.data() as usize - Simulated::address(0);
        let length = op.send.bytes();
        let mut sent = Vec::new();
        if length > 0 {
            let from = place(&op.send);
            sent = self
                .device
                .with(|memory| memory[from..][..length].to_vec())
                .unwrap();
        }
        let mut received = vec![NOT_YET; op.recv.bytes()];
        let root = op.root == self.comm.rank;
        let writes = match op.kind {
            Kind::Bcast => !root,
            Kind::Gather | Kind::Reduce => root,
            Kind::Send => false,
            _ => true,
        };
        let mut on_host = *op;
        let result = match writes {
            true => received.as_mut_ptr().cast(),
            false => std::ptr::null_mut(),
        };
        // SAFETY: both live as long as the operation, and are as long as its arrays.
        unsafe {
            on_host.send = op.send.placed(sent.as_mut_ptr().cast());
            on_host.recv = op.recv.placed(result);
        }
        let nobody = op.source == PROC_NULL && op.dest == PROC_NULL;
        let done = match op.kind {
            Kind::Sendrecv if nobody => Done::default(),
            _ => self.perform(&on_host)?,
        };
        let arrived = match op.kind {
            Kind::Recv | Kind::Sendrecv => done.bytes,
            _ => received.len(),
        };
        if writes && arrived > 0 && arrived <= received.len() {
            let to = place(&op.recv);
            self.device.with(|memory| {
                memory[to..][..arrived].copy_from_slice(&received[..arrived]);
            });
        }
        Ok(done)
    }

    fn message(&self, op: &Operation<'_>) -> Done {
        let rank = self.comm.rank;
        let mut state = self.network.state.lock();
        if op.kind != Kind::Recv && op.dest != PROC_NULL {
            let queue = state.messages.entry((rank, op.dest)).or_default();
            queue.push(bytes(&op.send).to_vec());
            self.network.changed.notify_all();
        }
        if op.kind == Kind::Send {
            return Done::default();
        }
        loop {
            match self.take_message(op, &mut state) {
                Some(done) => break done,
                None => self.network.wait(&mut state),
            }
        }
    }

    fn take_message(&self, op: &Operation<'_>, state: &mut FakeState) -> Option<Done> {
        let queue = state.messages.iter_mut().find(|((source, dest), queue)| {
            let from = op.source == ANY || op.source == *source;
            from && *dest == self.comm.rank && !queue.is_empty()
        });
        let (&(source, _), queue) = queue?;
        let message = queue.remove(0);
        let room = bytes(&op.recv);
        if message.len() <= room.len() {
            room[..message.len()].copy_from_slice(&message);
        }
        Some(Done {
            source,
            tag: 5,
            bytes: message.len(),
            dtype: None,
        })
    }

    /// Executes an operation whose operand a kernel of the program makes just before, and that
    /// another overwrites just after; the result as a kernel just after sees it.
    pub(super) fn run(
        &mut self,
        op: &Operation<'_>,
        operand: Vec<u8>,
    ) -> (Result<Done, Failure>, Vec<u8>) {
        self.begun = Instant::now();
        let (main, device) = (self.main, self.device.clone());
        device.kernel(main, move |memory| {
            memory[..operand.len()].copy_from_slice(&operand);
            // The result's memory is still used by what is before.
            memory[RESULT..].fill(NOT_YET);
        });
        let comm = self.comm;
        let (staging, direct) = (self.staging.clone(), self.direct.clone());
        let done = match direct {
            Some(direct) => {
                assert!(Direct::can(op, false));
                direct.execute(op, &comm, main, &mut |op| self.perform_on_device(op))
            }
            None => staging.execute(op, &comm, main, self),
        };
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (saw, length) = (seen.clone(), op.recv.bytes());
        device.kernel(main, move |memory| {
            *saw.lock() = memory[RESULT..][..length].to_vec();
            memory.fill(NOT_YET);
        });
        device.synchronize(main);
        let seen = std::mem::take(&mut *seen.lock());
        (done, seen)
    }
}

/// Runs `body` on `size` ranks; what each returned.
pub(super) fn ranks<T: Send>(size: i32, body: impl Fn(&mut Rank) -> T + Sync) -> Vec<T> {
    ranks_sharing(size, |_| false, body)
}

/// The same, where some ranks have an shared-memory ring.
pub(super) fn ranks_sharing<T: Send>(
    size: i32,
    shares: impl Fn(i32) -> bool,
    body: impl Fn(&mut Rank) -> T + Sync,
) -> Vec<T> {
    let network = Arc::new(Network::default());
    let number = segment::new_number();
    let make = |rank| {
        let slot = shares(rank).then_some(CHUNK);
        ShmRings::make(number, rank as usize, size as usize, size as usize, slot)
    };
    let mut shm_rings: Vec<ShmRings> = (0..size).map(make).collect();
    shm_rings.iter_mut().for_each(ShmRings::open);
    shm_rings.iter().for_each(ShmRings::unlink);
    let mut all: Vec<Rank> = (0..size)
        .zip(shm_rings)
        .map(|(rank, shm_rings)| {
            let delay = Duration::from_micros(300);
            let device = Arc::new(Simulated::with_memory(2 * RESULT, delay));
            Rank {
                comm: Communicator {
                    name: "test",
                    handle: 0,
                    user_handle: 0,
                    rank,
                    size,
                    members: &[],
                    largest_tag: 0,
                    freed: false,
                },
                main: device.stream().unwrap(),
                staging: Arc::new(
                    Staging::new(device.clone(), CHUNK, Some(Arc::new(shm_rings))).unwrap(),
                ),
                direct: None,
                device,
                network: network.clone(),
                collectives: 0,
                fails_at: 0,
                performed: 0,
                begun: Instant::now(),
            }
        })
        .collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = all
            .iter_mut()
            .map(|rank| scope.spawn(|| body(rank)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}
