//! The product with many columns: sixteen of them are the lanes of a register ([`chains`]), and rows of the weight come
//! element by element.
//!
//! Operands are packed by chunks along `k` that the second cache holds: a *panel* has the columns of a tile, a *slab* its rows. The
//! slabs of a block meet a panel's chunk before the next panel comes. Sums wait between chunks, one for each chain.

use super::{Norm, Pack, Part, normalized};
use crate::{
    float::Float,
    simd::{
        Isa, LANES, Product, Register,
        chains::{self, Operands, Sums, chain, position},
    },
};

/// Columns from which on there are panels: a slab is packed for each call, which must pay.
const MANY: usize = 64;
/// Elements along `k` of a chunk, at most.
const CHUNK: usize = 2048;
/// Bytes of the slabs of a block.
const SLABS: usize = 3 << 16;
/// Most registers of a tile.
const MOST: usize = 12 * 2;
/// Rows of whole slabs, whatever the tile, and several of them for a panel's chunk.
pub(super) const ROWS: usize = 24;

/// Whether that many columns are packed as panels. Not where the processor multiplies narrow elements as they are.
pub(super) fn is_many<P: Product>(columns: usize) -> bool {
    P::PACKS_FLOATS && columns >= MANY
}

/// Registers of columns of a panel.
const fn registers<I: Isa>() -> usize {
    if I::FEW == 1 { 1 } else { 2 }
}

/// Chunks along `k`, as even as can be, in steps of a product.
#[derive(Clone, Copy)]
struct Chunks {
    /// Along all of `k`, and of a chunk.
    steps: usize,
    of_chunk: usize,
}

impl Chunks {
    fn new<P: Product>(k: usize) -> Self {
        let steps = k.div_ceil(P::ELEMENTS);
        Self { steps, of_chunk: steps.div_ceil(k.div_ceil(CHUNK)) }
    }

    fn count(self) -> usize {
        self.steps.div_ceil(self.of_chunk)
    }

    /// The steps of a chunk.
    fn range(self, chunk: usize) -> [usize; 2] {
        [chunk, chunk + 1].map(|chunk| self.steps.min(chunk * self.of_chunk))
    }

    /// The length of a chunk's chains.
    fn length<P: Product>(self, chunk: usize) -> usize {
        let [from, to] = self.range(chunk);
        (to - from) * P::FLOATS
    }
}

/// Columns of a panel, packed by chunks: `[chunks, chains, length, registers]`, zeros beyond the last column and element.
pub struct Panel {
    /// The first of them.
    first: usize,
    registers: Vec<Register>,
}

impl<X: Float> Pack<'_, X> {
    /// A part of the panels.
    #[inline(always)]
    pub(super) fn panels<P: Product>(&self, p: P) -> Vec<Panel> {
        let width = LANES * registers::<P::Isa>();
        let (count, [part, parts]) = (self.m.div_ceil(width), self.part);
        let mut panels = Vec::new();
        for panel in part * count / parts..(part + 1) * count / parts {
            panels.push(match registers::<P::Isa>() {
                1 => self.panel::<P, 1>(p, panel * width),
                _ => self.panel::<P, 2>(p, panel * width),
            });
        }
        panels
    }

    #[inline(always)]
    fn panel<P: Product, const C: usize>(&self, p: P, first: usize) -> Panel {
        let Self { x, m, norm, .. } = *self;
        let k = x.len() / m;
        let columns = (LANES * C).min(m - first);
        let scales = norm.map(|norm| self.scales::<P, C>(p, norm, first, columns));
        let chunks = Chunks::new::<P>(k);
        let mut registers = vec![Register::ZERO; LANES * chunks.steps * P::FLOATS * C];
        let mut wide = [[0.0; LANES]; C];
        for (element, row) in x.chunks_exact(m).enumerate() {
            widen(&row[first..][..columns], &mut wide);
            if let (Some(norm), Some(scales)) = (norm, &scales) {
                let weight = norm.weight[element].widen();
                for (wide, scale) in wide.as_flattened_mut().iter_mut().zip(scales.as_flattened()) {
                    *wide = normalized::<X>(*wide, *scale, weight, norm.plus_one);
                }
            }
            let chunk = element / P::ELEMENTS / chunks.of_chunk;
            let before = chunks.range(chunk)[0];
            let [chain, place] = position::<P>(element - before * P::ELEMENTS);
            let at = LANES * before * P::FLOATS + chain * chunks.length::<P>(chunk) + place;
            for column in 0..C {
                registers[at * C + column].0 = wide[column];
            }
        }
        Panel { first, registers }
    }

    /// What the norm multiplies each column by. Its squares are summed as [`super::normalize`] does.
    #[inline(always)]
    fn scales<P: Product, const C: usize>(
        &self,
        p: P,
        norm: Norm<&[X]>,
        first: usize,
        columns: usize,
    ) -> [[f32; LANES]; C] {
        let (isa, k) = (p.isa(), norm.weight.len());
        let mut squares = [[isa.splat(0.0); C]; LANES];
        let mut wide = [[0.0; LANES]; C];
        for (element, row) in self.x.chunks_exact(self.m).enumerate() {
            widen(&row[first..][..columns], &mut wide);
            for column in 0..C {
                let x = isa.load(&wide[column]);
                let squares = &mut squares[element % LANES][column];
                *squares = isa.fma(x, x, *squares);
            }
        }
        let mut scales = wide;
        for column in 0..C {
            let mut sums = squares;
            // The tree: lanes two apart, then neighbours; fours in the same way.
            for distance in [2, 1, 8, 4] {
                for lane in 0..LANES {
                    if lane & distance == 0 {
                        sums[lane][column] = isa.add(sums[lane][column], sums[lane + distance][column]);
                    }
                }
            }
            isa.store(sums[0][column], &mut scales[column]);
            for scale in &mut scales[column] {
                *scale = 1.0 / (*scale / k as f32 + norm.epsilon as f32).sqrt();
            }
        }
        scales
    }
}

/// A row's elements in some columns.
#[inline(always)]
fn widen<X: Float, const C: usize>(row: &[X], wide: &mut [[f32; LANES]; C]) {
    wide.as_flattened_mut().iter_mut().zip(row).for_each(|(wide, x)| *wide = x.widen());
}

impl<T: Float> Part<'_, T> {
    /// Goes through the result by panels.
    #[inline(always)]
    pub(super) fn panels<P: Product<Element = T>>(&mut self, p: P, panels: &[Panel]) {
        match registers::<P::Isa>() {
            1 => self.by_panels::<P, 6, 1>(p, panels),
            _ => self.by_panels::<P, 12, 2>(p, panels),
        }
    }

    #[inline(always)]
    fn by_panels<P: Product<Element = T>, const R: usize, const C: usize>(&mut self, p: P, panels: &[Panel]) {
        let chunks = Chunks::new::<P>(self.k);
        let rows = if self.up.is_some() { R / 2 } else { R };
        let count = self.y.len() / self.m;
        // Floats of a slab of the longest chunk.
        let of_slab = LANES * chunks.of_chunk * P::FLOATS * R;
        let slabs = (SLABS / (of_slab * size_of::<f32>())).clamp(1, count.div_ceil(rows));
        let mut packed = vec![0.0; slabs * of_slab];
        // `[slabs, panels, chains, R, C]`, written before they are read.
        let waiting = if chunks.count() > 1 { slabs * panels.len() } else { 0 };
        let mut partial = Vec::<Register>::with_capacity(waiting * LANES * R * C);
        for begin in (0..count).step_by(slabs * rows) {
            let firsts = (begin..count.min(begin + slabs * rows)).step_by(rows);
            for chunk in 0..chunks.count() {
                let (range, length) = (chunks.range(chunk), chunks.length::<P>(chunk));
                for (slab, first) in firsts.clone().enumerate() {
                    let pointers = self.tile_rows::<R>(first, rows, count);
                    let slab = &mut packed[slab * of_slab..][..LANES * length * R];
                    self.pack_slab::<P, R>(p, pointers, range, slab);
                }
                for (at, panel) in panels.iter().enumerate() {
                    let columns = &panel.registers[LANES * range[0] * P::FLOATS * C..][..LANES * length * C];
                    for (slab, first) in firsts.clone().enumerate() {
                        let rows_of_slab = packed[slab * of_slab..][..LANES * length * R].as_ptr();
                        let operands = Operands { rows: rows_of_slab, columns: columns.as_ptr(), length };
                        let place = (slab * panels.len() + at) * LANES * R * C;
                        assert!(chunks.count() == 1 || place + LANES * R * C <= partial.capacity());
                        let waiting = partial.as_mut_ptr().wrapping_add(place);
                        let before = if chunk > 0 { waiting.cast_const() } else { std::ptr::null() };
                        // SAFETY: both were packed for it; the sums of several chunks have room, and the first chunk writes them.
                        unsafe {
                            if chunk + 1 < chunks.count() {
                                chains::accumulate::<_, R, C>(p.isa(), operands, before, waiting);
                            } else {
                                let sums = chains::multiply::<_, R, C, false>(p.isa(), operands, before);
                                self.store::<P, R, C>(p, sums, [first, rows.min(count - first)], panel.first);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Some steps of a slab: `[chains, length, R]`, zeros beyond the last element.
    #[inline(always)]
    fn pack_slab<P: Product<Element = T>, const R: usize>(
        &self,
        p: P,
        rows: [*const T; R],
        [from, to]: [usize; 2],
        slab: &mut [f32],
    ) {
        let isa = p.isa();
        let length = (to - from) * P::FLOATS;
        assert!(slab.len() == LANES * length * R);
        for (row, pointer) in rows.into_iter().enumerate() {
            for step in from..to {
                let mut rest = [T::narrow(0.0); 2 * LANES];
                let live = P::ELEMENTS.min(self.k - step * P::ELEMENTS);
                let mut floats = [isa.splat(0.0); 2];
                // SAFETY: the row has `k` elements, and the copy a whole step.
                unsafe {
                    let mut elements = pointer.add(step * P::ELEMENTS);
                    if live < P::ELEMENTS {
                        std::ptr::copy_nonoverlapping(elements, rest.as_mut_ptr(), live);
                        elements = rest.as_ptr();
                    }
                    p.floats(elements, &mut floats);
                }
                for (register, &floats) in floats.iter().enumerate().take(P::FLOATS) {
                    let mut lanes = [0.0; LANES];
                    isa.store(floats, &mut lanes);
                    let at = (step - from) * P::FLOATS + register;
                    for lane in 0..LANES {
                        slab[(chain(lane) * length + at) * R + row] = lanes[lane];
                    }
                }
            }
        }
    }

    /// Keeps the sums of a tile: so many rows from the first one on.
    #[inline(always)]
    fn store<P: Product<Element = T>, const R: usize, const C: usize>(
        &mut self,
        p: P,
        sums: Sums<P::Isa, R, C>,
        [first, live]: [usize; 2],
        first_column: usize,
    ) {
        // [R, C] registers
        assert!(R * C <= MOST);
        let mut floats = [[0.0; LANES]; MOST];
        for row in 0..R {
            for column in 0..C {
                p.isa().store(sums[row][column], &mut floats[row * C + column]);
            }
        }
        let (m, columns) = (self.m, (C * LANES).min(self.m - first_column));
        let keep = |y: &mut [f32], floats: &[[f32; LANES]]| {
            let rows = floats.as_flattened().chunks_exact(C * LANES).take(live);
            for (floats, y) in rows.zip(y[first * m..].chunks_exact_mut(m)) {
                y[first_column..][..columns].copy_from_slice(&floats[..columns]);
            }
        };
        keep(self.y, &floats);
        if let Some(up) = &mut self.up {
            keep(up.y, &floats[R * C / 2..]);
        }
    }
}
