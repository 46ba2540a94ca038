//! What this process is made of, for `python -m mpi_cuda doctor`: lines of a name, a tab and words.

#![forbid(unsafe_code)]

use mpi_runtime::World;
use mpi_runtime::device::cuda::{self, Found};
use mpi_runtime::mpi::launcher;
use mpi_runtime::world::library;

use crate::compile::shared;
use crate::inner::{inner, on_gpu};
use crate::plugin::{config, load, probe_results, world};

/// All that is known so far. Loads the inner plugin, and joins nothing.
pub fn lines() -> String {
    let mut rows = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
    if let Some(launched) = launcher::detect(|name| std::env::var(name).ok()) {
        rows.push(("launcher", launched.launcher.to_owned()));
        rows.push(("launched", launched.size.to_string()));
    }
    if let Some(mpi) = library::opened() {
        rows.push(("mpi_file", mpi.file.display().to_string()));
        rows.push(("mpi_abi", mpi.family.name().to_owned()));
        rows.push(("mpi_by", mpi.by.to_owned()));
        rows.extend(mpi.doubt.map(|doubt| ("mpi_doubt", doubt)));
    }
    match load() {
        Ok(_) => rows.extend(of_plugin()),
        Err(error) => rows.push(("plugin_error", error.to_string())),
    }
    if let Some(world) = world() {
        rows.extend(of_world(world));
    }
    let line = |(name, words): &(&str, String)| format!("{name}\t{}\n", words.replace('\n', " "));
    rows.iter().map(line).collect()
}

fn of_plugin() -> Vec<(&'static str, String)> {
    let plugin = inner();
    let (major, minor) = plugin.version();
    let device = if on_gpu() { "cuda" } else { "cpu" };
    let mut rows = vec![
        ("device", device.to_owned()),
        ("device_reason", plugin.reason.clone()),
        ("plugin", plugin.path.display().to_string()),
        ("plugin_version", format!("{major}.{minor}")),
    ];
    if on_gpu()
        && let Found::Devices { count, version } = cuda::find()
    {
        rows.push(("gpus", count.to_string()));
        rows.push(("driver_version", version.to_string()));
    }
    rows
}

fn of_world(world: &World) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        ("mpi_version", world.library.clone()),
        ("thread_level", world.thread_level.to_owned()),
        ("node_rank", world.node_rank.to_string()),
        ("node_size", world.node_size.to_string()),
        ("oversubscribed", u8::from(world.oversubscribed).to_string()),
        ("compiled_by_others", shared::taken().to_string()),
    ];
    if on_gpu()
        && let Found::Devices { count, .. } = cuda::find()
    {
        // The one of its place on the node (`inner/cuda_options.rs`).
        let own = cuda::uuid(world.node_rank % count.max(1));
        rows.extend(own.map(|uuid| ("gpu", uuid)));
    }
    if let Some(transfer) = &world.transfer {
        rows.push(("transfer", transfer.to_string()));
        let folder = probe_results(config()).folder;
        rows.push(("probe_dir", folder.display().to_string()));
    }
    let failure = world.shm_rings.as_ref().and_then(|all| all.failure());
    rows.extend(failure.map(|failure| ("shm_failure", failure.to_string())));
    rows
}

#[cfg(test)]
mod tests {
    use crate::plugin::start_for_tests;

    #[test]
    fn a_world_of_one_has_nobody_to_ask() {
        let world = start_for_tests();
        assert_eq!(world.gather(b"own").unwrap(), b"own");
        assert!(
            world
                .ping(0, 8, 1)
                .unwrap_err()
                .0
                .contains("no other rank 0")
        );
        assert!(world.ping(1, 8, 1).is_err());
    }
}
