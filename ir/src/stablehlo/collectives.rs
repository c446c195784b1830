//! Ops that exchange arrays between replicas.
//!
//! A program for several devices is replicated, never partitioned: XLA takes a partitioned module to be written for the
//! whole mesh and splits it itself, unless every op carries a `manual` sharding. Replicas run the module as it is.

use melior::ir::Attribute;

use super::{
    Builder, Tensor,
    emit::{ensure, ensure_dims},
};
use crate::{element::Element, error::Result, shape::TensorType};

/// The groups of replicas that take part in one collective together, each in its order: of equal size, and every
/// replica of the module in one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaGroups(pub Vec<Vec<usize>>);

impl ReplicaGroups {
    /// One group of the replicas 0 to `count` - 1.
    pub fn all(count: usize) -> Self {
        Self(vec![(0..count).collect()])
    }
}

impl<'c, 'a> Builder<'c, 'a> {
    /// Checks the groups, and returns their attribute and the size of one.
    fn groups(
        &self,
        op: &str,
        ReplicaGroups(groups): &ReplicaGroups,
    ) -> Result<((&'static str, Attribute<'c>), usize)> {
        let size = groups.first().map_or(0, Vec::len);
        ensure(size > 0 && groups.iter().all(|group| group.len() == size), op, || {
            format!("groups {groups:?} must be of one size, and not empty")
        })?;
        let members = groups.concat();
        self.ensure_replicas(op, "groups", &members)?;
        ensure(members.len() == self.shared.replicas, op, || {
            format!("groups {groups:?} must name each of the module's {} replicas", self.shared.replicas)
        })?;
        let text = format!("dense<{groups:?}> : tensor<{}x{size}xi64>", groups.len());
        Ok((("replica_groups", self.parse(&text)?), size))
    }

    fn ensure_replicas(&self, op: &str, what: &str, ids: &[usize]) -> Result<()> {
        let count = self.shared.replicas;
        for (index, id) in ids.iter().enumerate() {
            ensure(*id < count, op, || {
                format!("{what} name replica {id}, the module has {count}: make it with Module::replicated")
            })?;
            ensure(!ids[..index].contains(id), op, || format!("{what} name replica {id} twice"))?;
        }
        Ok(())
    }

    /// Combines `x` over each group with `combine(b, acc, x)`, element by element; every replica gets the result.
    pub fn all_reduce(
        &self,
        x: Tensor<'c, 'a>,
        groups: &ReplicaGroups,
        combine: impl FnOnce(&Builder<'c, 'a>, Tensor<'c, 'a>, Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>>,
    ) -> Result<Tensor<'c, 'a>> {
        let op = "all_reduce";
        let ty = x.ty();
        let (groups, _) = self.groups(op, groups)?;
        let body = self.scalar_combiner(op, &TensorType::scalar(ty.element), combine)?;
        Ok(self.emit_all(op, &[x], &[groups], &[ty], vec![body])?[0])
    }

    /// The sum of `x` over each group.
    pub fn all_reduce_sum(&self, x: Tensor<'c, 'a>, groups: &ReplicaGroups) -> Result<Tensor<'c, 'a>> {
        self.all_reduce(x, groups, |b, acc, x| b.add(acc, x))
    }

    /// Joins the `x` of each group along `dim`, in the group's order.
    pub fn all_gather(&self, x: Tensor<'c, 'a>, dim: usize, groups: &ReplicaGroups) -> Result<Tensor<'c, 'a>> {
        let op = "all_gather";
        let (groups, size) = self.groups(op, groups)?;
        let mut ty = x.ty();
        ensure_dims(op, "dim", &[dim], ty.rank())?;
        ty.dims[dim] *= size;
        self.emit(op, &[x], &[groups, ("all_gather_dim", self.i64(dim))], ty)
    }

    /// Combines `x` over each group and leaves each replica its part along `dim`.
    pub fn reduce_scatter(
        &self,
        x: Tensor<'c, 'a>,
        dim: usize,
        groups: &ReplicaGroups,
        combine: impl FnOnce(&Builder<'c, 'a>, Tensor<'c, 'a>, Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>>,
    ) -> Result<Tensor<'c, 'a>> {
        let op = "reduce_scatter";
        let (groups, size) = self.groups(op, groups)?;
        let ty = x.ty();
        ensure_dims(op, "dim", &[dim], ty.rank())?;
        ensure(ty.dims[dim].is_multiple_of(size), op, || {
            format!("{ty} dim {dim} = {} does not split into {size} parts", ty.dims[dim])
        })?;
        let body = self.scalar_combiner(op, &TensorType::scalar(ty.element), combine)?;
        let mut result = ty;
        result.dims[dim] /= size;
        Ok(self.emit_all(op, &[x], &[groups, ("scatter_dimension", self.i64(dim))], &[result], vec![body])?[0])
    }

    /// Splits `x` along `split_dim` into one part per replica of its group, and joins what the replica gets from the
    /// others along `concat_dim`, in the group's order.
    pub fn all_to_all(
        &self,
        x: Tensor<'c, 'a>,
        split_dim: usize,
        concat_dim: usize,
        groups: &ReplicaGroups,
    ) -> Result<Tensor<'c, 'a>> {
        let op = "all_to_all";
        let (groups, size) = self.groups(op, groups)?;
        let mut ty = x.ty();
        ensure_dims(op, "split_dim", &[split_dim], ty.rank())?;
        ensure_dims(op, "concat_dim", &[concat_dim], ty.rank())?;
        ensure(ty.dims[split_dim].is_multiple_of(size), op, || {
            format!("{ty} dim {split_dim} = {} does not split into {size} parts", ty.dims[split_dim])
        })?;
        ty.dims[split_dim] /= size;
        ty.dims[concat_dim] *= size;
        let attributes = [
            groups,
            ("split_dimension", self.i64(split_dim)),
            ("concat_dimension", self.i64(concat_dim)),
            ("split_count", self.i64(size)),
        ];
        self.emit(op, &[x], &attributes, ty)
    }

    /// Sends `x` from the first to the second replica of each pair; who receives nothing gets zeros.
    pub fn collective_permute(&self, x: Tensor<'c, 'a>, pairs: &[(usize, usize)]) -> Result<Tensor<'c, 'a>> {
        let op = "collective_permute";
        let (sources, targets): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
        ensure(!pairs.is_empty(), op, || "needs one pair at least".to_owned())?;
        self.ensure_replicas(op, "sources", &sources)?;
        self.ensure_replicas(op, "targets", &targets)?;
        let rows: Vec<[usize; 2]> = pairs.iter().map(|&(source, target)| [source, target]).collect();
        let text = format!("dense<{rows:?}> : tensor<{}x2xi64>", rows.len());
        self.emit(op, &[x], &[("source_target_pairs", self.parse(&text)?)], x.ty())
    }

    /// The number of the replica that runs, `u32[]`.
    pub fn replica_id(&self) -> Result<Tensor<'c, 'a>> {
        self.emit("replica_id", &[], &[], TensorType::scalar(Element::U32))
    }

    /// The number of the partition that runs, `u32[]`: 0, since modules are not partitioned.
    pub fn partition_id(&self) -> Result<Tensor<'c, 'a>> {
        self.emit("partition_id", &[], &[], TensorType::scalar(Element::U32))
    }
}
