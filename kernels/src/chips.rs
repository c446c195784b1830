//! The TPU generations: memory sizes, rates and limits that planning needs.
//!
//! One [`Chip`] is what a program sees as one *device*: on v4 and v5p both TensorCores of a chip (a `parallel` grid
//! dimension is split over them), on tpu7x one of the chip's two TensorCores. Figures "per core" are per TensorCore.
//!
//! Sources: vendor's data sheets for HBM, bandwidth and peak rates (as collected in JAX's `tpu_info.py`, where tpu7x's
//! are per chip and halved here); VMEM and SMEM sizes, default scoped limits and topology names as libtpu 0.0.52 answers. Peak
//! flop per cycle is 2 x lanes^2 x units; for v6e and tpu7x it is the vendor's rate over the clock (the compiler's own
//! estimate of a 4096^3 product on v6e, 375533 cycles, needs more than 262144 a cycle, which rules out the half of it).

use std::fmt;

use pagoda_ir::Element;
use serde::{Deserialize, Serialize};

use crate::vmem::Bytes;

/// A TPU generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Chip {
    /// TPU v4: two TensorCores to a device.
    V4,
    /// TPU v5e ("v5 lite").
    V5e,
    /// TPU v5p: two TensorCores to a device.
    V5p,
    /// TPU v6e (Trillium, "v6 lite").
    V6e,
    /// TPU7x (Ironwood): one of a chip's two TensorCores is a device.
    Tpu7x,
}

/// A rate of memory.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct BytesPerSecond(pub f64);

impl fmt::Display for BytesPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} GB/s", self.0 / 1e9)
    }
}

/// A clock.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Hertz(pub f64);

/// What planning knows of one device of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ChipInfo {
    /// Vector memory of each core.
    pub vmem_per_core: Bytes,
    /// What a kernel may take of it unless it asks for more.
    pub default_scoped_limit: Bytes,
    /// Scalar memory of each core, where prefetched arrays live.
    pub smem_per_core: Bytes,
    /// What the compiler keeps of it for itself, at most.
    pub smem_reserved: Bytes,
    /// TensorCores of a device.
    pub cores: usize,
    /// Rows and columns of a matrix unit.
    pub mxu: usize,
    /// bf16 flop per cycle of one core's matrix units together.
    pub peak_flop_per_cycle_and_core: u64,
    /// TensorCore clock.
    pub clock: Hertz,
    /// Memory of a device.
    pub hbm: Bytes,
    /// Bandwidth of it.
    pub hbm_bandwidth: BytesPerSecond,
    /// The topology of one host that the compiler is asked for.
    pub topology: &'static str,
    /// Devices of that topology.
    pub topology_devices: usize,
}

impl Chip {
    /// All generations, oldest first.
    pub const ALL: [Self; 5] = [Self::V4, Self::V5e, Self::V5p, Self::V6e, Self::Tpu7x];

    /// The generation of a device by the kind that its plugin calls it (libtpu 0.0.52: `TPU v5` is v5p, `TPU v5 lite` is
    /// v5e); `None` for another.
    pub fn of_kind(kind: &str) -> Option<Self> {
        Some(match kind.trim().strip_prefix("TPU")?.trim() {
            "v4" => Self::V4,
            "v5" | "v5p" => Self::V5p,
            "v5 lite" | "v5e" => Self::V5e,
            "v6 lite" | "v6e" => Self::V6e,
            "7x" | "v7x" => Self::Tpu7x,
            _ => return None,
        })
    }

    /// The type of 8 bits with the bits of `narrow`, a float of 8 bits, that vector units make f32 of in one operation, if
    /// there is one. (As libtpu 0.0.52 lowers `arith.extf`.)
    pub const fn unpacked_as(self, narrow: Element) -> Option<Element> {
        match (self, narrow) {
            (Self::V4, _) => None,
            (_, Element::F8E5M2) | (Self::Tpu7x, Element::F8E4M3Fn) => Some(narrow),
            (_, Element::F8E4M3Fn) => Some(Element::F8E4M3B11Fnuz),
            _ => None,
        }
    }

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V5e => "v5e",
            Self::V5p => "v5p",
            Self::V6e => "v6e",
            Self::Tpu7x => "tpu7x",
        }
    }

    /// The generation that `name` names (`v5p`, `v7x` and `tpu7x`, ...).
    ///
    /// # Errors
    /// When there is none; the message lists them.
    pub fn parse(name: &str) -> Result<Self, UnknownChip> {
        let name = name.to_ascii_lowercase();
        let alias = match name.as_str() {
            "v7x" | "7x" => "tpu7x",
            "v5lite" => "v5e",
            "v6lite" => "v6e",
            other => other,
        };
        Self::ALL.into_iter().find(|chip| chip.name() == alias).ok_or(UnknownChip(name))
    }

    /// The generation's figures.
    pub const fn info(self) -> ChipInfo {
        /// Flop per cycle of `units` matrix units of `side` x `side`: a multiplication and an addition in each cell.
        const fn units(count: u64, side: u64) -> u64 {
            2 * count * side * side
        }
        match self {
            Self::V4 => ChipInfo {
                vmem_per_core: Bytes::mib(16),
                default_scoped_limit: Bytes::mib(16),
                smem_per_core: Bytes::mib(1),
                smem_reserved: Bytes::kib(3),
                cores: 2,
                mxu: 128,
                peak_flop_per_cycle_and_core: units(4, 128),
                clock: Hertz(1.05e9),
                hbm: Bytes::gib(32),
                hbm_bandwidth: BytesPerSecond(1.228e12),
                topology: "v4:2x2x1",
                topology_devices: 4,
            },
            Self::V5e => ChipInfo {
                vmem_per_core: Bytes::mib(128),
                default_scoped_limit: Bytes::mib(16),
                smem_per_core: Bytes::mib(1),
                smem_reserved: Bytes::kib(3),
                cores: 1,
                mxu: 128,
                peak_flop_per_cycle_and_core: units(4, 128),
                clock: Hertz(1.5e9),
                hbm: Bytes::gib(16),
                hbm_bandwidth: BytesPerSecond(8.19e11),
                topology: "v5e:2x2",
                topology_devices: 4,
            },
            Self::V5p => ChipInfo {
                vmem_per_core: Bytes::mib(64),
                default_scoped_limit: Bytes::mib(16),
                smem_per_core: Bytes::mib(1),
                smem_reserved: Bytes::kib(3),
                cores: 2,
                mxu: 128,
                peak_flop_per_cycle_and_core: units(4, 128),
                clock: Hertz(1.75e9),
                hbm: Bytes::gib(95),
                hbm_bandwidth: BytesPerSecond(2.765e12),
                topology: "v5p:2x2x1",
                topology_devices: 4,
            },
            Self::V6e => ChipInfo {
                vmem_per_core: Bytes::mib(128),
                default_scoped_limit: Bytes::mib(32),
                smem_per_core: Bytes::mib(1),
                smem_reserved: Bytes::kib(3),
                cores: 1,
                mxu: 256,
                peak_flop_per_cycle_and_core: units(4, 256),
                clock: Hertz(1.75e9),
                hbm: Bytes::gib(32),
                hbm_bandwidth: BytesPerSecond(1.64e12),
                topology: "v6e:2x2",
                topology_devices: 4,
            },
            Self::Tpu7x => ChipInfo {
                vmem_per_core: Bytes::mib(64),
                default_scoped_limit: Bytes::mib(32),
                smem_per_core: Bytes::mib(1),
                smem_reserved: Bytes::kib(3),
                cores: 1,
                mxu: 256,
                peak_flop_per_cycle_and_core: units(4, 256),
                clock: Hertz(2.2e9),
                hbm: Bytes::gib(96),
                hbm_bandwidth: BytesPerSecond(3.69e12),
                topology: "tpu7x:2x2x1",
                topology_devices: 8,
            },
        }
    }

    /// Whether the compiler writes a static cycle profile for this generation: libtpu 0.0.52 has no model of v4's DMAs
    /// and aborts when it is asked for one.
    pub const fn has_static_profile(self) -> bool {
        !matches!(self, Self::V4)
    }

    /// Whether the matrix units multiply elements of this narrow type, by libtpu 0.0.52.
    pub const fn multiplies(self, element: Element) -> bool {
        match element {
            Element::I8 => matches!(self, Self::V5e | Self::V5p | Self::V6e),
            _ => false,
        }
    }

    /// The generation of a topology name such as `v5p:2x2x1` or `v5p:2x4x4`.
    pub fn of_topology(topology: &str) -> Option<Self> {
        Self::parse(topology.split(':').next()?).ok()
    }
}

impl ChipInfo {
    /// Peak bf16 flop per second of the device.
    pub fn peak_flops(&self) -> f64 {
        self.peak_flop_per_cycle() * self.clock.0
    }

    /// Peak bf16 flop per cycle of the device, all cores together.
    pub fn peak_flop_per_cycle(&self) -> f64 {
        (self.peak_flop_per_cycle_and_core * self.cores as u64) as f64
    }

    /// HBM bytes per TensorCore cycle, all cores together.
    pub fn hbm_bytes_per_cycle(&self) -> f64 {
        self.hbm_bandwidth.0 / self.clock.0
    }
}

impl fmt::Display for Chip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that names no chip.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("chip = {0} is not known: use v4, v5e, v5p, v6e or tpu7x")]
pub struct UnknownChip(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_that_plugins_name() {
        let kinds = ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"];
        assert_eq!(kinds.map(Chip::of_kind), Chip::ALL.map(Some));
        assert_eq!(["cpu", "TPU v3", "TPU v4 lite", ""].map(Chip::of_kind), [None; 4]);
    }

    #[test]
    fn names_and_rates() {
        for chip in Chip::ALL {
            assert_eq!(Chip::parse(chip.name()), Ok(chip));
            assert_eq!(Chip::of_topology(chip.info().topology), Some(chip));
            assert!(chip.info().default_scoped_limit <= chip.info().vmem_per_core);
            assert!(chip.info().smem_reserved < chip.info().smem_per_core);
        }
        assert_eq!(Chip::parse("v7x"), Ok(Chip::Tpu7x));
        assert_eq!(
            Chip::parse("v9").unwrap_err().to_string(),
            "chip = v9 is not known: use v4, v5e, v5p, v6e or tpu7x"
        );
        // The data sheets' peak bf16 rates, TFLOP/s per device, to 1%.
        let peaks = Chip::ALL.map(|chip| chip.info().peak_flops() / 1e12);
        for (peak, sheet) in peaks.into_iter().zip([275.0, 197.0, 459.0, 918.0, 1153.5]) {
            assert!((peak / sheet - 1.0).abs() < 0.01, "{peak} for {sheet}");
        }
    }
}
