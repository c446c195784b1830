//! RMSNorm as a Mosaic kernel.
//!
//! The grid walks over blocks of whole rows, `parallel`: on chips with two TensorCores to a device both work. The body
//! goes through its block in groups of rows, and through a group's lanes twice: once for the sum and its squares, once for
//! the normed values. Both are loops of a few registers' lanes each: lanes that are spelled out let the compiler move the
//! weight out of the loop over groups, which then spills all of it. Squares are summed lane by lane, across lanes once. The
//! f32 sum of x and the residual is made again in the second pass: two loads and an addition, where keeping it would take
//! as much VMEM as two bf16 blocks.
//!
//! Everything is 128 lanes wide, and the weight f32: v4 spreads any other row over the rows of a group through scratch.
//!
//! Ragged edge: rows beyond the array are garbage, which stays in its row and is never written back.

use pagoda_ir::{
    Element,
    mosaic::{Builder, IntoOperand, Ref, Semantics, Value, Window, tiling::LANES},
};

use super::{plan::Plan, problem::Problem};
use crate::kernel::Operand;

/// x, the residual if there is one, and the weight as a row of f32.
pub(super) fn operands(problem: &Problem) -> Vec<Operand> {
    let residual = problem.residual.then(|| Operand::of("residual"));
    // As f32: spreading a packed row over the rows of a group takes scratch on v4, and the weight is small.
    let weight = Operand::of("weight").cast(Element::F32).reshape(&[1, problem.hidden]);
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
        let weight = k.input("weight", Element::F32, &row, Window::whole(&row));
        let out = k.output("out", element, &dims, window());
        let sum = problem.residual.then(|| k.output("sum", element, &dims, window()));
        Self { k, plan, x, residual, weight, out, sum }
    }

    fn write(&self) {
        let (rows, group) = (self.plan.tiles().rows, self.plan.group().rows);
        self.k.for_range(0, rows / group, |index| self.normalise((index * group).multiple_of(group), group));
        let rest = rows % group;
        if rest > 0 {
            self.normalise(rows - rest, rest);
        }
    }

    /// Writes `count` rows of the block, from row `first` on.
    fn normalise(&self, first: impl IntoOperand<'a>, count: usize) {
        let (k, problem, group) = (self.k, self.plan.problem(), self.plan.group());
        let rows = |of: &Ref<'a>, lane| of.slice(0, first, count).slice(1, lane, LANES);
        let load = |of: &Ref<'a>, lane| rows(of, lane).load().cast(Element::F32);
        let sum = |lane| match &self.residual {
            Some(residual) => load(&self.x, lane) + load(residual, lane),
            None => load(&self.x, lane),
        };
        // The lanes at which the registers of one step of a loop begin.
        let lanes = |step: Value<'a>| {
            (0..group.registers).map(move |at| ((step * group.registers + at) * LANES).multiple_of(LANES))
        };
        let steps = problem.hidden / (group.registers * LANES);
        let zeros = vec![k.zeros(Element::F32, &[count, LANES]); group.registers];
        let squares = k.fold_range(0, steps, zeros, |step, squares| {
            let added = lanes(step).zip(squares).map(|(lane, squares)| {
                let value = sum(lane);
                if let Some(to) = &self.sum {
                    rows(to, lane).store(value.cast(problem.element));
                }
                squares + value * value
            });
            added.collect()
        });
        let squares = squares.into_iter().reduce(|sum, squares| sum + squares).expect("a register at least").sum(1);
        let scale = (squares * (1.0 / problem.hidden as f64) + problem.epsilon).rsqrt();
        k.for_range(0, steps, |step| {
            for lane in lanes(step) {
                let weight = self.weight.slice(1, lane, LANES).load();
                rows(&self.out, lane).store((sum(lane) * scale * weight).cast(problem.element));
            }
        });
    }
}
