//! How devices share the work: `data` independent replicas, each a group of `model` devices that hold one copy of the
//! model between them.
//!
//! A mesh is numbers only: which device or process stands where is decided by who runs it, from the rank alone, so
//! every host decides the same.

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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

/// The size of an axis, as it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub enum Axis {
    /// What the other axis leaves of the devices, spelt -1.
    Rest,
    /// This many.
    Exactly(NonZeroUsize),
}

impl Axis {
    /// One.
    pub const ONE: Self = Self::Exactly(NonZeroUsize::MIN);

    /// The size, where it is known.
    pub fn exactly(self) -> Option<NonZeroUsize> {
        match self {
            Self::Rest => None,
            Self::Exactly(size) => Some(size),
        }
    }
}

impl TryFrom<i64> for Axis {
    type Error = &'static str;

    fn try_from(size: i64) -> Result<Self, Self::Error> {
        match size {
            -1 => Ok(Self::Rest),
            _ => usize::try_from(size)
                .ok()
                .and_then(NonZeroUsize::new)
                .map(Self::Exactly)
                .ok_or("is neither 1 or more, nor -1 for what the other axis leaves"),
        }
    }
}

impl From<Axis> for i64 {
    fn from(axis: Axis) -> Self {
        axis.exactly().map_or(-1, |size| i64::try_from(size.get()).unwrap_or(i64::MAX))
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", i64::from(*self))
    }
}

/// A mesh as a config or a flag asks for it, before the number of devices is known: Levanter's `trainer.mesh.axes`, and
/// `data=2,model=4` as text.
///
/// One axis at most takes the rest. An axis that is not named is the rest (`data`, unless `model` is the rest) or 1.
/// Levanter's axis `replica` is data parallelism too, and multiplies `data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Axes", into = "Axes")]
pub struct MeshRequest {
    /// Replicas.
    data: Axis,
    /// Devices of one replica.
    model: Axis,
}

impl Default for MeshRequest {
    /// Every device a replica.
    fn default() -> Self {
        Self { data: Axis::Rest, model: Axis::ONE }
    }
}

impl From<Mesh> for MeshRequest {
    fn from(mesh: Mesh) -> Self {
        Self { data: Axis::Exactly(mesh.data), model: Axis::Exactly(mesh.model) }
    }
}

impl MeshRequest {
    /// A model axis of this size; the rest is data.
    pub fn of_model(model: Axis) -> Self {
        Self { data: if model == Axis::Rest { Axis::ONE } else { Axis::Rest }, model }
    }

    /// The replicas asked for.
    pub fn data(self) -> Axis {
        self.data
    }

    /// The devices of a replica asked for.
    pub fn model(self) -> Axis {
        self.model
    }

    /// The fewest devices that the mesh can be made of, where an axis that takes the rest is 1: what a plugin that makes
    /// devices (the CPU's) is asked for.
    pub fn devices(self) -> usize {
        [self.data, self.model].map(|axis| axis.exactly().map_or(1, NonZeroUsize::get)).iter().product()
    }

    /// The mesh over `devices` devices. A mesh of two exact sizes may leave devices unused.
    ///
    /// # Errors
    /// When the sizes ask for more devices, or do not divide them where one axis takes the rest.
    pub fn resolve(self, devices: NonZeroUsize) -> Result<Mesh> {
        let (key, size) = match (self.data, self.model) {
            (Axis::Exactly(data), Axis::Exactly(model)) if self.devices() <= devices.get() => {
                return Ok(Mesh { data, model });
            }
            (Axis::Exactly(_), Axis::Exactly(_)) => {
                let limit = format!("needs {} devices, but there are {devices}", self.devices());
                return Err(Error::setting("trainer.mesh.axes", self, limit, "lower data or model"));
            }
            (_, Axis::Exactly(model)) => ("model", model),
            (Axis::Exactly(data), _) => ("data", data),
            // No request is made of two rests.
            (Axis::Rest, Axis::Rest) => ("model", devices),
        };
        let rest = NonZeroUsize::new(devices.get() / size).filter(|_| devices.get().is_multiple_of(size.get()));
        let Some(rest) = rest else {
            let limit = format!("does not divide {devices} devices");
            let divisors = (1..=devices.get()).filter(|size| devices.get().is_multiple_of(*size));
            let divisors = divisors.map(|size| size.to_string()).collect::<Vec<_>>().join(", ");
            return Err(Error::setting(
                format!("trainer.mesh.axes.{key}"),
                size,
                limit,
                format!("use one of {divisors}"),
            ));
        };
        Ok(if key == "model" { Mesh { data: rest, model: size } } else { Mesh { data: size, model: rest } })
    }
}

/// The sizes as they are spelt.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Axes {
    data: Option<Axis>,
    #[serde(skip_serializing)]
    replica: Option<Axis>,
    model: Option<Axis>,
}

impl From<MeshRequest> for Axes {
    fn from(mesh: MeshRequest) -> Self {
        Self { data: Some(mesh.data), replica: None, model: Some(mesh.model) }
    }
}

impl TryFrom<Axes> for MeshRequest {
    type Error = String;

    fn try_from(axes: Axes) -> Result<Self, Self::Error> {
        let model = axes.model.unwrap_or(Axis::ONE);
        let rest = [axes.data, axes.replica, axes.model].into_iter().flatten().any(|axis| axis == Axis::Rest);
        let data = axes.data.unwrap_or(if rest { Axis::ONE } else { Axis::Rest });
        let data = match (data, axes.replica.unwrap_or(Axis::ONE)) {
            (data, Axis::ONE) => data,
            (Axis::ONE, replica) => replica,
            (Axis::Rest, _) | (_, Axis::Rest) if axes.data.is_none() => Axis::Rest,
            (Axis::Exactly(data), Axis::Exactly(replica)) => Axis::Exactly(data.saturating_mul(replica)),
            (Axis::Rest, _) | (_, Axis::Rest) => Axis::Rest,
        };
        let sizes = [data, model].map(|axis| axis.exactly().map_or(1, NonZeroUsize::get));
        match (data, model, sizes[0].checked_mul(sizes[1])) {
            (Axis::Rest, Axis::Rest, _) => Err("takes the rest (-1) on two axes: give one of them a size".into()),
            (.., Some(devices)) if devices <= MOST => Ok(Self { data, model }),
            _ => Err(format!("asks for more than {MOST} devices: lower data or model")),
        }
    }
}

/// More devices than any mesh has: what is asked for beyond it is a mistake.
const MOST: usize = 1 << 20;

impl FromStr for MeshRequest {
    type Err = String;

    /// Reads `data=2,model=4`, in any order; an axis may be left out or be -1.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut axes = Axes::default();
        for part in text.split(',') {
            let Some((name, size)) = part.split_once('=') else {
                return Err(format!("{part:?} is not AXIS=SIZE: write data=2,model=4"));
            };
            let axis = match name.trim() {
                "data" => &mut axes.data,
                "model" => &mut axes.model,
                other => return Err(format!("{other:?} is not an axis: use data and model")),
            };
            let size: i64 =
                size.trim().parse().map_err(|_| format!("{size:?} is not a whole number: write data=2,model=4"))?;
            let size = Axis::try_from(size).map_err(|limit| format!("{name} = {size} {limit}"))?;
            if axis.replace(size).is_some() {
                return Err(format!("{name} is there twice: keep one of the two"));
            }
        }
        axes.try_into()
    }
}

impl fmt::Display for MeshRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "data={},model={}", self.data, self.model)
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

    #[test]
    fn a_request_becomes_a_mesh() {
        // What is asked for, the devices that it needs, and what it becomes over 8 devices.
        let cases = [
            ("data=-1,model=1", 1, Ok("data=8,model=1")),
            ("model=4", 4, Ok("data=2,model=4")),
            ("model=-1", 1, Ok("data=1,model=8")),
            ("data=2", 2, Ok("data=2,model=1")),
            ("data=2,model=-1", 2, Ok("data=2,model=4")),
            ("model=2, data=2", 4, Ok("data=2,model=2")),
            ("model=3", 3, Err("trainer.mesh.axes.model = 3 does not divide 8 devices: use one of 1, 2, 4, 8")),
            ("data=16,model=-1", 16, Err("trainer.mesh.axes.data = 16 does not divide 8 devices")),
            ("data=4,model=4", 16, Err("trainer.mesh.axes = data=4,model=4 needs 16 devices, but there are 8")),
        ];
        for (text, devices, mesh) in cases {
            let request: MeshRequest = text.parse().unwrap();
            assert_eq!(request.devices(), devices, "{text}");
            assert_eq!(request.to_string().parse(), Ok(request));
            let found = request.resolve(NonZeroUsize::new(8).unwrap());
            match (found, mesh) {
                (Ok(found), Ok(mesh)) => assert_eq!(found.to_string(), mesh, "{text}"),
                (Err(error), Err(message)) => assert!(error.to_string().starts_with(message), "{text}: {error}"),
                (found, mesh) => panic!("{text}: {found:?}, not {mesh:?}"),
            }
        }
        for (text, message) in [
            ("data=-1,model=-1", "takes the rest (-1) on two axes"),
            ("data=0", "data = 0 is neither 1 or more"),
            ("model=-2", "model = -2 is neither 1 or more"),
            ("tensor=2", "\"tensor\" is not an axis: use data and model"),
            ("data=2,data=2", "data is there twice"),
            ("2x4", "\"2x4\" is not AXIS=SIZE"),
            ("data=two", "\"two\" is not a whole number"),
            ("data=2000000,model=2000000", "asks for more than 1048576 devices"),
            ("data=4000000000000,model=4000000000000", "asks for more than"),
        ] {
            let error = text.parse::<MeshRequest>().unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn axes_are_read_as_levanter_reads_them() {
        for (axes, request) in [
            ("{}", "data=-1,model=1"),
            (r#"{"model": 4}"#, "data=-1,model=4"),
            (r#"{"data": -1, "replica": 1, "model": 4}"#, "data=-1,model=4"),
            (r#"{"replica": 2, "data": 3}"#, "data=6,model=1"),
            (r#"{"replica": -1, "model": 4}"#, "data=-1,model=4"),
            (r#"{"model": -1}"#, "data=1,model=-1"),
        ] {
            let read: MeshRequest = serde_json::from_str(axes).unwrap();
            assert_eq!(read.to_string(), request, "{axes}");
            assert_eq!(serde_json::from_str::<MeshRequest>(&serde_json::to_string(&read).unwrap()).unwrap(), read);
        }
    }
}
