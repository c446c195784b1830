//! TPU slices by name: what `v5p-64` is, in chips, hosts and the compiler's own words.
//!
//! A slice is a box of chips, `2x4x4`. Three spellings name one: the product's (`v5p-64`), the generation with the box
//! (`tpu7x-4x4x4`), and libtpu's (`v5p:2x4x4`). The number in the product's name counts *TensorCores* on v4, v5p and
//! tpu7x (two to a chip), and chips on v5e and v6e (one to a chip).
//!
//! By number, shapes are those that the products are sold in (Cloud TPU's pages of each generation): on v5e and v6e eight
//! boxes of two dimensions, on the others four small boxes, and boxes of whole cubes of 4x4x4 chips. Of the boxes with one number
//! of cubes, the number names the one of the smallest surface: `v5p-2048` is 8x8x16, not 4x16x16.
//!
//! A box that is written out may be any that libtpu takes. Pure: libtpu itself is asked by who compiles.

use std::fmt;

use pagoda_kernels::chips::{BytesPerSecond, Chip};
use serde::Serialize;

use crate::error::{Error, Result};

/// A slice of chips of one generation, connected by ICI.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Topology {
    chip: Chip,
    dims: Vec<usize>,
}

/// Boxes of v5e and v6e.
const FLAT: [[usize; 2]; 8] = [[1, 1], [2, 2], [2, 4], [4, 4], [4, 8], [8, 8], [8, 16], [16, 16]];
/// Boxes of the others, below one cube.
const SMALL: [[usize; 3]; 4] = [[2, 2, 1], [2, 2, 2], [2, 2, 4], [2, 4, 4]];
/// Chips along the edge of a cube: the unit that larger slices are made of.
const CUBE: usize = 4;
/// The longest edge of a slice.
const LONGEST: usize = 256;
/// The most chips of one host.
const HOST_2D: usize = 8;

impl Topology {
    /// The slice that `name` names.
    ///
    /// # Errors
    /// When it names none; the error lists the nearest that do.
    pub fn parse(name: &str) -> Result<Self> {
        let lower = name.trim().to_ascii_lowercase();
        let split = lower.split_once([':', '-']);
        let Some((prefix, size)) = split else {
            return Err(generation(&lower).map_or_else(|| unknown_chip(name, &lower), |chip| no_slice(name, chip, 32)));
        };
        let Some(chip) = generation(prefix) else { return Err(unknown_chip(name, prefix)) };
        if size.contains('x') {
            let dims: Option<Vec<usize>> = size.split('x').map(|edge| edge.parse().ok()).collect();
            return match dims.map(|dims| Self { chip, dims }) {
                Some(topology) if topology.is_sold() || topology.is_known_to_libtpu() => Ok(topology),
                other => {
                    let chips = other.map_or(0, |topology| topology.dims.iter().fold(1, |n, &d| d.saturating_mul(n)));
                    Err(no_slice(name, chip, chips))
                }
            };
        }
        let Ok(count) = size.parse::<usize>() else { return Err(no_slice(name, chip, 0)) };
        let per_chip = cores_in_name(chip);
        let named = count.is_multiple_of(per_chip).then(|| Self::of_chips(chip, count / per_chip)).flatten();
        named.ok_or_else(|| no_slice(name, chip, count / per_chip))
    }

    /// The slice of `chips` chips.
    fn of_chips(chip: Chip, chips: usize) -> Option<Self> {
        Self::all(chip).into_iter().find(|topology| topology.chips() == chips)
    }

    /// One host of the generation: what a program runs on that no other host takes part in.
    pub fn one_host(chip: Chip) -> Self {
        let dims = if flat(chip) { vec![2, 2] } else { vec![2, 2, 1] };
        Self { chip, dims }
    }

    /// Every slice of a generation that a number names, the smallest first.
    pub fn all(chip: Chip) -> Vec<Self> {
        let of = |dims: &[usize]| Self { chip, dims: dims.to_vec() };
        if flat(chip) {
            return FLAT.iter().map(|dims| of(dims)).collect();
        }
        let single = (chip == Chip::Tpu7x).then_some([1, 1, 1]);
        let cubes = (1..=most_cubes(chip)).filter_map(|cubes| Some(box_of(cubes)?.map(|edge| edge * CUBE)));
        single.into_iter().chain(SMALL).chain(cubes).map(|dims| of(&dims)).collect()
    }

    /// Whether a slice of these edges exists.
    fn is_sold(&self) -> bool {
        let dims = &self.dims[..];
        if flat(self.chip) {
            return FLAT.iter().any(|sold| sold == dims);
        }
        let cubes = dims.len() == 3
            && dims.iter().all(|&edge| edge > 0 && edge <= LONGEST && edge.is_multiple_of(CUBE))
            && dims.iter().product::<usize>() / CUBE.pow(3) <= most_cubes(self.chip);
        cubes || SMALL.iter().any(|sold| sold == dims) || (self.chip == Chip::Tpu7x && dims == [1, 1, 1])
    }

    /// Whether libtpu 0.0.52 takes these edges, sold or not: one chip, or whole hosts of 2x2 chips.
    fn is_known_to_libtpu(&self) -> bool {
        let dims = &self.dims[..];
        let most = if flat(self.chip) { 256 } else { most_cubes(self.chip) * CUBE.pow(3) };
        let (edges, chips) = (if flat(self.chip) { 2 } else { 3 }, || dims.iter().product::<usize>());
        dims.len() == edges
            && dims.iter().all(|edge| (1..=LONGEST).contains(edge))
            && chips() <= most
            && (chips() == 1 || dims[..2].iter().all(|edge| edge.is_multiple_of(2)))
    }

    /// The generation.
    pub fn chip(&self) -> Chip {
        self.chip
    }

    /// Chips along each edge.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Chips of the slice.
    pub fn chips(&self) -> usize {
        self.dims.iter().product()
    }

    /// PJRT devices of a chip: two on tpu7x, whose TensorCores are devices of their own.
    fn devices_per_chip(&self) -> usize {
        if self.chip == Chip::Tpu7x { 2 } else { 1 }
    }

    /// PJRT devices of the slice.
    pub fn devices(&self) -> usize {
        self.chips() * self.devices_per_chip()
    }

    /// Machines that the chips are plugged into. An eight-chip slice of v5e or v6e is one machine; larger ones have four
    /// chips to a machine, as all slices of the others.
    pub fn hosts(&self) -> usize {
        self.chips().div_ceil(self.chips_per_host())
    }

    /// Chips of one machine.
    pub fn chips_per_host(&self) -> usize {
        if self.chips() <= HOST_2D && flat(self.chip) { self.chips() } else { self.chips().min(4) }
    }

    /// Devices of one machine.
    pub fn devices_per_host(&self) -> usize {
        self.chips_per_host() * self.devices_per_chip()
    }

    /// One machine of this slice as a slice of its own.
    pub fn host(&self) -> Self {
        if self.hosts() == 1 { self.clone() } else { Self::one_host(self.chip) }
    }

    /// The smallest slice, no larger than this one, whose devices hold `devices`: a machine of it where that is enough.
    pub fn group(&self, devices: usize) -> Self {
        if devices <= self.devices_per_host() {
            return self.host();
        }
        let mut slices = Self::all(self.chip).into_iter();
        slices.find(|slice| slice.devices() >= devices && slice.chips() < self.chips()).unwrap_or_else(|| self.clone())
    }

    /// The edges, `2x4x4`.
    pub fn shape(&self) -> String {
        self.dims.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
    }

    /// The name that libtpu knows it by, `v5p:2x4x4`.
    pub fn libtpu_name(&self) -> String {
        format!("{}:{}", self.chip, self.shape())
    }

    /// The product's name, `v5p-64`; with the shape where the number names another of the same size.
    pub fn name(&self) -> String {
        let count = self.chips() * cores_in_name(self.chip);
        match Self::of_chips(self.chip, self.chips()) {
            Some(named) if named == *self => format!("{}-{count}", self.chip),
            _ => format!("{}-{}", self.chip, self.shape()),
        }
    }

    /// What the links between chips carry.
    pub fn links(&self) -> Links {
        links(self.chip)
    }
}

impl fmt::Display for Topology {
    /// `v5p-64 (v5p:2x4x4, 32 chips, 8 hosts of 4)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (chips, hosts) = (self.chips(), self.hosts());
        write!(f, "{} ({}, {}", self.name(), self.libtpu_name(), plural(chips, "chip"))?;
        if self.devices() != chips {
            write!(f, ", {}", plural(self.devices(), "device"))?;
        }
        match hosts {
            1 => write!(f, ", 1 host)"),
            _ => write!(f, ", {hosts} hosts of {})", self.chips_per_host()),
        }
    }
}

/// Bandwidths between chips and between hosts, as the vendor states them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Links {
    /// Inter-chip interconnect of one chip, both directions together.
    pub ici: BytesPerSecond,
    /// Data-centre network per chip; `None` where no figure is published.
    pub dcn: Option<BytesPerSecond>,
}

/// Sources: the tables of specifications in Cloud TPU's pages of v5e, v5p, v6e and tpu7x; v4 by its six links of 100 GB/s.
fn links(chip: Chip) -> Links {
    let (ici, dcn_gbit) = match chip {
        Chip::V4 => (600.0, None),
        Chip::V5e => (400.0, Some(25.0)),
        Chip::V5p => (1200.0, Some(50.0)),
        Chip::V6e => (800.0, Some(100.0)),
        Chip::Tpu7x => (1200.0, Some(100.0)),
    };
    Links { ici: BytesPerSecond(ici * 1e9), dcn: dcn_gbit.map(|gbit: f64| BytesPerSecond(gbit * 1e9 / 8.0)) }
}

/// Whether slices of the generation have two dimensions.
fn flat(chip: Chip) -> bool {
    matches!(chip, Chip::V5e | Chip::V6e)
}

/// TensorCores of a chip, where names count those; 1 where they count chips.
fn cores_in_name(chip: Chip) -> usize {
    if flat(chip) { 1 } else { 2 }
}

/// Cubes of a pod.
fn most_cubes(chip: Chip) -> usize {
    match chip {
        Chip::V4 => 64,
        Chip::V5p => 140,
        Chip::Tpu7x => 144,
        Chip::V5e | Chip::V6e => 0,
    }
}

/// The box of `cubes` cubes with the smallest surface, edges ascending; `None` where every box is longer than a pod.
fn box_of(cubes: usize) -> Option<[usize; 3]> {
    let divisors = |n: usize| (1..=n).filter(move |a| n.is_multiple_of(*a));
    let boxes = divisors(cubes).flat_map(|a| {
        let rest = cubes / a;
        divisors(rest).filter(move |&b| a <= b && b <= rest / b).map(move |b| [a, b, rest / b])
    });
    let short = boxes.filter(|[_, _, c]| c * CUBE <= LONGEST);
    short.min_by_key(|[a, b, c]| a * b + a * c + b * c)
}

/// The generation that a name begins with.
fn generation(prefix: &str) -> Option<Chip> {
    match prefix {
        "v5litepod" => Some(Chip::V5e),
        other => Chip::parse(other).ok(),
    }
}

pub(crate) fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn unknown_chip(name: &str, prefix: &str) -> Error {
    let known = ["v4", "v5e", "v5p", "v6e", "tpu7x"];
    let nearest =
        known.iter().max_by(|a, b| strsim::jaro_winkler(a, prefix).total_cmp(&strsim::jaro_winkler(b, prefix)));
    let hint = match nearest.and_then(|nearest| generation(nearest)) {
        Some(chip) => nearest_to(chip, 32).join(", "),
        None => String::new(),
    };
    let fix = format!("name a slice of v4, v5e, v5p, v6e or tpu7x, e.g. {hint}");
    Error::setting("--topology", name, "names no TPU generation", fix)
}

fn no_slice(name: &str, chip: Chip, chips: usize) -> Error {
    let counts = if cores_in_name(chip) == 2 { "TensorCores, two to a chip" } else { "chips" };
    let limit = format!("is not a slice of {chip}");
    let fix = format!("the number counts {counts}; the nearest are {}", nearest_to(chip, chips).join(", "));
    Error::setting("--topology", name, limit, fix)
}

/// Names of the slices whose sizes are nearest to `chips`, ascending.
fn nearest_to(chip: Chip, chips: usize) -> Vec<String> {
    let mut slices = Topology::all(chip);
    slices.sort_by_key(|slice| (slice.chips().abs_diff(chips), slice.chips()));
    slices.truncate(3);
    slices.sort_by_key(Topology::chips);
    slices.iter().map(|slice| format!("{} ({})", slice.name(), slice.shape())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names and shapes of public tables: Cloud TPU's pages, and the maps of MaxText, axlearn and xpk.
    const TABLE: &str = "
        v4-8 v4:2x2x1 4 1 | v4-16 v4:2x2x2 8 2 | v4-32 v4:2x2x4 16 4 | v4-64 v4:2x4x4 32 8 | v4-128 v4:4x4x4 64 16
        v4-256 v4:4x4x8 128 32 | v4-384 v4:4x4x12 192 48 | v4-512 v4:4x8x8 256 64 | v4-1024 v4:8x8x8 512 128
        v4-1536 v4:8x8x12 768 192 | v4-2048 v4:8x8x16 1024 256 | v4-4096 v4:8x16x16 2048 512
        v5p-8 v5p:2x2x1 4 1 | v5p-16 v5p:2x2x2 8 2 | v5p-32 v5p:2x2x4 16 4 | v5p-64 v5p:2x4x4 32 8
        v5p-128 v5p:4x4x4 64 16 | v5p-256 v5p:4x4x8 128 32 | v5p-384 v5p:4x4x12 192 48 | v5p-512 v5p:4x8x8 256 64
        v5p-640 v5p:4x4x20 320 80 | v5p-768 v5p:4x8x12 384 96 | v5p-1024 v5p:8x8x8 512 128
        v5p-1152 v5p:4x12x12 576 144 | v5p-1280 v5p:4x8x20 640 160 | v5p-1920 v5p:4x12x20 960 240
        v5p-2048 v5p:8x8x16 1024 256 | v5p-2304 v5p:8x12x12 1152 288 | v5p-3072 v5p:8x12x16 1536 384
        v5p-3456 v5p:12x12x12 1728 432 | v5p-4096 v5p:8x16x16 2048 512 | v5p-4608 v5p:12x12x16 2304 576
        v5p-6144 v5p:12x16x16 3072 768 | v5p-6912 v5p:12x12x24 3456 864 | v5p-7808 v5p:4x4x244 3904 976
        v5p-8192 v5p:16x16x16 4096 1024 | v5p-8960 v5p:8x20x28 4480 1120 | v5p-10368 v5p:12x12x36 5184 1296
        v5p-12032 v5p:4x8x188 6016 1504 | v5p-12288 v5p:16x16x24 6144 1536 | v5p-13824 v5p:12x24x24 6912 1728
        v5p-17920 v5p:16x20x28 8960 2240
        v5litepod-1 v5e:1x1 1 1 | v5litepod-4 v5e:2x2 4 1 | v5litepod-8 v5e:2x4 8 1 | v5litepod-16 v5e:4x4 16 4
        v5e-32 v5e:4x8 32 8 | v5e-64 v5e:8x8 64 16 | v5e-128 v5e:8x16 128 32 | v5litepod-256 v5e:16x16 256 64
        v6e-1 v6e:1x1 1 1 | v6e-4 v6e:2x2 4 1 | v6e-8 v6e:2x4 8 1 | v6e-16 v6e:4x4 16 4 | v6e-32 v6e:4x8 32 8
        v6e-64 v6e:8x8 64 16 | v6e-128 v6e:8x16 128 32 | v6e-256 v6e:16x16 256 64
        tpu7x-2 tpu7x:1x1x1 1 1 | tpu7x-8 tpu7x:2x2x1 4 1 | tpu7x-16 tpu7x:2x2x2 8 2 | tpu7x-32 tpu7x:2x2x4 16 4
        tpu7x-64 tpu7x:2x4x4 32 8 | tpu7x-128 tpu7x:4x4x4 64 16 | tpu7x-256 tpu7x:4x4x8 128 32
        tpu7x-2048 tpu7x:8x8x16 1024 256";

    #[test]
    fn names_of_public_tables() {
        let rows = TABLE.split(['|', '\n']).map(str::trim).filter(|row| !row.is_empty());
        for row in rows {
            let [name, libtpu, chips, hosts] = row.split(' ').collect::<Vec<_>>()[..] else { panic!("{row}") };
            let topology = Topology::parse(name).unwrap_or_else(|error| panic!("{row}: {error}"));
            assert_eq!(topology.libtpu_name(), libtpu, "{row}");
            assert_eq!((topology.chips().to_string(), topology.hosts().to_string()), (chips.into(), hosts.into()));
            assert_eq!(Topology::parse(libtpu).unwrap(), topology, "libtpu's own name");
            assert_eq!(Topology::parse(&topology.name()).unwrap(), topology, "{row}: its own name");
        }
        assert_eq!(Topology::parse("v5p-2x4x4").unwrap(), Topology::parse("V5P-64").unwrap());
        // Not sold; libtpu takes them.
        for (name, chips, hosts) in [("v5p:4x2x4", 32, 8), ("v5p:1x1x1", 1, 1), ("v6e:2x6", 12, 3)] {
            let topology = Topology::parse(name).unwrap();
            assert_eq!((topology.libtpu_name().as_str(), topology.chips(), topology.hosts()), (name, chips, hosts));
            assert_eq!(Topology::parse(&topology.name()).unwrap(), topology);
        }
    }

    #[test]
    fn every_slice_is_named_and_whole() {
        for chip in Chip::ALL {
            let all = Topology::all(chip);
            for topology in &all {
                assert!(topology.is_sold(), "{topology}");
                assert_eq!(Topology::parse(&topology.name()).as_ref().ok(), Some(topology));
                assert_eq!(topology.hosts() * topology.chips_per_host(), topology.chips(), "{topology}");
                assert_eq!(topology.host().hosts(), 1);
                assert_eq!(topology.host().devices(), topology.devices_per_host(), "{topology}");
                let group = topology.group(2 * topology.devices_per_host());
                assert!(group.devices() >= 2 * topology.devices_per_host() || group == *topology);
            }
            assert_eq!(Topology::parse(chip.info().topology).unwrap().devices(), chip.info().topology_devices);
        }
    }

    #[test]
    fn what_is_no_slice_is_refused_with_the_nearest() {
        for (name, words) in [
            (
                "v5p-63",
                "--topology = v5p-63 is not a slice of v5p: the number counts TensorCores, two to a chip; the nearest are v5p-16 (2x2x2), v5p-32 (2x2x4), v5p-64 (2x4x4)",
            ),
            (
                "v6e-12",
                "is not a slice of v6e: the number counts chips; the nearest are v6e-4 (2x2), v6e-8 (2x4), v6e-16 (4x4)",
            ),
            ("v5p:3x3x3", "the nearest are"),
            ("v5p:2x2", "is not a slice of v5p"),
            ("v5p-", "is not a slice"),
            ("v5p:99999999999999999999x1x1", "is not a slice"),
            ("v5p:4x4x100000", "is not a slice"),
            ("v5p", "is not a slice of v5p: the number counts TensorCores"),
            ("v5q-64", "names no TPU generation: name a slice of v4, v5e, v5p, v6e or tpu7x, e.g. "),
            ("h100-8", "names no TPU generation"),
            ("", "names no TPU generation"),
        ] {
            let error = Topology::parse(name).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}
