//! The clients that the framework has made, and what is known of each.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use parking_lot::RwLock;

use crate::config::Log;
use crate::error::Error;
use crate::inner::create_options::{GivenOption, Value};
use crate::inner::handles::{
    ClientHandle, DeviceHandle, Handle, LoadedHandle, MemoryHandle, Owned,
};
use crate::inner::{cuda_options, on_gpu};
use crate::plugin::{config, world};

/// What we know of a client; the handle the framework has is the inner plugin's.
pub struct Client {
    /// The inner client.
    pub handle: ClientHandle,
    /// Rank of this process as the framework sees it (0 in the local topology).
    pub rank: i32,
    /// Number of devices: that of the ranks, or 1 in the local topology.
    pub size: i32,
    /// The memories of this rank's device.
    pub memories: Vec<MemoryHandle>,
    /// Owner rank of every device and memory, by address.
    owners: HashMap<usize, i32>,
    /// This rank's device, as the one-element list the framework asks for.
    pub addressable: [DeviceHandle; 1],
}

/// The clients the framework made; one, in practice.
static CLIENTS: LazyLock<RwLock<Vec<Arc<Client>>>> = LazyLock::new(RwLock::default);

/// Adds a client that the framework gets.
pub fn add(client: Client) {
    CLIENTS.write().push(Arc::new(client));
}

/// Removes the client behind `handle`.
pub fn remove(handle: ClientHandle) {
    CLIENTS.write().retain(|client| client.handle != handle);
}

/// Whether the framework has no client.
pub fn is_empty() -> bool {
    CLIENTS.read().is_empty()
}

/// The client behind `handle`.
pub fn find(handle: ClientHandle) -> Option<Arc<Client>> {
    let clients = CLIENTS.read();
    clients
        .iter()
        .find(|client| client.handle == handle)
        .cloned()
}

/// The client that owns a device or memory, and its owner's rank.
pub fn owner(address: usize) -> Option<(Arc<Client>, i32)> {
    let clients = CLIENTS.read();
    clients.iter().find_map(|client| {
        let owner = *client.owners.get(&address)?;
        Some((client.clone(), owner))
    })
}

/// The client that an executable is loaded on, and its device there.
pub fn of_executable(loaded: LoadedHandle) -> Result<(Arc<Client>, DeviceHandle), Error> {
    loaded
        .device()?
        .and_then(|device| Some((owner(device.address())?.0, device)))
        .ok_or_else(|| Error::internal("an executable is loaded on no client"))
}

/// Makes an inner client with a device for every rank, and has what is known of it.
pub fn create_inner(
    rank: i32,
    size: i32,
    options: &[GivenOption<'_>],
) -> Result<(Owned<ClientHandle>, Client), Error> {
    let own = match on_gpu() {
        true => {
            let world = world().ok_or_else(|| Error::internal("a client before the world"))?;
            let given: Vec<String> = options.iter().map(|option| option.name.clone()).collect();
            cuda_options::options(rank, size, &given, world, config().log >= Log::Info)?
        }
        false => vec![("cpu_device_count", Value::Int(i64::from(size)))],
    };
    let made = ClientHandle::create(options, &own)?;
    let client = describe(made.get(), rank, size)?;
    Ok((made, client))
}

/// Reads the devices and memories of a new inner client.
fn describe(handle: ClientHandle, rank: i32, size: i32) -> Result<Client, Error> {
    let devices = handle.devices()?;
    if devices.len() != size as usize {
        return Err(Error::internal(format!(
            "the inner plugin made {} devices instead of {size}",
            devices.len()
        )));
    }
    let (mut owners, mut memories) = (HashMap::new(), Vec::new());
    for (owner, &device) in (0..).zip(&devices) {
        check_id(device, owner)?;
        owners.insert(device.address(), owner);
        let of_device = device.memories()?;
        owners.extend(of_device.iter().map(|memory| (memory.address(), owner)));
        if owner == rank {
            memories = of_device;
        }
    }
    Ok(Client {
        handle,
        rank,
        size,
        memories,
        owners,
        addressable: [devices[rank as usize]],
    })
}

/// Device `i` is rank `i`'s.
fn check_id(device: DeviceHandle, index: i32) -> Result<(), Error> {
    match device.id()? {
        id if id == index => Ok(()),
        id => Err(Error::internal(format!(
            "the inner plugin's device {index} has the id {id}"
        ))),
    }
}
