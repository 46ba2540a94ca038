//! The log of this library: whole lines on standard error.

#![forbid(unsafe_code)]

use std::io::Write;

/// Prints a line, behind the library's name, in one piece, so that ranks do not mix theirs.
pub fn line(line: &str) {
    // There is nowhere to report that standard error is closed.
    let _ = std::io::stderr().write_all(format!("mpi_cuda: {line}\n").as_bytes());
}
