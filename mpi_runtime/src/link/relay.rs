//! A way to JAX's coordinator that outlives it. JAX's client ends its process at once, with a stack
//! trace, when the connection to the coordinator ends. So each rank connects to itself, and what it
//! says is passed on. If rank 0 dies, the client hears nothing of it until the ranks have had the
//! time to say so in words.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread::sleep;
use std::time::Duration;

use crate::link::socket::{keep_alive, spawn};

/// So long the client hears nothing after the coordinator has gone; it then waits in vain.
const GRACE: Duration = Duration::from_secs(60);
/// Of one attempt to connect.
const TRY: Duration = Duration::from_secs(10);

/// Passes on what is said between whoever connects to the place that this returns, and `target`.
///
/// # Errors
/// If there are no sockets or threads left.
pub(crate) fn start(target: SocketAddr) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let place = listener.local_addr()?;
    spawn("mpi_cuda relay", move || {
        loop {
            match listener.accept() {
                // Whoever is not passed on tries again.
                Ok((client, _)) => drop(pass_on(client, target)),
                Err(_) => sleep(Duration::from_millis(100)),
            }
        }
    })?;
    Ok(place)
}

/// There is one client in this process, with one connection.
fn pass_on(mut client: TcpStream, target: SocketAddr) -> io::Result<()> {
    let mut coordinator = TcpStream::connect_timeout(&target, TRY)?;
    for stream in [&client, &coordinator] {
        stream.set_nodelay(true)?;
    }
    keep_alive(coordinator.as_raw_fd());
    let (mut answers, mut answered) = (coordinator.try_clone()?, client.try_clone()?);
    spawn("mpi_cuda answers", move || {
        // However it ends, it ends.
        let _ = io::copy(&mut answers, &mut answered);
        sleep(GRACE);
        let _ = answered.shutdown(std::net::Shutdown::Both);
    })?;
    let _ = io::copy(&mut client, &mut coordinator);
    let _ = coordinator.shutdown(std::net::Shutdown::Both);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn what_is_said_arrives_and_the_end_of_the_other_side_is_not_told() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let place = start(listener.local_addr().unwrap()).unwrap();
        let mut client = TcpStream::connect(place).unwrap();
        let (mut coordinator, _) = listener.accept().unwrap();
        let mut heard = [0; 5];
        client.write_all(b"hello").unwrap();
        coordinator.read_exact(&mut heard).unwrap();
        coordinator.write_all(b"world").unwrap();
        client.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"world");
        drop(coordinator);
        let limit = Some(Duration::from_millis(200));
        client.set_read_timeout(limit).unwrap();
        let nothing = client.read(&mut heard).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    }
}
