//! Connections: how messages are written to one, how its end is noticed, and that it is the end of
//! the process that counts, not of its children.

use std::ffi::c_int;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use libc::{IPPROTO_TCP, SO_KEEPALIVE, SOL_SOCKET};
use libc::{TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_USER_TIMEOUT};
use parking_lot::Mutex;

use crate::link::gone::Gone;
use crate::link::message::Message;

/// How long a write may take; then the connection is given up.
const WRITE: Duration = Duration::from_secs(2);
/// How long nothing may be heard of the other host. Its kernel answers, so a process that is
/// stopped is not lost.
const SILENCE: Duration = Duration::from_secs(40);
/// The kernel asks after so much silence, and so often.
const KEEP_ALIVE: [(c_int, c_int); 3] = [(TCP_KEEPIDLE, 10), (TCP_KEEPINTVL, 5), (TCP_KEEPCNT, 6)];

/// A connection whose other end is known.
pub(super) struct Connection {
    stream: TcpStream,
    /// Held while a message is written.
    writing: Mutex<()>,
    broken: AtomicBool,
}

impl Connection {
    pub(super) fn new(stream: TcpStream) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(Some(WRITE))?;
        keep_alive(stream.as_raw_fd());
        keep_from_children(stream.as_raw_fd());
        Ok(Connection {
            stream,
            writing: Mutex::new(()),
            broken: AtomicBool::new(false),
        })
    }

    /// The next message; one thread reads.
    ///
    /// # Errors
    /// When the connection has ended.
    pub(super) fn read(&self) -> io::Result<Message> {
        Message::read(&mut &self.stream)
    }

    /// Sends a message; a connection that takes none is ended, which its reader notices.
    pub(super) fn send(&self, message: &Message) {
        let writing = self.writing.lock();
        let sent = message.write(&mut &self.stream);
        drop(writing);
        if sent.is_err() {
            self.broken.store(true, Ordering::Relaxed);
            self.shut_down();
        }
    }

    /// Whether a message could not be sent, so that the end of this connection says nothing.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Ends the connection.
    pub(super) fn shut_down(&self) {
        // It may have ended already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let socket = self.stream.as_raw_fd();
        for place in &KEPT {
            let _ = place.compare_exchange(socket, NONE, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

/// What the end of a connection without a goodbye says of the other side.
pub(super) fn meaning(error: &io::Error) -> Gone {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut, WouldBlock};
    match error.kind() {
        HostUnreachable | NetworkUnreachable | TimedOut | WouldBlock => Gone::Lost,
        // The kernel of the other host ends the connections of a process that ends.
        _ => Gone::Died,
    }
}

/// Makes the kernel notice when the other host is gone.
fn keep_alive(socket: RawFd) {
    let set = |level: c_int, option: c_int, value: c_int| {
        // SAFETY: the option takes one int, which lives until the call returns. A kernel that
        // knows none of them refuses, which changes nothing.
        unsafe {
            libc::setsockopt(
                socket,
                level,
                option,
                std::ptr::from_ref(&value).cast(),
                size_of::<c_int>() as libc::socklen_t,
            )
        };
    };
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
    for (option, value) in KEEP_ALIVE {
        set(IPPROTO_TCP, option, value);
    }
    set(IPPROTO_TCP, TCP_USER_TIMEOUT, SILENCE.as_millis() as c_int);
}

const NONE: RawFd = -1;
/// Sockets that a forked child must not hold: with them it would hold the connections of a parent
/// that dies. Beyond these it does.
static KEPT: [AtomicI32; 2048] = [const { AtomicI32::new(NONE) }; 2048];

fn keep_from_children(socket: RawFd) {
    static ONCE: Once = Once::new();
    // SAFETY: the handler makes async-signal-safe calls only, as a forked child may.
    ONCE.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(in_child));
    });
    for place in &KEPT {
        let taken = place.compare_exchange(NONE, socket, Ordering::SeqCst, Ordering::SeqCst);
        if taken.is_ok() {
            return;
        }
    }
}

/// Puts nothing in the place of each socket, whose number stays taken.
extern "C" fn in_child() {
    // SAFETY: the name ends with a zero.
    let nothing = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if nothing < 0 {
        return;
    }
    for place in &KEPT {
        let socket = place.load(Ordering::SeqCst);
        if socket != NONE {
            // SAFETY: both are open, and the child has no thread that uses the socket.
            unsafe { libc::dup3(nothing, socket, libc::O_CLOEXEC) };
        }
    }
    // SAFETY: it was opened above.
    unsafe { libc::close(nothing) };
}
