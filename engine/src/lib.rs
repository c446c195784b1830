//! Engine.
pub mod config;
pub mod error;
pub mod model;
pub mod pages;
pub mod scheduler;
pub mod stop;
pub mod units;

pub use error::{Error, Result};
