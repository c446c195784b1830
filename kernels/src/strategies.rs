//! Proptest strategies over [`Choices`]: a failing case shrinks by shrinking the numbers that it was drawn from.

use pagoda_ir::{HostTensor, TensorType};
pub use proptest::test_runner::RngSeed;
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestError, TestRunner},
};

use crate::{
    choices::Choices,
    drawn::Drawn,
    kernel::{Kernel, ProblemOf},
    named::Arrays,
    random::Random,
};

/// Numbers for a case.
pub fn choices() -> impl Strategy<Value = Choices> {
    prop::collection::vec(any::<u64>(), Choices::MOST).prop_map(Choices::new)
}

/// Tests `cases` drawn cases, and shrinks the one that fails.
///
/// # Panics
/// With what `test` says of the smallest case that it fails on.
pub fn drawn<K: Kernel>(cases: u32, rng_seed: RngSeed, test: impl Fn(&Drawn<K>) -> Result<(), String>) {
    let config = Config { cases, rng_seed, failure_persistence: None, ..Config::default() };
    let test = |choices| test(&Drawn::new(choices)).map_err(TestCaseError::fail);
    match TestRunner::new(config).run(&self::choices(), test) {
        Ok(()) => {}
        Err(TestError::Fail(reason, _) | TestError::Abort(reason)) => panic!("{reason}"),
    }
}

/// An array of type `ty` with values uniform in (-2, 2).
pub fn tensor(ty: TensorType) -> impl Strategy<Value = HostTensor> {
    any::<u64>().prop_map(move |seed| Random::new(seed).tensor(&ty))
}

/// Inputs of `problem`, as `pagoda run --random SEED` draws them.
pub fn inputs<K: Kernel>(problem: ProblemOf<K>) -> impl Strategy<Value = Arrays> {
    any::<u64>().prop_map(move |seed| K::draw(&problem, None, seed).expect("without a batch, inputs are always drawn"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rms_norm::RmsNorm;

    #[test]
    #[should_panic(expected = "fails on 21 rows")]
    fn a_failure_shrinks() {
        drawn::<RmsNorm>(300, RngSeed::Fixed(1), |case| {
            let rows = case.plan.problem().rows;
            if rows > 20 { Err(format!("fails on {rows} rows")) } else { Ok(()) }
        });
    }
}
