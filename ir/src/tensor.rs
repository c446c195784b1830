//! Dense arrays in host memory: what goes into and comes out of a plugin, the tile machine and the references.
//!
//! Invariant: `bytes.len() == dims.product() * element.bytes()`, row-major, 64-byte aligned (so that a plugin on the
//! CPU can use the memory as it is, and any element type can be viewed in place).

use std::fmt;

use half::{bf16, f16};

use crate::{
    element::{Element, Native},
    minifloat::Minifloat,
};

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A dense row-major array with a dynamic element type.
#[derive(Clone)]
pub struct HostTensor {
    element: Element,
    dims: Vec<usize>,
    lines: Vec<Line>,
    len_bytes: usize,
}

impl HostTensor {
    /// An array of zeros.
    pub fn zeros(element: Element, dims: &[usize]) -> Self {
        let len_bytes = dims.iter().product::<usize>() * element.bytes();
        Self { element, dims: dims.to_vec(), lines: vec![Line([0; 64]); len_bytes.div_ceil(64)], len_bytes }
    }

    /// An array with the given values, row-major.
    ///
    /// # Panics
    /// When `values` does not hold exactly `dims.product()` elements.
    pub fn new<T: Native>(dims: &[usize], values: &[T]) -> Self {
        assert_eq!(values.len(), dims.iter().product::<usize>(), "{} values for dims {dims:?}", values.len());
        let mut tensor = Self::zeros(T::ELEMENT, dims);
        tensor.as_mut_slice::<T>().copy_from_slice(values);
        tensor
    }

    /// A scalar.
    pub fn scalar<T: Native>(value: T) -> Self {
        Self::new(&[], &[value])
    }

    /// An array from raw little-endian bytes.
    ///
    /// # Panics
    /// When the number of bytes does not fit `element` and `dims`.
    pub fn from_bytes(element: Element, dims: &[usize], bytes: &[u8]) -> Self {
        let mut tensor = Self::zeros(element, dims);
        tensor.bytes_mut().copy_from_slice(bytes);
        tensor
    }

    /// An array of type `element`. As XLA converts: floats are rounded to nearest even (what is too large for one of 8 bits is
    /// an infinity, or NaN where it has none); integers are truncated, and saturate where their type ends (NaN is 0); `pred`
    /// is whether a number is not 0.
    ///
    /// # Panics
    /// When `values` does not hold exactly `dims.product()` elements.
    pub fn from_f64(element: Element, dims: &[usize], values: &[f64]) -> Self {
        macro_rules! cast {
            ($type:ty) => {
                Self::new(dims, &values.iter().map(|&v| v as $type).collect::<Vec<_>>())
            };
        }
        let codes = |code: &dyn Fn(f64) -> u8| {
            let codes: Vec<u8> = values.iter().map(|&v| code(v)).collect();
            Self::new(dims, &codes).reinterpreted(element)
        };
        match element {
            Element::Pred => codes(&|v| u8::from(v != 0.0)),
            Element::I2 => codes(&|v| (v.trunc().clamp(-2.0, 1.0) as i8 & 0x3) as u8),
            Element::I4 => codes(&|v| (v.trunc().clamp(-8.0, 7.0) as i8 & 0xf) as u8),
            Element::I8 => cast!(i8),
            Element::I16 => cast!(i16),
            Element::I32 => cast!(i32),
            Element::I64 => cast!(i64),
            Element::U2 => codes(&|v| v.clamp(0.0, 3.0) as u8),
            Element::U4 => codes(&|v| v.clamp(0.0, 15.0) as u8),
            Element::U8 => cast!(u8),
            Element::U16 => cast!(u16),
            Element::U32 => cast!(u32),
            Element::U64 => cast!(u64),
            Element::F8E4M3Fn => codes(&|v| Minifloat::F8E4M3FN.encode(v)),
            Element::F8E4M3B11Fnuz => codes(&|v| Minifloat::F8E4M3B11FNUZ.encode(v)),
            Element::F8E5M2 => codes(&|v| Minifloat::F8E5M2.encode(v)),
            Element::F8E8M0Fnu => codes(&|v| Minifloat::F8E8M0FNU.encode(v)),
            Element::Bf16 => Self::new(dims, &values.iter().map(|&v| bf16::from_f32(to_odd(v))).collect::<Vec<_>>()),
            Element::F16 => Self::new(dims, &values.iter().map(|&v| f16::from_f32(to_odd(v))).collect::<Vec<_>>()),
            Element::F32 => cast!(f32),
            Element::F64 => Self::new(dims, values),
        }
    }

    /// The same values as elements of another type, converted as [`from_f64`](Self::from_f64) does.
    pub fn converted(&self, element: Element) -> Self {
        if element == self.element { self.clone() } else { Self::from_f64(element, &self.dims, &self.to_f64()) }
    }

    /// The same bytes as elements of another type.
    ///
    /// # Panics
    /// When `element` is not as wide as the array's own type.
    pub fn reinterpreted(self, element: Element) -> Self {
        assert_eq!(element.bytes(), self.element.bytes(), "{} as {element}", self.element);
        Self { element, ..self }
    }

    /// Every value as f64 (exact for all types but 64-bit integers beyond 2^53).
    pub fn to_f64(&self) -> Vec<f64> {
        match self.element {
            Element::Pred => self.bytes().iter().map(|&v| f64::from(v)).collect(),
            Element::I2 => self.bytes().iter().map(|&v| f64::from((v << 6).cast_signed() >> 6)).collect(),
            Element::I4 => self.bytes().iter().map(|&v| f64::from((v << 4).cast_signed() >> 4)).collect(),
            Element::U2 => self.bytes().iter().map(|&v| f64::from(v & 0x3)).collect(),
            Element::U4 => self.bytes().iter().map(|&v| f64::from(v & 0xf)).collect(),
            Element::F8E4M3Fn | Element::F8E4M3B11Fnuz | Element::F8E5M2 | Element::F8E8M0Fnu => {
                let format = self.element.minifloat().unwrap_or(Minifloat::F8E5M2);
                self.bytes().iter().map(|&v| f64::from(format.decode(v))).collect()
            }
            Element::I8 => self.as_slice::<i8>().iter().map(|&v| f64::from(v)).collect(),
            Element::I16 => self.as_slice::<i16>().iter().map(|&v| f64::from(v)).collect(),
            Element::I32 => self.as_slice::<i32>().iter().map(|&v| f64::from(v)).collect(),
            Element::I64 => self.as_slice::<i64>().iter().map(|&v| v as f64).collect(),
            Element::U8 => self.as_slice::<u8>().iter().map(|&v| f64::from(v)).collect(),
            Element::U16 => self.as_slice::<u16>().iter().map(|&v| f64::from(v)).collect(),
            Element::U32 => self.as_slice::<u32>().iter().map(|&v| f64::from(v)).collect(),
            Element::U64 => self.as_slice::<u64>().iter().map(|&v| v as f64).collect(),
            Element::Bf16 => self.as_slice::<bf16>().iter().map(|v| v.to_f64()).collect(),
            Element::F16 => self.as_slice::<f16>().iter().map(|v| v.to_f64()).collect(),
            Element::F32 => self.as_slice::<f32>().iter().map(|&v| f64::from(v)).collect(),
            Element::F64 => self.as_slice::<f64>().to_vec(),
        }
    }

    /// The element type.
    pub fn element(&self) -> Element {
        self.element
    }

    /// The size of each dimension.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len_bytes / self.element.bytes()
    }

    /// Whether the array has no elements.
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// The raw bytes, row-major.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `lines` holds at least `len_bytes` initialised bytes.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len_bytes) }
    }

    /// The raw bytes, row-major, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len_bytes) }
    }

    /// The elements, row-major.
    ///
    /// # Panics
    /// When `T` is not stored like this array's element type (`u8` also views the codes of what Rust has no type for:
    /// `Pred`, floats of 8 bits and integers of less).
    pub fn as_slice<T: Native>(&self) -> &[T] {
        self.assert_native::<T>();
        // SAFETY: the memory is 64-byte aligned, holds `len()` elements, and every bit pattern is a valid `T`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len()) }
    }

    /// The elements, row-major, for writing.
    ///
    /// # Panics
    /// As [`as_slice`](Self::as_slice).
    pub fn as_mut_slice<T: Native>(&mut self) -> &mut [T] {
        self.assert_native::<T>();
        // SAFETY: as in `as_slice`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len()) }
    }

    fn assert_native<T: Native>(&self) {
        assert_eq!(T::ELEMENT, self.element.viewed(), "a {} array viewed as {}", self.element, T::ELEMENT);
    }
}

/// `x` as f32, rounded to the odd one of its neighbours where it is none: rounding that to a type of 22 bits or less gives what
/// rounding `x` would. (Crate `half` drops the last bits of an f64 first, and takes what lies just above a tie for one.)
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if !nearest.is_finite() || f64::from(nearest) == x {
        return nearest;
    }
    let toward_zero = if f64::from(nearest).abs() > x.abs() { nearest.to_bits() - 1 } else { nearest.to_bits() };
    f32::from_bits(toward_zero | 1)
}

impl PartialEq for HostTensor {
    /// Bitwise equality: type, dimensions and every byte.
    fn eq(&self, other: &Self) -> bool {
        self.element == other.element && self.dims == other.dims && self.bytes() == other.bytes()
    }
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?} ", self.element, self.dims)?;
        let values = self.to_f64();
        f.debug_list().entries(values.iter().take(16)).finish()?;
        if values.len() > 16 { write!(f, " and {} more", values.len() - 16) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_holds_what_it_can_of_a_number() {
        let values = [0.0, 1.0, -1.0, 2.5, -2.5, 300.0, -300.0, f64::NAN];
        let whole =
            |low: f64, high: f64| values.map(|v: f64| if v.is_nan() { 0.0 } else { v.trunc().clamp(low, high) });
        for (element, expected) in [
            (Element::I2, whole(-2.0, 1.0)),
            (Element::U2, whole(0.0, 3.0)),
            (Element::I4, whole(-8.0, 7.0)),
            (Element::U4, whole(0.0, 15.0)),
            (Element::I8, whole(-128.0, 127.0)),
            (Element::U8, whole(0.0, 255.0)),
            (Element::I16, whole(-300.0, 300.0)),
            (Element::F8E4M3Fn, [0.0, 1.0, -1.0, 2.5, -2.5, 288.0, -288.0, f64::NAN]),
            (Element::F8E5M2, [0.0, 1.0, -1.0, 2.5, -2.5, 320.0, -320.0, f64::NAN]),
            (Element::F8E4M3B11Fnuz, [0.0, 1.0, -1.0, 2.5, -2.5, f64::NAN, f64::NAN, f64::NAN]),
            (Element::F16, values),
        ] {
            let tensor = HostTensor::from_f64(element, &[8], &values);
            let same = |(a, b): (&f64, &f64)| a == b || (a.is_nan() && b.is_nan());
            assert!(tensor.to_f64().iter().zip(&expected).all(same), "{tensor:?}, not {expected:?}");
            assert_eq!(tensor.converted(element), tensor);
        }
    }
}
