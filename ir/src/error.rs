//! What can go wrong while a module is built.

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a module could not be built, checked or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An op's operands or attributes do not fit together.
    #[error("{op}: {message}")]
    Op {
        /// The op's full name, `stablehlo.dot_general`.
        op: String,
        /// What does not fit, with the shapes.
        message: String,
    },
    /// A function cannot be defined, called or annotated.
    #[error("function `{function}`: {message}")]
    Function {
        /// The function's name.
        function: String,
        /// What is wrong.
        message: String,
    },
    /// Several ops of a kernel are not known, or not supported in their form.
    #[error("{} ops are not supported:{}", errors.len(), errors.iter().map(|error| format!("\n  {error}")).collect::<String>())]
    Unsupported {
        /// Each of them.
        errors: Vec<Error>,
    },
    /// MLIR refused an attribute or a type.
    #[error("MLIR does not accept `{text}`: {diagnostics}")]
    Text {
        /// What was to be parsed.
        text: String,
        /// MLIR's diagnostics.
        diagnostics: String,
    },
    /// A Mosaic kernel's serialized form is damaged, or is not what a kernel looks like.
    #[error("Mosaic kernel: {message}")]
    Mosaic {
        /// What is wrong.
        message: String,
    },
    /// MLIR's verifier refused a module.
    #[error("module `{module}` does not verify:\n{diagnostics}")]
    Verify {
        /// The module's name.
        module: String,
        /// MLIR's diagnostics, one per line.
        diagnostics: String,
    },
}

impl Error {
    /// An error of the op `op` (its full name).
    pub fn op(op: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Op { op: op.into(), message: message.into() }
    }

    /// An error about a Mosaic kernel's serialized form.
    pub(crate) fn mosaic(message: impl Into<String>) -> Self {
        Self::Mosaic { message: message.into() }
    }

    /// An error about the function `function`.
    pub(crate) fn function(function: &str, message: impl Into<String>) -> Self {
        Self::Function { function: function.to_owned(), message: message.into() }
    }
}
