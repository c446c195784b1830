//! What planning has in common for every kernel: what a user may fix, why a plan cannot be made, and what a plan answers.

use std::fmt;

use pagoda_ir::{Context, stablehlo::Module};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    chips::Chip,
    tuned::Record,
    vmem::{Bytes, Spills, Suggestion, Verdict, VmemReport},
};

/// What the user may fix; the planner chooses the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options<T> {
    /// Tiles, instead of the planner's choice.
    pub tiles: Option<T>,
    /// Scoped VMEM limit, instead of the chip's default.
    pub vmem_limit: Option<Bytes>,
}

impl<T> Default for Options<T> {
    fn default() -> Self {
        Self { tiles: None, vmem_limit: None }
    }
}

/// Why a plan cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value} {limit}: {fix}")]
pub struct PlanError {
    /// The setting.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// What it breaks.
    pub limit: String,
    /// What to do.
    pub fix: String,
}

/// A kernel planned for a chip: every tile and every VMEM buffer named.
pub trait KernelPlan: Sized {
    /// The kernel's tile sizes.
    type Tiles: Copy + fmt::Debug + fmt::Display + Ord + Send + Serialize + DeserializeOwned + Sync + 'static;
    /// What a plan of this kernel tells beside what every plan tells; shown as a line of a plan's table.
    type Particulars: Clone + fmt::Debug + fmt::Display + Send + Serialize + Sync;

    /// Name of the kernel, tiles in it.
    fn name(&self) -> String;
    /// The problem in words: equal for equal problems, different for different ones.
    fn describe(&self) -> String;
    /// What else than chip and tiles decides what the kernel's text is, and so how much it spills: kernels of one family
    /// are alike.
    fn family(&self) -> String;
    /// The chip.
    fn chip(&self) -> Chip;
    /// The tiles.
    fn tiles(&self) -> Self::Tiles;
    /// Steps of each grid dimension, the outermost first.
    fn grid(&self) -> Vec<usize>;
    /// The scoped VMEM limit that the kernel asks for.
    fn limit(&self) -> Bytes;
    /// Every VMEM buffer.
    fn vmem(&self) -> &VmemReport;
    /// SMEM that the prefetched arrays take.
    fn smem(&self) -> Bytes {
        Bytes(0)
    }
    /// The rest.
    fn particulars(&self) -> Self::Particulars;
    /// What the compiler is on record to have said about kernels of this sort.
    fn records() -> &'static [Record<Self::Tiles>];
    /// The plan of the same problem with the tiles that the planner would choose within the same limit.
    fn replanned(&self) -> Option<Self>;
    /// The kernel as a StableHLO module whose `main` takes the problem's arguments and runs it on them.
    ///
    /// # Errors
    /// None for a legal plan, unless MLIR fails.
    fn module<'c>(&self, context: &'c Context) -> pagoda_ir::Result<Module<'c>>;

    /// Whether it fits, given what is known of its spills. Suggestions change tiles or the limit, never the problem.
    fn verdict(&self, spills: Spills) -> Verdict {
        let (total, vmem) = (self.vmem().total(), self.chip().info().vmem_per_core);
        let known = match spills {
            Spills::Certified { bytes } | Spills::Bounded { bytes } => bytes,
            Spills::Unknown => Bytes(0),
        };
        Verdict::judge(total, spills, self.limit(), || {
            let smaller = self.replanned().map(|plan| (plan.tiles().to_string(), plan.vmem().total()));
            let tiles = smaller.filter(|&(_, bytes)| bytes < total);
            let limit = (total + known <= vmem).then_some(Suggestion::Limit { bytes: total + known, chip: vmem });
            tiles.map(|(tiles, bytes)| Suggestion::Tiles { tiles, bytes }).into_iter().chain(limit).collect()
        })
    }
}

/// The scoped VMEM limit of a kernel on `chip`: the one that was asked for, or the chip's default.
///
/// # Errors
/// When it is zero or passes the chip's VMEM.
pub(crate) fn scoped_limit(chip: Chip, asked: Option<Bytes>) -> Result<Bytes, PlanError> {
    let info = chip.info();
    let limit = asked.unwrap_or(info.default_scoped_limit);
    if limit > info.vmem_per_core || limit.0 == 0 {
        return Err(PlanError {
            key: "vmem-limit",
            value: limit.to_string(),
            limit: format!("is not within the {} of VMEM that a core of {chip} has", info.vmem_per_core),
            fix: format!("give at most {}", info.vmem_per_core),
        });
    }
    Ok(limit)
}

/// The positive numbers of `text`, as tiles are written: `512,512,1024`.
pub(crate) fn positive_numbers<const N: usize>(text: &str, form: &str, example: &str) -> Result<[usize; N], PlanError> {
    let numbers: Option<Vec<usize>> = text.split(',').map(|part| part.trim().parse().ok()).collect();
    let numbers = numbers.filter(|numbers| numbers.iter().all(|&number| number > 0));
    numbers.and_then(|numbers| numbers.try_into().ok()).ok_or_else(|| PlanError {
        key: "tiles",
        value: text.to_owned(),
        limit: format!("is not {form}"),
        fix: format!("write e.g. {example}, or leave the tiles to the planner"),
    })
}
