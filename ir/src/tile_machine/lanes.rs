//! Elementwise ops on slices: loops that are compiled once for each instruction set, the best one chosen at run time.
//!
//! What an op does to one element stands in [`tile`](super::tile); here is only how it gets over many. Results are the same
//! bits on every instruction set. All slices of a call have one length.

pub(super) use pulp::Arch;
use pulp::NullaryFnOnce;

use super::tile::{Binary, Compare, Conversion, Unary, round as round_one, round_to_bf16, saturate, unsigned, wrap};
use crate::element::Element;

/// `out = f(x)`
struct Map<'l, T, U, F> {
    x: &'l [T],
    out: &'l mut [U],
    f: F,
}

impl<T: Copy, U, F: Fn(T) -> U> NullaryFnOnce for Map<'_, T, U, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (out, &x) in self.out.iter_mut().zip(self.x) {
            *out = (self.f)(x);
        }
    }
}

/// `out = f(x, y)`
struct Zip<'l, T, U, F> {
    x: &'l [T],
    y: &'l [T],
    out: &'l mut [U],
    f: F,
}

impl<T: Copy, U, F: Fn(T, T) -> U> NullaryFnOnce for Zip<'_, T, U, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for ((out, &x), &y) in self.out.iter_mut().zip(self.x).zip(self.y) {
            *out = (self.f)(x, y);
        }
    }
}

/// `x = f(x)`
struct Update<'l, T, F> {
    x: &'l mut [T],
    f: F,
}

impl<T: Copy, F: Fn(T) -> T> NullaryFnOnce for Update<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for x in self.x {
            *x = (self.f)(*x);
        }
    }
}

struct Select<'l, T> {
    condition: &'l [bool],
    then: &'l [T],
    otherwise: &'l [T],
    out: &'l mut [T],
}

impl<T: Copy> NullaryFnOnce for Select<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let sides = self.condition.iter().zip(self.then).zip(self.otherwise);
        for (out, ((&condition, &then), &otherwise)) in self.out.iter_mut().zip(sides) {
            *out = if condition { then } else { otherwise };
        }
    }
}

/// See [`fold`].
struct Fold<'l, T, F> {
    x: &'l [T],
    sizes: [usize; 3],
    f: F,
}

impl<T: Copy, F: Fn(T, T) -> T> NullaryFnOnce for Fold<'_, T, F> {
    type Output = Vec<T>;

    #[inline(always)]
    fn call(self) -> Vec<T> {
        let Self { x, sizes: [outer, size, inner], f } = self;
        let mut result = Vec::with_capacity(outer * inner);
        for block in x.chunks_exact(size * inner).take(outer) {
            if inner == 1 {
                // Eight running values, so that the loop vectorises.
                const LANES: usize = 8;
                let (head, tail) = block.split_at(size - size % LANES);
                let mut total = None;
                if let Some((first, rest)) = head.split_first_chunk::<LANES>() {
                    let mut lanes = *first;
                    for chunk in rest.chunks_exact(LANES) {
                        for lane in 0..LANES {
                            lanes[lane] = f(lanes[lane], chunk[lane]);
                        }
                    }
                    total = lanes.into_iter().reduce(&f);
                }
                let total = tail.iter().fold(total, |total, &x| Some(total.map_or(x, |total| f(total, x))));
                result.extend(total);
            } else {
                let start = result.len();
                result.extend_from_slice(&block[..inner]);
                for row in block.chunks_exact(inner).skip(1) {
                    for (total, &x) in result[start..].iter_mut().zip(row) {
                        *total = f(*total, x);
                    }
                }
            }
        }
        result
    }
}

/// Folds the middle one of three dimensions by `f`.
pub(super) fn fold<T: Copy>(arch: Arch, x: &[T], sizes: [usize; 3], f: impl Fn(T, T) -> T) -> Vec<T> {
    arch.dispatch(Fold { x, sizes, f })
}

/// `out = f(x)`, for a function of one's own.
pub(super) fn map<T: Copy, U>(arch: Arch, x: &[T], out: &mut [U], f: impl Fn(T) -> U) {
    arch.dispatch(Map { x, out, f });
}

pub(super) fn unary_float(arch: Arch, op: Unary, x: &[f32], out: &mut [f32]) {
    // A loop for each op that vector instructions can do.
    macro_rules! loops {
        ($($of:ident)*) => {
            match op {
                $(Unary::$of => arch.dispatch(Map { x, out, f: |x| Unary::$of.float(x) }),)*
                op => out.iter_mut().zip(x).for_each(|(out, &x)| *out = op.float(x)),
            }
        };
    }
    loops!(Neg Abs Exp Exp2 Log Tanh Sqrt Rsqrt Floor Ceil RoundEven Reciprocal Logistic);
}

pub(super) fn unary_int(arch: Arch, op: Unary, element: Element, x: &[i32], out: &mut [i32]) {
    match op {
        Unary::Abs => arch.dispatch(Map { x, out, f: |x| wrap(element, Unary::Abs.int(element, x)) }),
        op => out.iter_mut().zip(x).for_each(|(out, &x)| *out = wrap(element, op.int(element, x))),
    }
}

pub(super) fn binary_float(arch: Arch, op: Binary, x: &[f32], y: &[f32], out: &mut [f32]) {
    macro_rules! loops {
        ($($of:ident)*) => {
            match op {
                $(Binary::$of => arch.dispatch(Zip { x, y, out, f: |x, y| Binary::$of.float(x, y) }),)*
                op => {
                    let sides = x.iter().zip(y);
                    out.iter_mut().zip(sides).for_each(|(out, (&x, &y))| *out = op.float(x, y));
                }
            }
        };
    }
    loops!(Add Sub Mul Div Max Min MaxNumber MinNumber);
}

/// The results are wrapped.
pub(super) fn binary_int(arch: Arch, op: Binary, element: Element, x: &[i32], y: &[i32], out: &mut [i32]) {
    const WORD: Element = Element::I32;
    macro_rules! loops {
        ($($of:ident)*) => {
            match op {
                // Of 32 bits, so that the width is known in the loop.
                $(Binary::$of if element.bits() == 32 => {
                    arch.dispatch(Zip { x, y, out, f: |x, y| Binary::$of.int(WORD, x, y) });
                })*
                op => {
                    let sides = x.iter().zip(y);
                    out.iter_mut().zip(sides).for_each(|(out, (&x, &y))| *out = wrap(element, op.int(element, x, y)));
                }
            }
        };
    }
    loops!(Add Sub Mul Max Min MaxUnsigned MinUnsigned And Or Xor Shl ShrSigned ShrUnsigned);
}

pub(super) fn binary_pred(arch: Arch, op: Binary, x: &[bool], y: &[bool], out: &mut [bool]) {
    match op {
        Binary::And | Binary::Mul | Binary::Min | Binary::MinNumber | Binary::MinUnsigned => {
            arch.dispatch(Zip { x, y, out, f: |x, y| x & y });
        }
        Binary::Or | Binary::Max | Binary::MaxNumber | Binary::MaxUnsigned => {
            arch.dispatch(Zip { x, y, out, f: |x, y| x | y });
        }
        _ => arch.dispatch(Zip { x, y, out, f: |x, y| x ^ y }),
    }
}

pub(super) fn compare_float(arch: Arch, op: Compare, x: &[f32], y: &[f32], out: &mut [bool]) {
    macro_rules! loops {
        ($($of:ident)*) => {
            match op {
                $(Compare::$of => arch.dispatch(Zip { x, y, out, f: |x, y| Compare::$of.float(x, y) }),)*
                op => arch.dispatch(Zip { x, y, out, f: |x, y| op.float(x, y) }),
            }
        };
    }
    loops!(Eq Ne Lt Le Gt Ge);
}

pub(super) fn compare_int(arch: Arch, op: Compare, x: &[i32], y: &[i32], out: &mut [bool]) {
    macro_rules! loops {
        ($($of:ident)*) => {
            match op {
                $(Compare::$of => arch.dispatch(Zip { x, y, out, f: |x, y| Compare::$of.int(x, y) }),)*
                op => arch.dispatch(Zip { x, y, out, f: |x, y| op.int(x, y) }),
            }
        };
    }
    loops!(Eq Ne Lt Le Gt Ge UnsignedLt UnsignedLe UnsignedGt UnsignedGe);
}

pub(super) fn compare_pred(op: Compare, x: &[bool], y: &[bool], out: &mut [bool]) {
    let sides = x.iter().zip(y);
    out.iter_mut().zip(sides).for_each(|(out, (&x, &y))| *out = op.int(i32::from(x), i32::from(y)));
}

pub(super) fn select<T: Copy>(arch: Arch, condition: &[bool], then: &[T], otherwise: &[T], out: &mut [T]) {
    arch.dispatch(Select { condition, then, otherwise, out });
}

/// Rounds to a float type, in place.
pub(super) fn round(arch: Arch, element: Element, x: &mut [f32]) {
    match element {
        Element::F32 => {}
        Element::Bf16 => arch.dispatch(Update { x, f: round_to_bf16 }),
        element => x.iter_mut().for_each(|x| *x = round_one(element, *x)),
    }
}

pub(super) fn int_to_float(arch: Arch, how: Conversion, x: &[i32], out: &mut [f32]) {
    match how.signed {
        true => arch.dispatch(Map { x, out, f: |x| x as f32 }),
        false => arch.dispatch(Map { x, out, f: |x| unsigned(how.from, x) as f32 }),
    }
    round(arch, how.to, out);
}

pub(super) fn float_to_int(arch: Arch, how: Conversion, x: &[f32], out: &mut [i32]) {
    let Conversion { to, signed, nearest, .. } = how;
    match (to, signed, nearest) {
        (Element::I32, true, false) => arch.dispatch(Map { x, out, f: |x| saturate(Element::I32, true, false, x) }),
        (Element::I32, true, true) => arch.dispatch(Map { x, out, f: |x| saturate(Element::I32, true, true, x) }),
        (Element::I8, true, false) => arch.dispatch(Map { x, out, f: |x| saturate(Element::I8, true, false, x) }),
        (Element::I8, true, true) => arch.dispatch(Map { x, out, f: |x| saturate(Element::I8, true, true, x) }),
        _ => arch.dispatch(Map { x, out, f: |x| saturate(to, signed, nearest, x) }),
    }
}

pub(super) fn int_to_int(arch: Arch, how: Conversion, x: &[i32], out: &mut [i32]) {
    let Conversion { from, to, signed, .. } = how;
    match signed {
        true => arch.dispatch(Map { x, out, f: |x| wrap(to, x) }),
        false => arch.dispatch(Map { x, out, f: |x| wrap(to, unsigned(from, x).cast_signed()) }),
    }
}
