//! Collectives whose blocks differ in length, the vector variants (MPI 4.0, sections 6.5 to 6.8).
//!
//! MPI's counts and displacements are C `int`. What is larger goes in parts, which every rank cuts
//! in the same way.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::atomic::Ordering;

use mpi::ffi;
use mpi_shim_abi::Kind;

use crate::checked::Checked;
use crate::code::{SUCCESS, attempt};
use crate::collective::{after, place};
use crate::datatype::datatype;
use crate::handle::comm_from_bits;
use crate::large::{PART, size};
use crate::waiting::{wait, yielding};

/// Counts and displacements of one array of a call, in elements.
struct Blocks {
    counts: Vec<c_int>,
    places: Vec<c_int>,
}

/// One call.
struct Call<'a> {
    op: Checked<'a>,
    /// What this rank sends.
    send: *const c_void,
    sent: Blocks,
    /// What it receives.
    recv: *mut c_void,
    received: Blocks,
}

/// Executes one of them.
pub(crate) fn run(op: Checked<'_>) -> c_int {
    match op.kind {
        Kind::Alltoallv if op.in_parts != 0 => exchange_in_parts(op),
        Kind::Alltoallv => {
            let call = Call {
                op,
                send: place(op.send, op.count),
                sent: Blocks::whole(&list(op, op.counts)),
                recv: place(op.recv, op.recv_count).cast_mut(),
                received: Blocks::whole(&list(op, op.recv_counts)),
            };
            call.run()
        }
        _ => in_windows(op),
    }
}

/// The lengths of blocks, in elements.
fn list(op: Checked<'_>, rows: *const i64) -> Vec<i64> {
    let ranks = size(op) as usize;
    // SAFETY: the lists of a checked operation have a number for each rank.
    let rows = unsafe { std::slice::from_raw_parts(rows, ranks) };
    rows.iter().map(|rows| rows * op.row).collect()
}

/// Elements that one call takes.
fn most(op: Checked<'_>) -> i64 {
    (PART.load(Ordering::Relaxed) / op.datatype.size() as i64).max(1)
}

/// Where each block begins, and where the last one ends.
fn starts(counts: &[i64]) -> Vec<i64> {
    let mut end = 0;
    let mut starts = vec![0];
    starts.extend(counts.iter().map(|count| {
        end += count;
        end
    }));
    starts
}

impl Blocks {
    /// All blocks, one behind the other.
    fn whole(counts: &[i64]) -> Blocks {
        let starts = starts(counts);
        Blocks::within(&starts, 0..starts[counts.len()])
    }

    /// What of each block lies in a window, whose length and that of the blocks in it fit.
    fn within(starts: &[i64], window: Range<i64>) -> Blocks {
        let overlaps = starts.windows(2).map(|block| {
            let start = block[0].clamp(window.start, window.end);
            let end = block[1].clamp(window.start, window.end);
            ((end - start) as c_int, (start - window.start) as c_int)
        });
        let (counts, places) = overlaps.unzip();
        Blocks { counts, places }
    }

    /// One block alone, at the start of the array.
    fn of_one(ranks: usize, rank: usize, count: i64) -> Blocks {
        let mut counts = vec![0; ranks];
        counts[rank] = count as c_int;
        let places = vec![0; ranks];
        Blocks { counts, places }
    }
}

/// Kinds of which one array has the blocks of all ranks: all ranks know them, and a part is a
/// window on that array.
fn in_windows(op: Checked<'_>) -> c_int {
    let counts = list(op, op.counts);
    let starts = starts(&counts);
    let (rank, bytes) = (rank(op), op.datatype.size() as i64);
    let (total, most) = (starts[counts.len()], most(op));
    let mut start = 0;
    loop {
        let window = start..(start + most).min(total);
        let all = Blocks::within(&starts, window.clone());
        let own = Blocks {
            counts: vec![all.counts[rank]],
            places: vec![],
        };
        let own_start = starts[rank].clamp(window.start, window.end) - starts[rank];
        let own_at = own_start.max(0) * bytes;
        let all_at = window.start * bytes;
        let scatters = op.kind == Kind::Scatterv;
        let (send_at, sent, recv_at, received) = match scatters {
            true => (all_at, all, own_at, own),
            false => (own_at, own, all_at, all),
        };
        let call = Call {
            op,
            send: after(place(op.send, op.count), send_at),
            sent,
            recv: after(place(op.recv, op.recv_count), recv_at).cast_mut(),
            received,
        };
        attempt! { call.run(); };
        start = window.end;
        if start == total {
            return SUCCESS;
        }
    }
}

/// `Alltoallv` where it is more than MPI takes: in turn with each distance between ranks, and of
/// that in as many parts as the longest block of all ranks has.
fn exchange_in_parts(op: Checked<'_>) -> c_int {
    let (sent, received) = (list(op, op.counts), list(op, op.recv_counts));
    let (sent_at, received_at) = (starts(&sent), starts(&received));
    let (ranks, rank, most) = (sent.len(), rank(op), most(op));
    let mut parts: Vec<i64> = (0..ranks)
        .map(|distance| {
            let count = sent[(rank + distance) % ranks];
            count / most + i64::from(count % most != 0)
        })
        .collect();
    attempt! { largest(op, &mut parts); };
    let bytes = op.datatype.size() as i64;
    for (distance, &parts) in parts.iter().enumerate() {
        let (to, from) = ((rank + distance) % ranks, (rank + ranks - distance) % ranks);
        for part in 0..parts {
            let of = |count: i64| {
                let start = (part * most).min(count);
                (start, (count - start).min(most))
            };
            let ((start, count), (recv_start, recv_count)) = (of(sent[to]), of(received[from]));
            let recv_start = received_at[from] + recv_start;
            let call = Call {
                op,
                send: after(place(op.send, op.count), (sent_at[to] + start) * bytes),
                sent: Blocks::of_one(ranks, to, count),
                recv: after(place(op.recv, op.recv_count), recv_start * bytes).cast_mut(),
                received: Blocks::of_one(ranks, from, recv_count),
            };
            attempt! { call.run(); };
        }
    }
    SUCCESS
}

fn rank(op: Checked<'_>) -> usize {
    let mut rank = 0;
    // SAFETY: the communicator of a checked operation is live.
    unsafe { ffi::MPI_Comm_rank(comm_from_bits(op.comm), &mut rank) };
    rank as usize
}

/// The largest of the ranks' numbers, one by one.
fn largest(op: Checked<'_>, numbers: &mut [i64]) -> c_int {
    let own = numbers.to_vec();
    let (comm, count) = (comm_from_bits(op.comm), numbers.len() as c_int);
    let (from, to) = (own.as_ptr().cast(), numbers.as_mut_ptr().cast());
    // SAFETY: as many numbers as is said, of ours; the communicator is live, and what is not
    // blocking is waited for.
    unsafe {
        let (of, max) = (ffi::RSMPI_INT64_T, ffi::RSMPI_MAX);
        if !yielding() {
            return ffi::MPI_Allreduce(from, to, count, of, max, comm);
        }
        finish(|request| ffi::MPI_Iallreduce(from, to, count, of, max, comm, request))
    }
}

/// Starts something that is not blocking, and waits for it.
///
/// # Safety
/// What it uses must outlive this call.
unsafe fn finish(start: impl FnOnce(&mut ffi::MPI_Request) -> c_int) -> c_int {
    // SAFETY: a null request, or the one that was started; zeros are an `MPI_Status`.
    unsafe {
        let mut request = ffi::RSMPI_REQUEST_NULL;
        attempt! { start(&mut request); };
        wait(&mut request, &mut std::mem::zeroed())
    }
}

impl Call<'_> {
    #[rustfmt::skip]
    fn run(&self) -> c_int {
        let Call { op, send, sent, recv, received } = self;
        let (send, recv, of) = (*send, *recv, datatype(op.datatype));
        let (root, comm) = (op.root, comm_from_bits(op.comm));
        let (n, m) = (sent.counts[0], received.counts[0]);
        let (counts, places) = (sent.counts.as_ptr(), sent.places.as_ptr());
        let (into, into_places) = (received.counts.as_ptr(), received.places.as_ptr());
        // SAFETY: the buffers of a checked operation hold its blocks; the lists have a number for
        // each rank where MPI reads them, and outlive the call; the handles are live.
        unsafe {
            match (op.kind, yielding()) {
                (Kind::Allgatherv, false) => {
                    ffi::MPI_Allgatherv(send, n, of, recv, into, into_places, of, comm)
                }
                (Kind::Allgatherv, true) => finish(|request| {
                    ffi::MPI_Iallgatherv(send, n, of, recv, into, into_places, of, comm, request)
                }),
                (Kind::Gatherv, false) => {
                    ffi::MPI_Gatherv(send, n, of, recv, into, into_places, of, root, comm)
                }
                (Kind::Gatherv, true) => finish(|request| {
                    ffi::MPI_Igatherv(send, n, of, recv, into, into_places, of, root, comm, request)
                }),
                (Kind::Scatterv, false) => {
                    ffi::MPI_Scatterv(send, counts, places, of, recv, m, of, root, comm)
                }
                (Kind::Scatterv, true) => finish(|request| {
                    ffi::MPI_Iscatterv(send, counts, places, of, recv, m, of, root, comm, request)
                }),
                (Kind::Alltoallv, false) => ffi::MPI_Alltoallv(
                    send, counts, places, of, recv, into, into_places, of, comm,
                ),
                (Kind::Alltoallv, true) => finish(|request| ffi::MPI_Ialltoallv(
                    send, counts, places, of, recv, into, into_places, of, comm, request,
                )),
                // The others have no counts.
                _ => ffi::MPI_ERR_OTHER as c_int,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_have_every_element_once() {
        let starts = starts(&[3, 0, 5, 2]);
        assert_eq!(starts, [0, 3, 3, 8, 10]);
        let whole = Blocks::whole(&[3, 0, 5, 2]);
        assert_eq!(
            (whole.counts, whole.places),
            (vec![3, 0, 5, 2], vec![0, 3, 3, 8])
        );
        let second = Blocks::within(&starts, 4..8);
        assert_eq!(
            (second.counts, second.places),
            (vec![0, 0, 4, 0], vec![0, 0, 0, 4])
        );
        let last = Blocks::within(&starts, 8..10);
        assert_eq!(last.counts, [0, 0, 0, 2]);
        let far = 1 << 40;
        let long = Blocks::within(&[0, far, far + 7], far - 2..far + 5);
        assert_eq!((long.counts, long.places), (vec![2, 5], vec![0, 2]));
    }
}
