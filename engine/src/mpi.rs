//! Sums over processes, in the middle of a program: an MPI all-reduce as a custom call of the CPU plugin.
//!
//! *Order.* Calls without a data dependence run at the same time, on several threads and in another order in every
//! process, which yields sums of the wrong arrays. So each call takes the last call's result as a second operand that
//! it does not read: the emitter builds that chain.

/// The custom call: operands `x f32[..]` and the last call's result (of any shape), result the sum of all processes' `x`.
pub const ALL_REDUCE: &str = "pagoda_mpi_all_reduce";
