//! How keys and values lie in a paged cache: the one place that knows pages, slots and halves.
//!
//! `[layers * pages, page_size, 2 * heads, head_dim]`: a token of a page has a row for the key and a row for the value of
//! each head, interleaved (key of head `h` in row `2h`, value in row `2h + 1`), as JAX's and tpu-inference's ragged paged
//! attention have them. Layer `l` owns the pages from `l * pages` on. A *slot* is a token's place within a layer,
//! `page * page_size + offset`; [`NO_SLOT`] is nowhere.

use std::ops::Range;

use pagoda_ir::{
    Element, TensorType,
    mosaic::{Builder, Ref, Value},
    stablehlo::{self, Direction, Tensor},
};

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
}

impl KvLayout {
    /// Rows of a token of `heads` heads.
    pub const fn rows_of(heads: usize) -> usize {
        HALVES * heads
    }

    /// Heads of a token that has `rows` rows.
    pub const fn heads_of(rows: usize) -> usize {
        rows / HALVES
    }

    /// Rows of a token.
    pub const fn rows(&self) -> usize {
        Self::rows_of(self.heads)
    }

    /// A token's row of one half of `head`.
    pub const fn row(head: usize, half: Half) -> usize {
        HALVES * head + half as usize
    }

    /// Elements of a token.
    pub const fn token_elements(&self) -> usize {
        self.rows() * self.head_dim
    }

    /// `[layers * pages, page_size, 2 * heads, head_dim]`
    pub fn buffer_type(&self) -> TensorType {
        TensorType::new(self.element, &[self.layers * self.pages, self.page_size, self.rows(), self.head_dim])
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
        Self::row(head, half) * self.head_dim
    }

    /// New keys and values, `[tokens, heads, head_dim]` each, as tokens of the cache: `[tokens, 2 * heads, head_dim]`.
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
        b.reshape(both, &[tokens, self.rows(), self.head_dim])
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

    /// A token's row of one half of each head in `heads`, an i32 array.
    ///
    /// # Errors
    /// When `heads` is not an i32 array.
    pub fn rows_of_heads<'c, 'a>(
        b: &stablehlo::Builder<'c, 'a>,
        heads: Tensor<'c, 'a>,
        half: Half,
    ) -> pagoda_ir::Result<Tensor<'c, 'a>> {
        let ints = |value: usize| b.splat(Element::I32, &heads.dims(), value as f64);
        b.add(b.multiply(heads, ints(HALVES)?)?, ints(half as usize)?)
    }
}

/// The slot of `position` of a sequence, the page of that position being `page`, of `page_size` tokens.
pub const fn slot(page: i32, page_size: usize, position: usize) -> usize {
    page as usize * page_size + position % page_size
}

/// A block of tokens in VMEM, as a kernel's DMAs bring it, and the recipe that loads a head from it.
///
/// The buffer is `[pieces, tokens, rows, lanes]`: rows of `head_dim` elements lie in pieces of one tile's lanes, and a
/// token's rows are padded to whole tiles. Strided loads are of 32-bit words; in bf16 a word holds an element of a head's key
/// (low half) and of its value (high half), so one strided load brings both.
pub(super) struct Block<'a> {
    /// The pieces as rows of 32-bit words.
    pub words: Vec<Ref<'a>>,
    /// Words' rows of a token.
    pub per_token: usize,
    element: Element,
}

impl<'a> Block<'a> {
    /// The block in `kv`, of `element`.
    pub fn new(kv: &Ref<'a>, element: Element) -> Self {
        let &[pieces, tokens, rows, lanes] = &kv.dims()[..] else { unreachable!("a block has four dimensions") };
        let piece = |piece| kv.at(piece).reshape(&[tokens * rows, lanes]);
        match element {
            Element::F32 => Self { words: (0..pieces).map(piece).collect(), per_token: rows, element },
            _ => {
                let words = (0..pieces).map(|index| piece(index).bitcast(Element::I32)).collect();
                Self { words, per_token: rows / HALVES, element }
            }
        }
    }

    /// Overwrites, among the first `tokens` tokens, what lies behind the first `live` ones with zeros.
    pub fn clear(&self, k: &'a Builder<'a>, live: Value<'a>, tokens: usize) {
        for piece in &self.words {
            let piece = piece.slice(0, 0, tokens * self.per_token);
            let row = k.iota(&piece.dims(), 0);
            piece.store_masked(0.0, row.greater_equal(live * self.per_token));
        }
    }

    /// Key and value of `head`. `rows` loads every `per_token`th row of the words from the given one on.
    pub fn load(&self, head: usize, rows: impl Fn(usize) -> Value<'a>) -> [Value<'a>; HALVES] {
        match self.element {
            Element::F32 => Half::ALL.map(|half| rows(KvLayout::row(head, half))),
            element => {
                let words = rows(head);
                [words << 16, words & -65536].map(|half| half.bitcast(Element::F32).cast(element))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The layout that JAX's kernel takes, written out by hand: `tests/jax_attention.rs` runs that kernel on it.
    #[test]
    fn a_token_is_where_the_peers_have_it() {
        let kv = KvLayout { element: Element::F32, layers: 2, pages: 5, page_size: 4, heads: 3, head_dim: 8 };
        assert_eq!(kv.buffer_type().dims, [10, 4, 6, 8]);
        // Position 6 of a sequence on pages 3 and 1: offset 2 of page 1. Layer 1 begins at page 5.
        let slot = kv.slot(&[3, 1], 6);
        assert_eq!(slot, 4 + 2);
        let token = kv.token(kv.first_page(1), slot);
        assert_eq!(token, ((5 + 1) * 4 + 2) * 6 * 8..((5 + 1) * 4 + 3) * 6 * 8);
        assert_eq!((kv.offset(2, Half::Key), kv.offset(2, Half::Value)), (4 * 8, 5 * 8));
    }
}
