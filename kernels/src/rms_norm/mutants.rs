//! Planted faults of the RMSNorm kernel.

use super::RmsNorm;
use crate::mutants::MutantSet;

pub(super) fn sets() -> Vec<MutantSet<RmsNorm>> {
    vec![]
}
