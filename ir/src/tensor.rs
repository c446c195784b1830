//! Dense arrays in host memory: what goes into and comes out of a plugin, the tile machine and the references.
//!
//! Invariant: `bytes.len() == dims.product() * element.bytes()`, row-major, 64-byte aligned (so that a plugin on the
//! CPU can use the memory as it is, and any element type can be viewed in place).

use std::fmt;

use half::{bf16, f16};

use crate::element::{Element, Native};

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

    /// A float array of type `element`, each value rounded to nearest even.
    ///
    /// # Panics
    /// When `element` is not a float type, or `values` does not hold exactly `dims.product()` elements.
    pub fn from_f64(element: Element, dims: &[usize], values: &[f64]) -> Self {
        match element {
            Element::F64 => Self::new(dims, values),
            Element::F32 => Self::new(dims, &values.iter().map(|&v| v as f32).collect::<Vec<_>>()),
            Element::Bf16 => Self::new(dims, &values.iter().map(|&v| bf16::from_f32(to_odd(v))).collect::<Vec<_>>()),
            Element::F16 => Self::new(dims, &values.iter().map(|&v| f16::from_f32(to_odd(v))).collect::<Vec<_>>()),
            other => panic!("{other} is not a float type"),
        }
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
    /// When `T` is not stored like this array's element type (`u8` also views `Pred`).
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
        let viewed = if self.element == Element::Pred { Element::U8 } else { self.element };
        assert_eq!(T::ELEMENT, viewed, "a {} array viewed as {}", self.element, T::ELEMENT);
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
