//! Planning an RMSNorm for a TPU: rows of a block, VMEM, and what it should cost.
//!
//! A block is whole rows. Few large blocks wait for their first rows and their last ones, many small ones for a DMA each:
//! the planner takes the number of rows that a model of one core, which overlaps copies and arithmetic, finds cheapest.

use std::fmt;

use pagoda_ir::{
    Element,
    mosaic::tiling::{LANES, SUBLANES},
};
use serde::{Deserialize, Serialize};

use super::{RmsNorm, problem::Problem};
use crate::{
    chips::Chip,
    evidence,
    kernel::TileSizes,
    plan::{self, PlanError, Spilling},
    vmem::{Buffer, BufferKind, Bytes, VmemReport},
};

/// Rows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Tiles {
    /// Rows.
    pub rows: usize,
}

impl TileSizes for Tiles {
    const FORM: &'static str = "ROWS";

    fn parse(text: &str) -> Result<Self, PlanError> {
        let [rows] = plan::positive_numbers(text, "a positive number of rows", "128")?;
        Ok(Self { rows })
    }
}

impl fmt::Display for Tiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.rows)
    }
}

/// The part of a block that the body works on at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Group {
    /// Rows of it.
    pub rows: usize,
    /// 128 lanes each, in one step of a loop over lanes; they divide `hidden`.
    pub registers: usize,
}

/// What an RMSNorm's plan holds beside what every plan holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Details {
    /// What the body works on at a time.
    pub group: Group,
    /// Cycles, by the model of the [module](self).
    pub cycles: f64,
    /// Bytes moved between HBM and VMEM, all cores together.
    pub moved: Bytes,
}

impl fmt::Display for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<24} {:.0} cycles, {} moved", "estimate", self.cycles, self.moved)
    }
}

/// An RMSNorm kernel for a chip.
pub type Plan = plan::Plan<RmsNorm>;

impl Plan {
    /// What the body works on at a time.
    pub fn group(&self) -> Group {
        self.details().group
    }

    /// Whether no core moves a window.
    pub(super) fn one_block_per_core(&self) -> bool {
        one_block_per_core(self.problem(), self.chip(), self.tiles())
    }
}

/// A block spans all rows, or is a multiple of a tile's rows.
pub(super) fn legal(problem: &Problem, tiles: Tiles) -> Result<(), PlanError> {
    let (rows, whole) = (tiles.rows, problem.rows);
    if rows > 0 && rows <= whole.next_multiple_of(SUBLANES) && (rows == whole || rows.is_multiple_of(SUBLANES)) {
        return Ok(());
    }
    Err(PlanError {
        key: "tiles.rows",
        value: rows.to_string(),
        limit: format!("is neither the whole {whole} nor a multiple of {SUBLANES} up to it"),
        fix: format!("give {whole}, or a multiple of {SUBLANES} below it"),
    })
}

/// The cheapest rows that fit `limit` with room for spills; without it, if none do.
pub(super) fn choose(problem: &Problem, chip: Chip, limit: Bytes) -> Option<Tiles> {
    let powers = (0..16).flat_map(|power| [SUBLANES << power, (SUBLANES * 3) << power]);
    let whole = Some(problem.rows).filter(|&rows| rows <= MAX_ROWS);
    let candidates = powers.filter(|&rows| rows < problem.rows && rows <= MAX_ROWS).chain(whole);
    let fitting = candidates.filter_map(|rows| {
        let tiles = Tiles { rows };
        let taken = report(problem, chip, tiles).total();
        let roomy = taken + evidence::margin(&spilling(problem, tiles)) <= limit;
        (taken <= limit).then(|| (!roomy, cycles(problem, chip, tiles), tiles))
    });
    fitting.min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))).map(|(_, _, tiles)| tiles)
}

/// What follows from legal tiles.
pub(super) fn layout(problem: &Problem, chip: Chip, tiles: Tiles) -> plan::Layout<Details> {
    let moved = problem.rows * row_bytes(problem) + problem.hidden * Element::F32.bytes();
    plan::Layout {
        name: format!("rms_norm-r{}", tiles.rows),
        grid: vec![blocks(problem, tiles)],
        vmem: report(problem, chip, tiles),
        smem: Bytes(0),
        spilling: spilling(problem, tiles),
        details: Details {
            group: group(problem, tiles),
            cycles: cycles(problem, chip, tiles),
            moved: Bytes(moved as u64),
        },
    }
}

fn blocks(problem: &Problem, tiles: Tiles) -> usize {
    problem.rows.div_ceil(tiles.rows)
}

fn one_block_per_core(problem: &Problem, chip: Chip, tiles: Tiles) -> bool {
    blocks(problem, tiles) <= chip.info().cores
}

/// Every VMEM buffer, in the order of the kernel's operands.
fn report(problem: &Problem, chip: Chip, tiles: Tiles) -> VmemReport {
    use BufferKind::{InputWindow, OutputWindow};
    // A window that never moves has one buffer: there is no next block to fetch meanwhile.
    let copies = if one_block_per_core(problem, chip, tiles) { 1 } else { 2 };
    let block = |name, kind| Buffer::new(name, kind, problem.element, &[tiles.rows, problem.hidden], copies);
    let weight = Buffer::new("weight", InputWindow, Element::F32, &[1, problem.hidden], 1);
    let mut buffers = vec![block("x", InputWindow), weight, block("out", OutputWindow)];
    if problem.residual {
        buffers.insert(1, block("residual", InputWindow));
        buffers.push(block("sum", OutputWindow));
    }
    VmemReport { buffers }
}

/// 16 rows are a packed tile of bf16, so that a loop's index starts a tile. As many lanes as divide `hidden` and keep what
/// a step holds within the 64 registers (8 rather than 4 at a time: 6% fewer cycles at 512 x 4096 on v5p).
fn group(problem: &Problem, tiles: Tiles) -> Group {
    let registers = (1..=8).rev().find(|registers| problem.hidden.is_multiple_of(registers * LANES));
    Group { rows: tiles.rows.min(GROUP), registers: registers.expect("hidden is a multiple of 128") }
}

/// The element type and the residual; partial sums of squares, a value and its square for each lane of a step.
fn spilling(problem: &Problem, tiles: Tiles) -> Spilling {
    let Group { rows, registers } = group(problem, tiles);
    let residual = if problem.residual { " residual" } else { "" };
    Spilling {
        family: format!("{}{residual}", problem.element),
        live: Bytes((3 * rows * registers * LANES * 4) as u64),
    }
}

/// Bytes of a row that are moved: of x and the result, and with a residual of both sums.
fn row_bytes(problem: &Problem) -> usize {
    let arrays = if problem.residual { 4 } else { 2 };
    arrays * problem.hidden * problem.element.bytes()
}

/// The first block comes in and the last one goes out with nothing beside them; between, copies and arithmetic overlap.
fn cycles(problem: &Problem, chip: Chip, tiles: Tiles) -> f64 {
    let info = chip.info();
    let bandwidth = info.hbm_bytes_per_cycle() / info.cores as f64;
    let steps = blocks(problem, tiles).div_ceil(info.cores) as f64;
    let copies = (tiles.rows * row_bytes(problem)) as f64 / bandwidth;
    let registers = (tiles.rows.div_ceil(SUBLANES) * (problem.hidden / LANES)) as f64;
    let arithmetic = STEP_OVERHEAD + registers * CYCLES_PER_REGISTER;
    let between = (steps - 1.0) * arithmetic.max(DMA_LATENCY + copies);
    2.0 * DMA_LATENCY + copies + arithmetic + between
}

const GROUP: usize = 16;
const MAX_ROWS: usize = 4096;
/// Cycles of a grid step besides its work: index arithmetic, semaphores, pipeline fill.
const STEP_OVERHEAD: f64 = 250.0;
/// Cycles until a copy's first byte arrives.
const DMA_LATENCY: f64 = 700.0;
/// Cycles for 8 rows of 128 lanes, both passes.
const CYCLES_PER_REGISTER: f64 = 5.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{plan::Options, rms_norm::Spec};

    fn plan(rows: usize, chip: Chip, tiles: Option<&str>) -> Result<Plan, PlanError> {
        let spec = Spec { rows, hidden: 4096, element: Element::Bf16, epsilon: 1e-5, residual: true };
        Plan::new(Problem::new(spec)?, chip, Options { tiles: tiles.map(Tiles::parse).transpose()?, vmem_limit: None })
    }

    /// One block of many rows would leave one of two cores idle, and its last rows to wait for.
    #[test]
    fn both_cores_work() {
        for rows in [16, 64, 100, 512, 4096] {
            let plan = plan(rows, Chip::V5p, None).unwrap();
            assert!(plan.grid()[0] >= 2, "{rows} rows: {:?}", plan.grid());
            assert!(plan.vmem().total() < plan.limit());
        }
        let plan = plan(8, Chip::V5p, None).unwrap();
        assert_eq!((plan.grid(), plan.tiles().rows), (&[1][..], 8), "a tile has eight rows");
    }

    #[test]
    fn what_cannot_be_planned_says_why_and_what_to_do() {
        let refusal = |tiles| plan(100, Chip::V5p, Some(tiles)).unwrap_err().to_string();
        insta::assert_snapshot!([refusal("10"), refusal("112"), refusal("8,8")].join("\n"), @r"
        tiles.rows = 10 is neither the whole 100 nor a multiple of 8 up to it: give 100, or a multiple of 8 below it
        tiles.rows = 112 is neither the whole 100 nor a multiple of 8 up to it: give 100, or a multiple of 8 below it
        tiles = 8,8 is not a positive number of rows: write e.g. 128, or leave the tiles to the planner
        ");
    }
}
