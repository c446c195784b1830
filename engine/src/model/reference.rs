//! The reference: a decoder's forward pass in float64, as plain loops, written from the models' definitions.
//!
//! It shares no code with the step program, not even the rotary frequencies: its only inputs are the description's
//! numbers and the weights as the files have them. It sees one whole sequence, without pages, batches or chunks. It must never be
//! used to make text for users: a weight takes 8 bytes here, and nothing is blocked, fused or threaded.

use std::f64::consts::{PI, TAU};

use pagoda_ir::{Element, HostTensor};

use super::spec::{
    ExpertGate, ExpertProjections, Experts, Gate, GatedMlp, LayerKind, Llama3Scaling, Mlp, ModelSpec, Norm, Parts,
    QkNorm, Rope, RopeScaling, SharedExpert,
};
use super::weights::Weights;
use crate::error::Result;

/// A projection: its matrix `[out, in]` and, where the model has them, its biases `[out]`.
struct Projection {
    matrix: Vec<f64>,
    bias: Option<Vec<f64>>,
    /// The type that its input is quantized to.
    quantizes: Option<Element>,
}

struct Layer {
    kind: LayerKind,
    /// Before attention, behind it, before the MLP, behind it.
    norms: [Option<Vec<f64>>; 4],
    qkv: [Projection; 3],
    /// Of queries and keys.
    qk_norms: Option<[Vec<f64>; 2]>,
    sinks: Option<Vec<f64>>,
    output: Projection,
    mlp: Inner,
}

/// What follows attention.
enum Inner {
    Gated {
        sizes: GatedMlp,
        gate_up: [Projection; 2],
        down: Projection,
    },
    /// Of each expert gate, up and down projections.
    Experts {
        sizes: Experts,
        router: Projection,
        experts: Vec<[Projection; 3]>,
        /// The expert that all tokens share, and the gate of what it makes.
        shared: Option<(Box<Inner>, Projection)>,
    },
}

/// A model in float64.
pub struct Reference {
    config: ModelSpec,
    embedding: Vec<f64>,
    layers: Vec<Layer>,
    final_norm: Vec<f64>,
    /// The output projection, unless it is the embedding.
    head: Option<Projection>,
    /// Whether contexts may be longer than those of pre-training.
    long: bool,
}

/// One sequence: the keys and values of all tokens so far.
pub struct Session<'a> {
    model: &'a Reference,
    /// Per layer: `[tokens, kv_heads * head_dim]`, keys rotated.
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
    position: usize,
}

/// The tensors of a model.
struct Loader<'w> {
    config: &'w ModelSpec,
    weights: &'w Weights,
    quantizes: Option<Element>,
}

impl Loader<'_> {
    fn load(&self, name: &str) -> Result<Vec<f64>> {
        self.weights.values(name)
    }

    /// Numbers of 4 bits (sign, two bits of exponent, one of mantissa), 32 to a power of two: OCP's MXFP4.
    fn of_4_bits(&self, name: &str) -> Result<Vec<f64>> {
        let [blocks, scales] = ["blocks", "scales"].map(|part| self.weights.bytes(&format!("{name}_{part}")));
        let (blocks, scales) = (blocks?, scales?);
        let number = |at: usize| {
            let code = blocks[at / 2] >> (at % 2 * 4);
            let (exponent, half) = (i32::from(code >> 1 & 3), f64::from(code & 1) / 2.0);
            let magnitude = if exponent == 0 { half } else { (1.0 + half) * 2f64.powi(exponent - 1) };
            let signed = if code >> 3 & 1 == 1 { -magnitude } else { magnitude };
            signed * 2f64.powi(i32::from(scales[at / 32]) - 127)
        };
        Ok((0..2 * blocks.len()).map(number).collect())
    }

    fn projection(&self, name: &str, biased: bool) -> Result<Projection> {
        let bias = if biased { Some(self.load(&format!("{name}.bias"))?) } else { None };
        Ok(Projection { matrix: self.load(&format!("{name}.weight"))?, bias, quantizes: self.quantizes })
    }

    /// Projections of so many features each, by themselves or one below the other.
    fn projections<const N: usize>(
        &self,
        layer: &str,
        parts: Parts<N>,
        features: [usize; N],
        biased: bool,
    ) -> Result<[Projection; N]> {
        let projections: Vec<Projection> = match parts {
            Parts::Apart(names) => {
                names.iter().map(|name| self.projection(&format!("{layer}.{name}"), biased)).collect::<Result<_>>()?
            }
            Parts::Fused(name) => {
                let mut all = self.projection(&format!("{layer}.{name}"), biased)?;
                let width = all.matrix.len() / features.iter().sum::<usize>();
                let mut first = |count: &usize| Projection {
                    matrix: all.matrix.drain(..count * width).collect(),
                    bias: all.bias.as_mut().map(|bias| bias.drain(..*count).collect()),
                    quantizes: all.quantizes,
                };
                features.iter().map(&mut first).collect()
            }
        };
        Ok(projections.try_into().unwrap_or_else(|_| unreachable!("as many as there are features")))
    }

    fn layer(&self, at: usize) -> Result<Layer> {
        let (config, names) = (self.config, &self.config.names);
        let layer = format!("model.layers.{at}");
        let norm = |name: &str, there: bool| match there {
            true => self.load(&format!("{layer}.{name}.weight")).map(Some),
            false => Ok(None),
        };
        let (before, after) = (config.norms.before(), config.norms.after());
        let [first, second, third, fourth] = names.norms;
        let [queries, keys] = [config.q_heads, config.kv_heads].map(|heads| heads * config.head_dim);
        let qk_norms = match config.qk_norm {
            None => None,
            Some(_) => {
                let [q, k] = names.qk_norms.map(|name| self.load(&format!("{layer}.{name}.weight")));
                Some([q?, k?])
            }
        };
        Ok(Layer {
            kind: config.layers[at],
            norms: [norm(first, before)?, norm(second, after)?, norm(third, before)?, norm(fourth, after)?],
            qkv: self.projections(&layer, names.qkv, [queries, keys, keys], config.attention_bias)?,
            qk_norms,
            sinks: if config.sinks { Some(self.load(&format!("{layer}.{}", names.sinks))?) } else { None },
            output: self.projection(&format!("{layer}.{}", names.output), config.output_bias)?,
            mlp: match config.mlp {
                Mlp::Gated(sizes) => Inner::Gated {
                    sizes,
                    gate_up: self.projections(&layer, names.gate_up, [sizes.inner; 2], sizes.bias)?,
                    down: self.projection(&format!("{layer}.{}", names.down), sizes.bias)?,
                },
                Mlp::Experts(sizes) => Inner::Experts {
                    sizes,
                    router: self.projection(&format!("{layer}.{}", sizes.names.router), sizes.bias)?,
                    experts: self.experts(&layer, sizes)?,
                    shared: match sizes.shared {
                        None => None,
                        Some(SharedExpert { inner, names: (gate_up, down, gate) }) => {
                            let expert = Inner::Gated {
                                sizes: GatedMlp { inner, gate: Gate::Silu, bias: false },
                                gate_up: self.projections(&layer, Parts::Apart(gate_up), [inner; 2], false)?,
                                down: self.projection(&format!("{layer}.{down}"), false)?,
                            };
                            Some((Box::new(expert), self.projection(&format!("{layer}.{gate}"), false)?))
                        }
                    },
                },
            },
        })
    }
}

impl Loader<'_> {
    fn experts(&self, layer: &str, sizes: Experts) -> Result<Vec<[Projection; 3]>> {
        let prefix = format!("{layer}.{}", sizes.names.experts);
        match sizes.names.projections {
            ExpertProjections::Apart(names) => (0..sizes.count)
                .map(|expert| {
                    let [gate, up, down] =
                        names.map(|name| self.projection(&format!("{prefix}.{expert}.{name}"), false));
                    Ok([gate?, up?, down?])
                })
                .collect(),
            ExpertProjections::Together([gate_up, down]) | ExpertProjections::Mxfp4([gate_up, down]) => {
                let in_4_bits = matches!(sizes.names.projections, ExpertProjections::Mxfp4(_));
                let matrices = |name: &str| if in_4_bits { self.of_4_bits(name) } else { self.load(name) };
                let all = |name: &str| Ok::<_, crate::Error>((matrices(name)?, self.load(&format!("{name}_bias"))?));
                let (gate_up, down) = (all(&format!("{prefix}.{gate_up}"))?, all(&format!("{prefix}.{down}"))?);
                // [experts, in, out] and [experts, out]; the row of an output feature is a column there. In 4 bits it is a row.
                let projection = |(matrices, biases): &(Vec<f64>, Vec<f64>), expert: usize, features: Vec<usize>| {
                    let (size, out) = (matrices.len() / sizes.count, biases.len() / sizes.count);
                    let (matrix, bias) = (&matrices[expert * size..][..size], &biases[expert * out..][..out]);
                    let [of_row, of_feature] = if in_4_bits { [1, size / out] } else { [out, 1] };
                    let column =
                        |&feature: &usize| (0..size / out).map(move |row| matrix[row * of_row + feature * of_feature]);
                    Projection {
                        matrix: features.iter().flat_map(column).collect(),
                        bias: Some(features.iter().map(|&feature| bias[feature]).collect()),
                        quantizes: None,
                    }
                };
                let of_expert = |expert| {
                    let taking_turns = |first: usize| (0..sizes.inner).map(|at| 2 * at + first).collect();
                    let all = (0..self.config.hidden_size).collect();
                    [
                        projection(&gate_up, expert, taking_turns(0)),
                        projection(&gate_up, expert, taking_turns(1)),
                        projection(&down, expert, all),
                    ]
                };
                Ok((0..sizes.count).map(of_expert).collect())
            }
        }
    }
}

impl Reference {
    /// Converts all weights.
    ///
    /// # Errors
    /// When a tensor is missing or of a type that is not read.
    pub fn new(config: &ModelSpec, weights: &Weights) -> Result<Self> {
        let quantization = config.quantization.filter(|quantization| quantization.activations);
        let quantizes = quantization.map(|quantization| quantization.weight);
        let loader = Loader { config, weights, quantizes };
        Ok(Self {
            embedding: loader.load("model.embed_tokens.weight")?,
            layers: (0..config.layers.len()).map(|at| loader.layer(at)).collect::<Result<_>>()?,
            final_norm: loader.load("model.norm.weight")?,
            head: match config.tie_word_embeddings {
                true => None,
                false => {
                    let quantizes = quantizes.filter(|_| quantization.is_some_and(|quantization| quantization.head));
                    Some(Projection { matrix: loader.load("lm_head.weight")?, bias: None, quantizes })
                }
            },
            config: config.clone(),
            long: false,
        })
    }

    /// As an engine whose sequences may be as long as this has the model: `longrope` goes by it.
    pub fn within(self, max_seq_len: usize) -> Self {
        let longer = |rope: &Rope| match &rope.scaling {
            Some(RopeScaling::LongRope(scaling)) => max_seq_len as f64 > scaling.original_max_position_embeddings,
            _ => false,
        };
        Self { long: self.config.ropes.iter().any(longer), ..self }
    }

    /// A sequence with no tokens.
    pub fn session(&self) -> Session<'_> {
        let empty = vec![Vec::new(); self.layers.len()];
        Session { model: self, keys: empty.clone(), values: empty, position: 0 }
    }

    /// The logits after each token: `[tokens][vocab]`.
    pub fn logits(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let mut session = self.session();
        tokens.iter().map(|&token| session.step(token)).collect()
    }

    /// The `new` most likely next tokens, one by one; the first of equals.
    pub fn greedy(&self, prompt: &[u32], new: usize) -> Vec<u32> {
        let mut session = self.session();
        let mut logits = Vec::new();
        for &token in prompt {
            logits = session.step(token);
        }
        let mut tokens = Vec::with_capacity(new);
        for at in 0..new {
            let best = (0..logits.len()).reduce(|best, id| if logits[id] > logits[best] { id } else { best });
            let token = best.expect("a prompt has tokens and a vocabulary has entries") as u32;
            tokens.push(token);
            if at + 1 < new {
                logits = session.step(token);
            }
        }
        tokens
    }
}

impl Session<'_> {
    /// Appends a token; the logits of what follows it, `[vocab]`.
    pub fn step(&mut self, token: u32) -> Vec<f64> {
        let Reference { config, embedding, layers, final_norm, head, .. } = self.model;
        let hidden = config.hidden_size;
        let mut x = embedding[token as usize * hidden..][..hidden].to_vec();
        if let Some(scale) = config.embedding_scale {
            x.iter_mut().for_each(|x| *x *= scale);
        }
        for (at, layer) in layers.iter().enumerate() {
            // What a block makes of its normed input, normed: each norm where there is one.
            let normed = |x: Vec<f64>, norm: &Option<Vec<f64>>| match norm {
                Some(weight) => rms_norm(&x, weight, config.norm),
                None => x,
            };
            let [before_attention, after_attention, before_mlp, after_mlp] = &layer.norms;
            let attended = self.attention(at, layer, &normed(x.clone(), before_attention));
            add(&mut x, &normed(layer.output.apply(&attended), after_attention));
            let inner = layer.mlp.apply(&normed(x.clone(), before_mlp));
            add(&mut x, &normed(inner, after_mlp));
        }
        self.position += 1;
        let normed = rms_norm(&x, final_norm, config.norm);
        let mut logits = head.as_ref().map_or_else(|| multiply(embedding, &normed), |head| head.apply(&normed));
        if let Some(cap) = config.logit_soft_cap {
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        logits
    }

    /// Attention of layer `at`, before its output projection.
    fn attention(&mut self, at: usize, layer: &Layer, x: &[f64]) -> Vec<f64> {
        let config = &self.model.config;
        let [mut q, mut k, v] = layer.qkv.each_ref().map(|projection| projection.apply(x));
        if let Some(weights) = &layer.qk_norms {
            for (vector, weight) in [&mut q, &mut k].into_iter().zip(weights) {
                let width = match config.qk_norm {
                    Some(QkNorm::Head) => config.head_dim,
                    Some(QkNorm::Projection) | None => vector.len(),
                };
                for part in vector.chunks_mut(width) {
                    part.copy_from_slice(&rms_norm(part, weight, config.norm));
                }
            }
        }
        let rope = &config.ropes[layer.kind.rope];
        for head in q.chunks_mut(config.head_dim).chain(k.chunks_mut(config.head_dim)) {
            rotate(head, self.position as f64, rope, self.model.long);
        }
        self.keys[at].extend(k);
        self.values[at].extend(v);
        attend(&q, &self.keys[at], &self.values[at], config, layer)
    }
}

impl Inner {
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        match self {
            Self::Gated { sizes, gate_up: [gate, up], down } => {
                let gates = gate.apply(x).into_iter().map(|gate| activation(gate, sizes.gate));
                let inner: Vec<f64> = gates.zip(up.apply(x)).map(|(gate, up)| gate * up).collect();
                down.apply(&inner)
            }
            Self::Experts { sizes, router, experts, shared } => {
                let logits = router.apply(x);
                let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let powers: Vec<f64> = logits.iter().map(|logit| (logit - most).exp()).collect();
                let mut order: Vec<usize> = (0..sizes.count).collect();
                order.sort_by(|&one, &other| logits[other].total_cmp(&logits[one]));
                order.truncate(sizes.chosen);
                let total: f64 = match sizes.normalised {
                    true => order.iter().map(|&expert| powers[expert]).sum(),
                    false => powers.iter().sum(),
                };
                let mut sum = vec![];
                for expert in order {
                    let [gate, up, down] = &experts[expert];
                    let pairs = gate.apply(x).into_iter().zip(up.apply(x));
                    let inner: Vec<f64> = pairs
                        .map(|(gate, up)| match sizes.gate {
                            ExpertGate::Silu => activation(gate, Gate::Silu) * up,
                            ExpertGate::ClampedSwiglu => {
                                let gate = gate.min(7.0);
                                gate / (1.0 + (-1.702 * gate).exp()) * (up.clamp(-7.0, 7.0) + 1.0)
                            }
                        })
                        .collect();
                    let made: Vec<f64> = down.apply(&inner).iter().map(|v| v * powers[expert] / total).collect();
                    if sum.is_empty() { sum = made } else { add(&mut sum, &made) }
                }
                if let Some((expert, gate)) = shared {
                    let weight = 1.0 / (1.0 + (-gate.apply(x)[0]).exp());
                    add(&mut sum, &expert.apply(x).iter().map(|made| made * weight).collect::<Vec<_>>());
                }
                sum
            }
        }
    }
}

fn activation(x: f64, gate: Gate) -> f64 {
    match gate {
        Gate::Silu => x / (1.0 + (-x).exp()),
        Gate::GeluTanh => 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
    }
}

/// `x / sqrt(mean(x^2) + epsilon) * weight`, or times `1 + weight`.
fn rms_norm(x: &[f64], weight: &[f64], Norm { epsilon, plus_one }: Norm) -> Vec<f64> {
    let mean_square = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let scale = (mean_square + epsilon).sqrt();
    let offset = if plus_one { 1.0 } else { 0.0 };
    x.iter().zip(weight).map(|(v, w)| v / scale * (offset + w)).collect()
}

impl Projection {
    fn apply(&self, x: &[f64]) -> Vec<f64> {
        let mut y = match self.quantizes {
            None => multiply(&self.matrix, x),
            Some(element) => multiply(&self.matrix, &quantized(x, element)),
        };
        if let Some(bias) = &self.bias {
            add(&mut y, bias);
        }
        y
    }
}

/// Values as elements of 8 bits, the largest of which stands for the largest value, and back.
fn quantized(x: &[f64], element: Element) -> Vec<f64> {
    let most = if element == Element::I8 { 127.0 } else { 448.0 };
    let scale = x.iter().fold(f64::MIN_POSITIVE, |most, v| most.max(v.abs())) / most;
    let elements: Vec<f64> = x.iter().map(|v| (v / scale).clamp(-most, most)).collect();
    let elements = match element {
        Element::I8 => elements.iter().map(|v| v.round_ties_even()).collect(),
        _ => HostTensor::from_f64(element, &[x.len()], &elements).to_f64(),
    };
    elements.iter().map(|v| v * scale).collect()
}

/// `matrix [out, in] * x [in]`.
fn multiply(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, v)| w * v).sum()).collect()
}

fn add(x: &mut [f64], other: &[f64]) {
    x.iter_mut().zip(other).for_each(|(v, o)| *v += o);
}

/// Turns each pair `(i, i + rotated/2)` of a head's first features, the pairing of Hugging Face's models, by its angle at
/// `position`.
fn rotate(head: &mut [f64], position: f64, rope: &Rope, long: bool) {
    let half = rope.rotated / 2;
    let mut factor = 1.0;
    for i in 0..half {
        let mut wavelength = TAU * rope.theta.powf(2.0 * i as f64 / rope.rotated as f64);
        match &rope.scaling {
            None => {}
            // Positions are interpolated: `factor` of them take the place of one.
            Some(RopeScaling::Linear { factor }) => wavelength *= factor,
            Some(RopeScaling::Llama3(scaling)) => wavelength = llama3(wavelength, *scaling),
            Some(RopeScaling::Yarn(yarn)) => {
                factor = yarn.attention_factor;
                // The pair that makes so many turns within the original context, counted in fractions.
                let pair_of = |turns: f64| {
                    let wavelength = yarn.original_max_position_embeddings / turns;
                    (wavelength / TAU).ln() / rope.theta.ln() * half as f64
                };
                let round = |x: f64, whole: f64| if yarn.truncate { whole } else { x };
                let (fast, slow) = (pair_of(yarn.beta_fast), pair_of(yarn.beta_slow));
                let first = round(fast, fast.floor()).max(0.0);
                let last = round(slow, slow.ceil()).min(rope.rotated as f64 - 1.0);
                let last = if first == last { last + 0.001 } else { last };
                let share = ((i as f64 - first) / (last - first)).clamp(0.0, 1.0);
                // Frequencies are blended, not wavelengths.
                wavelength = 1.0 / ((1.0 - share) / wavelength + share / (yarn.factor * wavelength));
            }
            Some(RopeScaling::LongRope(scaling)) => {
                factor = scaling.attention_factor;
                wavelength *= if long { scaling.long[i] } else { scaling.short[i] };
            }
        }
        let (sin, cos) = (position / wavelength * TAU).sin_cos();
        let (a, b) = (head[i], head[i + half]);
        head[i] = factor * (a * cos - b * sin);
        head[i + half] = factor * (b * cos + a * sin);
    }
}

/// Llama 3's scaling of a wavelength.
fn llama3(wavelength: f64, scaling: Llama3Scaling) -> f64 {
    let context = scaling.original_max_position_embeddings;
    let (longest, shortest) = (context / scaling.low_freq_factor, context / scaling.high_freq_factor);
    if wavelength > longest {
        return wavelength * scaling.factor;
    }
    if wavelength <= shortest {
        return wavelength;
    }
    // Between the two bounds, frequencies are blended linearly in turns per original context.
    let range = scaling.high_freq_factor - scaling.low_freq_factor;
    let smooth = (context / wavelength - scaling.low_freq_factor) / range;
    1.0 / ((1.0 - smooth) / (scaling.factor * wavelength) + smooth / wavelength)
}

/// Attention of one token (the last) over all `keys` and `values [tokens, kv_heads, head_dim]`; `q [q_heads, head_dim]`.
fn attend(q: &[f64], keys: &[f64], values: &[f64], config: &ModelSpec, layer: &Layer) -> Vec<f64> {
    let (d, kv_width) = (config.head_dim, config.kv_heads * config.head_dim);
    let group = config.q_heads / config.kv_heads;
    // Of a sliding window: what has left it might as well not be there.
    let left = layer.kind.window.map_or(0, |window| (keys.len() / kv_width).saturating_sub(window));
    let (keys, values) = (&keys[left * kv_width..], &values[left * kv_width..]);
    let mut out = Vec::with_capacity(q.len());
    for (head, q) in q.chunks_exact(d).enumerate() {
        let at = head / group * d;
        let capped = |score: f64| config.attention_soft_cap.map_or(score, |cap| cap * (score / cap).tanh());
        let scores: Vec<f64> = keys
            .chunks_exact(kv_width)
            .map(|key| q.iter().zip(&key[at..at + d]).map(|(a, b)| a * b).sum::<f64>() * config.attention_scale)
            .map(capped)
            .collect();
        let sink = layer.sinks.as_ref().map(|sinks| sinks[head]);
        let most = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let total = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - most).exp());
        for lane in at..at + d {
            let sum: f64 = weights.iter().zip(values.chunks_exact(kv_width)).map(|(w, v)| w * v[lane]).sum();
            out.push(sum / total);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::spec::{LongRopeScaling, Turning, YarnScaling};
    use super::*;

    fn tiny() -> (ModelSpec, Weights, serde_json::Value) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-llama-kjv");
        let golden = std::fs::read(folder.join("golden.json")).unwrap();
        let golden = serde_json::from_slice(&golden).unwrap();
        (ModelSpec::open(&folder).unwrap(), Weights::open(&folder).unwrap(), golden)
    }

    /// Against a float64 forward pass written elsewhere.
    #[test]
    fn greedy_text_is_golden() {
        let (config, weights, golden) = tiny();
        let reference = Reference::new(&config, &weights).unwrap();
        let golden = golden.as_object().unwrap();
        assert_eq!(golden.len(), 3);
        for (prompt, golden) in golden {
            let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone()).unwrap();
            let (start, new) = ids.split_at(ids.len() - 48);
            assert_eq!(reference.greedy(start, 48), new, "{prompt}");
            // The smallest gap between the two best logits is a number of the other implementation, too.
            let gap = reference.logits(&ids[..ids.len() - 1])[start.len() - 1..]
                .iter()
                .map(|logits| {
                    let mut sorted = logits.clone();
                    sorted.sort_by(f64::total_cmp);
                    sorted[sorted.len() - 1] - sorted[sorted.len() - 2]
                })
                .fold(f64::INFINITY, f64::min);
            let expected = golden["smallest_top2_gap"].as_f64().unwrap();
            assert!((gap - expected).abs() < 1e-5, "{prompt}: {gap} for {expected}");
        }
    }

    /// The reference's own rotary scaling agrees with the frequencies that the step program uses.
    #[test]
    fn rotation_agrees_with_the_frequencies() {
        let llama3 = Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 512.0,
        };
        let yarn = |beta_fast, truncate| {
            RopeScaling::Yarn(YarnScaling {
                factor: 4.0,
                beta_fast,
                beta_slow: 1.0,
                truncate,
                original_max_position_embeddings: 512.0,
                attention_factor: 1.25,
            })
        };
        let factors = |from: f64| (0..16).map(|pair| from + f64::from(pair) / 8.0).collect();
        let long = RopeScaling::LongRope(LongRopeScaling {
            short: factors(1.0),
            long: factors(4.0),
            original_max_position_embeddings: 64.0,
            attention_factor: 1.5,
        });
        let scalings = [
            None,
            Some(RopeScaling::Linear { factor: 4.0 }),
            Some(RopeScaling::Llama3(llama3)),
            Some(yarn(32.0, true)),
            Some(yarn(16.0, false)),
            // A blend of no width.
            Some(yarn(1.0, false)),
            Some(long),
        ];
        for (scaling, positions) in scalings.into_iter().flat_map(|scaling| [32, 128].map(|at| (scaling.clone(), at))) {
            let rope = Rope { theta: 5e5, rotated: 32, scaling };
            let mut head = vec![0.0; 48];
            head[..16].fill(1.0);
            head[32..].fill(7.0);
            rotate(&mut head, 3.0, &rope, positions > 64);
            let Turning { frequencies, factor } = rope.turning(positions);
            assert_eq!(frequencies.len(), 16);
            for (i, frequency) in frequencies.into_iter().enumerate() {
                let (sin, cos) = (3.0 * frequency).sin_cos();
                let apart = (head[i] - factor * cos).abs().max((head[i + 16] - factor * sin).abs());
                assert!(apart < 1e-13, "pair {i} of {rope:?}: {apart}");
            }
            assert_eq!(head[32..], [7.0; 16], "what does not turn stays");
        }
    }
}
