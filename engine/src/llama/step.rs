//! The step program: one ragged step of a decoder over paged KV. Here is the model's graph, and nothing else: how each
//! operation is emitted is the target's `lowering`, which also decides how activations lie.
//!
//! One emission serves both programs that the engine compiles:
//! - [`prefill`]: a packed chunk of prompt rows of several sequences; the rows that end a prompt are sampled, or all
//!   logits are returned (to score a text, and for the tests).
//! - [`decode`]: one row per slot, in a loop on the device that samples, stops at an end-of-text token and goes on,
//!   up to `rounds` steps per call.
//!
//! *Weights* are taken as Hugging Face stores them, `[out, in]`: no transposed copy is ever made. Query, key and value
//! projections are one matmul, gate and up another.
//!
//! *KV cache.* All layers share one buffer ([`KvLayout`]). Rows of idle slots and padding have the KV slot -1 and write
//! nothing.
//!
//! *Layers are unrolled*, where a `stablehlo.while` over stacked weights would slice a copy of each layer's weights on every
//! step (measured, see ARCHITECTURE.md). For a TPU, whose kernels find a layer's part of a stack themselves, they are a
//! loop: the code does not grow with their number.
//!
//! *Names.* Every operation is called by what it belongs to: `layer.qkv` of a loop (`layer3.qkv` unrolled), `layer.attention`,
//! `layer.output`, `layer.gate_up`, `layer.down`, `embedding`, `rotary`, `head`, `sampler`. Compilers' reports and profiles go
//! by these.
//!
//! *Split over devices* ([`Parallel`]), a program is one device's: its weights are a shard, and it exchanges sums where
//! features that are split are summed over.
//!
//! Numerics: weights and activations in the compute type, KV in the cache's; normalisation, softmax, logits and sampling in f32.

use pagoda_ir::stablehlo::{Builder, Direction, Module, Tensor};
use pagoda_ir::{Context, Element, HostTensor, Result, TensorType};
use pagoda_kernels::grouped_matmul;
use pagoda_kernels::rpa::{KvLayout, KvRows};

use super::KvCache;
use super::arguments::{Layer, Layers, MlpWeights, Projection, SharedWeights, Weights, weight_types};
use super::lowering::{
    Activation, Batch, Grouped, Kind, Linear, Lowering, Norm, OfLayer, Rows, Which, lowering, square_sums,
};
use super::parallel::{Exchange, Parallel};
use super::sampling::{key_types, parameter_types, parameters};
use super::target::Target;
use crate::model::ModelSpec;
use crate::model::spec::{ExpertGate, Experts, Gate, Mlp, QkNorm};
use crate::sampler::{self, Keys, Parameters, Sampling};
use crate::scheduler::Limits;

/// The static sizes of a step program, and what it is for.
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
    /// Type of activations and of the weights' vectors.
    pub compute: Element,
    /// Type of the weights' matrices, where they are not quantized: that one, or [narrower](super::matrices).
    pub matrices: Element,
    /// What the KV cache holds.
    pub kv_cache: KvCache,
    /// What the program is emitted for.
    pub target: Target,
    /// Over how many devices the model is split.
    pub parallel: Parallel,
}

impl StepShape {
    /// The sizes of an engine with these limits.
    pub fn of(limits: &Limits, compute: Element, kv_cache: KvCache, target: Target, parallel: Parallel) -> Self {
        Self {
            prefill_rows: limits.max_prefill_size,
            slots: limits.max_seqs,
            pages: limits.max_pages,
            page_size: limits.page_size.tokens(),
            pages_per_seq: limits.pages_per_seq(),
            max_positions: limits.max_seq_len,
            max_rounds: limits.max_rounds,
            compute,
            matrices: compute,
            kv_cache,
            target,
            parallel,
        }
    }

    /// Whether the program loops over the model's layers, and takes their weights as stacks.
    pub fn stacks_layers(&self, config: &ModelSpec) -> bool {
        self.target.stacks_layers() && config.layers.len() > 1
    }

    /// How keys and values lie in the KV buffer of one device.
    pub fn kv_layout(&self, config: &ModelSpec) -> KvLayout {
        let (element, heads) = (self.kv_cache.element(), self.parallel.shard_of(config).kv_heads);
        KvLayout {
            element,
            layers: config.layers.len(),
            pages: self.pages,
            page_size: self.page_size,
            heads,
            head_dim: config.head_dim,
            kv_rows: KvRows::for_lanes(element, heads, config.head_dim),
        }
    }

    /// The type of the KV buffer.
    pub fn kv_type(&self, config: &ModelSpec) -> TensorType {
        self.kv_layout(config).buffer_type()
    }
}

/// Which layer runs.
#[derive(Clone, Copy)]
struct Place<'c, 'a> {
    /// `i32[]`: where its pages begin in the KV buffer.
    first_page: Tensor<'c, 'a>,
    /// Of which kind it is.
    kind: Which<'c, 'a>,
    /// `i32[]`: its part of stacked weights.
    of_stack: Option<Tensor<'c, 'a>>,
}

impl<'c, 'a> Place<'c, 'a> {
    /// The layer's part of a weight, sliced.
    fn part(self, b: &Builder<'c, 'a>, weight: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        self.of_stack.map_or(Ok(weight), |index| b.part(weight, index))
    }
}

/// Which experts work on which rows of a step. Each row has `chosen` *turns*, one with each of its experts.
struct Routing<'c, 'a> {
    /// `i32[rows * chosen]`: the expert of each turn, row by row.
    chosen: Tensor<'c, 'a>,
    /// `f32[rows, chosen]`: what its result is multiplied by.
    weights: Tensor<'c, 'a>,
    /// `i32[rows * chosen]`: the row of each turn, sorted by expert; those of padding come last.
    tokens: Tensor<'c, 'a>,
    /// `i32[rows * chosen]`: where each turn is among the sorted ones.
    places: Tensor<'c, 'a>,
    /// `i32[experts]`: turns of each expert.
    sizes: Tensor<'c, 'a>,
}

impl<'c, 'a> Routing<'c, 'a> {
    /// By the router's `logits f32[rows, experts]`. Rows that are not `live` have no expert.
    fn of(b: &Builder<'c, 'a>, logits: Tensor<'c, 'a>, experts: &Experts, live: Tensor<'c, 'a>) -> Result<Self> {
        let (dims, Experts { count, chosen, .. }) = (logits.dims(), *experts);
        let (rows, turns) = (dims[0], dims[0] * chosen);
        let softmax = |b: &Builder<'c, 'a>, logits: Tensor<'c, 'a>| {
            let dims = logits.dims();
            let of_row = |x| b.broadcast_in_dim(x, &dims, &[0]);
            let powers = b.exponential(b.subtract(logits, of_row(b.reduce_max(logits, &[1])?)?)?)?;
            b.divide(powers, of_row(b.reduce_sum(powers, &[1])?)?)
        };
        let scores = if experts.normalised { logits } else { softmax(b, logits)? };
        // Of equals the first comes first.
        let ids = b.iota(Element::I32, &dims, 1)?;
        let sorted = b.sort(&[scores, ids], 1, true, |b, pairs| b.compare(pairs[0].0, Direction::Gt, pairs[0].1))?;
        let best = |x| b.slice_in_dim(x, 0, chosen, 1);
        let weights = if experts.normalised { softmax(b, best(sorted[0])?)? } else { best(sorted[0])? };
        let ids = best(sorted[1])?;
        let none = b.splat(Element::I32, &[rows, chosen], count as f64)?;
        let ids = b.select(b.broadcast_in_dim(live, &[rows, chosen], &[0])?, ids, none)?;
        let ids = b.reshape(ids, &[turns])?;
        let in_order = |keys| {
            let places = b.iota(Element::I32, &[turns], 0)?;
            let sorted =
                b.sort(&[keys, places], 0, true, |b, pairs| b.compare(pairs[0].0, Direction::Lt, pairs[0].1))?;
            Ok::<_, pagoda_ir::Error>(sorted[1])
        };
        let order = in_order(ids)?;
        let tokens = b.divide(order, b.splat(Element::I32, &[turns], chosen as f64)?)?;
        let is_of = b.compare(
            b.broadcast_in_dim(ids, &[count, turns], &[1])?,
            Direction::Eq,
            b.iota(Element::I32, &[count, turns], 0)?,
        )?;
        let sizes = b.reduce_sum(b.convert(is_of, Element::I32)?, &[1])?;
        Ok(Self { chosen: ids, weights, tokens, places: in_order(order)?, sizes })
    }

    /// The weighted sums `f32[rows, width]` of `x f32[rows * chosen, width]`, what each turn made.
    fn combined(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let ([rows, chosen], width) = ([0, 1].map(|dim| self.weights.dims()[dim]), x.dims()[1]);
        let dims = [rows, chosen, width];
        let weights = b.broadcast_in_dim(self.weights, &dims, &[0, 1])?;
        b.reduce_sum(b.multiply(b.reshape(x, &dims)?, weights)?, &[1])
    }
}

/// What follows the experts' first product.
pub(crate) fn expert_activation(gate: ExpertGate) -> grouped_matmul::Activation {
    match gate {
        ExpertGate::Silu => grouped_matmul::Activation::SiluGate,
        ExpertGate::ClampedSwiglu => grouped_matmul::Activation::ClampedSwiglu,
    }
}

/// Emits the model's graph over the rows of a step.
#[derive(Clone, Copy)]
struct Graph<'e, 'c> {
    config: &'e ModelSpec,
    shape: &'e StepShape,
    lowering: &'e dyn Lowering<'c>,
}

impl<'c> Graph<'_, 'c> {
    /// Runs all layers over `tokens i32[rows]`: activations before the final norm, and the KV buffer.
    fn forward<'a>(
        &self,
        b: &Builder<'c, 'a>,
        weights: &Weights<Tensor<'c, 'a>>,
        exchange: &Exchange<'_, 'c, 'a>,
        tokens: Tensor<'c, 'a>,
        rows: Rows<'c, 'a>,
        mut kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let lowering = self.lowering;
        let batch = lowering.batch(&b.named("rotary"), rows, &weights.rotary)?;
        let mut x = {
            let b = &b.named("embedding");
            let x = exchange.take(b, lowering, weights.embedding, tokens)?;
            let compute = self.shape.compute;
            let x = if x.element() == compute { x } else { b.convert(x, compute)? };
            let scaled =
                self.config.embedding_scale.map(|scale| b.multiply(x, b.splat(x.element(), &x.dims(), scale)?));
            lowering.orientation().turn(b, scaled.unwrap_or(Ok(x))?)?
        };
        let kinds = self.config.kind_of_layers();
        match &weights.layers {
            Layers::Apart(layers) => {
                for (index, layer) in layers.iter().enumerate() {
                    let b = &b.named(&format!("layer{index}"));
                    let first_page = self.shape.kv_layout(self.config).first_page(index);
                    let first_page = b.scalar(Element::I32, first_page as f64)?;
                    let layer = (layer, Place { first_page, kind: Which::Known(kinds[index]), of_stack: None });
                    (x, kv) = self.layer(b, layer, exchange, &batch, x, kv)?;
                }
                Ok((x, kv))
            }
            Layers::Stacked(layers) => {
                let b = &b.named("layer");
                let int = |b: &Builder<'c, 'a>, value: usize| b.scalar(Element::I32, value as f64);
                let numbers: Vec<i32> = kinds.iter().map(|&kind| kind as i32).collect();
                let results = b.while_(
                    &[int(b, 0)?, x, kv],
                    |b, state| b.compare(state[0], Direction::Lt, int(b, kinds.len())?),
                    |b, state| {
                        let [index, x, kv] = *state else { unreachable!() };
                        let first_page = b.multiply(index, int(b, self.shape.pages)?)?;
                        let kind = match numbers.iter().all(|&kind| kind == 0) {
                            true => Which::Known(0),
                            false => {
                                let numbers = b.constant(&HostTensor::new(&[numbers.len()], &numbers))?;
                                Which::Looked(b.part(numbers, index)?)
                            }
                        };
                        let layer = (layers, Place { first_page, kind, of_stack: Some(index) });
                        let (x, kv) = self.layer(b, layer, &exchange.of_body(), &batch, x, kv)?;
                        Ok(vec![b.add(index, int(b, 1)?)?, x, kv])
                    },
                )?;
                Ok((results[1], results[2]))
            }
        }
    }

    /// Runs one layer on activations `x`: activations, and the KV buffer.
    fn layer<'a>(
        &self,
        b: &Builder<'c, 'a>,
        (layer, place): (&Layer<Tensor<'c, 'a>>, Place<'c, 'a>),
        exchange: &Exchange<'_, 'c, 'a>,
        batch: &Batch<'c, 'a>,
        x: Tensor<'c, 'a>,
        kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let lowering = self.lowering;
        let projected = |b: &Builder<'c, 'a>, norm: Option<Tensor<'c, 'a>>, projection| {
            let norm = norm.map(|norm| Ok::<_, pagoda_ir::Error>(self.norm(place.part(b, norm)?))).transpose()?;
            Ok(Linear { norm, layer: place.of_stack, ..self.projection(projection) })
        };
        let qkv = {
            let b = &b.named("qkv");
            let qkv = lowering.linear(b, x, &projected(b, layer.before_attention, layer.qkv)?)?;
            match self.config.qk_norm.zip(layer.qk_norms) {
                Some((over, weights)) => self.norm_queries_and_keys(b, exchange, qkv, (over, weights, place))?,
                None => qkv,
            }
        };
        let (attended, kv) = {
            let b = &b.named("attention");
            let sinks = layer.sinks.map(|sinks| b.convert(place.part(b, sinks)?, Element::F32)).transpose()?;
            let of_layer = OfLayer { kind: place.kind, first_page: place.first_page, sinks };
            lowering.attend(b, qkv, batch, of_layer, kv)?
        };
        let output = (layer.output, layer.after_attention, place);
        let x = self.add_projection(&b.named("output"), exchange, x, attended, output)?;
        match &layer.mlp {
            MlpWeights::Gated { gate_up, down } => {
                let Mlp::Gated(mlp) = &self.config.mlp else { unreachable!("the weights are the model's") };
                let inner = {
                    let b = &b.named("gate_up");
                    let gate_up = projected(b, layer.before_mlp, *gate_up)?;
                    lowering.linear(b, x, &Linear { activation: activation(mlp.gate), ..gate_up })?
                };
                let down = (*down, layer.after_mlp, place);
                Ok((self.add_projection(&b.named("down"), exchange, x, inner, down)?, kv))
            }
            MlpWeights::Experts { router, gate_up, down, shared } => {
                let Mlp::Experts(experts) = &self.config.mlp else { unreachable!("the weights are the model's") };
                let normed = match layer.before_mlp {
                    Some(norm) => lowering.norm(b, x, &self.norm(place.part(b, norm)?))?,
                    None => x,
                };
                let logits = {
                    let router = Linear { layer: place.of_stack, result: Element::F32, ..self.projection(*router) };
                    lowering.by_row(&b.named("router"), normed, &router)?
                };
                let routing = Routing::of(&b.named("routing"), logits, experts, batch.live(b)?)?;
                let rows = lowering.orientation().turn(b, normed)?;
                let shared = shared.map(|shared| self.shared_expert(b, normed, rows, shared, place)).transpose()?;
                let sum = self.experts(b, exchange, (rows, shared), &routing, (*gate_up, *down, place))?;
                let sum = lowering.orientation().turn(b, sum)?;
                let after = layer.after_mlp.map(|norm| Ok::<_, pagoda_ir::Error>(self.norm(place.part(b, norm)?)));
                let sum = match after.transpose()? {
                    Some(norm) => b.convert(lowering.norm(b, b.convert(sum, x.element())?, &norm)?, Element::F32)?,
                    None => sum,
                };
                Ok((b.convert(b.add(b.convert(x, Element::F32)?, sum)?, x.element())?, kv))
            }
        }
    }

    /// What the expert that all tokens share makes of activations `x`, `rows [rows, hidden]` of them: a shard's part of
    /// `f32[rows, hidden]`.
    fn shared_expert<'a>(
        &self,
        b: &Builder<'c, 'a>,
        x: Tensor<'c, 'a>,
        rows: Tensor<'c, 'a>,
        shared: SharedWeights<Tensor<'c, 'a>>,
        place: Place<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let of_layer = |projection| Linear { layer: place.of_stack, ..self.projection(projection) };
        let gate_up = Linear { activation: activation(Gate::Silu), ..of_layer(shared.gate_up) };
        let inner = self.lowering.linear(&b.named("shared_gate_up"), x, &gate_up)?;
        let down = Linear { result: Element::F32, ..of_layer(shared.down) };
        let made = self.lowering.by_row(&b.named("shared_down"), inner, &down)?;
        let b = &b.named("shared_gate");
        let (dims, wide) = (rows.dims(), |tensor| b.convert(tensor, Element::F32));
        let weight = b.reshape(wide(place.part(b, shared.gate)?)?, &dims[1..])?;
        let logits = b.reduce_sum(b.multiply(wide(rows)?, b.broadcast_in_dim(weight, &dims, &[1])?)?, &[1])?;
        b.multiply(made, b.broadcast_in_dim(b.logistic(logits)?, &dims, &[0])?)
    }

    /// The weighted sum `f32[rows, hidden]` of what the chosen experts make of `x [rows, hidden]`, and what the `shared` one
    /// made. Their inner width is split: each shard's products are a part of the sum.
    fn experts<'a>(
        &self,
        b: &Builder<'c, 'a>,
        exchange: &Exchange<'_, 'c, 'a>,
        (x, shared): (Tensor<'c, 'a>, Option<Tensor<'c, 'a>>),
        routing: &Routing<'c, 'a>,
        (gate_up, down, place): (Projection<Tensor<'c, 'a>>, Projection<Tensor<'c, 'a>>, Place<'c, 'a>),
    ) -> Result<Tensor<'c, 'a>> {
        let Mlp::Experts(experts) = &self.config.mlp else { unreachable!("the weights are the model's") };
        let grouped = |projection: Projection<Tensor<'c, 'a>>| Grouped {
            weight: projection.weight,
            bias: projection.bias,
            layer: place.of_stack,
            activation: grouped_matmul::Activation::Identity,
            result: self.shape.compute,
        };
        let inner = {
            let gate_up = Grouped { activation: expert_activation(experts.gate), ..grouped(gate_up) };
            let sorted = self.lowering.take(b, x, routing.tokens)?;
            self.lowering.grouped(&b.named("gate_up"), sorted, routing.sizes, &gate_up)?
        };
        let split = exchange.is_split();
        let part = Grouped { result: Element::F32, ..grouped(down) };
        let part = if split { Grouped { bias: None, ..part } } else { part };
        let made = self.lowering.grouped(&b.named("down"), inner, routing.sizes, &part)?;
        let b = &b.named("combine");
        let combined = routing.combined(b, self.lowering.take(b, made, routing.places)?)?;
        let sum = exchange.sum(b, shared.map_or(Ok(combined), |shared| b.add(combined, shared))?)?;
        match down.bias.filter(|_| split) {
            None => Ok(sum),
            // Added once, behind the sum over shards.
            Some(bias) => {
                let bias = b.convert(place.part(b, bias)?, Element::F32)?;
                let bias = b.reshape(bias, &[experts.count, self.config.hidden_size])?;
                b.add(sum, routing.combined(b, b.take(bias, routing.chosen, 0)?)?)
            }
        }
    }

    /// The projections of queries, keys and values with the first two normed.
    fn norm_queries_and_keys<'a>(
        &self,
        b: &Builder<'c, 'a>,
        exchange: &Exchange<'_, 'c, 'a>,
        qkv: Tensor<'c, 'a>,
        (over, weights, place): (QkNorm, [Tensor<'c, 'a>; 2], Place<'c, 'a>),
    ) -> Result<Tensor<'c, 'a>> {
        let orientation = self.lowering.orientation();
        let (features, rows) = (orientation.features(), orientation.rows());
        let (width, count) = (qkv.dims()[features], qkv.dims()[rows]);
        let shard = self.shape.parallel.shard_of(self.config);
        let (queries, keys) = (shard.q_heads * shard.head_dim, shard.kv_heads * shard.head_dim);
        let part = |first: usize, end: usize| b.slice_in_dim(qkv, first, end, features);
        let (q, k, v) = (part(0, queries)?, part(queries, queries + keys)?, part(queries + keys, width)?);
        let norm = |of: usize| Ok::<_, pagoda_ir::Error>(self.norm(place.part(b, weights[of])?));
        let mean = |sums: Tensor<'c, 'a>, of: usize| b.divide(sums, b.splat(Element::F32, &sums.dims(), of as f64)?);
        let [q, k] = match over {
            QkNorm::Head => [(q, 0), (k, 1)].map(|(part, of)| {
                let mut dims = part.dims();
                dims[features] /= shard.head_dim;
                dims.insert(features + 1, shard.head_dim);
                let heads = b.reshape(part, &dims)?;
                let mean = mean(square_sums(b, heads, &[features + 1])?, shard.head_dim)?;
                let others = if features == 0 { [0, 2] } else { [0, 1] };
                b.reshape(norm(of)?.apply(b, heads, (mean, &others), &[features + 1])?, &part.dims())
            }),
            QkNorm::Projection => {
                // Over all shards' heads. Where shards hold the same one, each counts it, and the mean is the same.
                let row = |part| b.reshape(square_sums(b, part, &[features])?, &[1, count]);
                let sums = exchange.sum(b, b.concatenate(&[row(q)?, row(k)?], 0)?)?;
                [(q, 0, queries), (k, 1, keys)].map(|(part, of, width)| {
                    let sums = b.reshape(b.slice_in_dim(sums, of, of + 1, 0)?, &[count])?;
                    let mean = mean(sums, width * self.shape.parallel.model().get())?;
                    norm(of)?.apply(b, part, (mean, &[rows]), &[features])
                })
            }
        };
        b.concatenate(&[q?, k?, v], features)
    }

    /// `x` plus a projection of `inner`, whose features are split: each shard's product is a part of the sum. In a model with
    /// norms behind its blocks, what is added is normed.
    fn add_projection<'a>(
        &self,
        b: &Builder<'c, 'a>,
        exchange: &Exchange<'_, 'c, 'a>,
        x: Tensor<'c, 'a>,
        inner: Tensor<'c, 'a>,
        (projection, norm, place): (Projection<Tensor<'c, 'a>>, Option<Tensor<'c, 'a>>, Place<'c, 'a>),
    ) -> Result<Tensor<'c, 'a>> {
        let lowering = self.lowering;
        let whole = Linear { layer: place.of_stack, ..self.projection(projection) };
        if !exchange.is_split() {
            let Some(norm) = norm else {
                return lowering.linear(b, inner, &Linear { residual: Some(x), ..whole });
            };
            let product = lowering.linear(b, inner, &whole)?;
            return b.add(x, lowering.norm(b, product, &self.norm(place.part(b, norm)?))?);
        }
        let part = Linear { bias: None, result: Element::F32, ..whole };
        let mut sum = exchange.sum(b, lowering.linear(b, inner, &part)?)?;
        if let Some(bias) = projection.bias {
            let bias = b.convert(place.part(b, bias)?, Element::F32)?;
            sum = b.add(sum, b.broadcast_in_dim(bias, &sum.dims(), &[lowering.orientation().features()])?)?;
        }
        if let Some(norm) = norm {
            let product = b.convert(sum, x.element())?;
            return b.add(x, lowering.norm(b, product, &self.norm(place.part(b, norm)?))?);
        }
        b.convert(b.add(b.convert(x, Element::F32)?, sum)?, x.element())
    }

    /// The bare projection, in the compute type.
    fn projection<'a>(&self, projection: Projection<Tensor<'c, 'a>>) -> Linear<'c, 'a> {
        let Projection { weight, scale, bias } = projection;
        let quantized = self.config.quantization.zip(scale);
        Linear {
            norm: None,
            weight,
            scale,
            quantizes_x: quantized.is_some_and(|(quantization, _)| quantization.activations),
            bias,
            layer: None,
            activation: Activation::Identity,
            residual: None,
            result: self.shape.compute,
        }
    }

    fn norm<'a>(&self, weight: Tensor<'c, 'a>) -> Norm<'c, 'a> {
        Norm { weight, how: self.config.norm }
    }

    /// `f32[rows, vocab]` logits of activations before the final norm, of this shard's part of the vocabulary.
    fn logits<'a>(
        &self,
        b: &Builder<'c, 'a>,
        weights: &Weights<Tensor<'c, 'a>>,
        hidden: Tensor<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let head = self.projection(weights.head());
        let head = Linear { norm: Some(self.norm(weights.norm)), result: Element::F32, ..head };
        let b = &b.named("head");
        let logits = self.lowering.by_row(b, hidden, &head)?;
        let Some(cap) = self.config.logit_soft_cap else { return Ok(logits) };
        let cap = b.splat(Element::F32, &logits.dims(), cap)?;
        b.multiply(b.tanh(b.divide(logits, cap)?)?, cap)
    }

    /// `i32[rows]`: a token per row of activations before the final norm; where they are asked for, `f32[rows]`: the
    /// logarithms of their probabilities.
    fn choose<'a>(
        &self,
        b: &Builder<'c, 'a>,
        weights: &Weights<Tensor<'c, 'a>>,
        exchange: &Exchange<'_, 'c, 'a>,
        hidden: Tensor<'c, 'a>,
        (sampling, parameters, keys): (Sampling, &Parameters<'c, 'a>, &Keys<'c, 'a>),
    ) -> Result<(Tensor<'c, 'a>, Option<Tensor<'c, 'a>>)> {
        let logits = self.logits(b, weights, hidden)?;
        let b = &b.named("sampler");
        match sampling {
            Sampling::Greedy => Ok((exchange.argmax(b, logits, self.config.vocab_size)?, None)),
            Sampling::Random { log_probabilities, .. } => {
                let logits = exchange.all_logits(b, logits, self.config.vocab_size)?;
                let chosen = sampler::emit(b, sampling, logits, parameters, keys)?;
                let wanted = parameters.log_probabilities;
                let probabilities = log_probabilities.then(|| sampler::log_probabilities(b, logits, chosen, wanted));
                Ok((chosen, probabilities.transpose()?))
            }
        }
    }

    /// The activations of some rows.
    fn select<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, rows: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let orientation = self.lowering.orientation();
        orientation.turn(b, b.take(orientation.turn(b, x)?, rows, 0)?)
    }
}

/// The activation of a gated projection.
pub(crate) fn activation(gate: Gate) -> Activation {
    match gate {
        Gate::Silu => Activation::SiluGate,
        Gate::GeluTanh => Activation::GeluGate,
    }
}

/// The KV buffer, argument `kv` behind the weights, becomes the first result. It is row-major in memory, as kernels take it,
/// and so are stacks of weights: where a dimension is no multiple of 128 lanes, a TPU's compiler would choose another order
/// that pads less, and copy all of it on every call.
fn give_cache(module: &Module<'_>, kv: usize) -> Result<()> {
    module.donate("main", kv, 0)?;
    module.row_major_argument("main", kv)?;
    module.row_major_result("main", 0)?;
    let (arguments, _) = module.function_types("main")?;
    let stacks = (0..kv).filter(|&argument| is_stack(&arguments[argument]));
    stacks.into_iter().try_for_each(|argument| module.row_major_argument("main", argument))
}

/// Whether a weight argument is a stack of matrices: of all layers, no weight of one has three dimensions.
pub(super) fn is_stack(weight: &TensorType) -> bool {
    weight.rank() == 3
}

/// What a prefill program returns beside the KV buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// `i32[slots]`: one sampled token per sequence, taken after its row in `sample_rows`; where it is asked for, also
    /// `f32[slots]`: the logarithm of the probability that the model gives it.
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
/// | KV slots | `i32[rows]` | as [`KvLayout`] counts them; padding: -1 |
/// | KV lengths | `i32[slots]` | this chunk included |
/// | page table | `i32[slots, pages_per_seq]` | |
/// | first rows | `i32[slots + 1]` | `cu_q_lens` |
/// | sequences | `i32[1]` | |
/// | sample rows | `i32[slots]` | the row whose logits are sampled for each sequence |
/// | keys | 3 x `u32[slots]` | prompt index, generation, position of the sampled token |
/// | parameters | `f32`, `i32`, `f32`, 2 x `u32`, `i32`, each `[slots]` | temperature, top-k, top-p, the seed's high and low word, who asks for log-probabilities |
///
/// # Errors
/// When the model cannot be split like this, the sizes do not make a valid problem of a kernel, or a kernel has no plan for
/// the target's chip.
pub fn prefill<'c>(
    context: &'c Context,
    config: &ModelSpec,
    shape: &StepShape,
    output: Output,
) -> crate::Result<Module<'c>> {
    let (rows, slots) = (shape.prefill_rows, shape.slots);
    shape.parallel.check(config)?;
    let lowering = lowering(context, config, shape, rows, Kind::Mixed)?;
    let graph = Graph { config, shape, lowering: &*lowering };
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
    types.extend(key_types(3, slots));
    types.extend(parameter_types(slots));
    let module = Module::replicated(context, "prefill", shape.parallel.replica_count());
    module.function("main", &types, |b, args| {
        let (weights, rest) = Weights::take(config, shape, args);
        let &[
            kv,
            tokens,
            positions,
            kv_slots,
            kv_lens,
            page_indices,
            cu_q_lens,
            num_seqs,
            sample_rows,
            index,
            generation,
            position,
            ref rest @ ..,
        ] = rest
        else {
            unreachable!("the types above")
        };
        let rows = Rows { positions, kv_slots, kv_lens, page_indices, cu_q_lens, num_seqs };
        let exchange = Exchange::new(&shape.parallel, weights.shard);
        let (hidden, kv) = graph.forward(b, &weights, &exchange, tokens, rows, kv)?;
        let (result, probabilities) = match output {
            Output::Logits => (exchange.all_logits(b, graph.logits(b, &weights, hidden)?, config.vocab_size)?, None),
            Output::Tokens(sampling) => {
                let hidden = graph.select(b, hidden, sample_rows)?;
                let how = (sampling, &parameters(rest), &Keys { index, generation, position });
                graph.choose(b, &weights, &exchange, hidden, how)?
            }
        };
        Ok([kv, result].into_iter().chain(probabilities).collect())
    })?;
    give_cache(&module, kv_argument)?;
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
/// | parameters | `f32`, `i32`, `f32`, 2 x `u32`, `i32`, each `[slots]` | temperature, top-k, top-p, the seed's high and low word, who asks for log-probabilities |
/// | rounds | `i32[]` | at most `max_rounds` |
///
/// Results: the KV buffer and `i32[slots, max_rounds]`, the tokens of each slot from column 0 on, -1 after its end; where
/// they are asked for, also `f32[slots, max_rounds]`, the logarithms of their probabilities.
/// A slot ends at an end-of-text token (which it yields) or when nothing remains; the loop ends when all slots have.
///
/// # Errors
/// As [`prefill`].
pub fn decode<'c>(
    context: &'c Context,
    config: &ModelSpec,
    shape: &StepShape,
    sampling: Sampling,
    end_of_text: &[i32],
) -> crate::Result<Module<'c>> {
    let slots = shape.slots;
    shape.parallel.check(config)?;
    let lowering = lowering(context, config, shape, slots, Kind::Decode)?;
    let graph = Graph { config, shape, lowering: &*lowering };
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
    types.extend(key_types(2, slots)); // The position is the loop's own.
    types.extend(parameter_types(slots));
    types.push(i32s(&[]));
    let module = Module::replicated(context, "decode", shape.parallel.replica_count());
    module.function("main", &types, |b, args| {
        let (weights, rest) = Weights::take(config, shape, args);
        let &[kv, tokens, positions, remaining, page_indices, index, generation, ref sampling_arguments @ .., limit] =
            rest
        else {
            unreachable!("the types above")
        };
        let parameters = parameters(sampling_arguments);
        let ints = |value: f64| b.splat(Element::I32, &[slots], value);
        let first_rows = b.iota(Element::I32, &[slots + 1], 0)?;
        let all = b.splat(Element::I32, &[1], slots as f64)?;
        let written = b.splat(Element::I32, &[slots, shape.max_rounds], -1.0)?;
        let mut state = vec![kv, tokens, positions, remaining, written, b.scalar(Element::I32, 0.0)?];
        if matches!(sampling, Sampling::Random { log_probabilities: true, .. }) {
            state.push(b.splat(Element::F32, &[slots, shape.max_rounds], 0.0)?);
        }
        let results = b.while_(
            &state,
            |b, state| {
                let longest = b.reduce_max(state[3], &[0])?;
                let live = b.compare(longest, Direction::Gt, b.scalar(Element::I32, 0.0)?)?;
                b.and(live, b.compare(state[5], Direction::Lt, limit)?)
            },
            |b, state| {
                let [kv, tokens, positions, remaining, written, round, ref likelihoods @ ..] = *state else {
                    unreachable!("the state above")
                };
                let active = b.compare(remaining, Direction::Gt, ints(0.0)?)?;
                let next_positions = b.add(positions, b.convert(active, Element::I32)?)?;
                let rows = Rows {
                    positions,
                    kv_slots: KvLayout::slots_of(b, shape.page_size, positions, page_indices, active)?,
                    kv_lens: b.select(active, next_positions, ints(0.0)?)?,
                    page_indices,
                    cu_q_lens: first_rows,
                    num_seqs: all,
                };
                let exchange = Exchange::new(&shape.parallel, weights.shard);
                let (hidden, kv) = graph.forward(b, &weights, &exchange, tokens, rows, kv)?;
                let position = b.convert(next_positions, Element::U32)?;
                let how = (sampling, &parameters, &Keys { index, generation, position });
                let (chosen, probabilities) = graph.choose(b, &weights, &exchange, hidden, how)?;
                let mut left = b.subtract(remaining, ints(1.0)?)?;
                for &token in end_of_text {
                    let ends = b.compare(chosen, Direction::Eq, ints(f64::from(token))?)?;
                    left = b.select(ends, ints(0.0)?, left)?;
                }
                let in_column = |array, column| {
                    let column = b.reshape(column, &[slots, 1])?;
                    b.dynamic_update_slice(array, column, &[b.scalar(Element::I32, 0.0)?, round])
                };
                let mut next = vec![
                    kv,
                    b.select(active, chosen, tokens)?,
                    next_positions,
                    b.select(active, left, ints(0.0)?)?,
                    in_column(written, b.select(active, chosen, ints(-1.0)?)?)?,
                    b.add(round, b.scalar(Element::I32, 1.0)?)?,
                ];
                for (&array, column) in likelihoods.iter().zip(probabilities) {
                    next.push(in_column(array, column)?);
                }
                Ok(next)
            },
        )?;
        Ok([results[0], results[4]].into_iter().chain(results.get(6).copied()).collect())
    })?;
    give_cache(&module, kv_argument)?;
    Ok(module)
}
