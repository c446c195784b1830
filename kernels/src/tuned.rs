//! What libtpu said about kernels: the recorded certifications, and what they tell of a plan's spills.
//!
//! The tables (`kernels/tuned/*.json`) are written by the certification tests, a line per kernel, and stamped with the
//! compiler's version. They are data, compiled in, so that planning stays pure.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    chips::Chip,
    plan::KernelPlan,
    vmem::{Bytes, Spills},
};

/// One kernel that was compiled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record<T> {
    /// The chip.
    pub chip: Chip,
    /// The problem, in words.
    pub problem: String,
    /// What decides the kernel's text beside chip and tiles.
    pub family: String,
    /// The tiles.
    pub tiles: T,
    /// VMEM without spills: the plan's sum and the compiler's report, which agree.
    pub vmem: Bytes,
    /// Register spills.
    pub spills: Bytes,
    /// The compiler's static estimate; `None` where it has no model of the chip or of the kernel's copies. Loops whose
    /// bounds it cannot know, as those of attention, turn once in it.
    pub cycles: Option<u64>,
    /// The compiler's version.
    pub compiler: String,
}

/// Reads a compiled-in table.
///
/// # Panics
/// When it is damaged; a test sees to it that none is.
pub(crate) fn parse<T: DeserializeOwned>(table: &str) -> Vec<Record<T>> {
    serde_json::from_str(table).expect("the table is valid")
}

/// What is known of a plan's spills: exactly, if this very kernel was compiled; else [`spill_bound`].
pub fn spills<P: KernelPlan>(plan: &P) -> Spills {
    let problem = plan.describe();
    let same = |record: &&Record<P::Tiles>| {
        record.chip == plan.chip() && record.tiles == plan.tiles() && record.problem == problem
    };
    match (P::records().iter().find(same), spill_bound::<P>(plan.chip(), &plan.family())) {
        (Some(same), _) => Spills::Certified { bytes: same.spills },
        (None, Some(bytes)) => Spills::Bounded { bytes },
        (None, None) => Spills::Unknown,
    }
}

/// More than any kernel of this chip and family spills: twice the largest that was recorded, and 256 KiB at least. `None`
/// where none was recorded.
///
/// Kernels work chunk by chunk, and every chunk of a family has the same largest size: their spills do not grow with what
/// else the tiles are.
pub fn spill_bound<P: KernelPlan>(chip: Chip, family: &str) -> Option<Bytes> {
    let alike = P::records().iter().filter(|record| record.chip == chip && record.family == family);
    Some((alike.map(|record| record.spills).max()? * 2).max(Bytes::kib(256)))
}

/// What a planner keeps free for spills: their bound, or 2 MiB where none were recorded.
pub(crate) fn spill_margin<P: KernelPlan>(chip: Chip, family: &str) -> Bytes {
    spill_bound::<P>(chip, family).unwrap_or(Bytes::mib(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{matmul, rpa};

    fn assert_valid<P: KernelPlan>() {
        assert!(!P::records().is_empty());
        assert!(P::records().iter().all(|record| !record.compiler.is_empty() && record.vmem > Bytes(0)));
    }

    #[test]
    fn the_tables_are_valid_and_stamped() {
        assert_valid::<matmul::plan::Plan>();
        assert_valid::<rpa::plan::Plan>();
    }
}
