//! What a rank printed last must reach the user. A launcher reads the ranks' output from pipes, and
//! MPICH's kills its ranks at `MPI_Abort` without reading what is still in them.

use std::time::{Duration, Instant};

/// How long a launcher may take to read; a stopped one must not keep the job.
const LIMIT: Duration = Duration::from_millis(500);
/// After a pipe is empty, the launcher still passes on what it read.
const PASS_ON: Duration = Duration::from_millis(50);

/// Waits, for a bounded time, until the readers of standard output and standard error have taken
/// everything out of their pipes.
pub fn wait_until_read() {
    let deadline = Instant::now() + LIMIT;
    let mut piped = false;
    for descriptor in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
        while let Some(unread) = unread_bytes(descriptor) {
            piped = true;
            if unread == 0 || Instant::now() > deadline {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    if piped {
        std::thread::sleep(PASS_ON);
    }
}

/// Bytes written to a pipe that nobody has read; `None` if it is not a pipe.
fn unread_bytes(descriptor: libc::c_int) -> Option<libc::c_int> {
    // SAFETY: `stat` is plain old data, and `fstat` fills it in.
    let is_pipe = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        libc::fstat(descriptor, &mut stat) == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFIFO
    };
    let mut unread: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int (pipe(7)).
    let known = is_pipe && unsafe { libc::ioctl(descriptor, libc::FIONREAD, &mut unread) } == 0;
    known.then_some(unread)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeWriter, Read, Write};
    use std::os::fd::AsRawFd;

    fn unread(writer: &PipeWriter) -> Option<libc::c_int> {
        unread_bytes(writer.as_raw_fd())
    }

    #[test]
    fn counts_what_is_left_in_a_pipe() {
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        assert_eq!(unread(&writer), Some(0));
        writer.write_all(b"traceback").unwrap();
        assert_eq!(unread(&writer), Some(9));
        reader.read_exact(&mut [0; 9]).unwrap();
        assert_eq!(unread(&writer), Some(0));
    }

    #[test]
    fn a_file_is_no_pipe() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(unread_bytes(file.as_raw_fd()), None);
    }
}
