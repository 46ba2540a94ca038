//! One order of launches for each thread. The first thread is the process's main thread, and the
//! one that made the client: their launches share one order, which is XLA's queue. Other threads
//! have orders of their own, each with a thread of ours that launches for them and may wait for
//! peers (`deferred.rs`), on a client with a queue of its own (`spare_client.rs`). So no two of
//! them wait for each other. On GPUs all threads share one order, and where the user says so: a
//! framework may launch from whichever thread of a pool is free.

use std::cell::{OnceCell, RefCell};
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use mpi_runtime::World;
use parking_lot::{ReentrantMutex, ReentrantMutexGuard};

use crate::config::Orders;
use crate::inner::{dispatch_thread, on_gpu};
use crate::launch::inflight_limit::Limit;
use crate::launch::task_queue::TaskQueue;

/// The order of one thread's launches.
pub struct ThreadOrder {
    /// 0 of the first thread.
    pub number: u32,
    /// How many of its launches are in flight or deferred.
    pub limit: Arc<Limit>,
    /// Those that are deferred.
    pub queue: Arc<TaskQueue>,
    /// Held from taking a ticket until the inner plugin has queued the launch, so that tickets and
    /// XLA's own queue have the same order. Reentrant, since a host callback may launch programs.
    launching: ReentrantMutex<()>,
}

static FIRST: LazyLock<Arc<ThreadOrder>> = LazyLock::new(|| Arc::new(ThreadOrder::new(0)));
/// All threads share the first one's order.
static ONE: AtomicBool = AtomicBool::new(false);
/// Other threads have launched something.
static OTHERS: AtomicBool = AtomicBool::new(false);

thread_local! {
    static CURRENT: OnceCell<Current> = const { OnceCell::new() };
    /// The order that a thread of ours launches for, or that of the first thread.
    static ADOPTED: RefCell<Option<Arc<ThreadOrder>>> = const { RefCell::new(None) };
}

/// The order of a thread, until the thread ends.
struct Current(Arc<ThreadOrder>);

impl Drop for Current {
    fn drop(&mut self) {
        if !self.0.is_first() {
            self.0.queue.close();
        }
    }
}

impl ThreadOrder {
    fn new(number: u32) -> ThreadOrder {
        ThreadOrder {
            number,
            limit: Arc::default(),
            queue: Arc::default(),
            launching: ReentrantMutex::new(()),
        }
    }

    /// Whether it is the first thread's.
    pub fn is_first(&self) -> bool {
        self.number == 0
    }

    /// Waits for other threads that launch in this order, and keeps them waiting.
    pub fn lock(&self) -> ReentrantMutexGuard<'_, ()> {
        self.launching.lock()
    }
}

/// The order of the calling thread for launches with operations. Alone in the world nothing waits
/// for a peer, and all threads launch into XLA's queue.
pub fn of(world: &World) -> Arc<ThreadOrder> {
    match world.size {
        1 => first(),
        _ => current(),
    }
}

/// The order of the calling thread.
pub fn current() -> Arc<ThreadOrder> {
    if let Some(adopted) = ADOPTED.with_borrow(Clone::clone) {
        return adopted;
    }
    let own = CURRENT.try_with(|current| current.get_or_init(make).0.clone());
    // A thread that is ending.
    own.unwrap_or_else(|_| FIRST.clone())
}

fn make() -> Current {
    static LAST: AtomicU32 = AtomicU32::new(0);
    if on_gpu() || is_one() || dispatch_thread::is_main() {
        return Current(FIRST.clone());
    }
    OTHERS.store(true, Ordering::Release);
    let number = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    Current(Arc::new(ThreadOrder::new(number)))
}

/// The first thread's order.
pub fn first() -> Arc<ThreadOrder> {
    FIRST.clone()
}

/// Whether all threads share the first one's order because the user says so: then launches of any
/// of them stand for the main thread's.
pub fn is_one() -> bool {
    ONE.load(Ordering::Acquire)
}

/// Whether there are other threads than the first that launch.
pub fn are_others() -> bool {
    OTHERS.load(Ordering::Acquire)
}

/// The calling thread launches in that order from now on.
pub fn adopt(order: Arc<ThreadOrder>) {
    ADOPTED.set(Some(order));
}

/// The calling thread makes a client, whose user says which orders there are.
pub fn adopt_first(orders: Orders) {
    if orders == Orders::One {
        ONE.store(true, Ordering::Release);
    }
    static MADE: AtomicBool = AtomicBool::new(false);
    if !MADE.swap(true, Ordering::AcqRel) {
        adopt(first());
    }
}
