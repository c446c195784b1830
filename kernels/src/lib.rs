//! Pagoda's kernels.
pub mod chips;
pub mod error;
pub mod matmul;
pub mod vmem;

pub use error::Invalid;
