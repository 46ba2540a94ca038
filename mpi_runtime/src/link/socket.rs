//! Connections: how messages are written to one, and how its end is noticed.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libc::{IPPROTO_TCP, SO_KEEPALIVE, SOL_SOCKET, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL};
use libc::{TCP_USER_TIMEOUT, c_int};
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

/// The writing end of a connection whose other end is known.
pub(super) struct Connection {
    stream: Mutex<TcpStream>,
    broken: AtomicBool,
}

impl Connection {
    /// For writing; the caller reads from the stream.
    pub(super) fn new(stream: &TcpStream) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(Some(WRITE))?;
        keep_alive(stream.as_raw_fd());
        Ok(Connection {
            stream: Mutex::new(stream.try_clone()?),
            broken: AtomicBool::new(false),
        })
    }

    /// Sends a message; a connection that takes none is ended, which its reader notices.
    pub(super) fn send(&self, message: &Message) {
        let mut stream = self.stream.lock();
        if message.write(&mut *stream).is_err() {
            self.broken.store(true, Ordering::Relaxed);
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Ends the connection.
    #[cfg(test)]
    pub(super) fn shut_down(&self) {
        let _ = self.stream.lock().shutdown(Shutdown::Both);
    }

    /// Whether a message could not be sent, so that the end of this connection says nothing.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
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
