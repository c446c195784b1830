//! The grouped matmul in plain Rust: each group is a [matmul](crate::matmul::native) with its expert's weight.
//!
//! Each result is one sum over `k`, in the order that every matmul here has: a row's bits depend on itself alone, not on what
//! rows its expert has beside it.

use half::bf16;
use pagoda_ir::{Element, HostTensor};

use super::problem::{Activation, Layout, Problem};
use crate::{
    float::Float,
    matmul::{
        self,
        native::{Around, Call, multiply},
    },
    named::Arrays,
    threads::{Guard, Threads},
};

/// The operands of one call.
#[derive(Clone, Debug)]
pub struct Groups<'a, T> {
    /// `[m, k]`, sorted by expert.
    pub x: &'a [T],
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
pub fn multiply_groups<T: Float, O: Float>(groups: &Groups<'_, T>, y: &mut [O], threads: &dyn Threads) {
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
    let plain = problem.layout == Layout::WeightTransposed && !problem.bias;
    if !plain || problem.activation == Activation::ClampedSwiglu {
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

fn run_as<T: Float, O: Float>(problem: &Problem, inputs: &Arrays, threads: &dyn Threads) -> HostTensor {
    let ty = problem.output_type();
    let mut y = HostTensor::zeros(ty.element, &ty.dims);
    let (k, n, gated) = (problem.k, problem.n, problem.activation.is_gated());
    let layer = super::layer_of(inputs) as usize * problem.experts * problem.weight_columns() * k;
    let w = &inputs["w"].as_slice::<T>()[layer..];
    let (x, sizes) = (inputs["x"].as_slice(), inputs["group_sizes"].as_slice());
    multiply_groups(&Groups { x, w, sizes, k, n, gated, resident: None }, y.as_mut_slice::<O>(), threads);
    y
}
