//! Llamas of every kind that is read, small, with weights drawn from a seed: each form of the kernels against the f64
//! reference.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;

use half::bf16;
use pagoda_engine::generate::{EngineOptions, SamplingOptions};
use pagoda_engine::llama::{KvCache, Parallel, Target};
use pagoda_engine::model::config::LlamaConfig;
use pagoda_engine::model::quantization::{Quantization, Scales};
use pagoda_engine::scheduler::Limits;
use pagoda_engine::stop::StopRule;
use pagoda_engine::units::PageSize;
use pagoda_ir::random::SplitMix64;
use pagoda_ir::{Element, HostTensor};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::support::*;

const VOCAB: usize = 256;

/// A `quantization_config` of compressed-tensors.
fn compressed(kind: &str, strategy: &str, group: Option<usize>, inputs: bool) -> Value {
    let token = json!({"num_bits": 8, "type": kind, "strategy": "token", "symmetric": true, "dynamic": true});
    json!({"quant_method": "compressed-tensors", "format": format!("{kind}-quantized"),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": kind,
            "strategy": strategy, "group_size": group, "symmetric": true, "dynamic": false},
            "input_activations": if inputs { token } else { Value::Null }}}})
}

/// What the variants differ in, beside the defaults of [`write`].
fn variants() -> [(&'static str, Value); 9] {
    [
        (
            "biases around attention, linear rope, no architectures",
            json!({"attention_bias": true, "rope_scaling": {"type": "linear", "factor": 4.0}, "architectures": null}),
        ),
        (
            "biases in the MLP, one KV head, untied",
            json!({"mlp_bias": true, "num_key_value_heads": 1, "tie_word_embeddings": false}),
        ),
        (
            "all biases, untied, a hidden size and heads that do not match",
            json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false, "hidden_size": 192,
                "num_attention_heads": 6}),
        ),
        (
            "one layer, wide heads, as many KV heads as query heads, Llama 3's rope",
            json!({"num_hidden_layers": 1, "head_dim": 128, "num_key_value_heads": 4, "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32, "rope_theta": 1e3}}),
        ),
        (
            "linear rope in its new place, all biases, one layer",
            json!({"num_hidden_layers": 1, "attention_bias": true, "mlp_bias": true,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ),
        (
            "i8, a scale per output feature, all biases, untied: the head too",
            json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false,
                "quantization_config": compressed("int", "channel", None, false)}),
        ),
        (
            "Mistral: a window that is smaller than the text",
            json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5}),
        ),
        (
            "Qwen2: biases of query, key and value, and none of the output; a window that is off",
            json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 4,
                "use_sliding_window": false, "num_hidden_layers": 2}),
        ),
        ("e4m3 in groups of 64", json!({"quantization_config": compressed("float", "group", Some(64), false)})),
    ]
}

/// Models whose projections quantize their inputs, too.
fn quantized_inputs() -> [(&'static str, Value); 2] {
    [
        (
            "i8 on both sides, one layer",
            json!({"num_hidden_layers": 1, "quantization_config": compressed("int", "channel", None, true)}),
        ),
        (
            "fp8 of vLLM, untied",
            json!({"tie_word_embeddings": false, "quantization_config": {"quant_method": "fp8",
                "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}}),
        ),
    ]
}

/// A projection as the file has it, of values around 0 with a deviation: in bf16, or quantized as `how` says.
fn projection(
    random: &mut SplitMix64,
    name: &str,
    [out, from]: [usize; 2],
    deviation: f64,
    how: Option<&Quantization>,
) -> Vec<(String, Vec<usize>, Dtype, Vec<u8>)> {
    let mut uniform = |count: usize, most: f64| -> Vec<f64> {
        (0..count).map(|_| most * ((random.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0)).collect()
    };
    let of = |name: String, dims: &[usize], dtype, element, values: &[f64]| {
        (name, dims.to_vec(), dtype, HostTensor::from_f64(element, &[values.len()], values).bytes().to_vec())
    };
    let Some(how) = how else {
        let values = uniform(out * from, deviation * 3f64.sqrt());
        return vec![of(format!("{name}.weight"), &[out, from], Dtype::BF16, Element::Bf16, &values)];
    };
    let dtype = if how.weight == Element::I8 { Dtype::I8 } else { Dtype::F8_E4M3 };
    let stored = uniform(out * from, Quantization::most(how.weight));
    let dims = match how.scales {
        Scales::Tensor => vec![],
        Scales::Channel => vec![out, 1],
        Scales::Group(group) => vec![out, from / group],
    };
    // Between one half and three halves of what gives the deviation.
    let usual = deviation * 3f64.sqrt() / Quantization::most(how.weight);
    let scales: Vec<f64> = uniform(dims.iter().product(), 0.5).into_iter().map(|part| usual * (1.0 + part)).collect();
    vec![
        of(format!("{name}.weight"), &[out, from], dtype, how.weight, &stored),
        of(format!("{name}.weight_scale"), &dims, Dtype::F32, Element::F32, &scales),
    ]
}

/// Writes a model: a configuration with `changes`, and weights drawn from `seed`, in bf16 (quantized ones: in 8 bits), so
/// that both compute types have the same ones.
fn write(folder: &Path, changes: &Value, seed: u64) {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 128,
        "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "tie_word_embeddings": true, "max_position_embeddings": 128,
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let [vocab, hidden, inner, layers] =
        ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"].map(size);
    let [q, kv] = ["num_attention_heads", "num_key_value_heads"].map(|heads| size(heads) * size("head_dim"));
    let on = |key: &str| config[key] == true;

    let parsed = LlamaConfig::parse(Path::new("config.json"), &config).unwrap();
    let quantization = parsed.quantization.as_ref();
    let mut random = SplitMix64::new(seed);
    // Uniform around `mean`, with the deviation given.
    let draw = |random: &mut SplitMix64, name: String, dims: &[usize], mean: f64, deviation: f64| {
        let values = (0..dims.iter().product()).flat_map(|_| {
            let unit = (random.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
            bf16::from_f64(mean + deviation * 3f64.sqrt() * unit).to_le_bytes()
        });
        (name, dims.to_vec(), Dtype::BF16, values.collect::<Vec<u8>>())
    };
    let random = &mut random;
    let mut tensors = vec![draw(random, "model.embed_tokens.weight".into(), &[vocab, hidden], 0.0, 0.5)];
    for layer in 0..layers {
        let prefix = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push(draw(random, format!("{prefix}.{norm}.weight"), &[hidden], 1.0, 0.3));
        }
        for (name, out, from, bias) in [
            ("self_attn.q_proj", q, hidden, "attention_bias"),
            ("self_attn.k_proj", kv, hidden, "attention_bias"),
            ("self_attn.v_proj", kv, hidden, "attention_bias"),
            ("self_attn.o_proj", hidden, q, "attention_bias"),
            ("mlp.gate_proj", inner, hidden, "mlp_bias"),
            ("mlp.up_proj", inner, hidden, "mlp_bias"),
            ("mlp.down_proj", hidden, inner, "mlp_bias"),
        ] {
            // A gain of one: layers do not amplify errors.
            let deviation = 1.0 / (from as f64).sqrt();
            tensors.extend(projection(random, &format!("{prefix}.{name}"), [out, from], deviation, quantization));
            let qwen = config["model_type"] == "qwen2" && name.starts_with("self_attn") && name != "self_attn.o_proj";
            if on(bias) || qwen {
                tensors.push(draw(random, format!("{prefix}.{name}.bias"), &[out], 0.0, 0.5));
            }
        }
    }
    tensors.push(draw(random, "model.norm.weight".into(), &[hidden], 1.0, 0.3));
    if !on("tie_word_embeddings") {
        let quantization = quantization.filter(|quantization| quantization.head);
        tensors.extend(projection(random, "lm_head", [vocab, hidden], 0.5, quantization));
    }
    let views = tensors
        .iter()
        .map(|(name, dims, dtype, bytes)| (name.as_str(), TensorView::new(*dtype, dims.clone(), bytes).unwrap()));
    fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

/// How far logits may be from each other, relative, where two forms round the inputs of projections to 8 bits, each on its
/// own: by a step, uniformly (i8: a 127th of the largest of some hundred values, three deviations; e4m3: up to 2^-4 of each
/// value), in four places a layer and before the head. Errors of independent signs grow with the root.
fn input_error(config: &LlamaConfig) -> f64 {
    let Some(quantization) = config.quantization.filter(|quantization| quantization.activations) else { return 0.0 };
    let one = match quantization.weight {
        Element::I8 => 3.0 / 127.0 / 12f64.sqrt(),
        _ => 2f64.powi(-4) / 3f64.sqrt(),
    };
    one * (2.0 * (4 * config.layers + 1) as f64).sqrt()
}

/// Checks one model in some forms, each split over so many devices: logits of a text in f32 and bf16; and decoding, beside
/// another sequence and an idle slot.
fn check(name: &str, changes: &Value, seed: u64, forms: &[(Target, usize)]) {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), changes, seed);
    let model = Model::open(folder.path());
    let reference = model.reference();
    let mut random = SplitMix64::new(!seed);
    let tokens: Vec<u32> = (0..40).map(|_| random.below(model.config.vocab_size) as u32).collect();
    let expected = reference.logits(&tokens);
    pagoda_engine::native::register_all(client().plugin()).unwrap();
    for &(target, shards) in forms {
        let context = format!("{name}, seed {seed}, {target}, over {shards}: {:?}", model.config);
        let client = client_of(shards);
        // Prefilled at once; and in chunks so small that the kernels in Rust take them.
        let chunks = if target == Target::Host { &[40, 9][..] } else { &[40] };
        for (compute, &rows) in
            [Element::F32, Element::Bf16].into_iter().flat_map(|c| chunks.iter().map(move |r| (c, r)))
        {
            let logits = logits_in_chunks(&client, &model, (compute, target), &[&tokens], rows);
            let worst = largest_relative_error(&logits[0], &expected);
            // In f32 roundings are 2^16 times finer, and those of the sums count too: they are less than 8 times as many.
            // Of inputs that are rounded to 8 bits, fewer fall on the other side in f32; one that does shows in sums of few.
            let (finer, fewer) = if compute == Element::F32 { (8192.0, 2.0) } else { (1.0, 1.0) };
            let bound = bf16_error(&model.config) / finer + input_error(&model.config) / fewer;
            assert!(worst <= bound, "{context}, {compute} by {rows}: logits differ by {worst:e}, {bound:e} is allowed");
        }
        let limits = Limits {
            max_seq_len: 48,
            max_seqs: 3,
            max_pages: 9,
            page_size: PageSize::new(16).unwrap(),
            max_seqs_in_prefill: 3,
            max_prefill_size: 24,
            max_rounds: 8,
        };
        let options = EngineOptions {
            limits,
            compute: Element::F32,
            kv_cache: KvCache::of(Element::F32),
            target,
            sampling: SamplingOptions::GREEDY,
            stop: StopRule::default(),
            mixed_steps: false,
        };
        let mut engines = model.replicas(mesh(1, shards), &options);
        let prompts = [&tokens[..7], &tokens[7..30]];
        let requests = prompts.iter().enumerate().map(|(index, prompt)| request(index, prompt, 12 + index)).collect();
        let finished = run_replicas(&mut engines, requests);
        for (index, prompt) in prompts.iter().enumerate() {
            assert_eq!(finished[&index].tokens, reference.greedy(prompt, 12 + index), "{context}");
        }
    }
}

#[test]
fn every_kind_of_llama_agrees_with_the_reference() {
    for (seed, (name, changes)) in variants().iter().enumerate() {
        check(name, changes, seed as u64, &TARGETS.map(|target| (target, 1)));
    }
}

#[test]
fn models_that_quantize_inputs_agree_with_the_reference() {
    for (seed, (name, changes)) in quantized_inputs().iter().enumerate() {
        check(name, changes, seed as u64, &TARGETS.map(|target| (target, 1)));
    }
}

/// Models of sizes that do not come out even, and over how many devices they are split.
fn split_variants() -> [(&'static str, Value, usize); 4] {
    [
        (
            "one KV head that all shards have, all biases, an odd vocabulary",
            json!({"num_key_value_heads": 1, "attention_bias": true, "mlp_bias": true, "vocab_size": 257}),
            4,
        ),
        (
            "two KV heads for four shards, untied, a short last part of the vocabulary, an odd inner width",
            json!({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": false,
                "vocab_size": 130, "intermediate_size": 201}),
            4,
        ),
        (
            "three shards, biases around attention",
            json!({"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 192, "vocab_size": 100,
                "attention_bias": true, "intermediate_size": 100}),
            3,
        ),
        (
            "two shards of wide heads, biases in the MLP, untied, one layer, an inner width whose half fills up to it",
            json!({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 1,
                "mlp_bias": true, "tie_word_embeddings": false, "intermediate_size": 128}),
            2,
        ),
    ]
}

#[test]
fn split_models_agree_with_the_reference() {
    for (seed, (name, changes, shards)) in split_variants().iter().enumerate() {
        check(name, changes, seed as u64, &[(TARGETS[seed % TARGETS.len()], *shards)]);
    }
}

#[test]
#[ignore = "takes minutes: make nightly"]
fn split_models_agree_with_the_reference_in_fresh_forms() {
    for (name, changes, shards) in &split_variants() {
        check(name, changes, RandomState::new().hash_one(name), &TARGETS.map(|target| (target, *shards)));
    }
    for _ in 0..8 {
        let seed = RandomState::new().hash_one("drawn");
        let (changes, forms) = drawn(seed);
        check("drawn", &changes, seed, &forms);
    }
}

/// A model drawn from `seed`, and a split of it for each form.
fn drawn(seed: u64) -> (Value, Vec<(Target, usize)>) {
    let mut random = SplitMix64::new(seed);
    let mut from = |choices: &[usize]| choices[random.below(choices.len())];
    let (kv, group) = (from(&[1, 2, 3, 4]), from(&[1, 2, 3, 4]));
    let changes = json!({
        "num_attention_heads": kv * group, "num_key_value_heads": kv, "head_dim": from(&[32, 64, 128]),
        "hidden_size": from(&[64, 128, 192]), "intermediate_size": from(&[100, 128, 257, 384]),
        "vocab_size": from(&[64, 97, 130, 255]), "num_hidden_layers": from(&[1, 2]),
        "attention_bias": from(&[0, 1]) == 1, "mlp_bias": from(&[0, 1]) == 1,
        "tie_word_embeddings": from(&[0, 1]) == 1,
    });
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &changes, 0);
    let config = LlamaConfig::open(folder.path()).unwrap();
    let splits: Vec<usize> =
        (1..=8).filter(|&shards| Parallel::group(mesh(1, shards).model).check(&config).is_ok()).collect();
    (changes, TARGETS.map(|target| (target, from(&splits))).to_vec())
}

#[test]
#[ignore = "other weights in every run: make nightly"]
fn every_kind_of_llama_agrees_with_the_reference_for_fresh_seeds() {
    for (name, changes) in &variants() {
        check(name, changes, RandomState::new().hash_one(name), &TARGETS.map(|target| (target, 1)));
    }
}
