//! What a matmul kernel is asked to do: validated sizes, types, memory layout and epilogue.

use std::ops::Deref;

use pagoda_ir::{Element, TensorType};

use crate::error::{Invalid, MAX_ELEMENTS, ensure, ensure_product};

const SUBJECT: &str = "matmul problem";

/// How the activations, the weight and the output lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `silu(gate) * up`: the weight has `2n` output features, gates before ups, and `n` are left.
    SiluGate,
}

/// What is fused behind the product: `activation(x w + bias) + residual`, in f32, then one rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epilogue {
    /// A bias per output feature of the weight, of the input type.
    pub bias: bool,
    /// The activation.
    pub activation: Activation,
    /// A residual of the output's type.
    pub residual: bool,
}

impl Epilogue {
    /// No epilogue.
    pub const NONE: Self = Self { bias: false, activation: Activation::Identity, residual: false };
}

/// The description of a problem, not validated yet: [`Problem::new`] does that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Spec {
    /// Rows of the activations.
    pub m: usize,
    /// Features that are summed over.
    pub k: usize,
    /// Output features (after the activation).
    pub n: usize,
    /// Type of activations, weight and bias: f32 or bf16. Sums are f32.
    pub input: Element,
    /// Type of the output and of the residual: f32 or bf16.
    pub output: Element,
    /// How the arrays lie in memory.
    pub layout: Layout,
    /// What is fused behind the product.
    pub epilogue: Epilogue,
}

/// A valid matmul problem. Read its fields through [`Spec`], to which it dereferences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem(Spec);

impl Deref for Problem {
    type Target = Spec;

    fn deref(&self) -> &Spec {
        &self.0
    }
}

impl Problem {
    /// Validates `spec`.
    ///
    /// # Errors
    /// The first field that breaks a limit.
    pub fn new(spec: Spec) -> Result<Self, Invalid> {
        for (key, size) in [("m", spec.m), ("k", spec.k), ("n", spec.n)] {
            ensure(size > 0, SUBJECT, key, size, || "is below 1".into(), "give at least 1")?;
            let limit = || format!("is beyond {}", i32::MAX / 2);
            ensure(size <= i32::MAX as usize / 2, SUBJECT, key, size, limit, "split the product")?;
        }
        for (key, sides) in [("m * k", [spec.m, spec.k]), ("k * n", [spec.k, spec.n]), ("m * n", [spec.m, spec.n])] {
            ensure_product(SUBJECT, key, &sides, MAX_ELEMENTS)?;
        }
        for (key, element) in [("input", spec.input), ("output", spec.output)] {
            let float = matches!(element, Element::F32 | Element::Bf16);
            let fix = "convert it to one of them";
            ensure(float, SUBJECT, key, element, || "is neither f32 nor bf16".into(), fix)?;
        }
        Ok(Self(spec))
    }

    /// Output features of the weight: `n`, or `2n` for gates and ups.
    pub fn weight_columns(&self) -> usize {
        match self.epilogue.activation {
            Activation::Identity => self.n,
            Activation::SiluGate => 2 * self.n,
        }
    }

    /// The output's type.
    pub fn output_type(&self) -> TensorType {
        let dims = if self.layout == Layout::FeatureMajor { [self.n, self.m] } else { [self.m, self.n] };
        TensorType::new(self.output, &dims)
    }

    /// The types of the kernel's arguments: `x`, `w`, and as the epilogue says the bias `[weight columns]` and the
    /// residual.
    pub fn argument_types(&self) -> Vec<TensorType> {
        let (m, k, columns) = (self.m, self.k, self.weight_columns());
        let (x, w) = match self.layout {
            Layout::RowMajor => ([m, k], [k, columns]),
            Layout::WeightTransposed => ([m, k], [columns, k]),
            Layout::FeatureMajor => ([k, m], [columns, k]),
        };
        let mut types = vec![TensorType::new(self.input, &x), TensorType::new(self.input, &w)];
        if self.epilogue.bias {
            types.push(TensorType::new(self.input, &[columns]));
        }
        if self.epilogue.residual {
            types.push(self.output_type());
        }
        types
    }
}
