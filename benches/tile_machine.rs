//! Our own parts of the Mosaic kernels: the tile machine at a matmul beside the CPU plugin's dot, and at an attention;
//! planning; and emission, from the problem to the custom call that carries the kernel. Each figure stands beside its bound
//! on stderr.

mod common;

use std::time::Duration;

use common::timed;
use criterion::Criterion;
use pagoda_engine::pjrt::{Arg, Buffer, Plugin, PluginChoice};
use pagoda_ir::{Context, Element, mosaic::Kernel, tile_machine::Program};
use pagoda_kernels::{
    MosaicCase,
    chips::Chip,
    matmul::{self, Epilogue, Layout},
    random::{self, Lengths},
    rpa::{self, Kind},
};

/// Measures `work` and returns the mean time of what criterion ran last.
fn measured(criterion: &mut Criterion, id: &str, work: impl FnMut()) -> Duration {
    let mut mean = Duration::ZERO;
    criterion.bench_function(id, timed(&mut mean, work));
    mean
}

/// Tells a measured time beside its limit, where there was a measurement.
fn tell(what: &str, time: Duration, limit: &str) {
    if time > Duration::ZERO {
        eprintln!("{what}: {time:.2?} ({limit})\n");
    }
}

fn matmul_problem([m, k, n]: [usize; 3]) -> matmul::Problem {
    let (layout, epilogue) = (Layout::RowMajor, Epilogue::NONE);
    let spec = matmul::Spec { m, k, n, input: Element::Bf16, output: Element::Bf16, layout, epilogue };
    matmul::Problem::new(spec).expect("a valid problem")
}

/// One 1024-token prompt of Llama-3.1-8B's shapes.
fn rpa_problem() -> rpa::Problem {
    let spec = rpa::Spec {
        kind: Kind::Mixed,
        element: Element::Bf16,
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
    };
    rpa::Problem::new(spec).expect("a valid problem")
}

fn matmul_plan(sizes: [usize; 3]) -> matmul::plan::Plan {
    matmul::plan::Plan::new(matmul_problem(sizes), Chip::V5p, matmul::plan::Options::default()).expect("a plan")
}

fn rpa_plan() -> rpa::plan::Plan {
    rpa::plan::Plan::new(rpa_problem(), Chip::V5p, rpa::plan::Options::default()).expect("a plan")
}

/// Runs the case on the tile machine once per call.
fn on_tile_machine(case: MosaicCase) -> impl FnMut() {
    let context = Context::new();
    let kernel: Kernel = case.kernel(&context).expect("a kernel");
    let program = Program::decode(kernel.module()).expect("a known kernel");
    let (machine, operands, outputs) = (case.machine(), case.operands(), kernel.outputs());
    move || {
        program.run(&machine, &operands, &outputs).expect("no fault");
    }
}

fn execution(criterion: &mut Criterion) {
    let plugin = Plugin::load(&PluginChoice::parse("cpu").expect("a name")).expect("the CPU plugin: run `make setup`");
    let client = plugin.client(1).expect("a client");
    let (context, plan) = (Context::new(), matmul_plan([1024; 3]));
    let inputs = random::matmul_inputs(plan.problem(), 1);
    let module = matmul::stablehlo::module(&context, plan.problem()).expect("a module");
    let dot = client.compile(module.text(), 1).expect("compiles");
    let arguments: Vec<Buffer> =
        inputs.to_tensors().iter().map(|array| client.upload(array, 0).expect("uploads")).collect();
    let xla = measured(criterion, "matmul 1024^3 bf16, CPU plugin", || {
        let results = dot.run(arguments.iter().map(Arg::Keep).collect()).expect("runs");
        results[0].wait().expect("finishes");
    });
    let work = on_tile_machine(MosaicCase::Matmul(&plan, &inputs));
    let ours = measured(criterion, "matmul 1024^3 bf16, tile machine", work);
    let ratio = ours.as_secs_f64() / xla.as_secs_f64();
    tell("matmul on the tile machine", ours, &format!("{ratio:.2} times the plugin's {xla:.2?}; at most 3"));

    let plan = rpa_plan();
    let inputs = random::rpa_inputs_of(plan.problem(), &[Lengths { q_len: 1024, kv_len: 1024 }], 0, 1);
    let work = on_tile_machine(MosaicCase::Rpa(&plan, &inputs));
    let time = measured(criterion, "attention of a 1024-token prompt, tile machine", work);
    tell("attention on the tile machine, one thread", time, "at most 3 s");
}

fn emission(criterion: &mut Criterion) {
    let limit = "at most 1 ms";
    // The more tiles there are to choose from, the longer it takes.
    let time = measured(criterion, "plan matmul", || drop(matmul_plan([4096, 4096, 14336])));
    tell("planning a matmul", time, limit);
    tell("planning an attention", measured(criterion, "plan rpa", || drop(rpa_plan())), limit);
    let limit = "at most 20 ms";
    let context = Context::new();
    let time = measured(criterion, "emit matmul", || {
        matmul::mosaic::module(&context, &matmul_plan([1024; 3])).expect("a module").bytecode();
    });
    tell("emitting a matmul", time, limit);
    let time = measured(criterion, "emit rpa", || {
        rpa::mosaic::module(&context, &rpa_plan()).expect("a module").bytecode();
    });
    tell("emitting an attention", time, limit);
}

fn main() {
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    emission(&mut criterion);
    execution(&mut criterion);
    criterion.final_summary();
}
