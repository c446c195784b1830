//! RMSNorm in f64, from the definition.

use super::problem::Problem;
use crate::{
    check::{Expected, Tolerance, unit_roundoff},
    named::Arrays,
};
use pagoda_ir::Element;

/// The results: the normed rows, and with a residual the sum.
///
/// Both are rounded once. Before that, the sum has one rounding of an f32 addition, whose terms are exact: it is relative
/// to the sum, also where x and the residual cancel. The squares are positive, so that their mean, and with it the row's
/// scale, has the relative error of a sum of `hidden` terms: the magnitude of a result is its absolute value.
pub fn reference(problem: &Problem, inputs: &Arrays) -> Vec<Expected> {
    let mut sums = inputs["x"].to_f64();
    if let Some(residual) = inputs.get("residual") {
        sums.iter_mut().zip(residual.to_f64()).for_each(|(sum, residual)| *sum += residual);
    }
    let weight = inputs["weight"].to_f64();
    let normed = sums.chunks(problem.hidden).flat_map(|row| {
        let mean = row.iter().map(|value| value * value).sum::<f64>() / problem.hidden as f64;
        let root = (mean + problem.epsilon).sqrt();
        row.iter().zip(&weight).map(move |(value, weight)| value / root * weight)
    });
    let expected = |values: Vec<f64>, tolerance| {
        let magnitude = values.iter().map(|value| value.abs()).collect();
        Expected::new(values, magnitude, tolerance)
    };
    let out = expected(normed.collect(), Tolerance::of_sum(problem.element, problem.hidden));
    let once = Tolerance { rounding: unit_roundoff(problem.element), terms: unit_roundoff(Element::F32) };
    let sum = problem.residual.then(|| expected(sums, once));
    [out].into_iter().chain(sum).collect()
}
