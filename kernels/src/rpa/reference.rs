//! Ragged paged attention in f64, from the definition: one key after another, no blocks, no online softmax.

use pagoda_ir::{Element, HostTensor};

use super::{
    batch::{Batch, Sequence},
    kv_layout::Half,
    layer_of,
    problem::{Precision, Problem, Rotary},
};
use crate::{
    check::{Expected, Tolerance, unit_roundoff},
    named::Arrays,
};

/// What the f32 arithmetic may lose, relative to `sum_j p_j |v_j|`: sums over keys and over the head dimension, the
/// exponential, and logits, whose absolute error (values within 2, head dimensions up to 256: logits up to some ten) turns
/// into a relative error of the weights.
const F32_TERMS: f64 = 2e-5;

/// What f32 arithmetic may lose of a key that is rotated and divided by its scale, relative to its terms: two products, a
/// sum, and a division as the chips do it.
const NEW_KEY: f64 = 8.0;

/// The error of a logit whose query (and, with scales, key) is rounded once more, in roundoffs of `sqrt(sum_i (q_i k_i)^2)`:
/// roundings are independent, each with a deviation of 0.42 roundoffs where mantissas are spread evenly; six deviations.
const ROUNDED_QUERY: f64 = 2.5;

/// How far the output may be off: one rounding; and in a narrow type one of each weight, as a matrix unit takes weights of
/// the queries' type.
fn tolerance(problem: &Problem) -> Tolerance {
    let weights = match problem.precision.q {
        Element::F32 => 0.0,
        narrow => unit_roundoff(narrow),
    };
    // So is a value that was multiplied by its scale.
    let values = if problem.precision.is_scaled() { weights } else { 0.0 };
    Tolerance { rounding: unit_roundoff(problem.precision.output), terms: F32_TERMS + weights + values }
}

/// Numbers, and how far a form may be from each for reasons of f32 arithmetic: 0 unless it lies at the edge between two
/// numbers of a type, to which it is rounded.
struct Cache {
    /// The KV buffer, as it is stored.
    stored: Vec<f64>,
    /// One per number.
    slack: Vec<f64>,
}

/// The results of a launch: `out`, 0 in rows of padding; of a fused kernel `kv_pages`; where it is asked for, `lse`, 0 in rows
/// that see nothing. Magnitudes of the output are `sum_j p_j |v_j|` (the output itself may cancel to 0).
///
/// # Panics
/// When the metadata among `inputs` is not a batch of the problem.
pub fn reference(problem: &Problem, inputs: &Arrays) -> Vec<Expected> {
    let batch = Batch::of(problem, inputs).expect("a batch of the problem");
    let cache = match problem.fused {
        None => {
            let stored = inputs["kv_pages"].to_f64();
            Cache { slack: vec![0.0; stored.len()], stored }
        }
        Some(rotary) => written_by_rows(problem, inputs, &batch, rotary),
    };
    let [out, lse] = attention(problem, inputs, &batch, &cache);
    // Exact, but where f32 arithmetic decides to which side a key is rounded.
    let exact = Tolerance { rounding: 0.0, terms: 1.0 };
    let kv_pages = problem.fused.map(|_| Expected::new(cache.stored, cache.slack, exact));
    [Some(out), kv_pages, problem.log_sum_exp.then_some(lse)].into_iter().flatten().collect()
}

/// A head's numbers in a row of the queries, or of the projections.
fn head<'r>(problem: &Problem, rows: &'r [f64], row: usize, head: usize) -> &'r [f64] {
    let width = rows.len() / problem.tokens;
    &rows[row * width + head * problem.head_dim..][..problem.head_dim]
}

/// `x` turned by the angles of a row, and the absolute values of each result's terms.
fn rotated(rotary: Rotary, x: &[f64], cos_sin: &[f64]) -> [Vec<f64>; 2] {
    let Rotary::HalfSplit = rotary;
    let half = x.len() / 2;
    let mut turned = [vec![0.0; x.len()], vec![0.0; x.len()]];
    for i in 0..half {
        let (low, high, cos, sin) = (x[i], x[half + i], cos_sin[i], cos_sin[half + i]);
        turned[0][i] = low * cos - high * sin;
        turned[0][half + i] = high * cos + low * sin;
        turned[1][i] = (low * cos).abs() + (high * sin).abs();
        turned[1][half + i] = (high * cos).abs() + (low * sin).abs();
    }
    turned
}

/// The numbers of a cache's type next to those given; of two equally near ones the even one. What is too large for a type of
/// 8 bits becomes its largest.
pub(super) fn rounded(types: Precision, numbers: impl IntoIterator<Item = f64>) -> HostTensor {
    let [least, most] = types.bounds();
    let numbers = numbers.into_iter().map(|x| x.clamp(least, most));
    let numbers: Vec<_> = numbers.map(|x| if types.kv.is_float() { x } else { x.round_ties_even() }).collect();
    HostTensor::from_f64(types.kv, &[numbers.len()], &numbers)
}

/// The scales of the keys' or the values' heads: 1 where the cache has none.
fn scales(problem: &Problem, inputs: &Arrays, half: Half) -> Vec<f64> {
    let name = match half {
        Half::Key => "k_scale",
        Half::Value => "v_scale",
    };
    inputs.get(name).map_or_else(|| vec![1.0; problem.kv_heads], HostTensor::to_f64)
}

/// The KV buffer after the projections' keys and values were written.
fn written_by_rows(problem: &Problem, inputs: &Arrays, batch: &Batch, rotary: Rotary) -> Cache {
    let (qkv, cos_sin) = (inputs["qkv"].to_f64(), inputs["cos_sin"].to_f64());
    let layout = problem.kv_layout();
    let first_page = layout.first_page(layer_of(problem, inputs));
    let stored = inputs["kv_pages"].to_f64();
    let mut cache = Cache { slack: vec![0.0; stored.len()], stored };
    let f32_roundoff = unit_roundoff(Element::F32);
    for half in Half::ALL {
        let scales = scales(problem, inputs, half);
        for (sequence, row, position) in rows(batch) {
            let whole = layout.token(first_page, layout.slot(sequence.pages, position));
            let token = whole.start;
            layout.padding().for_each(|range| cache.stored[whole.clone()][range].fill(0.0));
            for (kv_head, scale) in scales.iter().enumerate() {
                let first = problem.q_heads + half as usize * problem.kv_heads;
                let new = head(problem, &qkv, row, first + kv_head);
                let [new, terms] = match half {
                    Half::Key => rotated(rotary, new, &cos_sin[row * problem.head_dim..][..problem.head_dim]),
                    // Moved, where it is not divided.
                    Half::Value if problem.precision.is_scaled() => [new, new].map(<[f64]>::to_vec),
                    Half::Value => [new.to_vec(), vec![0.0; new.len()]],
                };
                // What is rounded: the number, and both ends of what f32 arithmetic may make of it.
                let error = |terms: f64| NEW_KEY * f32_roundoff * (terms / scale).abs();
                let [of, below, above] = [0.0, -1.0, 1.0].map(|side| {
                    let numbers = new.iter().zip(&terms).map(|(x, &terms)| x / scale + side * error(terms));
                    rounded(problem.precision, numbers).to_f64()
                });
                let at = token + layout.offset(kv_head, half);
                for (index, of) in of.into_iter().enumerate() {
                    cache.stored[at + index] = of;
                    cache.slack[at + index] = (above[index] - of).max(of - below[index]);
                }
            }
        }
    }
    cache
}

/// The rows that stand somewhere: sequence, row of the batch, position.
fn rows(batch: &Batch) -> impl Iterator<Item = (Sequence<'_>, usize, usize)> {
    batch.sequences().flat_map(|sequence| {
        let rows = (0..sequence.q_len).filter_map(move |row| Some((row, sequence.position(row)?)));
        rows.map(move |(row, position)| (sequence, sequence.first_row + row, position))
    })
}

/// Output and log-sum-exp.
fn attention(problem: &Problem, inputs: &Arrays, batch: &Batch, cache: &Cache) -> [Expected; 2] {
    let (dim, layout, tolerance) = (problem.head_dim, problem.kv_layout(), tolerance(problem));
    let first_page = layout.first_page(layer_of(problem, inputs));
    let q = inputs[if problem.fused.is_some() { "qkv" } else { "q" }].to_f64();
    let cos_sin = inputs.get("cos_sin").map(HostTensor::to_f64);
    let sinks = inputs.get("sinks").map(HostTensor::to_f64);
    let scales = Half::ALL.map(|half| scales(problem, inputs, half));
    // Where the definition leaves open when the query is rounded to its type.
    let roundings = f64::from(u8::from(problem.fused.is_some()) + 2 * u8::from(problem.precision.is_scaled())).sqrt();
    let roundoff = match problem.precision.q {
        Element::F32 => 0.0,
        narrow => ROUNDED_QUERY * roundings * unit_roundoff(narrow),
    };
    let width = problem.q_heads * dim;
    let mut out = [(); 2].map(|()| vec![0.0; problem.tokens * width]);
    let mut lse = [(); 2].map(|()| vec![0.0; problem.tokens * problem.q_heads]);
    for (sequence, row, position) in rows(batch) {
        for q_head in 0..problem.q_heads {
            let query = head(problem, &q, row, q_head);
            let query = match (problem.fused, &cos_sin) {
                (Some(rotary), Some(angles)) => {
                    let [query, _] = rotated(rotary, query, &angles[row * dim..][..dim]);
                    query
                }
                _ => query.to_vec(),
            };
            let kv_head = q_head / problem.group();
            // Of one half of the head of one token: its numbers, and how far they may be off.
            let token = |position: usize, half: Half| {
                let start = layout.token(first_page, layout.slot(sequence.pages, position)).start;
                let start = start + layout.offset(kv_head, half);
                let scale = scales[half as usize][kv_head];
                let number = move |at| (scale * cache.stored[at], scale.abs() * cache.slack[at]);
                (start..start + dim).map(number)
            };
            let oldest = problem.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window));
            // Logits, and how far each may be off beyond f32 arithmetic.
            let mut logits = Vec::with_capacity(position + 1 - oldest);
            let mut terms = 0_f64;
            for key in oldest..=position {
                let (mut product, mut squares, mut slack, mut absolute) = (0.0, 0.0, 0.0, 0.0);
                for (q, (k, off)) in query.iter().zip(token(key, Half::Key)) {
                    product += q * k;
                    squares += q * q * k * k;
                    slack += q.abs() * off;
                    absolute += (q * k).abs();
                }
                let logit = problem.scale * product;
                let logit = problem.soft_cap.map_or(logit, |cap| cap * (logit / cap).tanh());
                logits.push((logit, problem.scale * (roundoff * squares.sqrt() + slack)));
                terms = terms.max(problem.scale * absolute);
            }
            let sink = sinks.as_ref().map(|sinks| sinks[q_head]);
            let all = logits.iter().map(|(logit, _)| *logit).chain(sink);
            let largest = all.clone().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = all.map(|logit| (logit - largest).exp()).sum();
            // The weights' relative errors: of each, and of their sum.
            let weights: Vec<_> =
                logits.iter().map(|(logit, off)| ((logit - largest).exp() / total, off.exp_m1())).collect();
            let sum_off: f64 = weights.iter().map(|(weight, off)| weight * off).sum();
            let start = row * width + q_head * dim;
            for (key, (weight, off)) in (oldest..=position).zip(&weights) {
                for (index, (value, value_off)) in token(key, Half::Value).enumerate() {
                    out[0][start + index] += weight * value;
                    out[1][start + index] += weight * (value.abs() * (1.0 + off / tolerance.terms));
                    out[1][start + index] += weight * value_off / tolerance.terms;
                }
            }
            let [values, magnitudes] = &mut out;
            for (magnitude, value) in magnitudes[start..][..dim].iter_mut().zip(&values[start..]) {
                *magnitude += value.abs() * sum_off / tolerance.terms;
            }
            let at = row * problem.q_heads + q_head;
            lse[0][at] = largest + total.ln();
            lse[1][at] = 1.0 + largest.abs() + total.ln() + terms + sum_off / F32_TERMS;
        }
    }
    let [values, magnitude] = out;
    let out = Expected { values, magnitude, tolerance, live: batch.rows() * width };
    let [values, magnitude] = lse;
    let tolerance = Tolerance { rounding: unit_roundoff(Element::F32), terms: F32_TERMS };
    [out, Expected { values, magnitude, tolerance, live: batch.rows() * problem.q_heads }]
}

/// Elements of each result that are results: of the output and `lse` those of rows of sequences, the leading ones.
pub(super) fn live(problem: &Problem, batch: &Batch) -> Vec<usize> {
    let of_rows = |width: usize| batch.rows() * width;
    let live = |name: &str, len: usize| match name {
        "out" => of_rows(problem.q_heads * problem.head_dim),
        "lse" => of_rows(problem.q_heads),
        _ => len,
    };
    problem.results().iter().map(|(name, ty)| live(name, ty.len())).collect()
}

/// The KV buffer after the batch's rows of `k` and `v` (`[tokens, kv_heads, head_dim]`) were written: moved, not computed.
///
/// # Panics
/// When the metadata among `inputs` is not a batch of the problem.
pub fn written(problem: &Problem, inputs: &Arrays, k: &HostTensor, v: &HostTensor) -> Expected {
    let mut kv = inputs["kv_pages"].to_f64();
    let batch = Batch::of(problem, inputs).expect("a batch of the problem");
    let layout = problem.kv_layout();
    let first_page = layout.first_page(layer_of(problem, inputs));
    for (half, new) in [(Half::Key, k.to_f64()), (Half::Value, v.to_f64())] {
        for (sequence, row, position) in rows(&batch) {
            let token = &mut kv[layout.token(first_page, layout.slot(sequence.pages, position))];
            for kv_head in 0..problem.kv_heads {
                let new = head(problem, &new, row, kv_head);
                token[layout.offset(kv_head, half)..][..new.len()].copy_from_slice(new);
            }
            layout.padding().for_each(|range| token[range].fill(0.0));
        }
    }
    let magnitude = vec![0.0; kv.len()];
    Expected::new(kv, magnitude, Tolerance::EXACT)
}
