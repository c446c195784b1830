//! The command line: `pagoda check | sample | serve | merge | doctor | bench | plan | certify | tune | emit | inspect | run`.
//!
//! Samples and other machine-readable output go to stdout, logs and progress to stderr. Exit codes: 0 done, 1 failed
//! on good input, 2 the input must change, 130 interrupted (what was finished is kept).

mod bench;
mod bringup;
mod check;
mod doctor;
mod kernels;
mod monitor;
mod place;
mod sample;
mod serve;

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pagoda_ir::Element;
use pagoda_kernels::chips::Chip;
use serde::Serialize;

use crate::config::Compute;
use crate::error::{Error, Result};
use crate::hosts::merge;
use crate::llama::Target;
use crate::pjrt::{Client, Plugin, PluginChoice};

pub use bench::{DecodeRate, decode_rate};

/// Kernel-centric compiler toolkit for TPU serving.
#[derive(Debug, Parser)]
#[command(name = "pagoda", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check a job for a TPU slice: whether it fits, how long it takes, what to change. Needs no TPU and no weights.
    ///
    /// libtpu compiles the step programs of one model group ahead of time; its answers are kept, so that a second check is a
    /// matter of a second. Exit code 0: the job fits; 1: it does not, or libtpu gave no answer; 2: the input must change.
    Check(Box<check::CheckArgs>),
    /// Sample continuations of prompts: the generation loop over any PJRT plugin.
    Sample(Box<sample::SampleArgs>),
    /// Serve a model: OpenAI's completions and chat completions over HTTP.
    Serve(Box<serve::ServeArgs>),
    /// Check that every host's share of a run is there, and join them in prompt order.
    Merge {
        /// The folder that the hosts wrote into (`--out`).
        dir: PathBuf,
    },
    /// Show which plugins are installed, where, and whether they answer.
    Doctor {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Plan a kernel: tiles, grid, every VMEM buffer, and whether it is known to fit.
    Plan {
        #[command(subcommand)]
        kernel: kernels::KernelCommand,
        /// Choose the tiles for launches over this batch: query rows, KV tokens and how many such sequences, e.g.
        /// 1024/1024,1/4608x8. Repeatable: several batches count alike [default: the kernel's own spread of batches].
        #[arg(long, global = true, value_name = "Q/KV[xN],...")]
        lengths: Vec<String>,
        /// Print JSON.
        #[arg(long, global = true)]
        json: bool,
    },
    /// Compile a planned kernel with libtpu, the TPU's own compiler, and compare what it took; no TPU needed.
    Certify {
        #[command(subcommand)]
        kernel: kernels::KernelCommand,
        #[command(flatten)]
        compiler: kernels::CompilerArgs,
        /// Choose the tiles for launches over this batch, and estimate one: query rows, KV tokens and how many such
        /// sequences, e.g. 1024/1024,1/4608x8. Its lengths are constants of the kernel that is compiled for it.
        #[arg(long, global = true, value_name = "Q/KV[xN],...")]
        lengths: Option<String>,
        /// Print JSON.
        #[arg(long, global = true)]
        json: bool,
    },
    /// Compile a StableHLO module of any origin with libtpu: VMEM of its kernels by buffer, spills, static cycles.
    CertifyModule(kernels::ModuleArgs),
    /// Compile a kernel's candidate tiles with libtpu and rank them by static cycles; no TPU needed.
    Tune {
        #[command(subcommand)]
        kernel: kernels::KernelCommand,
        #[command(flatten)]
        args: kernels::TuneArgs,
    },
    /// Write a kernel: readable Mosaic, or the StableHLO module that carries it.
    Emit {
        #[command(subcommand)]
        kernel: kernels::KernelCommand,
        #[command(flatten)]
        form: kernels::EmitArgs,
    },
    /// List the Mosaic kernels of a file: grid, buffers, declared VMEM, ops.
    Inspect {
        /// A StableHLO module as text or bytecode, or a Mosaic kernel.
        file: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run a kernel on the tile machine, or a module on a plugin, and compare the result.
    Run(Box<kernels::RunArgs>),
    /// Measure a device: a kernel of the registry, the steps of a model, or greedy decode.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Check and time everything on a device that Pagoda has not met: every kernel and form against the f64 reference, and a
    /// step of a small model against golden tokens. One file to send back.
    Bringup(bringup::BringupArgs),
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// A kernel in the form that the plugin takes, repeated until its median is known; JSON.
    #[command(flatten)]
    Kernel(bench::KernelBench),
    /// Prefill and decode steps of a model beside what the device needs for them at least; JSON, one object per slot count.
    Step(bench::StepArgs),
    /// Tokens/s of greedy decode with all slots busy; compile and load left out.
    Decode {
        /// The model's folder.
        #[arg(long)]
        model: PathBuf,
        /// Slot counts, one line each.
        #[arg(long, value_delimiter = ',', default_values_t = [1, 8])]
        slots: Vec<usize>,
        /// New tokens per slot.
        #[arg(long, default_value_t = 256)]
        new: usize,
        /// Type of weights, activations and KV.
        #[arg(long, value_enum, default_value_t = Compute::F32)]
        compute: Compute,
        #[command(flatten)]
        plugin: PluginArgs,
        /// Print JSON, one object per slot count.
        #[arg(long)]
        json: bool,
    },
}

/// The kernel forms on offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kernels {
    /// Plain StableHLO, for any plugin.
    Stablehlo,
    /// Rust inside the step program, for the CPU plugin.
    Native,
    /// The TPU's Mosaic kernels: on the CPU plugin the tile machine runs them, slowly, and checks every access.
    Mosaic,
}

#[derive(Clone, Debug, Args)]
struct PluginArgs {
    /// The form of the kernels [default: native on the CPU plugin, mosaic on a TPU whose kind is known, stablehlo elsewhere].
    #[arg(long, value_enum)]
    kernels: Option<Kernels>,
    /// The chip that Mosaic kernels are planned for, v4, v5e, v5p, v6e or tpu7x [default: the device's; v5p elsewhere].
    #[arg(long, value_name = "CHIP", value_parser = Chip::parse)]
    chip: Option<Chip>,
    /// The PJRT plugin: cpu, cuda, tpu, or the path of a shared library.
    #[arg(long, default_value = "cpu", value_name = "P")]
    plugin: String,
}

impl PluginArgs {
    /// What programs are emitted for: the kernels that were asked for, or the ones that suit the client.
    fn target(&self, client: &Client) -> Result<Target> {
        let runs_on = |platform| client.platform().eq_ignore_ascii_case(platform);
        let on_tpu = runs_on("tpu");
        let kind = if on_tpu { client.device_kind(0).unwrap_or_default() } else { String::new() };
        let target = match self.kernels {
            Some(Kernels::Stablehlo) => Target::Portable,
            Some(Kernels::Native) => Target::Host,
            Some(Kernels::Mosaic) => {
                let chip = self.chip.or(Chip::of_kind(&kind)).unwrap_or(Chip::V5p);
                return Ok(if on_tpu { Target::Tpu(chip) } else { Target::TileMachine(chip) });
            }
            None if runs_on("cpu") => Target::Host,
            None if on_tpu => match self.chip.or(Chip::of_kind(&kind)) {
                Some(chip) => {
                    eprintln!("# device kind {kind}: Mosaic kernels for {chip} (--kernels stablehlo: none)");
                    return Ok(Target::Tpu(chip));
                }
                None => {
                    eprintln!(
                        "# device kind {kind} is not a known TPU: StableHLO kernels (or --kernels mosaic --chip CHIP)"
                    );
                    Target::Portable
                }
            },
            None => Target::Portable,
        };
        match self.chip {
            None => Ok(target),
            Some(chip) => {
                let limit = "says what Mosaic kernels are planned for, and there are none";
                Err(Error::setting("--chip", chip.name(), limit, "add --kernels mosaic, or leave it out"))
            }
        }
    }

    /// Loads the plugin and creates a client of `devices` devices.
    fn client(&self, devices: usize) -> Result<Client> {
        client(&self.plugin, devices)
    }
}

/// Loads the plugin that is named and creates a client of `devices` devices.
fn client(choice: &str, devices: usize) -> Result<Client> {
    /// More devices than the CPU plugin is asked to make on one host.
    const MOST_DEVICES: usize = 256;
    if choice == "cpu" && devices > MOST_DEVICES {
        let limit = format!("is more than the {MOST_DEVICES} that the CPU plugin is asked to make");
        return Err(Error::setting("devices of the mesh", devices, limit, "lower data or model"));
    }
    let plugin = Plugin::load(&PluginChoice::parse(choice)?)?;
    plugin.client(devices).map_err(|error| Error::Plugin {
        plugin: plugin.found().path.display().to_string(),
        problem: format!("it cannot create a client: {error}"),
        fix: "see `pagoda doctor`, or choose another with --plugin".into(),
    })
}

/// Writes `text` and a newline to standard output. A reader that has gone away (`| head`) has what it wanted.
///
/// # Errors
/// When it cannot be written for another reason.
fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::io("write", Path::new("stdout"))(error)),
        _ => Ok(()),
    }
}

/// As [`print()`], as JSON, for machines.
///
/// # Errors
/// As [`print()`].
fn print_json(value: &(impl Serialize + ?Sized)) -> Result<()> {
    print(&serde_json::to_string_pretty(value).map_err(Error::runtime("writing JSON"))?)
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    if let Some(code) = kernels::run_if_asked() {
        return code;
    }
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).format_timestamp(None).init();
    // clap prints its own errors and exits with 2, like the rest of us.
    let outcome = match Cli::parse().command {
        Command::Check(args) => check::check(&args),
        Command::Sample(args) => sample::sample(&args),
        Command::Serve(args) => serve::serve(&args),
        Command::Merge { dir } => merge(&dir).and_then(|merged| {
            eprintln!("# joined {} samples of {} hosts", merged.samples, merged.hosts);
            print(&merged.path.display().to_string())?;
            Ok(ExitCode::SUCCESS)
        }),
        Command::Doctor { json } => {
            doctor::doctor(json).map(|works| if works { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Plan { kernel, lengths, json } => kernels::plan(&kernel, &lengths, json),
        Command::Certify { kernel, compiler, lengths, json } => {
            kernels::certify(&kernel, &compiler, lengths.as_deref(), json)
        }
        Command::CertifyModule(args) => kernels::certify_module(&args),
        Command::Tune { kernel, args } => kernels::tune(&kernel, &args),
        Command::Emit { kernel, form } => kernels::emit(&kernel, &form),
        Command::Inspect { file, json } => kernels::inspect(&file, json).map(|()| ExitCode::SUCCESS),
        Command::Run(args) => kernels::run(&args),
        Command::Bringup(args) => bringup::bringup(&args),
        Command::Bench { what: Bench::Kernel(bench) } => bench::kernel(&bench).map(|()| ExitCode::SUCCESS),
        Command::Bench { what: Bench::Step(args) } => bench::step(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench { what: Bench::Decode { model, slots, new, compute, plugin, json } } => plugin
            .client(1)
            .and_then(|client| {
                let target = plugin.target(&client)?;
                slots.iter().try_for_each(|&slots| bench(&client, &model, slots, new, compute.element(), target, json))
            })
            .map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "error: {error}");
        ExitCode::from(error.exit_code())
    })
}

fn bench(
    client: &Client,
    model: &Path,
    slots: usize,
    new: usize,
    compute: Element,
    target: Target,
    json: bool,
) -> Result<()> {
    if slots == 0 || new == 0 {
        let (key, fix) = if slots == 0 { ("--slots", "ask for at least 1") } else { ("--new", "ask for at least 1") };
        return Err(Error::setting(key, 0, "leaves nothing to measure", fix));
    }
    let rate = decode_rate(client, model, slots, new, compute, target)?;
    let text = match json {
        true => serde_json::to_string(&rate).map_err(Error::runtime("writing JSON"))?,
        false => format!(
            "{:>3} slots, {}: {:>8.1} tokens/s, {:.3} ms a step, host {:.1}%",
            rate.slots,
            rate.dtype,
            rate.tok_s,
            rate.step_ms,
            100.0 * rate.host_share
        ),
    };
    print(&text)
}
