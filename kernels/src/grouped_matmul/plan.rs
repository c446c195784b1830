//! Planning a grouped matmul for a TPU: tiles, VMEM, and what it should cost over the groups that are expected.
//!
//! A launch is modelled chunk by chunk, as the kernel lists them: every chunk reads its expert's weights, tile after tile, and
//! multiplies as many blocks of rows as it has. Where nobody says how large the groups are, rows are dealt out at random.

use std::fmt;

use pagoda_ir::{
    Element,
    mosaic::tiling::{LANES, SUBLANES},
    random::SplitMix64,
};
use serde::{Deserialize, Serialize};

use super::{
    GroupedMatmul,
    problem::{BAND, Layout, Problem},
};
use crate::{
    chips::Chip,
    cost::copy_cycles,
    evidence,
    kernel::TileSizes,
    plan::{self, PlanError, Spilling},
    random::Lengths,
    vmem::{Buffer, BufferKind, Bytes, VmemReport},
};

/// Tile sizes along `m`, `n` and `k`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Tiles {
    /// Rows of a chunk at most.
    pub m: usize,
    /// Output features.
    pub n: usize,
    /// Summed features.
    pub k: usize,
}

impl TileSizes for Tiles {
    const FORM: &'static str = "M,N,K";

    fn parse(text: &str) -> Result<Self, PlanError> {
        let [m, n, k] = plan::positive_numbers(text, "three positive numbers M,N,K", "128,512,2048")?;
        Ok(Self { m, n, k })
    }
}

impl fmt::Display for Tiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.m, self.n, self.k)
    }
}

/// The part of a tile that the body works on at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Block {
    /// Rows of it: what a chunk's rows are rounded up to.
    pub rows: usize,
    /// Columns of it.
    pub columns: usize,
    /// How much of the depth is multiplied at a time.
    pub depth: usize,
}

/// How a launch is cut into steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Tiles of columns of all cores.
    pub all_columns: usize,
    /// Those of a core.
    pub columns: usize,
    /// Tiles of the depth.
    pub depths: usize,
    /// Whether the last tile of columns has fewer than the others.
    pub is_ragged: bool,
}

impl Shape {
    /// Whether an expert's weights stay where they are for all chunks of it.
    pub fn keeps_weights(self) -> bool {
        self.columns * self.depths == 1
    }
}

/// What a plan should cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Cycles of the whole kernel.
    pub cycles: f64,
    /// Those of its steps alone, as if nothing but each step's copies were on its way.
    pub steps: f64,
    /// Bytes moved between HBM and VMEM, all cores together.
    pub bytes_moved: u64,
}

/// What a grouped matmul's plan holds beside what every plan holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Details {
    /// Its steps.
    pub shape: Shape,
    /// What the body works on at a time.
    pub block: Block,
    /// What it should cost with rows dealt out at random.
    pub estimate: Estimate,
}

impl fmt::Display for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Estimate { cycles, bytes_moved, .. } = self.estimate;
        write!(f, "{:<24} {cycles:.0} cycles, {} moved, rows dealt out at random", "estimate", Bytes(bytes_moved))
    }
}

/// What the user may fix; the planner chooses the rest.
pub type Options = plan::Options<Tiles>;

/// A grouped matmul kernel for a chip.
pub type Plan = plan::Plan<GroupedMatmul>;

impl Plan {
    /// How it is cut into steps.
    pub fn shape(&self) -> Shape {
        self.details().shape
    }

    /// What the body works on at a time.
    pub fn block(&self) -> Block {
        self.details().block
    }

    /// Chunks that a launch may have.
    pub(super) fn most_chunks(&self) -> usize {
        most_chunks(self.problem(), self.tiles())
    }

    /// Whole bands of rows, and lanes of whole tiles where there are several.
    pub(super) fn output_dims(&self) -> [usize; 2] {
        let (problem, Shape { all_columns, .. }) = (self.problem(), self.shape());
        let lanes = if all_columns == 1 { problem.n } else { all_columns * self.tiles().n };
        [problem.m.next_multiple_of(BAND), lanes]
    }
}

/// Each group has a first chunk, and each tile's worth of rows another.
fn most_chunks(problem: &Problem, tiles: Tiles) -> usize {
    problem.experts.min(problem.m) + problem.m.div_ceil(tiles.m)
}

fn shape(problem: &Problem, chip: Chip, tiles: Tiles) -> Shape {
    let all_columns = problem.n.div_ceil(tiles.n);
    let cores = cores(chip, all_columns);
    let is_ragged = all_columns > 1 && !problem.n.is_multiple_of(tiles.n);
    Shape { all_columns, columns: all_columns / cores, depths: problem.k.div_ceil(tiles.k), is_ragged }
}

/// Cores that share the tiles of columns: all, if each has as many.
fn cores(chip: Chip, all_columns: usize) -> usize {
    let cores = chip.info().cores;
    if all_columns.is_multiple_of(cores) { cores } else { 1 }
}

/// Copies take whole tiles of an array's memory.
pub(super) fn legal(problem: &Problem, tiles: Tiles) -> Result<(), PlanError> {
    let refused =
        |key, tile: usize, limit: String, fix: String| Err(PlanError { key, value: tile.to_string(), limit, fix });
    let most = problem.m.next_multiple_of(BAND);
    if tiles.m == 0 || !tiles.m.is_multiple_of(BAND) || tiles.m > most {
        let fix = format!("give {}", (tiles.m / BAND * BAND).clamp(BAND, most));
        return refused("tiles.m", tiles.m, format!("is not a multiple of {BAND} up to {most}"), fix);
    }
    let k = problem.k;
    if tiles.k != k && (tiles.k == 0 || !tiles.k.is_multiple_of(LANES) || !k.is_multiple_of(tiles.k)) {
        let limit = format!("is neither the whole {k} nor a multiple of {LANES} that divides it");
        return refused("tiles.k", tiles.k, limit, format!("give {k}"));
    }
    let n = problem.n;
    if tiles.n == n {
        return Ok(());
    }
    let is_part = tiles.n > 0 && tiles.n < n && tiles.n.is_multiple_of(LANES);
    match problem.layout {
        Layout::RowMajor if !is_part || !n.is_multiple_of(tiles.n) => {
            let limit = format!("is neither the whole {n} nor a multiple of {LANES} that divides it");
            refused("tiles.n", tiles.n, limit, format!("give {n}"))
        }
        Layout::WeightTransposed if !is_part || !n.is_multiple_of(BAND) => {
            let limit =
                format!("is neither the whole {n} nor a multiple of {LANES} below it, for n a multiple of {BAND}");
            refused("tiles.n", tiles.n, limit, format!("give {n}"))
        }
        _ => Ok(()),
    }
}

/// What follows from legal tiles.
pub(super) fn layout(problem: &Problem, chip: Chip, tiles: Tiles) -> plan::Layout<Details> {
    let Tiles { m, n, k } = tiles;
    let lists = Bytes((4 * most_chunks(problem, tiles) * Element::I32.bytes()) as u64);
    plan::Layout {
        name: format!("grouped_matmul-m{m}-n{n}-k{k}"),
        grid: vec![cores(chip, problem.n.div_ceil(n))],
        vmem: report(problem, chip, tiles),
        smem: plan::smem(&problem.arguments()) + lists,
        spilling: spilling(problem, chip, tiles),
        details: Details {
            shape: shape(problem, chip, tiles),
            block: block(problem, chip, tiles),
            estimate: estimate(problem, chip, tiles, &typical(problem)),
        },
    }
}

/// Few enough sums for the registers, as many columns as a matrix unit has. True f32 products split each operand into three bf16
/// parts, all of which are live: they go through the depth in pieces. So do two products that share what is loaded of `x`.
fn block(problem: &Problem, chip: Chip, tiles: Tiles) -> Block {
    let most = if problem.input == Element::F32 { 128 } else { chip.info().mxu.max(128) };
    let rows = [256, 128, 64, 32, 16].into_iter().find(|&rows| rows <= most && tiles.m.is_multiple_of(rows));
    let depth = match (problem.input, problem.products()) {
        (Element::F32, _) => 128,
        (_, 2) => 512,
        _ => tiles.k,
    };
    Block { rows: rows.unwrap_or(BAND), columns: tiles.n.min(chip.info().mxu), depth: tiles.k.min(depth) }
}

/// Every VMEM buffer, in the order in which the kernel declares them.
fn report(problem: &Problem, chip: Chip, tiles: Tiles) -> VmemReport {
    let shape = shape(problem, chip, tiles);
    let names = |one, gate, up| if problem.products() == 2 { vec![gate, up] } else { vec![one] };
    let Tiles { m, n, k } = tiles;
    let of_bias = [1, problem.experts, problem.n.div_ceil(LANES), LANES];
    let window = |name| Buffer::new(name, BufferKind::InputWindow, Element::F32, &of_bias, 1);
    let scratch = |name, element, dims: &[usize]| Buffer::new(name, BufferKind::Scratch, element, dims, 1);
    let w = match problem.layout {
        Layout::RowMajor => [W_BUFFERS, k, n],
        Layout::WeightTransposed => [W_BUFFERS, n, k],
    };
    let bias = names("bias", "bias_gate", "bias_up").into_iter().filter(|_| problem.bias).map(window);
    let x = scratch("x_tiles", problem.input, &[2, m, k]);
    let w = names("w_tiles", "gate_tiles", "up_tiles").into_iter().map(|name| scratch(name, problem.input, &w));
    let sums = names("sum", "sum_gate", "sum_up").into_iter().filter(|_| shape.depths > 1);
    let sums = sums.map(|name| scratch(name, Element::F32, &[m, n]));
    let results = scratch("results", problem.output, &[2, m, n]);
    let band = scratch("band", problem.output, &[shape.columns, BAND, n]);
    VmemReport { buffers: bias.chain([x]).chain(w).chain(sums).chain([results, band]).collect() }
}

/// Input type, and whether there are two products; the sums of a block, and what of the operands it multiplies at a time.
fn spilling(problem: &Problem, chip: Chip, tiles: Tiles) -> Spilling {
    let Block { rows, columns, depth } = block(problem, chip, tiles);
    let (products, lanes) = (problem.products(), columns.next_multiple_of(LANES));
    let live = match problem.input {
        Element::F32 => tiles.k * (rows + products * lanes) * 6,
        _ => products * rows * lanes * 4 + (depth * lanes * 2).min(HELD_OF_WEIGHT),
    };
    let gated = if products == 2 { " gated" } else { "" };
    Spilling { family: format!("{}{gated}", problem.input), live: Bytes(live as u64) }
}

/// The sizes of groups that are expected where nobody says more: each row has an expert drawn from a fixed seed. Of more rows
/// than [`MOST_DRAWN`], what is left is spread evenly.
pub(super) fn typical(problem: &Problem) -> Vec<usize> {
    let (experts, drawn) = (problem.experts, problem.m.min(MOST_DRAWN));
    let left = problem.m - drawn;
    let mut sizes: Vec<usize> =
        (0..experts).map(|expert| (expert + 1) * left / experts - expert * left / experts).collect();
    let mut random = SplitMix64::new(1);
    (0..drawn).for_each(|_| sizes[random.below(experts)] += 1);
    sizes
}

const MOST_DRAWN: usize = 1 << 14;

/// The sizes of a batch's groups.
pub(super) fn sizes(problem: &Problem, batch: &[Lengths]) -> Vec<usize> {
    let given = batch.iter().map(|group| group.q_len);
    given.chain(std::iter::repeat(0)).take(problem.experts).collect()
}

/// What a launch over groups of these sizes costs: what its steps take, or what its bytes take, whichever is more. Where a copy
/// takes longer than the work beside it, as many are under way at a time as there are buffers.
pub(super) fn estimate(problem: &Problem, chip: Chip, tiles: Tiles, sizes: &[usize]) -> Estimate {
    let info = chip.info();
    let Shape { columns, depths, .. } = shape(problem, chip, tiles);
    let block = block(problem, chip, tiles);
    let cores = cores(chip, problem.n.div_ceil(tiles.n));
    let (element, products) = (problem.input.bytes(), problem.products());
    let w_tile = products * tiles.n * tiles.k * element;
    let per_step = (columns * depths) as f64;

    let side = info.mxu;
    let units = info.peak_flop_per_cycle_and_core as f64 / (2 * side * side) as f64;
    let passes = if problem.input == Element::F32 { F32_PASSES } else { 1.0 };
    let weight_tiles = (products * tiles.n.div_ceil(side) * tiles.k.div_ceil(side)) as f64;
    // As many rows as stream through a tile of weights, but no less than it takes to load the next one.
    let streamed = (block.rows as f64).max(WEIGHT_LOAD * side as f64);
    let registers = (block.rows * tiles.n) as f64 / (LANES * SUBLANES) as f64 * products as f64;
    let around = if depths > 1 { ACCUMULATE + EPILOGUE / depths as f64 } else { EPILOGUE };
    let of_block = passes * weight_tiles * streamed / units + registers * around + BLOCK_OVERHEAD;

    let (mut steps, mut bytes, mut row) = (LIST * sizes.len() as f64 + HEAD, 0.0, 0);
    for &size in sizes.iter().filter(|&&size| size > 0) {
        let (end, mut first) = (row + size, row);
        while first < end {
            let stop = (first / BAND * BAND + tiles.m).min(end);
            let rows = stop - first / BAND * BAND;
            let work = rows.div_ceil(block.rows) as f64 * of_block + STEP_OVERHEAD;
            let fetched = columns * depths > 1 || first == row;
            let x_bytes =
                (rows.next_multiple_of(BAND) * problem.k * element * if depths > 1 { columns } else { 1 }) as f64;
            let copy = if fetched { copy_cycles(chip, w_tile as f64 / products as f64) } else { 0.0 };
            let x_copy = copy_cycles(chip, x_bytes / per_step);
            let copy = copy.max(if depths > 1 || columns == 1 { x_copy } else { 0.0 });
            steps += per_step * work.max((work + copy) / W_BUFFERS as f64);
            let of_weights = if fetched { problem.expert_bytes() as f64 } else { 0.0 };
            bytes += of_weights + cores as f64 * x_bytes;
            bytes += (rows * problem.n * problem.output.bytes()) as f64;
            first = stop;
        }
        row = end;
    }
    steps += copy_cycles(chip, w_tile as f64 / products as f64);
    let bandwidth =
        info.hbm_bytes_per_cycle() * if cores < info.cores { cores as f64 / info.cores as f64 } else { 1.0 };
    Estimate { cycles: steps.max(bytes / bandwidth), steps, bytes_moved: bytes as u64 }
}

/// The tiles that are cheapest over `batches` and fit `limit` with room for spills; without it, if none do. Where no batch is
/// given, over rows dealt out at random.
pub(super) fn choose(problem: &Problem, chip: Chip, limit: Bytes, batches: &[Vec<Lengths>]) -> Option<Tiles> {
    let launches: Vec<Vec<usize>> = match batches {
        [] => vec![typical(problem)],
        batches => batches.iter().map(|batch| sizes(problem, batch)).collect(),
    };
    let sum = |tiles, of: fn(Estimate) -> f64| {
        launches.iter().map(|sizes| of(estimate(problem, chip, tiles, sizes)).ln()).sum::<f64>()
    };
    let fitting = every(problem).filter_map(|tiles| {
        let taken = report(problem, chip, tiles).total();
        let roomy = taken + evidence::margin(&spilling(problem, chip, tiles)) <= limit;
        (taken <= limit).then(|| (!roomy, sum(tiles, |estimate| estimate.cycles), tiles))
    });
    let fitting: Vec<_> = fitting.collect();
    let &(tight, least, _) = fitting.iter().min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)))?;
    let alike = fitting.iter().filter(|of| of.0 == tight && of.1 <= least + ALIKE.ln() * launches.len() as f64);
    let steps = alike.map(|&(_, _, tiles)| (sum(tiles, |estimate| estimate.steps), tiles));
    steps.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, tiles)| tiles)
}

/// Tiles whose cycles are so close are alike to the model: where memory is the limit, then those whose steps take least.
const ALIKE: f64 = 1.02;

/// Tiles that fit `limit`, the cheapest first: as many as are worth a compilation.
pub(super) fn fitting(problem: &Problem, chip: Chip, limit: Bytes) -> Vec<Tiles> {
    const MOST: usize = 64;
    let sizes = typical(problem);
    let mut all: Vec<Tiles> = every(problem).filter(|&tiles| report(problem, chip, tiles).total() <= limit).collect();
    all.sort_by_cached_key(|&tiles| estimate(problem, chip, tiles, &sizes).cycles as u64);
    all.truncate(MOST);
    all
}

/// Tiles worth trying: powers of two of rows, and three times those; parts of `n` and `k`.
fn every(problem: &Problem) -> impl Iterator<Item = Tiles> {
    let rows = problem.m.next_multiple_of(BAND);
    let powers = (0..7).map(|power| BAND << power).filter(|&m| m < rows).chain((rows <= MAX_ROWS).then_some(rows));
    let ms: Vec<usize> = powers.collect();
    let of_lanes = |size: usize| (1..size.div_ceil(LANES)).map(|count| count * LANES).filter(move |&tile| tile < size);
    let ns: Vec<usize> = of_lanes(problem.n).filter(|&n| n <= MAX_COLUMNS).chain([problem.n]).collect();
    let ks: Vec<usize> = of_lanes(problem.k).filter(|&k| problem.k.is_multiple_of(k)).chain([problem.k]).collect();
    let problem = *problem;
    let all = ms.into_iter().flat_map(move |m| {
        let ks = ks.clone();
        ns.clone().into_iter().flat_map(move |n| ks.clone().into_iter().map(move |k| Tiles { m, n, k }))
    });
    all.filter(move |&tiles| legal(&problem, tiles).is_ok() && tiles.n * tiles.k <= MAX_TILE)
}

/// Buffers of weights: that of the step at work, and two that are being filled.
pub(super) const W_BUFFERS: usize = 3;

const MAX_ROWS: usize = 1024;
const MAX_COLUMNS: usize = 4096;
/// Elements of a tile of weights: a block of rows times it is spelled out.
const MAX_TILE: usize = 1 << 23;
/// Bytes of a weight that are held at once: however deep a block is, the compiler loads it piece by piece.
const HELD_OF_WEIGHT: usize = 256 << 10;
/// Cycles of a step and of a block of rows besides their work, of an expert in the list, and of a kernel besides its steps.
const STEP_OVERHEAD: f64 = 300.0;
const BLOCK_OVERHEAD: f64 = 60.0;
const LIST: f64 = 15.0;
const HEAD: f64 = 1000.0;
/// Cycles per register of 1024 f32: a sum read and written back; a result rounded and stored.
const ACCUMULATE: f64 = 0.25;
const EPILOGUE: f64 = 0.5;
/// Cycles to load the next weight tile, as a part of its side.
const WEIGHT_LOAD: f64 = 0.67;
/// bf16 passes of a true f32 product.
const F32_PASSES: f64 = 6.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grouped_matmul::Spec;

    fn problem(m: usize, k: usize, n: usize, experts: usize, layout: Layout) -> Problem {
        Problem::new(Spec { layout, ..Spec::new([m, k, n], experts, Element::Bf16) }).unwrap()
    }

    fn plan(problem: Problem, tiles: &str) -> Result<Plan, PlanError> {
        let options = Options { tiles: Some(Tiles::parse(tiles)?), vmem_limit: None };
        Plan::new(problem, Chip::V5p, options)
    }

    #[test]
    fn what_cannot_be_planned_says_why_and_what_to_do() {
        let row_major = problem(100, 384, 640, 4, Layout::RowMajor);
        let transposed = problem(100, 384, 200, 4, Layout::WeightTransposed);
        for (problem, tiles, message) in [
            (row_major, "24,128,128", "tiles.m = 24 is not a multiple of 16 up to 112: give 16"),
            (row_major, "128,128,128", "tiles.m = 128 is not a multiple of 16 up to 112: give 112"),
            (
                row_major,
                "16,128,256",
                "tiles.k = 256 is neither the whole 384 nor a multiple of 128 that divides it: give 384",
            ),
            (
                row_major,
                "16,256,384",
                "tiles.n = 256 is neither the whole 640 nor a multiple of 128 that divides it: give 640",
            ),
            (
                transposed,
                "16,128,384",
                "tiles.n = 128 is neither the whole 200 nor a multiple of 128 below it, for n a multiple of 16: give 200",
            ),
        ] {
            assert_eq!(plan(problem, tiles).unwrap_err().to_string(), message);
        }
        let ragged = plan(problem(100, 384, 208, 4, Layout::WeightTransposed), "16,128,384").unwrap();
        assert!(ragged.shape().is_ragged && ragged.output_dims() == [112, 256]);
    }

    /// Many small groups take chunks of few rows, large ones those of many; cores share the columns.
    #[test]
    fn tiles_follow_the_groups() {
        let tiles = |m| {
            let plan = Plan::new(problem(m, 2048, 768, 128, Layout::WeightTransposed), Chip::V5p, Options::default());
            let plan = plan.unwrap();
            assert!(plan.vmem().total() < plan.limit());
            assert_eq!(plan.grid(), [2]);
            plan.tiles()
        };
        assert!(tiles(64).m <= 32 && tiles(32_768).m >= 128, "{} {}", tiles(64), tiles(32_768));
    }

    #[test]
    fn typical_groups_have_every_row() {
        for (m, experts) in [(1, 1), (7, 128), (8192, 128), (100_000, 60)] {
            let sizes = typical(&problem(m, 128, 128, experts, Layout::RowMajor));
            assert_eq!((sizes.len(), sizes.iter().sum::<usize>()), (experts, m));
        }
    }
}
