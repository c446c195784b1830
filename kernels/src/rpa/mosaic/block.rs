//! A block of tokens in VMEM, as a kernel's copies bring it, and how a head's keys and values are loaded from it.
//!
//! The buffer is `[pieces, tokens, rows, lanes]`: rows of elements lie in pieces of one tile's lanes, and a token's rows are
//! padded to whole tiles. Strided loads are of 32-bit words, and a word holds an element each of as many rows as fit: of two
//! rows in bf16 (interleaved, a head's key and value, so that one load brings both), of four in 8 bits.
//!
//! What products take is of the type of the queries. Every number of a narrower type is one of it, so nothing is rounded here,
//! and no scale is applied: those of an 8-bit cache multiply the logits and the finished sums ([`super::Heads`]). Floats of 8
//! bits are unpacked by the vector units where they know the type, or one with its bits ([`scale`]): those of four tokens, or
//! of two tokens of two heads, are brought into one word for that. Elsewhere they are converted by integer arithmetic, without
//! a step through subnormal numbers, which a TPU takes for zero.
//!
//! Of packed rows keys and values are loaded together with what shares their tiles of lanes: [`lanes`] says where the head's own
//! elements are. A query has zeros in the other lanes, and of the sums over values the other lanes are not looked at.

use pagoda_ir::{
    Element,
    minifloat::Minifloat,
    mosaic::{
        Builder, Ref, Value,
        tiling::{LANES, SUBLANES},
    },
};

use super::{Strided, joined};
use crate::rpa::{
    kv_layout::{Half, KvLayout, KvRows},
    plan::{Plan, decode::Products},
    problem::{Kind, Problem},
};

/// Columns of a head's products, and the one where the result's first element is: whole tiles of a wide head's lanes; in tiles
/// that a packed row's key and value share, values begin in the middle.
pub(in crate::rpa) fn lanes(problem: &Problem) -> [usize; 2] {
    match problem.kv_rows {
        KvRows::Interleaved | KvRows::Padded => [problem.kv_rows.width(problem.head_dim), 0],
        KvRows::Packed => [problem.head_dim.next_multiple_of(LANES), problem.head_dim % LANES],
    }
}

/// The type that vector units unpack floats of 8 bits of a block as, if they do, wherever they are loaded: a tile has
/// 32 rows of it, tokens or two heads' tokens.
fn unpacked_as(plan: &Plan) -> Option<Element> {
    let problem = plan.problem();
    let heads = match problem.kind {
        Kind::Decode => Products::of(problem, plan.chip()).kv_heads,
        Kind::Mixed => 1,
    };
    let is_whole = (heads * plan.keys()).is_multiple_of(4 * SUBLANES);
    plan.chip().unpacked_as(problem.precision.kv).filter(|_| is_whole)
}

/// What keys and values are to be multiplied by, a power of two: where the chip takes them for numbers of a type with another
/// bias.
pub(super) fn scale(plan: &Plan) -> f64 {
    let least = |element: Element| element.minifloat().map_or(0, |format| format.least_exponent());
    let cached = plan.problem().precision.kv;
    f64::from(least(cached) - unpacked_as(plan).map_or(least(cached), least)).exp2()
}

/// Numbers of a type in a 32-bit word.
pub(super) const fn packing(element: Element) -> usize {
    4 / element.bytes()
}

/// Some heads' keys and values of a block of tokens.
pub(super) struct Block<'a> {
    k: &'a Builder<'a>,
    /// The pieces as rows of 32-bit words.
    words: Vec<Ref<'a>>,
    /// Words' rows of a token.
    per_token: usize,
    layout: KvLayout,
    /// What products take.
    operand: Element,
    /// See [`unpacked_as`].
    unpacked: Option<Element>,
}

/// The words of four tokens, one behind the other, and which they are: word, first token and how many tokens.
pub(super) type Recent<'a> = Option<([usize; 3], [Value<'a>; 4])>;

impl<'a> Block<'a> {
    /// The block in `kv`.
    pub fn new(k: &'a Builder<'a>, kv: &Ref<'a>, plan: &Plan) -> Self {
        let problem = plan.problem();
        let &[pieces, tokens, rows, lanes] = &kv.dims()[..] else { unreachable!("a block has four dimensions") };
        let element = problem.precision.kv;
        let words = (0..pieces).map(|piece| {
            let piece = kv.at(piece).reshape(&[tokens * rows, lanes]);
            if element == Element::F32 { piece } else { piece.bitcast(Element::I32) }
        });
        let (layout, operand) = (problem.kv_layout(), problem.precision.q);
        let (words, per_token) = (words.collect(), rows / packing(element));
        Self { k, words, per_token, layout, operand, unpacked: unpacked_as(plan) }
    }

    /// Overwrites, among the first `tokens` tokens, what lies behind the first `live` ones with zeros.
    pub fn clear(&self, live: Value<'a>, tokens: usize) {
        for piece in &self.words {
            let piece = piece.slice(0, 0, tokens * self.per_token);
            let row = self.k.iota(&piece.dims(), 0);
            piece.store_masked(0.0, row.greater_equal(live * self.per_token));
        }
    }

    /// Keys and values of `count` tokens of `head`: `[count, columns]` each, of [`lanes`] columns.
    pub fn keys_and_values(&self, head: usize, count: usize) -> [Value<'a>; 2] {
        if let Some(both) = self.both(head, [0, count], &mut None) {
            return both;
        }
        let [key, value] = Half::ALL.map(|half| self.layout.place(head, half)[0]);
        let (word, of_value) = (key / self.packing(), value / self.packing());
        match self.layout.kv_rows {
            // Both are in one row.
            KvRows::Packed => {
                let all: Vec<_> = self.words.chunks(1).map(|piece| self.row(piece, key, [0, count])).collect();
                Half::ALL.map(|half| joined(self.k, &all[self.pieces_of(half)], 1))
            }
            // One load for both.
            KvRows::Interleaved | KvRows::Padded if word == of_value => {
                let words = self.load(&self.words, word, [0, count]);
                [key, value].map(|row| self.numbers(words, row % self.packing()))
            }
            KvRows::Interleaved | KvRows::Padded => Half::ALL.map(|half| self.half(half, head, [0, count], None)),
        }
    }

    /// The numbers of every token's row `row` of elements.
    fn row(&self, pieces: &[Ref<'a>], row: usize, [first, count]: [usize; 2]) -> Value<'a> {
        let (word, index) = (row / self.packing(), row % self.packing());
        match self.unpacked {
            None => self.numbers(self.load(pieces, word, [first, count]), index),
            Some(to) => {
                let words = self.load_each(pieces, [word, first, count]);
                self.unpack(of_four_tokens(words, index), to)
            }
        }
    }

    /// One half of `head`, of `count` tokens from the `first` of the block on: `[count, columns]`. Of values, those behind the
    /// first `live` tokens become zeros, if they can be NaN: NaN times a weight of zero is NaN.
    pub fn half(&self, half: Half, head: usize, [first, count]: [usize; 2], live: Option<Value<'a>>) -> Value<'a> {
        let [row, _] = self.layout.place(head, half);
        let pieces = &self.words[self.pieces_of(half)];
        if self.unpacked.is_some() {
            return self.row(pieces, row, [first, count]);
        }
        let words = self.load(pieces, row / self.packing(), [first, count]);
        let words = match live.filter(|_| half == Half::Value || self.layout.kv_rows == KvRows::Packed) {
            Some(live) if !self.is_finite() => self.k.iota(&words.dims(), 0).less(live - first as i64).select(words, 0),
            _ => words,
        };
        self.numbers(words, row % self.packing())
    }

    /// Whether every pattern of bits is a finite number of what products take.
    fn is_finite(&self) -> bool {
        self.layout.element.bytes() == 1
    }

    /// The pieces that hold a half of a head.
    fn pieces_of(&self, half: Half) -> std::ops::Range<usize> {
        match self.layout.kv_rows {
            KvRows::Interleaved | KvRows::Padded => 0..self.words.len(),
            KvRows::Packed => {
                let [_, first] = self.layout.place(0, half);
                first / LANES..(first + self.layout.head_dim).div_ceil(LANES)
            }
        }
    }

    fn packing(&self) -> usize {
        packing(self.layout.element)
    }

    /// Key and value of `head`, of `count` tokens from the `first` of the block on, where they are made together: interleaved
    /// floats of 8 bits that are unpacked. `recent` are the words that were loaded last: the next head may have numbers in them.
    pub fn both(&self, head: usize, [first, count]: [usize; 2], recent: &mut Recent<'a>) -> Option<[Value<'a>; 2]> {
        let to = self.unpacked.filter(|_| self.layout.kv_rows != KvRows::Packed)?;
        let rows = Half::ALL.map(|half| self.layout.place(head, half)[0]);
        let which = [rows[0] / self.packing(), first, count];
        let words = match *recent {
            Some((of, words)) if of == which => words,
            _ => self.load_each(&self.words, which),
        };
        *recent = Some((which, words));
        Some(rows.map(|row| self.unpack(of_four_tokens(words, row % self.packing()), to)))
    }

    /// Keys and values of the two heads whose rows word `word` of a token holds, of `count` tokens from the `first` on: of
    /// each two tokens those of the first head, then those of the second, `[2 * count, columns]` each. They are finite, and to
    /// be multiplied by [`scale`].
    pub fn two_heads(&self, word: usize, [first, count]: [usize; 2]) -> [Value<'a>; 2] {
        let to = self.unpacked.expect("a type that the chip unpacks");
        let words = self.load_each(&self.words, [word, first, count]);
        Half::ALL.map(|half| self.unpack(of_two_tokens(words, half as usize), to))
    }

    /// Words `word` of `count` tokens from the `first` on, of every `N`th token each.
    fn load_each<const N: usize>(&self, pieces: &[Ref<'a>], [word, first, count]: [usize; 3]) -> [Value<'a>; N] {
        std::array::from_fn(|token| {
            let (start, stride) = (word + (first + token) * self.per_token, N * self.per_token);
            Strided { pieces: pieces.to_vec(), start, count: count / N, stride }.load(self.k)
        })
    }

    /// Every token's row `row` of words.
    fn load(&self, pieces: &[Ref<'a>], row: usize, [first, count]: [usize; 2]) -> Value<'a> {
        let stride = self.per_token;
        Strided { pieces: pieces.to_vec(), start: row + first * stride, count, stride }.load(self.k)
    }

    /// The numbers at place `index` of words.
    fn numbers(&self, words: Value<'a>, index: usize) -> Value<'a> {
        numbers(words, self.layout.element, index).cast(self.operand)
    }

    /// The numbers of words of four floats of 8 bits, a row each.
    fn unpack(&self, words: Value<'a>, to: Element) -> Value<'a> {
        unpacked(words, to).cast(self.operand)
    }
}

/// The numbers of `element` at place `index` of 32-bit words, as f32.
fn numbers(words: Value<'_>, element: Element, index: usize) -> Value<'_> {
    let bits = element.bits();
    // At the top of the word; what is below them does not matter.
    let shift = 32 - bits * (index + 1);
    let top = if shift == 0 { words } else { words << shift };
    match element {
        Element::F32 => words,
        Element::Bf16 if shift == 0 => (words & -65536).bitcast(Element::F32),
        Element::Bf16 => top.bitcast(Element::F32),
        Element::I8 => (top >> (32 - bits)).cast(Element::F32),
        float => widened(top, float.minifloat().expect("a type of a cache")),
    }
}

/// Floats of 8 bits in the highest bits of words, as f32. Exponent and mantissa, moved to where an f32 has them and the exponent
/// raised by the difference of the biases, are the number; but an exponent of 0 has no leading bit, and the f32 has one: of `c
/// * f`, with `c` the least normal number, it makes `c / 2 * (1 + f)`. That is below `c`, where every normal number is not, and
/// twice that less `c` is the number. NaN and infinity become large numbers.
fn widened(top: Value<'_>, format: Minifloat) -> Value<'_> {
    const MANTISSA: u32 = f32::MANTISSA_DIGITS - 1;
    const BIAS: i32 = f32::MAX_EXP - 1;
    let (mantissa, least) = (format.mantissa_bits(), format.least_exponent());
    // The lowest bit of the exponent is the lowest of 7 - mantissa bits below the sign.
    let shift = 31 - (7 - mantissa) - MANTISSA;
    let magnitude = top.shift_right_logical(i64::from(shift)) & (0x7f << (MANTISSA - mantissa));
    // The exponent field 1 is that of the least normal number.
    let magnitude = (magnitude + (i64::from(BIAS + least - 1) << MANTISSA)).bitcast(Element::F32);
    let magnitude = magnitude + (magnitude - f64::from(least).exp2()).minimum(0.0);
    (magnitude.bitcast(Element::I32) | (top & i64::from(i32::MIN))).bitcast(Element::F32)
}

const EVEN_BYTES: i32 = 0x00ff_00ff;
const LOW_HALF: i32 = 0xffff;

/// Words with the even bytes (`place` 0) or the odd ones (1) of the words of two tokens, byte by byte.
fn of_two_tokens<'a>([even, odd]: [Value<'a>; 2], place: usize) -> Value<'a> {
    match place {
        0 => (even & EVEN_BYTES) | ((odd << 8) & !EVEN_BYTES),
        _ => (even.shift_right_logical(8) & EVEN_BYTES) | (odd & !EVEN_BYTES),
    }
}

/// Words with byte `index` of the words of four tokens.
fn of_four_tokens<'a>([a, b, c, d]: [Value<'a>; 4], index: usize) -> Value<'a> {
    let [low, high] = [[a, b], [c, d]].map(|two| of_two_tokens(two, index % 2));
    match index / 2 {
        0 => (low & LOW_HALF) | (high << 16),
        _ => low.shift_right_logical(16) | (high & !LOW_HALF),
    }
}

/// Words of four floats of 8 bits as floats of `to`, a row each; their bits are as the cache has them. NaN and infinity become
/// large numbers: one head's must not reach another's sums, where they have a weight of zero.
fn unpacked(words: Value<'_>, to: Element) -> Value<'_> {
    let bytes = |byte: u32| i64::from((byte * 0x0101_0101).cast_signed());
    // Sums carry into a byte's highest bit.
    let words = match to {
        // A zero with a sign is NaN: no bit but the sign.
        Element::F8E4M3B11Fnuz => words & (((words & bytes(0x7f)) + bytes(0x7f)) | bytes(0x7f)),
        // An exponent of all ones, and here a mantissa, too. One less in the place of its lowest bit.
        Element::F8E5M2 => words - ((((words & bytes(0x7c)) + bytes(0x04)) & bytes(0x80)).shift_right_logical(5)),
        _ => words - ((((words & bytes(0x7f)) + bytes(0x01)) & bytes(0x80)).shift_right_logical(7)),
    };
    words.bitcast(to)
}

#[cfg(test)]
mod tests {
    use pagoda_ir::{HostTensor, TensorType};

    use super::{super::computed, *};
    use crate::chips::Chip;

    /// Every code at every place of a word.
    #[test]
    fn floats_of_8_bits_are_widened_exactly() {
        for (element, format) in [(Element::F8E4M3Fn, Minifloat::F8E4M3FN), (Element::F8E5M2, Minifloat::F8E5M2)] {
            let codes: Vec<u8> = (0..4096_u32).map(|at| (at / 4 + at % 4 * 37) as u8).collect();
            let words: Vec<i32> =
                codes.chunks_exact(4).map(|word| i32::from_le_bytes(word.try_into().unwrap())).collect();
            let words = HostTensor::new(&[8, 128], &words);
            let widened = computed(&words, TensorType::new(Element::F32, &[4, 8, 128]), |_, words, out| {
                for index in 0..4 {
                    out.at(index).store(numbers(words.load(), element, index));
                }
            });
            let widened = widened.as_slice::<f32>();
            let check = |code: u8, actual: f32| {
                let expected = format.decode(code);
                let is_same = actual.to_bits() == expected.to_bits() || (!expected.is_finite() && actual.is_finite());
                assert!(is_same, "{element} {code:#x}: {actual} is not {expected}");
            };
            codes.iter().enumerate().for_each(|(at, &code)| check(code, widened[at % 4 * 1024 + at / 4]));
        }
    }

    /// Every code at every place of the words of four tokens, as every chip has it.
    #[test]
    fn floats_of_8_bits_are_unpacked_exactly() {
        // Row by row the words of each fourth token, from the first on, then from the second on.
        let code = |token: usize, lane: usize, byte: usize| (token * 29 + lane * 2 + byte * 67) as u8;
        let words: Vec<i32> = (0..4096)
            .map(|at| {
                let (token, lane) = (4 * (at / 128 % 8) + at / 1024, at % 128);
                i32::from_le_bytes(std::array::from_fn(|byte| code(token, lane, byte)))
            })
            .collect();
        let words = HostTensor::new(&[4, 8, 128], &words);
        let types = [Element::F8E4M3Fn, Element::F8E5M2];
        for (chip, element) in Chip::ALL.into_iter().flat_map(|chip| types.map(|element| (chip, element))) {
            let Some(to) = chip.unpacked_as(element) else { continue };
            let format = element.minifloat().unwrap();
            let scale = f64::from(format.least_exponent() - to.minifloat().unwrap().least_exponent());
            let check = |actual: f32, [token, lane, byte]: [usize; 3]| {
                let expected = format.decode(code(token, lane, byte));
                let is_same = actual == expected || (!expected.is_finite() && actual.is_finite());
                assert!(is_same, "{element} on {chip}: {actual} is not {expected}");
            };
            let rows_of = |of: &dyn for<'a> Fn([Value<'a>; 4], usize) -> Value<'a>| {
                computed(&words, TensorType::new(Element::F32, &[4, 32, 128]), |_, words, out| {
                    for place in 0..4 {
                        let words = of(std::array::from_fn(|token| words.at(token).load()), place);
                        out.at(place).store(unpacked(words, to).cast(Element::F32) * scale.exp2());
                    }
                })
            };
            let of_four = rows_of(&of_four_tokens);
            // The even tokens of all four stand for tokens, the odd ones behind them.
            let of_two = rows_of(&|[a, b, ..], place| of_two_tokens([a, b], place % 2));
            for at in 0..4 * 4096 {
                let (place, row, lane) = (at / 4096, at / 128 % 32, at % 128);
                check(of_four.as_slice::<f32>()[at], [row, lane, place]);
                let token = 4 * (row / 4) + row % 2;
                check(of_two.as_slice::<f32>()[at], [token, lane, 2 * (row / 2 % 2) + place % 2]);
            }
        }
    }
}
