//! Watching a run, event by event, at no cost where nobody does.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::memory::Region;
use crate::{
    element::Element,
    mosaic::{Frame, MemorySpace},
};

/// Gets the events of a run, in their order. Every method does nothing unless it is overridden, and [`Program::run`]
/// watches with `()`, so that not watching costs nothing.
///
/// [`Program::run`]: super::Program::run
pub trait Observer {
    /// Whether it wants to see ops one by one. Where nobody does, they run in groups.
    const WATCHES: bool = true;
    /// Whether it wants what the kernel prints.
    const LISTENS: bool = false;

    /// The run begins; these buffers are the arrays of its outputs.
    fn begin(&mut self, _outputs: &[usize]) {}
    /// A grid step begins.
    fn step(&mut self, _at: &[usize]) {}
    /// Another core goes on, of several that one observer watches; and this one at step `at`, when its turn comes again.
    fn pause(&mut self) {}
    /// See [`pause`](Self::pause).
    fn resume(&mut self, _at: &[usize]) {}
    /// An op of the kernel, or of a window's transform, begins. The machine runs one after another.
    fn op(&mut self, _op: &OpEvent) {}
    /// The op that began last loads from memory, or stores to it.
    fn access(&mut self, _access: &AccessEvent) {}
    /// The op that began last multiplies matrices.
    fn matmul(&mut self, _matmul: &MatmulEvent) {}
    /// The kernel prints a line (`tpu.log`, Pallas's `debug_print`).
    fn print(&mut self, _line: &str) {}
    /// A region that the kernel named begins (`tpu.trace_start`, JAX's `named_scope`).
    fn region_start(&mut self, _name: &str) {}
    /// The region that began last ends.
    fn region_stop(&mut self) {}
    /// A buffer's content is forgotten, for the reason `why`: its elements are unwritten again.
    fn forget(&mut self, _buffer: usize, _why: &str) {}
    /// The pipeline has copied a block between an array and its window, or a whole array.
    fn block(&mut self, _block: &BlockEvent) {}
    /// The kernel has started a DMA. It is in flight.
    fn dma_start(&mut self, _dma: &DmaEvent) {}
    /// The bytes of DMA `id` are at its destination. It is in flight until it is waited for.
    fn dma_land(&mut self, _id: usize) {}
    /// DMA `id` was waited for. It is over.
    fn dma_wait(&mut self, _id: usize) {}
    /// The bytes of a DMA that device `from` has started are in this one's memory.
    fn dma_arrive(&mut self, _from: usize, _to: Side, _bytes: usize) {}
}

/// Nobody watches.
impl Observer for () {
    const WATCHES: bool = false;
}

/// One observer of several cores, of which one runs at a time.
pub(super) struct Shared<'o, O>(&'o Mutex<&'o mut O>);

impl<'o, O> Shared<'o, O> {
    pub(super) fn new(observer: &'o Mutex<&'o mut O>) -> Self {
        Self(observer)
    }

    fn lock(&self) -> MutexGuard<'o, &'o mut O> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<O: Observer> Observer for Shared<'_, O> {
    const WATCHES: bool = O::WATCHES;
    const LISTENS: bool = O::LISTENS;

    fn begin(&mut self, outputs: &[usize]) {
        self.lock().begin(outputs);
    }

    fn step(&mut self, at: &[usize]) {
        self.lock().step(at);
    }

    fn pause(&mut self) {
        self.lock().pause();
    }

    fn resume(&mut self, at: &[usize]) {
        self.lock().resume(at);
    }

    fn op(&mut self, op: &OpEvent) {
        self.lock().op(op);
    }

    fn access(&mut self, access: &AccessEvent) {
        self.lock().access(access);
    }

    fn matmul(&mut self, matmul: &MatmulEvent) {
        self.lock().matmul(matmul);
    }

    fn print(&mut self, line: &str) {
        self.lock().print(line);
    }

    fn region_start(&mut self, name: &str) {
        self.lock().region_start(name);
    }

    fn region_stop(&mut self) {
        self.lock().region_stop();
    }

    fn forget(&mut self, buffer: usize, why: &str) {
        self.lock().forget(buffer, why);
    }

    fn block(&mut self, block: &BlockEvent) {
        self.lock().block(block);
    }

    fn dma_start(&mut self, dma: &DmaEvent) {
        self.lock().dma_start(dma);
    }

    fn dma_land(&mut self, id: usize) {
        self.lock().dma_land(id);
    }

    fn dma_wait(&mut self, id: usize) {
        self.lock().dma_wait(id);
    }

    fn dma_arrive(&mut self, from: usize, to: Side, bytes: usize) {
        self.lock().dma_arrive(from, to, bytes);
    }
}

/// An op that is about to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpEvent<'e> {
    /// Its number in the program: the same wherever it runs again.
    pub number: u32,
    /// Its full name.
    pub op: &'e str,
    /// Its source line.
    pub location: &'e str,
    /// Its source line and those that called it, the innermost first.
    pub frames: &'e [Frame],
    /// How many elements its first result has; 0 where it has none.
    pub elements: usize,
}

/// Elements of a buffer.
#[derive(Clone, Copy)]
pub struct Side<'e> {
    /// The buffer's number: the same in every run of the program.
    pub buffer: usize,
    /// The buffer's name.
    pub name: &'e str,
    /// The memory that it is in.
    pub space: MemorySpace,
    pub(super) region: &'e Region,
}

impl Side<'_> {
    /// Which of its elements, in their order, is the buffer's element `offset`; `None` where it does not have it.
    pub fn rank_of(&self, offset: usize) -> Option<usize> {
        let mut before = 0;
        self.region.find_run(|start, len, stride| {
            let inside = offset.checked_sub(start).filter(|by| by % stride.max(1) == 0 && by / stride.max(1) < len);
            before += if inside.is_some() { 0 } else { len };
            inside.map(|by| before + by / stride.max(1))
        })
    }

    /// The buffer's element that is the `rank`th of its elements.
    pub fn offset_of(&self, rank: usize) -> Option<usize> {
        let mut before = 0;
        self.region.find_run(|start, len, stride| {
            let found = (rank < before + len).then(|| start + (rank - before) * stride);
            before += len;
            found
        })
    }
}

impl fmt::Display for Side<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl fmt::Debug for Side<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.name, self.buffer)
    }
}

/// A load or a store.
#[derive(Clone, Copy, Debug)]
pub struct AccessEvent<'e> {
    /// What it touches.
    pub side: Side<'e>,
    /// How many bytes that is.
    pub bytes: u64,
    /// Whether it stores.
    pub write: bool,
    /// Of a masked store: which elements, in their order, it stores to.
    pub mask: Option<&'e [bool]>,
}

/// A product of matrices, or `batch` of them: `[m, k] x [k, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatmulEvent {
    /// How many products.
    pub batch: usize,
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// The inner dimension.
    pub k: usize,
    /// What the left side holds.
    pub lhs: Element,
    /// What the right side holds.
    pub rhs: Element,
    /// Whether f32 is multiplied as f32, and not rounded to bf16.
    pub exact: bool,
}

/// A block that the pipeline copied; of an argument without a window, all of it.
#[derive(Clone, Copy, Debug)]
pub struct BlockEvent<'e> {
    /// The array's name.
    pub array: &'e str,
    /// The index of the block, in blocks.
    pub index: &'e [i64],
    /// How many bytes of it are inside the array.
    pub bytes: u64,
    /// From the window to the array; otherwise from the array to the window.
    pub written_back: bool,
    /// What was read.
    pub from: Side<'e>,
    /// What was written.
    pub to: Side<'e>,
    /// Whether the window has two buffers: on a chip the copy goes on while a step runs.
    pub double_buffered: bool,
    /// Whether it is for the step after the one that begins.
    pub ahead: bool,
}

/// A DMA that the kernel started.
#[derive(Clone, Copy, Debug)]
pub struct DmaEvent<'e> {
    /// Its number, counted from 0.
    pub id: usize,
    /// What it reads.
    pub from: Side<'e>,
    /// What it writes.
    pub to: Side<'e>,
    /// Whose memory that is, if it is another device's: then `to` is the buffer of that name here.
    pub device: Option<usize>,
    /// How many bytes it copies.
    pub bytes: usize,
    /// The semaphore that it signals: its buffer's name, and which of its cells.
    pub semaphore: (&'e str, usize),
    /// The source line that started it.
    pub location: &'e str,
}
