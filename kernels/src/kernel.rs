//! A kernel: one trait from the problem to the check, and everything else generic over it.
//!
//! Planning, certification, checks, property tests, mutants, records and the command line ask nothing of a kernel but this
//! trait, so a kernel is a folder that implements it and a line in the [registry](crate::registry); outside this crate it
//! is the same trait without the line. `GUIDE.md` beside this crate's manifest goes from a formula to a certified kernel.
//!
//! Invariants that an implementation keeps:
//! - A valid problem has a StableHLO form, and legal tiles have a Mosaic form: emission does not fail for reasons of shape.
//! - [`Kernel::reference`] is plain f64 from the definition and shares no code with a form.
//! - [`Kernel::layout`] counts every VMEM buffer that [`Kernel::mosaic`] declares, by name and to the byte.
//! - Everything is pure: no device, no file, no clock.

use std::fmt;

use pagoda_ir::mosaic::{self, Cost};
use pagoda_ir::stablehlo::{self, Module, Tensor};
use pagoda_ir::{Context, Element, HostTensor, Result, TensorType};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    check::Expected,
    chips::Chip,
    choices::Choices,
    cost::{self, Family, Stage},
    error::{Invalid, ensure},
    evidence::Records,
    mutants::MutantSet,
    named::{Argument, Arguments, Arrays, Named, Role},
    plan::{Layout, Plan, PlanError},
    problem::{Problem, Specification},
    random::{self, Lengths},
    threads::Threads,
    vmem::Bytes,
};

/// The layer that a launch with these inputs is of, where a stack of layers' weights is one array: its argument `layer`.
pub(crate) fn layer_of(inputs: &Arrays) -> i32 {
    inputs.get("layer").map_or(0, |layer| layer.as_slice::<i32>()[0])
}

/// Refuses inputs of a layer that there is none of.
pub(crate) fn check_layer(subject: &'static str, layers: usize, inputs: &Arrays) -> std::result::Result<(), Invalid> {
    let layer = layer_of(inputs);
    let is_one = usize::try_from(layer).is_ok_and(|layer| layer < layers);
    let limit = || format!("is none of {layers} layers");
    ensure(is_one, subject, "layer", layer, limit, "give an index from 0 on, below layers")
}

/// A kernel's valid problem.
pub type ProblemOf<K> = Problem<<K as Kernel>::Spec>;

/// Tile sizes that a user may fix. Written as numbers with commas between them: `512,512,1024`.
pub trait TileSizes:
    Copy + fmt::Debug + fmt::Display + Ord + Send + Serialize + DeserializeOwned + Sync + 'static
{
    /// How they are written, in help: `M,N,K`.
    const FORM: &'static str;

    /// Reads what [`Display`](fmt::Display) writes.
    ///
    /// # Errors
    /// When the text is not that, with an example.
    fn parse(text: &str) -> std::result::Result<Self, PlanError>;
}

/// A kernel; see the [module docs](self).
pub trait Kernel: Sized + Send + Sync + 'static {
    /// Its name on the command line and in records.
    const NAME: &'static str;
    /// What it computes, in a line of help.
    const ABOUT: &'static str;

    /// The description of a problem.
    type Spec: Specification;
    /// The tile sizes.
    type Tiles: TileSizes;
    /// What else a plan holds: printed as a line of its table, and part of its JSON.
    type Details: Clone + fmt::Debug + fmt::Display + PartialEq + Send + Serialize + Sync;

    // The problem.

    /// The problem in words: equal for equal problems, different for different ones.
    fn describe(problem: &ProblemOf<Self>) -> String;
    /// The table of arguments, those that are prefetched first or last as the kernel likes.
    fn arguments(problem: &ProblemOf<Self>) -> Arguments;
    /// Names and types of the results.
    fn results(problem: &ProblemOf<Self>) -> Named<TensorType>;

    // Inputs.

    /// A problem, legal tiles and what else makes a case, for property tests and samples. The simplest comes first.
    fn sample(choices: &mut Choices) -> Sample<Self>;

    /// Arguments drawn from `seed`, over sequences of the lengths in `batch` where the kernel works on a ragged batch.
    /// What a kernel must not look at is NaN. The default is uniform in (-2, 2): a kernel draws its own where a step of it
    /// would not show on that.
    ///
    /// # Errors
    /// When `batch` is not a batch of the problem, or given to a kernel that has none.
    fn draw(problem: &ProblemOf<Self>, batch: Option<&[Lengths]>, seed: u64) -> std::result::Result<Arrays, Invalid> {
        random::without_batch(Self::NAME, batch)?;
        Ok(random::arrays(&Self::arguments(problem), seed))
    }

    /// Checks what types do not say of `inputs`, such as ragged metadata.
    ///
    /// # Errors
    /// The first entry that breaks a limit.
    fn check_inputs(problem: &ProblemOf<Self>, inputs: &Arrays) -> std::result::Result<(), Invalid> {
        let _ = (problem, inputs);
        Ok(())
    }

    /// The ragged batch of `inputs` as the command line takes it, `9/48,1/55`; `None` for a kernel without one.
    fn batch(problem: &ProblemOf<Self>, inputs: &Arrays) -> Option<Vec<Lengths>> {
        let _ = (problem, inputs);
        None
    }

    /// A problem whose arguments are named and shaped like `operands`, those of a kernel of unknown origin: its inputs can
    /// then be drawn. The names that it knows are those of its own table; what is not given away by shapes is as usual.
    fn recognise(operands: &[(String, TensorType)]) -> Option<ProblemOf<Self>> {
        let _ = operands;
        None
    }

    /// What a launch costs at most, for the compiler of the program around it. By default nothing is computed, and every
    /// argument and result passes once.
    fn cost(problem: &ProblemOf<Self>) -> Cost {
        Cost { flops: 0, transcendentals: 0, bytes_accessed: passes_once::<Self>(problem) }
    }

    /// The lengths of the sequences in `inputs`, where what a launch does depends on them.
    fn lengths(problem: &ProblemOf<Self>, inputs: &Arrays) -> Option<Vec<Lengths>> {
        let _ = (problem, inputs);
        None
    }

    /// Leading elements of each result that are results; those behind them are padding. Cheap: no result is computed.
    fn live(problem: &ProblemOf<Self>, inputs: &Arrays) -> Vec<usize> {
        let _ = inputs;
        Self::results(problem).values().map(TensorType::len).collect()
    }

    // Forms, and what they are compared with.

    /// The results in f64, from the definition, and how far a form may be from them.
    fn reference(problem: &ProblemOf<Self>, inputs: &Arrays) -> Vec<Expected>;

    /// The results as StableHLO, for any plugin. `args` are the problem's arguments.
    ///
    /// # Errors
    /// None for operands of the problem's types, unless MLIR fails.
    fn stablehlo<'c, 'a>(
        b: &stablehlo::Builder<'c, 'a>,
        problem: &ProblemOf<Self>,
        args: &Named<Tensor<'c, 'a>>,
    ) -> Result<Vec<Tensor<'c, 'a>>>;

    /// The results by the kernel in Rust, on the host's own processor; `None` where there is none for the problem.
    fn native(problem: &ProblemOf<Self>, inputs: &Arrays, threads: &dyn Threads) -> Option<Vec<HostTensor>> {
        let _ = (problem, inputs, threads);
        None
    }

    /// Declares and writes the Mosaic kernel of `plan`. Its operands are those of [`Kernel::operands`], in that order.
    fn mosaic<'a>(k: &'a mosaic::Builder<'a>, plan: &Plan<Self>);

    /// What the Mosaic kernel takes on a chip, in order: the prefetched arguments, then the others, scalars as arrays of one.
    fn operands(problem: &ProblemOf<Self>, chip: Chip) -> Vec<Operand> {
        let _ = chip;
        let arguments = Self::arguments(problem);
        let of = |prefetched: bool| {
            let wanted = move |argument: &&Argument| (argument.role == Role::Prefetch) == prefetched;
            arguments.iter().filter(wanted).map(|argument| {
                let operand = Operand::of(argument.name);
                if argument.ty.dims.is_empty() { operand.reshape(&[1]) } else { operand }
            })
        };
        of(true).chain(of(false)).collect()
    }

    /// What the Mosaic kernel of `plan` returns, in order: the results, perhaps as `[rows, columns]` with padding behind
    /// either, or in other sizes; behind them, what is of no use to anybody else.
    fn returned(plan: &Plan<Self>) -> Vec<TensorType> {
        Self::results(plan.problem()).values().cloned().collect()
    }

    /// Kernels with one thing wrong, each with what catches it.
    fn mutants() -> Vec<MutantSet<Self>> {
        vec![]
    }

    // A ragged batch that is known beforehand.

    /// Refuses a batch that is not one of the problem.
    ///
    /// # Errors
    /// The first length that breaks a limit; any batch, where the kernel works on none.
    fn check_batch(problem: &ProblemOf<Self>, batch: Option<&[Lengths]>) -> std::result::Result<(), Invalid> {
        let _ = problem;
        random::without_batch(Self::NAME, batch)
    }

    /// Batches of the problem that serving meets, by name: what a plan is for where nobody says more. None for a kernel that
    /// works on no batch.
    fn spread(problem: &ProblemOf<Self>) -> Vec<(&'static str, Vec<Lengths>)> {
        let _ = problem;
        vec![]
    }

    /// What a launch computes and moves at least; over sequences of the lengths in `batch`, where there is one. By default
    /// what it costs at most.
    fn work(problem: &ProblemOf<Self>, batch: Option<&[Lengths]>) -> Work {
        let _ = batch;
        let Cost { flops, bytes_accessed, .. } = Self::cost(problem);
        Work { flops: flops as f64, bytes: bytes_accessed as f64 }
    }

    /// Bytes that a launch of `plan` moves between HBM and VMEM, all cores together: no fewer than those of [`Kernel::work`], and
    /// more where tiles have blocks fetched again. By default what that says.
    fn bytes_moved(plan: &Plan<Self>, batch: Option<&[Lengths]>) -> f64 {
        Self::work(plan.problem(), batch).bytes
    }

    /// The Mosaic kernel of `plan` for sequences of the lengths in `batch` alone: they are constants of it, so that the
    /// compiler knows how often each loop turns, and its static estimate is of this batch. Operands are the same. By default
    /// the kernel as it is.
    ///
    /// # Errors
    /// When `batch` is not a batch of the problem.
    fn kernel_of_batch<'c>(
        context: &'c Context,
        plan: &Plan<Self>,
        batch: Option<&[Lengths]>,
    ) -> Result<mosaic::Kernel<'c>> {
        let _ = batch;
        plan.kernel(context)
    }

    /// A smaller launch, and how many of it do what each core does in a launch of `plan`: the compiler cannot estimate
    /// kernels whose cores take strided parts of one array (`dma-general`). `None` where a launch is what a core does.
    fn core_share(plan: &Plan<Self>) -> Option<(Plan<Self>, usize)> {
        let _ = plan;
        None
    }

    /// Programs that a step runs beside the kernel of `plan`, from the projections' outputs to the next projection's input:
    /// rotary embedding, writes of K and V, changes of layout. By default none.
    ///
    /// # Errors
    /// None for a valid problem, unless MLIR fails.
    fn around<'c>(context: &'c Context, plan: &Plan<Self>) -> Result<Vec<Module<'c>>> {
        let _ = (context, plan);
        Ok(vec![])
    }

    // Planning.

    /// Refuses a problem that no tiles can be planned for.
    ///
    /// # Errors
    /// What stands in the way, and what to do.
    fn plannable(problem: &ProblemOf<Self>, chip: Chip) -> std::result::Result<(), PlanError> {
        let _ = (problem, chip);
        Ok(())
    }

    /// Refuses tiles that the kernel cannot be written with.
    ///
    /// # Errors
    /// The rule that they break.
    fn legal(problem: &ProblemOf<Self>, chip: Chip, tiles: Self::Tiles) -> std::result::Result<(), PlanError>;

    /// The best legal tiles whose buffers fit `limit`, with room for spills where there are some; `None` if none fit. They are
    /// for launches over `batches`; where none are given, over those of [`Kernel::spread`].
    fn choose(problem: &ProblemOf<Self>, chip: Chip, limit: Bytes, batches: &[Vec<Lengths>]) -> Option<Self::Tiles>;

    /// Legal tiles whose buffers fit `limit`: what is worth a compilation. By default the planner's choice alone.
    fn candidates(problem: &ProblemOf<Self>, chip: Chip, limit: Bytes) -> Vec<Self::Tiles> {
        Self::choose(problem, chip, limit, &[]).into_iter().collect()
    }

    /// Whose weights a model of the problem's launches takes ([`crate::cost`]). `None` for a kernel without stages.
    fn family(problem: &ProblemOf<Self>) -> Option<&'static Family> {
        let _ = problem;
        None
    }

    /// The steps of the busiest core in a launch of `plan` over `batch`: what a model of its cycles is fitted to. `None` for
    /// a kernel that does not say.
    fn stages(plan: &Plan<Self>, batch: Option<&[Lengths]>) -> Option<Vec<Stage>> {
        let _ = (plan, batch);
        None
    }

    /// Cycles of a launch of `plan` over `batch` by the kernel's model. `None` for a kernel, or a chip, without one.
    fn model(plan: &Plan<Self>, batch: Option<&[Lengths]>) -> Option<f64> {
        cost::cycles(plan, batch)
    }

    /// What follows from legal tiles: name, grid, every VMEM buffer.
    fn layout(problem: &ProblemOf<Self>, chip: Chip, tiles: Self::Tiles) -> Layout<Self::Details>;

    /// Problems that serving meets: `make certify-all` has them compiled for every chip, at the planner's tiles, so that
    /// their plans need no estimate.
    fn common() -> Vec<Self::Spec> {
        vec![]
    }

    /// A problem of the sizes that serving meets, drawn: what estimates are tried on (`make certify-sample`). `None` where
    /// the kernel does not say.
    fn workload(choices: &mut Choices) -> Option<Self::Spec> {
        let _ = choices;
        None
    }

    /// What the compiler is on record to have said about kernels of this sort.
    fn records() -> Option<&'static Records<Self>> {
        None
    }
}

/// What a launch computes and moves at least, whatever its tiles are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Work {
    /// Floating-point operations of the matrix unit.
    pub flops: f64,
    /// Bytes between HBM and VMEM.
    pub bytes: f64,
}

impl Work {
    /// Cycles that a device's memory takes at least.
    pub fn hbm_cycles(&self, chip: Chip) -> f64 {
        self.bytes / chip.info().hbm_bytes_per_cycle()
    }

    /// Cycles that the matrix units of all cores of a device take at least.
    pub fn mxu_cycles(&self, chip: Chip) -> f64 {
        self.flops / chip.info().peak_flop_per_cycle()
    }
}

/// Bytes of all arguments and results.
pub fn passes_once<K: Kernel>(problem: &ProblemOf<K>) -> u64 {
    let arguments = K::arguments(problem);
    let types = arguments.iter().map(|argument| argument.ty.bytes());
    types.chain(K::results(problem).values().map(TensorType::bytes)).sum::<usize>() as u64
}

/// A drawn case.
pub struct Sample<K: Kernel> {
    /// The problem; valid.
    pub spec: K::Spec,
    /// Legal tiles.
    pub tiles: K::Tiles,
    /// Lengths of a ragged batch, where the kernel works on one.
    pub batch: Option<Vec<Lengths>>,
}

/// An operand of a Mosaic kernel: an argument of the problem, perhaps in another shape or type.
///
/// The same description serves a StableHLO program around the kernel, and arrays on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operand {
    argument: &'static str,
    /// Dimension, start and size.
    part: Option<[usize; 3]>,
    element: Option<Element>,
    dims: Option<Vec<usize>>,
    padded: Option<Vec<usize>>,
    /// Sizes behind the padding.
    last: Option<Vec<usize>>,
}

impl Operand {
    /// The argument as it is.
    pub const fn of(argument: &'static str) -> Self {
        Self { argument, part: None, element: None, dims: None, padded: None, last: None }
    }

    /// `size` elements from `start` on along dimension `dim`; what else is asked for comes behind it.
    #[must_use]
    pub fn slice(self, dim: usize, start: usize, size: usize) -> Self {
        Self { part: Some([dim, start, size]), ..self }
    }

    /// Converted to `element`.
    #[must_use]
    pub fn cast(self, element: Element) -> Self {
        Self { element: Some(element), ..self }
    }

    /// Of sizes `dims`, elements in the same order; what was padded, with its padding.
    #[must_use]
    pub fn reshape(self, dims: &[usize]) -> Self {
        match self.padded {
            None => Self { dims: Some(dims.to_vec()), ..self },
            Some(_) => Self { last: Some(dims.to_vec()), ..self },
        }
    }

    /// Padded to sizes `dims` at the end of each dimension (of more than two, of the last one), with what no kernel may look
    /// at. Costs nothing where the sizes are these.
    #[must_use]
    pub fn padded(self, dims: &[usize]) -> Self {
        Self { padded: Some(dims.to_vec()), ..self }
    }

    fn in_program<'c, 'a>(
        &self,
        b: &stablehlo::Builder<'c, 'a>,
        args: &Named<Tensor<'c, 'a>>,
    ) -> Result<Tensor<'c, 'a>> {
        let mut tensor = args[self.argument];
        if let Some([dim, start, size]) = self.part {
            tensor = b.slice_in_dim(tensor, start, start + size, dim)?;
        }
        if let Some(element) = self.element {
            tensor = b.convert(tensor, element)?;
        }
        if let Some(dims) = &self.dims {
            tensor = b.reshape(tensor, dims)?;
        }
        if let Some(padded) = self.padded.as_ref().filter(|padded| **padded != tensor.dims()) {
            let high: Vec<_> = padded.iter().zip(tensor.dims()).map(|(to, from)| (to - from) as i64).collect();
            let zero = b.splat(tensor.element(), &[], 0.0)?;
            tensor = b.pad(tensor, zero, &vec![0; high.len()], &high, &vec![0; high.len()])?;
        }
        self.last.as_ref().map_or(Ok(tensor), |dims| b.reshape(tensor, dims))
    }

    fn on_host(&self, inputs: &Arrays) -> HostTensor {
        let part = self.part.map(|part| sliced(&inputs[self.argument], part));
        let array = part.as_ref().unwrap_or(&inputs[self.argument]);
        let (element, dims) = (self.element.unwrap_or(array.element()), self.dims.as_deref().unwrap_or(array.dims()));
        let tensor = match element == array.element() {
            true => HostTensor::from_bytes(element, dims, array.bytes()),
            false => HostTensor::from_f64(element, dims, &array.to_f64()),
        };
        let tensor = match self.padded.as_ref().filter(|padded| padded[..] != *dims) {
            None => tensor,
            // Poison: a kernel that looks at it is found out. Of more than two dimensions, the last one is padded.
            Some(padded) => {
                let flat = HostTensor::from_bytes(tensor.element(), &by_last(tensor.dims()), tensor.bytes());
                let wide = resized(&flat, &by_last(padded), if element.is_float() { 0xff } else { 0 });
                HostTensor::from_bytes(wide.element(), padded, wide.bytes())
            }
        };
        match &self.last {
            None => tensor,
            Some(dims) => HostTensor::from_bytes(tensor.element(), dims, tensor.bytes()),
        }
    }
}

/// `size` elements from `start` on along dimension `dim`.
fn sliced(array: &HostTensor, [dim, start, size]: [usize; 3]) -> HostTensor {
    let mut dims = array.dims().to_vec();
    let inner = dims[dim + 1..].iter().product::<usize>() * array.element().bytes();
    let rows = array.bytes().chunks_exact((dims[dim] * inner).max(1));
    let bytes: Vec<u8> = rows.flat_map(|row| &row[start * inner..][..size * inner]).copied().collect();
    dims[dim] = size;
    HostTensor::from_bytes(array.element(), &dims, &bytes)
}

/// Rows and columns in other numbers: what both have in common, and `fill` in each byte of the rest.
fn resized(tensor: &HostTensor, dims: &[usize], fill: u8) -> HostTensor {
    let ([rows, columns], &[new_rows, new_columns]) = (rows_and_columns(tensor.dims()), dims) else {
        unreachable!("two dimensions")
    };
    let size = tensor.element().bytes();
    let mut bytes = vec![fill; new_rows * new_columns * size];
    let width = columns.min(new_columns) * size;
    let from = tensor.bytes().chunks_exact((columns * size).max(1)).take(rows);
    for (to, from) in bytes.chunks_exact_mut((new_columns * size).max(1)).zip(from) {
        to[..width].copy_from_slice(&from[..width]);
    }
    HostTensor::from_bytes(tensor.element(), dims, &bytes)
}

/// What a kernel returned ([`Kernel::returned`]), or a program around it, as the results that the problem has: rows and columns
/// of padding cut off.
pub fn host_results<K: Kernel>(problem: &ProblemOf<K>, returned: &[HostTensor]) -> Vec<HostTensor> {
    let types = K::results(problem);
    let result = |(tensor, ty): (&HostTensor, &TensorType)| match tensor.len() == ty.len() {
        true => HostTensor::from_bytes(tensor.element(), &ty.dims, tensor.bytes()),
        false => {
            let cut = resized(tensor, &rows_and_columns(&ty.dims), 0);
            HostTensor::from_bytes(cut.element(), &ty.dims, cut.bytes())
        }
    };
    returned.iter().zip(types.values()).map(result).collect()
}

/// Rows of an array's last dimension.
fn by_last(dims: &[usize]) -> [usize; 2] {
    let (&last, others) = dims.split_last().expect("an array that is padded has dimensions");
    [others.iter().product(), last]
}

/// An array as a kernel that works on rows has it.
fn rows_and_columns(dims: &[usize]) -> [usize; 2] {
    [dims[0], dims[1..].iter().product()]
}

/// Pairs (operand, result) of the problem's Mosaic kernel that share memory: what is donated.
pub fn aliases<K: Kernel>(problem: &ProblemOf<K>, chip: Chip) -> Vec<(usize, usize)> {
    let operands = K::operands(problem, chip);
    let of = |argument: &Argument| match argument.role {
        Role::Donated { result } => {
            let operand = operands.iter().position(|operand| operand.argument == argument.name);
            Some((operand.expect("what is donated is an operand"), result))
        }
        Role::Prefetch | Role::Input => None,
    };
    K::arguments(problem).iter().filter_map(of).collect()
}

/// The arrays that a Mosaic kernel takes, made on the host.
pub fn host_operands<K: Kernel>(problem: &ProblemOf<K>, chip: Chip, inputs: &Arrays) -> Vec<HostTensor> {
    K::operands(problem, chip).iter().map(|operand| operand.on_host(inputs)).collect()
}

/// Calls a Mosaic kernel of the problem on a chip from a StableHLO program, on the problem's arguments.
///
/// # Errors
/// When the arguments are not those of the problem.
pub fn call<'c, 'a, K: Kernel>(
    b: &stablehlo::Builder<'c, 'a>,
    kernel: &mosaic::Kernel,
    (problem, chip): (&ProblemOf<K>, Chip),
    args: &Named<Tensor<'c, 'a>>,
) -> Result<Vec<Tensor<'c, 'a>>> {
    check_types::<K>(problem, args)?;
    let operands: Vec<_> =
        K::operands(problem, chip).iter().map(|operand| operand.in_program(b, args)).collect::<Result<_>>()?;
    let results = K::results(problem);
    let result = |(tensor, ty): (Tensor<'c, 'a>, &TensorType)| {
        if tensor.dims() == ty.dims {
            return Ok(tensor);
        }
        let [rows, columns] = rows_and_columns(&ty.dims);
        let tensor = match tensor.dims().len() {
            2 => tensor,
            _ => b.reshape(tensor, &rows_and_columns(&tensor.dims()))?,
        };
        let cut = match tensor.ty().len() == ty.len() {
            true => tensor,
            false => b.slice(tensor, &[0, 0], &[rows, columns], &[1, 1])?,
        };
        b.reshape(cut, &ty.dims)
    };
    kernel.call(b, &operands)?.into_iter().zip(results.values()).map(result).collect()
}

/// Emits the StableHLO form into a program.
///
/// # Errors
/// When the arguments are not those of the problem.
pub fn stablehlo<'c, 'a, K: Kernel>(
    b: &stablehlo::Builder<'c, 'a>,
    problem: &ProblemOf<K>,
    args: &Named<Tensor<'c, 'a>>,
) -> Result<Vec<Tensor<'c, 'a>>> {
    check_types::<K>(problem, args)?;
    K::stablehlo(b, problem, args)
}

/// A StableHLO module whose `main` takes the problem's arguments and returns its results.
///
/// # Errors
/// None for a valid problem, unless MLIR fails.
pub fn stablehlo_module<'c, K: Kernel>(context: &'c Context, problem: &ProblemOf<K>) -> Result<Module<'c>> {
    module::<K>(context, problem, |b, args| K::stablehlo(b, problem, args))
}

/// A StableHLO module whose `main` runs `kernel`, the Mosaic kernel of a plan, on the problem's arguments,
/// whose arrays are [`row_major`].
///
/// # Errors
/// When the kernel is not the plan's.
pub fn mosaic_module<'c, K: Kernel>(
    context: &'c Context,
    plan: &Plan<K>,
    kernel: &mosaic::Kernel,
) -> Result<Module<'c>> {
    let problem = plan.problem();
    let module = module::<K>(context, problem, |b, args| call::<K>(b, kernel, (problem, plan.chip()), args))?;
    row_major(&module)?;
    Ok(module)
}

/// Has the arrays of `main` lie row-major in the device's memory, as kernels take them: of a size that is no multiple of 128
/// lanes, a TPU's compiler would choose the order that pads less, and copy the whole array on every launch.
///
/// # Errors
/// When the module has no `main`.
pub fn row_major(module: &Module) -> Result<()> {
    let (arguments, results) = module.function_types("main")?;
    let matrices = |types: Vec<TensorType>| (0..types.len()).filter(move |&index| types[index].rank() > 1);
    matrices(arguments).try_for_each(|index| module.row_major_argument("main", index))?;
    matrices(results).try_for_each(|index| module.row_major_result("main", index))
}

/// A StableHLO module whose `main` is `kernel` alone: it takes the operands as the kernel does, and no op around it makes them.
/// The compiler's report of it is of the kernel.
///
/// # Errors
/// None, unless MLIR fails.
pub fn bare_module<'c>(context: &'c Context, kernel: &mosaic::Kernel) -> Result<Module<'c>> {
    let module = Module::new(context, kernel.name());
    module.function("main", &kernel.inputs(), |b, args| kernel.call(b, args))?;
    kernel.aliases().iter().try_for_each(|&(operand, result)| module.donate("main", operand, result))?;
    row_major(&module)?;
    Ok(module)
}

/// What a certification compiles: [`mosaic_module`], or [`bare_module`] where the program around the kernel has ops that
/// [`Kernel::around`] counts.
///
/// # Errors
/// As those.
pub fn certified_module<'c, K: Kernel>(
    context: &'c Context,
    plan: &Plan<K>,
    kernel: &mosaic::Kernel,
) -> Result<Module<'c>> {
    let has_own_shapes = kernel.outputs() != K::results(plan.problem()).values().cloned().collect::<Vec<_>>();
    match has_own_shapes && !K::around(context, plan)?.is_empty() {
        true => bare_module(context, kernel),
        false => mosaic_module(context, plan, kernel),
    }
}

fn module<'c, K: Kernel>(
    context: &'c Context,
    problem: &ProblemOf<K>,
    body: impl for<'a> FnOnce(&stablehlo::Builder<'c, 'a>, &Named<Tensor<'c, 'a>>) -> Result<Vec<Tensor<'c, 'a>>>,
) -> Result<Module<'c>> {
    let arguments = K::arguments(problem);
    let module = Module::new(context, K::NAME);
    module.function("main", &arguments.types(), |b, args| body(b, &arguments.name(args.iter().copied())))?;
    for (index, argument) in arguments.iter().enumerate() {
        module.name_argument("main", index, argument.name)?;
        if let Role::Donated { result } = argument.role {
            module.donate("main", index, result)?;
        }
    }
    Ok(module)
}

fn check_types<K: Kernel>(problem: &ProblemOf<K>, args: &Named<Tensor>) -> Result<()> {
    let arguments = K::arguments(problem);
    let given: Vec<_> = args.iter().map(|(name, tensor)| (name, tensor.ty())).collect();
    if given.iter().map(|(name, ty)| (*name, ty)).eq(arguments.iter().map(|argument| (argument.name, &argument.ty))) {
        return Ok(());
    }
    let given: Vec<_> = given.iter().map(|(name, ty)| format!("{name} {ty}")).collect();
    Err(pagoda_ir::Error::op(K::NAME, format!("arguments are ({}) and must be ({arguments})", given.join(", "))))
}
