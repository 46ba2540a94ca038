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
    /// The inner client, of the first of this rank's devices.
    pub handle: ClientHandle,
    /// Those of its other devices.
    others: Vec<Owned<ClientHandle>>,
    /// Rank of this process as the framework sees it (0 in the local topology).
    pub rank: i32,
    /// Number of ranks, or 1 in the local topology.
    pub size: i32,
    /// The devices of all of them.
    pub devices: Devices,
}

/// A device of this rank's, with its inner client.
#[derive(Clone, Copy)]
pub struct Home {
    /// The inner client.
    pub client: ClientHandle,
    /// The device there.
    pub device: DeviceHandle,
}

impl Client {
    /// The first of this rank's devices.
    pub fn device(&self) -> DeviceHandle {
        self.devices.own()[0]
    }

    /// One of this rank's devices, by its place among them.
    pub fn home(&self, place: usize) -> Home {
        Home {
            client: match place.checked_sub(1) {
                Some(other) => self.others[other].get(),
                None => self.handle,
            },
            device: self.devices.own()[place],
        }
    }

    /// All of them.
    pub fn homes(&self) -> impl Iterator<Item = Home> {
        (0..self.devices.own().len()).map(|place| self.home(place))
    }

    /// That which a device, a description or a memory of this rank's is of.
    pub fn home_of(&self, address: usize) -> Option<Home> {
        let device = self.devices.owner(address)?;
        Some(self.home(self.devices.local(device.into())?))
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
    let mut clients = CLIENTS.write();
    let found = clients.iter().position(|client| client.handle == handle);
    let removed = found.map(|index| clients.remove(index));
    drop(clients);
    // Its other inner clients end without a lock.
    drop(removed);
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

/// The client that has a device, a description or a memory, and the number of that device.
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
pub fn of_executable(loaded: LoadedHandle) -> Result<(Arc<Client>, Home), Error> {
    let found = loaded.device()?.and_then(|device| {
        let (client, _) = owner(device.address())?;
        let home = client.home_of(device.address())?;
        Some((client, home))
    });
    found.ok_or_else(|| Error::internal("an executable is loaded on no client"))
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
/// where the others' cost nothing, and this rank's alone on CPUs: of `local` devices each has an
/// inner client.
pub fn create_inner(
    rank: i32,
    size: i32,
    local: i32,
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
    let make = || {
        room::check(1)?;
        ClientHandle::create(options, &own)
    };
    let made = make()?;
    let others = (1..local).map(|_| make()).collect::<Result<Vec<_>, _>>()?;
    let handles: Vec<_> = [&made].into_iter().chain(&others).map(Owned::get).collect();
    let client = Client {
        handle: made.get(),
        rank,
        size,
        devices: Devices::of(&handles, rank, size)?,
        others,
    };
    Ok((made, client))
}
