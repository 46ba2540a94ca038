//! Which devices take part in a collective (`xla/service/collective_ops_utils.h`).

use crate::device_list;
use crate::devices::Devices;
use crate::error::Refused;
use crate::proto::hlo::HloInstructionProto;

/// What the ids in an instruction's groups mean (`CollectiveOpGroupMode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GroupMode {
    CrossReplica,
    CrossPartition,
    CrossReplicaAndPartition,
    Flattened,
}

impl GroupMode {
    /// `by_global_ids` is none for kinds that have no such flag.
    pub(crate) fn of(has_channel: bool, by_global_ids: Option<bool>) -> Option<GroupMode> {
        match (has_channel, by_global_ids) {
            (false, None | Some(false)) => Some(GroupMode::CrossReplica),
            (true, None) => Some(GroupMode::CrossPartition),
            (true, Some(false)) => Some(GroupMode::CrossReplicaAndPartition),
            (true, Some(true)) => Some(GroupMode::Flattened),
            (false, Some(true)) => None,
        }
    }
}

/// The groups of an instruction as device ids.
pub(crate) fn resolve(
    instruction: &HloInstructionProto,
    mode: GroupMode,
    devices: &Devices,
) -> Result<Vec<Vec<i64>>, Refused> {
    let bad = |reason: String| Refused::instruction(instruction, reason);
    let mut raw = device_list::groups(instruction)?;
    let (replicas, partitions) = (devices.replicas(), devices.partitions());
    let count = match mode {
        GroupMode::CrossReplica | GroupMode::CrossReplicaAndPartition => replicas,
        GroupMode::CrossPartition => partitions,
        GroupMode::Flattened => replicas * partitions,
    };
    if raw.is_empty() {
        raw.push((0..count as i64).collect());
    }
    let mut seen = vec![false; count];
    for &id in raw.iter().flatten() {
        let slot = usize::try_from(id).ok().and_then(|id| seen.get_mut(id));
        match slot {
            Some(seen) if !*seen => *seen = true,
            _ => {
                return Err(bad(format!(
                    "its groups name {id} twice, or there are only {count}"
                )));
            }
        }
    }
    let mut groups = Vec::new();
    for group in raw.iter().filter(|group| !group.is_empty()) {
        let ids = group.iter().map(|&id| id as usize);
        match mode {
            GroupMode::CrossReplica => groups.extend((0..partitions).map(|partition| {
                ids.clone()
                    .map(|replica| devices.device(replica, partition))
                    .collect()
            })),
            GroupMode::CrossPartition => groups.extend((0..replicas).map(|replica| {
                ids.clone()
                    .map(|partition| devices.device(replica, partition))
                    .collect()
            })),
            GroupMode::CrossReplicaAndPartition => groups.push(
                ids.flat_map(|replica| {
                    (0..partitions).map(move |partition| devices.device(replica, partition))
                })
                .collect(),
            ),
            GroupMode::Flattened => groups.push(ids.map(|id| devices.ids()[id]).collect()),
        }
    }
    Ok(groups)
}

/// From which device to which, of a collective-permute.
pub(crate) fn pairs(
    instruction: &HloInstructionProto,
    mode: GroupMode,
    devices: &Devices,
) -> Result<Vec<(i64, i64)>, Refused> {
    let bad = |reason: &str| Refused::instruction(instruction, reason);
    let (count, repeats) = match mode {
        GroupMode::CrossReplica => (devices.replicas(), devices.partitions()),
        GroupMode::CrossPartition => (devices.partitions(), devices.replicas()),
        _ => return Err(bad("its pairs name neither replicas nor partitions")),
    };
    let device = |id: usize, other: usize| match mode {
        GroupMode::CrossReplica => devices.device(id, other),
        _ => devices.device(other, id),
    };
    let (mut sends, mut receives) = (vec![false; count], vec![false; count]);
    let mut all = Vec::new();
    for pair in &instruction.source_target_pairs {
        let inside = |id: i64| usize::try_from(id).ok().filter(|&id| id < count);
        let (Some(from), Some(to)) = (inside(pair.source), inside(pair.target)) else {
            return Err(bad("a pair names a device that is none"));
        };
        if std::mem::replace(&mut sends[from], true) || std::mem::replace(&mut receives[to], true) {
            return Err(bad("two pairs have the same source or the same target"));
        }
        all.extend((0..repeats).map(|other| (device(from, other), device(to, other))));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::hlo::{ReplicaGroup, SourceTarget};

    fn devices(replicas: usize, partitions: usize) -> Devices {
        // Not in order, as a mesh may have them.
        let ids = (0..(replicas * partitions) as i64).rev().collect();
        Devices::new(replicas, partitions, ids).unwrap()
    }

    fn with_groups(groups: &[&[i64]]) -> HloInstructionProto {
        let mut instruction = HloInstructionProto::new();
        instruction.replica_groups = groups
            .iter()
            .map(|ids| ReplicaGroup {
                replica_ids: ids.to_vec(),
                ..Default::default()
            })
            .collect();
        instruction
    }

    #[test]
    fn modes_are_those_of_xla() {
        assert_eq!(GroupMode::of(false, None), Some(GroupMode::CrossReplica));
        assert_eq!(
            GroupMode::of(false, Some(false)),
            Some(GroupMode::CrossReplica)
        );
        assert_eq!(GroupMode::of(true, None), Some(GroupMode::CrossPartition));
        assert_eq!(
            GroupMode::of(true, Some(false)),
            Some(GroupMode::CrossReplicaAndPartition)
        );
        assert_eq!(GroupMode::of(true, Some(true)), Some(GroupMode::Flattened));
        assert_eq!(GroupMode::of(false, Some(true)), None);
    }

    #[test]
    fn every_mode_finds_its_devices() {
        // Replica 0: devices 5, 4, 3; replica 1: devices 2, 1, 0.
        let devices = devices(2, 3);
        let two = with_groups(&[&[0, 1]]);
        let of =
            |instruction: &HloInstructionProto, mode| resolve(instruction, mode, &devices).unwrap();
        assert_eq!(of(&two, GroupMode::CrossReplica), [[5, 2], [4, 1], [3, 0]]);
        assert_eq!(of(&two, GroupMode::CrossPartition), [[5, 4], [2, 1]]);
        assert_eq!(
            of(&two, GroupMode::CrossReplicaAndPartition),
            [[5, 4, 3, 2, 1, 0]]
        );
        let flat = with_groups(&[&[0, 4], &[5, 1]]);
        assert_eq!(of(&flat, GroupMode::Flattened), [[5, 1], [0, 4]]);
        let none = with_groups(&[]);
        assert_eq!(of(&none, GroupMode::CrossPartition), [[5, 4, 3], [2, 1, 0]]);
        for wrong in [&[0, 0][..], &[2], &[-1]] {
            assert!(resolve(&with_groups(&[wrong]), GroupMode::CrossReplica, &devices).is_err());
        }
    }

    #[test]
    fn pairs_repeat_for_the_other_coordinate() {
        let devices = devices(2, 3);
        let mut instruction = HloInstructionProto::new();
        let pair = |source, target| SourceTarget {
            source,
            target,
            ..Default::default()
        };
        instruction.source_target_pairs = vec![pair(0, 1), pair(1, 0)];
        assert_eq!(
            pairs(&instruction, GroupMode::CrossPartition, &devices).unwrap(),
            [(5, 4), (2, 1), (4, 5), (1, 2)]
        );
        assert_eq!(
            pairs(&instruction, GroupMode::CrossReplica, &devices)
                .unwrap()
                .len(),
            6
        );
        instruction.source_target_pairs.push(pair(2, 0));
        assert!(pairs(&instruction, GroupMode::CrossPartition, &devices).is_err());
        assert!(pairs(&instruction, GroupMode::CrossReplica, &devices).is_err());
    }
}
