//! `pagoda bringup`: one command for whoever has the device.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::print_json;
use crate::bringup::{Job, run};
use crate::error::{Error, Result};
use crate::measure::budget;
use crate::pjrt::PluginChoice;

/// What is tried, and where the report goes.
#[derive(Debug, Args)]
pub(super) struct BringupArgs {
    /// The PJRT plugin: tpu, cpu, cuda, or the path of a shared library.
    #[arg(long, default_value = "tpu", value_name = "P")]
    plugin: String,
    /// The report, written whole after every part.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Cases of each kernel in each form.
    #[arg(long, default_value_t = 20)]
    cases: u64,
    /// What the cases are drawn from.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The folder of the small model, with golden.json.
    #[arg(long, default_value = "examples/models/tiny-llama-kjv", value_name = "DIR")]
    model: PathBuf,
    /// Seconds that loading the plugin, and each case, may take.
    #[arg(long, default_value_t = 120.0)]
    timeout: f64,
}

/// Runs the command: succeeds when all that was checked passed.
pub(super) fn bringup(args: &BringupArgs) -> Result<ExitCode> {
    let BringupArgs { plugin, out, cases, seed, model, timeout } = args;
    if *cases == 0 {
        return Err(Error::setting("--cases", 0, "leaves nothing to check", "ask for at least 1"));
    }
    let time = budget("--timeout", *timeout)?;
    // A plugin that is not there is said at once, not by every child.
    PluginChoice::parse(plugin)?.locate()?;
    let executable = std::env::current_exe().map_err(Error::runtime("finding this executable"))?;
    let job = Job { plugin: plugin.clone(), model: model.clone(), cases: *cases, seed: *seed, time };
    let report = run(&job, &executable, out, &mut |line| eprintln!("# {line}"))?;
    print_json(&report.summary)?;
    eprintln!("# the report: {} (please send it back)", out.display());
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
