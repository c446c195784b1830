//! The attention's cost follows the context that is there: 8 decode rows at 128, 1024 and 4096 tokens of context under one
//! `max_seq_len` of 4608, and the KV write into caches of two sizes. Ratios go to stderr at the end.

mod common;

use std::time::Duration;

use common::timed;
use criterion::{BenchmarkId, Criterion};
use pagoda_engine::pjrt::{Arg, Buffer, Client, Plugin, PluginChoice};
use pagoda_ir::{Context, Element, HostTensor};
use pagoda_kernels::{
    Kernel,
    kernel::stablehlo_module,
    random::Lengths,
    rpa::{self, Kind, Precision, Rpa},
};

const CONTEXTS: [usize; 3] = [128, 1024, 4096];

fn problem(pages: usize, tokens: usize) -> rpa::Problem {
    rpa::Problem::new(rpa::Spec {
        kind: Kind::Decode,
        precision: Precision::uniform(Element::F32),
        tokens,
        q_heads: 4,
        kv_heads: 2,
        head_dim: 64,
        page_size: 128,
        pages,
        layers: 1,
        max_seqs: 8,
        pages_per_seq: 36,
        scale: 0.125,
        sliding_window: None,
        soft_cap: None,
        ..rpa::Spec::default()
    })
    .expect("a valid problem")
}

/// The mean time of one call of `work` that criterion measured last.
fn measured(criterion: &mut Criterion, id: BenchmarkId, work: impl FnMut()) -> Duration {
    let mut mean = Duration::ZERO;
    criterion.benchmark_group("rpa").bench_function(id, timed(&mut mean, work));
    mean
}

fn attention(criterion: &mut Criterion, client: &Client) {
    let (context, problem) = (Context::new(), problem(288, 8));
    let module = stablehlo_module::<Rpa>(&context, &problem).expect("a module");
    let program = client.compile(module.text(), 1).expect("compiles");
    let times = CONTEXTS.map(|tokens| {
        let inputs = Rpa::draw(&problem, Some(&[Lengths { q_len: 1, kv_len: tokens }; 8]), 1).expect("a batch");
        let buffers: Vec<Buffer> = inputs.values().map(|array| client.upload(array, 0).expect("uploads")).collect();
        measured(criterion, BenchmarkId::new("decode, 8 rows, context", tokens), || {
            let results = program.run(buffers.iter().map(Arg::Keep).collect()).expect("runs");
            results[0].wait().expect("finishes");
        })
    });
    for (tokens, time) in CONTEXTS.iter().zip(times) {
        let ratio = time.as_secs_f64() / times[0].as_secs_f64();
        eprintln!("{tokens} tokens of context: {time:?}, {ratio:.1} times the time at {} ", CONTEXTS[0]);
    }
}

fn kv_write(criterion: &mut Criterion, client: &Client) {
    let context = Context::new();
    for (rows_written, pages) in [(8, 288), (8, 288 * 8), (1, 288), (1, 288 * 8)] {
        let problem = problem(pages, rows_written);
        let module = rpa::kv_write::module(&context, &problem).expect("a module");
        let program = client.compile(module.text(), 1).expect("compiles");
        let upload = |array: &HostTensor| client.upload(array, 0).expect("uploads");
        let rows = upload(&HostTensor::zeros(Element::F32, &problem.new_kv_type().dims));
        let slots: Vec<i32> = (0..rows_written as i32).map(|row| row * 1001).collect();
        let slots = upload(&HostTensor::new(&[rows_written], &slots));
        let mut kv = Some(upload(&HostTensor::zeros(Element::F32, &problem.kv_pages_type().dims)));
        measured(criterion, BenchmarkId::new(format!("KV write, rows {rows_written}, pages"), pages), || {
            let given = Arg::Donate(kv.take().expect("given back by the run before"));
            let mut results =
                program.run(vec![given, Arg::Keep(&rows), Arg::Keep(&rows), Arg::Keep(&slots)]).expect("runs");
            let written = results.remove(0);
            written.wait().expect("finishes");
            kv = Some(written);
        });
    }
}

fn main() {
    let plugin = Plugin::load(&PluginChoice::parse("cpu").expect("a name")).expect("the CPU plugin: run `make setup`");
    let client = plugin.client(1).expect("a client");
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    attention(&mut criterion, &client);
    kv_write(&mut criterion, &client);
    criterion.final_summary();
}
