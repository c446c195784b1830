//! Planning ragged paged attention for a TPU: tiles, grid and VMEM.
//!
//! The grid walks blocks of KV heads (`parallel`: the cores of a device share them) and blocks of query rows. In each
//! step the kernel fetches the KV pages of every sequence that has rows in the block, [`Tiles::kv_pages`] at a time, into
//! one of two buffers. Pure, and far below a millisecond.
//!
//! A block of KV heads is a slice of the second-minor dimension of a page (`2 * kv_heads` rows), and copies take whole
//! tiles of 8 rows: blocks are multiples of 4 heads that divide the heads, or all heads.
//!
//! `head_dim` below 128 lanes stays as it is: buffers are padded to whole lanes in VMEM (counted in the report), as the
//! compiler pads the arrays in HBM. Above, it is a multiple of 128, and rows come in pieces of 128. Nothing is copied around
//! the kernel.

pub(super) mod decode;

use std::fmt;

use pagoda_ir::{
    element::Element,
    mosaic::tiling::{LANES, SUBLANES},
};
use serde::{Deserialize, Serialize};

pub use self::decode::Split;
use super::{
    Rpa,
    kv_layout::{KvLayout, KvRows},
    problem::{Kind, Problem, Spec},
};
use crate::{
    chips::Chip,
    evidence,
    kernel::{Kernel, TileSizes},
    plan::{self, PlanError, Spilling},
    vmem::{Buffer, BufferKind, Bytes, VmemReport},
};

/// Tile sizes that the user may fix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Tiles {
    /// Query rows of a block.
    pub queries: usize,
    /// KV pages of a block.
    pub kv_pages: usize,
}

impl TileSizes for Tiles {
    const FORM: &'static str = "Q,P";

    fn parse(text: &str) -> Result<Self, PlanError> {
        let form = "two positive numbers Q,P (query rows, KV pages)";
        let [queries, kv_pages] = plan::positive_numbers(text, form, "32,4")?;
        Ok(Self { queries, kv_pages })
    }
}

impl fmt::Display for Tiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.queries, self.kv_pages)
    }
}

/// What the user may fix; the planner chooses the rest.
pub type Options = plan::Options<Tiles>;

/// A kernel for a chip, every tile and every VMEM buffer named.
pub type Plan = plan::Plan<Rpa>;

/// Rows whose logits are worked on at a time: the more, the more of them are spilled.
pub(super) const CHUNK: usize = 256;
/// Most rows of a head's products that the planner chooses: more gain nothing on any chip.
const MAX_ROWS: usize = 512;
/// Most keys of a block that the planner chooses: more are wasted on what a causal mask hides.
const MAX_KEYS: usize = 512;
/// Where a block has few rows, copies are what takes time, and larger ones are better.
const FEW_ROWS: usize = 64;
const MAX_KEYS_OF_FEW_ROWS: usize = 1536;
/// Most logits of a block, all heads together, that the planner chooses. The body spells them out: the compiler's time
/// grows with them. In f32, products take six passes.
const MAX_LOGITS: usize = 1 << 20;
const MAX_F32_LOGITS: usize = 1 << 18;
/// Most copies in flight per block that the planner chooses: each is an instruction of its own.
const MAX_COPIES: usize = 32;

/// Whether there is a Mosaic form of a problem with these options. (Sizes are `plannable`'s matter.)
pub fn emitted(spec: &Spec) -> bool {
    let Spec { fused, sinks, log_sum_exp, kv_rows, precision, .. } = spec;
    fused.is_none() && !sinks && !log_sum_exp && *kv_rows == KvRows::Interleaved && precision.kv == precision.q
}

/// Refuses options that there is no Mosaic form of, a head dimension that no rows can be copied of, and page tables that
/// SMEM does not hold.
pub(super) fn plannable(problem: &Problem, chip: Chip) -> Result<(), PlanError> {
    let info = chip.info();
    if !emitted(problem) {
        return Err(PlanError {
            key: "options",
            value: Rpa::describe(problem),
            limit: "have no kernel for TPUs".into(),
            fix: "leave them out, or use the StableHLO form".into(),
        });
    }
    if problem.head_dim > LANES && !problem.head_dim.is_multiple_of(LANES) {
        return Err(PlanError {
            key: "head_dim",
            value: problem.head_dim.to_string(),
            limit: format!("is neither at most {LANES} nor a multiple of it, as rows are copied in pieces of {LANES}"),
            fix: format!("pad it to {}", problem.head_dim.next_multiple_of(LANES)),
        });
    }
    let (scalars, free) = (plan::smem(&problem.arguments()), Bytes(info.smem_per_core.0 - info.smem_reserved.0));
    if scalars > free {
        return Err(PlanError {
            key: "max_seqs * pages_per_seq",
            value: format!("{} * {}", problem.max_seqs, problem.pages_per_seq),
            limit: format!(
                "are, with rows and lanes padded to tiles, {scalars} of lengths and page indices in SMEM; {free} of the {} \
                 are free on {chip}",
                info.smem_per_core
            ),
            fix: "lower max-seqs or max-seq-len, or raise page-size".into(),
        });
    }
    Ok(())
}

/// What follows from legal tiles.
pub(super) fn layout(problem: &Problem, chip: Chip, tiles: Tiles) -> plan::Layout<Details> {
    if problem.kind == Kind::Decode {
        return decode::layout(problem, chip, tiles);
    }
    let head_block = head_block(problem, chip);
    let Tiles { queries, kv_pages } = tiles;
    plan::Layout {
        name: format!("rpa-p{}-bq{queries}-kv{kv_pages}", problem.page_size),
        grid: grid(problem, tiles, head_block).to_vec(),
        vmem: report(problem, tiles, head_block),
        smem: plan::smem(&problem.arguments()),
        spilling: spilling(problem, tiles, head_block),
        details: Details {
            head_block,
            kv_heads: problem.kv_heads,
            keys: kv_pages * problem.page_size,
            split: if head_block < problem.kv_heads { Split::Heads } else { Split::Nothing },
        },
    }
}

impl Plan {
    /// KV heads of a block: all of them where no slice of a page is tile-aligned or the device has one core.
    pub fn head_block(&self) -> usize {
        self.details().head_block
    }

    /// Keys of a KV block.
    pub fn keys(&self) -> usize {
        self.details().keys
    }

    /// How many keys of a KV block may be worked on, the fewest first: all, a half or a quarter, if that is whole lanes.
    /// Rows at the beginning of a context, and short contexts, need no more.
    pub fn widths(&self) -> Vec<usize> {
        let keys = self.keys();
        let narrow = [keys / 4, keys / 2].into_iter().filter(|width| *width > 0 && width.is_multiple_of(LANES));
        narrow.chain([keys]).collect()
    }

    /// Rows of one KV head's matrix products: each query row once per head of the group.
    pub fn rows(&self) -> usize {
        self.tiles().queries * self.problem().group()
    }

    pub(super) fn kv_dims(&self) -> [usize; 5] {
        kv_dims(self.problem(), self.tiles(), self.head_block())
    }

    pub(super) fn staging_dims(&self) -> [usize; 4] {
        staging_dims(self.problem(), self.tiles(), self.head_block())
    }

    /// Steps along KV-head blocks and query blocks.
    pub(super) fn steps_of_grid(&self) -> [usize; 2] {
        grid(self.problem(), self.tiles(), self.head_block())
    }
}

/// What a plan of the attention kernel holds beside what every plan holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Details {
    /// KV heads of a block.
    pub head_block: usize,
    /// KV heads in all.
    pub kv_heads: usize,
    /// Keys of a block.
    pub keys: usize,
    /// What the cores share out.
    pub split: Split,
}

impl fmt::Display for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { head_block, kv_heads, keys, split } = self;
        write!(f, "{:<24} {head_block} of {kv_heads} KV heads, {keys} keys; {split}", "block")
    }
}

/// Types and options. A chunk of rows holds its logits (true f32 products split them into three bf16 parts, for which the
/// compiler keeps four times as much), and the keys and values that are loaded for the heads of a block.
fn spilling(problem: &Problem, tiles: Tiles, head_block: usize) -> Spilling {
    let rows = (tiles.queries * problem.group()).min(CHUNK);
    let keys = tiles.kv_pages * problem.page_size;
    let copies = if problem.precision.q == Element::F32 { 4 } else { 1 };
    let live = 4 * keys * (copies * rows + head_block * problem.head_dim.next_multiple_of(LANES));
    let wide = if problem.head_dim > LANES { " wide" } else { "" };
    let family = format!("{}{wide}", problem.precision.q);
    Spilling { family, live: Bytes(live as u64) }
}

/// Window and soft cap, in words.
pub(super) fn options(problem: &Problem) -> String {
    let window = problem.sliding_window.map_or(String::new(), |window| format!(", window {window}"));
    window + &problem.soft_cap.map_or(String::new(), |cap| format!(", soft cap {cap}"))
}

fn grid(problem: &Problem, tiles: Tiles, head_block: usize) -> [usize; 2] {
    [problem.kv_heads / head_block, problem.tokens.div_ceil(tiles.queries)]
}

/// Whole tiles of query rows, and no more pages than a sequence has.
pub(super) fn legal(problem: &Problem, tiles: Tiles) -> Result<(), PlanError> {
    if problem.kind == Kind::Decode {
        return decode::legal(problem, tiles);
    }
    let most = problem.tokens.next_multiple_of(SUBLANES);
    if !tiles.queries.is_multiple_of(SUBLANES) || tiles.queries == 0 || tiles.queries > most {
        return Err(PlanError {
            key: "tiles.queries",
            value: tiles.queries.to_string(),
            limit: format!("is not a multiple of {SUBLANES} from {SUBLANES} to {most}"),
            fix: format!("give e.g. {}", most.min(32)),
        });
    }
    legal_pages(problem, tiles)
}

/// No more pages than a sequence has.
fn legal_pages(problem: &Problem, tiles: Tiles) -> Result<(), PlanError> {
    if tiles.kv_pages == 0 || tiles.kv_pages > problem.pages_per_seq {
        return Err(PlanError {
            key: "tiles.kv_pages",
            value: tiles.kv_pages.to_string(),
            limit: format!("is not within the 1 to {} pages of a sequence", problem.pages_per_seq),
            fix: "give a divisor of the pages of a sequence".into(),
        });
    }
    Ok(())
}

/// Heads of a block: an equal share for each core, if a page can be sliced there.
fn head_block(problem: &Problem, chip: Chip) -> usize {
    let heads = problem.kv_heads;
    let share = heads / chip.info().cores;
    let sliceable = share > 0
        && heads.is_multiple_of(share)
        && KvLayout::rows_of(share).is_multiple_of(SUBLANES)
        && (share * problem.group()).is_multiple_of(SUBLANES);
    if sliceable { share } else { heads }
}

/// Pieces of a row of `head_dim` elements, and lanes of each: what is accessed with strides must be one tile wide.
fn pieces(problem: &Problem) -> [usize; 2] {
    [problem.head_dim.div_ceil(LANES), problem.head_dim.min(LANES)]
}

/// Two KV blocks: `[2, pieces, keys, rows of a key, lanes]`. The rows of a key fill whole tiles, so that all rows of a
/// block are one array.
fn kv_dims(problem: &Problem, tiles: Tiles, head_block: usize) -> [usize; 5] {
    let [pieces, lanes] = pieces(problem);
    [2, pieces, tiles.kv_pages * problem.page_size, kv_rows(head_block), lanes]
}

/// Rows of a key of `head_block` heads in VMEM.
fn kv_rows(head_block: usize) -> usize {
    match KvLayout::rows_of(head_block) {
        few @ (2 | 4) => few,
        rows => rows.next_multiple_of(SUBLANES),
    }
}

/// A block of q as f32: `[pieces, queries, heads, lanes]`, heads padded to whole tiles.
fn staging_dims(problem: &Problem, tiles: Tiles, head_block: usize) -> [usize; 4] {
    let [pieces, lanes] = pieces(problem);
    [pieces, tiles.queries, (head_block * problem.group()).next_multiple_of(SUBLANES), lanes]
}

/// Every VMEM buffer, in the order of the kernel's operands.
fn report(problem: &Problem, tiles: Tiles, head_block: usize) -> VmemReport {
    let (types, dim, group) = (problem.precision, problem.head_dim, problem.group());
    let rows = tiles.queries * group;
    let [_, query_steps] = grid(problem, tiles, head_block);
    // A window that never moves has one buffer: there is no next block to fetch meanwhile. Blocks of heads are one to a core.
    let copies = if query_steps > 1 { 2 } else { 1 };
    let block = [tiles.queries, head_block * group, dim];
    let scratch = |name, element, dims: &[usize]| Buffer::new(name, BufferKind::Scratch, element, dims, 1);
    VmemReport {
        buffers: vec![
            Buffer::new("q", BufferKind::InputWindow, types.q, &block, copies),
            Buffer::new("out", BufferKind::OutputWindow, types.output, &block, copies),
            scratch("kv", types.kv, &kv_dims(problem, tiles, head_block)),
            scratch("queries", types.q, &[head_block, rows, dim]),
            scratch("staging", Element::F32, &staging_dims(problem, tiles, head_block)),
            scratch("last", Element::I32, &[rows, LANES]),
            scratch("max", Element::F32, &[head_block, rows, LANES]),
            scratch("sum", Element::F32, &[head_block, rows, LANES]),
            scratch("acc", Element::F32, &[head_block, rows, dim]),
        ],
    }
}

/// The tiles with the most work in a block that fit `limit` with room for spills; without it, if none do.
pub(super) fn choose(problem: &Problem, chip: Chip, limit: Bytes) -> Option<Tiles> {
    if problem.kind == Kind::Decode {
        return decode::choose(problem, chip, limit);
    }
    let head_block = head_block(problem, chip);
    let most_logits = if problem.precision.q == Element::F32 { MAX_F32_LOGITS } else { MAX_LOGITS };
    let margin = |tiles| evidence::margin(&spilling(problem, tiles, head_block));
    let mut best: Option<((bool, usize, bool, usize), Tiles)> = None;
    for queries in [8, 16, 32, 64, 128, 256] {
        let rows = queries * problem.group();
        if queries > problem.tokens.next_multiple_of(SUBLANES) || (queries > SUBLANES && rows > MAX_ROWS) {
            continue;
        }
        let most_keys = if rows <= FEW_ROWS { MAX_KEYS_OF_FEW_ROWS } else { MAX_KEYS };
        for kv_pages in 1..=problem.pages_per_seq.min(MAX_COPIES) {
            let tiles = Tiles { queries, kv_pages };
            let keys = kv_pages * problem.page_size;
            let smallest = kv_pages == 1 && queries == SUBLANES;
            if !smallest && (keys > most_keys || head_block * rows * keys > most_logits) {
                continue;
            }
            let taken = report(problem, tiles, head_block).total();
            if taken > limit {
                continue;
            }
            let divides = problem.pages_per_seq.is_multiple_of(kv_pages);
            let score = (taken + margin(tiles) <= limit, keys.min(MAX_KEYS) * rows, divides, rows);
            // Of equals, the last: more keys of few rows.
            if best.is_none_or(|(most, _)| score >= most) {
                best = Some((score, tiles));
            }
        }
    }
    best.map(|(_, tiles)| tiles)
}

#[cfg(test)]
mod tests {
    use pagoda_ir::mosaic::Cost;

    use super::*;
    use crate::{
        rpa::{Kind, Precision},
        vmem::{Spills, Suggestion, Verdict},
    };

    fn incident() -> Problem {
        Problem::new(Spec {
            kind: Kind::Mixed,
            precision: Precision::uniform(Element::Bf16),
            tokens: 1024,
            q_heads: 32,
            kv_heads: 8,
            head_dim: 128,
            page_size: 128,
            pages: 288,
            layers: 1,
            max_seqs: 8,
            pages_per_seq: 36,
            scale: 128f64.powf(-0.5),
            sliding_window: None,
            soft_cap: None,
            ..Spec::default()
        })
        .unwrap()
    }

    #[test]
    fn the_incident_has_tiles_that_fit_and_both_cores_work() {
        let plan = Plan::new(incident(), Chip::V5p, Options::default()).unwrap();
        assert!(plan.vmem().total() < Bytes::mib(16), "{}", plan.vmem());
        assert_eq!((plan.head_block(), plan.grid()[0]), (4, 2));
        assert_eq!(36 % plan.tiles().kv_pages, 0);
    }

    #[test]
    fn the_cost_is_that_of_full_tables() {
        // Eight sequences at their longest: the last 128 rows of each, or the last one.
        let [q, kv] = [|rows: u64| rows * 32 * 128 * 2, |tokens: u64| tokens * 16 * 128 * 2];
        let cost = |problem: &Problem| Rpa::cost(problem);
        let rows = |rows: u64| 8 * 32 * (rows * 4608 - rows * (rows - 1) / 2);
        let of = |logits, bytes_accessed| Cost { flops: 512 * logits, transcendentals: logits, bytes_accessed };
        assert_eq!(cost(&incident()), of(rows(128), 2 * q(1024) + kv(8 * 4608)));
        let decode = Spec { kind: Kind::Decode, tokens: 8, ..(*incident()).clone() };
        assert_eq!(cost(&Problem::new(decode.clone()).unwrap()), of(rows(1), 2 * q(8) + kv(8 * 4608)));
        let window = Problem::new(Spec { sliding_window: Some(1000), ..decode }).unwrap();
        assert_eq!(cost(&window), of(8 * 32 * 1000, 2 * q(8) + kv(8 * 1000)));
    }

    #[test]
    fn tiles_that_are_too_large_name_smaller_ones() {
        let options = Options { tiles: Some(Tiles { queries: 32, kv_pages: 36 }), vmem_limit: None };
        let plan = Plan::new(incident(), Chip::V5p, options).unwrap();
        let Verdict::DoesNotFit { suggestions, .. } = plan.verdict(Spills::Unknown) else { panic!("{}", plan.vmem()) };
        assert!(matches!(suggestions[..], [Suggestion::Tiles { .. }, Suggestion::Limit { .. }]), "{suggestions:?}");
        for tiles in ["7,4", "32,37", "2048,1"] {
            let options = Options { tiles: Some(Tiles::parse(tiles).unwrap()), vmem_limit: None };
            assert!(Plan::new(incident(), Chip::V5p, options).is_err(), "{tiles}");
        }
        assert!(Tiles::parse("8").is_err() && Tiles::parse("8,x").is_err() && Tiles::parse("0,1").is_err());
    }
}
