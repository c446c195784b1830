//! A block of tokens in VMEM, as a kernel's copies bring it, and how a head's keys and values are loaded from it.
//!
//! The buffer is `[pieces, tokens, rows, lanes]`: rows of elements lie in pieces of one tile's lanes, and a token's rows are
//! padded to whole tiles. Strided loads are of 32-bit words, and a word holds an element each of as many rows as fit: of two
//! rows in bf16 (interleaved, a head's key and value, so that one load brings both), of four in 8 bits.
//!
//! What products take is of the type of the queries. Every number of a narrower type is one of it, so nothing is rounded here,
//! and no scale is applied: those of an 8-bit cache multiply the logits and the finished sums ([`super::Heads`]). Floats of 8
//! bits are converted by integer arithmetic, which every generation has, without a step through subnormal numbers, which a
//! TPU takes for zero; where vector units have arithmetic in bf16, two tokens' numbers at a time.
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
use crate::{
    chips::Chip,
    rpa::{
        kv_layout::{Half, KvLayout, KvRows},
        plan::{Plan, decode::Products},
        problem::Problem,
    },
};

/// Columns of a head's products, and the one where the result's first element is: whole tiles of a wide head's lanes; in tiles
/// that a packed row's key and value share, values begin in the middle.
pub(in crate::rpa) fn lanes(problem: &Problem) -> [usize; 2] {
    match problem.kv_rows {
        KvRows::Interleaved | KvRows::Padded => [problem.kv_rows.width(problem.head_dim), 0],
        KvRows::Packed => [problem.head_dim.next_multiple_of(LANES), problem.head_dim % LANES],
    }
}

/// What keys and values of [`Block::two_heads`] are to be multiplied by, a power of two: the chip takes them for numbers of a type
/// with another bias.
pub(super) fn scale(problem: &Problem, chip: Chip) -> f64 {
    let least = |element: Element| element.minifloat().map_or(0, |format| format.least_exponent());
    let cached = problem.precision.kv;
    let unpacked = chip.unpacked_as(cached).filter(|_| Products::of(problem, chip).kv_heads > 1);
    f64::from(least(cached) - unpacked.map_or(least(cached), least)).exp2()
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
    /// Of the chip's vector units.
    has_bf16_arithmetic: bool,
    unpacked: Option<Element>,
}

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
        let (chip, words, per_token) = (plan.chip(), words.collect(), rows / packing(element));
        let (has_bf16_arithmetic, unpacked) = (chip.has_bf16_arithmetic(), chip.unpacked_as(element));
        Self { k, words, per_token, layout, operand, has_bf16_arithmetic, unpacked }
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
        let (words, of_value) = (key / self.packing(), value / self.packing());
        if words != of_value {
            return Half::ALL.map(|half| self.half(half, head, [0, count], None));
        }
        // One load for both.
        match self.layout.kv_rows {
            KvRows::Interleaved | KvRows::Padded => {
                let words = self.load(&self.words, words, [0, count]);
                [key, value].map(|row| self.numbers(words, row % self.packing()))
            }
            KvRows::Packed => {
                let all: Vec<_> = self
                    .words
                    .chunks(1)
                    .map(|piece| self.numbers(self.load(piece, words, [0, count]), key % self.packing()))
                    .collect();
                Half::ALL.map(|half| joined(self.k, &all[self.pieces_of(half)], 1))
            }
        }
    }

    /// One half of `head`, of `count` tokens from the `first` of the block on: `[count, columns]`. Of values, those behind the
    /// first `live` tokens become zeros, if they can be NaN: NaN times a weight of zero is NaN.
    pub fn half(&self, half: Half, head: usize, [first, count]: [usize; 2], live: Option<Value<'a>>) -> Value<'a> {
        let [row, _] = self.layout.place(head, half);
        let pieces = &self.words[self.pieces_of(half)];
        if self.widens_pairs(count) {
            let words = self.load_pairs(pieces, [row / self.packing(), first, count]);
            return self.widened_pairs(self.pairs(words, row % self.packing()), row % self.packing());
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

    /// Whether floats of 8 bits of `count` tokens become bf16 two tokens at a time.
    fn widens_pairs(&self, count: usize) -> bool {
        let is_narrow_float = self.layout.element.minifloat().is_some();
        let is_in_bf16 = self.operand == Element::Bf16 && self.has_bf16_arithmetic;
        is_narrow_float && is_in_bf16 && count.is_multiple_of(2 * SUBLANES)
    }

    /// Key and value of `head`, of `count` tokens from the `first` of the block on, where they are made together: interleaved
    /// floats of 8 bits, which lie in the same half of a word, made bf16. A word of a register of bf16 has two tokens: the even
    /// one in its lower half. `recent` are the words that were loaded last, and which: other heads have numbers in them, too.
    pub fn both(
        &self,
        head: usize,
        [first, count]: [usize; 2],
        recent: &mut Option<([usize; 3], [Value<'a>; 2])>,
    ) -> Option<[Value<'a>; 2]> {
        if !self.widens_pairs(count) || self.layout.kv_rows == KvRows::Packed {
            return None;
        }
        let rows = Half::ALL.map(|half| self.layout.place(head, half)[0]);
        let word = rows[0] / self.packing();
        let which = [word, first, count];
        let words = match *recent {
            Some((of, words)) if of == which => words,
            _ => self.load_pairs(&self.words, which),
        };
        *recent = Some((which, words));
        let pairs = self.pairs(words, rows[0] % self.packing());
        Some(rows.map(|row| self.widened_pairs(pairs, row % self.packing())))
    }

    /// Keys and values of the two heads whose rows word `word` of a token holds, of `count` tokens from the `first` on: of each two
    /// tokens those of the first head, then those of the second, `[2 * count, columns]` each. They are finite, and to be multiplied
    /// by [`scale`].
    pub fn two_heads(&self, word: usize, [first, count]: [usize; 2]) -> [Value<'a>; 2] {
        let to = self.unpacked.expect("a type that the chip unpacks");
        let words = self.load_pairs(&self.words, [word, first, count]);
        Half::ALL.map(|half| unpacked(of_two_tokens(words, half), to).cast(self.operand))
    }

    /// The even and the odd ones of `count` tokens from the `first` on: words `word`.
    fn load_pairs(&self, pieces: &[Ref<'a>], [word, first, count]: [usize; 3]) -> [Value<'a>; 2] {
        [0, 1].map(|token| {
            let (start, stride) = (word + (first + token) * self.per_token, 2 * self.per_token);
            Strided { pieces: pieces.to_vec(), start, count: count / 2, stride }.load(self.k)
        })
    }

    /// The halves of the words that have byte `index`, an even and an odd token's in one.
    fn pairs(&self, words: [Value<'a>; 2], index: usize) -> Value<'a> {
        let half = |words: Value<'a>| if index < 2 { words } else { words.shift_right_logical(16) };
        self.k.pack(&words.map(half), Element::I16)
    }

    fn widened_pairs(&self, pairs: Value<'a>, index: usize) -> Value<'a> {
        widened_pairs(pairs, index % 2, self.layout.element.minifloat().expect("a float of a cache"))
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

/// Words with the keys or the values of an even and an odd token, byte by byte, of the words of both: they have a key in each even
/// byte, a value in each odd one.
fn of_two_tokens<'a>([even, odd]: [Value<'a>; 2], half: Half) -> Value<'a> {
    match half {
        Half::Key => (even & EVEN_BYTES) | ((odd << 8) & !EVEN_BYTES),
        Half::Value => (even.shift_right_logical(8) & EVEN_BYTES) | (odd & !EVEN_BYTES),
    }
}

/// Words of four floats of 8 bits as floats of `to`, a row each; their bits are as the cache has them. NaN and infinity become large
/// numbers: one head's must not reach another's sums, where they have a weight of zero.
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

/// As [`widened`], of two floats in each word, at byte `index` of its halves, to bf16, by arithmetic in bf16.
fn widened_pairs(words: Value<'_>, index: usize, format: Minifloat) -> Value<'_> {
    const MANTISSA: u32 = 7;
    const BIAS: i32 = f32::MAX_EXP - 1;
    let (mantissa, least) = (format.mantissa_bits(), format.least_exponent());
    let both = |half: u32| i64::from((half << 16 | half).cast_signed());
    let raised = MANTISSA - mantissa;
    let [magnitude, sign] = match index {
        0 => [words << i64::from(raised), words << 8],
        _ => [words.shift_right_logical(i64::from(8 - raised)), words],
    };
    let magnitude = (magnitude & both(0x7f << raised)) + both((BIAS + least - 1).cast_unsigned() << MANTISSA);
    let magnitude = magnitude.bitcast(Element::Bf16);
    let magnitude = magnitude + (magnitude - f64::from(least).exp2()).minimum(0.0);
    (magnitude.bitcast(Element::I32) | (sign & both(0x8000))).bitcast(Element::Bf16)
}

#[cfg(test)]
mod tests {
    use pagoda_ir::{HostTensor, TensorType};

    use super::{super::computed, *};

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
            // Bytes 0 and 2 of a word, then 1 and 3, are pairs.
            let pairs = computed(&words, TensorType::new(Element::F32, &[2, 16, 128]), |_, words, out| {
                for index in 0..2 {
                    out.at(index).store(widened_pairs(words.load(), index, format).cast(Element::F32));
                }
            });
            let pairs = pairs.as_slice::<f32>();
            for (at, &code) in codes.iter().enumerate() {
                let ([row, lane], [half, index]) = ([at / 4 / 128, at / 4 % 128], [at % 4 / 2, at % 4 % 2]);
                check(code, pairs[index * 2048 + (2 * row + half) * 128 + lane]);
            }
        }
    }

    /// Every code at every place of the words of two tokens, as every chip has it.
    #[test]
    fn floats_of_8_bits_are_unpacked_exactly() {
        for (chip, element) in
            Chip::ALL.into_iter().flat_map(|chip| [(chip, Element::F8E4M3Fn), (chip, Element::F8E5M2)])
        {
            let Some(to) = chip.unpacked_as(element) else { continue };
            let format = element.minifloat().unwrap();
            let scale = (format.least_exponent() - to.minifloat().unwrap().least_exponent()) as f64;
            // Row by row the words of an even token, then those of an odd one.
            let code = |token: usize, lane: usize, byte: usize| (token * 29 + lane * 2 + byte * 67) as u8;
            let words: Vec<i32> = (0..2048)
                .map(|at| {
                    let (token, lane) = (2 * (at / 128 % 8) + at / 1024, at % 128);
                    i32::from_le_bytes(std::array::from_fn(|byte| code(token, lane, byte)))
                })
                .collect();
            let words = HostTensor::new(&[2, 8, 128], &words);
            let both = computed(&words, TensorType::new(Element::F32, &[2, 32, 128]), |_, words, out| {
                for half in Half::ALL {
                    let words = of_two_tokens([0, 1].map(|of| words.at(of).load()), half);
                    out.at(half as usize).store(unpacked(words, to).cast(Element::F32) * scale.exp2());
                }
            });
            for (at, &actual) in both.as_slice::<f32>().iter().enumerate() {
                let (half, row, lane) = (at / 4096, at / 128 % 32, at % 128);
                let (token, head) = (2 * (row / 4) + row % 2, row / 2 % 2);
                let expected = format.decode(code(token, lane, 2 * head + half));
                let is_same = actual == expected || (!expected.is_finite() && actual.is_finite());
                assert!(is_same, "{element} on {chip}: {actual} is not {expected}");
            }
        }
    }
}
