//! Rotary embedding: the table of angles, made on the host in f64, and the rotation as StableHLO, in f32.

use pagoda_ir::stablehlo::{Builder, Tensor};
use pagoda_ir::tensor::HostTensor;
use pagoda_ir::{Element, Result};

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

/// Rotates `x [rows, heads, head_dim]` by `angles f32[rows, head_dim]`, each row's entry of the [`table`], in the
/// half-split form of Hugging Face's Llama.
pub(super) fn rotate<'c, 'a>(b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, angles: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
    let (element, dims) = (x.element(), x.dims());
    let half = [dims[0], dims[1], dims[2] / 2];
    let wide = b.convert(x, Element::F32)?;
    let low = b.slice_in_dim(wide, 0, half[2], 2)?;
    let high = b.slice_in_dim(wide, half[2], dims[2], 2)?;
    let cosines = b.broadcast_in_dim(b.slice_in_dim(angles, 0, half[2], 1)?, &half, &[0, 2])?;
    let sines = b.broadcast_in_dim(b.slice_in_dim(angles, half[2], dims[2], 1)?, &half, &[0, 2])?;
    let rotated_low = b.subtract(b.multiply(low, cosines)?, b.multiply(high, sines)?)?;
    let rotated_high = b.add(b.multiply(high, cosines)?, b.multiply(low, sines)?)?;
    b.convert(b.concatenate(&[rotated_low, rotated_high], 2)?, element)
}
