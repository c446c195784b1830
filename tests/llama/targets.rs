//! What the step programs for a TPU hold, and that its compiler takes them.

use std::collections::BTreeSet;

use pagoda_engine::certify::{Certifier, Program};
use pagoda_engine::llama::step::{self, Output, StepShape};
use pagoda_engine::llama::{Target, weight_types};
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
    }
}

/// Prefill and decode, as text.
fn programs(target: Target) -> [String; 2] {
    let (model, shape, context) = (Model::tiny(), shape(target), Context::new());
    let sampling = Sampling::Random { top_k: true, top_p: true };
    let prefill = step::prefill(&context, &model.config, &shape, Output::Tokens(sampling)).unwrap();
    let decode = step::decode(&context, &model.config, &shape, sampling, &[1]).unwrap();
    [prefill, decode].map(|module| {
        module.verify().unwrap();
        module.text()
    })
}

/// The words that follow `before` in `text`, up to `end`.
fn words<'t>(text: &'t str, before: &str, end: char) -> Vec<&'t str> {
    text.split(before).skip(1).map(|rest| rest.split(end).next().unwrap()).collect()
}

#[test]
fn programs_for_a_tpu_carry_its_kernels() {
    let layers = Model::tiny().config.layers;
    for chip in [Chip::V5p, Chip::V6e] {
        let [prefill, decode] = programs(Target::Tpu(chip));
        for (name, text) in [("prefill", &prefill), ("decode", &decode)] {
            // Five kernels a layer and the head; nothing that only the CPU plugin knows.
            let targets = words(text, "stablehlo.custom_call @", '(');
            assert_eq!(targets, vec!["tpu_custom_call"; 5 * layers + 1], "{name}");
            let names = words(text, "kernel_name = \"", '"');
            assert_eq!(names.len(), targets.len(), "{name}");
            // Layers share kernels: query-key-value, output, gate-up, down and head, beside attention.
            let distinct: BTreeSet<_> = names.iter().copied().collect();
            assert_eq!(distinct.iter().filter(|name| name.starts_with("matmul")).count(), 5, "{distinct:?}");
            assert_eq!(distinct.iter().filter(|name| name.starts_with("rpa")).count(), 1, "{distinct:?}");
            // All matmuls are kernels, so that no precision is asked of XLA's.
            assert!(!text.contains("dot_general") && !text.contains("HIGHEST"), "{name}");

            // The KV buffer, which comes behind the weights, is given away, and nothing else is.
            let kv = weight_types(&Model::tiny().config, &shape(Target::Tpu(chip))).len();
            assert_eq!(words(text, "tf.aliasing_output = ", ' ').len(), 1, "{name}");
            let arguments = &text[text.find("@main(").unwrap()..];
            let donated = arguments[..arguments.find("tf.aliasing_output").unwrap()].rfind("%arg").unwrap();
            assert!(arguments[donated..].starts_with(&format!("%arg{kv}:")), "{name}");
        }
    }
}

/// The tile machine runs the very kernels that the TPU gets, at the same places.
#[test]
fn the_tile_machine_gets_the_same_kernels() {
    for (tpu, machine) in programs(Target::Tpu(Chip::V5p)).iter().zip(&programs(Target::TileMachine(Chip::V5p))) {
        assert!(!machine.contains("tpu_custom_call"));
        let bodies = |text: &str| -> Vec<String> {
            let bodies =
                words(&text.replace("\\22", "\""), "\"body\": \"", '"').into_iter().map(str::to_owned).collect();
            bodies
        };
        assert_eq!(bodies(tpu).len(), 5 * Model::tiny().config.layers + 1);
        assert_eq!(bodies(tpu), bodies(machine));
    }
}

#[test]
#[ignore = "takes libtpu and a minute: make certify-all"]
fn libtpu_compiles_the_step_programs() {
    let certifier = Certifier::find(env!("CARGO_BIN_EXE_pagoda")).expect("libtpu: run `make tpu-tools`").in_program();
    let kv = shape(Target::Tpu(Chip::V5p)).kv_type(&Model::tiny().config);
    for text in programs(Target::Tpu(Chip::V5p)) {
        let certificate = certifier.certify("v5p:2x2x1", Program { module: text.as_bytes(), replicas: 1 }).unwrap();
        assert!(certificate.compiles(), "{certificate}");
        assert!(!certificate.kernels.is_empty(), "{certificate}");
        let memory = certificate.memory.unwrap();
        assert!(memory.aliased >= kv.bytes() as i64, "the KV buffer stays where it is: {memory:?}");
    }
}
