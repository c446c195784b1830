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

use pagoda_ir::stablehlo::Module;
use pagoda_ir::{Context, Element, HostTensor, TensorType};

use crate::error::{Error, Result};
use crate::model::config::LlamaConfig;
use crate::model::weights::{Group, Groups, TensorSpec, Weights, tensor_groups};
use crate::pjrt::{Arg, Buffer, Client};
use step::StepShape;

/// A model's weights on a device, as the step programs take them.
pub struct DeviceModel {
    config: LlamaConfig,
    buffers: Vec<Buffer>,
}

impl DeviceModel {
    /// Uploads the weights that the step programs of `shape` take: in its type, layers apart or stacked, and a rotary table
    /// for its positions.
    ///
    /// Host memory holds one layer's part of an argument at a time beyond the device's own copy: each is converted (and
    /// where the program wants several projections as one matrix, put together), uploaded, and dropped. Stacks of layers
    /// are made on the device.
    ///
    /// # Errors
    /// When a tensor is missing or malformed, or the device is out of memory.
    pub fn load(client: &Client, config: &LlamaConfig, weights: &Weights, shape: &StepShape) -> Result<Self> {
        let load = |group: &Group| {
            let buffer = upload(client, weights, group, shape.compute)?;
            group.iter().for_each(|spec| weights.release(spec));
            Ok(buffer)
        };
        let mut buffers = Vec::new();
        for argument in arguments_of(&tensor_groups(config), shape.stacks_layers(config)) {
            buffers.push(match argument[..] {
                [group] => load(group)?,
                _ => stack(client, shape.compute, &argument, load)?,
            });
        }
        buffers.push(client.upload(&rotary::table(config, shape.max_positions), 0)?);
        Ok(Self { config: config.clone(), buffers })
    }

    /// The model's configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The leading arguments of every step program, in the order of [`weight_types`].
    pub fn weights(&self) -> &[Buffer] {
        &self.buffers
    }
}

/// The groups of tensors of which each weight argument is made, the rotary table apart: one, or with stacked layers one of
/// each layer.
fn arguments_of(groups: &Groups, stacked: bool) -> Vec<Vec<&Group>> {
    let layers = &groups.layers;
    let layers: Vec<Vec<&Group>> = match stacked {
        false => layers.iter().flatten().map(|group| vec![group]).collect(),
        true => (0..layers[0].len()).map(|at| layers.iter().map(|layer| &layer[at]).collect()).collect(),
    };
    let alone = |group| vec![group];
    std::iter::once(alone(&groups.embedding)).chain(layers).chain(groups.last.iter().map(alone)).collect()
}

/// Loads groups of equal sizes into one array `[groups, ...]` on the device, part by part: the host never holds the stack.
fn stack(
    client: &Client,
    compute: Element,
    groups: &[&Group],
    mut load: impl FnMut(&Group) -> Result<Buffer>,
) -> Result<Buffer> {
    let part = TensorType::new(compute, &stacked_dims(groups[0]));
    let whole = TensorType::new(compute, &[&[groups.len()], &part.dims[..]].concat());
    let context = Context::new();
    let empty = client.compile(zeros(&context, &whole)?.bytecode(), 1)?;
    let put = client.compile(put(&context, &whole, &part)?.bytecode(), 1)?;
    let only = |results: Vec<Buffer>| {
        let found = results.len();
        <[Buffer; 1]>::try_from(results)
            .map(|[buffer]| buffer)
            .map_err(|_| Error::runtime("stacking weights")(format!("a program returned {found} results instead of 1")))
    };
    let mut stack = only(empty.run(vec![])?)?;
    for (index, group) in groups.iter().enumerate() {
        let (part, index) = (load(group)?, client.upload(&HostTensor::scalar(index as i32), 0)?);
        stack = only(put.run(vec![Arg::Donate(stack), Arg::Donate(part), Arg::Donate(index)])?)?;
        // Uploads must not run ahead of the copies: each holds a part.
        stack.wait()?;
    }
    Ok(stack)
}

/// A program of no arguments that makes an array of zeros where it runs: the host never holds it.
pub(crate) fn zeros<'c>(context: &'c Context, array: &TensorType) -> pagoda_ir::Result<Module<'c>> {
    let module = Module::new(context, "zeros");
    module.function("main", &[], |b, _| Ok(vec![b.broadcast_to(b.scalar(array.element, 0.0)?, &array.dims)?]))?;
    Ok(module)
}

/// A program that puts a part into a stack, in place: stack (donated), part, index.
fn put<'c>(context: &'c Context, stack: &TensorType, part: &TensorType) -> pagoda_ir::Result<Module<'c>> {
    let module = Module::new(context, "put");
    let types = [stack.clone(), part.clone(), TensorType::scalar(Element::I32)];
    module.function("main", &types, |b, args| {
        let part = b.reshape(args[1], &[&[1], &part.dims[..]].concat())?;
        let zero = b.scalar(Element::I32, 0.0)?;
        let starts: Vec<_> = std::iter::once(args[2]).chain(stack.dims[1..].iter().map(|_| zero)).collect();
        Ok(vec![b.dynamic_update_slice(args[0], part, &starts)?])
    })?;
    module.donate("main", 0, 0)?;
    Ok(module)
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

    use pagoda_kernels::chips::Chip;

    use super::*;

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
        for bits in 0..16 {
            let [attention_bias, mlp_bias, tie_word_embeddings, stacked] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
            let config = LlamaConfig { attention_bias, mlp_bias, tie_word_embeddings, ..tiny.clone() };
            let shape =
                StepShape { target: if stacked { Target::Tpu(Chip::V5p) } else { shape.target }, ..shape.clone() };
            let groups = tensor_groups(&config);
            let uploads = arguments_of(&groups, stacked).into_iter().map(|argument| {
                let part = stacked_dims(argument[0]);
                assert!(argument.iter().all(|group| stacked_dims(group) == part));
                if argument.len() > 1 { [vec![argument.len()], part].concat() } else { part }
            });
            let table = rotary::table(&config, shape.max_positions).dims().to_vec();
            let uploads: Vec<_> = uploads.chain([table]).collect();
            let arguments: Vec<_> = weight_types(&config, &shape).into_iter().map(|ty| ty.dims).collect();
            assert_eq!(uploads, arguments, "attention_bias {attention_bias}, mlp_bias {mlp_bias}, stacked {stacked}");
        }
    }
}
