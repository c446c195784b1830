//! Numbers of a KV cache, as kernels in Rust read and write them.

use pagoda_ir::element::Native;

use crate::float::Float;

/// How the numbers of a cache are stored.
pub trait Cached: Send + Sync + 'static {
    /// What is in memory.
    type Code: Native;

    /// The number nearest to `value`; of two equally near ones the even one. In 8 bits, the largest where that is too small.
    fn stored(value: f32) -> Self::Code;

    /// A vector in f32, exactly: itself, or widened into `wide`.
    fn vector<'v>(codes: &'v [Self::Code], wide: &'v mut [f32]) -> &'v [f32];
}

impl<T: Float> Cached for T {
    type Code = T;

    #[inline(always)]
    fn stored(value: f32) -> T {
        T::narrow(value)
    }

    #[inline(always)]
    fn vector<'v>(codes: &'v [T], wide: &'v mut [f32]) -> &'v [f32] {
        T::vector(codes, wide)
    }
}

/// Integers of 8 bits.
impl Cached for i8 {
    type Code = Self;

    #[inline(always)]
    fn stored(value: f32) -> Self {
        // A cast saturates.
        value.round_ties_even() as Self
    }

    #[inline(always)]
    fn vector<'v>(codes: &'v [Self], wide: &'v mut [f32]) -> &'v [f32] {
        wide.iter_mut().zip(codes).for_each(|(wide, &code)| *wide = code.into());
        wide
    }
}
