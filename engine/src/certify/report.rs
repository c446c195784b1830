//! Reading what libtpu writes: its VMEM report, its static profile, and its out-of-memory messages.

use std::fmt;

use pagoda_kernels::vmem::{BufferKind, Bytes};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::{Error, OpBytes, OpCycles};

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

/// Parses a `*_static_llo_profile.textproto`. libtpu estimates one of several equal ops, and says how many they are: their
/// cycles are of all of them together.
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
        let cycles: u64 = field(block, "estimated_cycles")?.parse().ok()?;
        let equal: u64 = field(block, "num_equivalent_hlos").map_or(Some(1), |count| count.parse().ok())?;
        Some(OpCycles {
            op: field(block, "hlo_op_name")?,
            cycles: cycles.checked_mul(equal.max(1))?,
            equal: equal.max(1),
        })
    });
    parsed.collect::<Option<_>>().ok_or_else(|| Error::Report {
        report: "static profile",
        message: "an estimate lacks `hlo_op_name`, a whole number of `estimated_cycles` or its end".into(),
    })
}

/// What a kernel's bundles (VLIW instructions) use of the core's units, each bundle counted once, however often it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundles {
    /// The op's name in the compiled program.
    pub name: String,
    /// Bundles of its code.
    pub count: u64,
    /// The units.
    pub units: Vec<Unit>,
}

/// A unit of a core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// The compiler's name: `MATMUL`, `VALU`, `VSTORE`, `VSTORE:SPILL`.
    pub name: String,
    /// Slots of a bundle.
    pub slots: u64,
    /// Slots that are used, all bundles together.
    pub used: u64,
}

impl Bundles {
    /// The part of the bundles that a unit needs at least.
    pub fn share(&self, unit: &Unit) -> f64 {
        unit.used as f64 / (unit.slots * self.count).max(1) as f64
    }
}

/// Parses a `*-final_hlo-static-per-bundle-utilization.txt`; `None` if it is not of the form that libtpu 0.0.52 writes.
pub fn bundles(name: &str, text: &str) -> Option<Bundles> {
    let (header, lines) = text.split_once("UTILIZATION:")?;
    let mut header = header.lines().skip(1);
    let names: Vec<&str> = header.next()?.split(',').map(str::trim).collect();
    let slots: Vec<u64> = header.next()?.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    let (mut used, mut count) = (vec![0_u64; names.len()], 0);
    for line in lines.lines().filter(|line| !line.trim().is_empty()) {
        let numbers: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        if numbers.len() != names.len() {
            return None;
        }
        used.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
        count += 1;
    }
    let units = names.iter().zip(slots).zip(used);
    let units = units.map(|((name, slots), used)| Unit { name: (*name).to_owned(), slots, used }).collect();
    Some(Bundles { name: name.to_owned(), count, units })
}

/// What takes no time of its own in a program of XLA's.
const FREE: [&str; 6] = ["parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all"];

/// The ops of a program (a `*-TLP-hlo.txt`: the entry computation as it is scheduled) that `estimates` do not speak of, with
/// the bytes that each takes and gives, padded as they lie (of an array that is updated in place, nothing). An estimate speaks
/// for its equals, which are of its type.
pub fn unestimated(program: &str, estimates: &[OpCycles]) -> Vec<OpBytes> {
    let entry = program.split_once("\nENTRY ").map_or("", |(_, entry)| entry);
    let ops: Vec<Op> = entry.split("\n}").next().unwrap_or_default().lines().filter_map(Op::parse).collect();
    let ty = |name: &str| ops.iter().find(|op| op.name == name).map(|op| op.ty);
    let equals = estimates.iter().filter(|estimate| estimate.equal > 1);
    let mut spoken: Vec<_> = equals.filter_map(|estimate| Some((ty(&estimate.op)?, estimate.equal - 1))).collect();
    let mut unestimated = Vec::new();
    for op in &ops {
        if FREE.contains(&op.code) || estimates.iter().any(|estimate| estimate.op == op.name) {
            continue;
        }
        if let Some((_, left)) = spoken.iter_mut().find(|(ty, left)| *ty == op.ty && *left > 0) {
            *left -= 1;
            continue;
        }
        let operands = op.operands.split('%').skip(1).filter_map(|rest| ty(rest.split([',', ' ', ')']).next()?));
        let in_place = ["scatter", "dynamic-update-slice", "dynamic_update_slice", "while"];
        let in_place = in_place.iter().any(|word| op.code == *word || op.name.contains(word));
        let mut result = Some(op.ty);
        let mut bytes = 0;
        for operand in operands {
            if in_place && result == Some(operand) {
                result = None;
            } else {
                bytes += padded_bytes(operand);
            }
        }
        let bytes = bytes + result.map_or(0, padded_bytes);
        unestimated.push(OpBytes { op: op.name.to_owned(), bytes: Bytes(bytes) });
    }
    unestimated
}

/// `%name = type code(operands), ...`
struct Op<'t> {
    name: &'t str,
    ty: &'t str,
    code: &'t str,
    operands: &'t str,
}

impl<'t> Op<'t> {
    fn parse(line: &'t str) -> Option<Self> {
        let line = line.trim_start();
        let (name, rest) = line.strip_prefix("ROOT ").unwrap_or(line).strip_prefix('%')?.split_once(" = ")?;
        // A tuple's type has spaces, and layouts have parentheses.
        let end = match rest.starts_with('(') {
            true => rest.find(") ")? + 1,
            false => rest.find(' ')?,
        };
        let (ty, rest) = rest.split_at(end);
        let (code, operands) = rest.trim_start().split_once('(')?;
        let operands = operands.split("), ").next().unwrap_or(operands);
        Some(Self { name, ty, code, operands })
    }
}

/// Bytes of a type as it lies: `bf16[336,2,1,128]{3,1,0,2:T(2,128)(2,1)}` has tiles of 2 x 128 of its two minor dimensions.
fn padded_bytes(ty: &str) -> u64 {
    let numbers = |text: &str| text.split(',').filter_map(|of| of.trim().parse::<u64>().ok()).collect::<Vec<_>>();
    let arrays = ty.split('[').collect::<Vec<_>>();
    let of = |pair: &[&str]| {
        let element = pair[0].rsplit(|c: char| !c.is_ascii_alphanumeric()).next()?;
        let bits: u64 =
            element.trim_start_matches(|c: char| c.is_ascii_alphabetic()).split('e').next()?.parse().ok()?;
        let (dims, layout) = pair[1].split_once(']')?;
        let dims = numbers(dims);
        let layout = layout.strip_prefix('{').unwrap_or_default();
        let order = numbers(layout.split([':', '}']).next().unwrap_or_default());
        let tile = layout.split_once(":T(").and_then(|(_, tile)| tile.split_once(')'));
        let tile = numbers(tile.map_or("", |(tile, _)| tile));
        // Minor dimension first.
        let mut minor: Vec<u64> = order.iter().filter_map(|&at| dims.get(at as usize).copied()).collect();
        if minor.len() != dims.len() {
            minor = dims.iter().rev().copied().collect();
        }
        minor.iter_mut().zip(tile.iter().rev()).for_each(|(size, &unit)| *size = size.next_multiple_of(unit.max(1)));
        Some(minor.iter().product::<u64>() * bits / 8)
    };
    arrays.windows(2).filter_map(of).sum()
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
                    hlo_op_estimate {\n  hlo_op_name: \"copy.2\"\n  estimated_cycles: 7\n  num_equivalent_hlos: 2\n}\n";
        let cycles: Vec<_> = static_cycles(text).unwrap().into_iter().map(|op| (op.op, op.cycles)).collect();
        assert_eq!(cycles, [("name.1".into(), 11367), ("copy.2".into(), 14)]);
        assert_eq!(static_cycles("").unwrap(), []);
    }

    #[test]
    fn bundles_are_added_up() {
        let text = "== CAPACTIY:\nMATMUL, VALU, VSTORE:SPILL\n   4     4     1\n== UTILIZATION:\n0 1 0\n4 2 1\n";
        let bundles = bundles("k", text).unwrap();
        let used: Vec<_> =
            bundles.units.iter().map(|unit| (unit.name.as_str(), unit.used, bundles.share(unit))).collect();
        assert_eq!(used, [("MATMUL", 4, 0.5), ("VALU", 3, 0.375), ("VSTORE:SPILL", 1, 0.5)]);
        assert_eq!(super::bundles("k", &text.replace("0 1 0", "0 1")), None);
        assert_eq!(super::bundles("k", ""), None);
    }

    #[test]
    fn ops_without_an_estimate_count_their_bytes() {
        let program = "HloModule m\n\nENTRY %main.3 (x.1: bf16[336,4,64]) -> (f32[336,4,64]) {\n  \
            %x.1 = bf16[336,4,64]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name=\"x\"}\n  \
            %fusion = (bf16[336,64]{1,0:T(8,128)(2,1)}, f32[7]{0:T(128)}) fusion(%x.1), kind=kLoop, calls=%f\n  \
            %copy.1 = f32[4,336,64]{2,1,0:T(8,128)} copy(%fusion)\n  %copy.2 = f32[4,336,64]{2,1,0:T(8,128)} copy(%fusion)\n  \
            %bitcast.9 = f32[336,4,64]{2,0,1:T(8,128)} bitcast(%copy.1)\n  \
            %scatter.3 = bf16[336,4,64]{2,1,0:T(8,128)(2,1)} scatter(%x.1, %fusion), to_apply=%g\n  \
            ROOT %tuple.2 = (f32[336,4,64]{2,1,0:T(8,128)}) tuple(%bitcast.9)\n}\n";
        let [fusion, copy] = [2 * 336 * 128 + 4 * 128, 4 * 4 * 336 * 128].map(|bytes: u64| bytes);
        let names = |estimates: &[OpCycles]| {
            let ops = unestimated(program, estimates).into_iter();
            ops.map(|op| (op.op, op.bytes.0)).collect::<Vec<_>>()
        };
        let one = OpCycles { op: "copy.1".into(), cycles: 9, equal: 1 };
        let other = ("copy.2".to_owned(), copy + fusion);
        let first = ("fusion".to_owned(), fusion + 2 * 336 * 8 * 128);
        let scatter = ("scatter.3".to_owned(), fusion);
        assert_eq!(names(std::slice::from_ref(&one)), [first.clone(), other, scatter.clone()]);
        assert_eq!(names(&[OpCycles { equal: 2, ..one }]), [first, scatter]);
        assert_eq!(unestimated("", &[]), []);
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
