//! A case drawn from a sequence of numbers, so that one description serves property tests, samples from a seed and
//! fuzzing.
//!
//! A kernel draws a problem, tiles and lengths by asking for numbers within ranges. Where the numbers come from is not its
//! concern: from a seed, or from a property test, which shrinks a failing case by making the numbers smaller. Every range
//! maps the number 0 to its first value, so kernels list the simplest value first.

use pagoda_ir::random::SplitMix64;

/// The numbers that a case is drawn from. When they run out, every further choice is the first.
#[derive(Clone, Debug)]
pub struct Choices {
    numbers: Vec<u64>,
    next: usize,
}

impl Choices {
    /// More numbers than any case asks for.
    pub const MOST: usize = 64;

    /// The case of these numbers.
    pub fn new(numbers: Vec<u64>) -> Self {
        Self { numbers, next: 0 }
    }

    /// The case of `seed`.
    pub fn of_seed(seed: u64) -> Self {
        let mut bits = SplitMix64::new(seed);
        Self::new((0..Self::MOST).map(|_| bits.bits()).collect())
    }

    /// The next number.
    pub fn bits(&mut self) -> u64 {
        self.next += 1;
        self.numbers.get(self.next - 1).copied().unwrap_or(0)
    }

    /// Within `from..=to`, growing with the number that it is drawn from.
    pub fn within(&mut self, from: usize, to: usize) -> usize {
        let span = (to - from) as u128 + 1;
        from + ((u128::from(self.bits()) * span) >> 64) as usize
    }

    /// One of `values`, which are not empty.
    pub fn one_of<T: Clone>(&mut self, values: &[T]) -> T {
        values[self.within(0, values.len() - 1)].clone()
    }

    /// Yes or no; no is the simpler one.
    pub fn coin(&mut self) -> bool {
        self.within(0, 1) == 1
    }

    /// Nothing, or as often what `value` draws.
    pub fn maybe<T>(&mut self, value: impl FnOnce(&mut Self) -> T) -> Option<T> {
        if self.coin() { Some(value(self)) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_the_simplest_case_and_ranges_are_whole() {
        let mut zeros = Choices::new(vec![]);
        assert_eq!((zeros.within(3, 9), zeros.one_of(&["a", "b"]), zeros.coin()), (3, "a", false));
        let mut largest = Choices::new(vec![u64::MAX; 3]);
        assert_eq!((largest.within(3, 9), largest.within(0, 0), largest.coin()), (9, 0, true));
        let mut seeded = Choices::of_seed(1);
        let drawn: Vec<_> = (0..32).map(|_| seeded.within(0, 3)).collect();
        assert!((0..=3).all(|value| drawn.contains(&value)), "{drawn:?}");
    }
}
