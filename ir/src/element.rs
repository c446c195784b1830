//! Element types: the one enum that the builders, host tensors, PJRT buffers and the tile machine share.

use std::fmt;

use crate::minifloat::Minifloat;

/// The type of one array element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    /// Boolean (`i1` in MLIR, one byte in host memory).
    Pred,
    /// Signed 2-bit integer, in the low bits of a byte in host memory (as `ml_dtypes.int2`).
    I2,
    /// Signed 4-bit integer, in the low bits of a byte in host memory (as `ml_dtypes.int4`).
    I4,
    /// Signed 8-bit integer.
    I8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 2-bit integer, in the low bits of a byte in host memory.
    U2,
    /// Unsigned 4-bit integer, in the low bits of a byte in host memory.
    U4,
    /// Unsigned 8-bit integer.
    U8,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned 64-bit integer.
    U64,
    /// 8-bit float with 4 exponent bits and 3 stored mantissa bits: no infinities, NaN where all bits but the sign are set.
    F8E4M3Fn,
    /// 8-bit float with 4 exponent bits of bias 11 and 3 stored mantissa bits: no infinities, one NaN in the place of -0.
    F8E4M3B11Fnuz,
    /// 8-bit float with 5 exponent bits and 2 stored mantissa bits, with infinities and NaN as IEEE has them.
    F8E5M2,
    /// Power of two in 8 bits, for scales: an exponent of bias 127, no sign, no zero, NaN where all bits are set.
    F8E8M0Fnu,
    /// bfloat16: 8 exponent bits, 7 stored mantissa bits.
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
}

impl Element {
    /// All element types, in declaration order.
    pub const ALL: [Self; 21] = [
        Self::Pred,
        Self::I2,
        Self::I4,
        Self::I8,
        Self::I16,
        Self::I32,
        Self::I64,
        Self::U2,
        Self::U4,
        Self::U8,
        Self::U16,
        Self::U32,
        Self::U64,
        Self::F8E4M3Fn,
        Self::F8E4M3B11Fnuz,
        Self::F8E5M2,
        Self::F8E8M0Fnu,
        Self::Bf16,
        Self::F16,
        Self::F32,
        Self::F64,
    ];

    /// Bytes of one element in host memory (a `Pred` takes one, and so do types of less than 8 bits).
    pub const fn bytes(self) -> usize {
        match self {
            Self::Pred | Self::I2 | Self::U2 | Self::I4 | Self::U4 | Self::I8 | Self::U8 => 1,
            Self::F8E4M3Fn | Self::F8E4M3B11Fnuz | Self::F8E5M2 | Self::F8E8M0Fnu => 1,
            Self::I16 | Self::U16 | Self::Bf16 | Self::F16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::I64 | Self::U64 | Self::F64 => 8,
        }
    }

    /// Bits of one element in a device's memory, where narrow elements are packed: 8 for a `Pred`.
    pub const fn bits(self) -> usize {
        match self {
            Self::I2 | Self::U2 => 2,
            Self::I4 | Self::U4 => 4,
            other => 8 * other.bytes(),
        }
    }

    /// Bytes of `count` elements in a device's memory.
    pub const fn packed_bytes(self, count: usize) -> usize {
        (count * self.bits()).div_ceil(8)
    }

    /// The format of a float of 8 bits.
    pub const fn minifloat(self) -> Option<Minifloat> {
        match self {
            Self::F8E4M3Fn => Some(Minifloat::F8E4M3FN),
            Self::F8E4M3B11Fnuz => Some(Minifloat::F8E4M3B11FNUZ),
            Self::F8E5M2 => Some(Minifloat::F8E5M2),
            Self::F8E8M0Fnu => Some(Minifloat::F8E8M0FNU),
            _ => None,
        }
    }

    /// The name as MLIR spells it in StableHLO types (`i1`, `ui32`, `bf16`, ...).
    pub const fn mlir(self) -> &'static str {
        match self {
            Self::Pred => "i1",
            Self::I2 => "i2",
            Self::I4 => "i4",
            Self::I8 => "i8",
            Self::I16 => "i16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U2 => "ui2",
            Self::U4 => "ui4",
            Self::U8 => "ui8",
            Self::U16 => "ui16",
            Self::U32 => "ui32",
            Self::U64 => "ui64",
            Self::F8E4M3Fn => "f8E4M3FN",
            Self::F8E4M3B11Fnuz => "f8E4M3B11FNUZ",
            Self::F8E5M2 => "f8E5M2",
            Self::F8E8M0Fnu => "f8E8M0FNU",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::F64 => "f64",
        }
    }

    /// The element type that MLIR spells `name`.
    pub fn from_mlir(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|element| element.mlir() == name)
    }

    /// The type without a sign of its own, as the ops of a kernel see it: signed for unsigned integers, itself for others.
    pub const fn signless(self) -> Self {
        match self {
            Self::U2 => Self::I2,
            Self::U4 => Self::I4,
            Self::U8 => Self::I8,
            Self::U16 => Self::I16,
            Self::U32 => Self::I32,
            Self::U64 => Self::I64,
            other => other,
        }
    }

    /// The type as which host memory of this one is viewed: bytes, where Rust has no type for it.
    pub const fn viewed(self) -> Self {
        match self {
            Self::I8 => Self::I8,
            element if element.bytes() == 1 => Self::U8,
            element => element,
        }
    }

    /// A floating-point type.
    pub const fn is_float(self) -> bool {
        self.minifloat().is_some() || matches!(self, Self::Bf16 | Self::F16 | Self::F32 | Self::F64)
    }

    /// A signed integer type (`Pred` is none).
    pub const fn is_signed(self) -> bool {
        matches!(self, Self::I2 | Self::I4 | Self::I8 | Self::I16 | Self::I32 | Self::I64)
    }

    /// A signed or unsigned integer type (`Pred` is none).
    pub const fn is_integer(self) -> bool {
        self.is_signed() || matches!(self, Self::U2 | Self::U4 | Self::U8 | Self::U16 | Self::U32 | Self::U64)
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pred => "pred",
            Self::U2 => "u2",
            Self::U4 => "u4",
            Self::U8 => "u8",
            Self::U16 => "u16",
            Self::U32 => "u32",
            Self::U64 => "u64",
            Self::F8E4M3Fn => "f8e4m3fn",
            Self::F8E4M3B11Fnuz => "f8e4m3b11fnuz",
            Self::F8E5M2 => "f8e5m2",
            Self::F8E8M0Fnu => "f8e8m0fnu",
            other => other.mlir(),
        })
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that is stored exactly like an [`Element`].
///
/// Sealed: every implementor is plain old data of [`Element::bytes`] bytes, valid for any bit pattern, which is what
/// lets [`HostTensor`](crate::tensor::HostTensor) view its bytes as a slice.
pub trait Native: Copy + Send + Sync + 'static + sealed::Sealed {
    /// The element type.
    const ELEMENT: Element;
}

macro_rules! native {
    ($($rust:ty => $element:ident),* $(,)?) => {$(
        impl sealed::Sealed for $rust {}
        impl Native for $rust {
            const ELEMENT: Element = Element::$element;
        }
    )*};
}

native! {
    i8 => I8, i16 => I16, i32 => I32, i64 => I64,
    u8 => U8, u16 => U16, u32 => U32, u64 => U64,
    half::bf16 => Bf16, half::f16 => F16, f32 => F32, f64 => F64,
}
