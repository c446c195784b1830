//! What a handler sees of a call: typed views of operands and results, options, threads.
//!
//! Invariants: no safe code gets `&` and `&mut` of one memory. Results do not overlap each other, or there is no frame; each
//! is lent out once at a time; an operand that lies in a result's memory has a type and dimensions, but no values. Views
//! live no longer than the call.

use std::ffi::c_int;
use std::ops::Range;

use pagoda_ir::element::{Element, Native};

use super::ffi::{ATTRIBUTE_STRING, RawBuffer, RawFrame, RawList, RawSpan};
use super::pool::Pool;

type Result<T> = std::result::Result<T, String>;

/// One call. Its parts are borrowed apart: results may be written while operands are read.
pub struct Frame<'a> {
    /// The arrays that the call is given.
    pub operands: Operands<'a>,
    /// The arrays that it fills.
    pub results: Results<'a>,
    /// Everything else.
    pub options: Options<'a>,
}

impl<'a> Frame<'a> {
    /// Views of a raw frame.
    ///
    /// # Errors
    /// When two results overlap, or a buffer is not what the FFI says it is.
    ///
    /// # Safety
    /// All that `raw` points to is as the FFI says, for `'a`: operands readable, results writable and used by nobody else
    /// but through operands of this call. At most one frame of a call exists.
    pub(super) unsafe fn of(raw: &'a RawFrame) -> Result<Self> {
        let results = Results { list: &raw.rets };
        for first in 0..results.len() {
            for second in first + 1..results.len() {
                if overlap(&results.view(first)?.range(), &results.view(second)?.range()) {
                    return Err(format!("results {first} and {second} overlap"));
                }
            }
        }
        Ok(Self { operands: Operands { list: &raw.args, results: &raw.rets }, results, options: Options { raw } })
    }
}

/// A buffer of a frame, not yet looked into.
#[derive(Clone, Copy)]
struct View<'a> {
    element: Element,
    dims: &'a [i64],
    count: usize,
    data: *mut u8,
}

impl<'a> View<'a> {
    fn of(list: &'a RawList, index: usize, what: &str) -> Result<Self> {
        if index >= list.size as usize {
            return Err(format!("{what} {index} of {}", list.size));
        }
        // SAFETY: the list holds `size` buffers.
        let buffer = unsafe { &*(*list.items.add(index)).cast::<RawBuffer>() };
        let element =
            element(buffer.dtype).ok_or_else(|| format!("{what} {index} has FFI element type {}", buffer.dtype))?;
        let dims = match buffer.rank {
            0 => &[][..],
            // SAFETY: a buffer has `rank` dimensions.
            rank => unsafe { std::slice::from_raw_parts(buffer.dims, rank as usize) },
        };
        let size = |&dim: &i64| usize::try_from(dim).ok();
        let count = dims.iter().try_fold(1_usize, |count, dim| count.checked_mul(size(dim)?));
        let count =
            count.filter(|count| count.checked_mul(element.bytes()).is_some_and(|bytes| bytes <= isize::MAX as usize));
        let count = count.ok_or_else(|| format!("{what} {index} has dimensions {dims:?}"))?;
        let data = buffer.data.cast::<u8>();
        if count > 0 && data.is_null() {
            return Err(format!("{what} {index} has no memory"));
        }
        Ok(Self { element, dims, count, data })
    }

    fn bytes(&self) -> usize {
        self.count * self.element.bytes()
    }

    /// The addresses that it takes.
    fn range(&self) -> Range<usize> {
        self.data.addr()..self.data.addr() + self.bytes()
    }

    fn check<T: Native>(&self) -> Result<()> {
        if self.element.viewed() == T::ELEMENT && self.data.cast::<T>().is_aligned() {
            return Ok(());
        }
        Err(format!("an array of {} was expected, got {}", T::ELEMENT, self.element))
    }
}

/// Whether two ranges share an address; empty ones share none.
fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

/// The operands of a call.
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    list: &'a RawList,
    results: &'a RawList,
}

impl<'a> Operands<'a> {
    /// Their number.
    pub fn len(&self) -> usize {
        usize::try_from(self.list.size).unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An operand.
    ///
    /// # Errors
    /// When there is no such operand, or its type is unknown here.
    pub fn get(&self, index: usize) -> Result<Operand<'a>> {
        let view = View::of(self.list, index, "operand")?;
        let mut lies_in = None;
        for result in 0..usize::try_from(self.results.size).unwrap_or(0) {
            let of = View::of(self.results, result, "result")?.range();
            if overlap(&of, &view.range()) {
                lies_in = Some((result, of == view.range()));
            }
        }
        Ok(Operand { element: view.element, dims: view.dims, index, view, lies_in })
    }
}

/// A typed view of an operand.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    /// Element type.
    pub element: Element,
    /// Dimensions.
    pub dims: &'a [i64],
    index: usize,
    view: View<'a>,
    /// The result in whose memory it lies, and whether it is exactly that memory.
    lies_in: Option<(usize, bool)>,
}

impl<'a> Operand<'a> {
    /// The number of elements.
    pub fn len(&self) -> usize {
        self.view.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The result whose memory is this operand's: it holds the operand's values until it is written.
    pub fn aliased(&self) -> Option<usize> {
        self.lies_in.filter(|&(_, exactly)| exactly).map(|(result, _)| result)
    }

    /// The bytes, row-major.
    ///
    /// # Errors
    /// When the operand lies in the memory of a result.
    pub fn bytes(&self) -> Result<&'a [u8]> {
        self.readable()?;
        match self.view.bytes() {
            0 => Ok(&[]),
            // SAFETY: XLA passes a dense row-major array of this shape that lives as long as the call; no result
            // overlaps it, so that nothing writes it.
            size => Ok(unsafe { std::slice::from_raw_parts(self.view.data, size) }),
        }
    }

    /// The elements, row-major.
    ///
    /// # Errors
    /// When the operand has another element type, or lies in the memory of a result.
    pub fn values<T: Native>(&self) -> Result<&'a [T]> {
        self.readable()?;
        self.view.check::<T>()?;
        match self.view.count {
            0 => Ok(&[]),
            // SAFETY: as in `bytes`; type and alignment were checked.
            count => Ok(unsafe { std::slice::from_raw_parts(self.view.data.cast(), count) }),
        }
    }

    fn readable(&self) -> Result<()> {
        match self.lies_in {
            None => Ok(()),
            Some((result, _)) => {
                Err(format!("operand {} lies in the memory of result {result}: look at that result", self.index))
            }
        }
    }
}

/// The results of a call.
pub struct Results<'a> {
    list: &'a RawList,
}

impl<'a> Results<'a> {
    /// Their number.
    pub fn len(&self) -> usize {
        usize::try_from(self.list.size).unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn view(&self, index: usize) -> Result<View<'a>> {
        View::of(self.list, index, "result")
    }

    /// Element type and dimensions of a result.
    ///
    /// # Errors
    /// When there is no such result, or its type is unknown here.
    pub fn ty(&self, index: usize) -> Result<(Element, &'a [i64])> {
        self.view(index).map(|view| (view.element, view.dims))
    }

    /// The bytes of a result, row-major, to be written.
    ///
    /// # Errors
    /// As [`ty`](Self::ty).
    pub fn bytes(&mut self, index: usize) -> Result<&mut [u8]> {
        let view = self.view(index)?;
        match view.bytes() {
            0 => Ok(&mut []),
            // SAFETY: XLA passes writable memory of this size for each result; operands in it cannot be looked into, and
            // `&mut self` keeps the borrow unique.
            size => Ok(unsafe { std::slice::from_raw_parts_mut(view.data, size) }),
        }
    }

    /// The elements of all results, row-major, to be written.
    ///
    /// # Errors
    /// When there are not `N` results, or one has another element type.
    pub fn values<T: Native, const N: usize>(self) -> Result<[&'a mut [T]; N]> {
        if self.len() != N {
            return Err(format!("{} results, {N} expected", self.len()));
        }
        let mut slices = Vec::with_capacity(N);
        for index in 0..N {
            // SAFETY: each index once, and the results are used up.
            slices.push(unsafe { self.slice(index)? });
        }
        Ok(slices.try_into().unwrap_or_else(|_| unreachable!("there are N of them")))
    }

    /// The elements of both results, each of its own type, row-major, to be written.
    ///
    /// # Errors
    /// When there are not two results, or one has another element type.
    pub fn pair<A: Native, B: Native>(self) -> Result<(&'a mut [A], &'a mut [B])> {
        match self.len() {
            // SAFETY: each index once, and the results are used up.
            2 => Ok(unsafe { (self.slice(0)?, self.slice(1)?) }),
            len => Err(format!("{len} results, 2 expected")),
        }
    }

    /// # Safety
    /// Nothing else looks at this result.
    unsafe fn slice<T: Native>(&self, index: usize) -> Result<&'a mut [T]> {
        let view = self.view(index)?;
        view.check::<T>()?;
        match view.count {
            0 => Ok(&mut []),
            // SAFETY: as in `bytes`; no two results overlap, type and alignment were checked.
            count => Ok(unsafe { std::slice::from_raw_parts_mut(view.data.cast(), count) }),
        }
    }
}

/// What a call is given beside arrays.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    raw: &'a RawFrame,
}

impl<'a> Options<'a> {
    /// A string attribute of the call's `backend_config` dictionary.
    pub fn string(&self, name: &str) -> Option<&'a str> {
        let attributes = &self.raw.attrs;
        (0..usize::try_from(attributes.size).unwrap_or(0)).find_map(|index| {
            // SAFETY: XLA passes `size` attributes; a name is a byte span, a string attribute too.
            unsafe {
                let span = &**attributes.names.add(index);
                if *attributes.types.add(index) != ATTRIBUTE_STRING || span.bytes() != name.as_bytes() {
                    return None;
                }
                std::str::from_utf8((*(*attributes.attrs.add(index)).cast::<RawSpan>()).bytes()).ok()
            }
        })
    }

    /// XLA's own threads for the duration of the call, which saves a second pool that fights the first for the cores.
    /// The caller's thread alone where the plugin lends none.
    pub fn threads(&self) -> Pool<'a> {
        Pool::of(self.raw)
    }
}

fn element(dtype: c_int) -> Option<Element> {
    Some(match dtype {
        1 => Element::Pred,
        2 => Element::I8,
        3 => Element::I16,
        4 => Element::I32,
        5 => Element::I64,
        6 => Element::U8,
        7 => Element::U16,
        8 => Element::U32,
        9 => Element::U64,
        10 => Element::F16,
        11 => Element::F32,
        12 => Element::F64,
        16 => Element::Bf16,
        19 => Element::F8E5M2,
        20 => Element::F8E4M3Fn,
        23 => Element::F8E4M3B11Fnuz,
        33 => Element::F8E8M0Fnu,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;
    use std::ptr::{null, null_mut};

    use super::super::ffi::RawAttributes;
    use super::*;

    /// A call whose buffers are `i32` arrays of one dimension in `memory`: where each begins, and how long it is.
    fn with_frame<R>(
        memory: &mut [i32],
        operands: &[(usize, i64)],
        results: &[(usize, i64)],
        look: impl FnOnce(Result<Frame<'_>>) -> R,
    ) -> R {
        let base = memory.as_mut_ptr();
        let sizes: Vec<i64> = operands.iter().chain(results).map(|&(_, size)| size).collect();
        let buffer = |(index, &(start, _)): (usize, &(usize, i64))| RawBuffer {
            struct_size: size_of::<RawBuffer>(),
            extension_start: null_mut(),
            dtype: 4,
            data: base.wrapping_add(start).cast::<c_void>(),
            rank: 1,
            dims: &sizes[index],
        };
        let mut buffers: Vec<RawBuffer> = operands.iter().chain(results).enumerate().map(buffer).collect();
        let items: Vec<*mut c_void> = buffers.iter_mut().map(|buffer| (&raw mut *buffer).cast()).collect();
        let list = |items: &[*mut c_void]| RawList {
            struct_size: size_of::<RawList>(),
            extension_start: null_mut(),
            size: items.len() as i64,
            types: null(),
            items: items.as_ptr(),
        };
        let (args, rets) = items.split_at(operands.len());
        let raw = RawFrame {
            struct_size: size_of::<RawFrame>(),
            extension_start: null_mut(),
            api: null(),
            context: null_mut(),
            stage: 3,
            args: list(args),
            rets: list(rets),
            attrs: RawAttributes {
                struct_size: size_of::<RawAttributes>(),
                extension_start: null_mut(),
                size: 0,
                types: null(),
                names: null(),
                attrs: null(),
            },
        };
        // SAFETY: the buffers lie in `memory`, which is borrowed alone; options and threads are not asked for.
        look(unsafe { Frame::of(&raw) })
    }

    #[test]
    fn operands_are_read_while_results_are_written() {
        let mut memory = [1, 2, 3, 4, 0, 0, 0];
        with_frame(&mut memory, &[(0, 2), (2, 2), (4, 0)], &[(4, 2), (6, 1)], |frame| {
            let Frame { operands, results, options } = frame.unwrap();
            let [a, b, empty] = [0, 1, 2].map(|index| operands.get(index).unwrap());
            let (a, b) = (a.values::<i32>().unwrap(), b.values::<i32>().unwrap());
            assert!(empty.is_empty() && empty.values::<i32>().unwrap().is_empty());
            let [sums, count] = results.values::<i32, 2>().unwrap();
            for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                *sum = a + b;
            }
            count[0] = operands.len() as i32;
            assert_eq!(options.string("mode"), None);
            assert!(operands.get(3).is_err() && operands.get(0).unwrap().values::<f32>().is_err());
        });
        assert_eq!(memory, [1, 2, 3, 4, 4, 6, 3]);
    }

    #[test]
    fn what_lies_in_a_result_has_no_values() {
        // An operand's place beside the result at 2..4, and the result that is its memory.
        for (operand, aliased, readable) in [
            ((0, 2), None, true),
            ((4, 2), None, true),
            ((2, 0), None, true),
            ((2, 2), Some(0), false),
            ((1, 2), None, false),
            ((3, 3), None, false),
            ((0, 6), None, false),
            ((2, 1), None, false),
        ] {
            with_frame(&mut [0; 6], &[operand], &[(2, 2)], |frame| {
                let mut frame = frame.unwrap();
                let view = frame.operands.get(0).unwrap();
                assert_eq!((view.aliased(), view.dims), (aliased, &[operand.1][..]), "{operand:?}");
                assert_eq!(view.values::<i32>().is_ok(), readable, "{operand:?}");
                assert_eq!(view.bytes().is_ok(), readable, "{operand:?}");
                assert_eq!(frame.results.bytes(0).unwrap().len(), 8);
            });
        }
    }

    #[test]
    fn results_that_overlap_are_refused() {
        for (second, refused) in [((2, 2), false), ((1, 0), false), ((1, 1), true), ((0, 2), true)] {
            let error = with_frame(&mut [0; 4], &[], &[(0, 2), second], |frame| frame.err());
            assert_eq!(error, refused.then(|| "results 0 and 1 overlap".to_owned()), "{second:?}");
        }
        let negative = with_frame(&mut [0; 4], &[(0, -1)], &[], |frame| frame.unwrap().operands.get(0).err());
        assert_eq!(negative.unwrap(), "operand 0 has dimensions [-1]");
    }
}
