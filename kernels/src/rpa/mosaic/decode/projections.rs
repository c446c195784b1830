//! What the decode kernel does when it is fused: rows of queries and new tokens from the projections, new tokens into pages,
//! and the output as the next matrix product takes it.

use pagoda_ir::{
    Element,
    mosaic::{Builder, Dma, MemorySpace, Ref, Value, tiling::LANES},
};

use super::{
    super::fused::{Angles, head, store_tokens, to_columns},
    Body,
};
use crate::rpa::{
    kv_layout::Half,
    plan::{
        Plan, decode,
        fused::{self, Columns},
    },
};

/// What a fused kernel has beside one that is not.
pub(super) struct Fused<'a> {
    cos_sin: Ref<'a>,
    /// Whether the output is in two dimensions.
    pub is_flat: bool,
    /// The queries of each row; where the output is flat, its results from [`Body::finish`] on: `[pieces, rows, heads, lanes]`.
    pub rows: Ref<'a>,
    /// The new token of each row: `[pieces, rows, rows of a token, lanes]`.
    new_tokens: Ref<'a>,
    /// Some rows of the projections: `[rows, columns]`.
    projected: Ref<'a>,
    /// Their angles: `[rows, head_dim]`.
    angles: Ref<'a>,
    /// For the angles of heads that are not whole tiles of lanes.
    wide: Option<Ref<'a>>,
    /// Where the output is flat: some rows of it, `[rows, columns]`.
    results: Ref<'a>,
    /// For the projections, part by part, the angles, the results, and the tokens.
    moved: Ref<'a>,
}

/// [`Fused::moved`] of the angles, of results and of tokens, counted from the last one.
const ANGLES: usize = 3;
const RESULTS: usize = 2;
const TOKENS: usize = 1;

impl<'a> Fused<'a> {
    /// Declares buffers and semaphores; also where the output's rows are made.
    pub fn declare(k: &'a Builder<'a>, plan: &Plan, cos_sin: Ref<'a>) -> (Self, Ref<'a>) {
        let (problem, heads) = (plan.problem(), plan.head_block());
        let scratch = |name, element, dims: &[usize]| k.scratch(name, MemorySpace::Vmem, element, dims);
        let (types, rows) = (problem.precision, fused::rows(problem, plan.chip()));
        let columns = Columns::all(problem, heads);
        let is_flat = decode::is_flat(plan.details().split);
        let of_rows = scratch("rows", Element::F32, &decode::row_dims(problem, plan.chip(), heads));
        let tokens = fused::token_dims(problem, heads, fused::projected(problem, plan.chip())[0]);
        let new_tokens = scratch("new_tokens", types.kv, &tokens);
        let projected = scratch("projected", types.q, &[rows, columns.count()]);
        let angles = scratch("angles", Element::F32, &[rows, problem.head_dim]);
        let wide = fused::has_narrow_heads(problem).then(|| scratch("wide", Element::F32, &[fused::step(rows), LANES]));
        let results = match is_flat {
            true => scratch("results", types.output, &[rows, decode::out_columns(problem, heads)]),
            false => scratch("out_rows", types.output, &[problem.tokens, heads * problem.group(), problem.head_dim]),
        };
        let moved = k.dma_semaphores("projections_moved", &[columns.parts.len() + ANGLES]);
        let out_rows = results.clone();
        (Self { cos_sin, is_flat, rows: of_rows, new_tokens, projected, angles, wide, results, moved }, out_rows)
    }

    /// A row's `heads` and `lanes`, of one piece.
    pub fn row(&self, piece: usize, row: Value<'a>, [heads, lanes]: [usize; 2]) -> Ref<'a> {
        self.rows.at(piece).at(row).slice(0, 0, heads).slice(1, 0, lanes)
    }

    fn semaphore(&self, from_last: usize) -> Ref<'a> {
        self.moved.at(self.moved.dims()[0] - from_last)
    }

    /// Rows that are copied at a time; how often as many, and how many are left.
    fn chunks(&self) -> [usize; 3] {
        let (rows, all) = (self.projected.dims()[0], self.rows.dims()[1]);
        [rows, all / rows, all % rows]
    }
}

impl<'a> Body<'a, '_> {
    /// Whether the output is in two dimensions.
    pub(super) fn is_flat(&self) -> bool {
        self.fused.as_ref().is_some_and(|fused| fused.is_flat)
    }

    /// Starts the copies of the projections, where all rows are copied at once.
    pub(super) fn begin_rows(&self, fused: &Fused<'a>) {
        if let Some(wide) = &fused.wide {
            wide.store(0.0);
        }
        if let [rows, 1, 0] = fused.chunks() {
            self.copy_projected(fused, None, rows, |dma| dma.start());
        }
    }

    /// Makes rows of queries, and tokens. Where no other core does, rows without a key become zeros.
    pub(super) fn turn_rows(&self, fused: &Fused<'a>) {
        let (k, [rows, times, rest]) = (self.k, fused.chunks());
        if (times, rest) == (1, 0) {
            self.copy_projected(fused, None, rows, |dma| dma.wait());
            self.turn(fused, k.int(0), rows);
        } else {
            let some = |first: Value<'a>, count: usize| {
                self.copy_projected(fused, Some(first), count, |dma| dma.start());
                self.copy_projected(fused, Some(first), count, |dma| dma.wait());
                self.turn(fused, first, count);
            };
            k.for_range(0, times, |chunk| some((chunk * rows).multiple_of(rows), rows));
            if rest > 0 {
                some(k.int((times * rows) as i64), rest);
            }
        }
        if !fused.is_flat {
            return;
        }
        let blank = |row: Value<'a>| {
            let [pieces, _, heads, lanes] =
                decode::row_dims(self.plan.problem(), self.plan.chip(), self.plan.head_block());
            (0..pieces).for_each(|piece| fused.row(piece, row, [heads, lanes]).store(0.0));
        };
        k.for_range(0, self.num_seqs, |sequence| {
            let row = self.metadata.first_row(sequence);
            let has_row = self.metadata.first_row(sequence + 1).greater(row);
            k.when(has_row & self.metadata.kv_len(sequence).equals(0), || blank(row));
        });
        k.for_range(self.metadata.first_row(self.num_seqs), fused.rows.dims()[1], blank);
        // What sees keys is overwritten.
        if let Some([_, lse_rows]) = &self.lse {
            lse_rows.store(0.0);
        }
    }

    /// The copies of `count` rows of the projections, and of their angles, all there are without a first one.
    fn copy_projected(&self, fused: &Fused<'a>, first: Option<Value<'a>>, count: usize, act: impl Fn(Dma<'a>)) {
        let k = self.k;
        let rows_of = |array: &Ref<'a>| match first {
            None => array.clone(),
            Some(first) => array.slice(0, first, count),
        };
        let mut done = 0;
        for (index, part) in Columns::all(self.plan.problem(), self.plan.head_block()).parts.iter().enumerate() {
            let from = match part.per_core {
                0 => rows_of(&self.q).slice(1, part.from, part.columns),
                by => rows_of(&self.q).slice(1, (self.core * by + part.from).multiple_of(LANES), part.columns),
            };
            let to = fused.projected.slice(0, 0, count).slice(1, done, part.columns);
            act(k.make_async_copy(from, to, fused.moved.at(index)));
            done += part.columns;
        }
        act(k.make_async_copy(rows_of(&fused.cos_sin), fused.angles.slice(0, 0, count), fused.semaphore(ANGLES)));
    }

    /// Queries and tokens of the rows that were copied, `first` and those after it.
    fn turn(&self, fused: &Fused<'a>, first: Value<'a>, count: usize) {
        let (k, problem, heads) = (self.k, self.plan.problem(), self.plan.head_block());
        let (dim, group) = (problem.head_dim, problem.group());
        let &[pieces, _, row_heads, lanes] = &fused.rows.dims()[..] else { unreachable!("four dimensions") };
        self.by_steps(count, |start, step| {
            let rows_of = |array: &Ref<'a>| array.slice(0, start, step);
            let angles = Angles::load(k, &rows_of(&fused.angles), fused.wide.as_ref());
            let columns = rows_of(&fused.projected);
            let row = first + start;
            for of in 0..heads * group {
                let turned = angles.turn(k, dim, &head(k, dim, &columns, of * dim));
                for (piece, turned) in turned.into_iter().enumerate() {
                    let rows = fused.rows.at(piece).slice(0, row, step).reshape(&[step * row_heads, lanes]);
                    rows.strided(0, of, step, row_heads).store(turned);
                }
            }
            let tokens: Vec<_> = (0..pieces).map(|piece| fused.new_tokens.at(piece).slice(0, row, step)).collect();
            store_tokens(k, problem, heads, &tokens, |half, of| {
                let numbers = head(k, dim, &columns, ((group + half as usize) * heads + of) * dim);
                let numbers = if half == Half::Key { angles.turn(k, dim, &numbers) } else { numbers };
                self.heads.stored(half, of, numbers)
            });
        });
    }

    /// Goes through `count` rows: `of(the first, how many)`.
    fn by_steps(&self, count: usize, of: impl Fn(Value<'a>, usize)) {
        let step = fused::step(count);
        match count / step {
            1 => of(self.k.int(0), step),
            times => self.k.for_range(0, times, |index| of((index * step).multiple_of(step), step)),
        }
    }

    /// Puts the row's new token behind the keys that were there, in the block at work and in its page, of which the block's
    /// copy is over.
    pub(super) fn append(
        &self,
        fused: &Fused<'a>,
        [sequence, row]: [Value<'a>; 2],
        slot: Value<'a>,
        [live, kv_len]: [Value<'a>; 2],
    ) {
        let pieces = fused.new_tokens.dims()[0];
        let kv_rows = self.plan.token_rows();
        for piece in 0..pieces {
            let token = fused.new_tokens.at(piece).at(row).slice(0, 0, kv_rows).load();
            self.kv.at((slot, piece)).at(live - 1).slice(0, 0, kv_rows).store(token);
        }
        let size = self.plan.problem().page_size;
        let page = self.metadata.page(sequence, (kv_len - 1) / size);
        self.token_copies(fused, row, page, (kv_len - 1) % size).iter().for_each(Dma::start);
    }

    /// The copies of a row's token to its place in a page.
    fn token_copies(&self, fused: &Fused<'a>, row: Value<'a>, page: Value<'a>, offset: Value<'a>) -> Vec<Dma<'a>> {
        let &[pieces, _, _, lanes] = &fused.new_tokens.dims()[..] else { unreachable!("four dimensions") };
        let kv_rows = self.plan.token_rows();
        let copy = |piece: usize| {
            let from = fused.new_tokens.at(piece).slice(0, row, 1).slice(1, 0, kv_rows);
            let to = self.heads_of_page(self.kv_pages.at(page).slice(0, offset, 1)).slice(2, piece * lanes, lanes);
            self.k.make_async_copy(from, to, fused.semaphore(TOKENS))
        };
        (0..pieces).map(copy).collect()
    }

    /// Waits until the tokens of `count` rows are written.
    pub(super) fn tokens_sent(&self, fused: &Fused<'a>, count: Value<'a>) {
        let first = self.k.int(0);
        self.k.for_range(0, count, |_| self.token_copies(fused, first, first, first).iter().for_each(Dma::wait));
    }

    /// Writes the output in two dimensions, and the log-sum-exps.
    pub(super) fn send_rows(&self, fused: &Fused<'a>) {
        let (k, [rows, times, rest]) = (self.k, fused.chunks());
        let lse = self.lse.as_ref().map(|[lse, rows]| k.make_async_copy(rows.clone(), lse.clone(), self.moved.at(2)));
        if let Some(lse) = &lse {
            lse.start();
        }
        let copy = |first: Option<Value<'a>>, count: usize| {
            let columns = fused.results.dims()[1];
            let out = match self.plan.head_block() < self.plan.problem().kv_heads {
                true => self.out.slice(1, (self.core * columns).multiple_of(LANES), columns),
                false => self.out.clone(),
            };
            let out = first.map_or(out.clone(), |first| out.slice(0, first, count));
            let dma = k.make_async_copy(fused.results.slice(0, 0, count), out, fused.semaphore(RESULTS));
            dma.start();
            dma.wait();
        };
        let some = |first: Option<Value<'a>>, count: usize| {
            self.make_results(fused, first.unwrap_or_else(|| k.int(0)), count);
            copy(first, count);
        };
        if (times, rest) == (1, 0) {
            some(None, rows);
        } else {
            k.for_range(0, times, |chunk| some(Some((chunk * rows).multiple_of(rows)), rows));
            if rest > 0 {
                some(Some(k.int((times * rows) as i64)), rest);
            }
        }
        if let Some(lse) = &lse {
            lse.wait();
        }
    }

    /// The output of some rows, `first` and those after it, from that by head.
    fn make_results(&self, fused: &Fused<'a>, first: Value<'a>, count: usize) {
        let (k, problem) = (self.k, self.plan.problem());
        let &[pieces, _, row_heads, lanes] = &fused.rows.dims()[..] else { unreachable!("four dimensions") };
        self.by_steps(count, |start, step| {
            let head = |of: usize| {
                let piece = |piece: usize| {
                    let rows = fused.rows.at(piece).slice(0, first + start, step);
                    rows.reshape(&[step * row_heads, lanes]).strided(0, of, step, row_heads).load()
                };
                (0..pieces).map(piece).collect()
            };
            let results = fused.results.slice(0, start, step);
            to_columns(k, problem.head_dim, self.q_heads, head, |tile, values| {
                results.slice(1, tile * LANES, LANES).store(values.cast(problem.precision.output));
            });
        });
    }
}
