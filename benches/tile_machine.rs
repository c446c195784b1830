//! Our own parts of the Mosaic kernels: the tile machine at a matmul beside the CPU plugin's dot, and at attention;
//! planning; and emission, from the problem to the custom call that carries the kernel. Each figure stands beside its bound
//! on stderr.

mod common;

use std::time::Duration;

use common::timed;
use criterion::Criterion;
use pagoda_engine::pjrt::{Arg, Buffer, Plugin, PluginChoice};
use pagoda_ir::{Context, Element, tile_machine::Program};
use pagoda_kernels::{
    Case, Kernel, Plan, Problem,
    chips::Chip,
    kernel::stablehlo_module,
    matmul::{self, Matmul},
    plan::Options,
    random::Lengths,
    rpa::{self, Kind, Precision, Rpa},
};

/// Measures `work` and returns the mean time of what criterion ran last.
fn measured(criterion: &mut Criterion, id: &str, work: impl FnMut()) -> Duration {
    let mut mean = Duration::ZERO;
    criterion.bench_function(id, timed(&mut mean, work));
    mean
}

/// Prints a measured time beside its limit, where there was a measurement.
fn report(what: &str, time: Duration, limit: &str) {
    if time > Duration::ZERO {
        eprintln!("{what}: {time:.2?} ({limit})\n");
    }
}

/// One 1024-token prompt of Llama-3.1-8B's shapes.
fn rpa_problem() -> rpa::Problem {
    let spec = rpa::Spec {
        kind: Kind::Mixed,
        precision: Precision::uniform(Element::Bf16),
        tokens: 1024,
        q_heads: 32,
        kv_heads: 8,
        head_dim: 128,
        page_size: 128,
        pages: 8,
        layers: 1,
        max_seqs: 1,
        pages_per_seq: 8,
        scale: 128_f64.powf(-0.5),
        sliding_window: None,
        soft_cap: None,
        ..rpa::Spec::default()
    };
    rpa::Problem::new(spec).expect("a valid problem")
}

fn plan<K: Kernel>(problem: Problem<K::Spec>) -> Plan<K> {
    Plan::new(problem, Chip::V5p, Options::default()).expect("a plan")
}

fn matmul_plan(sizes: [usize; 3]) -> Plan<Matmul> {
    plan(Problem::new(matmul::Spec::new(sizes, Element::Bf16)).expect("a valid problem"))
}

fn rpa_plan() -> Plan<Rpa> {
    plan(rpa_problem())
}

/// Runs the case on the tile machine once per call.
fn on_tile_machine<K: Kernel>(case: Case<K>) -> impl FnMut() + use<K> {
    let context = Context::new();
    let kernel = case.plan.kernel(&context).expect("a kernel");
    let program = Program::decode(kernel.module()).expect("a known kernel");
    let (machine, operands, outputs) = (case.plan.machine(), case.operands(), kernel.outputs());
    move || {
        program.run(&machine, &operands, &outputs).expect("no fault");
    }
}

fn execution(criterion: &mut Criterion) {
    let plugin = Plugin::load(&PluginChoice::parse("cpu").expect("a name")).expect("the CPU plugin: run `make setup`");
    let client = plugin.client(1).expect("a client");
    let (context, plan) = (Context::new(), matmul_plan([1024; 3]));
    let inputs = Matmul::draw(plan.problem(), None, 1).expect("no batch");
    let module = stablehlo_module::<Matmul>(&context, plan.problem()).expect("a module");
    let dot = client.compile(module.text(), 1).expect("compiles");
    let arguments: Vec<Buffer> = inputs.values().map(|array| client.upload(array, 0).expect("uploads")).collect();
    let xla = measured(criterion, "matmul 1024^3 bf16, CPU plugin", || {
        let results = dot.run(arguments.iter().map(Arg::Keep).collect()).expect("runs");
        results[0].wait().expect("finishes");
    });
    let work = on_tile_machine(Case::new(&plan, &inputs));
    let ours = measured(criterion, "matmul 1024^3 bf16, tile machine", work);
    let ratio = ours.as_secs_f64() / xla.as_secs_f64();
    report("matmul on the tile machine", ours, &format!("{ratio:.2} times the plugin's {xla:.2?}; at most 3"));

    let plan = rpa_plan();
    let lengths = [Lengths { q_len: 1024, kv_len: 1024 }];
    let inputs = Rpa::draw(plan.problem(), Some(&lengths), 1).expect("a batch");
    let work = on_tile_machine(Case::new(&plan, &inputs));
    let time = measured(criterion, "attention of a 1024-token prompt, tile machine", work);
    report("attention on the tile machine, one thread", time, "at most 3 s");
}

fn emission(criterion: &mut Criterion) {
    let limit = "at most 1 ms";
    // The more tiles there are to choose from, the longer it takes.
    let time = measured(criterion, "plan matmul", || drop(matmul_plan([4096, 4096, 14336])));
    report("planning a matmul", time, limit);
    report("planning attention", measured(criterion, "plan rpa", || drop(rpa_plan())), limit);
    let limit = "at most 20 ms";
    let context = Context::new();
    let time = measured(criterion, "emit matmul", || {
        matmul_plan([1024; 3]).module(&context).expect("a module").bytecode();
    });
    report("emitting a matmul", time, limit);
    let time = measured(criterion, "emit rpa", || {
        rpa_plan().module(&context).expect("a module").bytecode();
    });
    report("emitting attention", time, limit);
}

fn main() {
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    emission(&mut criterion);
    execution(&mut criterion);
    criterion.final_summary();
}
