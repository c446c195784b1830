//! Rotary embedding: the tables of angles, made on the host in f64. Attention rotates by them.

use pagoda_ir::Element;
use pagoda_ir::tensor::HostTensor;

use crate::model::ModelSpec;
use crate::model::spec::{Rope, Turning};

/// The rotary tables of [`weight_types`](super::arguments::weight_types), one per rope: `f32[positions, head_dim]`, cosines then
/// sines of each pair, computed in f64. Pairs that do not turn have cosines of 1.
pub fn tables(config: &ModelSpec, positions: usize) -> Vec<HostTensor> {
    config.ropes.iter().map(|rope| table(rope, config.head_dim, positions)).collect()
}

fn table(rope: &Rope, head_dim: usize, positions: usize) -> HostTensor {
    let Turning { frequencies, factor } = rope.turning(positions);
    let still = head_dim / 2 - frequencies.len();
    let mut values = Vec::with_capacity(positions * head_dim);
    for position in 0..positions {
        let angles = frequencies.iter().map(|frequency| position as f64 * frequency);
        values.extend(angles.clone().map(|angle| factor * angle.cos()).chain(std::iter::repeat_n(1.0, still)));
        values.extend(angles.map(|angle| factor * angle.sin()).chain(std::iter::repeat_n(0.0, still)));
    }
    HostTensor::from_f64(Element::F32, &[positions, head_dim], &values)
}
