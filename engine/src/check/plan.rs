//! What a job asks of a slice, before anything is compiled: the mesh, each device's share, the step programs and their
//! kernels, the bytes of HBM. Pure: numbers in, numbers out.

use std::num::NonZeroUsize;

use pagoda_ir::mosaic::tile_padded_bytes;
use pagoda_ir::{Element, TensorType};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::vmem::Bytes;

use super::launches::{Launch, launches};
use crate::error::{Error, Result};
use crate::llama::step::StepShape;
use crate::llama::{KvCache, Parallel, Target, weight_types};
use crate::mesh::Mesh;
use crate::model::ModelSpec;
use crate::sampler::Sampling;
use crate::scheduler::Limits;
use crate::topology::Topology;
use crate::units::SampleId;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Job {
    /// The model's shape.
    pub config: ModelSpec,
    /// Sizes of one engine.
    pub limits: Limits,
    /// Type of weights and activations.
    pub compute: Element,
    /// What the KV cache holds.
    pub kv_cache: KvCache,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// New tokens of a sample.
    pub max_new_tokens: usize,
    /// The samples, in the run's order.
    pub samples: Vec<Sample>,
    /// Rows of a prefill step as the config names them: steps have fewer where the prompts never fill them.
    pub prefill_asked: usize,
    /// Prompts that an engine is given at once; `None` for all.
    pub prompts_per_batch: Option<usize>,
    /// Whether prefill steps carry the sequences that decode.
    pub mixed_steps: bool,
    /// The slice.
    pub topology: Topology,
    /// HBM of a device, as the compiler counts it.
    pub hbm: Bytes,
}

/// A sample to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Which of the run.
    pub id: SampleId,
    /// Tokens of its prompt.
    pub prompt: usize,
}

impl Job {
    /// Tokens of the longest prompt.
    pub fn longest_prompt(&self) -> usize {
        self.samples.iter().map(|sample| sample.prompt).max().unwrap_or(1).max(1)
    }
}

/// One of the two programs of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Program {
    /// A packed chunk of prompts.
    Prefill,
    /// A row per slot, in a loop on the device.
    Decode,
}

impl Program {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Prefill, Self::Decode];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }

    /// Rows of a step.
    pub const fn rows(self, shape: &StepShape) -> usize {
        match self {
            Self::Prefill => shape.prefill_rows,
            Self::Decode => shape.slots,
        }
    }
}

/// Who chose the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// The config or a flag.
    Given,
    /// The smallest model axis whose share fits the memory of a device.
    Proposed,
}

/// A job on a mesh.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is asked.
    pub job: Job,
    /// Replicas, and devices of each.
    pub mesh: Mesh,
    /// Who chose it.
    pub chosen: Chosen,
    /// The slice that programs are compiled for: a host, or as many as a replica spans.
    pub group: Topology,
    /// The model as one device sees it.
    pub shard: ModelSpec,
    /// Sizes of the step programs.
    pub shape: StepShape,
    /// Kernels of a prefill step.
    pub prefill: Vec<Launch>,
    /// Kernels of a decode step.
    pub decode: Vec<Launch>,
    /// Bytes of a device that the plan knows of.
    pub memory: Memory,
}

/// What fills the HBM of a device, by the plan: temporaries and code only the compiler knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Weights and the rotary table.
    pub weights: Bytes,
    /// All KV pages.
    pub kv: Bytes,
    /// One page of every layer.
    pub page: Bytes,
}

impl Memory {
    fn of(config: &ModelSpec, shape: &StepShape) -> Self {
        let weights = weight_types(config, shape).iter().map(padded).sum();
        // The step programs pin it row-major, so that its rows fill whole registers.
        let kv = shape.kv_type(config);
        let kv = Bytes(tile_padded_bytes(kv.element, &kv.dims) as u64);
        Self { weights, kv, page: Bytes(kv.0 / shape.pages as u64) }
    }

    /// Both together.
    pub fn total(&self) -> Bytes {
        self.weights + self.kv
    }
}

/// Bytes of an array in HBM: its two minor dimensions in whole registers, except where a row is shorter than half of one
/// and the compiler packs it.
fn padded(ty: &TensorType) -> Bytes {
    match ty.dims[..] {
        [.., rows, lanes] if rows >= 8 => Bytes(
            (ty.dims[..ty.dims.len() - 2].iter().product::<usize>() * tile_padded_bytes(ty.element, &[rows, lanes]))
                as u64,
        ),
        _ => Bytes(ty.bytes() as u64),
    }
}

/// What a plan leaves free when it proposes a mesh: temporaries, code, and what the runtime keeps.
pub const RESERVE: f64 = 0.03;

impl Plan {
    /// Plans `job` on `mesh`, or on a proposed one.
    ///
    /// # Errors
    /// When the mesh has more devices than the slice, the model axis does not split the model, or a kernel cannot be
    /// planned.
    pub fn new(job: &Job, mesh: Option<Mesh>) -> Result<Self> {
        match mesh {
            Some(mesh) => Self::on(job, mesh, Chosen::Given),
            None => Self::on(job, Mesh::over(devices(job), propose(job))?, Chosen::Proposed),
        }
    }

    /// Plans `job` with this model axis, over all devices of the slice.
    ///
    /// # Errors
    /// As [`Plan::new`], and when the axis does not divide the devices.
    pub fn with_model_axis(job: &Job, model: NonZeroUsize) -> Result<Self> {
        Self::on(job, Mesh::over(devices(job), model)?, Chosen::Proposed)
    }

    /// Plans `job` on `mesh`.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn on(job: &Job, mesh: Mesh, chosen: Chosen) -> Result<Self> {
        if mesh.devices() > job.topology.devices() {
            let limit = format!("is more than the {} devices of {}", job.topology.devices(), job.topology.name());
            return Err(Error::setting("mesh", mesh, limit, "lower an axis, or use a larger slice"));
        }
        let model = mesh.model;
        let shape = shape(job, model);
        shape.parallel.check(&job.config)?;
        let shard = shape.parallel.shard_of(&job.config);
        let chip = job.topology.chip();
        let of = |program| launches(&job.config, &shape, chip, program);
        Ok(Self {
            mesh,
            chosen,
            group: job.topology.group(model.get()),
            prefill: of(Program::Prefill)?,
            decode: of(Program::Decode)?,
            memory: Memory::of(&job.config, &shape),
            job: job.clone(),
            shard,
            shape,
        })
    }

    /// Kernels of a step.
    pub fn launches(&self, program: Program) -> &[Launch] {
        match program {
            Program::Prefill => &self.prefill,
            Program::Decode => &self.decode,
        }
    }

    /// Whether a replica lies within one host.
    pub fn within_a_host(&self) -> bool {
        self.mesh.model.get() <= self.job.topology.devices_per_host()
    }

    /// Samples of each replica: contiguous prompts, as hosts share them; those with none left out.
    pub fn shares(&self) -> Vec<Vec<Sample>> {
        let replicas = self.mesh.data.get();
        let samples = &self.job.samples;
        let prompts = samples.iter().map(|sample| sample.id.index + 1).max().unwrap_or(0);
        // The replica whose range of prompts, `prompts * r / replicas` and on, holds this one.
        let replica_of = |prompt: usize| ((prompt + 1) * replicas - 1) / prompts.max(1);
        let mut shares = vec![Vec::new(); replicas];
        samples.iter().for_each(|&sample| shares[replica_of(sample.id.index)].push(sample));
        shares.retain(|share| !share.is_empty());
        shares
    }

    /// The largest number of pages that fits beside weights, `taken` (temporaries, code) and nothing else.
    pub fn most_pages(&self, taken: Bytes) -> usize {
        let free = self.job.hbm.saturating_sub(self.memory.weights).saturating_sub(taken);
        (free.0 / self.memory.page.0.max(1)) as usize
    }
}

fn devices(job: &Job) -> NonZeroUsize {
    NonZeroUsize::new(job.topology.devices()).expect("a slice has a chip")
}

/// Sizes of the step programs.
fn shape(job: &Job, model: NonZeroUsize) -> StepShape {
    let target = Target::Tpu(job.topology.chip());
    StepShape::of(&job.limits, job.compute, job.kv_cache, target, Parallel::group(model))
}

/// The model axes that a model can have on so many devices: they divide the devices and the query heads, and divide the KV
/// heads or repeat them.
pub fn model_axes(config: &ModelSpec, devices: usize) -> Vec<usize> {
    let splits = |model: &usize| {
        devices.is_multiple_of(*model)
            && NonZeroUsize::new(*model).is_some_and(|model| Parallel::group(model).check(config).is_ok())
    };
    (1..=config.q_heads.min(devices)).filter(splits).collect()
}

/// The smallest model axis whose share of the weights and all pages fit a device; the largest if none does, for the report
/// to say by how much it fails.
fn propose(job: &Job) -> NonZeroUsize {
    let axes = model_axes(&job.config, job.topology.devices());
    let room = Bytes((job.hbm.0 as f64 * (1.0 - RESERVE)) as u64);
    let fits = |&&model: &&usize| {
        NonZeroUsize::new(model).is_some_and(|model| Memory::of(&job.config, &shape(job, model)).total() <= room)
    };
    let model = axes.iter().find(fits).or(axes.last()).copied().and_then(NonZeroUsize::new);
    model.expect("one device divides everything")
}

/// The chip's name for HBM: what the compiler has of it is asked once, and this stands in where it cannot be.
pub fn data_sheet_hbm(chip: Chip) -> Bytes {
    chip.info().hbm
}
