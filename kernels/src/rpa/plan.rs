//! Planning ragged paged attention for a TPU: tiles, cores and VMEM.
//!
//! The cores of a device share the KV heads, if a page can be sliced there, and else the work: blocks of query rows and
//! sequences. See the module `mosaic::mixed` for how a core goes through its share.
//!
//! A block of KV heads is a slice of the second-minor dimension of a page (`2 * kv_heads` rows, packed `kv_heads`), and copies
//! take whole tiles of 8 rows: blocks are multiples of 4 heads (8) that divide the heads, or all heads.
//!
//! Queries and the output are `[rows, heads * head_dim]`, as the matrix products around the kernel have them; rows and
//! columns that are not whole tiles are padded by the program around it. Rows of pages come in pieces of 128 lanes. A row of
//! fewer stays as it is in the pages: buffers are padded to whole lanes in VMEM (counted in the report), as the compiler pads
//! the arrays in HBM. Packed rows are whole tiles of lanes, and nothing is padded.
//!
//! A log-sum-exp is a lane of a row, and copies take whole tiles of lanes: with one, cores share sequences, not heads.

pub(super) mod decode;
pub(super) mod fused;

use std::fmt;

use pagoda_ir::{
    TensorType,
    element::Element,
    mosaic::{
        tile_padded_bytes,
        tiling::{LANES, SUBLANES},
    },
};
use serde::{Deserialize, Serialize};

pub use self::decode::Split;
use super::{
    Rpa, estimate,
    kv_layout::{KvLayout, KvRows, fills_tiles, tile_rows},
    mosaic::block::lanes,
    problem::{Kind, Problem, Spec},
};
use crate::{
    chips::Chip,
    cost, evidence,
    kernel::TileSizes,
    plan::{self, PlanError, Spilling},
    random::Lengths,
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

/// Rows whose logits are worked on at a time. Fewer have the matrix units take the same keys more often.
pub(super) const CHUNK: usize = 512;
/// Most rows of a head's products that the planner chooses.
const MAX_ROWS: usize = 2048;
/// Entries whose rows have a buffer: the one at work, the next, and the one before it.
pub(super) const ENTRIES: usize = 3;
/// Forms of a block's step: each is text of its own.
pub(super) const MAX_SPANS: usize = 5;
/// Query rows and keys of a block that are worth a try.
const QUERIES: [usize; 7] = [8, 16, 32, 64, 128, 256, 512];
const KEYS: [usize; 9] = [128, 256, 384, 512, 768, 1024, 1536, 2048, 3072];
/// Most keys of a block that the planner chooses: more are wasted on what a causal mask hides.
const MAX_KEYS: usize = 1024;
/// Most logits of a block, all heads together, that the planner chooses. The body spells them out: the compiler's time
/// grows with them. In f32, products take six passes.
const MAX_LOGITS: usize = 1 << 21;
const MAX_F32_LOGITS: usize = 1 << 18;
/// Small KV blocks have more buffers, so that copies run further ahead: as many as these bytes hold, at least 2.
const KV_BYTES: usize = 3 << 20;
const MAX_KV_BUFFERS: usize = 4;
/// Most copies in flight per block that the planner chooses: each is an instruction of its own.
const MAX_COPIES: usize = 32;

/// Whether there is a Mosaic form of a problem with these options. (Sizes are `plannable`'s matter.)
pub fn emitted(spec: &Spec) -> bool {
    // Rotary and KV write are written for heads that begin a tile of lanes, or lie in one or two.
    let is_within_tiles = spec.head_dim < LANES || spec.head_dim.is_multiple_of(LANES);
    (spec.fused.is_none() || is_within_tiles) && can_copy(spec)
}

/// Whether copies can take a token's rows: they take whole tiles. (Three of four 32-bit words of a tile are taken by libtpu
/// 0.0.52, too: interleaved rows of 16 bits.)
fn can_copy(spec: &Spec) -> bool {
    let is_whole = spec.kv_rows == KvRows::Interleaved && !spec.precision.is_scaled();
    is_whole || fills_tiles(spec.precision.kv, spec.token_rows())
}

/// Refuses options that there is no Mosaic form of, a head dimension that no rows can be copied of, and page tables that
/// SMEM does not hold.
pub(super) fn plannable(problem: &Problem, chip: Chip) -> Result<(), PlanError> {
    let info = chip.info();
    if !can_copy(problem) {
        let (rows, kv) = (problem.token_rows(), problem.precision.kv);
        return Err(PlanError {
            key: "kv_heads",
            value: problem.kv_heads.to_string(),
            limit: format!(
                "make {rows} rows of {kv} a token, which do not fill tiles of {}, as copies take them",
                tile_rows(kv, rows)
            ),
            fix: "leave --packed out (kv_rows = padded has rows of zeros behind them), or give rows of bf16".into(),
        });
    }
    if !emitted(problem) {
        return Err(PlanError {
            key: "head_dim",
            value: problem.head_dim.to_string(),
            limit: "has no kernel that is fused with rotary and KV write: heads lie in one tile of 128 lanes, or fill whole ones"
                .into(),
            fix: "rotate and write keys and values outside of it, or use the StableHLO form".into(),
        });
    }
    let [_, row] = problem.kv_layout().token_dims();
    if row > LANES && !row.is_multiple_of(LANES) {
        return Err(PlanError {
            key: "head_dim",
            value: problem.head_dim.to_string(),
            limit: format!("is neither at most {LANES} nor a multiple of it, as rows are copied in pieces of {LANES}"),
            fix: format!("give kv_rows = padded, rows of {}", problem.head_dim.next_multiple_of(LANES)),
        });
    }
    let (scalars, free) = (smem(problem), Bytes(info.smem_per_core.0 - info.smem_reserved.0));
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

/// SMEM that a launch's arrays take.
fn smem(problem: &Problem) -> Bytes {
    let of_heads = |heads: usize, there: bool| if there { tile_padded_bytes(Element::F32, &[heads]) as u64 } else { 0 };
    let scales = 2 * of_heads(problem.kv_heads, problem.precision.is_scaled());
    plan::smem(&problem.arguments()) + Bytes(scales + of_heads(problem.q_heads, problem.sinks))
}

/// What follows from legal tiles.
pub(super) fn layout(problem: &Problem, chip: Chip, tiles: Tiles) -> plan::Layout<Details> {
    if problem.kind == Kind::Decode {
        return decode::layout(problem, chip, tiles);
    }
    let head_block = head_block(problem, chip);
    let split = match chip.info().cores {
        1 => Split::Nothing,
        _ if head_block < problem.kv_heads => Split::Heads,
        _ => Split::Sequences,
    };
    laid_out(problem, chip, tiles, head_block, split)
}

fn laid_out(problem: &Problem, chip: Chip, tiles: Tiles, head_block: usize, split: Split) -> plan::Layout<Details> {
    let name = format!("rpa-p{}-bq{}-kv{}", problem.page_size, tiles.queries, tiles.kv_pages);
    let tiles = in_bands(problem, chip, tiles);
    plan::Layout {
        name,
        grid: vec![match split {
            Split::Nothing => 1,
            Split::Heads => problem.kv_heads / head_block,
            Split::Sequences => chip.info().cores,
        }],
        vmem: report(problem, chip, tiles, head_block),
        smem: smem(problem) + lists(problem, tiles),
        spilling: spilling(problem, tiles, head_block),
        details: Details { head_block, kv_heads: problem.kv_heads, keys: tiles.kv_pages * problem.page_size, split },
    }
}

/// The launch of one core's heads on one core, where cores share the heads: copies of some heads of a page are strided, and
/// the compiler has no estimate of them.
pub(super) fn alone(plan: &Plan) -> Option<Plan> {
    let (problem, heads) = (plan.problem(), plan.head_block());
    if plan.details().split != Split::Heads {
        return None;
    }
    let spec = Spec { kv_heads: heads, q_heads: heads * problem.group(), ..problem.spec().clone() };
    let options = Options { tiles: Some(plan.tiles()), vmem_limit: Some(plan.limit()) };
    let part = Plan::new(Problem::new(spec).ok()?, plan.chip(), options).ok()?;
    let (problem, chip, tiles) = (part.problem(), part.chip(), part.tiles());
    let layout = match problem.kind {
        Kind::Decode => decode::laid_out(problem, chip, tiles, heads, Split::Nothing),
        Kind::Mixed => laid_out(problem, chip, tiles, heads, Split::Nothing),
    };
    Some(part.laid_out(layout))
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
        widths(self.keys())
    }

    /// What of a KV block a block of rows may be worked on with, the least first; see [`Span`].
    pub(super) fn spans(&self) -> Vec<Span> {
        let (parts, keys) = (self.parts(), self.keys());
        let quantum = keys.div_ceil(4).next_multiple_of(LANES);
        let [.., last] = &parts[..] else { unreachable!("a block has rows") };
        let end = last.row + last.rows;
        let span = |bound: usize| {
            // A row that is `above` the last one sees so many keys less.
            let of = |part: &Part| {
                let above = end - (part.row + part.rows);
                (*part, bound.saturating_sub(above).next_multiple_of(quantum).min(keys))
            };
            Span { bound, parts: parts.iter().map(of).collect() }
        };
        let all = Span { bound: usize::MAX, parts: parts.iter().map(|part| (*part, keys)).collect() };
        let narrow = (quantum..).step_by(quantum).map(span).take_while(|span| span.parts != all.parts);
        let mut spans: Vec<Span> = narrow.take(MAX_SPANS - 1).collect();
        spans.push(all);
        spans
    }

    /// Those of [`Plan::spans`] that a block's last step may have, or another one, which sees further keys. (Of a block that has
    /// more rows than there are before it the last ones are not there, and count as if they saw keys.)
    pub(super) fn spans_of(&self, is_last: bool) -> Vec<Span> {
        let spans = self.spans();
        let further = spans.iter().position(|span| span.bound > self.keys()).unwrap_or(spans.len() - 1);
        match (self.finishes_in_steps(), is_last) {
            (false, _) => spans,
            (true, false) => spans[further..].to_vec(),
            (true, true) => {
                let [narrow @ .., all] = &spans[..] else { unreachable!("a block has rows") };
                narrow.iter().take(further + 1).chain([all]).cloned().collect()
            }
        }
    }

    /// Whether the last step of a block writes the results: where no other part has some of a tile of lanes.
    pub(super) fn finishes_in_steps(&self) -> bool {
        let problem = self.problem();
        let is_whole = |heads: usize| (heads * problem.head_dim).is_multiple_of(LANES);
        !problem.log_sum_exp && self.parts().iter().all(|part| is_whole(part.member) && is_whole(part.members))
    }

    /// The parts that a block's rows are worked on in.
    pub(super) fn parts(&self) -> Vec<Part> {
        parts(self.block_rows(), self.problem())
    }

    /// Rows of one KV head's matrix products: each query row once per head of the group.
    pub fn rows(&self) -> usize {
        self.block_rows() * self.problem().group()
    }

    /// Rows that copies of queries and of the output take at least: those of a tile in HBM.
    pub fn band(&self) -> usize {
        band(self.problem(), self.chip())
    }

    /// Query rows of a block: those of the tiles, whole bands.
    pub fn block_rows(&self) -> usize {
        in_bands(self.problem(), self.chip(), self.tiles()).queries
    }

    /// Cores whose work differs: those of the device, where each has some of the sequences and blocks, and not of the heads.
    pub fn shares(&self) -> usize {
        if self.details().split == Split::Sequences { self.grid()[0] } else { 1 }
    }

    /// The output as the kernel gives it: by head from decode, unless it is fused and rows are whole tiles of one core; else in
    /// two dimensions, in whole tiles.
    pub(super) fn output_dims(&self) -> Vec<usize> {
        let problem = self.problem();
        match (problem.kind, problem.fused) {
            (Kind::Mixed, _) => self.padded_rows().to_vec(),
            (Kind::Decode, Some(_)) if decode::is_flat(self.details().split) => {
                vec![
                    fused::projected(problem, self.chip())[0],
                    (problem.q_heads * problem.head_dim).next_multiple_of(LANES),
                ]
            }
            (Kind::Decode, _) => vec![problem.tokens, problem.q_heads, problem.head_dim],
        }
    }

    /// See [`padded_rows`].
    pub(super) fn padded_rows(&self) -> [usize; 2] {
        padded_rows(self.problem(), self.chip())
    }

    /// Where cores share the work of a fused kernel: what each has of the tokens of every row, `[cores, rows, rows of a token,
    /// head_dim]`.
    pub(super) fn fresh_tokens(&self) -> Option<TensorType> {
        let problem = self.problem();
        let is_shared =
            problem.fused.is_some() && problem.kind == Kind::Mixed && self.details().split == Split::Sequences;
        let [token_rows, width] = problem.kv_layout().token_dims();
        let dims = [self.chip().info().cores, self.padded_rows()[0], token_rows, width];
        is_shared.then(|| TensorType::new(problem.precision.kv, &dims))
    }

    /// Rows of a token that a core has.
    pub(super) fn token_rows(&self) -> usize {
        let [rows, _] = self.problem().kv_layout().of_heads(self.head_block()).token_dims();
        rows
    }

    pub(super) fn kv_dims(&self) -> [usize; 5] {
        kv_dims(self.problem(), self.tiles(), self.head_block())
    }

    /// Buffers for KV blocks: copies run as many ahead, less one.
    pub(super) fn kv_buffers(&self) -> usize {
        kv_buffers(self.problem(), self.tiles(), self.head_block())
    }

    /// Columns of q and of the output that a core works on.
    pub(super) fn columns(&self) -> usize {
        columns(self.problem(), self.head_block())
    }

    /// Whether there are entries of more than a band.
    pub(super) fn has_blocks(&self) -> bool {
        self.block_rows() > self.band()
    }

    /// Whether two entries may have a band: a block, where its sequence begins within the band, and the entry before those rows.
    pub(super) fn shares_bands(&self) -> bool {
        shares_bands(
            self.problem(),
            self.chip(),
            in_bands(self.problem(), self.chip(), self.tiles()),
            self.details().split,
        )
    }

    /// Whether a band's queries have a buffer of their own.
    pub(super) fn has_band(&self) -> bool {
        has_band(self.problem(), self.chip(), in_bands(self.problem(), self.chip(), self.tiles()))
    }

    /// The fewest rows of a sequence that make a block. Fewer go band by band: a block takes as long whatever it holds.
    pub(super) fn least_rows(&self) -> usize {
        (self.block_rows() / 4).next_multiple_of(self.band()).max(2 * self.band())
    }

    /// Whether there is a step without a mask: where the matrix units are wide, masks cost more than they do.
    pub(super) fn has_inner_steps(&self) -> bool {
        self.chip().info().mxu > LANES
    }

    /// The most entries and segments that a core's lists hold.
    pub(super) fn list_lengths(&self) -> [usize; 2] {
        list_lengths(self.problem(), in_bands(self.problem(), self.chip(), self.tiles()))
    }

    /// What an entry costs, of a block of rows and of a band.
    pub(super) fn costs(&self) -> [EntryCost; 2] {
        let of = |rows| EntryCost::of_rows(rows * self.problem().group(), self);
        [of(self.block_rows()), of(self.band())]
    }
}

/// What an entry of the work list takes, roughly, in cycles: what cores share the list by. Constants of the kernel's text, and
/// so independent of the weights that plans are chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryCost {
    /// Beginning and end.
    pub entry: i64,
    /// Of a KV block beside its products.
    pub block: i64,
    /// Of every 128 keys.
    pub lanes: i64,
}

impl EntryCost {
    /// Of `rows` rows of each KV head's products. (Fitted to static cycles by libtpu 0.0.52 on v5p.)
    fn of_rows(rows: usize, plan: &Plan) -> Self {
        const ENTRY: f64 = 900.0;
        const PER_ROW: f64 = 0.35;
        const BLOCK: f64 = 430.0;
        const OPS_PER_REGISTER: f64 = 9.0;
        const VECTOR_UNITS: f64 = 4.0;
        let (info, dim) = (plan.chip().info(), plan.problem().head_dim.next_multiple_of(LANES));
        let (heads, rows) = (plan.head_block() as f64, rows as f64);
        // Matrix units take keys and values in whole tiles of theirs, whatever rows there are.
        let products = 4.0 * rows.max(info.mxu as f64) * (LANES * dim) as f64;
        let matrix = products / info.peak_flop_per_cycle_and_core as f64;
        let vector = rows / SUBLANES as f64 * OPS_PER_REGISTER / VECTOR_UNITS;
        Self {
            entry: (ENTRY + heads * rows * PER_ROW) as i64,
            block: BLOCK as i64,
            lanes: (heads * matrix.max(vector)) as i64,
        }
    }

    /// Of an entry that sees so many KV blocks, and so many times 128 keys.
    pub fn of(&self, blocks: i64, lanes: i64) -> i64 {
        self.entry + blocks * self.block + lanes * self.lanes
    }
}

/// Rows of a block's products that are worked on at a time: of some query rows, some heads of each group. Rows of all parts are
/// in order of the parts; within one by head, then by query row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The first query row, counted from the entry's start, and how many.
    pub row: usize,
    pub rows: usize,
    /// The first head of the group, and how many.
    pub member: usize,
    pub members: usize,
}

impl Part {
    /// Rows of its products.
    pub fn count(&self) -> usize {
        self.members * self.rows
    }

    /// Where they begin among those of all parts, in groups of so many heads.
    pub fn start(&self, group: usize) -> usize {
        self.row * group + self.member * self.rows
    }
}

/// What of a KV block the rows of a block are worked on with: each part with as many keys as its last row may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Of the block's keys, the most that the block's last row may see.
    pub bound: usize,
    pub parts: Vec<(Part, usize)>,
}

impl Span {
    /// Keys of the part that has most.
    pub fn keys(&self) -> usize {
        self.parts.iter().map(|&(_, keys)| keys).max().unwrap_or(0)
    }
}

/// See [`Plan::parts`]: equal numbers of query rows, as many as have [`CHUNK`] rows of products, in whole tiles.
fn parts(rows: usize, problem: &Problem) -> Vec<Part> {
    let (group, tile) = (problem.group(), packed(problem));
    let most = (CHUNK / group / tile * tile).max(tile);
    let each = rows.div_ceil(rows.div_ceil(most)).next_multiple_of(tile);
    let members = (CHUNK / each).clamp(1, group);
    (0..rows)
        .step_by(each)
        .flat_map(|row| {
            let rows = each.min(rows - row);
            let of = move |member| Part { row, rows, member, members: members.min(group - member) };
            (0..group).step_by(members).map(of)
        })
        .collect()
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
    let family = format!("{}{wide}", types(problem));
    Spilling { family, live: Bytes(live as u64) }
}

/// Types and rows of queries and cache, in words: the families of kernels that spill alike.
fn types(problem: &Problem) -> String {
    let of = |cache: bool, word: String| if cache { word } else { String::new() };
    let narrow = of(problem.precision.kv != problem.precision.q, format!(" from {}", problem.precision.kv));
    format!("{}{narrow}{}", problem.precision.q, of(problem.kv_rows == KvRows::Packed, " packed".into()))
}

/// Window and soft cap, in words.
pub(super) fn options(problem: &Problem) -> String {
    let window = problem.sliding_window.map_or(String::new(), |window| format!(", window {window}"));
    window + &problem.soft_cap.map_or(String::new(), |cap| format!(", soft cap {cap}"))
}

/// Rows and columns of q and of the output as the kernel has them: whole bands of rows, whole tiles of lanes.
pub(super) fn padded_rows(problem: &Problem, chip: Chip) -> [usize; 2] {
    let columns = problem.q_heads * problem.head_dim;
    [problem.tokens.next_multiple_of(band(problem, chip)), columns.next_multiple_of(LANES)]
}

/// Lanes of a row of log-sum-exps.
pub(super) fn log_sum_exp_lanes(problem: &Problem) -> usize {
    problem.q_heads.next_multiple_of(LANES)
}

fn columns(problem: &Problem, head_block: usize) -> usize {
    (head_block * problem.group() * problem.head_dim).next_multiple_of(LANES)
}

/// See [`Plan::widths`].
fn widths(keys: usize) -> Vec<usize> {
    let narrow = [keys / 4, keys / 2].into_iter().filter(|width| *width > 0 && width.is_multiple_of(LANES));
    narrow.chain([keys]).collect()
}

/// See [`Plan::band`].
fn band(problem: &Problem, chip: Chip) -> usize {
    match chip {
        Chip::Tpu7x => packed(problem),
        _ => SUBLANES,
    }
}

/// Rows of a tile in registers.
pub(super) fn packed(problem: &Problem) -> usize {
    SUBLANES * 4 / problem.precision.q.bytes()
}

fn in_bands(problem: &Problem, chip: Chip, tiles: Tiles) -> Tiles {
    Tiles { queries: tiles.queries.next_multiple_of(band(problem, chip)), ..tiles }
}

/// Each sequence ends in a band and has fewer rows than a block left for others.
fn list_lengths(problem: &Problem, tiles: Tiles) -> [usize; 2] {
    let bands = problem.tokens.div_ceil(SUBLANES);
    let cut = problem.tokens.div_ceil(tiles.queries) + (problem.max_seqs + 1) * (tiles.queries / 4 / SUBLANES + 5);
    let entries = bands.min(cut) + 1;
    [entries, entries + problem.max_seqs]
}

/// SMEM that the lists take: arrays of whole tiles.
fn lists(problem: &Problem, tiles: Tiles) -> Bytes {
    let [entries, segments] = list_lengths(problem, tiles);
    let of = |len: usize| tile_padded_bytes(Element::I32, &[len]) as u64;
    Bytes(4 * of(entries) + of(entries + 1) + 5 * of(segments))
}

/// See [`Plan::shares_bands`]; cores that have some of the entries each do not share their bands.
fn shares_bands(problem: &Problem, chip: Chip, tiles: Tiles, split: Split) -> bool {
    tiles.queries > band(problem, chip) && split != Split::Sequences
}

/// See [`Plan::has_band`]: not where all entries are bands of whole tiles, whose queries are brought into order by head anyway.
/// (The compiler would drop one of two buffers that hold the same.)
fn has_band(problem: &Problem, chip: Chip, tiles: Tiles) -> bool {
    let is_by_head = !problem.head_dim.is_multiple_of(LANES);
    !(is_by_head && tiles.queries == band(problem, chip) && tiles.queries == packed(problem))
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

/// Heads of a block: an equal share for each core, if pages and rows can be sliced there.
fn head_block(problem: &Problem, chip: Chip) -> usize {
    let heads = problem.kv_heads;
    let share = heads / chip.info().cores;
    let sliceable = share > 0
        && heads.is_multiple_of(share)
        && can_slice(problem, share)
        && (share * problem.group() * problem.head_dim).is_multiple_of(LANES)
        && projections_sliceable(problem, share);
    if sliceable { share } else { heads }
}

/// Whether the columns of `share` KV heads are whole tiles, where they are copied.
fn projections_sliceable(problem: &Problem, share: usize) -> bool {
    problem.fused.is_none() || (share * problem.head_dim).is_multiple_of(LANES)
}

/// Whether copies can take `heads` KV heads of a page, and all results of theirs.
fn can_slice(problem: &Problem, heads: usize) -> bool {
    // Padding comes behind all heads.
    let rows = match problem.kv_rows {
        KvRows::Packed => heads,
        KvRows::Interleaved | KvRows::Padded => KvLayout::rows_of(heads),
    };
    rows.is_multiple_of(SUBLANES) && !problem.log_sum_exp
}

/// Pieces of rows of `columns` elements, and lanes of each: what is accessed with strides must be one tile wide.
fn pieces(columns: usize) -> [usize; 2] {
    [columns.div_ceil(LANES), columns.min(LANES)]
}

/// KV blocks: `[buffers, pieces, keys, rows of a key, lanes]`. The rows of a key fill whole tiles, so that all rows of a
/// block are one array.
fn kv_dims(problem: &Problem, tiles: Tiles, head_block: usize) -> [usize; 5] {
    let [pieces, keys, rows, lanes] = block_dims(problem, tiles, head_block);
    let block = tile_padded_bytes(problem.precision.kv, &[pieces, keys, rows, lanes]);
    [(KV_BYTES / block).clamp(2, MAX_KV_BUFFERS), pieces, keys, rows, lanes]
}

/// A KV block in VMEM: `[pieces, keys, rows of a key, lanes]`.
fn block_dims(problem: &Problem, tiles: Tiles, head_block: usize) -> [usize; 4] {
    let [rows, columns] = problem.kv_layout().of_heads(head_block).token_dims();
    let [pieces, lanes] = pieces(columns);
    let rows = rows.next_multiple_of(tile_rows(problem.precision.kv, rows));
    [pieces, tiles.kv_pages * problem.page_size, rows, lanes]
}

fn kv_buffers(problem: &Problem, tiles: Tiles, head_block: usize) -> usize {
    kv_dims(problem, tiles, head_block)[0]
}

/// Every VMEM buffer, in the order of the kernel's operands.
fn report(problem: &Problem, chip: Chip, tiles: Tiles, head_block: usize) -> VmemReport {
    let (types, [dim, _], group) = (problem.precision, lanes(problem), problem.group());
    let (rows, columns) = (tiles.queries * group, columns(problem, head_block));
    let scratch = |name, element, dims: &[usize]| Buffer::new(name, BufferKind::Scratch, element, dims, 1);
    let by_head = (!problem.head_dim.is_multiple_of(LANES))
        .then(|| scratch("by_head", types.q, &[head_block * group, tiles.queries, dim]));
    let lanes = (!dim.is_multiple_of(LANES)).then(|| scratch("lanes", Element::F32, &[tiles.queries, LANES]));
    let lse = problem
        .log_sum_exp
        .then(|| scratch("lse_rows", Element::F32, &[ENTRIES, tiles.queries, log_sum_exp_lanes(problem)]));
    let queries = scratch("queries", types.q, &[ENTRIES, tiles.queries, columns]);
    let of_band =
        has_band(problem, chip, tiles).then(|| scratch("band", types.q, &[head_block, group * packed(problem), dim]));
    let rest = [
        scratch("kv", types.kv, &kv_dims(problem, tiles, head_block)),
        scratch("last", Element::I32, &[tiles.queries, LANES]),
        scratch("max", Element::F32, &[head_block, rows, LANES]),
        scratch("sum", Element::F32, &[head_block, rows, LANES]),
        scratch("acc", Element::F32, &[head_block, rows, dim]),
    ];
    let fused = problem.fused.map(|_| fused::buffers(problem, chip, tiles, head_block));
    let last = lse.into_iter().chain(fused.into_iter().flatten());
    VmemReport {
        buffers: [queries].into_iter().chain(by_head).chain(lanes).chain(of_band).chain(rest).chain(last).collect(),
    }
}

/// The tiles that cost least over `batches`, of those that fit `limit` with room for spills; without it, if none do.
pub(super) fn choose(problem: &Problem, chip: Chip, limit: Bytes, batches: &[Vec<Lengths>]) -> Option<Tiles> {
    let spread: Vec<Vec<Lengths>>;
    let batches = match batches {
        [] => {
            spread = estimate::spread(problem).into_iter().map(|(_, batch)| batch).collect();
            &spread
        }
        _ => batches,
    };
    let plans = candidates(problem, chip).into_iter().map(|tiles| Plan::with(problem.clone(), chip, tiles, limit));
    let fitting: Vec<Plan> = plans.filter(|plan| plan.vmem().total() <= limit).collect();
    let has_room = |plan: &&Plan| plan.vmem().total() + room(plan) <= limit;
    let roomy: Vec<&Plan> = fitting.iter().filter(has_room).collect();
    let plans = if roomy.is_empty() { fitting.iter().collect() } else { roomy };
    let cycles = |plan: &&Plan| batches.iter().filter_map(|batch| estimate::model(plan, batch)).collect();
    let scores = cost::scores(&plans.iter().map(cycles).collect::<Vec<_>>());
    let best = scores.into_iter().zip(plans).min_by(|(one, _), (other, _)| one.total_cmp(other));
    best.map(|(_, plan)| plan.tiles())
}

/// What is kept free for spills. Large tiles spill up to 1.24 bytes for each that the body holds at once, on v4 and v5e up to 1.4
/// and on tpu7x up to 1.9, as records go; the choice does not depend on them.
fn room(plan: &Plan) -> Bytes {
    let quarters = match (plan.problem().kind, plan.chip()) {
        (Kind::Decode, _) => return decode::SPILLS,
        (Kind::Mixed, Chip::Tpu7x) => 8,
        (Kind::Mixed, Chip::V4 | Chip::V5e) => 6,
        (Kind::Mixed, Chip::V5p | Chip::V6e) => 5,
    };
    Bytes(plan.spilling().live.0 * quarters / 4).max(evidence::LEAST)
}

/// Legal tiles that the compiler gets through: powers of two of query rows; KV blocks of 128 keys and more, powers of two and
/// three times such.
pub(super) fn candidates(problem: &Problem, chip: Chip) -> Vec<Tiles> {
    let (group, head_block) = match problem.kind {
        Kind::Mixed => (problem.group(), head_block(problem, chip)),
        Kind::Decode => (1, decode::head_block(problem, chip)),
    };
    let most_logits = if problem.precision.q == Element::F32 { MAX_F32_LOGITS } else { MAX_LOGITS };
    let mut pages: Vec<usize> = KEYS.map(|keys| (keys / problem.page_size).clamp(1, problem.pages_per_seq)).to_vec();
    pages.dedup();
    let queries: &[usize] = if problem.kind == Kind::Decode { &[decode::QUERIES] } else { &QUERIES };
    let all = queries.iter().flat_map(|&queries| pages.iter().map(move |&kv_pages| Tiles { queries, kv_pages }));
    all.filter(|&tiles| {
        let (rows, keys) = (tiles.queries * group, tiles.kv_pages * problem.page_size);
        let is_least = tiles.queries == SUBLANES && tiles.kv_pages == 1;
        let is_small = match problem.kind {
            Kind::Mixed => {
                keys <= MAX_KEYS
                    && tiles.kv_pages <= MAX_COPIES
                    && head_block * rows * keys <= most_logits
                    && (tiles.queries == SUBLANES || rows <= MAX_ROWS)
            }
            Kind::Decode => keys <= decode::MAX_KEYS && head_block * keys <= decode::MAX_HEAD_KEYS,
        };
        (is_least || is_small) && legal(problem, tiles).is_ok()
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use pagoda_ir::mosaic::Cost;

    use super::*;
    use crate::{
        kernel::Kernel,
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
        assert_eq!((plan.head_block(), plan.grid()), (4, &[2][..]));
        assert_eq!(36 % plan.tiles().kv_pages, 0);
    }

    /// Parts hold each row of each head once, and each takes the tiles of keys that its last row sees.
    #[test]
    fn parts_take_the_keys_that_their_rows_see() {
        for (q_heads, kv_heads) in [(32, 8), (16, 16), (28, 4), (8, 1), (71, 1)] {
            for (queries, kv_pages) in [(8, 1), (16, 2), (24, 4), (128, 3), (256, 4), (512, 1)] {
                let problem = Problem::new(Spec { q_heads, kv_heads, ..(*incident()).clone() }).unwrap();
                let options = Options { tiles: Some(Tiles { queries, kv_pages }), vmem_limit: None };
                let plan = Plan::new(problem, Chip::V6e, options).unwrap();
                let (parts, group) = (plan.parts(), plan.problem().group());
                let mut end = 0;
                for part in &parts {
                    assert_eq!(part.start(group), end, "{parts:?}");
                    end += part.count();
                }
                assert_eq!(end, plan.rows(), "{parts:?}");
                let keys = plan.keys() as i64;
                for seen in 1..=keys + plan.block_rows() as i64 {
                    let spans = plan.spans();
                    let span = spans.iter().find(|span| seen <= span.bound as i64).unwrap_or(&spans[spans.len() - 1]);
                    for (part, taken) in &span.parts {
                        let needed = seen - (plan.block_rows() - part.row - part.rows) as i64;
                        assert!(*taken as i64 >= needed.min(keys), "{seen}: {span:?}");
                    }
                }
            }
        }
        let plan = Plan::new(
            incident(),
            Chip::V5p,
            Options { tiles: Some(Tiles { queries: 256, kv_pages: 4 }), ..Options::default() },
        );
        let keys = |span: &Span| span.parts.iter().map(|&(_, keys)| keys).collect::<Vec<_>>();
        let spans: Vec<_> = plan.unwrap().spans().iter().map(keys).collect();
        assert_eq!(spans, [[0, 128], [128, 256], [256, 384], [384, 512], [512, 512]]);
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
