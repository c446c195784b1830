//! RMSNorm (Zhang and Sennrich, 2019) with a residual that is added first: what stands between two blocks of a decoder.
//!
//! `sum = x + residual` in f32, `out = sum / sqrt(mean(sum^2) + epsilon) * weight` in f32, row by row. `out` is rounded to
//! the element type once, at the end. With a residual, `sum` is a result too, rounded to the element type: the new residual
//! stream. The norm is of the f32 sum, not of the rounded one.
//!
//! vLLM's `fused_add_rms_norm` on CUDA (`csrc/layernorm_kernels.cu`) rounds more often, in bf16 each time: the sum before
//! its squares are taken, and the normed value before it is multiplied by the weight. Results differ from it by up to two
//! roundings of bf16. Gemma's weight is stored without the 1 that is added to it: add it first.
//!
//! Squares are f32: values beyond about 1e19 overflow, as they do there.
pub mod mosaic;
mod mutants;
pub mod plan;
pub mod problem;
pub mod reference;
pub mod stablehlo;

use std::sync::LazyLock;

use pagoda_ir::{
    Element, Result, TensorType,
    mosaic::{Builder, Cost},
    stablehlo as hlo,
};

pub use self::problem::{Problem, Spec};
use crate::{
    check::Expected,
    chips::Chip,
    choices::Choices,
    evidence::Records,
    kernel::{self, Kernel, Operand, Sample},
    mutants::MutantSet,
    named::{Arguments, Arrays, Named},
    plan::{Layout, PlanError},
    random::Lengths,
    vmem::Bytes,
};

/// The RMSNorm kernel.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm;

impl Kernel for RmsNorm {
    const NAME: &'static str = "rms_norm";
    const ABOUT: &'static str = "RMSNorm of rows, of their sum with a residual if there is one";

    type Spec = Spec;
    type Tiles = plan::Tiles;
    type Details = plan::Details;

    fn describe(problem: &Problem) -> String {
        let Spec { rows, hidden, element, epsilon, residual } = **problem;
        let residual = if residual { " + residual" } else { "" };
        format!("{rows}x{hidden} {element}{residual}, epsilon {epsilon}")
    }

    fn arguments(problem: &Problem) -> Arguments {
        problem.arguments()
    }

    fn results(problem: &Problem) -> Named<TensorType> {
        problem.results()
    }

    fn cost(problem: &Problem) -> Cost {
        let Spec { rows, hidden, .. } = **problem;
        let bytes_accessed = kernel::passes_once::<Self>(problem);
        Cost { flops: 4 * (rows * hidden) as u64, transcendentals: rows as u64, bytes_accessed }
    }

    /// Rows that fill groups and rows that do not, one to twelve registers of lanes, whole and ragged blocks.
    fn sample(choices: &mut Choices) -> Sample<Self> {
        let element = choices.one_of(&[Element::F32, Element::Bf16]);
        let (rows, hidden) = (choices.within(1, 100), 128 * choices.within(1, 12));
        let (residual, epsilon) = (choices.coin(), choices.one_of(&[1e-5, 1e-6, 0.5]));
        let tiles = match 8 * choices.within(0, rows.div_ceil(8)) {
            0 => rows,
            tile => tile,
        };
        let spec = Spec { rows, hidden, element, epsilon, residual };
        Sample { spec, tiles: plan::Tiles { rows: tiles }, batch: None }
    }

    fn reference(problem: &Problem, inputs: &Arrays) -> Vec<Expected> {
        reference::reference(problem, inputs)
    }

    fn stablehlo<'c, 'a>(
        b: &hlo::Builder<'c, 'a>,
        problem: &Problem,
        args: &Named<hlo::Tensor<'c, 'a>>,
    ) -> Result<Vec<hlo::Tensor<'c, 'a>>> {
        stablehlo::emit(b, problem, args)
    }

    fn mosaic<'a>(k: &'a Builder<'a>, plan: &plan::Plan) {
        mosaic::write(k, plan);
    }

    fn operands(problem: &Problem, _: Chip) -> Vec<Operand> {
        mosaic::operands(problem)
    }

    fn mutants() -> Vec<MutantSet<Self>> {
        mutants::sets()
    }

    fn legal(problem: &Problem, _: Chip, tiles: plan::Tiles) -> std::result::Result<(), PlanError> {
        plan::legal(problem, tiles)
    }

    fn choose(problem: &Problem, chip: Chip, limit: Bytes, _: &[Vec<Lengths>]) -> Option<plan::Tiles> {
        plan::choose(problem, chip, limit)
    }

    fn layout(problem: &Problem, chip: Chip, tiles: plan::Tiles) -> Layout<plan::Details> {
        plan::layout(problem, chip, tiles)
    }

    /// Hidden sizes of Llama, Qwen and Gemma from 1B to 70B, with a residual; the rows of decode steps and of prefill chunks.
    /// Then what has no residual (before the first block) or is f32.
    fn common() -> Vec<Spec> {
        let hidden = [2048, 3584, 4096, 5120, 8192];
        let (bf16, f32) = (Element::Bf16, Element::F32);
        let of = |rows, hidden, element, residual| Spec { rows, hidden, element, epsilon: 1e-5, residual };
        let blocks = [8, 64, 512, 1024].into_iter().flat_map(|rows| hidden.map(|hidden| of(rows, hidden, bf16, true)));
        let others = [8, 512].into_iter().flat_map(|rows| {
            [(bf16, false), (f32, true), (f32, false)].map(|(element, residual)| of(rows, 4096, element, residual))
        });
        blocks.chain(others).collect()
    }

    /// The norms of decoders: rows of decode steps and prefill chunks, hidden sizes from 512 to 16384.
    fn workload(choices: &mut Choices) -> Option<Spec> {
        let rows = choices.one_of(&[1, 4, 8, 16, 32, 64, 100, 128, 256, 512, 1000, 1024, 2048, 4096]);
        let hidden = 128 * choices.within(4, 128);
        let element = choices.one_of(&[Element::Bf16, Element::Bf16, Element::F32]);
        Some(Spec { rows, hidden, element, epsilon: choices.one_of(&[1e-5, 1e-6]), residual: choices.coin() })
    }

    fn records() -> Option<&'static Records<Self>> {
        static RECORDS: LazyLock<Records<RmsNorm>> =
            LazyLock::new(|| Records::parse(include_str!("../../tuned/rms_norm.json")));
        Some(&RECORDS)
    }
}

#[cfg(feature = "cli")]
impl crate::cli::KernelArgs for RmsNorm {
    type Args = Spec;

    fn spec(args: Spec) -> std::result::Result<Spec, crate::Invalid> {
        Ok(args)
    }
}
