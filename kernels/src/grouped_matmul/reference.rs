//! The grouped matmul in f64, from the definition.

use super::problem::{Activation, Layout, Problem};
use crate::{
    check::{Expected, Tolerance},
    named::Arrays,
};

/// Each row times the weight of its expert, and what follows the product; zeros in the rows behind the last group.
///
/// The output is rounded once; before that, f32 sums of `k` terms and the activation's few.
pub fn reference(problem: &Problem, inputs: &Arrays) -> Expected {
    let (k, n, columns) = (problem.k, problem.n, problem.weight_columns());
    let first_expert = crate::kernel::layer_of(inputs) as usize * problem.experts;
    let x = inputs["x"].to_f64();
    let w = inputs["w"].to_f64();
    let bias = inputs.get("bias").map(|bias| bias.to_f64());
    let mut values = vec![0.0; problem.m * n];
    let mut magnitudes = vec![0.0; problem.m * n];
    let mut row = 0;
    for (group, &size) in inputs["group_sizes"].as_slice::<i32>().iter().enumerate() {
        let expert = first_expert + group;
        for _ in 0..size {
            // The sum over the features and the sum of the absolute terms.
            let product = |column: usize| {
                let start = bias.as_ref().map_or(0.0, |bias| bias[expert * columns + column]);
                (0..k).fold((start, start.abs()), |(sum, magnitude), feature| {
                    let weight = match problem.layout {
                        Layout::RowMajor => w[(expert * k + feature) * columns + column],
                        Layout::WeightTransposed => w[(expert * columns + column) * k + feature],
                    };
                    let term = x[row * k + feature] * weight;
                    (sum + term, magnitude + term.abs())
                })
            };
            for column in 0..n {
                let (value, magnitude) = match problem.activation {
                    Activation::Identity => product(column),
                    Activation::SiluGate => silu_gate(product(column), product(n + column)),
                    Activation::ClampedSwiglu => clamped_swiglu(product(column), product(n + column)),
                };
                values[row * n + column] = value;
                magnitudes[row * n + column] = magnitude;
            }
            row += 1;
        }
    }
    Expected { live: row * n, ..Expected::new(values, magnitudes, Tolerance::of_sum(problem.output, k)) }
}

/// |d silu(g) / dg| <= 1.1 and |silu(g)| <= |g|.
fn silu_gate((gate, gate_magnitude): (f64, f64), (up, up_magnitude): (f64, f64)) -> (f64, f64) {
    let silu = gate / (1.0 + (-gate).exp());
    (silu * up, 1.1 * gate_magnitude * up.abs() + silu.abs() * up_magnitude)
}

/// As [`silu_gate`]; bounds do not add errors, and the 1 that is added to an up is a term of it.
fn clamped_swiglu((gate, gate_magnitude): (f64, f64), (up, up_magnitude): (f64, f64)) -> (f64, f64) {
    let (gate, up) = (gate.min(7.0), up.clamp(-7.0, 7.0) + 1.0);
    let glu = gate / (1.0 + (-1.702 * gate).exp());
    (glu * up, 1.1 * gate_magnitude * up.abs() + glu.abs() * (up_magnitude + 1.0))
}
