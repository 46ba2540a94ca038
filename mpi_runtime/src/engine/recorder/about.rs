//! What a reader of a record must know: who wrote it, and what the numbers in it mean, as JSON.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::mem::offset_of;
use std::sync::atomic::Ordering;

use mpi_shim_abi::{ANY, Kind, PROC_NULL};

use super::clock;
use super::layout::{ABOUT_BYTES, COMMS, ENTRIES, LAUNCHES, MAGIC, Record, UNFINISHED, VERSION};
use super::ring::REASONS;
use super::texts;
use crate::buffer::ElementType;
use crate::log;
use crate::operation::REDUCTIONS;

/// Who records.
#[derive(Clone, Debug)]
pub struct About {
    /// Rank in `COMM_WORLD`.
    pub rank: i32,
    /// Size of `COMM_WORLD`.
    pub size: i32,
    /// The same number on all ranks of a job, and in no other job.
    pub job: u64,
    /// MPI library and version.
    pub library: String,
}

impl About {
    /// Writes it to the beginning of the record.
    pub(super) fn write(&self, record: &Record) {
        let text = self.json();
        assert!(text.len() < ABOUT_BYTES, "the description has room");
        texts::put(&record.about, text.as_bytes());
        let (header, first) = (&record.header, clock::first());
        header.first_ticks.store(first.ticks.0, Ordering::Relaxed);
        header.first_wall.store(first.wall, Ordering::Relaxed);
        let bytes = size_of::<Record>() as u32;
        header.bytes.store(bytes, Ordering::Relaxed);
        header.version.store(VERSION, Ordering::Relaxed);
        let magic = u64::from_ne_bytes(MAGIC);
        header.magic.store(magic, Ordering::Release);
    }

    fn json(&self) -> String {
        let command = std::fs::read("/proc/self/cmdline").unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let command: String = command.trim().chars().take(300).collect();
        let reductions = REDUCTIONS.iter().map(|row| quoted(row.1));
        let dtypes = ElementType::ALL.iter();
        let dtypes = dtypes.map(|one| format!("[{},{}]", quoted(one.name()), one.size()));
        let rows = [
            ("rank", self.rank.to_string()),
            ("size", self.size.to_string()),
            ("job", self.job.to_string()),
            ("library", quoted(&self.library)),
            ("host", quoted(log::host())),
            ("pid", std::process::id().to_string()),
            ("command", quoted(&command)),
            ("layout", layout()),
            ("kinds", list(Kind::ALL.iter().map(kind))),
            ("begin", Kind::ALL.len().to_string()),
            ("reductions", list(reductions)),
            ("dtypes", list(dtypes)),
            ("reasons", list(REASONS.iter().map(|reason| quoted(reason)))),
            ("any", ANY.to_string()),
            ("proc_null", PROC_NULL.to_string()),
        ];
        object(&rows)
    }
}

/// Where the tables are: the place of each, and how many rows it has.
fn layout() -> String {
    let rows = [
        ("comms", offset_of!(Record, comms), COMMS),
        ("launches", offset_of!(Record, launches), LAUNCHES),
        ("unfinished", offset_of!(Record, unfinished), UNFINISHED),
        ("entries", offset_of!(Record, entries), ENTRIES),
        ("texts", offset_of!(Record, texts), 0),
    ];
    object(&rows.map(|(name, place, count)| (name, format!("[{place},{count}]"))))
}

/// What the ranks' entries of a kind have in common.
fn kind(kind: &Kind) -> String {
    let mut traits = vec![kind.name()];
    let has = [
        ("collective", kind.is_collective()),
        ("root", kind.has_root()),
        ("sends", kind.sends()),
        ("receives", kind.receives()),
        ("operand", kind.has_operand()),
        ("result", kind.has_result()),
        (
            "uneven",
            kind.has_counts() || *kind == Kind::NeighborAlltoall,
        ),
    ];
    traits.extend(has.iter().filter(|row| row.1).map(|row| row.0));
    list(traits.into_iter().map(quoted))
}

fn object(rows: &[(&str, String)]) -> String {
    let rows = rows
        .iter()
        .map(|(name, value)| format!(r#""{name}":{value}"#));
    format!("{{{}}}", rows.collect::<Vec<_>>().join(","))
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(","))
}

/// A string of JSON.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            letter if letter.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(letter));
            }
            letter => quoted.push(letter),
        }
    }
    quoted.push('"');
    quoted
}
