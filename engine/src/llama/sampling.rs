//! How tokens are chosen, as arguments of the step programs: the rows' keys, then the rows' parameters.

use pagoda_ir::stablehlo::Tensor;
use pagoda_ir::{Element, HostTensor, TensorType};

use crate::generate::Draw;
use crate::sampler::Parameters;

/// The types of `count` keys, each `u32[slots]`.
pub(super) fn key_types(count: usize, slots: usize) -> Vec<TensorType> {
    vec![TensorType::new(Element::U32, &[slots]); count]
}

/// The types of the parameters, each of `slots` rows: temperature, top-k, top-p, the seed's high and low words, whether
/// the logarithm of the token's probability is asked for.
pub(super) fn parameter_types(slots: usize) -> [TensorType; 6] {
    [Element::F32, Element::I32, Element::F32, Element::U32, Element::U32, Element::I32]
        .map(|element| TensorType::new(element, &[slots]))
}

/// The parameters of arguments that have [`parameter_types`].
pub(super) fn parameters<'c, 'a>(args: &[Tensor<'c, 'a>]) -> Parameters<'c, 'a> {
    let &[temperature, top_k, top_p, high, low, log_probabilities] = args else {
        panic!("{} sampling parameters instead of 6", args.len())
    };
    Parameters { temperature, top_k, top_p, seed: [high, low], log_probabilities }
}

/// The arguments that have [`parameter_types`], of rows that are drawn like this.
pub(super) fn rows(draws: &[Draw]) -> [HostTensor; 6] {
    fn column<T: pagoda_ir::element::Native>(draws: &[Draw], of: impl Fn(&Draw) -> T) -> HostTensor {
        HostTensor::new(&[draws.len()], &draws.iter().map(of).collect::<Vec<T>>())
    }
    [
        column(draws, |row| row.sampling.temperature),
        column(draws, |row| row.sampling.top_k.map_or(i32::MAX, |k| i32::try_from(k).unwrap_or(i32::MAX))),
        column(draws, |row| row.sampling.top_p.unwrap_or(1.0)),
        column(draws, |row| (row.sampling.seed >> 32) as u32),
        column(draws, |row| row.sampling.seed as u32),
        column(draws, |row| i32::from(row.log_probabilities)),
    ]
}
