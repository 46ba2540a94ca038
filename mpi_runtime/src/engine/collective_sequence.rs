//! The collectives of a program for several devices, as the ranks compare them.

#![forbid(unsafe_code)]

use std::sync::atomic::AtomicBool;

use crate::engine::recorder::Program;

/// A program with collectives of XLA's.
#[derive(Debug)]
pub struct CollectiveSequence {
    /// Hash of its sequence of collectives.
    pub sequence: u64,
    /// The sequence in words.
    pub summary: String,
    /// The ranks that run it.
    pub members: &'static [i32],
    /// All ranks of the world do.
    pub everybody: bool,
    /// Its first run has begun, everywhere.
    pub(super) begun: AtomicBool,
}

impl CollectiveSequence {
    /// A program that has not run yet.
    pub fn new(
        sequence: u64,
        summary: String,
        members: Vec<i32>,
        world_size: i32,
    ) -> CollectiveSequence {
        CollectiveSequence {
            sequence,
            summary,
            everybody: members.len() == world_size as usize,
            // A program lives as long as the process.
            members: Vec::leak(members),
            begun: AtomicBool::new(false),
        }
    }

    /// What the recorder keeps of it.
    pub(crate) fn recorded(&self) -> Program<'_> {
        Program {
            sequence: self.sequence,
            summary: &self.summary,
            members: self.members,
            everybody: self.everybody,
        }
    }
}
