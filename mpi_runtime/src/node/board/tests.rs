//! Two boards of one process, which read each other.

use super::layout::TEXT;
use super::*;
use crate::node::segment::new_number;

fn pair() -> [Board; 2] {
    let number = new_number();
    let mut both = [0, 1].map(|rank| Board::make(number, rank, 3).unwrap());
    both.iter_mut().for_each(Board::open);
    both.iter().for_each(Board::unlink);
    both
}

#[test]
fn a_rank_reads_what_another_has_written_and_nothing_else() {
    let [first, second] = pair();
    assert!(first.sees(0) && first.sees(1) && !first.sees(2));
    let lane = second.take_lane(9, 0).unwrap();
    assert_eq!(second.take_lane(8, 0), Some(lane + 1));
    assert_eq!(first.find_lane(1, 9), Some(lane));
    assert_eq!(first.find_lane(1, 7), None);
    assert_eq!(first.read(1, lane, 1), None);
    second.write(lane, 1, [1, 2, 3, 4]);
    assert_eq!(first.read(1, lane, 1), Some([1, 2, 3, 4]));
    assert_eq!(first.read(1, lane, 1 + RING), None);
    second.write_text(33, "allreduce");
    assert_eq!(first.text(1, 33).as_deref(), Some("allreduce"));
    assert_eq!(first.text(1, 34), None);
    for key in 34..33 + TEXTS as u64 {
        second.write_text(key, &"x".repeat(2 * TEXT));
        assert_eq!(first.text(1, key).unwrap().len(), TEXT);
        assert!(first.text(1, 33).is_some());
    }
    second.write_text(3, "the next one has no room beside the others");
    assert_eq!(first.text(1, 33), None);
}

#[test]
fn what_one_has_heard_of_other_nodes_the_others_know() {
    let [first, second] = pair();
    second.show_gone_elsewhere(2, 1);
    second.show_gone_elsewhere(3, 2);
    second.show_gone_elsewhere(ELSEWHERE, 2);
    assert!(!first.waits_elsewhere());
    second.show_waits_elsewhere(true);
    assert!(first.waits_elsewhere());
    let of = |rank| [first.gone_elsewhere(rank), second.gone_elsewhere(rank)];
    assert_eq!(
        [2, 3, 1, ELSEWHERE].map(of),
        [[1; 2], [2; 2], [0; 2], [0; 2]]
    );
    // Another one speaks for this node since.
    first.show_gone_elsewhere(2, 2);
    first.show_gone_elsewhere(3, 0);
    assert_eq!([2, 3, 1].map(of), [[2; 2], [0; 2], [0; 2]]);
}

#[test]
fn who_has_left_and_still_waits_has_not_ended() {
    let [first, second] = pair();
    second.show_waiting(Duration::from_secs(1));
    second.leave();
    assert!(first.gone(1).is_some() && first.ended(1).is_none());
    second.show_waiting(Duration::ZERO);
    assert_eq!(first.ended(1), Some("has ended its program"));
}

#[test]
fn who_has_left_is_gone() {
    let [first, second] = pair();
    assert_eq!(first.gone(1), None);
    assert!(!second.has_left(1));
    second.leave();
    assert!(second.has_left(1) && !first.has_left(0));
    assert_eq!(first.gone(1), Some("has ended its program"));
    let shown = first.of(1);
    shown.left.store(0, Ordering::SeqCst);
    shown.process[1].store(1, Ordering::SeqCst);
    assert_eq!(first.gone(1), Some("has died"));
}
