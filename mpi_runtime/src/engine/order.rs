//! One order for everything this process does: launches take a ticket when they are dispatched,
//! and the operations of a launch wait until every earlier ticket is retired.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use parking_lot::{Condvar, Mutex};

/// Names one launch; never 0. 32 bits because PJRT's `launch_id` has no more. Tickets are compared
/// only for equality, so wrapping around is safe while fewer than 2^32 launches are in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u32);

/// The queue of launches that have not ended.
#[derive(Default)]
pub struct Order {
    state: Mutex<OrderState>,
    changed: Condvar,
}

#[derive(Default)]
struct OrderState {
    last: u32,
    in_flight: VecDeque<Ticket>,
    /// The first of them has begun: an operation of it has had its turn.
    first_has_begun: bool,
}

impl OrderState {
    fn next(&mut self) -> Ticket {
        let mut next = self.last.wrapping_add(1);
        while next == 0 || self.in_flight.contains(&Ticket(next)) {
            next = next.wrapping_add(1);
        }
        self.last = next;
        Ticket(next)
    }
}

impl Order {
    /// Takes the next ticket. Whoever takes one must [`Order::retire`] it, else all stops.
    pub fn issue(&self) -> Ticket {
        let mut state = self.state.lock();
        let ticket = state.next();
        state.in_flight.push_back(ticket);
        ticket
    }

    /// Takes a ticket before those of all launches that have not begun.
    pub fn issue_first(&self) -> Ticket {
        let mut state = self.state.lock();
        let ticket = state.next();
        let place = usize::from(state.first_has_begun);
        state.in_flight.insert(place, ticket);
        ticket
    }

    /// Waits until every launch before `ticket` has ended. Unknown tickets do not wait.
    #[inline]
    pub fn wait_turn(&self, ticket: Ticket) {
        let mut state = self.state.lock();
        while state.in_flight.front() != Some(&ticket) && state.in_flight.contains(&ticket) {
            self.changed.wait(&mut state);
        }
        state.first_has_begun |= state.in_flight.front() == Some(&ticket);
    }

    /// The launch of `ticket` has ended, or never ran.
    pub fn retire(&self, ticket: Ticket) {
        let mut state = self.state.lock();
        if let Some(position) = state.in_flight.iter().position(|other| *other == ticket) {
            state.in_flight.remove(position);
            state.first_has_begun &= position != 0;
            self.changed.notify_all();
        }
    }

    /// Waits until the launches dispatched so far have ended.
    pub fn wait_idle(&self) {
        let mut state = self.state.lock();
        let dispatched = state.in_flight.clone();
        while dispatched
            .iter()
            .any(|ticket| state.in_flight.contains(ticket))
        {
            self.changed.wait(&mut state);
        }
    }

    /// The launches that have not ended.
    pub fn not_ended(&self) -> Vec<Ticket> {
        self.state.lock().in_flight.iter().copied().collect()
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
        let tickets: Vec<Ticket> = (0..8).map(|_| order.issue()).collect();
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
        let (begun, waiting) = (order.issue(), order.issue());
        let before_begun = order.issue_first();
        order.wait_turn(before_begun);
        order.retire(before_begun);
        order.wait_turn(begun);
        let between = order.issue_first();
        assert_eq!(order.state.lock().in_flight, [begun, between, waiting]);
        order.retire(begun);
        order.wait_turn(between);
        order.retire(between);
        order.wait_turn(waiting);
    }

    #[test]
    fn tickets_wrap_and_skip_zero() {
        let order = Order::default();
        order.state.lock().last = u32::MAX - 1;
        let (first, second) = (order.issue(), order.issue());
        assert_eq!((first, second), (Ticket(u32::MAX), Ticket(1)));
        order.wait_turn(first);
        order.retire(first);
        order.wait_turn(second);
    }

    #[test]
    fn a_retired_or_unknown_ticket_never_blocks() {
        let order = Order::default();
        let (first, second) = (order.issue(), order.issue());
        order.retire(first);
        order.wait_turn(second);
        order.wait_turn(Ticket(77));
        order.retire(second);
        order.wait_idle();
    }

    #[test]
    fn idle_means_all_dispatched_so_far() {
        let order = Arc::new(Order::default());
        let tickets = [order.issue(), order.issue(), order.issue()];
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
}
