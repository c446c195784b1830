//! The step program: one ragged step of a Llama model over paged KV, emitted as StableHLO.
//!
//! One emission serves both programs that the engine compiles:
//! - [`prefill`]: a packed chunk of prompt rows of several sequences; the rows that end a prompt are sampled, or all
//!   logits are returned (to score a text, and for the tests).
//! - [`decode`]: one row per slot, in a loop on the device that samples, stops at an end-of-text token and goes on,
//!   up to `rounds` steps per call.
//!
//! *Layout.* Activations are feature-major, `[features, rows]`, so that every matmul is `W x` with the weight as Hugging
//! Face stores it, `[out, in]`: no transposed copy is ever made, and this is XLA's fastest orientation for a few rows
//! on the CPU. Query, key and value projections are one matmul, gate and up another.
//!
//! *KV cache.* All layers share one buffer `[layers * pages, page_size, 2 * kv_heads, head_dim]`; layer `l` owns the
//! pages from `l * pages` on. Rows of idle slots and padding have the KV slot -1 and write nothing.
//!
//! *Layers are unrolled*: a `stablehlo.while` over stacked weights would slice a copy of each layer's weights on every
//! step (measured, see ARCHITECTURE.md).
//!
//! Numerics: weights, activations and KV in the compute type; normalisation, softmax, logits and sampling in f32.

use pagoda_ir::stablehlo::{Builder, Direction, DotDims, Module, Precision, Tensor};
use pagoda_ir::tensor::HostTensor;
use pagoda_ir::{Context, Element, Result, TensorType};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::matmul::native::{Around, Norm};
use pagoda_kernels::matmul::{Activation, Epilogue, Layout, Spec};
use pagoda_kernels::{Invalid, matmul, rpa};

use crate::model::config::LlamaConfig;
use crate::sampler::{self, Keys, Parameters, Sampling};

/// The static sizes of a step program.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StepShape {
    /// Rows of one prefill call.
    pub prefill_rows: usize,
    /// Sequences of one call; rows of a decode step.
    pub slots: usize,
    /// KV pages of one layer.
    pub pages: usize,
    /// Tokens of one page.
    pub page_size: usize,
    /// Entries of one row of the page table.
    pub pages_per_seq: usize,
    /// Positions that the rotary table covers.
    pub max_positions: usize,
    /// Most decode steps of one call.
    pub max_rounds: usize,
    /// Type of weights, activations and KV.
    pub compute: Element,
    /// Which form of the kernels the program carries.
    pub kernels: KernelForm,
}

/// The forms in which a program can carry its kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelForm {
    /// Plain StableHLO: any plugin.
    Stablehlo,
    /// Attention and few-column matmuls in Rust, as custom calls: the CPU plugin ([`crate::native::register_all`] comes first).
    Native,
    /// The TPU's kernels, planned for a v5p core: Mosaic matmuls and attention, run by the tile machine as custom calls
    /// of the CPU plugin ([`crate::native::register_all`] comes first).
    Mosaic,
}

impl StepShape {
    /// The type of the KV buffer: `[layers * pages, page_size, 2 * kv_heads, head_dim]`.
    pub fn kv_type(&self, config: &LlamaConfig) -> TensorType {
        let pages = config.layers * self.pages;
        TensorType::new(self.compute, &[pages, self.page_size, 2 * config.kv_heads, config.head_dim])
    }

    /// The attention over `rows` query rows.
    fn attention(
        &self,
        config: &LlamaConfig,
        rows: usize,
        kind: rpa::Kind,
    ) -> std::result::Result<rpa::Problem, Invalid> {
        rpa::Problem::new(rpa::Spec {
            kind,
            element: self.compute,
            tokens: rows,
            q_heads: config.q_heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            page_size: self.page_size,
            pages: self.pages,
            layers: config.layers,
            max_seqs: self.slots,
            pages_per_seq: self.pages_per_seq,
            scale: (config.head_dim as f64).powf(-0.5),
            sliding_window: None,
            soft_cap: None,
        })
    }
}

/// The weights of one layer, in the order of [`weight_types`].
#[derive(Clone, Copy)]
struct Layer<'c, 'a> {
    /// `[hidden]`
    input_norm: Tensor<'c, 'a>,
    /// `[(q_heads + 2 * kv_heads) * head_dim, hidden]`: query, key and value rows stacked.
    qkv: Tensor<'c, 'a>,
    /// `[hidden, q_heads * head_dim]`
    output: Tensor<'c, 'a>,
    /// `[hidden]`
    post_norm: Tensor<'c, 'a>,
    /// `[2 * intermediate, hidden]`: gate and up rows stacked.
    gate_up: Tensor<'c, 'a>,
    /// `[hidden, intermediate]`
    down: Tensor<'c, 'a>,
}

const LAYER_WEIGHTS: usize = 6;

/// The model's weights as program arguments.
struct Weights<'c, 'a> {
    /// `[vocab, hidden]`
    embedding: Tensor<'c, 'a>,
    layers: Vec<Layer<'c, 'a>>,
    /// `[hidden]`
    norm: Tensor<'c, 'a>,
    /// `[vocab, hidden]`; the embedding where they are tied.
    head: Tensor<'c, 'a>,
    /// `f32[max_positions, head_dim]`: cosines, then sines, computed in f64 on the host.
    rotary: Tensor<'c, 'a>,
}

/// The types of the weight arguments, which come first in both programs: embedding, six per layer, final norm,
/// (untied only) head, rotary table.
pub fn weight_types(config: &LlamaConfig, shape: &StepShape) -> Vec<TensorType> {
    let ty = |dims: &[usize]| TensorType::new(shape.compute, dims);
    let (hidden, heads) = (config.hidden_size, config.q_heads * config.head_dim);
    let mut types = vec![ty(&[config.vocab_size, hidden])];
    for _ in 0..config.layers {
        types.extend([
            ty(&[hidden]),
            ty(&[heads + 2 * config.kv_heads * config.head_dim, hidden]),
            ty(&[hidden, heads]),
            ty(&[hidden]),
            ty(&[2 * config.intermediate_size, hidden]),
            ty(&[hidden, config.intermediate_size]),
        ]);
    }
    types.push(ty(&[hidden]));
    if !config.tie_word_embeddings {
        types.push(ty(&[config.vocab_size, hidden]));
    }
    types.push(TensorType::new(Element::F32, &[shape.max_positions, config.head_dim]));
    types
}

impl<'c, 'a> Weights<'c, 'a> {
    /// Takes the weights from the front of the arguments; returns them and the rest.
    fn take<'s>(config: &LlamaConfig, args: &'s [Tensor<'c, 'a>]) -> (Self, &'s [Tensor<'c, 'a>]) {
        let layers_end = 1 + LAYER_WEIGHTS * config.layers;
        let layers = args[1..layers_end]
            .chunks_exact(LAYER_WEIGHTS)
            .map(|w| Layer { input_norm: w[0], qkv: w[1], output: w[2], post_norm: w[3], gate_up: w[4], down: w[5] })
            .collect();
        let (norm, rest) = (args[layers_end], &args[layers_end + 1..]);
        let (head, rest) = if config.tie_word_embeddings { (args[0], rest) } else { (rest[0], &rest[1..]) };
        (Self { embedding: args[0], layers, norm, head, rotary: rest[0] }, &rest[1..])
    }
}

/// Where the rows of a step stand, and which KV they see.
#[derive(Clone, Copy)]
struct Rows<'c, 'a> {
    /// `i32[rows]`: token ids.
    tokens: Tensor<'c, 'a>,
    /// `i32[rows]`: each row's position in its sequence.
    positions: Tensor<'c, 'a>,
    /// `i32[rows]`: `page * page_size + offset` where the row's key and value go, within one layer; -1: nowhere.
    kv_slots: Tensor<'c, 'a>,
    /// `i32[slots]`: length of each sequence, this step's rows included.
    kv_lens: Tensor<'c, 'a>,
    /// `i32[slots, pages_per_seq]`
    page_indices: Tensor<'c, 'a>,
    /// `i32[slots + 1]`: first row of each sequence.
    cu_q_lens: Tensor<'c, 'a>,
    /// `i32[1]`
    num_seqs: Tensor<'c, 'a>,
}

/// The chip that Mosaic kernels are planned for.
const CHIP: Chip = Chip::V5p;

fn unplanned(problem: impl std::fmt::Display) -> pagoda_ir::Error {
    pagoda_ir::Error::op("a kernel's plan", problem.to_string())
}

/// Emits the layers over `rows` rows.
struct Emitter<'e, 'c, 'a> {
    context: &'c Context,
    b: &'e Builder<'c, 'a>,
    config: &'e LlamaConfig,
    shape: &'e StepShape,
    attention: &'e rpa::Problem,
    rows: usize,
}

impl<'c, 'a> Emitter<'_, 'c, 'a> {
    /// Runs all layers: hidden state before the final norm, `[hidden, rows]`, and the KV buffer.
    fn forward(
        &self,
        weights: &Weights<'c, 'a>,
        rows: &Rows<'c, 'a>,
        mut kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let (b, config) = (self.b, self.config);
        let angles = match self.shape.kernels {
            KernelForm::Native => None, // the custom call looks them up
            KernelForm::Stablehlo | KernelForm::Mosaic => Some(b.take(weights.rotary, rows.positions, 0)?), // [rows, head_dim]
        };
        let mut x = b.transpose(b.take(weights.embedding, rows.tokens, 0)?, &[1, 0])?; // [hidden, rows]
        for (index, layer) in weights.layers.iter().enumerate() {
            let norm = |weight| Some(Norm { weight, epsilon: config.rms_norm_eps });
            let activation = Activation::SiluGate;
            let qkv = self.linear(layer.qkv, x, &Around { norm: norm(layer.input_norm), ..Around::NOTHING })?;
            let first_page = b.scalar(Element::I32, (index * self.shape.pages) as f64)?;
            let attended = match angles {
                Some(angles) => self.attend(qkv, angles, rows, first_page, &mut kv)?,
                None => self.attend_natively(qkv, weights.rotary, rows, first_page, &mut kv)?,
            };
            x = self.linear(layer.output, attended, &Around { residual: Some(x), ..Around::NOTHING })?;
            let gated = Around { norm: norm(layer.post_norm), activation, residual: None };
            let inner = self.linear(layer.gate_up, x, &gated)?;
            x = self.linear(layer.down, inner, &Around { residual: Some(x), ..Around::NOTHING })?;
        }
        Ok((x, kv))
    }

    /// `W [out, in]` times `x [in, rows]` with what stands `around` it, accumulated in f32, in the compute type.
    fn linear(&self, w: Tensor<'c, 'a>, x: Tensor<'c, 'a>, around: &Around<Tensor<'c, 'a>>) -> Result<Tensor<'c, 'a>> {
        self.product(w, x, around, self.shape.compute)
    }

    /// As [`Self::linear`], in type `result`: the compute type, or f32. True f32 products where the operands are f32.
    fn product(
        &self,
        w: Tensor<'c, 'a>,
        x: Tensor<'c, 'a>,
        around: &Around<Tensor<'c, 'a>>,
        result: Element,
    ) -> Result<Tensor<'c, 'a>> {
        let b = self.b;
        if self.shape.kernels == KernelForm::Native && x.dims()[1] <= matmul::native::MAX_COLUMNS {
            return matmul::native::emit(b, w, x, around, result);
        }
        let x = around.norm.map_or(Ok(x), |norm| self.rms_norm(x, norm.weight))?;
        if self.shape.kernels == KernelForm::Mosaic {
            let epilogue = Epilogue { bias: false, activation: around.activation, residual: around.residual.is_some() };
            return self.mosaic_matmul(w, x, epilogue, around.residual, result);
        }
        let dims = DotDims { batch: (&[], &[]), contract: (&[1], &[0]) };
        let mut y = b.convert(b.dot_general_with(w, x, dims, Element::F32, Precision::Highest)?, result)?;
        if around.activation == Activation::SiluGate {
            let inner = w.dims()[0] / 2;
            let (gate, up) = (b.slice_in_dim(y, 0, inner, 0)?, b.slice_in_dim(y, inner, 2 * inner, 0)?);
            y = b.multiply(b.multiply(gate, b.logistic(gate)?)?, up)?;
        }
        around.residual.map_or(Ok(y), |residual| b.add(residual, y))
    }

    /// A matmul kernel for the TPU, with tiles of the planner's choice.
    fn mosaic_matmul(
        &self,
        w: Tensor<'c, 'a>,
        x: Tensor<'c, 'a>,
        epilogue: Epilogue,
        residual: Option<Tensor<'c, 'a>>,
        output: Element,
    ) -> Result<Tensor<'c, 'a>> {
        let (rows, layout) = (w.dims()[0], Layout::FeatureMajor);
        let n = if epilogue.activation == Activation::SiluGate { rows / 2 } else { rows };
        let spec = Spec { m: x.dims()[1], k: x.dims()[0], n, input: self.shape.compute, output, layout, epilogue };
        let problem = matmul::Problem::new(spec).map_err(unplanned)?;
        let plan = matmul::plan::Plan::new(problem, CHIP, matmul::plan::Options::default()).map_err(unplanned)?;
        let kernel = matmul::mosaic::kernel(self.context, &plan)?.for_tile_machine();
        let operands: Vec<_> = [Some(x), Some(w), residual].into_iter().flatten().collect();
        matmul::mosaic::call(self.b, &kernel, &problem, &operands)
    }

    /// `f32[columns, vocab]` logits of hidden states `[hidden, columns]` before the final norm.
    fn logits(&self, weights: &Weights<'c, 'a>, hidden: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let norm = Norm { weight: weights.norm, epsilon: self.config.rms_norm_eps };
        let around = Around { norm: Some(norm), ..Around::NOTHING };
        let logits = self.product(weights.head, hidden, &around, Element::F32)?;
        self.b.transpose(logits, &[1, 0])
    }

    /// Root-mean-square norm over the features of `[hidden, rows]`, in f32.
    fn rms_norm(&self, x: Tensor<'c, 'a>, weight: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let b = self.b;
        let dims = x.dims();
        let wide = b.convert(x, Element::F32)?;
        let sum = b.reduce_sum(b.multiply(wide, wide)?, &[0])?;
        let columns = &dims[1..];
        let mean = b.divide(sum, b.splat(Element::F32, columns, dims[0] as f64)?)?;
        let scale = b.rsqrt(b.add(mean, b.splat(Element::F32, columns, self.config.rms_norm_eps)?)?)?;
        let normed = b.multiply(wide, b.broadcast_in_dim(scale, &dims, &[1])?)?;
        // Rounded before the weight is applied, as the model was trained.
        let normed = b.convert(normed, self.shape.compute)?;
        b.multiply(normed, b.broadcast_in_dim(weight, &dims, &[0])?)
    }

    /// `count` heads of the stacked projection from head `first` on: `[rows, count, head_dim]`.
    fn heads(&self, qkv: Tensor<'c, 'a>, first: usize, count: usize) -> Result<Tensor<'c, 'a>> {
        let dim = self.config.head_dim;
        let part = self.b.slice_in_dim(qkv, first * dim, (first + count) * dim, 0)?;
        self.b.reshape(self.b.transpose(part, &[1, 0])?, &[self.rows, count, dim])
    }

    /// Rotary embedding of `x [rows, heads, head_dim]` in the half-split form of Hugging Face's Llama, in f32.
    fn rotate(&self, x: Tensor<'c, 'a>, cosines: Tensor<'c, 'a>, sines: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let b = self.b;
        let dims = x.dims();
        let half = [dims[0], dims[1], dims[2] / 2];
        let wide = b.convert(x, Element::F32)?;
        let low = b.slice_in_dim(wide, 0, half[2], 2)?;
        let high = b.slice_in_dim(wide, half[2], dims[2], 2)?;
        let (cosines, sines) =
            (b.broadcast_in_dim(cosines, &half, &[0, 2])?, b.broadcast_in_dim(sines, &half, &[0, 2])?);
        let rotated_low = b.subtract(b.multiply(low, cosines)?, b.multiply(high, sines)?)?;
        let rotated_high = b.add(b.multiply(high, cosines)?, b.multiply(low, sines)?)?;
        b.convert(b.concatenate(&[rotated_low, rotated_high], 2)?, self.shape.compute)
    }

    /// Where each slot's row goes, `page * page_size + offset`; -1 for idle slots.
    fn kv_slots(
        &self,
        positions: Tensor<'c, 'a>,
        page_indices: Tensor<'c, 'a>,
        active: Tensor<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let (b, dims) = (self.b, page_indices.dims()); // [slots, pages_per_seq]
        let size = b.splat(Element::I32, &dims[..1], self.shape.page_size as f64)?;
        let ordinal = b.divide(positions, size)?;
        let columns = b.iota(Element::I32, &dims, 1)?;
        let here = b.compare(columns, Direction::Eq, b.broadcast_in_dim(ordinal, &dims, &[0])?)?;
        let page = b.reduce_sum(b.select(here, page_indices, b.splat(Element::I32, &dims, 0.0)?)?, &[1])?;
        let slot = b.add(b.multiply(page, size)?, b.remainder(positions, size)?)?;
        b.select(active, slot, b.splat(Element::I32, &dims[..1], -1.0)?)
    }

    /// Rotates this step's queries and keys, writes keys and values into the layer's pages, and attends over them:
    /// `[q_heads * head_dim, rows]` of `qkv [(q_heads + 2 * kv_heads) * head_dim, rows]`.
    fn attend(
        &self,
        qkv: Tensor<'c, 'a>,
        angles: Tensor<'c, 'a>,
        rows: &Rows<'c, 'a>,
        first_page: Tensor<'c, 'a>,
        kv: &mut Tensor<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let (b, config) = (self.b, self.config);
        let half = config.head_dim / 2;
        let cosines = b.slice_in_dim(angles, 0, half, 1)?;
        let sines = b.slice_in_dim(angles, half, config.head_dim, 1)?;
        let q = self.rotate(self.heads(qkv, 0, config.q_heads)?, cosines, sines)?;
        let k = self.rotate(self.heads(qkv, config.q_heads, config.kv_heads)?, cosines, sines)?;
        let v = self.heads(qkv, config.q_heads + config.kv_heads, config.kv_heads)?;
        *kv = rpa::kv_write::emit(b, self.attention, *kv, k, v, rows.kv_slots, Some(first_page))?;
        let operands = rpa::stablehlo::Operands {
            q,
            kv_pages: *kv,
            kv_lens: rows.kv_lens,
            page_indices: rows.page_indices,
            cu_q_lens: rows.cu_q_lens,
            num_seqs: rows.num_seqs,
            first_page: Some(first_page),
        };
        // [rows, q_heads, head_dim]
        let attended = match self.shape.kernels {
            KernelForm::Mosaic => self.mosaic_attention(&operands)?,
            _ => rpa::stablehlo::emit(b, self.attention, &operands)?,
        };
        b.transpose(b.reshape(attended, &[self.rows, config.q_heads * config.head_dim])?, &[1, 0])
    }

    /// As [`Self::attend`], in one custom call, which looks the angles up itself.
    fn attend_natively(
        &self,
        qkv: Tensor<'c, 'a>,
        rotary: Tensor<'c, 'a>,
        rows: &Rows<'c, 'a>,
        first_page: Tensor<'c, 'a>,
        kv: &mut Tensor<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let operands = rpa::native::Operands {
            qkv,
            kv_pages: *kv,
            kv_lens: rows.kv_lens,
            page_indices: rows.page_indices,
            cu_q_lens: rows.cu_q_lens,
            num_seqs: rows.num_seqs,
            first_page,
            slots: rows.kv_slots,
            rotary,
        };
        let (attended, written) = rpa::native::emit(self.b, self.attention, &operands)?;
        *kv = written;
        Ok(attended)
    }

    /// An attention kernel for the TPU, with tiles of the planner's choice.
    fn mosaic_attention(&self, operands: &rpa::stablehlo::Operands<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let options = rpa::plan::Options::default();
        let plan = rpa::plan::Plan::new(self.attention.clone(), CHIP, options).map_err(unplanned)?;
        let kernel = rpa::mosaic::kernel(self.context, &plan)?.for_tile_machine();
        let rpa::stablehlo::Operands { q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, first_page } =
            *operands;
        // The kernel's sequences hold their rows' keys. An idle slot has a row and no key: it gets the one in its first
        // page, and what comes of it goes nowhere.
        let at_least = |x: Tensor<'c, 'a>, least: f64| self.b.maximum(x, self.b.splat(Element::I32, &x.dims(), least)?);
        let (kv_lens, page_indices) = match self.attention.kind {
            rpa::Kind::Decode => (at_least(kv_lens, 1.0)?, at_least(page_indices, 0.0)?),
            rpa::Kind::Mixed => (kv_lens, page_indices),
        };
        let mut arguments = vec![q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs];
        // With one layer the kernel takes no first page.
        arguments.extend(first_page.filter(|_| self.attention.layers > 1));
        rpa::mosaic::call(self.b, &kernel, &arguments)
    }
}

/// What a prefill program returns beside the KV buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// `i32[slots]`: one sampled token per sequence, taken after its row in `sample_rows`.
    Tokens(Sampling),
    /// `f32[prefill_rows, vocab]`: the logits of every row.
    Logits,
}

/// The prefill program. Arguments after the weights, in this order (results: KV buffer, then the [`Output`]):
///
/// | argument | type | |
/// |---|---|---|
/// | KV buffer | [`StepShape::kv_type`] | donated |
/// | token ids | `i32[rows]` | padding: 0 |
/// | positions | `i32[rows]` | padding: 0 |
/// | KV slots | `i32[rows]` | `page * page_size + offset`; padding: -1 |
/// | KV lengths | `i32[slots]` | this chunk included |
/// | page table | `i32[slots, pages_per_seq]` | |
/// | first rows | `i32[slots + 1]` | `cu_q_lens` |
/// | sequences | `i32[1]` | |
/// | sample rows | `i32[slots]` | the row whose logits are sampled for each sequence |
/// | keys | 3 x `u32[slots]` | prompt index, generation, position of the sampled token |
/// | parameters | `f32[]`, `i32[]`, `f32[]`, `u32[2]` | temperature, top-k, top-p, seed |
///
/// # Errors
/// When the configuration and the shape do not make a valid attention problem.
pub fn prefill<'c>(
    context: &'c Context,
    config: &LlamaConfig,
    shape: &StepShape,
    output: Output,
) -> crate::Result<Module<'c>> {
    let (rows, slots) = (shape.prefill_rows, shape.slots);
    let attention = shape.attention(config, rows, rpa::Kind::Mixed)?;
    let i32s = |dims: &[usize]| TensorType::new(Element::I32, dims);
    let mut types = weight_types(config, shape);
    let kv_argument = types.len();
    types.extend([
        shape.kv_type(config),
        i32s(&[rows]),
        i32s(&[rows]),
        i32s(&[rows]),
        i32s(&[slots]),
        i32s(&[slots, shape.pages_per_seq]),
        i32s(&[slots + 1]),
        i32s(&[1]),
        i32s(&[slots]),
    ]);
    types.extend(sampling_types(slots));
    let module = Module::new(context, "prefill");
    module.function("main", &types, |b, args| {
        let (weights, rest) = Weights::take(config, args);
        let emitter = Emitter { context, b, config, shape, attention: &attention, rows };
        let positions = Rows {
            tokens: rest[1],
            positions: rest[2],
            kv_slots: rest[3],
            kv_lens: rest[4],
            page_indices: rest[5],
            cu_q_lens: rest[6],
            num_seqs: rest[7],
        };
        let (hidden, kv) = emitter.forward(&weights, &positions, rest[0])?;
        let result = match output {
            Output::Logits => emitter.logits(&weights, hidden)?,
            Output::Tokens(sampling) => {
                let by_row = b.transpose(hidden, &[1, 0])?;
                let sampled = b.transpose(b.take(by_row, rest[8], 0)?, &[1, 0])?; // [hidden, slots]
                let logits = emitter.logits(&weights, sampled)?;
                let keys = Keys { index: rest[9], generation: rest[10], position: rest[11] };
                sampler::emit(b, sampling, logits, &parameters(&rest[12..]), &keys)?
            }
        };
        Ok(vec![kv, result])
    })?;
    module.donate("main", kv_argument, 0)?;
    Ok(module)
}

/// The decode program: up to `rounds` steps of one row per slot, on the device. Arguments after the weights, in this
/// order:
///
/// | argument | type | |
/// |---|---|---|
/// | KV buffer | [`StepShape::kv_type`] | donated |
/// | tokens | `i32[slots]` | the last token of each sequence, not yet in the KV cache |
/// | positions | `i32[slots]` | where that token goes |
/// | remaining | `i32[slots]` | tokens that the slot may still yield; 0 for an idle one |
/// | page table | `i32[slots, pages_per_seq]` | holds pages for all these tokens |
/// | keys | 2 x `u32[slots]` | prompt index, generation |
/// | parameters | `f32[]`, `i32[]`, `f32[]`, `u32[2]` | temperature, top-k, top-p, seed |
/// | rounds | `i32[]` | at most `max_rounds` |
///
/// Results: the KV buffer and `i32[slots, max_rounds]`, the tokens of each slot from column 0 on, -1 after its end.
/// A slot ends at an end-of-text token (which it yields) or when nothing remains; the loop ends when all slots have.
///
/// # Errors
/// As [`prefill`].
pub fn decode<'c>(
    context: &'c Context,
    config: &LlamaConfig,
    shape: &StepShape,
    sampling: Sampling,
    end_of_text: &[i32],
) -> crate::Result<Module<'c>> {
    let slots = shape.slots;
    let attention = shape.attention(config, slots, rpa::Kind::Decode)?;
    let i32s = |dims: &[usize]| TensorType::new(Element::I32, dims);
    let mut types = weight_types(config, shape);
    let kv_argument = types.len();
    types.extend([
        shape.kv_type(config),
        i32s(&[slots]),
        i32s(&[slots]),
        i32s(&[slots]),
        i32s(&[slots, shape.pages_per_seq]),
    ]);
    let mut sampling_arguments = sampling_types(slots);
    sampling_arguments.remove(2); // The position is the loop's own.
    types.extend(sampling_arguments);
    types.push(i32s(&[]));
    let module = Module::new(context, "decode");
    module.function("main", &types, |b, args| {
        let (weights, rest) = Weights::take(config, args);
        let emitter = Emitter { context, b, config, shape, attention: &attention, rows: slots };
        let [kv, tokens, positions, remaining, page_indices, index, generation] = rest[..7] else { unreachable!() };
        let (parameters, limit) = (parameters(&rest[7..]), rest[11]);
        let ints = |value: f64| b.splat(Element::I32, &[slots], value);
        let first_rows = b.iota(Element::I32, &[slots + 1], 0)?;
        let all = b.splat(Element::I32, &[1], slots as f64)?;
        let written = b.splat(Element::I32, &[slots, shape.max_rounds], -1.0)?;
        let state = [kv, tokens, positions, remaining, written, b.scalar(Element::I32, 0.0)?];
        let results = b.while_(
            &state,
            |b, state| {
                let longest = b.reduce_max(state[3], &[0])?;
                let live = b.compare(longest, Direction::Gt, b.scalar(Element::I32, 0.0)?)?;
                b.and(live, b.compare(state[5], Direction::Lt, limit)?)
            },
            |b, state| {
                let [kv, tokens, positions, remaining, written, round] = *state else { unreachable!() };
                let emitter = Emitter { b, ..emitter };
                let active = b.compare(remaining, Direction::Gt, ints(0.0)?)?;
                let next_positions = b.add(positions, b.convert(active, Element::I32)?)?;
                let rows = Rows {
                    tokens,
                    positions,
                    kv_slots: emitter.kv_slots(positions, page_indices, active)?,
                    kv_lens: b.select(active, next_positions, ints(0.0)?)?,
                    page_indices,
                    cu_q_lens: first_rows,
                    num_seqs: all,
                };
                let (hidden, kv) = emitter.forward(&weights, &rows, kv)?;
                let logits = emitter.logits(&weights, hidden)?;
                let position = b.convert(next_positions, Element::U32)?;
                let chosen = sampler::emit(b, sampling, logits, &parameters, &Keys { index, generation, position })?;
                let mut left = b.subtract(remaining, ints(1.0)?)?;
                for &token in end_of_text {
                    let ends = b.compare(chosen, Direction::Eq, ints(f64::from(token))?)?;
                    left = b.select(ends, ints(0.0)?, left)?;
                }
                let column = b.reshape(b.select(active, chosen, ints(-1.0)?)?, &[slots, 1])?;
                let written = b.dynamic_update_slice(written, column, &[b.scalar(Element::I32, 0.0)?, round])?;
                Ok(vec![
                    kv,
                    b.select(active, chosen, tokens)?,
                    next_positions,
                    b.select(active, left, ints(0.0)?)?,
                    written,
                    b.add(round, b.scalar(Element::I32, 1.0)?)?,
                ])
            },
        )?;
        Ok(vec![results[0], results[4]])
    })?;
    module.donate("main", kv_argument, 0)?;
    Ok(module)
}

/// The types of keys and parameters.
fn sampling_types(slots: usize) -> Vec<TensorType> {
    let keys = TensorType::new(Element::U32, &[slots]);
    vec![
        keys.clone(),
        keys.clone(),
        keys,
        TensorType::scalar(Element::F32),
        TensorType::scalar(Element::I32),
        TensorType::scalar(Element::F32),
        TensorType::new(Element::U32, &[2]),
    ]
}

fn parameters<'c, 'a>(args: &[Tensor<'c, 'a>]) -> Parameters<'c, 'a> {
    Parameters { temperature: args[0], top_k: args[1], top_p: args[2], seed: args[3] }
}

/// The rotary table of [`weight_types`]: `f32[positions, head_dim]`, cosines then sines, computed in f64.
pub fn rotary_table(config: &LlamaConfig, positions: usize) -> HostTensor {
    let frequencies = config.rope_frequencies();
    let mut values = Vec::with_capacity(positions * config.head_dim);
    for position in 0..positions {
        let angles = frequencies.iter().map(|frequency| position as f64 * frequency);
        values.extend(angles.clone().map(f64::cos));
        values.extend(angles.map(f64::sin));
    }
    HostTensor::from_f64(Element::F32, &[positions, config.head_dim], &values)
}
