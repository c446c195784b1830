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
    let (x, w) = (args["x"], part(args["w"])?);
    let (lhs, rhs, contract): (_, _, (&[usize], &[usize])) = match problem.layout {
        Layout::RowMajor => (x, w, (&[1], &[0])),
        Layout::WeightTransposed => (x, w, (&[1], &[1])),
        Layout::FeatureMajor => (w, x, (&[1], &[0])),
    };
    let features = if problem.layout == Layout::FeatureMajor { 0 } else { 1 };
    let dot = DotDims { batch: (&[], &[]), contract };
    let mut result = b.dot_general_with(lhs, rhs, dot, Element::F32, Precision::Highest)?;
    if let Some(&bias) = args.get("bias") {
        let bias = b.convert(part(bias)?, Element::F32)?;
        result = b.add(result, b.broadcast_in_dim(bias, &result.dims(), &[features])?)?;
    }
    if problem.epilogue.activation == Activation::SiluGate {
        let gate = b.slice_in_dim(result, 0, problem.n, features)?;
        let up = b.slice_in_dim(result, problem.n, 2 * problem.n, features)?;
        result = b.multiply(b.multiply(gate, b.logistic(gate)?)?, up)?;
    }
    if let Some(&residual) = args.get("residual") {
        result = b.add(result, b.convert(residual, Element::F32)?)?;
    }
    b.convert(result, problem.output)
}
