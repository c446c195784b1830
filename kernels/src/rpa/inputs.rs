//! Inputs of a launch, drawn from a seed: ragged batches, page tables out of order, padding rows. Everything
//! outside the live sequences is NaN (what a fused kernel has to write, too), and page ids there are wild.

use pagoda_ir::{Element, HostTensor, TensorType};

use super::{
    batch::Batch,
    kv_layout::Half,
    problem::{Kind, Problem},
    reference,
};
use crate::{
    error::{Invalid, ensure},
    named::Arrays,
    random::{Lengths, Random, batch_text, poisoned},
};

/// Empty sequences, decode rows, chunks at the end of a longer context, whole prompts; full and partial pages.
fn lengths(problem: &Problem, random: &mut Random) -> Lengths {
    let (page, most) = (problem.page_size, problem.max_kv_len());
    let kv_len = match random.within(0, 8) {
        0 => 0,
        1..=4 => random.within(1, most),
        5..=6 => page * random.within(1, most / page),
        7 => page * random.within(0, most / page - 1) + 1,
        _ => most,
    };
    let q_len = match (problem.kind, random.within(0, 8)) {
        (_, 0) => 0,
        (Kind::Decode, _) | (_, 1..=3) => 1,
        (_, 4..=7) => random.within(2, problem.tokens.max(2)),
        _ => problem.tokens,
    };
    Lengths { q_len, kv_len }
}

/// Draws inputs over `batch`, or over a random one of up to `max_seqs` sequences.
///
/// # Errors
/// When `batch` is not a batch of the problem.
pub(super) fn draw(problem: &Problem, batch: Option<&[Lengths]>, seed: u64) -> Result<Arrays, Invalid> {
    if let Some(batch) = batch {
        check_lengths(problem, batch)?;
        return Ok(over(problem, batch, seed));
    }
    let mut random = Random::new(seed);
    let count = if random.within(0, 15) == 0 { 0 } else { random.within(1, problem.max_seqs) };
    let drawn: Vec<_> = (0..count).map(|_| lengths(problem, &mut random)).collect();
    Ok(over(problem, &drawn, seed))
}

/// Refuses lengths that do not fit the problem.
pub(super) fn check_lengths(problem: &Problem, batch: &[Lengths]) -> Result<(), Invalid> {
    let refuse =
        |holds, limit: String, fix: &str| ensure(holds, "rpa batch", "lengths", batch_text(batch), || limit, fix);
    let limit = format!("is more than max-seqs = {} sequences", problem.max_seqs);
    refuse(batch.len() <= problem.max_seqs, limit, "give fewer sequences")?;
    for (seq, &Lengths { q_len, kv_len }) in batch.iter().enumerate() {
        let decode = problem.kind == Kind::Decode;
        let idle = problem.fused.is_some() && kv_len == 0;
        let fits = kv_len <= problem.max_kv_len() && (idle || q_len <= kv_len) && !(decode && q_len > 1);
        let most = if decode { ", and at most 1 row" } else { "" };
        let capacity = problem.max_kv_len();
        let limit = format!("has in sequence {seq} more rows than KV tokens, or more than {capacity} KV tokens{most}");
        refuse(fits, limit, "KV tokens count those of the sequence's rows")?;
    }
    let rows: usize = batch.iter().map(|of| of.q_len).sum();
    refuse(rows <= problem.tokens, format!("has {rows} rows; q has {}", problem.tokens), "give fewer rows")?;
    let pages: usize = batch.iter().map(|of| of.kv_len.div_ceil(problem.page_size)).sum();
    let limit = format!("takes {pages} pages; a layer has {}", problem.pages);
    refuse(pages <= problem.pages, limit, "give shorter sequences")
}

/// Inputs over sequences of the lengths `drawn`, cut to what is left of rows and pages.
fn over(problem: &Problem, drawn: &[Lengths], seed: u64) -> Arrays {
    let mut random = Random::new(seed);
    let mut free: Vec<i32> = (0..problem.pages as i32).collect();
    random.shuffle(&mut free);
    let wild = [-1, i32::MAX, problem.pages as i32];
    let mut page_indices: Vec<i32> =
        (0..problem.max_seqs * problem.pages_per_seq).map(|index| wild[index % wild.len()]).collect();
    let mut kv_lens = vec![i32::MAX; problem.max_seqs];
    let mut cu_q_lens = vec![0_i32; problem.max_seqs + 1];
    let mut rows = 0;
    for (seq, lengths) in drawn.iter().enumerate() {
        let kv_len = lengths.kv_len.min(free.len() * problem.page_size);
        let idle = problem.fused.is_some() && kv_len == 0;
        let q_len = lengths.q_len.min(if idle { usize::MAX } else { kv_len }).min(problem.tokens - rows);
        rows += q_len;
        kv_lens[seq] = kv_len as i32;
        cu_q_lens[seq + 1] = rows as i32;
        for column in 0..kv_len.div_ceil(problem.page_size) {
            page_indices[seq * problem.pages_per_seq + column] = free.pop().expect("counted above");
        }
    }
    cu_q_lens[drawn.len() + 1..].fill(-1);
    let batch = Batch::new(problem, &kv_lens, &page_indices, &cu_q_lens, drawn.len()).expect("a valid batch");

    let layout = problem.kv_layout();
    let first_page = layout.first_page((seed % problem.layers as u64) as usize);
    let fused = problem.fused.is_some();
    let scales = [(); 2].map(|()| scales(problem, &mut random));
    let (mut q, mut kv_pages) = (poisoned(&problem.q_type()), poisoned(&problem.kv_pages_type()));
    let mut cos_sin = poisoned(&TensorType::new(Element::F32, &[problem.tokens, problem.head_dim]));
    let width = problem.q_type().len() / problem.tokens;
    for sequence in batch.sequences() {
        for row in (0..sequence.q_len).filter(|&row| sequence.position(row).is_some()) {
            random.fill(&mut q, (sequence.first_row + row) * width, width);
            if fused {
                let (cosines, sines) = cos_sin.as_mut_slice::<f32>()[(sequence.first_row + row) * problem.head_dim..]
                    [..problem.head_dim]
                    .split_at_mut(problem.head_dim / 2);
                for (cosine, sine) in cosines.iter_mut().zip(sines) {
                    let (sin, cos) = (2.0 * random.value()).sin_cos();
                    (*cosine, *sine) = (cos as f32, sin as f32);
                }
            }
        }
        let known = if fused { sequence.kv_len.saturating_sub(sequence.q_len) } else { sequence.kv_len };
        for position in 0..known {
            let token = layout.token(first_page, layout.slot(sequence.pages, position));
            match &scales {
                [Some(k), Some(v)] => fill_scaled(problem, &mut random, &mut kv_pages, token.start, [k, v]),
                _ => random.fill(&mut kv_pages, token.start, token.len()),
            }
        }
    }
    let sinks: Vec<f32> = (0..problem.q_heads).map(|_| 4.0 * random.value() as f32).collect();
    let floats = |values: &[f32]| HostTensor::new(&[values.len()], values);
    let [k_scale, v_scale] = scales.map(|scales| scales.map(|scales| floats(&scales)));
    let arrays = [Some(q), fused.then_some(cos_sin), problem.sinks.then(|| floats(&sinks)), k_scale, v_scale];
    let arrays = arrays.into_iter().flatten().chain([kv_pages]).chain(batch.to_tensors());
    let first_page = (problem.layers > 1).then(|| HostTensor::scalar(first_page as i32));
    problem.arguments().name(arrays.chain(first_page))
}

/// Scales of the heads of a cache of 8 bits: with some, numbers within 2 are beyond the largest that is stored. Those of every
/// other head are so large that most of its numbers are subnormal, or a few integers.
fn scales(problem: &Problem, random: &mut Random) -> Option<Vec<f32>> {
    let [_, most] = problem.precision.bounds();
    let least_normal = problem.precision.kv.minifloat().map_or(1.0, |of| f64::from(of.least_exponent()).exp2());
    let small = 4.0 * least_normal;
    let mut scale = |head: usize| {
        let largest = if head.is_multiple_of(2) { most } else { small };
        (2.0 / largest * (1.25 + 0.25 * random.value())) as f32
    };
    problem.precision.is_scaled().then(|| (0..problem.kv_heads).map(&mut scale).collect())
}

/// Fills a token of the cache with values uniform in (-2, 2), as far as its type holds them, divided by the scales of keys
/// and values.
fn fill_scaled(problem: &Problem, random: &mut Random, kv_pages: &mut HostTensor, token: usize, scales: [&[f32]; 2]) {
    let (layout, dim) = (problem.kv_layout(), problem.head_dim);
    for (half, scales) in Half::ALL.into_iter().zip(scales) {
        for (head, &scale) in scales.iter().enumerate() {
            let values = (0..dim).map(|_| random.value() / f64::from(scale));
            let values = reference::rounded(problem.precision, values);
            let start = token + layout.offset(head, half);
            kv_pages.bytes_mut()[start..start + dim].copy_from_slice(values.bytes());
        }
    }
}
