//! The memories of a call: what is there before the first grid step, and what is left after the last.

use std::{borrow::Cow, sync::Arc};

use super::{
    Run,
    exec::{Executor, Reg, Step},
    fault::FaultKind,
    memory::{Buffer, View},
    observer::Observer,
    pipeline::Window,
};
use crate::{
    element::Element,
    mosaic::{Argument, MemorySpace, RefElement, Role, Semantics, describe_memref, tile_padded_bytes},
    shape::TensorType,
    tensor::HostTensor,
};

/// Where a call's arguments are.
pub(super) struct Allocation {
    /// What the kernel gets for each argument; for windows, the first of their buffers.
    pub(super) views: Vec<Reg>,
    pub(super) windows: Vec<Window>,
    /// The array of each output.
    pub(super) results: Vec<usize>,
}

impl<'i, O: Observer> Executor<'_, 'i, O> {
    /// Lays out every memory for a call.
    pub(super) fn allocate(
        &mut self,
        arguments: &[Argument],
        inputs: &'i [HostTensor],
        outputs: &[TensorType],
    ) -> Step<Allocation> {
        let bad = |executor: &Self, detail: String| executor.fault(FaultKind::BadCall, &executor.pipeline, detail);
        let dynamic = self.program.signature.dynamic_grid_sizes();
        let takes = dynamic + arguments.iter().filter(|a| matches!(a.role, Role::Prefetch | Role::Input)).count();
        let gives = arguments.iter().filter(|a| a.role == Role::Output).count();
        if takes != inputs.len() || gives != outputs.len() {
            let detail =
                format!("{} inputs and {} outputs for a kernel with {takes} and {gives}", inputs.len(), outputs.len());
            return Err(bad(self, detail));
        }
        let (sizes, inputs) = inputs.split_at(dynamic);
        self.grid_sizes(sizes)?;
        self.check_capacity(arguments, inputs, outputs)?;
        let semantics = self.program.signature.grid.iter().map(|&(_, how)| how);
        let parallel = self.bounds.iter().zip(semantics).any(|(&size, how)| how == Semantics::Parallel && size > 1);
        let (mut views, mut windows, mut results) = (vec![], vec![], vec![]);
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
                            let array = input.checked_sub(dynamic).and_then(|input| input_arrays.get(input).copied());
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
                    let unused = self.program.unused_outputs.contains(&next_output);
                    match &mut self.link {
                        // Cores that run at the same time have clocks, and no owners.
                        Some(link) if link.has_common_memory() => link.unused.extend(unused.then_some(array)),
                        _ if parallel => self.buffers[array].track_owners(unused || self.machine.overlaps()),
                        _ => {}
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
                    let revisits = argument.window.as_ref().is_some_and(|window| window.revisits);
                    windows.push(Window::new(position, argument.role == Role::Output, array, buffers, revisits));
                    first
                }
                // It shares the array of an input, and the kernel writes to that: Pallas's references (`core_map`) are inputs.
                (MemorySpace::Smem | MemorySpace::Vmem, _, Some(array))
                    if !parallel
                        && self.program.unnamed.contains(&position)
                        && let Some(&(buffer, _)) = self.whole_inputs.iter().find(|(_, input)| *input == array) =>
                {
                    self.whole_outputs.push((buffer, array));
                    buffer
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
                        _ => {
                            self.counters.hbm_bytes_read += self.buffers[array].data.bytes().len() as u64;
                            self.observe_whole(array, buffer, false);
                            self.whole_inputs.push((buffer, array));
                        }
                    }
                    buffer
                }
                (_, RefElement::DmaSemaphore | RefElement::Semaphore, Some(_))
                    if self.link.as_ref().is_some_and(|link| link.has_common_memory()) =>
                {
                    let detail =
                        format!("`{name}` is a semaphore of the call, and this kernel's cores wait for each other");
                    return Err(bad(self, detail));
                }
                (_, RefElement::DmaSemaphore | RefElement::Semaphore, Some(array)) => {
                    self.of_call(array, argument.role == Role::Output && !input_arrays.contains(&array));
                    array
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
        let cell = HostTensor::zeros(Element::I32, &[]);
        self.buffers.push(Buffer::holding("the barrier semaphore", MemorySpace::Semaphore, Cow::Owned(cell)));
        self.barrier = self.buffers.len() - 1;
        Ok(Allocation { views, windows, results })
    }

    /// Makes semaphores of a call's array, which holds their numbers; of a new one they are 0.
    fn of_call(&mut self, array: usize, new: bool) {
        let buffer = &mut self.buffers[array];
        buffer.outlives = true;
        if new {
            buffer.data = Cow::Owned(HostTensor::zeros(Element::I32, &buffer.dims));
            buffer.all_written();
        }
        for (cell, &value) in
            self.buffers[array].data.as_slice::<i32>().iter().enumerate().filter(|(_, value)| **value != 0)
        {
            self.semaphores.entry((array, cell)).or_default().value = i64::from(value);
        }
        let given: Vec<(usize, i64)> =
            self.semaphores.range((array, 0)..=(array, usize::MAX)).map(|(&(_, cell), s)| (cell, s.value)).collect();
        given.into_iter().for_each(|(cell, value)| self.count_sent((array, cell), value));
    }

    /// Sets the sizes of the grid; `given` are those that the call gives.
    fn grid_sizes(&mut self, given: &[HostTensor]) -> Step<()> {
        let mut given = given.iter();
        for (dim, (size, _)) in self.program.signature.grid.iter().enumerate() {
            let size = size.or_else(|| {
                let tensor = given.next().filter(|size| size.element() == Element::I32 && size.len() == 1)?;
                usize::try_from(tensor.as_slice::<i32>()[0]).ok()
            });
            match size {
                Some(size) => self.bounds.push(size),
                None => {
                    let detail = format!("the size of grid dimension {dim} is one i32 of 0 or more");
                    return Err(self.fault(FaultKind::BadCall, &self.pipeline, detail));
                }
            }
        }
        let steps = self.bounds.iter().try_fold(1_usize, |steps, &size| steps.checked_mul(size.max(1)));
        match steps.is_some_and(|steps| steps <= 1 << 40) {
            true => Ok(()),
            false => {
                let detail = format!("a grid of {:?} steps has more than 2^40", self.bounds);
                Err(self.fault(FaultKind::Runaway, &self.pipeline, detail))
            }
        }
    }

    /// A buffer that the kernel allocates while it runs; its number.
    pub(super) fn allocate_scoped(
        &mut self,
        element: RefElement,
        dims: &[usize],
        space: MemorySpace,
        origin: u32,
    ) -> Step<usize> {
        let name = format!("{} allocated at {}", describe_memref(element, dims), self.location(origin));
        let bytes = match element {
            RefElement::Data(element)
                if matches!(space, MemorySpace::Vmem | MemorySpace::VmemShared | MemorySpace::Smem) =>
            {
                tile_padded_bytes(element, dims)
            }
            RefElement::Data(element) => element.packed_bytes(dims.iter().product()),
            _ => 4 * dims.iter().product::<usize>(),
        };
        let (memory, limit) = self.limit(space);
        let taken = self.taken.entry(memory).or_default();
        *taken += bytes;
        let taken = *taken;
        if memory == "VMEM" {
            self.counters.vmem_bytes = self.counters.vmem_bytes.max(taken);
        }
        if taken > limit && !self.machine.ignored.contains(FaultKind::MemoryExceeded) {
            let detail = format!("the kernel takes {taken} bytes of {memory} with this; the limit is {limit}");
            let mut fault = self.fault_at(FaultKind::MemoryExceeded, origin, detail);
            fault.buffer = Some(name);
            return Err(fault);
        }
        let mut buffer = match element {
            RefElement::Data(element) => Buffer::poisoned(&name, space, element, dims),
            _ => Buffer::holding(&name, space, Cow::Owned(HostTensor::zeros(Element::I32, dims))),
        };
        buffer.scoped_bytes = bytes;
        let shared = &self.program.communication;
        buffer.shared = self.link.is_some() && (shared.anywhere || shared.allocations.contains(&origin));
        self.buffers.push(buffer);
        let buffer = self.buffers.len() - 1;
        self.enter_scope(origin, buffer)?;
        Ok(buffer)
    }

    /// The name and the size of a memory.
    fn limit(&self, space: MemorySpace) -> (&'static str, usize) {
        match space {
            MemorySpace::Vmem | MemorySpace::VmemShared => ("VMEM", self.machine.vmem_bytes),
            MemorySpace::Smem => ("SMEM", self.machine.smem_bytes),
            MemorySpace::Semaphore => ("semaphore memory", self.machine.semaphore_bytes),
            MemorySpace::Any | MemorySpace::Hbm => ("HBM", self.machine.hbm_bytes),
            MemorySpace::Host => ("the host's memory", usize::MAX),
        }
    }

    /// Ends the life of the buffers from `first` on.
    pub(super) fn free(&mut self, first: usize) {
        for buffer in self.buffers.split_off(first) {
            let (memory, _) = self.limit(buffer.space);
            let taken = self.taken.entry(memory).or_default();
            *taken = taken.saturating_sub(buffer.scoped_bytes);
        }
    }

    pub(super) fn put_whole_outputs(&mut self) {
        for (buffer, array) in std::mem::take(&mut self.whole_outputs) {
            self.counters.hbm_bytes_written += self.carry(&self.whole(buffer), &self.whole(array));
            self.observe_whole(array, buffer, true);
        }
    }

    fn check_type(&self, argument: &Argument, ty: &TensorType) -> Step<()> {
        let dims_fit = match argument.window {
            Some(_) => ty.dims.len() == argument.dims.len(),
            None => ty.dims == argument.dims,
        };
        // Semaphores are given as the numbers that they hold.
        let element = argument.element.data().unwrap_or(Element::I32);
        if !dims_fit || element != ty.element.signless() {
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
                    if aliased { 0 } else { ty.element.packed_bytes(ty.len()) }
                }),
                Role::Scratch => 0,
            };
            declared.push(("HBM", array, &argument.name));
            declared.push(match (argument.space, argument.role, argument.element) {
                (MemorySpace::Host, ..) => ("the host's memory", 0, &argument.name),
                (MemorySpace::Vmem | MemorySpace::VmemShared, ..) => ("VMEM", argument.bytes(), &argument.name),
                (MemorySpace::Smem, ..) => ("SMEM", argument.bytes(), &argument.name),
                (MemorySpace::Semaphore, ..) => ("semaphore memory", argument.bytes(), &argument.name),
                (MemorySpace::Any | MemorySpace::Hbm, Role::Scratch, RefElement::Data(element)) => {
                    ("HBM", element.packed_bytes(argument.dims.iter().product()), &argument.name)
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
            self.taken.insert(memory, taken);
            if memory == "VMEM" {
                self.counters.vmem_bytes = taken;
            }
            if taken > limit && !self.machine.ignored.contains(FaultKind::MemoryExceeded) {
                let detail = format!("the kernel declares {taken} bytes of {memory}; the limit is {limit}");
                let mut fault = self.fault(FaultKind::MemoryExceeded, &self.pipeline, detail);
                fault.buffer = own.max().map(|(_, name)| name.clone());
                return Err(fault);
            }
        }
        Ok(())
    }

    pub(super) fn results(mut self, arrays: &[usize], types: &[TensorType]) -> Step<Run> {
        if !self.machine.leaves_outputs_unwritten() {
            let unused = &self.program.unused_outputs;
            let used = arrays.iter().enumerate().filter(|(output, _)| !unused.contains(output));
            for (_, &array) in used {
                if let Some(offset) = self.buffers[array].first_unwritten() {
                    let fault = self.fault(FaultKind::OutputNeverWritten, &self.pipeline, String::new());
                    return Err(self.in_buffer(fault, array, offset));
                }
            }
        }
        for &array in arrays {
            if !self.buffers[array].outlives {
                continue;
            }
            let values = self.buffers[array].data.to_mut().as_mut_slice::<i32>();
            values.fill(0);
            for (&(_, cell), semaphore) in self.semaphores.range((array, 0)..=(array, usize::MAX)) {
                values[cell] = i32::try_from(semaphore.value).unwrap_or(i32::MAX);
            }
        }
        let empty = || Cow::Owned(HostTensor::zeros(Element::U8, &[0]));
        let mut take = |(&array, ty): (&usize, &TensorType)| {
            std::mem::replace(&mut self.buffers[array].data, empty()).into_owned().reinterpreted(ty.element)
        };
        let outputs = arrays.iter().zip(types).map(&mut take).collect();
        Ok(Run { outputs, counters: self.counters })
    }
}
