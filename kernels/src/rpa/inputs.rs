//! Inputs of a launch, drawn from a seed: ragged batches, page tables out of order, padding rows. Everything
//! outside the live sequences is NaN, and page ids there are wild.

use pagoda_ir::HostTensor;

use super::{
    batch::Batch,
    problem::{Kind, Problem},
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
        let fits = kv_len <= problem.max_kv_len() && q_len <= kv_len && !(decode && q_len > 1);
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
        let q_len = lengths.q_len.min(kv_len).min(problem.tokens - rows);
        rows += q_len;
        kv_lens[seq] = kv_len as i32;
        cu_q_lens[seq + 1] = rows as i32;
        for column in 0..kv_len.div_ceil(problem.page_size) {
            page_indices[seq * problem.pages_per_seq + column] = free.pop().expect("counted above");
        }
    }
    cu_q_lens[drawn.len() + 1..].fill(-1);
    let batch = Batch::new(problem, &kv_lens, &page_indices, &cu_q_lens, drawn.len()).expect("a valid batch");

    let (mut q, mut kv_pages) = (poisoned(&problem.q_type()), poisoned(&problem.kv_pages_type()));
    random.fill(&mut q, 0, rows * problem.q_heads * problem.head_dim);
    let layout = problem.kv_layout();
    let first_page = layout.first_page((seed % problem.layers as u64) as usize);
    for sequence in batch.sequences() {
        for position in 0..sequence.kv_len {
            let token = layout.token(first_page, layout.slot(sequence.pages, position));
            random.fill(&mut kv_pages, token.start, token.len());
        }
    }
    let arrays = [q, kv_pages].into_iter().chain(batch.to_tensors());
    let first_page = (problem.layers > 1).then(|| HostTensor::scalar(first_page as i32));
    problem.arguments().name(arrays.chain(first_page))
}
