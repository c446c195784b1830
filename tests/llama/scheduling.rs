//! How steps are cut changes no text: slots, rounds, chunks, shared pages, batches, submission while it runs. Mixed steps
//! may, where two tokens are equally likely to within rounding; they are held to greedy texts, where no two are.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use pagoda_engine::generate::{Engine, EngineOptions, SamplingOptions, StepKind, Timing};
use pagoda_engine::llama::{Parallel, Target};
use pagoda_engine::scheduler::{Finished, Limits, Request};
use pagoda_engine::stop::FinishReason;
use pagoda_engine::units::{PageSize, SampleId};
use pagoda_kernels::chips::Chip;

use super::support::*;

const NEW: usize = 24;
const GENERATIONS: u32 = 3;
const SAMPLED: SamplingOptions = SamplingOptions { temperature: 0.8, top_k: Some(50), top_p: Some(0.95), seed: 3 };

/// Three samples of each of six prompts, of up to five pages.
fn requests() -> Vec<Request> {
    let prompts = golden().into_iter().map(|(prompt, new)| [prompt, new].concat());
    let prompts = prompts.flat_map(|text| [text[..text.len() / 2].to_vec(), text]).enumerate();
    let sample = |index, generation| SampleId { round: 0, index, generation };
    prompts
        .flat_map(|(index, prompt)| (0..GENERATIONS).map(move |generation| (sample(index, generation), prompt.clone())))
        .map(|(id, prompt)| Request { id, prompt: prompt.into(), max_new_tokens: NEW })
        .collect()
}

struct Cut {
    max_seqs: usize,
    max_rounds: usize,
    max_prefill_size: usize,
    mixed_steps: bool,
    reuse_prefixes: bool,
}

fn engine(cut: &Cut, target: Target, sampling: SamplingOptions) -> Engine {
    let limits = Limits {
        max_seq_len: 128,
        max_seqs: cut.max_seqs,
        max_pages: 8 * cut.max_seqs,
        page_size: PageSize::new(16).unwrap(),
        max_seqs_in_prefill: cut.max_seqs,
        max_prefill_size: cut.max_prefill_size,
        max_rounds: cut.max_rounds,
    };
    let client = client();
    let &Cut { mixed_steps, reuse_prefixes, .. } = cut;
    let options = EngineOptions { sampling, mixed_steps, reuse_prefixes, ..greedy_options(limits, target) };
    let model = Model::tiny().on_device(&client, &options.shape(&Parallel::ONE));
    Engine::new(&client, model, options).unwrap()
}

/// The samples of a run, what it took, and the prompt rows that it computed.
fn run(engine: &mut Engine) -> (BTreeMap<SampleId, Finished>, Timing, usize) {
    let (mut finished, mut rows) = (BTreeMap::new(), 0);
    let keep = |sample: Finished| {
        assert!(finished.insert(sample.id, sample).is_none(), "a sample finished twice");
        Ok(())
    };
    let count = |step: &pagoda_engine::generate::Progress| {
        rows += if step.step.kind == StepKind::Decode { 0 } else { step.step.rows };
    };
    let timing = engine.run(requests(), &AtomicBool::new(false), keep, count).unwrap();
    let prompt_rows = rows - timing.mixed_tokens;
    (finished, timing, prompt_rows)
}

#[test]
fn the_text_does_not_depend_on_how_steps_are_cut() {
    let whole = Cut { max_seqs: 8, max_rounds: 64, max_prefill_size: 256, mixed_steps: false, reuse_prefixes: true };
    let cuts = [
        Cut { max_seqs: 4, max_rounds: 1, max_prefill_size: 256, mixed_steps: false, reuse_prefixes: false },
        Cut { max_seqs: 8, max_rounds: 1, max_prefill_size: 24, mixed_steps: false, reuse_prefixes: true },
        Cut { max_seqs: 4, max_rounds: 64, max_prefill_size: 7, mixed_steps: false, reuse_prefixes: true },
        Cut { max_seqs: 1, max_rounds: 5, max_prefill_size: 64, mixed_steps: false, reuse_prefixes: true },
        Cut { max_seqs: 8, max_rounds: 64, max_prefill_size: 64, mixed_steps: true, reuse_prefixes: true },
        Cut { max_seqs: 4, max_rounds: 1, max_prefill_size: 24, mixed_steps: true, reuse_prefixes: true },
    ];
    let all_rows: usize = requests().iter().map(|request| request.prompt.len()).sum();
    for sampling in [SamplingOptions::GREEDY, SAMPLED] {
        let (expected, timing, rows) = run(&mut engine(&whole, Target::Host, sampling));
        assert_eq!((expected.len(), timing.mixed_calls), (6 * GENERATIONS as usize, 0));
        assert!(expected.values().all(|sample| sample.tokens.len() == NEW && sample.reason == FinishReason::Length));
        assert!(rows < all_rows * 3 / 4, "{rows} of {all_rows} prompt rows, though prompts share pages");
        for cut in cuts.iter().filter(|cut| !cut.mixed_steps || sampling == SamplingOptions::GREEDY) {
            let (found, timing, _) = run(&mut engine(cut, Target::Host, sampling));
            assert_eq!(timing.mixed_calls > 0, cut.mixed_steps);
            assert_eq!(found, expected, "{} slots, {} rounds", cut.max_seqs, cut.max_rounds);
        }
    }
}

#[test]
fn every_form_of_the_kernels_takes_mixed_steps_and_shared_pages() {
    let cut = Cut { max_seqs: 4, max_rounds: 8, max_prefill_size: 64, mixed_steps: true, reuse_prefixes: true };
    let expected = run(&mut engine(&cut, Target::Host, SamplingOptions::GREEDY)).0;
    for target in [Target::Portable, Target::TileMachine(Chip::V5p)] {
        let (found, timing, _) = run(&mut engine(&cut, target, SamplingOptions::GREEDY));
        assert!(timing.mixed_calls > 0);
        assert_eq!(found, expected, "{target}");
    }
}

#[test]
fn samples_are_submitted_cancelled_and_batched_while_it_runs() {
    let cut = Cut { max_seqs: 4, max_rounds: 5, max_prefill_size: 64, mixed_steps: true, reuse_prefixes: true };
    let mut engine = engine(&cut, Target::Host, SamplingOptions::GREEDY);
    let expected = run(&mut engine).0;
    let requests = requests();

    // Two at a time; every fifth is cancelled in the step after.
    let (mut coming, mut ended) = (requests.iter(), BTreeMap::new());
    loop {
        let new: Vec<&Request> = coming.by_ref().take(2).collect();
        new.iter().for_each(|request| engine.submit((*request).clone()).unwrap());
        let Some(finished) = engine.poll().unwrap() else { break };
        ended.extend(finished.into_iter().map(|sample| (sample.id, sample)));
        let cancelled =
            new.iter().filter(|request| request.id.index == 4).filter_map(|request| engine.cancel(request.id));
        ended.extend(cancelled.map(|sample| (sample.id, sample)));
    }
    assert_eq!(ended.len(), requests.len());
    for (id, sample) in &ended {
        match sample.reason {
            FinishReason::Cancelled => {
                assert!(id.index == 4 && expected[id].tokens.starts_with(&sample.tokens));
            }
            _ => assert_eq!(sample, &expected[id]),
        }
    }
    assert!(ended.values().any(|sample| sample.reason == FinishReason::Cancelled));
    assert!(engine.take_timing().first_token_s > 0.0);

    // In batches of one prompt: no two prompts run at once, and none is lost.
    let ids: Vec<SampleId> = requests.iter().map(|request| request.id).collect();
    let batches = pagoda_engine::scheduler::batches(&ids, Some(1));
    let mut rest = requests.iter().cloned();
    let batches: Vec<Vec<Request>> = batches.map(|batch| rest.by_ref().take(batch.len()).collect()).collect();
    let mut order = Vec::new();
    let keep = |sample: Finished| {
        order.push(sample.id.index);
        assert_eq!(sample, expected[&sample.id]);
        Ok(())
    };
    engine.run_batches(batches, &AtomicBool::new(false), keep, |_| ()).unwrap();
    assert!(order.is_sorted() && order.len() == requests.len());
}
