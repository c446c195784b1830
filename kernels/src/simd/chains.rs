//! Products with columns in the lanes: what many columns take, as no sum crosses lanes.
//!
//! The sum of a product has one order ([`super`]): sixteen lanes, each a chain of multiply-adds, then the lanes' sums by a tree.
//! Here each chain is a loop over sixteen columns at once, one in each lane, and the tree is fifteen additions of registers. The
//! bits are the same as by [`super::multiply`] and [`super::sums`], without a shuffle.
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

/// The products of `R` rows with `C` registers of columns. With `PAIRS` two chains are summed at a time, for
/// which callers take half as many rows: where chains are short, what waits in memory for another sum would cost as much.
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

/// As [`multiply`], of operands that are only a part: the sums of all chains, which take on those `before`.
///
/// # Safety
/// As there; `after` has room for `[chains, R, C]`, and may be `before`.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices of registers, each loop unrolled")]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{self, Portable, Task, Wide, with_f32};

    /// Tiles of `R` rows by `C` registers of columns, of two parts along `k`, all forms.
    struct Tile<const R: usize, const C: usize>;

    impl<const R: usize, const C: usize> Task<f32> for Tile<R, C> {
        type Output = Vec<[[[f32; LANES]; C]; R]>;

        #[inline(always)]
        fn run<P: Product<Element = f32>>(self, p: P) -> Self::Output {
            let (isa, lengths) = (p.isa(), [3, 4]);
            let k = LANES * lengths.iter().sum::<usize>();
            // Sums of such numbers are rounded: another order shows.
            let number = |at: usize| ((at * 7919 % 1009) as f32 - 504.0) / 37.0;
            let row = |row: usize| (0..k).map(|i| number(row * k + i)).collect::<Vec<_>>();
            let column = |column: usize| (0..k).map(|i| number(3 * i + column * 131)).collect::<Vec<_>>();
            let parts: Vec<_> = lengths
                .iter()
                .scan(0, |first, &length| {
                    let from = *first;
                    *first += LANES * length;
                    let mut rows = vec![0.0; LANES * length * R];
                    let mut columns = vec![Register::ZERO; LANES * length * C];
                    for element in 0..LANES * length {
                        let [chain, place] = position::<P>(element);
                        let at = chain * length + place;
                        (0..R).for_each(|of| rows[at * R + of] = row(of)[from + element]);
                        (0..C * LANES)
                            .for_each(|of| columns[at * C + of / LANES].0[of % LANES] = column(of)[from + element]);
                    }
                    Some((rows, columns, length))
                })
                .collect();
            let operands = |(rows, columns, length): &(Vec<f32>, Vec<Register>, usize)| Operands {
                rows: rows.as_ptr(),
                columns: columns.as_ptr(),
                length: *length,
            };
            let mut waiting = vec![Register::ZERO; LANES * R * C];
            let mut all = Vec::new();
            for pairs in [false, true] {
                let nothing = std::ptr::null();
                // SAFETY: the operands are as long as they say.
                let sums: Sums<P::Isa, R, C> = unsafe {
                    accumulate::<P::Isa, R, C>(isa, operands(&parts[0]), nothing, waiting.as_mut_ptr());
                    match pairs {
                        false => multiply::<P::Isa, R, C, false>(isa, operands(&parts[1]), waiting.as_ptr()),
                        true => multiply::<P::Isa, R, C, true>(isa, operands(&parts[1]), waiting.as_ptr()),
                    }
                };
                let mut stored = [[[0.0; LANES]; C]; R];
                for row in 0..R {
                    (0..C).for_each(|column| isa.store(sums[row][column], &mut stored[row][column]));
                }
                all.push(stored);
            }
            // The form with elements in the lanes.
            let mut plain = [[[0.0; LANES]; C]; R];
            for (of, plain) in plain.iter_mut().enumerate() {
                for (at, sum) in plain.as_flattened_mut().iter_mut().enumerate() {
                    let (row, column) = (row(of), column(at));
                    let packed: Vec<_> = column.as_chunks().0.iter().map(|&lanes| Register(lanes)).collect();
                    let zeros = [[isa.splat(0.0)]];
                    // SAFETY: row and column have `k` elements.
                    let lanes = unsafe {
                        simd::multiply::<P, 1, 1, false>(
                            p,
                            [row.as_ptr()],
                            packed.as_ptr(),
                            k / LANES,
                            zeros,
                            &simd::Ahead::nothing([row.as_ptr()]),
                        )
                    };
                    *sum = simd::sums(p, &lanes)[0][0];
                }
            }
            all.push(plain);
            all
        }
    }

    fn check<const R: usize, const C: usize>() {
        for all in [with_f32(Tile::<R, C>), Tile::<R, C>.run(Wide(Portable))] {
            assert!(all.iter().all(|sums| sums == &all[0]), "{R} rows, {C} registers of columns");
        }
    }

    #[test]
    fn columns_in_the_lanes_have_the_bits_of_elements_in_the_lanes() {
        check::<6, 1>();
        check::<12, 2>();
        check::<3, 1>();
        check::<6, 2>();
    }

    /// Rows that lie apart, as columns.
    struct Turn<'t>(&'t [[f32; LANES + 3]; LANES]);

    impl Task<f32> for Turn<'_> {
        type Output = Vec<Register>;

        #[inline(always)]
        fn run<P: Product<Element = f32>>(self, p: P) -> Vec<Register> {
            let mut to = vec![Register::ZERO; 2 * LANES];
            // SAFETY: rows and registers are as many as it takes.
            unsafe { p.isa().turn(&self.0.each_ref().map(|row| row.as_ptr()), to.as_mut_ptr(), 2) };
            to
        }
    }

    #[test]
    fn turned_rows_are_columns_in_the_order_of_the_chains() {
        let rows = std::array::from_fn(|row| std::array::from_fn(|at| (100 * row + at) as f32));
        for turned in [with_f32(Turn(&rows)), Turn(&rows).run(Wide(Portable))] {
            for lane in 0..LANES {
                let expected: [f32; LANES] = std::array::from_fn(|row| rows[row][lane]);
                assert_eq!(turned[2 * chain(lane)].0, expected, "lane {lane}");
            }
        }
    }
}
