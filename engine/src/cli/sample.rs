//! `pagoda sample`: prompts in, samples out.

use std::cell::RefCell;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::Args;
use pagoda_ir::Bytes;

use super::PluginArgs;
use super::monitor::{Monitor, MonitorArgs};
use super::place::{self, Place};
use crate::check::launches::launches;
use crate::check::plan::Program;
use crate::config::{Flags, Settings};
use crate::error::{Error, Result};
use crate::generate::{EngineOptions, SamplingOptions};
use crate::hosts::Share;
use crate::launcher::Launched;
use crate::llama::{Target, weight_types};
use crate::memory::Room;
use crate::model::ModelSpec;
use crate::model::identity::identity;
use crate::model::source::Files;
use crate::model::tokenizer::{ChatTemplate, Message, Tokenizer};
use crate::model::weights::Weights;
use crate::mpi::World;
use crate::output::{InOrder, Journal, Record, Run};
use crate::replicas::Replicas;
use crate::scheduler::{Finished, Request, batches};
use crate::stop::StopRule;
use crate::timeline::StartUp;
use crate::units::SampleId;

/// Exit code after Ctrl-C, as shells expect it (128 + SIGINT).
const INTERRUPTED: u8 = 130;

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("source").required(true).multiple(true).args(["config", "hf_checkpoint"]))]
pub(super) struct SampleArgs {
    /// A Levanter sampler YAML; flags win over it.
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Flags,
    #[command(flatten)]
    plugin: PluginArgs,
    /// Write samples to JSONL files in this folder; a rerun continues where the last one ended.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Hosts that share the prompts, each running this command with its own --host-id [default: as the launcher says].
    #[arg(long, value_name = "N")]
    hosts: Option<usize>,
    /// This host, counted from 0 [default: as the launcher says].
    #[arg(long, value_name = "I")]
    host_id: Option<usize>,
    /// Print one JSON object per finished sample on stdout, in prompt order, and nothing else there.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    monitor: MonitorArgs,
}

/// The prompts of a run, as text and as tokens.
pub(super) struct Prompts {
    texts: Vec<String>,
    pub(super) tokens: Vec<Vec<u32>>,
}

impl Prompts {
    pub(super) fn encode(settings: &Settings, tokenizer: &Tokenizer) -> Result<Self> {
        let template = settings.chat.then(|| ChatTemplate::open(&settings.model(Files::Tokenizer)?)).transpose()?;
        let encode = |prompt: &String| match &template {
            None => tokenizer.encode(prompt),
            Some(template) => {
                let message = Message { role: "user".into(), content: prompt.clone() };
                tokenizer.encode_plain(&template.render(&[message], true)?)
            }
        };
        let tokens = settings.prompts.iter().map(encode).collect::<Result<_>>()?;
        Ok(Self { texts: settings.prompts.clone(), tokens })
    }
}

/// Runs the command.
pub(super) fn sample(args: &SampleArgs) -> Result<ExitCode> {
    let mut world = None;
    let outcome = run(args, &mut world);
    place::end_together(world.as_ref(), outcome)
}

fn run(args: &SampleArgs, world: &mut Option<World>) -> Result<ExitCode> {
    let settings = Settings::resolve(args.config.as_deref(), &args.settings)?;
    let launched = Launched::here(args.host_id, args.hosts)?;
    let out = args.out.clone().or_else(|| settings.output_folder());
    let hosts = launched.share.hosts();
    if hosts > 1 && out.is_none() {
        let fix = "name the folder that all hosts write into, and join it with `pagoda merge`";
        return Err(Error::setting("--out", "none", format!("leaves {hosts} hosts nowhere to write"), fix));
    }
    let folder = &settings.model(Files::Model)?;
    let config = ModelSpec::open(folder)?;
    let tokenizer_path = settings.tokenizer()?;
    let tokenizer = Tokenizer::open(&tokenizer_path, &config)?;
    let weights = Weights::open(folder)?;
    warn_of_unused(&weights.check(&config)?, folder);
    let prompts = Prompts::encode(&settings, &tokenizer)?;
    let lengths: Vec<usize> = prompts.tokens.iter().map(Vec::len).collect();
    let limits = settings.limits(&lengths, config.max_position_embeddings)?;
    let compute = settings.compute().element();
    let options = EngineOptions {
        limits,
        compute,
        matrices: compute,
        kv_cache: settings.kv_cache(),
        target: Target::Portable, // settled with the client
        sampling: SamplingOptions {
            temperature: settings.temperature,
            top_k: settings.top_k.map(|k| u32::try_from(k).unwrap_or(u32::MAX)),
            top_p: Some(settings.top_p),
            seed: settings.engine.seed,
        },
        stop: stop_rule(&settings, &config, &tokenizer)?,
        mixed_steps: settings.engine.mixed_steps,
        reuse_prefixes: settings.engine.reuse_prefixes,
    };
    let place = Place::take(&args.plugin, &settings, launched.share, world)?;
    let placement = &place.placement;
    placement.parallel().check(&config)?;
    if placement.writes() {
        eprint!("{settings}");
    }
    eprintln!("# {launched}; {placement}");
    let departures = if args.config.is_some() { settings.departures(&lengths, &limits) } else { Vec::new() };
    for note in settings.notes().iter().chain(&departures).chain(&config.notes(limits.max_seq_len)) {
        eprintln!("# {note}");
    }
    eprintln!(
        "# {} of weights; {} slots, {} KV pages of {} tokens, {} prompt tokens per prefill{}",
        weights.size(),
        limits.max_seqs,
        limits.max_pages,
        limits.page_size.tokens(),
        limits.max_prefill_size,
        if settings.engine.mixed_steps { ", which carries decoding sequences along" } else { "" },
    );

    let run = Run::new(&settings, &identity(folder, &tokenizer_path, &weights, settings.chat)?);
    let world = world.as_ref();
    place::agree(
        world,
        [run.identity.as_bytes(), placement.mesh().to_string().as_bytes(), format!("{limits:?}").as_bytes()],
    )?;
    let share = placement.share();
    let out = out.as_deref().filter(|_| placement.writes());
    let format = match placement.writes() {
        true if args.json => Format::Json,
        true => Format::Text,
        false => Format::Nothing,
    };
    let mut output = Output::new(format, out, &run, share, &prompts, &tokenizer)?;
    let cancel = interrupt_flag(world.is_some());
    let missing = place::alike(world, run.samples(share), output.missing());
    if !missing.is_empty() {
        let mut start_up = StartUp::default();
        let (mut engines, pages) = load(args, &settings, &config, &weights, &place, options, &mut start_up)?;
        output.monitor.begin(start_up, pages, settings.engine.debug_stats_every_n);
        if let Some(watchdog) = args.monitor.watchdog() {
            engines.watch(&watchdog);
        }
        let request = |id: &SampleId| Request {
            id: *id,
            prompt: prompts.tokens[id.index].as_slice().into(),
            max_new_tokens: settings.max_new_tokens,
        };
        let batches = batches(&missing, settings.max_prompts_per_batch).map(|batch| batch.iter().map(request));
        let finish = |sample| output.monitor.assemble(|| output.finish(sample));
        engines.run_batches(batches, &cancel, finish, |state| output.monitor.step(state))?;
        let of_run = out.map(|folder| folder.join(share.file_name("summary.json")));
        let print = settings.engine.log_decode_perf_summary;
        output.monitor.end(&args.monitor, placement.writes(), print, of_run.as_deref())?;
    }
    output.close(cancel.load(Ordering::Relaxed))
}

/// Says which tensors of a model's files are not used: of many, as a model of images has them, the first.
pub(super) fn warn_of_unused(names: &[&str], folder: &Path) {
    let folder = folder.display();
    match names {
        [] => {}
        [first, _, _, _, _, ..] => log::warn!("{folder}: {} tensors are not used: {first} and others", names.len()),
        few => few.iter().for_each(|name| log::warn!("{folder}: tensor {name} is not used")),
    }
}

/// Loads the model onto this process's devices and compiles the step programs: the engines, and the pages of all of them.
fn load(
    args: &SampleArgs,
    settings: &Settings,
    config: &ModelSpec,
    weights: &Weights,
    place: &Place,
    options: EngineOptions,
    start_up: &mut StartUp,
) -> Result<(Replicas, usize)> {
    let Place { client, placement, plugin_s } = place;
    let (parallel, devices) = (placement.parallel(), Vec::from_iter(0..placement.devices().get()));
    let mut options = options.on(args.plugin.target(client)?, config, weights);
    eprintln!("# plugin {client:?}, kernels {}", options.kernels());
    for note in settings.model.not_applied(options.target) {
        eprintln!("# {note}");
    }
    if let Target::TileMachine(chip) | Target::Tpu(chip) = options.target {
        for program in Program::ALL {
            let kernels = launches(config, &options.shape(parallel), chip, program)?;
            let kernels: Vec<_> =
                kernels.iter().map(|kernel| format!("{} {}", kernel.role, kernel.plan.name())).collect();
            eprintln!("# {}: {}", program.name(), kernels.join(", "));
        }
    }
    // Hosts must agree on the pages without asking each other.
    if placement.share().hosts() == 1 && !placement.spans_processes() {
        fit_pages(settings, config, place, &mut options)?;
    }
    options.check_memory(client, config, parallel, &devices)?;
    start_up.plugin_s = *plugin_s;
    let pages = placement.groups().len() * options.limits.max_pages;
    let started = Instant::now();
    let engines = Replicas::of_groups(client, config, weights, placement.groups().to_vec(), &options)?;
    start_up.compile_s = engines.compile_time().as_secs_f64();
    start_up.load_s = started.elapsed().as_secs_f64() - start_up.compile_s;
    Ok((engines, pages))
}

/// Where `engine.max_pages` is not given: as many pages as fit into the memory that is left.
///
/// # Errors
/// When a device does not say what it has.
pub(super) fn fit_pages(
    settings: &Settings,
    config: &ModelSpec,
    Place { client, placement, .. }: &Place,
    options: &mut EngineOptions,
) -> Result<()> {
    let (parallel, devices) = (placement.parallel(), Vec::from_iter(0..placement.devices().get()));
    if settings.engine.max_pages.is_none()
        && let Some(room) = Room::of(client, &devices)?
    {
        let asked = options.limits.max_pages;
        let shape = options.shape(parallel);
        let weights = weight_types(config, &shape).iter().map(|ty| Bytes(ty.bytes() as u64)).sum();
        let cache = shape.kv_type(config);
        options.limits.max_pages = settings.pages(&options.limits, &room, weights, &cache);
        if options.limits.max_pages < asked {
            let (pages, share) = (options.limits.max_pages, settings.engine.hbm_utilization);
            eprintln!("# {pages} KV pages, not {asked}: engine.hbm_utilization = {share} of the {} left", room.left);
        }
    }
    Ok(())
}

fn stop_rule(settings: &Settings, config: &ModelSpec, tokenizer: &Tokenizer) -> Result<StopRule> {
    let sequence = settings.stop_sequence.as_deref().map(|text| tokenizer.encode_plain(text)).transpose()?;
    settings.check_stop(sequence.as_ref().map_or(0, Vec::len))?;
    let eos = if settings.ignore_eos == Some(true) { Vec::new() } else { config.eos_token_ids.clone() };
    Ok(StopRule::new(eos, sequence.into_iter().collect()))
}

/// A flag that Ctrl-C raises. A second Ctrl-C ends the process at once; so does the first, where other processes would wait for
/// the next step of this one (`together`).
fn interrupt_flag(together: bool) -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&flag);
    let set = ctrlc::set_handler(move || {
        if raised.swap(true, Ordering::Relaxed) || together {
            std::process::exit(i32::from(INTERRUPTED));
        }
        eprintln!("interrupted: finishing the current step (again to quit at once)");
    });
    if let Err(error) = set {
        log::warn!("Ctrl-C ends the run at once: {error}");
    }
    flag
}

/// How samples are printed on stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Text,
    Json,
    /// Not at all: another process of the replica prints them.
    Nothing,
}

/// Where finished samples go: the journal, and stdout; and what is shown meanwhile.
struct Output<'r> {
    run: &'r Run,
    prompts: &'r Prompts,
    tokenizer: &'r Tokenizer,
    format: Format,
    monitor: Monitor,
    state: RefCell<State>,
}

struct State {
    journal: Option<Journal>,
    in_order: InOrder,
    missing: Vec<SampleId>,
}

impl<'r> Output<'r> {
    /// Opens the journal, if there is one, and prints what earlier runs have finished already.
    fn new(
        format: Format,
        out: Option<&Path>,
        run: &'r Run,
        share: Share,
        prompts: &'r Prompts,
        tokenizer: &'r Tokenizer,
    ) -> Result<Self> {
        let journal = out.map(|dir| Journal::open(dir, share, run.clone())).transpose()?;
        let samples = run.samples(share);
        let missing = journal.as_ref().map_or_else(|| samples.clone(), Journal::missing);
        let monitor = Monitor::new(missing.len())?;
        let done: Vec<Record> = journal.iter().flat_map(|journal| journal.finished().values().cloned()).collect();
        if !done.is_empty() {
            eprintln!("# {} of {} samples were finished by an earlier run", done.len(), samples.len());
        }
        let state = RefCell::new(State { journal, in_order: InOrder::new(samples), missing });
        let output = Self { run, prompts, tokenizer, format, monitor, state };
        for record in done {
            output.emit(record)?;
        }
        Ok(output)
    }

    fn missing(&self) -> Vec<SampleId> {
        self.state.borrow().missing.clone()
    }

    /// Keeps a finished sample, then prints whatever is next in prompt order.
    fn finish(&self, sample: Finished) -> Result<()> {
        let text = self.tokenizer.decode(&sample.tokens[..sample.text_tokens])?;
        let prompt = self.prompts.texts[sample.id.index].clone();
        let record = Record::new(self.run, sample, prompt, text);
        if let Some(journal) = &mut self.state.borrow_mut().journal {
            journal.append(record.clone())?;
        }
        self.emit(record)
    }

    fn emit(&self, record: Record) -> Result<()> {
        let ready = self.state.borrow_mut().in_order.push(record);
        self.print(&ready)
    }

    fn print(&self, records: &[Record]) -> Result<()> {
        if records.is_empty() || self.format == Format::Nothing {
            return Ok(());
        }
        let emphasise = std::io::stdout().is_terminal();
        self.monitor
            .suspend(|| {
                let mut out = std::io::stdout().lock();
                for record in records {
                    if self.format == Format::Json {
                        out.write_all(record.line().as_bytes())?;
                    } else if emphasise {
                        writeln!(out, "[{}] \x1b[1m{}\x1b[0m{}\n", record.index, record.prompt, record.text)?;
                    } else {
                        writeln!(out, "[{}] {}{}\n", record.index, record.prompt, record.text)?;
                    }
                }
                out.flush()
            })
            .map_err(Error::runtime("writing to stdout"))
    }

    /// Completes the journal, or after an interruption prints what finished out of order.
    fn close(self, interrupted: bool) -> Result<ExitCode> {
        let state =
            self.state.replace(State { journal: None, in_order: InOrder::new(Vec::new()), missing: Vec::new() });
        let rest = state.in_order.rest();
        self.print(&rest)?;
        if interrupted {
            if state.journal.is_some() {
                eprintln!("# interrupted: what was finished is kept; run the same command again to go on");
            }
            return Ok(ExitCode::from(INTERRUPTED));
        }
        if let Some(journal) = state.journal {
            eprintln!("# wrote {}", journal.complete()?.display());
        }
        Ok(ExitCode::SUCCESS)
    }
}
