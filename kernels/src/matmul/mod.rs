//! Matrix multiplication with f32 accumulation and an optional fused epilogue.
//!
//! One activation matrix `x` of `m` rows and `k` features, one weight `w` of `n` output features. [`Layout`] says how the
//! three arrays lie in memory; the product is the same.
pub mod mosaic;
mod mutants;
pub mod native;
pub mod plan;
pub mod problem;
pub mod reference;
pub mod stablehlo;

use std::sync::LazyLock;

use pagoda_ir::{Element, Result, TensorType, mosaic::Builder, stablehlo as hlo};

pub use self::problem::{Activation, Epilogue, Layout, Problem, Spec};
use crate::{
    check::Expected,
    chips::Chip,
    choices::Choices,
    evidence::Records,
    kernel::{Kernel, Operand, Sample},
    mutants::MutantSet,
    named::{Arguments, Arrays, Named},
    plan::PlanError,
    vmem::Bytes,
};

/// The matmul kernel.
#[derive(Clone, Copy, Debug)]
pub struct Matmul;

impl Kernel for Matmul {
    const NAME: &'static str = "matmul";
    const ABOUT: &'static str = "out[m,n] = x[m,k] w[k,n] (row-major; see --layout), with f32 accumulation";

    type Spec = Spec;
    type Tiles = plan::Tiles;
    type Details = plan::Details;

    fn describe(problem: &Problem) -> String {
        let Spec { m, k, n, input, output, layout, epilogue } = **problem;
        let mut text = format!("{m}x{k}x{n} {input} -> {output} {layout:?}");
        for (set, name) in [
            (epilogue.bias, "bias"),
            (epilogue.activation == Activation::SiluGate, "silu-gate"),
            (epilogue.residual, "residual"),
        ] {
            if set {
                text += " + ";
                text += name;
            }
        }
        text
    }

    fn arguments(problem: &Problem) -> Arguments {
        problem.arguments()
    }

    fn results(problem: &Problem) -> Named<TensorType> {
        problem.results()
    }

    /// Edges along every dimension, whole dimensions, blocks that divide.
    fn sample(choices: &mut Choices) -> Sample<Self> {
        let layout = choices.one_of(&[Layout::RowMajor, Layout::WeightTransposed, Layout::FeatureMajor]);
        let float = [Element::F32, Element::Bf16];
        let (input, output) = (choices.one_of(&float), choices.one_of(&float));
        let (m, k, n) = (choices.within(1, 72), choices.within(1, 400), choices.within(1, 300));
        let (unit_m, unit_n) = if layout == Layout::FeatureMajor { (128, 8) } else { (8, 128) };
        let gate = choices.coin();
        // A gated weight is cut where the ups begin: its blocks divide n.
        let n = if gate { n.next_multiple_of(unit_n) } else { n };
        let activation = if gate { Activation::SiluGate } else { Activation::Identity };
        let epilogue = Epilogue { bias: choices.coin(), activation, residual: choices.coin() };
        // All of a dimension, or a few units of it.
        let mut tile = |size: usize, unit: usize, most: usize| match choices.within(0, most) * unit {
            tile if tile > 0 && tile < size => tile,
            _ => size,
        };
        let mut tiles = plan::Tiles { m: tile(m, unit_m, 4), n: tile(n, unit_n, 3), k: tile(k, 128, 3) };
        if gate && !n.is_multiple_of(tiles.n) {
            tiles.n = unit_n;
        }
        Sample { spec: Spec { m, k, n, input, output, layout, epilogue }, tiles, batch: None }
    }

    fn reference(problem: &Problem, inputs: &Arrays) -> Vec<Expected> {
        vec![reference::reference(problem, inputs)]
    }

    fn stablehlo<'c, 'a>(
        b: &hlo::Builder<'c, 'a>,
        problem: &Problem,
        args: &Named<hlo::Tensor<'c, 'a>>,
    ) -> Result<Vec<hlo::Tensor<'c, 'a>>> {
        Ok(vec![stablehlo::emit(b, problem, args)?])
    }

    fn mosaic<'a>(k: &'a Builder<'a>, plan: &plan::Plan) {
        mosaic::write(k, plan);
    }

    fn operands(problem: &Problem) -> Vec<Operand> {
        mosaic::operands(problem)
    }

    fn mutants() -> Vec<MutantSet<Self>> {
        mutants::sets()
    }

    fn plannable(problem: &Problem, _: Chip) -> std::result::Result<(), PlanError> {
        plan::plannable(problem)
    }

    fn legal(problem: &Problem, _: Chip, tiles: plan::Tiles) -> std::result::Result<(), PlanError> {
        plan::legal(problem, tiles)
    }

    fn choose(problem: &Problem, chip: Chip, limit: Bytes) -> Option<plan::Tiles> {
        plan::choose(problem, chip, limit)
    }

    fn layout(problem: &Problem, chip: Chip, tiles: plan::Tiles) -> crate::plan::Layout<plan::Details> {
        plan::layout(problem, chip, tiles)
    }

    /// The products of Llama 3.1 8B, each for a decode step, a chunk and a long prompt; those of equal sizes (q and o, k and
    /// v, gate and up) are one.
    fn common() -> Vec<Spec> {
        let sizes = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (4096, 128_256)];
        let rows = [8, 512, 4096];
        rows.iter().flat_map(|&m| sizes.map(|(k, n)| Spec::new([m, k, n], Element::Bf16))).collect()
    }

    /// The projections of decoders, of one device or a part of one: rows of decode steps and prefill chunks, hidden sizes
    /// from 512 to 8192, either layout of the weight, gates, residuals.
    fn workload(choices: &mut Choices) -> Option<Spec> {
        let m = choices.one_of(&[1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]);
        let (k, n) = (128 * choices.within(4, 64), 128 * choices.within(4, 112));
        let element = choices.one_of(&[Element::Bf16, Element::Bf16, Element::F32]);
        let layout = choices.one_of(&[Layout::RowMajor, Layout::WeightTransposed, Layout::FeatureMajor]);
        let activation = choices.one_of(&[Activation::Identity, Activation::SiluGate]);
        let epilogue = Epilogue { bias: choices.coin(), activation, residual: choices.coin() };
        Some(Spec { layout, epilogue, ..Spec::new([m, k, n], element) })
    }

    fn records() -> Option<&'static Records<Self>> {
        static RECORDS: LazyLock<Records<Matmul>> =
            LazyLock::new(|| Records::parse(include_str!("../../tuned/matmul.json")));
        Some(&RECORDS)
    }
}

#[cfg(feature = "cli")]
impl crate::cli::KernelArgs for Matmul {
    type Args = Spec;

    fn spec(args: Spec) -> std::result::Result<Spec, crate::Invalid> {
        Ok(args)
    }
}
