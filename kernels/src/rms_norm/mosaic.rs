//! RMSNorm as a Mosaic kernel.
//!
//! The grid walks over blocks of whole rows, `parallel`: on chips with two TensorCores to a device both work. The body
//! goes through its block in groups of rows (a loop), and through a group's lanes in chunks (spelled out), twice: once for
//! the sum and its squares, once for the normed values. Between the two, a group holds one chunk of partial sums of squares,
//! lane by lane, and adds across lanes once. The f32 sum of x and the residual is made again in the second pass: it is two
//! loads and an addition, and keeping it would take more VMEM than everything else.
//!
//! Ragged edge: rows beyond the array are garbage, which stays in its row and is never written back.

use pagoda_ir::{
    Element,
    mosaic::{Builder, IntoOperand, Ref, Semantics, Value, Window},
};

use super::plan::{Group, Plan};
use crate::kernel::Operand;

/// x, the residual if there is one, and the weight as a row.
pub(super) fn operands(plan: &super::Problem) -> Vec<Operand> {
    let residual = plan.residual.then(|| Operand::of("residual"));
    let weight = Operand::of("weight").reshape(&[1, plan.hidden]);
    [Operand::of("x")].into_iter().chain(residual).chain([weight]).collect()
}

/// Writes the kernel that `plan` describes.
pub(super) fn write<'a>(k: &'a Builder<'a>, plan: &Plan) {
    Body::declare(k, plan).write();
}

struct Body<'a, 'p> {
    k: &'a Builder<'a>,
    plan: &'p Plan,
    x: Ref<'a>,
    residual: Option<Ref<'a>>,
    weight: Ref<'a>,
    out: Ref<'a>,
    sum: Option<Ref<'a>>,
}

impl<'a, 'p> Body<'a, 'p> {
    fn declare(k: &'a Builder<'a>, plan: &'p Plan) -> Self {
        let (problem, rows) = (plan.problem(), plan.tiles().rows);
        let (element, dims) = (problem.element, [problem.rows, problem.hidden]);
        k.grid([(plan.grid()[0], Semantics::Parallel)]);
        let window = || {
            let window = Window::blocks(&[rows, problem.hidden], |t| (t.grid(0), 0));
            // There is no next block to fetch meanwhile, and no reason to hold a buffer for it.
            if plan.one_block_per_core() { window.single_buffered() } else { window }
        };
        let x = k.input("x", element, &dims, window());
        let residual = problem.residual.then(|| k.input("residual", element, &dims, window()));
        let row = [1, problem.hidden];
        let weight = k.input("weight", element, &row, Window::whole(&row));
        let out = k.output("out", element, &dims, window());
        let sum = problem.residual.then(|| k.output("sum", element, &dims, window()));
        Self { k, plan, x, residual, weight, out, sum }
    }

    fn write(&self) {
        let (rows, group) = (self.plan.tiles().rows, self.plan.group().rows);
        let (groups, rest) = (rows / group, rows % group);
        match groups {
            1 => self.normalise(0, group),
            _ => self.k.for_range(0, groups, |index| self.normalise((index * group).multiple_of(group), group)),
        }
        if rest > 0 {
            self.normalise(rows - rest, rest);
        }
    }

    /// Writes `count` rows of the block, from row `first` on.
    fn normalise(&self, first: impl IntoOperand<'a>, count: usize) {
        let (problem, Group { lanes, .. }) = (self.plan.problem(), self.plan.group());
        let rows = |of: &Ref<'a>, lane| of.slice(0, first, count).slice(1, lane, lanes);
        let load = |of: &Ref<'a>, lane| rows(of, lane).load().cast(Element::F32);
        let sum = |lane| match &self.residual {
            Some(residual) => load(&self.x, lane) + load(residual, lane),
            None => load(&self.x, lane),
        };
        let chunks = || (0..problem.hidden).step_by(lanes);
        let mut squares: Option<Value<'a>> = None;
        for lane in chunks() {
            let value = sum(lane);
            if let Some(to) = &self.sum {
                rows(to, lane).store(value.cast(problem.element));
            }
            let square = value * value;
            squares = Some(squares.map_or(square, |squares| squares + square));
        }
        let squares = squares.expect("hidden is positive").sum(1);
        let scale = (squares * (1.0 / problem.hidden as f64) + problem.epsilon).rsqrt();
        for lane in chunks() {
            let weight = self.weight.slice(1, lane, lanes).load().cast(Element::F32);
            rows(&self.out, lane).store((sum(lane) * scale * weight).cast(problem.element));
        }
    }
}
