//! A device without hardware: memory that the host does not address, and streams whose work is done
//! late, by threads of their own, each in its own time. For tests.
//!
//! Until a copy has happened its target holds [`NOT_YET`], so whoever reads too early sees it, and
//! its source is read only when it happens, so whoever writes too early is seen too.

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::device::{Address, Copy, Device, DeviceError, Event, Fill, HostMemory, Stream};

/// What memory holds while a copy to it has not happened.
pub const NOT_YET: u8 = 0xa5;

/// Where device memory is, as the program says.
enum Memory {
    /// At addresses of its own, where nothing of the host is.
    Own(Arc<Mutex<Vec<u8>>>),
    /// The host's, which the program promises to treat like a device's.
    Hosts,
}

/// Addresses of memory of its own begin here: no process has memory there.
const FIRST: Address = 1 << 62;

type Work = Box<dyn FnOnce() + Send>;

/// The device.
pub struct Simulated {
    memory: Memory,
    streams: Mutex<Vec<Sender<Work>>>,
    events: Mutex<HashMap<u64, Arc<Passed>>>,
    /// Sizes of the host's memory that was given as the device's.
    lent: Mutex<HashMap<Address, usize>>,
    next: AtomicU64,
    delay: Duration,
    /// Copies that happen before the device fails.
    good: AtomicUsize,
    /// Most copies on their way at once, and now.
    flying: Arc<Flying>,
}

#[derive(Default)]
struct Flying {
    now: AtomicUsize,
    most: AtomicUsize,
}

#[derive(Default)]
struct Passed {
    passed: Mutex<bool>,
    changed: Condvar,
}

impl Passed {
    fn pass(&self) {
        *self.passed.lock() = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut passed = self.passed.lock();
        while !*passed {
            self.changed.wait(&mut passed);
        }
    }
}

impl Simulated {
    /// A device with `bytes` bytes of memory of its own, whose copies take up to `delay`.
    pub fn with_memory(bytes: usize, delay: Duration) -> Simulated {
        Self::over(Memory::Own(Arc::new(Mutex::new(vec![0; bytes]))), delay)
    }

    /// A device whose memory is the host's.
    pub fn over_host(delay: Duration) -> Simulated {
        Self::over(Memory::Hosts, delay)
    }

    fn over(memory: Memory, delay: Duration) -> Simulated {
        Simulated {
            memory,
            streams: Mutex::default(),
            events: Mutex::default(),
            lent: Mutex::default(),
            next: AtomicU64::new(1),
            delay,
            good: AtomicUsize::new(usize::MAX),
            flying: Arc::default(),
        }
    }

    /// The address of byte `place` of its own memory.
    pub fn address(place: usize) -> Address {
        FIRST + place
    }

    /// Fails after `copies` more copies.
    pub fn fail_after(&self, copies: usize) {
        self.good.store(copies, Ordering::SeqCst);
    }

    /// Most copies that were on their way at once.
    pub fn most_at_once(&self) -> usize {
        self.flying.most.load(Ordering::SeqCst)
    }

    /// Does something with its memory now, as an MPI that knows the device.
    pub fn with<T>(&self, body: impl FnOnce(&mut [u8]) -> T) -> Option<T> {
        match &self.memory {
            Memory::Own(memory) => Some(body(&mut memory.lock())),
            Memory::Hosts => None,
        }
    }

    /// Does something with its memory, in the order of a stream, and late: a kernel.
    pub fn kernel(&self, stream: Stream, body: impl FnOnce(&mut [u8]) + Send + 'static) {
        if let Memory::Own(memory) = &self.memory {
            let (memory, delay) = (memory.clone(), self.some_delay());
            self.put(
                stream,
                Box::new(move || {
                    std::thread::sleep(delay);
                    body(&mut memory.lock());
                }),
            );
        }
    }

    /// Waits until everything in `stream` has happened.
    pub fn synchronize(&self, stream: Stream) {
        let passed = Arc::new(Passed::default());
        let signal = passed.clone();
        self.put(stream, Box::new(move || signal.pass()));
        passed.wait();
    }

    fn put(&self, stream: Stream, work: Work) {
        let streams = self.streams.lock();
        let sent = streams
            .get(stream.0 as usize)
            .map(|stream| stream.send(work));
        assert!(matches!(sent, Some(Ok(()))), "a simulated stream has ended");
    }

    /// Different from copy to copy, so that streams overtake each other.
    fn some_delay(&self) -> Duration {
        let turn = self
            .next
            .fetch_add(1, Ordering::Relaxed)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.delay
            .mul_f64((turn >> 40) as f64 / (1u64 << 24) as f64)
    }

    fn error(&self, action: &'static str) -> DeviceError {
        DeviceError {
            action,
            device: "the simulated device".into(),
            reason: "it was told to fail".into(),
        }
    }
}

/// Plain numbers, so that they may go to another thread.
struct Move {
    to: usize,
    from: usize,
    bytes: usize,
}

/// Copies `bytes` to the device's memory at `to`.
///
/// # Safety
/// If the memory is the host's, it must be valid.
unsafe fn write(own: Option<&Mutex<Vec<u8>>>, to: Address, bytes: &[u8]) {
    match own {
        Some(memory) => memory.lock()[to - FIRST..][..bytes.len()].copy_from_slice(bytes),
        // SAFETY: memory of the host is valid for as many bytes, as this function demands.
        None => unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len())
        },
    }
}

impl Move {
    /// Happens between the host and `memory`, which has the addresses from [`FIRST`] on.
    ///
    /// # Safety
    /// Memory of the host must be valid.
    unsafe fn within(&self, memory: &mut [u8]) {
        let ends = [self.to, self.from].map(|address| address.checked_sub(FIRST));
        match ends {
            [Some(to), Some(from)] => memory.copy_within(from..from + self.bytes, to),
            [Some(to), None] => {
                // SAFETY: memory of the host is valid for the bytes of this copy, as this function
                // demands.
                let host =
                    unsafe { std::slice::from_raw_parts(self.from as *const u8, self.bytes) };
                memory[to..to + self.bytes].copy_from_slice(host);
            }
            [None, Some(from)] => {
                // SAFETY: as above; nothing else writes there until the copy has ended.
                let host =
                    unsafe { std::slice::from_raw_parts_mut(self.to as *mut u8, self.bytes) };
                host.copy_from_slice(&memory[from..from + self.bytes]);
            }
            [None, None] => panic!("a copy from the host to the host"),
        }
    }
}

impl Device for Simulated {
    fn pinned(&self, bytes: usize) -> Result<HostMemory, DeviceError> {
        let memory = Box::leak(vec![NOT_YET; bytes].into_boxed_slice());
        let data = NonNull::from(memory).cast();
        Ok(HostMemory { data, bytes })
    }

    fn free_pinned(&self, memory: HostMemory) {
        let slice = std::ptr::slice_from_raw_parts_mut(memory.data.as_ptr(), memory.bytes);
        // SAFETY: made by `pinned` from a box of that size.
        drop(unsafe { Box::from_raw(slice) });
    }

    unsafe fn pin(&self, _: &HostMemory) -> Result<(), DeviceError> {
        Ok(())
    }

    fn memory(&self, bytes: usize) -> Result<Address, DeviceError> {
        match &self.memory {
            Memory::Own(memory) => {
                let mut memory = memory.lock();
                let place = memory.len();
                memory.resize(place + bytes, NOT_YET);
                Ok(Self::address(place))
            }
            Memory::Hosts => {
                let memory = Box::leak(vec![NOT_YET; bytes].into_boxed_slice());
                self.lent.lock().insert(memory.as_ptr() as Address, bytes);
                Ok(memory.as_ptr() as Address)
            }
        }
    }

    fn free_memory(&self, memory: Address) {
        // What it has of its own stays where it is.
        if let Some(bytes) = self.lent.lock().remove(&memory) {
            let slice = std::ptr::slice_from_raw_parts_mut(memory as *mut u8, bytes);
            // SAFETY: made by `memory` from a box of that size.
            drop(unsafe { Box::from_raw(slice) });
        }
    }

    fn stream(&self) -> Result<Stream, DeviceError> {
        let (sender, receiver) = channel::<Work>();
        std::thread::spawn(move || receiver.iter().for_each(|work| work()));
        let mut streams = self.streams.lock();
        streams.push(sender);
        Ok(Stream(streams.len() as u64 - 1))
    }

    fn record(&self, stream: Stream) -> Result<Event, DeviceError> {
        let passed = Arc::new(Passed::default());
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.events.lock().insert(number, passed.clone());
        self.put(stream, Box::new(move || passed.pass()));
        Ok(Event(number))
    }

    fn wait(&self, stream: Stream, event: &Event) -> Result<(), DeviceError> {
        let passed = self.events.lock().get(&event.0).cloned();
        let passed = passed.ok_or_else(|| self.error("waiting for a forgotten event"))?;
        self.put(stream, Box::new(move || passed.wait()));
        Ok(())
    }

    fn has_passed(&self, event: &Event) -> Result<bool, DeviceError> {
        let passed = self.events.lock().get(&event.0).cloned();
        let passed = passed.ok_or_else(|| self.error("asking for a forgotten event"))?;
        Ok(*passed.passed.lock())
    }

    fn forget(&self, event: Event) {
        self.events.lock().remove(&event.0);
    }

    unsafe fn copy(&self, stream: Stream, copy: Copy, bytes: usize) -> Result<(), DeviceError> {
        let left = self
            .good
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |good| {
                if good == usize::MAX {
                    Some(good)
                } else {
                    good.checked_sub(1)
                }
            });
        if left.is_err() {
            return Err(self.error("a copy"));
        }
        let (to, from) = match copy {
            Copy::Down { to, from } => (to as usize, from),
            Copy::Up { to, from } => (to, from as usize),
            Copy::Across { to, from } => (to, from),
        };
        if matches!(copy, Copy::Down { .. }) {
            // SAFETY: `Device::copy` demands that the target is valid until the copy has ended.
            unsafe { std::ptr::write_bytes(to as *mut u8, NOT_YET, bytes) };
        }
        let what = Move { to, from, bytes };
        let (delay, flying) = (self.some_delay(), self.flying.clone());
        let own = match &self.memory {
            Memory::Own(memory) => Some(memory.clone()),
            Memory::Hosts => None,
        };
        let now = flying.now.fetch_add(1, Ordering::SeqCst) + 1;
        flying.most.fetch_max(now, Ordering::SeqCst);
        self.put(
            stream,
            Box::new(move || {
                std::thread::sleep(delay);
                match own {
                    // SAFETY: memory of the host is valid until now, as the caller promised.
                    Some(memory) => unsafe { what.within(&mut memory.lock()) },
                    // SAFETY: both are memory of the host that is valid until now, as the caller
                    // promised.
                    None => unsafe {
                        std::ptr::copy(what.from as *const u8, what.to as *mut u8, what.bytes);
                    },
                }
                flying.now.fetch_sub(1, Ordering::SeqCst);
            }),
        );
        Ok(())
    }

    unsafe fn fill(&self, stream: Stream, to: Address, what: Fill) -> Result<(), DeviceError> {
        let own = match &self.memory {
            Memory::Own(memory) => Some(memory.clone()),
            Memory::Hosts => None,
        };
        let delay = self.some_delay();
        let bytes = match what {
            Fill::Zeros(bytes) => vec![0; bytes],
            Fill::Word(word) => word.to_le_bytes().to_vec(),
        };
        let work = move || {
            std::thread::sleep(delay);
            // SAFETY: `Device::fill` demands that the memory is valid until that has happened.
            unsafe { write(own.as_deref(), to, &bytes) };
        };
        self.put(stream, Box::new(work));
        Ok(())
    }
}
