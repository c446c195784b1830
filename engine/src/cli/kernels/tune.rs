//! `pagoda tune`: a kernel's candidates, ranked by libtpu's static cycles.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::problem::KernelCommand;
use super::{CompilerArgs, print_answer};
use crate::check::compile::{Cached, user_cache};
use crate::cli::client;
use crate::error::{Error, Result};
use crate::output::write_atomically;
use crate::pjrt::{Kind, PluginChoice};
use crate::tune::peers;

/// What is tuned for, and how.
#[derive(Debug, Args)]
pub(in crate::cli) struct TuneArgs {
    /// A batch to tune for, with a name: query rows, KV tokens and how many such sequences. Repeatable [default: the
    /// kernel's own spread of batches].
    #[arg(long = "batch", global = true, value_name = "NAME=Q/KV[xN],...")]
    batches: Vec<String>,
    /// One batch to tune for.
    #[arg(long, global = true, value_name = "Q/KV[xN],...", conflicts_with = "batches")]
    lengths: Option<String>,
    /// Candidates to compile: the cheapest by the kernel's model, and the planner's choice.
    #[arg(long, global = true, value_name = "N", default_value_t = 16)]
    candidates: usize,
    /// Compilations at a time [default: one for each processor].
    #[arg(long, global = true, value_name = "N")]
    jobs: Option<usize>,
    /// Where the compiler's answers are kept: a run that was stopped goes on where it was [default: the user's cache].
    #[arg(long, global = true, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Also show what peers take for the same work, from a file that scripts/peers.py wrote.
    #[arg(long, global = true, value_name = "FILE")]
    peers: Option<PathBuf>,
    /// Time the candidates on a device of this plugin instead: it must run Mosaic kernels, as a TPU's does.
    #[arg(long, global = true, value_name = "P")]
    measure: Option<String>,
    /// Write a page with everything, heat maps and all, to this file.
    #[arg(long, global = true, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    compiler: CompilerArgs,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
}

/// `pagoda tune`: succeeds when a candidate has an estimate for every batch.
pub(in crate::cli) fn tune(kernel: &KernelCommand, args: &TuneArgs) -> Result<ExitCode> {
    let batches = args.named_batches()?;
    let plan = kernel.plan_over(&batches.iter().map(|(_, lengths)| lengths.as_str()).collect::<Vec<_>>())?;
    for (key, value) in [("candidates", args.candidates), ("jobs", args.jobs.unwrap_or(1))] {
        if value == 0 {
            return Err(Error::setting(key, 0, "leaves nothing to do", "give at least 1"));
        }
    }
    let jobs = args.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} compilations [{elapsed}]");
    bar.set_style(style.map_err(Error::runtime("drawing the progress bar"))?);
    let done = |finished: usize, all: usize| {
        bar.set_length(all as u64);
        bar.set_position(finished as u64);
    };
    let library = PluginChoice::Named(Kind::Tpu).locate()?.path;
    let folder = args.cache.clone().map_or_else(|| Ok(user_cache()?.join("kernels")), Ok::<_, Error>)?;
    let compiler = Cached::new(args.compiler.certifier()?, &library, &folder)?;
    eprintln!("# what the compiler says is kept in {}", folder.display());
    let mut tuned = plan.tuned(&batches, (args.candidates, jobs), &compiler, &done)?;
    bar.finish_and_clear();
    if let Some(path) = &args.peers {
        tuned.peers = peers::read(path, &tuned)?;
    }
    if let Some(plugin) = &args.measure {
        let client = client(plugin, 1)?;
        if !client.platform().eq_ignore_ascii_case("tpu") {
            let limit = format!(
                "runs on {}, which takes the kernel's StableHLO form, and that has no tiles: there is nothing to rank",
                client.platform()
            );
            return Err(Error::setting("measure", plugin, limit, "leave it out: libtpu's static cycles need no TPU"));
        }
        plan.measured(&client, &batches, &mut tuned)?;
    }
    let report = tuned.report();
    if let Some(path) = &args.html {
        write_atomically(path, report.html().as_bytes())?;
    }
    match args.json {
        true => print_answer(&Json(&tuned), true)?,
        false => crate::cli::print(&report.text())?,
    }
    Ok(if tuned.best().is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// As JSON; the table is the report's.
struct Json<'t>(&'t crate::tune::Tuned);

impl super::Answer for Json<'_> {
    fn table(&self) -> String {
        self.0.report().text()
    }

    fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self.0)
    }
}

impl TuneArgs {
    fn named_batches(&self) -> Result<Vec<(String, String)>> {
        if let Some(lengths) = &self.lengths {
            return Ok(vec![("batch".into(), lengths.clone())]);
        }
        let mut named: Vec<(String, String)> = Vec::new();
        for batch in &self.batches {
            let parts = batch.split_once('=').filter(|(name, lengths)| !name.is_empty() && !lengths.is_empty());
            let (name, lengths) = parts.ok_or_else(|| {
                Error::setting("batch", batch, "is not NAME=Q/KV[xN],...", "write e.g. --batch decode=1/4608x8")
            })?;
            if named.iter().any(|(known, _)| known == name) {
                return Err(Error::setting("batch", name, "is given twice", "give each batch a name of its own"));
            }
            named.push((name.to_owned(), lengths.to_owned()));
        }
        Ok(named)
    }
}
