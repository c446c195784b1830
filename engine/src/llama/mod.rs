//! A decoder on a device: loading its weights, and the step programs that run it.
//!
//! [`step`] is the model's graph, `lowering` how its operations are emitted for a [`Target`]; `arguments`,
//! `sampling` and `rotary` are what the programs take.

mod arguments;
mod executor;
mod kv_cache;
mod lowering;
pub mod parallel;
mod rotary;
mod sampling;
pub mod step;
mod target;

pub use arguments::weight_types;
pub use executor::{Call, Executor, Sampled};
pub use kv_cache::KvCache;
pub(crate) use lowering::{WINDOW_ATTENTION, attention_kernel, is_window_attention};
pub use parallel::{Group, Member, Parallel, Reduce};
pub use target::Target;

use pagoda_ir::stablehlo::Module;
use pagoda_ir::{Context, Element, HostTensor, TensorType};

use crate::error::{Error, Result};
use crate::mesh::Shard;
use crate::model::ModelSpec;
use crate::model::weights::{Holds, TensorGroups, TensorSpec, Tensors, Weights, tensor_groups};
use crate::pjrt::{Arg, Buffer, Client, Executable};
use executor::zeros;
use step::StepShape;

/// The type of a model's matrices on the device: `compute`, or bf16 beside f32 where the files hold them so and the target's
/// kernels take it. Then no value changes, and a step that waits for its weights waits for half the bytes.
pub fn matrices(config: &ModelSpec, weights: &Weights, compute: Element, target: Target) -> Element {
    let narrowest = lowering::narrowest(config, compute, target);
    if narrowest == compute || weights.matrices_fit(config, narrowest) { narrowest } else { compute }
}

/// A model's weights on the devices of a group, as the step programs take them.
pub struct DeviceModel {
    config: ModelSpec,
    group: Group,
    /// Per member of the group.
    buffers: Vec<Vec<Buffer>>,
}

impl DeviceModel {
    /// As [`load_group`](Self::load_group), of one device that holds the whole model.
    ///
    /// # Errors
    /// As there.
    pub fn load(client: &Client, config: &ModelSpec, weights: &Weights, shape: &StepShape) -> Result<Self> {
        Self::load_group(client, config, weights, shape, Group::one())
    }

    /// Uploads to each member of `group` its shard of the weights that the step programs of `shape` take: in its type,
    /// layers apart or stacked, and rotary tables for its positions.
    ///
    /// Host memory holds one layer's part of an argument of one shard at a time beyond the devices' own copies: each is
    /// converted (and where the program wants several projections as one matrix, put together), uploaded, and dropped.
    /// Stacks of layers are made on the device.
    ///
    /// # Errors
    /// When the model cannot be split like this, a tensor is missing or malformed, or a device is out of memory.
    pub fn load_group(
        client: &Client,
        config: &ModelSpec,
        weights: &Weights,
        shape: &StepShape,
        group: Group,
    ) -> Result<Self> {
        group.parallel().check(config)?;
        let mut buffers: Vec<Vec<Buffer>> = group.members().iter().map(|_| Vec::new()).collect();
        for argument in arguments_of(&tensor_groups(config), shape.stacks_layers(config)) {
            let stacks = group.members().iter().map(|&Member { shard, device }| match argument[..] {
                [_] => Ok(None),
                _ => Stack::new(client, argument.len(), &argument_type(argument[0], shard, shape), device).map(Some),
            });
            let mut stacks = stacks.collect::<Result<Vec<_>>>()?;
            for (layer, tensors) in argument.iter().enumerate() {
                for ((member, stack), buffers) in group.members().iter().zip(&mut stacks).zip(&mut buffers) {
                    let part = upload(client, weights, tensors, *member, shape)?;
                    match stack.take() {
                        None => buffers.push(part),
                        Some(filled) => *stack = Some(filled.put(client, part, layer)?),
                    }
                }
                tensors.iter().for_each(|spec| weights.release(spec));
            }
            for (stack, buffers) in stacks.into_iter().zip(&mut buffers) {
                buffers.extend(stack.map(|stack| stack.whole));
            }
        }
        let rotary = rotary::tables(config, shape.max_positions);
        for (Member { shard, device }, buffers) in group.members().iter().zip(&mut buffers) {
            for table in &rotary {
                buffers.push(client.upload(table, *device)?);
            }
            if shard.of.get() > 1 {
                buffers.push(client.upload(&HostTensor::scalar(shard.index as i32), *device)?);
            }
        }
        if shape.target == Target::Host {
            buffers.iter_mut().flatten().try_for_each(Buffer::stay)?;
        }
        Ok(Self { config: config.clone(), group, buffers })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelSpec {
        &self.config
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

/// The tensors of which each weight argument is made, the rotary table apart: those of one layer, or with stacked layers of
/// each.
fn arguments_of(groups: &TensorGroups, stacked: bool) -> Vec<Vec<&Tensors>> {
    let layers = &groups.layers;
    let layers: Vec<Vec<&Tensors>> = match stacked {
        false => layers.iter().flatten().map(|tensors| vec![tensors]).collect(),
        true => (0..layers[0].len()).map(|at| layers.iter().map(|layer| &layer[at]).collect()).collect(),
    };
    let alone = |tensors| vec![tensors];
    std::iter::once(alone(&groups.embedding)).chain(layers).chain(groups.last.iter().map(alone)).collect()
}

/// An array `[layers, ...]` on a device, filled part by part: the host never holds it.
struct Stack {
    whole: Buffer,
    put: Executable,
    device: usize,
}

impl Stack {
    fn new(client: &Client, layers: usize, part: &TensorType, device: usize) -> Result<Self> {
        let whole = TensorType::new(part.element, &[&[layers], &part.dims[..]].concat());
        let context = Context::new();
        let (empty, put) = (zeros(&context, &whole, 1)?, put(&context, &whole, part)?);
        // As the step programs have them.
        if step::is_stack(&whole) {
            empty.row_major_result("main", 0)?;
            put.row_major_argument("main", 0)?;
            put.row_major_result("main", 0)?;
        }
        let empty = client.compile_on(empty.bytecode(), &[device])?;
        let put = client.compile_on(put.bytecode(), &[device])?;
        Ok(Self { whole: only(empty.run(vec![])?)?, put, device })
    }

    /// With the part of a layer put in.
    fn put(self, client: &Client, part: Buffer, layer: usize) -> Result<Self> {
        let layer = client.upload(&HostTensor::scalar(layer as i32), self.device)?;
        let whole = only(self.put.run(vec![Arg::Donate(self.whole), Arg::Donate(part), Arg::Donate(layer)])?)?;
        // Uploads must not run ahead of the copies: each holds a part.
        whole.wait()?;
        Ok(Self { whole, ..self })
    }
}

/// The only result of a program.
fn only(mut results: Vec<Buffer>) -> Result<Buffer> {
    results.pop().ok_or_else(|| Error::runtime("stacking weights")("a program returned nothing"))
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

/// The argument that a shard's parts of tensors of equal width (or vectors) make, one below the other; scales lie as
/// activations do.
fn argument_type(tensors: &[TensorSpec], shard: Shard, shape: &StepShape) -> TensorType {
    let mut dims = tensors[0].dims_of(shard);
    dims[0] = tensors.iter().map(|spec| spec.dims_of(shard)[0]).sum();
    if is_turned(&tensors[0], shape) {
        dims.reverse();
    }
    TensorType::new(tensors[0].element(shape.compute, shape.matrices), &dims)
}

/// Whether the programs take `[groups, out]` of what files hold as `[out, groups]`.
fn is_turned(spec: &TensorSpec, shape: &StepShape) -> bool {
    spec.holds == Holds::Scales && shape.target.is_row_major()
}

/// Uploads a member's parts of tensors as one.
fn upload(
    client: &Client,
    weights: &Weights,
    tensors: &[TensorSpec],
    Member { shard, device }: Member,
    shape: &StepShape,
) -> Result<Buffer> {
    let TensorType { element, dims } = argument_type(tensors, shard, shape);
    let load = |spec| weights.load(spec, shard, element);
    if let [spec] = tensors
        && !is_turned(spec, shape)
    {
        return Ok(client.upload_bytes(element, &dims, load(spec)?.bytes(), device)?);
    }
    let mut stacked = HostTensor::zeros(element, &dims);
    let mut rest = stacked.bytes_mut();
    for spec in tensors {
        let data = load(spec)?;
        let (part, after) = rest.split_at_mut(data.bytes().len());
        part.copy_from_slice(data.bytes());
        rest = after;
    }
    if is_turned(&tensors[0], shape) {
        let (groups, rows) = (dims[0], dims[1]);
        let values = stacked.as_slice::<f32>();
        let turned: Vec<f32> = (0..groups * rows).map(|at| values[at % rows * groups + at / rows]).collect();
        stacked = HostTensor::new(&dims, &turned);
    }
    Ok(client.upload(&stacked, device)?)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::path::Path;

    use pagoda_kernels::chips::Chip;

    use super::*;
    use crate::model::quantization::{Quantization, Scales};
    use crate::model::spec::{GatedMlp, Mlp};

    /// Where the kernels widen them, and the files hold no more.
    #[test]
    fn matrices_are_as_narrow_as_files_and_kernels_allow() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-llama-kjv");
        let (config, weights) = (ModelSpec::open(&folder).unwrap(), Weights::open(&folder).unwrap());
        let (f32, bf16) = (Element::F32, Element::Bf16);
        assert!(weights.matrices_fit(&config, bf16) && !weights.matrices_fit(&config, f32));
        for (target, compute, expected) in [
            (Target::Host, f32, bf16),
            (Target::Host, bf16, bf16),
            (Target::Portable, f32, f32),
            (Target::Tpu(Chip::V5p), f32, f32),
        ] {
            assert_eq!(matrices(&config, &weights, compute, target), expected, "{compute} on {target}");
        }
        // XLA's own product of a gate with biases takes one type.
        let Mlp::Gated(mlp) = config.mlp else { panic!("a Llama") };
        let biased = ModelSpec { mlp: Mlp::Gated(GatedMlp { bias: true, ..mlp }), ..config };
        assert_eq!(matrices(&biased, &weights, f32, Target::Host), f32);
    }

    /// What is uploaded is what the programs take, in their order.
    #[test]
    fn uploads_have_the_types_of_the_arguments() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-llama-kjv");
        let tiny = ModelSpec::open(&folder).unwrap();
        let Mlp::Gated(mlp) = tiny.mlp else { panic!("a Llama") };
        let shape = |model| StepShape {
            prefill_rows: 8,
            slots: 2,
            pages: 4,
            page_size: 16,
            pages_per_seq: 2,
            max_positions: 32,
            max_rounds: 1,
            compute: Element::F32,
            matrices: Element::Bf16,
            kv_cache: KvCache::of(Element::Bf16),
            target: Target::Portable,
            parallel: Parallel::group(model),
        };
        let quantized = |scales| Quantization { weight: Element::I8, scales, activations: false, head: true };
        let quantizations = [None, Some(quantized(Scales::Channel)), Some(quantized(Scales::Group(32)))];
        for (bits, model) in (0..48).flat_map(|bits| [1, 2, 4].map(|model| (bits, model))) {
            let quantization = quantizations[bits / 16];
            let [attention_bias, mlp_bias, tie_word_embeddings, stacked] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
            let config = ModelSpec {
                attention_bias,
                output_bias: attention_bias,
                mlp: Mlp::Gated(GatedMlp { bias: mlp_bias, ..mlp }),
                tie_word_embeddings,
                quantization,
                ..tiny.clone()
            };
            let target = if stacked { Target::Tpu(Chip::V5p) } else { Target::Portable };
            let shape = StepShape { target, ..shape(NonZeroUsize::new(model).unwrap()) };
            let arguments = weight_types(&config, &shape);
            for shard in Shard::all(shape.parallel.model()) {
                let groups = tensor_groups(&config);
                let uploads = arguments_of(&groups, stacked).into_iter().map(|argument| {
                    let TensorType { element, dims } = argument_type(argument[0], shard, &shape);
                    assert!(argument.iter().all(|tensors| argument_type(tensors, shard, &shape).dims == dims));
                    let stacked = if argument.len() > 1 { vec![argument.len()] } else { vec![] };
                    TensorType::new(element, &[stacked, dims].concat())
                });
                let tables = rotary::tables(&config, shape.max_positions);
                let tables = tables.iter().map(|table| TensorType::new(Element::F32, table.dims()));
                let number = (model > 1).then(|| TensorType::scalar(Element::I32));
                let uploads: Vec<_> = uploads.chain(tables).chain(number).collect();
                assert_eq!(uploads, arguments, "{config:?}, stacked {stacked}, {shard:?}");
            }
        }
    }
}
