//! Constants and ops that work element by element.

use melior::ir::{Attribute, AttributeLike, attribute::DenseElementsAttribute};

use super::{
    Builder, Tensor,
    emit::{ensure, types},
};
use crate::{element::Element, error::Result, shape::TensorType, tensor::HostTensor};

/// How [`Builder::compare`] orders two elements. Floats compare partially: every comparison with a NaN is false but
/// `Ne`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less than.
    Lt,
    /// Less than or equal.
    Le,
    /// Greater than.
    Gt,
    /// Greater than or equal.
    Ge,
}

/// The element types that an op accepts.
#[derive(Clone, Copy)]
enum Accepts {
    Any,
    Number,
    Float,
    SignedOrFloat,
    Integer,
    IntegerOrPred,
}

impl Accepts {
    fn accepts(self, element: Element) -> bool {
        match self {
            Self::Any => true,
            Self::Number => element != Element::Pred,
            Self::Float => element.is_float(),
            Self::SignedOrFloat => element.is_signed() || element.is_float(),
            Self::Integer => element.is_integer(),
            Self::IntegerOrPred => element.is_integer() || element == Element::Pred,
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::Any => "any type",
            Self::Number => "an integer or a float type",
            Self::Float => "a float type",
            Self::SignedOrFloat => "a signed integer or a float type",
            Self::Integer => "an integer type",
            Self::IntegerOrPred => "an integer type or pred",
        }
    }
}

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident: $accepts:ident;)*) => {
        impl<'c, 'a> Builder<'c, 'a> {$(
            $(#[$doc])*
            pub fn $name(&self, x: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
                self.unary(stringify!($name), Accepts::$accepts, x)
            }
        )*}
    };
}

macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident: $accepts:ident;)*) => {
        impl<'c, 'a> Builder<'c, 'a> {$(
            $(#[$doc])*
            pub fn $name(&self, x: Tensor<'c, 'a>, y: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
                self.binary(stringify!($name), Accepts::$accepts, x, y)
            }
        )*}
    };
}

unary! {
    /// `-x`; wraps for the smallest signed integer.
    negate: Number;
    /// `|x|`
    abs: SignedOrFloat;
    /// -1, 0 or 1; keeps zeros and NaN of floats.
    sign: SignedOrFloat;
    /// `e^x`
    exponential: Float;
    /// `e^x - 1`, precise near 0.
    exponential_minus_one: Float;
    /// The natural logarithm.
    log: Float;
    /// `ln(1 + x)`, precise near 0.
    log_plus_one: Float;
    /// `1 / (1 + e^-x)`
    logistic: Float;
    /// The hyperbolic tangent.
    tanh: Float;
    /// The tangent, of radians.
    tan: Float;
    /// The sine, of radians.
    sine: Float;
    /// The cosine, of radians.
    cosine: Float;
    /// The square root.
    sqrt: Float;
    /// `1 / sqrt(x)`
    rsqrt: Float;
    /// The cubic root.
    cbrt: Float;
    /// Rounds toward negative infinity.
    floor: Float;
    /// Rounds toward positive infinity.
    ceil: Float;
    /// Rounds to nearest, halves to even.
    round_nearest_even: Float;
    /// Rounds to nearest, halves away from zero.
    round_nearest_afz: Float;
    /// Logical (pred) or bitwise (integers) complement.
    not: IntegerOrPred;
    /// The number of bits that are set.
    popcnt: Integer;
    /// The number of leading zero bits.
    count_leading_zeros: Integer;
}

binary! {
    /// `x + y`; logical or for pred.
    add: Any;
    /// `x - y`
    subtract: Number;
    /// `x * y`; logical and for pred.
    multiply: Any;
    /// `x / y`; integers truncate toward zero.
    divide: Number;
    /// The remainder of the division that truncates toward zero: it has the sign of `x`.
    remainder: Number;
    /// The larger one. NaN if either is, by StableHLO; XLA's CPU plugin returns `x` of an unordered pair instead, unless
    /// it runs with `--xla_cpu_enable_fast_min_max=false`.
    maximum: Any;
    /// The smaller one. For NaN see [`maximum`](Self::maximum).
    minimum: Any;
    /// `x^y`
    power: Number;
    /// The angle of the point whose ordinate is `x` and whose abscissa is `y`, in radians.
    atan2: Float;
    /// Logical or bitwise and.
    and: IntegerOrPred;
    /// Logical or bitwise or.
    or: IntegerOrPred;
    /// Logical or bitwise exclusive or.
    xor: IntegerOrPred;
    /// `x << y`; 0 when `y` is not below the number of bits.
    shift_left: Integer;
    /// `x >> y`, filling with the sign bit.
    shift_right_arithmetic: Integer;
    /// `x >> y`, filling with zeros.
    shift_right_logical: Integer;
}

impl<'c, 'a> Builder<'c, 'a> {
    fn unary(&self, op: &'static str, accepts: Accepts, x: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let ty = x.ty();
        ensure(accepts.accepts(ty.element), op, || format!("needs {}, got {ty}", accepts.describe()))?;
        self.emit(op, &[x], &[], ty)
    }

    fn binary(
        &self,
        op: &'static str,
        accepts: Accepts,
        x: Tensor<'c, 'a>,
        y: Tensor<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let (ty, other) = (x.ty(), y.ty());
        ensure(ty == other, op, || format!("operands differ: lhs {ty}, rhs {other}"))?;
        ensure(accepts.accepts(ty.element), op, || format!("needs {}, got {ty}", accepts.describe()))?;
        self.emit(op, &[x, y], &[], ty)
    }

    /// An array that is known when the module is built.
    pub fn constant(&self, value: &HostTensor) -> Result<Tensor<'c, 'a>> {
        let ty = TensorType::new(value.element(), value.dims());
        let mlir = ty.to_mlir(self.context);
        let attribute: Attribute = match ty.element {
            _ if ty.is_empty() => DenseElementsAttribute::new(mlir, &[]).expect("a tensor type is shaped").into(),
            // MLIR packs i1 into bits.
            Element::Pred => {
                let values: Vec<i32> = value.bytes().iter().map(|&byte| i32::from(byte != 0)).collect();
                DenseElementsAttribute::bool_values(mlir, &values).into()
            }
            _ => DenseElementsAttribute::raw_buffer(mlir, value.bytes()).into(),
        };
        debug_assert!(!attribute.to_raw().ptr.is_null());
        self.emit("constant", &[], &[("value", attribute)], ty)
    }

    /// A scalar constant. Floats round to nearest even, integers must hold `value` exactly.
    pub fn scalar(&self, element: Element, value: f64) -> Result<Tensor<'c, 'a>> {
        self.splat(element, &[], value)
    }

    /// A constant with the same value everywhere. Floats round to nearest even, integers must hold `value` exactly.
    pub fn splat(&self, element: Element, dims: &[usize], value: f64) -> Result<Tensor<'c, 'a>> {
        let ty = TensorType::new(element, dims);
        if ty.is_empty() {
            return self.constant(&HostTensor::zeros(element, dims));
        }
        let bytes = encode(element, value);
        ensure(bytes.is_some(), "constant", || format!("{element} does not hold {value}"))?;
        let bytes = bytes.unwrap_or_default();
        let mlir = ty.to_mlir(self.context);
        let attribute = match element {
            Element::Pred => DenseElementsAttribute::bool_splat(mlir, value != 0.0),
            // MLIR takes the bytes of one element for all.
            _ => DenseElementsAttribute::raw_buffer(mlir, &bytes),
        };
        self.emit("constant", &[], &[("value", attribute.into())], ty)
    }

    /// Whether each element is neither infinite nor NaN.
    pub fn is_finite(&self, x: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let ty = x.ty();
        ensure(ty.element.is_float(), "is_finite", || format!("needs a float type, got {ty}"))?;
        self.emit("is_finite", &[x], &[], TensorType { element: Element::Pred, ..ty })
    }

    /// Converts each element: to floats with rounding to nearest even, to integers toward zero (what does not fit is
    /// up to the plugin), to pred as `x != 0`.
    pub fn convert(&self, x: Tensor<'c, 'a>, element: Element) -> Result<Tensor<'c, 'a>> {
        self.emit("convert", &[x], &[], TensorType { element, ..x.ty() })
    }

    /// Reads the bits as another type. A narrower type adds a minor dimension (`f32[8]` as `u8[8,4]`), a wider one
    /// takes it away.
    pub fn bitcast_convert(&self, x: Tensor<'c, 'a>, element: Element) -> Result<Tensor<'c, 'a>> {
        let op = "bitcast_convert";
        let ty = x.ty();
        ensure((ty.element == Element::Pred) == (element == Element::Pred), op, || {
            format!("pred has no bits to share with other types: {ty} as {element}")
        })?;
        let (from, to) = (ty.element.bits(), element.bits());
        let mut dims = ty.dims.clone();
        if from > to {
            dims.push(from / to);
        } else if from < to {
            ensure(dims.pop() == Some(to / from), op, || {
                format!("{ty} as {element} needs a minor dimension of {}", to / from)
            })?;
        }
        self.emit(op, &[x], &[], TensorType { element, dims })
    }

    /// Rounds each element to what a float with `exponent_bits` and `mantissa_bits` holds, keeping its type.
    pub fn reduce_precision(
        &self,
        x: Tensor<'c, 'a>,
        exponent_bits: usize,
        mantissa_bits: usize,
    ) -> Result<Tensor<'c, 'a>> {
        let op = "reduce_precision";
        let ty = x.ty();
        ensure(ty.element.is_float(), op, || format!("needs a float type, got {ty}"))?;
        ensure(exponent_bits > 0, op, || "needs one exponent bit at least".to_owned())?;
        let attributes = [("exponent_bits", self.i32(exponent_bits)), ("mantissa_bits", self.i32(mantissa_bits))];
        self.emit(op, &[x], &attributes, ty)
    }

    /// Compares element by element; the result is pred.
    pub fn compare(&self, x: Tensor<'c, 'a>, direction: Direction, y: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let (ty, other) = (x.ty(), y.ty());
        ensure(ty == other, "compare", || format!("operands differ: lhs {ty}, rhs {other}"))?;
        let direction = match direction {
            Direction::Eq => "EQ",
            Direction::Ne => "NE",
            Direction::Lt => "LT",
            Direction::Le => "LE",
            Direction::Gt => "GT",
            Direction::Ge => "GE",
        };
        let order = match ty.element {
            element if element.is_float() => "FLOAT",
            element if element.is_signed() => "SIGNED",
            _ => "UNSIGNED",
        };
        let attributes = [
            ("comparison_direction", self.parse(&format!("#stablehlo<comparison_direction {direction}>"))?),
            ("compare_type", self.parse(&format!("#stablehlo<comparison_type {order}>"))?),
        ];
        self.emit("compare", &[x, y], &attributes, TensorType { element: Element::Pred, ..ty })
    }

    /// Where `pred` (of the same dims, or a scalar) holds `on_true`, else `on_false`.
    pub fn select(
        &self,
        pred: Tensor<'c, 'a>,
        on_true: Tensor<'c, 'a>,
        on_false: Tensor<'c, 'a>,
    ) -> Result<Tensor<'c, 'a>> {
        let (condition, ty, other) = (pred.ty(), on_true.ty(), on_false.ty());
        let fits = condition.element == Element::Pred
            && (condition.dims.is_empty() || condition.dims == ty.dims)
            && ty == other;
        ensure(fits, "select", || {
            format!(
                "needs a pred of the same dims or a scalar, and two equal types, got {}",
                types(&[condition.clone(), ty.clone(), other.clone()])
            )
        })?;
        self.emit("select", &[pred, on_true, on_false], &[], ty)
    }

    /// `min(max(x, low), high)`; the bounds are of the same type as `x`, or scalars.
    pub fn clamp(&self, low: Tensor<'c, 'a>, x: Tensor<'c, 'a>, high: Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>> {
        let (ty, bounds) = (x.ty(), [low.ty(), high.ty()]);
        let fits = bounds.iter().all(|bound| *bound == ty || *bound == TensorType::scalar(ty.element));
        ensure(fits, "clamp", || format!("bounds {} fit neither {ty} nor its scalar", types(&bounds)))?;
        self.emit("clamp", &[low, x, high], &[], ty)
    }
}

/// The bytes of one element that holds `value`; `None` when an integer type does not hold it exactly.
fn encode(element: Element, value: f64) -> Option<Vec<u8>> {
    macro_rules! integer {
        ($type:ty) => {{
            // A cast from float to integer saturates, so that a value out of range does not come back. The maximum of
            // a 64-bit type rounds up on its way back: hence the comparison in i128.
            let cast = value as $type;
            (value.fract() == 0.0 && i128::from(cast) == value as i128).then(|| cast.to_le_bytes().to_vec())
        }};
    }
    match element {
        Element::Pred => (value == 0.0 || value == 1.0).then(|| vec![value as u8]),
        narrow if narrow.bits() < 8 => {
            let tensor = HostTensor::from_f64(narrow, &[], &[value]);
            (tensor.to_f64() == [value]).then(|| tensor.bytes().to_vec())
        }
        Element::I8 => integer!(i8),
        Element::I16 => integer!(i16),
        Element::I32 => integer!(i32),
        Element::I64 => integer!(i64),
        Element::U8 => integer!(u8),
        Element::U16 => integer!(u16),
        Element::U32 => integer!(u32),
        Element::U64 => integer!(u64),
        float => Some(HostTensor::from_f64(float, &[], &[value]).bytes().to_vec()),
    }
}
