//! Matrix multiplication as StableHLO: one `dot_general` in the layout that the operands have, and its epilogue, which the
//! plugin's compiler fuses.

use pagoda_ir::{
    Context, Element, Result,
    stablehlo::{Builder, DotDims, Module, Precision, Tensor},
};

use super::problem::{Activation, Layout, Problem};

/// The kernel's operands; [`Problem::argument_types`] gives their types.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'c, 'a> {
    /// The activations.
    pub x: Tensor<'c, 'a>,
    /// The weight.
    pub w: Tensor<'c, 'a>,
    /// Where the epilogue adds one.
    pub bias: Option<Tensor<'c, 'a>>,
    /// Where the epilogue adds one.
    pub residual: Option<Tensor<'c, 'a>>,
}

/// The product with its epilogue, of the problem's output type. Products of f32 operands are true f32.
///
/// # Errors
/// When the operands are not those of the problem.
pub fn emit<'c, 'a>(b: &Builder<'c, 'a>, problem: &Problem, operands: &Operands<'c, 'a>) -> Result<Tensor<'c, 'a>> {
    let given: Vec<_> = [Some(operands.x), Some(operands.w), operands.bias, operands.residual]
        .into_iter()
        .flatten()
        .map(|operand| operand.ty())
        .collect();
    let expected = problem.argument_types();
    if given != expected {
        let list =
            |types: &[pagoda_ir::TensorType]| types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let message = format!("operands are ({}) and must be ({})", list(&given), list(&expected));
        return Err(pagoda_ir::Error::op("matmul", message));
    }
    let (lhs, rhs, contract): (_, _, (&[usize], &[usize])) = match problem.layout {
        Layout::RowMajor => (operands.x, operands.w, (&[1], &[0])),
        Layout::WeightTransposed => (operands.x, operands.w, (&[1], &[1])),
        Layout::FeatureMajor => (operands.w, operands.x, (&[1], &[0])),
    };
    let features = if problem.layout == Layout::FeatureMajor { 0 } else { 1 };
    let dot = DotDims { batch: (&[], &[]), contract };
    let mut result = b.dot_general_with(lhs, rhs, dot, Element::F32, Precision::Highest)?;
    if let Some(bias) = operands.bias {
        let bias = b.convert(bias, Element::F32)?;
        result = b.add(result, b.broadcast_in_dim(bias, &result.dims(), &[features])?)?;
    }
    if problem.epilogue.activation == Activation::SiluGate {
        let gate = b.slice_in_dim(result, 0, problem.n, features)?;
        let up = b.slice_in_dim(result, problem.n, 2 * problem.n, features)?;
        result = b.multiply(b.multiply(gate, b.logistic(gate)?)?, up)?;
    }
    if let Some(residual) = operands.residual {
        result = b.add(result, b.convert(residual, Element::F32)?)?;
    }
    b.convert(result, problem.output)
}

/// A module whose `main` takes the problem's arguments and returns the output.
///
/// # Errors
/// None for a valid problem, unless MLIR fails.
pub fn module<'c>(context: &'c Context, problem: &Problem) -> Result<Module<'c>> {
    let module = Module::new(context, "matmul");
    module.function("main", &problem.argument_types(), |b, args| {
        let mut rest = args[2..].iter().copied();
        let bias = if problem.epilogue.bias { rest.next() } else { None };
        Ok(vec![emit(b, problem, &Operands { x: args[0], w: args[1], bias, residual: rest.next() })?])
    })?;
    Ok(module)
}
