//! PJRT, small and safe: plugins, clients of N devices, buffers, executables, custom calls written in Rust.
//!
//! Crate `pjrt` does what it does soundly (the API handle, compile options, events, executables' statistics,
//! topologies); [`abi`] lets it drive plugins newer than itself. Execution and host transfers are our own calls on
//! the same table, because the crate's multi-device argument lists do not have the layout that PJRT reads, because it
//! knows no bf16, and because a weight must reach the device without a second copy in host memory.
//!
//! Invariants: a buffer given away with [`Arg::Donate`] cannot be named again; one given with [`Arg::Keep`] is never
//! donated, whatever the program says; every error carries the plugin's message and code. Nothing here panics on what
//! a plugin answers.

pub mod abi;
mod client;
pub mod custom_call;
mod error;
mod plugin;

pub use client::{Arg, Buffer, Client, CostAnalysis, Executable, MemoryStats};
pub use error::{Error, Result};
pub use plugin::{Found, Kind, Plugin, PluginChoice, Source};
