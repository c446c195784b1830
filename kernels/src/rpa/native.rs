//! Ragged paged attention in plain Rust, for programs that run on the host's own processor.
//!
//! XLA's CPU compiler turns the StableHLO form into some sixty small loops per layer, whose dispatch costs more than
//! the work of a decode step. This form does the same in one call: the engine registers it as a custom call with the
//! CPU plugin. Sums, softmax and accumulator are f32; loops run over rows of `head_dim` in
//! the widest registers that the processor has.
//!
//! Masks are loop bounds here: a key that a row does not see is never read, so it may be anything. A row's result does
//! not depend on what else is in the batch, nor on how many threads there are.

use std::ops::Range;

use pagoda_ir::{
    Element, Result,
    stablehlo::{BackendConfig, Builder, ConfigValue, CustomCall, OutputOperandAlias, Tensor},
};

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{problem::Problem, stablehlo::Operands};
use crate::float::Float;

/// The custom call's name; the engine registers its handler under it.
pub const TARGET: &str = "pagoda_rpa";
/// Names of the options in the call's `backend_config`, all written as text.
pub const OPTIONS: [&str; 4] = ["pages", "scale", "sliding_window", "soft_cap"];

/// Keys of one step of the online softmax.
const KEY_BLOCK: usize = 64;
/// Multiply-adds that are worth waking a second thread for.
const THREADED_WORK: usize = 1 << 18;

/// This step's keys and values.
#[derive(Clone, Copy, Debug)]
pub struct NewKv<'c, 'a> {
    /// `[tokens, kv_heads, head_dim]`
    pub k: Tensor<'c, 'a>,
    /// `[tokens, kv_heads, head_dim]`
    pub v: Tensor<'c, 'a>,
    /// `i32[tokens]`, as [`kv_write`](super::kv_write) takes them.
    pub slots: Tensor<'c, 'a>,
}

/// Writes the new keys and values and attends, in one custom call: the output and the KV buffer, which is updated in
/// place.
///
/// # Errors
/// None for operands of the problem's types, unless MLIR fails.
pub fn emit<'c, 'a>(
    b: &Builder<'c, 'a>,
    problem: &Problem,
    operands: &Operands<'c, 'a>,
    new: &NewKv<'c, 'a>,
) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
    let first_page = operands.first_page.map_or_else(|| b.scalar(Element::I32, 0.0), Ok)?;
    let options = [
        Some(problem.pages.to_string()),
        Some(problem.scale.to_string()),
        problem.sliding_window.map(|window| window.to_string()),
        problem.soft_cap.map(|cap| cap.to_string()),
    ];
    let options = OPTIONS.iter().zip(options);
    let options = options.filter_map(|(name, value)| Some(((*name).to_owned(), ConfigValue::Text(value?))));
    let call = CustomCall {
        backend_config: BackendConfig::Dictionary(options.collect()),
        output_operand_aliases: vec![OutputOperandAlias { result: 1, operand: 1 }],
        ..CustomCall::default()
    };
    let arguments = [
        operands.q,
        operands.kv_pages,
        operands.kv_lens,
        operands.page_indices,
        operands.cu_q_lens,
        operands.num_seqs,
        first_page,
        new.k,
        new.v,
        new.slots,
    ];
    let results = b.custom_call(TARGET, &arguments, &[problem.q_type(), problem.kv_pages_type()], call)?;
    Ok((results[0], results[1]))
}

/// One call: shapes, options and operands. The meaning of each is that of [`Problem`]'s.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a, T> {
    /// Query heads.
    pub q_heads: usize,
    /// Key and value heads; divides `q_heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens of a page.
    pub page_size: usize,
    /// Entries of a row of the page table.
    pub pages_per_seq: usize,
    /// Factor of the logits.
    pub scale: f32,
    /// Keys that a row sees at most.
    pub sliding_window: Option<usize>,
    /// Logits `x` become `c * tanh(x / c)`.
    pub soft_cap: Option<f32>,
    /// `[tokens, q_heads, head_dim]`
    pub q: &'a [T],
    /// `[pages, page_size, 2 * kv_heads, head_dim]`, all layers
    pub kv_pages: &'a [T],
    /// `[max_seqs]`
    pub kv_lens: &'a [i32],
    /// `[max_seqs, pages_per_seq]`
    pub page_indices: &'a [i32],
    /// `[max_seqs + 1]`
    pub cu_q_lens: &'a [i32],
    /// Live sequences.
    pub num_seqs: usize,
    /// Where the layer's pages begin.
    pub first_page: usize,
}

/// Writes `k` and `v`, each `[tokens, kv_heads, head_dim]`, at `slots` (`page * page_size + offset`) of the layer whose
/// `pages` pages begin at `first_page` of `kv_pages`. Slots outside the layer write nothing.
///
/// # Panics
/// When slices do not have the sizes that the shapes give.
pub fn write<T: Float>(kv_pages: &mut [T], k: &[T], v: &[T], slots: &[i32], layer: &Layer) {
    let Layer { first_page, pages, page_size, kv_heads, head_dim } = *layer;
    let rows = k.chunks_exact(kv_heads * head_dim).zip(v.chunks_exact(kv_heads * head_dim));
    for (slot, (k, v)) in slots.iter().zip(rows) {
        let Some(slot) = usize::try_from(*slot).ok().filter(|&slot| slot < pages * page_size) else { continue };
        let at = (first_page * page_size + slot) * 2 * kv_heads * head_dim;
        let token = kv_pages[at..][..2 * kv_heads * head_dim].chunks_exact_mut(2 * head_dim);
        for (head, (k, v)) in token.zip(k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim))) {
            head[..head_dim].copy_from_slice(k);
            head[head_dim..].copy_from_slice(v);
        }
    }
}

/// Where a layer's pages lie in the KV buffer, and their shape.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// The first page.
    pub first_page: usize,
    /// How many pages.
    pub pages: usize,
    /// Tokens of a page.
    pub page_size: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// A row of one sequence: which, and where it stands.
#[derive(Clone, Copy)]
struct Row {
    token: usize,
    sequence: usize,
    position: usize,
}

/// Attends; `out` is `[tokens, q_heads, head_dim]`, 0 in rows of padding and in rows that see nothing.
///
/// # Panics
/// When slices do not have the sizes that the shapes give, or metadata points outside of them.
pub fn attend<T: Float>(call: &Call<'_, T>, out: &mut [T]) {
    let width = call.q_heads * call.head_dim;
    assert!(width > 0 && call.q_heads.is_multiple_of(call.kv_heads) && out.len() == call.q.len());
    out.fill(T::narrow(0.0));
    let mut rows = Vec::new();
    for sequence in 0..call.num_seqs {
        let [first, end] = [call.cu_q_lens[sequence], call.cu_q_lens[sequence + 1]].map(|row| row as usize);
        let kv_len = call.kv_lens[sequence] as usize;
        rows.extend((first..end).filter_map(|token| {
            let position = (kv_len + token).checked_sub(end)?;
            Some(Row { token, sequence, position })
        }));
    }
    let work: usize = rows.iter().map(|row| 2 * width * (row.position + 1)).sum();
    // Every row owns its part of the output, so rows can go to whichever thread is free.
    let mut parts: Vec<Option<&mut [T]>> = out.chunks_exact_mut(width).map(Some).collect();
    let mut jobs: Vec<(Row, &mut [T])> =
        rows.iter().map(|&row| (row, parts[row.token].take().expect("rows of sequences do not overlap"))).collect();
    let attend = |scratch: &mut Scratch, (row, out): &mut (Row, &mut [T])| {
        pulp::Arch::new().dispatch(AttendRow { call, row: *row, out, scratch });
    };
    if work < THREADED_WORK {
        let mut scratch = Scratch::new(call);
        jobs.iter_mut().for_each(|job| attend(&mut scratch, job));
    } else {
        jobs.par_iter_mut().for_each_init(|| Scratch::new(call), attend);
    }
}

/// Buffers of one thread.
struct Scratch {
    /// Scaled queries of one KV head, `[group, head_dim]`.
    q: Vec<f32>,
    /// Accumulators, `[group, head_dim]`.
    acc: Vec<f32>,
    /// Logits, then weights, of one block: `[group, KEY_BLOCK]`.
    logits: Vec<f32>,
    /// A widened key or value.
    vector: Vec<f32>,
    /// Largest logit so far, `[group]`.
    max: Vec<f32>,
    /// Sum of the weights so far, `[group]`.
    sum: Vec<f32>,
}

impl Scratch {
    fn new<T>(call: &Call<'_, T>) -> Self {
        let group = call.q_heads / call.kv_heads;
        let rows = group * call.head_dim;
        Self {
            q: vec![0.0; rows],
            acc: vec![0.0; rows],
            logits: vec![0.0; group * KEY_BLOCK],
            vector: vec![0.0; call.head_dim],
            max: vec![0.0; group],
            sum: vec![0.0; group],
        }
    }
}

/// [`attend_row`] as `pulp` wants it: compiled once per instruction set, the best one chosen at run time.
struct AttendRow<'j, 'a, T> {
    call: &'j Call<'a, T>,
    row: Row,
    out: &'j mut [T],
    scratch: &'j mut Scratch,
}

impl<T: Float> WithSimd for AttendRow<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        attend_row(simd, self.call, self.row, self.out, self.scratch);
    }
}

#[inline(always)]
fn attend_row<S: Simd, T: Float>(simd: S, call: &Call<'_, T>, row: Row, out: &mut [T], scratch: &mut Scratch) {
    let (dim, group) = (call.head_dim, call.q_heads / call.kv_heads);
    let q = &call.q[row.token * call.q_heads * dim..][..call.q_heads * dim];
    let table = &call.page_indices[row.sequence * call.pages_per_seq..][..call.pages_per_seq];
    let end = row.position + 1;
    let start = call.sliding_window.map_or(0, |window| end.saturating_sub(window));
    let Scratch { q: scaled, acc, logits, vector, max, sum } = scratch;
    for head in 0..call.kv_heads {
        let heads = head * group * dim..(head + 1) * group * dim;
        for (scaled, q) in scaled.iter_mut().zip(&q[heads.clone()]) {
            *scaled = q.widen() * call.scale;
        }
        acc.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        // A token's vectors: key and value of head 0, key and value of head 1, ...
        let stride = 2 * call.kv_heads * dim;
        // The parts of pages that hold some keys: (ordinal of the first key, its tokens).
        let parts = |keys: Range<usize>| {
            let mut key = keys.start;
            std::iter::from_fn(move || {
                let (ordinal, offset) = (key / call.page_size, key % call.page_size);
                let count = (call.page_size - offset).min(keys.end - key);
                let page = call.first_page + *table.get(ordinal).filter(|_| count > 0)? as usize;
                let at = key - keys.start;
                key += count;
                Some((at, &call.kv_pages[(page * call.page_size + offset) * stride..][..count * stride]))
            })
        };
        for block in (start..end).step_by(KEY_BLOCK) {
            let keys = block..(block + KEY_BLOCK).min(end);
            let count = keys.len();
            for (first, tokens) in parts(keys.clone()) {
                for (key, token) in tokens.chunks_exact(stride).enumerate() {
                    let key_vector = T::vector(&token[2 * head * dim..][..dim], vector);
                    for (q, logits) in scaled.chunks_exact(dim).zip(logits.chunks_exact_mut(KEY_BLOCK)) {
                        logits[first + key] = dot(simd, q, key_vector);
                    }
                }
            }
            let groups = acc.chunks_exact_mut(dim).zip(logits.chunks_exact_mut(KEY_BLOCK));
            for ((acc, logits), (max, sum)) in groups.zip(max.iter_mut().zip(sum.iter_mut())) {
                if let Some(cap) = call.soft_cap {
                    logits[..count].iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
                }
                // Beyond the last key: weight zero, so that whole registers can be summed.
                logits[count..].fill(f32::NEG_INFINITY);
                let new_max = max.max(largest(logits));
                let rescale = exp(*max - new_max);
                logits.iter_mut().for_each(|weight| *weight = exp(*weight - new_max));
                logits[count..].fill(0.0);
                acc.iter_mut().for_each(|x| *x *= rescale);
                *sum = *sum * rescale + total(logits);
                *max = new_max;
            }
            for (first, tokens) in parts(keys) {
                for (key, token) in tokens.chunks_exact(stride).enumerate() {
                    let value = T::vector(&token[(2 * head + 1) * dim..][..dim], vector);
                    for (acc, logits) in acc.chunks_exact_mut(dim).zip(logits.chunks_exact(KEY_BLOCK)) {
                        add_scaled(simd, acc, logits[first + key], value);
                    }
                }
            }
        }
        for ((out, acc), sum) in out[heads].chunks_exact_mut(dim).zip(acc.chunks_exact(dim)).zip(&*sum) {
            for (out, acc) in out.iter_mut().zip(acc) {
                *out = T::narrow(acc / sum);
            }
        }
    }
}

/// The largest of a block of logits, lane by lane.
#[inline(always)]
fn largest(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    for logits in logits.as_chunks::<8>().0 {
        for lane in 0..8 {
            lanes[lane] = if logits[lane] > lanes[lane] { logits[lane] } else { lanes[lane] };
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// The sum of a block of weights, lane by lane.
#[inline(always)]
fn total(weights: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    for weights in weights.as_chunks::<8>().0 {
        for lane in 0..8 {
            lanes[lane] += weights[lane];
        }
    }
    lanes.into_iter().sum()
}

/// `a . b`, in as many partial sums as two registers hold.
#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let (a_pairs, a_last) = a.as_chunks::<2>();
    let (b_pairs, b_last) = b.as_chunks::<2>();
    let mut sums = [simd.splat_f32s(0.0); 2];
    for (a, b) in a_pairs.iter().zip(b_pairs) {
        sums[0] = simd.mul_add_f32s(a[0], b[0], sums[0]);
        sums[1] = simd.mul_add_f32s(a[1], b[1], sums[1]);
    }
    for (a, b) in a_last.iter().zip(b_last) {
        sums[0] = simd.mul_add_f32s(*a, *b, sums[0]);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    simd.reduce_sum_f32s(simd.add_f32s(sums[0], sums[1])) + rest
}

/// `acc += factor * x`
#[inline(always)]
fn add_scaled<S: Simd>(simd: S, acc: &mut [f32], factor: f32, x: &[f32]) {
    let ((acc, acc_rest), (x, x_rest)) = (S::as_mut_simd_f32s(acc), S::as_simd_f32s(x));
    let factors = simd.splat_f32s(factor);
    for (acc, x) in acc.iter_mut().zip(x) {
        *acc = simd.mul_add_f32s(factors, *x, *acc);
    }
    for (acc, x) in acc_rest.iter_mut().zip(x_rest) {
        *acc += factor * x;
    }
}

/// `e^x` for `x <= 0`, within 2 units in the last place: `2^n * e^r` with `|r| <= ln(2) / 2` and a Taylor polynomial of
/// degree 7, in plain arithmetic that vectorises. 0 below the smallest normal number.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let x = x.max(-87.0);
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    p * f32::from_bits(((n as i32 + 127) << 23) as u32)
}
