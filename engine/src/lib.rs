//! The engine: models from Hugging Face files, settings, continuous batching over paged KV, and output that survives crashes.
pub mod config;
pub mod error;
pub mod hosts;
pub mod model;
pub mod output;
pub mod pages;
pub mod scheduler;
pub mod stop;
pub mod units;

pub use error::{Error, Result};
