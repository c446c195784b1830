//! The TPU's kernels: Mosaic matmuls and attention with tiles of the planner's choice, and plain StableHLO around them.
//!
//! What the tile machine runs is what a TPU runs: the two programs differ in the name of the call alone.

use std::cell::RefCell;
use std::rc::Rc;

use pagoda_ir::mosaic::Kernel;
use pagoda_ir::stablehlo::{Builder, Tensor};
use pagoda_ir::{Context, Result};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::grouped_matmul::GroupedMatmul;
use pagoda_kernels::kernel::{self, ProblemOf};
use pagoda_kernels::matmul::Matmul;
use pagoda_kernels::rpa::{self, Rpa};
use pagoda_kernels::{Options, Plan};

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

/// The kernels that a program has of a kind, each made once. There are a few, so the list is searched.
struct Made<'c, K: pagoda_kernels::Kernel>(RefCell<Vec<(ProblemOf<K>, Rc<Kernel<'c>>)>>);

impl<K: pagoda_kernels::Kernel> Default for Made<'_, K> {
    fn default() -> Self {
        Self(RefCell::default())
    }
}

/// Who makes them.
struct Maker<'c> {
    context: &'c Context,
    chip: Chip,
    runner: Runner,
}

impl<'c> Maker<'c> {
    /// The kernel for a problem, with the planner's tiles.
    ///
    /// # Errors
    /// When it has no plan for the chip.
    fn kernel<K: pagoda_kernels::Kernel>(&self, made: &Made<'c, K>, problem: &ProblemOf<K>) -> Result<Rc<Kernel<'c>>> {
        let mut made = made.0.borrow_mut();
        if let Some((_, kernel)) = made.iter().find(|(known, _)| known == problem) {
            return Ok(Rc::clone(kernel));
        }
        let plan = Plan::<K>::new(problem.clone(), self.chip, Options::default()).map_err(unplanned)?;
        let kernel = Rc::new(self.runner.kernel(plan.kernel(self.context)?));
        made.push((problem.clone(), Rc::clone(&kernel)));
        Ok(kernel)
    }
}

/// The lowering. Every kernel is planned and written once, however many layers call it.
pub(super) struct Mosaic<'c> {
    plain: Stablehlo,
    maker: Maker<'c>,
    /// Of each kind of layers: what attention does, and the kernel that does it. Kinds that differ in their ropes alone share
    /// one.
    attention: Vec<(rpa::Problem, Rc<Kernel<'c>>)>,
    /// How many attention kernels there are.
    kernels: usize,
    matmuls: Made<'c, Matmul>,
    grouped: Made<'c, GroupedMatmul>,
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
        let (maker, made) = (Maker { context, chip, runner }, Made::<Rpa>::default());
        let attention = problems.into_iter().map(|problem| {
            let kernel = maker.kernel(&made, &problem)?;
            Ok((problem, kernel))
        });
        let attention = attention.collect::<Result<_>>()?;
        let kernels = made.0.borrow().len();
        Ok(Self { plain, maker, attention, kernels, matmuls: Made::default(), grouped: Made::default() })
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
        let kernel = self.maker.kernel(&self.matmuls, &problem)?;
        Ok(kernel::call::<Matmul>(b, &kernel, (&problem, self.maker.chip), &arguments)?[0])
    }

    fn grouped<'a>(
        &self,
        b: &Builder<'c, 'a>,
        x: Tensor<'c, 'a>,
        sizes: Tensor<'c, 'a>,
        grouped: &Grouped<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let (problem, arguments) = grouped_problem(b, x, sizes, grouped)?;
        let kernel = self.maker.kernel(&self.grouped, &problem)?;
        Ok(kernel::call::<GroupedMatmul>(b, &kernel, (&problem, self.maker.chip), &arguments)?[0])
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
            let b = if is_window_attention(problem, self.kernels) { &b.named(WINDOW_ATTENTION) } else { b };
            let args = self.plain.arguments(b, qkv, batch, (&layer, kind), kv)?;
            if problem.fused.is_some() {
                return kernel::call::<Rpa>(b, kernel, (problem, self.maker.chip), &args);
            }
            // Rotated and written by StableHLO.
            let whole = &self.plain.attention()[kind];
            let args = rpa::stablehlo::written(b, whole, &args)?;
            let attended = kernel::call::<Rpa>(b, kernel, (problem, self.maker.chip), &args)?[0];
            Ok(vec![b.reshape(attended, &whole.output_type().dims)?, args["kv_pages"]])
        })?;
        Ok((results[0], results[1]))
    }
}
