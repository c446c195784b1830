//! Rotary embedding: the table of angles, made on the host in f64. Attention rotates by it.

use pagoda_ir::Element;
use pagoda_ir::tensor::HostTensor;

use crate::model::config::LlamaConfig;

/// The rotary table of [`weight_types`](super::arguments::weight_types): `f32[positions, head_dim]`, cosines then
/// sines, computed in f64.
pub fn table(config: &LlamaConfig, positions: usize) -> HostTensor {
    let frequencies = config.rope_frequencies();
    let mut values = Vec::with_capacity(positions * config.head_dim);
    for position in 0..positions {
        let angles = frequencies.iter().map(|frequency| position as f64 * frequency);
        values.extend(angles.clone().map(f64::cos));
        values.extend(angles.map(f64::sin));
    }
    HostTensor::from_f64(Element::F32, &[positions, config.head_dim], &values)
}
