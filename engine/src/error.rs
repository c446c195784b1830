//! The engine's error type. Every message names the key, its value, the limit and the fix.
//!
//! Errors are sorted by what the caller does next, not by the module they come from: bad input (exit code 2: change
//! what was given), and everything else (exit code 1: the machine, a file system or a plugin failed).

use std::fmt::Display;
use std::path::{Path, PathBuf};

use crate::pjrt;

/// A result of the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the engine cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting (config key or flag) that cannot work: reads as a sentence, `KEY = VALUE LIMIT: FIX`.
    #[error("{key} = {value} {limit}: {fix}")]
    Setting {
        /// Dotted key.
        key: String,
        /// The value as given.
        value: String,
        /// What the value breaks, in words that continue `KEY = VALUE`.
        limit: String,
        /// What to do.
        fix: String,
    },
    /// A file whose content is wrong (config, model, tokenizer, share).
    #[error("{}: {problem}: {fix}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        fix: String,
    },
    /// A weight that is not what the model's config asks for.
    #[error("{}: tensor {tensor} is {found}, but config.json asks for {expected}: use weights and config of one model",
        path.display())]
    Tensor {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Shape or element type that the config implies.
        expected: String,
        /// Shape or element type in the file.
        found: String,
    },
    /// A plugin that cannot be found, loaded, or made into a client.
    #[error("plugin {plugin}: {problem}: {fix}")]
    Plugin {
        /// The plugin as asked for.
        plugin: String,
        /// What happened, with the plugin's own message.
        problem: String,
        /// What to do.
        fix: String,
    },
    /// A plugin that was not found or cannot be used, or an error of one that runs.
    #[error(transparent)]
    Pjrt(#[from] pjrt::Error),
    /// The operating system refused to read or write.
    #[error("cannot {action} {}: {}", path.display(), without_number(source))]
    Io {
        /// The verb: `read`, `write`, `create`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Compiling or running a program failed.
    #[error("{action}: {source}")]
    Runtime {
        /// What was being done.
        action: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl From<pagoda_kernels::Invalid> for Error {
    fn from(error: pagoda_kernels::Invalid) -> Self {
        Self::Runtime { action: "planning a kernel".into(), source: error.into() }
    }
}

impl From<pagoda_ir::Error> for Error {
    fn from(error: pagoda_ir::Error) -> Self {
        Self::Runtime { action: "emitting a program".into(), source: error.into() }
    }
}

impl Error {
    /// A [`Error::Setting`]: reads `KEY = VALUE LIMIT: FIX`.
    pub fn setting(
        key: impl Into<String>,
        value: impl Display,
        limit: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::Setting { key: key.into(), value: value.to_string(), limit: limit.into(), fix: fix.into() }
    }

    /// A [`Error::File`]: reads `PATH: PROBLEM: FIX`.
    pub fn file(path: impl Into<PathBuf>, problem: impl Display, fix: impl Into<String>) -> Self {
        Self::File { path: path.into(), problem: problem.to_string(), fix: fix.into() }
    }

    /// For `map_err`: the system refused `action` on `path`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { action, path: path.into(), source }
    }

    /// For `map_err`: doing `action` failed.
    pub fn runtime<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        action: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::Runtime { action: action.into(), source: source.into() }
    }

    /// The process's exit code: 2 when the input must change, 1 when something failed on good input.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Setting { .. } | Self::File { .. } | Self::Tensor { .. } | Self::Plugin { .. } => 2,
            Self::Pjrt(pjrt::Error::Missing { .. } | pjrt::Error::NoPlugin { .. }) => 2,
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => 2,
            Self::Io { .. } | Self::Runtime { .. } | Self::Pjrt(_) => 1,
        }
    }
}

/// What the system answered, without the number that it has there.
fn without_number(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error ").next().unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_error_is_a_sentence() {
        let error = Error::setting("engine.max_pages", 3, "holds no sequence of 100 tokens", "raise it to 7");
        assert_eq!(error.to_string(), "engine.max_pages = 3 holds no sequence of 100 tokens: raise it to 7");
        assert_eq!(error.exit_code(), 2);
        let missing = Error::io("read", Path::new("x"))(std::io::ErrorKind::NotFound.into());
        let refused = Error::io("write", Path::new("x"))(std::io::ErrorKind::PermissionDenied.into());
        assert_eq!((missing.exit_code(), refused.exit_code()), (2, 1));
    }
}
