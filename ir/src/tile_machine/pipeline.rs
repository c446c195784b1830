//! The pipeline: walks the grid, and copies blocks of arrays into windows before a step and out of them after it.

use std::{borrow::Cow, collections::HashSet, ops::Range, sync::Arc};

use super::{
    DmaOrder,
    exec::{Executor, Reg, Step, int, side},
    fault::{Fault, FaultKind},
    memory::{Buffer, Region, View},
    observer::{BlockEvent, Observer},
    tile::{self, Scalar},
};
use crate::mosaic::{RefElement, Role, Semantics};

/// A windowed argument at run time.
pub(super) struct Window {
    pub(super) argument: usize,
    output: bool,
    array: usize,
    pub(super) buffers: Vec<usize>,
    current: usize,
    /// The block that is in it, and the parallel position of the step that it is for.
    index: Vec<i64>,
    owner: u32,
    fetched_ahead: bool,
    /// Whether a block that was written back comes back when a step returns to it; the blocks that were.
    revisits: bool,
    visited: HashSet<Vec<i64>>,
}

impl Window {
    pub(super) fn new(argument: usize, output: bool, array: usize, buffers: Vec<usize>, revisits: bool) -> Self {
        Self {
            argument,
            output,
            array,
            buffers,
            current: 0,
            index: vec![],
            owner: 0,
            fetched_ahead: false,
            revisits,
            visited: HashSet::new(),
        }
    }

    /// The buffer that the kernel sees.
    fn buffer(&self) -> usize {
        self.buffers[self.current]
    }

    /// The buffer of the next block.
    fn other_buffer(&self) -> usize {
        self.buffers[(self.current + 1) % self.buffers.len()]
    }
}

/// Where a block goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Into the window of this step.
    In,
    /// Into the window of the next one.
    Ahead,
    /// Out of the window.
    Back,
}

/// The part of a block that is inside its array.
struct Inside {
    /// In the array.
    array: Region,
    /// In a window's buffer.
    window: Region,
    /// Whether that is all of the block.
    whole: bool,
}

impl<O: Observer> Executor<'_, '_, O> {
    /// Runs some of the grid's steps, one after another.
    pub(super) fn grid(&mut self, views: &[Reg], windows: &mut [Window], range: Range<usize>) -> Step<()> {
        let semantics = self.program.signature.grid.iter().map(|&(_, how)| how);
        let grid: Vec<(usize, Semantics)> = self.bounds.iter().copied().zip(semantics).collect();
        let strides = tile::strides(&grid.iter().map(|&(size, _)| size).collect::<Vec<_>>());
        let coordinates = |step: usize| -> Vec<usize> {
            strides.iter().zip(&grid).map(|(stride, &(n, _))| step / stride % n).collect()
        };
        // The position along the parallel dimensions alone.
        let owner = |at: &[usize]| {
            let parallel = at.iter().zip(&grid).filter(|(_, (_, how))| *how == Semantics::Parallel);
            parallel.fold(0, |owner, (&index, &(size, _))| owner * size + index) as u32
        };
        let mut next: Vec<Vec<i64>> = vec![];
        // The blocks of the step before, which were there.
        let mut held = vec![];
        // (Those of another core are not this one's.)
        if range.start > 0 && self.link.is_none() {
            let counters = self.counters;
            held = self.block_indices(&coordinates(range.start - 1), views, windows)?;
            self.counters = counters;
        }
        for step in range.clone() {
            let first = step == range.start;
            if step as u64 >= self.machine.max_ops {
                let detail = format!("a grid of {} steps (`Machine::max_ops` is {})", range.end, self.machine.max_ops);
                return Err(self.fault(FaultKind::Runaway, &self.pipeline, detail));
            }
            let at = coordinates(step);
            self.step.clone_from(&at);
            self.observer.step(&at);
            let before = std::mem::replace(&mut self.owner, owner(&at));
            if !first && before != self.owner {
                self.enter_parallel_step(views)?;
            }
            let indices = match first {
                true => self.block_indices(&at, views, windows)?,
                false => std::mem::take(&mut next),
            };
            let following = (step + 1 < range.end).then(|| coordinates(step + 1));
            next = match &following {
                None => vec![],
                Some(following) => self.block_indices(following, views, windows)?,
            };
            let next_owner = following.map_or(self.owner, |following| owner(&following));
            for (number, window) in windows.iter_mut().enumerate() {
                let next = next.get(number).map(|index| (index.as_slice(), next_owner));
                let is_held = first && held.get(number) == Some(&indices[number]);
                self.begin_step(window, &indices[number], next, first, is_held)?;
            }
            let mut arguments: Vec<Reg> = at.iter().map(|&index| Reg::Scalar(Scalar::Int(index as i32))).collect();
            arguments.extend_from_slice(views);
            for window in windows.iter() {
                let argument = &self.program.signature.arguments[window.argument];
                let view = View::whole(window.buffer(), argument.element, &argument.dims);
                arguments[at.len() + window.argument] = Reg::View(Arc::new(view));
            }
            let program = self.program;
            self.call(if O::WATCHES { &program.body } else { &program.fused }, arguments)?;
            for (number, window) in windows.iter_mut().enumerate() {
                if window.output && (next.get(number) != Some(&indices[number]) || next_owner != self.owner) {
                    self.write_back(window)?;
                }
            }
            self.counters.grid_steps += 1;
        }
        Ok(())
    }

    /// Steps that may run on another core see nothing of what earlier ones left in scratch memory and semaphores.
    fn enter_parallel_step(&mut self, views: &[Reg]) -> Step<()> {
        self.check_settled("before a parallel grid step that may run on another core")?;
        for (argument, view) in self.program.signature.arguments.iter().zip(views) {
            if let (Role::Scratch, RefElement::Data(_), Reg::View(view)) = (argument.role, argument.element, view) {
                self.buffers[view.buffer].poison();
                self.observer
                    .forget(view.buffer, "a step at another parallel position, perhaps on another core, begins");
            }
        }
        // Every core has its own copy of these, as the call gave them.
        for at in 0..self.whole_inputs.len() {
            let (buffer, array) = self.whole_inputs[at];
            if matches!(self.buffers[buffer].data, Cow::Owned(_)) {
                self.carry(&self.whole(array), &self.whole(buffer));
                self.observe_whole(array, buffer, false);
            }
        }
        Ok(())
    }

    fn block_indices(&mut self, at: &[usize], views: &[Reg], windows: &[Window]) -> Step<Vec<Vec<i64>>> {
        let program = self.program;
        let mut indices = Vec::with_capacity(windows.len());
        for window in windows {
            let code = program.transforms[window.argument].as_ref().expect("a window has a transform");
            let mut arguments: Vec<Reg> = at.iter().map(|&index| Reg::Scalar(Scalar::Int(index as i32))).collect();
            let prefetched = program.signature.arguments.iter().zip(views).filter(|(a, _)| a.role == Role::Prefetch);
            arguments.extend(prefetched.map(|(_, view)| view.clone()));
            let values = self.call(code, arguments)?;
            indices.push(values.iter().map(|value| i64::from(int(value))).collect());
        }
        Ok(indices)
    }

    /// `next`: the block of the step that follows, and the parallel position of that step. `is_held`: whether the block was in
    /// the window before the first step, so that it would not be copied.
    fn begin_step(
        &mut self,
        window: &mut Window,
        index: &[i64],
        next: Option<(&[i64], u32)>,
        first: bool,
        is_held: bool,
    ) -> Step<()> {
        let moved = first || window.index != index;
        // An output's window of another core is not this one's, whatever its block is.
        let crossed = window.output && window.owner != self.owner;
        if !moved && crossed && !self.buffers[window.array].may_overlap {
            let fault = self.window_fault(
                window,
                FaultKind::ParallelOverlap,
                format!(
                    "block {index:?} belongs to this step and to the one before it, at parallel position {}, now at {}: a \
                     dimension that is declared parallel has steps that share a block",
                    self.position(window.owner),
                    self.position(self.owner)
                ),
            );
            return Err(self.in_buffer(fault, window.array, self.block_offset(window, index)));
        }
        window.owner = self.owner;
        if moved || crossed {
            if !first {
                window.current = (window.current + 1) % window.buffers.len();
            }
            window.index = index.to_vec();
            if window.output {
                self.begin_output(window, index)?;
            } else if !std::mem::take(&mut window.fetched_ahead) {
                let bytes = self.counters.hbm_bytes_read;
                self.fetch(window, index, window.buffer(), self.owner)?;
                if is_held {
                    self.counters.hbm_bytes_read = bytes;
                }
            }
        }
        // Double buffering: the next block's copy starts with this step, and is complete when the next one starts.
        let ahead = next.filter(|(next, _)| *next != index && window.buffers.len() > 1 && !window.output);
        if let Some((next, owner)) = ahead {
            let early = match self.machine.dma {
                DmaOrder::Early => true,
                DmaOrder::Late => false,
                DmaOrder::Random(_) => self.random.below(2) == 0,
            };
            if early {
                self.fetch(window, next, window.other_buffer(), owner)?;
                window.fetched_ahead = true;
            }
        }
        Ok(())
    }

    /// An output's window is unwritten at a new block; a block that is revisited holds what was written back.
    fn begin_output(&mut self, window: &Window, index: &[i64]) -> Step<()> {
        let buffer = window.buffer();
        self.check_in_flight(&self.whole(buffer), true, None)?;
        self.buffers[buffer].poison();
        self.observer.forget(buffer, "a new block of the output begins");
        let block = self.block(window, index, buffer)?;
        if window.visited.contains(index) {
            self.check_in_flight(&block.array, false, None)?;
            self.check_core(&block.array, self.owner, None)?;
            let bytes = self.carry(&block.array, &block.window);
            self.counters.hbm_bytes_read += bytes;
            self.observe_block(window, index, &block, bytes, Way::In);
        }
        Ok(())
    }

    fn block_offset(&self, window: &Window, index: &[i64]) -> usize {
        let strides = tile::strides(&self.buffers[window.array].dims);
        let start = self.block_start(window, index);
        start.iter().zip(strides).map(|(&start, stride)| start.max(0) as usize * stride).sum()
    }

    /// The element of the array at which a block starts; before the first where the array is padded.
    fn block_start(&self, window: &Window, index: &[i64]) -> Vec<i64> {
        let argument = &self.program.signature.arguments[window.argument];
        let padding = argument.window.as_ref().and_then(|window| window.element_padding.as_ref());
        let start = |dim: usize| match padding {
            Some(padding) => index[dim] - padding[dim].0 as i64,
            None => index[dim].saturating_mul(argument.dims[dim] as i64),
        };
        (0..index.len()).map(start).collect()
    }

    /// The part of a block that is inside its array, to be in `buffer`.
    fn block(&self, window: &Window, index: &[i64], buffer: usize) -> Step<Inside> {
        let argument = &self.program.signature.arguments[window.argument];
        let (array, block) = (&self.buffers[window.array].dims, &argument.dims);
        let padding = argument.window.as_ref().and_then(|window| window.element_padding.as_ref());
        let (mut offset, mut inner) = (0, 0);
        let mut sizes = Vec::with_capacity(block.len());
        let (strides, own) = (tile::strides(array), tile::strides(block));
        let starts = self.block_start(window, index);
        for dim in 0..block.len() {
            let (before, after) = padding.map_or((0, 0), |padding| padding[dim]);
            let (start, end) = (starts[dim], starts[dim].saturating_add(block[dim] as i64));
            // Without padding, a block may hang over the end.
            let within = start >= -(before as i64) && (after == 0 || end <= (array[dim] + after) as i64);
            if !within || start >= array[dim] as i64 || end <= 0 {
                let mut fault = self.window_fault(
                    window,
                    FaultKind::OutOfBounds,
                    format!("block {index:?} of sizes {block:?} starts outside the array of sizes {array:?}"),
                );
                fault.buffer = Some(argument.name.clone());
                fault.index = starts;
                return Err(fault);
            }
            let from = start.max(0) as usize;
            offset += from * strides[dim];
            inner += (-start).max(0) as usize * own[dim];
            sizes.push((end as usize).min(array[dim]) - from);
        }
        Ok(Inside {
            array: Region::new(window.array, offset, &sizes, &strides),
            window: Region::new(buffer, inner, &sizes, &own),
            whole: sizes == *block,
        })
    }

    /// Copies a block into `buffer`, for a step at parallel position `owner`.
    fn fetch(&mut self, window: &Window, index: &[i64], buffer: usize, owner: u32) -> Step<()> {
        let block = self.block(window, index, buffer)?;
        let checked = self.check_in_flight(&block.array, false, None);
        let checked = checked.and_then(|()| self.check_in_flight(&self.whole(buffer), true, None));
        let checked = checked.and_then(|()| self.check_core(&block.array, owner, None));
        checked.map_err(|fault| self.of_window(window, fault))?;
        if !block.whole {
            self.buffers[buffer].poison();
        }
        self.buffers[buffer].all_written();
        let bytes = self.carry(&block.array, &block.window);
        self.counters.hbm_bytes_read += bytes;
        let way = if buffer == window.buffer() { Way::In } else { Way::Ahead };
        self.observe_block(window, index, &block, bytes, way);
        Ok(())
    }

    fn write_back(&mut self, window: &mut Window) -> Step<()> {
        let index = window.index.clone();
        let block = self.block(window, &index, window.buffer())?;
        let Inside { array, window: made, .. } = &block;
        self.check_in_flight(array, true, None)?;
        self.check_in_flight(made, false, None)?;
        if let Some((offset, other)) = self.buffers[window.array].claim(array, self.owner) {
            let fault = self.window_fault(
                window,
                FaultKind::ParallelOverlap,
                format!(
                    "block {index:?} was already written at parallel position {}, now at {}",
                    self.position(other),
                    self.position(self.owner)
                ),
            );
            return Err(self.in_buffer(fault, window.array, offset));
        }
        let before = self.buffers[window.array].uncontested(array);
        let bytes = self.carry(made, array);
        self.counters.hbm_bytes_written += bytes;
        self.buffers[window.array].contest(array, self.owner, &before);
        self.observe_block(window, &index, &block, bytes, Way::Back);
        if window.revisits {
            window.visited.insert(index);
        }
        Ok(())
    }

    /// A fault of the pipeline: where the window's transform is, if that is known.
    fn window_fault(&self, window: &Window, kind: FaultKind, detail: String) -> Box<Fault> {
        self.of_window(window, self.fault(kind, &self.pipeline, detail))
    }

    fn of_window(&self, window: &Window, mut fault: Box<Fault>) -> Box<Fault> {
        let frames = &self.program.transform_frames[window.argument];
        if !frames.is_empty() {
            fault.frames.clone_from(frames);
        }
        fault
    }

    fn observe_block(&mut self, window: &Window, index: &[i64], block: &Inside, bytes: u64, way: Way) {
        let array = &self.buffers[window.array].name;
        let (outside, inside) = (side(&self.buffers, &block.array), side(&self.buffers, &block.window));
        let written_back = way == Way::Back;
        let (from, to) = if written_back { (inside, outside) } else { (outside, inside) };
        let (double_buffered, ahead) = (window.buffers.len() > 1, way == Way::Ahead);
        self.observer.block(&BlockEvent { array, index, bytes, written_back, from, to, double_buffered, ahead });
    }

    /// Copies between an array and its window; what is unwritten in one is unwritten in the other. The number of bytes.
    pub(super) fn carry(&mut self, from: &Region, to: &Region) -> u64 {
        Buffer::copy(&mut self.buffers, from, to);
        if self.buffers[from.buffer].unwritten_in(from).is_some() {
            let garbage = self.buffers[from.buffer].garbage_in(from);
            self.buffers[to.buffer].spoil(to, &garbage);
        }
        (from.len() * self.buffers[from.buffer].data.element().bytes()) as u64
    }

    /// An array without a window was copied between HBM and the memory that the kernel sees it in.
    pub(super) fn observe_whole(&mut self, array: usize, buffer: usize, written_back: bool) {
        let (outside, inside) = (self.whole(array), self.whole(buffer));
        let (outside, inside) = (side(&self.buffers, &outside), side(&self.buffers, &inside));
        let (from, to) = if written_back { (inside, outside) } else { (outside, inside) };
        let bytes = self.buffers[array].data.bytes().len() as u64;
        let (double_buffered, ahead) = (false, false);
        let array = &self.buffers[array].name;
        self.observer.block(&BlockEvent { array, index: &[], bytes, written_back, from, to, double_buffered, ahead });
    }

    /// All of a buffer.
    pub(super) fn whole(&self, buffer: usize) -> Region {
        let dims = &self.buffers[buffer].dims;
        Region::new(buffer, 0, dims, &tile::strides(dims))
    }
}
