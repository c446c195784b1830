//! Functions of f32, each a few operations on f64 without a branch, so that a loop over them becomes vector instructions.
//!
//! All but the last places of an f64 are right, so a result is the f32 that is nearest to the true value, but for about one in a
//! million. They give the same bits on every processor: no operation is fused or reordered.

use std::f64::consts::{LN_2, LOG2_E};

/// e to the `x`, for -700 < `x` < 700; NaN stays.
#[inline(always)]
fn exp_f64(x: f64) -> f64 {
    // Adding 1.5 * 2^52 rounds to an integer, and leaves it in the low bits.
    const ROUNDS: f64 = 6_755_399_441_055_744.0;
    let shifted = x * LOG2_E + ROUNDS;
    let r = x - (shifted - ROUNDS) * LN_2;
    // The series, as far as it matters for |r| < ln(2) / 2.
    let low = 1.0 + r * (1.0 + r * (1.0 / 2.0 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0)))));
    let high = 1.0 / 720.0 + r * (1.0 / 5_040.0 + r * (1.0 / 40_320.0 + r * (1.0 / 362_880.0 + r / 3_628_800.0)));
    let cube = r * r * r;
    let scale = (shifted.to_bits() << 52).wrapping_add(1023 << 52);
    (low + cube * cube * high) * f64::from_bits(scale)
}

/// Keeps `x` between two bounds; NaN stays.
#[inline(always)]
fn within(x: f64, low: f64, high: f64) -> f64 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// e to the `x`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    exp_f64(within(f64::from(x), -200.0, 200.0)) as f32
}

/// 2 to the `x`.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    exp_f64(within(f64::from(x), -300.0, 300.0) * LN_2) as f32
}

/// The natural logarithm.
#[inline(always)]
pub(super) fn ln(x: f32) -> f32 {
    // `x` is `m * 2^e` with sqrt(1/2) <= m < sqrt(2).
    const SQRT_HALF: u64 = 0x3fe6_a09e_667f_3bcd;
    let bits = f64::from(x).to_bits();
    let above = bits.wrapping_sub(SQRT_HALF);
    // As f64 without a conversion from 64-bit integers, which few instruction sets have.
    let e = f64::from_bits((above.cast_signed() >> 52).cast_unsigned().wrapping_add(0x4338_0000_0000_0000))
        - 6_755_399_441_055_744.0;
    let m = f64::from_bits((above & 0x000f_ffff_ffff_ffff).wrapping_add(SQRT_HALF));
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let low = 1.0 + z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * (1.0 / 9.0))));
    let high = 1.0 / 11.0 + z * (1.0 / 13.0 + z * (1.0 / 15.0 + z / 17.0));
    let quartic = z * z;
    let ln = (e * LN_2 + 2.0 * s * (low + quartic * quartic * z * high)) as f32;
    let ln = if x == f32::INFINITY { x } else { ln };
    let ln = if x == 0.0 { f32::NEG_INFINITY } else { ln };
    if x < 0.0 || x.is_nan() { f32::NAN } else { ln }
}

/// The hyperbolic tangent.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let wide = f64::from(x);
    let grown = exp_f64(2.0 * within(wide, -20.0, 20.0));
    let square = wide * wide;
    // Where the difference would lose places.
    let small = wide * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))));
    let tanh = if square < 1.0 / 4096.0 { small } else { (grown - 1.0) / (grown + 1.0) };
    tanh as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;

    /// Beside the standard library's functions of f64, rounded: the same f32 but for near ties, then its neighbour.
    #[test]
    fn functions_are_the_nearest_floats() {
        let mut random = SplitMix64::new(1);
        type Function = (&'static str, fn(f32) -> f32, fn(f64) -> f64);
        let functions: [Function; 4] =
            [("exp", exp, f64::exp), ("exp2", exp2, f64::exp2), ("ln", ln, f64::ln), ("tanh", tanh, f64::tanh)];
        for (name, ours, exact) in functions {
            let mut off = 0;
            let draws = 200_000;
            for draw in 0..draws {
                // Any bits, and numbers of a size that kernels have.
                let x = match draw % 2 {
                    0 => f32::from_bits(random.bits() as u32),
                    _ => (random.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0) * 20.0,
                };
                let (found, expected) = (ours(x), exact(f64::from(x)) as f32);
                if found.is_nan() && expected.is_nan() || found.to_bits() == expected.to_bits() {
                    continue;
                }
                assert_eq!(
                    found.to_bits().abs_diff(expected.to_bits()),
                    1,
                    "{name}({x:e}) = {found:e}, not {expected:e}"
                );
                off += 1;
            }
            assert!(off <= draws / 10_000, "{name}: {off} of {draws} are neighbours");
        }
        let edges = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE, 1e-45, 1.0, -1.0, 88.8, -103.9];
        for x in edges {
            for (name, ours, exact) in functions {
                let (found, expected) = (ours(x), exact(f64::from(x)) as f32);
                assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{name}({x})");
            }
        }
    }
}
