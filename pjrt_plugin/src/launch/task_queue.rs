//! A queue of tasks with a thread of its own, which starts with the first task.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::boundary;
use crate::error::Error;

/// Something to be done once.
pub type Task = Box<dyn FnOnce() + Send>;

/// Tasks that are done one after the other.
#[derive(Default)]
pub struct TaskQueue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    tasks: VecDeque<Task>,
    has_thread: bool,
    /// No task is added any more.
    closed: bool,
}

impl TaskQueue {
    /// Starts the thread, which runs `first` before all tasks, if there is none.
    pub fn start(self: &Arc<Self>, first: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let mut state = self.state.lock();
        if !state.has_thread {
            let queue = self.clone();
            let work = move || {
                first();
                queue.work();
            };
            std::thread::Builder::new()
                .name("mpi_cuda launch".into())
                .spawn(work)
                .map_err(|error| Error::internal(format!("cannot start a thread: {error}")))?;
            state.has_thread = true;
        }
        Ok(())
    }

    /// Adds a task; the thread has been started.
    pub fn push(&self, task: Task) {
        self.state.lock().tasks.push_back(task);
        self.changed.notify_one();
    }

    /// Ends the thread once all tasks have been done.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_one();
    }

    fn work(&self) {
        while let Some(task) = self.pop() {
            boundary::quiet((), task);
        }
    }

    /// The next task; waits for it. None once there are no more.
    fn pop(&self) -> Option<Task> {
        let mut state = self.state.lock();
        loop {
            if let Some(task) = state.tasks.pop_front() {
                return Some(task);
            }
            if state.closed {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn tasks_are_done_in_order_and_then_the_thread_ends() {
        let queue = Arc::new(TaskQueue::default());
        let (sender, receiver) = mpsc::channel();
        for _ in 0..2 {
            let sender = sender.clone();
            queue.start(move || sender.send(0).unwrap()).unwrap();
        }
        for number in 1..4 {
            let sender = sender.clone();
            queue.push(Box::new(move || sender.send(number).unwrap()));
        }
        drop(sender);
        queue.close();
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
    }
}
