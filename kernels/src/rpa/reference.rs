//! Ragged paged attention in f64, from the definition: one key after another, no blocks, no online softmax.

use pagoda_ir::HostTensor;

use super::{Inputs, problem::Problem};

/// The output of every row, and the scale of each value's rounding error.
#[derive(Clone, Debug)]
pub struct Reference {
    /// `[tokens, q_heads, head_dim]`, row-major; 0 in rows of padding.
    pub output: Vec<f64>,
    /// `sum_j p_j |v_j|` for each output: what its error is relative to (the output itself may cancel to 0).
    pub magnitude: Vec<f64>,
}

/// Computes the attention of `inputs`.
pub fn reference(problem: &Problem, inputs: &Inputs) -> Reference {
    let (q, kv) = (inputs.q.to_f64(), inputs.kv_pages.to_f64());
    let dim = problem.head_dim;
    // The elements of one token of one half-head (K at 2h, V at 2h + 1).
    let token = |pages: &[i32], position: usize, half_head: usize| {
        let page = inputs.layer * problem.pages + pages[position / problem.page_size] as usize;
        let start =
            ((page * problem.page_size + position % problem.page_size) * 2 * problem.kv_heads + half_head) * dim;
        &kv[start..start + dim]
    };
    let mut output = vec![0.0; q.len()];
    let mut magnitude = vec![0.0; q.len()];
    for sequence in inputs.batch.sequences() {
        for row in 0..sequence.q_len {
            let position = sequence.kv_len - sequence.q_len + row;
            for head in 0..problem.q_heads {
                let start = ((sequence.first_row + row) * problem.q_heads + head) * dim;
                let query = &q[start..start + dim];
                let kv_head = head / (problem.q_heads / problem.kv_heads);
                let oldest = problem.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window));
                let logits: Vec<f64> = (oldest..=position)
                    .map(|key| {
                        let key = token(sequence.pages, key, 2 * kv_head);
                        let logit = problem.scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
                        problem.soft_cap.map_or(logit, |cap| cap * (logit / cap).tanh())
                    })
                    .collect();
                let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
                for (key, logit) in (oldest..=position).zip(&logits) {
                    let weight = (logit - largest).exp() / total;
                    for (index, value) in token(sequence.pages, key, 2 * kv_head + 1).iter().enumerate() {
                        output[start + index] += weight * value;
                        magnitude[start + index] += weight * value.abs();
                    }
                }
            }
        }
    }
    Reference { output, magnitude }
}

/// The KV buffer after the batch's rows of `k` and `v` (`[tokens, kv_heads, head_dim]`) were written.
pub fn written(problem: &Problem, inputs: &Inputs, k: &HostTensor, v: &HostTensor) -> Vec<f64> {
    let mut kv = inputs.kv_pages.to_f64();
    let halves = [k.to_f64(), v.to_f64()];
    for sequence in inputs.batch.sequences() {
        for row in 0..sequence.q_len {
            let position = sequence.kv_len - sequence.q_len + row;
            let page = inputs.layer * problem.pages + sequence.pages[position / problem.page_size] as usize;
            let token = page * problem.page_size + position % problem.page_size;
            for head in 0..problem.kv_heads {
                for (half, new) in halves.iter().enumerate() {
                    for dim in 0..problem.head_dim {
                        let from = ((sequence.first_row + row) * problem.kv_heads + head) * problem.head_dim + dim;
                        let to = ((token * problem.kv_heads + head) * 2 + half) * problem.head_dim + dim;
                        kv[to] = new[from];
                    }
                }
            }
        }
    }
    kv
}
