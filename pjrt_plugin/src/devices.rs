//! The devices of all ranks, as a client shows them to the framework: device `i` is rank `i`'s, or,
//! where each rank has `k` of them (`MPI_CUDA_LOCAL_DEVICES`), that of rank `i / k`.
//!
//! XLA's plugin for the CPU starts threads for every device of a client. So an inner client there
//! has one device of this rank's, with the id 0, and each of several has an inner client of its
//! own. The devices of other ranks and their descriptions are addresses of ours with nothing behind
//! them, and every function that takes one answers for it (`pjrt/device.rs`). XLA's plugin for CUDA
//! shows the devices of all ranks by itself.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::OnceLock;

use crate::error::Error;
use crate::inner::handles::{
    ClientHandle, DescriptionHandle, DeviceHandle, Handle, MemoryHandle, Texts, TopologyHandle,
};

/// The devices of a client.
pub struct Devices {
    /// The first of this rank's.
    first: i32,
    /// How many each rank has.
    of_rank: i32,
    /// Of every rank.
    devices: Vec<DeviceHandle>,
    /// Of every device.
    descriptions: Vec<DescriptionHandle>,
    /// The memories of this rank's devices.
    memories: Vec<MemoryHandle>,
    /// The device that a device, a description or a memory of the inner client is or is of.
    owners: HashMap<usize, i32>,
    /// What is shown in place of the inner client's numbers, if it has this rank's device alone.
    shown: Option<Shown>,
}

/// What the framework sees where the inner client has one device.
struct Shown {
    /// Two words for each device, whose addresses are the device and its description.
    addresses: Box<[u64]>,
    /// The topology that the inner client says it has.
    topology: Option<TopologyHandle>,
    /// How the inner client calls its one device.
    texts: Texts,
    /// How each is called; made when it is asked for.
    of_devices: Box<[OnceLock<Texts>]>,
}

impl Devices {
    /// The devices of new inner clients: of one that has those of all ranks, or of those that have
    /// one of this rank's each, in a world of `size` ranks.
    pub fn of(inner: &[ClientHandle], rank: i32, size: i32) -> Result<Devices, Error> {
        let of_rank = inner.len() as i32;
        let (first, all) = (rank * of_rank, size * of_rank);
        let mut devices = Vec::new();
        for client in inner {
            devices.extend(client.devices()?);
        }
        let is_alone = devices.len() == inner.len() && all > 1;
        if !is_alone && devices.len() != all as usize {
            return Err(Error::internal(format!(
                "the inner plugin made {} devices instead of {all}",
                devices.len()
            )));
        }
        let mut owners = HashMap::new();
        let (mut descriptions, mut memories) = (Vec::new(), Vec::new());
        for (number, &device) in (0..).zip(&devices) {
            let description = device.description()?;
            check_id(description, if is_alone { 0 } else { number })?;
            descriptions.push(description);
            let owner = if is_alone { first + number } else { number };
            let of_device = device.memories()?;
            owners.insert(device.address(), owner);
            owners.insert(description.address(), owner);
            owners.extend(of_device.iter().map(|memory| (memory.address(), owner)));
            if (first..first + of_rank).contains(&owner) {
                memories.extend(of_device);
            }
        }
        let mut shown = None;
        if is_alone {
            let others = Shown::of(inner[0], descriptions[0], all)?;
            (devices, descriptions) = others.handles(first, &devices, &descriptions);
            shown = Some(others);
        }
        Ok(Devices {
            first,
            of_rank,
            devices,
            descriptions,
            memories,
            owners,
            shown,
        })
    }

    /// The device of every rank.
    pub fn all(&self) -> &[DeviceHandle] {
        &self.devices
    }

    /// The description of every device.
    pub fn descriptions(&self) -> &[DescriptionHandle] {
        &self.descriptions
    }

    /// This rank's devices.
    pub fn own(&self) -> &[DeviceHandle] {
        let first = self.first as usize;
        &self.devices[first..first + self.of_rank as usize]
    }

    /// How many each rank has.
    pub fn of_rank(&self) -> i32 {
        self.of_rank
    }

    /// The number of this rank's first.
    pub fn first(&self) -> i32 {
        self.first
    }

    /// The place of a device among this rank's; none if it is another rank's.
    pub fn local(&self, device: i64) -> Option<usize> {
        let place = usize::try_from(device - i64::from(self.first)).ok()?;
        (place < self.of_rank as usize).then_some(place)
    }

    /// The rank that has a device.
    pub fn rank_of(&self, device: i32) -> i32 {
        device / self.of_rank
    }

    /// The memories of this rank's devices.
    pub fn memories(&self) -> &[MemoryHandle] {
        &self.memories
    }

    /// The device that is there, or whose description or memory; none if it is not of this client.
    pub fn owner(&self, address: usize) -> Option<i32> {
        let shown = || self.shown.as_ref()?.owner(address);
        self.owners.get(&address).copied().or_else(shown)
    }

    /// Whether what is there is of ours, and must not get to the inner plugin.
    pub fn is_shown_only(&self, address: usize) -> bool {
        let owner = self.shown.as_ref().map(|shown| shown.owner(address));
        owner.flatten().is_some()
    }

    /// Whether inner clients have this rank's devices alone, of several.
    pub fn is_alone(&self) -> bool {
        self.shown.is_some()
    }

    /// What a device is called, if that is not for the inner plugin to say.
    pub fn texts(&self, device: i32) -> Option<&Texts> {
        self.shown.as_ref().map(|shown| shown.texts(device))
    }

    /// The inner client's topology, if it lacks the devices of other ranks.
    pub fn lacking_topology(&self) -> Option<TopologyHandle> {
        self.shown.as_ref()?.topology
    }

    /// Refuses numbers of a program that are of no device; an inner client that has all devices
    /// does that itself.
    pub fn check(&self, ids: &[i64]) -> Result<(), Error> {
        let count = self.devices.len() as i64;
        match ids.iter().find(|&id| !(0..count).contains(id)) {
            Some(id) if self.shown.is_some() => Err(Error::invalid(format!(
                "a program is for device {id}, and there are those from 0 to {}",
                count - 1
            ))),
            _ => Ok(()),
        }
    }

    /// The number by which an inner client knows this rank's device.
    pub fn inner_id(&self) -> i64 {
        match self.shown {
            Some(_) => 0,
            None => i64::from(self.first),
        }
    }
}

impl Shown {
    fn of(inner: ClientHandle, own: DescriptionHandle, size: i32) -> Result<Shown, Error> {
        let size = size as usize;
        Ok(Shown {
            addresses: vec![0; 2 * size].into_boxed_slice(),
            // Without a topology of its own there is none to show.
            topology: inner.topology().ok(),
            texts: own.texts()?,
            of_devices: (0..size).map(|_| OnceLock::new()).collect(),
        })
    }

    /// All devices and descriptions, of which those from `first` on are the inner plugin's.
    fn handles(
        &self,
        first: i32,
        devices: &[DeviceHandle],
        descriptions: &[DescriptionHandle],
    ) -> (Vec<DeviceHandle>, Vec<DescriptionHandle>) {
        let own = |device: i32| {
            let place = usize::try_from(device - first).ok()?;
            Some((*devices.get(place)?, descriptions[place]))
        };
        let all = (0..).zip(self.addresses.chunks_exact(2));
        all.map(|(device, places)| {
            own(device).unwrap_or_else(|| {
                (
                    DeviceHandle::standing_at(&places[0]),
                    DescriptionHandle::standing_at(&places[1]),
                )
            })
        })
        .unzip()
    }

    fn owner(&self, address: usize) -> Option<i32> {
        let offset = address.checked_sub(self.addresses.as_ptr() as usize)?;
        let word = offset / size_of::<u64>();
        (word < self.addresses.len()).then_some((word / 2) as i32)
    }

    fn texts(&self, device: i32) -> &Texts {
        self.of_devices[device as usize].get_or_init(|| Texts {
            debug: numbered(&self.texts.debug, device),
            short: numbered(&self.texts.short, device),
        })
    }
}

/// The text of device 0 of process 0 as that of `rank`: each number 0 in it becomes the rank.
fn numbered(text: &str, rank: i32) -> String {
    let is_digit = |c: char| c.is_ascii_digit();
    let (mut left, mut numbered) = (text, String::new());
    while let Some(start) = left.find(is_digit) {
        let (before, number) = left.split_at(start);
        let end = number.find(|c| !is_digit(c)).unwrap_or(number.len());
        let (number, after) = number.split_at(end);
        numbered += before;
        match number {
            "0" => numbered += &rank.to_string(),
            other => numbered += other,
        }
        left = after;
    }
    numbered + left
}

/// Device `i` is rank `i`'s.
fn check_id(description: DescriptionHandle, index: i32) -> Result<(), Error> {
    match description.id()? {
        id if id == index => Ok(()),
        id => Err(Error::internal(format!(
            "the inner plugin's device {index} has the id {id}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_called_by_its_rank() {
        assert_eq!(numbered("TFRT_CPU_0", 12), "TFRT_CPU_12");
        assert_eq!(numbered("cpu:0", 3), "cpu:3");
        assert_eq!(numbered("CpuDevice(id=0)", 7), "CpuDevice(id=7)");
        assert_eq!(
            numbered("a(id=0, process=0, 10 GiB)", 7),
            "a(id=7, process=7, 10 GiB)"
        );
        assert_eq!(numbered("a device", 7), "a device");
    }
}
