//! The Mosaic kernels of a step program on one device: which, planned how, and launched how often.
//!
//! Pure. It names the kernels that the lowering for a TPU emits; that both agree is checked against the compiler's own
//! report of the whole program.

use pagoda_ir::{Context, Element};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::evidence::{self, Digest, Record};
use pagoda_kernels::grouped_matmul::{self, GroupedMatmul};
use pagoda_kernels::kernel::Kernel;
pub use pagoda_kernels::kernel::Work;
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
use crate::model::spec::{Experts, Mlp};

/// A kernel of a step.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What it is for: `qkv`, `attention`, `head`.
    pub role: &'static str,
    /// How often a step launches it.
    pub count: usize,
    /// The kernel.
    pub plan: Planned,
}

/// What launches are for: the names of their operations in a program end in these (and in numbers).
pub const ROLES: [&str; 8] = ["qkv", "attention", WINDOW_ATTENTION, "output", "router", "gate_up", "down", "head"];

/// A planned kernel of a step.
#[derive(Clone, Debug)]
pub enum Planned {
    /// A projection.
    Matmul(Plan<Matmul>),
    /// Projections by experts.
    Experts(Plan<GroupedMatmul>),
    /// Attention over the KV pages.
    Attention(Plan<Rpa>),
}

/// Calls a method of either plan.
macro_rules! either {
    ($planned:expr, $plan:ident => $value:expr) => {
        match $planned {
            Planned::Matmul($plan) => $value,
            Planned::Experts($plan) => $value,
            Planned::Attention($plan) => $value,
        }
    };
}

impl Planned {
    /// The kernel's name, tiles in it.
    pub fn name(&self) -> &str {
        either!(self, plan => plan.name())
    }

    /// The problem in words.
    pub fn problem(&self) -> String {
        either!(self, plan => plan.describe())
    }

    /// Every VMEM buffer.
    pub fn vmem(&self) -> &VmemReport {
        either!(self, plan => plan.vmem())
    }

    /// The scoped limit.
    pub fn limit(&self) -> Bytes {
        either!(self, plan => plan.limit())
    }

    /// What the records know of its spills.
    pub fn spills(&self) -> Spills {
        either!(self, plan => evidence::spills(plan))
    }

    /// Whether it fits, by the records.
    pub fn verdict(&self) -> Verdict {
        either!(self, plan => plan.verdict(evidence::spills(plan)))
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
        Ok::<_, Error>(Launch { role, count, plan: Planned::Matmul(plan) })
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
        let plan = plan::<Rpa>(role, problem.spec().clone(), chip)?;
        Ok(Launch { role, count, plan: Planned::Attention(plan) })
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
        Mlp::Experts(Experts { count, chosen, inner, gate, bias: has_bias, .. }) => {
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
                Ok::<_, Error>(Launch { role, count: layers, plan: Planned::Experts(plan) })
            };
            launches.push(grouped("gate_up", [hidden, inner], compute, step::expert_activation(gate), has_bias)?);
            let identity = grouped_matmul::Activation::Identity;
            launches.push(grouped("down", [inner, hidden], Element::F32, identity, has_bias && !split)?);
        }
    }
    launches.push(matmul("head", 1, [shape.slots, hidden, shard.vocab_size], Element::F32, Epilogue::NONE)?);
    Ok(launches)
}

/// The groups that are expected.
fn typical(problem: &grouped_matmul::Problem) -> Option<Vec<Lengths>> {
    GroupedMatmul::spread(problem).pop().map(|(_, batch)| batch)
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
        match &self.plan {
            Planned::Matmul(plan) => Matmul::work(plan.problem(), None),
            // Rows as a router that prefers no expert deals them out.
            Planned::Experts(plan) => GroupedMatmul::work(plan.problem(), typical(plan.problem()).as_deref()),
            Planned::Attention(plan) => Rpa::work(plan.problem(), Some(batch)),
        }
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

/// The module of a kernel that the compiler profiles: attention with the lengths of `batch` as constants, so that every
/// loop has as many turns as in that batch.
///
/// # Errors
/// When the batch is not one of the kernel, or MLIR fails.
pub fn module(planned: &Planned, batch: &[Lengths]) -> Result<Vec<u8>> {
    let context = Context::new();
    match planned {
        Planned::Matmul(plan) => Ok(plan.module(&context)?.bytecode().to_vec()),
        Planned::Experts(plan) => {
            let kernel = GroupedMatmul::kernel_of_batch(&context, plan, typical(plan.problem()).as_deref())?;
            let module = pagoda_kernels::kernel::certified_module::<GroupedMatmul>(&context, plan, &kernel)?;
            Ok(module.bytecode().to_vec())
        }
        Planned::Attention(plan) => {
            Rpa::check_batch(plan.problem(), Some(batch))?;
            let kernel = Rpa::kernel_of_batch(&context, plan, Some(batch))?;
            let module = pagoda_kernels::kernel::certified_module::<Rpa>(&context, plan, &kernel)?;
            Ok(module.bytecode().to_vec())
        }
    }
}

/// Cycles on record for exactly this matmul: its body and its limit.
pub fn recorded_cycles(plan: &Plan<Matmul>) -> Option<u64> {
    let alike = |record: &&Record<Matmul>| {
        (record.chip, record.tiles, record.limit, &record.spec)
            == (plan.chip(), plan.tiles(), plan.limit(), plan.problem().spec())
    };
    let record = Matmul::records()?.all().iter().find(alike)?;
    let digest = Digest::of(plan).ok()?;
    record.cycles.filter(|_| record.digest == digest)
}
