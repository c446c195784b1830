//! Matrix multiplication as StableHLO: one `dot_general` in the layout that the operands have, and its epilogue, which the
//! plugin's compiler fuses.

use pagoda_ir::{
    Element, Result,
    stablehlo::{Builder, DotDims, Precision, Tensor},
};

use super::problem::{Activation, Layout, Problem};
use crate::named::Named;

/// The product with its epilogue, of the problem's output type. Products of f32 operands are true f32.
///
/// # Errors
/// None for operands of the problem's types, unless MLIR fails.
pub fn emit<'c, 'a>(b: &Builder<'c, 'a>, problem: &Problem, args: &Named<Tensor<'c, 'a>>) -> Result<Tensor<'c, 'a>> {
    // Of a stack, the layer's part.
    let part = |stack: Tensor<'c, 'a>| match args.get("layer") {
        None => Ok(stack),
        Some(&layer) => b.part(stack, layer),
    };
    let (mut x, mut w) = (args["x"], part(args["w"])?);
    let features = if problem.layout == Layout::FeatureMajor { 0 } else { 1 };
    let scale = args.get("w_scale").map(|&scale| part(scale)).transpose()?;
    if let Some(scale) = scale {
        // Stored elements are exact in either type; with a scale per group they are scaled before the product.
        let wide = if problem.quantized_x() || problem.group().is_some() { Element::F32 } else { problem.input };
        (x, w) = (b.convert(x, wide)?, b.convert(w, wide)?);
        if let Some(group) = problem.group() {
            w = b.multiply(w, spread(b, problem, scale, group)?)?;
        }
    }
    let (lhs, rhs, contract): (_, _, (&[usize], &[usize])) = match problem.layout {
        Layout::RowMajor => (x, w, (&[1], &[0])),
        Layout::WeightTransposed => (x, w, (&[1], &[1])),
        Layout::FeatureMajor => (w, x, (&[1], &[0])),
    };
    let dot = DotDims { batch: (&[], &[]), contract };
    let mut result = b.dot_general_with(lhs, rhs, dot, Element::F32, Precision::Highest)?;
    if let (Some(scale), None) = (scale, problem.group()) {
        let scale = b.reshape(scale, &[problem.weight_columns()])?;
        result = b.multiply(result, b.broadcast_in_dim(scale, &result.dims(), &[features])?)?;
    }
    if let Some(&scale) = args.get("x_scale") {
        let scale = b.reshape(scale, &[problem.m])?;
        result = b.multiply(result, b.broadcast_in_dim(scale, &result.dims(), &[1 - features])?)?;
    }
    if let Some(&bias) = args.get("bias") {
        let bias = b.convert(part(bias)?, Element::F32)?;
        result = b.add(result, b.broadcast_in_dim(bias, &result.dims(), &[features])?)?;
    }
    if problem.epilogue.activation.is_gated() {
        let gate = b.slice_in_dim(result, 0, problem.n, features)?;
        let up = b.slice_in_dim(result, problem.n, 2 * problem.n, features)?;
        let number = |value: f64| b.splat(Element::F32, &gate.dims(), value);
        let argument = match problem.epilogue.activation {
            Activation::Identity | Activation::SiluGate => gate,
            Activation::GeluGate => {
                let cube = b.multiply(b.multiply(gate, gate)?, number(Activation::GELU_CUBE)?)?;
                let inner = b.multiply(gate, b.add(cube, number(1.0)?)?)?;
                b.multiply(inner, number(2.0 * Activation::GELU_SCALE)?)?
            }
        };
        result = b.multiply(b.multiply(gate, b.logistic(argument)?)?, up)?;
    }
    if let Some(&residual) = args.get("residual") {
        result = b.add(result, b.convert(residual, Element::F32)?)?;
    }
    b.convert(result, problem.output)
}

/// The scale of each element of the weight, in its layout.
fn spread<'c, 'a>(
    b: &Builder<'c, 'a>,
    problem: &Problem,
    scale: Tensor<'c, 'a>,
    group: usize,
) -> Result<Tensor<'c, 'a>> {
    let (k, columns, groups) = (problem.k, problem.weight_columns(), problem.groups());
    // [columns, groups, group] or [groups, group, columns], then without what is beyond k.
    let (scale, dims, map, depth) = match problem.layout {
        Layout::RowMajor => (scale, [groups, group, columns], [0, 2], 0),
        Layout::WeightTransposed => (b.transpose(scale, &[1, 0])?, [columns, groups, group], [0, 1], 1),
        Layout::FeatureMajor => (scale, [columns, groups, group], [0, 1], 1),
    };
    let spread = b.broadcast_in_dim(scale, &dims, &map)?;
    let flat = if depth == 0 { [groups * group, columns] } else { [columns, groups * group] };
    b.slice_in_dim(b.reshape(spread, &flat)?, 0, k, depth)
}
