//! `pagoda check`: whether a job runs on a TPU slice, how fast, and what to change, with no TPU, weights or tokenizer.
//!
//! [`plan`] says what the job asks of each device (pure), [`compile`] has libtpu compile it, [`estimate`] turns cycles
//! into times and simulates the scheduler (pure), [`suggest`] looks at what else could be done by the same estimate (pure),
//! `present` writes the report (pure). Here they are put together.
//!
//! Invariants: prompts and lengths are never changed, nor is that suggested; what the compiler said is kept apart from what
//! was planned, and shown beside it; where a number comes from is said.

pub mod compile;
pub mod estimate;
pub mod jax_v2;
pub mod launches;
pub mod plan;
mod present;
pub mod suggest;
#[cfg(test)]
mod tests;

use pagoda_ir::Context;
use pagoda_kernels::random::Lengths;
use pagoda_kernels::rpa::{self, Rpa};
use pagoda_kernels::vmem::Bytes;

use crate::certify::report::KernelVmem;
use crate::certify::{Certificate, Verdict};
use crate::error::{Error, Result};
use crate::llama::step::{self, Output};
use crate::mesh::Mesh;
use crate::report::Report;
use crate::sampler::Sampling;
use crate::topology::plural;
use compile::{Answer, Compiler, How, Unit, compile_all};
use estimate::{Calibration, Costs, Cycles, Exchange, JobTime, Source};
use launches::{Launch, Planned, ROLES, Time};
use plan::{Plan, Program};

/// How the lengths of prompts are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// By the model's tokenizer.
    Tokenizer,
    /// There is none: a token for every four characters, and one in front.
    Characters,
}

/// Whose attention kernel is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Layout {
    /// Pagoda's, compiled.
    #[default]
    Pagoda,
    /// JAX's ragged paged attention, version 2, by arithmetic.
    JaxV2,
}

/// What `pagoda check` is asked, beside the job.
#[derive(Clone, Debug)]
pub struct Question {
    /// The model's name, for the title.
    pub model_name: String,
    /// How the prompts' lengths are known.
    pub counted: Counted,
    /// Whether samples may end early: then the job takes at most as long as estimated.
    pub may_stop: bool,
    /// Tiles that the config gives JAX's kernel.
    pub jax_tiles: Option<jax_v2::Tiles>,
    /// Whether the config runs one engine over the whole slice.
    pub one_engine: bool,
}

/// What the compiler said of one step program.
#[derive(Clone, Debug)]
pub struct StepFinding {
    /// Which.
    pub program: Program,
    /// What was compiled.
    pub unit: Unit,
    /// What came of it.
    pub answer: Answer,
}

/// All that was found out.
#[derive(Clone, Debug)]
pub struct Findings {
    /// The job on its mesh.
    pub plan: Plan,
    /// libtpu, as it names itself.
    pub compiler: String,
    /// Both programs.
    pub steps: Vec<StepFinding>,
    /// Cycles of every launch.
    pub costs: Costs,
    /// How far they stand from the planner's model: what alternatives are compared by.
    pub calibration: Calibration,
    /// One sum over the shards in a program over the whole slice, of a decode step's rows.
    pub wide_reduce: Option<Cycles>,
    /// The job by `costs`.
    pub time: JobTime,
}

impl Findings {
    /// The first step program that does not compile: which, and why.
    pub fn refused(&self) -> Option<(Program, &Answer)> {
        let refused = self
            .steps
            .iter()
            .find(|step| step.answer.certificate().is_none_or(|certificate| certificate.verdict != Verdict::Compiles));
        refused.map(|step| (step.program, &step.answer))
    }

    /// Temporaries of the hungrier program, and code of both: what lies beside weights and pages.
    pub fn beside(&self) -> Option<[Bytes; 2]> {
        let memory = |step: &StepFinding| step.answer.certificate()?.memory;
        let both: Option<Vec<_>> = self.steps.iter().map(memory).collect();
        let both = both?;
        let bytes = |value: i64| Bytes(value.max(0) as u64);
        let temporaries = both.iter().map(|memory| bytes(memory.temporaries)).max()?;
        // Results that are not the donated cache: tokens.
        let outputs = both.iter().map(|memory| bytes(memory.outputs - memory.aliased)).max()?;
        Some([temporaries + outputs, both.iter().map(|memory| bytes(memory.code)).sum()])
    }

    /// Whether everything compiles and fits beside each other.
    pub fn fits(&self) -> bool {
        self.refused().is_none()
            && self
                .beside()
                .is_some_and(|[temporaries, code]| self.plan.memory.total() + temporaries + code <= self.plan.job.hbm)
    }
}

/// HBM of a device of the job's generation, as the compiler counts it.
///
/// # Errors
/// When the compiler is not there.
pub fn device_memory(compiler: &dyn Compiler, topology: &crate::topology::Topology) -> Result<Bytes> {
    let unit = compile::memory_probe(&crate::topology::Topology::one_host(topology.chip()).libtpu_name())?;
    let answer = compiler.compile(&unit)?;
    let limit = match answer.certificate().map(|certificate| &certificate.verdict) {
        Some(Verdict::OutOfMemory(out)) if out.memory == "hbm" => Some(out.limit),
        _ => None,
    };
    Ok(limit.unwrap_or_else(|| plan::data_sheet_hbm(topology.chip())))
}

/// Compiles what `plan` needs, and works out what it takes. `done` hears of each compilation.
///
/// # Errors
/// When the compiler is not there, or the job cannot be planned.
pub fn find_out(plan: Plan, compiler: &dyn Compiler, done: &(dyn Fn(&Unit, &Answer) + Sync)) -> Result<Findings> {
    let topology = plan.group.libtpu_name();
    let steps: Vec<Unit> = Program::ALL.into_iter().map(|program| emit(&plan, program)).collect::<Result<_>>()?;
    let mut wanted = Wanted::default();
    let prefill = wanted.of(&plan, Program::Prefill)?;
    let decode = wanted.of(&plan, Program::Decode)?;
    let exchanges = exchanges(&plan)?;
    let profiled = plan.job.topology.chip().has_static_profile();
    let step_answers = compile_all(compiler, &steps, done)?;
    // What does not fit takes no time: nothing needs a profile.
    let fits = step_answers.iter().all(|answer| answer.certificate().is_some_and(Certificate::compiles));
    let mut units = Vec::new();
    if profiled && fits {
        units.extend(wanted.units.iter().cloned());
        units.extend(exchanges.iter().cloned());
        units.extend(wide_reduce(&plan)?);
    }
    let answers = compile_all(compiler, &units, done)?;
    let (kernels, exchanged) = answers.split_at(wanted.units.len().min(answers.len()));
    let cycles = |wanted: &[WantedCycles]| -> Vec<Cycles> {
        let launches = wanted.iter();
        launches.map(|wanted| wanted.resolve(kernels)).collect()
    };
    let modelled = Costs::modelled(&plan);
    let all_of = |answer: Option<&Answer>| {
        let certificate = answer?.certificate()?;
        let cycles: u64 = certificate.cycles.iter().map(|op| op.cycles).sum();
        (cycles > 0).then(|| Cycles::constant(cycles as f64, Source::Profile))
    };
    let exchange = modelled.exchange.map(|model| Exchange {
        prefill_sum: all_of(exchanged.first()).unwrap_or(model.prefill_sum),
        decode_sum: all_of(exchanged.get(1)).unwrap_or(model.decode_sum),
        gather: all_of(exchanged.get(2)).unwrap_or(model.gather),
    });
    let costs = Costs { prefill: cycles(&prefill), decode: cycles(&decode), exchange };
    let time = estimate::job_time(&plan, &costs)?;
    let finding =
        |(program, (unit, answer)): (Program, (Unit, &Answer))| StepFinding { program, unit, answer: answer.clone() };
    Ok(Findings {
        compiler: compiler.version(&topology)?,
        steps: Program::ALL.into_iter().zip(steps.into_iter().zip(&step_answers)).map(finding).collect(),
        calibration: Calibration::new(&plan, &costs),
        costs,
        wide_reduce: all_of(exchanged.get(exchanges.len())),
        time,
        plan,
    })
}

/// What the shards exchange: a sum of a prefill step's rows, one of a decode step's, and what a token is chosen from.
fn exchanges(plan: &Plan) -> Result<Vec<Unit>> {
    let (shards, topology) = (plan.mesh.model.get(), plan.group.libtpu_name());
    if shards == 1 {
        return Ok(vec![]);
    }
    let group = Mesh { model: plan.mesh.model, ..Mesh::ONE };
    let sum =
        |program: Program| compile::all_reduce(&topology, group, program.rows(&plan.shape), plan.shard.hidden_size);
    // Greedy: each shard's largest logit and where it is; else all logits.
    let columns = if plan.job.sampling == Sampling::Greedy { 2 } else { plan.shard.vocab_size };
    let gather = compile::gather(&topology, shards, plan.shape.slots, columns);
    Ok(vec![sum(Program::Prefill)?, sum(Program::Decode)?, gather?])
}

/// The sum over a host's shards in a program over all devices of the slice.
fn wide_reduce(plan: &Plan) -> Result<Option<Unit>> {
    let shards = plan.mesh.model.get();
    if shards == 1 || plan.job.topology.hosts() == 1 || !plan.within_a_host() {
        return Ok(None);
    }
    let rows = Program::Decode.rows(&plan.shape);
    let topology = plan.job.topology.libtpu_name();
    compile::all_reduce(&topology, plan.mesh, rows, plan.shard.hidden_size).map(Some)
}

/// Kernels whose profiles are asked for, each once.
#[derive(Default)]
struct Wanted {
    units: Vec<Unit>,
}

/// Where the cycles of a launch will come from.
enum WantedCycles {
    /// They are known.
    Known(Cycles),
    /// Of the answer to a unit; the model's if it has none.
    One(usize, Cycles),
    /// Of two answers, each with the keys worked in it.
    Line([(usize, f64); 2], Cycles),
}

impl WantedCycles {
    fn resolve(&self, answers: &[Answer]) -> Cycles {
        let of = |at: usize| answers.get(at).and_then(Answer::cycles).map(|cycles| cycles as f64);
        match *self {
            Self::Known(cycles) => cycles,
            Self::One(at, model) => of(at).map_or(model, |cycles| Cycles::constant(cycles, Source::Profile)),
            Self::Line([(a, x), (b, y)], model) => match (of(a), of(b)) {
                (Some(first), Some(second)) => Cycles::line([(x, first), (y, second)], Source::Profile),
                _ => model,
            },
        }
    }
}

impl Wanted {
    /// What is asked for the launches of a program.
    fn of(&mut self, plan: &Plan, program: Program) -> Result<Vec<WantedCycles>> {
        plan.launches(program).iter().map(|launch| self.launch(plan, program, launch)).collect()
    }

    fn launch(&mut self, plan: &Plan, program: Program, launch: &Launch) -> Result<WantedCycles> {
        let model = estimate::modelled(plan, launch);
        match &launch.time {
            Time::Fixed(_) => {
                if let Some(cycles) = launch.plan.recorded_cycles() {
                    return Ok(WantedCycles::Known(Cycles::constant(cycles as f64, Source::Record)));
                }
                let name = format!("{} of {}", launch.role, program.name());
                let at = self.unit(plan, &*launch.plan, &name, None)?;
                Ok(WantedCycles::One(at, model))
            }
            Time::Groups(..) => Ok(WantedCycles::Known(model)),
            Time::Keys(attention) => {
                let core = one_core(attention)?;
                let [low, high] = estimate::profiled_batches(plan, program);
                let mut point = |batch: &[Lengths]| {
                    let name = format!(
                        "attention of {}, {} of {}",
                        program.name(),
                        plural(batch.len(), "sequence"),
                        batch[0].kv_len
                    );
                    let at = self.unit(plan, &core, &name, Some(batch))?;
                    Ok::<_, Error>((at, launches::keys_worked(attention, batch)))
                };
                Ok(WantedCycles::Line([point(&low)?, point(&high)?], model))
            }
        }
    }

    fn unit(&mut self, plan: &Plan, kernel: &dyn Planned, name: &str, batch: Option<&[Lengths]>) -> Result<usize> {
        let module = kernel.module(batch)?;
        if let Some(known) = self.units.iter().position(|unit| unit.module == module) {
            return Ok(known);
        }
        let topology = plan.job.topology.chip().info().topology.to_owned();
        self.units.push(Unit { name: name.to_owned(), module, topology, replicas: 1, how: How::Profiled });
        Ok(self.units.len() - 1)
    }
}

/// The part of an attention kernel that one core works on, where both cores of a device share its heads: the compiler has
/// no estimate of the copies of the whole, and does of a part that is as large.
fn one_core(plan: &pagoda_kernels::plan::Plan<Rpa>) -> Result<pagoda_kernels::plan::Plan<Rpa>> {
    let (problem, head_block) = (plan.problem(), plan.head_block());
    if head_block == problem.kv_heads {
        return Ok(plan.clone());
    }
    let spec = rpa::Spec { kv_heads: head_block, q_heads: head_block * problem.group(), ..problem.spec().clone() };
    let problem = pagoda_kernels::Problem::new(spec)?;
    let options = pagoda_kernels::plan::Options { tiles: Some(plan.tiles()), vmem_limit: Some(plan.limit()) };
    pagoda_kernels::plan::Plan::new(problem, plan.chip(), options).map_err(Error::runtime("planning a kernel"))
}

/// A step program of one replica.
fn emit(plan: &Plan, program: Program) -> Result<Unit> {
    let context = Context::new();
    let (config, shape) = (&plan.job.config, &plan.shape);
    let module = match program {
        Program::Prefill => step::prefill(&context, config, shape, Output::Tokens(plan.job.sampling))?,
        Program::Decode => {
            let end_of_text: Vec<i32> = plan.job.config.eos_token_ids.iter().map(|&id| id as i32).collect();
            step::decode(&context, config, shape, plan.job.sampling, &end_of_text)?
        }
    };
    Ok(Unit {
        name: format!("the {} program", program.name()),
        module: module.bytecode().to_vec(),
        topology: plan.group.libtpu_name(),
        replicas: plan.mesh.model.get(),
        how: How::Whole,
    })
}

/// The kernel of the compiler's report that is `launch`: by its name, or else by its buffers.
pub fn compiled_kernel<'k>(launch: &Launch, kernels: &'k [KernelVmem]) -> Option<&'k KernelVmem> {
    let role = |name: &str| name.rsplit('.').find_map(|part| ROLES.into_iter().find(|role| *role == part));
    let named = |kernel: &&KernelVmem| role(&kernel.name) == Some(launch.role);
    let alike = |kernel: &&KernelVmem| crate::certify::kernel::differences(launch.plan.vmem(), kernel).is_empty();
    kernels.iter().find(named).or_else(|| kernels.iter().find(alike))
}

/// The report on what was found out.
pub fn report(findings: &Findings, question: &Question) -> Report {
    present::report(findings, question)
}

/// The report on JAX's kernel for the same job: arithmetic only.
pub fn jax_report(plan: &Plan, question: &Question) -> Report {
    present::jax_report(plan, question)
}
