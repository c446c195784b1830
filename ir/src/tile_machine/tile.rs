//! Tiles in registers, and the ops on them: plain loops over whole tiles.
//!
//! Floats of any width are kept as `f32` and rounded after each op that produces a narrower type, integers of any width
//! as `i32` and wrapped; both are exact. Buffers of tiles that die are reused by the op that consumes them.

use std::sync::Arc;

use half::{bf16, f16};

use super::{
    lanes::{self, Arch},
    math,
};
use crate::{element::Element, minifloat::Minifloat};

/// The elements of a tile, row-major. Its sizes are static and known to every op.
#[derive(Clone, Debug)]
pub(super) enum Tile {
    Float(Arc<Vec<f32>>),
    Int(Arc<Vec<i32>>),
    Pred(Arc<Vec<bool>>),
}

/// An elementwise op of one operand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Unary {
    Neg,
    Abs,
    Exp,
    Exp2,
    Log,
    Log2,
    Tanh,
    Sin,
    Cos,
    Tan,
    Sqrt,
    Rsqrt,
    Floor,
    Ceil,
    /// To the nearest integer; halves away from zero.
    Round,
    /// To the nearest integer; halves to the even one.
    RoundEven,
    Erf,
    Log1p,
    Reciprocal,
    /// 1 / (1 + e^-x).
    Logistic,
    LeadingZeros,
    CountOnes,
}

impl Unary {
    #[inline(always)]
    pub(super) fn float(self, x: f32) -> f32 {
        match self {
            Self::Neg => -x,
            Self::Abs => x.abs(),
            Self::Exp => math::exp(x),
            Self::Exp2 => math::exp2(x),
            Self::Log => math::ln(x),
            Self::Log2 => x.log2(),
            Self::Tanh => math::tanh(x),
            Self::Sin => x.sin(),
            Self::Cos => x.cos(),
            Self::Tan => x.tan(),
            Self::Sqrt => x.sqrt(),
            Self::Rsqrt => 1.0 / x.sqrt(),
            Self::Floor => x.floor(),
            Self::Ceil => x.ceil(),
            Self::Round => x.round(),
            Self::RoundEven => x.round_ties_even(),
            Self::Erf => libm::erff(x),
            Self::Log1p => x.ln_1p(),
            Self::Reciprocal => 1.0 / x,
            Self::Logistic => 1.0 / (1.0 + math::exp(-x)),
            Self::LeadingZeros | Self::CountOnes => f32::NAN,
        }
    }

    #[inline(always)]
    pub(super) fn int(self, element: Element, x: i32) -> i32 {
        match self {
            Self::Abs => x.wrapping_abs(),
            Self::LeadingZeros => (unsigned(element, x).leading_zeros() + element.bits() as u32) as i32 - 32,
            Self::CountOnes => unsigned(element, x).count_ones() as i32,
            _ => x.wrapping_neg(),
        }
    }
}

/// An elementwise op of two operands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Rem,
    /// The larger number; NaN where either is.
    Max,
    /// The smaller number; NaN where either is.
    Min,
    /// The larger number; the other one where one is NaN.
    MaxNumber,
    /// The smaller number; the other one where one is NaN.
    MinNumber,
    MaxUnsigned,
    MinUnsigned,
    DivUnsigned,
    RemUnsigned,
    Pow,
    Atan2,
    And,
    Or,
    Xor,
    Shl,
    ShrSigned,
    ShrUnsigned,
}

impl Binary {
    #[inline(always)]
    pub(super) fn float(self, x: f32, y: f32) -> f32 {
        match self {
            Self::Add => x + y,
            Self::Sub => x - y,
            Self::Mul => x * y,
            Self::Div => x / y,
            Self::Rem => x % y,
            Self::Max => maximum(x, y),
            Self::Min => minimum(x, y),
            Self::MaxNumber => x.max(y),
            Self::MinNumber => x.min(y),
            Self::Pow => x.powf(y),
            Self::Atan2 => x.atan2(y),
            Self::MaxUnsigned | Self::MinUnsigned | Self::DivUnsigned | Self::RemUnsigned => f32::NAN,
            Self::And | Self::Or | Self::Xor | Self::Shl | Self::ShrSigned | Self::ShrUnsigned => f32::NAN,
        }
    }

    /// Whether a second operand of 0 is a fault.
    pub(super) fn divides(self) -> bool {
        matches!(self, Self::Div | Self::Rem | Self::DivUnsigned | Self::RemUnsigned)
    }

    /// Of narrow integers, which are held by their sign; the result is to be wrapped. A division by zero has all bits set, and
    /// leaves all as remainder, as XLA has it.
    #[inline(always)]
    pub(super) fn int(self, element: Element, x: i32, y: i32) -> i32 {
        let (bits, u) = (element.bits() as u32, |x: i32| unsigned(element, x));
        match self {
            Self::Add => x.wrapping_add(y),
            Self::Sub => x.wrapping_sub(y),
            Self::Mul => x.wrapping_mul(y),
            Self::Div if y == 0 => -1,
            Self::Div => x.wrapping_div(y),
            Self::Rem | Self::RemUnsigned if y == 0 => x,
            Self::Rem => x.wrapping_rem(y),
            Self::DivUnsigned => u(x).checked_div(u(y)).unwrap_or(u32::MAX) as i32,
            Self::RemUnsigned => (u(x) % u(y)) as i32,
            Self::Max | Self::MaxNumber => x.max(y),
            Self::Min | Self::MinNumber => x.min(y),
            Self::MaxUnsigned => u(x).max(u(y)) as i32,
            Self::MinUnsigned => u(x).min(u(y)) as i32,
            Self::Pow => x.wrapping_pow(y.max(0) as u32),
            Self::Atan2 => 0,
            Self::And => x & y,
            Self::Or => x | y,
            Self::Xor => x ^ y,
            // Shifts by the width or more leave nothing.
            Self::Shl => x.checked_shl(u(y)).unwrap_or(0),
            Self::ShrSigned => x >> u(y).min(bits - 1),
            Self::ShrUnsigned => u(x).checked_shr(u(y)).unwrap_or(0) as i32,
        }
    }
}

#[inline(always)]
fn maximum(x: f32, y: f32) -> f32 {
    let larger = if x > y { x } else { y };
    if x.is_nan() { x } else { larger }
}

#[inline(always)]
fn minimum(x: f32, y: f32) -> f32 {
    let smaller = if x < y { x } else { y };
    if x.is_nan() { x } else { smaller }
}

/// A comparison; `Unordered*` are true where a side is NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    UnsignedLt,
    UnsignedLe,
    UnsignedGt,
    UnsignedGe,
    Ordered,
    Unordered,
    UnorderedEq,
    UnorderedLt,
    UnorderedLe,
    UnorderedGt,
    UnorderedGe,
    Always,
    Never,
}

impl Compare {
    #[inline(always)]
    pub(super) fn float(self, x: f32, y: f32) -> bool {
        let unordered = x.is_nan() || y.is_nan();
        match self {
            Self::Eq => x == y,
            Self::Ne => x != y,
            Self::Lt | Self::UnsignedLt => x < y,
            Self::Le | Self::UnsignedLe => x <= y,
            Self::Gt | Self::UnsignedGt => x > y,
            Self::Ge | Self::UnsignedGe => x >= y,
            Self::Ordered => !unordered,
            Self::Unordered => unordered,
            Self::UnorderedEq => unordered || x == y,
            Self::UnorderedLt => unordered || x < y,
            Self::UnorderedLe => unordered || x <= y,
            Self::UnorderedGt => unordered || x > y,
            Self::UnorderedGe => unordered || x >= y,
            Self::Always => true,
            Self::Never => false,
        }
    }

    #[inline(always)]
    pub(super) fn int(self, x: i32, y: i32) -> bool {
        match self {
            Self::Ne => x != y,
            Self::Lt => x < y,
            Self::Le => x <= y,
            Self::Gt => x > y,
            Self::Ge => x >= y,
            Self::UnsignedLt => (x as u32) < y as u32,
            Self::UnsignedLe => x as u32 <= y as u32,
            Self::UnsignedGt => x as u32 > y as u32,
            Self::UnsignedGe => x as u32 >= y as u32,
            _ => x == y,
        }
    }
}

/// How a reduction combines elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Reduction {
    Sum,
    Product,
    Max,
    Min,
    MaxNumber,
    MinNumber,
    MaxUnsigned,
    MinUnsigned,
    And,
    Or,
    Xor,
}

impl Reduction {
    pub(super) fn binary(self) -> Binary {
        match self {
            Self::Sum => Binary::Add,
            Self::Product => Binary::Mul,
            Self::Max => Binary::Max,
            Self::Min => Binary::Min,
            Self::MaxNumber => Binary::MaxNumber,
            Self::MinNumber => Binary::MinNumber,
            Self::MaxUnsigned => Binary::MaxUnsigned,
            Self::MinUnsigned => Binary::MinUnsigned,
            Self::And => Binary::And,
            Self::Or => Binary::Or,
            Self::Xor => Binary::Xor,
        }
    }
}

/// Wraps an `i32` to a narrower integer type, by its sign.
#[inline(always)]
pub(super) fn wrap(element: Element, x: i32) -> i32 {
    match element {
        Element::Pred => x & 1,
        _ => {
            let unused = 32_usize.saturating_sub(element.bits());
            x << unused >> unused
        }
    }
}

/// Rounds an `f32` to an integer type, to its least or greatest number beyond them and to 0 for NaN.
#[inline(always)]
pub(super) fn saturate(element: Element, signed: bool, nearest: bool, x: f32) -> i32 {
    let x = if nearest { x.round_ties_even() } else { x };
    let unused = 32_usize.saturating_sub(element.bits());
    match signed {
        true => (x as i32).clamp(i32::MIN >> unused, i32::MAX >> unused),
        false => wrap(element, (x as u32).min(u32::MAX >> unused).cast_signed()),
    }
}

/// Rounds an `f32` to a narrower float type.
pub(super) fn round(element: Element, x: f32) -> f32 {
    match element {
        Element::Bf16 => round_to_bf16(x),
        Element::F16 => f16::from_f32(x).to_f32(),
        Element::F8E4M3Fn => Minifloat::F8E4M3FN.round(x),
        Element::F8E4M3B11Fnuz => Minifloat::F8E4M3B11FNUZ.round(x),
        Element::F8E5M2 => Minifloat::F8E5M2.round(x),
        Element::F8E8M0Fnu => Minifloat::F8E8M0FNU.round(x),
        _ => x,
    }
}

/// The nearest number with so many bits of mantissa and, if they are fewer, of exponent, halves to the even one; too large is
/// infinite, too small zero.
fn reduced(x: f32, exponent_bits: Option<u32>, mantissa_bits: u32) -> f32 {
    if !x.is_finite() || x == 0.0 {
        return x;
    }
    let dropped = 23 - mantissa_bits;
    let bits = x.to_bits();
    let half = if dropped == 0 { 0 } else { (1 << (dropped - 1)) - 1 + (bits >> dropped & 1) };
    let rounded = f32::from_bits((bits + half) & (u32::MAX << dropped));
    let Some(exponent_bits) = exponent_bits else { return rounded };
    let most = (1 << (exponent_bits - 1)) - 1;
    match (rounded.to_bits() >> 23 & 0xff) as i32 - 127 {
        exponent if exponent > most => f32::INFINITY.copysign(x),
        exponent if exponent < 1 - most => 0.0_f32.copysign(x),
        _ => rounded,
    }
}

pub(super) fn reduce_precision(x: &Tile, exponent_bits: Option<u32>, mantissa_bits: u32) -> Tile {
    let Tile::Float(x) = x else { unreachable!("decoding gives floats") };
    Tile::Float(Arc::new(x.iter().map(|&x| reduced(x, exponent_bits, mantissa_bits)).collect()))
}

/// Nearest even; vectorises, unlike `half`'s.
#[inline(always)]
pub(super) fn round_to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    f32::from_bits(if x.is_nan() { bits & 0xffff_0000 | 0x0040_0000 } else { rounded })
}

fn unique<T: Clone>(shared: Arc<Vec<T>>) -> Vec<T> {
    Arc::unwrap_or_clone(shared)
}

/// A tile of `len` elements that `fill` gives values.
fn made<T: Clone + Default>(len: usize, fill: impl FnOnce(&mut [T])) -> Arc<Vec<T>> {
    let mut elements = vec![T::default(); len];
    fill(&mut elements);
    Arc::new(elements)
}

pub(super) fn unary(op: Unary, element: Element, x: Tile) -> Tile {
    let arch = Arch::new();
    match x {
        Tile::Float(x) => Tile::Float(made(x.len(), |out| {
            lanes::unary_float(arch, op, &x, out);
            lanes::round(arch, element, out);
        })),
        Tile::Int(x) => Tile::Int(made(x.len(), |out| lanes::unary_int(arch, op, element, &x, out))),
        Tile::Pred(x) => Tile::Pred(x),
    }
}

/// Floats rounded to a type.
fn rounded(element: Element, x: Arc<Vec<f32>>) -> Arc<Vec<f32>> {
    if element == Element::F32 {
        return x;
    }
    let mut x = unique(x);
    lanes::round(Arch::new(), element, &mut x);
    Arc::new(x)
}

/// Whether an op of integers divides by a zero of `y`.
pub(super) fn divides_by_zero(op: Binary, y: &Tile) -> bool {
    op.divides() && matches!(y, Tile::Int(y) if y.contains(&0))
}

pub(super) fn binary(op: Binary, element: Element, x: Tile, y: Tile) -> Tile {
    let arch = Arch::new();
    match (x, y) {
        (Tile::Float(x), Tile::Float(y)) => Tile::Float(made(x.len(), |out| {
            lanes::binary_float(arch, op, &x, &y, out);
            lanes::round(arch, element, out);
        })),
        (Tile::Int(x), Tile::Int(y)) => {
            Tile::Int(made(x.len(), |out| lanes::binary_int(arch, op, element, &x, &y, out)))
        }
        (Tile::Pred(x), Tile::Pred(y)) => Tile::Pred(made(x.len(), |out| lanes::binary_pred(arch, op, &x, &y, out))),
        _ => unreachable!("decoding gives both sides one type"),
    }
}

/// The low and the high half of products.
pub(super) fn multiply_in_full(element: Element, signed: bool, x: &Tile, y: &Tile) -> [Tile; 2] {
    let (Tile::Int(x), Tile::Int(y)) = (x, y) else { unreachable!("decoding gives integers") };
    let wide = |x: i32| if signed { i64::from(x) } else { i64::from(unsigned(element, x)) };
    let products: Vec<i64> = x.iter().zip(y.iter()).map(|(&x, &y)| wide(x).wrapping_mul(wide(y))).collect();
    [0, element.bits()].map(|shift| {
        Tile::Int(Arc::new(products.iter().map(|product| wrap(element, (product >> shift) as i32)).collect()))
    })
}

/// Whether each number is infinite or NaN.
pub(super) fn weird(x: &Tile) -> Tile {
    let weird = match x {
        Tile::Float(x) => x.iter().map(|x| !x.is_finite()).collect(),
        Tile::Int(x) => vec![false; x.len()],
        Tile::Pred(x) => vec![false; x.len()],
    };
    Tile::Pred(Arc::new(weird))
}

pub(super) fn compare(op: Compare, x: &Tile, y: &Tile) -> Tile {
    let arch = Arch::new();
    Tile::Pred(match (x, y) {
        (Tile::Float(x), Tile::Float(y)) => made(x.len(), |out| lanes::compare_float(arch, op, x, y, out)),
        (Tile::Int(x), Tile::Int(y)) => made(x.len(), |out| lanes::compare_int(arch, op, x, y, out)),
        (Tile::Pred(x), Tile::Pred(y)) => made(x.len(), |out| lanes::compare_pred(op, x, y, out)),
        _ => unreachable!("decoding gives both sides one type"),
    })
}

pub(super) fn select(condition: &Tile, then: Tile, otherwise: Tile) -> Tile {
    let arch = Arch::new();
    let Tile::Pred(condition) = condition else { unreachable!("decoding gives a pred condition") };
    match (then, otherwise) {
        (Tile::Float(x), Tile::Float(y)) => {
            Tile::Float(made(x.len(), |out| lanes::select(arch, condition, &x, &y, out)))
        }
        (Tile::Int(x), Tile::Int(y)) => Tile::Int(made(x.len(), |out| lanes::select(arch, condition, &x, &y, out))),
        (Tile::Pred(x), Tile::Pred(y)) => Tile::Pred(made(x.len(), |out| lanes::select(arch, condition, &x, &y, out))),
        _ => unreachable!("decoding gives both sides one type"),
    }
}

/// How a conversion reads and makes integers, and rounds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conversion {
    pub(super) from: Element,
    pub(super) to: Element,
    /// Whether integers have a sign.
    pub(super) signed: bool,
    /// Whether floats become the nearest integer (the even one of two), instead of the next one towards zero.
    pub(super) nearest: bool,
}

/// Conversion between element types. Floats become integers that saturate where the type ends (NaN becomes 0): what XLA
/// defines, and JAX's tests hold TPUs to.
pub(super) fn convert(how: Conversion, x: Tile) -> Tile {
    let (arch, Conversion { to, signed, .. }) = (Arch::new(), how);
    match x {
        Tile::Float(x) if to.is_float() => Tile::Float(rounded(to, x)),
        Tile::Float(x) if to == Element::Pred => Tile::Pred(Arc::new(x.iter().map(|&x| x != 0.0).collect())),
        Tile::Float(x) => Tile::Int(made(x.len(), |out| lanes::float_to_int(arch, how, &x, out))),
        Tile::Int(x) if to.is_float() => Tile::Float(made(x.len(), |out| lanes::int_to_float(arch, how, &x, out))),
        Tile::Int(x) if to == Element::Pred => Tile::Pred(Arc::new(x.iter().map(|&x| x & 1 != 0).collect())),
        Tile::Int(x) => Tile::Int(made(x.len(), |out| lanes::int_to_int(arch, how, &x, out))),
        Tile::Pred(x) if to.is_float() => {
            let one = if signed { -1.0 } else { 1.0 };
            Tile::Float(Arc::new(x.iter().map(|&x| if x { one } else { 0.0 }).collect()))
        }
        Tile::Pred(x) if to == Element::Pred => Tile::Pred(x),
        Tile::Pred(x) => {
            let one = if signed { -1 } else { 1 };
            Tile::Int(Arc::new(x.iter().map(|&x| if x { one } else { 0 }).collect()))
        }
    }
}

/// The bits of a narrow signed integer as an unsigned one.
#[inline(always)]
pub(super) fn unsigned(element: Element, x: i32) -> u32 {
    x.cast_unsigned() & (u32::MAX >> 32_usize.saturating_sub(element.bits()))
}

/// The bits of a number of a type, in the low bits.
pub(super) fn float_bits(element: Element, x: f32) -> u32 {
    match element {
        Element::Bf16 => x.to_bits() >> 16,
        Element::F16 => u32::from(f16::from_f32(x).to_bits()),
        element => match element.minifloat() {
            Some(format) => u32::from(format.encode(f64::from(x))),
            None => x.to_bits(),
        },
    }
}

/// The number that the low bits stand for.
pub(super) fn float_from_bits(element: Element, bits: u32) -> f32 {
    match element {
        Element::Bf16 => f32::from_bits(bits << 16),
        Element::F16 => f16::from_bits(bits as u16).to_f32(),
        element => match element.minifloat() {
            Some(format) => format.decode(bits as u8),
            None => f32::from_bits(bits),
        },
    }
}

macro_rules! on_elements {
    ($tile:expr, $x:ident => $body:expr) => {
        match $tile {
            Tile::Float($x) => Tile::Float(Arc::new($body)),
            Tile::Int($x) => Tile::Int(Arc::new($body)),
            Tile::Pred($x) => Tile::Pred(Arc::new($body)),
        }
    };
}

/// Row-major strides.
pub(super) fn strides(dims: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; dims.len()];
    for dim in (1..dims.len()).rev() {
        strides[dim - 1] = strides[dim] * dims[dim];
    }
    strides
}

/// Copies elements out of `x` by strides: dimension `d` of the result, of size `dims[d]`, moves `by[d]` in `x`.
fn strided<T: Copy>(x: &[T], start: usize, dims: &[usize], by: &[usize]) -> Vec<T> {
    let mut result = Vec::with_capacity(dims.iter().product());
    let Some((&inner, outer)) = dims.split_last() else { return vec![x[start]] };
    let step = by[dims.len() - 1];
    let mut index = vec![0; outer.len()];
    let mut at = start;
    loop {
        match step {
            0 => result.resize(result.len() + inner, x[at]),
            1 => result.extend_from_slice(&x[at..at + inner]),
            _ => result.extend((0..inner).map(|i| x[at + i * step])),
        }
        let mut dim = outer.len();
        loop {
            if dim == 0 {
                return result;
            }
            dim -= 1;
            index[dim] += 1;
            at += by[dim];
            if index[dim] < outer[dim] {
                break;
            }
            at -= by[dim] * outer[dim];
            index[dim] = 0;
        }
    }
}

pub(super) fn broadcast(x: &Tile, from: &[usize], to: &[usize]) -> Tile {
    let own = strides(from);
    let lead = to.len() - from.len();
    let by: Vec<usize> = (0..to.len())
        .map(|dim| match dim.checked_sub(lead) {
            Some(dim) if from[dim] != 1 => own[dim],
            _ => 0,
        })
        .collect();
    on_elements!(x, x => strided(x, 0, to, &by))
}

pub(super) fn splat(scalar: Scalar, len: usize) -> Tile {
    match scalar {
        Scalar::Float(x) => Tile::Float(Arc::new(vec![x; len])),
        Scalar::Int(x) => Tile::Int(Arc::new(vec![x; len])),
        Scalar::Pred(x) => Tile::Pred(Arc::new(vec![x; len])),
    }
}

pub(super) fn transpose(x: &Tile, dims: &[usize], permutation: &[usize]) -> Tile {
    let own = strides(dims);
    let to: Vec<usize> = permutation.iter().map(|&dim| dims[dim]).collect();
    let by: Vec<usize> = permutation.iter().map(|&dim| own[dim]).collect();
    on_elements!(x, x => strided(x, 0, &to, &by))
}

pub(super) fn slice(x: &Tile, dims: &[usize], offsets: &[usize], sizes: &[usize], steps: &[usize]) -> Tile {
    let own = strides(dims);
    let start = offsets.iter().zip(&own).map(|(offset, stride)| offset * stride).sum();
    let by: Vec<usize> = own.iter().zip(steps).map(|(stride, step)| stride * step).collect();
    on_elements!(x, x => strided(x, start, sizes, &by))
}

/// Tiles after each other along `dim`; `sizes` are theirs.
pub(super) fn concatenate(tiles: &[Tile], sizes: &[Vec<usize>], dim: usize) -> Tile {
    fn over<T: Copy>(parts: &[(&[T], usize)], outer: usize) -> Vec<T> {
        let mut result = Vec::with_capacity(parts.iter().map(|(part, _)| part.len()).sum());
        for row in 0..outer {
            parts.iter().for_each(|(part, run)| result.extend_from_slice(&part[row * run..(row + 1) * run]));
        }
        result
    }
    let outer: usize = sizes[0][..dim].iter().product();
    let run = |index: usize| sizes[index][dim..].iter().product::<usize>();
    macro_rules! parts {
        ($variant:ident) => {{
            let parts = tiles.iter().enumerate().map(|(index, tile)| match tile {
                Tile::$variant(part) => (part.as_slice(), run(index)),
                _ => unreachable!("decoding gives all sources one type"),
            });
            Tile::$variant(Arc::new(over(&parts.collect::<Vec<_>>(), outer)))
        }};
    }
    match &tiles[0] {
        Tile::Float(_) => parts!(Float),
        Tile::Int(_) => parts!(Int),
        Tile::Pred(_) => parts!(Pred),
    }
}

pub(super) fn rotate(x: &Tile, dims: &[usize], dim: usize, amount: i64) -> Tile {
    fn over<T: Copy>(x: &[T], outer: usize, size: usize, inner: usize, amount: usize) -> Vec<T> {
        let mut result = Vec::with_capacity(x.len());
        for block in x.chunks(size * inner).take(outer) {
            let (kept, wrapped) = block.split_at((size - amount) * inner);
            result.extend_from_slice(wrapped);
            result.extend_from_slice(kept);
        }
        result
    }
    let (outer, size) = (dims[..dim].iter().product(), dims[dim]);
    let inner = dims[dim + 1..].iter().product();
    let amount = amount.rem_euclid(size as i64) as usize;
    on_elements!(x, x => over(x, outer, size, inner, amount))
}

/// How many rotations a strided rotation takes: one for each index of another dimension.
#[derive(Clone, Copy, Debug)]
pub(super) struct RotationStride {
    pub(super) dim: usize,
    pub(super) by: i64,
}

/// As [`rotate`], by `amount + stride * index` at each index of the stride's dimension.
pub(super) fn rotate_strided(x: &Tile, dims: &[usize], dim: usize, amount: i64, stride: RotationStride) -> Tile {
    let own = strides(dims);
    let size = dims[dim] as i64;
    let from = |at: usize| {
        let shift = amount + stride.by * (at / own[stride.dim] % dims[stride.dim]) as i64;
        let index = at / own[dim] % dims[dim];
        at - index * own[dim] + (index as i64 - shift).rem_euclid(size) as usize * own[dim]
    };
    on_elements!(x, x => (0..x.len()).map(|at| x[from(at)]).collect())
}

/// The index along `dim` of the first greatest element, or least one; NaN is greater, and less, than any other.
pub(super) fn reduce_index(x: &Tile, dims: &[usize], dim: usize, greatest: bool) -> Tile {
    fn over<T: Copy>(x: &[T], dims: &[usize], dim: usize, better: impl Fn(T, T) -> bool) -> Vec<i32> {
        let (outer, size): (usize, usize) = (dims[..dim].iter().product(), dims[dim]);
        let inner: usize = dims[dim + 1..].iter().product();
        let best = |block: usize, lane: usize| {
            let value = |index: usize| x[(block * size + index) * inner + lane];
            (1..size).fold(0, |best, index| if better(value(index), value(best)) { index } else { best }) as i32
        };
        (0..outer).flat_map(|block| (0..inner).map(move |lane| (block, lane))).map(|(b, l)| best(b, l)).collect()
    }
    let better = |x: f32, y: f32| !y.is_nan() && (x.is_nan() || if greatest { x > y } else { x < y });
    let int = |x: i32, y: i32| if greatest { x > y } else { x < y };
    Tile::Int(Arc::new(match x {
        Tile::Float(x) => over(x, dims, dim, better),
        Tile::Int(x) => over(x, dims, dim, int),
        Tile::Pred(x) => over(x, dims, dim, |x, y| int(i32::from(x), i32::from(y))),
    }))
}

/// Element `[i0, i1, ...]` of the result is the element of `x` with the same indices, but along the dimensions `over`, which
/// `indices[i0, i1, ...]` counts through, the first of them outermost, and again from the first after the last.
pub(super) fn gather(x: &Tile, dims: &[usize], over: &[usize], indices: &Tile, index_dims: &[usize]) -> Tile {
    let Tile::Int(indices) = indices else { unreachable!("decoding gives integer indices") };
    let (own, of_result) = (strides(dims), strides(index_dims));
    let size: usize = over.iter().map(|&dim| dims[dim]).product();
    // The dimensions of the result are those of the source where they are kept.
    let from = |at: usize| {
        let kept: usize = (0..dims.len())
            .filter(|dim| !over.contains(dim))
            .map(|dim| at / of_result[dim] % index_dims[dim] * own[dim])
            .sum();
        let mut index = i64::from(indices[at]).rem_euclid(size as i64) as usize;
        over.iter().rev().fold(kept, |from, &dim| {
            let along = index % dims[dim];
            index /= dims[dim];
            from + along * own[dim]
        })
    };
    on_elements!(x, x => (0..indices.len()).map(|at| x[from(at)]).collect())
}

/// The bits of an element of type `to` that `x`, of type `from`, is rounded or cut to.
pub(super) fn narrowed_bits(from: Element, to: Element, x: Scalar) -> u32 {
    match x {
        Scalar::Float(x) => float_bits(to, round(to, x)),
        Scalar::Int(x) => unsigned(to, x),
        Scalar::Pred(x) => u32::from(x) & (u32::MAX >> (32 - from.bits().min(32))),
    }
}

/// Words of type `result`, each of the elements of all sources (of type `from`) at its place, narrowed to `to`: the first in
/// the low bits.
pub(super) fn pack(sources: &[Tile], from: Element, to: Element, result: Element, len: usize) -> Tile {
    let word = |at: usize| {
        let parts = sources.iter().enumerate();
        parts.fold(0, |word, (part, source)| word | narrowed_bits(from, to, source.get(at)) << (part * to.bits()))
    };
    from_bits(result, (0..len).map(word).collect())
}

/// Part `index`, of type `part`, of each word of `x` (of type `from`), as a number of type `to`.
pub(super) fn unpack(x: &Tile, from: Element, part: Element, index: usize, to: Element) -> Tile {
    let Tile::Int(x) = x else { unreachable!("decoding gives words") };
    let bits =
        x.iter().map(|&x| unsigned(from, x) >> (index * part.bits()) & (u32::MAX >> (32 - part.bits()))).collect();
    convert(Conversion { from: part, to, signed: true, nearest: false }, from_bits(part, bits))
}

/// Rounds f32 up or down to a narrower float, to each of its neighbours as often as the random bits that are added below the
/// last place carry. What is not finite stays so.
pub(super) fn round_stochastically(to: Element, x: &Tile, random: &Tile) -> Tile {
    let (Tile::Float(x), Tile::Int(random)) = (x, random) else { unreachable!("decoding gives floats and bits") };
    Tile::Float(Arc::new(x.iter().zip(random.iter()).map(|(&x, &random)| stochastic(to, x, random)).collect()))
}

/// The bits of floats of a type, as 32-bit integers.
pub(super) fn bits(x: &Tile, element: Element) -> Tile {
    let Tile::Float(x) = x else { unreachable!("decoding gives floats") };
    Tile::Int(Arc::new(x.iter().map(|&x| float_bits(element, x) as i32).collect()))
}

/// One number of [`round_stochastically`]: truncated to the places that `to` has at its magnitude, after the random bits were
/// added to the places beyond.
fn stochastic(to: Element, x: f32, random: i32) -> f32 {
    let (mantissa, least) = match to {
        Element::F8E4M3Fn => (3, -6),
        Element::F8E4M3B11Fnuz => (3, -10),
        Element::F8E5M2 => (2, -14),
        Element::F16 => (10, -14),
        _ => (7, -126),
    };
    if !x.is_finite() {
        return round(to, x);
    }
    let exponent = ((x.to_bits() >> 23 & 0xff) as i32 - 127).max(least);
    let unit = f64::from(exponent - mantissa).exp2();
    let units = f64::from(x.abs()) / unit;
    let carry = units.fract() + f64::from(random.cast_unsigned()) / 4_294_967_296.0 >= 1.0;
    let rounded = (units.floor() + f64::from(u8::from(carry))) * unit;
    round(to, rounded.copysign(f64::from(x)) as f32)
}

/// Folds `x` over the dimensions `over`, starting from `initial`.
pub(super) fn reduce(how: Reduction, element: Element, x: Tile, dims: &[usize], over: &[usize], initial: Tile) -> Tile {
    let (mut x, mut dims) = (x, dims.to_vec());
    let mut over = over.to_vec();
    over.sort_unstable();
    while let Some(dim) = over.pop() {
        let (outer, size): (usize, usize) = (dims[..dim].iter().product(), dims[dim]);
        let inner: usize = dims[dim + 1..].iter().product();
        x = match &x {
            Tile::Float(x) => Tile::Float(Arc::new(match how {
                Reduction::Sum => fold(x, outer, size, inner, |x, y| x + y),
                Reduction::Product => fold(x, outer, size, inner, |x, y| x * y),
                Reduction::Max => fold(x, outer, size, inner, maximum),
                Reduction::Min => fold(x, outer, size, inner, minimum),
                how => fold(x, outer, size, inner, |x, y| how.binary().float(x, y)),
            })),
            Tile::Int(x) => Tile::Int(Arc::new(match how {
                Reduction::Sum => fold(x, outer, size, inner, i32::wrapping_add),
                Reduction::Max => fold(x, outer, size, inner, i32::max),
                Reduction::Min => fold(x, outer, size, inner, i32::min),
                how => fold(x, outer, size, inner, |x, y| wrap(element, how.binary().int(element, x, y))),
            })),
            Tile::Pred(x) => Tile::Pred(Arc::new(match how {
                Reduction::Sum | Reduction::Xor => fold(x, outer, size, inner, |x, y| x ^ y),
                Reduction::Max | Reduction::MaxNumber | Reduction::MaxUnsigned | Reduction::Or => {
                    fold(x, outer, size, inner, |x, y| x | y)
                }
                _ => fold(x, outer, size, inner, |x, y| x & y),
            })),
        };
        dims.remove(dim);
    }
    binary(how.binary(), element, x, initial)
}

fn fold<T: Copy>(x: &[T], outer: usize, size: usize, inner: usize, f: impl Fn(T, T) -> T) -> Vec<T> {
    lanes::fold(Arch::new(), x, [outer, size, inner], f)
}

/// The bits of `x` (of sizes `dims`) as elements of another type. Narrow elements are packed along the second-minor
/// dimension, the first row in the low bits.
pub(super) fn bitcast(x: &Tile, dims: &[usize], from: Element, to: Element) -> Tile {
    let bits: Vec<u32> = match x {
        Tile::Float(x) => x.iter().map(|&x| float_bits(from, x)).collect(),
        Tile::Int(x) => x.iter().map(|&x| unsigned(from, x)).collect(),
        Tile::Pred(x) => x.iter().map(|&x| u32::from(x)).collect(),
    };
    let (narrow, wide) = (from.bits().min(to.bits()), from.bits().max(to.bits()));
    let ratio = wide / narrow;
    let lanes = dims.last().copied().unwrap_or(1);
    let shift = |part: usize| (narrow * part) as u32;
    let bits: Vec<u32> = if ratio == 1 {
        bits
    } else if to.bits() > from.bits() {
        let groups = bits.chunks_exact(ratio * lanes);
        let word = |group: &[u32], lane: usize| (0..ratio).map(|part| group[part * lanes + lane] << shift(part)).sum();
        groups.flat_map(|group| (0..lanes).map(|lane| word(group, lane)).collect::<Vec<u32>>()).collect()
    } else {
        let mask = (1u32 << narrow) - 1;
        let rows = bits.chunks_exact(lanes);
        let split =
            |row: &[u32]| (0..ratio).flat_map(|part| row.iter().map(move |x| x >> shift(part) & mask)).collect();
        rows.flat_map(|row| -> Vec<u32> { split(row) }).collect()
    };
    from_bits(to, bits)
}

pub(super) fn from_bits(element: Element, bits: Vec<u32>) -> Tile {
    match element {
        Element::Pred => Tile::Pred(Arc::new(bits.into_iter().map(|x| x & 1 != 0).collect())),
        element if element.is_float() => {
            Tile::Float(Arc::new(bits.into_iter().map(|x| float_from_bits(element, x)).collect()))
        }
        element => Tile::Int(Arc::new(bits.into_iter().map(|x| wrap(element, x as i32)).collect())),
    }
}

/// A scalar in a register.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scalar {
    Float(f32),
    Int(i32),
    Pred(bool),
}

impl Tile {
    pub(super) fn get(&self, index: usize) -> Scalar {
        match self {
            Self::Float(x) => Scalar::Float(x[index]),
            Self::Int(x) => Scalar::Int(x[index]),
            Self::Pred(x) => Scalar::Pred(x[index]),
        }
    }
}

/// One matrix of a batched product, described by strides in elements.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Strides {
    pub(super) batch: usize,
    pub(super) row: usize,
    pub(super) column: usize,
}

/// The shape of a matrix product: `batch` times `[m, k] x [k, n]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct MatmulShape {
    pub(super) batch: usize,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) lhs: Strides,
    pub(super) rhs: Strides,
    /// The element type of the result.
    pub(super) to: Element,
}

impl MatmulShape {
    /// Multiplications and additions.
    pub(super) fn flops(&self) -> u64 {
        2 * (self.batch * self.m * self.n * self.k) as u64
    }
}

/// `accumulator + lhs x rhs`, on `threads` if it is large. The sides that `round` names are rounded to bf16 first, as the MXU
/// does with f32.
pub(super) fn matmul(
    shape: &MatmulShape,
    lhs: Tile,
    rhs: Tile,
    accumulator: Tile,
    round: [bool; 2],
    threads: bool,
) -> Tile {
    // Where one side is of floats, so is the other: integers of up to 16 bits are exact as such.
    let float = |x: Tile| match x {
        Tile::Int(x) => Tile::Float(Arc::new(x.iter().map(|&x| x as f32).collect())),
        x => x,
    };
    let (lhs, rhs) = if let Tile::Float(_) = accumulator { (float(lhs), float(rhs)) } else { (lhs, rhs) };
    match (lhs, rhs, accumulator) {
        (Tile::Float(lhs), Tile::Float(rhs), Tile::Float(sum)) => {
            let [lhs, rhs] = [(lhs, round[0]), (rhs, round[1])];
            let [lhs, rhs] = [lhs, rhs].map(|(x, round)| if round { rounded(Element::Bf16, x) } else { x });
            // A constant of zeros, most often: then there is nothing to add to.
            let from_zero = Arc::strong_count(&sum) > 1 && sum.iter().all(|x| x.to_bits() == 0);
            let mut sum = if from_zero { vec![0.0; sum.len()] } else { unique(sum) };
            for batch in 0..shape.batch {
                let (MatmulShape { m, n, k, .. }, l, r) = (*shape, shape.lhs, shape.rhs);
                let sum = &mut sum[batch * m * n..(batch + 1) * m * n];
                products([m, n, k], &lhs[batch * l.batch..], l, &rhs[batch * r.batch..], r, sum, [!from_zero, threads]);
            }
            Tile::Float(rounded(shape.to, Arc::new(sum)))
        }
        (Tile::Int(lhs), Tile::Int(rhs), Tile::Int(sum)) => {
            let mut sum = unique(sum);
            int_products(shape, &lhs, &rhs, &mut sum, threads);
            sum.iter_mut().for_each(|x| *x = wrap(shape.to, *x));
            Tile::Int(Arc::new(sum))
        }
        _ => unreachable!("decoding gives all operands one kind"),
    }
}

/// Adds products of integers to `sum`. Those of up to 8 bits are multiplied as floats, which is exact for as many terms as 24
/// bits hold.
fn int_products(shape: &MatmulShape, lhs: &[i32], rhs: &[i32], sum: &mut [i32], threads: bool) {
    let MatmulShape { batch, m, n, k, lhs: l, rhs: r, .. } = *shape;
    let narrow = |x: &[i32]| x.iter().all(|x| (-128..128).contains(x));
    if narrow(lhs) && narrow(rhs) {
        const TERMS: usize = (1 << 24) / (128 * 128);
        let [lhs, rhs] = [lhs, rhs].map(|x| x.iter().map(|&x| x as f32).collect::<Vec<f32>>());
        let mut sums = vec![0.0; m * n];
        for batch in 0..batch {
            for from in (0..k).step_by(TERMS) {
                let terms = TERMS.min(k - from);
                let (lhs, rhs) = (&lhs[batch * l.batch + from * l.column..], &rhs[batch * r.batch + from * r.row..]);
                products([m, n, terms], lhs, l, rhs, r, &mut sums, [false, threads]);
                let sum = &mut sum[batch * m * n..][..m * n];
                sum.iter_mut().zip(&sums).for_each(|(sum, &x)| *sum = sum.wrapping_add(x as i32));
            }
        }
        return;
    }
    for batch in 0..batch {
        let (lhs, rhs) = (&lhs[batch * l.batch..], &rhs[batch * r.batch..]);
        for row in 0..m {
            let out = &mut sum[(batch * m + row) * n..][..n];
            for inner in 0..k {
                let x = lhs[row * l.row + inner * l.column];
                let from = inner * r.row;
                for (column, out) in out.iter_mut().enumerate() {
                    *out = out.wrapping_add(x.wrapping_mul(rhs[from + column * r.column]));
                }
            }
        }
    }
}

/// `sum += lhs x rhs` if it `adds`, or `sum = lhs x rhs`; of sizes `[m, n, k]`; on `threads` if it is large.
fn products(
    [m, n, k]: [usize; 3],
    lhs: &[f32],
    l: Strides,
    rhs: &[f32],
    r: Strides,
    sum: &mut [f32],
    [adds, threads]: [bool; 2],
) {
    // The last element that each side reads is inside its slice.
    assert!((m - 1) * l.row + (k - 1) * l.column < lhs.len());
    assert!((k - 1) * r.row + (n - 1) * r.column < rhs.len());
    assert!(sum.len() == m * n);
    // Each thread makes columns or rows of its own: the sums are the same.
    let threads = if threads && m * n * k >= 1 << 22 { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    // SAFETY: the asserts bound every read and write, and `sum` aliases neither side.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            sum.as_mut_ptr(),
            1,
            n as isize,
            adds,
            lhs.as_ptr(),
            l.column as isize,
            l.row as isize,
            rhs.as_ptr(),
            r.column as isize,
            r.row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Widens bf16 memory.
pub(super) fn widen(from: &[bf16], into: &mut Vec<f32>) {
    into.extend(from.iter().map(|x| f32::from_bits(u32::from(x.to_bits()) << 16)));
}

/// Narrows an exact bf16 value for memory.
pub(super) fn narrow(x: f32) -> bf16 {
    bf16::from_bits((x.to_bits() >> 16) as u16)
}
