//! What the step programs for a TPU hold, and that its compiler takes them.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;

use pagoda_engine::certify::{Certifier, Program};
use pagoda_engine::llama::step::{self, Output, StepShape};
use pagoda_engine::llama::{Parallel, Target, weight_types};
use pagoda_engine::mpi;
use pagoda_engine::sampler::Sampling;
use pagoda_ir::{Context, Element};
use pagoda_kernels::chips::Chip;

use super::support::*;

fn shape(target: Target) -> StepShape {
    StepShape {
        prefill_rows: 64,
        slots: 8,
        pages: 8 * 4,
        page_size: 128,
        pages_per_seq: 4,
        max_positions: 512,
        max_rounds: 16,
        compute: Element::Bf16,
        target,
        parallel: Parallel::ONE,
    }
}

/// Prefill and decode, as text.
fn programs(target: Target) -> [String; 2] {
    programs_of(&shape(target), Sampling::Random { top_k: true, top_p: true })
}

fn programs_of(shape: &StepShape, sampling: Sampling) -> [String; 2] {
    let (model, context) = (Model::tiny(), Context::new());
    let prefill = step::prefill(&context, &model.config, shape, Output::Tokens(sampling)).unwrap();
    let decode = step::decode(&context, &model.config, shape, sampling, &[1]).unwrap();
    [prefill, decode].map(|module| {
        module.verify().unwrap();
        module.text()
    })
}

/// What stands between `before` and `after`, wherever it does in `text`.
fn between<'t>(text: &'t str, before: &str, after: &str) -> Vec<&'t str> {
    text.split(before).skip(1).map(|rest| rest.split(after).next().unwrap()).collect()
}

/// The Mosaic kernels of a program, in the order of their calls.
fn bodies(text: &str) -> Vec<&str> {
    between(text, "body\\22:\\22", "\\22")
}

#[test]
fn programs_for_a_tpu_carry_its_kernels() {
    let config = Model::tiny().config;
    for chip in [Chip::V5p, Chip::V6e] {
        let target = Target::Tpu(chip);
        let kv = weight_types(&config, &shape(target)).len();
        for text in programs(target) {
            // Four matmuls and attention a layer, and the head; nothing that only the CPU plugin knows.
            let calls = between(&text, "call_target_name = \"", "\"");
            assert_eq!(calls, vec!["tpu_custom_call"; 5 * config.layers + 1]);
            let names = between(&text, "kernel_name = \"", "\"");
            let count = |prefix| names.iter().filter(|name| name.starts_with(prefix)).count();
            assert_eq!([count("matmul-"), count("rpa-")], [4 * config.layers + 1, config.layers], "{names:?}");
            // All layers call the same five.
            assert_eq!(bodies(&text).into_iter().collect::<BTreeSet<_>>().len(), 6);
            // All matmuls are kernels: no precision is asked of a product of XLA's.
            assert!(!text.contains("dot_general") && !text.contains("HIGHEST"));
            // The KV buffer, which comes behind the weights, is given away for the first result, and nothing else is.
            assert_eq!(between(&text, "tf.aliasing_output = ", " "), ["0"]);
            let (before, _) = text.split_once("tf.aliasing_output").unwrap();
            assert!(before[before.rfind("%arg").unwrap()..].starts_with(&format!("%arg{kv}:")));
        }
    }
}

#[test]
fn programs_for_the_host_call_five_kernels_a_layer() {
    let layers = Model::tiny().config.layers;
    let [_, decode] = programs(Target::Host);
    let calls = between(&decode, "call_target_name = \"", "\"");
    let count = |name| calls.iter().filter(|call| **call == name).count();
    assert_eq!([count("pagoda_matmul"), count("pagoda_rpa"), calls.len()], [4 * layers + 1, layers, 5 * layers + 1]);
    // Nothing is emitted for any other place.
    let portable = programs(Target::Portable);
    assert!(portable.iter().all(|text| !text.contains("custom_call")));
}

#[test]
fn the_tile_machine_runs_the_kernels_that_a_tpu_gets() {
    let [tpu, machine] = [Target::Tpu(Chip::V5p), Target::TileMachine(Chip::V5p)].map(programs);
    for (tpu, machine) in tpu.iter().zip(&machine) {
        assert!(!machine.contains("tpu_custom_call"));
        assert!(!bodies(tpu).is_empty());
        assert_eq!(bodies(tpu), bodies(machine));
    }
}

/// A program of two shards has two sums a layer and one for the embeddings, and gathers maxima or logits once; it has the
/// kernels of half the model.
#[test]
fn shards_exchange_two_sums_a_layer() {
    let layers = Model::tiny().config.layers;
    let two = NonZeroUsize::new(2).unwrap();
    let greedy_and_random = [Sampling::Greedy, Sampling::Random { top_k: false, top_p: false }];
    for (target, sampling) in [Target::Portable, Target::Host, Target::TileMachine(Chip::V5p), Target::Tpu(Chip::V5p)]
        .into_iter()
        .flat_map(|target| greedy_and_random.map(|sampling| (target, sampling)))
    {
        let shape = StepShape { parallel: Parallel::group(two), ..shape(target) };
        for text in programs_of(&shape, sampling) {
            assert!(text.contains("mhlo.num_replicas = 2"));
            let count = |op: &str| text.matches(&format!("\"stablehlo.{op}\"")).count();
            assert_eq!([count("all_reduce"), count("all_gather")], [2 * layers + 1, 1], "{target}, {sampling:?}");
            assert!(!text.contains(mpi::ALL_REDUCE));
        }
        let shape = StepShape { parallel: Parallel::processes(two), ..shape };
        for text in programs_of(&shape, sampling) {
            assert!(!text.contains("num_replicas") && !text.contains("stablehlo.all_"));
            assert_chained(&text, 2 * layers + 2);
        }
    }
}

/// Each of `count` calls of MPI takes the result of the last one, so that they run in order.
fn assert_chained(text: &str, count: usize) {
    let calls: Vec<[&str; 3]> = text
        .lines()
        .filter(|line| line.contains(&format!("call_target_name = \"{}\"", mpi::ALL_REDUCE)))
        .map(|line| {
            let (result, rest) = line.trim().split_once(" = ").unwrap();
            let (x, last) = between(rest, "(", ")")[0].split_once(", ").unwrap();
            [result, x, last]
        })
        .collect();
    assert_eq!(calls.len(), count);
    assert_eq!(calls[0][1], calls[0][2], "the first has nothing to wait for");
    for pair in calls.windows(2) {
        assert_eq!(pair[1][2], pair[0][0]);
    }
}

#[test]
#[ignore = "takes libtpu: make certify-all"]
fn libtpu_compiles_the_step_programs() {
    let certifier = Certifier::find(env!("CARGO_BIN_EXE_pagoda")).expect("libtpu: run `make tpu-tools`").in_program();
    let target = Target::Tpu(Chip::V5p);
    let kv = shape(target).kv_type(&Model::tiny().config);
    for text in programs(target) {
        let certificate = certifier.certify("v5p:2x2x1", Program { module: text.as_bytes(), replicas: 1 }).unwrap();
        assert!(certificate.compiles() && !certificate.kernels.is_empty(), "{certificate}");
        let memory = certificate.memory.unwrap();
        assert!(memory.aliased >= kv.bytes() as i64, "the KV buffer is updated in place: {memory:?}");
    }
}
