//! Pagoda's kernels: each as problem, plan, emissions and independent reference, behind one trait.
//!
//! A [`Problem`] holds validated shapes and types: an invalid one cannot be built. A [`Plan`] names every tile and every
//! VMEM buffer of a kernel on a chip. An *emission* writes the kernel down for a compiler. A *reference* computes it in f64,
//! from the definition, and shares no code with any emission. [`check()`] and [`check_mosaic`] compare the two. All of this
//! is the trait [`Kernel`]; the kernels that exist stand in the [`registry`].
//!
//! This crate knows no device, no plugin and no file.
pub mod check;
pub mod chips;
pub mod choices;
#[cfg(feature = "cli")]
pub mod cli;
pub mod cost;
pub mod drawn;
pub mod error;
pub mod evidence;
pub mod float;
pub mod grouped_matmul;
pub mod kernel;
pub mod matmul;
pub mod mutants;
pub mod named;
pub mod plan;
pub mod problem;
pub mod random;
pub mod rates;
pub mod registry;
pub mod report;
pub mod rms_norm;
pub mod rpa;
pub mod simd;
#[cfg(any(test, feature = "strategies"))]
pub mod strategies;
pub mod threads;
pub mod vmem;

pub use check::{Case, CheckError, Runner, check, check_mosaic};
pub use choices::Choices;
pub use drawn::Drawn;
pub use error::Invalid;
pub use kernel::Kernel;
pub use named::{Argument, Arguments, Arrays, Named};
pub use plan::{Options, Plan, PlanError};
pub use problem::Problem;
pub use report::Planned;
