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
    let data = &data[data.find('{').ok_or_else(|| bad("`const DATA` is not an object"))?..];
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
        // What ends before its brace was cut, maybe within the number.
        block.find('}')?;
        Some(OpCycles { op: field(block, "hlo_op_name")?, cycles: field(block, "estimated_cycles")?.parse().ok()? })
    });
    parsed.collect::<Option<_>>().ok_or_else(|| Error::Report {
        report: "static profile",
        message: "an estimate lacks `hlo_op_name`, a whole number of `estimated_cycles` or its end".into(),
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
    let named = ["memory space ", "space="].into_iter().find_map(|before| Some(lower.split_once(before)?.1));
    let memory = ["vmem", "hbm", "smem"].into_iter().find(|name| named.is_some_and(|rest| rest.starts_with(name)));
    let memory = memory.unwrap_or(if lower.contains("on hbm") || lower.contains("hbmoom") { "hbm" } else { "vmem" });
    // "Scoped allocation with size 37.54M and limit 16.00M exceeded", "Used 120.0G of 95.0G hbm",
    // "Allocation (size=2097152) would exceed memory (size=1048576) :: ... space=smem",
    // "the total memory required for HLO temporaries (108.71G) exceeds available HBM (95.73G)".
    let pairs =
        [("with size ", "limit "), ("used ", " of "), ("(size=", "(size="), ("temporaries (", "available hbm (")];
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
        Some('t') => 40,
        _ => 0,
    };
    let value: f64 = number.trim_end_matches('.').parse().ok()?;
    Some(Bytes((value * (1u64 << shift) as f64).round() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cut from reports that libtpu 0.0.52 wrote.
    const VMEM: &str = r#"<script>const DATA = {"global_info": {"module_name": "matmul", "vmem_capacity": 67108864},
      "hlo_breakdowns": {"<top-inlining-caller>": {"blocks": [], "metadata": "", "total_size": 0},
        "copy.x": {"blocks": [{"allocations": [{"padding": 0, "size": 98304, "tag": "operand span for operand 0"}],
          "block_size": 98304, "block_type": "SCOPED"}], "metadata": "", "total_size": 98304},
        "name.1": {"blocks": [{"allocations": [
          {"padding": 0, "shape": "f32[8,512]", "size": 16384, "tag": "scratch operand"},
          {"padding": 0, "shape": "u8[1048576]", "size": 1048576, "tag": "input window allocation for operator input 1. The window shape is bf16[512,512], while the full shape is bf16[1024,1024]. This allocation has 2 buffering levels."},
          {"padding": 0, "shape": "u8[8192]", "size": 8192, "tag": "output window allocation for operator output 0. This allocation has 1 buffering level."},
          {"padding": 0, "size": 36864, "tag": "internal scratch"},
          {"padding": 0, "size": 4096, "tag": "SPILL"}],
          "block_size": 1114112, "block_type": "SCOPED"}], "metadata": "", "total_size": 1114112}}};
      draw(DATA);</script>"#;

    #[test]
    fn the_vmem_report_keeps_kernels_and_sets_spills_apart() {
        let kernels = vmem(VMEM).unwrap();
        let [kernel] = &kernels[..] else { panic!("{kernels:?}") };
        assert_eq!(kernel.name, "name.1");
        assert_eq!(kernel.spills(), Bytes(4096));
        assert_eq!(kernel.without_spills() + kernel.spills(), kernel.total);
        assert_eq!(kernel.of_kind(BufferKind::InternalScratch), Bytes(36864));
        assert_eq!(kernel.allocations[1].levels, 2);
        let json = serde_json::to_value(kernel).unwrap();
        assert_eq!(json["allocations"][4]["kind"], "spill");
        assert_eq!(json["allocations"][1]["kind"], "input_window");
        assert_eq!(&serde_json::from_value::<KernelVmem>(json).unwrap(), kernel);
    }

    #[test]
    fn a_damaged_report_is_an_error() {
        for damaged in ["", "const DATA = 7", "const DATA = {\"a\":", "const DATA = {}"] {
            assert!(matches!(vmem(damaged), Err(Error::Report { .. })), "{damaged}");
        }
        assert!(vmem(&VMEM.replace("\"size\": 4096, ", "")).is_err());
        assert!(static_cycles("hlo_op_estimate {\n  hlo_op_name: \"a\"\n}").is_err());
        assert!(static_cycles("hlo_op_estimate {\n  hlo_op_name: \"a\"\n  estimated_cycles: 113").is_err());
    }

    #[test]
    fn static_cycles_are_read() {
        let text = "hlo_op_estimate {\n  hlo_op_name: \"name.1\"\n  estimated_cycles: 11367\n  scalar_inputs: 0\n}\n\
                    hlo_op_estimate {\n  hlo_op_name: \"copy.2\"\n  estimated_cycles: 7\n}\n";
        let cycles: Vec<_> = static_cycles(text).unwrap().into_iter().map(|op| (op.op, op.cycles)).collect();
        assert_eq!(cycles, [("name.1".into(), 11367), ("copy.2".into(), 7)]);
        assert_eq!(static_cycles("").unwrap(), []);
    }

    #[test]
    fn out_of_memory_messages_give_both_numbers() {
        let vmem = "E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem while allocating on stack for \
                    %x. Scoped allocation with size 37.54M and limit 16.00M exceeded scoped vmem limit by 21.54M.";
        let out = out_of_memory(vmem).unwrap();
        assert_eq!((out.memory.as_str(), out.asked, out.limit), ("vmem", Bytes(39_363_543), Bytes::mib(16)));
        let hbm = "Ran out of memory in memory space hbm. Used 120.50G of 95.00G hbm. Exceeded hbm capacity by 25.50G.";
        let out = out_of_memory(hbm).unwrap();
        assert_eq!((out.memory.as_str(), out.limit), ("hbm", Bytes::gib(95)));
        let smem = "Allocation (size=2097152) would exceed memory (size=1048576) :: #allocation12 [shape = \
                    'u8[2097152]{0}', space=smem, size = 0x200000, scoped, tag = 'prefetched SMEM operand 1'] :: name.1";
        let out = out_of_memory(smem).unwrap();
        assert_eq!((out.memory.as_str(), out.asked, out.limit), ("smem", Bytes::mib(2), Bytes::mib(1)));
        // A whole program; arguments are in the sum.
        let hbm = "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries \
                   (108.71G) exceeds available HBM (95.73G)";
        assert_eq!(out_of_memory(&hbm.replace("108.71G", "2.00T")).unwrap().asked, Bytes(2 << 40));
        let out = out_of_memory(hbm).unwrap();
        assert_eq!((out.memory.as_str(), out.asked.to_string(), out.limit.to_string()), {
            ("hbm", "108.71 GiB".to_owned(), "95.73 GiB".to_owned())
        });
        assert_eq!(out_of_memory("INVALID_ARGUMENT: no such op"), None);
    }
}
