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

use pagoda_ir::stablehlo::{Branch, Builder, Direction, Tensor};
use pagoda_ir::{Context, Element, Result};
use pagoda_kernels::grouped_matmul::{self, GroupedMatmul};
pub(super) use pagoda_kernels::matmul::Activation;
pub(super) use pagoda_kernels::rpa::Kind;
use pagoda_kernels::{Invalid, Named, kernel, matmul, rpa};

use super::step::StepShape;
use super::target::Target;
use crate::model::ModelSpec;
use crate::model::quantization::Quantization;
use crate::model::spec::{self, LayerKind};

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

/// Root-mean-square norm over the features, [`spec::Norm`]. It is rounded before a weight is applied, and only behind one that
/// is a distance from 1, as the models were trained.
#[derive(Clone, Copy)]
pub(super) struct Norm<'c, 'a> {
    /// `[features]`
    pub(super) weight: Tensor<'c, 'a>,
    pub(super) how: spec::Norm,
}

impl<'c, 'a> Norm<'c, 'a> {
    /// Applies it to `x`, whose mean squares are `mean f32`; both of them, and the weight, lie along the given dimensions of `x`.
    pub(super) fn apply(
        &self,
        b: &Builder<'c, 'a>,
        x: Tensor<'c, 'a>,
        (mean, of_mean): (Tensor<'c, 'a>, &[usize]),
        of_weight: &[usize],
    ) -> Result<Tensor<'c, 'a>> {
        let (element, dims) = (x.element(), x.dims());
        let scale = b.rsqrt(b.add(mean, b.splat(Element::F32, &mean.dims(), self.how.epsilon)?)?)?;
        let normed = b.multiply(b.convert(x, Element::F32)?, b.broadcast_in_dim(scale, &dims, of_mean)?)?;
        if !self.how.plus_one {
            return b.multiply(b.convert(normed, element)?, b.broadcast_in_dim(self.weight, &dims, of_weight)?);
        }
        let weight = b.convert(self.weight, Element::F32)?;
        let weight = b.add(weight, b.splat(Element::F32, &weight.dims(), 1.0)?)?;
        b.convert(b.multiply(normed, b.broadcast_in_dim(weight, &dims, of_weight)?)?, element)
    }
}

/// The sums of the squares of `x` over some dimensions, in f32.
pub(super) fn square_sums<'c, 'a>(b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, over: &[usize]) -> Result<Tensor<'c, 'a>> {
    let wide = b.convert(x, Element::F32)?;
    b.reduce_sum(b.multiply(wide, wide)?, over)
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
pub(super) struct Batch<'c, 'a> {
    rows: Rows<'c, 'a>,
    /// `f32[_, head_dim]`, for each rope of the model: the rotary table, or the entry of each row.
    angles: Vec<Tensor<'c, 'a>>,
}

impl<'c, 'a> Batch<'c, 'a> {
    /// `pred[rows]`: which rows are tokens of a sequence, and not padding.
    pub(super) fn live(&self, b: &Builder<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let slots = self.rows.kv_slots;
        b.compare(slots, Direction::Ge, b.splat(Element::I32, &slots.dims(), 0.0)?)
    }
}

/// A projection by experts, of rows that are sorted by expert.
#[derive(Clone, Copy)]
pub(super) struct Grouped<'c, 'a> {
    /// `[experts * out, in]`, or a stack of layers; with gates, each expert's gate rows, then its up rows.
    pub(super) weight: Tensor<'c, 'a>,
    /// `[experts * out]`, or a stack of layers.
    pub(super) bias: Option<Tensor<'c, 'a>>,
    /// `i32[]`: weight and bias are stacks, and this is the layer.
    pub(super) layer: Option<Tensor<'c, 'a>>,
    pub(super) activation: grouped_matmul::Activation,
    /// The result's type: that of the rows, or f32.
    pub(super) result: Element,
}

/// What is a layer's own of attention, beside the projections.
#[derive(Clone, Copy)]
pub(super) struct OfLayer<'c, 'a> {
    /// Of which kind the layer is.
    pub(super) kind: Which<'c, 'a>,
    /// `i32[]`: where its pages begin in the KV buffer.
    pub(super) first_page: Tensor<'c, 'a>,
    /// `f32[q_heads]`, in a model with sinks.
    pub(super) sinks: Option<Tensor<'c, 'a>>,
}

/// One of the model's [kinds of layers](ModelSpec::kinds).
#[derive(Clone, Copy)]
pub(super) enum Which<'c, 'a> {
    /// This one.
    Known(usize),
    /// `i32[]`: of a layer that is known when the program runs only.
    Looked(Tensor<'c, 'a>),
}

impl<'c, 'a> Which<'c, 'a> {
    /// What `emit` returns for the kind, one of so many.
    fn select(
        self,
        b: &Builder<'c, 'a>,
        kinds: usize,
        emit: impl Fn(&Builder<'c, 'a>, usize) -> Result<Vec<Tensor<'c, 'a>>>,
    ) -> Result<Vec<Tensor<'c, 'a>>> {
        let emit = &emit;
        match self {
            Self::Known(kind) => emit(b, kind),
            Self::Looked(kind) => {
                let branch = |kind| -> Branch<'_, 'c, 'a> { Box::new(move |b| emit(b, kind)) };
                b.case(kind, (0..kinds).map(branch).collect())
            }
        }
    }
}

/// The emissions behind a decoder's operations. Activations are 2-D, in the lowering's [`Orientation`].
pub(super) trait Lowering<'c> {
    /// How activations lie.
    fn orientation(&self) -> Orientation;

    /// Prepares attention over `rows`, with the tables of [`rotary`](super::rotary).
    ///
    /// # Errors
    /// When an operand's type does not fit.
    fn batch<'a>(&self, b: &Builder<'c, 'a>, rows: Rows<'c, 'a>, rotary: &[Tensor<'c, 'a>]) -> Result<Batch<'c, 'a>>;

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

    /// Rows `x [rows, in]`, of which each expert has as many as `sizes i32[experts]` says, times their experts' weights:
    /// `[rows, out]`, with zeros behind the last expert's.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    fn grouped<'a>(
        &self,
        b: &Builder<'c, 'a>,
        x: Tensor<'c, 'a>,
        sizes: Tensor<'c, 'a>,
        grouped: &Grouped<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let (problem, arguments) = grouped_problem(b, x, sizes, grouped)?;
        Ok(kernel::stablehlo::<GroupedMatmul>(b, &problem, &arguments)?[0])
    }

    /// Rotates the queries and keys of `qkv` (features `(q_heads + 2 * kv_heads) * head_dim`), writes keys and values
    /// into the pages of the layer, and attends over them: activations of `q_heads * head_dim` features, and the KV buffer.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    fn attend<'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        batch: &Batch<'c, 'a>,
        layer: OfLayer<'c, 'a>,
        kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)>;

    /// A norm that is not fused into a projection: sums in f32, the result in the type of `x`.
    ///
    /// # Errors
    /// When an operand's type does not fit.
    fn norm<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, norm: &Norm<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let (features, rows) = (self.orientation().features(), self.orientation().rows());
        let sums = square_sums(b, x, &[features])?;
        let mean = b.divide(sums, b.splat(Element::F32, &sums.dims(), x.dims()[features] as f64)?)?;
        norm.apply(b, x, (mean, &[rows]), &[features])
    }
}

/// The lowering for the target of `shape`, of a program with `rows` query rows per step.
///
/// # Errors
/// When the sizes do not make a valid attention problem, or its kernel cannot be planned.
pub(super) fn lowering<'c>(
    context: &'c Context,
    config: &ModelSpec,
    shape: &StepShape,
    rows: usize,
    kind: Kind,
) -> crate::Result<Box<dyn Lowering<'c> + 'c>> {
    let kinds = config.kinds();
    let attention = kinds.iter().map(|layer| attention(config, layer, shape, rows, kind));
    let attention = attention.collect::<std::result::Result<Vec<_>, _>>()?;
    let ropes = kinds.iter().map(|layer| layer.rope).collect::<Vec<_>>();
    let plain =
        |orientation| stablehlo::Stablehlo::new(attention.clone(), ropes.clone(), shape.kv_cache.scale(), orientation);
    let mosaic = |chip, runner| {
        let kernels = attention.iter().map(kernel_of).collect::<std::result::Result<Vec<_>, _>>()?;
        Ok::<_, crate::Error>(mosaic::Mosaic::new(context, plain(Orientation::RowMajor), kernels, chip, runner)?)
    };
    Ok(match shape.target {
        Target::Portable => Box::new(plain(Orientation::FeatureMajor)),
        Target::Host => Box::new(native::Native::new(plain(Orientation::FeatureMajor))),
        Target::TileMachine(chip) => Box::new(mosaic(chip, mosaic::Runner::TileMachine)?),
        Target::Tpu(chip) => Box::new(mosaic(chip, mosaic::Runner::Tpu)?),
    })
}

/// The type that a model's matrices may have beside activations of type `compute` and give the same products: bf16 beside f32
/// where the kernels take it, if that is what the files hold.
pub(super) fn narrowest(config: &ModelSpec, compute: Element, target: Target) -> Element {
    match (target, compute) {
        (Target::Host, Element::F32) if native::takes_all(config) => Element::Bf16,
        _ => compute,
    }
}

/// The attention of one shard in a layer of some kind, over `rows` query rows, as there is a TPU kernel for it: whole, or after
/// rotation and KV write.
///
/// # Errors
/// When the sizes do not make a valid problem.
pub(crate) fn attention_kernel(
    config: &ModelSpec,
    layer: &LayerKind,
    shape: &StepShape,
    rows: usize,
    kind: Kind,
) -> std::result::Result<rpa::Problem, Invalid> {
    kernel_of(&attention(config, layer, shape, rows, kind)?)
}

/// What the kernel of layers with a window is called, in a program that has one of layers without, too.
pub(crate) const WINDOW_ATTENTION: &str = "window_attention";

/// Whether an attention kernel has that name, in a program with so many: only a window tells two apart.
pub(crate) fn is_window_attention(problem: &rpa::Problem, kernels: usize) -> bool {
    kernels > 1 && problem.sliding_window.is_some()
}

/// The TPU kernel of an attention: all of it, or what comes after rotation and KV write.
fn kernel_of(attention: &rpa::Problem) -> std::result::Result<rpa::Problem, Invalid> {
    match rpa::plan::emitted(attention) {
        true => Ok(attention.clone()),
        false => rpa::Problem::new(rpa::Spec { fused: None, ..attention.spec().clone() }),
    }
}

/// The attention of one shard in a layer of some kind, over `rows` query rows, with rotation and KV write.
fn attention(
    whole: &ModelSpec,
    layer: &LayerKind,
    shape: &StepShape,
    rows: usize,
    kind: Kind,
) -> std::result::Result<rpa::Problem, Invalid> {
    let config = shape.parallel.shard_of(whole);
    rpa::Problem::new(rpa::Spec {
        kind,
        precision: rpa::Precision { kv: shape.kv_cache.element(), ..rpa::Precision::uniform(shape.compute) },
        tokens: rows,
        q_heads: config.q_heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        page_size: shape.page_size,
        pages: shape.pages,
        layers: config.layers.len(),
        max_seqs: shape.slots,
        pages_per_seq: shape.pages_per_seq,
        scale: config.attention_scale,
        sliding_window: layer.window,
        soft_cap: config.attention_soft_cap,
        sinks: config.sinks,
        fused: Some(rpa::Rotary::HalfSplit),
        kv_rows: shape.kv_layout(whole).kv_rows,
        ..rpa::Spec::default()
    })
}

/// The grouped matmul of rows `x`, and its arguments by name.
fn grouped_problem<'c, 'a>(
    b: &Builder<'c, 'a>,
    x: Tensor<'c, 'a>,
    sizes: Tensor<'c, 'a>,
    grouped: &Grouped<'c, 'a>,
) -> Result<(grouped_matmul::Problem, Named<Tensor<'c, 'a>>)> {
    let (x_dims, experts, mut stack) = (x.dims(), sizes.dims()[0], grouped.weight.dims());
    let k = stack.pop().unwrap_or(0);
    let out = stack.pop().unwrap_or(0) / experts;
    let spec = grouped_matmul::Spec {
        output: grouped.result,
        layout: grouped_matmul::Layout::WeightTransposed,
        activation: grouped.activation,
        bias: grouped.bias.is_some(),
        layers: stack.first().copied().unwrap_or(1),
        ..grouped_matmul::Spec::new(
            [x_dims[0], k, if grouped.activation.is_gated() { out / 2 } else { out }],
            experts,
            x.element(),
        )
    };
    let of_experts = |tensor, dims: &[usize]| b.reshape(tensor, &[&stack[..], &[experts], dims].concat());
    let arguments = [
        ("group_sizes", Some(sizes)),
        ("x", Some(x)),
        ("w", Some(of_experts(grouped.weight, &[out, k])?)),
        ("bias", grouped.bias.map(|bias| of_experts(bias, &[out])).transpose()?),
        ("layer", grouped.layer.filter(|_| spec.layers > 1)),
    ];
    let arguments = arguments.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect();
    Ok((grouped_matmul::Problem::new(spec).map_err(unplanned)?, arguments))
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
        n: if linear.activation.is_gated() { out / 2 } else { out },
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

/// Activations as 8-bit `element`, and a scale f32 for each row (one feature of it): its largest absolute value becomes the
/// largest element.
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
