//! The seeded grid: attention problems and ragged batches that no kernel was tuned for, and what the peer takes for them.
//!
//! A point is drawn from a seed and its index; `scripts/peers.py` draws the same ones, measures v3 (tpu-inference's ragged
//! paged attention) at each, and writes `benches/peers/grid.json`. `tests/peers.rs` compares both draws.

use pagoda_ir::Element;
use pagoda_kernels::Choices;
use pagoda_kernels::random::{Lengths, batch_text};
use pagoda_kernels::rpa::{Kind, KvRows, Precision, Rotary, Spec};
use serde::Deserialize;

/// What `scripts/peers.py --grid` writes.
pub const FILE: &str = include_str!("../peers/grid.json");

/// Query and KV heads of one device.
const HEADS: [(usize, usize); 8] = [(8, 1), (16, 2), (28, 4), (32, 8), (40, 8), (64, 8), (16, 16), (48, 8)];

/// A problem and a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// `prompt`, `chunk`, `decode` or `mixed`.
    pub kind: &'static str,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub page_size: usize,
    /// Decode rows first.
    pub lengths: Vec<Lengths>,
}

impl Point {
    /// The point `index` of `seed`.
    pub fn drawn(seed: u64, index: u64) -> Self {
        let mut choices = Choices::of_seed(seed << 32 | index);
        // Each shape with each kind in 32 points.
        let (q_heads, kv_heads) = HEADS[((seed + index + index / 8) % 8) as usize];
        let head_dim = choices.one_of(&[128, 64, 256]);
        let page_size = choices.one_of(&[128, 16, 32, 64, 256]);
        let (kind, lengths) = match index % 4 {
            0 => ("prompt", Self::prompts(&mut choices, 4, 1024, 0)),
            1 => ("chunk", Self::prompts(&mut choices, 2, 512, 3000)),
            2 => ("decode", Self::decode(&mut choices, 32, 4000)),
            _ => {
                let rows = Self::decode(&mut choices, 16, 2000);
                ("mixed", [rows, Self::prompts(&mut choices, 2, 256, 500)].concat())
            }
        };
        Self { kind, q_heads, kv_heads, head_dim, page_size, lengths }
    }

    /// Up to `most` sequences of `rows` query rows together, each behind a context of up to `longest` tokens.
    fn prompts(choices: &mut Choices, most: usize, rows: usize, longest: usize) -> Vec<Lengths> {
        let count = choices.within(1, most);
        let mut drawn = || (choices.within(rows / 16, rows / count), choices.within(0, longest));
        let of = |(q_len, context)| Lengths { q_len, kv_len: q_len + context };
        (0..count).map(|_| of(drawn())).collect()
    }

    /// From 4 to `most` sequences of one row, of 100 to `longest` tokens.
    fn decode(choices: &mut Choices, most: usize, longest: usize) -> Vec<Lengths> {
        let count = choices.within(4, most);
        (0..count).map(|_| Lengths { q_len: 1, kv_len: choices.within(100, longest) }).collect()
    }

    /// The problem: a launch of as many rows and sequences as the batch has, rows filled up to a tile.
    pub fn spec(&self) -> Spec {
        let rows: usize = self.lengths.iter().map(|of| of.q_len).sum();
        let tokens = rows.next_multiple_of(8);
        let decode = self.kind == "decode";
        let longest = self.lengths.iter().map(|of| of.kv_len).max().unwrap_or(1);
        let (max_seqs, pages_per_seq) =
            (if decode { tokens } else { self.lengths.len() }, longest.div_ceil(self.page_size));
        Spec {
            kind: if decode { Kind::Decode } else { Kind::Mixed },
            precision: Precision::uniform(Element::Bf16),
            tokens,
            q_heads: self.q_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            page_size: self.page_size,
            pages: max_seqs * pages_per_seq,
            layers: 1,
            max_seqs,
            pages_per_seq,
            scale: (self.head_dim as f64).powf(-0.5),
            sliding_window: None,
            soft_cap: None,
            ..Spec::default()
        }
    }

    /// The forms of the problem that a kernel may have, the one that a step would rather run first.
    pub fn forms(&self) -> [Spec; 3] {
        let plain = self.spec();
        let packed =
            Spec { kv_rows: KvRows::for_lanes(plain.precision.kv, plain.kv_heads, plain.head_dim), ..plain.clone() };
        let fused = Spec { fused: Some(Rotary::HalfSplit), ..packed.clone() };
        [fused, packed, plain]
    }

    /// A few words: `decode 8/1 x128, pages of 16`.
    pub fn name(&self) -> String {
        let Self { kind, q_heads, kv_heads, head_dim, page_size, .. } = self;
        format!("{kind} {q_heads}/{kv_heads} x{head_dim}, pages of {page_size}")
    }

    /// The batch, as `--lengths` takes it.
    pub fn batch(&self) -> String {
        batch_text(&self.lengths)
    }
}

/// The file: by which versions, and the points.
#[derive(Deserialize)]
pub struct Measured {
    pub libtpu: String,
    pub points: Vec<Peer>,
}

/// What v3 takes for a point on a chip: one core's cycles, of all its launches.
#[derive(Deserialize)]
pub struct Peer {
    pub chip: String,
    pub seed: u64,
    pub index: u64,
    pub kind: String,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub page_size: usize,
    pub lengths: String,
    /// At its best tiles within the chip's default limit, and within any.
    pub default_limit: Option<Best>,
    pub any_limit: Option<Best>,
    pub around: Around,
}

#[derive(Deserialize)]
pub struct Best {
    pub cycles: u64,
    pub mib: f64,
    pub points: u64,
}

/// Rotary embedding and its copies before the kernel, and its copies behind it.
#[derive(Deserialize)]
pub struct Around {
    pub before: u64,
    pub after: u64,
}

impl Peer {
    /// From the projections' outputs to the output projection's input, within the default limit; within any, where nothing
    /// fits that.
    pub fn total(&self) -> Option<u64> {
        let best = self.default_limit.as_ref().or(self.any_limit.as_ref())?;
        Some(best.cycles + self.around.before + self.around.after)
    }
}

impl Measured {
    /// # Errors
    /// When the file lacks what the bench prints.
    pub fn read() -> serde_json::Result<Self> {
        serde_json::from_str(FILE)
    }

    pub fn of(&self, chip: &str, seed: u64, index: u64) -> Option<&Peer> {
        self.points.iter().find(|point| (point.chip.as_str(), point.seed, point.index) == (chip, seed, index))
    }
}
