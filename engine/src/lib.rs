//! The engine: PJRT plugins, the Llama step program, paged KV, the scheduler, the sampler, hosts, and the command line.
pub mod error;
pub mod model;
pub mod pages;
pub mod pjrt;
pub mod sampler;
pub mod scheduler;
pub mod stop;
pub mod units;

pub use error::{Error, Result};
