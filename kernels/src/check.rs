//! Holds an emission against the reference: shared by unit tests, property tests and fuzzing.
//!
//! Tolerances are relative to the *magnitude* of each result, the sum of the absolute values of the terms that make it up
//! (a result that cancels to 0 still carries the rounding of its terms):
//! - f32: 2e-5. Sums of up to 10^4 terms in f32 (unit roundoff 6e-8) grow errors with about the square root of the number
//!   of terms, 6e-6; the exponential, and logits of magnitude 10 whose absolute error turns into a relative one of the
//!   weights, leave the rest.
//! - bf16: 1e-2. Operands are exact and sums f32, so the rounding of the result (2^-9, 2e-3) leads; a form that rounds the
//!   softmax's weights to bf16 as well, as an MXU wants them, stays within.

use std::error::Error;

use pagoda_ir::{Context, Element, HostTensor, stablehlo::Module};

use crate::{matmul, rpa};

/// Runs a module's `main`. Kernels know no device; whoever knows one implements this.
pub trait Runner {
    /// Compiles `module` (or finds it compiled) and runs it.
    ///
    /// # Errors
    /// What the device's compiler or the device said.
    fn run(&self, module: &Module, inputs: &[HostTensor]) -> Result<Vec<HostTensor>, Box<dyn Error + Send + Sync>>;
}

/// A kernel, a problem and inputs.
#[derive(Clone, Copy, Debug)]
pub enum Case<'p> {
    /// Matrix multiplication.
    Matmul(&'p matmul::Problem, &'p matmul::Inputs),
    /// Ragged paged attention.
    Rpa(&'p rpa::Problem, &'p rpa::Inputs),
    /// Writing `k` and `v` of the batch's rows into the KV cache.
    KvWrite(&'p rpa::Problem, &'p rpa::Inputs, &'p HostTensor, &'p HostTensor),
}

/// Why a check failed.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The module could not be built.
    #[error(transparent)]
    Emit(#[from] pagoda_ir::Error),
    /// The runner failed.
    #[error("{module} does not run: {source}")]
    Run {
        /// The module's name.
        module: String,
        /// What the runner said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The result has the wrong type or shape.
    #[error("{module} returns {actual} and should return {expected}")]
    Type {
        /// The module's name.
        module: String,
        /// Types that came.
        actual: String,
        /// Type that should have come.
        expected: String,
    },
    /// A value is not what the reference says.
    #[error(
        "{module}{index:?} = {actual}, the reference says {expected}: off by {error:.3e} of its magnitude {magnitude:.3e}, \
         {tolerance:.0e} allowed ({wrong} of {total} values are wrong)"
    )]
    Mismatch {
        /// The module's name.
        module: String,
        /// Where: one index per dimension.
        index: Vec<usize>,
        /// The value that came.
        actual: f64,
        /// The value that should have come.
        expected: f64,
        /// What the error is relative to.
        magnitude: f64,
        /// The relative error.
        error: f64,
        /// The relative error that is allowed.
        tolerance: f64,
        /// How many values are wrong.
        wrong: usize,
        /// How many were compared.
        total: usize,
    },
}

/// The error that `element` results may have, relative to their magnitude; see the module's documentation.
pub fn tolerance(element: Element) -> f64 {
    match element {
        Element::F32 => 2e-5,
        Element::F64 => 1e-12,
        _ => 1e-2,
    }
}

/// Emits the case as StableHLO, runs it, and compares every result with the reference.
///
/// # Errors
/// The worst value that is off, or why there is none to compare.
pub fn check(case: Case, runner: &dyn Runner) -> Result<(), CheckError> {
    let context = Context::new();
    match case {
        Case::Matmul(problem, inputs) => {
            let module = matmul::stablehlo::module(&context, problem)?;
            let expected = matmul::reference(problem, inputs);
            let result = run(runner, &module, &inputs.to_tensors(), &problem.output_type())?;
            compare(module.name(), &result, &expected.output, &expected.magnitude, tolerance(problem.output))
        }
        Case::Rpa(problem, inputs) => {
            let module = rpa::stablehlo::module(&context, problem)?;
            let expected = rpa::reference(problem, inputs);
            let result = run(runner, &module, &inputs.to_tensors(problem), &problem.q_type())?;
            compare(module.name(), &result, &expected.output, &expected.magnitude, tolerance(problem.element))
        }
        Case::KvWrite(problem, inputs, k, v) => {
            let module = rpa::kv_write::module(&context, problem)?;
            let slots = inputs.batch.kv_slots(problem.tokens);
            let mut arguments =
                vec![inputs.kv_pages.clone(), k.clone(), v.clone(), HostTensor::new(&[problem.tokens], &slots)];
            if problem.layers > 1 {
                arguments.push(HostTensor::scalar((inputs.layer * problem.pages) as i32));
            }
            let expected = rpa::reference::written(problem, inputs, k, v);
            let result = run(runner, &module, &arguments, &problem.kv_pages_type())?;
            // Bytes move, nothing is computed: poison must stay poison, so NaN equals NaN here.
            let actual: Vec<f64> =
                result.to_f64().iter().map(|value| if value.is_nan() { POISON } else { *value }).collect();
            let expected: Vec<f64> =
                expected.iter().map(|value| if value.is_nan() { POISON } else { *value }).collect();
            let actual = HostTensor::from_f64(Element::F64, result.dims(), &actual);
            compare(module.name(), &actual, &expected, &vec![0.0; expected.len()], 0.0)
        }
    }
}

/// Stands for NaN where NaN is a legitimate value; no test input is this large.
const POISON: f64 = 1e300;

fn run(
    runner: &dyn Runner,
    module: &Module,
    inputs: &[HostTensor],
    expected: &pagoda_ir::TensorType,
) -> Result<HostTensor, CheckError> {
    let name = || module.name().to_owned();
    let mut results = runner.run(module, inputs).map_err(|source| CheckError::Run { module: name(), source })?;
    let fits = |result: &HostTensor| result.element() == expected.element && result.dims() == expected.dims;
    match results.pop() {
        Some(result) if results.is_empty() && fits(&result) => Ok(result),
        result => {
            let all = results.iter().chain(&result).map(|result| format!("{}{:?}", result.element(), result.dims()));
            let actual = all.collect::<Vec<_>>().join(", ");
            Err(CheckError::Type { module: name(), actual, expected: expected.to_string() })
        }
    }
}

/// Compares `actual` with `expected`; `|actual - expected| <= tolerance * magnitude` must hold everywhere. NaN is wrong.
///
/// # Errors
/// [`CheckError::Mismatch`] with the worst value.
pub fn compare(
    name: &str,
    actual: &HostTensor,
    expected: &[f64],
    magnitude: &[f64],
    tolerance: f64,
) -> Result<(), CheckError> {
    let values = actual.to_f64();
    assert_eq!((values.len(), values.len()), (expected.len(), magnitude.len()), "{name}: the reference's size");
    let mut worst: Option<(usize, f64)> = None;
    let mut wrong = 0;
    for (index, value) in values.iter().enumerate() {
        let difference = (value - expected[index]).abs();
        // Written so that NaN is wrong.
        if difference <= tolerance * magnitude[index] {
            continue;
        }
        wrong += 1;
        let error = if difference.is_nan() { f64::INFINITY } else { difference / magnitude[index] };
        if worst.is_none_or(|(_, largest)| error > largest) {
            worst = Some((index, error));
        }
    }
    let Some((flat, error)) = worst else { return Ok(()) };
    let mut rest = flat;
    let mut index: Vec<usize> = Vec::with_capacity(actual.dims().len());
    for size in actual.dims().iter().rev() {
        index.insert(0, rest % size);
        rest /= size;
    }
    Err(CheckError::Mismatch {
        module: name.to_owned(),
        index,
        actual: values[flat],
        expected: expected[flat],
        magnitude: magnitude[flat],
        error,
        tolerance,
        wrong,
        total: values.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_value_is_reported_and_nan_is_wrong() {
        let actual = HostTensor::new(&[2, 2], &[1.0_f32, 2.5, f32::NAN, 4.0]);
        let error = compare("k", &actual, &[1.0, 2.0, 3.0, 4.0], &[1.0; 4], 1e-3).unwrap_err();
        let CheckError::Mismatch { index, wrong, total, .. } = error else { panic!("{error}") };
        assert_eq!((index, wrong, total), (vec![1, 0], 2, 4));
        assert!(compare("k", &actual, &[1.0, 2.5, 3.0, 4.0], &[1.0; 4], 1e9).is_err());
        let near = HostTensor::new(&[1], &[1.0005_f32]);
        assert!(compare("k", &near, &[1.0], &[1.0], 1e-3).is_ok());
        assert!(compare("k", &near, &[1.0], &[0.1], 1e-3).is_err());
    }
}
