//! Matrix multiplication with f32 accumulation and an optional fused epilogue.
//!
//! One activation matrix `x` of `m` rows and `k` features, one weight `w` of `n` output features. [`Layout`] says how the
//! three arrays lie in memory; the product is the same. The weights of several layers can be one array: a program then
//! loops over its layers with one kernel, which reads the layer's part where it lies; a slice would copy it.
mod estimate;
pub mod mosaic;
mod mutants;
pub mod native;
pub mod plan;
pub mod problem;
pub mod reference;
pub mod stablehlo;

use std::sync::LazyLock;

use pagoda_ir::{
    Element, HostTensor, Result, TensorType,
    mosaic::{Builder, Cost},
    stablehlo as hlo,
};

pub use self::estimate::Estimate;
pub use self::problem::{Activation, Epilogue, Layout, Problem, Quantized, Spec};
use crate::{
    check::Expected,
    chips::Chip,
    choices::Choices,
    cost::{Family, Stage},
    error::Invalid,
    evidence::Records,
    kernel::{self, Kernel, Operand, Sample},
    mutants::MutantSet,
    named::{Argument, Arguments, Arrays, Named, Role},
    plan::PlanError,
    random::{self, Lengths, Random},
    threads::Threads,
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
        let Spec { m, k, n, input, output, layout, epilogue, layers, quantized } = **problem;
        let mut text = format!("{m}x{k}x{n} {input} -> {output} {layout:?}");
        if let Some(Quantized { weight, group, activations }) = quantized {
            text += &format!(", {} {weight}", if activations { "x and w" } else { "w" });
            text += &group.map_or(String::new(), |group| format!(" in groups of {group}"));
        }
        let [bias, residual] =
            [(epilogue.bias, "bias"), (epilogue.residual, "residual")].map(|(on, name)| on.then_some(name));
        for name in [bias, epilogue.activation.name(), residual].into_iter().flatten() {
            text += " + ";
            text += name;
        }
        if layers > 1 {
            text += &format!(", one of {layers} layers");
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
        let quantized = choices.maybe(|choices| Quantized {
            weight: choices.one_of(&Quantized::ELEMENTS),
            group: choices
                .maybe(|choices| choices.one_of(&[128, 32, 256, 8, 64]).min(128 * (k / 128)))
                .filter(|&g| g > 0),
            activations: choices.coin(),
        });
        let unit = if quantized.is_some() { 32 } else { 8 };
        let (unit_m, unit_n) = if layout == Layout::FeatureMajor { (128, unit) } else { (unit, 128) };
        let gate = choices.coin();
        // As often as not a block can start at the first up.
        let n = if gate && choices.coin() { n.next_multiple_of(unit_n) } else { n };
        let activation = match gate {
            true => choices.one_of(&[Activation::SiluGate, Activation::GeluGate]),
            false => Activation::Identity,
        };
        let epilogue = Epilogue { bias: choices.coin(), activation, residual: choices.coin() };
        // All of a dimension, or a few units of it.
        let mut tile = |size: usize, unit: usize, most: usize| match choices.within(0, most) * unit {
            tile if tile > 0 && tile < size => tile,
            _ => size,
        };
        let mut tiles = plan::Tiles { m: tile(m, unit_m, 4), n: tile(n, unit_n, 3), k: tile(k, 128, 3) };
        if quantized.and_then(|quantized| quantized.group).is_some_and(|group| !plan::groups_align(k, group, tiles.k)) {
            tiles.k = 128;
        }
        if gate && (!tiles.n.is_multiple_of(unit_n) || n.is_multiple_of(unit_n) && !n.is_multiple_of(tiles.n)) {
            tiles.n = unit_n;
        }
        let layers = choices.one_of(&[1, 1, 2, 3]);
        Sample { spec: Spec { m, k, n, input, output, layout, epilogue, layers, quantized }, tiles, batch: None }
    }

    /// Of a stack, only the layer's part is drawn; the others are NaN.
    fn draw(problem: &Problem, batch: Option<&[Lengths]>, seed: u64) -> std::result::Result<Arrays, Invalid> {
        random::without_batch(Self::NAME, batch)?;
        let mut random = Random::new(seed);
        let layer = if problem.layers > 1 { random.within(0, problem.layers - 1) } else { 0 };
        let array = |Argument { name, ty, role, .. }: &Argument| match (role, *name) {
            (Role::Prefetch, _) => HostTensor::scalar(layer as i32),
            (_, "w" | "w_scale" | "bias") => {
                let (mut stack, size) = (random::poisoned(ty), ty.len() / problem.layers);
                random.fill(&mut stack, layer * size, size);
                stack
            }
            _ => random.tensor(ty),
        };
        let arguments = Self::arguments(problem);
        Ok(arguments.name(arguments.iter().map(array)))
    }

    fn check_inputs(problem: &Problem, inputs: &Arrays) -> std::result::Result<(), Invalid> {
        kernel::check_layer("matmul inputs", problem.layers, inputs)
    }

    /// Every array passes once, of a stack one layer.
    fn cost(problem: &Problem) -> Cost {
        let Spec { m, k, layers, .. } = **problem;
        let columns = problem.weight_columns();
        let others = (layers - 1) * problem.weight_bytes();
        Cost {
            flops: 2 * (m * k * columns) as u64,
            transcendentals: if problem.epilogue.activation.is_gated() { (m * problem.n) as u64 } else { 0 },
            bytes_accessed: kernel::passes_once::<Self>(problem) - others as u64,
        }
    }

    fn reference(problem: &Problem, inputs: &Arrays) -> Vec<Expected> {
        vec![reference::reference(problem, inputs)]
    }

    fn native(problem: &Problem, inputs: &Arrays, threads: &dyn Threads) -> Option<Vec<HostTensor>> {
        native::run(problem, inputs, threads)
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

    fn candidates(problem: &Problem, chip: Chip, limit: Bytes) -> Vec<plan::Tiles> {
        plan::fitting(problem, chip, limit)
    }

    fn bytes_moved(plan: &plan::Plan, _: Option<&[Lengths]>) -> f64 {
        plan.estimate().bytes_moved as f64
    }

    fn family(problem: &Problem) -> Option<&'static Family> {
        Some(estimate::family(problem))
    }

    fn stages(plan: &plan::Plan, _: Option<&[Lengths]>) -> Option<Vec<Stage>> {
        Some(estimate::stages(plan.problem(), plan.tiles(), plan.chip(), plan.order()))
    }

    fn model(plan: &plan::Plan, _: Option<&[Lengths]>) -> Option<f64> {
        Some(plan.estimate().cycles)
    }

    fn layout(problem: &Problem, chip: Chip, tiles: plan::Tiles) -> crate::plan::Layout<plan::Details> {
        plan::layout(problem, chip, tiles)
    }

    /// The products of Llama 3.1 8B, each for a decode step, a chunk and a long prompt; those of equal sizes (q and o, k and
    /// v, gate and up) are one. And those of its step program, whose layers are stacks, in bf16 and in 8 bits.
    fn common() -> Vec<Spec> {
        let sizes = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (4096, 128_256)];
        let rows = [8, 512, 4096];
        let alone = rows.iter().flat_map(|&m| sizes.map(|(k, n)| Spec::new([m, k, n], Element::Bf16)));
        let gated = Epilogue { activation: Activation::SiluGate, ..Epilogue::NONE };
        let added = Epilogue { residual: true, ..Epilogue::NONE };
        let quantized = Quantized { weight: Element::I8, group: None, activations: false };
        let of_layers = [(4096, 6144, Epilogue::NONE), (4096, 4096, added), (4096, 14336, gated), (14336, 4096, added)];
        let stacked = [None, Some(quantized)].into_iter().flat_map(|quantized| {
            of_layers.map(|(k, n, epilogue)| {
                let layout = Layout::WeightTransposed;
                Spec { layout, epilogue, layers: 32, quantized, ..Spec::new([8, k, n], Element::Bf16) }
            })
        });
        alone.chain(stacked).collect()
    }

    /// The projections of decoders, of one device or a part of one: rows of decode steps and prefill chunks, hidden sizes
    /// from 512 to 8192, some of them odd, any layout of the weight, gates, residuals, weights in 8 bits.
    fn workload(choices: &mut Choices) -> Option<Spec> {
        let m = choices.one_of(&[1, 4, 8, 16, 32, 64, 77, 128, 256, 300, 512, 867, 1024, 2048]);
        let (k, n) = match choices.one_of(&[false, false, false, true]) {
            true => (choices.within(512, 6144), choices.within(512, 8192)),
            false => (128 * choices.within(4, 64), 128 * choices.within(4, 112)),
        };
        let element = choices.one_of(&[Element::Bf16, Element::Bf16, Element::Bf16, Element::F32]);
        // Six products for one, and six times the text to compile.
        let (k, n) = if element == Element::F32 { (k / 4, n / 4) } else { (k, n) };
        let layout = choices.one_of(&[Layout::RowMajor, Layout::WeightTransposed, Layout::FeatureMajor]);
        let activation = choices.one_of(&[Activation::Identity, Activation::Identity, Activation::SiluGate]);
        let epilogue = Epilogue { bias: choices.coin(), activation, residual: choices.coin() };
        let (group, activations) = choices.one_of(&[(None, false), (Some(128), false), (None, true)]);
        let weight = choices.one_of(&[Element::I8, Element::I8, Element::F8E4M3Fn]);
        let is_narrow = choices.coin() && element == Element::Bf16;
        let quantized = is_narrow.then_some(Quantized { weight, group: group.filter(|of| k % of == 0), activations });
        Some(Spec { layout, epilogue, quantized, ..Spec::new([m, k, n], element) })
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
