//! Products with columns in the lanes: what many columns take, as no sum crosses lanes.
//!
//! The sum of a product has one order ([`super`]): sixteen lanes, each a chain of multiply-adds, then the lanes' sums by a tree.
//! Here a chain is a loop, and its sum one lane of a register for each of sixteen columns, so that the tree is fifteen additions
//! of registers. The bits are the same as by [`super::multiply`] and [`super::sums`], without a shuffle.
//!
//! Both operands lie by chains, in the order in which the tree takes them up ([`chain`]): rows as floats, each of which goes to
//! all lanes, and columns as registers.

use super::{Isa, LANES, Product, Register};

/// Sums of `R` rows by `C` registers of columns.
pub type Sums<I, const R: usize, const C: usize> = [[<I as Isa>::Lanes; C]; R];

/// The chain of a lane: two bits of each of the tree's levels change places. Its own inverse.
#[inline(always)]
pub const fn chain(lane: usize) -> usize {
    (lane & 0b0101) << 1 | (lane & 0b1010) >> 1
}

/// Where an element belongs: its chain, and its place there.
#[inline(always)]
pub fn position<P: Product>(element: usize) -> [usize; 2] {
    let (step, [register, lane]) = (element / P::ELEMENTS, P::lane(element % P::ELEMENTS));
    [chain(lane), step * P::FLOATS + register]
}

/// Rows and columns, as they lie.
#[derive(Clone, Copy)]
pub struct Operands {
    /// `[chains, length, R]`
    pub rows: *const f32,
    /// `[chains, length, C]`
    pub columns: *const Register,
    /// Of a chain.
    pub length: usize,
}

/// The products of `R` rows with `C` registers of columns. With `PAIRS` two chains are summed at a time, for half as many
/// rows: where chains are short, what waits for another sum would go through memory as often as it is added to.
///
/// # Safety
/// The operands can be read, and so can the sums `before`: `[chains, R, C]`, or null.
#[inline(always)]
pub unsafe fn multiply<I: Isa, const R: usize, const C: usize, const PAIRS: bool>(
    isa: I,
    of: Operands,
    before: *const Register,
) -> Sums<I, R, C> {
    // SAFETY: by contract.
    unsafe {
        let low = four::<I, R, C, PAIRS>(isa, of, before, 0);
        let low = add(isa, low, four::<I, R, C, PAIRS>(isa, of, before, 4));
        let high = four::<I, R, C, PAIRS>(isa, of, before, 8);
        add(isa, low, add(isa, high, four::<I, R, C, PAIRS>(isa, of, before, 12)))
    }
}

/// As [`multiply`], of operands that go on: the sums of all chains, which take on those `before`.
///
/// # Safety
/// As there; `after` has room for `[chains, R, C]`, and may be `before`.
#[inline(always)]
pub unsafe fn accumulate<I: Isa, const R: usize, const C: usize>(
    isa: I,
    of: Operands,
    before: *const Register,
    after: *mut Register,
) {
    for number in 0..LANES {
        // SAFETY: by contract.
        unsafe {
            let [sums]: [Sums<I, R, C>; 1] = chains(isa, of, before, number);
            let after = after.add(number * R * C).cast::<[[Register; C]; R]>();
            for row in 0..R {
                for column in 0..C {
                    isa.store(sums[row][column], &mut (&mut *after)[row][column].0);
                }
            }
        }
    }
}

/// A quarter of the tree.
#[inline(always)]
unsafe fn four<I: Isa, const R: usize, const C: usize, const PAIRS: bool>(
    isa: I,
    of: Operands,
    before: *const Register,
    first: usize,
) -> Sums<I, R, C> {
    let mut sums = [[[isa.splat(0.0); C]; R]; 2];
    for (pair, sum) in sums.iter_mut().enumerate() {
        let first = first + 2 * pair;
        // SAFETY: by contract.
        let [even, odd] = unsafe {
            if PAIRS {
                chains(isa, of, before, first)
            } else {
                let [even] = chains(isa, of, before, first);
                let [odd] = chains(isa, of, before, first + 1);
                [even, odd]
            }
        };
        *sum = add(isa, even, odd);
    }
    add(isa, sums[0], sums[1])
}

#[inline(always)]
fn add<I: Isa, const R: usize, const C: usize>(isa: I, a: Sums<I, R, C>, mut b: Sums<I, R, C>) -> Sums<I, R, C> {
    for row in 0..R {
        for column in 0..C {
            b[row][column] = isa.add(a[row][column], b[row][column]);
        }
    }
    b
}

/// The sums of `N` chains at a time.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices of registers, each loop unrolled")]
unsafe fn chains<I: Isa, const R: usize, const C: usize, const N: usize>(
    isa: I,
    of: Operands,
    before: *const Register,
    first: usize,
) -> [Sums<I, R, C>; N] {
    let mut sums = [[[isa.splat(0.0); C]; R]; N];
    // SAFETY: by contract.
    unsafe {
        if !before.is_null() {
            let before = &*before.add(first * R * C).cast::<[[[Register; C]; R]; N]>();
            for of_chain in 0..N {
                for row in 0..R {
                    for column in 0..C {
                        sums[of_chain][row][column] = isa.load(&before[of_chain][row][column].0);
                    }
                }
            }
        }
        for place in first * of.length..(first + 1) * of.length {
            for of_chain in 0..N {
                let at = place + of_chain * of.length;
                let mut right = [isa.splat(0.0); C];
                for column in 0..C {
                    right[column] = isa.load(&(*of.columns.add(at * C + column)).0);
                }
                for row in 0..R {
                    let left = isa.splat(*of.rows.add(at * R + row));
                    for column in 0..C {
                        sums[of_chain][row][column] = isa.fma(left, right[column], sums[of_chain][row][column]);
                    }
                }
            }
        }
    }
    sums
}
