//! DMAs and semaphores: what is in flight, when it lands, and what must not be touched meanwhile.

use std::collections::VecDeque;

use super::{
    DmaOrder,
    exec::{Executor, Step, side},
    fabric::{Access, Flying, Incoming},
    fault::FaultKind,
    ledger::Sending,
    memory::{Buffer, Region, View},
    observer::{DmaEvent, Observer},
    program::RowDmas,
    tile::{self, Binary, Tile},
};
use crate::{
    element::Element,
    mosaic::{MemorySpace, RefElement},
};

/// A DMA that was started and not waited for.
#[derive(Debug)]
pub(super) struct Dma {
    pub(super) id: usize,
    pub(super) source: Region,
    pub(super) destination: Region,
    /// What the source's elements go to, where the rest of the destination gets what was in the padding of tiles.
    pub(super) unpadded: Option<Region>,
    /// Where the destination is another core's.
    pub(super) to: Option<Remote>,
    /// The size of its minor dimension.
    pub(super) lanes: usize,
    /// The semaphore of this core: that of the source, for a DMA to another.
    pub(super) semaphore: (usize, usize),
    pub(super) bytes: usize,
    pub(super) origin: u32,
    pub(super) started: Vec<usize>,
    pub(super) owner: u32,
    /// Whether its bytes are at the destination, or have left for another core.
    pub(super) landed: bool,
    /// Whether it adds its elements to the destination's.
    pub(super) adds: bool,
}

/// A DMA that may start.
pub(super) struct Checked {
    pub(super) from: Region,
    pub(super) to: Region,
    /// As [`Dma::unpadded`].
    pub(super) unpadded: Option<Region>,
    pub(super) bytes: usize,
}

/// Where a DMA to another core goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Remote {
    pub(super) core: usize,
    pub(super) sending: Sending,
}

#[derive(Debug, Default)]
pub(super) struct Semaphore {
    /// Bytes that arrived and were not waited for; for counting semaphores, the count.
    pub(super) value: i64,
    /// Bytes waited for that do not yet make up the DMA that landed first.
    credit: usize,
    /// DMAs in the order in which they landed, and their bytes; those of other devices have no number here.
    pub(super) landed: VecDeque<(Option<usize>, usize)>,
    /// Who touched it last.
    pub(super) origin: u32,
}

impl<O: Observer> Executor<'_, '_, O> {
    pub(super) fn describe_dma(&self, dma: &Dma) -> String {
        let (from, to) = (&self.buffers[dma.source.buffer].name, &self.buffers[dma.destination.buffer].name);
        let name = dma.to.zip(self.link.as_ref()).map(|(to, link)| format!(" of {}", link.name(to.core)));
        let of = name.unwrap_or_default();
        format!("from `{from}` to `{to}`{of} started at {} in grid step {:?}", self.location(dma.origin), dma.started)
    }

    /// At the end of the kernel: DMAs whose semaphore is the call's own go on, and whoever gets that waits for them. They land
    /// now, and nothing knows that they are in flight until that wait.
    pub(super) fn land_for_later(&mut self) -> Step<()> {
        while let Some(index) = self.dmas.iter().position(|dma| self.buffers[dma.semaphore.0].outlives) {
            if !self.dmas[index].landed {
                self.land(index)?;
            }
            let dma = self.dmas.remove(index);
            self.close(Flying::Own(dma.id));
            self.land_on_nothing(&dma);
        }
        Ok(())
    }

    /// Faults unless every DMA was waited for and every semaphore is zero at `when`.
    pub(super) fn check_settled(&self, when: &str) -> Step<()> {
        if self.machine.ignored.contains(FaultKind::SemaphoreUnbalanced) {
            return Ok(());
        }
        let of_kernel = |dma: &&Dma| !self.buffers[dma.semaphore.0].outlives;
        if let Some(dma) = self.dmas.iter().find(of_kernel) {
            let detail = format!("a DMA was not waited for {when}");
            let mut fault = self.fault_at(FaultKind::SemaphoreUnbalanced, dma.origin, detail);
            fault = self.in_buffer(fault, dma.semaphore.0, dma.semaphore.1);
            fault.dma = Some(self.describe_dma(dma));
            return Err(fault);
        }
        for (&(buffer, cell), semaphore) in &self.semaphores {
            if semaphore.value != 0 && !self.buffers[buffer].outlives {
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
            let destination = if dma.to.is_none() { dma.destination.buffer } else { 0 };
            [dma.source.buffer, destination, dma.semaphore.0].into_iter().any(|buffer| buffer >= first)
        };
        let checked = !self.machine.ignored.contains(FaultKind::SemaphoreUnbalanced);
        if let Some(dma) = self.dmas.iter().find(uses).filter(|_| checked) {
            let detail = "a DMA was not waited for when the scope of its buffer or semaphore ended".to_owned();
            let mut fault = self.fault_at(FaultKind::SemaphoreUnbalanced, dma.origin, detail);
            fault = self.in_buffer(fault, dma.semaphore.0, dma.semaphore.1);
            fault.dma = Some(self.describe_dma(dma));
            return Err(fault);
        }
        let into = |incoming: &&Incoming| incoming.region.buffer >= first;
        if let Some(incoming) = self.incoming().iter().find(into).filter(|_| checked) {
            let detail =
                "this device has not waited for all of a DMA when the scope of its destination ended".to_owned();
            let mut fault = self.fault_at(FaultKind::SemaphoreUnbalanced, incoming.origin, detail);
            fault.buffer = Some(self.buffers[incoming.region.buffer].name.clone());
            fault.dma = Some(self.describe_incoming(incoming));
            return Err(fault);
        }
        let left = self.semaphores.range((first, 0)..).find(|(key, semaphore)| {
            // Another device may be ahead, and at the next time around.
            semaphore.value != 0 && !self.is_sent_to(**key)
        });
        if let Some((&(buffer, cell), semaphore)) = left.filter(|_| checked) {
            let detail = format!("it holds {} when its scope ends", semaphore.value);
            let fault = self.fault_at(FaultKind::SemaphoreUnbalanced, semaphore.origin, detail);
            return Err(self.in_buffer(fault, buffer, cell));
        }
        let ended: Vec<usize> = (0..self.dmas.len()).filter(|&index| uses(&&self.dmas[index])).rev().collect();
        for index in ended {
            if !self.dmas[index].landed && self.dmas[index].to.is_some() {
                self.land(index)?;
            }
            let dma = self.dmas.remove(index);
            self.close(Flying::Own(dma.id));
            self.land_on_nothing(&dma);
            self.semaphores.values_mut().for_each(|semaphore| semaphore.landed.retain(|&(id, _)| id != Some(dma.id)));
        }
        self.leave_scope(first);
        self.semaphores.retain(|&(buffer, _), _| buffer < first);
        self.free(first);
        Ok(())
    }

    /// A DMA does not touch memory any more.
    fn land_on_nothing(&mut self, dma: &Dma) {
        self.buffers[dma.source.buffer].in_flight -= 1;
        if dma.to.is_none() {
            self.buffers[dma.destination.buffer].in_flight -= 1;
        }
    }

    /// Faults when an access to `region` meets a DMA in flight.
    pub(super) fn check_in_flight(&mut self, region: &Region, writes: bool, origin: Option<u32>) -> Step<()> {
        self.check_in_flight_by(region, Access::of(writes), origin)
    }

    pub(super) fn check_in_flight_by(&mut self, region: &Region, access: Access, origin: Option<u32>) -> Step<()> {
        self.check_in_flight_but(region, access, origin, |_, _| false)
    }

    /// Faults when an access to `region` meets a DMA in flight, unless it goes to the region too and `alike` is true of it.
    fn check_in_flight_but(
        &mut self,
        region: &Region,
        access: Access,
        origin: Option<u32>,
        alike: impl Fn(&Self, &Dma) -> bool,
    ) -> Step<()> {
        self.access(region, access, origin)?;
        let writes = access != Access::Reads;
        if self.buffers[region.buffer].in_flight == 0 {
            return Ok(());
        }
        let kind = if writes { FaultKind::OverwriteInFlight } else { FaultKind::ReadInFlight };
        if self.machine.ignored.contains(kind) {
            return Ok(());
        }
        let own = self.dmas.iter().find_map(|dma| {
            let destination = if dma.to.is_none() { dma.destination.overlap(region) } else { None };
            let destination = destination.filter(|_| !(dma.destination == *region && alike(self, dma)));
            let hit = destination.or_else(|| if writes { dma.source.overlap(region) } else { None });
            Some((hit?, self.describe_dma(dma)))
        });
        let hit = own.or_else(|| {
            let incoming = self.incoming().iter();
            incoming.filter_map(|one| Some((one.region.overlap(region)?, self.describe_incoming(one)))).next()
        });
        let Some((offset, dma)) = hit else { return Ok(()) };
        let mut fault = match origin {
            Some(origin) => self.fault_at(kind, origin, String::new()),
            None => self.fault(kind, &self.pipeline, String::new()),
        };
        fault = self.in_buffer(fault, region.buffer, offset);
        fault.dma = Some(dma);
        Err(fault)
    }

    pub(super) fn check_written(&mut self, region: &Region, origin: u32) -> Step<()> {
        match self.buffers[region.buffer].unwritten_in(region) {
            Some(offset) if !self.machine.reads_unwritten() => {
                if self.buffers[region.buffer].shared {
                    self.check_on_its_way(region, origin)?;
                }
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
            Some(other) => {
                let [other, owner] = [other, owner].map(|of| self.position(of));
                format!("it was written at parallel position {other} and is read at {owner}")
            }
            None => format!("it was written at several parallel positions and is read at {}", self.position(owner)),
        };
        let origin = origin.map_or(&self.pipeline, |origin| &self.program.origins[origin as usize]);
        let fault = self.fault(FaultKind::ParallelOverlap, origin, detail);
        Err(self.in_buffer(fault, region.buffer, offset))
    }

    /// Checks that a DMA may start: what it copies, where to, and its bytes. Whether something else is on its way to a
    /// destination on another device (not `here`) is for that device to check. Padding of an array's tiles may be copied, and
    /// be copied to.
    pub(super) fn checked_dma(&mut self, [source, destination]: [&View; 2], here: bool, origin: u32) -> Step<Checked> {
        self.checked([source, destination], here, false, origin)
    }

    fn checked(&mut self, [source, destination]: [&View; 2], here: bool, adds: bool, origin: u32) -> Step<Checked> {
        if here
            && (source.unpadded.is_some() || destination.unpadded.is_some())
            && let Some([from, unpadded]) = View::unpadded([source, destination])
        {
            let to = destination.unpadded.as_ref().map_or_else(|| destination.all(), |_| unpadded.clone());
            self.check_dma(&from, &to, here, adds, origin)?;
            let bytes = self.buffers[from.buffer].data.element().packed_bytes(source.dims.iter().product());
            return Ok(Checked { from, to, unpadded: Some(unpadded), bytes });
        }
        self.check_inside(source)?;
        self.check_inside(destination)?;
        let (from, to) = (source.all(), destination.all());
        self.check_dma(&from, &to, here, adds, origin)?;
        let bytes = self.bytes_of(&from);
        if bytes != self.bytes_of(&to) {
            let detail = format!("{:?} into {:?}", source.dims, destination.dims);
            return Err(self.fault_at(FaultKind::BadCall, origin, detail));
        }
        Ok(Checked { from, to, unpadded: None, bytes })
    }

    fn check_dma(&mut self, from: &Region, to: &Region, here: bool, adds: bool, origin: u32) -> Step<()> {
        self.check_in_flight(from, false, Some(origin))?;
        self.check_core(from, self.owner, Some(origin))?;
        if here {
            // Whichever of two DMAs lands last: where they bring the same bytes, these are there; where both add, both have.
            let into = self.buffers[to.buffer].data.element();
            self.check_in_flight_but(to, Access::to_destination(adds), Some(origin), |this, dma| {
                if adds || dma.adds {
                    return adds && dma.adds;
                }
                let bytes = |source: &Region| this.carried(source, into, dma.lanes);
                dma.unpadded.is_none() && dma.bytes == this.bytes_of(from) && bytes(&dma.source) == bytes(from)
            })?;
        }
        if adds {
            self.check_written(to, origin)?;
        }
        self.check_written(from, origin)
    }

    fn bytes_of(&self, region: &Region) -> usize {
        self.buffers[region.buffer].data.element().packed_bytes(region.len())
    }

    pub(super) fn start_dma(&mut self, sides: [&View; 2], semaphore: &View, adds: bool, origin: u32) -> Step<()> {
        let Checked { from, to, unpadded, bytes } = self.checked(sides, true, adds, origin)?;
        let [_, destination] = sides;
        // Nothing to copy, and nothing to wait for.
        if bytes == 0 {
            return Ok(());
        }
        let dma = Dma {
            id: self.next_dma,
            source: from,
            destination: to,
            unpadded,
            to: None,
            lanes: destination.dims.last().copied().unwrap_or(1),
            semaphore: (semaphore.buffer, semaphore.offset),
            bytes,
            origin,
            started: self.step.clone(),
            owner: self.owner,
            landed: false,
            adds,
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
        self.open(Flying::Own(dma.id), &dma.source, Access::Reads, origin);
        self.open(Flying::Own(dma.id), &dma.destination, Access::to_destination(adds), origin);
        self.semaphores.entry(dma.semaphore).or_default().origin = origin;
        self.count_sent(dma.semaphore, bytes as i64);
        self.observer.dma_start(&DmaEvent {
            id: dma.id,
            from: side(&self.buffers, &dma.source),
            to: side(&self.buffers, &dma.destination),
            device: None,
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

    /// Starts the DMA of each row that `numbers` names, in order, unless it is `none`: a row that is left out is waited for with
    /// the others.
    pub(super) fn start_row_dmas(
        &mut self,
        [source, destination]: [&View; 2],
        RowDmas { gathers, adds }: RowDmas,
        numbers: &Tile,
        none: Option<i32>,
        semaphore: &View,
        origin: u32,
    ) -> Step<()> {
        let Tile::Int(numbers) = numbers else { unreachable!("decoding gives integers") };
        let stored = |view: &View| RefElement::Data(self.buffers[view.buffer].data.element()) == view.element;
        if adds && !(stored(source) && stored(destination)) {
            let detail = format!("rows of {} are added in memory of another type", source.element);
            return Err(self.fault_at(FaultKind::BadCall, origin, detail));
        }
        let one: Vec<usize> = std::iter::once(1).chain(source.dims[1..].iter().copied()).collect();
        let row = |executor: &Self, of: &View, at: i64| {
            let start: Vec<i64> = std::iter::once(at).chain(one[1..].iter().map(|_| 0)).collect();
            of.slice(&start, &one).map_err(|(_, index)| {
                let detail = format!("row {index} of {}", of.dims[0]);
                let mut fault = executor.fault_at(FaultKind::OutOfBounds, origin, detail);
                fault.buffer = Some(executor.buffers[of.buffer].name.clone());
                fault
            })
        };
        for (at, &number) in numbers.iter().enumerate() {
            if none == Some(number) {
                let bytes = self.buffers[source.buffer].data.element().packed_bytes(one.iter().product());
                self.count_sent((semaphore.buffer, semaphore.offset), bytes as i64);
                let semaphore = self.semaphores.entry((semaphore.buffer, semaphore.offset)).or_default();
                semaphore.value += bytes as i64;
                semaphore.landed.push_back((None, bytes));
                continue;
            }
            let [of_source, of_destination] = if gathers { [number, at as i32] } else { [at as i32, number] };
            let from = row(self, source, i64::from(of_source))?;
            let to = row(self, destination, i64::from(of_destination))?;
            self.start_dma([&from, &to], semaphore, adds, origin)?;
        }
        Ok(())
    }

    /// Counting semaphores: adds to one.
    pub(super) fn signal(&mut self, semaphore: &View, amount: i32, origin: u32) {
        self.count_sent((semaphore.buffer, semaphore.offset), i64::from(amount));
        let semaphore = self.semaphores.entry((semaphore.buffer, semaphore.offset)).or_default();
        semaphore.value += i64::from(amount);
        semaphore.origin = origin;
    }

    /// Counting semaphores: takes from one, which must hold that much.
    pub(super) fn wait_semaphore(&mut self, view: &View, amount: i32, origin: u32) -> Step<()> {
        let key = (view.buffer, view.offset);
        while amount >= 0 && self.semaphore_value(view) < i64::from(amount) {
            if !self.wait_for_others(key, &format!("{amount}"), origin)? {
                break;
            }
        }
        // What is left in the end is due to who signalled it.
        let semaphore = self.semaphores.entry(key).or_default();
        let (kind, detail) = match (amount, semaphore.value) {
            (..0, _) => (FaultKind::SemaphoreUnbalanced, format!("{amount} is waited for; a wait takes 0 or more")),
            (_, value) if value < i64::from(amount) => {
                (FaultKind::Deadlock, format!("{amount} is waited for and it holds {value}"))
            }
            _ => {
                semaphore.value -= i64::from(amount);
                self.acquire(key, i64::from(amount), origin);
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

    /// The bytes of a DMA are at its destination, or leave for another device.
    pub(super) fn land(&mut self, index: usize) -> Step<()> {
        let dma = &mut self.dmas[index];
        dma.landed = true;
        let (id, key, bytes, owner, origin) = (dma.id, dma.semaphore, dma.bytes, dma.owner, dma.origin);
        let (source, destination, to, lanes) = (dma.source.clone(), dma.destination.clone(), dma.to, dma.lanes);
        if let Some(to) = to {
            let data = self.carried(&source, self.buffers[destination.buffer].data.element(), lanes);
            self.depart(id, to, data);
            self.landed(id, &source, None, key, bytes);
            return Ok(());
        }
        if let Some((offset, other)) = self.buffers[destination.buffer].claim(&destination, owner) {
            let [other, owner] = [other, owner].map(|of| self.position(of));
            let detail = format!("it was already written at parallel position {other}, now at {owner}");
            let mut fault = self.fault_at(FaultKind::ParallelOverlap, origin, detail);
            fault = self.in_buffer(fault, destination.buffer, offset);
            fault.dma = Some(self.describe_dma(&self.dmas[index]));
            return Err(fault);
        }
        let into = self.buffers[destination.buffer].data.element();
        let before = self.buffers[destination.buffer].uncontested(&destination);
        let unpadded = self.dmas[index].unpadded.clone();
        if self.dmas[index].adds {
            // Of padding there is nothing to add.
            let destination = unpadded.unwrap_or_else(|| destination.clone());
            let [old, new] = [&destination, &source].map(|region| self.buffers[region.buffer].read(region));
            let sum = tile::binary(Binary::Add, into, old, new);
            self.buffers[destination.buffer].write(&destination, &sum, None);
        } else if let Some(unpadded) = unpadded {
            self.buffers[destination.buffer].write_garbage(&destination);
            Buffer::copy(&mut self.buffers, &source, &unpadded);
        } else if self.buffers[source.buffer].data.element().bits() == into.bits() {
            Buffer::copy(&mut self.buffers, &source, &destination);
        } else {
            let data = self.carried(&source, into, lanes);
            self.buffers[destination.buffer].copy_in(&destination, &data);
        }
        self.buffers[destination.buffer].contest(&destination, owner, &before);
        self.landed(id, &source, Some(&destination), key, bytes);
        Ok(())
    }

    /// The bytes of `source`, as a buffer of `to` has them: narrow elements that are seen as wide ones, or wide as narrow, are
    /// rows of `lanes`.
    fn carried(&self, source: &Region, to: Element, lanes: usize) -> Vec<u8> {
        let buffer = &self.buffers[source.buffer];
        let from = buffer.data.element();
        if from.bits() == to.bits() {
            return buffer.copy_out(source);
        }
        let tile = tile::bitcast(&buffer.read(source), &[lanes], from, to);
        let len = source.len() * from.bits() / to.bits();
        let mut carried = Buffer::poisoned("", buffer.space, to, &[len]);
        let whole = Region::new(0, 0, &[len], &[1]);
        carried.write(&whole, &tile, None);
        carried.copy_out(&whole)
    }

    /// Counts the bytes of a DMA.
    fn landed(&mut self, id: usize, source: &Region, to: Option<&Region>, key: (usize, usize), bytes: usize) {
        if self.buffers[source.buffer].space == MemorySpace::Hbm {
            self.counters.hbm_bytes_read += bytes as u64;
        }
        if to.is_some_and(|to| self.buffers[to.buffer].space == MemorySpace::Hbm) {
            self.counters.hbm_bytes_written += bytes as u64;
        }
        let semaphore = self.semaphores.entry(key).or_default();
        semaphore.value += bytes as i64;
        semaphore.landed.push_back((Some(id), bytes));
        self.observer.dma_land(id);
    }

    pub(super) fn wait_dma(&mut self, semaphore: &View, bytes_of: &View, origin: u32) -> Step<()> {
        let key = (semaphore.buffer, semaphore.offset);
        let bytes = self.bytes_of(&bytes_of.all());
        self.keep_step()?;
        while self.semaphores.entry(key).or_default().value < bytes as i64 {
            let flying = |dma: &Dma| !dma.landed && dma.semaphore == key;
            let candidates: Vec<usize> = (0..self.dmas.len()).filter(|&index| flying(&self.dmas[index])).collect();
            let chosen = match (candidates.as_slice(), self.machine.dma) {
                ([], _) => {
                    let what = format!("{bytes} bytes");
                    if self.wait_for_others(key, &what, origin)? {
                        continue;
                    }
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
        let mut over = vec![];
        while let Some(&(id, size)) = semaphore.landed.front().filter(|&&(_, size)| size <= semaphore.credit) {
            semaphore.credit -= size;
            semaphore.landed.pop_front();
            over.extend(id);
        }
        for id in over {
            let index = self.dmas.iter().position(|dma| dma.id == id).expect("a landed DMA stays until waited for");
            let dma = self.dmas.remove(index);
            self.land_on_nothing(&dma);
            // Until now it read and wrote.
            self.close(Flying::Own(id));
            self.touch(&dma.source, Access::Reads, Some(origin));
            if dma.to.is_none() {
                self.touch(&dma.destination, Access::to_destination(dma.adds), Some(origin));
            }
            self.observer.dma_wait(id);
        }
        self.acquire(key, bytes as i64, origin);
        Ok(())
    }
}
