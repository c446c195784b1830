//! The engine: PJRT plugins, the Llama step program, paged KV, the scheduler, the sampler, hosts, and the command line.

pub mod pjrt;
pub mod sampler;
