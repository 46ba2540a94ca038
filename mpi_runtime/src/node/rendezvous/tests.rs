//! Ranks that are threads, or one after the other.

use super::*;
use crate::node::segment::new_number;
use std::sync::Barrier;

fn three() -> Vec<Rendezvous> {
    let name = new_number();
    let first = Rendezvous::create(name, 3).unwrap();
    assert!(Rendezvous::create(name, 3).is_err());
    assert!(Rendezvous::open(name, 1, 4).is_err());
    let others = (1..3).map(|rank| Rendezvous::open(name, rank, 3).unwrap());
    let all: Vec<Rendezvous> = std::iter::once(first).chain(others).collect();
    all[0].unlink();
    assert!(Rendezvous::open(name, 1, 3).is_err());
    all
}

fn meet(rank: &Rendezvous, mark: u64) -> bool {
    rank.meet(|| true, || Some((mark, 0)))
}

#[test]
fn who_is_not_free_does_not_arrive() {
    let ranks = three();
    for rank in &ranks[1..] {
        rank.slot(rank.rank, 9).write(9, 0);
    }
    assert!(!ranks[0].meet(|| false, || Some((9, 0))));
    assert!(ranks[0].slot(0, 9).read(9).is_none());
    assert_ne!(ranks[0].paused_until.load(Ordering::Relaxed), 0);
}

#[test]
fn nobody_meets_those_who_have_not_come() {
    let ranks = three();
    assert!(!meet(&ranks[0], 5));
    assert!(!ranks[1].look(5));
    ranks[1].slot(1, 5).write(5, 0);
    assert!(!ranks[0].look(5));
    assert!(meet(&ranks[2], 5));
    // The others see it now, and nobody is at another mark, even in the same slot.
    assert!(ranks[0].look(5) && ranks[1].look(5));
    assert!(!ranks[0].look(5 + MARKS as u64));
}

#[test]
fn nobody_meets_those_who_have_withdrawn() {
    let ranks = three();
    for rank in &ranks[1..] {
        rank.slot(rank.rank, 6).write(6, 0);
    }
    ranks[2].withdraw();
    assert!(!meet(&ranks[0], 6));
    assert!(ranks[1].slot(1, 6).read(6).is_some());
}

#[test]
fn who_runs_ahead_is_still_seen() {
    let ranks = three();
    for rank in &ranks[1..] {
        for mark in 1..8 {
            rank.slot(rank.rank, mark).write(mark, 0);
        }
    }
    for mark in 1..8 {
        assert!(meet(&ranks[0], mark));
    }
}

#[test]
fn balances_must_add_up_to_nothing() {
    let ranks = three();
    ranks[0].slot(0, 7).write(7, 5);
    ranks[1].slot(1, 7).write(7, 2u64.wrapping_neg());
    assert!(!meet(&ranks[2], 7));
    assert!(ranks[1].slot(2, 7).read(7) == Some(0) && ranks[1].slot(2, 7).read(8).is_none());
    ranks[2].slot(2, 7).write(7, 3u64.wrapping_neg());
    assert!(ranks[0].look(7) && ranks[1].look(7));
}

#[test]
fn an_earlier_arrival_with_the_same_mark_is_waited_out() {
    let ranks = three();
    for rank in &ranks[1..] {
        rank.slot(rank.rank, 3).write(3, 4);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for rank in &ranks[1..] {
                rank.slot(rank.rank, 3).write(3, 0);
            }
        });
        // However late that thread comes.
        while !ranks[0].look(3) {
            ranks[0].slot(0, 3).write(3, 0);
        }
    });
}

#[test]
fn after_failures_all_look_again_at_the_same_moment() {
    let ranks = three();
    for (failures, rank) in ranks.iter().enumerate() {
        for _ in 0..=failures {
            rank.pause(1000 * PAUSE + 17 * failures as u64);
        }
    }
    let until = |rank: &Rendezvous| rank.paused_until.load(Ordering::Relaxed);
    assert_eq!(until(&ranks[0]), 1001 * PAUSE);
    assert_eq!(until(&ranks[1]), 1002 * PAUSE);
    assert_eq!(until(&ranks[2]), 1004 * PAUSE);
    for _ in 0..40 {
        ranks[0].pause(1000 * PAUSE);
    }
    assert_eq!(until(&ranks[0]), 1024 * PAUSE);
}

#[test]
fn who_looked_in_vain_waits_and_looks_again() {
    let ranks = three();
    assert!(ranks[0].may_look() && !meet(&ranks[0], 1));
    ranks[0].pause(now() + 3_600_000_000_000);
    assert!(!ranks[0].may_look());
    ranks[0].paused_until.store(now(), Ordering::Relaxed);
    assert!(ranks[0].may_look() && ranks[0].may_look());
}

#[test]
fn ranks_in_step_meet_every_time() {
    let (ranks, barrier) = (three(), Barrier::new(3));
    std::thread::scope(|scope| {
        for rank in &ranks {
            let barrier = &barrier;
            scope.spawn(move || {
                for mark in 1..50 {
                    rank.slot(rank.rank, mark).write(mark, 0);
                    barrier.wait();
                    assert!(rank.look(mark));
                    barrier.wait();
                }
            });
        }
    });
}
