use mpi_shim_abi::{Datatype, Reduction};

use super::*;
use crate::node::segment::new_number;

fn memories(size: usize) -> Vec<ShmCollective> {
    let number = new_number();
    let first = ShmCollective::create(number, size).unwrap();
    let others = (1..size).map(|rank| ShmCollective::open(number, rank, size).unwrap());
    let all = std::iter::once(first).chain(others).collect::<Vec<_>>();
    all[0].unlink();
    all
}

fn allreduce(combine: Combine, in_slices: bool, length: usize) -> Collective {
    Collective {
        givers: Who::All,
        takers: Who::All,
        divided: false,
        length,
        combine: Some(combine),
        in_slices,
    }
}

/// What rank `rank` has in the collective of that number.
fn operand(rank: usize, number: usize, length: usize) -> Vec<u8> {
    let value = |i: usize| ((i * 7 + rank * 3 + number) % 1000) as f32 * 0.37;
    (0..length).flat_map(|i| value(i).to_ne_bytes()).collect()
}

fn sum(size: usize, number: usize, length: usize) -> Vec<u8> {
    let rows: Vec<_> = (0..size)
        .map(|rank| operand(rank, number, length))
        .collect();
    let number = |row: &Vec<u8>, i: usize| f32::from_ne_bytes(row.as_chunks().0[i]);
    (0..length)
        .flat_map(|i| {
            let first = number(&rows[0], i);
            let sum = rows[1..]
                .iter()
                .fold(first, |sum, row| sum + number(row, i));
            sum.to_ne_bytes()
        })
        .collect()
}

#[test]
fn all_ranks_get_the_same_bits_in_any_sequence_of_lengths() {
    let combine = Combine::of(Reduction::Sum, Datatype::F32).unwrap();
    for size in [2, 3, 5, MOST_RANKS] {
        let lengths = [
            1, 3, 400_000, 16, 17, 5, 65_536, 65_537, 1, 2, 1_050_001, 131_073, 15, 1, 1, 1, 1,
        ];
        let memories = memories(size);
        std::thread::scope(|scope| {
            for (rank, memory) in memories.iter().enumerate() {
                scope.spawn(move || {
                    for (number, &length) in lengths.iter().enumerate() {
                        let send = operand(rank, number, length);
                        let mut recv = vec![0; send.len()];
                        // Both ways, also of short arrays.
                        let whole = length < 1000 && !number.is_multiple_of(3);
                        memory.execute(&allreduce(combine, !whole, send.len()), &send, &mut recv);
                        assert!(recv == sum(size, number, length), "{size} {number}");
                    }
                });
            }
        });
    }
}

#[test]
fn a_rank_that_is_late_or_ahead_reads_and_writes_what_is_meant() {
    let combine = Combine::of(Reduction::Max, Datatype::I64).unwrap();
    let memories = memories(3);
    std::thread::scope(|scope| {
        for (rank, memory) in memories.iter().enumerate() {
            scope.spawn(move || {
                for number in 0..200usize {
                    if (number + rank).is_multiple_of(17) {
                        std::thread::sleep(std::time::Duration::from_millis(2));
                    }
                    let length = if number.is_multiple_of(2) { 3 } else { 40_000 };
                    let value = |rank: usize| (rank * 1000 + number) as i64;
                    let send = value(rank).to_ne_bytes().repeat(length);
                    let mut recv = vec![0; send.len()];
                    memory.execute(
                        &allreduce(combine, length != 3, send.len()),
                        &send,
                        &mut recv,
                    );
                    assert!(recv == value(2).to_ne_bytes().repeat(length));
                }
            });
        }
    });
}

#[test]
fn slices_are_the_whole_block() {
    for size in 2..=MOST_RANKS {
        for length in [0, 4, 63, 64, 65, 1000, BLOCK - 8, BLOCK] {
            let slices: Vec<_> = (0..size).map(|rank| slice(length, size, rank)).collect();
            assert_eq!(slices[0].start, 0);
            assert_eq!(slices[size - 1].end, length);
            assert!(slices.windows(2).all(|pair| pair[0].end == pair[1].start));
            let longest = longest_slice(BLOCK, size);
            assert!(slices.iter().all(|slice| slice.len() <= longest));
        }
    }
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    assert!(ShmCollective::open(new_number(), 1, 2).is_err());
    assert!(ShmCollective::create(new_number(), 1 << 40).is_err());
}

/// Bytes that rank `rank` has in the collective of that number.
fn bytes_of(rank: usize, number: usize, length: usize) -> Vec<u8> {
    let byte = |i: usize| (i * 7 + i / 251 + rank * 31 + number * 3) as u8;
    (0..length).map(byte).collect()
}

/// What `what` is by definition: the operand and the result of `rank`. A reduction is of the sums
/// of all, in `f32`.
fn by_definition(what: &Collective, size: usize, rank: usize, number: usize) -> [Vec<u8>; 2] {
    let parts = if what.divided { size } else { 1 };
    let operand = |rank: usize| match (what.givers.has(rank), what.combine) {
        (false, _) => Vec::new(),
        (true, None) => bytes_of(rank, number, parts * what.length),
        (true, Some(_)) => operand(rank, number, parts * what.length / 4),
    };
    let mine = if what.divided { rank * what.length } else { 0 };
    let place = mine..mine + what.length;
    let result = match what.combine {
        _ if !what.takers.has(rank) => Vec::new(),
        Some(_) => sum(size, number, parts * what.length / 4)[place].to_vec(),
        None => (0..size)
            .filter(|&giver| what.givers.has(giver))
            .flat_map(|giver| operand(giver)[place.clone()].to_vec())
            .collect(),
    };
    [operand(rank), result]
}

/// All collectives, of the root `root`.
fn all_of_them(root: usize, length: usize) -> Vec<Collective> {
    let combine = Combine::of(Reduction::Sum, Datatype::F32);
    let moved = |givers, takers, divided| Collective {
        givers,
        takers,
        divided,
        length,
        combine: None,
        in_slices: false,
    };
    let reduced = |takers, divided, in_slices| Collective {
        combine,
        in_slices,
        ..moved(Who::All, takers, divided)
    };
    let mut all = vec![
        moved(Who::All, Who::All, false),
        moved(Who::All, Who::All, true),
        moved(Who::One(root), Who::AllBut(root), false),
        moved(Who::One(root), Who::All, true),
        moved(Who::All, Who::One(root), false),
        moved(Who::All, Who::All, false),
    ];
    if length.is_multiple_of(4) {
        all.extend([
            reduced(Who::All, true, false),
            reduced(Who::All, false, true),
            reduced(Who::One(root), false, true),
            reduced(Who::One(root), false, false),
            reduced(Who::All, false, false),
        ]);
    }
    all
}

/// Ranks are late and ahead, and all collectives follow each other in many orders.
fn in_many_orders(size: usize, rounds: usize, lengths: &[usize]) {
    let memories = memories(size);
    std::thread::scope(|scope| {
        for (rank, memory) in memories.iter().enumerate() {
            scope.spawn(move || {
                for number in 0..rounds {
                    let length = lengths[number * 5 % lengths.len()];
                    let all = all_of_them(number % size, length);
                    let what = all[(number * 7 + number / 11) % all.len()];
                    let [send, want] = by_definition(&what, size, rank, number);
                    if (number + 3 * rank).is_multiple_of(13) {
                        std::thread::sleep(std::time::Duration::from_micros(300));
                    }
                    let mut recv = vec![7; want.len()];
                    memory.execute(&what, &send, &mut recv);
                    assert!(
                        recv == want,
                        "{size} ranks, {length} bytes, collective {number}"
                    );
                }
            });
        }
    });
}

#[test]
fn short_collectives_of_all_kinds_in_many_orders() {
    for size in [2, 3, 4, MOST_RANKS] {
        in_many_orders(size, 400, &[0, 4, 1, 64, 60, 3, 128, 68, 1000, 4096]);
    }
}

#[test]
fn long_collectives_of_all_kinds_in_many_orders() {
    const SHORTER: usize = BLOCK / 4;
    let lengths = [
        BLOCK,
        4,
        BLOCK - 4,
        BLOCK + 4,
        BLOCK + 1,
        3 * BLOCK + 12,
        SHORTER,
        SHORTER + 1,
        SHORTER + 64,
        6 * BLOCK,
    ];
    for size in [2, 3] {
        in_many_orders(size, 44, &lengths);
    }
}

#[test]
fn results_that_are_written_past_the_caches() {
    in_many_orders(2, 22, &[LONG + 4, LONG / 2 + 4, LONG + 1]);
}
