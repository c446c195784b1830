//! The planner's arithmetic: what a kernel takes of VMEM, buffer by buffer, and whether that is known to fit.
//!
//! A Mosaic kernel takes four kinds of VMEM: pipeline windows, declared scratch, scratch that the compiler adds of its
//! own accord, and register spills. The first three are arithmetic, and a [`VmemReport`] states them to the byte as the
//! compiler's own report does. Spills only the compiler knows: that is why a report's sum is a *lower bound*, why
//! [`Verdict::Fits`] wants a certification of this very body, why an estimate is [`Verdict::LikelyFits`], and why the
//! absence of evidence is [`Verdict::Unknown`], never "fits".
//!
//! Nothing here allocates, reads a file, or asks a compiler.

use std::fmt;

pub use pagoda_ir::Bytes;
use pagoda_ir::element::Element;
use pagoda_ir::mosaic::tile_padded_bytes;
use serde::{Deserialize, Serialize};

/// What windows are given VMEM in (libtpu 0.0.52 on every chip: 2560 bytes take 3072, while scratch of 512 takes 512).
pub const WINDOW_UNIT: Bytes = Bytes(1024);

/// What a buffer in VMEM is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BufferKind {
    /// The pipeline's window of an input.
    InputWindow,
    /// The pipeline's window of an output.
    OutputWindow,
    /// Memory that the kernel declares.
    Scratch,
    /// Memory that the compiler adds for relayouts and its own use.
    InternalScratch,
}

impl fmt::Display for BufferKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::InputWindow => "input window",
            Self::OutputWindow => "output window",
            Self::Scratch => "scratch",
            Self::InternalScratch => "internal scratch",
        })
    }
}

/// One buffer in VMEM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Buffer {
    /// Its name in the kernel.
    pub name: String,
    /// What it is for.
    pub kind: BufferKind,
    /// Element type.
    pub element: Element,
    /// Sizes of one copy.
    pub dims: Vec<usize>,
    /// How many copies there are: 2 when the pipeline double-buffers.
    pub copies: u64,
    /// Bytes of all copies, padded to tiles.
    pub bytes: Bytes,
}

impl Buffer {
    /// A buffer of `copies` copies, each padded to tiles; all copies of a window together to [`WINDOW_UNIT`].
    pub fn new(name: &str, kind: BufferKind, element: Element, dims: &[usize], copies: u64) -> Self {
        let bytes = tile_padded_bytes(element, dims) as u64 * copies;
        let bytes = match kind {
            BufferKind::InputWindow | BufferKind::OutputWindow => Bytes(bytes.next_multiple_of(WINDOW_UNIT.0)),
            BufferKind::Scratch | BufferKind::InternalScratch => Bytes(bytes),
        };
        Self { name: name.to_owned(), kind, element, dims: dims.to_vec(), copies, bytes }
    }

    /// `bf16[512,1024]`.
    pub fn shape(&self) -> String {
        let dims: Vec<_> = self.dims.iter().map(usize::to_string).collect();
        format!("{}[{}]", self.element, dims.join(","))
    }
}

/// Every buffer that a kernel takes of VMEM, spills excluded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VmemReport {
    /// The buffers, in the order of the kernel's operands.
    pub buffers: Vec<Buffer>,
}

impl VmemReport {
    /// The sum of all buffers: the least that the kernel can take.
    pub fn total(&self) -> Bytes {
        self.buffers.iter().map(|buffer| buffer.bytes).sum()
    }
}

impl fmt::Display for VmemReport {
    /// A table: one line per buffer, and the sum.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for buffer in &self.buffers {
            let copies = if buffer.copies > 1 { format!("{} x", buffer.copies) } else { String::new() };
            let Buffer { name, kind, bytes, .. } = buffer;
            writeln!(f, "  {name:<12} {kind:<16} {copies:>4} {:<20} {bytes:>10}", buffer.shape())?;
        }
        write!(f, "  {:<53} {:>12}", "sum without spills", self.total())
    }
}

/// What is known about register spills of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "from")]
pub enum Spills {
    /// The compiler compiled exactly this body with exactly this limit, and spilled this much.
    Certified {
        /// Bytes of VMEM for spills.
        bytes: Bytes,
    },
    /// Kernels of its family were compiled; it should not spill more than this. An estimate, not a bound.
    Estimated {
        /// The estimate.
        bytes: Bytes,
    },
    /// Nothing is known.
    Unknown,
}

impl Spills {
    /// The figure, certified or estimated.
    pub const fn bytes(self) -> Option<Bytes> {
        match self {
            Self::Certified { bytes } | Self::Estimated { bytes } => Some(bytes),
            Self::Unknown => None,
        }
    }
}

impl fmt::Display for Spills {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certified { bytes } => write!(f, "{bytes} (certified)"),
            Self::Estimated { bytes } => write!(f, "up to {bytes} (estimated from kernels of this family)"),
            Self::Unknown => f.pad("unknown"),
        }
    }
}

/// Whether a kernel fits into a VMEM limit, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Verdict {
    /// It fits: the compiler compiled this very body with this limit.
    Fits {
        /// What is left below the limit, spills counted.
        spare: Bytes,
    },
    /// It should fit: the buffers do, and the estimated spills beside them. Nobody has compiled it.
    LikelyFits {
        /// What is left below the limit, the estimate counted.
        spare: Bytes,
    },
    /// It cannot fit.
    DoesNotFit {
        /// How much is missing, at least.
        excess: Bytes,
        /// What to change, the cheapest change first. Never the user's batch or lengths.
        suggestions: Vec<Suggestion>,
    },
    /// The buffers fit; whether the spills do is not known.
    Unknown {
        /// What is left below the limit for spills.
        room_for_spills: Bytes,
    },
}

/// A way to make a kernel fit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "change")]
pub enum Suggestion {
    /// Smaller tiles.
    Tiles {
        /// The tiles, as the command line takes them.
        tiles: String,
        /// What the kernel then takes, spills excluded.
        bytes: Bytes,
    },
    /// A higher scoped limit.
    Limit {
        /// The limit.
        bytes: Bytes,
        /// The chip's VMEM, which no limit may pass.
        chip: Bytes,
    },
}

impl fmt::Display for Suggestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tiles { tiles, bytes } => write!(f, "--tiles {tiles} takes {bytes}"),
            Self::Limit { bytes, chip } => write!(f, "--vmem-limit {} (the chip has {chip})", limit_argument(*bytes)),
        }
    }
}

fn limit_argument(bytes: Bytes) -> String {
    format!("{}MiB", bytes.0.div_ceil(1 << 20))
}

impl Verdict {
    /// What a sum of buffers and the knowledge of spills mean for `limit`. `suggestions` are asked for only when the kernel
    /// does not fit; they are put into the order tiles, limit.
    pub fn new(total: Bytes, spills: Spills, limit: Bytes, suggestions: impl FnOnce() -> Vec<Suggestion>) -> Self {
        let certain = match spills {
            Spills::Certified { bytes } => total + bytes,
            Spills::Estimated { .. } | Spills::Unknown => total,
        };
        if certain > limit {
            let mut suggestions = suggestions();
            suggestions.sort_by_key(|suggestion| match suggestion {
                Suggestion::Tiles { .. } => 0,
                Suggestion::Limit { .. } => 1,
            });
            return Self::DoesNotFit { excess: certain - limit, suggestions };
        }
        match spills {
            Spills::Certified { .. } => Self::Fits { spare: limit - certain },
            Spills::Estimated { bytes } if total + bytes <= limit => Self::LikelyFits { spare: limit - total - bytes },
            Spills::Estimated { .. } | Spills::Unknown => Self::Unknown { room_for_spills: limit - total },
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fits { spare } => write!(f, "fits, {spare} to spare"),
            Self::LikelyFits { spare } => {
                write!(f, "likely fits, {spare} to spare by the estimate: `pagoda certify` compiles it")
            }
            Self::DoesNotFit { excess, suggestions } => {
                write!(f, "does not fit: {excess} too much")?;
                suggestions.iter().try_for_each(|suggestion| write!(f, "\n  try {suggestion}"))
            }
            Self::Unknown { room_for_spills } => {
                write!(
                    f,
                    "unknown: {room_for_spills} remain for register spills, which only a compilation shows \
                     (`pagoda certify`)"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_needs_evidence() {
        let verdict = |total, spills, limit| Verdict::new(Bytes(total), spills, Bytes(limit), Vec::new);
        let certified = |bytes| Spills::Certified { bytes: Bytes(bytes) };
        let estimated = |bytes| Spills::Estimated { bytes: Bytes(bytes) };
        assert_eq!(verdict(10, Spills::Unknown, 100), Verdict::Unknown { room_for_spills: Bytes(90) });
        assert_eq!(verdict(10, certified(90), 100), Verdict::Fits { spare: Bytes(0) });
        assert!(matches!(verdict(10, certified(91), 100), Verdict::DoesNotFit { excess: Bytes(1), .. }));
        assert_eq!(verdict(10, estimated(20), 100), Verdict::LikelyFits { spare: Bytes(70) });
        // An estimate proves nothing: the kernel may spill less.
        assert_eq!(verdict(90, estimated(20), 100), Verdict::Unknown { room_for_spills: Bytes(10) });
        assert!(matches!(verdict(101, estimated(0), 100), Verdict::DoesNotFit { excess: Bytes(1), .. }));
        assert!(matches!(verdict(101, Spills::Unknown, 100), Verdict::DoesNotFit { .. }));
    }

    #[test]
    fn suggestions_come_in_order() {
        let tiles = Suggestion::Tiles { tiles: "8,128,128".into(), bytes: Bytes::kib(100) };
        let limit = Suggestion::Limit { bytes: Bytes(20 << 20), chip: Bytes::mib(64) };
        let given = vec![limit, tiles];
        let verdict = Verdict::new(Bytes::mib(18), Spills::Unknown, Bytes::mib(16), || given);
        insta::assert_snapshot!(verdict, @r"
        does not fit: 2.00 MiB too much
          try --tiles 8,128,128 takes 100.00 KiB
          try --vmem-limit 20MiB (the chip has 64.00 MiB)
        ");
    }

    #[test]
    fn tables_add_up() {
        let window = Buffer::new("a", BufferKind::InputWindow, Element::Bf16, &[24, 200], 2);
        assert_eq!(window.bytes, Bytes(2 * 24 * 256 * 2), "lanes are padded to 128");
        let report =
            VmemReport { buffers: vec![window, Buffer::new("sum", BufferKind::Scratch, Element::F32, &[24, 128], 1)] };
        assert_eq!(report.total(), Bytes(24576 + 12288));
    }
}
