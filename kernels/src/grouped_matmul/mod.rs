//! Grouped matrix multiplication: rows sorted by expert, each times the weight of its expert (Gale et al., "MegaBlocks", 2022).
//!
//! `x [m, k]` has the rows of expert 0, then those of expert 1, and so on; `group_sizes` says how many each has, any number
//! from 0 on. An expert without rows costs nothing: its weight is never looked at. Rows behind the last group are looked at by
//! nobody, and are zeros in the output.
//!
//! With [`Activation::SiluGate`] or [`Activation::ClampedSwiglu`] the weight has gates and ups, and both products are of one
//! launch. The weights of several layers can be one array, as for the dense [matmul](crate::matmul).
pub mod mosaic;
mod mutants;
pub mod native;
pub mod plan;
pub mod problem;
pub mod reference;
pub mod stablehlo;

use std::sync::LazyLock;

use pagoda_ir::{
    Context, Element, HostTensor, Result, TensorType,
    mosaic::{self as ir, Builder, Cost},
    stablehlo as hlo,
};

pub use self::problem::{Activation, Layout, Problem, Spec};
use crate::{
    check::Expected,
    chips::Chip,
    choices::Choices,
    error::{Invalid, ensure},
    evidence::Records,
    kernel::{self, Kernel, Operand, Sample, Work},
    mutants::MutantSet,
    named::{Argument, Arguments, Arrays, Named},
    plan::PlanError,
    random::{self, Lengths, Random},
    threads::Threads,
    vmem::Bytes,
};

/// The grouped matmul kernel.
#[derive(Clone, Copy, Debug)]
pub struct GroupedMatmul;

impl Kernel for GroupedMatmul {
    const NAME: &'static str = "grouped_matmul";
    const ABOUT: &'static str = "out[m,n] = x[m,k] w[expert of the row][k,n], rows sorted by expert";

    type Spec = Spec;
    type Tiles = plan::Tiles;
    type Details = plan::Details;

    fn describe(problem: &Problem) -> String {
        let Spec { m, k, n, experts, input, output, layout, activation, bias, layers } = **problem;
        let mut text = format!("{m}x{k}x{n} of {experts} experts {input} -> {output} {layout:?}");
        text += if bias { " + bias" } else { "" };
        text += match activation {
            Activation::Identity => "",
            Activation::SiluGate => " + silu-gate",
            Activation::ClampedSwiglu => " + clamped-swiglu",
        };
        text += &if layers > 1 { format!(", one of {layers} layers") } else { String::new() };
        text
    }

    fn arguments(problem: &Problem) -> Arguments {
        problem.arguments()
    }

    fn results(problem: &Problem) -> Named<TensorType> {
        problem.results()
    }

    /// One to a few groups, some of them empty, that end anywhere; whole dimensions, parts that divide and parts that do not.
    fn sample(choices: &mut Choices) -> Sample<Self> {
        let (m, experts) = (choices.within(1, 90), choices.within(1, 7));
        let layout = choices.one_of(&[Layout::RowMajor, Layout::WeightTransposed]);
        let activation = choices.one_of(&[Activation::Identity, Activation::SiluGate, Activation::ClampedSwiglu]);
        let float = [Element::F32, Element::Bf16];
        let (input, output) = (choices.one_of(&float), choices.one_of(&float));
        let (bias, layers) = (choices.coin(), choices.one_of(&[1, 1, 2, 3]));
        let n = match (layout, activation.is_gated(), choices.coin()) {
            (_, false, false) => choices.within(1, 300),
            (Layout::WeightTransposed, ..) => 16 * choices.within(1, 30),
            (Layout::RowMajor, ..) => 128 * choices.within(1, 4),
        };
        let k = if choices.coin() { 128 * choices.within(1, 4) } else { choices.within(1, 300) };
        let spec = Spec { m, k, n, experts, input, output, layout, activation, bias, layers };
        let problem = Problem::new(spec).expect("a problem of the sizes that it may have");
        let m = problem::BAND * choices.within(1, m.div_ceil(problem::BAND));
        let mut part = |size: usize| match 128 * choices.within(0, size / 128) {
            0 => size,
            part => part,
        };
        let [n, k] = [part(n), part(k)];
        // What cannot be cut in such parts is not cut.
        let whole = plan::Tiles { m, n: problem.n, k: problem.k };
        let allowed = |tiles: plan::Tiles| plan::legal(&problem, tiles).is_ok();
        let n = if allowed(plan::Tiles { n, ..whole }) { n } else { whole.n };
        let k = if allowed(plan::Tiles { k, ..whole }) { k } else { whole.k };
        Sample { spec, tiles: plan::Tiles { m, n, k }, batch: Some(drawn_sizes(&problem, choices)) }
    }

    /// Of a stack, only the layer's part is drawn, and of that only the weights of experts with rows; the others are NaN, and so
    /// are the rows behind the last group.
    fn draw(problem: &Problem, batch: Option<&[Lengths]>, seed: u64) -> std::result::Result<Arrays, Invalid> {
        Self::check_batch(problem, batch)?;
        let mut random = Random::new(seed);
        let layer = if problem.layers > 1 { random.within(0, problem.layers - 1) } else { 0 };
        let sizes = match batch {
            Some(batch) => plan::sizes(problem, batch),
            None => plan::sizes(problem, &drawn_sizes(problem, &mut Choices::of_seed(seed))),
        };
        let array = |Argument { name, ty, .. }: &Argument| match *name {
            "group_sizes" => {
                HostTensor::new(&[problem.experts], &sizes.iter().map(|&size| size as i32).collect::<Vec<_>>())
            }
            "layer" => HostTensor::scalar(layer as i32),
            "x" => {
                let mut x = random::poisoned(ty);
                random.fill(&mut x, 0, sizes.iter().sum::<usize>() * problem.k);
                x
            }
            _ => {
                let (mut stack, size) = (random::poisoned(ty), ty.len() / problem.layers / problem.experts);
                for (expert, _) in sizes.iter().enumerate().filter(|&(_, &rows)| rows > 0) {
                    random.fill(&mut stack, (layer * problem.experts + expert) * size, size);
                }
                stack
            }
        };
        let arguments = Self::arguments(problem);
        Ok(arguments.name(arguments.iter().map(array)))
    }

    fn check_inputs(problem: &Problem, inputs: &Arrays) -> std::result::Result<(), Invalid> {
        const SUBJECT: &str = "grouped_matmul inputs";
        let sizes = inputs["group_sizes"].as_slice::<i32>();
        for (expert, &size) in sizes.iter().enumerate() {
            let key = format!("group_sizes[{expert}]");
            ensure(size >= 0, SUBJECT, key, size, || "is negative".into(), "count the rows of each expert")?;
        }
        let rows: i64 = sizes.iter().map(|&size| i64::from(size)).sum();
        let limit = || format!("is more than the {} rows of x", problem.m);
        ensure(rows <= problem.m as i64, SUBJECT, "sum of group_sizes", rows, limit, "count the rows of each expert")?;
        kernel::check_layer(SUBJECT, problem.layers, inputs)
    }

    fn batch(_: &Problem, inputs: &Arrays) -> Option<Vec<Lengths>> {
        let sizes = inputs["group_sizes"].as_slice::<i32>().iter();
        Some(sizes.map(|&size| group(usize::try_from(size).unwrap_or(0))).collect())
    }

    fn lengths(problem: &Problem, inputs: &Arrays) -> Option<Vec<Lengths>> {
        Self::batch(problem, inputs)
    }

    fn live(problem: &Problem, inputs: &Arrays) -> Vec<usize> {
        let sizes = inputs["group_sizes"].as_slice::<i32>().iter();
        vec![sizes.map(|&size| usize::try_from(size).unwrap_or(0)).sum::<usize>().min(problem.m) * problem.n]
    }

    /// Groups in order, `ROWS/ROWS` each; those that are left out are empty.
    fn check_batch(problem: &Problem, batch: Option<&[Lengths]>) -> std::result::Result<(), Invalid> {
        const SUBJECT: &str = "grouped_matmul batch";
        let Some(batch) = batch else { return Ok(()) };
        let limit = || format!("are more than {} experts", problem.experts);
        ensure(batch.len() <= problem.experts, SUBJECT, "groups", batch.len(), limit, "give one size for each expert")?;
        for (index, &Lengths { q_len, kv_len }) in batch.iter().enumerate() {
            let (key, value) = (format!("lengths[{index}]"), format!("{q_len}/{kv_len}"));
            let limit = || "is not the size of a group, twice".into();
            ensure(q_len == kv_len, SUBJECT, key, value, limit, &format!("write {q_len}/{q_len}"))?;
        }
        let rows = batch.iter().fold(0_usize, |sum, group| sum.saturating_add(group.q_len));
        let limit = || format!("is more than the m = {} rows of x", problem.m);
        ensure(rows <= problem.m, SUBJECT, "sum of the groups", rows, limit, "raise m, or give smaller groups")
    }

    fn spread(problem: &Problem) -> Vec<(&'static str, Vec<Lengths>)> {
        vec![("drawn", plan::typical(problem).into_iter().map(group).collect())]
    }

    /// At most every expert's weight passes once, of a stack one layer's; no more experts than there are rows.
    fn cost(problem: &Problem) -> Cost {
        let experts = problem.experts.min(problem.m);
        let Spec { m, k, n, input, output, .. } = **problem;
        let arrays = m * k * input.bytes() + m * n * output.bytes() + experts * problem.expert_bytes();
        Cost {
            flops: 2 * (m * k * problem.weight_columns()) as u64,
            transcendentals: if problem.activation.is_gated() { (m * n) as u64 } else { 0 },
            bytes_accessed: arrays as u64,
        }
    }

    fn work(problem: &Problem, batch: Option<&[Lengths]>) -> Work {
        let Some(batch) = batch else {
            let Cost { flops, bytes_accessed, .. } = Self::cost(problem);
            return Work { flops: flops as f64, bytes: bytes_accessed as f64 };
        };
        let rows: usize = batch.iter().map(|group| group.q_len).sum();
        let experts = batch.iter().filter(|group| group.q_len > 0).count();
        let of_rows = rows * (problem.k * problem.input.bytes() + problem.n * problem.output.bytes());
        Work {
            flops: 2.0 * (rows * problem.k * problem.weight_columns()) as f64,
            bytes: (of_rows + experts * problem.expert_bytes()) as f64,
        }
    }

    fn bytes_moved(plan: &plan::Plan, batch: Option<&[Lengths]>) -> f64 {
        estimate(plan, batch).bytes_moved as f64
    }

    fn model(plan: &plan::Plan, batch: Option<&[Lengths]>) -> Option<f64> {
        Some(estimate(plan, batch).cycles)
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
        mosaic::write(k, plan, None);
    }

    fn kernel_of_batch<'c>(
        context: &'c Context,
        plan: &plan::Plan,
        batch: Option<&[Lengths]>,
    ) -> Result<ir::Kernel<'c>> {
        let sizes = batch.map(|batch| plan::sizes(plan.problem(), batch));
        let sizes: Option<Vec<i32>> = sizes.map(|sizes| sizes.into_iter().map(|size| size as i32).collect());
        plan.kernel_by(context, |k| mosaic::write(k, plan, sizes.as_deref()))
    }

    fn operands(problem: &Problem, _: Chip) -> Vec<Operand> {
        mosaic::operands(problem)
    }

    fn returned(plan: &plan::Plan) -> Vec<TensorType> {
        vec![TensorType::new(plan.problem().output, &plan.output_dims())]
    }

    fn mutants() -> Vec<MutantSet<Self>> {
        mutants::sets()
    }

    fn legal(problem: &Problem, _: Chip, tiles: plan::Tiles) -> std::result::Result<(), PlanError> {
        plan::legal(problem, tiles)
    }

    fn choose(problem: &Problem, chip: Chip, limit: Bytes, batches: &[Vec<Lengths>]) -> Option<plan::Tiles> {
        plan::choose(problem, chip, limit, batches)
    }

    fn candidates(problem: &Problem, chip: Chip, limit: Bytes) -> Vec<plan::Tiles> {
        plan::fitting(problem, chip, limit)
    }

    fn layout(problem: &Problem, chip: Chip, tiles: plan::Tiles) -> crate::plan::Layout<plan::Details> {
        plan::layout(problem, chip, tiles)
    }

    /// Both products of the experts of Mixtral 8x7B, Qwen3 30B-A3B and gpt-oss 20B, for decode steps and chunks of prompts, as
    /// step programs have them: stacks of layers (of four, which every chip's memory holds), in Hugging Face's layout. And
    /// row-major ones of one layer.
    fn common() -> Vec<Spec> {
        let silu = Activation::SiluGate;
        let models = [(8, 2, 4096, 14336, silu), (128, 8, 2048, 768, silu)];
        let models = [&models[..], &[(32, 4, 2880, 2880, Activation::ClampedSwiglu)]].concat();
        let of_model = |(experts, chosen, hidden, inner, activation): (usize, usize, usize, usize, Activation)| {
            [8, 512].into_iter().flat_map(move |tokens| {
                let bias = activation == Activation::ClampedSwiglu;
                let of = |k, n| Spec { bias, ..Spec::new([tokens * chosen, k, n], experts, Element::Bf16) };
                let [up, down] = [of(hidden, inner), of(inner, hidden)];
                let stacked = |spec| Spec { layout: Layout::WeightTransposed, layers: 4, ..spec };
                [stacked(Spec { activation, ..up }), stacked(down)]
            })
        };
        let alone = [[64, 2048, 768], [1024, 4096, 1024]].map(|sizes| Spec::new(sizes, 16, Element::Bf16));
        models.into_iter().flat_map(of_model).chain(alone).collect()
    }

    /// Experts of serving: rows of decode steps and prefill chunks, few large experts or many small ones.
    fn workload(choices: &mut Choices) -> Option<Spec> {
        let experts = choices.one_of(&[8, 16, 32, 60, 64, 128, 256]);
        let m = choices.one_of(&[1, 2, 4, 8]) * choices.one_of(&[1, 4, 8, 16, 32, 64, 128, 256, 512, 1024]);
        let (k, n) = (64 * choices.within(8, 64), 64 * choices.within(8, 96));
        let element = choices.one_of(&[Element::Bf16, Element::Bf16, Element::Bf16, Element::F32]);
        let activation = choices.one_of(&[Activation::Identity, Activation::SiluGate, Activation::ClampedSwiglu]);
        let layout = if n % 128 == 0 && choices.coin() { Layout::RowMajor } else { Layout::WeightTransposed };
        let bias = choices.coin();
        Some(Spec { layout, activation, bias, ..Spec::new([m, k, n], experts, element) })
    }

    fn records() -> Option<&'static Records<Self>> {
        static RECORDS: LazyLock<Records<GroupedMatmul>> =
            LazyLock::new(|| Records::parse(include_str!("../../tuned/grouped_matmul.json")));
        Some(&RECORDS)
    }
}

/// What a launch of `plan` costs over a batch, or over rows dealt out at random.
fn estimate(plan: &plan::Plan, batch: Option<&[Lengths]>) -> plan::Estimate {
    let sizes = batch.map_or_else(|| plan::typical(plan.problem()), |batch| plan::sizes(plan.problem(), batch));
    plan::estimate(plan.problem(), plan.chip(), plan.tiles(), &sizes)
}

/// A group as an entry of a batch.
fn group(rows: usize) -> Lengths {
    Lengths { q_len: rows, kv_len: rows }
}

/// Sizes of groups: empty ones, small ones, and some that take most of what is left; as often as not all rows are taken.
fn drawn_sizes(problem: &Problem, choices: &mut Choices) -> Vec<Lengths> {
    let mut left = problem.m;
    let mut sizes: Vec<usize> = (0..problem.experts)
        .map(|_| {
            let size = match choices.within(0, 3) {
                0 => choices.within(0, left.min(4)),
                1 => 0,
                2 => choices.within(0, left.min(40)),
                _ => choices.within(0, left),
            };
            left -= size;
            size
        })
        .collect();
    if choices.coin() {
        sizes[problem.experts / 2] += left;
    }
    sizes.into_iter().map(group).collect()
}

#[cfg(feature = "cli")]
impl crate::cli::KernelArgs for GroupedMatmul {
    type Args = Spec;

    fn spec(args: Spec) -> std::result::Result<Spec, crate::Invalid> {
        Ok(args)
    }
}
