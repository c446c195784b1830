//! A kernel's problem on the command line, whichever kernel it is.
//!
//! Every kernel of the registry is a subcommand, with the flags of its problem and those of its plan. What an emission
//! depends on is its specification, tiles, chip and limit: `pagoda emit` writes them into the first line of what it writes, as
//! the command that writes the same again, and `pagoda run` finds them there ([`KernelCommand::of_text`]).
//!
//! From here on a kernel is a trait object: [`Planned`] and, with inputs, [`Launch`].

use std::fmt::{self, Debug};
use std::path::Path;

use clap::{ArgMatches, Args, Command, FromArgMatches, Subcommand};
use pagoda_ir::tile_machine::{Machine, Program};
use pagoda_ir::{Context, HostTensor, TensorType, mosaic};
use pagoda_kernels::check::{Case, CheckError, Expected, compare_all};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::cli::KernelArgs;
use pagoda_kernels::kernel::{self, TileSizes, Work};
use pagoda_kernels::plan::{Options, Plan};
use pagoda_kernels::random::{batch_text, parse_batch};
use pagoda_kernels::threads::Threads;
use pagoda_kernels::vmem::Bytes;
use pagoda_kernels::{Arguments, Arrays, Invalid, Kernel, Named, PlanError, Problem};
use serde::Serialize;

use crate::certify::{self, Certifier};
use crate::error::{Error, Result};
use crate::pjrt::Client;
use crate::tune::NamedBatch;

/// What the first line of an emitted text begins with.
const HEADER: &str = "// pagoda emit ";

/// Hands the registry's kernels to functions that are generic over one.
macro_rules! registered {
    ($($name:ident: $kernel:ty,)*) => {
        /// The command with a subcommand per kernel.
        fn with_subcommands(command: Command) -> Command {
            command$(.subcommand(Request::<$kernel>::command()))*
        }

        /// The request that a subcommand's matches hold; `None` if no kernel has that name.
        fn request(name: &str, matches: &ArgMatches) -> Option<std::result::Result<Box<dyn Asked>, clap::Error>> {
            $(if name == <$kernel>::NAME {
                let request = Request::<$kernel>::from_matches(matches);
                return Some(request.map(|request| Box::new(request) as Box<dyn Asked>));
            })*
            None
        }

        /// Arrays for `operands` of a kernel of unknown origin, if a kernel recognises them as its own.
        pub(super) fn recognised(operands: &[(String, TensorType)], seed: u64) -> Option<Arrays> {
            $(if let Some(problem) = <$kernel>::recognise(operands) {
                return <$kernel>::draw(&problem, None, seed).ok();
            })*
            None
        }

        /// The kernels' names.
        pub(in crate::cli) const NAMES: &[&str] = &[$(<$kernel>::NAME,)*];
    };
}
pagoda_kernels::for_each_kernel!(registered);

/// A kernel that was asked for, as a subcommand.
#[derive(Debug)]
pub(in crate::cli) struct KernelCommand(Box<dyn Asked>);

impl FromArgMatches for KernelCommand {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        let missing = || clap::Error::raw(clap::error::ErrorKind::MissingSubcommand, "name a kernel\n");
        let (name, matches) = matches.subcommand().ok_or_else(missing)?;
        request(name, matches).unwrap_or_else(|| Err(missing())).map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Subcommand for KernelCommand {
    fn augment_subcommands(command: Command) -> Command {
        with_subcommands(command)
    }

    fn augment_subcommands_for_update(command: Command) -> Command {
        with_subcommands(command)
    }

    fn has_subcommand(name: &str) -> bool {
        NAMES.contains(&name)
    }
}

impl KernelCommand {
    /// Plans it.
    ///
    /// # Errors
    /// The first value that cannot work.
    pub(in crate::cli) fn plan(&self) -> Result<Box<dyn Planned>> {
        self.plan_over(&[])
    }

    /// Plans it for launches over batches, `Q/KV[xN],...` each; where there are none, for those of the kernel's spread.
    ///
    /// # Errors
    /// The first value that cannot work.
    pub(in crate::cli) fn plan_over(&self, batches: &[&str]) -> Result<Box<dyn Planned>> {
        self.0.plan_over(batches)
    }

    /// The kernel that the first line of an emitted text names; `None` if it names none.
    ///
    /// # Errors
    /// When the line is damaged.
    pub(super) fn of_text(text: &[u8], path: &Path) -> Result<Option<Self>> {
        let line = text.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        let Some(words) = line.strip_prefix(HEADER) else { return Ok(None) };
        let bad = |problem: &str| {
            Error::file(path, format!("line 1 names no kernel: {problem}"), "emit the kernel again, or delete the line")
        };
        let words = shlex::split(words).ok_or_else(|| bad("a quote is not closed"))?;
        let command = Self::augment_subcommands(Command::new("emit").no_binary_name(true).subcommand_required(true));
        let matches = command.try_get_matches_from(words);
        let kernel = matches.and_then(|matches| Self::from_arg_matches(&matches)).map_err(|error| {
            let message = error.to_string();
            bad(message.lines().next().unwrap_or_default().trim_start_matches("error: "))
        })?;
        match kernel.0.invalid() {
            Some(invalid) => Err(bad(&format!("{} = {} {}", invalid.key, invalid.value, invalid.limit))),
            None => Ok(Some(kernel)),
        }
    }
}

/// Flags of every kernel's plan.
#[derive(Debug, Args)]
struct Target {
    /// The problem as JSON, as the first line of an emitted text has it, instead of its flags.
    #[arg(long, value_name = "JSON")]
    spec: Option<String>,
    /// Tile sizes [default: the planner's choice].
    #[arg(long)]
    tiles: Option<String>,
    /// The chip: v4, v5e, v5p, v6e or tpu7x.
    #[arg(long, default_value = "v5p", value_parser = Chip::parse)]
    chip: Chip,
    /// Scoped VMEM that the kernel may take, such as 16MiB [default: the chip's].
    #[arg(long, value_name = "SIZE", value_parser = Bytes::parse)]
    vmem_limit: Option<Bytes>,
}

/// A kernel, and how it is to be planned.
struct Request<K: Kernel> {
    spec: Result<K::Spec, Invalid>,
    tiles: Option<String>,
    chip: Chip,
    vmem_limit: Option<Bytes>,
}

impl<K: Kernel> Debug for Request<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", K::NAME, self.spec)
    }
}

impl<K: KernelArgs> Request<K> {
    fn command() -> Command {
        let command = Target::augment_args(K::Args::augment_args(Command::new(K::NAME))).about(K::ABOUT);
        command.mut_args(|arg| match arg {
            // So that `--k -1` is a bad number, not an unknown flag.
            arg if arg.is_required_set() => {
                arg.required(false).required_unless_present("spec").allow_negative_numbers(true)
            }
            arg if arg.get_id() == "tiles" => arg.value_name(K::Tiles::FORM),
            arg => arg,
        })
    }

    fn from_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        let Target { spec, tiles, chip, vmem_limit } = Target::from_arg_matches(matches)?;
        let spec = match spec {
            None => K::spec(K::Args::from_arg_matches(matches)?),
            Some(json) => serde_json::from_str(&json).map_err(|error| Invalid {
                subject: K::NAME,
                key: "spec".into(),
                value: json,
                limit: format!("does not describe a {} problem: {error}", K::NAME),
                fix: "take it from the first line of an emitted text, or give the problem's flags".into(),
            }),
        };
        Ok(Self { spec, tiles, chip, vmem_limit })
    }
}

/// A request of any kernel.
trait Asked: Debug + Send + Sync {
    /// Why its flags do not describe a problem, if they do not.
    fn invalid(&self) -> Option<&Invalid>;
    /// Plans it, for launches over `batches` where there are some.
    fn plan_over(&self, batches: &[&str]) -> Result<Box<dyn Planned>>;
}

impl<K: Kernel> Asked for Request<K> {
    fn invalid(&self) -> Option<&Invalid> {
        self.spec.as_ref().err()
    }

    fn plan_over(&self, batches: &[&str]) -> Result<Box<dyn Planned>> {
        let tiles = self.tiles.as_deref().map(K::Tiles::parse).transpose().map_err(refused)?;
        let problem = self.spec.clone().and_then(Problem::new).map_err(invalid)?;
        let batch = |text: &&str| {
            let batch = parse_batch(text)?;
            K::check_batch(&problem, Some(&batch))?;
            Ok(batch)
        };
        let batches: Vec<_> = batches.iter().map(batch).collect::<Result<_, _>>().map_err(invalid)?;
        let options = Options { tiles, vmem_limit: self.vmem_limit };
        Ok(Box::new(Plan::<K>::over(problem, self.chip, options, &batches).map_err(refused)?))
    }
}

/// A planned kernel, whichever it is.
pub(in crate::cli) trait Planned {
    /// `pagoda plan`: the plan, with the verdict that the records allow.
    fn answer(&self) -> Box<dyn super::Answer>;
    /// `pagoda certify`: the plan and the compiler's answer, over a batch of these `lengths` if there are some, and whether
    /// the kernel compiles.
    ///
    /// # Errors
    /// When the lengths are not a batch of the problem, or the compiler gives no answer.
    fn certified(&self, certifier: &Certifier, lengths: Option<&str>) -> Result<(Box<dyn super::Answer>, bool)>;
    /// `pagoda tune`: candidates compiled for named batches (of the kernel's own spread, where none are given) and ranked.
    ///
    /// # Errors
    /// When a batch is not one of the problem, or the compiler is missing.
    fn tuned(
        &self,
        batches: &[(String, String)],
        how: (usize, usize),
        compiler: &dyn certify::batch::Compile,
        done: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<crate::tune::Tuned>;
    /// `pagoda tune --measure`: times what was tuned on a device.
    ///
    /// # Errors
    /// When a candidate does not run.
    fn measured(&self, client: &Client, batches: &[(String, String)], tuned: &mut crate::tune::Tuned) -> Result<()>;
    /// The first line of an emission: the command that writes the same again.
    fn header(&self) -> String;
    /// The Mosaic kernel.
    fn kernel<'c>(&self, context: &'c Context) -> pagoda_ir::Result<mosaic::Kernel<'c>>;
    /// The StableHLO module that carries the Mosaic kernel in wire form.
    fn wire(&self) -> pagoda_ir::Result<String>;
    /// The same function as plain StableHLO: name and text.
    fn stablehlo(&self) -> pagoda_ir::Result<String>;
    /// The problem's arguments.
    fn arguments(&self) -> Arguments;
    /// The plan with inputs: drawn from `seed`, over a batch of these `lengths` if there are some, except those `given`.
    ///
    /// # Errors
    /// When the lengths are not a batch of the problem, or the given arrays not its inputs.
    fn launch(
        &self,
        seed: u64,
        lengths: Option<&str>,
        given: Vec<(&'static str, HostTensor)>,
    ) -> Result<Box<dyn Launch>>;
}

impl<K: Kernel> Planned for Plan<K> {
    fn answer(&self) -> Box<dyn super::Answer> {
        Box::new(certify::kernel::Planned::new(self))
    }

    fn certified(&self, certifier: &Certifier, lengths: Option<&str>) -> Result<(Box<dyn super::Answer>, bool)> {
        let certified = certify::kernel::Certified::new(self, certifier)?;
        let compiles = certified.certificate.compiles();
        let batch = lengths.map(parse_batch).transpose().map_err(invalid)?;
        let batch = batch.filter(|_| compiles);
        let batch = batch.map(|batch| certify::batch::BatchCycles::new(self, Some(&batch), certifier)).transpose()?;
        Ok((Box::new(OverBatch { certified, batch }), compiles))
    }

    fn tuned(
        &self,
        batches: &[(String, String)],
        how: (usize, usize),
        compiler: &dyn certify::batch::Compile,
        done: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<crate::tune::Tuned> {
        let named = named_batches(self, batches)?;
        crate::tune::tune(self, &named, how, compiler, done)
    }

    fn measured(&self, client: &Client, batches: &[(String, String)], tuned: &mut crate::tune::Tuned) -> Result<()> {
        crate::tune::measure(self, &named_batches(self, batches)?, client, tuned)
    }

    fn header(&self) -> String {
        let spec = serde_json::to_string(self.problem().spec()).unwrap_or_default();
        let (mib, limit) = (Bytes::mib(1).0, self.limit().0);
        let limit = if limit.is_multiple_of(mib) { format!("{}MiB", limit / mib) } else { limit.to_string() };
        let (tiles, chip) = (self.tiles(), self.chip());
        format!("{HEADER}{} --spec '{spec}' --tiles {tiles} --chip {chip} --vmem-limit {limit}\n", K::NAME)
    }

    fn kernel<'c>(&self, context: &'c Context) -> pagoda_ir::Result<mosaic::Kernel<'c>> {
        self.kernel(context)
    }

    fn wire(&self) -> pagoda_ir::Result<String> {
        Ok(self.module(&Context::new())?.text())
    }

    fn stablehlo(&self) -> pagoda_ir::Result<String> {
        Ok(kernel::stablehlo_module::<K>(&Context::new(), self.problem())?.text())
    }

    fn arguments(&self) -> Arguments {
        K::arguments(self.problem())
    }

    fn launch(
        &self,
        seed: u64,
        lengths: Option<&str>,
        given: Vec<(&'static str, HostTensor)>,
    ) -> Result<Box<dyn Launch>> {
        let batch = lengths.map(parse_batch).transpose().map_err(invalid)?;
        let drawn = K::draw(self.problem(), batch.as_deref(), seed).map_err(invalid)?;
        let inputs = given.into_iter().fold(drawn, |inputs, (name, array)| inputs.with(name, array));
        K::check_inputs(self.problem(), &inputs).map_err(invalid)?;
        Ok(Box::new(Launched { plan: self.clone(), inputs }))
    }
}

/// The batches to tune for: the given ones, else the kernel's own, else one launch.
fn named_batches<K: Kernel>(plan: &Plan<K>, given: &[(String, String)]) -> Result<Vec<NamedBatch>> {
    let named = |(name, lengths): &(String, String)| {
        let lengths = Some(parse_batch(lengths).map_err(invalid)?);
        Ok::<_, Error>(NamedBatch { name: name.clone(), lengths })
    };
    let mut named: Vec<_> = given.iter().map(named).collect::<Result<_>>()?;
    if named.is_empty() {
        let spread = K::spread(plan.problem()).into_iter();
        named = spread.map(|(name, of)| NamedBatch { name: name.into(), lengths: Some(of) }).collect();
    }
    if named.is_empty() {
        named = vec![NamedBatch { name: "launch".into(), lengths: None }];
    }
    Ok(named)
}

/// What the compiler says of a kernel, and of it over one batch.
#[derive(Serialize)]
#[serde(bound = "")]
struct OverBatch<K: Kernel> {
    #[serde(flatten)]
    certified: certify::kernel::Certified<K>,
    #[serde(skip_serializing_if = "Option::is_none")]
    batch: Option<certify::batch::BatchCycles>,
}

impl<K: Kernel> fmt::Display for OverBatch<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.certified)?;
        self.batch.as_ref().map_or(Ok(()), |batch| write!(f, "\n{batch}"))
    }
}

/// A planned kernel with inputs of its problem, whichever kernel it is.
pub(in crate::cli) trait Launch {
    /// The plan.
    fn plan(&self) -> &dyn Planned;
    /// The kernel's name, tiles in it.
    fn name(&self) -> &str;
    /// The Mosaic kernel's operands.
    fn operands(&self) -> Vec<HostTensor>;
    /// The arguments of the StableHLO form, in order.
    fn arguments(&self) -> Vec<HostTensor>;
    /// Names and types of the results.
    fn results(&self) -> Named<TensorType>;
    /// A tile machine with the plan's memories.
    fn machine(&self) -> Machine;
    /// Whether `program` declares in VMEM what was planned.
    ///
    /// # Errors
    /// Both lists, where they differ.
    fn check_vmem(&self, program: &Program) -> Result<(), CheckError>;
    /// Leading elements of each result that are not padding.
    fn live(&self) -> Vec<usize>;
    /// What the results must be: computes the reference.
    fn expected(&self) -> Vec<Expected>;
    /// The ragged batch, where there is one.
    fn batch(&self) -> Option<String>;
    /// The problem in words.
    fn problem(&self) -> String;
    /// What a launch costs.
    fn work(&self) -> Work;
    /// The results by the form in Rust, where there is one.
    fn native(&self, threads: &dyn Threads) -> Option<Vec<HostTensor>>;
    /// Compares results with `expected`.
    ///
    /// # Errors
    /// The worst value that is off.
    fn compare(&self, results: &[HostTensor], expected: &[Expected]) -> Result<(), CheckError> {
        compare_all(self.name(), &self.unpadded(results), &self.results(), expected)
    }
    /// What a kernel returned as the problem's results.
    fn unpadded(&self, returned: &[HostTensor]) -> Vec<HostTensor>;
}

struct Launched<K: Kernel> {
    plan: Plan<K>,
    inputs: Arrays,
}

impl<K: Kernel> Launch for Launched<K> {
    fn plan(&self) -> &dyn Planned {
        &self.plan
    }

    fn name(&self) -> &str {
        self.plan.name()
    }

    fn problem(&self) -> String {
        self.plan.describe()
    }

    fn work(&self) -> Work {
        let problem = self.plan.problem();
        K::work(problem, K::lengths(problem, &self.inputs).as_deref())
    }

    fn native(&self, threads: &dyn Threads) -> Option<Vec<HostTensor>> {
        K::native(self.plan.problem(), &self.inputs, threads)
    }

    fn operands(&self) -> Vec<HostTensor> {
        Case::new(&self.plan, &self.inputs).operands()
    }

    fn arguments(&self) -> Vec<HostTensor> {
        self.inputs.values().cloned().collect()
    }

    fn results(&self) -> Named<TensorType> {
        K::results(self.plan.problem())
    }

    fn unpadded(&self, returned: &[HostTensor]) -> Vec<HostTensor> {
        kernel::host_results::<K>(self.plan.problem(), returned)
    }

    fn machine(&self) -> Machine {
        self.plan.machine()
    }

    fn check_vmem(&self, program: &Program) -> Result<(), CheckError> {
        Case::new(&self.plan, &self.inputs).check_vmem(program)
    }

    fn live(&self) -> Vec<usize> {
        K::live(self.plan.problem(), &self.inputs)
    }

    fn expected(&self) -> Vec<Expected> {
        Case::new(&self.plan, &self.inputs).expected()
    }

    fn batch(&self) -> Option<String> {
        let batch = K::batch(self.plan.problem(), &self.inputs)?;
        Some(format!("{} sequences (query rows/KV tokens): {}", batch.len(), batch_text(&batch)))
    }
}

/// What a planner refuses is a setting that cannot work.
fn refused(error: PlanError) -> Error {
    Error::setting(error.key, error.value, error.limit, error.fix)
}

/// What is not a problem, or not its inputs, is a setting that cannot work.
fn invalid(invalid: Invalid) -> Error {
    Error::setting(invalid.key, invalid.value, invalid.limit, invalid.fix)
}
