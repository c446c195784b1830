//! What libtpu said about matmul kernels: the recorded certifications, and what they tell of a plan's spills.
//!
//! The table (`kernels/tuned/matmul.json`) is written by the certification tests and stamped with the compiler's
//! version; it is data, compiled in, so that planning stays pure.

use std::sync::OnceLock;

use pagoda_ir::element::Element;
use serde::{Deserialize, Serialize};

use super::{
    plan::{Plan, Tiles},
    problem::{Activation, Spec},
};
use crate::{
    chips::Chip,
    vmem::{Bytes, Spills},
};

/// One kernel that was compiled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The chip.
    pub chip: Chip,
    /// The problem: `8x4096x14336 bf16 -> bf16, row_major, none`.
    pub problem: String,
    /// Type of both sides.
    pub input: Element,
    /// Whether gates and ups are two products of one kernel.
    pub gated: bool,
    /// The tiles.
    pub tiles: Tiles,
    /// VMEM without spills: the plan's sum and the compiler's report, which agree.
    pub vmem: Bytes,
    /// Register spills.
    pub spills: Bytes,
    /// The compiler's static estimate; `None` where it has no model of the chip.
    pub cycles: Option<u64>,
    /// The compiler's version.
    pub compiler: String,
}

/// The recorded certifications.
///
/// # Panics
/// When the compiled-in table is damaged; a test sees to it that it is not.
pub fn records() -> &'static [Record] {
    static RECORDS: OnceLock<Vec<Record>> = OnceLock::new();
    RECORDS.get_or_init(|| serde_json::from_str(include_str!("../../tuned/matmul.json")).expect("the table is valid"))
}

/// How a table names a problem.
pub fn describe(spec: &Spec) -> String {
    let mut text = format!("{}x{}x{} {} -> {} {:?}", spec.m, spec.k, spec.n, spec.input, spec.output, spec.layout);
    for (set, name) in [
        (spec.epilogue.bias, "bias"),
        (spec.epilogue.activation == Activation::SiluGate, "silu-gate"),
        (spec.epilogue.residual, "residual"),
    ] {
        if set {
            text += " + ";
            text += name;
        }
    }
    text
}

/// What is known of a plan's spills: exactly, if this very kernel was compiled; else [`spill_bound`].
pub fn spills(plan: &Plan) -> Spills {
    let problem = describe(plan.problem());
    let same =
        |record: &&Record| record.chip == plan.chip() && record.problem == problem && record.tiles == plan.tiles();
    match (records().iter().find(same), spill_bound(plan.chip(), plan.problem())) {
        (Some(same), _) => Spills::Certified { bytes: same.spills },
        (None, Some(bytes)) => Spills::Bounded { bytes },
        (None, None) => Spills::Unknown,
    }
}

/// More than any matmul of this chip, input type and number of products spills: twice the largest that was recorded, and 256 KiB at least.
/// `None` where none was recorded.
///
/// The body works chunk by chunk and every chunk of a chip has the same largest size, so that spills do not grow with
/// the tiles.
pub fn spill_bound(chip: Chip, problem: &Spec) -> Option<Bytes> {
    let key = (chip, problem.input, problem.epilogue.activation == Activation::SiluGate);
    let alike = records().iter().filter(|record| (record.chip, record.input, record.gated) == key);
    Some((alike.map(|record| record.spills).max()? * 2).max(Bytes::kib(256)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_valid_and_stamped() {
        assert!(!records().is_empty());
        assert!(records().iter().all(|record| !record.compiler.is_empty() && record.vmem > Bytes(0)));
    }
}
