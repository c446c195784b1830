//! What can go wrong at the PJRT boundary.

use std::path::PathBuf;

use pagoda_ir::element::Element;

/// The result of a PJRT call.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the plugin layer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A plugin was not found.
    #[error("{what}: {remedy}")]
    Missing {
        /// What was looked for, and where.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A file is not a usable plugin.
    #[error("{} is not a PJRT plugin that can be used: {why}", path.display())]
    NoPlugin {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The plugin answered a call with an error.
    #[error("{call}: {message} ({code})")]
    Plugin {
        /// The PJRT function.
        call: &'static str,
        /// The canonical status code, e.g. `INVALID_ARGUMENT`.
        code: &'static str,
        /// The plugin's message.
        message: String,
    },
    /// The plugin lacks a function.
    #[error("this plugin does not offer {0}")]
    Unsupported(&'static str),
    /// A call does not fit the executable or the client.
    #[error("{0}")]
    Misuse(String),
    /// A buffer's element type has no counterpart here.
    #[error("the plugin returned a buffer of PJRT element type {0}, which no element type here matches")]
    ElementType(u32),
    /// Downloaded bytes were asked for as another type.
    #[error("a buffer of {found} elements was expected to hold {expected}")]
    WrongElement {
        /// What the buffer holds.
        found: Element,
        /// What was asked for.
        expected: Element,
    },
}

/// The canonical name of a PJRT (absl) status code.
pub(super) fn code_name(code: u32) -> &'static str {
    match code {
        1 => "CANCELLED",
        3 => "INVALID_ARGUMENT",
        4 => "DEADLINE_EXCEEDED",
        5 => "NOT_FOUND",
        6 => "ALREADY_EXISTS",
        7 => "PERMISSION_DENIED",
        8 => "RESOURCE_EXHAUSTED",
        9 => "FAILED_PRECONDITION",
        10 => "ABORTED",
        11 => "OUT_OF_RANGE",
        12 => "UNIMPLEMENTED",
        13 => "INTERNAL",
        14 => "UNAVAILABLE",
        15 => "DATA_LOSS",
        16 => "UNAUTHENTICATED",
        _ => "UNKNOWN",
    }
}
