//! The MLIR context that every module of a program lives in.
//!
//! Invariant: upstream MLIR's dialects are registered, those that Pagoda's modules use are loaded, and dialects that
//! LLVM does not ship (StableHLO, the TPU dialect) are allowed unregistered: their ops and attributes are built and
//! printed as they are, and checked by the builders of this crate instead of by MLIR.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use melior::{
    diagnostic::{Diagnostic, DiagnosticSeverity},
    dialect::DialectRegistry,
    utility::register_all_dialects,
};

/// The upstream dialects that Pagoda's modules use; the rest is loaded when a parsed text or bytecode asks for it.
const LOADED: [&str; 8] = ["builtin", "func", "arith", "math", "memref", "scf", "cf", "vector"];

/// An MLIR context, ready for StableHLO and Mosaic modules.
pub struct Context {
    melior: melior::Context,
}

impl Context {
    /// A context with the dialects registered and loaded, single-threaded (Pagoda's modules are small; a thread pool
    /// per context costs more than it saves).
    pub fn new() -> Self {
        let registry = DialectRegistry::new();
        register_all_dialects(&registry);
        let melior = melior::Context::new_with_registry(&registry, false);
        for dialect in LOADED {
            melior.get_or_load_dialect(dialect);
        }
        melior.set_allow_unregistered_dialects(true);
        Self { melior }
    }

    /// The melior context, for building operations, types and attributes directly.
    pub fn melior(&self) -> &melior::Context {
        &self.melior
    }

    /// Runs `work` and returns what it returned, with the text of every error and warning that MLIR reported meanwhile
    /// (one per line, notes indented). Nothing reaches stderr.
    pub fn diagnosed<T>(&self, work: impl FnOnce() -> T) -> (T, String) {
        diagnosed(&self.melior, work)
    }
}

impl Default for Context {
    fn default() -> Self {
        Self::new()
    }
}

/// [`Context::diagnosed`] on the melior context itself.
pub(crate) fn diagnosed<T>(context: &melior::Context, work: impl FnOnce() -> T) -> (T, String) {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&lines);
    let handler = context.attach_diagnostic_handler(move |diagnostic| {
        let mut sink = sink.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        render(&diagnostic, "", &mut sink);
        true
    });
    let result = work();
    context.detach_diagnostic_handler(handler);
    let lines = lines.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    (result, lines.join("\n"))
}

/// What MLIR prints, up to the first byte that is no UTF-8 (damaged modules hold such names; `to_string` would panic).
pub(crate) fn printed(value: &impl fmt::Display) -> String {
    let mut text = String::new();
    let _ = fmt::write(&mut text, format_args!("{value}"));
    text
}

fn render(diagnostic: &Diagnostic, indent: &str, lines: &mut Vec<String>) {
    let severity = match diagnostic.severity() {
        DiagnosticSeverity::Error => "error",
        DiagnosticSeverity::Warning => "warning",
        DiagnosticSeverity::Note => "note",
        DiagnosticSeverity::Remark => "remark",
    };
    lines.push(format!("{indent}{severity}: {}", printed(diagnostic)));
    for note in (0..diagnostic.note_count()).filter_map(|index| diagnostic.note(index).ok()) {
        render(&note, "  ", lines);
    }
}

#[cfg(test)]
mod tests {
    use melior::ir::Attribute;

    use super::*;

    #[test]
    fn keeps_foreign_attributes_as_they_are() {
        let context = Context::new();
        for text in ["#stablehlo<comparison_direction LT>", "#tpu.memory_space<vmem>"] {
            assert_eq!(Attribute::parse(context.melior(), text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn collects_the_diagnostics_of_a_failure() {
        let context = Context::new();
        let (module, diagnostics) = context.diagnosed(|| {
            melior::ir::Module::parse(context.melior(), "func.func @f() { %0 = arith.constant 1 : i3x }").is_none()
        });
        assert!(module);
        assert!(diagnostics.starts_with("error: "), "{diagnostics}");
    }
}
