//! What a client of the CUDA plugin is created with: one GPU for each rank, and the devices of all
//! ranks.

#![forbid(unsafe_code)]

use mpi_runtime::World;
use mpi_runtime::device::cuda::{self, Found};
use mpi_runtime::log;

use super::create_options::Value;
use crate::error::Error;

/// Options of JAX's that say how much memory is taken at the start.
const MEMORY: [&str; 2] = ["preallocate", "memory_fraction"];

/// The options beside those that the framework gives by these names.
///
/// All devices are shown by XLA's topology for tests of programs for many GPUs
/// (`enable_mock_nccl`): it asks no other process, and its one other effect is that XLA's own
/// collectives do nothing, of which there are none in a rewritten program.
pub fn options(
    rank: i32,
    size: i32,
    given: &[String],
    world: &World,
    verbose: bool,
) -> Result<Vec<(&'static str, Value)>, Error> {
    let Found::Devices { count, .. } = cuda::find() else {
        return Err(Error::internal("the CUDA devices are gone"));
    };
    let mut options = choose(rank, size, Node::of(world, count), given);
    if verbose {
        log::line(&format!("CUDA client with {options:?}"));
    }
    if let Some((_, Value::List(devices))) = options.iter().find(|(n, _)| *n == "visible_devices") {
        let sharing = world.node_size > count;
        if sharing && world.node_rank == 0 {
            log::line(&format!(
                "{} ranks of this node share {count} GPU(s), so none takes its memory at \
                 the start (rank {rank} is on GPU {devices:?})",
                world.node_size
            ));
        }
    }
    options.retain(|(name, _)| !given.iter().any(|given| given == name));
    Ok(options)
}

/// A node's ranks and GPUs.
#[derive(Clone, Copy)]
struct Node {
    /// Number of lower ranks here.
    rank: i32,
    ranks: i32,
    gpus: i32,
}

impl Node {
    fn of(world: &World, gpus: i32) -> Node {
        Node {
            rank: world.node_rank,
            ranks: world.node_size,
            gpus,
        }
    }
}

fn choose(rank: i32, size: i32, node: Node, given: &[String]) -> Vec<(&'static str, Value)> {
    let is_given = |name: &str| given.iter().any(|given| given == name);
    let own = i64::from(node.rank % node.gpus.max(1));
    let mut options = vec![
        ("visible_devices", Value::List(vec![own])),
        // Launches go through a queue of XLA's, so that an operation may wait without holding
        // Python.
        ("use_tfrt_gpu_client", Value::Bool(true)),
    ];
    if !is_given("platform_name") {
        options.push(("platform_name", Value::Text("cuda".into())));
    }
    if node.ranks > node.gpus && !MEMORY.into_iter().any(is_given) {
        options.push(("preallocate", Value::Bool(false)));
    }
    if size > 1 {
        options.extend([
            ("enable_mock_nccl", Value::Bool(true)),
            ("num_nodes", Value::Int(i64::from(size))),
            ("node_id", Value::Int(i64::from(rank))),
            ("mock_gpu_topology", Value::Text(format!("1x{size}x1"))),
        ]);
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(rank: i32, ranks: i32, gpus: i32, given: &[&str]) -> Vec<(&'static str, Value)> {
        let given: Vec<String> = given.iter().map(|&name| name.to_owned()).collect();
        choose(rank + 8, 16, Node { rank, ranks, gpus }, &given)
    }

    fn get<'a>(options: &'a [(&'static str, Value)], name: &str) -> Option<&'a Value> {
        options
            .iter()
            .find(|option| option.0 == name)
            .map(|option| &option.1)
    }

    #[test]
    fn each_rank_has_the_gpu_of_its_place_on_the_node() {
        for rank in 0..4 {
            let own = Value::List(vec![i64::from(rank)]);
            assert_eq!(get(&on(rank, 4, 4, &[]), "visible_devices"), Some(&own));
        }
        // Slurm has given each rank one.
        let first = Value::List(vec![0]);
        assert_eq!(get(&on(3, 4, 1, &[]), "visible_devices"), Some(&first));
        let options = on(3, 4, 4, &[]);
        assert_eq!(get(&options, "node_id"), Some(&Value::Int(11)));
        let topology = Value::Text("1x16x1".into());
        assert_eq!(get(&options, "mock_gpu_topology"), Some(&topology));
    }

    #[test]
    fn ranks_that_share_a_gpu_do_not_fight_for_its_memory() {
        assert_eq!(get(&on(0, 2, 2, &[]), "preallocate"), None);
        let no = Value::Bool(false);
        assert_eq!(get(&on(0, 2, 1, &[]), "preallocate"), Some(&no));
        // Whoever says how much means it.
        assert_eq!(get(&on(0, 2, 1, &["memory_fraction"]), "preallocate"), None);
        assert_eq!(get(&on(0, 2, 1, &["preallocate"]), "preallocate"), None);
    }
}
