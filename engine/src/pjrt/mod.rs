//! PJRT, small and safe: plugins, clients of N devices, buffers, executables, custom calls written in Rust.
//!
//! Crate `pjrt` does what it does soundly (the API handle, compile options, topologies); `abi` lets it drive plugins newer
//! than itself. Clients, programs, execution and host transfers are our own calls on the same table, because the crate's
//! handles are bound to one thread, because its multi-device argument lists do not have the layout that PJRT reads,
//! because it knows no bf16, and because a weight must reach the device without a second copy in host memory. Each such
//! call is one safe function in `table`. No type of the crate is part of this module's interface.
//!
//! Invariants: a buffer given away with [`Arg::Donate`] cannot be named again; one given with [`Arg::Keep`] is never
//! donated, whatever the program says; a program takes buffers of its own client only; every error carries the plugin's
//! message and code.

mod abi;
mod client;
pub mod custom_call;
mod error;
mod plugin;
mod resident;
mod table;

pub use client::{Arg, Buffer, Client, CostAnalysis, Executable, MemoryStats};
pub use error::{Error, Result};
pub use plugin::{Found, Kind, Plugin, PluginChoice, Source};
pub use resident::guard;
