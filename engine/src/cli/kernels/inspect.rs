//! `pagoda inspect`: the Mosaic kernels of a file, with grid, buffers, declared VMEM and op counts.

use std::path::Path;

use pagoda_ir::Context;
use pagoda_ir::mosaic::wire::{self, Summary};
use pagoda_kernels::vmem::Bytes;

use super::file::File;
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
        println!("{}", serde_json::to_string_pretty(&summaries).map_err(Error::runtime("writing JSON"))?);
        return Ok(());
    }
    if summaries.is_empty() {
        println!("{}: a StableHLO module without Mosaic kernels", path.display());
    }
    for (index, summary) in summaries.iter().enumerate() {
        if index > 0 {
            println!();
        }
        print(summary);
    }
    Ok(())
}

fn print(kernel: &Summary) {
    let grid: Vec<String> = kernel.grid.iter().map(|(size, how)| format!("{size} {how}")).collect();
    println!("{}: grid {}", kernel.name, if grid.is_empty() { "none".into() } else { grid.join(" x ") });
    for buffer in &kernel.buffers {
        let windowed = if buffer.windowed { "window" } else { "" };
        let bytes = if buffer.bytes == 0 { String::new() } else { Bytes(buffer.bytes as u64).to_string() };
        println!(
            "  {:<14} {:<9} {:<22} {:<14} {windowed:<7} {bytes:>12}",
            buffer.name, buffer.role, buffer.shape, buffer.memory
        );
    }
    let limit = kernel.vmem_limit.map_or("the chip's default".to_owned(), |bytes| Bytes(bytes as u64).to_string());
    println!("  VMEM declared: {} ({} bytes); limit: {limit}", Bytes(kernel.vmem_bytes as u64), kernel.vmem_bytes);
    println!("  ops:");
    for (name, count) in &kernel.ops {
        println!("    {count:>6}  {name}");
    }
}
