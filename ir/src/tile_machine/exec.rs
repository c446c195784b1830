//! The machine at work: the pipeline over the grid, the interpreter of instructions, and the DMA engines.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashSet, VecDeque},
    sync::Arc,
};

use super::{
    Counters, DmaOrder, Machine, Run,
    fault::{Fault, FaultKind},
    memory::{Buffer, Region, View},
    program::{Code, Inst, Op, Origin, Place, Program, Slot, Use},
    tile::{self, Binary, Scalar, Tile},
};
use crate::{
    element::Element,
    mosaic::{Argument, MemorySpace, RefElement, Role, Semantics},
    random::SplitMix64,
    shape::TensorType,
    tensor::HostTensor,
};

type Step<T> = Result<T, Box<Fault>>;

/// What a register holds.
#[derive(Clone, Debug)]
enum Reg {
    Empty,
    Scalar(Scalar),
    Tile(Tile),
    View(Arc<View>),
}

/// A copy that was started and not waited for.
#[derive(Debug)]
struct Copy {
    id: usize,
    source: Region,
    destination: Region,
    semaphore: (usize, usize),
    bytes: usize,
    origin: u32,
    started: Vec<usize>,
    owner: u32,
    landed: bool,
}

#[derive(Debug, Default)]
struct Semaphore {
    /// Bytes that arrived and were not waited for; for counting semaphores, the count.
    value: i64,
    /// Bytes waited for that do not yet make up the copy that landed first.
    credit: usize,
    /// Copies in the order in which they landed.
    landed: VecDeque<usize>,
    /// Who touched it last.
    origin: u32,
}

/// A windowed operand at run time.
struct Pipeline {
    argument: usize,
    output: bool,
    array: usize,
    buffers: Vec<usize>,
    current: usize,
    index: Vec<i64>,
    owner: u32,
    fetched_ahead: bool,
    /// Whether a block that was written back comes back when a step returns to it; the blocks that were.
    revisits: bool,
    visited: HashSet<Vec<i64>>,
}

struct Executor<'p, 'i> {
    program: &'p Program,
    machine: &'p Machine,
    buffers: Vec<Buffer<'i>>,
    /// Outputs without windows: the buffer that the kernel sees, and the array.
    whole_outputs: Vec<(usize, usize)>,
    registers: Vec<Reg>,
    copies: Vec<Copy>,
    next_copy: usize,
    semaphores: BTreeMap<(usize, usize), Semaphore>,
    random: SplitMix64,
    step: Vec<usize>,
    owner: u32,
    counters: Counters,
    pipeline: Origin,
}

impl Program {
    /// Runs the kernel on `machine`. `inputs` are the prefetched arrays and the inputs, `outputs` the types of the
    /// results, as the custom call has them.
    ///
    /// # Errors
    /// The first fault.
    pub fn run(&self, machine: &Machine, inputs: &[HostTensor], outputs: &[TensorType]) -> Result<Run, Box<Fault>> {
        let mut executor = Executor {
            program: self,
            machine,
            buffers: vec![],
            whole_outputs: vec![],
            registers: vec![Reg::Empty; self.slots],
            copies: vec![],
            next_copy: 0,
            semaphores: BTreeMap::new(),
            random: SplitMix64::new(match machine.dma {
                DmaOrder::Random(seed) => seed,
                _ => 0,
            }),
            step: vec![],
            owner: 0,
            counters: Counters::default(),
            pipeline: Origin { op: "pipeline".into(), location: "the kernel's grid".into() },
        };
        let signature = self.signature.clone().with_outputs(outputs.len());
        let (views, mut pipelines, results) = executor.allocate(&signature.arguments, inputs, outputs)?;
        executor.grid(&signature.grid, &views, &mut pipelines)?;
        executor.check_settled("at the end of the kernel")?;
        executor.put_whole_outputs();
        executor.results(&results, outputs)
    }
}

impl<'i> Executor<'_, 'i> {
    fn fault(&self, kind: FaultKind, origin: &Origin, detail: String) -> Box<Fault> {
        Box::new(Fault {
            kind,
            kernel: self.program.signature.name.clone(),
            op: origin.op.clone(),
            location: origin.location.clone(),
            buffer: None,
            index: vec![],
            grid_step: self.step.clone(),
            dma: None,
            detail,
        })
    }

    fn fault_at(&self, kind: FaultKind, origin: u32, detail: String) -> Box<Fault> {
        self.fault(kind, &self.program.origins[origin as usize], detail)
    }

    fn in_buffer(&self, mut fault: Box<Fault>, buffer: usize, offset: usize) -> Box<Fault> {
        fault.buffer = Some(self.buffers[buffer].name.clone());
        fault.index = self.buffers[buffer].unravel(offset);
        fault
    }

    fn describe_copy(&self, copy: &Copy) -> String {
        let origin = &self.program.origins[copy.origin as usize];
        let (from, to) = (&self.buffers[copy.source.buffer].name, &self.buffers[copy.destination.buffer].name);
        format!("from `{from}` to `{to}` started at {} in grid step {:?}", origin.location, copy.started)
    }

    // ---- memories ----

    #[allow(clippy::type_complexity)]
    fn allocate(
        &mut self,
        arguments: &[Argument],
        inputs: &'i [HostTensor],
        outputs: &[TensorType],
    ) -> Step<(Vec<Reg>, Vec<Pipeline>, Vec<usize>)> {
        let bad = |executor: &Self, detail: String| executor.fault(FaultKind::BadCall, &executor.pipeline, detail);
        let takes = arguments.iter().filter(|a| matches!(a.role, Role::Prefetch | Role::Input)).count();
        let gives = arguments.iter().filter(|a| a.role == Role::Output).count();
        if takes != inputs.len() || gives != outputs.len() {
            let detail =
                format!("{} inputs and {} outputs for a kernel with {takes} and {gives}", inputs.len(), outputs.len());
            return Err(bad(self, detail));
        }
        self.check_capacity(arguments, inputs, outputs)?;
        let parallel = self.program.signature.grid.iter().any(|&(size, how)| how == Semantics::Parallel && size > 1);
        let (mut views, mut pipelines, mut results) = (vec![], vec![], vec![]);
        let (mut next_input, mut next_output) = (0, 0);
        let mut input_arrays = vec![];
        for (position, argument) in arguments.iter().enumerate() {
            let name = &argument.name;
            let array = match argument.role {
                Role::Scratch => None,
                Role::Prefetch | Role::Input => {
                    let data = &inputs[next_input];
                    next_input += 1;
                    let ty = TensorType::new(data.element(), data.dims());
                    self.check_type(argument, &ty)?;
                    // Memory holds bits: ops, not elements, have a sign.
                    let data = match data.element().signless() {
                        same if same == data.element() => Cow::Borrowed(data),
                        signless => Cow::Owned(data.clone().reinterpreted(signless)),
                    };
                    self.buffers.push(Buffer::holding(name, MemorySpace::Hbm, data));
                    input_arrays.push(self.buffers.len() - 1);
                    Some(self.buffers.len() - 1)
                }
                Role::Output => {
                    let ty = &outputs[next_output];
                    self.check_type(argument, ty)?;
                    let element = ty.element.signless();
                    let alias = self.program.aliases.iter().find(|&&(_, output)| output == next_output);
                    let array = match alias {
                        Some(&(input, _)) => {
                            let array = input_arrays.get(input).copied();
                            let same = |&array: &usize| {
                                let data = &self.buffers[array].data;
                                data.element() == element && data.dims() == ty.dims
                            };
                            array.filter(same).ok_or_else(|| {
                                bad(self, format!("input {input} and output `{name}` cannot share memory"))
                            })?
                        }
                        None => {
                            self.buffers.push(Buffer::poisoned(name, MemorySpace::Hbm, element, &ty.dims));
                            self.buffers.len() - 1
                        }
                    };
                    if results.contains(&array) {
                        return Err(bad(self, format!("output `{name}` shares an input's memory with another output")));
                    }
                    if parallel {
                        let unused = self.program.unused_outputs.contains(&next_output);
                        self.buffers[array].track_owners(unused || self.machine.allow_parallel_overlaps);
                    }
                    next_output += 1;
                    results.push(array);
                    Some(array)
                }
            };
            let buffer = match (argument.space, argument.element, array) {
                (_, RefElement::Data(element), Some(array)) if argument.window.is_some() => {
                    let count = 1 + usize::from(argument.window.as_ref().is_some_and(|window| window.double_buffered));
                    let buffers: Vec<usize> = (0..count)
                        .map(|_| {
                            self.buffers.push(Buffer::poisoned(name, argument.space, element, &argument.dims));
                            self.buffers.len() - 1
                        })
                        .collect();
                    let first = buffers[0];
                    pipelines.push(Pipeline {
                        argument: position,
                        output: argument.role == Role::Output,
                        array,
                        buffers,
                        current: 0,
                        index: vec![],
                        owner: 0,
                        fetched_ahead: false,
                        revisits: argument.window.as_ref().is_some_and(|window| window.revisits),
                        visited: HashSet::new(),
                    });
                    first
                }
                (MemorySpace::Smem | MemorySpace::Vmem, _, Some(array)) => {
                    // A whole array that comes from HBM before the first step, or goes there after the last.
                    self.buffers.push(self.buffers[array].copied(name, argument.space));
                    let buffer = self.buffers.len() - 1;
                    match argument.role {
                        Role::Output if parallel => {
                            let detail = format!("`{name}` is one array for steps that may run on different cores");
                            return Err(bad(self, detail));
                        }
                        Role::Output => self.whole_outputs.push((buffer, array)),
                        _ => self.counters.hbm_bytes_read += self.buffers[array].data.bytes().len() as u64,
                    }
                    buffer
                }
                (_, _, Some(array)) => array,
                (space, RefElement::Data(element), None) => {
                    self.buffers.push(Buffer::poisoned(name, space, element, &argument.dims));
                    self.buffers.len() - 1
                }
                (space, _, None) => {
                    let cells = HostTensor::zeros(Element::I32, &argument.dims);
                    self.buffers.push(Buffer::holding(name, space, Cow::Owned(cells)));
                    self.buffers.len() - 1
                }
            };
            views.push(Reg::View(Arc::new(View::whole(buffer, argument.element, &argument.dims))));
        }
        Ok((views, pipelines, results))
    }

    fn put_whole_outputs(&mut self) {
        for (buffer, array) in std::mem::take(&mut self.whole_outputs) {
            self.counters.hbm_bytes_written += self.carry(&self.whole(buffer), &self.whole(array));
        }
    }

    fn check_type(&self, argument: &Argument, ty: &TensorType) -> Step<()> {
        let dims_fit = match argument.window {
            Some(_) => ty.dims.len() == argument.dims.len(),
            None => ty.dims == argument.dims,
        };
        if !dims_fit || argument.element != RefElement::Data(ty.element.signless()) {
            let expected = format!("{}{:?}", argument.element, argument.dims);
            let of = if argument.window.is_some() { " blocks" } else { "" };
            let detail = format!("`{}` takes {expected}{of}, not {ty}", argument.name);
            return Err(self.fault(FaultKind::BadCall, &self.pipeline, detail));
        }
        Ok(())
    }

    /// Before anything is allocated: what a kernel declares may be more than this computer has.
    fn check_capacity(&mut self, arguments: &[Argument], inputs: &[HostTensor], outputs: &[TensorType]) -> Step<()> {
        let (mut given, mut made) = (inputs.iter(), outputs.iter().enumerate());
        let mut declared = Vec::with_capacity(2 * arguments.len());
        for argument in arguments {
            let array = match argument.role {
                Role::Prefetch | Role::Input => given.next().map_or(0, |array| array.bytes().len()),
                // One that shares an input's memory takes none.
                Role::Output => made.next().map_or(0, |(at, ty)| {
                    let aliased = self.program.aliases.iter().any(|&(_, output)| output == at);
                    if aliased { 0 } else { ty.len() * ty.element.bytes() }
                }),
                Role::Scratch => 0,
            };
            declared.push(("HBM", array, &argument.name));
            declared.push(match (argument.space, argument.role, argument.element) {
                (MemorySpace::Vmem, ..) => ("VMEM", argument.bytes(), &argument.name),
                (MemorySpace::Smem, ..) => ("SMEM", argument.bytes(), &argument.name),
                (MemorySpace::Semaphore, ..) => ("semaphore memory", argument.bytes(), &argument.name),
                (MemorySpace::Any | MemorySpace::Hbm, Role::Scratch, RefElement::Data(element)) => {
                    ("HBM", argument.dims.iter().product::<usize>() * element.bytes(), &argument.name)
                }
                (MemorySpace::Any | MemorySpace::Hbm, ..) => ("HBM", 0, &argument.name),
            });
        }
        for (memory, limit) in [
            ("VMEM", self.machine.vmem_bytes),
            ("SMEM", self.machine.smem_bytes),
            ("HBM", self.machine.hbm_bytes),
            ("semaphore memory", self.machine.semaphore_bytes),
        ] {
            let own = declared.iter().filter(|(of, ..)| *of == memory).map(|&(_, bytes, name)| (bytes, name));
            let taken = own.clone().fold(0_usize, |total, (bytes, _)| total.saturating_add(bytes));
            if memory == "VMEM" {
                self.counters.vmem_bytes = taken;
            }
            if taken > limit {
                let detail = format!("the kernel declares {taken} bytes of {memory}; the limit is {limit}");
                let mut fault = self.fault(FaultKind::MemoryExceeded, &self.pipeline, detail);
                fault.buffer = own.max().map(|(_, name)| name.clone());
                return Err(fault);
            }
        }
        Ok(())
    }

    fn results(mut self, arrays: &[usize], types: &[TensorType]) -> Result<Run, Box<Fault>> {
        if !self.machine.allow_unwritten_outputs {
            let unused = &self.program.unused_outputs;
            let used = arrays.iter().enumerate().filter(|(output, _)| !unused.contains(output));
            for (_, &array) in used {
                if let Some(offset) = self.buffers[array].first_unwritten() {
                    let fault = self.fault(FaultKind::OutputNeverWritten, &self.pipeline, String::new());
                    return Err(self.in_buffer(fault, array, offset));
                }
            }
        }
        let empty = || Cow::Owned(HostTensor::zeros(Element::U8, &[0]));
        let mut take = |(&array, ty): (&usize, &TensorType)| {
            std::mem::replace(&mut self.buffers[array].data, empty()).into_owned().reinterpreted(ty.element)
        };
        let outputs = arrays.iter().zip(types).map(&mut take).collect();
        Ok(Run { outputs, counters: self.counters })
    }

    // ---- the pipeline ----

    fn grid(&mut self, grid: &[(usize, Semantics)], views: &[Reg], pipelines: &mut [Pipeline]) -> Step<()> {
        let steps: usize = grid.iter().map(|&(size, _)| size).product();
        let coordinates = |step: usize| -> Vec<usize> {
            let strides = tile::strides(&grid.iter().map(|&(size, _)| size).collect::<Vec<_>>());
            strides.iter().zip(grid).map(|(stride, &(size, _))| step / stride % size).collect()
        };
        // The position along the parallel dimensions alone.
        let owner = |at: &[usize]| {
            let parallel = at.iter().zip(grid).filter(|(_, (_, how))| *how == Semantics::Parallel);
            parallel.fold(0, |owner, (&index, &(size, _))| owner * size + index) as u32
        };
        let mut next: Vec<Vec<i64>> = vec![];
        for step in 0..steps {
            if step as u64 >= self.machine.max_ops {
                let detail = format!("a grid of {steps} steps (`Machine::max_ops` is {})", self.machine.max_ops);
                return Err(self.fault(FaultKind::Runaway, &self.pipeline, detail));
            }
            let at = coordinates(step);
            self.step.clone_from(&at);
            let before = std::mem::replace(&mut self.owner, owner(&at));
            if step > 0 && before != self.owner {
                self.enter_parallel_step(views)?;
            }
            let indices = match step {
                0 => self.block_indices(&at, views, pipelines)?,
                _ => std::mem::take(&mut next),
            };
            let following = (step + 1 < steps).then(|| coordinates(step + 1));
            next = match &following {
                None => vec![],
                Some(following) => self.block_indices(following, views, pipelines)?,
            };
            let next_owner = following.map_or(self.owner, |following| owner(&following));
            for (number, pipeline) in pipelines.iter_mut().enumerate() {
                let next = next.get(number).map(|index| (index.as_slice(), next_owner));
                self.begin_step(pipeline, &indices[number], next, step == 0)?;
            }
            let mut arguments: Vec<Reg> = at.iter().map(|&index| Reg::Scalar(Scalar::Int(index as i32))).collect();
            arguments.extend_from_slice(views);
            for pipeline in pipelines.iter() {
                let argument = &self.program.signature.arguments[pipeline.argument];
                let view = View::whole(pipeline.buffers[pipeline.current], argument.element, &argument.dims);
                arguments[at.len() + pipeline.argument] = Reg::View(Arc::new(view));
            }
            self.call(&self.program.body, arguments)?;
            for (number, pipeline) in pipelines.iter_mut().enumerate() {
                if next.get(number) != Some(&indices[number]) || next_owner != self.owner {
                    self.write_back(pipeline)?;
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
            }
        }
        Ok(())
    }

    fn block_indices(&mut self, at: &[usize], views: &[Reg], pipelines: &[Pipeline]) -> Step<Vec<Vec<i64>>> {
        let program = self.program;
        let mut indices = Vec::with_capacity(pipelines.len());
        for pipeline in pipelines {
            let code = program.transforms[pipeline.argument].as_ref().expect("a window has a transform");
            let mut arguments: Vec<Reg> = at.iter().map(|&index| Reg::Scalar(Scalar::Int(index as i32))).collect();
            let prefetched = program.signature.arguments.iter().zip(views).filter(|(a, _)| a.role == Role::Prefetch);
            arguments.extend(prefetched.map(|(_, view)| view.clone()));
            let values = self.call(code, arguments)?;
            indices.push(values.iter().map(|value| i64::from(int(value))).collect());
        }
        Ok(indices)
    }

    /// `next`: the block of the step that follows, and the parallel position of that step.
    fn begin_step(
        &mut self,
        pipeline: &mut Pipeline,
        index: &[i64],
        next: Option<(&[i64], u32)>,
        first: bool,
    ) -> Step<()> {
        let moved = first || pipeline.index != index;
        let crossed = pipeline.output && pipeline.owner != self.owner;
        if !moved && crossed && !self.buffers[pipeline.array].may_overlap {
            let fault = self.fault(
                FaultKind::ParallelOverlap,
                &self.pipeline,
                format!("block {index:?} belongs to this step and to the one before it, at another parallel position"),
            );
            return Err(self.in_buffer(fault, pipeline.array, self.block_offset(pipeline, index)));
        }
        pipeline.owner = self.owner;
        if moved || crossed {
            if !first {
                pipeline.current = (pipeline.current + 1) % pipeline.buffers.len();
            }
            pipeline.index = index.to_vec();
            let buffer = pipeline.buffers[pipeline.current];
            if pipeline.output {
                self.check_copies(&self.whole(buffer), true, None)?;
                self.buffers[buffer].poison();
                let (array, window, _) = self.block(pipeline, index)?;
                if pipeline.visited.contains(index) {
                    self.check_copies(&array, false, None)?;
                    self.check_core(&array, self.owner, None)?;
                    self.counters.hbm_bytes_read += self.carry(&array, &window);
                }
            } else if !std::mem::take(&mut pipeline.fetched_ahead) {
                self.fetch(pipeline, index, buffer, self.owner)?;
            }
        }
        // Double buffering: the next block's copy starts with this step, and is complete when the next one starts.
        let ahead = next.filter(|(next, _)| *next != index && pipeline.buffers.len() > 1 && !pipeline.output);
        if let Some((next, owner)) = ahead {
            let early = match self.machine.dma {
                DmaOrder::Early => true,
                DmaOrder::Late => false,
                DmaOrder::Random(_) => self.random.below(2) == 0,
            };
            if early {
                let other = pipeline.buffers[(pipeline.current + 1) % pipeline.buffers.len()];
                self.fetch(pipeline, next, other, owner)?;
                pipeline.fetched_ahead = true;
            }
        }
        Ok(())
    }

    fn block_offset(&self, pipeline: &Pipeline, index: &[i64]) -> usize {
        let array = &self.buffers[pipeline.array].dims;
        let block = &self.program.signature.arguments[pipeline.argument].dims;
        let strides = tile::strides(array);
        (0..index.len()).map(|dim| index[dim].max(0) as usize * block[dim] * strides[dim]).sum()
    }

    /// The parts of a block that are inside its array: region of the array, region of the window, and whether that is
    /// all of it.
    fn block(&self, pipeline: &Pipeline, index: &[i64]) -> Step<(Region, Region, bool)> {
        let argument = &self.program.signature.arguments[pipeline.argument];
        let (array, block) = (&self.buffers[pipeline.array].dims, &argument.dims);
        let mut offset = 0;
        let mut sizes = Vec::with_capacity(block.len());
        let strides = tile::strides(array);
        for dim in 0..block.len() {
            let start = index[dim] * block[dim] as i64;
            if start < 0 || start >= array[dim] as i64 {
                let mut fault = self.fault(
                    FaultKind::OutOfBounds,
                    &self.pipeline,
                    format!("block {index:?} of sizes {block:?} starts outside the array of sizes {array:?}"),
                );
                fault.buffer = Some(argument.name.clone());
                fault.index = index.iter().zip(block).map(|(&index, &size)| index * size as i64).collect();
                return Err(fault);
            }
            offset += start as usize * strides[dim];
            sizes.push(block[dim].min(array[dim] - start as usize));
        }
        let inside = Region::new(pipeline.array, offset, &sizes, &strides);
        let window = Region::new(pipeline.buffers[pipeline.current], 0, &sizes, &tile::strides(block));
        Ok((inside, window, sizes == *block))
    }

    /// Copies a block into a window, for a step at parallel position `owner`.
    fn fetch(&mut self, pipeline: &Pipeline, index: &[i64], buffer: usize, owner: u32) -> Step<()> {
        let (source, mut window, whole) = self.block(pipeline, index)?;
        window.buffer = buffer;
        self.check_copies(&source, false, None)?;
        self.check_copies(&self.whole(buffer), true, None)?;
        self.check_core(&source, owner, None)?;
        if !whole {
            self.buffers[buffer].poison();
        }
        let bytes = self.buffers[source.buffer].copy_out(&source);
        self.counters.hbm_bytes_read += bytes.len() as u64;
        self.buffers[buffer].all_written();
        self.buffers[buffer].copy_in(&window, &bytes);
        Ok(())
    }

    fn write_back(&mut self, pipeline: &mut Pipeline) -> Step<()> {
        if !pipeline.output {
            return Ok(());
        }
        let index = pipeline.index.clone();
        let (target, window, _) = self.block(pipeline, &index)?;
        self.check_copies(&target, true, None)?;
        self.check_copies(&window, false, None)?;
        if pipeline.revisits {
            pipeline.visited.insert(index.clone());
        }
        if let Some((offset, other)) = self.buffers[target.buffer].claim(&target, self.owner) {
            let fault = self.fault(
                FaultKind::ParallelOverlap,
                &self.pipeline,
                format!("block {index:?} was already written at parallel position {other}, now at {}", self.owner),
            );
            return Err(self.in_buffer(fault, target.buffer, offset));
        }
        self.counters.hbm_bytes_written += self.carry(&window, &target);
        self.buffers[target.buffer].contest(&target, self.owner);
        Ok(())
    }

    /// Copies between an array and its window; what is unwritten in one is unwritten in the other. The number of bytes.
    fn carry(&mut self, from: &Region, to: &Region) -> u64 {
        let bytes = self.buffers[from.buffer].copy_out(from);
        self.buffers[to.buffer].copy_in(to, &bytes);
        if self.buffers[from.buffer].unwritten_in(from).is_some() {
            let garbage = self.buffers[from.buffer].garbage_in(from);
            self.buffers[to.buffer].spoil(to, &garbage);
        }
        bytes.len() as u64
    }

    /// All of a buffer.
    fn whole(&self, buffer: usize) -> Region {
        let dims = &self.buffers[buffer].dims;
        Region::new(buffer, 0, dims, &tile::strides(dims))
    }

    /// Faults unless every copy was waited for and every semaphore is zero at `when`.
    fn check_settled(&self, when: &str) -> Step<()> {
        if let Some(copy) = self.copies.first() {
            let detail = format!("a copy was not waited for {when}");
            let mut fault = self.fault_at(FaultKind::SemaphoreUnbalanced, copy.origin, detail);
            fault = self.in_buffer(fault, copy.semaphore.0, copy.semaphore.1);
            fault.dma = Some(self.describe_copy(copy));
            return Err(fault);
        }
        for (&(buffer, cell), semaphore) in &self.semaphores {
            if semaphore.value != 0 {
                let detail = format!("it holds {} {when}", semaphore.value);
                let fault = self.fault_at(FaultKind::SemaphoreUnbalanced, semaphore.origin, detail);
                return Err(self.in_buffer(fault, buffer, cell));
            }
        }
        Ok(())
    }

    // ---- copies ----

    /// Faults when an access to `region` meets a copy in flight.
    fn check_copies(&self, region: &Region, writes: bool, origin: Option<u32>) -> Step<()> {
        if self.buffers[region.buffer].in_flight == 0 {
            return Ok(());
        }
        for copy in &self.copies {
            let hit =
                copy.destination.overlap(region).or_else(|| if writes { copy.source.overlap(region) } else { None });
            if let Some(offset) = hit {
                let kind = if writes { FaultKind::OverwriteInFlight } else { FaultKind::ReadInFlight };
                let mut fault = match origin {
                    Some(origin) => self.fault_at(kind, origin, String::new()),
                    None => self.fault(kind, &self.pipeline, String::new()),
                };
                fault = self.in_buffer(fault, region.buffer, offset);
                fault.dma = Some(self.describe_copy(copy));
                return Err(fault);
            }
        }
        Ok(())
    }

    fn check_written(&self, region: &Region, origin: u32) -> Step<()> {
        match self.buffers[region.buffer].unwritten_in(region) {
            Some(offset) if !self.machine.allow_unwritten_reads => {
                let fault = self.fault_at(FaultKind::UnwrittenRead, origin, String::new());
                Err(self.in_buffer(fault, region.buffer, offset))
            }
            _ => Ok(()),
        }
    }

    /// Faults when a step at parallel position `owner` reads what another position wrote in `region` of an array.
    fn check_core(&self, region: &Region, owner: u32, origin: Option<u32>) -> Step<()> {
        let Some((offset, other)) = self.buffers[region.buffer].written_elsewhere(region, owner) else {
            return Ok(());
        };
        let detail = match other {
            Some(other) => format!("it was written at parallel position {other} and is read at {owner}"),
            None => format!("it was written at several parallel positions and is read at {owner}"),
        };
        let origin = origin.map_or(&self.pipeline, |origin| &self.program.origins[origin as usize]);
        let fault = self.fault(FaultKind::ParallelOverlap, origin, detail);
        Err(self.in_buffer(fault, region.buffer, offset))
    }

    fn start_copy(&mut self, source: &View, destination: &View, semaphore: &View, origin: u32) -> Step<()> {
        let (from, to) = (source.all(), destination.all());
        self.check_copies(&from, false, Some(origin))?;
        self.check_core(&from, self.owner, Some(origin))?;
        self.check_copies(&to, true, Some(origin))?;
        self.check_written(&from, origin)?;
        let bytes = from.len() * self.buffers[from.buffer].data.element().bytes();
        if bytes != to.len() * self.buffers[to.buffer].data.element().bytes() {
            let detail = format!("{:?} into {:?}", source.dims, destination.dims);
            return Err(self.fault_at(FaultKind::BadCall, origin, detail));
        }
        self.buffers[from.buffer].in_flight += 1;
        self.buffers[to.buffer].in_flight += 1;
        let key = (semaphore.buffer, semaphore.offset);
        self.semaphores.entry(key).or_default().origin = origin;
        self.copies.push(Copy {
            id: self.next_copy,
            source: from,
            destination: to,
            semaphore: key,
            bytes,
            origin,
            started: self.step.clone(),
            owner: self.owner,
            landed: false,
        });
        self.next_copy += 1;
        self.counters.copies += 1;
        match self.machine.dma {
            DmaOrder::Early => self.land(self.copies.len() - 1)?,
            DmaOrder::Late => {}
            DmaOrder::Random(_) => {
                if self.random.below(2) == 0 {
                    let any = self.random.below(self.copies.len());
                    if !self.copies[any].landed {
                        self.land(any)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn land(&mut self, index: usize) -> Step<()> {
        let copy = &mut self.copies[index];
        copy.landed = true;
        let (id, key, bytes, owner, origin) = (copy.id, copy.semaphore, copy.bytes, copy.owner, copy.origin);
        let (source, destination) = (copy.source.clone(), copy.destination.clone());
        let data = self.buffers[source.buffer].copy_out(&source);
        if let Some((offset, other)) = self.buffers[destination.buffer].claim(&destination, owner) {
            let detail = format!("it was already written at parallel position {other}, now at {owner}");
            let mut fault = self.fault_at(FaultKind::ParallelOverlap, origin, detail);
            fault = self.in_buffer(fault, destination.buffer, offset);
            fault.dma = Some(self.describe_copy(&self.copies[index]));
            return Err(fault);
        }
        self.buffers[destination.buffer].copy_in(&destination, &data);
        self.buffers[destination.buffer].contest(&destination, owner);
        if self.buffers[source.buffer].space == MemorySpace::Hbm {
            self.counters.hbm_bytes_read += bytes as u64;
        }
        if self.buffers[destination.buffer].space == MemorySpace::Hbm {
            self.counters.hbm_bytes_written += bytes as u64;
        }
        let semaphore = self.semaphores.entry(key).or_default();
        semaphore.value += bytes as i64;
        semaphore.landed.push_back(id);
        Ok(())
    }

    fn wait_copy(&mut self, semaphore: &View, destination: &View, origin: u32) -> Step<()> {
        let key = (semaphore.buffer, semaphore.offset);
        let to = destination.all();
        let bytes = to.len() * self.buffers[to.buffer].data.element().bytes();
        while self.semaphores.entry(key).or_default().value < bytes as i64 {
            let flying = |copy: &Copy| !copy.landed && copy.semaphore == key;
            let candidates: Vec<usize> = (0..self.copies.len()).filter(|&index| flying(&self.copies[index])).collect();
            let chosen = match (candidates.as_slice(), self.machine.dma) {
                ([], _) => {
                    let has = self.semaphores[&key].value;
                    let detail =
                        format!("{bytes} bytes are waited for, {has} arrived and no other copy was started on it");
                    let fault = self.fault_at(FaultKind::Deadlock, origin, detail);
                    return Err(self.in_buffer(fault, key.0, key.1));
                }
                (candidates, DmaOrder::Random(_)) => candidates[self.random.below(candidates.len())],
                (candidates, _) => candidates[0],
            };
            self.land(chosen)?;
        }
        let semaphore = self.semaphores.entry(key).or_default();
        semaphore.value -= bytes as i64;
        semaphore.credit += bytes;
        semaphore.origin = origin;
        while let Some(&id) = semaphore.landed.front() {
            let index =
                self.copies.iter().position(|copy| copy.id == id).expect("a landed copy stays until waited for");
            if self.copies[index].bytes > semaphore.credit {
                break;
            }
            semaphore.credit -= self.copies[index].bytes;
            semaphore.landed.pop_front();
            let copy = self.copies.remove(index);
            self.buffers[copy.source.buffer].in_flight -= 1;
            self.buffers[copy.destination.buffer].in_flight -= 1;
        }
        Ok(())
    }

    // ---- instructions ----

    fn call(&mut self, code: &Code, arguments: Vec<Reg>) -> Step<Vec<Reg>> {
        for (&slot, argument) in code.parameters.iter().zip(arguments) {
            self.registers[slot as usize] = argument;
        }
        for inst in &code.body {
            self.execute(inst)?;
        }
        Ok(code.yields.iter().map(|read| self.take(read)).collect())
    }

    /// The content of a register, which dies if this was its last use.
    fn take(&mut self, read: &Use) -> Reg {
        let register = &mut self.registers[read.slot as usize];
        if read.last { std::mem::replace(register, Reg::Empty) } else { register.clone() }
    }

    fn tile(&mut self, read: &Use) -> Tile {
        match self.take(read) {
            Reg::Tile(tile) => tile,
            other => unreachable!("decoding gives a tile, not {other:?}"),
        }
    }

    fn scalar(&mut self, read: &Use) -> i32 {
        int(&self.take(read))
    }

    fn view(&mut self, read: &Use) -> Arc<View> {
        match self.take(read) {
            Reg::View(view) => view,
            other => unreachable!("decoding gives a memref, not {other:?}"),
        }
    }

    fn set(&mut self, slot: Slot, value: Reg) {
        self.registers[slot as usize] = value;
    }

    fn count_op(&mut self, origin: u32) -> Step<()> {
        self.counters.ops += 1;
        if self.counters.ops > self.machine.max_ops {
            let detail = format!("more than {} (`Machine::max_ops`): a loop that never ends?", self.machine.max_ops);
            return Err(self.fault_at(FaultKind::Runaway, origin, detail));
        }
        Ok(())
    }

    fn execute(&mut self, inst: &Inst) -> Step<()> {
        self.count_op(inst.origin)?;
        let origin = inst.origin;
        let result = match &inst.op {
            Op::Scalar(scalar) => Reg::Scalar(*scalar),
            Op::Constant(tile) => Reg::Tile(tile.clone()),
            Op::Unary { op, element, x } => match self.take(x) {
                Reg::Scalar(Scalar::Float(x)) => Reg::Scalar(Scalar::Float(tile::round(*element, op.float(x)))),
                Reg::Scalar(Scalar::Int(x)) => Reg::Scalar(Scalar::Int(tile::wrap(*element, op.int(x)))),
                Reg::Tile(x) => Reg::Tile(tile::unary(*op, *element, x)),
                other => other,
            },
            Op::Binary { op, element, x, y } => {
                let (x, y) = (self.take(x), self.take(y));
                let zero = |executor: &Self| executor.fault_at(FaultKind::DivisionByZero, origin, String::new());
                match (x, y) {
                    (Reg::Scalar(x), Reg::Scalar(y)) => {
                        Reg::Scalar(scalar_binary(*op, *element, x, y).ok_or_else(|| zero(self))?)
                    }
                    (Reg::Tile(x), Reg::Tile(y)) => {
                        Reg::Tile(tile::binary(*op, *element, x, y).ok_or_else(|| zero(self))?)
                    }
                    (x, y) => unreachable!("decoding gives operands of one shape, not {x:?} and {y:?}"),
                }
            }
            Op::Compare { op, x, y } => match (self.take(x), self.take(y)) {
                (Reg::Tile(x), Reg::Tile(y)) => Reg::Tile(tile::compare(*op, &x, &y)),
                (Reg::Scalar(Scalar::Float(x)), Reg::Scalar(Scalar::Float(y))) => {
                    Reg::Scalar(Scalar::Pred(op.float(x, y)))
                }
                (x, y) => Reg::Scalar(Scalar::Pred(op.int(int(&x), int(&y)))),
            },
            Op::Select { condition, then, otherwise } => {
                let (condition, then, otherwise) = (self.take(condition), self.take(then), self.take(otherwise));
                match (condition, then, otherwise) {
                    (Reg::Tile(condition), Reg::Tile(then), Reg::Tile(otherwise)) => {
                        Reg::Tile(tile::select(&condition, then, otherwise))
                    }
                    (condition, then, otherwise) => {
                        if int(&condition) != 0 {
                            then
                        } else {
                            otherwise
                        }
                    }
                }
            }
            Op::Convert { from, to, signed, x } => match self.take(x) {
                Reg::Tile(x) => Reg::Tile(tile::convert(*from, *to, *signed, x)),
                Reg::Scalar(x) => Reg::Scalar(tile::convert(*from, *to, *signed, tile::splat(x, 1)).get(0)),
                other => other,
            },
            Op::Broadcast { x, from, to } => match self.take(x) {
                Reg::Scalar(x) => Reg::Tile(tile::splat(x, to.iter().product())),
                Reg::Tile(x) => Reg::Tile(tile::broadcast(&x, from, to)),
                other => other,
            },
            Op::Same { x } => self.take(x),
            Op::Transpose { x, dims, permutation } => Reg::Tile(tile::transpose(&self.tile(x), dims, permutation)),
            Op::Slice { x, dims, offsets, sizes, steps } => {
                Reg::Tile(tile::slice(&self.tile(x), dims, offsets, sizes, steps))
            }
            Op::Concatenate { tiles, sizes, dim } => {
                let tiles: Vec<Tile> = tiles.iter().map(|tile| self.tile(tile)).collect();
                Reg::Tile(tile::concatenate(&tiles, sizes, *dim))
            }
            Op::Rotate { x, amount, dims, dim } => {
                let amount = i64::from(self.scalar(amount));
                Reg::Tile(tile::rotate(&self.tile(x), dims, *dim, amount))
            }
            Op::Reduce { how, element, x, initial, dims, over } => {
                let (x, initial) = (self.tile(x), self.tile(initial));
                Reg::Tile(tile::reduce(*how, *element, x, dims, over, initial))
            }
            Op::Bitcast { x, dims, from, to } => Reg::Tile(tile::bitcast(&self.tile(x), dims, *from, *to)),
            Op::Extract { x, index } => Reg::Scalar(self.tile(x).get(*index)),
            Op::Matmul { shape, lhs, rhs, accumulator, round } => {
                self.counters.mxu_flops += shape.flops();
                let (lhs, rhs, accumulator) = (self.tile(lhs), self.tile(rhs), self.tile(accumulator));
                Reg::Tile(tile::matmul(shape, lhs, rhs, accumulator, *round))
            }
            Op::Load { place, to } => Reg::Tile(self.load(place, *to, origin)?),
            Op::LoadScalar { place } => Reg::Scalar(self.load_scalar(place, origin)?),
            Op::Store { place, value, mask, add } => {
                self.store(place, value, mask.as_ref(), *add, origin)?;
                Reg::Empty
            }
            Op::StoreScalar { place, value } => {
                let Reg::Scalar(value) = self.take(value) else { unreachable!("decoding gives a scalar") };
                let (view, start) = self.place(place);
                let region = self.region(&view, &start, place, origin)?;
                self.check_copies(&region, true, Some(origin))?;
                region.for_each_run(|at, _, _| self.buffers[region.buffer].write_scalar(at, value));
                Reg::Empty
            }
            Op::SliceRef { place } => {
                let (view, start) = self.place(place);
                let sliced = view.slice(&start, &place.sizes);
                let sliced =
                    sliced.map_err(|(dim, index)| self.out_of_bounds(&view, dim, index, &start, place, origin))?;
                Reg::View(Arc::new(sliced))
            }
            Op::SqueezeRef { base, dims } => {
                let view = self.view(base);
                self.recast(&view, view.squeeze(dims), origin)?
            }
            Op::ReshapeRef { base, dims } => {
                let view = self.view(base);
                self.recast(&view, view.reshape(dims), origin)?
            }
            Op::BitcastRef { base, to, ratio } => {
                let view = self.view(base);
                self.recast(&view, view.bitcast(*to, *ratio), origin)?
            }
            Op::StartCopy { source, destination, semaphore } => {
                let (source, destination, semaphore) =
                    (self.view(source), self.view(destination), self.view(semaphore));
                self.start_copy(&source, &destination, &semaphore, origin)?;
                Reg::Empty
            }
            Op::WaitCopy { semaphore, destination } => {
                let (semaphore, destination) = (self.view(semaphore), self.view(destination));
                self.wait_copy(&semaphore, &destination, origin)?;
                Reg::Empty
            }
            Op::Signal { semaphore, amount } => {
                let (semaphore, amount) = (self.view(semaphore), self.scalar(amount));
                let semaphore = self.semaphores.entry((semaphore.buffer, semaphore.offset)).or_default();
                semaphore.value += i64::from(amount);
                semaphore.origin = origin;
                Reg::Empty
            }
            Op::WaitSemaphore { semaphore, amount } => {
                let (view, amount) = (self.view(semaphore), i64::from(self.scalar(amount)));
                if amount < 0 {
                    let detail = format!("{amount} is waited for; a wait takes 0 or more");
                    let fault = self.fault_at(FaultKind::SemaphoreUnbalanced, origin, detail);
                    return Err(self.in_buffer(fault, view.buffer, view.offset));
                }
                let semaphore = self.semaphores.entry((view.buffer, view.offset)).or_default();
                semaphore.origin = origin;
                if semaphore.value < amount {
                    let detail = format!("{amount} is waited for and it holds {}", semaphore.value);
                    let fault = self.fault_at(FaultKind::Deadlock, origin, detail);
                    return Err(self.in_buffer(fault, view.buffer, view.offset));
                }
                semaphore.value -= amount;
                Reg::Empty
            }
            Op::ReadSemaphore { semaphore } => {
                let view = self.view(semaphore);
                let value = self.semaphores.get(&(view.buffer, view.offset)).map_or(0, |semaphore| semaphore.value);
                Reg::Scalar(Scalar::Int(value as i32))
            }
            Op::AssumeMultiple { x, multiple } => {
                let x = self.scalar(x);
                if x % multiple != 0 {
                    let detail = format!("{x} is no multiple of {multiple}");
                    return Err(self.fault_at(FaultKind::BrokenAssumption, origin, detail));
                }
                Reg::Scalar(Scalar::Int(x))
            }
            Op::If { condition, then, otherwise } => {
                let code = if self.scalar(condition) != 0 { then } else { otherwise };
                let results = self.call(code, vec![])?;
                return self.finish_inst(inst, results);
            }
            Op::For { low, high, step, initial, body } => {
                let (low, high, step) = (self.scalar(low), self.scalar(high), self.scalar(step));
                if step <= 0 {
                    return Err(self.fault_at(FaultKind::Runaway, origin, format!("a loop with step {step}")));
                }
                let mut carried: Vec<Reg> = initial.iter().map(|value| self.take(value)).collect();
                let mut i = low;
                while i < high {
                    let mut arguments = Vec::with_capacity(1 + carried.len());
                    arguments.push(Reg::Scalar(Scalar::Int(i)));
                    arguments.append(&mut carried);
                    carried = self.call(body, arguments)?;
                    i = i.saturating_add(step);
                }
                return self.finish_inst(inst, carried);
            }
            Op::While { initial, before, after } => {
                let mut carried: Vec<Reg> = initial.iter().map(|value| self.take(value)).collect();
                loop {
                    let mut values = self.call(before, carried)?;
                    self.count_op(origin)?;
                    let condition = values.remove(0);
                    if int(&condition) == 0 {
                        carried = values;
                        break;
                    }
                    carried = self.call(after, values)?;
                }
                return self.finish_inst(inst, carried);
            }
            Op::Region { body } => {
                let results = self.call(body, vec![])?;
                return self.finish_inst(inst, results);
            }
        };
        if let Some(&slot) = inst.results.first() {
            self.set(slot, result);
        }
        for &slot in &inst.kills {
            self.set(slot, Reg::Empty);
        }
        Ok(())
    }

    fn finish_inst(&mut self, inst: &Inst, results: Vec<Reg>) -> Step<()> {
        for (&slot, result) in inst.results.iter().zip(results) {
            self.set(slot, result);
        }
        for &slot in &inst.kills {
            self.set(slot, Reg::Empty);
        }
        Ok(())
    }

    fn place(&mut self, place: &Place) -> (Arc<View>, Vec<i64>) {
        let start = place.indices.iter().map(|index| i64::from(self.scalar(index))).collect();
        (self.view(&place.base), start)
    }

    fn out_of_bounds(
        &self,
        view: &View,
        dim: usize,
        index: i64,
        start: &[i64],
        place: &Place,
        origin: u32,
    ) -> Box<Fault> {
        let detail = format!(
            "element {index} of dimension {dim} in a view of sizes {:?} (from {start:?}, sizes {:?})",
            view.dims, place.sizes
        );
        let mut fault = self.fault_at(FaultKind::OutOfBounds, origin, detail);
        fault.buffer = Some(self.buffers[view.buffer].name.clone());
        fault.index = start.to_vec();
        fault
    }

    fn region(&self, view: &View, start: &[i64], place: &Place, origin: u32) -> Step<Region> {
        view.region(start, &place.sizes, &place.steps)
            .map_err(|(dim, index)| self.out_of_bounds(view, dim, index, start, place, origin))
    }

    fn recast(&self, view: &View, recast: Option<View>, origin: u32) -> Step<Reg> {
        let message =
            || format!("a view of sizes {:?} and strides {:?} cannot be seen like this", view.dims, view.strides);
        let recast = recast.ok_or_else(|| self.fault_at(FaultKind::OutOfBounds, origin, message()))?;
        Ok(Reg::View(Arc::new(recast)))
    }

    fn load(&mut self, place: &Place, to: Element, origin: u32) -> Step<Tile> {
        let (view, start) = self.place(place);
        let region = self.region(&view, &start, place, origin)?;
        self.check_copies(&region, false, Some(origin))?;
        self.check_written(&region, origin)?;
        Ok(self.read(&region, place, to))
    }

    fn read(&self, region: &Region, place: &Place, to: Element) -> Tile {
        let buffer = &self.buffers[region.buffer];
        let stored = buffer.data.element();
        let tile = buffer.read(region);
        if stored == to {
            return tile;
        }
        // A view of narrow elements as wider ones reads them row by row.
        let mut dims = place.sizes.clone();
        let rows = dims.len().saturating_sub(2);
        dims[rows] *= to.bytes() / stored.bytes();
        tile::bitcast(&tile, &dims, stored, to)
    }

    fn load_scalar(&mut self, place: &Place, origin: u32) -> Step<Scalar> {
        let (view, start) = self.place(place);
        let region = self.region(&view, &start, place, origin)?;
        self.check_copies(&region, false, Some(origin))?;
        self.check_written(&region, origin)?;
        let mut value = Scalar::Int(0);
        region.for_each_run(|at, _, _| value = self.buffers[region.buffer].read_scalar(at));
        Ok(value)
    }

    fn store(&mut self, place: &Place, value: &Use, mask: Option<&Use>, add: bool, origin: u32) -> Step<()> {
        let mut value = self.tile(value);
        let mask = mask.map(|mask| self.tile(mask));
        let (view, start) = self.place(place);
        let region = self.region(&view, &start, place, origin)?;
        self.check_copies(&region, true, Some(origin))?;
        let RefElement::Data(element) = view.element else { unreachable!("decoding gives memory of numbers") };
        let stored = self.buffers[region.buffer].data.element();
        if add {
            self.check_written(&region, origin)?;
            let old = self.read(&region, place, element);
            value = tile::binary(Binary::Add, element, old, value).expect("an addition divides by nothing");
        }
        let mut mask = match mask {
            Some(Tile::Pred(mask)) => Some(mask.as_ref().clone()),
            _ => None,
        };
        if stored != element {
            let ratio = element.bytes() / stored.bytes();
            value = tile::bitcast(&value, &place.sizes, element, stored);
            let lanes = place.sizes.last().copied().unwrap_or(1);
            mask = mask.map(|mask| mask.chunks(lanes).flat_map(|row| row.repeat(ratio)).collect());
        }
        self.buffers[region.buffer].write(&region, &value, mask.as_deref());
        Ok(())
    }
}

/// A scalar register as an integer.
fn int(register: &Reg) -> i32 {
    match register {
        Reg::Scalar(Scalar::Int(x)) => *x,
        Reg::Scalar(Scalar::Pred(x)) => i32::from(*x),
        other => unreachable!("decoding gives an integer scalar, not {other:?}"),
    }
}

fn scalar_binary(op: Binary, element: Element, x: Scalar, y: Scalar) -> Option<Scalar> {
    Some(match (x, y) {
        (Scalar::Float(x), Scalar::Float(y)) => Scalar::Float(tile::round(element, op.float(x, y))),
        (Scalar::Pred(x), Scalar::Pred(y)) => Scalar::Pred(op.int(i32::from(x), i32::from(y))? & 1 != 0),
        (Scalar::Int(x), Scalar::Int(y)) => Scalar::Int(tile::wrap(element, op.int(x, y)?)),
        _ => unreachable!("decoding gives both sides one type"),
    })
}
