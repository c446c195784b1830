//! The grouped matmul in plain Rust: each group is a [matmul](crate::matmul::native) with its expert's weight.
//!
//! Each result is one sum over `k`, in the order that every matmul here has: a row's bits depend on itself alone, not on what
//! rows its expert has beside it.

use half::bf16;
use pagoda_ir::{
    Element, HostTensor, Result, TensorType,
    stablehlo::{BackendConfig, Builder, ConfigValue, CustomCall, Tensor},
};

use super::problem::{Activation, Layout, Problem};
use crate::{
    float::{Float, Times},
    matmul::{
        self,
        native::{Around, Call, multiplies, multiply},
    },
    named::Arrays,
    threads::{Guard, Threads},
};

/// The custom call's name; the engine registers its handler under it. Operands: `w [experts * columns, k]`, `x [m, k]`,
/// `group_sizes i32 [experts]`.
pub const TARGET: &str = "pagoda_grouped_matmul";
/// The option of the call's `backend_config` that is there where the weight has gates and ups.
pub const GATED: &str = "silu_gate";

/// Whether the call knows what follows the product.
pub fn takes(activation: Activation, has_bias: bool) -> bool {
    !has_bias && activation != Activation::ClampedSwiglu
}

/// Emits the call; its result is `[m, n]` of type `result`: that of `x`, or f32.
///
/// # Errors
/// When the shapes do not fit.
pub fn emit<'c, 'a>(
    b: &Builder<'c, 'a>,
    w: Tensor<'c, 'a>,
    x: Tensor<'c, 'a>,
    sizes: Tensor<'c, 'a>,
    activation: Activation,
    result: Element,
) -> Result<Tensor<'c, 'a>> {
    let (w_type, x_type, experts) = (w.ty(), x.ty(), sizes.ty().len());
    let fits = w_type.rank() == 2 && x_type.rank() == 2 && w_type.dims[1] == x_type.dims[1];
    let parts = experts * if activation.is_gated() { 2 } else { 1 };
    if !fits || !multiplies(w_type.element, x_type.element) || !w_type.dims[0].is_multiple_of(parts.max(1)) {
        return Err(pagoda_ir::Error::op(TARGET, format!("{x_type} times {w_type} of {experts} experts")));
    }
    let gated = activation.is_gated().then(|| (GATED.to_owned(), ConfigValue::Text("true".into())));
    let backend_config = BackendConfig::Dictionary(gated.into_iter().collect());
    let call = CustomCall { backend_config, ..CustomCall::default() };
    let result = TensorType::new(result, &[x_type.dims[0], w_type.dims[0] / parts]);
    Ok(b.custom_call(TARGET, &[w, x, sizes], &[result], call)?[0])
}

/// The operands of one call: weights of type `T`, activations of type `X`.
#[derive(Clone, Debug)]
pub struct Groups<'a, T, X> {
    /// `[m, k]`, sorted by expert.
    pub x: &'a [X],
    /// `[experts, columns, k]`.
    pub w: &'a [T],
    /// Rows of each expert: not negative, and together at most `m`.
    pub sizes: &'a [i32],
    /// `[m, k]`'s `k`, and output features.
    pub k: usize,
    /// Output features.
    pub n: usize,
    /// Whether the weight has gates and ups.
    pub gated: bool,
    /// What keeps `w` alive and unwritten beyond the call.
    pub resident: Option<Guard>,
}

/// Computes `y [m, n]`; what is behind the last group becomes zero.
///
/// # Panics
/// When a slice does not have the size that the shape gives.
pub fn multiply_groups<T: Times<X>, X: Float, O: Float>(groups: &Groups<'_, T, X>, y: &mut [O], threads: &dyn Threads) {
    let &Groups { x, w, sizes, k, n, gated, .. } = groups;
    let columns = if gated { 2 * n } else { n };
    let activation = if gated { matmul::Activation::SiluGate } else { matmul::Activation::Identity };
    let mut row = 0;
    for (expert, rows) in sizes.iter().map(|&size| size as usize).enumerate().filter(|&(_, rows)| rows > 0) {
        let of_group = transposed(&x[row * k..][..rows * k], k);
        let mut made = vec![O::narrow(0.0); rows * n];
        let w = &w[expert * columns * k..][..columns * k];
        let around = Around { activation, ..Around::NOTHING };
        multiply(
            &Call { w, x: &of_group, columns: rows, around, resident: groups.resident.clone() },
            &mut made,
            threads,
        );
        y[row * n..][..rows * n].copy_from_slice(&transposed(&made, rows));
        row += rows;
    }
    y[row * n..].fill(O::narrow(0.0));
}

/// `[rows, columns]` as `[columns, rows]`.
fn transposed<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    let rows = values.len() / columns;
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// The result of a problem that the host has a form for: weights as Hugging Face stores them, no bias.
pub(super) fn run(problem: &Problem, inputs: &Arrays, threads: &dyn Threads) -> Option<Vec<HostTensor>> {
    if problem.layout != Layout::WeightTransposed || !takes(problem.activation, problem.bias) {
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
    let (k, n, gated) = (problem.k, problem.n, problem.activation.is_gated());
    let layer = crate::kernel::layer_of(inputs) as usize * problem.experts * problem.weight_columns() * k;
    let w = &inputs["w"].as_slice::<T>()[layer..];
    let (x, sizes) = (inputs["x"].as_slice::<T>(), inputs["group_sizes"].as_slice());
    multiply_groups(&Groups { x, w, sizes, k, n, gated, resident: None }, y.as_mut_slice::<O>(), threads);
    y
}
