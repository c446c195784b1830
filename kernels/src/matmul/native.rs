//! Matmul with few columns in plain Rust, for decode steps on the host's own processor.
//!
//! `y [n, m] = epilogue(w [n, k] norm(x) [k, m])`, the weight as Hugging Face stores it, for `m` up to [`MAX_COLUMNS`]. A
//! row of `x` is then one or two registers: every weight is read once, broadcast, and multiplied into them. XLA's CPU
//! compiler calls a general matmul that packs the weights anew on every step, and makes loops of their own of what
//! stands around the product, whose dispatch costs more than their work: norm, SiLU gate and residual are part of this
//! call.
//!
//! Each result is one sum over `k` in order, in f32 (one column: in lanes): a column's bits depend neither on its place
//! among the columns nor on how many threads there are.

use pagoda_ir::{
    Element, Result, TensorType,
    stablehlo::{BackendConfig, Builder, ConfigValue, CustomCall, Tensor},
};
use pulp::{Simd, WithSimd};

use super::problem::Activation;
use crate::{
    float::{Float, exp},
    threads::{self, Threads},
};

/// The custom call's name; the engine registers its handler under it.
pub const TARGET: &str = "pagoda_matmul";
/// Most columns that one call takes.
pub const MAX_COLUMNS: usize = 16;
/// Multiply-adds that are worth a second thread.
const THREADED_WORK: usize = 1 << 17;

/// Options in the call's `backend_config`, written as text where they are on: the epsilon of the norm, a SiLU gate, a
/// residual. Operands after `w` and `x`: the norm's weight, the residual.
pub const OPTIONS: [&str; 3] = ["norm", "silu_gate", "residual"];

/// Root-mean-square norm of every column of `x`, `x / sqrt(mean(x^2) + epsilon) * weight`, rounded before the weight is
/// applied (as Llama was trained) and after.
#[derive(Clone, Copy, Debug)]
pub struct Norm<W> {
    /// `[k]`
    pub weight: W,
    /// Added to the mean of the squares.
    pub epsilon: f64,
}

/// What is done around the product. `W` is a tensor of a program that is being emitted, or a slice.
#[derive(Clone, Copy, Debug)]
pub struct Around<W> {
    /// Before it.
    pub norm: Option<Norm<W>>,
    /// After it. With a SiLU gate the weight is `[2 n, k]`: rows of the gate, then of what is gated.
    pub activation: Activation,
    /// `[n, m]`, added last.
    pub residual: Option<W>,
}

impl<W> Around<W> {
    /// The bare product.
    pub const NOTHING: Self = Self { norm: None, activation: Activation::Identity, residual: None };
}

/// Emits the call; its result is `[n, m]` of type `result`: that of the operands, or f32.
///
/// # Errors
/// When the shapes do not fit, or `m` exceeds [`MAX_COLUMNS`].
pub fn emit<'c, 'a>(
    b: &Builder<'c, 'a>,
    w: Tensor<'c, 'a>,
    x: Tensor<'c, 'a>,
    around: &Around<Tensor<'c, 'a>>,
    result: Element,
) -> Result<Tensor<'c, 'a>> {
    let (w_type, x_type) = (w.ty(), x.ty());
    let fits = w_type.rank() == 2 && x_type.rank() == 2 && w_type.dims[1] == x_type.dims[0];
    if !fits || w_type.element != x_type.element || x_type.dims[1] > MAX_COLUMNS {
        let message = format!("{w_type} times {x_type} (at most {MAX_COLUMNS} columns)");
        return Err(pagoda_ir::Error::op(TARGET, message));
    }
    let gated = around.activation == Activation::SiluGate;
    let rows = if gated { w_type.dims[0] / 2 } else { w_type.dims[0] };
    let on = |yes: bool| yes.then(|| "true".to_owned());
    let options =
        [around.norm.map(|norm| norm.epsilon.to_string()), on(gated), on(around.residual.is_some())].into_iter();
    let options = OPTIONS.iter().zip(options);
    let options = options.filter_map(|(name, value)| Some(((*name).to_owned(), ConfigValue::Text(value?))));
    let call = CustomCall { backend_config: BackendConfig::Dictionary(options.collect()), ..CustomCall::default() };
    let operands: Vec<_> =
        [Some(w), Some(x), around.norm.map(|norm| norm.weight), around.residual].into_iter().flatten().collect();
    let result = TensorType::new(result, &[rows, x_type.dims[1]]);
    Ok(b.custom_call(TARGET, &operands, &[result], call)?[0])
}

/// The operands of one call.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a, T> {
    /// `[n, k]`, with a SiLU gate `[2 n, k]`
    pub w: &'a [T],
    /// `[k, m]`
    pub x: &'a [T],
    /// `m`, at most [`MAX_COLUMNS`].
    pub columns: usize,
    /// Norm, activation, residual.
    pub around: Around<&'a [T]>,
}

/// Computes `y [n, m]`.
///
/// # Panics
/// When a slice does not have the size that the shape gives, or there are more than [`MAX_COLUMNS`] columns.
pub fn multiply<T: Float, O: Float>(call: &Call<'_, T>, y: &mut [O], threads: &dyn Threads) {
    let Call { w, x, columns: m, around } = *call;
    if m == 0 || y.is_empty() {
        return;
    }
    let (k, n) = (x.len() / m, y.len() / m);
    let halves = if around.activation == Activation::SiluGate { 2 } else { 1 };
    assert!(
        m <= MAX_COLUMNS && x.len() == k * m && y.len() == n * m,
        "{} and {} elements, {m} columns",
        x.len(),
        y.len()
    );
    assert!(w.len() == halves * n * k, "w has {} elements for {halves} times [{n}, {k}]", w.len());
    assert!(around.residual.is_none_or(|residual| residual.len() == y.len()), "the residual's size");
    if k == 0 {
        return y.fill(O::narrow(0.0));
    }
    let width = if m == 1 { 1 } else { m.next_multiple_of(8) };
    let mut wide = Vec::new();
    let x = widened(x, around.norm, m, width, &mut wide);
    let (gate, up) = w.split_at(n * k);
    // Two pieces a thread even out a thread that comes late.
    let pieces = if halves * n * k * m < THREADED_WORK { 1 } else { 2 * threads.count() };
    let rows = n.div_ceil(pieces).next_multiple_of(8);
    let parts = y.chunks_mut(rows * m).enumerate().map(|(part, y)| Part {
        gate: &gate[part * rows * k..][..y.len() / m * k],
        up: (halves == 2).then(|| &up[part * rows * k..][..y.len() / m * k]),
        x,
        residual: around.residual.map(|residual| &residual[part * rows * m..][..y.len()]),
        y,
        k,
        m,
    });
    threads::for_each(threads, parts.collect(), |part| pulp::Arch::new().dispatch(part));
}

/// `norm(x)` in f32, columns padded to `width`: `x` itself where that is the same.
fn widened<'x, T: Float>(
    x: &'x [T],
    norm: Option<Norm<&[T]>>,
    m: usize,
    width: usize,
    wide: &'x mut Vec<f32>,
) -> &'x [f32] {
    let k = x.len() / m;
    if norm.is_none() && m == width {
        wide.resize(if T::ELEMENT == Element::F32 { 0 } else { x.len() }, 0.0);
        return T::vector(x, wide);
    }
    wide.resize(k * width, 0.0);
    for (wide, x) in wide.chunks_exact_mut(width).zip(x.chunks_exact(m)) {
        wide.iter_mut().zip(x).for_each(|(wide, x)| *wide = x.widen());
    }
    if let Some(norm) = norm {
        pulp::Arch::new().dispatch(|| normalize(wide, norm, width));
    }
    wide
}

#[inline(always)]
fn normalize<T: Float>(wide: &mut [f32], norm: Norm<&[T]>, width: usize) {
    assert_eq!(wide.len(), norm.weight.len() * width, "the norm's weight");
    let mut scale = [0f32; MAX_COLUMNS];
    let scale = &mut scale[..width];
    for row in wide.chunks_exact(width) {
        scale.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
    }
    let count = norm.weight.len() as f32;
    scale.iter_mut().for_each(|scale| *scale = 1.0 / (*scale / count + norm.epsilon as f32).sqrt());
    for (row, weight) in wide.chunks_exact_mut(width).zip(norm.weight) {
        let weight = weight.widen();
        for (x, scale) in row.iter_mut().zip(&*scale) {
            *x = T::narrow(T::narrow(*x * scale).widen() * weight).widen();
        }
    }
}

/// Some rows of the result, and of the weight.
struct Part<'p, T, O> {
    /// The weight's rows, or those of the gate.
    gate: &'p [T],
    up: Option<&'p [T]>,
    x: &'p [f32],
    residual: Option<&'p [T]>,
    y: &'p mut [O],
    k: usize,
    m: usize,
}

/// Sums of one row of the weight, one per column; columns beyond the last hold anything.
type Sums = [f32; MAX_COLUMNS];

impl<T: Float, O: Float> WithSimd for Part<'_, T, O> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (x, k) = (self.x, self.k);
        match (self.m, size_of::<S::f32s>() / size_of::<f32>()) {
            (1, _) => {
                let mut wide = vec![0f32; if T::ELEMENT == Element::F32 { 0 } else { k }];
                self.rows(|rows: [&[T]; 2]| one_column(simd, rows, x, &mut wide));
            }
            // As many sums as hide the latency of a multiply-add and still fit the 16 registers.
            (2..=8, 8) => self.rows(|rows: [&[T]; 8]| in_registers::<S, T, 8, 1>(simd, rows, x)),
            (_, 8) => self.rows(|rows: [&[T]; 4]| in_registers::<S, T, 4, 2>(simd, rows, x)),
            (2..=8, _) => self.rows(|rows: [&[T]; 4]| in_arrays::<T, 4, 8>(rows, x)),
            _ => self.rows(|rows: [&[T]; 4]| in_arrays::<T, 4, 16>(rows, x)),
        }
    }
}

impl<T: Float, O: Float> Part<'_, T, O> {
    /// Goes through the result by as many rows as make `ROWS` rows of the weight, whose sums `product` gives.
    #[inline(always)]
    fn rows<const ROWS: usize>(self, mut product: impl FnMut([&[T]; ROWS]) -> [Sums; ROWS]) {
        let Self { gate, up, residual, y, k, m, .. } = self;
        let step = if up.is_some() { ROWS / 2 } else { ROWS };
        for (block, y) in y.chunks_mut(step * m).enumerate() {
            let (first, live) = (block * step, y.len() / m);
            // Beyond the last row: the last row again, whose sums are not kept.
            let rows = std::array::from_fn(|row| {
                let half = if row < step { gate } else { up.unwrap_or(gate) };
                &half[(first + (row % step).min(live - 1)) * k..][..k]
            });
            let mut sums = product(rows);
            if up.is_some() {
                let (gate, up) = sums.split_at_mut(step);
                for (gate, up) in gate.iter_mut().zip(up) {
                    gate.iter_mut().zip(up).for_each(|(gate, up)| *gate *= sigmoid(*gate) * *up);
                }
            }
            for (row, (y, sums)) in y.chunks_exact_mut(m).zip(&mut sums).enumerate() {
                if let Some(residual) = residual {
                    let residual = &residual[(first + row) * m..][..m];
                    sums.iter_mut().zip(residual).for_each(|(sum, residual)| *sum += residual.widen());
                }
                y.iter_mut().zip(sums).for_each(|(y, sum)| *y = O::narrow(*sum));
            }
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    // Of the two forms the one whose exponential cannot overflow.
    let e = exp(-x.abs());
    (if x < 0.0 { e } else { 1.0 }) / (1.0 + e)
}

/// One column: a dot product per row of the weight, in four registers of partial sums. (Loops here and below, not
/// closures: a closure is compiled without the instruction set.)
#[inline(always)]
fn one_column<S: Simd, T: Float, const ROWS: usize>(
    simd: S,
    rows: [&[T]; ROWS],
    x: &[f32],
    wide: &mut [f32],
) -> [Sums; ROWS] {
    let (x, x_rest) = S::as_simd_f32s(x);
    let (x, x_last) = x.as_chunks::<4>();
    let mut products = [[0.0; MAX_COLUMNS]; ROWS];
    for (row, products) in rows.into_iter().zip(&mut products) {
        let (w, w_rest) = S::as_simd_f32s(T::vector(row, wide));
        let (w, w_last) = w.as_chunks::<4>();
        let mut sums = [simd.splat_f32s(0.0); 4];
        for (w, x) in w.iter().zip(x) {
            for lane in 0..4 {
                sums[lane] = simd.mul_add_f32s(w[lane], x[lane], sums[lane]);
            }
        }
        for (w, x) in w_last.iter().zip(x_last) {
            sums[0] = simd.mul_add_f32s(*w, *x, sums[0]);
        }
        let sum = simd.add_f32s(simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3]));
        products[0] = simd.reduce_sum_f32s(sum);
        for (w, x) in w_rest.iter().zip(x_rest) {
            products[0] += w * x;
        }
    }
    products
}

/// `REGISTERS` registers of 8 columns, `ROWS` rows of the weight at a time.
#[inline(always)]
fn in_registers<S: Simd, T: Float, const ROWS: usize, const REGISTERS: usize>(
    simd: S,
    rows: [&[T]; ROWS],
    x: &[f32],
) -> [Sums; ROWS] {
    // Slices of exactly k elements, so that no index is checked in the loop.
    let k = rows[0].len();
    let x = &S::as_simd_f32s(x).0.as_chunks::<REGISTERS>().0[..k];
    let mut sums = [[simd.splat_f32s(0.0); REGISTERS]; ROWS];
    let mut weights: [&[T]; ROWS] = [&[]; ROWS];
    for row in 0..ROWS {
        weights[row] = &rows[row][..k];
    }
    for at in 0..k {
        for row in 0..ROWS {
            let w = simd.splat_f32s(weights[row][at].widen());
            for register in 0..REGISTERS {
                sums[row][register] = simd.mul_add_f32s(w, x[at][register], sums[row][register]);
            }
        }
    }
    let mut columns = [[0.0; MAX_COLUMNS]; ROWS];
    for (columns, sums) in columns.iter_mut().zip(&sums) {
        S::as_mut_simd_f32s(columns).0[..REGISTERS].copy_from_slice(sums);
    }
    columns
}

/// The same for registers of another width: arrays, which the compiler maps to what there is.
#[inline(always)]
fn in_arrays<T: Float, const ROWS: usize, const WIDTH: usize>(rows: [&[T]; ROWS], x: &[f32]) -> [Sums; ROWS] {
    let mut columns = [[0.0; MAX_COLUMNS]; ROWS];
    for (row, columns) in rows.into_iter().zip(&mut columns) {
        let mut sums = [0f32; WIDTH];
        for (x, w) in x.as_chunks::<WIDTH>().0.iter().zip(row) {
            let w = w.widen();
            for lane in 0..WIDTH {
                sums[lane] += w * x[lane];
            }
        }
        columns[..WIDTH].copy_from_slice(&sums);
    }
    columns
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use pagoda_ir::HostTensor;

    use super::*;
    use crate::{
        check::compare,
        matmul::{Epilogue, Layout, Problem, Spec, reference::reference},
        named::Arrays,
        threads::{Caller, Scoped},
    };

    fn value(i: usize) -> f64 {
        ((i * 7919 + 13) % 257) as f64 / 64.0 - 2.0
    }

    fn tensor(element: Element, dims: &[usize], first: usize) -> HostTensor {
        let values: Vec<f64> = (0..dims.iter().product()).map(|i| value(i + first)).collect();
        HostTensor::from_f64(element, dims, &values)
    }

    fn run<T: Float>(problem: &Problem, inputs: &Arrays, threads: &dyn Threads) -> HostTensor {
        let mut output = tensor(problem.output, &problem.output_type().dims, 0);
        let residual = inputs.get("residual").map(|residual| residual.as_slice::<T>());
        let around = Around { norm: None, activation: problem.epilogue.activation, residual };
        let call = Call { w: inputs["w"].as_slice::<T>(), x: inputs["x"].as_slice(), columns: problem.m, around };
        multiply(&call, output.as_mut_slice::<T>(), threads);
        output
    }

    #[test]
    fn every_width_and_epilogue_matches_the_reference() {
        for (n, k) in [(1, 1), (7, 33), (515, 96)] {
            for (m, bits) in (1..=MAX_COLUMNS).flat_map(|m| (0..8).map(move |bits| (m, bits))) {
                let element = if bits & 1 == 0 { Element::F32 } else { Element::Bf16 };
                let activation = if bits & 2 == 0 { Activation::Identity } else { Activation::SiluGate };
                let epilogue = Epilogue { bias: false, activation, residual: bits & 4 != 0 };
                let layout = Layout::FeatureMajor;
                let problem = Problem::new(Spec {
                    m,
                    k,
                    n,
                    input: element,
                    output: element,
                    layout,
                    epilogue,
                    layers: 1,
                    quantized: None,
                })
                .unwrap();
                let arguments = problem.arguments();
                let arrays = arguments.iter().zip([5, 0, 11]);
                let inputs = arguments.name(arrays.map(|(argument, first)| tensor(element, &argument.ty.dims, first)));
                let run = |threads: &dyn Threads| match element {
                    Element::F32 => run::<f32>(&problem, &inputs, threads),
                    _ => run::<bf16>(&problem, &inputs, threads),
                };
                let (actual, expected) = (run(&Caller), reference(&problem, &inputs));
                compare("native", &actual, &expected)
                    .unwrap_or_else(|error| panic!("[{n}, {k}] x {m} {epilogue:?}: {error}"));
                assert!(run(&Scoped(3)) == actual, "[{n}, {k}] x {m}: threads show in the result");
            }
        }
    }

    #[test]
    fn the_norm_is_that_of_each_column() {
        let (n, k, epsilon) = (5, 48, 1e-5);
        for m in [1, 3, 8, 16] {
            let (w, x, weight) =
                (tensor(Element::F32, &[n, k], 0), tensor(Element::F32, &[k, m], 5), tensor(Element::F32, &[k], 9));
            let around = Around { norm: Some(Norm { weight: weight.as_slice(), epsilon }), ..Around::NOTHING };
            let mut y = vec![f32::NAN; n * m];
            multiply(&Call { w: w.as_slice::<f32>(), x: x.as_slice(), columns: m, around }, &mut y, &Caller);
            let (w, x, weight) = (w.to_f64(), x.to_f64(), weight.to_f64());
            for column in 0..m {
                let squares: f64 = (0..k).map(|i| x[i * m + column].powi(2)).sum();
                let scale = (squares / k as f64 + epsilon).sqrt().recip();
                for row in 0..n {
                    let terms = (0..k).map(|i| w[row * k + i] * x[i * m + column] * scale * weight[i]);
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                    assert!((f64::from(y[row * m + column]) - sum).abs() <= 2e-5 * size, "{row} {column} of {m}");
                }
            }
        }
    }

    #[test]
    fn a_column_does_not_depend_on_its_place() {
        let (n, k, m) = (64, 256, 8);
        let w: Vec<f32> = (0..n * k).map(|i| value(i) as f32).collect();
        let column: Vec<f32> = (0..k).map(|i| value(i * 17) as f32).collect();
        let result = |place: usize| {
            let x: Vec<f32> = (0..k * m).map(|i| if i % m == place { column[i / m] } else { (i % 5) as f32 }).collect();
            let mut y = vec![0f32; n * m];
            multiply(&Call { w: &w, x: &x, columns: m, around: Around::NOTHING }, &mut y, &Caller);
            (0..n).map(|row| y[row * m + place].to_bits()).collect::<Vec<_>>()
        };
        assert!((1..m).all(|place| result(place) == result(0)));
    }
}
