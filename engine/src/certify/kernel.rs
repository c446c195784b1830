//! Certifying a kernel, whichever it is: its plan, the compiler's answer, and where both differ.

use std::fmt;

use pagoda_ir::Context;
use pagoda_kernels::Kernel;
use pagoda_kernels::evidence::{Digest, Record};
use pagoda_kernels::plan::Plan;
use pagoda_kernels::vmem::{BufferKind, Bytes, Spills, VmemReport};
use serde::Serialize;

pub use pagoda_kernels::Planned;

use super::report::KernelVmem;
use super::{Certificate, Certifier, Program};
use crate::error::Result;

/// A kind of VMEM where plan and compiler disagree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The kind of buffer.
    pub kind: BufferKind,
    /// The plan's bytes.
    pub planned: Bytes,
    /// The bytes of the compiler's report.
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
pub struct Certified<K: Kernel> {
    /// The plan, with the verdict of this certificate.
    pub plan: Planned<K>,
    /// Of the kernel's body.
    pub digest: Digest,
    /// The compiler's answer.
    pub certificate: Certificate,
    /// Where both differ.
    pub differences: Vec<Difference>,
}

impl<K: Kernel> Certified<K> {
    /// Has the real compiler compile the plan's kernel for one host of its chip, and compares.
    ///
    /// # Errors
    /// When the compiler is missing, crashes, takes too long or refuses the kernel.
    pub fn new(plan: &Plan<K>, certifier: &Certifier) -> Result<Self> {
        let context = Context::new();
        Self::of_kernel(plan, &plan.kernel(&context)?, certifier)
    }

    /// As [`Certified::new`], with a variant of the plan's kernel.
    ///
    /// # Errors
    /// As [`Certified::new`].
    pub fn of_kernel(plan: &Plan<K>, kernel: &pagoda_ir::mosaic::Kernel, certifier: &Certifier) -> Result<Self> {
        let context = Context::new();
        let module = pagoda_kernels::kernel::certified_module::<K>(&context, plan, kernel)?.bytecode();
        let program = Program { module: &module, replicas: 1 };
        let certificate = certifier.certify(plan.chip().info().topology, program)?;
        if certificate.compiles() && certificate.kernels.len() != 1 {
            let message = format!("it names {} kernels, the program has one", certificate.kernels.len());
            return Err(super::Error::Report { report: "VMEM report", message }.into());
        }
        let compiled = certificate.kernels.first();
        let spills = match compiled {
            Some(compiled) if certificate.compiles() => Spills::Certified { bytes: compiled.spills() },
            _ => Spills::Unknown,
        };
        let differences = compiled.map_or_else(Vec::new, |compiled| differences(plan.vmem(), compiled));
        let digest = Digest::of_text(&kernel.text());
        Ok(Self { plan: Planned::with(plan, spills), digest, certificate, differences })
    }

    /// The line for the table of certified kernels; `None` if it does not compile.
    pub fn record(&self) -> Option<Record<K>> {
        let kernel = self.certificate.kernels.first().filter(|_| self.certificate.compiles())?;
        let Planned { chip, spec, tiles, limit, .. } = &self.plan;
        Some(Record {
            chip: *chip,
            spec: spec.clone(),
            tiles: *tiles,
            limit: *limit,
            digest: self.digest.clone(),
            vmem: kernel.without_spills(),
            spills: kernel.spills(),
            cycles: self.certificate.kernel_cycles(),
            compiler: self.certificate.compiler.clone(),
        })
    }
}

impl<K: Kernel> fmt::Display for Certified<K> {
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
