//! Inputs drawn from a seed, the same on every machine: what `pagoda run --random SEED` and the property tests feed to
//! kernels. Ragged as batches come, and poisoned with NaN wherever a kernel must not look.

use half::bf16;
use pagoda_ir::random::SplitMix64;
use pagoda_ir::{Element, HostTensor, TensorType};

use crate::{matmul, rpa};

/// Arrays and sizes drawn from a seed.
#[derive(Clone, Debug)]
pub struct Random(SplitMix64);

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(SplitMix64::new(seed))
    }

    /// Uniform in (-2, 2).
    fn value(&mut self) -> f64 {
        (self.0.bits() >> 11) as f64 / (1_u64 << 51) as f64 - 2.0
    }

    /// Uniform in `from..=to`.
    fn within(&mut self, from: usize, to: usize) -> usize {
        from + self.0.below(to - from + 1)
    }

    /// An array of type `ty`, f32 or bf16, with values uniform in (-2, 2).
    pub fn tensor(&mut self, ty: &TensorType) -> HostTensor {
        let mut tensor = HostTensor::zeros(ty.element, &ty.dims);
        self.fill(&mut tensor, 0, ty.len());
        tensor
    }

    fn fill(&mut self, tensor: &mut HostTensor, first: usize, count: usize) {
        match tensor.element() {
            Element::F32 => tensor.as_mut_slice::<f32>()[first..first + count].fill_with(|| self.value() as f32),
            _ => tensor.as_mut_slice::<bf16>()[first..first + count].fill_with(|| bf16::from_f64(self.value())),
        }
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, self.0.below(end + 1));
        }
    }
}

/// Inputs of a matmul.
pub fn matmul_inputs(problem: &matmul::Problem, seed: u64) -> matmul::Inputs {
    let mut random = Random::new(seed);
    let mut arrays = problem.argument_types().into_iter().map(|ty| random.tensor(&ty)).collect::<Vec<_>>().into_iter();
    let mut next = || arrays.next().expect("an array per argument");
    matmul::Inputs {
        x: next(),
        w: next(),
        bias: problem.epilogue.bias.then(&mut next),
        residual: problem.epilogue.residual.then(&mut next),
    }
}

/// The lengths of a sequence as drawn, before they are cut to what is left of the problem's rows and pages.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    /// Query rows.
    pub q_len: usize,
    /// Keys, those of the query rows included.
    pub kv_len: usize,
}

impl Lengths {
    /// Empty sequences, decode rows, chunks at the end of a longer context, whole prompts; full and partial pages.
    fn draw(problem: &rpa::Problem, random: &mut Random) -> Self {
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
            (rpa::Kind::Decode, _) | (_, 1..=3) => 1,
            (_, 4..=7) => random.within(2, problem.tokens.max(2)),
            _ => problem.tokens,
        };
        Self { q_len, kv_len }
    }
}

/// Inputs of an attention: a random batch of up to `max_seqs` sequences, page tables out of order, padding rows.
/// Everything outside the live sequences is NaN, and page ids there are wild.
pub fn rpa_inputs(problem: &rpa::Problem, seed: u64) -> rpa::Inputs {
    let mut random = Random::new(seed);
    let count = if random.within(0, 15) == 0 { 0 } else { random.within(1, problem.max_seqs) };
    let drawn: Vec<_> = (0..count).map(|_| Lengths::draw(problem, &mut random)).collect();
    rpa_inputs_of(problem, &drawn, layer_of(problem, seed), seed)
}

/// The layer that a launch of `seed` reads.
pub fn layer_of(problem: &rpa::Problem, seed: u64) -> usize {
    (seed % problem.layers as u64) as usize
}

/// Inputs of an attention over sequences of the lengths `drawn`, cut to what is left of rows and pages, as
/// [`rpa_inputs`] poisons them.
///
/// # Panics
/// When these are more than `max_seqs` sequences, or the lengths do not fit the problem otherwise.
pub fn rpa_inputs_of(problem: &rpa::Problem, drawn: &[Lengths], layer: usize, seed: u64) -> rpa::Inputs {
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
    let batch = rpa::Batch::new(problem, &kv_lens, &page_indices, &cu_q_lens, drawn.len()).expect("a valid batch");

    let (mut q, mut kv_pages) = (poisoned(&problem.q_type()), poisoned(&problem.kv_pages_type()));
    random.fill(&mut q, 0, rows * problem.q_heads * problem.head_dim);
    let token = 2 * problem.kv_heads * problem.head_dim;
    for sequence in batch.sequences() {
        for position in 0..sequence.kv_len {
            let page = layer * problem.pages + sequence.pages[position / problem.page_size] as usize;
            random.fill(&mut kv_pages, (page * problem.page_size + position % problem.page_size) * token, token);
        }
    }
    rpa::Inputs { q, kv_pages, batch, layer }
}

/// An f32 or bf16 array of NaN.
fn poisoned(ty: &TensorType) -> HostTensor {
    let mut tensor = HostTensor::zeros(ty.element, &ty.dims);
    match ty.element {
        Element::F32 => tensor.as_mut_slice::<f32>().fill(f32::NAN),
        _ => tensor.as_mut_slice::<bf16>().fill(bf16::NAN),
    }
    tensor
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any drift breaks the reproductions that people wrote down.
    #[test]
    fn a_seed_means_the_same_for_ever() {
        let tensor = Random::new(7).tensor(&TensorType::new(Element::F32, &[3]));
        assert_eq!(tensor.as_slice::<f32>(), [-0.440_681, -1.932_846_8, 1.603_042_7]);
    }
}
