//! One decode step of the tiny model on the CPU plugin, all slots busy: both forms of the attention, greedy and sampled,
//! and the share of the host. Times are of the step on the device; the ratios go to stderr at the end.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion};
use pagoda_engine::generate::{Engine, EngineOptions, SamplingOptions, Timing};
use pagoda_engine::llama::{DeviceModel, KvCache, Parallel, Target};
use pagoda_engine::model::ModelSpec;
use pagoda_engine::model::weights::Weights;
use pagoda_engine::pjrt::{Client, Plugin, PluginChoice};
use pagoda_engine::scheduler::{Limits, Request};
use pagoda_engine::stop::StopRule;
use pagoda_engine::units::{PageSize, SampleId};
use pagoda_ir::Element;

/// New tokens of one run; the context goes from 1 to this.
const NEW: usize = 256;

fn engine(client: &Client, slots: usize, target: Target, sampling: SamplingOptions) -> Engine {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/tiny-llama-kjv");
    let config = ModelSpec::open(&folder).expect("the model's config");
    let weights = Weights::open(&folder).expect("the model's weights");
    let page_size = PageSize::new(16).expect("not zero");
    let limits = Limits {
        max_seq_len: NEW + 8,
        max_seqs: slots,
        max_pages: slots * page_size.pages_for(NEW + 8),
        page_size,
        max_seqs_in_prefill: slots,
        max_prefill_size: slots,
        max_rounds: 64,
    };
    let options = EngineOptions {
        limits,
        compute: Element::F32,
        matrices: Element::F32,
        kv_cache: KvCache::of(Element::F32),
        target,
        sampling,
        stop: StopRule::default(),
        mixed_steps: false,
        reuse_prefixes: false, // the prompts are alike
    }
    .on(target, &config, &weights);
    let model = DeviceModel::load(client, &config, &weights, &options.shape(&Parallel::ONE)).expect("loads");
    Engine::new(client, model, options).expect("compiles")
}

fn run(engine: &mut Engine, slots: usize) -> Timing {
    let requests = (0..slots).map(|index| Request {
        id: SampleId { round: 0, index, generation: 0 },
        prompt: [300 + index as u32].into(),
        max_new_tokens: NEW,
    });
    engine.run(requests, &AtomicBool::new(false), |_| Ok(()), |_| ()).expect("runs")
}

fn main() {
    let mut criterion =
        Criterion::default().sample_size(10).measurement_time(Duration::from_secs(5)).configure_from_args();
    let plugin = Plugin::load(&PluginChoice::parse("cpu").expect("a name")).expect("the CPU plugin: run `make setup`");
    let client = plugin.client(1).expect("a client");
    let sampled = SamplingOptions { temperature: 0.8, top_k: Some(40), top_p: Some(0.95), seed: 1 };
    let variants = [
        ("native, greedy", Target::Host, SamplingOptions::GREEDY),
        ("native, top-k and top-p", Target::Host, sampled),
        ("stablehlo, greedy", Target::Portable, SamplingOptions::GREEDY),
    ];
    let mut report = Vec::new();
    for slots in [1, 8] {
        for (name, target, sampling) in variants {
            let mut engine = engine(&client, slots, target, sampling);
            let (mut step, mut host) = (Duration::ZERO, 0.0);
            let mut group = criterion.benchmark_group("decode step");
            group.bench_function(BenchmarkId::new(name, slots), |bencher| {
                bencher.iter_custom(|iterations| {
                    // A run is `NEW` steps, of which the mean is taken: iterations beyond one run are more runs.
                    let runs = iterations.div_ceil(NEW as u64).max(1);
                    let timings: Vec<Timing> = (0..runs).map(|_| run(&mut engine, slots)).collect();
                    let device: f64 = timings.iter().map(|timing| timing.decode_device_s).sum();
                    let steps: usize = timings.iter().map(|timing| timing.decode_steps).sum();
                    let host_s: f64 = timings.iter().map(|timing| timing.host_s).sum();
                    step = Duration::from_secs_f64(device / steps as f64);
                    host = host_s / (host_s + device);
                    step * iterations as u32
                });
            });
            report.push((slots, name, step, host));
        }
    }
    for (slots, name, step, host) in &report {
        let first = report.iter().find(|(other, ..)| other == slots).map_or(*step, |(_, _, step, _)| *step);
        let ratio = step.as_secs_f64() / first.as_secs_f64();
        eprintln!("{slots} slots, {name:<24} {step:>10.1?} a step, {ratio:.2}x the first, host {:.2}%", 100.0 * host);
    }
    criterion.final_summary();
}
