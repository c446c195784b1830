//! Ops that combine or order elements with a body of their own, which must not use anything from outside it.

use super::{
    Builder, Direction, Tensor,
    emit::{Body, Captures, ensure, ensure_dims, types},
};
use crate::{element::Element, error::Result, shape::TensorType, tensor::HostTensor};

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

impl<'c, 'a> Builder<'c, 'a> {
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
        let body = self.scalar_combiner(op, &scalars[0], combine)?;
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
    fn combiner(
        &self,
        op: &'static str,
        scalars: &[TensorType],
        combine: impl FnOnce(&Builder<'c, 'a>, &[Tensor<'c, 'a>], &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>>,
    ) -> Result<Body<'c>> {
        let body = self.body(op, Captures::Refused, &[scalars, scalars].concat(), |b, args| {
            let (acc, x) = args.split_at(scalars.len());
            combine(b, acc, x)
        })?;
        ensure(body.results == scalars, op, || {
            format!("the body returns ({}) and must return ({})", types(&body.results), types(scalars))
        })?;
        Ok(body)
    }

    /// The body of a reduction over values of the type `scalar`.
    pub(super) fn scalar_combiner(
        &self,
        op: &'static str,
        scalar: &TensorType,
        combine: impl FnOnce(&Builder<'c, 'a>, Tensor<'c, 'a>, Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>>,
    ) -> Result<Body<'c>> {
        self.combiner(op, std::slice::from_ref(scalar), |b, acc, x| Ok(vec![combine(b, acc[0], x[0])?]))
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
        let least = self.constant(&extreme(x.element(), false))?;
        Ok(self.reduce(&[x], &[least], dims, |b, acc, x| Ok(vec![b.maximum(acc[0], x[0])?]))?[0])
    }

    /// The minimum over `dims`; the type's largest value (infinity for floats) over nothing.
    pub fn reduce_min(&self, x: Tensor<'c, 'a>, dims: &[usize]) -> Result<Tensor<'c, 'a>> {
        let most = self.constant(&extreme(x.element(), true))?;
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
        let inits = [self.constant(&extreme(ty.element, false))?, self.constant(&extreme(Element::I32, true))?];
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

/// The largest or smallest value of a type, as a scalar; infinite for floats that have infinities.
fn extreme(element: Element, largest: bool) -> HostTensor {
    let most = match element {
        Element::Pred => return HostTensor::from_bytes(element, &[], &[u8::from(largest)]),
        Element::F8E4M3Fn => 448.0,
        Element::F8E4M3B11Fnuz => 30.0,
        // Integers saturate.
        _ => f64::INFINITY,
    };
    HostTensor::from_f64(element, &[], &[if largest { most } else { -most }])
}
