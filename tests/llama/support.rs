//! Models, runs of them, and how their logits are measured against the f64 reference.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::AtomicBool;

use pagoda_engine::generate::{Engine, EngineOptions, SamplingOptions};
use pagoda_engine::llama::step::{self, Output, StepShape};
use pagoda_engine::llama::{DeviceModel, Group, KvCache, Parallel, Target, matrices};
use pagoda_engine::mesh::Mesh;
use pagoda_engine::model::ModelSpec;
use pagoda_engine::model::reference::Reference;
use pagoda_engine::model::weights::Weights;
use pagoda_engine::pjrt::{Arg, Client, Plugin, PluginChoice};
use pagoda_engine::replicas::Replicas;
use pagoda_engine::scheduler::{Finished, Limits, Request};
use pagoda_engine::stop::StopRule;
use pagoda_engine::units::{PageSize, SampleId};
use pagoda_ir::{Context, Element, HostTensor};
use pagoda_kernels::chips::Chip;
use pagoda_kernels::random::poisoned;

pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/tiny-llama-kjv")
}

pub fn client() -> Client {
    client_of(1)
}

/// Nearly all of a test's time is XLA's compiler, at the default level of optimization, which `make nightly` has. At none, sums
/// are not vectorized, and roundings add up to more than logits may have. Flags that are given stay.
static OPTIMIZE_LESS: LazyLock<()> = LazyLock::new(|| {
    if !std::env::args().any(|arg| arg == "--ignored") && std::env::var_os("XLA_FLAGS").is_none() {
        // SAFETY: what reads the environment without the lock of Rust's library is the plugin, which is loaded afterwards.
        unsafe { std::env::set_var("XLA_FLAGS", "--xla_backend_optimization_level=1") };
    }
});

pub fn client_of(devices: usize) -> Client {
    LazyLock::force(&OPTIMIZE_LESS);
    let plugin = Plugin::load(&PluginChoice::parse("cpu").unwrap()).expect("the CPU plugin: run `make setup`");
    plugin.client(devices).unwrap()
}

pub fn mesh(data: usize, model: usize) -> Mesh {
    let [data, model] = [data, model].map(|size| NonZeroUsize::new(size).unwrap());
    Mesh { data, model }
}

pub fn limits() -> Limits {
    Limits {
        max_seq_len: 320,
        max_seqs: 8,
        max_pages: 8 * 20,
        page_size: PageSize::new(16).unwrap(),
        max_seqs_in_prefill: 8,
        max_prefill_size: 64,
        max_rounds: 32,
    }
}

/// Greedy in f32, with nothing else out of the ordinary.
pub fn greedy_options(limits: Limits, target: Target) -> EngineOptions {
    EngineOptions {
        limits,
        compute: Element::F32,
        matrices: Element::F32,
        kv_cache: KvCache::of(Element::F32),
        target,
        sampling: SamplingOptions::GREEDY,
        stop: StopRule::default(),
        mixed_steps: false,
        reuse_prefixes: true,
    }
}

/// A model on disk.
pub struct Model {
    pub config: ModelSpec,
    pub weights: Weights,
}

impl Model {
    pub fn open(folder: &Path) -> Self {
        let (config, weights) = (ModelSpec::open(folder).unwrap(), Weights::open(folder).unwrap());
        assert!(weights.check(&config).unwrap().is_empty());
        Self { config, weights }
    }

    pub fn tiny() -> Self {
        Self::open(&folder())
    }

    pub fn reference(&self) -> Reference {
        Reference::new(&self.config, &self.weights).unwrap()
    }

    pub fn on_device(&self, client: &Client, shape: &StepShape) -> DeviceModel {
        DeviceModel::load(client, &self.config, &self.weights, shape).unwrap()
    }

    pub fn on_group(&self, client: &Client, shape: &StepShape, group: Group) -> DeviceModel {
        DeviceModel::load_group(client, &self.config, &self.weights, shape, group).unwrap()
    }

    /// Engines on a client with the devices of `mesh`.
    pub fn replicas(&self, mesh: Mesh, options: &EngineOptions) -> Replicas {
        Replicas::load(&client_of(mesh.devices()), &self.config, &self.weights, mesh, options).unwrap()
    }

    pub fn engine(
        &self,
        limits: Limits,
        compute: Element,
        target: Target,
        sampling: SamplingOptions,
        stop: StopRule,
    ) -> Engine {
        let client = client();
        let kv_cache = KvCache::of(compute);
        let options = EngineOptions { compute, kv_cache, sampling, stop, ..greedy_options(limits, target) };
        let options = options.on(target, &self.config, &self.weights);
        let model = self.on_device(&client, &options.shape(&Parallel::ONE));
        Engine::new(&client, model, options).unwrap()
    }
}

pub fn request(index: usize, prompt: &[u32], max_new_tokens: usize) -> Request {
    Request { id: SampleId { round: 0, index, generation: 0 }, prompt: prompt.into(), max_new_tokens }
}

pub fn run(engine: &mut Engine, requests: Vec<Request>) -> BTreeMap<usize, Finished> {
    collect(|keep| engine.run(requests, &AtomicBool::new(false), keep, |_| ()).map(|_| ()))
}

pub fn run_replicas(engines: &mut Replicas, requests: Vec<Request>) -> BTreeMap<usize, Finished> {
    collect(|keep| engines.run(requests, &AtomicBool::new(false), keep, |_| ()).map(|_| ()))
}

/// What a run hands out, by prompt.
fn collect(
    run: impl FnOnce(&mut dyn FnMut(Finished) -> pagoda_engine::Result<()>) -> pagoda_engine::Result<()>,
) -> BTreeMap<usize, Finished> {
    let mut finished = BTreeMap::new();
    let mut keep = |sample: Finished| {
        assert!(finished.insert(sample.id.index, sample).is_none(), "a sample finished twice");
        Ok(())
    };
    run(&mut keep).unwrap();
    finished
}

/// (prompt, its 48 new tokens), made by a float64 forward that was written elsewhere.
pub fn golden() -> Vec<(Vec<u32>, Vec<u32>)> {
    let text = std::fs::read_to_string(folder().join("golden.json")).unwrap();
    let golden: BTreeMap<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    golden.values().map(ids).map(|ids| (ids[..ids.len() - 48].to_vec(), ids[ids.len() - 48..].to_vec())).collect()
}

/// All forms of the kernels that this machine runs.
pub const TARGETS: [Target; 3] = [Target::Portable, Target::Host, Target::TileMachine(Chip::V5p)];

/// Logits of every position of some texts (teacher forcing), each prefilled in chunks of `rows`, as one sequence over
/// scattered pages: `[texts][positions][vocab]`. The model is split over all devices of the client.
pub fn logits_in_chunks(
    client: &Client,
    model: &Model,
    (compute, target): (Element, Target),
    texts: &[&[u32]],
    rows: usize,
) -> Vec<Vec<Vec<f32>>> {
    logits_by_cache(client, model, (compute, KvCache::of(compute), target), texts, rows)
}

/// As [`logits_in_chunks`], with a KV cache of any type.
pub fn logits_by_cache(
    client: &Client,
    model: &Model,
    (compute, kv_cache, target): (Element, KvCache, Target),
    texts: &[&[u32]],
    rows: usize,
) -> Vec<Vec<Vec<f32>>> {
    let config = &model.config;
    let group = Group::replica(mesh(1, client.devices()), 0);
    let longest = texts.iter().map(|tokens| tokens.len()).max().unwrap();
    let (page_size, pages_per_seq) = (16, longest.div_ceil(16));
    let shape = StepShape {
        prefill_rows: rows,
        slots: 2,
        pages: 2 * pages_per_seq,
        page_size,
        pages_per_seq,
        max_positions: longest,
        max_rounds: 1,
        compute,
        matrices: matrices(config, &model.weights, compute, target),
        kv_cache,
        target,
        parallel: group.parallel().clone(),
    };
    let model = model.on_group(client, &shape, group);
    let module = step::prefill(&Context::new(), config, &shape, Output::Logits).unwrap().bytecode();
    let program = client.compile(module, client.devices()).unwrap();
    let logits = |tokens: &[u32]| {
        let kv_type = shape.kv_type(config);
        // Poison: whatever is read before it was written shows.
        let poison = poisoned(&kv_type);
        let mut kv: Vec<_> = (0..client.devices()).map(|device| client.upload(&poison, device).unwrap()).collect();
        let table: Vec<i32> = (0..pages_per_seq as i32).map(|page| 2 * page + 1).rev().collect();
        let mut logits = Vec::new();
        for (chunk, part) in tokens.chunks(rows).enumerate() {
            let start = chunk * rows;
            let padded = |values: Vec<i32>, fill: i32| {
                let padding = rows - values.len();
                HostTensor::new(&[rows], &[values, vec![fill; padding]].concat())
            };
            let slot = |position: usize| table[position / page_size] * page_size as i32 + (position % page_size) as i32;
            let positions = start..start + part.len();
            let end = positions.end as i32;
            let arguments = [
                padded(part.iter().map(|&id| id as i32).collect(), 0),
                padded(positions.clone().map(|position| position as i32).collect(), 0),
                padded(positions.map(slot).collect(), -1),
                HostTensor::new(&[2], &[end, 0]),
                HostTensor::new(&[2, pages_per_seq], &[table.clone(), vec![0; pages_per_seq]].concat()),
                HostTensor::new(&[3], &[0, part.len() as i32, part.len() as i32]),
                HostTensor::new(&[1], &[1i32]),
                HostTensor::zeros(Element::I32, &[2]),
                HostTensor::zeros(Element::U32, &[2]),
                HostTensor::zeros(Element::U32, &[2]),
                HostTensor::zeros(Element::U32, &[2]),
                HostTensor::zeros(Element::F32, &[2]),
                HostTensor::new(&[2], &[1i32; 2]),
                HostTensor::new(&[2], &[1f32; 2]),
                HostTensor::zeros(Element::U32, &[2]),
                HostTensor::zeros(Element::U32, &[2]),
                HostTensor::zeros(Element::I32, &[2]),
            ];
            let all = model.weights().iter().zip(kv).enumerate().map(|(device, (weights, kv))| {
                let arguments = arguments.iter().map(|tensor| Arg::Donate(client.upload(tensor, device).unwrap()));
                weights.iter().map(Arg::Keep).chain([Arg::Donate(kv)]).chain(arguments).collect()
            });
            let mut values = Vec::new();
            kv = Vec::new();
            for mut results in program.run_replicated(all.collect()).unwrap() {
                values.push(results.pop().unwrap().values::<f32>().unwrap());
                kv.push(results.pop().unwrap());
            }
            assert!(values.iter().all(|of_shard| *of_shard == values[0]), "shards have different logits");
            let values = values.swap_remove(0);
            logits.extend(values.chunks(config.vocab_size).take(part.len()).map(<[f32]>::to_vec));
        }
        logits
    };
    texts.iter().map(|tokens| logits(tokens)).collect()
}

/// The largest difference of two lists of logits.
pub fn largest_difference(logits: &[Vec<f32>], expected: &[Vec<f64>]) -> f64 {
    assert_eq!(logits.len(), expected.len());
    let pairs = logits.iter().flatten().zip(expected.iter().flatten());
    let differences = pairs.map(|(a, b)| (f64::from(*a) - b).abs());
    // Not `f64::max`, which passes over NaN.
    differences.fold(0.0, |most, error| if error <= most { most } else { error })
}

/// How far logits in bf16 may be from exact ones, relative, in the Euclidean norm over the vocabulary of one position.
///
/// bf16 has 8 bits of significand: a rounding changes a value by at most u = 2^-8 of it. From the embedding to the logits
/// a value is rounded 7 times a layer (projection, rotation, probability, attended value, the MLP's inner value; the residual
/// stream twice), twice in each of two norms, three times where they stand behind a block, whose result is rounded before; twice
/// more where queries and keys are normed; and twice in the last norm. With Llama's norms that is n = 11 layers + 2 in series.
/// Errors of independent signs grow with the root, to sqrt(n) u (Higham and Mary, "A new approach to probabilistic rounding error
/// analysis", 2019; the worst case is n u), in a model whose layers do not amplify them. Sums are f32 and add nothing that
/// shows.
pub fn bf16_error(config: &ModelSpec) -> f64 {
    let of = |there: bool, roundings: usize| if there { roundings } else { 0 };
    let norms = of(config.norms.before(), 4) + of(config.norms.after(), 6) + of(config.qk_norm.is_some(), 2);
    (((7 + norms) * config.layers.len() + 2) as f64).sqrt() / 256.0
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// The largest error of one position's logits, relative, in the Euclidean norm.
pub fn largest_relative_error(logits: &[Vec<f32>], expected: &[Vec<f64>]) -> f64 {
    assert_eq!(logits.len(), expected.len());
    let errors = logits.iter().zip(expected).map(|(logits, expected)| {
        let error = norm(logits.iter().zip(expected).map(|(a, b)| f64::from(*a) - b));
        error / norm(expected.iter().copied())
    });
    // Not `f64::max`, which passes over NaN.
    errors.fold(0.0, |most, error| if error <= most { most } else { error })
}

/// Checks a greedy text of a bf16 model, `tokens` after `prompt`, against exact logits along that very text: each token is
/// the best one, or so close to it that two errors of [`bf16_error`] make up for it. Single logits err by more than their
/// root mean square: by five times that in one case of a million.
pub fn check_greedy_bf16(model: &Model, prompt: &[u32], tokens: &[u32]) {
    let all = [prompt, tokens].concat();
    let logits = model.reference().logits(&all[..all.len() - 1]);
    for (at, (logits, &token)) in logits[prompt.len() - 1..].iter().zip(tokens).enumerate() {
        let root_mean_square = norm(logits.iter().copied()) / (logits.len() as f64).sqrt();
        let allowed = 2.0 * 5.0 * bf16_error(&model.config) * root_mean_square;
        let best = logits.iter().copied().fold(f64::MIN, f64::max);
        let short = best - logits[token as usize];
        assert!(short <= allowed, "token {at}: {token} is {short:.3} below the best logit, {allowed:.3} is allowed");
    }
}
