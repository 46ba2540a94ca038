//! Connections: how messages are written to one, and how its end is noticed.
//!
//! A connection ends in one of two ways, which mean different things. The kernel *closes* the
//! connections of a process that ends: the other side reads their end. A process that lives never
//! closes one in order, it *breaks* it off with a reset. So does a network that fails, or is silent
//! for too long. Who is behind a connection that broke may live, and come back. Children of a
//! process hold none of its connections, since it is its own end that counts.
//!
//! A kernel also resets the connection of a process that ends without having read all that came.
//! Then nobody listens any more where the hub was. The death of another rank is told by the next
//! one of its node; without such a one it counts as lost.

use std::ffi::c_int;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use libc::{IPPROTO_TCP, SO_KEEPALIVE, SO_LINGER, SOL_SOCKET};
use libc::{TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_USER_TIMEOUT};
use parking_lot::Mutex;

use crate::link::message::Message;

/// How long a write may take; then the connection is given up.
const WRITE: Duration = Duration::from_secs(2);
/// How long nothing may be heard of the other host. Its kernel answers, so a process that is
/// stopped is not lost.
const SILENCE: Duration = Duration::from_secs(40);
/// The kernel asks after so much silence, and so often.
const KEEP_ALIVE: [(c_int, c_int); 3] = [(TCP_KEEPIDLE, 10), (TCP_KEEPINTVL, 5), (TCP_KEEPCNT, 6)];

/// Bytes of the stack of a thread that reads.
const STACK: usize = 256 << 10;

/// A connection.
pub(super) struct Connection {
    stream: TcpStream,
    /// Held while a message is written.
    writing: Mutex<()>,
    broken_off: AtomicBool,
    /// Whether a write found that the other side had reset it. The kernel reports a reset once: if
    /// a write got that report, the reader sees an ordinary end.
    reset: AtomicBool,
}

impl Connection {
    /// Over that stream, whose other side is not known yet.
    pub(super) fn new(stream: TcpStream) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        keep_alive(stream.as_raw_fd());
        keep_from_children(stream.as_raw_fd());
        Ok(Connection {
            stream,
            writing: Mutex::new(()),
            broken_off: AtomicBool::new(false),
            reset: AtomicBool::new(false),
        })
    }

    /// Lets both sides make sure of each other, by `talk`, until `deadline` at most.
    ///
    /// # Errors
    /// That of `talk`, or that the time has passed.
    pub(super) fn shake_hands<T>(
        &self,
        deadline: Instant,
        talk: impl FnOnce(&mut Handshake<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        let stream = &self.stream;
        let said = talk(&mut Handshake { stream, deadline })?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(Some(WRITE))?;
        Ok(said)
    }

    /// The next message; one thread reads.
    ///
    /// # Errors
    /// When the connection has ended.
    pub(super) fn read(&self) -> io::Result<Message> {
        Message::read(&mut &self.stream)
    }

    /// Whether a connection that ended with that error was closed, so that the process on the other
    /// side has ended.
    pub(super) fn was_closed(&self, error: &io::Error) -> bool {
        let closed = error.kind() == io::ErrorKind::UnexpectedEof;
        closed && !self.after_writes(&self.broken_off)
    }

    /// Whether the other side reset a connection that ended with that error.
    pub(super) fn was_reset(&self, error: &io::Error) -> bool {
        error.kind() == io::ErrorKind::ConnectionReset || self.after_writes(&self.reset)
    }

    /// What a write that is under way says of its end, which its reader sees at once.
    fn after_writes(&self, noted: &AtomicBool) -> bool {
        let _ended = self.writing.lock();
        noted.load(Ordering::SeqCst)
    }

    /// Sends a message; a connection that takes none is broken off, which its reader notices.
    pub(super) fn send(&self, message: &Message) {
        let _writing = self.writing.lock();
        let sent = message.write(&mut &self.stream);
        match sent.map_err(|error| error.kind()) {
            Ok(()) => {}
            // The other side had closed it before it was reset, which its reader will see.
            Err(io::ErrorKind::BrokenPipe) => {}
            Err(kind) => {
                let reset = kind == io::ErrorKind::ConnectionReset;
                self.reset.fetch_or(reset, Ordering::SeqCst);
                self.break_off();
            }
        }
    }

    /// Ends this connection for its reader; for the other side it ends when it is dropped.
    pub(super) fn break_off(&self) {
        self.broken_off.store(true, Ordering::SeqCst);
        // It may have ended already.
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    /// Does to the other side what the end of this process would.
    #[cfg(test)]
    pub(super) fn close(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let socket = self.stream.as_raw_fd();
        release(socket);
        // With this the kernel resets the connection when it is closed below. It is set no earlier,
        // since the end of the process would do the same then.
        let at_once = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        set(socket, SOL_SOCKET, SO_LINGER, &at_once);
    }
}

/// Where the hub listens; nobody does when its process has ended.
pub(super) struct Listener(TcpListener);

impl Listener {
    pub(super) fn new(listener: TcpListener) -> Listener {
        keep_from_children(listener.as_raw_fd());
        Listener(listener)
    }

    pub(super) fn accept(&self) -> io::Result<TcpStream> {
        self.0.accept().map(|(stream, _)| stream)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        release(self.0.as_raw_fd());
    }
}

/// A connection to somebody unknown, who has until an instant for all that is to be said: one that
/// says a little every second would else hold a thread for as long as it likes.
pub(super) struct Handshake<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Handshake<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

impl Read for Handshake<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(bytes)
    }
}

impl Write for Handshake<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts a thread that serves connections.
pub(super) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = std::thread::Builder::new().name(name.into());
    builder.stack_size(STACK).spawn(run).map(drop)
}

/// Makes the kernel notice when the other host is gone.
pub(super) fn keep_alive(socket: RawFd) {
    set::<c_int>(socket, SOL_SOCKET, SO_KEEPALIVE, &1);
    for (option, value) in KEEP_ALIVE {
        set(socket, IPPROTO_TCP, option, &value);
    }
    let silence = SILENCE.as_millis() as c_int;
    set(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, &silence);
}

/// Sets an option of a socket, whose value is of that type in C. A kernel that does not know it
/// refuses, which changes nothing.
fn set<T>(socket: RawFd, level: c_int, option: c_int, value: &T) {
    // SAFETY: the value lives until the call returns, and has as many bytes as are told.
    unsafe {
        libc::setsockopt(
            socket,
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
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

/// Before it is closed, since another file may have its number then.
fn release(socket: RawFd) {
    for place in &KEPT {
        let _ = place.compare_exchange(socket, NONE, Ordering::SeqCst, Ordering::SeqCst);
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
