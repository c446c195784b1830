//! Ops that read or write an array at places that other arrays name.

use super::{
    Builder, Tensor,
    emit::{Captures, ensure, ensure_dims, list},
};
use crate::{error::Result, shape::TensorType};

/// How a [`Builder::gather`] reads its operand (StableHLO's names).
#[derive(Clone, Copy, Debug, Default)]
pub struct GatherDims<'d> {
    /// Dimensions of the result that run over a slice.
    pub offset_dims: &'d [usize],
    /// Dimensions of the operand of which a slice holds one element and the result none.
    pub collapsed_slice_dims: &'d [usize],
    /// Dimensions of the operand that go along with `start_indices_batching_dims`.
    pub operand_batching_dims: &'d [usize],
    /// Dimensions of the indices that go along with `operand_batching_dims`.
    pub start_indices_batching_dims: &'d [usize],
    /// Entry `i` of an index vector is the start along this dimension of the operand.
    pub start_index_map: &'d [usize],
    /// The dimension of the indices that holds index vectors; its rank when every index is a scalar.
    pub index_vector_dim: usize,
    /// The caller promises that the indices are sorted.
    pub indices_are_sorted: bool,
}

/// How a [`Builder::scatter`] writes its operand (StableHLO's names).
#[derive(Clone, Copy, Debug, Default)]
pub struct ScatterDims<'d> {
    /// Dimensions of the updates that run over a window.
    pub update_window_dims: &'d [usize],
    /// Dimensions of the operand of which a window holds one element and the updates none.
    pub inserted_window_dims: &'d [usize],
    /// Dimensions of the operand that go along with `scatter_indices_batching_dims`.
    pub input_batching_dims: &'d [usize],
    /// Dimensions of the indices that go along with `input_batching_dims`.
    pub scatter_indices_batching_dims: &'d [usize],
    /// Entry `i` of an index vector is the start along this dimension of the operand.
    pub scatter_dims_to_operand_dims: &'d [usize],
    /// The dimension of the indices that holds index vectors; its rank when every index is a scalar.
    pub index_vector_dim: usize,
    /// The caller promises that the indices are sorted.
    pub indices_are_sorted: bool,
    /// The caller promises that no element is written twice.
    pub unique_indices: bool,
}

/// What gather and scatter share, in terms of the operand.
struct Indexing<'d> {
    op: &'static str,
    /// Dimensions that have no dimension in a window.
    left_out: &'d [usize],
    batching: &'d [usize],
    indices_batching: &'d [usize],
    /// The dimension that each entry of an index vector is a start along.
    map: &'d [usize],
    index_vector_dim: usize,
    /// The number of dimensions of a window.
    window_rank: usize,
}

impl Indexing<'_> {
    /// Checks the dimensions' numbers against each other and the operands, and returns the sizes of the indices
    /// without the dimension that holds index vectors.
    fn check(&self, operand: &TensorType, indices: &TensorType) -> Result<Vec<usize>> {
        let op = self.op;
        ensure(indices.element.is_integer(), op, || format!("indices {indices} must be integers"))?;
        ensure(self.index_vector_dim <= indices.rank(), op, || {
            format!("index_vector_dim = {} is beyond the rank of the indices {indices}", self.index_vector_dim)
        })?;
        let mut batch = indices.dims.clone();
        let length = if self.index_vector_dim < batch.len() { batch.remove(self.index_vector_dim) } else { 1 };
        ensure(self.map.len() == length, op, || {
            format!("index vectors of {indices} have {length} entries, {:?} maps {}", self.map, self.map.len())
        })?;
        let rank = operand.rank();
        ensure_dims(
            op,
            &format!("index map and batching dims of {operand}"),
            &[self.map, self.batching].concat(),
            rank,
        )?;
        ensure_dims(op, &format!("dims of {operand} without a window"), &self.without_window(), rank)?;
        ensure(self.left_out.is_sorted() && self.batching.is_sorted(), op, || {
            format!("dims without a window {:?} and batching dims {:?} must ascend", self.left_out, self.batching)
        })?;
        ensure_dims(op, &format!("batching dims of {indices}"), self.indices_batching, indices.rank())?;
        ensure(self.batching.len() == self.indices_batching.len(), op, || {
            format!("batching dims do not pair: operand {:?}, indices {:?}", self.batching, self.indices_batching)
        })?;
        for (&dim, &other) in self.batching.iter().zip(self.indices_batching) {
            let fits = other != self.index_vector_dim && operand.dims[dim] == indices.dims[other];
            ensure(fits, op, || format!("batching dims differ: {operand} dim {dim}, {indices} dim {other}"))?;
        }
        ensure(self.window_rank + self.without_window().len() == rank, op, || {
            let without = self.without_window();
            format!("{} window dims and dims {without:?} without one do not make up {operand}", self.window_rank)
        })?;
        Ok(batch)
    }

    fn without_window(&self) -> Vec<usize> {
        [self.left_out, self.batching].concat()
    }

    /// Of `sizes`, one per dimension of the operand, those of a window.
    fn window(&self, sizes: &[usize]) -> Vec<usize> {
        let without = self.without_window();
        (0..sizes.len()).filter(|dim| !without.contains(dim)).map(|dim| sizes[dim]).collect()
    }
}

impl<'c, 'a> Builder<'c, 'a> {
    /// Reads slices of sizes `slice_sizes` from `operand`, one per index vector, moved where needed to lie inside.
    pub fn gather(
        &self,
        operand: Tensor<'c, 'a>,
        indices: Tensor<'c, 'a>,
        dims: GatherDims,
        slice_sizes: &[usize],
    ) -> Result<Tensor<'c, 'a>> {
        let op = "gather";
        let (ty, index) = (operand.ty(), indices.ty());
        let indexing = Indexing {
            op,
            left_out: dims.collapsed_slice_dims,
            batching: dims.operand_batching_dims,
            indices_batching: dims.start_indices_batching_dims,
            map: dims.start_index_map,
            index_vector_dim: dims.index_vector_dim,
            window_rank: dims.offset_dims.len(),
        };
        let batch = indexing.check(&ty, &index)?;
        let fits = slice_sizes.len() == ty.rank() && slice_sizes.iter().zip(&ty.dims).all(|(size, all)| size <= all);
        ensure(fits, op, || format!("slice_sizes {slice_sizes:?} are not a part of {ty}"))?;
        for dim in indexing.without_window() {
            ensure(slice_sizes[dim] <= 1, op, || {
                format!("slice_sizes {slice_sizes:?}: dim {dim} is collapsed or batching and must be 1")
            })?;
        }
        let mut batch = batch.into_iter();
        let mut window = indexing.window(slice_sizes).into_iter();
        let rank = batch.len() + dims.offset_dims.len();
        ensure_dims(op, "offset_dims", dims.offset_dims, rank)?;
        ensure(dims.offset_dims.is_sorted(), op, || format!("offset_dims {:?} must ascend", dims.offset_dims))?;
        let result: Vec<usize> = (0..rank)
            .filter_map(|dim| if dims.offset_dims.contains(&dim) { window.next() } else { batch.next() })
            .collect();
        let numbers = format!(
            "#stablehlo.gather<offset_dims = {}, collapsed_slice_dims = {}, operand_batching_dims = {}, \
             start_indices_batching_dims = {}, start_index_map = {}, index_vector_dim = {}>",
            list(dims.offset_dims),
            list(dims.collapsed_slice_dims),
            list(dims.operand_batching_dims),
            list(dims.start_indices_batching_dims),
            list(dims.start_index_map),
            dims.index_vector_dim
        );
        let attributes = [
            ("dimension_numbers", self.parse(&numbers)?),
            ("slice_sizes", self.i64_array(slice_sizes)),
            ("indices_are_sorted", self.bool(dims.indices_are_sorted)),
        ];
        self.emit(op, &[operand, indices], &attributes, TensorType::new(ty.element, &result))
    }

    /// Entries `ids` (any rank) of `table` along dimension `axis`, which the dimensions of `ids` replace: rows of an
    /// embedding table for axis 0. Ids out of range read the nearest entry.
    pub fn take(&self, table: Tensor<'c, 'a>, ids: Tensor<'c, 'a>, axis: usize) -> Result<Tensor<'c, 'a>> {
        let (ty, index) = (table.ty(), ids.ty());
        ensure_dims("gather", "axis", &[axis], ty.rank())?;
        let offsets: Vec<usize> =
            (0..ty.rank() - 1).map(|dim| if dim < axis { dim } else { dim + index.rank() }).collect();
        let mut sizes = ty.dims;
        ensure(sizes[axis] > 0, "gather", || format!("nothing can be taken from dim {axis} = 0"))?;
        sizes[axis] = 1;
        let dims = GatherDims {
            offset_dims: &offsets,
            collapsed_slice_dims: &[axis],
            start_index_map: &[axis],
            index_vector_dim: index.rank(),
            ..GatherDims::default()
        };
        self.gather(table, ids, dims, &sizes)
    }

    /// Part `index` (`i32[]`) of `stack` along its first dimension, which the result has no more. An index out of range
    /// reads the nearest part.
    pub fn part(&self, stack: Tensor<'c, 'a>, index: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let dims = stack.dims();
        ensure(!dims.is_empty(), "dynamic_slice", || format!("a part of {}, which has no dimension", stack.ty()))?;
        let zero = self.scalar(index.element(), 0.0)?;
        let starts: Vec<_> = std::iter::once(index).chain(dims[1..].iter().map(|_| zero)).collect();
        let sizes: Vec<_> = std::iter::once(1).chain(dims[1..].iter().copied()).collect();
        self.reshape(self.dynamic_slice(stack, &starts, &sizes)?, &dims[1..])
    }

    /// `operand` with windows of `updates` merged in, one per index vector: `update(b, old, new)` says what an element
    /// becomes. Windows that do not lie inside the operand are skipped.
    pub fn scatter(
        &self,
        operand: Tensor<'c, 'a>,
        indices: Tensor<'c, 'a>,
        updates: Tensor<'c, 'a>,
        dims: ScatterDims,
        update: impl FnOnce(&Builder<'c, 'a>, Tensor<'c, 'a>, Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>>,
    ) -> Result<Tensor<'c, 'a>> {
        let op = "scatter";
        let (ty, index, new) = (operand.ty(), indices.ty(), updates.ty());
        let indexing = Indexing {
            op,
            left_out: dims.inserted_window_dims,
            batching: dims.input_batching_dims,
            indices_batching: dims.scatter_indices_batching_dims,
            map: dims.scatter_dims_to_operand_dims,
            index_vector_dim: dims.index_vector_dim,
            window_rank: dims.update_window_dims.len(),
        };
        let batch = indexing.check(&ty, &index)?;
        ensure_dims(op, &format!("update_window_dims of {new}"), dims.update_window_dims, new.rank())?;
        ensure(dims.update_window_dims.is_sorted(), op, || {
            format!("update_window_dims {:?} must ascend", dims.update_window_dims)
        })?;
        let whole = indexing.window(&ty.dims);
        let fits = new.element == ty.element
            && dims.update_window_dims.iter().zip(&whole).all(|(&dim, &size)| new.dims[dim] <= size)
            && (0..new.rank()).filter(|dim| !dims.update_window_dims.contains(dim)).map(|dim| new.dims[dim]).eq(batch);
        ensure(fits, op, || {
            format!(
                "updates {new} with update_window_dims {:?} fit neither {ty} nor the indices {index}",
                dims.update_window_dims
            )
        })?;
        let scalar = TensorType::scalar(ty.element);
        let arguments = [scalar.clone(), scalar.clone()];
        let body = self.body(op, Captures::Refused, &arguments, |b, args| Ok(vec![update(b, args[0], args[1])?]))?;
        ensure(body.results[0] == scalar, op, || {
            format!("the body returns {} and must return {scalar}", body.results[0])
        })?;
        let numbers = format!(
            "#stablehlo.scatter<update_window_dims = {}, inserted_window_dims = {}, input_batching_dims = {}, \
             scatter_indices_batching_dims = {}, scatter_dims_to_operand_dims = {}, index_vector_dim = {}>",
            list(dims.update_window_dims),
            list(dims.inserted_window_dims),
            list(dims.input_batching_dims),
            list(dims.scatter_indices_batching_dims),
            list(dims.scatter_dims_to_operand_dims),
            dims.index_vector_dim
        );
        let attributes = [
            ("scatter_dimension_numbers", self.parse(&numbers)?),
            ("indices_are_sorted", self.bool(dims.indices_are_sorted)),
            ("unique_indices", self.bool(dims.unique_indices)),
        ];
        Ok(self.emit_all(op, &[operand, indices, updates], &attributes, &[ty], vec![body])?[0])
    }
}
