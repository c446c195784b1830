//! What a model is: one description for every family of decoders that runs.
//!
//! A family is a function from `config.json` to a [`ModelSpec`] (`families`), and a map of names to the
//! tensors in its files ([`Names`]). The step program, the weights, the planner of `check` and the f64 reference read the
//! description and nothing else: none of them knows a family. What a description cannot say is refused where the file is read.

use std::f64::consts::{PI, TAU};

use super::quantization::Quantization;

/// A decoder, with every size checked for consistency.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// The layers, each of some kind.
    pub layers: Vec<LayerKind>,
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Every norm of the residual stream.
    pub norm: Norm,
    /// Where a layer's norms stand.
    pub norms: NormPlaces,
    /// Whether queries and keys are normed before they are rotated.
    pub qk_norm: Option<QkNorm>,
    /// Whether the query, key and value projections have biases.
    pub attention_bias: bool,
    /// Whether attention's output projection has biases.
    pub output_bias: bool,
    /// Factor of attention's logits.
    pub attention_scale: f64,
    /// Attention's logits `x` become `c * tanh(x / c)`.
    pub attention_soft_cap: Option<f64>,
    /// Whether each query head has a logit of its own in the softmax's sum.
    pub sinks: bool,
    /// The rotary embeddings that layers have.
    pub ropes: Vec<Rope>,
    /// What follows attention in each layer.
    pub mlp: Mlp,
    /// Embeddings are multiplied by it.
    pub embedding_scale: Option<f64>,
    /// The model's logits `x` become `c * tanh(x / c)`.
    pub logit_soft_cap: Option<f64>,
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
    /// What the tensors are called in the model's files.
    pub names: Names,
}

/// What the layers of a model differ in, beside their weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerKind {
    /// A token sees only so many of the last tokens, itself among them.
    pub window: Option<usize>,
    /// Which of the model's ropes.
    pub rope: usize,
}

/// Root-mean-square norm: `x / sqrt(mean(x^2) + epsilon) * weight`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Added to the mean of the squares.
    pub epsilon: f64,
    /// The factor is `1 + weight`: what is stored is its distance from 1.
    pub plus_one: bool,
}

/// Where the norms of a layer stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlaces {
    /// `x + f(norm(x))`.
    Before,
    /// `x + norm(f(x))`.
    After,
    /// `x + norm(f(norm(x)))`.
    Both,
}

impl NormPlaces {
    /// Whether there is a norm before attention and one before the MLP.
    pub fn before(self) -> bool {
        self != Self::After
    }

    /// Whether there is a norm behind attention and one behind the MLP.
    pub fn after(self) -> bool {
        self != Self::Before
    }
}

/// Over what queries and keys are normed, with [`ModelSpec::norm`]'s formula.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself, all with one weight `[head_dim]`.
    Head,
    /// All heads of a token together, with a weight for every feature.
    Projection,
}

/// The part of a layer behind attention.
#[derive(Clone, Debug, PartialEq)]
pub enum Mlp {
    /// `down(activation(gate(x)) * up(x))`.
    Gated(GatedMlp),
    /// The weighted sum of a few such MLPs, chosen for each token.
    Experts(Experts),
}

impl Mlp {
    /// Width between its projections.
    pub fn inner(&self) -> usize {
        match self {
            Self::Gated(mlp) => mlp.inner,
            Self::Experts(experts) => experts.inner,
        }
    }
}

/// A mixture of experts. A router, a projection of the normed `x`, gives each expert a logit; the experts with the largest ones
/// work on the token, each weighed by its part of the softmax.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many work on a token.
    pub chosen: usize,
    /// Width between an expert's projections.
    pub inner: usize,
    /// What becomes of gates and ups.
    pub gate: ExpertGate,
    /// Whether the softmax is over the chosen experts alone, so that their weights add up to 1; else it is over all.
    pub normalised: bool,
    /// Whether the router and the experts' projections have biases.
    pub bias: bool,
    /// What every token goes through beside its experts.
    pub shared: Option<SharedExpert>,
    /// What their tensors are called.
    pub names: ExpertNames,
}

/// A gated MLP of SiLU that works on every token. What it makes is weighed by `sigmoid(gate(x))`, a projection to one number, and
/// added to what the chosen experts make (`Qwen2MoeSparseMoeBlock` of transformers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedExpert {
    /// Width between its projections.
    pub inner: usize,
    /// What its tensors are called within a layer: gate and up projections, the down projection, and its own gate.
    pub names: ([&'static str; 2], &'static str, &'static str),
}

/// What becomes of an expert's gates and ups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertGate {
    /// `gate * sigmoid(gate) * up`.
    Silu,
    /// `gate * sigmoid(1.702 gate) * (up + 1)` with gates up to 7 and ups from -7 to 7.
    ClampedSwiglu,
}

/// What the tensors of experts are called, within a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertNames {
    /// The router.
    pub router: &'static str,
    /// The experts, before their numbers or their projections.
    pub experts: &'static str,
    /// Gate, up and down projections.
    pub projections: ExpertProjections,
}

/// How the projections of experts are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertProjections {
    /// Each expert's are tensors `[out, in]` of their own: gate, up and down.
    Apart([&'static str; 3]),
    /// One tensor `[experts, in, out]` of all experts' gates and ups, which take turns, and one of the down projections.
    Together([&'static str; 2]),
    /// As together, but `[experts, out, in]` in numbers of 4 bits: `NAME_blocks` has those of 32 inputs, `[experts, out, in / 32,
    /// 16]`, and `NAME_scales` a power of two for each (MXFP4).
    Mxfp4([&'static str; 2]),
}

/// The sizes of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedMlp {
    /// Width between its projections.
    pub inner: usize,
    /// What becomes of the gate.
    pub gate: Gate,
    /// Whether its projections have biases.
    pub bias: bool,
}

/// The function of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`.
    GeluTanh,
}

/// A rotary embedding: pairs `(i, i + rotated / 2)` of a head's first `rotated` features turn with the position.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Features that turn; 0 for layers without positions.
    pub rotated: usize,
    /// What stretches the frequencies, if anything does.
    pub scaling: Option<RopeScaling>,
}

/// A change of the rotary frequencies, for longer contexts than those of pre-training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// All frequencies are divided by `factor`.
    Linear {
        /// The division.
        factor: f64,
    },
    /// Type `llama3`.
    Llama3(Llama3Scaling),
    /// Type `yarn`.
    Yarn(YarnScaling),
    /// Type `longrope`.
    LongRope(LongRopeScaling),
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

/// `rope_scaling` of type `yarn` (Peng et al., 2023): pairs are blended by their number, between the two that make `beta_fast`
/// and `beta_slow` turns within the original context. Queries and keys are multiplied by `attention_factor`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct YarnScaling {
    /// Division of the frequencies of the slow pairs.
    pub factor: f64,
    /// Pairs of more turns are kept.
    pub beta_fast: f64,
    /// Pairs of fewer turns are divided.
    pub beta_slow: f64,
    /// Whether the blend begins and ends at whole pairs.
    pub truncate: bool,
    /// The context of pre-training.
    pub original_max_position_embeddings: f64,
    /// Factor of the rotated features of queries and keys.
    pub attention_factor: f64,
}

/// `rope_scaling` of type `longrope` (Ding et al., 2024): each pair's frequency is divided by a factor of its own, of the short
/// list up to the original context, else of the long one.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRopeScaling {
    /// For contexts up to the original one, a factor per pair.
    pub short: Vec<f64>,
    /// For longer ones.
    pub long: Vec<f64>,
    /// The context of pre-training.
    pub original_max_position_embeddings: f64,
    /// Factor of the rotated features of queries and keys.
    pub attention_factor: f64,
}

/// What a model's tensors are called: names within a layer, without `.weight` and `.bias`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// The norms of [`NormPlaces`]: before attention, behind it, before the MLP, behind it.
    pub norms: [&'static str; 4],
    /// Query, key and value projections.
    pub qkv: Parts<3>,
    /// The norms of queries and of keys.
    pub qk_norms: [&'static str; 2],
    /// Attention's output projection.
    pub output: &'static str,
    /// Logits of the attention sinks; the whole name.
    pub sinks: &'static str,
    /// Gate and up projections.
    pub gate_up: Parts<2>,
    /// Down projection.
    pub down: &'static str,
}

/// Projections that are applied together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts<const N: usize> {
    /// Each is a tensor of its own.
    Apart([&'static str; N]),
    /// One tensor has the rows of all, one below the other.
    Fused(&'static str),
}

impl Names {
    /// Those of Llama, which most families share.
    pub const LLAMA: Self = Self {
        norms: [
            "input_layernorm",
            "post_attention_layernorm",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        ],
        qkv: Parts::Apart(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        qk_norms: ["self_attn.q_norm", "self_attn.k_norm"],
        output: "self_attn.o_proj",
        sinks: "self_attn.sinks",
        gate_up: Parts::Apart(["mlp.gate_proj", "mlp.up_proj"]),
        down: "mlp.down_proj",
    };
}

impl ModelSpec {
    /// The kinds of layers that there are, in the order of their first layers.
    pub fn kinds(&self) -> Vec<LayerKind> {
        let mut kinds = Vec::new();
        self.layers.iter().for_each(|kind| {
            if !kinds.contains(kind) {
                kinds.push(*kind);
            }
        });
        kinds
    }

    /// Of each layer, which of [`kinds`](Self::kinds) it is.
    pub fn kind_of_layers(&self) -> Vec<usize> {
        let kinds = self.kinds();
        self.layers.iter().filter_map(|layer| kinds.iter().position(|kind| kind == layer)).collect()
    }

    /// What the longest sequence of a run decides of the model, and what its file does: a line each, for people.
    pub fn notes(&self, max_seq_len: usize) -> Vec<String> {
        let note = |rope: &Rope| match &rope.scaling {
            Some(RopeScaling::LongRope(long)) => {
                let (list, place) = if long.is_long(max_seq_len) { ("long", "beyond") } else { ("short", "within") };
                let original = long.original_max_position_embeddings;
                Some(format!(
                    "rope: longrope with {list}_factor, as engine.max_seq_len = {max_seq_len} is {place} the original {original}"
                ))
            }
            _ => None,
        };
        let in_4_bits = match &self.mlp {
            Mlp::Experts(experts) => matches!(experts.names.projections, ExpertProjections::Mxfp4(_)),
            Mlp::Gated(_) => false,
        };
        let experts = "experts: mxfp4 in the file, engine.compute_dtype on the device: four or eight times as much";
        self.ropes.iter().filter_map(note).chain(in_4_bits.then(|| experts.to_owned())).collect()
    }

    /// Features of a head that turn; the same for all ropes that have any.
    pub fn rotated(&self) -> usize {
        self.ropes.iter().map(|rope| rope.rotated).max().unwrap_or(0)
    }
}

/// How fast the pairs of a head turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Turning {
    /// Radians per position, of the pairs that turn.
    pub frequencies: Vec<f64>,
    /// What their features are multiplied by.
    pub factor: f64,
}

impl Rope {
    /// For layers without positions.
    pub const NONE: Self = Self { theta: 1.0, rotated: 0, scaling: None };

    /// The frequencies of the pairs, in a program of so many positions: pair `i` turns by `theta^(-2i / rotated)`, after the
    /// scaling.
    pub fn turning(&self, positions: usize) -> Turning {
        let width = self.rotated as f64;
        let plain = (0..self.rotated / 2).map(|pair| self.theta.powf(-2.0 * pair as f64 / width));
        let scaled =
            |scaling: &dyn Fn(usize, f64) -> f64| plain.clone().enumerate().map(|(at, f)| scaling(at, f)).collect();
        let (frequencies, factor) = match &self.scaling {
            None => (plain.collect(), 1.0),
            Some(RopeScaling::Linear { factor }) => (scaled(&|_, frequency| frequency / factor), 1.0),
            Some(RopeScaling::Llama3(llama3)) => (scaled(&|_, frequency| llama3.apply(frequency)), 1.0),
            Some(RopeScaling::Yarn(yarn)) => {
                let [low, high] = yarn.blended(self.theta, width);
                let apply = |pair: usize, frequency: f64| {
                    let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    frequency * (divided / yarn.factor + 1.0 - divided)
                };
                (scaled(&apply), yarn.attention_factor)
            }
            Some(RopeScaling::LongRope(rope)) => {
                let factors = rope.factors(positions);
                (scaled(&|pair, frequency| frequency / factors[pair]), rope.attention_factor)
            }
        };
        Turning { frequencies, factor }
    }
}

/// The formula of the Llama 3.1 release.
impl Llama3Scaling {
    fn apply(self, frequency: f64) -> f64 {
        // How many full turns the pair makes within the original context.
        let turns = self.original_max_position_embeddings * frequency / TAU;
        let blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
        let blend = blend.clamp(0.0, 1.0);
        (1.0 - blend) * frequency / self.factor + blend * frequency
    }
}

impl YarnScaling {
    /// The pairs between which frequencies are blended: the last that is kept, the first that is divided.
    fn blended(self, theta: f64, width: f64) -> [f64; 2] {
        let pair =
            |turns: f64| width * (self.original_max_position_embeddings / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (low, high) = (pair(self.beta_fast), pair(self.beta_slow));
        let (low, high) = if self.truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(width - 1.0));
        // As transformers has it: a blend of no width would divide by zero.
        [low, if low == high { high + 0.001 } else { high }]
    }
}

impl LongRopeScaling {
    /// Whether a program of so many positions is beyond the original context.
    pub fn is_long(&self, positions: usize) -> bool {
        positions as f64 > self.original_max_position_embeddings
    }

    fn factors(&self, positions: usize) -> &[f64] {
        if self.is_long(positions) { &self.long } else { &self.short }
    }
}
