//! Llama on a device: loading its weights, and the step programs that run it.
//!
//! [`step`] is the model's graph, `lowering` how its operations are emitted for a [`Target`]; `arguments`,
//! `sampling` and `rotary` are what the programs take.

mod arguments;
mod lowering;
mod rotary;
mod sampling;
pub mod step;
mod target;

pub use arguments::weight_types;
pub use target::Target;

use pagoda_ir::{Element, HostTensor};

use crate::error::Result;
use crate::model::config::LlamaConfig;
use crate::model::weights::{TensorSpec, Weights, tensor_groups};
use crate::pjrt::{Buffer, Client};

/// A model's weights on a device, as the step programs take them.
pub struct DeviceModel {
    config: LlamaConfig,
    compute: Element,
    positions: usize,
    buffers: Vec<Buffer>,
}

impl DeviceModel {
    /// Uploads all weights in the type `compute`, and a rotary table for `positions` positions.
    ///
    /// Host memory holds one argument of the program at a time beyond the device's own copy: each is converted (and
    /// where the program wants several projections as one matrix, stacked), uploaded, and dropped.
    ///
    /// # Errors
    /// When a tensor is missing or malformed, or the device is out of memory.
    pub fn load(
        client: &Client,
        config: &LlamaConfig,
        weights: &Weights,
        compute: Element,
        positions: usize,
    ) -> Result<Self> {
        let mut buffers = Vec::new();
        for group in tensor_groups(config) {
            buffers.push(upload(client, weights, &group, compute)?);
            for spec in &group {
                weights.release(spec);
            }
        }
        buffers.push(client.upload(&rotary::table(config, positions), 0)?);
        Ok(Self { config: config.clone(), compute, positions, buffers })
    }

    /// The model's configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The type that the weights were uploaded in.
    pub fn compute(&self) -> Element {
        self.compute
    }

    /// Positions that the rotary table covers: the longest sequence.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The leading arguments of every step program, in the order of [`weight_types`].
    pub fn weights(&self) -> &[Buffer] {
        &self.buffers
    }
}

/// The shape of tensors of equal width (or vectors), one below the other.
fn stacked_dims(group: &[TensorSpec]) -> Vec<usize> {
    let mut dims = group[0].dims.clone();
    dims[0] = group.iter().map(|spec| spec.dims[0]).sum();
    dims
}

/// Uploads a group of tensors as one.
fn upload(client: &Client, weights: &Weights, group: &[TensorSpec], compute: Element) -> Result<Buffer> {
    if let [spec] = group {
        let data = weights.load(spec, compute)?;
        return Ok(client.upload_bytes(compute, &spec.dims, data.bytes(), 0)?);
    }
    let mut stacked = HostTensor::zeros(compute, &stacked_dims(group));
    let mut rest = stacked.bytes_mut();
    for spec in group {
        let data = weights.load(spec, compute)?;
        let (part, after) = rest.split_at_mut(data.bytes().len());
        part.copy_from_slice(data.bytes());
        rest = after;
    }
    Ok(client.upload(&stacked, 0)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::llama::step::StepShape;

    /// What is uploaded is what the programs take, in their order.
    #[test]
    fn uploads_have_the_types_of_the_arguments() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-llama-kjv");
        let tiny = LlamaConfig::open(&folder).unwrap();
        let shape = StepShape {
            prefill_rows: 8,
            slots: 2,
            pages: 4,
            page_size: 16,
            pages_per_seq: 2,
            max_positions: 32,
            max_rounds: 1,
            compute: Element::Bf16,
            target: Target::Portable,
        };
        for bits in 0..8 {
            let [attention_bias, mlp_bias, tie_word_embeddings] = [1, 2, 4].map(|bit| bits & bit != 0);
            let config = LlamaConfig { attention_bias, mlp_bias, tie_word_embeddings, ..tiny.clone() };
            let mut uploads: Vec<Vec<usize>> = tensor_groups(&config).iter().map(|group| stacked_dims(group)).collect();
            uploads.push(rotary::table(&config, shape.max_positions).dims().to_vec());
            let arguments: Vec<_> = weight_types(&config, &shape).into_iter().map(|ty| ty.dims).collect();
            assert_eq!(uploads, arguments, "attention_bias {attention_bias}, mlp_bias {mlp_bias}");
        }
    }
}
