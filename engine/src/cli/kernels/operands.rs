//! The operands of `pagoda run`: given as files, drawn from a seed, or refused.

use std::path::PathBuf;

use pagoda_ir::{Element, HostTensor, TensorType};
use pagoda_kernels::random::Random;
use pagoda_kernels::vmem::Bytes;

use super::{arrays, problem};
use crate::error::{Error, Result};

/// The most that operands and results may take: they are all held in memory.
const MAX_ARRAYS: Bytes = Bytes::gib(8);

/// The arrays of `--input`, by name.
pub(super) struct Given {
    arrays: Vec<(String, PathBuf, bool)>,
    /// Names that were asked for, for the error message.
    known: Vec<String>,
}

impl Given {
    pub(super) fn parse(inputs: &[String]) -> Result<Self> {
        let mut arrays: Vec<(String, PathBuf, bool)> = Vec::new();
        for input in inputs {
            let (name, path) = input
                .split_once('=')
                .filter(|(name, path)| !name.is_empty() && !path.is_empty())
                .ok_or_else(|| Error::setting("input", input, "is not NAME=FILE.npy", "write e.g. --input q=q.npy"))?;
            if arrays.iter().any(|(known, ..)| known == name) {
                return Err(Error::setting("input", name, "is given twice", "give each operand once"));
            }
            arrays.push((name.to_owned(), path.into(), false));
        }
        Ok(Self { arrays, known: vec![] })
    }

    pub(super) fn take(&mut self, name: &str, ty: &TensorType) -> Result<Option<HostTensor>> {
        self.known.push(format!("{name} {ty}"));
        let Some((_, path, used)) = self.arrays.iter_mut().find(|(known, ..)| known == name) else { return Ok(None) };
        *used = true;
        arrays::read(path, ty).map(Some)
    }

    /// An input that names no operand is a mistake.
    pub(super) fn all_used(&self) -> Result<()> {
        match self.arrays.iter().find(|(.., used)| !used) {
            None => Ok(()),
            Some((name, ..)) => {
                let fix = format!("use one of: {}", self.known.join(", "));
                Err(Error::setting("input", name, "names no operand", fix))
            }
        }
    }
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
pub(super) fn operands(given: &mut Given, operands: &[(String, TensorType)], seed: u64) -> Result<Vec<HostTensor>> {
    ensure_fits(operands.iter().map(|(_, ty)| ty))?;
    let recognised = problem::recognised(operands, seed);
    let mut random = Random::new(seed);
    let mut arrays = Vec::new();
    for (name, ty) in operands {
        let drawn = recognised.as_ref().and_then(|arrays| arrays.get(name)).cloned();
        arrays.push(match (given.take(name, ty)?, drawn) {
            (Some(array), _) | (None, Some(array)) => array,
            // Of a stack of layers, the first one.
            (None, None) if recognised.is_some() && ty.element == Element::I32 => {
                HostTensor::zeros(ty.element, &ty.dims)
            }
            (None, None) if matches!(ty.element, Element::F32 | Element::Bf16) => random.tensor(ty),
            (None, None) => {
                let fix = format!("give it with --input {name}=FILE.npy");
                return Err(Error::setting(name, ty, "cannot be drawn at random", fix));
            }
        });
    }
    Ok(arrays)
}
