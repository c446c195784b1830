//! A step of the online softmax for few rows of each KV head: those of a decode row, or of a band.
//!
//! A product is of one KV head, or of two: then its rows are those of the first head and behind them those of the second, its
//! columns keys of both, and a row sees those of its own head.
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
    /// KV heads of a product: one, or two, of a word ([`Block::two_heads`]).
    pub kv_heads: usize,
    /// How many of the block's keys are worked on.
    pub keys: usize,
    /// How many of them the sequence has, if values behind those may be anything.
    pub live: Option<Value<'a>>,
    /// Whether anybody reads the maxima afterwards.
    pub keeps_maxima: bool,
    /// A product's queries, of the type that products take: `[rows, columns]`.
    pub queries: &'s dyn Fn(usize) -> Value<'a>,
    /// Maximum, sum (`[rows, LANES]` each) and accumulator (`[rows, columns]`) of a product.
    pub state: &'s dyn Fn(usize) -> [Ref<'a>; 3],
    /// Which columns of logits from one on each row sees, `[rows, columns]`; all, if none are named.
    pub seen: &'s dyn Fn(usize, &[usize]) -> Option<Value<'a>>,
}

/// Products that are worked on at a time, where each has so many columns of logits.
pub(in crate::rpa) fn products_at_once(columns: usize) -> usize {
    (LOGITS / columns).max(1)
}

impl<'a> FewRows<'_, 'a> {
    /// Writes the step for the first `count` products of the block.
    pub fn write(&self, count: usize) {
        let products: Vec<usize> = (0..count).collect();
        for products in products.chunks(products_at_once(self.keys * self.kv_heads)) {
            self.update(products);
        }
    }

    fn update(&self, products: &[usize]) {
        let &Self { k, problem, block, live, .. } = self;
        let operand = problem.precision.q;
        let precision = match operand {
            Element::F32 => Precision::Fp32,
            _ => Precision::Default,
        };
        let columns = self.keys * self.kv_heads;
        let parts: Vec<[usize; 2]> =
            (0..columns).step_by(PART).map(|first| [first, PART.min(columns - first)]).collect();
        let queries: Vec<Value<'a>> = products.iter().map(|&product| (self.queries)(product)).collect();
        let rows = queries[0].dims()[0];
        let mut logits: Vec<Vec<Value<'a>>> = vec![vec![]; products.len()];
        let each = |of: &mut dyn FnMut(usize, usize)| {
            (0..parts.len()).for_each(|part| (0..products.len()).for_each(|product| of(product, part)));
        };
        // Of each product's parts, where key and value are made together.
        let mut values: Vec<Vec<Option<Value<'a>>>> = vec![vec![]; products.len()];
        let mut recent = None;
        each(&mut |at, part| {
            let [first, count] = parts[part];
            let dims = [rows, count];
            let both = match self.kv_heads {
                1 => block.both(products[at], parts[part], &mut recent),
                heads => Some(block.two_heads(products[at], parts[part].map(|columns| columns / heads))),
            };
            let key = both.map_or_else(|| block.half(Half::Key, products[at], parts[part], live), |[key, _]| key);
            values[at].push(both.map(|[_, value]| value));
            let product = k.dot_general(queries[at], key, k.zeros(Element::F32, &dims), &DotDims::nt(), precision);
            let scaled = self.heads.logits(product, products[at], problem);
            logits[at].push(match (self.seen)(first, &dims) {
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
        let scaled: Vec<_> = products
            .iter()
            .zip(maxima)
            .map(|(&product, largest)| {
                let [max, ..] = (self.state)(product);
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
        for ((&product, weights), &(_, rescale)) in products.iter().zip(&weights).zip(&scaled) {
            let [_, sum, _] = (self.state)(product);
            sum.store(weights.iter().fold(rescale * sum.load(), |sum, &weights| sum + by_lane(weights)));
        }
        let [columns, _] = block::lanes(problem);
        let mut sums = vec![k.zeros(Element::F32, &[rows, columns]); products.len()];
        each(&mut |at, part| {
            let value = values[at][part].unwrap_or_else(|| block.half(Half::Value, products[at], parts[part], live));
            let weights = weights[at][part].cast(operand);
            sums[at] = k.dot_general(weights, value, sums[at], &DotDims::nn(), precision);
        });
        for ((&product, &sum), &(_, rescale)) in products.iter().zip(&sums).zip(&scaled) {
            let [.., acc] = (self.state)(product);
            acc.store(acc.load() * broadcast_lanes(k, rescale, columns) + sum);
        }
    }
}
