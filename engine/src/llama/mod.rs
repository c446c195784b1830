//! Llama on a device: loading its weights, and the step programs that run it.
//!
//! [`step`] is the model's graph, `lowering` how its operations are emitted for a [`Target`]; `arguments`,
//! `sampling` and `rotary` are what the programs take.

mod arguments;
mod executor;
mod lowering;
pub mod parallel;
mod rotary;
mod sampling;
pub mod step;
mod target;

pub use arguments::weight_types;
pub use executor::{Call, Executor};
pub use parallel::{Group, Member, Parallel, Reduce};
pub use target::Target;

use pagoda_ir::{Element, HostTensor};

use crate::error::Result;
use crate::mesh::Shard;
use crate::model::config::LlamaConfig;
use crate::model::weights::{TensorSpec, Weights, tensor_groups};
use crate::pjrt::{Buffer, Client};

/// A model's weights on the devices of a group, as the step programs take them.
pub struct DeviceModel {
    config: LlamaConfig,
    compute: Element,
    positions: usize,
    group: Group,
    /// Per member of the group.
    buffers: Vec<Vec<Buffer>>,
}

impl DeviceModel {
    /// As [`load_group`](Self::load_group), of one device that holds the whole model.
    ///
    /// # Errors
    /// As there.
    pub fn load(
        client: &Client,
        config: &LlamaConfig,
        weights: &Weights,
        compute: Element,
        positions: usize,
    ) -> Result<Self> {
        Self::load_group(client, config, weights, compute, positions, Group::one())
    }

    /// Uploads to each member of `group` its shard of all weights in the type `compute`, and a rotary table for `positions`
    /// positions.
    ///
    /// Host memory holds one argument of one shard's program at a time beyond the devices' own copies: each is converted
    /// (and where the program wants several projections as one matrix, stacked), uploaded, and dropped.
    ///
    /// # Errors
    /// When the model cannot be split like this, a tensor is missing or malformed, or a device is out of memory.
    pub fn load_group(
        client: &Client,
        config: &LlamaConfig,
        weights: &Weights,
        compute: Element,
        positions: usize,
        group: Group,
    ) -> Result<Self> {
        group.parallel().check(config)?;
        let mut buffers: Vec<Vec<Buffer>> = group.members().iter().map(|_| Vec::new()).collect();
        for tensors in tensor_groups(config) {
            for (member, buffers) in group.members().iter().zip(&mut buffers) {
                buffers.push(upload(client, weights, &tensors, *member, compute)?);
            }
            for spec in &tensors {
                weights.release(spec);
            }
        }
        let rotary = rotary::table(config, positions);
        for (Member { shard, device }, buffers) in group.members().iter().zip(&mut buffers) {
            buffers.push(client.upload(&rotary, *device)?);
            if shard.of.get() > 1 {
                buffers.push(client.upload(&HostTensor::scalar(shard.index as i32), *device)?);
            }
        }
        Ok(Self { config: config.clone(), compute, positions, group, buffers })
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

    /// The devices that hold it.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// The leading arguments of every step program on each member of the group, in the order of [`weight_types`].
    pub fn weights(&self) -> &[Vec<Buffer>] {
        &self.buffers
    }
}

/// The shape of a shard's parts of tensors of equal width (or vectors), one below the other.
fn stacked_dims(tensors: &[TensorSpec], shard: Shard) -> Vec<usize> {
    let mut dims = tensors[0].dims_of(shard);
    dims[0] = tensors.iter().map(|spec| spec.dims_of(shard)[0]).sum();
    dims
}

/// Uploads a member's parts of tensors as one.
fn upload(
    client: &Client,
    weights: &Weights,
    tensors: &[TensorSpec],
    Member { shard, device }: Member,
    compute: Element,
) -> Result<Buffer> {
    let dims = stacked_dims(tensors, shard);
    if let [spec] = tensors {
        let data = weights.load(spec, shard, compute)?;
        return Ok(client.upload_bytes(compute, &dims, data.bytes(), device)?);
    }
    let mut stacked = HostTensor::zeros(compute, &dims);
    let mut rest = stacked.bytes_mut();
    for spec in tensors {
        let data = weights.load(spec, shard, compute)?;
        let (part, after) = rest.split_at_mut(data.bytes().len());
        part.copy_from_slice(data.bytes());
        rest = after;
    }
    Ok(client.upload(&stacked, device)?)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::path::Path;

    use super::*;
    use crate::llama::step::StepShape;

    /// What is uploaded is what the programs take, in their order.
    #[test]
    fn uploads_have_the_types_of_the_arguments() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-llama-kjv");
        let tiny = LlamaConfig::open(&folder).unwrap();
        let shape = |model| StepShape {
            prefill_rows: 8,
            slots: 2,
            pages: 4,
            page_size: 16,
            pages_per_seq: 2,
            max_positions: 32,
            max_rounds: 1,
            compute: Element::Bf16,
            target: Target::Portable,
            parallel: Parallel::group(model),
        };
        for (bits, model) in (0..8).flat_map(|bits| [1, 2, 4].map(|model| (bits, model))) {
            let [attention_bias, mlp_bias, tie_word_embeddings] = [1, 2, 4].map(|bit| bits & bit != 0);
            let config = LlamaConfig { attention_bias, mlp_bias, tie_word_embeddings, ..tiny.clone() };
            let shape = shape(NonZeroUsize::new(model).unwrap());
            let arguments: Vec<_> = weight_types(&config, &shape).into_iter().map(|ty| ty.dims).collect();
            for shard in Shard::all(shape.parallel.model()) {
                let groups = tensor_groups(&config);
                let mut uploads: Vec<_> = groups.iter().map(|group| stacked_dims(group, shard)).collect();
                uploads.push(rotary::table(&config, shape.max_positions).dims().to_vec());
                uploads.extend((model > 1).then(Vec::new));
                assert_eq!(uploads, arguments, "attention_bias {attention_bias}, mlp_bias {mlp_bias}, {shard:?}");
            }
        }
    }
}
