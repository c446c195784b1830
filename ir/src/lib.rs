//! MLIR for Pagoda, through `melior`.
pub mod element;
pub mod tensor;
