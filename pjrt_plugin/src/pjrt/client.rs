//! Creating and destroying clients: joining the world, and the inner client with one device for
//! every rank.

use std::collections::HashMap;
use std::sync::Arc;

use pjrt_sys::*;

use crate::boundary;
use crate::config::{Config, Device, MAX_WORLD, Topology};
use crate::error::Error;
use crate::ffi;
use crate::inner::call::{bytes, call, new_args, slice};
use crate::inner::{cuda_options, xla_flags};
use crate::launch::{async_barrier, in_callback};
use crate::plugin::{config_with, plugin, start_world};

/// What we know of a client; the handle the framework has is the inner plugin's.
pub struct Client {
    /// The inner client.
    pub handle: *mut PJRT_Client,
    /// Rank of this process as the framework sees it (0 in the local topology).
    pub rank: i32,
    /// Number of devices: that of the ranks, or 1 in the local topology.
    pub size: i32,
    /// The memories of this rank's device.
    pub memories: Vec<*mut PJRT_Memory>,
    /// Owner rank of every device and memory, by address.
    owners: HashMap<usize, i32>,
    /// This rank's device, as the one-element list the framework asks for.
    pub addressable: [*mut PJRT_Device; 1],
    /// Makes small programs run asynchronously.
    pub async_barrier: async_barrier::AsyncBarrier,
}

// SAFETY: the handles are the inner plugin's, which is thread-safe; the rest is read-only.
unsafe impl Send for Client {}
// SAFETY: as above.
unsafe impl Sync for Client {}

impl Client {
    /// The rank that owns a device or memory.
    pub fn owner<T>(&self, handle: *const T) -> Option<i32> {
        self.owners.get(&(handle as usize)).copied()
    }
}

/// The client behind `handle`.
pub fn find(handle: *const PJRT_Client) -> Option<Arc<Client>> {
    plugin()
        .clients
        .read()
        .iter()
        .find(|client| std::ptr::eq(client.handle, handle))
        .cloned()
}

/// The client that owns a device or memory, and its owner's rank.
pub fn owner<T>(handle: *const T) -> Option<(Arc<Client>, i32)> {
    let clients = plugin().clients.read();
    clients
        .iter()
        .find_map(|client| Some((client.clone(), client.owner(handle)?)))
}

/// The client that an executable is loaded on, and its device there.
pub fn of_executable(
    loaded: *mut PJRT_LoadedExecutable,
) -> Result<(Arc<Client>, *mut PJRT_Device), Error> {
    let mut args = new_args::<PJRT_LoadedExecutable_AddressableDevices_Args>();
    args.executable = loaded;
    let api = plugin().inner.api();
    // SAFETY: the framework uses the executable, so it is live; its list lives as long.
    let devices = unsafe {
        call(api.PJRT_LoadedExecutable_AddressableDevices, &mut args)?;
        slice(args.addressable_devices, args.num_addressable_devices)
    };
    devices
        .first()
        .and_then(|&device| Some((owner(device)?.0, device)))
        .ok_or_else(|| Error::internal("an executable is loaded on no client"))
}

/// `PJRT_Client_Create`: collective over the ranks of the job.
pub unsafe extern "C" fn create(args: *mut PJRT_Client_Create_Args) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        // SAFETY: the framework passes valid arguments with `num_options` options.
        let (args, options) = unsafe {
            (
                &mut *args,
                slice((*args).create_options, (*args).num_options),
            )
        };
        // SAFETY: as above.
        let (own, passed_on) = unsafe { split_options(options) };
        let config = config_with(&own)?;
        refuse_late_choice(&config)?;
        xla_flags::check(&plugin().inner.path)?;
        refuse_distributed(options, &config)?;
        let world = start_world(&config)?;
        let (rank, size) = match (config.topology, config.pretend_size) {
            (_, Some(size)) => (0, size),
            (Topology::Global, None) => (world.rank, world.size),
            (Topology::Local, None) => (0, 1),
        };
        if size > MAX_WORLD {
            return Err(Error::unimplemented(format!(
                "mpi_cuda: a world of {size} ranks is above the limit of {MAX_WORLD} for the global \
                 topology, since the inner CPU client starts threads for every device; use \
                 MPI_CUDA_TOPOLOGY=local, which has no limit"
            )));
        }
        let client = create_inner(rank, size, passed_on)?;
        args.client = client.handle;
        plugin().clients.write().push(Arc::new(client));
        ffi::register_all()
    })
}

/// Makes an inner client with a device for every rank.
pub fn create_inner(
    rank: i32,
    size: i32,
    mut options: Vec<PJRT_NamedValue>,
) -> Result<Client, Error> {
    let own = match plugin().inner.device {
        Device::Cuda => cuda_options::options(rank, size, &options)?,
        _ => vec![("cpu_device_count", Value::Int(i64::from(size)))],
    };
    options.extend(own.iter().map(|(name, value)| named(name, value)));
    let mut args = new_args::<PJRT_Client_Create_Args>();
    args.create_options = options.as_ptr();
    args.num_options = options.len();
    // SAFETY: valid arguments; the inner plugin copies the options, and `describe` reads the
    // client just made.
    unsafe {
        call(plugin().inner.api().PJRT_Client_Create, &mut args)?;
        describe(args.client, rank, size)
    }
}

/// The value of a create option.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A number.
    Int(i64),
    /// Yes or no.
    Bool(bool),
    /// Words.
    Text(String),
    /// Numbers.
    List(Vec<i64>),
}

/// A create option, which lives as long as what it is made of.
fn named(name: &str, value: &Value) -> PJRT_NamedValue {
    let mut option = new_args::<PJRT_NamedValue>();
    (option.name, option.name_size) = (name.as_ptr().cast(), name.len());
    option.value_size = 1;
    let place = &mut option.__bindgen_anon_1;
    option.type_ = match value {
        Value::Int(number) => {
            place.int64_value = *number;
            PJRT_NamedValue_kInt64
        }
        Value::Bool(yes) => {
            place.bool_value = *yes;
            PJRT_NamedValue_kBool
        }
        Value::Text(text) => {
            place.string_value = text.as_ptr().cast();
            option.value_size = text.len();
            PJRT_NamedValue_kString
        }
        Value::List(numbers) => {
            place.int64_array_value = numbers.as_ptr();
            option.value_size = numbers.len();
            PJRT_NamedValue_kInt64List
        }
    };
    option
}

/// The name of an option.
///
/// # Safety
/// `option` must be valid.
pub unsafe fn option_name(option: &PJRT_NamedValue) -> String {
    // SAFETY: as the caller promises.
    unsafe { String::from_utf8_lossy(bytes(option.name, option.name_size)).into_owned() }
}

/// Which plugin is wrapped was decided when the framework asked for the table; options that agree
/// with that are fine.
fn refuse_late_choice(config: &Config) -> Result<(), Error> {
    let loaded = plugin();
    let other_file = config
        .inner_plugin
        .as_ref()
        .is_some_and(|path| *path != loaded.inner.path);
    let other_device = match config.device {
        Device::Auto => false,
        asked => asked != loaded.inner.device,
    };
    if other_file || other_device {
        return Err(Error::invalid(format!(
            "mpi_cuda: the create options ask for another inner plugin than {}, which was loaded \
             with the library: set MPI_CUDA_INNER_PLUGIN or MPI_CUDA_DEVICE in the environment",
            loaded.inner.path.display()
        )));
    }
    Ok(())
}

/// `jax.distributed.initialize()` makes JAX pass `node_id` and `num_nodes`; MPI has the say, so
/// they must agree with it.
fn refuse_distributed(options: &[PJRT_NamedValue], config: &Config) -> Result<(), Error> {
    let world = start_world(config)?;
    for (name, own) in [("node_id", world.rank), ("num_nodes", world.size)] {
        // SAFETY: the options are valid; see `create`.
        let given = options
            .iter()
            .find_map(|option| unsafe { int_option(option, name) });
        if let Some(given) = given
            && given != i64::from(own)
        {
            return Err(Error::invalid(format!(
                "mpi_cuda: jax.distributed says {name}={given}, and MPI says {own}: leave \
                 jax.distributed.initialize() out (the world comes from MPI), or pass \
                 process_id={} and num_processes={}",
                world.rank, world.size
            )));
        }
    }
    Ok(())
}

/// # Safety
/// `option` must be valid.
unsafe fn int_option(option: &PJRT_NamedValue, name: &str) -> Option<i64> {
    // SAFETY: as the caller promises; the union is read by its type.
    unsafe {
        (bytes(option.name, option.name_size) == name.as_bytes()
            && option.type_ == PJRT_NamedValue_kInt64)
            .then_some(option.__bindgen_anon_1.int64_value)
    }
}

/// Ours as text, and the rest for the inner plugin.
///
/// # Safety
/// The options must be valid.
unsafe fn split_options(
    options: &[PJRT_NamedValue],
) -> (Vec<(String, String)>, Vec<PJRT_NamedValue>) {
    let ours: Vec<String> = crate::config::VARIABLES
        .iter()
        .flat_map(|variable| std::iter::once(variable.name).chain(variable.old_name))
        .map(crate::config::create_option)
        .collect();
    // What JAX passes for its distributed service; meaningless to an inner CPU client.
    const JAX: &[&str] = &["node_id", "num_nodes", "partition_index"];
    let (mut own, mut passed_on) = (Vec::new(), Vec::new());
    for option in options {
        // SAFETY: as the caller promises.
        let name = unsafe { option_name(option) };
        if ours.contains(&name) {
            // SAFETY: as the caller promises.
            own.push((name, unsafe { option_text(option) }));
        } else if !JAX.contains(&name.as_str()) {
            passed_on.push(*option);
        }
    }
    (own, passed_on)
}

/// # Safety
/// `option` must be valid.
unsafe fn option_text(option: &PJRT_NamedValue) -> String {
    let value = &option.__bindgen_anon_1;
    // SAFETY: the union is read by its type.
    unsafe {
        match option.type_ {
            PJRT_NamedValue_kString => {
                String::from_utf8_lossy(bytes(value.string_value, option.value_size)).into_owned()
            }
            PJRT_NamedValue_kInt64 => value.int64_value.to_string(),
            PJRT_NamedValue_kFloat => value.float_value.to_string(),
            PJRT_NamedValue_kBool => u8::from(value.bool_value).to_string(),
            _ => String::new(),
        }
    }
}

/// Reads the devices and memories of a new inner client.
///
/// # Safety
/// `handle` must be a live client of the inner plugin.
unsafe fn describe(handle: *mut PJRT_Client, rank: i32, size: i32) -> Result<Client, Error> {
    let api = plugin().inner.api();
    let mut list = new_args::<PJRT_Client_Devices_Args>();
    list.client = handle;
    // SAFETY: valid arguments; the list lives as long as the client.
    let devices = unsafe {
        call(api.PJRT_Client_Devices, &mut list)?;
        slice(list.devices, list.num_devices).to_vec()
    };
    if devices.len() != size as usize {
        return Err(Error::internal(format!(
            "the inner plugin made {} devices instead of {size}",
            devices.len()
        )));
    }
    let (mut owners, mut memories) = (HashMap::new(), Vec::new());
    for (index, &device) in devices.iter().enumerate() {
        // SAFETY: a device of the client.
        unsafe { check_id(device, index)? };
        owners.insert(device as usize, index as i32);
        let mut of_device = new_args::<PJRT_Device_AddressableMemories_Args>();
        of_device.device = device;
        // SAFETY: valid arguments; the list lives as long as the client.
        let list = unsafe {
            call(api.PJRT_Device_AddressableMemories, &mut of_device)?;
            slice(of_device.memories, of_device.num_memories)
        };
        for &memory in list {
            owners.insert(memory as usize, index as i32);
        }
        if index == rank as usize {
            memories = list.to_vec();
        }
    }
    let addressable = [devices[rank as usize]];
    Ok(Client {
        handle,
        rank,
        size,
        memories,
        owners,
        addressable,
        async_barrier: async_barrier::AsyncBarrier::default(),
    })
}

/// Device `i` is rank `i`'s.
///
/// # Safety
/// `device` must be live.
unsafe fn check_id(device: *mut PJRT_Device, index: usize) -> Result<(), Error> {
    let api = plugin().inner.api();
    let mut description = new_args::<PJRT_Device_GetDescription_Args>();
    description.device = device;
    let mut id = new_args::<PJRT_DeviceDescription_Id_Args>();
    // SAFETY: as the caller promises; the description lives as long.
    unsafe {
        call(api.PJRT_Device_GetDescription, &mut description)?;
        id.device_description = description.device_description;
        call(api.PJRT_DeviceDescription_Id, &mut id)?;
    }
    if id.id == index as i32 {
        return Ok(());
    }
    Err(Error::internal(format!(
        "mpi_cuda: the inner plugin's device {index} has the id {}",
        id.id
    )))
}

/// `PJRT_Client_Destroy`: waits for everything dispatched.
pub unsafe extern "C" fn destroy(args: *mut PJRT_Client_Destroy_Args) -> *mut PJRT_Error {
    boundary::pjrt(|| {
        if crate::fork::is_child() {
            // Its threads are the parent's, so there is nothing that could be ended here.
            return Ok(());
        }
        // SAFETY: the framework passes valid arguments.
        let handle = unsafe { (*args).client };
        crate::launch::inflight_limit::wait_none_deferred();
        if let Some(world) = crate::plugin::world() {
            world.engine.wait_idle();
        }
        if let Some(client) = find(handle) {
            client.async_barrier.destroy();
            plugin()
                .clients
                .write()
                .retain(|other| !std::ptr::eq(other.handle, handle));
        }
        // SAFETY: passed through.
        unsafe { call(plugin().inner.api().PJRT_Client_Destroy, args) }?;
        // Its callbacks, which may have used them, have ended.
        if plugin().clients.read().is_empty() {
            in_callback::destroy_all();
        }
        Ok(())
    })
}
