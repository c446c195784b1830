//! Static tensor types: an element type and a size per dimension.

use std::fmt;

use melior::ir::{
    Attribute, Type, TypeLike,
    r#type::{DimSize, IntegerType, RankedTensorType, ShapedTypeLike},
};

use crate::element::Element;

/// The type of a dense array of known size, written `f32[8,128]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// The element type.
    pub element: Element,
    /// The size of each dimension, major to minor; empty for a scalar.
    pub dims: Vec<usize>,
}

impl TensorType {
    /// The type of arrays of `element` with sizes `dims`.
    pub fn new(element: Element, dims: &[usize]) -> Self {
        Self { element, dims: dims.to_vec() }
    }

    /// A scalar's type.
    pub fn scalar(element: Element) -> Self {
        Self::new(element, &[])
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of an array of this type in host memory.
    pub fn bytes(&self) -> usize {
        self.len() * self.element.bytes()
    }

    /// The MLIR type `tensor<8x128xf32>`.
    pub fn to_mlir<'c>(&self, context: &'c melior::Context) -> Type<'c> {
        let dims: Vec<u64> = self.dims.iter().map(|&size| size as u64).collect();
        RankedTensorType::new(&dims, element_type(context, self.element), None::<Attribute>).into()
    }

    /// The type that an MLIR tensor type stands for; `None` for dynamic sizes and for elements that [`Element`] lacks.
    pub fn from_mlir(r#type: Type) -> Option<Self> {
        let tensor = RankedTensorType::try_from(r#type).ok()?;
        let size = |index| match tensor.dim_size(index) {
            Ok(DimSize::Static(size)) => Some(size as usize),
            _ => None,
        };
        let dims = (0..tensor.rank()).map(size).collect::<Option<Vec<_>>>()?;
        Some(Self { element: element_of(tensor.element())?, dims })
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.element)?;
        for (index, size) in self.dims.iter().enumerate() {
            write!(f, "{}{size}", if index == 0 { "" } else { "," })?;
        }
        f.write_str("]")
    }
}

/// The MLIR type of one element.
pub fn element_type(context: &melior::Context, element: Element) -> Type<'_> {
    match element {
        Element::Pred => IntegerType::new(context, 1).into(),
        Element::Bf16 => Type::bfloat16(context),
        Element::F16 => Type::float16(context),
        Element::F32 => Type::float32(context),
        Element::F64 => Type::float64(context),
        element if element.minifloat().is_some() => {
            Type::parse(context, element.mlir()).expect("a builtin type of MLIR")
        }
        element if element.is_signed() => IntegerType::new(context, element.bits() as u32).into(),
        element => IntegerType::unsigned(context, element.bits() as u32).into(),
    }
}

/// The element that an MLIR type stands for.
pub fn element_of(r#type: Type) -> Option<Element> {
    if r#type.is_bf16() {
        return Some(Element::Bf16);
    } else if r#type.is_f16() {
        return Some(Element::F16);
    } else if r#type.is_f32() {
        return Some(Element::F32);
    } else if r#type.is_f64() {
        return Some(Element::F64);
    }
    // SAFETY: the type is valid.
    let is = |of: unsafe extern "C" fn(mlir_sys::MlirType) -> bool| unsafe { of(r#type.to_raw()) };
    if is(mlir_sys::mlirTypeIsAFloat8E4M3FN) {
        return Some(Element::F8E4M3Fn);
    } else if is(mlir_sys::mlirTypeIsAFloat8E4M3B11FNUZ) {
        return Some(Element::F8E4M3B11Fnuz);
    } else if is(mlir_sys::mlirTypeIsAFloat8E5M2) {
        return Some(Element::F8E5M2);
    } else if is(mlir_sys::mlirTypeIsAFloat8E8M0FNU) {
        return Some(Element::F8E8M0Fnu);
    }
    let integer = IntegerType::try_from(r#type).ok()?;
    match (integer.is_unsigned(), integer.width()) {
        (false, 1) => Some(Element::Pred),
        (false, 2) => Some(Element::I2),
        (false, 4) => Some(Element::I4),
        (false, 8) => Some(Element::I8),
        (false, 16) => Some(Element::I16),
        (false, 32) => Some(Element::I32),
        (false, 64) => Some(Element::I64),
        (true, 2) => Some(Element::U2),
        (true, 4) => Some(Element::U4),
        (true, 8) => Some(Element::U8),
        (true, 16) => Some(Element::U16),
        (true, 32) => Some(Element::U32),
        (true, 64) => Some(Element::U64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::Context;

    #[test]
    fn every_element_survives_the_way_through_mlir() {
        let context = Context::new();
        for element in Element::ALL {
            let r#type = TensorType::new(element, &[3, 0, 5]);
            let mlir = r#type.to_mlir(context.melior());
            assert_eq!(mlir.to_string(), format!("tensor<3x0x5x{}>", element.mlir()));
            assert_eq!(TensorType::from_mlir(mlir), Some(r#type));
        }
    }

    #[test]
    fn dynamic_and_foreign_types_have_no_tensor_type() {
        let context = Context::new();
        for text in ["tensor<?xf32>", "tensor<2xf8E3M4>", "f32", "tensor<*xf32>"] {
            assert_eq!(TensorType::from_mlir(Type::parse(context.melior(), text).unwrap()), None, "{text}");
        }
    }

    #[test]
    fn prints_as_hlo_does() {
        assert_eq!(TensorType::new(Element::F32, &[8, 128]).to_string(), "f32[8,128]");
        assert_eq!(TensorType::scalar(Element::Pred).to_string(), "pred[]");
    }
}
