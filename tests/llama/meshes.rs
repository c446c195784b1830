//! One text whatever the mesh: the tiny model in every form, greedy against the golden tokens and random against one
//! device, whatever the batch and the length of a call are.

use std::collections::BTreeMap;

use pagoda_engine::generate::{EngineOptions, SamplingOptions};
use pagoda_engine::llama::{Group, Parallel, Target};
use pagoda_engine::mesh::Mesh;
use pagoda_engine::replicas::Replicas;
use pagoda_engine::scheduler::{Finished, Limits};
use pagoda_kernels::chips::Chip;

use super::support::*;

const RANDOM: SamplingOptions = SamplingOptions { temperature: 0.8, top_k: Some(40), top_p: Some(0.95), seed: 7 };

/// A run of the golden prompts.
#[derive(Clone, Copy, Debug)]
struct Case {
    mesh: (usize, usize),
    target: Target,
    max_seqs: usize,
    max_rounds: usize,
    tokens: usize,
}

impl Case {
    fn options(&self, sampling: SamplingOptions) -> EngineOptions {
        let limits = Limits {
            max_seqs: self.max_seqs,
            max_seqs_in_prefill: self.max_seqs,
            max_rounds: self.max_rounds,
            ..limits()
        };
        EngineOptions { sampling, mixed_steps: true, ..greedy_options(limits, self.target) }
    }

    fn run(&self, sampling: SamplingOptions) -> BTreeMap<usize, Finished> {
        let mut engines = Model::tiny().replicas(mesh(self.mesh.0, self.mesh.1), &self.options(sampling));
        let golden = golden();
        let requests = golden.iter().enumerate().map(|(index, (prompt, _))| request(index, prompt, self.tokens));
        run_replicas(&mut engines, requests.collect())
    }
}

/// Checks the texts of one case, where `random` is one device's text.
fn check(case: Case, sampling: SamplingOptions, random: &BTreeMap<usize, Finished>) {
    let golden = golden();
    for (index, sample) in case.run(sampling) {
        let expected = if sampling == RANDOM { &random[&index].tokens } else { &golden[index].1 };
        assert_eq!(sample.tokens, expected[..case.tokens], "{case:?}, {sampling:?}");
    }
}

/// One device's random text.
fn alone(tokens: usize) -> BTreeMap<usize, Finished> {
    Case { mesh: (1, 1), target: Target::Host, max_seqs: 8, max_rounds: 32, tokens }.run(RANDOM)
}

const MESHES: [(usize, usize); 5] = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)];

#[test]
fn every_mesh_yields_the_same_text() {
    let random = alone(48);
    let machine = Target::TileMachine(Chip::V5p);
    let greedy = SamplingOptions::GREEDY;
    let cases = [
        ((2, 1), Target::Host, 8, 1, 48, greedy),
        ((1, 2), Target::Host, 4, 64, 48, RANDOM),
        ((1, 4), Target::Host, 4, 1, 48, greedy),
        ((1, 4), Target::Host, 8, 64, 48, RANDOM),
        ((1, 2), Target::Portable, 8, 1, 24, greedy),
        ((2, 2), Target::Portable, 4, 64, 24, greedy),
        ((2, 2), machine, 4, 64, 6, RANDOM),
        ((1, 4), machine, 8, 1, 3, greedy),
    ];
    for (mesh, target, max_seqs, max_rounds, tokens, sampling) in cases {
        check(Case { mesh, target, max_seqs, max_rounds, tokens }, sampling, &random);
    }
}

#[test]
#[ignore = "takes a quarter of an hour: make nightly"]
fn every_mesh_yields_the_same_text_in_every_form_and_fresh_batch() {
    let random = alone(48);
    for (mesh, target) in MESHES.into_iter().flat_map(|mesh| TARGETS.map(|target| (mesh, target))) {
        let tokens = if matches!(target, Target::TileMachine(_)) { 8 } else { 48 };
        for (max_seqs, max_rounds) in [(4, 1), (4, 64), (8, 1), (8, 64)] {
            let case = Case { mesh, target, max_seqs, max_rounds, tokens };
            for sampling in [SamplingOptions::GREEDY, RANDOM] {
                check(case, sampling, &random);
            }
        }
    }
}

/// Groups on devices of their own choice, the first devices left out; more prompts than slots; batches.
#[test]
fn replicas_share_a_queue_whatever_devices_they_have() {
    let (model, client) = (Model::tiny(), client_of(6));
    let case = Case { mesh: (3, 2), target: Target::Host, max_seqs: 2, max_rounds: 8, tokens: 48 };
    let groups = [2, 1].map(|replica| Group::replica(mesh(3, 2), replica));
    assert_eq!(groups.each_ref().map(Group::devices), [vec![4, 5], vec![2, 3]]);
    let options = case.options(SamplingOptions::GREEDY);
    let mut engines = Replicas::of_groups(&client, &model.config, &model.weights, groups, &options).unwrap();
    let golden = golden();
    let requests =
        || golden.iter().enumerate().map(|(index, (prompt, _))| request(index, prompt, 48)).collect::<Vec<_>>();
    for _ in 0..2 {
        let finished = run_replicas(&mut engines, requests());
        for (index, (_, expected)) in golden.iter().enumerate() {
            assert_eq!(&finished[&index].tokens, expected);
        }
    }
    // A prompt that can never run is refused before any runs; an error of the caller's ends all engines.
    let (cancel, mut count) = (Default::default(), 0);
    let endless = request(99, &[1], 10_000);
    let keep = |_| {
        count += 1;
        Ok(())
    };
    let refused = engines.run(requests().into_iter().chain([endless]), &cancel, keep, |_| ()).unwrap_err();
    assert!(refused.to_string().contains("exceed engine.max_seq_len = 320"), "{refused}");
    assert_eq!(count, 0);
    let full = |_| Err(pagoda_engine::Error::runtime("writing")("the disk is full"));
    let failed = engines.run(requests(), &cancel, full, |_| ()).unwrap_err();
    assert_eq!(failed.to_string(), "writing: the disk is full");
    // Where a run ended so, the next one begins afresh, and its steps are counted over all engines.
    let mut most = 0;
    let timing = engines.run(requests(), &cancel, |_| Ok(()), |progress| most = most.max(progress.tokens)).unwrap();
    assert_eq!(most, 48 * golden.len());
    assert_eq!(timing.decode_tokens + timing.mixed_tokens + golden.len(), 48 * golden.len());
}

#[test]
fn a_mesh_that_does_not_divide_the_model_is_refused() {
    let (model, options) = (Model::tiny(), {
        let case = Case { mesh: (1, 1), target: Target::Host, max_seqs: 2, max_rounds: 8, tokens: 4 };
        case.options(SamplingOptions::GREEDY)
    });
    let three: Mesh = mesh(1, 3);
    let error = Replicas::load(&client_of(3), &model.config, &model.weights, three, &options).err().unwrap();
    assert_eq!(error.to_string(), "mesh model = 3 does not divide num_attention_heads = 4: use model = 1, 2 or 4");
    assert_eq!(error.exit_code(), 2);
    assert!(Parallel::group(three.model).check(&model.config).is_err());
    let absent = Replicas::load(&client_of(1), &model.config, &model.weights, mesh(1, 2), &options).err().unwrap();
    assert!(absent.to_string().contains("device 1 of 1"), "{absent}");
}
