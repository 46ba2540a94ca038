//! The devices of a program, and what a custom call says about them.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::error::Refused;

/// The devices of a program: which one runs which partition of which replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    replicas: usize,
    partitions: usize,
    /// By replica, then partition.
    ids: Vec<i64>,
}

impl Devices {
    /// `ids` by replica, then partition.
    ///
    /// # Errors
    /// If their number is wrong or one occurs twice.
    pub fn new(replicas: usize, partitions: usize, ids: Vec<i64>) -> Result<Devices, Refused> {
        let mut sorted = ids.clone();
        sorted.sort_unstable();
        sorted.dedup();
        if replicas.checked_mul(partitions) != Some(ids.len()) || sorted.len() != ids.len() {
            return Err(Refused::inconsistent(format!(
                "{replicas} replicas of {partitions} partitions do not fit the devices {ids:?}"
            )));
        }
        Ok(Devices {
            replicas,
            partitions,
            ids,
        })
    }

    /// The devices by replica, then partition.
    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// Number of partitions.
    pub fn partitions(&self) -> usize {
        self.partitions
    }

    /// Number of replicas.
    pub fn replicas(&self) -> usize {
        self.replicas
    }

    /// The replica and the partition that a device runs.
    pub fn logical(&self, id: i64) -> Option<[i32; 2]> {
        let position = self.ids.iter().position(|&own| own == id)?;
        Some([position / self.partitions, position % self.partitions].map(|number| number as i32))
    }

    /// The device that runs `partition` of `replica`.
    pub(crate) fn device(&self, replica: usize, partition: usize) -> i64 {
        self.ids[replica * self.partitions + partition]
    }

    /// For every device its partition or its replica.
    pub(crate) fn values(&self, of_replica: bool) -> Vec<(i64, u32)> {
        let mut values = Vec::with_capacity(self.ids.len());
        for (position, &id) in self.ids.iter().enumerate() {
            let value = if of_replica {
                position / self.partitions
            } else {
                position % self.partitions
            };
            values.push((id, value as u32));
        }
        values.sort_unstable();
        values
    }
}

/// What a custom call refers to by number; the number is a hash of the content.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DeviceTable {
    /// Groups of devices, in order; each device is in at most one.
    Groups(Vec<Vec<i64>>),
    /// From which device to which.
    Pairs(Vec<(i64, i64)>),
    /// A value for every device.
    Values(Vec<(i64, u32)>),
}

impl DeviceTable {
    /// The number by which custom calls name it: a hash of the content with bit 60, which no MPI
    /// handle and no communicator of a user's has.
    pub fn number(&self) -> i64 {
        const BIT: u64 = 1 << 60;
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        (hasher.finish() % BIT + BIT) as i64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_must_be_complete_and_different() {
        assert!(Devices::new(2, 2, vec![0, 1, 2]).is_err());
        assert!(Devices::new(1, 2, vec![1, 1]).is_err());
        let devices = Devices::new(2, 2, vec![3, 2, 1, 0]).unwrap();
        assert_eq!(devices.values(false), [(0, 1), (1, 0), (2, 1), (3, 0)]);
        assert_eq!(devices.values(true), [(0, 1), (1, 1), (2, 0), (3, 0)]);
        assert_eq!(devices.logical(1), Some([1, 0]));
        assert_eq!(devices.logical(4), None);
    }
}
