//! Watching a run, event by event, at no cost where nobody does.

/// Gets the events of a run, in their order. Every method does nothing unless it is overridden, and [`Program::run`]
/// watches with `()`, so that not watching costs nothing.
///
/// [`Program::run`]: super::Program::run
pub trait Observer {
    /// A grid step begins.
    fn step(&mut self, _at: &[usize]) {}
    /// An op of the kernel, or of a window's transform, begins. The machine runs one after another.
    fn op(&mut self, _op: &OpEvent) {}
    /// The pipeline has copied a block between an array and its window.
    fn block(&mut self, _block: &BlockEvent) {}
    /// The kernel has started a DMA. It is in flight.
    fn dma_start(&mut self, _dma: &DmaEvent) {}
    /// The bytes of DMA `id` are at its destination. It is in flight until it is waited for.
    fn dma_land(&mut self, _id: usize) {}
    /// DMA `id` was waited for. It is over.
    fn dma_wait(&mut self, _id: usize) {}
}

/// Nobody watches.
impl Observer for () {}

/// An op that is about to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpEvent<'e> {
    /// Its number in the program: the same wherever it runs again.
    pub number: u32,
    /// Its full name.
    pub op: &'e str,
    /// Its source line.
    pub location: &'e str,
}

/// A block that the pipeline copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockEvent<'e> {
    /// The array's name.
    pub array: &'e str,
    /// The index of the block, in blocks.
    pub index: &'e [i64],
    /// How many bytes of it are inside the array.
    pub bytes: u64,
    /// From the window to the array; otherwise from the array to the window.
    pub written_back: bool,
}

/// A DMA that the kernel started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaEvent<'e> {
    /// Its number, counted from 0.
    pub id: usize,
    /// The buffer that it reads.
    pub from: &'e str,
    /// The buffer that it writes.
    pub to: &'e str,
    /// How many bytes it copies.
    pub bytes: usize,
    /// The source line that started it.
    pub location: &'e str,
}
