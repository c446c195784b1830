//! Planted faults of the matmul kernel.

use pagoda_ir::{Element, tile_machine::FaultKind};

use super::{Activation, Epilogue, Layout, Matmul, Problem, Quantized, Spec, plan::Tiles};
use crate::{
    chips::Chip,
    kernel::Kernel,
    mutants::{Caught, Mutant, MutantSet},
    plan::{Options, Plan},
};

/// Rows, columns and depth of three blocks each, the last one of each ragged.
pub(super) fn sets() -> Vec<MutantSet<Matmul>> {
    let (input, output, layout) = (Element::Bf16, Element::F32, Layout::RowMajor);
    let epilogue = Epilogue { bias: true, activation: Activation::Identity, residual: true };
    let set = |spec: Spec, tiles, mutants: &[Mutant], nothing_superfluous: bool| {
        let layers = spec.layers;
        let problem = Problem::new(spec).expect("a problem");
        let options = Options { tiles: Some(tiles), vmem_limit: None };
        let plan = Plan::new(problem, Chip::V5p, options).expect("legal tiles");
        let mut drawn = (1..).map(|seed| Matmul::draw(&problem, None, seed).expect("no batch"));
        // Of a stack, neither the first layer nor the last.
        let inputs = drawn.find(|inputs| crate::kernel::layer_of(inputs) as usize == layers / 2).expect("some seed");
        MutantSet { plan, inputs, mutants: mutants.to_vec(), superfluous: nothing_superfluous.then_some(0) }
    };
    let plain = Spec { output, layout, epilogue, ..Spec::new([40, 600, 300], input) };
    let layout = Layout::WeightTransposed;
    let quantized = Quantized { weight: Element::I8, group: Some(32), activations: true };
    let gated = Epilogue { bias: true, activation: Activation::SiluGate, residual: false };
    let cut = Spec { output, layout, epilogue: gated, ..Spec::new([24, 300, 130], input) };
    let gated = Epilogue { activation: Activation::GeluGate, ..Epilogue::NONE };
    let gelu = Spec { output, epilogue: gated, ..Spec::new([24, 64, 256], input) };
    vec![
        set(plain, Tiles { m: 16, n: 128, k: 256 }, MUTANTS, true),
        set(Spec { layers: 3, ..plain }, Tiles { m: 16, n: 128, k: 256 }, STACKED, false),
        set(Spec { layout, quantized: Some(quantized), ..plain }, Tiles { m: 32, n: 128, k: 256 }, QUANTIZED, false),
        set(cut, Tiles { m: 16, n: 128, k: 128 }, CUT, false),
        set(gelu, Tiles { m: 16, n: 128, k: 64 }, GELU, false),
    ]
}

/// Of GELU: the sigmoid of a polynomial of the gate.
const GELU: &[Mutant] = {
    use Caught::Mismatch;
    &[
        ("the gate's square for its cube", |t| t.first_operand_only(t.find(0, &["mulf"]), "arith.maximumf"), Mismatch),
        ("ten times the cube", |t| t.replaced(t.find(0, &["4.471500e-02"]), "e-02", "e-01"), Mismatch),
        ("half the scale", |t| t.replaced(t.find(0, &["1.59576917"]), "1.59576917", "0.79788458"), Mismatch),
        ("ups left out", |t| t.first_operand_only(t.find(5, &["mulf"]), "arith.maximumf"), Mismatch),
    ]
};

/// Of i8 on both sides in groups of 32: windows are x, w, w_scale, x_scale, bias, residual, out. The last step comes first in
/// the text; it has three groups, the last of them a part of one.
const QUANTIZED: &[Mutant] = {
    use Caught::Mismatch;
    &[
        (
            "scales of the row block's number",
            |t| t.replaced(t.find(0, &["arith.muli %grid2"]), "%grid2", "%grid0"),
            Mismatch,
        ),
        ("scale of the group before", |t| t.replaced(t.find(1, &["arith.addi"]), "addi", "subi"), Mismatch),
        ("group not scaled", |t| t.first_operand_only(t.find(0, &["mulf"]), "arith.maximumf"), Mismatch),
        ("rows not scaled", |t| t.first_operand_only(t.find(3, &["mulf"]), "arith.maximumf"), Mismatch),
        ("scales of columns do not move", |t| t.transform(2, "%z = arith.constant 0 : i32", "%z, %z"), Mismatch),
        ("scales of rows do not move", |t| t.transform(3, "%z = arith.constant 0 : i32", "%z, %z"), Mismatch),
        ("a lane of the next group", |t| t.replaced(t.find(0, &["dense<32>"]), "dense<32>", "dense<33>"), Mismatch),
        ("all groups but one", |t| t.replaced(t.find(0, &["cmpi slt"]), "slt", "sge"), Mismatch),
        ("lanes of two groups", |t| t.replaced(t.find(0, &["andi"]), "andi", "ori"), Mismatch),
        ("a group's sum left out", |t| t.first_operand_only(t.find(1, &["addf"]), "arith.maximumf"), Mismatch),
    ]
};

/// Of a gated weight whose ups begin two features after a block does: windows are x, gates, ups, what is behind them, both
/// biases, out.
const CUT: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{OutOfBounds, UnwrittenRead};
    &[
        (
            "ups shifted too far",
            |t| t.replaced(t.find(0, &["constant 254 : i32"]), "constant 254", "constant 253"),
            Mismatch,
        ),
        ("ups from the first block on", |t| t.transform(2, "", "%arg1, %arg2"), Mismatch),
        (
            "the ups' own block behind them",
            |t| t.transform(3, "%o = arith.constant 1 : i32\n%l = arith.addi %arg1, %o : i32", "%l, %arg2"),
            Mismatch,
        ),
        (
            "gates of the next block",
            |t| t.transform(1, "%o = arith.constant 1 : i32\n%l = arith.addi %arg1, %o : i32", "%l, %arg2"),
            Mismatch,
        ),
        (
            "a block beyond the last",
            |t| t.replaced(t.find(1, &["arith.minsi"]), "arith.minsi", "arith.maxsi"),
            Fault(OutOfBounds),
        ),
        ("sums of ups not zeroed", |t| t.without(t.find(0, &["vector_store", "%sum_up,"])), Fault(UnwrittenRead)),
        ("biases of ups do not move", |t| t.transform(5, "%z = arith.constant 0 : i32", "%z, %z"), Mismatch),
    ]
};

/// Of a kernel whose weights are stacks of layers: windows are x, w, bias, residual, out.
const STACKED: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::OutOfBounds;
    &[
        ("first layer's w", |t| t.transform(1, "%z = arith.constant 0 : i32", "%z, %arg2, %arg1"), Mismatch),
        ("first layer's bias", |t| t.transform(2, "%z = arith.constant 0 : i32", "%z, %z, %arg1"), Mismatch),
        ("a step along k taken for the layer", |t| t.transform(1, "", "%arg2, %arg2, %arg1"), Mismatch),
        (
            "a layer beyond the last",
            |t| t.transform(1, "%o = arith.constant 3 : i32", "%o, %arg2, %arg1"),
            Fault(OutOfBounds),
        ),
    ]
};

const MUTANTS: &[Mutant] = {
    use Caught::{Fault, Mismatch};
    use FaultKind::{OutOfBounds, OutputNeverWritten, ParallelOverlap, UnwrittenRead};
    &[
        ("accumulator not zeroed", |t| t.without(t.find(0, &["vector_store", "%sum,"])), Fault(UnwrittenRead)),
        (
            "accumulator zeroed in every step but the first",
            |t| t.replaced(t.find(0, &["cmpi eq"]), "eq", "ne"),
            Fault(UnwrittenRead),
        ),
        ("accumulator zeroed in every step", |t| t.replaced(t.find(0, &["cmpi eq"]), "eq", "sge"), Mismatch),
        ("partial sum not kept", |t| t.without(t.find(1, &["vector_store", "%sum,"])), Mismatch),
        ("another step taken for the last", |t| t.replaced(t.find(1, &["cmpi eq"]), "eq", "ne"), Mismatch),
        (
            "last step along k missing",
            |t| t.replaced(t.find(0, &["iteration_bounds"]), "i64: 3, 3, 3", "i64: 3, 3, 2"),
            Fault(OutputNeverWritten),
        ),
        (
            "last row of blocks missing",
            |t| t.replaced(t.find(0, &["iteration_bounds"]), "i64: 3, 3, 3", "i64: 2, 3, 3"),
            Fault(OutputNeverWritten),
        ),
        (
            "result's window one row short",
            |t| t.one_row_short(t.find(0, &["vector_store", "%out,"]), 16),
            Fault(OutputNeverWritten),
        ),
        ("result not stored", |t| t.without(t.find(0, &["vector_store", "%out,"])), Fault(OutputNeverWritten)),
        ("mask inverted at the edge of k", |t| t.replaced(t.find(0, &["cmpi slt"]), "slt", "sge"), Mismatch),
        ("x masked one column too late", |t| t.replaced(t.find(0, &["dense<88>"]), "88", "89"), Mismatch),
        ("w masked one row too early", |t| t.replaced(t.find(1, &["dense<88>"]), "88", "87"), Mismatch),
        ("w not masked", |t| t.replaced(t.find(1, &["dense<88>"]), "88", "256"), Mismatch),
        ("residual read from the output", |t| t.replaced(t.find(0, &["load %residual["]), "%residual", "%out"), {
            Fault(UnwrittenRead)
        }),
        ("bias left out", |t| t.first_operand_only(t.find(0, &["addf"]), "arith.maximumf"), Mismatch),
        (
            "k called parallel",
            |t| t.replaced(t.find(0, &["dimension_semantics<arbitrary>"]), "<arbitrary>", "<parallel>"),
            Fault(ParallelOverlap),
        ),
        (
            "all output blocks in one place",
            |t| t.transform(4, "%z = arith.constant 0 : i32", "%z, %z"),
            Fault(ParallelOverlap),
        ),
        (
            "block of x off by one",
            |t| t.transform(0, "%o = arith.constant 1 : i32\n%l = arith.addi %arg2, %o : i32", "%arg0, %l"),
            Fault(OutOfBounds),
        ),
        ("x does not move along k", |t| t.transform(0, "%z = arith.constant 0 : i32", "%arg0, %z"), Mismatch),
        ("rows and columns of the residual swapped", |t| t.transform(3, "", "%arg1, %arg0"), Mismatch),
    ]
};
