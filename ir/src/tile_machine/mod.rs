//! The tile machine: runs Mosaic kernels on the CPU, tile by tile, and reports what hardware would not forgive.
//!
//! [`Program::decode`] turns a Mosaic module (built by [`mosaic`](crate::mosaic) or opened from the wire format, lowered
//! by JAX Pallas for instance) into instructions; an op that the machine does not know is an error that names it, before
//! anything runs. [`Program::run`] executes them: elementwise loops over whole tiles, matrix products through `gemm`
//! with the TPU's rounding, loops and branches as written. A run yields the outputs and [`Counters`], or the first
//! [`Fault`].
//!
//! # The memory model
//! - **HBM** holds the arrays of the call. Outputs start unwritten. An output that shares an input's memory
//!   ([`Program::with_aliases`]) starts with its content.
//! - **VMEM** holds scratch and the pipeline's windows, **SMEM** scalars, **semaphore memory** semaphores. Each has the
//!   size that [`Machine`] gives it. Buffers in VMEM and SMEM count with tile padding, windows with both buffers.
//! - *Unwritten memory* holds a NaN or an odd integer, and every element remembers whether it was written. Scratch keeps
//!   its content from grid step to grid step, except across steps that differ in a `parallel` dimension: they may run on
//!   different cores, so scratch is unwritten again there.
//! - *Whole arrays* in VMEM or SMEM come before the first step and, as outputs, go after the last; such outputs are
//!   nothing for steps of a `parallel` dimension.
//! - *Windows*: before a step, the blocks of its inputs are in VMEM. A double-buffered block is copied while the step
//!   before runs: from HBM as it is at that step's start ([`DmaOrder::Early`]) or end ([`DmaOrder::Late`]). Where a block
//!   hangs over the edge of its array the window holds NaN that may be read (a kernel masks it) and what is written there
//!   is dropped. An output window starts unwritten at every new block and is written back when the block changes;
//!   elements that the kernel did not write become unwritten in HBM, whatever was there.
//! - *Copies* (DMAs) land at their start, at the wait that needs them, or in a random order between, per
//!   [`DmaOrder`]. A wait takes as many bytes from its semaphore as its destination has; copies are over in the order in
//!   which they landed. Between start and that moment a copy is *in flight*: its destination must not be touched, and its
//!   source must not be written.
//! - *Rounding*: bf16 and narrow integers are rounded or wrapped after every op. The MXU multiplies bf16 and accumulates
//!   f32; f32 operands are rounded to bf16 first unless the product asks for `fp32` precision.
//!
//! # Faults
//! Each names the op, its source line, the buffer, the index, the grid step and, where there is one, the copy.
//! - [`FaultKind::OutOfBounds`]: an index outside a view, a view outside a buffer, a block that starts outside its array.
//! - [`FaultKind::UnwrittenRead`]: a load, or the source of a copy, that nobody wrote
//!   ([`Machine::allow_unwritten_reads`]).
//! - [`FaultKind::ReadInFlight`], [`FaultKind::OverwriteInFlight`]: a race with a copy in flight; of the kernel's own
//!   ops, or of the pipeline, whose op is `pipeline`.
//! - [`FaultKind::SemaphoreUnbalanced`]: a copy was not waited for or a semaphore is not zero at the end of the kernel, or
//!   between steps that differ in a `parallel` dimension.
//! - [`FaultKind::Deadlock`]: a wait for more bytes or signals than were ever started.
//! - [`FaultKind::ParallelOverlap`]: two steps that differ in a `parallel` dimension write the same output element, or
//!   one reads what the other, earlier in the grid, wrote.
//! - [`FaultKind::MemoryExceeded`]: more VMEM, SMEM, HBM or semaphores than there are.
//! - [`FaultKind::OutputNeverWritten`]: an output element that no step wrote ([`Machine::allow_unwritten_outputs`]).
//! - [`FaultKind::BrokenAssumption`]: `tpu.assume_multiple` of something that is none.
//! - [`FaultKind::DivisionByZero`]: an integer divided by zero.
//! - [`FaultKind::Runaway`]: more than [`Machine::max_ops`] ops or grid steps.
//! - [`FaultKind::BadCall`]: arguments that do not fit the kernel.
//!
//! What it does not model: time, registers and their spills, several devices, and layouts inside a tile.

mod allocate;
mod decode;
mod dma;
mod exec;
mod fault;
mod liveness;
mod memory;
mod observer;
mod ops;
mod pipeline;
mod program;
mod tile;

pub use fault::{Fault, FaultKind};
pub use observer::{BlockEvent, DmaEvent, Observer, OpEvent};
pub use program::Program;

use crate::tensor::HostTensor;

/// When copies land.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DmaOrder {
    /// At once.
    Early,
    /// When a wait needs them, in the order of their start.
    Late,
    /// Some at once, some later, in an order drawn from this seed.
    Random(u64),
}

/// A chip's core, as far as kernels notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The limit of scoped VMEM in bytes.
    pub vmem_bytes: usize,
    /// Bytes of SMEM.
    pub smem_bytes: usize,
    /// Bytes of HBM.
    pub hbm_bytes: usize,
    /// Bytes of semaphore memory, 4 for each.
    pub semaphore_bytes: usize,
    /// When copies land.
    pub dma: DmaOrder,
    /// Whether outputs may keep elements that no step wrote (for kernels that leave padding unspecified); they are NaN.
    pub allow_unwritten_outputs: bool,
    /// Whether unwritten memory may be read (for kernels that load it and select something else); it is NaN, or an odd
    /// integer, and shows in the output if it gets there.
    pub allow_unwritten_reads: bool,
    /// Whether steps that differ in a `parallel` dimension may write the same output elements (for kernels that use an
    /// output as scratch memory); what several wrote is NaN, or an odd integer. Where it is known that nobody uses an
    /// output, [`Program::with_unused_outputs`] allows it for that one alone.
    pub allow_parallel_overlaps: bool,
    /// How many ops may run before a loop counts as endless.
    pub max_ops: u64,
}

impl Default for Machine {
    /// A v5p core at its default VMEM limit: 16 MiB of scoped VMEM, 1 MiB of SMEM, 95 GiB of HBM, late copies.
    fn default() -> Self {
        Self {
            vmem_bytes: 16 << 20,
            smem_bytes: 1 << 20,
            hbm_bytes: 95 << 30,
            semaphore_bytes: 4 << 10,
            dma: DmaOrder::Late,
            allow_unwritten_outputs: false,
            allow_unwritten_reads: false,
            allow_parallel_overlaps: false,
            max_ops: 1 << 32,
        }
    }
}

/// What a kernel did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Grid steps.
    pub grid_steps: u64,
    /// Ops executed.
    pub ops: u64,
    /// Bytes copied out of HBM, by the pipeline and by the kernel.
    pub hbm_bytes_read: u64,
    /// Bytes copied into HBM.
    pub hbm_bytes_written: u64,
    /// Copies that the kernel started.
    pub copies: u64,
    /// Multiplications and additions on the MXU.
    pub mxu_flops: u64,
    /// Bytes of VMEM declared, tile padding and double buffers included.
    pub vmem_bytes: usize,
}

/// A finished run.
#[derive(Clone, Debug)]
pub struct Run {
    /// The outputs.
    pub outputs: Vec<HostTensor>,
    /// What it took.
    pub counters: Counters,
}
