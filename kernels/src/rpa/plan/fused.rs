//! What fused attention adds to a plan: the columns of the projections that a core takes, and how many rows at a time.

use pagoda_ir::{
    element::Element,
    mosaic::tiling::{LANES, SUBLANES},
};

use super::{Tiles, band, padded_rows};
use crate::{
    chips::Chip,
    rpa::problem::{Kind, Problem},
    vmem::{Buffer, BufferKind},
};

/// Rows whose keys and values become tokens of the cache at a time, in a kernel of any batch: enough to hide a copy's latency.
const ROWS: usize = 128;
/// Buffers for such rows: copies run ahead by all but one.
pub(in crate::rpa) const BUFFERS: usize = 3;
/// Rows of the projections that a decode kernel takes at a time.
const DECODE_ROWS: usize = 64;
/// Tiles of f32 that a kernel of any batch works on at a time, at most.
const TILES: usize = 256;
/// Whole tiles of narrow types have a multiple of so many rows.
const PACKED: usize = 16;

/// The projections in the kernel's memory: `[rows, columns]`, whole tiles of columns. Copies of some of the rows are of whole
/// tiles, those of all rows are not.
pub(in crate::rpa) fn projected(problem: &Problem, chip: Chip) -> [usize; 2] {
    let rows = match problem.kind {
        Kind::Mixed => padded_rows(problem, chip)[0],
        Kind::Decode if problem.tokens <= DECODE_ROWS => problem.tokens,
        Kind::Decode => problem.tokens.next_multiple_of(band(problem, chip)),
    };
    [rows, projected_columns(problem)]
}

fn projected_columns(problem: &Problem) -> usize {
    (problem.projected_heads() * problem.head_dim).next_multiple_of(LANES)
}

/// Rows that are copied at a time.
pub(in crate::rpa) fn rows(problem: &Problem, chip: Chip) -> usize {
    let most = match problem.kind {
        Kind::Mixed => ROWS,
        Kind::Decode => DECODE_ROWS,
    };
    projected(problem, chip)[0].min(most)
}

/// Rows of `rows` that are worked on at a time, a divisor: as many as registers hold, in whole tiles of narrow types if there
/// are such.
pub(in crate::rpa) fn step(rows: usize) -> usize {
    let few = if rows <= DECODE_ROWS { rows } else { SUBLANES };
    [2 * PACKED, PACKED].into_iter().find(|&step| rows.is_multiple_of(step)).unwrap_or(few)
}

/// Rows of `rows` of a kernel of any batch that are worked on at a time, a divisor: the more, the less often the latency of
/// moving lanes is waited for, until what is held at once spills too much. `columns` are those of the rows.
fn long_step(rows: usize, columns: usize) -> usize {
    let most = (TILES / columns.div_ceil(LANES) * SUBLANES).min(rows);
    let whole = if rows.is_multiple_of(PACKED) { PACKED } else { SUBLANES };
    let fits = |step: &usize| step.is_multiple_of(whole) && rows.is_multiple_of(*step);
    (whole..=most).rev().find(fits).unwrap_or(step(rows))
}

/// Rows that are worked on at a time: of the queries of `block` rows, and of the keys and values of new tokens.
pub(in crate::rpa) fn steps(problem: &Problem, chip: Chip, head_block: usize, block: usize) -> [usize; 2] {
    let dim = problem.head_dim;
    [long_step(block, head_block * problem.group() * dim), long_step(rows(problem, chip), 2 * head_block * dim)]
}

/// Columns of the projections that a core copies, one part behind the other.
pub(in crate::rpa) struct Columns {
    pub parts: Vec<Part>,
    /// Where, among the copied ones, those of the first head begin.
    pub first: usize,
}

/// Columns that lie next to one another.
#[derive(Clone, Copy)]
pub(in crate::rpa) struct Part {
    /// The first core's first column.
    pub from: usize,
    /// How far behind it the next core's is.
    pub per_core: usize,
    /// How many there are.
    pub columns: usize,
}

impl Columns {
    /// Those of all heads of a core: its queries, keys and values.
    pub fn all(problem: &Problem, head_block: usize) -> Self {
        Self::of(problem, head_block, 0)
    }

    /// Those of its keys and values.
    pub fn new_tokens(problem: &Problem, head_block: usize) -> Self {
        Self::of(problem, head_block, 1)
    }

    fn of(problem: &Problem, head_block: usize, skipped: usize) -> Self {
        let dim = problem.head_dim;
        let queries = (0, head_block * problem.group());
        let [keys, values] = [0, 1].map(|half| (problem.q_heads + half * problem.kv_heads, head_block));
        let heads = &[queries, keys, values][skipped..];
        if head_block < problem.kv_heads {
            let part = |&(first, count): &(usize, usize)| {
                let columns = count * dim;
                Part { from: first * dim, per_core: columns, columns }
            };
            return Self { parts: heads.iter().map(part).collect(), first: 0 };
        }
        let first = heads[0].0 * dim;
        let from = first / LANES * LANES;
        let columns = projected_columns(problem) - from;
        Self { parts: vec![Part { from, per_core: 0, columns }], first: first - from }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.parts.iter().map(|part| part.columns).sum()
    }
}

/// Tokens of the cache in VMEM: `[pieces of a row, tokens, rows of a token, lanes]`.
pub(in crate::rpa) fn token_dims(problem: &Problem, head_block: usize, tokens: usize) -> [usize; 4] {
    let [pieces, _, rows, lanes] = super::block_dims(problem, Tiles { queries: 0, kv_pages: 1 }, head_block);
    [pieces, tokens, rows, lanes]
}

/// Where the tokens that are made of new rows wait for their copies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::rpa) enum TokenBuffers {
    /// In buffers of KV blocks, which nobody needs before the last token is written.
    KvBlocks,
    /// One behind the other in the first of them.
    FirstKvBlock,
    Own,
}

impl TokenBuffers {
    /// In a kernel of any batch whose KV blocks are `[buffers, pieces, keys, ..]`.
    pub fn of(problem: &Problem, chip: Chip, [buffers, _, keys, ..]: [usize; 5]) -> Self {
        match rows(problem, chip) {
            rows if buffers >= BUFFERS && keys >= rows => Self::KvBlocks,
            rows if keys >= BUFFERS * rows => Self::FirstKvBlock,
            _ => Self::Own,
        }
    }
}

/// Whether some angles must be spread over whole tiles of lanes.
pub(in crate::rpa) fn has_narrow_heads(problem: &Problem) -> bool {
    !problem.head_dim.is_multiple_of(LANES)
}

/// What a kernel of any batch has in VMEM beside the rest, in the order of its operands.
pub(super) fn buffers(problem: &Problem, chip: Chip, tiles: Tiles, head_block: usize) -> Vec<Buffer> {
    let scratch = |name, element, dims: &[usize]| Buffer::new(name, BufferKind::Scratch, element, dims, 1);
    let (dim, rows) = (problem.head_dim, rows(problem, chip));
    let columns = Columns::new_tokens(problem, head_block).count();
    let [pieces, tokens, token_rows, lanes] = token_dims(problem, head_block, rows);
    let [of_queries, of_tokens] = steps(problem, chip, head_block, tiles.queries);
    let has_own = TokenBuffers::of(problem, chip, super::kv_dims(problem, tiles, head_block)) == TokenBuffers::Own;
    let new_tokens = scratch("new_tokens", problem.precision.kv, &[BUFFERS, pieces, tokens, token_rows, lanes]);
    let wide = scratch("wide", Element::F32, &[of_queries.max(of_tokens), LANES]);
    let all = [
        scratch("angles", Element::F32, &[2, tiles.queries, dim]),
        scratch("projected", problem.precision.q, &[BUFFERS, rows, columns]),
        scratch("new_angles", Element::F32, &[BUFFERS, rows, dim]),
    ];
    all.into_iter().chain(has_own.then_some(new_tokens)).chain(has_narrow_heads(problem).then_some(wide)).collect()
}
