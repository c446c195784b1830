//! Pagoda's kernels: matmul and ragged paged attention, each as problem, emission and independent reference.
//!
//! A *problem* holds validated shapes and types: an invalid one cannot be built. An *emission* writes it down for a
//! compiler. A *reference* computes it in f64, from the definition, and shares no code with any emission. [`check()`] runs
//! an emission through a [`Runner`] and holds it against the reference.
//!
//! This crate knows no device, no plugin and no file.
pub mod check;
pub mod chips;
pub mod error;
pub mod float;
pub mod matmul;
pub mod plan;
pub mod random;
pub mod rpa;
#[cfg(any(test, feature = "strategies"))]
pub mod strategies;
pub mod threads;
pub mod tuned;
pub mod vmem;

pub use check::{Case, CheckError, MosaicCase, Runner, check, check_mosaic};
pub use error::Invalid;
