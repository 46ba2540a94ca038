//! JAX's coordinator, which the framework starts: rank 0 hears that a rank wants it, and the others
//! hear where it is. Nothing is sent for it in a job that does not use it.

#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::link::gone::Gone;
use crate::link::{Link, relay};
use crate::node::board::Board;

/// Brings the framework's part up; it may take long.
pub type BringUp = fn();

/// What this rank knows of it.
pub struct Coordinator {
    rank: usize,
    size: usize,
    board: Option<Arc<Board>>,
    link: Option<Arc<Link>>,
    wanted: AtomicBool,
    /// Where this process connects to.
    way: Mutex<Option<SocketAddr>>,
    /// Called when it is wanted, and then no more.
    bring_up: Mutex<Option<BringUp>>,
}

impl Coordinator {
    pub(crate) fn new(
        rank: i32,
        size: i32,
        board: &Option<Arc<Board>>,
        link: &Option<Arc<Link>>,
    ) -> Arc<Coordinator> {
        Arc::new(Coordinator {
            rank: rank as usize,
            size: size as usize,
            board: board.clone(),
            link: link.clone(),
            wanted: AtomicBool::new(false),
            way: Mutex::new(None),
            bring_up: Mutex::new(None),
        })
    }

    /// Says what to call, on a thread of its own, once another rank wants it.
    pub fn set_bring_up(&self, function: Option<BringUp>) {
        *self.bring_up.lock() = function;
    }

    /// Whether there are ranks on other nodes, who need an address of this host's.
    pub fn is_for_several_nodes(&self) -> bool {
        self.link.is_some()
    }

    /// This rank wants it: where to connect to, or none if that is not known yet.
    ///
    /// # Errors
    /// If it can never be known, as far as one can say. Rank 0 may still start it at its end.
    pub fn want(&self) -> Result<Option<SocketAddr>, String> {
        if let Some(place) = self.place() {
            return self.way_to(place).map(Some);
        }
        let seen = self.board.as_ref().map_or(1, |board| board.ranks());
        if seen < self.size && self.link.is_none() {
            return Err("the nodes of this job have no connection to each other".into());
        }
        self.wanted.store(true, Ordering::SeqCst);
        if let Some(board) = &self.board {
            board.want_coordinator();
        }
        if let Some(link) = &self.link {
            link.want_coordinator();
        }
        match self.gone(0) {
            Some(how) => Err(format!("rank 0, which would have it, {how}")),
            None => Ok(None),
        }
    }

    /// Whether a rank has died, or cannot be reached.
    pub fn has_died(&self, rank: usize) -> bool {
        match self.board.as_ref().filter(|board| board.sees(rank)) {
            Some(board) => board.gone(rank).is_some() && !board.has_left(rank),
            None => {
                let gone = self.link.as_ref().and_then(|link| link.gone(rank));
                gone.is_some_and(|how| how != Gone::Left)
            }
        }
    }

    /// Of a rank that is not rank 0: the end of the coordinator must not be the end of this
    /// process.
    fn way_to(&self, place: SocketAddr) -> Result<SocketAddr, String> {
        if self.rank == 0 {
            return Ok(place);
        }
        let mut way = self.way.lock();
        if way.is_none() {
            *way = Some(relay::start(place).map_err(|error| error.to_string())?);
        }
        Ok(way.unwrap_or(place))
    }

    /// Rank 0 has started it on that port.
    pub fn tell(&self, port: u16) {
        let place = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        match (&self.link, &self.board) {
            (Some(link), _) => link.tell_coordinator(place),
            (None, Some(board)) => board.show_coordinator(place),
            (None, None) => {}
        }
    }

    /// Looks whether something is to be done.
    pub(super) fn look(&self) {
        let place = self.place();
        let due = match self.rank {
            0 => place.is_none() && self.is_wanted(),
            _ => place.is_some(),
        };
        if let Some(link) = &self.link
            && place.is_none()
            && self.is_wanted()
        {
            // Again until it is answered, since a connection may have broken.
            link.want_coordinator();
        }
        let function = match due {
            true => self.bring_up.lock().take(),
            false => None,
        };
        if let Some(function) = function {
            // Without a thread the others wait, and say so.
            let _ = std::thread::Builder::new()
                .name("mpi_cuda coordinator".into())
                .spawn(function);
        }
    }

    fn is_wanted(&self) -> bool {
        let board = self.board.as_ref();
        self.wanted.load(Ordering::SeqCst)
            || board.is_some_and(|board| board.is_coordinator_wanted())
            || self
                .link
                .as_ref()
                .is_some_and(|link| link.is_coordinator_wanted())
    }

    fn place(&self) -> Option<SocketAddr> {
        let heard = || self.link.as_ref().and_then(|link| link.coordinator());
        let board = self.board.as_ref();
        board.and_then(|board| board.coordinator()).or_else(heard)
    }

    fn gone(&self, rank: usize) -> Option<&'static str> {
        match self.board.as_ref().filter(|board| board.sees(rank)) {
            Some(board) => board.gone(rank),
            None => self.link.as_ref()?.gone(rank).map(Gone::words),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::segment::new_number;

    fn pair() -> [Arc<Coordinator>; 2] {
        let number = new_number();
        let mut boards = [0, 1].map(|rank| Board::make(number, rank, 2).unwrap());
        boards.iter_mut().for_each(Board::open);
        boards.iter().for_each(Board::unlink);
        let mut rank = 0;
        boards.map(|board| {
            rank += 1;
            Coordinator::new(rank - 1, 2, &Some(Arc::new(board)), &None)
        })
    }

    static CALLS: Mutex<u32> = Mutex::new(0);

    fn wait_for_calls(count: u32) {
        for _ in 0..200 {
            if *CALLS.lock() == count {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("{} calls, and not {count}", *CALLS.lock());
    }

    #[test]
    fn one_rank_wants_it_and_both_bring_it_up() {
        let [first, second] = pair();
        for rank in [&first, &second] {
            rank.set_bring_up(Some(|| *CALLS.lock() += 1));
            rank.look();
        }
        assert_eq!(second.want(), Ok(None));
        first.look();
        second.look();
        wait_for_calls(1);
        first.tell(4711);
        let place: SocketAddr = "127.0.0.1:4711".parse().unwrap();
        assert_eq!(first.want(), Ok(Some(place)));
        // By a way of its own.
        let way = second.want().unwrap().unwrap();
        assert!(way.ip().is_loopback() && way != place);
        second.look();
        second.look();
        wait_for_calls(2);
        assert!(!first.is_for_several_nodes());
    }

    #[test]
    fn a_rank_whose_rank_0_has_ended_waits_for_nothing() {
        let [first, second] = pair();
        first.board.as_ref().unwrap().leave();
        assert!(!second.has_died(0));
        assert!(second.want().unwrap_err().contains("has ended its program"));
        let alone = Coordinator::new(1, 2, &None, &None);
        assert!(alone.want().unwrap_err().contains("no connection"));
    }
}
