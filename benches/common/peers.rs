//! The peers' static cycles, as `scripts/peers.py` wrote them: figures are data, never constants of a bench.
//!
//! All are estimates by one libtpu for one v5p, bf16. The file also says by which versions, at which tiles and in how much
//! VMEM each was measured. A figure that a bench needs and the file lacks fails the parse.

use serde::Deserialize;

/// What `scripts/peers.py` writes.
pub const FILE: &str = include_str!("../peers/tpu_static.json");

#[derive(Deserialize)]
pub struct Peers {
    pub products: Vec<Case<Product, ProductFigures>>,
    pub batches: Vec<Case<Batch, BatchFigures>>,
    pub groups: Vec<Case<Groups, GroupFigures>>,
}

#[derive(Deserialize)]
pub struct Case<Shape, Figures> {
    pub name: String,
    pub shape: Shape,
    pub figures: Figures,
}

/// `[m, k] x [k, n]`, both cores of the chip.
#[derive(Deserialize)]
pub struct Product {
    pub m: usize,
    pub k: usize,
    pub n: usize,
}

/// XLA's own dot, and JAX Pallas's matmul at the best tiles within 16 MiB and within any limit.
#[derive(Deserialize)]
pub struct ProductFigures {
    pub xla: Figure,
    pub pallas_16mib: Option<Figure>,
    pub pallas_any: Option<Figure>,
}

/// Equal sequences: 32 query and 8 KV heads, head dimension 128, pages of 128, 36 pages for each of 8 sequences.
#[derive(Deserialize)]
pub struct Batch {
    pub sequences: usize,
    pub q_len: usize,
    pub kv_len: usize,
}

/// On one core: JAX's kernel (v2) and tpu-inference's (v3, which also writes K and V) at the best tiles of any size and
/// within 16 MiB; and v3 with f32 accumulators, as ours has them, within 16 MiB.
#[derive(Deserialize)]
pub struct BatchFigures {
    pub v2_any: Figure,
    pub v2_16mib: Figure,
    pub v3_any: Figure,
    pub v3_16mib: Figure,
    pub v3_f32_16mib: Figure,
}

/// Rows of experts, `[m, k]` times each expert's `[k, n]`, or `[n, k]` transposed: as many rows as `sizes` says.
#[derive(Deserialize)]
pub struct Groups {
    pub m: usize,
    pub k: usize,
    pub n: usize,
    pub transposed: bool,
    pub sizes: Vec<usize>,
}

/// JAX's grouped matmul (megablox) at the best of a few tiles within a chip's default limit.
#[derive(Deserialize)]
pub struct GroupFigures {
    pub v5p: Figure,
    pub v6e: Figure,
}

#[derive(Deserialize)]
pub struct Figure {
    pub cycles: u64,
}

impl Peers {
    /// # Errors
    /// When the file lacks what the benches print.
    pub fn read() -> serde_json::Result<Self> {
        serde_json::from_str(FILE)
    }
}
