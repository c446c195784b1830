//! What the numbers of a KV cache are.

use std::fmt;

use pagoda_ir::Element;

/// The type of a cache's numbers. Those of 8 bits are multiplied by a scale: they stand for `stored * scale`, and what is beyond
/// the largest one becomes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvCache {
    element: Element,
    /// The bits of an f32, by which programs are told apart.
    scale: u32,
}

impl KvCache {
    /// Numbers as they are: of the compute type, or of a float of 16 bits or more.
    pub const fn of(element: Element) -> Self {
        Self::scaled(element, 1.0)
    }

    /// Numbers of 8 bits, each `scale` times as large as it is stored.
    pub const fn scaled(element: Element, scale: f32) -> Self {
        Self { element, scale: scale.to_bits() }
    }

    /// The type that is stored.
    pub const fn element(self) -> Element {
        self.element
    }

    /// What stored numbers are multiplied by.
    pub const fn scale(self) -> f32 {
        f32::from_bits(self.scale)
    }
}

impl fmt::Display for KvCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.element.bytes() {
            1 => write!(f, "{} times {}", self.element, self.scale()),
            _ => self.element.fmt(f),
        }
    }
}
