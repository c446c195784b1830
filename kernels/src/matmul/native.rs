//! Matmul with few columns in plain Rust, for decode steps on the host's own processor.
//!
//! `y [n, m] = w [n, k] x [k, m]`, the weight as Hugging Face stores it, for `m` up to [`MAX_COLUMNS`]. A row of `x` is
//! then one or two registers: every weight is read once, broadcast, and multiplied into them. XLA's CPU compiler calls a
//! general matmul that packs the weights anew on every step.
//!
//! Each result is one sum over `k` in order, in f32: a column's bits depend neither on its place among the columns nor on
//! how many threads there are.

use pagoda_ir::{
    Element, Result, TensorType,
    stablehlo::{BackendConfig, Builder, CustomCall, Tensor},
};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::float::Float;

/// The custom call's name; the engine registers its handler under it.
pub const TARGET: &str = "pagoda_matmul";
/// Most columns that one call takes.
pub const MAX_COLUMNS: usize = 16;
/// Multiply-adds that are worth waking a second thread for.
const THREADED_WORK: usize = 1 << 19;

/// Emits `w [n, k]` times `x [k, m]` as a custom call with an f32 result `[n, m]`.
///
/// # Errors
/// When the shapes do not fit, or `m` exceeds [`MAX_COLUMNS`].
pub fn emit<'c, 'a>(b: &Builder<'c, 'a>, w: Tensor<'c, 'a>, x: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
    let (w_type, x_type) = (w.ty(), x.ty());
    let fits = w_type.rank() == 2 && x_type.rank() == 2 && w_type.dims[1] == x_type.dims[0];
    if !fits || w_type.element != x_type.element || x_type.dims[1] > MAX_COLUMNS {
        let message = format!("{w_type} times {x_type} (at most {MAX_COLUMNS} columns)");
        return Err(pagoda_ir::Error::op(TARGET, message));
    }
    let result = TensorType::new(Element::F32, &[w_type.dims[0], x_type.dims[1]]);
    let call = CustomCall { backend_config: BackendConfig::Dictionary(Vec::new()), ..CustomCall::default() };
    Ok(b.custom_call(TARGET, &[w, x], &[result], call)?[0])
}

/// `y [n, m] = w [n, k] x [k, m]`.
///
/// # Panics
/// When a slice does not have the size that the shape gives, or `m` exceeds [`MAX_COLUMNS`].
pub fn multiply<T: Float>(w: &[T], x: &[T], y: &mut [f32], k: usize, m: usize) {
    assert!(m <= MAX_COLUMNS && x.len() == k * m, "x has {} elements for [{k}, {m}]", x.len());
    if m == 0 || y.is_empty() {
        return;
    }
    let n = y.len() / m;
    assert!(w.len() == n * k && y.len() == n * m, "w has {} elements for [{n}, {k}]", w.len());
    // Columns padded to whole registers: 8 or 16 wide.
    let x: Vec<f32> = match m {
        1 => x.iter().map(|x| x.widen()).collect(),
        _ => {
            let width = m.next_multiple_of(8);
            let mut wide = vec![0f32; k * width];
            for (wide, x) in wide.chunks_exact_mut(width).zip(x.chunks_exact(m)) {
                wide.iter_mut().zip(x).for_each(|(wide, x)| *wide = x.widen());
            }
            wide
        }
    };
    let part = |w: &[T], y: &mut [f32]| pulp::Arch::new().dispatch(Part { w, x: &x, y, k, m });
    if n * k * m < THREADED_WORK {
        return part(w, y);
    }
    // Two pieces a thread even out a thread that starts late.
    let rows = n.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(8);
    y.par_chunks_mut(rows * m).zip(w.par_chunks(rows * k)).for_each(|(y, w)| part(w, y));
}

/// Some rows of the weight and their results.
struct Part<'p, T> {
    w: &'p [T],
    x: &'p [f32],
    y: &'p mut [f32],
    k: usize,
    m: usize,
}

impl<T: Float> WithSimd for Part<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { w, x, y, k, m } = self;
        match (m, size_of::<S::f32s>() / size_of::<f32>()) {
            (1, _) => y.iter_mut().zip(w.chunks_exact(k)).for_each(|(y, w)| *y = dot(simd, w, x)),
            // As many sums as hide the latency of a multiply-add and still fit the 16 registers.
            (2..=8, 8) => in_registers::<S, T, 8, 1>(simd, w, x, y, k, m),
            (_, 8) => in_registers::<S, T, 4, 2>(simd, w, x, y, k, m),
            (2..=8, _) => in_arrays::<T, 8>(w, x, y, k, m),
            _ => in_arrays::<T, 16>(w, x, y, k, m),
        }
    }
}

/// One column: a dot product in four registers of partial sums.
#[inline(always)]
fn dot<S: Simd, T: Float>(simd: S, w: &[T], x: &[f32]) -> f32 {
    /// A row of the weight is widened in pieces of this many elements.
    const PIECE: usize = 64;
    let mut sums = [simd.splat_f32s(0.0); 4];
    let mut rest = 0.0;
    let mut wide = [0f32; PIECE];
    for (w, x) in w.chunks(PIECE).zip(x.chunks(PIECE)) {
        let wide = &mut wide[..w.len()];
        wide.iter_mut().zip(w).for_each(|(wide, w)| *wide = w.widen());
        let ((w, w_rest), (x, x_rest)) = (S::as_simd_f32s(wide), S::as_simd_f32s(x));
        for (index, (w, x)) in w.iter().zip(x).enumerate() {
            sums[index % 4] = simd.mul_add_f32s(*w, *x, sums[index % 4]);
        }
        rest += w_rest.iter().zip(x_rest).map(|(w, x)| w * x).sum::<f32>();
    }
    let pairs = [simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3])];
    simd.reduce_sum_f32s(simd.add_f32s(pairs[0], pairs[1])) + rest
}

/// `REGISTERS` registers of 8 columns, `ROWS` rows of the weight at a time.
#[inline(always)]
fn in_registers<S: Simd, T: Float, const ROWS: usize, const REGISTERS: usize>(
    simd: S,
    w: &[T],
    x: &[f32],
    y: &mut [f32],
    k: usize,
    m: usize,
) {
    // Slices of exactly k elements, so that no index is checked in the loop.
    let x = &S::as_simd_f32s(x).0.as_chunks::<REGISTERS>().0[..k];
    for (w, y) in w.chunks(ROWS * k).zip(y.chunks_mut(ROWS * m)) {
        let mut sums = [[simd.splat_f32s(0.0); REGISTERS]; ROWS];
        let live = w.len() / k;
        // Beyond the last row: the last row again, whose sums are not kept.
        let rows: [&[T]; ROWS] = std::array::from_fn(|row| &w[row.min(live - 1) * k..][..k]);
        for at in 0..k {
            for row in 0..ROWS {
                let w = simd.splat_f32s(rows[row][at].widen());
                for register in 0..REGISTERS {
                    sums[row][register] = simd.mul_add_f32s(w, x[at][register], sums[row][register]);
                }
            }
        }
        for (y, sums) in y.chunks_exact_mut(m).zip(&sums) {
            let mut columns = [0f32; MAX_COLUMNS];
            S::as_mut_simd_f32s(&mut columns).0[..REGISTERS].copy_from_slice(sums);
            y.copy_from_slice(&columns[..m]);
        }
    }
}

/// The same for registers of another width: arrays, which the compiler maps to what there is.
#[inline(always)]
fn in_arrays<T: Float, const WIDTH: usize>(w: &[T], x: &[f32], y: &mut [f32], k: usize, m: usize) {
    let x = x.as_chunks::<WIDTH>().0;
    for (w, y) in w.chunks_exact(k).zip(y.chunks_exact_mut(m)) {
        let mut sums = [0f32; WIDTH];
        for (x, w) in x.iter().zip(w) {
            let w = w.widen();
            sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += w * x);
        }
        y.copy_from_slice(&sums[..m]);
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn every_width_matches_sums_in_f64() {
        for (n, k) in [(1, 1), (7, 33), (1030, 96)] {
            for m in 1..=MAX_COLUMNS {
                let value = |i: usize| ((i * 7919 + 13) % 257) as f32 / 64.0 - 2.0;
                let w: Vec<f32> = (0..n * k).map(value).collect();
                let x: Vec<f32> = (0..k * m).map(|i| value(i + 5)).collect();
                let narrow = |values: &[f32]| values.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>();
                let (w16, x16) = (narrow(&w), narrow(&x));
                let (mut y, mut y16) = (vec![f32::NAN; n * m], vec![f32::NAN; n * m]);
                multiply(&w, &x, &mut y, k, m);
                multiply(&w16, &x16, &mut y16, k, m);
                for (at, (y, y16)) in y.iter().zip(&y16).enumerate() {
                    let (row, column) = (at / m, at % m);
                    let sum = |product: &dyn Fn(usize, usize) -> f64| -> (f64, f64) {
                        (0..k)
                            .map(|i| product(row * k + i, i * m + column))
                            .fold((0.0, 0.0), |(s, a), p| (s + p, a + p.abs()))
                    };
                    let (exact, size) = sum(&|i, j| f64::from(w[i]) * f64::from(x[j]));
                    let (exact16, size16) = sum(&|i, j| w16[i].to_f64() * x16[j].to_f64());
                    // f32 sums of up to 96 terms: 96 roundings of 6e-8 at worst.
                    assert!((f64::from(*y) - exact).abs() <= 6e-6 * size, "[{n}, {k}] x {m} at {at}");
                    assert!((f64::from(*y16) - exact16).abs() <= 6e-6 * size16, "bf16 [{n}, {k}] x {m} at {at}");
                }
            }
        }
    }

    #[test]
    fn a_column_does_not_depend_on_its_place() {
        let (n, k, m) = (64, 256, 8);
        let w: Vec<f32> = (0..n * k).map(|i| ((i * 31) % 97) as f32 / 10.0).collect();
        let column: Vec<f32> = (0..k).map(|i| ((i * 17) % 89) as f32 / 7.0).collect();
        let result = |place: usize| {
            let x: Vec<f32> = (0..k * m).map(|i| if i % m == place { column[i / m] } else { (i % 5) as f32 }).collect();
            let mut y = vec![0.0; n * m];
            multiply(&w, &x, &mut y, k, m);
            (0..n).map(|row| y[row * m + place].to_bits()).collect::<Vec<_>>()
        };
        assert!((1..m).all(|place| result(place) == result(0)));
    }
}
