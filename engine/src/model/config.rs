//! `config.json` and `generation_config.json`: what the model is.
//!
//! `families` has a function per `model_type`. Absent keys take the defaults of the family's class in Hugging
//! Face's transformers. Every key that is not read must be one that changes nothing of the function computed (`DESCRIPTIVE`):
//! any other is refused by name, as is a value that asks for what is not implemented.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::families::{FAMILIES, Family};
use super::read_json;
use super::spec::ModelSpec;
use crate::error::{Error, Result};

/// Keys that say how a model was made, named, stored or trained, or how a library samples from it: none of them changes the
/// logits. So do all that begin with an underscore, and what tools leave behind (`TOOLS`).
const DESCRIPTIVE: &[&str] = &[
    "architectures",
    "model_type",
    "name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "auto_map",
    "custom_pipelines",
    "tokenizer_class",
    "model_max_length",
    "max_sequence_length",
    "prefix",
    "finetuning_task",
    "task_specific_params",
    "problem_type",
    "id2label",
    "label2id",
    "num_labels",
    // Training.
    "initializer_range",
    "initializer_factor",
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "gradient_checkpointing",
    "pretraining_tp",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "tie_encoder_decoder",
    "pruned_heads",
    "use_bfloat16",
    "tf_legacy_loss",
    "fused_linear_cross_entropy",
    // Tokens that the engine does not add.
    "pad_token_id",
    "sep_token_id",
    "unk_token_id",
    "decoder_start_token_id",
    // How a library calls it.
    "use_cache",
    "return_dict",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "torchscript",
    "attn_implementation",
    "cache_implementation",
    "chunk_size_feed_forward",
    "num_logits_to_keep",
    "is_llama_config",
    "is_decoder",
    "cross_attention_hidden_size",
    // How it samples.
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "early_stopping",
    "max_length",
    "min_length",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "num_return_sequences",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
];

/// What keys of tools begin with.
const TOOLS: &[&str] = &["_", "unsloth_", "transformers.js"];

impl ModelSpec {
    /// Reads `config.json` and, if there is one, `generation_config.json` of a model folder.
    ///
    /// # Errors
    /// When a file cannot be read, a key is missing or inconsistent, or the model is not one that Pagoda runs.
    pub fn open(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::setting(
                "hf_checkpoint",
                folder.display(),
                "is not a folder",
                "give the folder that holds config.json, tokenizer.json and the safetensors files",
            ));
        }
        let path = folder.join("config.json");
        let mut spec = Self::parse(&path, &read_json(&path)?)?;
        let path = folder.join("generation_config.json");
        if path.exists() {
            let value = read_json(&path)?;
            let object = Object::new(&path, &value, "")?;
            if let Some(eos) = object.token_ids("eos_token_id", spec.vocab_size)? {
                spec.eos_token_ids = eos;
            }
        }
        Ok(spec)
    }

    /// Checks the content of a `config.json`; `path` is named in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn parse(path: &Path, value: &Value) -> Result<Self> {
        let object = Object::new(path, value, "")?;
        object.fixed("is_encoder_decoder", &[json!(false)])?;
        object.fixed("add_cross_attention", &[json!(false)])?;
        let spec = (family(&object)?.read)(&object)?;
        object.finish()?;
        Ok(spec)
    }
}

/// The family of a config.
///
/// # Errors
/// When neither `architectures` nor `model_type` names one, or they name two.
fn family(object: &Object<'_>) -> Result<&'static Family> {
    let classes: Vec<_> = FAMILIES.iter().map(|family| family.class).collect();
    let fix = format!("use a model of class {}", classes.join(", "));
    let class = object.get("architectures");
    let by_class = class.map(|names| {
        let family = FAMILIES.iter().find(|family| *names == json!([family.class]));
        family.ok_or_else(|| object.refuse("architectures", names, "is not supported", fix.as_str()))
    });
    let kind = object.get("model_type");
    let by_type = kind.map(|name| {
        let family = FAMILIES.iter().find(|family| *name == family.model_type);
        family.ok_or_else(|| object.refuse("model_type", name, "is not supported", fix.as_str()))
    });
    match (by_class.transpose()?, by_type.transpose()?) {
        (Some(family), Some(other)) if family.model_type != other.model_type => Err(object.refuse(
            "model_type",
            other.model_type,
            "is not the type of the class in architectures",
            "repair config.json",
        )),
        (Some(family), _) | (None, Some(family)) => Ok(family),
        (None, None) => Err(Error::file(object.path, "architectures is missing, and so is model_type", fix)),
    }
}

/// A JSON object that knows its file and its own dotted path, for errors, and which of its keys were read.
pub(super) struct Object<'a> {
    pub(super) path: &'a Path,
    prefix: String,
    map: &'a Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Object<'a> {
    fn new(path: &'a Path, value: &'a Value, prefix: &str) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { path, prefix: prefix.to_owned(), map, read: RefCell::default() }),
            _ => Err(Error::file(path, "it does not hold a JSON object", "download the file again")),
        }
    }

    pub(super) fn refuse(
        &self,
        key: &str,
        value: impl std::fmt::Display,
        limit: impl std::fmt::Display,
        fix: impl Into<String>,
    ) -> Error {
        Error::file(PathBuf::from(self.path), format!("{}{key} = {value} {limit}", self.prefix), fix)
    }

    /// Refuses keys that nobody has read, unless they change nothing.
    pub(super) fn finish(&self) -> Result<()> {
        let read = self.read.borrow();
        let harmless = |key: &str| DESCRIPTIVE.contains(&key) || TOOLS.iter().any(|tool| key.starts_with(tool));
        let unknown =
            self.map.iter().find(|(key, value)| !(value.is_null() || read.contains(key.as_str()) || harmless(key)));
        unknown.map_or(Ok(()), |(key, value)| {
            let kind = "is not a key that this model type is known to have, and may change what is computed";
            Err(self.refuse(key, value, kind, "remove it if it changes nothing, or use another model"))
        })
    }

    /// The value of `key`; null counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.raw(key).filter(|value| !value.is_null())
    }

    /// The value of `key`, null included.
    pub(super) fn raw(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.map.get(key)
    }

    /// Refuses any value but these: others change the model.
    pub(super) fn fixed(&self, key: &str, allowed: &[Value]) -> Result<()> {
        match self.get(key) {
            Some(value) if !allowed.contains(value) => {
                let fix = match allowed {
                    [] => "use a model without it".to_owned(),
                    [first, ..] => format!("use a model with {key} = {first}"),
                };
                Err(self.refuse(key, value, "is not supported", fix))
            }
            _ => Ok(()),
        }
    }

    fn typed<T>(&self, key: &str, default: Option<T>, what: &str, read: impl Fn(&Value) -> Option<T>) -> Result<T> {
        match (self.get(key), default) {
            (Some(value), _) => {
                read(value).ok_or_else(|| self.refuse(key, value, format!("is not {what}"), "repair the file"))
            }
            (None, Some(default)) => Ok(default),
            (None, None) => {
                Err(Error::file(self.path, format!("{}{key} is missing", self.prefix), "download the file again"))
            }
        }
    }

    pub(super) fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        self.typed(key, default, "a positive 32-bit integer", size)
    }

    /// A size, or none where it is null or absent.
    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, Some(None), "a positive 32-bit integer", |value| size(value).map(Some))
    }

    /// A count, which may be 0.
    pub(super) fn count(&self, key: &str, default: usize) -> Result<usize> {
        let read = |value: &Value| value.as_u64().filter(|&count| count <= i32::MAX as u64);
        self.typed(key, Some(default), "a 32-bit integer from 0 on", |value| read(value).map(|count| count as usize))
    }

    pub(super) fn positive(&self, key: &str, default: Option<f64>) -> Result<f64> {
        self.typed(key, default, "a positive number", positive)
    }

    /// A positive number, or none where it is null or absent.
    pub(super) fn optional_positive(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, Some(None), "a positive number", |value| positive(value).map(Some))
    }

    pub(super) fn boolean(&self, key: &str, default: bool) -> Result<bool> {
        self.typed(key, Some(default), "true or false", Value::as_bool)
    }

    /// A list of so many positive numbers.
    pub(super) fn positives(&self, key: &str, count: usize) -> Result<Vec<f64>> {
        self.typed(key, None, &format!("a list of {count} positive numbers"), |value| {
            let values: Option<Vec<f64>> = value.as_array()?.iter().map(positive).collect();
            values.filter(|values| values.len() == count)
        })
    }

    /// A list with a value for each of so many layers.
    pub(super) fn per_layer<T>(
        &self,
        key: &str,
        layers: usize,
        what: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Some(list) = value.as_array().filter(|list| list.len() == layers) else {
            return Err(self.refuse(
                key,
                value,
                format!("is not a list of {layers} values, one per layer"),
                "repair the file",
            ));
        };
        let read = |(at, value)| {
            read(value).ok_or_else(|| {
                self.refuse(&format!("{key}[{at}]"), value, format!("is not {what}"), "use another model")
            })
        };
        list.iter().enumerate().map(read).collect::<Result<_>>().map(Some)
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Object<'a>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        Object::new(self.path, value, &format!("{}{key}.", self.prefix)).map(Some)
    }

    /// Token ids given as one number or a list; each below `vocab_size`.
    pub(super) fn token_ids(&self, key: &str, vocab_size: usize) -> Result<Option<Vec<u32>>> {
        let what = format!("a token id below vocab_size = {vocab_size}, or a list of them");
        let id = |value: &Value| value.as_u64().filter(|&id| id < vocab_size as u64).map(|id| id as u32);
        self.typed(key, Some(None), &what, |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect::<Option<Vec<_>>>().map(Some),
            one => id(one).map(|id| Some(vec![id])),
        })
    }
}

/// The i32 range keeps every product that the program needs (row offsets, page ids) within what XLA indexes.
fn size(value: &Value) -> Option<usize> {
    value.as_u64().filter(|&size| size > 0 && size <= i32::MAX as u64).map(|size| size as usize)
}

fn positive(value: &Value) -> Option<f64> {
    value.as_f64().filter(|number| *number > 0.0 && number.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::{GatedMlp, Mlp, Parts, Rope, RopeScaling};

    fn base() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        })
    }

    fn parse(changes: Value) -> Result<ModelSpec> {
        let mut value = base();
        for (key, change) in changes.as_object().unwrap() {
            value[key] = change.clone();
        }
        ModelSpec::parse(Path::new("config.json"), &value)
    }

    #[test]
    fn defaults_are_those_of_hugging_face() {
        let config = parse(json!({})).unwrap();
        assert_eq!((config.kv_heads, config.head_dim, config.tie_word_embeddings), (4, 16, false));
        assert_eq!((config.norm.epsilon, config.max_position_embeddings), (1e-6, 2048));
        assert_eq!(config.ropes, [Rope { theta: 1e4, rotated: 16, scaling: None }]);
        assert_eq!((config.eos_token_ids, config.attention_bias), (vec![], false));
        let Mlp::Gated(GatedMlp { bias, .. }) = config.mlp else { panic!("a Llama") };
        assert!(!bias);
        // Some checkpoints name no class; transformers then goes by `model_type`, which it wants.
        assert_eq!(parse(json!({"architectures": null})).unwrap(), parse(json!({"model_type": null})).unwrap());
    }

    #[test]
    fn families_have_their_own_defaults() {
        let of = |class: &str, changes: Value| {
            let mut all =
                json!({"architectures": [class], "model_type": null, "num_attention_heads": 32, "hidden_size": 512});
            all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            parse(all).unwrap()
        };
        let windows = |spec: &ModelSpec| spec.layers.iter().map(|layer| layer.window).collect::<Vec<_>>();
        let mistral = of("MistralForCausalLM", json!({}));
        assert_eq!((mistral.kv_heads, windows(&mistral), mistral.attention_bias), (8, vec![Some(4096); 2], false));
        assert_eq!(windows(&of("MistralForCausalLM", json!({"sliding_window": null}))), [None; 2]);
        assert_eq!(windows(&of("MistralForCausalLM", json!({"sliding_window": 7}))), [Some(7); 2]);
        let qwen = of("Qwen2ForCausalLM", json!({"sliding_window": 32768, "use_sliding_window": false}));
        assert_eq!(
            (qwen.kv_heads, windows(&qwen), qwen.attention_bias, qwen.output_bias),
            (32, vec![None; 2], true, false)
        );
        let last = json!({"sliding_window": 9, "use_sliding_window": true, "max_window_layers": 1});
        assert_eq!(windows(&of("Qwen2ForCausalLM", last)), [None, Some(9)]);
    }

    #[test]
    fn linear_scaling_divides_the_frequencies() {
        for scaling in [
            json!({"rope_scaling": {"type": "linear", "factor": 4.0}}),
            json!({"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 1e4}}),
        ] {
            let (config, plain) = (parse(scaling).unwrap(), parse(json!({})).unwrap());
            assert_eq!(config.ropes[0].scaling, Some(RopeScaling::Linear { factor: 4.0 }));
            let [scaled, plain] = [config, plain].map(|config| config.ropes[0].turning(64).frequencies);
            let divided: Vec<f64> = plain.iter().map(|frequency| frequency / 4.0).collect();
            assert_eq!(scaled, divided);
        }
    }

    #[test]
    fn the_tiny_model() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-llama-kjv");
        let config = ModelSpec::open(&folder).unwrap();
        assert_eq!((config.layers.len(), config.q_heads, config.kv_heads, config.head_dim), (4, 4, 2, 64));
        assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(0), [1].as_slice()));
        assert!(config.tie_word_embeddings);
    }

    /// As their makers publish them.
    #[test]
    fn published_configs_are_read() {
        let open = |name: &str| {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models").join(name);
            ModelSpec::open(&folder).unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        let gemma = open("gemma-3-27b");
        assert_eq!((gemma.layers.len(), gemma.kinds().len(), gemma.vocab_size, gemma.head_dim), (62, 2, 262_208, 128));
        assert_eq!([4, 5, 6].map(|layer| gemma.layers[layer].window), [Some(1024), None, Some(1024)]);
        assert_eq!([4, 5].map(|layer| gemma.ropes[gemma.layers[layer].rope].theta), [1e4, 1e6]);
        assert_eq!(gemma.ropes[0].scaling, Some(RopeScaling::Linear { factor: 8.0 }));
        assert_eq!((gemma.attention_scale, gemma.eos_token_ids), (168f64.powf(-0.5), vec![1, 106]));
        let gemma = open("gemma-2-27b");
        assert_eq!((gemma.attention_soft_cap, gemma.logit_soft_cap), (Some(50.0), Some(30.0)));
        assert_eq!([0, 1].map(|layer| gemma.layers[layer].window), [Some(4096), None]);
        let smol = open("smollm3-3b");
        assert_eq!([2, 3, 4].map(|layer| smol.ropes[smol.layers[layer].rope].rotated), [128, 0, 128]);
        let phi = open("phi-4");
        assert!(matches!(phi.names.qkv, Parts::Fused(_)) && phi.kinds().len() == 1);
        for (name, layers) in [("qwen3-8b", 36), ("qwen3-32b", 64), ("mistral-7b", 32), ("olmo-2-13b", 40)] {
            let spec = open(name);
            assert_eq!(
                (spec.layers.len(), spec.layers[0].window, spec.tie_word_embeddings),
                (layers, None, false),
                "{name}"
            );
        }
    }

    /// Numbers of Llama 3.1 8B, worked out from the published formula with 50 digits.
    #[test]
    fn llama3_frequencies() {
        for spelling in ["rope_type", "type"] {
            let config = parse(json!({
                "hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 500000.0, "eos_token_id": [1, 2],
                "rope_scaling": {
                    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192, spelling: "llama3",
                },
            }));
            let config = config.unwrap();
            assert_eq!(config.eos_token_ids, [1, 2]);
            let frequencies = config.ropes[0].turning(64).frequencies;
            assert_eq!(frequencies.len(), 64);
            let expected = [
                (0, 1.0),
                (28, 0.003211445994752591),
                (30, 0.0013718935677611381),
                (33, 0.0003126937503840651),
                (63, 3.068925988914511e-07),
            ];
            for (pair, value) in expected {
                let error = (frequencies[pair] / value - 1.0).abs();
                assert!(error < 1e-12, "pair {pair}: {} for {value}", frequencies[pair]);
            }
        }
        let moved = parse(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})).unwrap();
        assert_eq!(moved.ropes, [Rope { theta: 7.0, rotated: 16, scaling: None }]);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let llama3 = |high: f64| {
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": high,
                "original_max_position_embeddings": 8192})
        };
        let gpt_oss = |changes: Value| {
            let mut config = json!({"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_key_value_heads": 2,
                "quantization_config": {"quant_method": "mxfp4"}});
            config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            config
        };
        let cases = [
            (json!({"architectures": ["FalconForCausalLM"]}), "architectures = [\"FalconForCausalLM\"] is not supp"),
            (
                json!({"hidden_act": "gelu"}),
                "hidden_act = \"gelu\" is not supported: use a model with hidden_act = \"silu\" or",
            ),
            (json!({"architectures": null, "model_type": null}), "architectures is missing, and so is model_type"),
            (json!({"architectures": null, "model_type": "falcon"}), "model_type = \"falcon\" is not supported"),
            (json!({"model_type": "mistral"}), "model_type = mistral is not the type of the class in architectures"),
            (json!({"attention_bias": 1}), "attention_bias = 1 is not true or false"),
            (json!({"sliding_window": 4096}), "sliding_window = 4096 is not a key of a Llama"),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config.quant_method = null is not supported"),
            (
                json!({"quantization_config": {"quant_method": "mxfp4"}}),
                "quantization_config.quant_method = \"mxfp4\" is not",
            ),
            (
                gpt_oss(json!({"hidden_size": 48})),
                "hidden_size = 48 is not a multiple of the 32 features that share a scale",
            ),
            (
                gpt_oss(json!({"quantization_config": {"quant_method": "mxfp4",
                    "modules_to_not_convert": ["model.layers.0.mlp.experts"]}})),
                "quantization_config.modules_to_not_convert = [\"model.layers.0.mlp.experts\"] names experts",
            ),
            (json!({"rope_scaling": {"type": "mrope"}}), "rope_scaling.type = \"mrope\" is not supported"),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2, "beta": 3}}),
                "rope_scaling.beta = 3 is not a key that this model type is known to have",
            ),
            (json!({"logit_scale": 0.5}), "logit_scale = 0.5 is not a key that this model type is known to have"),
            (json!({"partial_rotary_factor": 0.25}), "partial_rotary_factor = 0.25 is not supported"),
            (
                json!({"rope_scaling": llama3(4.0)}),
                "rope_scaling.high_freq_factor = 4 is not above low_freq_factor = 4",
            ),
            (json!({"rope_scaling": {"type": "llama3"}}), "rope_scaling.factor is missing"),
            (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor is missing"),
            (json!({"rope_scaling": {"type": "linear", "factor": 0}}), "rope_scaling.factor = 0 is not a positive"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
            (json!({"num_attention_heads": 5}), "hidden_size = 64 is not a multiple of num_attention_heads = 5"),
            (json!({"head_dim": 15}), "head_dim = 15 is odd"),
            (json!({"vocab_size": null}), "vocab_size is missing"),
            (json!({"vocab_size": 1.5}), "vocab_size = 1.5 is not a positive 32-bit integer"),
            (json!({"rms_norm_eps": "x"}), "rms_norm_eps = \"x\" is not a positive number"),
            (json!({"eos_token_id": 128}), "eos_token_id = 128 is not a token id below vocab_size = 128"),
        ];
        for (changes, message) in cases {
            let error = parse(changes).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().starts_with(&format!("config.json: {message}")), "{error}");
        }
    }
}
