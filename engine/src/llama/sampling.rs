//! How tokens are chosen, as arguments of the step programs: the rows' keys, then the run's parameters.

use pagoda_ir::stablehlo::Tensor;
use pagoda_ir::{Element, TensorType};

use crate::sampler::Parameters;

/// The types of `count` keys, each `u32[slots]`.
pub(super) fn key_types(count: usize, slots: usize) -> Vec<TensorType> {
    vec![TensorType::new(Element::U32, &[slots]); count]
}

/// The types of the parameters: temperature, top-k, top-p, seed.
pub(super) fn parameter_types() -> [TensorType; 4] {
    [
        TensorType::scalar(Element::F32),
        TensorType::scalar(Element::I32),
        TensorType::scalar(Element::F32),
        TensorType::new(Element::U32, &[2]),
    ]
}

/// The parameters of arguments that have [`parameter_types`].
pub(super) fn parameters<'c, 'a>(args: &[Tensor<'c, 'a>]) -> Parameters<'c, 'a> {
    let &[temperature, top_k, top_p, seed] = args else { panic!("{} sampling parameters instead of 4", args.len()) };
    Parameters { temperature, top_k, top_p, seed }
}
