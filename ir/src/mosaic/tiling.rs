//! How arrays lie in a TPU's vector memory: the one home of its tile sizes, the same on every generation so far.

use crate::Element;

/// Lanes of a vector register: elements of the minor dimension in a tile.
pub const LANES: usize = 128;
/// Sublanes of a vector register: rows of 32-bit words in a tile.
pub const SUBLANES: usize = 8;

/// Bytes of a buffer in VMEM or SMEM: the two minor dimensions are padded to tiles of 128 lanes and of as many rows as the
/// array has, up to 8 (at least one 32-bit word of rows); an array of one dimension to 128 words.
///
/// Source: `infer_memref_layout` of `jaxlib/mosaic`; compared with the compiler's own report for 27 shapes (libtpu
/// 0.0.52, v5p).
pub fn tile_padded_bytes(element: Element, dims: &[usize]) -> usize {
    let packing = (32 / element.bits()).max(1);
    let (major, rows, lanes) = match dims {
        [] => (1, 1, 1),
        [lanes] => return element.packed_bytes(lanes.next_multiple_of(LANES * packing)),
        [major @ .., rows, lanes] => (major.iter().product(), *rows, *lanes),
    };
    let tile_rows = rows.next_power_of_two().clamp(packing, SUBLANES.max(packing));
    element.packed_bytes(major * rows.next_multiple_of(tile_rows) * lanes.next_multiple_of(LANES))
}
