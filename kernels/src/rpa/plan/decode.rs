//! Planning decode: at most one query row per sequence.
//!
//! A core walks the KV blocks of its sequences as one stream: copies run [`BUFFERS`] - 1 blocks ahead, whichever sequence
//! they belong to. Where a device has two cores, each takes half of the KV heads if a page can be sliced there, else some
//! of the sequences, so that both have about as many keys.

use std::fmt;

use pagoda_ir::{
    element::Element,
    mosaic::tiling::{LANES, SUBLANES},
};
use serde::Serialize;

use super::{
    Details, Plan, Tiles, block_dims, can_slice,
    fused::{self, Columns},
    lanes, log_sum_exp_lanes, pieces,
};
use crate::{
    chips::Chip,
    plan::{self, PlanError, Spilling},
    rpa::{kv_layout::KvRows, problem::Problem},
    vmem::{Buffer, BufferKind, Bytes, VmemReport},
};

/// KV blocks in VMEM: the one at work, and those on their way.
pub(in crate::rpa) const BUFFERS: usize = 3;
/// Query rows of the tiles: decode has one row of a sequence at a time.
pub(in crate::rpa) const QUERIES: usize = SUBLANES;

/// What the cores of a device share out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Nothing: one core does all.
    Nothing,
    /// Each has as many KV heads.
    Heads,
    /// Each has some of the sequences.
    Sequences,
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Nothing => "one core",
            Self::Heads => "heads split over cores",
            Self::Sequences => "sequences split over cores",
        })
    }
}

/// How the cores of `chip` share the work.
pub(super) fn split(problem: &Problem, chip: Chip) -> Split {
    let cores = chip.info().cores;
    let share = problem.kv_heads / cores;
    let sliceable = problem.kv_heads.is_multiple_of(cores)
        && can_slice(problem, share)
        && (share * problem.group()).is_multiple_of(SUBLANES)
        && super::projections_sliceable(problem, share);
    match cores {
        1 => Split::Nothing,
        _ if sliceable => Split::Heads,
        _ => Split::Sequences,
    }
}

/// KV heads of a core.
pub(super) fn head_block(problem: &Problem, chip: Chip) -> usize {
    match split(problem, chip) {
        Split::Heads => problem.kv_heads / chip.info().cores,
        Split::Nothing | Split::Sequences => problem.kv_heads,
    }
}

/// Semaphores of a buffer, a power of two: copies that signal the same one follow one another.
pub(in crate::rpa) fn semaphores(tiles: Tiles) -> usize {
    (1 << tiles.kv_pages.ilog2()).min(4)
}

/// The products of a decode row's queries with keys, and of its weights with values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rpa) struct Products {
    /// KV heads of a product: two where the numbers of two heads are converted together. A row then sees the keys of its own.
    pub kv_heads: usize,
    /// Query heads of a product.
    pub q_heads: usize,
    /// Its rows: the query heads, padded to a tile.
    pub rows: usize,
}

impl Products {
    pub fn of(problem: &Problem, chip: Chip) -> Self {
        let (types, is_packed) = (problem.precision, problem.kv_rows == KvRows::Packed);
        let is_unpacked = types.q == Element::Bf16 && chip.unpacked_as(types.kv).is_some();
        let in_twos = is_unpacked && !is_packed && problem.page_size.is_multiple_of(2 * SUBLANES);
        let kv_heads = if in_twos { 2 } else { 1 };
        let q_heads = kv_heads * problem.group();
        Self { kv_heads, q_heads, rows: q_heads.next_multiple_of(SUBLANES) }
    }

    /// How many `kv_heads` KV heads take.
    pub fn count(self, kv_heads: usize) -> usize {
        kv_heads.div_ceil(self.kv_heads)
    }
}

/// Every KV block in VMEM: `[buffers, pieces, keys, rows of a key, lanes]`.
pub(in crate::rpa) fn kv_dims(problem: &Problem, tiles: Tiles, head_block: usize) -> [usize; 5] {
    let [pieces, keys, rows, lanes] = block_dims(problem, tiles, head_block);
    [BUFFERS, pieces, keys, rows, lanes]
}

/// A row of q or of the output as f32, a head to each tile: `[pieces, heads, sublanes, lanes]`. Behind the heads are as
/// many as products may read beyond them.
pub(in crate::rpa) fn staging_dims(problem: &Problem, chip: Chip, head_block: usize) -> [usize; 4] {
    let [pieces, lanes] = pieces(lanes(problem)[0]);
    let products = Products::of(problem, chip);
    let heads = (products.count(head_block) - 1) * products.q_heads + products.rows;
    [pieces, heads, SUBLANES, lanes]
}

/// Every VMEM buffer, in the order of the kernel's operands.
fn report(problem: &Problem, chip: Chip, tiles: Tiles, head_block: usize, split: Split) -> VmemReport {
    let (types, dim, heads) = (problem.precision, problem.head_dim, head_block * problem.group());
    let Products { rows, .. } = Products::of(problem, chip);
    let products = Products::of(problem, chip).count(head_block);
    let scratch = |name, element, dims: &[usize]| Buffer::new(name, BufferKind::Scratch, element, dims, 1);
    let first = match problem.fused {
        Some(_) => fused_buffers(problem, chip, head_block, split),
        None => vec![scratch("q_rows", types.q, &[problem.tokens, heads, dim]), out_rows(problem, head_block)],
    };
    let every = [
        scratch("kv", types.kv, &kv_dims(problem, tiles, head_block)),
        scratch("staging", Element::F32, &staging_dims(problem, chip, head_block)),
        scratch("max", Element::F32, &[products, rows, LANES]),
        scratch("sum", Element::F32, &[products, rows, LANES]),
        scratch("acc", Element::F32, &[products, rows, lanes(problem)[0]]),
    ];
    let some = [
        (is_widened(problem), scratch("lanes", Element::F32, &[heads, LANES])),
        (problem.sinks, scratch("sink_rows", Element::F32, &[products, rows, LANES])),
        (problem.log_sum_exp, scratch("lse_rows", Element::F32, &[problem.tokens, 1, log_sum_exp_lanes(problem)])),
    ];
    let some = some.into_iter().filter_map(|(there, buffer)| there.then_some(buffer));
    VmemReport { buffers: first.into_iter().chain(every).chain(some).collect() }
}

/// Whether queries are widened to whole tiles of lanes.
pub(in crate::rpa) fn is_widened(problem: &Problem) -> bool {
    lanes(problem)[0] > problem.head_dim
}

fn out_rows(problem: &Problem, head_block: usize) -> Buffer {
    let dims = [problem.tokens, head_block * problem.group(), problem.head_dim];
    Buffer::new("out_rows", BufferKind::Scratch, problem.precision.output, &dims, 1)
}

/// Of a fused kernel: queries of each row, then its results, as f32 by head: `[pieces, rows, heads, lanes]`.
pub(in crate::rpa) fn row_dims(problem: &Problem, chip: Chip, head_block: usize) -> [usize; 4] {
    let heads = (head_block * problem.group()).next_multiple_of(SUBLANES);
    [pieces(lanes(problem)[0])[0], fused::projected(problem, chip)[0], heads, LANES]
}

/// Whether a fused kernel gives its output in two dimensions. Where cores share the sequences, rows of one tile are of both, so
/// each is copied alone, in a dimension of its own.
pub(in crate::rpa) const fn is_flat(split: Split) -> bool {
    !matches!(split, Split::Sequences)
}

/// Columns of the output of a fused kernel that a core works on, whole tiles.
pub(in crate::rpa) fn out_columns(problem: &Problem, head_block: usize) -> usize {
    (head_block * problem.group() * problem.head_dim).next_multiple_of(LANES)
}

/// What a fused kernel has in place of rows of q and of the output, in the order of its operands.
fn fused_buffers(problem: &Problem, chip: Chip, head_block: usize, split: Split) -> Vec<Buffer> {
    let scratch = |name, element, dims: &[usize]| Buffer::new(name, BufferKind::Scratch, element, dims, 1);
    let (types, rows) = (problem.precision, fused::rows(problem, chip));
    let columns = Columns::all(problem, head_block).count();
    let tokens = fused::token_dims(problem, head_block, fused::projected(problem, chip)[0]);
    let wide = scratch("wide", Element::F32, &[fused::step(rows), LANES]);
    let all = [
        scratch("rows", Element::F32, &row_dims(problem, chip, head_block)),
        scratch("new_tokens", types.kv, &tokens),
        scratch("projected", types.q, &[rows, columns]),
        scratch("angles", Element::F32, &[rows, problem.head_dim]),
    ];
    let wide = fused::has_narrow_heads(problem).then_some(wide);
    let results = match is_flat(split) {
        true => scratch("results", types.output, &[rows, out_columns(problem, head_block)]),
        false => out_rows(problem, head_block),
    };
    all.into_iter().chain(wide).chain([results]).collect()
}

/// What follows from legal tiles.
pub(super) fn layout(problem: &Problem, chip: Chip, tiles: Tiles) -> plan::Layout<Details> {
    laid_out(problem, chip, tiles, head_block(problem, chip), split(problem, chip))
}

pub(super) fn laid_out(
    problem: &Problem,
    chip: Chip,
    tiles: Tiles,
    head_block: usize,
    split: Split,
) -> plan::Layout<Details> {
    plan::Layout {
        name: format!("rpa-decode-p{}-kv{}", problem.page_size, tiles.kv_pages),
        grid: vec![if split == Split::Nothing { 1 } else { chip.info().cores }],
        vmem: report(problem, chip, tiles, head_block, split),
        smem: super::smem(problem),
        spilling: spilling(problem, chip, tiles, head_block),
        details: Details { head_block, kv_heads: problem.kv_heads, keys: tiles.kv_pages * problem.page_size, split },
    }
}

/// What a sequence takes: its keys, and what is fixed for each of its rows in keys. Cores share sequences by it.
pub(in crate::rpa) fn load(plan: &Plan, kv_len: usize, q_len: usize) -> usize {
    (kv_len + fixed_keys(plan)) * q_len
}

/// How many keys take as long as what is fixed for a sequence. (Fitted to static cycles by libtpu 0.0.52 on v5p.)
pub(in crate::rpa) fn fixed_keys(plan: &Plan) -> usize {
    4000 / (plan.head_block() + 1)
}

/// Blocks of one row, and no more pages than a sequence has.
pub(super) fn legal(problem: &Problem, tiles: Tiles) -> Result<(), PlanError> {
    if tiles.queries != QUERIES {
        return Err(PlanError {
            key: "tiles.queries",
            value: tiles.queries.to_string(),
            limit: format!("is not {QUERIES}: a decode kernel works on one row of a sequence, a tile of {QUERIES}"),
            fix: format!("give {QUERIES},{}", tiles.kv_pages),
        });
    }
    super::legal_pages(problem, tiles)
}

/// The keys, values and logits that a block holds at once.
fn spilling(problem: &Problem, chip: Chip, tiles: Tiles, head_block: usize) -> Spilling {
    let keys = tiles.kv_pages * problem.page_size * head_block;
    let copies = if problem.precision.q == Element::F32 { 4 } else { 1 };
    let live = 4 * keys * (copies * Products::of(problem, chip).rows + problem.head_dim.next_multiple_of(LANES));
    Spilling { family: format!("{} decode", super::types(problem)), live: Bytes(live as u64) }
}

/// Keys of a block, at most.
pub(super) const MAX_KEYS: usize = 3072;
/// Keys of a block times heads, at most: the body spells out their logits.
pub(super) const MAX_HEAD_KEYS: usize = 16384;
/// What the largest blocks spill, and more.
pub(super) const SPILLS: Bytes = Bytes::mib(2);
