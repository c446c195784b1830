//! The generation loop: drives the step programs by the scheduler's plan and hands out finished samples.
//!
//! [`Engine::submit`] queues a request, at any time; [`Engine::poll`] runs one host call and answers what finished;
//! [`Engine::cancel`] ends a request early. [`Engine::run`] is a loop over these.
//!
//! Per host call the device prefills one packed chunk (with the sequences that decode carried along, where
//! [`EngineOptions::mixed_steps`] says so), or decodes up to `max_rounds` steps by itself; the host only moves a few
//! kilobytes of integers in between. The KV buffer stays on the device and is donated from call to call.
//!
//! Invariants: every request that was accepted ends in exactly one [`Finished`], handed out as soon as it is done; a
//! cancelled run has handed out all that was finished; after an error nothing is queued or runs. The text of a sample
//! depends on its own prompt, index, round and generation only, whatever ran beside it, unless the caller asks for
//! [`EngineOptions::mixed_steps`].

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pagoda_ir::Element;
use pagoda_ir::tensor::HostTensor;
use pagoda_kernels::rpa::kv_layout::{NO_SLOT, slot};

use crate::error::{Error, Result};
use crate::llama::step::StepShape;
use crate::llama::{self, Call, DeviceModel, Executor, KvCache, Parallel, Sampled, Target};
use crate::memory::Room;
use crate::model::ModelSpec;
use crate::model::weights::Weights;
use crate::pjrt::{Client, Executable};
use crate::sampler::Sampling;
use crate::scheduler::{DecodeRow, Finished, Limits, PrefillRow, Request, Scheduler, Step};
use crate::stop::StopRule;
use crate::units::{SampleId, Slot};
use crate::watchdog::Watchdog;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct SamplingOptions {
    /// 0 for greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens.
    pub top_k: Option<u32>,
    /// Keep the smallest set of tokens whose probability reaches p.
    pub top_p: Option<f32>,
    /// Seed of all random keys.
    pub seed: u64,
}

impl SamplingOptions {
    /// Greedy decoding.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: None, top_p: None, seed: 0 };

    /// How a request of this id is drawn by these options.
    fn draw(self, id: SampleId) -> Draw {
        Draw { sampling: self, key: id.key(), log_probabilities: false }
    }

    /// The program variant that these options need.
    pub fn kind(&self) -> Sampling {
        if self.temperature == 0.0 {
            return Sampling::Greedy;
        }
        Sampling::Random {
            top_k: self.top_k.is_some(),
            top_p: self.top_p.is_some_and(|p| p < 1.0),
            log_probabilities: false,
        }
    }
}

/// How the tokens of one request are drawn, where it is not as the engine's options and the request's id say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// What the random numbers depend on beside the seed and the position, as [`SampleId::key`] has it.
    pub key: [u32; 2],
    /// Whether [`Engine::log_probabilities`] is to say how likely its tokens are.
    pub log_probabilities: bool,
}

impl Draw {
    /// The program variant that it needs.
    fn kind(&self) -> Sampling {
        match self.sampling.kind() {
            Sampling::Greedy if !self.log_probabilities => Sampling::Greedy,
            Sampling::Greedy => Sampling::Random { top_k: false, top_p: false, log_probabilities: true },
            Sampling::Random { top_k, top_p, .. } => {
                Sampling::Random { top_k, top_p, log_probabilities: self.log_probabilities }
            }
        }
    }
}

/// What a host call did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StepKind {
    /// Chunks of prompts.
    #[default]
    Prefill,
    /// Chunks of prompts, and one row of each sequence that decodes.
    Mixed,
    /// Up to `max_rounds` decode steps.
    Decode,
}

impl StepKind {
    /// Its name in messages and timelines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Mixed => "prefill and decode",
            Self::Decode => "decode",
        }
    }
}

/// One host call. Times are in seconds; the four parts follow each other from `start_s` on.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct StepReport {
    /// The engine, of several.
    pub engine: usize,
    /// What it did.
    pub kind: StepKind,
    /// Sequences in the step.
    pub sequences: usize,
    /// Rows of a prefill step that are not padding; sequences of a decode step.
    pub rows: usize,
    /// Steps of a decode call; 1 for the others.
    pub rounds: usize,
    /// Tokens sampled.
    pub tokens: usize,
    /// When it began, counted from the first [`Engine::submit`] of the run.
    pub start_s: f64,
    /// Planning: the scheduler.
    pub plan_s: f64,
    /// Packing and uploading the arguments.
    pub submit_s: f64,
    /// The program, and reading its tokens.
    pub device_s: f64,
    /// Taking the tokens to their sequences.
    pub extract_s: f64,
}

impl StepReport {
    /// All its parts.
    pub fn total_s(&self) -> f64 {
        self.plan_s + self.submit_s + self.device_s + self.extract_s
    }
}

/// Where the run stands, reported after every host call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Samples that are done.
    pub finished: usize,
    /// Tokens sampled so far.
    pub tokens: usize,
    /// Requests that wait for a slot.
    pub waiting: usize,
    /// Sequences in slots.
    pub active: usize,
    /// Pages reserved by them.
    pub pages_used: usize,
    /// The host call.
    pub step: StepReport,
}

impl Progress {
    /// Of engines that run side by side, the last of which made `step`.
    pub fn beside(engines: &[Self], step: StepReport) -> Self {
        let sum = |count: fn(&Self) -> usize| engines.iter().map(count).sum();
        Self {
            finished: sum(|engine| engine.finished),
            tokens: sum(|engine| engine.tokens),
            waiting: sum(|engine| engine.waiting),
            active: sum(|engine| engine.active),
            pages_used: sum(|engine| engine.pages_used),
            step,
        }
    }
}

/// What a run took. Where engines ran side by side: calls and tokens of all, steps and seconds of the longest.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Timing {
    /// Prefill calls, mixed ones too.
    pub prefill_calls: usize,
    /// Prefill calls that carried decoding sequences along.
    pub mixed_calls: usize,
    /// Tokens sampled for these.
    pub mixed_tokens: usize,
    /// Decode calls (each of up to `max_rounds` steps).
    pub decode_calls: usize,
    /// Decode steps run on the device.
    pub decode_steps: usize,
    /// Tokens sampled in decode steps.
    pub decode_tokens: usize,
    /// Seconds waiting for prefill calls.
    pub prefill_device_s: f64,
    /// Seconds waiting for decode calls.
    pub decode_device_s: f64,
    /// Seconds of everything else in the loop: planning, packing, uploads, bookkeeping.
    pub host_s: f64,
    /// Seconds from the start of the run to the first sampled token.
    pub first_token_s: f64,
}

impl Timing {
    /// Of two engines that ran side by side.
    pub fn beside(self, other: Self) -> Self {
        Self {
            prefill_calls: self.prefill_calls + other.prefill_calls,
            mixed_calls: self.mixed_calls + other.mixed_calls,
            mixed_tokens: self.mixed_tokens + other.mixed_tokens,
            decode_calls: self.decode_calls + other.decode_calls,
            decode_steps: self.decode_steps.max(other.decode_steps),
            decode_tokens: self.decode_tokens + other.decode_tokens,
            prefill_device_s: self.prefill_device_s.max(other.prefill_device_s),
            decode_device_s: self.decode_device_s.max(other.decode_device_s),
            host_s: self.host_s.max(other.host_s),
            first_token_s: match (self.first_token_s, other.first_token_s) {
                (0.0, first) | (first, 0.0) => first, // an engine that had nothing to do
                (one, other) => one.min(other),
            },
        }
    }
}

/// The sizes and choices that an engine is built for.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Slots, pages and step sizes.
    pub limits: Limits,
    /// Type of weights and activations: f32 or bf16.
    pub compute: Element,
    /// Type of the weights' matrices on the device, [`llama::matrices`].
    pub matrices: Element,
    /// What the KV cache holds.
    pub kv_cache: KvCache,
    /// What the step programs are emitted for.
    pub target: Target,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// When a sample ends.
    pub stop: StopRule,
    /// Whether prefill calls carry decoding sequences along, as [`crate::scheduler`] says: rows that were padding sample
    /// a token each.
    ///
    /// These tokens come from the prefill program, whose sums are rounded in another order than the decode program's. So
    /// a text then depends on what ran beside it, where two tokens are equally likely to within rounding, and a run that
    /// is interrupted and goes on may yield other texts.
    pub mixed_steps: bool,
    /// Whether prompts that begin alike share the pages of their beginning, as [`crate::scheduler`] says. No text depends on it.
    pub reuse_prefixes: bool,
}

impl EngineOptions {
    /// These options for a target, and for the files of a model.
    #[must_use]
    pub fn on(self, target: Target, config: &ModelSpec, weights: &Weights) -> Self {
        Self { target, matrices: llama::matrices(config, weights, self.compute, target), ..self }
    }

    /// The kernels, and the weights where they have a type of their own: what took effect.
    pub fn kernels(&self) -> String {
        match self.matrices == self.compute {
            true => self.target.to_string(),
            false => format!("{}, weights in {} as in the files", self.target, self.matrices),
        }
    }

    /// The step programs' static sizes, for a model that is split like this.
    pub fn shape(&self, parallel: &Parallel) -> StepShape {
        let shape = StepShape::of(&self.limits, self.compute, self.kv_cache, self.target, parallel.clone());
        StepShape { matrices: self.matrices, ..shape }
    }

    /// Whether the KV caches of some devices fit in the memory that is left. [`Engine::new`] asks again: a caller who asks before
    /// the weights are loaded spares the user the wait.
    ///
    /// # Errors
    /// Names `engine.max_pages`, what it takes, what is left, and how many pages would fit.
    pub fn check_memory(
        &self,
        client: &Client,
        config: &ModelSpec,
        parallel: &Parallel,
        devices: &[usize],
    ) -> Result<()> {
        let shape = self.shape(parallel);
        Room::of(client, devices)?.map_or(Ok(()), |room| room.check(shape.pages, &shape.kv_type(config)))
    }
}

/// A model on the devices of a group, and the requests that it runs.
pub struct Engine {
    options: EngineOptions,
    shape: StepShape,
    executor: Executor,
    scheduler: Scheduler,
    /// The variant that the programs were compiled for.
    sampling: Sampling,
    /// Of requests that are not drawn as the options say: how they are, and the logarithms of their tokens' probabilities.
    draws: HashMap<SampleId, (Draw, Vec<f32>)>,
    /// These logarithms of requests that ended in the last call.
    ended: HashMap<SampleId, Vec<f32>>,
    session: Session,
    watchdog: Option<Arc<Watchdog>>,
}

/// What was measured since the first request of a run.
#[derive(Default)]
struct Session {
    started: Option<Instant>,
    progress: Progress,
    timing: Timing,
}

impl Engine {
    /// Compiles the step programs and allocates the KV cache, on the device only.
    ///
    /// # Errors
    /// When the cache does not fit in the memory that is left (asked before anything is compiled), or the programs do not
    /// compile.
    pub fn new(client: &Client, model: DeviceModel, options: EngineOptions) -> Result<Self> {
        let sampling = options.sampling.kind();
        Self::with_sampling(client, model, options, sampling)
    }

    /// As [`new`](Self::new), for requests that each say how they are drawn ([`submit_drawn`](Self::submit_drawn)): `sampling`
    /// has the filters that any of them may use.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_sampling(
        client: &Client,
        model: DeviceModel,
        options: EngineOptions,
        sampling: Sampling,
    ) -> Result<Self> {
        options.check_memory(client, model.config(), model.group().parallel(), &model.group().devices())?;
        let shape = options.shape(model.group().parallel());
        let executor = Executor::new(client, model, &shape, sampling, options.stop.eos())?;
        let (scheduler, session) = (idle_scheduler(&options), Session::default());
        let (draws, ended) = Default::default();
        Ok(Self { options, shape, executor, scheduler, sampling, draws, ended, session, watchdog: None })
    }

    /// Time spent emitting and compiling the step programs.
    pub fn compile_time(&self) -> Duration {
        self.executor.compile_time()
    }

    /// The decode program, for its statistics.
    pub fn decode_program(&self) -> &Executable {
        self.executor.decode_program()
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelSpec {
        self.executor.model().config()
    }

    /// Queues a request behind all others.
    ///
    /// # Errors
    /// Why it is refused: it can never run under the limits, or one with its id has not ended.
    pub fn submit(&mut self, request: Request) -> Result<()> {
        self.scheduler.push(request)?;
        self.session.started.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// As [`submit`](Self::submit), drawn in a way of its own.
    ///
    /// # Errors
    /// As there, and when the programs were compiled without what `draw` asks for.
    pub fn submit_drawn(&mut self, request: Request, draw: Draw) -> Result<()> {
        if !self.sampling.serves(draw.kind()) {
            let compiled = format!("is not what the step programs were compiled for: {:?}", self.sampling);
            let fix = "make the engine with `Engine::with_sampling`";
            return Err(Error::setting("sampling", format!("{:?}", draw.kind()), compiled, fix));
        }
        let id = request.id;
        self.submit(request)?;
        self.draws.insert(id, (draw, Vec::new()));
        Ok(())
    }

    /// Ends a request, queued or running, with the tokens that it has; `None` when none of this id is there.
    pub fn cancel(&mut self, id: SampleId) -> Option<Finished> {
        self.draws.remove(&id);
        self.scheduler.cancel(id)
    }

    /// The requests that have a slot, with what they have sampled so far.
    pub fn running(&self) -> impl Iterator<Item = (SampleId, &[u32])> {
        self.scheduler.sampled()
    }

    fn draw(&self, id: SampleId) -> Draw {
        self.draws.get(&id).map_or(self.options.sampling.draw(id), |&(draw, _)| draw)
    }

    fn keep(&mut self, id: SampleId, log_probabilities: &[f32]) {
        if let Some((Draw { log_probabilities: true, .. }, kept)) = self.draws.get_mut(&id) {
            kept.extend(log_probabilities);
        }
    }

    /// The logarithms of the probabilities that the model gives the tokens of a request that was submitted by
    /// [`submit_drawn`](Self::submit_drawn), before temperature and filters: of each token that it has sampled; of one that has
    /// ended, until the next [`poll`](Self::poll). None where it did not ask, or the step programs do not say.
    pub fn log_probabilities(&self, id: SampleId) -> &[f32] {
        self.draws.get(&id).map(|(_, kept)| kept).or_else(|| self.ended.get(&id)).map_or(&[], Vec::as_slice)
    }

    /// Says how the rows of the next call are sampled: the keys of each, those of idle rows zeros.
    fn draw_rows(&mut self, rows: impl Iterator<Item = (usize, SampleId)>) -> Result<[Vec<u32>; 2]> {
        let slots = self.shape.slots;
        let mut keys = [vec![0u32; slots], vec![0u32; slots]];
        let idle = Draw { sampling: self.options.sampling, key: [0; 2], log_probabilities: false };
        let mut draws = vec![idle; slots];
        for (row, id) in rows {
            draws[row] = self.draw(id);
            [keys[0][row], keys[1][row]] = draws[row].key;
        }
        self.executor.sample_like(&draws)?;
        Ok(keys)
    }

    /// What [`submit`](Self::submit) would say to a request.
    ///
    /// # Errors
    /// As there.
    pub fn check(&self, request: &Request) -> Result<()> {
        self.scheduler.check(request)
    }

    /// Requests that were submitted and have not ended.
    pub fn unfinished(&self) -> usize {
        self.scheduler.active() + self.scheduler.waiting()
    }

    /// Drops all requests, queued and running, without a word.
    pub fn clear(&mut self) {
        self.draws.clear();
        self.scheduler = idle_scheduler(&self.options);
    }

    /// Requests that could be submitted now and find a slot: who shares a queue with other engines takes so many.
    pub fn free_slots(&self) -> usize {
        self.options.limits.max_seqs.saturating_sub(self.unfinished())
    }

    /// Where the run stands: what was submitted since the last [`Self::take_timing`].
    pub fn progress(&self) -> &Progress {
        &self.session.progress
    }

    /// What was measured since the last call; the next run begins with the next request.
    pub fn take_timing(&mut self) -> Timing {
        std::mem::take(&mut self.session).timing
    }

    /// Runs one host call: the samples that it finished, or `None` when every request has ended.
    ///
    /// # Errors
    /// When the device fails. The KV cache is lost then, and with it all requests, queued ones too.
    pub fn poll(&mut self) -> Result<Option<Vec<Finished>>> {
        let outcome = self.step();
        if outcome.is_err() {
            self.clear();
        }
        outcome
    }

    /// Has the steps of this engine watched: a device that does not answer is then reported.
    pub fn watch(&mut self, watchdog: &Arc<Watchdog>) {
        self.watchdog = Some(Arc::clone(watchdog));
    }

    fn step(&mut self) -> Result<Option<Vec<Finished>>> {
        self.ended.clear();
        let watchdog = self.watchdog.clone();
        let started = Instant::now();
        let run_started = *self.session.started.get_or_insert(started);
        let step = self.scheduler.next();
        let planned = Instant::now();
        let mut report = StepReport {
            start_s: (started - run_started).as_secs_f64(),
            plan_s: (planned - started).as_secs_f64(),
            ..StepReport::default()
        };
        let timing = &mut self.session.timing;
        let call = timing.prefill_calls + timing.decode_calls + 1;
        let _watched = watchdog.as_deref().map(|watchdog| watchdog.step(format!("call {call}: {step}")));
        let (sampled, submitted, executed) = match step {
            Step::Done => return Ok(None),
            Step::Prefill(rows) => {
                timing.prefill_calls += 1;
                report.sequences = rows.len();
                (report.rows, report.rounds) = (rows.iter().map(|row| row.tokens.len()).sum(), 1);
                let carried = rows.iter().filter(|row| row.decodes).count();
                if carried > 0 {
                    report.kind = StepKind::Mixed;
                    timing.mixed_calls += 1;
                    timing.mixed_tokens += carried;
                }
                let call = self.prefill_call(&rows)?;
                let submitted = Instant::now();
                let Sampled { tokens, log_probabilities } = self.executor.prefill(call)?;
                let executed = Instant::now();
                self.session.timing.prefill_device_s += (executed - submitted).as_secs_f64();
                for (row, likelihood) in rows.iter().zip(&log_probabilities).filter(|(row, _)| row.samples) {
                    self.keep(row.id, std::slice::from_ref(likelihood));
                }
                let sampled = rows.iter().zip(tokens).filter(|(row, _)| row.samples);
                let sampled = sampled.map(|(row, token)| (row.slot, vec![token as u32])).collect::<Vec<_>>();
                (sampled, submitted, executed)
            }
            Step::Decode { rows, rounds } => {
                report.kind = StepKind::Decode;
                (report.sequences, report.rows) = (rows.len(), rows.len());
                let call = self.decode_call(&rows, rounds)?;
                let submitted = Instant::now();
                let Sampled { tokens, log_probabilities } = self.executor.decode(call)?;
                let executed = Instant::now();
                let sampled: Vec<(Slot, Vec<u32>)> = rows
                    .iter()
                    .map(|row| {
                        let line = &tokens[row.slot.0 * self.shape.max_rounds..][..rounds];
                        (row.slot, line.iter().take_while(|&&id| id >= 0).map(|&id| id as u32).collect())
                    })
                    .collect();
                for (row, (slot, line)) in rows.iter().zip(&sampled).filter(|_| !log_probabilities.is_empty()) {
                    self.keep(row.id, &log_probabilities[slot.0 * self.shape.max_rounds..][..line.len()]);
                }
                report.rounds = sampled.iter().map(|(_, line)| line.len()).max().unwrap_or(0);
                let timing = &mut self.session.timing;
                timing.decode_device_s += (executed - submitted).as_secs_f64();
                timing.decode_calls += 1;
                timing.decode_steps += report.rounds;
                timing.decode_tokens += sampled.iter().map(|(_, line)| line.len()).sum::<usize>();
                (sampled, submitted, executed)
            }
        };
        report.tokens = sampled.iter().map(|(_, tokens)| tokens.len()).sum();
        let finished: Vec<Finished> =
            sampled.into_iter().filter_map(|(slot, tokens)| self.scheduler.record(slot, &tokens)).collect();
        for sample in &finished {
            self.ended.extend(self.draws.remove(&sample.id).map(|(_, kept)| (sample.id, kept)));
        }

        let Session { progress, timing, .. } = &mut self.session;
        if progress.tokens == 0 && report.tokens > 0 {
            timing.first_token_s = (executed - run_started).as_secs_f64();
        }
        report.submit_s = (submitted - planned).as_secs_f64();
        report.device_s = (executed - submitted).as_secs_f64();
        report.extract_s = executed.elapsed().as_secs_f64();
        timing.host_s += report.plan_s + report.submit_s + report.extract_s;
        *progress = Progress {
            finished: progress.finished + finished.len(),
            tokens: progress.tokens + report.tokens,
            waiting: self.scheduler.waiting(),
            active: self.scheduler.active(),
            pages_used: self.scheduler.pages_used(),
            step: report,
        };
        Ok(Some(finished))
    }

    /// Runs all requests to their end, those submitted before too. `finished` gets each sample as it is done, `progress`
    /// a report per host call; once `cancel` is set the run ends after the current call, and what is not done is dropped.
    ///
    /// # Errors
    /// When a request can never run (then none does), or the device fails, or `finished` does.
    pub fn run(
        &mut self,
        requests: impl IntoIterator<Item = Request>,
        cancel: &AtomicBool,
        finished: impl FnMut(Finished) -> Result<()>,
        progress: impl FnMut(&Progress),
    ) -> Result<Timing> {
        self.run_batches([requests], cancel, finished, progress)
    }

    /// As [`Self::run`], batch by batch: the requests of a batch are submitted when the last one is done. It takes longer
    /// than one run of all, as slots stay idle at the end of each batch, and yields the same samples.
    ///
    /// # Errors
    /// As [`Self::run`]; a request that can never run ends the run when its batch begins.
    pub fn run_batches(
        &mut self,
        batches: impl IntoIterator<Item = impl IntoIterator<Item = Request>>,
        cancel: &AtomicBool,
        mut finished: impl FnMut(Finished) -> Result<()>,
        mut progress: impl FnMut(&Progress),
    ) -> Result<Timing> {
        let mut batches = batches.into_iter().take_while(|_| !cancel.load(Ordering::Relaxed));
        let outcome = batches.try_for_each(|batch| {
            batch.into_iter().try_for_each(|request| self.submit(request))?;
            while !cancel.load(Ordering::Relaxed)
                && let Some(samples) = self.poll()?
            {
                samples.into_iter().try_for_each(&mut finished)?;
                progress(self.progress());
            }
            Ok(())
        });
        self.clear();
        let timing = self.take_timing();
        outcome.map(|()| timing)
    }

    /// Packs a prefill step: sequences in the order of `rows`, their tokens back to back.
    fn prefill_call(&mut self, rows: &[PrefillRow]) -> Result<Call> {
        let [index, generation] = self.draw_rows(rows.iter().map(|row| row.id).enumerate())?;
        let shape = &self.shape;
        let page_size = shape.page_size;
        let mut tokens = vec![0i32; shape.prefill_rows];
        let mut positions = vec![0i32; shape.prefill_rows];
        let mut kv_slots = vec![NO_SLOT; shape.prefill_rows];
        let mut first_rows = vec![0i32; shape.slots + 1];
        let mut kv_lens = vec![0i32; shape.slots];
        let mut sample_rows = vec![0i32; shape.slots];
        let mut table = PageTable::new(shape);
        let mut sampled_positions = vec![0u32; shape.slots];
        let mut at = 0;
        for (sequence, row) in rows.iter().enumerate() {
            let pages = self.scheduler.pages(row.slot);
            table.set(sequence, pages);
            for (offset, &token) in row.tokens.iter().enumerate() {
                let position = row.position + offset;
                tokens[at] = token as i32;
                positions[at] = position as i32;
                kv_slots[at] = slot(pages[position / page_size].0 as i32, page_size, position) as i32;
                at += 1;
            }
            first_rows[sequence + 1] = at as i32;
            kv_lens[sequence] = row.kv_len() as i32;
            sample_rows[sequence] = at as i32 - 1;
            sampled_positions[sequence] = row.kv_len() as u32;
        }
        first_rows[rows.len() + 1..].fill(at as i32);
        self.executor.upload(&[
            ints(tokens),
            ints(positions),
            ints(kv_slots),
            ints(kv_lens),
            table.tensor(),
            ints(first_rows),
            ints(vec![rows.len() as i32]),
            ints(sample_rows),
            words(index),
            words(generation),
            words(sampled_positions),
        ])
    }

    /// Packs a decode step: sequences by slot.
    fn decode_call(&mut self, rows: &[DecodeRow], rounds: usize) -> Result<Call> {
        let [index, generation] = self.draw_rows(rows.iter().map(|row| (row.slot.0, row.id)))?;
        let slots = self.shape.slots;
        let mut tokens = vec![0i32; slots];
        let mut positions = vec![0i32; slots];
        let mut remaining = vec![0i32; slots];
        let mut table = PageTable::new(&self.shape);
        for row in rows {
            let slot = row.slot.0;
            tokens[slot] = row.token as i32;
            positions[slot] = row.position as i32;
            remaining[slot] = rounds as i32;
            table.set(slot, self.scheduler.pages(row.slot));
        }
        self.executor.upload(&[
            ints(tokens),
            ints(positions),
            ints(remaining),
            table.tensor(),
            words(index),
            words(generation),
            HostTensor::scalar(rounds as i32),
        ])
    }
}

fn idle_scheduler(options: &EngineOptions) -> Scheduler {
    Scheduler::new(options.limits, options.stop.clone())
        .with_mixed_steps(options.mixed_steps)
        .with_shared_prefixes(options.reuse_prefixes)
}

/// A page table `i32[slots, pages_per_seq]`; entries that no sequence uses are page 0.
struct PageTable {
    entries: Vec<i32>,
    dims: [usize; 2],
}

impl PageTable {
    fn new(shape: &StepShape) -> Self {
        let dims = [shape.slots, shape.pages_per_seq];
        Self { entries: vec![0; dims[0] * dims[1]], dims }
    }

    fn set(&mut self, row: usize, pages: &[crate::units::PageId]) {
        for (entry, page) in self.entries[row * self.dims[1]..].iter_mut().zip(pages) {
            *entry = page.0 as i32;
        }
    }

    fn tensor(&self) -> HostTensor {
        HostTensor::new(&self.dims, &self.entries)
    }
}

fn ints(values: Vec<i32>) -> HostTensor {
    HostTensor::new(&[values.len()], &values)
}

fn words(values: Vec<u32>) -> HostTensor {
    HostTensor::new(&[values.len()], &values)
}
