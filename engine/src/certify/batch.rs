//! Static cycles of a kernel for one batch: the kernel compiled with the batch's lengths as constants, beside what a step
//! runs around it and what no tiles get below.
//!
//! The sum from the projections' outputs to the next projection's input is what a step pays: [`BatchCycles::total`]. Where the
//! compiler has no estimate of the launch (cores that take strided parts of one array), a launch of one core's share stands
//! for it; where it has none of an op around it, the time that its bytes take does. Both are said.

use std::fmt;

use pagoda_ir::Context;
use pagoda_ir::stablehlo::Module;
use pagoda_kernels::Kernel;
use pagoda_kernels::kernel::{certified_module, row_major};
use pagoda_kernels::plan::Plan;
use pagoda_kernels::random::{Lengths, batch_text};
use pagoda_kernels::vmem::Bytes;
use serde::Serialize;

use super::{Certificate, Certifier, Profile, Program};
use crate::error::{Error, Result};

/// Where cycles come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The compiler's static profile of the very launch, or program.
    Profile,
    /// Its profile of launches of one core's share.
    CoreShare,
    /// Nothing is known.
    None,
}

impl Source {
    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Profile => "the compiler's profile",
            Self::CoreShare => "a launch of one core's share: the compiler has no estimate of the full kernel",
            Self::None => "the compiler has no estimate",
        }
    }
}

/// Static cycles of a launch over one batch.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BatchCycles {
    /// The batch, as `--lengths` takes it; `None` for a kernel that has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lengths: Option<String>,
    /// Of a core that works all the time.
    pub core_cycles: Option<u64>,
    /// Of the kernel, all cores of the device at work.
    pub device_cycles: Option<u64>,
    /// Where both come from.
    pub cycles_from: Source,
    /// Of what a step runs around the kernel.
    pub around_cycles: Option<u64>,
    /// How many of them are of ops that the compiler has no estimate of: their bytes, at the memory's rate.
    pub around_by_bytes: u64,
    /// That the device's memory takes at least.
    pub hbm_floor_cycles: u64,
    /// That the matrix units of all cores take at least.
    pub mxu_floor_cycles: u64,
    /// The tiles.
    pub tiles: String,
    /// VMEM that the kernel takes, spills counted.
    pub vmem: Bytes,
}

impl BatchCycles {
    /// Has the compiler estimate a launch of `plan` over `batch` (`None` for a kernel without batches), and what a step runs
    /// around it.
    ///
    /// # Errors
    /// When the batch is not one of the problem, or the compiler is missing, crashes, takes too long or refuses the kernel.
    pub fn new<K: Kernel>(plan: &Plan<K>, batch: Option<&[Lengths]>, compiler: &dyn Compile) -> Result<Self> {
        let (mut cycles, _) = Self::of_launch(plan, batch, compiler)?;
        let around = around(plan, compiler)?;
        cycles.around_by_bytes += around.map_or(0, |(_, without)| without);
        cycles.around_cycles = cycles.around_cycles.zip(around).map(|(own, (around, _))| own + around);
        Ok(cycles)
    }

    /// As [`BatchCycles::new`], of the launch alone: around it are the copies that its program has. The compiler's answer to
    /// the launch is beside it.
    ///
    /// # Errors
    /// As [`BatchCycles::new`].
    pub fn of_launch<K: Kernel>(
        plan: &Plan<K>,
        batch: Option<&[Lengths]>,
        compiler: &dyn Compile,
    ) -> Result<(Self, Certificate)> {
        K::check_batch(plan.problem(), batch)?;
        let certificate = launched(plan, batch, compiler)?;
        let (mut cycles, mut others) = (certificate.kernel_cycles(), certificate.other_cycles());
        let mut cycles_from = if cycles.is_some() { Source::Profile } else { Source::None };
        let missing = cycles.is_none() && certificate.compiles() && certificate.profile != Profile::Stopped;
        if let (true, Some((share, times))) = (missing && plan.chip().has_static_profile(), K::core_share(plan)) {
            let of_share = launched(&share, batch, compiler)?;
            if let Some(of_share_cycles) = of_share.kernel_cycles() {
                (cycles, cycles_from) = (Some(of_share_cycles * times as u64), Source::CoreShare);
                let times = (times * plan.chip().info().cores) as u64;
                others = of_share.other_cycles().map(|(cycles, without)| (cycles * times, without * times));
            }
        }
        let vmem = certificate.kernels.iter().map(|kernel| kernel.total).max();
        let work = K::work(plan.problem(), batch);
        let cycles = Self {
            lengths: batch.map(batch_text),
            core_cycles: cycles,
            device_cycles: cycles,
            cycles_from,
            around_cycles: others.map(|(cycles, _)| cycles),
            around_by_bytes: others.map_or(0, |(_, without)| without),
            hbm_floor_cycles: work.hbm_cycles(plan.chip()).ceil() as u64,
            mxu_floor_cycles: work.mxu_cycles(plan.chip()).ceil() as u64,
            tiles: plan.tiles().to_string(),
            vmem: vmem.unwrap_or_else(|| plan.vmem().total()),
        };
        Ok((cycles, certificate))
    }

    /// What a step pays: the kernel and what stands around it.
    pub fn total(&self) -> Option<u64> {
        Some(self.device_cycles? + self.around_cycles?)
    }

    /// The larger of both floors.
    pub fn floor(&self) -> u64 {
        self.hbm_floor_cycles.max(self.mxu_floor_cycles)
    }
}

/// Who compiles a program with its static profile: libtpu ([`Certifier`]), or whoever knows what it said before.
pub trait Compile: Sync {
    /// The compiler's answer to a module, which `name` says what it is.
    ///
    /// # Errors
    /// When the compiler is missing, crashes, takes too long or refuses the program.
    fn certificate(&self, topology: &str, name: &str, module: Vec<u8>) -> Result<Certificate>;
}

impl Compile for Certifier {
    fn certificate(&self, topology: &str, _: &str, module: Vec<u8>) -> Result<Certificate> {
        Ok(self.certify(topology, Program { module: &module, replicas: 1 })?)
    }
}

/// The program of one launch, compiled.
fn launched<K: Kernel>(plan: &Plan<K>, batch: Option<&[Lengths]>, compiler: &dyn Compile) -> Result<Certificate> {
    let context = Context::new();
    let module = launch_module(&context, plan, batch)?;
    compiler.certificate(plan.chip().info().topology, plan.name(), module)
}

/// A program of one launch of `plan` over `batch`. Arrays lie as they do in a step: row-major.
///
/// # Errors
/// When the batch is not one of the problem.
pub fn launch_module<K: Kernel>(context: &Context, plan: &Plan<K>, batch: Option<&[Lengths]>) -> Result<Vec<u8>> {
    let module = certified_module::<K>(context, plan, &K::kernel_of_batch(context, plan, batch)?)?;
    Ok(module.bytecode())
}

/// A plan, and the batch that a launch of it is over.
pub type Launch<'b, K> = (Plan<K>, Option<&'b [Lengths]>);

/// Static cycles of launches of plans of one problem and chip, compiled as one program: starting the compiler takes longer
/// than most kernels do. A launch that the compiler refuses, or has no estimate of, has none.
///
/// # Errors
/// When a batch is not one of the problem, or the compiler is missing.
pub fn cycles_of_launches<K: Kernel>(launches: &[Launch<K>], compiler: &dyn Compile) -> Result<Vec<Option<u64>>> {
    let Some((plan, _)) = launches.first() else { return Ok(vec![]) };
    let name = |at: usize| format!("launch_{at}");
    let (module, times) = module_of_launches(launches, name)?;
    match compiler.certificate(plan.chip().info().topology, "launches", module) {
        Ok(certificate) if certificate.compiles() => {
            let cycles = |(at, times): (usize, &usize)| {
                let (name, numbered) = (name(at), name(at) + ".");
                let of = certificate.cycles.iter().find(|of| of.op == name || of.op.starts_with(&numbered));
                of.map(|of| of.cycles / of.equal * *times as u64)
            };
            Ok(times.iter().enumerate().map(cycles).collect())
        }
        Err(error @ Error::Io { .. }) => Err(error),
        _ if launches.len() == 1 => Ok(vec![None]),
        // One of them stands in the way of the others.
        _ => {
            let (front, back) = launches.split_at(launches.len() / 2);
            Ok([cycles_of_launches(front, compiler)?, cycles_of_launches(back, compiler)?].concat())
        }
    }
}

/// A program of all launches, one behind the other, each named; and how many of each make one of the plan's.
fn module_of_launches<K: Kernel>(
    launches: &[Launch<K>],
    name: impl Fn(usize) -> String,
) -> Result<(Vec<u8>, Vec<usize>)> {
    let context = Context::new();
    let of_launch = |(plan, batch): &Launch<K>| {
        let (share, times) = K::core_share(plan).unwrap_or_else(|| (plan.clone(), 1));
        Ok::<_, Error>((K::kernel_of_batch(&context, &share, *batch)?, times))
    };
    let (kernels, times): (Vec<_>, Vec<_>) =
        launches.iter().map(of_launch).collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let module = Module::new(&context, "launches");
    let inputs = kernels[0].inputs();
    module.function("main", &inputs, |b, args| {
        let calls = kernels.iter().enumerate().map(|(at, kernel)| kernel.call(&b.named(&name(at)), args));
        Ok(calls.collect::<pagoda_ir::Result<Vec<_>>>()?.concat())
    })?;
    row_major(&module)?;
    Ok((module.bytecode(), times))
}

/// Cycles of the programs around the kernel, and how many of them no estimate stands behind.
fn around<K: Kernel>(plan: &Plan<K>, compiler: &dyn Compile) -> Result<Option<(u64, u64)>> {
    let context = Context::new();
    let mut sum = (0, 0);
    for module in K::around(&context, plan)? {
        let certificate = compiler.certificate(plan.chip().info().topology, module.name(), module.bytecode())?;
        let Some((cycles, without)) = certificate.other_cycles() else { return Ok(None) };
        sum = (sum.0 + cycles, sum.1 + without);
    }
    Ok(Some(sum))
}

impl fmt::Display for BatchCycles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |cycles: Option<u64>| cycles.map_or("none".to_owned(), |cycles| cycles.to_string());
        if let Some(lengths) = &self.lengths {
            writeln!(f, "  batch {lengths} (query rows/KV tokens)")?;
        }
        let (core, device) = (shown(self.core_cycles), shown(self.device_cycles));
        writeln!(f, "    {:<22} {device:>12} cycles, {core} a core ({})", "kernel", self.cycles_from.words())?;
        let by_bytes = match self.around_by_bytes {
            0 => String::new(),
            cycles => format!(" ({cycles} of them by bytes: the compiler has no estimate of these ops)"),
        };
        writeln!(f, "    {:<22} {:>12} cycles{by_bytes}", "around it", shown(self.around_cycles))?;
        writeln!(f, "    {:<22} {:>12} cycles", "what a step pays", shown(self.total()))?;
        writeln!(f, "    {:<22} {:>12} cycles", "floor of the memory", self.hbm_floor_cycles)?;
        writeln!(f, "    {:<22} {:>12} cycles", "floor of the MXU", self.mxu_floor_cycles)?;
        write!(f, "    {:<22} {:>12} of VMEM at tiles {}", "", self.vmem.to_string(), self.tiles)
    }
}
