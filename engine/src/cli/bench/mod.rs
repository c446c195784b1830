//! `pagoda bench`: what a device does with a kernel, with a step of a model, or with greedy decode.

mod decode;
mod kernel;
mod step;

pub use decode::{DecodeRate, decode_rate};
pub(super) use kernel::{KernelBench, kernel};
pub(super) use step::{StepArgs, step};
