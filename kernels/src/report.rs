//! A plan in print and as JSON: what `pagoda plan` writes, for a kernel inside or outside the registry.

use std::fmt;

use serde::Serialize;

use crate::{
    chips::Chip,
    evidence,
    kernel::Kernel,
    plan::Plan,
    vmem::{Bytes, Spills, Verdict, VmemReport},
};

/// A plan, ready to print.
#[derive(Clone, Debug, Serialize)]
#[serde(bound = "")]
pub struct Planned<K: Kernel> {
    /// The kernel's name, tiles in it.
    pub kernel: String,
    /// The problem, in words.
    pub problem: String,
    /// The problem, as `--spec` takes it.
    pub spec: K::Spec,
    /// The chip.
    pub chip: Chip,
    /// The tiles.
    pub tiles: K::Tiles,
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
    pub verdict: Verdict,
    /// Kernel-specific fields of the plan.
    #[serde(flatten)]
    pub details: K::Details,
}

impl<K: Kernel> Planned<K> {
    /// `plan`, with the verdict that the recorded certifications allow.
    pub fn new(plan: &Plan<K>) -> Self {
        Self::with(plan, evidence::spills(plan))
    }

    /// `plan`, with the verdict that `spills` allow.
    pub fn with(plan: &Plan<K>, spills: Spills) -> Self {
        Self {
            kernel: plan.name().to_owned(),
            problem: plan.describe(),
            spec: plan.problem().spec().clone(),
            chip: plan.chip(),
            tiles: plan.tiles(),
            grid: plan.grid().to_vec(),
            limit: plan.limit(),
            vmem: plan.vmem().clone(),
            total: plan.vmem().total(),
            smem: plan.smem(),
            spills,
            verdict: plan.verdict(spills),
            details: plan.details().clone(),
        }
    }
}

impl<K: Kernel> fmt::Display for Planned<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, problem, chip, grid, limit, vmem, verdict, details, spills, .. } = self;
        let grid: Vec<String> = grid.iter().map(usize::to_string).collect();
        writeln!(f, "{kernel} on {chip}: {problem}, grid {}", grid.join("x"))?;
        writeln!(f, "{vmem}")?;
        writeln!(f, "  {:<24} {spills}", "spills")?;
        writeln!(f, "  {:<24} {limit}: {verdict}", "limit")?;
        if self.smem > Bytes(0) {
            writeln!(f, "  {:<24} {} of {}", "SMEM", self.smem, chip.info().smem_per_core)?;
        }
        write!(f, "  {details}")
    }
}
