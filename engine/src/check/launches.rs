//! The Mosaic kernels of a step program on one device: which, planned how, and launched how often.
//!
//! Pure. It names the kernels that the lowering for a TPU emits; that both agree is checked against the compiler's own
//! report of the whole program.

use std::fmt;
use std::sync::Arc;

use pagoda_ir::{Context, Element};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::evidence::{self, Digest, Record};
use pagoda_kernels::grouped_matmul::{self, GroupedMatmul};
pub use pagoda_kernels::kernel::Work;
use pagoda_kernels::kernel::{Kernel, certified_module};
use pagoda_kernels::matmul::{self, Epilogue, Layout, Matmul};
use pagoda_kernels::plan::{Options, Plan};
use pagoda_kernels::random::Lengths;
use pagoda_kernels::rpa::{self, Kind, Rpa};
use pagoda_kernels::vmem::{Bytes, Spills, Verdict, VmemReport};

use super::plan::Program;
use crate::error::{Error, Result};
use crate::llama::step::{self, StepShape};
use crate::llama::{WINDOW_ATTENTION, attention_kernel, is_window_attention};
use crate::model::ModelSpec;
use crate::model::spec::{Experts, Gate, Mlp, SharedExpert};

/// A kernel of a step.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What it is for: `qkv`, `attention`, `head`.
    pub role: &'static str,
    /// How often a step launches it.
    pub count: usize,
    /// The kernel.
    pub plan: Arc<dyn Planned>,
    /// What its time depends on.
    pub time: Time,
}

/// What launches are for: the names of their operations in a program end in these (and in numbers).
pub const ROLES: [&str; 10] = [
    "qkv",
    "attention",
    WINDOW_ATTENTION,
    "output",
    "router",
    "gate_up",
    "down",
    "shared_gate_up",
    "shared_down",
    "head",
];

/// What the time of a launch depends on.
#[derive(Clone, Debug)]
pub enum Time {
    /// On nothing but its problem: so many cycles, by the planner's model.
    Fixed(f64),
    /// On how a router deals out the rows: so many cycles over these groups, which one that prefers no expert would make. Loops
    /// turn as often as there are chunks: a profile of it would take the compiler minutes.
    Groups(f64, Vec<Lengths>),
    /// On the sequences: it is linear in the [keys worked](keys_worked).
    Keys(Arc<Plan<Rpa>>),
}

/// A planned kernel of a step, of any kind.
pub trait Planned: fmt::Debug + Send + Sync {
    /// The kernel's name, tiles in it.
    fn name(&self) -> &str;
    /// Every VMEM buffer.
    fn vmem(&self) -> &VmemReport;
    /// The scoped limit.
    fn limit(&self) -> Bytes;
    /// What the records know of its spills.
    fn spills(&self) -> Spills;
    /// What it computes and moves at least.
    fn work(&self, batch: Option<&[Lengths]>) -> Work;
    /// The module that the compiler profiles: with the lengths of `batch` as constants, so that every loop has as many
    /// turns as in that batch.
    ///
    /// # Errors
    /// When the batch is not one of the kernel, or MLIR fails.
    fn module(&self, batch: Option<&[Lengths]>) -> Result<Vec<u8>>;
    /// Cycles on record for exactly this kernel: its body and its limit.
    fn recorded_cycles(&self) -> Option<u64>;

    /// Whether it fits, by the records.
    fn verdict(&self) -> Verdict;
}

impl<K: Kernel + fmt::Debug> Planned for Plan<K> {
    fn name(&self) -> &str {
        self.name()
    }

    fn vmem(&self) -> &VmemReport {
        self.vmem()
    }

    fn limit(&self) -> Bytes {
        self.limit()
    }

    fn spills(&self) -> Spills {
        evidence::spills(self)
    }

    fn verdict(&self) -> Verdict {
        self.verdict(evidence::spills(self))
    }

    fn work(&self, batch: Option<&[Lengths]>) -> Work {
        K::work(self.problem(), batch)
    }

    fn module(&self, batch: Option<&[Lengths]>) -> Result<Vec<u8>> {
        K::check_batch(self.problem(), batch)?;
        let context = Context::new();
        let kernel = K::kernel_of_batch(&context, self, batch)?;
        Ok(certified_module::<K>(&context, self, &kernel)?.bytecode().to_vec())
    }

    fn recorded_cycles(&self) -> Option<u64> {
        let alike = |record: &&Record<K>| {
            (record.chip, record.tiles, record.limit, &record.spec)
                == (self.chip(), self.tiles(), self.limit(), self.problem().spec())
        };
        let record = K::records()?.all().iter().find(alike)?;
        let digest = Digest::of(self).ok()?;
        record.cycles.filter(|_| record.digest == digest)
    }
}

/// The launches of `program` on one device, in the order of a step.
///
/// # Errors
/// When a kernel cannot be planned for the chip.
pub fn launches(config: &ModelSpec, shape: &StepShape, chip: Chip, program: Program) -> Result<Vec<Launch>> {
    let shard = &shape.parallel.shard_of(config);
    let split = shape.parallel.model().get() > 1;
    let compute = shape.compute;
    let rows = program.rows(shape);
    let (hidden, layers) = (shard.hidden_size, shard.layers.len());
    let heads = shard.q_heads * shard.head_dim;
    let stacked = heads + 2 * shard.kv_heads * shard.head_dim;
    let bias = |bias| Epilogue { bias, ..Epilogue::NONE };
    // Partial sums of a shard leave it in f32, and the residual is added once, behind the reduction.
    // Where what is added is normed first, so does a whole model's.
    let (partial, residual) = if split { (Element::F32, false) } else { (compute, !config.norms.after()) };
    let closing = |has_bias: bool| Epilogue { residual, ..bias(has_bias && !split) };
    let stack = if shape.stacks_layers(config) { layers } else { 1 };
    let quantized = |head: bool| {
        let quantization = config.quantization.filter(|quantization| !head || quantization.head)?;
        let (group, activations) = (quantization.group(), quantization.activations);
        Some(matmul::Quantized { weight: quantization.weight, group, activations })
    };
    let matmul = |role, count, [m, k, n]: [usize; 3], output, epilogue| {
        let spec = matmul::Spec {
            output,
            layout: Layout::WeightTransposed,
            epilogue,
            layers: if role == "head" { 1 } else { stack },
            quantized: quantized(role == "head"),
            ..matmul::Spec::new([m, k, n], compute)
        };
        let plan = plan::<Matmul>(role, spec, chip)?;
        let time = Time::Fixed(plan.estimate().cycles);
        Ok::<_, Error>(Launch { role, count, plan: Arc::new(plan), time })
    };
    let kind = if program == Program::Decode { Kind::Decode } else { Kind::Mixed };
    // Layers whose attention is the same kernel: those that differ in their ropes alone.
    let mut attention: Vec<(rpa::Problem, usize)> = Vec::new();
    for layer in &config.layers {
        let problem = attention_kernel(config, layer, shape, rows, kind);
        let problem = problem.map_err(|error| unplanned("attention", chip, &error))?;
        match attention.iter_mut().find(|(known, _)| *known == problem) {
            Some((_, count)) => *count += 1,
            None => attention.push((problem, 1)),
        }
    }
    let kernels = attention.len();
    let attention = attention.into_iter().map(|(problem, count)| {
        let role = if is_window_attention(&problem, kernels) { WINDOW_ATTENTION } else { "attention" };
        let plan = Arc::new(plan::<Rpa>(role, problem.spec().clone(), chip)?);
        Ok(Launch { role, count, plan: plan.clone(), time: Time::Keys(plan) })
    });
    let mut launches = vec![matmul("qkv", layers, [rows, hidden, stacked], compute, bias(shard.attention_bias))?];
    launches.extend(attention.collect::<Result<Vec<_>>>()?);
    launches.push(matmul("output", layers, [rows, heads, hidden], partial, closing(shard.output_bias))?);
    match shard.mlp {
        Mlp::Gated(mlp) => {
            let gate = Epilogue { activation: step::activation(mlp.gate), ..bias(mlp.bias) };
            launches.push(matmul("gate_up", layers, [rows, hidden, mlp.inner], compute, gate)?);
            launches.push(matmul("down", layers, [rows, mlp.inner, hidden], partial, closing(mlp.bias))?);
        }
        Mlp::Experts(Experts { count, chosen, inner, gate, bias: has_bias, shared, .. }) => {
            launches.push(matmul("router", layers, [rows, hidden, count], Element::F32, bias(has_bias))?);
            let grouped = |role, [k, n]: [usize; 2], output, activation, bias| {
                let spec = grouped_matmul::Spec {
                    output,
                    layout: grouped_matmul::Layout::WeightTransposed,
                    activation,
                    bias,
                    layers: stack,
                    ..grouped_matmul::Spec::new([rows * chosen, k, n], count, compute)
                };
                let plan = plan::<GroupedMatmul>(role, spec, chip)?;
                let groups = GroupedMatmul::spread(plan.problem()).pop().map(|(_, groups)| groups).unwrap_or_default();
                let time = Time::Groups(plan.details().estimate.cycles, groups);
                Ok::<_, Error>(Launch { role, count: layers, plan: Arc::new(plan), time })
            };
            launches.push(grouped("gate_up", [hidden, inner], compute, step::expert_activation(gate), has_bias)?);
            let identity = grouped_matmul::Activation::Identity;
            launches.push(grouped("down", [inner, hidden], Element::F32, identity, has_bias && !split)?);
            if let Some(SharedExpert { inner, .. }) = shared {
                let gate = Epilogue { activation: step::activation(Gate::Silu), ..Epilogue::NONE };
                launches.push(matmul("shared_gate_up", layers, [rows, hidden, inner], compute, gate)?);
                launches.push(matmul("shared_down", layers, [rows, inner, hidden], Element::F32, Epilogue::NONE)?);
            }
        }
    }
    launches.push(matmul("head", 1, [shape.slots, hidden, shard.vocab_size], Element::F32, Epilogue::NONE)?);
    Ok(launches)
}

fn plan<K: Kernel>(role: &str, spec: K::Spec, chip: Chip) -> Result<Plan<K>> {
    let problem = pagoda_kernels::Problem::new(spec).map_err(|error| unplanned(role, chip, &error))?;
    Plan::new(problem, chip, Options::default()).map_err(|error| unplanned(role, chip, &error))
}

/// A kernel that has no plan: what stands in the way names the setting.
fn unplanned(role: &str, chip: Chip, error: &dyn std::fmt::Display) -> Error {
    let limit = format!("has no plan on {chip}: {error}");
    Error::setting("kernel", role, limit, "change that size, or use another chip or mesh")
}

impl Launch {
    /// What the launch computes and moves at least: attention, over sequences of the lengths in `batch`.
    pub fn work(&self, batch: &[Lengths]) -> Work {
        self.plan.work(match &self.time {
            Time::Fixed(_) => None,
            Time::Groups(_, groups) => Some(groups),
            Time::Keys(_) => Some(batch),
        })
    }
}

/// Keys that the attention kernel works through for a batch, all query blocks together: its time is linear in them.
pub fn keys_worked(plan: &Plan<Rpa>, batch: &[Lengths]) -> f64 {
    let (queries, keys) = (plan.tiles().queries, plan.keys());
    let widths = plan.widths();
    let mut first_row = 0;
    let mut worked = 0;
    for &Lengths { q_len, kv_len } in batch {
        let stop = first_row + q_len;
        for block in first_row / queries..stop.div_ceil(queries) {
            // The last key that the block's last row of this sequence sees.
            let end = kv_len - (stop - ((block + 1) * queries).min(stop));
            worked += end / keys * keys;
            let rest = end % keys;
            worked += if rest == 0 { 0 } else { widths.iter().copied().find(|&width| rest <= width).unwrap_or(keys) };
        }
        first_row = stop;
    }
    worked as f64
}
