//! The reference: Llama's forward pass in float64, as plain loops, written from the model's definition.
//!
//! It shares no code with the step program, not even the rotary frequencies: its only inputs are the configuration's
//! numbers and the weights. It sees one whole sequence, without pages, batches or chunks. It must never be used to make
//! text for users: a weight takes 8 bytes here, and nothing is blocked, fused or threaded.

use pagoda_ir::{Element, HostTensor};

use super::config::{Llama3Scaling, LlamaConfig, RopeScaling};
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
    input_norm: Vec<f64>,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
    post_attention_norm: Vec<f64>,
    gate: Projection,
    up: Projection,
    down: Projection,
}

/// A Llama in float64.
pub struct Reference {
    config: LlamaConfig,
    embedding: Vec<f64>,
    layers: Vec<Layer>,
    final_norm: Vec<f64>,
    /// The output projection, unless it is the embedding.
    head: Option<Projection>,
}

/// One sequence: the keys and values of all tokens so far.
pub struct Session<'a> {
    model: &'a Reference,
    /// Per layer: `[tokens, kv_heads * head_dim]`, keys rotated.
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
    position: usize,
}

impl Reference {
    /// Converts all weights.
    ///
    /// # Errors
    /// When a tensor is missing or has the wrong shape or type.
    pub fn new(config: &LlamaConfig, weights: &Weights) -> Result<Self> {
        let load = |name: &str| weights.values(config, name);
        let quantization = config.quantization.filter(|quantization| quantization.activations);
        let quantizes = quantization.map(|quantization| quantization.weight);
        let layer = |at: usize| -> Result<Layer> {
            let in_layer = |name: &str, part: &str| load(&format!("model.layers.{at}.{name}.{part}"));
            let project = |name: &str, biased: bool| -> Result<Projection> {
                let bias = if biased { Some(in_layer(name, "bias")?) } else { None };
                Ok(Projection { matrix: in_layer(name, "weight")?, bias, quantizes })
            };
            Ok(Layer {
                input_norm: in_layer("input_layernorm", "weight")?,
                q: project("self_attn.q_proj", config.attention_bias)?,
                k: project("self_attn.k_proj", config.attention_bias)?,
                v: project("self_attn.v_proj", config.attention_bias)?,
                o: project("self_attn.o_proj", config.output_bias)?,
                post_attention_norm: in_layer("post_attention_layernorm", "weight")?,
                gate: project("mlp.gate_proj", config.mlp_bias)?,
                up: project("mlp.up_proj", config.mlp_bias)?,
                down: project("mlp.down_proj", config.mlp_bias)?,
            })
        };
        Ok(Self {
            embedding: load("model.embed_tokens.weight")?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            final_norm: load("model.norm.weight")?,
            head: match config.tie_word_embeddings {
                true => None,
                false => {
                    let quantizes = quantizes.filter(|_| quantization.is_some_and(|quantization| quantization.head));
                    Some(Projection { matrix: load("lm_head.weight")?, bias: None, quantizes })
                }
            },
            config: config.clone(),
        })
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
        let Reference { config, embedding, layers, final_norm, head } = self.model;
        let hidden = config.hidden_size;
        let mut x = embedding[token as usize * hidden..][..hidden].to_vec();
        for (at, layer) in layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.input_norm, config.rms_norm_eps);
            let mut q = layer.q.apply(&normed);
            let mut k = layer.k.apply(&normed);
            for head in q.chunks_mut(config.head_dim).chain(k.chunks_mut(config.head_dim)) {
                rotate(head, self.position as f64, config);
            }
            self.keys[at].extend(k);
            self.values[at].extend(layer.v.apply(&normed));
            let attended = attend(&q, &self.keys[at], &self.values[at], config);
            add(&mut x, &layer.o.apply(&attended));

            let normed = rms_norm(&x, &layer.post_attention_norm, config.rms_norm_eps);
            let gate = layer.gate.apply(&normed);
            let up = layer.up.apply(&normed);
            let inner: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(&mut x, &layer.down.apply(&inner));
        }
        self.position += 1;
        let normed = rms_norm(&x, final_norm, config.rms_norm_eps);
        head.as_ref().map_or_else(|| multiply(embedding, &normed), |head| head.apply(&normed))
    }
}

/// `x / sqrt(mean(x^2) + epsilon) * weight`.
fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let mean_square = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let scale = (mean_square + epsilon).sqrt();
    x.iter().zip(weight).map(|(v, w)| v / scale * w).collect()
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

/// Turns each pair `(i, i + head_dim/2)` of a head, the pairing of Hugging Face's Llama, by its angle at `position`.
fn rotate(head: &mut [f64], position: f64, config: &LlamaConfig) {
    let half = head.len() / 2;
    for i in 0..half {
        let mut wavelength = std::f64::consts::TAU * config.rope_theta.powf(2.0 * i as f64 / head.len() as f64);
        match config.rope_scaling {
            None => {}
            // Positions are interpolated: `factor` of them take the place of one.
            Some(RopeScaling::Linear { factor }) => wavelength *= factor,
            Some(RopeScaling::Llama3(scaling)) => wavelength = llama3(wavelength, scaling),
        }
        let (sin, cos) = (position / wavelength * std::f64::consts::TAU).sin_cos();
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos - b * sin;
        head[i + half] = b * cos + a * sin;
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
fn attend(q: &[f64], keys: &[f64], values: &[f64], config: &LlamaConfig) -> Vec<f64> {
    let (d, kv_width) = (config.head_dim, config.kv_heads * config.head_dim);
    let group = config.q_heads / config.kv_heads;
    // Of a sliding window: what has left it might as well not be there.
    let left = config.sliding_window.map_or(0, |window| (keys.len() / kv_width).saturating_sub(window));
    let (keys, values) = (&keys[left * kv_width..], &values[left * kv_width..]);
    let mut out = Vec::with_capacity(q.len());
    for (head, q) in q.chunks_exact(d).enumerate() {
        let at = head / group * d;
        let scores: Vec<f64> = keys
            .chunks_exact(kv_width)
            .map(|key| q.iter().zip(&key[at..at + d]).map(|(a, b)| a * b).sum::<f64>() / (d as f64).sqrt())
            .collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let total: f64 = weights.iter().sum();
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

    use super::*;

    fn tiny() -> (LlamaConfig, Weights, serde_json::Value) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny-llama-kjv");
        let golden = std::fs::read(folder.join("golden.json")).unwrap();
        let golden = serde_json::from_slice(&golden).unwrap();
        (LlamaConfig::open(&folder).unwrap(), Weights::open(&folder).unwrap(), golden)
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
        let (mut config, ..) = tiny();
        let scaling = Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 512.0,
        };
        let scalings = [None, Some(RopeScaling::Linear { factor: 4.0 }), Some(RopeScaling::Llama3(scaling))];
        for scaling in scalings {
            config.rope_scaling = scaling;
            let mut head = vec![0.0; config.head_dim];
            head[..config.head_dim / 2].fill(1.0);
            rotate(&mut head, 3.0, &config);
            for (i, frequency) in config.rope_frequencies().into_iter().enumerate() {
                let (sin, cos) = (3.0 * frequency).sin_cos();
                let found = (head[i], head[i + config.head_dim / 2]);
                assert!((found.0 - cos).abs() < 1e-13 && (found.1 - sin).abs() < 1e-13, "pair {i}");
            }
        }
    }
}
