//! What an RMSNorm kernel is asked to do: validated sizes, type, epsilon, and whether a residual is added first.

use pagoda_ir::{Element, TensorType, mosaic::tiling::LANES};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Invalid, MAX_ELEMENTS, ensure, ensure_product},
    named::{Argument, Arguments, Named},
    problem::{self, Specification},
};

const SUBJECT: &str = "rms_norm problem";

/// The description of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct Spec {
    /// Rows of x: tokens.
    #[cfg_attr(feature = "cli", arg(long))]
    pub rows: usize,
    /// Features of a row; a multiple of 128.
    #[cfg_attr(feature = "cli", arg(long))]
    pub hidden: usize,
    /// Type of every array. The arithmetic is f32.
    #[cfg_attr(feature = "cli", arg(long = "dtype", value_parser = crate::cli::float(), default_value = "bf16"))]
    pub element: Element,
    /// Added to the mean of the squares.
    #[cfg_attr(feature = "cli", arg(long, default_value_t = 1e-5))]
    pub epsilon: f64,
    /// Add a residual to x first, and return the sum too.
    #[cfg_attr(feature = "cli", arg(long))]
    pub residual: bool,
}

impl Specification for Spec {
    fn validate(&self) -> Result<(), Invalid> {
        for (key, size) in [("rows", self.rows), ("hidden", self.hidden)] {
            ensure(size > 0, SUBJECT, key, size, || "is below 1".into(), "give at least 1")?;
            let limit = || format!("is beyond {}", i32::MAX / 2);
            ensure(size <= i32::MAX as usize / 2, SUBJECT, key, size, limit, "split the rows")?;
        }
        // Whole registers, so that no lane needs a mask.
        let whole = self.hidden.is_multiple_of(LANES);
        let limit = || format!("is not a multiple of {LANES}");
        ensure(whole, SUBJECT, "hidden", self.hidden, limit, "pad x and the weight with zeros, and scale the weight")?;
        ensure_product(SUBJECT, "rows * hidden", &[self.rows, self.hidden], MAX_ELEMENTS)?;
        let float = matches!(self.element, Element::F32 | Element::Bf16);
        let limit = || "is neither f32 nor bf16".into();
        ensure(float, SUBJECT, "element", self.element, limit, "convert it to one of them")?;
        // The root of a row of zeros is that of epsilon, in f32.
        let normal = self.epsilon >= f64::from(f32::MIN_POSITIVE) && self.epsilon <= f64::from(f32::MAX);
        let limit = || "is not a positive normal f32".into();
        ensure(normal, SUBJECT, "epsilon", self.epsilon, limit, "give e.g. 1e-5")
    }
}

/// A valid RMSNorm problem.
pub type Problem = problem::Problem<Spec>;

impl Problem {
    /// The type of x, of the residual and of the results.
    pub fn rows_type(&self) -> TensorType {
        TensorType::new(self.element, &[self.rows, self.hidden])
    }

    /// `x`, the residual if there is one, `weight [hidden]`.
    pub fn arguments(&self) -> Arguments {
        Arguments::new([
            Argument::input("x", self.rows_type()),
            Argument::input("residual", self.rows_type()).when(self.residual),
            Argument::input("weight", TensorType::new(self.element, &[self.hidden])),
        ])
    }

    /// The normed rows, and with a residual the sum.
    pub fn results(&self) -> Named<TensorType> {
        let sum = self.residual.then(|| ("sum", self.rows_type()));
        [("out", self.rows_type())].into_iter().chain(sum).collect()
    }
}
