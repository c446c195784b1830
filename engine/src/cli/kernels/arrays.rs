//! Arrays from NumPy's `.npy` files.

use std::path::Path;

use npyz::{DType, Endianness, NpyFile, Order, TypeChar};
use pagoda_ir::{Element, HostTensor, TensorType};

use crate::error::{Error, Result};

/// Reads an array of type `ty`. Floats of another type are rounded to it. What `ml_dtypes` adds to NumPy (bfloat16, 8-bit
/// floats, 4-bit and 2-bit integers) is saved as bytes without a name, which are taken for `ty` where their width fits.
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
        // What NumPy writes for arrays of `ml_dtypes`.
        (TypeChar::Float, 1) => Some(Element::F8E5M2),
        (TypeChar::RawData, 2) => Some(Element::Bf16),
        (TypeChar::RawData, 1) if ty.element.bits() < 8 || ty.element.minifloat().is_some() => Some(ty.element),
        _ => None,
    };
    let found = element.map_or(dtype.to_string(), |element| element.to_string());
    let found = format!("{found}{:?}", file.shape());
    let dims = ty.dims.iter().map(|&size| size as u64);
    // NumPy has no integers of less than 8 bits.
    let narrow = |element: Element| ty.element.bits() < 8 && element.bits() == 8 && element.is_integer();
    let same_kind =
        |element: Element| element == ty.element || (element.is_float() && ty.element.is_float()) || narrow(element);
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
    Ok(HostTensor::from_bytes(element, &ty.dims, data).converted(ty.element))
}

/// NumPy's name of the type to save.
fn numpy(element: Element) -> &'static str {
    match element {
        Element::Pred => "bool",
        Element::I2 | Element::I4 | Element::I8 => "int8",
        Element::I16 => "int16",
        Element::I32 => "int32",
        Element::I64 => "int64",
        Element::U2 | Element::U4 | Element::U8 => "uint8",
        Element::U16 => "uint16",
        Element::U32 => "uint32",
        Element::U64 => "uint64",
        Element::F16 => "float16",
        Element::F8E4M3Fn | Element::F8E4M3B11Fnuz | Element::F8E5M2 | Element::Bf16 | Element::F32 => "float32",
        Element::F64 => "float64",
    }
}
