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
use crate::llama::{Target, weight_types};
use crate::mesh::Mesh;
use crate::model::config::LlamaConfig;
use crate::scheduler::Limits;
use crate::topology::Topology;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Job {
    /// The model's shape.
    pub config: LlamaConfig,
    /// Sizes of one engine.
    pub limits: Limits,
    /// Type of weights, activations and KV.
    pub compute: Element,
    /// New tokens of a sample.
    pub max_new_tokens: usize,
    /// Tokens of each prompt, one entry per sample.
    pub prompts: Vec<usize>,
    /// The slice.
    pub topology: Topology,
    /// HBM of a device, as the compiler counts it.
    pub hbm: Bytes,
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
    pub shard: LlamaConfig,
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
    fn of(shard: &LlamaConfig, shape: &StepShape) -> Self {
        let weights = weight_types(shard, shape).iter().map(padded).sum();
        let kv = padded(&shape.kv_type(shard));
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
    /// Plans `job` on a mesh whose model axis is `model`, or on a proposed one.
    ///
    /// # Errors
    /// When the model axis divides neither the devices nor the heads, or a kernel cannot be planned.
    pub fn new(job: &Job, model: Option<NonZeroUsize>) -> Result<Self> {
        match model {
            Some(model) => Self::on(job, model, Chosen::Given),
            None => Self::on(job, propose(job)?, Chosen::Proposed),
        }
    }

    /// Plans `job` with this model axis.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn on(job: &Job, model: NonZeroUsize, chosen: Chosen) -> Result<Self> {
        let devices = NonZeroUsize::new(job.topology.devices()).expect("a slice has a chip");
        let mesh = Mesh::over(devices, model)?;
        let possible = model_axes(&job.config, devices.get());
        if !possible.contains(&model.get()) {
            let words: Vec<_> = possible.iter().map(ToString::to_string).collect();
            let LlamaConfig { q_heads, kv_heads, .. } = job.config;
            let limit = format!("does not split {q_heads} query and {kv_heads} KV heads");
            return Err(Error::setting("mesh model", model, limit, format!("use one of {}", words.join(", "))));
        }
        let shard = shard(&job.config, model);
        let shape = shape(job, model);
        let chip = job.topology.chip();
        let of = |program| launches(&shard, &shape, chip, program, model.get() > 1);
        Ok(Self {
            mesh,
            chosen,
            group: job.topology.group(model.get()),
            prefill: of(Program::Prefill)?,
            decode: of(Program::Decode)?,
            memory: Memory::of(&shard, &shape),
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

    /// Prompts of each replica, those with none left out.
    pub fn shares(&self) -> Vec<&[usize]> {
        let replicas = self.mesh.data.get();
        let prompts = &self.job.prompts;
        let shares = (0..replicas).map(|replica| {
            let start = |replica| prompts.len() * replica / replicas;
            &prompts[start(replica)..start(replica + 1)]
        });
        shares.filter(|share| !share.is_empty()).collect()
    }

    /// The largest number of pages that fits beside weights, `taken` (temporaries, code) and nothing else.
    pub fn most_pages(&self, taken: Bytes) -> usize {
        let free = self.job.hbm.saturating_sub(self.memory.weights).saturating_sub(taken);
        (free.0 / self.memory.page.0.max(1)) as usize
    }
}

/// Sizes of the step programs.
fn shape(job: &Job, model: NonZeroUsize) -> StepShape {
    let _ = model;
    let limits = &job.limits;
    StepShape {
        prefill_rows: limits.max_prefill_size,
        slots: limits.max_seqs,
        pages: limits.max_pages,
        page_size: limits.page_size.tokens(),
        pages_per_seq: limits.pages_per_seq(),
        max_positions: limits.max_seq_len,
        max_rounds: limits.max_rounds,
        compute: job.compute,
        target: Target::Tpu(job.topology.chip()),
    }
}

/// One device's share of the model.
fn shard(config: &LlamaConfig, model: NonZeroUsize) -> LlamaConfig {
    let share = |size: usize| size.div_ceil(model.get());
    let intermediate_size = match model.get() {
        1 => config.intermediate_size,
        _ => share(config.intermediate_size).next_multiple_of(128),
    };
    LlamaConfig {
        q_heads: share(config.q_heads),
        kv_heads: share(config.kv_heads),
        intermediate_size,
        vocab_size: share(config.vocab_size),
        ..config.clone()
    }
}

/// The model axes that a model can have on so many devices: they divide the devices and the query heads, and divide the KV
/// heads or repeat them.
pub fn model_axes(config: &LlamaConfig, devices: usize) -> Vec<usize> {
    let LlamaConfig { q_heads, kv_heads, intermediate_size, vocab_size, .. } = *config;
    let fits = |model: usize| {
        q_heads.is_multiple_of(model)
            && (kv_heads.is_multiple_of(model) || model.is_multiple_of(kv_heads))
            && devices.is_multiple_of(model)
            && model <= intermediate_size.min(vocab_size)
    };
    (1..=q_heads.min(devices)).filter(|&model| fits(model)).collect()
}

/// The smallest model axis whose share of the weights and all pages fit a device; the largest if none does, for the report
/// to say by how much it fails.
fn propose(job: &Job) -> Result<NonZeroUsize> {
    let axes = model_axes(&job.config, job.topology.devices());
    let room = Bytes((job.hbm.0 as f64 * (1.0 - RESERVE)) as u64);
    let fits = |&&model: &&usize| {
        NonZeroUsize::new(model)
            .is_some_and(|model| Memory::of(&shard(&job.config, model), &shape(job, model)).total() <= room)
    };
    let model = axes.iter().find(fits).or(axes.last()).copied().and_then(NonZeroUsize::new);
    Ok(model.expect("one device divides everything"))
}

/// The chip's name for HBM: what the compiler has of it is asked once, and this stands in where it cannot be.
pub fn data_sheet_hbm(chip: Chip) -> Bytes {
    chip.info().hbm
}
