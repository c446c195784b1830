//! Models from Hugging Face files: configuration, weights, tokenizer, and the float64 reference.

pub mod config;
mod families;
pub mod identity;
mod mxfp4;
pub mod quantization;
pub mod reference;
pub mod source;
pub mod spec;
pub mod tokenizer;
pub mod weights;

use std::path::Path;

pub use self::spec::ModelSpec;
use crate::error::{Error, Result};

/// Reads a JSON file of a model folder.
fn read_json(path: &Path) -> Result<serde_json::Value> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|error| Error::file(path, error, "download the file again"))
}
