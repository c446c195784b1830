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
use super::{Batch, Kind, Linear, Lowering, Orientation, Rows, matmul, unplanned};

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
    /// The matmuls so far. A step has six at most, so the list is searched.
    matmuls: RefCell<Vec<(Problem, Rc<Kernel<'c>>)>>,
}

impl<'c> Mosaic<'c> {
    /// Plans the attention kernel.
    ///
    /// # Errors
    /// When it has no plan for `chip`.
    pub(super) fn new(context: &'c Context, plain: Stablehlo, chip: Chip, runner: Runner) -> Result<Self> {
        let plan = rpa::plan::Plan::new(plain.attention().clone(), chip, rpa::plan::Options::default());
        let attention = runner.kernel(plan.map_err(unplanned)?.kernel(context)?);
        Ok(Self { context, plain, chip, runner, attention, matmuls: RefCell::default() })
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
        let batch = self.plain.batch(b, rows, rotary)?;
        Ok(Batch { rows: with_a_key_per_row(b, self.plain.attention().kind, batch.rows)?, ..batch })
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
        let args = self.plain.write_kv(b, qkv, batch, first_page, kv)?;
        let results = kernel::call::<Rpa>(b, &self.attention, self.plain.attention(), &args)?;
        Ok((self.plain.join_heads(b, results[0])?, args["kv_pages"]))
    }
}

/// The kernel's precondition: a sequence has no more query rows than KV tokens. In a decode step every slot has a row, and
/// an idle slot no token: it gets the one in the first of its pages, and what comes of it goes nowhere.
fn with_a_key_per_row<'c, 'a>(b: &Builder<'c, 'a>, kind: Kind, rows: Rows<'c, 'a>) -> Result<Rows<'c, 'a>> {
    let at_least = |x: Tensor<'c, 'a>, least: f64| b.maximum(x, b.splat(x.element(), &x.dims(), least)?);
    match kind {
        Kind::Mixed => Ok(rows),
        Kind::Decode => {
            Ok(Rows { kv_lens: at_least(rows.kv_lens, 1.0)?, page_indices: at_least(rows.page_indices, 0.0)?, ..rows })
        }
    }
}
