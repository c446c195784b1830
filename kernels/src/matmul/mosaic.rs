//! Matrix multiplication as a Mosaic kernel.
//!
//! A grid kernel: the pipeline brings one tile of each side into VMEM per step, the body adds their product to the f32
//! accumulator, and the last step along `k` applies the epilogue and stores. The body works through its tile in
//! [`Chunk`](super::plan::Chunk)s, each of which reads its part of the accumulator, multiplies over the whole depth of the
//! tile and writes it back, so that no more than a chunk is live in registers: whole tiles in registers spill (1.4 MB at 512 x
//! 512) and take the compiler a minute.
//!
//! Quantized elements come into VMEM as they are stored and are converted there, without loss: the matrix unit multiplies
//! what the chip has units for, else bf16. Their scales are applied to f32 sums, of all of `k` or of each group, so that no
//! scaled weight is ever rounded.
//!
//! Ragged edges: rows and columns beyond the array are garbage that the pipeline never writes back, but garbage along `k`
//! would be summed, so the last step along `k` selects zeros there, on both sides (NaN times zero is NaN).

use std::ops::Range;

use pagoda_ir::{
    Element,
    mosaic::{
        Builder, DotDims, IntoOperand, MemorySpace, Precision, Ref, Semantics, Value, Window,
        tiling::{LANES, SUBLANES},
    },
};

use super::{
    plan::{Arithmetic, ArrayWindow, Axis, Cut, Order, Part, Plan, Side, is_cut, names, sum_dims, windows},
    problem::{Activation, Layout, Problem},
};
use crate::kernel::Operand;

/// Writes the kernel that `plan` describes.
pub(super) fn write<'a>(k: &'a Builder<'a>, plan: &Plan) {
    Body::declare(k, plan).write();
}

/// With several layers the index of one; then the side whose rows are the output's rows, the other side (gates, then ups
/// of a gated product: the weight is named twice), scales of the weight and of `x`, the bias as a row or a column, the
/// residual.
pub(super) fn operands(problem: &Problem) -> Vec<Operand> {
    let gated = problem.epilogue.activation.is_gated();
    let several = |operand: Operand| std::iter::repeat_n(operand, windows_of_weight(problem));
    // One value per feature: twice, or where no block can start at the first up cut in two.
    let per_feature = |operand: Operand, dim: usize| match (gated, is_cut(problem)) {
        (false, _) => vec![operand],
        (true, false) => vec![operand.clone(), operand],
        (true, true) => [0, problem.n].map(|start| operand.clone().slice(dim, start, problem.n)).to_vec(),
    };
    let (x, w) = (Operand::of("x"), several(Operand::of("w")));
    let stack = (problem.layers > 1).then_some(problem.layers);
    let mut operands: Vec<_> = stack.iter().map(|_| Operand::of("layer").reshape(&[1])).collect();
    match problem.layout {
        Layout::FeatureMajor => operands.extend(w.chain([x])),
        Layout::RowMajor | Layout::WeightTransposed => operands.extend([x].into_iter().chain(w)),
    }
    if problem.quantized.is_some() {
        let features = if problem.layout == Layout::FeatureMajor { 0 } else { 1 } + stack.iter().len();
        operands.extend(match problem.group() {
            None => per_feature(Operand::of("w_scale"), features),
            Some(_) => several(Operand::of("w_scale")).collect(),
        });
    }
    if problem.quantized_x() {
        operands.push(Operand::of("x_scale"));
    }
    if problem.epilogue.bias {
        let columns = if is_cut(problem) { problem.n } else { problem.weight_columns() };
        let dims = if problem.layout == Layout::FeatureMajor { [columns, 1] } else { [1, columns] };
        let dims: Vec<_> = stack.into_iter().chain(dims).collect();
        // As f32: broadcasting a packed row takes scratch on v4, and the bias is small.
        let bias = Operand::of("bias").cast(Element::F32).reshape(&dims);
        operands.extend(per_feature(bias, stack.iter().len()));
    }
    operands.extend(problem.epilogue.residual.then(|| Operand::of("residual")));
    operands
}

/// How many windows walk over the weight.
fn windows_of_weight(problem: &Problem) -> usize {
    match problem.epilogue.activation {
        Activation::Identity => 1,
        Activation::SiluGate | Activation::GeluGate if is_cut(problem) => 3,
        Activation::SiluGate | Activation::GeluGate => 2,
    }
}

/// The kernel's operands.
struct Body<'a, 'p> {
    k: &'a Builder<'a>,
    plan: &'p Plan,
    /// The index of the step along `k`.
    step: Value<'a>,
    lhs: Vec<Ref<'a>>,
    rhs: Vec<Ref<'a>>,
    /// Of the weight: `[groups, columns]`, feature-major `[rows, groups]`.
    scale: Vec<Ref<'a>>,
    /// Of `x`: `[rows, 1]`, feature-major `[1, columns]`.
    row_scale: Option<Ref<'a>>,
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
        let (mut scale, mut row_scale) = (vec![], None);
        for window in windows(plan.problem()) {
            let ArrayWindow { name, side, element, axes, part, stacked } = window;
            let [dims, block] = [0, 1].map(|at| axes.map(|axis| <[usize; 2]>::from(plan.of_window(&window, axis))[at]));
            let feature_axis = if plan.problem().layout == Layout::FeatureMajor { Axis::Rows } else { Axis::Columns };
            // A block of a stack is of one layer, whose index comes first.
            let of_stack = |layer, dims: [_; 2]| stacked.then_some(layer).into_iter().chain(dims).collect::<Vec<_>>();
            let features = axes.iter().position(|&axis| axis == feature_axis);
            let last = features.map_or(0, |at| dims[at].div_ceil(block[at]) - 1);
            let (dims, block) = (of_stack(layers, dims), of_stack(1, block));
            let blocks = Window::blocks(&block, move |t| {
                let feature = |dim, axis| match (part, plan.cut()) {
                    // The second half of a gated weight starts as many blocks further as the first one has.
                    (Part::Half(1), _) if axis == feature_axis => (t.grid(dim) + plan.along(axis).2).literal(),
                    // What would lie beyond the last block is not looked at.
                    (Part::Ups, Some(cut)) if axis == feature_axis => (t.grid(dim) + cut.first).minimum(last).literal(),
                    (Part::UpsBehind, Some(cut)) if axis == feature_axis => {
                        (t.grid(dim) * cut.extra_step + cut.first_extra).minimum(last).literal()
                    }
                    _ => t.grid(dim).literal(),
                };
                let within = axes.map(|axis| match axis {
                    Axis::Rows => feature(row, axis),
                    Axis::Columns => feature(column, axis),
                    Axis::Depth => t.grid(2).literal(),
                    Axis::Groups | Axis::One => 0.literal(),
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
                Side::Scale => scale.push(block),
                Side::RowScale => row_scale = Some(block),
                Side::Bias => bias.push(block),
                Side::Residual => residual.push(block),
                Side::Out => out.push(block),
            }
        }
        let sums = match (plan.cut(), plan.steps()) {
            (Some(cut), _) => {
                let axis = if plan.problem().layout == Layout::FeatureMajor { 0 } else { 1 };
                let sums = [("sum_gate", cut.block), ("sum_up", cut.ups())].map(|(name, features)| {
                    let dims = sum_dims(plan.blocks(), axis, features);
                    k.scratch(name, MemorySpace::Vmem, plan.accumulator(), &dims)
                });
                sums.to_vec()
            }
            (None, 1) => vec![],
            _ => names(plan.problem(), "sum", "sum_gate", "sum_up")
                .into_iter()
                .map(|name| k.scratch(name, MemorySpace::Vmem, plan.accumulator(), &[rows, columns]))
                .collect(),
        };
        Self { k, plan, step, lhs, rhs, scale, row_scale, bias, residual: residual.pop(), out: out.remove(0), sums }
    }

    fn write(&self) {
        let (k, steps) = (self.k, self.plan.steps());
        let edge = Some(self.plan.edge()).filter(|&edge| edge > 0);
        if let Some(cut) = self.plan.cut() {
            return self.write_cut(cut, edge);
        }
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

    /// Of a weight that is [`Cut`]: products of its three blocks are added to scratch, where ups lie side by side; in the
    /// last step along `k` they are shifted to their gates.
    fn write_cut(&self, cut: Cut, edge: Option<usize>) {
        let (k, steps) = (self.k, self.plan.steps());
        k.when(self.step.equals(0), || self.sums.iter().for_each(|sum| sum.store(0.0)));
        let add = |edge| {
            for (window, sum, at) in [(0, 0, 0), (1, 1, 0), (2, 1, cut.block)] {
                self.add_window(window, &self.sums[sum], at, edge);
            }
        };
        let finish = || {
            for [row, column] in self.chunks() {
                let gate = part(&self.sums[0], row, column).load();
                self.store(row, column, vec![gate, self.shifted(cut, row, column)]);
            }
        };
        if steps == 1 {
            add(edge);
            return finish();
        }
        let last = self.step.equals(steps - 1);
        k.if_else(
            last,
            || {
                add(edge);
                finish();
            },
            || add(None),
        );
    }

    /// Adds the product of one of the weight's windows to `sum`, from feature `at` on.
    fn add_window(&self, window: usize, sum: &Ref<'a>, at: usize, edge: Option<usize>) {
        let (mut size, chunk) = (self.plan.blocks(), self.plan.chunk());
        let feature_major = self.plan.problem().layout == Layout::FeatureMajor;
        let side = if feature_major { &self.lhs[window] } else { &self.rhs[window] };
        let features = if self.plan.problem().layout == Layout::RowMajor { 1 } else { 0 };
        size[if feature_major { 0 } else { 1 }] = side.dims()[features];
        for column in ranges(size[1], chunk.columns) {
            for row in ranges(size[0], chunk.rows) {
                let into = match feature_major {
                    true => part(sum, (row.0 + at, row.1), column),
                    false => part(sum, row, (column.0 + at, column.1)),
                };
                into.store(self.products(window..window + 1, row, column, |_| into.load(), edge)[0]);
            }
        }
    }

    /// The ups of a chunk, from where they lie.
    fn shifted(&self, cut: Cut, row: (usize, usize), column: (usize, usize)) -> Value<'a> {
        let axis = if self.plan.problem().layout == Layout::FeatureMajor { 0 } else { 1 };
        // Whole registers, and one more of what follows.
        let unit = if axis == 0 { SUBLANES } else { LANES };
        let mut from = [row.0, column.0];
        let mut size = [row.1.next_multiple_of(SUBLANES), column.1];
        from[axis] += cut.shift / unit * unit;
        size[axis] = size[axis].next_multiple_of(unit) + unit;
        let wide = part(&self.sums[1], (from[0], size[0]), (from[1], size[1])).load();
        let turned = match cut.shift % unit {
            0 => wide,
            shift => wide.rotate(size[axis] - shift, axis),
        };
        turned.slice(&[0, 0], &[row.1, column.1])
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
            let start = |half: usize| match start {
                Sum::Zero => self.k.zeros(self.plan.accumulator(), &[row.1, column.1]),
                Sum::Loaded => part(&self.sums[half], row, column).load(),
            };
            let sums = self.products(0..products, row, column, start, edge);
            if finish {
                self.store(row, column, sums);
            } else {
                for (sum, value) in self.sums.iter().zip(sums) {
                    part(sum, row, column).store(value);
                }
            }
        }
    }

    /// For each of some windows of the weight, what `start` gives plus the product of one chunk. Piece by piece of the depth,
    /// all windows: what is loaded of `x` for one is held for the others, and would spill if it were all of the depth.
    fn products(
        &self,
        windows: Range<usize>,
        row: (usize, usize),
        column: (usize, usize),
        start: impl Fn(usize) -> Value<'a>,
        edge: Option<usize>,
    ) -> Vec<Value<'a>> {
        let arithmetic = self.plan.arithmetic();
        if self.plan.joins() {
            return self.joined(row, column, start, edge);
        }
        let sides: Vec<_> = windows.clone().map(|window| Sides::new(self, &[window], row, column)).collect();
        let [_, _, depth] = self.plan.blocks();
        let real = edge.unwrap_or(depth);
        let pieces = |(first, size): (usize, usize)| {
            let pieces = ranges(size, self.plan.chunk().depth).map(move |(from, size)| (first + from, size));
            pieces.filter(move |&(from, _)| from < real)
        };
        let mut sums = vec![None; sides.len()];
        let sum_of = |index: usize, sum: Option<Value<'a>>| sum.unwrap_or_else(|| start(windows.start + index));
        let Some(group) = self.plan.problem().group() else {
            for piece in pieces((0, depth)) {
                for (index, (sides, sum)) in sides.iter().zip(&mut sums).enumerate() {
                    *sum = Some(sides.multiply(piece, 0..real, real, sum_of(index, *sum)));
                }
            }
            return sums.into_iter().flatten().collect();
        };
        // Lanes are multiplied 128 at a time: of smaller groups, one after another with zeros in place of the others.
        for (first, size) in ranges(depth, group.max(LANES)).filter(|&(first, _)| first < real) {
            for (from, width) in ranges(size, group).filter(|&(from, _)| first + from < real) {
                let kept = first + from..real.min(first + from + width);
                for (index, (sides, sum)) in sides.iter().zip(&mut sums).enumerate() {
                    let before = sum_of(index, *sum);
                    let zeros = self.k.zeros(arithmetic.sum, &[row.1, column.1]);
                    let products = pieces((first, size))
                        .fold(zeros, |sum, piece| sides.multiply(piece, kept.clone(), real, sum))
                        .cast(Element::F32);
                    let window = windows.start + index;
                    *sum = Some(before + products * self.group_scale(window, row, column, first + from, group));
                }
            }
        }
        sums.into_iter().flatten().collect()
    }

    /// As [`products`](Self::products), of gates and ups as columns of one product.
    fn joined(
        &self,
        row: (usize, usize),
        column: (usize, usize),
        start: impl Fn(usize) -> Value<'a>,
        edge: Option<usize>,
    ) -> Vec<Value<'a>> {
        let [_, _, depth] = self.plan.blocks();
        let real = edge.unwrap_or(depth);
        let sides = Sides::new(self, &[0, 1], row, column);
        let pieces = ranges(depth, self.plan.chunk().depth).filter(|&(from, _)| from < real);
        let both = pieces
            .fold(self.k.concatenate(&[start(0), start(1)], 1), |sum, piece| sides.multiply(piece, 0..real, real, sum));
        [0, column.1].map(|from| both.slice(&[0, from], &[row.1, column.1])).to_vec()
    }

    /// The scales of a chunk's columns (feature-major: rows) in the group that the step's feature `at` belongs to.
    fn group_scale(
        &self,
        half: usize,
        row: (usize, usize),
        column: (usize, usize),
        at: usize,
        group: usize,
    ) -> Value<'a> {
        let [_, _, depth] = self.plan.blocks();
        let index = match self.plan.steps() {
            1 => (at / group).literal(),
            _ if depth.is_multiple_of(group) => (self.step * (depth / group) + at / group).literal(),
            _ => (self.step / (group / depth)).literal(),
        };
        let scale = &self.scale[half];
        match self.plan.problem().layout {
            Layout::FeatureMajor => {
                // A lane that is known at run time only: the others are taken away.
                let scales = scale.slice(0, row.0, row.1).load();
                self.k.iota(&scales.dims(), 1).equals(index).select(scales, 0.0).sum(1)
            }
            _ if self.plan.steps() == 1 => scale.slice(0, index, 1).slice(1, column.0, column.1).load(),
            // Of a row that is known at run time only, libtpu (0.0.52) loads all columns or none.
            _ => scale.slice(0, index, 1).load().slice(&[0, column.0], &[1, column.1]),
        }
    }

    /// The epilogue, and the store of the result.
    fn store(&self, row: (usize, usize), column: (usize, usize), mut sums: Vec<Value<'a>>) {
        let problem = self.plan.problem();
        // One value for each of the weight's features, or for each row of x.
        let of_features = |of: &Ref<'a>| match problem.layout {
            Layout::FeatureMajor => of.slice(0, row.0, row.1).load(),
            _ => of.slice(1, column.0, column.1).load(),
        };
        let of_rows = |of: &Ref<'a>| match problem.layout {
            Layout::FeatureMajor => of.slice(1, column.0, column.1).load(),
            _ => of.slice(0, row.0, row.1).load(),
        };
        sums.iter_mut().for_each(|sum| *sum = sum.cast(Element::F32));
        if problem.group().is_none() {
            sums.iter_mut().zip(&self.scale).for_each(|(sum, scale)| *sum = *sum * of_features(scale));
        }
        if let Some(scale) = &self.row_scale {
            sums.iter_mut().for_each(|sum| *sum = *sum * of_rows(scale));
        }
        sums.iter_mut().zip(&self.bias).for_each(|(sum, bias)| *sum = *sum + of_features(bias));
        let mut result = match sums[..] {
            [gate, up] => gate * sigmoid_argument(problem.epilogue.activation, gate).logistic() * up,
            _ => sums[0],
        };
        if let Some(residual) = &self.residual {
            result = result + part(residual, row, column).load().cast(Element::F32);
        }
        part(&self.out, row, column).store(result.cast(problem.output));
    }
}

/// What a gate's factor is the sigmoid of.
fn sigmoid_argument(activation: Activation, gate: Value<'_>) -> Value<'_> {
    match activation {
        Activation::Identity | Activation::SiluGate => gate,
        Activation::GeluGate => gate * (gate * gate * Activation::GELU_CUBE + 1.0) * (2.0 * Activation::GELU_SCALE),
    }
}

/// The two sides of a chunk's product.
struct Sides<'b, 'a, 'p> {
    body: &'b Body<'a, 'p>,
    lhs: Ref<'a>,
    /// One, or gates and ups, whose columns are those of one product.
    rhs: Vec<Ref<'a>>,
    /// The dimension of the right side that is summed over.
    rhs_depth: usize,
}

impl<'b, 'a, 'p> Sides<'b, 'a, 'p> {
    fn new(body: &'b Body<'a, 'p>, halves: &[usize], row: (usize, usize), column: (usize, usize)) -> Self {
        let lhs = body.lhs[halves[0].min(body.lhs.len() - 1)].slice(0, row.0, row.1);
        let rhs_depth = if body.plan.problem().layout == Layout::WeightTransposed { 1 } else { 0 };
        let of = |&half: &usize| body.rhs[half.min(body.rhs.len() - 1)].slice(1 - rhs_depth, column.0, column.1);
        Self { body, lhs, rhs: halves.iter().map(of).collect(), rhs_depth }
    }

    /// `sum` plus the product over `size` features from `from` on, those of `x` outside `kept` taken as zeros. Only what is
    /// below `real` is there: beyond it is anything.
    fn multiply(&self, (from, size): (usize, usize), kept: Range<usize>, real: usize, sum: Value<'a>) -> Value<'a> {
        let (k, problem) = (self.body.k, self.body.plan.problem());
        let Arithmetic { operand, .. } = self.body.plan.arithmetic();
        let lhs = self.lhs.slice(1, from, size).load();
        let rhs: Vec<_> = self.rhs.iter().map(|rhs| rhs.slice(self.rhs_depth, from, size).load()).collect();
        let of_x = kept.start.saturating_sub(from)..(kept.end - from).min(size);
        // Zeros of x do where the weight is finite, as integers always are.
        let of_w = if problem.weight_element().is_float() { 0..(real - from).min(size) } else { 0..size };
        let (of_lhs, of_rhs) = if problem.layout == Layout::FeatureMajor { (of_w, of_x) } else { (of_x, of_w) };
        let lhs = self.masked(lhs, 1, of_lhs);
        let rhs: Vec<_> = rhs.into_iter().map(|rhs| self.masked(rhs, self.rhs_depth, of_rhs.clone())).collect();
        let lhs = widened(lhs, operand);
        let rhs: Vec<_> = rhs.into_iter().map(|rhs| widened(rhs, operand)).collect();
        let rhs = if let [rhs] = rhs[..] { rhs } else { k.concatenate(&rhs, 1 - self.rhs_depth) };
        let dims = if self.rhs_depth == 1 { DotDims::nt() } else { DotDims::nn() };
        let precision = if operand == Element::F32 { Precision::Fp32 } else { Precision::Default };
        k.dot_general(lhs, rhs, sum, &dims, precision)
    }

    /// Zeros outside `kept` along `dim`.
    fn masked(&self, tile: Value<'a>, dim: usize, kept: Range<usize>) -> Value<'a> {
        let (element, size) = (tile.element(), tile.dims()[dim]);
        if kept == (0..size) {
            return tile;
        }
        // Narrow elements have no selects of their own on older chips.
        let (wide, zero) = if element.is_float() { (Element::F32, 0.0.literal()) } else { (Element::I32, 0.literal()) };
        let wide = tile.cast(wide);
        let index = self.body.k.iota(&tile.dims(), dim);
        let inside = match kept.start {
            0 => index.less(kept.end),
            start if kept.end == size => index.greater_equal(start),
            start => index.greater_equal(start) & index.less(kept.end),
        };
        inside.select(wide, zero).cast(element)
    }
}

/// `tile` as `element`, exactly; through types that every chip converts.
fn widened<'a>(tile: Value<'a>, element: Element) -> Value<'a> {
    match (tile.element().is_float(), element.is_float()) {
        (false, true) => tile.cast(Element::I32).cast(Element::F32).cast(element),
        _ => tile.cast(element),
    }
}

/// (start, size) of the parts of at most `step` that make up `size`.
fn ranges(size: usize, step: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..size).step_by(step).map(move |start| (start, step.min(size - start)))
}

fn part<'a>(of: &Ref<'a>, row: (usize, usize), column: (usize, usize)) -> Ref<'a> {
    of.slice(0, row.0, row.1).slice(1, column.0, column.1)
}
