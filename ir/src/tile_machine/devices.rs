//! Several devices, and several cores of each, in one run: who runs when, what they send each other, and what orders their accesses.
//!
//! Each core is an executor on a thread of its own, with memories of its own. One of them runs at a time, until it waits for
//! something that is not there; then the [`Fabric`] says who is next. So a run does the same again, whatever the host's threads
//! do. What a core sends (signals, DMAs that start, their bytes) lies in the receiver's mail until that runs: nothing of a
//! core's own is touched by another's thread. Memory that cores of a device have in common goes from hand to hand with the turn.
//!
//! A device has one core here, which runs the whole grid, unless its cores meet: they signal each other or have a barrier, or run
//! different functions ([`Station`]).
//!
//! # What is ordered
//! Whether two accesses race does not depend on who happened to run first. Every core counts its *epochs*, which end when it
//! sends something or comes to a barrier, and has a *clock*: the last epoch of every core that it knows to be over. A signal or a
//! DMA carries its sender's clock; a wait takes over the clocks of those sendings *that it cannot have been satisfied without*
//! ([`Ledger`]): of two signals to a semaphore of which a wait takes one, it may have seen either. After a barrier all who met
//! there have the clocks of all. An access of epoch e is ordered before a sending whose clock has e for that core. A DMA from
//! elsewhere writes from when it starts until a wait of the receiver is sure of it; it must be ordered after every earlier access
//! to that memory, and no access may come before that wait. Of two accesses of different cores to memory that they have in common,
//! one of them a write, one must be ordered before the other; a DMA accesses its two sides until it is waited for.
//!
//! A sending that comes later in the run, but that nothing orders after a wait, may have satisfied that wait in its stead. If
//! the wait was sure of something for want of it, the run starts again with that certainty taken away ([`Uncertain`]).
//!
//! A kernel that names the barrier semaphore must see to it itself that whom it sends to has entered the kernel; others enter
//! together, as JAX has it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{
    DmaOrder, Machine, Program, Run,
    allocate::Allocation,
    dma::{Checked, Dma, Remote, Semaphore},
    exec::{Executor, Reg, Step, side},
    fault::{Fault, FaultKind},
    memory::{Buffer, Region, View},
    observer::{DmaEvent, Observer, Shared},
    tile::{self, Scalar, Tile},
};
use crate::{
    element::Element,
    error::Error,
    mosaic::{CoreType, MemorySpace, Semantics, Signature},
    random::SplitMix64,
    shape::TensorType,
    tensor::HostTensor,
};

/// The last epoch of every core that is known to be over.
type Clock = Vec<u32>;

/// Takes over what another clock knows.
fn join(clock: &mut Clock, other: &Clock) {
    for (mine, theirs) in clock.iter_mut().zip(other) {
        *mine = (*mine).max(*theirs);
    }
}

/// The first epoch: that a core knows it of another says that this one has entered the kernel.
const ENTERED: u32 = 1;

/// A sending: its core, and which of its sendings.
pub(super) type Sending = (usize, u32);

/// What one core of a device runs: a function of the module, at a position of its parallel dimensions.
#[derive(Clone, Debug)]
pub(super) struct Station<'p> {
    program: &'p Program,
    core: usize,
    subcore: usize,
    /// Its position of the parallel dimensions, if not all are its own.
    position: Option<usize>,
}

impl Station<'_> {
    fn kind(&self) -> CoreType {
        self.program.signature.core
    }
}

impl fmt::Display for Station<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { core, subcore, .. } = self;
        match self.kind() {
            CoreType::TensorCore => write!(f, "core {core}"),
            CoreType::ScalarSubcore => write!(f, "the scalar subcore of core {core}"),
            CoreType::VectorSubcore => write!(f, "vector subcore {subcore} of core {core}"),
        }
    }
}

/// A buffer as every core knows it: an argument's, by its number, or one that an op allocates while it runs.
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
    /// Sendings of other cores that no wait is sure of.
    pending: Vec<Increment>,
    /// Waits that were sure of something, in their order.
    waits: Vec<Waited>,
}

#[derive(Debug)]
struct Waited {
    /// Which of the core's waits.
    number: u32,
    epoch: u32,
    /// What may be missing of all that was sent, and may have come before it, without holding it up.
    slack: i64,
    /// What it was sure of, and what would be missing without it.
    acquired: Vec<(Increment, i64)>,
}

/// That a wait, by its core and number, was not sure of a sending.
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

/// What a core finds in its mail.
#[derive(Debug)]
enum Message {
    /// A signal to a semaphore's cell; sent by the op `origin`.
    Signal { semaphore: (Place, usize), sending: Increment, origin: u32 },
    /// A DMA to this core's memory has started.
    Flight(Flight),
    /// Its bytes are there.
    Arrival(Sending, Vec<u8>),
}

/// A DMA from another core, or from this one to itself as to another.
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

/// A DMA into this core's memory that no wait is sure of.
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

/// What is done to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Reads,
    Writes,
    /// Both, in one.
    Adds,
}

impl Access {
    /// Whether it matters which of the two comes first.
    fn conflicts(self, other: Self) -> bool {
        !matches!((self, other), (Self::Reads, Self::Reads) | (Self::Adds, Self::Adds))
    }

    /// What a DMA does to its destination.
    pub(super) fn to_destination(adds: bool) -> Self {
        if adds { Self::Adds } else { Self::Writes }
    }

    pub(super) fn of(writes: bool) -> Self {
        if writes { Self::Writes } else { Self::Reads }
    }

    fn in_words(self) -> &'static str {
        match self {
            Self::Reads => "reads",
            Self::Writes => "writes",
            Self::Adds => "adds",
        }
    }
}

/// What a core last did to a part of memory that others may access too.
#[derive(Debug)]
struct Touch {
    core: usize,
    region: Region,
    access: Access,
    epoch: u32,
    origin: Option<u32>,
}

/// A DMA in flight, as the core knows it that is to wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flying {
    Own(usize),
    Incoming(Sending),
}

/// One side of a DMA in flight, in memory that cores have in common.
#[derive(Debug)]
struct Open {
    core: usize,
    flying: Flying,
    /// Whose memory it is, of those who have it in common.
    home: usize,
    region: Region,
    access: Access,
    location: String,
}

/// Who has come to a barrier, and all that they know.
#[derive(Debug, Default)]
struct Meeting {
    arrived: Vec<usize>,
    clock: Clock,
}

/// What a core is doing when it does not run.
#[derive(Debug, PartialEq, Eq)]
enum Status {
    Ready,
    /// It looks again and again for something that is not there.
    Polling,
    /// It waits: for what, in words.
    Waiting(String),
    /// It is at the end of the kernel.
    Done,
}

/// What a core is to do when its turn comes.
#[derive(Debug)]
enum Turn {
    /// Go on, and look into the mail.
    Go,
    /// Let this DMA leave: somebody may wait for it.
    Depart(usize),
    /// Nothing will ever come of waiting; what the others wait for.
    Deadlock(String),
    /// All cores are at the end of the kernel, and nothing is under way.
    Finished,
    /// Another core has faulted.
    Over,
}

#[derive(Debug)]
struct Core {
    status: Status,
    mail: VecDeque<Message>,
    /// DMAs to others that have not left: in which order of all they started, and their number here.
    departures: Vec<(u64, usize)>,
    turn: Option<Turn>,
    clock: Clock,
    /// What all know who met it at a barrier.
    met: Option<Clock>,
}

struct State<'i> {
    cores: Vec<Core>,
    /// Memory that cores have in common, while none of those has its turn: by whose it is and its number there.
    common: HashMap<(usize, usize), Buffer<'i>>,
    /// What was done to memory that others may access, by whose it is and its number; how much there may be before that is looked
    /// for which does not matter any more.
    touched: HashMap<(usize, usize), (usize, Vec<Touch>)>,
    open: Vec<Open>,
    /// DMAs that their receivers have not looked at, and what their senders knew.
    posted: Vec<(Sending, Clock)>,
    /// By the first of those who meet, and the barrier's number.
    meetings: HashMap<(usize, i32), Meeting>,
    running: usize,
    started: u64,
    order: DmaOrder,
    random: SplitMix64,
    finished: bool,
    /// The first fault, and whose it is. At the end, where all look at once, that of the first core.
    fault: Option<(usize, Box<Fault>)>,
    /// A thread has panicked.
    broken: bool,
    uncertain: HashSet<Uncertain>,
}

/// What connects the cores.
pub(super) struct Fabric<'i> {
    state: Mutex<State<'i>>,
    changed: Condvar,
    /// What waits are not sure of, as earlier runs have shown.
    uncertain: HashSet<Uncertain>,
    /// What the cores of a device run, and how many devices there are. Cores are numbered device by device.
    stations: Vec<Station<'i>>,
    devices: usize,
}

impl<'i> Fabric<'i> {
    fn new(stations: Vec<Station<'i>>, devices: usize, order: DmaOrder, uncertain: HashSet<Uncertain>) -> Self {
        let count = devices * stations.len();
        let core = |_| Core {
            status: Status::Ready,
            mail: VecDeque::new(),
            departures: vec![],
            turn: None,
            clock: vec![0; count],
            met: None,
        };
        let seed = if let DmaOrder::Random(seed) = order { seed } else { 0 };
        let state = State {
            cores: (0..count).map(core).collect(),
            common: HashMap::new(),
            touched: HashMap::new(),
            open: vec![],
            posted: vec![],
            meetings: HashMap::new(),
            running: if order == DmaOrder::Late { count - 1 } else { 0 },
            started: 0,
            order,
            random: SplitMix64::new(seed ^ 0x0deb_1ce5),
            finished: false,
            fault: None,
            broken: false,
            uncertain: HashSet::new(),
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), uncertain, stations, devices }
    }

    fn lock(&self) -> MutexGuard<'_, State<'i>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a core runs, by its number.
    fn station(&self, core: usize) -> &Station<'i> {
        &self.stations[core % self.stations.len()]
    }

    /// A core in words.
    pub(super) fn name(&self, core: usize) -> String {
        let (device, station) = (core / self.stations.len(), self.station(core));
        match (self.stations.len(), self.devices) {
            (1, _) => format!("device {device}"),
            (_, 1) => station.to_string(),
            _ => format!("{station} of device {device}"),
        }
    }

    /// Waits for the turn of `me`.
    fn turn(&self, me: usize, mut state: MutexGuard<State<'i>>) -> Turn {
        loop {
            if state.finished && !state.broken {
                return Turn::Finished;
            }
            if state.broken || state.fault.is_some() {
                return Turn::Over;
            }
            if state.running == me {
                return state.cores[me].turn.take().unwrap_or(Turn::Go);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets others run until it is the turn of `me` again.
    fn pass(&self, me: usize, status: Status, clock: &Clock) -> Turn {
        let mut state = self.lock();
        state.cores[me].status = status;
        state.cores[me].clock.clone_from(clock);
        state.choose(me, &|core| self.name(core));
        self.changed.notify_all();
        self.turn(me, state)
    }

    fn post(&self, to: usize, message: Message) {
        self.lock().cores[to].mail.push_back(message);
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

impl State<'_> {
    /// The epoch of a core that every other one which may still do something knows to be over.
    fn known(&self, core: usize) -> u32 {
        let others = self.cores.iter().enumerate().filter(|(at, other)| *at != core && other.status != Status::Done);
        let others = others.map(|(_, other)| other.clock[core]);
        others.chain(self.posted.iter().map(|(_, clock)| clock[core])).min().unwrap_or(u32::MAX)
    }

    /// Notes what a core does to memory that is `home`'s.
    fn note(&mut self, home: usize, touch: Touch) {
        let (limit, touched) = self.touched.entry((home, touch.region.buffer)).or_insert_with(|| (64, vec![]));
        let same = |known: &&mut Touch| {
            known.core == touch.core && known.access == touch.access && known.region == touch.region
        };
        if let Some(known) = touched.iter_mut().rev().take(16).find(same) {
            *known = touch;
            return;
        }
        let at = (home, touch.region.buffer);
        touched.push(touch);
        if touched.len() > *limit {
            let known: Vec<u32> = (0..self.cores.len()).map(|core| self.known(core)).collect();
            let (limit, touched) = self.touched.get_mut(&at).expect("it is there");
            touched.retain(|touch| touch.epoch > known[touch.core]);
            *limit = 64.max(2 * touched.len());
        }
    }

    /// Chooses who runs after `me`.
    fn choose(&mut self, me: usize, name: &dyn Fn(usize) -> String) {
        let count = self.cores.len();
        let may_go = |core: &Core| core.status == Status::Ready || !core.mail.is_empty() || core.met.is_some();
        let mut able: Vec<usize> = (0..count).filter(|&at| may_go(&self.cores[at])).collect();
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
        let mut polling: Vec<usize> = (0..count).filter(|&at| self.cores[at].status == Status::Polling).collect();
        let mut departures: Vec<(u64, usize, usize)> = (self.cores.iter().enumerate())
            .flat_map(|(at, core)| core.departures.iter().map(move |&(number, dma)| (number, at, dma)))
            .collect();
        departures.sort_unstable();
        if !departures.is_empty() {
            let at = if let DmaOrder::Random(_) = self.order { self.random.below(departures.len()) } else { 0 };
            let (_, core, dma) = departures[at];
            self.running = core;
            self.cores[core].turn = Some(Turn::Depart(dma));
            return;
        }
        polling.sort_by_key(|&at| (at + 2 * count - me - 1) % count);
        if let Some(&first) = polling.first() {
            self.running = first;
            return;
        }
        let waiting = |core: &Core| match &core.status {
            Status::Waiting(what) => Some(what.clone()),
            _ => None,
        };
        match (0..count).find(|&at| waiting(&self.cores[at]).is_some()) {
            None => self.finished = true,
            Some(first) => {
                let others = (0..count).filter(|&at| at != first).map(|at| match waiting(&self.cores[at]) {
                    Some(what) => format!("; {} waits for {what}", name(at)),
                    None => format!("; {} is at the end of the kernel", name(at)),
                });
                self.running = first;
                self.cores[first].turn = Some(Turn::Deadlock(others.collect()));
            }
        }
    }
}

/// A core's end of the fabric.
pub(super) struct Link<'f, 'i> {
    fabric: &'f Fabric<'i>,
    me: usize,
    clock: Clock,
    /// Sendings and waits so far.
    sent: u32,
    waited: u32,
    incoming: Vec<Incoming>,
    /// DMAs whose semaphore is not allocated yet: another core may be ahead.
    early: VecDeque<Message>,
    /// Buffers that it has in common with other cores, and whose they are.
    common: Vec<(usize, usize)>,
    /// Arrays that nobody reads after the call.
    pub(super) unused: Vec<usize>,
    ledgers: HashMap<(usize, usize), Ledger>,
    /// Semaphores of ops that allocate them, while they are not allocated: another core may be ahead.
    parked: BTreeMap<(u32, usize), (Semaphore, Ledger)>,
    /// Buffers that are allocated, and by which op.
    scoped: Vec<(u32, usize)>,
}

impl<'f, 'i> Link<'f, 'i> {
    fn new(fabric: &'f Fabric<'i>, me: usize) -> Self {
        let cores = fabric.stations.len();
        // The cores of a device enter together.
        let own_barrier = fabric.stations.iter().any(|station| station.program.communication.own_barrier);
        let entered = |core: usize| !own_barrier || core / cores == me / cores;
        let clock = (0..fabric.devices * cores).map(|core| match core {
            // The epochs of the kernel's own come after that of its entry.
            _ if core == me => ENTERED + 1,
            _ if entered(core) => ENTERED,
            _ => 0,
        });
        Self {
            fabric,
            me,
            clock: clock.collect(),
            sent: 0,
            waited: 0,
            incoming: vec![],
            early: VecDeque::new(),
            common: vec![],
            unused: vec![],
            ledgers: HashMap::new(),
            parked: BTreeMap::new(),
            scoped: vec![],
        }
    }

    /// How many cores a device has.
    fn cores(&self) -> usize {
        self.fabric.stations.len()
    }

    /// Which device this core is of.
    pub(super) fn device(&self) -> usize {
        self.me / self.cores()
    }

    /// Which of the device's cores it is.
    pub(super) fn core(&self) -> usize {
        self.me % self.cores()
    }

    /// The device, if there are several.
    pub(super) fn device_of_several(&self) -> Option<usize> {
        (self.fabric.devices > 1).then(|| self.device())
    }

    fn is_alone(&self) -> bool {
        self.clock.len() == 1
    }

    /// The steps of a grid of sizes `bounds` that are this core's.
    pub(super) fn steps(&self, bounds: &[usize]) -> Range<usize> {
        let Station { program, position, .. } = self.fabric.station(self.me);
        let all: usize = bounds.iter().product();
        match position {
            Some(_) if all == 0 => 0..0,
            Some(at) => {
                let of_one: usize = bounds[program.parallel_dims()..].iter().product();
                at * of_one..(at + 1) * of_one
            }
            None => 0..all,
        }
    }

    /// Where an op of a core is.
    fn location_of(&self, core: usize, origin: u32) -> &'i str {
        &self.fabric.station(core).program.origins[origin as usize].location
    }

    fn location(&self, touch: &Touch) -> &'i str {
        touch.origin.map_or("its grid", |origin| self.location_of(touch.core, origin))
    }

    /// Another core in words.
    pub(super) fn name(&self, core: usize) -> String {
        self.fabric.name(core)
    }

    /// Whether the cores of a device have memory in common.
    pub(super) fn has_common_memory(&self) -> bool {
        self.cores() > 1
    }

    /// Whose a buffer is: the first of those that have it in common.
    fn home(&self, buffer: usize) -> usize {
        let common = self.common.iter().find(|&&(known, _)| known == buffer);
        common.map_or(self.me, |&(_, home)| home)
    }

    /// Ends this core's epoch; the clock of those before.
    fn end_epoch(&mut self) -> Clock {
        let clock = self.clock.clone();
        self.clock[self.me] += 1;
        clock
    }

    /// A buffer's place, the same for every core.
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

    /// Ends this core's epoch with a sending.
    fn send(&mut self, amount: i64, is_dma: bool) -> Increment {
        self.sent += 1;
        Increment { id: (self.me, self.sent), amount, clock: self.end_epoch(), is_dma }
    }
}

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

    /// What each of a device's cores runs.
    fn stations(&self) -> Vec<Station<'_>> {
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
    fn functions(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.partners)
    }

    /// Whether cores of a device wait for each other.
    fn cores_meet(&self) -> bool {
        self.functions().any(|program| program.communication.meets)
    }

    /// How many of the grid's first dimensions are parallel.
    fn parallel_dims(&self) -> usize {
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

    /// [`run_devices`](Self::run_devices), each [core](Self::cores) of each device watched by one of `observers`: those of a device
    /// one after another.
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
        let mut runs = match O::WATCHES {
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

/// Of a core without subcores it does not matter which of them is meant.
fn kind_has_no_subcores(station: &Station) -> bool {
    station.kind() != CoreType::VectorSubcore
}

/// The most cores of a device that may wait for each other: each takes a thread.
const MOST_CORES: usize = 256;

/// Of a core's thread: the interpreter goes as deep as a kernel's regions.
const STACK: usize = 64 << 20;

/// Wakes the other cores when this one's thread panics.
struct Guard<'f, 'i>(&'f Fabric<'i>);

impl Drop for Guard<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().broken = true;
            self.0.changed.notify_all();
        }
    }
}

impl<'i, O: Observer> Executor<'_, 'i, O> {
    // ---- whose turn it is ----

    /// Waits until something may have changed for this core.
    fn pass(&mut self, status: Status) -> Step<Turn> {
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

    /// Lets others have the memory that cores have in common.
    fn lend(&mut self) {
        let Some(link) = self.link.as_ref().filter(|link| !link.common.is_empty()) else { return };
        let mut state = link.fabric.lock();
        for &(buffer, home) in &link.common {
            let name = self.buffers[buffer].name.clone();
            let gone = Buffer::holding(&name, MemorySpace::Any, Cow::Owned(HostTensor::zeros(Element::U8, &[0])));
            state.common.insert((home, buffer), std::mem::replace(&mut self.buffers[buffer], gone));
        }
    }

    /// Takes the memory that cores have in common, as far as others have had it; of it only what is this core's, `at_end`.
    fn take_back(&mut self, at_end: bool) {
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
    fn addressee(&self, target: &Addressee, origin: u32) -> Step<usize> {
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
                let (name, does, at) = (link.name(touch.core), touch.access.in_words(), link.location(touch));
                Some((touch.region.overlap(region)?, format!("{name} {does} there at {at}")))
            });
            let in_flight = state.open.iter().filter(|open| open.core != link.me && open.home == link.home(buffer));
            let mut of_others = in_flight.filter_map(|open| {
                let (name, at) = (link.name(open.core), &open.location);
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
        let (from, at) = (link.name(*from), link.location_of(*from, *origin));
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

    // ---- memory that others access ----

    /// Faults when another core accesses memory that this one accesses, too, one of them writes, and nothing orders the two; notes
    /// that this one does.
    pub(super) fn access(&mut self, region: &Region, access: Access, origin: Option<u32>) -> Step<()> {
        if let Some(link) = self.link.as_ref().filter(|_| self.buffers[region.buffer].shared) {
            let home = link.home(region.buffer);
            self.check_others(home, region, access, origin)?;
            self.touch_at(home, region, access, origin);
        }
        Ok(())
    }

    /// Of memory that is `home`'s.
    fn check_others(&self, home: usize, region: &Region, access: Access, origin: Option<u32>) -> Step<()> {
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
            let (name, does, at) = (link.name(touch.core), touch.access.in_words(), link.location(touch));
            Some((touch.region.overlap(region)?, format!("{name} {does} there at {at}")))
        });
        let open = state.open.iter().filter(|open| open.core != link.me && open.home == home);
        let mut open = open.filter(|open| races(open.access)).filter_map(|open| {
            let (name, at) = (link.name(open.core), &open.location);
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

    fn touch_at(&self, home: usize, region: &Region, access: Access, origin: Option<u32>) {
        let Some(link) = &self.link else { return };
        let touch = Touch { core: link.me, region: region.clone(), access, epoch: link.clock[link.me], origin };
        link.fabric.lock().note(home, touch);
    }

    /// A DMA that accesses memory has started.
    pub(super) fn open(&mut self, flying: Flying, region: &Region, access: Access, origin: u32) {
        let Some(link) = self.link.as_ref().filter(|link| link.has_common_memory()) else { return };
        if self.buffers[region.buffer].shared {
            let from = if let Flying::Incoming((from, _)) = flying { from } else { link.me };
            let location = link.location_of(from, origin).to_owned();
            let (home, region) = (link.home(region.buffer), region.clone());
            link.fabric.lock().open.push(Open { core: link.me, flying, home, region, access, location });
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
                let detail = format!("all {} subcores of this core{others}", subcores.len());
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
