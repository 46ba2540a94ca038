//! The clients that the framework has made, and what is known of each.

#![forbid(unsafe_code)]

use std::sync::{Arc, LazyLock};

use parking_lot::RwLock;

use crate::config::Log;
use crate::devices::Devices;
use crate::error::Error;
use crate::inner::create_options::{GivenOption, Value};
use crate::inner::handles::{
    ClientHandle, DeviceHandle, Handle, LoadedHandle, Owned, TopologyHandle,
};
use crate::inner::{cuda_options, inner, on_gpu, room};
use crate::plugin::{config, world};

/// What we know of a client; the handle the framework has is the inner plugin's.
pub struct Client {
    /// The inner client.
    pub handle: ClientHandle,
    /// Rank of this process as the framework sees it (0 in the local topology).
    pub rank: i32,
    /// Number of devices: that of the ranks, or 1 in the local topology.
    pub size: i32,
    /// The devices of all of them.
    pub devices: Devices,
}

impl Client {
    /// This rank's device.
    pub fn device(&self) -> DeviceHandle {
        self.devices.own()[0]
    }
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

/// The client that has a device, a description or a memory, and its owner's rank.
pub fn owner(address: usize) -> Option<(Arc<Client>, i32)> {
    let clients = CLIENTS.read();
    clients.iter().find_map(|client| {
        let owner = client.devices.owner(address)?;
        Some((client.clone(), owner))
    })
}

/// The client whose inner client has that topology, in which the devices of other ranks are
/// missing.
pub fn of_topology(topology: TopologyHandle) -> Option<Arc<Client>> {
    let clients = CLIENTS.read();
    clients
        .iter()
        .find(|client| client.devices.lacking_topology() == Some(topology))
        .cloned()
}

/// The client that an executable is loaded on, and its device there.
pub fn of_executable(loaded: LoadedHandle) -> Result<(Arc<Client>, DeviceHandle), Error> {
    loaded
        .device()?
        .and_then(|device| Some((owner(device.address())?.0, device)))
        .ok_or_else(|| Error::internal("an executable is loaded on no client"))
}

/// The most devices of a client that has some for other ranks; it starts threads for each, and
/// XLA's versions differ in what they allow.
const MOST_DEVICES: i32 = 1024;

/// An inner client for CPUs with a device for each of so many ranks, for programs that only such a
/// one can partition.
pub fn create_for_all(size: i32) -> Result<Owned<ClientHandle>, Error> {
    if size > MOST_DEVICES {
        return Err(Error::unimplemented(format!(
            "{} partitions programs for at most {MOST_DEVICES} devices, and this world has {size}; \
             a newer plugin has no limit: pip install 'mpi-cuda[cpu-recent]' \
             (MPI_CUDA_INNER_PLUGIN=lammps-jax-pjrt-cpu)",
            inner().path.display()
        )));
    }
    room::check(size as usize)?;
    ClientHandle::create(&[], &[("cpu_device_count", Value::Int(i64::from(size)))])
}

/// Makes an inner client, and has what is known of it. Its devices are those of all ranks on GPUs,
/// where the others' cost nothing, and this rank's alone on CPUs.
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
        false => vec![("cpu_device_count", Value::Int(1))],
    };
    room::check(1)?;
    let made = ClientHandle::create(options, &own)?;
    let client = Client {
        handle: made.get(),
        rank,
        size,
        devices: Devices::of(made.get(), rank, size)?,
    };
    Ok((made, client))
}
