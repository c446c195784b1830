//! Ragged paged attention as StableHLO, for any PJRT plugin.
//!
//! Two passes, each an online softmax (running maximum `m`, sum `l` and accumulator in f32) in a `while` over blocks of
//! [`KV_BLOCK`] keys, up to the longest context that is really there:
//! - *decode*: the sequences with one row, all at once. Each block of pages is gathered head by head, which puts it in
//!   the layout of a batched dot without a transpose.
//! - *prefill* (mixed problems only): the other sequences one by one, [`QUERY_BLOCK`] rows at a time, each block of rows
//!   over just the keys that it sees.
//!
//! With a few rows per KV head the logits are a fused multiply and reduce, not a dot: measured on XLA's CPU, 8 sequences
//! of 128 keys, 4 query heads, 2 KV heads of 64, f32, pages of 128 (us per call, two cores): multiply-reduce and dot 141,
//! two dots 197, multiply-reduce for both 193, one dot over the whole page row against a zero-padded query 480.
//!
//! Masks select and never multiply, since 0 * NaN is NaN: keys and values outside the live sequences may be anything.

use pagoda_ir::{
    Element, Result,
    stablehlo::{Builder, Direction, DotDims, Precision, Tensor},
};

use super::{
    kv_layout::{Half, KvLayout},
    kv_write,
    problem::{Kind, Problem, Rotary},
};
use crate::named::Named;

/// Keys of one block, rounded up to whole pages.
pub const KV_BLOCK: usize = 128;
/// Rows of one block of a prefill chunk.
pub const QUERY_BLOCK: usize = 32;
/// Rows per KV head up to which the logits are a multiply and reduce.
const MULTIPLY_REDUCE_ROWS: usize = 8;

/// The results of the problem, in its order.
///
/// # Errors
/// None for operands of the problem's types, unless MLIR fails.
pub fn emit<'c, 'a>(
    b: &Builder<'c, 'a>,
    problem: &Problem,
    operands: &Named<Tensor<'c, 'a>>,
) -> Result<Vec<Tensor<'c, 'a>>> {
    if problem.fused.is_none() {
        return attention(b, problem, operands);
    }
    let operands = written(b, problem, operands)?;
    let mut results = attention(b, problem, &operands)?;
    results[0] = b.reshape(results[0], &problem.output_type().dims)?;
    results.insert(1, operands["kv_pages"]);
    Ok(results)
}

/// Rotates `x [rows, heads, head_dim]` by `cos_sin f32[rows, head_dim]`, each row's cosines and sines: f32.
///
/// # Errors
/// When an operand's type does not fit.
pub fn rotate<'c, 'a>(
    b: &Builder<'c, 'a>,
    rotary: Rotary,
    x: Tensor<'c, 'a>,
    cos_sin: Tensor<'c, 'a>,
) -> Result<Tensor<'c, 'a>> {
    let Rotary::HalfSplit = rotary;
    let dims = x.dims();
    let half = [dims[0], dims[1], dims[2] / 2];
    let wide = b.convert(x, Element::F32)?;
    let low = b.slice_in_dim(wide, 0, half[2], 2)?;
    let high = b.slice_in_dim(wide, half[2], dims[2], 2)?;
    let cosines = b.broadcast_in_dim(b.slice_in_dim(cos_sin, 0, half[2], 1)?, &half, &[0, 2])?;
    let sines = b.broadcast_in_dim(b.slice_in_dim(cos_sin, half[2], dims[2], 1)?, &half, &[0, 2])?;
    let rotated_low = b.subtract(b.multiply(low, cosines)?, b.multiply(high, sines)?)?;
    let rotated_high = b.add(b.multiply(high, cosines)?, b.multiply(low, sines)?)?;
    b.concatenate(&[rotated_low, rotated_high], 2)
}

/// The first part of a fused problem, from its operands those of the same one that is not fused: queries are rotated, keys and
/// values rotated and written.
///
/// # Errors
/// None for operands of the problem's types, unless MLIR fails.
pub fn written<'c, 'a>(
    b: &Builder<'c, 'a>,
    problem: &Problem,
    operands: &Named<Tensor<'c, 'a>>,
) -> Result<Named<Tensor<'c, 'a>>> {
    let rotary = problem.fused.unwrap_or(Rotary::HalfSplit);
    let (q_heads, kv_heads, dim) = (problem.q_heads, problem.kv_heads, problem.head_dim);
    let heads = |first: usize, count: usize| {
        let part = b.slice_in_dim(operands["qkv"], first * dim, (first + count) * dim, 1)?;
        b.reshape(part, &[problem.tokens, count, dim])
    };
    let q = rotate(b, rotary, heads(0, q_heads)?, operands["cos_sin"])?;
    let k = rotate(b, rotary, heads(q_heads, kv_heads)?, operands["cos_sin"])?;
    let v = heads(q_heads + kv_heads, kv_heads)?;
    let new = [
        ("kv_pages", operands["kv_pages"]),
        ("k", stored(b, problem, k, operands.get("k_scale").copied())?),
        ("v", stored(b, problem, v, operands.get("v_scale").copied())?),
        ("slots", Metadata::new(b, problem, operands)?.slots(b, problem)?),
    ];
    let first_page = operands.get("first_page").map(|&page| ("first_page", page));
    let kv_pages = kv_write::emit(b, problem, &new.into_iter().chain(first_page).collect())?;
    let q = b.convert(q, problem.precision.q)?;
    let rest = operands.iter().filter(|(name, _)| !["qkv", "cos_sin"].contains(name));
    let rest: Named<_> = rest.map(|(name, &operand)| (name, operand)).collect();
    let rest = rest.with("kv_pages", kv_pages);
    Ok([("q", q)].into_iter().chain(rest.iter().map(|(name, &operand)| (name, operand))).collect())
}

/// Keys or values `[tokens, kv_heads, head_dim]` as the cache holds them: divided by the scales of their heads, saturated,
/// rounded to nearest even.
fn stored<'c, 'a>(
    b: &Builder<'c, 'a>,
    problem: &Problem,
    x: Tensor<'c, 'a>,
    scale: Option<Tensor<'c, 'a>>,
) -> Result<Tensor<'c, 'a>> {
    let element = problem.precision.kv;
    let Some(scale) = scale else { return b.convert(x, element) };
    let x = b.convert(x, Element::F32)?;
    let x = b.divide(x, b.broadcast_in_dim(scale, &x.dims(), &[1])?)?;
    let [least, most] = problem.precision.bounds().map(|bound| b.scalar(Element::F32, bound));
    let x = b.clamp(least?, x, most?)?;
    b.convert(if element.is_float() { x } else { b.round_nearest_even(x)? }, element)
}

/// Output and, where it is asked for, log-sum-exp, over pages that are written.
fn attention<'c, 'a>(
    b: &Builder<'c, 'a>,
    problem: &Problem,
    operands: &Named<Tensor<'c, 'a>>,
) -> Result<Vec<Tensor<'c, 'a>>> {
    let emitter = Emitter::new(b, problem, operands)?;
    let decoded = emitter.decode_pass()?;
    let rows = match problem.kind {
        Kind::Decode => decoded.rows,
        Kind::Mixed => {
            let prefilled = emitter.prefill_pass()?;
            let is_decode = b.broadcast_in_dim(decoded.is_decode, &decoded.rows.dims(), &[0])?;
            b.select(is_decode, decoded.rows, prefilled)?
        }
    };
    if !problem.log_sum_exp {
        return Ok(vec![rows]);
    }
    let (columns, dim) = (emitter.columns(), problem.head_dim);
    let out = b.convert(b.slice_in_dim(rows, 0, dim, 2)?, problem.precision.output)?;
    let lse = b.reshape(b.slice_in_dim(rows, dim, columns, 2)?, &[problem.tokens, problem.q_heads])?;
    Ok(vec![out, lse])
}

/// Which rows belong to which sequence.
struct Metadata<'c, 'a> {
    /// `i32[max_seqs]`: one past each sequence's last row.
    ends: Tensor<'c, 'a>,
    /// `pred[max_seqs]`: the sequences that there are.
    live: Tensor<'c, 'a>,
    /// `i32[tokens]`: `num_seqs` for padding.
    seq_of_row: Tensor<'c, 'a>,
    /// `pred[tokens]`
    padding: Tensor<'c, 'a>,
    operands: [Tensor<'c, 'a>; 2],
}

impl<'c, 'a> Metadata<'c, 'a> {
    fn new(b: &Builder<'c, 'a>, problem: &Problem, operands: &Named<Tensor<'c, 'a>>) -> Result<Self> {
        let (seqs, tokens) = (problem.max_seqs, problem.tokens);
        let num_seqs = b.reshape(operands["num_seqs"], &[])?;
        let ends = b.slice_in_dim(operands["cu_q_lens"], 1, seqs + 1, 0)?;
        let live = b.compare(b.iota(Element::I32, &[seqs], 0)?, Direction::Lt, b.broadcast_to(num_seqs, &[seqs])?)?;
        // A row belongs to the sequence after all those that end at or before it.
        let grid = [tokens, seqs];
        let row = b.iota(Element::I32, &grid, 0)?;
        let ended = b.compare(b.broadcast_in_dim(ends, &grid, &[1])?, Direction::Le, row)?;
        let ended = b.and(ended, b.broadcast_in_dim(live, &grid, &[1])?)?;
        let seq_of_row = b.reduce_sum(b.convert(ended, Element::I32)?, &[1])?; // [tokens]; num_seqs for padding
        let padding = b.compare(seq_of_row, Direction::Ge, b.broadcast_to(num_seqs, &[tokens])?)?;
        let operands = [operands["kv_lens"], operands["page_indices"]];
        Ok(Self { ends, live, seq_of_row, padding, operands })
    }

    /// `i32[tokens]`: where the keys and values of each row go, within a layer; -1 for padding and idle rows.
    fn slots(&self, b: &Builder<'c, 'a>, problem: &Problem) -> Result<Tensor<'c, 'a>> {
        let tokens = [problem.tokens];
        let zero = b.splat(Element::I32, &tokens, 0.0)?;
        let seq = b.select(self.padding, zero, self.seq_of_row)?;
        let [kv_lens, page_indices] = self.operands;
        let of_row = |array| b.take(array, seq, 0);
        let behind = b.subtract(of_row(self.ends)?, b.iota(Element::I32, &tokens, 0)?)?;
        let position = b.subtract(of_row(kv_lens)?, behind)?;
        let stands = b.compare(position, Direction::Ge, zero)?;
        let stands = b.and(stands, b.not(self.padding)?)?;
        KvLayout::slots_of(b, problem.page_size, position, of_row(page_indices)?, stands)
    }
}

/// Query rows of some sequences, `rows` per KV head and sequence.
#[derive(Clone, Copy)]
struct Queries<'c, 'a> {
    /// `[seqs, kv_heads, rows, head_dim]`
    q: Tensor<'c, 'a>,
    /// `i32[seqs, rows]`: where each row stands; -1 for a row that sees nothing.
    positions: Tensor<'c, 'a>,
    /// `i32[seqs]`: keys from here on no row of the sequence sees.
    end_key: Tensor<'c, 'a>,
    /// `i32[seqs]`: keys before this one no row of the sequence sees.
    first_key: Tensor<'c, 'a>,
    /// `i32[seqs, blocks * pages per block]`: pages of the buffer.
    pages: Tensor<'c, 'a>,
}

/// What the decode pass yields.
struct Decoded<'c, 'a> {
    /// `[tokens, q_heads, columns]`; 0 in rows of padding.
    rows: Tensor<'c, 'a>,
    /// `pred[tokens]`: the row is its sequence's only one, or padding.
    is_decode: Tensor<'c, 'a>,
}

struct Emitter<'e, 'c, 'a> {
    b: &'e Builder<'c, 'a>,
    problem: &'e Problem,
    operands: &'e Named<Tensor<'c, 'a>>,
    /// `i32[]`
    num_seqs: Tensor<'c, 'a>,
    /// `i32[max_seqs, blocks * pages per block]`: pages of the buffer, the last block filled up.
    pages: Tensor<'c, 'a>,
    pages_per_block: usize,
}

impl<'e, 'c, 'a> Emitter<'e, 'c, 'a> {
    fn new(b: &'e Builder<'c, 'a>, problem: &'e Problem, operands: &'e Named<Tensor<'c, 'a>>) -> Result<Self> {
        let pages_per_block = KV_BLOCK.div_ceil(problem.page_size).min(problem.pages_per_seq);
        let fill = problem.pages_per_seq.next_multiple_of(pages_per_block) - problem.pages_per_seq;
        let mut pages = operands["page_indices"];
        if let Some(&first) = operands.get("first_page") {
            pages = b.add(pages, b.broadcast_to(first, &pages.dims())?)?;
        }
        if fill > 0 {
            pages = b.pad(pages, b.scalar(Element::I32, 0.0)?, &[0, 0], &[0, fill as i64], &[0, 0])?;
        }
        let num_seqs = b.reshape(operands["num_seqs"], &[])?;
        Ok(Self { b, problem, operands, num_seqs, pages, pages_per_block })
    }

    /// All sequences with one row, at once.
    fn decode_pass(&self) -> Result<Decoded<'c, 'a>> {
        let (b, problem, operands) = (self.b, self.problem, self.operands);
        let seqs = problem.max_seqs;
        let Metadata { ends, live, seq_of_row, padding, .. } = Metadata::new(b, problem, operands)?;
        let starts = b.slice_in_dim(operands["cu_q_lens"], 0, seqs, 0)?;
        let single = b.compare(b.subtract(ends, starts)?, Direction::Eq, self.ints(&[seqs], 1)?)?;
        let active = b.and(live, single)?;
        let end_key = b.select(active, operands["kv_lens"], self.ints(&[seqs], 0)?)?;
        let position = b.subtract(end_key, self.ints(&[seqs], 1)?)?;
        let first_key = match problem.sliding_window {
            // Idle sequences must not pull the first block to 0.
            Some(window) => {
                let first = b.subtract(end_key, self.ints(&[seqs], window as i64)?)?;
                let first = b.maximum(first, self.ints(&[seqs], 0)?)?;
                b.select(active, first, self.ints(&[seqs], i32::MAX.into())?)?
            }
            None => self.ints(&[seqs], 0)?,
        };
        let q = b.take(operands["q"], starts, 0)?; // [seqs, q_heads, head_dim]
        let grouped = [seqs, problem.kv_heads, problem.group(), problem.head_dim];
        let attended = self.attend(Queries {
            q: b.reshape(q, &grouped)?,
            positions: b.broadcast_in_dim(position, &[seqs, problem.group()], &[0])?,
            end_key,
            first_key,
            pages: self.pages,
        })?;
        let attended = b.reshape(attended, &[seqs, problem.q_heads, self.columns()])?;
        let rows = b.take(attended, seq_of_row, 0)?; // [tokens, q_heads, columns]
        let dims = rows.dims();
        let rows = b.select(b.broadcast_in_dim(padding, &dims, &[0])?, b.splat(Element::F32, &dims, 0.0)?, rows)?;
        let is_decode = b.or(padding, b.take(single, seq_of_row, 0)?)?;
        Ok(Decoded { rows: b.convert(rows, self.between())?, is_decode })
    }

    /// The sequences with several rows, one after another: `[tokens, q_heads, columns]`.
    fn prefill_pass(&self) -> Result<Tensor<'c, 'a>> {
        let (b, problem, operands) = (self.b, self.problem, self.operands);
        let block = QUERY_BLOCK.min(problem.tokens);
        // Blocks are read and written whole; room behind the last row keeps them from being moved. Rows of a block that
        // belong to later sequences are overwritten when their turn comes.
        let zero = b.scalar(problem.precision.q, 0.0)?;
        let q = b.pad(operands["q"], zero, &[0, 0, 0], &[block as i64, 0, 0], &[0, 0, 0])?;
        let output = b.splat(self.between(), &[q.dims()[0], problem.q_heads, self.columns()], 0.0)?;
        let looped = b.while_(
            &[self.int(0)?, output],
            |b, state| b.compare(state[0], Direction::Lt, self.num_seqs),
            |b, state| {
                let this = self.inside(b);
                let output = this.prefill_sequence(q, state[0], state[1], block)?;
                Ok(vec![b.add(state[0], this.int(1)?)?, output])
            },
        )?;
        b.slice_in_dim(looped[1], 0, problem.tokens, 0)
    }

    /// Writes the rows of sequence `seq` into `output`, unless it has one only.
    fn prefill_sequence(
        &self,
        q: Tensor<'c, 'a>,
        seq: Tensor<'c, 'a>,
        output: Tensor<'c, 'a>,
        block: usize,
    ) -> Result<Tensor<'c, 'a>> {
        let (b, problem, operands) = (self.b, self.problem, self.operands);
        let entry = |array, index| b.reshape(b.dynamic_slice(array, &[index], &[1])?, &[]);
        let first_row = entry(operands["cu_q_lens"], seq)?;
        let q_len = b.subtract(entry(operands["cu_q_lens"], b.add(seq, self.int(1)?)?)?, first_row)?;
        let kv_len = entry(operands["kv_lens"], seq)?;
        let pages = b.dynamic_slice(self.pages, &[seq, self.int(0)?], &[1, self.pages.dims()[1]])?;
        let several = b.compare(q_len, Direction::Gt, self.int(1)?)?;
        let rows = b.select(several, q_len, self.int(0)?)?;
        let looped = b.while_(
            &[self.int(0)?, output],
            |b, state| b.compare(state[0], Direction::Lt, rows),
            |b, state| {
                let this = self.inside(b);
                let (done, output) = (state[0], state[1]);
                let start = [b.add(first_row, done)?, this.int(0)?, this.int(0)?];
                let rows = b.dynamic_slice(q, &start, &[block, problem.q_heads, problem.head_dim])?;
                let attended = this.attend(this.prefill_block(rows, done, q_len, kv_len, pages)?)?;
                let heads = [problem.kv_heads, block, problem.group(), this.columns()];
                let by_row = b.transpose(b.reshape(attended, &heads)?, &[1, 0, 2, 3])?;
                let by_row = b.reshape(by_row, &[block, problem.q_heads, this.columns()])?;
                let output = b.dynamic_update_slice(output, b.convert(by_row, this.between())?, &start)?;
                Ok(vec![b.add(done, this.int(block as i64)?)?, output])
            },
        )?;
        Ok(looped[1])
    }

    /// `rows` (`[block, q_heads, head_dim]`), rows `done` and on of a sequence, as one group of queries.
    fn prefill_block(
        &self,
        rows: Tensor<'c, 'a>,
        done: Tensor<'c, 'a>,
        q_len: Tensor<'c, 'a>,
        kv_len: Tensor<'c, 'a>,
        pages: Tensor<'c, 'a>,
    ) -> Result<Queries<'c, 'a>> {
        let (b, problem) = (self.b, self.problem);
        let (block, group) = (rows.dims()[0], problem.group());
        let q = b.reshape(rows, &[block, problem.kv_heads, group, problem.head_dim])?;
        let q = b.transpose(q, &[1, 0, 2, 3])?;
        let q = b.reshape(q, &[1, problem.kv_heads, block * group, problem.head_dim])?;
        let first_position = b.add(b.subtract(kv_len, q_len)?, done)?;
        let offset = b.iota(Element::I32, &[block], 0)?;
        let remaining = b.broadcast_to(b.subtract(q_len, done)?, &[block])?;
        let position = b.add(offset, b.broadcast_to(first_position, &[block])?)?;
        let exists = b.compare(offset, Direction::Lt, remaining)?;
        let position = b.select(exists, position, self.ints(&[block], -1)?)?;
        let position = b.broadcast_in_dim(position, &[block, group], &[0])?;
        let end_key = b.minimum(kv_len, b.add(first_position, self.int(block as i64)?)?)?;
        let first_key = match problem.sliding_window {
            Some(window) => {
                let oldest = b.subtract(b.add(first_position, self.int(1)?)?, self.int(window as i64)?)?;
                b.maximum(oldest, self.int(0)?)?
            }
            None => self.int(0)?,
        };
        Ok(Queries {
            q,
            positions: b.reshape(position, &[1, block * group])?,
            end_key: b.reshape(end_key, &[1])?,
            first_key: b.reshape(first_key, &[1])?,
            pages,
        })
    }

    /// Elements of a head's result: the output and, where it is asked for, the log-sum-exp.
    fn columns(&self) -> usize {
        self.problem.head_dim + usize::from(self.problem.log_sum_exp)
    }

    /// The type of results that are put together.
    fn between(&self) -> Element {
        if self.problem.log_sum_exp { Element::F32 } else { self.problem.precision.output }
    }

    /// Attention of `queries` over their pages: f32 `[seqs, kv_heads, rows, columns]`, 0 for rows that see nothing.
    fn attend(&self, queries: Queries<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let b = self.b;
        let dims = queries.q.dims(); // [seqs, kv_heads, rows, head_dim]
        let keys = (self.pages_per_block * self.problem.page_size) as i64;
        let last = b.reduce_max(queries.end_key, &[0])?;
        let blocks = b.divide(b.add(last, self.int(keys - 1)?)?, self.int(keys)?)?;
        let first = b.divide(b.reduce_min(queries.first_key, &[0])?, self.int(keys)?)?;
        let m = b.splat(Element::F32, &dims[..3], f32::MIN.into())?;
        let l = b.splat(Element::F32, &dims[..3], 0.0)?;
        let accumulator = b.splat(Element::F32, &dims, 0.0)?;
        let state = b.while_(
            &[first, m, l, accumulator],
            |b, state| b.compare(state[0], Direction::Lt, blocks),
            |b, state| {
                let this = self.inside(b);
                let [m, l, accumulator] = this.block(&queries, state[0], [state[1], state[2], state[3]])?;
                Ok(vec![b.add(state[0], this.int(1)?)?, m, l, accumulator])
            },
        )?;
        let [mut m, mut l, mut accumulator] = [state[1], state[2], state[3]];
        let sees = b.compare(l, Direction::Gt, b.splat(Element::F32, &dims[..3], 0.0)?)?;
        if let Some(&sinks) = self.operands.get("sinks") {
            let sinks = self.by_head(sinks, self.problem.group(), &dims)?;
            let largest = b.maximum(m, sinks)?;
            let decay = b.exponential(b.subtract(m, largest)?)?;
            l = b.add(b.multiply(l, decay)?, b.exponential(b.subtract(sinks, largest)?)?)?;
            accumulator = b.multiply(accumulator, b.broadcast_in_dim(decay, &dims, &[0, 1, 2])?)?;
            m = largest;
        }
        if let Some(&scale) = self.operands.get("v_scale") {
            accumulator = b.multiply(accumulator, b.broadcast_in_dim(scale, &dims, &[1])?)?;
        }
        let mut results = b.divide(accumulator, b.broadcast_in_dim(l, &dims, &[0, 1, 2])?)?;
        if self.problem.log_sum_exp {
            let lse = b.reshape(b.add(m, b.log(l)?)?, &[dims[0], dims[1], dims[2], 1])?;
            results = b.concatenate(&[results, lse], 3)?;
        }
        let dims = results.dims();
        let sees = b.broadcast_in_dim(sees, &dims, &[0, 1, 2])?;
        b.select(sees, results, b.splat(Element::F32, &dims, 0.0)?)
    }

    /// A number per query head, `f32[q_heads]`, for each of `[seqs, kv_heads, rows]`: rows are groups of query heads.
    fn by_head(&self, x: Tensor<'c, 'a>, group: usize, dims: &[usize]) -> Result<Tensor<'c, 'a>> {
        let b = self.b;
        let &[seqs, kv_heads, rows, ..] = dims else { unreachable!("queries of sequences") };
        let x = b.reshape(x, &[kv_heads, group])?;
        let x = b.broadcast_in_dim(x, &[seqs, kv_heads, rows / group, group], &[1, 3])?;
        b.reshape(x, &[seqs, kv_heads, rows])
    }

    /// One step of the online softmax: block `index` of every sequence.
    fn block(
        &self,
        queries: &Queries<'c, 'a>,
        index: Tensor<'c, 'a>,
        [m, l, accumulator]: [Tensor<'c, 'a>; 3],
    ) -> Result<[Tensor<'c, 'a>; 3]> {
        let (b, problem) = (self.b, self.problem);
        let dims = queries.q.dims();
        let (seqs, rows) = (dims[0], dims[2]);
        let keys = self.pages_per_block * problem.page_size;
        let first_page = b.multiply(index, self.int(self.pages_per_block as i64)?)?;
        let pages = b.dynamic_slice(queries.pages, &[self.int(0)?, first_page], &[seqs, self.pages_per_block])?;
        let first_key = b.multiply(index, self.int(keys as i64)?)?;
        let key = b.add(b.iota(Element::I32, &[keys], 0)?, b.broadcast_to(first_key, &[keys])?)?;

        let grid = [seqs, rows, keys];
        let key_of = b.broadcast_in_dim(key, &grid, &[2])?;
        let mut seen = b.compare(key_of, Direction::Le, b.broadcast_in_dim(queries.positions, &grid, &[0, 1])?)?;
        if let Some(window) = problem.sliding_window {
            let oldest = b.subtract(queries.positions, self.ints(&[seqs, rows], window as i64)?)?;
            seen = b.and(seen, b.compare(key_of, Direction::Gt, b.broadcast_in_dim(oldest, &grid, &[0, 1])?)?)?;
        }
        let wide = [seqs, dims[1], rows, keys];
        let seen = b.broadcast_in_dim(seen, &wide, &[0, 2, 3])?;
        let keys_of = self.gather_heads(pages, Half::Key)?;
        // Numbers of the cache are numbers of the queries' type: those of 8 bits, bf16 where queries are f32.
        let logits = self.logits(queries.q, b.convert(keys_of, problem.precision.q)?)?;
        let logits = b.select(seen, logits, b.splat(Element::F32, &wide, f32::MIN.into())?)?;

        let new_m = b.maximum(m, b.reduce_max(logits, &[3])?)?;
        let decay = b.exponential(b.subtract(m, new_m)?)?;
        let weights = b.exponential(b.subtract(logits, b.broadcast_in_dim(new_m, &wide, &[0, 1, 2])?)?)?;
        // Where a row has seen nothing yet, the maximum is the mask's own value and the exponential is 1.
        let weights = b.select(seen, weights, b.splat(Element::F32, &wide, 0.0)?)?;
        let new_l = b.add(b.multiply(l, decay)?, b.reduce_sum(weights, &[3])?)?;

        let values = b.convert(self.gather_heads(pages, Half::Value)?, Element::F32)?; // [seqs, kv_heads, keys, head_dim]
        let grid = [seqs, keys];
        let key = b.broadcast_in_dim(key, &grid, &[1])?;
        let live = b.and(
            b.compare(key, Direction::Lt, b.broadcast_in_dim(queries.end_key, &grid, &[0])?)?,
            b.compare(key, Direction::Ge, b.broadcast_in_dim(queries.first_key, &grid, &[0])?)?,
        )?;
        let live = b.broadcast_in_dim(live, &values.dims(), &[0, 2])?;
        let values = b.select(live, values, b.splat(Element::F32, &values.dims(), 0.0)?)?;
        let dot = DotDims { batch: (&[0, 1], &[0, 1]), contract: (&[3], &[2]) };
        let added = b.dot_general_with(weights, values, dot, Element::F32, Precision::Highest)?;
        let decay = b.broadcast_in_dim(decay, &dims, &[0, 1, 2])?;
        Ok([new_m, new_l, b.add(b.multiply(accumulator, decay)?, added)?])
    }

    /// Scaled and soft-capped logits, f32 `[seqs, kv_heads, rows, keys]`.
    fn logits(&self, q: Tensor<'c, 'a>, k: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let (b, problem) = (self.b, self.problem);
        let (dims, keys) = (q.dims(), k.dims()[2]);
        let wide = [dims[0], dims[1], dims[2], keys];
        let products = if dims[2] <= MULTIPLY_REDUCE_ROWS {
            let grid = [dims[0], dims[1], dims[2], keys, dims[3]];
            let q = b.broadcast_in_dim(b.convert(q, Element::F32)?, &grid, &[0, 1, 2, 4])?;
            let k = b.broadcast_in_dim(b.convert(k, Element::F32)?, &grid, &[0, 1, 3, 4])?;
            b.reduce_sum(b.multiply(q, k)?, &[4])?
        } else {
            let dot = DotDims { batch: (&[0, 1], &[0, 1]), contract: (&[3], &[3]) };
            b.dot_general_with(q, k, dot, Element::F32, Precision::Highest)?
        };
        let scale = match self.operands.get("k_scale") {
            None => b.splat(Element::F32, &wide, problem.scale)?,
            Some(&scales) => {
                let scales = b.multiply(scales, b.splat(Element::F32, &[problem.kv_heads], problem.scale)?)?;
                b.broadcast_in_dim(scales, &wide, &[1])?
            }
        };
        let logits = b.multiply(products, scale)?;
        match problem.soft_cap {
            Some(cap) => {
                let cap = b.splat(Element::F32, &wide, cap)?;
                b.multiply(b.tanh(b.divide(logits, cap)?)?, cap)
            }
            None => Ok(logits),
        }
    }

    /// The keys or values of `pages [seqs, pages per block]`, by head: `[seqs, kv_heads, keys, head_dim]`.
    /// Page ids outside the buffer read some page.
    fn gather_heads(&self, pages: Tensor<'c, 'a>, half: Half) -> Result<Tensor<'c, 'a>> {
        self.problem.kv_layout().gather_heads(self.b, self.operands["kv_pages"], pages, half)
    }

    /// This emitter in the body of a loop.
    fn inside<'i>(&'i self, b: &'i Builder<'c, 'a>) -> Emitter<'i, 'c, 'a> {
        Emitter {
            b,
            problem: self.problem,
            operands: self.operands,
            num_seqs: self.num_seqs,
            pages: self.pages,
            pages_per_block: self.pages_per_block,
        }
    }

    fn int(&self, value: i64) -> Result<Tensor<'c, 'a>> {
        self.ints(&[], value)
    }

    fn ints(&self, dims: &[usize], value: i64) -> Result<Tensor<'c, 'a>> {
        self.b.splat(Element::I32, dims, value as f64)
    }
}
