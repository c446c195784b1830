//! `config.json` and `generation_config.json`: what the model is.
//!
//! Three families are one graph with other options: Llama; Mistral, which has a sliding window; and Qwen2, whose query, key and
//! value projections have biases. Absent keys take the defaults of the family's class in Hugging Face's transformers. A key that
//! would change the function computed, and that Pagoda does not implement, is refused by name; keys that only describe training
//! are ignored.

use std::f64::consts::TAU;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::quantization::Quantization;
use super::read_json;
use crate::error::{Error, Result};

/// A Llama or one of its like, with every size checked for consistency.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP between its gate/up and down projections.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// The epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// What stretches the rotary frequencies, if anything does.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the query, key and value projections have biases.
    pub attention_bias: bool,
    /// Whether attention's output projection has biases.
    pub output_bias: bool,
    /// A token sees only so many of the last tokens, itself among them.
    pub sliding_window: Option<usize>,
    /// Whether the gate, up and down projections have biases.
    pub mlp_bias: bool,
    /// Positions that the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the output projection is the embedding table.
    pub tie_word_embeddings: bool,
    /// How the projections are stored, where it is in 8 bits.
    pub quantization: Option<Quantization>,
    /// The token before every text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text: those of `generation_config.json` if it names any, else those of `config.json`.
    pub eos_token_ids: Vec<u32>,
}

/// `rope_scaling`: a change of the rotary frequencies, for longer contexts than those of pre-training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Type `linear`: all frequencies are divided by `factor`.
    Linear {
        /// The division.
        factor: f64,
    },
    /// Type `llama3`.
    Llama3(Llama3Scaling),
}

/// `rope_scaling` of type `llama3`: frequencies below `1 / low_freq_wavelength` are divided by `factor`, those above
/// the high one are kept, and those between are blended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// Division of the low frequencies.
    pub factor: f64,
    /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low frequencies.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high frequencies.
    pub high_freq_factor: f64,
    /// The context of pre-training.
    pub original_max_position_embeddings: f64,
}

/// Keys that must be absent, null, or have one of these values, because anything else changes the model.
const FIXED: [(&str, &[&str]); 6] = [
    ("hidden_act", &["\"silu\""]),
    ("use_sliding_window", &["false"]),
    ("attn_logit_softcapping", &[]),
    ("final_logit_softcapping", &[]),
    ("partial_rotary_factor", &["1", "1.0"]),
    ("is_encoder_decoder", &["false"]),
];

/// What a config's absent keys mean, and which options it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
}

impl Family {
    /// By the class, then by the type, as they are spelt.
    const ALL: [(Self, &str, &str); 3] = [
        (Self::Llama, "LlamaForCausalLM", "llama"),
        (Self::Mistral, "MistralForCausalLM", "mistral"),
        (Self::Qwen2, "Qwen2ForCausalLM", "qwen2"),
    ];

    /// # Errors
    /// When neither `architectures` nor `model_type` names one, or they name two.
    fn of(object: Object<'_>) -> Result<Self> {
        let fix = format!("use a model of class {}", Self::ALL.map(|(_, class, _)| class).join(", "));
        let class = object.get("architectures");
        let by_class = class.map(|names| {
            let family = Self::ALL.into_iter().find(|(_, class, _)| *names == json!([class]));
            family.ok_or_else(|| object.refuse("architectures", names, "is not supported", fix.as_str()))
        });
        let kind = object.get("model_type");
        let by_type = kind.map(|name| {
            let family = Self::ALL.into_iter().find(|(_, _, kind)| name == kind);
            family.ok_or_else(|| object.refuse("model_type", name, "is not supported", fix.as_str()))
        });
        match (by_class.transpose()?, by_type.transpose()?) {
            (Some((family, ..)), Some((other, _, kind))) if family != other => Err(object.refuse(
                "model_type",
                kind,
                "is not the type of the class in architectures",
                "repair config.json",
            )),
            (Some((family, ..)), _) | (None, Some((family, ..))) => Ok(family),
            (None, None) => Err(Error::file(object.path, "architectures is missing, and so is model_type", fix)),
        }
    }
}

impl LlamaConfig {
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
        let mut config = Self::parse(&path, &read_json(&path)?)?;
        let path = folder.join("generation_config.json");
        if path.exists() {
            let value = read_json(&path)?;
            let object = Object::new(&path, &value, "")?;
            if let Some(eos) = object.token_ids("eos_token_id", config.vocab_size)? {
                config.eos_token_ids = eos;
            }
        }
        Ok(config)
    }

    /// Checks the content of a `config.json`; `path` is named in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn parse(path: &Path, value: &Value) -> Result<Self> {
        let object = Object::new(path, value, "")?;
        let family = Family::of(object)?;
        for (key, allowed) in FIXED {
            if let Some(value) = object.get(key)
                && !allowed.contains(&value.to_string().as_str())
            {
                let fix = match allowed {
                    [] => "use a model without it".to_owned(),
                    [first, ..] => format!("use a model with {key} = {first}"),
                };
                return Err(object.refuse(key, value, "is not supported", fix));
            }
        }

        let (hidden_size, q_heads) = (object.size("hidden_size", None)?, object.size("num_attention_heads", None)?);
        let default_kv_heads = match family {
            Family::Llama => q_heads,
            Family::Mistral => 8,
            Family::Qwen2 => 32,
        };
        let kv_heads = object.size("num_key_value_heads", Some(default_kv_heads))?;
        if !q_heads.is_multiple_of(kv_heads) {
            let limit = format!("does not divide num_attention_heads = {q_heads}");
            return Err(object.refuse("num_key_value_heads", kv_heads, limit, "repair config.json"));
        }
        if object.get("head_dim").is_none() && !hidden_size.is_multiple_of(q_heads) {
            let limit = format!("is not a multiple of num_attention_heads = {q_heads}, and head_dim is not given");
            return Err(object.refuse("hidden_size", hidden_size, limit, "repair config.json"));
        }
        let head_dim = object.size("head_dim", Some(hidden_size / q_heads))?;
        if !head_dim.is_multiple_of(2) {
            return Err(object.refuse(
                "head_dim",
                head_dim,
                "is odd; rotary embedding needs pairs",
                "repair config.json",
            ));
        }
        let vocab_size = object.size("vocab_size", None)?;
        let intermediate_size = object.size("intermediate_size", None)?;
        let quantization =
            object.get("quantization_config").map(|value| Quantization::parse(path, value)).transpose()?;
        if let Some(group) = quantization.and_then(Quantization::group) {
            for (key, size) in [
                ("hidden_size", hidden_size),
                ("num_attention_heads * head_dim", q_heads * head_dim),
                ("intermediate_size", intermediate_size),
            ] {
                if !size.is_multiple_of(group) {
                    let limit = format!("is not a multiple of the {group} features that share a scale");
                    return Err(object.refuse(key, size, limit, "repair config.json"));
                }
            }
        }

        let sliding_window = match family {
            // Qwen2's is off unless `use_sliding_window` says otherwise, which is refused above.
            Family::Qwen2 => None,
            // Null is none, and an absent key is not.
            Family::Mistral if object.map.get("sliding_window").is_some_and(Value::is_null) => None,
            Family::Mistral => Some(object.size("sliding_window", Some(4096))?),
            Family::Llama => match object.get("sliding_window") {
                Some(window) => {
                    let fix = "use a model without it, or one of class MistralForCausalLM";
                    return Err(object.refuse("sliding_window", window, "is not a key of a Llama", fix));
                }
                None => None,
            },
        };
        let (attention_bias, output_bias) = match family {
            Family::Llama => {
                let both = object.boolean("attention_bias", false)?;
                (both, both)
            }
            Family::Mistral => (false, false),
            Family::Qwen2 => (true, false),
        };
        let (max_positions, mlp_bias) = match family {
            Family::Llama => (2048, object.boolean("mlp_bias", false)?),
            Family::Mistral => (4096 * 32, false),
            Family::Qwen2 => (32768, false),
        };

        // Transformers 5 moved `rope_theta` and `rope_scaling` into `rope_parameters`.
        let rope = object.object("rope_parameters")?;
        let scaling = if rope.is_some() { rope } else { object.object("rope_scaling")? };
        let theta_home = rope.filter(|rope| rope.get("rope_theta").is_some()).unwrap_or(object);
        Ok(Self {
            vocab_size,
            hidden_size,
            intermediate_size,
            quantization,
            layers: object.size("num_hidden_layers", None)?,
            q_heads,
            kv_heads,
            head_dim,
            rms_norm_eps: object.positive("rms_norm_eps", Some(1e-6))?,
            rope_theta: theta_home.positive("rope_theta", Some(10000.0))?,
            rope_scaling: scaling.map_or(Ok(None), RopeScaling::parse)?,
            attention_bias,
            output_bias,
            sliding_window,
            mlp_bias,
            max_position_embeddings: object.size("max_position_embeddings", Some(max_positions))?,
            tie_word_embeddings: object.boolean("tie_word_embeddings", false)?,
            bos_token_id: object.token_ids("bos_token_id", vocab_size)?.and_then(|ids| ids.first().copied()),
            eos_token_ids: object.token_ids("eos_token_id", vocab_size)?.unwrap_or_default(),
        })
    }

    /// The rotary frequencies in radians per position, `head_dim / 2` of them: pair `i` turns by
    /// `theta^(-2i / head_dim)`, after the scaling.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        (0..self.head_dim / 2)
            .map(|pair| {
                let frequency = self.rope_theta.powf(-2.0 * pair as f64 / self.head_dim as f64);
                self.rope_scaling.map_or(frequency, |scaling| scaling.apply(frequency))
            })
            .collect()
    }
}

impl RopeScaling {
    fn parse(object: Object<'_>) -> Result<Option<Self>> {
        let kind = ["rope_type", "type"].into_iter().find_map(|key| Some((key, object.get(key)?)));
        let (key, kind) = kind.unwrap_or(("rope_type", &Value::Null));
        match kind.as_str() {
            Some("default") => Ok(None),
            Some("linear") => Ok(Some(Self::Linear { factor: object.positive("factor", None)? })),
            Some("llama3") => Llama3Scaling::parse(object).map(|scaling| Some(Self::Llama3(scaling))),
            _ => {
                let fix = "use a model with \"default\", \"linear\" or \"llama3\"";
                Err(object.refuse(key, kind, "is not supported", fix))
            }
        }
    }

    fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::Linear { factor } => frequency / factor,
            Self::Llama3(scaling) => scaling.apply(frequency),
        }
    }
}

/// The formula of the Llama 3.1 release.
impl Llama3Scaling {
    fn parse(object: Object<'_>) -> Result<Self> {
        let scaling = Self {
            factor: object.positive("factor", None)?,
            low_freq_factor: object.positive("low_freq_factor", None)?,
            high_freq_factor: object.positive("high_freq_factor", None)?,
            original_max_position_embeddings: object.positive("original_max_position_embeddings", None)?,
        };
        if scaling.high_freq_factor <= scaling.low_freq_factor {
            let limit = format!("is not above low_freq_factor = {}", scaling.low_freq_factor);
            let (key, value) = ("high_freq_factor", scaling.high_freq_factor);
            return Err(object.refuse(key, value, limit, "repair config.json"));
        }
        Ok(scaling)
    }

    fn apply(self, frequency: f64) -> f64 {
        // How many full turns the pair makes within the original context.
        let turns = self.original_max_position_embeddings * frequency / TAU;
        let blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
        let blend = blend.clamp(0.0, 1.0);
        (1.0 - blend) * frequency / self.factor + blend * frequency
    }
}

/// A JSON object that knows its file and its own dotted path, for errors.
#[derive(Clone, Copy)]
struct Object<'a> {
    path: &'a Path,
    prefix: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    fn new(path: &'a Path, value: &'a Value, prefix: &'a str) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { path, prefix, map }),
            _ => Err(Error::file(path, "it does not hold a JSON object", "download the file again")),
        }
    }

    fn refuse(
        &self,
        key: &str,
        value: impl std::fmt::Display,
        limit: impl std::fmt::Display,
        fix: impl Into<String>,
    ) -> Error {
        Error::file(PathBuf::from(self.path), format!("{}{key} = {value} {limit}", self.prefix), fix)
    }

    /// The value of `key`; null counts as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
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

    fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        // The i32 range keeps every product that the program needs (row offsets, page ids) within what XLA indexes.
        let read = |value: &Value| value.as_u64().filter(|&size| size > 0 && size <= i32::MAX as u64);
        self.typed(key, default, "a positive 32-bit integer", |value| read(value).map(|size| size as usize))
    }

    fn positive(&self, key: &str, default: Option<f64>) -> Result<f64> {
        self.typed(key, default, "a positive number", |value| value.as_f64().filter(|number| *number > 0.0))
    }

    fn boolean(&self, key: &str, default: bool) -> Result<bool> {
        self.typed(key, Some(default), "true or false", Value::as_bool)
    }

    fn object(&self, key: &'a str) -> Result<Option<Object<'a>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let prefix = match key {
            "rope_scaling" => "rope_scaling.",
            _ => "rope_parameters.",
        };
        Object::new(self.path, value, prefix).map(Some)
    }

    /// Token ids given as one number or a list; each below `vocab_size`.
    fn token_ids(&self, key: &str, vocab_size: usize) -> Result<Option<Vec<u32>>> {
        let what = format!("a token id below vocab_size = {vocab_size}, or a list of them");
        let id = |value: &Value| value.as_u64().filter(|&id| id < vocab_size as u64).map(|id| id as u32);
        self.typed(key, Some(None), &what, |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect::<Option<Vec<_>>>().map(Some),
            one => id(one).map(|id| Some(vec![id])),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        })
    }

    fn parse(changes: Value) -> Result<LlamaConfig> {
        let mut value = base();
        for (key, change) in changes.as_object().unwrap() {
            value[key] = change.clone();
        }
        LlamaConfig::parse(Path::new("config.json"), &value)
    }

    #[test]
    fn defaults_are_those_of_hugging_face() {
        let config = parse(json!({})).unwrap();
        assert_eq!((config.kv_heads, config.head_dim, config.tie_word_embeddings), (4, 16, false));
        assert_eq!((config.rms_norm_eps, config.rope_theta, config.max_position_embeddings), (1e-6, 1e4, 2048));
        assert_eq!((config.rope_scaling, config.eos_token_ids), (None, vec![]));
        assert_eq!((config.attention_bias, config.mlp_bias), (false, false));
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
        let mistral = of("MistralForCausalLM", json!({}));
        assert_eq!((mistral.kv_heads, mistral.sliding_window, mistral.attention_bias), (8, Some(4096), false));
        assert_eq!(of("MistralForCausalLM", json!({"sliding_window": null})).sliding_window, None);
        assert_eq!(of("MistralForCausalLM", json!({"sliding_window": 7})).sliding_window, Some(7));
        let qwen = of("Qwen2ForCausalLM", json!({"sliding_window": 32768, "use_sliding_window": false}));
        assert_eq!(
            (qwen.kv_heads, qwen.sliding_window, qwen.attention_bias, qwen.output_bias),
            (32, None, true, false)
        );
    }

    #[test]
    fn linear_scaling_divides_the_frequencies() {
        for scaling in [
            json!({"rope_scaling": {"type": "linear", "factor": 4.0}}),
            json!({"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 1e4}}),
        ] {
            let (config, plain) = (parse(scaling).unwrap(), parse(json!({})).unwrap());
            assert_eq!(config.rope_scaling, Some(RopeScaling::Linear { factor: 4.0 }));
            let divided: Vec<f64> = plain.rope_frequencies().iter().map(|frequency| frequency / 4.0).collect();
            assert_eq!(config.rope_frequencies(), divided);
        }
    }

    #[test]
    fn the_tiny_model() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-llama-kjv");
        let config = LlamaConfig::open(&folder).unwrap();
        assert_eq!((config.layers, config.q_heads, config.kv_heads, config.head_dim), (4, 4, 2, 64));
        assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(0), [1].as_slice()));
        assert!(config.tie_word_embeddings);
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
            let frequencies = config.rope_frequencies();
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
        assert_eq!((moved.rope_theta, moved.rope_scaling), (7.0, None));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let llama3 = |high: f64| {
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": high,
                "original_max_position_embeddings": 8192})
        };
        let cases = [
            (json!({"architectures": ["MixtralForCausalLM"]}), "architectures = [\"MixtralForCausalLM\"] is not supp"),
            (
                json!({"hidden_act": "gelu"}),
                "hidden_act = \"gelu\" is not supported: use a model with hidden_act = \"silu",
            ),
            (json!({"architectures": null, "model_type": null}), "architectures is missing, and so is model_type"),
            (json!({"architectures": null, "model_type": "mixtral"}), "model_type = \"mixtral\" is not supported"),
            (json!({"model_type": "mistral"}), "model_type = mistral is not the type of the class in architectures"),
            (json!({"attention_bias": 1}), "attention_bias = 1 is not true or false"),
            (json!({"sliding_window": 4096}), "sliding_window = 4096 is not a key of a Llama"),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config.quant_method = null is not supported"),
            (json!({"rope_scaling": {"type": "yarn"}}), "rope_scaling.type = \"yarn\" is not supported"),
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
