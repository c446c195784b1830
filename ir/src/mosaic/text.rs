//! Kernels as people read and edit them: MLIR's text, with buffers under the names that the kernel's author gave them.
//!
//! MLIR keeps no names of values but those in locations, and its text leaves locations out: [`print()`] writes the name of
//! an argument as its SSA name, and [`parse`] turns it into a location again.

use std::ffi::c_void;

use melior::ir::{Module, Operation};

use crate::{
    context::{Context, diagnosed},
    error::{Error, Result},
};

/// The readable form of a kernel's module.
pub fn print(module: &Module) -> String {
    unsafe extern "C" fn collect(part: mlir_sys::MlirStringRef, text: *mut c_void) {
        if part.length == 0 {
            return; // its pointer may be null
        }
        // SAFETY: MLIR hands back the pointer below, and bytes that live during this call.
        unsafe {
            let bytes = std::slice::from_raw_parts(part.data.cast::<u8>(), part.length);
            (*text.cast::<Vec<u8>>()).extend_from_slice(bytes);
        }
    }
    let mut text = Vec::new();
    // SAFETY: the flags are made, used and destroyed here; the operation and the buffer outlive the call.
    unsafe {
        let flags = mlir_sys::mlirOpPrintingFlagsCreate();
        mlir_sys::mlirOpPrintingFlagsPrintNameLocAsPrefix(flags);
        let operation = module.as_operation().to_raw();
        mlir_sys::mlirOperationPrintWithFlags(operation, flags, Some(collect), (&raw mut text).cast());
        mlir_sys::mlirOpPrintingFlagsDestroy(flags);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Reads a module in readable form. Locations of its ops name `file`.
///
/// # Errors
/// What MLIR says about the text.
pub fn parse<'c>(context: &'c Context, text: &str, file: &str) -> Result<Module<'c>> {
    let context = context.melior();
    let source = named_arguments(&without_foreign_memrefs(text));
    let string = |text: &str| mlir_sys::MlirStringRef { data: text.as_ptr().cast(), length: text.len() };
    // Functions alone are a module too, with aliases in front of it. Lines keep their numbers.
    let is_module = |line: &str| ["module", "builtin.module", "\"builtin.module"].iter().any(|op| line.starts_with(op));
    let source = match source.lines().any(|line| is_module(line.trim_start())) {
        true => source,
        false => {
            let in_front = |line: &&str| line.trim().is_empty() || line.trim_start().starts_with(['!', '#', '/']);
            let (aliases, functions) =
                source.split_at(source.split_inclusive('\n').take_while(in_front).map(str::len).sum());
            format!("{aliases}module {{ {functions}\n}}")
        }
    };
    // The reader looks at the byte behind the text, which must be zero.
    let source = source + "\0";
    let (operation, diagnostics) = diagnosed(context, || {
        // SAFETY: both strings outlive the call, and a null operation becomes `None`.
        unsafe {
            let source = string(&source[..source.len() - 1]);
            Operation::from_option_raw(mlir_sys::mlirOperationCreateParse(context.to_raw(), source, string(file)))
        }
    });
    let module = operation.and_then(Module::from_operation);
    module.ok_or_else(|| Error::mosaic(format!("{file} is not an MLIR module: {diagnostics}")))
}

/// MLIR refuses foreign memory spaces and element types in the memrefs of a text (in bytecode it does not): spaces become
/// strings, semaphores the integers that [`signature`](super::signature) takes for them in semaphore memory.
fn without_foreign_memrefs(text: &str) -> String {
    let text = text.replace("x!tpu.dma_semaphore", "xi64").replace("<!tpu.dma_semaphore", "<i64");
    let text = text.replace("x!tpu.semaphore", "xi32").replace("<!tpu.semaphore", "<i32");
    let mut result = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once("#tpu.memory_space<") {
        let (space, after) = after.split_once('>').unwrap_or((after, ""));
        result.extend([before, "\"", space, "\""]);
        rest = after;
    }
    result + rest
}

/// Gives the arguments of every function in custom form, `%kv: memref<...>`, their names as locations.
fn named_arguments(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(list) = rest.find("func.func ").and_then(|at| Some(at + rest[at..].find('(')? + 1)) {
        let (before, after) = rest.split_at(list);
        result += before;
        let (mut depth, mut end, mut argument) = (0_usize, 0, "");
        let mut quoted = false;
        let bytes = after.as_bytes();
        while end < bytes.len() {
            match bytes[end] {
                b'"' => quoted = !quoted,
                _ if quoted => {}
                b'%' if depth == 0 => {
                    let name = &after[end + 1..];
                    let is_part = |c: char| c.is_ascii_alphanumeric() || "_$.-".contains(c);
                    argument = &name[..name.find(|c| !is_part(c)).unwrap_or(name.len())];
                }
                b'l' if depth == 0 && after[end..].starts_with("loc(") => argument = "",
                b'<' | b'[' | b'{' | b'(' => depth += 1,
                // Not the end of an arrow.
                b'>' if end > 0 && bytes[end - 1] == b'-' => {}
                b'>' | b']' | b'}' | b')' if depth > 0 => depth -= 1,
                byte @ (b',' | b')') if depth == 0 => {
                    if !argument.is_empty() {
                        result.extend([" loc(\"", argument, "\")"]);
                    }
                    if byte == b')' {
                        break;
                    }
                }
                _ => {}
            }
            let width = after[end..].chars().next().map_or(1, char::len_utf8);
            result += &after[end..end + width];
            end += width;
        }
        rest = &after[end..];
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_get_their_names() {
        for (text, expected) in [
            (
                "func.func @f(%arg0: i32, %kv: t<[1], \"a)\">) {",
                "func.func @f(%arg0: i32 loc(\"arg0\"), %kv: t<[1], \"a)\"> loc(\"kv\")) {",
            ),
            ("func.func @f() { }", "func.func @f() { }"),
            ("func.func @f(%a: t<() -> ()> loc(\"b\"))", "func.func @f(%a: t<() -> ()> loc(\"b\"))"),
            ("func.func @f(i32, i32)", "func.func @f(i32, i32)"),
            ("func.func @f(%a: é<", "func.func @f(%a: é<"),
        ] {
            assert_eq!(named_arguments(text), expected);
        }
    }
}
