//! What becomes of the results of `pagoda run`: written as files, and held against what was expected.

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use pagoda_ir::{HostTensor, TensorType};
use serde::Serialize;

use super::arrays;
use super::explain::Explanation;
use super::operands::{Name, listed, position, split};
use crate::error::{Error, Result};

/// What is wanted of results.
#[derive(Debug, Args)]
pub(super) struct ResultArgs {
    /// Write every result into this folder, NAME.npy; bf16 and narrower floats as float32, which loses nothing. With several
    /// kernels of their own operands, KERNEL.NAME.npy.
    #[arg(id = "output_folder", long = "output", global = true, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Hold a result, by name or position, against an array: succeeds when no |got - expected| is more than
    /// atol + rtol * |expected|; NaN matches NaN. Repeatable.
    #[arg(long, global = true, value_name = "NAME=FILE.npy")]
    expect: Vec<String>,
    /// The relative tolerance of --expect.
    #[arg(
        long,
        global = true,
        value_name = "R",
        default_value_t = 0.0,
        allow_negative_numbers = true,
        requires = "expect"
    )]
    rtol: f64,
    /// The absolute tolerance of --expect.
    #[arg(
        long,
        global = true,
        value_name = "A",
        default_value_t = 0.0,
        allow_negative_numbers = true,
        requires = "expect"
    )]
    atol: f64,
}

/// The outcome of one `--expect`.
#[derive(Debug, Serialize)]
pub(super) struct Expectation {
    /// The result's name.
    pub(super) output: String,
    /// Which result it is.
    #[serde(skip)]
    pub(super) position: usize,
    /// Whether every element is within the tolerances.
    pub(super) agrees: bool,
    rtol: f64,
    atol: f64,
    /// How many elements there are.
    elements: usize,
    /// How many of them are off.
    mismatches: usize,
    /// The first that is off, and the one that is most off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) first: Option<Element>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worst: Option<Element>,
    /// Who wrote the first that is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) explanation: Option<Explanation>,
}

/// An element of a result.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Element {
    pub(super) index: Vec<usize>,
    /// As text, so that NaN and infinities are in JSON too.
    got: String,
    expected: String,
    #[serde(skip)]
    pub(super) offset: usize,
}

impl fmt::Display for Expectation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { output, rtol, atol, elements, mismatches, first, worst, .. } = self;
        let (Some(first), Some(worst)) = (first, worst) else {
            return write!(f, "{output}: all {elements} values are within rtol {rtol}, atol {atol}");
        };
        let Element { index, got, expected, .. } = first;
        write!(f, "{output}{index:?} is {got}, expected {expected} (rtol {rtol}, atol {atol}); ")?;
        write!(f, "{mismatches} of {elements} values are off")?;
        if worst.index != first.index {
            write!(f, ", the most {output}{:?}: {}, expected {}", worst.index, worst.got, worst.expected)?;
        }
        Ok(())
    }
}

impl ResultArgs {
    /// # Errors
    /// When one cannot be meant.
    pub(super) fn check(&self) -> Result<()> {
        for (key, value) in [("rtol", self.rtol), ("atol", self.atol)] {
            if value.is_nan() || value < 0.0 {
                return Err(Error::setting(key, value, "is not a tolerance", "give 0 or a positive number"));
            }
        }
        self.expected().map(drop)
    }

    fn expected(&self) -> Result<Vec<(&str, &str)>> {
        let fix = "write e.g. --expect out=out.npy";
        let unreadable = |text: &String| Error::setting("expect", text, "is not NAME=FILE.npy", fix);
        self.expect.iter().map(|text| split(text).ok_or_else(|| unreadable(text))).collect()
    }

    /// Writes the results, if that is wanted: to files that begin with `prefix`.
    ///
    /// # Errors
    /// When the folder or a file cannot be written.
    pub(super) fn write(&self, prefix: &str, names: &[Name], results: &[HostTensor]) -> Result<Vec<PathBuf>> {
        let Some(folder) = &self.output else { return Ok(vec![]) };
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let in_file_names = |c: char| if c.is_ascii_alphanumeric() || "_-.".contains(c) { c } else { '_' };
        let files = names.iter().zip(results).map(|(name, array)| {
            let name: String = format!("{prefix}{}", name.name).chars().map(in_file_names).collect();
            let path = folder.join(format!("{name}.npy"));
            arrays::write(&path, array).map(|()| path)
        });
        files.collect()
    }

    /// Holds results against what is expected of them.
    ///
    /// # Errors
    /// When a file cannot be read, is not of the result's type, or its name names no result.
    pub(super) fn compare(&self, names: &[Name], results: &[HostTensor]) -> Result<Vec<Expectation>> {
        let compared = self.expected()?.into_iter().map(|(key, path)| {
            let types =
                || results.iter().map(|array| TensorType::new(array.element(), array.dims())).collect::<Vec<_>>();
            let at = position(names, key).filter(|&at| at < results.len()).ok_or_else(|| {
                let fix = format!("use one of: {}", listed(names, &types()));
                Error::setting("expect", key, "names no result", fix)
            })?;
            let expected = arrays::read_as_saved(path.as_ref(), &types()[at])?;
            Ok(Expectation { position: at, ..self.expectation(&names[at].name, &results[at], &expected) })
        });
        compared.collect()
    }

    fn expectation(&self, output: &str, got: &HostTensor, expected: &HostTensor) -> Expectation {
        let (values, wanted) = (got.to_f64(), expected.to_f64());
        // How far beyond the tolerance; more than 0 is off.
        let excess = |got: f64, expected: f64| match (got.is_nan(), expected.is_nan()) {
            (true, true) => 0.0,
            (false, false) if got == expected => 0.0,
            (false, false) if got.is_finite() && expected.is_finite() => {
                (got - expected).abs() - (self.atol + self.rtol * expected.abs())
            }
            _ => f64::INFINITY,
        };
        let off: Vec<(usize, f64)> = (values.iter().zip(&wanted).map(|(&got, &expected)| excess(got, expected)))
            .enumerate()
            .filter(|&(_, excess)| excess > 0.0)
            .collect();
        let element = |&(offset, _): &(usize, f64)| {
            let mut rest = offset;
            let mut index: Vec<usize> = (got.dims().iter().rev())
                .map(|&size| {
                    let at = rest % size;
                    rest /= size;
                    at
                })
                .collect();
            index.reverse();
            Element { index, got: values[offset].to_string(), expected: wanted[offset].to_string(), offset }
        };
        Expectation {
            output: output.to_owned(),
            position: 0,
            agrees: off.is_empty(),
            rtol: self.rtol,
            atol: self.atol,
            elements: values.len(),
            mismatches: off.len(),
            first: off.first().map(element),
            worst: off.iter().reduce(|worst, one| if one.1 > worst.1 { one } else { worst }).map(element),
            explanation: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(got: &[f32], expected: &[f32], rtol: f64, atol: f64) -> Expectation {
        let args = ResultArgs { output: None, expect: vec![], rtol, atol };
        args.expectation("y", &HostTensor::new(&[2, 2], got), &HostTensor::new(&[2, 2], expected))
    }

    #[test]
    fn the_first_and_the_worst_are_named() {
        let nan = f32::NAN;
        assert!(compared(&[1.0, nan, 0.0, f32::INFINITY], &[1.0, nan, -0.0, f32::INFINITY], 0.0, 0.0).agrees);
        assert!(compared(&[1.5, 0.0, 0.0, 0.0], &[1.0, 0.0, 0.0, 0.0], 0.5, 0.0).agrees);
        assert!(compared(&[0.0, 0.25, 0.0, 0.0], &[0.0; 4], 0.5, 0.25).agrees);
        let off = compared(&[0.0, 1.0, 9.0, nan], &[0.0; 4], 0.0, 0.5);
        assert_eq!(
            off.to_string(),
            "y[0, 1] is 1, expected 0 (rtol 0, atol 0.5); 3 of 4 values are off, the most y[1, 1]: NaN, expected 0"
        );
    }
}
