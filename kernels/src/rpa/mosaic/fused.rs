//! What fused attention does to the projections: queries and keys are turned by their positions, keys and values become tokens
//! of the cache.
//!
//! The projections are `[rows, columns]`, as the matrix product leaves them: a head is a range of columns, which may begin
//! in the middle of a tile of lanes. Here a head's numbers are f32 tiles of whole lanes, its first one in lane 0; what lies
//! behind its last one is anything.

use pagoda_ir::{
    Element,
    mosaic::{Builder, Ref, Value, tiling::LANES},
};

use crate::rpa::{
    kv_layout::{Half, KvRows},
    problem::Problem,
};

/// Factors of some rows' elements: `x * own + other half of x * other` is `x`, turned. Tiles of lanes, `[rows, LANES]` each.
pub(super) struct Angles<'a> {
    own: Vec<Value<'a>>,
    other: Vec<Value<'a>>,
}

impl<'a> Angles<'a> {
    /// From `[rows, head_dim]`, the cosines of each row's angles, then their sines. `wide` is memory of whole lanes for them,
    /// where a head has fewer.
    pub(super) fn load(k: &'a Builder<'a>, rows: &Ref<'a>, wide: Option<&Ref<'a>>) -> Self {
        let &[count, dim] = &rows.dims()[..] else { unreachable!("rows of angles") };
        let pieces: Vec<_> = match wide {
            Some(wide) => {
                let wide = wide.slice(0, 0, count);
                wide.slice(1, 0, dim).store(rows.load());
                vec![wide.load()]
            }
            None => (0..dim).step_by(LANES).map(|lane| rows.slice(1, lane, LANES).load()).collect(),
        };
        let swapped = swapped(k, dim, &pieces);
        let of = |low: &dyn Fn(usize) -> Value<'a>, high: &dyn Fn(usize) -> Value<'a>| {
            (0..pieces.len()).map(|piece| by_half(k, dim, piece, || low(piece), || high(piece))).collect()
        };
        Self {
            own: of(&|piece| pieces[piece], &|piece| swapped[piece]),
            other: of(&|piece| -swapped[piece], &|piece| pieces[piece]),
        }
    }

    /// A head's elements, turned.
    pub(super) fn turn(&self, k: &'a Builder<'a>, dim: usize, x: &[Value<'a>]) -> Vec<Value<'a>> {
        let swapped = swapped(k, dim, x);
        let factors = self.own.iter().zip(&self.other);
        x.iter().zip(swapped).zip(factors).map(|((&x, swapped), (&own, &other))| x * own + swapped * other).collect()
    }
}

/// `low` in the lanes of a piece that belong to the first half of a head, `high` in the others.
fn by_half<'a>(
    k: &'a Builder<'a>,
    dim: usize,
    piece: usize,
    low: impl FnOnce() -> Value<'a>,
    high: impl FnOnce() -> Value<'a>,
) -> Value<'a> {
    let half = dim / 2;
    match half.saturating_sub(piece * LANES) {
        0 => high(),
        lanes if lanes >= LANES => low(),
        lanes => {
            let low = low();
            k.iota(&low.dims(), 1).less(lanes).select(low, high())
        }
    }
}

/// The element of the other half in the place of each: that of `i + dim / 2`, around the end of the head.
fn swapped<'a>(k: &'a Builder<'a>, dim: usize, x: &[Value<'a>]) -> Vec<Value<'a>> {
    let (half, count) = (dim / 2, x.len());
    if let [x] = *x {
        return vec![match dim {
            LANES => x.rotate(half, 1),
            _ => by_half(k, dim, 0, || x.rotate(LANES - half, 1), || x.rotate(half, 1)),
        }];
    }
    let (pieces, lanes) = (half / LANES, half % LANES);
    let piece = |index: usize| x[index % count];
    (0..count)
        .map(|index| match lanes {
            0 => piece(index + pieces),
            // Half of a tile: the halves of two.
            _ => {
                let [low, high] = [0, 1].map(|next| piece(index + pieces + next).rotate(lanes, 1));
                k.iota(&low.dims(), 1).less(lanes).select(low, high)
            }
        })
        .collect()
}

/// The head whose columns begin at `first`: f32, of each piece `[rows, LANES]`.
pub(super) fn head<'a>(k: &'a Builder<'a>, dim: usize, columns: &Ref<'a>, first: usize) -> Vec<Value<'a>> {
    let tile = |index: usize| columns.slice(1, index * LANES, LANES).load().cast(Element::F32);
    let (index, lane) = (first / LANES, first % LANES);
    if dim.is_multiple_of(LANES) {
        return (0..dim / LANES).map(|piece| tile(index + piece)).collect();
    }
    let from = |index: usize| if lane == 0 { tile(index) } else { tile(index).rotate(LANES - lane, 1) };
    let low = from(index);
    vec![match lane + dim > LANES {
        false => low,
        true => k.iota(&low.dims(), 1).less(LANES - lane).select(low, from(index + 1)),
    }]
}

/// The inverse of [`head`] for `heads` of them, columns from 0 on: `store(tile of columns, [rows, LANES])`.
pub(super) fn to_columns<'a>(
    k: &'a Builder<'a>,
    dim: usize,
    heads: usize,
    of: impl Fn(usize) -> Vec<Value<'a>>,
    store: impl Fn(usize, Value<'a>),
) {
    if dim.is_multiple_of(LANES) {
        for head in 0..heads {
            of(head).into_iter().enumerate().for_each(|(piece, tile)| store(head * dim / LANES + piece, tile));
        }
        return;
    }
    for tile in 0..(heads * dim).div_ceil(LANES) {
        let begin = tile * LANES;
        let within = begin / dim..(begin + LANES).div_ceil(dim).min(heads);
        let moved = within.map(|head| {
            let (first, lanes) = (head * dim, of(head)[0]);
            let by = (LANES + first - begin) % LANES;
            (first.saturating_sub(begin), if by == 0 { lanes } else { lanes.rotate(by, 1) })
        });
        let all =
            moved.reduce(|(_, before), (lane, head)| (lane, k.iota(&head.dims(), 1).less(lane).select(before, head)));
        store(tile, all.expect("a tile has a head").1);
    }
}

/// Writes tokens of the cache, rounded once: `tokens` are the pieces of their rows, `[tokens, rows, lanes]` each, and `of(half,
/// head)` the numbers of a head.
pub(super) fn store_tokens<'a>(
    k: &'a Builder<'a>,
    problem: &Problem,
    heads: usize,
    tokens: &[Ref<'a>],
    of: impl Fn(Half, usize) -> Vec<Value<'a>>,
) {
    let &[count, rows, lanes] = &tokens[0].dims()[..] else { unreachable!("tokens have rows of lanes") };
    let element = problem.precision.kv;
    let packing = 4 / element.bytes();
    let rows_of_head = |head: usize| {
        let [key, value] = Half::ALL.map(|half| of(half, head));
        match problem.kv_rows {
            KvRows::Interleaved | KvRows::Padded => vec![key, value],
            KvRows::Packed => {
                let value = value[0].rotate(problem.head_dim, 1);
                vec![vec![k.iota(&value.dims(), 1).less(problem.head_dim).select(key[0], value)]]
            }
        }
    };
    let all: Vec<_> = (0..heads).flat_map(rows_of_head).collect();
    let words = all.len().div_ceil(packing);
    for (word, rows_of_word) in all.chunks(packing).enumerate() {
        for (piece, tokens) in tokens.iter().enumerate() {
            let of_row = |row: &Vec<Value<'a>>| match lanes {
                LANES => row[piece],
                _ => row[piece].slice(&[0, 0], &[count, lanes]),
            };
            let mut numbers: Vec<_> = rows_of_word.iter().map(of_row).collect();
            let tokens = tokens.reshape(&[count * rows, lanes]);
            let (tokens, value) = match element {
                Element::F32 => (tokens, numbers[0]),
                Element::Bf16 => {
                    numbers.resize(packing, k.zeros(Element::F32, &[count, lanes]));
                    (tokens.bitcast(Element::I32), k.pack(&numbers, element))
                }
                _ => {
                    let bits = numbers.into_iter().enumerate().map(|(at, x)| match at {
                        0 => bits(x, element),
                        _ => bits(x, element) << (at * element.bits()),
                    });
                    (tokens.bitcast(Element::I32), bits.reduce(|word, bits| word | bits).expect("a word has numbers"))
                }
            };
            tokens.strided(0, word, count, rows / packing).store(value);
        }
    }
    for word in words..rows / packing {
        for tokens in tokens {
            let tokens = tokens.reshape(&[count * rows, lanes]).bitcast(Element::I32);
            tokens.strided(0, word, count, rows / packing).store(k.zeros(Element::I32, &[count, lanes]));
        }
    }
}

/// What a number of 8 bits is stored as, in the lowest bits: rounded to nearest even; what is too large becomes the largest.
fn bits(x: Value<'_>, element: Element) -> Value<'_> {
    match element {
        Element::I8 => {
            // An f32 of this size has units in its last place.
            let units = 1.5 * f64::from(1 << F32_MANTISSA);
            (x.maximum(-128.0).minimum(127.0) + units).bitcast(Element::I32) & 0xff
        }
        float => narrowed(x, float),
    }
}

const F32_MANTISSA: usize = 23;
const F32_BIAS: i32 = 127;

/// A float of 8 bits, by integer arithmetic, which every generation has.
fn narrowed(x: Value<'_>, element: Element) -> Value<'_> {
    let (mantissa, most) = match element {
        Element::F8E4M3Fn => (3, 448.0),
        _ => (2, 57344.0),
    };
    let bias = (1 << (6 - mantissa)) - 1;
    let power = |exponent: i32| f64::from(exponent).exp2();
    let sign = x.bitcast(Element::I32).shift_right_logical(24) & 0x80;
    let magnitude = x.abs().minimum(most);
    let whole = magnitude.bitcast(Element::I32);
    let dropped = F32_MANTISSA - mantissa;
    let is_odd = (whole >> dropped) & 1;
    let normal = (whole + is_odd + ((1_i64 << (dropped - 1)) - 1)) >> dropped;
    let normal = normal - (i64::from(F32_BIAS - bias) << mantissa);
    // Below the least normal number: an f32 that has their unit in its last place.
    let units = power(F32_MANTISSA as i32 + 1 - bias - mantissa as i32);
    let subnormal = (magnitude + units).bitcast(Element::I32) - i64::from((units as f32).to_bits());
    magnitude.less(power(1 - bias)).select(subnormal, normal) | sign
}

#[cfg(test)]
mod tests {
    use pagoda_ir::{HostTensor, TensorType};

    use super::{super::computed, *};

    /// Numbers of every size, those halfway between two, and what is too large.
    #[test]
    fn numbers_are_narrowed_as_xla_does() {
        let some = |at: usize| {
            let (exponent, mantissa) = ((at / 32 % 32) as i32 - 14, at % 32);
            (if at < 1024 { 1.0 } else { -1.0 }) * f64::from(exponent).exp2() * (1.0 + mantissa as f64 / 32.0)
        };
        let numbers: Vec<f32> = (0..2048).map(|at| some(at) as f32).collect();
        for element in [Element::Bf16, Element::F8E4M3Fn, Element::F8E5M2, Element::I8] {
            let x = HostTensor::new(&[16, 128], &numbers);
            let result = TensorType::new(Element::I32, &[16, 128]);
            let narrowed = computed(&x, result, |k, x, out| {
                out.store(match element {
                    Element::Bf16 => k.pack(&[x.load(), k.zeros(Element::F32, &[16, 128])], element),
                    _ => bits(x.load(), element),
                });
            });
            let rounded = |&x: &f32| match element {
                Element::I8 => f64::from(x).clamp(-128.0, 127.0).round_ties_even(),
                Element::F8E4M3Fn => f64::from(x).clamp(-448.0, 448.0),
                Element::F8E5M2 => f64::from(x).clamp(-57344.0, 57344.0),
                _ => f64::from(x),
            };
            let rounded: Vec<f64> = numbers.iter().map(rounded).collect();
            let expected = HostTensor::from_f64(element, &[2048], &rounded);
            let bytes = expected.bytes().chunks_exact(element.bytes());
            let expected = bytes.map(|bytes| bytes.iter().rev().fold(0, |word, &byte| word << 8 | i32::from(byte)));
            assert_eq!(narrowed.as_slice::<i32>(), expected.collect::<Vec<_>>(), "{element}");
        }
    }
}
