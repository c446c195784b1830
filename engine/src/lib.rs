//! Engine.
pub mod error;
pub mod pages;
pub mod scheduler;
pub mod stop;
pub mod units;

pub use error::{Error, Result};
