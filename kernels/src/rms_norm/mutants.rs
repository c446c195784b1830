//! Planted faults of the RMSNorm kernel.

use pagoda_ir::{Element, tile_machine::FaultKind};

use super::{Problem, RmsNorm, Spec, plan::Tiles};
use crate::{
    chips::Chip,
    kernel::Kernel,
    mutants::{Caught, Mutant, MutantSet},
    plan::{Options, Plan},
};

/// Two blocks, the last one ragged, of a group and a half each; eleven steps along the lanes. An epsilon that shows.
pub(super) fn sets() -> Vec<MutantSet<RmsNorm>> {
    let spec = Spec { rows: 40, hidden: 1408, element: Element::Bf16, epsilon: 0.25, residual: true };
    let problem = Problem::new(spec).expect("a problem");
    let options = Options { tiles: Some(Tiles { rows: 24 }), vmem_limit: None };
    let plan = Plan::new(problem, Chip::V5p, options).expect("legal tiles");
    let inputs = RmsNorm::draw(&problem, None, 1).expect("no batch");
    vec![MutantSet { plan, inputs, mutants: MUTANTS.to_vec(), superfluous: Some(0) }]
}

/// Additions of a group: x and the residual, the squares, epsilon; x and the residual again. Multiplications: the square,
/// the mean, the scale, the weight. Each twice in the text: for whole groups, and for the last rows.
const MUTANTS: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{BrokenAssumption, OutOfBounds, OutputNeverWritten, ParallelOverlap};
    &[
        ("sum not stored", |t| t.without(t.find(0, &["vector_store", "%sum,"])), Fault(OutputNeverWritten)),
        (
            "result of the last rows not stored",
            |t| t.without(t.find(1, &["vector_store", "%out,"])),
            Fault(OutputNeverWritten),
        ),
        ("residual not in the sum", |t| t.first_operand_only(t.find(0, &["addf"]), "arith.maximumf"), Mismatch),
        ("residual not in the result", |t| t.first_operand_only(t.find(3, &["addf"]), "arith.maximumf"), Mismatch),
        ("residual twice in the result", |t| t.replaced(t.find(1, &["load %x["]), "%x[", "%sum["), Mismatch),
        ("squares not added up", |t| t.first_operand_only(t.find(1, &["addf"]), "arith.maximumf"), Mismatch),
        ("not squared", |t| t.replaced(t.find(0, &["mulf"]), "arith.mulf", "arith.addf"), Mismatch),
        ("largest lane for their sum", |t| t.replaced(t.find(0, &["multi_reduction"]), "add", "maximumf"), Mismatch),
        ("mean not divided", |t| t.first_operand_only(t.find(1, &["mulf"]), "arith.maximumf"), Mismatch),
        ("epsilon left out", |t| t.first_operand_only(t.find(2, &["addf"]), "arith.maximumf"), Mismatch),
        ("root not inverted", |t| t.replaced(t.find(0, &["math.rsqrt"]), "rsqrt", "sqrt"), Mismatch),
        ("weight left out", |t| t.first_operand_only(t.find(3, &["mulf"]), "arith.maximumf"), Mismatch),
        ("rounded before the weight", |t| t.rounded(t.find(2, &["mulf"])), Mismatch),
        ("rounded sum normed", |t| t.rounded(t.find(3, &["addf"])), Mismatch),
        ("group a row late", |t| t.changed(t.find(0, &["muli"]), "arith.addi", 1), Fault(BrokenAssumption)),
        (
            "last lanes left out",
            |t| t.replaced(t.find(0, &["arith.constant 11 : i32"]), "constant 11", "constant 10"),
            Fault(OutputNeverWritten),
        ),
        (
            "last block missing",
            |t| t.replaced(t.find(0, &["iteration_bounds"]), "i64: 2>", "i64: 1>"),
            Fault(OutputNeverWritten),
        ),
        (
            "all blocks in one place",
            |t| t.transform(3, "%z = arith.constant 0 : i32", "%z, %z"),
            Fault(ParallelOverlap),
        ),
        (
            "next block of the residual",
            |t| t.transform(1, "%o = arith.constant 1 : i32\n%n = arith.addi %arg0, %o : i32", "%n, %c0_i32"),
            Fault(OutOfBounds),
        ),
    ]
};
