//! What a step program is emitted for.

use std::fmt;

use pagoda_kernels::chips::Chip;

/// What a program is emitted for: it decides which form of each kernel the program carries, and how activations lie.
/// The chip is the one that Mosaic kernels are planned for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Any PJRT plugin: plain StableHLO.
    Portable,
    /// The CPU plugin: attention and few-column matmuls in Rust, as custom calls.
    Host,
    /// The CPU plugin: the TPU's Mosaic kernels as custom calls that the tile machine runs, access by access.
    TileMachine(Chip),
    /// A TPU: the same Mosaic kernels, as `tpu_custom_call`s.
    Tpu(Chip),
}

impl Target {
    /// Whether the program calls handlers of this crate: then [`crate::native::register_all`] comes before it is
    /// compiled.
    pub fn needs_handlers(self) -> bool {
        match self {
            Self::Portable | Self::Tpu(_) => false,
            Self::Host | Self::TileMachine(_) => true,
        }
    }

    /// Whether activations are row-major, `[rows, features]`: then so are scales of weights, `[groups, features]`.
    pub fn is_row_major(self) -> bool {
        matches!(self, Self::TileMachine(_) | Self::Tpu(_))
    }

    /// Whether programs loop over their layers, whose weights they take as stacks: a TPU's kernels read a layer's part where
    /// it lies, and the program's code does not grow with the layers. Other compilers would copy each part on every step.
    pub fn stacks_layers(self) -> bool {
        matches!(self, Self::TileMachine(_) | Self::Tpu(_))
    }
}

/// The form of the kernels, and the chip that they are planned for.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Portable => f.write_str("stablehlo"),
            Self::Host => f.write_str("native"),
            Self::TileMachine(chip) => write!(f, "mosaic on the tile machine, planned for {}", chip.name()),
            Self::Tpu(chip) => write!(f, "mosaic, planned for {}", chip.name()),
        }
    }
}
