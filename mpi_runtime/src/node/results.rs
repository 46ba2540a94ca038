//! Results that one rank of a node makes for all: the first that asks for one makes it, and the
//! others wait for that. What is made is a pure function of its input, so whoever does not want to
//! wait, or cannot read it, makes it alone; nothing but time is lost.
//!
//! A result lies in a file without a name (memfd_create(2)), which other ranks of the same user
//! open as a descriptor of its process (proc(5)). It is gone with its rank, however that ends, and
//! is no part of `/dev/shm`.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::node::board::Board;
use crate::node::board::layout::{RESULTS, SharedResult};
use crate::node::own_file;

/// How a file of a result begins.
const MAGIC: u64 = u64::from_be_bytes(*b"mpi_cudr");
const HEAD: usize = 24;

/// Files that a rank keeps open for others that have not asked yet: a process may have a thousand.
const MOST_FILES: usize = 32;

/// What a rank keeps for others that have not asked yet: its part of the first, and the second at
/// least.
const BYTES_OF_NODE: usize = 256 << 20;
const BYTES_OF_RANK: usize = 16 << 20;

/// The longest sleep, after which a rank looks whether the other one is still there.
const SLEEP: Duration = Duration::from_millis(50);

/// A rank with an operation that waits so long may wait for this one.
const MAY_WAIT_FOR_US: Duration = Duration::from_secs(1);

/// Nobody waits longer.
const LONGEST: Duration = Duration::from_secs(600);

/// The results of the ranks of this node.
pub struct Results {
    board: Arc<Board>,
    /// What this rank has made and others may ask for, the oldest first.
    own: Mutex<VecDeque<Own>>,
    /// Number of this rank's last claim.
    last: AtomicU16,
    longest: Duration,
    /// Ranks whose files this one may not open.
    unreadable: Mutex<Vec<usize>>,
}

/// A result of this rank's.
struct Own {
    place: usize,
    claim: u64,
    /// Holds its memory.
    _file: File,
    bytes: usize,
}

/// What is known of a result.
pub enum Found<'a> {
    /// Nobody has it: this rank makes it, and others wait for that.
    Claimed(Claim<'a>),
    /// A rank in the world has made it.
    Made(usize, Vec<u8>),
    /// This rank is to make it for itself.
    Alone,
}

/// This rank makes a result; if it is dropped, those that wait do so themselves.
pub struct Claim<'a> {
    results: &'a Results,
    place: usize,
    claim: u64,
    input: Vec<u8>,
}

impl Results {
    /// Of the ranks on that board; none if there is only one.
    pub fn new(board: Arc<Board>) -> Option<Results> {
        let fits = u16::try_from(board.rank()).is_ok() && board.ranks() > 1;
        fits.then(|| Results {
            board,
            own: Mutex::default(),
            last: AtomicU16::new(0),
            longest: LONGEST,
            unreadable: Mutex::default(),
        })
    }

    /// Looks for what was made of `input`, waits for it if another rank makes it, or claims it. The
    /// ranks must make the same of the same input.
    pub fn find(&self, input: &[&[u8]]) -> Found<'_> {
        if input.iter().map(|part| part.len()).sum::<usize>() > self.most_bytes() / 2 {
            return Found::Alone;
        }
        self.let_go(|own, place| {
            let taken = place.taken.load(Ordering::SeqCst);
            own.claim == place.claim.load(Ordering::SeqCst) && !self.is_all(taken)
        });
        let input = joined(input);
        let hash = hash(&input);
        let start = hash as usize % RESULTS;
        let places = self.board.results();
        let order = || (0..RESULTS).map(|step| (start + step) % RESULTS);
        let claims = || order().map(|place| (place, places[place].claim.load(Ordering::SeqCst)));
        if let Some((place, claim)) = claims().find(|&(_, claim)| is_of(claim, hash)) {
            return self.of_other(place, claim, &input);
        }
        for (place, claim) in claims() {
            if is_of(claim, hash) {
                // Claimed since it was looked at.
                return self.of_other(place, claim, &input);
            }
            if claim != 0 {
                continue;
            }
            let claim = self.new_claim(hash);
            let word = &places[place].claim;
            match word.compare_exchange(0, claim, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => {
                    return Found::Claimed(Claim {
                        results: self,
                        place,
                        claim,
                        input,
                    });
                }
                Err(claim) if is_of(claim, hash) => return self.of_other(place, claim, &input),
                Err(_) => (),
            }
        }
        self.free_those_of_the_dead();
        Found::Alone
    }

    /// Another rank's result, once it is there.
    fn of_other(&self, place: usize, claim: u64, input: &[u8]) -> Found<'_> {
        let owner = owner(claim);
        let is_unreadable = || self.unreadable.lock().contains(&owner);
        if owner == self.board.rank() || !self.board.sees(owner) || is_unreadable() {
            return Found::Alone;
        }
        let shared = &self.board.results()[place];
        let mut read = Ok(None);
        if self.wait(shared, claim) {
            read = self.read(shared, owner, input);
        }
        let mut is_last = false;
        if shared.claim.load(Ordering::SeqCst) == claim {
            let taken = shared.taken.fetch_or(self.own_bit(), Ordering::SeqCst);
            is_last = self.is_all(taken | self.own_bit());
        }
        match read {
            Ok(Some((bytes, file))) => {
                if is_last {
                    // The rank that made it may not look again. Who reads it once more meanwhile
                    // finds it too short.
                    let _ = file.set_len(0);
                }
                Found::Made(owner, bytes)
            }
            Ok(None) => Found::Alone,
            Err(error) => {
                if error.kind() == io::ErrorKind::PermissionDenied {
                    self.unreadable.lock().push(owner);
                }
                Found::Alone
            }
        }
    }

    /// The bit of this rank in [`SharedResult::taken`]; none of the 65th rank of a node and later.
    fn own_bit(&self) -> u64 {
        let rank = self.board.rank();
        let below = (0..rank).filter(|&other| self.board.sees(other)).count();
        1u64.checked_shl(below as u32).unwrap_or(0)
    }

    /// Whether all ranks have taken a result, but the one that made it.
    fn is_all(&self, taken: u64) -> bool {
        taken.count_ones() as usize >= self.board.ranks() - 1
    }

    /// Waits until a claimed result is there; false if that is given up.
    fn wait(&self, shared: &SharedResult, claim: u64) -> bool {
        let owner = owner(claim);
        let is_there = || shared.file.load(Ordering::SeqCst) != 0;
        let is_claimed = || shared.claim.load(Ordering::SeqCst) == claim;
        let start = Instant::now();
        while is_claimed() && !is_there() {
            let waited = start.elapsed();
            // Its compilation may need threads that wait in that operation.
            let may_wait_for_us =
                waited > MAY_WAIT_FOR_US && self.board.waiting(owner) > MAY_WAIT_FOR_US;
            if may_wait_for_us || waited > self.longest || self.board.gone(owner).is_some() {
                return false;
            }
            let bell = self.board.bell(owner);
            bell.sleep(SLEEP, || is_there() || !is_claimed());
        }
        is_claimed()
    }

    /// Reads a result; none if it is of another input.
    fn read(
        &self,
        shared: &SharedResult,
        owner: usize,
        input: &[u8],
    ) -> io::Result<Option<(Vec<u8>, File)>> {
        let descriptor = shared.file.load(Ordering::SeqCst).saturating_sub(1);
        let process = self.board.process_id(owner);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true);
        // If it is something else by now, that must not make us wait.
        let options = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let mut file = options.open(format!("/proc/{process}/fd/{descriptor}"))?;
        let about = file.metadata()?;
        let is_its = about.is_file() && own_file::is_ours(&about);
        if !is_its || about.ino() != shared.inode.load(Ordering::SeqCst) {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(about.len() as usize);
        file.read_to_end(&mut bytes)?;
        let start = HEAD + input.len();
        let Some(length) = bytes.len().checked_sub(start) else {
            return Ok(None);
        };
        // Another thread of this rank, which takes it too, may have cut it off meanwhile.
        let is_whole = bytes[..HEAD] == head(input, length) && bytes[HEAD..start] == *input;
        Ok(is_whole.then(|| (bytes.split_off(start), file)))
    }

    fn new_claim(&self, hash: u32) -> u64 {
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        u64::from(hash) << 32 | (self.board.rank() as u64) << 16 | u64::from(number)
    }

    /// Lets go of this rank's results unless they `stay`.
    fn let_go(&self, stay: impl Fn(&Own, &SharedResult) -> bool) {
        let places = self.board.results();
        self.own.lock().retain(|own| {
            let place = &places[own.place];
            let stays = stay(own, place);
            if !stays {
                free(place, own.claim);
            }
            stays
        });
    }

    /// Frees the places of ranks that have ended, where there are no others.
    fn free_those_of_the_dead(&self) {
        for place in self.board.results() {
            let claim = place.claim.load(Ordering::SeqCst);
            let owner = owner(claim);
            if claim != 0 && self.board.sees(owner) && self.board.gone(owner).is_some() {
                free(place, claim);
            }
        }
    }

    /// What this rank keeps at most.
    fn most_bytes(&self) -> usize {
        (BYTES_OF_NODE / self.board.ranks()).max(BYTES_OF_RANK)
    }

    /// Keeps a result, and lets go of the oldest ones where they are too many.
    fn keep(&self, new: Own) {
        let mut own = self.own.lock();
        own.push_back(new);
        let most = (RESULTS / self.board.ranks()).clamp(1, MOST_FILES);
        let bytes = |own: &VecDeque<Own>| own.iter().map(|own| own.bytes).sum::<usize>();
        while own.len() > most || bytes(&own) > self.most_bytes() {
            let Some(oldest) = own.pop_front() else { break };
            free(&self.board.results()[oldest.place], oldest.claim);
        }
    }
}

impl Claim<'_> {
    /// Gives the others what this rank has made.
    ///
    /// # Errors
    /// If it is too large, or the kernel has no memory for it; those that wait hear that.
    pub fn publish(self, result: &[u8]) -> io::Result<()> {
        let head = head(&self.input, result.len());
        let bytes = HEAD + self.input.len() + result.len();
        if bytes > self.results.most_bytes() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut file = own_file::nameless()?;
        file.write_all(&head)?;
        file.write_all(&self.input)?;
        file.write_all(result)?;
        let shared = &self.results.board.results()[self.place];
        let inode = file.metadata()?.ino();
        let descriptor = file.as_raw_fd() as u64;
        self.results.keep(Own {
            place: self.place,
            claim: self.claim,
            _file: file,
            bytes,
        });
        shared.inode.store(inode, Ordering::SeqCst);
        shared.file.store(descriptor + 1, Ordering::SeqCst);
        Ok(())
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let shared = &self.results.board.results()[self.place];
        if shared.file.load(Ordering::SeqCst) == 0 {
            free(shared, self.claim);
        }
        let board = &self.results.board;
        board.bell(board.rank()).ring_if_heard();
    }
}

/// Frees a place, if it is still of that claim.
fn free(place: &SharedResult, claim: u64) {
    // Not free, and nobody's, until the rest is as in a free one.
    const BUSY: u64 = 1;
    let taken = (place.claim).compare_exchange(claim, BUSY, Ordering::SeqCst, Ordering::SeqCst);
    if taken.is_ok() {
        for word in [&place.file, &place.inode, &place.taken] {
            word.store(0, Ordering::SeqCst);
        }
        place.claim.store(0, Ordering::SeqCst);
    }
}

fn is_of(claim: u64, hash: u32) -> bool {
    claim >> 32 == u64::from(hash)
}

/// The rank in the world that makes a result.
fn owner(claim: u64) -> usize {
    usize::from((claim >> 16) as u16)
}

/// Never 0, so that no claim is 0.
fn hash(input: &[u8]) -> u32 {
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    (hasher.finish() as u32).max(1)
}

/// The parts, each behind its length.
fn joined(parts: &[&[u8]]) -> Vec<u8> {
    let lengths = parts.iter().map(|part| part.len().to_le_bytes());
    let both = lengths.zip(parts);
    both.flat_map(|(length, part)| [&length[..], part].concat())
        .collect()
}

/// What stands before the input in the file of a result of so many bytes.
fn head(input: &[u8], length: usize) -> [u8; HEAD] {
    let words = [MAGIC, input.len() as u64, length as u64];
    let mut bytes = [0; HEAD];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests;
