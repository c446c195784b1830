//! What a matmul kernel is asked to do: validated sizes, types, memory layout and epilogue.

use pagoda_ir::{Element, TensorType, mosaic::tiling::LANES};
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
    /// `gelu(gate) * up`, likewise, with GELU's approximation by tanh: `gelu(x) = x sigmoid(2 GELU_SCALE (x + GELU_CUBE x^3))`,
    /// which is `x (1 + tanh(GELU_SCALE (x + GELU_CUBE x^3))) / 2`.
    GeluGate,
}

impl Activation {
    /// `sqrt(2 / pi)`, of GELU's approximation.
    pub const GELU_SCALE: f64 = 0.797_884_560_802_865_4;
    /// The cube's factor in GELU's approximation.
    pub const GELU_CUBE: f64 = 0.044_715;

    /// Whether it takes gates and ups.
    pub const fn is_gated(self) -> bool {
        !matches!(self, Self::Identity)
    }

    /// Its name among options; `None` for none.
    pub const fn name(self) -> Option<&'static str> {
        match self {
            Self::Identity => None,
            Self::SiluGate => Some("silu-gate"),
            Self::GeluGate => Some("gelu-gate"),
        }
    }
}

#[cfg(feature = "cli")]
impl clap::Args for Activation {
    fn augment_args(command: clap::Command) -> clap::Command {
        let flag = |name: &'static str, help: &'static str| {
            clap::Arg::new(name).long(name).action(clap::ArgAction::SetTrue).help(help)
        };
        let silu = flag("silu-gate", "w has 2n output features, gates before ups: out = silu(gate) * up");
        let gelu = flag("gelu-gate", "As --silu-gate: out = gelu(gate) * up, by the approximation with tanh");
        command.arg(silu).arg(gelu.conflicts_with("silu-gate"))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

#[cfg(feature = "cli")]
impl clap::FromArgMatches for Activation {
    fn from_arg_matches(matches: &clap::ArgMatches) -> Result<Self, clap::Error> {
        let gates = [Self::SiluGate, Self::GeluGate];
        let given = gates.into_iter().find(|gate| gate.name().is_some_and(|name| matches.get_flag(name)));
        Ok(given.unwrap_or(Self::Identity))
    }

    fn update_from_arg_matches(&mut self, matches: &clap::ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// What is fused behind the product: `activation(x w + bias) + residual`, in f32, then one rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct Epilogue {
    /// Add a bias per output feature of the weight, of the input type.
    #[cfg_attr(feature = "cli", arg(long))]
    pub bias: bool,
    /// What becomes of gates and ups.
    #[cfg_attr(feature = "cli", command(flatten))]
    pub activation: Activation,
    /// Add a residual of the output's type and shape.
    #[cfg_attr(feature = "cli", arg(long))]
    pub residual: bool,
}

impl Epilogue {
    /// No epilogue.
    pub const NONE: Self = Self { bias: false, activation: Activation::Identity, residual: false };
}

/// A weight of 8-bit elements, each standing for its value times a scale.
///
/// The scale is one per output feature of the weight, or one per output feature and *group* of that many consecutive
/// features of k. Formats: `int8` and `float-quantized` of compressed-tensors, fp8 of vLLM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
pub struct Quantized {
    /// Type of w, if it is quantized: w_scale holds a scale per output feature, or per output feature and group.
    #[cfg_attr(feature = "cli", arg(long = "weight-dtype", value_parser = elements(), required = false))]
    pub weight: Element,
    /// Consecutive features of k that share a scale of a quantized w: a multiple of 128, or 8 to 64 [default: all].
    #[cfg_attr(feature = "cli", arg(long = "group", requires = "weight"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<usize>,
    /// x is of the quantized weight's type too, with a scale per row in x_scale.
    #[cfg_attr(feature = "cli", arg(long = "quantized-x", requires = "weight"))]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub activations: bool,
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
    /// Type of x, w (unless it is quantized) and bias. Sums are f32.
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
    /// How w, and perhaps x, are quantized.
    #[cfg_attr(feature = "cli", command(flatten))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantized: Option<Quantized>,
}

/// Reads a type of quantized weights.
#[cfg(feature = "cli")]
fn elements() -> impl clap::builder::TypedValueParser<Value = Element> {
    use clap::builder::{PossibleValuesParser, TypedValueParser};
    const NAMES: [&str; Quantized::ELEMENTS.len()] = ["i8", "f8e4m3fn", "f8e5m2"];
    PossibleValuesParser::new(NAMES).map(|name| {
        let at = NAMES.iter().position(|&known| known == name).expect("one of the possible values");
        Quantized::ELEMENTS[at]
    })
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
        let (layout, epilogue) = (Layout::RowMajor, Epilogue::NONE);
        Self { m, k, n, input: element, output: element, layout, epilogue, layers: 1, quantized: None }
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
        self.quantized.map_or(Ok(()), |quantized| quantized.validate(self.k))
    }
}

/// Most features that products of i8 may be summed over in i32: so many times 128^2 is below 2^31.
const MOST_I8: usize = (1 << 17) - 1;

impl Quantized {
    /// Types that a quantized weight may have.
    pub const ELEMENTS: [Element; 3] = [Element::I8, Element::F8E4M3Fn, Element::F8E5M2];

    fn validate(self, k: usize) -> Result<(), Invalid> {
        let Self { weight, group, activations } = self;
        let limit = || "is not a type of quantized weights".to_owned();
        let fix = "use i8, f8e4m3fn or f8e5m2";
        ensure(Self::ELEMENTS.contains(&weight), SUBJECT, "quantized.weight", weight, limit, fix)?;
        if let Some(group) = group {
            let whole = group.is_multiple_of(LANES) || [8, 16, 32, 64].contains(&group);
            let limit = || format!("is neither a multiple of {LANES} nor 8, 16, 32 or 64");
            ensure(group > 0 && whole, SUBJECT, "quantized.group", group, limit, "use a scale per output feature")?;
            let limit = || format!("is beyond k = {k}");
            ensure(group <= k, SUBJECT, "quantized.group", group, limit, "use a scale per output feature")?;
        }
        let summed = group.unwrap_or(k);
        let limit = || format!("is beyond {MOST_I8} products of i8, which i32 holds");
        let fits = !activations || weight.is_float() || summed <= MOST_I8;
        ensure(fits, SUBJECT, "k", summed, limit, "use a group of fewer")
    }
}

/// A valid matmul problem.
pub type Problem = problem::Problem<Spec>;

impl Problem {
    /// Output features of the weight: `n`, or `2n` for gates and ups.
    pub fn weight_columns(&self) -> usize {
        match self.epilogue.activation {
            Activation::Identity => self.n,
            Activation::SiluGate | Activation::GeluGate => 2 * self.n,
        }
    }

    /// The type of w.
    pub fn weight_element(&self) -> Element {
        self.quantized.map_or(self.input, |quantized| quantized.weight)
    }

    /// The type of x.
    pub fn x_element(&self) -> Element {
        self.quantized.filter(|quantized| quantized.activations).map_or(self.input, |quantized| quantized.weight)
    }

    /// Whether x is quantized.
    pub fn quantized_x(&self) -> bool {
        self.quantized.is_some_and(|quantized| quantized.activations)
    }

    /// Features of k that share a scale, where not all of them do.
    pub fn group(&self) -> Option<usize> {
        self.quantized?.group
    }

    /// Scales of an output feature: 1 without groups.
    pub fn groups(&self) -> usize {
        self.group().map_or(1, |group| self.k.div_ceil(group))
    }

    /// Bytes of what a launch reads of weight, scales and bias: of a stack one layer.
    pub fn weight_bytes(&self) -> usize {
        let scales = if self.quantized.is_some() { 4 * self.groups() } else { 0 };
        let bias = if self.epilogue.bias { self.input.bytes() } else { 0 };
        self.weight_columns() * (self.k * self.weight_element().bytes() + scales + bias)
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

    /// `x`, `w`, and as the epilogue says the bias `[weight columns]` and the residual. A quantized `w` has scales f32
    /// `[groups, weight columns]`, feature-major `[weight columns, groups]`, with one group for all of `k` unless the
    /// problem has smaller ones; a quantized `x` has `x_scale f32 [m, 1]`, feature-major `[1, m]`. With several layers `w`,
    /// its scales and the bias are stacks, `[layers, ...]`, and the scalar `layer` comes last.
    pub fn arguments(&self) -> Arguments {
        let (m, k, columns) = (self.m, self.k, self.weight_columns());
        let (x, w) = match self.layout {
            Layout::RowMajor => ([m, k], [k, columns]),
            Layout::WeightTransposed => ([m, k], [columns, k]),
            Layout::FeatureMajor => ([k, m], [columns, k]),
        };
        let (scales, x_scale) = match self.layout {
            Layout::FeatureMajor => ([columns, self.groups()], [1, m]),
            Layout::RowMajor | Layout::WeightTransposed => ([self.groups(), columns], [m, 1]),
        };
        Arguments::new([
            Argument::input("x", TensorType::new(self.x_element(), &x)),
            Argument::input("w", TensorType::new(self.weight_element(), &self.stack(&w))),
            Argument::input("w_scale", TensorType::new(Element::F32, &self.stack(&scales)))
                .when(self.quantized.is_some()),
            Argument::input("x_scale", TensorType::new(Element::F32, &x_scale)).when(self.quantized_x()),
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
