//! The step program's matmuls on the CPU plugin, in each memory layout.

use criterion::{BenchmarkId, Criterion, Throughput};
use pagoda_engine::pjrt::{Arg, Buffer, Plugin, PluginChoice};
use pagoda_ir::{Context, Element, HostTensor};
use pagoda_kernels::kernel::stablehlo_module;
use pagoda_kernels::matmul::{Layout, Matmul, Problem, Spec};

fn main() {
    let plugin = Plugin::load(&PluginChoice::parse("cpu").expect("a name")).expect("the CPU plugin: run `make setup`");
    let client = plugin.client(1).expect("a client");
    let context = Context::new();
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    for (k, n) in [(256, 768), (2048, 8192)] {
        let mut group = criterion.benchmark_group(format!("matmul {k} x {n}"));
        for m in [1, 8, 32] {
            group.throughput(Throughput::Elements(2 * (m * k * n) as u64));
            for layout in [Layout::RowMajor, Layout::WeightTransposed, Layout::FeatureMajor] {
                let problem = Problem::new(Spec { layout, ..Spec::new([m, k, n], Element::F32) });
                let problem = problem.expect("a valid problem");
                let module = stablehlo_module::<Matmul>(&context, &problem).expect("a module");
                let program = client.compile(module.text(), 1).expect("compiles");
                let arguments: Vec<Buffer> = problem
                    .arguments()
                    .types()
                    .iter()
                    .map(|ty| client.upload(&HostTensor::zeros(ty.element, &ty.dims), 0).expect("uploads"))
                    .collect();
                group.bench_function(BenchmarkId::new(format!("{layout:?}"), m), |bencher| {
                    bencher.iter(|| {
                        let results = program.run(arguments.iter().map(Arg::Keep).collect()).expect("runs");
                        results[0].wait().expect("finishes");
                    });
                });
            }
        }
    }
    criterion.final_summary();
}
