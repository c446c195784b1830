//! What happened to one element: who wrote it, and what of it was in flight, as far back as its value comes from.
//!
//! Nothing is recorded while a kernel runs. The machine does the same again for the same call, so whoever wants to know runs it
//! once more, watching one element: a fault costs a second run, and a run without one costs nothing.

use std::collections::HashMap;

use super::{
    Machine, Program,
    exec::FIRST_OF_CORE,
    observer::{AccessEvent, BlockEvent, DmaEvent, Observer, OpEvent, Side},
};
use crate::{mosaic::Frame, shape::TensorType, tensor::HostTensor};

/// An element of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// Of a buffer, by its number: [`Fault::cell`](super::Fault::cell).
    Buffer {
        /// The buffer's number.
        buffer: usize,
        /// The element's place in it, row-major.
        offset: usize,
    },
    /// Of an output, counted from 0.
    Output {
        /// The output's number.
        output: usize,
        /// The element's place in it, row-major.
        offset: usize,
    },
}

/// One thing that happened to an element.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Past {
    /// What happened, in words.
    pub what: String,
    /// The source line, if an op did it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,
    /// That line and those that called it, the innermost first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub frames: Vec<Frame>,
    /// The grid step.
    pub grid_step: Vec<usize>,
}

impl std::fmt::Display for Past {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { what, location, grid_step, .. } = self;
        let at = location.as_ref().map_or(String::new(), |location| format!(" at {location}"));
        write!(f, "{what}{at}, grid step {grid_step:?}")
    }
}

/// How many copies a value is followed back through, and how many events of one element are kept.
const HOPS: usize = 4;
const KEPT: usize = 4;
/// The part of a DMA's number that counts those of its core.
const OF_ITS_CORE: usize = (1 << FIRST_OF_CORE) - 1;

impl Program {
    /// What happened to `cell` in a run of the same call, the last first; of an element that was copied, what happened before
    /// to the one that it was copied from.
    pub fn history(&self, machine: &Machine, inputs: &[HostTensor], outputs: &[TensorType], cell: Cell) -> Vec<Past> {
        match self.cores() {
            1 => history(cell, |watch| {
                // The run ends as the first one did.
                let _ = self.run_observed(machine, inputs, outputs, watch);
            }),
            _ => self.history_of_device(machine, &[inputs.to_vec()], outputs, [0, 0], cell),
        }
    }

    /// [`history`](Self::history) of an element of one of several devices or cores; what came from others is not followed to
    /// them.
    pub fn history_of_device(
        &self,
        machine: &Machine,
        inputs: &[Vec<HostTensor>],
        outputs: &[TensorType],
        [device, core]: [usize; 2],
        cell: Cell,
    ) -> Vec<Past> {
        let nothing = Cell::Buffer { buffer: usize::MAX, offset: 0 };
        let (cores, watched) = (self.cores(), device * self.cores() + core);
        history(cell, |watch| {
            let mut watches: Vec<Watch> = (0..cores * inputs.len()).map(|_| Watch::new(nothing, u64::MAX)).collect();
            std::mem::swap(&mut watches[watched], watch);
            let _ = self.run_devices_observed(machine, inputs, outputs, &mut watches);
            std::mem::swap(&mut watches[watched], watch);
        })
    }
}

/// The past of `cell` in runs that `run` makes, each watched.
fn history(cell: Cell, run: impl Fn(&mut Watch)) -> Vec<Past> {
    let mut pasts = vec![];
    let (mut cell, mut before) = (cell, u64::MAX);
    for _ in 0..HOPS {
        let mut watch = Watch::new(cell, before);
        run(&mut watch);
        let last_copy = watch.seen.iter().rev().find(|event| event.writes);
        let source = last_copy.and_then(|event| Some((event.from?, event.at)));
        for Event { past, .. } in watch.seen.into_iter().rev().take(KEPT) {
            // A DMA is seen on both of its sides.
            if !pasts.contains(&past) {
                pasts.push(past);
            }
        }
        let Some(((buffer, offset), at)) = source else { break };
        (cell, before) = (Cell::Buffer { buffer, offset }, at);
    }
    pasts
}

/// An event of the watched element.
struct Event {
    at: u64,
    past: Past,
    writes: bool,
    /// The element that it was copied from.
    from: Option<(usize, usize)>,
}

struct Watch {
    cell: Cell,
    before: u64,
    /// Events so far, whichever element they are of: the same in every run.
    now: u64,
    step: Vec<usize>,
    op: (String, String, Vec<Frame>),
    seen: Vec<Event>,
    /// DMAs that touch the element: their names, and the element that they copy to it.
    dmas: HashMap<usize, (String, Option<(usize, usize)>)>,
}

impl Watch {
    fn new(cell: Cell, before: u64) -> Self {
        let op = Default::default();
        Self { cell, before, now: 0, step: vec![], op, seen: vec![], dmas: HashMap::new() }
    }

    /// The element's place in what `side` touches.
    fn rank_in(&self, side: &Side) -> Option<usize> {
        match self.cell {
            Cell::Buffer { buffer, offset } if buffer == side.buffer => side.rank_of(offset),
            _ => None,
        }
    }

    fn see(&mut self, what: String, by_op: bool, writes: bool, from: Option<(usize, usize)>) {
        if self.now >= self.before {
            return;
        }
        let (_, location, frames) = &self.op;
        let past = Past {
            what,
            location: by_op.then(|| location.clone()),
            frames: if by_op { frames.clone() } else { vec![] },
            grid_step: self.step.clone(),
        };
        self.seen.push(Event { at: self.now, past, writes, from });
        // What was before the last few does not matter.
        if self.seen.len() > 4 * KEPT {
            self.seen.drain(..KEPT);
        }
    }
}

impl Observer for Watch {
    fn begin(&mut self, outputs: &[usize]) {
        if let Cell::Output { output, offset } = self.cell
            && let Some(&buffer) = outputs.get(output)
        {
            self.cell = Cell::Buffer { buffer, offset };
        }
    }

    fn step(&mut self, at: &[usize]) {
        self.now += 1;
        self.step = at.to_vec();
    }

    fn op(&mut self, op: &OpEvent) {
        self.now += 1;
        self.op = (op.op.to_owned(), op.location.to_owned(), op.frames.to_vec());
    }

    fn access(&mut self, access: &AccessEvent) {
        self.now += 1;
        let Some(rank) = self.rank_in(&access.side).filter(|_| access.write) else { return };
        if access.mask.is_none_or(|mask| mask.get(rank).copied().unwrap_or(true)) {
            let what = format!("`{}` written by {}", access.side.name, self.op.0);
            self.see(what, true, true, None);
        }
    }

    fn forget(&mut self, buffer: usize, why: &str) {
        self.now += 1;
        if matches!(self.cell, Cell::Buffer { buffer: watched, .. } if watched == buffer) {
            self.see(format!("unwritten again: {why}"), false, false, None);
        }
    }

    fn block(&mut self, block: &BlockEvent) {
        self.now += 1;
        let BlockEvent { array, index, from, to, written_back, .. } = block;
        let block = if index.is_empty() { String::new() } else { format!(" (block {index:?})") };
        if let Some(rank) = self.rank_in(to) {
            let source = from.offset_of(rank).map(|offset| (from.buffer, offset));
            let what = match written_back {
                true => format!("array `{array}` written back from its window{block}"),
                false => format!("window of `{array}` filled from the array{block}"),
            };
            self.see(what, false, true, source);
        }
    }

    fn dma_start(&mut self, dma: &DmaEvent) {
        self.now += 1;
        let to = if dma.device.is_none() { self.rank_in(&dma.to) } else { None };
        if to.is_none() && self.rank_in(&dma.from).is_none() {
            return;
        }
        let (name, cell) = dma.semaphore;
        let DmaEvent { from, to: into, .. } = dma;
        let id = dma.id & OF_ITS_CORE;
        let device = dma.device.map_or(String::new(), |device| format!(" of device {device}"));
        let text = format!("DMA {id} from `{from}` to `{into}`{device} (semaphore `{name}`[{cell}])");
        let source = to.and_then(|rank| Some((dma.from.buffer, dma.from.offset_of(rank)?)));
        self.see(format!("{text} started"), true, false, None);
        self.dmas.insert(dma.id, (text, source));
    }

    fn dma_land(&mut self, id: usize) {
        self.now += 1;
        if let Some((text, source)) = self.dmas.get(&id).cloned() {
            // Its value is there now; who copies from the element does not write it.
            self.see(format!("{text} landed"), false, source.is_some(), source);
        }
    }

    fn dma_arrive(&mut self, from: usize, to: Side, _bytes: usize) {
        self.now += 1;
        if self.rank_in(&to).is_some() {
            self.see(format!("`{to}` written by a DMA from device {from}"), false, true, None);
        }
    }

    fn dma_wait(&mut self, id: usize) {
        self.now += 1;
        if let Some((text, _)) = self.dmas.remove(&id) {
            self.see(format!("{text} waited for"), true, false, None);
        }
    }
}
