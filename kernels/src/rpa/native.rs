//! Ragged paged attention in plain Rust, for programs that run on the host's own processor.
//!
//! XLA's CPU compiler turns the StableHLO form into some sixty small loops per layer, whose dispatch costs more than
//! the work of a decode step. This form does the same in one call: the engine registers it as a custom call with the
//! CPU plugin. Sums, softmax and accumulator are f32; loops run over rows of `head_dim` in
//! the widest registers that the processor has.
//!
//! Masks are loop bounds here: a key that no row sees is never read, so it may be anything. A row's result does not depend on
//! what else is in the batch, nor on how many threads there are.

use half::bf16;
use pagoda_ir::{
    Element, HostTensor, Result, TensorType,
    stablehlo::{BackendConfig, Builder, ConfigValue, CustomCall, OutputOperandAlias, Tensor},
};

use super::{
    cached::{self, Cached},
    kv_layout::{Half, KvLayout},
    problem::Problem,
};
use crate::{float::Float, named::Arrays, threads::Threads};

mod attend;

pub use attend::attend;

/// The custom call's name; the engine registers its handler under it.
pub const TARGET: &str = "pagoda_rpa";
/// Names of the options in the call's `backend_config`, all written as text.
pub const OPTIONS: [&str; 7] = ["pages", "kv_heads", "scale", "sliding_window", "soft_cap", "sinks", "scaled"];

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
    let (half, width) = (dim / 2, heads * dim);
    // [tokens, heads, head_dim]
    let by_row = transposed(qkv, width, tokens);
    // [tokens, q_heads, head_dim]
    let mut q = vec![T::narrow(0.0); queries * tokens];
    // Keys, then values of a row: [2, kv_heads, head_dim]
    let mut new = vec![0.0; 2 * kv_heads * dim];
    for row in call.rows() {
        // The half-split form of Hugging Face's Llama.
        let (cosines, sines) = rotary[row.position * dim..][..dim].split_at(half);
        let rotated = |vector: &[T], at: usize| {
            let (low, high) = (vector[at].widen(), vector[at + half].widen());
            let (cosine, sine) = (cosines[at], sines[at]);
            [low * cosine - high * sine, high * cosine + low * sine]
        };
        let (own, others) = by_row[row.token * width..][..width].split_at(queries);
        let (keys, values) = others.split_at(kv_heads * dim);
        let rotated_q = q[row.token * queries..][..queries].chunks_exact_mut(dim);
        for (rotated_q, vector) in rotated_q.zip(own.chunks_exact(dim)) {
            for at in 0..half {
                [rotated_q[at], rotated_q[at + half]] = rotated(vector, at).map(T::narrow);
            }
        }
        let (new_keys, new_values) = new.split_at_mut(kv_heads * dim);
        for (new, vector) in new_keys.chunks_exact_mut(dim).zip(keys.chunks_exact(dim)) {
            for at in 0..half {
                [new[at], new[at + half]] = rotated(vector, at);
            }
        }
        new_values.iter_mut().zip(values).for_each(|(new, value)| *new = value.widen());
        write::<C>(call, kv_pages, new_keys, new_values, slots[row.token]);
    }
    let mut attended = vec![T::narrow(0.0); queries * tokens];
    attend::<T, C>(call, &q, kv_pages, &mut attended, None, threads);
    transpose(&attended, tokens, queries, out);
}

/// `from [rows, columns]` as `[columns, rows]`.
fn transposed<T: Float>(from: &[T], rows: usize, columns: usize) -> Vec<T> {
    if columns == 1 {
        return from.to_vec();
    }
    let mut to = vec![T::narrow(0.0); from.len()];
    transpose(from, rows, columns, &mut to);
    to
}

/// `from [rows, columns]` to `to [columns, rows]`, by squares that stay in the nearest cache.
fn transpose<T: Float>(from: &[T], rows: usize, columns: usize, to: &mut [T]) {
    const SIDE: usize = 16;
    for first in (0..rows).step_by(SIDE) {
        for start in (0..columns).step_by(SIDE) {
            for row in first..rows.min(first + SIDE) {
                let line = &from[row * columns..][..columns];
                for column in start..columns.min(start + SIDE) {
                    to[column * rows + row] = line[column];
                }
            }
        }
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
    kv.padding().for_each(|range| token[range].fill(C::stored(0.0)));
}

/// The call on the metadata among a problem's inputs.
pub fn call<'m>(problem: &Problem, inputs: &'m Arrays) -> Call<'m> {
    let floats = |name| inputs.get(name).map(HostTensor::as_slice::<f32>);
    let first_page = inputs.get("first_page").map_or(0, |page| page.as_slice::<i32>()[0] as usize);
    Call {
        layer: Layer { first_page, kv: problem.kv_layout() },
        q_heads: problem.q_heads,
        pages_per_seq: problem.pages_per_seq,
        scale: problem.scale as f32,
        sliding_window: problem.sliding_window,
        soft_cap: problem.soft_cap.map(|cap| cap as f32),
        sinks: floats("sinks"),
        scales: floats("k_scale").zip(floats("v_scale")).map(|(k, v)| [k, v]),
        kv_lens: inputs["kv_lens"].as_slice(),
        page_indices: inputs["page_indices"].as_slice(),
        cu_q_lens: inputs["cu_q_lens"].as_slice(),
        num_seqs: inputs["num_seqs"].as_slice::<i32>()[0] as usize,
    }
}

/// The results of a problem that is not fused.
pub(super) fn run(problem: &Problem, inputs: &Arrays, threads: &dyn Threads) -> Option<Vec<HostTensor>> {
    if problem.fused.is_some() {
        return None;
    }
    let run = match (problem.precision.q, problem.precision.kv) {
        (Element::F32, Element::F32) => run_as::<f32, f32>,
        (Element::F32, Element::Bf16) => run_as::<f32, bf16>,
        (Element::F32, Element::I8) => run_as::<f32, i8>,
        (Element::F32, Element::F8E4M3Fn) => run_as::<f32, cached::F8E4M3Fn>,
        (Element::F32, Element::F8E5M2) => run_as::<f32, cached::F8E5M2>,
        (Element::Bf16, Element::Bf16) => run_as::<bf16, bf16>,
        (Element::Bf16, Element::I8) => run_as::<bf16, i8>,
        (Element::Bf16, Element::F8E4M3Fn) => run_as::<bf16, cached::F8E4M3Fn>,
        (Element::Bf16, Element::F8E5M2) => run_as::<bf16, cached::F8E5M2>,
        _ => return None,
    };
    Some(run(problem, inputs, threads))
}

fn run_as<T: Float, C: Cached>(problem: &Problem, inputs: &Arrays, threads: &dyn Threads) -> Vec<HostTensor> {
    let results = problem.results();
    let array = |ty: &TensorType| HostTensor::zeros(ty.element, &ty.dims);
    let (mut out, mut lse) = (array(&results["out"]), results.get("lse").map(array));
    let (q, kv_pages) = (inputs["q"].as_slice(), inputs["kv_pages"].as_slice());
    let sums = lse.as_mut().map(HostTensor::as_mut_slice);
    attend::<T, C>(&call(problem, inputs), q, kv_pages, out.as_mut_slice(), sums, threads);
    [Some(out), lse].into_iter().flatten().collect()
}
