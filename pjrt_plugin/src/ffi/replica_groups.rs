//! What the custom calls of collectives refer to by number, as it is for this rank. Numbers
//! are hashes of the content, so a program that comes from a cache finds the same.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use hlo_rewrite::{DeviceTable, Rewritten};
use mpi_runtime::{CollectiveSequence, World};
use parking_lot::RwLock;

use super::local_devices::groups::groups;
use crate::error::Error;

/// What this rank does in a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// It is in a group of that number and size.
    Member {
        /// Number of the group's communicator.
        group: i64,
        /// Number of ranks.
        size: i64,
        /// Rank in it.
        rank: usize,
    },
    /// It sends to one rank, and receives from one.
    Pair {
        /// Whom it sends to.
        to: Option<i32>,
        /// Whom it receives from.
        from: Option<i32>,
    },
    /// A number.
    Value(u32),
    /// Nothing.
    None,
}

#[derive(Default)]
struct Known {
    parts: HashMap<i64, Part>,
    /// What the numbers mean where ranks have several devices.
    tables: HashMap<i64, Arc<DeviceTable>>,
    /// By identity.
    programs: HashMap<i64, Arc<CollectiveSequence>>,
    /// By the sequence of collectives.
    sequences: HashMap<u64, Arc<CollectiveSequence>>,
}

static KNOWN: LazyLock<RwLock<Known>> = LazyLock::new(RwLock::default);

/// The ranks of these devices, of which each has `of_rank`, in the order in which they come.
pub fn ranks(devices: &[i64], of_rank: i32) -> Result<Vec<i32>, Error> {
    let mut ranks = Vec::new();
    for device in devices {
        let rank = i32::try_from(device / i64::from(of_rank))
            .map_err(|_| Error::internal(format!("device {device} is no rank's")))?;
        // With one device for each they all differ.
        if of_rank == 1 || !ranks.contains(&rank) {
            ranks.push(rank);
        }
    }
    Ok(ranks)
}

/// Registers what a rewritten program refers to, in a world whose ranks have `of_rank` devices.
pub fn register(
    rewritten: &Rewritten,
    devices: &[i64],
    world: &World,
    of_rank: i32,
) -> Result<(), Error> {
    let rank = |device: i64| {
        i32::try_from(device).map_err(|_| Error::internal(format!("device {device} is no rank's")))
    };
    for (&place, words) in &rewritten.places {
        world.engine.describe_sequence(place as u64, 0, words);
    }
    let mut known = KNOWN.write();
    if of_rank > 1 {
        let own = |device: &i64| device / i64::from(of_rank) == i64::from(world.rank);
        let local: Vec<i64> = devices.iter().copied().filter(own).collect();
        for table in rewritten.tables.values() {
            for group in groups(table, &local, of_rank.into()) {
                world.engine.know_group(group.comm, group.ranks);
            }
        }
        let tables = rewritten.tables.iter();
        let tables = tables.map(|(&number, table)| (number, Arc::new(table.clone())));
        known.tables.extend(tables);
    }
    for (&number, table) in rewritten.tables.iter().filter(|_| of_rank == 1) {
        if known.parts.contains_key(&number) {
            continue;
        }
        let part = part_of(world.rank, number, table);
        if let (Part::Member { .. }, DeviceTable::Groups(groups)) = (part, table) {
            let own = i64::from(world.rank);
            let group = groups.iter().find(|group| group.contains(&own));
            let members: Result<Vec<i32>, Error> =
                group.into_iter().flatten().map(|&id| rank(id)).collect();
            world.engine.know_group(number, members?);
        }
        known.parts.insert(number, part);
    }
    let members = ranks(devices, of_rank)?;
    let summary = rewritten.summary.clone();
    let program = || CollectiveSequence::new(rewritten.sequence, summary, members, world.size);
    let sequence = known
        .sequences
        .entry(rewritten.sequence)
        .or_insert_with(|| Arc::new(program()))
        .clone();
    known.programs.entry(rewritten.identity).or_insert(sequence);
    Ok(())
}

fn part_of(rank: i32, number: i64, table: &DeviceTable) -> Part {
    let own = i64::from(rank);
    match table {
        DeviceTable::Groups(groups) => groups
            .iter()
            .find_map(|group| {
                let rank = group.iter().position(|&id| id == own)?;
                Some(Part::Member {
                    group: number,
                    size: group.len() as i64,
                    rank,
                })
            })
            .unwrap_or(Part::None),
        DeviceTable::Pairs(pairs) => {
            let to = pairs.iter().find(|pair| pair.0 == own).map(|pair| pair.1);
            let from = pairs.iter().find(|pair| pair.1 == own).map(|pair| pair.0);
            Part::Pair {
                to: to.map(|id| id as i32),
                from: from.map(|id| id as i32),
            }
        }
        DeviceTable::Values(values) => values
            .iter()
            .find(|value| value.0 == own)
            .map_or(Part::None, |value| Part::Value(value.1)),
    }
}

/// What this rank does in the collective that refers to `number`.
pub fn part(number: i64) -> Result<Part, Error> {
    KNOWN.read().parts.get(&number).copied().ok_or_else(|| {
        Error::internal(format!(
            "a collective refers to {number}, which no program here has"
        ))
    })
}

/// What `number` means where ranks have several devices.
pub fn table(number: i64) -> Result<Arc<DeviceTable>, Error> {
    KNOWN.read().tables.get(&number).cloned().ok_or_else(|| {
        Error::internal(format!(
            "a collective refers to {number}, which no program here has"
        ))
    })
}

/// Registers what this rank does under `number`.
#[cfg(test)]
pub fn know(number: i64, part: Part) {
    KNOWN.write().parts.insert(number, part);
}

/// The program with that number.
pub fn program(number: i64) -> Result<Arc<CollectiveSequence>, Error> {
    KNOWN.read().programs.get(&number).cloned().ok_or_else(|| {
        Error::internal(format!(
            "a collective is of program {number}, which is not loaded here"
        ))
    })
}

/// This rank's place in its group.
pub fn rank_in(part: &Part) -> Result<usize, Error> {
    match part {
        Part::Member { rank, .. } => Ok(*rank),
        _ => Err(Error::internal("this rank is in no group of a collective")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rank_has_its_part() {
        let groups = DeviceTable::Groups(vec![vec![2, 0], vec![3, 1]]);
        let member = |rank| Part::Member {
            group: 9,
            size: 2,
            rank,
        };
        assert_eq!(part_of(0, 9, &groups), member(1));
        assert_eq!(part_of(3, 9, &groups), member(0));
        assert_eq!(part_of(4, 9, &groups), Part::None);
        let pairs = DeviceTable::Pairs(vec![(0, 1), (1, 2)]);
        let pair = |to, from| Part::Pair { to, from };
        assert_eq!(part_of(0, 9, &pairs), pair(Some(1), None));
        assert_eq!(part_of(1, 9, &pairs), pair(Some(2), Some(0)));
        assert_eq!(part_of(3, 9, &pairs), pair(None, None));
        let values = DeviceTable::Values(vec![(0, 5), (1, 4)]);
        assert_eq!(part_of(1, 9, &values), Part::Value(4));
        assert_eq!(part_of(2, 9, &values), Part::None);
    }
}
