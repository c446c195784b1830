//! Work that shows what a processor can do at most, as the kernels in Rust ask it of them: multiply-adds in registers, and
//! memory that is read, or read and written. Whoever has a clock times it.

use crate::{
    float::Float,
    simd::{self, Isa, LANES, Product, Register, Task},
};

/// So many rounds of multiply-adds in registers.
struct MultiplyAdds {
    rounds: usize,
}

impl<T: Float> Task<T> for MultiplyAdds {
    type Output = u64;

    #[inline(always)]
    fn run<P: Product<Element = T>>(self, p: P) -> u64 {
        let (left, right) = ([T::narrow(1.0); 2 * LANES], [Register([0.5; LANES]); 2]);
        // SAFETY: both hold a step of any product.
        let (left, right) = unsafe { (p.left(left.as_ptr()), p.right(right.as_ptr())) };
        // As many as registers hold: others would be stored and loaded again.
        match P::Isa::COLUMNS {
            ..3 => multiply_adds::<P, 4>(p, left, right, self.rounds),
            3..6 => multiply_adds::<P, 6>(p, left, right, self.rounds),
            _ => multiply_adds::<P, 12>(p, left, right, self.rounds),
        }
    }
}

/// Rounds of `SUMS` multiply-adds that do not wait for each other; how many operations these are.
#[inline(always)]
fn multiply_adds<P: Product, const SUMS: usize>(p: P, left: P::Left, right: P::Right, rounds: usize) -> u64 {
    let isa = p.isa();
    let mut sums = [isa.splat(0.0); SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = p.dot(left, right, *sum);
        }
    }
    let mut kept = [0.0; LANES];
    for sum in sums {
        isa.store(sum, &mut kept);
        std::hint::black_box(&kept);
    }
    (2 * P::ELEMENTS * SUMS * rounds) as u64
}

/// Does `rounds` rounds of multiply-adds of f32; how many operations these were.
pub fn multiply_adds_f32(rounds: usize) -> u64 {
    simd::with_f32(MultiplyAdds { rounds })
}

/// As [`multiply_adds_f32`], of bf16.
pub fn multiply_adds_bf16(rounds: usize) -> u64 {
    simd::with_bf16(MultiplyAdds { rounds })
}

/// Memory that is read.
struct Sum<'s>(&'s [[f32; LANES]]);

impl Task<f32> for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<P: Product<Element = f32>>(self, p: P) -> f32 {
        let isa = p.isa();
        let (one, mut sums) = (isa.splat(1.0), [isa.splat(0.0); 4]);
        for four in self.0.as_chunks::<4>().0 {
            for (sum, lanes) in sums.iter_mut().zip(four) {
                *sum = isa.fma(isa.load(lanes), one, *sum);
            }
        }
        isa.sums(sums).into_iter().sum()
    }
}

/// Reads all of `values` once.
pub fn read(values: &[f32]) -> f32 {
    simd::with_f32(Sum(values.as_chunks().0))
}

/// `a = b + 2 c`: two arrays are read, one is written.
pub fn triad(a: &mut [f32], b: &[f32], c: &[f32]) {
    for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
        *a = b + 2.0 * c;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums of two rows.
    struct Sums;

    impl Task<f32> for Sums {
        type Output = u64;

        fn run<P: Product<Element = f32>>(self, _: P) -> u64 {
            2 * P::Isa::COLUMNS as u64
        }
    }

    #[test]
    fn work_is_what_it_says() {
        let sums = simd::with_f32(Sums);
        assert_eq!(multiply_adds_f32(10), 2 * 16 * sums * 10);
        assert_eq!(multiply_adds_bf16(10), 2 * 32 * sums * 10);
        assert_eq!(read(&[0.5; 256]), 128.0);
        let mut a = [0.0; 3];
        triad(&mut a, &[1.0, 2.0, 3.0], &[0.5, 1.0, 1.5]);
        assert_eq!(a, [2.0, 4.0, 6.0]);
    }
}
