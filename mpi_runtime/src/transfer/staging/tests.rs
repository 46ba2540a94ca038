//! Staging on a device whose memory the host cannot address and whose copies come late, among ranks
//! that are threads.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mpi_shim_abi::{ANY, Kind, PROC_NULL, Reduction};
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::Staging;
use crate::device::simulated::{NOT_YET, Simulated};
use crate::device::{Device, Stream};
use crate::error::Failure;
use crate::mpi::communicators::Communicator;
use crate::mpi::shim::Request;
use crate::node::segment;
use crate::node::shm_ring::ShmRings;
use crate::operation::{Buffer, ElementType, Operation};
use crate::transfer::choice::Through;
use crate::transfer::direct::Direct;
use crate::transfer::transport::{Done, Transport};

const CHUNK: usize = 64;
/// Where the result lies in the memory of a device; the operand is at 0.
const RESULT: usize = 8192;
const DTYPE: ElementType = ElementType::U8;

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

struct Rank {
    comm: Communicator,
    device: Arc<Simulated>,
    staging: Arc<Staging>,
    /// In place of staging.
    direct: Option<Arc<Direct>>,
    main: Stream,
    network: Arc<Network>,
    collectives: usize,
    /// Fails at this operation.
    fails_at: usize,
    performed: usize,
    begun: Instant,
}

/// The bytes of a buffer in memory of the host.
fn bytes<'a>(buffer: &Buffer<'_>) -> &'a mut [u8] {
    if buffer.data.is_null() {
        return &mut [];
    }
    // SAFETY: the memory is the pool's, and this operation's.
    unsafe { std::slice::from_raw_parts_mut(buffer.data.cast(), buffer.bytes()) }
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
        if !op.recv.data.is_null() {
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
                Late(op.send.data as usize, op.send.bytes()),
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
        let place = |buffer: &Buffer<'_>| buffer.data as usize - Simulated::address(0);
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
        on_host.send.data = sent.as_mut_ptr().cast();
        on_host.recv.data = match writes {
            true => received.as_mut_ptr().cast(),
            false => std::ptr::null_mut(),
        };
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
        })
    }

    /// Executes an operation whose operand a kernel of the program makes just before, and that another
    /// overwrites just after; the result as a kernel just after sees it.
    fn run(&mut self, op: &Operation<'_>, operand: Vec<u8>) -> (Result<Done, Failure>, Vec<u8>) {
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
fn ranks<T: Send>(size: i32, body: impl Fn(&mut Rank) -> T + Sync) -> Vec<T> {
    ranks_sharing(size, |_| false, body)
}

/// The same, where some ranks have an shared-memory ring.
fn ranks_sharing<T: Send>(
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

fn operation<'a>(kind: Kind, sent: &'a [i64], received: &'a [i64]) -> Operation<'a> {
    let buffer = |place: usize, shape| Buffer {
        data: Simulated::address(place) as *mut _,
        dtype: DTYPE,
        shape,
    };
    Operation {
        reduction: Some(Reduction::Sum),
        source: 0,
        ..Operation::new(kind, 0, buffer(0, sent), buffer(RESULT, received))
    }
}

/// Different on every rank and in every place.
fn numbers(rank: i32, length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| (i * 7 + i / 251 + 31 * rank as usize) as u8)
        .collect()
}

/// The operand of `rank`, and the result that it should have, of blocks of `n` on `size` ranks.
fn example(kind: Kind, rank: i32, size: usize, n: usize, root: i32) -> (Vec<u8>, Vec<u8>) {
    let rows = match kind {
        Kind::Alltoall | Kind::ReduceScatter => size,
        Kind::Scatter if rank == root => size,
        _ => 1,
    };
    let all = |rows: usize| -> Vec<Vec<u8>> {
        (0..size as i32)
            .map(|rank| numbers(rank, rows * n))
            .collect()
    };
    let sum = |of: &[Vec<u8>], length: usize| -> Vec<u8> {
        (0..length)
            .map(|i| of.iter().fold(0u8, |sum, x| sum.wrapping_add(x[i])))
            .collect()
    };
    let own = rank as usize;
    let operand = numbers(rank, rows * n);
    let result = match kind {
        Kind::Allreduce => sum(&all(1), n),
        Kind::Reduce if rank == root => sum(&all(1), n),
        Kind::Allgather => all(1).concat(),
        Kind::Gather if rank == root => all(1).concat(),
        Kind::Reduce | Kind::Gather => operand.clone(),
        Kind::Alltoall => all(size)
            .iter()
            .flat_map(|x| x[own * n..][..n].to_vec())
            .collect(),
        Kind::Bcast => numbers(root, n),
        Kind::Scatter => numbers(root, size * n)[own * n..][..n].to_vec(),
        Kind::Scan => sum(&all(1)[..=own], n),
        Kind::Exscan => sum(&all(1)[..own], n),
        Kind::ReduceScatter => sum(&all(size), size * n)[own * n..][..n].to_vec(),
        other => panic!("{other:?}"),
    };
    (operand, result)
}

const COLLECTIVES: [Kind; 10] = [
    Kind::Allgather,
    Kind::Allreduce,
    Kind::Alltoall,
    Kind::Bcast,
    Kind::Exscan,
    Kind::Gather,
    Kind::Reduce,
    Kind::ReduceScatter,
    Kind::Scan,
    Kind::Scatter,
];

#[test]
fn collectives_of_all_lengths_around_the_edges_of_chunks() {
    for size in [1, 3] {
        ranks(size, |rank| {
            for n in [0, 1, 20, 21, 22, 63, 64, 65, 128, 300] {
                for (turn, kind) in COLLECTIVES.into_iter().enumerate() {
                    let root = turn as i32 % size;
                    let (operand, want) = example(kind, rank.comm.rank, size as usize, n, root);
                    let shape = |length: usize| match kind {
                        Kind::Alltoall => [i64::from(size), length as i64 / i64::from(size)],
                        _ => [1, length as i64],
                    };
                    let (sent, received) = (shape(operand.len()), shape(want.len()));
                    let op = Operation {
                        root,
                        ..operation(kind, &sent, &received)
                    };
                    let (done, result) = rank.run(&op, operand);
                    done.unwrap();
                    assert_eq!(result, want, "{kind:?} of {n} on {size}");
                }
            }
        });
    }
}

#[test]
fn messages_of_all_lengths_around_the_edges_of_chunks() {
    let some: [fn(i32) -> bool; 3] = [|_| false, |_| true, |rank| rank == 1];
    some.into_iter().for_each(messages_of_all_lengths);
}

fn messages_of_all_lengths(shares: impl Fn(i32) -> bool) {
    ranks_sharing(3, shares, |rank| {
        let own = rank.comm.rank;
        for n in [0usize, 1, 12, 13, 14, 63, 64, 65, 128, 129, 1000] {
            // Each sends another length, to the right, from the left or from anybody.
            let length = |rank: i32| n + 70 * rank as usize;
            let left = (own + 2) % 3;
            let (sent, received) = ([length(own) as i64], [length(left) as i64]);
            for source in [left, ANY] {
                let op = Operation {
                    dest: (own + 1) % 3,
                    source,
                    ..operation(Kind::Sendrecv, &sent, &received)
                };
                let (done, result) = rank.run(&op, numbers(own, length(own)));
                let done = done.unwrap();
                assert_eq!((done.source, done.bytes), (left, length(left)));
                assert_eq!(result, numbers(left, length(left)), "{n} from {source}");
            }
            let op = match own {
                0 => operation(Kind::Recv, &[0], &received),
                2 => operation(Kind::Send, &sent, &[0]),
                _ => continue,
            };
            let (done, result) =
                rank.run(&Operation { source: 2, ..op }, numbers(own, length(own)));
            done.unwrap();
            if own == 0 {
                assert_eq!(result, numbers(2, length(2)));
            }
        }
    });
}

#[test]
fn nobody_sends_zeros_and_what_nobody_gets_is_gone() {
    ranks(1, |rank| {
        let shape = [200];
        let op = Operation {
            dest: PROC_NULL,
            source: PROC_NULL,
            ..operation(Kind::Sendrecv, &shape, &shape)
        };
        let (done, result) = rank.run(&op, numbers(0, 200));
        assert_eq!((done.unwrap().bytes, result), (0, vec![0; 200]));
        assert_eq!(rank.performed, 0);
    });
}

#[test]
fn what_a_rank_receives_may_depend_on_what_it_sends() {
    for shares in [false, true] {
        ranks_sharing(
            3,
            |_| shares,
            |rank| {
                let (own, shape) = (rank.comm.rank, [1000]);
                let (dest, source) = ((own + 1) % 3, (own + 2) % 3);
                let message = |kind| Operation {
                    dest,
                    source,
                    ..operation(kind, &shape, &shape)
                };
                // Once around: rank 0 has nothing to receive until its message has passed the others.
                if own == 0 {
                    let (done, result) = rank.run(&message(Kind::Sendrecv), numbers(7, 1000));
                    assert_eq!((done.unwrap().bytes, result), (1000, numbers(7, 1000)));
                    return;
                }
                let (done, passed) = rank.run(&message(Kind::Recv), Vec::new());
                done.unwrap();
                rank.run(&message(Kind::Send), passed).0.unwrap();
            },
        );
    }
}

#[test]
fn between_ranks_that_share_memory_mpi_has_the_header_alone() {
    ranks_sharing(
        2,
        |_| true,
        |rank| {
            let (shape, other) = ([4000], 1 - rank.comm.rank);
            let op = Operation {
                dest: other,
                source: other,
                ..operation(Kind::Sendrecv, &shape, &shape)
            };
            for _ in 0..3 {
                let (done, result) = rank.run(&op, numbers(rank.comm.rank, 4000));
                assert_eq!((done.unwrap().bytes, result), (4000, numbers(other, 4000)));
            }
            assert_eq!(rank.performed, 3);
            // Both directions, and several slots of each.
            assert!(rank.device.most_at_once() > 4);
            // The rendezvous header, and the room for the other one.
            assert_eq!(rank.staging.0.pool.pieces(), (2, 0));
        },
    );
}

#[test]
fn other_lengths_are_errors_that_name_both() {
    [false, true].into_iter().for_each(other_lengths);
}

fn other_lengths(shares: bool) {
    for (sent, received) in [
        (300, 200),
        (200, 300),
        (300, 60),
        (60, 300),
        (300, 5),
        (5, 300),
    ] {
        let texts = ranks_sharing(
            2,
            |_| shares,
            |rank| {
                let (sent, received) = ([sent], [received]);
                let op = match rank.comm.rank {
                    0 => operation(Kind::Recv, &[0], &received),
                    _ => operation(Kind::Send, &sent, &[0]),
                };
                rank.run(&Operation { source: 1, ..op }, numbers(1, 300))
                    .0
                    .err()
            },
        );
        let text = texts[0].clone().unwrap().to_string();
        assert!(text.contains(&received.to_string()), "{text}");
        assert!(text.contains(&sent.to_string()), "{text}");
        assert_eq!(texts[1], None);
    }
}

#[test]
fn a_message_that_does_not_fit_is_taken_out_of_the_way() {
    [false, true].into_iter().for_each(too_long_a_message);
}

fn too_long_a_message(shares: bool) {
    ranks_sharing(
        2,
        |_| shares,
        |rank| {
            let (long, short) = ([1000], [20]);
            let other = 1 - rank.comm.rank;
            let exchange = |received| Operation {
                dest: other,
                source: other,
                ..operation(Kind::Sendrecv, &long, received)
            };
            // Rank 0 has no room, and sends all the same; the next exchange is not disturbed.
            let received: &[i64] = if other == 1 { &short } else { &long };
            let (done, result) = rank.run(&exchange(received), numbers(rank.comm.rank, 1000));
            if other == 1 {
                assert!(
                    done.unwrap_err()
                        .to_string()
                        .contains("has 1000 bytes, and the result 20")
                );
            } else {
                assert_eq!((done.unwrap().bytes, result), (1000, numbers(0, 1000)));
            }
            let (done, result) = rank.run(&exchange(&long), numbers(rank.comm.rank, 1000));
            assert_eq!((done.unwrap().bytes, result), (1000, numbers(other, 1000)));
        },
    );
}

#[test]
fn copies_overlap_with_messages_and_memory_is_used_again() {
    ranks(2, |rank| {
        let shape = [4000];
        let op = operation(Kind::Allreduce, &shape, &shape);
        for _ in 0..3 {
            rank.run(&op, numbers(rank.comm.rank, 4000)).0.unwrap();
        }
        assert!(
            rank.device.most_at_once() > 2,
            "{}",
            rank.device.most_at_once()
        );
        let (free, in_use) = rank.staging.0.pool.pieces();
        assert_eq!(in_use, 0);
        // 63 chunks each time, of which only those in between hold memory.
        assert!(free < 40, "{free}");
    });
}

#[test]
fn a_failure_in_the_middle_leaves_nothing_behind() {
    for fails_at in [1, 2, 5] {
        let texts = ranks(1, |rank| {
            rank.fails_at = fails_at;
            let shape = [500];
            let op = operation(Kind::Allreduce, &shape, &shape);
            let failed = rank.run(&op, numbers(0, 500)).0.err();
            // The next one is well.
            let (done, result) = rank.run(&op, numbers(0, 500));
            assert_eq!((done.is_ok(), result), (true, numbers(0, 500)));
            assert_eq!(rank.staging.0.pool.pieces().1, 0);
            failed
        });
        assert_eq!(texts, [Some("it was told to fail".into())]);
    }
}

#[test]
fn a_device_that_fails_says_so() {
    for copies in [0, 1, 4, 9] {
        ranks(1, |rank| {
            rank.device.fail_after(copies);
            let shape = [500];
            for kind in [Kind::Allreduce, Kind::Sendrecv, Kind::Bcast] {
                let op = operation(kind, &shape, &shape);
                let failed = rank.run(&op, numbers(0, 500)).0.err();
                let text = failed.map_or(String::new(), |failure| failure.to_string());
                let ran_out = text.contains("a copy failed on the simulated device");
                assert!(ran_out || text.is_empty(), "{text}");
            }
            let op = operation(Kind::Allreduce, &shape, &shape);
            assert!(rank.run(&op, numbers(0, 500)).0.is_err());
        });
    }
}

#[test]
fn a_receiver_that_fails_does_not_hold_the_sender() {
    for copies in [0, 1, 9] {
        let ends = ranks_sharing(
            2,
            |_| true,
            |rank| {
                let shape = [4000];
                if rank.comm.rank == 1 {
                    rank.device.fail_after(copies);
                    let op = operation(Kind::Recv, &[0], &shape);
                    return rank.run(&op, Vec::new()).0.err();
                }
                let op = Operation {
                    dest: 1,
                    ..operation(Kind::Send, &shape, &[0])
                };
                rank.run(&op, numbers(0, 4000)).0.err()
            },
        );
        assert_eq!(ends[0], None);
        let text = ends[1].clone().unwrap().to_string();
        assert!(
            text.contains("a copy failed on the simulated device"),
            "{text}"
        );
    }
}

/// Does one thing with every operation.
struct Halves<F>(F);

impl<F: FnMut(&Operation<'_>) -> Result<Done, Failure>> Transport for Halves<F> {
    fn perform(&mut self, op: &Operation<'_>) -> Result<Done, Failure> {
        self.0(op)
    }

    fn wait(&mut self, op: &Operation<'_>, _: &mut [u8]) -> Result<Done, Failure> {
        self.0(op)
    }

    fn start_send(&mut self, _: &Operation<'_>) -> Result<Request, Failure> {
        Err("a half is sent as a whole".into())
    }

    fn is_sent(&mut self, _: &mut Request) -> Result<bool, Failure> {
        Ok(false)
    }

    fn try_receive(&mut self, _: &Operation<'_>) -> Result<Option<Done>, Failure> {
        Ok(None)
    }

    fn world_rank(&self, rank: i32) -> Result<i32, Failure> {
        Ok(rank)
    }
}

#[test]
fn messages_in_two_halves_go_through_the_host_whole() {
    ranks(1, |rank| {
        let (number, shape) = ([1], [500]);
        // What the engine does with each half is not staging's: here it gives one back.
        let mut kept = Vec::new();
        let mut both = |kind, operand: Vec<u8>, sent, received| {
            let op = operation(kind, sent, received);
            let (main, device) = (rank.main, rank.device.clone());
            device.kernel(main, move |memory| {
                memory[..operand.len()].copy_from_slice(&operand);
                memory[RESULT..].fill(NOT_YET);
            });
            let comm = rank.comm;
            let mut halves = Halves(|half: &Operation<'_>| {
                match half.kind {
                    Kind::Isend => kept = bytes(&half.send).to_vec(),
                    Kind::Irecv => assert!(half.send.data.is_null()),
                    _ => assert_eq!(bytes(&half.send), [7]),
                }
                match half.kind {
                    Kind::Wait => bytes(&half.recv).copy_from_slice(&kept),
                    Kind::WaitSend => {}
                    _ => bytes(&half.recv)[0] = 7,
                }
                Ok(Done::default())
            });
            let staging = &rank.staging;
            staging.execute(&op, &comm, main, &mut halves).unwrap();
            let seen = Arc::new(Mutex::new(Vec::new()));
            let (saw, length) = (seen.clone(), op.recv.bytes());
            device.kernel(main, move |memory| {
                *saw.lock() = memory[RESULT..][..length].to_vec();
            });
            device.synchronize(main);
            std::mem::take(&mut *seen.lock())
        };
        assert_eq!(both(Kind::Isend, numbers(0, 500), &shape, &number), [7]);
        assert_eq!(both(Kind::Irecv, vec![1], &shape, &number), [7]);
        assert_eq!(both(Kind::Wait, vec![7], &number, &shape), numbers(0, 500));
        assert!(both(Kind::WaitSend, vec![7], &number, &[0]).is_empty());
    });
}

#[test]
fn a_rank_that_gets_nothing_may_have_no_result() {
    ranks(2, |rank| {
        let shape = [200];
        for kind in [Kind::Reduce, Kind::Gather, Kind::Bcast] {
            let mut op = operation(kind, &shape, &shape);
            op.root = if kind == Kind::Bcast {
                rank.comm.rank
            } else {
                1 - rank.comm.rank
            };
            op.recv.data = std::ptr::null_mut();
            let plan = super::plan::Plan::new(&op, &rank.comm, CHUNK);
            assert!(plan.returns_input);
        }
        // Rank 0 gets the sum; rank 1 gets back what it sent, if it wants it.
        let mut op = operation(Kind::Reduce, &shape, &shape);
        if rank.comm.rank == 1 {
            op.recv.data = std::ptr::null_mut();
        }
        rank.run(&op, numbers(rank.comm.rank, 200)).0.unwrap();
    });
}

impl Rank {
    /// From now on MPI gets the device's memory.
    fn go_direct(&mut self, through: Through) {
        self.direct = Some(Arc::new(Direct::new(self.device.clone(), through)));
    }
}

#[test]
fn direct_collectives_come_after_the_kernels_before_and_before_those_after() {
    for (through, size) in [
        (Through::Arrays, 1),
        (Through::Arrays, 3),
        (Through::Copies, 3),
    ] {
        ranks(size, |rank| {
            rank.go_direct(through);
            for n in [0, 1, 65, 300] {
                for (turn, kind) in COLLECTIVES.into_iter().enumerate() {
                    let root = turn as i32 % size;
                    let (operand, want) = example(kind, rank.comm.rank, size as usize, n, root);
                    let (sent, received) = ([operand.len() as i64], [want.len() as i64]);
                    let op = Operation {
                        root,
                        ..operation(kind, &sent, &received)
                    };
                    if kind == Kind::Exscan {
                        assert!(!Direct::can(&op, false));
                        continue;
                    }
                    let (done, result) = rank.run(&op, operand);
                    done.unwrap();
                    assert_eq!(result, want, "{kind:?} of {n} on {size}");
                }
            }
        });
    }
}

#[test]
fn direct_messages_and_their_lengths() {
    fn exchange<'a>(with: i32, sent: &'a [i64], received: &'a [i64]) -> Operation<'a> {
        Operation {
            dest: with,
            source: with,
            ..operation(Kind::Sendrecv, sent, received)
        }
    }
    for through in [Through::Arrays, Through::Copies] {
        ranks(2, |rank| {
            rank.go_direct(through);
            let (own, other) = (rank.comm.rank, 1 - rank.comm.rank);
            for n in [0i64, 1, 1000] {
                let shape = [n];
                let (done, result) =
                    rank.run(&exchange(other, &shape, &shape), numbers(own, n as usize));
                done.unwrap();
                assert_eq!(result, numbers(other, n as usize));
            }
            // Shorter and longer ones; with a status the rest is zeros.
            let text = rank
                .run(&exchange(other, &[100], &[300]), numbers(own, 100))
                .0
                .unwrap_err()
                .to_string();
            assert!(text.contains("100 bytes, and the result 300"), "{text}");
            let text = rank
                .run(&exchange(other, &[100], &[30]), numbers(own, 100))
                .0
                .unwrap_err()
                .to_string();
            assert!(text.contains("100 bytes, and the result 30"), "{text}");
            let shorter = Operation {
                status: 1,
                ..exchange(other, &[100], &[300])
            };
            let (done, result) = rank.run(&shorter, numbers(own, 100));
            done.unwrap();
            let mut want = numbers(other, 100);
            want.resize(300, 0);
            assert_eq!(result, want);
            let nobody = Operation {
                dest: PROC_NULL,
                source: PROC_NULL,
                ..operation(Kind::Sendrecv, &[200], &[200])
            };
            let (done, result) = rank.run(&nobody, numbers(own, 200));
            done.unwrap();
            assert_eq!(result, vec![0; 200]);
        });
    }
}

#[test]
fn direct_failures_leave_the_next_operation_alone() {
    ranks(1, |rank| {
        rank.go_direct(Through::Copies);
        let shape = [500];
        let op = operation(Kind::Allreduce, &shape, &shape);
        rank.fails_at = 1;
        assert!(rank.run(&op, numbers(0, 500)).0.is_err());
        let (done, result) = rank.run(&op, numbers(0, 500));
        done.unwrap();
        assert_eq!(result, numbers(0, 500));
        rank.device.fail_after(1);
        let text = rank.run(&op, numbers(0, 500)).0.unwrap_err().to_string();
        assert!(
            text.contains("a copy failed on the simulated device"),
            "{text}"
        );
    });
}

#[test]
fn what_mpi_reduces_by_functions_on_the_host_does_not_go_directly() {
    let shape = [4];
    let with = |dtype, reduction| {
        let mut op = operation(Kind::Allreduce, &shape, &shape);
        (op.send.dtype, op.recv.dtype, op.reduction) = (dtype, dtype, Some(reduction));
        Direct::can(&op, false)
    };
    assert!(with(ElementType::F32, Reduction::Sum) && with(ElementType::I8, Reduction::Max));
    assert!(with(ElementType::C64, Reduction::Prod));
    for (dtype, reduction) in [
        (ElementType::F32, Reduction::Max),
        (ElementType::F16, Reduction::Sum),
        (ElementType::BF16, Reduction::Sum),
        (ElementType::Bool, Reduction::Sum),
        (ElementType::I32, Reduction::User),
    ] {
        assert!(!with(dtype, reduction), "{dtype:?} {reduction:?}");
    }
    let mut moved = operation(Kind::Allgather, &shape, &shape);
    (moved.send.dtype, moved.reduction) = (ElementType::BF16, None);
    assert!(Direct::can(&moved, false) && !Direct::can(&moved, true));
    let message = operation(Kind::Sendrecv, &shape, &shape);
    assert!(Direct::can(&message, true));
}
