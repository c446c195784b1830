//! What a SparseCore's vector subcore does beyond the ops of a TensorCore: running sums, sorting, counting, memory that is
//! addressed lane by lane, and masks that leave no gaps in memory.
//!
//! Source: JAX's `sc_primitives.py`, whose docs say what each op gives, and `tpu_ops.td`.

use std::sync::Arc;

use super::{
    exec::{Executor, Step},
    observer::Observer,
    program::{Extent, Use},
    tile::{self, Binary, Reduction, Scalar, Tile},
};
use crate::element::Element;

/// How narrow elements of several tiles lie in one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum PackFormat {
    /// All elements of the first tile, then all of the second.
    Compressed,
    /// The first element of each tile, then the second of each.
    Interleaved,
}

impl PackFormat {
    /// Where element `at` of tile `part` lies, of `ratio` tiles of `each` elements.
    fn place(self, part: usize, at: usize, [each, ratio]: [usize; 2]) -> usize {
        match self {
            Self::Compressed => part * each + at,
            Self::Interleaved => at * ratio + part,
        }
    }
}

/// What all lanes of a mask give together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum OfMask {
    /// How many are true.
    Count,
    /// The index of the first that is; the number of lanes where none is.
    FirstSet,
}

/// Rows of a tile: the dimensions beside its minor one go together.
fn rows(len: usize, lanes: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..len / lanes.max(1)).map(move |row| row * lanes..(row + 1) * lanes)
}

fn mask_of(mask: Option<&Tile>, at: usize) -> bool {
    match mask {
        Some(Tile::Pred(mask)) => mask[at],
        _ => true,
    }
}

pub(super) fn of_scalars(element: Element, scalars: &[Scalar]) -> Tile {
    match scalars.first() {
        Some(Scalar::Float(_)) => Tile::Float(Arc::new(scalars.iter().map(|x| as_float(*x)).collect())),
        Some(Scalar::Pred(_)) => Tile::Pred(Arc::new(scalars.iter().map(|x| *x == Scalar::Pred(true)).collect())),
        Some(Scalar::Int(_)) => Tile::Int(Arc::new(scalars.iter().map(|x| as_int(*x)).collect())),
        None => tile::from_bits(element, vec![]),
    }
}

fn as_float(x: Scalar) -> f32 {
    if let Scalar::Float(x) = x { x } else { unreachable!("a tile has one type") }
}

fn as_int(x: Scalar) -> i32 {
    match x {
        Scalar::Int(x) => x,
        Scalar::Pred(x) => i32::from(x),
        Scalar::Float(_) => unreachable!("a tile has one type"),
    }
}

/// The lanes that a mask has.
fn set_lanes(mask: &Tile) -> Vec<usize> {
    (0..len(mask)).filter(|&at| mask_of(Some(mask), at)).collect()
}

/// The lanes of each row up to each one, taken together: those that the mask has. Before the first of these a lane is as it is.
pub(super) fn scan(how: Reduction, element: Element, x: &Tile, lanes: usize, mask: Option<&Tile>) -> Tile {
    let op: Binary = how.binary();
    let together = |x: Scalar, y: Scalar| match (x, y) {
        (Scalar::Float(x), Scalar::Float(y)) => Scalar::Float(tile::round(element, op.float(x, y))),
        (x, y) => Scalar::Int(tile::wrap(element, op.int(element, as_int(x), as_int(y)))),
    };
    let len = len(x);
    let mut result = Vec::with_capacity(len);
    for row in rows(len, lanes) {
        let mut sum = None;
        for at in row {
            let lane = match x.get(at) {
                Scalar::Pred(x) => Scalar::Int(i32::from(x)),
                lane => lane,
            };
            if mask_of(mask, at) {
                sum = Some(sum.map_or(lane, |sum| together(sum, lane)));
            }
            result.push(sum.unwrap_or(lane));
        }
    }
    of_scalars(element, &result)
}

fn len(x: &Tile) -> usize {
    match x {
        Tile::Float(x) => x.len(),
        Tile::Int(x) => x.len(),
        Tile::Pred(x) => x.len(),
    }
}

/// Of each lane, how often its value has been there so far, in its row and the lanes of the mask; and which of those lanes are
/// the last with their value. Of lanes that the mask leaves out the count is 1.
pub(super) fn occurrences(x: &Tile, lanes: usize, mask: &Tile) -> [Tile; 2] {
    let (mut last, mut counts) = (vec![false; len(x)], vec![1; len(x)]);
    for row in rows(len(x), lanes) {
        for at in row.clone().filter(|&at| mask_of(Some(mask), at)) {
            // A NaN is there once.
            let same = |other: &usize| *other == at || mask_of(Some(mask), *other) && x.get(*other) == x.get(at);
            counts[at] = row.clone().take_while(|&other| other <= at).filter(same).count() as i32;
            last[at] = !(at + 1..row.end).any(|other| same(&other));
        }
    }
    [Tile::Pred(Arc::new(last)), Tile::Int(Arc::new(counts))]
}

/// Each row by its keys, and values with them; lanes that the mask leaves out come last. Equal keys keep their order, and
/// integers have no sign. Gives which lanes of the result the mask has, keys and values.
pub(super) fn sort(keys: &Tile, values: &Tile, lanes: usize, mask: Option<&Tile>, descending: bool) -> [Tile; 3] {
    let mut order: Vec<usize> = Vec::with_capacity(len(keys));
    for row in rows(len(keys), lanes) {
        let (mut kept, left): (Vec<usize>, Vec<usize>) = row.partition(|&at| mask_of(mask, at));
        kept.sort_by(|&one, &other| {
            let order = match (keys.get(one), keys.get(other)) {
                (Scalar::Float(one), Scalar::Float(other)) => one.total_cmp(&other),
                (one, other) => as_int(one).cast_unsigned().cmp(&as_int(other).cast_unsigned()),
            };
            if descending { order.reverse() } else { order }
        });
        order.extend(kept.into_iter().chain(left));
    }
    let mask = Tile::Pred(Arc::new(order.iter().map(|&at| mask_of(mask, at)).collect()));
    [mask, picked(keys, &order), picked(values, &order)]
}

/// The elements at some places.
fn picked(x: &Tile, at: &[usize]) -> Tile {
    match x {
        Tile::Float(x) => Tile::Float(Arc::new(at.iter().map(|&at| x[at]).collect())),
        Tile::Int(x) => Tile::Int(Arc::new(at.iter().map(|&at| x[at]).collect())),
        Tile::Pred(x) => Tile::Pred(Arc::new(at.iter().map(|&at| x[at]).collect())),
    }
}

/// What a mask gives, in each of `lanes` lanes.
pub(super) fn of_mask(what: OfMask, mask: &Tile, lanes: usize) -> Tile {
    let set = set_lanes(mask);
    let number = match what {
        OfMask::Count => set.len(),
        OfMask::FirstSet => set.first().copied().unwrap_or(len(mask)),
    };
    Tile::Int(Arc::new(vec![number as i32; lanes]))
}

/// Tiles of numbers of one type, narrowed and put into one tile; what no tile has is zero.
pub(super) fn pack(
    sources: &[Tile],
    positions: &[usize],
    format: PackFormat,
    [from, to]: [Element; 2],
    len: usize,
) -> Tile {
    let ratio = from.bits() / to.bits();
    let each = len / ratio;
    let mut bits = vec![0; len];
    for (source, &position) in sources.iter().zip(positions) {
        for at in 0..each {
            bits[format.place(position, at, [each, ratio])] = tile::narrowed_bits(from, to, source.get(at));
        }
    }
    tile::from_bits(to, bits)
}

/// One of the tiles that [`pack`] puts into `x`, as wide numbers.
pub(super) fn unpack(x: &Tile, index: usize, format: PackFormat, [from, to]: [Element; 2], signed: bool) -> Tile {
    let ratio = to.bits() / from.bits();
    let each = len(x) / ratio;
    let places: Vec<usize> = (0..each).map(|at| format.place(index, at, [each, ratio])).collect();
    let part = picked(x, &places);
    tile::convert(tile::Conversion { from, to, signed, nearest: false }, part)
}

/// What an element holds that nothing was loaded into.
pub(super) fn garbage(element: Element) -> Scalar {
    match element {
        Element::Pred => Scalar::Pred(true),
        element if element.is_float() => Scalar::Float(f32::NAN),
        element => Scalar::Int(tile::wrap(element, 0x5a5a_5a5a)),
    }
}

impl<O: Observer> Executor<'_, '_, O> {
    /// Loads as many elements as the mask has, one after another, into its lanes. Operands: the memref, its indices, the mask.
    pub(super) fn load_expanded(&mut self, operands: &[Use], extent: &Extent, to: Element, origin: u32) -> Step<Tile> {
        let (indices, mask) = operands.split_at(1 + extent.sizes.len());
        let mask = self.tile(&mask[0]);
        let set = set_lanes(&mask);
        let mut result = vec![garbage(to); len(&mask)];
        if !set.is_empty() {
            let extent = Extent { sizes: dense(extent, set.len()), steps: vec![] };
            let region = self.readable(indices, &extent, origin)?;
            self.observe_access(&region, false, None);
            let loaded = self.read(&region, &extent, to);
            set.iter().enumerate().for_each(|(from, &at)| result[at] = loaded.get(from));
        }
        Ok(of_scalars(to, &result))
    }

    /// Stores the lanes that the mask has, one after another. Operands: the tile, the memref, its indices, the mask.
    pub(super) fn store_compressed(&mut self, operands: &[Use], extent: &Extent, add: bool, origin: u32) -> Step<()> {
        let value = self.tile(&operands[0]);
        let (indices, mask) = operands[1..].split_at(1 + extent.sizes.len());
        let mask = self.tile(&mask[0]);
        let set = set_lanes(&mask);
        if set.is_empty() {
            return Ok(());
        }
        let extent = Extent { sizes: dense(extent, set.len()), steps: vec![] };
        let (view, start) = self.place(indices);
        self.store_at(picked(&value, &set), (&view, &start), &extent, None, add, origin)
    }

    /// Loads each lane from where its indices say. Operands: the memref, a tile of indices for each dimension, perhaps a mask.
    pub(super) fn load_indexed(&mut self, operands: &[Use], rank: usize, to: Element, origin: u32) -> Step<Tile> {
        let (view, places, mask) = self.indexed(operands, rank);
        let extent = Extent { sizes: vec![1; rank], steps: vec![] };
        let mut result = vec![];
        for (at, start) in places.iter().enumerate() {
            if !mask_of(mask.as_ref(), at) {
                result.push(garbage(to));
                continue;
            }
            let region = self.readable_at(&view, start, &extent, origin)?;
            self.observe_access(&region, false, None);
            result.push(self.read(&region, &extent, to).get(0));
        }
        Ok(of_scalars(to, &result))
    }

    /// Stores each lane where its indices say, in order. Operands: the tile, then as [`Self::load_indexed`].
    pub(super) fn store_indexed(&mut self, operands: &[Use], rank: usize, add: bool, origin: u32) -> Step<()> {
        let value = self.tile(&operands[0]);
        let (view, places, mask) = self.indexed(&operands[1..], rank);
        let extent = Extent { sizes: vec![1; rank], steps: vec![] };
        for (at, start) in places.iter().enumerate().filter(|(at, _)| mask_of(mask.as_ref(), *at)) {
            self.store_at(picked(&value, &[at]), (&view, start), &extent, None, add, origin)?;
        }
        Ok(())
    }

    /// A memref, the place of each lane in it, and the mask.
    fn indexed(&mut self, operands: &[Use], rank: usize) -> (Arc<super::memory::View>, Vec<Vec<i64>>, Option<Tile>) {
        let view = self.view(&operands[0]);
        let indices: Vec<Tile> = operands[1..=rank].iter().map(|read| self.tile(read)).collect();
        let place = |lane: usize| indices.iter().map(|index| i64::from(as_int(index.get(lane)))).collect();
        let places = (0..indices.first().map_or(0, len)).map(place).collect();
        let mask = operands.get(1 + rank).map(|mask| self.tile(mask));
        (view, places, mask)
    }
}

/// The sizes of a load or store of so many elements along the minor dimension.
fn dense(extent: &Extent, count: usize) -> Vec<usize> {
    let mut sizes = extent.sizes.clone();
    if let Some(last) = sizes.last_mut() {
        *last = count;
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ints(x: &[i32]) -> Tile {
        Tile::Int(Arc::new(x.to_vec()))
    }

    fn mask(x: &[u8]) -> Tile {
        Tile::Pred(Arc::new(x.iter().map(|&x| x != 0).collect()))
    }

    fn numbers(x: &Tile) -> Vec<i32> {
        (0..len(x)).map(|at| as_int(x.get(at))).collect()
    }

    #[test]
    fn scans_pass_over_what_the_mask_leaves_out() {
        let x = ints(&[3, 1, 4, 1, 5, 9]);
        let left_out = mask(&[0, 0, 1, 0, 1, 1]);
        let scanned = |how, mask| numbers(&scan(how, Element::I32, &x, 6, mask));
        assert_eq!(scanned(Reduction::Sum, None), [3, 4, 8, 9, 14, 23]);
        assert_eq!(scanned(Reduction::Sum, Some(&left_out)), [3, 1, 4, 4, 9, 18]);
        assert_eq!(scanned(Reduction::MaxUnsigned, Some(&left_out)), [3, 1, 4, 4, 5, 9]);
        // Each row by itself; integers have no sign.
        let two = numbers(&scan(Reduction::MinUnsigned, Element::I32, &ints(&[-1, 2, 1, -3]), 2, None));
        assert_eq!(two, [-1, 2, 1, 1]);
    }

    #[test]
    fn sorting_is_stable_and_masked_lanes_come_last() {
        let (keys, values) = (ints(&[2, -1, 2, 0]), ints(&[10, 11, 12, 13]));
        let sorted = |mask: Option<&Tile>, descending| sort(&keys, &values, 4, mask, descending).map(|x| numbers(&x));
        assert_eq!(sorted(None, false), [vec![1; 4], vec![0, 2, 2, -1], vec![13, 10, 12, 11]]);
        assert_eq!(sorted(None, true), [vec![1; 4], vec![-1, 2, 2, 0], vec![11, 10, 12, 13]]);
        let some = mask(&[1, 0, 1, 1]);
        assert_eq!(sorted(Some(&some), false), [vec![1, 1, 1, 0], vec![0, 2, 2, -1], vec![13, 10, 12, 11]]);
    }

    #[test]
    fn occurrences_are_counted_and_the_last_marked() {
        let x = ints(&[7, 8, 7, 7, 8]);
        assert_eq!(occurrences(&x, 5, &mask(&[1; 5])).map(|x| numbers(&x)), [vec![0, 0, 0, 1, 1], vec![1, 1, 2, 3, 2]]);
        let floats = Tile::Float(Arc::new(vec![1.5, f32::NAN, 1.5, f32::NAN]));
        assert_eq!(occurrences(&floats, 4, &mask(&[1; 4])).map(|x| numbers(&x)), [vec![0, 1, 1, 1], vec![1, 1, 2, 1]]);
        let some = mask(&[1, 1, 0, 1, 1]);
        assert_eq!(occurrences(&x, 5, &some).map(|x| numbers(&x)), [vec![0, 0, 0, 1, 1], vec![1, 1, 1, 2, 2]]);
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let types = [Element::I32, Element::I16];
        let [a, b] = [ints(&[1, -2, 3]), ints(&[40, 50, -60])];
        for (format, packed) in
            [(PackFormat::Interleaved, [1, 40, -2, 50, 3, -60]), (PackFormat::Compressed, [1, -2, 3, 40, 50, -60])]
        {
            let both = pack(&[a.clone(), b.clone()], &[0, 1], format, types, 6);
            assert_eq!(numbers(&both), packed);
            let back = [0, 1].map(|index| numbers(&unpack(&both, index, format, [Element::I16, Element::I32], true)));
            assert_eq!(back, [numbers(&a), numbers(&b)]);
        }
    }
}
