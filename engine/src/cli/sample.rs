//! `pagoda sample`: prompts in, samples out.

use std::cell::RefCell;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::PluginArgs;
use super::place::{self, Place};
use crate::config::{Flags, Settings};
use crate::error::{Error, Result};
use crate::generate::{EngineOptions, SamplingOptions, Timing};
use crate::hosts::Share;
use crate::launcher::Launched;
use crate::llama::Target;
use crate::model::config::LlamaConfig;
use crate::model::identity::identity;
use crate::model::source::Files;
use crate::model::tokenizer::{ChatTemplate, Message, Tokenizer};
use crate::model::weights::Weights;
use crate::mpi::World;
use crate::output::{InOrder, Journal, Record, Run};
use crate::replicas::Replicas;
use crate::scheduler::{Finished, Request, batches};
use crate::stop::StopRule;
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
}

/// Seconds from the start of the process to the first sampled token, by what they went into.
#[derive(Clone, Copy, Debug, Default)]
struct StartUp {
    plugin: f64,
    load: f64,
    compile: f64,
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
    let config = LlamaConfig::open(folder)?;
    let tokenizer_path = settings.tokenizer()?;
    let tokenizer = Tokenizer::open(&tokenizer_path, &config)?;
    let weights = Weights::open(folder)?;
    for name in weights.check(&config)? {
        log::warn!("{}: tensor {name} is not used", folder.display());
    }
    let prompts = Prompts::encode(&settings, &tokenizer)?;
    let lengths: Vec<usize> = prompts.tokens.iter().map(Vec::len).collect();
    let limits = settings.limits(&lengths, config.max_position_embeddings)?;
    let compute = settings.compute().element();
    let options = EngineOptions {
        limits,
        compute,
        target: Target::Portable, // settled with the client
        sampling: SamplingOptions {
            temperature: settings.temperature,
            top_k: settings.top_k.map(|k| u32::try_from(k).unwrap_or(u32::MAX)),
            top_p: Some(settings.top_p),
            seed: settings.engine.seed,
        },
        stop: stop_rule(&settings, &config, &tokenizer)?,
        mixed_steps: settings.engine.mixed_steps,
    };
    let place = Place::take(&args.plugin, &settings, launched.share, world)?;
    let placement = &place.placement;
    placement.parallel().check(&config)?;
    if placement.writes() {
        eprint!("{settings}");
    }
    eprintln!("# {launched}; {placement}");
    let departures = if args.config.is_some() { settings.departures(&lengths, &limits) } else { Vec::new() };
    for note in settings.notes().iter().chain(&departures) {
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
    let output = Output::new(format, out, &run, share, &prompts, &tokenizer)?;
    let cancel = interrupt_flag(world.is_some());
    let missing = place::alike(world, run.samples(share), output.missing());
    if !missing.is_empty() {
        let mut start = StartUp::default();
        let mut engine = start.engine(args, &config, &weights, &place, options)?;
        let request = |id: &SampleId| Request {
            id: *id,
            prompt: prompts.tokens[id.index].as_slice().into(),
            max_new_tokens: settings.max_new_tokens,
        };
        let batches = batches(&missing, settings.max_prompts_per_batch).map(|batch| batch.iter().map(request));
        let timing = engine.run_batches(
            batches,
            &cancel,
            |sample| output.finish(sample),
            |state| {
                output.bar.set_message(format!("{} tokens, {} KV pages used", state.tokens, state.pages_used));
                output.bar.set_position(state.finished as u64);
            },
        )?;
        output.bar.finish_and_clear();
        start.report(&timing);
    }
    output.close(cancel.load(Ordering::Relaxed))
}

impl StartUp {
    fn engine(
        &mut self,
        args: &SampleArgs,
        config: &LlamaConfig,
        weights: &Weights,
        place: &Place,
        mut options: EngineOptions,
    ) -> Result<Replicas> {
        let Place { client, placement, plugin_s } = place;
        options.target = args.plugin.target(client)?;
        eprintln!("# plugin {client:?}, kernels {}", options.target);
        options.check_memory(client, config, placement.parallel(), &Vec::from_iter(0..placement.devices().get()))?;
        self.plugin = *plugin_s;
        let started = Instant::now();
        let engines = Replicas::of_groups(client, config, weights, placement.groups().to_vec(), &options)?;
        self.compile = engines.compile_time().as_secs_f64();
        self.load = started.elapsed().as_secs_f64() - self.compile;
        Ok(engines)
    }

    /// What the run took, on stderr.
    fn report(&self, timing: &Timing) {
        let total = timing.prefill_device_s + timing.decode_device_s + timing.host_s;
        let first = self.plugin + self.load + self.compile + timing.first_token_s;
        eprintln!(
            "# {} tokens decoded in {:.2} s ({:.0} tokens/s, {:.3} ms a step, host {:.1}% of the run)",
            timing.decode_tokens,
            timing.decode_device_s,
            timing.decode_tokens as f64 / timing.decode_device_s.max(1e-9),
            1e3 * timing.decode_device_s / timing.decode_steps.max(1) as f64,
            100.0 * timing.host_s / total.max(1e-9),
        );
        eprintln!(
            "# first token after {first:.2} s: plugin {:.2}, load {:.2}, compile {:.2}, prefill {:.3}",
            self.plugin, self.load, self.compile, timing.first_token_s,
        );
    }
}

fn stop_rule(settings: &Settings, config: &LlamaConfig, tokenizer: &Tokenizer) -> Result<StopRule> {
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

/// Where finished samples go: the journal, stdout, the progress bar.
struct Output<'r> {
    run: &'r Run,
    prompts: &'r Prompts,
    tokenizer: &'r Tokenizer,
    format: Format,
    bar: ProgressBar,
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
        // indicatif draws on stderr, and only where that is a terminal.
        let bar = ProgressBar::new(missing.len() as u64);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} samples, {msg} [{elapsed}]");
        bar.set_style(style.map_err(Error::runtime("drawing the progress bar"))?);
        let done: Vec<Record> = journal.iter().flat_map(|journal| journal.finished().values().cloned()).collect();
        if !done.is_empty() {
            eprintln!("# {} of {} samples were finished by an earlier run", done.len(), samples.len());
        }
        let state = RefCell::new(State { journal, in_order: InOrder::new(samples), missing });
        let output = Self { run, prompts, tokenizer, format, bar, state };
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
        self.bar
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
