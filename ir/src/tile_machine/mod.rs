//! The tile machine: runs Mosaic kernels on the CPU, tile by tile, and reports what would be undefined behaviour on a TPU.
//!
//! [`Program::decode`] turns a Mosaic module (built by [`mosaic`](crate::mosaic) or opened from the wire format, lowered
//! by JAX Pallas for instance) into instructions; ops that the machine does not know are an error that names them all, before
//! anything runs. Which it knows, what they do and where that is written stands in `ops.md`. [`Program::run`] executes them:
//! elementwise loops over whole tiles, matrix products through `gemm` with the TPU's rounding, loops and branches as written.
//! A run yields the outputs and [`Counters`], or the first [`Fault`]; an [`Observer`] may watch it, [`Trace`] for instance.
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
//!   not allowed when the grid has a `parallel` dimension.
//! - *Windows*: before a step, the blocks of its inputs are in VMEM. A double-buffered block is copied while the step
//!   before runs: from HBM as it is at that step's start ([`DmaOrder::Early`]) or end ([`DmaOrder::Late`]). Where a block
//!   hangs over the edge of its array the window holds NaN that may be read (a kernel masks it) and what is written there
//!   is dropped. An output window starts unwritten at every new block and is written back when the block changes;
//!   elements that the kernel did not write become unwritten in HBM, whatever was there. A window that may revisit blocks
//!   (`revisit_mode` `any`) starts with what was written back of the block before, if anything was. A window of elements
//!   (`pl.Element`) starts at any element; where it hangs over into the padding of its array it holds NaN too.
//! - *Scoped memory* (`memref.alloca`, `tpu.sem_alloc`: Pallas's `run_scoped`, `emit_pipeline`) is unwritten, or zero, when its
//!   block begins and gone when it ends; until then it counts as taken. By then its DMAs must be over and its semaphores zero.
//! - *Sizes that come at run time*: those of the grid are the call's first operands, those of views operands of the op. A
//!   view of no elements is copied in no time and waited for in none.
//! - *DMAs* land at their start, at the wait that needs them, or in a random order between, per [`DmaOrder`]. A wait takes
//!   as many bytes from its semaphore as its destination has; DMAs are over in the order in which they landed. Between
//!   start and that moment a DMA is *in flight*: its destination must not be touched, and its source must not be written.
//! - *Padding*: an array in HBM is padded to tiles, lanes to 128 and rows to 8 or, of fewer, to a power of two. A DMA may
//!   copy padding, which gives a NaN or an odd integer that may be read (a kernel masks it), and may copy to it, which is
//!   dropped. Nothing else is there: beyond the padding is out of bounds.
//! - *Rounding*: bf16 and narrow integers are rounded or wrapped after every op; floats that become integers saturate. The
//!   MXU multiplies bf16 and accumulates f32; f32 operands are rounded to bf16 first unless the product asks for `fp32`
//!   precision or one side is a vector. Arrays of unsigned integers are bits: ops have a sign, memory has none. Subnormal
//!   numbers are kept; a TPU takes them for zero.
//! - *Random bits* come from a generator of the machine's own, from the kernel's seeds and [`Machine::random_seed`]: the
//!   hardware's is not public. They are as random, and the same in every run; they are not a chip's.
//!
//! # The states of an element
//! Every element of every buffer is in one of four states: *unwritten*; *written*; *held*, the source of a DMA in flight;
//! *landing*, the destination of one. The table is the model: what an event makes of an element, or the fault that it is.
//! An access to a region is that event on each of its elements, and the first that faults is reported; a DMA from and to
//! the same element is a DMA to a held one.
//!
//! | event | unwritten | written | held | landing |
//! |---|---|---|---|---|
//! | the kernel loads it | `UnwrittenRead` ¹ | written | held | `ReadInFlight` |
//! | the kernel stores to it | written | written | `OverwriteInFlight` | `OverwriteInFlight` |
//! | a masked store leaves it out | unwritten | written | `OverwriteInFlight` | `OverwriteInFlight` |
//! | a DMA from it starts | `UnwrittenRead` ¹ | held | held | `ReadInFlight` |
//! | a DMA to it starts | landing | landing | `OverwriteInFlight` | `OverwriteInFlight` ⁷ |
//! | the DMA lands | | | held; its value is read now | landing; its value is there now |
//! | the DMA is waited for | | | written, or held by another | written |
//! | window: a block comes in ⁴ | as in the array | as in the array | `OverwriteInFlight` | `OverwriteInFlight` |
//! | window: a new output block | unwritten ² | unwritten ² | `OverwriteInFlight` | `OverwriteInFlight` |
//! | window: its block is written back | unwritten | written | held | `ReadInFlight` |
//! | array: a block is fetched from it ⁴ | unwritten | written | held | `ReadInFlight` |
//! | array: a block is written back to it | as in the window | as in the window | `OverwriteInFlight` | `OverwriteInFlight` |
//! | scratch: the parallel position changes | unwritten | unwritten | `SemaphoreUnbalanced` | `SemaphoreUnbalanced` |
//! | output: the kernel ends | `OutputNeverWritten` ³ | its value is returned | `SemaphoreUnbalanced` | `SemaphoreUnbalanced` |
//!
//! ¹ Nothing with [`Machine::allow_unwritten_reads`]: the poison is read. ² Or as in the array, where the block is
//! revisited. ³ Nothing with [`Machine::allow_unwritten_outputs`], or for [unused outputs](Program::with_unused_outputs).
//! ⁴ Where a block hangs over the edge of its array, the window is written beyond it: a NaN, or an odd integer, that may
//! be read. ⁷ Nothing where both DMAs bring the same bytes to the same region (kernels repeat a row instead of leaving it
//! out), or add to it. One that adds reads its destination, too, when it lands.
//!
//! A *semaphore* holds a number, at first 0. A DMA of n bytes that lands adds n; a signal adds its amount; a wait for n takes
//! n, after DMAs on it have landed that it needs.
//!
//! | event | it has n | it has less | n < 0 |
//! |---|---|---|---|
//! | a wait for n | n less | `Deadlock`, when no DMA on it is left to land | `SemaphoreUnbalanced` |
//! | the kernel ends, or the parallel position changes | `SemaphoreUnbalanced` unless n = 0 | | `SemaphoreUnbalanced` |
//!
//! An element of an *output* has an *owner*, too, when the grid has a `parallel` dimension: the parallel position that wrote
//! it. p and q are different positions.
//!
//! | event | nobody's | p's | contested |
//! |---|---|---|---|
//! | p writes it | p's | p's | contested |
//! | q writes it | q's | `ParallelOverlap`; where overlaps are allowed ⁵ p's if it is the same, else contested, and unwritten | contested, and unwritten |
//! | p reads it | nobody's | p's | `ParallelOverlap` |
//! | q reads it | nobody's | `ParallelOverlap` | `ParallelOverlap` |
//!
//! ⁵ On an [unused output](Program::with_unused_outputs), and with [`Machine::allow_parallel_overlaps`]: an output that
//! serves as scratch memory is not a race until somebody reads what another position left there.
//!
//! # Several devices
//! [`Program::run_devices`] runs a kernel on several devices, each with memories of its own, which send each other signals and
//! DMAs. Their ops are interleaved as the order of DMAs says, and an access races if no signal or DMA that a wait is sure of
//! orders it, whether or not it came out right in this run (`devices.rs` says how):
//!
//! | event | fault |
//! |---|---|
//! | a signal, or a DMA, to a device that may not have entered the kernel ⁶ | `DeviceRace` |
//! | a DMA to memory that its receiver, not known to be done with it, has read or written, or is copying, or that another DMA goes to | `DeviceRace` |
//! | the receiver reads, or writes, where a DMA goes that no wait of its own is sure of | `ReadInFlight`, `OverwriteInFlight` |
//! | the sender writes to the source of a DMA that it has not waited for | `OverwriteInFlight` |
//! | a device or a core that there is not | `OutOfBounds` |
//! | all wait, or are at the end, and nothing is under way | `Deadlock` |
//! | at the end of all: a DMA that its sender or its receiver has not waited for, a signal that is left | `SemaphoreUnbalanced` |
//!
//! A DMA has left, and has arrived, on its two sides: the sender's semaphore says nothing of the receiver's memory.
//! ⁶ Where the kernel names the barrier semaphore: others enter together, by a barrier that the compiler adds.
//!
//! # Several cores of a device
//! Where the steps of a `parallel` dimension wait for each other (signals to a core or a subcore, `tpu.barrier`) or share VMEM
//! (an argument that a SparseCore's subcores have in common), or a module has a function for each of several kinds of cores,
//! every position is a core, with VMEM, SMEM and semaphores of its own, and all run at the same time ([`Program::cores`]).
//! Arrays in HBM, and the VMEM that subcores of a core share, they have in common. Owners do not matter then; what orders
//! accesses does, as it does between devices. Memory of a core's own that others reach by DMAs is as another device's.
//!
//! | event | fault |
//! |---|---|
//! | two cores access the same element, one of them writes, and nothing orders the two ⁸ | `ParallelOverlap` |
//! | a core accesses it while another's DMA, which writes it or is written over, may be in flight | `ParallelOverlap` |
//! | a core that does not run the kernel | `OutOfBounds` |
//! | some of a core's subcores are at a barrier, the others at the end of the kernel | `Deadlock` |
//!
//! ⁸ Additions by DMAs, and by `tpu.fetch_and_add_sync`, need no order among each other; writes to an
//! [unused output](Program::with_unused_outputs) neither. Where overlaps are allowed, what is there is what this order made
//! it: it does not become unwritten.
//!
//! # Faults
//! Each names the op, its source line, the buffer, the index, the grid step and, where there is one, the DMA. Kinds that a
//! run can go on after may be ignored by name ([`Machine::ignored`], [`FaultKind::can_be_ignored`]).
//! - [`FaultKind::OutOfBounds`]: an index outside a view, a view outside a buffer, a block that starts outside its array. Where
//!   it is ignored, a scalar or a tile without a mask that is loaded from there is as unwritten memory (kernels load it and
//!   select something else); all other accesses are faults still.
//! - [`FaultKind::UnwrittenRead`]: a load, or the source of a DMA, that nobody wrote
//!   ([`Machine::allow_unwritten_reads`]).
//! - [`FaultKind::ReadInFlight`], [`FaultKind::OverwriteInFlight`]: a race with a DMA in flight; of the kernel's own
//!   ops, or of the pipeline, whose op is `pipeline`.
//! - [`FaultKind::SemaphoreUnbalanced`]: a DMA was not waited for or a semaphore is not zero at the end of the kernel, or
//!   between steps that differ in a `parallel` dimension, or at the end of their scope; a wait for a negative amount.
//! - [`FaultKind::Deadlock`]: a wait for more bytes or signals than were ever started.
//! - [`FaultKind::DeviceRace`]: what one device does to another's memory or semaphores, with nothing that orders it.
//! - [`FaultKind::ParallelOverlap`]: two steps that differ in a `parallel` dimension write the same output element, or
//!   one reads what the other, earlier in the grid, wrote; two cores' accesses that nothing orders
//!   ([`Machine::allow_parallel_overlaps`], [`Program::with_unused_outputs`]).
//! - [`FaultKind::MemoryExceeded`]: more VMEM, SMEM, HBM or semaphores than there are.
//! - [`FaultKind::OutputNeverWritten`]: an output element that no step wrote ([`Machine::allow_unwritten_outputs`]).
//! - [`FaultKind::BrokenAssumption`]: `tpu.assume_multiple` of something that is not a multiple; a `cf.assert` that fails; a
//!   matrix unit that a kernel drives itself, and that has not what is asked of it, or is not empty at the end.
//! - [`FaultKind::DivisionByZero`]: an integer divided by zero.
//! - [`FaultKind::Runaway`]: more than [`Machine::max_ops`] ops or grid steps.
//! - [`FaultKind::BadCall`]: arguments that do not fit the kernel.
//!
//! What it does not model: time, registers and their spills, the routes and the bandwidth between devices, layouts inside a
//! tile (so it runs what the compiler may refuse), and what is in flight between calls: a DMA whose semaphore is the call's
//! own lands when the kernel ends, and whoever gets that semaphore can wait for it. A block of an output is written back at
//! once, where it takes as long as the step that follows: a core that tells another of it in that step is too early, and no
//! fault. Cores that do not wait for each other run one after another.
//!
//! # Where things are
//! `decode` walks a module and `ops` is the table of the ops that it knows; both make a `program`, which `liveness` and
//! `fuse` finish. `exec` interprets it, over the buffers of `memory`, which `allocate` lays out; `dma` and `pipeline` move data,
//! `devices` and `cores` between those, which `fabric` connects; `ledger` has what a wait is sure of.
//! `history` and `profile` watch: what happened to one element, and what was moved when. `halves`
//! runs a grid on two threads. `tile` computes, over the loops of `lanes` and with the functions of `math`; `sparse` has what
//! a SparseCore does beyond, `mxu` matrix units that a kernel drives itself. Only `decode` and
//! `ops` see MLIR. `ir/tests/all/states.rs` holds the machine to the tables by random kernels, `orders.rs` to what orders
//! cores, and `ir/tests/cases` has a kernel for every fault.

mod allocate;
mod cores;
mod decode;
mod devices;
mod dma;
mod exec;
mod fabric;
mod fault;
mod fuse;
mod halves;
mod history;
mod lanes;
mod ledger;
mod liveness;
mod math;
mod memory;
mod mxu;
mod observer;
mod ops;
mod pipeline;
mod profile;
mod program;
mod sparse;
mod tile;
mod trace;

pub use fault::{Fault, FaultKind, FaultKinds};
pub use history::{Cell, Past};
pub use observer::{AccessEvent, BlockEvent, DmaEvent, MatmulEvent, Observer, OpEvent, Side};
pub use profile::{Counts, Moved, Multiplied, Profile, Rates, Span, Step, Tally, Track};
pub use program::Program;
pub use trace::Trace;

use crate::tensor::HostTensor;

/// When DMAs land.
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
    /// When DMAs land.
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
    /// Kinds of faults that are not reported; those that [can be](FaultKind::can_be_ignored). `allow_unwritten_reads`,
    /// `allow_unwritten_outputs` and `allow_parallel_overlaps` are three of them.
    pub ignored: FaultKinds,
    /// From how many elements that the ops of half a grid make the halves of a `parallel` grid run on two threads, where nothing
    /// can tell: results, counters and faults are those of one thread. `u64::MAX` for never.
    pub least_work_of_a_thread: u64,
    /// What the kernel's random bits are drawn from, with its own seeds. The generator of the hardware is not public, so
    /// no bits are those of a chip.
    pub random_seed: u64,
}

impl Machine {
    /// This machine, with faults of a kind not reported.
    pub fn ignoring(self, kind: FaultKind) -> Self {
        Self { ignored: self.ignored.with(kind), ..self }
    }

    pub(crate) fn reads_unwritten(&self) -> bool {
        self.allow_unwritten_reads || self.ignored.contains(FaultKind::UnwrittenRead)
    }

    pub(crate) fn leaves_outputs_unwritten(&self) -> bool {
        self.allow_unwritten_outputs || self.ignored.contains(FaultKind::OutputNeverWritten)
    }

    pub(crate) fn overlaps(&self) -> bool {
        self.allow_parallel_overlaps || self.ignored.contains(FaultKind::ParallelOverlap)
    }
}

impl Default for Machine {
    /// A v5p core at its default VMEM limit: 16 MiB of scoped VMEM, 1 MiB of SMEM, 95 GiB of HBM, late DMAs.
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
            ignored: FaultKinds::default(),
            least_work_of_a_thread: 1 << 21,
            random_seed: 0,
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
    /// DMAs that the kernel started.
    pub copies: u64,
    /// Multiplications and additions on the MXU.
    pub mxu_flops: u64,
    /// Bytes of VMEM declared, tile padding and double buffers included.
    pub vmem_bytes: usize,
}

impl std::ops::Add for Counters {
    type Output = Self;

    /// Of two runs, or of two parts of one, that have their VMEM one after the other.
    fn add(self, other: Self) -> Self {
        Self {
            grid_steps: self.grid_steps + other.grid_steps,
            ops: self.ops + other.ops,
            hbm_bytes_read: self.hbm_bytes_read + other.hbm_bytes_read,
            hbm_bytes_written: self.hbm_bytes_written + other.hbm_bytes_written,
            copies: self.copies + other.copies,
            mxu_flops: self.mxu_flops + other.mxu_flops,
            vmem_bytes: self.vmem_bytes.max(other.vmem_bytes),
        }
    }
}

/// A finished run.
#[derive(Clone, Debug)]
pub struct Run {
    /// The outputs.
    pub outputs: Vec<HostTensor>,
    /// What it took.
    pub counters: Counters,
}
