//! The file of a record, in the folder that `MPI_CUDA_RECORD_DIR` names. It is there from the start
//! of the job and written anew while there is something new, so that a process that is killed
//! without a word leaves it too. It is removed where a job ends well and nobody wants it.
//!
//! The file is the memory of the record as it is: writing it is one system call, which a signal
//! handler may make.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::about::About;
use super::layout::Record;
use super::ring::{RECORDER, Reason, Recorder};
use super::{signals, system};
use crate::log;

/// Where records are written, and when they stay.
#[derive(Clone, Debug)]
pub struct RecordOptions {
    /// `MPI_CUDA_RECORD_DIR`.
    pub folder: PathBuf,
    /// `MPI_CUDA_RECORD`.
    pub keep: Keep,
}

/// Which files stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Those of jobs that did not end well.
    Failures,
    /// All.
    Always,
}

/// How often the file is written anew while operations go on.
const PAUSE: Duration = Duration::from_millis(200);
/// How many pauses there are until the time in it is written anew, if nothing else is new.
const PAUSES_AT_REST: u32 = 10;

/// The open file; -1 if there is none. And the process that writes it, which a forked child is not.
static FILE: AtomicI32 = AtomicI32::new(-1);
static OWNER: AtomicU32 = AtomicU32::new(0);
/// The file stays.
static STAYS: AtomicBool = AtomicBool::new(false);
static PATH: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Begins to record for a job, in a file too if `options` say so.
pub fn start(about: &About, options: Option<&RecordOptions>) {
    about.write(&RECORDER.record);
    let Some(options) = options else { return };
    if let Err(error) = open(options, about.rank) {
        log::line(&format!(
            "no record is written, since MPI_CUDA_RECORD_DIR={} cannot be used: {error}",
            options.folder.display()
        ));
        return;
    }
    signals::install();
    let _ = std::thread::Builder::new()
        .name("mpi_cuda record".into())
        .spawn(keep_writing);
}

fn open(options: &RecordOptions, rank: i32) -> io::Result<()> {
    fs::create_dir_all(&options.folder)?;
    let path = options.folder.join(format!("rank-{rank:05}.record"));
    RECORDER.mark(Reason::Running, 0);
    let file = write_whole(&RECORDER, &path)?;
    STAYS.store(options.keep == Keep::Always, Ordering::Relaxed);
    *PATH.lock() = Some(path);
    OWNER.store(std::process::id(), Ordering::Relaxed);
    FILE.store(file.into_raw_fd(), Ordering::Release);
    Ok(())
}

/// Writes the record to another file, or, if none is named, to that of the folder.
///
/// # Errors
/// If it cannot be written, or there is no folder.
pub fn write_to(path: Option<&Path>) -> io::Result<()> {
    match path {
        Some(path) => {
            RECORDER.mark(Reason::Request, 0);
            write_whole(&RECORDER, path).map(drop)
        }
        None if write(Reason::Request, 0) => Ok(()),
        None => Err(io::Error::other(
            "no file is named, and there is none in MPI_CUDA_RECORD_DIR",
        )),
    }
}

/// Whoever sees the file sees a whole record.
fn write_whole(recorder: &Recorder, path: &Path) -> io::Result<File> {
    let temporary = path.with_extension(format!("new-{}", std::process::id()));
    let mut options = OpenOptions::new();
    // Nobody else's file is followed or written.
    let made = options.write(true).create_new(true).mode(0o600);
    let file = match made.open(&temporary) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(&temporary)?;
            made.open(&temporary)
        }
        other => other,
    }?;
    let written = file
        .write_all_at(system::bytes_of(&recorder.record), 0)
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map(|()| file)
}

/// Writes the file, if there is one; false if not. A signal handler may call it.
pub fn write(reason: Reason, code: i32) -> bool {
    write_part(reason, code, size_of::<Record>())
}

fn write_part(reason: Reason, code: i32, bytes: usize) -> bool {
    let file = FILE.load(Ordering::Acquire);
    if file < 0 || OWNER.load(Ordering::Relaxed) != system::process() {
        return false;
    }
    if reason == Reason::Request {
        STAYS.store(true, Ordering::Relaxed);
    }
    RECORDER.mark(reason, code);
    system::write_at_start(file, &system::bytes_of(&RECORDER.record)[..bytes])
}

/// What the thread does.
fn keep_writing() {
    let header = &RECORDER.record.header;
    let news = || {
        let launches = header.launches.load(Ordering::Relaxed);
        // An operation that ended is news too, though none has begun since.
        let running = RECORDER.running();
        (header.operations.load(Ordering::Relaxed), launches, running)
    };
    let (mut written, mut rests) = ((0, 0, 0), 0);
    // Until the file is closed, or the disk is full.
    loop {
        std::thread::sleep(PAUSE);
        let now = news();
        let goes_on = if now != written {
            (written, rests) = (now, 0);
            write(Reason::Running, 0)
        } else if rests < PAUSES_AT_REST {
            rests += 1;
            true
        } else {
            rests = 0;
            write_part(Reason::Running, 0, size_of_val(header))
        };
        if !goes_on && FILE.load(Ordering::Relaxed) < 0 {
            return;
        }
    }
}

/// This rank has failed with status `code`, and `words` say why.
pub fn failed(code: i32, words: &[u8]) {
    RECORDER.why(words);
    write(Reason::Abort, code);
}

/// This rank is about to end the job with status `code`.
pub fn abort(code: i32) {
    if write(Reason::Abort, code) {
        let_others_write();
    }
}

/// Gives the other ranks the time to write what they do now: when this rank has ended, the launcher
/// may kill them without a word. A signal handler may call it.
pub(super) fn let_others_write() {
    system::sleep(PAUSE + PAUSE / 4);
}

/// The job has ended well, and this process is about to.
pub fn finish() {
    let Some(path) = PATH.lock().take() else {
        return;
    };
    if STAYS.load(Ordering::Relaxed) {
        write(Reason::End, 0);
    }
    // Not closed: another thread may be writing. The process ends soon.
    let was_ours = FILE.swap(-1, Ordering::AcqRel) >= 0;
    if was_ours
        && !STAYS.load(Ordering::Relaxed)
        && OWNER.load(Ordering::Relaxed) == system::process()
    {
        let _ = fs::remove_file(path);
    }
}
