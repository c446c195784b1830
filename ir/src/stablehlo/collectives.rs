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
    /// `replica_id * partitions + partition_id`: in a program of one replica, the partition's id.
    Devices {
        /// A positive number that no other collective of the program has.
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

    /// One group of devices 0 to `count` - 1.
    pub fn devices(count: usize, channel: usize) -> Self {
        Self { groups: vec![(0..count).collect()], across: Across::Devices { channel } }
    }
}

/// How an op reads ids that come with a channel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ids {
    /// As device ids, when told so.
    Devices,
    /// As partition ids always: these are device ids only in a program of one replica.
    Partitions,
}

impl<'c, 'a> Builder<'c, 'a> {
    /// Checks the ids, and returns the size of a group.
    fn ensure_groups(&self, op: &str, groups: &DeviceGroups, ids: Ids) -> Result<usize> {
        let size = groups.groups.first().map_or(0, Vec::len);
        ensure(size > 0 && groups.groups.iter().all(|group| group.len() == size), op, || {
            format!("groups {:?} must be of one size, and not empty", groups.groups)
        })?;
        self.ensure_ids(op, "group members", &groups.groups.concat(), groups.across, ids)?;
        Ok(size)
    }

    fn ensure_ids(&self, op: &str, what: &str, members: &[usize], across: Across, ids: Ids) -> Result<()> {
        let (replicas, partitions) = (self.shared.replicas, self.shared.partitions);
        let (kind, count) = match across {
            Across::Replicas => ("replicas", replicas),
            Across::Devices { channel } => {
                ensure(channel > 0, op, || "channel 0 means no channel: number channels from 1".to_owned())?;
                ensure(ids == Ids::Devices || replicas == 1, op, || {
                    format!("has no form for device ids in a module of {replicas} replicas: use replica ids")
                })?;
                ("devices", replicas * partitions)
            }
        };
        let limit = members.iter().all(|&id| id < count);
        ensure(limit, op, || {
            format!("{what} {members:?} exceed the module's {count} {kind}: make it with Module::replicated")
        })?;
        ensure_dims(op, what, members, count)
    }

    fn group_attributes(&self, groups: &DeviceGroups, ids: Ids) -> Result<Vec<(&'static str, Attribute<'c>)>> {
        let (count, size) = (groups.groups.len(), groups.groups[0].len());
        let text = format!("dense<{:?}> : tensor<{count}x{size}xi64>", groups.groups);
        let mut attributes = vec![("replica_groups", self.parse(&text)?)];
        attributes.extend(self.channel(groups.across)?);
        if ids == Ids::Devices && matches!(groups.across, Across::Devices { .. }) {
            attributes.push(("use_global_device_ids", Attribute::unit(self.context)));
        }
        Ok(attributes)
    }

    fn channel(&self, across: Across) -> Result<Option<(&'static str, Attribute<'c>)>> {
        let Across::Devices { channel } = across else { return Ok(None) };
        // Type 1: from device to device.
        let text = format!("#stablehlo.channel_handle<handle = {channel}, type = 1>");
        Ok(Some(("channel_handle", self.parse(&text)?)))
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
        self.ensure_groups(op, groups, Ids::Devices)?;
        let scalars = [TensorType::scalar(ty.element)];
        let body = self.combiner(op, &scalars, |b, acc, x| Ok(vec![combine(b, acc[0], x[0])?]))?;
        Ok(self.emit_all(op, &[x], &self.group_attributes(groups, Ids::Devices)?, &[ty], vec![body])?[0])
    }

    /// The sum of `x` over each group.
    pub fn all_reduce_sum(&self, x: Tensor<'c, 'a>, groups: &DeviceGroups) -> Result<Tensor<'c, 'a>> {
        self.all_reduce(x, groups, |b, acc, x| b.add(acc, x))
    }

    /// Joins the `x` of each group along `dim`, in the group's order.
    pub fn all_gather(&self, x: Tensor<'c, 'a>, dim: usize, groups: &DeviceGroups) -> Result<Tensor<'c, 'a>> {
        let op = "all_gather";
        let size = self.ensure_groups(op, groups, Ids::Devices)?;
        let mut ty = x.ty();
        ensure_dims(op, "dim", &[dim], ty.rank())?;
        ty.dims[dim] *= size;
        let mut attributes = self.group_attributes(groups, Ids::Devices)?;
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
        let size = self.ensure_groups(op, groups, Ids::Devices)?;
        let ty = x.ty();
        ensure_dims(op, "dim", &[dim], ty.rank())?;
        ensure(ty.dims[dim].is_multiple_of(size), op, || {
            format!("{ty} dim {dim} = {} does not split into {size} parts", ty.dims[dim])
        })?;
        let scalars = [TensorType::scalar(ty.element)];
        let body = self.combiner(op, &scalars, |b, acc, x| Ok(vec![combine(b, acc[0], x[0])?]))?;
        let mut result = ty;
        result.dims[dim] /= size;
        let mut attributes = self.group_attributes(groups, Ids::Devices)?;
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
        let size = self.ensure_groups(op, groups, Ids::Partitions)?;
        let mut ty = x.ty();
        ensure_dims(op, "split_dim", &[split_dim], ty.rank())?;
        ensure_dims(op, "concat_dim", &[concat_dim], ty.rank())?;
        ensure(ty.dims[split_dim].is_multiple_of(size), op, || {
            format!("{ty} dim {split_dim} = {} does not split into {size} parts", ty.dims[split_dim])
        })?;
        ty.dims[split_dim] /= size;
        ty.dims[concat_dim] *= size;
        let mut attributes = self.group_attributes(groups, Ids::Partitions)?;
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
        self.ensure_ids(op, "sources", &sources, across, Ids::Partitions)?;
        self.ensure_ids(op, "targets", &targets, across, Ids::Partitions)?;
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
