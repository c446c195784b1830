//! The families of models: a function per `model_type`, from `config.json` to a [`ModelSpec`].
//!
//! To add one: its function and its line in [`FAMILIES`] here; in [`Names`] what its tensors are called, where that is not as in
//! Llama; and two small checkpoints that transformers wrote (`tests/families`). Each function reads every key that its class
//! in transformers has, takes that class's default where one is absent, and refuses what the description cannot say.

use serde_json::{Value, json};

use super::config::Object;
use super::mxfp4;
use super::quantization::{self, Quantization};
use super::spec::{
    ExpertGate, ExpertNames, ExpertProjections, Experts, Gate, GatedMlp, LayerKind, Llama3Scaling, LongRopeScaling,
    Mlp, ModelSpec, Names, Norm, NormPlaces, Parts, QkNorm, Rope, RopeScaling, SharedExpert, YarnScaling,
};
use crate::error::{Error, Result};

/// How the configs of a class are read.
pub(super) struct Family {
    /// As `architectures` names it.
    pub(super) class: &'static str,
    pub(super) model_type: &'static str,
    pub(super) read: fn(&Object<'_>) -> Result<ModelSpec>,
}

/// Every family that runs.
pub(super) const FAMILIES: &[Family] = &[
    Family { class: "LlamaForCausalLM", model_type: "llama", read: llama },
    Family { class: "MistralForCausalLM", model_type: "mistral", read: mistral },
    Family { class: "Qwen2ForCausalLM", model_type: "qwen2", read: qwen2 },
    Family { class: "Qwen3ForCausalLM", model_type: "qwen3", read: qwen3 },
    Family { class: "GemmaForCausalLM", model_type: "gemma", read: gemma },
    Family { class: "Gemma2ForCausalLM", model_type: "gemma2", read: gemma2 },
    Family { class: "Gemma3ForCausalLM", model_type: "gemma3_text", read: gemma3_text },
    Family { class: "Gemma3ForConditionalGeneration", model_type: "gemma3", read: gemma3 },
    Family { class: "Phi3ForCausalLM", model_type: "phi3", read: phi3 },
    Family { class: "SmolLM3ForCausalLM", model_type: "smollm3", read: smollm3 },
    Family { class: "Olmo2ForCausalLM", model_type: "olmo2", read: olmo2 },
    Family { class: "MixtralForCausalLM", model_type: "mixtral", read: mixtral },
    Family { class: "Qwen2MoeForCausalLM", model_type: "qwen2_moe", read: qwen2_moe },
    Family { class: "Qwen3MoeForCausalLM", model_type: "qwen3_moe", read: qwen3_moe },
    Family { class: "GptOssForCausalLM", model_type: "gpt_oss", read: gpt_oss },
];

/// What a class takes for absent keys; `None`: the key must be there.
#[derive(Clone, Copy)]
struct Defaults {
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    /// `None`: as many as query heads.
    num_key_value_heads: Option<usize>,
    /// `None`: the hidden size over the query heads.
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: f64,
    tie_word_embeddings: bool,
    /// `None`: the function is named by `hidden_act`, SiLU where it is absent.
    gate: Option<Gate>,
    /// Whether a part of each head may turn.
    partial_rotary: bool,
    /// Whether experts may be stored in 4 bits.
    mxfp4: bool,
}

impl Defaults {
    /// Those of Llama.
    const LLAMA: Self = Self {
        vocab_size: None,
        hidden_size: None,
        intermediate_size: None,
        num_hidden_layers: None,
        num_attention_heads: None,
        num_key_value_heads: None,
        head_dim: None,
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-6,
        rope_theta: 10000.0,
        tie_word_embeddings: false,
        gate: None,
        partial_rotary: false,
        mxfp4: false,
    };

    /// Those of Gemma's family.
    const GEMMA: Self = Self {
        head_dim: Some(256),
        max_position_embeddings: 8192,
        tie_word_embeddings: true,
        gate: Some(Gate::GeluTanh),
        ..Self::LLAMA
    };
}

fn llama(object: &Object<'_>) -> Result<ModelSpec> {
    if let Some(window) = object.get("sliding_window") {
        let fix = "use a model without it, or one of class MistralForCausalLM";
        return Err(object.refuse("sliding_window", window, "is not a key of a Llama", fix));
    }
    let bias = object.boolean("attention_bias", false)?;
    let spec = decoder(object, Defaults::LLAMA)?;
    let mlp = Mlp::Gated(GatedMlp { bias: object.boolean("mlp_bias", false)?, ..gated(&spec) });
    Ok(ModelSpec { attention_bias: bias, output_bias: bias, mlp, ..spec })
}

fn mistral(object: &Object<'_>) -> Result<ModelSpec> {
    let defaults = Defaults { num_key_value_heads: Some(8), max_position_embeddings: 4096 * 32, ..Defaults::LLAMA };
    let spec = decoder(object, defaults)?;
    // Null is none, and an absent key is not.
    let window = match object.raw("sliding_window") {
        Some(Value::Null) => None,
        _ => Some(object.size("sliding_window", Some(4096))?),
    };
    let sliding = layer_types(object, spec.layers.len(), |_| window.is_some())?;
    Ok(ModelSpec { layers: windowed(object, &sliding, window, [0, 0])?, ..spec })
}

fn qwen2(object: &Object<'_>) -> Result<ModelSpec> {
    object.fixed("use_mrope", &[json!(false)])?;
    let defaults = Defaults { num_key_value_heads: Some(32), max_position_embeddings: 32768, ..Defaults::LLAMA };
    let spec = decoder(object, defaults)?;
    Ok(ModelSpec { layers: last_windowed(object, spec.layers.len())?, attention_bias: true, ..spec })
}

fn qwen3(object: &Object<'_>) -> Result<ModelSpec> {
    let defaults = Defaults {
        num_key_value_heads: Some(32),
        head_dim: Some(128),
        max_position_embeddings: 32768,
        ..Defaults::LLAMA
    };
    let spec = decoder(object, defaults)?;
    let bias = object.boolean("attention_bias", false)?;
    let layers = last_windowed(object, spec.layers.len())?;
    Ok(ModelSpec { layers, qk_norm: Some(QkNorm::Head), attention_bias: bias, output_bias: bias, ..spec })
}

fn gemma(object: &Object<'_>) -> Result<ModelSpec> {
    gemmas(object, Defaults { num_key_value_heads: Some(16), ..Defaults::GEMMA })
}

fn gemma2(object: &Object<'_>) -> Result<ModelSpec> {
    let spec = gemmas(object, Defaults { num_key_value_heads: Some(4), ..Defaults::GEMMA })?;
    let sliding = layer_types(object, spec.layers.len(), |layer| layer % 2 == 0)?;
    let window = object.size("sliding_window", Some(4096))?;
    Ok(ModelSpec {
        layers: windowed(object, &sliding, Some(window), [0, 0])?,
        attention_scale: object.positive("query_pre_attn_scalar", Some(256.0))?.powf(-0.5),
        attention_soft_cap: soft_cap(object, "attn_logit_softcapping", Some(50.0))?,
        logit_soft_cap: soft_cap(object, "final_logit_softcapping", Some(30.0))?,
        ..both_norms(spec)
    })
}

/// The text model of a checkpoint that has others beside it.
fn gemma3(object: &Object<'_>) -> Result<ModelSpec> {
    let Some(text) = object.object("text_config")? else {
        return Err(Error::file(object.path, "text_config is missing", "download the file again"));
    };
    let spec = gemma3_text(&text)?;
    text.finish()?;
    // Of images: text has none of them.
    for key in ["vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image"] {
        object.get(key);
    }
    object.fixed("tie_word_embeddings", &[json!(spec.tie_word_embeddings)])?;
    let eos = object.token_ids("eos_token_id", spec.vocab_size)?.unwrap_or(spec.eos_token_ids);
    let bos = object.token_ids("bos_token_id", spec.vocab_size)?.and_then(|ids| ids.first().copied());
    Ok(ModelSpec { eos_token_ids: eos, bos_token_id: bos.or(spec.bos_token_id), ..spec })
}

fn gemma3_text(object: &Object<'_>) -> Result<ModelSpec> {
    object.fixed("use_bidirectional_attention", &[json!(false)])?;
    let defaults = Defaults {
        vocab_size: Some(262_208),
        hidden_size: Some(2304),
        intermediate_size: Some(9216),
        num_hidden_layers: Some(26),
        num_attention_heads: Some(8),
        num_key_value_heads: Some(4),
        max_position_embeddings: 131_072,
        rope_theta: 1e6,
        ..Defaults::GEMMA
    };
    let spec = gemmas(object, defaults)?;
    let pattern = object.optional_size("_sliding_window_pattern")?.unwrap_or(6);
    let pattern = object.size("sliding_window_pattern", Some(pattern))?;
    let sliding = layer_types(object, spec.layers.len(), |layer| !(layer + 1).is_multiple_of(pattern))?;
    let window = object.size("sliding_window", Some(4096))?;
    let theta = object.positive("rope_local_base_freq", Some(10000.0))?;
    let local = match object.object("rope_parameters")?.and_then(|both| both.object("sliding_attention").transpose()) {
        Some(local) => rope(
            &local?,
            RopeDefaults {
                theta,
                head_dim: spec.head_dim,
                partial: 1.0,
                max_positions: spec.max_position_embeddings as f64,
                original: None,
            },
        )?,
        None => Rope { theta, rotated: spec.head_dim, scaling: None },
    };
    let ropes = vec![spec.ropes[0].clone(), local];
    Ok(ModelSpec {
        layers: windowed(object, &sliding, Some(window), [0, 1])?,
        ropes,
        qk_norm: Some(QkNorm::Head),
        attention_scale: object.positive("query_pre_attn_scalar", Some(256.0))?.powf(-0.5),
        attention_soft_cap: soft_cap(object, "attn_logit_softcapping", None)?,
        logit_soft_cap: soft_cap(object, "final_logit_softcapping", None)?,
        ..both_norms(spec)
    })
}

fn phi3(object: &Object<'_>) -> Result<ModelSpec> {
    for key in ["attention_bias", "mlp_bias", "lm_head_bias"] {
        object.fixed(key, &[json!(false)])?;
    }
    // How many of the layers see everything, and what positions are divided by: all, and nothing.
    for key in ["full_attn_mod", "interpolate_factor"] {
        object.fixed(key, &[json!(1)])?;
    }
    let defaults =
        Defaults { max_position_embeddings: 4096, rms_norm_eps: 1e-5, partial_rotary: true, ..Defaults::LLAMA };
    let spec = decoder(object, defaults)?;
    let window = object.optional_size("sliding_window")?;
    let sliding = vec![window.is_some(); spec.layers.len()];
    let names =
        Names { qkv: Parts::Fused("self_attn.qkv_proj"), gate_up: Parts::Fused("mlp.gate_up_proj"), ..Names::LLAMA };
    Ok(ModelSpec { layers: windowed(object, &sliding, window, [0, 0])?, names, ..spec })
}

fn smollm3(object: &Object<'_>) -> Result<ModelSpec> {
    let defaults = Defaults {
        num_key_value_heads: Some(4),
        max_position_embeddings: 32768,
        rope_theta: 2e6,
        tie_word_embeddings: true,
        ..Defaults::LLAMA
    };
    let spec = decoder(object, defaults)?;
    let layers = spec.layers.len();
    let bias = object.boolean("attention_bias", false)?;
    let mlp = Mlp::Gated(GatedMlp { bias: object.boolean("mlp_bias", false)?, ..gated(&spec) });
    let interval = object.size("no_rope_layer_interval", Some(4))?;
    // 1 where a layer has positions.
    let given = object.per_layer("no_rope_layers", layers, "0 or 1", |value| match value.as_u64() {
        Some(turns @ (0 | 1)) => Some(turns == 1),
        _ => None,
    })?;
    let turns = given.unwrap_or_else(|| (0..layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect());
    let on = object.boolean("use_sliding_window", false)?;
    let window = object.optional_size("sliding_window")?.filter(|_| on);
    // It is written, and read by no one.
    object.count("max_window_layers", 0)?;
    let sliding = layer_types(object, layers, |layer| window.is_some() && !turns[layer])?;
    let kinds = windowed(object, &sliding, window, [0, 0])?;
    let kinds = kinds.into_iter().zip(&turns).map(|(kind, &turns)| LayerKind { rope: usize::from(!turns), ..kind });
    let ropes = vec![spec.ropes[0].clone(), Rope::NONE];
    Ok(ModelSpec { layers: kinds.collect(), ropes, attention_bias: bias, output_bias: bias, mlp, ..spec })
}

fn olmo2(object: &Object<'_>) -> Result<ModelSpec> {
    let bias = object.boolean("attention_bias", false)?;
    let spec = decoder(object, Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA })?;
    Ok(ModelSpec {
        norms: NormPlaces::After,
        qk_norm: Some(QkNorm::Projection),
        attention_bias: bias,
        output_bias: bias,
        ..spec
    })
}

fn mixtral(object: &Object<'_>) -> Result<ModelSpec> {
    let defaults = Defaults {
        vocab_size: Some(32000),
        hidden_size: Some(4096),
        intermediate_size: Some(14336),
        num_hidden_layers: Some(32),
        num_attention_heads: Some(32),
        num_key_value_heads: Some(8),
        max_position_embeddings: 4096 * 32,
        rms_norm_eps: 1e-5,
        rope_theta: 1e6,
        ..Defaults::LLAMA
    };
    let spec = decoder(object, defaults)?;
    let names = ExpertNames {
        router: "block_sparse_moe.gate",
        experts: "block_sparse_moe.experts",
        projections: ExpertProjections::Apart(["w1", "w3", "w2"]),
    };
    let [count, chosen] = experts(object, ["num_local_experts", "num_experts_per_tok"], [8, 2])?;
    let mlp = Experts {
        count,
        chosen,
        inner: spec.mlp.inner(),
        gate: silu_experts(object, &spec)?,
        normalised: true,
        bias: false,
        shared: None,
        names,
    };
    let window = object.optional_size("sliding_window")?;
    let sliding = vec![window.is_some(); spec.layers.len()];
    let layers = windowed(object, &sliding, window, [0, 0])?;
    whole_experts(object, &spec)?;
    Ok(ModelSpec { layers, mlp: Mlp::Experts(mlp), ..spec })
}

fn qwen2_moe(object: &Object<'_>) -> Result<ModelSpec> {
    let defaults = Defaults {
        vocab_size: Some(151_936),
        hidden_size: Some(2048),
        intermediate_size: Some(5632),
        num_hidden_layers: Some(24),
        num_attention_heads: Some(16),
        num_key_value_heads: Some(16),
        max_position_embeddings: 32768,
        ..Defaults::LLAMA
    };
    let spec = decoder(object, defaults)?;
    let shared = SharedExpert {
        inner: object.size("shared_expert_intermediate_size", Some(5632))?,
        names: (
            ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
            "mlp.shared_expert.down_proj",
            "mlp.shared_expert_gate",
        ),
    };
    let mlp = qwen_experts(object, &spec, "num_experts", [60, 4, 1408])?;
    let mlp = Mlp::Experts(Experts { shared: Some(shared), ..mlp });
    let bias = object.boolean("qkv_bias", true)?;
    let on = object.boolean("use_sliding_window", false)?;
    let last = object.count("max_window_layers", 28)?;
    // Written as 0 where it is off.
    let window = if on { Some(object.size("sliding_window", Some(4096))?) } else { None };
    object.get("sliding_window");
    let sliding = layer_types(object, spec.layers.len(), |layer| on && layer % 2 == 0 && layer < last)?;
    let layers = windowed(object, &sliding, window, [0, 0])?;
    whole_experts(object, &spec)?;
    Ok(ModelSpec { layers, attention_bias: bias, mlp, ..spec })
}

/// Qwen's experts; the defaults are how many there are, how many work on a token, and their inner width. Every layer has some:
/// none is a plain MLP of intermediate_size.
fn qwen_experts(object: &Object<'_>, spec: &ModelSpec, count_key: &str, defaults: [usize; 3]) -> Result<Experts> {
    object.fixed("decoder_sparse_step", &[json!(1)])?;
    object.fixed("mlp_only_layers", &[json!([])])?;
    let [count, chosen, inner] = defaults;
    let [count, chosen] = experts(object, [count_key, "num_experts_per_tok"], [count, chosen])?;
    Ok(Experts {
        count,
        chosen,
        inner: object.size("moe_intermediate_size", Some(inner))?,
        gate: silu_experts(object, spec)?,
        normalised: object.boolean("norm_topk_prob", false)?,
        bias: false,
        shared: None,
        names: ExpertNames {
            router: "mlp.gate",
            experts: "mlp.experts",
            projections: ExpertProjections::Apart(["gate_proj", "up_proj", "down_proj"]),
        },
    })
}

fn qwen3_moe(object: &Object<'_>) -> Result<ModelSpec> {
    let defaults = Defaults {
        vocab_size: Some(151_936),
        hidden_size: Some(2048),
        intermediate_size: Some(6144),
        num_hidden_layers: Some(24),
        num_attention_heads: Some(32),
        num_key_value_heads: Some(4),
        max_position_embeddings: 32768,
        ..Defaults::LLAMA
    };
    let spec = decoder(object, defaults)?;
    // Under either name.
    let key = if object.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let mlp = qwen_experts(object, &spec, key, [128, 8, 768])?;
    let bias = object.boolean("attention_bias", false)?;
    let on = object.boolean("use_sliding_window", false)?;
    let window = object.size("sliding_window", Some(4096))?;
    // Read, and without effect: with windows on, every layer has one.
    object.count("max_window_layers", 28)?;
    let sliding = layer_types(object, spec.layers.len(), |_| on)?;
    let layers = windowed(object, &sliding, on.then_some(window), [0, 0])?;
    whole_experts(object, &spec)?;
    let qk_norm = Some(QkNorm::Head);
    Ok(ModelSpec { layers, qk_norm, attention_bias: bias, output_bias: bias, mlp: Mlp::Experts(mlp), ..spec })
}

fn gpt_oss(object: &Object<'_>) -> Result<ModelSpec> {
    let defaults = Defaults {
        vocab_size: Some(201_088),
        hidden_size: Some(2880),
        intermediate_size: Some(2880),
        num_hidden_layers: Some(36),
        num_attention_heads: Some(64),
        num_key_value_heads: Some(8),
        head_dim: Some(64),
        max_position_embeddings: 131_072,
        rms_norm_eps: 1e-5,
        rope_theta: 150_000.0,
        mxfp4: true,
        ..Defaults::LLAMA
    };
    let spec = decoder(object, defaults)?;
    object.fixed("swiglu_limit", &[json!(7.0), json!(7)])?;
    object.fixed("swiglu_alpha", &[json!(1.702)])?;
    let projections = ["gate_up_proj", "down_proj"];
    let names = ExpertNames {
        router: "mlp.router",
        experts: "mlp.experts",
        projections: match object.get("quantization_config") {
            Some(config) if quantization::is_mxfp4(config) => ExpertProjections::Mxfp4(projections),
            _ => ExpertProjections::Together(projections),
        },
    };
    let [count, chosen] = experts(object, ["num_local_experts", "num_experts_per_tok"], [128, 4])?;
    // Another name of the same number, and one that nothing is computed with.
    object.fixed("experts_per_token", &[json!(chosen)])?;
    object.get("initial_context_length");
    let mlp = Experts {
        count,
        chosen,
        inner: spec.mlp.inner(),
        gate: ExpertGate::ClampedSwiglu,
        normalised: true,
        bias: true,
        shared: None,
        names,
    };
    let bias = object.boolean("attention_bias", true)?;
    let sliding = layer_types(object, spec.layers.len(), |layer| layer % 2 == 0)?;
    let window = object.size("sliding_window", Some(128))?;
    let layers = windowed(object, &sliding, Some(window), [0, 0])?;
    whole_experts(object, &spec)?;
    Ok(ModelSpec { layers, attention_bias: bias, output_bias: bias, sinks: true, mlp: Mlp::Experts(mlp), ..spec })
}

/// How many experts there are, and how many of them work on a token.
fn experts(object: &Object<'_>, [count_key, chosen_key]: [&str; 2], defaults: [usize; 2]) -> Result<[usize; 2]> {
    let (count, chosen) = (object.size(count_key, Some(defaults[0]))?, object.size(chosen_key, Some(defaults[1]))?);
    match chosen <= count {
        true => Ok([count, chosen]),
        false => {
            Err(object.refuse(chosen_key, chosen, format!("is more than {count_key} = {count}"), "repair config.json"))
        }
    }
}

/// The gate of experts whose config names SiLU.
fn silu_experts(object: &Object<'_>, spec: &ModelSpec) -> Result<ExpertGate> {
    match gated(spec).gate {
        Gate::Silu => Ok(ExpertGate::Silu),
        Gate::GeluTanh => {
            let name = object.get("hidden_act").unwrap_or(&Value::Null);
            Err(object.refuse("hidden_act", name, "is not supported with experts", "use a model with \"silu\""))
        }
    }
}

/// Refuses experts that are quantized.
fn whole_experts(object: &Object<'_>, spec: &ModelSpec) -> Result<()> {
    let value = object.get("quantization_config").filter(|_| spec.quantization.is_some());
    value.map_or(Ok(()), |value| {
        let fix = "use a checkpoint of bf16 or f32";
        Err(object.refuse("quantization_config", value, "is not supported with experts", fix))
    })
}

/// What all Gemmas have: norms whose weights are distances from 1, scaled embeddings, a GELU.
fn gemmas(object: &Object<'_>, defaults: Defaults) -> Result<ModelSpec> {
    let bias = object.boolean("attention_bias", false)?;
    let spec = decoder(object, defaults)?;
    Ok(ModelSpec {
        norm: Norm { plus_one: true, ..spec.norm },
        embedding_scale: Some((spec.hidden_size as f64).sqrt()),
        attention_bias: bias,
        output_bias: bias,
        ..spec
    })
}

/// With norms on both sides, as Gemma names them.
fn both_norms(spec: ModelSpec) -> ModelSpec {
    let norms =
        ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"];
    ModelSpec { norms: NormPlaces::Both, names: Names { norms, ..spec.names }, ..spec }
}

/// What all families share: a decoder of sizes, with one rope, no windows, norms before, and a gated MLP.
fn decoder(object: &Object<'_>, defaults: Defaults) -> Result<ModelSpec> {
    for key in ["rope_interleaved", "use_qk_norm", "qk_layernorm"] {
        object.fixed(key, &[json!(false)])?;
    }
    let hidden_size = object.size("hidden_size", defaults.hidden_size)?;
    let q_heads = object.size("num_attention_heads", defaults.num_attention_heads)?;
    let kv_heads = object.size("num_key_value_heads", Some(defaults.num_key_value_heads.unwrap_or(q_heads)))?;
    if !q_heads.is_multiple_of(kv_heads) {
        let limit = format!("does not divide num_attention_heads = {q_heads}");
        return Err(object.refuse("num_key_value_heads", kv_heads, limit, "repair config.json"));
    }
    let default_head = match (object.get("head_dim"), defaults.head_dim) {
        (None, None) if !hidden_size.is_multiple_of(q_heads) => {
            let limit = format!("is not a multiple of num_attention_heads = {q_heads}, and head_dim is not given");
            return Err(object.refuse("hidden_size", hidden_size, limit, "repair config.json"));
        }
        (_, given) => given.unwrap_or((hidden_size / q_heads).max(1)),
    };
    let head_dim = object.size("head_dim", Some(default_head))?;
    if !head_dim.is_multiple_of(2) {
        return Err(object.refuse("head_dim", head_dim, "is odd; rotary embedding needs pairs", "repair config.json"));
    }
    let vocab_size = object.size("vocab_size", defaults.vocab_size)?;
    let inner = object.size("intermediate_size", defaults.intermediate_size)?;
    let mlp = Mlp::Gated(GatedMlp { inner, gate: gate(object, defaults.gate)?, bias: false });
    let quantization = quantization(object, [hidden_size, q_heads * head_dim, inner], defaults.mxfp4)?;
    let layers = object.size("num_hidden_layers", defaults.num_hidden_layers)?;
    let max_positions = object.size("max_position_embeddings", Some(defaults.max_position_embeddings))?;
    let rope = model_rope(object, defaults.rope_theta, head_dim, max_positions)?;
    if !defaults.partial_rotary && rope.rotated != head_dim {
        let (part, fix) = (rope.rotated as f64 / head_dim as f64, "use a model with partial_rotary_factor = 1");
        return Err(object.refuse("partial_rotary_factor", part, "is not supported of this model type", fix));
    }
    Ok(ModelSpec {
        vocab_size,
        hidden_size,
        layers: vec![LayerKind { window: None, rope: 0 }; layers],
        q_heads,
        kv_heads,
        head_dim,
        norm: Norm { epsilon: object.positive("rms_norm_eps", Some(defaults.rms_norm_eps))?, plus_one: false },
        norms: NormPlaces::Before,
        qk_norm: None,
        attention_bias: false,
        output_bias: false,
        attention_scale: (head_dim as f64).powf(-0.5),
        attention_soft_cap: None,
        sinks: false,
        ropes: vec![rope],
        mlp,
        embedding_scale: None,
        logit_soft_cap: None,
        max_position_embeddings: max_positions,
        tie_word_embeddings: object.boolean("tie_word_embeddings", defaults.tie_word_embeddings)?,
        quantization,
        bos_token_id: object.token_ids("bos_token_id", vocab_size)?.and_then(|ids| ids.first().copied()),
        eos_token_ids: object.token_ids("eos_token_id", vocab_size)?.unwrap_or_default(),
        names: Names::LLAMA,
    })
}

fn gated(spec: &ModelSpec) -> GatedMlp {
    let Mlp::Gated(mlp) = spec.mlp else { unreachable!("a decoder's MLP is gated before its family says otherwise") };
    mlp
}

/// The function of the gate. Gemma's files name it in `hidden_activation`, and older ones `gelu` in `hidden_act`, by which they
/// mean the approximation.
fn gate(object: &Object<'_>, default: Option<Gate>) -> Result<Gate> {
    let (of_gemma, usual) = (default.and_then(|_| object.get("hidden_activation")), object.get("hidden_act"));
    let (key, name) = of_gemma.map_or(("hidden_act", usual), |name| ("hidden_activation", Some(name)));
    match name.map(|name| name.as_str()) {
        None => Ok(default.unwrap_or(Gate::Silu)),
        Some(Some("silu" | "swish")) => Ok(Gate::Silu),
        Some(Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast")) => Ok(Gate::GeluTanh),
        Some(Some("gelu")) if key == "hidden_act" && default.is_some() => Ok(Gate::GeluTanh),
        Some(_) => {
            let fix = format!("use a model with {key} = \"silu\" or \"gelu_pytorch_tanh\"");
            Err(object.refuse(key, name.unwrap_or(&Value::Null), "is not supported", fix))
        }
    }
}

/// A soft cap, for which null is none and an absent key the default.
fn soft_cap(object: &Object<'_>, key: &str, default: Option<f64>) -> Result<Option<f64>> {
    match object.raw(key) {
        None => Ok(default),
        Some(_) => object.optional_positive(key),
    }
}

/// Of each layer, whether it has a window: as `layer_types` says, or by default.
fn layer_types(object: &Object<'_>, layers: usize, by_default: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
    let what = "\"full_attention\" or \"sliding_attention\"";
    let given = object.per_layer("layer_types", layers, what, |value| match value.as_str() {
        Some("full_attention") => Some(false),
        Some("sliding_attention") => Some(true),
        _ => None,
    })?;
    Ok(given.unwrap_or_else(|| (0..layers).map(by_default).collect()))
}

/// The kinds of layers, with a window or without, each with the rope that `[full, sliding]` says.
fn windowed(object: &Object<'_>, sliding: &[bool], window: Option<usize>, ropes: [usize; 2]) -> Result<Vec<LayerKind>> {
    if sliding.contains(&true) && window.is_none() {
        let problem = "layer_types has \"sliding_attention\", but there is no sliding_window";
        return Err(Error::file(object.path, problem, "repair config.json"));
    }
    let kind = |&sliding: &bool| LayerKind { window: window.filter(|_| sliding), rope: ropes[usize::from(sliding)] };
    Ok(sliding.iter().map(kind).collect())
}

/// Qwen's layers: where windows are on, all but the first `max_window_layers` have one.
fn last_windowed(object: &Object<'_>, layers: usize) -> Result<Vec<LayerKind>> {
    let on = object.boolean("use_sliding_window", false)?;
    let window = object.size("sliding_window", Some(4096))?;
    let first = object.count("max_window_layers", 28)?;
    let sliding = layer_types(object, layers, |layer| on && layer >= first)?;
    windowed(object, &sliding, on.then_some(window), [0, 0])
}

/// How projections are quantized: groups of features that share a scale are whole, for inputs of these sizes. Where experts may
/// be stored in 4 bits, nothing else is.
fn quantization(object: &Object<'_>, [hidden, heads, inner]: [usize; 3], mxfp4: bool) -> Result<Option<Quantization>> {
    let sizes = [("hidden_size", hidden), ("num_attention_heads * head_dim", heads), ("intermediate_size", inner)];
    let whole = |group: usize, sizes: &[(&str, usize)]| match sizes.iter().find(|(_, size)| !size.is_multiple_of(group))
    {
        None => Ok(()),
        Some((key, size)) => {
            let limit = format!("is not a multiple of the {group} features that share a scale");
            Err(object.refuse(key, size, limit, "repair config.json"))
        }
    };
    if let Some(config) = object.get("quantization_config").filter(|config| mxfp4 && quantization::is_mxfp4(config)) {
        quantization::check_mxfp4(object.path, config)?;
        // Attention has no such numbers.
        whole(mxfp4::BLOCK, &[sizes[0], sizes[2]])?;
        return Ok(None);
    }
    let quantization = object.get("quantization_config").map(|value| Quantization::parse(object.path, value));
    let quantization = quantization.transpose()?;
    quantization.and_then(Quantization::group).map_or(Ok(()), |group| whole(group, &sizes))?;
    Ok(quantization)
}

/// What a config says of its ropes beside their own parameters.
#[derive(Clone, Copy)]
struct RopeDefaults {
    theta: f64,
    head_dim: usize,
    partial: f64,
    max_positions: f64,
    original: Option<f64>,
}

/// The model's rope, or that of its layers without a window. Transformers 5 moved `rope_theta`, `rope_scaling` and
/// `partial_rotary_factor` into `rope_parameters`, which has one object per type of layer where these differ.
fn model_rope(object: &Object<'_>, theta: f64, head_dim: usize, max_positions: usize) -> Result<Rope> {
    let defaults = RopeDefaults {
        theta: object.positive("rope_theta", Some(theta))?,
        head_dim,
        partial: object.positive("partial_rotary_factor", Some(1.0))?,
        max_positions: max_positions as f64,
        original: object.optional_positive("original_max_position_embeddings")?,
    };
    // Both are read, so that both are known.
    match (object.object("rope_parameters")?, object.object("rope_scaling")?) {
        (Some(parameters), _) => match parameters.object("full_attention")? {
            Some(full) => rope(&full, defaults),
            None => rope(&parameters, defaults),
        },
        (None, Some(scaling)) => rope(&scaling, defaults),
        (None, None) => Ok(Rope { theta: defaults.theta, rotated: rotated(object, defaults)?, scaling: None }),
    }
}

/// Features of a head that turn.
fn rotated(object: &Object<'_>, RopeDefaults { head_dim, partial, .. }: RopeDefaults) -> Result<usize> {
    let rotated = (head_dim as f64 * partial) as usize;
    if partial > 1.0 || rotated == 0 || !rotated.is_multiple_of(2) {
        let limit = format!("has {rotated} of head_dim = {head_dim} features rotated, which are not pairs of them");
        return Err(object.refuse("partial_rotary_factor", partial, limit, "repair config.json"));
    }
    Ok(rotated)
}

/// A rope by its own parameters.
fn rope(object: &Object<'_>, defaults: RopeDefaults) -> Result<Rope> {
    let RopeDefaults { theta, partial, max_positions, original, .. } = defaults;
    let theta = object.positive("rope_theta", Some(theta))?;
    let partial = object.positive("partial_rotary_factor", Some(partial))?;
    let rotated = rotated(object, RopeDefaults { partial, ..defaults })?;
    let kinds = ["rope_type", "type"].map(|key| Some((key, object.get(key)?)));
    let (key, kind) = kinds.into_iter().flatten().next().unwrap_or(("rope_type", &Value::Null));
    let original = || object.positive("original_max_position_embeddings", original.or(Some(max_positions)));
    let scaling = match kind.as_str() {
        Some("default") => None,
        Some("linear") => Some(RopeScaling::Linear { factor: object.positive("factor", None)? }),
        // It stretches contexts beyond `max_position_embeddings` alone, which no run may have.
        Some("dynamic") => {
            object.positive("factor", None)?;
            None
        }
        Some("llama3") => Some(RopeScaling::Llama3(llama3(object)?)),
        Some("yarn") => {
            let original = original()?;
            Some(RopeScaling::Yarn(yarn(object, original, max_positions / original)?))
        }
        Some("longrope" | "su") => {
            let original = original()?;
            Some(RopeScaling::LongRope(long_rope(object, rotated / 2, original, max_positions / original)?))
        }
        _ => {
            let fix = "use a model with \"default\", \"linear\", \"dynamic\", \"llama3\", \"yarn\" or \"longrope\"";
            return Err(object.refuse(key, kind, "is not supported", fix));
        }
    };
    object.finish()?;
    Ok(Rope { theta, rotated, scaling })
}

fn llama3(object: &Object<'_>) -> Result<Llama3Scaling> {
    let scaling = Llama3Scaling {
        factor: object.positive("factor", None)?,
        low_freq_factor: object.positive("low_freq_factor", None)?,
        high_freq_factor: object.positive("high_freq_factor", None)?,
        original_max_position_embeddings: object.positive("original_max_position_embeddings", None)?,
    };
    if scaling.high_freq_factor <= scaling.low_freq_factor {
        let limit = format!("is not above low_freq_factor = {}", scaling.low_freq_factor);
        return Err(object.refuse("high_freq_factor", scaling.high_freq_factor, limit, "repair config.json"));
    }
    Ok(scaling)
}

/// `ratio`: how many times the original context the model was made for.
fn yarn(object: &Object<'_>, original_max_position_embeddings: f64, ratio: f64) -> Result<YarnScaling> {
    let factor = object.positive("factor", Some(ratio))?;
    let [own, all] = ["mscale", "mscale_all_dim"].map(|key| object.optional_positive(key));
    let growth = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
    let usual = match (own?, all?) {
        (Some(own), Some(all)) => growth(own) / growth(all),
        _ => growth(1.0),
    };
    Ok(YarnScaling {
        factor,
        beta_fast: object.positive("beta_fast", Some(32.0))?,
        beta_slow: object.positive("beta_slow", Some(1.0))?,
        truncate: object.boolean("truncate", true)?,
        original_max_position_embeddings,
        attention_factor: object.positive("attention_factor", Some(usual))?,
    })
}

/// As [`yarn`], with factors for so many pairs.
fn long_rope(
    object: &Object<'_>,
    pairs: usize,
    original_max_position_embeddings: f64,
    ratio: f64,
) -> Result<LongRopeScaling> {
    let factor = object.positive("factor", Some(ratio))?;
    let usual = match factor > 1.0 {
        true => (1.0 + factor.ln() / original_max_position_embeddings.ln()).sqrt(),
        false => 1.0,
    };
    Ok(LongRopeScaling {
        short: object.positives("short_factor", pairs)?,
        long: object.positives("long_factor", pairs)?,
        original_max_position_embeddings,
        attention_factor: object.positive("attention_factor", Some(usual))?,
    })
}
