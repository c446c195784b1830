//! Lowering: the operations of a decoder step, emitted for a [`Target`].
//!
//! The step program is the model's graph; this module is the only place of the engine that calls kernels. A
//! [`Lowering`] decides how activations lie, which form of a kernel is emitted, and what the kernel wants of its
//! arguments. Two lowerings of one graph compute the same function and differ in rounding only. None falls back in
//! silence: what a target cannot take is an error.
//!
//! - [`stablehlo`]: plain StableHLO, for any plugin.
//! - [`native`]: kernels in Rust, as custom calls of the CPU plugin.
//! - [`mosaic`]: the TPU's kernels, for a TPU or for the tile machine.

mod mosaic;
mod native;
mod stablehlo;

use pagoda_ir::stablehlo::{Builder, Tensor};
use pagoda_ir::{Context, Element, Result};
pub(super) use pagoda_kernels::matmul::Activation;
pub(super) use pagoda_kernels::rpa::Kind;
use pagoda_kernels::{Invalid, Named, matmul, rpa};

use super::step::StepShape;
use super::target::Target;
use crate::model::config::LlamaConfig;
use crate::model::quantization::Quantization;

/// How activations lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Orientation {
    /// `[features, rows]`: every matmul is `W x` with the weight as Hugging Face stores it, XLA's fastest orientation for
    /// a few rows on the CPU.
    FeatureMajor,
    /// `[rows, features]`: every matmul is `x W^T`, the weight as Hugging Face stores it. The TPU's: features fill the 128
    /// lanes of a register, which a few rows would not.
    RowMajor,
}

impl Orientation {
    /// The axis of the features.
    pub(super) fn features(self) -> usize {
        match self {
            Self::FeatureMajor => 0,
            Self::RowMajor => 1,
        }
    }

    /// The axis of the rows.
    pub(super) fn rows(self) -> usize {
        1 - self.features()
    }

    /// Turns activations into `[rows, features]`, or such rows into activations.
    pub(super) fn turn<'c, 'a>(self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        match self {
            Self::FeatureMajor => b.transpose(x, &[1, 0]),
            Self::RowMajor => Ok(x),
        }
    }
}

/// Root-mean-square norm over the features: `x / sqrt(mean(x^2) + epsilon) * weight`, rounded before the weight is
/// applied, as the model was trained.
#[derive(Clone, Copy)]
pub(super) struct Norm<'c, 'a> {
    /// `[features]`
    pub(super) weight: Tensor<'c, 'a>,
    pub(super) epsilon: f64,
}

/// A projection with what is fused around it: `residual + activation(W norm(x) + bias)`, accumulated in f32.
#[derive(Clone, Copy)]
pub(super) struct Linear<'c, 'a> {
    pub(super) norm: Option<Norm<'c, 'a>>,
    /// `[out, in]`; with a SiLU gate the rows of the gate, then of what is gated.
    pub(super) weight: Tensor<'c, 'a>,
    /// Of a quantized weight: f32, `[out, groups]` with feature-major activations, `[groups, out]` with row-major ones.
    pub(super) scale: Option<Tensor<'c, 'a>>,
    /// Whether the rows of `x` are quantized, too, to the weight's type.
    pub(super) quantizes_x: bool,
    /// `[out]`
    pub(super) bias: Option<Tensor<'c, 'a>>,
    /// `i32[]`: weight, scales and bias are stacks `[layers, ...]`, and this is the layer.
    pub(super) layer: Option<Tensor<'c, 'a>>,
    pub(super) activation: Activation,
    /// An activation of the result's type.
    pub(super) residual: Option<Tensor<'c, 'a>>,
    /// The result's type: the operands', or f32.
    pub(super) result: Element,
}

/// Where the rows of a step stand, and which KV they see.
#[derive(Clone, Copy)]
pub(super) struct Rows<'c, 'a> {
    /// `i32[rows]`: each row's position in its sequence.
    pub(super) positions: Tensor<'c, 'a>,
    /// `i32[rows]`: `page * page_size + offset` where the row's key and value go, within one layer; -1: nowhere.
    pub(super) kv_slots: Tensor<'c, 'a>,
    /// `i32[slots]`: length of each sequence, this step's rows included.
    pub(super) kv_lens: Tensor<'c, 'a>,
    /// `i32[slots, pages_per_seq]`
    pub(super) page_indices: Tensor<'c, 'a>,
    /// `i32[slots + 1]`: first row of each sequence.
    pub(super) cu_q_lens: Tensor<'c, 'a>,
    /// `i32[1]`
    pub(super) num_seqs: Tensor<'c, 'a>,
}

/// What attention takes beside the projections, the same in every layer: made once a step.
#[derive(Clone, Copy)]
pub(super) struct Batch<'c, 'a> {
    rows: Rows<'c, 'a>,
    /// `f32[_, head_dim]`: the rotary table, or the entry of each row.
    angles: Tensor<'c, 'a>,
}

/// The emissions behind a decoder's operations. Activations are 2-D, in the lowering's [`Orientation`].
pub(super) trait Lowering<'c> {
    /// How activations lie.
    fn orientation(&self) -> Orientation;

    /// Prepares attention over `rows`, with the table of [`rotary`](super::rotary).
    ///
    /// # Errors
    /// When an operand's type does not fit.
    fn batch<'a>(&self, b: &Builder<'c, 'a>, rows: Rows<'c, 'a>, rotary: Tensor<'c, 'a>) -> Result<Batch<'c, 'a>>;

    /// Rows `ids i32[n]` of `table [rows, width]`: `[n, width]`, the nearest row for one that is not there.
    ///
    /// # Errors
    /// When an operand's type does not fit.
    fn take<'a>(&self, b: &Builder<'c, 'a>, table: Tensor<'c, 'a>, ids: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        b.take(table, ids, 0)
    }

    /// A projection of activations `x`, with what is fused around it.
    ///
    /// # Errors
    /// When an operand's type does not fit, or a kernel cannot be planned.
    fn linear<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, linear: &Linear<'c, 'a>) -> Result<Tensor<'c, 'a>>;

    /// As [`linear`](Self::linear), turned: `[rows, out]`, for logits.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    fn by_row<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, linear: &Linear<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        self.orientation().turn(b, self.linear(b, x, linear)?)
    }

    /// Rotates the queries and keys of `qkv` (features `(q_heads + 2 * kv_heads) * head_dim`), writes keys and values
    /// into the pages of the layer that begin at `first_page` (`i32[]`), and attends over them: activations of
    /// `q_heads * head_dim` features, and the KV buffer.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    fn attend<'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        batch: &Batch<'c, 'a>,
        first_page: Tensor<'c, 'a>,
        kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)>;

    /// A norm that stands before a projection and is not fused into it: sums in f32, the result in the type of `x`.
    ///
    /// # Errors
    /// When an operand's type does not fit.
    fn norm<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, norm: &Norm<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let (element, dims, orientation) = (x.element(), x.dims(), self.orientation());
        let (features, rows) = (orientation.features(), orientation.rows());
        let wide = b.convert(x, Element::F32)?;
        let sum = b.reduce_sum(b.multiply(wide, wide)?, &[features])?;
        let per_row = [dims[rows]];
        let mean = b.divide(sum, b.splat(Element::F32, &per_row, dims[features] as f64)?)?;
        let scale = b.rsqrt(b.add(mean, b.splat(Element::F32, &per_row, norm.epsilon)?)?)?;
        let normed = b.multiply(wide, b.broadcast_in_dim(scale, &dims, &[rows])?)?;
        b.multiply(b.convert(normed, element)?, b.broadcast_in_dim(norm.weight, &dims, &[features])?)
    }
}

/// The lowering for the target of `shape`, of a program with `rows` query rows per step.
///
/// # Errors
/// When the sizes do not make a valid attention problem, or its kernel cannot be planned.
pub(super) fn lowering<'c>(
    context: &'c Context,
    config: &LlamaConfig,
    shape: &StepShape,
    rows: usize,
    kind: Kind,
) -> crate::Result<Box<dyn Lowering<'c> + 'c>> {
    let attention = attention(config, shape, rows, kind)?;
    let scale = shape.kv_cache.scale();
    let plain = |orientation| stablehlo::Stablehlo::new(attention.clone(), scale, orientation);
    Ok(match shape.target {
        Target::Portable => Box::new(plain(Orientation::FeatureMajor)),
        Target::Host => Box::new(native::Native::new(plain(Orientation::FeatureMajor))),
        Target::TileMachine(chip) => {
            let (plain, kernel) = (plain(Orientation::RowMajor), attention_kernel(config, shape, rows, kind)?);
            Box::new(mosaic::Mosaic::new(context, plain, kernel, chip, mosaic::Runner::TileMachine)?)
        }
        Target::Tpu(chip) => {
            let (plain, kernel) = (plain(Orientation::RowMajor), attention_kernel(config, shape, rows, kind)?);
            Box::new(mosaic::Mosaic::new(context, plain, kernel, chip, mosaic::Runner::Tpu)?)
        }
    })
}

/// The attention of one shard over `rows` query rows as there is a TPU kernel for it: whole, or after rotation and KV write.
///
/// # Errors
/// When the sizes do not make a valid problem.
pub(crate) fn attention_kernel(
    config: &LlamaConfig,
    shape: &StepShape,
    rows: usize,
    kind: Kind,
) -> std::result::Result<rpa::Problem, Invalid> {
    let attention = attention(config, shape, rows, kind)?;
    match rpa::plan::emitted(&attention) {
        true => Ok(attention),
        false => rpa::Problem::new(rpa::Spec { fused: None, ..attention.spec().clone() }),
    }
}

/// The attention of one shard over `rows` query rows, with rotation and KV write.
fn attention(
    config: &LlamaConfig,
    shape: &StepShape,
    rows: usize,
    kind: Kind,
) -> std::result::Result<rpa::Problem, Invalid> {
    let config = shape.parallel.shard_of(config);
    rpa::Problem::new(rpa::Spec {
        kind,
        precision: rpa::Precision { kv: shape.kv_cache.element(), ..rpa::Precision::uniform(shape.compute) },
        tokens: rows,
        q_heads: config.q_heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        page_size: shape.page_size,
        pages: shape.pages,
        layers: config.layers,
        max_seqs: shape.slots,
        pages_per_seq: shape.pages_per_seq,
        scale: (config.head_dim as f64).powf(-0.5),
        sliding_window: config.sliding_window,
        soft_cap: None,
        fused: Some(rpa::Rotary::HalfSplit),
        kv_rows: shape.target.kv_rows(config.head_dim),
        ..rpa::Spec::default()
    })
}

/// The matmul of a projection of `x`, norm apart, and its arguments by name; a quantized `x` is made here.
fn matmul<'c, 'a>(
    b: &Builder<'c, 'a>,
    orientation: Orientation,
    x: Tensor<'c, 'a>,
    linear: &Linear<'c, 'a>,
) -> Result<(matmul::Problem, Named<Tensor<'c, 'a>>)> {
    let (x_dims, w_dims) = (x.dims(), linear.weight.dims());
    let (layers, out) = match (linear.layer, &w_dims[..]) {
        (Some(_), &[layers, out, _]) => (layers, out),
        (_, w_dims) => (1, w_dims[0]),
    };
    let k = x_dims[orientation.features()];
    let quantized = linear.scale.map(|scale| {
        let scales = scale.dims();
        let groups = scales[scales.len() - 2 + (1 - orientation.features())];
        let group = (groups > 1).then(|| k / groups);
        matmul::Quantized { weight: linear.weight.element(), group, activations: linear.quantizes_x }
    });
    let spec = matmul::Spec {
        m: x_dims[orientation.rows()],
        k,
        n: if linear.activation == Activation::SiluGate { out / 2 } else { out },
        input: x.element(),
        output: linear.result,
        layout: match orientation {
            Orientation::FeatureMajor => matmul::Layout::FeatureMajor,
            Orientation::RowMajor => matmul::Layout::WeightTransposed,
        },
        epilogue: matmul::Epilogue {
            bias: linear.bias.is_some(),
            activation: linear.activation,
            residual: linear.residual.is_some(),
        },
        layers,
        quantized,
    };
    let (x, x_scale) = match linear.quantizes_x {
        false => (x, None),
        true => {
            let (x, scale) = quantize_rows(b, orientation, x, linear.weight.element())?;
            (x, Some(scale))
        }
    };
    let arguments = [
        ("x", Some(x)),
        ("w", Some(linear.weight)),
        ("w_scale", linear.scale),
        ("x_scale", x_scale),
        ("bias", linear.bias),
        ("residual", linear.residual),
        ("layer", linear.layer),
    ];
    let arguments = arguments.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect();
    Ok((matmul::Problem::new(spec).map_err(unplanned)?, arguments))
}

/// Activations as 8-bit `element`, and a scale f32 for each row (one feature of it): its largest absolute value becomes the largest element.
fn quantize_rows<'c, 'a>(
    b: &Builder<'c, 'a>,
    orientation: Orientation,
    x: Tensor<'c, 'a>,
    element: Element,
) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
    let (dims, rows) = (x.dims(), [orientation.rows()]);
    let x = b.convert(x, Element::F32)?;
    let most = b.reduce_max(b.abs(x)?, &[orientation.features()])?;
    let per_row = most.dims();
    // A row of zeros has a scale, too.
    let most = b.maximum(most, b.splat(Element::F32, &per_row, f64::from(f32::MIN_POSITIVE) * 1024.0)?)?;
    let largest = Quantization::most(element);
    let scale = b.divide(most, b.splat(Element::F32, &per_row, largest)?)?;
    let x = b.divide(x, b.broadcast_in_dim(scale, &dims, &rows)?)?;
    let bound = |b: &Builder<'c, 'a>, value| b.scalar(Element::F32, value);
    let x = b.clamp(bound(b, -largest)?, x, bound(b, largest)?)?;
    let x = if element.is_float() { x } else { b.round_nearest_even(x)? };
    let mut kept = dims;
    kept[orientation.features()] = 1;
    Ok((b.convert(x, element)?, b.reshape(scale, &kept)?))
}

/// A problem that is not valid, or has no plan.
fn unplanned(problem: impl std::fmt::Display) -> pagoda_ir::Error {
    pagoda_ir::Error::op("a kernel's plan", problem.to_string())
}
