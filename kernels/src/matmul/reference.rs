//! Matrix multiplication in f64, from the definition.

use super::problem::{Activation, Layout, Problem};
use crate::{
    check::{Expected, Tolerance},
    named::Arrays,
};

/// Computes the product of `inputs` and its epilogue, row-major in the problem's layout.
///
/// The output is rounded once; before that, f32 sums of `k` terms and the epilogue's few. Quantized elements are exact, and
/// so are products of two (8 significant bits at most, of bf16 too): scales add two roundings to a group's sum.
pub fn reference(problem: &Problem, inputs: &Arrays) -> Expected {
    let (m, k, n) = (problem.m, problem.k, problem.n);
    let layer = crate::kernel::layer_of(inputs) as usize;
    // Of a stack, the layer's part.
    let part = |stack: Vec<f64>| {
        let size = stack.len() / problem.layers;
        stack[layer * size..][..size].to_vec()
    };
    let (x, w) = (inputs["x"].to_f64(), part(inputs["w"].to_f64()));
    let bias = inputs.get("bias").map(|bias| part(bias.to_f64()));
    let residual = inputs.get("residual").map(|residual| residual.to_f64());
    let w_scale = inputs.get("w_scale").map(|scale| part(scale.to_f64()));
    let x_scale = inputs.get("x_scale").map(|scale| scale.to_f64());
    let columns = w.len() / k;
    let (groups, group) = (problem.groups(), problem.group().unwrap_or(k));
    // What a stored product stands for.
    let scale = |row: usize, feature: usize, column: usize| {
        let of_w = w_scale.as_ref().map_or(1.0, |scale| match problem.layout {
            Layout::FeatureMajor => scale[column * groups + feature / group],
            _ => scale[feature / group * columns + column],
        });
        of_w * x_scale.as_ref().map_or(1.0, |scale| scale[row])
    };
    // The sum over the features and the sum of the absolute terms.
    let product = |row: usize, column: usize| {
        let start = bias.as_ref().map_or(0.0, |bias| bias[column]);
        (0..k).fold((start, start.abs()), |(sum, magnitude), feature| {
            let stored = match problem.layout {
                Layout::RowMajor => x[row * k + feature] * w[feature * columns + column],
                Layout::WeightTransposed => x[row * k + feature] * w[column * k + feature],
                Layout::FeatureMajor => x[feature * m + row] * w[column * k + feature],
            };
            let term = stored * scale(row, feature, column);
            (sum + term, magnitude + term.abs())
        })
    };
    let mut output = vec![0.0; m * n];
    let mut magnitudes = vec![0.0; m * n];
    for row in 0..m {
        for column in 0..n {
            let (mut value, mut magnitude) = product(row, column);
            // The share of a gate that is left, and the largest slope of the gate's function.
            let gated = match problem.epilogue.activation {
                Activation::Identity => None,
                Activation::SiluGate => Some((1.0 / (1.0 + (-value).exp()), 1.1)),
                Activation::GeluGate => {
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (value + 0.044715 * value.powi(3));
                    Some((0.5 * (1.0 + inner.tanh()), 1.13))
                }
            };
            if let Some((share, slope)) = gated {
                let (up, up_magnitude) = product(row, n + column);
                magnitude = slope * magnitude * up.abs() + value.abs() * share * up_magnitude;
                value *= share * up;
            }
            let index = if problem.layout == Layout::FeatureMajor { column * m + row } else { row * n + column };
            if let Some(residual) = &residual {
                value += residual[index];
                magnitude += residual[index].abs();
            }
            output[index] = value;
            magnitudes[index] = magnitude;
        }
    }
    Expected::new(output, magnitudes, Tolerance::of_sum(problem.output, k))
}
