//! Ragged paged attention in f64, from the definition: one key after another, no blocks, no online softmax.

use pagoda_ir::{Element, HostTensor};

use super::{batch::Batch, kv_layout::Half, layer_of, problem::Problem};
use crate::{
    check::{Expected, Tolerance, unit_roundoff},
    named::Arrays,
};

/// What the f32 arithmetic may lose, relative to `sum_j p_j |v_j|`: sums over keys and over the head dimension, the
/// exponential, and logits, whose absolute error (values within 2, head dimensions up to 256: logits up to some ten) turns
/// into a relative error of the weights.
const F32_TERMS: f64 = 2e-5;

/// How far a form may be off: one rounding of the output; and in a narrow type one of each weight, as a matrix unit takes
/// weights of the values' type.
fn tolerance(problem: &Problem) -> Tolerance {
    let weights = match problem.precision.kv {
        Element::F32 => 0.0,
        narrow => unit_roundoff(narrow),
    };
    Tolerance { rounding: unit_roundoff(problem.precision.output), terms: F32_TERMS + weights }
}

/// The attention of `inputs`: `[tokens, q_heads, head_dim]`, 0 in rows of padding. Magnitudes are `sum_j p_j |v_j|` (the
/// output itself may cancel to 0).
///
/// # Panics
/// When the metadata among `inputs` is not a batch of the problem.
pub fn reference(problem: &Problem, inputs: &Arrays) -> Expected {
    let (q, kv) = (inputs["q"].to_f64(), inputs["kv_pages"].to_f64());
    let batch = Batch::of(problem, inputs).expect("a batch of the problem");
    let (dim, layout) = (problem.head_dim, problem.kv_layout());
    let first_page = layout.first_page(layer_of(problem, inputs));
    // The elements of one half of a head of one token.
    let token = |pages: &[i32], position: usize, head: usize, half: Half| {
        let token = &kv[layout.token(first_page, layout.slot(pages, position))];
        &token[layout.offset(head, half)..][..dim]
    };
    let mut output = vec![0.0; q.len()];
    let mut magnitude = vec![0.0; q.len()];
    for sequence in batch.sequences() {
        for row in 0..sequence.q_len {
            let position = sequence.kv_len - sequence.q_len + row;
            for head in 0..problem.q_heads {
                let start = ((sequence.first_row + row) * problem.q_heads + head) * dim;
                let query = &q[start..start + dim];
                let kv_head = head / (problem.q_heads / problem.kv_heads);
                let oldest = problem.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window));
                let logits: Vec<f64> = (oldest..=position)
                    .map(|key| {
                        let key = token(sequence.pages, key, kv_head, Half::Key);
                        let logit = problem.scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
                        problem.soft_cap.map_or(logit, |cap| cap * (logit / cap).tanh())
                    })
                    .collect();
                let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
                for (key, logit) in (oldest..=position).zip(&logits) {
                    let weight = (logit - largest).exp() / total;
                    for (index, value) in token(sequence.pages, key, kv_head, Half::Value).iter().enumerate() {
                        output[start + index] += weight * value;
                        magnitude[start + index] += weight * value.abs();
                    }
                }
            }
        }
    }
    let live = live(problem, &batch);
    Expected { values: output, magnitude, tolerance: tolerance(problem), live }
}

/// Elements of the output that belong to rows of sequences: the leading ones.
pub(super) fn live(problem: &Problem, batch: &Batch) -> usize {
    batch.rows() * problem.q_heads * problem.head_dim
}

/// The KV buffer after the batch's rows of `k` and `v` (`[tokens, kv_heads, head_dim]`) were written: moved, not computed.
///
/// # Panics
/// When the metadata among `inputs` is not a batch of the problem.
pub fn written(problem: &Problem, inputs: &Arrays, k: &HostTensor, v: &HostTensor) -> Expected {
    let mut kv = inputs["kv_pages"].to_f64();
    let batch = Batch::of(problem, inputs).expect("a batch of the problem");
    let (dim, layout) = (problem.head_dim, problem.kv_layout());
    let first_page = layout.first_page(layer_of(problem, inputs));
    let new = [(Half::Key, k.to_f64()), (Half::Value, v.to_f64())];
    for sequence in batch.sequences() {
        for row in 0..sequence.q_len {
            let position = sequence.kv_len - sequence.q_len + row;
            let token = &mut kv[layout.token(first_page, layout.slot(sequence.pages, position))];
            for head in 0..problem.kv_heads {
                let from = ((sequence.first_row + row) * problem.kv_heads + head) * dim;
                for (half, new) in &new {
                    token[layout.offset(head, *half)..][..dim].copy_from_slice(&new[from..from + dim]);
                }
            }
        }
    }
    let magnitude = vec![0.0; kv.len()];
    Expected::new(kv, magnitude, Tolerance::EXACT)
}
