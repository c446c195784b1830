//! Which part of a job this process runs: its share of the prompts, and the replicas of the model, or the one shard, that
//! stand on its devices.
//!
//! It follows from the mode, the mesh that was asked for, the process's number among all, and the devices: pure, so that
//! every process decides the same and nobody leads.
//!
//! - `host_data_parallel`: the mesh is that of one process. Processes share the prompts and nothing else.
//! - `global_mesh`: the mesh is that of the devices of all processes together. Where every replica stands within a process
//!   that is again no traffic; where processes of one device each make up a replica, they exchange sums over MPI, the
//!   replicas share the prompts, and the process of each replica's first shard writes its samples.

use std::fmt;
use std::num::NonZeroUsize;

use crate::config::InferenceMode;
use crate::error::{Error, Result};
use crate::hosts::Share;
use crate::llama::{Group, Parallel};
use crate::mesh::{Mesh, MeshRequest, Shard};

/// What a process runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    mode: InferenceMode,
    /// Of one process, or of all: as the mode says.
    mesh: Mesh,
    /// Devices of the mesh that are this process's.
    devices: NonZeroUsize,
    /// The replicas on this process's devices, or its one shard of a replica.
    groups: Vec<Group>,
    share: Share,
    writes: bool,
}

impl Placement {
    /// The devices that a process makes, where its plugin makes as many as are asked for (the CPU's).
    pub fn devices_wanted(mode: InferenceMode, asked: MeshRequest, process: Share) -> usize {
        match mode {
            InferenceMode::HostDataParallel => asked.devices(),
            InferenceMode::GlobalMesh => asked.devices().div_ceil(process.hosts()),
        }
    }

    /// Places process `process`, which has `devices`, as every other.
    ///
    /// # Errors
    /// When the mesh does not fit the devices, or a replica would stand across processes of several devices.
    pub fn of(mode: InferenceMode, asked: MeshRequest, process: Share, devices: usize) -> Result<Self> {
        let devices = at_least_one(devices);
        match mode {
            InferenceMode::HostDataParallel => Self::independent(asked, process, devices),
            InferenceMode::GlobalMesh => Self::global(asked, process, devices),
        }
    }

    /// A mesh of one process's own.
    fn independent(asked: MeshRequest, share: Share, devices: NonZeroUsize) -> Result<Self> {
        let mode = InferenceMode::HostDataParallel;
        let mesh = asked.resolve(devices)?;
        let groups = (0..mesh.data.get()).map(|replica| Group::replica(mesh, replica)).collect();
        Ok(Self { mode, mesh, devices: at_least_one(mesh.devices()), groups, share, writes: true })
    }

    /// One mesh over the devices of all processes.
    fn global(asked: MeshRequest, process: Share, per_process: NonZeroUsize) -> Result<Self> {
        let mode = InferenceMode::GlobalMesh;
        let processes = at_least_one(process.hosts());
        let mesh = asked.resolve(per_process.saturating_mul(processes))?;
        if mesh.devices() != per_process.get() * processes.get() {
            let limit = format!("does not spread evenly over {processes} processes of {per_process} devices");
            let fix =
                format!("give a mesh of {} devices, or start other processes", per_process.get() * processes.get());
            return Err(Error::setting("trainer.mesh.axes", mesh, limit, fix));
        }
        if per_process.get().is_multiple_of(mesh.model.get()) {
            let local = Mesh { data: at_least_one(per_process.get() / mesh.model), ..mesh };
            let groups = (0..local.data.get()).map(|replica| Group::replica(local, replica)).collect();
            return Ok(Self { mode, mesh, devices: per_process, groups, share: process, writes: true });
        }
        if per_process.get() > 1 {
            let limit = format!("puts a replica across processes of {per_process} devices each");
            let fix = format!("use a model axis that divides {per_process}, or processes of one CPU device each");
            return Err(Error::setting("trainer.mesh.axes", mesh, limit, fix));
        }
        let (replica, shard) = mesh.place(process.host());
        let group = Group::process(Shard { index: shard, of: mesh.model });
        let share = Share::new(replica, mesh.data.get())?;
        Ok(Self { mode, mesh, devices: per_process, groups: vec![group], share, writes: shard == 0 })
    }

    /// The mesh: of this process in `host_data_parallel`, of all in `global_mesh`.
    pub fn mesh(&self) -> Mesh {
        self.mesh
    }

    /// Devices that this process uses.
    pub fn devices(&self) -> NonZeroUsize {
        self.devices
    }

    /// The replicas on this process's devices, or its one shard of a replica over several processes.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// How the model is split: alike in all groups.
    pub fn parallel(&self) -> &Parallel {
        self.groups[0].parallel()
    }

    /// The prompts that this process runs, as a share of all.
    pub fn share(&self) -> Share {
        self.share
    }

    /// Whether this process prints and keeps what its share yields: of a replica over several processes, one does.
    pub fn writes(&self) -> bool {
        self.writes
    }

    /// Whether a replica stands across processes, which then exchange sums over MPI.
    pub fn spans_processes(&self) -> bool {
        self.devices.get() < self.mesh.model.get()
    }
}

/// What is printed at the start.
impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: mesh {}", self.mode, self.mesh)?;
        if self.spans_processes() {
            let (shard, replica) = (self.groups[0].members()[0].shard.index, self.share.host());
            return write!(f, " over processes, sums over MPI; this is shard {shard} of replica {replica}");
        }
        let here = self.groups.len();
        let plural = if here == 1 { "" } else { "s" };
        write!(
            f,
            "; here {here} replica{plural} on {} device{}",
            self.devices,
            if self.devices.get() == 1 { "" } else { "s" }
        )
    }
}

fn at_least_one(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn placed(
        mode: InferenceMode,
        mesh: &str,
        process: (usize, usize),
        devices: Option<usize>,
    ) -> Result<String, String> {
        let asked: MeshRequest = mesh.parse().unwrap();
        let process = Share::new(process.0, process.1).unwrap();
        let devices = devices.unwrap_or(Placement::devices_wanted(mode, asked, process));
        let placement = Placement::of(mode, asked, process, devices);
        placement.map(|placement| placement.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_mesh_is_of_a_process_or_of_all() {
        use InferenceMode::{GlobalMesh, HostDataParallel};
        let cases = [
            (HostDataParallel, "data=2,model=2", (1, 8), None, "mesh data=2,model=2; here 2 replicas on 4 devices"),
            (HostDataParallel, "model=4", (1, 8), Some(4), "mesh data=1,model=4; here 1 replica on 4 devices"),
            (GlobalMesh, "model=4", (1, 8), Some(4), "mesh data=8,model=4; here 1 replica on 4 devices"),
            (GlobalMesh, "data=1,model=2", (1, 2), None, "sums over MPI; this is shard 1 of replica 0"),
            (GlobalMesh, "data=2,model=2", (2, 4), None, "sums over MPI; this is shard 0 of replica 1"),
            (GlobalMesh, "data=4,model=2", (1, 2), None, "mesh data=4,model=2; here 2 replicas on 4 devices"),
            (GlobalMesh, "model=2", (1, 2), None, "sums over MPI; this is shard 1 of replica 0"),
            (GlobalMesh, "data=1,model=1", (0, 1), None, "mesh data=1,model=1; here 1 replica on 1 device"),
        ];
        for (mode, mesh, process, devices, expected) in cases {
            let found = placed(mode, mesh, process, devices).unwrap();
            assert!(found.contains(expected), "{found}");
        }
        let refused = [
            (GlobalMesh, "data=1,model=4", (0, 2), None, "puts a replica across processes of 2 devices each"),
            (GlobalMesh, "data=1,model=3", (0, 2), None, "does not spread evenly over 2 processes"),
            (GlobalMesh, "data=1,model=1", (0, 2), None, "does not spread evenly over 2 processes of 1 device"),
            (HostDataParallel, "model=3", (0, 2), Some(4), "does not divide 4 devices"),
        ];
        for (mode, mesh, process, devices, expected) in refused {
            let error = placed(mode, mesh, process, devices).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    proptest! {
        /// Over all processes, each share of the prompts is written once, and each shard of each replica is there once.
        #[test]
        fn processes_tile_the_job(data in 1usize..5, model in 1usize..5, processes in 1usize..9, global: bool) {
            let asked: MeshRequest = format!("data={data},model={model}").parse().unwrap();
            let mode = if global { InferenceMode::GlobalMesh } else { InferenceMode::HostDataParallel };
            let all: Result<Vec<_>> = (0..processes)
                .map(|process| Share::new(process, processes).unwrap())
                .map(|process| Placement::of(mode, asked, process, Placement::devices_wanted(mode, asked, process)))
                .collect();
            let Ok(all) = all else {
                prop_assert!(global);
                return Ok(());
            };
            let writers: Vec<_> = all.iter().filter(|placement| placement.writes()).map(|placement| placement.share()).collect();
            let shares = writers[0].hosts();
            let hosts: BTreeSet<_> = writers.iter().map(|share| share.host()).collect();
            prop_assert_eq!((writers.len(), hosts.len()), (shares, shares));
            let members: usize = all.iter().flat_map(Placement::groups).map(|group| group.members().len()).sum();
            prop_assert_eq!(members, data * model * if global { 1 } else { processes });
        }
    }
}
