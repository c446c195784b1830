//! What the kernel of any batch does when it is fused: tokens of the new rows into the pages, queries turned.
//!
//! A core goes through the rows of the batch, [`plan::fused::rows`] at a time, copies ahead, turns their keys and makes tokens
//! of the cache of them, which copies bring to their pages: one for each run of rows of one sequence and page. Where cores
//! share the heads, or there is one, a core reads what it wrote: attention begins when its copies are over.
//!
//! Where cores share the work, a core may attend over rows that the other one writes, and nothing says when that is done. So
//! each core makes the tokens of all rows for itself, in memory that is an output of the kernel and of no use to anybody else
//! ([`Written::fresh`]), and writes every other run of rows into the pages. Of a page it reads the tokens that were there
//! before, and the new ones from its own memory.

use pagoda_ir::{
    Element,
    mosaic::{Builder, Dma, MemorySpace, Ref, Value, tiling::LANES},
};

use super::{
    super::fused::{Angles, head, store_tokens},
    Body, Entry,
};
use crate::rpa::{
    kv_layout::Half,
    plan::{
        self, Plan,
        fused::{BUFFERS, Columns, TokenBuffers},
    },
};

/// What is in HBM beside the projections.
pub(super) struct Written<'a> {
    /// The angles of each row.
    pub cos_sin: Ref<'a>,
    /// The pages, which share the memory of those that came in.
    pub kv_pages: Ref<'a>,
    /// Where cores share the work: the tokens of every row, of each core its own: `[cores, rows, rows of a token, head_dim]`.
    pub fresh: Option<Ref<'a>>,
}

impl<'a> Written<'a> {
    /// Declares the core's own memory, behind the other outputs.
    pub fn declare(k: &'a Builder<'a>, plan: &Plan, cos_sin: Ref<'a>, kv_pages: Ref<'a>) -> Self {
        let fresh = plan.fresh_tokens().map(|ty| k.hbm_output("fresh", ty.element, &ty.dims));
        Self { cos_sin, kv_pages, fresh }
    }
}

/// What a fused kernel has beside one that is not.
pub(super) struct Fused<'a> {
    pub written: Written<'a>,
    /// Angles of this entry's queries and of the next one's: `[2, rows, head_dim]`.
    pub angles: Ref<'a>,
    pub angles_arrived: Ref<'a>,
    /// Keys and values of some rows: `[buffers, rows, columns]`.
    projected: Ref<'a>,
    /// Their angles: `[buffers, rows, head_dim]`.
    new_angles: Ref<'a>,
    /// The tokens made of them, or the KV blocks whose memory they take: `[buffers, pieces of a row, tokens, rows of a token,
    /// lanes]`.
    new_tokens: Ref<'a>,
    token_buffers: TokenBuffers,
    /// For the angles of heads that are not whole tiles of lanes.
    wide: Option<Ref<'a>>,
    arrived: Ref<'a>,
    sent: Ref<'a>,
}

impl<'a> Fused<'a> {
    /// Declares the buffers of [`plan::fused::buffers`], and semaphores.
    pub fn declare(k: &'a Builder<'a>, plan: &Plan, written: Written<'a>, kv: &Ref<'a>) -> Self {
        let (problem, heads) = (plan.problem(), plan.head_block());
        let scratch = |name, element, dims: &[usize]| k.scratch(name, MemorySpace::Vmem, element, dims);
        let (dim, block, rows) = (problem.head_dim, plan.block_rows(), plan::fused::rows(problem, plan.chip()));
        let columns = Columns::new_tokens(problem, heads);
        let [pieces, tokens, token_rows, lanes] = plan::fused::token_dims(problem, heads, rows);
        let angles = scratch("angles", Element::F32, &[2, block, dim]);
        let projected = scratch("projected", problem.precision.q, &[BUFFERS, rows, columns.count()]);
        let new_angles = scratch("new_angles", Element::F32, &[BUFFERS, rows, dim]);
        let dims = [BUFFERS, pieces, tokens, token_rows, lanes];
        let token_buffers = TokenBuffers::of(problem, plan.chip(), plan.kv_dims());
        let new_tokens = match token_buffers {
            TokenBuffers::Own => scratch("new_tokens", problem.precision.kv, &dims),
            _ => kv.clone(),
        };
        let most = plan::fused::steps(problem, plan.chip(), heads, block).into_iter().max().unwrap_or(0);
        let wide = plan::fused::has_narrow_heads(problem).then(|| scratch("wide", Element::F32, &[most, LANES]));
        let angles_arrived = k.dma_semaphores("angles_arrived", &[2]);
        let arrived = k.dma_semaphores("projected_arrived", &[BUFFERS, columns.parts.len() + 1]);
        let sent = k.dma_semaphores("tokens_sent", &[BUFFERS]);
        Self { written, angles, angles_arrived, projected, new_angles, new_tokens, token_buffers, wide, arrived, sent }
    }

    /// Of the tokens in a buffer those from `first` on, `count` at most, a piece of their rows: `[tokens, rows of a token,
    /// lanes]`.
    fn tokens(&self, [slot, first]: [Value<'a>; 2], count: usize, piece: usize) -> Ref<'a> {
        let rows = self.new_angles.dims()[1];
        match self.token_buffers {
            TokenBuffers::FirstKvBlock => self.new_tokens.at((0, piece)).slice(0, slot * rows + first, count),
            _ => self.new_tokens.at((slot, piece)).slice(0, first, count),
        }
    }
}

impl<'a> Body<'a, '_> {
    /// New rows whose keys and values become tokens at a time.
    fn new_rows(&self) -> usize {
        plan::fused::rows(self.plan.problem(), self.plan.chip())
    }

    /// How many times rows are taken, and the copies of the first ones started.
    pub(super) fn begin_new_tokens(&self, fused: &Fused<'a>) -> Value<'a> {
        let (k, rows) = (self.k, self.new_rows());
        let chunks = match fused.written.fresh {
            None => self.live_rows().div_ceil(rows),
            Some(_) => k.int(self.plan.padded_rows()[0].div_ceil(rows) as i64),
        };
        if let Some(wide) = &fused.wide {
            wide.store(0.0);
        }
        for chunk in 0..BUFFERS - 1 {
            let chunk = k.int(chunk as i64);
            k.when(chunk.less(chunks), || self.copy_projected(fused, chunk, chunk, |dma| dma.start()));
        }
        chunks
    }

    /// Makes tokens of all rows, and has them where attention reads them.
    pub(super) fn write_new_tokens(&self, fused: &Fused<'a>, chunks: Value<'a>) {
        let k = self.k;
        let after = |slot: Value<'a>, by: usize| {
            let next = slot + by;
            next.less(BUFFERS).select(next, next - BUFFERS as i64)
        };
        let nothing = (k.int(0), k.int(0), [k.int(0); BUFFERS]);
        let (slot, _, sent) = k.fold_range(0, chunks, nothing, |chunk, (slot, sequence, sent)| {
            let ahead = chunk + (BUFFERS - 1);
            k.when(ahead.less(chunks), || {
                self.copy_projected(fused, ahead, after(slot, BUFFERS - 1), |dma| dma.start());
            });
            self.copy_projected(fused, chunk, slot, |dma| dma.wait());
            let [oldest, next, last] = sent;
            self.tokens_sent(fused, slot, oldest);
            self.make_tokens(fused, slot);
            let (sequence, count) = self.send_tokens(fused, chunk, slot, sequence);
            (after(slot, 1), sequence, [next, last, count])
        });
        for (by, count) in sent.into_iter().enumerate() {
            self.tokens_sent(fused, after(slot, by), count);
        }
    }

    /// Rows that belong to a sequence.
    fn live_rows(&self) -> Value<'a> {
        self.metadata.first_row(self.metadata.sequences())
    }

    /// The first row that is copied with others: whole tiles, all of them rows of the array.
    fn first_copied(&self, chunk: Value<'a>) -> Value<'a> {
        let (rows, all) = (self.new_rows(), self.plan.padded_rows()[0]);
        match rows == all {
            true => self.k.int(0),
            false => (chunk * rows).minimum((all - rows) as i64).multiple_of(self.plan.band()),
        }
    }

    /// The copies of the projections of some rows, and of their angles, into a buffer.
    fn copy_projected(&self, fused: &Fused<'a>, chunk: Value<'a>, slot: Value<'a>, act: impl Fn(Dma<'a>)) {
        let (k, problem) = (self.k, self.plan.problem());
        let (start, rows) = (self.first_copied(chunk), self.new_rows());
        let mut done = 0;
        let Columns { parts, .. } = Columns::new_tokens(problem, self.plan.head_block());
        for (index, part) in parts.iter().enumerate() {
            let from = self.q.slice(0, start, rows);
            let from = match part.per_core {
                0 => from.slice(1, part.from, part.columns),
                by => from.slice(1, (self.core * by + part.from).multiple_of(LANES), part.columns),
            };
            let to = fused.projected.at(slot).slice(1, done, part.columns);
            act(k.make_async_copy(from, to, fused.arrived.at((slot, index))));
            done += part.columns;
        }
        let [from, to] = [fused.written.cos_sin.slice(0, start, rows), fused.new_angles.at(slot)];
        act(k.make_async_copy(from, to, fused.arrived.at((slot, parts.len()))));
    }

    /// Tokens of the rows in a buffer.
    fn make_tokens(&self, fused: &Fused<'a>, slot: Value<'a>) {
        let (k, problem, heads) = (self.k, self.plan.problem(), self.plan.head_block());
        let (dim, rows) = (problem.head_dim, self.new_rows());
        let [_, step] = plan::fused::steps(problem, self.plan.chip(), heads, self.plan.block_rows());
        let first = Columns::new_tokens(problem, heads).first;
        let pieces = fused.new_tokens.dims()[1];
        k.for_range(0, rows / step, |index| {
            let start = (index * step).multiple_of(step);
            let angles = Angles::load(k, &fused.new_angles.at(slot).slice(0, start, step), fused.wide.as_ref());
            let columns = fused.projected.at(slot).slice(0, start, step);
            let tokens: Vec<_> = (0..pieces).map(|piece| fused.tokens([slot, start], step, piece)).collect();
            store_tokens(k, problem, heads, &tokens, |half, of| {
                let numbers = head(k, dim, &columns, first + (half as usize * heads + of) * dim);
                let numbers = if half == Half::Key { angles.turn(k, dim, &numbers) } else { numbers };
                self.heads.stored(half, of, numbers)
            });
        });
    }

    /// Starts the copies of a buffer's tokens: to the pages, the first of which is one of `sequence` or of a later one, and to
    /// the core's own memory. The sequence of the last row, and how many tokens are copied.
    fn send_tokens(
        &self,
        fused: &Fused<'a>,
        chunk: Value<'a>,
        slot: Value<'a>,
        sequence: Value<'a>,
    ) -> (Value<'a>, Value<'a>) {
        let (k, problem) = (self.k, self.plan.problem());
        let (rows, page_size) = (self.new_rows(), problem.page_size);
        let (first, start) = (chunk * rows, self.first_copied(chunk));
        let end = (first + rows).minimum(self.live_rows());
        let (end, own) = match &fused.written.fresh {
            None => (end, k.int(0)),
            Some(fresh) => {
                let count = (self.plan.padded_rows()[0] as i64 - first).minimum(rows);
                let fresh = fresh.at(self.core).slice(0, first, rows);
                self.copy_tokens(fused, slot, first - start, fresh, count);
                // Every other run of rows is written by this core.
                ((chunk & 1).equals(self.core).select(end, first), count)
            }
        };
        let most = rows.min(page_size);
        let (_, sequence, sent) = k.while_loop(
            (first, sequence, own),
            |(row, ..)| row.less(end),
            |(row, sequence, sent)| {
                let sequence = k.while_loop(
                    sequence,
                    |sequence| self.metadata.first_row(sequence + 1).less_equal(row),
                    |sequence| sequence + 1,
                );
                let (stop, kv_len) = (self.metadata.first_row(sequence + 1), self.metadata.kv_len(sequence));
                let position = kv_len - stop + row;
                let is_live = kv_len.greater(0);
                let (number, offset) = (position / page_size, position % page_size);
                let count = stop.minimum(end) - row;
                let count = is_live.select(count.minimum(page_size as i64 - offset), count);
                k.when(is_live, || {
                    let page = self.of_core(&fused.written.kv_pages.at(self.metadata.page(sequence, number)));
                    self.copy_tokens(fused, slot, row - start, page.slice(0, offset, most), count);
                });
                (row + count, sequence, is_live.select(sent + count, sent))
            },
        );
        (sequence, sent)
    }

    /// The rows of a page's tokens that belong to the core's heads.
    fn of_core(&self, page: &Ref<'a>) -> Ref<'a> {
        let rows = self.plan.token_rows();
        match self.plan.head_block() < self.plan.problem().kv_heads {
            true => page.slice(1, (self.core * rows).multiple_of(rows), rows),
            false => page.clone(),
        }
    }

    /// Starts the copy of `count` tokens of a buffer, from `first` on.
    fn copy_tokens(&self, fused: &Fused<'a>, slot: Value<'a>, first: Value<'a>, to: Ref<'a>, count: Value<'a>) {
        let &[_, pieces, _, _, lanes] = &fused.new_tokens.dims()[..] else { unreachable!("five dimensions") };
        let &[most, rows, _] = &to.dims()[..] else { unreachable!("tokens have rows of lanes") };
        for piece in 0..pieces {
            let from = fused.tokens([slot, first], most, piece).slice(1, 0, rows);
            let to = to.slice(2, piece * lanes, lanes);
            self.k.make_async_copy(from, to, fused.sent.at(slot)).first(count).start();
        }
    }

    /// Waits until `count` tokens have left a buffer.
    fn tokens_sent(&self, fused: &Fused<'a>, slot: Value<'a>, count: Value<'a>) {
        let k = self.k;
        let pieces = fused.new_tokens.dims()[1];
        let rows = self.plan.token_rows();
        let most = self.new_rows();
        // Two copies of each, where the core has memory of its own.
        let tokens = |piece: usize, count: Value<'a>| {
            let tokens = fused.tokens([slot, k.int(0)], most, piece).slice(1, 0, rows);
            k.make_async_copy(tokens.clone(), tokens, fused.sent.at(slot)).first(count).wait();
        };
        for piece in 0..pieces {
            match &fused.written.fresh {
                None => k.when(count.greater(0), || tokens(piece, count)),
                Some(_) => {
                    k.when(count.greater(0), || tokens(piece, count.minimum(most)));
                    k.when(count.greater(most), || tokens(piece, count - most as i64));
                }
            }
        }
    }

    /// As [`Body::page`], of page `number` to a buffer's token `start`, of a sequence of `kv_len` tokens of which those behind
    /// the `before` first ones are in the core's own memory.
    pub(super) fn page_or_fresh(
        &self,
        fresh: &Ref<'a>,
        sequence: Value<'a>,
        [number, start]: [Value<'a>; 2],
        [kv_len, before]: [Value<'a>; 2],
        slot: Value<'a>,
        act: &dyn Fn(Dma<'a>),
    ) {
        let (k, problem) = (self.k, self.plan.problem());
        let (size, rows) = (problem.page_size, self.plan.token_rows());
        let [_, pieces, keys, _, lanes] = self.plan.kv_dims();
        let begin = number * size;
        let old = (before - begin).maximum(0);
        let copy = |from: &Ref<'a>, first: Value<'a>, count: Value<'a>| {
            let most = from.dims()[0];
            for piece in 0..pieces {
                let to = self.kv.at((slot, piece)).slice(0, first, most).slice(1, 0, rows);
                act(k.make_async_copy(from.slice(2, piece * lanes, lanes), to, self.arrived.at(slot)).first(count));
            }
        };
        k.when(old.greater(0), || copy(&self.kv_pages.at(self.metadata.page(sequence, number)), start, old));
        let count = (kv_len - begin).minimum(size) - old;
        let most = size.min(fresh.dims()[1]).min(keys);
        let new = fresh.at(self.core).slice(0, self.metadata.first_row(sequence) + begin + old - before, most);
        copy(&new, start + old, count);
    }

    /// Turns the first `rows` rows of an entry's queries, and brings them into order by head where heads are not whole tiles
    /// of lanes.
    pub(super) fn turn_queries(&self, fused: &Fused<'a>, entry: Entry<'a>, rows: usize) {
        let (k, problem, slot) = (self.k, self.plan.problem(), entry.number & 1);
        let (dim, heads, element) = (problem.head_dim, self.plan.head_block(), problem.precision.q);
        let [step, _] = plan::fused::steps(problem, self.plan.chip(), heads, rows);
        let turn = |start: Value<'a>| {
            let rows_of = |array: &Ref<'a>| array.slice(0, start, step);
            let angles = Angles::load(k, &rows_of(&fused.angles.at(slot)), fused.wide.as_ref());
            let queries = rows_of(&self.queries.at(entry.slot));
            for of in 0..heads * problem.group() {
                let turned = angles.turn(k, dim, &head(k, dim, &queries, of * dim));
                match &self.by_head {
                    Some(by_head) => {
                        // Behind a head's elements are those of values, which products take with zeros.
                        let columns = by_head.dims()[2];
                        let lanes = match columns > dim {
                            true => k.iota(&turned[0].dims(), 1).less(dim).select(turned[0], 0.0),
                            false => turned[0].slice(&[0, 0], &[step, dim]),
                        };
                        rows_of(&by_head.at(of)).store(lanes.cast(element));
                    }
                    None => {
                        for (piece, turned) in turned.into_iter().enumerate() {
                            queries.slice(1, of * dim + piece * LANES, LANES).store(turned.cast(element));
                        }
                    }
                }
            }
        };
        k.for_range(0, rows / step, |index| turn((index * step).multiple_of(step)));
    }
}
