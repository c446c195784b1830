//! RMSNorm as StableHLO, which the plugin's compiler fuses into two loops over each row.

use pagoda_ir::{
    Element, Result,
    stablehlo::{Builder, Tensor},
};

use super::problem::Problem;
use crate::named::Named;

/// The results.
///
/// # Errors
/// None for operands of the problem's types, unless MLIR fails.
pub fn emit<'c, 'a>(
    b: &Builder<'c, 'a>,
    problem: &Problem,
    args: &Named<Tensor<'c, 'a>>,
) -> Result<Vec<Tensor<'c, 'a>>> {
    let (rows, hidden) = (problem.rows, problem.hidden);
    let mut sum = b.convert(args["x"], Element::F32)?;
    if let Some(&residual) = args.get("residual") {
        sum = b.add(sum, b.convert(residual, Element::F32)?)?;
    }
    let squares = b.reduce_sum(b.multiply(sum, sum)?, &[1])?;
    let mean = b.divide(squares, b.splat(Element::F32, &[rows], hidden as f64)?)?;
    let scale = b.rsqrt(b.add(mean, b.splat(Element::F32, &[rows], problem.epsilon)?)?)?;
    let weight = b.convert(args["weight"], Element::F32)?;
    let normed = b.multiply(sum, b.broadcast_in_dim(scale, &[rows, hidden], &[0])?)?;
    let out = b.multiply(normed, b.broadcast_in_dim(weight, &[rows, hidden], &[1])?)?;
    let mut results = vec![b.convert(out, problem.element)?];
    if problem.residual {
        results.push(b.convert(sum, problem.element)?);
    }
    Ok(results)
}
