//! Where a run takes place: the plugin's client, this process's part of the mesh, and MPI where a replica of the model spans
//! processes.

use std::collections::BTreeSet;
use std::time::Instant;

use super::PluginArgs;
use crate::config::{InferenceMode, Settings};
use crate::error::{Error, Result};
use crate::hosts::Share;
use crate::launcher::one_host_slice;
use crate::mpi::World;
use crate::output::fingerprint;
use crate::pjrt::Client;
use crate::placement::Placement;
use crate::units::SampleId;

/// A client, and what this process runs on it.
pub(super) struct Place {
    pub(super) client: Client,
    pub(super) placement: Placement,
    /// Seconds to load the plugin and to create the client.
    pub(super) plugin_s: f64,
}

impl Place {
    /// Creates the client, and places process `process` of its kind. MPI is started, in `world`, where it is needed.
    ///
    /// # Errors
    /// When the mesh that was asked for fits neither the devices nor the processes.
    pub(super) fn take(
        plugin: &PluginArgs,
        settings: &Settings,
        process: Share,
        world: &mut Option<World>,
    ) -> Result<Self> {
        let (mode, asked) = (settings.mode(), settings.mesh());
        if process.hosts() > 1 && mode == InferenceMode::HostDataParallel && plugin.plugin == "tpu" {
            for (name, value) in one_host_slice(|name| std::env::var(name).ok())? {
                eprintln!("# {name}={value}, so that libtpu takes this host's chips for a slice of their own");
                // SAFETY: no other thread was started yet.
                unsafe { std::env::set_var(name, value) };
            }
        }
        let started = Instant::now();
        let client = plugin.client(Placement::devices_wanted(mode, asked, process))?;
        let plugin_s = started.elapsed().as_secs_f64();
        let placement = Placement::of(mode, asked, process, client.devices())?;
        if placement.spans_processes() {
            let world = world.insert(World::start(placement.mesh())?);
            world.register(client.plugin())?;
        }
        Ok(Self { client, placement, plugin_s })
    }
}

/// Checks that all processes of a mesh decide the same: `parts` are what they decide from.
///
/// # Errors
/// Names a process that would decide otherwise.
pub(super) fn agree<'a>(world: Option<&World>, parts: impl IntoIterator<Item = &'a [u8]>) -> Result<()> {
    world.map_or(Ok(()), |world| world.agree("what is run", fingerprint(parts).as_bytes()))
}

/// What is missing of `samples`: on every process of a replica, what is `missing` on the one that writes.
pub(super) fn alike(world: Option<&World>, samples: Vec<SampleId>, missing: Vec<SampleId>) -> Vec<SampleId> {
    let Some(world) = world else { return missing };
    let missing = BTreeSet::from_iter(missing);
    let mut flags: Vec<u8> = samples.iter().map(|id| u8::from(missing.contains(id))).collect();
    world.as_first_shard(&mut flags);
    samples.into_iter().zip(flags).filter_map(|(id, flag)| (flag == 1).then_some(id)).collect()
}

/// Ends all processes when one fails: the others would wait for it for ever.
pub(super) fn end_together<T>(world: Option<&World>, outcome: Result<T>) -> Result<T> {
    match (world, outcome) {
        (Some(world), Err(error)) => fail(world, &error),
        (_, outcome) => outcome,
    }
}

fn fail(world: &World, error: &Error) -> ! {
    eprintln!("error: {error}");
    world.abort(error.exit_code())
}
