//! Cores of one device that wait for each other: which there are, the memory that they have in common, barriers, and additions to
//! each other's numbers. What orders their accesses is in [`devices`](super::devices).

use std::{borrow::Cow, collections::HashSet};

use super::{
    Program,
    allocate::Allocation,
    devices::Addressee,
    exec::{Executor, Reg, Step},
    fabric::{Access, Flying, Meeting, Open, Station, Status, Touch, Turn},
    fault::FaultKind,
    ledger::join,
    memory::{Buffer, Region},
    observer::Observer,
    tile::{self, Scalar, Tile},
};
use crate::{
    element::Element,
    error::Error,
    mosaic::{CoreType, MemorySpace, Semantics, Signature},
    tensor::HostTensor,
};

/// The most cores of a device that may wait for each other: each takes a thread.
const MOST_CORES: usize = 256;

impl Program {
    /// What each of a device's cores runs.
    pub(super) fn stations(&self) -> Vec<Station<'_>> {
        if !self.cores_meet() {
            return vec![Station { program: self, core: 0, subcore: 0, position: None }];
        }
        let mut stations = vec![];
        for program in self.functions() {
            let Signature { core: kind, core_dims, grid, .. } = &program.signature;
            let sizes: Vec<usize> = grid[..program.parallel_dims()].iter().map(|(size, _)| size.unwrap_or(1)).collect();
            let strides = tile::strides(&sizes);
            let along = |dim: Option<usize>, at: usize| dim.map_or(0, |dim| at / strides[dim] % sizes[dim].max(1));
            // An empty grid is run by a core that has nothing to do.
            stations.extend((0..sizes.iter().product::<usize>().max(1)).map(|at| match kind {
                CoreType::TensorCore => Station { program, core: at, subcore: 0, position: Some(at) },
                _ => {
                    let [core, subcore] = core_dims.map(|dim| along(dim, at));
                    Station { program, core, subcore, position: Some(at) }
                }
            }));
        }
        stations
    }

    /// The functions of its module that run at the same time, its own first.
    pub(super) fn functions(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.partners)
    }

    /// Whether cores of a device wait for each other.
    pub(super) fn cores_meet(&self) -> bool {
        self.functions().any(|program| program.communication.meets)
    }

    /// How many of the grid's first dimensions are parallel.
    pub(super) fn parallel_dims(&self) -> usize {
        self.signature.grid.iter().take_while(|(_, how)| *how == Semantics::Parallel).count()
    }

    /// Refuses grids that do not say which cores there are, and what cores that wait for each other do not have.
    pub(super) fn cores_fit(&self) -> crate::Result<()> {
        if !self.cores_meet() {
            return Ok(());
        }
        let mut cores = 0_usize;
        for program in self.functions() {
            let Signature { name, core, core_dims, grid, .. } = &program.signature;
            let refuse = |what: &str| Err(Error::mosaic(format!("@{name}: its cores wait for each other: {what}")));
            let (parallel, rest) = grid.split_at(program.parallel_dims());
            if parallel.iter().any(|(size, _)| size.is_none())
                || rest.iter().any(|(_, how)| *how == Semantics::Parallel)
            {
                return refuse("its parallel dimensions come first, with sizes that are known");
            }
            let are_named = (0..parallel.len()).all(|dim| core_dims.contains(&Some(dim)));
            if *core != CoreType::TensorCore && !are_named {
                return refuse("a parallel dimension is neither that of cores nor that of subcores");
            }
            let positions = parallel.iter().try_fold(1_usize, |all, (size, _)| all.checked_mul((*size)?));
            cores = cores.saturating_add(positions.unwrap_or(usize::MAX));
            if program.communication.allocates_common && cores > 1 {
                return refuse("what they share, or add to, is an argument, and not allocated while they run");
            }
            if cores > MOST_CORES {
                return refuse(&format!("there are {cores}, and may be {MOST_CORES}"));
            }
        }
        Ok(())
    }
}

/// Of a core without subcores it does not matter which of them is meant.
pub(super) fn kind_has_no_subcores(station: &Station) -> bool {
    station.kind() != CoreType::VectorSubcore
}

impl<'i, O: Observer> Executor<'_, 'i, O> {
    // ---- memory in common ----

    /// Lets others have the memory that cores have in common.
    pub(super) fn lend(&mut self) {
        let Some(link) = self.link.as_ref().filter(|link| !link.common.is_empty()) else { return };
        let mut state = link.fabric.lock();
        for &(buffer, home) in &link.common {
            let name = self.buffers[buffer].name.clone();
            let gone = Buffer::holding(&name, MemorySpace::Any, Cow::Owned(HostTensor::zeros(Element::U8, &[0])));
            state.common.insert((home, buffer), std::mem::replace(&mut self.buffers[buffer], gone));
        }
    }

    /// Takes the memory that cores have in common, as far as others have had it; of it only what is this core's, `at_end`.
    pub(super) fn take_back(&mut self, at_end: bool) {
        let Some(link) = self.link.as_ref().filter(|link| !link.common.is_empty()) else { return };
        let mut state = link.fabric.lock();
        for &(buffer, home) in link.common.iter().filter(|(_, home)| !at_end || *home == link.me) {
            if let Some(mut lent) = state.common.remove(&(home, buffer)) {
                // Functions may have names of their own for it.
                lent.name = std::mem::take(&mut self.buffers[buffer].name);
                self.buffers[buffer] = lent;
            }
        }
    }

    /// What of a call's memory other cores, or devices, access, too; that of the device's cores is one.
    pub(super) fn share(&mut self, call: &Allocation) {
        let Some(link) = &mut self.link else { return };
        let programs = link.fabric.stations.iter().map(|station| &station.program.communication);
        let anywhere = programs.clone().any(|said| said.anywhere);
        let reached: HashSet<usize> = programs.flat_map(|said| said.arguments.iter().copied()).collect();
        let mut shared = vec![];
        for (at, view) in call.views.iter().enumerate() {
            let Reg::View(view) = view else { continue };
            if anywhere || reached.contains(&at) {
                shared.push(view.buffer);
                let windows = call.windows.iter().filter(|window| window.argument == at);
                shared.extend(windows.flat_map(|window| &window.buffers));
            }
        }
        if link.cores() > 1 {
            let first_of_device = link.me - link.core();
            let same_core = |station: &Station| station.core == link.fabric.station(link.me).core;
            let first_of_core = link.fabric.stations.iter().position(same_core).expect("its own is one");
            for (number, buffer) in self.buffers.iter().enumerate() {
                let home = match buffer.space {
                    MemorySpace::Any | MemorySpace::Hbm | MemorySpace::Host => first_of_device,
                    MemorySpace::VmemShared => first_of_device + first_of_core,
                    MemorySpace::Smem if shared.contains(&number) => link.me,
                    _ => continue,
                };
                link.common.push((number, home));
                shared.push(number);
            }
        }
        for buffer in shared {
            self.buffers[buffer].shared = true;
        }
        self.take_back(false);
    }

    /// Faults when another core accesses memory that this one accesses, too, one of them writes, and nothing orders the two;
    /// notes that this one does.
    pub(super) fn access(&mut self, region: &Region, access: Access, origin: Option<u32>) -> Step<()> {
        if let Some(link) = self.link.as_ref().filter(|_| self.buffers[region.buffer].shared) {
            let home = link.home(region.buffer);
            self.check_others(home, region, access, origin)?;
            self.touch_at(home, region, access, origin);
        }
        Ok(())
    }

    /// Of memory that is `home`'s.
    pub(super) fn check_others(&self, home: usize, region: &Region, access: Access, origin: Option<u32>) -> Step<()> {
        let Some(link) = self.link.as_ref().filter(|link| link.has_common_memory()) else { return Ok(()) };
        if self.machine.overlaps() {
            return Ok(());
        }
        let state = link.fabric.lock();
        let touched = state.touched.get(&(home, region.buffer)).into_iter().flat_map(|(_, touched)| touched);
        let touched = touched.filter(|touch| touch.core != link.me && touch.epoch > link.clock[touch.core]);
        // Several may write what nobody reads.
        let both_write = |other: Access| access != Access::Reads && other != Access::Reads;
        let may_overlap = link.unused.contains(&region.buffer);
        let races = |other: Access| access.conflicts(other) && !(may_overlap && both_write(other));
        let mut touched = touched.filter(|touch| races(touch.access)).filter_map(|touch| {
            let (name, does, at) = (link.name(touch.core), touch.access.in_words(), self.location_of(touch));
            Some((touch.region.overlap(region)?, format!("{name} {does} there at {at}")))
        });
        let open = state.open.iter().filter(|open| open.core != link.me && open.home == home);
        let mut open = open.filter(|open| races(open.access)).filter_map(|open| {
            let (name, at) = (link.name(open.core), self.location(open.origin));
            Some((open.region.overlap(region)?, format!("{name} has a DMA in flight there, started at {at}")))
        });
        let Some((offset, what)) = touched.next().or_else(|| open.next()) else { return Ok(()) };
        let detail = format!("{what}, and nothing orders that before or after this");
        let origin = origin.map_or(&self.pipeline, |origin| &self.program.origins[origin as usize]);
        let fault = self.fault(FaultKind::ParallelOverlap, origin, detail);
        Err(self.in_buffer(fault, region.buffer, offset))
    }

    /// Notes what this core does to memory that others may access.
    pub(super) fn touch(&mut self, region: &Region, access: Access, origin: Option<u32>) {
        if let Some(link) = self.link.as_ref().filter(|_| self.buffers[region.buffer].shared) {
            self.touch_at(link.home(region.buffer), region, access, origin);
        }
    }

    pub(super) fn touch_at(&self, home: usize, region: &Region, access: Access, origin: Option<u32>) {
        let Some(link) = &self.link else { return };
        let touch = Touch { core: link.me, region: region.clone(), access, epoch: link.clock[link.me], origin };
        link.fabric.lock().note(home, touch);
    }

    /// Where memory was touched.
    pub(super) fn location_of(&self, touch: &Touch) -> &str {
        touch.origin.map_or("its grid", |origin| self.location(origin))
    }

    /// A DMA that accesses memory has started.
    pub(super) fn open(&mut self, flying: Flying, region: &Region, access: Access, origin: u32) {
        let Some(link) = self.link.as_ref().filter(|link| link.has_common_memory()) else { return };
        if self.buffers[region.buffer].shared {
            let (home, region) = (link.home(region.buffer), region.clone());
            link.fabric.lock().open.push(Open { core: link.me, flying, home, region, access, origin });
        }
    }

    /// A DMA is over, as far as this core knows.
    pub(super) fn close(&mut self, flying: Flying) {
        let Some(link) = self.link.as_ref().filter(|link| link.has_common_memory()) else { return };
        link.fabric.lock().open.retain(|open| (open.core, open.flying) != (link.me, flying));
    }

    /// Comes to a barrier, and waits for all subcores of this core.
    pub(super) fn meet(&mut self, barrier: i32, origin: u32) -> Step<()> {
        let Some(link) = self.link.as_mut().filter(|link| link.has_common_memory()) else { return Ok(()) };
        let (me, own) = (link.me, link.fabric.station(link.me));
        let first = link.me - link.core();
        let stations = link.fabric.stations.iter().enumerate();
        let subcores = stations.filter(|(_, other)| other.core == own.core && other.kind() == own.kind());
        let subcores: Vec<usize> = subcores.map(|(at, _)| first + at).collect();
        let clock = link.end_epoch();
        let fabric = link.fabric;
        {
            let mut state = fabric.lock();
            let meeting = state.meetings.entry((subcores[0], barrier)).or_default();
            meeting.arrived.push(me);
            meeting.clock.resize(clock.len(), 0);
            join(&mut meeting.clock, &clock);
            if meeting.arrived.len() == subcores.len() {
                let Meeting { arrived, clock } = std::mem::take(meeting);
                for core in arrived {
                    state.cores[core].met = Some(clock.clone());
                }
            }
        }
        loop {
            let met = fabric.lock().cores[me].met.take();
            if let Some(met) = met {
                join(&mut self.link.as_mut().expect("one of several cores").clock, &met);
                return self.perhaps_let_others_run();
            }
            let what = format!("barrier {barrier} at {}", self.location(origin));
            if let Turn::Deadlock(others) = self.pass(Status::Waiting(what))? {
                let detail = format!("all {} subcores of this core are waited for{others}", subcores.len());
                return Err(self.fault_at(FaultKind::Deadlock, origin, detail));
            }
        }
    }

    /// Adds to a number in the memory of another subcore of this core; what was there.
    pub(super) fn fetch_and_add(&mut self, region: &Region, amount: i32, subcore: i32, origin: u32) -> Step<i32> {
        let to = self.addressee(&Addressee { subcore: Some(subcore), ..Addressee::default() }, origin)?;
        let add = |buffer: &mut Buffer| {
            let written = buffer.unwritten_in(region).is_none();
            let Tile::Int(before) = buffer.read(region) else { unreachable!("decoding gives memory of integers") };
            buffer.write(region, &tile::splat(Scalar::Int(before[0].wrapping_add(amount)), 1), None);
            (before[0], written)
        };
        self.poll()?;
        if self.link.as_ref().is_none_or(|link| link.me == to) {
            self.check_in_flight_by(region, Access::Adds, Some(origin))?;
        } else {
            self.check_others(to, region, Access::Adds, Some(origin))?;
            self.touch_at(to, region, Access::Adds, Some(origin));
        }
        let (before, written) = match self.link.as_ref().map(|link| (link.me, link.fabric)) {
            Some((me, fabric)) if me != to => loop {
                let before = fabric.lock().common.get_mut(&(to, region.buffer)).map(add);
                match before {
                    Some(before) => break before,
                    // It has not entered the kernel yet.
                    None if self.link.as_ref().is_some_and(|link| link.common.contains(&(region.buffer, me))) => {}
                    None => {
                        let detail = "only an argument of the kernel can be another subcore's".to_owned();
                        return Err(self.fault_at(FaultKind::OutOfBounds, origin, detail));
                    }
                }
                self.let_others_run()?;
            },
            _ => add(&mut self.buffers[region.buffer]),
        };
        if written || self.machine.reads_unwritten() {
            return Ok(before);
        }
        let fault = self.fault_at(FaultKind::UnwrittenRead, origin, String::new());
        Err(self.in_buffer(fault, region.buffer, region.start()))
    }
}
