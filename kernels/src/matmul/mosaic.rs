//! Matrix multiplication as a Mosaic kernel.
//!
//! A grid kernel: the pipeline brings one tile of each side into VMEM per step, the body adds their product to the f32
//! accumulator, and the last step along `k` applies the epilogue and stores. The body works through its tile in
//! [`Chunk`](super::plan::Chunk)s, each of which reads its part of the accumulator, multiplies over the whole depth of the tile and writes it
//! back, so that no more than a chunk is live in registers: whole tiles in registers spill (1.4 MB at 512 x 512) and take
//! the compiler a minute.
//!
//! Ragged edges: rows and columns beyond the array are garbage that the pipeline never writes back, but garbage along `k`
//! would be summed, so the last step along `k` selects zeros there, on both sides (NaN times zero is NaN).

use pagoda_ir::{
    Element,
    mosaic::{Builder, DotDims, IntoOperand, MemorySpace, Precision, Ref, Semantics, Value, Window},
};

use super::{
    plan::{ArrayWindow, Axis, Order, Plan, Side, names, windows},
    problem::{Activation, Layout, Problem},
};
use crate::kernel::Operand;

/// Writes the kernel that `plan` describes.
pub(super) fn write<'a>(k: &'a Builder<'a>, plan: &Plan) {
    Body::declare(k, plan).write();
}

/// With several layers the index of one; then the side whose rows are the output's rows, the other side (gates, then ups
/// of a gated product: the weight is named twice), the bias as a row or a column, the residual.
pub(super) fn operands(problem: &Problem) -> Vec<Operand> {
    let copies = if problem.epilogue.activation == Activation::SiluGate { 2 } else { 1 };
    let several = |operand: Operand| std::iter::repeat_n(operand, copies);
    let (x, w) = (Operand::of("x"), several(Operand::of("w")));
    let stack = (problem.layers > 1).then_some(problem.layers);
    let mut operands: Vec<_> = stack.iter().map(|_| Operand::of("layer").reshape(&[1])).collect();
    match problem.layout {
        Layout::FeatureMajor => operands.extend(w.chain([x])),
        Layout::RowMajor | Layout::WeightTransposed => operands.extend([x].into_iter().chain(w)),
    }
    if problem.epilogue.bias {
        let columns = problem.weight_columns();
        let dims = if problem.layout == Layout::FeatureMajor { [columns, 1] } else { [1, columns] };
        let dims: Vec<_> = stack.into_iter().chain(dims).collect();
        // As f32: broadcasting a packed row takes scratch on v4, and the bias is small.
        operands.extend(several(Operand::of("bias").cast(Element::F32).reshape(&dims)));
    }
    operands.extend(problem.epilogue.residual.then(|| Operand::of("residual")));
    operands
}

/// The kernel's operands.
struct Body<'a, 'p> {
    k: &'a Builder<'a>,
    plan: &'p Plan,
    /// The index of the step along `k`.
    step: Value<'a>,
    lhs: Vec<Ref<'a>>,
    rhs: Vec<Ref<'a>>,
    bias: Vec<Ref<'a>>,
    residual: Option<Ref<'a>>,
    out: Ref<'a>,
    /// One per product (two of a gated one); none when one step covers all of `k`.
    sums: Vec<Ref<'a>>,
}

/// What a product is added to.
#[derive(Clone, Copy)]
enum Sum {
    /// Nothing: the first step along `k`.
    Zero,
    /// The accumulator.
    Loaded,
}

impl<'a, 'p> Body<'a, 'p> {
    fn declare(k: &'a Builder<'a>, plan: &'p Plan) -> Self {
        let [rows, columns, _] = plan.blocks();
        let grid = plan.steps_of_grid();
        let semantics = [Semantics::Parallel, Semantics::Parallel, Semantics::Arbitrary];
        let [_, _, step] = k.grid(std::array::from_fn(|dim| (grid[dim], semantics[dim])));
        let (row, column) = if plan.order() == Order::RowsOuter { (0, 1) } else { (1, 0) };
        let layers = plan.problem().layers;
        if layers > 1 {
            k.prefetch("layer", Element::I32, &[1]);
        }
        let (mut lhs, mut rhs, mut bias, mut residual, mut out) = (vec![], vec![], vec![], vec![], vec![]);
        for window in windows(plan.problem()) {
            let ArrayWindow { name, side, element, axes, half, halves, stacked } = window;
            let dims = axes.map(|axis| match axis {
                Axis::Rows | Axis::Columns => plan.along(axis).0 * halves,
                Axis::Depth | Axis::One => plan.along(axis).0,
            });
            // A block of a stack is of one layer, whose index comes first.
            let of_stack = |layer, dims: [_; 2]| stacked.then_some(layer).into_iter().chain(dims).collect::<Vec<_>>();
            let (dims, block) = (of_stack(layers, dims), of_stack(1, axes.map(|axis| plan.along(axis).1)));
            let blocks = Window::blocks(&block, move |t| {
                // The second half of a gated weight starts as many blocks further as the first one has.
                let feature = |dim, axis| match half * plan.along(axis).2 {
                    0 => t.grid(dim).literal(),
                    skip => (t.grid(dim) + skip).literal(),
                };
                let within = axes.map(|axis| match axis {
                    Axis::Rows => feature(row, axis),
                    Axis::Columns => feature(column, axis),
                    Axis::Depth => t.grid(2).literal(),
                    Axis::One => 0.literal(),
                });
                let layer = stacked.then(|| t.prefetch(0).at(0).load().literal());
                layer.into_iter().chain(within).collect::<Vec<_>>()
            });
            // There is no next block to fetch meanwhile, and no reason to hold a buffer for it.
            let blocks = if plan.one_step_per_core() { blocks.single_buffered() } else { blocks };
            let block = match side {
                Side::Out => k.output(name, element, &dims, blocks),
                _ => k.input(name, element, &dims, blocks),
            };
            let block = if stacked { block.at(0) } else { block };
            match side {
                Side::Left => lhs.push(block),
                Side::Right => rhs.push(block),
                Side::Bias => bias.push(block),
                Side::Residual => residual.push(block),
                Side::Out => out.push(block),
            }
        }
        let sums = match plan.steps() {
            1 => vec![],
            _ => names(plan.problem(), "sum", "sum_gate", "sum_up")
                .into_iter()
                .map(|name| k.scratch(name, MemorySpace::Vmem, Element::F32, &[rows, columns]))
                .collect(),
        };
        Self { k, plan, step, lhs, rhs, bias, residual: residual.pop(), out: out.remove(0), sums }
    }

    fn write(&self) {
        let (k, steps) = (self.k, self.plan.steps());
        let edge = Some(self.plan.edge()).filter(|&edge| edge > 0);
        let first = self.step.equals(0);
        match steps {
            1 => self.multiply(Sum::Zero, true, edge),
            // Neither a pass that zeroes the accumulator nor one that reads it back.
            2 => k.if_else(first, || self.multiply(Sum::Zero, false, None), || self.multiply(Sum::Loaded, true, edge)),
            _ => {
                k.when(first, || self.sums.iter().for_each(|sum| sum.store(0.0)));
                let last = self.step.equals(steps - 1);
                k.if_else(last, || self.multiply(Sum::Loaded, true, edge), || self.multiply(Sum::Loaded, false, None));
            }
        }
    }

    /// Row and column ranges of the chunks.
    fn chunks(&self) -> Vec<[(usize, usize); 2]> {
        let ([rows, columns, _], chunk) = (self.plan.blocks(), self.plan.chunk());
        let columns = ranges(columns, chunk.columns);
        columns.flat_map(|column| ranges(rows, chunk.rows).map(move |row| [row, column])).collect()
    }

    /// Adds the tiles' product to what `start` names, and keeps it in the accumulator or, with `finish`, goes on to the
    /// epilogue and stores the result. `edge` is how much of the depth is real, if not all.
    fn multiply(&self, start: Sum, finish: bool, edge: Option<usize>) {
        let products = self.lhs.len().max(self.rhs.len());
        for [row, column] in self.chunks() {
            let sums: Vec<_> = (0..products).map(|half| self.product(half, row, column, start, edge)).collect();
            if finish {
                self.store(row, column, sums);
            } else {
                for (sum, value) in self.sums.iter().zip(sums) {
                    part(sum, row, column).store(value);
                }
            }
        }
    }

    /// Start plus product of one chunk.
    fn product(
        &self,
        half: usize,
        row: (usize, usize),
        column: (usize, usize),
        start: Sum,
        edge: Option<usize>,
    ) -> Value<'a> {
        let k = self.k;
        let lhs = self.lhs[half.min(self.lhs.len() - 1)].slice(0, row.0, row.1);
        let rhs = &self.rhs[half.min(self.rhs.len() - 1)];
        let transposed = self.plan.problem().layout == Layout::WeightTransposed;
        let (rhs, rhs_depth, dims) = match transposed {
            true => (rhs.slice(0, column.0, column.1), 1, DotDims::nt()),
            false => (rhs.slice(1, column.0, column.1), 0, DotDims::nn()),
        };
        let precision = match self.plan.problem().input {
            Element::F32 => Precision::Fp32,
            _ => Precision::Default,
        };
        let mut sum = match start {
            Sum::Zero => k.zeros(Element::F32, &[row.1, column.1]),
            Sum::Loaded => part(&self.sums[half], row, column).load(),
        };
        let [_, _, depth] = self.plan.blocks();
        for (from, size) in ranges(depth, self.plan.chunk().depth) {
            let (mut lhs, mut rhs) = (lhs.slice(1, from, size).load(), rhs.slice(rhs_depth, from, size).load());
            if let Some(edge) = edge.map(|edge| edge.saturating_sub(from)).filter(|&edge| edge < size) {
                if edge == 0 {
                    break;
                }
                (lhs, rhs) = (self.masked(lhs, 1, edge), self.masked(rhs, rhs_depth, edge));
            }
            sum = k.dot_general(lhs, rhs, sum, &dims, precision);
        }
        sum
    }

    /// Zeros from `edge` on along `dim`.
    fn masked(&self, tile: Value<'a>, dim: usize, edge: usize) -> Value<'a> {
        let element = tile.element();
        // Narrow elements have no selects of their own on older chips.
        let wide = tile.cast(Element::F32);
        self.k.iota(&tile.dims(), dim).less(edge).select(wide, 0.0).cast(element)
    }

    /// The epilogue, and the store of the result.
    fn store(&self, row: (usize, usize), column: (usize, usize), mut sums: Vec<Value<'a>>) {
        let problem = self.plan.problem();
        for (sum, bias) in sums.iter_mut().zip(&self.bias) {
            let bias = match problem.layout {
                Layout::FeatureMajor => bias.slice(0, row.0, row.1),
                _ => bias.slice(1, column.0, column.1),
            };
            *sum = *sum + bias.load();
        }
        let mut result = match sums[..] {
            [gate, up] => gate * gate.logistic() * up,
            _ => sums[0],
        };
        if let Some(residual) = &self.residual {
            result = result + part(residual, row, column).load().cast(Element::F32);
        }
        part(&self.out, row, column).store(result.cast(problem.output));
    }
}

/// (start, size) of the parts of at most `step` that make up `size`.
fn ranges(size: usize, step: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..size).step_by(step).map(move |start| (start, step.min(size - start)))
}

fn part<'a>(of: &Ref<'a>, row: (usize, usize), column: (usize, usize)) -> Ref<'a> {
    of.slice(0, row.0, row.1).slice(1, column.0, column.1)
}
