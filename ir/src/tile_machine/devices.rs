//! Several devices, and several cores of each, in one run: who runs when, what they send each other, and what orders their
//! accesses.
//!
//! Each core is an executor on a thread of its own, with memories of its own. One of them runs at a time, until it waits for
//! something that is not there; then the [`Fabric`] says who is next. So a run does the same again, whatever the host's threads
//! do. What a core sends (signals, DMAs that start, their bytes) lies in the receiver's mail until that runs: nothing of a
//! core's own is touched by another's thread. Memory that cores of a device have in common goes from hand to hand with the turn.
//!
//! A device has one core here, which runs the whole grid, unless its cores meet: they signal each other or have a barrier, or run
//! different functions (`Station` of `fabric`).
//!
//! # What is ordered
//! Whether two accesses race does not depend on who happened to run first. Every core counts its *epochs*, which end when it
//! sends something or comes to a barrier, and has a *clock*: the last epoch of every core that it knows to be over. A signal or a
//! DMA carries its sender's clock; a wait takes over the clocks of those sendings *that it cannot have been satisfied without*
//! (`ledger` counts): of two signals to a semaphore of which a wait takes one, it may have seen either. After a barrier all
//! who met there have the clocks of all. An access of epoch e is ordered before a sending whose clock has e for that core. A
//! DMA from elsewhere writes from when it starts until a wait of the receiver is sure of it; it must be ordered after every
//! earlier access to that memory, and no access may come before that wait. Of two accesses of different cores to memory that
//! they have in common, one of them a write, one must be ordered before the other; a DMA accesses its two sides until it is
//! waited for.
//!
//! A sending that comes later in the run, but that nothing orders after a wait, may have satisfied that wait in its stead. If
//! the wait was sure of something for want of it, the run starts again with that certainty taken away ([`Uncertain`]).
//!
//! A kernel that names the barrier semaphore must see to it itself that whom it sends to has entered the kernel; others enter
//! together, as JAX has it.

use std::{collections::HashSet, fmt, sync::Mutex};

use super::{
    DmaOrder, Machine, Program, Run,
    cores::kind_has_no_subcores,
    dma::{Checked, Dma, Remote, Semaphore},
    exec::{Executor, Step, side},
    fabric::{Access, ENTERED, Fabric, Flight, Flying, Guard, Incoming, Link, Message, Place, Status, Turn},
    fault::{Fault, FaultKind},
    ledger::{Increment, Sending, Uncertain, join},
    memory::{Region, View},
    observer::{DmaEvent, Observer, Shared},
};
use crate::{mosaic::CoreType, shape::TensorType, tensor::HostTensor};

impl Program {
    /// Whether it sends anything to other devices.
    pub fn communicates(&self) -> bool {
        self.functions().any(|program| program.communication.any)
    }

    /// How many cores of a device run it, each at a position of its own of the parallel dimensions, and all at the same time: 1
    /// where they do not wait for each other, so that one may run after another.
    pub fn cores(&self) -> usize {
        self.stations().len()
    }

    /// Runs the kernel on several devices, with `inputs` of each of them. Every device has memories of its own; what it sends to
    /// others, and what orders their accesses, is in the [module docs](super).
    ///
    /// # Errors
    /// The first fault of any device.
    ///
    /// # Panics
    /// Without devices.
    pub fn run_devices(
        &self,
        machine: &Machine,
        inputs: &[Vec<HostTensor>],
        outputs: &[TensorType],
    ) -> Result<Vec<Run>, Box<Fault>> {
        self.run_until_certain(machine, &slices(inputs), outputs).0
    }

    /// [`run_devices`](Self::run_devices), each [core](Self::cores) of each device watched by one of `observers`: those of a
    /// device one after another.
    ///
    /// # Errors
    /// The first fault of any device.
    ///
    /// # Panics
    /// With another number of observers.
    pub fn run_devices_observed<O: Observer + Send>(
        &self,
        machine: &Machine,
        inputs: &[Vec<HostTensor>],
        outputs: &[TensorType],
        observers: &mut [O],
    ) -> Result<Vec<Run>, Box<Fault>> {
        assert_eq!(self.cores() * inputs.len(), observers.len(), "an observer per core");
        let inputs = slices(inputs);
        let (_, uncertain) = self.run_until_certain(machine, &inputs, outputs);
        self.run_once(machine, &inputs, outputs, observers, uncertain).0
    }

    /// A run of one device, all of whose cores are watched by one observer.
    pub(super) fn run_cores<O: Observer + Send>(
        &self,
        machine: &Machine,
        inputs: &[HostTensor],
        outputs: &[TensorType],
        observer: &mut O,
    ) -> Result<Run, Box<Fault>> {
        let inputs = [inputs];
        let (runs, uncertain) = self.run_until_certain(machine, &inputs, outputs);
        let mut runs = match O::WATCHES || O::LISTENS {
            false => runs?,
            true => {
                let all = Mutex::new(observer);
                let mut observers: Vec<Shared<O>> = (0..self.cores()).map(|_| Shared::new(&all)).collect();
                self.run_once(machine, &inputs, outputs, &mut observers, uncertain).0?
            }
        };
        Ok(runs.remove(0))
    }

    /// Runs again and again until no wait is sure of what it may have come before; what they are not sure of.
    fn run_until_certain(
        &self,
        machine: &Machine,
        inputs: &[&[HostTensor]],
        outputs: &[TensorType],
    ) -> (Result<Vec<Run>, Box<Fault>>, HashSet<Uncertain>) {
        assert!(!inputs.is_empty(), "a device or more");
        let mut nobody = vec![(); inputs.len() * self.cores()];
        let mut uncertain = HashSet::new();
        // Certainty is only ever taken away, so this ends.
        loop {
            let (runs, found) = self.run_once(machine, inputs, outputs, &mut nobody, uncertain.clone());
            let known = uncertain.len();
            if runs.is_ok() {
                uncertain.extend(found);
            }
            if uncertain.len() == known {
                return (runs, uncertain);
            }
        }
    }

    /// A run of one device alone, with one core.
    pub(super) fn run_alone<O: Observer>(
        &self,
        machine: &Machine,
        inputs: &[HostTensor],
        outputs: &[TensorType],
        observer: &mut O,
    ) -> Result<Run, Box<Fault>> {
        let fabric = Fabric::new(self.stations(), 1, machine.dma, HashSet::new());
        self.run_linked(machine, inputs, outputs, observer, Some(Box::new(Link::new(&fabric, 0))))
    }

    fn run_once<O: Observer + Send>(
        &self,
        machine: &Machine,
        inputs: &[&[HostTensor]],
        outputs: &[TensorType],
        observers: &mut [O],
        uncertain: HashSet<Uncertain>,
    ) -> (Result<Vec<Run>, Box<Fault>>, HashSet<Uncertain>) {
        let fabric = Fabric::new(self.stations(), inputs.len(), machine.dma, uncertain);
        let cores = fabric.stations.len();
        let one = |me: usize, observer: &mut O| {
            let _guard = Guard(&fabric);
            match fabric.turn(me, fabric.lock()) {
                Turn::Over => None,
                _ => {
                    let (program, link) = (fabric.station(me).program, Box::new(Link::new(&fabric, me)));
                    let run = program.run_linked(machine, inputs[me / cores], outputs, observer, Some(link));
                    run.map_err(|fault| fabric.fail(me, fault)).ok()
                }
            }
        };
        let runs: Vec<Option<Run>> = match observers {
            [observer] => vec![one(0, observer)],
            observers => std::thread::scope(|scope| {
                let one = &one;
                let core = |(me, observer)| {
                    let thread = std::thread::Builder::new().name(format!("core {me}")).stack_size(STACK);
                    thread.spawn_scoped(scope, move || one(me, observer)).unwrap_or_else(|error| {
                        // The others wait for it.
                        fabric.lock().broken = true;
                        fabric.changed.notify_all();
                        panic!("a core's thread: {error}")
                    })
                };
                let threads: Vec<_> = observers.iter_mut().enumerate().map(core).collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                    .collect()
            }),
        };
        let mut state = fabric.lock();
        let uncertain = std::mem::take(&mut state.uncertain);
        if let Some((_, fault)) = state.fault.take() {
            return (Err(fault), uncertain);
        }
        // The results of a device are its first core's.
        let mut runs = runs.into_iter().flatten();
        let of_device = |_| {
            let first = runs.next().expect("a run of each core");
            runs.by_ref()
                .take(cores - 1)
                .fold(first, |device, core| Run { counters: device.counters + core.counters, ..device })
        };
        (Ok((0..inputs.len()).map(of_device).collect()), uncertain)
    }
}

fn slices(inputs: &[Vec<HostTensor>]) -> Vec<&[HostTensor]> {
    inputs.iter().map(Vec::as_slice).collect()
}

/// Whose an op's memory is, as far as it says so.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Addressee {
    pub(super) device: Option<i32>,
    pub(super) core: Option<i32>,
    pub(super) subcore: Option<i32>,
    pub(super) of: Option<CoreType>,
}

impl fmt::Display for Addressee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [("subcore", self.subcore), ("core", self.core), ("device", self.device)];
        let parts = parts.iter().filter_map(|(name, number)| Some(format!("{name} {}", (*number)?)));
        f.write_str(&parts.collect::<Vec<_>>().join(" of "))
    }
}

/// Of a core's thread: the interpreter goes as deep as a kernel's regions.
const STACK: usize = 64 << 20;

impl<'i, O: Observer> Executor<'_, 'i, O> {
    // ---- whose turn it is ----

    /// Waits until something may have changed for this core.
    pub(super) fn pass(&mut self, status: Status) -> Step<Turn> {
        self.lend();
        let link = self.link.as_ref().expect("one of several cores");
        if link.has_common_memory() {
            self.observer.pause();
        }
        let turn = link.fabric.pass(link.me, status, &link.clock);
        if !matches!(turn, Turn::Finished | Turn::Over) {
            self.take_back(false);
        }
        if let Turn::Depart(id) = turn {
            let index = self.dmas.iter().position(|dma| dma.id == id).expect("a DMA that has not left");
            self.land(index)?;
        }
        if let Turn::Over = turn {
            return Err(self.fault(FaultKind::Deadlock, &self.pipeline, "another core has faulted".into()));
        }
        self.read_mail()?;
        if self.link.as_ref().is_some_and(|link| link.has_common_memory()) {
            self.observer.resume(&self.step);
        }
        Ok(turn)
    }

    /// Waits for a change, in a wait by the op `origin` on a semaphore; `false` where this is the only core of the only device.
    pub(super) fn wait_for_others(&mut self, key: (usize, usize), what: &str, origin: u32) -> Step<bool> {
        if self.link.is_none() {
            return Ok(false);
        }
        if self.read_mail()? {
            return Ok(true);
        }
        let name = &self.buffers[key.0].name;
        let status = Status::Waiting(format!("{what} on `{name}` at {}", self.location(origin)));
        match self.pass(status)? {
            Turn::Deadlock(others) => {
                let fault = self.fault_at(FaultKind::Deadlock, origin, format!("{what}{others}"));
                Err(self.in_buffer(fault, key.0, key.1))
            }
            _ => Ok(true),
        }
    }

    /// Lets others run: this core looks at what they send, or sends something.
    pub(super) fn let_others_run(&mut self) -> Step<()> {
        match &self.link {
            Some(link) if !link.is_alone() => self.pass(Status::Ready).map(drop),
            _ => Ok(()),
        }
    }

    /// Before this core looks at a number that others change: it may wait for that, in a loop.
    pub(super) fn poll(&mut self) -> Step<()> {
        match &self.link {
            Some(link) if !link.is_alone() => self.pass(Status::Polling).map(drop),
            _ => Ok(()),
        }
    }

    /// Before `region` is found to be unwritten: a DMA to it that another core is yet to start says more of why.
    pub(super) fn check_on_its_way(&mut self, region: &Region, origin: u32) -> Step<()> {
        for _ in 1..self.link.as_ref().map_or(1, |link| link.clock.len()) {
            match self.let_others_run() {
                // It is this read that comes too early.
                Err(race)
                    if race.kind == FaultKind::DeviceRace
                        && race.cell.is_some_and(|(buffer, _)| buffer == region.buffer) =>
                {
                    let fault = self.fault_at(FaultKind::ReadInFlight, origin, String::new());
                    let (buffer, offset) = race.cell.expect("it has one");
                    return Err(Box::new(Fault { dma: race.dma, ..*self.in_buffer(fault, buffer, offset) }));
                }
                other => other?,
            }
        }
        self.check_in_flight(region, false, Some(origin))
    }

    /// Cores of a device run side by side: while one waits for a DMA, the others go on.
    pub(super) fn keep_step(&mut self) -> Step<()> {
        match self.machine.dma {
            _ if self.link.as_ref().is_none_or(|link| !link.has_common_memory()) => Ok(()),
            DmaOrder::Early | DmaOrder::Late => self.let_others_run(),
            DmaOrder::Random(_) => self.perhaps_let_others_run(),
        }
    }

    /// In a random order of DMAs, others may run first.
    pub(super) fn perhaps_let_others_run(&mut self) -> Step<()> {
        match self.machine.dma {
            DmaOrder::Random(_) if self.random.below(2) == 0 => self.let_others_run(),
            _ => Ok(()),
        }
    }

    /// At the end of the kernel: takes what others still send, until all are there.
    pub(super) fn meet_others(&mut self) -> Step<()> {
        if self.link.is_none() {
            return Ok(());
        }
        while !matches!(self.pass(Status::Done)?, Turn::Finished) {}
        self.take_back(true);
        if self.machine.ignored.contains(FaultKind::SemaphoreUnbalanced) {
            return Ok(());
        }
        let link = self.link.as_ref().expect("one of several cores");
        if let Some(incoming) = link.incoming.first() {
            let me = if link.has_common_memory() { "this core" } else { "this device" };
            let detail = format!("{me} has not waited for all of a DMA from another at the end of the kernel");
            let mut fault = self.fault_at(FaultKind::SemaphoreUnbalanced, incoming.origin, detail);
            fault = self.in_buffer(fault, incoming.semaphore.0, incoming.semaphore.1);
            fault.dma = Some(self.describe_incoming(incoming));
            return Err(fault);
        }
        if let Some(Message::Flight(flight)) = link.early.front() {
            let (from, me) = (link.name(flight.sending.id.0), link.name(link.me));
            let detail = format!("{from} copies to {me} on a semaphore that this one does not allocate any more");
            return Err(self.fault_at(FaultKind::SemaphoreUnbalanced, flight.origin, detail));
        }
        if let Some((&(by, _), (semaphore, _))) = link.parked.iter().find(|(_, (semaphore, _))| semaphore.value != 0) {
            let at = self.location(by);
            let detail = format!("the one allocated at {at} is sent {} that nobody waits for", semaphore.value);
            return Err(self.fault_at(FaultKind::SemaphoreUnbalanced, semaphore.origin, detail));
        }
        Ok(())
    }

    // ---- what is sent ----

    /// The core that an op names, which is one of them.
    pub(super) fn addressee(&self, target: &Addressee, origin: u32) -> Step<usize> {
        let nowhere = |detail: String| Err(self.fault_at(FaultKind::OutOfBounds, origin, detail));
        let Some(link) = &self.link else {
            return match [target.device, target.core, target.subcore].into_iter().flatten().find(|&at| at != 0) {
                Some(_) => nowhere(format!("{target} of a device with one")),
                None => Ok(0),
            };
        };
        let (devices, station) = (link.fabric.devices, link.fabric.station(link.me));
        let device = match target.device.map_or(Ok(link.device()), usize::try_from) {
            Ok(device) if device < devices => device,
            _ => {
                let device = target.device.unwrap_or_default();
                return nowhere(format!("device {device}; there are {devices}, counted from 0"));
            }
        };
        let kind = target.of.unwrap_or(station.kind());
        let [core, subcore] = [(target.core, station.core), (target.subcore, station.subcore)]
            .map(|(named, own)| named.unwrap_or(own as i32));
        let stations = &link.fabric.stations;
        let found = stations.iter().position(|other| {
            // A device with one core has all that is named of it by 0.
            let kind = stations.len() == 1 || other.kind() == kind;
            kind && other.core as i32 == core && (other.subcore as i32 == subcore || kind_has_no_subcores(other))
        });
        match found {
            Some(found) => Ok(device * stations.len() + found),
            None if stations.len() == 1 => {
                nowhere(format!("{} of a device with one", Addressee { device: None, ..*target }))
            }
            None => nowhere(format!("{target}, of {} that run this kernel", stations.len())),
        }
    }

    /// Faults unless a core is known to have entered the kernel.
    fn check_entered(&self, core: usize, origin: u32) -> Step<()> {
        let link = self.link.as_ref().expect("one of several cores");
        if link.clock[core] >= ENTERED || core == link.me || self.machine.ignored.contains(FaultKind::DeviceRace) {
            return Ok(());
        }
        let name = link.name(core);
        let detail = format!("{name} may not have entered the kernel: no wait on the barrier semaphore says so");
        Err(self.fault_at(FaultKind::DeviceRace, origin, detail))
    }

    /// Adds to a semaphore of a core, this one or another.
    pub(super) fn signal_core(&mut self, semaphore: &View, amount: i32, to: &Addressee, origin: u32) -> Step<()> {
        let to = self.addressee(to, origin)?;
        if self.link.as_ref().is_none_or(|link| link.me == to) {
            self.signal(semaphore, amount, origin);
            return Ok(());
        }
        if semaphore.buffer != self.barrier {
            self.check_entered(to, origin)?;
        }
        let link = self.link.as_mut().expect("one of several cores");
        let semaphore = (link.place(semaphore.buffer), semaphore.offset);
        let sending = link.send(i64::from(amount), false);
        link.fabric.post(to, Message::Signal { semaphore, sending, origin });
        self.perhaps_let_others_run()
    }

    /// Starts a DMA to a core's memory: operands of the op are views, the semaphore of each, and whose the destination is.
    pub(super) fn start_remote_dma(
        &mut self,
        [source, own]: [&View; 2],
        [destination, semaphore]: [&View; 2],
        to: &Addressee,
        origin: u32,
    ) -> Step<()> {
        let to = self.addressee(to, origin)?;
        let Checked { from, to: target, bytes, .. } = self.checked_dma([source, destination], false, origin)?;
        if from.is_empty() {
            return Ok(());
        }
        self.check_entered(to, origin)?;
        let id = self.next_dma;
        let step = self.step.clone();
        let link = self.link.as_mut().expect("a kernel that communicates");
        let sending = link.send(bytes as i64, true);
        let remote = Remote { core: to, sending: sending.id };
        let place = link.place(target.buffer);
        let semaphore = (link.place(semaphore.buffer), semaphore.offset);
        let flight = Flight { place, destination: target.clone(), semaphore, sending, origin, step };
        {
            let mut state = link.fabric.lock();
            state.started += 1;
            let number = state.started;
            state.cores[link.me].departures.push((number, id));
            state.posted.push((flight.sending.id, flight.sending.clock.clone()));
            state.cores[to].mail.push_back(Message::Flight(flight));
        }
        let dma = Dma {
            id,
            source: from,
            destination: target,
            unpadded: None,
            to: Some(remote),
            lanes: destination.dims.last().copied().unwrap_or(1),
            semaphore: (own.buffer, own.offset),
            bytes,
            origin,
            started: self.step.clone(),
            owner: self.owner,
            landed: false,
            adds: false,
        };
        self.buffers[dma.source.buffer].in_flight += 1;
        self.open(Flying::Own(id), &dma.source, Access::Reads, origin);
        self.count_sent(dma.semaphore, bytes as i64);
        self.semaphores.entry(dma.semaphore).or_default().origin = origin;
        let device = self.link.as_ref().map(|link| to / link.cores());
        self.observer.dma_start(&DmaEvent {
            id,
            from: side(&self.buffers, &dma.source),
            to: side(&self.buffers, &dma.destination),
            device,
            bytes,
            semaphore: (&self.buffers[dma.semaphore.0].name, dma.semaphore.1),
            location: &self.program.origins[origin as usize].location,
        });
        self.dmas.push(dma);
        self.next_dma += 1;
        self.counters.copies += 1;
        let leaves = match self.machine.dma {
            DmaOrder::Early => true,
            DmaOrder::Late => false,
            DmaOrder::Random(_) => self.random.below(2) == 0,
        };
        if leaves {
            self.land(self.dmas.len() - 1)?;
        }
        if to == self.link.as_ref().expect("a kernel that communicates").me {
            self.read_mail()?;
        }
        self.perhaps_let_others_run()
    }

    /// The bytes of a DMA have left for another core.
    pub(super) fn depart(&mut self, id: usize, remote: Remote, data: Vec<u8>) {
        let link = self.link.as_ref().expect("a kernel that communicates");
        let mut state = link.fabric.lock();
        state.cores[link.me].departures.retain(|&(_, departure)| departure != id);
        state.cores[remote.core].mail.push_back(Message::Arrival(remote.sending, data));
    }

    /// Something of this core's own is sent to a semaphore of its own.
    pub(super) fn count_sent(&mut self, key: (usize, usize), amount: i64) {
        if let Some(link) = &mut self.link {
            link.ledgers.entry(key).or_default().sent += amount;
        }
    }

    // ---- what arrives ----

    /// Whether there was any.
    fn read_mail(&mut self) -> Step<bool> {
        let mut any = false;
        loop {
            let Some(link) = &self.link else { return Ok(any) };
            let message = link.fabric.lock().cores[link.me].mail.pop_front();
            let Some(message) = message else { return Ok(any) };
            any = true;
            if let Some(message) = self.put_off(message) {
                self.receive_message(message)?;
            }
        }
    }

    fn receive_message(&mut self, message: Message) -> Step<()> {
        match message {
            Message::Signal { semaphore, sending, origin } => {
                let amount = sending.amount;
                self.receive(semaphore, sending, |semaphore| {
                    (semaphore.value, semaphore.origin) = (semaphore.value + amount, origin);
                });
            }
            Message::Flight(flight) => self.expect(flight)?,
            Message::Arrival(id, data) => self.arrive(id, &data),
        }
        Ok(())
    }

    /// Puts off what is said of a DMA whose semaphore is not allocated yet, by an op that allocates it; what is not put off.
    fn put_off(&mut self, message: Message) -> Option<Message> {
        let link = self.link.as_mut()?;
        let early = match &message {
            Message::Flight(flight) => link.buffer(flight.place).is_some() && link.buffer(flight.semaphore.0).is_none(),
            Message::Arrival(id, _) => {
                let of_same = |other: &Message| matches!(other, Message::Flight(flight) if flight.sending.id == *id);
                link.early.iter().any(of_same)
            }
            Message::Signal { .. } => false,
        };
        if early {
            link.early.push_back(message);
            return None;
        }
        Some(message)
    }

    /// Notes a sending to a semaphore, which may not be allocated yet.
    fn receive(&mut self, (place, cell): (Place, usize), sending: Increment, change: impl FnOnce(&mut Semaphore)) {
        let link = self.link.as_mut().expect("one of several cores");
        let uncertain = match (link.buffer(place), place) {
            (Some(buffer), _) => {
                change(self.semaphores.entry((buffer, cell)).or_default());
                link.ledgers.entry((buffer, cell)).or_default().add(sending, link.me)
            }
            (None, Place::Scoped(origin)) => {
                let (semaphore, ledger) = link.parked.entry((origin, cell)).or_default();
                change(semaphore);
                ledger.add(sending, link.me)
            }
            (None, Place::Fixed(_)) => unreachable!("arguments are always there"),
        };
        if !uncertain.is_empty() {
            link.fabric.lock().uncertain.extend(uncertain);
        }
    }

    /// A DMA to this core's memory starts: whatever was done to its destination must be known to its sender to be over.
    fn expect(&mut self, flight: Flight) -> Step<()> {
        let Flight { place, mut destination, semaphore, sending, origin, step } = flight;
        let checked = !self.machine.ignored.contains(FaultKind::DeviceRace);
        let link = self.link.as_ref().expect("one of several cores");
        link.fabric.lock().posted.retain(|(posted, _)| *posted != sending.id);
        let (from, me) = (link.name(sending.id.0), link.name(link.me));
        let (Some(buffer), Some(of_semaphore)) = (link.buffer(place), link.buffer(semaphore.0)) else {
            let detail = format!("{from} copies to {me} what that has not allocated, or not any more");
            return Err(self.fault_at(FaultKind::DeviceRace, origin, detail));
        };
        destination.buffer = buffer;
        let key = (of_semaphore, semaphore.1);
        let incoming = Incoming {
            id: sending.id,
            region: destination,
            semaphore: key,
            bytes: sending.amount as usize,
            origin,
            step,
        };
        let region = &incoming.region;
        // Of what this core, or another, does to the memory: the element, and what that is.
        let found = || {
            let state = link.fabric.lock();
            let touched = state.touched.get(&(link.home(buffer), buffer)).into_iter().flat_map(|(_, touched)| touched);
            let unordered = touched.filter(|touch| touch.epoch > sending.clock[touch.core]);
            let mut touch = unordered.filter_map(|touch| {
                let (name, does, at) = (link.name(touch.core), touch.access.in_words(), self.location_of(touch));
                Some((touch.region.overlap(region)?, format!("{name} {does} there at {at}")))
            });
            let in_flight = state.open.iter().filter(|open| open.core != link.me && open.home == link.home(buffer));
            let mut of_others = in_flight.filter_map(|open| {
                let (name, at) = (link.name(open.core), self.location(open.origin));
                Some((open.region.overlap(region)?, format!("{name} has a DMA in flight there, started at {at}")))
            });
            let mut own = self.dmas.iter().filter_map(|dma| {
                let destination = if dma.to.is_none() { dma.destination.overlap(region) } else { None };
                let at = destination.or_else(|| dma.source.overlap(region))?;
                Some((at, format!("{me} has a DMA in flight there, {}", self.describe_dma(dma))))
            });
            let mut others = link.incoming.iter().filter_map(|other| {
                let at = other.region.overlap(region)?;
                Some((at, format!("another DMA is in flight there, {}", self.describe_incoming(other))))
            });
            touch.next().or_else(|| own.next()).or_else(|| others.next()).or_else(|| of_others.next())
        };
        if let Some((offset, what)) = found().filter(|_| checked) {
            let detail = format!("{what}, and nothing orders that before this DMA from {from}");
            let mut fault = self.fault_at(FaultKind::DeviceRace, origin, detail);
            fault = self.in_buffer(fault, buffer, offset);
            fault.dma = Some(self.describe_incoming(&incoming));
            fault.grid_step.clone_from(&incoming.step);
            return Err(fault);
        }
        self.buffers[buffer].in_flight += 1;
        self.open(Flying::Incoming(incoming.id), &incoming.region, Access::Writes, origin);
        self.receive(semaphore, sending, |semaphore| semaphore.origin = origin);
        self.link.as_mut().expect("one of several cores").incoming.push(incoming);
        Ok(())
    }

    fn arrive(&mut self, id: Sending, data: &[u8]) {
        let link = self.link.as_ref().expect("one of several cores");
        // Its destination may be gone, where that fault is ignored.
        let Some(incoming) = link.incoming.iter().find(|incoming| incoming.id == id) else { return };
        let (region, key, bytes) = (incoming.region.clone(), incoming.semaphore, incoming.bytes);
        self.buffers[region.buffer].copy_in(&region, data);
        if self.buffers[region.buffer].space == crate::mosaic::MemorySpace::Hbm {
            self.counters.hbm_bytes_written += bytes as u64;
        }
        let semaphore = self.semaphores.entry(key).or_default();
        semaphore.value += bytes as i64;
        semaphore.landed.push_back((None, bytes));
        let device = id.0 / self.link.as_ref().map_or(1, |link| link.cores());
        self.observer.dma_arrive(device, side(&self.buffers, &region), bytes);
    }

    pub(super) fn describe_incoming(&self, incoming: &Incoming) -> String {
        let Incoming { id: (from, _), region, origin, step, .. } = incoming;
        let to = &self.buffers[region.buffer].name;
        let link = self.link.as_ref().expect("one of several cores");
        let (from, at) = (link.name(*from), self.location(*origin));
        format!("from {from} to `{to}` started at {at} in grid step {step:?}")
    }

    /// A wait by this core has taken `amount` from a semaphore.
    pub(super) fn acquire(&mut self, key: (usize, usize), amount: i64, origin: u32) {
        let Some(link) = &mut self.link else { return };
        link.waited += 1;
        let (me, epoch) = (link.me, link.clock[link.me]);
        let ledger = link.ledgers.entry(key).or_default();
        let sure_of = ledger.take(amount, (me, link.waited), epoch, &link.fabric.uncertain);
        let mut over = vec![];
        for sending in sure_of {
            join(&mut link.clock, &sending.clock);
            let at = link.incoming.iter().position(|incoming| incoming.id == sending.id);
            over.extend(at.map(|at| (sending.id, link.incoming.remove(at).region)));
        }
        // From here on, and not before, this core knows of the DMA.
        for (id, region) in over {
            self.buffers[region.buffer].in_flight -= 1;
            self.close(Flying::Incoming(id));
            self.touch(&region, Access::Writes, Some(origin));
        }
    }

    /// The DMAs of others that are in flight to this core's memory.
    pub(super) fn incoming(&self) -> &[Incoming] {
        self.link.as_ref().map_or(&[], |link| &link.incoming)
    }

    // ---- scoped memory ----

    /// A buffer that the op `origin` has allocated.
    pub(super) fn enter_scope(&mut self, origin: u32, buffer: usize) -> Step<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        link.scoped.push((origin, buffer));
        let cells: Vec<(u32, usize)> =
            link.parked.range((origin, 0)..=(origin, usize::MAX)).map(|(key, _)| *key).collect();
        for cell in cells {
            let (semaphore, ledger) = link.parked.remove(&cell).expect("it is there");
            self.semaphores.insert((buffer, cell.1), semaphore);
            link.ledgers.insert((buffer, cell.1), ledger);
        }
        for message in std::mem::take(&mut link.early) {
            if let Some(message) = self.put_off(message) {
                self.receive_message(message)?;
            }
        }
        Ok(())
    }

    /// The scope of the buffers from `first` on has ended. What others have sent to semaphores is there when it begins again.
    pub(super) fn leave_scope(&mut self, first: usize) {
        let Some(link) = &mut self.link else { return };
        for &(origin, buffer) in link.scoped.iter().filter(|&&(_, buffer)| buffer >= first) {
            let cells: Vec<usize> =
                self.semaphores.range((buffer, 0)..=(buffer, usize::MAX)).map(|(&(_, cell), _)| cell).collect();
            for cell in cells {
                let ledger = link.ledgers.remove(&(buffer, cell)).unwrap_or_default();
                if let Some(semaphore) = self.semaphores.remove(&(buffer, cell)).filter(|left| left.value != 0) {
                    link.parked.insert((origin, cell), (semaphore, ledger));
                }
            }
        }
        link.scoped.retain(|&(_, buffer)| buffer < first);
        let me = link.me;
        link.fabric.lock().touched.retain(|&(home, buffer), _| home != me || buffer < first);
        link.ledgers.retain(|&(buffer, _), _| buffer < first);
    }

    /// Whether others send to a semaphore: what it holds then depends on how far they are.
    pub(super) fn is_sent_to(&self, key: (usize, usize)) -> bool {
        let ledger = self.link.as_ref().and_then(|link| link.ledgers.get(&key));
        ledger.is_some_and(|ledger| !ledger.pending.is_empty())
    }
}
