//! What a grouped matmul is asked to do: validated sizes, types, layout of the weights, and what follows the product.

use pagoda_ir::{Element, TensorType, mosaic::tiling::LANES};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Invalid, MAX_ELEMENTS, ensure, ensure_product},
    named::{Argument, Arguments, Named},
    problem::{self, Specification},
};

const SUBJECT: &str = "grouped_matmul problem";

/// Rows that copies of activations take at least: a packed tile of bf16, in VMEM and in every generation's HBM.
pub const BAND: usize = 16;

/// How the weight of an expert lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Layout {
    /// `[k, n]`.
    RowMajor,
    /// `[n, k]`, as Hugging Face stores a linear layer.
    WeightTransposed,
}

/// What becomes of the product, in f32, before it is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `silu(gate) * up`: the weight has `2n` output features, gates before ups, and `n` are left.
    SiluGate,
    /// `gate * sigmoid(1.702 gate) * (up + 1)` with gates up to 7 and ups from -7 to 7: gpt-oss.
    ClampedSwiglu,
}

impl Activation {
    /// The factor inside the sigmoid of [`Activation::ClampedSwiglu`].
    pub const ALPHA: f64 = 1.702;
    /// The bound of its gates and ups.
    pub const LIMIT: f64 = 7.0;

    /// Whether the weight has gates and ups.
    pub const fn is_gated(self) -> bool {
        !matches!(self, Self::Identity)
    }
}

/// The description of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct Spec {
    /// Rows of x and of the output, sorted by expert.
    #[cfg_attr(feature = "cli", arg(long))]
    pub m: usize,
    /// Features that are summed over.
    #[cfg_attr(feature = "cli", arg(long))]
    pub k: usize,
    /// Output features (after the activation).
    #[cfg_attr(feature = "cli", arg(long))]
    pub n: usize,
    /// Experts: groups of rows, each with a weight of its own.
    #[cfg_attr(feature = "cli", arg(long))]
    pub experts: usize,
    /// Type of x, w and bias. Sums are f32.
    #[cfg_attr(feature = "cli", arg(long = "dtype", value_parser = crate::cli::float(), default_value = "bf16"))]
    pub input: Element,
    /// Type of the output [default: that of x].
    #[cfg_attr(feature = "cli", arg(
        long = "out-dtype",
        value_parser = crate::cli::float(),
        default_value_if("input", "f32", "f32"),
        default_value = "bf16",
        hide_default_value = true,
    ))]
    pub output: Element,
    /// How an expert's weight lies in memory.
    #[cfg_attr(feature = "cli", arg(long, value_enum, default_value_t = Layout::RowMajor))]
    pub layout: Layout,
    /// What becomes of the product.
    #[cfg_attr(feature = "cli", arg(long, value_enum, default_value_t = Activation::Identity))]
    pub activation: Activation,
    /// Add a bias per expert and output feature of the weight, of the input type.
    #[cfg_attr(feature = "cli", arg(long))]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bias: bool,
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
    /// A product of `m` rows with row-major weights `[experts, k, n]`, all of one type, with nothing behind it.
    pub const fn new([m, k, n]: [usize; 3], experts: usize, element: Element) -> Self {
        let (layout, activation) = (Layout::RowMajor, Activation::Identity);
        Self { m, k, n, experts, input: element, output: element, layout, activation, bias: false, layers: 1 }
    }
}

impl Specification for Spec {
    fn validate(&self) -> Result<(), Invalid> {
        let sizes = [("m", self.m), ("k", self.k), ("n", self.n), ("experts", self.experts), ("layers", self.layers)];
        for (key, size) in sizes {
            ensure(size > 0, SUBJECT, key, size, || "is below 1".into(), "give at least 1")?;
            let limit = || format!("is beyond {}", i32::MAX / 4);
            ensure(size <= i32::MAX as usize / 4, SUBJECT, key, size, limit, "split the product")?;
        }
        let limit = || format!("is beyond the {MOST_EXPERTS} whose sizes scalar memory holds");
        ensure(self.experts <= MOST_EXPERTS, SUBJECT, "experts", self.experts, limit, "share them out")?;
        ensure_product(SUBJECT, "layers * experts", &[self.layers, self.experts], i32::MAX as usize)?;
        for (key, sides) in [
            ("m * k", &[self.m, self.k][..]),
            ("layers * experts * k * n", &[self.layers, self.experts, self.k, self.n]),
            ("m * n", &[self.m, self.n]),
        ] {
            ensure_product(SUBJECT, key, sides, MAX_ELEMENTS)?;
        }
        for (key, element) in [("input", self.input), ("output", self.output)] {
            let float = matches!(element, Element::F32 | Element::Bf16);
            let fix = "convert it to one of them";
            ensure(float, SUBJECT, key, element, || "is neither f32 nor bf16".into(), fix)?;
        }
        // Ups begin where a copy may begin, so that no shift is needed.
        let (unit, fix) = match self.layout {
            Layout::RowMajor => (LANES, "pad gates and ups with zeros, or lay the weights out transposed"),
            Layout::WeightTransposed => (BAND, "pad gates and ups with zeros"),
        };
        let aligned = !self.activation.is_gated() || self.n.is_multiple_of(unit);
        let limit = || format!("gates are not a multiple of {unit}, so that no copy could begin at the first up");
        ensure(aligned, SUBJECT, "n", self.n, limit, fix)
    }
}

/// Sizes and the list of a launch's work are in scalar memory, of which there is 1 MiB.
const MOST_EXPERTS: usize = 4096;

/// A valid grouped matmul problem.
pub type Problem = problem::Problem<Spec>;

impl Problem {
    /// Products of a launch: two where there are gates and ups.
    pub fn products(&self) -> usize {
        if self.activation.is_gated() { 2 } else { 1 }
    }

    /// Output features of an expert's weight: `n`, or `2n` for gates and ups.
    pub fn weight_columns(&self) -> usize {
        self.products() * self.n
    }

    /// Bytes of one expert's weight and bias.
    pub fn expert_bytes(&self) -> usize {
        (self.k + usize::from(self.bias)) * self.weight_columns() * self.input.bytes()
    }

    /// The output's type.
    pub fn output_type(&self) -> TensorType {
        TensorType::new(self.output, &[self.m, self.n])
    }

    /// `dims` of one layer, or of the stack of all.
    fn stack(&self, dims: &[usize]) -> Vec<usize> {
        (self.layers > 1).then_some(self.layers).into_iter().chain(dims.iter().copied()).collect()
    }

    /// `group_sizes i32 [experts]`: the rows of each expert, whose sum is at most `m`. `x [m, k]`, `w [experts, k, columns]` or
    /// `[experts, columns, k]`, as the problem says the bias `[experts, columns]`. With several layers `w` and the bias are
    /// stacks, `[layers, ...]`, and the scalar `layer` comes last.
    pub fn arguments(&self) -> Arguments {
        let (m, k, experts, columns) = (self.m, self.k, self.experts, self.weight_columns());
        let w = match self.layout {
            Layout::RowMajor => [experts, k, columns],
            Layout::WeightTransposed => [experts, columns, k],
        };
        Arguments::new([
            Argument::prefetch("group_sizes", TensorType::new(Element::I32, &[experts])),
            Argument::input("x", TensorType::new(self.input, &[m, k])),
            Argument::input("w", TensorType::new(self.input, &self.stack(&w))),
            Argument::input("bias", TensorType::new(self.input, &self.stack(&[experts, columns]))).when(self.bias),
            Argument::prefetch("layer", TensorType::scalar(Element::I32)).when(self.layers > 1),
        ])
    }

    /// The output.
    pub fn results(&self) -> Named<TensorType> {
        [("out", self.output_type())].into_iter().collect()
    }
}
