//! The memories: buffers with written-ness, views of them, and regions of them.

use std::{borrow::Cow, sync::Arc};

use half::{bf16, f16};
use smallvec::SmallVec;

use super::tile::{self, Scalar, Tile};
use crate::{
    element::Element,
    mosaic::{
        MemorySpace, RefElement,
        tiling::{LANES, SUBLANES},
    },
    tensor::HostTensor,
};

/// What a byte of an unwritten integer holds, should its content get out.
const POISON_INT: u8 = 0x5a;

/// The bytes of an unwritten element: a NaN that computations keep, or an unlikely integer.
fn poison(element: Element) -> &'static [u8] {
    match element {
        Element::F32 => &[0xad, 0xde, 0xc0, 0x7f],
        Element::Bf16 => &[0xd5, 0x7f],
        Element::F16 => &[0xd5, 0x7e],
        Element::F8E4M3Fn | Element::F8E5M2 => &[0x7f],
        Element::F8E4M3B11Fnuz => &[0x80],
        Element::F8E8M0Fnu => &[0xff],
        Element::I4 => &[POISON_INT & 0xf],
        Element::I2 => &[POISON_INT & 0x3],
        element => &[POISON_INT; 8][..element.bytes()],
    }
}

/// The owner of an element that several parallel positions wrote.
const CONTESTED: u32 = u32::MAX;

/// One allocation in one memory.
pub(super) struct Buffer<'i> {
    pub(super) name: String,
    pub(super) space: MemorySpace,
    pub(super) dims: Vec<usize>,
    pub(super) data: Cow<'i, HostTensor>,
    /// Which elements were written; empty once all are.
    written: Vec<bool>,
    unwritten: usize,
    /// The parallel grid position of the step that wrote each element, plus one, or [`CONTESTED`]; empty where it does
    /// not matter.
    pub(super) owners: Vec<u32>,
    /// Whether several parallel positions may write one element; what it holds then is unwritten.
    pub(super) may_overlap: bool,
    /// DMAs in flight that touch this buffer.
    pub(super) in_flight: usize,
    /// Whether these are semaphores of the call, which other calls use too.
    pub(super) outlives: bool,
    /// Whether other devices may write to it, so that what this one does with it matters.
    pub(super) shared: bool,
    /// What it takes of its memory, if the kernel allocated it while it ran.
    pub(super) scoped_bytes: usize,
}

impl<'i> Buffer<'i> {
    /// A poisoned buffer.
    pub(super) fn poisoned(name: &str, space: MemorySpace, element: Element, dims: &[usize]) -> Self {
        let mut buffer = Self::holding(name, space, Cow::Owned(HostTensor::zeros(element, dims)));
        buffer.poison();
        buffer
    }

    /// A buffer that holds an array.
    pub(super) fn holding(name: &str, space: MemorySpace, data: Cow<'i, HostTensor>) -> Self {
        Self {
            name: name.to_owned(),
            space,
            dims: data.dims().to_vec(),
            data,
            written: vec![],
            unwritten: 0,
            owners: vec![],
            may_overlap: false,
            in_flight: 0,
            outlives: false,
            shared: false,
            scoped_bytes: 0,
        }
    }

    /// Another buffer with this one's content, and with what of it is unwritten.
    pub(super) fn copied(&self, name: &str, space: MemorySpace) -> Self {
        let mut copy = Self::holding(name, space, self.data.clone());
        (copy.written, copy.unwritten) = (self.written.clone(), self.unwritten);
        copy
    }

    /// Forgets the content.
    pub(super) fn poison(&mut self) {
        let len = self.data.len();
        match self.data.element() {
            Element::F32 => {
                let nan = f32::from_le_bytes([0xad, 0xde, 0xc0, 0x7f]);
                self.data.to_mut().as_mut_slice::<f32>().fill(nan);
            }
            element => {
                let poison = poison(element);
                let bytes = self.data.to_mut().bytes_mut();
                match poison {
                    [byte, rest @ ..] if rest.iter().all(|other| other == byte) => bytes.fill(*byte),
                    poison => bytes.chunks_exact_mut(poison.len()).for_each(|to| to.copy_from_slice(poison)),
                }
            }
        }
        self.written.clear();
        self.written.resize(len, false);
        self.unwritten = len;
    }

    /// Counts everything as written: the content is garbage, but garbage that may be read.
    pub(super) fn all_written(&mut self) {
        self.written.clear();
        self.unwritten = 0;
    }

    pub(super) fn track_owners(&mut self, may_overlap: bool) {
        self.owners = vec![0; self.data.len()];
        self.may_overlap = may_overlap;
    }

    /// The first element that nobody wrote; one that several parallel positions wrote is none.
    pub(super) fn first_unwritten(&self) -> Option<usize> {
        let contested = |at: usize| self.owners.get(at) == Some(&CONTESTED);
        match self.unwritten {
            0 => None,
            _ => (0..self.written.len()).find(|&at| !self.written[at] && !contested(at)),
        }
    }

    /// Makes one element unwritten.
    fn forget(&mut self, at: usize) {
        let poison = poison(self.data.element());
        let width = poison.len();
        self.data.to_mut().bytes_mut()[at * width..][..width].copy_from_slice(poison);
        if self.written.is_empty() {
            self.written = vec![true; self.data.len()];
        }
        self.unwritten += usize::from(std::mem::replace(&mut self.written[at], false));
    }

    /// Writes poison into `region`: garbage that may be read.
    pub(super) fn write_garbage(&mut self, region: &Region) {
        region.for_each_run(|start, len, stride| {
            (0..len).for_each(|i| self.forget(start + i * stride));
            self.mark(start, len, stride);
        });
    }

    /// The index of an element.
    pub(super) fn unravel(&self, offset: usize) -> Vec<i64> {
        let strides = tile::strides(&self.dims);
        strides.iter().zip(&self.dims).map(|(&stride, &size)| (offset / stride % size) as i64).collect()
    }

    /// The first element of `region` that nobody wrote.
    pub(super) fn unwritten_in(&self, region: &Region) -> Option<usize> {
        if self.unwritten == 0 {
            return None;
        }
        region.find_run(|start, len, stride| {
            let run = (0..len).map(|i| start + i * stride);
            match stride {
                1 => self.written[start..start + len].iter().position(|&written| !written).map(|i| start + i),
                _ => run.into_iter().find(|&at| !self.written[at]),
            }
        })
    }

    fn mark(&mut self, start: usize, len: usize, stride: usize) {
        if self.unwritten > 0 && len == self.written.len() {
            self.all_written();
        } else if self.unwritten > 0 && stride == 1 {
            let written = &mut self.written[start..start + len];
            // Counted in bytes, which are many in a register.
            let unwritten = |part: &[bool]| usize::from(part.iter().map(|&written| u8::from(!written)).sum::<u8>());
            self.unwritten -= written.chunks(128).map(unwritten).sum::<usize>();
            written.fill(true);
        } else if self.unwritten > 0 {
            for at in (0..len).map(|i| start + i * stride) {
                self.unwritten -= usize::from(!self.written[at]);
                self.written[at] = true;
            }
        }
    }

    /// Claims `region` for the step at parallel position `owner`; the first element that another position wrote, unless
    /// that may be ([`contest`](Self::contest)).
    pub(super) fn claim(&mut self, region: &Region, owner: u32) -> Option<(usize, u32)> {
        if self.owners.is_empty() || self.may_overlap {
            return None;
        }
        let owners = &mut self.owners;
        region.find_run(|start, len, stride| {
            (0..len).map(|i| start + i * stride).find_map(|at| {
                let before = std::mem::replace(&mut owners[at], owner + 1);
                (before != 0 && before != owner + 1).then(|| (at, before - 1))
            })
        })
    }

    /// Where parallel positions may overlap: what `region` holds, for [`contest`](Self::contest) to compare.
    pub(super) fn uncontested(&self, region: &Region) -> Vec<u8> {
        if self.may_overlap { self.copy_out(region) } else { vec![] }
    }

    /// Where parallel positions may overlap: claims `region`, just written, for `owner`; it held `before`. What another position
    /// wrote too, and not the same, is unwritten, for who was last is unknown.
    pub(super) fn contest(&mut self, region: &Region, owner: u32, before: &[u8]) {
        if !self.may_overlap {
            return;
        }
        let width = self.data.element().bytes();
        let mut before = before.chunks_exact(width);
        region.for_each_run(|start, len, stride| {
            for at in (0..len).map(|i| start + i * stride) {
                let before = before.next();
                if self.owners[at] == 0 || self.owners[at] == owner + 1 {
                    self.owners[at] = owner + 1;
                } else if self.owners[at] == CONTESTED || before != Some(&self.data.bytes()[at * width..][..width]) {
                    self.owners[at] = CONTESTED;
                    self.forget(at);
                }
            }
        });
    }

    /// Whether it is known which parallel position wrote what.
    pub(super) fn has_owners(&self) -> bool {
        !self.owners.is_empty()
    }

    /// Whether a step wrote an element of `region`.
    pub(super) fn is_owned_in(&self, region: &Region) -> bool {
        let mut runs = region.runs();
        !self.owners.is_empty()
            && runs.any(|(start, len, stride)| (0..len).any(|i| self.owners[start + i * stride] != 0))
    }

    /// Makes elements from `at` written as in `other`, another copy of the array.
    pub(super) fn take_states(&mut self, other: &Buffer<'_>, at: usize, len: usize) {
        if self.unwritten == 0 && other.unwritten == 0 {
            return;
        }
        if self.written.is_empty() {
            self.written = vec![true; self.data.len()];
        }
        for at in at..at + len {
            let written = other.written.get(at).copied().unwrap_or(true);
            let before = std::mem::replace(&mut self.written[at], written);
            self.unwritten = self.unwritten + usize::from(before) - usize::from(written);
        }
    }

    /// The first element of `region` that was written at another parallel position than `owner`, and at which if only
    /// one did.
    pub(super) fn written_elsewhere(&self, region: &Region, owner: u32) -> Option<(usize, Option<u32>)> {
        if self.owners.is_empty() {
            return None;
        }
        region.find_run(|start, len, stride| {
            let mut run = (0..len).map(|i| start + i * stride);
            let at = run.find(|&at| self.owners[at] != 0 && self.owners[at] != owner + 1)?;
            Some((at, (self.owners[at] != CONTESTED).then(|| self.owners[at] - 1)))
        })
    }

    /// The elements of `region`, in order, as a register tile.
    pub(super) fn read(&self, region: &Region) -> Tile {
        fn gather<T: crate::element::Native, U>(data: &HostTensor, region: &Region, widen: impl Fn(T) -> U) -> Vec<U> {
            let data = data.as_slice::<T>();
            let mut values = Vec::with_capacity(region.len());
            region.for_each_run(|start, len, stride| match stride {
                1 => values.extend(data[start..start + len].iter().map(|&x| widen(x))),
                _ => values.extend((0..len).map(|i| widen(data[start + i * stride]))),
            });
            values
        }
        match self.data.element() {
            Element::F32 => Tile::Float(Arc::new(gather(&self.data, region, |x: f32| x))),
            Element::Bf16 => {
                let data = self.data.as_slice::<bf16>();
                let mut values = Vec::with_capacity(region.len());
                region.for_each_run(|start, len, stride| match stride {
                    1 => tile::widen(&data[start..start + len], &mut values),
                    _ => values.extend((0..len).map(|i| data[start + i * stride].to_f32())),
                });
                Tile::Float(Arc::new(values))
            }
            Element::F16 => Tile::Float(Arc::new(gather(&self.data, region, |x: f16| x.to_f32()))),
            element if element.minifloat().is_some() => {
                Tile::Float(Arc::new(gather(&self.data, region, |x: u8| tile::float_from_bits(element, u32::from(x)))))
            }
            element if element.bits() < 8 => {
                Tile::Int(Arc::new(gather(&self.data, region, |x: u8| tile::wrap(element, i32::from(x)))))
            }
            Element::I8 => Tile::Int(Arc::new(gather(&self.data, region, |x: i8| i32::from(x)))),
            Element::I16 => Tile::Int(Arc::new(gather(&self.data, region, |x: i16| i32::from(x)))),
            _ => Tile::Int(Arc::new(gather(&self.data, region, |x: i32| x))),
        }
    }

    /// Writes a tile into `region`, only where `mask` holds if there is one.
    pub(super) fn write(&mut self, region: &Region, value: &Tile, mask: Option<&[bool]>) {
        fn scatter<T: crate::element::Native, U: Copy>(
            data: &mut HostTensor,
            region: &Region,
            values: &[U],
            mask: Option<&[bool]>,
            narrow: impl Fn(U) -> T,
        ) {
            let data = data.as_mut_slice::<T>();
            let mut from = 0;
            region.for_each_run(|start, len, stride| {
                let values = &values[from..from + len];
                match (mask, stride) {
                    (None, 1) => data[start..start + len].iter_mut().zip(values).for_each(|(to, &x)| *to = narrow(x)),
                    (mask, _) => {
                        for (i, &x) in values.iter().enumerate() {
                            if mask.is_none_or(|mask| mask[from + i]) {
                                data[start + i * stride] = narrow(x);
                            }
                        }
                    }
                }
                from += len;
            });
        }
        match (self.data.element(), value) {
            (Element::F32, Tile::Float(x)) => scatter(self.data.to_mut(), region, x, mask, |x| x),
            (Element::Bf16, Tile::Float(x)) => scatter(self.data.to_mut(), region, x, mask, tile::narrow),
            (Element::F16, Tile::Float(x)) => scatter(self.data.to_mut(), region, x, mask, f16::from_f32),
            (element, Tile::Float(x)) => {
                scatter(self.data.to_mut(), region, x, mask, |x| tile::float_bits(element, x) as u8);
            }
            (element, Tile::Int(x)) if element.bits() < 8 => {
                scatter(self.data.to_mut(), region, x, mask, |x| tile::unsigned(element, x) as u8);
            }
            (Element::I8, Tile::Int(x)) => scatter(self.data.to_mut(), region, x, mask, |x| x as i8),
            (Element::I16, Tile::Int(x)) => scatter(self.data.to_mut(), region, x, mask, |x| x as i16),
            (_, Tile::Int(x)) => scatter(self.data.to_mut(), region, x, mask, |x| x),
            _ => unreachable!("decoding gives memory and value one type"),
        }
        if self.unwritten > 0 {
            let mut from = 0;
            region.for_each_run(|start, len, stride| {
                match mask {
                    None => self.mark(start, len, stride),
                    Some(mask) => (0..len).filter(|i| mask[from + i]).for_each(|i| self.mark(start + i * stride, 1, 1)),
                }
                from += len;
            });
        }
    }

    /// Makes the elements of `region` unwritten where `garbage` says so: something undefined was written over them.
    pub(super) fn spoil(&mut self, region: &Region, garbage: &[bool]) {
        if self.written.is_empty() {
            self.written = vec![true; self.data.len()];
        }
        let mut from = 0;
        region.for_each_run(|start, len, stride| {
            for i in (0..len).filter(|i| garbage[from + i]) {
                let at = start + i * stride;
                self.unwritten += usize::from(std::mem::replace(&mut self.written[at], false));
            }
            from += len;
        });
    }

    /// Which elements of `region` nobody wrote, in order.
    pub(super) fn garbage_in(&self, region: &Region) -> Vec<bool> {
        let mut garbage = Vec::with_capacity(region.len());
        region.for_each_run(|start, len, stride| garbage.extend((0..len).map(|i| !self.written[start + i * stride])));
        garbage
    }

    pub(super) fn read_scalar(&self, at: usize) -> Scalar {
        match self.data.element() {
            Element::F32 => Scalar::Float(self.data.as_slice::<f32>()[at]),
            Element::I32 => Scalar::Int(self.data.as_slice::<i32>()[at]),
            _ => self.read(&Region::new(0, at, &[], &[])).get(0),
        }
    }

    pub(super) fn write_scalar(&mut self, at: usize, value: Scalar) {
        match (self.data.element(), value) {
            (Element::F32, Scalar::Float(x)) => self.data.to_mut().as_mut_slice::<f32>()[at] = x,
            (Element::I32, Scalar::Int(x)) => self.data.to_mut().as_mut_slice::<i32>()[at] = x,
            (_, Scalar::Pred(x)) => return self.write_scalar(at, Scalar::Int(i32::from(x))),
            (_, value) => return self.write(&Region::new(0, at, &[], &[]), &tile::splat(value, 1), None),
        }
        self.mark(at, 1, 1);
    }

    /// Copies the elements of `from` to those of `to`, which is of equal length, in another buffer and of elements as wide.
    pub(super) fn copy(buffers: &mut [Self], from: &Region, to: &Region) {
        let Ok([source, destination]) = buffers.get_disjoint_mut([from.buffer, to.buffer]) else {
            let bytes = buffers[from.buffer].copy_out(from);
            return buffers[to.buffer].copy_in(to, &bytes);
        };
        let width = source.data.element().bytes();
        let data = source.data.bytes();
        let mut runs = from.runs();
        let mut rest = (0, 0, 1);
        for (mut start, mut len, stride) in to.runs() {
            while len > 0 {
                if rest.1 == 0 {
                    rest = runs.next().expect("both are of one length");
                }
                let (at, left, by) = rest;
                let count = len.min(left);
                let into = destination.data.to_mut().bytes_mut();
                if stride == 1 && by == 1 {
                    into[start * width..][..count * width].copy_from_slice(&data[at * width..][..count * width]);
                } else {
                    for i in 0..count {
                        into[(start + i * stride) * width..][..width]
                            .copy_from_slice(&data[(at + i * by) * width..][..width]);
                    }
                }
                destination.mark(start, count, stride);
                rest = (at + count * by, left - count, by);
                start += count * stride;
                len -= count;
            }
        }
    }

    /// The bytes of `region`, in order.
    pub(super) fn copy_out(&self, region: &Region) -> Vec<u8> {
        let width = self.data.element().bytes();
        let data = self.data.bytes();
        let mut bytes = Vec::with_capacity(region.len() * width);
        region.for_each_run(|start, len, stride| match stride {
            1 => bytes.extend_from_slice(&data[start * width..(start + len) * width]),
            _ => (0..len).for_each(|i| bytes.extend_from_slice(&data[(start + i * stride) * width..][..width])),
        });
        bytes
    }

    /// Writes bytes that [`copy_out`](Self::copy_out) took from a region of equal length.
    pub(super) fn copy_in(&mut self, region: &Region, bytes: &[u8]) {
        let width = self.data.element().bytes();
        let mut from = 0;
        region.for_each_run(|start, len, stride| {
            let data = self.data.to_mut().bytes_mut();
            match stride {
                1 => data[start * width..(start + len) * width].copy_from_slice(&bytes[from..from + len * width]),
                _ => (0..len).for_each(|i| {
                    data[(start + i * stride) * width..][..width].copy_from_slice(&bytes[from + i * width..][..width]);
                }),
            }
            self.mark(start, len, stride);
            from += len * width;
        });
    }
}

/// A box of elements of one buffer: `dims[d]` steps of `strides[d]` elements each, from `offset`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Region {
    pub(super) buffer: usize,
    offset: usize,
    /// Without dimensions of size 1, and adjacent ones merged where they are contiguous.
    dims: Dims,
    strides: Dims,
}

impl Region {
    pub(super) fn new(buffer: usize, offset: usize, dims: &[usize], strides: &[usize]) -> Self {
        if dims.contains(&0) {
            return Self { buffer, offset, dims: Dims::from_slice(&[0]), strides: Dims::from_slice(&[1]) };
        }
        let (mut sizes, mut steps) = (Dims::new(), Dims::new());
        for (&size, &stride) in dims.iter().zip(strides).filter(|&(&size, _)| size != 1) {
            match (sizes.last_mut(), steps.last_mut()) {
                (Some(before), Some(outer)) if *outer == stride * size => (*before, *outer) = (*before * size, stride),
                _ => {
                    sizes.push(size);
                    steps.push(stride);
                }
            }
        }
        if sizes.is_empty() {
            sizes.push(1);
            steps.push(1);
        }
        Self { buffer, offset, dims: sizes, strides: steps }
    }

    pub(super) fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// The first element.
    pub(super) fn start(&self) -> usize {
        self.offset
    }

    pub(super) fn is_empty(&self) -> bool {
        self.dims.contains(&0)
    }

    /// One past the last element.
    fn end(&self) -> usize {
        self.offset + self.dims.iter().zip(&self.strides).map(|(size, stride)| (size - 1) * stride).sum::<usize>() + 1
    }

    /// The innermost runs, in order.
    pub(super) fn runs(&self) -> Runs<'_> {
        let (&len, outer) = self.dims.split_last().expect("a region has a dimension");
        let at = if self.is_empty() { None } else { Some(self.offset) };
        Runs {
            outer,
            strides: &self.strides,
            run: (len, self.strides[outer.len()]),
            index: Dims::from_elem(0, outer.len()),
            at,
        }
    }

    /// Calls `f(start, len, stride)` for the innermost runs, in order, until it returns something.
    pub(super) fn find_run<R>(&self, mut f: impl FnMut(usize, usize, usize) -> Option<R>) -> Option<R> {
        self.runs().find_map(|(start, len, stride)| f(start, len, stride))
    }

    pub(super) fn for_each_run(&self, mut f: impl FnMut(usize, usize, usize)) {
        self.find_run(|start, len, stride| {
            f(start, len, stride);
            None::<()>
        });
    }

    /// An element that both regions hold.
    pub(super) fn overlap(&self, other: &Self) -> Option<usize> {
        let low = self.offset.max(other.offset);
        if self.buffer != other.buffer || self.is_empty() || other.is_empty() {
            return None;
        }
        if self.end() <= other.offset || other.end() <= self.offset {
            return None;
        }
        let contiguous = |region: &Self| region.dims.len() == 1 && region.strides[0] == 1;
        if contiguous(self) && contiguous(other) {
            return Some(low);
        }
        let (mine, theirs) = (self.intervals(), other.intervals());
        let (mut i, mut j) = (0, 0);
        while let (Some(&(a, a_end)), Some(&(b, b_end))) = (mine.get(i), theirs.get(j)) {
            if a < b_end && b < a_end {
                return Some(a.max(b));
            }
            if a_end <= b_end { i += 1 } else { j += 1 }
        }
        None
    }

    fn intervals(&self) -> Vec<(usize, usize)> {
        let mut intervals = Vec::new();
        self.for_each_run(|start, len, stride| match stride {
            1 => intervals.push((start, start + len)),
            _ => intervals.extend((0..len).map(|i| (start + i * stride, start + i * stride + 1))),
        });
        intervals.sort_unstable();
        intervals
    }
}

/// The innermost runs of a region: start, length and stride of each.
pub(super) struct Runs<'r> {
    outer: &'r [usize],
    strides: &'r [usize],
    /// Length and stride.
    run: (usize, usize),
    index: Dims,
    at: Option<usize>,
}

impl Iterator for Runs<'_> {
    type Item = (usize, usize, usize);

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.at?;
        let (len, stride) = self.run;
        let mut at = start;
        let mut dim = self.outer.len();
        self.at = loop {
            let Some(next) = dim.checked_sub(1) else { break None };
            dim = next;
            self.index[dim] += 1;
            at += self.strides[dim];
            if self.index[dim] < self.outer[dim] {
                break Some(at);
            }
            at -= self.strides[dim] * self.outer[dim];
            self.index[dim] = 0;
        };
        Some((start, len, stride))
    }
}

/// Sizes or strides: of few dimensions, so in place.
pub(super) type Dims = SmallVec<[usize; 6]>;

/// A slice that is not inside what it is of.
#[derive(Debug, PartialEq)]
pub(super) struct Outside {
    /// The op that made it.
    pub(super) origin: u32,
    pub(super) start: Vec<i64>,
    /// In words.
    pub(super) why: String,
}

/// A memref at run time: a strided view of a buffer, perhaps read as a wider or narrower element type.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    pub(super) buffer: usize,
    pub(super) offset: usize,
    pub(super) element: RefElement,
    pub(super) dims: Dims,
    pub(super) strides: Dims,
    /// For a view of narrow elements as wide ones: how many, and how far apart, make one.
    pub(super) packed: Option<(usize, usize)>,
    /// For a view of wide elements as narrow ones: how many make one. They are rows of the second-minor dimension, whose
    /// stride is that of a wide row.
    pub(super) split: Option<usize>,
    /// Where it is not inside what it is a slice of, and has a size but nothing that could be accessed.
    pub(super) outside: Option<Arc<Outside>>,
    /// How much of an outside view is of the array, where the rest is padding of the array's tiles: DMAs copy such views.
    pub(super) unpadded: Option<Dims>,
}

impl View {
    pub(super) fn whole(buffer: usize, element: RefElement, dims: &[usize]) -> Self {
        Self {
            buffer,
            offset: 0,
            element,
            dims: dims.into(),
            strides: tile::strides(dims).into(),
            packed: None,
            split: None,
            outside: None,
            unpadded: None,
        }
    }

    /// Whether a box of narrow elements has parts of a wide one: the machine takes whole ones.
    pub(super) fn splits_a_word(&self, start: &[i64], sizes: &[usize], steps: &[usize]) -> bool {
        let (Some(ratio), Some(rows)) = (self.split, sizes.len().checked_sub(2)) else { return false };
        let whole = start[rows] % ratio as i64 == 0 && sizes[rows].is_multiple_of(ratio);
        !whole || steps.get(rows).is_some_and(|&step| step != 1)
    }

    /// Indices or sizes in rows of the buffer's elements.
    fn unsplit<T: Copy + std::ops::Div<Output = T> + TryFrom<usize>>(&self, of: &[T]) -> Vec<T> {
        let mut of = of.to_vec();
        if let (Some(ratio), Some(rows)) = (self.split, of.len().checked_sub(2))
            && let Ok(ratio) = T::try_from(ratio)
        {
            of[rows] = of[rows] / ratio;
        }
        of
    }

    /// The elements `start + i * step`, `sizes` of them, or the dimension and index that is out of bounds.
    pub(super) fn region(&self, start: &[i64], sizes: &[usize], steps: &[usize]) -> Result<Region, (usize, i64)> {
        let mut offset = self.offset;
        let mut strides = Dims::new();
        for dim in 0..self.dims.len() {
            let step = steps.get(dim).copied().unwrap_or(1);
            let last = start[dim] + (sizes[dim] as i64 - 1) * step as i64;
            if start[dim] < 0 || last >= self.dims[dim] as i64 {
                return Err((dim, if start[dim] < 0 { start[dim] } else { last }));
            }
            let row = if dim + 2 == self.dims.len() { self.split.unwrap_or(1) } else { 1 };
            offset += start[dim] as usize / row * self.strides[dim];
            strides.push(self.strides[dim] * step);
        }
        if self.split.is_some() {
            return Ok(Region::new(self.buffer, offset, &self.unsplit(sizes), &strides));
        }
        let Some((ratio, apart)) = self.packed else {
            return Ok(Region::new(self.buffer, offset, sizes, &strides));
        };
        // A wide element is `ratio` narrow ones of the same lane, so they come before the lanes.
        let mut sizes = Dims::from_slice(sizes);
        sizes.insert(sizes.len() - 1, ratio);
        strides.insert(strides.len() - 1, apart);
        Ok(Region::new(self.buffer, offset, &sizes, &strides))
    }

    /// Everything that the view holds.
    pub(super) fn all(&self) -> Region {
        let zeros: SmallVec<[i64; 6]> = SmallVec::from_elem(0, self.dims.len());
        self.region(&zeros, &self.dims, &[]).expect("a view is inside itself")
    }

    /// The part at `start` of sizes `sizes`, or the dimension and index that is out of bounds.
    pub(super) fn slice(&self, start: &[i64], sizes: &[usize]) -> Result<Self, (usize, i64)> {
        let mut view = self.clone();
        for dim in 0..sizes.len() {
            let last = start[dim] + sizes[dim] as i64 - 1;
            if start[dim] < 0 || last >= self.dims[dim] as i64 {
                return Err((dim, if start[dim] < 0 { start[dim] } else { last }));
            }
            let row = if dim + 2 == self.dims.len() { self.split.unwrap_or(1) } else { 1 };
            view.offset += start[dim] as usize / row * self.strides[dim];
        }
        view.dims = sizes.into();
        for (dim, unpadded) in view.unpadded.iter_mut().flatten().enumerate() {
            *unpadded = unpadded.saturating_sub(start[dim] as usize).min(sizes[dim]);
        }
        Ok(view)
    }

    /// A view of sizes `sizes` that is not inside this one.
    pub(super) fn beyond(&self, sizes: &[usize], outside: Outside) -> Self {
        Self { dims: sizes.into(), outside: Some(Arc::new(outside)), ..self.clone() }
    }

    /// The part at `start` of sizes `sizes` of a view of an array of `of` elements in HBM, if the array's padding holds what
    /// is not of the array. HBM is tiled as VMEM is: lanes are padded to whole registers, rows to tiles of 8 or, of fewer, to a
    /// power of two. What is there is undefined, and XLA allocates it (kernels rely on it: `test_gmm_implicit_padding` of
    /// tpu-inference).
    pub(super) fn padded_slice(&self, of: &[usize], start: &[i64], sizes: &[usize]) -> Option<Self> {
        let (&lanes, rows) = of.split_last()?;
        let tile = rows.last().map(|&rows| rows.next_power_of_two().min(SUBLANES));
        let recast = self.packed.is_some() || self.split.is_some();
        if recast || self.outside.is_some() || of.contains(&0) || start.iter().any(|&start| start < 0) {
            return None;
        }
        let mut view = Self { dims: sizes.into(), ..self.clone() };
        let mut unpadded = view.dims.clone();
        for (dim, &size) in sizes.iter().enumerate() {
            let (from, end) = (start[dim] as usize, start[dim] as usize + size);
            view.offset += from * self.strides[dim];
            if end <= self.dims[dim] {
                continue;
            }
            // Where the view begins along this dimension of the array, which it must see the end of.
            let (begins, all, tile) = match (dim + 1 == sizes.len(), dim + 2 == sizes.len()) {
                (true, _) if self.strides[dim] == 1 => (self.offset % lanes, lanes, LANES),
                (_, true) if self.strides[dim] == lanes => (self.offset / lanes % rows.last()?, *rows.last()?, tile?),
                _ => return None,
            };
            if begins + self.dims[dim] != all || begins + end > all.next_multiple_of(tile) {
                return None;
            }
            unpadded[dim] = self.dims[dim].saturating_sub(from);
        }
        view.unpadded = Some(unpadded);
        Some(view)
    }

    /// What of two views that a DMA copies, of which one at least has padding, is of both their arrays; `None` where sizes or
    /// elements differ.
    pub(super) fn unpadded([one, other]: [&Self; 2]) -> Option<[Region; 2]> {
        let recast = |view: &Self| view.packed.is_some() || view.split.is_some();
        let long = |view: &Self| (0..view.dims.len()).filter(|&dim| view.dims[dim] != 1).collect::<Dims>();
        let (of_one, of_other) = (long(one), long(other));
        let sizes = |view: &Self, of: &Dims| of.iter().map(|&dim| view.dims[dim]).collect::<Dims>();
        let same = sizes(one, &of_one) == sizes(other, &of_other) && one.element == other.element;
        if recast(one) || recast(other) || !same {
            return None;
        }
        let [mut one_sizes, mut other_sizes] =
            [one, other].map(|view| view.unpadded.as_ref().unwrap_or(&view.dims).clone());
        for (&dim, &same) in of_one.iter().zip(&of_other) {
            let size = one_sizes[dim].min(other_sizes[same]);
            (one_sizes[dim], other_sizes[same]) = (size, size);
        }
        if one_sizes.contains(&0) || other_sizes.contains(&0) {
            one_sizes.fill(0);
            other_sizes.fill(0);
        }
        let region = |view: &Self, sizes: &Dims| Region::new(view.buffer, view.offset, sizes, &view.strides);
        Some([region(one, &one_sizes), region(other, &other_sizes)])
    }

    /// The view without its other dimensions, which are of size 1.
    pub(super) fn keep(&self, dims: &[usize]) -> Self {
        let of = |sizes: &Dims| dims.iter().map(|&dim| sizes[dim]).collect();
        // Of a row of padding, all is padding.
        let unpadded = self.unpadded.as_ref().map(|sizes| match sizes.contains(&0) {
            true => Dims::from_elem(0, dims.len()),
            false => of(sizes),
        });
        Self { dims: of(&self.dims), strides: of(&self.strides), unpadded, ..self.clone() }
    }

    /// The elements in the same order with sizes `dims`, of which one may be what is left; `None` where sizes or strides forbid
    /// it.
    pub(super) fn reshape(&self, dims: &[Option<usize>]) -> Option<Self> {
        let all: usize = self.dims.iter().product();
        let known: usize = dims.iter().flatten().product();
        let rest = all.checked_div(known).unwrap_or(0);
        let dims: Dims = dims.iter().map(|size| size.unwrap_or(rest)).collect();
        let recast = self.packed.is_some() || self.split.is_some();
        if dims.iter().product::<usize>() != all || (recast && dims.last() != self.dims.last()) {
            return None;
        }
        if let Some(ratio) = self.split {
            let rows = dims.len().checked_sub(2).filter(|&rows| dims[rows].is_multiple_of(ratio))?;
            let words = Self { dims: self.unsplit(&self.dims).into(), split: None, ..self.clone() };
            let sizes: Vec<Option<usize>> = self.unsplit(&dims).into_iter().map(Some).collect();
            let mut view = Self { split: Some(ratio), ..words.reshape(&sizes)? };
            view.dims[rows] *= ratio;
            return Some(view);
        }
        let of = |dims: Dims, strides: Dims| Self { dims, strides, unpadded: None, ..self.clone() };
        if all == 0 {
            let strides = Dims::from_elem(0, dims.len());
            return Some(of(dims, strides));
        }
        // Groups of old and new dimensions with as many elements: the old ones must lie one after another.
        let old: Vec<(usize, usize)> =
            self.dims.iter().copied().zip(self.strides.iter().copied()).filter(|(size, _)| *size != 1).collect();
        let mut strides = Dims::from_elem(1, dims.len());
        let (mut from, mut to) = (0, 0);
        while from < old.len() {
            let (first, begin) = (from, to);
            let (mut before, mut after) = (old[from].0, dims[to]);
            from += 1;
            to += 1;
            while before != after {
                if before < after {
                    before *= old[from].0;
                    from += 1;
                } else {
                    after *= dims[to];
                    to += 1;
                }
            }
            let group = &old[first..from];
            if group.windows(2).any(|pair| pair[0].1 != pair[1].0 * pair[1].1) {
                return None;
            }
            let mut stride = group.last().map_or(1, |(_, stride)| *stride);
            for dim in (begin..to).rev() {
                strides[dim] = stride;
                stride *= dims[dim];
            }
        }
        Some(of(dims, strides))
    }

    /// The memory read as another element type; narrow ones are rows of the second-minor dimension.
    pub(super) fn bitcast(&self, to: Element) -> Option<Self> {
        let from = self.element.data()?.bits();
        let mut view = Self { element: RefElement::Data(to), unpadded: None, ..self.clone() };
        if to.bits() == from {
            return Some(view);
        }
        let rows = self.dims.len().checked_sub(2)?;
        if to.bits() > from {
            let ratio = to.bits() / from;
            if !self.dims[rows].is_multiple_of(ratio) {
                return None;
            }
            view.dims[rows] /= ratio;
            match (self.split, self.packed) {
                (Some(split), _) if split.is_multiple_of(ratio) => {
                    view.split = Some(split / ratio).filter(|&split| split > 1);
                }
                (Some(_), _) => return None,
                (None, packed) => {
                    let (before, apart) = packed.unwrap_or((1, self.strides[rows]));
                    view.packed = Some((before * ratio, apart));
                    view.strides[rows] *= ratio;
                }
            }
        } else {
            let ratio = from / to.bits();
            view.dims[rows] *= ratio;
            match self.packed {
                Some((before, apart)) if before.is_multiple_of(ratio) => {
                    view.packed = Some((before / ratio, apart)).filter(|&(left, _)| left > 1);
                    view.strides[rows] = before / ratio * apart;
                }
                Some(_) => return None,
                None => view.split = Some(self.split.unwrap_or(1) * ratio),
            }
        }
        Some(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_overlap_exactly() {
        let column = |at| Region::new(0, at, &[4], &[8]);
        assert_eq!(column(0).overlap(&column(1)), None);
        assert_eq!(column(3).overlap(&Region::new(0, 8, &[2, 8], &[8, 1])), Some(11));
        assert_eq!(Region::new(0, 0, &[8], &[1]).overlap(&Region::new(0, 8, &[8], &[1])), None);
        assert_eq!(Region::new(0, 0, &[9], &[1]).overlap(&Region::new(0, 8, &[8], &[1])), Some(8));
        assert_eq!(Region::new(0, 0, &[9], &[1]).overlap(&Region::new(1, 8, &[8], &[1])), None);
    }

    #[test]
    fn written_elements_are_tracked_one_by_one() {
        let mut buffer = Buffer::poisoned("b", MemorySpace::Vmem, Element::F32, &[4, 8]);
        let row = Region::new(0, 8, &[8], &[1]);
        assert_eq!(buffer.unwritten_in(&row), Some(8));
        buffer.write(&row, &Tile::Float(Arc::new(vec![1.0; 8])), None);
        assert_eq!(buffer.unwritten_in(&row), None);
        assert_eq!(buffer.unwritten_in(&Region::new(0, 0, &[4, 2], &[8, 1])), Some(0));
        assert_eq!(buffer.unravel(17), [2, 1]);
    }

    #[test]
    fn packed_views_take_rows_of_one_lane() {
        let view = View::whole(0, RefElement::Data(Element::Bf16), &[4, 128]).bitcast(Element::I32).unwrap();
        assert_eq!((view.dims.as_slice(), view.strides.as_slice()), ([2, 128].as_slice(), [256, 1].as_slice()));
        let region = view.region(&[1, 0], &[1, 128], &[]).unwrap();
        assert_eq!(region, Region::new(0, 256, &[2, 128], &[128, 1]));
        assert_eq!(view.bitcast(Element::F16).unwrap().all(), Region::new(0, 0, &[4, 128], &[128, 1]));
    }

    #[test]
    fn split_views_take_whole_words() {
        let words = View::whole(0, RefElement::Data(Element::I32), &[16, 256]);
        let view = words.bitcast(Element::I16).unwrap();
        assert_eq!(view.dims.as_slice(), [32, 256]);
        let slice = view.slice(&[16, 0], &[16, 128]).unwrap();
        assert_eq!(slice.all(), Region::new(0, 8 * 256, &[8, 128], &[256, 1]));
        assert!(view.splits_a_word(&[1, 0], &[2, 128], &[]) && !view.splits_a_word(&[2, 0], &[2, 128], &[]));
        let tiles = view.reshape(&[Some(2), Some(16), Some(256)]).unwrap();
        assert_eq!(tiles.slice(&[1, 0, 0], &[1, 16, 256]).unwrap().all(), Region::new(0, 8 * 256, &[2048], &[1]));
        assert_eq!(tiles.bitcast(Element::I32).unwrap().all(), words.all());
    }
}
