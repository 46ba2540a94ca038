//! Ranks as threads, each with a board of its own.

use std::sync::Barrier;

use mpi_shim_abi::{Kind, Reduction};

use super::*;
use crate::buffer::{Buffer, ElementType};
use crate::engine::check;
use crate::mpi::communicators::WORLD;
use crate::node::segment::new_number;

const RANKS: usize = 3;
/// The handle of the communicator that the replica group of all ranks has.
const OF_ALL: u64 = 7;

fn boards() -> Vec<Arc<Board>> {
    let number = new_number();
    let mut boards: Vec<_> = (0..RANKS)
        .map(|rank| Board::make(number, rank, RANKS).unwrap())
        .collect();
    boards.iter_mut().for_each(Board::open);
    boards.iter().for_each(Board::unlink);
    boards.into_iter().map(Arc::new).collect()
}

/// One rank: its comparison, and the launch that it is in.
struct Rank {
    comparison: Comparison,
    rank: i32,
    launch: u32,
}

impl Rank {
    fn comm(&self) -> Communicator {
        Communicator {
            name: "test",
            handle: 0,
            user_handle: 0,
            rank: self.rank,
            size: RANKS as i32,
            members: &[],
            largest_tag: 0,
            freed: false,
        }
    }

    /// Executes a collective on `comm`: what is said against it.
    fn run(&self, comm: i64, op: Operation<'_>) -> Result<(), String> {
        let prepared = check::prepare(&op, &self.comm());
        let members = || Some((0..RANKS as i32).collect());
        let ticket = Ticket(self.launch);
        let op = Operation { comm, ..op };
        let compared =
            self.comparison
                .operation(ticket, &op, &self.comm(), prepared.as_ref(), members);
        compared
            .and(prepared.map(drop))
            .map_err(|reason| reason.to_string())
    }

    fn allreduce(&self, count: i64, reduction: Reduction) -> Result<(), String> {
        let shape = [count];
        let x = Buffer::described(ElementType::F32, &shape);
        let op = Operation::new(Kind::Allreduce, WORLD, x, x);
        self.run(
            WORLD,
            Operation {
                reduction: Some(reduction),
                ..op
            },
        )
    }

    /// Executes a collective of XLA's at that place, on the communicator of a replica group, of all
    /// ranks if it has that handle.
    fn xlas(
        &self,
        group: i64,
        handle: u64,
        reduction: Reduction,
        place: u64,
    ) -> Result<(), String> {
        let x = Buffer::described(ElementType::F32, &[4]);
        let op = Operation {
            of: Some(OF_XLA),
            reduction: Some(reduction),
            place,
            ..Operation::new(Kind::Allreduce, group, x, x)
        };
        let comm = Communicator {
            handle,
            ..self.comm()
        };
        let prepared = check::prepare(&op, &comm).unwrap();
        let members = || Some((0..RANKS as i32).collect());
        let ticket = Ticket(self.launch);
        let compared = self
            .comparison
            .operation(ticket, &op, &comm, Ok(&prepared), members);
        compared.map_err(|reason| reason.to_string())
    }

    fn barrier(&self) -> Result<(), String> {
        let op = Operation::new(Kind::Barrier, WORLD, Buffer::NONE, Buffer::NONE);
        self.run(WORLD, op)
    }

    /// Of its launch the collectives are known, though it is compared one by one.
    fn knows(&self, sequence: u64) {
        let mut launches = self.comparison.launches.lock();
        let launch = launches
            .iter_mut()
            .find(|(ticket, _)| ticket.0 == self.launch);
        launch.unwrap().1.collectives = Some(KnownCollectives {
            program: "step",
            comm: WORLD,
            sequence,
        });
    }

    /// Begins a launch of a fixed sequence, if it is one.
    fn launches(&mut self, sequence: Option<u64>) {
        self.comparison.forget(Ticket(self.launch));
        self.launch += 1;
        let uniform = sequence.map(|sequence| UniformProgram {
            comm: WORLD,
            sequence,
            balance: None,
        });
        let launch = Launch {
            collectives: None,
            uniform,
            by_main_thread: true,
        };
        self.comparison.note(Ticket(self.launch), launch);
    }
}

/// What each rank gets from `program`.
fn on_all<T: Send>(program: impl Fn(&mut Rank) -> T + Sync) -> Vec<T> {
    let program = &program;
    let ended = Barrier::new(RANKS);
    std::thread::scope(|scope| {
        let ranks = boards().into_iter().enumerate().map(|(rank, board)| {
            let ended = &ended;
            scope.spawn(move || {
                let comparison = Comparison::new(board.clone(), RANKS as i32, Some(OF_ALL));
                let mut rank = Rank {
                    comparison,
                    rank: rank as i32,
                    launch: 0,
                };
                rank.launches(None);
                let result = program(&mut rank);
                board.leave();
                ended.wait();
                result
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn ranks_that_do_the_same_go_on() {
    let results = on_all(|rank| {
        for round in 0..200 {
            rank.allreduce(round, Reduction::Sum)?;
            rank.barrier()?;
        }
        Ok::<_, String>(())
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn ranks_that_differ_hear_what_each_does_and_may_go_on() {
    let results = on_all(|rank| {
        let error = match rank.rank {
            0 => rank.barrier(),
            _ => rank.allreduce(3, Reduction::Sum),
        };
        rank.allreduce(4, Reduction::Max)?;
        Ok::<_, String>(error.unwrap_err())
    });
    for result in results {
        let text = result.unwrap();
        let both = "Rank 0: barrier. Ranks 1-2: allreduce of float32[3] with SUM. All";
        assert!(text.contains(both), "{text}");
    }
}

#[test]
fn counts_and_reductions_are_compared() {
    for differ in [1, 2] {
        let results = on_all(|rank| match (rank.rank, differ) {
            (2, 1) => rank.allreduce(5, Reduction::Sum),
            (2, 2) => rank.allreduce(4, Reduction::Prod),
            _ => rank.allreduce(4, Reduction::Sum),
        });
        assert!(results.iter().all(Result::is_err), "{results:?}");
    }
}

#[test]
fn a_refusal_reaches_the_others_and_waits_for_nobody() {
    let results = on_all(|rank| {
        // There is no SUM of so few bits.
        let refused = Buffer::described(ElementType::Other, &[0]);
        let op = Operation::new(Kind::Bcast, WORLD, refused, refused);
        let error = match rank.rank {
            1 => rank.run(WORLD, op),
            _ => rank.barrier(),
        };
        for _ in 0..10 {
            rank.barrier()?;
        }
        Ok::<_, String>(error.unwrap_err())
    });
    for (rank, result) in results.into_iter().enumerate() {
        let text = result.unwrap();
        assert!(text.contains("not supported"), "{text}");
        assert!(rank == 1 || text.contains("which it refused"), "{text}");
    }
}

#[test]
fn what_a_program_refuses_reaches_those_that_wait_in_it() {
    let refuses = |rank: &Rank| {
        let words = "barrier, which it refused: bad";
        rank.comparison
            .refuse_unlaunched(WORLD, Kind::Barrier, words);
    };
    let results = on_all(|rank| {
        for launched in [None, Some(7)] {
            let error = match rank.rank {
                0 => {
                    // Not while something that was launched before has not ended.
                    rank.allreduce(3, Reduction::Sum)?;
                    refuses(rank);
                    rank.launches(None);
                    Err("refused: bad".into())
                }
                _ => {
                    rank.allreduce(3, Reduction::Sum)?;
                    rank.launches(launched);
                    rank.barrier()
                }
            };
            assert!(error.unwrap_err().contains("refused: bad"));
            rank.launches(None);
            rank.barrier()?;
        }
        Ok::<_, String>(())
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn what_a_program_refuses_may_be_nothing_to_the_others() {
    let results = on_all(|rank| {
        for round in 0..60 {
            // More often on some ranks, also than there is room for.
            for _ in 0..(round + 3 * rank.rank) % 7 {
                let words = "scatter, which it refused";
                rank.comparison
                    .refuse_unlaunched(WORLD, Kind::Scatter, words);
            }
            rank.launches((round % 3 == 0).then_some(round as u64));
            rank.allreduce(round.into(), Reduction::Sum)?;
            if round % 2 == rank.rank {
                rank.launches(None);
            }
        }
        Ok::<_, String>(())
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn launches_of_the_same_sequence_are_compared_once() {
    let results = on_all(|rank| {
        rank.launches(Some(7));
        // Only one is compared, so that these differ goes unseen.
        rank.allreduce(3, Reduction::Sum)?;
        rank.allreduce(4 + i64::from(rank.rank), Reduction::Sum)?;
        rank.launches(None);
        Ok::<_, String>(rank.allreduce(4 + i64::from(rank.rank), Reduction::Sum))
    });
    for result in results {
        assert!(result.unwrap().is_err());
    }
}

#[test]
fn a_launch_of_a_sequence_leaves_one_record_for_all_its_operations() {
    let results = on_all(|rank| {
        let board = rank.comparison.board().unwrap().clone();
        let (own, lane) = (rank.rank as usize, WORLD as usize);
        let has_written = |records: u64| {
            let is_there = |number| board.read(own, lane, number).is_some();
            is_there(records) && !is_there(records + 1)
        };
        let mut right = Vec::new();
        for launch in 1..=3 {
            rank.launches(Some(7));
            for _ in 0..100 {
                rank.allreduce(3, Reduction::Sum)?;
            }
            right.push(has_written(launch));
        }
        // Of other launches each operation leaves one.
        rank.launches(None);
        for operation in 1..=3 {
            rank.barrier()?;
            right.push(has_written(3 + operation));
        }
        Ok::<_, String>(right)
    });
    for result in results {
        assert_eq!(result.unwrap(), [true; 6]);
    }
}

#[test]
fn launches_of_the_same_code_that_differ_fail() {
    let results = on_all(|rank| {
        for hash in 7..9 {
            rank.comparison.describe(hash, 5, &format!("loop {hash}"));
        }
        rank.launches(Some(if rank.rank == 2 { 8 } else { 7 }));
        let error = rank.barrier().unwrap_err();
        rank.launches(Some(9));
        rank.barrier()?;
        Ok::<_, String>(error)
    });
    for result in results {
        let text = result.unwrap();
        let both = "different programs. Ranks 0-1: loop 7. Rank 2: loop 8. All";
        assert!(text.contains(both), "{text}");
    }
}

#[test]
fn different_loops_of_one_program_do_not_match() {
    let (first, second, other) = (7 << 16, 7 << 16 | 1, 8 << 16);
    let results = on_all(|rank| {
        rank.comparison.describe(first, 0, "before its loop");
        let at = |place| {
            let op = Operation::new(Kind::Barrier, WORLD, Buffer::NONE, Buffer::NONE);
            rank.run(WORLD, Operation { place, ..op })
        };
        // Of other programs, or of none.
        at([first, other, 0][rank.rank as usize])?;
        let error = at([first, other, second][rank.rank as usize]).unwrap_err();
        at(second)?;
        Ok::<_, String>(error)
    });
    for result in results {
        let text = result.unwrap();
        assert!(text.contains("Rank 0: barrier before its loop."), "{text}");
    }
}

#[test]
fn the_same_operations_from_different_programs_match() {
    let results = on_all(|rank| {
        for round in 0..50 {
            // Two operations each: in one program, in another that is compared one by one, or in
            // two programs.
            rank.launches((rank.rank == 0).then_some(round));
            rank.allreduce(3, Reduction::Sum)?;
            if rank.rank == 2 {
                rank.launches(None);
            }
            rank.allreduce(4, Reduction::Sum)?;
        }
        Ok::<_, String>(())
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn who_waits_for_a_rank_that_has_left_hears_of_it() {
    let results = on_all(|rank| match rank.rank {
        0 => {
            rank.comparison.board().unwrap().leave();
            Err("left".into())
        }
        _ => {
            let first = rank.barrier();
            assert_eq!(first, rank.barrier());
            first
        }
    });
    for result in &results[1..] {
        let text = result.as_ref().unwrap_err();
        assert!(
            text.contains("rank 0, which") && text.contains("has ended"),
            "{text}"
        );
    }
}

#[test]
fn a_users_communicator_is_compared_where_the_main_thread_uses_it() {
    let results = on_all(|rank| {
        let shape = [rank.rank.into()];
        let x = Buffer::described(ElementType::U8, &shape);
        let gather = || rank.run(1 << 61, Operation::new(Kind::Bcast, 0, x, x));
        let main = gather();
        rank.comparison.free(1 << 61);
        (main, rank.barrier())
    });
    for (main, barrier) in results {
        assert!(main.is_err() && barrier.is_ok());
    }
}

#[test]
fn either_all_ranks_of_a_users_communicator_compare_or_none() {
    // The second time the late rank comes about when the others stop to wait for it.
    for late in [1500, 1000] {
        let results = on_all(|rank| {
            let bcast = |count: i64| {
                let shape = [count];
                let x = Buffer::described(ElementType::U8, &shape);
                rank.run(1 << 61, Operation::new(Kind::Bcast, 0, x, x))
            };
            bcast(3)?;
            if rank.rank == 2 {
                std::thread::sleep(std::time::Duration::from_millis(late));
            }
            bcast(4)?;
            let differ = [5, 6].map(|count| bcast(count + i64::from(rank.rank)).is_err());
            rank.comparison.free(1 << 61);
            rank.barrier()?;
            Ok::<_, String>(differ)
        });
        let compared = results[0].clone().unwrap();
        assert!(late == 1000 || compared == [false; 2]);
        assert_eq!(compared[0], compared[1]);
        assert!(
            results.iter().all(|other| *other == Ok(compared)),
            "{results:?}"
        );
    }
}

#[test]
fn collectives_of_programs_for_several_devices_are_compared_at_their_places() {
    let group = 1 << 60;
    let (loop_1, loop_2) = (7 << 16 | 1, 7 << 16 | 2);
    for handle in [0, OF_ALL] {
        let results = on_all(|rank| {
            let last = rank.rank == 2;
            let reduction = |differs| match differs && last {
                true => Reduction::Max,
                false => Reduction::Sum,
            };
            rank.xlas(group, handle, reduction(false), loop_1)?;
            let first = rank.xlas(group, handle, reduction(true), loop_1);
            let place = if last { loop_2 } else { loop_1 };
            let second = rank.xlas(group, handle, reduction(false), place);
            // In branches, whose place is that of what they stand in.
            rank.xlas(group, handle, reduction(false), loop_2)?;
            Ok::<_, String>([first.unwrap_err(), second.unwrap_err()])
        });
        for result in results {
            let [first, second] = result.unwrap();
            let both = "float32[4] with SUM. Rank 2: XLA's allreduce of float32[4] with MAX. All";
            assert!(first.contains(both), "{first}");
            assert!(second.contains("different operations. Rank"), "{second}");
        }
    }
}

#[test]
fn a_launch_that_fails_tells_those_that_wait_in_its_next_collective() {
    const SEQUENCE: u64 = 77;
    let kinds = [Kind::Allreduce, Kind::Barrier, Kind::Barrier];
    let results = on_all(|rank| {
        rank.comparison.know_kinds(SEQUENCE, &kinds);
        // As many of its collectives as are executed before it fails on rank 0.
        for executed in [0, 1, 2, 3, 0, 0, 0, 0, 0, 0] {
            rank.launches(None);
            rank.knows(SEQUENCE);
            let run = |place: usize| match kinds[place] {
                Kind::Allreduce => rank.allreduce(3, Reduction::Sum),
                _ => rank.barrier(),
            };
            for place in 0..executed {
                run(place)?;
            }
            if rank.rank == 0 {
                let ticket = Ticket(rank.launch);
                rank.comparison.launch_failed(ticket, "bad\nand more");
            } else if executed < kinds.len() {
                let error = run(executed).unwrap_err();
                let words = "before which its launch of step failed: bad. ";
                assert!(error.contains(words), "{error}");
            }
        }
        rank.launches(None);
        rank.allreduce(4, Reduction::Sum)?;
        rank.barrier()
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn a_launch_whose_collective_has_failed_tells_nothing() {
    const SEQUENCE: u64 = 78;
    let kinds = [Kind::Allreduce, Kind::Allreduce];
    let results = on_all(|rank| {
        rank.comparison.know_kinds(SEQUENCE, &kinds);
        rank.launches(None);
        rank.knows(SEQUENCE);
        let error = rank.allreduce(3 + i64::from(rank.rank), Reduction::Sum);
        rank.comparison
            .launch_failed(Ticket(rank.launch), &error.unwrap_err());
        rank.launches(None);
        rank.allreduce(4, Reduction::Sum)
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn a_launch_that_fails_before_its_turn_tells_nothing_before_it() {
    const SEQUENCE: u64 = 79;
    let results = on_all(|rank| {
        rank.comparison.know_kinds(SEQUENCE, &[Kind::Barrier]);
        rank.launches(None);
        if rank.rank == 0 {
            let (first, second) = (rank.launch, rank.launch + 1);
            let launch = rank.comparison.launches.lock()[0].1;
            rank.comparison.note(Ticket(second), launch);
            rank.launch = second;
            rank.knows(SEQUENCE);
            rank.comparison.launch_failed(Ticket(second), "bad");
            rank.comparison.forget(Ticket(second));
            rank.launch = first;
            rank.barrier()?;
            rank.launches(None);
        } else {
            rank.barrier()?;
            rank.launches(None);
            assert!(rank.barrier().unwrap_err().contains("failed: bad"));
        }
        rank.barrier()
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn a_program_that_begins_does_not_match_a_collective_of_another() {
    let results = on_all(|rank| {
        let begin = || {
            rank.comparison
                .launch(Ticket(rank.launch), 9, || "all-reduce f32[4] SUM".into())
        };
        begin().map_err(|reason| reason.to_string())?;
        let error = match rank.rank {
            0 => begin().map(drop).map_err(|reason| reason.to_string()),
            _ => rank.xlas(1 << 60, OF_ALL, Reduction::Sum, 7 << 16),
        };
        begin().map_err(|reason| reason.to_string())?;
        Ok::<_, String>(error.unwrap_err())
    });
    for result in results {
        let text = result.unwrap();
        let both = "Rank 0: all-reduce f32[4] SUM. Ranks 1-2: XLA's allreduce of float32[4]";
        assert!(text.contains(both), "{text}");
    }
}
