//! MLIR for Pagoda, through `melior`: what can be said about arrays, and how it is written down for a compiler.
//!
//! [`stablehlo`] builds whole programs for any PJRT plugin. This crate knows dialects, shapes and element types; it
//! knows no kernel, no device and no file.
pub mod bytes;
pub mod chrome_trace;
pub mod context;
pub mod element;
pub mod error;
pub mod minifloat;
pub mod mosaic;
pub mod random;
pub mod shape;
pub mod stablehlo;
pub mod tensor;
pub mod tile_machine;

pub use bytes::Bytes;
pub use context::Context;
pub use element::Element;
pub use error::{Error, Result};
pub use shape::TensorType;
pub use tensor::HostTensor;
