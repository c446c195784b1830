//! The element types of the kernels in Rust, f32 and bf16: arithmetic is f32 in both.

use half::bf16;
use pagoda_ir::element::Native;

/// An element of a kernel's arrays.
pub trait Float: Native {
    /// Exact widening.
    fn widen(self) -> f32;
    /// Rounding to nearest even.
    fn narrow(value: f32) -> Self;
    /// A vector in f32: itself, or widened into `wide`.
    fn vector<'v>(narrow: &'v [Self], wide: &'v mut [f32]) -> &'v [f32];
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

impl Float for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }

    #[inline(always)]
    fn vector<'v>(narrow: &'v [Self], wide: &'v mut [f32]) -> &'v [f32] {
        wide.iter_mut().zip(narrow).for_each(|(wide, narrow)| *wide = narrow.widen());
        wide
    }
}
