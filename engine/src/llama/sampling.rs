//! How tokens are chosen, as arguments of the step programs: the rows' keys, then the rows' parameters.

use pagoda_ir::stablehlo::Tensor;
use pagoda_ir::{Element, HostTensor, TensorType};

use crate::generate::SamplingOptions;
use crate::sampler::Parameters;

/// The types of `count` keys, each `u32[slots]`.
pub(super) fn key_types(count: usize, slots: usize) -> Vec<TensorType> {
    vec![TensorType::new(Element::U32, &[slots]); count]
}

/// The types of the parameters, each of `slots` rows: temperature, top-k, top-p, the seed's high and low words.
pub(super) fn parameter_types(slots: usize) -> [TensorType; 5] {
    [Element::F32, Element::I32, Element::F32, Element::U32, Element::U32]
        .map(|element| TensorType::new(element, &[slots]))
}

/// The parameters of arguments that have [`parameter_types`].
pub(super) fn parameters<'c, 'a>(args: &[Tensor<'c, 'a>]) -> Parameters<'c, 'a> {
    let &[temperature, top_k, top_p, high, low] = args else {
        panic!("{} sampling parameters instead of 5", args.len())
    };
    Parameters { temperature, top_k, top_p, seed: [high, low] }
}

/// The arguments that have [`parameter_types`], of rows that are sampled like this.
pub(super) fn rows(options: &[SamplingOptions]) -> [HostTensor; 5] {
    fn column<T: pagoda_ir::element::Native>(
        options: &[SamplingOptions],
        of: impl Fn(&SamplingOptions) -> T,
    ) -> HostTensor {
        HostTensor::new(&[options.len()], &options.iter().map(of).collect::<Vec<T>>())
    }
    [
        column(options, |row| row.temperature),
        column(options, |row| row.top_k.map_or(i32::MAX, |k| i32::try_from(k).unwrap_or(i32::MAX))),
        column(options, |row| row.top_p.unwrap_or(1.0)),
        column(options, |row| (row.seed >> 32) as u32),
        column(options, |row| row.seed as u32),
    ]
}
