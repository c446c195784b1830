//! The tile machine: every op against plain f64 loops. What it reports is in `cases/`, see `cases.rs`.

use half::bf16;
use pagoda_ir::{
    Context, Element, HostTensor,
    mosaic::{self, Builder, DotDims, Kernel, MemorySpace, Precision, Ref, Semantics, Value, Window},
    tile_machine::{DmaOrder, Fault, FaultKind, Machine, Program, Run},
};

const ORDERS: [DmaOrder; 4] = [DmaOrder::Early, DmaOrder::Late, DmaOrder::Random(0), DmaOrder::Random(1)];

fn run_on(machine: &Machine, kernel: &Kernel, inputs: &[HostTensor]) -> Result<Run, Box<Fault>> {
    let program = Program::decode(kernel.module()).expect("every op that the builder makes is known");
    program.with_aliases(kernel.aliases()).run(machine, inputs, &kernel.outputs())
}

fn build<'c>(context: &'c Context, body: impl for<'a> FnOnce(&'a Builder<'a>)) -> Kernel<'c> {
    mosaic::kernel(context, "k", body).unwrap_or_else(|error| panic!("{error}"))
}

/// Values without pattern in (-2, 2), away from 0.
fn values(count: usize, seed: f64) -> Vec<f64> {
    (0..count).map(|i| 2.0 * ((i as f64 + 1.0) * (12.9898 + seed)).sin()).collect()
}

/// A kernel of one step from whole tiles `x` and `y` to one output.
fn one_step<'c>(
    context: &'c Context,
    (element, dims): (Element, &[usize]),
    (out_element, out_dims): (Element, &[usize]),
    body: impl for<'a> FnOnce(&'a Builder<'a>, Value<'a>, Value<'a>) -> Value<'a>,
) -> Kernel<'c> {
    build(context, |k| {
        k.grid([(1, Semantics::Arbitrary)]);
        let x = k.input("x", element, dims, Window::whole(dims));
        let y = k.input("y", element, dims, Window::whole(dims));
        let out = k.output("out", out_element, out_dims, Window::whole(out_dims));
        out.store(body(k, x.load(), y.load()));
    })
}

fn outcome(run: Result<Run, Box<Fault>>) -> Vec<f64> {
    run.unwrap_or_else(|fault| panic!("{fault}")).outputs[0].to_f64()
}

/// Elements may differ by `tolerance`, relative beyond 1.
fn assert_close(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        let close = (got - want).abs() <= tolerance * want.abs().max(1.0) || (got.is_nan() && want.is_nan());
        assert!(close, "{name}: element {at} is {got}, not {want}");
    }
}

#[test]
fn elementwise_float_ops() {
    type Op = (&'static str, for<'a> fn(Value<'a>, Value<'a>) -> Value<'a>, fn(f64, f64) -> f64);
    let ops: &[Op] = &[
        ("add", |x, y| x + y, |x, y| x + y),
        ("sub", |x, y| x - y, |x, y| x - y),
        ("mul", |x, y| x * y, |x, y| x * y),
        ("div", |x, y| x / y, |x, y| x / y),
        ("rem", |x, y| x % y, |x, y| x % y),
        ("maximum", |x, y| x.maximum(y), f64::max),
        ("minimum", |x, y| x.minimum(y), f64::min),
        ("neg", |x, _| -x, |x, _| -x),
        ("abs", |x, _| x.abs(), |x, _| x.abs()),
        ("exp", |x, _| x.exp(), |x, _| x.exp()),
        ("exp2", |x, _| x.exp2(), |x, _| x.exp2()),
        ("log", |x, _| x.abs().log(), |x, _| x.abs().ln()),
        ("tanh", |x, _| x.tanh(), |x, _| x.tanh()),
        ("sin", |x, _| x.sin(), |x, _| x.sin()),
        ("cos", |x, _| x.cos(), |x, _| x.cos()),
        ("sqrt", |x, _| x.abs().sqrt(), |x, _| x.abs().sqrt()),
        ("rsqrt", |x, _| x.abs().rsqrt(), |x, _| x.abs().sqrt().recip()),
        ("floor", |x, _| x.floor(), |x, _| x.floor()),
        ("reciprocal", |x, _| x.reciprocal(false), |x, _| x.recip()),
        ("logistic", |x, _| x.logistic(), |x, _| 1.0 / (1.0 + (-x).exp())),
        ("literals", |x, _| 2.0 - x * 3, |x, _| 2.0 - x * 3.0),
        ("less", |x, y| x.less(y).cast(Element::F32), |x, y| f64::from(x < y)),
        ("less_equal", |x, y| x.less_equal(y).cast(Element::F32), |x, y| f64::from(x <= y)),
        ("greater", |x, y| x.greater(y).select(x, y * 2.0), |x, y| if x > y { x } else { y * 2.0 }),
        ("greater_equal", |x, _| x.greater_equal(0.5).select(1.0, x), |x, _| if x >= 0.5 { 1.0 } else { x }),
        ("equals", |x, y| x.equals(y).cast(Element::F32), |x, y| f64::from(x == y)),
        ("differs", |x, y| (!x.differs(y)).cast(Element::F32), |x, y| f64::from(x == y)),
    ];
    let context = Context::new();
    let dims = [8, 128];
    let (x, y) = (values(1024, 0.0), values(1024, 0.5));
    for (name, op, reference) in ops {
        // f32 functions of the standard library: a few units in the last place; bf16 keeps 8 bits, and is rounded once
        // per op of the expression.
        for (element, tolerance) in [(Element::F32, 1e-5), (Element::Bf16, 3e-2)] {
            let inputs = [&x, &y].map(|values| HostTensor::from_f64(element, &dims, values));
            let exact: Vec<_> = inputs.iter().map(HostTensor::to_f64).collect();
            let want: Vec<_> = exact[0].iter().zip(&exact[1]).map(|(&x, &y)| reference(x, y)).collect();
            if element == Element::Bf16 && matches!(*name, "rem" | "floor" | "div") {
                continue; // discontinuous or unbounded here: one rounding decides
            }
            let kernel =
                one_step(&context, (element, &dims), (Element::F32, &dims), |_, x, y| op(x, y).cast(Element::F32));
            assert_close(name, &outcome(run_on(&Machine::default(), &kernel, &inputs)), &want, tolerance);
        }
    }
}

#[test]
fn elementwise_integer_ops() {
    type Op = (&'static str, for<'a> fn(Value<'a>, Value<'a>) -> Value<'a>, fn(i32, i32) -> i32);
    let ops: &[Op] = &[
        ("add", |x, y| x + y, |x, y| x.wrapping_add(y)),
        ("sub", |x, y| 7 - x - y, |x, y| 7i32.wrapping_sub(x).wrapping_sub(y)),
        ("mul", |x, y| x * y, |x, y| x.wrapping_mul(y)),
        ("div", |x, y| x / (y | 1), |x, y| x.wrapping_div(y | 1)),
        ("rem", |x, y| x % (y | 1), |x, y| x.wrapping_rem(y | 1)),
        ("and", |x, y| x & y, |x, y| x & y),
        ("or", |x, y| x | y, |x, y| x | y),
        ("xor", |x, y| x ^ y, |x, y| x ^ y),
        ("not", |x, _| !x, |x, _| !x),
        ("neg", |x, _| -x, |x, _| x.wrapping_neg()),
        ("abs", |x, _| x.abs(), |x, _| x.wrapping_abs()),
        ("shl", |x, _| x << 5, |x, _| x << 5),
        ("shr", |x, _| x >> 5, |x, _| x >> 5),
        ("shift_right_logical", |x, _| x.shift_right_logical(5), |x, _| (x as u32 >> 5) as i32),
        ("maximum", |x, y| x.maximum(y), i32::max),
        ("minimum", |x, y| x.minimum(y), i32::min),
        ("less", |x, y| x.less(y).cast(Element::I32), |x, y| i32::from(x < y)),
        ("greater_equal", |x, y| x.greater_equal(y).cast(Element::I32), |x, y| i32::from(x >= y)),
        (
            "pred logic",
            |x, y| (x.less(y) & !y.equals(3) | x.greater(9)).cast(Element::I32),
            |x, y| i32::from((x < y) & (y != 3) | (x > 9)),
        ),
        ("trunci", |x, _| x.cast(Element::I8).cast(Element::I32), |x, _| i32::from(x as i8)),
        ("float", |x, _| (x.cast(Element::F32) * 0.5).cast(Element::I32), |x, _| (x as f32 * 0.5) as i32),
    ];
    let context = Context::new();
    let dims = [8, 128];
    let numbers = |seed: i64| -> Vec<i32> {
        (0..1024i64).map(|i| (((i + seed) * 2_654_435_761) >> 7) as i32 >> (i % 29)).collect()
    };
    let (x, y) = (numbers(3), numbers(77));
    for (name, op, reference) in ops {
        let kernel = one_step(&context, (Element::I32, &dims), (Element::I32, &dims), |_, x, y| op(x, y));
        let inputs = [HostTensor::new(&dims, &x), HostTensor::new(&dims, &y)];
        let want: Vec<_> = x.iter().zip(&y).map(|(&x, &y)| f64::from(reference(x, y))).collect();
        assert_close(name, &outcome(run_on(&Machine::default(), &kernel, &inputs)), &want, 0.0);
    }
}

/// Ops that move elements, against index arithmetic on `x[d0, d1]` of sizes [8, 256].
#[test]
fn shape_ops() {
    type Body = for<'a> fn(&'a Builder<'a>, Value<'a>) -> Value<'a>;
    type Case = (&'static str, &'static [usize], Body, fn(&[usize], &dyn Fn(usize, usize) -> f64) -> f64);
    let cases: &[Case] = &[
        ("transpose", &[256, 8], |_, x| x.transpose(&[1, 0]), |i, x| x(i[1], i[0])),
        ("reshape", &[16, 128], |_, x| x.reshape(&[16, 128]), |i, x| x(i[0] / 2, i[0] % 2 * 128 + i[1])),
        ("slice", &[4, 128], |_, x| x.slice(&[2, 64], &[4, 128]), |i, x| x(i[0] + 2, i[1] + 64)),
        ("broadcast", &[8, 256], |_, x| x.slice(&[0, 0], &[8, 1]).broadcast_to(&[8, 256]), |i, x| x(i[0], 0)),
        ("broadcast rows", &[8, 256], |_, x| x.slice(&[3, 0], &[1, 256]).broadcast_to(&[8, 256]), |i, x| x(3, i[1])),
        (
            "concatenate",
            &[8, 512],
            |k, x| k.concatenate(&[x, x + 1.0], 1),
            |i, x| x(i[0], i[1] % 256) + f64::from(i[1] >= 256),
        ),
        (
            "concatenate rows",
            &[16, 256],
            |k, x| k.concatenate(&[x, x * 2.0], 0),
            |i, x| x(i[0] % 8, i[1]) * if i[0] >= 8 { 2.0 } else { 1.0 },
        ),
        ("rotate", &[8, 256], |_, x| x.rotate(3, 1), |i, x| x(i[0], (i[1] + 253) % 256)),
        ("rotate back", &[8, 256], |_, x| x.rotate(-1, 0), |i, x| x((i[0] + 1) % 8, i[1])),
        ("iota", &[8, 256], |k, _| k.iota(&[8, 256], 1).cast(Element::F32), |i, _| i[1] as f64),
        ("sum", &[8, 1], |_, x| x.sum(1), |i, x| (0..256).map(|c| x(i[0], c)).sum()),
        ("sum rows", &[1, 256], |_, x| x.sum(0), |i, x| (0..8).map(|r| x(r, i[1])).sum()),
        ("max", &[8, 1], |_, x| x.max(1), |i, x| (0..256).map(|c| x(i[0], c)).fold(f64::MIN, f64::max)),
        ("min", &[1, 256], |_, x| x.min(0), |i, x| (0..8).map(|r| x(r, i[1])).fold(f64::MAX, f64::min)),
        (
            "sum_all",
            &[8, 128],
            |k, x| k.zeros(Element::F32, &[8, 128]) + x.sum_all(),
            |_, x| (0..2048).map(|at| x(at / 256, at % 256)).sum(),
        ),
        (
            "max_all",
            &[8, 128],
            |k, x| k.zeros(Element::F32, &[8, 128]) + x.max_all(),
            |_, x| (0..2048).map(|at| x(at / 256, at % 256)).fold(f64::MIN, f64::max),
        ),
        ("bitcast", &[8, 256], |_, x| x.bitcast(Element::I32).bitcast(Element::F32), |i, x| x(i[0], i[1])),
        (
            "packed",
            &[8, 256],
            |k, x| {
                let packed = x.cast(Element::Bf16).bitcast(Element::I32); // [4, 256]: rows 2r (low half) and 2r + 1
                let low = (packed << 16).bitcast(Element::F32);
                let high = (packed & -65536).bitcast(Element::F32);
                k.concatenate(&[low, high], 0)
            },
            |i, x| f64::from(bf16::from_f64(x(if i[0] < 4 { 2 * i[0] } else { 2 * (i[0] - 4) + 1 }, i[1])).to_f32()),
        ),
    ];
    let context = Context::new();
    let dims = [8, 256];
    let x = values(2048, 0.25);
    let input = HostTensor::from_f64(Element::F32, &dims, &x);
    let exact = input.to_f64();
    for (name, out_dims, body, reference) in cases {
        let kernel = one_step(&context, (Element::F32, &dims), (Element::F32, out_dims), |k, x, _| body(k, x));
        let at = |row: usize, column: usize| exact[row * 256 + column];
        let want: Vec<_> = (0..out_dims[0] * out_dims[1])
            .map(|flat| reference(&[flat / out_dims[1], flat % out_dims[1]], &at))
            .collect();
        let got = outcome(run_on(&Machine::default(), &kernel, &[input.clone(), input.clone()]));
        // Sums of 2048 f32 terms of size 2.
        assert_close(name, &got, &want, 2e-4);
    }
}

/// Products in every orientation, with the MXU's rounding.
#[test]
fn matmuls() {
    let context = Context::new();
    let (m, n, k_size) = (16, 128, 256);
    let (a, b) = (values(m * k_size, 0.1), values(k_size * n, 0.7));
    for (element, precision, transposed) in [
        (Element::Bf16, Precision::Default, false),
        (Element::Bf16, Precision::Default, true),
        (Element::F32, Precision::Default, false),
        (Element::F32, Precision::Fp32, true),
    ] {
        let b_dims = if transposed { [n, k_size] } else { [k_size, n] };
        let at_b = |inner: usize, column: usize| if transposed { column * k_size + inner } else { inner * n + column };
        let kernel = build(&context, |k| {
            k.grid([(1, Semantics::Arbitrary)]);
            let x = k.input("x", element, &[m, k_size], Window::whole(&[m, k_size]));
            let y = k.input("y", element, &b_dims, Window::whole(&b_dims));
            let out = k.output("out", Element::F32, &[m, n], Window::whole(&[m, n]));
            let dims = if transposed { DotDims::nt() } else { DotDims::nn() };
            out.store(k.dot_general(x.load(), y.load(), k.splat(Element::F32, &[m, n], 1.0), &dims, precision));
        });
        let inputs = [HostTensor::from_f64(element, &[m, k_size], &a), HostTensor::from_f64(element, &b_dims, &b)];
        // What reaches the MXU: bf16 unless f32 is asked for.
        let rounded = |x: f64| f64::from(bf16::from_f32(x as f32).to_f32());
        let exact = |x: f64| if precision == Precision::Fp32 { x } else { rounded(x) };
        let [a, b] = inputs.each_ref().map(HostTensor::to_f64);
        let want: Vec<f64> = (0..m * n)
            .map(|at| {
                let (row, column) = (at / n, at % n);
                let terms = (0..k_size).map(|inner| exact(a[row * k_size + inner]) * exact(b[at_b(inner, column)]));
                1.0 + terms.sum::<f64>()
            })
            .collect();
        let run = run_on(&Machine::default(), &kernel, &inputs).unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(run.counters.mxu_flops, 2 * (m * n * k_size) as u64);
        // f32 sums of 256 terms of size 4.
        assert_close(&format!("{element} {precision:?}"), &run.outputs[0].to_f64(), &want, 2e-4);
    }
}

#[test]
fn batched_matmul() {
    let context = Context::new();
    let (heads, m, n, k_size) = (3, 8, 128, 128);
    let kernel = build(&context, |k| {
        k.grid([(1, Semantics::Arbitrary)]);
        let x = k.input("x", Element::Bf16, &[heads, m, k_size], Window::whole(&[heads, m, k_size]));
        let y = k.input("y", Element::Bf16, &[heads, n, k_size], Window::whole(&[heads, n, k_size]));
        let out = k.output("out", Element::F32, &[heads, m, n], Window::whole(&[heads, m, n]));
        let dims = DotDims { contract: (vec![2], vec![2]), batch: (vec![0], vec![0]) };
        out.store(k.dot_general(x.load(), y.load(), k.zeros(Element::F32, &[heads, m, n]), &dims, Precision::Default));
    });
    let x = HostTensor::from_f64(Element::Bf16, &[heads, m, k_size], &values(heads * m * k_size, 0.3));
    let y = HostTensor::from_f64(Element::Bf16, &[heads, n, k_size], &values(heads * n * k_size, 0.4));
    let (a, b) = (x.to_f64(), y.to_f64());
    let want: Vec<f64> = (0..heads * m * n)
        .map(|at| {
            let (head, row, column) = (at / (m * n), at / n % m, at % n);
            (0..k_size).map(|i| a[(head * m + row) * k_size + i] * b[(head * n + column) * k_size + i]).sum()
        })
        .collect();
    assert_close("batched", &outcome(run_on(&Machine::default(), &kernel, &[x, y])), &want, 2e-4);
}

/// Strided and masked accesses, packed views, SMEM, loops and branches in one kernel.
#[test]
fn memory_and_control_flow() {
    let context = Context::new();
    let kernel = build(&context, |k| {
        let [step] = k.grid([(2, Semantics::Arbitrary)]);
        let order = k.prefetch("order", Element::I32, &[2]);
        let x = k.input(
            "x",
            Element::Bf16,
            &[32, 128],
            Window::blocks(&[16, 128], |t| (t.prefetch(0).at(t.grid(0)).load(), 0)),
        );
        let out = k.output("out", Element::F32, &[16, 128], Window::blocks(&[8, 128], |t| (t.grid(0), 0)));
        let notes = k.scratch("notes", MemorySpace::Smem, Element::I32, &[2, 2]);
        // The odd rows of x are the high halves of packed pairs.
        let packed = x.bitcast(Element::I32).load();
        out.store((packed & -65536).bitcast(Element::F32));
        // Rows 1 and 5 become three times themselves.
        let rows = out.strided(0, 1, 2, 4);
        rows.store(k.fold_range(0, 2, rows.load(), |_, sum| sum + rows.load()));
        // The first ten lanes become 100 + the number of the block, counted by a loop and kept in SMEM.
        let counted =
            k.while_loop((k.int(0), order.at(step).load()), |(_, left)| left.greater(0), |(n, left)| (n + 1, left - 1));
        notes.at((step, 1)).store(counted.0);
        let number = notes.at((step, 1)).load();
        let number = k.if_else(number.equals(0), || k.int(100), || number + 100);
        let lanes = k.iota(&[8, 128], 1).less(10);
        out.store_masked(number.cast(Element::F32), lanes);
    });
    let x = HostTensor::from_f64(Element::Bf16, &[32, 128], &values(32 * 128, 0.9));
    let exact = x.to_f64();
    let want: Vec<f64> = (0..16 * 128)
        .map(|at| {
            let (row, lane) = (at / 128, at % 128);
            let block = 1 - row / 8; // the order below
            match lane {
                0..10 => 100.0 + block as f64,
                _ => exact[(block * 16 + 2 * (row % 8) + 1) * 128 + lane] * if row % 4 == 1 { 3.0 } else { 1.0 },
            }
        })
        .collect();
    for dma in ORDERS {
        let machine = Machine { dma, ..Machine::default() };
        let run = run_on(&machine, &kernel, &[HostTensor::new(&[2], &[1i32, 0]), x.clone()]);
        assert_close("memory", &outcome(run), &want, 1e-6);
    }
}

/// Blocks that hang over the edge: garbage may be read there, and what is written there is dropped.
#[test]
fn edges_are_garbage_and_dropped() {
    let context = Context::new();
    let kernel = build(&context, |k| {
        let [step] = k.grid([(2, Semantics::Arbitrary)]);
        let x = k.input("x", Element::F32, &[12, 128], Window::blocks(&[8, 128], |t| (t.grid(0), 0)));
        let out = k.output("out", Element::F32, &[12, 128], Window::blocks(&[8, 128], |t| (t.grid(0), 0)));
        let sum = k.output("sum", Element::F32, &[8, 128], Window::whole(&[8, 128]));
        out.store(x.load() * 2.0);
        k.when(step.equals(1), || sum.store(x.load().sum(0).broadcast_to(&[8, 128])));
    });
    let x = HostTensor::from_f64(Element::F32, &[12, 128], &values(12 * 128, 0.0));
    let run = run_on(&Machine::default(), &kernel, std::slice::from_ref(&x)).unwrap_or_else(|fault| panic!("{fault}"));
    let doubled: Vec<f64> = x.to_f64().iter().map(|x| x * 2.0).collect();
    assert_close("inside", &run.outputs[0].to_f64(), &doubled, 0.0);
    assert!(run.outputs[1].to_f64().iter().all(|x| x.is_nan()), "a sum over the edge must show the garbage");
}

/// An output in an input's memory keeps what the kernel does not write.
#[test]
fn aliased_outputs_start_with_the_input() {
    let context = Context::new();
    let kernel = build(&context, |k| {
        k.grid([(1, Semantics::Arbitrary)]);
        k.hbm_input("cache", Element::F32, &[32, 128]);
        let cache = k.hbm_output("cache out", Element::F32, &[32, 128]);
        let row = k.scratch("row", MemorySpace::Vmem, Element::F32, &[8, 128]);
        let semaphore = k.dma_semaphores("semaphore", &[]);
        k.alias(0, 0);
        row.store(7.0);
        k.async_copy(row, cache.slice(0, 8, 8), semaphore).wait();
    });
    let x = HostTensor::from_f64(Element::F32, &[32, 128], &values(32 * 128, 0.0));
    let mut want = x.to_f64();
    want[8 * 128..16 * 128].fill(7.0);
    assert_close("cache", &outcome(run_on(&Machine::default(), &kernel, &[x])), &want, 0.0);
}

/// Operands of the small kernels below: `x` f32[32,128] in HBM, `out` f32[8,128] in HBM, two buffers, two semaphores.
struct Operands<'a> {
    x: Ref<'a>,
    out: Ref<'a>,
    buffer: Ref<'a>,
    semaphores: Ref<'a>,
}

fn copying<'c>(
    context: &'c Context,
    steps: &[(usize, Semantics)],
    body: impl for<'a> FnOnce(&'a Builder<'a>, &[Value<'a>], Operands<'a>),
) -> Kernel<'c> {
    build(context, |k| {
        let step = k.grid_of(steps);
        let x = k.hbm_input("x", Element::F32, &[32, 128]);
        let out = k.hbm_output("out", Element::F32, &[8, 128]);
        let buffer = k.scratch("buffer", MemorySpace::Vmem, Element::F32, &[2, 8, 128]);
        let semaphores = k.dma_semaphores("semaphores", &[2]);
        body(k, &step, Operands { x, out, buffer, semaphores });
    })
}

/// Faults of kernels that were built here name the line that built the op. Every fault is provoked in `cases/`.
#[test]
fn faults_name_the_line_that_built_the_op() {
    use FaultKind::*;
    type Body = for<'a> fn(&'a Builder<'a>, &[Value<'a>], Operands<'a>);
    const ONE: &[(usize, Semantics)] = &[(1, Semantics::Arbitrary)];
    const TWO_PARALLEL: &[(usize, Semantics)] = &[(2, Semantics::Parallel)];
    // Name, grid, kernel, and what the fault must say: kind, op, buffer.
    type Case = (&'static str, &'static [(usize, Semantics)], Body, Option<(FaultKind, &'static str, &'static str)>);
    let cases: &[Case] = &[
        (
            "the wait comes after the load",
            ONE,
            |k, _, o| {
                let copy = k.async_copy(o.x.slice(0, 8, 8), o.buffer.at(0), o.semaphores.at(0));
                o.buffer.at(1).store(o.buffer.at(0).load() * 2.0);
                copy.wait();
                k.async_copy(o.buffer.at(1), o.out, o.semaphores.at(1)).wait();
            },
            Some((ReadInFlight, "vector.load", "buffer")),
        ),
        (
            "a counting semaphore is left over",
            ONE,
            |k, _, o| {
                let extra = k.semaphores("extra", &[]);
                k.semaphore_signal(&extra, 3);
                k.semaphore_wait(&extra, 2);
                o.buffer.at(1).store(1.0);
                k.async_copy(o.buffer.at(1), o.out, o.semaphores.at(1)).wait();
            },
            Some((SemaphoreUnbalanced, "tpu.sem_signal", "extra")),
        ),
        (
            "parallel steps write the same output",
            TWO_PARALLEL,
            |k, _, o| {
                o.buffer.at(1).store(1.0);
                k.async_copy(o.buffer.at(1), o.out, o.semaphores.at(1)).wait();
            },
            Some((ParallelOverlap, "tpu.enqueue_dma", "out")),
        ),
        (
            "a false promise",
            ONE,
            |k, step, o| {
                o.buffer.at(1).store(1.0);
                let start = (step[0] + 4).multiple_of(8);
                k.async_copy(o.x.slice(0, start, 8), o.buffer.at(0), o.semaphores.at(0)).wait();
            },
            Some((BrokenAssumption, "tpu.assume_multiple", "")),
        ),
        (
            "a loop without end",
            ONE,
            |k, _, o| {
                let i = k.while_loop(k.int(1), |i| i.greater(0), |i| i * 1);
                o.buffer.at(0).slice(0, i, 1).store(0.0);
            },
            Some((Runaway, "", "")),
        ),
    ];
    let context = Context::new();
    let x = HostTensor::from_f64(Element::F32, &[32, 128], &values(32 * 128, 0.0));
    for (name, grid, body, expected) in cases {
        let kernel = copying(&context, grid, body);
        for dma in ORDERS {
            let machine = Machine { dma, max_ops: 10_000, ..Machine::default() };
            let fault = run_on(&machine, &kernel, std::slice::from_ref(&x)).err();
            let Some((kind, op, buffer)) = *expected else {
                assert_eq!(fault, None, "{name} ({dma:?})");
                continue;
            };
            let fault = fault.unwrap_or_else(|| panic!("{name}: nothing reported ({dma:?})"));
            assert_eq!(fault.kind, kind, "{name}: {fault}");
            assert!(op.is_empty() || fault.op == op, "{name}: {fault}");
            assert_eq!(fault.buffer.as_deref().unwrap_or_default(), buffer, "{name}: {fault}");
            let located = fault.location.starts_with("ir/tests/all/tile_machine.rs:") || fault.op == "pipeline";
            assert!(located, "{name}: {fault}");
            let about_a_copy = matches!(kind, ReadInFlight | OverwriteInFlight);
            assert!(
                !about_a_copy || fault.dma.as_deref().is_some_and(|dma| dma.contains("started at ir/tests")),
                "{fault}"
            );
        }
    }
}

#[test]
fn a_fault_reads_like_this() {
    let kernel_context = Context::new();
    let kernel = copying(&kernel_context, &[(3, Semantics::Arbitrary)], |k, step, o| {
        k.when(step[0].equals(2), || {
            let copy = k.async_copy(o.x.slice(0, 8, 8), o.buffer.at(1), o.semaphores.at(0));
            o.buffer.at(0).store(o.buffer.at(1).slice(0, 4, 4).load().sum(0).broadcast_to(&[8, 128]));
            copy.wait();
        });
    });
    let x = HostTensor::zeros(Element::F32, &[32, 128]);
    let fault = run_on(&Machine::default(), &kernel, &[x]).expect_err("a race").to_string();
    let without_lines =
        fault.split("tile_machine.rs:").map(|part| part.trim_start_matches(|c: char| c.is_ascii_digit()));
    insta::assert_snapshot!(without_lines.collect::<Vec<_>>().join("tile_machine.rs:LINE"), @"kernel `k`: read of a buffer whose DMA is in flight: vector.load at ir/tests/all/tile_machine.rs:LINE, buffer `buffer` at [1, 4, 0], grid step [2], DMA from `x` to `buffer` started at ir/tests/all/tile_machine.rs:LINE in grid step [2]");
}

/// Programs are run from other threads, a PJRT custom call's for instance.
#[test]
fn programs_are_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Program>();
    shared::<Fault>();
}
