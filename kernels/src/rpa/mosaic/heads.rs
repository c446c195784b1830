//! What each head has of its own, and what it does to logits and to finished sums: the scales of a cache of 8 bits, and sinks.
//!
//! A scale of keys multiplies the logits, with the problem's own scale, and one of values the finished sums: a multiplication
//! that is there anyway, and one per row. A sink joins when all keys are seen, so that no step knows of it.

use std::f64::consts::{LN_2, LOG2_E};

use pagoda_ir::{
    Element,
    mosaic::{Builder, Ref, Value, tiling::LANES},
};

use super::broadcast_lanes;
use crate::{
    kernel::Operand,
    rpa::{kv_layout::Half, problem::Problem},
};

/// The names of the arrays, in the order of the operands.
fn names(problem: &Problem) -> impl Iterator<Item = &'static str> {
    let scaled = problem.precision.is_scaled();
    [("sinks", problem.sinks), ("k_scale", scaled), ("v_scale", scaled)]
        .into_iter()
        .filter_map(|(name, there)| there.then_some(name))
}

/// The prefetched operands: an f32 per head each.
pub(in crate::rpa) fn operands(problem: &Problem) -> impl Iterator<Item = Operand> {
    names(problem).map(Operand::of)
}

/// The numbers of the heads, in SMEM. Where a product has the rows of several KV heads, it is counted as one.
pub(super) struct Heads<'a> {
    k: &'a Builder<'a>,
    sinks: Option<Ref<'a>>,
    scales: Option<[Ref<'a>; 2]>,
    /// What the core's KV heads are counted from.
    first: Option<Value<'a>>,
    /// KV heads of the core.
    count: usize,
    /// KV heads whose rows stand in one product, one head's behind the other's.
    per_product: usize,
    /// What logits and finished sums are to be multiplied by beside: [`super::block::scale`].
    of_block: f64,
    group: usize,
    /// Whether the log-sum-exp is a result.
    log_sum_exp: bool,
}

/// What the sums of some rows come to when all keys are seen.
pub(super) struct Total<'a> {
    /// The softmax's sum: `[rows, 1]` or `[rows, LANES]`, equal lanes.
    pub sum: Value<'a>,
    /// What the accumulator is to be multiplied by before it is divided by the sum, if by anything: a scalar, or as `sum`.
    pub factor: Option<Value<'a>>,
    /// The log-sum-exp, if it is asked for; 0 of rows that saw no key: `[rows, LANES]`, equal lanes.
    pub log_sum_exp: Option<Value<'a>>,
}

impl<'a> Heads<'a> {
    /// Declares the arrays that the problem has, behind the other prefetched ones.
    pub fn declare(k: &'a Builder<'a>, problem: &Problem) -> Self {
        let (q_heads, kv_heads) = (problem.q_heads, problem.kv_heads);
        let floats = |name, heads| k.prefetch(name, Element::F32, &[heads]);
        let sinks = problem.sinks.then(|| floats("sinks", q_heads));
        let scales = ["k_scale", "v_scale"];
        let scales = problem.precision.is_scaled().then(|| scales.map(|name| floats(name, kv_heads)));
        Self {
            k,
            sinks,
            scales,
            first: None,
            count: kv_heads,
            per_product: 1,
            of_block: 1.0,
            group: problem.group(),
            log_sum_exp: problem.log_sum_exp,
        }
    }

    /// Of a core whose `count` heads begin at KV head `first`.
    #[must_use]
    pub fn from(self, first: Value<'a>, count: usize) -> Self {
        Self { first: Some(first), count, ..self }
    }

    /// With products of `count` KV heads each, of keys and values that are to be multiplied by `scale`, where the cache has
    /// scales.
    #[must_use]
    pub fn in_products(self, count: usize, scale: f64) -> Self {
        Self { per_product: count, of_block: scale, ..self }
    }

    fn scale(&self, half: usize, head: usize) -> Option<Value<'a>> {
        let scales = &self.scales.as_ref()?[half];
        Some(match self.first {
            None => scales.at(head).load(),
            Some(first) => scales.at(first + head).load(),
        })
    }

    /// Of a product of so many rows: a scalar, or of each row in equal lanes, `[rows, LANES]`.
    fn scale_of_rows(&self, half: usize, product: usize, rows: usize) -> Option<Value<'a>> {
        let heads = product * self.per_product..((product + 1) * self.per_product).min(self.count);
        let whole = |scale: Value<'a>| if self.of_block == 1.0 { scale } else { scale * self.of_block };
        let scales = heads.map(|head| self.scale(half, head).map(whole)).collect::<Option<Vec<_>>>()?;
        let (last, others) = scales.split_last()?;
        let scales = others.iter().enumerate().rev();
        Some(scales.fold(*last, |behind, (at, &scale)| {
            self.k.iota(&[rows, LANES], 0).less((at + 1) * self.group).select(scale, behind)
        }))
    }

    /// A KV head's numbers, tiles of f32 of `half`, as the cache holds them: divided by its scale.
    pub fn stored(&self, half: Half, head: usize, numbers: Vec<Value<'a>>) -> Vec<Value<'a>> {
        match self.scale(half as usize, head) {
            None => numbers,
            Some(scale) => numbers.into_iter().map(|tile| tile / scale).collect(),
        }
    }

    /// The sink of a query head, as a power of two.
    pub fn sink(&self, head: usize) -> Option<Value<'a>> {
        let sinks = self.sinks.as_ref()?;
        let sink = match self.first {
            None => sinks.at(head).load(),
            Some(first) => sinks.at(first * self.group + head).load(),
        };
        Some(sink * LOG2_E)
    }

    /// A product of queries and keys as logits: powers of two, scaled and capped.
    pub fn logits(&self, product: Value<'a>, of: usize, problem: &Problem) -> Value<'a> {
        let &[rows, keys] = &product.dims()[..] else { unreachable!("a row for each query") };
        let by = |number: f64| match self.scale_of_rows(0, of, rows) {
            None => product * number,
            Some(scale) if scale.dims().is_empty() => product * (scale * number),
            Some(scale) => product * broadcast_lanes(self.k, scale * number, keys),
        };
        match problem.soft_cap {
            None => by(problem.scale * LOG2_E),
            Some(cap) => by(problem.scale / cap).tanh() * (cap * LOG2_E),
        }
    }

    /// What `max` (`[rows, LANES]`, equal lanes) and `sum` (one per row and lane) of a product's rows come to, with a sink per
    /// row (a scalar, or as `max`).
    pub fn total(&self, product: usize, max: &Ref<'a>, sum: Value<'a>, sink: Option<Value<'a>>) -> Total<'a> {
        let (of_keys, scale) = (sum.sum(1), self.scale_of_rows(1, product, max.dims()[0]));
        let (top, sum, factor) = match sink {
            None => (None, of_keys, scale),
            Some(sink) => {
                let max = max.load();
                let top = max.maximum(sink);
                let kept = (max - top).exp2();
                let factor = scale.map_or(kept, |scale| kept * scale);
                (Some(top), kept * of_keys + (sink - top).exp2(), Some(factor))
            }
        };
        let log_sum_exp = self.log_sum_exp.then(|| {
            let all = top.unwrap_or_else(|| max.load()) * LN_2 + sum.log();
            of_keys.broadcast_to(&all.dims()).greater(0.0).select(all, 0.0)
        });
        Total { sum, factor, log_sum_exp }
    }
}
