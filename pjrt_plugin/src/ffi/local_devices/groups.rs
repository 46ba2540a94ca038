//! Groups of devices as groups of ranks, each with some of its devices.

#![forbid(unsafe_code)]

use hlo_rewrite::DeviceTable;

/// A group of devices of which some are this rank's.
#[derive(Debug, PartialEq, Eq)]
pub struct Group {
    /// In their order.
    pub members: Vec<Member>,
    /// Their ranks, each once, in the order in which they come.
    pub ranks: Vec<i32>,
    /// How many of them one rank has at most.
    pub most: usize,
    /// The number of the ranks' communicator.
    pub comm: i64,
}

/// A device of a group.
#[derive(Debug, PartialEq, Eq)]
pub struct Member {
    /// The place of its rank among those of the group.
    pub rank: usize,
    /// Its place among the members of that rank.
    pub slot: usize,
    /// The place of its part in this rank's launch; none if it is another rank's.
    pub part: Option<usize>,
}

impl Group {
    /// That of `devices`, of which each rank has `of_rank`, and this one runs those of `own`.
    fn of(devices: &[i64], own: &[i64], of_rank: i64) -> Group {
        let (mut ranks, mut counts) = (Vec::new(), Vec::new());
        let members = devices.iter().map(|device| {
            let number = (device / of_rank) as i32;
            let rank = ranks
                .iter()
                .position(|&rank| rank == number)
                .unwrap_or_else(|| {
                    ranks.push(number);
                    counts.push(0);
                    ranks.len() - 1
                });
            counts[rank] += 1;
            Member {
                rank,
                slot: counts[rank] - 1,
                part: own.iter().position(|own| own == device),
            }
        });
        let members = members.collect();
        let numbers = ranks.iter().map(|&rank| i64::from(rank)).collect();
        Group {
            members,
            most: counts.into_iter().max().unwrap_or(0),
            comm: DeviceTable::Groups(vec![numbers]).number(),
            ranks,
        }
    }

    /// Where the block of a member is among those of all ranks, of which each has room for `most`.
    pub fn place(&self, member: &Member) -> usize {
        member.rank * self.most + member.slot
    }

    /// Whether the blocks of all ranks are those of the members, in their order.
    pub fn is_in_order(&self) -> bool {
        let mut places = self.members.iter().map(|member| self.place(member));
        self.ranks.len() * self.most == self.members.len()
            && (0..self.members.len()).all(|place| places.next() == Some(place))
    }

    /// Its members of this rank, with the places of their parts.
    pub fn own(&self) -> impl Iterator<Item = (&Member, usize)> {
        let members = self.members.iter();
        members.filter_map(|member| Some((member, member.part?)))
    }
}

/// The groups of a table that have devices of `own`, in their order.
pub fn groups(table: &DeviceTable, own: &[i64], of_rank: i64) -> Vec<Group> {
    let DeviceTable::Groups(groups) = table else {
        return Vec::new();
    };
    let groups = groups
        .iter()
        .filter(|group| group.iter().any(|device| own.contains(device)));
    groups.map(|group| Group::of(group, own, of_rank)).collect()
}

/// The size of the group that a device is in.
pub fn size_of(table: &DeviceTable, device: i64) -> Option<i64> {
    let DeviceTable::Groups(groups) = table else {
        return None;
    };
    let group = groups.iter().find(|group| group.contains(&device))?;
    Some(group.len() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_ranks_with_some_of_its_devices_each() {
        let table = DeviceTable::Groups(vec![vec![4, 0, 5, 1], vec![2, 6], vec![7, 3]]);
        // Rank 1 of two with four devices each runs 4 to 6.
        let found = groups(&table, &[4, 5, 6], 4);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].ranks, [1, 0]);
        assert_eq!(found[0].most, 2);
        let places: Vec<_> = found[0]
            .members
            .iter()
            .map(|m| (m.rank, m.slot, m.part))
            .collect();
        assert_eq!(
            places,
            [(0, 0, Some(0)), (1, 0, None), (0, 1, Some(1)), (1, 1, None)]
        );
        assert_eq!(found[1].ranks, [0, 1]);
        assert_eq!(found[1].own().map(|own| own.1).collect::<Vec<_>>(), [2]);
        assert_ne!(found[0].comm, found[1].comm);
        assert_eq!(size_of(&table, 5), Some(4));
        assert_eq!(size_of(&table, 8), None);
        assert!(!found[0].is_in_order() && found[1].is_in_order());
        let sorted = DeviceTable::Groups(vec![vec![0, 1, 4, 5], vec![2, 6, 7]]);
        let found = groups(&sorted, &[4, 5, 6, 7], 4);
        assert!(found[0].is_in_order() && !found[1].is_in_order());
    }
}
