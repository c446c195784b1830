//! Matmul in plain Rust, for programs that run on the host's own processor.
//!
//! `y [n, m] = epilogue(w [n, k] norm(x) [k, m])`, the weight as Hugging Face stores it: in the type of `x`, or in bf16 beside
//! f32. Weights are read once for a few
//! columns, at the memory's bandwidth, and widened in registers; for many columns the tiles of both operands stay in the caches
//! and the multiply-adds are the limit. XLA's CPU compiler calls a general matmul that packs the weights anew on every step,
//! and makes loops of their own of what stands around the product, whose dispatch costs more than their work: norm, gate
//! and residual are part of this call.
//!
//! Each result is one sum over `k` in the order of [`simd`](crate::simd): a column's bits depend neither on what other columns
//! there are nor on how many threads.

use super::problem::{Activation, Layout, Problem};
use crate::{
    float::{Float, Times},
    kernel::Kernel,
    named::Arrays,
    threads::Threads,
};
use half::bf16;
use pagoda_ir::{
    Element, HostTensor, Result, TensorType,
    stablehlo::{BackendConfig, Builder, ConfigValue, CustomCall, Tensor},
};

pub(crate) mod multiply;

pub use multiply::{Call, multiply};

/// The custom call's name; the engine registers its handler under it.
pub const TARGET: &str = "pagoda_matmul";
/// Options in the call's `backend_config`, written as text where they are on: the epsilon of the norm, whether its weight is
/// a distance from 1, a gate's name, a residual. Operands after `w` and `x`: the norm's weight, the residual.
pub const OPTIONS: [&str; 4] = ["norm", "plus_one", "gate", "residual"];

/// Root-mean-square norm of every column of `x`, `x / sqrt(mean(x^2) + epsilon) * weight`, rounded before the weight is
/// applied (as Llama was trained) and after; with a factor of `1 + weight` after it alone (as Gemma was).
#[derive(Clone, Copy, Debug)]
pub struct Norm<W> {
    /// `[k]`
    pub weight: W,
    /// Added to the mean of the squares.
    pub epsilon: f64,
    /// Whether the factor is `1 + weight`.
    pub plus_one: bool,
}

/// What is done around the product. `W` is a tensor of a program that is being emitted, or a slice.
#[derive(Clone, Copy, Debug)]
pub struct Around<W> {
    /// Before it.
    pub norm: Option<Norm<W>>,
    /// After it. With a gate the weight is `[2 n, k]`: rows of the gate, then of what is gated.
    pub activation: Activation,
    /// `[n, m]`, added last.
    pub residual: Option<W>,
}

impl<W> Around<W> {
    /// The bare product.
    pub const NOTHING: Self = Self { norm: None, activation: Activation::Identity, residual: None };
}

/// Whether there is a product of such weights with such activations: of one type, or bf16 with f32.
pub fn multiplies(w: Element, x: Element) -> bool {
    w == x || (w, x) == (Element::Bf16, Element::F32)
}

/// Emits the call; its result is `[n, m]` of type `result`: that of `x`, or f32.
///
/// # Errors
/// When the shapes do not fit.
pub fn emit<'c, 'a>(
    b: &Builder<'c, 'a>,
    w: Tensor<'c, 'a>,
    x: Tensor<'c, 'a>,
    around: &Around<Tensor<'c, 'a>>,
    result: Element,
) -> Result<Tensor<'c, 'a>> {
    let (w_type, x_type) = (w.ty(), x.ty());
    let fits = w_type.rank() == 2 && x_type.rank() == 2 && w_type.dims[1] == x_type.dims[0];
    if !fits || !multiplies(w_type.element, x_type.element) {
        let message = format!("{w_type} times {x_type}");
        return Err(pagoda_ir::Error::op(TARGET, message));
    }
    let rows = if around.activation.is_gated() { w_type.dims[0] / 2 } else { w_type.dims[0] };
    let on = |yes: bool| yes.then(|| "true".to_owned());
    let options = [
        around.norm.map(|norm| norm.epsilon.to_string()),
        on(around.norm.is_some_and(|norm| norm.plus_one)),
        around.activation.name().map(str::to_owned),
        on(around.residual.is_some()),
    ];
    let options = OPTIONS.iter().zip(options);
    let options = options.filter_map(|(name, value)| Some(((*name).to_owned(), ConfigValue::Text(value?))));
    let call = CustomCall { backend_config: BackendConfig::Dictionary(options.collect()), ..CustomCall::default() };
    let operands: Vec<_> =
        [Some(w), Some(x), around.norm.map(|norm| norm.weight), around.residual].into_iter().flatten().collect();
    let result = TensorType::new(result, &[rows, x_type.dims[1]]);
    Ok(b.custom_call(TARGET, &operands, &[result], call)?[0])
}

/// The result of a problem that the call takes: feature-major, of one layer, without biases or quantised weights.
pub(super) fn run(problem: &Problem, inputs: &Arrays, threads: &dyn Threads) -> Option<Vec<HostTensor>> {
    let arguments = super::Matmul::arguments(problem);
    let known = arguments.iter().all(|argument| ["x", "w", "residual"].contains(&argument.name));
    let plain = problem.layout == Layout::FeatureMajor && known && inputs["w"].element() == problem.input;
    if !plain || problem.epilogue.residual && problem.output != problem.input {
        return None;
    }
    let run = match (problem.input, problem.output) {
        (Element::F32, Element::F32) => run_as::<f32, f32>,
        (Element::Bf16, Element::Bf16) => run_as::<bf16, bf16>,
        (Element::Bf16, Element::F32) => run_as::<bf16, f32>,
        _ => return None,
    };
    Some(vec![run(problem, inputs, threads)])
}

fn run_as<T: Times<T>, O: Float>(problem: &Problem, inputs: &Arrays, threads: &dyn Threads) -> HostTensor {
    let ty = problem.output_type();
    let mut y = HostTensor::zeros(ty.element, &ty.dims);
    let residual = inputs.get("residual").map(HostTensor::as_slice::<T>);
    let around = Around { norm: None, activation: problem.epilogue.activation, residual };
    let (w, x) = (inputs["w"].as_slice::<T>(), inputs["x"].as_slice::<T>());
    multiply(&Call { w, x, columns: problem.m, around, resident: None }, y.as_mut_slice::<O>(), threads);
    y
}
