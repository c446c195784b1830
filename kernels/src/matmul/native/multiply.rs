//! The arithmetic of the matmul: columns are packed once, then every thread goes through rows of the weight.

use std::sync::Arc;

use super::{Activation, Around, Norm};
use crate::{
    float::{Float, Times, exp},
    simd::{self, Ahead, Isa, LANES, Product, Register, Task},
    threads::{self, Guard, Threads},
};

mod panels;

use panels::Panel;

/// What one core does in a nanosecond, roughly: multiply-adds, and bytes of a weight that is in a cache.
const MULTIPLY_ADDS: usize = 100;
const BYTES: usize = 60;
/// Nanoseconds that are worth a second thread, and of a piece of work.
const THREADED: usize = 12_000;
const PIECE: usize = 5_000;
/// Elements of columns that are worth a thread that packs them.
const PACKED: usize = 1 << 16;
/// Bytes of packed columns, and rows of the result, of a block that stays in a core's own cache.
const BLOCK_BYTES: usize = 1 << 18;
const BLOCK_ROWS: usize = 32;
/// Bytes of rows that stay in the nearest cache while columns pass, and how many rows these are.
const STRIP_BYTES: usize = 5 << 12;
const STRIP_ROWS: usize = 8;
/// Groups of columns from which on a strip is copied first, and from which on it is if that widens its elements.
const COPIED: usize = 8;
const WIDENED: usize = 3;

/// The operands of one call: a weight of type `T`, activations of type `X`.
#[derive(Clone, Debug)]
pub struct Call<'a, T, X> {
    /// `[n, k]`, with a gate `[2 n, k]`
    pub w: &'a [T],
    /// `[k, m]`
    pub x: &'a [X],
    /// `m`
    pub columns: usize,
    /// Norm, activation, residual.
    pub around: Around<&'a [X]>,
    /// What keeps `w` alive and unwritten beyond the call: then no thread that is late holds the caller up.
    pub resident: Option<Guard>,
}

/// Computes `y [n, m]`.
///
/// # Panics
/// When a slice does not have the size that the shape gives.
pub fn multiply<T: Times<X>, X: Float, O: Float>(call: &Call<'_, T, X>, y: &mut [O], threads: &dyn Threads) {
    let Call { w, x, columns: m, around, .. } = *call;
    if m == 0 || y.is_empty() {
        return;
    }
    let (k, n) = (x.len() / m, y.len() / m);
    let activation = around.activation;
    let halves = if activation.is_gated() { 2 } else { 1 };
    assert!(x.len() == k * m && y.len() == n * m, "{} and {} elements, {m} columns", x.len(), y.len());
    assert!(w.len() == halves * n * k, "w has {} elements for {halves} times [{n}, {k}]", w.len());
    assert!(around.residual.is_none_or(|residual| residual.len() == y.len()), "the residual's size");
    assert!(around.norm.is_none_or(|norm| norm.weight.len() == k), "the norm's weight");
    if k == 0 {
        return y.fill(O::narrow(0.0));
    }
    let packed = Arc::new(pack::<T, X>(x, m, around.norm, threads));
    let weights = halves * n * k;
    let nanoseconds = (weights * m / MULTIPLY_ADDS).max(weights * size_of::<T>() / BYTES);
    let pieces = match threads.count() {
        count if count > 1 && nanoseconds >= THREADED => {
            // Small enough that what one thread is late by is little, large enough that taking them costs nothing.
            (nanoseconds / PIECE).clamp(2 * count, 64 * count)
        }
        _ => 1,
    };
    let whole = if matches!(*packed, Packed::Panels(_)) { panels::ROWS } else { STRIP_ROWS };
    let rows = n.div_ceil(pieces).next_multiple_of(whole);
    let weight = Weight { w, n, k, activation };
    let take = |piece: usize, y: &mut [O], made: Vec<f32>| {
        let residual = around.residual.map(|residual| &residual[piece * rows * m..][..y.len()]);
        for (at, (y, made)) in y.iter_mut().zip(made).enumerate() {
            *y = O::narrow(residual.map_or(made, |residual| made + residual[at].widen()));
        }
    };
    match &call.resident {
        Some(guard) if pieces > 1 => {
            let elsewhere = Elsewhere { w: w.as_ptr(), length: w.len(), guard: Arc::clone(guard) };
            let columns = Arc::clone(&packed);
            let work = move |piece: usize| {
                let weight = Weight { w: elsewhere.values(), n, k, activation };
                weight.rows::<X>(piece * rows, rows, &columns, m)
            };
            threads.race(n.div_ceil(rows), Arc::new(work), &mut |piece, made| {
                let made = made.unwrap_or_else(|| weight.rows::<X>(piece * rows, rows, &packed, m));
                let first = piece * rows * m;
                take(piece, &mut y[first..][..made.len()], made);
            });
        }
        _ => {
            let parts = y.chunks_mut(rows * m).enumerate();
            threads::for_each(threads, parts.collect(), |(piece, y)| {
                take(piece, y, weight.rows::<X>(piece * rows, rows, &packed, m));
            });
        }
    }
}

/// All columns; many are packed by all threads.
fn pack<T: Times<X>, X: Float>(x: &[X], m: usize, norm: Option<Norm<&[X]>>, threads: &dyn Threads) -> Packed {
    let parts = (x.len() / PACKED).clamp(1, threads.count());
    let mut packed: Vec<_> = (0..parts).map(|_| Packed::Groups(vec![])).collect();
    threads::for_each(threads, packed.iter_mut().enumerate().collect(), |(part, packed)| {
        *packed = T::pack(Pack { x, m, norm, part: [part, parts] });
    });
    packed.into_iter().reduce(Packed::and).expect("a part at least")
}

/// A weight that stays where it is for as long as its guard lives.
struct Elsewhere<T> {
    w: *const T,
    length: usize,
    #[expect(dead_code, reason = "it is held, not looked at")]
    guard: Guard,
}

// SAFETY: it is only read, and its elements may be read by any thread.
unsafe impl<T: Sync> Send for Elsewhere<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Elsewhere<T> {}

impl<T> Elsewhere<T> {
    fn values(&self) -> &[T] {
        // SAFETY: it was made of a slice, and who gave the guard promised that the memory stays as it is.
        unsafe { std::slice::from_raw_parts(self.w, self.length) }
    }
}

/// `[n, k]`, with a gate `[2 n, k]`.
#[derive(Clone, Copy)]
struct Weight<'w, T> {
    w: &'w [T],
    n: usize,
    k: usize,
    activation: Activation,
}

impl<T> Weight<'_, T> {
    /// Up to `most` rows of the product from row `first` on, gated where it is.
    fn rows<X>(&self, first: usize, most: usize, packed: &Packed, m: usize) -> Vec<f32>
    where
        T: Times<X>,
    {
        let (k, count) = (self.k, most.min(self.n - first));
        let rows = |first: usize| &self.w[first * k..][..count * k];
        let mut y = vec![0.0; count * m];
        let mut up_y = vec![0.0; if self.activation.is_gated() { count * m } else { 0 }];
        let up = self.activation.is_gated().then(|| Up {
            rows: rows(self.n + first),
            y: &mut up_y,
            activation: self.activation,
        });
        T::part(Part { gate: rows(first), up, packed, y: &mut y, k, m });
        y
    }
}

/// Columns, packed as registers take them.
pub enum Packed {
    /// A few: elements of a column are the lanes.
    Groups(Vec<Group>),
    /// Many: columns are the lanes.
    Panels(Vec<Panel>),
}

/// Columns that are multiplied with the rows of the weight together.
pub struct Group {
    /// The first of them.
    first: usize,
    columns: usize,
    /// `[steps, columns, registers of a step]`, zeros beyond the last element.
    registers: Vec<Register>,
}

impl Packed {
    /// These, then those, which are of the same form.
    fn and(mut self, other: Self) -> Self {
        match (&mut self, other) {
            (Self::Groups(groups), Self::Groups(others)) => groups.extend(others),
            (Self::Panels(panels), Self::Panels(others)) => panels.extend(others),
            _ => unreachable!("one form for all columns"),
        }
        self
    }
}

/// Packs columns of `norm(x)`.
pub struct Pack<'p, X> {
    /// `[k, m]`
    x: &'p [X],
    m: usize,
    norm: Option<Norm<&'p [X]>>,
    /// Which part of the groups or panels this is, and of how many.
    part: [usize; 2],
}

impl<T: Float, X: Float> Task<T> for Pack<'_, X> {
    type Output = Packed;

    #[inline(always)]
    fn run<P: Product<Element = T>>(self, p: P) -> Packed {
        let Self { x, m, norm, part: [part, parts] } = self;
        if panels::is_many::<P>(m) {
            return Packed::Panels(self.panels(p));
        }
        let (k, count) = (x.len() / m, m.div_ceil(P::Isa::COLUMNS));
        let steps = k.div_ceil(P::ELEMENTS);
        // As even as can be.
        let first = |group: usize| group * m / count;
        let mut groups: Vec<_> = (part * count / parts..(part + 1) * count / parts)
            .map(|group| {
                let columns = first(group + 1) - first(group);
                // [steps, columns, elements of a step]
                (first(group), columns, vec![0.0; steps * columns * P::ELEMENTS])
            })
            .collect();
        match (&mut groups[..], m) {
            // It lies as it is packed.
            ([(_, _, wide)], 1) => wide.iter_mut().zip(x).for_each(|(wide, x)| *wide = x.widen()),
            // Rows of `x` once for all groups.
            (groups, _) => {
                for step in 0..steps {
                    let rows = &x[step * P::ELEMENTS * m..x.len().min((step + 1) * P::ELEMENTS * m)];
                    for (first, columns, wide) in &mut *groups {
                        let wide = &mut wide[step * *columns * P::ELEMENTS..][..*columns * P::ELEMENTS];
                        match *columns {
                            1 => transpose::<X, 1>(rows, m, *first, wide, P::ELEMENTS),
                            2 => transpose::<X, 2>(rows, m, *first, wide, P::ELEMENTS),
                            3 => transpose::<X, 3>(rows, m, *first, wide, P::ELEMENTS),
                            4 => transpose::<X, 4>(rows, m, *first, wide, P::ELEMENTS),
                            5 => transpose::<X, 5>(rows, m, *first, wide, P::ELEMENTS),
                            _ => transpose::<X, 6>(rows, m, *first, wide, P::ELEMENTS),
                        }
                    }
                }
            }
        }
        let mut packed = Vec::with_capacity(groups.len());
        for (first, columns, mut wide) in groups {
            if let Some(norm) = norm {
                normalize(p, &mut wide, columns, norm);
            }
            let mut registers = vec![Register::ZERO; steps * columns * P::REGISTERS];
            for (step, registers) in wide.chunks_exact(P::ELEMENTS).zip(registers.chunks_exact_mut(P::REGISTERS)) {
                p.pack(step, registers);
            }
            packed.push(Group { first, columns, registers });
        }
        Packed::Groups(packed)
    }
}

/// `C` columns of rows of `m` elements, one behind the other, `of_column` elements each.
#[inline(always)]
fn transpose<X: Float, const C: usize>(rows: &[X], m: usize, first: usize, columns: &mut [f32], of_column: usize) {
    for (at, row) in rows.chunks_exact(m).enumerate() {
        let row: &[X; C] = row[first..].first_chunk().expect("as many columns");
        for column in 0..C {
            columns[column * of_column + at] = row[column].widen();
        }
    }
}

/// The norm of each of some columns, `[steps, columns, elements of a step]`. A column's squares are summed in one order.
#[inline(always)]
fn normalize<P: Product, X: Float>(p: P, wide: &mut [f32], columns: usize, norm: Norm<&[X]>) {
    let (isa, k) = (p.isa(), norm.weight.len());
    // A column that is alone is one piece.
    let elements = if columns == 1 { wide.len() } else { P::ELEMENTS };
    for column in 0..columns {
        let mut squares = isa.splat(0.0);
        for step in wide.chunks_exact(columns * elements) {
            for x in step[column * elements..][..elements].as_chunks::<LANES>().0 {
                let x = isa.load(x);
                squares = isa.fma(x, x, squares);
            }
        }
        let [squares, ..] = isa.sums([squares; 4]);
        let scale = 1.0 / (squares / k as f32 + norm.epsilon as f32).sqrt();
        let weights = norm.weight.chunks(elements);
        for (step, weights) in wide.chunks_exact_mut(columns * elements).zip(weights) {
            let pairs = step[column * elements..].iter_mut().zip(weights);
            let plus_one = norm.plus_one;
            pairs.for_each(|(x, weight)| *x = normalized::<X>(*x, scale, weight.widen(), plus_one));
        }
    }
}

/// An element of a column behind the norm.
#[inline(always)]
fn normalized<X: Float>(x: f32, scale: f32, weight: f32, plus_one: bool) -> f32 {
    match plus_one {
        true => X::narrow(x * scale * (1.0 + weight)).widen(),
        false => X::narrow(X::narrow(x * scale).widen() * weight).widen(),
    }
}

/// Some rows of the result, and of the weight.
pub struct Part<'p, T> {
    /// The weight's rows, or those of the gate.
    gate: &'p [T],
    up: Option<Up<'p, T>>,
    packed: &'p Packed,
    y: &'p mut [f32],
    k: usize,
    m: usize,
}

/// What is gated, and how.
pub struct Up<'p, T> {
    /// Of the weight.
    rows: &'p [T],
    /// Room for it.
    y: &'p mut [f32],
    activation: Activation,
}

impl<T: Float> Task<T> for Part<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<P: Product<Element = T>>(mut self, p: P) {
        match self.packed {
            Packed::Panels(panels) => self.panels(p, panels),
            Packed::Groups(groups) => match (P::Isa::FEW, self.m <= P::Isa::FEW) {
                (1, false) => self.strips::<P, 2>(p, groups),
                (1, true) | (_, false) => self.strips::<P, 4>(p, groups),
                (_, true) => self.strips::<P, 8>(p, groups),
            },
        }
        // All at once: a tile's would be too few for its exponentials to overlap.
        if let Some(up) = self.up {
            gate(up.activation, self.y, up.y);
        }
    }
}

/// Most rows, and most columns, of a tile.
const MOST: [usize; 2] = [8, 6];

impl<T: Float> Part<'_, T> {
    /// Goes through the result by tiles of as many rows as make `R` rows of the weight. Where there are several groups of
    /// columns, all loops are over blocks that stay in a cache: the elements of some steps of a strip's tiles, in the nearest
    /// one, meet every group of a block before the next strip comes, so that a group comes from the cache behind it once for all
    /// of these tiles. The sums wait in memory for the next steps.
    #[inline(always)]
    fn strips<P: Product<Element = T>, const R: usize>(&mut self, p: P, groups: &[Group]) {
        let (k, m) = (self.k, self.m);
        let whole = k / P::ELEMENTS;
        // For many groups a strip is copied first: rows that lie a power of two apart would share few places of the cache, and
        // narrow elements become floats once.
        let many = if P::FLOATS > 1 { WIDENED } else { COPIED };
        let widens = P::PACKS_FLOATS && groups.len() >= many;
        let bytes = if widens { size_of::<f32>() } else { size_of::<T>() };
        let most_steps = STRIP_BYTES / (STRIP_ROWS * P::ELEMENTS * bytes);
        let (steps, tiles) = match groups.len() {
            1 => (whole.max(1), 1),
            _ => (whole.div_ceil(whole.div_ceil(most_steps).max(1)).max(1), STRIP_ROWS / R),
        };
        let column_bytes = steps.min(whole + 1) * P::REGISTERS * size_of::<Register>();
        let in_block = (BLOCK_BYTES / (column_bytes * groups[0].columns)).max(2);
        let rows = if self.up.is_some() { R / 2 } else { R };
        let count = self.y.len() / m;
        let waiting = if whole > steps { BLOCK_ROWS.div_ceil(rows) * in_block.min(groups.len()) } else { 0 };
        let of_row = if widens { steps * P::FLOATS } else { 0 };
        let mut memory = Memory {
            partial: vec![Register::ZERO; waiting * R * P::Isa::COLUMNS],
            wide: vec![Register::ZERO; tiles * R * of_row],
        };
        for begin in (0..count).step_by(BLOCK_ROWS) {
            let end = count.min(begin + BLOCK_ROWS);
            for block in groups.chunks(in_block) {
                let mut from = 0;
                loop {
                    let to = whole.min(from + steps);
                    for (number, first) in (begin..end).step_by(rows * tiles).enumerate() {
                        let strip = Strip { first, end: end.min(first + rows * tiles), rows, number, tiles, from, to };
                        self.strip::<P, R>(p, &strip, block, &mut memory);
                    }
                    from = to;
                    if from == whole {
                        break;
                    }
                }
            }
        }
    }

    /// A strip by the groups of a block.
    #[inline(always)]
    fn strip<P: Product<Element = T>, const R: usize>(
        &mut self,
        p: P,
        strip: &Strip,
        block: &[Group],
        memory: &mut Memory,
    ) {
        let (count, sums) = (self.y.len() / self.m, R * P::Isa::COLUMNS);
        let &Strip { first, end, rows, number, tiles, from, to } = strip;
        let next = rows * tiles * self.k;
        let firsts = (first..end).step_by(rows);
        let mut pointers = [[self.gate.as_ptr(); R]; STRIP_ROWS];
        let of_tile = memory.wide.len() / tiles;
        for ((first, pointers), index) in firsts.clone().zip(&mut pointers).zip(0..) {
            *pointers = self.tile_rows::<R>(first, rows, count);
            if of_tile > 0 {
                self.widen(p, *pointers, [from, to], &mut memory.wide[index * of_tile..][..of_tile], next);
            }
        }
        for (at, group) in block.iter().enumerate() {
            for ((first, rows_of_tile), index) in firsts.clone().zip(&pointers).zip(0..) {
                let tile = Tile { first, rows: rows.min(count - first), from, to, half: rows };
                let place = ((number * tiles + index) * block.len() + at) * sums;
                let partial = memory.partial.get_mut(place..place + sums).unwrap_or_default();
                // The next strip is on its way while this one is worked on, a tile of it with each group.
                let ahead = if index.min(block.len() - 1) == at { next } else { 0 };
                let left = Left { rows: *rows_of_tile, wide: &memory.wide[index * of_tile..][..of_tile], ahead };
                match group.columns {
                    1 => self.tile::<P, R, 1>(p, &left, group, &tile, partial),
                    2 => self.tile::<P, R, 2>(p, &left, group, &tile, partial),
                    3 => self.tile::<P, R, 3>(p, &left, group, &tile, partial),
                    4 => self.tile::<P, R, 4>(p, &left, group, &tile, partial),
                    5 => self.tile::<P, R, 5>(p, &left, group, &tile, partial),
                    _ => self.tile::<P, R, 6>(p, &left, group, &tile, partial),
                }
            }
        }
    }

    /// The weight's rows of the results from `first` on, `rows` at most of `count`: beyond the last one that one again, whose
    /// sums are not kept.
    #[inline(always)]
    fn tile_rows<const R: usize>(&self, first: usize, rows: usize, count: usize) -> [*const T; R] {
        let live = rows.min(count - first);
        let mut pointers = [self.gate.as_ptr(); R];
        for (row, pointer) in pointers.iter_mut().enumerate() {
            let (half, row) = match row < rows {
                true => (self.gate, row),
                false => (self.up.as_ref().map_or(self.gate, |up| up.rows), row - rows),
            };
            *pointer = half[(first + row.min(live - 1)) * self.k..][..self.k].as_ptr();
        }
        pointers
    }

    /// Some steps of rows as floats; what lies `ahead` of them is asked for.
    #[inline(always)]
    fn widen<P: Product<Element = T>, const R: usize>(
        &self,
        p: P,
        rows: [*const T; R],
        [from, to]: [usize; 2],
        wide: &mut [Register],
        ahead: usize,
    ) {
        let of_row = wide.len() / R;
        assert!((to - from) * P::FLOATS <= of_row && to * P::ELEMENTS <= self.k);
        for (row, wide) in rows.into_iter().zip(wide.chunks_exact_mut(of_row)) {
            for (step, wide) in (from..to).zip(wide.chunks_exact_mut(P::FLOATS)) {
                let mut floats = [p.isa().splat(0.0); 2];
                p.isa().fetch(row.wrapping_add(step * P::ELEMENTS + ahead).cast());
                // SAFETY: the row has `k` elements.
                unsafe { p.floats(row.add(step * P::ELEMENTS), &mut floats) };
                wide.iter_mut().zip(floats).for_each(|(wide, floats)| p.isa().store(floats, &mut wide.0));
            }
        }
    }

    /// Rows by the columns of a group, over the steps of a tile.
    #[inline(always)]
    fn tile<P: Product<Element = T>, const R: usize, const C: usize>(
        &mut self,
        p: P,
        &Left { rows, wide, ahead }: &Left<'_, T, R>,
        group: &Group,
        tile: &Tile,
        partial: &mut [Register],
    ) {
        if C > P::Isa::COLUMNS || R > 4 && C > P::Isa::FEW {
            unreachable!("groups are of fewer columns");
        }
        let (isa, k) = (p.isa(), self.k);
        let mut sums = [[isa.splat(0.0); C]; R];
        if tile.from > 0 {
            for row in 0..R {
                for column in 0..C {
                    sums[row][column] = isa.load(&partial[row * C + column].0);
                }
            }
        }
        let mut at = rows;
        for row in 0..R {
            at[row] = rows[row].wrapping_add(tile.from * P::ELEMENTS);
        }
        assert!(group.registers.len() == k.div_ceil(P::ELEMENTS) * C * P::REGISTERS && tile.to * P::ELEMENTS <= k);
        let columns = group.registers[tile.from * C * P::REGISTERS..].as_ptr();
        let steps = tile.to - tile.from;
        assert!(wide.is_empty() || wide.len() >= R * steps * P::FLOATS);
        // SAFETY: rows are of `k` elements, and the columns of as many, filled up to a step; floats are of as many steps.
        sums = unsafe {
            match ahead {
                _ if !wide.is_empty() => {
                    let mut floats = [wide.as_ptr(); R];
                    for row in 1..R {
                        floats[row] = wide[row * (wide.len() / R)..].as_ptr();
                    }
                    simd::multiply_floats::<P, R, C>(p, floats, columns, steps, sums)
                }
                0 => simd::multiply::<P, R, C, false>(p, at, columns, steps, sums, &Ahead::nothing(at)),
                _ => {
                    // Whole rows that lie one behind the other, of the gate and of what is gated, come in the order in which they
                    // lie: rows that are a power of two apart would share few places of the cache.
                    let stride = if steps == k / P::ELEMENTS { R / 2 } else { 1 };
                    let mut far = at;
                    for (row, far) in far.iter_mut().enumerate() {
                        let first = row / stride * stride;
                        *far = at[first].wrapping_add(ahead + (row - first) * P::ELEMENTS);
                    }
                    let ahead = Ahead { at: far, stride: stride * P::ELEMENTS };
                    simd::multiply::<P, R, C, true>(p, at, columns, steps, sums, &ahead)
                }
            }
        };
        if tile.to < k / P::ELEMENTS {
            for row in 0..R {
                for column in 0..C {
                    isa.store(sums[row][column], &mut partial[row * C + column].0);
                }
            }
            return;
        }
        // SAFETY: as above.
        sums = unsafe { simd::multiply_rest(p, rows, group.registers.as_ptr(), k, sums) };
        self.finish(simd::sums(p, &sums), group.first, tile);
    }

    /// Keeps the sums of a tile.
    #[inline(always)]
    fn finish<const R: usize, const C: usize>(&mut self, sums: [[f32; C]; R], first_column: usize, tile: &Tile) {
        let m = self.m;
        // [rows, columns] in one array of whole registers.
        let mut flat = [0.0; MOST[0] * MOST[1]];
        for row in 0..R {
            for column in 0..C {
                flat[row * C + column] = sums[row][column];
            }
        }
        let mut up = self.up.as_mut().map(|up| &mut *up.y);
        for row in 0..tile.rows {
            let first = (tile.first + row) * m + first_column;
            self.y[first..][..C].copy_from_slice(&flat[row * C..][..C]);
            if let Some(up) = &mut up {
                up[first..][..C].copy_from_slice(&flat[(tile.half + row) * C..][..C]);
            }
        }
    }
}

/// Gates what is beside them.
#[inline(always)]
fn gate(activation: Activation, gates: &mut [f32], up: &[f32]) {
    let pairs = gates.iter_mut().zip(up);
    match activation {
        Activation::GeluGate => pairs.for_each(|(gate, up)| *gate *= sigmoid(gelu_argument(*gate)) * up),
        Activation::Identity | Activation::SiluGate => pairs.for_each(|(gate, up)| *gate *= sigmoid(*gate) * up),
    }
}

/// What is kept from one tile to another.
struct Memory {
    /// Sums that wait for the next steps, if there are: `[tiles of a block, groups, R * most columns]`.
    partial: Vec<Register>,
    /// A strip's steps as floats, if they are made: `[tiles, R, steps, registers of a step]`.
    wide: Vec<Register>,
}

/// Tiles of the result that lie below each other, and steps along their rows.
struct Strip {
    /// The first row of the result, and the one behind the last.
    first: usize,
    end: usize,
    /// Of a tile.
    rows: usize,
    /// Which strip of the block of rows it is, and how many tiles each has.
    number: usize,
    tiles: usize,
    from: usize,
    to: usize,
}

/// Rows of the weight.
struct Left<'a, T, const R: usize> {
    rows: [*const T; R],
    /// The steps of a tile as floats, if they were made: `[R, steps, registers of a step]`.
    wide: &'a [Register],
    /// How far behind elements lie those that are asked for meanwhile; 0 for none.
    ahead: usize,
}

/// Rows of the result, and steps along them.
struct Tile {
    first: usize,
    /// How many are live.
    rows: usize,
    from: usize,
    to: usize,
    /// Rows of the gate, before those of what is gated.
    half: usize,
}

/// GELU is the gate times the sigmoid of this.
#[inline(always)]
fn gelu_argument(x: f32) -> f32 {
    x * (x * x * Activation::GELU_CUBE as f32 + 1.0) * (2.0 * Activation::GELU_SCALE) as f32
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    // Of the two forms the one whose exponential cannot overflow.
    let e = exp(-x.abs());
    (if x < 0.0 { e } else { 1.0 }) / (1.0 + e)
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use pagoda_ir::{Element, HostTensor};

    use super::*;
    use crate::{
        check::compare,
        matmul::{Epilogue, Layout, Problem, Spec, reference::reference},
        named::Arrays,
        threads::{Caller, Scoped},
    };

    fn value(i: usize) -> f64 {
        ((i * 7919 + 13) % 257) as f64 / 64.0 - 2.0
    }

    fn tensor(element: Element, dims: &[usize], first: usize) -> HostTensor {
        let values: Vec<f64> = (0..dims.iter().product()).map(|i| value(i + first)).collect();
        HostTensor::from_f64(element, dims, &values)
    }

    /// With the weight in type `T`, which holds its values.
    fn run<T: Times<X>, X: Float>(problem: &Problem, inputs: &Arrays, threads: &dyn Threads) -> HostTensor {
        let mut output = tensor(problem.output, &problem.output_type().dims, 0);
        let residual = inputs.get("residual").map(|residual| residual.as_slice::<X>());
        let around = Around { norm: None, activation: problem.epilogue.activation, residual };
        let w: Vec<T> = inputs["w"].to_f64().into_iter().map(|w| T::narrow(w as f32)).collect();
        let x = inputs["x"].as_slice::<X>();
        let call = Call { w: &w[..], x, columns: problem.m, around, resident: None };
        multiply(&call, output.as_mut_slice::<X>(), threads);
        output
    }

    #[test]
    fn every_width_and_epilogue_matches_the_reference() {
        for (n, k) in [(1, 1), (7, 33), (515, 96)] {
            for (m, bits) in (1..=20).chain([63, 64, 70]).flat_map(|m| (0..8).map(move |bits| (m, bits))) {
                let element = if bits & 1 == 0 { Element::F32 } else { Element::Bf16 };
                let gate = if m % 2 == 0 { Activation::SiluGate } else { Activation::GeluGate };
                let activation = if bits & 2 == 0 { Activation::Identity } else { gate };
                let epilogue = Epilogue { bias: false, activation, residual: bits & 4 != 0 };
                let layout = Layout::FeatureMajor;
                let problem = Problem::new(Spec {
                    m,
                    k,
                    n,
                    input: element,
                    output: element,
                    layout,
                    epilogue,
                    layers: 1,
                    quantized: None,
                })
                .unwrap();
                let arguments = problem.arguments();
                let arrays = arguments.iter().zip([5, 0, 11]);
                let inputs = arguments.name(arrays.map(|(argument, first)| tensor(element, &argument.ty.dims, first)));
                let expected = reference(&problem, &inputs);
                type Form = fn(&Problem, &Arrays, &dyn Threads) -> HostTensor;
                let forms: &[Form] = match element {
                    Element::F32 => &[run::<f32, f32>, run::<bf16, f32>],
                    _ => &[run::<bf16, bf16>],
                };
                for (form, run) in forms.iter().enumerate() {
                    let actual = run(&problem, &inputs, &Caller);
                    compare("native", &actual, &expected)
                        .unwrap_or_else(|error| panic!("form {form}, [{n}, {k}] x {m} {epilogue:?}: {error}"));
                    let shared = run(&problem, &inputs, &Scoped(3));
                    assert!(shared == actual, "form {form}, [{n}, {k}] x {m}: threads show in the result");
                }
            }
        }
    }

    #[test]
    fn the_norm_is_that_of_each_column() {
        let (n, k, epsilon) = (5, 48, 1e-5);
        for (m, plus_one) in [1, 3, 8, 17, 70].into_iter().flat_map(|m| [(m, false), (m, true)]) {
            let (w, x, weight) =
                (tensor(Element::F32, &[n, k], 0), tensor(Element::F32, &[k, m], 5), tensor(Element::F32, &[k], 9));
            let norm = Some(Norm { weight: weight.as_slice(), epsilon, plus_one });
            let around = Around { norm, ..Around::NOTHING };
            let mut y = vec![f32::NAN; n * m];
            multiply(
                &Call { w: w.as_slice::<f32>(), x: x.as_slice(), columns: m, around, resident: None },
                &mut y,
                &Caller,
            );
            let offset = if plus_one { 1.0 } else { 0.0 };
            let (w, x, weight) =
                (w.to_f64(), x.to_f64(), weight.to_f64().iter().map(|w| offset + w).collect::<Vec<_>>());
            for column in 0..m {
                let squares: f64 = (0..k).map(|i| x[i * m + column].powi(2)).sum();
                let scale = (squares / k as f64 + epsilon).sqrt().recip();
                for row in 0..n {
                    let terms = (0..k).map(|i| w[row * k + i] * x[i * m + column] * scale * weight[i]);
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                    assert!((f64::from(y[row * m + column]) - sum).abs() <= 2e-5 * size, "{row} {column} of {m}");
                }
            }
        }
    }

    /// Whatever stands beside it, and on however many threads: the strips of long rows included.
    #[test]
    fn a_column_depends_on_itself_alone() {
        fn result<T: Times<X>, X: Float>(k: usize, m: usize, place: usize) -> Vec<u32> {
            let n = 40;
            let w: Vec<T> = (0..n * k).map(|i| T::narrow(value(i) as f32)).collect();
            let number = |i: usize| if i % m == place { value(i / m * 17) as f32 } else { (i % 5) as f32 };
            let x: Vec<X> = (0..k * m).map(|i| X::narrow(number(i))).collect();
            let weight: Vec<X> = (0..k).map(|i| X::narrow(value(i + 5) as f32)).collect();
            let mut y = vec![0f32; n * m];
            let norm = Some(Norm { weight: &weight[..], epsilon: 1e-5, plus_one: false });
            let around = Around { norm, ..Around::NOTHING };
            let call = Call { w: &w, x: &x, columns: m, around, resident: None };
            multiply(&call, &mut y, &Scoped(3));
            // Pieces that are made elsewhere and taken over are the same.
            let mut raced = vec![0f32; n * m];
            multiply(&Call { resident: Some(Arc::new(())), ..call }, &mut raced, &Scoped(3));
            assert_eq!(y, raced);
            (0..n).map(|row| y[row * m + place].to_bits()).collect()
        }
        let results = |k, m, place| {
            let of_one_type = [result::<f32, f32>(k, m, place), result::<bf16, bf16>(k, m, place)];
            (of_one_type, result::<bf16, f32>(k, m, place))
        };
        for (k, most) in [(96, 40), (100, 70), (4100, 70), (9000, 100)] {
            let alone = results(k, 1, 0);
            for (m, place) in [(2, 1), (3, 0), (7, 5), (8, 7), (23, 22), (most, 0), (most, most - 1)] {
                assert_eq!(results(k, m, place), alone, "{place} of {m}, {k} long");
            }
        }
    }

    /// Where the processor has several: they sum in one order.
    #[test]
    fn instruction_sets_agree() {
        use crate::simd::{Portable, Split, Task};
        let n = 9;
        for (m, k) in [(1, 333), (2, 333), (5, 333), (13, 333), (70, 333), (70, 4100)] {
            let numbers = |count: usize, first: usize| -> Vec<bf16> {
                (0..count).map(|i| bf16::narrow(value(i + first) as f32)).collect()
            };
            let (w, x) = (numbers(n * k, 0), numbers(k * m, 7));
            let mut best = vec![0f32; n * m];
            multiply(&Call { w: &w, x: &x, columns: m, around: Around::NOTHING, resident: None }, &mut best, &Caller);
            let wide: Vec<f32> = x.iter().map(|x| x.widen()).collect();
            let mut mixed = vec![0f32; n * m];
            let call = Call { w: &w, x: &wide, columns: m, around: Around::NOTHING, resident: None };
            multiply(&call, &mut mixed, &Caller);
            let mut plain = vec![0f32; n * m];
            let packed = Pack { x: &x, m, norm: None, part: [0, 1] }.run(Split(Portable));
            Part { gate: &w, up: None, packed: &packed, y: &mut plain, k, m }.run(Split(Portable));
            // Values of few bits: every sum is exact, in any order.
            assert_eq!([&best, &mixed], [&plain; 2], "{m} columns");
        }
    }
}
