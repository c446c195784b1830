//! How devices share the work: `data` independent replicas, each a group of `model` devices that hold one copy of the
//! model between them.
//!
//! A mesh is numbers only: which device or process stands where is decided by who runs it, from the rank alone, so
//! every host decides the same.

use std::fmt;
use std::num::NonZeroUsize;

use crate::error::{Error, Result};

/// Replicas of the model, and the devices that each is sharded over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mesh {
    /// Replicas, each with prompts of its own.
    pub data: NonZeroUsize,
    /// Devices of one replica: ways of tensor parallelism.
    pub model: NonZeroUsize,
}

impl Mesh {
    /// One device.
    pub const ONE: Self = Self { data: NonZeroUsize::MIN, model: NonZeroUsize::MIN };

    /// The mesh over `devices` whose model axis is `model`; the rest are data.
    ///
    /// # Errors
    /// When `model` does not divide `devices`.
    pub fn over(devices: NonZeroUsize, model: NonZeroUsize) -> Result<Self> {
        match NonZeroUsize::new(devices.get() / model).filter(|_| devices.get() % model == 0) {
            Some(data) => Ok(Self { data, model }),
            None => {
                let limit = format!("does not divide {devices} devices");
                Err(Error::setting("mesh model", model, limit, format!("use a divisor of {devices}")))
            }
        }
    }

    /// All devices.
    pub fn devices(self) -> usize {
        self.data.get() * self.model.get()
    }

    /// Where device or process `rank` stands: replica, shard. Shards of a replica are neighbours.
    pub fn place(self, rank: usize) -> (usize, usize) {
        (rank / self.model, rank % self.model)
    }

    /// The devices of each replica, in shard order: the groups of an all-reduce.
    pub fn groups(self) -> Vec<Vec<usize>> {
        let shards = self.model.get();
        (0..self.data.get()).map(|replica| (replica * shards..(replica + 1) * shards).collect()).collect()
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "data={},model={}", self.data, self.model)
    }
}
