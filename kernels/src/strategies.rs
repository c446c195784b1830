//! Proptest strategies over [`Choices`]: a failing case shrinks by shrinking the numbers that it was drawn from.

use pagoda_ir::{HostTensor, TensorType};
use proptest::prelude::*;

use crate::{
    choices::Choices,
    kernel::{Kernel, ProblemOf},
    named::Arrays,
    random::Random,
};

/// Numbers for a case.
pub fn choices() -> impl Strategy<Value = Choices> {
    prop::collection::vec(any::<u64>(), Choices::MOST).prop_map(Choices::new)
}

/// An array of type `ty` with values uniform in (-2, 2).
pub fn tensor(ty: TensorType) -> impl Strategy<Value = HostTensor> {
    any::<u64>().prop_map(move |seed| Random::new(seed).tensor(&ty))
}

/// Inputs of `problem`, as `pagoda run --random SEED` draws them.
pub fn inputs<K: Kernel>(problem: ProblemOf<K>) -> impl Strategy<Value = Arrays> {
    any::<u64>().prop_map(move |seed| K::draw(&problem, None, seed).expect("without a batch, inputs are always drawn"))
}
