//! Planning and certifying a kernel, whichever it is: the plan told, the compiler's answer, and where both differ.

use std::fmt;

use pagoda_ir::Context;
use pagoda_kernels::chips::Chip;
use pagoda_kernels::plan::{KernelPlan, Options, PlanError};
use pagoda_kernels::tuned::{self, Record};
use pagoda_kernels::vmem::{self, BufferKind, Bytes, Spills, VmemReport};
use serde::Serialize;

use super::report::KernelVmem;
use super::{Certificate, Certifier, Program};
use crate::error::{Error, Result};

/// A plan, told.
#[derive(Clone, Debug, Serialize)]
pub struct Planned<P: KernelPlan> {
    /// The kernel's name.
    pub kernel: String,
    /// The problem, in words.
    pub problem: String,
    /// The chip.
    pub chip: Chip,
    /// The tiles.
    pub tiles: P::Tiles,
    /// Steps of each grid dimension.
    pub grid: Vec<usize>,
    /// The scoped VMEM limit that the kernel asks for.
    pub limit: Bytes,
    /// Every VMEM buffer.
    pub vmem: VmemReport,
    /// Their sum.
    pub total: Bytes,
    /// SMEM that the prefetched arrays take.
    pub smem: Bytes,
    /// What is known of its spills.
    pub spills: Spills,
    /// Whether it fits.
    #[serde(flatten)]
    pub verdict: vmem::Verdict,
    /// What only this kernel's plans tell.
    #[serde(flatten)]
    pub particulars: P::Particulars,
}

impl<P: KernelPlan> Planned<P> {
    /// Judges `plan` by the recorded certifications.
    pub fn new(plan: &P) -> Self {
        Self::with(plan, tuned::spills(plan))
    }

    fn with(plan: &P, spills: Spills) -> Self {
        Self {
            kernel: plan.name(),
            problem: plan.describe(),
            chip: plan.chip(),
            tiles: plan.tiles(),
            grid: plan.grid(),
            limit: plan.limit(),
            vmem: plan.vmem().clone(),
            total: plan.vmem().total(),
            smem: plan.smem(),
            spills,
            verdict: plan.verdict(spills),
            particulars: plan.particulars(),
        }
    }
}

impl<P: KernelPlan> fmt::Display for Planned<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, problem, chip, grid, limit, vmem, verdict, particulars, .. } = self;
        let grid: Vec<String> = grid.iter().map(usize::to_string).collect();
        writeln!(f, "{kernel} on {chip}: {problem}, grid {}", grid.join("x"))?;
        writeln!(f, "{vmem}")?;
        let spills = match self.spills {
            Spills::Certified { bytes } => format!("{bytes} (certified)"),
            Spills::Bounded { bytes } => format!("{bytes} at most (kernels of this kind, recorded)"),
            Spills::Unknown => "unknown".into(),
        };
        writeln!(f, "  {:<24} {spills}", "spills")?;
        writeln!(f, "  {:<24} {limit}: {verdict}", "limit")?;
        if self.smem > Bytes(0) {
            writeln!(f, "  {:<24} {} of {}", "SMEM", self.smem, chip.info().smem_per_core)?;
        }
        write!(f, "  {particulars}")
    }
}

/// A kind of VMEM where plan and compiler disagree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The kind of buffer.
    pub kind: BufferKind,
    /// What the plan foresaw.
    pub planned: Bytes,
    /// What the compiler's report says.
    pub compiled: Bytes,
}

/// Where a plan's buffers and the compiler's report differ, spills aside. Empty when they agree to the byte.
pub fn differences(planned: &VmemReport, compiled: &KernelVmem) -> Vec<Difference> {
    use BufferKind::{InputWindow, InternalScratch, OutputWindow, Scratch};
    let kinds = [InputWindow, OutputWindow, Scratch, InternalScratch].into_iter();
    let compared = kinds.map(|kind| {
        let buffers = planned.buffers.iter().filter(|buffer| buffer.kind == kind);
        let planned = buffers.map(|buffer| buffer.bytes).sum();
        Difference { kind, planned, compiled: compiled.of_kind(kind) }
    });
    compared.filter(|difference| difference.planned != difference.compiled).collect()
}

/// A plan and the compiler's answer to it.
#[derive(Clone, Debug, Serialize)]
#[serde(bound = "")]
pub struct Certified<P: KernelPlan> {
    #[serde(skip)]
    family: String,
    /// The plan, judged by the certificate.
    pub plan: Planned<P>,
    /// The compiler's answer.
    pub certificate: Certificate,
    /// Where both differ.
    pub differences: Vec<Difference>,
}

impl<P: KernelPlan> Certified<P> {
    /// Has the real compiler compile the plan's kernel for one host of its chip, and compares.
    ///
    /// # Errors
    /// When the compiler is missing, crashes, takes too long or refuses the kernel.
    pub fn new(plan: &P, certifier: &Certifier) -> Result<Self> {
        let context = Context::new();
        Self::of_module(plan, &plan.module(&context)?.bytecode(), certifier)
    }

    /// As [`Certified::new`], with a module of the caller's that runs the plan's kernel once.
    ///
    /// # Errors
    /// As [`Certified::new`].
    pub fn of_module(plan: &P, module: &[u8], certifier: &Certifier) -> Result<Self> {
        let certificate = certifier.certify(plan.chip().info().topology, Program { module, replicas: 1 })?;
        if certificate.compiles() && certificate.kernels.len() != 1 {
            let message = format!("it names {} kernels, the program has one", certificate.kernels.len());
            return Err(super::Error::Report { report: "VMEM report", message }.into());
        }
        let kernel = certificate.kernels.first();
        let spills = match kernel {
            Some(kernel) if certificate.compiles() => Spills::Certified { bytes: kernel.spills() },
            _ => Spills::Unknown,
        };
        let differences = kernel.map_or_else(Vec::new, |kernel| differences(plan.vmem(), kernel));
        Ok(Self { family: plan.family(), plan: Planned::with(plan, spills), certificate, differences })
    }

    /// The line for the table of certified kernels; `None` if it does not compile.
    pub fn record(&self) -> Option<Record<P::Tiles>> {
        let kernel = self.certificate.kernels.first().filter(|_| self.certificate.compiles())?;
        Some(Record {
            chip: self.plan.chip,
            problem: self.plan.problem.clone(),
            family: self.family.clone(),
            tiles: self.plan.tiles,
            vmem: kernel.without_spills(),
            spills: kernel.spills(),
            cycles: self.certificate.kernel_cycles(),
            compiler: self.certificate.compiler.clone(),
        })
    }
}

impl<P: KernelPlan> fmt::Display for Certified<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.plan)?;
        write!(f, "{}", self.certificate)?;
        match self.differences.as_slice() {
            [] if self.certificate.compiles() => write!(f, "  plan and compiler agree to the byte, spills aside"),
            differences => differences.iter().try_for_each(|Difference { kind, planned, compiled }| {
                writeln!(f, "  {kind}: planned {planned}, compiled {compiled}")
            }),
        }
    }
}

/// The chip and the planner's options that a command line names.
pub(super) fn options<T>(
    chip: &str,
    vmem_limit: Option<&str>,
    tiles: Option<&str>,
    parse: impl FnOnce(&str) -> Result<T, PlanError>,
) -> Result<(Chip, Options<T>)> {
    let chip = Chip::parse(chip)
        .map_err(|_| Error::setting("chip", chip, "is not known", "use v4, v5e, v5p, v6e or tpu7x"))?;
    let limit = vmem_limit.map(|text| {
        Bytes::parse(text).map_err(|_| Error::setting("vmem-limit", text, "is no size", "write e.g. 16MiB"))
    });
    let tiles = tiles.map(|text| parse(text).map_err(refused));
    Ok((chip, Options { tiles: tiles.transpose()?, vmem_limit: limit.transpose()? }))
}

/// What a planner refuses is a setting that cannot work.
pub(super) fn refused(error: PlanError) -> Error {
    Error::setting(error.key, error.value, error.limit, error.fix)
}

/// What is no problem is a setting that cannot work.
pub(super) fn invalid(invalid: pagoda_kernels::Invalid) -> Error {
    Error::setting(invalid.key, invalid.value, invalid.limit, invalid.fix)
}
