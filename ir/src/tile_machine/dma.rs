//! DMAs and semaphores: what is in flight, when it lands, and what must not be touched meanwhile.

use std::collections::VecDeque;

use super::{
    DmaOrder,
    exec::{Executor, Step, side},
    fault::FaultKind,
    memory::{Buffer, Region, View},
    observer::{DmaEvent, Observer},
};
use crate::mosaic::MemorySpace;

/// A DMA that was started and not waited for.
#[derive(Debug)]
pub(super) struct Dma {
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
pub(super) struct Semaphore {
    /// Bytes that arrived and were not waited for; for counting semaphores, the count.
    value: i64,
    /// Bytes waited for that do not yet make up the DMA that landed first.
    credit: usize,
    /// DMAs in the order in which they landed.
    landed: VecDeque<usize>,
    /// Who touched it last.
    origin: u32,
}

impl<O: Observer> Executor<'_, '_, O> {
    fn describe_dma(&self, dma: &Dma) -> String {
        let (from, to) = (&self.buffers[dma.source.buffer].name, &self.buffers[dma.destination.buffer].name);
        format!("from `{from}` to `{to}` started at {} in grid step {:?}", self.location(dma.origin), dma.started)
    }

    /// Faults unless every DMA was waited for and every semaphore is zero at `when`.
    pub(super) fn check_settled(&self, when: &str) -> Step<()> {
        if self.machine.ignored.contains(FaultKind::SemaphoreUnbalanced) {
            return Ok(());
        }
        if let Some(dma) = self.dmas.first() {
            let detail = format!("a DMA was not waited for {when}");
            let mut fault = self.fault_at(FaultKind::SemaphoreUnbalanced, dma.origin, detail);
            fault = self.in_buffer(fault, dma.semaphore.0, dma.semaphore.1);
            fault.dma = Some(self.describe_dma(dma));
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

    /// Ends the scope of the buffers and semaphores from `first` on: no DMA may be in flight on them, no semaphore hold anything.
    pub(super) fn end_scope(&mut self, first: usize) -> Step<()> {
        let uses = |dma: &&Dma| {
            [dma.source.buffer, dma.destination.buffer, dma.semaphore.0].into_iter().any(|buffer| buffer >= first)
        };
        let checked = !self.machine.ignored.contains(FaultKind::SemaphoreUnbalanced);
        if let Some(dma) = self.dmas.iter().find(uses).filter(|_| checked) {
            let detail = "a DMA was not waited for when the scope of its buffer or semaphore ended".to_owned();
            let mut fault = self.fault_at(FaultKind::SemaphoreUnbalanced, dma.origin, detail);
            fault = self.in_buffer(fault, dma.semaphore.0, dma.semaphore.1);
            fault.dma = Some(self.describe_dma(dma));
            return Err(fault);
        }
        let left = self.semaphores.range((first, 0)..).find(|(_, semaphore)| semaphore.value != 0).filter(|_| checked);
        if let Some((&(buffer, cell), semaphore)) = left {
            let detail = format!("it holds {} when its scope ends", semaphore.value);
            let fault = self.fault_at(FaultKind::SemaphoreUnbalanced, semaphore.origin, detail);
            return Err(self.in_buffer(fault, buffer, cell));
        }
        let ended: Vec<usize> = (0..self.dmas.len()).filter(|&index| uses(&&self.dmas[index])).rev().collect();
        for index in ended {
            let dma = self.dmas.remove(index);
            for buffer in [dma.source.buffer, dma.destination.buffer] {
                self.buffers[buffer].in_flight -= 1;
            }
            self.semaphores.values_mut().for_each(|semaphore| semaphore.landed.retain(|&id| id != dma.id));
        }
        self.semaphores.retain(|&(buffer, _), _| buffer < first);
        self.free(first);
        Ok(())
    }

    /// Faults when an access to `region` meets a DMA in flight.
    pub(super) fn check_in_flight(&self, region: &Region, writes: bool, origin: Option<u32>) -> Step<()> {
        if self.buffers[region.buffer].in_flight == 0 {
            return Ok(());
        }
        for dma in &self.dmas {
            let hit =
                dma.destination.overlap(region).or_else(|| if writes { dma.source.overlap(region) } else { None });
            if let Some(offset) = hit {
                let kind = if writes { FaultKind::OverwriteInFlight } else { FaultKind::ReadInFlight };
                if self.machine.ignored.contains(kind) {
                    continue;
                }
                let mut fault = match origin {
                    Some(origin) => self.fault_at(kind, origin, String::new()),
                    None => self.fault(kind, &self.pipeline, String::new()),
                };
                fault = self.in_buffer(fault, region.buffer, offset);
                fault.dma = Some(self.describe_dma(dma));
                return Err(fault);
            }
        }
        Ok(())
    }

    pub(super) fn check_written(&self, region: &Region, origin: u32) -> Step<()> {
        match self.buffers[region.buffer].unwritten_in(region) {
            Some(offset) if !self.machine.reads_unwritten() => {
                let fault = self.fault_at(FaultKind::UnwrittenRead, origin, String::new());
                Err(self.in_buffer(fault, region.buffer, offset))
            }
            _ => Ok(()),
        }
    }

    /// Faults when a step at parallel position `owner` reads what another position wrote in `region` of an array.
    pub(super) fn check_core(&mut self, region: &Region, owner: u32, origin: Option<u32>) -> Step<()> {
        if let Some(reads) = self.reads.as_mut().filter(|_| self.buffers[region.buffer].has_owners()) {
            reads.push(region.clone());
        }
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

    pub(super) fn start_dma(&mut self, source: &View, destination: &View, semaphore: &View, origin: u32) -> Step<()> {
        let (from, to) = (source.all(), destination.all());
        self.check_in_flight(&from, false, Some(origin))?;
        self.check_core(&from, self.owner, Some(origin))?;
        self.check_in_flight(&to, true, Some(origin))?;
        self.check_written(&from, origin)?;
        let bytes = self.buffers[from.buffer].data.element().packed_bytes(from.len());
        if bytes != self.buffers[to.buffer].data.element().packed_bytes(to.len()) {
            let detail = format!("{:?} into {:?}", source.dims, destination.dims);
            return Err(self.fault_at(FaultKind::BadCall, origin, detail));
        }
        // Nothing to copy, and nothing to wait for.
        if from.is_empty() {
            return Ok(());
        }
        let dma = Dma {
            id: self.next_dma,
            source: from,
            destination: to,
            semaphore: (semaphore.buffer, semaphore.offset),
            bytes,
            origin,
            started: self.step.clone(),
            owner: self.owner,
            landed: false,
        };
        let (from, to) = (dma.source.buffer, dma.destination.buffer);
        if let Some(offset) = dma.destination.overlap(&dma.source) {
            let detail = "its destination is its source".to_owned();
            let mut fault = self.fault_at(FaultKind::OverwriteInFlight, origin, detail);
            fault = self.in_buffer(fault, to, offset);
            fault.dma = Some(self.describe_dma(&dma));
            return Err(fault);
        }
        self.buffers[from].in_flight += 1;
        self.buffers[to].in_flight += 1;
        self.semaphores.entry(dma.semaphore).or_default().origin = origin;
        self.observer.dma_start(&DmaEvent {
            id: dma.id,
            from: side(&self.buffers, &dma.source),
            to: side(&self.buffers, &dma.destination),
            bytes,
            semaphore: (&self.buffers[dma.semaphore.0].name, dma.semaphore.1),
            location: &self.program.origins[origin as usize].location,
        });
        self.dmas.push(dma);
        self.next_dma += 1;
        self.counters.copies += 1;
        match self.machine.dma {
            DmaOrder::Early => self.land(self.dmas.len() - 1)?,
            DmaOrder::Late => {}
            DmaOrder::Random(_) => {
                if self.random.below(2) == 0 {
                    let any = self.random.below(self.dmas.len());
                    if !self.dmas[any].landed {
                        self.land(any)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Counting semaphores: adds to one.
    pub(super) fn signal(&mut self, semaphore: &View, amount: i32, origin: u32) {
        let semaphore = self.semaphores.entry((semaphore.buffer, semaphore.offset)).or_default();
        semaphore.value += i64::from(amount);
        semaphore.origin = origin;
    }

    /// Counting semaphores: takes from one, which must hold that much.
    pub(super) fn wait_semaphore(&mut self, view: &View, amount: i32, origin: u32) -> Step<()> {
        let key = (view.buffer, view.offset);
        let semaphore = self.semaphores.entry(key).or_default();
        semaphore.origin = origin;
        let (kind, detail) = match (amount, semaphore.value) {
            (..0, _) => (FaultKind::SemaphoreUnbalanced, format!("{amount} is waited for; a wait takes 0 or more")),
            (_, value) if value < i64::from(amount) => {
                (FaultKind::Deadlock, format!("{amount} is waited for and it holds {value}"))
            }
            _ => {
                semaphore.value -= i64::from(amount);
                return Ok(());
            }
        };
        let fault = self.fault_at(kind, origin, detail);
        Err(self.in_buffer(fault, key.0, key.1))
    }

    /// What a semaphore holds.
    pub(super) fn semaphore_value(&self, view: &View) -> i64 {
        self.semaphores.get(&(view.buffer, view.offset)).map_or(0, |semaphore| semaphore.value)
    }

    fn land(&mut self, index: usize) -> Step<()> {
        let dma = &mut self.dmas[index];
        dma.landed = true;
        let (id, key, bytes, owner, origin) = (dma.id, dma.semaphore, dma.bytes, dma.owner, dma.origin);
        let (source, destination) = (dma.source.clone(), dma.destination.clone());
        if let Some((offset, other)) = self.buffers[destination.buffer].claim(&destination, owner) {
            let detail = format!("it was already written at parallel position {other}, now at {owner}");
            let mut fault = self.fault_at(FaultKind::ParallelOverlap, origin, detail);
            fault = self.in_buffer(fault, destination.buffer, offset);
            fault.dma = Some(self.describe_dma(&self.dmas[index]));
            return Err(fault);
        }
        Buffer::copy(&mut self.buffers, &source, &destination);
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
        self.observer.dma_land(id);
        Ok(())
    }

    pub(super) fn wait_dma(&mut self, semaphore: &View, destination: &View, origin: u32) -> Step<()> {
        let key = (semaphore.buffer, semaphore.offset);
        let to = destination.all();
        let bytes = self.buffers[to.buffer].data.element().packed_bytes(to.len());
        while self.semaphores.entry(key).or_default().value < bytes as i64 {
            let flying = |dma: &Dma| !dma.landed && dma.semaphore == key;
            let candidates: Vec<usize> = (0..self.dmas.len()).filter(|&index| flying(&self.dmas[index])).collect();
            let chosen = match (candidates.as_slice(), self.machine.dma) {
                ([], _) => {
                    let has = self.semaphores[&key].value;
                    let detail =
                        format!("{bytes} bytes are waited for, {has} arrived and no other DMA was started on it");
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
            let index = self.dmas.iter().position(|dma| dma.id == id).expect("a landed DMA stays until waited for");
            if self.dmas[index].bytes > semaphore.credit {
                break;
            }
            semaphore.credit -= self.dmas[index].bytes;
            semaphore.landed.pop_front();
            let dma = self.dmas.remove(index);
            self.buffers[dma.source.buffer].in_flight -= 1;
            self.buffers[dma.destination.buffer].in_flight -= 1;
            self.observer.dma_wait(id);
        }
        Ok(())
    }
}
