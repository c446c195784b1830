//! `pagoda check`: whether a job fits a TPU slice, how long it takes, and what to change; needs no TPU and no weights.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use super::sample::Prompts;
use crate::certify::Certifier;
use crate::check::compile::{Answer, Cached, Compiler, Manifest, ManifestEntry, Unit, user_cache};
use crate::check::plan::{Job, Plan, Sample};
use crate::check::{self, Counted, Findings, Layout, Question, jax_v2};
use crate::config::{Flags, InferenceMode, Settings};
use crate::error::{Error, Result};
use crate::generate::SamplingOptions;
use crate::model::ModelSpec;
use crate::model::source::Files;
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
    let folder = settings.model(Files::Config)?;
    let config = ModelSpec::open(&folder)?;
    let (lengths, counted) = lengths(&settings, &config)?;
    let limits = settings.limits(&lengths, config.max_position_embeddings)?;
    let devices = NonZeroUsize::new(topology.devices()).expect("a slice has a chip");
    let mesh = settings.trainer.mesh.axes.map(|axes| axes.resolve(devices)).transpose()?;
    let library = PluginChoice::Named(Kind::Tpu).locate();
    let sampling = SamplingOptions {
        temperature: settings.temperature,
        top_k: settings.top_k.map(|k| u32::try_from(k).unwrap_or(u32::MAX)),
        top_p: Some(settings.top_p),
        seed: settings.engine.seed,
    };
    let mut job = Job {
        limits,
        compute: settings.compute().element(),
        kv_cache: settings.kv_cache(),
        sampling: sampling.kind(),
        max_new_tokens: settings.max_new_tokens,
        samples: samples(&lengths, &settings),
        prefill_asked: settings.engine.max_prefill_size.unwrap_or(limits.max_prefill_size),
        prompts_per_batch: settings.max_prompts_per_batch,
        mixed_steps: settings.engine.mixed_steps,
        hbm: check::plan::data_sheet_hbm(topology.chip()),
        topology,
        config,
    };
    let question = Question {
        model_name: folder.file_name().map_or_else(|| "the model".into(), |name| name.to_string_lossy().into_owned()),
        counted,
        may_stop: settings.stop_sequence.is_some()
            || settings.ignore_eos != Some(true) && !job.config.eos_token_ids.is_empty(),
        jax_tiles: jax_tiles(&settings),
        one_engine: settings.inference_mode != Some(InferenceMode::HostDataParallel),
    };
    if args.layout == Layout::JaxV2 {
        let plan = Plan::new(&job, mesh)?;
        let report = check::jax_report(&plan, &question);
        return show(args, &report);
    }
    let certifier = Certifier::of_this_executable()?.timeout(Duration::from_secs(args.timeout));
    let cache = args.cache.clone().map_or_else(user_cache, Ok)?;
    let compiler = Cached::new(certifier, &library?.path, &cache)?;
    job.hbm = check::device_memory(&compiler, &job.topology)?;
    let plan = Plan::new(&job, mesh)?;
    eprintln!("# {}, mesh {}: compiling for {}", job.topology, plan.mesh, plan.group.libtpu_name());
    let done = |unit: &Unit, answer: &Answer| {
        let said = match answer {
            Answer::Certified(certificate) => format!("{:.1} s", certificate.seconds),
            Answer::Failed(why) => why.clone(),
        };
        eprintln!("# {:>5.1} s  {}: {said}", started.elapsed().as_secs_f64(), unit.name);
    };
    let findings = check::find_out(plan, &compiler, &done)?;
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
fn lengths(settings: &Settings, config: &ModelSpec) -> Result<(Vec<usize>, Counted)> {
    let found = settings.tokenizer().ok().map(|path| if path.is_dir() { path.join("tokenizer.json") } else { path });
    let Some(file) = found.filter(|file| file.is_file()) else {
        let estimate = |prompt: &String| 1 + prompt.chars().count().div_ceil(4);
        return Ok((settings.prompts.iter().map(estimate).collect(), Counted::Characters));
    };
    let prompts = Prompts::encode(settings, &Tokenizer::open(&file, config)?)?;
    Ok((prompts.tokens.iter().map(Vec::len).collect(), Counted::Tokenizer))
}

/// Tiles that the config gives JAX's kernel; what it leaves open beside one of them is Levanter's default.
fn jax_tiles(settings: &Settings) -> Option<jax_v2::Tiles> {
    const LEVANTER: usize = 16;
    let given = [settings.model.ragged_paged_q_block_size, settings.model.ragged_paged_kv_block_pages];
    let [queries, kv_pages] = given.map(|size| size.unwrap_or(LEVANTER));
    given.iter().any(Option::is_some).then_some(jax_v2::Tiles { queries, kv_pages })
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

/// Copies the executables into `folder`, under the names of their programs' keys, with a list of them.
fn write_executables(findings: &Findings, compiler: &Cached, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let mut programs = Vec::new();
    for step in &findings.steps {
        let Some(from) = compiler.executable(&step.unit) else { continue };
        let file = from.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = std::fs::read(&from).map_err(Error::io("read", &from))?;
        let to = folder.join(&file);
        write_atomically(&to, &bytes)?;
        eprintln!("# {}: {}", step.unit.name, to.display());
        let Unit { topology, replicas, .. } = step.unit.clone();
        programs.push(ManifestEntry { program: step.program.name(), file, topology, replicas });
    }
    let manifest = Manifest { compiler: findings.compiler.clone(), programs };
    let text = serde_json::to_string_pretty(&manifest).map_err(Error::runtime("writing JSON"))?;
    write_atomically(&folder.join("executables.json"), text.as_bytes())
}
