//! The step programs and the generation loop on the tiny model, against golden tokens and the f64 reference.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use pagoda_engine::generate::{Engine, EngineOptions, SamplingOptions};
use pagoda_engine::llama::step::{self, Output, StepShape};
use pagoda_engine::llama::{DeviceModel, Target};
use pagoda_engine::model::config::LlamaConfig;
use pagoda_engine::model::reference::Reference;
use pagoda_engine::model::weights::Weights;
use pagoda_engine::pjrt::{Arg, Client, Plugin, PluginChoice};
use pagoda_engine::scheduler::{Finished, Limits, Request};
use pagoda_engine::stop::{FinishReason, StopRule};
use pagoda_engine::units::{PageSize, SampleId};
use pagoda_ir::{Context, Element, HostTensor};
use pagoda_kernels::chips::Chip;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/tiny-llama-kjv")
}

fn client() -> Client {
    let plugin = Plugin::load(&PluginChoice::parse("cpu").unwrap()).expect("the CPU plugin: run `make setup`");
    plugin.client(1).unwrap()
}

fn limits() -> Limits {
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

/// A model on disk.
struct Model {
    config: LlamaConfig,
    weights: Weights,
}

impl Model {
    fn open(folder: &Path) -> Self {
        let (config, weights) = (LlamaConfig::open(folder).unwrap(), Weights::open(folder).unwrap());
        assert!(weights.check(&config).unwrap().is_empty());
        Self { config, weights }
    }

    fn tiny() -> Self {
        Self::open(&folder())
    }

    fn reference(&self) -> Reference {
        Reference::new(&self.config, &self.weights).unwrap()
    }

    fn on_device(&self, client: &Client, compute: Element, positions: usize) -> DeviceModel {
        DeviceModel::load(client, &self.config, &self.weights, compute, positions).unwrap()
    }

    fn engine(
        &self,
        limits: Limits,
        compute: Element,
        target: Target,
        sampling: SamplingOptions,
        stop: StopRule,
    ) -> Engine {
        let client = client();
        let model = self.on_device(&client, compute, limits.max_seq_len);
        Engine::new(&client, model, EngineOptions { limits, compute, target, sampling, stop }).unwrap()
    }
}

fn engine(limits: Limits, compute: Element, target: Target, sampling: SamplingOptions, stop: StopRule) -> Engine {
    Model::tiny().engine(limits, compute, target, sampling, stop)
}

fn request(index: usize, prompt: &[u32], max_new_tokens: usize) -> Request {
    Request { id: SampleId { round: 0, index, generation: 0 }, prompt: prompt.to_vec(), max_new_tokens }
}

fn run(engine: &mut Engine, requests: Vec<Request>) -> BTreeMap<usize, Finished> {
    let mut finished = BTreeMap::new();
    let keep = |sample: Finished| {
        assert!(finished.insert(sample.id.index, sample).is_none(), "a sample finished twice");
        Ok(())
    };
    engine.run(requests, &AtomicBool::new(false), keep, |_| ()).unwrap();
    finished
}

/// (prompt, its 48 new tokens), made by a float64 forward that was written elsewhere.
fn golden() -> Vec<(Vec<u32>, Vec<u32>)> {
    let text = std::fs::read_to_string(folder().join("golden.json")).unwrap();
    let golden: BTreeMap<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    golden.values().map(ids).map(|ids| (ids[..ids.len() - 48].to_vec(), ids[ids.len() - 48..].to_vec())).collect()
}

/// All forms of the kernels that this machine runs.
const TARGETS: [Target; 3] = [Target::Portable, Target::Host, Target::TileMachine(Chip::V5p)];

#[test]
fn every_form_yields_the_golden_tokens_in_f32() {
    let golden = golden();
    for target in TARGETS {
        let mut engine = engine(limits(), Element::F32, target, SamplingOptions::GREEDY, StopRule::default());
        let requests = golden.iter().enumerate().map(|(index, (prompt, _))| request(index, prompt, 48)).collect();
        let finished = run(&mut engine, requests);
        for (index, (_, expected)) in golden.iter().enumerate() {
            assert_eq!(&finished[&index].tokens, expected, "{target}");
            assert_eq!(finished[&index].reason, FinishReason::Length);
        }
    }
}

/// Logits of every position of `tokens` (teacher forcing), prefilled in chunks of `rows`, as one sequence over scattered
/// pages.
fn logits_in_chunks(
    client: &Client,
    model: &Model,
    (compute, target): (Element, Target),
    tokens: &[u32],
    rows: usize,
) -> Vec<Vec<f32>> {
    let config = &model.config;
    let (page_size, pages_per_seq) = (16, tokens.len().div_ceil(16));
    let shape = StepShape {
        prefill_rows: rows,
        slots: 2,
        pages: 2 * pages_per_seq,
        page_size,
        pages_per_seq,
        max_positions: tokens.len(),
        max_rounds: 1,
        compute,
        target,
    };
    let model = model.on_device(client, shape.compute, shape.max_positions);
    let module = step::prefill(&Context::new(), config, &shape, Output::Logits).unwrap().bytecode();
    let program = client.compile(module, 1).unwrap();
    let kv_type = shape.kv_type(config);
    // Poison: whatever is read before it was written shows.
    let poison = vec![f64::NAN; kv_type.len()];
    let mut kv = client.upload(&HostTensor::from_f64(compute, &kv_type.dims, &poison), 0).unwrap();
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
            HostTensor::scalar(0f32),
            HostTensor::scalar(1i32),
            HostTensor::scalar(1f32),
            HostTensor::zeros(Element::U32, &[2]),
        ];
        let arguments = arguments.iter().map(|tensor| Arg::Donate(client.upload(tensor, 0).unwrap()));
        let all = model.weights().iter().map(Arg::Keep).chain([Arg::Donate(kv)]).chain(arguments).collect();
        let mut results = program.run(all).unwrap();
        let values = results.pop().unwrap().values::<f32>().unwrap();
        kv = results.pop().unwrap();
        logits.extend(values.chunks(config.vocab_size).take(part.len()).map(<[f32]>::to_vec));
    }
    logits
}

/// The largest difference of two lists of logits.
fn largest_difference(logits: &[Vec<f32>], expected: &[Vec<f64>]) -> f64 {
    assert_eq!(logits.len(), expected.len());
    let pairs = logits.iter().flatten().zip(expected.iter().flatten());
    pairs.map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
}

/// The largest error of one position's logits, relative, in the Euclidean norm.
fn largest_relative_error(logits: &[Vec<f32>], expected: &[Vec<f64>]) -> f64 {
    assert_eq!(logits.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let errors = logits.iter().zip(expected).map(|(logits, expected)| {
        let differences = &mut logits.iter().zip(expected).map(|(a, b)| f64::from(*a) - b);
        norm(differences) / norm(&mut expected.iter().copied())
    });
    errors.fold(0.0, f64::max)
}

#[test]
fn logits_match_the_reference_however_the_prompt_is_cut() {
    let (golden, model) = (golden(), Model::tiny());
    let reference = model.reference();
    let tokens = reference.greedy(&golden[0].0, 200 - golden[0].0.len());
    let tokens = [golden[0].0.clone(), tokens].concat();
    let expected = reference.logits(&tokens);
    let client = client();
    pagoda_engine::native::register_all(client.plugin()).unwrap();
    for (target, rows) in TARGETS.into_iter().flat_map(|target| [200, 7, 1].map(|rows| (target, rows))) {
        let started = std::time::Instant::now();
        let logits = logits_in_chunks(&client, &model, (Element::F32, target), &tokens, rows);
        let worst = largest_difference(&logits, &expected);
        // Logits are of order 10 and f32 carries 24 bits; sums over 768 terms in four layers cost about two digits.
        eprintln!("{target}, prefilled by {rows}: largest difference {worst:.1e} {:?}", started.elapsed());
        assert!(worst <= 1e-4, "{target}, prefilled by {rows}: logits differ by {worst:e}");
        let started = std::time::Instant::now();
        let logits = logits_in_chunks(&client, &model, (Element::Bf16, target), &tokens, rows);
        let worst = largest_relative_error(&logits, &expected);
        eprintln!(
            "{target}, prefilled by {rows}: bf16 {worst:.2e} {:?} {:.2e}",
            started.elapsed(),
            largest_difference(&logits, &expected)
        );
    }
    let text = |max_prefill_size| {
        let limits = Limits { max_prefill_size, ..limits() };
        let mut engine = engine(limits, Element::F32, Target::Host, SamplingOptions::GREEDY, StopRule::default());
        run(&mut engine, vec![request(0, &tokens, 60)]).remove(&0).unwrap().tokens
    };
    let at_once = text(200);
    assert_eq!(text(7), at_once);
    assert_eq!(text(1), at_once);
    assert_eq!(at_once, reference.greedy(&tokens, 60));
}

/// 100 prompts of 1 to 20 tokens, cut from the golden texts.
fn hundred_prompts() -> Vec<Vec<u32>> {
    let text: Vec<u32> = golden().into_iter().flat_map(|(prompt, new)| [&prompt[1..], &new].concat()).collect();
    (0..100).map(|i| [&[0], &text[(i * 7) % (text.len() - 20)..][..i % 20]].concat()).collect()
}

#[test]
fn a_hundred_prompts_share_eight_slots_and_each_yields_what_it_yields_alone() {
    let prompts = hundred_prompts();
    let longest = prompts.iter().map(Vec::len).max().unwrap() + 256;
    let page_size = PageSize::new(16).unwrap();
    let limits = Limits { max_pages: 8 * page_size.pages_for(longest), ..limits() };
    let mut engine = engine(limits, Element::F32, Target::Host, SamplingOptions::GREEDY, StopRule::default());
    let requests = prompts.iter().enumerate().map(|(index, prompt)| request(index, prompt, 256));
    let together = run(&mut engine, requests.collect());
    assert_eq!(together.len(), 100);
    for (index, prompt) in prompts.iter().enumerate() {
        let alone = run(&mut engine, vec![request(index, prompt, 256)]);
        assert_eq!(together[&index].tokens.len(), 256);
        assert_eq!(together[&index], alone[&index], "prompt {index}");
    }
}

#[test]
fn sampling_depends_on_the_seed_and_stops_where_it_should() {
    let golden = golden();
    let prompt = &golden[0].0;
    let options = |seed| SamplingOptions { temperature: 0.8, top_k: None, top_p: Some(0.95), seed };
    let sample = |sampling, stop: StopRule| {
        let mut engine = engine(limits(), Element::F32, Target::Host, sampling, stop);
        let mut requests = vec![request(0, prompt, 40), request(1, prompt, 40)];
        requests.push(Request { id: SampleId { round: 0, index: 0, generation: 1 }, ..request(0, prompt, 40) });
        let mut finished = Vec::new();
        let keep = |sample: Finished| {
            finished.push(((sample.id.index, sample.id.generation), sample));
            Ok(())
        };
        engine.run(requests, &AtomicBool::new(false), keep, |_| ()).unwrap();
        finished.into_iter().collect::<BTreeMap<_, _>>()
    };
    let (first, again, other) = (
        sample(options(7), StopRule::default()),
        sample(options(7), StopRule::default()),
        sample(options(8), StopRule::default()),
    );
    assert_eq!(first, again);
    assert_ne!(first[&(0, 0)].tokens, other[&(0, 0)].tokens);
    assert_ne!(first[&(0, 0)].tokens, first[&(1, 0)].tokens, "prompts draw their own numbers");
    assert_ne!(first[&(0, 0)].tokens, first[&(0, 1)].tokens, "generations draw their own numbers");

    // The device stops at an end-of-text token, the host at a stop sequence; both in the middle of a decode call.
    let greedy = &golden[0].1;
    let end = greedy[10];
    let first_at = greedy.iter().position(|&id| id == end).unwrap();
    let stopped = sample(SamplingOptions::GREEDY, StopRule::new([end], vec![]));
    assert_eq!(stopped[&(0, 0)].tokens, greedy[..=first_at]);
    assert_eq!((stopped[&(0, 0)].text_tokens, stopped[&(0, 0)].reason), (first_at, FinishReason::Stop));
    let pair = greedy[20..22].to_vec();
    let first_at = greedy.windows(2).position(|window| window == pair).unwrap();
    let stopped = sample(SamplingOptions::GREEDY, StopRule::new([], vec![pair]));
    assert_eq!(stopped[&(0, 0)].tokens, greedy[..first_at + 2]);
    assert_eq!(stopped[&(0, 0)].text_tokens, first_at);
}
