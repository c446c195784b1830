//! The grouped matmul as StableHLO: a loop over experts, and for each a loop over blocks of its rows. An expert without rows is
//! not looked at.

use pagoda_ir::{
    Element, Result,
    stablehlo::{Builder, Direction, DotDims, Precision, Tensor},
};

use super::problem::{Activation, Layout, Problem};
use crate::named::Named;

/// Rows of a block at most.
const BLOCK: usize = 128;

/// The product of each row and its expert's weight, and what follows; zeros behind the last group. Products of f32 are true f32.
///
/// # Errors
/// None for operands of the problem's types, unless MLIR fails.
pub fn emit<'c, 'a>(b: &Builder<'c, 'a>, problem: &Problem, args: &Named<Tensor<'c, 'a>>) -> Result<Tensor<'c, 'a>> {
    let (m, n, experts) = (problem.m, problem.n, problem.experts);
    let number = |value: usize| b.scalar(Element::I32, value as f64);
    // Of a stack, the layer's part.
    let part = |stack: Tensor<'c, 'a>| match args.get("layer") {
        None => Ok(stack),
        Some(&layer) => b.part(stack, layer),
    };
    let (w, sizes) = (part(args["w"])?, args["group_sizes"]);
    let bias = args.get("bias").map(|&bias| b.convert(part(bias)?, Element::F32)).transpose()?;
    // A block that begins at the last row has all its rows.
    let block = m.min(BLOCK);
    let zero = b.splat(problem.input, &[], 0.0)?;
    let x = b.pad(args["x"], zero, &[0, 0], &[block as i64, 0], &[0, 0])?;
    let out = b.splat(problem.output, &[m + block, n], 0.0)?;
    let ends = b.cumulative_sum(sizes, 0)?;
    let turns = [number(0)?, out];
    let results = b.while_(
        &turns,
        |b, state| b.compare(state[0], Direction::Lt, b.scalar(Element::I32, experts as f64)?),
        |b, state| {
            let &[expert, out] = state else { unreachable!("two values") };
            let scalar = |of: Tensor<'c, 'a>| b.reshape(b.dynamic_slice(of, &[expert], &[1])?, &[]);
            let (end, size) = (scalar(ends)?, scalar(sizes)?);
            let rows = b.while_(
                &[b.subtract(end, size)?, out],
                |b, state| b.compare(state[0], Direction::Lt, end),
                |b, state| {
                    let &[row, out] = state else { unreachable!("two values") };
                    let zero = b.scalar(Element::I32, 0.0)?;
                    let of_x = b.dynamic_slice(x, &[row, zero], &[block, problem.k])?;
                    let of_bias = bias.map(|bias| b.part(bias, expert)).transpose()?;
                    let made = finished(b, problem, of_x, b.part(w, expert)?, of_bias)?;
                    let before = b.dynamic_slice(out, &[row, zero], &[block, n])?;
                    let index = b.iota(Element::I32, &[block, n], 0)?;
                    let left = b.broadcast_to(b.subtract(end, row)?, &[block, n])?;
                    let merged = b.select(b.compare(index, Direction::Lt, left)?, made, before)?;
                    let out = b.dynamic_update_slice(out, merged, &[row, zero])?;
                    Ok(vec![b.add(row, b.scalar(Element::I32, block as f64)?)?, out])
                },
            )?;
            Ok(vec![b.add(expert, b.scalar(Element::I32, 1.0)?)?, rows[1]])
        },
    )?;
    b.slice(results[1], &[0, 0], &[m, n], &[1, 1])
}

/// Rows times one expert's weight, what follows the product, and the rounding.
fn finished<'c, 'a>(
    b: &Builder<'c, 'a>,
    problem: &Problem,
    x: Tensor<'c, 'a>,
    w: Tensor<'c, 'a>,
    bias: Option<Tensor<'c, 'a>>,
) -> Result<Tensor<'c, 'a>> {
    let contract: (&[usize], &[usize]) = match problem.layout {
        Layout::RowMajor => (&[1], &[0]),
        Layout::WeightTransposed => (&[1], &[1]),
    };
    let dot = DotDims { batch: (&[], &[]), contract };
    let mut result = b.dot_general_with(x, w, dot, Element::F32, Precision::Highest)?;
    if let Some(bias) = bias {
        result = b.add(result, b.broadcast_in_dim(bias, &result.dims(), &[1])?)?;
    }
    let halves =
        || Ok((b.slice_in_dim(result, 0, problem.n, 1)?, b.slice_in_dim(result, problem.n, 2 * problem.n, 1)?));
    let result = match problem.activation {
        Activation::Identity => result,
        Activation::SiluGate => {
            let (gate, up) = halves()?;
            b.multiply(b.multiply(gate, b.logistic(gate)?)?, up)?
        }
        Activation::ClampedSwiglu => {
            let (gate, up) = halves()?;
            let all = |value: f64| b.splat(Element::F32, &gate.dims(), value);
            let gate = b.minimum(gate, all(Activation::LIMIT)?)?;
            let up = b.minimum(b.maximum(up, all(-Activation::LIMIT)?)?, all(Activation::LIMIT)?)?;
            let glu = b.multiply(gate, b.logistic(b.multiply(gate, all(Activation::ALPHA)?)?)?)?;
            b.multiply(glu, b.add(up, all(1.0)?)?)?
        }
    };
    b.convert(result, problem.output)
}
