//! What a run moves and multiplies, and when it would on a chip whose rates are known: counts, and a timeline on a model's clock.
//!
//! # The model
//! The machine does not model time. The clock here is one of rates alone, stated in [`Rates`]:
//! - Ops run one after another. A matrix product takes the cycles that its passes take on the MXU, every other op one cycle for
//!   each register of 1024 elements that it makes, and scalars none.
//! - Products are padded to the MXU: rows to 8, the inner dimension and the columns to its side. f32 products that are asked for
//!   in full take six passes of bf16. The utilisation is the part of the passes that is not padding.
//! - A DMA takes a latency and its bytes at the bandwidth. All DMAs that touch HBM share HBM's; others have one each.
//! - The copy into a double-buffered window begins with the step before the one that it is for; a step waits for its windows.
//!   A block that is written back leaves after its step, and nobody waits for it but the end of the kernel.
//!
//! Left out are spills, what the compiler overlaps (vector ops and MXU, above all), bank conflicts, and a second core: the times
//! show where a kernel waits, not how long it takes. Nothing of it was measured on a TPU.

use std::{
    collections::{BTreeMap, HashMap},
    io,
};

use serde::Serialize;
use serde_json::json;

use super::observer::{AccessEvent, BlockEvent, DmaEvent, MatmulEvent, Observer, OpEvent};
use crate::{chrome_trace::ChromeTrace, element::Element, mosaic::MemorySpace};

/// A chip's rates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// Cycles per second.
    pub clock: f64,
    /// Cycles that a DMA takes before its first byte arrives.
    pub dma_latency: f64,
    /// Bytes per cycle of one DMA.
    pub dma_bytes_per_cycle: f64,
    /// Bytes per cycle of all DMAs that touch HBM together.
    pub hbm_bytes_per_cycle: f64,
    /// Rows and columns of an MXU.
    pub mxu: usize,
    /// bf16 multiplications and additions per cycle.
    pub mxu_flop_per_cycle: f64,
}

/// Steps that are kept one by one.
const MOST_STEPS: usize = 10_000;
/// Spans that a timeline has.
const MOST_SPANS: usize = 200_000;

/// What was moved from one memory to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// `hbm`, `vmem`, `smem` or `registers`.
    pub from: &'static str,
    /// As `from`.
    pub to: &'static str,
    /// `pipeline`, `dma`, `load` or `store`.
    pub by: &'static str,
    /// How many copies.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What was multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Multiplied {
    /// Matrix products.
    pub products: u64,
    /// Their multiplications and additions.
    pub flops: u64,
    /// Passes of a tile of the right side, of the MXU's size, with all rows of the left.
    pub passes: u64,
    /// Cycles of the MXU.
    pub cycles: f64,
    /// The part of the passes that is not padding, from 0 to 1; `None` without passes.
    pub utilisation: Option<f64>,
}

/// What a run, or a step of it, did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Tally {
    /// Ops.
    pub ops: u64,
    /// Between which memories how much was moved.
    pub moved: Vec<Moved>,
    /// The MXU's part.
    pub multiplied: Multiplied,
    /// Cycles of the model's clock.
    pub cycles: f64,
    /// Of these, cycles that were spent waiting for DMAs and windows.
    pub waited: f64,
}

/// A grid step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Its position in the grid.
    pub at: Vec<usize>,
    /// What it did.
    #[serde(flatten)]
    pub tally: Tally,
}

/// All counts of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Counts {
    /// Of the model.
    pub rates: Rates,
    /// How many steps there were.
    pub grid_steps: u64,
    /// In all.
    pub total: Tally,
    /// Sizes of the kernel's own DMAs, and how many of each.
    pub dma_sizes: BTreeMap<u64, u64>,
    /// The first steps, one by one.
    pub steps: Vec<Step>,
}

/// Something that takes time, or a moment where it begins and ends at once.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// What happens.
    pub name: String,
    /// Cycles.
    pub from: f64,
    /// Cycles.
    pub to: f64,
}

/// A track of a timeline.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Track {
    /// What it shows.
    pub name: String,
    /// In the order in which they began.
    pub spans: Vec<Span>,
}

/// Sums while a run goes on.
#[derive(Default)]
struct Sum {
    ops: u64,
    moved: BTreeMap<(&'static str, &'static str, &'static str), (u64, u64)>,
    products: u64,
    flops: u64,
    passes: u64,
    padded_flops: u64,
    mxu_cycles: f64,
    waited: f64,
    began: f64,
}

impl Sum {
    fn add(&mut self, other: &Self) {
        self.ops += other.ops;
        for (&way, &(count, bytes)) in &other.moved {
            let moved = self.moved.entry(way).or_default();
            *moved = (moved.0 + count, moved.1 + bytes);
        }
        self.products += other.products;
        self.flops += other.flops;
        self.passes += other.passes;
        self.padded_flops += other.padded_flops;
        self.mxu_cycles += other.mxu_cycles;
        self.waited += other.waited;
    }

    fn tally(&self, until: f64) -> Tally {
        let moved = self.moved.iter().map(|(&(from, to, by), &(count, bytes))| Moved { from, to, by, count, bytes });
        let utilisation = (self.padded_flops > 0).then(|| self.flops as f64 / self.padded_flops as f64);
        let Self { ops, products, flops, passes, mxu_cycles: cycles, waited, .. } = *self;
        let multiplied = Multiplied { products, flops, passes, cycles, utilisation };
        Tally { ops, moved: moved.collect(), multiplied, cycles: until - self.began, waited }
    }
}

struct Flight {
    name: String,
    semaphore: String,
    from: f64,
    lands: f64,
}

/// An [`Observer`] that counts, and keeps a timeline.
pub struct Profile {
    rates: Rates,
    now: f64,
    /// When HBM has moved all that was asked for, and when it had at the start of this step and the one before.
    hbm_free: f64,
    hbm_free_at: [f64; 2],
    step_began: [f64; 2],
    /// When windows that were fetched ahead are there.
    ahead: f64,
    /// When all that was written back is there.
    written_back: f64,
    step: Option<Vec<usize>>,
    total: Sum,
    current: Sum,
    /// Steps of cores that wait for their turn, and since when.
    paused: Vec<(Vec<usize>, Sum, f64)>,
    steps: Vec<Step>,
    grid_steps: u64,
    dma_sizes: BTreeMap<u64, u64>,
    flights: HashMap<usize, Flight>,
    regions: Vec<(String, f64)>,
    /// What a vector op of the step took so far, to be drawn as one.
    vector: Option<(f64, u64)>,
    tracks: [Track; 7],
    /// Of DMAs that are over: semaphore, name, and when they began, landed and were waited for.
    over: Vec<(String, String, [f64; 3])>,
    spans: usize,
}

/// Tracks.
const STEPS: usize = 0;
const REGIONS: usize = 1;
const MXU: usize = 2;
const VECTOR: usize = 3;
const WAITS: usize = 4;
const IN: usize = 5;
const OUT: usize = 6;

fn memory(space: MemorySpace) -> &'static str {
    match space {
        MemorySpace::Any | MemorySpace::Hbm => "hbm",
        other => other.mnemonic(),
    }
}

impl Profile {
    /// A profile on a chip of these rates.
    pub fn new(rates: Rates) -> Self {
        let names = ["grid steps", "regions", "MXU", "vector ops", "waits", "windows in", "windows out"];
        Self {
            rates,
            now: 0.0,
            hbm_free: 0.0,
            hbm_free_at: [0.0; 2],
            step_began: [0.0; 2],
            ahead: 0.0,
            written_back: 0.0,
            step: None,
            total: Sum::default(),
            current: Sum::default(),
            paused: vec![],
            steps: vec![],
            grid_steps: 0,
            dma_sizes: BTreeMap::new(),
            flights: HashMap::new(),
            regions: vec![],
            vector: None,
            tracks: names.map(|name| Track { name: name.to_owned(), spans: vec![] }),
            over: vec![],
            spans: 0,
        }
    }

    /// Ends the last step. To be called once, after the run, be it that it faulted.
    pub fn finish(&mut self) {
        self.end_step();
        for (at, sum, since) in std::mem::take(&mut self.paused) {
            self.keep(at, &sum, since);
            self.total.add(&sum);
        }
        let name = "the last blocks to be written back";
        self.wait_until(self.written_back, name);
        self.total.add(&std::mem::take(&mut self.current));
        for flight in std::mem::take(&mut self.flights).into_values() {
            self.over.push((
                flight.semaphore,
                flight.name + ", never waited for",
                [flight.from, flight.lands, self.now],
            ));
        }
    }

    /// What was counted.
    pub fn counts(&self) -> Counts {
        Counts {
            rates: self.rates,
            grid_steps: self.grid_steps,
            total: self.total.tally(self.now),
            dma_sizes: self.dma_sizes.clone(),
            steps: self.steps.clone(),
        }
    }

    /// The tracks, times in cycles, those of the kernel's own DMAs last: from start to landing, by semaphore.
    pub fn tracks(&self) -> Vec<Track> {
        let mut by_semaphore: BTreeMap<&str, Vec<Span>> = BTreeMap::new();
        for (semaphore, name, [from, lands, _]) in &self.over {
            let span = Span { name: name.clone(), from: *from, to: *lands };
            by_semaphore.entry(semaphore).or_default().push(span);
        }
        let dmas = by_semaphore.into_iter().map(|(name, mut spans)| {
            spans.sort_by(|a, b| a.from.total_cmp(&b.from));
            Track { name: format!("DMA {name}"), spans }
        });
        let own = self.tracks.iter().filter(|track| !track.spans.is_empty()).cloned();
        own.chain(dmas).collect()
    }

    /// Writes the timeline in Chrome's format; a microsecond of it is one of the model's clock.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn write(&self, kernel: &str, to: impl io::Write) -> io::Result<()> {
        let us = |cycles: f64| cycles / self.rates.clock * 1e6;
        let names: Vec<&str> = self.tracks.iter().map(|track| track.name.as_str()).collect();
        let tracks = names.iter().enumerate().map(|(at, name)| (at as u32, *name));
        let mut trace = ChromeTrace::new(to, &format!("{kernel} (a model's clock: rates alone)"), tracks)?;
        for (at, track) in self.tracks.iter().enumerate() {
            for Span { name, from, to } in &track.spans {
                trace.span(at as u32, name, &track.name, us(*from), us(to - from), json!({ "cycles": to - from }))?;
            }
        }
        for (id, (semaphore, name, [from, lands, waited])) in self.over.iter().enumerate() {
            let category = format!("DMA on {semaphore}");
            let mut phase = |phase: &str, at: f64, args: serde_json::Value| {
                trace.event(json!({ "name": name, "cat": category, "ph": phase, "id": id, "ts": us(at), "pid": 1, "tid": WAITS, "args": args }))
            };
            phase("b", *from, json!({ "semaphore": semaphore }))?;
            phase("n", *lands, json!({ "landed": true }))?;
            phase("e", waited.max(*lands), json!({ "waited_for": true }))?;
        }
        if self.spans >= MOST_SPANS {
            let name = format!("only the first {MOST_SPANS} spans are drawn");
            trace.instant(STEPS as u32, &name, us(self.now), json!({}))?;
        }
        trace.finish()
    }

    fn draw(&mut self, track: usize, name: impl FnOnce() -> String, from: f64, to: f64) {
        if self.spans < MOST_SPANS {
            self.spans += 1;
            self.tracks[track].spans.push(Span { name: name(), from, to });
        }
    }

    fn end_vector(&mut self) {
        if let Some((from, ops)) = self.vector.take() {
            let now = self.now;
            self.draw(VECTOR, || format!("{ops} vector ops"), from, now);
        }
    }

    fn end_step(&mut self) {
        self.end_vector();
        let Some(at) = self.step.take() else { return };
        let (began, now) = (self.step_began[0], self.now);
        self.draw(STEPS, || format!("step {at:?}"), began, now);
        let current = std::mem::take(&mut self.current);
        self.keep(at, &current, now);
        self.total.add(&current);
        self.current.began = now;
    }

    fn keep(&mut self, at: Vec<usize>, sum: &Sum, now: f64) {
        if self.steps.len() < MOST_STEPS {
            self.steps.push(Step { at, tally: sum.tally(now) });
        }
    }

    fn wait_until(&mut self, ready: f64, name: &str) {
        self.end_vector();
        if ready > self.now {
            let now = self.now;
            self.draw(WAITS, || name.to_owned(), now, ready);
            self.current.waited += ready - now;
            self.now = ready;
        }
    }

    /// When bytes that are asked for at `asked` are there, and when they begin to move.
    fn transfer(&mut self, asked: f64, free: f64, bytes: u64, of_hbm: bool) -> (f64, f64) {
        let Rates { dma_latency, dma_bytes_per_cycle, hbm_bytes_per_cycle, .. } = self.rates;
        let begins = if of_hbm { asked.max(free) } else { asked };
        if of_hbm {
            self.hbm_free = self.hbm_free.max(begins) + bytes as f64 / hbm_bytes_per_cycle;
        }
        (begins, begins + dma_latency + bytes as f64 / dma_bytes_per_cycle)
    }

    fn moved(&mut self, from: &'static str, to: &'static str, by: &'static str, bytes: u64) {
        let moved = self.current.moved.entry((from, to, by)).or_default();
        *moved = (moved.0 + 1, moved.1 + bytes);
    }
}

impl Observer for Profile {
    fn step(&mut self, at: &[usize]) {
        self.end_step();
        self.step_began = [self.now, self.step_began[0]];
        self.hbm_free_at = [self.hbm_free, self.hbm_free_at[0]];
        self.grid_steps += 1;
        self.step = Some(at.to_vec());
        let ahead = std::mem::take(&mut self.ahead);
        self.wait_until(ahead, "windows of this step");
    }

    fn pause(&mut self) {
        self.end_vector();
        if let Some(at) = self.step.take() {
            let (began, now) = (self.step_began[0], self.now);
            self.draw(STEPS, || format!("step {at:?}"), began, now);
            self.paused.push((at, std::mem::take(&mut self.current), now));
        }
    }

    fn resume(&mut self, at: &[usize]) {
        let now = self.now;
        if let Some(known) = self.paused.iter().position(|(paused, ..)| paused == at) {
            let (at, sum, since) = self.paused.remove(known);
            // What it waited for its turn is not its time.
            self.current = Sum { began: sum.began + now - since, ..sum };
            self.step = Some(at);
            self.step_began[0] = now;
        }
    }

    fn op(&mut self, op: &OpEvent) {
        self.current.ops += 1;
        let registers = op.elements.div_ceil(1024);
        if op.elements > 1 && op.op != "tpu.matmul" {
            let (_, ops) = self.vector.get_or_insert((self.now, 0));
            *ops += 1;
            self.now += registers as f64;
        }
    }

    fn access(&mut self, access: &AccessEvent) {
        let space = memory(access.side.space);
        match access.write {
            true => self.moved("registers", space, "store", access.bytes),
            false => self.moved(space, "registers", "load", access.bytes),
        }
        // A store has no result that would count.
        if access.write && access.side.space == MemorySpace::Vmem {
            let (_, ops) = self.vector.get_or_insert((self.now, 0));
            *ops += 1;
            self.now += access.bytes.div_ceil(4096) as f64;
        }
    }

    fn matmul(&mut self, matmul: &MatmulEvent) {
        self.end_vector();
        let MatmulEvent { batch, m, n, k, lhs, rhs, exact } = *matmul;
        let side = self.rates.mxu;
        let tiles = (batch * k.div_ceil(side) * n.div_ceil(side)) as u64;
        let factor = if exact { 6 } else { 1 };
        let padded = 2 * tiles * (m.next_multiple_of(8) * side * side) as u64;
        let cycles = (factor * padded) as f64 / self.rates.mxu_flop_per_cycle;
        self.current.products += 1;
        self.current.flops += 2 * (batch * m * n * k) as u64;
        self.current.passes += factor * tiles;
        self.current.padded_flops += padded;
        self.current.mxu_cycles += cycles;
        let now = self.now;
        let of = |element: Element| element.to_string();
        let times = if batch > 1 { format!("{batch} x ") } else { String::new() };
        self.draw(MXU, || format!("{times}{}[{m},{k}] x {}[{k},{n}]", of(lhs), of(rhs)), now, now + cycles);
        self.now += cycles;
    }

    fn region_start(&mut self, name: &str) {
        self.end_vector();
        self.regions.push((name.to_owned(), self.now));
    }

    fn region_stop(&mut self) {
        self.end_vector();
        if let Some((name, from)) = self.regions.pop() {
            let now = self.now;
            self.draw(REGIONS, || name, from, now);
        }
    }

    fn block(&mut self, block: &BlockEvent) {
        let BlockEvent { array, index, bytes, written_back, from, to, double_buffered, ahead } = *block;
        self.moved(memory(from.space), memory(to.space), "pipeline", bytes);
        let name = move || format!("{array} {index:?}");
        if written_back {
            self.end_vector();
            let (begins, lands) = self.transfer(self.now, self.hbm_free, bytes, true);
            self.written_back = self.written_back.max(lands);
            self.draw(OUT, name, begins, lands);
            return;
        }
        if ahead {
            let (begins, lands) = self.transfer(self.now, self.hbm_free, bytes, true);
            self.ahead = self.ahead.max(lands);
            self.draw(IN, name, begins, lands);
            return;
        }
        // With two buffers it was asked for when the step before began; the machine may copy it later.
        let early = double_buffered && self.grid_steps > 1;
        let (asked, free) = if early { (self.step_began[1], self.hbm_free_at[1]) } else { (self.now, self.hbm_free) };
        let (begins, lands) = self.transfer(asked, free, bytes, true);
        self.draw(IN, name, begins, lands);
        self.wait_until(lands, "windows of this step");
    }

    fn dma_start(&mut self, dma: &DmaEvent) {
        self.end_vector();
        let (from, to, bytes) = (memory(dma.from.space), memory(dma.to.space), dma.bytes as u64);
        self.moved(from, to, "dma", bytes);
        *self.dma_sizes.entry(bytes).or_default() += 1;
        let (_, lands) = self.transfer(self.now, self.hbm_free, bytes, from == "hbm" || to == "hbm");
        let flight = Flight {
            name: format!("{} -> {}, {bytes} bytes", dma.from, dma.to),
            semaphore: format!("{}[{}]", dma.semaphore.0, dma.semaphore.1),
            from: self.now,
            lands,
        };
        self.flights.insert(dma.id, flight);
    }

    fn dma_wait(&mut self, id: usize) {
        let Some(Flight { name, semaphore, from, lands }) = self.flights.remove(&id) else { return };
        self.wait_until(lands, &name);
        if self.spans < MOST_SPANS {
            self.spans += 1;
            let now = self.now;
            self.over.push((semaphore, name, [from, lands, now]));
        }
    }
}
