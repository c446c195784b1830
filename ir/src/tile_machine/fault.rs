//! What the machine reports when a kernel does what would be undefined behaviour on a TPU.

use std::fmt;

use crate::mosaic::Frame;

/// Kinds of faults. Their meaning stands in the [module docs](super).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// An access outside a view or a buffer.
    OutOfBounds,
    /// A read of memory that nobody wrote.
    UnwrittenRead,
    /// A read of a destination whose DMA was not waited for.
    ReadInFlight,
    /// A write to the source or destination of a DMA that was not waited for.
    OverwriteInFlight,
    /// A semaphore, or a DMA, left over at the end of the kernel or before a step that may run on another core; a wait for
    /// a negative amount.
    SemaphoreUnbalanced,
    /// A wait that nothing will ever satisfy.
    Deadlock,
    /// Something that one device does to another's memory or semaphores and that nothing orders with what that one does.
    DeviceRace,
    /// Two steps of a `parallel` grid dimension that write the same output, or one that reads what the other wrote.
    ParallelOverlap,
    /// A memory is too small for what the kernel declares.
    MemoryExceeded,
    /// An element of an output that no step wrote.
    OutputNeverWritten,
    /// A promise to the compiler (`tpu.assume_multiple`) that does not hold.
    BrokenAssumption,
    /// An integer divided by zero.
    DivisionByZero,
    /// More ops, or grid steps, than the machine was allowed to run.
    Runaway,
    /// Arguments of the call that do not fit the kernel.
    BadCall,
}

/// Kinds of faults, for [`Machine::ignored`](super::Machine::ignored).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FaultKinds(u16);

impl FaultKinds {
    /// With another kind.
    pub const fn with(self, kind: FaultKind) -> Self {
        Self(self.0 | 1 << kind as u16)
    }

    /// Whether a kind is among them.
    pub const fn contains(self, kind: FaultKind) -> bool {
        self.0 & 1 << kind as u16 != 0
    }
}

impl FaultKind {
    /// All kinds.
    pub const ALL: [Self; 14] = [
        Self::OutOfBounds,
        Self::UnwrittenRead,
        Self::ReadInFlight,
        Self::OverwriteInFlight,
        Self::SemaphoreUnbalanced,
        Self::Deadlock,
        Self::DeviceRace,
        Self::ParallelOverlap,
        Self::MemoryExceeded,
        Self::OutputNeverWritten,
        Self::BrokenAssumption,
        Self::DivisionByZero,
        Self::Runaway,
        Self::BadCall,
    ];

    /// Whether a run can go on after it, so that [`Machine::ignored`](super::Machine::ignored) may name it. After an access
    /// out of bounds it can where a scalar, or a tile without a mask, was loaded: it is what unwritten memory holds.
    pub const fn can_be_ignored(self) -> bool {
        !matches!(self, Self::Deadlock | Self::Runaway | Self::BadCall)
    }

    /// Its name, as it is serialized: `unwritten-read`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OutOfBounds => "out-of-bounds",
            Self::UnwrittenRead => "unwritten-read",
            Self::ReadInFlight => "read-in-flight",
            Self::OverwriteInFlight => "overwrite-in-flight",
            Self::SemaphoreUnbalanced => "semaphore-unbalanced",
            Self::Deadlock => "deadlock",
            Self::DeviceRace => "device-race",
            Self::ParallelOverlap => "parallel-overlap",
            Self::MemoryExceeded => "memory-exceeded",
            Self::OutputNeverWritten => "output-never-written",
            Self::BrokenAssumption => "broken-assumption",
            Self::DivisionByZero => "division-by-zero",
            Self::Runaway => "runaway",
            Self::BadCall => "bad-call",
        }
    }

    /// In words.
    pub fn describe(self) -> &'static str {
        match self {
            Self::OutOfBounds => "access out of bounds",
            Self::UnwrittenRead => "read of unwritten memory",
            Self::ReadInFlight => "read of a buffer whose DMA is in flight",
            Self::OverwriteInFlight => "overwrite of a buffer whose DMA is in flight",
            Self::SemaphoreUnbalanced => "semaphore left unbalanced",
            Self::Deadlock => "wait that is never satisfied",
            Self::DeviceRace => "race between devices",
            Self::ParallelOverlap => "overlap of parallel grid steps",
            Self::MemoryExceeded => "memory exceeded",
            Self::OutputNeverWritten => "output element never written",
            Self::BrokenAssumption => "broken promise to the compiler",
            Self::DivisionByZero => "integer division by zero",
            Self::Runaway => "too many ops or grid steps",
            Self::BadCall => "arguments do not fit the kernel",
        }
    }
}

/// A fault: what happened, where in the module, to which buffer, when.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Fault {
    /// The kind of fault.
    pub kind: FaultKind,
    /// The kernel's name.
    pub kernel: String,
    /// The device, of several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<usize>,
    /// Which of the device's [cores](super::Program::cores).
    #[serde(skip)]
    pub core: usize,
    /// The op, by its full name; `pipeline` where blocks are copied.
    pub op: String,
    /// The op's source line, `file:line`.
    pub location: String,
    /// The op's source line and those that called it, the innermost first; of the pipeline, where the window's transform or
    /// the kernel is.
    pub frames: Vec<Frame>,
    /// The buffer, by its name.
    pub buffer: Option<String>,
    /// The index of the first offending element in that buffer.
    pub index: Vec<i64>,
    /// The buffer's number and that element's offset, for [`Program::history`](super::Program::history).
    #[serde(skip)]
    pub cell: Option<(usize, usize)>,
    /// The grid step.
    pub grid_step: Vec<usize>,
    /// The DMA that is involved: where it was started.
    pub dma: Option<String>,
    /// Sizes and numbers.
    pub detail: String,
}

impl std::error::Error for Fault {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = self.device.map_or(String::new(), |device| format!(" on device {device}"));
        write!(f, "kernel `{}`{device}: {}: {} at {}", self.kernel, self.kind.describe(), self.op, self.location)?;
        if let Some(buffer) = &self.buffer {
            write!(f, ", buffer `{buffer}`")?;
            if !self.index.is_empty() {
                write!(f, " at {:?}", self.index)?;
            }
        }
        write!(f, ", grid step {:?}", self.grid_step)?;
        if let Some(dma) = &self.dma {
            write!(f, ", DMA {dma}")?;
        }
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}
