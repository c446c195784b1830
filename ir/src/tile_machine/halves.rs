//! The two halves of a grid on two threads, where its outermost dimension is `parallel`.
//!
//! Steps that differ in a `parallel` dimension see nothing of each other but the arrays in HBM. So each half runs on memories
//! of its own, and what both wrote is put together at the end. Where that could be told from one run after the other (a fault,
//! an element that both wrote, one that the second half read after the first had written it), all of it is dropped, and the
//! kernel runs again as one: results, counters and faults are always those of a run on one thread.

use std::{ops::Range, thread};

use super::{
    Counters, DmaOrder, Machine, Run,
    allocate::Allocation,
    exec::Executor,
    fault::FaultKind,
    memory::Buffer,
    program::{Code, Op, Program},
};
use crate::{mosaic::Semantics, shape::TensorType, tensor::HostTensor};

/// A half that came to its end.
struct Half<'p, 'i> {
    executor: Executor<'p, 'i, ()>,
    call: Allocation,
}

impl Program {
    /// Runs the halves of the grid side by side; `None` where they cannot be, or were not, independent.
    pub(super) fn run_halves(&self, machine: &Machine, inputs: &[HostTensor], outputs: &[TensorType]) -> Option<Run> {
        let (steps, middle) = self.halves(machine)?;
        let (mut nobody, mut no_one) = ((), ());
        let (first, second) = thread::scope(|scope| {
            let second = scope.spawn(|| self.half(machine, inputs, outputs, middle..steps, &mut nobody));
            let first = self.half(machine, inputs, outputs, 0..middle, &mut no_one);
            (first, second.join().ok().flatten())
        });
        let (mut first, second) = (first?, second?);
        for region in second.executor.reads.iter().flatten() {
            if first.executor.buffers[region.buffer].is_owned_in(region) {
                return None;
            }
        }
        for &array in &first.call.results {
            if !first.executor.buffers[array].take_over(&second.executor.buffers[array]) {
                return None;
            }
        }
        first.executor.counters = first.executor.counters + second.executor.counters;
        if first.executor.counters.ops > machine.max_ops {
            return None;
        }
        first.executor.results(&first.call.results, outputs).ok()
    }

    /// The number of steps, and the one at which the second half begins.
    fn halves(&self, machine: &Machine) -> Option<(usize, usize)> {
        let apart = !matches!(machine.dma, DmaOrder::Random(_))
            && !machine.overlaps()
            && self.unused_outputs.is_empty()
            && !self.communicates()
            && self.cores() == 1
            && !self.has_semaphores_of_the_call()
            && !machine.ignored.contains(FaultKind::SemaphoreUnbalanced);
        let grid = self.signature.grid.iter().map(|&(size, how)| Some((size?, how))).collect::<Option<Vec<_>>>()?;
        let &(size, how) = grid.iter().find(|(size, _)| *size > 1)?;
        let steps = grid.iter().try_fold(1_usize, |steps, &(size, _)| steps.checked_mul(size))?;
        let enough = self.work.saturating_mul(steps as u64) / 2 >= machine.least_work_of_a_thread;
        let split = apart && how == Semantics::Parallel && enough && !hangs_together(&self.body);
        split.then(|| (steps, steps / size * size.div_ceil(2)))
    }

    fn half<'p, 'i>(
        &'p self,
        machine: &'p Machine,
        inputs: &'i [HostTensor],
        outputs: &[TensorType],
        steps: Range<usize>,
        nobody: &'p mut (),
    ) -> Option<Half<'p, 'i>> {
        let mut executor = self.executor(machine, nobody, None);
        executor.reads = Some(vec![]);
        let signature = self.signature.clone().with_outputs(outputs.len());
        let mut call = executor.allocate(&signature.arguments, inputs, outputs).ok()?;
        if steps.start > 0 {
            // What comes before the first step is counted once.
            executor.counters = Counters { vmem_bytes: executor.counters.vmem_bytes, ..Counters::default() };
        }
        executor.grid(&call.views, &mut call.windows, steps).ok()?;
        executor.check_settled("at the end of the half").ok()?;
        Some(Half { executor, call })
    }
}

/// How many elements ops of `code` make, each run once; products count for their additions on registers.
pub(super) fn work(code: &Code, elements: &impl Fn(u32) -> u64) -> u64 {
    let ops = code.body.iter().map(|inst| {
        let own = match &inst.op {
            Op::Matmul { shape, .. } => shape.flops() / 32,
            _ => elements(inst.origin),
        };
        inst.codes.iter().fold(own, |sum, code| sum.saturating_add(work(code, elements)))
    });
    ops.fold(0, u64::saturating_add)
}

/// Whether a step depends on those before it: on how many random bits they drew, or on what they left in a matrix unit.
fn hangs_together(code: &Code) -> bool {
    let depends = |op: &Op| matches!(op, Op::Seed | Op::RandomBits { .. } | Op::Mxu(_));
    code.body.iter().any(|inst| depends(&inst.op) || inst.codes.iter().any(hangs_together))
}

impl Buffer<'_> {
    /// Takes what another half wrote into its own copy of this array; `false` where both wrote an element.
    fn take_over(&mut self, other: &Buffer<'_>) -> bool {
        let width = self.data.element().bytes();
        let len = self.data.len();
        let mut at = 0;
        while let Some(skipped) = other.owners[at..len].iter().position(|&owner| owner != 0) {
            at += skipped;
            let run = other.owners[at..len].iter().position(|&owner| owner == 0).unwrap_or(len - at);
            if self.owners[at..at + run].iter().any(|&owner| owner != 0) {
                return false;
            }
            let bytes = at * width..(at + run) * width;
            self.data.to_mut().bytes_mut()[bytes.clone()].copy_from_slice(&other.data.bytes()[bytes]);
            self.take_states(other, at, run);
            at += run;
        }
        true
    }
}
