//! The order of what this process does: launches take a ticket when they are dispatched, and the
//! operations of a launch wait until the earlier launches that it is ordered with have ended. Those
//! are the launches of the same thread, and those that use one of the same communicators.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use parking_lot::{Condvar, Mutex};

/// Names one launch; never 0, and at most `i32::MAX`, since it is a positive `launch_id` of PJRT's.
/// Tickets are compared only for equality, so beginning again at 1 is safe while fewer launches are
/// in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u32);

/// What decides which other launches a launch is ordered with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaunchOrder {
    /// The thread that dispatched it.
    pub thread: u32,
    /// The communicators that it uses.
    pub comms: &'static [i64],
    /// What its program is: its collectives use communicators of that program alone. 0 if they use
    /// those of all programs.
    pub channel: u64,
}

/// In place of the communicators of a launch of which nobody knows what it uses.
pub const ANY_COMM: i64 = i64::MIN;

impl LaunchOrder {
    fn is_ordered_with(&self, other: &LaunchOrder) -> bool {
        self.thread == other.thread
            || self.comms.contains(&ANY_COMM)
            || other.comms.contains(&ANY_COMM)
            || self.comms.iter().any(|comm| other.comms.contains(comm))
    }

    fn may_use(&self, comm: i64) -> bool {
        self.comms.contains(&comm) || self.comms.contains(&ANY_COMM)
    }
}

/// The queue of launches that have not ended.
#[derive(Default)]
pub struct Order {
    state: Mutex<OrderState>,
    changed: Condvar,
}

struct Launch {
    ticket: Ticket,
    order: LaunchOrder,
    /// An operation of it has had its turn.
    begun: bool,
}

#[derive(Default)]
struct OrderState {
    last: u32,
    in_flight: VecDeque<Launch>,
}

impl OrderState {
    fn next(&mut self) -> Ticket {
        let after = |ticket: u32| ticket % i32::MAX as u32 + 1;
        let mut next = after(self.last);
        while self.place(Ticket(next)).is_some() {
            next = after(next);
        }
        self.last = next;
        Ticket(next)
    }

    #[inline]
    fn place(&self, ticket: Ticket) -> Option<usize> {
        self.in_flight
            .iter()
            .position(|launch| launch.ticket == ticket)
    }

    /// Whether none that it is ordered with is before the launch in that place.
    #[inline]
    fn is_first(&self, place: usize) -> bool {
        let own = self.in_flight[place].order;
        let mut earlier = self.in_flight.iter().take(place);
        !earlier.any(|launch| launch.order.is_ordered_with(&own))
    }
}

impl Order {
    /// The thread that dispatched a launch which has not ended.
    pub fn thread(&self, ticket: Ticket) -> Option<u32> {
        let state = self.state.lock();
        let place = state.place(ticket)?;
        Some(state.in_flight[place].order.thread)
    }

    /// Takes the next ticket. Whoever takes one must [`Order::retire`] it, else all stops.
    pub fn issue(&self, order: LaunchOrder) -> Ticket {
        let mut state = self.state.lock();
        let ticket = state.next();
        state.in_flight.push_back(Launch {
            ticket,
            order,
            begun: false,
        });
        ticket
    }

    /// Takes a ticket before those of all launches that it is ordered with and that have not begun.
    pub fn issue_first(&self, order: LaunchOrder) -> Ticket {
        let mut state = self.state.lock();
        let ticket = state.next();
        let before = |launch: &Launch| launch.begun && launch.order.is_ordered_with(&order);
        let place = state.in_flight.iter().rposition(before);
        let launch = Launch {
            ticket,
            order,
            begun: false,
        };
        state
            .in_flight
            .insert(place.map_or(0, |last| last + 1), launch);
        ticket
    }

    /// Waits until every earlier launch that `ticket` is ordered with has ended, and has the
    /// channel of its collectives. Unknown tickets do not wait.
    #[inline]
    pub fn wait_turn(&self, ticket: Ticket) -> u64 {
        let mut state = self.state.lock();
        loop {
            let Some(place) = state.place(ticket) else {
                return 0;
            };
            if state.is_first(place) {
                let launch = &mut state.in_flight[place];
                launch.begun = true;
                return launch.order.channel;
            }
            self.changed.wait(&mut state);
        }
    }

    /// Waits until every earlier launch of other threads that `ticket` is ordered with has ended.
    pub fn wait_for_other_threads(&self, ticket: Ticket) {
        let mut state = self.state.lock();
        while state.place(ticket).is_some_and(|place| {
            let own = state.in_flight[place].order;
            let mut earlier = state.in_flight.iter().take(place);
            earlier.any(|launch| {
                launch.order.thread != own.thread && launch.order.is_ordered_with(&own)
            })
        }) {
            self.changed.wait(&mut state);
        }
    }

    /// Whether a launch of another thread is in flight that one like this would be ordered with.
    pub fn has_other_threads(&self, order: &LaunchOrder) -> bool {
        let state = self.state.lock();
        state.in_flight.iter().any(|launch| {
            launch.order.thread != order.thread && launch.order.is_ordered_with(order)
        })
    }

    /// The launch of `ticket` has ended, or never ran.
    pub fn retire(&self, ticket: Ticket) {
        let mut state = self.state.lock();
        if let Some(position) = state.place(ticket) {
            state.in_flight.remove(position);
            self.changed.notify_all();
        }
    }

    /// Waits until the launches dispatched so far have ended that are `meant`.
    fn wait_ended(&self, meant: impl Fn(&Launch) -> bool) {
        let mut state = self.state.lock();
        let launches = state.in_flight.iter().filter(|launch| meant(launch));
        let dispatched: Vec<Ticket> = launches.map(|launch| launch.ticket).collect();
        while dispatched
            .iter()
            .any(|ticket| state.place(*ticket).is_some())
        {
            self.changed.wait(&mut state);
        }
    }

    /// Waits until the launches dispatched so far have ended.
    pub fn wait_idle(&self) {
        self.wait_ended(|_| true);
    }

    /// Waits until the launch of `ticket` has ended.
    pub fn wait_launch(&self, ticket: Ticket) {
        self.wait_ended(|launch| launch.ticket == ticket);
    }

    /// Waits until the launches dispatched so far have ended that use the communicator.
    pub fn wait_comm(&self, comm: i64) {
        self.wait_ended(|launch| launch.order.may_use(comm));
    }

    /// The launches that have not ended and use the communicator.
    pub fn not_ended(&self, comm: i64) -> Vec<Ticket> {
        let state = self.state.lock();
        let launches = state.in_flight.iter();
        let using = launches.filter(|launch| launch.order.may_use(comm));
        using.map(|launch| launch.ticket).collect()
    }

    /// Whether the launch has none before it to wait for.
    pub fn is_first(&self, ticket: Ticket) -> bool {
        let state = self.state.lock();
        state
            .place(ticket)
            .is_some_and(|place| state.is_first(place))
    }

    /// Number of launches that have not ended.
    pub fn in_flight(&self) -> usize {
        self.state.lock().in_flight.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    #[test]
    fn launches_take_turns_whoever_asks_first() {
        let order = Arc::new(Order::default());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let tickets: Vec<Ticket> = (0..8)
            .map(|_| order.issue(LaunchOrder::default()))
            .collect();
        let threads: Vec<_> = tickets
            .iter()
            .rev()
            .map(|&ticket| {
                let (order, seen) = (order.clone(), seen.clone());
                thread::spawn(move || {
                    order.wait_turn(ticket);
                    seen.lock().push(ticket);
                    order.retire(ticket);
                })
            })
            .collect();
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        assert_eq!(*seen.lock(), tickets);
        assert_eq!(order.in_flight(), 0);
    }

    #[test]
    fn the_first_comes_before_those_that_have_not_begun() {
        let order = Order::default();
        let (begun, waiting) = (
            order.issue(LaunchOrder::default()),
            order.issue(LaunchOrder::default()),
        );
        let before_begun = order.issue_first(LaunchOrder::default());
        order.wait_turn(before_begun);
        order.retire(before_begun);
        order.wait_turn(begun);
        let between = order.issue_first(LaunchOrder::default());
        let state = order.state.lock();
        let tickets = state.in_flight.iter().map(|launch| launch.ticket);
        assert!(tickets.eq([begun, between, waiting]));
        drop(state);
        order.retire(begun);
        order.wait_turn(between);
        order.retire(between);
        order.wait_turn(waiting);
    }

    #[test]
    fn tickets_wrap_and_are_above_zero() {
        const MOST: u32 = i32::MAX as u32;
        let order = Order::default();
        order.state.lock().last = MOST - 1;
        let (first, second) = (
            order.issue(LaunchOrder::default()),
            order.issue(LaunchOrder::default()),
        );
        assert_eq!((first, second), (Ticket(MOST), Ticket(1)));
        order.wait_turn(first);
        order.retire(first);
        order.wait_turn(second);
    }

    #[test]
    fn a_retired_or_unknown_ticket_never_blocks() {
        let order = Order::default();
        let (first, second) = (
            order.issue(LaunchOrder::default()),
            order.issue(LaunchOrder::default()),
        );
        order.retire(first);
        order.wait_turn(second);
        order.wait_turn(Ticket(77));
        order.retire(second);
        order.wait_idle();
    }

    #[test]
    fn idle_means_all_dispatched_so_far() {
        let order = Arc::new(Order::default());
        let tickets = [
            order.issue(LaunchOrder::default()),
            order.issue(LaunchOrder::default()),
            order.issue(LaunchOrder::default()),
        ];
        let waiter = {
            let order = order.clone();
            thread::spawn(move || order.wait_idle())
        };
        for ticket in [tickets[2], tickets[0], tickets[1]] {
            assert!(!waiter.is_finished());
            order.retire(ticket);
        }
        waiter.join().unwrap();
    }

    #[test]
    fn threads_wait_for_each_other_only_where_they_share_a_communicator() {
        let order = Order::default();
        let launch = |thread, comms| {
            order.issue(LaunchOrder {
                thread,
                comms,
                channel: u64::from(thread),
            })
        };
        let first = launch(0, &[1, 2]);
        let (apart, behind) = (launch(1, &[3]), launch(1, &[4]));
        let shared = launch(2, &[2, 5]);
        let own = launch(0, &[6]);
        assert_eq!(order.wait_turn(apart), 1);
        for waits in [behind, shared, own] {
            assert!(!order.is_first(waits));
        }
        order.wait_for_other_threads(behind);
        order.wait_for_other_threads(own);
        assert!(order.has_other_threads(&LaunchOrder {
            thread: 7,
            comms: &[5],
            channel: 0
        }));
        assert_eq!(order.not_ended(2), [first, shared]);
        let unknown = launch(3, &[ANY_COMM]);
        assert!(!order.is_first(unknown) && order.not_ended(77) == [unknown]);
        order.retire(unknown);
        order.retire(first);
        order.wait_for_other_threads(shared);
        assert_eq!(order.wait_turn(shared), 2);
        assert!(order.is_first(own) && !order.is_first(behind));
        order.wait_comm(1);
        order.retire(apart);
        order.wait_launch(apart);
        assert!(order.is_first(behind));
    }
}
