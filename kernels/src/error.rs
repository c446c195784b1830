//! What is wrong with a problem or a batch.

use std::fmt::Display;

/// A value that makes a problem or a batch invalid: which one, what it was, its limit, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{subject}: {key} = {value} {limit}: {fix}")]
pub struct Invalid {
    /// What is invalid: `rpa problem`, `rpa batch`, `matmul problem`.
    pub subject: &'static str,
    /// The offending key, with its index where there is one: `kv_lens[3]`.
    pub key: String,
    /// Its value.
    pub value: String,
    /// The limit that it breaks.
    pub limit: String,
    /// How to repair it.
    pub fix: String,
}

/// `Ok` when `holds`, else the [`Invalid`] made of the rest.
///
/// # Errors
/// When it does not hold.
pub fn ensure(
    holds: bool,
    subject: &'static str,
    key: impl Display,
    value: impl Display,
    limit: impl FnOnce() -> String,
    fix: &str,
) -> Result<(), Invalid> {
    if holds {
        return Ok(());
    }
    Err(Invalid { subject, key: key.to_string(), value: value.to_string(), limit: limit(), fix: fix.to_owned() })
}

/// More elements than any array of a problem has (a terabyte of bytes): sums of sizes stay far from overflow.
pub const MAX_ELEMENTS: usize = 1 << 40;

/// `Ok` when the product of `factors` is at most `most`.
///
/// # Errors
/// When it is more, or does not fit in a `usize`.
pub fn ensure_product(subject: &'static str, key: &str, factors: &[usize], most: usize) -> Result<(), Invalid> {
    let product = factors.iter().try_fold(1_usize, |product, &factor| product.checked_mul(factor));
    let value = product.map_or_else(|| format!("{factors:?} multiplied"), |product| product.to_string());
    let fits = product.is_some_and(|product| product <= most);
    ensure(fits, subject, key, value, || format!("is beyond {most}"), "shrink one of the factors")
}
