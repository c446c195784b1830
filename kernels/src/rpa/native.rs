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
    Result, TensorType,
    stablehlo::{BackendConfig, Builder, ConfigValue, CustomCall, OutputOperandAlias, Tensor},
};

use pulp::{Simd, WithSimd};

use super::{
    cached::Cached,
    kv_layout::{Half, KvLayout},
    problem::Problem,
};
use crate::{
    float::{Float, exp},
    threads::{self, Threads},
};

/// The custom call's name; the engine registers its handler under it.
pub const TARGET: &str = "pagoda_rpa";
/// Names of the options in the call's `backend_config`, all written as text.
pub const OPTIONS: [&str; 7] = ["pages", "kv_heads", "scale", "sliding_window", "soft_cap", "sinks", "scaled"];

/// Keys of one step of the online softmax.
const KEY_BLOCK: usize = 64;
/// Keys, or values, that are worked on together.
const TOGETHER: usize = 4;
/// Multiply-adds that are worth a second thread.
const THREADED_WORK: usize = 1 << 16;

/// The operands of the custom call, in its order.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'c, 'a> {
    /// `[(q_heads + 2 * kv_heads) * head_dim, tokens]`: this step's queries, keys and values, feature-major and stacked.
    pub qkv: Tensor<'c, 'a>,
    /// As in the problem.
    pub kv_pages: Tensor<'c, 'a>,
    /// `i32[max_seqs]`
    pub kv_lens: Tensor<'c, 'a>,
    /// `i32[max_seqs, pages_per_seq]`
    pub page_indices: Tensor<'c, 'a>,
    /// `i32[max_seqs + 1]`
    pub cu_q_lens: Tensor<'c, 'a>,
    /// `i32[1]`
    pub num_seqs: Tensor<'c, 'a>,
    /// `i32[]`: where the layer's pages begin.
    pub first_page: Tensor<'c, 'a>,
    /// `i32[tokens]`, as [`kv_write`](super::kv_write) takes them.
    pub slots: Tensor<'c, 'a>,
    /// `f32[positions, head_dim]`: the cosines, then the sines of every position's rotary embedding.
    pub rotary: Tensor<'c, 'a>,
    /// As in the problem, if it has them.
    pub sinks: Option<Tensor<'c, 'a>>,
    /// Those of keys and of values, if the problem has them.
    pub scales: Option<[Tensor<'c, 'a>; 2]>,
}

/// Rotates queries and keys, writes the keys and values and attends, in one custom call: the output, feature-major
/// `[q_heads * head_dim, tokens]`, and the KV buffer, which is updated in place.
///
/// # Errors
/// None for operands of the problem's types, unless MLIR fails.
pub fn emit<'c, 'a>(
    b: &Builder<'c, 'a>,
    problem: &Problem,
    operands: &Operands<'c, 'a>,
) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
    let options = [
        Some(problem.pages.to_string()),
        Some(problem.kv_heads.to_string()),
        Some(problem.scale.to_string()),
        problem.sliding_window.map(|window| window.to_string()),
        problem.soft_cap.map(|cap| cap.to_string()),
        problem.sinks.then(|| "on".to_owned()),
        problem.precision.is_scaled().then(|| "on".to_owned()),
    ];
    let options = OPTIONS.iter().zip(options);
    let options = options.filter_map(|(name, value)| Some(((*name).to_owned(), ConfigValue::Text(value?))));
    let call = CustomCall {
        backend_config: BackendConfig::Dictionary(options.collect()),
        output_operand_aliases: vec![OutputOperandAlias { result: 1, operand: 1 }],
        ..CustomCall::default()
    };
    let Operands {
        qkv,
        kv_pages,
        kv_lens,
        page_indices,
        cu_q_lens,
        num_seqs,
        first_page,
        slots,
        rotary,
        sinks,
        scales,
    } = *operands;
    let arguments = [qkv, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, first_page, slots, rotary];
    let arguments: Vec<_> = arguments.into_iter().chain(sinks).chain(scales.into_iter().flatten()).collect();
    let output = TensorType::new(problem.precision.output, &[problem.q_heads * problem.head_dim, problem.tokens]);
    let results = b.custom_call(TARGET, &arguments, &[output, problem.kv_pages_type()], call)?;
    Ok((results[0], results[1]))
}

/// Where a layer's pages lie in the KV buffer.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// The first page.
    pub first_page: usize,
    /// The layout of the buffer.
    pub kv: KvLayout,
}

/// One call: shapes, options and metadata. The meaning of each is that of [`Problem`]'s.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The KV pages.
    pub layer: Layer,
    /// Query heads, a multiple of the KV heads.
    pub q_heads: usize,
    /// Entries of a row of the page table.
    pub pages_per_seq: usize,
    /// Factor of the logits.
    pub scale: f32,
    /// Keys that a row sees at most.
    pub sliding_window: Option<usize>,
    /// Logits `x` become `c * tanh(x / c)`.
    pub soft_cap: Option<f32>,
    /// `[q_heads]`
    pub sinks: Option<&'a [f32]>,
    /// Of keys and of values, `[kv_heads]` each: what is stored is multiplied by it.
    pub scales: Option<[&'a [f32]; 2]>,
    /// `[max_seqs]`
    pub kv_lens: &'a [i32],
    /// `[max_seqs, pages_per_seq]`
    pub page_indices: &'a [i32],
    /// `[max_seqs + 1]`
    pub cu_q_lens: &'a [i32],
    /// Live sequences.
    pub num_seqs: usize,
}

/// A row of one sequence: which, and where it stands.
#[derive(Clone, Copy)]
struct Row {
    token: usize,
    sequence: usize,
    position: usize,
}

impl Call<'_> {
    /// Query heads of a KV head.
    fn group(&self) -> usize {
        self.q_heads / self.layer.kv.heads
    }

    /// The factor of what is stored of one half of a KV head.
    fn factor(&self, half: Half, head: usize) -> f32 {
        self.scales.map_or(1.0, |scales| scales[half as usize][head])
    }

    /// The rows that belong to sequences, and stand somewhere.
    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for sequence in 0..self.num_seqs {
            let [first, end] = [self.cu_q_lens[sequence], self.cu_q_lens[sequence + 1]].map(|row| row as usize);
            let kv_len = self.kv_lens[sequence] as usize;
            rows.extend((first..end).filter_map(|token| {
                let position = (kv_len + token).checked_sub(end)?;
                Some(Row { token, sequence, position })
            }));
        }
        rows
    }
}

/// A step of one layer: rotates this step's queries and keys, writes the keys and values at `slots`, and attends.
///
/// Shapes: `qkv [(q_heads + 2 * kv_heads) * head_dim, tokens]`, `rotary [positions, head_dim]`, `slots [tokens]`,
/// `out [q_heads * head_dim, tokens]`.
///
/// # Panics
/// When slices do not have the sizes that the shapes give, or metadata points outside of them.
pub fn step<T: Float, C: Cached>(
    call: &Call<'_>,
    qkv: &[T],
    rotary: &[f32],
    slots: &[i32],
    kv_pages: &mut [C::Code],
    out: &mut [T],
    threads: &dyn Threads,
) {
    let KvLayout { head_dim: dim, heads: kv_heads, .. } = call.layer.kv;
    let (tokens, queries, heads) = (slots.len(), call.q_heads * dim, call.q_heads + call.layer.kv.rows());
    assert!(qkv.len() == heads * dim * tokens && out.len() == queries * tokens, "{tokens} tokens of {heads} heads");
    // [tokens, q_heads, head_dim]
    let mut q = vec![T::narrow(0.0); queries * tokens];
    // Keys, then values of a row: [2, kv_heads, head_dim]
    let mut new = vec![0.0; 2 * kv_heads * dim];
    for row in call.rows() {
        let element = |head: usize, at: usize| qkv[(head * dim + at) * tokens + row.token].widen();
        // The half-split form of Hugging Face's Llama.
        let (cosines, sines) = rotary[row.position * dim..][..dim].split_at(dim / 2);
        let rotated = |head: usize, at: usize| {
            let (low, high) = (element(head, at), element(head, at + dim / 2));
            let (cosine, sine) = (cosines[at], sines[at]);
            [low * cosine - high * sine, high * cosine + low * sine]
        };
        for (head, vector) in q[row.token * queries..][..queries].chunks_exact_mut(dim).enumerate() {
            for at in 0..dim / 2 {
                [vector[at], vector[at + dim / 2]] = rotated(head, at).map(T::narrow);
            }
        }
        let (keys, values) = new.split_at_mut(kv_heads * dim);
        for (head, vector) in keys.chunks_exact_mut(dim).enumerate() {
            for at in 0..dim / 2 {
                [vector[at], vector[at + dim / 2]] = rotated(call.q_heads + head, at);
            }
        }
        for (head, vector) in values.chunks_exact_mut(dim).enumerate() {
            let head = call.q_heads + kv_heads + head;
            vector.iter_mut().enumerate().for_each(|(at, value)| *value = element(head, at));
        }
        write::<C>(call, kv_pages, keys, values, slots[row.token]);
    }
    let mut attended = vec![T::narrow(0.0); queries * tokens];
    attend::<T, C>(call, &q, kv_pages, &mut attended, None, threads);
    for (feature, out) in out.chunks_exact_mut(tokens).enumerate() {
        out.iter_mut().enumerate().for_each(|(token, out)| *out = attended[token * queries + feature]);
    }
}

/// Writes the keys and values of a row, `[kv_heads, head_dim]` each, at `slot` (`page * page_size + offset`) of the layer's
/// pages. A slot outside the layer writes nothing.
///
/// # Panics
/// When slices do not have the sizes that the shapes give.
pub fn write<C: Cached>(call: &Call<'_>, kv_pages: &mut [C::Code], k: &[f32], v: &[f32], slot: i32) {
    let Layer { first_page, kv } = call.layer;
    let Some(slot) = usize::try_from(slot).ok().filter(|&slot| slot < kv.slots()) else { return };
    let token = &mut kv_pages[kv.token(first_page, slot)];
    for (half, new) in [(Half::Key, k), (Half::Value, v)] {
        for (head, new) in new.chunks_exact(kv.head_dim).enumerate() {
            let factor = call.factor(half, head);
            let stored = &mut token[kv.offset(head, half)..][..kv.head_dim];
            stored.iter_mut().zip(new).for_each(|(stored, new)| *stored = C::stored(new / factor));
        }
    }
}

/// Attends; `q` and `out` are `[tokens, q_heads, head_dim]`, `lse` is `[tokens, q_heads]`; 0 in rows of padding and in rows
/// that see nothing.
///
/// # Panics
/// When slices do not have the sizes that the shapes give, or metadata points outside of them.
pub fn attend<T: Float, C: Cached>(
    call: &Call<'_>,
    q: &[T],
    kv_pages: &[C::Code],
    out: &mut [T],
    lse: Option<&mut [f32]>,
    threads: &dyn Threads,
) {
    let KvLayout { heads: kv_heads, head_dim, .. } = call.layer.kv;
    let width = call.group() * head_dim;
    assert!(width > 0 && call.q_heads.is_multiple_of(kv_heads) && out.len() == q.len());
    out.fill(T::narrow(0.0));
    let rows = call.rows();
    let work: usize = rows.iter().map(|row| call.layer.kv.rows() * width * (row.position + 1)).sum();
    // Every row and KV head owns its part of the output, so they can go to whichever thread is free.
    let mut parts: Vec<Option<&mut [T]>> = out.chunks_exact_mut(width).map(Some).collect();
    let mut sums: Vec<&mut [f32]> = Vec::new();
    if let Some(lse) = lse {
        lse.fill(0.0);
        sums.extend(lse.chunks_exact_mut(call.group()));
    }
    let mut sums: Vec<_> = sums.into_iter().map(Some).collect();
    let jobs = rows.iter().flat_map(|row| (0..kv_heads).map(move |head| (*row, head)));
    let jobs = jobs.map(|(row, head)| {
        let part = row.token * kv_heads + head;
        let out = parts[part].take().expect("rows of sequences do not overlap");
        let lse = sums.get_mut(part).and_then(Option::take).unwrap_or_default();
        Job { call, q: &q[part * width..][..width], kv_pages, row, head, out, lse }
    });
    let mut jobs: Vec<Job<'_, T, C>> = jobs.collect();
    let each = |jobs: &mut [Job<'_, T, C>]| {
        let mut scratch = Scratch::new(call);
        jobs.iter_mut().for_each(|job| pulp::Arch::new().dispatch(AttendRow { job, scratch: &mut scratch }));
    };
    if work < THREADED_WORK {
        return each(&mut jobs);
    }
    // Rows of one sequence grow with their position: many small pieces even out.
    let pieces = jobs.len().min(8 * threads.count());
    let (mut jobs, mut lists) = (jobs.into_iter(), Vec::with_capacity(pieces));
    for piece in (1..=pieces).rev() {
        let count = jobs.len().div_ceil(piece);
        lists.push(jobs.by_ref().take(count).collect::<Vec<_>>());
    }
    threads::for_each(threads, lists, |mut jobs| each(&mut jobs));
}

/// One row of one KV head's group of query heads.
struct Job<'j, T, C: Cached> {
    call: &'j Call<'j>,
    /// `[group, head_dim]`
    q: &'j [T],
    kv_pages: &'j [C::Code],
    row: Row,
    head: usize,
    /// `[group, head_dim]`
    out: &'j mut [T],
    /// `[group]`, or empty.
    lse: &'j mut [f32],
}

/// Buffers of one thread.
struct Scratch {
    /// Scaled queries of one KV head, `[group, head_dim]`.
    q: Vec<f32>,
    /// Accumulators, `[group, head_dim]`.
    acc: Vec<f32>,
    /// Logits, then weights, of one block: `[group, KEY_BLOCK]`.
    logits: Vec<f32>,
    /// Keys or values in f32, `[TOGETHER, head_dim]`.
    vectors: Vec<f32>,
    /// Largest logit so far, `[group]`.
    max: Vec<f32>,
    /// Sum of the weights so far, `[group]`.
    sum: Vec<f32>,
}

impl Scratch {
    fn new(call: &Call<'_>) -> Self {
        let (group, dim) = (call.group(), call.layer.kv.head_dim);
        Self {
            q: vec![0.0; group * dim],
            acc: vec![0.0; group * dim],
            logits: vec![0.0; group * KEY_BLOCK],
            vectors: vec![0.0; TOGETHER * dim],
            max: vec![0.0; group],
            sum: vec![0.0; group],
        }
    }
}

/// [`attend_row`] as `pulp` wants it: compiled once per instruction set, the best one chosen at run time.
struct AttendRow<'s, 'j, T, C: Cached> {
    job: &'s mut Job<'j, T, C>,
    scratch: &'s mut Scratch,
}

impl<T: Float, C: Cached> WithSimd for AttendRow<'_, '_, T, C> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        attend_row(simd, self.job, self.scratch);
    }
}

#[inline(always)]
fn attend_row<S: Simd, T: Float, C: Cached>(simd: S, job: &mut Job<'_, T, C>, scratch: &mut Scratch) {
    let Job { call, q, kv_pages, row, head, out, lse } = job;
    let (head, kv_pages) = (*head, *kv_pages);
    let Layer { first_page, kv } = call.layer;
    let KvLayout { page_size, head_dim: dim, .. } = kv;
    let table = &call.page_indices[row.sequence * call.pages_per_seq..][..call.pages_per_seq];
    let end = row.position + 1;
    let start = call.sliding_window.map_or(0, |window| end.saturating_sub(window));
    let Scratch { q: scaled, acc, logits, vectors, max, sum } = scratch;
    let scale = call.scale * call.factor(Half::Key, head);
    scaled.iter_mut().zip(*q).for_each(|(scaled, q)| *scaled = q.widen() * scale);
    acc.fill(0.0);
    max.fill(f32::NEG_INFINITY);
    sum.fill(0.0);
    let stride = kv.token_elements();
    // The parts of pages that hold some keys: (ordinal of the first key, its tokens).
    let parts = |keys: Range<usize>| {
        let mut key = keys.start;
        std::iter::from_fn(move || {
            let (ordinal, offset) = (key / page_size, key % page_size);
            let count = (page_size - offset).min(keys.end - key);
            let page = first_page + *table.get(ordinal).filter(|_| count > 0)? as usize;
            let at = key - keys.start;
            key += count;
            Some((at, &kv_pages[kv.token(page, offset).start..][..count * stride]))
        })
    };
    for block in (start..end).step_by(KEY_BLOCK) {
        let keys = block..(block + KEY_BLOCK).min(end);
        let count = keys.len();
        for (first, tokens) in parts(keys.clone()) {
            for (at, tokens) in tokens.chunks(TOGETHER * stride).enumerate() {
                let (at, live) = (first + at * TOGETHER, tokens.len() / stride);
                let keys = together::<C>(tokens, stride, kv.offset(head, Half::Key), dim, vectors);
                for (q, logits) in scaled.chunks_exact(dim).zip(logits.chunks_exact_mut(KEY_BLOCK)) {
                    logits[at..][..live].copy_from_slice(&dots(simd, q, keys)[..live]);
                }
            }
        }
        let groups = acc.chunks_exact_mut(dim).zip(logits.chunks_exact_mut(KEY_BLOCK));
        for ((acc, logits), (max, sum)) in groups.zip(max.iter_mut().zip(sum.iter_mut())) {
            if let Some(cap) = call.soft_cap {
                logits[..count].iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
            }
            // Beyond the last key: weight zero, so that whole registers can be summed.
            let logits = &mut logits[..count.next_multiple_of(8)];
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
            for (at, tokens) in tokens.chunks(TOGETHER * stride).enumerate() {
                let (at, live) = (first + at * TOGETHER, tokens.len() / stride);
                let values = together::<C>(tokens, stride, kv.offset(head, Half::Value), dim, vectors);
                for (acc, all) in acc.chunks_exact_mut(dim).zip(logits.chunks_exact(KEY_BLOCK)) {
                    let mut weights = [0.0; TOGETHER];
                    weights[..live].copy_from_slice(&all[at..][..live]);
                    add_scaled(simd, acc, weights, values);
                }
            }
        }
    }
    let factor = call.factor(Half::Value, head);
    let group = call.group();
    for (member, (out, acc)) in out.chunks_exact_mut(dim).zip(acc.chunks_exact(dim)).enumerate() {
        let (mut largest, mut total, mut factor) = (max[member], sum[member], factor);
        if let Some(sinks) = call.sinks {
            let sink = sinks[head * group + member];
            let rescale = exp(largest - largest.max(sink));
            largest = largest.max(sink);
            total = total * rescale + exp(sink - largest);
            factor *= rescale;
        }
        for (out, acc) in out.iter_mut().zip(acc) {
            *out = T::narrow(factor * acc / total);
        }
        if let Some(lse) = lse.get_mut(member) {
            *lse = largest + total.ln();
        }
    }
}

/// One vector, at `offset`, of each of up to [`TOGETHER`] tokens; beyond the last token its vector again.
#[inline(always)]
fn together<'v, C: Cached>(
    tokens: &'v [C::Code],
    stride: usize,
    offset: usize,
    dim: usize,
    wide: &'v mut [f32],
) -> [&'v [f32]; TOGETHER] {
    let last = tokens.len() / stride - 1;
    let mut vectors: [&[f32]; TOGETHER] = [&[]; TOGETHER];
    for ((token, vector), wide) in vectors.iter_mut().enumerate().zip(wide.chunks_exact_mut(dim)) {
        *vector = C::vector(&tokens[token.min(last) * stride + offset..][..dim], wide);
    }
    vectors
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

/// The products of `a` with each of `b`. (Loops, not closures: a closure is compiled without the instruction set.)
#[inline(always)]
fn dots<S: Simd, const N: usize>(simd: S, a: &[f32], b: [&[f32]; N]) -> [f32; N] {
    let (a, a_rest) = S::as_simd_f32s(a);
    let mut sums = [simd.splat_f32s(0.0); N];
    let mut vectors: [&[S::f32s]; N] = [&[]; N];
    for n in 0..N {
        // Slices of one length, so that no index is checked in the loop.
        vectors[n] = &S::as_simd_f32s(b[n]).0[..a.len()];
    }
    for (at, a) in a.iter().enumerate() {
        for n in 0..N {
            sums[n] = simd.mul_add_f32s(*a, vectors[n][at], sums[n]);
        }
    }
    let mut products = [0.0; N];
    for n in 0..N {
        let rest = S::as_simd_f32s(b[n]).1;
        products[n] = simd.reduce_sum_f32s(sums[n]);
        for (a, b) in a_rest.iter().zip(rest) {
            products[n] += a * b;
        }
    }
    products
}

/// `acc += factors . x`, one after the other.
#[inline(always)]
fn add_scaled<S: Simd, const N: usize>(simd: S, acc: &mut [f32], factors: [f32; N], x: [&[f32]; N]) {
    let (acc, acc_rest) = S::as_mut_simd_f32s(acc);
    let mut vectors: [&[S::f32s]; N] = [&[]; N];
    let mut wide = [simd.splat_f32s(0.0); N];
    for n in 0..N {
        vectors[n] = &S::as_simd_f32s(x[n]).0[..acc.len()];
        wide[n] = simd.splat_f32s(factors[n]);
    }
    for (at, acc) in acc.iter_mut().enumerate() {
        for n in 0..N {
            *acc = simd.mul_add_f32s(wide[n], vectors[n][at], *acc);
        }
    }
    for (at, acc) in acc_rest.iter_mut().enumerate() {
        for n in 0..N {
            *acc += factors[n] * S::as_simd_f32s(x[n]).1[at];
        }
    }
}
