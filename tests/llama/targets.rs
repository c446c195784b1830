//! What the step programs for a TPU hold, and that its compiler takes them.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::{Duration, Instant};

use pagoda_engine::certify::report::KernelVmem;
use pagoda_engine::certify::{Certifier, Program};
use pagoda_engine::llama::step::{self, Output, StepShape};
use pagoda_engine::llama::{KvCache, Parallel, Target, weight_types};
use pagoda_engine::model::ModelSpec;
use pagoda_engine::mpi;
use pagoda_engine::sampler::Sampling;
use pagoda_ir::stablehlo::Module;
use pagoda_ir::{Context, Element};
use pagoda_kernels::Choices;
use pagoda_kernels::chips::Chip;
use serde_json::json;

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
        matrices: Element::Bf16,
        kv_cache: KvCache::of(Element::Bf16),
        target,
        parallel: Parallel::ONE,
    }
}

/// Prefill and decode.
fn modules<'c>(context: &'c Context, config: &ModelSpec, shape: &StepShape, sampling: Sampling) -> [Module<'c>; 2] {
    let prefill = step::prefill(context, config, shape, Output::Tokens(sampling)).unwrap();
    [prefill, step::decode(context, config, shape, sampling, &[1]).unwrap()]
}

/// Prefill and decode, as text.
fn programs(target: Target) -> [String; 2] {
    programs_of(&shape(target), Sampling::Random { top_k: true, top_p: true, log_probabilities: false })
}

fn programs_of(shape: &StepShape, sampling: Sampling) -> [String; 2] {
    modules(&Context::new(), &Model::tiny().config, shape, sampling).map(|module| {
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
            // Four matmuls and attention in the loop over layers, and the head; nothing that only the CPU plugin knows.
            let calls = between(&text, "call_target_name = \"", "\"");
            assert_eq!(calls, vec!["tpu_custom_call"; 6]);
            let names = between(&text, "kernel_name = \"", "\"");
            let count = |prefix| names.iter().filter(|name| name.starts_with(prefix)).count();
            assert_eq!([count("matmul-"), count("rpa-")], [5, 1], "{names:?}");
            assert_eq!(bodies(&text).into_iter().collect::<BTreeSet<_>>().len(), 6);
            assert_eq!(between(&text, "cost_estimate", "}").len(), 6);
            // All matmuls are kernels: no precision is asked of a product of XLA's.
            assert!(!text.contains("dot_general") && !text.contains("HIGHEST"));
            // The KV buffer, which comes behind the weights, is given away for the first result, and nothing else is.
            assert_eq!(between(&text, "tf.aliasing_output = ", " "), ["0"]);
            let (before, _) = text.split_once("tf.aliasing_output").unwrap();
            assert!(before[before.rfind("%arg").unwrap()..].starts_with(&format!("%arg{kv}:")));
        }
    }
}

/// A loop over layers of two kinds has their attention twice and all else once, however many layers there are: with a window and
/// without, as two kernels; with positions and without, as one.
#[test]
fn layers_of_two_kinds_share_all_but_attention() {
    let sizes = |class: &str, kind: &str| {
        json!({"architectures": [class], "model_type": kind, "hidden_size": 512, "intermediate_size": 1536,
            "num_hidden_layers": 13, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
            "vocab_size": 1000, "sliding_window": 64})
    };
    for (class, kind, kernels) in [("Gemma3ForCausalLM", "gemma3_text", 2), ("SmolLM3ForCausalLM", "smollm3", 1)] {
        let config = ModelSpec::parse(Path::new("config.json"), &sizes(class, kind)).unwrap();
        assert_eq!(config.kinds().len(), 2);
        let shape = shape(Target::Tpu(Chip::V5p));
        for module in modules(&Context::new(), &config, &shape, Sampling::Greedy) {
            module.verify().unwrap();
            let text = module.text();
            assert_eq!(text.matches("\"stablehlo.case\"").count(), 1);
            // Four matmuls, attention in two branches, the head.
            assert_eq!(bodies(&text).len(), 7);
            assert_eq!(bodies(&text).into_iter().collect::<BTreeSet<_>>().len(), 5 + kernels, "{kind}");
            let names = module.text_with_names();
            assert_eq!(names.contains("layer.attention.window_attention\""), kernels == 2, "{kind}");
        }
    }
}

#[test]
fn programs_for_the_host_call_five_kernels_a_layer() {
    let layers = Model::tiny().config.layers.len();
    let [_, decode] = programs(Target::Host);
    let calls = between(&decode, "call_target_name = \"", "\"");
    let count = |name| calls.iter().filter(|call| **call == name).count();
    let counts = [count("pagoda_take"), count("pagoda_matmul"), count("pagoda_rpa"), calls.len()];
    assert_eq!(counts, [1, 4 * layers + 1, layers, 5 * layers + 2]);
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
    let config = Model::tiny().config;
    let two = NonZeroUsize::new(2).unwrap();
    let greedy_and_random =
        [Sampling::Greedy, Sampling::Random { top_k: false, top_p: false, log_probabilities: false }];
    for (target, sampling) in [Target::Portable, Target::Host, Target::TileMachine(Chip::V5p), Target::Tpu(Chip::V5p)]
        .into_iter()
        .flat_map(|target| greedy_and_random.map(|sampling| (target, sampling)))
    {
        let shape = StepShape { parallel: Parallel::group(two), ..shape(target) };
        // A loop's body has those of one layer.
        let sums = if shape.stacks_layers(&config) { 2 } else { 2 * config.layers.len() };
        for text in programs_of(&shape, sampling) {
            assert!(text.contains("mhlo.num_replicas = 2"));
            let count = |op: &str| text.matches(&format!("\"stablehlo.{op}\"")).count();
            assert_eq!([count("all_reduce"), count("all_gather")], [sums + 1, 1], "{target}, {sampling:?}");
            assert!(!text.contains(mpi::ALL_REDUCE));
        }
        let shape = StepShape { parallel: Parallel::processes(two), ..shape };
        for text in programs_of(&shape, sampling) {
            assert!(!text.contains("num_replicas") && !text.contains("stablehlo.all_"));
            let waits = match shape.stacks_layers(&config) {
                // What a loop carries depends on the sums before it, and what comes behind it on its own.
                true => vec![None, None, Some(1), Some(0)],
                false => (0..sums + 2).map(|call: usize| call.checked_sub(1)).collect(),
            };
            assert_chained(&text, &waits);
        }
    }
}

/// Each call of MPI takes the result of the one that it waits for, so that they run in order.
fn assert_chained(text: &str, waits: &[Option<usize>]) {
    let calls: Vec<[&str; 3]> = text
        .lines()
        .filter(|line| line.contains(&format!("call_target_name = \"{}\"", mpi::ALL_REDUCE)))
        .map(|line| {
            let (result, rest) = line.trim().split_once(" = ").unwrap();
            let (x, last) = between(rest, "(", ")")[0].split_once(", ").unwrap();
            [result, x, last]
        })
        .collect();
    assert_eq!(calls.len(), waits.len());
    for ([_, x, last], wait) in calls.iter().zip(waits) {
        assert_eq!(*last, wait.map_or(*x, |earlier| calls[earlier][0]));
    }
}

/// What the operations of a step are called, in reports of compilers.
#[test]
fn operations_are_called_by_what_they_belong_to() {
    let parts = ["qkv", "attention", "output", "gate_up", "down"];
    let config = Model::tiny().config;
    for (target, layer) in [(Target::Tpu(Chip::V5p), "layer"), (Target::Host, "layer3")] {
        for module in modules(&Context::new(), &config, &shape(target), Sampling::Greedy) {
            let text = module.text_with_names();
            let names: BTreeSet<_> = between(&text, "loc(\"", "\")").into_iter().collect();
            let of_layer = parts.map(|part| format!("{layer}.{part}"));
            for name in of_layer.iter().map(String::as_str).chain(["embedding", "head", "sampler"]) {
                assert!(names.contains(name), "{target} lacks {name}: {names:?}");
            }
        }
    }
}

/// A model and a batch of any sizes, as `config.json` and as a step on some chip.
fn drawn(seed: u64) -> (ModelSpec, StepShape) {
    let mut choices = Choices::of_seed(seed);
    let (kv_heads, group) = (choices.one_of(&[1, 2, 4, 5, 8, 10]), choices.within(1, 8));
    let head_dim = choices.one_of(&[64, 80, 96, 128, 256]);
    let (hidden, inner) = (choices.within(500, 9000), choices.within(500, 20_000));
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": choices.within(1, 3), "head_dim": head_dim,
        "num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads,
        "vocab_size": choices.within(1000, 200_000), "max_position_embeddings": 8192,
        "attention_bias": choices.coin(), "mlp_bias": choices.coin(), "tie_word_embeddings": choices.coin(),
    });
    let page_size = choices.one_of(&[16, 32, 64, 128, 256]);
    let compute = choices.one_of(&[Element::Bf16, Element::F32]);
    let (slots, pages_per_seq) = (choices.within(1, 64), choices.within(1, 4096 / page_size));
    let shape = StepShape {
        prefill_rows: choices.within(1, 1024),
        slots,
        pages: slots * pages_per_seq,
        page_size,
        pages_per_seq,
        max_positions: page_size * pages_per_seq,
        compute,
        matrices: compute,
        kv_cache: KvCache::of(compute),
        ..shape(Target::Tpu(choices.one_of(&Chip::ALL)))
    };
    (ModelSpec::parse(Path::new("config.json"), &config).unwrap(), shape)
}

/// Every kernel of a step can be planned, whatever its sizes.
#[test]
fn models_of_any_shape_have_programs() {
    for seed in 0..40 {
        let ((config, shape), context) = (drawn(seed), Context::new());
        step::prefill(&context, &config, &shape, Output::Tokens(Sampling::Greedy))
            .and_then(|_| step::decode(&context, &config, &shape, Sampling::Greedy, &[1]))
            .unwrap_or_else(|error| panic!("seed {seed}: {error}\n{config:?}\n{shape:?}"));
    }
}

#[test]
#[ignore = "takes libtpu: make certify-all"]
fn libtpu_compiles_models_of_any_shape() {
    let certifier = Certifier::find(env!("CARGO_BIN_EXE_pagoda")).expect("libtpu: run `make tpu-tools`");
    let certifier = certifier.in_program().without_profile().timeout(Duration::from_secs(600));
    let mut wrong = String::new();
    for seed in 0..4 {
        let ((config, shape), context) = (drawn(seed), Context::new());
        let Target::Tpu(chip) = shape.target else { unreachable!("they are drawn for TPUs") };
        let decode = step::decode(&context, &config, &shape, Sampling::Greedy, &[1]).unwrap().bytecode();
        let prefill = step::prefill(&context, &config, &shape, Output::Tokens(Sampling::Greedy)).unwrap().bytecode();
        for (program, module) in [("decode", decode), ("prefill", prefill)] {
            match certifier.certify(chip.info().topology, Program { module: &module, replicas: 1 }) {
                Ok(certificate) if certificate.compiles() => eprintln!(
                    "seed {seed}, {program} on {chip}: {:.1} s, {:?}",
                    certificate.seconds,
                    certificate.memory.unwrap()
                ),
                Ok(certificate) => wrong += &format!("seed {seed}, {program}: {certificate}\n{config:?}\n{shape:?}\n"),
                Err(error) => wrong += &format!("seed {seed}, {program}: {error}\n{config:?}\n{shape:?}\n"),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// Shapes of models that people run, by the keys of their `config.json`.
fn models() -> [(&'static str, serde_json::Value); 4] {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    let of = |sizes: [usize; 7], more: serde_json::Value| {
        let [hidden, inner, layers, q_heads, kv_heads, head_dim, vocab] = sizes;
        let mut config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": q_heads,
            "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
            "max_position_embeddings": 131_072, "rope_theta": 5e5, "rms_norm_eps": 1e-5});
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    };
    [
        ("Llama 3.1 8B", of([4096, 14336, 32, 32, 8, 128, 128_256], json!({"rope_scaling": llama3}))),
        (
            "Llama 3.2 1B: small heads, tied",
            of(
                [2048, 8192, 16, 32, 8, 64, 128_256],
                json!({
            "rope_scaling": llama3, "tie_word_embeddings": true}),
            ),
        ),
        ("Llama 3.1 70B, 2 layers", of([8192, 28672, 2, 64, 8, 128, 128_256], json!({"rope_scaling": llama3}))),
        // Qwen 2.5 7B's sizes, with biases on more projections than it has, and a vocabulary of no whole tiles.
        (
            "28 heads, biases, an odd vocabulary",
            of(
                [3584, 18944, 2, 28, 4, 128, 151_669],
                json!({
            "attention_bias": true, "mlp_bias": true}),
            ),
        ),
    ]
}

/// Compiles prefill and decode of `config` for `chip`; in place, and named.
fn assert_compiles(name: &str, config: &serde_json::Value, chip: Chip) {
    let certifier = Certifier::find(env!("CARGO_BIN_EXE_pagoda")).expect("libtpu: run `make tpu-tools`");
    let certifier = certifier.in_program().without_profile().timeout(Duration::from_secs(600));
    let config = ModelSpec::parse(Path::new("config.json"), config).unwrap();
    let pages_per_seq = 36;
    let shape = StepShape {
        prefill_rows: 1024,
        pages: 8 * pages_per_seq,
        pages_per_seq,
        max_positions: 128 * pages_per_seq,
        ..shape(Target::Tpu(chip))
    };
    let (context, sampling) = (Context::new(), Sampling::Greedy);
    let started = Instant::now();
    let prefill = step::prefill(&context, &config, &shape, Output::Tokens(sampling)).unwrap().bytecode();
    let decode = step::decode(&context, &config, &shape, sampling, &[128_001, 128_009]).unwrap().bytecode();
    eprintln!("{name} on {chip}: emitted in {:.2?}", started.elapsed());
    for (program, module) in [("decode", decode), ("prefill", prefill)] {
        let topology = chip.info().topology;
        let certificate = certifier.certify(topology, Program { module: &module, replicas: 1 });
        let certificate = certificate.unwrap_or_else(|error| panic!("{name}, {program} on {chip}: {error}"));
        assert!(certificate.compiles(), "{name}, {program}: {certificate}");
        let (memory, mib) = (certificate.memory.unwrap(), |bytes: i64| bytes as f64 / f64::from(1 << 20));
        eprintln!(
            "{name}, {program} on {chip}: {:.1} s, code {:.1} MiB, arguments {:.0}, temporaries {:.1}, aliased {:.0}",
            certificate.seconds,
            mib(memory.code),
            mib(memory.arguments),
            mib(memory.temporaries),
            mib(memory.aliased),
        );
        let kv = shape.kv_type(&config);
        assert!(memory.aliased >= kv.bytes() as i64, "the KV buffer is updated in place: {memory:?}");
        // No weight is copied: a layer's alone would be far more.
        let activations = (shape.prefill_rows * (config.hidden_size + 2 * config.mlp.inner()) * 4) as i64;
        assert!(memory.temporaries < 4 * activations, "{name}, {program} on {chip}: {memory:?}");
        for part in ["qkv", "attention", "output", "gate_up", "down"].map(|part| format!("layer.{part}")) {
            let named = |kernel: &&KernelVmem| kernel.name.starts_with(&part);
            assert_eq!(certificate.kernels.iter().filter(named).count(), 1, "{part}: {certificate}");
        }
    }
}

#[test]
#[ignore = "takes libtpu: make certify-all"]
fn libtpu_compiles_the_step_programs() {
    let models = models();
    for (name, config) in &models {
        assert_compiles(name, config, Chip::V5p);
    }
    // 8B on every other chip, as far as its weights fit.
    for chip in Chip::ALL.into_iter().filter(|&chip| chip != Chip::V5p) {
        let mut config = models[0].1.clone();
        config["num_hidden_layers"] = json!(4);
        assert_compiles("8B, 4 layers", &config, chip);
    }
}
