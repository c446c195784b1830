//! Planning and certifying matmuls: what `pagoda plan matmul` and `pagoda certify matmul` answer.

use std::fmt;

use pagoda_ir::{Context, Element};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::matmul::plan::{Estimate, Options, Order, Plan, Tiles};
use pagoda_kernels::matmul::{Epilogue, Layout, Problem, Spec, mosaic, tuned};
use pagoda_kernels::vmem::{self, BufferKind, Bytes, Spills, VmemReport};
use serde::Serialize;

use super::report::KernelVmem;
use super::{Certificate, Certifier, Program};
use crate::error::{Error, Result};

/// A matmul to plan, as the command line takes it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The problem.
    pub spec: Spec,
    /// The chip's name.
    pub chip: String,
    /// Scoped VMEM limit, `16MiB`; the chip's default if absent.
    pub vmem_limit: Option<String>,
    /// Tiles `M,N,K`; the planner's choice if absent.
    pub tiles: Option<String>,
}

impl Request {
    /// A product of the given sizes and type, row-major, with nothing fused, on `chip`.
    pub fn new(m: usize, k: usize, n: usize, element: Element, chip: &str) -> Self {
        let spec =
            Spec { m, k, n, input: element, output: element, layout: Layout::RowMajor, epilogue: Epilogue::NONE };
        Self { spec, chip: chip.to_owned(), vmem_limit: None, tiles: None }
    }

    /// Plans it.
    ///
    /// # Errors
    /// A [`Error::Setting`] for the first value that cannot work.
    pub fn plan(&self) -> Result<Plan> {
        let chip = Chip::parse(&self.chip)
            .map_err(|_| Error::setting("chip", &self.chip, "is not known", "use v4, v5e, v5p, v6e or tpu7x"))?;
        let problem = Problem::new(self.spec)
            .map_err(|invalid| Error::setting(invalid.key, invalid.value, invalid.limit, invalid.fix))?;
        let setting = |error: pagoda_kernels::matmul::plan::PlanError| {
            Error::setting(error.key, error.value, error.limit, error.fix)
        };
        let limit = self.vmem_limit.as_deref().map(|text| {
            Bytes::parse(text).map_err(|_| Error::setting("vmem-limit", text, "is no size", "write e.g. 16MiB"))
        });
        let tiles = self.tiles.as_deref().map(|text| Tiles::parse(text).map_err(setting));
        let options = Options { tiles: tiles.transpose()?, vmem_limit: limit.transpose()? };
        Plan::new(problem, chip, options).map_err(setting)
    }
}

/// A plan, told.
#[derive(Clone, Debug, Serialize)]
pub struct Planned {
    /// The kernel's name.
    pub kernel: String,
    /// The problem, in words.
    pub problem: String,
    /// The chip.
    pub chip: Chip,
    /// The tiles.
    pub tiles: Tiles,
    /// Steps of each grid dimension.
    pub grid: [usize; 3],
    /// What the grid's first dimension walks along.
    pub order: Order,
    /// The scoped VMEM limit that the kernel asks for.
    pub limit: Bytes,
    /// Every VMEM buffer.
    pub vmem: VmemReport,
    /// Their sum.
    pub total: Bytes,
    /// What is known of its spills.
    pub spills: Spills,
    /// Whether it fits.
    #[serde(flatten)]
    pub verdict: vmem::Verdict,
    /// What it should cost.
    pub estimate: Estimate,
}

impl Planned {
    fn new(plan: &Plan, spills: Spills) -> Self {
        Self {
            kernel: plan.name(),
            problem: tuned::describe(plan.problem()),
            chip: plan.chip(),
            tiles: plan.tiles(),
            grid: plan.grid(),
            order: plan.order(),
            limit: plan.limit(),
            vmem: plan.vmem().clone(),
            total: plan.vmem().total(),
            spills,
            verdict: plan.verdict(spills),
            estimate: plan.estimate(),
        }
    }
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, problem, chip, grid, limit, vmem, verdict, estimate, .. } = self;
        writeln!(f, "{kernel} on {chip}: {problem}, grid {}x{}x{}", grid[0], grid[1], grid[2])?;
        writeln!(f, "{vmem}")?;
        let spills = match self.spills {
            Spills::Certified { bytes } => format!("{bytes} (certified)"),
            Spills::Bounded { bytes } => format!("{bytes} at most (kernels of this kind, recorded)"),
            Spills::Unknown => "unknown".into(),
        };
        writeln!(f, "  {:<24} {spills}", "spills")?;
        writeln!(f, "  {:<24} {limit}: {verdict}", "limit")?;
        let (cycles, mxu) = (estimate.cycles, estimate.mxu_cycles);
        let moved = Bytes(estimate.bytes_moved);
        write!(f, "  {:<24} {cycles:.0} cycles ({:.0}% matrix unit), {moved} moved", "estimate", 100.0 * mxu / cycles)
    }
}

/// Plans a matmul and judges the plan by the recorded certifications.
///
/// # Errors
/// As [`Request::plan`].
pub fn plan_matmul(request: &Request) -> Result<Planned> {
    let plan = request.plan()?;
    Ok(Planned::new(&plan, tuned::spills(&plan)))
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
pub struct Certified {
    /// The plan, judged by the certificate.
    pub plan: Planned,
    /// The compiler's answer.
    pub certificate: Certificate,
    /// Where both differ.
    pub differences: Vec<Difference>,
}

impl Certified {
    /// The line for the table of certified kernels; `None` if it does not compile.
    pub fn record(&self) -> Option<tuned::Record> {
        let kernel = self.certificate.kernels.first().filter(|_| self.certificate.compiles())?;
        Some(tuned::Record {
            chip: self.plan.chip,
            problem: self.plan.problem.clone(),
            input: self.plan.vmem.buffers.first()?.element,
            tiles: self.plan.tiles,
            vmem: kernel.without_spills(),
            spills: kernel.spills(),
            cycles: self.certificate.kernel_cycles(),
            compiler: self.certificate.compiler.clone(),
        })
    }
}

impl fmt::Display for Certified {
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

/// Plans a matmul, has the real compiler compile it for one host of the chip, and compares.
///
/// # Errors
/// As [`Request::plan`]; and when the compiler is missing, crashes, takes too long or refuses the kernel.
pub fn certify_matmul(request: &Request, certifier: &Certifier) -> Result<Certified> {
    let plan = request.plan()?;
    let context = Context::new();
    let module = mosaic::module(&context, &plan)?.bytecode();
    let program = Program { module: &module, replicas: 1 };
    let certificate = certifier.certify(plan.chip().info().topology, program)?;
    let kernel = certificate.kernels.first();
    let spills = match kernel {
        Some(kernel) if certificate.compiles() => Spills::Certified { bytes: kernel.spills() },
        _ => Spills::Unknown,
    };
    let differences = kernel.map_or_else(Vec::new, |kernel| differences(plan.vmem(), kernel));
    Ok(Certified { plan: Planned::new(&plan, spills), certificate, differences })
}
