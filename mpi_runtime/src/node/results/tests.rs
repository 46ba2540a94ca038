//! The results of two or three ranks, in one process.

use super::*;
use crate::node::segment::new_number;

fn ranks<const N: usize>() -> [Results; N] {
    let number = new_number();
    let mut all: [Board; N] = std::array::from_fn(|rank| Board::make(number, rank, N).unwrap());
    all.iter_mut().for_each(Board::open);
    all.iter().for_each(Board::unlink);
    all.map(|board| Results::new(Arc::new(board)).unwrap())
}

fn claim<'a>(results: &'a Results, input: &[u8]) -> Claim<'a> {
    match results.find(&[input]) {
        Found::Claimed(claim) => claim,
        Found::Made(..) => panic!("another rank has made it"),
        Found::Alone => panic!("it is not shared"),
    }
}

fn made(results: &Results, input: &[u8]) -> Option<(usize, Vec<u8>)> {
    match results.find(&[input]) {
        Found::Made(owner, bytes) => Some((owner, bytes)),
        Found::Alone => None,
        Found::Claimed(_) => panic!("no rank has claimed it"),
    }
}

fn used(results: &Results) -> usize {
    let places = results.board.results().iter();
    let used = places.filter(|place| place.claim.load(Ordering::SeqCst) != 0);
    used.count()
}

#[test]
fn the_first_makes_it_and_the_others_get_it() {
    let [first, second, third] = ranks();
    let own = claim(&first, b"program");
    assert!(matches!(first.find(&[b"program"]), Found::Alone));
    // The same bytes in other parts are another input.
    drop(claim(&first, b""));
    assert!(matches!(first.find(&[b"pro", b"gram"]), Found::Claimed(_)));
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| made(&second, b"program"));
        std::thread::sleep(Duration::from_millis(20));
        own.publish(b"code").unwrap();
        assert_eq!(waits.join().unwrap(), Some((0, b"code".to_vec())));
    });
    assert_eq!(made(&third, b"program"), Some((0, b"code".to_vec())));
    // All have it, so its memory is free, and its place at the next look.
    let own = first.own.lock();
    assert_eq!(own[0]._file.metadata().unwrap().len(), 0);
    drop(own);
    drop(claim(&first, b"next"));
    assert_eq!(used(&first), 0);
}

#[test]
fn who_fails_leaves_it_to_the_others() {
    let [first, second] = ranks();
    let own = claim(&first, b"program");
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| made(&second, b"program"));
        std::thread::sleep(Duration::from_millis(20));
        drop(own);
        assert_eq!(waits.join().unwrap(), None);
    });
    drop(claim(&second, b"program"));
    assert_eq!(used(&first), 0);
}

#[test]
fn nobody_waits_for_one_that_has_ended_or_waits_itself() {
    let [first, second] = ranks();
    let own = claim(&first, b"program");
    first.board.show_waiting(Duration::from_secs(5));
    let start = Instant::now();
    assert_eq!(made(&second, b"program"), None);
    assert!(start.elapsed() >= MAY_WAIT_FOR_US);
    first.board.show_waiting(Duration::ZERO);
    first.board.leave();
    let start = Instant::now();
    assert_eq!(made(&second, b"program"), None);
    assert!(start.elapsed() < MAY_WAIT_FOR_US);
    second.free_those_of_the_dead();
    assert_eq!(used(&second), 0);
    drop(own);
}

#[test]
fn nobody_waits_for_ever() {
    let [first, mut second] = ranks();
    second.longest = Duration::from_millis(100);
    let _own = claim(&first, b"program");
    assert_eq!(made(&second, b"program"), None);
}

#[test]
fn another_input_of_the_same_hash_is_seen() {
    let [first, second] = ranks();
    let own = claim(&first, b"program");
    let (place, number) = (own.place, own.claim);
    own.publish(b"code").unwrap();
    let other = joined(&[b"another"]);
    assert!(matches!(
        second.of_other(place, number, &other),
        Found::Alone
    ));
}

#[test]
fn a_descriptor_of_something_else_is_not_read() {
    let [first, second] = ranks();
    let own = claim(&first, b"program");
    let place = own.place;
    own.publish(b"code").unwrap();
    let shared = &second.board.results()[place];
    shared.file.store(1, Ordering::SeqCst);
    assert_eq!(made(&second, b"program"), None);
    shared.file.store(1 << 20, Ordering::SeqCst);
    assert_eq!(made(&second, b"program"), None);
}

#[test]
fn what_nobody_asks_for_is_bounded() {
    let [first, second] = ranks();
    for number in 0..3 * RESULTS {
        let own = claim(&first, &number.to_le_bytes());
        own.publish(b"code").unwrap();
    }
    assert_eq!(used(&second), MOST_FILES);
    assert_eq!(first.own.lock().len(), MOST_FILES);
    assert!(made(&second, &(3 * RESULTS - 1).to_le_bytes()).is_some());
    let large = vec![1; first.most_bytes()];
    assert!(claim(&first, b"large").publish(&large).is_err());
    assert!(matches!(first.find(&[&large]), Found::Alone));
    // The one that was taken has been let go of.
    assert_eq!(used(&second), MOST_FILES - 1);
}

#[test]
fn what_was_cut_off_meanwhile_is_not_taken() {
    let [first, second] = ranks();
    claim(&first, b"program").publish(b"code").unwrap();
    // As another thread that took it: the last rank frees its memory.
    assert_eq!(made(&second, b"program"), Some((0, b"code".to_vec())));
    assert_eq!(made(&second, b"program"), None);
    let own = claim(&first, b"another");
    let input = own.input.clone();
    own.publish(b"code").unwrap();
    let length = (HEAD + input.len() + 3) as u64;
    let cut = |own: &Own| own._file.set_len(length).unwrap();
    first.own.lock().back().map(cut).unwrap();
    assert_eq!(made(&second, b"another"), None);
}
