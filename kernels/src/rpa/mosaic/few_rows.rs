//! A step of the online softmax for few rows of each KV head: those of a decode row, or of a band.
//!
//! A head has too little work to fill the time that its products and reductions take, so each phase is written for several
//! heads before the next one: the compiler does not move a product or a reduction far from where its result is used, and waits
//! for it there.

use pagoda_ir::{
    Element,
    mosaic::{Builder, DotDims, Precision, Ref, Value, tiling::LANES},
};

use super::{
    MASKED,
    block::{self, Block},
    broadcast_lanes, by_lane,
    heads::Heads,
};
use crate::rpa::{kv_layout::Half, problem::Problem};

/// Keys of a product: a matrix unit's columns on the newest chips.
const PART: usize = 256;
/// Logits of a row that are worked on at a time, all KV heads together.
const LOGITS: usize = 8192;

/// The keys of a block, and the rows that see them.
pub(super) struct FewRows<'s, 'a> {
    pub k: &'a Builder<'a>,
    pub problem: &'s Problem,
    pub heads: &'s Heads<'a>,
    pub block: &'s Block<'a>,
    /// How many of the block's keys are worked on.
    pub keys: usize,
    /// How many of them the sequence has, if values behind those may be anything.
    pub live: Option<Value<'a>>,
    /// Whether anybody reads the maxima afterwards.
    pub keeps_maxima: bool,
    /// A KV head's queries, of the type that products take: `[rows, columns]`.
    pub queries: &'s dyn Fn(usize) -> Value<'a>,
    /// Maximum, sum (`[rows, LANES]` each) and accumulator (`[rows, columns]`) of a KV head.
    pub state: &'s dyn Fn(usize) -> [Ref<'a>; 3],
    /// Which of the keys from one on each row sees, `[rows, keys]`; all, if none are named.
    pub seen: &'s dyn Fn(usize, &[usize]) -> Option<Value<'a>>,
}

/// KV heads that are worked on at a time, where a block has `keys` keys.
pub(in crate::rpa) fn heads_at_once(keys: usize) -> usize {
    (LOGITS / keys).max(1)
}

impl<'a> FewRows<'_, 'a> {
    /// Writes the step for the first `count` KV heads of the block.
    pub fn write(&self, count: usize) {
        let heads: Vec<usize> = (0..count).collect();
        for heads in heads.chunks(heads_at_once(self.keys)) {
            self.update(heads);
        }
    }

    fn update(&self, heads: &[usize]) {
        let &Self { k, problem, block, keys, live, .. } = self;
        let operand = problem.precision.q;
        let precision = match operand {
            Element::F32 => Precision::Fp32,
            _ => Precision::Default,
        };
        let parts: Vec<[usize; 2]> = (0..keys).step_by(PART).map(|first| [first, PART.min(keys - first)]).collect();
        let queries: Vec<Value<'a>> = heads.iter().map(|&head| (self.queries)(head)).collect();
        let rows = queries[0].dims()[0];
        let mut logits: Vec<Vec<Value<'a>>> = vec![vec![]; heads.len()];
        let each = |of: &mut dyn FnMut(usize, usize)| {
            (0..parts.len()).for_each(|part| (0..heads.len()).for_each(|head| of(head, part)));
        };
        // Of each head's parts, where key and value are made together.
        let mut values: Vec<Vec<Option<Value<'a>>>> = vec![vec![]; heads.len()];
        let mut recent = None;
        each(&mut |head, part| {
            let [first, count] = parts[part];
            let dims = [rows, count];
            let both = block.both(heads[head], parts[part], &mut recent);
            let key = both.map_or_else(|| block.half(Half::Key, heads[head], parts[part], live), |[key, _]| key);
            values[head].push(both.map(|[_, value]| value));
            let product = k.dot_general(queries[head], key, k.zeros(Element::F32, &dims), &DotDims::nt(), precision);
            let scaled = self.heads.logits(product, heads[head], problem);
            logits[head].push(match (self.seen)(first, &dims) {
                None => scaled,
                Some(seen) => seen.select(scaled, MASKED),
            });
        });
        let maxima: Vec<Value<'a>> = logits
            .iter()
            .map(|parts| {
                let all: Vec<Value<'a>> = parts
                    .iter()
                    .flat_map(|part| {
                        let keys = part.dims()[1];
                        (0..keys)
                            .step_by(LANES)
                            .map(move |lane| part.slice(&[0, lane], &[rows, LANES.min(keys - lane)]))
                    })
                    .collect();
                let widest = all[0].dims()[1];
                let (same, odd): (Vec<_>, Vec<_>) = all.into_iter().partition(|tile| tile.dims()[1] == widest);
                let max = same.into_iter().reduce(|max, tile| max.maximum(tile)).expect("some keys").max(1);
                odd.into_iter().fold(max, |max, tile| max.maximum(tile.max(1)))
            })
            .collect();
        let scaled: Vec<_> = heads
            .iter()
            .zip(maxima)
            .map(|(&head, largest)| {
                let [max, ..] = (self.state)(head);
                let old = max.load();
                let new = old.maximum(largest);
                if self.keeps_maxima {
                    max.store(new);
                }
                (new, (old - new).exp2())
            })
            .collect();
        let weights: Vec<Vec<Value<'a>>> = logits
            .iter()
            .zip(&scaled)
            .map(|(parts, &(new, _))| {
                parts.iter().map(|&part| (part - broadcast_lanes(k, new, part.dims()[1])).exp2()).collect()
            })
            .collect();
        for ((&head, weights), &(_, rescale)) in heads.iter().zip(&weights).zip(&scaled) {
            let [_, sum, _] = (self.state)(head);
            sum.store(weights.iter().fold(rescale * sum.load(), |sum, &weights| sum + by_lane(weights)));
        }
        let [columns, _] = block::lanes(problem);
        let mut products = vec![k.zeros(Element::F32, &[rows, columns]); heads.len()];
        each(&mut |head, part| {
            let value = values[head][part].unwrap_or_else(|| block.half(Half::Value, heads[head], parts[part], live));
            let weights = weights[head][part].cast(operand);
            products[head] = k.dot_general(weights, value, products[head], &DotDims::nn(), precision);
        });
        for ((&head, &product), &(_, rescale)) in heads.iter().zip(&products).zip(&scaled) {
            let [.., acc] = (self.state)(head);
            acc.store(acc.load() * broadcast_lanes(k, rescale, columns) + product);
        }
    }
}
