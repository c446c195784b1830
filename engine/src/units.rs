//! Units and identities that are easily confused: a page is not a token, a slot is not a sequence.
//!
//! Plain counts stay `usize`; a newtype exists only where mixing two numbers would compile and be wrong.

use std::fmt;
use std::num::NonZeroUsize;

/// Tokens that one KV page holds: the only way from tokens to pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSize(NonZeroUsize);

impl PageSize {
    /// A page of `tokens` tokens; `None` for zero.
    pub const fn new(tokens: usize) -> Option<Self> {
        match NonZeroUsize::new(tokens) {
            Some(tokens) => Some(Self(tokens)),
            None => None,
        }
    }

    /// Tokens per page.
    pub const fn tokens(self) -> usize {
        self.0.get()
    }

    /// Pages that hold `tokens` tokens of one sequence.
    pub const fn pages_for(self, tokens: usize) -> usize {
        tokens.div_ceil(self.0.get())
    }
}

/// A page of the KV cache: a row of `kv_pages [pages, page_size, 2*kv_heads, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// A slot of the running batch: a row of `page_indices [max_seqs, pages_per_seq]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub usize);

/// Which sample of a run this is. Ordered as results are printed and merged: by round, prompt, generation.
///
/// The random key of a token depends on this, the seed and the position alone: never on slot, batch or host. So no two
/// samples of a run share their random numbers, and a sample at temperature 0 is the same in every round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SampleId {
    /// Repetition of the whole prompt list, from 0, below [`Self::ROUNDS`].
    pub round: u32,
    /// The prompt's place in the whole run's list, from 0, whichever host runs it.
    pub index: usize,
    /// Which of the prompt's `n_generations` samples, from 0, below [`Self::GENERATIONS`].
    pub generation: u32,
}

impl SampleId {
    /// The most generations of a prompt: what 20 bits of a random key can number.
    pub const GENERATIONS: usize = 1 << 20;
    /// The most rounds of a run: what the other 12 bits can number.
    pub const ROUNDS: usize = 1 << 12;

    /// The two words of the random key: the prompt, and which of its samples. In round 0 the second is the generation.
    pub fn key(self) -> [u32; 2] {
        [self.index as u32, (self.round << 20) | self.generation]
    }
}

impl fmt::Display for SampleId {
    /// `prompt 3, generation 0`, and the round after the first.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "prompt {}, generation {}", self.index, self.generation)?;
        if self.round > 0 { write!(f, ", round {}", self.round) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        let page = PageSize::new(16).unwrap();
        assert_eq!([0, 1, 16, 17].map(|tokens| page.pages_for(tokens)), [0, 1, 1, 2]);
        assert_eq!(PageSize::new(0), None);
    }

    #[test]
    fn samples_have_keys_of_their_own() {
        let [most_rounds, most] = [SampleId::ROUNDS, SampleId::GENERATIONS].map(|count| count as u32 - 1);
        let pairs = [0, 1, 2, most_rounds].map(|round| [0, 1, 2, most].map(|generation| (round, generation)));
        let key = |(round, generation)| SampleId { round, index: 7, generation }.key();
        let keys: std::collections::BTreeSet<_> = pairs.as_flattened().iter().copied().map(key).collect();
        assert_eq!(keys.len(), 16);
        assert_eq!(key((0, 5)), [7, 5], "round 0 has the keys that it had before rounds had keys");
    }
}
