//! How keys and values lie in a paged cache: the one place that knows pages, slots and halves.
//!
//! `[layers * pages, page_size, 2 * heads, head_dim]`: a token of a page has a row for the key and a row for the value of
//! each head, interleaved (key of head `h` in row `2h`, value in row `2h + 1`), as JAX's and tpu-inference's ragged paged
//! attention have them. Heads of 64 or 192 may be packed ([`KvRows::Packed`]): `[layers * pages, page_size, heads, 2 *
//! head_dim]`, key and value of a head in one row, so that rows fill tiles of a TPU's 128 lanes, where its memory would be half
//! or a quarter padding. In row-major memory both are the same bytes. Since copies take whole tiles, what does not fill them may
//! be padded ([`KvRows::Padded`]) as a TPU's memory has it anyway: rows of 8 bits with rows of zeros, wide heads with zeros.
//! Layer `l` owns the pages from `l * pages` on. A *slot* is a token's place within a layer, `page * page_size + offset`;
//! [`NO_SLOT`] is nowhere.

use std::iter;
use std::ops::Range;

use pagoda_ir::{
    Element, TensorType,
    mosaic::tiling::{LANES, SUBLANES},
    stablehlo::{self, Direction, GatherDims, Tensor},
};
use serde::{Deserialize, Serialize};

/// The slot of a row whose key and value are not written.
pub const NO_SLOT: i32 = -1;

/// Rows of a token per head.
const HALVES: usize = 2;

/// What a row of a token holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// A head's key.
    Key = 0,
    /// A head's value.
    Value = 1,
}

impl Half {
    /// Both, in the order of a token's rows.
    pub const ALL: [Self; HALVES] = [Self::Key, Self::Value];
}

/// How the keys and values of a token lie in rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvRows {
    /// A row for each head's key, and one behind it for its value.
    #[default]
    Interleaved,
    /// A row for each head: its key in the first half of the elements, its value in the second.
    Packed,
    /// Interleaved ones, and zeros that fill a TPU's tiles: behind them as many rows (4 in all for one head in 8 bits, 8 for
    /// three), behind heads of more than a tile's lanes the rest of the last one (256 for 192).
    Padded,
}

impl KvRows {
    /// Whether there are packed rows of heads of `head_dim` elements: a head ends in the middle of a tile of lanes, and two fill
    /// whole tiles.
    pub const fn packs(head_dim: usize) -> bool {
        head_dim % LANES == LANES / HALVES
    }

    /// The rows that waste no lanes of a TPU, for `heads` heads of `head_dim` elements: packed ones, if copies can take them.
    pub fn for_lanes(element: Element, heads: usize, head_dim: usize) -> Self {
        match Self::packs(head_dim) && fills_tiles(element, heads) {
            true => Self::Packed,
            false => Self::unpacked(element, heads, head_dim),
        }
    }

    /// Key and value in rows of their own, padded where a TPU's copies could not take them.
    pub fn unpacked(element: Element, heads: usize, head_dim: usize) -> Self {
        let is_whole = element.bytes() > 1 || fills_tiles(element, KvLayout::rows_of(heads));
        match is_whole && Self::Padded.width(head_dim) == head_dim {
            true => Self::Interleaved,
            false => Self::Padded,
        }
    }

    /// Elements of a row, for heads of `head_dim` elements; as many as can be counted, of dimensions that no problem may have.
    pub const fn width(self, head_dim: usize) -> usize {
        match self {
            Self::Packed => HALVES.saturating_mul(head_dim),
            Self::Padded if head_dim > LANES => head_dim.div_ceil(LANES).saturating_mul(LANES),
            Self::Interleaved | Self::Padded => head_dim,
        }
    }

    /// Rows of a token of `heads` heads.
    pub fn of_token(self, element: Element, heads: usize) -> usize {
        let rows = KvLayout::rows_of(heads);
        match self {
            Self::Interleaved => rows,
            Self::Packed => heads,
            Self::Padded => rows.next_multiple_of(tile_rows(element, rows)),
        }
    }
}

/// Rows of a tile of an array of a TPU that has `rows`: as many as there are, at least those of a 32-bit word, at most 8.
pub(super) fn tile_rows(element: Element, rows: usize) -> usize {
    rows.next_power_of_two().clamp(4 / element.bytes(), SUBLANES)
}

/// Whether `rows` rows of a token are whole tiles.
pub(super) fn fills_tiles(element: Element, rows: usize) -> bool {
    rows.is_multiple_of(tile_rows(element, rows))
}

/// The layout of a KV buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Element type of keys and values.
    pub element: Element,
    /// Layers that share the buffer.
    pub layers: usize,
    /// Pages of a layer.
    pub pages: usize,
    /// Tokens of a page.
    pub page_size: usize,
    /// Key and value heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// How a token's rows are made up.
    pub kv_rows: KvRows,
}

impl KvLayout {
    /// Interleaved rows of a token of `heads` heads.
    pub const fn rows_of(heads: usize) -> usize {
        HALVES * heads
    }

    /// Heads of a token that has `rows` interleaved rows.
    pub const fn heads_of(rows: usize) -> usize {
        rows / HALVES
    }

    /// The layout of a part of the heads.
    #[must_use]
    pub const fn of_heads(self, heads: usize) -> Self {
        Self { heads, ..self }
    }

    /// Where among a token's rows of elements one half of `head` is: the row, and its first element there.
    pub const fn place(&self, head: usize, half: Half) -> [usize; 2] {
        match self.kv_rows {
            KvRows::Interleaved | KvRows::Padded => [Self::row(head, half), 0],
            KvRows::Packed => [head, half as usize * self.head_dim],
        }
    }

    /// Keys and values of a token: vectors of `head_dim` elements.
    pub const fn rows(&self) -> usize {
        Self::rows_of(self.heads)
    }

    /// A token's interleaved row of one half of `head`.
    pub const fn row(head: usize, half: Half) -> usize {
        HALVES * head + half as usize
    }

    /// A token's rows and their elements: `[2 * heads, head_dim]`, or some more of both, packed `[heads, 2 * head_dim]`.
    pub fn token_dims(&self) -> [usize; 2] {
        [self.kv_rows.of_token(self.element, self.heads), self.kv_rows.width(self.head_dim)]
    }

    /// Elements of a token.
    pub fn token_elements(&self) -> usize {
        self.token_dims().iter().product()
    }

    /// `[layers * pages, page_size, 2 * heads, head_dim]`, or some more of the last two, packed `[layers * pages, page_size,
    /// heads, 2 * head_dim]`.
    pub fn buffer_type(&self) -> TensorType {
        let [rows, width] = self.token_dims();
        TensorType::new(self.element, &[self.layers * self.pages, self.page_size, rows, width])
    }

    /// Slots of a layer.
    pub const fn slots(&self) -> usize {
        self.pages * self.page_size
    }

    /// The first page of a layer.
    pub const fn first_page(&self, layer: usize) -> usize {
        layer * self.pages
    }

    /// The slot of `position` of a sequence that owns `pages`, in order.
    pub fn slot(&self, pages: &[i32], position: usize) -> usize {
        slot(pages[position / self.page_size], self.page_size, position)
    }

    /// The elements of a token of the buffer: that of `slot` in a layer that begins at `first_page`.
    pub fn token(&self, first_page: usize, slot: usize) -> Range<usize> {
        let start = (first_page * self.page_size + slot) * self.token_elements();
        start..start + self.token_elements()
    }

    /// Where, among a token's elements, those of one half of `head` begin.
    pub const fn offset(&self, head: usize, half: Half) -> usize {
        let [row, first] = self.place(head, half);
        row * self.kv_rows.width(self.head_dim) + first
    }

    /// A token's elements that are no head's, and zeros.
    pub fn padding(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let ([_, width], dim, rows) = (self.token_dims(), self.head_dim, self.rows());
        let behind_heads = (0..rows).map(move |row| row * width + dim..(row + 1) * width);
        let padding = behind_heads.chain(iter::once(rows * width..self.token_elements()));
        (self.kv_rows == KvRows::Padded).then_some(padding).into_iter().flatten()
    }

    /// New keys and values, `[tokens, heads, head_dim]` each, as tokens of the cache: `[tokens, rows, elements of a row]`.
    ///
    /// # Errors
    /// When the operands do not have these types.
    pub fn tokens<'c, 'a>(
        &self,
        b: &stablehlo::Builder<'c, 'a>,
        k: Tensor<'c, 'a>,
        v: Tensor<'c, 'a>,
    ) -> pagoda_ir::Result<Tensor<'c, 'a>> {
        let tokens = k.dims()[0];
        let half = [tokens, self.heads, 1, self.head_dim];
        let both = b.concatenate(&[b.reshape(k, &half)?, b.reshape(v, &half)?], 2)?;
        let [rows, width] = self.token_dims();
        match self.kv_rows {
            KvRows::Padded => {
                let all = b.reshape(both, &[tokens, self.rows(), self.head_dim])?;
                let lanes = b.splat(self.element, &[tokens, self.rows(), width - self.head_dim], 0.0)?;
                let all = if width > self.head_dim { b.concatenate(&[all, lanes], 2)? } else { all };
                let padding = b.splat(self.element, &[tokens, rows - self.rows(), width], 0.0)?;
                if rows > self.rows() { b.concatenate(&[all, padding], 1) } else { Ok(all) }
            }
            _ => b.reshape(both, &[tokens, rows, width]),
        }
    }

    /// One half of every head of some pages, `i32[seqs, pages]` of the buffer: `[seqs, heads, pages * page_size, head_dim]`.
    /// A page that the buffer does not have reads another one.
    ///
    /// # Errors
    /// When the operands do not have these types.
    pub fn gather_heads<'c, 'a>(
        &self,
        b: &stablehlo::Builder<'c, 'a>,
        buffer: Tensor<'c, 'a>,
        pages: Tensor<'c, 'a>,
        half: Half,
    ) -> pagoda_ir::Result<Tensor<'c, 'a>> {
        let &[seqs, count] = &pages.dims()[..] else { unreachable!("pages of sequences") };
        let grid = [seqs, self.heads, count, 1];
        let ints = |value: usize| b.splat(Element::I32, &grid, value as f64);
        let (page, head) = (b.broadcast_in_dim(pages, &grid, &[0, 2])?, b.iota(Element::I32, &grid, 1)?);
        // [seqs, heads, pages, place in the dimensions named]
        let (indices, start_index_map): (_, &[usize]) = match self.kv_rows {
            KvRows::Interleaved | KvRows::Padded => {
                let row = b.add(b.multiply(head, ints(HALVES)?)?, ints(half as usize)?)?;
                (b.concatenate(&[page, row], 3)?, &[0, 2])
            }
            KvRows::Packed => (b.concatenate(&[page, head, ints(half as usize * self.head_dim)?], 3)?, &[0, 2, 3]),
        };
        let dims = GatherDims {
            offset_dims: &[3, 4],
            collapsed_slice_dims: &[0, 2],
            start_index_map,
            index_vector_dim: 3,
            ..GatherDims::default()
        };
        let blocks = b.gather(buffer, indices, dims, &[1, self.page_size, 1, self.head_dim])?;
        b.reshape(blocks, &[seqs, self.heads, count * self.page_size, self.head_dim])
    }

    /// The slot of each sequence's token at `positions` (`i32[seqs]`), by its row of the page table `page_indices`
    /// (`i32[seqs, pages_per_seq]`); [`NO_SLOT`] where `active` (`pred[seqs]`) is false. A gather by compare and sum: rows are
    /// short, and out-of-range positions of idle sequences read nothing.
    ///
    /// # Errors
    /// When an operand does not have these types.
    pub fn slots_of<'c, 'a>(
        b: &stablehlo::Builder<'c, 'a>,
        page_size: usize,
        positions: Tensor<'c, 'a>,
        page_indices: Tensor<'c, 'a>,
        active: Tensor<'c, 'a>,
    ) -> pagoda_ir::Result<Tensor<'c, 'a>> {
        let dims = page_indices.dims(); // [seqs, pages_per_seq]
        let size = b.splat(Element::I32, &dims[..1], page_size as f64)?;
        let ordinal = b.divide(positions, size)?;
        let columns = b.iota(Element::I32, &dims, 1)?;
        let here = b.compare(columns, Direction::Eq, b.broadcast_in_dim(ordinal, &dims, &[0])?)?;
        let page = b.reduce_sum(b.select(here, page_indices, b.splat(Element::I32, &dims, 0.0)?)?, &[1])?;
        let slot = b.add(b.multiply(page, size)?, b.remainder(positions, size)?)?;
        b.select(active, slot, b.splat(Element::I32, &dims[..1], f64::from(NO_SLOT))?)
    }
}

/// The slot of `position` of a sequence, the page of that position being `page`, of `page_size` tokens.
pub const fn slot(page: i32, page_size: usize, position: usize) -> usize {
    page as usize * page_size + position % page_size
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The layout that JAX's kernel takes, written out by hand: `tests/jax_attention.rs` runs that kernel on it.
    #[test]
    fn a_token_is_where_the_peers_have_it() {
        let kv_rows = KvRows::Interleaved;
        let kv = KvLayout { element: Element::F32, layers: 2, pages: 5, page_size: 4, heads: 3, head_dim: 8, kv_rows };
        assert_eq!(kv.buffer_type().dims, [10, 4, 6, 8]);
        // Packed, the bytes are the same.
        let packed = KvLayout { kv_rows: KvRows::Packed, ..kv };
        assert_eq!(packed.buffer_type().dims, [10, 4, 3, 16]);
        assert_eq!(packed.token(5, 6), kv.token(5, 6));
        assert_eq!(packed.offset(1, Half::Value), 16 + 8);
        // Padded: those of 8 bits fill words, and tiles of 8 rows where there are as many.
        let padded = |heads| KvLayout { element: Element::I8, heads, kv_rows: KvRows::Padded, ..kv };
        assert_eq!([1, 3, 5].map(|heads| padded(heads).token_dims()), [[4, 8], [8, 8], [16, 8]]);
        let rows = |heads| KvRows::unpacked(Element::I8, heads, 8);
        assert_eq!([1, 2, 3, 4, 6].map(|heads| rows(heads) == KvRows::Padded), [true, false, true, false, true]);
        // A tile and a half of lanes.
        let wide = KvLayout { element: Element::Bf16, heads: 1, head_dim: 192, kv_rows: KvRows::Padded, ..kv };
        assert_eq!((wide.token_dims(), wide.offset(0, Half::Value)), ([2, 256], 256));
        assert_eq!(wide.padding().collect::<Vec<_>>(), [192..256, 448..512, 512..512]);
        let [narrow, whole] =
            [KvRows::Interleaved, KvRows::Padded].map(|rows| KvRows::unpacked(Element::Bf16, 2, 128) == rows);
        assert!(narrow && !whole && KvRows::for_lanes(Element::Bf16, 2, 192) == KvRows::Packed);
        // Position 6 of a sequence on pages 3 and 1: offset 2 of page 1. Layer 1 begins at page 5.
        let slot = kv.slot(&[3, 1], 6);
        assert_eq!(slot, 4 + 2);
        let token = kv.token(kv.first_page(1), slot);
        assert_eq!(token, ((5 + 1) * 4 + 2) * 6 * 8..((5 + 1) * 4 + 3) * 6 * 8);
        assert_eq!((kv.offset(2, Half::Key), kv.offset(2, Half::Value)), (4 * 8, 5 * 8));
    }
}
