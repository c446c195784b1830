//! What JAX's ragged paged attention (`jax.experimental.pallas.ops.tpu.ragged_paged_attention`, version 2) takes of VMEM,
//! buffer by buffer: the kernel that Levanter's sampler calls.
//!
//! Its tiles are the caller's, or else 32 query rows and 128 KV pages (32 on v4), each cut to what there is; a table of
//! tuned tiles knows some shapes on v5 and v6, and is not copied here. The batch and the size of a prefill step do not
//! enter: they change how many blocks there are, not how large one is. Fewer than 32 prefill rows would.
//!
//! libtpu 0.0.52 counts in stages and names the first that fails: scratch, then scratch and windows, then register spills
//! too, which only the compiler knows. Checked against it: 37.54M for 32 query heads, 8 KV heads of 128, pages of 128 and
//! 36 of them, and every buffer of that kernel at 32 rows x 4 pages.

use pagoda_ir::Element;
use pagoda_kernels::chips::Chip;
use pagoda_kernels::vmem::{Buffer, BufferKind, Bytes, VmemReport};

use crate::model::ModelSpec;

/// What the compiler adds of its own accord (libtpu 0.0.52).
const INTERNAL: Bytes = Bytes::kib(36);
/// Lanes of the running maximum and sum: one number a row, in a whole register's width.
const LANES: usize = 128;

/// Tile sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Query rows of a block.
    pub queries: usize,
    /// KV pages of a block.
    pub kv_pages: usize,
}

/// A launch of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Query heads.
    pub q_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens of a page.
    pub page_size: usize,
    /// Pages of a sequence.
    pub pages_per_seq: usize,
    /// Rows of the launch: of a prefill step, or one a slot.
    pub rows: usize,
    /// Type of queries, keys and values.
    pub element: Element,
}

impl Launch {
    /// The launch of a step with `rows` rows, all heads of the model on one device.
    pub fn of(config: &ModelSpec, page_size: usize, pages_per_seq: usize, rows: usize, element: Element) -> Self {
        let &ModelSpec { q_heads, kv_heads, head_dim, .. } = config;
        Self { q_heads, kv_heads, head_dim, page_size, pages_per_seq, rows, element }
    }

    /// The tiles that the kernel takes if it is given none and its table does not know the shape.
    pub fn default_tiles(&self, chip: Chip) -> Tiles {
        let pages = if chip == Chip::V4 { 32 } else { 128 };
        Tiles { queries: self.rows.min(32), kv_pages: self.pages_per_seq.min(pages) }
    }

    /// Query and KV heads of a block: the fewest that fill whole registers, or all.
    fn heads_of_a_block(&self) -> [usize; 2] {
        let packing = 4 / self.element.bytes().max(1);
        let tiled = |rows: usize| {
            let rows = if rows.is_multiple_of(packing) { rows / packing } else { 0 };
            matches!(rows, 1 | 2 | 4 | 8) || (rows > 0 && rows.is_multiple_of(8))
        };
        let (all, block) = (2 * self.kv_heads, 8 * packing);
        let kv = if all.is_multiple_of(block) { block / 2 } else { self.kv_heads };
        let q = kv * (self.q_heads / self.kv_heads);
        if tiled(q) { [q, kv] } else { [self.q_heads, self.kv_heads] }
    }

    /// Every buffer, spills aside.
    pub fn vmem(&self, tiles: Tiles) -> VmemReport {
        let [q_heads, kv_heads] = self.heads_of_a_block();
        let Self { head_dim, page_size, element, .. } = *self;
        let Tiles { queries, kv_pages } = tiles;
        let group = self.q_heads / self.kv_heads;
        let scratch = |name, element, dims: &[usize]| Buffer::new(name, BufferKind::Scratch, element, dims, 1);
        let per_row = [kv_heads, queries * group, LANES];
        let window = [queries, q_heads, head_dim];
        VmemReport {
            buffers: vec![
                scratch("kv", element, &[2, kv_pages, page_size, 2 * kv_heads, head_dim]),
                scratch("sum", Element::F32, &per_row),
                scratch("max", Element::F32, &per_row),
                scratch("acc", Element::F32, &[queries, q_heads, head_dim]),
                Buffer {
                    name: "internal".into(),
                    kind: BufferKind::InternalScratch,
                    element: Element::U8,
                    dims: vec![INTERNAL.0 as usize],
                    copies: 1,
                    bytes: INTERNAL,
                },
                Buffer::new("q", BufferKind::InputWindow, element, &window, 2),
                Buffer::new("out", BufferKind::OutputWindow, element, &window, 2),
            ],
        }
    }

    /// What the compiler counts first, and names in its message if that alone is too much.
    pub fn scratch(&self, tiles: Tiles) -> Bytes {
        let windows = [BufferKind::InputWindow, BufferKind::OutputWindow];
        let report = self.vmem(tiles);
        report.buffers.iter().filter(|buffer| !windows.contains(&buffer.kind)).map(|buffer| buffer.bytes).sum()
    }

    /// The largest KV block of `queries` rows whose buffers leave half of `limit` for spills; `None` if none does. Spills of
    /// this kernel were up to 2.1 times the rest.
    pub fn smaller(&self, queries: usize, limit: Bytes) -> Option<Tiles> {
        let pages = (1..=self.pages_per_seq).rev().map(|kv_pages| Tiles { queries, kv_pages });
        pages.into_iter().find(|&tiles| self.vmem(tiles).total() * 2 <= limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incident(rows: usize) -> Launch {
        Launch {
            q_heads: 32,
            kv_heads: 8,
            head_dim: 128,
            page_size: 128,
            pages_per_seq: 36,
            rows,
            element: Element::Bf16,
        }
    }

    /// The message of libtpu 0.0.52: "Scoped allocation with size 37.54M and limit 16.00M", at 1024 rows and at 512.
    #[test]
    fn the_incident_comes_to_the_compilers_figure() {
        for rows in [1024, 512] {
            let launch = incident(rows);
            let tiles = launch.default_tiles(Chip::V5p);
            assert_eq!(tiles, Tiles { queries: 32, kv_pages: 36 });
            assert_eq!(format!("{:.2}", launch.scratch(tiles).as_mib()), "37.54");
        }
    }

    /// libtpu's VMEM report of 32 rows x 4 pages, which compiles.
    #[test]
    fn every_buffer_is_the_compilers() {
        let report = incident(1024).vmem(Tiles { queries: 32, kv_pages: 4 });
        let bytes: Vec<u64> = report.buffers.iter().map(|buffer| buffer.bytes.0).collect();
        assert_eq!(bytes, [4_194_304, 524_288, 524_288, 524_288, 36_864, 524_288, 524_288]);
        assert_eq!(report.total().0, 10_899_456 - 4_046_848, "the rest are spills");
    }

    /// Sharded 4 or 8 ways it fits, as seen.
    #[test]
    fn shards_take_their_share() {
        for (ways, fits) in [(1, false), (4, true), (8, true)] {
            let launch = Launch { q_heads: 32 / ways, kv_heads: 8 / ways, ..incident(1024) };
            let scratch = launch.scratch(launch.default_tiles(Chip::V5p));
            assert_eq!(scratch <= Bytes::mib(16), fits, "{ways}: {scratch}");
        }
        let tiles = incident(1024).smaller(16, Bytes::mib(16)).unwrap();
        assert_eq!(tiles.kv_pages, 6);
    }
}
