//! `pagoda run`: a kernel on the tile machine, or a plain StableHLO module on a plugin, held against what it should give.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use pagoda_ir::mosaic::{Role, wire};
use pagoda_ir::tile_machine::{DmaOrder, Machine, Program, Trace};
use pagoda_ir::{Context, HostTensor, TensorType, mosaic};

use super::super::client;
use super::file::File;
use super::operands::{Given, ensure_fits, operands};
use super::problem::{KernelCommand, Launch, NAMES, Planned};
use super::report::{Against, Check, Output, Report, print_reports};
use crate::error::{Error, Result};
use crate::output::write_atomically;
use crate::pjrt::{self, Client, Executable};

/// What `pagoda run` takes.
#[derive(Debug, Args)]
#[command(
    subcommand_negates_reqs = true,
    override_usage = "pagoda run [OPTIONS] <FILE>\n       pagoda run [OPTIONS] <KERNEL> <PROBLEM>"
)]
pub(in crate::cli) struct RunArgs {
    /// A kernel that `pagoda emit` wrote (readable or wire form), any StableHLO module with Mosaic kernels, or with
    /// --plugin a plain StableHLO module. Or, instead of a file, a kernel to emit and run.
    #[arg(required = true)]
    file: Option<PathBuf>,
    #[command(subcommand)]
    kernel: Option<KernelCommand>,
    /// Run Mosaic kernels on the tile machine [default without --plugin].
    #[arg(long, global = true)]
    tile_machine: bool,
    /// Run the module, or the kernel's StableHLO form, on this PJRT plugin: cpu, cuda, tpu or a path. With --tile-machine,
    /// where --check-against stablehlo runs [default there: cpu].
    #[arg(long, global = true, value_name = "P")]
    plugin: Option<String>,
    /// The array of an operand, from NumPy's .npy file; f32 files also give bf16 operands. Repeatable.
    #[arg(long = "input", global = true, value_name = "NAME=FILE.npy")]
    inputs: Vec<String>,
    /// Draw the other operands from this seed: floats in (-2, 2), ragged batches where the kernel has them. Integers of
    /// kernels from elsewhere must be given with --input.
    #[arg(long, global = true, value_name = "SEED", default_value_t = 0)]
    random: u64,
    /// Compare the result: with the f64 reference, or with the StableHLO form on a plugin.
    #[arg(long, global = true, value_enum)]
    check_against: Option<Against>,
    /// Query rows, KV tokens and how many such sequences of a ragged batch, e.g. 9/48,1/55x3, or none; instead of random ones.
    #[arg(long, global = true, value_name = "Q/KV[xN],...")]
    lengths: Option<String>,
    /// When DMAs land on the tile machine: early, late, random:SEED, or all: each of them, random with the seed of
    /// --random, and the results must be the same bits [default: late].
    #[arg(long, global = true, value_name = "ORDER")]
    dma: Option<String>,
    /// Let kernels load memory that was never written (NaN, or an odd integer) and select something else, as some of JAX's do.
    #[arg(long, global = true)]
    allow_unwritten_reads: bool,
    /// Let kernels leave elements of their outputs unwritten (NaN here), such as rows of padding.
    #[arg(long, global = true)]
    allow_unwritten_outputs: bool,
    /// Let positions of a parallel grid dimension write the same elements of an output, which are then NaN.
    #[arg(long, global = true)]
    allow_parallel_overlaps: bool,
    /// Write the run's timeline, for Perfetto (ui.perfetto.dev): with several orders of DMAs or kernels, that of the last one.
    #[arg(long, global = true, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
}

/// `pagoda run`: succeeds when nothing faults and everything compared agrees.
pub(in crate::cli) fn run(args: &RunArgs) -> Result<ExitCode> {
    let dma = dma_orders(args)?;
    let mut given = Given::parse(&args.inputs)?;
    let on_machine = args.tile_machine || args.plugin.is_none();
    if !on_machine && args.check_against == Some(Against::Stablehlo) {
        let fix = "drop --plugin, give --tile-machine too, or check against the reference";
        return Err(Error::setting("check-against", "stablehlo", "compares the StableHLO form with itself", fix));
    }
    let of_machine = [
        ("--dma", args.dma.as_deref()),
        ("--allow-unwritten-reads", args.allow_unwritten_reads.then_some("true")),
        ("--allow-unwritten-outputs", args.allow_unwritten_outputs.then_some("true")),
        ("--allow-parallel-overlaps", args.allow_parallel_overlaps.then_some("true")),
        ("--trace", args.trace.as_ref().and_then(|path| path.to_str())),
    ];
    if !on_machine && let Some((key, value)) = of_machine.iter().find_map(|&(key, value)| Some((key, value?))) {
        let limit = "is of use on the tile machine only";
        return Err(Error::setting(key, value, limit, "drop it, or give --tile-machine too"));
    }
    let reports = match (&args.file, &args.kernel) {
        (Some(file), Some(_)) => {
            let fix = format!("give a file, or {} with its options", NAMES.join(" or "));
            return Err(Error::setting("FILE", file.display(), "is a second thing to run", fix));
        }
        (None, None) => {
            return Err(Error::setting(
                "FILE",
                "none",
                "leaves nothing to run",
                format!("give a file, or {}", NAMES.join(" or ")),
            ));
        }
        (None, Some(kernel)) => {
            let launch = launch(args, &*kernel.plan()?, &mut given)?;
            vec![if on_machine { on_tile_machine(args, &dma, &*launch)? } else { on_plugin(args, &*launch)? }]
        }
        (Some(path), None) => {
            let file = File::read(path)?;
            let known = KernelCommand::of_text(&file.bytes, path)?;
            if on_machine && file.is_plain() {
                let problem = "it has no Mosaic kernel for the tile machine";
                return Err(Error::file(path, problem, "run it with --plugin cpu"));
            }
            if let (None, Some(lengths)) = (&known, &args.lengths) {
                let limit = format!("is of no use: line 1 of {} names no kernel", path.display());
                return Err(Error::setting("lengths", lengths, limit, "give the metadata with --input"));
            }
            match (on_machine, known) {
                (true, Some(kernel)) => vec![emitted_on_tile_machine(args, &dma, &mut given, &file, &kernel)?],
                (true, None) => all_on_tile_machine(args, &dma, &mut given, &file)?,
                (false, known) => vec![module_on_plugin(args, &mut given, &file, known.as_ref())?],
            }
        }
    };
    given.all_used()?;
    print_reports(&reports, args.json)
}

fn dma_orders(args: &RunArgs) -> Result<Vec<DmaOrder>> {
    let text = args.dma.as_deref().unwrap_or("late");
    let seed = text.strip_prefix("random:").and_then(|seed| seed.parse().ok());
    match (text, seed) {
        ("early", _) => Ok(vec![DmaOrder::Early]),
        ("late", _) => Ok(vec![DmaOrder::Late]),
        ("all", _) => Ok(pagoda_kernels::check::dma_orders(args.random).to_vec()),
        (_, Some(seed)) => Ok(vec![DmaOrder::Random(seed)]),
        _ => Err(Error::setting("dma", text, "is not an order of DMAs", "use early, late, random:SEED or all")),
    }
}

fn order_name(dma: DmaOrder) -> String {
    match dma {
        DmaOrder::Early => "early".into(),
        DmaOrder::Late => "late".into(),
        DmaOrder::Random(seed) => format!("random:{seed}"),
    }
}

/// A planned kernel with its inputs: given ones, the rest drawn at random.
fn launch(args: &RunArgs, plan: &dyn Planned, given: &mut Given) -> Result<Box<dyn Launch>> {
    let arguments = plan.arguments();
    ensure_fits(&arguments.types())?;
    let mut arrays = Vec::new();
    for argument in arguments.iter() {
        arrays.extend(given.take(argument.name, &argument.ty)?.map(|array| (argument.name, array)));
    }
    given.all_used()?;
    plan.launch(args.random, args.lengths.as_deref(), arrays)
}

/// A kernel that is emitted here.
fn on_tile_machine(args: &RunArgs, dma: &[DmaOrder], launch: &dyn Launch) -> Result<Report> {
    let context = Context::new();
    let kernel = launch.plan().kernel(&context)?;
    run_launch(args, dma, launch, &kernel, Program::decode(kernel.module())?)
}

/// A kernel that `pagoda emit` wrote, and perhaps somebody edited.
fn emitted_on_tile_machine(
    args: &RunArgs,
    dma: &[DmaOrder],
    given: &mut Given,
    file: &File,
    kernel: &KernelCommand,
) -> Result<Report> {
    let launch = launch(args, &*kernel.plan()?, given)?;
    let context = Context::new();
    let emitted = launch.plan().kernel(&context)?;
    let mut kernels = file.kernels(&context)?;
    let (Some((opened, _)), true) = (kernels.pop(), kernels.is_empty()) else {
        return Err(Error::file(&file.path, "line 1 names one kernel, and there is not one", "emit the kernel again"));
    };
    let program = Program::decode(&opened.module).map_err(|error| unknown_op(&file.path, error))?;
    run_launch(args, dma, &*launch, &emitted, program)
}

fn unknown_op(path: &Path, error: pagoda_ir::Error) -> Error {
    Error::file(path, error, "use ops that the tile machine knows")
}

fn run_launch(
    args: &RunArgs,
    dma: &[DmaOrder],
    launch: &dyn Launch,
    kernel: &mosaic::Kernel,
    program: Program,
) -> Result<Report> {
    let call = Call {
        operands: &launch.operands(),
        results: &kernel.outputs(),
        aliases: kernel.aliases(),
        unused: &[],
        inputs: inputs_line(args, launch.batch()),
    };
    // What the plan counted belongs to what is checked.
    let vmem = args.check_against.map_or(Ok(()), |_| launch.check_vmem(&program));
    let Executed { mut report, results } = execute(args, program, launch.machine(), dma, call)?;
    report.unplanned = vmem.err().map(|error| error.to_string());
    if let (Some(against), Some(results)) = (args.check_against, results) {
        report.check = Some(check(args, against, launch, &results)?);
    }
    Ok(report)
}

fn inputs_line(args: &RunArgs, batch: Option<String>) -> String {
    let mut line = format!("random, seed {}", args.random);
    if !args.inputs.is_empty() {
        let names: Vec<_> = args.inputs.iter().filter_map(|input| Some(input.split_once('=')?.0)).collect();
        line += &format!(", but {} given", names.join(", "));
    }
    if let Some(batch) = batch {
        line += &format!("; {batch}");
    }
    line
}

/// Every Mosaic kernel of a module of unknown origin, each on operands of its own.
fn all_on_tile_machine(args: &RunArgs, dma: &[DmaOrder], given: &mut Given, file: &File) -> Result<Vec<Report>> {
    if args.check_against.is_some() {
        let fix = format!("check a kernel that `pagoda emit` wrote, or one of {}", NAMES.join(", "));
        return Err(Error::file(&file.path, "its first line does not say which problem it solves", fix));
    }
    let context = Context::new();
    let mut reports = Vec::new();
    for (opened, call) in file.kernels(&context)? {
        let program = Program::decode(&opened.module).map_err(|error| unknown_op(&file.path, error))?;
        let Some((call, (operand_types, results))) = call.and_then(|call| Some((call, call.types.as_ref()?))) else {
            let problem = "the sizes of its arrays stand neither in it nor in a first line from `pagoda emit`";
            return Err(Error::file(&file.path, problem, "give the StableHLO module around it, as text"));
        };
        let named = program.signature().clone().with_outputs(results.len());
        let names = named.arguments.iter().filter(|argument| matches!(argument.role, Role::Prefetch | Role::Input));
        let names: Vec<String> = names.map(|argument| argument.name.clone()).collect();
        if names.len() != operand_types.len() {
            let problem = format!("a call gives {} operands to a kernel of {}", operand_types.len(), names.len());
            return Err(Error::file(&file.path, problem, "write the module again"));
        }
        let named: Vec<_> = names.into_iter().zip(operand_types.iter().cloned()).collect();
        ensure_fits(results)?;
        let default = Machine::default();
        let machine = Machine { vmem_bytes: opened.vmem_limit.unwrap_or(default.vmem_bytes), ..default };
        let call = Call {
            operands: &operands(given, &named, args.random)?,
            results,
            aliases: &call.aliases,
            unused: &call.unused,
            inputs: inputs_line(args, None),
        };
        reports.push(execute(args, program, machine, dma, call)?.report);
    }
    Ok(reports)
}

/// One call of a kernel.
struct Call<'c> {
    operands: &'c [HostTensor],
    results: &'c [TensorType],
    aliases: &'c [(usize, usize)],
    /// Results that the module around the call does not use.
    unused: &'c [usize],
    inputs: String,
}

/// The report of a run, and its results for comparison, if it came to its end.
struct Executed {
    report: Report,
    results: Option<Vec<HostTensor>>,
}

/// Runs the call once under each of `orders`, until one faults or gives another result than the first.
fn execute(args: &RunArgs, program: Program, machine: Machine, orders: &[DmaOrder], call: Call) -> Result<Executed> {
    let program = program.with_aliases(call.aliases).with_unused_outputs(call.unused);
    let signature = program.signature().clone().with_outputs(call.results.len());
    let mut report = Report {
        kernel: signature.name.clone(),
        on: "tile machine".into(),
        dma: None,
        inputs: call.inputs,
        counters: None,
        outputs: vec![],
        fault: None,
        order_dependent: None,
        unplanned: None,
        check: None,
    };
    let mut outputs: Option<Vec<HostTensor>> = None;
    let mut done: Vec<String> = vec![];
    for &dma in orders {
        done.push(order_name(dma));
        let machine = Machine {
            dma,
            allow_unwritten_reads: args.allow_unwritten_reads,
            allow_unwritten_outputs: args.allow_unwritten_outputs,
            allow_parallel_overlaps: args.allow_parallel_overlaps,
            ..machine
        };
        let run = match &args.trace {
            None => program.run(&machine, call.operands, call.results),
            Some(path) => {
                let mut trace = Trace::new(&signature.name);
                let run = program.run_observed(&machine, call.operands, call.results, &mut trace);
                let mut text = Vec::new();
                trace.write(&mut text).map_err(Error::io("write", path))?;
                write_atomically(path, &text)?;
                run
            }
        };
        match run {
            Err(fault) => {
                // Which order found it.
                (report.dma, report.fault) = (done.pop(), Some(fault));
                return Ok(Executed { report, results: None });
            }
            Ok(run) => match &outputs {
                None => {
                    let names = signature.arguments.iter().filter(|argument| argument.role == Role::Output);
                    let named = names.zip(&run.outputs);
                    report.outputs = named.map(|(argument, array)| Output::of(&argument.name, array)).collect();
                    report.counters = Some(run.counters);
                    outputs = Some(run.outputs);
                }
                Some(first) if *first == run.outputs => {}
                Some(_) => {
                    let (first, other) = (&done[0], order_name(dma));
                    let message = format!("the results differ between {first} and {other} DMAs: a wait is missing");
                    report.order_dependent = Some(message);
                    break;
                }
            },
        }
    }
    report.dma = Some(done.join(", "));
    Ok(Executed { report, results: outputs })
}

/// The StableHLO form of a kernel.
fn on_plugin(args: &RunArgs, launch: &dyn Launch) -> Result<Report> {
    let client = client(args.plugin.as_deref().unwrap_or("cpu"), 1)?;
    let program = client.compile(launch.plan().stablehlo()?, 1)?;
    plugin_report(args, &client, &program, launch.name(), Some(launch), &launch.arguments())
}

/// A StableHLO module from a file.
fn module_on_plugin(args: &RunArgs, given: &mut Given, file: &File, known: Option<&KernelCommand>) -> Result<Report> {
    let client = client(args.plugin.as_deref().unwrap_or("cpu"), 1)?;
    if !file.is_plain() && !client.platform().eq_ignore_ascii_case("tpu") {
        let problem = format!("it holds a Mosaic kernel, which the plugin for {} cannot run", client.platform());
        return Err(Error::file(&file.path, problem, "run it with --tile-machine"));
    }
    if let Some(kernel) = known {
        let launch = launch(args, &*kernel.plan()?, given)?;
        let program = compiled(&client, file)?;
        return plugin_report(args, &client, &program, &file_name(&file.path), Some(&*launch), &launch.arguments());
    }
    if args.check_against.is_some() {
        let fix = "check a module that `pagoda emit --stablehlo` wrote";
        return Err(Error::file(&file.path, "its first line does not say which problem it solves", fix));
    }
    let arguments = match file.is_bytecode() {
        true => None,
        false => wire::main_arguments(&String::from_utf8_lossy(&file.bytes)),
    };
    let arguments = arguments.ok_or_else(|| {
        let fix = "give a module as text, with a function @main of arrays of known sizes";
        Error::file(&file.path, "the types of its arguments cannot be read", fix)
    })?;
    let arrays = operands(given, &arguments, args.random)?;
    plugin_report(args, &client, &compiled(&client, file)?, &file_name(&file.path), None, &arrays)
}

fn compiled(client: &Client, file: &File) -> Result<Executable> {
    client.compile(&file.bytes, 1).map_err(|error| match error {
        // What plugins call a program that they cannot parse, or do not know an op of.
        pjrt::Error::Plugin {
            code: "INVALID_ARGUMENT" | "UNKNOWN" | "UNIMPLEMENTED" | "NOT_FOUND", message, ..
        } => {
            let said = message.lines().next().unwrap_or_default();
            let problem = format!("the plugin for {} does not take it: {said}", client.platform());
            Error::file(&file.path, problem, "write the module again")
        }
        error => error.into(),
    })
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn plugin_report(
    args: &RunArgs,
    client: &Client,
    program: &Executable,
    name: &str,
    launch: Option<&dyn Launch>,
    arrays: &[HostTensor],
) -> Result<Report> {
    let mut outputs = program.call(arrays)?;
    let mut checked = None;
    if let Some(launch) = launch {
        let types: Vec<_> = outputs.iter().map(|array| TensorType::new(array.element(), array.dims())).collect();
        if !types.iter().eq(launch.results().values()) {
            let list = |types: &mut dyn Iterator<Item = &TensorType>| {
                types.map(TensorType::to_string).collect::<Vec<_>>().join(", ")
            };
            let expected = list(&mut launch.results().values());
            let limit = format!("are not the {expected} of the problem in its first line");
            let found = list(&mut types.iter());
            return Err(Error::setting(format!("results of {name}"), found, limit, "emit the module again"));
        }
        without_padding(launch, &mut outputs);
        checked = args.check_against.map(|against| check(args, against, launch, &outputs)).transpose()?;
    }
    Ok(Report {
        kernel: name.to_owned(),
        on: client.platform(),
        dma: None,
        inputs: inputs_line(args, launch.and_then(Launch::batch)),
        counters: None,
        outputs: outputs.iter().enumerate().map(|(at, array)| Output::of(&format!("result{at}"), array)).collect(),
        fault: None,
        order_dependent: None,
        unplanned: None,
        check: checked,
    })
}

/// Zeros what a StableHLO form leaves unspecified.
fn without_padding(launch: &dyn Launch, outputs: &mut [HostTensor]) {
    for (output, live) in outputs.iter_mut().zip(launch.live()) {
        let live = live * output.element().bytes();
        output.bytes_mut()[live..].fill(0);
    }
}

fn check(args: &RunArgs, against: Against, launch: &dyn Launch, results: &[HostTensor]) -> Result<Check> {
    let mut expected = launch.expected();
    if against == Against::Stablehlo {
        let client = client(args.plugin.as_deref().unwrap_or("cpu"), 1)?;
        let mut others = client.compile(launch.plan().stablehlo()?, 1)?.call(&launch.arguments())?;
        without_padding(launch, &mut others);
        for (expected, other) in expected.iter_mut().zip(&others) {
            // Both sides are off.
            (expected.values, expected.tolerance) = (other.to_f64(), expected.tolerance.doubled());
        }
    }
    let outcome = launch.compare(results, &expected);
    let message = match &outcome {
        Ok(()) => {
            let count: usize = results.iter().map(HostTensor::len).sum();
            format!("all {count} values are within {}", expected[0].tolerance)
        }
        Err(error) => error.to_string(),
    };
    Ok(Check { against, agrees: outcome.is_ok(), message })
}
