//! `pagoda check`: whether a job fits a TPU slice, how long it takes, and what to change; needs no TPU and no weights.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use crate::certify::Certifier;
use crate::check::compile::{Answer, Cached, Compiler, Unit, user_cache};
use crate::check::plan::{Job, Plan, Sample};
use crate::check::{self, Counted, Findings, Layout, Question, jax_v2};
use crate::config::{Flags, Settings};
use crate::error::{Error, Result};
use crate::generate::SamplingOptions;
use crate::model::config::LlamaConfig;
use crate::model::tokenizer::Tokenizer;
use crate::output::write_atomically;
use crate::pjrt::{Kind, PluginChoice};
use crate::report::Report;
use crate::topology::Topology;
use crate::units::SampleId;

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("source").required(true).multiple(true).args(["config", "hf_checkpoint"]))]
pub(super) struct CheckArgs {
    /// A Levanter sampler YAML; flags win over it.
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Flags,
    /// The slice: v5p-64, v5litepod-16, v6e-8, tpu7x-8, or libtpu's own name, v5p:2x4x4.
    #[arg(long, value_name = "SLICE")]
    topology: String,
    /// The mesh, data=8,model=4 or model=4 [default: the config's, or the smallest model axis that fits].
    #[arg(long, value_name = "AXES")]
    mesh: Option<String>,
    /// Whose attention kernel.
    #[arg(long, value_enum, default_value_t)]
    layout: Layout,
    /// Write the step programs' executables into this folder, for hosts to load.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Write the report as one HTML page.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Where the compiler's answers are kept [default: $XDG_CACHE_HOME/pagoda, or ~/.cache/pagoda].
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Seconds for one compilation.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command. Exit codes: 0 it fits, 1 it does not or nobody knows, 2 the input must change.
pub(super) fn check(args: &CheckArgs) -> Result<ExitCode> {
    let started = Instant::now();
    let topology = Topology::parse(&args.topology)?;
    let settings = Settings::resolve(args.config.as_deref(), &args.settings)?;
    let folder = settings.model()?;
    let config = LlamaConfig::open(folder)?;
    let (lengths, counted) = lengths(&settings, &config)?;
    let limits = settings.limits(&lengths, config.max_position_embeddings)?;
    let model = model_axis(args, &topology)?;
    let library = PluginChoice::Named(Kind::Tpu).locate();
    let mut job = Job {
        limits,
        compute: settings.engine.compute_dtype.element(),
        max_new_tokens: settings.max_new_tokens,
        samples: samples(&lengths, &settings),
        hbm: check::plan::data_sheet_hbm(topology.chip()),
        topology,
        config,
    };
    let sampling = SamplingOptions {
        temperature: settings.temperature,
        top_k: settings.top_k.map(|k| u32::try_from(k).unwrap_or(u32::MAX)),
        top_p: Some(settings.top_p),
        seed: settings.engine.seed,
    };
    let question = Question {
        model_name: folder.file_name().map_or_else(|| "the model".into(), |name| name.to_string_lossy().into_owned()),
        model,
        counted,
        sampling: sampling.kind(),
        may_stop: settings.stop_sequence.is_some() || !job.config.eos_token_ids.is_empty(),
        jax_tiles: None::<jax_v2::Tiles>,
        one_engine: false,
    };
    if args.layout == Layout::JaxV2 {
        let plan = Plan::new(&job, model)?;
        let report = check::jax_report(&plan, &question);
        return show(args, &report);
    }
    let certifier = Certifier::of_this_executable()?.timeout(Duration::from_secs(args.timeout));
    let cache = args.cache.clone().map_or_else(user_cache, Ok)?;
    let compiler = Cached::new(certifier, &library?.path, &cache)?;
    job.hbm = check::device_memory(&compiler, &job.topology)?;
    let plan = Plan::new(&job, model)?;
    eprintln!("# {}, mesh {}: compiling for {}", job.topology, plan.mesh, plan.group.libtpu_name());
    let done = |unit: &Unit, answer: &Answer| {
        let said = match answer {
            Answer::Certified(certificate) => format!("{:.1} s", certificate.seconds),
            Answer::Failed(why) => why.clone(),
        };
        eprintln!("# {:>5.1} s  {}: {said}", started.elapsed().as_secs_f64(), unit.name);
    };
    let findings = check::find_out(plan, &question, &compiler, &done)?;
    if let Some(folder) = &args.out {
        write_executables(&findings, &compiler, folder)?;
    }
    let report = check::report(&findings, &question);
    show(args, &report)?;
    Ok(if findings.fits() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints the report, and writes the page.
fn show(args: &CheckArgs, report: &Report) -> Result<ExitCode> {
    if let Some(path) = &args.html {
        write_atomically(path, report.html().as_bytes())?;
    }
    match args.json {
        true => super::print_json(report)?,
        false => super::print(&report.text())?,
    }
    let bad = report.verdict.status != crate::report::Status::Good;
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Tokens of each prompt.
fn lengths(settings: &Settings, config: &LlamaConfig) -> Result<(Vec<usize>, Counted)> {
    let path = settings.tokenizer()?;
    let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
    if !file.is_file() {
        let estimate = |prompt: &String| 1 + prompt.chars().count().div_ceil(4);
        return Ok((settings.prompts.iter().map(estimate).collect(), Counted::Characters));
    }
    let tokenizer = Tokenizer::open(path, config)?;
    let count = |prompt: &String| tokenizer.encode(prompt).map(|tokens| tokens.len());
    Ok((settings.prompts.iter().map(count).collect::<Result<_>>()?, Counted::Tokenizer))
}

/// The samples of the run, in the order in which they are made.
fn samples(lengths: &[usize], settings: &Settings) -> Vec<Sample> {
    let rounds = 0..settings.n_rounds as u32;
    let samples = rounds.flat_map(|round| {
        lengths.iter().enumerate().flat_map(move |(index, &prompt)| {
            let generations = 0..settings.n_generations as u32;
            generations.map(move |generation| Sample { id: SampleId { round, index, generation }, prompt })
        })
    });
    samples.collect()
}

/// The model axis that was asked for.
fn model_axis(args: &CheckArgs, topology: &Topology) -> Result<Option<NonZeroUsize>> {
    let Some(text) = &args.mesh else { return Ok(None) };
    let bad = |limit: &str| Error::setting("--mesh", text, limit, "write data=8,model=4, or model=4");
    let mut axes = [None, None];
    for axis in text.split(',') {
        let (name, size) = axis.split_once('=').ok_or_else(|| bad("is not a list of axes"))?;
        let at = ["data", "model"].iter().position(|known| *known == name.trim());
        let at = at.ok_or_else(|| bad("has an axis that is neither data nor model"))?;
        let size: NonZeroUsize = size.trim().parse().map_err(|_| bad("has a size that is not a number above 0"))?;
        axes[at] = Some(size);
    }
    let [data, model] = axes;
    let devices = topology.devices();
    match (data, model) {
        (Some(data), model) => {
            let model = model.map_or_else(|| devices / data, NonZeroUsize::get);
            if data.get() * model != devices {
                let limit = format!("has {} devices, and {} has {devices}", data.get() * model, topology.name());
                return Err(bad(&limit));
            }
            Ok(NonZeroUsize::new(model))
        }
        (None, model) => Ok(model),
    }
}

/// Copies the executables into `folder`, under the names of their programs' keys.
fn write_executables(findings: &Findings, compiler: &Cached, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    for step in &findings.steps {
        let Some(from) = compiler.executable(&step.unit) else { continue };
        let bytes = std::fs::read(&from).map_err(Error::io("read", &from))?;
        let to = folder.join(from.file_name().unwrap_or_default());
        write_atomically(&to, &bytes)?;
        eprintln!("# {}: {}", step.unit.name, to.display());
    }
    Ok(())
}
