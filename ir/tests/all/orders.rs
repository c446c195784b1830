//! What orders the accesses of cores, written down a second time: random kernels of several subcores that race exactly where two
//! accesses to a row that they share are ordered neither way.
//!
//! A kernel is drawn as one sequence of events of all its cores, which is how it could run: so nothing waits in vain. Every
//! pair of cores has a semaphore of its own for each direction; the nth wait on it is after the nth signal, whatever the rest.

use std::{collections::BTreeMap, fmt::Write as _};

use pagoda_ir::{
    Context, Element, HostTensor, TensorType,
    mosaic::text,
    random::SplitMix64,
    tile_machine::{DmaOrder, FaultKind, Machine, Program},
};

const CORES: usize = 3;
const ROWS: usize = 3;
/// Events of a core that may bring a row, each to a place of its own.
const PLACES: usize = 16;

#[derive(Clone, Copy, Debug)]
enum Event {
    /// A DMA of a shared row, from or to it, begins; its number among those of its core.
    Start {
        row: usize,
        writes: bool,
        number: usize,
    },
    Wait {
        number: usize,
    },
    Signal {
        to: usize,
    },
    Await {
        from: usize,
    },
    /// All cores are at the barrier.
    Barrier,
}

/// Events and whose they are; the barrier is everybody's.
fn events(random: &mut SplitMix64) -> Vec<(usize, Event)> {
    let mut events = vec![];
    let mut flying: [Vec<(usize, usize, bool)>; CORES] = Default::default();
    let mut started = [0; CORES];
    let mut signals = [[0_usize; CORES]; CORES];
    // Every row is written before anybody reads it.
    for row in 0..ROWS {
        events.extend([(0, Event::Start { row, writes: true, number: row }), (0, Event::Wait { number: row })]);
    }
    started[0] = ROWS;
    events.push((0, Event::Barrier));
    let wait = |events: &mut Vec<_>, flying: &mut [Vec<(usize, usize, bool)>; CORES], core: usize, at: usize| {
        let (number, ..) = flying[core].remove(at);
        events.push((core, Event::Wait { number }));
    };
    for _ in 0..8 + random.below(24) {
        let core = random.below(CORES);
        match random.below(10) {
            0..4 if started[core] < PLACES => {
                let (row, writes) = (random.below(ROWS), random.below(2) == 0);
                // A core's own DMAs do not meet: that is another table.
                if flying[core].iter().any(|&(_, other, other_writes)| other == row && (writes || other_writes)) {
                    continue;
                }
                let number = started[core];
                started[core] += 1;
                events.push((core, Event::Start { row, writes, number }));
                flying[core].push((number, row, writes));
                if random.below(3) > 0 {
                    let last = flying[core].len() - 1;
                    wait(&mut events, &mut flying, core, last);
                }
            }
            4 | 5 if !flying[core].is_empty() => {
                let at = random.below(flying[core].len());
                wait(&mut events, &mut flying, core, at);
            }
            6 | 7 => {
                let to = (core + 1 + random.below(CORES - 1)) % CORES;
                signals[core][to] += 1;
                events.push((core, Event::Signal { to }));
            }
            8 => {
                if let Some(from) = (0..CORES).find(|&from| signals[from][core] > 0) {
                    signals[from][core] -= 1;
                    events.push((core, Event::Await { from }));
                }
            }
            9 if random.below(3) == 0 => events.push((0, Event::Barrier)),
            _ => {}
        }
    }
    for core in 0..CORES {
        while !flying[core].is_empty() {
            wait(&mut events, &mut flying, core, 0);
        }
        for (from, sent) in signals.iter_mut().enumerate() {
            events.extend((0..std::mem::take(&mut sent[core])).map(|_| (core, Event::Await { from })));
        }
    }
    events
}

/// An access to a row, of a core: what its core knew when it began, and its core's event that ends it.
struct Access {
    core: usize,
    row: usize,
    writes: bool,
    known: [usize; CORES],
    end: usize,
}

/// Whether two accesses race.
fn races(events: &[(usize, Event)]) -> bool {
    let mut known = [[0_usize; CORES]; CORES];
    let mut sent: BTreeMap<(usize, usize), Vec<[usize; CORES]>> = BTreeMap::new();
    let mut accesses: Vec<(Access, usize)> = vec![];
    for &(core, event) in events {
        if let Event::Barrier = event {
            let all: [usize; CORES] = std::array::from_fn(|at| known.iter().map(|clock| clock[at]).max().unwrap());
            known = [all; CORES];
            continue;
        }
        known[core][core] += 1;
        match event {
            Event::Start { row, writes, number } => {
                accesses.push((Access { core, row, writes, known: known[core], end: usize::MAX }, number));
            }
            Event::Wait { number } => {
                let (access, _) = accesses.iter_mut().find(|(one, of)| (one.core, *of) == (core, number)).unwrap();
                access.end = known[core][core];
            }
            Event::Signal { to } => sent.entry((core, to)).or_default().push(known[core]),
            Event::Await { from } => {
                let clock = sent.get_mut(&(from, core)).unwrap().remove(0);
                known[core] = std::array::from_fn(|at| known[core][at].max(clock[at]));
            }
            Event::Barrier => unreachable!(),
        }
    }
    let before = |a: &Access, b: &Access| b.known[a.core] >= a.end;
    accesses.iter().enumerate().any(|(at, (a, _))| {
        accesses[at + 1..].iter().any(|(b, _)| {
            a.core != b.core && a.row == b.row && (a.writes || b.writes) && !before(a, b) && !before(b, a)
        })
    })
}

fn kernel(events: &[(usize, Event)]) -> String {
    let mut text = format!(
        "!rows = memref<{ROWS}x8xi32, \"vmem_shared\">\n!row = memref<1x8xi32, \"vmem_shared\">\n\
         !own = memref<{PLACES}x8xi32, \"vmem\">\n!place = memref<1x8xi32, \"vmem\">\n\
         !dmas = memref<{PLACES}x!tpu.dma_semaphore, \"semaphore_mem\">\n\
         !dma = memref<!tpu.dma_semaphore, \"semaphore_mem\">\n\
         !sems = memref<{CORES}x!tpu.semaphore, \"semaphore_mem\">\n!sem = memref<!tpu.semaphore, \"semaphore_mem\">\n\
         func.func @k(%core: i32, %me: i32, %o: memref<1x8xi32, \"hbm\">, %rows: !rows, %own: !own, %dmas: !dmas, %sems: !sems) \
         attributes {{iteration_bounds = array<i64: 1, {CORES}>, dimension_semantics = \
         [#tpu.dimension_semantics<core_parallel>, #tpu.dimension_semantics<subcore_parallel>], scratch_operands = 4 : i64, \
         tpu.core_type = #tpu.core_type<sc_vector_subcore>}} {{\n%b = arith.constant 0 : index\n\
         %ones = arith.constant dense<1> : vector<{PLACES}x8xi32>\n\
         \"tpu.vector_store\"(%ones, %own, %b, %b) {{strides = array<i32>}} : (vector<{PLACES}x8xi32>, !own, index, index) -> ()\n"
    );
    for number in 0..PLACES {
        let _ = writeln!(text, "%c{number} = arith.constant {number} : i32");
    }
    for core in 0..CORES {
        let _ = writeln!(text, "%is{core} = arith.cmpi eq, %me, %c{core} : i32\nscf.if %is{core} {{");
        let slice = |text: &mut String, of: &str, at: usize, types: [&str; 2], name: &str| {
            let [from, to] = types;
            let _ = writeln!(
                text,
                "%{name} = \"tpu.memref_slice\"(%{of}, %c{at}, %c0) {{operandSegmentSizes = array<i32: 1, 2, 0>}} : ({from}, i32, \
                 i32) -> {to}"
            );
        };
        let semaphore = |text: &mut String, of: &str, at: usize, kind: &str, name: &str| {
            let element = if kind == "!dma" { "!tpu.dma_semaphore" } else { "!tpu.semaphore" };
            let one = format!("memref<1x{element}, \"semaphore_mem\">");
            let _ = writeln!(
                text,
                "%{name}s = \"tpu.memref_slice\"(%{of}, %c{at}) {{operandSegmentSizes = array<i32: 1, 1, 0>}} : ({kind}s, i32) -> \
                 {one}\n%{name} = \"tpu.memref_squeeze\"(%{name}s) : ({one}) -> {kind}"
            );
        };
        let mut sides = BTreeMap::new();
        for (at, &(of, event)) in events.iter().enumerate() {
            match event {
                Event::Barrier => text += "\"tpu.barrier\"(%b) : (index) -> ()\n",
                _ if of != core => {}
                Event::Start { row, writes, number } => {
                    slice(&mut text, "rows", row, ["!rows", "!row"], &format!("r{at}"));
                    slice(&mut text, "own", number, ["!own", "!place"], &format!("p{at}"));
                    semaphore(&mut text, "dmas", number, "!dma", &format!("d{at}"));
                    let [from, to] =
                        if writes { [("p", "!place"), ("r", "!row")] } else { [("r", "!row"), ("p", "!place")] };
                    let (types, ends) = (format!("{}, {}", from.1, to.1), format!("%{}{at}, %{}{at}", from.0, to.0));
                    let _ = writeln!(text, "\"tpu.enqueue_dma\"({ends}, %d{at}) : ({types}, !dma) -> ()");
                    sides.insert(number, format!("\"tpu.wait_dma2\"(%d{at}, {ends}) : (!dma, {types}) -> ()\n"));
                }
                Event::Wait { number } => text += &sides[&number],
                Event::Signal { to } => {
                    semaphore(&mut text, "sems", core, "!sem", &format!("s{at}"));
                    let _ = writeln!(
                        text,
                        "\"tpu.sem_signal\"(%s{at}, %c1, %c{to}) {{operandSegmentSizes = array<i32: 1, 1, 0, 0, 1>}} : (!sem, i32, \
                         i32) -> ()"
                    );
                }
                Event::Await { from } => {
                    semaphore(&mut text, "sems", from, "!sem", &format!("s{at}"));
                    let _ = writeln!(text, "\"tpu.sem_wait\"(%s{at}, %c1) : (!sem, i32) -> ()");
                }
            }
        }
        text += "}\n";
    }
    text + "return\n}\n"
}

#[test]
fn cores_race_where_nothing_orders_them() {
    let (context, mut random) = (Context::new(), SplitMix64::new(5));
    let outputs = [TensorType::new(Element::I32, &[1, 8])];
    let inputs: [HostTensor; 0] = [];
    let mut seen = [0; 2];
    for case in 0..300 {
        let events = events(&mut random);
        let text = kernel(&events);
        let module = text::parse(&context, &text, "k.mlir").unwrap_or_else(|error| panic!("{error}\n{text}"));
        let program = Program::decode(&module).unwrap_or_else(|error| panic!("{error}\n{text}"));
        let expected = races(&events).then_some(FaultKind::ParallelOverlap);
        seen[usize::from(expected.is_some())] += 1;
        for dma in [DmaOrder::Early, DmaOrder::Late, DmaOrder::Random(case), DmaOrder::Random(1000 + case)] {
            let machine = Machine { dma, allow_unwritten_outputs: true, ..Machine::default() };
            let fault = program.run(&machine, &inputs, &outputs).err();
            let kind = fault.as_ref().map(|fault| fault.kind);
            assert_eq!(kind, expected, "case {case}, {dma:?}: {fault:?}\n{events:?}\n{text}");
        }
    }
    assert!(seen.iter().all(|&count| count >= 30), "{seen:?}");
}
