//! Proptest strategies: problems' inputs, ragged as they come and poisoned with NaN wherever a kernel must not look.

use pagoda_ir::{HostTensor, TensorType};
use proptest::prelude::*;

use crate::{
    matmul,
    random::{self, Lengths, Random},
    rpa,
};

/// An array of type `ty` with values uniform in (-2, 2).
pub fn tensor(ty: TensorType) -> impl Strategy<Value = HostTensor> {
    any::<u64>().prop_map(move |seed| Random::new(seed).tensor(&ty))
}

/// Inputs of a matmul.
pub fn matmul_inputs(problem: matmul::Problem) -> impl Strategy<Value = matmul::Inputs> {
    any::<u64>().prop_map(move |seed| random::matmul_inputs(&problem, seed))
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
        .prop_map(move |(sequences, layer, seed)| random::rpa_inputs_of(&problem, &sequences, layer, seed))
}

/// Inputs of an attention whose `lengths` (`q_len`, `kv_len`) are given; panics when they do not fit the problem.
pub fn rpa_inputs_of(problem: &rpa::Problem, lengths: &[(usize, usize)], seed: u64) -> rpa::Inputs {
    let drawn: Vec<_> = lengths.iter().map(|&(q_len, kv_len)| Lengths { q_len, kv_len }).collect();
    random::rpa_inputs_of(problem, &drawn, 0, seed)
}
