//! The forms in which an instruction lists its groups.

use crate::error::Refused;
use crate::proto::hlo::{
    CollectiveDeviceListProto, HloInstructionProto, IotaReplicaGroupListProto, ReplicaGroup,
};

/// The groups as they stand in the instruction.
pub(crate) fn groups(instruction: &HloInstructionProto) -> Result<Vec<Vec<i64>>, Refused> {
    let bad = |reason: &str| Refused::instruction(instruction, reason);
    let explicit = |groups: &[ReplicaGroup]| {
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
    };

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
        assert!(groups(&instruction).is_err());
    }
}
