//! Tuning: the candidates of a kernel compiled by libtpu and ranked by its static cycles, for batches that have names.
//!
//! Which tiles are candidates is the kernel's ([`Plan::all`]), the cheapest by its model first; what is compiled is as many
//! of them as are asked for. What the compiler said is kept (see [`Cached`](crate::check::compile::Cached)), so a run that
//! was stopped goes on where it was. Nothing here was timed on a TPU: a rank is as good as the compiler's estimate.

pub mod peers;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use pagoda_ir::Context;
use pagoda_kernels::Kernel;
use pagoda_kernels::chips::Chip;
use pagoda_kernels::evidence::Digest;
use pagoda_kernels::kernel::TileSizes;
use pagoda_kernels::named::Role;
use pagoda_kernels::plan::Plan;
use pagoda_kernels::random::{Lengths, parse_batch};
use pagoda_kernels::vmem::{Buffer, BufferKind, Bytes};
use serde::Serialize;

use crate::certify::batch::{BatchCycles, Compile, launch_module};
use crate::certify::report::Bundles;
use crate::error::{Error, Result};
use crate::pjrt::Arg;
use crate::report::{
    Bar, Block, Cell, Figure, HeatMap, Part, Report, Roofline, RooflinePoint, Section, Share, Status, Suggestion,
    Table, Value, Verdict,
};

/// A batch with a name.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedBatch {
    /// What it is called.
    pub name: String,
    /// `None` for a kernel without batches.
    pub lengths: Option<Vec<Lengths>>,
}

/// What a peer takes for the same work.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PeerLine {
    /// The batch.
    pub batch: String,
    /// Who.
    pub peer: String,
    /// Its static cycles.
    pub cycles: u64,
}

/// A table of candidates.
#[derive(Clone, Debug, Serialize)]
pub struct Tuned {
    /// The kernel.
    pub kernel: &'static str,
    /// The problem, in words.
    pub problem: String,
    /// The problem, as `--spec` takes it.
    pub spec: serde_json::Value,
    /// The chip.
    pub chip: Chip,
    /// The scoped VMEM limit.
    pub limit: Bytes,
    /// The compiler, as it names itself.
    pub compiler: String,
    /// The planner's choice.
    pub planned: String,
    /// What the numbers of tiles are, as help says it: `Q,P`.
    pub tiles_form: &'static str,
    /// How many candidates there are; the ones below are the cheapest by the kernel's model.
    pub candidates_in_all: usize,
    /// The candidates that were tried: those with cycles first, by their score.
    pub candidates: Vec<Candidate>,
    /// What peers take.
    pub peers: Vec<PeerLine>,
    /// Floating-point operations and bytes of each batch, at least.
    #[serde(skip)]
    work: BTreeMap<String, pagoda_kernels::kernel::Work>,
}

/// One choice of tiles.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    /// The tiles, as `--tiles` takes them.
    pub tiles: String,
    /// Of the kernel's body.
    pub digest: Option<Digest>,
    /// `compiles`, or why it has no cycles.
    pub verdict: String,
    /// VMEM that it takes, spills counted: by the compiler's report where it compiles, else the plan's sum.
    pub vmem: Bytes,
    /// Of these, register spills.
    pub spills: Option<Bytes>,
    /// Cycles over those of the best candidate, a mean over the batches.
    pub score: Option<f64>,
    /// By the kernel's model, for the first batch.
    pub modelled_cycles: Option<f64>,
    /// Static cycles, by batch.
    pub batches: BTreeMap<String, BatchCycles>,
    /// Seconds of a launch on a device, by batch, where they were measured.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub seconds: BTreeMap<String, f64>,
    /// What its code uses of the core's units, each bundle counted once.
    pub bundles: Option<Bundles>,
    /// Buffers of the plan.
    #[serde(skip)]
    buffers: Vec<Buffer>,
}

/// Compiles `most` of the candidates, up to `jobs` at a time. `done` hears how many of how many were compiled.
///
/// # Errors
/// When no plan is possible, a batch is not one of the problem, or the compiler is missing. A candidate that the compiler
/// refuses is a line of the table.
pub fn tune<K: Kernel>(
    plan: &Plan<K>,
    batches: &[NamedBatch],
    (most, jobs): (usize, usize),
    compiler: &dyn Compile,
    done: &(dyn Fn(usize, usize) + Sync),
) -> Result<Tuned> {
    let (problem, chip) = (plan.problem(), plan.chip());
    for batch in batches {
        K::check_batch(problem, batch.lengths.as_deref())?;
    }
    let first = batches.first().and_then(|batch| batch.lengths.as_deref());
    let lengths: Vec<Vec<Lengths>> = batches.iter().filter_map(|batch| batch.lengths.clone()).collect();
    let planned = |error: pagoda_kernels::PlanError| Error::setting(error.key, error.value, error.limit, error.fix);
    let plans = Plan::all(problem, chip, Some(plan.limit()), &lengths).map_err(planned)?;
    let in_all = plans.len();
    // The planner's choice, and that of the command line, are compared whatever the model says.
    let options = pagoda_kernels::Options { tiles: None, vmem_limit: Some(plan.limit()) };
    let chosen = Plan::<K>::over(problem.clone(), chip, options, &lengths).map_err(planned)?.tiles();
    let mut tried: Vec<Plan<K>> = plans.into_iter().take(most.max(1)).collect();
    for tiles in [plan.tiles(), chosen] {
        if !tried.iter().any(|of| of.tiles() == tiles) {
            let options = pagoda_kernels::Options { tiles: Some(tiles), vmem_limit: Some(plan.limit()) };
            tried.push(Plan::new(problem.clone(), chip, options).map_err(planned)?);
        }
    }
    let units: Vec<_> = tried.iter().flat_map(|plan| batches.iter().map(move |batch| (plan, batch))).collect();
    let (next, finished) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let answers = Mutex::new(vec![None; units.len()]);
    let version = Mutex::new(String::new());
    let watched = Watched { compiler, version: &version };
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, units.len()) {
            scope.spawn(|| {
                while let Some((at, (plan, batch))) =
                    Some(next.fetch_add(1, Relaxed)).and_then(|at| Some((at, units.get(at)?)))
                {
                    let answer = BatchCycles::of_launch(plan, batch.lengths.as_deref(), &watched);
                    answers.lock().expect("no holder panics")[at] = Some(answer.map_err(|error| error.to_string()));
                    done(finished.fetch_add(1, Relaxed) + 1, units.len());
                }
            });
        }
    });
    let mut answers = answers.into_inner().expect("no holder panics").into_iter().flatten();
    let candidates = tried.iter().map(|plan| {
        let of_plan: Vec<_> = answers.by_ref().take(batches.len()).collect();
        candidate(plan, batches, of_plan, first)
    });
    let mut tuned = Tuned {
        kernel: K::NAME,
        problem: plan.describe(),
        spec: serde_json::to_value(problem.spec()).map_err(Error::runtime("writing JSON"))?,
        chip,
        limit: plan.limit(),
        planned: chosen.to_string(),
        tiles_form: <K::Tiles as TileSizes>::FORM,
        candidates_in_all: in_all,
        candidates: candidates.collect(),
        compiler: version.into_inner().expect("no holder panics"),
        peers: vec![],
        work: batches.iter().map(|of| (of.name.clone(), K::work(problem, of.lengths.as_deref()))).collect(),
    };
    tuned.rank();
    Ok(tuned)
}

/// Times the candidates of `tuned` that compile on a device of `client`, a TPU, over its batches: the median of several
/// launches, after one that warms up. Candidates are ranked by it.
///
/// This never ran on TPU hardware.
///
/// # Errors
/// When a candidate does not run.
pub fn measure<K: Kernel>(
    plan: &Plan<K>,
    batches: &[NamedBatch],
    client: &crate::pjrt::Client,
    tuned: &mut Tuned,
) -> Result<()> {
    const LAUNCHES: usize = 20;
    for candidate in tuned.candidates.iter_mut().filter(|candidate| candidate.verdict == "compiles") {
        let refused = |error: pagoda_kernels::PlanError| Error::setting(error.key, error.value, error.limit, error.fix);
        let tiles = <K::Tiles as TileSizes>::parse(&candidate.tiles).map_err(refused)?;
        let options = pagoda_kernels::Options { tiles: Some(tiles), vmem_limit: Some(plan.limit()) };
        let plan = Plan::<K>::new(plan.problem().clone(), plan.chip(), options).map_err(refused)?;
        let program = client.compile(launch_module(&Context::new(), &plan, None)?, 1)?;
        for batch in batches {
            let inputs = K::draw(plan.problem(), batch.lengths.as_deref(), 0)?;
            let mut buffers: Vec<_> = inputs.values().map(|array| client.upload(array, 0)).collect::<Result<_, _>>()?;
            let roles: Vec<Role> = K::arguments(plan.problem()).iter().map(|argument| argument.role).collect();
            let mut times = Vec::new();
            for _ in 0..=LAUNCHES {
                let start = Instant::now();
                // What is donated comes back as a result, and is given again.
                let arguments = std::mem::take(&mut buffers).into_iter().zip(&roles);
                let (kept, donated): (Vec<_>, Vec<_>) =
                    arguments.enumerate().partition(|(_, (_, role))| !matches!(role, Role::Donated { .. }));
                let mut slots: Vec<Option<Arg>> = (0..roles.len()).map(|_| None).collect();
                kept.iter().for_each(|(at, (buffer, _))| slots[*at] = Some(Arg::Keep(buffer)));
                donated.into_iter().for_each(|(at, (buffer, _))| slots[at] = Some(Arg::Donate(buffer)));
                let mut results: Vec<_> =
                    program.run(slots.into_iter().flatten().collect())?.into_iter().map(Some).collect();
                results.iter().flatten().try_for_each(crate::pjrt::Buffer::wait)?;
                times.push(start.elapsed().as_secs_f64());
                let mut kept = kept.into_iter().map(|(_, (buffer, _))| buffer);
                let again = roles.iter().filter_map(|role| match role {
                    Role::Donated { result } => results[*result].take(),
                    _ => kept.next(),
                });
                buffers = again.collect();
            }
            times.remove(0);
            times.sort_by(f64::total_cmp);
            candidate.seconds.insert(batch.name.clone(), times[times.len() / 2]);
        }
    }
    tuned.rank();
    Ok(())
}

/// Remembers which compiler answered.
struct Watched<'c> {
    compiler: &'c dyn Compile,
    version: &'c Mutex<String>,
}

impl Compile for Watched<'_> {
    fn certificate(&self, topology: &str, name: &str, module: Vec<u8>) -> Result<crate::certify::Certificate> {
        let certificate = self.compiler.certificate(topology, name, module)?;
        self.version.lock().expect("no holder panics").clone_from(&certificate.compiler);
        Ok(certificate)
    }
}

type Answer = std::result::Result<(BatchCycles, crate::certify::Certificate), String>;

fn candidate<K: Kernel>(
    plan: &Plan<K>,
    batches: &[NamedBatch],
    answers: Vec<Answer>,
    first: Option<&[Lengths]>,
) -> Candidate {
    let mut candidate = Candidate {
        tiles: plan.tiles().to_string(),
        digest: Digest::of(plan).ok(),
        verdict: "compiles".into(),
        vmem: plan.vmem().total(),
        spills: None,
        score: None,
        modelled_cycles: K::model(plan, first),
        batches: BTreeMap::new(),
        seconds: BTreeMap::new(),
        bundles: None,
        buffers: plan.vmem().buffers.clone(),
    };
    for (batch, answer) in batches.iter().zip(answers) {
        match answer {
            Err(error) => candidate.verdict = error,
            Ok((cycles, certificate)) => {
                if let crate::certify::Verdict::OutOfMemory(out) = &certificate.verdict {
                    candidate.verdict = format!("does not fit: {out}");
                    continue;
                }
                if cycles.device_cycles.is_none() {
                    candidate.verdict = format!("compiles, but {}", cycles.cycles_from.words());
                }
                candidate.vmem = cycles.vmem;
                candidate.spills = Some(certificate.spills());
                candidate.bundles = certificate.bundles.into_iter().next().or(candidate.bundles);
                candidate.batches.insert(batch.name.clone(), cycles);
            }
        }
    }
    candidate
}

impl Tuned {
    /// Scores the candidates and puts the best first.
    fn rank(&mut self) {
        // Measured times count before estimates.
        let measured = self.candidates.iter().any(|candidate| !candidate.seconds.is_empty());
        let cycles = |candidate: &Candidate, batch: &str| match measured {
            true => candidate.seconds.get(batch).map(|seconds| (seconds * 1e9) as u64),
            false => candidate.batches.get(batch)?.device_cycles,
        };
        let best: BTreeMap<&String, u64> = self
            .work
            .keys()
            .filter_map(|batch| Some((batch, self.candidates.iter().filter_map(|of| cycles(of, batch)).min()?)))
            .collect();
        let score = |candidate: &Candidate| {
            let ratios = best.iter().map(|(batch, &best)| Some(cycles(candidate, batch)? as f64 / best.max(1) as f64));
            let ratios: Option<Vec<f64>> = ratios.collect();
            ratios.filter(|ratios| !ratios.is_empty()).map(|ratios| ratios.iter().sum::<f64>() / ratios.len() as f64)
        };
        let scores: Vec<_> = self.candidates.iter().map(score).collect();
        self.candidates.iter_mut().zip(scores).for_each(|(candidate, score)| candidate.score = score);
        let key = |candidate: &Candidate| candidate.score.unwrap_or(f64::INFINITY);
        self.candidates.sort_by(|one, other| key(one).total_cmp(&key(other)));
    }

    /// The best one that has cycles for every batch.
    pub fn best(&self) -> Option<&Candidate> {
        self.candidates.first().filter(|candidate| candidate.score.is_some())
    }

    /// The names of the batches.
    pub fn batch_names(&self) -> impl Iterator<Item = &str> {
        self.work.keys().map(String::as_str)
    }

    /// The names of the batches of these lengths.
    fn batches_of(&self, lengths: &str) -> Vec<String> {
        let best = self.candidates.iter().flat_map(|candidate| &candidate.batches);
        let same = best.filter(|(_, cycles)| {
            let parsed = |text: &str| parse_batch(text).ok();
            cycles.lengths.as_deref().and_then(parsed).is_some_and(|batch| Some(batch) == parsed(lengths))
        });
        let mut names: Vec<String> = same.map(|(name, _)| name.clone()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// What was found, as a page.
    pub fn report(&self) -> Report {
        let planned = self.candidates.iter().find(|candidate| candidate.tiles == self.planned);
        let verdict = match (self.best(), planned.and_then(|planned| planned.score)) {
            (None, _) => Verdict {
                status: Status::Bad,
                headline: "no candidate has an estimate for every batch".into(),
                reasons: vec![],
            },
            (Some(best), _) if best.tiles == self.planned => Verdict {
                status: Status::Good,
                headline: format!("the planner's tiles {} are the best found", self.planned),
                reasons: vec![],
            },
            (Some(best), Some(score)) if score <= 1.05 => Verdict {
                status: Status::Good,
                headline: format!(
                    "the planner's tiles {} are within {:.0}% of the best found",
                    self.planned,
                    100.0 * (score / best.score.unwrap_or(1.0) - 1.0)
                ),
                reasons: vec![],
            },
            (Some(best), score) => Verdict {
                status: Status::Caution,
                headline: format!("tiles {} are the best found; the planner chooses {}", best.tiles, self.planned),
                reasons: score
                    .map(|score| format!("those take {score:.2} times the best cycles"))
                    .into_iter()
                    .collect(),
            },
        };
        let suggestions = self.best().filter(|best| verdict.status == Status::Caution && best.tiles != self.planned);
        let suggestions = suggestions.map(|best| Suggestion {
            kind: "tiles",
            change: format!("--tiles {}", best.tiles),
            effect: "the fewest static cycles, a mean over the batches".into(),
        });
        Report {
            title: format!("Tuning {} for {}", self.kernel, self.chip),
            subtitle: self.problem.clone(),
            verdict,
            figures: self.figures(),
            suggestions: suggestions.into_iter().collect(),
            sections: [self.maps(), vec![self.memory(), self.units(), self.roofline(), self.table()]].concat(),
            notes: vec![
                format!("Static estimates of {}; nothing was run on a TPU.", self.compiler),
                "The estimate gives every core, and DMAs on different semaphores, the full rate of the memory: it is to be read \
                 beside the floor of the memory."
                    .into(),
                format!(
                    "{} of {} candidates were compiled, the cheapest by the kernel's model.",
                    self.candidates.len(),
                    self.candidates_in_all.max(self.candidates.len())
                ),
            ],
        }
    }

    fn figures(&self) -> Vec<Figure> {
        let Some(best) = self.best() else { return vec![] };
        let of = best.batches.iter().map(|(name, cycles)| Figure {
            key: "best_cycles",
            label: format!("{name}: best"),
            value: cycles.device_cycles.map_or(Value::Missing, Value::Cycles),
            note: format!("cycles at {}; floor {}", best.tiles, Value::Cycles(cycles.floor())),
        });
        of.collect()
    }

    /// A map for each batch: the last number of the tiles along the columns, the others along the rows.
    fn maps(&self) -> Vec<Section> {
        let split = |tiles: &str| {
            let (row, column) = tiles.rsplit_once(',').unwrap_or(("", tiles));
            (row.to_owned(), column.to_owned())
        };
        let numbers = |text: &String| text.split(',').map(|of| of.parse().unwrap_or(0)).collect::<Vec<u64>>();
        let distinct = |mut names: Vec<String>| {
            names.sort_by_key(numbers);
            names.dedup();
            names
        };
        let rows = distinct(self.candidates.iter().map(|of| split(&of.tiles).0).collect());
        let columns = distinct(self.candidates.iter().map(|of| split(&of.tiles).1).collect());
        let section = |batch: &String| {
            let best = self.candidates.iter().filter_map(|of| of.batches.get(batch)?.device_cycles).min();
            let cell = |row: &String, column: &String| {
                let candidate = self.candidates.iter().find(|of| split(&of.tiles) == (row.clone(), column.clone()))?;
                let cycles = candidate.batches.get(batch).and_then(|of| of.device_cycles);
                let note = match cycles {
                    Some(_) => candidate.vmem.to_string(),
                    None => candidate.verdict.split([':', '.']).next().unwrap_or_default().to_owned(),
                };
                Some(Cell {
                    value: cycles.map_or(Value::Missing, Value::Cycles),
                    note,
                    times_best: cycles.zip(best).map(|(cycles, best)| cycles as f64 / best.max(1) as f64),
                    chosen: candidate.tiles == self.planned,
                })
            };
            let rows = rows.iter().map(|row| (row.clone(), columns.iter().map(|column| cell(row, column)).collect()));
            let (first, last) = self.tiles_form.rsplit_once(',').unwrap_or(("tiles", self.tiles_form));
            let map =
                HeatMap { axes: [first, last].map(str::to_owned), columns: columns.clone(), rows: rows.collect() };
            let peers = self.peers.iter().filter(|line| line.batch == *batch);
            let peers = peers.map(|line| Block::Text(format!("{}: {} cycles", line.peer, Value::Cycles(line.cycles))));
            let words = "Static cycles and VMEM; the planner's choice has a frame; what does not fit is hatched.";
            let blocks = [Block::Heat(map), Block::Text(words.into())].into_iter().chain(peers);
            Section::new(format!("Tiles: {batch}"), blocks.collect())
        };
        self.work.keys().map(section).collect()
    }

    /// What the best candidates and the planner's fill VMEM with.
    fn memory(&self) -> Section {
        const FEW: usize = 3;
        let shown = self.candidates.iter().enumerate();
        let shown = shown.filter(|(at, of)| (*at < FEW && of.score.is_some()) || of.tiles == self.planned);
        let bar = |(_, candidate): (usize, &Candidate)| {
            let kind = |kind: BufferKind| if kind == BufferKind::Scratch { "" } else { " window" };
            let buffers = candidate
                .buffers
                .iter()
                .map(|buffer| Part { label: format!("{}{}", buffer.name, kind(buffer.kind)), bytes: buffer.bytes });
            let spills = candidate.spills.map(|bytes| Part { label: "spills".into(), bytes });
            let parts = buffers.chain(spills).collect();
            Bar { label: format!("tiles {}", candidate.tiles), limit: self.limit, parts }
        };
        Section::new("VMEM by buffer", vec![Block::Bars(shown.map(bar).collect())])
    }

    /// What the best candidate's code uses of the core, and the copies beside it.
    fn units(&self) -> Section {
        let Some((best, bundles)) = self.best().and_then(|best| Some((best, best.bundles.as_ref()?))) else {
            return Section::new("Where the cycles go", vec![Block::Text("The compiler wrote no bundles.".into())]);
        };
        let unit = |unit: &crate::certify::report::Unit| Share {
            label: words(&unit.name).to_owned(),
            share: bundles.share(unit),
            note: format!("({} uses, {} slots in a bundle)", Value::Count(unit.used), unit.slots),
        };
        let copies = best.batches.iter().filter_map(|(name, cycles)| {
            let floor = cycles.hbm_floor_cycles as f64 / cycles.device_cycles?.max(1) as f64;
            Some(Share {
                label: format!("copies, {name}"),
                share: floor,
                note: "(the memory's floor, of the launch's cycles)".into(),
            })
        });
        let text = format!(
            "Tiles {}: {} bundles of code, each counted once, and the slots that they use of each unit. What is nearest to 100% \
             bounds straight-line parts.",
            best.tiles,
            Value::Count(bundles.count)
        );
        let shares = bundles.units.iter().map(unit).chain(copies).collect();
        Section::new("Where the cycles go", vec![Block::Text(text), Block::Shares(shares)])
    }

    fn roofline(&self) -> Section {
        const FEW: usize = 3;
        let info = self.chip.info();
        let few = self.candidates.iter().filter(|of| of.score.is_some()).take(FEW);
        let points = few.flat_map(|candidate| {
            candidate.batches.iter().filter_map(|(batch, cycles)| {
                let work = self.work.get(batch)?;
                Some(RooflinePoint {
                    group: batch.clone(),
                    label: candidate.tiles.clone(),
                    flops: work.flops,
                    bytes: work.bytes,
                    seconds: cycles.device_cycles? as f64 / info.clock.0,
                })
            })
        });
        let roofline =
            Roofline { peak_flops: info.peak_flops(), bandwidth: info.hbm_bandwidth.0, points: points.collect() };
        Section::new("Roofline", vec![Block::Roofline(roofline)])
    }

    fn table(&self) -> Section {
        let names: Vec<&str> = self.work.keys().map(String::as_str).collect();
        let columns = ["tiles"].into_iter().chain(names.iter().copied());
        let columns: Vec<&str> = columns.chain(["score", "model", "VMEM", "spills", "verdict"]).collect();
        let mut table = Table::new(&columns);
        for candidate in &self.candidates {
            let of = |name: &&str| candidate.batches.get(*name).and_then(|cycles| cycles.device_cycles);
            let cycles = names.iter().map(|name| of(name).map_or(Value::Missing, Value::Cycles));
            let score = candidate.score.map_or(Value::Missing, Value::Times);
            let modelled = candidate.modelled_cycles.map_or(Value::Missing, |cycles| Value::Cycles(cycles as u64));
            let spills = candidate.spills.map_or(Value::Missing, Value::Bytes);
            let rest = [score, modelled, candidate.vmem.into(), spills, candidate.verdict.as_str().into()];
            table.row(std::iter::once(candidate.tiles.as_str().into()).chain(cycles).chain(rest).collect());
        }
        let floors = self.best().into_iter().flat_map(|best| &best.batches).map(|(name, cycles)| {
            let [hbm, mxu] = [cycles.hbm_floor_cycles, cycles.mxu_floor_cycles].map(Value::Cycles);
            Block::Text(format!(
                "{name}: no tiles take less than {hbm} cycles of the memory and {mxu} of the matrix units."
            ))
        });
        Section::new("All candidates", std::iter::once(Block::Table(table)).chain(floors).collect())
    }
}

/// The compiler's name of a unit in words.
fn words(unit: &str) -> &str {
    match unit {
        "MATMUL" => "matrix unit: products",
        "MATPUSH" => "matrix unit: weights pushed",
        "XLU" => "cross-lane unit",
        "VALU" => "vector ALU",
        "VPOP" => "results popped",
        "EUP" => "exponentials, divisions",
        "VLOAD" => "vector loads",
        "VLOAD:FILL" => "vector loads of spills",
        "VSTORE" => "vector stores",
        "VSTORE:SPILL" => "vector stores of spills",
        "SALU" => "scalar ALU",
        other => other,
    }
}
