//! Every op that the StableHLO builder emits, run on the CPU plugin against numbers from plain Rust or worked out by
//! hand. A table of cases; each is compiled from the module's text *and* from its bytecode, and both must agree with
//! what is expected.

use std::collections::BTreeSet;

use half::{bf16, f16};
use pagoda_engine::pjrt::{
    self, Arg, Buffer, Client, Plugin, PluginChoice,
    custom_call::{CustomCall as Handler, Frame, register},
};
use pagoda_ir::{
    Context, Element, HostTensor, Result, TensorType,
    stablehlo::{
        BackendConfig, Branch, Builder, ConfigValue, CustomCall, Direction, DotDims, GatherDims, Module, OPS,
        OutputOperandAlias, Precision, ReplicaGroups, ScatterDims, Tensor, Window,
    },
};

type Body = for<'c, 'a> fn(&Builder<'c, 'a>, &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>>;

/// A function `main`, what each replica gives it, and what each must get.
struct Case {
    name: String,
    inputs: Vec<Vec<HostTensor>>,
    body: Body,
    expected: Vec<Vec<HostTensor>>,
    /// Allowed |difference| / |expected|; 0 asks for the same bytes.
    tolerance: f64,
}

/// XLA's CPU approximations of transcendental functions in f32 stay within a few units in the last place (2^-23 =
/// 1.2e-7, relative) of the true value: 8 of them are allowed.
const TRANSCENDENTAL: f64 = 1e-6;

fn case(name: &str, inputs: &[HostTensor], body: Body, expected: &[HostTensor]) -> Case {
    replicated(name, vec![inputs.to_vec()], body, vec![expected.to_vec()])
}

fn replicated(name: &str, inputs: Vec<Vec<HostTensor>>, body: Body, expected: Vec<Vec<HostTensor>>) -> Case {
    Case { name: name.to_owned(), inputs, body, expected, tolerance: 0.0 }
}

impl Case {
    fn within(self, tolerance: f64) -> Self {
        Self { tolerance, ..self }
    }

    fn module<'c>(&self, context: &'c Context) -> Module<'c> {
        let module = match self.inputs.len() {
            1 => Module::new(context, "case"),
            replicas => Module::replicated(context, "case", replicas),
        };
        let types: Vec<_> = self.inputs[0].iter().map(|input| TensorType::new(input.element(), input.dims())).collect();
        let body = self.body;
        module.function("main", &types, |b, args| body(b, args)).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        module.verify().unwrap_or_else(|error| panic!("{}: {error}", self.name));
        module
    }

    /// Runs the case in both forms; says what is wrong.
    fn run(&self) -> std::result::Result<(), String> {
        let context = Context::new();
        let module = self.module(&context);
        for (form, program) in [("text", module.text().into_bytes()), ("bytecode", module.bytecode())] {
            execute(&program, &self.inputs)
                .map_err(|error| error.to_string())
                .and_then(|outputs| self.check(&outputs))
                .map_err(|error| format!("{} ({form}): {error}\n{}", self.name, module.text()))?;
        }
        Ok(())
    }

    fn check(&self, outputs: &[Vec<HostTensor>]) -> std::result::Result<(), String> {
        let counts = |lists: &[Vec<HostTensor>]| lists.iter().map(Vec::len).collect::<Vec<_>>();
        if counts(outputs) != counts(&self.expected) {
            return Err(format!("{:?} results, not {:?}", counts(outputs), counts(&self.expected)));
        }
        for (index, (output, expected)) in outputs.concat().iter().zip(self.expected.concat()).enumerate() {
            let shaped = output.element() == expected.element() && output.dims() == expected.dims();
            let near = |(value, wanted): (&f64, &f64)| {
                let distance = (value - wanted).abs();
                value == wanted || (value.is_nan() && wanted.is_nan()) || distance <= self.tolerance * wanted.abs()
            };
            let good = match self.tolerance {
                0.0 => *output == expected,
                _ => shaped && output.to_f64().iter().zip(&expected.to_f64()).all(near),
            };
            if !good {
                return Err(format!("result {index} is {output:?}, not {expected:?} (tolerance {})", self.tolerance));
            }
        }
        Ok(())
    }
}

fn plugin() -> Plugin {
    Plugin::load(&PluginChoice::parse("cpu").unwrap()).expect("no CPU plugin: run `make setup`")
}

/// Runs a program on the client of this thread, which has four devices.
fn execute(program: &[u8], inputs: &[Vec<HostTensor>]) -> pjrt::Result<Vec<Vec<HostTensor>>> {
    thread_local!(static CLIENT: Client = plugin().client(4).expect("a client of four devices"));
    CLIENT.with(|client| {
        let program = client.compile(program, inputs.len())?;
        let upload = |(replica, inputs): (usize, &Vec<HostTensor>)| {
            inputs.iter().map(|input| Ok(Arg::Donate(client.upload(input, replica)?))).collect()
        };
        let arguments = inputs.iter().enumerate().map(upload).collect::<pjrt::Result<_>>()?;
        let results = program.run_replicated(arguments)?;
        results.iter().map(|list| list.iter().map(Buffer::download).collect()).collect()
    })
}

fn f(dims: &[usize], values: &[f64]) -> HostTensor {
    HostTensor::from_f64(Element::F32, dims, values)
}

fn i(dims: &[usize], values: &[i32]) -> HostTensor {
    HostTensor::new(dims, values)
}

fn p(dims: &[usize], values: &[bool]) -> HostTensor {
    let bytes: Vec<u8> = values.iter().map(|&value| u8::from(value)).collect();
    HostTensor::from_bytes(Element::Pred, dims, &bytes)
}

/// `0.0, 1.0, 2.0, ...`
fn counting(dims: &[usize]) -> HostTensor {
    f(dims, &(0..dims.iter().product()).map(|index| index as f64).collect::<Vec<_>>())
}

const NAN: f64 = f64::NAN;
const INF: f64 = f64::INFINITY;

fn unary() -> Vec<Case> {
    let anywhere = [-87.0, -2.5, -1.0, -0.5, -1e-4, 0.0, 1e-4, 0.3, 1.0, 2.5, 7.0, 20.0];
    let positive = [1e-30, 1e-3, 0.25, 0.5, 1.0, 2.0, 10.0, 12345.0];
    let halves = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4, -2.6, 1e10];
    macro_rules! float {
        ($($op:ident($inputs:expr) = $reference:expr;)*) => {
            vec![$({
                // The reference takes the inputs as f32 has them.
                let input = f(&[$inputs.len()], &$inputs);
                let reference: fn(f64) -> f64 = $reference;
                let expected: Vec<f64> = input.to_f64().into_iter().map(reference).collect();
                case(stringify!($op), &[input], |b, x| Ok(vec![b.$op(x[0])?]), &[f(&[$inputs.len()], &expected)])
                    .within(TRANSCENDENTAL)
            }),*]
        };
    }
    let mut cases = float! {
        negate(anywhere) = |x| -x;
        abs(anywhere) = f64::abs;
        sign(anywhere) = |x| if x == 0.0 { 0.0 } else { x.signum() };
        exponential(anywhere) = f64::exp;
        exponential_minus_one(anywhere) = f64::exp_m1;
        log(positive) = f64::ln;
        log_plus_one(positive) = f64::ln_1p;
        logistic(anywhere) = |x| 1.0 / (1.0 + (-x).exp());
        tanh(anywhere) = f64::tanh;
        tan(anywhere) = f64::tan;
        sine(anywhere) = f64::sin;
        cosine(anywhere) = f64::cos;
        sqrt(positive) = f64::sqrt;
        rsqrt([1e-3, 0.25, 0.5, 1.0, 2.0, 10.0, 12345.0]) = |x| 1.0 / x.sqrt();
        cbrt(anywhere) = f64::cbrt;
        floor(halves) = f64::floor;
        ceil(halves) = f64::ceil;
        round_nearest_even(halves) = f64::round_ties_even;
        round_nearest_afz(halves) = f64::round;
    };
    let integers = [i32::MIN, -7, -1, 0, 1, 2, 255, i32::MAX];
    let mapped = |map: fn(i32) -> i32| i(&[8], &integers.map(map));
    let (x, flags) = (|| i(&[8], &integers), p(&[2], &[true, false]));
    cases.extend([
        case("negate i32", &[x()], |b, x| Ok(vec![b.negate(x[0])?]), &[mapped(i32::wrapping_neg)]),
        case("abs i32", &[x()], |b, x| Ok(vec![b.abs(x[0])?]), &[mapped(i32::wrapping_abs)]),
        case("sign i32", &[x()], |b, x| Ok(vec![b.sign(x[0])?]), &[mapped(i32::signum)]),
        case("not i32", &[x()], |b, x| Ok(vec![b.not(x[0])?]), &[mapped(|x| !x)]),
        case("not pred", &[flags], |b, x| Ok(vec![b.not(x[0])?]), &[p(&[2], &[false, true])]),
        case("popcnt", &[x()], |b, x| Ok(vec![b.popcnt(x[0])?]), &[mapped(|x| x.count_ones() as i32)]),
        case(
            "count_leading_zeros",
            &[x()],
            |b, x| Ok(vec![b.count_leading_zeros(x[0])?]),
            &[mapped(|x| x.leading_zeros() as i32)],
        ),
        case(
            "is_finite",
            &[f(&[4], &[1.0, INF, -INF, NAN])],
            |b, x| Ok(vec![b.is_finite(x[0])?]),
            &[p(&[4], &[true, false, false, false])],
        ),
        case(
            "exponential bf16",
            &[HostTensor::from_f64(Element::Bf16, &[3], &[-2.0, 0.5, 3.0])],
            |b, x| Ok(vec![b.exponential(x[0])?]),
            &[HostTensor::from_f64(Element::Bf16, &[3], &[-2.0, 0.5, 3.0].map(f64::exp))],
        )
        .within(1.0 / 256.0), // half a unit in the last of bf16's 8 significant bits, at most
        case(
            "exponential f64",
            &[HostTensor::new(&[3], &[-2.0f64, 0.5, 3.0])],
            |b, x| Ok(vec![b.exponential(x[0])?]),
            &[HostTensor::new(&[3], &[-2.0f64, 0.5, 3.0].map(f64::exp))],
        )
        .within(1e-14),
        // bf16 keeps 8 exponent and 7 mantissa bits: 1 + 2^-8 is half-way and goes to even.
        case(
            "reduce_precision",
            &[f(&[4], &[1.00390625, 1.01171875, -3.140625, 1e38])],
            |b, x| Ok(vec![b.reduce_precision(x[0], 8, 7)?]),
            &[f(&[4], &[1.00390625, 1.01171875, -3.140625, 1e38].map(|x| bf16::from_f64(x).to_f64()))],
        ),
    ]);
    cases
}

fn binary() -> Vec<Case> {
    let ordered = [(7.5, 2.0), (-7.5, 2.0), (7.5, -2.0), (0.0, 3.0), (1e20, 1e19), (2.0, 0.5), (INF, 1.0), (-INF, INF)];
    let any = [&ordered[..], &[(1.0, NAN), (NAN, 1.0)]].concat();
    let powers = [(2.0, 0.5), (2.0, -3.0), (0.3, 7.0), (-2.0, 3.0), (5.0, 0.0)];
    macro_rules! float {
        ($($op:ident($pairs:expr) = $reference:expr;)*) => {
            vec![$({
                let (xs, ys): (Vec<f64>, Vec<f64>) = $pairs.iter().copied().unzip();
                let inputs = [f(&[xs.len()], &xs), f(&[ys.len()], &ys)];
                let reference: fn((f64, f64)) -> f64 = $reference;
                let pairs = inputs[0].to_f64().into_iter().zip(inputs[1].to_f64());
                let expected = f(&[xs.len()], &pairs.map(reference).collect::<Vec<_>>());
                case(stringify!($op), &inputs, |b, x| Ok(vec![b.$op(x[0], x[1])?]), &[expected]).within(TRANSCENDENTAL)
            }),*]
        };
    }
    macro_rules! integer {
        ($($op:ident: $type:ty, $pairs:expr, $reference:expr;)*) => {
            vec![$({
                let pairs: Vec<($type, $type)> = $pairs.to_vec();
                let reference: fn(($type, $type)) -> $type = $reference;
                let (xs, ys): (Vec<$type>, Vec<$type>) = pairs.iter().copied().unzip();
                let inputs = [HostTensor::new(&[xs.len()], &xs), HostTensor::new(&[ys.len()], &ys)];
                let expected: Vec<$type> = pairs.into_iter().map(reference).collect();
                let name = format!("{} {}", stringify!($op), stringify!($type));
                case(&name, &inputs, |b, x| Ok(vec![b.$op(x[0], x[1])?]), &[HostTensor::new(&[expected.len()], &expected)])
            }),*]
        };
    }
    let mut cases = float! {
        add(any) = |(x, y)| x + y;
        subtract(any) = |(x, y)| x - y;
        multiply(any) = |(x, y)| x * y;
        divide(any) = |(x, y)| x / y;
        remainder(any) = |(x, y)| x % y;
        atan2(any) = |(x, y)| x.atan2(y);
        power(powers) = |(x, y)| x.powf(y);
        // Without NaN: StableHLO propagates it, this plugin returns the first operand of an unordered pair.
        maximum(ordered) = |(x, y)| x.max(y);
        minimum(ordered) = |(x, y)| x.min(y);
    };
    let signed = [(7, 2), (-7, 2), (7, -2), (i32::MAX, 3), (0, 5), (12, 10)];
    let shifts = [(-16, 2), (5, 31), (-1, 32), (1 << 30, 1), (i32::MIN, 4)];
    cases.extend(integer! {
        add: i32, signed, |(x, y)| x.wrapping_add(y);
        subtract: i32, signed, |(x, y)| x.wrapping_sub(y);
        multiply: i32, signed, |(x, y)| x.wrapping_mul(y);
        divide: i32, signed, |(x, y)| x / y;
        divide: u32, [(u32::MAX, 2), (7, 8)], |(x, y)| x / y;
        remainder: i32, signed, |(x, y)| x % y;
        maximum: i32, signed, |(x, y)| x.max(y);
        maximum: u8, [(200, 100), (3, 255)], |(x, y)| x.max(y);
        minimum: i32, signed, |(x, y)| x.min(y);
        power: i32, [(3, 4), (-2, 3), (7, 0)], |(x, y)| x.pow(y as u32);
        and: i32, signed, |(x, y)| x & y;
        or: i32, signed, |(x, y)| x | y;
        xor: i32, signed, |(x, y)| x ^ y;
        shift_left: i32, shifts, |(x, y)| x.checked_shl(y as u32).unwrap_or(0);
        shift_right_arithmetic: i32, shifts, |(x, y)| x.checked_shr(y as u32).unwrap_or(x >> 31);
        shift_right_logical: i32, shifts, |(x, y)| (x as u32).checked_shr(y as u32).unwrap_or(0) as i32;
    });
    let table = [p(&[4], &[false, false, true, true]), p(&[4], &[false, true, false, true])];
    cases.push(case(
        "pred: add, multiply, maximum, minimum, and, or, xor",
        &table,
        |b, x| {
            let (x, y) = (x[0], x[1]);
            Ok(vec![
                b.add(x, y)?,
                b.multiply(x, y)?,
                b.maximum(x, y)?,
                b.minimum(x, y)?,
                b.and(x, y)?,
                b.or(x, y)?,
                b.xor(x, y)?,
            ])
        },
        &[
            p(&[4], &[false, true, true, true]),
            p(&[4], &[false, false, false, true]),
            p(&[4], &[false, true, true, true]),
            p(&[4], &[false, false, false, true]),
            p(&[4], &[false, false, false, true]),
            p(&[4], &[false, true, true, true]),
            p(&[4], &[false, true, true, false]),
        ],
    ));
    cases
}

fn all_comparisons<'c, 'a>(b: &Builder<'c, 'a>, x: &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>> {
    use Direction::{Eq, Ge, Gt, Le, Lt, Ne};
    [Eq, Ne, Lt, Le, Gt, Ge].into_iter().map(|direction| b.compare(x[0], direction, x[1])).collect()
}

fn comparisons_and_choices() -> Vec<Case> {
    fn expected<T: PartialOrd>(pairs: &[(T, T)]) -> Vec<HostTensor> {
        let relations: [fn(&T, &T) -> bool; 6] = [T::eq, T::ne, T::lt, T::le, T::gt, T::ge];
        let column = |relation: fn(&T, &T) -> bool| pairs.iter().map(|(x, y)| relation(x, y)).collect::<Vec<_>>();
        relations.iter().map(|&relation| p(&[pairs.len()], &column(relation))).collect()
    }
    let floats = [(1.0, 2.0), (2.0, 1.0), (0.0, -0.0), (NAN, NAN), (NAN, 1.0), (-INF, INF)];
    let signed = [(-1, 1), (1, -1), (5, 5), (i32::MIN, i32::MAX)];
    let unsigned: [(u8, u8); 3] = [(200, 100), (100, 200), (128, 128)];
    let flags = [(false, true), (true, false), (true, true)];
    let sides = |pairs: &[(f64, f64)]| -> [Vec<f64>; 2] {
        [pairs.iter().map(|p| p.0).collect(), pairs.iter().map(|p| p.1).collect()]
    };
    let [xs, ys] = sides(&floats);
    vec![
        case("compare f32", &[f(&[6], &xs), f(&[6], &ys)], all_comparisons, &expected(&floats)),
        case(
            "compare i32",
            &[i(&[4], &signed.map(|p| p.0)), i(&[4], &signed.map(|p| p.1))],
            all_comparisons,
            &expected(&signed),
        ),
        case(
            "compare u8",
            &[HostTensor::new(&[3], &unsigned.map(|p| p.0)), HostTensor::new(&[3], &unsigned.map(|p| p.1))],
            all_comparisons,
            &expected(&unsigned),
        ),
        case(
            "compare pred",
            &[p(&[3], &flags.map(|p| p.0)), p(&[3], &flags.map(|p| p.1))],
            all_comparisons,
            &expected(&flags),
        ),
        case(
            "select, by element and by scalar",
            &[p(&[2], &[true, false]), p(&[], &[false]), i(&[2], &[1, 2]), i(&[2], &[3, 4])],
            |b, x| Ok(vec![b.select(x[0], x[2], x[3])?, b.select(x[1], x[2], x[3])?]),
            &[i(&[2], &[1, 4]), i(&[2], &[3, 4])],
        ),
        case(
            "clamp, by element and by scalar",
            &[i(&[3], &[-5, 3, 9]), i(&[3], &[0, 4, 0]), i(&[3], &[1, 5, 8]), i(&[], &[0]), i(&[], &[4])],
            |b, x| Ok(vec![b.clamp(x[1], x[0], x[2])?, b.clamp(x[3], x[0], x[4])?]),
            &[i(&[3], &[0, 4, 8]), i(&[3], &[0, 3, 4])],
        ),
    ]
}

fn conversions_and_constants() -> Vec<Case> {
    let floats = [-2.75, 0.0, 1.00390625, 3.5];
    let mut cases = vec![
        case(
            "convert from f32",
            &[f(&[4], &floats)],
            |b, x| {
                use Element::{Bf16, F16, F64, I32, Pred};
                [I32, Pred, Bf16, F16, F64].into_iter().map(|element| b.convert(x[0], element)).collect()
            },
            &[
                i(&[4], &[-2, 0, 1, 3]),
                p(&[4], &[true, false, true, true]),
                HostTensor::new(&[4], &floats.map(bf16::from_f64)),
                HostTensor::new(&[4], &floats.map(f16::from_f64)),
                HostTensor::new(&[4], &floats),
            ],
        ),
        case(
            "convert to f32",
            &[HostTensor::new(&[2], &[bf16::from_f64(-1.5), bf16::INFINITY]), HostTensor::new(&[2], &[255u8, 1])],
            |b, x| Ok(vec![b.convert(x[0], Element::F32)?, b.convert(x[1], Element::F32)?]),
            &[f(&[2], &[-1.5, INF]), f(&[2], &[255.0, 1.0])],
        ),
        case(
            "bitcast_convert to the same, a narrower and a wider type",
            &[f(&[2], &[1.0, -2.0]), HostTensor::new(&[1, 4], &[1u8, 2, 3, 4])],
            |b, x| {
                Ok(vec![
                    b.bitcast_convert(x[0], Element::U32)?,
                    b.bitcast_convert(x[0], Element::U8)?,
                    b.bitcast_convert(x[1], Element::U32)?,
                ])
            },
            &[
                HostTensor::new(&[2], &[1f32.to_bits(), (-2f32).to_bits()]),
                HostTensor::new(&[2, 4], &[1f32.to_le_bytes(), (-2f32).to_le_bytes()].concat()),
                HostTensor::new(&[1], &[u32::from_le_bytes([1, 2, 3, 4])]),
            ],
        ),
        case(
            "constant: large, empty, scalar, extreme",
            &[],
            |b, _| {
                Ok(vec![
                    b.constant(&counting(&[50, 30]))?,
                    b.constant(&HostTensor::zeros(Element::Bf16, &[0, 3]))?,
                    b.splat(Element::F16, &[3, 0], 1.0)?,
                    b.scalar(Element::Bf16, 1.00390625)?,
                    b.scalar(Element::F32, -INF)?,
                    b.scalar(Element::I64, -(2f64.powi(63)))?,
                    b.scalar(Element::U64, 2f64.powi(63))?,
                ])
            },
            &[
                counting(&[50, 30]),
                HostTensor::zeros(Element::Bf16, &[0, 3]),
                HostTensor::zeros(Element::F16, &[3, 0]),
                HostTensor::scalar(bf16::from_f64(1.00390625)),
                f(&[], &[-INF]),
                HostTensor::scalar(i64::MIN),
                HostTensor::scalar(1u64 << 63),
            ],
        ),
    ];
    // Every element type as an array and as a splat; 11 elements, so that packed bits do not fill whole bytes.
    fn every_type<'c, 'a>(b: &Builder<'c, 'a>, _: &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>> {
        let arrays = Element::ALL.into_iter().map(|element| b.constant(&pattern(element)));
        let splats = Element::ALL.into_iter().map(|element| b.splat(element, &[2, 3], 1.0));
        arrays.chain(splats).collect()
    }
    fn pattern(element: Element) -> HostTensor {
        let bytes: Vec<u8> = (0..11 * element.bytes()).map(|index| u8::from(index % 3 == 0)).collect();
        HostTensor::from_bytes(element, &[11], &bytes)
    }
    fn ones(element: Element) -> HostTensor {
        let one: Vec<u8> = match element {
            Element::F8E4M3Fn => vec![0x38],
            Element::F8E4M3B11Fnuz => vec![0x58],
            Element::F8E5M2 => vec![0x3c],
            Element::F8E8M0Fnu => vec![0x7f],
            Element::Bf16 => bf16::ONE.to_le_bytes().to_vec(),
            Element::F16 => f16::ONE.to_le_bytes().to_vec(),
            Element::F32 => 1f32.to_le_bytes().to_vec(),
            Element::F64 => 1f64.to_le_bytes().to_vec(),
            integer => 1u64.to_le_bytes()[..integer.bytes()].to_vec(),
        };
        HostTensor::from_bytes(element, &[2, 3], &one.repeat(6))
    }
    let expected: Vec<_> = Element::ALL.into_iter().map(pattern).chain(Element::ALL.into_iter().map(ones)).collect();
    cases.push(case("constant of every type", &[], every_type, &expected));
    cases
}

fn shapes() -> Vec<Case> {
    vec![
        case(
            "broadcast_in_dim",
            &[f(&[3], &[1.0, 2.0, 3.0]), f(&[2, 1], &[4.0, 5.0]), f(&[], &[6.0])],
            |b, x| {
                Ok(vec![
                    b.broadcast_in_dim(x[0], &[2, 3], &[1])?,
                    b.broadcast_in_dim(x[1], &[2, 2], &[0, 1])?,
                    b.broadcast_in_dim(x[1], &[1, 2], &[1, 0])?,
                    b.broadcast_to(x[2], &[2])?,
                ])
            },
            &[
                f(&[2, 3], &[1.0, 2.0, 3.0, 1.0, 2.0, 3.0]),
                f(&[2, 2], &[4.0, 4.0, 5.0, 5.0]),
                f(&[1, 2], &[4.0, 5.0]),
                f(&[2], &[6.0, 6.0]),
            ],
        ),
        case(
            "reshape",
            &[counting(&[2, 3])],
            |b, x| Ok(vec![b.reshape(x[0], &[3, 1, 2])?, b.reshape(x[0], &[6])?]),
            &[counting(&[3, 1, 2]), counting(&[6])],
        ),
        case(
            "transpose",
            &[counting(&[2, 3]), counting(&[2, 2, 2])],
            |b, x| Ok(vec![b.transpose(x[0], &[1, 0])?, b.transpose(x[1], &[2, 0, 1])?]),
            &[f(&[3, 2], &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]), f(&[2, 2, 2], &[0.0, 2.0, 4.0, 6.0, 1.0, 3.0, 5.0, 7.0])],
        ),
        case(
            "slice",
            &[counting(&[3, 5])],
            |b, x| Ok(vec![b.slice(x[0], &[1, 0], &[3, 5], &[1, 2])?, b.slice_in_dim(x[0], 1, 2, 0)?]),
            &[f(&[2, 3], &[5.0, 7.0, 9.0, 10.0, 12.0, 14.0]), f(&[1, 5], &[5.0, 6.0, 7.0, 8.0, 9.0])],
        ),
        case(
            "pad, also between elements and cutting off",
            &[f(&[3], &[1.0, 2.0, 3.0]), f(&[], &[9.0])],
            |b, x| Ok(vec![b.pad(x[0], x[1], &[1], &[2], &[1])?, b.pad(x[0], x[1], &[-1], &[1], &[0])?]),
            &[f(&[8], &[9.0, 1.0, 9.0, 2.0, 9.0, 3.0, 9.0, 9.0]), f(&[3], &[2.0, 3.0, 9.0])],
        ),
        case(
            "concatenate",
            &[f(&[2, 1], &[1.0, 2.0]), f(&[2, 2], &[3.0, 4.0, 5.0, 6.0])],
            |b, x| Ok(vec![b.concatenate(&[x[0], x[1], x[0]], 1)?]),
            &[f(&[2, 4], &[1.0, 3.0, 4.0, 1.0, 2.0, 5.0, 6.0, 2.0])],
        ),
        case(
            "reverse",
            &[counting(&[2, 3])],
            |b, x| Ok(vec![b.reverse(x[0], &[1])?, b.reverse(x[0], &[0, 1])?]),
            &[f(&[2, 3], &[2.0, 1.0, 0.0, 5.0, 4.0, 3.0]), f(&[2, 3], &[5.0, 4.0, 3.0, 2.0, 1.0, 0.0])],
        ),
        case(
            "iota",
            &[],
            |b, _| Ok(vec![b.iota(Element::I32, &[2, 3], 1)?, b.iota(Element::F32, &[2, 3], 0)?]),
            &[i(&[2, 3], &[0, 1, 2, 0, 1, 2]), f(&[2, 3], &[0.0, 0.0, 0.0, 1.0, 1.0, 1.0])],
        ),
        // The second start lies outside and is moved to the last place where the part fits.
        case(
            "dynamic_slice",
            &[counting(&[3, 4]), i(&[], &[1]), i(&[], &[7])],
            |b, x| Ok(vec![b.dynamic_slice(x[0], &[x[1], x[2]], &[1, 2])?]),
            &[f(&[1, 2], &[6.0, 7.0])],
        ),
        case(
            "dynamic_update_slice",
            &[counting(&[2, 3]), f(&[1, 2], &[-1.0, -2.0]), i(&[], &[1]), i(&[], &[9])],
            |b, x| Ok(vec![b.dynamic_update_slice(x[0], x[1], &[x[2], x[3]])?]),
            &[f(&[2, 3], &[0.0, 1.0, 2.0, 3.0, -1.0, -2.0])],
        ),
    ]
}

fn contractions() -> Vec<Case> {
    // [2, 3, 4] x [2, 4, 5] in integers small enough for every type to be exact.
    let (lhs, rhs): (Vec<i64>, Vec<i64>) =
        ((0..24).map(|v| v % 7 - 3).collect(), (0..40).map(|v| v * 5 % 11 - 5).collect());
    let mut product = vec![0i64; 2 * 3 * 5];
    for (batch, row, column, inner) in
        (0..2 * 3 * 5 * 4).map(|index| (index / 60, index / 20 % 3, index / 4 % 5, index % 4))
    {
        product[(batch * 3 + row) * 5 + column] +=
            lhs[(batch * 3 + row) * 4 + inner] * rhs[(batch * 4 + inner) * 5 + column];
    }
    let float = |values: &[i64]| values.iter().map(|&value| value as f64).collect::<Vec<_>>();
    let typed = |element: Element| {
        [
            HostTensor::from_f64(element, &[2, 3, 4], &float(&lhs)),
            HostTensor::from_f64(element, &[2, 4, 5], &float(&rhs)),
        ]
    };
    let bytes = |values: &[i64]| values.iter().map(|&value| value as i8).collect::<Vec<_>>();
    let expected = [f(&[2, 3, 5], &float(&product))];
    let integers: Vec<i32> = product.iter().map(|&value| value as i32).collect();
    let sum: i64 = lhs.iter().map(|value| value * value).sum();
    const BATCHED: DotDims = DotDims { batch: (&[0], &[0]), contract: (&[2], &[1]) };
    vec![
        case(
            "dot_general f32",
            &typed(Element::F32),
            |b, x| Ok(vec![b.dot_general(x[0], x[1], BATCHED, Element::F32)?]),
            &expected,
        ),
        case(
            "dot_general f32, highest precision",
            &typed(Element::F32),
            |b, x| Ok(vec![b.dot_general_with(x[0], x[1], BATCHED, Element::F32, Precision::Highest)?]),
            &expected,
        ),
        case(
            "dot_general bf16 into f32",
            &typed(Element::Bf16),
            |b, x| Ok(vec![b.dot_general(x[0], x[1], BATCHED, Element::F32)?]),
            &expected,
        ),
        case(
            "dot_general i8 into i32",
            &[HostTensor::new(&[2, 3, 4], &bytes(&lhs)), HostTensor::new(&[2, 4, 5], &bytes(&rhs))],
            |b, x| Ok(vec![b.dot_general(x[0], x[1], BATCHED, Element::I32)?]),
            &[i(&[2, 3, 5], &integers)],
        ),
        case(
            "dot_general over everything",
            &[f(&[2, 3, 4], &float(&lhs))],
            |b, x| {
                let dims = DotDims { contract: (&[0, 1, 2], &[0, 1, 2]), ..DotDims::default() };
                Ok(vec![b.dot_general_with(x[0], x[0], dims, Element::F32, Precision::High)?])
            },
            &[f(&[], &[sum as f64])],
        ),
    ]
}

fn one<'c, 'a>(b: &Builder<'c, 'a>) -> Result<Tensor<'c, 'a>> {
    b.scalar(Element::I32, 1.0)
}

fn control_flow() -> Vec<Case> {
    let branch = |index: i32, expected: i32| {
        case(
            &format!("case {index}"),
            &[i(&[], &[index]), i(&[], &[40])],
            |b, x| {
                let (index, value) = (x[0], x[1]);
                let branches: Vec<Branch> = vec![
                    Box::new(move |_| Ok(vec![value])),
                    Box::new(move |b| Ok(vec![b.add(value, one(b)?)?])),
                    Box::new(move |b| Ok(vec![b.negate(value)?])),
                ];
                b.case(index, branches)
            },
            &[i(&[], &[expected])],
        )
    };
    let choice = |pred: bool, expected: [i32; 2]| {
        case(
            &format!("if {pred}"),
            &[p(&[], &[pred]), i(&[], &[3]), i(&[], &[4])],
            |b, x| b.if_(x[0], |_| Ok(vec![x[1], x[2]]), |b| Ok(vec![x[2], b.negate(x[1])?])),
            &[i(&[], &[expected[0]]), i(&[], &[expected[1]])],
        )
    };
    vec![
        // Both bodies use what is outside: the limit, the step and a constant.
        case(
            "while with captures",
            &[i(&[], &[5]), f(&[2], &[0.5, -1.0])],
            |b, x| {
                let (zero, step) = (b.scalar(Element::I32, 0.0)?, one(b)?);
                b.while_(
                    &[zero, b.splat(Element::F32, &[2], 1.0)?],
                    |b, state| b.compare(state[0], Direction::Lt, x[0]),
                    |b, state| Ok(vec![b.add(state[0], step)?, b.add(state[1], x[1])?]),
                )
            },
            &[i(&[], &[5]), f(&[2], &[3.5, -4.0])],
        ),
        // sum over i < 4 of (i even ? i * 10 : i + sum over j < i of j): 0 + 1 + 20 + 6, with values of every level
        // used at the innermost one.
        case(
            "while in if in while",
            &[i(&[], &[4]), i(&[], &[10])],
            |b, x| {
                let zero = b.scalar(Element::I32, 0.0)?;
                let outer = b.while_(
                    &[zero, zero],
                    |b, state| b.compare(state[0], Direction::Lt, x[0]),
                    |b, state| {
                        let (index, total) = (state[0], state[1]);
                        let even = b.compare(b.and(index, one(b)?)?, Direction::Eq, zero)?;
                        let added = b.if_(
                            even,
                            |b| Ok(vec![b.multiply(index, x[1])?]),
                            |b| {
                                let inner = b.while_(
                                    &[zero, index],
                                    |b, state| b.compare(state[0], Direction::Lt, index),
                                    |b, state| Ok(vec![b.add(state[0], one(b)?)?, b.add(state[1], state[0])?]),
                                )?;
                                Ok(vec![inner[1]])
                            },
                        )?;
                        Ok(vec![b.add(index, one(b)?)?, b.add(total, added[0])?])
                    },
                )?;
                Ok(vec![outer[1]])
            },
            &[i(&[], &[27])],
        ),
        branch(0, 40),
        branch(1, 41),
        branch(2, -40),
        branch(7, -40),
        branch(-1, -40),
        choice(true, [3, 4]),
        choice(false, [4, -3]),
        case(
            "optimization_barrier",
            &[i(&[2], &[1, 2]), f(&[], &[3.0])],
            |b, x| b.optimization_barrier(x),
            &[i(&[2], &[1, 2]), f(&[], &[3.0])],
        ),
    ]
}

fn gathers_and_scatters() -> Vec<Case> {
    vec![
        // Ids out of range read the nearest row.
        case(
            "take",
            &[counting(&[3, 2]), i(&[4], &[2, 0, -5, 9]), i(&[1, 2], &[1, 0])],
            |b, x| Ok(vec![b.take(x[0], x[1], 0)?, b.take(x[0], x[2], 1)?]),
            &[f(&[4, 2], &[4.0, 5.0, 0.0, 1.0, 0.0, 1.0, 4.0, 5.0]), f(&[3, 1, 2], &[1.0, 0.0, 3.0, 2.0, 5.0, 4.0])],
        ),
        // 1x2 windows at (row, column), laid out as [window, index].
        case(
            "gather of windows",
            &[counting(&[3, 4]), i(&[2, 2], &[0, 1, 2, 2])],
            |b, x| {
                let dims = GatherDims {
                    offset_dims: &[0],
                    collapsed_slice_dims: &[0],
                    start_index_map: &[0, 1],
                    index_vector_dim: 1,
                    indices_are_sorted: true,
                    ..GatherDims::default()
                };
                Ok(vec![b.gather(x[0], x[1], dims, &[1, 2])?])
            },
            &[f(&[2, 2], &[1.0, 10.0, 2.0, 11.0])],
        ),
        // One column per row.
        case(
            "gather with batching",
            &[counting(&[2, 3]), i(&[2, 1], &[2, 0])],
            |b, x| {
                let dims = GatherDims {
                    collapsed_slice_dims: &[1],
                    operand_batching_dims: &[0],
                    start_indices_batching_dims: &[0],
                    start_index_map: &[1],
                    index_vector_dim: 1,
                    ..GatherDims::default()
                };
                Ok(vec![b.gather(x[0], x[1], dims, &[1, 1])?])
            },
            &[f(&[2], &[2.0, 3.0])],
        ),
        // Row 1 gets two updates, row 7 is outside and skipped.
        case(
            "scatter adding rows",
            &[
                counting(&[3, 2]),
                i(&[4, 1], &[1, 0, 1, 7]),
                f(&[4, 2], &[10.0, 20.0, 1.0, 2.0, 100.0, 200.0, 9.0, 9.0]),
            ],
            |b, x| {
                let dims = ScatterDims {
                    update_window_dims: &[1],
                    inserted_window_dims: &[0],
                    scatter_dims_to_operand_dims: &[0],
                    index_vector_dim: 1,
                    ..ScatterDims::default()
                };
                Ok(vec![b.scatter(x[0], x[1], x[2], dims, |b, old, new| b.add(old, new))?])
            },
            &[f(&[3, 2], &[1.0, 3.0, 112.0, 223.0, 4.0, 5.0])],
        ),
        case(
            "scatter replacing one element per row, batched",
            &[counting(&[2, 3]), i(&[2, 1], &[2, 0]), f(&[2], &[-1.0, -2.0])],
            |b, x| {
                let dims = ScatterDims {
                    inserted_window_dims: &[1],
                    input_batching_dims: &[0],
                    scatter_indices_batching_dims: &[0],
                    scatter_dims_to_operand_dims: &[1],
                    index_vector_dim: 1,
                    indices_are_sorted: true,
                    unique_indices: true,
                    ..ScatterDims::default()
                };
                Ok(vec![b.scatter(x[0], x[1], x[2], dims, |_, _, new| Ok(new))?])
            },
            &[f(&[2, 3], &[0.0, 1.0, -1.0, -2.0, 4.0, 5.0])],
        ),
    ]
}

/// Threefry 2x32 with 20 rounds (Salmon et al., SC 2011), for one counter.
fn threefry(key: [u32; 2], counter: u64) -> [u32; 2] {
    const ROTATIONS: [[u32; 4]; 2] = [[13, 15, 26, 6], [17, 29, 16, 24]];
    let keys = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD1_1BDA];
    let mut x = [(counter as u32).wrapping_add(keys[0]), ((counter >> 32) as u32).wrapping_add(keys[1])];
    for group in 0..5 {
        for rotation in ROTATIONS[group % 2] {
            x[0] = x[0].wrapping_add(x[1]);
            x[1] = x[1].rotate_left(rotation) ^ x[0];
        }
        x[0] = x[0].wrapping_add(keys[(group + 1) % 3]);
        x[1] = x[1].wrapping_add(keys[(group + 2) % 3]).wrapping_add(group as u32 + 1);
    }
    x
}

fn reductions_sorts_and_bits() -> Vec<Case> {
    let (key, counter) = (0x0123_4567_89AB_CDEFu64, 41u64);
    let drawn: Vec<[u32; 2]> = (0..3).map(|n| threefry([key as u32, (key >> 32) as u32], counter + n)).collect();
    let bits: Vec<u64> = drawn.iter().map(|x| u64::from(x[0]) | u64::from(x[1]) << 32).collect();
    let halves = drawn.concat(); // 32-bit draws take two elements from each counter.
    let table = f(&[2, 3], &[3.0, -1.0, 2.0, 0.5, 8.0, -4.0]);
    vec![
        case(
            "reduce of two operands",
            &[i(&[2, 3], &[1, 2, 3, 4, 5, 6]), f(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])],
            |b, x| {
                let inits = [b.scalar(Element::I32, 0.0)?, b.scalar(Element::F32, 1.0)?];
                b.reduce(x, &inits, &[0], |b, acc, x| Ok(vec![b.add(acc[0], x[0])?, b.multiply(acc[1], x[1])?]))
            },
            &[i(&[3], &[5, 7, 9]), f(&[3], &[4.0, 10.0, 18.0])],
        ),
        case(
            "reduce_sum, product, max, min",
            &[table],
            |b, x| {
                Ok(vec![
                    b.reduce_sum(x[0], &[1])?,
                    b.reduce_product(x[0], &[0])?,
                    b.reduce_max(x[0], &[0, 1])?,
                    b.reduce_min(x[0], &[1])?,
                ])
            },
            &[f(&[2], &[4.0, 4.5]), f(&[3], &[1.5, -8.0, -8.0]), f(&[], &[8.0]), f(&[2], &[-1.0, -4.0])],
        ),
        case(
            "reduce_max and reduce_min over nothing",
            &[],
            |b, _| {
                let empty = |element| b.constant(&HostTensor::zeros(element, &[0]));
                let types = [Element::F32, Element::I8, Element::I64, Element::U64, Element::Pred];
                let mut results = Vec::new();
                for element in types {
                    results.extend([b.reduce_max(empty(element)?, &[0])?, b.reduce_min(empty(element)?, &[0])?]);
                }
                Ok(results)
            },
            &[
                f(&[], &[-INF]),
                f(&[], &[INF]),
                HostTensor::scalar(i8::MIN),
                HostTensor::scalar(i8::MAX),
                HostTensor::scalar(i64::MIN),
                HostTensor::scalar(i64::MAX),
                HostTensor::scalar(u64::MIN),
                HostTensor::scalar(u64::MAX),
                p(&[], &[false]),
                p(&[], &[true]),
            ],
        ),
        case(
            "reduce_and, reduce_or",
            &[p(&[2, 2], &[true, true, false, true])],
            |b, x| Ok(vec![b.reduce_and(x[0], &[1])?, b.reduce_or(x[0], &[1])?, b.reduce_and(x[0], &[0, 1])?]),
            &[p(&[2], &[true, false]), p(&[2], &[true, true]), p(&[], &[false])],
        ),
        // Ties go to the first; a NaN beats everything; so does the first of nothing but negative infinities.
        case(
            "argmax",
            &[f(&[4, 4], &[1.0, 7.0, 7.0, 2.0, 1.0, NAN, 9.0, NAN, -INF, -INF, -INF, -INF, -3.0, -2.0, -4.0, -1.0])],
            |b, x| Ok(vec![b.argmax(x[0], 1)?]),
            &[i(&[4], &[1, 1, 0, 3])],
        ),
        case(
            "reduce_window",
            &[f(&[5], &[1.0, 5.0, 2.0, 4.0, 3.0])],
            |b, x| {
                let init = b.scalar(Element::F32, -INF)?;
                let window = Window { dims: &[3], strides: &[2], padding: &[(1, 0)] };
                Ok(vec![b.reduce_window(x[0], init, window, |b, acc, x| b.maximum(acc, x))?])
            },
            &[f(&[2], &[5.0, 5.0])],
        ),
        case(
            "cumulative_sum",
            &[i(&[2, 3], &[1, 2, 3, 4, 5, 6]), i(&[0], &[])],
            |b, x| Ok(vec![b.cumulative_sum(x[0], 1)?, b.cumulative_sum(x[0], 0)?, b.cumulative_sum(x[1], 0)?]),
            &[i(&[2, 3], &[1, 3, 6, 4, 9, 15]), i(&[2, 3], &[1, 2, 3, 5, 7, 9]), i(&[0], &[])],
        ),
        // Descending by key; the stable order keeps equal keys as they came.
        case(
            "sort of two operands",
            &[f(&[1, 5], &[2.0, 9.0, 2.0, -1.0, 9.0]), i(&[1, 5], &[0, 1, 2, 3, 4])],
            |b, x| b.sort(x, 1, true, |b, pairs| b.compare(pairs[0].0, Direction::Gt, pairs[0].1)),
            &[f(&[1, 5], &[9.0, 9.0, 2.0, 2.0, -1.0]), i(&[1, 5], &[1, 4, 0, 2, 3])],
        ),
        case(
            "sort along dim 0",
            &[i(&[3, 2], &[3, 1, 2, 5, 1, 3])],
            |b, x| b.sort(x, 0, false, |b, pairs| b.compare(pairs[0].0, Direction::Lt, pairs[0].1)),
            &[i(&[3, 2], &[1, 1, 2, 3, 3, 5])],
        ),
        case(
            "rng_bit_generator",
            &[HostTensor::new(&[2], &[key, counter])],
            |b, x| {
                let (state, wide) = b.rng_bit_generator(x[0], TensorType::new(Element::U64, &[3]))?;
                let (_, narrow) = b.rng_bit_generator(x[0], TensorType::new(Element::U32, &[6]))?;
                Ok(vec![state, wide, narrow])
            },
            &[HostTensor::new(&[2], &[key, counter + 3]), HostTensor::new(&[3], &bits), HostTensor::new(&[6], &halves)],
        ),
    ]
}

fn pairs_of_four() -> ReplicaGroups {
    ReplicaGroups(vec![vec![0, 1], vec![3, 2]])
}

fn collectives() -> Vec<Case> {
    // Replica r holds [10 r, 10 r + 1, 10 r + 2, 10 r + 3].
    let row = |r: i32| (0..4).map(|column| 10 * r + column).collect::<Vec<i32>>();
    let rows = || (0..4).map(|r| vec![i(&[4], &row(r))]).collect::<Vec<_>>();
    let per_replica = |values: [Vec<i32>; 4]| values.map(|v| vec![i(&[v.len()], &v)]).to_vec();
    vec![
        replicated(
            "replica_id, partition_id",
            vec![vec![]; 4],
            |b, _| Ok(vec![b.replica_id()?, b.partition_id()?]),
            (0..4u32).map(|r| vec![HostTensor::scalar(r), HostTensor::scalar(0u32)]).collect(),
        ),
        replicated(
            "all_reduce over all, sum",
            rows(),
            |b, x| Ok(vec![b.all_reduce_sum(x[0], &ReplicaGroups::all(4))?]),
            per_replica([0, 1, 2, 3].map(|_| vec![60, 64, 68, 72])),
        ),
        replicated(
            "all_reduce over pairs, maximum",
            rows(),
            |b, x| Ok(vec![b.all_reduce(x[0], &pairs_of_four(), |b, acc, x| b.maximum(acc, x))?]),
            per_replica([row(1), row(1), row(3), row(3)]),
        ),
        replicated(
            "all_gather in the group's order",
            rows(),
            |b, x| Ok(vec![b.all_gather(b.slice_in_dim(x[0], 0, 2, 0)?, 0, &pairs_of_four())?]),
            per_replica([vec![0, 1, 10, 11], vec![0, 1, 10, 11], vec![30, 31, 20, 21], vec![30, 31, 20, 21]]),
        ),
        replicated(
            "reduce_scatter",
            rows(),
            |b, x| Ok(vec![b.reduce_scatter(x[0], 0, &ReplicaGroups::all(4), |b, acc, x| b.add(acc, x))?]),
            per_replica([vec![60], vec![64], vec![68], vec![72]]),
        ),
        replicated(
            "all_to_all",
            rows(),
            |b, x| Ok(vec![b.all_to_all(x[0], 0, 0, &ReplicaGroups::all(4))?]),
            per_replica([0, 1, 2, 3].map(|column| (0..4).map(|r| 10 * r + column).collect())),
        ),
        replicated(
            "collective_permute",
            rows(),
            |b, x| Ok(vec![b.collective_permute(x[0], &[(0, 1), (1, 2), (3, 0)])?]),
            per_replica([row(3), row(0), row(1), vec![0; 4]]),
        ),
    ]
}

/// Writes operand 0 plus the length of the attribute `text`; `i32[2,3]` in the memory order that the op asks for.
struct AddLength;

impl Handler for AddLength {
    const TARGET: &'static str = "stablehlo_ops.add_length";

    fn call(mut frame: Frame<'_>) -> std::result::Result<(), String> {
        let length = frame.options.string("text").ok_or("no attribute `text`")?.len() as i32;
        let operand = frame.operands.get(0)?;
        // In its operand's buffer the result holds the operand.
        let before = match operand.aliased() {
            Some(result) => frame.results.bytes(result)?.to_vec(),
            None => operand.bytes()?.to_vec(),
        };
        let values = before.chunks_exact(4).map(|value| i32::from_le_bytes(value.try_into().expect("four bytes")));
        let after: Vec<u8> = values.flat_map(|value| (value + length).to_le_bytes()).collect();
        frame.results.bytes(0)?.copy_from_slice(&after);
        Ok(())
    }
}

fn custom_calls() -> Vec<Case> {
    fn config() -> BackendConfig {
        let entry = |key: &str, value| (key.to_owned(), value);
        BackendConfig::Dictionary(vec![
            entry("text", ConfigValue::Text("four".to_owned())),
            entry("flag", ConfigValue::Bool(true)),
            entry("count", ConfigValue::I32(-3)),
            entry("large", ConfigValue::I64(i64::MAX)),
            entry("scale", ConfigValue::F32(0.5)),
            entry("fine", ConfigValue::F64(1e-300)),
            entry("sizes", ConfigValue::I64s(vec![1, -2])),
            entry("inner", ConfigValue::Dictionary(vec![entry("deep", ConfigValue::Text("x".to_owned()))])),
        ])
    }
    let input = || i(&[2, 3], &[0, 1, 2, 3, 4, 5]);
    vec![
        case(
            "custom_call",
            &[input()],
            |b, x| {
                let call = CustomCall { backend_config: config(), has_side_effect: true, ..CustomCall::default() };
                b.custom_call(AddLength::TARGET, x, &[x[0].ty()], call)
            },
            &[i(&[2, 3], &[4, 5, 6, 7, 8, 9])],
        ),
        // The handler copies in memory order: reading column-major and writing row-major mixes the elements up in the
        // way that says that both layouts were honoured.
        case(
            "custom_call with layouts",
            &[input()],
            |b, x| {
                let call = CustomCall {
                    backend_config: config(),
                    operand_layouts: Some(vec![vec![0, 1]]),
                    ..CustomCall::default()
                };
                b.custom_call(AddLength::TARGET, x, &[x[0].ty()], call)
            },
            &[i(&[2, 3], &[4, 7, 5, 8, 6, 9])],
        ),
        case(
            "custom_call in its operand's buffer",
            &[input()],
            |b, x| {
                let call = CustomCall {
                    backend_config: config(),
                    output_operand_aliases: vec![OutputOperandAlias { result: 0, operand: 0 }],
                    ..CustomCall::default()
                };
                let doubled = b.add(x[0], x[0])?;
                b.custom_call(AddLength::TARGET, &[doubled], &[x[0].ty()], call)
            },
            &[i(&[2, 3], &[4, 6, 8, 10, 12, 14])],
        ),
    ]
}

const TABLES: [fn() -> Vec<Case>; 11] = [
    unary,
    binary,
    comparisons_and_choices,
    conversions_and_constants,
    shapes,
    contractions,
    control_flow,
    gathers_and_scatters,
    reductions_sorts_and_bits,
    collectives,
    custom_calls,
];

/// One thread runs them all: a client of the plugin is bound to its thread, and one is enough.
#[test]
fn every_case_gives_the_expected_numbers() {
    register::<AddLength>(&plugin()).unwrap();
    let cases: Vec<Case> = TABLES.into_iter().flat_map(|table| table()).collect();
    let failures: Vec<String> = cases.iter().filter_map(|case| case.run().err()).collect();
    assert!(failures.is_empty(), "{} of {} cases failed:\n\n{}", failures.len(), cases.len(), failures.join("\n"));
}

#[test]
fn the_cases_cover_every_op() {
    let context = Context::new();
    let mut emitted = BTreeSet::new();
    for case in TABLES.into_iter().flat_map(|table| table()) {
        let text = case.module(&context).text();
        emitted.extend(text.split("\"stablehlo.").skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()));
    }
    emitted.remove("return");
    assert_eq!(emitted, OPS.iter().map(ToString::to_string).collect());
}

#[test]
fn calls_donation_and_names_reach_the_plugin() {
    let context = Context::new();
    let module = Module::new(&context, "calls");
    let ty = TensorType::new(Element::F32, &[256]);
    module.private_function("double", std::slice::from_ref(&ty), |b, x| Ok(vec![b.add(x[0], x[0])?])).unwrap();
    module
        .function("main", &[ty.clone(), ty], |b, x| {
            Ok(vec![b.call("double", &[x[1]])?[0], b.call("double", &[x[0]])?[0]])
        })
        .unwrap();
    module.donate("main", 0, 1).unwrap();
    module.name_argument("main", 1, "kept").unwrap();
    module.name_result("main", 0, "twice the second").unwrap();
    module.verify().unwrap();
    let client = plugin().client(1).unwrap();
    for program in [module.text().into_bytes(), module.bytecode()] {
        let program = client.compile(&program, 1).unwrap();
        assert_eq!(program.memory_stats().unwrap().aliased, 1024);
        let [kept, given] = [1f32, 2.0].map(|v| client.upload(&HostTensor::new(&[256], &[v; 256]), 0).unwrap());
        let results = program.run(vec![Arg::Donate(given), Arg::Keep(&kept)]).unwrap();
        let firsts: Vec<f32> = results.iter().map(|result| result.values::<f32>().unwrap()[0]).collect();
        assert_eq!(firsts, [2.0, 4.0]);
        assert_eq!(kept.values::<f32>().unwrap(), [1.0; 256]);
    }
}

/// The CPU has no Mosaic; that it misses the target, and nothing else, says that it read the op's whole description.
#[test]
fn a_mosaic_call_is_understood_up_to_its_target() {
    let context = Context::new();
    let module = Module::new(&context, "mosaic");
    let ty = TensorType::new(Element::F32, &[8, 128]);
    module
        .function("main", &[ty.clone(), ty], |b, x| {
            let text = r#"{"custom_call_config": {"body": "", "serialization_format": 1}}"#.to_owned();
            let call = CustomCall {
                backend_config: BackendConfig::Text { text, api_version: 1 },
                output_operand_aliases: vec![OutputOperandAlias { result: 1, operand: 0 }],
                operand_layouts: Some(vec![vec![1, 0]; 2]),
                result_layouts: Some(vec![vec![1, 0]; 2]),
                kernel_name: Some("k".to_owned()),
                ..CustomCall::default()
            };
            b.custom_call("tpu_custom_call", x, &[x[0].ty(), x[0].ty()], call)
        })
        .unwrap();
    let error = plugin().client(1).unwrap().compile(module.text(), 1).unwrap_err().to_string();
    assert!(error.contains("tpu_custom_call") && !error.contains("parse"), "{error}");
}
