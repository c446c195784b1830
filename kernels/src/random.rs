//! Inputs drawn from a seed, the same on every machine: what `pagoda run --random SEED` and the property tests feed to
//! kernels. What a kernel must not look at is poisoned with NaN.

use half::bf16;
use pagoda_ir::random::SplitMix64;
use pagoda_ir::{Element, HostTensor, TensorType};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Invalid, ensure},
    named::{Arguments, Arrays},
};

/// Arrays and sizes drawn from a seed.
#[derive(Clone, Debug)]
pub struct Random(SplitMix64);

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(SplitMix64::new(seed))
    }

    /// Uniform in (-2, 2).
    pub fn value(&mut self) -> f64 {
        (self.0.bits() >> 11) as f64 / (1_u64 << 51) as f64 - 2.0
    }

    /// Uniform in `from..=to`.
    pub fn within(&mut self, from: usize, to: usize) -> usize {
        from + self.0.below(to - from + 1)
    }

    /// An array of type `ty`: floats uniform in (-2, 2), integers uniform in all that the type holds.
    pub fn tensor(&mut self, ty: &TensorType) -> HostTensor {
        let mut tensor = HostTensor::zeros(ty.element, &ty.dims);
        self.fill(&mut tensor, 0, ty.len());
        tensor
    }

    /// Fills `count` elements from `first` on with values uniform in (-2, 2).
    pub fn fill(&mut self, tensor: &mut HostTensor, first: usize, count: usize) {
        match tensor.element() {
            Element::F32 => tensor.as_mut_slice::<f32>()[first..first + count].fill_with(|| self.value() as f32),
            Element::Bf16 => {
                tensor.as_mut_slice::<bf16>()[first..first + count].fill_with(|| bf16::from_f64(self.value()))
            }
            element if element.is_float() => {
                let values: Vec<f64> = (0..count).map(|_| self.value()).collect();
                let width = element.bytes();
                let drawn = HostTensor::from_f64(element, &[count], &values);
                tensor.bytes_mut()[first * width..(first + count) * width].copy_from_slice(drawn.bytes());
            }
            element => {
                let (width, mask) =
                    (element.bytes(), if element.bits() < 8 { (1 << element.bits()) - 1 } else { 0xff });
                let mask = if element == Element::Pred { 1 } else { mask };
                tensor.bytes_mut()[first * width..(first + count) * width].fill_with(|| self.0.bits() as u8 & mask);
            }
        }
    }

    /// Puts `items` into a random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, self.0.below(end + 1));
        }
    }
}

/// Every argument, as [`Random::tensor`] draws it.
pub fn arrays(arguments: &Arguments, seed: u64) -> Arrays {
    let mut random = Random::new(seed);
    arguments.name(arguments.iter().map(|argument| random.tensor(&argument.ty)))
}

/// The lengths of one sequence of a ragged batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lengths {
    /// Query rows.
    pub q_len: usize,
    /// KV tokens, those of the query rows included.
    pub kv_len: usize,
}

/// More sequences than a batch has that somebody means.
const MAX_SEQUENCES: usize = 1 << 16;

/// A batch as the command line takes it, equal neighbours counted: `9/48,1/4608x8`, or `none`.
pub fn batch_text(batch: &[Lengths]) -> String {
    let runs = batch.chunk_by(|one, next| one == next).map(|run| {
        let Lengths { q_len, kv_len } = run[0];
        if run.len() > 1 { format!("{q_len}/{kv_len}x{}", run.len()) } else { format!("{q_len}/{kv_len}") }
    });
    if batch.is_empty() { "none".to_owned() } else { runs.collect::<Vec<_>>().join(",") }
}

/// Reads [`batch_text`]: query rows, KV tokens (those of the rows included) and how many such sequences, `Q/KV[xN],...`.
///
/// # Errors
/// When the text is not that.
pub fn parse_batch(text: &str) -> Result<Vec<Lengths>, Invalid> {
    let sequences = |part: &str| {
        let (q_len, kv_len) = part.trim().split_once('/')?;
        let (kv_len, count) = kv_len.split_once('x').unwrap_or((kv_len, "1"));
        let count: usize = count.parse().ok().filter(|&count| count > 0)?;
        Some((Lengths { q_len: q_len.parse().ok()?, kv_len: kv_len.parse().ok()? }, count))
    };
    let runs: Option<Vec<_>> = match text.trim() {
        "none" => Some(vec![]),
        text => text.split(',').map(sequences).collect(),
    };
    let fix = "write e.g. 1024/1024,1/4608x8 (the count is 1 where it is left out), or none";
    ensure(runs.is_some(), "batch", "lengths", text, || "is not Q/KV[xN],...".into(), fix)?;
    let runs = runs.unwrap_or_default();
    let count = runs.iter().fold(0_usize, |sum, (_, count)| sum.saturating_add(*count));
    let limit = || format!("has more than {MAX_SEQUENCES} sequences");
    ensure(count <= MAX_SEQUENCES, "batch", "lengths", text, limit, "give fewer")?;
    Ok(runs.into_iter().flat_map(|(of, count)| std::iter::repeat_n(of, count)).collect())
}

/// Refuses a batch that is given to a kernel without one.
///
/// # Errors
/// When there is a batch.
pub fn without_batch(kernel: &'static str, batch: Option<&[Lengths]>) -> Result<(), Invalid> {
    let value = || batch.map_or_else(String::new, batch_text);
    let limit = || format!("is of no use to {kernel}, which has no ragged batch");
    ensure(batch.is_none(), kernel, "lengths", value(), limit, "leave it out")
}

/// An array of NaN; of the least number where the type has none.
pub fn poisoned(ty: &TensorType) -> HostTensor {
    let poison = if ty.element.is_float() { f64::NAN } else { f64::NEG_INFINITY };
    HostTensor::from_f64(ty.element, &ty.dims, &vec![poison; ty.len()])
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

    #[test]
    fn a_batch_is_read_as_it_is_written() {
        for text in ["none", "9/48", "1/60,13/13,0/0", "1024/1024,1/4608x8,1/7,1/4608x2"] {
            assert_eq!(batch_text(&parse_batch(text).unwrap()), text);
        }
        assert_eq!(parse_batch("1/9x3, 2/2x1").unwrap().len(), 4);
        for bad in ["", "9", "9/", "a/b", "1/2,", "1/2x", "1/2x0", "1/2x-1", "1x2/3", "1/2x3x4", "1/2x99999999999"] {
            assert!(parse_batch(bad).is_err(), "{bad}");
        }
    }
}
