//! What connects cores: their mail, their memory in common, who runs next. [`devices`](super::devices) says what it is for.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    fmt,
    ops::Range,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use super::{
    DmaOrder, Program,
    dma::Semaphore,
    fault::Fault,
    ledger::{Clock, Increment, Ledger, Sending, Uncertain},
    memory::{Buffer, Region},
};
use crate::{mosaic::CoreType, random::SplitMix64};

/// The first epoch: that a core knows it of another says that this one has entered the kernel.
pub(super) const ENTERED: u32 = 1;

/// What one core of a device runs: a function of the module, at a position of its parallel dimensions.
#[derive(Clone, Debug)]
pub(super) struct Station<'p> {
    pub(super) program: &'p Program,
    pub(super) core: usize,
    pub(super) subcore: usize,
    /// Its position of the parallel dimensions, if not all are its own.
    pub(super) position: Option<usize>,
}

impl Station<'_> {
    pub(super) fn kind(&self) -> CoreType {
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

/// What a core finds in its mail.
#[derive(Debug)]
pub(super) enum Message {
    /// A signal to a semaphore's cell; sent by the op `origin`.
    Signal { semaphore: (Place, usize), sending: Increment, origin: u32 },
    /// A DMA to this core's memory has started.
    Flight(Flight),
    /// Its bytes are there.
    Arrival(Sending, Vec<u8>),
}

/// A DMA from another core, or from this one to itself as to another.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) place: Place,
    /// Its destination, in the sender's numbers of buffers.
    pub(super) destination: Region,
    pub(super) semaphore: (Place, usize),
    pub(super) sending: Increment,
    /// The op that started it, and in which grid step.
    pub(super) origin: u32,
    pub(super) step: Vec<usize>,
}

/// A DMA into this core's memory that no wait is sure of.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) id: Sending,
    pub(super) region: Region,
    pub(super) semaphore: (usize, usize),
    pub(super) bytes: usize,
    pub(super) origin: u32,
    pub(super) step: Vec<usize>,
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
    pub(super) fn conflicts(self, other: Self) -> bool {
        !matches!((self, other), (Self::Reads, Self::Reads) | (Self::Adds, Self::Adds))
    }

    /// What a DMA does to its destination.
    pub(super) fn to_destination(adds: bool) -> Self {
        if adds { Self::Adds } else { Self::Writes }
    }

    pub(super) fn of(writes: bool) -> Self {
        if writes { Self::Writes } else { Self::Reads }
    }

    pub(super) fn in_words(self) -> &'static str {
        match self {
            Self::Reads => "reads",
            Self::Writes => "writes",
            Self::Adds => "adds",
        }
    }
}

/// What a core last did to a part of memory that others may access too.
#[derive(Debug)]
pub(super) struct Touch {
    pub(super) core: usize,
    pub(super) region: Region,
    pub(super) access: Access,
    pub(super) epoch: u32,
    pub(super) origin: Option<u32>,
}

/// A DMA in flight, as the core knows it that is to wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flying {
    Own(usize),
    Incoming(Sending),
}

/// One side of a DMA in flight, in memory that cores have in common.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) core: usize,
    pub(super) flying: Flying,
    /// Whose memory it is, of those who have it in common.
    pub(super) home: usize,
    pub(super) region: Region,
    pub(super) access: Access,
    pub(super) origin: u32,
}

/// Who has come to a barrier, and all that they know.
#[derive(Debug, Default)]
pub(super) struct Meeting {
    pub(super) arrived: Vec<usize>,
    pub(super) clock: Clock,
}

/// What a core is doing when it does not run.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Status {
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
pub(super) enum Turn {
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
pub(super) struct Core {
    pub(super) status: Status,
    pub(super) mail: VecDeque<Message>,
    /// DMAs to others that have not left: in which order of all they started, and their number here.
    pub(super) departures: Vec<(u64, usize)>,
    pub(super) turn: Option<Turn>,
    pub(super) clock: Clock,
    /// What all know who met it at a barrier.
    pub(super) met: Option<Clock>,
}

pub(super) struct State<'i> {
    pub(super) cores: Vec<Core>,
    /// Memory that cores have in common, while none of those has its turn: by whose it is and its number there.
    pub(super) common: HashMap<(usize, usize), Buffer<'i>>,
    /// What was done to memory that others may access, by whose it is and its number; how much there may be before that is looked
    /// for which does not matter any more.
    pub(super) touched: HashMap<(usize, usize), (usize, Vec<Touch>)>,
    pub(super) open: Vec<Open>,
    /// DMAs that their receivers have not looked at, and what their senders knew.
    pub(super) posted: Vec<(Sending, Clock)>,
    /// By the first of those who meet, and the barrier's number.
    pub(super) meetings: HashMap<(usize, i32), Meeting>,
    pub(super) running: usize,
    pub(super) started: u64,
    pub(super) order: DmaOrder,
    pub(super) random: SplitMix64,
    pub(super) finished: bool,
    /// The first fault, and whose it is. At the end, where all look at once, that of the first core.
    pub(super) fault: Option<(usize, Box<Fault>)>,
    /// A thread has panicked.
    pub(super) broken: bool,
    pub(super) uncertain: HashSet<Uncertain>,
}

/// What connects the cores.
pub(super) struct Fabric<'i> {
    pub(super) state: Mutex<State<'i>>,
    pub(super) changed: Condvar,
    /// What waits are not sure of, as earlier runs have shown.
    pub(super) uncertain: HashSet<Uncertain>,
    /// What the cores of a device run, and how many devices there are. Cores are numbered device by device.
    pub(super) stations: Vec<Station<'i>>,
    pub(super) devices: usize,
}

impl<'i> Fabric<'i> {
    pub(super) fn new(
        stations: Vec<Station<'i>>,
        devices: usize,
        order: DmaOrder,
        uncertain: HashSet<Uncertain>,
    ) -> Self {
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

    pub(super) fn lock(&self) -> MutexGuard<'_, State<'i>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a core runs, by its number.
    pub(super) fn station(&self, core: usize) -> &Station<'i> {
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
    pub(super) fn turn(&self, me: usize, mut state: MutexGuard<State<'i>>) -> Turn {
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
    pub(super) fn pass(&self, me: usize, status: Status, clock: &Clock) -> Turn {
        let mut state = self.lock();
        state.cores[me].status = status;
        state.cores[me].clock.clone_from(clock);
        state.choose(me, &|core| self.name(core));
        self.changed.notify_all();
        self.turn(me, state)
    }

    pub(super) fn post(&self, to: usize, message: Message) {
        self.lock().cores[to].mail.push_back(message);
    }

    /// Ends the run for all: `me` has faulted, after another one or not.
    pub(super) fn fail(&self, me: usize, fault: Box<Fault>) {
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
    pub(super) fn known(&self, core: usize) -> u32 {
        let others = self.cores.iter().enumerate().filter(|(at, other)| *at != core && other.status != Status::Done);
        let others = others.map(|(_, other)| other.clock[core]);
        others.chain(self.posted.iter().map(|(_, clock)| clock[core])).min().unwrap_or(u32::MAX)
    }

    /// Notes what a core does to memory that is `home`'s.
    pub(super) fn note(&mut self, home: usize, touch: Touch) {
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
    pub(super) fn choose(&mut self, me: usize, name: &dyn Fn(usize) -> String) {
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
        let mut polling = (0..count).map(|at| (me + 1 + at) % count);
        if let Some(next) = polling.find(|&at| self.cores[at].status == Status::Polling) {
            self.running = next;
            return;
        }
        let waiting = |core: &Core| match &core.status {
            Status::Waiting(what) => Some(what.clone()),
            _ => None,
        };
        match (0..count).find(|&at| waiting(&self.cores[at]).is_some()) {
            None => self.finished = true,
            Some(first) => {
                // Those that wait for the same are one, behind those at the end.
                let mut groups: BTreeMap<Option<String>, Vec<usize>> = BTreeMap::new();
                for at in (0..count).filter(|&at| at != first) {
                    groups.entry(waiting(&self.cores[at])).or_default().push(at);
                }
                let others = groups.into_iter().map(|(what, of)| {
                    let names: Vec<String> = of.iter().take(3).map(|&core| name(core)).collect();
                    let who = match of.len() - names.len() {
                        0 => names.join(", "),
                        more => format!("{} and {more} more", names.join(", ")),
                    };
                    let verb = if of.len() == 1 { ["waits", "is"] } else { ["wait", "are"] };
                    match what {
                        Some(what) => format!("; {who} {} for {what}", verb[0]),
                        None => format!("; {who} {} at the end of the kernel", verb[1]),
                    }
                });
                self.running = first;
                self.cores[first].turn = Some(Turn::Deadlock(others.collect()));
            }
        }
    }
}

/// A core's end of the fabric.
pub(super) struct Link<'f, 'i> {
    pub(super) fabric: &'f Fabric<'i>,
    pub(super) me: usize,
    pub(super) clock: Clock,
    /// Sendings and waits so far.
    pub(super) sent: u32,
    pub(super) waited: u32,
    pub(super) incoming: Vec<Incoming>,
    /// DMAs whose semaphore is not allocated yet: another core may be ahead.
    pub(super) early: VecDeque<Message>,
    /// Buffers that it has in common with other cores, and whose they are.
    pub(super) common: Vec<(usize, usize)>,
    /// Arrays that nobody reads after the call.
    pub(super) unused: Vec<usize>,
    pub(super) ledgers: HashMap<(usize, usize), Ledger>,
    /// Semaphores of ops that allocate them, while they are not allocated: another core may be ahead.
    pub(super) parked: BTreeMap<(u32, usize), (Semaphore, Ledger)>,
    /// Buffers that are allocated, and by which op.
    pub(super) scoped: Vec<(u32, usize)>,
}

impl<'f, 'i> Link<'f, 'i> {
    pub(super) fn new(fabric: &'f Fabric<'i>, me: usize) -> Self {
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
    pub(super) fn cores(&self) -> usize {
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

    pub(super) fn is_alone(&self) -> bool {
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

    /// Another core in words.
    pub(super) fn name(&self, core: usize) -> String {
        self.fabric.name(core)
    }

    /// Whether the cores of a device have memory in common.
    pub(super) fn has_common_memory(&self) -> bool {
        self.cores() > 1
    }

    /// Whose a buffer is: the first of those that have it in common.
    pub(super) fn home(&self, buffer: usize) -> usize {
        let common = self.common.iter().find(|&&(known, _)| known == buffer);
        common.map_or(self.me, |&(_, home)| home)
    }

    /// Ends this core's epoch; the clock of those before.
    pub(super) fn end_epoch(&mut self) -> Clock {
        let clock = self.clock.clone();
        self.clock[self.me] += 1;
        clock
    }

    /// A buffer's place, the same for every core.
    pub(super) fn place(&self, buffer: usize) -> Place {
        let scoped = self.scoped.iter().find(|&&(_, allocated)| allocated == buffer);
        scoped.map_or(Place::Fixed(buffer), |&(origin, _)| Place::Scoped(origin))
    }

    pub(super) fn buffer(&self, place: Place) -> Option<usize> {
        match place {
            Place::Fixed(buffer) => Some(buffer),
            Place::Scoped(origin) => self.scoped.iter().find(|&&(by, _)| by == origin).map(|&(_, buffer)| buffer),
        }
    }

    /// Ends this core's epoch with a sending.
    pub(super) fn send(&mut self, amount: i64, is_dma: bool) -> Increment {
        self.sent += 1;
        Increment { id: (self.me, self.sent), amount, clock: self.end_epoch(), is_dma }
    }
}

/// Wakes the other cores when this one's thread panics.
pub(super) struct Guard<'f, 'i>(pub(super) &'f Fabric<'i>);

impl Drop for Guard<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().broken = true;
            self.0.changed.notify_all();
        }
    }
}
