//! What an observer sees of a run, and the trace that it makes of it.

use pagoda_ir::{
    Context, Element, HostTensor, TensorType,
    mosaic::{self, MemorySpace, Semantics, Window},
    tile_machine::{Cell, DmaOrder, Machine, Observer, Program, Trace},
};
use serde_json::Value as Json;

/// Two steps; the second starts a DMA, reads something else, and waits.
fn program(context: &Context) -> (Program, Vec<pagoda_ir::TensorType>) {
    let kernel = mosaic::kernel(context, "k", |k| {
        let [step] = k.grid([(2, Semantics::Arbitrary)]);
        let x = k.hbm_input("x", Element::F32, &[8, 128]);
        let y = k.input("y", Element::F32, &[16, 128], Window::blocks(&[8, 128], |t| (t.grid(0), 0)));
        let out = k.output("out", Element::F32, &[16, 128], Window::blocks(&[8, 128], |t| (t.grid(0), 0)));
        let buffer = k.scratch("buffer", MemorySpace::Vmem, Element::F32, &[8, 128]);
        let semaphore = k.dma_semaphores("semaphore", &[]);
        out.store(y.load());
        k.when(step.equals(1), || {
            let copy = k.async_copy(x, buffer.clone(), semaphore);
            let sum = y.load() + 1.0;
            copy.wait();
            out.store(buffer.load() + sum);
        });
    })
    .unwrap();
    (Program::decode(kernel.module()).unwrap(), kernel.outputs())
}

fn inputs() -> [HostTensor; 2] {
    [HostTensor::zeros(Element::F32, &[8, 128]), HostTensor::zeros(Element::F32, &[16, 128])]
}

#[test]
fn a_dma_starts_lands_and_is_waited_for() {
    #[derive(Default)]
    struct Log(Vec<String>);
    impl Observer for Log {
        fn dma_start(&mut self, dma: &pagoda_ir::tile_machine::DmaEvent) {
            self.0.push(format!("start {} from {} to {}, {} bytes", dma.id, dma.from, dma.to, dma.bytes));
        }
        fn dma_land(&mut self, id: usize) {
            self.0.push(format!("land {id}"));
        }
        fn dma_wait(&mut self, id: usize) {
            self.0.push(format!("wait {id}"));
        }
        fn op(&mut self, op: &pagoda_ir::tile_machine::OpEvent) {
            if op.op == "arith.addf" {
                self.0.push("add".into());
            }
        }
    }
    let context = Context::new();
    let (program, outputs) = program(&context);
    let start = "start 0 from x to buffer, 4096 bytes";
    for (dma, expected) in [
        (DmaOrder::Early, [start, "land 0", "add", "wait 0", "add"]),
        (DmaOrder::Late, [start, "add", "land 0", "wait 0", "add"]),
    ] {
        let mut log = Log::default();
        program.run_observed(&Machine { dma, ..Machine::default() }, &inputs(), &outputs, &mut log).unwrap();
        assert_eq!(log.0, expected, "{dma:?}");
    }
}

#[test]
fn a_trace_covers_the_run() {
    let context = Context::new();
    let (program, outputs) = program(&context);
    let mut trace = Trace::new("k").with_op_limit(20);
    let run = program.run_observed(&Machine::default(), &inputs(), &outputs, &mut trace).unwrap();
    assert_eq!(run.outputs, program.run(&Machine::default(), &inputs(), &outputs).unwrap().outputs);
    let mut bytes = vec![];
    trace.write(&mut bytes).unwrap();
    let json: Json = serde_json::from_slice(&bytes).unwrap();
    let events = json["traceEvents"].as_array().unwrap();
    let of = |category: &str| events.iter().filter(move |event| event["cat"] == category).collect::<Vec<_>>();
    // The steps take up all ops, one after the other.
    let [first, second] = of("step")[..] else { panic!("{events:?}") };
    assert_eq!((&first["name"], &first["ts"]), (&"step [0]".into(), &0.into()));
    assert_eq!((&second["name"], &second["ts"]), (&"step [1]".into(), &first["dur"]));
    assert_eq!(first["dur"].as_u64().unwrap() + second["dur"].as_u64().unwrap(), run.counters.ops);
    // Ops up to the limit, with their lines, and a word about the others.
    assert_eq!(of("op").len(), 20);
    let loads = of("op").into_iter().filter(|op| op["name"] == "vector.load");
    let lines: Vec<_> = loads.map(|op| op["args"]["location"].as_str().unwrap()).collect();
    assert!(!lines.is_empty() && lines.iter().all(|line| line.starts_with("ir/tests/all/trace.rs:")), "{lines:?}");
    let left_out = format!("{} ops are left out from here on", run.counters.ops - 20);
    assert!(events.iter().any(|event| event["name"] == left_out.as_str() && event["ts"] == 20), "{left_out}");
    // The DMA begins, lands and ends, in this order, in the second step.
    let dma: Vec<_> = of("dma").iter().map(|event| (event["ph"].as_str().unwrap(), &event["ts"])).collect();
    let [("b", began), ("n", landed), ("e", ended)] = dma[..] else { panic!("{dma:?}") };
    let times = [&second["ts"], began, landed, ended].map(|at| at.as_u64().unwrap());
    assert!(times.is_sorted() && times[1] < times[3], "{times:?}");
    // Every byte of the pipeline: two blocks in, two out.
    let blocks: Vec<&str> = events
        .iter()
        .filter(|event| event["tid"] == 3 && event["ph"] == "i")
        .map(|b| b["name"].as_str().unwrap())
        .collect();
    assert_eq!(blocks, ["in y [0,0]", "out out [0,0]", "in y [1,0]", "out out [1,0]"]);
}

#[test]
fn an_element_has_a_past() {
    let context = Context::new();
    let (program, outputs) = program(&context);
    let past = |output, offset| {
        let cell = Cell::Output { output, offset };
        let past = program.history(&Machine::default(), &inputs(), &outputs, cell);
        past.into_iter().map(|past| (past.what, past.location.is_some(), past.grid_step)).collect::<Vec<_>>()
    };
    // An element of the second block: written back from its window, where the step stored it twice.
    let expected = [
        ("array `out` written back from its window (block [1, 0])", false, [1]),
        ("`out` written by ", true, [1]),
        ("`out` written by ", true, [1]),
        ("unwritten again: a new block of the output begins", false, [1]),
    ];
    let seen = past(0, 8 * 128 + 5);
    assert!(seen.len() >= 4, "{seen:?}");
    for ((what, has_line, step), (seen, with_line, at)) in expected.iter().zip(&seen) {
        assert!(seen.starts_with(what), "{seen}");
        assert_eq!((*has_line, &step[..]), (*with_line, at.as_slice()), "{seen}");
    }
}

/// What a kernel prints: values behind a text, in it, and what memory holds.
#[test]
fn who_listens_hears_what_a_kernel_prints() {
    #[derive(Default)]
    struct Listens(Vec<String>);
    impl Observer for Listens {
        const WATCHES: bool = false;
        const LISTENS: bool = true;

        fn print(&mut self, line: &str) {
            self.0.push(line.to_owned());
        }
    }
    let text = r#"
        func.func @k(%i: i32, %o: memref<1x8xi32, "vmem">) attributes {iteration_bounds = array<i64: 2>} {
          %c = arith.constant 0 : index
          %v = vector.broadcast %i : i32 to vector<1x8xi32>
          "tpu.vector_store"(%v, %o, %c, %c) {strides = array<i32>} : (vector<1x8xi32>, memref<1x8xi32, "vmem">, index, index) -> ()
          %seven = arith.constant 17 : i32
          "tpu.log"(%i) {tag = "step:"} : (i32) -> ()
          "tpu.log"(%i, %seven) {tag = "$0 of $1, $x1", formatted = true} : (i32, i32) -> ()
          "tpu.log_buffer"(%o) {shape = array<i64: 1, 8>, tag = "o ="} : (memref<1x8xi32, "vmem">) -> ()
          return
        }"#;
    let context = Context::new();
    let module = mosaic::text::parse(&context, text, "k.mlir").unwrap();
    let program = Program::decode(&module).unwrap();
    assert!(program.prints());
    let outputs = [TensorType::new(Element::I32, &[1, 8])];
    let mut heard = Listens::default();
    program.run_observed(&Machine::default(), &[], &outputs, &mut heard).unwrap();
    let of_step = |i: usize| {
        let all = vec![i.to_string(); 8].join(" ");
        [format!("step: {i}"), format!("{i} of 17, 11"), format!("o = [1, 8] [{all}]")]
    };
    assert_eq!(heard.0, [of_step(0), of_step(1)].concat());
}
