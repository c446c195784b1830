//! Ops that gather, scatter, reduce, sort and draw random bits.

use super::{
    Builder, Direction, Tensor,
    emit::{Captures, ensure, ensure_dims, list, types},
};
use crate::{element::Element, error::Result, shape::TensorType};

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

/// The window that a [`Builder::reduce_window`] moves, one entry per dimension.
#[derive(Clone, Copy, Debug)]
pub struct Window<'d> {
    /// Elements in the window.
    pub dims: &'d [usize],
    /// Elements between two windows.
    pub strides: &'d [usize],
    /// Initial values before and after the operand.
    pub padding: &'d [(usize, usize)],
}

/// The sizes of the indices without the dimension that holds index vectors, and the length of those vectors.
fn split_indices(op: &str, indices: &TensorType, index_vector_dim: usize) -> Result<(Vec<usize>, usize)> {
    ensure(indices.element.is_integer(), op, || format!("indices {indices} must be integers"))?;
    ensure(index_vector_dim <= indices.rank(), op, || {
        format!("index_vector_dim = {index_vector_dim} is beyond the rank of the indices {indices}")
    })?;
    let mut dims = indices.dims.clone();
    let length = if index_vector_dim < dims.len() { dims.remove(index_vector_dim) } else { 1 };
    Ok((dims, length))
}

/// Checks what gather and scatter share: the map from index vectors to dimensions of the operand, the batching
/// dimensions, and that window dimensions of the operand account for every one.
#[allow(clippy::too_many_arguments)]
fn ensure_indexing(
    op: &str,
    operand: &TensorType,
    indices: &TensorType,
    index_vector_dim: usize,
    map: &[usize],
    skipped: &[usize],
    batching: (&[usize], &[usize]),
    windows: usize,
) -> Result<()> {
    let (_, length) = split_indices(op, indices, index_vector_dim)?;
    ensure(map.len() == length, op, || {
        format!("index vectors of {indices} have {length} entries, {map:?} maps {}", map.len())
    })?;
    ensure_dims(op, &format!("index map and batching dims of {operand}"), &[map, batching.0].concat(), operand.rank())?;
    ensure_dims(op, &format!("window dims left out of {operand}"), &[skipped, batching.0].concat(), operand.rank())?;
    ensure_dims(op, &format!("batching dims of {indices}"), batching.1, indices.rank())?;
    ensure(batching.0.len() == batching.1.len(), op, || {
        format!("batching dims do not pair: operand {:?}, indices {:?}", batching.0, batching.1)
    })?;
    for (&of_operand, &of_indices) in batching.0.iter().zip(batching.1) {
        let (size, other) = (operand.dims[of_operand], indices.dims[of_indices]);
        ensure(of_indices != index_vector_dim && size == other, op, || {
            format!("batching sizes differ: {operand} dim {of_operand} = {size}, {indices} dim {of_indices} = {other}")
        })?;
    }
    let rank = windows + skipped.len() + batching.0.len();
    ensure(rank == operand.rank(), op, || {
        format!(
            "{windows} window, {} left-out and {} batching dims do not make up the {} of {operand}",
            skipped.len(),
            batching.0.len(),
            operand.rank()
        )
    })
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
        let batching = (dims.operand_batching_dims, dims.start_indices_batching_dims);
        ensure_indexing(
            op,
            &ty,
            &index,
            dims.index_vector_dim,
            dims.start_index_map,
            dims.collapsed_slice_dims,
            batching,
            dims.offset_dims.len(),
        )?;
        let fits = slice_sizes.len() == ty.rank() && slice_sizes.iter().zip(&ty.dims).all(|(size, all)| size <= all);
        ensure(fits, op, || format!("slice_sizes {slice_sizes:?} are no part of {ty}"))?;
        let left_out = [dims.collapsed_slice_dims, batching.0].concat();
        for &dim in &left_out {
            ensure(slice_sizes[dim] <= 1, op, || {
                format!("slice_sizes {slice_sizes:?}: dim {dim} is collapsed or batching and must be 1")
            })?;
        }
        let (batch, _) = split_indices(op, &index, dims.index_vector_dim)?;
        let mut batch = batch.into_iter();
        let mut window = (0..ty.rank()).filter(|dim| !left_out.contains(dim)).map(|dim| slice_sizes[dim]);
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
        let batching = (dims.input_batching_dims, dims.scatter_indices_batching_dims);
        ensure_indexing(
            op,
            &ty,
            &index,
            dims.index_vector_dim,
            dims.scatter_dims_to_operand_dims,
            dims.inserted_window_dims,
            batching,
            dims.update_window_dims.len(),
        )?;
        let (batch, _) = split_indices(op, &index, dims.index_vector_dim)?;
        ensure_dims(op, &format!("update_window_dims of {new}"), dims.update_window_dims, new.rank())?;
        ensure(dims.update_window_dims.is_sorted(), op, || {
            format!("update_window_dims {:?} must ascend", dims.update_window_dims)
        })?;
        let left_out = [dims.inserted_window_dims, batching.0].concat();
        let whole: Vec<_> = (0..ty.rank()).filter(|dim| !left_out.contains(dim)).map(|dim| ty.dims[dim]).collect();
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

    /// Reduces `inputs` (of equal dims) over `dims`, starting from the scalars `inits`: `combine(b, acc, x)` gets one
    /// scalar per input each. It must be associative, with `inits` its neutral element: the order is the plugin's.
    pub fn reduce(
        &self,
        inputs: &[Tensor<'c, 'a>],
        inits: &[Tensor<'c, 'a>],
        dims: &[usize],
        combine: impl FnOnce(&Builder<'c, 'a>, &[Tensor<'c, 'a>], &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>>,
    ) -> Result<Vec<Tensor<'c, 'a>>> {
        let op = "reduce";
        let scalars = ensure_reducible(op, inputs, inits)?;
        let all = inputs[0].dims();
        ensure_dims(op, &format!("dims of {}", inputs[0].ty()), dims, all.len())?;
        let body = self.combiner(op, &scalars, combine)?;
        let kept: Vec<usize> = (0..all.len()).filter(|dim| !dims.contains(dim)).map(|dim| all[dim]).collect();
        let results: Vec<_> = scalars.iter().map(|scalar| TensorType::new(scalar.element, &kept)).collect();
        let operands = [inputs, inits].concat();
        self.emit_all(op, &operands, &[("dimensions", self.i64_array(dims))], &results, vec![body])
    }

    /// Reduces every position of a moving window, as [`reduce`](Self::reduce) does.
    pub fn reduce_window(
        &self,
        input: Tensor<'c, 'a>,
        init: Tensor<'c, 'a>,
        window: Window,
        combine: impl FnOnce(&Builder<'c, 'a>, Tensor<'c, 'a>, Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>>,
    ) -> Result<Tensor<'c, 'a>> {
        let op = "reduce_window";
        let ty = input.ty();
        let scalars = ensure_reducible(op, &[input], &[init])?;
        let rank = ty.rank();
        ensure([window.dims.len(), window.strides.len(), window.padding.len()] == [rank; 3], op, || {
            format!("{window:?} needs one entry per dimension of {ty}")
        })?;
        ensure(window.dims.iter().chain(window.strides).all(|&size| size > 0), op, || {
            format!("{window:?} must have positive dims and strides")
        })?;
        let dims: Vec<usize> = (0..rank)
            .map(|dim| {
                let (low, high) = window.padding[dim];
                let padded = ty.dims[dim] + low + high;
                if padded < window.dims[dim] { 0 } else { (padded - window.dims[dim]) / window.strides[dim] + 1 }
            })
            .collect();
        let body = self.combiner(op, &scalars, |b, acc, x| Ok(vec![combine(b, acc[0], x[0])?]))?;
        let padding: Vec<String> = window.padding.iter().map(|(low, high)| format!("[{low}, {high}]")).collect();
        let mut attributes = vec![
            ("window_dimensions", self.i64_array(window.dims)),
            ("window_strides", self.i64_array(window.strides)),
        ];
        if rank > 0 {
            let padding = format!("dense<[{}]> : tensor<{rank}x2xi64>", padding.join(", "));
            attributes.push(("padding", self.parse(&padding)?));
        }
        let result = TensorType::new(ty.element, &dims);
        Ok(self.emit_all(op, &[input, init], &attributes, &[result], vec![body])?[0])
    }

    /// The body of a reduction over values of the types `scalars`.
    pub(super) fn combiner(
        &self,
        op: &'static str,
        scalars: &[TensorType],
        combine: impl FnOnce(&Builder<'c, 'a>, &[Tensor<'c, 'a>], &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>>,
    ) -> Result<super::emit::Body<'c>> {
        let body = self.body(op, Captures::Refused, &[scalars, scalars].concat(), |b, args| {
            let (acc, x) = args.split_at(scalars.len());
            combine(b, acc, x)
        })?;
        ensure(body.results == scalars, op, || {
            format!("the body returns ({}) and must return ({})", types(&body.results), types(scalars))
        })?;
        Ok(body)
    }

    /// The sum over `dims`, in the type of `x`.
    pub fn reduce_sum(&self, x: Tensor<'c, 'a>, dims: &[usize]) -> Result<Tensor<'c, 'a>> {
        let zero = self.scalar(x.element(), 0.0)?;
        Ok(self.reduce(&[x], &[zero], dims, |b, acc, x| Ok(vec![b.add(acc[0], x[0])?]))?[0])
    }

    /// The product over `dims`, in the type of `x`.
    pub fn reduce_product(&self, x: Tensor<'c, 'a>, dims: &[usize]) -> Result<Tensor<'c, 'a>> {
        let one = self.scalar(x.element(), 1.0)?;
        Ok(self.reduce(&[x], &[one], dims, |b, acc, x| Ok(vec![b.multiply(acc[0], x[0])?]))?[0])
    }

    /// The maximum over `dims`; the type's smallest value (negative infinity for floats) over nothing.
    pub fn reduce_max(&self, x: Tensor<'c, 'a>, dims: &[usize]) -> Result<Tensor<'c, 'a>> {
        let least = self.extreme(x.element(), false)?;
        Ok(self.reduce(&[x], &[least], dims, |b, acc, x| Ok(vec![b.maximum(acc[0], x[0])?]))?[0])
    }

    /// The minimum over `dims`; the type's largest value (infinity for floats) over nothing.
    pub fn reduce_min(&self, x: Tensor<'c, 'a>, dims: &[usize]) -> Result<Tensor<'c, 'a>> {
        let most = self.extreme(x.element(), true)?;
        Ok(self.reduce(&[x], &[most], dims, |b, acc, x| Ok(vec![b.minimum(acc[0], x[0])?]))?[0])
    }

    /// Whether all of pred `x` over `dims` hold.
    pub fn reduce_and(&self, x: Tensor<'c, 'a>, dims: &[usize]) -> Result<Tensor<'c, 'a>> {
        ensure(x.element() == Element::Pred, "reduce", || format!("reduce_and needs pred, got {}", x.ty()))?;
        let all = self.scalar(Element::Pred, 1.0)?;
        Ok(self.reduce(&[x], &[all], dims, |b, acc, x| Ok(vec![b.and(acc[0], x[0])?]))?[0])
    }

    /// Whether any of pred `x` over `dims` holds.
    pub fn reduce_or(&self, x: Tensor<'c, 'a>, dims: &[usize]) -> Result<Tensor<'c, 'a>> {
        ensure(x.element() == Element::Pred, "reduce", || format!("reduce_or needs pred, got {}", x.ty()))?;
        let none = self.scalar(Element::Pred, 0.0)?;
        Ok(self.reduce(&[x], &[none], dims, |b, acc, x| Ok(vec![b.or(acc[0], x[0])?]))?[0])
    }

    /// The `i32` index along `dim` of the largest element (the first of equal ones; the first NaN, if there is one),
    /// without that dimension.
    pub fn argmax(&self, x: Tensor<'c, 'a>, dim: usize) -> Result<Tensor<'c, 'a>> {
        let ty = x.ty();
        ensure_dims("reduce", "argmax dim", &[dim], ty.rank())?;
        ensure(ty.dims[dim] > 0, "reduce", || format!("argmax over dim {dim} of {ty}: there is no element"))?;
        let indices = self.iota(Element::I32, &ty.dims, dim)?;
        let inits = [self.extreme(ty.element, false)?, self.scalar(Element::I32, f64::from(i32::MAX))?];
        let results = self.reduce(&[x, indices], &inits, &[dim], |b, acc, x| {
            // A value that differs from itself is a NaN, and beats every number.
            let (best, at, value, here) = (acc[0], acc[1], x[0], x[1]);
            let greater = b.compare(value, Direction::Gt, best)?;
            let nan = b.compare(value, Direction::Ne, value)?;
            let best_is_nan = b.compare(best, Direction::Ne, best)?;
            let wins = b.and(b.or(greater, nan)?, b.not(best_is_nan)?)?;
            let equal = b.or(b.compare(value, Direction::Eq, best)?, b.and(nan, best_is_nan)?)?;
            let earlier = b.and(equal, b.compare(here, Direction::Lt, at)?)?;
            let take = b.or(wins, earlier)?;
            Ok(vec![b.select(take, value, best)?, b.select(take, here, at)?])
        })?;
        Ok(results[1])
    }

    /// The sums of all elements up to each one, along `dim`.
    pub fn cumulative_sum(&self, x: Tensor<'c, 'a>, dim: usize) -> Result<Tensor<'c, 'a>> {
        let ty = x.ty();
        ensure_dims("reduce_window", "cumulative_sum dim", &[dim], ty.rank())?;
        if ty.is_empty() {
            return Ok(x);
        }
        let (mut dims, mut padding) = (vec![1; ty.rank()], vec![(0, 0); ty.rank()]);
        (dims[dim], padding[dim]) = (ty.dims[dim], (ty.dims[dim] - 1, 0));
        let window = Window { dims: &dims, strides: &vec![1; ty.rank()], padding: &padding };
        let zero = self.scalar(ty.element, 0.0)?;
        self.reduce_window(x, zero, window, |b, acc, x| b.add(acc, x))
    }

    /// The largest or smallest value of a type, as a scalar; infinite for floats.
    fn extreme(&self, element: Element, largest: bool) -> Result<Tensor<'c, 'a>> {
        let bits = 8 * element.bytes() as i32;
        let value = match element {
            Element::Pred => f64::from(u8::from(largest)),
            element if element.is_float() => {
                if largest {
                    f64::INFINITY
                } else {
                    f64::NEG_INFINITY
                }
            }
            // 2^64 - 1 and 2^63 - 1 are no f64: hand their bits over.
            Element::I64 if largest => return self.constant(&crate::tensor::HostTensor::scalar(i64::MAX)),
            Element::U64 if largest => return self.constant(&crate::tensor::HostTensor::scalar(u64::MAX)),
            element if element.is_signed() => {
                if largest {
                    2f64.powi(bits - 1) - 1.0
                } else {
                    -(2f64.powi(bits - 1))
                }
            }
            _ => {
                if largest {
                    2f64.powi(bits) - 1.0
                } else {
                    0.0
                }
            }
        };
        self.scalar(element, value)
    }

    /// Sorts `inputs` (of equal dims) together along `dim`: `before(b, pairs)` gets two elements of each input and
    /// returns whether the first ones go before the second ones.
    pub fn sort(
        &self,
        inputs: &[Tensor<'c, 'a>],
        dim: usize,
        stable: bool,
        before: impl FnOnce(&Builder<'c, 'a>, &[(Tensor<'c, 'a>, Tensor<'c, 'a>)]) -> Result<Tensor<'c, 'a>>,
    ) -> Result<Vec<Tensor<'c, 'a>>> {
        let op = "sort";
        let all: Vec<_> = inputs.iter().map(|input| input.ty()).collect();
        ensure(!all.is_empty() && all.iter().all(|ty| ty.dims == all[0].dims), op, || {
            format!("needs operands of equal dims, got {}", types(&all))
        })?;
        ensure_dims(op, "dim", &[dim], all[0].rank())?;
        let arguments: Vec<_> =
            all.iter().flat_map(|ty| [TensorType::scalar(ty.element), TensorType::scalar(ty.element)]).collect();
        let body = self.body(op, Captures::Refused, &arguments, |b, args| {
            let pairs: Vec<_> = args.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
            Ok(vec![before(b, &pairs)?])
        })?;
        ensure(body.results == [TensorType::scalar(Element::Pred)], op, || {
            format!("the comparator returns {} and must return pred[]", types(&body.results))
        })?;
        let attributes = [("dimension", self.i64(dim)), ("is_stable", self.bool(stable))];
        self.emit_all(op, inputs, &attributes, &all, vec![body])
    }

    /// Random bits of an integer type from a `u64[2]` key and counter, by Threefry 2x32 (20 rounds): the new state,
    /// and the bits. Equal states give equal bits.
    pub fn rng_bit_generator(
        &self,
        state: Tensor<'c, 'a>,
        bits: TensorType,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let op = "rng_bit_generator";
        let ty = state.ty();
        ensure(ty == TensorType::new(Element::U64, &[2]), op, || format!("the state is {ty} and must be u64[2]"))?;
        ensure(bits.element.is_integer(), op, || format!("draws integers, not {bits}"))?;
        let attributes = [("rng_algorithm", self.parse("#stablehlo<rng_algorithm THREE_FRY>")?)];
        let results = self.emit_all(op, &[state], &attributes, &[ty, bits], Vec::new())?;
        Ok((results[0], results[1]))
    }
}

/// Checks the operands of a reduction, and returns the type of each accumulator.
fn ensure_reducible(op: &str, inputs: &[Tensor], inits: &[Tensor]) -> Result<Vec<TensorType>> {
    let all: Vec<_> = inputs.iter().map(|input| input.ty()).collect();
    let starts: Vec<_> = inits.iter().map(|init| init.ty()).collect();
    ensure(!all.is_empty() && all.iter().all(|ty| ty.dims == all[0].dims), op, || {
        format!("needs inputs of equal dims, got {}", types(&all))
    })?;
    let scalars: Vec<_> = all.iter().map(|ty| TensorType::scalar(ty.element)).collect();
    ensure(starts == scalars, op, || {
        format!("inputs ({}) start from ({}) and must start from ({})", types(&all), types(&starts), types(&scalars))
    })?;
    Ok(scalars)
}
