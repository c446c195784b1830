//! `pagoda bench KERNEL`: a kernel of the registry on a device, in the form that its plugin takes, beside what the device can do.

use std::time::{Duration, Instant};

use clap::{ArgMatches, Args, Command, FromArgMatches, Subcommand, ValueEnum};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::named::Role;
use serde::Serialize;

use super::super::kernels::{KernelCommand, Launch, NAMES};
use super::super::{client, print_json};
use crate::error::{Error, Result};
use crate::measure::{Cores, Rates, Times, Until, budget, times};
use crate::pjrt::{Arg, Buffer, Client};

/// A kernel to be measured, and how.
#[derive(Debug)]
pub(in crate::cli) struct KernelBench {
    kernel: KernelCommand,
    args: KernelBenchArgs,
}

/// The form of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Form {
    /// Plain StableHLO, compiled by the plugin.
    Stablehlo,
    /// In Rust, on this machine's cores.
    Native,
    /// The TPU's, in a program for the plugin.
    Mosaic,
}

#[derive(Debug, Args)]
struct KernelBenchArgs {
    /// The PJRT plugin: cpu, cuda, tpu, or the path of a shared library.
    #[arg(long, default_value = "cpu", value_name = "P")]
    plugin: String,
    /// The form [default: native on the CPU plugin where there is one, mosaic on a TPU, stablehlo elsewhere].
    #[arg(long, value_enum)]
    form: Option<Form>,
    /// Query rows and KV tokens of each sequence of a ragged batch, instead of random ones.
    #[arg(long, value_name = "ROWS/TOKENS,...")]
    lengths: Option<String>,
    /// The seed of the inputs.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Time to measure for, unless the median is known to within --within before.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How narrow the median's interval is to become, of the median.
    #[arg(long, default_value_t = 0.02)]
    within: f64,
}

impl FromArgMatches for KernelBench {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        let kernel = KernelCommand::from_arg_matches(matches)?;
        let (_, of_kernel) = matches.subcommand().expect("a kernel was named");
        Ok(Self { kernel, args: KernelBenchArgs::from_arg_matches(of_kernel)? })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Subcommand for KernelBench {
    fn augment_subcommands(command: Command) -> Command {
        let command = KernelCommand::augment_subcommands(command);
        NAMES.iter().fold(command, |command, name| command.mut_subcommand(name, KernelBenchArgs::augment_args))
    }

    fn augment_subcommands_for_update(command: Command) -> Command {
        Self::augment_subcommands(command)
    }

    fn has_subcommand(name: &str) -> bool {
        KernelCommand::has_subcommand(name)
    }
}

/// What `pagoda bench KERNEL` prints.
#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    problem: String,
    batch: Option<String>,
    form: Form,
    plugin: Device,
    /// Floating-point operations and bytes of one launch on these inputs.
    flops: u64,
    bytes: u64,
    /// Seconds of a launch.
    seconds: Times,
    /// Reached, by the median.
    flop_s: f64,
    byte_s: f64,
    /// What the device can do; `null` where that is not known.
    rates: Option<Rates>,
    estimate: Option<Estimate>,
}

/// Where it was measured.
#[derive(Debug, Serialize)]
struct Device {
    platform: String,
    version: String,
    kind: Option<String>,
}

#[derive(Debug, Serialize)]
struct Estimate {
    /// What the device needs at least, by its rates.
    floor_seconds: f64,
    /// The median, in floors.
    times_floor: f64,
}

/// `pagoda bench KERNEL`.
pub(in crate::cli) fn kernel(bench: &KernelBench) -> Result<()> {
    let KernelBench { kernel, args } = bench;
    let until = Until { relative: args.within, least: 5, budget: budget("--seconds", args.seconds)? };
    let plan = kernel.plan()?;
    let launch = plan.launch(args.seed, args.lengths.as_deref(), vec![])?;
    let client = client(&args.plugin, 1)?;
    let on = |platform: &str| client.platform().eq_ignore_ascii_case(platform);
    let kind = client.device_kind(0).ok();
    let has_native = on("cpu") && launch.native(&Cores).is_some();
    let form = args.form.unwrap_or(match () {
        () if has_native => Form::Native,
        () if on("tpu") => Form::Mosaic,
        () => Form::Stablehlo,
    });
    let seconds = match form {
        Form::Native if !has_native => {
            let limit = format!("does not exist for {} on {}", launch.name(), client.platform());
            return Err(Error::setting("--form", "native", limit, "measure --form stablehlo"));
        }
        Form::Native => times(until, || {
            let started = Instant::now();
            std::hint::black_box(launch.native(&Cores));
            Ok(started.elapsed())
        })?,
        Form::Mosaic if !on("tpu") => {
            let limit = format!("does not run on {}", client.platform());
            return Err(Error::setting("--form", "mosaic", limit, "measure --form stablehlo, or give --plugin tpu"));
        }
        Form::Mosaic => on_plugin(until, &client, &*launch, plan.wire()?)?,
        Form::Stablehlo => on_plugin(until, &client, &*launch, plan.stablehlo()?)?,
    };
    let chip = kind.as_deref().and_then(Chip::of_kind);
    let arithmetic = launch.arguments().first().map_or(pagoda_ir::Element::F32, |array| array.element());
    let rates = match chip {
        Some(chip) => Some(Rates::of_chip(chip)),
        None => on("cpu").then(|| Rates::of_this_machine(arithmetic)),
    };
    let work = launch.work();
    let (flops, bytes) = (work.flops, work.bytes);
    let estimate = rates.as_ref().map(|rates| {
        let floor_seconds = rates.floor(flops, bytes);
        Estimate { floor_seconds, times_floor: seconds.median / floor_seconds }
    });
    print_json(&Report {
        kernel: launch.name().to_owned(),
        problem: launch.problem(),
        batch: launch.batch(),
        form,
        plugin: Device { platform: client.platform(), version: client.platform_version(), kind },
        flops: flops as u64,
        bytes: bytes as u64,
        seconds,
        flop_s: flops / seconds.median,
        byte_s: bytes / seconds.median,
        rates,
        estimate,
    })
}

/// Times of a program whose inputs stay on the device; what it takes over, its result gives back.
fn on_plugin(until: Until, client: &Client, launch: &dyn Launch, module: String) -> Result<Times> {
    let program = client.compile(module, 1)?;
    let arguments = launch.plan().arguments();
    let uploaded = launch.arguments();
    let mut buffers = uploaded.iter().map(|array| Ok(Some(client.upload(array, 0)?))).collect::<Result<Vec<_>>>()?;
    let donated: Vec<(usize, usize)> = (arguments.iter().enumerate())
        .filter_map(|(index, argument)| match argument.role {
            Role::Donated { result } => Some((index, result)),
            _ => None,
        })
        .collect();
    times(until, || {
        let given: Vec<(usize, Buffer)> =
            donated.iter().filter_map(|&(index, _)| Some((index, buffers[index].take()?))).collect();
        let mut given = given.into_iter().peekable();
        let mut list = Vec::new();
        for (index, buffer) in buffers.iter().enumerate() {
            list.push(match buffer {
                Some(buffer) => Arg::Keep(buffer),
                None => match given.next_if(|(donated, _)| *donated == index) {
                    Some((_, buffer)) => Arg::Donate(buffer),
                    None => return Err(Error::runtime("measuring a kernel")("a donated argument was not given back")),
                },
            });
        }
        let started = Instant::now();
        let results = program.run(list)?;
        results.iter().try_for_each(Buffer::wait)?;
        let elapsed: Duration = started.elapsed();
        let mut results: Vec<Option<Buffer>> = results.into_iter().map(Some).collect();
        for &(index, result) in &donated {
            buffers[index] = results.get_mut(result).and_then(Option::take);
        }
        Ok(elapsed)
    })
}
