//! Several devices in one run: who runs when, what they send each other, and what orders their accesses.
//!
//! Each device is an executor on a thread of its own, with memories of its own. One of them runs at a time, until it waits for
//! something that is not there; then the [`Fabric`] says who is next. So a run does the same again, whatever the host's threads
//! do. What a device sends (signals, DMAs that start, their bytes) lies in the receiver's mail until that runs: nothing of a
//! device is touched by another's thread.
//!
//! # What is ordered
//! Whether two accesses race does not depend on who happened to run first. Every device counts its *epochs*, which end when it
//! sends something, and has a *clock*: the last epoch of every device that it knows to be over. A signal or a DMA carries its
//! sender's clock; a wait takes over the clocks of those sendings *that it cannot have been satisfied without* ([`Ledger`]): of
//! two signals to a semaphore of which a wait takes one, it may have seen either. An access of epoch e is ordered before a
//! sending whose clock has e for that device. A DMA writes from when it starts until a wait of the receiver is sure of it; it
//! must be ordered after every earlier access to that memory, and no access may come before that wait.
//!
//! A sending that comes later in the run, but that nothing orders after a wait, may have satisfied that wait in its stead. If
//! the wait was sure of something for want of it, the run starts again with that certainty taken away ([`Uncertain`]).
//!
//! A kernel that names the barrier semaphore must see to it itself that whom it sends to has entered the kernel; others enter
//! together, as JAX has it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard};

use super::{
    DmaOrder, Machine, Program, Run,
    dma::{Checked, Dma, Remote, Semaphore},
    exec::{Executor, Step, side},
    fault::{Fault, FaultKind},
    memory::{Region, View},
    observer::{DmaEvent, Observer},
};
use crate::{random::SplitMix64, shape::TensorType, tensor::HostTensor};

/// The last epoch of every device that is known to be over.
type Clock = Vec<u32>;

/// The first epoch: that a device knows it of another says that this one has entered the kernel.
const ENTERED: u32 = 1;

/// A sending: its device, and which of its sendings.
pub(super) type Sending = (usize, u32);

/// A buffer as every device knows it: an argument's, by its number, or one that an op allocates while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Place {
    Fixed(usize),
    Scoped(u32),
}

/// What adds to a semaphore.
#[derive(Clone, Debug)]
struct Increment {
    id: Sending,
    amount: i64,
    /// Its sender's clock; the sender's own component is the epoch that ended with it.
    clock: Clock,
    /// Whether it is a DMA: its bytes come one by one, and in no order with anything else of its sender.
    is_dma: bool,
}

impl Increment {
    /// Whether this was sent by one who knew of `earlier`.
    fn follows(&self, earlier: &Self) -> bool {
        self.id != earlier.id && self.clock[earlier.id.0] >= earlier.clock[earlier.id.0]
    }

    /// Whether a wait that `slack` less would have satisfied needed this; `weight` is what would have been missing without it.
    fn is_certain(&self, weight: i64, slack: i64) -> bool {
        if self.is_dma { slack == 0 } else { weight > slack }
    }
}

/// What was sent to a semaphore and taken from it.
#[derive(Debug, Default)]
struct Ledger {
    /// All that was sent so far; a DMA counts from its start.
    sent: i64,
    taken: i64,
    /// Sendings of other devices that no wait is sure of.
    pending: Vec<Increment>,
    /// Waits that were sure of something, in their order.
    waits: Vec<Waited>,
}

#[derive(Debug)]
struct Waited {
    /// Which of the device's waits.
    number: u32,
    epoch: u32,
    /// What may be missing of all that was sent, and may have come before it, without holding it up.
    slack: i64,
    /// What it was sure of, and what would be missing without it.
    acquired: Vec<(Increment, i64)>,
}

/// That a wait, by its device and number, was not sure of a sending.
type Uncertain = (usize, u32, Sending);

impl Ledger {
    /// Another sending. What earlier waits were sure of only as it had not come: a wait that it is not ordered after may have
    /// taken it.
    fn add(&mut self, sending: Increment, me: usize) -> Vec<Uncertain> {
        self.sent += sending.amount;
        let mut uncertain = vec![];
        for wait in self.waits.iter_mut().rev().take_while(|wait| sending.clock[me] < wait.epoch) {
            wait.slack += sending.amount;
            for (known, weight) in &mut wait.acquired {
                if sending.follows(known) {
                    *weight += sending.amount;
                }
                if !known.is_certain(*weight, wait.slack) {
                    uncertain.push((me, wait.number, known.id));
                }
            }
        }
        self.pending.push(sending);
        uncertain
    }

    /// What a wait for `amount` is sure of.
    fn take(&mut self, amount: i64, wait: (usize, u32), epoch: u32, uncertain: &HashSet<Uncertain>) -> Vec<Increment> {
        self.taken += amount;
        let slack = self.sent - self.taken;
        let weight = |one: &Increment| {
            let later = self.pending.iter().filter(|other| other.follows(one));
            one.amount + later.map(|other| other.amount).sum::<i64>()
        };
        let weights: Vec<i64> = self.pending.iter().map(weight).collect();
        let (mut acquired, mut pending) = (vec![], vec![]);
        for (one, weight) in std::mem::take(&mut self.pending).into_iter().zip(weights) {
            match one.is_certain(weight, slack) && !uncertain.contains(&(wait.0, wait.1, one.id)) {
                true => acquired.push((one, weight)),
                false => pending.push(one),
            }
        }
        self.pending = pending;
        let sure_of = acquired.iter().map(|(one, _)| one.clone()).collect();
        if !acquired.is_empty() {
            self.waits.push(Waited { number: wait.1, epoch, slack, acquired });
        }
        sure_of
    }
}

/// What a device finds in its mail.
#[derive(Debug)]
enum Message {
    /// A signal to a semaphore's cell; sent by the op `origin`.
    Signal { semaphore: (Place, usize), sending: Increment, origin: u32 },
    /// A DMA to this device has started.
    Flight(Flight),
    /// Its bytes are there.
    Arrival(Sending, Vec<u8>),
}

/// A DMA from another device, or from this one to itself as to another.
#[derive(Debug)]
struct Flight {
    place: Place,
    /// Its destination, in the sender's numbers of buffers.
    destination: Region,
    semaphore: (Place, usize),
    sending: Increment,
    /// The op that started it, and in which grid step.
    origin: u32,
    step: Vec<usize>,
}

/// A DMA into this device's memory that no wait is sure of.
#[derive(Debug)]
pub(super) struct Incoming {
    id: Sending,
    pub(super) region: Region,
    semaphore: (usize, usize),
    bytes: usize,
    origin: u32,
    step: Vec<usize>,
}

impl Incoming {
    /// The op that started it.
    pub(super) fn origin(&self) -> u32 {
        self.origin
    }
}

/// What a device last did to a part of memory that others may write to.
#[derive(Debug)]
struct Touch {
    region: Region,
    writes: bool,
    epoch: u32,
    origin: Option<u32>,
}

/// What a device is doing when it does not run.
#[derive(Debug, PartialEq, Eq)]
enum Status {
    Ready,
    /// It waits: for what, in words.
    Waiting(String),
    /// It is at the end of the kernel.
    Done,
}

/// What a device is to do when its turn comes.
#[derive(Debug)]
enum Turn {
    /// Go on, and look into the mail.
    Go,
    /// Let this DMA leave: somebody may wait for it.
    Depart(usize),
    /// Nothing will ever come of waiting; what the others wait for.
    Deadlock(String),
    /// All devices are at the end of the kernel, and nothing is under way.
    Finished,
    /// Another device has faulted.
    Over,
}

#[derive(Debug)]
struct Device {
    status: Status,
    mail: VecDeque<Message>,
    /// DMAs to other devices that have not left: in which order of all they started, and their number here.
    departures: Vec<(u64, usize)>,
    turn: Option<Turn>,
    clock: Clock,
}

#[derive(Debug)]
struct State {
    devices: Vec<Device>,
    running: usize,
    started: u64,
    order: DmaOrder,
    random: SplitMix64,
    finished: bool,
    /// The first fault, and whose it is. At the end, where all look at once, that of the first device.
    fault: Option<(usize, Box<Fault>)>,
    /// A thread has panicked.
    broken: bool,
    uncertain: HashSet<Uncertain>,
}

/// What connects the devices.
#[derive(Debug)]
pub(super) struct Fabric {
    state: Mutex<State>,
    changed: Condvar,
    /// What waits are not sure of, as earlier runs have shown.
    uncertain: HashSet<Uncertain>,
}

impl Fabric {
    fn new(count: usize, order: DmaOrder, uncertain: HashSet<Uncertain>) -> Self {
        let device = |_| Device {
            status: Status::Ready,
            mail: VecDeque::new(),
            departures: vec![],
            turn: None,
            clock: vec![0; count],
        };
        let seed = if let DmaOrder::Random(seed) = order { seed } else { 0 };
        let state = State {
            devices: (0..count).map(device).collect(),
            running: if order == DmaOrder::Late { count - 1 } else { 0 },
            started: 0,
            order,
            random: SplitMix64::new(seed ^ 0x0deb_1ce5),
            finished: false,
            fault: None,
            broken: false,
            uncertain: HashSet::new(),
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), uncertain }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits for the turn of `me`.
    fn turn(&self, me: usize, mut state: MutexGuard<State>) -> Turn {
        loop {
            if state.finished && !state.broken {
                return Turn::Finished;
            }
            if state.broken || state.fault.is_some() {
                return Turn::Over;
            }
            if state.running == me {
                return state.devices[me].turn.take().unwrap_or(Turn::Go);
            }
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Lets others run until it is the turn of `me` again.
    fn pass(&self, me: usize, status: Status, clock: &Clock) -> Turn {
        let mut state = self.lock();
        state.devices[me].status = status;
        state.devices[me].clock.clone_from(clock);
        state.choose(me);
        self.changed.notify_all();
        self.turn(me, state)
    }

    fn post(&self, to: usize, message: Message) {
        self.lock().devices[to].mail.push_back(message);
    }

    /// The epoch of `me` that every other device which may still send something knows to be over.
    fn known(&self, me: usize) -> u32 {
        let state = self.lock();
        let others = state.devices.iter().enumerate().filter(|(at, device)| *at != me && device.status != Status::Done);
        others.map(|(_, device)| device.clock[me]).min().unwrap_or(u32::MAX)
    }

    /// Ends the run for all: `me` has faulted, after another one or not.
    fn fail(&self, me: usize, fault: Box<Fault>) {
        let mut state = self.lock();
        let first = state.fault.as_ref().is_none_or(|&(other, _)| state.finished && me < other);
        if first {
            state.fault = Some((me, fault));
        }
        self.changed.notify_all();
    }
}

impl State {
    /// Chooses who runs after `me`.
    fn choose(&mut self, me: usize) {
        let count = self.devices.len();
        let may_go = |device: &Device| device.status == Status::Ready || !device.mail.is_empty();
        let mut able: Vec<usize> = (0..count).filter(|&at| may_go(&self.devices[at])).collect();
        if !able.is_empty() {
            // Others first, in the order of their numbers or the other way round.
            able.sort_by_key(|&at| match self.order {
                DmaOrder::Late => (me + 2 * count - at - 1) % count,
                _ => (at + 2 * count - me - 1) % count,
            });
            let at = if let DmaOrder::Random(_) = self.order { self.random.below(able.len()) } else { 0 };
            self.running = able[at];
            return;
        }
        let mut departures: Vec<(u64, usize, usize)> = (self.devices.iter().enumerate())
            .flat_map(|(at, device)| device.departures.iter().map(move |&(number, dma)| (number, at, dma)))
            .collect();
        departures.sort_unstable();
        if !departures.is_empty() {
            let at = if let DmaOrder::Random(_) = self.order { self.random.below(departures.len()) } else { 0 };
            let (_, device, dma) = departures[at];
            self.running = device;
            self.devices[device].turn = Some(Turn::Depart(dma));
            return;
        }
        let waiting = |device: &Device| match &device.status {
            Status::Waiting(what) => Some(what.clone()),
            _ => None,
        };
        match (0..count).find(|&at| waiting(&self.devices[at]).is_some()) {
            None => self.finished = true,
            Some(first) => {
                let others = (0..count).filter(|&at| at != first).map(|at| match waiting(&self.devices[at]) {
                    Some(what) => format!("; device {at} waits for {what}"),
                    None => format!("; device {at} is at the end of the kernel"),
                });
                self.running = first;
                self.devices[first].turn = Some(Turn::Deadlock(others.collect()));
            }
        }
    }
}

/// A device's end of the fabric.
#[derive(Debug)]
pub(super) struct Link<'f> {
    fabric: &'f Fabric,
    pub(super) me: usize,
    pub(super) count: usize,
    clock: Clock,
    /// Sendings and waits so far.
    sent: u32,
    waited: u32,
    incoming: Vec<Incoming>,
    /// By buffer; how many there may be before those are looked for that do not matter any more.
    touched: HashMap<usize, (usize, Vec<Touch>)>,
    ledgers: HashMap<(usize, usize), Ledger>,
    /// Semaphores of ops that allocate them, while they are not allocated: a device may be ahead.
    parked: BTreeMap<(u32, usize), (Semaphore, Ledger)>,
    /// Buffers that are allocated, and by which op.
    scoped: Vec<(u32, usize)>,
}

impl<'f> Link<'f> {
    fn new(fabric: &'f Fabric, me: usize, count: usize, entered: bool) -> Self {
        let mut clock = vec![if entered { ENTERED } else { 0 }; count];
        // The epochs of the kernel's own come after that of its entry.
        clock[me] = ENTERED + 1;
        Self {
            fabric,
            me,
            count,
            clock,
            sent: 0,
            waited: 0,
            incoming: vec![],
            touched: HashMap::new(),
            ledgers: HashMap::new(),
            parked: BTreeMap::new(),
            scoped: vec![],
        }
    }

    /// A buffer's place, the same for every device.
    fn place(&self, buffer: usize) -> Place {
        let scoped = self.scoped.iter().find(|&&(_, allocated)| allocated == buffer);
        scoped.map_or(Place::Fixed(buffer), |&(origin, _)| Place::Scoped(origin))
    }

    fn buffer(&self, place: Place) -> Option<usize> {
        match place {
            Place::Fixed(buffer) => Some(buffer),
            Place::Scoped(origin) => self.scoped.iter().find(|&&(by, _)| by == origin).map(|&(_, buffer)| buffer),
        }
    }

    /// Ends this device's epoch with a sending.
    fn send(&mut self, amount: i64, is_dma: bool) -> Increment {
        self.sent += 1;
        let sending = Increment { id: (self.me, self.sent), amount, clock: self.clock.clone(), is_dma };
        self.clock[self.me] += 1;
        sending
    }
}

impl Program {
    /// Whether it sends anything to other devices.
    pub fn communicates(&self) -> bool {
        self.communication.any
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
        self.run_until_certain(machine, inputs, outputs).0
    }

    /// [`run_devices`](Self::run_devices), each device watched by one of `observers`.
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
        assert_eq!(inputs.len(), observers.len(), "an observer per device");
        let (_, uncertain) = self.run_until_certain(machine, inputs, outputs);
        self.run_once(machine, inputs, outputs, observers, uncertain).0
    }

    /// Runs again and again until no wait is sure of what it may have come before; what they are not sure of.
    fn run_until_certain(
        &self,
        machine: &Machine,
        inputs: &[Vec<HostTensor>],
        outputs: &[TensorType],
    ) -> (Result<Vec<Run>, Box<Fault>>, HashSet<Uncertain>) {
        assert!(!inputs.is_empty(), "a device or more");
        let mut uncertain = HashSet::new();
        // Certainty is only ever taken away, so this ends.
        loop {
            let (runs, found) = self.run_once(machine, inputs, outputs, &mut vec![(); inputs.len()], uncertain.clone());
            let known = uncertain.len();
            if runs.is_ok() {
                uncertain.extend(found);
            }
            if uncertain.len() == known {
                return (runs, uncertain);
            }
        }
    }

    /// A run of one device alone.
    pub(super) fn run_alone<O: Observer>(
        &self,
        machine: &Machine,
        inputs: &[HostTensor],
        outputs: &[TensorType],
        observer: &mut O,
    ) -> Result<Run, Box<Fault>> {
        let fabric = Fabric::new(1, machine.dma, HashSet::new());
        let link = Link::new(&fabric, 0, 1, !self.communication.own_barrier);
        self.run_linked(machine, inputs, outputs, observer, Some(Box::new(link)))
    }

    fn run_once<O: Observer + Send>(
        &self,
        machine: &Machine,
        inputs: &[Vec<HostTensor>],
        outputs: &[TensorType],
        observers: &mut [O],
        uncertain: HashSet<Uncertain>,
    ) -> (Result<Vec<Run>, Box<Fault>>, HashSet<Uncertain>) {
        let fabric = Fabric::new(inputs.len(), machine.dma, uncertain);
        let one = |me: usize, observer: &mut O| {
            let _guard = Guard(&fabric);
            let link = Link::new(&fabric, me, inputs.len(), !self.communication.own_barrier);
            match fabric.turn(me, fabric.lock()) {
                Turn::Over => None,
                _ => {
                    let run = self.run_linked(machine, &inputs[me], outputs, observer, Some(Box::new(link)));
                    run.map_err(|fault| fabric.fail(me, fault)).ok()
                }
            }
        };
        let runs: Vec<Option<Run>> = match observers {
            [observer] => vec![one(0, observer)],
            observers => std::thread::scope(|scope| {
                let one = &one;
                let device = |(me, observer)| {
                    let thread = std::thread::Builder::new().name(format!("device {me}")).stack_size(STACK);
                    thread.spawn_scoped(scope, move || one(me, observer)).expect("a thread")
                };
                let threads: Vec<_> = observers.iter_mut().enumerate().map(device).collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                    .collect()
            }),
        };
        let mut state = fabric.lock();
        let uncertain = std::mem::take(&mut state.uncertain);
        match state.fault.take() {
            Some((_, fault)) => (Err(fault), uncertain),
            None => (Ok(runs.into_iter().flatten().collect()), uncertain),
        }
    }
}

/// Of a device's thread: the interpreter goes as deep as a kernel's regions.
const STACK: usize = 64 << 20;

/// Wakes the other devices when this one's thread panics.
struct Guard<'f>(&'f Fabric);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().broken = true;
            self.0.changed.notify_all();
        }
    }
}

impl<O: Observer> Executor<'_, '_, O> {
    // ---- whose turn it is ----

    /// Waits until something may have changed for this device.
    fn pass(&mut self, status: Status) -> Step<Turn> {
        let link = self.link.as_ref().expect("one of several devices");
        let turn = link.fabric.pass(link.me, status, &link.clock);
        if let Turn::Depart(id) = turn {
            let index = self.dmas.iter().position(|dma| dma.id == id).expect("a DMA that has not left");
            self.land(index)?;
        }
        if let Turn::Over = turn {
            return Err(self.fault(FaultKind::Deadlock, &self.pipeline, "another device has faulted".into()));
        }
        self.read_mail()?;
        Ok(turn)
    }

    /// Waits for a change, in a wait by the op `origin` on a semaphore; `false` where this is the only device.
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

    /// Lets others run: this device looks at what they send, or sends something.
    pub(super) fn let_others_run(&mut self) -> Step<()> {
        match &self.link {
            Some(link) if link.count > 1 => self.pass(Status::Ready).map(drop),
            _ => Ok(()),
        }
    }

    /// Before `region` is found to be unwritten: a DMA to it that another device is yet to start says more of why.
    pub(super) fn check_on_its_way(&mut self, region: &Region, origin: u32) -> Step<()> {
        for _ in 1..self.link.as_ref().map_or(1, |link| link.count) {
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

    /// In a random order of DMAs, others may run first.
    fn perhaps_let_others_run(&mut self) -> Step<()> {
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
        if self.machine.ignored.contains(FaultKind::SemaphoreUnbalanced) {
            return Ok(());
        }
        let link = self.link.as_ref().expect("one of several devices");
        if let Some(incoming) = link.incoming.first() {
            let detail = "this device has not waited for all of a DMA from another at the end of the kernel".to_owned();
            let mut fault = self.fault_at(FaultKind::SemaphoreUnbalanced, incoming.origin, detail);
            fault = self.in_buffer(fault, incoming.semaphore.0, incoming.semaphore.1);
            fault.dma = Some(self.describe_incoming(incoming));
            return Err(fault);
        }
        if let Some((&(by, _), (semaphore, _))) = link.parked.iter().find(|(_, (semaphore, _))| semaphore.value != 0) {
            let at = self.location(by);
            let detail = format!("the one allocated at {at} is sent {} that nobody waits for", semaphore.value);
            return Err(self.fault_at(FaultKind::SemaphoreUnbalanced, semaphore.origin, detail));
        }
        Ok(())
    }

    // ---- what is sent ----

    /// The device that an op names, which is one of them.
    fn device(&self, device: Option<i32>, core: Option<i32>, origin: u32) -> Step<usize> {
        let (me, count) = self.link.as_ref().map_or((0, 1), |link| (link.me, link.count));
        if let Some(core) = core.filter(|&core| core != 0) {
            let detail = format!("core {core} of a device with one");
            return Err(self.fault_at(FaultKind::OutOfBounds, origin, detail));
        }
        match device.map_or(Ok(me), usize::try_from) {
            Ok(device) if device < count => Ok(device),
            _ => {
                let device = device.unwrap_or_default();
                let detail = format!("device {device}; there are {count}, counted from 0");
                Err(self.fault_at(FaultKind::OutOfBounds, origin, detail))
            }
        }
    }

    /// Faults unless `device` is known to have entered the kernel.
    fn check_entered(&self, device: usize, origin: u32) -> Step<()> {
        let link = self.link.as_ref().expect("one of several devices");
        if link.clock[device] >= ENTERED || device == link.me || self.machine.ignored.contains(FaultKind::DeviceRace) {
            return Ok(());
        }
        let detail =
            format!("device {device} may not have entered the kernel: no wait on the barrier semaphore says so");
        Err(self.fault_at(FaultKind::DeviceRace, origin, detail))
    }

    /// Adds to a semaphore of a device, this one or another.
    pub(super) fn signal_device(
        &mut self,
        semaphore: &View,
        amount: i32,
        [device, core]: [Option<i32>; 2],
        origin: u32,
    ) -> Step<()> {
        let to = self.device(device, core, origin)?;
        if self.link.as_ref().is_none_or(|link| link.me == to) {
            self.signal(semaphore, amount, origin);
            return Ok(());
        }
        if semaphore.buffer != self.barrier {
            self.check_entered(to, origin)?;
        }
        let link = self.link.as_mut().expect("one of several devices");
        let semaphore = (link.place(semaphore.buffer), semaphore.offset);
        let sending = link.send(i64::from(amount), false);
        link.fabric.post(to, Message::Signal { semaphore, sending, origin });
        self.perhaps_let_others_run()
    }

    /// Starts a DMA to a device: operands of the op are views, the semaphore of each, and whose the destination is.
    pub(super) fn start_remote_dma(
        &mut self,
        [source, own]: [&View; 2],
        [destination, semaphore]: [&View; 2],
        [device, core]: [Option<i32>; 2],
        origin: u32,
    ) -> Step<()> {
        let to = self.device(device, core, origin)?;
        let Checked { from, to: target, bytes, .. } = self.checked_dma([source, destination], false, origin)?;
        if from.is_empty() {
            return Ok(());
        }
        self.check_entered(to, origin)?;
        let id = self.next_dma;
        let step = self.step.clone();
        let link = self.link.as_mut().expect("a kernel that communicates");
        let sending = link.send(bytes as i64, true);
        let remote = Remote { device: to, sending: sending.id };
        let place = link.place(target.buffer);
        let semaphore = (link.place(semaphore.buffer), semaphore.offset);
        let flight = Flight { place, destination: target.clone(), semaphore, sending, origin, step };
        {
            let mut state = link.fabric.lock();
            state.started += 1;
            let number = state.started;
            state.devices[link.me].departures.push((number, id));
            state.devices[to].mail.push_back(Message::Flight(flight));
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
        self.count_sent(dma.semaphore, bytes as i64);
        self.semaphores.entry(dma.semaphore).or_default().origin = origin;
        self.observer.dma_start(&DmaEvent {
            id,
            from: side(&self.buffers, &dma.source),
            to: side(&self.buffers, &dma.destination),
            device: Some(to),
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

    /// The bytes of a DMA have left for another device.
    pub(super) fn depart(&mut self, id: usize, remote: Remote, data: Vec<u8>) {
        let link = self.link.as_ref().expect("a kernel that communicates");
        let mut state = link.fabric.lock();
        state.devices[link.me].departures.retain(|&(_, departure)| departure != id);
        state.devices[remote.device].mail.push_back(Message::Arrival(remote.sending, data));
    }

    /// Something of this device's own is sent to a semaphore of its own.
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
            let message = link.fabric.lock().devices[link.me].mail.pop_front();
            any |= message.is_some();
            match message {
                None => return Ok(any),
                Some(Message::Signal { semaphore, sending, origin }) => {
                    let amount = sending.amount;
                    self.receive(semaphore, sending, |semaphore| {
                        (semaphore.value, semaphore.origin) = (semaphore.value + amount, origin);
                    });
                }
                Some(Message::Flight(flight)) => self.expect(flight)?,
                Some(Message::Arrival(id, data)) => self.arrive(id, &data),
            }
        }
    }

    /// Notes a sending to a semaphore, which may not be allocated yet.
    fn receive(&mut self, (place, cell): (Place, usize), sending: Increment, change: impl FnOnce(&mut Semaphore)) {
        let link = self.link.as_mut().expect("one of several devices");
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

    /// A DMA to this device starts: whatever this device did to its destination must be known to its sender to be over.
    fn expect(&mut self, flight: Flight) -> Step<()> {
        let Flight { place, mut destination, semaphore, sending, origin, step } = flight;
        let checked = !self.machine.ignored.contains(FaultKind::DeviceRace);
        let link = self.link.as_ref().expect("one of several devices");
        let (from, me) = (sending.id.0, link.me);
        let (Some(buffer), Some(of_semaphore)) = (link.buffer(place), link.buffer(semaphore.0)) else {
            let detail = format!("device {from} copies to device {me} what that has not allocated, or not any more");
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
        // Of what this device, or another, does to the memory: the element, and what that is.
        let found = || {
            let touched = link.touched.get(&buffer).into_iter().flat_map(|(_, touched)| touched);
            let unordered = touched.filter(|touch| touch.epoch > sending.clock[me]);
            let touch = unordered.filter_map(|touch| {
                let does = if touch.writes { "writes" } else { "reads" };
                let at = touch.origin.map_or("its grid", |origin| self.location(origin));
                Some((touch.region.overlap(region)?, format!("device {me} {does} there at {at}")))
            });
            let own = self.dmas.iter().filter_map(|dma| {
                let destination = if dma.to.is_none() { dma.destination.overlap(region) } else { None };
                let at = destination.or_else(|| dma.source.overlap(region))?;
                Some((at, format!("device {me} has a DMA in flight there, {}", self.describe_dma(dma))))
            });
            let others = link.incoming.iter().filter_map(|other| {
                let at = other.region.overlap(region)?;
                Some((at, format!("another DMA is in flight there, {}", self.describe_incoming(other))))
            });
            touch.chain(own).chain(others).next()
        };
        if let Some((offset, what)) = found().filter(|_| checked) {
            let detail = format!("{what}, and nothing orders that before this DMA from device {from}");
            let mut fault = self.fault_at(FaultKind::DeviceRace, origin, detail);
            fault = self.in_buffer(fault, buffer, offset);
            fault.dma = Some(self.describe_incoming(&incoming));
            fault.grid_step.clone_from(&incoming.step);
            return Err(fault);
        }
        self.buffers[buffer].in_flight += 1;
        self.receive(semaphore, sending, |semaphore| semaphore.origin = origin);
        self.link.as_mut().expect("one of several devices").incoming.push(incoming);
        Ok(())
    }

    fn arrive(&mut self, id: Sending, data: &[u8]) {
        let link = self.link.as_ref().expect("one of several devices");
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
        self.observer.dma_arrive(id.0, side(&self.buffers, &region), bytes);
    }

    pub(super) fn describe_incoming(&self, incoming: &Incoming) -> String {
        let Incoming { id: (from, _), region, origin, step, .. } = incoming;
        let to = &self.buffers[region.buffer].name;
        format!("from device {from} to `{to}` started at {} in grid step {step:?}", self.location(*origin))
    }

    /// A wait by this device has taken `amount` from a semaphore.
    pub(super) fn acquire(&mut self, key: (usize, usize), amount: i64, origin: u32) {
        let Some(link) = &mut self.link else { return };
        link.waited += 1;
        let (me, epoch) = (link.me, link.clock[link.me]);
        let ledger = link.ledgers.entry(key).or_default();
        let sure_of = ledger.take(amount, (me, link.waited), epoch, &link.fabric.uncertain);
        let mut over = vec![];
        for sending in sure_of {
            for (mine, theirs) in link.clock.iter_mut().zip(&sending.clock) {
                *mine = (*mine).max(*theirs);
            }
            let at = link.incoming.iter().position(|incoming| incoming.id == sending.id);
            over.extend(at.map(|at| link.incoming.remove(at).region));
        }
        // From here on, and not before, this device knows of the DMA.
        for region in over {
            self.buffers[region.buffer].in_flight -= 1;
            self.touch(&region, true, Some(origin));
        }
    }

    /// The DMAs of others that are in flight to this device.
    pub(super) fn incoming(&self) -> &[Incoming] {
        self.link.as_ref().map_or(&[], |link| &link.incoming)
    }

    /// Notes that this device reads or writes memory that others may write to.
    pub(super) fn touch(&mut self, region: &Region, writes: bool, origin: Option<u32>) {
        let Some(link) = self.link.as_mut().filter(|_| self.buffers[region.buffer].shared) else { return };
        let epoch = link.clock[link.me];
        let (limit, touched) = link.touched.entry(region.buffer).or_insert_with(|| (64, vec![]));
        let same = |touch: &&mut Touch| touch.writes == writes && touch.region == *region;
        if let Some(touch) = touched.iter_mut().rev().take(16).find(same) {
            (touch.epoch, touch.origin) = (epoch, origin);
            return;
        }
        touched.push(Touch { region: region.clone(), writes, epoch, origin });
        if touched.len() > *limit {
            let known = link.fabric.known(link.me);
            touched.retain(|touch| touch.epoch > known);
            *limit = 64.max(2 * touched.len());
        }
    }

    // ---- scoped memory ----

    /// A buffer that the op `origin` has allocated.
    pub(super) fn enter_scope(&mut self, origin: u32, buffer: usize) {
        let Some(link) = &mut self.link else { return };
        link.scoped.push((origin, buffer));
        let cells: Vec<(u32, usize)> =
            link.parked.range((origin, 0)..=(origin, usize::MAX)).map(|(key, _)| *key).collect();
        for cell in cells {
            let (semaphore, ledger) = link.parked.remove(&cell).expect("it is there");
            self.semaphores.insert((buffer, cell.1), semaphore);
            link.ledgers.insert((buffer, cell.1), ledger);
        }
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
        link.touched.retain(|&buffer, _| buffer < first);
        link.ledgers.retain(|&(buffer, _), _| buffer < first);
    }

    /// Whether others send to a semaphore: what it holds then depends on how far they are.
    pub(super) fn is_sent_to(&self, key: (usize, usize)) -> bool {
        let ledger = self.link.as_ref().and_then(|link| link.ledgers.get(&key));
        ledger.is_some_and(|ledger| !ledger.pending.is_empty())
    }
}
