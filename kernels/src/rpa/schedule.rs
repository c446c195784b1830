//! What the cores of a launch do over a known batch: as the kernels list their work and share it, counted on the host.
//!
//! `mosaic::mixed` and `mosaic::decode` say what an entry, a segment and a step are. Here they are counted by what decides
//! their time: form, width, mask. The counts are what the model of cost is fitted to ([`crate::cost`]), and they say which of
//! two cores that share a batch has more to do. Pure, and fast: a planner asks for every candidate.

use pagoda_ir::{Element, mosaic::tiling::LANES};

use super::{
    kv_layout::Half,
    mosaic::few_rows::products_at_once,
    plan::{CHUNK, MAX_SPANS, Part, Plan, Split, decode},
    problem::Kind,
};
use crate::{
    chips::Chip,
    cost::{Copies, Family, Stage, UNITS, Work},
    random::Lengths,
};

/// Launches over any batch.
pub(super) const MIXED: Family = Family {
    name: "rpa mixed",
    units: &[
        "launch",
        "entries and segments in the list",
        "blocks",
        "bands",
        "registers of finished rows",
        "segments",
        "KV steps of blocks",
        "parts of heads",
        "KV steps of bands",
        "registers of logits of wide blocks",
        "matrix unit or logits",
        "registers of rows updated",
        "registers of KV loaded for bands",
        "pages",
        "registers of logits masked",
        "registers of queries turned",
        "pages of short blocks",
    ],
};

/// Launches of decode rows.
pub(super) const DECODE: Family = Family {
    name: "rpa decode",
    units: &[
        "launch",
        "sequences in the list",
        "sequences",
        "registers of finished rows",
        "registers of queries",
        "KV steps",
        "phases",
        "heads",
        "matrix unit",
        "registers of logits",
        "matrix unit or logits",
        "registers of KV loaded",
        "registers of KV masked",
        "pages",
        "masked steps",
        "keys cleared",
        "pages of short blocks",
    ],
};

/// Vector operations on a register of logits, and slots for them in a bundle.
const OPS_PER_REGISTER: f64 = 9.0 / 4.0;
/// Words of a register.
const REGISTER: f64 = 1024.0;
/// The least rows that the matrix units take as long for, as a part of their side.
const LEAST_ROWS: f64 = 0.67;
/// Keys of a block from which on logits leave the registers while they are worked on.
const WIDE_KEYS: usize = 512;
/// bf16 passes of a true f32 product.
const F32_PASSES: f64 = 6.0;

/// The steps of the busiest core.
pub(super) fn stages(plan: &Plan, batch: &[Lengths]) -> Vec<Stage> {
    match plan.problem().kind {
        Kind::Mixed => {
            let (listed, cores) = mixed(plan, batch);
            stages_of_mixed(plan, listed, &cores[most(&cores, |core| core.load)])
        }
        Kind::Decode => {
            let cores = decoding(plan, batch);
            stages_of_decode(plan, batch.len(), &cores[most(&cores, |core| core.load)])
        }
    }
}

/// The core that has the most to do, as the kernel counts it; the first of equal ones.
pub(super) fn busiest(plan: &Plan, batch: &[Lengths]) -> usize {
    match plan.problem().kind {
        Kind::Mixed => most(&mixed(plan, batch).1, |core| core.load),
        Kind::Decode => most(&decoding(plan, batch), |core| core.load),
    }
}

fn most<T>(cores: &[T], load: impl Fn(&T) -> i64) -> usize {
    (0..cores.len()).rev().max_by_key(|&core| load(&cores[core])).unwrap_or(0)
}

/// Steps of one sort, and the pages that they wait for.
#[derive(Clone, Copy, Debug, Default)]
struct Steps {
    count: usize,
    pages: usize,
    /// Those of short blocks, which are asked for one by one.
    asked: usize,
}

impl Steps {
    fn add(&mut self, count: usize, pages: usize, asked: usize) {
        *self = Self { count: self.count + count, pages: self.pages + pages, asked: self.asked + asked };
    }
}

/// More forms than a KV block is worked on in: [`Plan::spans`] or [`Plan::widths`], masked or not, the first of its entry or not.
const FORMS: usize = MAX_SPANS * 2 * 2;

/// What a core does in a launch over any batch.
#[derive(Clone, Copy, Debug, Default)]
struct Mixed {
    /// As the kernel counts it.
    load: i64,
    /// Entries of one form, by form: blocks, then bands.
    entries: [usize; 2],
    segments: usize,
    /// By entry; of steps that are not an entry's last one, and of those that are.
    steps: [[[Steps; FORMS]; 2]; 2],
}

impl Mixed {
    const BLOCK: usize = 0;
    const BAND: usize = 1;

    const fn form(extent: usize, masked: bool, first: bool) -> usize {
        extent * 4 + masked as usize * 2 + first as usize
    }
}

/// The entries and segments of the list, and what each core has of them: as `mosaic::mixed` goes through the rows.
fn mixed(plan: &Plan, batch: &[Lengths]) -> (usize, Vec<Mixed>) {
    let problem = plan.problem();
    let (block, band, keys) = (plan.block_rows(), plan.band(), plan.keys());
    let of_blocks = |is_last| plan.spans_of(is_last).iter().map(|span| span.bound).collect();
    // Of a step that is not the last one of its entry, and of the last one.
    let bounds = [[of_blocks(false), of_blocks(true)], [plan.widths(), plan.widths()]];
    let costs = plan.costs();
    let first_rows: Vec<usize> = std::iter::once(0)
        .chain(batch.iter().scan(0, |row, of| {
            *row += of.q_len;
            Some(*row)
        }))
        .collect();
    let mut cores = vec![Mixed::default(); plan.shares()];
    let mut listed = 0;
    let [mut end, _] = plan.padded_rows();
    let total = first_rows[batch.len()];
    let live = total.next_multiple_of(band);
    let mut sequence = batch.len().saturating_sub(1);
    while end > 0 {
        listed += 1;
        let core = if cores.len() > 1 && cores[0].load > cores[1].load { 1 } else { 0 };
        let top = end.next_multiple_of(band);
        if top > live {
            end = top - (top - live).min(block);
            cores[core].load += costs[Mixed::BAND].of(0, 0);
            continue;
        }
        while first_rows[sequence] >= end.min(total) {
            sequence -= 1;
        }
        let begins = first_rows[sequence];
        let own = match plan.shares_bands() {
            true => top - begins / band * band,
            false => top.saturating_sub(begins.next_multiple_of(band)),
        };
        let is_block = plan.has_blocks() && own >= plan.least_rows();
        let rows = if is_block { own.min(block) } else { band };
        let row = top - rows;
        end = if is_block { begins.max(row) } else { row };
        let start = if is_block { top.saturating_sub(block) } else { row };
        let of = &mut cores[core];
        let form = if is_block { Mixed::BLOCK } else { Mixed::BAND };
        of.entries[form] += 1;
        let (mut blocks, mut lanes) = (0, 0);
        for segment in (0..=sequence).rev().take_while(|&of| first_rows[of + 1] > end) {
            let (from, to, kv_len) = (first_rows[segment], first_rows[segment + 1], batch[segment].kv_len);
            let (first, behind) = (from.max(row) - start, to.min(top) - start);
            // Positions may be below 0 at the start of an entry that begins before the sequence.
            let origin = kv_len as i64 - to as i64 + start as i64;
            let last = origin + behind as i64;
            if first >= behind || kv_len == 0 || last <= 0 {
                continue;
            }
            let last = last as usize;
            let stop = last.div_ceil(keys);
            let begin = problem
                .sliding_window
                .map_or(0, |window| (origin + first as i64 - (window as i64 - 1)).max(0) as usize / keys);
            listed += 1;
            of.segments += 1;
            blocks += (stop - begin) as i64;
            lanes += (last - begin * keys).div_ceil(LANES) as i64;
            let is_whole = is_block && behind - first == block && problem.sliding_window.is_none();
            let unmasked = match is_whole && plan.has_inner_steps() {
                true => ((origin + 1).max(0) as usize / keys).min(stop).saturating_sub(begin),
                false => 0,
            };
            let (of_tiles, bounds): (_, &[Vec<usize>; 2]) = (plan.tiles().kv_pages, &bounds[form]);
            // The keys that an entry's last row sees, were it live; from the first block on that it does not see all of.
            let seen = origin + if is_block { block as i64 } else { behind as i64 };
            let extent = |number: usize| {
                let (seen, bounds) = (seen - (number * keys) as i64, &bounds[usize::from(number + 1 == stop)]);
                bounds.iter().position(|&bound| seen <= bound as i64).unwrap_or(bounds.len() - 1)
            };
            let narrow = bounds[0].iter().rev().nth(1).map_or(stop, |&bound| (seen - bound as i64).max(0) as usize);
            let narrow = narrow.div_ceil(keys).min(stop - 1);
            let [first_masked, tail] = [begin + unmasked, narrow.max(begin + 1)];
            let mut add = |number: usize, count: usize| {
                let is_last = number + 1 == stop;
                let left = (kv_len - number * keys).div_ceil(problem.page_size);
                let pages = if is_last { left.min(of_tiles) } else { count * of_tiles };
                let asked = if pages < count * of_tiles { pages } else { 0 };
                let (is_masked, is_first) = (number >= first_masked, is_block && number == begin);
                let of_form = Mixed::form(extent(number), is_masked, is_first);
                of.steps[form][usize::from(is_last)][of_form].add(count, pages, asked);
            };
            add(begin, 1);
            let masked = first_masked.clamp(begin + 1, tail);
            for [from, to] in [[begin + 1, masked], [masked, tail]] {
                if to > from {
                    add(from, to - from);
                }
            }
            (tail..stop).for_each(|number| add(number, 1));
        }
        of.load += costs[form].of(blocks, lanes);
    }
    (listed, cores)
}

/// What every step of a plan depends on.
struct Sizes {
    heads: f64,
    dim: usize,
    side: usize,
    /// Passes of a product, and matrix units of a core.
    passes: f64,
    units: f64,
    pieces: f64,
}

impl Sizes {
    fn of(plan: &Plan) -> Self {
        let (problem, info) = (plan.problem(), plan.chip().info());
        Self {
            heads: plan.head_block() as f64,
            dim: problem.head_dim.next_multiple_of(LANES),
            side: info.mxu,
            passes: if problem.precision.kv == Element::F32 { F32_PASSES } else { 1.0 },
            units: info.peak_flop_per_cycle_and_core as f64 / (2 * info.mxu * info.mxu) as f64,
            pieces: problem.head_dim.div_ceil(LANES) as f64,
        }
    }

    /// Cycles of the matrix units for both products of one head: for each tile of keys or values, the rows that go through
    /// it, but no fewer than loading the next one takes.
    fn matrix(&self, rows: f64, width: usize) -> f64 {
        let tiles = width.div_ceil(self.side) * self.dim.div_ceil(self.side);
        let rows = rows.max(LEAST_ROWS * self.side as f64);
        2.0 * self.on_units(tiles, rows) * rows * self.passes
    }

    /// Tiles of the busiest matrix unit. Units share a tile's rows where they are a multiple of the tiles; of a number of tiles
    /// that divides into the units in neither way some wait in the end, the shorter the more rows there are.
    fn on_units(&self, tiles: usize, rows: f64) -> f64 {
        const FEW_ROWS: f64 = 256.0;
        let (units, even) = (self.units as usize, tiles as f64 / self.units);
        match units.is_multiple_of(tiles) {
            true => even,
            false => even + (tiles.div_ceil(units) as f64 - even) * (FEW_ROWS / rows).min(1.0),
        }
    }

    /// As [`Sizes::matrix`], of rows that are worked on in parts.
    fn matrix_in_parts(&self, rows: f64, width: usize) -> f64 {
        let (whole, rest) = ((rows / CHUNK as f64).floor(), rows % CHUNK as f64);
        whole * self.matrix(CHUNK as f64, width) + if rest > 0.0 { self.matrix(rest, width) } else { 0.0 }
    }

    /// Registers of maximum, sum and accumulator of some rows.
    fn row_registers(&self, rows: f64) -> f64 {
        rows * (self.dim + 2 * LANES) as f64 / REGISTER
    }

    /// Registers of keys and values.
    fn kv_registers(&self, width: usize) -> f64 {
        (width * self.dim) as f64 / REGISTER
    }
}

/// Cycles of the copies of some pages of a block: they follow one another on each of its semaphores, without a gap.
fn copies(plan: &Plan, pages: f64, semaphores: usize) -> f64 {
    let problem = plan.problem();
    let token = plan.head_block() * Half::ALL.len() * problem.head_dim * problem.precision.kv.bytes();
    let bytes = (problem.page_size * token) as f64;
    let (latency, rate) = copy_rate(plan.chip());
    latency + pages * bytes / rate / semaphores as f64
}

/// Cycles before the first byte of a copy, and bytes of a cycle, by the compiler's static estimate (libtpu 0.0.52; v4, of which
/// it has none, as v5p).
fn copy_rate(chip: Chip) -> (f64, f64) {
    match chip {
        Chip::V5e => (1143.0, 489.0),
        Chip::V4 | Chip::V5p => (678.0, 1236.0),
        Chip::V6e => (557.0, 772.0),
        Chip::Tpu7x => (600.0, 1580.0),
    }
}

fn stages_of_mixed(plan: &Plan, listed: usize, core: &Mixed) -> Vec<Stage> {
    let (problem, sizes) = (plan.problem(), Sizes::of(plan));
    let [block, band] = [plan.block_rows(), plan.band()].map(|rows| (rows * problem.group()) as f64);
    let turned = |rows: f64| if problem.head_dim.is_multiple_of(LANES) { 0.0 } else { sizes.row_registers(rows) };
    let mut launch = [0.0; UNITS];
    launch[..6].copy_from_slice(&[
        1.0,
        listed as f64,
        core.entries[Mixed::BLOCK] as f64,
        core.entries[Mixed::BAND] as f64,
        [block, band].iter().zip(core.entries).map(|(rows, of)| of as f64 * sizes.row_registers(*rows)).sum::<f64>()
            * sizes.heads,
        core.segments as f64,
    ]);
    launch[15] = [block, band].iter().zip(core.entries).map(|(&rows, of)| of as f64 * turned(rows)).sum::<f64>();
    launch[15] *= sizes.heads;
    let ahead = (plan.kv_buffers() - 1) as f64;
    let mut stages = vec![Stage::of(1.0, launch)];
    let spans = |is_last| plan.spans_of(is_last).into_iter().map(|span| span.parts).collect();
    let of_band = Part { row: 0, rows: plan.band(), member: 0, members: problem.group() };
    let widths: Vec<_> = plan.widths().into_iter().map(|width| vec![(of_band, width)]).collect();
    let [blocks, bands] = &core.steps;
    let forms = [
        (true, spans(false), &blocks[0]),
        (true, spans(true), &blocks[1]),
        (false, widths.clone(), &bands[0]),
        (false, widths, &bands[1]),
    ];
    for (is_block, extents, of_form) in forms {
        for (form, steps) in of_form.iter().enumerate().filter(|(_, steps)| steps.count > 0) {
            let (parts, is_masked, is_first) = (&extents[form / 4], form & 2 > 0, form & 1 > 0);
            let pages = steps.pages as f64 / steps.count as f64;
            let mut work: Work = [0.0; UNITS];
            work[16] = steps.asked as f64 / steps.count as f64 * sizes.pieces;
            // A block's rows keep the matrix unit busy while keys are loaded; a band's do not.
            work[if is_block { 6 } else { 8 }] = 1.0;
            for &(part, width) in parts.iter().filter(|&&(_, width)| width > 0) {
                let rows = part.count() as f64;
                let (matrix, logits) = (sizes.matrix_in_parts(rows, width), rows * width as f64 / REGISTER);
                let mut add = |unit: usize, of_head: f64| work[unit] += sizes.heads * of_head;
                add(10, matrix.max(logits * OPS_PER_REGISTER));
                if is_block {
                    add(7, 1.0);
                } else {
                    add(12, sizes.kv_registers(width));
                }
                if width > WIDE_KEYS {
                    add(9, logits);
                }
                if !is_first {
                    add(11, sizes.row_registers(rows));
                }
                if is_masked {
                    add(14, logits);
                }
            }
            work[13] = pages * sizes.pieces;
            let copies = Copies { cycles: copies(plan, pages, 1), beside: ahead, among: ahead };
            stages.push(Stage { times: steps.count as f64, work, copies });
        }
    }
    stages
}

/// What a core does in a launch of decode rows.
#[derive(Clone, Copy, Debug, Default)]
struct Decoding {
    /// As the kernel counts it.
    load: i64,
    sequences: usize,
    /// By width: unmasked, masked.
    steps: [[Steps; 2]; 4],
    /// Buffers whose first block is short: they are cleared before.
    cleared: usize,
}

/// What each core has of the batch: as `mosaic::decode` shares the sequences. The first has those in front.
fn decoding(plan: &Plan, batch: &[Lengths]) -> Vec<Decoding> {
    let load = |of: &Lengths| decode::load(plan, of.kv_len, of.q_len) as i64;
    let total: i64 = batch.iter().map(load).sum();
    let mut before = 0;
    let in_front = batch.iter().take_while(|of| {
        let middle = 2 * before + load(of);
        before += load(of);
        middle < total
    });
    match plan.details().split {
        Split::Sequences => {
            let (front, back) = batch.split_at(in_front.count());
            vec![decoding_of(plan, front.iter()), decoding_of(plan, back.iter().rev())]
        }
        Split::Nothing | Split::Heads => vec![decoding_of(plan, batch.iter())],
    }
}

/// What a core does that has these sequences, in the order of work.
fn decoding_of<'b>(plan: &Plan, sequences: impl Iterator<Item = &'b Lengths>) -> Decoding {
    let (problem, keys, widths) = (plan.problem(), plan.keys(), plan.widths());
    let (of_tiles, last) = (plan.tiles().kv_pages, widths.len() - 1);
    let (mut core, mut filled) = (Decoding::default(), 0);
    for of in sequences {
        core.load += decode::load(plan, of.kv_len, of.q_len) as i64;
        if of.q_len == 0 || of.kv_len == 0 {
            continue;
        }
        core.sequences += 1;
        let unseen = problem.sliding_window.map_or(0, |window| of.kv_len.saturating_sub(window) / problem.page_size);
        let seen = of.kv_len - unseen * problem.page_size;
        let (whole, rest) = (seen / keys, seen % keys);
        let mut add = |width: usize, masked: bool, count: usize, pages: usize| {
            let asked = if pages < count * of_tiles { pages } else { 0 };
            core.steps[width][usize::from(masked)].add(count, pages, asked);
        };
        add(last, problem.sliding_window.is_some(), whole, whole * of_tiles);
        filled += whole;
        if rest > 0 {
            let width = widths.iter().position(|&width| rest <= width).unwrap_or(last);
            add(width, true, 1, rest.div_ceil(problem.page_size));
            core.cleared += usize::from(filled < decode::BUFFERS);
            filled += 1;
        }
    }
    core
}

fn stages_of_decode(plan: &Plan, listed: usize, core: &Decoding) -> Vec<Stage> {
    let (problem, sizes, widths) = (plan.problem(), Sizes::of(plan), plan.widths());
    let products = decode::Products::of(problem, plan.chip());
    let rows = products.rows as f64;
    let mut of_sequence = [0.0; UNITS];
    of_sequence[2..5].copy_from_slice(&[
        1.0,
        sizes.heads * sizes.row_registers(rows),
        sizes.heads * (problem.group() * sizes.dim) as f64 / LANES as f64,
    ]);
    let mut launch = [0.0; UNITS];
    launch[..2].copy_from_slice(&[1.0, listed as f64]);
    launch[15] = (core.cleared * plan.keys()) as f64 * sizes.pieces;
    let mut stages = vec![Stage::of(1.0, launch), Stage::of(core.sequences as f64, of_sequence)];
    for (&width, of_width) in widths.iter().zip(&core.steps) {
        for (masked, steps) in of_width.iter().enumerate().filter(|(_, steps)| steps.count > 0) {
            let pages = steps.pages as f64 / steps.count as f64;
            let (matrix, logits) = (sizes.matrix(rows, width), rows * width as f64 / REGISTER);
            let mut work: Work = [0.0; UNITS];
            let masked = masked as f64;
            work[16] = steps.asked as f64 / steps.count as f64 * sizes.pieces;
            work[5..15].copy_from_slice(&[
                1.0,
                products.count(plan.head_block()).div_ceil(products_at_once(width * products.kv_heads)) as f64,
                sizes.heads,
                sizes.heads * matrix,
                if width > WIDE_KEYS { sizes.heads * logits } else { 0.0 },
                sizes.heads * matrix.max(logits * OPS_PER_REGISTER),
                sizes.heads * sizes.kv_registers(width),
                masked * sizes.heads * sizes.kv_registers(width),
                pages * sizes.pieces,
                masked,
            ]);
            // A block's copies are started when the block before it in its buffer is done with.
            let buffers = decode::BUFFERS as f64;
            let cycles = copies(plan, pages, decode::semaphores(plan.tiles()));
            let copies = Copies { cycles, beside: buffers - 1.0, among: buffers };
            stages.push(Stage { times: steps.count as f64, work, copies });
        }
    }
    stages
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::{
        Choices, Kernel, Problem,
        rpa::{
            Rpa, estimate,
            plan::{self, Options},
        },
    };

    fn plans(of: impl Fn(&Plan, &[Lengths])) {
        for seed in 0..60 {
            let problem = Problem::new(Rpa::workload(&mut Choices::of_seed(seed)).unwrap()).unwrap();
            for chip in [Chip::V5p, Chip::V6e] {
                for tiles in plan::candidates(&problem, chip).into_iter().step_by(3) {
                    let options = Options { tiles: Some(tiles), vmem_limit: Some(chip.info().vmem_per_core) };
                    let plan = Plan::new(problem.clone(), chip, options).unwrap();
                    estimate::spread(&problem).iter().for_each(|(_, batch)| of(&plan, batch));
                }
            }
        }
    }

    /// Every row's keys are worked on, and no KV block twice for one row: counted row by row.
    #[test]
    fn steps_are_those_that_the_definition_needs() {
        plans(|plan, batch| {
            let problem = plan.problem();
            let (keys, window) = (plan.keys(), problem.sliding_window.unwrap_or(usize::MAX));
            let steps: usize = match problem.kind {
                Kind::Mixed => {
                    let (_, cores) = mixed(plan, batch);
                    cores.iter().flat_map(|core| core.steps).flatten().flatten().map(|steps| steps.count).sum()
                }
                Kind::Decode => {
                    let cores = decoding(plan, batch);
                    cores.iter().flat_map(|core| core.steps).flatten().map(|steps| steps.count).sum()
                }
            };
            let (mut least, mut most) = (0, 0);
            for of in batch {
                // Each row alone, and each as if it shared its blocks with as many others as fit an entry.
                let rows = |position: usize| match problem.kind {
                    Kind::Mixed => (position / keys + 1) - (position + 1).saturating_sub(window) / keys,
                    Kind::Decode => {
                        let unseen = of.kv_len.saturating_sub(window) / problem.page_size * problem.page_size;
                        (of.kv_len - unseen).div_ceil(keys)
                    }
                };
                let alone: Vec<usize> = (of.kv_len - of.q_len..of.kv_len).map(rows).collect();
                most += alone.iter().sum::<usize>();
                least += alone.iter().copied().max().unwrap_or(0);
            }
            assert!((least..=most).contains(&steps), "{steps} is not within {least}..={most}: {batch:?}");
        });
    }

    /// Two cores differ by no more than one entry of the list, or one sequence.
    #[test]
    fn cores_that_share_a_batch_have_as_much_to_do() {
        plans(|plan, batch| {
            let (loads, largest): (Vec<i64>, i64) = match plan.problem().kind {
                Kind::Mixed => {
                    let longest = batch.iter().map(|of| of.kv_len).max().unwrap_or(0);
                    let [blocks, lanes] = [plan.keys(), LANES].map(|of| longest.div_ceil(of) as i64);
                    // A band has rows of as many sequences as it has rows.
                    let [block, band] = plan.costs().map(|cost| cost.of(blocks, lanes));
                    let (_, cores) = mixed(plan, batch);
                    (cores.iter().map(|core| core.load).collect(), block.max(band * plan.band() as i64))
                }
                Kind::Decode => {
                    let cores = decoding(plan, batch);
                    let loads = batch.iter().map(|of| decode::load(plan, of.kv_len, of.q_len) as i64);
                    (cores.iter().map(|core| core.load).collect(), loads.max().unwrap_or(0))
                }
            };
            if let [first, second] = loads[..] {
                assert!((first - second).abs() <= largest, "{loads:?} {largest} {batch:?}");
            }
        });
    }
}
