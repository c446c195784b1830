//! `pagoda certify-module`: any StableHLO module, whoever wrote it, compiled by libtpu.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use pagoda_kernels::chips::Chip;

use super::file::File;
use super::print_answer;
use crate::certify::{Certifier, Program};
use crate::error::{Error, Result};

/// What `pagoda certify-module` takes.
#[derive(Debug, Args)]
pub(in crate::cli) struct ModuleArgs {
    /// A StableHLO module as text or bytecode, as `jax.export` writes it for TPU.
    file: PathBuf,
    /// The chip, of which one host is compiled for: v4, v5e, v5p, v6e or tpu7x.
    #[arg(long, default_value = "v5p", value_parser = Chip::parse)]
    chip: Chip,
    /// Seconds for one compilation.
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    timeout: u64,
    /// Seconds for a first compilation, with the compiler's static profile; after that it is compiled again without, and no cycle
    /// count is reported.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    profile_timeout: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// `pagoda certify-module`: succeeds when the module compiles.
pub(in crate::cli) fn certify_module(args: &ModuleArgs) -> Result<ExitCode> {
    if args.timeout == 0 {
        return Err(Error::setting("timeout", args.timeout, "leaves the compiler no time", "give at least 1 second"));
    }
    let file = File::read(&args.file)?;
    let certifier = Certifier::of_this_executable()?
        .timeout(Duration::from_secs(args.timeout))
        .profile_timeout(Duration::from_secs(args.profile_timeout));
    let program = Program { module: &file.bytes, replicas: 1 };
    let certificate = certifier.certify(args.chip.info().topology, program)?;
    print_answer(&certificate, args.json)?;
    Ok(if certificate.compiles() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
