//! The memory of the record. It is written to the file as it is, at any time and by a signal
//! handler too, so everything in it is an atomic at a fixed place. `_report/record.py` reads it.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

/// Operations that are kept.
pub const ENTRIES: usize = 1024;
/// Launches that are kept.
pub const LAUNCHES: usize = 1024;
/// Communicators that are counted.
pub const COMMS: usize = 256;
/// Operations that had not ended when their place in the ring was needed.
pub const UNFINISHED: usize = 64;
/// Bytes of the description at the beginning.
pub const ABOUT_BYTES: usize = 8064;
/// Bytes of all texts.
pub const TEXT_BYTES: usize = 1 << 16;

/// The version of this layout.
pub const VERSION: u32 = 1;
/// How a file begins.
pub const MAGIC: [u8; 8] = *b"MPICUREC";

/// All that a rank remembers.
#[repr(C, align(64))]
pub struct Record {
    pub header: Header,
    /// What the reader must know, as JSON that ends with a NUL.
    pub about: [AtomicU8; ABOUT_BYTES],
    pub comms: [CommRow; COMMS],
    pub launches: [LaunchRow; LAUNCHES],
    pub unfinished: [Entry; UNFINISHED],
    pub entries: [Entry; ENTRIES],
    /// Texts end with a NUL; the number of a text is where it begins, and 0 is none.
    pub texts: [AtomicU8; TEXT_BYTES],
}

/// What changes as long as the process lives; 128 bytes.
#[repr(C)]
pub struct Header {
    pub magic: AtomicU64,
    pub version: AtomicU32,
    pub bytes: AtomicU32,
    /// A moment near the start, in ticks and as the time of day.
    pub first_ticks: AtomicU64,
    pub first_wall: AtomicU64,
    /// When this was written.
    pub written_ticks: AtomicU64,
    pub written_wall: AtomicU64,
    /// Why: a [`super::Reason`], and its number.
    pub reason: AtomicU32,
    pub code: AtomicU32,
    /// Operations so far.
    pub operations: AtomicU64,
    /// Launches so far.
    pub launches: AtomicU64,
    /// Bytes of the texts.
    pub text_bytes: AtomicU64,
    /// Number of a text: why this rank ends the job.
    pub why: AtomicU64,
    pub spare: [AtomicU64; 5],
}

/// A communicator; 64 bytes.
#[repr(C)]
pub struct CommRow {
    /// 1 once the row is somebody's.
    pub used: AtomicU64,
    /// Number of the communicator.
    pub number: AtomicU64,
    /// Number of its name in the texts.
    pub name: AtomicU64,
    pub rank: AtomicU32,
    pub size: AtomicU32,
    /// Collectives so far.
    pub collectives: AtomicU64,
    /// Messages so far.
    pub messages: AtomicU64,
    pub spare: [AtomicU64; 2],
}

/// A launch; 32 bytes.
#[repr(C)]
pub struct LaunchRow {
    pub ticket: AtomicU32,
    /// Numbers of texts: the program's name, and the line that launched it.
    pub program: AtomicU32,
    pub location: AtomicU32,
    pub spare: AtomicU32,
    /// When it was dispatched.
    pub ticks: AtomicU64,
    pub spare_too: AtomicU64,
}

/// An operation; 128 bytes. Whoever reads it while it is written sees that `number` and
/// `number_again` differ.
#[repr(C, align(64))]
pub struct Entry {
    /// Counts operations from 1.
    pub number: AtomicU64,
    pub start: AtomicU64,
    /// 0 while it runs.
    pub end: AtomicU64,
    /// Ticks that it waited for other ranks, as far as that was measured.
    pub waited: AtomicU64,
    /// Number of the communicator.
    pub comm: AtomicU64,
    /// Its place among the collectives, or the messages, of its communicator, from 1.
    pub position: AtomicU64,
    /// Elements of the operand and of the result.
    pub sent: AtomicU64,
    pub received: AtomicU64,
    /// Launch in the upper half, thread in the lower.
    pub launch_thread: AtomicU64,
    /// Destination or root, and source.
    pub ranks: AtomicU64,
    /// Tags of what is sent and received.
    pub tags: AtomicU64,
    /// From the lowest byte: kind, reduction (255: none), dtype of the operand, of the result,
    /// flags, and see [`ENDS`].
    pub what: AtomicU64,
    /// Number of a text: why it failed, or the program that begins.
    pub text: AtomicU64,
    /// 1 if it failed.
    pub failed: AtomicU64,
    pub spare: AtomicU64,
    pub number_again: AtomicU64,
}

/// Flag: an operation of mpi4jax's.
pub const FOREIGN: u64 = 1 << 32;
/// Flag: a wait, whose ranks and tags are those of the message that it waits for.
pub const STARTED: u64 = 1 << 33;
/// Flag: of a program for several devices.
pub const OF_XLA: u64 = 1 << 34;
/// Where the flags of a wait for a started collective have the kind of the start plus 1.
pub const ENDS: u32 = 40;

macro_rules! words {
    ($($kind:ident { $($field:ident: $of:expr),+ $(,)? })+) => {
        $(impl $kind {
            /// All zeros.
            pub const fn new() -> $kind {
                $kind { $($field: $of),+ }
            }
        })+
    };
}

const fn u64s() -> AtomicU64 {
    AtomicU64::new(0)
}

const fn u32s() -> AtomicU32 {
    AtomicU32::new(0)
}

words! {
    Header {
        magic: u64s(), version: u32s(), bytes: u32s(), first_ticks: u64s(), first_wall: u64s(),
        written_ticks: u64s(), written_wall: u64s(), reason: u32s(), code: u32s(),
        operations: u64s(), launches: u64s(), text_bytes: u64s(), why: u64s(),
        spare: [const { u64s() }; 5],
    }
    CommRow {
        used: u64s(), number: u64s(), name: u64s(), rank: u32s(), size: u32s(),
        collectives: u64s(), messages: u64s(), spare: [const { u64s() }; 2],
    }
    LaunchRow {
        ticket: u32s(), program: u32s(), location: u32s(), spare: u32s(), ticks: u64s(),
        spare_too: u64s(),
    }
    Entry {
        number: u64s(), start: u64s(), end: u64s(), waited: u64s(), comm: u64s(),
        position: u64s(), sent: u64s(), received: u64s(), launch_thread: u64s(), ranks: u64s(),
        tags: u64s(), what: u64s(), text: u64s(), failed: u64s(), spare: u64s(),
        number_again: u64s(),
    }
    Record {
        header: Header::new(),
        about: [const { AtomicU8::new(0) }; ABOUT_BYTES],
        comms: [const { CommRow::new() }; COMMS],
        launches: [const { LaunchRow::new() }; LAUNCHES],
        unfinished: [const { Entry::new() }; UNFINISHED],
        entries: [const { Entry::new() }; ENTRIES],
        texts: [const { AtomicU8::new(0) }; TEXT_BYTES],
    }
}

const _: () = assert!(size_of::<Header>() == 128 && size_of::<CommRow>() == 64);
const _: () = assert!(size_of::<LaunchRow>() == 32 && size_of::<Entry>() == 128);
