//! How long steps and the whole job take, estimated: kernels by their cycles, times how often they are launched, beside the
//! time that HBM needs for the bytes; the larger of both counts. Then the scheduler itself runs this prompt list on a
//! device that only counts time.
//!
//! Pure. Where a kernel's cycles come from is said with them ([`Source`]). What the compiler's figures leave out (contention
//! of DMAs, launch gaps between programs, the host) makes an estimate a bound from below rather than a promise: nothing of
//! it was run on a TPU.

use std::collections::BTreeMap;

use pagoda_kernels::random::Lengths;
use pagoda_kernels::rpa::Rpa;
use serde::{Deserialize, Serialize};

use super::launches::{Launch, Time, keys_worked};
use super::plan::{Plan, Program, Sample};
use crate::error::Result;
use crate::model::spec::QkNorm;
use crate::sampler::Sampling;
use crate::scheduler::{Request, Scheduler, Step, batches};
use crate::stop::StopRule;
use crate::units::SampleId;

/// Where a figure comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The compiler's static profile of this very kernel, asked now or by an earlier check.
    Profile,
    /// The same, from the table that Pagoda ships.
    Record,
    /// The planner's model.
    Model,
}

impl Source {
    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Profile => "compiler's profile",
            Self::Record => "compiler's profile, on record",
            Self::Model => "planner's model",
        }
    }
}

/// Cycles of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cycles {
    /// The part that no batch changes.
    pub fixed: f64,
    /// The part for each key that attention works through.
    pub per_key: f64,
    /// Where they come from.
    pub source: Source,
}

impl Cycles {
    /// A launch that takes as long whatever the batch is.
    pub const fn constant(fixed: f64, source: Source) -> Self {
        Self { fixed, per_key: 0.0, source }
    }

    /// A straight line through two profiles: keys worked, and cycles. What is measured twice at one length has no slope.
    pub fn line([(x0, y0), (x1, y1)]: [(f64, f64); 2], source: Source) -> Self {
        let per_key = if x1 > x0 { ((y1 - y0) / (x1 - x0)).max(0.0) } else { 0.0 };
        Self { fixed: (y1 - per_key * x1).max(0.0), per_key, source }
    }
}

/// Cycles of every launch of both programs, in the order of [`Plan::launches`].
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// Of the prefill program.
    pub prefill: Vec<Cycles>,
    /// Of the decode program.
    pub decode: Vec<Cycles>,
    /// What the shards exchange; `None` on one device.
    pub exchange: Option<Exchange>,
}

/// Cycles of what the shards of a replica exchange.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exchange {
    /// One sum of a prefill step's rows.
    pub prefill_sum: Cycles,
    /// One sum of a decode step's rows.
    pub decode_sum: Cycles,
    /// What is gathered to choose the tokens of a step.
    pub gather: Cycles,
}

impl Exchange {
    /// One sum of a step.
    pub fn sum(&self, program: Program) -> Cycles {
        match program {
            Program::Prefill => self.prefill_sum,
            Program::Decode => self.decode_sum,
        }
    }
}

impl Costs {
    fn of(&self, program: Program) -> &[Cycles] {
        match program {
            Program::Prefill => &self.prefill,
            Program::Decode => &self.decode,
        }
    }

    /// What the planner's model says, of every launch.
    pub fn modelled(plan: &Plan) -> Self {
        let of = |program| plan.launches(program).iter().map(|launch| modelled(plan, launch)).collect();
        let model = |rows, features| Cycles::constant(modelled_exchange(plan, rows * features), Source::Model);
        let sum = |program: Program| model(program.rows(&plan.shape), plan.shard.hidden_size);
        Self {
            prefill: of(Program::Prefill),
            decode: of(Program::Decode),
            exchange: (plan.mesh.model.get() > 1).then(|| Exchange {
                prefill_sum: sum(Program::Prefill),
                decode_sum: sum(Program::Decode),
                gather: model(plan.shape.slots, plan.job.config.vocab_size),
            }),
        }
    }
}

/// How far the compiler's figures of a job stand from the planner's model of it, launch by launch. They carry over to the
/// same job, changed: so alternatives are compared with the very time that the job is said to take.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Calibration {
    /// By program and role: of what no batch changes, and of each key.
    launches: Vec<((Program, &'static str), [f64; 2])>,
    /// A prefill step's sum, a decode step's, a gather.
    exchange: Option<[f64; 3]>,
}

impl Calibration {
    /// From what the launches of `plan` cost. Where the model is all that is known, nothing changes.
    pub fn new(plan: &Plan, costs: &Costs) -> Self {
        let modelled = Costs::modelled(plan);
        let factor = |of: f64, model: f64| if of > 0.0 && model > 0.0 { of / model } else { 1.0 };
        let launches = Program::ALL.into_iter().flat_map(|program| {
            let both = costs.of(program).iter().zip(modelled.of(program)).zip(plan.launches(program));
            let factors = both.map(|((of, model), launch)| {
                let factors = [factor(of.fixed, model.fixed), factor(of.per_key, model.per_key)];
                ((program, launch.role), factors)
            });
            factors.collect::<Vec<_>>()
        });
        let cycles = |of: Exchange| [of.prefill_sum, of.decode_sum, of.gather].map(|cycles| cycles.fixed);
        let exchange = costs.exchange.zip(modelled.exchange).map(|(of, model)| {
            let (of, model) = (cycles(of), cycles(model));
            std::array::from_fn(|at| factor(of[at], model[at]))
        });
        Self { launches: launches.collect(), exchange }
    }

    /// Whether anything is known beyond the model.
    pub fn is_of_the_compiler(&self) -> bool {
        let launches = self.launches.iter().flat_map(|(_, factors)| factors);
        launches.chain(self.exchange.iter().flatten()).any(|&factor| factor != 1.0)
    }

    /// The costs of a changed plan.
    pub fn costs(&self, plan: &Plan) -> Costs {
        let mut costs = Costs::modelled(plan);
        for program in Program::ALL {
            let cycles = match program {
                Program::Prefill => &mut costs.prefill,
                Program::Decode => &mut costs.decode,
            };
            for (cycles, launch) in cycles.iter_mut().zip(plan.launches(program)) {
                let known = self.launches.iter().find(|(key, _)| *key == (program, launch.role));
                if let Some((_, [fixed, per_key])) = known {
                    cycles.fixed *= fixed;
                    cycles.per_key *= per_key;
                }
            }
        }
        if let (Some(exchange), Some([prefill, decode, gather])) = (&mut costs.exchange, self.exchange) {
            exchange.prefill_sum.fixed *= prefill;
            exchange.decode_sum.fixed *= decode;
            exchange.gather.fixed *= gather;
        }
        costs
    }
}

/// How far kernels of attention stand above their roofline, where nothing better is known: where both cores of a device share
/// the heads, where one of two works, and on devices of one core. Profiled on v5p (decode at 4110 tokens: 1.21 of 8 KV heads,
/// 2.8 of 2) and v6e.
fn above_roofline(plan: &pagoda_kernels::plan::Plan<Rpa>, cores: usize) -> f64 {
    match cores {
        1 => 2.0,
        _ if plan.head_block() < plan.problem().kv_heads => 1.25,
        _ => 2.8,
    }
}

/// Cycles that a launch of attention takes with nothing to do.
const EMPTY_ATTENTION: f64 = 2000.0;

/// The planner's model of a launch.
pub fn modelled(plan: &Plan, launch: &Launch) -> Cycles {
    match &launch.time {
        Time::Fixed(cycles) | Time::Groups(cycles, _) => Cycles::constant(*cycles, Source::Model),
        Time::Keys(attention) => {
            let (chip, problem) = (plan.job.topology.chip().info(), attention.problem());
            let layout = problem.kv_layout();
            let bytes = (layout.token_elements() * problem.precision.kv.bytes()) as f64 / chip.hbm_bytes_per_cycle();
            // A key of a block of query rows: two products of the block's rows with it.
            let rows = attention.rows().max(1) as f64;
            let flops = 4.0 * rows * (problem.kv_heads * problem.head_dim) as f64 / chip.peak_flop_per_cycle();
            let per_key = above_roofline(attention, chip.cores) * bytes.max(flops);
            Cycles { fixed: EMPTY_ATTENTION, per_key, source: Source::Model }
        }
    }
}

/// Latency of a sum over four chips of a host, in cycles, and the share of a chip's links that it uses: fitted to libtpu
/// 0.0.52's static estimates for v5p (4096 columns in bf16: 5555 cycles for 8 rows, 96208 for 1024; over a slice of hosts
/// 19658 and 441533).
const REDUCE_LATENCY: [f64; 2] = [4800.0, 16300.0];
const REDUCE_LINK_SHARE: [f64; 2] = [0.2, 0.044];

/// A model of one exchange of so many f32 between the shards.
fn modelled_exchange(plan: &Plan, elements: usize) -> f64 {
    let at = usize::from(!plan.within_a_host());
    let shards = plan.mesh.model.get() as f64;
    let bytes = (elements * 4) as f64 * 2.0 * (shards - 1.0) / shards;
    let links = plan.job.topology.links().ici.0 * REDUCE_LINK_SHARE[at] / plan.job.topology.chip().info().clock.0;
    REDUCE_LATENCY[at] + bytes / links
}

/// Cycles of a layer outside of its kernels: norms, and what little is copied. Profiled on v5p over 8 rows of 4096 features
/// (6,050 cycles), 93 (5,500 beside 3,600 for rows of padding) and 1024 (about 22,000); of two layers less those of one.
fn around_layer(plan: &Plan, rows: usize) -> f64 {
    5_500.0 + 16.0 * rows as f64 * plan.shard.hidden_size as f64 / 4096.0
}

/// Cycles of a step outside of its layers and kernels: the rows' embeddings and angles are looked up, and tokens are chosen. A
/// random choice goes through the logits some twenty times, the largest is found in two. Profiled on v5p over 8 rows of
/// 128,256 logits (49,000 cycles; greedy, 16,000) and over 1024 rows of angles (24,800).
fn around_step(plan: &Plan, rows: usize) -> f64 {
    let per_logit = if plan.job.sampling == Sampling::Greedy { 0.003 } else { 0.035 };
    12_500.0 + 20.0 * rows as f64 + per_logit * (plan.shape.slots * plan.job.config.vocab_size) as f64
}

/// What a step does outside of its kernels.
pub const AROUND: &str = "around the kernels";
/// Sums over the shards.
pub const ALL_REDUCE: &str = "all-reduce";
/// What the shards tell each other to choose tokens.
pub const GATHER: &str = "gather of logits";

/// The time of one step, by what it goes into.
#[derive(Clone, Debug, PartialEq)]
pub struct StepTime {
    /// What takes cycles, a step's launches of it together: seconds.
    pub parts: Vec<(&'static str, f64)>,
    /// What HBM needs for the step's bytes: weights once, the pages that are read, queries and results.
    pub memory: f64,
    /// Bytes of it.
    pub bytes: f64,
}

impl StepTime {
    /// All parts together.
    pub fn compute(&self) -> f64 {
        self.parts.iter().map(|(_, seconds)| seconds).sum()
    }

    /// The larger of both.
    pub fn seconds(&self) -> f64 {
        self.compute().max(self.memory)
    }
}

/// Sums over the shards of a step: behind the lookup of embeddings, and in each layer behind the attention's output and
/// behind the MLP, and where queries and keys are normed whole, before attention.
pub fn sums(plan: &Plan) -> usize {
    let of_layer = if plan.shard.qk_norm == Some(QkNorm::Projection) { 3 } else { 2 };
    of_layer * plan.shard.layers.len() + 1
}

/// The time of a step of `program` over sequences of these lengths.
pub fn step_time(plan: &Plan, costs: &Costs, program: Program, batch: &[Lengths]) -> StepTime {
    let chip = plan.job.topology.chip().info();
    let mut parts = Vec::new();
    let mut bytes = 0.0;
    for (launch, cycles) in plan.launches(program).iter().zip(costs.of(program)) {
        let keys = match &launch.time {
            Time::Keys(attention) if cycles.per_key > 0.0 => keys_worked(attention, batch),
            _ => 0.0,
        };
        let count = launch.count as f64;
        parts.push((launch.role, count * (cycles.fixed + cycles.per_key * keys) / chip.clock.0));
        bytes += count * launch.work(batch).bytes;
    }
    let rows = program.rows(&plan.shape);
    let around = plan.shard.layers.len() as f64 * around_layer(plan, rows) + around_step(plan, rows);
    parts.push((AROUND, around / chip.clock.0));
    if let Some(exchange) = costs.exchange {
        parts.push((ALL_REDUCE, sums(plan) as f64 * exchange.sum(program).fixed / chip.clock.0));
        parts.push((GATHER, exchange.gather.fixed / chip.clock.0));
    }
    StepTime { parts, memory: bytes / chip.hbm_bandwidth.0, bytes }
}

/// What one engine does with its prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Simulation {
    /// Seconds of all steps.
    pub seconds: f64,
    /// Of which prefill.
    pub prefill_seconds: f64,
    /// Prefill calls.
    pub prefill_calls: usize,
    /// Decode calls.
    pub decode_calls: usize,
    /// Decode steps.
    pub decode_steps: usize,
    /// Tokens sampled.
    pub tokens: usize,
    /// Rows of decode steps that were used, all together: `/ decode_steps` is the mean batch.
    pub decode_rows: usize,
    /// Seconds to the first token.
    pub first_token: f64,
}

/// Runs the scheduler on prompts of these lengths, no sample ending before its budget.
///
/// # Errors
/// When a prompt can never run under the limits.
pub fn simulate(plan: &Plan, costs: &Costs, samples: &[Sample]) -> Result<Simulation> {
    let job = &plan.job;
    let mut scheduler = Scheduler::new(job.limits, StopRule::default()).with_mixed_steps(job.mixed_steps);
    let prompt_of: BTreeMap<SampleId, usize> = samples.iter().map(|sample| (sample.id, sample.prompt)).collect();
    let ids: Vec<SampleId> = samples.iter().map(|sample| sample.id).collect();
    let mut done = Simulation::default();
    for batch in batches(&ids, job.prompts_per_batch) {
        for &id in batch {
            // Only samples of one prompt have tokens in common.
            let prompt = vec![id.index as u32; prompt_of[&id]].into();
            scheduler.push(Request { id, prompt, max_new_tokens: job.max_new_tokens })?;
        }
        run(plan, costs, &mut scheduler, &mut done);
    }
    Ok(done)
}

/// Runs all that is queued.
fn run(plan: &Plan, costs: &Costs, scheduler: &mut Scheduler, done: &mut Simulation) {
    /// Decode rounds between which lengths are taken as constant.
    const STRIDE: usize = 64;
    loop {
        let sampled: Vec<_> = match scheduler.next() {
            Step::Done => return,
            Step::Prefill(rows) => {
                let batch: Vec<_> =
                    rows.iter().map(|row| Lengths { q_len: row.tokens.len(), kv_len: row.kv_len() }).collect();
                let seconds = step_time(plan, costs, Program::Prefill, &batch).seconds();
                done.seconds += seconds;
                done.prefill_seconds += seconds;
                done.prefill_calls += 1;
                rows.iter().filter(|row| row.samples).map(|row| (row.slot, 1)).collect()
            }
            Step::Decode { rows, rounds } => {
                for first in (0..rounds).step_by(STRIDE) {
                    let count = STRIDE.min(rounds - first);
                    let middle = first + count / 2;
                    let batch: Vec<_> =
                        rows.iter().map(|row| Lengths { q_len: 1, kv_len: row.position + 1 + middle }).collect();
                    done.seconds += count as f64 * step_time(plan, costs, Program::Decode, &batch).seconds();
                }
                done.decode_calls += 1;
                done.decode_steps += rounds;
                done.decode_rows += rounds * rows.len();
                rows.iter().map(|row| (row.slot, rounds)).collect()
            }
        };
        for (slot, count) in sampled {
            if done.tokens == 0 {
                done.first_token = done.seconds;
            }
            done.tokens += count;
            scheduler.record(slot, &vec![0; count]);
        }
    }
}

/// What the whole slice does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct JobTime {
    /// Seconds until the last replica is done.
    pub seconds: f64,
    /// New tokens of all replicas.
    pub tokens: usize,
    /// The replica that is done last.
    pub slowest: Simulation,
    /// Replicas that have a prompt.
    pub busy: usize,
}

impl JobTime {
    /// New tokens per second.
    pub fn rate(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens as f64 / self.seconds } else { 0.0 }
    }
}

/// Simulates every replica: those with as many prompts of the same lengths once.
///
/// # Errors
/// As [`simulate`].
pub fn job_time(plan: &Plan, costs: &Costs) -> Result<JobTime> {
    /// What decides the time of a share: rounds and generations as they come, lengths.
    type Lengths = Vec<(u32, u32, usize)>;
    let mut known: Vec<(Lengths, Simulation)> = Vec::new();
    let mut job = JobTime::default();
    for share in plan.shares() {
        let lengths: Lengths = share.iter().map(|of| (of.id.round, of.id.generation, of.prompt)).collect();
        let simulation = match known.iter().find(|(known, _)| *known == lengths) {
            Some((_, simulation)) => *simulation,
            None => {
                let simulation = simulate(plan, costs, &share)?;
                known.push((lengths, simulation));
                simulation
            }
        };
        job.busy += 1;
        job.tokens += simulation.tokens;
        if simulation.seconds > job.seconds {
            job.seconds = simulation.seconds;
            job.slowest = simulation;
        }
    }
    Ok(job)
}

/// The batches that attention is profiled with, for its line: every slot with one key, and what this job comes to at most.
pub fn profiled_batches(plan: &Plan, program: Program) -> [Vec<Lengths>; 2] {
    let job = &plan.job;
    let longest = job.longest_prompt();
    let slots = plan.shape.slots;
    match program {
        Program::Decode => {
            let full = (longest + job.max_new_tokens).min(job.limits.max_seq_len);
            [1, full].map(|kv_len| vec![Lengths { q_len: 1, kv_len }; slots])
        }
        Program::Prefill => {
            let rows = plan.shape.prefill_rows;
            let length = longest.min(rows);
            let count = (rows / length).clamp(1, job.limits.max_seqs_in_prefill.min(slots));
            [vec![Lengths { q_len: 1, kv_len: 1 }], vec![Lengths { q_len: length, kv_len: length }; count]]
        }
    }
}
