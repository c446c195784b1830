//! The weights as arguments of the step programs: one list, from which the types, their order, and the arguments
//! themselves are read.

use pagoda_ir::stablehlo::Tensor;
use pagoda_ir::{Element, TensorType};

use super::step::StepShape;
use crate::model::ModelSpec;
use crate::model::quantization::Quantization;
use crate::model::spec::{Experts, Mlp, QkNorm, SharedExpert};

/// A weight `[out, in]` and, where the model has them, its scales and its biases `[out]`.
#[derive(Clone, Copy)]
pub(super) struct Projection<T> {
    pub(super) weight: T,
    /// f32: `[out, groups]`, for a row-major [`Target`](super::Target) `[groups, out]`.
    pub(super) scale: Option<T>,
    pub(super) bias: Option<T>,
}

impl<T> Projection<T> {
    fn each(
        shape: &StepShape,
        quantization: Option<Quantization>,
        [out, from]: [usize; 2],
        bias: bool,
        mut next: impl FnMut(Element, &[usize]) -> T,
    ) -> Self {
        let element = quantization.map_or(shape.matrices, |quantization| quantization.weight);
        let groups = quantization.and_then(Quantization::group).map_or(1, |group| from / group);
        let scales = if shape.target.is_row_major() { [groups, out] } else { [out, groups] };
        Self {
            weight: next(element, &[out, from]),
            scale: quantization.map(|_| next(Element::F32, &scales)),
            bias: bias.then(|| next(shape.compute, &[out])),
        }
    }
}

/// The weights of one layer, or stacks of all layers' weights, in the order of the arguments.
pub(super) struct Layer<T> {
    /// `[hidden]`
    pub(super) before_attention: Option<T>,
    /// `[(q_heads + 2 * kv_heads) * head_dim, hidden]`: query, key and value rows stacked.
    pub(super) qkv: Projection<T>,
    /// The norms of queries and keys: `[head_dim]` each, or `[q_heads * head_dim]` and `[kv_heads * head_dim]`.
    pub(super) qk_norms: Option<[T; 2]>,
    /// `[q_heads]`
    pub(super) sinks: Option<T>,
    /// `[hidden, q_heads * head_dim]`
    pub(super) output: Projection<T>,
    /// `[hidden]`
    pub(super) after_attention: Option<T>,
    /// `[hidden]`
    pub(super) before_mlp: Option<T>,
    pub(super) mlp: MlpWeights<T>,
    /// `[hidden]`
    pub(super) after_mlp: Option<T>,
}

/// The weights of what follows attention.
pub(super) enum MlpWeights<T> {
    Gated {
        /// `[2 * inner, hidden]`: gate and up rows stacked.
        gate_up: Projection<T>,
        /// `[hidden, inner]`
        down: Projection<T>,
    },
    Experts {
        /// `[experts, hidden]`
        router: Projection<T>,
        /// `[experts * 2 * inner, hidden]`: each expert's gate rows, then its up rows.
        gate_up: Projection<T>,
        /// `[experts * hidden, inner]`
        down: Projection<T>,
        shared: Option<SharedWeights<T>>,
    },
}

/// The weights of the expert that all tokens share.
#[derive(Clone, Copy)]
pub(super) struct SharedWeights<T> {
    /// `[1, hidden]`: the gate of what it makes.
    pub(super) gate: T,
    /// `[2 * inner, hidden]`: gate and up rows stacked.
    pub(super) gate_up: Projection<T>,
    /// `[hidden, inner]`
    pub(super) down: Projection<T>,
}

impl<T> Layer<T> {
    fn each(config: &ModelSpec, shape: &StepShape, mut next: impl FnMut(Element, &[usize]) -> T) -> Self {
        let hidden = config.hidden_size;
        let [queries, keys] = [config.q_heads, config.kv_heads].map(|heads| heads * config.head_dim);
        let quantization = config.quantization;
        let (before, after) = (config.norms.before(), config.norms.after());
        let qk_norms = config.qk_norm.map(|over| match over {
            QkNorm::Head => [config.head_dim; 2],
            QkNorm::Projection => [queries, keys],
        });
        Self {
            before_attention: before.then(|| next(shape.compute, &[hidden])),
            qkv: Projection::each(shape, quantization, [queries + 2 * keys, hidden], config.attention_bias, &mut next),
            qk_norms: qk_norms.map(|widths| widths.map(|width| next(shape.compute, &[width]))),
            sinks: config.sinks.then(|| next(shape.compute, &[config.q_heads])),
            output: Projection::each(shape, quantization, [hidden, queries], config.output_bias, &mut next),
            after_attention: after.then(|| next(shape.compute, &[hidden])),
            before_mlp: before.then(|| next(shape.compute, &[hidden])),
            mlp: match &config.mlp {
                Mlp::Gated(mlp) => MlpWeights::Gated {
                    gate_up: Projection::each(shape, quantization, [2 * mlp.inner, hidden], mlp.bias, &mut next),
                    down: Projection::each(shape, quantization, [hidden, mlp.inner], mlp.bias, &mut next),
                },
                Mlp::Experts(Experts { count, inner, bias, shared, .. }) => MlpWeights::Experts {
                    router: Projection::each(shape, None, [*count, hidden], *bias, &mut next),
                    gate_up: Projection::each(shape, None, [count * 2 * inner, hidden], *bias, &mut next),
                    down: Projection::each(shape, None, [count * hidden, *inner], *bias, &mut next),
                    shared: shared.map(|SharedExpert { inner, .. }| SharedWeights {
                        gate: next(shape.matrices, &[1, hidden]),
                        gate_up: Projection::each(shape, None, [2 * inner, hidden], false, &mut next),
                        down: Projection::each(shape, None, [hidden, inner], false, &mut next),
                    }),
                },
            },
            after_mlp: after.then(|| next(shape.compute, &[hidden])),
        }
    }
}

/// The weights of all layers.
pub(super) enum Layers<T> {
    /// One by one: the program is unrolled.
    Apart(Vec<Layer<T>>),
    /// As stacks `[layers, ...]`: the program loops ([`StepShape::stacks_layers`]).
    Stacked(Layer<T>),
}

/// The model's weights, in the order of the arguments.
pub(super) struct Weights<T> {
    /// `[vocab, hidden]`
    pub(super) embedding: T,
    pub(super) layers: Layers<T>,
    /// `[hidden]`
    pub(super) norm: T,
    /// `[vocab, hidden]`, unless it is the embedding.
    head: Option<Projection<T>>,
    /// `f32[max_positions, head_dim]` each: the tables of [`rotary`](super::rotary), one per rope of the model.
    pub(super) rotary: Vec<T>,
    /// `i32[]`: which shard of the model these weights are, where it is split.
    pub(super) shard: Option<T>,
}

impl<T> Weights<T> {
    /// Asks `next` for one weight after another, in the order of the arguments. Sizes are those of one shard.
    fn each(config: &ModelSpec, shape: &StepShape, mut next: impl FnMut(TensorType) -> T) -> Self {
        let config = &shape.parallel.shard_of(config);
        let hidden = config.hidden_size;
        let mut weight = |element: Element, dims: &[usize]| next(TensorType::new(element, dims));
        let embedding = weight(shape.matrices, &[config.vocab_size, hidden]);
        let layers = match shape.stacks_layers(config) {
            false => Layers::Apart(config.layers.iter().map(|_| Layer::each(config, shape, &mut weight)).collect()),
            true => {
                let layers = config.layers.len();
                let stacked = |element: Element, dims: &[usize]| weight(element, &[&[layers], dims].concat());
                Layers::Stacked(Layer::each(config, shape, stacked))
            }
        };
        let norm = weight(shape.compute, &[hidden]);
        let head = (!config.tie_word_embeddings).then(|| {
            let quantization = config.quantization.filter(|quantization| quantization.head);
            Projection::each(shape, quantization, [config.vocab_size, hidden], false, &mut weight)
        });
        let table = TensorType::new(Element::F32, &[shape.max_positions, config.head_dim]);
        let rotary = config.ropes.iter().map(|_| next(table.clone())).collect();
        let shard = (shape.parallel.model().get() > 1).then(|| next(TensorType::scalar(Element::I32)));
        Self { embedding, layers, norm, head, rotary, shard }
    }
}

impl<'c, 'a> Weights<Tensor<'c, 'a>> {
    /// Takes the weights from the front of a function's arguments, which have [`weight_types`]; returns them and the rest.
    pub(super) fn take<'s>(
        config: &ModelSpec,
        shape: &StepShape,
        args: &'s [Tensor<'c, 'a>],
    ) -> (Self, &'s [Tensor<'c, 'a>]) {
        let mut at = 0;
        let weights = Self::each(config, shape, |_| {
            at += 1;
            args[at - 1]
        });
        (weights, &args[at..])
    }

    /// `[vocab, hidden]`: the output projection.
    pub(super) fn head(&self) -> Projection<Tensor<'c, 'a>> {
        self.head.unwrap_or(Projection { weight: self.embedding, scale: None, bias: None })
    }
}

/// The types of the weight arguments, which come first in both programs: embedding; per layer, as far as the model has them,
/// the norm before attention, the stacked query, key and value projection, the norms of queries and of keys, the sinks, the
/// output projection, the norm behind it, the norm before the MLP, the stacked gate and up projection, the down projection,
/// the norm behind it (each projection followed by its scales and its biases, where the model has them); final norm; (untied
/// only) head; a rotary table per rope; (split models only) the number of the shard. Each weight is the shard's part of it.
/// Where the program [loops](StepShape::stacks_layers), there is one of each of a layer's for all layers, a stack
/// `[layers, ...]`.
pub fn weight_types(config: &ModelSpec, shape: &StepShape) -> Vec<TensorType> {
    let mut types = Vec::new();
    Weights::each(config, shape, |ty| types.push(ty));
    types
}
