//! `pagoda plan | certify | emit | inspect | run`: one kernel at a time, from its problem to its verdict.

mod arrays;
mod devices;
mod explain;
mod file;
mod inspect;
mod module;
mod operands;
mod problem;
mod profile;
mod program;
mod report;
mod results;
mod run;
mod sources;
mod tune;

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use pagoda_ir::Context;
use serde::Serialize;

use crate::certify::Certifier;
use crate::cli::print;
use crate::error::{Error, Result};
use crate::output::write_atomically;

pub(super) use file::run_if_asked;
pub(super) use inspect::inspect;
pub(super) use module::{ModuleArgs, certify_module};
pub(super) use problem::{KernelCommand, Launch, NAMES};
pub(super) use run::{RunArgs, run};
pub(super) use tune::{TuneArgs, tune};

/// What a command answers: a table for people, JSON for machines.
pub(super) trait Answer {
    fn table(&self) -> String;
    fn json(&self) -> serde_json::Result<String>;
}

impl<T: Display + Serialize> Answer for T {
    fn table(&self) -> String {
        self.to_string()
    }

    fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }
}

fn print_answer(answer: &dyn Answer, json: bool) -> Result<()> {
    let text = if json { answer.json().map_err(Error::runtime("writing JSON"))? } else { answer.table() };
    print(text.trim_end())
}

/// `pagoda plan`, for launches over batches of these `lengths` where there are some.
pub(super) fn plan(kernel: &KernelCommand, lengths: &[String], json: bool) -> Result<ExitCode> {
    let lengths: Vec<&str> = lengths.iter().map(String::as_str).collect();
    print_answer(&*kernel.plan_over(&lengths)?.answer(), json)?;
    Ok(ExitCode::SUCCESS)
}

/// How long the compiler may take.
#[derive(Debug, Args)]
pub(super) struct CompilerArgs {
    /// Seconds for one compilation.
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 180)]
    timeout: u64,
    /// Seconds for a first compilation, with the compiler's static profile; after that the kernel is compiled again without
    /// the profile, and no cycle count is reported.
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 60)]
    profile_timeout: u64,
}

impl CompilerArgs {
    fn certifier(&self) -> Result<Certifier> {
        let &Self { timeout, profile_timeout } = self;
        if timeout == 0 {
            return Err(Error::setting("timeout", timeout, "leaves the compiler no time", "give at least 1 second"));
        }
        let [timeout, profile_timeout] = [timeout, profile_timeout].map(Duration::from_secs);
        Ok(Certifier::of_this_executable()?.timeout(timeout).profile_timeout(profile_timeout))
    }
}

/// `pagoda certify`: succeeds when the kernel compiles.
pub(super) fn certify(
    kernel: &KernelCommand,
    compiler: &CompilerArgs,
    lengths: Option<&str>,
    json: bool,
) -> Result<ExitCode> {
    // What is wrong with the problem is printed before libtpu is looked for.
    let plan = kernel.plan_over(&lengths.into_iter().collect::<Vec<_>>())?;
    let (certified, compiles) = plan.certified(&compiler.certifier()?, lengths)?;
    print_answer(&*certified, json)?;
    Ok(if compiles { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Which form of a kernel is written, and where.
#[derive(Debug, Args)]
pub(super) struct EmitArgs {
    /// The StableHLO module that carries the kernel in its wire form, as libtpu takes it.
    #[arg(long, global = true)]
    wire: bool,
    /// The same function as plain StableHLO, for any PJRT plugin.
    #[arg(long, global = true, conflicts_with = "wire")]
    stablehlo: bool,
    /// The file to write, whole or not at all [default: stdout].
    #[arg(long, global = true, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// `pagoda emit`: readable Mosaic, or a StableHLO module. The first line says how to get the same again.
pub(super) fn emit(kernel: &KernelCommand, args: &EmitArgs) -> Result<ExitCode> {
    let plan = kernel.plan()?;
    let text = match (args.wire, args.stablehlo) {
        (true, _) => plan.wire()?,
        (_, true) => plan.stablehlo()?,
        _ => plan.kernel(&Context::new())?.text(),
    };
    let text = format!("{}{}", plan.header(), text.trim_end());
    match &args.out {
        None => print(&text)?,
        Some(path) => write_atomically(path, format!("{text}\n").as_bytes())?,
    }
    Ok(ExitCode::SUCCESS)
}
