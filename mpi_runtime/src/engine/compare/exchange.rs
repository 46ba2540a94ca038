//! The messages by which ranks of several nodes compare what they do.

#![forbid(unsafe_code)]

use crate::engine::post::Post;
use crate::error::MpiError;
use crate::mpi::communicators::{COLLECTIVES, DEFAULT, WORLD};
use crate::mpi::shim::Shim;

/// Bytes of what a rank tells of an operation.
pub(super) const TEXT: usize = 512;

pub(super) type Text = [u8; TEXT];
/// What the ranks have executed, and the code and the hash of the sequence that they are in; then
/// the same complemented, whose largest is that of the smallest.
pub(super) type Numbers = [u64; 6];

/// How ranks tell each other what they do, on one of several communicators by its index;
/// collective, as what they compare.
pub(super) trait Exchange: Send + Sync {
    /// The largest of each of the ranks' numbers.
    fn largest(&self, index: usize, own: Numbers) -> Result<Numbers, MpiError>;
    /// What each rank says, by rank.
    fn texts(&self, index: usize, own: &Text) -> Result<Vec<Text>, MpiError>;
}

/// What ranks of several nodes compare, each in an order of its own.
#[derive(Clone, Copy)]
pub(crate) enum Series {
    /// Operations on [`WORLD`].
    World,
    /// Operations on [`DEFAULT`].
    Default,
    /// Programs for several devices, and their collectives on all ranks.
    Programs,
}

impl Series {
    /// In the order of their numbers.
    pub(crate) const ALL: [Series; 3] = [Series::World, Series::Default, Series::Programs];

    /// Operations on the communicator of that number.
    pub(super) fn of(comm: i64) -> Option<Series> {
        match comm {
            WORLD => Some(Series::World),
            DEFAULT => Some(Series::Default),
            COLLECTIVES => Some(Series::Programs),
            _ => None,
        }
    }
}

/// Over communicators that nothing else uses.
pub(crate) struct ByMpi {
    pub(crate) shim: Shim,
    /// By [`Series`].
    pub(crate) comms: Vec<u64>,
    /// Of each of them.
    pub(crate) size: usize,
}

impl Exchange for ByMpi {
    fn largest(&self, index: usize, own: Numbers) -> Result<Numbers, MpiError> {
        let mut largest = Numbers::default();
        self.shim.largest(self.comms[index], &own, &mut largest)?;
        Ok(largest)
    }

    fn texts(&self, index: usize, own: &Text) -> Result<Vec<Text>, MpiError> {
        let mut texts = vec![[0; TEXT]; self.size];
        self.shim
            .gather(self.comms[index], own, texts.as_flattened_mut())?;
        Ok(texts)
    }
}

/// Through the first of the ranks, on a communicator that other messages use too.
pub(super) struct ByMessages {
    pub(super) shim: Shim,
    pub(super) comm: u64,
    pub(super) tag: i32,
    /// Of this process, in the world.
    pub(super) rank: i32,
    /// In the world.
    pub(super) members: Vec<i32>,
}

impl ByMessages {
    /// What `of_all` makes of what each member says, by rank.
    fn gather(
        &self,
        own: &[u8],
        of_all: impl FnOnce(Vec<Vec<u8>>) -> Vec<u8>,
    ) -> Result<Vec<u8>, MpiError> {
        let (shim, comm, tag) = (&self.shim, self.comm, self.tag);
        let post = Post { shim, comm };
        let first = self.members[0];
        if self.rank != first {
            post.send(first, tag, own)?;
            return post.receive(first, tag + 1);
        }
        let mut all = vec![own.to_vec()];
        for &rank in &self.members[1..] {
            all.push(post.receive(rank, tag)?);
        }
        let result = of_all(all);
        for &rank in &self.members[1..] {
            post.send(rank, tag + 1, &result)?;
        }
        Ok(result)
    }
}

impl Exchange for ByMessages {
    fn largest(&self, _: usize, own: Numbers) -> Result<Numbers, MpiError> {
        let bytes: Vec<u8> = own.iter().flat_map(|number| number.to_le_bytes()).collect();
        let largest = |all: Vec<Vec<u8>>| {
            let all = all.iter().map(|bytes| to_numbers(bytes));
            let largest = all.fold(Numbers::default(), |one, other| {
                std::array::from_fn(|index| one[index].max(other[index]))
            });
            largest
                .iter()
                .flat_map(|number| number.to_le_bytes())
                .collect()
        };
        Ok(to_numbers(&self.gather(&bytes, largest)?))
    }

    fn texts(&self, _: usize, own: &Text) -> Result<Vec<Text>, MpiError> {
        let texts = self.gather(own, |all| all.concat())?;
        Ok(texts.as_chunks().0.to_vec())
    }
}

fn to_numbers(bytes: &[u8]) -> Numbers {
    let numbers = bytes.as_chunks().0;
    std::array::from_fn(|index| numbers.get(index).copied().map_or(0, u64::from_le_bytes))
}

/// Words, cut off where there is no more room.
pub(super) fn to_text(words: &str) -> Text {
    let mut text = [0; TEXT];
    for (byte, word) in text.iter_mut().zip(words.bytes()) {
        *byte = word;
    }
    text
}

/// The words of a rank.
pub(super) fn from_text(text: &Text) -> String {
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(TEXT);
    String::from_utf8_lossy(&text[..end]).into_owned()
}
