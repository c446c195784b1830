//! What a matmul should cost: its steps, the work of each by kind, and the copies beside it.
//!
//! The model is of the compiler's static estimate, to whose records its weights are fitted ([`crate::cost`]), and of HBM,
//! which that leaves out: what counts is what the steps take, or what the bytes take, whichever is more, and never less than
//! the products.
//!
//! A step asks for the next step's blocks, waits for its own, and works. Where a copy takes longer than the work, two are
//! under way at a time, each at full speed: two steps then take a copy and the work of one.

use pagoda_ir::{
    Element,
    mosaic::tiling::{LANES, SUBLANES},
};

use super::{
    plan::{Blocks, Chunk, Order, Shape, Tiles, arithmetic, chunk, gated, shape, splits},
    problem::{Layout, Problem},
};
use crate::{
    chips::Chip,
    cost::{self, Copies, Family, Stage, UNITS, Work, copy_cycles},
};

/// The kinds of a step's work, as [`Blocks::work`] counts them: cycles of matrix units, and registers of 1024 words.
const KINDS: &[&str] = &[
    "launch",
    "steps",
    "rows through the matrix units",
    "weights loaded into the matrix units",
    "matrix unit",
    "registers of rows loaded",
    "registers of the right side loaded",
    "registers turned",
    "registers converted",
    "registers of sums",
    "registers of results",
    "registers gated",
    "registers scaled",
    "registers masked",
    "matrix unit or vectors",
];

/// What is multiplied decides how a step's work overlaps: bf16; f32, each operand of which is split; a weight of 8 bits made
/// bf16; 8 bits on both sides.
const BF16: Family = Family { name: "matmul bf16", units: KINDS };
const F32: Family = Family { name: "matmul f32", units: KINDS };
const NARROW_WEIGHT: Family = Family { name: "matmul 8-bit weight", units: KINDS };
const NARROW: Family = Family { name: "matmul 8-bit", units: KINDS };

/// What a problem's launches are alike in.
pub(super) fn family(problem: &Problem) -> &'static Family {
    match problem.quantized {
        Some(quantized) if quantized.activations => &NARROW,
        Some(_) => &NARROW_WEIGHT,
        None if splits(problem) => &F32,
        None => &BF16,
    }
}

/// What a plan should cost, by a model of one core that overlaps copies and products.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Estimate {
    /// Cycles of the whole kernel: what its steps take, its bytes or its products, whichever is more.
    pub cycles: f64,
    /// Cycles that its steps take, as the compiler's static estimate has them.
    pub static_cycles: f64,
    /// Cycles that the products take at least, on all cores together.
    pub mxu_cycles: f64,
    /// Bytes moved between HBM and VMEM, all cores together.
    pub bytes_moved: u64,
}

/// Cycles to load the next weight tile, as a part of its side (measured on 8 rows: 86 of 128).
const WEIGHT_LOAD: f64 = 0.67;
/// bf16 passes of a true f32 product.
const F32_PASSES: f64 = 6.0;
/// Vector operations that a bundle has slots for, on a register.
const VECTOR_SLOTS: f64 = 4.0;
/// Vector operations that make a stored register of 8 bits four of f32 and two of bf16.
const CONVERT: f64 = 6.0;
/// Words of a register.
const REGISTER: f64 = (LANES * SUBLANES) as f64;

/// bf16 products that one of a problem takes.
fn passes(problem: &Problem, chip: Chip) -> f64 {
    match arithmetic(problem, chip).operand {
        Element::F32 => F32_PASSES,
        narrow if narrow.bytes() == 1 => 0.5,
        _ => 1.0,
    }
}

/// Steps that take these cycles, whatever they do.
fn fixed(cycles: f64) -> Stage {
    Stage { times: 1.0, work: [0.0; UNITS], copies: Copies { cycles, beside: 0.0, among: 1.0 } }
}

impl Blocks<'_> {
    /// Bytes that a launch moves, all cores together, in an order.
    fn bytes_moved(&self, order: Order) -> f64 {
        let [rows, columns, _] = self.block.map(|size| size as f64);
        let [row_blocks, column_blocks, steps] = self.counts.map(|count| count as f64);
        let [lhs, rhs] = self.bytes_of_sides();
        let products = self.products();
        let (lhs, rhs) = match self.problem.layout {
            Layout::FeatureMajor => (lhs * products, rhs),
            Layout::RowMajor | Layout::WeightTransposed => (lhs, rhs * products),
        };
        let out = rows * columns * self.problem.output.bytes() as f64;
        let residual = f64::from(u8::from(self.problem.epilogue.residual));
        // A side whose block stays the same from one step to the next is not fetched again.
        let blocks = row_blocks * column_blocks;
        let (outer_blocks, inner_blocks) = match order {
            Order::RowsOuter => (row_blocks, column_blocks),
            Order::ColumnsOuter => (column_blocks, row_blocks),
        };
        let inner_fetches = if steps > 1.0 || inner_blocks > 1.0 { blocks * steps } else { 1.0 };
        let outer_fetches = if steps > 1.0 { blocks * steps } else { outer_blocks };
        let (lhs_fetches, rhs_fetches) = match order {
            Order::RowsOuter => (outer_fetches, inner_fetches),
            Order::ColumnsOuter => (inner_fetches, outer_fetches),
        };
        // Of blocks at an edge only what is there.
        let Shape { rows: all_rows, columns: all_columns, depth: all_depth } = shape(self.problem);
        let real = |all: usize, dim: usize| all as f64 / (self.block[dim] * self.counts[dim]) as f64;
        let (real_rows, real_columns, real_depth) = (real(all_rows, 0), real(all_columns, 1), real(all_depth, 2));
        lhs_fetches * lhs * real_rows * real_depth
            + rhs_fetches * rhs * real_columns * real_depth
            + blocks * out * (1.0 + residual) * real_rows * real_columns
    }

    /// Bytes of a block of one window of each side.
    fn bytes_of_sides(&self) -> [f64; 2] {
        let [rows, columns, depth] = self.block.map(|size| size as f64);
        let (x, w) = (self.problem.x_element().bytes() as f64, self.problem.weight_element().bytes() as f64);
        let (lhs, rhs) = if self.problem.layout == Layout::FeatureMajor { (w, x) } else { (x, w) };
        [rows * depth * lhs, columns * depth * rhs]
    }

    /// Steps of the busiest core: a parallel dimension is split over the cores.
    fn turns(&self, chip: Chip) -> f64 {
        let [rows, columns, steps] = self.counts;
        (rows * columns).div_ceil(chip.info().cores) as f64 * steps as f64
    }

    /// The steps of the busiest core.
    pub(super) fn stages(&self, chip: Chip, order: Order) -> Vec<Stage> {
        let [row_blocks, column_blocks, steps] = self.counts;
        let work = self.work(chip);
        let [lhs, rhs] = self.bytes_of_sides().map(|bytes| copy_cycles(chip, bytes));
        let (inner, outer, inner_blocks) = match order {
            Order::RowsOuter => (rhs, lhs, column_blocks),
            Order::ColumnsOuter => (lhs, rhs, row_blocks),
        };
        let both = lhs.max(rhs);
        let turns = self.turns(chip);
        let ahead = |times: f64, cycles: f64| Stage { times, work, copies: Copies { cycles, beside: 1.0, among: 2.0 } };
        let mut stages = match (steps > 1, inner_blocks > 1) {
            (true, _) => vec![ahead(turns, both)],
            (false, true) => {
                let first = turns / inner_blocks as f64;
                vec![ahead(first, both), ahead(turns - first, inner)]
            }
            (false, false) => vec![ahead(turns, outer)],
        };
        stages.push(fixed(both));
        if turns > 1.0 {
            // Of the first copy and a step's work, the shorter one: both less the longer one.
            let longer = Copies { cycles: both, beside: 1.0, among: 1.0 };
            stages.extend([Stage::of(1.0, work), Stage { times: -1.0, work, copies: longer }]);
        }
        let out = self.block[0] * self.block[1] * self.problem.output.bytes();
        stages.push(fixed(copy_cycles(chip, out as f64)));
        let mut launch = [0.0; UNITS];
        launch[0] = 1.0;
        stages.push(Stage::of(1.0, launch));
        stages
    }

    /// The work of a step.
    fn work(&self, chip: Chip) -> Work {
        let info = chip.info();
        let [rows, columns, depth] = self.block;
        let of_chunk: Chunk = chunk(&info, self);
        let products = self.products();
        let steps = self.counts[2] as f64;
        let registers = |one: usize, other: usize| {
            (one.next_multiple_of(SUBLANES) * other.next_multiple_of(LANES)) as f64 / REGISTER
        };
        let row_chunks = rows.div_ceil(of_chunk.rows) as f64;
        let column_chunks = columns.div_ceil(of_chunk.columns) as f64;
        let [of_rows, of_columns] = [registers(rows, depth), registers(columns, depth)];
        let [matrix_rows, matrix_loads, matrix] = self.matrix(chip);
        let turned =
            if self.problem.layout == Layout::WeightTransposed { of_columns * row_chunks * products } else { 0.0 };
        let is_narrow = self.problem.quantized.is_some_and(|quantized| !quantized.activations);
        let converted = match (is_narrow, self.problem.layout) {
            (false, _) => 0.0,
            (true, Layout::FeatureMajor) => of_rows * column_chunks * products,
            (true, _) => of_columns * row_chunks * products,
        };
        let split =
            if splits(self.problem) { of_rows * column_chunks + of_columns * row_chunks * products } else { 0.0 };
        let results = registers(rows, columns) * products;
        let groups = self.problem.group().map_or(0, |group| depth.div_ceil(group)) as f64;
        let is_edge = !self.problem.k.is_multiple_of(depth);
        let masked = if is_edge { of_rows * column_chunks + of_columns * row_chunks * products } else { 0.0 };
        let vectors = (converted * CONVERT / 4.0 + split * 4.0) / VECTOR_SLOTS;
        let counts = [
            0.0,
            1.0,
            matrix_rows,
            matrix_loads,
            matrix,
            of_rows * column_chunks,
            of_columns * row_chunks * products,
            turned,
            converted + split,
            if steps > 1.0 { results } else { 0.0 },
            results / steps,
            if gated(self.problem) { results / steps } else { 0.0 },
            results * groups,
            masked / steps,
            matrix.max(vectors),
        ];
        let mut work = [0.0; UNITS];
        work[..counts.len()].copy_from_slice(&counts);
        work
    }

    /// Weight tiles of one product of a step, times passes, over the units that share them: what one streamed row takes.
    fn cycles_per_row(&self, chip: Chip) -> f64 {
        let info = chip.info();
        let [_, columns, depth] = self.block;
        let side = info.mxu;
        // Lanes of x that belong to other groups are multiplied as zeros.
        let parts = self.problem.group().map_or(1, |group| (LANES / group).max(1));
        let weight_tiles = (columns.div_ceil(side) * depth.div_ceil(side) * parts) as f64;
        let units = info.peak_flop_per_cycle_and_core as f64 / (2 * side * side) as f64;
        passes(self.problem, chip) * weight_tiles / units
    }

    /// Cycles that the matrix units of all cores take for the products alone.
    fn mxu_floor(&self, chip: Chip) -> f64 {
        let Shape { rows, columns, depth } = shape(self.problem);
        let products = if gated(self.problem) { 2.0 } else { 1.0 };
        let flops = 2.0 * products * (rows * columns) as f64 * depth as f64;
        passes(self.problem, chip) * flops / chip.info().peak_flop_per_cycle()
    }

    /// Cycles of the matrix units for the products of a step: rows that stream through the weight tiles that they hold; loads
    /// of the next ones; and of each chunk of rows the longer of both.
    fn matrix(&self, chip: Chip) -> [f64; 3] {
        let info = chip.info();
        let rows = self.block[0];
        let load = WEIGHT_LOAD * info.mxu as f64;
        let of_chunk = chunk(&info, self).rows;
        let (whole, rest) = (rows / of_chunk, rows % of_chunk);
        let of = |rows: usize| [rows as f64, load, (rows as f64).max(load)];
        let chunks = [(whole as f64, of_chunk), (1.0, rest.next_multiple_of(SUBLANES))];
        let sum = chunks.iter().filter(|(_, rows)| *rows > 0).fold([0.0; 3], |sum, &(times, rows)| {
            let of = of(rows);
            std::array::from_fn(|at| sum[at] + times * of[at])
        });
        let products = if self.joins(&info) { 1.0 } else { self.products() };
        let per_row = products * self.cycles_per_row(chip);
        sum.map(|streamed| per_row * streamed)
    }

    /// What the kernel costs in an order.
    pub(super) fn estimate(&self, chip: Chip, order: Order) -> Estimate {
        let bytes = self.bytes_moved(order);
        let weights = cost::weights(family(self.problem), chip).expect("a table that a test holds complete");
        let static_cycles = weights.cycles(&self.stages(chip, order));
        let (bytes_take, mxu_cycles) = (bytes / chip.info().hbm_bytes_per_cycle(), self.mxu_floor(chip));
        Estimate {
            cycles: static_cycles.max(bytes_take).max(mxu_cycles),
            static_cycles,
            mxu_cycles,
            bytes_moved: bytes as u64,
        }
    }

    /// The order in which less is fetched again, unless the matrix units hide both.
    pub(super) fn order(&self, chip: Chip) -> Order {
        let info = chip.info();
        let [rows, columns, depth] = self.block.map(|size| size as f64);
        let [row_blocks, column_blocks, steps] = self.counts.map(|count| count as f64);
        let weight = self.products() * self.problem.weight_element().bytes() as f64;
        let x = self.problem.x_element().bytes() as f64;
        let [lhs, rhs] = if self.problem.layout == Layout::FeatureMajor { [weight, x] } else { [x, weight] };
        let residual = f64::from(u8::from(self.problem.epilogue.residual));
        let out = rows * columns * self.problem.output.bytes() as f64 * (1.0 + residual);
        let turns = row_blocks * column_blocks * steps;
        let step = |order| {
            let (lhs_fetches, rhs_fetches) = match (steps > 1.0, order) {
                (true, _) => (turns, turns),
                (false, Order::RowsOuter) => (row_blocks, turns),
                (false, Order::ColumnsOuter) => (turns, column_blocks),
            };
            let bytes = lhs_fetches * lhs * rows * depth + rhs_fetches * rhs * depth * columns;
            let bytes = (bytes + row_blocks * column_blocks * out) / turns;
            let copies = 700.0 + bytes * info.cores as f64 / info.hbm_bytes_per_cycle();
            let work = self.products()
                * (self.mxu_cycles_per_step(chip) + if steps > 1.0 { rows * columns / 1024.0 } else { 0.0 });
            (work + 250.0).max(copies)
        };
        if step(Order::ColumnsOuter) < step(Order::RowsOuter) { Order::ColumnsOuter } else { Order::RowsOuter }
    }

    /// Cycles of the matrix units for one step: for each weight tile they hold, the rows that stream through it, but no
    /// less than it takes to load the next one.
    fn mxu_cycles_per_step(&self, chip: Chip) -> f64 {
        let rows = self.block[0].next_multiple_of(SUBLANES) as f64;
        self.cycles_per_row(chip) * rows.max(WEIGHT_LOAD * chip.info().mxu as f64)
    }

    /// What the kernel costs.
    pub(super) fn cost(&self, chip: Chip) -> Estimate {
        self.estimate(chip, self.order(chip))
    }
}

/// The steps of the busiest core in a launch of a plan.
pub(super) fn stages(problem: &Problem, tiles: Tiles, chip: Chip, order: Order) -> Vec<Stage> {
    Blocks::new(problem, tiles).stages(chip, order)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chips without points take the weights of one with the same matrix units; some chip has them.
    #[test]
    fn every_family_has_weights_on_every_chip() {
        for family in [&BF16, &F32, &NARROW_WEIGHT, &NARROW] {
            assert!(Chip::ALL.iter().all(|&chip| cost::weights(family, chip).is_some()), "{}", family.name);
        }
        assert!(KINDS.len() <= UNITS);
    }
}
