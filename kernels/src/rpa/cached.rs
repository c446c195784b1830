//! Numbers of a KV cache, as kernels in Rust read and write them.

use std::sync::LazyLock;

use pagoda_ir::{element::Native, minifloat::Minifloat};

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

macro_rules! minifloats {
    ($($(#[$doc:meta])* $name:ident: $format:ident,)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub enum $name {}

        impl Cached for $name {
            type Code = u8;

            fn stored(value: f32) -> u8 {
                let most = Minifloat::$format.most();
                Minifloat::$format.encode(value.clamp(-most, most).into())
            }

            #[inline(always)]
            fn vector<'v>(codes: &'v [u8], wide: &'v mut [f32]) -> &'v [f32] {
                static NUMBERS: LazyLock<[f32; 256]> =
                    LazyLock::new(|| std::array::from_fn(|code| Minifloat::$format.decode(code as u8)));
                let numbers = &*NUMBERS;
                wide.iter_mut().zip(codes).for_each(|(wide, &code)| *wide = numbers[usize::from(code)]);
                wide
            }
        }
    )*};
}

minifloats! {
    /// Floats of 8 bits with 4 exponent bits.
    F8E4M3Fn: F8E4M3FN,
    /// Floats of 8 bits with 5 exponent bits.
    F8E5M2: F8E5M2,
}
