//! The board: what each rank of a node shows the others, in memory that all of them have. Each
//! rank writes to a segment of its own and reads those of the others, so nothing is sent.
//!
//! A board has lanes, one for each communicator. In its lane a rank leaves records of what it is
//! about to do, numbered from 1 on, in a ring. What they mean is the business of
//! `engine/compare/`.

mod coordinator;
pub(crate) mod layout;

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::time::Duration;

use crate::node::bell::Bell;
use crate::node::process::Process;
use crate::node::segment::{Segment, SegmentName};
pub(crate) use layout::RECORD;
use layout::{
    ELSEWHERE, IN_WORD, LANES, RESULTS, RING, SharedResult, Shown, TEXTS, Text, load_text,
    store_text,
};

/// In the number of a record: its rank asks whether others have come, and goes on without them.
const ASKS: u64 = 1 << 62;
const STOPPED: u64 = 1 << 63;
/// How a rank has left.
const ENDED: u64 = 1;
const FINALIZED: u64 = 2;

/// The boards of the ranks of this node that share memory with this one.
pub struct Board {
    number: u64,
    rank: usize,
    /// By rank in the world; its own among them, if it could be made.
    all: Vec<Option<Segment>>,
    /// How many texts this rank has left.
    texts: AtomicUsize,
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
        Ok(Board {
            number,
            rank,
            all,
            texts: AtomicUsize::new(0),
        })
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

    /// What the ranks of this node make for each other, in the memory of the lowest of them.
    pub(crate) fn results(&self) -> &[SharedResult; RESULTS] {
        let lowest = (0..self.all.len()).find(|&rank| self.sees(rank));
        &self.of(lowest.unwrap_or(self.rank)).results
    }

    /// The id of the process of `rank`, in its namespace.
    pub(crate) fn process_id(&self, rank: usize) -> u64 {
        self.of(rank).process[0].load(Ordering::SeqCst)
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

    /// This rank reads no more of the channel of that lane of its own, and writes nothing more.
    /// Others may still read there what it has written.
    pub(crate) fn retire_lane(&self, lane: usize) {
        self.of(self.rank).lanes[lane]
            .retired
            .store(1, Ordering::SeqCst);
    }

    /// Whether `rank`, which has had that lane for `channel`, reads no more of the channel.
    pub(crate) fn has_retired(&self, rank: usize, lane: usize, channel: u64) -> bool {
        let lane = &self.of(rank).lanes[lane];
        lane.retired.load(Ordering::SeqCst) != 0
            || lane.channel.load(Ordering::SeqCst) != channel
            || self.gone(rank).is_some()
    }

    /// Gives a lane back where nobody reads any more.
    pub(crate) fn free_lane(&self, lane: usize) {
        let lane = &self.of(self.rank).lanes[lane];
        for slot in &lane.slots {
            slot.number.store(0, Ordering::SeqCst);
        }
        // Before it can be taken again.
        lane.retired.store(0, Ordering::SeqCst);
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
        if slot.number.load(Ordering::Acquire) & !ASKS != number {
            return None;
        }
        Some(std::array::from_fn(|word| {
            slot.words[word].load(Ordering::Relaxed)
        }))
    }

    /// Stops leaving records behind `number` in a lane of this rank's, unless those that it waits
    /// for have come; whether it stops. Each other rank that has left its record of the round sees
    /// that this one has stopped, or is seen to have come.
    pub(crate) fn stop_unless(
        &self,
        lane: usize,
        number: u64,
        came: impl FnOnce() -> bool,
    ) -> bool {
        let own = self.of(self.rank);
        let slot = &own.lanes[lane].slots[(number % RING) as usize];
        slot.number.store(number | ASKS, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let stops = !came();
        let mark = if stops { STOPPED } else { 0 };
        slot.number.store(number | mark, Ordering::SeqCst);
        own.bell.ring();
        stops
    }

    /// Whether `rank` has stopped behind record `number` of a lane; none while it asks.
    pub(crate) fn has_stopped(&self, rank: usize, lane: usize, number: u64) -> Option<bool> {
        let slot = &self.of(rank).lanes[lane].slots[(number % RING) as usize];
        let found = slot.number.load(Ordering::SeqCst);
        (found != number | ASKS).then_some(found == number | STOPPED)
    }

    /// Leaves words about something that other ranks know by `key`, which is not 0.
    pub(crate) fn write_text(&self, key: u64, text: &str) {
        let own = self.of(self.rank);
        let place = &own.texts[self.texts.fetch_add(1, Ordering::SeqCst) % TEXTS];
        place.key.store(0, Ordering::SeqCst);
        store_text(&place.bytes, text);
        place.key.store(key, Ordering::SeqCst);
        own.bell.ring();
    }

    /// The words that `rank` has left under `key`.
    pub(crate) fn text(&self, rank: usize, key: u64) -> Option<String> {
        let mut texts = self.of(rank).texts.iter();
        let is = |place: &Text| place.key.load(Ordering::SeqCst) == key;
        let place = texts.find(|place| is(place))?;
        let text = load_text(&place.bytes);
        is(place).then_some(text)
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
    /// to 3, or with 0 that it is there again. It takes the place of what any of them showed, since
    /// who showed it may have ended.
    pub(crate) fn show_gone_elsewhere(&self, rank: usize, how: u8) {
        if rank >= ELSEWHERE || !self.sees(self.rank) {
            return;
        }
        let shift = 2 * (rank % IN_WORD);
        for (writer, segment) in self.all.iter().enumerate() {
            let Some(segment) = segment else { continue };
            let shown: &Shown = segment.atomics(0);
            let word = &shown.elsewhere[rank / IN_WORD];
            // Whether it stays as it is does not matter.
            let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |word| {
                let shows = writer == self.rank || word >> shift & 3 != 0;
                shows.then_some(word & !(3 << shift) | u64::from(how) << shift)
            });
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
        self.leave_as(ENDED);
    }

    /// The same of a rank that calls `MPI_Finalize`, if it has not left before.
    pub(crate) fn finalize(&self) {
        self.leave_as(FINALIZED);
    }

    fn leave_as(&self, how: u64) {
        if self.sees(self.rank) {
            let own = self.of(self.rank);
            // Whatever came first stays.
            let _ = own
                .left
                .compare_exchange(0, how, Ordering::SeqCst, Ordering::SeqCst);
            own.bell.ring();
        }
    }

    /// Whether a rank has said that it leaves.
    pub(crate) fn has_left(&self, rank: usize) -> bool {
        self.of(rank).left.load(Ordering::SeqCst) != 0
    }

    /// Why `rank` will show nothing new, if so.
    pub(crate) fn gone(&self, rank: usize) -> Option<&'static str> {
        match self.of(rank).left.load(Ordering::SeqCst) {
            0 => (!self.is_alive(rank)).then_some("has died"),
            FINALIZED => Some("has called MPI_Finalize"),
            _ => Some("has ended its program"),
        }
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

fn name(number: u64, rank: usize) -> SegmentName {
    SegmentName {
        number,
        rank: Some(rank),
    }
}

#[cfg(test)]
mod tests;
