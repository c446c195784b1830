//! What a Mosaic module says about its kernel: grid, windows, buffers. Reads modules of any origin.

use std::collections::HashSet;

use melior::ir::{
    Attribute, AttributeLike, BlockLike, BlockRef, Identifier, Module, RegionLike, Type, TypeLike, ValueLike,
    attribute::{
        ArrayAttribute, DenseI64ArrayAttribute, DictionaryAttribute, FlatSymbolRefAttribute, IntegerAttribute,
        StringAttribute,
    },
    operation::{OperationLike, OperationRef},
    r#type::{MemRefType, ShapedTypeLike},
};

use super::{
    builder::{Role, Semantics},
    location::describe_function,
    memref::{DYNAMIC, MemorySpace, RefElement},
    tiling::tile_padded_bytes,
};
use crate::{
    context::printed,
    error::{Error, Result},
    shape::element_of,
};

/// The kernel function of a Mosaic module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The function's symbol.
    pub name: String,
    /// What runs it.
    pub core: CoreType,
    /// Which grid dimensions are the cores of a SparseCore kernel, and their subcores, as far as the module names them.
    pub core_dims: [Option<usize>; 2],
    /// Size and semantics of each grid dimension; no size where the call gives it, as one of its first operands.
    pub grid: Vec<(Option<usize>, Semantics)>,
    /// The memrefs that follow the grid indices, in order.
    pub arguments: Vec<Argument>,
}

/// A kind of core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CoreType {
    /// A TensorCore.
    #[default]
    TensorCore,
    /// The scalar subcore of a SparseCore.
    ScalarSubcore,
    /// A vector subcore of a SparseCore.
    VectorSubcore,
}

impl CoreType {
    /// The kind that a module's text names: in `#tpu.core_type<sc_vector_subcore>` for instance, or in the type of memory that is
    /// another core's.
    pub(crate) fn in_text(text: &str) -> Option<Self> {
        [
            ("sc_scalar_subcore", Self::ScalarSubcore),
            ("sc_vector_subcore", Self::VectorSubcore),
            ("tc", Self::TensorCore),
        ]
        .into_iter()
        .find_map(|(name, core)| {
            let mut words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
            words.any(|word| word == name).then_some(core)
        })
    }

    fn of(function: OperationRef) -> Self {
        let named = function.attribute("tpu.core_type").ok();
        named.and_then(|core| Self::in_text(&printed(&core))).unwrap_or_default()
    }
}

/// One memref argument of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// The name that the kernel's author gave it, or `argN`.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// What it holds.
    pub element: RefElement,
    /// The sizes that the kernel sees: of a block for windowed operands, of the array or buffer otherwise.
    pub dims: Vec<usize>,
    /// The memory that it is in.
    pub space: MemorySpace,
    /// How the pipeline fills it, for windowed operands.
    pub window: Option<WindowParams>,
}

/// The window of a pipelined operand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowParams {
    /// The function that maps a grid step to the index of its block.
    pub transform: String,
    /// The sizes of a block.
    pub block: Vec<usize>,
    /// Whether it has two buffers: unless the kernel asks for one, or the block is the same in every step (the compiler
    /// gives such a window one buffer; seen with libtpu 0.0.52).
    pub double_buffered: bool,
    /// Whether a step may come back to a block of an output that an earlier one, and not the one before it, wrote
    /// (`revisit_mode` `any` of JAX's `pl.Buffered`): the pipeline then brings back what was written.
    pub revisits: bool,
    /// For windows of JAX's `pl.Element`, whose transform counts elements instead of blocks: how many elements the array is
    /// padded with before its first and after its last, by dimension.
    pub element_padding: Option<Vec<(usize, usize)>>,
}

/// Elements of a buffer and steps of a grid that a kernel may have: so many that no chip has them, so few that no sum of
/// bytes overflows.
const MOST: usize = 1 << 40;

/// Whether the product of `sizes`, zeros left out, is within [`MOST`].
pub(crate) fn countable(mut sizes: impl Iterator<Item = usize>) -> bool {
    let product = sizes.try_fold(1_usize, |product, size| product.checked_mul(size.max(1)));
    product.is_some_and(|product| product <= MOST)
}

impl Argument {
    /// Bytes of memory that the buffer takes: tiles padded in VMEM and SMEM ([`tile_padded_bytes`]), and twice that if
    /// double-buffered; 4 a semaphore. Zero for arrays in HBM.
    pub fn bytes(&self) -> usize {
        let cells = self.dims.iter().product::<usize>();
        let buffers = 1 + usize::from(self.window.as_ref().is_some_and(|window| window.double_buffered));
        match (self.space, self.element) {
            (MemorySpace::Any | MemorySpace::Hbm | MemorySpace::Host, _) => 0,
            (MemorySpace::Vmem | MemorySpace::VmemShared | MemorySpace::Smem, RefElement::Data(element)) => {
                buffers * tile_padded_bytes(element, &self.dims)
            }
            _ => 4 * cells,
        }
    }
}

impl Signature {
    /// Reads the kernel of `module` (readable form); where it has a function for each of several kinds of cores, the first.
    ///
    /// # Errors
    /// When the module has no kernel function, or one whose attributes do not fit its arguments.
    pub fn read(module: &Module) -> Result<Self> {
        Self::of(kernel_functions(module)?[0], &functions(module))
    }

    /// That of a kernel function, one of a module's `functions`.
    pub(crate) fn of(function: OperationRef, functions: &[OperationRef]) -> Result<Self> {
        let name = symbol(function)?;
        let bounds = integers(function, "iteration_bounds").unwrap_or_default();
        let semantics: Vec<_> = array(function, "dimension_semantics").iter().map(printed).collect();
        let grid = bounds
            .iter()
            .enumerate()
            .map(|(dim, &size)| {
                let parallel = semantics.get(dim).is_some_and(|text| text.contains("parallel"));
                let size = match (size, usize::try_from(size)) {
                    (DYNAMIC, _) => None,
                    (_, Ok(size)) => Some(size),
                    (size, Err(_)) => {
                        let at = describe_function(function);
                        let message = format!("grid dimension {dim} is of size {size}; sizes are 0 or more");
                        return Err(Error::mosaic(format!("@{name}: {message} (at {at})")));
                    }
                };
                Ok((size, if parallel { Semantics::Parallel } else { Semantics::Arbitrary }))
            })
            .collect::<Result<Vec<_>>>()?;
        if !countable(grid.iter().filter_map(|&(size, _)| size)) {
            return Err(Error::mosaic(format!("@{name}: the grid {bounds:?} has more than 2^40 steps")));
        }
        let entry =
            first_block(function).ok_or_else(|| Error::mosaic(format!("the kernel function @{name} has no body")))?;
        let count = entry.argument_count();
        let memrefs = count
            .checked_sub(grid.len())
            .ok_or_else(|| Error::mosaic(format!("@{name} has {count} arguments for a grid of rank {}", grid.len())))?;
        let prefetch = integer(function, "scalar_prefetch").unwrap_or(0);
        let scratch = integer(function, "scratch_operands").unwrap_or(0);
        let windows = array(function, "window_params");
        let windowed = memrefs.checked_sub(prefetch + scratch).ok_or_else(|| {
            Error::mosaic(format!("@{name}: {memrefs} memrefs, of which {prefetch} prefetched and {scratch} scratch"))
        })?;
        if !windows.is_empty() && windows.len() != windowed {
            return Err(Error::mosaic(format!("@{name}: {} window_params for {windowed} operands", windows.len())));
        }
        let mut arguments = Vec::new();
        for index in 0..memrefs {
            let position = grid.len() + index;
            let argument = entry.argument(position).map_err(|error| Error::mosaic(error.to_string()))?;
            let (element, dims, space) = static_memref(argument.r#type()).map_err(|message| {
                let at = describe_function(function);
                Error::mosaic(format!("@{name}: argument {position}: {message} (at {at})"))
            })?;
            if !countable(dims.iter().copied()) {
                return Err(Error::mosaic(format!(
                    "@{name}: argument {position} of {dims:?} has more than 2^40 elements"
                )));
            }
            let role = match index {
                _ if index < prefetch => Role::Prefetch,
                _ if index >= prefetch + windowed => Role::Scratch,
                _ => Role::Input,
            };
            let window = match windows.get(index.wrapping_sub(prefetch)) {
                Some(&params) if role == Role::Input => window_params(params, functions, &grid)?,
                _ => None,
            };
            if window.as_ref().is_some_and(|window| window.block != dims) {
                return Err(Error::mosaic(format!("@{name}: argument {position} is {dims:?}, not its window's block")));
            }
            let location = argument.location();
            let name = match location.is_name() {
                true => identifier(location.name_value()),
                false => format!("arg{position}"),
            };
            arguments.push(Argument { name, role, element, dims, space, window });
        }
        // `#tpu.dimension_semantics<core_parallel>`
        let named = |name: &str| {
            let mut words = semantics.iter().map(|text| text.trim_end_matches('>').rsplit('<').next());
            words.position(|word| word == Some(name))
        };
        let core_dims = ["core_parallel", "subcore_parallel"].map(named);
        Ok(Self { name, core: CoreType::of(function), core_dims, grid, arguments })
    }

    /// How many sizes of the grid the call gives: as many scalars are its first operands.
    pub fn dynamic_grid_sizes(&self) -> usize {
        self.grid.iter().filter(|(size, _)| size.is_none()).count()
    }

    /// Marks the last `outputs` operands before the scratch as outputs. The module itself does not say which operands are
    /// outputs; the custom call around it does.
    pub fn with_outputs(mut self, outputs: usize) -> Self {
        let operands = self.arguments.iter_mut().filter(|argument| matches!(argument.role, Role::Input | Role::Output));
        let operands: Vec<_> = operands.collect();
        let first = operands.len().saturating_sub(outputs);
        for (index, argument) in operands.into_iter().enumerate() {
            argument.role = if index < first { Role::Input } else { Role::Output };
        }
        self
    }

    /// Bytes of VMEM that the kernel declares, tile padding and double buffers included.
    pub fn vmem_bytes(&self) -> usize {
        let is_vmem = |argument: &&Argument| matches!(argument.space, MemorySpace::Vmem | MemorySpace::VmemShared);
        let vmem = self.arguments.iter().filter(is_vmem);
        vmem.map(Argument::bytes).sum()
    }
}

/// The functions with a grid, one for each kind of core, or the only function.
pub(crate) fn kernel_functions<'c, 'a>(module: &'a Module<'c>) -> Result<Vec<OperationRef<'c, 'a>>> {
    let functions = functions(module);
    let of_kernel = |function: &&OperationRef| function.has_attribute("iteration_bounds");
    let kernels: Vec<OperationRef> = functions.iter().filter(of_kernel).copied().collect();
    let mut cores = HashSet::new();
    match (kernels.as_slice(), functions.as_slice()) {
        ([], [only]) => Ok(vec![*only]),
        ([], _) => {
            let message = format!("the module has {} functions and none with iteration_bounds", functions.len());
            Err(Error::mosaic(message))
        }
        (several, _) if !several.iter().all(|kernel| cores.insert(CoreType::of(*kernel))) => {
            Err(Error::mosaic("the module has two kernel functions for one kind of core"))
        }
        _ => Ok(kernels),
    }
}

/// Whether a function is for a SparseCore.
pub(crate) fn is_for_sparse_core(function: OperationRef) -> bool {
    CoreType::of(function) != CoreType::TensorCore
}

pub(crate) fn functions<'c, 'a>(module: &'a Module<'c>) -> Vec<OperationRef<'c, 'a>> {
    let first = module.body().first_operation();
    let all = std::iter::successors(first, |operation| operation.next_in_block());
    all.filter(|operation| op_name(*operation) == "func.func").collect()
}

/// The first block of an operation's first region. Nothing is asked for beyond the last region, result or argument: melior prints
/// the operation into such an error, and MLIR dies of printing some that are damaged.
pub(crate) fn first_block<'c: 'a, 'a>(operation: OperationRef<'c, 'a>) -> Option<BlockRef<'c, 'a>> {
    operation.regions().next()?.first_block()
}

pub(crate) fn op_name(operation: OperationRef) -> String {
    identifier(operation.name())
}

/// The text of an identifier, whatever bytes a damaged module has there.
pub(crate) fn identifier(identifier: Identifier) -> String {
    // SAFETY: the identifier is valid.
    text_of(unsafe { mlir_sys::mlirIdentifierStr(identifier.to_raw()) })
}

fn text_of(string: mlir_sys::MlirStringRef) -> String {
    if string.length == 0 {
        return String::new(); // its pointer may be null
    }
    // SAFETY: MLIR's strings live as long as the context that they were taken from.
    let bytes = unsafe { std::slice::from_raw_parts(string.data.cast(), string.length) };
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn symbol(function: OperationRef) -> Result<String> {
    let name = function.attribute("sym_name").ok().and_then(|name| StringAttribute::try_from(name).ok());
    // SAFETY: it is a string attribute.
    name.map(|name| text_of(unsafe { mlir_sys::mlirStringAttrGetValue(name.to_raw()) }))
        .ok_or_else(|| Error::mosaic("a function without a name"))
}

fn integers(operation: OperationRef, name: &str) -> Option<Vec<i64>> {
    i64_array(operation.attribute(name).ok()?)
}

pub(crate) fn i64_array(attribute: Attribute) -> Option<Vec<i64>> {
    // Asked first: a failed conversion prints the attribute, and MLIR reads arrays from bytecode that it dies of printing.
    let array = attribute.is_dense_i64_array().then(|| DenseI64ArrayAttribute::try_from(attribute).ok())??;
    (0..array.len()).map(|index| array.element(index).ok()).collect()
}

fn integer(operation: OperationRef, name: &str) -> Option<usize> {
    let attribute = IntegerAttribute::try_from(operation.attribute(name).ok()?).ok()?;
    usize::try_from(attribute.value()).ok()
}

fn array<'c>(operation: OperationRef<'c, '_>, name: &str) -> Vec<Attribute<'c>> {
    let array = operation.attribute(name).ok().and_then(|attribute| ArrayAttribute::try_from(attribute).ok());
    array.map_or_else(Vec::new, |array| (0..array.len()).filter_map(|index| array.element(index).ok()).collect())
}

fn window_params(
    attribute: Attribute,
    functions: &[OperationRef],
    grid: &[(Option<usize>, Semantics)],
) -> Result<Option<WindowParams>> {
    let params = DictionaryAttribute::try_from(attribute).map_err(|error| Error::mosaic(error.to_string()))?;
    let Some(bounds) = params.element_by_name("window_bounds") else {
        return Ok(None);
    };
    let kind = params.element_by_name("window_kind").map(|kind| printed(&kind));
    let transform =
        params.element_by_name("transform_indices").and_then(|name| FlatSymbolRefAttribute::try_from(name).ok());
    // SAFETY: it is a symbol reference.
    let transform = transform.map(|name| text_of(unsafe { mlir_sys::mlirFlatSymbolRefAttrGetValue(name.to_raw()) }));
    let (Some(transform), Some(block)) = (transform, i64_array(bounds)) else {
        return Err(Error::mosaic(format!("window {} lacks transform_indices or sizes", printed(&attribute))));
    };
    let element_padding = match kind {
        None => None,
        Some(kind) => Some(
            element_padding(&kind)
                .filter(|padding| padding.len() == block.len())
                .ok_or_else(|| Error::mosaic(format!("windows of kind {kind} are not supported")))?,
        ),
    };
    let mode = params.element_by_name("pipeline_mode").map(|mode| printed(&mode)).unwrap_or_default();
    let revisits = params.element_by_name("revisit_mode").is_some_and(|mode| printed(&mode).contains("any"));
    let function = functions.iter().find(|function| symbol(**function).is_ok_and(|name| name == transform));
    let function = function.ok_or_else(|| Error::mosaic(format!("no function @{transform}")))?;
    Ok(Some(WindowParams {
        transform,
        block: block.into_iter().map(|size| size as usize).collect(),
        double_buffered: !mode.contains("synchronous") && moves(*function, grid),
        revisits,
        element_padding,
    }))
}

/// The padding in `#tpu.element_window<[0, 8],[0, 0]>`: of each dimension, before and after.
fn element_padding(kind: &str) -> Option<Vec<(usize, usize)>> {
    let lists = kind.strip_prefix("#tpu.element_window<")?.strip_suffix('>')?;
    let (low, high) = lists.trim().strip_prefix('[')?.strip_suffix(']')?.split_once(']')?;
    let list = |text: &str| text.split(',').map(|size| size.trim().parse().ok()).collect::<Option<Vec<usize>>>();
    let (low, high) = (list(low)?, list(high.trim_start_matches([',', ' ']).strip_prefix('[')?)?);
    (low.len() == high.len()).then(|| low.into_iter().zip(high).collect())
}

/// Whether a window's transform depends on the grid step.
fn moves(transform: OperationRef, grid: &[(Option<usize>, Semantics)]) -> bool {
    let Some(entry) = first_block(transform) else { return true };
    let count = entry.argument_count();
    let still = grid.iter().enumerate().filter(|(_, (size, _))| *size == Some(1)).map(|(dim, _)| dim);
    let still = still.chain(grid.len()..count).filter(|&index| index < count);
    let still = still.filter_map(|index| entry.argument(index).ok());
    // Values that are the same in every step: constants, prefetched arrays, and what is computed from them.
    let mut fixed: HashSet<_> = still.map(|argument| argument.to_raw().ptr).collect();
    let operations = std::iter::successors(entry.first_operation(), |operation| operation.next_in_block());
    for operation in operations {
        let depends = operation.operands().any(|operand| !fixed.contains(&operand.to_raw().ptr));
        match op_name(operation).as_str() {
            "func.return" => return depends,
            _ if depends || operation.region_count() > 0 => {}
            _ => fixed.extend(operation.results().map(|result| result.to_raw().ptr)),
        }
    }
    true
}

/// Element, sizes and memory of a memref type, all sizes of which are fixed.
fn static_memref(r#type: Type) -> std::result::Result<(RefElement, Vec<usize>, MemorySpace), String> {
    let (element, dims, space) = read_memref(r#type)?;
    let dims = dims.into_iter().collect::<Option<Vec<_>>>();
    Ok((element, dims.ok_or_else(|| format!("{} has a dynamic size", printed(&r#type)))?, space))
}

/// Element, sizes and memory of a memref type; a size that is known at run time only is `None`.
pub(crate) fn read_memref(r#type: Type) -> std::result::Result<(RefElement, Vec<Option<usize>>, MemorySpace), String> {
    let memref = MemRefType::try_from(r#type).map_err(|_| format!("{} is not a memref", printed(&r#type)))?;
    let dims = (0..memref.rank())
        // SAFETY: the type is a ranked memref and the dimension is within its rank.
        .map(|dim| unsafe { mlir_sys::mlirShapedTypeGetDimSize(memref.to_raw(), dim as isize) })
        .map(|size| usize::try_from(size).ok())
        .collect();
    let space = memref.memory_space().map(|space| printed(&space)).unwrap_or_default();
    // `#tpu.memory_space<vmem>`, or the string "vmem" where the module was read from text; the same goes for semaphores,
    // which are integers then.
    let mnemonic = space.strip_prefix("#tpu.memory_space<").and_then(|rest| rest.strip_suffix('>'));
    // The core whose memory it is may follow.
    let mnemonic = mnemonic.unwrap_or(space.trim_matches('"')).split(',').next().unwrap_or_default().trim();
    let space = MemorySpace::ALL.into_iter().find(|known| known.mnemonic() == mnemonic);
    let space = space.ok_or_else(|| format!("unknown memory space in {}", printed(&r#type)))?;
    let element = memref.element();
    let element = match (space, printed(&element).as_str()) {
        (MemorySpace::Semaphore, "!tpu.dma_semaphore" | "i64") => RefElement::DmaSemaphore,
        (MemorySpace::Semaphore, "!tpu.semaphore" | "i32") => RefElement::Semaphore,
        _ => RefElement::Data(
            element_of(element).ok_or_else(|| format!("unknown element type in {}", printed(&r#type)))?,
        ),
    };
    Ok((element, dims, space))
}
