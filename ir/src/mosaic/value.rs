//! Scalars and tiles in registers, and the arithmetic on them.
//!
//! Operators work elementwise. A literal or a scalar beside a tile is broadcast to it, and so is a dimension of size 1
//! between tiles of equal rank; element types never convert by themselves ([`Value::cast`]).

use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Rem, Shl, Shr, Sub};

use melior::ir::{
    Attribute, Location, Type, TypeLike, Value as MlirValue, ValueLike,
    attribute::{
        ArrayAttribute, BoolAttribute, DenseElementsAttribute, DenseI32ArrayAttribute, DenseI64ArrayAttribute,
        FloatAttribute, IntegerAttribute, TypeAttribute,
    },
    r#type::IntegerType,
};

use super::builder::Builder;
use crate::{
    element::Element,
    shape::{TensorType, element_of, element_type},
};

/// A scalar or a tile in registers: the result of an op, or an argument of a loop's body.
#[derive(Clone, Copy)]
pub struct Value<'a> {
    pub(super) k: &'a Builder<'a>,
    pub(super) raw: mlir_sys::MlirValue,
}

/// A number in the kernel's source or a value of the kernel.
#[derive(Clone, Copy)]
pub enum Literal<'a> {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A value.
    Value(Value<'a>),
}

/// What may stand beside a [`Value`] in an expression: a number or another value.
pub trait IntoOperand<'a>: Copy {
    /// As a literal.
    fn literal(self) -> Literal<'a>;
}

impl<'a> IntoOperand<'a> for Value<'a> {
    fn literal(self) -> Literal<'a> {
        Literal::Value(self)
    }
}

impl<'a> IntoOperand<'a> for Literal<'a> {
    fn literal(self) -> Literal<'a> {
        self
    }
}

macro_rules! literals {
    ($($rust:ty => $variant:ident),*) => {$(
        impl<'a> IntoOperand<'a> for $rust {
            fn literal(self) -> Literal<'a> {
                Literal::$variant(self as _)
            }
        }
    )*};
}

literals!(i32 => Int, i64 => Int, u32 => Int, usize => Int, f32 => Float, f64 => Float);

/// Which dimensions a matrix product contracts and which it batches over; the rest are the result's, batch first, then
/// the left side's, then the right side's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DotDims {
    /// Contracted dimensions of the left and of the right side.
    pub contract: (Vec<usize>, Vec<usize>),
    /// Batch dimensions of the left and of the right side.
    pub batch: (Vec<usize>, Vec<usize>),
}

impl DotDims {
    /// `[m, k] x [k, n] -> [m, n]`.
    pub fn nn() -> Self {
        Self { contract: (vec![1], vec![0]), batch: Default::default() }
    }

    /// `[m, k] x [n, k] -> [m, n]`: the right side transposed.
    pub fn nt() -> Self {
        Self { contract: (vec![1], vec![1]), batch: Default::default() }
    }

    /// The result's sizes, or why the operands do not fit.
    fn result(&self, lhs: &[usize], rhs: &[usize]) -> Result<Vec<usize>, String> {
        let (contract, batch) = (&self.contract, &self.batch);
        if contract.0.len() != contract.1.len() || batch.0.len() != batch.1.len() {
            return Err("the sides contract or batch different numbers of dimensions".into());
        }
        let mut sizes = Vec::new();
        for (role, pairs) in [("batch", batch), ("contracting", contract)] {
            for (&l, &r) in pairs.0.iter().zip(&pairs.1) {
                let (Some(&left), Some(&right)) = (lhs.get(l), rhs.get(r)) else {
                    return Err(format!(
                        "{role} dimensions {l} and {r} of operands of rank {} and {}",
                        lhs.len(),
                        rhs.len()
                    ));
                };
                if left != right {
                    return Err(format!("{role} dimensions {l} of size {left} and {r} of size {right}"));
                }
                if role == "batch" {
                    sizes.push(left);
                }
            }
        }
        sizes.extend(self.free(0, lhs.len()).iter().map(|&dim| lhs[dim]));
        sizes.extend(self.free(1, rhs.len()).iter().map(|&dim| rhs[dim]));
        Ok(sizes)
    }

    fn free(&self, side: usize, rank: usize) -> Vec<usize> {
        let (contract, batch) = match side {
            0 => (&self.contract.0, &self.batch.0),
            _ => (&self.contract.1, &self.batch.1),
        };
        (0..rank).filter(|dim| !contract.contains(dim) && !batch.contains(dim)).collect()
    }

    /// `#tpu.dot_dimension_numbers`: contracting, non-contracting, output order as (side, dimension), batch.
    fn attribute(&self, lhs_rank: usize, rhs_rank: usize) -> String {
        let free = [self.free(0, lhs_rank), self.free(1, rhs_rank)];
        let batch = self.batch.0.iter().map(|&dim| (0, dim));
        let rows = free[0].iter().map(|&dim| (0, dim));
        let columns = free[1].iter().map(|&dim| (1, dim));
        let order: Vec<_> = batch.chain(rows).chain(columns).flat_map(|(side, dim)| [side, dim]).collect();
        format!(
            "#tpu.dot_dimension_numbers<{:?}, {:?}, {:?}, {:?}, {order:?}, {:?}, {:?}>",
            self.contract.0, self.contract.1, free[0], free[1], self.batch.0, self.batch.1
        )
    }
}

/// How precisely the MXU multiplies f32 operands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// The compiler's default: one pass for bf16 operands; f32 operands are rounded to bf16 first.
    #[default]
    Default,
    /// f32 operands keep their precision, in several passes.
    Fp32,
}

/// The MLIR type of a scalar (`dims` empty) or a tile.
pub(super) fn vector_type<'c>(context: &'c melior::Context, element: Element, dims: &[usize]) -> Type<'c> {
    let element = element_type(context, element);
    if dims.is_empty() {
        return element;
    }
    let dims: Vec<u64> = dims.iter().map(|&size| size as u64).collect();
    Type::vector(&dims, element)
}

/// The sizes of an MLIR vector, empty for anything else.
pub(crate) fn vector_dims(r#type: Type) -> Vec<usize> {
    let raw = r#type.to_raw();
    // SAFETY: the type is valid, and asked for sizes only if it is a vector.
    unsafe {
        if !mlir_sys::mlirTypeIsAVector(raw) {
            return vec![];
        }
        let rank = mlir_sys::mlirShapedTypeGetRank(raw);
        (0..rank).map(|dim| mlir_sys::mlirShapedTypeGetDimSize(raw, dim as isize) as usize).collect()
    }
}

/// The element of an MLIR vector or scalar; `index` counts as `i32`.
pub(crate) fn scalar_element(r#type: Type) -> Option<Element> {
    let raw = r#type.to_raw();
    // SAFETY: as in `vector_dims`.
    let r#type = unsafe {
        match mlir_sys::mlirTypeIsAVector(raw) {
            true => Type::from_raw(mlir_sys::mlirShapedTypeGetElementType(raw)),
            false => r#type,
        }
    };
    if r#type.is_index() { Some(Element::I32) } else { element_of(r#type) }
}

impl<'a> Value<'a> {
    pub(super) fn mlir_type(&self) -> Type<'a> {
        // SAFETY: values do not outlive the kernel that they belong to: its brand is part of their type.
        let value: MlirValue<'a, 'a> = unsafe { MlirValue::from_raw(self.raw) };
        value.r#type()
    }

    /// The sizes, empty for a scalar.
    pub fn dims(&self) -> Vec<usize> {
        vector_dims(self.mlir_type())
    }

    /// The element type.
    pub fn element(&self) -> Element {
        scalar_element(self.mlir_type()).expect("the builder makes values of known elements only")
    }

    /// Element type and sizes.
    pub fn ty(&self) -> TensorType {
        TensorType::new(self.element(), &self.dims())
    }

    /// `literal` with this value's element type and sizes.
    #[track_caller]
    fn coerce(self, op: &str, literal: Literal<'a>) -> Value<'a> {
        match literal {
            Literal::Value(value) => value,
            literal => self.k.splat_literal(op, self.element(), &self.dims(), literal),
        }
    }

    /// Both sides broadcast to common sizes.
    #[track_caller]
    fn matched(self, op: &str, rhs: impl IntoOperand<'a>) -> (Value<'a>, Value<'a>) {
        let rhs = self.coerce(op, rhs.literal());
        let (left, right) = (self.ty(), rhs.ty());
        if left.element != right.element {
            self.k.fail(op, format!("{left} and {right}: cast one side"));
            return (self, self);
        }
        match common_dims(&left.dims, &right.dims) {
            Some(dims) => (self.stretched(op, &dims), rhs.stretched(op, &dims)),
            None => {
                self.k.fail(op, format!("{left} and {right} do not broadcast to each other"));
                (self, self)
            }
        }
    }

    #[track_caller]
    fn stretched(self, _op: &str, dims: &[usize]) -> Value<'a> {
        if self.dims() == dims {
            return self;
        }
        let result = vector_type(self.k.context, self.element(), dims);
        self.k.emit_one("vector.broadcast", &[self.raw], &[], result, self.k.here())
    }

    /// The same value in every element of `dims` where this one is a scalar or has size 1.
    #[track_caller]
    pub fn broadcast_to(self, dims: &[usize]) -> Value<'a> {
        let own = self.dims();
        if !own.is_empty() && common_dims(&own, dims).as_deref() != Some(dims) {
            self.k.fail("vector.broadcast", format!("{} to {dims:?}", self.ty()));
            return self.k.placeholder_of(self.element(), dims);
        }
        self.stretched("vector.broadcast", dims)
    }

    /// An elementwise op of two operands: its name for floats and for integers.
    #[track_caller]
    fn binary(self, rhs: impl IntoOperand<'a>, float: &str, integer: &str) -> Value<'a> {
        let op = if self.element().is_float() { float } else { integer };
        if op.is_empty() {
            self.k.fail([float, integer].concat().as_str(), format!("{} has no such operation", self.ty()));
            return self;
        }
        let (lhs, rhs) = self.matched(op, rhs);
        self.k.emit_one(op, &[lhs.raw, rhs.raw], &[], lhs.mlir_type(), self.k.here())
    }

    /// An elementwise float op of one operand.
    #[track_caller]
    fn unary(self, op: &str) -> Value<'a> {
        if !self.element().is_float() {
            self.k.fail(op, format!("{} is not a float", self.ty()));
            return self;
        }
        self.k.emit_one(op, &[self.raw], &[], self.mlir_type(), self.k.here())
    }

    /// The larger of both; NaN if one is.
    #[track_caller]
    pub fn maximum(self, rhs: impl IntoOperand<'a>) -> Value<'a> {
        self.binary(rhs, "arith.maximumf", "arith.maxsi")
    }

    /// The smaller of both; NaN if one is.
    #[track_caller]
    pub fn minimum(self, rhs: impl IntoOperand<'a>) -> Value<'a> {
        self.binary(rhs, "arith.minimumf", "arith.minsi")
    }

    /// Integers shifted right with zeros coming in.
    #[track_caller]
    pub fn shift_right_logical(self, rhs: impl IntoOperand<'a>) -> Value<'a> {
        self.binary(rhs, "", "arith.shrui")
    }

    /// Integers divided and rounded up; both sides must be positive or zero.
    #[track_caller]
    pub fn div_ceil(self, rhs: impl IntoOperand<'a>) -> Value<'a> {
        let rhs = self.coerce("arith.divsi", rhs.literal());
        (self + rhs - 1) / rhs
    }

    #[track_caller]
    fn compared(self, rhs: impl IntoOperand<'a>, float: i64, integer: i64) -> Value<'a> {
        let (op, predicate) = if self.element().is_float() { ("arith.cmpf", float) } else { ("arith.cmpi", integer) };
        let (lhs, rhs) = self.matched(op, rhs);
        let predicate = IntegerAttribute::new(IntegerType::new(self.k.context, 64).into(), predicate).into();
        let result = vector_type(self.k.context, Element::Pred, &lhs.dims());
        self.k.emit_one(op, &[lhs.raw, rhs.raw], &[("predicate", predicate)], result, self.k.here())
    }

    /// `self == rhs`, elementwise.
    #[track_caller]
    pub fn equals(self, rhs: impl IntoOperand<'a>) -> Value<'a> {
        self.compared(rhs, 1, 0)
    }

    /// `self != rhs`, elementwise; true where a side is NaN.
    #[track_caller]
    pub fn differs(self, rhs: impl IntoOperand<'a>) -> Value<'a> {
        self.compared(rhs, 13, 1)
    }

    /// `self < rhs`, elementwise, signed.
    #[track_caller]
    pub fn less(self, rhs: impl IntoOperand<'a>) -> Value<'a> {
        self.compared(rhs, 4, 2)
    }

    /// `self <= rhs`, elementwise, signed.
    #[track_caller]
    pub fn less_equal(self, rhs: impl IntoOperand<'a>) -> Value<'a> {
        self.compared(rhs, 5, 3)
    }

    /// `self > rhs`, elementwise, signed.
    #[track_caller]
    pub fn greater(self, rhs: impl IntoOperand<'a>) -> Value<'a> {
        self.compared(rhs, 2, 4)
    }

    /// `self >= rhs`, elementwise, signed.
    #[track_caller]
    pub fn greater_equal(self, rhs: impl IntoOperand<'a>) -> Value<'a> {
        self.compared(rhs, 3, 5)
    }

    /// Where this condition holds `then`, elsewhere `otherwise`. A literal takes the other side's type.
    #[track_caller]
    pub fn select(self, then: impl IntoOperand<'a>, otherwise: impl IntoOperand<'a>) -> Value<'a> {
        let op = "arith.select";
        let (then, otherwise) = match (then.literal(), otherwise.literal()) {
            (Literal::Value(then), otherwise) => then.matched(op, otherwise),
            (then, Literal::Value(otherwise)) => {
                let (otherwise, then) = otherwise.matched(op, then);
                (then, otherwise)
            }
            (then, otherwise) => {
                let like = match (then, otherwise) {
                    (Literal::Int(_), Literal::Int(_)) => self.k.splat_literal(op, Element::I32, &self.dims(), then),
                    _ => self.k.splat_literal(op, Element::F32, &self.dims(), then),
                };
                like.matched(op, otherwise)
            }
        };
        if self.element() != Element::Pred {
            self.k.fail(op, format!("the condition is {}, not pred", self.ty()));
            return then;
        }
        let Some(dims) = common_dims(&self.dims(), &then.dims()) else {
            self.k.fail(op, format!("a condition {} for values {}", self.ty(), then.ty()));
            return then;
        };
        // A scalar condition may choose between whole tiles.
        let condition = if self.dims().is_empty() { self } else { self.stretched(op, &dims) };
        let (then, otherwise) = (then.stretched(op, &dims), otherwise.stretched(op, &dims));
        self.k.emit_one(op, &[condition.raw, then.raw, otherwise.raw], &[], then.mlir_type(), self.k.here())
    }

    /// `e^self`.
    #[track_caller]
    pub fn exp(self) -> Value<'a> {
        self.unary("math.exp")
    }

    /// `2^self`.
    #[track_caller]
    pub fn exp2(self) -> Value<'a> {
        self.unary("math.exp2")
    }

    /// The natural logarithm.
    #[track_caller]
    pub fn log(self) -> Value<'a> {
        self.unary("math.log")
    }

    /// The hyperbolic tangent.
    #[track_caller]
    pub fn tanh(self) -> Value<'a> {
        self.unary("math.tanh")
    }

    /// The sine of an angle in radians.
    #[track_caller]
    pub fn sin(self) -> Value<'a> {
        self.unary("math.sin")
    }

    /// The cosine of an angle in radians.
    #[track_caller]
    pub fn cos(self) -> Value<'a> {
        self.unary("math.cos")
    }

    /// The square root.
    #[track_caller]
    pub fn sqrt(self) -> Value<'a> {
        self.unary("math.sqrt")
    }

    /// One over the square root.
    #[track_caller]
    pub fn rsqrt(self) -> Value<'a> {
        self.unary("math.rsqrt")
    }

    /// The largest integral value that is not larger.
    #[track_caller]
    pub fn floor(self) -> Value<'a> {
        self.unary("math.floor")
    }

    /// The absolute value.
    #[track_caller]
    pub fn abs(self) -> Value<'a> {
        match self.element().is_float() {
            true => self.unary("math.absf"),
            false => self.k.emit_one("math.absi", &[self.raw], &[], self.mlir_type(), self.k.here()),
        }
    }

    /// `1 / self`; `approximate` takes the hardware's estimate (about 1e-3 relative).
    #[track_caller]
    pub fn reciprocal(self, approximate: bool) -> Value<'a> {
        if self.dims().is_empty() || !self.element().is_float() {
            self.k.fail("tpu.reciprocal", format!("{} is not a float tile", self.ty()));
            return self;
        }
        let flags = [("approx", approximate), ("full_range", true)]
            .map(|(key, flag)| (key, BoolAttribute::new(self.k.context, flag).into()));
        self.k.emit_one("tpu.reciprocal", &[self.raw], &flags, self.mlir_type(), self.k.here())
    }

    /// `1 / (1 + e^-self)`.
    #[track_caller]
    pub fn logistic(self) -> Value<'a> {
        1.0 / ((-self).exp() + 1.0)
    }

    /// Conversion to another element type: floats round to nearest even, floats become integers by truncation, `pred`
    /// becomes 0 or 1.
    #[track_caller]
    pub fn cast(self, to: Element) -> Value<'a> {
        let from = self.element();
        if from == to {
            return self;
        }
        let op = match (from, to) {
            (Element::Pred, Element::I32) => "arith.extui",
            (Element::Pred, _) => return self.cast(Element::I32).cast(to),
            (_, Element::Pred) => return self.differs(0),
            _ if from.is_float() && to.is_float() && to.bits() > from.bits() => "arith.extf",
            _ if from.is_float() && to.is_float() => "arith.truncf",
            _ if from.is_float() && to.is_signed() => "arith.fptosi",
            _ if from.is_signed() && to.is_float() => "arith.sitofp",
            _ if from.is_signed() && to.is_signed() && to.bits() > from.bits() => "arith.extsi",
            _ if from.is_signed() && to.is_signed() => "arith.trunci",
            _ => {
                self.k.fail("tpu.cast", format!("{} to {to}", self.ty()));
                return self.k.placeholder_of(to, &self.dims());
            }
        };
        let result = vector_type(self.k.context, to, &self.dims());
        self.k.emit_one(op, &[self.raw], &[], result, self.k.here())
    }

    /// The bits of a tile read as another element type. Narrower elements multiply the second-minor size (the TPU packs
    /// them along sublanes), wider ones divide it.
    #[track_caller]
    pub fn bitcast(self, to: Element) -> Value<'a> {
        let op = "tpu.bitcast";
        let mut dims = self.dims();
        let (from_bits, to_bits) = (self.element().bits(), to.bits());
        let packed = dims.len().checked_sub(2).map(|dim| dims[dim] * from_bits);
        match packed {
            Some(packed) if packed % to_bits == 0 => {
                let dim = dims.len() - 2;
                dims[dim] = packed / to_bits;
            }
            _ if from_bits == to_bits && !dims.is_empty() => {}
            _ => {
                self.k.fail(op, format!("{} to {to}", self.ty()));
                return self.k.placeholder_of(to, &dims);
            }
        }
        let result = vector_type(self.k.context, to, &dims);
        self.k.emit_one(op, &[self.raw], &[], result, self.k.here())
    }

    /// The elements in the same order with other sizes.
    #[track_caller]
    pub fn reshape(self, dims: &[usize]) -> Value<'a> {
        let op = "vector.shape_cast";
        let own = self.dims();
        if own == dims {
            return self;
        }
        let result = vector_type(self.k.context, self.element(), dims);
        if own.is_empty() || dims.is_empty() || own.iter().product::<usize>() != dims.iter().product::<usize>() {
            self.k.fail(op, format!("{} to {dims:?}", self.ty()));
            return self.k.placeholder(result);
        }
        self.k.emit_one(op, &[self.raw], &[], result, self.k.here())
    }

    /// Dimension `i` of the result is dimension `permutation[i]` of this.
    #[track_caller]
    pub fn transpose(self, permutation: &[usize]) -> Value<'a> {
        let op = "tpu.transpose";
        let dims = self.dims();
        let mut sorted = permutation.to_vec();
        sorted.sort_unstable();
        if sorted != (0..dims.len()).collect::<Vec<_>>() || dims.is_empty() {
            self.k.fail(op, format!("{permutation:?} does not permute the dimensions of {}", self.ty()));
            return self;
        }
        let result: Vec<usize> = permutation.iter().map(|&dim| dims[dim]).collect();
        let permutation: Vec<i64> = permutation.iter().map(|&dim| dim as i64).collect();
        let permutation = DenseI64ArrayAttribute::new(self.k.context, &permutation).into();
        let result = vector_type(self.k.context, self.element(), &result);
        self.k.emit_one(op, &[self.raw], &[("permutation", permutation)], result, self.k.here())
    }

    /// The box of sizes `sizes` at `offsets`.
    #[track_caller]
    pub fn slice(self, offsets: &[usize], sizes: &[usize]) -> Value<'a> {
        let op = "vector.extract_strided_slice";
        let dims = self.dims();
        let fits = offsets.len() == dims.len()
            && sizes.len() == dims.len()
            && (0..dims.len()).all(|dim| sizes[dim] > 0 && offsets[dim] + sizes[dim] <= dims[dim]);
        let result = vector_type(self.k.context, self.element(), sizes);
        if !fits || dims.is_empty() {
            self.k.fail(op, format!("offsets {offsets:?} and sizes {sizes:?} in {}", self.ty()));
            return self.k.placeholder(result);
        }
        let i64_type: Type = IntegerType::new(self.k.context, 64).into();
        let array = |values: &[usize]| -> Attribute<'a> {
            let values: Vec<_> = values.iter().map(|&v| IntegerAttribute::new(i64_type, v as i64).into()).collect();
            ArrayAttribute::new(self.k.context, &values).into()
        };
        let attributes =
            [("offsets", array(offsets)), ("sizes", array(sizes)), ("strides", array(&vec![1; dims.len()]))];
        self.k.emit_one(op, &[self.raw], &attributes, result, self.k.here())
    }

    /// The elements moved by `amount` towards higher indices of dimension `dim`, wrapping around.
    #[track_caller]
    pub fn rotate(self, amount: impl IntoOperand<'a>, dim: usize) -> Value<'a> {
        let op = "tpu.dynamic_rotate";
        if dim >= self.dims().len() {
            self.k.fail(op, format!("dimension {dim} of {}", self.ty()));
            return self;
        }
        let amount = self.k.scalar_i32(op, amount.literal());
        let signed: Type = IntegerType::signed(self.k.context, 32).into();
        let dimension = IntegerAttribute::new(signed, dim as i64).into();
        self.k.emit_one(op, &[self.raw, amount.raw], &[("dimension", dimension)], self.mlir_type(), self.k.here())
    }

    /// The sum along `dim`, which stays with size 1.
    #[track_caller]
    pub fn sum(self, dim: usize) -> Value<'a> {
        self.reduced(&[dim], Reduction::Sum)
    }

    /// The maximum along `dim`, which stays with size 1.
    #[track_caller]
    pub fn max(self, dim: usize) -> Value<'a> {
        self.reduced(&[dim], Reduction::Max)
    }

    /// The minimum along `dim`, which stays with size 1.
    #[track_caller]
    pub fn min(self, dim: usize) -> Value<'a> {
        self.reduced(&[dim], Reduction::Min)
    }

    /// The sum of all elements, as a scalar.
    #[track_caller]
    pub fn sum_all(self) -> Value<'a> {
        self.reduced_to_scalar(Reduction::Sum)
    }

    /// The maximum of all elements, as a scalar.
    #[track_caller]
    pub fn max_all(self) -> Value<'a> {
        self.reduced_to_scalar(Reduction::Max)
    }

    #[track_caller]
    fn reduced(self, over: &[usize], how: Reduction) -> Value<'a> {
        let op = "vector.multi_reduction";
        let mut dims = self.dims();
        let element = self.element();
        if over.iter().any(|&dim| dim >= dims.len()) || dims.len() <= over.len() || element == Element::Pred {
            self.k.fail(op, format!("{how:?} over dimensions {over:?} of {}: give it one more dimension", self.ty()));
            return self;
        }
        let kept: Vec<usize> = (0..dims.len()).filter(|dim| !over.contains(dim)).map(|dim| dims[dim]).collect();
        let (kind, identity) = how.kind(element);
        let initial = self.k.splat_literal(op, element, &kept, identity);
        let over_i64: Vec<i64> = over.iter().map(|&dim| dim as i64).collect();
        let attributes = [
            ("kind", self.k.attribute(op, &format!("#vector.kind<{kind}>"))),
            ("reduction_dims", DenseI64ArrayAttribute::new(self.k.context, &over_i64).into()),
        ];
        let result = vector_type(self.k.context, element, &kept);
        let reduced = self.k.emit_one(op, &[self.raw, initial.raw], &attributes, result, self.k.here());
        over.iter().for_each(|&dim| dims[dim] = 1);
        reduced.reshape(&dims)
    }

    #[track_caller]
    fn reduced_to_scalar(self, how: Reduction) -> Value<'a> {
        let dims = self.dims();
        let lead = self.reshape(&[&[1], dims.as_slice()].concat());
        let reduced = lead.reduced(&(1..=dims.len()).collect::<Vec<_>>(), how);
        let position = vec![0; dims.len() + 1];
        let position = DenseI64ArrayAttribute::new(self.k.context, &position).into();
        let result = element_type(self.k.context, self.element());
        self.k.emit_one("vector.extract", &[reduced.raw], &[("static_position", position)], result, self.k.here())
    }

    /// This scalar, of which the compiler may believe that it is a multiple of `multiple` (Pallas: `pl.multiple_of`).
    /// The tile machine checks it.
    #[track_caller]
    pub fn multiple_of(self, multiple: usize) -> Value<'a> {
        let op = "tpu.assume_multiple";
        if self.ty() != TensorType::scalar(Element::I32) || multiple == 0 {
            self.k.fail(op, format!("{} as a multiple of {multiple}", self.ty()));
            return self;
        }
        let multiple = IntegerAttribute::new(self.k.i32_type(), multiple as i64).into();
        self.k.emit_one(op, &[self.raw], &[("multiple", multiple)], self.mlir_type(), self.k.here())
    }
}

#[derive(Clone, Copy, Debug)]
enum Reduction {
    Sum,
    Max,
    Min,
}

impl Reduction {
    /// The name of `#vector.kind` and the value that changes nothing.
    fn kind<'a>(self, element: Element) -> (&'static str, Literal<'a>) {
        let range = |high: bool| {
            let max = match element {
                Element::I8 => i64::from(i8::MAX),
                Element::I16 => i64::from(i16::MAX),
                _ => i64::from(i32::MAX),
            };
            Literal::Int(if high { max } else { -max - 1 })
        };
        match (self, element.is_float()) {
            (Self::Sum, true) => ("add", Literal::Float(0.0)),
            (Self::Sum, false) => ("add", Literal::Int(0)),
            (Self::Max, true) => ("maximumf", Literal::Float(f64::NEG_INFINITY)),
            (Self::Max, false) => ("maxsi", range(false)),
            (Self::Min, true) => ("minimumf", Literal::Float(f64::INFINITY)),
            (Self::Min, false) => ("minsi", range(true)),
        }
    }
}

/// The sizes that both sides broadcast to: equal, or 1 on one side, or a scalar on one side.
fn common_dims(left: &[usize], right: &[usize]) -> Option<Vec<usize>> {
    if left.is_empty() || right.is_empty() {
        return Some([left, right].concat());
    }
    if left.len() != right.len() {
        return None;
    }
    let size = |(&l, &r): (&usize, &usize)| match (l, r) {
        _ if l == r => Some(l),
        (1, other) | (other, 1) => Some(other),
        _ => None,
    };
    left.iter().zip(right).map(size).collect()
}

/// Constants, and ops of more than two tiles.
impl<'a> Builder<'a> {
    /// The scalar `value: i32`.
    #[track_caller]
    pub fn int(&'a self, value: i64) -> Value<'a> {
        self.splat_literal("arith.constant", Element::I32, &[], Literal::Int(value))
    }

    /// A tile (or, with no dims, a scalar) of one number.
    #[track_caller]
    pub fn splat(&'a self, element: Element, dims: &[usize], number: f64) -> Value<'a> {
        self.splat_literal("arith.constant", element, dims, Literal::Float(number))
    }

    /// A tile of zeros.
    #[track_caller]
    pub fn zeros(&'a self, element: Element, dims: &[usize]) -> Value<'a> {
        self.splat(element, dims, 0.0)
    }

    /// The index of each element along `dim`, as `i32`.
    #[track_caller]
    pub fn iota(&'a self, dims: &[usize], dim: usize) -> Value<'a> {
        let op = "tpu.iota";
        if dim >= dims.len() {
            self.fail(op, format!("dimension {dim} of {dims:?}"));
            return self.zeros(Element::I32, dims);
        }
        let dimensions = DenseI32ArrayAttribute::new(self.context, &[dim as i32]).into();
        self.emit_one(
            op,
            &[],
            &[("dimensions", dimensions)],
            vector_type(self.context, Element::I32, dims),
            self.here(),
        )
    }

    /// One integer for the numbers at each place of `tiles`, rounded to `to`, the first tile's in the lowest bits
    /// (Pallas: `pltpu.pack_elementwise`). As many tiles as numbers of `to` fill an element of theirs.
    #[track_caller]
    pub fn pack(&'a self, tiles: &[Value<'a>], to: Element) -> Value<'a> {
        let op = "tpu.pack_elementwise";
        let Some(ty) = tiles.first().map(|tile| tile.ty()) else {
            self.fail(op, "no tiles".into());
            return self.placeholder_of(Element::I32, &[]);
        };
        let is_full = ty.element.bits() == 32 && tiles.len() * to.bits() == 32;
        if !is_full || ty.element.is_float() != to.is_float() || tiles.iter().any(|tile| tile.ty() != ty) {
            let all: Vec<_> = tiles.iter().map(|tile| tile.ty().to_string()).collect();
            self.fail(op, format!("{} to {to}", all.join(", ")));
            return self.placeholder_of(Element::I32, &ty.dims);
        }
        let operands: Vec<_> = tiles.iter().map(|tile| tile.raw).collect();
        let target = TypeAttribute::new(element_type(self.context, to)).into();
        let result = vector_type(self.context, Element::I32, &ty.dims);
        self.emit_one(op, &operands, &[("target_type", target)], result, self.here())
    }

    /// `accumulator + lhs x rhs`, `[m, k] x [k, n]`.
    #[track_caller]
    pub fn matmul(&'a self, lhs: Value<'a>, rhs: Value<'a>, accumulator: Value<'a>) -> Value<'a> {
        self.dot_general(lhs, rhs, accumulator, &DotDims::nn(), Precision::Default)
    }

    /// `accumulator + lhs x rhs^T`, `[m, k] x [n, k]`.
    #[track_caller]
    pub fn matmul_nt(&'a self, lhs: Value<'a>, rhs: Value<'a>, accumulator: Value<'a>) -> Value<'a> {
        self.dot_general(lhs, rhs, accumulator, &DotDims::nt(), Precision::Default)
    }

    /// `accumulator + lhs x rhs` on the MXU over any dimensions; the accumulator is f32 (i32 for i8 operands).
    #[track_caller]
    pub fn dot_general(
        &'a self,
        lhs: Value<'a>,
        rhs: Value<'a>,
        accumulator: Value<'a>,
        dims: &DotDims,
        precision: Precision,
    ) -> Value<'a> {
        let op = "tpu.matmul";
        let (left, right, sum) = (lhs.ty(), rhs.ty(), accumulator.ty());
        let accumulates = match left.element {
            Element::Bf16 | Element::F32 | Element::F8E4M3Fn | Element::F8E5M2 => Element::F32,
            Element::I8 => Element::I32,
            other => {
                self.fail(op, format!("the MXU multiplies bf16, f32, fp8 and i8, not {other}"));
                return accumulator;
            }
        };
        let message = match dims.result(&left.dims, &right.dims) {
            Err(message) => message,
            Ok(_) if left.element != right.element => "cast one side".into(),
            Ok(result) if sum == TensorType::new(accumulates, &result) => {
                let numbers = self.attribute(op, &dims.attribute(left.rank(), right.rank()));
                let not = |key| (key, BoolAttribute::new(self.context, false).into());
                let mut attributes = vec![("dimension_numbers", numbers)];
                attributes.extend(["transpose_lhs", "transpose_lhs_hint", "transpose_rhs"].map(not));
                if precision == Precision::Fp32 {
                    attributes.push(("precision", self.attribute(op, "#tpu.contract_precision<fp32>")));
                }
                let operands = [lhs.raw, rhs.raw, accumulator.raw];
                return self.emit_one(op, &operands, &attributes, accumulator.mlir_type(), self.here());
            }
            Ok(result) => format!("the accumulator must be {}", TensorType::new(accumulates, &result)),
        };
        self.fail(op, format!("{left} x {right} + {sum}: {message}"));
        accumulator
    }

    /// The tiles after each other along `dim`.
    #[track_caller]
    pub fn concatenate(&'a self, tiles: &[Value<'a>], dim: usize) -> Value<'a> {
        let op = "tpu.concatenate";
        let Some(first) = tiles.first() else {
            self.fail(op, "no tiles".into());
            return self.zeros(Element::F32, &[1]);
        };
        let mut result = first.ty();
        for tile in &tiles[1..] {
            let tile = tile.ty();
            let fits = tile.element == result.element
                && tile.rank() == result.rank()
                && (0..tile.rank()).all(|other| other == dim || tile.dims[other] == result.dims[other]);
            if !fits || dim >= tile.rank() {
                self.fail(op, format!("{tile} behind {} along dimension {dim}", first.ty()));
                return *first;
            }
            result.dims[dim] += tile.dims[dim];
        }
        if tiles.len() == 1 {
            return *first;
        }
        let operands: Vec<_> = tiles.iter().map(|tile| tile.raw).collect();
        let dimension = IntegerAttribute::new(self.i32_type(), dim as i64).into();
        let result = vector_type(self.context, result.element, &result.dims);
        self.emit_one(op, &operands, &[("dimension", dimension)], result, self.here())
    }

    /// A literal as a constant of the given type; a scalar value is broadcast, a tile stays.
    #[track_caller]
    pub(super) fn splat_literal(
        &'a self,
        op: &str,
        element: Element,
        dims: &[usize],
        literal: Literal<'a>,
    ) -> Value<'a> {
        let number = match literal {
            Literal::Value(value) => return value.broadcast_to(dims),
            Literal::Int(value) => value as f64,
            Literal::Float(value) => value,
        };
        let scalar = element_type(self.context, element);
        let exact = element.is_float() || number.fract() == 0.0;
        if !exact {
            self.fail(op, format!("{number} is not {element}"));
        }
        let attribute: Attribute<'a> = match (element.is_float(), literal) {
            (true, _) => FloatAttribute::new(self.context, scalar, number).into(),
            (false, Literal::Int(value)) => IntegerAttribute::new(scalar, value).into(),
            (false, _) => IntegerAttribute::new(scalar, number as i64).into(),
        };
        let r#type = vector_type(self.context, element, dims);
        let attribute = match dims {
            [] => attribute,
            _ => DenseElementsAttribute::splat(r#type, attribute).into(),
        };
        self.emit_one("arith.constant", &[], &[("value", attribute)], r#type, self.here())
    }

    /// A scalar `i32` for `op`.
    #[track_caller]
    pub(super) fn scalar_i32(&'a self, op: &str, literal: Literal<'a>) -> Value<'a> {
        match literal {
            Literal::Value(value) if value.ty() == TensorType::scalar(Element::I32) => value,
            Literal::Value(value) => {
                self.fail(op, format!("{} where a scalar i32 is needed", value.ty()));
                self.int(0)
            }
            literal => self.splat_literal(op, Element::I32, &[], literal),
        }
    }

    /// An `index` for a load or store.
    #[track_caller]
    pub(super) fn index(&'a self, op: &str, literal: Literal<'a>) -> mlir_sys::MlirValue {
        let index = Type::index(self.context);
        let location: Location<'a> = self.here();
        match literal {
            Literal::Int(value) => {
                let value = IntegerAttribute::new(index, value).into();
                self.emit("arith.constant", &[], &[("value", value)], &[index], vec![], location)[0]
            }
            literal => {
                let value = self.scalar_i32(op, literal);
                self.emit("arith.index_cast", &[value.raw], &[], &[index], vec![], location)[0]
            }
        }
    }
}

macro_rules! operators {
    ($($trait:ident :: $method:ident => $float:literal, $integer:literal;)*) => {$(
        impl<'a, R: IntoOperand<'a>> $trait<R> for Value<'a> {
            type Output = Value<'a>;

            #[track_caller]
            fn $method(self, rhs: R) -> Value<'a> {
                self.binary(rhs, $float, $integer)
            }
        }
    )*};
}

operators! {
    Add::add => "arith.addf", "arith.addi";
    Sub::sub => "arith.subf", "arith.subi";
    Mul::mul => "arith.mulf", "arith.muli";
    Div::div => "arith.divf", "arith.divsi";
    Rem::rem => "arith.remf", "arith.remsi";
    BitAnd::bitand => "", "arith.andi";
    BitOr::bitor => "", "arith.ori";
    BitXor::bitxor => "", "arith.xori";
    Shl::shl => "", "arith.shli";
    Shr::shr => "", "arith.shrsi";
}

macro_rules! literal_left {
    ($($rust:ty),*) => {$(
        literal_left! { @ $rust, Add::add, Sub::sub, Mul::mul, Div::div, Rem::rem }
    )*};
    (@ $rust:ty, $($trait:ident :: $method:ident),*) => {$(
        impl<'a> $trait<Value<'a>> for $rust {
            type Output = Value<'a>;

            #[track_caller]
            fn $method(self, rhs: Value<'a>) -> Value<'a> {
                let lhs = rhs.coerce("arith.constant", self.literal());
                lhs.$method(rhs)
            }
        }
    )*};
}

literal_left!(i32, i64, usize, f32, f64);

impl<'a> Neg for Value<'a> {
    type Output = Value<'a>;

    #[track_caller]
    fn neg(self) -> Value<'a> {
        if self.element().is_float() { self.unary("arith.negf") } else { 0 - self }
    }
}

impl<'a> Not for Value<'a> {
    type Output = Value<'a>;

    #[track_caller]
    fn not(self) -> Value<'a> {
        self ^ -1
    }
}
