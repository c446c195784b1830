//! A number of bytes: arithmetic, and how people read and write it.
//!
//! One type for every memory (VMEM, HBM, the host's), so that no figure is printed in two ways.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, Mul, Sub};

use serde::{Deserialize, Serialize};

/// Binary units, the largest first: the shift that makes one of them of bytes, and its name.
const UNITS: [(u32, &str); 3] = [(30, "GiB"), (20, "MiB"), (10, "KiB")];

/// A number of bytes, shown with two decimals in the largest binary unit that it reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// `count` KiB.
    pub const fn kib(count: u64) -> Self {
        Self(count << 10)
    }

    /// `count` MiB.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// `count` GiB.
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }

    /// The number in MiB.
    pub fn as_mib(self) -> f64 {
        self.0 as f64 / (1u64 << 20) as f64
    }

    /// What is left of this after `other`, or zero.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// Reads `16MiB`, `512 KiB`, `2GiB`, or a plain number of bytes.
    ///
    /// # Errors
    /// When the text is none of these, not a whole number of bytes, or 2^53 bytes or more.
    pub fn parse(text: &str) -> Result<Self, String> {
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            _ => return Err(format!("`{text}` is not a size: write 16MiB, 512KiB, 2GiB or a number of bytes")),
        };
        let value: f64 =
            number.parse().map_err(|_| format!("`{text}` is not a size: write 16MiB or a number of bytes"))?;
        let bytes = value * (1u64 << shift) as f64;
        if bytes.fract() != 0.0 || bytes >= (1u64 << 53) as f64 {
            return Err(format!("`{text}` is not a whole number of bytes below 2^53"));
        }
        Ok(Self(bytes as u64))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match UNITS.into_iter().find(|(shift, _)| self.0 >> shift != 0) {
            Some((shift, unit)) => format!("{:.2} {unit}", self.0 as f64 / (1u64 << shift) as f64),
            None => format!("{} B", self.0),
        };
        f.pad(&text)
    }
}

impl Add for Bytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl Sub for Bytes {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl Mul<u64> for Bytes {
    type Output = Self;

    fn mul(self, factor: u64) -> Self {
        Self(self.0 * factor)
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self(0), Add::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown() {
        let shown = [0, 1023, 1024, 7_348_736, 3 << 30, 95 << 30].map(|bytes| Bytes(bytes).to_string());
        assert_eq!(shown, ["0 B", "1023 B", "1.00 KiB", "7.01 MiB", "3.00 GiB", "95.00 GiB"]);
        assert_eq!(format!("{:>10}|", Bytes::mib(1)), "  1.00 MiB|");
    }

    #[test]
    fn sizes_are_read() {
        let read = |text| Bytes::parse(text).map(|bytes| bytes.0);
        assert_eq!(read("16MiB"), Ok(16 << 20));
        assert_eq!(read(" 1.5 KiB "), Ok(1536));
        assert_eq!(read("77"), Ok(77));
        for bad in ["", "MiB", "16MB", "-1", "1.5", "1e30", "99999999999GiB"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
