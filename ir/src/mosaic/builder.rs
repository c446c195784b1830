//! The kernel being built: its operands, its control flow, and where the next op goes.

use std::{
    cell::{Cell, RefCell},
    marker::PhantomData,
    panic::Location as Caller,
};

use melior::ir::{
    Attribute, Block, BlockLike, Identifier, Location, Module, Region, RegionLike, Type, Value as MlirValue, ValueLike,
    attribute::{
        ArrayAttribute, DenseI64ArrayAttribute, DictionaryAttribute, FlatSymbolRefAttribute, IntegerAttribute,
        StringAttribute, TypeAttribute,
    },
    block::BlockRef,
    operation::{OperationBuilder, OperationLike, OperationRef},
    r#type::{FunctionType, IntegerType},
};

use super::{
    memref::{MemorySpace, Ref, RefElement, describe, memref_type},
    tiling::{LANES, SUBLANES},
    value::{Literal, Value, vector_type},
};
use crate::{
    context::{Context, diagnosed},
    element::Element,
    error::{Error, Result},
    shape::{TensorType, element_type},
};

/// How the steps of one grid dimension may be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Semantics {
    /// In any order, and on both TensorCores of chips that have two to a device (v4, v5p).
    Parallel,
    /// In order.
    Arbitrary,
}

impl Semantics {
    fn mnemonic(self) -> &'static str {
        match self {
            Self::Parallel => "parallel",
            Self::Arbitrary => "arbitrary",
        }
    }
}

/// What a kernel argument is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A small array that is in SMEM before the first grid step.
    Prefetch,
    /// An operand, windowed or whole.
    Input,
    /// A result, windowed or whole.
    Output,
    /// Memory of the kernel itself.
    Scratch,
}

/// One declared operand of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operand {
    /// The name that errors and the tile machine's faults use.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// What it holds.
    pub element: RefElement,
    /// The sizes of the whole array (scratch: of the buffer).
    pub dims: Vec<usize>,
    /// Where the kernel sees it.
    pub space: MemorySpace,
    /// The block of one grid step, for windowed operands.
    pub block: Option<Vec<usize>>,
    /// Whether it is windowed and has two buffers.
    pub double_buffered: bool,
}

/// From a grid step to the index of a block.
type BlockIndices<'a, 'f> = Box<dyn Fn(&Transform<'a>) -> Vec<Literal<'a>> + 'f>;

/// How an array is cut into the blocks that the pipeline brings into VMEM, one per grid step.
pub struct Window<'a, 'f> {
    block: Vec<usize>,
    transform: BlockIndices<'a, 'f>,
    double_buffered: bool,
}

impl<'a, 'f> Window<'a, 'f> {
    /// Blocks of sizes `block`; `transform` maps a grid step to the index of its block (in blocks, not in elements).
    ///
    /// Blocks at the far edge may hang over: what they read there is garbage, what they write there is dropped.
    pub fn blocks<I: super::IntoIndices<'a>>(block: &[usize], transform: impl Fn(&Transform<'a>) -> I + 'f) -> Self {
        Self { block: block.to_vec(), transform: Box::new(move |t| transform(t).literals()), double_buffered: true }
    }

    /// The whole array of sizes `dims` as one block, copied once.
    pub fn whole(dims: &[usize]) -> Self {
        let rank = dims.len();
        Self { block: dims.to_vec(), transform: Box::new(move |_| vec![Literal::Int(0); rank]), double_buffered: true }
    }

    /// One buffer instead of two: half the VMEM, and no overlap of DMA and compute.
    pub fn single_buffered(self) -> Self {
        Self { double_buffered: false, ..self }
    }
}

/// What a window's transform sees.
pub struct Transform<'a> {
    k: &'a Builder<'a>,
    grid: Vec<Value<'a>>,
    prefetch: Vec<Ref<'a>>,
}

impl<'a> Transform<'a> {
    /// The index of the step along grid dimension `dim`.
    #[track_caller]
    pub fn grid(&self, dim: usize) -> Value<'a> {
        self.grid.get(dim).copied().unwrap_or_else(|| {
            self.k.fail("func.func", format!("grid dimension {dim} of {}", self.grid.len()));
            self.k.int(0)
        })
    }

    /// The `index`th prefetched array.
    ///
    /// # Panics
    /// When fewer were declared before this window.
    pub fn prefetch(&self, index: usize) -> Ref<'a> {
        self.prefetch[index].clone()
    }
}

#[derive(Default)]
struct Signature {
    grid: Option<Vec<(usize, Semantics)>>,
    operands: Vec<Operand>,
    windows: Vec<Option<(String, Vec<usize>, bool)>>,
    aliases: Vec<(usize, usize)>,
    vmem_limit: Option<usize>,
    cost: Option<Cost>,
    unchecked: bool,
}

/// What one launch of a kernel costs at most, for XLA's cost analysis and scheduler, which cannot look into a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: u64,
    /// Exponentials, roots and the like.
    pub transcendentals: u64,
    /// Bytes read from HBM and written to it.
    pub bytes_accessed: u64,
}

/// A finished kernel: a verified Mosaic module and what its caller must know.
pub struct Kernel<'c> {
    name: String,
    module: Module<'c>,
    operands: Vec<Operand>,
    grid: Vec<(usize, Semantics)>,
    vmem_limit: Option<usize>,
    cost: Option<Cost>,
    aliases: Vec<(usize, usize)>,
    unchecked: bool,
    on_tile_machine: bool,
    /// The wire form, written with the first call: a program may call a kernel once a layer.
    pub(super) wire: std::cell::OnceCell<String>,
}

impl<'c> Kernel<'c> {
    /// The same kernel, whose calls name the tile machine ([`wire::TILE_MACHINE`](super::wire::TILE_MACHINE)) in place
    /// of a TPU: for programs that run on the host.
    pub fn for_tile_machine(self) -> Self {
        Self { on_tile_machine: true, ..self }
    }

    /// Whether calls name the tile machine.
    pub fn is_for_tile_machine(&self) -> bool {
        self.on_tile_machine
    }

    /// The kernel's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The Mosaic module.
    pub fn module(&self) -> &Module<'c> {
        &self.module
    }

    /// The module in MLIR's [readable form](super::text) (libtpu accepts it as a body, see [`wire`](super::wire)).
    pub fn text(&self) -> String {
        super::text::print(&self.module)
    }

    /// Every operand in the order of the kernel's arguments: prefetched, inputs, outputs, scratch.
    pub fn operands(&self) -> &[Operand] {
        &self.operands
    }

    /// The grid's sizes and semantics.
    pub fn grid(&self) -> &[(usize, Semantics)] {
        &self.grid
    }

    /// The arrays that the custom call takes: prefetched, then inputs.
    pub fn inputs(&self) -> Vec<TensorType> {
        self.arrays(|role| matches!(role, Role::Prefetch | Role::Input))
    }

    /// The arrays that the custom call returns.
    pub fn outputs(&self) -> Vec<TensorType> {
        self.arrays(|role| role == Role::Output)
    }

    fn arrays(&self, wanted: impl Fn(Role) -> bool) -> Vec<TensorType> {
        let operands = self.operands.iter().filter(|operand| wanted(operand.role));
        operands.filter_map(|operand| Some(TensorType::new(operand.element.data()?, &operand.dims))).collect()
    }

    /// The scoped VMEM limit in bytes that the kernel asks for; `None` for the chip's default.
    pub fn vmem_limit(&self) -> Option<usize> {
        self.vmem_limit
    }

    /// What a launch costs at most, if the kernel says.
    pub fn cost(&self) -> Option<Cost> {
        self.cost
    }

    /// Whether the compiler leaves out its checks of the bounds of DMAs.
    pub fn has_unchecked_bounds(&self) -> bool {
        self.unchecked
    }

    /// Pairs (input, output) that share memory, counted as in [`inputs`](Self::inputs) and [`outputs`](Self::outputs).
    pub fn aliases(&self) -> &[(usize, usize)] {
        &self.aliases
    }
}

/// Builds the kernel `name`: `body` declares its operands and writes its ops.
///
/// What belongs to a kernel stays in it, by its type: each kernel has a lifetime `'a` of its own. This compiles:
///
/// ```
/// use pagoda_ir::{Context, mosaic};
/// let (context, other) = (Context::new(), Context::new());
/// mosaic::kernel(&context, "outer", |k| {
///     let outer = k.int(1);
///     mosaic::kernel(&other, "inner", |k| {
///         let inner = k.int(2);
///         k.when(inner.equals(inner), || ());
///     }).expect("it is sound");
///     k.when(outer.equals(outer), || ());
/// })?;
/// # Ok::<(), pagoda_ir::Error>(())
/// ```
///
/// This does not, for the one reason that the inner kernel compares with a value of the outer one, whose lifetime is not
/// its own (E0521):
///
/// ```compile_fail,E0521
/// use pagoda_ir::{Context, mosaic};
/// let (context, other) = (Context::new(), Context::new());
/// mosaic::kernel(&context, "outer", |k| {
///     let outer = k.int(1);
///     mosaic::kernel(&other, "inner", |k| {
///         let inner = k.int(2);
///         k.when(inner.equals(outer), || ());
///     }).expect("it is sound");
///     k.when(outer.equals(outer), || ());
/// })?;
/// # Ok::<(), pagoda_ir::Error>(())
/// ```
///
/// Nor does a value that an inner kernel leaves with the outer one (E0521):
///
/// ```compile_fail,E0521
/// use pagoda_ir::{Context, mosaic};
/// let (context, other) = (Context::new(), Context::new());
/// mosaic::kernel(&context, "outer", |k| {
///     let mut outer = k.int(1);
///     mosaic::kernel(&other, "inner", |k| {
///         let inner = k.int(2);
///         k.when(inner.equals(inner), || ());
///         outer = inner;
///     }).expect("it is sound");
///     k.when(outer.equals(outer), || ());
/// })?;
/// # Ok::<(), pagoda_ir::Error>(())
/// ```
///
/// Nor a reference to memory ([`Ref`]) that outlives its kernel. This compiles:
///
/// ```
/// use pagoda_ir::{Context, Element, mosaic::{self, MemorySpace}};
/// let context = Context::new();
/// let mut kept = None;
/// mosaic::kernel(&context, "kernel", |k| {
///     let memory = k.scratch("memory", MemorySpace::Vmem, Element::F32, &[8, 128]);
///     memory.store(0.0);
///     kept = Some(memory.dims());
/// })?;
/// # Ok::<(), pagoda_ir::Error>(())
/// ```
///
/// This does not (E0521):
///
/// ```compile_fail,E0521
/// use pagoda_ir::{Context, Element, mosaic::{self, MemorySpace}};
/// let context = Context::new();
/// let mut kept = None;
/// mosaic::kernel(&context, "kernel", |k| {
///     let memory = k.scratch("memory", MemorySpace::Vmem, Element::F32, &[8, 128]);
///     memory.store(0.0);
///     kept = Some(memory);
/// })?;
/// # Ok::<(), pagoda_ir::Error>(())
/// ```
///
/// # Errors
/// The first op that does not fit, or MLIR's verifier's complaint.
pub fn kernel<'c>(context: &'c Context, name: &str, body: impl for<'a> FnOnce(&'a Builder<'a>)) -> Result<Kernel<'c>> {
    let context = context.melior();
    let module = Module::new(Location::unknown(context));
    let region = Region::new();
    let entry = region.append_block(Block::new(&[]));
    let state = State {
        block: Cell::new(entry.to_raw()),
        entry: entry.to_raw(),
        module: module.body().to_raw(),
        name: name.to_owned(),
        signature: RefCell::default(),
        error: RefCell::default(),
    };
    let builder = Builder { context, state: &state, brand: PhantomData };
    body(&builder);
    builder.emit("func.return", &[], &[], &[], vec![], Location::unknown(context));
    let State { signature, error, .. } = state;
    if let Some(error) = error.into_inner() {
        return Err(error);
    }
    let signature = signature.into_inner();
    define_kernel(context, &module, name, region, &signature)?;
    let (valid, diagnostics) = diagnosed(context, || module.as_operation().verify());
    if !valid {
        return Err(Error::Verify { module: name.to_owned(), diagnostics });
    }
    let mut operands = signature.operands;
    for (operand, argument) in operands.iter_mut().zip(super::Signature::read(&module)?.arguments) {
        operand.double_buffered = argument.window.is_some_and(|window| window.double_buffered);
    }
    Ok(Kernel {
        name: name.to_owned(),
        module,
        operands,
        grid: signature.grid.unwrap_or_default(),
        vmem_limit: signature.vmem_limit,
        cost: signature.cost,
        aliases: signature.aliases,
        unchecked: signature.unchecked,
        on_tile_machine: false,
        wire: std::cell::OnceCell::new(),
    })
}

fn define_kernel(context: &melior::Context, module: &Module, name: &str, region: Region, of: &Signature) -> Result<()> {
    let parse = |text: String| parse_attribute(context, &text);
    let grid = of.grid.as_deref().unwrap_or_default();
    let semantics = grid
        .iter()
        .map(|(_, semantics)| parse(format!("#tpu.dimension_semantics<{}>", semantics.mnemonic())))
        .collect::<Result<Vec<_>>>()?;
    let bounds: Vec<i64> = grid.iter().map(|&(size, _)| size as i64).collect();
    let i64_type = IntegerType::new(context, 64).into();
    let count = |role| of.operands.iter().filter(|operand| operand.role == role).count() as i64;
    let mut windows = Vec::new();
    for window in &of.windows {
        let mut entries = Vec::new();
        if let Some((transform, block, double_buffered)) = window {
            let block: Vec<i64> = block.iter().map(|&size| size as i64).collect();
            if !double_buffered {
                entries.push(("pipeline_mode", parse("#tpu.pipeline_mode<synchronous>".into())?));
            }
            entries.push(("transform_indices", FlatSymbolRefAttribute::new(context, transform).into()));
            entries.push(("window_bounds", DenseI64ArrayAttribute::new(context, &block).into()));
        }
        let entries: Vec<_> = entries.into_iter().map(|(key, value)| (Identifier::new(context, key), value)).collect();
        windows.push(DictionaryAttribute::new(context, &entries).into());
    }
    let block = region.first_block().expect("the kernel's region has its entry block");
    let inputs = (0..block.argument_count())
        .map(|index| block.argument(index).expect("within the count").r#type())
        .collect::<Vec<_>>();
    let attributes = [
        ("sym_name", StringAttribute::new(context, name).into()),
        ("function_type", TypeAttribute::new(FunctionType::new(context, &inputs, &[]).into()).into()),
        ("dimension_semantics", ArrayAttribute::new(context, &semantics).into()),
        ("iteration_bounds", DenseI64ArrayAttribute::new(context, &bounds).into()),
        ("scalar_prefetch", IntegerAttribute::new(i64_type, count(Role::Prefetch)).into()),
        ("scratch_operands", IntegerAttribute::new(i64_type, count(Role::Scratch)).into()),
        ("tpu.core_type", parse("#tpu.core_type<tc>".into())?),
        ("window_params", ArrayAttribute::new(context, &windows).into()),
    ];
    let function = OperationBuilder::new("func.func", Location::unknown(context))
        .add_attributes(&attributes.map(|(key, value): (_, Attribute)| (Identifier::new(context, key), value)))
        .add_regions([region])
        .build()
        .map_err(|error| Error::op("func.func", error.to_string()))?;
    module.body().insert_operation(0, function);
    Ok(())
}

pub(super) fn parse_attribute<'c>(context: &'c melior::Context, text: &str) -> Result<Attribute<'c>> {
    let (attribute, diagnostics) = diagnosed(context, || Attribute::parse(context, text));
    attribute.ok_or_else(|| Error::Text { text: text.to_owned(), diagnostics })
}

/// A kernel under construction. See the [module docs](super) for how it is used.
///
/// The lifetime `'a` is the kernel's brand: every [`kernel`] has its own, and no two of them unify, so that a value of
/// one kernel cannot be an operand of another (which may live in another context, or be gone).
pub struct Builder<'a> {
    pub(super) context: &'a melior::Context,
    /// Apart from the builder, whose borrow lasts for all of `'a`.
    state: &'a State,
    /// Invariant in `'a`.
    brand: PhantomData<fn(&'a ()) -> &'a ()>,
}

/// What changes while a kernel is built.
struct State {
    /// Where the next op goes.
    block: Cell<mlir_sys::MlirBlock>,
    /// The block of the kernel's function.
    entry: mlir_sys::MlirBlock,
    /// The module's block, which holds the functions.
    module: mlir_sys::MlirBlock,
    name: String,
    signature: RefCell<Signature>,
    error: RefCell<Option<Error>>,
}

/// A region whose ops are being written. Ops go where they went before as soon as it is over, by a panic as well.
struct OpenRegion<'a> {
    state: &'a State,
    outer: mlir_sys::MlirBlock,
    region: Option<Region<'a>>,
}

impl<'a> OpenRegion<'a> {
    fn of(state: &'a State, region: Region<'a>, block: mlir_sys::MlirBlock) -> Self {
        Self { state, outer: state.block.replace(block), region: Some(region) }
    }

    fn close(mut self) -> Region<'a> {
        self.region.take().expect("it is taken here only")
    }
}

impl Drop for OpenRegion<'_> {
    fn drop(&mut self) {
        self.state.block.set(self.outer);
        let Some(abandoned) = self.region.take() else { return };
        // A panic. Whoever catches it may hold values of the region, so it is never freed; the kernel is not to be had.
        std::mem::forget(abandoned);
        if let Ok(mut error) = self.state.error.try_borrow_mut() {
            let message = format!("the body of a region panicked (kernel `{}`)", self.state.name);
            error.get_or_insert(Error::op("func.func", message));
        }
    }
}

/// Declarations, in this order: grid, prefetched arrays, inputs, outputs, scratch.
impl<'a> Builder<'a> {
    /// The grid, and the index of the step along each of its dimensions.
    #[track_caller]
    pub fn grid<const N: usize>(&'a self, dims: [(usize, Semantics); N]) -> [Value<'a>; N] {
        let indices = self.grid_of(&dims);
        std::array::from_fn(|dim| indices[dim])
    }

    /// [`grid`](Self::grid) for a rank that is known at run time only.
    #[track_caller]
    pub fn grid_of(&'a self, dims: &[(usize, Semantics)]) -> Vec<Value<'a>> {
        let mut signature = self.state.signature.borrow_mut();
        if signature.grid.is_some() || !signature.operands.is_empty() {
            self.fail("func.func", "the grid is declared once, before every operand".into());
        }
        if let Some(dim) = dims.iter().position(|&(size, _)| size == 0 || size > i32::MAX as usize) {
            self.fail("func.func", format!("grid dimension {dim} has size {}", dims[dim].0));
        }
        signature.grid = Some(dims.to_vec());
        dims.iter().enumerate().map(|(dim, _)| self.argument(&format!("grid{dim}"), self.i32_type())).collect()
    }

    /// A small `i32` array that is in SMEM before the first step, for windows' transforms and for the body.
    #[track_caller]
    pub fn prefetch(&'a self, name: &str, element: Element, dims: &[usize]) -> Ref<'a> {
        self.declare(name, Role::Prefetch, RefElement::Data(element), dims, MemorySpace::Smem, None)
    }

    /// An input that the pipeline brings into VMEM block by block.
    #[track_caller]
    pub fn input(&'a self, name: &str, element: Element, dims: &[usize], window: Window<'a, '_>) -> Ref<'a> {
        self.declare(name, Role::Input, RefElement::Data(element), dims, MemorySpace::Vmem, Some(window))
    }

    /// An input that stays in HBM; the kernel copies what it needs itself.
    #[track_caller]
    pub fn hbm_input(&'a self, name: &str, element: Element, dims: &[usize]) -> Ref<'a> {
        self.declare(name, Role::Input, RefElement::Data(element), dims, MemorySpace::Hbm, None)
    }

    /// An output that the pipeline writes back from VMEM block by block.
    #[track_caller]
    pub fn output(&'a self, name: &str, element: Element, dims: &[usize], window: Window<'a, '_>) -> Ref<'a> {
        self.declare(name, Role::Output, RefElement::Data(element), dims, MemorySpace::Vmem, Some(window))
    }

    /// An output in HBM that the kernel writes by DMAs of its own.
    #[track_caller]
    pub fn hbm_output(&'a self, name: &str, element: Element, dims: &[usize]) -> Ref<'a> {
        self.declare(name, Role::Output, RefElement::Data(element), dims, MemorySpace::Hbm, None)
    }

    /// Memory of the kernel in VMEM or SMEM; it keeps its content from step to step.
    #[track_caller]
    pub fn scratch(&'a self, name: &str, space: MemorySpace, element: Element, dims: &[usize]) -> Ref<'a> {
        if !matches!(space, MemorySpace::Vmem | MemorySpace::Smem) {
            self.fail("func.func", format!("scratch `{name}` in {space}: use vmem or smem"));
        }
        self.declare(name, Role::Scratch, RefElement::Data(element), dims, space, None)
    }

    /// Semaphores that DMAs signal.
    #[track_caller]
    pub fn dma_semaphores(&'a self, name: &str, dims: &[usize]) -> Ref<'a> {
        self.declare(name, Role::Scratch, RefElement::DmaSemaphore, dims, MemorySpace::Semaphore, None)
    }

    /// Counting semaphores, for [`semaphore_signal`](Self::semaphore_signal) and
    /// [`semaphore_wait`](Self::semaphore_wait).
    #[track_caller]
    pub fn semaphores(&'a self, name: &str, dims: &[usize]) -> Ref<'a> {
        self.declare(name, Role::Scratch, RefElement::Semaphore, dims, MemorySpace::Semaphore, None)
    }

    /// Lets output `output` live in the memory of input `input` (both counted from 0, prefetched arrays included).
    pub fn alias(&self, input: usize, output: usize) {
        self.state.signature.borrow_mut().aliases.push((input, output));
    }

    /// Asks the compiler for `bytes` of scoped VMEM instead of the chip's default.
    pub fn vmem_limit(&self, bytes: usize) {
        self.state.signature.borrow_mut().vmem_limit = Some(bytes);
    }

    /// Has the compiler leave out its checks of the bounds of DMAs (Pallas: `disable_bounds_checks`), which take more than
    /// half of the scalar work of one. The tile machine checks them in any case.
    pub fn unchecked_bounds(&self) {
        self.state.signature.borrow_mut().unchecked = true;
    }

    /// Says what a launch costs at most.
    pub fn cost(&self, cost: Cost) {
        self.state.signature.borrow_mut().cost = Some(cost);
    }

    #[track_caller]
    fn declare(
        &'a self,
        name: &str,
        role: Role,
        element: RefElement,
        dims: &[usize],
        space: MemorySpace,
        window: Option<Window<'a, '_>>,
    ) -> Ref<'a> {
        let mut block = window.as_ref().map_or(dims, |window| &window.block).to_vec();
        {
            let signature = self.state.signature.borrow();
            if let Some(last) = signature.operands.last().filter(|last| last.role > role) {
                let message = format!(
                    "operand `{name}` ({role:?}) is declared after `{}` ({:?}): the order is prefetch, input, output, scratch",
                    last.name, last.role
                );
                self.fail("func.func", message);
            }
            if signature.operands.iter().any(|operand| operand.name == name) {
                self.fail("func.func", format!("two operands are called `{name}`"));
            }
        }
        if let Some(message) = unfit(element, dims, &block, space, window.is_some()) {
            self.fail("func.func", format!("operand `{name}` {}: {message}", describe(element, dims)));
            block = block.iter().map(|&size| size.max(1)).collect();
        }
        let index = self.state.signature.borrow().windows.len();
        let params = window.map(|window| {
            let transform = format!("transform_{index}");
            self.define_transform(&transform, &window, dims.len());
            (transform, window.block, window.double_buffered)
        });
        let mut signature = self.state.signature.borrow_mut();
        signature.operands.push(Operand {
            name: name.to_owned(),
            role,
            element,
            dims: dims.to_vec(),
            space,
            block: params.as_ref().map(|(_, block, _)| block.clone()),
            double_buffered: false,
        });
        if matches!(role, Role::Input | Role::Output) {
            signature.windows.push(params);
        }
        drop(signature);
        let base = self.argument(name, memref_type(self.context, element, &block, space)).raw;
        Ref::whole(self, base, element, space, &block)
    }

    fn define_transform(&'a self, symbol: &str, window: &Window<'a, '_>, rank: usize) {
        let location = Location::unknown(self.context);
        let (rank_of_grid, prefetched) = {
            let signature = self.state.signature.borrow();
            let prefetched = signature.operands.iter().filter(|operand| operand.role == Role::Prefetch);
            (signature.grid.as_ref().map_or(0, Vec::len), prefetched.cloned().collect::<Vec<_>>())
        };
        let arrays = prefetched.iter().map(|array| memref_type(self.context, array.element, &array.dims, array.space));
        let inputs: Vec<_> = std::iter::repeat_n(self.i32_type(), rank_of_grid).chain(arrays).collect();
        let region = self.region(&inputs, location, |arguments| {
            let (grid, arrays) = arguments.split_at(rank_of_grid);
            let whole = |(base, array): (&Value<'a>, &Operand)| {
                Ref::whole(self, base.raw, array.element, array.space, &array.dims)
            };
            let prefetch = arrays.iter().zip(&prefetched).map(whole).collect();
            let mut indices = (window.transform)(&Transform { k: self, grid: grid.to_vec(), prefetch });
            if indices.len() != rank {
                let message = format!("a window of rank {rank} whose transform yields {} indices", indices.len());
                self.fail("func.func", message);
                indices = vec![Literal::Int(0); rank];
            }
            ("func.return", indices.into_iter().map(|index| self.scalar_i32("func.return", index)).collect())
        });
        let results = vec![self.i32_type(); rank];
        let attributes = [
            ("sym_name", StringAttribute::new(self.context, symbol).into()),
            ("function_type", TypeAttribute::new(FunctionType::new(self.context, &inputs, &results).into()).into()),
        ];
        let outer = self.state.block.replace(self.state.module);
        self.emit("func.func", &[], &attributes, &[], vec![region], location);
        self.state.block.set(outer);
    }

    fn argument(&'a self, name: &str, r#type: Type<'a>) -> Value<'a> {
        let location = Location::name(self.context, name, Location::unknown(self.context));
        // SAFETY: the entry block lives as long as the builder.
        let entry = unsafe { BlockRef::from_raw(self.state.entry) };
        self.value(entry.add_argument(r#type, location).to_raw())
    }
}

/// Why an operand cannot be declared like this.
fn unfit(element: RefElement, dims: &[usize], block: &[usize], space: MemorySpace, windowed: bool) -> Option<String> {
    if dims.iter().chain(block).any(|&size| size == 0 || size > i32::MAX as usize) {
        return Some(format!("every size must be from 1 to {} (block {block:?})", i32::MAX));
    }
    if let RefElement::Data(element) = element
        && !matches!(element, Element::I8 | Element::I16 | Element::I32 | Element::Bf16 | Element::F32)
        && !matches!(element, Element::F8E4M3Fn | Element::F8E5M2)
    {
        return Some(format!("Mosaic memory holds i8, i16, i32, f8e4m3fn, f8e5m2, bf16 and f32, not {element}"));
    }
    if space == MemorySpace::Smem
        && element != RefElement::Data(Element::I32)
        && element != RefElement::Data(Element::F32)
    {
        return Some("SMEM holds 32-bit scalars".into());
    }
    if block.len() != dims.len() {
        return Some(format!("a block of rank {} {block:?}", block.len()));
    }
    if space == MemorySpace::Vmem && dims.is_empty() {
        return Some("VMEM holds no scalars: give it a dimension".into());
    }
    // The pipeline's DMAs move whole tiles: Pallas's rule for block shapes.
    let tile = [SUBLANES, LANES];
    for (from_minor, (&size, &whole)) in block.iter().rev().zip(dims.iter().rev()).enumerate().take(2) {
        let multiple = tile[1 - from_minor];
        if windowed && size != whole && size % multiple != 0 {
            return Some(format!(
                "block {block:?}: the size of dimension {} must be the array's ({whole}) or a multiple of {multiple}",
                block.len() - 1 - from_minor
            ));
        }
    }
    None
}

/// Values that a loop or a branch hands on: a [`Value`], or tuples, arrays and vectors of them.
pub trait Carry<'a>: Sized {
    /// Appends the values.
    fn flatten(&self, values: &mut Vec<Value<'a>>);
    /// The same structure with other values.
    fn rebuild(&self, values: &mut dyn Iterator<Item = Value<'a>>) -> Self;
}

impl<'a> Carry<'a> for Value<'a> {
    fn flatten(&self, values: &mut Vec<Value<'a>>) {
        values.push(*self);
    }

    fn rebuild(&self, values: &mut dyn Iterator<Item = Value<'a>>) -> Self {
        values.next().unwrap_or(*self)
    }
}

impl<'a, C: Carry<'a>> Carry<'a> for Vec<C> {
    fn flatten(&self, values: &mut Vec<Value<'a>>) {
        self.iter().for_each(|carry| carry.flatten(values));
    }

    fn rebuild(&self, values: &mut dyn Iterator<Item = Value<'a>>) -> Self {
        self.iter().map(|carry| carry.rebuild(values)).collect()
    }
}

impl<'a, C: Carry<'a>, const N: usize> Carry<'a> for [C; N] {
    fn flatten(&self, values: &mut Vec<Value<'a>>) {
        self.iter().for_each(|carry| carry.flatten(values));
    }

    fn rebuild(&self, values: &mut dyn Iterator<Item = Value<'a>>) -> Self {
        std::array::from_fn(|index| self[index].rebuild(values))
    }
}

macro_rules! carry_tuples {
    ($(($($part:ident $index:tt),*))*) => {$(
        impl<'a $(, $part: Carry<'a>)*> Carry<'a> for ($($part,)*) {
            fn flatten(&self, values: &mut Vec<Value<'a>>) {
                $(self.$index.flatten(values);)*
            }

            fn rebuild(&self, values: &mut dyn Iterator<Item = Value<'a>>) -> Self {
                ($(self.$index.rebuild(values),)*)
            }
        }
    )*};
}

impl<'a> Carry<'a> for () {
    fn flatten(&self, _: &mut Vec<Value<'a>>) {}

    fn rebuild(&self, _: &mut dyn Iterator<Item = Value<'a>>) -> Self {}
}

carry_tuples! { (A 0) (A 0, B 1) (A 0, B 1, C 2) (A 0, B 1, C 2, D 3) (A 0, B 1, C 2, D 3, E 4) }

/// Control flow.
impl<'a> Builder<'a> {
    /// Runs `then` when the scalar `condition` holds (Pallas: `@pl.when`).
    #[track_caller]
    pub fn when(&'a self, condition: Value<'a>, then: impl FnOnce()) {
        self.if_else(condition, then, || ());
    }

    /// One of two branches; both yield values of the same types.
    #[track_caller]
    pub fn if_else<C: Carry<'a>>(
        &'a self,
        condition: Value<'a>,
        then: impl FnOnce() -> C,
        otherwise: impl FnOnce() -> C,
    ) -> C {
        let op = "scf.if";
        let (caller, location) = (Caller::caller(), self.here());
        let condition = self.condition(caller, op, condition);
        let mut yielded = None;
        let then = self.region(&[], location, |_| {
            let carry = then();
            let values = flat(&carry);
            yielded = Some(carry);
            ("scf.yield", values)
        });
        let yielded = yielded.expect("the closure ran");
        let types: Vec<_> = flat(&yielded).iter().map(Value::mlir_type).collect();
        let otherwise = self.region(&[], location, |_| {
            let mut values = flat(&otherwise());
            self.match_types(caller, op, "the else branch", &types, &mut values);
            ("scf.yield", values)
        });
        let results = self.emit(op, &[condition.raw], &[], &types, vec![then, otherwise], location);
        yielded.rebuild(&mut results.into_iter().map(|raw| self.value(raw)))
    }

    /// `body(i)` for `i` in `low..high`.
    #[track_caller]
    pub fn for_range(
        &'a self,
        low: impl super::IntoOperand<'a>,
        high: impl super::IntoOperand<'a>,
        body: impl FnOnce(Value<'a>),
    ) {
        self.fold_range(low, high, (), |i, ()| body(i));
    }

    /// `carry = body(i, carry)` for `i` in `low..high`; the last carry.
    #[track_caller]
    pub fn fold_range<C: Carry<'a>>(
        &'a self,
        low: impl super::IntoOperand<'a>,
        high: impl super::IntoOperand<'a>,
        initial: C,
        body: impl FnOnce(Value<'a>, C) -> C,
    ) -> C {
        let op = "scf.for";
        let (caller, location) = (Caller::caller(), self.here());
        let low = self.scalar_i32(op, low.literal()).raw;
        let high = self.scalar_i32(op, high.literal()).raw;
        let one = self.scalar_i32(op, Literal::Int(1)).raw;
        let values = flat(&initial);
        let types: Vec<_> = values.iter().map(Value::mlir_type).collect();
        let arguments = [&[self.i32_type()], types.as_slice()].concat();
        let region = self.region(&arguments, location, |arguments| {
            let mut next = flat(&body(arguments[0], initial.rebuild(&mut arguments[1..].iter().copied())));
            self.match_types(caller, op, "the body", &types, &mut next);
            ("scf.yield", next)
        });
        let operands: Vec<_> = [low, high, one].into_iter().chain(values.iter().map(|value| value.raw)).collect();
        let results = self.emit(op, &operands, &[], &types, vec![region], location);
        initial.rebuild(&mut results.into_iter().map(|raw| self.value(raw)))
    }

    /// `carry = body(carry)` as long as `condition(carry)` holds; the first carry for which it does not.
    #[track_caller]
    pub fn while_loop<C: Carry<'a>>(
        &'a self,
        initial: C,
        condition: impl FnOnce(C) -> Value<'a>,
        body: impl FnOnce(C) -> C,
    ) -> C {
        let op = "scf.while";
        let (caller, location) = (Caller::caller(), self.here());
        let values = flat(&initial);
        let types: Vec<_> = values.iter().map(Value::mlir_type).collect();
        let before = self.region(&types, location, |arguments| {
            let holds = condition(initial.rebuild(&mut arguments.iter().copied()));
            let mut values = vec![self.condition(caller, op, holds)];
            values.extend(arguments);
            ("scf.condition", values)
        });
        let after = self.region(&types, location, |arguments| {
            let mut next = flat(&body(initial.rebuild(&mut arguments.iter().copied())));
            self.match_types(caller, op, "the body", &types, &mut next);
            ("scf.yield", next)
        });
        let operands: Vec<_> = values.iter().map(|value| value.raw).collect();
        let results = self.emit(op, &operands, &[], &types, vec![before, after], location);
        initial.rebuild(&mut results.into_iter().map(|raw| self.value(raw)))
    }

    /// Groups the ops of `body` under `label` in profiles of the compiler.
    #[track_caller]
    pub fn trace<R>(&'a self, label: &str, body: impl FnOnce() -> R) -> R {
        let location = self.here();
        let level = IntegerAttribute::new(self.i32_type(), 10).into();
        let attributes = [("level", level), ("message", StringAttribute::new(self.context, label).into())];
        self.emit("tpu.trace_start", &[], &attributes, &[], vec![], location);
        let result = body();
        self.emit("tpu.trace_stop", &[], &[], &[], vec![], location);
        result
    }

    fn condition(&'a self, caller: &Caller, op: &str, condition: Value<'a>) -> Value<'a> {
        if condition.element() == Element::Pred && condition.dims().is_empty() {
            return condition;
        }
        self.fail_at(caller, op, format!("the condition must be a scalar pred, not {}", condition.ty()));
        self.placeholder(element_type(self.context, Element::Pred))
    }

    fn match_types(&'a self, caller: &Caller, op: &str, what: &str, types: &[Type<'a>], values: &mut Vec<Value<'a>>) {
        if values.len() != types.len() {
            self.fail_at(caller, op, format!("{what} yields {} values for {}", values.len(), types.len()));
            *values = types.iter().map(|&r#type| self.placeholder(r#type)).collect();
        }
        for (index, (&r#type, value)) in types.iter().zip(values).enumerate() {
            if value.mlir_type() != r#type {
                self.fail_at(
                    caller,
                    op,
                    format!("{what} yields {} as value {index}, which is {}", value.mlir_type(), r#type),
                );
                *value = self.placeholder(r#type);
            }
        }
    }

    /// A region of one block; `body` returns its terminator.
    fn region(
        &'a self,
        arguments: &[Type<'a>],
        location: Location<'a>,
        body: impl FnOnce(&[Value<'a>]) -> (&'static str, Vec<Value<'a>>),
    ) -> Region<'a> {
        let region = Region::new();
        let block = region.append_block(Block::new(&arguments.iter().map(|&ty| (ty, location)).collect::<Vec<_>>()));
        let values: Vec<_> = (0..arguments.len())
            .map(|index| self.value(block.argument(index).expect("within the count").to_raw()))
            .collect();
        let block = block.to_raw();
        let open = OpenRegion::of(self.state, region, block);
        let (terminator, operands) = body(&values);
        let operands: Vec<_> = operands.iter().map(|value| value.raw).collect();
        self.emit(terminator, &operands, &[], &[], vec![], location);
        open.close()
    }
}

fn flat<'a>(carry: &impl Carry<'a>) -> Vec<Value<'a>> {
    let mut values = Vec::new();
    carry.flatten(&mut values);
    values
}

/// The machinery below every op.
impl<'a> Builder<'a> {
    /// Remembers the first error of the kernel.
    #[track_caller]
    pub(super) fn fail(&self, op: &str, message: String) {
        self.fail_at(Caller::caller(), op, message);
    }

    /// [`fail`](Self::fail) from inside a closure, which would hide the kernel's source line.
    fn fail_at(&self, caller: &Caller, op: &str, message: String) {
        let message = format!("{message} (kernel `{}`, {}:{})", self.state.name, caller.file(), caller.line());
        self.state.error.borrow_mut().get_or_insert(Error::op(op, message));
    }

    /// The kernel's source line that called the builder.
    #[track_caller]
    pub(super) fn here(&self) -> Location<'a> {
        let caller = Caller::caller();
        Location::new(self.context, caller.file(), caller.line() as usize, caller.column() as usize)
    }

    pub(super) fn value(&'a self, raw: mlir_sys::MlirValue) -> Value<'a> {
        Value { k: self, raw }
    }

    /// Appends an op and returns its results.
    pub(super) fn emit(
        &self,
        name: &str,
        operands: &[mlir_sys::MlirValue],
        attributes: &[(&str, Attribute<'a>)],
        results: &[Type<'a>],
        regions: Vec<Region<'a>>,
        location: Location<'a>,
    ) -> Vec<mlir_sys::MlirValue> {
        // SAFETY: every raw value was made by this builder: the brand keeps those of other kernels out and these in. Its
        // ops live as long as the kernel's region and module, or as the process (`OpenRegion`).
        let operands: Vec<_> = operands.iter().map(|&raw| unsafe { MlirValue::from_raw(raw) }).collect();
        let attributes: Vec<_> =
            attributes.iter().map(|&(key, value)| (Identifier::new(self.context, key), value)).collect();
        let built = diagnosed(self.context, || {
            OperationBuilder::new(name, location)
                .add_operands(&operands)
                .add_attributes(&attributes)
                .add_results(results)
                .add_regions_vec(regions)
                .build()
        });
        let operation = match built {
            (Ok(operation), _) => operation,
            (Err(_), diagnostics) => {
                self.state.error.borrow_mut().get_or_insert(Error::op(name, diagnostics));
                return results.iter().map(|&r#type| self.placeholder_raw(r#type)).collect();
            }
        };
        // SAFETY: the current block lives as long as its region, which an enclosing call or the kernel owns.
        let block = unsafe { BlockRef::from_raw(self.state.block.get()) };
        let operation: OperationRef = block.append_operation(operation);
        operation.results().map(|result| result.to_raw()).collect()
    }

    /// Appends an op with one result.
    pub(super) fn emit_one(
        &'a self,
        name: &str,
        operands: &[mlir_sys::MlirValue],
        attributes: &[(&str, Attribute<'a>)],
        result: Type<'a>,
        location: Location<'a>,
    ) -> Value<'a> {
        self.value(self.emit(name, operands, attributes, &[result], vec![], location)[0])
    }

    /// Stands for the result of an op that failed.
    pub(super) fn placeholder(&'a self, r#type: Type<'a>) -> Value<'a> {
        self.value(self.placeholder_raw(r#type))
    }

    fn placeholder_raw(&self, r#type: Type<'a>) -> mlir_sys::MlirValue {
        let location = Location::unknown(self.context);
        self.emit("builtin.unrealized_conversion_cast", &[], &[], &[r#type], vec![], location)[0]
    }

    /// [`placeholder`](Self::placeholder) of a tile or scalar.
    pub(super) fn placeholder_of(&'a self, element: Element, dims: &[usize]) -> Value<'a> {
        self.placeholder(vector_type(self.context, element, dims))
    }

    pub(super) fn i32_type(&self) -> Type<'a> {
        IntegerType::new(self.context, 32).into()
    }

    /// An attribute of a dialect, by its text.
    pub(super) fn attribute(&self, op: &str, text: &str) -> Attribute<'a> {
        parse_attribute(self.context, text).unwrap_or_else(|error| {
            self.state.error.borrow_mut().get_or_insert(Error::op(op, error.to_string()));
            Attribute::unit(self.context)
        })
    }
}
