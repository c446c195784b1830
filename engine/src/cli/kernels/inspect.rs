//! `pagoda inspect`: the Mosaic kernels of a file, with grid, buffers, declared VMEM and op counts.

use std::path::Path;

use pagoda_ir::Context;
use pagoda_ir::mosaic::wire::{self, Summary};
use pagoda_kernels::vmem::Bytes;

use super::file::File;
use crate::cli::{print, print_json};
use crate::error::{Error, Result};

/// Prints them.
///
/// # Errors
/// When the file cannot be opened.
pub(in crate::cli) fn inspect(path: &Path, json: bool) -> Result<()> {
    let file = File::read(path)?;
    let context = Context::new();
    let summaries: Vec<Summary> = (file.kernels(&context)?.iter())
        .map(|(kernel, _)| wire::summarize(kernel).map_err(|error| Error::file(path, error, "write the module again")))
        .collect::<Result<_>>()?;
    if json {
        return print_json(&summaries);
    }
    if summaries.is_empty() {
        return print(&format!("{}: a StableHLO module without Mosaic kernels", path.display()));
    }
    let numbered = |(number, kernel): (usize, &Summary)| match summaries.len() {
        1 => table(kernel),
        _ => format!("kernel {number}: {}", table(kernel)),
    };
    print(&summaries.iter().enumerate().map(numbered).collect::<Vec<_>>().join("\n\n"))
}

fn table(kernel: &Summary) -> String {
    let grid: Vec<String> = kernel
        .grid
        .iter()
        .map(|(size, how)| size.map_or_else(|| format!("dynamic {how}"), |size| format!("{size} {how}")))
        .collect();
    let grid = if grid.is_empty() { "none".into() } else { grid.join(" x ") };
    let mut lines = vec![format!("{}: grid {grid}", kernel.name)];
    for buffer in &kernel.buffers {
        let windowed = if buffer.windowed { "window" } else { "" };
        let bytes = if buffer.bytes == 0 { String::new() } else { Bytes(buffer.bytes as u64).to_string() };
        lines.push(format!(
            "  {:<14} {:<9} {:<22} {:<14} {windowed:<7} {bytes:>12}",
            buffer.name, buffer.role, buffer.shape, buffer.memory
        ));
    }
    let limit = kernel.vmem_limit.map_or("the chip's default".to_owned(), |bytes| Bytes(bytes as u64).to_string());
    let vmem = kernel.vmem_bytes;
    lines.push(format!("  VMEM declared: {} ({vmem} bytes); limit: {limit}", Bytes(vmem as u64)));
    lines.push("  ops:".into());
    lines.extend(kernel.ops.iter().map(|(name, count)| format!("    {count:>6}  {name}")));
    lines.join("\n")
}
