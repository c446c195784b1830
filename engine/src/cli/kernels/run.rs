//! `pagoda run`: a kernel on the tile machine, or a plain StableHLO module on a plugin, held against what it should give.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use pagoda_ir::mosaic::{Argument, Frame, Role, hosted};
use pagoda_ir::tile_machine::{
    Cell, DmaOrder, FaultKind, FaultKinds, Machine, Observer, Profile, Program, Rates, Trace,
};
use pagoda_ir::{Context, HostTensor, TensorType, mosaic};
use pagoda_kernels::chips::Chip;

use super::super::client;
use super::explain::{Explanation, Known, again};
use super::file::File;
use super::operands::{Given, Name, ensure_fits, operands};
use super::problem::{KernelCommand, Launch, NAMES, Planned};
use super::report::{Against, Check, Report, print_reports};
use super::results::ResultArgs;
use super::sources::Sources;
use super::{devices, profile, program};
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
    pub(super) plugin: Option<String>,
    /// Of a module with several Mosaic kernels, this one alone, counted from 0, on operands of its own.
    #[arg(long = "kernel", global = true, value_name = "N")]
    pub(super) only: Option<usize>,
    /// Run a kernel that sends to other devices on so many of them, or on a mesh (2x4) whose device ids are row-major
    /// [default: as many as the module is for]. Operands are of all devices, one after another along the leading dimension; or
    /// the same for all; or given one by one, as NAME@DEVICE. Results are of all devices.
    #[arg(long, global = true, value_name = "N", value_parser = devices::parse)]
    devices: Option<usize>,
    /// The array of an operand, by name or position (counted from 0), from NumPy's .npy file; f32 files also give bf16
    /// operands. Repeatable.
    #[arg(long = "input", global = true, value_name = "NAME=FILE.npy")]
    inputs: Vec<String>,
    /// Draw an operand, by name or position, from the integers LOW <= x < HIGH. Repeatable.
    #[arg(long = "random-int", global = true, value_name = "NAME=LOW..HIGH", allow_hyphen_values = true)]
    integers: Vec<String>,
    /// The names of a kernel's arrays, scratch included, for reports and files [default: those in its Python source, if that
    /// can be read]. With N=, of kernel N alone. Repeatable.
    #[arg(long, global = true, value_name = "[N=]NAME,...")]
    names: Vec<String>,
    /// Draw the other operands from this seed: floats in (-2, 2), ragged batches where the kernel has them. Integers of
    /// kernels from elsewhere must be given with --input or --random-int.
    #[arg(long, global = true, value_name = "SEED", default_value_t = 0)]
    pub(super) random: u64,
    #[command(flatten)]
    pub(super) results: ResultArgs,
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
    /// Report no faults of this kind, such as `semaphore-unbalanced`; what is read or left then is garbage. Repeatable.
    #[arg(long = "ignore", global = true, value_name = "KIND", value_parser = ignorable)]
    ignored: Vec<FaultKind>,
    /// Write the run's timeline, for Perfetto (ui.perfetto.dev): with several orders of DMAs or kernels, that of the last one.
    #[arg(long, global = true, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Write the run's timeline on a model's clock, of libtpu's rates of DMAs and the MXU's, for Perfetto: grid steps,
    /// windows, DMAs from start to landing to wait, products, waits, and regions that the kernel names.
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "trace")]
    timeline: Option<PathBuf>,
    /// Print what is moved between which memories, sizes of DMAs, passes of the MXU and how full they are: per grid step and
    /// in all.
    #[arg(long, global = true, conflicts_with = "trace")]
    counts: bool,
    /// Write counts and timeline as one HTML page.
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "trace")]
    html: Option<PathBuf>,
    /// The chip whose rates --timeline, --counts and --html take: v5e, v5p or v6e.
    #[arg(long = "rates-of", global = true, value_name = "CHIP", default_value = "v5p", value_parser = Chip::parse)]
    rates_of: Chip,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
}

/// A kind of fault by its name, if a run can go on after it.
fn ignorable(name: &str) -> std::result::Result<FaultKind, String> {
    let kinds = || FaultKind::ALL.into_iter().filter(|kind| kind.can_be_ignored());
    let names = || kinds().map(FaultKind::name).collect::<Vec<_>>().join(", ");
    kinds().find(|kind| kind.name() == name).ok_or_else(|| format!("a run goes on after: {}", names()))
}

/// `pagoda run`: succeeds when nothing faults and everything compared agrees.
pub(in crate::cli) fn run(args: &RunArgs) -> Result<ExitCode> {
    let running = Running::new(args)?;
    let given = Given::parse(&args.inputs, &args.integers)?;
    args.results.check()?;
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
        ("--timeline", args.timeline.as_ref().and_then(|path| path.to_str())),
        ("--html", args.html.as_ref().and_then(|path| path.to_str())),
        ("--counts", args.counts.then_some("true")),
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
            no_choice(args)?;
            let launch = launch(args, &*kernel.plan()?, &given)?;
            vec![match on_machine {
                true => on_tile_machine(args, &running, &given, &*launch)?,
                false => on_plugin(args, &given, &*launch)?,
            }]
        }
        (Some(path), None) => {
            let file = File::read(path)?;
            let known = KernelCommand::of_text(&file.bytes, path)?;
            if on_machine && file.is_plain() {
                let problem = "it has no Mosaic kernel for the tile machine";
                return Err(Error::file(path, problem, "run it with --plugin cpu"));
            }
            if known.is_some() || !on_machine {
                no_choice(args)?;
            }
            if let (None, Some(lengths)) = (&known, &args.lengths) {
                let limit = format!("is of no use: line 1 of {} names no kernel", path.display());
                return Err(Error::setting("lengths", lengths, limit, "give the metadata with --input"));
            }
            let devices = match (args.devices, &known) {
                (Some(devices), Some(_)) => {
                    let limit = "is for kernels that send to other devices, which those of `pagoda emit` do not";
                    return Err(Error::setting("devices", devices, limit, "leave it out"));
                }
                (None, None) if file.communicates() => devices::of_module(&file.bytes),
                (devices, _) => devices,
            };
            if let (Some(devices), true) = (devices, on_machine) {
                of_unknown_origin(args, &file)?;
                return print_reports(&devices::run(args, &running, &given, &file, devices)?, args.json);
            }
            match (on_machine, known) {
                (true, Some(kernel)) => vec![emitted_on_tile_machine(args, &running, &given, &file, &kernel)?],
                (true, None) if args.only.is_none() && file.is_program() => {
                    of_unknown_origin(args, &file)?;
                    program::run(args, &running, &given, &file)?
                }
                (true, None) => all_on_tile_machine(args, &running, &given, &file)?,
                (false, known) => vec![module_on_plugin(args, &given, &file, known.as_ref())?],
            }
        }
    };
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

pub(super) fn order_name(dma: DmaOrder) -> String {
    match dma {
        DmaOrder::Early => "early".into(),
        DmaOrder::Late => "late".into(),
        DmaOrder::Random(seed) => format!("random:{seed}"),
    }
}

/// How kernels run on the tile machine.
#[derive(Clone, Debug)]
pub(super) struct Running {
    orders: Vec<DmaOrder>,
    allow_unwritten_reads: bool,
    allow_unwritten_outputs: bool,
    allow_parallel_overlaps: bool,
    ignored: FaultKinds,
    trace: Option<PathBuf>,
    profile: Option<Profiled>,
}

/// What is wanted of a run's profile.
#[derive(Clone, Debug)]
struct Profiled {
    chip: Chip,
    rates: Rates,
    timeline: Option<PathBuf>,
    html: Option<PathBuf>,
    counts: bool,
}

/// Refuses a file that could not be written, before anything runs.
fn writable(key: &str, path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let limit = match (path.is_dir(), folder.is_dir()) {
        (false, true) => return Ok(()),
        (true, _) => "is a folder",
        (false, false) => "is in no folder that there is",
    };
    Err(Error::setting(key, path.display(), limit, "give the path of a file, in a folder that exists"))
}

impl Running {
    fn new(args: &RunArgs) -> Result<Self> {
        for (key, path) in [("trace", &args.trace), ("timeline", &args.timeline), ("html", &args.html)] {
            path.as_deref().map_or(Ok(()), |path| writable(key, path))?;
        }
        Ok(Self {
            orders: dma_orders(args)?,
            allow_unwritten_reads: args.allow_unwritten_reads,
            allow_unwritten_outputs: args.allow_unwritten_outputs,
            allow_parallel_overlaps: args.allow_parallel_overlaps,
            ignored: args.ignored.iter().fold(FaultKinds::default(), |kinds, &kind| kinds.with(kind)),
            trace: args.trace.clone(),
            profile: match args.counts || args.timeline.is_some() || args.html.is_some() {
                true => Some(Profiled {
                    chip: args.rates_of,
                    rates: profile::rates(args.rates_of)?,
                    timeline: args.timeline.clone(),
                    html: args.html.clone(),
                    counts: args.counts,
                }),
                false => None,
            },
        })
    }

    /// `machine` with an order of DMAs, and what is allowed.
    pub(super) fn machine(&self, machine: Machine, dma: DmaOrder) -> Machine {
        let Self { allow_unwritten_reads, allow_unwritten_outputs, allow_parallel_overlaps, ignored, .. } = *self;
        Machine { dma, allow_unwritten_reads, allow_unwritten_outputs, allow_parallel_overlaps, ignored, ..machine }
    }

    /// The orders of DMAs.
    pub(super) fn orders(&self) -> &[DmaOrder] {
        &self.orders
    }

    /// # Errors
    /// When a timeline or counts are wanted, which are of one device.
    pub(super) fn unwatched(&self) -> Result<()> {
        let wanted = [("trace", self.trace.is_some()), ("timeline, counts or html", self.profile.is_some())];
        match wanted.iter().find(|(_, wanted)| *wanted) {
            None => Ok(()),
            Some((key, _)) => Err(Error::setting(*key, "given", "is of a run on one device", "drop it, or --devices")),
        }
    }

    /// The orders, as they are typed.
    pub(super) fn orders_text(&self) -> String {
        self.orders.iter().map(|&order| order_name(order)).collect::<Vec<_>>().join(", ")
    }
}

impl Profiled {
    /// Writes what is wanted as files, and puts the rest into the report.
    fn write(&self, kernel: &str, profile: &Profile, report: &mut Report) -> Result<()> {
        let page = profile::page(kernel, self.chip, profile);
        if let Some(path) = &self.timeline {
            let mut text = Vec::new();
            profile.write(kernel, &mut text).map_err(Error::io("write", path))?;
            write_atomically(path, &text)?;
        }
        if let Some(path) = &self.html {
            write_atomically(path, page.html().as_bytes())?;
        }
        if self.counts {
            (report.counts, report.page) = (Some(profile.counts()), Some(page.text()));
        }
        Ok(())
    }
}

/// A planned kernel with its inputs: given ones, the rest drawn at random.
fn launch(args: &RunArgs, plan: &dyn Planned, given: &Given) -> Result<Box<dyn Launch>> {
    let arguments = plan.arguments();
    ensure_fits(&arguments.types())?;
    let names: Vec<_> = arguments.iter().map(|argument| Name::new(argument.name)).collect();
    let types: Vec<_> = arguments.iter().map(|argument| argument.ty.clone()).collect();
    let arrays = given.arrays(&names, &types, args.random)?;
    let arrays = arguments.iter().zip(arrays).filter_map(|(argument, array)| Some((argument.name, array?)));
    plan.launch(args.random, args.lengths.as_deref(), arrays.collect())
}

/// A kernel that is emitted here.
fn on_tile_machine(args: &RunArgs, running: &Running, given: &Given, launch: &dyn Launch) -> Result<Report> {
    let context = Context::new();
    let kernel = launch.plan().kernel(&context)?;
    run_launch(args, running, given, launch, &kernel, Program::decode(kernel.module())?)
}

/// A kernel that `pagoda emit` wrote, and perhaps somebody edited.
fn emitted_on_tile_machine(
    args: &RunArgs,
    running: &Running,
    given: &Given,
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
    run_launch(args, running, given, &*launch, &emitted, program)
}

pub(super) fn unknown_op(path: &Path, error: pagoda_ir::Error) -> Error {
    Error::file(path, error, "use ops that the tile machine knows")
}

fn run_launch(
    args: &RunArgs,
    running: &Running,
    given: &Given,
    launch: &dyn Launch,
    kernel: &mosaic::Kernel,
    program: Program,
) -> Result<Report> {
    let call = Call {
        operands: &launch.operands(),
        results: &kernel.outputs(),
        launch: Some(launch),
        inputs: inputs_line(args, given, launch.batch()),
        prefix: String::new(),
        frames: &[],
    };
    let program = program.with_aliases(kernel.aliases());
    // What the plan counted belongs to what is checked.
    let vmem = args.check_against.map_or(Ok(()), |_| launch.check_vmem(&program));
    let Executed { mut report, results } = execute(running, Some(&args.results), &program, launch.machine(), call)?;
    report.unplanned = vmem.err().map(|error| error.to_string());
    if let (Some(against), Some(results)) = (args.check_against, results) {
        report.check = Some(check(args, against, launch, &results)?);
    }
    Ok(report)
}

pub(super) fn inputs_line(args: &RunArgs, given: &Given, batch: Option<String>) -> String {
    let mut line = format!("random, seed {}", args.random);
    let names: Vec<_> = given.names().collect();
    if !names.is_empty() {
        line += &format!(", but {} given", names.join(", "));
    }
    if let Some(batch) = batch {
        line += &format!("; {batch}");
    }
    line
}

/// Refuses what is of kernels of unknown origin.
fn no_choice(args: &RunArgs) -> Result<()> {
    let only = args.only.map(|only| ("kernel", only.to_string()));
    let names = args.names.first().map(|names| ("names", names.clone()));
    let limit = "is for kernels of unknown origin on the tile machine";
    only.or(names).map_or(Ok(()), |(key, value)| Err(Error::setting(key, value, limit, "leave it out")))
}

/// Refuses to check a module of unknown origin, and names for a kernel that it has not.
fn of_unknown_origin(args: &RunArgs, file: &File) -> Result<()> {
    let count = file.calls().len();
    let is_known = |at: &str| at.parse().is_ok_and(|at: usize| at < count);
    if let Some(names) = args.names.iter().find(|names| names.split_once('=').is_some_and(|(at, _)| !is_known(at))) {
        let limit = format!("is of none of the {count} kernels in {}", file.path.display());
        return Err(Error::setting("names", names, limit, "count the kernels from 0"));
    }
    if args.check_against.is_none() {
        return Ok(());
    }
    let fix = format!("check a kernel that `pagoda emit` wrote, or one of {}; or give --expect", NAMES.join(", "));
    Err(Error::file(&file.path, "its first line does not say which problem it solves", fix))
}

/// Mosaic kernels of a module of unknown origin, each on operands of its own.
fn all_on_tile_machine(args: &RunArgs, running: &Running, given: &Given, file: &File) -> Result<Vec<Report>> {
    of_unknown_origin(args, file)?;
    let context = Context::new();
    let count = file.calls().len();
    let mut reports = Vec::new();
    for (at, (opened, call)) in file.chosen_kernels(&context, args.only)? {
        let program = Program::decode(&opened.module).map_err(|error| unknown_op(&file.path, error))?;
        let Some((call, (types, results))) = call.and_then(|call| Some((call, call.types.as_ref()?))) else {
            let problem = "the sizes of its arrays stand neither in it nor in a first line from `pagoda emit`";
            return Err(Error::file(&file.path, problem, "give the StableHLO module around it, as text"));
        };
        let (program, names) = with_authors_names(args, at, program, results.len())?;
        let program = program.with_aliases(&call.aliases).with_unused_outputs(&call.unused);
        if names.len() != types.len() {
            let problem = format!("a call gives {} operands to a kernel of {}", types.len(), names.len());
            return Err(Error::file(&file.path, problem, "write the module again"));
        }
        ensure_fits(results)?;
        let default = Machine::default();
        let machine = Machine { vmem_bytes: opened.vmem_limit.unwrap_or(default.vmem_bytes), ..default };
        let prefix = if count > 1 && args.only.is_none() { format!("{at}.") } else { String::new() };
        let call = Call {
            operands: &operands(given, &names, types, args.random)?,
            results,
            launch: None,
            inputs: inputs_line(args, given, None),
            prefix,
            frames: &call.frames,
        };
        reports.push(execute(running, Some(&args.results), &program, machine, call)?.report);
    }
    Ok(reports)
}

/// A kernel whose arguments have the names of `--names`, or those in its source, if that can be read; and what its operands are
/// called: by these and by the names of the module.
pub(super) fn with_authors_names(
    args: &RunArgs,
    at: usize,
    program: Program,
    results: usize,
) -> Result<(Program, Vec<Name>)> {
    let written = program.signature().clone().with_outputs(results);
    let count = written.arguments.len();
    let prefix = format!("{at}=");
    let given = args.names.iter().find_map(|names| names.strip_prefix(&prefix)).or_else(|| {
        let for_all = args.names.iter().find(|names| !names.contains('='));
        for_all.map(String::as_str)
    });
    let named = match given.map(|names| names.split(',').map(str::to_owned).collect::<Vec<_>>()) {
        Some(names) if names.len() != count => {
            let limit = format!("are {} names for the {count} arguments of `{}`", names.len(), written.name);
            return Err(Error::setting("names", names.join(","), limit, "name every array of the kernel, scratch too"));
        }
        Some(names) => Some(names),
        None => {
            let nameless =
                |argument: &Argument| argument.name.strip_prefix("arg").is_some_and(|n| n.parse::<u32>().is_ok());
            let nameless = written.arguments.iter().all(nameless);
            let found = Sources::default().kernel(program.frames(), count).filter(|_| nameless);
            found.map(|(_, names)| names)
        }
    };
    let operands = |argument: &&Argument| matches!(argument.role, Role::Prefetch | Role::Input);
    let old = written.arguments.iter().enumerate().filter(|(_, argument)| operands(argument));
    let names = old.map(|(position, argument)| match &named {
        Some(names) => Name { name: names[position].clone(), alias: Some(argument.name.clone()) },
        None => Name::new(&argument.name),
    });
    // Sizes of a grid that the call gives come first.
    let sizes = (0..written.dynamic_grid_sizes()).map(|at| Name::new(format!("grid{at}")));
    let names = sizes.chain(names).collect();
    Ok((named.iter().fold(program, |program, names| program.with_names(names)), names))
}

/// One call of a kernel.
pub(super) struct Call<'c> {
    pub(super) operands: &'c [HostTensor],
    pub(super) results: &'c [TensorType],
    /// The problem that it is of, whose results have none of the kernel's padding.
    pub(super) launch: Option<&'c dyn Launch>,
    pub(super) inputs: String,
    /// In front of the names of files with its results.
    pub(super) prefix: String,
    /// Where the module around it calls it.
    pub(super) frames: &'c [Frame],
}

/// The report of a run, and its results for comparison, if it came to its end.
pub(super) struct Executed {
    pub(super) report: Report,
    pub(super) results: Option<Vec<HostTensor>>,
}

/// Prints to standard error what a kernel prints.
struct Prints<'k> {
    kernel: &'k str,
    step: Vec<usize>,
}

impl Observer for Prints<'_> {
    const WATCHES: bool = false;
    const LISTENS: bool = true;

    fn step(&mut self, at: &[usize]) {
        self.step = at.to_vec();
    }

    fn resume(&mut self, at: &[usize]) {
        self.step(at);
    }

    fn print(&mut self, line: &str) {
        eprintln!("print: {} {:?}: {line}", self.kernel, self.step);
    }
}

/// Runs the call once under each order of DMAs, until one faults or gives another result than the first.
pub(super) fn execute(
    running: &Running,
    wanted: Option<&ResultArgs>,
    program: &Program,
    machine: Machine,
    call: Call,
) -> Result<Executed> {
    let signature = program.signature().clone().with_outputs(call.results.len());
    let mut report = Report::new(&signature.name, "tile machine", call.inputs);
    let names = signature.arguments.iter().filter(|argument| argument.role == Role::Output);
    let names: Vec<_> = names.map(|argument| Name::new(&argument.name)).collect();
    let known = Known { signature: &signature, frames: program.frames(), call: call.frames };
    let with = |dma| running.machine(machine, dma);
    let mut outputs: Option<Vec<HostTensor>> = None;
    let mut done: Vec<String> = vec![];
    for &dma in &running.orders {
        done.push(order_name(dma));
        let machine = with(dma);
        let run = match (&running.trace, &running.profile) {
            // What a kernel prints it prints once.
            (None, None) if program.prints() && done.len() == 1 => {
                let mut prints = Prints { kernel: &signature.name, step: vec![] };
                program.run_observed(&machine, call.operands, call.results, &mut prints)
            }
            (None, None) => program.run(&machine, call.operands, call.results),
            (Some(path), _) => {
                let mut trace = Trace::new(&signature.name);
                let run = program.run_observed(&machine, call.operands, call.results, &mut trace);
                let mut text = Vec::new();
                trace.write(&mut text).map_err(Error::io("write", path))?;
                write_atomically(path, &text)?;
                run
            }
            (None, Some(wanted)) => {
                let mut profile = Profile::new(wanted.rates);
                let run = program.run_observed(&machine, call.operands, call.results, &mut profile);
                profile.finish();
                wanted.write(&signature.name, &profile, &mut report)?;
                run
            }
        };
        match run {
            Err(fault) => {
                let cell = fault.cell.map(|(buffer, offset)| Cell::Buffer { buffer, offset });
                let past = |cell| match fault.core {
                    0 => program.history(&machine, call.operands, call.results, cell),
                    core => {
                        program.history_of_device(&machine, &[call.operands.to_vec()], call.results, [0, core], cell)
                    }
                };
                let history = cell.map_or_else(Vec::new, past);
                report.explanation = Some(Explanation::of_fault(&fault, &known, history, again(dma)));
                // Which order found it.
                (report.dma, report.fault) = (done.pop(), Some(fault));
                return Ok(Executed { report, results: None });
            }
            Ok(run) => match &outputs {
                None => {
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
    let outputs = outputs.map(|returned| match call.launch {
        Some(launch) => launch.unpadded(&returned),
        None => returned,
    });
    if let (Some(outputs), Some(wanted)) = (&outputs, wanted) {
        report.finish(wanted, &call.prefix, &names, outputs)?;
        for wrong in report.expectations.iter_mut() {
            let Some(first) = &wrong.first else { continue };
            let (found, returned) = (&outputs[wrong.position], &call.results[wrong.position]);
            let offset = in_padded(first.offset, found.dims(), &returned.dims);
            let cell = Cell::Output { output: wrong.position, offset };
            let history = program.history(&with(running.orders[0]), call.operands, call.results, cell);
            wrong.explanation = Some(Explanation::of_value(&wrong.output, &known, history, again(running.orders[0])));
        }
    }
    Ok(Executed { report, results: outputs })
}

/// Where an element of a result stands in what the kernel returned: in rows of padded columns.
fn in_padded(offset: usize, dims: &[usize], returned: &[usize]) -> usize {
    let columns_of = |dims: &[usize]| dims.iter().skip(1).product::<usize>().max(1);
    let [columns, padded] = [dims, returned].map(columns_of);
    offset / columns * padded + offset % columns
}

/// The StableHLO form of a kernel.
fn on_plugin(args: &RunArgs, given: &Given, launch: &dyn Launch) -> Result<Report> {
    let client = client(args.plugin.as_deref().unwrap_or("cpu"), 1)?;
    let program = client.compile(launch.plan().stablehlo()?, 1)?;
    let ran = Ran { name: launch.name(), launch: Some(launch), arrays: &launch.arguments() };
    plugin_report(args, given, &client, &program, ran)
}

/// A StableHLO module from a file.
fn module_on_plugin(args: &RunArgs, given: &Given, file: &File, known: Option<&KernelCommand>) -> Result<Report> {
    let client = client(args.plugin.as_deref().unwrap_or("cpu"), 1)?;
    if !file.is_plain() && !client.platform().eq_ignore_ascii_case("tpu") {
        let problem = format!("it holds a Mosaic kernel, which the plugin for {} cannot run", client.platform());
        return Err(Error::file(&file.path, problem, "run it with --tile-machine"));
    }
    if let Some(kernel) = known {
        let launch = launch(args, &*kernel.plan()?, given)?;
        let program = compiled(&client, file, &file.bytes)?;
        let ran = Ran { name: &file_name(&file.path), launch: Some(&*launch), arrays: &launch.arguments() };
        return plugin_report(args, given, &client, &program, ran);
    }
    if args.check_against.is_some() {
        let fix = "check a module that `pagoda emit --stablehlo` wrote";
        return Err(Error::file(&file.path, "its first line does not say which problem it solves", fix));
    }
    let arguments = hosted::host(&file.bytes, &[], "", &|_| vec![]).map(|hosted| hosted.arguments).map_err(|_| {
        let fix = "give a module as text, with a function @main of arrays of known sizes";
        Error::file(&file.path, "the types of its arguments cannot be read", fix)
    })?;
    let (names, types): (Vec<_>, Vec<_>) =
        arguments.into_iter().map(|(name, alias, ty)| (Name { name, alias }, ty)).unzip();
    let arrays = operands(given, &names, &types, args.random)?;
    let ran = Ran { name: &file_name(&file.path), launch: None, arrays: &arrays };
    plugin_report(args, given, &client, &compiled(&client, file, &file.bytes)?, ran)
}

/// Compiles `module`, which is `file`'s.
pub(super) fn compiled(client: &Client, file: &File, module: &[u8]) -> Result<Executable> {
    client.compile(module, 1).map_err(|error| match error {
        // What plugins call a program that they cannot parse, or do not know an op of.
        pjrt::Error::Plugin {
            code: "INVALID_ARGUMENT" | "UNKNOWN" | "UNIMPLEMENTED" | "NOT_FOUND", message, ..
        } => {
            let said = message.lines().next().unwrap_or_default();
            // What Shardy leaves for a partitioner that has several devices.
            if said.contains("xla.sdy.") {
                let fix = "export it for one device, or run a kernel alone with --kernel N (of a module as text)";
                return Error::file(&file.path, "it is a program for several devices, and a run has one", fix);
            }
            let problem = format!("the plugin for {} does not take it: {said}", client.platform());
            // Bytecode has the ops of its own version, text those that every version reads.
            let fix = match said.contains("vhlo") {
                true => "it is bytecode of a newer version: give the module as text (`exported.mlir_module()`)",
                false => "write the module again",
            };
            Error::file(&file.path, problem, fix)
        }
        error => error.into(),
    })
}

pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// What runs on a plugin.
struct Ran<'r> {
    name: &'r str,
    launch: Option<&'r dyn Launch>,
    arrays: &'r [HostTensor],
}

fn plugin_report(args: &RunArgs, given: &Given, client: &Client, program: &Executable, ran: Ran) -> Result<Report> {
    let Ran { name, launch, arrays } = ran;
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
    let inputs = inputs_line(args, given, launch.and_then(Launch::batch));
    let mut report = Report { check: checked, ..Report::new(name, &client.platform(), inputs) };
    let names: Vec<_> = (0..outputs.len()).map(|at| Name::new(format!("result{at}"))).collect();
    report.finish(&args.results, "", &names, &outputs)?;
    Ok(report)
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
