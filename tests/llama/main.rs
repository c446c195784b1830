//! The step programs and the generation loop: on the tiny model, against golden tokens and the f64 reference; on small
//! drawn models of every kind that is read; and what a program for a TPU holds.

mod families;
mod meshes;
mod scheduling;
mod support;
mod targets;
mod variants;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use pagoda_engine::generate::{Engine, EngineOptions, SamplingOptions};
use pagoda_engine::llama::step::StepShape;
use pagoda_engine::llama::{KvCache, Parallel, Target};
use pagoda_engine::scheduler::{Finished, Limits, Request};
use pagoda_engine::stop::{FinishReason, StopRule};
use pagoda_engine::units::{PageSize, SampleId};
use pagoda_ir::Element;
use pagoda_kernels::check::unit_roundoff;

use support::*;

fn engine(limits: Limits, compute: Element, target: Target, sampling: SamplingOptions, stop: StopRule) -> Engine {
    Model::tiny().engine(limits, compute, target, sampling, stop)
}

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
        let logits = logits_in_chunks(&client, &model, (Element::F32, target), &[&tokens], rows);
        let worst = largest_difference(&logits[0], &expected);
        // Logits are of order 10 and f32 carries 24 bits; sums over 768 terms in four layers cost about two digits.
        assert!(worst <= 1e-4, "{target}, prefilled by {rows}: logits differ by {worst:e}");
        eprintln!("{target}, prefilled by {rows}: largest difference {worst:.1e}");
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

/// Along a given text (teacher forcing), so that one token that is chosen otherwise does not end the comparison.
#[test]
fn bf16_logits_stay_within_the_error_of_their_roundings() {
    let (model, client) = (Model::tiny(), client());
    let reference = model.reference();
    pagoda_engine::native::register_all(client.plugin()).unwrap();
    let texts = golden().into_iter().map(|(prompt, new)| [prompt, new].concat());
    let texts: Vec<_> = texts.map(|tokens| (reference.logits(&tokens), tokens)).collect();
    let bound = bf16_error(&model.config);
    // The bound has teeth: a text without its first token is beyond it.
    for (expected, tokens) in &texts {
        let without = reference.logits(&tokens[1..]);
        let single = |row: &Vec<f64>| row.iter().map(|&x| x as f32).collect();
        let error = largest_relative_error(&without.iter().map(single).collect::<Vec<_>>(), &expected[1..]);
        assert!(error > 2.0 * bound, "{error:.4}");
    }
    let tokens: Vec<&[u32]> = texts.iter().map(|(_, tokens)| tokens.as_slice()).collect();
    for (target, rows) in TARGETS.into_iter().flat_map(|target| [64, 7].map(|rows| (target, rows))) {
        let logits = logits_in_chunks(&client, &model, (Element::Bf16, target), &tokens, rows);
        for (logits, (expected, _)) in logits.iter().zip(&texts) {
            let worst = largest_relative_error(logits, expected);
            assert!(
                worst <= bound,
                "{target}, prefilled by {rows}: logits differ by {worst:.4}, {bound:.4} is allowed"
            );
            eprintln!("{target}, bf16, prefilled by {rows}: {worst:.4}, {bound:.4} is allowed");
        }
    }
}

/// Keys and values are rounded once each in every layer, and nothing else is that shows: the error of `2 layers` roundings in
/// series, which grows with the root of their number (see [`bf16_error`]). Both forms round to the same numbers.
#[test]
fn a_narrow_cache_costs_the_roundings_of_its_numbers() {
    let (model, client) = (Model::tiny(), client());
    pagoda_engine::native::register_all(client.plugin()).unwrap();
    let (prompt, new) = golden().swap_remove(0);
    let tokens = [prompt, new].concat();
    let expected = model.reference().logits(&tokens);
    for (cache, roundoff) in [
        (KvCache::of(Element::Bf16), unit_roundoff(Element::Bf16)),
        (KvCache::scaled(Element::F8E4M3Fn, 1.0), unit_roundoff(Element::F8E4M3Fn)),
        (KvCache::scaled(Element::F8E5M2, 0.25), unit_roundoff(Element::F8E5M2)),
        // Steps of 0.1 are within 2^-4 of numbers of order 1.
        (KvCache::scaled(Element::I8, 0.1), unit_roundoff(Element::F8E4M3Fn)),
    ] {
        let bound = ((2 * model.config.layers.len()) as f64).sqrt() * roundoff;
        let of = |target| logits_by_cache(&client, &model, (Element::F32, cache, target), &[&tokens], 16).remove(0);
        let [portable, host] = [Target::Portable, Target::Host].map(of);
        for (target, logits) in [("stablehlo", &portable), ("native", &host)] {
            let worst = largest_relative_error(logits, &expected);
            eprintln!("{cache}, {target}: {worst:.4}, {bound:.4} is allowed");
            assert!(worst <= bound && worst > bound / 64.0, "{cache}, {target}: {worst:.4}, {bound:.4} is allowed");
        }
        let other: Vec<Vec<f64>> = host.iter().map(|row| row.iter().map(|&x| x.into()).collect()).collect();
        let apart = largest_relative_error(&portable, &other);
        assert!(apart <= bound / 16.0, "{cache}: the forms are {apart:.5} apart");
    }
    let shape = |target| {
        let kv_cache = KvCache::scaled(Element::F8E4M3Fn, 1.0);
        let options = EngineOptions { compute: Element::Bf16, kv_cache, ..greedy_options(limits(), target) };
        options.shape(&Parallel::ONE)
    };
    // Half the memory.
    let narrow = shape(Target::Host);
    let wide = StepShape { kv_cache: KvCache::of(Element::Bf16), ..narrow.clone() };
    assert_eq!(2 * narrow.kv_type(&model.config).bytes(), wide.kv_type(&model.config).bytes());
}

#[test]
fn bf16_decodes_what_exact_logits_allow() {
    let golden = golden();
    for target in TARGETS {
        let mut engine = engine(limits(), Element::Bf16, target, SamplingOptions::GREEDY, StopRule::default());
        let requests = golden.iter().enumerate().map(|(index, (prompt, _))| request(index, prompt, 48)).collect();
        let finished = run(&mut engine, requests);
        for (index, (prompt, _)) in golden.iter().enumerate() {
            assert_eq!(finished[&index].tokens.len(), 48);
            check_greedy_bf16(&Model::tiny(), prompt, &finished[&index].tokens);
        }
    }
}

/// 100 prompts of 1 to 20 tokens, cut from the golden texts.
fn hundred_prompts() -> Vec<Vec<u32>> {
    let text: Vec<u32> = golden().into_iter().flat_map(|(prompt, new)| [&prompt[1..], &new].concat()).collect();
    (0..100).map(|i| [&[0], &text[(i * 7) % (text.len() - 20)..][..i % 20]].concat()).collect()
}

/// Runs a hundred prompts over eight slots, then each alone: every `whole`th to its end, of the others how they begin, since
/// alone each token is a step of its own.
fn check_hundred_prompts(whole: usize) {
    let prompts = hundred_prompts();
    let longest = prompts.iter().map(Vec::len).max().unwrap() + 256;
    let page_size = PageSize::new(16).unwrap();
    let limits = Limits { max_pages: 8 * page_size.pages_for(longest), ..limits() };
    let mut engine = engine(limits, Element::F32, Target::Host, SamplingOptions::GREEDY, StopRule::default());
    let requests = prompts.iter().enumerate().map(|(index, prompt)| request(index, prompt, 256));
    let together = run(&mut engine, requests.collect());
    assert_eq!(together.len(), 100);
    for (index, prompt) in prompts.iter().enumerate() {
        let tokens = if index.is_multiple_of(whole) { 256 } else { 32 };
        let alone = run(&mut engine, vec![request(index, prompt, tokens)]);
        assert_eq!(together[&index].tokens.len(), 256);
        match tokens {
            256 => assert_eq!(together[&index], alone[&index], "prompt {index}"),
            _ => assert_eq!(together[&index].tokens[..tokens], alone[&index].tokens, "prompt {index}"),
        }
    }
}

#[test]
fn a_hundred_prompts_share_eight_slots_and_each_yields_what_it_yields_alone() {
    check_hundred_prompts(8);
}

#[test]
#[ignore = "takes minutes: make nightly"]
fn a_hundred_prompts_yield_what_each_yields_alone_in_fresh_runs() {
    check_hundred_prompts(1);
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
