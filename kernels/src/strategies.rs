//! Proptest strategies: problems' inputs, ragged as they come and poisoned with NaN wherever a kernel must not look.

use pagoda_ir::{Element, HostTensor, TensorType};
use proptest::prelude::*;

use crate::{matmul, rpa};

/// SplitMix64: values from a seed, so that a failing case shrinks in its shape and prints in a line.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in (-2, 2).
    fn value(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 51) as f64 - 2.0
    }

    fn tensor(&mut self, ty: &TensorType) -> HostTensor {
        let values: Vec<f64> = (0..ty.len()).map(|_| self.value()).collect();
        HostTensor::from_f64(ty.element, &ty.dims, &values)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, (self.next() % (end as u64 + 1)) as usize);
        }
    }
}

/// An array of type `ty` with values uniform in (-2, 2).
pub fn tensor(ty: TensorType) -> impl Strategy<Value = HostTensor> {
    any::<u64>().prop_map(move |seed| Random(seed).tensor(&ty))
}

/// Inputs of a matmul.
pub fn matmul_inputs(problem: matmul::Problem) -> impl Strategy<Value = matmul::Inputs> {
    any::<u64>().prop_map(move |seed| {
        let mut random = Random(seed);
        let mut arrays =
            problem.argument_types().into_iter().map(|ty| random.tensor(&ty)).collect::<Vec<_>>().into_iter();
        let mut next = || arrays.next().expect("an array per argument");
        matmul::Inputs {
            x: next(),
            w: next(),
            bias: problem.epilogue.bias.then(&mut next),
            residual: problem.epilogue.residual.then(&mut next),
        }
    })
}

/// The lengths of a sequence as drawn, before they are cut to what is left of the problem's rows and pages.
#[derive(Clone, Copy, Debug)]
struct Lengths {
    q_len: usize,
    kv_len: usize,
}

fn lengths(problem: &rpa::Problem) -> impl Strategy<Value = Lengths> + use<> {
    let (page, most, rows, kind) = (problem.page_size, problem.max_kv_len(), problem.tokens, problem.kind);
    let kv_len = prop_oneof![
        1 => Just(0),
        4 => 1..=most,
        2 => (1..=most / page).prop_map(move |pages| pages * page), // full pages
        1 => (0..most / page).prop_map(move |pages| pages * page + 1),
        1 => Just(most),
    ];
    let q_len = match kind {
        rpa::Kind::Decode => prop_oneof![1 => Just(0), 8 => Just(1)].boxed(),
        rpa::Kind::Mixed => prop_oneof![1 => Just(0), 3 => Just(1), 4 => 2..=rows.max(2), 1 => Just(rows)].boxed(),
    };
    (kv_len, q_len).prop_map(|(kv_len, q_len)| Lengths { q_len, kv_len })
}

/// Inputs of an attention: empty sequences, decode rows, chunks at the end of a longer context, full and partial pages,
/// page tables out of order, padding rows. Everything outside the live sequences is NaN, and page ids there are wild.
pub fn rpa_inputs(problem: rpa::Problem) -> impl Strategy<Value = rpa::Inputs> {
    let sequences = prop::collection::vec(lengths(&problem), 0..=problem.max_seqs);
    (sequences, 0..problem.layers, any::<u64>())
        .prop_map(move |(sequences, layer, seed)| build(&problem, &sequences, layer, seed))
}

fn build(problem: &rpa::Problem, drawn: &[Lengths], layer: usize, seed: u64) -> rpa::Inputs {
    let mut random = Random(seed);
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

    let (q, kv) = (problem.q_type(), problem.kv_pages_type());
    let poisoned = |ty: &TensorType| HostTensor::from_f64(ty.element, &ty.dims, &vec![f64::NAN; ty.len()]);
    let (mut q, mut kv_pages) = (poisoned(&q), poisoned(&kv));
    let mut fill = |tensor: &mut HostTensor, first: usize, count: usize| match tensor.element() {
        Element::F32 => tensor.as_mut_slice::<f32>()[first..first + count].fill_with(|| random.value() as f32),
        _ => {
            tensor.as_mut_slice::<half::bf16>()[first..first + count].fill_with(|| half::bf16::from_f64(random.value()))
        }
    };
    fill(&mut q, 0, rows * problem.q_heads * problem.head_dim);
    let token = 2 * problem.kv_heads * problem.head_dim;
    for sequence in batch.sequences() {
        for position in 0..sequence.kv_len {
            let page = layer * problem.pages + sequence.pages[position / problem.page_size] as usize;
            fill(&mut kv_pages, (page * problem.page_size + position % problem.page_size) * token, token);
        }
    }
    rpa::Inputs { q, kv_pages, batch, layer }
}

/// Inputs of an attention whose `lengths` (`q_len`, `kv_len`) are given; panics when they do not fit the problem.
pub fn rpa_inputs_of(problem: &rpa::Problem, lengths: &[(usize, usize)], seed: u64) -> rpa::Inputs {
    let drawn: Vec<_> = lengths.iter().map(|&(q_len, kv_len)| Lengths { q_len, kv_len }).collect();
    build(problem, &drawn, 0, seed)
}
