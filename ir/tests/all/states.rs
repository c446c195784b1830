//! The tables of states in the module docs of the tile machine, written down a second time, and random kernels that must
//! end as they say: with the same fault at the same op, or none.

use std::{collections::BTreeMap, fmt::Write as _};

use pagoda_ir::{
    Context, Element, HostTensor, TensorType,
    mosaic::text,
    random::SplitMix64,
    tile_machine::{DmaOrder, FaultKind, Machine, Program},
};

const ROWS: usize = 4;
/// The buffers: an input and an output in HBM, two of VMEM. An element is a row.
const NAMES: [&str; 4] = ["x", "out", "a", "b"];
const SPACES: [&str; 4] = ["hbm", "hbm", "vmem", "vmem"];
const SEMAPHORES: usize = 2;

/// Some rows of a buffer.
#[derive(Clone, Copy, Debug)]
struct Rows {
    buffer: usize,
    from: usize,
    count: usize,
}

impl Rows {
    fn random(random: &mut SplitMix64, buffers: std::ops::Range<usize>) -> Self {
        let from = random.below(ROWS);
        let buffer = buffers.start + random.below(buffers.len());
        Self { buffer, from, count: 1 + random.below(ROWS - from) }
    }

    fn each(self) -> impl Iterator<Item = (usize, usize)> {
        (self.from..self.from + self.count).map(move |row| (self.buffer, row))
    }
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Load(Rows),
    Store(Rows),
    Start { source: Rows, destination: Rows, semaphore: usize },
    Wait { rows: Rows, semaphore: usize },
}

/// Events of a kernel that is more often sensible than not: it begins with written buffers, and waits for what it started.
fn events(random: &mut SplitMix64) -> Vec<Event> {
    let mut started: Vec<(Rows, usize)> = vec![];
    let mut events = vec![];
    for buffer in (2..4).filter(|_| random.below(8) > 0).collect::<Vec<_>>() {
        events.push(Event::Store(Rows { buffer, from: 0, count: ROWS }));
    }
    if random.below(4) > 0 {
        let [source, destination] = [2, 1].map(|buffer| Rows { buffer, from: 0, count: ROWS });
        events.push(Event::Start { source, destination, semaphore: 0 });
        events.push(Event::Wait { rows: destination, semaphore: 0 });
    }
    for _ in 0..2 + random.below(10) {
        events.push(match random.below(16) {
            0..=2 => Event::Load(Rows::random(random, 2..4)),
            3..=5 => Event::Store(Rows::random(random, 2..4)),
            6 if random.below(4) == 0 => {
                Event::Wait { rows: Rows::random(random, 2..4), semaphore: random.below(SEMAPHORES) }
            }
            7..=9 if !started.is_empty() => {
                let (rows, semaphore) = started.remove(random.below(started.len()));
                Event::Wait { rows, semaphore }
            }
            _ => {
                let destination = Rows::random(random, 1..4);
                let from_input = destination.buffer != 1 && random.below(2) == 0;
                let source = Rows::random(random, if from_input { 0..1 } else { 2..4 });
                let count = source.count.min(destination.count);
                let (source, destination) = (Rows { count, ..source }, Rows { count, ..destination });
                let semaphore = random.below(SEMAPHORES);
                started.push((destination, semaphore));
                Event::Start { source, destination, semaphore }
            }
        });
        if random.below(3) > 0
            && let Some((rows, semaphore)) = started.pop()
        {
            events.push(Event::Wait { rows, semaphore });
        }
    }
    started.retain(|_| random.below(8) > 0);
    events.extend(started.into_iter().map(|(rows, semaphore)| Event::Wait { rows, semaphore }));
    events
}

/// The kernel, an event on each line; events begin at line [`FIRST_LINE`].
fn kernel(events: &[Event]) -> String {
    let full = |buffer: usize| format!("memref<{ROWS}x128xf32, \"{}\">", SPACES[buffer]);
    let semaphore = "memref<!tpu.dma_semaphore, \"semaphore_mem\">";
    let arguments: Vec<_> = (0..4).map(|buffer| format!("%{}: {}", NAMES[buffer], full(buffer))).collect();
    let mut text = format!("func.func @k({}, %s0: {semaphore}, %s1: {semaphore})", arguments.join(", "));
    text +=
        " attributes {scratch_operands = 4 : i64} {\n  %c = arith.constant 0 : index  %z = arith.constant 0 : i32\n";
    for row in 0..ROWS {
        let _ = write!(text, "  %i{row} = arith.constant {row} : index  %j{row} = arith.constant {row} : i32");
    }
    text += "\n";
    let slice = |text: &mut String, name: &str, rows: Rows| {
        let ty = format!("memref<{}x128xf32, \"{}\">", rows.count, SPACES[rows.buffer]);
        let (from, whole) = (rows.from, full(rows.buffer));
        let _ = write!(
            text,
            "  %{name} = \"tpu.memref_slice\"(%{}, %j{from}, %z) : ({whole}, i32, i32) -> {ty}",
            NAMES[rows.buffer]
        );
        ty
    };
    for (at, event) in events.iter().enumerate() {
        match *event {
            Event::Load(rows) => {
                let (name, ty) = (NAMES[rows.buffer], full(rows.buffer));
                let tile = format!("vector<{}x128xf32>", rows.count);
                let _ = write!(text, "  %v{at} = vector.load %{name}[%i{}, %c] : {ty}, {tile}", rows.from);
                // A load that nobody uses is dropped: this one goes back where it came from.
                let _ = write!(text, "  vector.store %v{at}, %{name}[%i{}, %c] : {ty}, {tile}", rows.from);
            }
            Event::Store(rows) => {
                let (name, ty) = (NAMES[rows.buffer], full(rows.buffer));
                let tile = format!("vector<{}x128xf32>", rows.count);
                let _ = write!(text, "  %v{at} = arith.constant dense<1.0> : {tile}");
                let _ = write!(text, "  vector.store %v{at}, %{name}[%i{}, %c] : {ty}, {tile}", rows.from);
            }
            Event::Start { source, destination, semaphore: number } => {
                let (from, to) = (format!("f{at}"), format!("t{at}"));
                let types = [slice(&mut text, &from, source), slice(&mut text, &to, destination)].join(", ");
                let _ =
                    write!(text, "  \"tpu.enqueue_dma\"(%{from}, %{to}, %s{number}) : ({types}, {semaphore}) -> ()");
            }
            Event::Wait { rows, semaphore: number } => {
                let ty = slice(&mut text, &format!("w{at}"), rows);
                let _ = write!(text, "  \"tpu.wait_dma\"(%s{number}, %w{at}) : ({semaphore}, {ty}) -> ()");
            }
        }
        text += "\n";
    }
    text + "  return\n}\n"
}

const FIRST_LINE: usize = 4;

/// What a store writes, and what a row of the input holds.
const STORED: usize = 1;
fn row_of_input(row: usize) -> usize {
    row + 2
}

#[derive(Debug, Default)]
struct Dma {
    source: Vec<(usize, usize)>,
    destination: Vec<(usize, usize)>,
    /// What it brings.
    brings: Vec<usize>,
    semaphore: usize,
    landed: bool,
    over: bool,
}

/// The tables.
struct Model {
    early: bool,
    written: BTreeMap<(usize, usize), bool>,
    /// What each element holds that was written.
    values: BTreeMap<(usize, usize), usize>,
    dmas: Vec<Dma>,
    /// In order of landing.
    landed: [Vec<usize>; SEMAPHORES],
    /// Rows that landed and were not waited for; rows waited for that do not make up a DMA yet.
    value: [usize; SEMAPHORES],
    credit: [usize; SEMAPHORES],
}

impl Model {
    fn new(early: bool) -> Self {
        let rows = (0..4).flat_map(|buffer| (0..ROWS).map(move |row| ((buffer, row), buffer == 0)));
        Self {
            early,
            written: rows.collect(),
            values: (0..ROWS).map(|row| ((0, row), row_of_input(row))).collect(),
            dmas: vec![],
            landed: Default::default(),
            value: [0; SEMAPHORES],
            credit: [0; SEMAPHORES],
        }
    }

    fn held(&self, element: (usize, usize)) -> bool {
        self.dmas.iter().any(|dma| !dma.over && dma.source.contains(&element))
    }

    fn landing(&self, element: (usize, usize)) -> bool {
        self.dmas.iter().any(|dma| !dma.over && dma.destination.contains(&element))
    }

    fn read(&self, rows: Rows) -> Result<(), FaultKind> {
        if rows.each().any(|element| self.landing(element)) { Err(FaultKind::ReadInFlight) } else { Ok(()) }
    }

    fn overwrite(&self, rows: Rows) -> Result<(), FaultKind> {
        let in_flight = rows.each().any(|element| self.landing(element) || self.held(element));
        if in_flight { Err(FaultKind::OverwriteInFlight) } else { Ok(()) }
    }

    /// A DMA to `rows`: what goes there already may bring the same.
    fn land_on(&self, rows: Rows, brings: &[usize]) -> Result<(), FaultKind> {
        let to: Vec<_> = rows.each().collect();
        let differs = |dma: &&Dma| dma.destination != to || dma.brings != brings;
        let lands =
            |element| self.dmas.iter().filter(differs).any(|dma| !dma.over && dma.destination.contains(&element));
        let in_flight = to.iter().any(|&element| lands(element) || self.held(element));
        if in_flight { Err(FaultKind::OverwriteInFlight) } else { Ok(()) }
    }

    fn is_written(&self, rows: Rows) -> Result<(), FaultKind> {
        if rows.each().all(|element| self.written[&element]) { Ok(()) } else { Err(FaultKind::UnwrittenRead) }
    }

    fn land(&mut self, number: usize) {
        let dma = &mut self.dmas[number];
        dma.landed = true;
        self.landed[dma.semaphore].push(number);
        self.value[dma.semaphore] += dma.destination.len();
    }

    fn happens(&mut self, event: Event) -> Result<(), FaultKind> {
        match event {
            Event::Load(rows) => {
                self.read(rows)?;
                self.is_written(rows)?;
                self.overwrite(rows)
            }
            Event::Store(rows) => {
                self.overwrite(rows)?;
                self.written.extend(rows.each().map(|element| (element, true)));
                self.values.extend(rows.each().map(|element| (element, STORED)));
                Ok(())
            }
            Event::Start { source, destination, semaphore } => {
                self.read(source)?;
                let brings: Vec<_> =
                    source.each().map(|element| self.values.get(&element).copied().unwrap_or_default()).collect();
                self.land_on(destination, &brings)?;
                self.is_written(source)?;
                if destination.each().any(|element| source.each().any(|held| held == element)) {
                    return Err(FaultKind::OverwriteInFlight);
                }
                let (source, destination) = (source.each().collect(), destination.each().collect());
                self.dmas.push(Dma { source, destination, brings, semaphore, ..Dma::default() });
                if self.early {
                    self.land(self.dmas.len() - 1);
                }
                Ok(())
            }
            Event::Wait { rows, semaphore } => {
                while self.value[semaphore] < rows.count {
                    let next = self.dmas.iter().position(|dma| !dma.landed && dma.semaphore == semaphore);
                    self.land(next.ok_or(FaultKind::Deadlock)?);
                }
                self.value[semaphore] -= rows.count;
                self.credit[semaphore] += rows.count;
                while let Some(&first) = self.landed[semaphore].first()
                    && self.dmas[first].destination.len() <= self.credit[semaphore]
                {
                    let destination = std::mem::take(&mut self.dmas[first].destination);
                    self.credit[semaphore] -= destination.len();
                    self.landed[semaphore].remove(0);
                    self.dmas[first].over = true;
                    self.written.extend(destination.iter().map(|&element| (element, true)));
                    self.values.extend(destination.into_iter().zip(self.dmas[first].brings.clone()));
                }
                Ok(())
            }
        }
    }

    fn ends(&self) -> Result<(), FaultKind> {
        if self.dmas.iter().any(|dma| !dma.over) || self.value != [0; SEMAPHORES] {
            return Err(FaultKind::SemaphoreUnbalanced);
        }
        self.is_written(Rows { buffer: 1, from: 0, count: ROWS }).map_err(|_| FaultKind::OutputNeverWritten)
    }
}

/// The fault that the tables say, and the event, `None` for the end of the kernel.
fn expected(events: &[Event], early: bool) -> Option<(FaultKind, Option<usize>)> {
    let mut model = Model::new(early);
    for (at, &event) in events.iter().enumerate() {
        if let Err(kind) = model.happens(event) {
            return Some((kind, Some(at)));
        }
    }
    model.ends().err().map(|kind| (kind, None))
}

#[test]
fn random_kernels_end_as_the_tables_say() {
    let context = Context::new();
    let mut random = SplitMix64::new(11);
    let input: Vec<f64> = (0..ROWS * 128).map(|at| row_of_input(at / 128) as f64).collect();
    let inputs = [HostTensor::from_f64(Element::F32, &[ROWS, 128], &input)];
    let outputs = [TensorType::new(Element::F32, &[ROWS, 128])];
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for case in 0..1000 {
        let events = events(&mut random);
        let text = kernel(&events);
        let module = text::parse(&context, &text, "k.mlir").unwrap_or_else(|error| panic!("{error}\n{text}"));
        let program = Program::decode(&module).unwrap_or_else(|error| panic!("{error}\n{text}"));
        for (dma, early) in [(DmaOrder::Early, true), (DmaOrder::Late, false)] {
            let fault = program.run(&Machine { dma, ..Machine::default() }, &inputs, &outputs).err();
            let expected = expected(&events, early);
            *seen.entry(expected.map_or("none".into(), |(kind, _)| format!("{kind:?}"))).or_default() += 1;
            let kind = fault.as_ref().map(|fault| fault.kind);
            assert_eq!(kind, expected.map(|(kind, _)| kind), "case {case}, {dma:?}: {fault:?}\n{text}");
            if let (Some(fault), Some((_, Some(at)))) = (fault, expected) {
                assert_eq!(
                    fault.location,
                    format!("k.mlir:{}", FIRST_LINE + at),
                    "case {case}, {dma:?}: {fault}\n{text}"
                );
            }
        }
    }
    // Every row of the table that a kernel's own ops can meet, many times.
    for outcome in ["ReadInFlight", "OverwriteInFlight", "UnwrittenRead", "Deadlock", "SemaphoreUnbalanced"] {
        assert!(seen.get(outcome).is_some_and(|&count| count >= 20), "{outcome}: {seen:?}");
    }
    assert!(seen.contains_key("OutputNeverWritten") && seen.contains_key("none"), "{seen:?}");
}
