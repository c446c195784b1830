//! Ops that exchange arrays between devices.

use super::{
    Builder, Tensor,
    emit::{ensure, ensure_dims},
};
use crate::{element::Element, error::Result, shape::TensorType};
use melior::ir::Attribute;

/// What the numbers in [`DeviceGroups`] stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Across {
    /// Replica ids; every partition has groups of its own.
    Replicas,
    /// Partition ids; every replica has groups of its own. `channel` (positive) must be unique in the program.
    Partitions {
        /// The channel's number.
        channel: usize,
    },
    /// `replica_id * partitions + partition_id`. `channel` (positive) must be unique in the program.
    Devices {
        /// The channel's number.
        channel: usize,
    },
}

/// The groups of devices that take part in one collective together, each in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceGroups {
    /// Ids, group by group; groups are of equal size.
    pub groups: Vec<Vec<usize>>,
    /// What the ids stand for.
    pub across: Across,
}

impl DeviceGroups {
    /// One group of replicas 0 to `count` - 1.
    pub fn replicas(count: usize) -> Self {
        Self { groups: vec![(0..count).collect()], across: Across::Replicas }
    }

    /// One group of partitions 0 to `count` - 1.
    pub fn partitions(count: usize, channel: usize) -> Self {
        Self { groups: vec![(0..count).collect()], across: Across::Partitions { channel } }
    }

    fn check(&self, op: &str) -> Result<usize> {
        let size = self.groups.first().map_or(0, Vec::len);
        let ids = self.groups.concat();
        ensure(size > 0 && self.groups.iter().all(|group| group.len() == size), op, || {
            format!("groups {:?} must be of one size, and not empty", self.groups)
        })?;
        ensure_dims(op, "device ids", &ids, usize::MAX)?;
        Ok(size)
    }
}

impl<'c, 'a> Builder<'c, 'a> {
    fn group_attributes(&self, groups: &DeviceGroups) -> Result<Vec<(&'static str, Attribute<'c>)>> {
        let (count, size) = (groups.groups.len(), groups.groups[0].len());
        let text = format!("dense<{:?}> : tensor<{count}x{size}xi64>", groups.groups);
        let mut attributes = vec![("replica_groups", self.parse(&text)?)];
        attributes.extend(self.channel(groups.across)?);
        if matches!(groups.across, Across::Devices { .. }) {
            attributes.push(("use_global_device_ids", Attribute::unit(self.context)));
        }
        Ok(attributes)
    }

    fn channel(&self, across: Across) -> Result<Option<(&'static str, Attribute<'c>)>> {
        match across {
            Across::Replicas => Ok(None),
            Across::Partitions { channel } | Across::Devices { channel } => {
                let text = format!("#stablehlo.channel_handle<handle = {channel}, type = 1>");
                Ok(Some(("channel_handle", self.parse(&text)?)))
            }
        }
    }

    /// Combines `x` over each group with `combine(b, acc, x)`, element by element; every device gets the result.
    pub fn all_reduce(
        &self,
        x: Tensor<'c, 'a>,
        groups: &DeviceGroups,
        combine: impl FnOnce(&Builder<'c, 'a>, Tensor<'c, 'a>, Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>>,
    ) -> Result<Tensor<'c, 'a>> {
        let op = "all_reduce";
        let ty = x.ty();
        groups.check(op)?;
        let scalars = [TensorType::scalar(ty.element)];
        let body = self.combiner(op, &scalars, |b, acc, x| Ok(vec![combine(b, acc[0], x[0])?]))?;
        Ok(self.emit_all(op, &[x], &self.group_attributes(groups)?, &[ty], vec![body])?[0])
    }

    /// The sum of `x` over each group.
    pub fn all_reduce_sum(&self, x: Tensor<'c, 'a>, groups: &DeviceGroups) -> Result<Tensor<'c, 'a>> {
        self.all_reduce(x, groups, |b, acc, x| b.add(acc, x))
    }

    /// Joins the `x` of each group along `dim`, in the group's order.
    pub fn all_gather(&self, x: Tensor<'c, 'a>, dim: usize, groups: &DeviceGroups) -> Result<Tensor<'c, 'a>> {
        let op = "all_gather";
        let size = groups.check(op)?;
        let mut ty = x.ty();
        ensure_dims(op, "dim", &[dim], ty.rank())?;
        ty.dims[dim] *= size;
        let mut attributes = self.group_attributes(groups)?;
        attributes.push(("all_gather_dim", self.i64(dim)));
        self.emit(op, &[x], &attributes, ty)
    }

    /// Combines `x` over each group and leaves each device its part along `dim`.
    pub fn reduce_scatter(
        &self,
        x: Tensor<'c, 'a>,
        dim: usize,
        groups: &DeviceGroups,
        combine: impl FnOnce(&Builder<'c, 'a>, Tensor<'c, 'a>, Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>>,
    ) -> Result<Tensor<'c, 'a>> {
        let op = "reduce_scatter";
        let size = groups.check(op)?;
        let ty = x.ty();
        ensure_dims(op, "dim", &[dim], ty.rank())?;
        ensure(ty.dims[dim].is_multiple_of(size), op, || {
            format!("{ty} dim {dim} = {} does not split into {size} parts", ty.dims[dim])
        })?;
        let scalars = [TensorType::scalar(ty.element)];
        let body = self.combiner(op, &scalars, |b, acc, x| Ok(vec![combine(b, acc[0], x[0])?]))?;
        let mut result = ty;
        result.dims[dim] /= size;
        let mut attributes = self.group_attributes(groups)?;
        attributes.push(("scatter_dimension", self.i64(dim)));
        Ok(self.emit_all(op, &[x], &attributes, &[result], vec![body])?[0])
    }

    /// Splits `x` along `split_dim` into one part per device of its group, and joins what the device gets from the
    /// others along `concat_dim`, in the group's order.
    pub fn all_to_all(
        &self,
        x: Tensor<'c, 'a>,
        split_dim: usize,
        concat_dim: usize,
        groups: &DeviceGroups,
    ) -> Result<Tensor<'c, 'a>> {
        let op = "all_to_all";
        let size = groups.check(op)?;
        let mut ty = x.ty();
        ensure_dims(op, "split_dim", &[split_dim], ty.rank())?;
        ensure_dims(op, "concat_dim", &[concat_dim], ty.rank())?;
        ensure(ty.dims[split_dim].is_multiple_of(size), op, || {
            format!("{ty} dim {split_dim} = {} does not split into {size} parts", ty.dims[split_dim])
        })?;
        ensure(!matches!(groups.across, Across::Devices { .. }), op, || {
            "has no form for global device ids: use replica or partition ids".to_owned()
        })?;
        ty.dims[split_dim] /= size;
        ty.dims[concat_dim] *= size;
        let mut attributes = self.group_attributes(groups)?;
        attributes.push(("split_dimension", self.i64(split_dim)));
        attributes.push(("concat_dimension", self.i64(concat_dim)));
        attributes.push(("split_count", self.i64(size)));
        self.emit(op, &[x], &attributes, ty)
    }

    /// Sends `x` from the first to the second of each pair of ids; who receives nothing gets zeros.
    pub fn collective_permute(
        &self,
        x: Tensor<'c, 'a>,
        pairs: &[(usize, usize)],
        across: Across,
    ) -> Result<Tensor<'c, 'a>> {
        let op = "collective_permute";
        let (sources, targets): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
        ensure(!pairs.is_empty(), op, || "needs one pair at least".to_owned())?;
        ensure_dims(op, "sources", &sources, usize::MAX)?;
        ensure_dims(op, "targets", &targets, usize::MAX)?;
        ensure(!matches!(across, Across::Devices { .. }), op, || {
            "has no form for global device ids: use replica or partition ids".to_owned()
        })?;
        let rows: Vec<[usize; 2]> = pairs.iter().map(|&(source, target)| [source, target]).collect();
        let text = format!("dense<{rows:?}> : tensor<{}x2xi64>", rows.len());
        let mut attributes = vec![("source_target_pairs", self.parse(&text)?)];
        attributes.extend(self.channel(across)?);
        self.emit(op, &[x], &attributes, x.ty())
    }

    /// The number of the replica that runs, `u32[]`.
    pub fn replica_id(&self) -> Result<Tensor<'c, 'a>> {
        self.emit("replica_id", &[], &[], TensorType::scalar(Element::U32))
    }

    /// The number of the partition that runs, `u32[]`.
    pub fn partition_id(&self) -> Result<Tensor<'c, 'a>> {
        self.emit("partition_id", &[], &[], TensorType::scalar(Element::U32))
    }
}
