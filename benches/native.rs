//! The kernels in Rust on this machine's cores, whichever kernel has such a form, beside what the machine can do at most: how
//! many times longer than its bytes and operations need goes to stderr at the end.

mod common;

use std::time::Duration;

use common::timed;
use criterion::{BenchmarkId, Criterion};
use pagoda_engine::measure::{Cores, Rates};
use pagoda_ir::Element;
use pagoda_kernels::matmul::{self, Activation, Epilogue, Layout, Matmul};
use pagoda_kernels::random::Lengths;
use pagoda_kernels::rpa::{self, Precision, Rpa};
use pagoda_kernels::{Kernel, Problem};

/// A line of the report: what, how long it took, and how long it takes at least.
type Line = (String, Duration, f64);

fn measure<K: Kernel>(criterion: &mut Criterion, spec: K::Spec, batch: Option<&[Lengths]>, rates: &Rates) -> Line {
    let problem = Problem::new(spec).expect("a valid problem");
    let inputs = K::draw(&problem, batch, 1).expect("a batch of the problem");
    let (name, work) = (K::describe(&problem), K::work(&problem, K::lengths(&problem, &inputs).as_deref()));
    let mut mean = Duration::ZERO;
    let id = BenchmarkId::new(K::NAME, &name);
    criterion.benchmark_group("native").bench_function(
        id,
        timed(&mut mean, || {
            std::hint::black_box(K::native(&problem, &inputs, &Cores).expect("a form in Rust"));
        }),
    );
    (name, mean, rates.floor(work.flops, work.bytes))
}

fn main() {
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    let mut lines = Vec::new();
    for element in [Element::F32, Element::Bf16] {
        let rates = Rates::of_this_machine(element);
        eprintln!("{element}: {:.0} GFLOP/s, {:.1} GB/s", rates.flop_s / 1e9, rates.byte_s / 1e9);
        for [k, n] in [[256, 768], [576, 1536], [2048, 8192]] {
            for m in [1, 8, 256] {
                let epilogue = Epilogue { activation: Activation::SiluGate, ..Epilogue::NONE };
                let spec =
                    matmul::Spec { layout: Layout::FeatureMajor, epilogue, ..matmul::Spec::new([m, k, n], element) };
                lines.push(measure::<Matmul>(&mut criterion, spec, None, &rates));
            }
        }
        for (tokens, lengths) in
            [(8, vec![Lengths { q_len: 1, kv_len: 1024 }; 8]), (512, vec![Lengths { q_len: 512, kv_len: 512 }])]
        {
            let spec = rpa::Spec {
                precision: Precision::uniform(element),
                tokens,
                q_heads: 32,
                kv_heads: 8,
                head_dim: 64,
                page_size: 16,
                pages: 64 * lengths.len(),
                max_seqs: lengths.len(),
                pages_per_seq: 64,
                scale: 0.125,
                ..rpa::Spec::default()
            };
            lines.push(measure::<Rpa>(&mut criterion, spec, Some(&lengths), &rates));
        }
    }
    for (name, mean, floor) in lines {
        eprintln!("{name:<90} {mean:>10.1?}, {:>5.2} times the floor", mean.as_secs_f64() / floor);
    }
    criterion.final_summary();
}
