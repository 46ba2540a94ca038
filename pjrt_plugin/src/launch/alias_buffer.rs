//! Buffers that the framework gets before the launch that fills them: alias buffers of the inner
//! plugin (`pjrt_c_api.h`, `PJRT_Client_CreateAliasBuffer`).

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex};
use pjrt_sys::PJRT_Buffer_Type_PRED;

use crate::error::Error;
use crate::inner::handles::{
    AliasFiller, BufferHandle, BufferShape, ClientHandle, DeviceHandle, EventHandle, Handle,
    HostArray, MemoryHandle, Owned,
};
use crate::inner::on_gpu;
use crate::launch::keep_alive::Kept;

/// An alias buffer; it is kept until it is fulfilled, whatever the framework does with it.
pub struct AliasBuffer {
    buffer: Kept<BufferHandle>,
    client: ClientHandle,
    shape: BufferShape,
    /// None once it has filled the buffer.
    filler: Option<AliasFiller>,
}

impl AliasBuffer {
    /// The buffer, for the framework, and the alias to fill it; that comes first, or
    /// [`keep_alive::give_up`](super::keep_alive::give_up) destroys the buffer.
    pub fn new(
        client: ClientHandle,
        shape: &BufferShape,
    ) -> Result<(Owned<BufferHandle>, AliasBuffer), Error> {
        let (buffer, filler) = client.create_alias_buffer(shape)?;
        unfulfilled(|rows| rows.insert(buffer.get().address()));
        let alias = AliasBuffer {
            buffer: Kept::new(buffer.get()),
            client,
            shape: shape.clone(),
            filler: Some(filler),
        };
        Ok((buffer, alias))
    }

    /// The alias buffer becomes `buffer`, which need not be ready.
    pub fn fulfil(mut self, buffer: Owned<BufferHandle>) {
        // A result that fails may have no memory, which the inner plugin would follow. On the CPU
        // that is so from the start, where an input has failed already.
        if on_gpu() {
            self.fulfil_when_ready(buffer);
        } else if let Some(error) = buffer.get().failure() {
            self.fail(&error.to_string());
        } else {
            self.settle(Ok(buffer.get()));
        }
    }

    fn fulfil_when_ready(mut self, buffer: Owned<BufferHandle>) {
        let event = match buffer.get().ready_event() {
            Ok(event) => event,
            Err(error) => return self.fail(&error.to_string()),
        };
        event.get().on_ready(move |ready| {
            match ready {
                Ok(()) => self.settle(Ok(buffer.get())),
                Err(error) => self.fail(&error.to_string()),
            }
            drop(event);
        });
    }

    /// Whoever waits for the alias buffer gets this error.
    pub fn fail(mut self, message: &str) {
        self.settle(Err(message));
    }

    fn settle(&mut self, content: Result<BufferHandle, &str>) {
        let Some(filler) = self.filler.take() else {
            return;
        };
        match content {
            Ok(buffer) => filler.fill(Ok(buffer)),
            // An alias buffer that gets an error and no memory ends the process when somebody asks
            // for the memory before waiting for the content, as numpy does.
            Err(message) => match self.client.create_failed_buffer(&self.shape, message) {
                Ok(failed) => filler.fill(Ok(failed.get())),
                Err(_) => filler.fill(Err(message)),
            },
        }
        unfulfilled(|rows| rows.remove(&self.buffer.get().address()));
        FULFILLED.notify_all();
    }
}

/// Alias buffers that are not fulfilled: the inner plugin wants the memory of what it launches. An
/// alias buffer is kept until then, so no other buffer has its address.
static UNFULFILLED: Mutex<Option<HashSet<usize>>> = Mutex::new(None);
/// How many there are; spares the lock where there are none.
static COUNT: AtomicUsize = AtomicUsize::new(0);
static FULFILLED: Condvar = Condvar::new();

fn unfulfilled(change: impl FnOnce(&mut HashSet<usize>) -> bool) {
    let mut rows = UNFULFILLED.lock();
    let rows = rows.get_or_insert_default();
    change(rows);
    COUNT.store(rows.len(), Ordering::Release);
}

/// Whether one of the buffers is an alias buffer that is not fulfilled. Never on GPUs, where one is
/// fulfilled only when it is ready.
pub fn any_unfulfilled(buffers: &[BufferHandle]) -> bool {
    if COUNT.load(Ordering::Acquire) == 0 || on_gpu() {
        return false;
    }
    let rows = UNFULFILLED.lock();
    let has = |buffer: &BufferHandle| {
        rows.as_ref()
            .is_some_and(|rows| rows.contains(&buffer.address()))
    };
    buffers.iter().any(has)
}

/// Waits until none of the buffers is.
pub fn wait_fulfilled(buffers: &[BufferHandle]) {
    if on_gpu() {
        return;
    }
    let mut rows = UNFULFILLED.lock();
    let waits = |rows: &Option<HashSet<usize>>| {
        let rows = rows.as_ref();
        rows.is_some_and(|rows| {
            buffers
                .iter()
                .any(|buffer| rows.contains(&buffer.address()))
        })
    };
    while waits(&rows) {
        FULFILLED.wait(&mut rows);
    }
}

impl Drop for AliasBuffer {
    fn drop(&mut self) {
        if self.filler.is_some() {
            let error = Error::internal("the launch that computes this was given up");
            self.settle(Err(&error.to_string()));
        }
    }
}

/// The end of a launch, as an empty alias buffer: PJRT has no events of ours, and the inner
/// plugin no alias of a token.
pub struct End {
    alias: AliasBuffer,
    device: DeviceHandle,
}

const EMPTY: [i64; 1] = [0];

impl End {
    /// The empty buffer, for the framework, and the alias of it.
    pub fn new(
        client: ClientHandle,
        device: DeviceHandle,
        memory: MemoryHandle,
    ) -> Result<(Owned<BufferHandle>, End), Error> {
        let shape = BufferShape {
            memory,
            element_type: PJRT_Buffer_Type_PRED,
            dims: EMPTY.to_vec(),
            order: Vec::new(),
        };
        let (buffer, alias) = AliasBuffer::new(client, &shape)?;
        let end = End { alias, device };
        Ok((buffer, end))
    }

    /// An event for the framework.
    pub fn event(&self) -> Result<Owned<EventHandle>, Error> {
        self.alias.buffer.get().ready_event()
    }

    /// The launch has ended.
    pub fn reach(self, error: Option<&str>) {
        if let Some(error) = error {
            return self.alias.fail(error);
        }
        let nothing = HostArray {
            element_type: PJRT_Buffer_Type_PRED,
            dims: &EMPTY,
            data: &[0],
        };
        match self.alias.client.copy_from_host(self.device, &nothing) {
            Ok(buffer) => self.alias.fulfil(buffer),
            Err(error) => self.alias.fail(&error.to_string()),
        }
    }
}
