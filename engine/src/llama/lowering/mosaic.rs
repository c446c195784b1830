//! The TPU's kernels: Mosaic matmuls and attention with tiles of the planner's choice, and plain StableHLO around them.
//!
//! What the tile machine runs is what a TPU runs: the two programs differ in the name of the call alone.

use std::cell::RefCell;
use std::rc::Rc;

use pagoda_ir::mosaic::Kernel;
use pagoda_ir::stablehlo::{Builder, Tensor};
use pagoda_ir::{Context, Result};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::kernel;
use pagoda_kernels::matmul::{Matmul, Problem, plan};
use pagoda_kernels::rpa::{self, Rpa};

use super::stablehlo::Stablehlo;
use super::{Batch, Linear, Lowering, Orientation, Rows, matmul, unplanned};

/// Who runs the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Runner {
    Tpu,
    TileMachine,
}

impl Runner {
    fn kernel(self, kernel: Kernel<'_>) -> Kernel<'_> {
        match self {
            Self::Tpu => kernel,
            Self::TileMachine => kernel.for_tile_machine(),
        }
    }
}

/// The lowering. Every kernel is planned and written once, however many layers call it.
pub(super) struct Mosaic<'c> {
    context: &'c Context,
    plain: Stablehlo,
    chip: Chip,
    runner: Runner,
    attention: Kernel<'c>,
    /// What `attention` does.
    problem: rpa::Problem,
    /// The matmuls so far. A step has six at most, so the list is searched.
    matmuls: RefCell<Vec<(Problem, Rc<Kernel<'c>>)>>,
}

impl<'c> Mosaic<'c> {
    /// Plans the attention kernel `problem`.
    ///
    /// # Errors
    /// When it has no plan for `chip`.
    pub(super) fn new(
        context: &'c Context,
        plain: Stablehlo,
        problem: rpa::Problem,
        chip: Chip,
        runner: Runner,
    ) -> Result<Self> {
        let plan = rpa::plan::Plan::new(problem.clone(), chip, rpa::plan::Options::default());
        let attention = runner.kernel(plan.map_err(unplanned)?.kernel(context)?);
        Ok(Self { context, plain, chip, runner, attention, problem, matmuls: RefCell::default() })
    }

    /// The kernel for a problem.
    fn matmul(&self, problem: &Problem) -> Result<Rc<Kernel<'c>>> {
        let mut known = self.matmuls.borrow_mut();
        if let Some((_, kernel)) = known.iter().find(|(known, _)| known == problem) {
            return Ok(Rc::clone(kernel));
        }
        let plan = plan::Plan::new(*problem, self.chip, plan::Options::default()).map_err(unplanned)?;
        let kernel = Rc::new(self.runner.kernel(plan.kernel(self.context)?));
        known.push((*problem, Rc::clone(&kernel)));
        Ok(kernel)
    }
}

impl<'c> Lowering<'c> for Mosaic<'c> {
    fn orientation(&self) -> Orientation {
        self.plain.orientation()
    }

    fn batch<'a>(&self, b: &Builder<'c, 'a>, rows: Rows<'c, 'a>, rotary: Tensor<'c, 'a>) -> Result<Batch<'c, 'a>> {
        self.plain.batch(b, rows, rotary)
    }

    fn linear<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, linear: &Linear<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let x = linear.norm.map_or(Ok(x), |norm| self.norm(b, x, &norm))?;
        let (problem, arguments) = matmul(b, self.orientation(), x, linear)?;
        let results = kernel::call::<Matmul>(b, &*self.matmul(&problem)?, &problem, &arguments)?;
        Ok(results[0])
    }

    fn attend<'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        batch: &Batch<'c, 'a>,
        first_page: Tensor<'c, 'a>,
        kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let args = self.plain.arguments(b, qkv, batch, first_page, kv)?;
        if self.problem.fused.is_some() {
            let results = kernel::call::<Rpa>(b, &self.attention, &self.problem, &args)?;
            return Ok((results[0], results[1]));
        }
        // Rotated and written by StableHLO.
        let args = rpa::stablehlo::written(b, self.plain.attention(), &args)?;
        let attended = kernel::call::<Rpa>(b, &self.attention, &self.problem, &args)?[0];
        Ok((b.reshape(attended, &self.plain.attention().output_type().dims)?, args["kv_pages"]))
    }
}
