//! How devices share the work: `data` independent replicas, each a group of `model` devices that hold one copy of the
//! model between them.
//!
//! A mesh is numbers only: which device or process stands where is decided by who runs it, from the rank alone, so
//! every host decides the same.

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;

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

/// One part of a model that `of` devices hold between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    /// Which part, below `of`.
    pub index: usize,
    /// Into how many the model is split.
    pub of: NonZeroUsize,
}

impl Shard {
    /// A model that is not split.
    pub const WHOLE: Self = Self { index: 0, of: NonZeroUsize::MIN };

    /// All parts of a model.
    pub fn all(of: NonZeroUsize) -> impl Iterator<Item = Self> {
        (0..of.get()).map(move |index| Self { index, of })
    }

    /// Its part of `units` equal units (heads, rows of a vocabulary): the next [`width`](Self::width) of them, fewer or
    /// none at the end. Where there are fewer units than shards, neighbours have the same one.
    pub fn range(self, units: usize) -> Range<usize> {
        let of = self.of.get();
        if units < of {
            let unit = self.index * units / of;
            return unit..unit + 1;
        }
        let width = Self::width(units, self.of);
        let start = (self.index * width).min(units);
        start..(start + width).min(units)
    }

    /// Units of the largest of `of` parts.
    pub fn width(units: usize, of: NonZeroUsize) -> usize {
        units.div_ceil(of.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts tile the units in order, none wider than the first; or every unit is had equally often.
    #[test]
    fn shards_tile_the_units() {
        for (units, of) in (1..40).flat_map(|units| (1..12).map(move |of| (units, of))) {
            let of = NonZeroUsize::new(of).unwrap();
            let parts: Vec<_> = Shard::all(of).map(|shard| shard.range(units)).collect();
            let held: Vec<usize> = parts.iter().cloned().flatten().collect();
            if units >= of.get() {
                assert_eq!(held, (0..units).collect::<Vec<_>>(), "{units} units over {of}");
                assert!(parts.iter().all(|part| part.len() <= Shard::width(units, of)));
                assert_eq!(parts[0].len(), Shard::width(units, of));
            } else if of.get().is_multiple_of(units) {
                let each = of.get() / units;
                let expected: Vec<usize> = (0..units).flat_map(|unit| vec![unit; each]).collect();
                assert_eq!(held, expected, "{units} units over {of}");
            }
        }
        let quarter = |index| Shard { index, of: NonZeroUsize::new(4).unwrap() }.range(10);
        assert_eq!([0, 1, 2, 3].map(quarter), [0..3, 3..6, 6..9, 9..10]);
    }
}
