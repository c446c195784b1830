//! What a matmul kernel is asked to do: validated sizes, types, memory layout and epilogue.

use pagoda_ir::{Element, TensorType};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Invalid, MAX_ELEMENTS, ensure, ensure_product},
    named::{Argument, Arguments, Named},
    problem::{self, Specification},
};

const SUBJECT: &str = "matmul problem";

/// How the activations, the weight and the output lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Layout {
    /// `x [m, k]`, `w [k, n]`, output `[m, n]`.
    RowMajor,
    /// `x [m, k]`, `w [n, k]` as Hugging Face stores it, output `[m, n]`.
    WeightTransposed,
    /// `w [n, k]` as Hugging Face stores it, `x [k, m]`, output `[n, m]`: feature-major activations. The fastest one for
    /// a few rows on XLA's CPU, and the one that needs no transposed copy of a weight.
    FeatureMajor,
}

/// What happens to a column pair or to single values before they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `silu(gate) * up`: the weight has `2n` output features, gates before ups, and `n` are left.
    SiluGate,
}

/// What is fused behind the product: `activation(x w + bias) + residual`, in f32, then one rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct Epilogue {
    /// Add a bias per output feature of the weight, of the input type.
    #[cfg_attr(feature = "cli", arg(long))]
    pub bias: bool,
    /// w has 2n output features, gates before ups: out = silu(gate) * up. n is a multiple of 128 (row-major) or 8.
    #[cfg_attr(feature = "cli", arg(
        long = "silu-gate",
        action = clap::ArgAction::SetTrue,
        value_parser = crate::cli::either(Activation::SiluGate, Activation::Identity),
    ))]
    pub activation: Activation,
    /// Add a residual of the output's type and shape.
    #[cfg_attr(feature = "cli", arg(long))]
    pub residual: bool,
}

impl Epilogue {
    /// No epilogue.
    pub const NONE: Self = Self { bias: false, activation: Activation::Identity, residual: false };
}

/// The description of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct Spec {
    /// Rows of x and of the output.
    #[cfg_attr(feature = "cli", arg(long))]
    pub m: usize,
    /// Features that are summed over.
    #[cfg_attr(feature = "cli", arg(long))]
    pub k: usize,
    /// Output features (after the activation).
    #[cfg_attr(feature = "cli", arg(long))]
    pub n: usize,
    /// Type of x, w and bias. Sums are f32.
    #[cfg_attr(feature = "cli", arg(long = "dtype", value_parser = crate::cli::float(), default_value = "bf16"))]
    pub input: Element,
    /// Type of the output and of the residual [default: that of x].
    #[cfg_attr(feature = "cli", arg(
        long = "out-dtype",
        value_parser = crate::cli::float(),
        default_value_if("input", "f32", "f32"),
        default_value = "bf16",
        hide_default_value = true,
    ))]
    pub output: Element,
    /// How x, w and the output lie in memory.
    #[cfg_attr(feature = "cli", arg(long, value_enum, default_value_t = Layout::RowMajor))]
    pub layout: Layout,
    /// What is fused behind the product.
    #[cfg_attr(feature = "cli", command(flatten))]
    pub epilogue: Epilogue,
    /// Layers whose weights (and biases) are stacked in w (and bias), one after another; with several, the scalar `layer`
    /// says whose the product is of.
    #[cfg_attr(feature = "cli", arg(long, default_value_t = 1))]
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub layers: usize,
}

const fn one() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's form")]
const fn is_one(layers: &usize) -> bool {
    *layers == 1
}

impl Spec {
    /// A row-major product of sizes `m`, `k` and `n`, all of one type, with nothing fused.
    pub const fn new([m, k, n]: [usize; 3], element: Element) -> Self {
        Self { m, k, n, input: element, output: element, layout: Layout::RowMajor, epilogue: Epilogue::NONE, layers: 1 }
    }
}

impl Specification for Spec {
    fn validate(&self) -> Result<(), Invalid> {
        for (key, size) in [("m", self.m), ("k", self.k), ("n", self.n), ("layers", self.layers)] {
            ensure(size > 0, SUBJECT, key, size, || "is below 1".into(), "give at least 1")?;
            let limit = || format!("is beyond {}", i32::MAX / 2);
            ensure(size <= i32::MAX as usize / 2, SUBJECT, key, size, limit, "split the product")?;
        }
        for (key, sides) in [
            ("m * k", &[self.m, self.k][..]),
            ("layers * k * n", &[self.layers, self.k, self.n]),
            ("m * n", &[self.m, self.n]),
        ] {
            ensure_product(SUBJECT, key, sides, MAX_ELEMENTS)?;
        }
        for (key, element) in [("input", self.input), ("output", self.output)] {
            let float = matches!(element, Element::F32 | Element::Bf16);
            let fix = "convert it to one of them";
            ensure(float, SUBJECT, key, element, || "is neither f32 nor bf16".into(), fix)?;
        }
        Ok(())
    }
}

/// A valid matmul problem.
pub type Problem = problem::Problem<Spec>;

impl Problem {
    /// Output features of the weight: `n`, or `2n` for gates and ups.
    pub fn weight_columns(&self) -> usize {
        match self.epilogue.activation {
            Activation::Identity => self.n,
            Activation::SiluGate => 2 * self.n,
        }
    }

    /// `dims` of one layer, or of the stack of all.
    fn stack(&self, dims: &[usize]) -> Vec<usize> {
        (self.layers > 1).then_some(self.layers).into_iter().chain(dims.iter().copied()).collect()
    }

    /// The output's type.
    pub fn output_type(&self) -> TensorType {
        let dims = if self.layout == Layout::FeatureMajor { [self.n, self.m] } else { [self.m, self.n] };
        TensorType::new(self.output, &dims)
    }

    /// `x`, `w`, and as the epilogue says the bias `[weight columns]` and the residual. With several layers `w` and the bias
    /// are stacks, `[layers, ...]`, and the scalar `layer` comes last.
    pub fn arguments(&self) -> Arguments {
        let (m, k, columns) = (self.m, self.k, self.weight_columns());
        let (x, w) = match self.layout {
            Layout::RowMajor => ([m, k], [k, columns]),
            Layout::WeightTransposed => ([m, k], [columns, k]),
            Layout::FeatureMajor => ([k, m], [columns, k]),
        };
        Arguments::new([
            Argument::input("x", TensorType::new(self.input, &x)),
            Argument::input("w", TensorType::new(self.input, &self.stack(&w))),
            Argument::input("bias", TensorType::new(self.input, &self.stack(&[columns]))).when(self.epilogue.bias),
            Argument::input("residual", self.output_type()).when(self.epilogue.residual),
            Argument::prefetch("layer", TensorType::scalar(Element::I32)).when(self.layers > 1),
        ])
    }

    /// The output.
    pub fn results(&self) -> Named<TensorType> {
        [("out", self.output_type())].into_iter().collect()
    }
}
