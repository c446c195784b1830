//! Decode: at most one query row per sequence, over ragged contexts.
//!
//! Each core walks the KV blocks of its sequences, one after another, as one stream. Copies run ahead in that stream,
//! whichever sequence they belong to, so that only a core's first block is waited for from its start. A block's pages are
//! those that the sequence has: the last one may be short, and then no more than the narrowest of [`Plan::widths`] that
//! holds its keys is worked on, and masked.
//!
//! Where no page can be sliced by heads, the cores share the sequences: the first core takes them from the front, the
//! second from the back, each as long as the middle of the sequence's load (keys, and what is fixed for a row) lies in its
//! half. Rows are written by copies of
//! their own, so that no block of the output belongs to both.
//!
//! Fused, queries and new keys of all rows are turned while the first KV blocks arrive (`projections`). A new token takes its
//! place in the last KV block of its sequence, in VMEM, and goes to its page when that block is there: nobody reads the page
//! any more.

mod projections;

use pagoda_ir::{
    Element,
    mosaic::{
        Builder, Dma, MemorySpace, Ref, Semantics, Value,
        tiling::{LANES, SUBLANES},
    },
};

use self::projections::Fused;
use super::{
    Metadata, NONE, Strided,
    block::{self, Block},
    broadcast_lanes,
    few_rows::FewRows,
    heads::Heads,
};
use crate::rpa::{
    batch::Batch,
    plan::{
        self, Plan, Split,
        decode::{self, BUFFERS, Products},
        fused,
    },
};

/// The kernel of `plan`; with `batch`, for that batch only, and perhaps as one core sees it.
pub(super) fn write<'a>(k: &'a Builder<'a>, plan: &Plan, batch: Option<(&Batch, Option<usize>)>) {
    Body::declare(k, plan, batch).write();
}

struct Body<'a, 'p> {
    k: &'a Builder<'a>,
    plan: &'p Plan,
    split: Split,
    /// Which core this is.
    core: Value<'a>,
    metadata: Metadata<'a>,
    num_seqs: Value<'a>,
    heads: Heads<'a>,
    q: Ref<'a>,
    kv_pages: Ref<'a>,
    out: Ref<'a>,
    /// The rows of q and of the output: `[tokens, heads, head_dim]`.
    q_rows: Ref<'a>,
    out_rows: Ref<'a>,
    /// KV blocks: `[buffers, pieces of a row, keys, rows of a key, lanes]`.
    kv: Ref<'a>,
    /// A row of q or of the output as f32, by head: `[pieces of a row, heads, sublanes, lanes]`, of which the first
    /// sublane counts. Strided accesses are of 32-bit words. Lanes behind a head's elements are zeros.
    staging: Ref<'a>,
    /// Heads whose elements do not fill their last tile of lanes, zeros behind them: `[heads, lanes]`.
    lanes: Option<Ref<'a>>,
    /// By product, the sinks of its rows, in equal lanes: `[products, rows, lanes]`.
    sinks: Option<Ref<'a>>,
    /// In HBM and in VMEM, the log-sum-exps: `[tokens, 1, lanes]`, a lane for each head.
    lse: Option<[Ref<'a>; 2]>,
    /// Of the row at work, by product: `[products, rows, lanes]` each.
    max: Ref<'a>,
    sum: Ref<'a>,
    acc: Ref<'a>,
    /// The core's sequences that have a row and keys, in the order of work.
    sequences: Ref<'a>,
    arrived: Ref<'a>,
    /// For q, then for the rows of the output.
    moved: Ref<'a>,
    /// Query heads of the core.
    q_heads: usize,
    products: Products,
    fused: Option<Fused<'a>>,
}

/// A place in a core's stream of KV blocks.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// Index in [`Body::sequences`].
    index: Value<'a>,
    /// The block's first page, counted in the sequence.
    page: Value<'a>,
}

impl<'a, 'p> Body<'a, 'p> {
    fn declare(k: &'a Builder<'a>, plan: &'p Plan, batch: Option<(&Batch, Option<usize>)>) -> Self {
        let problem = plan.problem();
        let (types, dim, head_block) = (problem.precision, problem.head_dim, plan.head_block());
        let of_core = batch.and_then(|(_, core)| core);
        let cores = if of_core.is_some() { 1 } else { plan.grid()[0] };
        let split = plan.details().split;
        let [core] = k.grid([(cores, Semantics::Parallel)]);
        let metadata = Metadata::declare(k, problem);
        let products = Products::of(problem, plan.chip());
        let of_heads = Heads::declare(k, problem).in_products(products.kv_heads, block::scale(plan));
        let q = match problem.fused {
            None => k.hbm_input("q", types.q, &problem.q_type().dims),
            Some(_) => k.hbm_input("qkv", types.q, &fused::projected(problem, plan.chip())),
        };
        let cos_sin = problem.fused.map(|_| {
            let [rows, _] = fused::projected(problem, plan.chip());
            k.hbm_input("cos_sin", Element::F32, &[rows, dim])
        });
        let mut kv_pages = k.hbm_input("kv_pages", types.kv, &problem.kv_pages_type().dims);
        let out = k.hbm_output("out", types.output, &plan.output_dims());
        if problem.fused.is_some() {
            kv_pages = k.hbm_output("kv_pages_written", types.kv, &problem.kv_pages_type().dims);
        }
        let lse_dims = [problem.tokens, 1, plan::log_sum_exp_lanes(problem)];
        let lse = problem.log_sum_exp.then(|| k.hbm_output("lse", Element::F32, &lse_dims));
        let scratch = |name, element, dims: &[usize]| k.scratch(name, MemorySpace::Vmem, element, dims);
        let (heads, rows) = (head_block * problem.group(), products.rows);
        let rows_of = |name, element| scratch(name, element, &[problem.tokens, heads, dim]);
        let (q_rows, out_rows, fused) = match cos_sin {
            None => (rows_of("q_rows", types.q), rows_of("out_rows", types.output), None),
            Some(cos_sin) => {
                let (fused, results) = Fused::declare(k, plan, cos_sin);
                (fused.rows.clone(), results, Some(fused))
            }
        };
        let kv = scratch("kv", types.kv, &decode::kv_dims(problem, plan.tiles(), head_block));
        let staging = scratch("staging", Element::F32, &decode::staging_dims(problem, plan.chip(), head_block));
        let count = products.count(head_block);
        let max = scratch("max", Element::F32, &[count, rows, LANES]);
        let sum = scratch("sum", Element::F32, &[count, rows, LANES]);
        let acc = scratch("acc", Element::F32, &[count, rows, block::lanes(problem)[0]]);
        let lanes = decode::is_widened(problem).then(|| scratch("lanes", Element::F32, &[heads, LANES]));
        let sinks = problem.sinks.then(|| scratch("sink_rows", Element::F32, &[count, rows, LANES]));
        let lse = lse.map(|lse| [lse, scratch("lse_rows", Element::F32, &lse_dims)]);
        let in_smem = |name, len| k.scratch(name, MemorySpace::Smem, Element::I32, &[len]);
        let sequences = in_smem("sequences", problem.max_seqs);
        let metadata = metadata.of_batch(k, batch.map(|(batch, _)| batch));
        let arrived = k.dma_semaphores("arrived", &[BUFFERS, decode::semaphores(plan.tiles())]);
        k.unchecked_bounds();
        let moved = k.dma_semaphores("moved", &[if lse.is_some() { 3 } else { 2 }]);
        let core = of_core.map_or(core, |core| k.int(core as i64));
        let num_seqs = metadata.sequences();
        let of_heads = match split {
            Split::Heads => of_heads.from(core * head_block, head_block),
            Split::Nothing | Split::Sequences => of_heads,
        };
        Self {
            k,
            plan,
            split,
            core,
            metadata,
            num_seqs,
            heads: of_heads,
            q,
            kv_pages,
            out,
            q_rows,
            out_rows,
            kv,
            staging,
            lanes,
            sinks,
            lse,
            max,
            sum,
            acc,
            sequences,
            arrived,
            moved,
            q_heads: heads,
            products,
            fused,
        }
    }

    fn write(&self) {
        let k = self.k;
        let copy_queries = || k.async_copy(self.heads_of(&self.q), self.q_rows.clone(), self.moved.at(0));
        let queries = self.fused.is_none().then(copy_queries);
        if let Some(fused) = &self.fused {
            self.begin_rows(fused);
        }
        let Share { count, rows } = self.share();
        let ahead = k.fold_range(0, BUFFERS, (k.int(0), k.int(NEW)), |slot, (index, page)| {
            let next = self.fetch(Place { index, page }, count, slot, true);
            (next.index, next.page)
        });
        self.staging.store(0.0);
        if let Some(lanes) = &self.lanes {
            lanes.store(0.0);
        }
        self.list_sinks();
        if let Some(queries) = queries {
            queries.wait();
        }
        if let Some(fused) = &self.fused {
            self.turn_rows(fused);
        }
        k.fold_range(0, count, (k.int(0), ahead), |index, (slot, ahead)| {
            let sequence = self.sequences.at(index).load();
            let kv_len = self.metadata.kv_len(sequence);
            let token = self.metadata.first_row(sequence);
            self.begin(token);
            let (slot, _, ahead) = k.while_loop(
                (slot, self.begin_of(kv_len), ahead),
                |(_, page, _)| (page * self.plan.problem().page_size).less(kv_len),
                |(slot, page, (index, next))| {
                    self.attend(page, slot, kv_len, [sequence, token]);
                    let ahead = self.fetch(Place { index, page: next }, count, slot, false);
                    (next_slot(slot), page + self.plan.tiles().kv_pages, (ahead.index, ahead.page))
                },
            );
            self.finish(token);
            (slot, ahead)
        });
        match &self.fused {
            Some(fused) if fused.is_flat => self.send_rows(fused),
            _ => self.sent(rows),
        }
        if let Some(fused) = &self.fused {
            self.tokens_sent(fused, count);
        }
    }

    /// A core's part of the heads of an array of rows.
    fn heads_of(&self, rows: &Ref<'a>) -> Ref<'a> {
        let heads = self.q_heads;
        match self.split {
            Split::Heads => rows.slice(1, (self.core * heads).multiple_of(heads), heads),
            Split::Nothing | Split::Sequences => rows.clone(),
        }
    }

    /// Lists the core's sequences, and writes zeros to its rows that see no key.
    fn share(&self) -> Share<'a> {
        let (k, tokens) = (self.k, self.plan.problem().tokens);
        let is_split = self.split == Split::Sequences;
        let of = |sequence: Value<'a>| {
            let row = self.metadata.first_row(sequence);
            let rows = self.metadata.first_row(sequence + 1) - row;
            let keys = self.metadata.kv_len(sequence) * rows;
            (row, rows, keys)
        };
        let load = |rows: Value<'a>, keys: Value<'a>| keys + rows * decode::fixed_keys(self.plan) as i64;
        let total = match is_split {
            true => k.fold_range(0, self.num_seqs, k.int(0), |sequence, total| {
                let (_, rows, keys) = of(sequence);
                total + load(rows, keys)
            }),
            false => k.int(0),
        };
        let none = (k.int(0), k.int(0), k.int(0));
        let (count, _, rows) = k.fold_range(0, self.num_seqs, none, |step, (count, before, all_rows)| {
            // From the front on the first core, from the back on the second.
            let sequence = if is_split { step + self.core * (self.num_seqs - 1 - step * 2) } else { step };
            let (row, rows, keys) = of(sequence);
            let (rows, before) = match is_split {
                // The sign: 1 where the middle of the load is in the core's half.
                true => {
                    let load = load(rows, keys);
                    let mine = (before * 2 + load - self.core - total).shift_right_logical(31);
                    (rows * mine, before + load)
                }
                false => (rows, before),
            };
            self.sequences.at(count).store(sequence);
            if !self.is_flat() {
                k.when(rows.greater(keys), || self.blank(row));
            }
            (count + rows * keys.minimum(1), before, all_rows + rows)
        });
        // The last core has the rows that no sequence has.
        let padding = self.metadata.first_row(self.num_seqs);
        let padding = if is_split { self.core * (padding - tokens as i64) + tokens as i64 } else { padding };
        if !self.is_flat() {
            k.for_range(padding, tokens, |row| self.blank(row));
        }
        Share { count, rows: rows + tokens as i64 - padding }
    }

    /// Writes zeros to a row of the output.
    fn blank(&self, row: Value<'a>) {
        self.out_rows.at(row).store(0.0);
        if let Some([_, rows]) = &self.lse {
            rows.at(row).store(0.0);
        }
        self.send(row);
    }

    /// Starts the copy of a row of the output.
    fn send(&self, row: Value<'a>) {
        let to = self.heads_of(&self.out).at(row);
        self.k.make_async_copy(self.out_rows.at(row), to, self.moved.at(1)).start();
        if let Some([lse, rows]) = &self.lse {
            self.k.make_async_copy(rows.at(row), lse.at(row), self.moved.at(2)).start();
        }
    }

    /// Waits until `rows` rows are written.
    fn sent(&self, rows: Value<'a>) {
        let (k, tokens) = (self.k, self.plan.problem().tokens);
        let wait = |rows: usize| {
            let of = |array: &Ref<'a>| array.slice(0, 0, rows);
            k.make_async_copy(of(&self.out_rows), of(&self.heads_of(&self.out)), self.moved.at(1)).wait();
            if let Some([lse, lse_rows]) = &self.lse {
                k.make_async_copy(of(lse_rows), of(lse), self.moved.at(2)).wait();
            }
        };
        if self.split != Split::Sequences {
            return wait(tokens);
        }
        let powers = (0..).map(|power| 1_usize << power).take_while(|&power| power <= tokens);
        powers.for_each(|power| k.when((rows & power as i64).differs(0), || wait(power)));
    }

    /// The first page of a sequence that its row sees.
    fn begin_of(&self, kv_len: Value<'a>) -> Value<'a> {
        match self.plan.problem().sliding_window {
            None => self.k.int(0),
            Some(window) => (kv_len - window as i64).maximum(0) / self.plan.problem().page_size,
        }
    }

    /// Starts the copies of the block at a place in the stream to a buffer, if there is one; the next place. A buffer's first
    /// block leaves none of it unwritten.
    fn fetch(&self, place: Place<'a>, count: Value<'a>, slot: Value<'a>, is_first: bool) -> Place<'a> {
        let (k, Place { index, page }) = (self.k, place);
        let [index, page] = k.if_else(
            index.less(count),
            || {
                let sequence = self.sequences.at(index).load();
                let kv_len = self.metadata.kv_len(sequence);
                let page = page.less(0).select(self.begin_of(kv_len), page);
                if is_first {
                    k.when(kv_len.less((page + self.plan.tiles().kv_pages) * self.page_size()), || self.clear(slot));
                }
                self.pages(page, kv_len, |number, place| {
                    self.page(self.metadata.page(sequence, number), slot, place).start();
                });
                let next = page + self.plan.tiles().kv_pages;
                let more = (next * self.page_size()).less(kv_len);
                [more.select(index, index + 1), more.select(next, NEW)]
            },
            || [index, page],
        );
        Place { index, page }
    }

    /// Writes zeros to a buffer.
    fn clear(&self, slot: Value<'a>) {
        let pieces = self.kv.dims()[1];
        self.k.for_range(0, self.plan.tiles().kv_pages, |place| {
            for piece in 0..pieces {
                let place = self.place(slot, piece, place);
                match self.plan.problem().precision.kv.bytes() {
                    1 => place.bitcast(Element::I32).store(0),
                    _ => place.store(0.0),
                }
            }
        });
    }

    fn page_size(&self) -> usize {
        self.plan.problem().page_size
    }

    /// A page's place in a buffer.
    fn place(&self, slot: Value<'a>, piece: usize, place: Value<'a>) -> Ref<'a> {
        let start = (place * self.page_size()).multiple_of(self.page_size());
        self.kv.at((slot, piece)).slice(0, start, self.page_size())
    }

    /// Goes through the pages of a block that the sequence has: `of(page of the sequence, place in the block)`.
    fn pages(&self, page: Value<'a>, kv_len: Value<'a>, of: impl Fn(Value<'a>, Value<'a>)) {
        let (k, pages) = (self.k, self.plan.tiles().kv_pages);
        let last = (page + (pages as i64 - 1)) * self.page_size();
        k.if_else(
            last.less(kv_len),
            || (0..pages).for_each(|place| of(page + place, k.int(place as i64))),
            || {
                k.while_loop(
                    k.int(0),
                    |place| ((page + place) * self.page_size()).less(kv_len),
                    |place| {
                        of(page + place, place);
                        place + 1
                    },
                );
            },
        );
    }

    /// A core's part of the rows of tokens: `[tokens, rows, head_dim]`.
    fn heads_of_page(&self, tokens: Ref<'a>) -> Ref<'a> {
        let kv_rows = self.plan.token_rows();
        match self.split {
            Split::Heads => tokens.slice(1, (self.core * kv_rows).multiple_of(kv_rows), kv_rows),
            Split::Nothing | Split::Sequences => tokens,
        }
    }

    /// The copies of the page at `index` of the cache to a place of a buffer.
    fn page(&self, index: Value<'a>, slot: Value<'a>, place: Value<'a>) -> Copies<'a> {
        let source = self.heads_of_page(self.kv_pages.at(index));
        let kv_rows = self.plan.token_rows();
        let semaphore = place & (self.arrived.dims()[1] as i64 - 1);
        let &[_, pieces, _, _, lanes] = &self.kv.dims()[..] else { unreachable!("it has five dimensions") };
        let copies = (0..pieces).map(|piece| {
            let to = self.place(slot, piece, place).slice(1, 0, kv_rows);
            self.k.make_async_copy(source.slice(2, piece * lanes, lanes), to, self.arrived.at((slot, semaphore)))
        });
        Copies(copies.collect())
    }

    /// A row's queries, by head; nothing seen yet.
    fn begin(&self, token: Value<'a>) {
        let (heads, dim) = (self.q_heads, self.plan.problem().head_dim);
        for (lane, piece) in self.staging_pieces() {
            let lanes = piece.dims()[1].min(dim - lane);
            let row = match &self.fused {
                None => self.q_rows.at(token).slice(1, lane, lanes).load().cast(Element::F32),
                Some(fused) => fused.row(lane / LANES, token, [heads, lanes]).load(),
            };
            let row = match self.lanes.as_ref().filter(|_| lanes < piece.dims()[1]) {
                None => row,
                Some(wide) => {
                    wide.slice(1, 0, lanes).store(row);
                    wide.load()
                }
            };
            piece.strided(0, 0, heads, SUBLANES).store(row);
        }
        self.max.store(NONE);
        self.sum.store(0.0);
        self.acc.store(0.0);
    }

    /// The pieces of a row as rows of words, and the lane that each begins at.
    fn staging_pieces(&self) -> impl Iterator<Item = (usize, Ref<'a>)> {
        let &[pieces, heads, sublanes, lanes] = &self.staging.dims()[..] else { unreachable!("four dimensions") };
        (0..pieces).map(move |piece| (piece * lanes, self.staging.at(piece).reshape(&[heads * sublanes, lanes])))
    }

    /// `count` query heads of a product in [`Body::staging`].
    fn staged(&self, product: usize, count: usize) -> Strided<'a> {
        let pieces = self.staging_pieces().map(|(_, piece)| piece).collect();
        Strided { pieces, start: product * self.products.q_heads * SUBLANES, count, stride: SUBLANES }
    }

    /// Divides, and sends the row on its way.
    fn finish(&self, token: Value<'a>) {
        let (problem, heads) = (self.plan.problem(), self.q_heads);
        let (group, [columns, first]) = (self.products.q_heads, block::lanes(problem));
        let totals: Vec<_> = (0..self.products.count(self.plan.head_block()))
            .map(|product| {
                let sink = self.sinks.as_ref().map(|sinks| sinks.at(product).load());
                self.heads.total(product, &self.max.at(product), self.sum.at(product).load(), sink)
            })
            .collect();
        for (product, total) in totals.iter().enumerate() {
            let acc = self.acc.at(product).load();
            let acc = match total.factor {
                None => acc,
                Some(factor) if factor.dims().is_empty() => acc * factor,
                Some(factor) => acc * broadcast_lanes(self.k, factor, columns),
            };
            let sum = if total.sum.dims()[1] == 1 { total.sum } else { broadcast_lanes(self.k, total.sum, columns) };
            let result = to_the_front(self.k, acc / sum, first);
            let count = group.min(heads - product * group);
            self.staged(product, count).store(result.slice(&[0, 0], &[count, columns]));
        }
        if let Some([_, rows]) = &self.lse {
            let of_products: Vec<_> = totals.iter().filter_map(|total| total.log_sum_exp).collect();
            self.store_log_sum_exps(&rows.at(token), &of_products);
        }
        if let Some(fused) = self.fused.as_ref().filter(|fused| fused.is_flat) {
            for (lane, piece) in self.staging_pieces() {
                let row = fused.row(lane / LANES, token, [heads, piece.dims()[1]]);
                row.store(piece.strided(0, 0, heads, SUBLANES).load());
            }
            return;
        }
        let row = self.out_rows.at(token);
        for (lane, piece) in self.staging_pieces() {
            let lanes = piece.dims()[1].min(problem.head_dim - lane);
            let result = piece.strided(0, 0, heads, SUBLANES).load().slice(&[0, 0], &[heads, lanes]);
            row.slice(1, lane, lanes).store(result.cast(problem.precision.output));
        }
        self.send(token);
    }

    /// Writes the log-sum-exps of a row's heads, given by product as `[rows, lanes]` of equal lanes, into a lane each.
    fn store_log_sum_exps(&self, row: &Ref<'a>, of_products: &[Value<'a>]) {
        let (k, group) = (self.k, self.products.q_heads);
        for first in (0..row.dims()[1]).step_by(LANES) {
            let of_tile = |product: &usize| product * group < first + LANES && (product + 1) * group > first;
            let tile = (0..of_products.len()).filter(of_tile).map(|product| {
                let dims = of_products[product].dims();
                // The lane of a member of the group.
                let lane = k.iota(&dims, 0) + (product * group) as i64 - first as i64;
                let is_member = k.iota(&dims, 0).less(group) & k.iota(&dims, 1).equals(lane);
                is_member.select(of_products[product], 0.0)
            });
            let tile = tile.reduce(|sum, of| sum + of).expect("a head in every tile of lanes");
            row.slice(1, first, LANES).store(tile.sum(0));
        }
    }

    /// Writes the sinks of each product's rows.
    fn list_sinks(&self) {
        let Some(sinks) = &self.sinks else { return };
        let group = self.products.q_heads;
        sinks.store(0.0);
        for head in 0..self.q_heads {
            if let Some(sink) = self.heads.sink(head) {
                sinks.at(head / group).slice(0, head % group, 1).store(sink);
            }
        }
    }

    /// Lets the row `token` of `sequence` see the keys of a block.
    fn attend(&self, page: Value<'a>, slot: Value<'a>, kv_len: Value<'a>, [sequence, token]: [Value<'a>; 2]) {
        let (k, problem, keys) = (self.k, self.plan.problem(), self.plan.keys());
        self.pages(page, kv_len, |_, place| self.page(k.int(0), slot, place).wait());
        let live = kv_len - page * problem.page_size;
        if let Some(fused) = &self.fused {
            k.when(live.less_equal(keys), || self.append(fused, [sequence, token], slot, [live, kv_len]));
        }
        let block = Block::new(k, &self.kv.at(slot), self.plan);
        let masked = |width: usize| self.heads(&block, width, Some(live));
        let widths = self.plan.widths();
        match problem.sliding_window {
            None => {
                k.if_else(live.less(keys), || self.narrowest(&widths, live, &masked), || self.heads(&block, keys, None))
            }
            Some(_) => self.narrowest(&widths, live, &masked),
        }
    }

    /// Goes on with the first of `widths` that holds the `live` keys.
    fn narrowest(&self, widths: &[usize], live: Value<'a>, of: &dyn Fn(usize)) {
        match *widths {
            [] => {}
            [width] => of(width),
            [width, ref wider @ ..] => {
                self.k.if_else(live.less_equal(width), || of(width), || self.narrowest(wider, live, of));
            }
        }
    }

    /// A step of the online softmax for every head, over the first `keys` keys of a block, of which `live` count.
    fn heads(&self, block: &Block<'a>, keys: usize, live: Option<Value<'a>>) {
        let (k, problem, Products { kv_heads, rows, .. }) = (self.k, self.plan.problem(), self.products);
        let seen = |first: usize, dims: &[usize]| {
            let live = live.map(|live| live - (first / kv_heads) as i64);
            if live.is_none() && kv_heads == 1 {
                return None;
            }
            let index = k.iota(dims, 1);
            // In twos, two tokens of one head and then of the other.
            let (token, is_own) = match kv_heads {
                1 => (index, None),
                _ => {
                    let is_second = k.iota(dims, 0).greater_equal(problem.group()).select(2, 0);
                    (((index & !3) >> 1) + (index & 1), Some((index & 2).equals(is_second)))
                }
            };
            let seen = live.map(|live| match problem.sliding_window {
                None => token.less(live),
                Some(window) => token.less(live) & token.greater_equal(live - window as i64),
            });
            [is_own, seen].into_iter().flatten().reduce(|own, seen| own & seen)
        };
        let step = FewRows {
            k,
            problem,
            heads: &self.heads,
            block,
            kv_heads,
            keys,
            live,
            // Fewer keys than a block has are the last ones: then only what comes behind all keys asks for their maximum.
            keeps_maxima: keys == self.plan.keys() || problem.sinks || problem.log_sum_exp,
            queries: &|product| self.staged(product, rows).load(k).cast(problem.precision.q),
            state: &|product| [&self.max, &self.sum, &self.acc].map(|of| of.at(product)),
            seen: &seen,
        };
        step.write(self.products.count(self.plan.head_block()));
    }
}

/// Stands for the first page of a sequence that its row sees.
const NEW: i64 = -1;

/// What a core has to do.
struct Share<'a> {
    /// Sequences that have a row and keys.
    count: Value<'a>,
    /// Rows of the output.
    rows: Value<'a>,
}

/// The copies of a page, one to a piece of its rows.
struct Copies<'a>(Vec<Dma<'a>>);

impl Copies<'_> {
    fn start(&self) {
        self.0.iter().for_each(Dma::start);
    }

    fn wait(&self) {
        self.0.iter().for_each(Dma::wait);
    }
}

/// Columns from `first` on, then anything; `first` is within the first tile of lanes.
fn to_the_front<'a>(k: &'a Builder<'a>, tile: Value<'a>, first: usize) -> Value<'a> {
    if first == 0 {
        return tile;
    }
    let rows = tile.dims()[0];
    let turned = |lane: usize| tile.slice(&[0, lane], &[rows, LANES]).rotate(LANES - first, 1);
    let starts: Vec<_> = (0..tile.dims()[1]).step_by(LANES).collect();
    let tiles: Vec<_> = starts
        .iter()
        .map(|&lane| match starts.contains(&(lane + LANES)) {
            false => turned(lane),
            true => k.iota(&[rows, LANES], 1).less(LANES - first).select(turned(lane), turned(lane + LANES)),
        })
        .collect();
    super::joined(k, &tiles, 1)
}

/// The buffer after `slot`: the first one after the last.
fn next_slot(slot: Value<'_>) -> Value<'_> {
    let [next, same] = [slot + 1; 2];
    next.equals(BUFFERS).select(next - same, next)
}
