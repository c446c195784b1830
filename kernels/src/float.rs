//! The element types of the kernels in Rust, f32 and bf16 (arithmetic is f32 in both), and their exponential.

use half::bf16;
use pagoda_ir::element::Native;

use crate::{
    matmul::native::multiply::{Pack, Packed, Part},
    simd,
};

/// An element of a kernel's arrays.
pub trait Float: Native {
    /// Exact widening.
    fn widen(self) -> f32;
    /// Rounding to nearest even.
    fn narrow(value: f32) -> Self;
    /// A vector in f32: itself, or widened into `wide`.
    fn vector<'v>(narrow: &'v [Self], wide: &'v mut [f32]) -> &'v [f32];
}

/// An element of a matmul's weight, beside activations of type `X`. What its functions run is compiled once, here.
pub trait Times<X>: Float {
    /// Packs columns.
    fn pack(columns: Pack<'_, X>) -> Packed;
    /// Does a part of the product.
    fn part(part: Part<'_, Self>);
}

impl Float for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn vector<'v>(narrow: &'v [Self], _: &'v mut [f32]) -> &'v [f32] {
        narrow
    }
}

impl Times<Self> for f32 {
    fn pack(columns: Pack<'_, Self>) -> Packed {
        simd::with_f32(columns)
    }

    fn part(part: Part<'_, Self>) {
        simd::with_f32(part);
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// Without branches, so that loops of it become vector instructions.
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        Self::from_bits(if value.is_nan() { bits >> 16 | 0x40 } else { rounded } as u16)
    }

    #[inline(always)]
    fn vector<'v>(narrow: &'v [Self], wide: &'v mut [f32]) -> &'v [f32] {
        wide.iter_mut().zip(narrow).for_each(|(wide, narrow)| *wide = narrow.widen());
        wide
    }
}

impl Times<Self> for bf16 {
    fn pack(columns: Pack<'_, Self>) -> Packed {
        simd::with_bf16(columns)
    }

    fn part(part: Part<'_, Self>) {
        simd::with_bf16(part);
    }
}

/// A weight of half the bytes, with the values that it has: sums are as exact as with one in f32.
impl Times<f32> for bf16 {
    fn pack(columns: Pack<'_, f32>) -> Packed {
        simd::with_widened(columns)
    }

    fn part(part: Part<'_, Self>) {
        simd::with_widened(part);
    }
}

/// `e^x` for `x <= 0`, within 2 units in the last place: `2^n * e^r` with `|r| <= ln(2) / 2` and a Taylor polynomial of
/// degree 7, in plain arithmetic that vectorises. No less than `e^-87`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let x = if x > -87.0 { x } else { -87.0 };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    // The integer is in the last bits of the sum.
    p * f32::from_bits((rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23)
}
