//! Ragged paged attention as a Mosaic kernel.
//!
//! Grid: blocks of KV heads (`parallel`) by blocks of query rows. A step goes through the sequences that have rows in its
//! block, and through the KV blocks that those rows see; pages come in by DMAs of the kernel's own, double-buffered, as
//! many as the sequence has. Where the rows see no more than a half or a quarter of a block, no more is worked on
//! ([`Plan::widths`]). Rows of other sequences are masked: they add nothing to their running sums.
//!
//! Online softmax (Milakov and Gimelshein, 2018) with maximum, sum and accumulator in f32, and powers of two: logits are
//! scaled by `log2 e`, so that the hardware's `2^x` needs nothing before it. The query heads of a group are one matrix
//! product with their KV head; its rows are ordered by head, then by query, so that a head's queries come in by one
//! strided load and need no relayout. In bf16 a 32-bit word of a page holds an element of K (low half) and of V (high
//! half) of the same head, so one strided load brings both.
//!
//! Poison: logits are selected by position *after* the product; values behind a sequence's end are overwritten with zeros
//! *before* it (zero times NaN is NaN). Rows that belong to no sequence are written as zeros.

use std::f64::consts::LOG2_E;

use pagoda_ir::{
    Element,
    mosaic::{Builder, Dma, DotDims, MemorySpace, Precision, Ref, Semantics, Value, Window, tiling::LANES},
};

use super::{MASKED, Metadata, NONE, Strided, broadcast_lanes, by_lane, joined};
use crate::rpa::{
    batch::Batch,
    kv_layout::{Block, KvLayout},
    plan::{CHUNK, Plan},
};

/// Query rows that are worked on where a sequence has no more in a block, as in decode: the rows of a tile of bf16 on the
/// newest chips.
const DECODE_ROWS: usize = 16;

pub(super) struct Body<'a, 'p> {
    k: &'a Builder<'a>,
    plan: &'p Plan,
    head_step: Value<'a>,
    query_step: Value<'a>,
    metadata: Metadata<'a, 'p>,
    q: Ref<'a>,
    kv_pages: Ref<'a>,
    out: Ref<'a>,
    /// Two KV blocks: `[2, pieces of a row, keys, rows of a key, lanes]`.
    kv: Ref<'a>,
    /// The block's queries by head.
    queries: Ref<'a>,
    /// A block of q or of the output as f32: strided loads are of 32-bit words. `[pieces of a row, queries, heads,
    /// lanes]`.
    staging: Ref<'a>,
    /// Of the sequence at work, the last key that each row sees; -1 for rows of other sequences.
    last: Ref<'a>,
    max: Ref<'a>,
    /// A sum per row and lane.
    sum: Ref<'a>,
    acc: Ref<'a>,
    arrived: Ref<'a>,
}

/// The rows of one sequence in a block.
#[derive(Clone, Copy)]
struct Rows<'a> {
    sequence: Value<'a>,
    kv_len: Value<'a>,
    /// First and one past the last row, counted in the block.
    first: Value<'a>,
    end: Value<'a>,
    /// Position of the block's row 0, if it belonged to the sequence.
    origin: Value<'a>,
}

impl<'a, 'p> Body<'a, 'p> {
    pub fn declare(k: &'a Builder<'a>, plan: &'p Plan, batch: Option<&'p Batch>) -> Self {
        let problem = plan.problem();
        let (types, dim, heads) = (problem.precision, problem.head_dim, plan.head_block());
        let [head_steps, query_steps] = plan.steps_of_grid();
        let [head_step, query_step] = k.grid([(head_steps, Semantics::Parallel), (query_steps, Semantics::Arbitrary)]);
        let metadata = Metadata::declare(k, problem, batch);
        let block = [plan.tiles().queries, heads * problem.group(), dim];
        let window = || {
            let window = Window::blocks(&block, |t| (t.grid(1), t.grid(0), 0));
            // Blocks of heads are one to a core: without several query blocks, no core moves its window.
            if query_steps > 1 { window } else { window.single_buffered() }
        };
        let q = k.input("q", types.q, &problem.q_type().dims, window());
        let kv_pages = k.hbm_input("kv_pages", types.kv, &problem.kv_pages_type().dims);
        let out = k.output("out", types.output, &problem.output_type().dims, window());
        let scratch = |name, element, dims: &[usize]| k.scratch(name, MemorySpace::Vmem, element, dims);
        let rows = plan.rows();
        let kv = scratch("kv", types.kv, &plan.kv_dims());
        let queries = scratch("queries", types.q, &[heads, rows, dim]);
        let staging = scratch("staging", Element::F32, &plan.staging_dims());
        let last = scratch("last", Element::I32, &[rows, LANES]);
        let max = scratch("max", Element::F32, &[heads, rows, LANES]);
        let sum = scratch("sum", Element::F32, &[heads, rows, LANES]);
        let acc = scratch("acc", Element::F32, &[heads, rows, dim]);
        let arrived = k.dma_semaphores("arrived", &[2]);
        Self {
            k,
            plan,
            head_step,
            query_step,
            metadata,
            q,
            kv_pages,
            out,
            kv,
            queries,
            staging,
            last,
            max,
            sum,
            acc,
            arrived,
        }
    }

    pub fn write(&self) {
        let (k, block) = (self.k, self.plan.tiles().queries);
        let block_start = self.query_step * block;
        let num_seqs = self.metadata.sequences();
        let live = block_start.less(self.metadata.first_row(num_seqs));
        k.for_range(0, num_seqs, |sequence| {
            let start = self.metadata.first_row(sequence);
            let stop = self.metadata.first_row(sequence + 1);
            let first = (start - block_start).maximum(0);
            let end = (stop - block_start).minimum(block);
            k.when(first.less(end), || {
                let kv_len = self.metadata.kv_len(sequence);
                let origin = kv_len - stop + block_start;
                self.attend(Rows { sequence, kv_len, first, end, origin });
            });
        });
        k.if_else(live, || self.finish(), || self.out.store(0.0));
    }

    /// The queries of the `member`th query head of a KV head, in [`Body::staging`]: `[queries, head_dim]`.
    fn staged(&self, head: usize, member: usize) -> Strided<'a> {
        let [pieces, queries, heads, lanes] = self.plan.staging_dims();
        let piece = |piece| self.staging.at(piece).reshape(&[queries * heads, lanes]);
        let (start, count) = (head * self.plan.problem().group() + member, queries);
        Strided { pieces: (0..pieces).map(piece).collect(), start, count, stride: heads }
    }

    /// The pieces of a block of q or of the output: `[queries, heads, lanes]` each, and the lane that each begins at.
    fn staging_pieces(&self) -> impl Iterator<Item = (usize, Ref<'a>)> {
        let heads = self.plan.head_block() * self.plan.problem().group();
        let [pieces, _, _, lanes] = self.plan.staging_dims();
        (0..pieces).map(move |piece| (piece * lanes, self.staging.at(piece).slice(1, 0, heads)))
    }

    /// Queries by head; nothing seen yet.
    fn begin(&self) {
        let queries = self.plan.tiles().queries;
        for (lane, piece) in self.staging_pieces() {
            piece.store(self.q.slice(2, lane, piece.dims()[2]).load().cast(Element::F32));
        }
        for head in 0..self.plan.head_block() {
            for member in 0..self.plan.problem().group() {
                let staged = self.staged(head, member).load(self.k).cast(self.plan.problem().precision.q);
                self.queries.at(head).slice(0, member * queries, queries).store(staged);
            }
        }
        self.max.store(NONE);
        self.sum.store(0.0);
        self.acc.store(0.0);
    }

    /// Divides, and stores the block. Rows that saw no key are zeros.
    fn finish(&self) {
        let (problem, queries) = (self.plan.problem(), self.plan.tiles().queries);
        for head in 0..self.plan.head_block() {
            for member in 0..problem.group() {
                let [sum, acc] =
                    [&self.sum, &self.acc].map(|of| of.at(head).slice(0, member * queries, queries).load());
                let sum = sum.sum(1);
                self.staged(head, member).store(sum.greater(0.0).select(acc / sum, 0.0));
            }
        }
        for (lane, piece) in self.staging_pieces() {
            self.out.slice(2, lane, piece.dims()[2]).store(piece.load().cast(problem.precision.output));
        }
    }

    /// Lets the rows of one sequence see their keys.
    fn attend(&self, rows: Rows<'a>) {
        let (k, keys, queries) = (self.k, self.plan.keys(), self.plan.tiles().queries);
        let end = (rows.origin + rows.end).div_ceil(keys);
        let begin = match self.plan.problem().sliding_window {
            None => k.int(0),
            Some(window) => (rows.origin + rows.first - (window as i64 - 1)).maximum(0) / keys,
        };
        self.pages(&rows, begin, k.int(0), |dma| dma.start());
        // The sequence that holds the block's first row is its first one; its keys are on their way.
        k.when(rows.first.equals(0), || self.begin());
        self.limit(&rows);
        let blocks = |parts: &[Part<'a>], widths: &[usize]| {
            k.for_range(begin, end, |block| {
                let slot = (block - begin) % 2;
                k.when((block + 1).less(end), || self.pages(&rows, block + 1, 1 - slot, |dma| dma.start()));
                self.pages(&rows, block, slot, |dma| dma.wait());
                let (first_key, kv) = (block * keys, Block::new(&self.kv.at(slot), self.plan.problem().precision.kv));
                let of = |keys: usize| {
                    let live = rows.kv_len - first_key;
                    k.when(live.less(keys), || kv.clear(k, live, keys));
                    for head in 0..self.plan.head_block() {
                        let [key, value] = self.keys_and_values(head, &kv, keys);
                        for part in parts {
                            self.update(head, part, key, value, first_key);
                        }
                    }
                };
                let seen = rows.origin + rows.end - first_key;
                self.narrowest(widths, seen, &of);
            });
        };
        let widths = self.plan.widths();
        let starts = (0..self.plan.rows()).step_by(CHUNK);
        let all =
            starts.map(|start| Part { starts: vec![k.int(start as i64)], rows: CHUNK.min(self.plan.rows() - start) });
        let all: Vec<_> = all.collect();
        if queries <= DECODE_ROWS || !queries.is_multiple_of(DECODE_ROWS) {
            return blocks(&all, &widths);
        }
        // One decode row must not cost as much as a whole block of rows. Few rows have one width: their products are small.
        let narrow = rows.first / DECODE_ROWS;
        let members = (0..self.plan.problem().group()).map(|member| narrow * DECODE_ROWS + member * queries);
        let few = Part { starts: members.map(|start| start.multiple_of(DECODE_ROWS)).collect(), rows: DECODE_ROWS };
        k.if_else(narrow.equals((rows.end - 1) / DECODE_ROWS), || blocks(&[few], &[keys]), || blocks(&all, &widths));
    }

    /// Goes on with the first of `widths` that holds the `seen` keys.
    fn narrowest(&self, widths: &[usize], seen: Value<'a>, of: &dyn Fn(usize)) {
        match *widths {
            [] => {}
            [width] => of(width),
            [width, ref wider @ ..] => {
                self.k.if_else(seen.less_equal(width), || of(width), || self.narrowest(wider, seen, of));
            }
        }
    }

    /// Writes down the last key of each row.
    fn limit(&self, rows: &Rows<'a>) {
        let queries = self.plan.tiles().queries;
        let row = self.k.iota(&[queries, LANES], 0);
        let live = row.greater_equal(rows.first) & row.less(rows.end);
        let last = live.select(row + rows.origin, -1);
        for member in 0..self.plan.problem().group() {
            self.last.slice(0, member * queries, queries).store(last);
        }
    }

    /// The DMAs of KV block `block` into buffer `slot`: only the pages that the sequence owns are fetched. Callers guarantee
    /// that the block's first page exists.
    fn pages(&self, rows: &Rows<'a>, block: Value<'a>, slot: Value<'a>, act: impl Fn(Dma<'a>)) {
        let pages = self.plan.tiles().kv_pages;
        self.page(rows, block * pages, slot, 0, &act);
        for page in 1..pages {
            let number = block * pages + page;
            let begins = number * self.plan.problem().page_size;
            self.k.when(begins.less(rows.kv_len), || self.page(rows, number, slot, page, &act));
        }
    }

    /// The DMAs of a sequence's page `number` to place `page` of buffer `slot`.
    fn page(&self, rows: &Rows<'a>, number: Value<'a>, slot: Value<'a>, page: usize, act: &dyn Fn(Dma<'a>)) {
        let (problem, heads) = (self.plan.problem(), self.plan.head_block());
        let kv_rows = KvLayout::rows_of(heads);
        let [_, pieces, _, _, lanes] = self.plan.kv_dims();
        let mut source = self.kv_pages.at(self.metadata.page(rows.sequence, number));
        if heads < problem.kv_heads {
            source = source.slice(1, (self.head_step * kv_rows).multiple_of(kv_rows), kv_rows);
        }
        for piece in 0..pieces {
            let lanes = source.slice(2, piece * lanes, lanes);
            let destination = self.kv.at((slot, piece)).slice(0, page * problem.page_size, problem.page_size);
            let destination = destination.slice(1, 0, kv_rows);
            act(self.k.make_async_copy(lanes, destination, self.arrived.at(slot)));
        }
    }

    /// K and V of one head and the first `keys` keys of a block: `[keys, head_dim]` each.
    fn keys_and_values(&self, head: usize, kv: &Block<'a>, keys: usize) -> [Value<'a>; 2] {
        let (pieces, stride) = (&kv.words, kv.per_token);
        kv.load(head, |start| Strided { pieces: pieces.clone(), start, count: keys, stride }.load(self.k))
    }

    /// One head's step of the online softmax, for a part of its rows, over the keys from `first_key` on.
    fn update(&self, head: usize, part: &Part<'a>, key: Value<'a>, value: Value<'a>, first_key: Value<'a>) {
        let (k, problem, keys) = (self.k, self.plan.problem(), key.dims()[0]);
        let precision = match problem.precision.kv {
            Element::F32 => Precision::Fp32,
            _ => Precision::Default,
        };
        let [queries, max, sum, acc] = [&self.queries, &self.max, &self.sum, &self.acc].map(|of| of.at(head));
        let queries = part.load(k, &queries);
        let dims = [queries.dims()[0], keys];
        let logits = k.dot_general(queries, key, k.zeros(Element::F32, &dims), &DotDims::nt(), precision);
        let logits = match problem.soft_cap {
            None => logits * (problem.scale * LOG2_E),
            Some(cap) => (logits * (problem.scale / cap)).tanh() * (cap * LOG2_E),
        };
        let last = part.load(k, &self.last) - first_key;
        let index = k.iota(&dims, 1);
        let mut seen = index.less_equal(broadcast_lanes(k, last, keys));
        if let Some(window) = problem.sliding_window {
            seen = seen & index.greater(broadcast_lanes(k, last - window as i64, keys));
        }
        let logits = seen.select(logits, MASKED);

        let old = part.load(k, &max);
        let new = old.maximum(logits.max(1));
        let rescale = (old - new).exp2();
        let weights = (logits - broadcast_lanes(k, new, keys)).exp2();
        part.store(&max, new);
        part.store(&sum, rescale * part.load(k, &sum) + by_lane(weights));
        let rescaled = part.load(k, &acc) * broadcast_lanes(k, rescale, problem.head_dim);
        part.store(&acc, k.dot_general(weights.cast(problem.precision.kv), value, rescaled, &DotDims::nn(), precision));
    }
}

/// Rows of a head's products: as many from each start.
struct Part<'a> {
    starts: Vec<Value<'a>>,
    rows: usize,
}

impl<'a> Part<'a> {
    fn load(&self, k: &'a Builder<'a>, of: &Ref<'a>) -> Value<'a> {
        let slices: Vec<_> = self.starts.iter().map(|&start| of.slice(0, start, self.rows).load()).collect();
        joined(k, &slices, 0)
    }

    fn store(&self, to: &Ref<'a>, value: Value<'a>) {
        for (index, &start) in self.starts.iter().enumerate() {
            let slice = to.slice(0, start, self.rows);
            slice.store(value.slice(&[index * self.rows, 0], &slice.dims()));
        }
    }
}
