//! Ops that move elements and compute nothing.

use super::{
    Builder, Tensor,
    emit::{ensure, ensure_dims, types},
};
use crate::{element::Element, error::Result, shape::TensorType};

impl<'c, 'a> Builder<'c, 'a> {
    /// Puts dimension `i` of `x` at dimension `map[i]` of an array of sizes `dims`; sizes of 1 are repeated, as are
    /// the dimensions that `map` leaves out.
    pub fn broadcast_in_dim(&self, x: Tensor<'c, 'a>, dims: &[usize], map: &[usize]) -> Result<Tensor<'c, 'a>> {
        let op = "broadcast_in_dim";
        let ty = x.ty();
        let result = TensorType::new(ty.element, dims);
        ensure(map.len() == ty.rank(), op, || format!("map {map:?} does not name a dimension for each of {ty}"))?;
        ensure_dims(op, "map", map, dims.len())?;
        for (dim, (&size, &to)) in ty.dims.iter().zip(map).enumerate() {
            ensure(size == 1 || size == dims[to], op, || {
                format!("{ty} dim {dim} = {size} does not broadcast to {result} dim {to} = {}", dims[to])
            })?;
        }
        self.emit(op, &[x], &[("broadcast_dimensions", self.i64_array(map))], result)
    }

    /// Repeats a scalar over `dims`.
    pub fn broadcast_to(&self, scalar: Tensor<'c, 'a>, dims: &[usize]) -> Result<Tensor<'c, 'a>> {
        self.broadcast_in_dim(scalar, dims, &[])
    }

    /// The same elements in row-major order, with sizes `dims`.
    pub fn reshape(&self, x: Tensor<'c, 'a>, dims: &[usize]) -> Result<Tensor<'c, 'a>> {
        let ty = x.ty();
        let result = TensorType::new(ty.element, dims);
        ensure(ty.len() == result.len(), "reshape", || {
            format!("{ty} has {} elements, {result} has {}", ty.len(), result.len())
        })?;
        self.emit("reshape", &[x], &[], result)
    }

    /// Dimension `i` of the result is dimension `permutation[i]` of `x`.
    pub fn transpose(&self, x: Tensor<'c, 'a>, permutation: &[usize]) -> Result<Tensor<'c, 'a>> {
        let op = "transpose";
        let ty = x.ty();
        ensure(permutation.len() == ty.rank(), op, || format!("permutation {permutation:?} does not permute {ty}"))?;
        ensure_dims(op, "permutation", permutation, ty.rank())?;
        let dims: Vec<_> = permutation.iter().map(|&dim| ty.dims[dim]).collect();
        let attributes = [("permutation", self.i64_array(permutation))];
        self.emit(op, &[x], &attributes, TensorType::new(ty.element, &dims))
    }

    /// Elements `start, start + stride, ...` below `limit`, per dimension.
    pub fn slice(
        &self,
        x: Tensor<'c, 'a>,
        start: &[usize],
        limit: &[usize],
        stride: &[usize],
    ) -> Result<Tensor<'c, 'a>> {
        let op = "slice";
        let ty = x.ty();
        for (what, list) in [("start", start), ("limit", limit), ("stride", stride)] {
            ensure(list.len() == ty.rank(), op, || format!("{what} {list:?} needs one entry per dimension of {ty}"))?;
        }
        let mut dims = Vec::with_capacity(ty.rank());
        for dim in 0..ty.rank() {
            let (from, to, by) = (start[dim], limit[dim], stride[dim]);
            ensure(from <= to && to <= ty.dims[dim] && by > 0, op, || {
                format!("dim {dim}: {from} to {to} by {by} is not a part of {ty}")
            })?;
            dims.push((to - from).div_ceil(by));
        }
        let attributes = [
            ("start_indices", self.i64_array(start)),
            ("limit_indices", self.i64_array(limit)),
            ("strides", self.i64_array(stride)),
        ];
        self.emit(op, &[x], &attributes, TensorType::new(ty.element, &dims))
    }

    /// Elements `start..limit` of dimension `dim`, everything of the others.
    pub fn slice_in_dim(&self, x: Tensor<'c, 'a>, start: usize, limit: usize, dim: usize) -> Result<Tensor<'c, 'a>> {
        let ty = x.ty();
        ensure_dims("slice", "dim", &[dim], ty.rank())?;
        let (mut from, mut to) = (vec![0; ty.rank()], ty.dims);
        (from[dim], to[dim]) = (start, limit);
        self.slice(x, &from, &to, &vec![1; to.len()])
    }

    /// Surrounds `x` with the scalar `value`: `low` and `high` elements at the edges (negative ones cut off),
    /// `interior` between neighbours, per dimension.
    pub fn pad(
        &self,
        x: Tensor<'c, 'a>,
        value: Tensor<'c, 'a>,
        low: &[i64],
        high: &[i64],
        interior: &[usize],
    ) -> Result<Tensor<'c, 'a>> {
        let op = "pad";
        let (ty, fill) = (x.ty(), value.ty());
        ensure(fill == TensorType::scalar(ty.element), op, || format!("{ty} cannot be padded with {fill}"))?;
        ensure([low.len(), high.len(), interior.len()] == [ty.rank(); 3], op, || {
            format!("low {low:?}, high {high:?}, interior {interior:?} need one entry per dimension of {ty}")
        })?;
        let mut dims = Vec::with_capacity(ty.rank());
        for dim in 0..ty.rank() {
            let spread = ty.dims[dim] + ty.dims[dim].saturating_sub(1) * interior[dim];
            let size = spread as i64 + low[dim] + high[dim];
            ensure(size >= 0, op, || {
                format!("dim {dim}: low {} and high {} cut more off {ty} than there is", low[dim], high[dim])
            })?;
            dims.push(size as usize);
        }
        let attributes = [
            ("edge_padding_low", self.signed_array(low)),
            ("edge_padding_high", self.signed_array(high)),
            ("interior_padding", self.i64_array(interior)),
        ];
        self.emit(op, &[x, value], &attributes, TensorType::new(ty.element, &dims))
    }

    /// Joins arrays along `dim`.
    pub fn concatenate(&self, parts: &[Tensor<'c, 'a>], dim: usize) -> Result<Tensor<'c, 'a>> {
        let op = "concatenate";
        let all: Vec<_> = parts.iter().map(|part| part.ty()).collect();
        ensure(!all.is_empty(), op, || "needs one operand at least".to_owned())?;
        let mut result = all[0].clone();
        ensure_dims(op, "dim", &[dim], result.rank())?;
        result.dims[dim] = 0;
        for ty in &all {
            let mut rest = ty.clone();
            ensure(rest.rank() == result.rank(), op, || format!("ranks differ: {}", types(&all)))?;
            let size = std::mem::replace(&mut rest.dims[dim], result.dims[dim]);
            ensure(rest == result, op, || format!("operands differ beyond dim {dim}: {}", types(&all)))?;
            result.dims[dim] += size;
        }
        self.emit(op, parts, &[("dimension", self.i64(dim))], result)
    }

    /// Reverses the order of elements along `dims`.
    pub fn reverse(&self, x: Tensor<'c, 'a>, dims: &[usize]) -> Result<Tensor<'c, 'a>> {
        let ty = x.ty();
        ensure_dims("reverse", "dims", dims, ty.rank())?;
        self.emit("reverse", &[x], &[("dimensions", self.i64_array(dims))], ty)
    }

    /// An array whose elements are their index along `dim`.
    pub fn iota(&self, element: Element, dims: &[usize], dim: usize) -> Result<Tensor<'c, 'a>> {
        let ty = TensorType::new(element, dims);
        ensure(element != Element::Pred, "iota", || format!("needs an integer or a float type, got {ty}"))?;
        ensure_dims("iota", "dim", &[dim], ty.rank())?;
        self.emit("iota", &[], &[("iota_dimension", self.i64(dim))], ty)
    }

    /// The part of `x` of `sizes` elements that begins at `starts` (scalars of one integer type), moved where needed
    /// to lie inside `x`.
    pub fn dynamic_slice(
        &self,
        x: Tensor<'c, 'a>,
        starts: &[Tensor<'c, 'a>],
        sizes: &[usize],
    ) -> Result<Tensor<'c, 'a>> {
        let op = "dynamic_slice";
        let ty = x.ty();
        ensure_starts(op, &ty, starts)?;
        let fits = sizes.len() == ty.rank() && sizes.iter().zip(&ty.dims).all(|(size, whole)| size <= whole);
        ensure(fits, op, || format!("sizes {sizes:?} are not a part of {ty}"))?;
        let operands: Vec<_> = std::iter::once(x).chain(starts.iter().copied()).collect();
        let attributes = [("slice_sizes", self.i64_array(sizes))];
        self.emit(op, &operands, &attributes, TensorType::new(ty.element, sizes))
    }

    /// `x` with the part that begins at `starts` replaced by `update`, moved where needed to lie inside `x`.
    pub fn dynamic_update_slice(
        &self,
        x: Tensor<'c, 'a>,
        update: Tensor<'c, 'a>,
        starts: &[Tensor<'c, 'a>],
    ) -> Result<Tensor<'c, 'a>> {
        let op = "dynamic_update_slice";
        let (ty, part) = (x.ty(), update.ty());
        ensure_starts(op, &ty, starts)?;
        let fits = part.element == ty.element
            && part.rank() == ty.rank()
            && part.dims.iter().zip(&ty.dims).all(|(size, whole)| size <= whole);
        ensure(fits, op, || format!("the update {part} is not a part of {ty}"))?;
        let operands: Vec<_> = [x, update].into_iter().chain(starts.iter().copied()).collect();
        self.emit(op, &operands, &[], ty)
    }

    /// `array<i64: ...>` of values that may be negative.
    fn signed_array(&self, values: &[i64]) -> melior::ir::Attribute<'c> {
        melior::ir::attribute::DenseI64ArrayAttribute::new(self.context, values).into()
    }
}

fn ensure_starts(op: &str, ty: &TensorType, starts: &[Tensor]) -> Result<()> {
    let all: Vec<_> = starts.iter().map(|start| start.ty()).collect();
    let fits = all.len() == ty.rank()
        && all.iter().all(|start| start.dims.is_empty() && start.element.is_integer() && *start == all[0]);
    ensure(fits, op, || {
        format!("needs one scalar start of the same integer type per dimension of {ty}, got {}", types(&all))
    })
}
