//! Arrays from NumPy's `.npy` files, and back.

use std::io::Write as _;
use std::path::Path;

use npyz::{DType, Endianness, NpyFile, Order, TypeChar};
use pagoda_ir::{Element, HostTensor, TensorType};

use crate::error::{Error, Result};
use crate::output::write_atomically;

/// Reads an array of type `ty`. Floats of another type are rounded to it. What `ml_dtypes` adds to NumPy (bfloat16, 8-bit
/// floats, 4-bit and 2-bit integers) is saved as bytes without a name, which are taken for `ty` where their width fits.
///
/// # Errors
/// When the file cannot be read, is no `.npy` file, or holds another shape or kind of elements.
pub(super) fn read(path: &Path, ty: &TensorType) -> Result<HostTensor> {
    Ok(read_as_saved(path, ty)?.converted(ty.element))
}

/// Reads an array of the sizes of `ty` and its kind of elements: floats of any width are left as they are.
///
/// # Errors
/// As [`read`].
pub(super) fn read_as_saved(path: &Path, ty: &TensorType) -> Result<HostTensor> {
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
    Ok(HostTensor::from_bytes(element, &ty.dims, data))
}

/// The sizes of the array in a file, if they can be read.
pub(super) fn sizes(path: &Path) -> Option<Vec<usize>> {
    let bytes = std::fs::read(path).ok()?;
    let file = NpyFile::new(&bytes[..]).ok()?;
    file.shape().iter().map(|&size| usize::try_from(size).ok()).collect()
}

/// Writes an array, whole or not at all. What NumPy has no type for is widened: bf16 and narrower floats to
/// float32, narrow integers to 8 bits.
///
/// # Errors
/// When the file cannot be written.
pub(super) fn write(path: &Path, array: &HostTensor) -> Result<()> {
    let wide = match array.element() {
        element if numpy(element) == "float32" => Element::F32,
        element if numpy(element) == "int8" => Element::I8,
        element if numpy(element) == "uint8" => Element::U8,
        element => element,
    };
    let widened = (wide != array.element()).then(|| array.clone().converted(wide));
    let array = widened.as_ref().unwrap_or(array);
    let kind = match array.element() {
        Element::Pred => 'b',
        element if element.is_float() => 'f',
        element if element.mlir().starts_with("ui") => 'u',
        _ => 'i',
    };
    let sizes: Vec<String> = array.dims().iter().map(usize::to_string).collect();
    let shape = if let [size] = sizes.as_slice() { format!("{size},") } else { sizes.join(", ") };
    let descr = format!("{}{kind}{}", if array.element().bytes() == 1 { '|' } else { '<' }, array.element().bytes());
    // Version 1.0 of the format: the header is filled up with spaces to a multiple of 64 bytes.
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    let length = (10 + header.len() + 1).next_multiple_of(64) - 10;
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((length as u16).to_le_bytes());
    writeln!(bytes, "{header:<width$}", width = length - 1).map_err(Error::io("write", path))?;
    bytes.extend(array.bytes());
    write_atomically(path, &bytes)
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
        Element::F8E4M3Fn | Element::F8E4M3B11Fnuz | Element::F8E5M2 | Element::F8E8M0Fnu => "float32",
        Element::Bf16 | Element::F32 => "float32",
        Element::F64 => "float64",
    }
}
