//! Planning a matmul for a TPU: tiles, grid order, VMEM, and what it should cost.
//!
//! Pure and fast (a candidate takes a microsecond or two, all of them some ten milliseconds at most). A plan is
//! legal by construction: tiles that no layout allows are refused with the rule they break.
//!
//! All three layouts are one kernel `out [rows, columns] = lhs [rows, depth] rhs [depth, columns]`: the weight is the
//! right side, or for feature-major activations the left one. [`Shape`] holds the sizes in this sense; [`Tiles`] are the
//! user's, along `m`, `n` and `k`.

use std::fmt;

use pagoda_ir::{
    element::Element,
    mosaic::tiling::{LANES, SUBLANES},
};
use serde::{Deserialize, Serialize};

use super::{
    Matmul,
    estimate::Estimate,
    problem::{Layout, Problem, Quantized},
};
use crate::{
    chips::{Chip, ChipInfo},
    evidence,
    kernel::TileSizes,
    plan::{self, PlanError, Spilling},
    vmem::{Buffer, BufferKind, Bytes, VmemReport},
};

/// Tile sizes along `m`, `n` and `k`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Tiles {
    /// Rows of activations.
    pub m: usize,
    /// Output features.
    pub n: usize,
    /// Summed features.
    pub k: usize,
}

impl TileSizes for Tiles {
    const FORM: &'static str = "M,N,K";

    fn parse(text: &str) -> Result<Self, PlanError> {
        let [m, n, k] = plan::positive_numbers(text, "three positive numbers M,N,K", "512,512,1024")?;
        Ok(Self { m, n, k })
    }
}

impl fmt::Display for Tiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.m, self.n, self.k)
    }
}

/// Which dimension of the output the grid walks along slowest. Blocks of the outer one are fetched once when a block
/// spans all of `k`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Row blocks outside, column blocks inside.
    RowsOuter,
    /// Column blocks outside, row blocks inside.
    ColumnsOuter,
}

/// The sizes as the kernel sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Shape {
    /// Rows of the output.
    pub rows: usize,
    /// Columns of the output.
    pub columns: usize,
    /// What is summed over.
    pub depth: usize,
}

/// The part of a tile that the body works on at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Chunk {
    /// Rows of it.
    pub rows: usize,
    /// Columns of it.
    pub columns: usize,
    /// How much of the depth is multiplied at a time.
    pub depth: usize,
}

/// What the user may fix; the planner chooses the rest.
pub type Options = plan::Options<Tiles>;

/// A matmul kernel for a chip, every tile and every VMEM buffer named.
pub type Plan = plan::Plan<Matmul>;

/// What a matmul's plan holds beside what every plan holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Details {
    /// What the grid's first dimension walks along.
    pub order: Order,
    /// What the body works on at a time.
    pub chunk: Chunk,
    /// What it should cost.
    pub estimate: Estimate,
}

impl fmt::Display for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Estimate { cycles, mxu_cycles, bytes_moved, .. } = self.estimate;
        let (share, moved) = (100.0 * mxu_cycles / cycles, Bytes(bytes_moved));
        write!(f, "{:<24} {cycles:.0} cycles ({share:.0}% of the matrix units' peak), {moved} moved", "estimate")
    }
}

/// What follows from legal tiles, in the better of both orders.
pub(super) fn layout(problem: &Problem, chip: Chip, tiles: Tiles) -> plan::Layout<Details> {
    let (blocks, info) = (Blocks::new(problem, tiles), chip.info());
    let order = blocks.order(chip);
    let estimate = blocks.estimate(chip, order);
    let Tiles { m, n, k } = tiles;
    plan::Layout {
        name: format!("matmul-m{m}-n{n}-k{k}"),
        grid: blocks.grid(order).to_vec(),
        vmem: blocks.report(chip),
        smem: plan::smem(&problem.arguments()),
        spilling: blocks.spilling(&info),
        details: Details { order, chunk: chunk(&info, &blocks), estimate },
    }
}

impl Plan {
    /// The grid's order.
    pub fn order(&self) -> Order {
        self.details().order
    }

    /// What the body works on at a time.
    pub fn chunk(&self) -> Chunk {
        self.details().chunk
    }

    /// What it should cost.
    pub fn estimate(&self) -> Estimate {
        self.details().estimate
    }

    /// How ups are cut from within blocks, where none can start at the first.
    pub(super) fn cut(&self) -> Option<Cut> {
        cut(self.problem(), self.tiles().n)
    }

    /// Size of a window's array and of its block along an axis.
    pub(super) fn of_window(&self, window: &ArrayWindow, axis: Axis) -> (usize, usize) {
        let features = axis == if self.problem().layout == Layout::FeatureMajor { Axis::Rows } else { Axis::Columns };
        let copies = if features && window.part != Part::Whole { 2 } else { 1 };
        let block = Blocks::new(self.problem(), self.tiles()).of_window(window, axis).0;
        (copies * self.along(axis).0, block)
    }

    /// Size of the whole dimension, size of a block, and number of blocks along an axis.
    pub(super) fn along(&self, axis: Axis) -> (usize, usize, usize) {
        let Shape { rows, columns, depth } = shape(self.problem());
        let size = match axis {
            Axis::Rows => rows,
            Axis::Columns => columns,
            Axis::Depth => depth,
            Axis::Groups => self.problem().groups(),
            Axis::One => 1,
        };
        let (block, count) = Blocks::new(self.problem(), self.tiles()).along(axis);
        (size, block, count)
    }

    /// Block sizes along the kernel's rows, columns and depth.
    pub(super) fn blocks(&self) -> [usize; 3] {
        Blocks::new(self.problem(), self.tiles()).block
    }

    /// Steps of each grid dimension.
    pub(super) fn steps_of_grid(&self) -> [usize; 3] {
        Blocks::new(self.problem(), self.tiles()).grid(self.order())
    }

    /// Whether no core moves a window.
    pub(super) fn one_step_per_core(&self) -> bool {
        Blocks::new(self.problem(), self.tiles()).one_step_per_core(self.chip())
    }

    /// Steps along `k`.
    pub(super) fn steps(&self) -> usize {
        self.steps_of_grid()[2]
    }

    /// Whether gates and ups are columns of one product.
    pub(super) fn joins(&self) -> bool {
        Blocks::new(self.problem(), self.tiles()).joins(&self.chip().info())
    }

    /// What the matrix units multiply and add up in.
    pub(super) fn arithmetic(&self) -> Arithmetic {
        arithmetic(self.problem(), self.chip())
    }

    /// The type of the sums that are kept from one step along `k` to the next.
    pub(super) fn accumulator(&self) -> Element {
        accumulator(self.problem(), self.chip())
    }

    /// Real elements of the last step along `k`; 0 if all are.
    pub(super) fn edge(&self) -> usize {
        self.problem().k % self.tiles().k
    }
}

/// What the matrix units multiply, and what they add up in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arithmetic {
    /// The type of both operands; what is stored otherwise is converted in VMEM, which loses nothing.
    pub operand: Element,
    /// The type of their products' sums.
    pub sum: Element,
}

pub(super) fn arithmetic(problem: &Problem, chip: Chip) -> Arithmetic {
    let operand = match problem.quantized {
        Some(quantized) if quantized.activations && chip.multiplies(quantized.weight) => quantized.weight,
        Some(quantized) if quantized.activations => Element::Bf16,
        _ => problem.input,
    };
    Arithmetic { operand, sum: if operand == Element::I8 { Element::I32 } else { Element::F32 } }
}

/// Sums of several groups are scaled, and so in f32.
fn accumulator(problem: &Problem, chip: Chip) -> Element {
    if problem.group().is_some() { Element::F32 } else { arithmetic(problem, chip).sum }
}

/// What a dimension of an array is to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Axis {
    /// The output's rows.
    Rows,
    /// The output's columns.
    Columns,
    /// What is summed over.
    Depth,
    /// Parts of the depth that have scales of their own.
    Groups,
    /// Size 1.
    One,
}

/// What an array is to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Left,
    Right,
    /// Scales of the weight.
    Scale,
    /// Scales of the rows of `x`.
    RowScale,
    Bias,
    Residual,
    Out,
}

/// Which part of an array a window walks over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it.
    Whole,
    /// One of two halves of its features: gates, then ups.
    Half(usize),
    /// Of the features of a gated weight that is [`Cut`]: gates, the block that ups begin in, the block behind it.
    Gates,
    Ups,
    UpsBehind,
}

/// One window of the kernel: the part of an array that a grid step sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct ArrayWindow {
    pub name: &'static str,
    pub side: Side,
    pub element: Element,
    pub axes: [Axis; 2],
    /// Which part of the array it walks over.
    pub part: Part,
    /// Whether the array is a stack of all layers, along a dimension of its own before `axes`.
    pub stacked: bool,
}

/// The windows of a problem's kernel, in the order of its operands: left side, right side, scales of the weight and of
/// `x`, bias, residual, output.
pub(super) fn windows(problem: &Problem) -> Vec<ArrayWindow> {
    use Axis::{Columns, Depth, Groups, One, Rows};
    let output = problem.output;
    let (x, w, [scale, row_scale], bias) = match problem.layout {
        Layout::RowMajor => ([Rows, Depth], [Depth, Columns], [[Groups, Columns], [Rows, One]], [One, Columns]),
        Layout::WeightTransposed => ([Rows, Depth], [Columns, Depth], [[Groups, Columns], [Rows, One]], [One, Columns]),
        Layout::FeatureMajor => ([Depth, Columns], [Rows, Depth], [[Rows, Groups], [One, Columns]], [Rows, One]),
    };
    let whole =
        |name, side, element, axes| vec![ArrayWindow { name, side, element, axes, part: Part::Whole, stacked: false }];
    let stacked = problem.layers > 1;
    let split = |names: &[&'static str], parts: &[Part], side, element, axes| -> Vec<ArrayWindow> {
        let window = |(&name, &part)| ArrayWindow { name, side, element, axes, part, stacked };
        names.iter().zip(parts).map(window).collect()
    };
    let halves = [Part::Half(0), Part::Half(1)];
    // Of what lies as the weight does, and of what has one value for each of its features, which the program cuts in two
    // where no block can start at the first up.
    let like_weight = |names: [&'static str; 4], side, element, axes| match (gated(problem), is_cut(problem)) {
        (false, _) => split(&names[..1], &[Part::Whole], side, element, axes),
        (true, false) => split(&names[1..3], &halves, side, element, axes),
        (true, true) => split(&names[1..], &[Part::Gates, Part::Ups, Part::UpsBehind], side, element, axes),
    };
    let per_feature = |names: [&'static str; 3], side, element, axes| match (gated(problem), is_cut(problem)) {
        (false, _) => split(&names[..1], &[Part::Whole], side, element, axes),
        (true, false) => split(&names[1..], &halves, side, element, axes),
        (true, true) => split(&names[1..], &[Part::Whole; 2], side, element, axes),
    };
    let weights = |side| like_weight(["w", "w_gate", "w_up", "w_up_behind"], side, problem.weight_element(), w);
    let x = |side| whole("x", side, problem.x_element(), x);
    let mut windows = match problem.layout {
        Layout::FeatureMajor => [weights(Side::Left), x(Side::Right)],
        Layout::RowMajor | Layout::WeightTransposed => [x(Side::Left), weights(Side::Right)],
    }
    .concat();
    if problem.quantized.is_some() {
        let names = ["w_scale", "w_scale_gate", "w_scale_up", "w_scale_up_behind"];
        windows.extend(match problem.group() {
            None => per_feature([names[0], names[1], names[2]], Side::Scale, Element::F32, scale),
            Some(_) => like_weight(names, Side::Scale, Element::F32, scale),
        });
    }
    if problem.quantized_x() {
        windows.extend(whole("x_scale", Side::RowScale, Element::F32, row_scale));
    }
    if problem.epilogue.bias {
        // As f32: broadcasting a packed row takes scratch on v4, and the bias is small.
        windows.extend(per_feature(["bias", "bias_gate", "bias_up"], Side::Bias, Element::F32, bias));
    }
    if problem.epilogue.residual {
        windows.extend(whole("residual", Side::Residual, output, [Rows, Columns]));
    }
    windows.extend(whole("out", Side::Out, output, [Rows, Columns]));
    windows
}

/// One name, or two for what a gated product has two of.
pub(super) fn names(problem: &Problem, one: &'static str, gate: &'static str, up: &'static str) -> Vec<&'static str> {
    if gated(problem) { vec![gate, up] } else { vec![one] }
}

pub(super) fn shape(problem: &Problem) -> Shape {
    let (rows, columns) = match problem.layout {
        Layout::FeatureMajor => (problem.n, problem.m),
        Layout::RowMajor | Layout::WeightTransposed => (problem.m, problem.n),
    };
    Shape { rows, columns, depth: problem.k }
}

/// Whether products are of f32: the matrix unit multiplies each operand's three bf16 parts.
pub(super) fn splits(problem: &Problem) -> bool {
    problem.input == Element::F32 && !problem.quantized_x()
}

pub(super) fn gated(problem: &Problem) -> bool {
    problem.epilogue.activation.is_gated()
}

/// The rule of the pipeline's DMAs: a block spans the array, or is a multiple of a tile's rows or lanes.
pub(super) fn legal(problem: &Problem, tiles: Tiles) -> Result<(), PlanError> {
    let (unit_m, unit_n) = units(problem);
    for (key, tile, size, unit) in [
        ("tiles.m", tiles.m, problem.m, unit_m),
        ("tiles.n", tiles.n, problem.n, unit_n),
        ("tiles.k", tiles.k, problem.k, LANES),
    ] {
        if tile == 0 || tile > size.next_multiple_of(unit) || (tile != size && !tile.is_multiple_of(unit)) {
            return Err(PlanError {
                key,
                value: tile.to_string(),
                limit: format!("is neither the whole {size} nor a multiple of {unit} up to it"),
                fix: format!("give {} or another multiple of {unit}", size.min(unit.max(tile / unit * unit))),
            });
        }
    }
    if let Some(group) = problem.group().filter(|&group| !groups_align(problem.k, group, tiles.k)) {
        return Err(PlanError {
            key: "tiles.k",
            value: tiles.k.to_string(),
            limit: format!(
                "neither divides the group of {group} features with a scale of their own, nor is a multiple"
            ),
            fix: format!("give {}", group.next_multiple_of(LANES).min(problem.k)),
        });
    }
    if gated(problem) && !halves_align(problem, tiles.n) {
        let unit = up_unit(problem);
        let (limit, fix) = match problem.n.is_multiple_of(unit) {
            true => (
                format!("does not divide the {} gates, so that no block could start at the first up", problem.n),
                format!("give a divisor of n that is a multiple of {unit}"),
            ),
            false => (
                format!("is not a multiple of {unit}, of which blocks are made where none can start at the first up"),
                format!("give {} or another multiple of {unit}", tiles.n.next_multiple_of(unit)),
            ),
        };
        return Err(PlanError { key: "tiles.n", value: tiles.n.to_string(), limit, fix });
    }
    Ok(())
}

/// What tiles along `m` and `n` are multiples of, where they do not span the dimension.
fn units(problem: &Problem) -> (usize, usize) {
    match problem.layout {
        Layout::FeatureMajor => (LANES, sublanes(problem.weight_element())),
        Layout::RowMajor | Layout::WeightTransposed => (sublanes(problem.x_element()), LANES),
    }
}

/// Rows of a tile of `element` in HBM: 32-bit words hold several rows of narrow elements. (Blocks of 8 rows of bf16 are
/// legal, too.)
fn sublanes(element: Element) -> usize {
    if element.bytes() == 1 { 4 * SUBLANES } else { SUBLANES }
}

/// Whether every step along `k` has whole groups, or a part of one.
pub(super) fn groups_align(k: usize, group: usize, tile: usize) -> bool {
    tile == k || tile.is_multiple_of(group) || group.is_multiple_of(tile)
}

/// Whether a gated weight can be cut into blocks of `tile` features: one starts at the first up, or none can ([`Cut`]).
fn halves_align(problem: &Problem, tile: usize) -> bool {
    let unit = up_unit(problem);
    tile.is_multiple_of(unit) && (problem.n.is_multiple_of(tile) || !problem.n.is_multiple_of(unit))
}

/// A gated weight in which no block can start at the first up: the block that holds it is taken, and what follows behind
/// it, and the products are shifted into place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Features of a block of gates, and of the block that a block's first up is in.
    pub block: usize,
    /// Features of the block behind that: as few as will do where ups begin within the first few of a block.
    pub extra: usize,
    /// The block that the first up is in, and where in it.
    pub first: usize,
    pub shift: usize,
    /// The first block of `extra` features, and how many further the next one is.
    pub first_extra: usize,
    pub extra_step: usize,
}

/// Whether ups are cut from within blocks.
pub(super) fn is_cut(problem: &Problem) -> bool {
    gated(problem) && !problem.n.is_multiple_of(up_unit(problem))
}

fn cut(problem: &Problem, tile: usize) -> Option<Cut> {
    let unit = up_unit(problem);
    let first = problem.n / tile;
    let shift = problem.n - first * tile;
    let extra = if shift < unit { unit } else { tile };
    let (first_extra, extra_step) = ((first + 1) * tile / extra, tile / extra);
    is_cut(problem).then_some(Cut { block: tile, extra, first, shift, first_extra, extra_step })
}

impl Cut {
    /// Features of the sums that ups are shifted out of.
    pub fn ups(&self) -> usize {
        self.block + self.extra
    }
}

/// What the index of the first of a block's features is a multiple of: features are lanes of sums and biases beside rows of
/// activations; else they are rows, of the weight too.
pub(super) fn up_unit(problem: &Problem) -> usize {
    match problem.layout {
        Layout::RowMajor | Layout::WeightTransposed => LANES,
        Layout::FeatureMajor => sublanes(problem.weight_element()),
    }
}

/// A problem cut into blocks.
pub(super) struct Blocks<'p> {
    pub(super) problem: &'p Problem,
    /// Sizes along rows, columns, depth.
    pub(super) block: [usize; 3],
    pub(super) counts: [usize; 3],
}

impl<'p> Blocks<'p> {
    pub(super) fn new(problem: &'p Problem, tiles: Tiles) -> Self {
        let Shape { rows, columns, depth } = shape(problem);
        let block = match problem.layout {
            Layout::FeatureMajor => [tiles.n, tiles.m, tiles.k],
            Layout::RowMajor | Layout::WeightTransposed => [tiles.m, tiles.n, tiles.k],
        };
        let counts = [rows.div_ceil(block[0]), columns.div_ceil(block[1]), depth.div_ceil(block[2])];
        Self { problem, block, counts }
    }

    /// Steps of each grid dimension.
    fn grid(&self, order: Order) -> [usize; 3] {
        let [rows, columns, depth] = self.counts;
        match order {
            Order::RowsOuter => [rows, columns, depth],
            Order::ColumnsOuter => [columns, rows, depth],
        }
    }

    /// Input type, and whether gates and ups are two products of one kernel.
    ///
    /// A chunk holds its sums, and what of the weight it multiplies at a time. True f32 products split each operand into
    /// three bf16 parts, and the compiler keeps those of the whole depth (seen: 2,105,344 bytes for 128 rows of one side and
    /// 2 x 128 of the other at a depth of 1024, 819,200 at 384).
    fn spilling(&self, info: &ChipInfo) -> Spilling {
        let Chunk { rows, columns, depth } = chunk(info, self);
        let [left, right] = self.sides();
        let products = left.max(right);
        // Registers are whole: columns are lanes of the sums, and of the right side unless that is a transposed weight.
        let (rows, lanes) = (rows.next_multiple_of(SUBLANES), columns.next_multiple_of(LANES));
        let columns = match self.problem.layout {
            Layout::WeightTransposed => columns.next_multiple_of(SUBLANES),
            Layout::RowMajor | Layout::FeatureMajor => lanes,
        };
        let live = match splits(self.problem) {
            true => self.block[2] * (left * rows + right * columns) * 6,
            false => products * rows * lanes * 4 + (depth * columns * 2).min(HELD_OF_WEIGHT),
        };
        let mut family = if splits(self.problem) { "f32" } else { "bf16" }.to_owned();
        if let Some(Quantized { weight, group, activations }) = self.problem.quantized {
            family += &format!(" {weight}");
            family += if activations { " on both sides" } else { "" };
            family += if group.is_some() { " in groups" } else { "" };
        }
        family += if gated(self.problem) { " gated" } else { "" };
        Spilling { family, live: Bytes(live as u64) }
    }

    /// What is kept free for spills. On v4 a weight of 8 bits is held as bf16 for all of a chunk's depth (8 x 14336 x 4096 in
    /// tiles of 1024 x 7168 spills 3.6 MiB there, and nothing on v5p).
    fn margin(&self, chip: Chip) -> Bytes {
        let info = chip.info();
        let held = match self.problem.quantized {
            Some(_) if chip == Chip::V4 => self.block[2] * chunk(&info, self).columns.next_multiple_of(LANES) * 2,
            _ => 0,
        };
        evidence::margin(&self.spilling(&info)).max(Bytes(2 * held as u64))
    }

    fn cut(&self) -> Option<Cut> {
        cut(self.problem, self.block[self.features()])
    }

    /// Which of `block` the weight's features are.
    fn features(&self) -> usize {
        if self.problem.layout == Layout::FeatureMajor { 0 } else { 1 }
    }

    /// Size of a window's block along an axis, and number of blocks that it walks over.
    fn of_window(&self, window: &ArrayWindow, axis: Axis) -> (usize, usize) {
        let (block, count) = self.along(axis);
        let feature_axis = if self.features() == 0 { Axis::Rows } else { Axis::Columns };
        let all = 2 * self.problem.n;
        let size = match (window.part, self.cut()) {
            (Part::Gates | Part::Ups, Some(cut)) if axis == feature_axis => cut.block.min(all),
            (Part::UpsBehind, Some(cut)) if axis == feature_axis => cut.extra.min(all),
            _ => block,
        };
        (size, count)
    }

    /// Whether gates and ups are columns of one product: where a block of each is no more than half of a matrix unit, whose other
    /// half would be idle. (A block of 128 is all that n = 43 x 128 allows, and the units of v6e have 256 columns.)
    pub(super) fn joins(&self, info: &ChipInfo) -> bool {
        let columns = self.block[1];
        let are_columns = gated(self.problem) && self.problem.layout != Layout::FeatureMajor && self.cut().is_none();
        are_columns && self.problem.group().is_none() && columns.is_multiple_of(LANES) && 2 * columns <= info.mxu
    }

    /// How many products of a block of gates' size one block takes.
    pub(super) fn products(&self) -> f64 {
        match (gated(self.problem), self.cut()) {
            (false, _) => 1.0,
            (true, None) => 2.0,
            (true, Some(cut)) => (cut.block + cut.ups()) as f64 / cut.block as f64,
        }
    }

    /// Windows of each side: the weight of a gated product has two.
    fn sides(&self) -> [usize; 2] {
        let weights = if gated(self.problem) { 2 } else { 1 };
        if self.problem.layout == Layout::FeatureMajor { [weights, 1] } else { [1, weights] }
    }

    /// Every VMEM buffer, in the order of the kernel's operands.
    fn report(&self, chip: Chip) -> VmemReport {
        let mut buffers: Vec<Buffer> = windows(self.problem).iter().map(|window| self.buffer(window, chip)).collect();
        let [rows, columns, depth] = self.block;
        if let Some(cut) = self.cut() {
            for (name, features) in
                names(self.problem, "sum", "sum_gate", "sum_up").into_iter().zip([cut.block, cut.ups()])
            {
                let dims = sum_dims(self.block, self.features(), features);
                buffers.push(Buffer::new(name, BufferKind::Scratch, accumulator(self.problem, chip), &dims, 1));
            }
        } else if self.counts[2] > 1 {
            for name in names(self.problem, "sum", "sum_gate", "sum_up") {
                let element = accumulator(self.problem, chip);
                buffers.push(Buffer::new(name, BufferKind::Scratch, element, &[rows, columns], 1));
            }
        }
        if chip == Chip::V4 && self.problem.quantized.is_some() {
            // Elements of 8 bits are unpacked through a register's worth of scratch (measured for every layout).
            buffers.push(Buffer::new("unpacking", BufferKind::InternalScratch, Element::I32, &[SUBLANES, LANES], 1));
        }
        let rows_of_scales = if chip == Chip::V4 { self.scales_spread(&chip.info()) } else { 0 };
        if rows_of_scales > 0 {
            let dims = [rows_of_scales * SUBLANES, LANES];
            buffers.push(Buffer::new("scales spread", BufferKind::InternalScratch, Element::I32, &dims, 1));
        }
        let of_product = self.problem.group().map_or(depth, |group| group.min(depth));
        if chip == Chip::V4 && self.problem.input == Element::Bf16 && rows <= 4 && of_product > LANES {
            // Rows packed into less than a tile are spread over one before the product: on v4 through 36 KiB of scratch
            // (measured for 1 to 4 rows and any depth beyond one tile, which in groups is a group's).
            buffers.push(Buffer::new("row spread", BufferKind::InternalScratch, Element::I32, &[72, LANES], 1));
        }
        VmemReport { buffers }
    }

    /// How many rows of scales v4 spreads over a register, each through one of scratch: those of groups whose number is known
    /// at run time only, as there are several steps along `k`, and that are wider than a register (measured for both layouts
    /// that have them, gated and not, of 5 to 512 rows).
    fn scales_spread(&self, info: &ChipInfo) -> usize {
        let [rows, _, depth] = self.block;
        let Some(group) = self.problem.group().filter(|_| self.counts[2] > 1) else { return 0 };
        if self.problem.layout == Layout::FeatureMajor {
            return 0;
        }
        let windows = windows(self.problem).into_iter().filter(|window| window.side == Side::Scale);
        let columns = windows.map(|window| self.of_window(&window, Axis::Columns).0).filter(|&columns| columns > LANES);
        let registers: usize = columns.map(|columns| columns.div_ceil(LANES)).sum();
        registers * rows.div_ceil(chunk(info, self).rows) * depth.div_ceil(group)
    }

    fn buffer(&self, window: &ArrayWindow, chip: Chip) -> Buffer {
        let kind = if window.side == Side::Out { BufferKind::OutputWindow } else { BufferKind::InputWindow };
        // A window that never moves has one buffer: there is no next block to fetch meanwhile.
        let moves = window.axes.iter().any(|&axis| self.along(axis).1 > 1) && !self.one_step_per_core(chip);
        let block = window.axes.map(|axis| self.of_window(window, axis).0);
        Buffer::new(window.name, kind, window.element, &block, if moves { 2 } else { 1 })
    }

    /// Whether each core has one block, and that in one step: the cores share the blocks of rows and columns.
    fn one_step_per_core(&self, chip: Chip) -> bool {
        let [rows, columns, steps] = self.counts;
        steps == 1 && rows.saturating_mul(columns) <= chip.info().cores
    }

    /// Size of a block and number of blocks along an axis.
    fn along(&self, axis: Axis) -> (usize, usize) {
        match axis {
            Axis::Rows => (self.block[0], self.counts[0]),
            Axis::Columns => (self.block[1], self.counts[1]),
            Axis::Depth => (self.block[2], self.counts[2]),
            Axis::Groups => (self.problem.groups(), 1),
            Axis::One => (1, 1),
        }
    }

    /// Multiplications in the text of the body: the first and the last step along `k` have their own copies of it.
    fn multiplications(&self) -> usize {
        self.block.iter().product::<usize>() * self.counts[2].min(2) * self.products().ceil() as usize
    }
}

/// Sizes of the sums of `features` of a [`Cut`] weight, in whole registers.
pub(super) fn sum_dims(block: [usize; 3], axis: usize, features: usize) -> [usize; 2] {
    let mut dims = [block[0], block[1]];
    dims[axis] = features;
    dims[0] = dims[0].next_multiple_of(SUBLANES);
    dims
}

/// Bytes of a narrow weight that are held at once: however deep a chunk is, the compiler loads it piece by piece.
const HELD_OF_WEIGHT: usize = 256 << 10;
/// Rows of a chunk of narrow elements.
const MOST_ROWS: usize = 256;
/// Depth of a chunk of a gated product of narrow elements: as much of x is held for gates and ups (at a depth of 8192, 4 MiB
/// of spills were seen).
const MOST_DEPTH: usize = 512;

/// The chunk of a tile: few enough values for the registers, as many columns as a matrix unit has (half of them halve
/// the speed on v6e and tpu7x). More rows than 256 gain no cycles and spill. True f32 products split each operand into
/// three bf16 parts, all of which are live: they go through the depth in pieces.
pub(super) fn chunk(info: &ChipInfo, blocks: &Blocks) -> Chunk {
    let [rows, columns, depth] = blocks.block;
    let (most_rows, most_depth) = match (splits(blocks.problem), gated(blocks.problem)) {
        (true, _) => (128, 128),
        (false, true) => (MOST_ROWS, MOST_DEPTH),
        (false, false) => (MOST_ROWS, depth),
    };
    Chunk { rows: rows.min(most_rows), columns: columns.min(info.mxu), depth: depth.min(most_depth) }
}

/// The cheapest tiles that fit `limit` with room for spills; without it, if none do. Of tiles that cost about the same, as where
/// their bytes decide, those whose steps take least.
pub(super) fn choose(problem: &Problem, chip: Chip, limit: Bytes) -> Option<Tiles> {
    let mut best: Option<(bool, f64)> = None;
    // What may be the best, or close to it: where it fits, and whether with room for spills.
    let mut near: Vec<(bool, Estimate, Tiles)> = Vec::new();
    for tiles in every(problem) {
        let blocks = Blocks::new(problem, tiles);
        let cost = blocks.cost(chip);
        // The report allocates: it is made for tiles that may win.
        if best.is_some_and(|(roomy, least)| roomy && cost.cycles >= least * ALIKE) {
            continue;
        }
        let taken = blocks.report(chip).total();
        if taken > limit {
            continue;
        }
        let roomy = taken + blocks.margin(chip) <= limit;
        if best.is_none_or(|(most, least)| (roomy, -cost.cycles) > (most, -least)) {
            best = Some((roomy, cost.cycles));
        }
        near.push((roomy, cost, tiles));
    }
    let (roomy, least) = best?;
    let alike = near.into_iter().filter(|&(of, cost, _)| of == roomy && cost.cycles <= least * ALIKE);
    alike.min_by(|(_, a, _), (_, b, _)| a.static_cycles.total_cmp(&b.static_cycles)).map(|(_, _, tiles)| tiles)
}

/// Tiles whose cycles are so close are alike to the model.
const ALIKE: f64 = 1.02;

/// Tiles that fit `limit`, the cheapest first: as many as are worth a compilation.
pub(super) fn fitting(problem: &Problem, chip: Chip, limit: Bytes) -> Vec<Tiles> {
    const MOST: usize = 64;
    let fits = |&tiles: &Tiles| Blocks::new(problem, tiles).report(chip).total() <= limit;
    let mut all: Vec<Tiles> = every(problem).filter(fits).collect();
    all.sort_by_cached_key(|&tiles| {
        let Estimate { cycles, static_cycles, .. } = Blocks::new(problem, tiles).cost(chip);
        (cycles as u64, static_cycles as u64)
    });
    all.truncate(MOST);
    all
}

/// Tiles worth trying, those that the kernel can be written with and that the compiler gets through.
fn every(problem: &Problem) -> impl Iterator<Item = Tiles> {
    let (unit_m, unit_n) = units(problem);
    let (ms, mut ns) = (candidates(problem.m, unit_m, MAX_TILE), candidates(problem.n, unit_n, MAX_TILE));
    if is_cut(problem) {
        // Least is fetched twice where a block begins shortly before the first up.
        let (unit, before) = (up_unit(problem), problem.n / up_unit(problem));
        let parts =
            (1..=before.isqrt()).flat_map(|part| [part, before / part]).filter(|part| before.is_multiple_of(*part));
        ns.extend(
            parts.map(|part| part * unit).chain([problem.n.next_multiple_of(unit)]).filter(|&tile| tile <= MAX_TILE),
        );
        ns.sort_unstable();
        ns.dedup();
    }
    ns.retain(|&n| !gated(problem) || halves_align(problem, n));
    let mut ks = candidates(problem.k, LANES, MAX_DEPTH);
    ks.retain(|&k| problem.group().is_none_or(|group| groups_align(problem.k, group, k)));
    let all = ms.into_iter().flat_map(move |m| {
        let ks = ks.clone();
        ns.clone().into_iter().flat_map(move |n| ks.clone().into_iter().map(move |k| Tiles { m, n, k }))
    });
    all.filter(move |&tiles| Blocks::new(problem, tiles).multiplications() <= MAX_MULTIPLICATIONS)
}

const MAX_TILE: usize = 4096;
const MAX_DEPTH: usize = 8192;
/// Multiplications that the body may spell out. It is straight-line code, so they are what the compiler's time (about a
/// minute at 2^32) and the program's size grow with.
const MAX_MULTIPLICATIONS: usize = 1 << 31;

/// Tile sizes worth trying along one dimension: all of it, powers of two, three times powers of two, and what cuts it into
/// a few even parts.
fn candidates(size: usize, unit: usize, most: usize) -> Vec<usize> {
    let powers = (0..16).flat_map(|power| [unit << power, (unit * 3) << power]);
    let even = (2..=8).map(|parts| size.div_ceil(parts).next_multiple_of(unit));
    let mut sizes: Vec<usize> = powers.chain(even).filter(|&tile| tile < size && tile <= most).collect();
    if size <= most {
        sizes.push(size);
    }
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        matmul::{Activation, Epilogue, Spec},
        vmem::{Spills, Suggestion, Verdict},
    };

    fn problem(m: usize, k: usize, n: usize) -> Problem {
        Problem::new(Spec::new([m, k, n], Element::Bf16)).unwrap()
    }

    fn plan(problem: Problem, chip: Chip, tiles: Option<&str>, limit: Option<u64>) -> Result<Plan, PlanError> {
        let tiles = tiles.map(Tiles::parse).transpose()?;
        Plan::new(problem, chip, Options { tiles, vmem_limit: limit.map(Bytes::mib) })
    }

    /// The products of a Llama-3.1-8B layer and head, as `tests/certify.rs` has them compiled.
    #[test]
    fn chosen_tiles() {
        let mut table = String::new();
        for chip in [Chip::V5p, Chip::V6e] {
            for (k, n) in [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (4096, 128_256)] {
                let tiles = [8, 512, 4096].map(|m| {
                    let plan = plan(problem(m, k, n), chip, None, None).unwrap();
                    assert!(plan.vmem().total() < plan.limit());
                    format!("{:<16}", plan.tiles().to_string())
                });
                table += &format!("{chip:<4} {:<13} {}\n", format!("{k}x{n}"), tiles.concat().trim_end());
            }
        }
        insta::assert_snapshot!(table);
    }

    #[test]
    fn a_plan_lists_every_buffer() {
        let plan = plan(problem(512, 4096, 14336), Chip::V5p, Some("512,1024,1024"), None).unwrap();
        assert_eq!(plan.name(), "matmul-m512-n1024-k1024");
        assert_eq!(plan.grid(), [1, 14, 4]);
        insta::assert_snapshot!(plan.vmem());
    }

    /// Planning takes milliseconds: some thousand candidates, a microsecond or two each.
    #[test]
    fn candidates_are_few() {
        let many = [4096, 14336, 128_256].map(|size| candidates(size, LANES, MAX_DEPTH).len());
        assert!(many.iter().product::<usize>() < 10_000, "{many:?}");
    }

    #[test]
    fn what_cannot_be_planned_says_why_and_what_to_do() {
        let refusal = |tiles, limit| plan(problem(100, 300, 500), Chip::V5p, tiles, limit).unwrap_err().to_string();
        let gated = Spec {
            epilogue: Epilogue { activation: Activation::SiluGate, ..Epilogue::NONE },
            ..*problem(64, 256, 384)
        };
        let halves = plan(Problem::new(gated).unwrap(), Chip::V5p, Some("64,256,256"), None).unwrap_err().to_string();
        let cut = Spec { layout: Layout::WeightTransposed, ..*problem(64, 256, 160) };
        let cut = Spec { epilogue: gated.epilogue, ..cut };
        let cut = plan(Problem::new(cut).unwrap(), Chip::V5p, Some("64,160,256"), None).unwrap_err().to_string();
        let quantized = Quantized { weight: Element::I8, group: Some(384), activations: false };
        let quantized = Spec { quantized: Some(quantized), ..*problem(64, 1024, 256) };
        let quantized = Problem::new(quantized).unwrap();
        let grouped = plan(quantized, Chip::V5p, Some("64,128,512"), None).unwrap_err().to_string();
        let lines = [
            refusal(Some("10,128,128"), None),
            refusal(Some("100,100,128"), None),
            refusal(Some("100,128,512"), None),
            refusal(Some("0,128,128"), None),
            refusal(Some("8,128"), None),
            refusal(None, Some(65)),
            refusal(None, Some(0)),
            halves,
            cut,
            grouped,
        ];
        insta::assert_snapshot!(lines.join("\n"));
    }

    /// Where no tiles leave room for spills, tiles are chosen without.
    #[test]
    fn little_vmem_still_has_tiles() {
        let gated = Spec {
            input: Element::F32,
            epilogue: Epilogue { activation: Activation::SiluGate, ..Epilogue::NONE },
            ..*problem(64, 256, 384)
        };
        let options = Options { tiles: None, vmem_limit: Some(Bytes::kib(400)) };
        let plan = Plan::new(Problem::new(gated).unwrap(), Chip::V5p, options).unwrap();
        assert!(plan.vmem().total() <= plan.limit());
        let margin = evidence::margin(plan.spilling());
        assert!(plan.vmem().total() + margin > plan.limit(), "{margin}");
    }

    /// What does not fit keeps the problem and changes tiles first, then the limit.
    #[test]
    fn suggestions_work() {
        let large = plan(problem(4096, 4096, 4096), Chip::V5p, Some("1024,1024,4096"), None).unwrap();
        let Verdict::DoesNotFit { suggestions, .. } = large.verdict(Spills::Unknown) else { panic!("it fits") };
        let [Suggestion::Tiles { tiles, .. }, Suggestion::Limit { bytes, .. }] = &suggestions[..] else {
            panic!("{suggestions:?}")
        };
        let smaller = plan(problem(4096, 4096, 4096), Chip::V5p, Some(tiles), None).unwrap();
        assert!(matches!(
            smaller.verdict(evidence::spills(&smaller)),
            Verdict::Fits { .. } | Verdict::LikelyFits { .. }
        ));
        assert_eq!(*bytes, large.vmem().total());
    }

    /// The plan's buffers are the ones that the kernel declares.
    #[test]
    fn the_kernel_declares_the_plan() {
        let context = pagoda_ir::Context::new();
        let plan = plan(problem(300, 700, 500), Chip::V6e, Some("128,256,256"), Some(8)).unwrap();
        let kernel = plan.kernel(&context).unwrap();
        let signature = pagoda_ir::mosaic::Signature::read(kernel.module()).unwrap();
        assert_eq!(signature.vmem_bytes() as u64, plan.vmem().total().0);
        assert_eq!(kernel.vmem_limit(), Some(8 << 20));
        let names: Vec<_> = signature.arguments.iter().map(|argument| argument.name.as_str()).collect();
        let planned: Vec<_> = plan.vmem().buffers.iter().map(|buffer| buffer.name.as_str()).collect();
        assert_eq!(names, planned);
    }

    /// The call says what a launch costs; of a stack, one layer is read.
    #[test]
    fn a_call_says_what_it_costs() {
        let context = pagoda_ir::Context::new();
        let epilogue = Epilogue { bias: true, activation: Activation::SiluGate, residual: true };
        let costs = [1, 4].map(|layers| {
            let layout = Layout::WeightTransposed;
            let spec = Spec { epilogue, layout, layers, ..*problem(8, 256, 384) };
            let plan = plan(Problem::new(spec).unwrap(), Chip::V5p, None, None).unwrap();
            let kernel = plan.kernel(&context).unwrap();
            let config = pagoda_ir::mosaic::wire::backend_config(&kernel);
            let config: serde_json::Value = serde_json::from_str(&config).unwrap();
            ["flops", "transcendentals", "bytes_accessed"]
                .map(|key| config["custom_call_config"]["cost_estimate"][key].as_u64().unwrap())
        });
        // x, w, bias, residual, out; and the layer's index.
        let bytes = 2 * (8 * 256 + 768 * 256 + 768 + 8 * 384 + 8 * 384);
        assert_eq!(costs, [bytes, bytes + 4].map(|bytes| [2 * 8 * 256 * 768, 8 * 384, bytes]));
    }

    /// As libtpu 0.0.52 reports: two blocks are one to a core of v5p, and nothing is fetched ahead there.
    #[test]
    fn a_single_step_per_core_needs_one_buffer() {
        for (chip, problem, copies) in [
            (Chip::V5p, problem(1024, 512, 512), 1),
            (Chip::V5e, problem(1024, 512, 512), 2),
            (Chip::V5p, problem(1536, 512, 512), 2),
            (Chip::V5p, problem(512, 1024, 512), 2),
        ] {
            let plan = plan(problem, chip, Some("512,512,512"), None).unwrap();
            assert_eq!(plan.vmem().buffers[0].copies, copies, "{chip} {:?}", plan.grid());
        }
    }
}
