//! The engine: PJRT plugins, the Llama step program, paged KV, the scheduler, the sampler, hosts, and the command line.
pub mod certify;
pub mod check;
pub mod child;
pub mod cli;
pub mod config;
pub mod error;
pub mod generate;
pub mod hosts;
pub mod launcher;
pub mod llama;
pub mod memory;
pub mod mesh;
pub mod model;
pub mod mpi;
pub mod native;
pub mod output;
pub mod pages;
pub mod pjrt;
mod prefix;
pub mod replicas;
pub mod report;
pub mod sampler;
pub mod scheduler;
pub mod stop;
pub mod topology;
pub mod units;

pub use error::{Error, Result};
