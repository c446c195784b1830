//! Arrays from NumPy's `.npy` files.

use std::path::Path;

use npyz::{DType, Endianness, NpyFile, Order, TypeChar};
use pagoda_ir::{Element, HostTensor, TensorType};

use crate::error::{Error, Result};

/// Reads an array of type `ty`. Floats of another width are rounded to it (NumPy has no bfloat16: give f32).
///
/// # Errors
/// When the file cannot be read, is no `.npy` file, or holds another shape or kind of elements.
pub(super) fn read(path: &Path, ty: &TensorType) -> Result<HostTensor> {
    let bad = |problem: String, fix: &str| Error::file(path, problem, fix);
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let file = NpyFile::new(&bytes[..])
        .map_err(|error| bad(format!("it is no .npy file: {error}"), "write it with numpy.save"))?;
    let DType::Plain(dtype) = file.dtype() else {
        return Err(bad(format!("it holds records ({})", file.dtype().descr()), "save a plain array"));
    };
    let element = match (dtype.type_char(), dtype.size_field()) {
        (TypeChar::Float, 2) => Some(Element::F16),
        (TypeChar::Float, 4) => Some(Element::F32),
        (TypeChar::Float, 8) => Some(Element::F64),
        (TypeChar::Int, 1) => Some(Element::I8),
        (TypeChar::Int, 2) => Some(Element::I16),
        (TypeChar::Int, 4) => Some(Element::I32),
        (TypeChar::Int, 8) => Some(Element::I64),
        (TypeChar::Uint, 1) => Some(Element::U8),
        (TypeChar::Uint, 2) => Some(Element::U16),
        (TypeChar::Uint, 4) => Some(Element::U32),
        (TypeChar::Uint, 8) => Some(Element::U64),
        (TypeChar::Bool, 1) => Some(Element::Pred),
        // What NumPy writes for arrays of `ml_dtypes.bfloat16`.
        (TypeChar::RawData, 2) => Some(Element::Bf16),
        _ => None,
    };
    let found = element.map_or(dtype.to_string(), |element| element.to_string());
    let found = format!("{found}{:?}", file.shape());
    let dims = ty.dims.iter().map(|&size| size as u64);
    let same_kind = |element: Element| element == ty.element || (element.is_float() && ty.element.is_float());
    let Some(element) = element.filter(|&element| same_kind(element) && dims.eq(file.shape().iter().copied())) else {
        let fix = format!("save an array of this shape with numpy dtype {}", numpy(ty.element));
        return Err(bad(format!("it holds {found}, not {ty}"), &fix));
    };
    if file.order() == Order::Fortran && ty.rank() > 1 || dtype.endianness() == Endianness::Big {
        return Err(bad("it is not row-major little-endian".into(), "save numpy.ascontiguousarray of it"));
    }
    let data = file.into_inner();
    if data.len() != ty.len() * element.bytes() {
        let problem = format!("it holds {} bytes of the {} of {found}", data.len(), ty.len() * element.bytes());
        return Err(bad(problem, "copy the file again"));
    }
    let tensor = HostTensor::from_bytes(element, &ty.dims, data);
    Ok(if element == ty.element { tensor } else { HostTensor::from_f64(ty.element, &ty.dims, &tensor.to_f64()) })
}

/// NumPy's name of the type to save.
fn numpy(element: Element) -> &'static str {
    match element {
        Element::Pred => "bool",
        Element::I8 => "int8",
        Element::I16 => "int16",
        Element::I32 => "int32",
        Element::I64 => "int64",
        Element::U8 => "uint8",
        Element::U16 => "uint16",
        Element::U32 => "uint32",
        Element::U64 => "uint64",
        Element::F16 => "float16",
        Element::Bf16 | Element::F32 => "float32",
        Element::F64 => "float64",
    }
}
