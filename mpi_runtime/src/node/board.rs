//! The board: what each rank of a node shows the others, in memory that all of them have. Each
//! rank writes to a segment of its own and reads those of the others, so nothing is sent.
//!
//! A board has lanes, one for each communicator. In its lane a rank leaves records of what it is
//! about to do, numbered from 1 on, in a ring. What they mean is the business of
//! `engine/compare/`.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::node::bell::Bell;
use crate::node::process::Process;
use crate::node::segment::{Atomics, Segment, SegmentName};

/// Lanes of a rank.
pub(crate) const LANES: usize = 128;
/// Records that a lane keeps. A rank writes one only after it has seen those of all others before,
/// and two at most without an answer, so none is overwritten before it is read.
const RING: u64 = 8;
/// Numbers in a record.
pub(crate) const RECORD: usize = 4;
/// Texts that a rank keeps, and the bytes of one.
const TEXTS: u64 = 16;
const TEXT: usize = 504;

/// A record on a cache line of its own; its number is written last.
#[repr(C, align(64))]
struct Slot {
    number: AtomicU64,
    words: [AtomicU64; RECORD],
}

#[repr(C, align(64))]
struct Lane {
    /// The channel that it belongs to; 0 if it is free.
    channel: AtomicU64,
    slots: [Slot; RING as usize],
}

/// Bytes that a rank may tell of what it does.
const ANSWER: usize = 8 << 10;

/// What a rank tells of what it does, to those that ask.
#[repr(C)]
struct Answer {
    /// Raised by whoever asks.
    question: AtomicU64,
    answered: AtomicU64,
    /// How long its operation has waited that has waited longest, in milliseconds.
    waiting: AtomicU64,
    bytes: [AtomicU64; ANSWER / size_of::<u64>()],
}

/// Ranks of which a board can show that they have gone, of all nodes; no more are told of.
const ELSEWHERE: usize = 16 << 10;
/// Numbers below 4 in a word.
const IN_WORD: usize = u64::BITS as usize / 2;

/// Words for people; the key says what of, and is written last.
#[repr(C)]
struct Text {
    key: AtomicU64,
    bytes: [AtomicU64; TEXT / size_of::<u64>()],
}

/// What a rank shows.
#[repr(C)]
struct Shown {
    /// Other than 0 once the rank has left, or is about to.
    left: AtomicU64,
    /// Its process, by [`Process`].
    process: [AtomicU64; 3],
    /// Rung when there is something new for those that sleep.
    bell: Bell,
    /// Rung by whoever sends a message to this rank.
    messages: Bell,
    answer: Answer,
    /// Which ranks of other nodes have gone and how, as far as this rank has heard.
    elsewhere: [AtomicU64; ELSEWHERE / IN_WORD],
    /// Other than 0 while an operation of another node waits, as far as this rank has heard.
    waits_elsewhere: AtomicU64,
    texts: [Text; TEXTS as usize],
    lanes: [Lane; LANES],
}

// SAFETY: it has atomics, arrays of them, and structs of them.
unsafe impl Atomics for Shown {}

/// The boards of the ranks of this node that share memory with this one.
pub struct Board {
    number: u64,
    rank: usize,
    /// By rank in the world; its own among them, if it could be made.
    all: Vec<Option<Segment>>,
}

impl Board {
    /// Makes the board of `rank`. All ranks of `size` call this with the same number, then, when
    /// all have, [`Board::open`], and then [`Board::unlink`].
    pub fn make(number: u64, rank: usize, size: usize) -> io::Result<Board> {
        let mut all: Vec<_> = (0..size).map(|_| None).collect();
        let own = Segment::create(name(number, rank), size_of::<Shown>(), |_| true)?;
        let shown = own.atomics::<Shown>(0);
        for (word, value) in shown.process.iter().zip(Process::own().words()) {
            word.store(value, Ordering::SeqCst);
        }
        all[rank] = Some(own);
        Ok(Board { number, rank, all })
    }

    /// Maps those of the other ranks of this node.
    pub fn open(&mut self) {
        for rank in (0..self.all.len()).filter(|&rank| rank != self.rank) {
            let fits = |bytes| bytes == size_of::<Shown>();
            self.all[rank] = Segment::open(name(self.number, rank), fits).ok();
        }
    }

    /// Takes the name of the own one away, once all ranks have mapped it.
    pub fn unlink(&self) {
        if let Some(own) = &self.all[self.rank] {
            own.unlink();
        }
    }

    /// This rank, in the world.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// Whether this rank sees that one.
    pub(crate) fn sees(&self, rank: usize) -> bool {
        self.all.get(rank).is_some_and(Option::is_some)
    }

    /// The other ranks that this one sees.
    pub(crate) fn others(&self) -> impl Iterator<Item = usize> {
        (0..self.all.len()).filter(|&rank| rank != self.rank && self.sees(rank))
    }

    /// How many ranks this one sees, itself among them.
    pub fn ranks(&self) -> usize {
        self.all.iter().flatten().count()
    }

    fn of(&self, rank: usize) -> &Shown {
        match &self.all[rank] {
            Some(segment) => segment.atomics(0),
            None => unreachable!("callers ask for ranks that this one sees"),
        }
    }

    /// Takes a free lane for `channel`, which is not 0, from `first` on.
    pub(crate) fn take_lane(&self, channel: u64, first: usize) -> Option<usize> {
        let lanes = &self.of(self.rank).lanes;
        let free = |lane: &usize| {
            let owner = &lanes[*lane].channel;
            let taken = owner.compare_exchange(0, channel, Ordering::SeqCst, Ordering::SeqCst);
            taken.is_ok()
        };
        let lane = (first..LANES).find(free)?;
        self.of(self.rank).bell.ring();
        Some(lane)
    }

    /// Gives a lane back. The ranks of a communicator free it together, so none of them still reads
    /// there when the lane is taken again.
    pub(crate) fn free_lane(&self, lane: usize) {
        let lane = &self.of(self.rank).lanes[lane];
        for slot in &lane.slots {
            slot.number.store(0, Ordering::SeqCst);
        }
        lane.channel.store(0, Ordering::SeqCst);
    }

    /// The lane that `rank` has for `channel`.
    pub(crate) fn find_lane(&self, rank: usize, channel: u64) -> Option<usize> {
        let lanes = &self.of(rank).lanes;
        lanes
            .iter()
            .position(|lane| lane.channel.load(Ordering::SeqCst) == channel)
    }

    /// Leaves record `number` in a lane of this rank's.
    #[inline]
    pub(crate) fn write(&self, lane: usize, number: u64, record: [u64; RECORD]) {
        let own = self.of(self.rank);
        let slot = &own.lanes[lane].slots[(number % RING) as usize];
        for (word, value) in slot.words.iter().zip(record) {
            word.store(value, Ordering::Relaxed);
        }
        // After the words for those that look, and before the bell looks for those that sleep.
        slot.number.store(number, Ordering::SeqCst);
        own.bell.ring_if_heard();
    }

    /// Record `number` in a lane of `rank`, once it is there.
    #[inline]
    pub(crate) fn read(&self, rank: usize, lane: usize, number: u64) -> Option<[u64; RECORD]> {
        let slot = &self.of(rank).lanes[lane].slots[(number % RING) as usize];
        if slot.number.load(Ordering::Acquire) != number {
            return None;
        }
        Some(std::array::from_fn(|word| {
            slot.words[word].load(Ordering::Relaxed)
        }))
    }

    /// Leaves words about something that other ranks know by `key`, which is not 0.
    pub(crate) fn write_text(&self, key: u64, text: &str) {
        let own = self.of(self.rank);
        let place = &own.texts[(key % TEXTS) as usize];
        place.key.store(0, Ordering::SeqCst);
        store_text(&place.bytes, text);
        place.key.store(key, Ordering::SeqCst);
        own.bell.ring();
    }

    /// The words that `rank` has left under `key`.
    pub(crate) fn text(&self, rank: usize, key: u64) -> Option<String> {
        let place = &self.of(rank).texts[(key % TEXTS) as usize];
        let is_there = || place.key.load(Ordering::SeqCst) == key;
        if !is_there() {
            return None;
        }
        let text = load_text(&place.bytes);
        is_there().then_some(text)
    }

    /// Asks all ranks of the node what they do; the number of the question.
    pub(crate) fn ask(&self) -> u64 {
        let ranks = (0..self.all.len()).filter(|&rank| self.sees(rank));
        let questions = ranks.map(|rank| &self.of(rank).answer.question);
        let last = questions
            .clone()
            .map(|one| one.load(Ordering::SeqCst))
            .max();
        let question = last.unwrap_or_default() + 1;
        questions.for_each(|one| {
            one.fetch_max(question, Ordering::SeqCst);
        });
        question
    }

    /// The last question to this rank.
    pub(crate) fn question(&self) -> u64 {
        self.of(self.rank).answer.question.load(Ordering::SeqCst)
    }

    /// Answers it.
    pub(crate) fn answer(&self, question: u64, text: &str) {
        let own = &self.of(self.rank).answer;
        own.answered.store(0, Ordering::SeqCst);
        store_text(&own.bytes, text);
        own.answered.store(question, Ordering::SeqCst);
    }

    /// What `rank` has answered to that question, or a later one.
    pub(crate) fn answered(&self, rank: usize, question: u64) -> Option<String> {
        let answer = &self.of(rank).answer;
        let is_there = || answer.answered.load(Ordering::SeqCst) >= question;
        is_there()
            .then(|| load_text(&answer.bytes))
            .filter(|_| is_there())
    }

    /// Shows how long the oldest operation of this rank has waited.
    pub(crate) fn show_waiting(&self, time: Duration) {
        let own = &self.of(self.rank).answer.waiting;
        own.store(time.as_millis() as u64, Ordering::Relaxed);
    }

    /// How long the oldest operation of `rank` has waited.
    pub(crate) fn waiting(&self, rank: usize) -> Duration {
        Duration::from_millis(self.of(rank).answer.waiting.load(Ordering::Relaxed))
    }

    /// Shows the others of this node that `rank` of another node has gone, how by a number from 1
    /// to 3. Once for a rank.
    pub(crate) fn show_gone_elsewhere(&self, rank: usize, how: u8) {
        if rank < ELSEWHERE && self.sees(self.rank) {
            let word = &self.of(self.rank).elsewhere[rank / IN_WORD];
            word.fetch_or(u64::from(how) << (2 * (rank % IN_WORD)), Ordering::SeqCst);
        }
    }

    /// Shows the others of this node whether an operation of another node waits.
    pub(crate) fn show_waits_elsewhere(&self, waits: bool) {
        if self.sees(self.rank) {
            let own = &self.of(self.rank).waits_elsewhere;
            own.store(u64::from(waits), Ordering::SeqCst);
        }
    }

    /// Whether some rank of this node shows that an operation of another node waits.
    pub(crate) fn waits_elsewhere(&self) -> bool {
        let mut all = self.all.iter().flatten().map(|segment| {
            let shown: &Shown = segment.atomics(0);
            &shown.waits_elsewhere
        });
        all.any(|one| one.load(Ordering::SeqCst) != 0)
    }

    /// What some rank of this node shows of `rank`, if anything; else 0.
    pub(crate) fn gone_elsewhere(&self, rank: usize) -> u8 {
        if rank >= ELSEWHERE {
            return 0;
        }
        let words = self.all.iter().flatten().map(|segment| {
            let shown: &Shown = segment.atomics(0);
            shown.elsewhere[rank / IN_WORD].load(Ordering::SeqCst)
        });
        let mut numbers = words.map(|word| (word >> (2 * (rank % IN_WORD)) & 3) as u8);
        numbers.find(|&how| how != 0).unwrap_or(0)
    }

    /// Wakes that rank, if it sleeps until a message comes.
    #[inline]
    pub(crate) fn wake(&self, rank: usize) {
        if self.sees(rank) {
            self.of(rank).messages.ring_if_heard();
        }
    }

    /// What rings when a message is sent to this rank.
    pub(crate) fn messages(&self) -> &Bell {
        &self.of(self.rank).messages
    }

    /// What rings when `rank` has something new to show.
    pub(crate) fn bell(&self, rank: usize) -> &Bell {
        &self.of(rank).bell
    }

    /// Says that this rank leaves: it will write no more records.
    pub fn leave(&self) {
        if self.sees(self.rank) {
            let own = self.of(self.rank);
            own.left.store(1, Ordering::SeqCst);
            own.bell.ring();
        }
    }

    /// Whether a rank has said that it leaves.
    pub(crate) fn has_left(&self, rank: usize) -> bool {
        self.of(rank).left.load(Ordering::SeqCst) != 0
    }

    /// Why `rank` will show nothing new, if so.
    pub(crate) fn gone(&self, rank: usize) -> Option<&'static str> {
        if self.of(rank).left.load(Ordering::SeqCst) != 0 {
            return Some("has ended its program");
        }
        (!self.is_alive(rank)).then_some("has died")
    }

    /// Why `rank` does nothing any more, if so: one that has left may still wait for what it has
    /// sent.
    pub(crate) fn ended(&self, rank: usize) -> Option<&'static str> {
        let gone = self.gone(rank)?;
        let waits = || !self.waiting(rank).is_zero() && self.is_alive(rank);
        (!waits()).then_some(gone)
    }

    fn is_alive(&self, rank: usize) -> bool {
        let process = &self.of(rank).process;
        let words = [0, 1, 2].map(|word| process[word].load(Ordering::SeqCst));
        Process::from_words(words).is_alive()
    }
}

/// Writes a text, cut off where the place ends.
fn store_text(place: &[AtomicU64], text: &str) {
    let mut bytes = text.bytes().chain(std::iter::repeat(0));
    for word in place {
        let next = std::array::from_fn(|_| bytes.next().unwrap_or(0));
        word.store(u64::from_le_bytes(next), Ordering::SeqCst);
    }
}

fn load_text(place: &[AtomicU64]) -> String {
    let bytes: Vec<u8> = place
        .iter()
        .flat_map(|word| word.load(Ordering::SeqCst).to_le_bytes())
        .take_while(|&byte| byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn name(number: u64, rank: usize) -> SegmentName {
    SegmentName {
        number,
        rank: Some(rank),
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(first.text(1, 33 + TEXTS), None);
        second.write_text(3, &"x".repeat(2 * TEXT));
        assert_eq!(first.text(1, 3).unwrap().len(), TEXT);
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
}
