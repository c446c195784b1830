//! What the real compiler is on record to have said about kernels, and what that says of a plan.
//!
//! A record is of one *body*: it carries a digest of the emitted kernel, the VMEM limit that it was compiled with and the
//! compiler's version. So an edited kernel has no certification until it is compiled again: its old record is *stale*, and
//! counts as nothing but a point of the estimate. Tables (`kernels/tuned/KERNEL.json`) are written by `make certify-all`;
//! they are data, compiled in, so that planning stays pure. `make test` computes every digest anew and names the stale ones.
//!
//! *The estimate.* Spills are the part of VMEM that arithmetic does not give. A kernel says which family a plan belongs to
//! and how many bytes its body holds at once ([`Spilling`]); within a family, spills per live byte are taken from the
//! records of the same chip where there are at least [`ENOUGH_OF_A_CHIP`], else from those of every chip. The estimate is
//! [`MARGIN`] times the largest of them. It is tested by leaving out each record in turn and estimating it from the others
//! (`tests/evidence.rs`): no record passes its estimate. It is still an estimate: what it lets through is
//! [`Verdict::LikelyFits`](crate::vmem::Verdict::LikelyFits), never `Fits`.
//!
//! Never here: a file that is read, a compiler that is asked.

use pagoda_ir::Context;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    chips::Chip,
    kernel::Kernel,
    plan::{Options, Plan, PlanError, Spilling},
    problem::Problem,
    vmem::{Bytes, Spills},
};

/// Points of a family that an estimate needs.
pub const ENOUGH: usize = 5;
/// Points of a family on one chip that do without those of other chips.
pub const ENOUGH_OF_A_CHIP: usize = 8;
/// How much larger than the largest spills per live byte of its family the estimate is.
pub const MARGIN: f64 = 2.4;
/// The least that is estimated: what kernels spill that hold hardly anything at once.
pub const LEAST: Bytes = Bytes::kib(256);

/// A digest of a kernel's body: SHA-256 of its readable text, which has no locations, cut to 128 bits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Digest(String);

impl Digest {
    /// The digest of the kernel that `plan` emits.
    ///
    /// # Errors
    /// None for a legal plan, unless MLIR fails.
    pub fn of<K: Kernel>(plan: &Plan<K>) -> pagoda_ir::Result<Self> {
        let context = Context::new();
        Ok(Self::of_text(&plan.kernel(&context)?.text()))
    }

    /// The digest of a kernel's readable text.
    pub fn of_text(text: &str) -> Self {
        let hash = Sha256::digest(text.as_bytes());
        Self(hash[..16].iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// One kernel that was compiled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound = "", deny_unknown_fields)]
pub struct Record<K: Kernel> {
    /// The chip.
    pub chip: Chip,
    /// The problem.
    pub spec: K::Spec,
    /// The tiles.
    pub tiles: K::Tiles,
    /// The scoped VMEM limit that it was compiled with.
    pub limit: Bytes,
    /// Of the body that was compiled.
    pub digest: Digest,
    /// VMEM without spills: the plan's sum and the compiler's report, which agree.
    pub vmem: Bytes,
    /// Register spills.
    pub spills: Bytes,
    /// The compiler's static estimate; `None` where it has no model of the chip or of the kernel's DMAs. Loops whose
    /// bounds it cannot know, such as those over KV blocks, turn once in it.
    pub cycles: Option<u64>,
    /// The compiler's version.
    pub compiler: String,
}

impl<K: Kernel> Record<K> {
    /// The plan that was compiled.
    ///
    /// # Errors
    /// When the problem or the tiles are not legal any more.
    pub fn plan(&self) -> Result<Plan<K>, PlanError> {
        let options = Options { tiles: Some(self.tiles), vmem_limit: Some(self.limit) };
        Plan::new(Problem::new(self.spec.clone())?, self.chip, options)
    }

    /// Whether both are of one problem, with the same tiles, limit and chip: the later one replaces the earlier.
    pub fn same_kernel(&self, other: &Self) -> bool {
        (self.chip, &self.spec, self.tiles, self.limit) == (other.chip, &other.spec, other.tiles, other.limit)
    }
}

/// The table of a kernel.
#[derive(Debug)]
pub struct Records<K: Kernel> {
    records: Vec<Record<K>>,
    estimator: Estimator,
}

impl<K: Kernel> Records<K> {
    /// Reads a compiled-in table.
    ///
    /// # Panics
    /// When it is damaged; a test sees to it that none is.
    pub fn parse(table: &str) -> Self {
        let records: Vec<Record<K>> = serde_json::from_str(table).expect("the table is valid");
        let points = records.iter().filter_map(|record| {
            let plan = record.plan().ok()?;
            Some(Point { chip: record.chip, spilling: plan.spilling().clone(), spills: record.spills })
        });
        Self { estimator: Estimator { points: points.collect() }, records }
    }

    /// The records, sorted by chip.
    pub fn all(&self) -> &[Record<K>] {
        &self.records
    }

    /// The estimator of their spills.
    pub fn estimator(&self) -> &Estimator {
        &self.estimator
    }
}

/// One kernel's spills.
#[derive(Clone, Debug)]
pub struct Point {
    /// The chip that it was compiled for.
    pub chip: Chip,
    /// What its spills depend on.
    pub spilling: Spilling,
    /// What it spilled.
    pub spills: Bytes,
}

/// Estimates spills from those of compiled kernels; see the [module docs](self).
#[derive(Clone, Debug, Default)]
pub struct Estimator {
    points: Vec<Point>,
}

impl Estimator {
    /// From these points.
    pub fn new(points: Vec<Point>) -> Self {
        Self { points }
    }

    /// The points that it is made of.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// What a kernel spills at most, as far as compiled ones show; `None` where too few are alike.
    pub fn estimate(&self, chip: Chip, spilling: &Spilling) -> Option<Bytes> {
        self.estimate_without(usize::MAX, chip, spilling)
    }

    /// As [`Estimator::estimate`], from all points but one.
    pub fn estimate_without(&self, left_out: usize, chip: Chip, spilling: &Spilling) -> Option<Bytes> {
        let family = || {
            let points = self.points.iter().enumerate().filter(move |(index, _)| *index != left_out);
            points.map(|(_, point)| point).filter(|point| point.spilling.family == spilling.family)
        };
        let here = family().filter(|point| point.chip == chip).count() >= ENOUGH_OF_A_CHIP;
        if !here && family().count() < ENOUGH {
            return None;
        }
        let points = family().filter(|point| !here || point.chip == chip);
        let per_byte = points.map(|point| point.spills.0 as f64 / point.spilling.live.0.max(1) as f64);
        let most = per_byte.fold(0.0, f64::max);
        Some(Bytes((MARGIN * most * spilling.live.0 as f64) as u64).max(LEAST))
    }
}

/// What is known of a plan's spills: exactly, if this very body was compiled with this limit; else an estimate, if enough
/// kernels of its family were.
pub fn spills<K: Kernel>(plan: &Plan<K>) -> Spills {
    let Some(records) = K::records() else { return Spills::Unknown };
    let alike = |record: &&Record<K>| {
        let total = plan.vmem().total();
        (record.chip, record.tiles, record.limit, record.vmem) == (plan.chip(), plan.tiles(), plan.limit(), total)
    };
    let alike: Vec<_> = records.all().iter().filter(alike).collect();
    // Emission takes longer than planning: only where a record may be of this body.
    let digest = if alike.is_empty() { None } else { Digest::of(plan).ok() };
    match alike.into_iter().find(|record| Some(&record.digest) == digest.as_ref()) {
        Some(record) => Spills::Certified { bytes: record.spills },
        None => match records.estimator().estimate(plan.chip(), plan.spilling()) {
            Some(bytes) => Spills::Estimated { bytes },
            None => Spills::Unknown,
        },
    }
}

/// What a planner keeps free for spills: twice what the body holds at once, [`LEAST`] at least. It does not depend on the
/// records: a new record must not change which tiles are chosen.
pub fn margin(spilling: &Spilling) -> Bytes {
    (spilling.live * 2).max(LEAST)
}

/// The records whose kernel is emitted otherwise today, each with the reason: they certify nothing.
pub fn stale<K: Kernel>() -> Vec<String> {
    let records = K::records().map_or(&[][..], Records::all);
    let reason = |record: &Record<K>| match record.plan() {
        Err(error) => Some(error.to_string()),
        Ok(plan) => match Digest::of(&plan) {
            Ok(digest) if digest == record.digest => None,
            Ok(digest) => Some(format!("its body is {} now", digest.0)),
            Err(error) => Some(error.to_string()),
        },
    };
    let name = |record: &Record<K>| {
        let problem = Problem::new(record.spec.clone());
        let words = problem.map_or_else(|invalid| invalid.to_string(), |problem| K::describe(&problem));
        format!("{} on {}, tiles {}, {words}", K::NAME, record.chip, record.tiles)
    };
    records.iter().filter_map(|record| Some(format!("{}: {}", name(record), reason(record)?))).collect()
}
