//! Planted faults of the grouped matmul kernel.

use pagoda_ir::{Element, tile_machine::FaultKind};

use super::{Activation, GroupedMatmul, Layout, Problem, Spec, group, plan::Tiles};
use crate::{
    chips::Chip,
    kernel::Kernel,
    mutants::{Caught, Mutant, MutantSet},
    plan::{Options, Plan},
    random::Lengths,
};

/// Groups that share bands, one of several chunks, an empty one, and rows that no group has. First with gates and biases of one
/// of three layers, the depth in two parts, and a core whose only tile of columns has fewer than its buffer; then weights that
/// stay for all chunks of an expert; then gpt-oss's activation, and several tiles of columns to a core.
pub(super) fn sets() -> Vec<MutantSet<GroupedMatmul>> {
    let set = |chip, spec: Spec, tiles, mutants: &[Mutant]| {
        let problem = Problem::new(spec).expect("a problem");
        let plan = Plan::new(problem, chip, Options { tiles: Some(tiles), vmem_limit: None }).expect("legal tiles");
        let sizes: Vec<Lengths> = [3, 0, 9, 45, 14].map(group).to_vec();
        let mut drawn = (1..).map(|seed| GroupedMatmul::draw(&problem, Some(&sizes), seed).expect("a batch"));
        // Of a stack, neither the first layer nor the last.
        let inputs =
            drawn.find(|inputs| crate::kernel::layer_of(inputs) as usize == spec.layers / 2).expect("some seed");
        MutantSet { plan, inputs, mutants: mutants.to_vec(), superfluous: Some(0) }
    };
    let plain = Spec { output: Element::F32, ..Spec::new([90, 136, 128], 5, Element::Bf16) };
    let transposed = Spec { n: 208, layout: Layout::WeightTransposed, ..plain };
    let gated = Spec { k: 256, activation: Activation::SiluGate, bias: true, layers: 3, ..transposed };
    let clamped = Spec { activation: Activation::ClampedSwiglu, ..transposed };
    vec![
        set(Chip::V5p, gated, Tiles { m: 32, n: 128, k: 128 }, GATED),
        set(Chip::V6e, plain, Tiles { m: 32, n: 128, k: 136 }, KEPT),
        set(Chip::V6e, clamped, Tiles { m: 32, n: 128, k: 136 }, CLAMPED),
    ]
}

/// Numbers of an expert are loaded for the weights of the first two steps and the first rows, for the weights of the step after
/// next and the next one's rows, for both waits, and to compute; there are 13 bands of features.
const GATED: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{BrokenAssumption, OutOfBounds, OutputNeverWritten};
    &[
        ("ups a band early", |t| t.replaced(t.find(2, &["arith.constant 13 : i32"]), "13 :", "12 :"), Mismatch),
        (
            "features beyond the last",
            |t| t.replaced(t.find(2, &["arith.minsi"]), "arith.minsi", "arith.maxsi"),
            Fault(OutOfBounds),
        ),
        ("first layer's weights", |t| t.changed(t.find(0, &["memref.load %layer["]), "arith.muli", 0), Mismatch),
        ("weights of an expert without rows", |t| t.changed(t.find(0, &["load %chunk_expert["]), "arith.addi", 1), {
            Mismatch
        }),
        (
            "biases of the next expert",
            |t| t.changed(t.find(7, &["load %chunk_expert["]), "arith.addi", 1),
            Fault(OutOfBounds),
        ),
        ("groups end a row late", |t| t.changed(t.find(0, &["arith.addi"]), "arith.addi", 1), Mismatch),
        (
            "the ups' part of the sum for the gates'",
            |t| t.replaced(t.find(0, &["vector.load %sum_gate["]), "%sum_gate[", "%sum_up["),
            Mismatch,
        ),
        (
            "the ups' biases for the gates'",
            |t| t.replaced(t.find(0, &["vector.load %bias_gate["]), "%bias_gate[", "%bias_up["),
            Mismatch,
        ),
        (
            "gates for ups",
            |t| t.replaced(t.find(0, &["vector.load %up_tiles["]), "%up_tiles[", "%gate_tiles["),
            Mismatch,
        ),
        ("first layer's biases", |t| t.transform(2, "%z = arith.constant 0 : i32", "%z, %z, %z, %z"), Mismatch),
        ("biases left out", |t| t.first_operand_only(t.find(1, &["addf"]), "arith.maximumf"), Mismatch),
        ("gate not times its sigmoid", |t| t.first_operand_only(t.find(0, &["mulf"]), "arith.maximumf"), Mismatch),
        ("ups left out", |t| t.first_operand_only(t.find(1, &["mulf"]), "arith.maximumf"), Mismatch),
        ("rounded before the activation", |t| t.rounded(t.find(0, &["addf"])), Mismatch),
        (
            "block a row late",
            |t| t.changed(t.find(0, &["arith.muli", "%c32_i32_"]), "arith.addi", 1),
            Fault(BrokenAssumption),
        ),
        (
            "columns of the second core missing",
            |t| t.replaced(t.find(0, &["iteration_bounds"]), "i64: 2>", "i64: 1>"),
            Fault(OutputNeverWritten),
        ),
    ]
};

const KEPT: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    &[
        ("weights of the first expert for all", |t| t.changed(t.find(1, &["arith.minsi"]), "arith.muli", 0), Mismatch),
        (
            "a band too few of the next chunk's rows",
            |t| t.changed(t.find(1, &["load %chunk_first["]), "arith.addi", 16),
            Fault(FaultKind::Deadlock),
        ),
    ]
};

/// Multiplications: by 1.702, the gate and its sigmoid, and the up. Additions: the sigmoid's, and 1.
const CLAMPED: &[Mutant] = {
    use Caught::Mismatch;
    &[
        ("gates not bounded", |t| t.first_operand_only(t.find(0, &["minimumf"]), "arith.maximumf"), Mismatch),
        ("ups not bounded below", |t| t.first_operand_only(t.find(0, &["maximumf"]), "arith.maximumf"), Mismatch),
        ("ups not bounded above", |t| t.first_operand_only(t.find(1, &["minimumf"]), "arith.maximumf"), Mismatch),
        ("factor in the sigmoid left out", |t| t.first_operand_only(t.find(0, &["mulf"]), "arith.maximumf"), Mismatch),
        ("gate not times its sigmoid", |t| t.first_operand_only(t.find(1, &["mulf"]), "arith.maximumf"), Mismatch),
        ("1 not added to ups", |t| t.first_operand_only(t.find(1, &["addf"]), "arith.maximumf"), Mismatch),
    ]
};
