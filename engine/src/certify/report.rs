//! Reading what libtpu writes: its VMEM report, its static profile, and its out-of-memory messages.

use std::fmt;

use pagoda_kernels::vmem::{BufferKind, Bytes};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::{Error, OpCycles};

/// VMEM that one Mosaic kernel took, by the compiler's report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelVmem {
    /// The op's name in the compiled program.
    pub name: String,
    /// Every allocation.
    pub allocations: Vec<Allocation>,
    /// The sum that the report states.
    pub total: Bytes,
}

/// One allocation of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// What it is for.
    pub kind: AllocationKind,
    /// Bytes, all buffering levels and padding included.
    pub bytes: Bytes,
    /// Buffers of a window.
    pub levels: u64,
    /// What the compiler says it is.
    pub tag: String,
}

/// What an allocation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", untagged)]
pub enum AllocationKind {
    /// A buffer that a plan names.
    Buffer(BufferKind),
    /// Register spills.
    Spill(SpillTag),
}

/// The one value `"spill"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpillTag {
    /// Register spills.
    Spill,
}

impl fmt::Display for AllocationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Buffer(kind) => kind.fmt(f),
            Self::Spill(_) => f.pad("spills"),
        }
    }
}

impl KernelVmem {
    fn sum(&self, of: impl Fn(AllocationKind) -> bool) -> Bytes {
        self.allocations.iter().filter(|allocation| of(allocation.kind)).map(|allocation| allocation.bytes).sum()
    }

    /// Register spills.
    pub fn spills(&self) -> Bytes {
        self.sum(|kind| matches!(kind, AllocationKind::Spill(_)))
    }

    /// Everything but spills: what a plan must foresee to the byte.
    pub fn without_spills(&self) -> Bytes {
        self.sum(|kind| matches!(kind, AllocationKind::Buffer(_)))
    }

    /// Bytes of one kind of buffer.
    pub fn of_kind(&self, wanted: BufferKind) -> Bytes {
        self.sum(|kind| kind == AllocationKind::Buffer(wanted))
    }
}

impl fmt::Display for KernelVmem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  {}", self.name)?;
        for allocation in &self.allocations {
            let Allocation { kind, bytes, tag, .. } = allocation;
            let tag = tag.split(". ").next().unwrap_or_default();
            writeln!(f, "    {kind:<16} {bytes:>12}  {tag}")?;
        }
        writeln!(f, "    {:<16} {:>12}", "total", self.total)
    }
}

/// Parses a `*-vmem_report.html`: the Mosaic kernels with their scoped allocations.
///
/// # Errors
/// When the file is not of the form that libtpu 0.0.52 writes.
pub fn vmem(html: &str) -> Result<Vec<KernelVmem>, Error> {
    let bad = |message: &str| Error::Report { report: "VMEM report", message: message.to_owned() };
    let data = html.split_once("const DATA").ok_or_else(|| bad("it has no `const DATA`"))?.1;
    let data = &data[data.find('{').ok_or_else(|| bad("`const DATA` is no object"))?..];
    let data = serde_json::Deserializer::from_str(data).into_iter::<Json>().next();
    let data = data.and_then(Result::ok).ok_or_else(|| bad("`const DATA` is no JSON"))?;
    let ops = data["hlo_breakdowns"].as_object().ok_or_else(|| bad("it has no `hlo_breakdowns`"))?;
    let mut kernels = Vec::new();
    // `<top-inlining-caller>` repeats the ops of the entry computation.
    for (name, op) in ops.iter().filter(|(name, _)| !name.starts_with('<')) {
        let mut allocations = Vec::new();
        let mut total = 0;
        for block in op["blocks"].as_array().into_iter().flatten().filter(|block| block["block_type"] == "SCOPED") {
            total += block["block_size"].as_u64().ok_or_else(|| bad("a block has no `block_size`"))?;
            for allocation in block["allocations"].as_array().into_iter().flatten() {
                let (Some(size), Some(tag)) = (allocation["size"].as_u64(), allocation["tag"].as_str()) else {
                    return Err(bad("an allocation lacks `size` or `tag`"));
                };
                allocations.push(self::allocation(size, tag).map_err(|message| bad(&message))?);
            }
        }
        // Ops of XLA's own take scoped VMEM too: copies, fusions. They have no windows and no scratch operands.
        let mosaic = |allocation: &Allocation| matches!(allocation.kind, AllocationKind::Buffer(kind) if kind != BufferKind::InternalScratch);
        if allocations.iter().any(mosaic) {
            kernels.push(KernelVmem { name: name.clone(), allocations, total: Bytes(total) });
        }
    }
    Ok(kernels)
}

fn allocation(size: u64, tag: &str) -> Result<Allocation, String> {
    let kind = match tag {
        _ if tag.starts_with("SPILL") => AllocationKind::Spill(SpillTag::Spill),
        _ if tag.starts_with("input window") => AllocationKind::Buffer(BufferKind::InputWindow),
        _ if tag.starts_with("output window") => AllocationKind::Buffer(BufferKind::OutputWindow),
        _ if tag.starts_with("scratch operand") => AllocationKind::Buffer(BufferKind::Scratch),
        _ => AllocationKind::Buffer(BufferKind::InternalScratch),
    };
    let levels = tag.split_once("This allocation has ").and_then(|(_, rest)| rest.split_once(" buffering level"));
    let levels = levels.map_or(Some(1), |(count, _)| count.parse().ok());
    // The size that the report states is of all levels together.
    Ok(Allocation { kind, bytes: Bytes(size), levels: levels.ok_or_else(|| format!("`{tag}`"))?, tag: tag.to_owned() })
}

/// Parses a `*_static_llo_profile.textproto`.
///
/// # Errors
/// When an estimate lacks its name or its cycles.
pub fn static_cycles(text: &str) -> Result<Vec<OpCycles>, Error> {
    let field = |block: &str, name: &str| {
        let line = block.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().trim_matches('"').to_owned())
    };
    let estimates = text.split("hlo_op_estimate").skip(1);
    let parsed = estimates.map(|block| {
        Some(OpCycles { op: field(block, "hlo_op_name")?, cycles: field(block, "estimated_cycles")?.parse().ok()? })
    });
    parsed.collect::<Option<_>>().ok_or_else(|| Error::Report {
        report: "static profile",
        message: "an estimate lacks `hlo_op_name` or a whole number of `estimated_cycles`".into(),
    })
}

/// What the compiler ran out of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutOfMemory {
    /// `vmem`, `hbm`, `smem`, as the compiler names it.
    pub memory: String,
    /// What was asked for.
    pub asked: Bytes,
    /// What there is.
    pub limit: Bytes,
    /// The compiler's message.
    pub message: String,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} asked for, the limit is {}", self.asked, self.memory, self.limit)
    }
}

/// Reads an out-of-memory message; `None` if it is none.
pub fn out_of_memory(message: &str) -> Option<OutOfMemory> {
    let lower = message.to_ascii_lowercase();
    if !lower.contains("out of memory") && !lower.contains("exceed") {
        return None;
    }
    let memory = lower.split_once("memory space ").map_or("vmem", |(_, rest)| {
        ["vmem", "hbm", "smem"].into_iter().find(|name| rest.starts_with(name)).unwrap_or("vmem")
    });
    // "Scoped allocation with size 37.54M and limit 16.00M exceeded", "Used 120.0G of 95.0G hbm".
    let pairs = [("with size ", "limit "), ("used ", " of ")];
    let (asked, limit) = pairs.into_iter().find_map(|(asked, limit)| {
        let (_, rest) = lower.split_once(asked)?;
        Some((size(rest)?, size(rest.split_once(limit)?.1)?))
    })?;
    Some(OutOfMemory { memory: memory.to_owned(), asked, limit, message: message.to_owned() })
}

/// `37.54M` and the like: the compiler rounds to hundredths.
fn size(text: &str) -> Option<Bytes> {
    let text = text.trim_start();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, rest) = text.split_at(digits);
    let shift = match rest.chars().next() {
        Some('k') => 10,
        Some('m') => 20,
        Some('g') => 30,
        _ => 0,
    };
    let value: f64 = number.trim_end_matches('.').parse().ok()?;
    Some(Bytes((value * (1u64 << shift) as f64).round() as u64))
}
