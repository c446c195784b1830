//! Checks an emission against the reference: shared by unit tests, property tests, mutants and `pagoda run`.
//!
//! [`check`] runs the StableHLO form on whatever a [`Runner`] knows; [`check_mosaic`] runs the planned Mosaic form on the
//! tile machine, where besides a wrong value every fault counts, and every result that depends on when DMAs land.
//!
//! How far a result may be off is each problem's own matter ([`Tolerance`], part of [`Expected`]): one rounding to the
//! result's type, relative to the value, and the errors of the f32 arithmetic before it, relative to the *magnitude*: the
//! sum of the absolute values of the terms (a result that cancels to 0 still carries the rounding of its terms).

use std::error::Error;
use std::fmt;

use pagoda_ir::{
    Context, Element, HostTensor, TensorType,
    mosaic::{self, MemorySpace},
    stablehlo::Module,
    tile_machine::{DmaOrder, Fault, Machine, Program, Run},
};

use crate::{
    kernel::{self, Kernel, ProblemOf},
    named::{Arrays, Named},
    plan::Plan,
    vmem::{BufferKind, Bytes, WINDOW_UNIT},
};

/// Runs a module's `main`. Kernels know no device; whoever knows one implements this.
pub trait Runner {
    /// Compiles `module` (or finds it compiled) and runs it.
    ///
    /// # Errors
    /// What the device's compiler or the device said.
    fn run(&self, module: &Module, inputs: &[HostTensor]) -> Result<Vec<HostTensor>, Box<dyn Error + Send + Sync>>;
}

/// What a result must be.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    /// The values in f64, row-major.
    pub values: Vec<f64>,
    /// The sum of the absolute values of each value's terms.
    pub magnitude: Vec<f64>,
    /// How far a form may be off.
    pub tolerance: Tolerance,
    /// Leading elements that are results. Those behind them are padding: 0 here, and unspecified in a StableHLO form.
    pub live: usize,
}

impl Expected {
    /// A result all of whose elements count.
    pub fn new(values: Vec<f64>, magnitude: Vec<f64>, tolerance: Tolerance) -> Self {
        let live = values.len();
        Self { values, magnitude, tolerance, live }
    }
}

/// How far a result may be from its exact value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Relative to the value: the unit roundoff of the result's type, if it is rounded once.
    pub rounding: f64,
    /// Relative to the magnitude: what the arithmetic before that loses.
    pub terms: f64,
}

impl Tolerance {
    /// Values that are moved, not computed.
    pub const EXACT: Self = Self { rounding: 0.0, terms: 0.0 };

    /// One rounding to `element` of what f32 arithmetic over sums of `terms` terms yields.
    ///
    /// Roundoffs of a sum partly cancel: they grow with the root of the number of terms (Higham and Mary, 2019), here
    /// with a factor of 4. The constant part, 32 roundoffs, is for an exponential, a root or a division behind the sum.
    pub fn of_sum(element: Element, terms: usize) -> Self {
        let f32_roundoff = unit_roundoff(Element::F32);
        Self { rounding: unit_roundoff(element), terms: (32.0 + 4.0 * (terms as f64).sqrt()) * f32_roundoff }
    }

    /// Twice as far: for two forms that are compared with each other.
    #[must_use]
    pub fn doubled(self) -> Self {
        Self { rounding: 2.0 * self.rounding, terms: 2.0 * self.terms }
    }

    fn allowed(self, value: f64, magnitude: f64) -> f64 {
        let before = self.terms * magnitude;
        before + self.rounding * (value.abs() + before)
    }
}

impl fmt::Display for Tolerance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0e} of their value + {:.0e} of their magnitude", self.rounding, self.terms)
    }
}

/// Half the distance from 1 to the next number of the type: the relative error of one rounding; 0 for exact types.
pub fn unit_roundoff(element: Element) -> f64 {
    let bits = match element {
        Element::F64 => 53,
        Element::F32 => 24,
        Element::F16 => 11,
        Element::Bf16 => 8,
        Element::F8E4M3Fn | Element::F8E4M3B11Fnuz => 4,
        Element::F8E5M2 => 3,
        _ => return 0.0,
    };
    (-f64::from(bits)).exp2()
}

/// Why a check failed.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The module could not be built.
    #[error(transparent)]
    Emit(#[from] pagoda_ir::Error),
    /// The runner failed.
    #[error("{module} does not run: {source}")]
    Run {
        /// The module's name.
        module: String,
        /// What the runner said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The module declares other VMEM buffers than the plan counted.
    #[error("{kernel} declares in VMEM {declared}; its plan has {planned}")]
    Vmem {
        /// The kernel's name.
        kernel: String,
        /// Name and bytes of the module's buffers.
        declared: String,
        /// Name and bytes of the plan's.
        planned: String,
    },
    /// The tile machine reports what would be undefined on hardware.
    #[error("with {dma:?} DMAs: {fault}")]
    Fault {
        /// When DMAs landed.
        dma: DmaOrder,
        /// What happened.
        fault: Box<Fault>,
    },
    /// The result depends on when DMAs land.
    #[error("{kernel}: the result with {dma:?} DMAs differs from the one with {first:?} DMAs: a wait is missing")]
    OrderDependent {
        /// The kernel's name.
        kernel: String,
        /// The order that differs.
        dma: DmaOrder,
        /// From which.
        first: DmaOrder,
    },
    /// The results have the wrong types or shapes.
    #[error("{module} returns {actual} and should return {expected}")]
    Type {
        /// The module's name.
        module: String,
        /// Types that came.
        actual: String,
        /// Types that should have come.
        expected: String,
    },
    /// A value is not what the reference says.
    #[error(
        "{result}{index:?} = {actual:?}, expected {expected:?}: off by {error:.3e}, {allowed:.3e} allowed (magnitude \
         {magnitude:.3e}; {wrong} of {total} values are wrong)"
    )]
    Mismatch {
        /// The module's and the result's name.
        result: String,
        /// Where: one index per dimension.
        index: Vec<usize>,
        /// The value that came.
        actual: f64,
        /// The value that should have come.
        expected: f64,
        /// The sum of the absolute values of its terms.
        magnitude: f64,
        /// The absolute error.
        error: f64,
        /// The absolute error that is allowed.
        allowed: f64,
        /// How many values are wrong.
        wrong: usize,
        /// How many were compared.
        total: usize,
    },
}

/// Emits the problem as StableHLO, runs it, and compares every result with the reference.
///
/// # Errors
/// The worst value that is off, or why there is none to compare.
pub fn check<K: Kernel>(problem: &ProblemOf<K>, inputs: &Arrays, runner: &dyn Runner) -> Result<(), CheckError> {
    let context = Context::new();
    let module = kernel::stablehlo_module::<K>(&context, problem)?;
    let inputs_in_order: Vec<_> = inputs.values().cloned().collect();
    check_module(&module, &inputs_in_order, &K::results(problem), &K::reference(problem, inputs), runner)
}

/// Runs `module` on `inputs`, and compares every result with what is expected.
///
/// # Errors
/// As [`check`].
pub fn check_module(
    module: &Module,
    inputs: &[HostTensor],
    types: &Named<TensorType>,
    expected: &[Expected],
    runner: &dyn Runner,
) -> Result<(), CheckError> {
    let name = || module.name().to_owned();
    let results = runner.run(module, inputs).map_err(|source| CheckError::Run { module: name(), source })?;
    compare_all(module.name(), &results, types, expected)
}

/// Compares every one of `results` with what is expected.
///
/// # Errors
/// Results of other types, or the worst value of the first result that is off.
pub fn compare_all(
    name: &str,
    results: &[HostTensor],
    types: &Named<TensorType>,
    expected: &[Expected],
) -> Result<(), CheckError> {
    let given: Vec<_> = results.iter().map(|result| TensorType::new(result.element(), result.dims())).collect();
    if !given.iter().eq(types.values()) {
        let list = |types: &mut dyn Iterator<Item = &TensorType>| {
            types.map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        let (actual, expected) = (list(&mut given.iter()), list(&mut types.values()));
        return Err(CheckError::Type { module: name.to_owned(), actual, expected });
    }
    for ((result, (result_name, _)), expected) in results.iter().zip(types.iter()).zip(expected) {
        let name = if results.len() > 1 { format!("{name} {result_name}") } else { name.to_owned() };
        compare(&name, result, expected)?;
    }
    Ok(())
}

/// A planned Mosaic kernel and inputs of its problem.
#[derive(Debug)]
pub struct Case<'p, K: Kernel> {
    /// The plan.
    pub plan: &'p Plan<K>,
    /// Arrays for each of the problem's arguments.
    pub inputs: &'p Arrays,
}

impl<K: Kernel> Clone for Case<'_, K> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K: Kernel> Copy for Case<'_, K> {}

impl<'p, K: Kernel> Case<'p, K> {
    /// A plan and inputs of its problem.
    pub fn new(plan: &'p Plan<K>, inputs: &'p Arrays) -> Self {
        Self { plan, inputs }
    }

    /// The kernel's operands.
    pub fn operands(self) -> Vec<HostTensor> {
        kernel::host_operands::<K>(self.plan.problem(), self.plan.chip(), self.inputs)
    }

    /// The types of what the kernel returns.
    pub fn result_types(self) -> Vec<TensorType> {
        K::returned(self.plan)
    }

    /// What the results must be.
    pub fn expected(self) -> Vec<Expected> {
        K::reference(self.plan.problem(), self.inputs)
    }

    /// Compares the Mosaic form's results with the reference. Padding counts: the kernel promises zeros there, as the
    /// reference has them.
    ///
    /// # Errors
    /// The worst value that is off.
    pub fn compare(self, results: &[HostTensor]) -> Result<(), CheckError> {
        let results = kernel::host_results::<K>(self.plan.problem(), results);
        compare_all(self.plan.name(), &results, &K::results(self.plan.problem()), &self.expected())
    }

    /// Name by name and byte by byte, what `program` declares in VMEM is what the plan counted. The compiler's own
    /// scratch is in the plan alone.
    ///
    /// # Errors
    /// [`CheckError::Vmem`] with both lists.
    pub fn check_vmem(self, program: &Program) -> Result<(), CheckError> {
        let arguments = program.signature().arguments.iter().filter(|argument| argument.space == MemorySpace::Vmem);
        let declared = list(arguments.map(|argument| {
            let unit = if argument.window.is_some() { WINDOW_UNIT.0 as usize } else { 1 };
            (argument.name.as_str(), Bytes(argument.bytes().next_multiple_of(unit) as u64))
        }));
        let buffers = self.plan.vmem().buffers.iter().filter(|buffer| buffer.kind != BufferKind::InternalScratch);
        let planned = list(buffers.map(|buffer| (buffer.name.as_str(), buffer.bytes)));
        match declared == planned {
            true => Ok(()),
            false => Err(CheckError::Vmem { kernel: self.plan.name().to_owned(), declared, planned }),
        }
    }
}

fn list<'b>(buffers: impl Iterator<Item = (&'b str, Bytes)>) -> String {
    let buffers: Vec<_> = buffers.map(|(name, bytes)| format!("{name} {}", bytes.0)).collect();
    buffers.join(", ")
}

/// When DMAs land in a check: at once, at the wait, and in an order drawn from `seed`.
pub fn dma_orders(seed: u64) -> [DmaOrder; 3] {
    [DmaOrder::Early, DmaOrder::Late, DmaOrder::Random(seed)]
}

/// Emits the plan as Mosaic, compares its VMEM with the plan's, and goes on as [`check_program`]. With a runner, the
/// StableHLO form of the same problem must agree with the same reference.
///
/// # Errors
/// VMEM that the plan did not count, or as [`check_program`] and [`check`].
pub fn check_mosaic<K: Kernel>(case: Case<K>, seed: u64, runner: Option<&dyn Runner>) -> Result<Run, CheckError> {
    let context = Context::new();
    let run = check_kernel(case, &case.plan.kernel(&context)?, seed)?;
    if let Some(runner) = runner {
        check::<K>(case.plan.problem(), case.inputs, runner)?;
    }
    Ok(run)
}

/// As [`check_mosaic`], of a kernel that was emitted for the case.
///
/// # Errors
/// As [`check_mosaic`].
pub fn check_kernel<K: Kernel>(case: Case<K>, kernel: &mosaic::Kernel, seed: u64) -> Result<Run, CheckError> {
    let program = Program::decode(kernel.module())?.with_aliases(kernel.aliases());
    case.check_vmem(&program)?;
    check_program(case, &program, seed)
}

/// Runs `program`, whatever its origin, as the case's kernel on the tile machine: under each of [`dma_orders`]`(seed)`
/// without a fault, with the same bits, and close to the reference. Returns the first run.
///
/// # Errors
/// The first fault; a result that depends on the order of DMAs; or, as [`check`], the worst value that is off.
pub fn check_program<K: Kernel>(case: Case<K>, program: &Program, seed: u64) -> Result<Run, CheckError> {
    let (operands, outputs) = (case.operands(), case.result_types());
    let run = |dma| {
        let run = program.run(&Machine { dma, ..case.plan.machine() }, &operands, &outputs);
        run.map_err(|fault| CheckError::Fault { dma, fault })
    };
    let [first, others @ ..] = dma_orders(seed);
    let result = run(first)?;
    for dma in others {
        if run(dma)?.outputs != result.outputs {
            return Err(CheckError::OrderDependent { kernel: case.plan.name().to_owned(), dma, first });
        }
    }
    case.compare(&result.outputs)?;
    Ok(result)
}

/// Compares `actual` with what is expected, element by element. NaN is wrong, unless NaN is expected (a value that is
/// moved as it is).
///
/// # Errors
/// [`CheckError::Mismatch`] with the worst value.
///
/// # Panics
/// When there is not one expected value per element.
pub fn compare(name: &str, actual: &HostTensor, expected: &Expected) -> Result<(), CheckError> {
    let values = actual.to_f64();
    let Expected { values: wanted, magnitude, tolerance, .. } = expected;
    assert_eq!((values.len(), values.len()), (wanted.len(), magnitude.len()), "{name}: the reference's size");
    let mut worst: Option<(usize, f64)> = None;
    let mut wrong = 0;
    for (index, value) in values.iter().enumerate() {
        let difference = (value - wanted[index]).abs();
        let allowed = tolerance.allowed(wanted[index], magnitude[index]);
        // Written so that NaN is wrong.
        if difference <= allowed || (value.is_nan() && wanted[index].is_nan()) {
            continue;
        }
        wrong += 1;
        let error = if difference.is_nan() { f64::INFINITY } else { difference / allowed.max(f64::MIN_POSITIVE) };
        if worst.is_none_or(|(_, largest)| error > largest) {
            worst = Some((index, error));
        }
    }
    let Some((flat, _)) = worst else { return Ok(()) };
    let mut rest = flat;
    let mut index: Vec<usize> = Vec::with_capacity(actual.dims().len());
    for size in actual.dims().iter().rev() {
        index.insert(0, rest % size);
        rest /= size;
    }
    Err(CheckError::Mismatch {
        result: name.to_owned(),
        index,
        actual: values[flat],
        expected: wanted[flat],
        magnitude: magnitude[flat],
        error: (values[flat] - wanted[flat]).abs(),
        allowed: tolerance.allowed(wanted[flat], magnitude[flat]),
        wrong,
        total: values.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        chips::Chip,
        matmul::{Matmul, Problem, Spec, plan::Tiles},
        plan::Options,
    };

    fn expected(values: &[f64], magnitude: &[f64], terms: f64) -> Expected {
        Expected::new(values.to_vec(), magnitude.to_vec(), Tolerance { rounding: 0.0, terms })
    }

    #[test]
    fn the_worst_value_is_reported_and_nan_is_wrong() {
        let actual = HostTensor::new(&[2, 2], &[1.0_f32, 2.5, f32::NAN, 4.0]);
        let error = compare("k", &actual, &expected(&[1.0, 2.0, 3.0, 4.0], &[1.0; 4], 1e-3)).unwrap_err();
        let CheckError::Mismatch { index, wrong, total, .. } = error else { panic!("{error}") };
        assert_eq!((index, wrong, total), (vec![1, 0], 2, 4));
        assert!(compare("k", &actual, &expected(&[1.0, 2.5, 3.0, 4.0], &[1.0; 4], 1e9)).is_err());
        let near = HostTensor::new(&[1], &[1.0005_f32]);
        assert!(compare("k", &near, &expected(&[1.0], &[1.0], 1e-3)).is_ok());
        assert!(compare("k", &near, &expected(&[1.0], &[0.1], 1e-3)).is_err());
        // One rounding of the result passes, a second one does not.
        let rounded = HostTensor::from_f64(Element::Bf16, &[1], &[1.004]);
        let tolerance = Tolerance::of_sum(Element::Bf16, 16);
        assert!(compare("k", &rounded, &Expected::new(vec![1.004], vec![1.0], tolerance)).is_ok());
        assert!(compare("k", &rounded, &Expected::new(vec![1.0], vec![1.0], tolerance)).is_err());
    }

    fn zeros(problem: &Problem) -> Arrays {
        let arguments = Matmul::arguments(problem);
        arguments.name(arguments.types().iter().map(|ty| HostTensor::zeros(ty.element, &ty.dims)))
    }

    /// The output lives in x's memory, and the block that a step writes is the one that the next step reads: whether the
    /// pipeline fetched it before or after, no single run can show.
    #[test]
    fn a_result_that_depends_on_the_order_of_dmas_is_caught() {
        use pagoda_ir::mosaic::{self, Semantics, Window};
        let problem = Problem::new(Spec::new([16, 128, 128], Element::F32)).unwrap();
        let plan = Plan::<Matmul>::new(problem, Chip::V5p, Options::default()).unwrap();
        let context = Context::new();
        let kernel = mosaic::kernel(&context, "shift", |k| {
            k.grid([(2, Semantics::Arbitrary)]);
            let x = k.input("x", Element::F32, &[16, 128], Window::blocks(&[8, 128], |t| (1 - t.grid(0), 0)));
            k.input("w", Element::F32, &[128, 128], Window::whole(&[128, 128]));
            let out = k.output("out", Element::F32, &[16, 128], Window::blocks(&[8, 128], |t| (t.grid(0), 0)));
            out.store(x.load() + 1.0);
        });
        let program = Program::decode(kernel.unwrap().module()).unwrap().with_aliases(&[(0, 0)]);
        let error = check_program(Case::new(&plan, &zeros(&problem)), &program, 1).unwrap_err();
        assert!(
            matches!(&error, CheckError::OrderDependent { dma: DmaOrder::Late, first: DmaOrder::Early, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_module_that_declares_what_was_not_planned_is_caught() {
        let problem = Problem::new(Spec::new([16, 256, 128], Element::F32)).unwrap();
        let [whole, halves] = [256, 128].map(|k| {
            let tiles = Some(Tiles { m: 16, n: 128, k });
            Plan::new(problem, Chip::V5p, Options { tiles, vmem_limit: None }).unwrap()
        });
        let (context, inputs) = (Context::new(), zeros(&problem));
        let case = Case::new(&whole, &inputs);
        let program = |plan: &Plan<Matmul>| Program::decode(plan.kernel(&context).unwrap().module()).unwrap();
        case.check_vmem(&program(&whole)).unwrap();
        insta::assert_snapshot!(
            case.check_vmem(&program(&halves)).unwrap_err(),
            @"matmul-m16-n128-k256 declares in VMEM x 16384, w 131072, out 8192, sum 8192; its plan has x 16384, w 131072, out 8192"
        );
        check_mosaic(case, 1, None).unwrap();
    }
}
