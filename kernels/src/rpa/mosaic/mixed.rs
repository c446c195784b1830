//! Attention over any batch: prompts, chunks and decode rows side by side.
//!
//! Queries and the output are two-dimensional, `[rows, heads * head_dim]`, as the matrix products around have them: a
//! head's queries are a slice of columns. Copies of rows take whole *bands* of 8, so work is cut at bands. An *entry* of the
//! work list is
//! - a block of up to [`Tiles::queries`](crate::rpa::plan::Tiles) rows of one sequence;
//! - a single band, where sequences have few rows, with a *segment* for each sequence that has rows in it;
//! - a block of rows that no sequence has, which are written as zeros.
//!
//! Each core lists its entries in SMEM first, from the last row to the first, so that of a sequence's blocks the one with
//! the most keys comes first. Where a block's sequence begins within a band, the next entry has that band too, and writes both
//! sequences' rows of it, behind the block's. Where no page can be sliced by heads, an entry goes to the core
//! that has less to do so far; a band where sequences meet is then an entry of its own, since its rows are one core's.
//! Then the core walks the KV blocks of its segments as one stream:
//!
//! ```text
//! copies    kv 0 | kv 1 | kv 2 | kv 3 ...            up to `Plan::kv_buffers` blocks ahead, whatever entry comes next
//!           queries 0 | queries 1 |    ...           an entry ahead
//! compute        kv 0 | kv 1, finish | kv 2 | kv 3, finish | ...
//! copies                                out 0 |        out 1 |          waited for an entry later
//! ```
//!
//! An entry's results take the place of its queries, which nobody needs once its last products are made. So there are three
//! buffers of rows: of the entry at work, of the next one, and of the one before.
//!
//! Online softmax (Milakov and Gimelshein, 2018) with maximum, sum and accumulator in f32, and powers of two: logits are
//! scaled by `log2 e`, so that the hardware's `2^x` needs nothing before it. The query heads of a group are one matrix
//! product with their KV head; its rows are ordered by head, then by query. A block's first step writes maximum, sum and
//! accumulator and reads none of them; its last step makes the results of a part's rows while the products of the next part
//! go on ([`Plan::finishes_in_steps`]). How keys and values come from a block is `block`'s matter, a step of a band that of
//! `few_rows`.
//!
//! A block's rows are worked on in parts ([`Part`]), and each part takes no more keys of a KV block than its last
//! row sees, in whole tiles: of a prompt's last KV blocks the earlier parts take fewer ([`Plan::spans`]). The products of a
//! part's queries and keys are written before the sums of the part before, so that the matrix unit has work while those are made.
//! A band takes a quarter or a half of a KV block where its rows see no more ([`Plan::widths`]).
//!
//! Fused, a core first turns the keys of the new rows and writes their tokens into the pages, from the memory that KV blocks come
//! to afterwards; queries are turned when they arrive (`projections`).
//!
//! Poison: logits are selected by position *after* the product; values behind a sequence's end are overwritten with zeros
//! *before* it (zero times NaN is NaN). Rows that see no key are written as zeros.

mod projections;

use std::ops::Range;

use pagoda_ir::{
    Element,
    mosaic::{
        Builder, Dma, DotDims, IntoOperand, MemorySpace, Precision, Ref, Semantics, Value,
        tiling::{LANES, SUBLANES},
    },
};

use self::projections::{Fused, Written};
use super::{
    Cores, MASKED, Metadata, NONE,
    block::{self, Block},
    broadcast_lanes, by_lane,
    few_rows::FewRows,
    heads::Heads,
    joined,
};
use crate::rpa::{
    batch::Batch,
    plan::{self, Part, Plan, Split},
};

/// The kernel of `plan`, on `cores`; with a batch, of that batch only.
pub(super) fn write<'a>(k: &'a Builder<'a>, plan: &Plan, batch: Option<&Batch>, cores: Cores) {
    Body::declare(k, plan, batch, cores).write();
}

struct Body<'a, 'p> {
    k: &'a Builder<'a>,
    plan: &'p Plan,
    /// Which core this is, and whether it does part of the work, for all heads.
    core: Value<'a>,
    is_shared: bool,
    metadata: Metadata<'a>,
    heads: Heads<'a>,
    q: Ref<'a>,
    kv_pages: Ref<'a>,
    out: Ref<'a>,
    /// Queries of an entry, then its results; of this entry, of the next and of the one before: `[3, rows, columns]`.
    queries: Ref<'a>,
    /// In HBM, `[rows, lanes]`, a lane for each query head; and of the entries' rows, `[3, rows, lanes]`.
    lse: Option<[Ref<'a>; 2]>,
    /// Where heads are not whole tiles of lanes: this entry's queries by head, `[q_heads, rows, columns]`.
    by_head: Option<Ref<'a>>,
    /// Where products are not, either: a head's results in whole tiles, `[rows, lanes]`.
    lanes: Option<Ref<'a>>,
    /// A band's queries by KV head: `[kv_heads, group * 8, columns]`; `by_head`, where that has them in this order.
    band: Ref<'a>,
    /// KV blocks: `[buffers, pieces of a row, keys, rows of a key, lanes]`.
    kv: Ref<'a>,
    /// Of the sequence at work, the last key that each row of the entry sees; -1 for rows of other sequences.
    last: Ref<'a>,
    max: Ref<'a>,
    /// A sum per row and lane.
    sum: Ref<'a>,
    acc: Ref<'a>,
    entries: Entries<'a>,
    segments: Segments<'a>,
    arrived: Ref<'a>,
    queries_arrived: Ref<'a>,
    sent: Ref<'a>,
    fused: Option<Fused<'a>>,
}

/// An entry of the list, and the buffer that its queries come to and its results go from.
#[derive(Clone, Copy)]
struct Entry<'a> {
    number: Value<'a>,
    slot: Value<'a>,
}

/// The core's entries, an array in SMEM for each number.
struct Entries<'a> {
    /// The first row that is the entry's.
    row: Ref<'a>,
    /// How many are: a multiple of a band.
    rows: Ref<'a>,
    /// One past the last row that is not an earlier entry's: within the last band, where that is shared.
    end: Ref<'a>,
    /// The first row whose queries are copied: that of a block, where the entry's rows are the last ones of a block.
    start: Ref<'a>,
    /// The first of its segments; with one more element, so that an entry's segments end where the next one's begin.
    segment: Ref<'a>,
}

/// The rows of one sequence in an entry.
struct Segments<'a> {
    sequence: Ref<'a>,
    /// First and one past the last row, counted from the entry's start.
    first: Ref<'a>,
    end: Ref<'a>,
    /// First and one past the last KV block that they see.
    begin: Ref<'a>,
    stop: Ref<'a>,
}

/// A segment, read.
#[derive(Clone, Copy)]
struct Segment<'a> {
    sequence: Value<'a>,
    kv_len: Value<'a>,
    first: Value<'a>,
    end: Value<'a>,
    /// Position of the row at the entry's start, if it belonged to the sequence.
    origin: Value<'a>,
}

/// Where a core is in its stream of KV blocks.
#[derive(Clone, Copy)]
struct Stream<'a> {
    /// The buffer of the block that is worked on next.
    slot: Value<'a>,
    /// The segment whose blocks are fetched next, how many of them have been, and the buffer for the next one.
    ahead: [Value<'a>; 3],
}

/// What a step has to do beside the online softmax.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Form {
    /// Nothing was seen before: maximum, sum and accumulator are written, not updated.
    is_first: bool,
    /// Nothing is seen after: the results are written.
    is_last: bool,
    /// Some rows do not see some of the keys.
    is_masked: bool,
}

impl<'a, 'p> Body<'a, 'p> {
    fn declare(k: &'a Builder<'a>, plan: &'p Plan, batch: Option<&Batch>, cores: Cores) -> Self {
        let problem = plan.problem();
        let (types, [dim, _], heads) = (problem.precision, block::lanes(problem), plan.head_block());
        let steps = if cores == Cores::All { plan.grid()[0] } else { 1 };
        let [step] = k.grid([(steps, Semantics::Parallel)]);
        let metadata = Metadata::declare(k, problem);
        let of_heads = Heads::declare(k, problem).in_products(1, block::scale(plan));
        let [rows, columns] = plan.padded_rows();
        let q = match problem.fused {
            None => k.hbm_input("q", types.q, &[rows, columns]),
            Some(_) => k.hbm_input("qkv", types.q, &plan::fused::projected(problem, plan.chip())),
        };
        let cos_sin = problem.fused.map(|_| k.hbm_input("cos_sin", Element::F32, &[rows, problem.head_dim]));
        let kv_pages = k.hbm_input("kv_pages", types.kv, &problem.kv_pages_type().dims);
        let out = k.hbm_output("out", types.output, &[rows, columns]);
        let kv_type = problem.kv_pages_type();
        let written_pages = problem.fused.map(|_| k.hbm_output("kv_pages_written", types.kv, &kv_type.dims));
        let lse_lanes = plan::log_sum_exp_lanes(problem);
        let lse = problem.log_sum_exp.then(|| k.hbm_output("lse", Element::F32, &[rows, lse_lanes]));
        let written = cos_sin.zip(written_pages);
        let written = written.map(|(cos_sin, kv_pages)| Written::declare(k, plan, cos_sin, kv_pages));
        let scratch = |name, element, dims: &[usize]| k.scratch(name, MemorySpace::Vmem, element, dims);
        let (block, columns) = (plan.block_rows(), plan.columns());
        let queries = scratch("queries", types.q, &[plan::ENTRIES, block, columns]);
        let by_head = (!problem.head_dim.is_multiple_of(LANES))
            .then(|| scratch("by_head", types.q, &[heads * problem.group(), block, dim]));
        let lanes = (!dim.is_multiple_of(LANES)).then(|| scratch("lanes", Element::F32, &[block, LANES]));
        let of_band = [heads, problem.group() * plan::packed(problem), dim];
        let band = match (&by_head, plan.has_band()) {
            (Some(by_head), false) => by_head.reshape(&of_band),
            _ => scratch("band", types.q, &of_band),
        };
        let kv = scratch("kv", types.kv, &plan.kv_dims());
        let last = scratch("last", Element::I32, &[block, LANES]);
        let max = scratch("max", Element::F32, &[heads, plan.rows(), LANES]);
        let sum = scratch("sum", Element::F32, &[heads, plan.rows(), LANES]);
        let acc = scratch("acc", Element::F32, &[heads, plan.rows(), dim]);
        let lse = lse.map(|lse| [lse, scratch("lse_rows", Element::F32, &[plan::ENTRIES, block, lse_lanes])]);
        let fused = written.map(|written| Fused::declare(k, plan, written, &kv));
        let in_smem = |name, len| k.scratch(name, MemorySpace::Smem, Element::I32, &[len]);
        let [entries, segments] = plan.list_lengths();
        let entries = Entries {
            row: in_smem("entry_row", entries),
            rows: in_smem("entry_rows", entries),
            end: in_smem("entry_end", entries),
            start: in_smem("entry_start", entries),
            segment: in_smem("entry_segment", entries + 1),
        };
        let segments = Segments {
            sequence: in_smem("segment_sequence", segments),
            first: in_smem("segment_first", segments),
            end: in_smem("segment_end", segments),
            begin: in_smem("segment_begin", segments),
            stop: in_smem("segment_stop", segments),
        };
        let metadata = metadata.of_batch(k, batch);
        let arrived = k.dma_semaphores("arrived", &[plan.kv_buffers()]);
        let queries_arrived = k.dma_semaphores("queries_arrived", &[plan::ENTRIES]);
        let sent = k.dma_semaphores("sent", &[plan::ENTRIES, if lse.is_some() { 2 } else { 1 }]);
        let (core, is_shared) = match cores {
            Cores::All => (step, plan.shares() > 1),
            Cores::One(core) => (k.int(core as i64), plan.shares() > 1),
        };
        let of_heads = match plan.details().split {
            Split::Heads => of_heads.from(core * heads, heads),
            Split::Nothing | Split::Sequences => of_heads,
        };
        let kv_pages = fused.as_ref().map_or(kv_pages, |fused| fused.written.kv_pages.clone());
        Self {
            k,
            plan,
            core,
            is_shared,
            metadata,
            heads: of_heads,
            q,
            kv_pages,
            out,
            queries,
            lse,
            by_head,
            lanes,
            band,
            kv,
            last,
            max,
            sum,
            acc,
            entries,
            segments,
            arrived,
            queries_arrived,
            sent,
            fused,
        }
    }

    fn write(&self) {
        let k = self.k;
        let new = self.fused.as_ref().map(|fused| (fused, self.begin_new_tokens(fused)));
        let [entries, segments] = self.list();
        let first = Entry { number: k.int(0), slot: k.int(0) };
        k.when(entries.greater(0), || self.copy_queries(first, |dma| dma.start()));
        if let Some((fused, chunks)) = new {
            self.write_new_tokens(fused, chunks);
        }
        let mut ahead = [k.int(0), k.int(0), k.int(0)];
        for _ in 1..self.plan.kv_buffers() {
            ahead = self.fetch(ahead, segments);
        }
        if let Some(lanes) = &self.lanes {
            lanes.store(0.0);
        }
        let state = [first.slot, k.int(0), ahead[0], ahead[1], ahead[2]];
        let [slot, ..] = k.fold_range(0, entries, state, |number, [slot, stream @ ..]| {
            let entry = Entry { number, slot };
            let (next, stream) = (self.next_entry(entry), Stream::of(stream));
            // The next entry has the buffer of the one before the last.
            let last = self.entry_before(self.entry_before(entry));
            k.when(last.number.greater_equal(0), || self.await_results(last));
            k.when(next.number.less(entries), || self.copy_queries(next, |dma| dma.start()));
            self.copy_queries(entry, |dma| dma.wait());
            let segment = self.entries.segment.at(number).load();
            let end = self.entries.segment.at(number + 1).load();
            let stream = k.if_else(
                segment.less(end),
                || match self.plan.has_blocks() {
                    false => self.band(entry, [segment, end], stream, segments),
                    true => k.if_else(
                        self.entries.rows.at(number).load().greater(self.plan.band()),
                        || self.block(entry, segment, stream, segments),
                        || self.band(entry, [segment, end], stream, segments),
                    ),
                },
                || {
                    self.queries.at(slot).store(0.0);
                    if let Some([_, rows]) = &self.lse {
                        rows.at(slot).store(0.0);
                    }
                    stream.flat()
                },
            );
            self.join(entry);
            self.copy_results(entry, |dma| dma.start());
            let [kv, segment, done, into] = stream;
            [next.slot, kv, segment, done, into]
        });
        let last = self.entry_before(Entry { number: entries, slot });
        k.when(entries.greater(1), || self.await_results(self.entry_before(last)));
        k.when(entries.greater(0), || self.copy_results(last, |dma| dma.wait()));
    }

    fn next_entry(&self, Entry { number, slot }: Entry<'a>) -> Entry<'a> {
        let next = slot + 1;
        Entry { number: number + 1, slot: next.equals(plan::ENTRIES).select(self.k.int(0), next) }
    }

    fn entry_before(&self, Entry { number, slot }: Entry<'a>) -> Entry<'a> {
        let last = self.k.int(plan::ENTRIES as i64 - 1);
        Entry { number: number - 1, slot: slot.equals(0).select(last, slot - 1) }
    }

    /// Lists what the core has to do: how many entries there are, and segments.
    fn list(&self) -> [Value<'a>; 2] {
        let (k, block) = (self.k, self.plan.block_rows() as i64);
        let band = self.plan.band() as i64;
        let bands = |rows: Value<'a>| (rows + (band - 1)) & -band;
        let sequences = self.metadata.sequences();
        let shares_bands = self.plan.shares_bands();
        let [of_block, of_band] = self.plan.costs();
        let total = self.metadata.first_row(sequences);
        let live = bands(total);
        let state = (
            k.int(self.plan.padded_rows()[0] as i64),
            (sequences - 1).maximum(0),
            [k.int(0), k.int(0)],
            [k.int(0), k.int(0)],
        );
        let (_, _, [entries, segments], _) = k.while_loop(
            state,
            |(end, ..)| end.greater(0),
            |(end, sequence, [entry, segment], [mine, others])| {
                let top = bands(end);
                let is_padding = top.greater(live);
                // The sequence of the last row.
                let last = end.minimum(total.maximum(1));
                let sequence = k.while_loop(
                    sequence,
                    |sequence| self.metadata.first_row(sequence).greater_equal(last),
                    |sequence| sequence - 1,
                );
                let begin = self.metadata.first_row(sequence);
                let own = top - if shares_bands { begin & -band } else { bands(begin) };
                let is_block = match self.plan.has_blocks() {
                    true => top.less_equal(live) & own.greater_equal(self.plan.least_rows() as i64),
                    false => k.int(0).differs(0),
                };
                let rows = is_block.select(own.minimum(block), band);
                let rows = is_padding.select((top - live).minimum(block), rows);
                let row = top - rows;
                let start = is_padding.select(row, is_block.select((top - block).maximum(0), row));
                let none = is_padding.select(k.int(-1), sequence);
                // A block is of one sequence; of what lies before it in a band, the next entry is.
                let from = is_block.select(begin.maximum(row), row);
                let (_, next, [blocks, lanes]) = k.while_loop(
                    (none, segment, [k.int(0), k.int(0)]),
                    |(sequence, ..)| self.metadata.first_row(sequence + 1).greater(from),
                    |(sequence, segment, [blocks, lanes])| {
                        let [blocks_of, lanes_of] = self.add(segment, sequence, [row, top], start);
                        let is_one = blocks_of.greater(0);
                        let sums = [blocks + blocks_of, lanes + lanes_of];
                        (sequence - 1, is_one.select(segment + 1, segment), sums)
                    },
                );
                self.entries.row.at(entry).store(row);
                self.entries.rows.at(entry).store(rows);
                self.entries.end.at(entry).store(end);
                self.entries.start.at(entry).store(start);
                self.entries.segment.at(entry).store(segment);
                if !self.is_shared {
                    return (from, sequence, [entry + 1, next], [mine, others]);
                }
                // Both cores go through the same list and agree on whose each entry is.
                let part = |block: i64, band: i64| is_block.select(k.int(block), band);
                let cost = part(of_block.entry, of_band.entry)
                    + part(of_block.block, of_band.block) * blocks
                    + part(of_block.lanes, of_band.lanes) * lanes;
                let is_first = mine.less_equal(others);
                let is_mine = is_first.select(k.int(0), 1).equals(self.core);
                let loads = [is_first.select(mine + cost, mine), is_first.select(others, others + cost)];
                (from, sequence, [is_mine.select(entry + 1, entry), is_mine.select(next, segment)], loads)
            },
        );
        self.entries.segment.at(entries).store(segments);
        [entries, segments]
    }

    /// Lists the rows of a sequence among `rows` of an entry as segment `segment`; how many KV blocks they see, and how many
    /// times 128 keys, 0 if there are no rows.
    fn add(&self, segment: Value<'a>, sequence: Value<'a>, rows: [Value<'a>; 2], start: Value<'a>) -> [Value<'a>; 2] {
        let keys = self.plan.keys() as i64;
        let [from, to] = [sequence, sequence + 1].map(|sequence| self.metadata.first_row(sequence));
        let kv_len = self.metadata.kv_len(sequence);
        let [first, end] = [from.maximum(rows[0]) - start, to.minimum(rows[1]) - start];
        let origin = kv_len - to + start;
        let stop = (origin + end + (keys - 1)) / keys;
        let begin = match self.plan.problem().sliding_window {
            None => self.k.int(0),
            Some(window) => (origin + first - (window as i64 - 1)).maximum(0) / keys,
        };
        let of = &self.segments;
        for (array, value) in
            [(&of.sequence, sequence), (&of.first, first), (&of.end, end), (&of.begin, begin), (&of.stop, stop)]
        {
            array.at(segment).store(value);
        }
        let is_one = first.less(end) & kv_len.greater(0);
        let lanes = (origin + end - begin * keys + (LANES as i64 - 1)) / LANES as i64;
        [stop - begin, lanes].map(|of| is_one.select(of, 0))
    }

    fn segment(&self, entry: Entry<'a>, segment: Value<'a>) -> Segment<'a> {
        let of = &self.segments;
        let [sequence, first, end] = [&of.sequence, &of.first, &of.end].map(|array| array.at(segment).load());
        let kv_len = self.metadata.kv_len(sequence);
        let origin = kv_len - self.metadata.first_row(sequence + 1) + self.entries.start.at(entry.number).load();
        Segment { sequence, kv_len, first, end, origin }
    }

    /// The columns of an array of rows that belong to the core's heads.
    fn columns_of(&self, rows: &Ref<'a>) -> Ref<'a> {
        let columns = self.plan.columns();
        match self.plan.head_block() < self.plan.problem().kv_heads {
            true => rows.slice(1, (self.core * columns).multiple_of(LANES), columns),
            // All heads; behind the queries of projections are the keys.
            false => rows.slice(1, 0, columns),
        }
    }

    /// The copy of an entry's queries, if it has segments.
    fn copy_queries(&self, Entry { number: entry, slot }: Entry<'a>, act: impl Fn(Dma<'a>)) {
        let k = self.k;
        let copy = |rows: usize| {
            let start = self.entries.start.at(entry).load().multiple_of(self.plan.band());
            let from = self.columns_of(&self.q).slice(0, start, rows);
            let to = self.queries.at(slot).slice(0, 0, rows);
            act(k.make_async_copy(from, to, self.queries_arrived.at(slot)));
            if let Some(fused) = &self.fused {
                let slot = entry & 1;
                let [from, to] = [fused.written.cos_sin.slice(0, start, rows), fused.angles.at(slot).slice(0, 0, rows)];
                act(k.make_async_copy(from, to, fused.angles_arrived.at(slot)));
            }
        };
        let [begin, end] = [entry, entry + 1].map(|entry| self.entries.segment.at(entry).load());
        k.when(begin.less(end), || match self.plan.has_blocks() {
            false => copy(self.plan.band()),
            true => k.if_else(
                self.entries.rows.at(entry).load().greater(self.plan.band()),
                || copy(self.plan.block_rows()),
                || copy(self.plan.band()),
            ),
        });
    }

    /// The copies of an entry's rows of the output: of a whole block or one band a single one, else one for each power of two in
    /// the number of its bands.
    fn copy_results(&self, Entry { number: entry, slot }: Entry<'a>, act: impl Fn(Dma<'a>)) {
        let k = self.k;
        let [row, rows, start] =
            [&self.entries.row, &self.entries.rows, &self.entries.start].map(|array| array.at(entry).load());
        let (block, band) = (self.plan.block_rows(), self.plan.band());
        let copy = |done: Value<'a>, count: usize| {
            let from = self.queries.at(slot).slice(0, (row - start + done).multiple_of(band), count);
            let to = self.columns_of(&self.out).slice(0, (row + done).multiple_of(band), count);
            act(k.make_async_copy(from, to, self.sent.at((slot, 0))));
            if let Some([lse, rows]) = &self.lse {
                let from = rows.at(slot).slice(0, (row - start + done).multiple_of(band), count);
                let to = lse.slice(0, (row + done).multiple_of(band), count);
                act(k.make_async_copy(from, to, self.sent.at((slot, 1))));
            }
        };
        let whole = |count: usize| copy(k.int(0), count);
        let powers = || {
            for power in (0..=(block / band).ilog2()).rev() {
                let count = band << power;
                k.when((rows & count as i64).differs(0), || copy(rows & -(2 * count as i64), count));
            }
        };
        match block / band {
            1 => whole(band),
            2 => k.if_else(rows.equals(block), || whole(block), || whole(band)),
            _ => {
                let part = || k.if_else(rows.equals(band), || whole(band), powers);
                k.if_else(rows.equals(block), || whole(block), part);
            }
        }
    }

    /// Waits until the results of an entry, which is not the last one, have left their buffer; the next one did, if it had to.
    fn await_results(&self, entry: Entry<'a>) {
        let wait = || self.copy_results(entry, |dma| dma.wait());
        match self.plan.shares_bands() {
            false => wait(),
            true => self.k.when(self.is_joined(entry.number + 1).equals(0), wait),
        }
    }

    /// Whether an entry has a band of the one before it, too.
    fn is_joined(&self, entry: Value<'a>) -> Value<'a> {
        let [row, rows] = [&self.entries.row, &self.entries.rows].map(|of| of.at(entry).load());
        let before = self.entries.row.at((entry - 1).maximum(0)).load();
        entry.greater(0) & (row + rows).greater(before)
    }

    /// Puts the rows of a band that are the entry's before behind its own, and has that one's results written first.
    fn join(&self, entry: Entry<'a>) {
        let (k, band) = (self.k, self.plan.band());
        if !self.plan.shares_bands() {
            return;
        }
        let before = self.entry_before(entry);
        k.when(self.is_joined(entry.number), || {
            let of = &self.entries;
            let [row, rows, end, start] = [&of.row, &of.rows, &of.end, &of.start].map(|of| of.at(entry.number).load());
            let start_before = of.start.at(before.number).load();
            let [at, at_before] =
                [start, start_before].map(|start| (row + rows - band as i64 - start).multiple_of(band));
            let join = |rows: &Ref<'a>, element: Element| {
                let [own, other] =
                    [(entry, at), (before, at_before)].map(|(of, at)| rows.at(of.slot).slice(0, at, band));
                for column in (0..own.dims()[1]).step_by(LANES) {
                    let [rows, kept] = [&own, &other].map(|of| of.slice(1, column, LANES));
                    let is_own = k.iota(&[band, LANES], 0).less(end - start - at);
                    let [own, other] = [&rows, &kept].map(|of| of.load().cast(Element::F32));
                    rows.store(is_own.select(own, other).cast(element));
                }
            };
            join(&self.queries, self.plan.problem().precision.output);
            if let Some([_, rows]) = &self.lse {
                join(rows, Element::F32);
            }
            self.copy_results(before, |dma| dma.wait());
        });
    }

    /// Starts the copies of the next KV block of the stream, if there is one.
    fn fetch(&self, ahead: [Value<'a>; 3], segments: Value<'a>) -> [Value<'a>; 3] {
        let (k, [segment, done, slot]) = (self.k, ahead);
        k.if_else(
            segment.less(segments),
            || {
                let sequence = self.segments.sequence.at(segment).load();
                let block = self.segments.begin.at(segment).load() + done;
                self.pages(sequence, self.metadata.kv_len(sequence), block, slot, |dma| dma.start());
                let is_last = (block + 1).greater_equal(self.segments.stop.at(segment).load());
                let segment = is_last.select(segment + 1, segment);
                [segment, is_last.select(k.int(0), done + 1), self.next(slot)]
            },
            || [segment, done, slot],
        )
    }

    fn next(&self, slot: Value<'a>) -> Value<'a> {
        let next = slot + 1;
        next.equals(self.plan.kv_buffers()).select(self.k.int(0), next)
    }

    /// The copies of a KV block into a buffer: of the pages that the sequence has. The block's first page exists.
    fn pages(&self, sequence: Value<'a>, kv_len: Value<'a>, block: Value<'a>, slot: Value<'a>, act: impl Fn(Dma<'a>)) {
        let (pages, page_size) = (self.plan.tiles().kv_pages, self.plan.problem().page_size);
        let first = block * pages;
        let begins = |page: usize| (first + page) * page_size;
        let page = |page: usize| self.page(sequence, first + page, slot, page * page_size, &act);
        let start = |page: Value<'a>| (page * page_size).multiple_of(page_size);
        let pages_to = |end: Value<'a>| {
            self.k.for_range(0, end, |page| self.page(sequence, first + page, slot, start(page), &act));
        };
        // Loops: a branch for each page that there might be takes longer.
        let all = || ((kv_len + (page_size as i64 - 1)) / page_size - first).minimum(pages as i64);
        if let Some(fresh) = self.fused.as_ref().and_then(|fused| fused.written.fresh.as_ref()) {
            let [of, next] = [sequence, sequence + 1].map(|sequence| self.metadata.first_row(sequence));
            let before = kv_len - next + of;
            return self.k.if_else(
                begins(pages).less_equal(before),
                || (0..pages).for_each(&page),
                || {
                    let old = (before / page_size - first).maximum(0);
                    pages_to(old);
                    self.k.for_range(old, all(), |page| {
                        self.page_or_fresh(fresh, sequence, [first + page, start(page)], [kv_len, before], slot, &act);
                    });
                },
            );
        }
        match pages {
            1 => page(0),
            _ => self.k.if_else(begins(pages - 1).less(kv_len), || (0..pages).for_each(&page), || pages_to(all())),
        }
    }

    /// The copies of a sequence's page `number` to a buffer, from its token `start` on.
    fn page(
        &self,
        sequence: Value<'a>,
        number: Value<'a>,
        slot: Value<'a>,
        start: impl IntoOperand<'a>,
        act: &dyn Fn(Dma<'a>),
    ) {
        let (problem, heads) = (self.plan.problem(), self.plan.head_block());
        let [kv_rows, _] = problem.kv_layout().of_heads(heads).token_dims();
        let [_, pieces, _, _, lanes] = self.plan.kv_dims();
        let mut source = self.kv_pages.at(self.metadata.page(sequence, number));
        if heads < problem.kv_heads {
            source = source.slice(1, (self.core * kv_rows).multiple_of(kv_rows), kv_rows);
        }
        for piece in 0..pieces {
            let lanes = source.slice(2, piece * lanes, lanes);
            let destination = self.kv.at((slot, piece)).slice(0, start, problem.page_size);
            act(self.k.make_async_copy(lanes, destination.slice(1, 0, kv_rows), self.arrived.at(slot)));
        }
    }

    /// Waits for the next KV block of a segment, starts the copies of one ahead, and works on it:
    /// `of(the block in VMEM, its first key)`.
    fn step(
        &self,
        of_segment: &Segment<'a>,
        block: Value<'a>,
        stream: Stream<'a>,
        segments: Value<'a>,
        of: impl FnOnce(&Block<'a>, Value<'a>),
    ) -> [Value<'a>; 4] {
        let Stream { slot, ahead } = stream;
        let ahead = self.fetch(ahead, segments);
        let &Segment { sequence, kv_len, .. } = of_segment;
        self.pages(sequence, kv_len, block, slot, |dma| dma.wait());
        of(&Block::new(self.k, &self.kv.at(slot), self.plan), block * self.plan.keys());
        Stream { slot: self.next(slot), ahead }.flat()
    }

    /// A block of rows of one sequence.
    fn block(&self, entry: Entry<'a>, segment: Value<'a>, stream: Stream<'a>, segments: Value<'a>) -> [Value<'a>; 4] {
        let (k, rows) = (self.k, self.plan.block_rows());
        self.arrange_queries(entry, rows);
        let of_segment = self.segment(entry, segment);
        self.limit(&of_segment, rows);
        let [begin, stop] = [&self.segments.begin, &self.segments.stop].map(|array| array.at(segment).load());
        let step = |block: Value<'a>, stream: Stream<'a>, [is_first, is_last]: [bool; 2]| {
            self.step(&of_segment, block, stream, segments, |kv, first_key| {
                let parts = |parts: &[(Part, usize)], is_masked: bool| {
                    self.parts(entry, kv, parts, first_key, Form { is_first, is_last, is_masked });
                };
                let spans = self.plan.spans_of(is_last);
                let bounds: Vec<_> = spans.iter().map(|span| span.bound).collect();
                let [live, seen] = [of_segment.kv_len, of_segment.origin + rows as i64].map(|of| of - first_key);
                let masked = || {
                    self.narrowest(&bounds, seen, &|which| {
                        self.clear(kv, live, spans[which].keys());
                        parts(&spans[which].parts, true);
                    });
                };
                // Of the last block that they see, some rows do not see all.
                match self.plan.has_inner_steps() && !is_last {
                    false => masked(),
                    true => {
                        let all = || parts(&spans[spans.len() - 1].parts, false);
                        k.if_else(self.sees_all(&of_segment, first_key), all, masked);
                    }
                }
            })
        };
        let next = begin + 1;
        let steps = |stop: Value<'a>| {
            let stream = step(begin, stream, [true, false]);
            k.fold_range(next, stop, stream, |block, stream| step(block, Stream::of(stream), [false; 2]))
        };
        if self.plan.finishes_in_steps() {
            let only = || step(begin, stream, [true; 2]);
            return k.if_else(stop.less_equal(next), only, || {
                let last = stop - 1;
                step(last, Stream::of(steps(last)), [false, true])
            });
        }
        let stream = steps(stop);
        let heads = self.plan.head_block() * self.plan.problem().group();
        let mut rows: Vec<_> = self.plan.parts().iter().map(|part| [part.row, part.rows]).collect();
        rows.dedup();
        rows.into_iter().for_each(|rows| self.finish(entry, rows, 0..heads));
        stream
    }

    /// Whether every row of a block sees every key of a KV block.
    fn sees_all(&self, segment: &Segment<'a>, first_key: Value<'a>) -> Value<'a> {
        let (rows, keys) = (self.plan.block_rows() as i64, self.plan.keys() as i64);
        let is_whole = (segment.end - segment.first).equals(rows);
        let all = is_whole & (first_key + (keys - 1)).less_equal(segment.origin);
        match self.plan.problem().sliding_window {
            None => all,
            Some(window) => all & first_key.greater(segment.origin + (rows - 1) - window as i64),
        }
    }

    /// A band of rows of any sequences.
    fn band(
        &self,
        entry: Entry<'a>,
        [segment, end]: [Value<'a>; 2],
        stream: Stream<'a>,
        segments: Value<'a>,
    ) -> [Value<'a>; 4] {
        let (k, group) = (self.k, self.plan.problem().group());
        self.arrange_queries(entry, self.plan.band());
        let part = Part { row: 0, rows: self.plan.band(), member: 0, members: group };
        for head in 0..self.plan.head_block() {
            if self.plan.has_band() {
                self.band.at(head).slice(0, 0, part.count()).store(self.queries_of(entry, head, &part));
            }
            self.max.at(head).slice(0, 0, part.count()).store(NONE);
            self.sum.at(head).slice(0, 0, part.count()).store(0.0);
            self.acc.at(head).slice(0, 0, part.count()).store(0.0);
        }
        let widths = self.plan.widths();
        let stream = k.fold_range(segment, end, stream.flat(), |segment, stream| {
            let of_segment = self.segment(entry, segment);
            self.limit(&of_segment, self.plan.band());
            let [begin, stop] = [&self.segments.begin, &self.segments.stop].map(|array| array.at(segment).load());
            k.fold_range(begin, stop, stream, |block, stream| {
                self.step(&of_segment, block, Stream::of(stream), segments, |kv, first_key| {
                    let [live, seen] = [of_segment.kv_len, of_segment.origin + of_segment.end].map(|of| of - first_key);
                    self.narrowest(&widths, seen, &|which| {
                        self.clear(kv, live, widths[which]);
                        self.few_rows(&part, kv, widths[which], first_key);
                    });
                })
            })
        });
        self.finish(entry, [0, part.rows], 0..self.plan.head_block() * group);
        stream
    }

    /// A step of the online softmax for the rows of a band.
    fn few_rows(&self, part: &Part, block: &Block<'a>, keys: usize, first_key: Value<'a>) {
        let of = |of: &Ref<'a>, head: usize| of.at(head).slice(0, 0, part.count());
        let step = FewRows {
            k: self.k,
            problem: self.plan.problem(),
            heads: &self.heads,
            block,
            kv_heads: 1,
            keys,
            // Values behind them are zeros.
            live: None,
            keeps_maxima: true,
            queries: &|head| of(&self.band, head).load(),
            state: &|head| [&self.max, &self.sum, &self.acc].map(|state| of(state, head)),
            seen: &|first, dims| Some(self.seen(part, first_key + first as i64, dims)),
        };
        step.write(self.plan.head_block());
    }

    /// Which keys from `first_key` on the rows of a part see: `[rows, keys]`.
    fn seen(&self, part: &Part, first_key: Value<'a>, dims: &[usize]) -> Value<'a> {
        let (k, keys) = (self.k, dims[1]);
        let last = vec![self.last.slice(0, part.row, part.rows).load(); part.members];
        let last = joined(k, &last, 0) - first_key;
        let index = k.iota(dims, 1);
        let seen = index.less_equal(broadcast_lanes(k, last, keys));
        match self.plan.problem().sliding_window {
            None => seen,
            Some(window) => seen & index.greater(broadcast_lanes(k, last - window as i64, keys)),
        }
    }

    /// Goes on with the first of `bounds`, which rise, that is not below `seen`, else with the last: `of(which)`. The last one,
    /// which long contexts have most of, is looked at first.
    fn narrowest(&self, bounds: &[usize], seen: Value<'a>, of: &dyn Fn(usize)) {
        let [narrow @ .., most, _] = bounds else { return of(0) };
        self.k.if_else(seen.greater(*most), || of(bounds.len() - 1), || self.first_of(narrow, seen, of));
    }

    fn first_of(&self, bounds: &[usize], seen: Value<'a>, of: &dyn Fn(usize)) {
        match bounds {
            [] => of(0),
            [bound, wider @ ..] => {
                let wider = || self.first_of(wider, seen, &|which| of(which + 1));
                self.k.if_else(seen.less_equal(*bound), || of(0), wider);
            }
        }
    }

    /// Overwrites values behind a sequence's end with zeros, among the first `keys` tokens of a block.
    fn clear(&self, kv: &Block<'a>, live: Value<'a>, keys: usize) {
        self.k.when(live.less(keys), || kv.clear(live, keys));
    }

    /// Writes down the last key of each of the first `rows` rows.
    fn limit(&self, segment: &Segment<'a>, rows: usize) {
        let row = self.k.iota(&[rows, LANES], 0);
        let is_live = row.greater_equal(segment.first) & row.less(segment.end);
        self.last.slice(0, 0, rows).store(is_live.select(row + segment.origin, -1));
    }

    /// Brings the first `rows` rows of an entry's queries into the order in which products take them, turned where that was
    /// not done before.
    fn arrange_queries(&self, entry: Entry<'a>, rows: usize) {
        match &self.fused {
            None => self.split_heads(entry, rows),
            Some(fused) => self.turn_queries(fused, entry, rows),
        }
    }

    /// Where heads are not whole tiles of lanes: brings the first `rows` rows of an entry's queries into order by head. Lanes
    /// behind a head's elements that products take are zeros.
    fn split_heads(&self, entry: Entry<'a>, rows: usize) {
        let (k, problem) = (self.k, self.plan.problem());
        let Some(by_head) = &self.by_head else { return };
        let (dim, [columns, _]) = (problem.head_dim, block::lanes(problem));
        let tile = |index: usize| {
            let tile = self.queries.at(entry.slot).slice(0, 0, rows).slice(1, index * LANES, LANES);
            tile.load().cast(Element::F32)
        };
        for head in 0..self.plan.head_block() * problem.group() {
            for first in (0..dim).step_by(LANES) {
                let (start, taken) = (head * dim + first, LANES.min(dim - first));
                let (index, lane) = (start / LANES, start % LANES);
                let from = |index: usize| match lane {
                    0 => tile(index),
                    _ => tile(index).rotate(LANES - lane, 1),
                };
                let mut lanes = from(index);
                if lane + taken > LANES {
                    lanes = k.iota(&lanes.dims(), 1).less(LANES - lane).select(lanes, from(index + 1));
                }
                let width = LANES.min(columns - first);
                if width > taken {
                    lanes = k.iota(&lanes.dims(), 1).less(taken).select(lanes, 0.0);
                }
                let to = by_head.at(head).slice(0, 0, rows).slice(1, first, width);
                to.store(lanes.slice(&[0, 0], &[rows, width]).cast(problem.precision.q));
            }
        }
    }

    /// The queries of the rows of a KV head's products: `[count, head_dim]`.
    fn queries_of(&self, entry: Entry<'a>, kv_head: usize, part: &Part) -> Value<'a> {
        let (k, problem) = (self.k, self.plan.problem());
        let (dim, group) = (problem.head_dim, problem.group());
        let pieces: Vec<_> = (part.member..part.member + part.members)
            .map(|member| {
                let head = kv_head * group + member;
                match &self.by_head {
                    Some(by_head) => by_head.at(head).slice(0, part.row, part.rows).load(),
                    None => self.queries.at(entry.slot).slice(0, part.row, part.rows).slice(1, head * dim, dim).load(),
                }
            })
            .collect();
        // Registers of narrow types hold 16 rows and more.
        let packed = SUBLANES * 4 / problem.precision.q.bytes();
        match pieces.len() > 1 && !part.rows.is_multiple_of(packed) {
            false => joined(k, &pieces, 0),
            true => {
                let pieces: Vec<_> = pieces.iter().map(|piece| piece.cast(Element::F32)).collect();
                joined(k, &pieces, 0).cast(problem.precision.q)
            }
        }
    }

    /// A step of the online softmax for parts of a block's rows, each over so many keys from `first_key` on.
    fn parts(&self, entry: Entry<'a>, kv: &Block<'a>, parts: &[(Part, usize)], first_key: Value<'a>, form: Form) {
        let most = parts.iter().map(|&(_, keys)| keys).max().unwrap_or(0);
        // The products of the next part stand before the sums of this one: the compiler does not move them there.
        let mut last: Option<(usize, Part, Value<'a>, Value<'a>)> = None;
        let finish = |head: usize, part: &Part| {
            if form.is_last {
                self.finish_part(entry, head, part);
            }
        };
        let update = |of: Option<(usize, Part, Value<'a>, Value<'a>)>| {
            if let Some((head, part, logits, value)) = of {
                self.update(head, &part, logits, value, form.is_first);
                finish(head, &part);
            }
        };
        for head in 0..self.plan.head_block() {
            let [key, value] = kv.keys_and_values(head, most);
            for &(part, keys) in parts {
                let of = |all: Value<'a>| all.slice(&[0, 0], &[keys, all.dims()[1]]);
                if keys > 0 {
                    let logits = self.logits(entry, head, &part, of(key), first_key, form.is_masked);
                    update(last.replace((head, part, logits, of(value))));
                    continue;
                }
                // Rows that see nothing of a first KV block are not the entry's, and nobody copies their results.
                match form.is_first {
                    true if form.is_last => {}
                    true => {
                        let [max, sum, acc] = self.state(head, &part);
                        max.store(NONE);
                        sum.store(0.0);
                        acc.store(0.0);
                    }
                    false => finish(head, &part),
                }
            }
        }
        update(last);
    }

    /// Maximum, sum and accumulator of a part's rows.
    fn state(&self, head: usize, part: &Part) -> [Ref<'a>; 3] {
        let start = part.start(self.plan.problem().group());
        [&self.max, &self.sum, &self.acc].map(|of| of.at(head).slice(0, start, part.count()))
    }

    /// The precision of products.
    fn precision(&self) -> Precision {
        match self.plan.problem().precision.q {
            Element::F32 => Precision::Fp32,
            _ => Precision::Default,
        }
    }

    /// The logits of a part's rows: `[rows, keys]`.
    fn logits(
        &self,
        entry: Entry<'a>,
        head: usize,
        part: &Part,
        key: Value<'a>,
        first_key: Value<'a>,
        is_masked: bool,
    ) -> Value<'a> {
        let (k, problem, dims) = (self.k, self.plan.problem(), [part.count(), key.dims()[0]]);
        let queries = self.queries_of(entry, head, part);
        let zeros = k.zeros(Element::F32, &dims);
        let product = k.dot_general(queries, key, zeros, &DotDims::nt(), self.precision());
        let logits = self.heads.logits(product, head, problem);
        match is_masked {
            true => self.seen(part, first_key, &dims).select(logits, MASKED),
            false => logits,
        }
    }

    /// Takes logits and values into the state of a part's rows.
    fn update(&self, head: usize, part: &Part, logits: Value<'a>, value: Value<'a>, is_first: bool) {
        let (k, keys) = (self.k, value.dims()[0]);
        let (operand, [columns, _]) = (self.plan.problem().precision.q, block::lanes(self.plan.problem()));
        let [max, sum, acc] = self.state(head, part);
        let largest = logits.max(1);
        let weigh = |new: Value<'a>| (logits - broadcast_lanes(k, new, keys)).exp2();
        let product = |weights: Value<'a>, onto: Value<'a>| {
            k.dot_general(weights.cast(operand), value, onto, &DotDims::nn(), self.precision())
        };
        if is_first {
            let new = k.splat(Element::F32, &max.dims(), NONE).maximum(largest);
            let weights = weigh(new);
            max.store(new);
            sum.store(by_lane(weights));
            acc.store(product(weights, k.zeros(Element::F32, &acc.dims())));
            return;
        }
        let old = max.load();
        let new = old.maximum(largest);
        let rescale = (old - new).exp2();
        let weights = weigh(new);
        max.store(new);
        sum.store(rescale * sum.load() + by_lane(weights));
        acc.store(product(weights, acc.load() * broadcast_lanes(k, rescale, columns)));
    }

    /// Divides, and writes the results of a part's rows of a KV head.
    fn finish_part(&self, entry: Entry<'a>, kv_head: usize, part: &Part) {
        let first = kv_head * self.plan.problem().group() + part.member;
        self.finish(entry, [part.row, part.rows], first..first + part.members);
    }

    /// Divides, and writes the results of heads of some rows, and all heads' log-sum-exps. Rows that saw no key are zeros.
    fn finish(&self, entry: Entry<'a>, [first_row, rows]: [usize; 2], heads: Range<usize>) {
        let (k, problem, group) = (self.k, self.plan.problem(), self.plan.problem().group());
        let (end, [columns, _]) = (heads.end, block::lanes(problem));
        let mut lse_tile = None;
        self.write_results(entry, [first_row, rows], heads, |head| {
            let (kv_head, member) = (head / group, head % group);
            let [max, sum, acc] = self.state(kv_head, &Part { row: first_row, rows, member, members: 1 });
            let [sum, acc] = [sum, acc].map(|of| of.load());
            let total = self.heads.total(kv_head, &max, sum, self.heads.sink(head));
            if let (Some(of_head), Some([_, lse_rows])) = (total.log_sum_exp, &self.lse) {
                let lane = head % LANES;
                let tile = match lse_tile {
                    Some(tile) if lane > 0 => k.iota(&[rows, LANES], 1).less(lane).select(tile, of_head),
                    _ => of_head,
                };
                lse_tile = Some(tile);
                if lane + 1 == LANES || head + 1 == end {
                    let lse_rows = lse_rows.at(entry.slot).slice(0, first_row, rows);
                    lse_rows.slice(1, head / LANES * LANES, LANES).store(tile);
                }
            }
            // One step of Newton's method squares the estimate's error of some 1e-3. The largest weight of a row is 1; without a
            // key, the accumulator is 0.
            let sum = total.sum.maximum(0.5).broadcast_to(&[rows, LANES]);
            let estimate = sum.reciprocal(true);
            let factor = estimate * (2.0 - sum * estimate);
            let factor = total.factor.map_or(factor, |by| factor * by);
            acc * broadcast_lanes(k, factor, columns)
        });
    }

    /// Writes `result(head)` of some rows, head by head. Of heads that share tiles of lanes with others these must be among them.
    fn write_results(
        &self,
        entry: Entry<'a>,
        [first_row, rows]: [usize; 2],
        heads: Range<usize>,
        mut result: impl FnMut(usize) -> Value<'a>,
    ) {
        let (k, problem) = (self.k, self.plan.problem());
        let (dim, [_, first]) = (problem.head_dim, block::lanes(problem));
        let results = self.queries.at(entry.slot).slice(0, first_row, rows);
        if self.by_head.is_none() {
            for head in heads {
                results.slice(1, head * dim, dim).store(result(head).cast(problem.precision.output));
            }
            return;
        }
        // A tile of columns holds the ends of some heads.
        let mut tile = k.zeros(Element::F32, &[rows, LANES]);
        for head in heads.clone() {
            let result = result(head);
            let lanes = self.lanes.as_ref().map(|lanes| lanes.slice(0, 0, rows));
            if let Some(lanes) = &lanes {
                lanes.slice(1, 0, dim).store(result);
            }
            let loaded = |tile: usize| match &lanes {
                Some(lanes) => lanes.load(),
                None => result.slice(&[0, tile * LANES], &[rows, LANES]),
            };
            // A run of elements: as many as neither tiles of the result nor those of the columns cut.
            let mut done = 0;
            while done < dim {
                let (from, to) = (first + done, head * dim + done);
                let lane = to % LANES;
                let count = (LANES - from % LANES).min(LANES - lane).min(dim - done);
                let turn = (LANES + lane - from % LANES) % LANES;
                let loaded = loaded(from / LANES);
                let moved = if turn == 0 { loaded } else { loaded.rotate(turn, 1) };
                tile = match lane {
                    0 => moved,
                    _ => k.iota(&[rows, LANES], 1).less(lane).select(tile, moved),
                };
                done += count;
                if lane + count == LANES || (done == dim && head + 1 == heads.end) {
                    let columns = results.slice(1, to / LANES * LANES, LANES);
                    columns.store(tile.cast(problem.precision.output));
                }
            }
        }
    }
}

impl<'a> Stream<'a> {
    fn flat(self) -> [Value<'a>; 4] {
        let Self { slot, ahead: [segment, done, into] } = self;
        [slot, segment, done, into]
    }

    fn of([slot, ahead @ ..]: [Value<'a>; 4]) -> Self {
        Self { slot, ahead }
    }
}
