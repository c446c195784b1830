//! The TPU's kernels: Mosaic matmuls and attention with tiles of the planner's choice, and plain StableHLO around them.
//!
//! What the tile machine runs is what a TPU runs: the two programs differ in the name of the call alone.

use std::cell::RefCell;
use std::rc::Rc;

use pagoda_ir::mosaic::Kernel;
use pagoda_ir::stablehlo::{Builder, Tensor};
use pagoda_ir::{Context, Result};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::grouped_matmul::{self, GroupedMatmul};
use pagoda_kernels::kernel;
use pagoda_kernels::matmul::{Matmul, Problem, plan};
use pagoda_kernels::rpa::{self, Rpa};

use super::stablehlo::Stablehlo;
use super::{
    Batch, Grouped, Linear, Lowering, OfLayer, Orientation, Rows, WINDOW_ATTENTION, grouped_problem,
    is_window_attention, matmul, unplanned,
};

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
    /// Of each kind of layers: what attention does, and which of the kernels does it.
    attention: Vec<(rpa::Problem, usize)>,
    /// The attention kernels: kinds that differ in their ropes alone share one.
    kernels: Vec<Kernel<'c>>,
    /// The matmuls so far. A step has six at most, so the list is searched.
    matmuls: RefCell<Vec<(Problem, Rc<Kernel<'c>>)>>,
    /// The grouped matmuls so far, two at most.
    grouped: RefCell<Vec<(grouped_matmul::Problem, Rc<Kernel<'c>>)>>,
}

impl<'c> Mosaic<'c> {
    /// Plans the attention kernels of the kinds of layers.
    ///
    /// # Errors
    /// When one has no plan for `chip`.
    pub(super) fn new(
        context: &'c Context,
        plain: Stablehlo,
        problems: Vec<rpa::Problem>,
        chip: Chip,
        runner: Runner,
    ) -> Result<Self> {
        let mut different: Vec<rpa::Problem> = Vec::new();
        let mut attention = Vec::new();
        for problem in problems {
            let at = different.iter().position(|known| *known == problem).unwrap_or(different.len());
            if at == different.len() {
                different.push(problem.clone());
            }
            attention.push((problem, at));
        }
        let kernel = |problem| {
            let plan = rpa::plan::Plan::new(problem, chip, rpa::plan::Options::default());
            Ok(runner.kernel(plan.map_err(unplanned)?.kernel(context)?))
        };
        let kernels = different.into_iter().map(kernel).collect::<Result<_>>()?;
        Ok(Self {
            context,
            plain,
            chip,
            runner,
            attention,
            kernels,
            matmuls: RefCell::default(),
            grouped: RefCell::default(),
        })
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

    fn batch<'a>(&self, b: &Builder<'c, 'a>, rows: Rows<'c, 'a>, rotary: &[Tensor<'c, 'a>]) -> Result<Batch<'c, 'a>> {
        self.plain.batch(b, rows, rotary)
    }

    fn linear<'a>(&self, b: &Builder<'c, 'a>, x: Tensor<'c, 'a>, linear: &Linear<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let x = linear.norm.map_or(Ok(x), |norm| self.norm(b, x, &norm))?;
        let (problem, arguments) = matmul(b, self.orientation(), x, linear)?;
        let results = kernel::call::<Matmul>(b, &*self.matmul(&problem)?, &problem, &arguments)?;
        Ok(results[0])
    }

    fn grouped<'a>(
        &self,
        b: &Builder<'c, 'a>,
        x: Tensor<'c, 'a>,
        sizes: Tensor<'c, 'a>,
        grouped: &Grouped<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let (problem, arguments) = grouped_problem(b, x, sizes, grouped)?;
        let known =
            self.grouped.borrow().iter().find(|(known, _)| *known == problem).map(|(_, kernel)| Rc::clone(kernel));
        let kernel = match known {
            Some(kernel) => kernel,
            None => {
                let options = grouped_matmul::plan::Options::default();
                let plan = grouped_matmul::plan::Plan::new(problem, self.chip, options).map_err(unplanned)?;
                let kernel = Rc::new(self.runner.kernel(plan.kernel(self.context)?));
                self.grouped.borrow_mut().push((problem, Rc::clone(&kernel)));
                kernel
            }
        };
        Ok(kernel::call::<GroupedMatmul>(b, &kernel, &problem, &arguments)?[0])
    }

    fn attend<'a>(
        &self,
        b: &Builder<'c, 'a>,
        qkv: Tensor<'c, 'a>,
        batch: &Batch<'c, 'a>,
        layer: OfLayer<'c, 'a>,
        kv: Tensor<'c, 'a>,
    ) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
        let results = layer.kind.select(b, self.attention.len(), |b, kind| {
            let (problem, kernel) = &self.attention[kind];
            let b = if is_window_attention(problem, self.kernels.len()) { &b.named(WINDOW_ATTENTION) } else { b };
            let args = self.plain.arguments(b, qkv, batch, (&layer, kind), kv)?;
            if problem.fused.is_some() {
                return kernel::call::<Rpa>(b, &self.kernels[*kernel], problem, &args);
            }
            // Rotated and written by StableHLO.
            let whole = &self.plain.attention()[kind];
            let args = rpa::stablehlo::written(b, whole, &args)?;
            let attended = kernel::call::<Rpa>(b, &self.kernels[*kernel], problem, &args)?[0];
            Ok(vec![b.reshape(attended, &whole.output_type().dims)?, args["kv_pages"]])
        })?;
        Ok((results[0], results[1]))
    }
}
