//! Sampling on the device: greedy, temperature, top-k, top-p.
//!
//! The token that a row yields depends on its logits and on (seed, global prompt index, round, generation, position) only:
//! never on the slot it sits in, on its neighbours, on the host, or on how the work was cut into calls.
//!
//! - *Random bits*: Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11).
//!   The row's key is `threefry(seed, [prompt index, draw])`, where `draw` holds round and generation
//!   ([`SampleId::key`](crate::units::SampleId::key)), its bits at a position `threefry(key, [position, 0])`, of which
//!   the upper 24 make a uniform number in `[0, 1)`.
//! - *Filters*: no sort. With `w = exp((logit - max) / temperature)`, the k-th largest weight, and the weight at which
//!   the largest ones first sum to `p`, are found by bisection over the bit patterns of f32 (30 steps, each one
//!   compare-and-reduce over the vocabulary), which is exact. Ties at the threshold are all kept. Top-k comes first,
//!   then top-p over what is left, as in Hugging Face transformers.
//! - *Choice*: inverse transform over the weights in vocabulary order, in two levels of blocks.
//!
//! Greedy takes the first of equal maxima. All arithmetic is f32.

use pagoda_ir::stablehlo::{Builder, Direction, Tensor};
use pagoda_ir::{Element, Result};

/// What a step program does with its logits; fixed when the program is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sampling {
    /// The most likely token.
    Greedy,
    /// A random token at some temperature, after the filters that are on.
    Random {
        /// Keep the k most likely tokens.
        top_k: bool,
        /// Keep the smallest set of tokens whose probability reaches p.
        top_p: bool,
        /// Say of each token how likely it is, too.
        log_probabilities: bool,
    },
}

impl Sampling {
    /// Whether a program of this variant samples rows as `other` would.
    pub fn serves(self, other: Self) -> bool {
        match (self, other) {
            (_, Self::Greedy) => true,
            (Self::Greedy, Self::Random { .. }) => false,
            (
                Self::Random { top_k, top_p, log_probabilities },
                Self::Random { top_k: k, top_p: p, log_probabilities: log },
            ) => (top_k || !k) && (top_p || !p) && (log_probabilities || !log),
        }
    }
}

/// The run-time parameters, each of every row.
#[derive(Clone, Copy)]
pub struct Parameters<'c, 'a> {
    /// `f32[rows]`; 0 for greedy.
    pub temperature: Tensor<'c, 'a>,
    /// `i32[rows]`, at least one; the vocabulary's size or more for all.
    pub top_k: Tensor<'c, 'a>,
    /// `f32[rows]` in (0, 1]; 1 for all.
    pub top_p: Tensor<'c, 'a>,
    /// `u32[rows]` each, the high word first.
    pub seed: [Tensor<'c, 'a>; 2],
    /// `i32[rows]`, 0 or 1: who asks how likely its token is.
    pub log_probabilities: Tensor<'c, 'a>,
}

/// What a row's random numbers depend on beside the seed, each `u32[rows]`.
#[derive(Clone, Copy)]
pub struct Keys<'c, 'a> {
    /// The prompt's global index.
    pub index: Tensor<'c, 'a>,
    /// Which of the prompt's samples this is: its round and generation.
    pub generation: Tensor<'c, 'a>,
    /// The position that the sampled token will have.
    pub position: Tensor<'c, 'a>,
}

/// Emits the choice of one token per row: logits `f32[rows, vocab]` to tokens `i32[rows]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn emit<'c, 'a>(
    b: &Builder<'c, 'a>,
    sampling: Sampling,
    logits: Tensor<'c, 'a>,
    parameters: &Parameters<'c, 'a>,
    keys: &Keys<'c, 'a>,
) -> Result<Tensor<'c, 'a>> {
    let (max, greedy) = largest(b, logits)?;
    let Sampling::Random { top_k, top_p, .. } = sampling else { return Ok(greedy) };
    let zeros = b.splat(Element::F32, &logits.dims()[..1], 0.0)?;
    let is_random = b.compare(parameters.temperature, Direction::Gt, zeros)?;
    let chosen = b.if_(
        b.reduce_or(is_random, &[0])?,
        |b| {
            let (token, valid) = draw(b, (top_k, top_p), (logits, max, is_random), parameters, keys)?;
            Ok(vec![b.select(b.and(is_random, valid)?, token, greedy)?])
        },
        |_| Ok(vec![greedy]),
    )?;
    Ok(chosen[0])
}

/// A random token per row, and whether it has any weight: rounding in the running sums may point at one that has none.
fn draw<'c, 'a>(
    b: &Builder<'c, 'a>,
    (top_k, top_p): (bool, bool),
    (logits, max, is_random): (Tensor<'c, 'a>, Tensor<'c, 'a>, Tensor<'c, 'a>),
    parameters: &Parameters<'c, 'a>,
    keys: &Keys<'c, 'a>,
) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
    let dims = logits.dims(); // [rows, vocab]
    let rows = &dims[..1];
    let ones = b.splat(Element::F32, rows, 1.0)?;
    let temperature = b.select(is_random, parameters.temperature, ones)?;
    let shifted = b.subtract(logits, b.broadcast_in_dim(max, &dims, &[0])?)?;
    let mut weights = b.exponential(b.divide(shifted, b.broadcast_in_dim(temperature, &dims, &[0])?)?)?;
    if top_k {
        let all = b.splat(Element::I32, rows, dims[1] as f64)?;
        let filtered = b.and(is_random, b.compare(parameters.top_k, Direction::Lt, all)?)?;
        weights = keep_largest(b, weights, filtered, |b, at_least| {
            let count = b.reduce_sum(b.convert(at_least, Element::I32)?, &[1])?;
            b.compare(count, Direction::Ge, parameters.top_k)
        })?;
    }
    if top_p {
        let filtered = b.and(is_random, b.compare(parameters.top_p, Direction::Lt, ones)?)?;
        let wanted = b.multiply(b.reduce_sum(weights, &[1])?, parameters.top_p)?;
        let all = weights;
        weights = keep_largest(b, weights, filtered, |b, at_least| {
            let kept = b.select(at_least, all, b.splat(Element::F32, &dims, 0.0)?)?;
            b.compare(b.reduce_sum(kept, &[1])?, Direction::Ge, wanted)
        })?;
    }
    let uniform = uniform(b, parameters.seed, keys)?;
    let chosen = inverse_transform(b, weights, uniform)?;
    let ids = b.iota(Element::I32, &dims, 1)?;
    let is_chosen = b.compare(ids, Direction::Eq, b.broadcast_in_dim(chosen, &dims, &[0])?)?;
    let zeros = b.splat(Element::F32, &dims, 0.0)?;
    let weight = b.reduce_sum(b.select(is_chosen, weights, zeros)?, &[1])?;
    Ok((chosen, b.compare(weight, Direction::Gt, b.splat(Element::F32, rows, 0.0)?)?))
}

/// The logarithm of the probability that the model gives each row's token, before temperature and filters: logits
/// `f32[rows, vocab]` and `tokens i32[rows]` to `f32[rows]`. Zeros, and no work, where no row of `wanted i32[rows]` asks for it.
///
/// # Errors
/// When the shapes do not fit.
pub fn log_probabilities<'c, 'a>(
    b: &Builder<'c, 'a>,
    logits: Tensor<'c, 'a>,
    tokens: Tensor<'c, 'a>,
    wanted: Tensor<'c, 'a>,
) -> Result<Tensor<'c, 'a>> {
    let dims = logits.dims();
    let wanted = b.compare(wanted, Direction::Gt, b.splat(Element::I32, &dims[..1], 0.0)?)?;
    let found = b.if_(
        b.reduce_or(wanted, &[0])?,
        |b| {
            let shifted = b.subtract(logits, b.broadcast_in_dim(b.reduce_max(logits, &[1])?, &dims, &[0])?)?;
            let total = b.log(b.reduce_sum(b.exponential(shifted)?, &[1])?)?;
            let ids = b.iota(Element::I32, &dims, 1)?;
            let is_token = b.compare(ids, Direction::Eq, b.broadcast_in_dim(tokens, &dims, &[0])?)?;
            let own = b.reduce_sum(b.select(is_token, shifted, b.splat(Element::F32, &dims, 0.0)?)?, &[1])?;
            Ok(vec![b.subtract(own, total)?])
        },
        |b| Ok(vec![b.splat(Element::F32, &dims[..1], 0.0)?]),
    )?;
    Ok(found[0])
}

/// Each row's maximum and its first index: `f32[rows, n]` to `f32[rows]`, `i32[rows]`.
///
/// # Errors
/// When `x` has no such type.
pub(crate) fn largest<'c, 'a>(b: &Builder<'c, 'a>, x: Tensor<'c, 'a>) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
    let dims = x.dims();
    let max = b.reduce_max(x, &[1])?;
    let is_max = b.compare(x, Direction::Eq, b.broadcast_in_dim(max, &dims, &[0])?)?;
    let ids = b.iota(Element::I32, &dims, 1)?;
    let none = b.splat(Element::I32, &dims, (dims[1] - 1) as f64)?;
    // Two plain reductions vectorise; one variadic reduction over (value, index) pairs does not.
    Ok((max, b.reduce_min(b.select(is_max, ids, none)?, &[1])?))
}

/// Zeroes all weights below the largest threshold that is `enough`, in the rows that are `filtered bool[rows]`. Where none is, it
/// costs nothing.
///
/// `weights` are in `[0, 1]`, where the order of f32 is that of its bit pattern; `enough` gets a mask of the weights at
/// or above a candidate, and must be monotone: true for the mask of everything.
fn keep_largest<'c, 'a>(
    b: &Builder<'c, 'a>,
    weights: Tensor<'c, 'a>,
    filtered: Tensor<'c, 'a>,
    enough: impl Fn(&Builder<'c, 'a>, Tensor<'c, 'a>) -> Result<Tensor<'c, 'a>>,
) -> Result<Tensor<'c, 'a>> {
    let dims = weights.dims();
    let rows = &dims[..1];
    let kept = b.if_(
        b.reduce_or(filtered, &[0])?,
        |b| {
            let bits = b.bitcast_convert(weights, Element::I32)?;
            // Bit patterns of [0, 1] need 30 bits: set them from the top, keeping each that is still enough.
            let start = [b.splat(Element::I32, rows, 0.0)?, b.scalar(Element::I32, f64::from(1 << 29))?];
            let found = b.while_(
                &start,
                |b, state| b.compare(state[1], Direction::Gt, b.scalar(Element::I32, 0.0)?),
                |b, state| {
                    let candidate = b.or(state[0], b.broadcast_to(state[1], rows)?)?;
                    let mask = b.compare(bits, Direction::Ge, b.broadcast_in_dim(candidate, &dims, &[0])?)?;
                    let raised = b.and(filtered, enough(b, mask)?)?;
                    let threshold = b.select(raised, candidate, state[0])?;
                    Ok(vec![threshold, b.shift_right_logical(state[1], b.scalar(Element::I32, 1.0)?)?])
                },
            )?;
            let kept = b.compare(bits, Direction::Ge, b.broadcast_in_dim(found[0], &dims, &[0])?)?;
            Ok(vec![b.select(kept, weights, b.splat(Element::F32, &dims, 0.0)?)?])
        },
        |_| Ok(vec![weights]),
    )?;
    Ok(kept[0])
}

/// The first index at which the running sum of a row's weights exceeds `uniform * total`.
fn inverse_transform<'c, 'a>(
    b: &Builder<'c, 'a>,
    weights: Tensor<'c, 'a>,
    uniform: Tensor<'c, 'a>,
) -> Result<Tensor<'c, 'a>> {
    let dims = weights.dims();
    let (rows, vocab) = (dims[0], dims[1]);
    // Blocks of about the square root, so that both levels cost the same.
    let block = (vocab as f64).sqrt().ceil() as usize;
    let blocks = vocab.div_ceil(block);
    let zero = b.scalar(Element::F32, 0.0)?;
    let padded = b.pad(weights, zero, &[0, 0], &[0, (blocks * block - vocab) as i64], &[0, 0])?;
    let padded = b.reshape(padded, &[rows, blocks, block])?;

    let sums = b.reduce_sum(padded, &[2])?; // [rows, blocks]
    let target = b.multiply(uniform, b.reduce_sum(sums, &[1])?)?;
    let (at_block, before) = first_above(b, sums, target)?;
    // The chosen block's weights: a masked sum, as rows choose different blocks.
    let ids = b.iota(Element::I32, &[rows, blocks, block], 1)?;
    let here = b.compare(ids, Direction::Eq, b.broadcast_in_dim(at_block, &[rows, blocks, block], &[0])?)?;
    let zeros = b.splat(Element::F32, &[rows, blocks, block], 0.0)?;
    let within = b.reduce_sum(b.select(here, padded, zeros)?, &[1])?; // [rows, block]
    let (at, _) = first_above(b, within, b.subtract(target, before)?)?;
    let index = b.add(b.multiply(at_block, b.splat(Element::I32, &[rows], block as f64)?)?, at)?;
    b.minimum(index, b.splat(Element::I32, &[rows], (vocab - 1) as f64)?)
}

/// For each row of `x [rows, n]`: the first index whose running sum exceeds `target`, and the sum before it.
fn first_above<'c, 'a>(
    b: &Builder<'c, 'a>,
    x: Tensor<'c, 'a>,
    target: Tensor<'c, 'a>,
) -> Result<(Tensor<'c, 'a>, Tensor<'c, 'a>)> {
    let dims = x.dims();
    let (rows, n) = (dims[0], dims[1]);
    let cube = [rows, n, n];
    // running[r, j] = sum of x[r, i] over i <= j: n is a square root of the vocabulary, so n * n is one pass over it.
    let not_after = b.compare(b.iota(Element::I32, &cube, 2)?, Direction::Le, b.iota(Element::I32, &cube, 1)?)?;
    let zeros = b.splat(Element::F32, &cube, 0.0)?;
    let running = b.reduce_sum(b.select(not_after, b.broadcast_in_dim(x, &cube, &[0, 2])?, zeros)?, &[2])?; // [rows, n]
    let below = b.compare(running, Direction::Le, b.broadcast_in_dim(target, &dims, &[0])?)?;
    let count = b.reduce_sum(b.convert(below, Element::I32)?, &[1])?;
    let index = b.minimum(count, b.splat(Element::I32, &[rows], (n - 1) as f64)?)?;
    let zeros = b.splat(Element::F32, &dims, 0.0)?;
    let ids = b.iota(Element::I32, &dims, 1)?;
    let earlier = b.compare(ids, Direction::Lt, b.broadcast_in_dim(index, &dims, &[0])?)?;
    let before = b.reduce_max(b.select(earlier, running, zeros)?, &[1])?;
    Ok((index, before))
}

/// One uniform number in `[0, 1)` per row.
fn uniform<'c, 'a>(b: &Builder<'c, 'a>, seed: [Tensor<'c, 'a>; 2], keys: &Keys<'c, 'a>) -> Result<Tensor<'c, 'a>> {
    let rows = keys.index.dims();
    let key = threefry(b, seed, [keys.index, keys.generation])?;
    let zero = b.splat(Element::U32, &rows, 0.0)?;
    let bits = threefry(b, key, [keys.position, zero])?[0];
    let upper = b.shift_right_logical(bits, b.splat(Element::U32, &rows, 8.0)?)?;
    b.multiply(b.convert(upper, Element::F32)?, b.splat(Element::F32, &rows, 1.0 / f64::from(1 << 24))?)
}

/// Threefry-2x32, 20 rounds, elementwise over `u32` arrays.
pub(crate) fn threefry<'c, 'a>(
    b: &Builder<'c, 'a>,
    key: [Tensor<'c, 'a>; 2],
    counter: [Tensor<'c, 'a>; 2],
) -> Result<[Tensor<'c, 'a>; 2]> {
    const ROTATIONS: [[u32; 4]; 2] = [[13, 15, 26, 6], [17, 29, 16, 24]];
    const PARITY: u32 = 0x1bd1_1bda;
    let dims = key[0].dims();
    let constant = |value: u32| b.splat(Element::U32, &dims, f64::from(value));
    let parity = b.xor(b.xor(key[0], key[1])?, constant(PARITY)?)?;
    let schedule = [key[0], key[1], parity];
    let [mut x0, mut x1] = [b.add(counter[0], schedule[0])?, b.add(counter[1], schedule[1])?];
    for group in 0..5usize {
        for rotation in ROTATIONS[group % 2] {
            x0 = b.add(x0, x1)?;
            let left = b.shift_left(x1, constant(rotation)?)?;
            let right = b.shift_right_logical(x1, constant(32 - rotation)?)?;
            x1 = b.xor(b.or(left, right)?, x0)?;
        }
        x0 = b.add(x0, schedule[(group + 1) % 3])?;
        x1 = b.add(b.add(x1, schedule[(group + 2) % 3])?, constant(group as u32 + 1)?)?;
    }
    Ok([x0, x1])
}
