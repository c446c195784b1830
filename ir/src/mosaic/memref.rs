//! References to memory: views of HBM, VMEM, SMEM and semaphores, the loads and stores on them, and the DMAs between
//! them.

use std::fmt;

use melior::ir::{
    Type,
    attribute::{BoolAttribute, DenseI32ArrayAttribute, IntegerAttribute},
    r#type::MemRefType,
};

use super::{
    builder::Builder,
    tiling::LANES,
    value::{IntoOperand, Literal, Value, vector_type},
};
use crate::{
    element::Element,
    shape::{TensorType, element_type},
};

/// What types and `iteration_bounds` hold for a size that is known when the kernel runs (MLIR's `ShapedType::kDynamic`).
pub(super) const DYNAMIC: i64 = i64::MIN;

/// A memory of the TPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemorySpace {
    /// Wherever the compiler put the array (for an operand: HBM); reached by DMAs only.
    Any,
    /// High-bandwidth memory; reached by DMAs only.
    Hbm,
    /// Vector memory: tiles are loaded from and stored to it.
    Vmem,
    /// Vector memory that a SparseCore's subcores share; reached by DMAs only.
    VmemShared,
    /// Scalar memory: 32-bit scalars, one at a time.
    Smem,
    /// Semaphores.
    Semaphore,
    /// The host's memory; reached by DMAs only.
    Host,
}

impl MemorySpace {
    /// All memories.
    pub const ALL: [Self; 7] =
        [Self::Any, Self::Hbm, Self::Vmem, Self::VmemShared, Self::Smem, Self::Semaphore, Self::Host];

    /// The mnemonic in `#tpu.memory_space<...>`.
    pub const fn mnemonic(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::Hbm => "hbm",
            Self::Vmem => "vmem",
            Self::VmemShared => "vmem_shared",
            Self::Smem => "smem",
            Self::Semaphore => "semaphore_mem",
            Self::Host => "host",
        }
    }
}

impl fmt::Display for MemorySpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.mnemonic())
    }
}

/// What one cell of a memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefElement {
    /// A number.
    Data(Element),
    /// A semaphore that DMAs signal.
    DmaSemaphore,
    /// A counting semaphore.
    Semaphore,
}

impl RefElement {
    /// The number's type, if it is one.
    pub fn data(self) -> Option<Element> {
        match self {
            Self::Data(element) => Some(element),
            Self::DmaSemaphore | Self::Semaphore => None,
        }
    }
}

impl fmt::Display for RefElement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(element) => element.fmt(f),
            Self::DmaSemaphore => f.write_str("dma_semaphore"),
            Self::Semaphore => f.write_str("semaphore"),
        }
    }
}

/// `bf16[8,128]`.
pub(crate) fn describe(element: RefElement, dims: &[usize]) -> String {
    let sizes: Vec<_> = dims.iter().map(usize::to_string).collect();
    format!("{element}[{}]", sizes.join(","))
}

/// The MLIR type `memref<8x128xbf16, #tpu.memory_space<vmem>>`.
pub(super) fn memref_type<'c>(
    context: &'c melior::Context,
    element: RefElement,
    dims: &[usize],
    space: MemorySpace,
) -> Type<'c> {
    let dims: Vec<i64> = dims.iter().map(|&size| size as i64).collect();
    memref_type_of(context, element, &dims, space)
}

/// As [`memref_type`]; sizes may be [`DYNAMIC`].
fn memref_type_of<'c>(context: &'c melior::Context, element: RefElement, dims: &[i64], space: MemorySpace) -> Type<'c> {
    let foreign = |text| Type::parse(context, text).expect("the tpu dialect is allowed unregistered");
    let element = match element {
        RefElement::Data(element) => element_type(context, element),
        RefElement::DmaSemaphore => foreign("!tpu.dma_semaphore"),
        RefElement::Semaphore => foreign("!tpu.semaphore"),
    };
    let space = format!("#tpu.memory_space<{}>", space.mnemonic());
    let space = melior::ir::Attribute::parse(context, &space).expect("the tpu dialect is allowed unregistered");
    MemRefType::new(element, dims, None, Some(space)).into()
}

/// Indices: one operand, or an array, a tuple or a vector of them.
pub trait IntoIndices<'a> {
    /// As literals.
    fn literals(self) -> Vec<Literal<'a>>;
}

impl<'a, T: IntoOperand<'a>> IntoIndices<'a> for T {
    fn literals(self) -> Vec<Literal<'a>> {
        vec![self.literal()]
    }
}

impl<'a, T: IntoOperand<'a>, const N: usize> IntoIndices<'a> for [T; N] {
    fn literals(self) -> Vec<Literal<'a>> {
        self.into_iter().map(IntoOperand::literal).collect()
    }
}

impl<'a, T: IntoOperand<'a>> IntoIndices<'a> for Vec<T> {
    fn literals(self) -> Vec<Literal<'a>> {
        self.into_iter().map(IntoOperand::literal).collect()
    }
}

macro_rules! index_tuples {
    ($(($($part:ident $index:tt),*))*) => {$(
        impl<'a, $($part: IntoOperand<'a>),*> IntoIndices<'a> for ($($part,)*) {
            fn literals(self) -> Vec<Literal<'a>> {
                vec![$(self.$index.literal()),*]
            }
        }
    )*};
}

index_tuples! { (A 0, B 1) (A 0, B 1, C 2) (A 0, B 1, C 2, D 3) (A 0, B 1, C 2, D 3, E 4) }

/// One dimension of a view.
#[derive(Clone, Copy)]
struct Axis<'a> {
    start: Literal<'a>,
    size: usize,
    stride: usize,
    /// An index rather than a range: the dimension is gone from the view.
    point: bool,
}

/// A view of memory (Pallas: a `Ref` and its indexers). Cheap to slice: nothing is emitted before it is used.
#[derive(Clone)]
pub struct Ref<'a> {
    k: &'a Builder<'a>,
    base: mlir_sys::MlirValue,
    element: RefElement,
    space: MemorySpace,
    /// The sizes of the memory that `base` names.
    whole: Vec<usize>,
    axes: Vec<Axis<'a>>,
}

impl<'a> Ref<'a> {
    pub(super) fn whole(
        k: &'a Builder<'a>,
        base: mlir_sys::MlirValue,
        element: RefElement,
        space: MemorySpace,
        dims: &[usize],
    ) -> Self {
        let axes = dims.iter().map(|&size| Axis { start: Literal::Int(0), size, stride: 1, point: false }).collect();
        Self { k, base, element, space, whole: dims.to_vec(), axes }
    }

    /// The sizes of the view.
    pub fn dims(&self) -> Vec<usize> {
        self.axes.iter().filter(|axis| !axis.point).map(|axis| axis.size).collect()
    }

    /// What its cells hold.
    pub fn element(&self) -> RefElement {
        self.element
    }

    /// The memory that it is in.
    pub fn space(&self) -> MemorySpace {
        self.space
    }

    fn describe(&self) -> String {
        format!("{} in {}", describe(self.element, &self.dims()), self.space)
    }

    /// The positions in `axes` of the view's dimensions.
    fn ranges(&self) -> Vec<usize> {
        (0..self.axes.len()).filter(|&axis| !self.axes[axis].point).collect()
    }

    /// The part at the given indices of the leading dimensions, which disappear.
    #[track_caller]
    pub fn at(&self, indices: impl IntoIndices<'a>) -> Self {
        let indices = indices.literals();
        let ranges = self.ranges();
        let mut view = self.clone();
        if indices.len() > ranges.len() {
            self.k.fail("tpu.memref_slice", format!("{} indices into {}", indices.len(), self.describe()));
            return view;
        }
        for (index, position) in indices.into_iter().zip(ranges) {
            let axis = &mut view.axes[position];
            self.k.check_range("tpu.memref_slice", self, position, index, 1, 1);
            *axis = Axis { start: self.k.offset(axis, index), size: 1, stride: 1, point: true };
        }
        view
    }

    /// `size` elements of dimension `dim`, from `start` (Pallas: `pl.ds(start, size)`).
    #[track_caller]
    pub fn slice(&self, dim: usize, start: impl IntoOperand<'a>, size: usize) -> Self {
        self.strided(dim, start, size, 1)
    }

    /// Every `stride`th element of dimension `dim` from `start`, `size` of them.
    #[track_caller]
    pub fn strided(&self, dim: usize, start: impl IntoOperand<'a>, size: usize, stride: usize) -> Self {
        let mut view = self.clone();
        let Some(&position) = self.ranges().get(dim) else {
            self.k.fail("tpu.memref_slice", format!("dimension {dim} of {}", self.describe()));
            return view;
        };
        let start = start.literal();
        let fits = self.k.check_range("tpu.memref_slice", self, position, start, size, stride);
        let axis = &mut view.axes[position];
        let start = if fits { self.k.offset(axis, start) } else { Literal::Int(0) };
        *axis = Axis { start, size: size.max(1), stride: axis.stride * stride.max(1), point: false };
        view
    }

    /// The elements in the same order with other sizes. The view must be whole, or a range of its leading dimension.
    #[track_caller]
    pub fn reshape(&self, dims: &[usize]) -> Self {
        let own = self.dims();
        if own.iter().product::<usize>() != dims.iter().product::<usize>() || own.last() != dims.last() {
            let message =
                format!("{} to {dims:?}: the minor dimension and the number of elements stay", self.describe());
            self.k.fail("tpu.memref_reshape", message);
            return self.clone();
        }
        self.recast("tpu.memref_reshape", self.element, dims)
    }

    /// The memory read as another element type; the second-minor size changes by the ratio of the widths, as the TPU
    /// packs narrow elements along sublanes.
    #[track_caller]
    pub fn bitcast(&self, to: Element) -> Self {
        let op = "tpu.memref_bitcast";
        let mut dims = self.dims();
        let fit = match (self.element, dims.len().checked_sub(2)) {
            (RefElement::Data(from), Some(dim)) if (dims[dim] * from.bits()).is_multiple_of(to.bits()) => {
                dims[dim] = dims[dim] * from.bits() / to.bits();
                true
            }
            _ => false,
        };
        if !fit {
            self.k.fail(op, format!("{} to {to}: the second-minor size does not divide", self.describe()));
            return self.clone();
        }
        self.recast(op, RefElement::Data(to), &dims)
    }

    #[track_caller]
    fn recast(&self, op: &str, element: RefElement, dims: &[usize]) -> Self {
        let k = self.k;
        let source = self.materialise(op);
        let result = memref_type(k.context, element, dims, self.space);
        let base = k.emit(op, &[source], &[], &[result], vec![], k.here())[0];
        Self::whole(k, base, element, self.space, dims)
    }

    /// The view as a memref of its own, for ops that take no indices.
    #[track_caller]
    fn materialise(&self, op: &str) -> mlir_sys::MlirValue {
        self.materialise_first(op, None)
    }

    /// As [`materialise`](Self::materialise); with a count, as many elements of the leading dimension.
    #[track_caller]
    fn materialise_first(&self, op: &str, count: Option<Value<'a>>) -> mlir_sys::MlirValue {
        let k = self.k;
        let location = k.here();
        if self.axes.iter().any(|axis| axis.stride != 1) {
            k.fail(op, format!("a strided view of {}", self.describe()));
        }
        let mut memref = self.base;
        let is_whole = |(axis, &size): (&Axis, &usize)| axis.size == size && matches!(axis.start, Literal::Int(0));
        let mut sizes: Vec<_> = self.axes.iter().map(|axis| axis.size as i64).collect();
        if let (Some(_), Some(&leading)) = (count, self.ranges().first()) {
            sizes[leading] = DYNAMIC;
        }
        if count.is_some() || !self.axes.iter().zip(&self.whole).all(is_whole) {
            let mut operands = vec![memref];
            for axis in &self.axes {
                operands.push(k.scalar_i32("tpu.memref_slice", axis.start).raw);
            }
            operands.extend(count.map(|count| count.raw));
            let segments = [1, self.axes.len() as i32, i32::from(count.is_some())];
            let segments = DenseI32ArrayAttribute::new(k.context, &segments).into();
            let result = memref_type_of(k.context, self.element, &sizes, self.space);
            let attributes = [("operandSegmentSizes", segments)];
            memref = k.emit("tpu.memref_slice", &operands, &attributes, &[result], vec![], location)[0];
        }
        if self.axes.iter().any(|axis| axis.point) {
            let sizes: Vec<_> = self.ranges().into_iter().map(|axis| sizes[axis]).collect();
            let result = memref_type_of(k.context, self.element, &sizes, self.space);
            memref = k.emit("tpu.memref_squeeze", &[memref], &[], &[result], vec![], location)[0];
        }
        memref
    }

    fn data(&self, op: &str) -> Element {
        match self.element {
            RefElement::Data(element) => element,
            _ => {
                self.k.fail(op, format!("{} holds no numbers", self.describe()));
                Element::I32
            }
        }
    }

    /// The operands of a load or store: `before`, then an index per dimension of the memory.
    #[track_caller]
    fn with_indices(&self, op: &str, before: &[mlir_sys::MlirValue]) -> Vec<mlir_sys::MlirValue> {
        // A loop and not an iterator: closures would hide the kernel's source line from the ops made here.
        let mut operands = before.to_vec();
        for axis in &self.axes {
            operands.push(self.k.index(op, axis.start));
        }
        operands
    }

    /// Sizes of the tile that a load or store moves, points included.
    fn box_dims(&self) -> Vec<usize> {
        self.axes.iter().map(|axis| axis.size).collect()
    }

    fn strides(&self) -> Option<Vec<i32>> {
        let strides: Vec<i32> = self.axes.iter().map(|axis| axis.stride as i32).collect();
        strides.iter().any(|&stride| stride != 1).then_some(strides)
    }

    /// The tile that the view holds (VMEM), or its one scalar (SMEM).
    #[track_caller]
    pub fn load(&self) -> Value<'a> {
        let k = self.k;
        if self.space == MemorySpace::Smem {
            return self.load_scalar();
        }
        let op = if self.strides().is_some() { "tpu.strided_load" } else { "vector.load" };
        let element = self.data(op);
        let dims = self.dims();
        if self.space != MemorySpace::Vmem || dims.is_empty() {
            k.fail(op, format!("{}: only VMEM holds tiles to load; copy it there first", self.describe()));
            return k.placeholder_of(element, &dims);
        }
        let operands = self.with_indices(op, &[self.base]);
        let attributes: Vec<_> = self
            .strides()
            .map(|strides| ("strides", DenseI32ArrayAttribute::new(k.context, &strides).into()))
            .into_iter()
            .collect();
        let result = vector_type(k.context, element, &self.box_dims());
        k.emit_one(op, &operands, &attributes, result, k.here()).reshape(&dims)
    }

    #[track_caller]
    fn load_scalar(&self) -> Value<'a> {
        let op = "memref.load";
        let element = self.data(op);
        if !self.dims().is_empty() {
            self.k.fail(
                op,
                format!("{}: SMEM is read one scalar at a time, give an index per dimension", self.describe()),
            );
            return self.k.placeholder_of(element, &[]);
        }
        let operands = self.with_indices(op, &[self.base]);
        self.k.emit_one(op, &operands, &[], element_type(self.k.context, element), self.k.here())
    }

    /// The tile where `mask` holds, `otherwise` elsewhere. All of the view must be readable.
    #[track_caller]
    pub fn load_masked(&self, mask: Value<'a>, otherwise: impl IntoOperand<'a>) -> Value<'a> {
        mask.select(self.load(), otherwise)
    }

    /// Writes a tile (VMEM) or a scalar (SMEM) of the view's sizes; a scalar or a literal fills a tile.
    #[track_caller]
    pub fn store(&self, value: impl IntoOperand<'a>) {
        self.store_where(value.literal(), None);
    }

    /// [`store`](Self::store) of the elements where `mask` holds; the others keep what they are.
    #[track_caller]
    pub fn store_masked(&self, value: impl IntoOperand<'a>, mask: Value<'a>) {
        self.store_where(value.literal(), Some(mask));
    }

    #[track_caller]
    fn store_where(&self, value: Literal<'a>, mask: Option<Value<'a>>) {
        let k = self.k;
        let dims = self.dims();
        let op = match (self.space, self.strides()) {
            (MemorySpace::Smem, _) => "memref.store",
            (_, Some(_)) => "tpu.strided_store",
            (_, None) => "tpu.vector_store",
        };
        let element = self.data(op);
        let value = match value {
            Literal::Value(tile) if !tile.dims().is_empty() => tile,
            scalar => k.splat_literal(op, element, &dims, scalar),
        };
        if value.ty() != TensorType::new(element, &dims) {
            k.fail(op, format!("a value {} into {}", value.ty(), self.describe()));
            return;
        }
        let location = k.here();
        if op == "memref.store" {
            if !dims.is_empty() || mask.is_some() {
                k.fail(op, format!("{}: SMEM is written one scalar at a time", self.describe()));
                return;
            }
            let operands = self.with_indices(op, &[value.raw, self.base]);
            k.emit(op, &operands, &[], &[], vec![], location);
            return;
        }
        if self.space != MemorySpace::Vmem || dims.is_empty() {
            k.fail(op, format!("{}: only VMEM takes tiles; copy from there", self.describe()));
            return;
        }
        let value = value.reshape(&self.box_dims());
        let mut operands = self.with_indices(op, &[value.raw, self.base]);
        let strides = DenseI32ArrayAttribute::new(k.context, &self.strides().unwrap_or_default()).into();
        if op == "tpu.strided_store" {
            if mask.is_some() {
                k.fail(op, "a strided store takes no mask".into());
            }
            k.emit(op, &operands, &[("strides", strides)], &[], vec![], location);
            return;
        }
        if let Some(mask) = mask {
            if mask.ty() != TensorType::new(Element::Pred, &dims) {
                k.fail(op, format!("a mask {} for {}", mask.ty(), self.describe()));
                return;
            }
            operands.push(mask.reshape(&self.box_dims()).raw);
        }
        let segments = [1, 1, self.axes.len() as i32, i32::from(mask.is_some())];
        let attributes = [
            ("add", BoolAttribute::new(k.context, false).into()),
            ("operandSegmentSizes", DenseI32ArrayAttribute::new(k.context, &segments).into()),
            ("strides", strides),
        ];
        k.emit(op, &operands, &attributes, &[], vec![], location);
    }
}

/// A DMA: a copy between memories, started and waited for separately (Pallas: `pltpu.make_async_copy`).
///
/// Dropping it does nothing: a DMA of the same source, destination and semaphore may be described again, in another
/// iteration, to wait for it.
#[derive(Clone)]
pub struct Dma<'a> {
    source: Ref<'a>,
    destination: Ref<'a>,
    semaphore: Ref<'a>,
    /// How many elements of the leading dimension, where not all.
    count: Option<Value<'a>>,
}

impl<'a> Dma<'a> {
    #[track_caller]
    fn operands(&self, op: &str) -> [mlir_sys::MlirValue; 3] {
        let [source, destination] = [&self.source, &self.destination];
        [
            source.materialise_first(op, self.count),
            destination.materialise_first(op, self.count),
            self.semaphore.materialise(op),
        ]
    }

    /// The copy of no more than the first `count` elements of the leading dimension, which must not be one of the two minor
    /// ones: those are tiled. `count` is at most what the views have; where it is 0, nothing is moved or waited for.
    #[track_caller]
    pub fn first(self, count: Value<'a>) -> Self {
        let (k, op) = (self.source.k, "tpu.enqueue_dma");
        if self.source.dims().len() < 3 {
            k.fail(op, format!("a part of {}, whose dimensions are all tiled", self.source.describe()));
        }
        Self { count: Some(k.scalar_i32(op, Literal::Value(count))), ..self }
    }

    /// Starts it. Until it is waited for, the destination may be neither read nor written and the source not
    /// written.
    #[track_caller]
    pub fn start(&self) {
        let op = "tpu.enqueue_dma";
        let k = self.source.k;
        let [source, destination, semaphore] = self.operands(op);
        let attributes = [
            ("operandSegmentSizes", DenseI32ArrayAttribute::new(k.context, &[1, 0, 1, 1, 0, 0, 0]).into()),
            ("priority", IntegerAttribute::new(k.i32_type(), 0).into()),
            ("strict_ordering", BoolAttribute::new(k.context, false).into()),
        ];
        k.emit(op, &[source, destination, semaphore], &attributes, &[], vec![], k.here());
    }

    /// Waits until as many bytes as the destination holds have arrived on the semaphore.
    #[track_caller]
    pub fn wait(&self) {
        let op = "tpu.wait_dma2";
        let k = self.source.k;
        let [source, destination, semaphore] = self.operands(op);
        let attributes = [
            ("operandSegmentSizes", DenseI32ArrayAttribute::new(k.context, &[1, 1, 1, 0, 0]).into()),
            ("strict_ordering", BoolAttribute::new(k.context, false).into()),
        ];
        k.emit(op, &[semaphore, source, destination], &attributes, &[], vec![], k.here());
    }
}

/// Copies and semaphores.
impl<'a> Builder<'a> {
    /// Describes a DMA; nothing moves before [`Dma::start`].
    #[track_caller]
    pub fn make_async_copy(&'a self, source: Ref<'a>, destination: Ref<'a>, semaphore: Ref<'a>) -> Dma<'a> {
        let op = "tpu.enqueue_dma";
        if source.element != destination.element || source.dims() != destination.dims() {
            self.fail(op, format!("from {} to {}", source.describe(), destination.describe()));
        }
        let spaces = [source.space, destination.space];
        if spaces.contains(&MemorySpace::Semaphore) || source.dims().is_empty() {
            self.fail(op, format!("{} and {} cannot be copied", source.describe(), destination.describe()));
        }
        if semaphore.element != RefElement::DmaSemaphore || !semaphore.dims().is_empty() {
            self.fail(op, format!("the semaphore is {}: give one dma_semaphore", semaphore.describe()));
        }
        for view in [&source, &destination] {
            self.check_tiling(op, view);
        }
        Dma { source, destination, semaphore, count: None }
    }

    /// Describes a DMA and starts it.
    #[track_caller]
    pub fn async_copy(&'a self, source: Ref<'a>, destination: Ref<'a>, semaphore: Ref<'a>) -> Dma<'a> {
        let dma = self.make_async_copy(source, destination, semaphore);
        dma.start();
        dma
    }

    /// Adds `amount` to a counting semaphore.
    #[track_caller]
    pub fn semaphore_signal(&'a self, semaphore: &Ref<'a>, amount: impl IntoOperand<'a>) {
        let op = "tpu.sem_signal";
        let semaphore = self.counting(op, semaphore);
        let amount = self.scalar_i32(op, amount.literal()).raw;
        let segments = DenseI32ArrayAttribute::new(self.context, &[1, 1, 0, 0, 0]).into();
        self.emit(op, &[semaphore, amount], &[("operandSegmentSizes", segments)], &[], vec![], self.here());
    }

    /// Waits until a counting semaphore holds `amount`, and takes it.
    #[track_caller]
    pub fn semaphore_wait(&'a self, semaphore: &Ref<'a>, amount: impl IntoOperand<'a>) {
        let op = "tpu.sem_wait";
        let semaphore = self.counting(op, semaphore);
        let amount = self.scalar_i32(op, amount.literal()).raw;
        self.emit(op, &[semaphore, amount], &[], &[], vec![], self.here());
    }

    #[track_caller]
    fn counting(&'a self, op: &str, semaphore: &Ref<'a>) -> mlir_sys::MlirValue {
        if semaphore.element != RefElement::Semaphore || !semaphore.dims().is_empty() {
            self.fail(op, format!("{}: give one semaphore", semaphore.describe()));
        }
        semaphore.materialise(op)
    }

    /// The start of a view of a view.
    #[track_caller]
    fn offset(&'a self, axis: &Axis<'a>, start: Literal<'a>) -> Literal<'a> {
        match (axis.start, start) {
            (Literal::Int(base), Literal::Int(start)) => Literal::Int(base + start * axis.stride as i64),
            (Literal::Int(0), start) if axis.stride == 1 => start,
            (base, start) => {
                let op = "tpu.memref_slice";
                let start = self.scalar_i32(op, start);
                let start = if axis.stride == 1 { start } else { start * axis.stride };
                match base {
                    Literal::Int(0) => Literal::Value(start),
                    base => Literal::Value(self.scalar_i32(op, base) + start),
                }
            }
        }
    }

    /// Whether a range is inside a dimension, as far as the source says.
    #[track_caller]
    fn check_range(&self, op: &str, view: &Ref, axis: usize, start: Literal, size: usize, stride: usize) -> bool {
        let whole = view.axes[axis].size;
        let last = match start {
            Literal::Int(start) if start < 0 => None,
            Literal::Int(start) => Some(start as usize),
            Literal::Float(_) => None,
            Literal::Value(_) => Some(0),
        };
        let last = last.filter(|_| size > 0 && stride > 0).map(|start| start + (size - 1) * stride);
        let fits = last.is_some_and(|last| last < whole);
        if !fits {
            let start = match start {
                Literal::Int(start) => start.to_string(),
                Literal::Float(start) => start.to_string(),
                Literal::Value(_) => "a dynamic start".into(),
            };
            let message =
                format!("{size} elements from {start} with stride {stride} of dimension {axis} of size {whole}");
            self.fail(op, format!("{message} in {}", view.describe()));
        }
        fits
    }

    /// DMAs move whole tiles of the minor dimension: 128 lanes, or all there are.
    #[track_caller]
    fn check_tiling(&self, op: &str, view: &Ref) {
        let (Some(axis), Some(&whole)) = (view.axes.last(), view.whole.last()) else { return };
        let aligned = |value: usize| value.is_multiple_of(LANES);
        let start = matches!(axis.start, Literal::Int(start) if !aligned(start as usize));
        if axis.size != whole && (start || !aligned(axis.size)) {
            let message =
                format!("{}: a DMA takes whole tiles of {LANES} lanes of the minor dimension", view.describe());
            self.fail(op, message);
        }
    }
}
