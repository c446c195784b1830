//! The operands of `pagoda run`: given as files, drawn from a seed, or refused.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use pagoda_ir::random::SplitMix64;
use pagoda_ir::{Element, HostTensor, TensorType};
use pagoda_kernels::Arrays;
use pagoda_kernels::random::Random;
use pagoda_kernels::vmem::Bytes;

use super::{arrays, problem};
use crate::error::{Error, Result};

/// The most that operands and results may take: they are all held in memory.
const MAX_ARRAYS: Bytes = Bytes::gib(8);

/// What an operand or a result is called: by its name, by another one, or by its position, counted from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name {
    /// The name that reports and files have.
    pub(super) name: String,
    /// Another name, which counts where it is not another one's first name.
    pub(super) alias: Option<String>,
}

impl Name {
    pub(super) fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), alias: None }
    }
}

/// Which of `names` a key means.
pub(super) fn position(names: &[Name], key: &str) -> Option<usize> {
    let called = names.iter().position(|known| known.name == key);
    let called = called.or_else(|| names.iter().position(|known| known.alias.as_deref() == Some(key)));
    called.or_else(|| key.parse().ok().filter(|&at| at < names.len()))
}

/// `x f32[8,128], y i32[2]`, for an error message.
pub(super) fn listed(names: &[Name], types: &[TensorType]) -> String {
    let one = |(at, (name, ty)): (usize, (&Name, &TensorType))| match &name.alias {
        Some(alias) => format!("{} (or {alias}, {at}) {ty}", name.name),
        None => format!("{} (or {at}) {ty}", name.name),
    };
    names.iter().zip(types).enumerate().map(one).collect::<Vec<_>>().join(", ")
}

/// Where an operand comes from.
#[derive(Clone, Debug)]
enum Source {
    File(PathBuf),
    /// Random integers of the range.
    Integers(Range<i64>),
}

/// The operands of `--input` and `--random-int`, by name or position.
pub(super) struct Given {
    sources: Vec<(String, Source)>,
}

impl Given {
    pub(super) fn parse(inputs: &[String], integers: &[String]) -> Result<Self> {
        let mut sources = Vec::new();
        for input in inputs {
            let (name, path) = split(input)
                .ok_or_else(|| Error::setting("input", input, "is not NAME=FILE.npy", "write e.g. --input q=q.npy"))?;
            sources.push((name.to_owned(), Source::File(path.into())));
        }
        for text in integers {
            let range = split(text).and_then(|(name, range)| {
                let (low, high) = range.split_once("..")?;
                Some((name, low.parse::<i64>().ok()?..high.parse::<i64>().ok()?))
            });
            let (name, range) = range.filter(|(_, range)| range.start < range.end).ok_or_else(|| {
                let fix = "write e.g. --random-int lens=0..17 for 0 to 16";
                Error::setting("random-int", text, "is not NAME=LOW..HIGH with integers LOW < HIGH", fix)
            })?;
            sources.push((name.to_owned(), Source::Integers(range)));
        }
        let mut seen = HashSet::new();
        match sources.iter().find(|(name, _)| !seen.insert(name)) {
            Some((name, _)) => Err(Error::setting("input", name, "is given twice", "give each operand once")),
            None => Ok(Self { sources }),
        }
    }

    /// No operands.
    pub(super) fn nothing() -> Self {
        Self { sources: vec![] }
    }

    /// The file of an operand, one of `names`.
    pub(super) fn file(&self, names: &[Name], name: &Name) -> Option<&Path> {
        let of = |key: &str| position(names, key).is_some_and(|at| names[at] == *name);
        self.sources.iter().find_map(|(key, source)| match source {
            Source::File(path) if of(key) => Some(path.as_path()),
            _ => None,
        })
    }

    /// The names as they were given.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().map(|(name, _)| name.as_str())
    }

    /// The arrays that were given for operands of these names and types; integers are drawn from `seed`.
    ///
    /// # Errors
    /// When one names no operand or is not of its type: what was given and is of no use is a mistake.
    pub(super) fn arrays(&self, names: &[Name], types: &[TensorType], seed: u64) -> Result<Vec<Option<HostTensor>>> {
        let mut arrays: Vec<Option<HostTensor>> = vec![None; names.len()];
        for (key, source) in &self.sources {
            let at = position(names, key).ok_or_else(|| {
                let fix = format!("use one of: {}", listed(names, types));
                Error::setting("input", key, "names no operand", fix)
            })?;
            if arrays[at].is_some() {
                let limit = format!("is given twice: {} is operand {at} too", names[at].name);
                return Err(Error::setting("input", key, limit, "give each operand once"));
            }
            arrays[at] = Some(match source {
                Source::File(path) => arrays::read(path, &types[at])?,
                // Each operand has a sequence of its own, whatever else is drawn.
                Source::Integers(range) => integers(key, &types[at], range, seed.wrapping_add(1 + at as u64))?,
            });
        }
        Ok(arrays)
    }
}

/// `NAME=VALUE`, neither empty.
pub(super) fn split(text: &str) -> Option<(&str, &str)> {
    text.split_once('=').filter(|(name, value)| !name.is_empty() && !value.is_empty())
}

/// Integers of `range`, all as likely, as an array of type `ty`.
fn integers(name: &str, ty: &TensorType, range: &Range<i64>, seed: u64) -> Result<HostTensor> {
    let mut random = SplitMix64::new(seed);
    let span = range.end.abs_diff(range.start);
    let mut next = || range.start.wrapping_add((random.bits() % span) as i64);
    if ty.element.is_float() {
        let values: Vec<f64> = (0..ty.len()).map(|_| next() as f64).collect();
        return Ok(HostTensor::from_f64(ty.element, &ty.dims, &values));
    }
    let bits = if ty.element == Element::Pred { 1 } else { ty.element.bits() as u32 };
    let (low, high) = match ty.element.mlir().starts_with("ui") || ty.element == Element::Pred {
        true => (0, i128::from(u64::MAX >> (64 - bits))),
        false => (-(1_i128 << (bits - 1)), (1_i128 << (bits - 1)) - 1),
    };
    if i128::from(range.start) < low || i128::from(range.end) - 1 > high {
        let (value, limit) =
            (format!("{}..{}", range.start, range.end), format!("is not within {low} to {high} of {ty}"));
        return Err(Error::setting(format!("random-int {name}"), value, limit, "narrow the range"));
    }
    let width = ty.element.bytes();
    let bytes: Vec<u8> = (0..ty.len()).flat_map(|_| next().to_le_bytes().into_iter().take(width)).collect();
    Ok(HostTensor::from_bytes(ty.element, &ty.dims, &bytes))
}

/// Refuses arrays that would not fit in memory.
pub(super) fn ensure_fits<'t>(types: impl IntoIterator<Item = &'t TensorType>) -> Result<()> {
    let bytes = types.into_iter().try_fold(0_u64, |sum, ty| {
        let bytes =
            ty.dims.iter().try_fold(ty.element.bytes() as u64, |product, &size| product.checked_mul(size as u64));
        sum.checked_add(bytes?)
    });
    match bytes {
        Some(bytes) if bytes <= MAX_ARRAYS.0 => Ok(()),
        bytes => {
            let value = bytes.map_or("more than 2^64 bytes".to_owned(), |bytes| Bytes(bytes).to_string());
            let limit = format!("is more than the {MAX_ARRAYS} that a run on the host holds");
            Err(Error::setting("operands and results", value, limit, "run a smaller problem"))
        }
    }
}

/// Operands of a kernel of unknown origin: given ones, the rest drawn from `seed`.
pub(super) fn operands(given: &Given, names: &[Name], types: &[TensorType], seed: u64) -> Result<Vec<HostTensor>> {
    ensure_fits(types)?;
    let with_types = |names: Vec<String>| names.into_iter().zip(types.iter().cloned()).collect::<Vec<_>>();
    let named = with_types(names.iter().map(|name| name.name.clone()).collect());
    let authors = names.iter().map(|name| name.alias.as_ref().unwrap_or(&name.name).clone());
    let authors = with_types(authors.collect());
    let recognised = problem::recognised(&named, seed).or_else(|| problem::recognised(&authors, seed));
    let mut random = Random::new(seed);
    let mut arrays = Vec::new();
    for (((name, ty), (author, _)), given) in named.iter().zip(&authors).zip(given.arrays(names, types, seed)?) {
        let known = |arrays: &Arrays| arrays.get(name).or_else(|| arrays.get(author)).cloned();
        let drawn = recognised.as_ref().and_then(known);
        arrays.push(match (given, drawn) {
            (Some(array), _) | (None, Some(array)) => array,
            // Of a stack of layers, the first one.
            (None, None) if recognised.is_some() && ty.element == Element::I32 => {
                HostTensor::zeros(ty.element, &ty.dims)
            }
            (None, None) if matches!(ty.element, Element::F32 | Element::Bf16) => random.tensor(ty),
            (None, None) if ty.element.is_float() => {
                random.tensor(&TensorType::new(Element::F32, &ty.dims)).converted(ty.element)
            }
            (None, None) => {
                let fix = format!("give it with --input {name}=FILE.npy, or a range with --random-int {name}=0..8");
                return Err(Error::setting(name, ty, "cannot be drawn at random", fix));
            }
        });
    }
    Ok(arrays)
}
