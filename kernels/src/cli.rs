//! Kernels on a command line: the flags of a problem (feature `cli`).
//!
//! A kernel whose specification derives [`clap::Args`] has its flags for nothing; one whose flags are more convenient than
//! its fields converts them. Either way the specification is what counts: `--spec JSON` takes it as it is.

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use pagoda_ir::Element;

use crate::{Invalid, Kernel};

/// A kernel with flags.
pub trait KernelArgs: Kernel {
    /// The flags of a problem; their help is their documentation.
    type Args: Args;

    /// The problem that the flags describe; not validated yet.
    ///
    /// # Errors
    /// A flag whose text is not what it should be.
    fn spec(args: Self::Args) -> Result<Self::Spec, Invalid>;
}

/// Reads `f32` or `bf16`.
pub fn float() -> impl TypedValueParser<Value = Element> {
    PossibleValuesParser::new(["f32", "bf16"]).map(|name| if name == "f32" { Element::F32 } else { Element::Bf16 })
}
