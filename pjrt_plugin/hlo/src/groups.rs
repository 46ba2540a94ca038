//! Which devices take part in a collective (`xla/service/collective_ops_utils.h`).

use crate::Refused;
use crate::collective::refused;
use crate::proto::hlo::{
    CollectiveDeviceListProto, HloInstructionProto, IotaReplicaGroupListProto,
};

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
            return Err(Refused::Inconsistent(format!(
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

    fn device(&self, replica: usize, partition: usize) -> i64 {
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

/// What the ids in an instruction's groups mean (`CollectiveOpGroupMode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    CrossReplica,
    CrossPartition,
    CrossReplicaAndPartition,
    Flattened,
}

impl Mode {
    /// `by_global_ids` is none for kinds that have no such flag.
    pub(crate) fn of(has_channel: bool, by_global_ids: Option<bool>) -> Option<Mode> {
        match (has_channel, by_global_ids) {
            (false, None | Some(false)) => Some(Mode::CrossReplica),
            (true, None) => Some(Mode::CrossPartition),
            (true, Some(false)) => Some(Mode::CrossReplicaAndPartition),
            (true, Some(true)) => Some(Mode::Flattened),
            (false, Some(true)) => None,
        }
    }
}

/// The groups of an instruction as device ids.
pub(crate) fn resolve(
    instruction: &HloInstructionProto,
    mode: Mode,
    devices: &Devices,
) -> Result<Vec<Vec<i64>>, Refused> {
    let bad = |reason: String| refused(instruction, reason);
    let mut raw = raw_groups(instruction)?;
    let (replicas, partitions) = (devices.replicas, devices.partitions);
    let count = match mode {
        Mode::CrossReplica | Mode::CrossReplicaAndPartition => replicas,
        Mode::CrossPartition => partitions,
        Mode::Flattened => replicas * partitions,
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
            Mode::CrossReplica => groups.extend((0..partitions).map(|partition| {
                ids.clone()
                    .map(|replica| devices.device(replica, partition))
                    .collect()
            })),
            Mode::CrossPartition => groups.extend((0..replicas).map(|replica| {
                ids.clone()
                    .map(|partition| devices.device(replica, partition))
                    .collect()
            })),
            Mode::CrossReplicaAndPartition => groups.push(
                ids.flat_map(|replica| {
                    (0..partitions).map(move |partition| devices.device(replica, partition))
                })
                .collect(),
            ),
            Mode::Flattened => groups.push(ids.map(|id| devices.ids[id]).collect()),
        }
    }
    Ok(groups)
}

/// From which device to which, of a collective-permute.
pub(crate) fn pairs(
    instruction: &HloInstructionProto,
    mode: Mode,
    devices: &Devices,
) -> Result<Vec<(i64, i64)>, Refused> {
    let bad = |reason: &str| refused(instruction, reason.to_owned());
    let (count, repeats) = match mode {
        Mode::CrossReplica => (devices.replicas, devices.partitions),
        Mode::CrossPartition => (devices.partitions, devices.replicas),
        _ => return Err(bad("its pairs name neither replicas nor partitions")),
    };
    let device = |id: usize, other: usize| match mode {
        Mode::CrossReplica => devices.device(id, other),
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

/// The groups as they stand in the instruction.
fn raw_groups(instruction: &HloInstructionProto) -> Result<Vec<Vec<i64>>, Refused> {
    let bad = |reason: &str| refused(instruction, reason.to_owned());
    let explicit = |groups: &[crate::proto::hlo::ReplicaGroup]| {
        groups
            .iter()
            .map(|group| group.replica_ids.clone())
            .collect::<Vec<_>>()
    };
    let inconsistent = || bad("its device list is inconsistent");
    if let Some(iota) = instruction.iota_collective_device_list.as_ref() {
        return expand(iota).ok_or_else(inconsistent);
    }
    if let Some(axes) = instruction.mesh_axes_replica_group_list.as_ref() {
        return mesh::groups(axes).ok_or_else(inconsistent);
    }
    let empty = CollectiveDeviceListProto::default();
    let list = instruction
        .collective_device_list
        .as_ref()
        .unwrap_or(&empty);
    // A list in a form of a newer version would look like the empty one, which means all devices.
    const LAST_KNOWN: u32 = 93;
    let own = instruction.special_fields.unknown_fields();
    if has_unknown(list) || own.iter().any(|(number, _)| number > LAST_KNOWN) {
        return Err(bad("its device list has a form that is not known here"));
    }
    if instruction.collective_device_list.is_none() {
        return Ok(explicit(&instruction.replica_groups));
    }
    match list.iota_replica_group_list.as_ref() {
        Some(iota) => expand(iota).ok_or_else(inconsistent),
        None => Ok(explicit(&list.replica_groups)),
    }
}

fn has_unknown(list: &CollectiveDeviceListProto) -> bool {
    list.special_fields.unknown_fields().iter().next().is_some()
}

/// An iota, reshaped, transposed, and cut into groups.
fn expand(iota: &IotaReplicaGroupListProto) -> Option<Vec<Vec<i64>>> {
    let ids = transposed(&iota.iota_reshape_dims, &iota.iota_transpose_perm)?;
    let per_group = usize::try_from(iota.num_devices_per_group).ok()?;
    let groups = usize::try_from(iota.num_replica_groups).ok()?;
    if groups.checked_mul(per_group)? != ids.len() || per_group == 0 {
        return None;
    }
    Some(ids.chunks(per_group).map(<[i64]>::to_vec).collect())
}

/// An iota of these dimensions, transposed, flattened.
fn transposed(dims: &[i64], perm: &[i32]) -> Option<Vec<i64>> {
    let dims: Vec<usize> = dims
        .iter()
        .map(|&dim| usize::try_from(dim).ok())
        .collect::<Option<_>>()?;
    let perm: Vec<usize> = perm
        .iter()
        .map(|&axis| usize::try_from(axis).ok())
        .collect::<Option<_>>()?;
    let mut axes = perm.clone();
    axes.sort_unstable();
    if !axes.iter().copied().eq(0..dims.len()) {
        return None;
    }
    let mut strides = vec![1usize; dims.len()];
    for axis in (1..dims.len()).rev() {
        strides[axis - 1] = strides[axis].checked_mul(dims[axis])?;
    }
    let total = dims
        .iter()
        .try_fold(1usize, |all, &dim| all.checked_mul(dim))?;
    if total > MOST {
        return None;
    }
    let ids = (0..total)
        .map(|position| {
            let mut rest = position;
            let mut id = 0;
            for &axis in perm.iter().rev() {
                id += rest % dims[axis] * strides[axis];
                rest /= dims[axis];
            }
            id as i64
        })
        .collect();
    Some(ids)
}

/// More devices than that are a damaged list.
const MOST: usize = 1 << 24;

/// Groups along axes of a mesh (`MeshAxesReplicaGroupList` in newer versions of XLA).
mod mesh {
    use super::{MOST, transposed};
    use crate::proto::hlo::{MeshAxesReplicaGroupListProto, MeshProto};

    /// The devices of each group: those that differ along the listed axes, the first listed varying
    /// slowest.
    pub(super) fn groups(list: &MeshAxesReplicaGroupListProto) -> Option<Vec<Vec<i64>>> {
        let mesh = list.mesh.as_ref()?;
        let sizes: Vec<usize> = mesh
            .axes
            .iter()
            .map(|axis| usize::try_from(axis.size).ok())
            .collect::<Option<_>>()?;
        let total = sizes
            .iter()
            .try_fold(1usize, |all, &n| all.checked_mul(n))?;
        let devices = devices(mesh, total)?;
        // Each listed part of an axis as its size and its stride in the flattened mesh.
        let mut listed: Vec<(usize, usize)> = Vec::new();
        for axis in &list.axes {
            let index = usize::try_from(axis.mesh_axis_index).ok()?;
            let size = *sizes.get(index)?;
            let inner = sizes[index + 1..].iter().product::<usize>();
            listed.push(match axis.sub_axis_info.as_ref() {
                None => (size, inner),
                Some(part) => {
                    let before = usize::try_from(part.pre_size).ok()?;
                    let own = usize::try_from(part.size).ok()?;
                    let after = size.checked_div(before.checked_mul(own)?)?;
                    if before * own * after != size {
                        return None;
                    }
                    (own, after * inner)
                }
            });
        }
        let per_group = listed
            .iter()
            .try_fold(1usize, |all, &(n, _)| all.checked_mul(n))?;
        if per_group == 0 || per_group > MOST {
            return None;
        }
        let offsets: Vec<usize> = (0..per_group)
            .map(|position| {
                let mut rest = position;
                let mut offset = 0;
                for &(size, stride) in listed.iter().rev() {
                    offset += rest % size * stride;
                    rest /= size;
                }
                offset
            })
            .collect();
        // A group begins where all its coordinates are 0.
        let begins = |place: usize| {
            listed
                .iter()
                .all(|&(size, stride)| (place / stride).is_multiple_of(size))
        };
        (0..total)
            .filter(|&place| begins(place))
            .map(|place| {
                let ids = offsets
                    .iter()
                    .map(|offset| devices.get(place + offset).copied());
                ids.collect()
            })
            .collect()
    }

    /// The devices of a mesh, its last axis varying fastest.
    fn devices(mesh: &MeshProto, total: usize) -> Option<Vec<i64>> {
        let devices = if let Some(iota) = mesh.iota.as_ref() {
            transposed(&iota.reshape_dims, &iota.transpose_perm)?
        } else if mesh.device_ids.is_empty() && total <= MOST {
            (0..total as i64).collect()
        } else {
            mesh.device_ids.clone()
        };
        (devices.len() == total).then_some(devices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::hlo::axis_ref_proto::SubAxis;
    use crate::proto::hlo::mesh_proto::MeshAxis;
    use crate::proto::hlo::{
        AxisRefProto, IotaTileAssignmentProto, MeshAxesReplicaGroupListProto, MeshProto,
        ReplicaGroup, SourceTarget,
    };

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
        assert_eq!(Mode::of(false, None), Some(Mode::CrossReplica));
        assert_eq!(Mode::of(false, Some(false)), Some(Mode::CrossReplica));
        assert_eq!(Mode::of(true, None), Some(Mode::CrossPartition));
        assert_eq!(
            Mode::of(true, Some(false)),
            Some(Mode::CrossReplicaAndPartition)
        );
        assert_eq!(Mode::of(true, Some(true)), Some(Mode::Flattened));
        assert_eq!(Mode::of(false, Some(true)), None);
    }

    #[test]
    fn every_mode_finds_its_devices() {
        // Replica 0: devices 5, 4, 3; replica 1: devices 2, 1, 0.
        let devices = devices(2, 3);
        let two = with_groups(&[&[0, 1]]);
        let of =
            |instruction: &HloInstructionProto, mode| resolve(instruction, mode, &devices).unwrap();
        assert_eq!(of(&two, Mode::CrossReplica), [[5, 2], [4, 1], [3, 0]]);
        assert_eq!(of(&two, Mode::CrossPartition), [[5, 4], [2, 1]]);
        assert_eq!(
            of(&two, Mode::CrossReplicaAndPartition),
            [[5, 4, 3, 2, 1, 0]]
        );
        let flat = with_groups(&[&[0, 4], &[5, 1]]);
        assert_eq!(of(&flat, Mode::Flattened), [[5, 1], [0, 4]]);
        let none = with_groups(&[]);
        assert_eq!(of(&none, Mode::CrossPartition), [[5, 4, 3], [2, 1, 0]]);
        for wrong in [&[0, 0][..], &[2], &[-1]] {
            assert!(resolve(&with_groups(&[wrong]), Mode::CrossReplica, &devices).is_err());
        }
    }

    #[test]
    fn iota_lists_are_reshaped_and_transposed() {
        let iota = |groups, per_group, dims: &[i64], perm: &[i32]| {
            expand(&IotaReplicaGroupListProto {
                num_replica_groups: groups,
                num_devices_per_group: per_group,
                iota_reshape_dims: dims.to_vec(),
                iota_transpose_perm: perm.to_vec(),
                ..Default::default()
            })
        };
        assert_eq!(iota(1, 4, &[4], &[0]).unwrap(), [[0, 1, 2, 3]]);
        assert_eq!(iota(2, 2, &[2, 2], &[1, 0]).unwrap(), [[0, 2], [1, 3]]);
        // numpy.arange(12).reshape(2, 3, 2).transpose(2, 0, 1).reshape(2, 6)
        assert_eq!(
            iota(2, 6, &[2, 3, 2], &[2, 0, 1]).unwrap(),
            [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
        );
        for (groups, per_group, dims, perm) in [
            (2, 2, &[2, 2][..], &[0, 0][..]),
            (2, 2, &[2, 3], &[0, 1]),
            (2, 2, &[4], &[0, 1]),
            (0, 0, &[0], &[0]),
            (1, i64::MAX, &[i64::MAX], &[0]),
        ] {
            assert!(iota(groups, per_group, dims, perm).is_none());
        }
    }

    #[test]
    fn axes_of_a_mesh_are_groups() {
        let axis = |index, part: Option<(i64, i64)>| AxisRefProto {
            mesh_axis_index: index,
            sub_axis_info: part
                .map(|(pre_size, size)| SubAxis {
                    pre_size,
                    size,
                    ..Default::default()
                })
                .into(),
            ..Default::default()
        };
        let list = |sizes: &[i64], axes: Vec<AxisRefProto>| MeshAxesReplicaGroupListProto {
            mesh: Some(MeshProto {
                axes: sizes
                    .iter()
                    .map(|&size| MeshAxis {
                        size,
                        ..Default::default()
                    })
                    .collect(),
                ..Default::default()
            })
            .into(),
            axes,
            ..Default::default()
        };
        let of = |list: &MeshAxesReplicaGroupListProto| mesh::groups(list).unwrap();
        assert_eq!(of(&list(&[2, 2], vec![axis(1, None)])), [[0, 1], [2, 3]]);
        assert_eq!(of(&list(&[2, 2], vec![axis(0, None)])), [[0, 2], [1, 3]]);
        let both = list(&[2, 2], vec![axis(1, None), axis(0, None)]);
        assert_eq!(of(&both), [[0, 2, 1, 3]]);
        assert_eq!(of(&list(&[2, 2], vec![])), [[0], [1], [2], [3]]);
        // The axis of 8 as 2 x 2 x 2, along the middle one.
        assert_eq!(
            of(&list(&[8], vec![axis(0, Some((2, 2)))])),
            [[0, 2], [1, 3], [4, 6], [5, 7]]
        );
        let mut turned = list(&[1, 2, 2], vec![axis(1, None)]);
        turned.mesh.mut_or_insert_default().iota = Some(IotaTileAssignmentProto {
            reshape_dims: vec![2, 2],
            transpose_perm: vec![1, 0],
            ..Default::default()
        })
        .into();
        assert_eq!(of(&turned), [[0, 1], [2, 3]]);
        for wrong in [
            list(&[2, 2], vec![axis(2, None)]),
            list(&[8], vec![axis(0, Some((3, 2)))]),
            list(&[8], vec![axis(0, Some((0, 0)))]),
            list(&[i64::MAX, 4], vec![axis(0, None)]),
        ] {
            assert!(mesh::groups(&wrong).is_none());
        }
    }

    #[test]
    fn a_device_list_of_a_newer_form_is_refused() {
        let mut instruction = HloInstructionProto::new();
        instruction
            .special_fields
            .mut_unknown_fields()
            .add_varint(97, 1);
        assert!(resolve(&instruction, Mode::CrossPartition, &devices(1, 2)).is_err());
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
            pairs(&instruction, Mode::CrossPartition, &devices).unwrap(),
            [(5, 4), (2, 1), (4, 5), (1, 2)]
        );
        assert_eq!(
            pairs(&instruction, Mode::CrossReplica, &devices)
                .unwrap()
                .len(),
            6
        );
        instruction.source_target_pairs.push(pair(2, 0));
        assert!(pairs(&instruction, Mode::CrossPartition, &devices).is_err());
        assert!(pairs(&instruction, Mode::CrossReplica, &devices).is_err());
    }

    #[test]
    fn devices_must_be_complete_and_different() {
        assert!(Devices::new(2, 2, vec![0, 1, 2]).is_err());
        assert!(Devices::new(1, 2, vec![1, 1]).is_err());
        assert_eq!(
            devices(2, 2).values(false),
            [(0, 1), (1, 0), (2, 1), (3, 0)]
        );
        assert_eq!(devices(2, 2).values(true), [(0, 1), (1, 1), (2, 0), (3, 0)]);
    }
}
