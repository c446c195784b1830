//! Holds an emission against the reference: shared by unit tests, property tests and `pagoda run`.
//!
//! [`check`] runs the StableHLO form on whatever a [`Runner`] knows; [`check_mosaic`] runs the planned Mosaic form on the
//! tile machine, where besides a wrong value every fault counts, and every result that depends on when copies land.
//!
//! Tolerances are relative to the *magnitude* of each result, the sum of the absolute values of the terms that make it up
//! (a result that cancels to 0 still carries the rounding of its terms):
//! - f32: 2e-5. Sums of up to 10^4 terms in f32 (unit roundoff 6e-8) grow errors with about the square root of the number
//!   of terms, 6e-6; the exponential, and logits of magnitude 10 whose absolute error turns into a relative one of the
//!   weights, leave the rest.
//! - bf16: 1e-2. Operands are exact and sums f32, so the rounding of the result (2^-9, 2e-3) leads; a form that rounds the
//!   softmax's weights to bf16 as well, as an MXU wants them, stays within.

use std::error::Error;

use pagoda_ir::{
    Context, Element, HostTensor, TensorType,
    mosaic::{Kernel, MemorySpace},
    stablehlo::Module,
    tile_machine::{DmaOrder, Fault, Machine, Program, Run},
};

use crate::{
    matmul, rpa,
    vmem::{BufferKind, Bytes, VmemReport, WINDOW_UNIT},
};

/// Runs a module's `main`. Kernels know no device; whoever knows one implements this.
pub trait Runner {
    /// Compiles `module` (or finds it compiled) and runs it.
    ///
    /// # Errors
    /// What the device's compiler or the device said.
    fn run(&self, module: &Module, inputs: &[HostTensor]) -> Result<Vec<HostTensor>, Box<dyn Error + Send + Sync>>;
}

/// A kernel, a problem and inputs.
#[derive(Clone, Copy, Debug)]
pub enum Case<'p> {
    /// Matrix multiplication.
    Matmul(&'p matmul::Problem, &'p matmul::Inputs),
    /// Ragged paged attention.
    Rpa(&'p rpa::Problem, &'p rpa::Inputs),
    /// Writing `k` and `v` of the batch's rows into the KV cache.
    KvWrite(&'p rpa::Problem, &'p rpa::Inputs, &'p HostTensor, &'p HostTensor),
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
    /// The tile machine caught the kernel doing what hardware would not forgive.
    #[error("with {dma:?} copies: {fault}")]
    Fault {
        /// When copies landed.
        dma: DmaOrder,
        /// What happened.
        fault: Box<Fault>,
    },
    /// The result depends on when copies land.
    #[error("{kernel}: the result with {dma:?} copies differs from the one with {first:?} copies: a wait is missing")]
    OrderDependent {
        /// The kernel's name.
        kernel: String,
        /// The order that differs.
        dma: DmaOrder,
        /// From which.
        first: DmaOrder,
    },
    /// The result has the wrong type or shape.
    #[error("{module} returns {actual} and should return {expected}")]
    Type {
        /// The module's name.
        module: String,
        /// Types that came.
        actual: String,
        /// Type that should have come.
        expected: String,
    },
    /// A value is not what the reference says.
    #[error(
        "{module}{index:?} = {actual}, expected {expected}: off by {error:.3e} of its magnitude {magnitude:.3e}, \
         {tolerance:.0e} allowed ({wrong} of {total} values are wrong)"
    )]
    Mismatch {
        /// The module's name.
        module: String,
        /// Where: one index per dimension.
        index: Vec<usize>,
        /// The value that came.
        actual: f64,
        /// The value that should have come.
        expected: f64,
        /// What the error is relative to.
        magnitude: f64,
        /// The relative error.
        error: f64,
        /// The relative error that is allowed.
        tolerance: f64,
        /// How many values are wrong.
        wrong: usize,
        /// How many were compared.
        total: usize,
    },
}

/// The error that `element` results may have, relative to their magnitude; see the module's documentation.
pub fn tolerance(element: Element) -> f64 {
    match element {
        Element::F32 => 2e-5,
        Element::F64 => 1e-12,
        _ => 1e-2,
    }
}

/// Emits the case as StableHLO, runs it, and compares every result with the reference.
///
/// # Errors
/// The worst value that is off, or why there is none to compare.
pub fn check(case: Case, runner: &dyn Runner) -> Result<(), CheckError> {
    let context = Context::new();
    match case {
        Case::Matmul(problem, inputs) => {
            let module = matmul::stablehlo::module(&context, problem)?;
            let expected = matmul::reference(problem, inputs);
            let result = run(runner, &module, &inputs.to_tensors(), &problem.output_type())?;
            compare(module.name(), &result, &expected.output, &expected.magnitude, tolerance(problem.output))
        }
        Case::Rpa(problem, inputs) => {
            let module = rpa::stablehlo::module(&context, problem)?;
            let expected = rpa::reference(problem, inputs);
            let result = run(runner, &module, &inputs.to_tensors(problem), &problem.q_type())?;
            compare(module.name(), &result, &expected.output, &expected.magnitude, tolerance(problem.element))
        }
        Case::KvWrite(problem, inputs, k, v) => {
            let module = rpa::kv_write::module(&context, problem)?;
            let slots = inputs.batch.kv_slots(problem.tokens);
            let mut arguments =
                vec![inputs.kv_pages.clone(), k.clone(), v.clone(), HostTensor::new(&[problem.tokens], &slots)];
            if problem.layers > 1 {
                arguments.push(HostTensor::scalar((inputs.layer * problem.pages) as i32));
            }
            let expected = rpa::reference::written(problem, inputs, k, v);
            let result = run(runner, &module, &arguments, &problem.kv_pages_type())?;
            // Bytes move, nothing is computed: poison must stay poison, so NaN equals NaN here.
            let actual: Vec<f64> =
                result.to_f64().iter().map(|value| if value.is_nan() { POISON } else { *value }).collect();
            let expected: Vec<f64> =
                expected.iter().map(|value| if value.is_nan() { POISON } else { *value }).collect();
            let actual = HostTensor::from_f64(Element::F64, result.dims(), &actual);
            compare(module.name(), &actual, &expected, &vec![0.0; expected.len()], 0.0)
        }
    }
}

/// A planned Mosaic kernel and inputs of its problem.
#[derive(Clone, Copy, Debug)]
pub enum MosaicCase<'p> {
    /// Matrix multiplication.
    Matmul(&'p matmul::plan::Plan, &'p matmul::Inputs),
    /// Ragged paged attention.
    Rpa(&'p rpa::plan::Plan, &'p rpa::Inputs),
}

impl<'p> MosaicCase<'p> {
    /// The same problem and inputs for [`check`].
    pub fn stablehlo(self) -> Case<'p> {
        match self {
            Self::Matmul(plan, inputs) => Case::Matmul(plan.problem(), inputs),
            Self::Rpa(plan, inputs) => Case::Rpa(plan.problem(), inputs),
        }
    }

    /// Emits the kernel.
    ///
    /// # Errors
    /// None for a legal plan, unless MLIR fails.
    pub fn kernel(self, context: &Context) -> pagoda_ir::Result<Kernel<'_>> {
        match self {
            Self::Matmul(plan, _) => matmul::mosaic::kernel(context, plan),
            Self::Rpa(plan, _) => rpa::mosaic::kernel(context, plan),
        }
    }

    /// The kernel's operands.
    pub fn operands(self) -> Vec<HostTensor> {
        match self {
            Self::Matmul(plan, inputs) => matmul::mosaic::operands(plan.problem(), inputs),
            Self::Rpa(plan, inputs) => rpa::mosaic::operands(plan.problem(), inputs),
        }
    }

    /// The type of the kernel's only output.
    pub fn output_type(self) -> TensorType {
        match self {
            Self::Matmul(plan, _) => plan.problem().output_type(),
            Self::Rpa(plan, _) => plan.problem().q_type(),
        }
    }

    /// The plan's chip, VMEM limited as the plan says.
    pub fn machine(self) -> Machine {
        let (chip, limit) = match self {
            Self::Matmul(plan, _) => (plan.chip(), plan.limit()),
            Self::Rpa(plan, _) => (plan.chip(), plan.limit()),
        };
        let info = chip.info();
        let [vmem_bytes, smem_bytes, hbm_bytes] = [limit, info.smem_per_core, info.hbm].map(|bytes| bytes.0 as usize);
        Machine { vmem_bytes, smem_bytes, hbm_bytes, ..Machine::default() }
    }

    /// The kernel's name, tiles in it.
    pub fn name(self) -> String {
        match self {
            Self::Matmul(plan, _) => plan.name(),
            Self::Rpa(plan, _) => plan.name(),
        }
    }

    fn vmem(self) -> &'p VmemReport {
        match self {
            Self::Matmul(plan, _) => plan.vmem(),
            Self::Rpa(plan, _) => plan.vmem(),
        }
    }

    /// The reference's output and its magnitude.
    pub fn expected(self) -> (Vec<f64>, Vec<f64>) {
        match self {
            Self::Matmul(plan, inputs) => {
                let matmul::reference::Reference { output, magnitude } = matmul::reference(plan.problem(), inputs);
                (output, magnitude)
            }
            Self::Rpa(plan, inputs) => {
                let rpa::reference::Reference { output, magnitude } = rpa::reference(plan.problem(), inputs);
                (output, magnitude)
            }
        }
    }

    /// Compares an output with the reference. Every row of an attention counts: padding rows are zeros, as the kernel
    /// promises and the reference has them.
    ///
    /// # Errors
    /// The worst value that is off.
    pub fn compare(self, output: &HostTensor) -> Result<(), CheckError> {
        let (expected, magnitude) = self.expected();
        compare(&self.name(), output, &expected, &magnitude, tolerance(output.element()))
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
        let buffers = self.vmem().buffers.iter().filter(|buffer| buffer.kind != BufferKind::InternalScratch);
        let planned = list(buffers.map(|buffer| (buffer.name.as_str(), buffer.bytes)));
        match declared == planned {
            true => Ok(()),
            false => Err(CheckError::Vmem { kernel: self.name(), declared, planned }),
        }
    }
}

fn list<'b>(buffers: impl Iterator<Item = (&'b str, Bytes)>) -> String {
    let buffers: Vec<_> = buffers.map(|(name, bytes)| format!("{name} {}", bytes.0)).collect();
    buffers.join(", ")
}

/// When copies land in a check: at once, at the wait, and in an order drawn from `seed`.
pub fn dma_orders(seed: u64) -> [DmaOrder; 3] {
    [DmaOrder::Early, DmaOrder::Late, DmaOrder::Random(seed)]
}

/// Emits the plan as Mosaic, compares its VMEM with the plan's, and goes on as [`check_program`]. With a runner, the
/// StableHLO form of the same problem must agree with the same reference.
///
/// # Errors
/// VMEM that the plan did not count, or as [`check_program`] and [`check`].
pub fn check_mosaic(case: MosaicCase, seed: u64, runner: Option<&dyn Runner>) -> Result<Run, CheckError> {
    let context = Context::new();
    let kernel = case.kernel(&context)?;
    let program = Program::decode(kernel.module())?.with_aliases(kernel.aliases());
    case.check_vmem(&program)?;
    let run = check_program(case, &program, seed)?;
    if let Some(runner) = runner {
        check(case.stablehlo(), runner)?;
    }
    Ok(run)
}

/// Runs `program`, whatever its origin, as the case's kernel on the tile machine: under each of [`dma_orders`]`(seed)`
/// without a fault, with the same bits, and close to the reference. Returns the first run.
///
/// # Errors
/// The first fault; a result that depends on the order of copies; or, as [`check`], the worst value that is off.
pub fn check_program(case: MosaicCase, program: &Program, seed: u64) -> Result<Run, CheckError> {
    let (operands, outputs) = (case.operands(), [case.output_type()]);
    let run = |dma| {
        let run = program.run(&Machine { dma, ..case.machine() }, &operands, &outputs);
        run.map_err(|fault| CheckError::Fault { dma, fault })
    };
    let [first, others @ ..] = dma_orders(seed);
    let result = run(first)?;
    for dma in others {
        if run(dma)?.outputs != result.outputs {
            return Err(CheckError::OrderDependent { kernel: case.name(), dma, first });
        }
    }
    case.compare(&result.outputs[0])?;
    Ok(result)
}

/// Stands for NaN where NaN is a legitimate value; no test input is this large.
const POISON: f64 = 1e300;

fn run(
    runner: &dyn Runner,
    module: &Module,
    inputs: &[HostTensor],
    expected: &pagoda_ir::TensorType,
) -> Result<HostTensor, CheckError> {
    let name = || module.name().to_owned();
    let mut results = runner.run(module, inputs).map_err(|source| CheckError::Run { module: name(), source })?;
    let fits = |result: &HostTensor| result.element() == expected.element && result.dims() == expected.dims;
    match results.pop() {
        Some(result) if results.is_empty() && fits(&result) => Ok(result),
        result => {
            let all = results.iter().chain(&result).map(|result| format!("{}{:?}", result.element(), result.dims()));
            let actual = all.collect::<Vec<_>>().join(", ");
            Err(CheckError::Type { module: name(), actual, expected: expected.to_string() })
        }
    }
}

/// Compares `actual` with `expected`; `|actual - expected| <= tolerance * magnitude` must hold everywhere. NaN is wrong.
///
/// # Errors
/// [`CheckError::Mismatch`] with the worst value.
pub fn compare(
    name: &str,
    actual: &HostTensor,
    expected: &[f64],
    magnitude: &[f64],
    tolerance: f64,
) -> Result<(), CheckError> {
    let values = actual.to_f64();
    assert_eq!((values.len(), values.len()), (expected.len(), magnitude.len()), "{name}: the reference's size");
    let mut worst: Option<(usize, f64)> = None;
    let mut wrong = 0;
    for (index, value) in values.iter().enumerate() {
        let difference = (value - expected[index]).abs();
        // Written so that NaN is wrong.
        if difference <= tolerance * magnitude[index] {
            continue;
        }
        wrong += 1;
        let error = if difference.is_nan() { f64::INFINITY } else { difference / magnitude[index] };
        if worst.is_none_or(|(_, largest)| error > largest) {
            worst = Some((index, error));
        }
    }
    let Some((flat, error)) = worst else { return Ok(()) };
    let mut rest = flat;
    let mut index: Vec<usize> = Vec::with_capacity(actual.dims().len());
    for size in actual.dims().iter().rev() {
        index.insert(0, rest % size);
        rest /= size;
    }
    Err(CheckError::Mismatch {
        module: name.to_owned(),
        index,
        actual: values[flat],
        expected: expected[flat],
        magnitude: magnitude[flat],
        error,
        tolerance,
        wrong,
        total: values.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_value_is_reported_and_nan_is_wrong() {
        let actual = HostTensor::new(&[2, 2], &[1.0_f32, 2.5, f32::NAN, 4.0]);
        let error = compare("k", &actual, &[1.0, 2.0, 3.0, 4.0], &[1.0; 4], 1e-3).unwrap_err();
        let CheckError::Mismatch { index, wrong, total, .. } = error else { panic!("{error}") };
        assert_eq!((index, wrong, total), (vec![1, 0], 2, 4));
        assert!(compare("k", &actual, &[1.0, 2.5, 3.0, 4.0], &[1.0; 4], 1e9).is_err());
        let near = HostTensor::new(&[1], &[1.0005_f32]);
        assert!(compare("k", &near, &[1.0], &[1.0], 1e-3).is_ok());
        assert!(compare("k", &near, &[1.0], &[0.1], 1e-3).is_err());
    }

    /// The output lives in x's memory, and the block that a step writes is the one that the next step reads: whether the
    /// pipeline fetched it before or after, no single run can tell.
    #[test]
    fn a_result_that_depends_on_the_order_of_copies_is_caught() {
        use matmul::{Epilogue, Inputs, Layout, Problem, Spec, plan};
        use pagoda_ir::mosaic::{self, Semantics, Window};
        let (input, output, layout, epilogue) = (Element::F32, Element::F32, Layout::RowMajor, Epilogue::NONE);
        let problem = Problem::new(Spec { m: 16, k: 128, n: 128, input, output, layout, epilogue }).unwrap();
        let plan = plan::Plan::new(problem, crate::chips::Chip::V5p, plan::Options::default()).unwrap();
        let [x, w] = [&[16, 128], &[128, 128]].map(|dims| HostTensor::zeros(input, dims));
        let inputs = Inputs { x, w, bias: None, residual: None };
        let context = Context::new();
        let kernel = mosaic::kernel(&context, "shift", |k| {
            k.grid([(2, Semantics::Arbitrary)]);
            let x = k.input("x", input, &[16, 128], Window::blocks(&[8, 128], |t| (1 - t.grid(0), 0)));
            k.input("w", input, &[128, 128], Window::whole(&[128, 128]));
            let out = k.output("out", output, &[16, 128], Window::blocks(&[8, 128], |t| (t.grid(0), 0)));
            out.store(x.load() + 1.0);
        });
        let program = Program::decode(kernel.unwrap().module()).unwrap().with_aliases(&[(0, 0)]);
        let error = check_program(MosaicCase::Matmul(&plan, &inputs), &program, 1).unwrap_err();
        assert!(
            matches!(&error, CheckError::OrderDependent { dma: DmaOrder::Late, first: DmaOrder::Early, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_module_that_declares_what_was_not_planned_is_caught() {
        use matmul::{
            Epilogue, Inputs, Layout, Problem, Spec,
            plan::{Options, Plan, Tiles},
        };
        let (input, output, layout, epilogue) = (Element::F32, Element::F32, Layout::RowMajor, Epilogue::NONE);
        let problem = Problem::new(Spec { m: 16, k: 256, n: 128, input, output, layout, epilogue }).unwrap();
        let [whole, halves] = [256, 128].map(|k| {
            let tiles = Some(Tiles { m: 16, n: 128, k });
            Plan::new(problem, crate::chips::Chip::V5p, Options { tiles, vmem_limit: None }).unwrap()
        });
        let zeros = |ty: TensorType| HostTensor::zeros(ty.element, &ty.dims);
        let [x, w] = problem.argument_types().try_into().map(|types: [TensorType; 2]| types.map(zeros)).unwrap();
        let inputs = Inputs { x, w, bias: None, residual: None };
        let (context, case) = (Context::new(), MosaicCase::Matmul(&whole, &inputs));
        let program = |plan| Program::decode(matmul::mosaic::kernel(&context, plan).unwrap().module()).unwrap();
        case.check_vmem(&program(&whole)).unwrap();
        insta::assert_snapshot!(
            case.check_vmem(&program(&halves)).unwrap_err(),
            @"matmul-m16-n128-k256 declares in VMEM x 16384, w 131072, out 8192, sum 8192; its plan has x 16384, w 131072, out 8192"
        );
        check_mosaic(case, 1, None).unwrap();
    }
}
