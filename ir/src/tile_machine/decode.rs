//! From MLIR to instructions: walks the functions of a module; what each op means stands in [`ops`](super::ops).
//!
//! Invariant: after decoding, every op is known and every operand is of the kind and the sizes that running it takes for
//! granted. MLIR's verifier has checked the ops of dialects that it knows; rows of the table check the others, and what the
//! machine wants beyond.

use std::collections::HashMap;

use melior::ir::{
    Attribute, AttributeLike, BlockLike, BlockRef, Module, RegionLike, RegionRef, Type, Value, ValueLike,
    attribute::{
        ArrayAttribute, BoolAttribute, DenseI32ArrayAttribute, FloatAttribute, IntegerAttribute, TypeAttribute,
    },
    operation::{OperationLike, OperationRef},
};

use super::{
    fuse::{TileType, fuse},
    halves::work,
    liveness::liveness,
    ops::{self, Meaning},
    program::{Code, Communication, Inst, Origin, Program, Slot, Use},
    tile::Scalar,
};
use crate::{
    context::printed,
    element::Element,
    error::{Error, Result},
    mosaic::{
        Argument, CoreType, MemorySpace, Place, RefElement, Role, Signature, countable, describe_function, first_block,
        functions, i64_array, kernel_functions, op_name, place_of_function, read_memref, scalar_element, symbol,
        vector_dims,
    },
};

impl Program {
    /// Decodes the kernel of a Mosaic module in readable form (see [`wire`](crate::mosaic::wire) for the other).
    ///
    /// # Errors
    /// Names every op that the machine does not know, or whose form it does not support, and its source line.
    pub fn decode(module: &Module) -> Result<Self> {
        let functions = functions(module);
        let kernels = kernel_functions(module)?;
        // Ops are numbered through all functions, so that a number means the same to each of them.
        let (mut programs, mut origins) = (vec![], vec![]);
        for kernel in kernels {
            let program = Self::of(kernel, &functions, std::mem::take(&mut origins))?;
            origins.clone_from(&program.origins);
            programs.push(program);
        }
        programs.iter_mut().for_each(|program| program.origins.clone_from(&origins));
        let mut program = programs.remove(0);
        for partner in &programs {
            let differs = |(a, b): (&Argument, &Argument)| {
                (a.role, a.element, &a.dims, a.space) != (b.role, b.element, &b.dims, b.space)
            };
            let moved = |argument: &Argument| {
                let in_hbm = matches!(argument.space, MemorySpace::Any | MemorySpace::Hbm | MemorySpace::Host);
                argument.window.is_some() || (argument.role != Role::Scratch && !in_hbm)
            };
            let [own, other] = [&program, partner].map(|program| &program.signature.arguments);
            let names = || format!("@{} and @{} run at the same time", program.signature.name, partner.signature.name);
            if own.len() != other.len() || own.iter().zip(other).any(differs) {
                return Err(Error::mosaic(format!("{} and do not have the same arguments", names())));
            }
            if let Some(argument) = own.iter().chain(other).find(|argument| moved(argument)) {
                let what = format!("operand `{}` is not in HBM, or comes in blocks", argument.name);
                return Err(Error::mosaic(format!("{}: {what}", names())));
            }
        }
        // What subcores share is written and read at the same time.
        let shares = program.signature.arguments.iter().any(|argument| argument.space == MemorySpace::VmemShared);
        program.communication.meets |= !programs.is_empty() || shares;
        program.partners = programs;
        program.cores_fit()?;
        Ok(program)
    }

    /// A kernel function, one of its module's `functions`.
    fn of(kernel: OperationRef, functions: &[OperationRef], origins: Vec<Origin>) -> Result<Self> {
        let signature = Signature::of(kernel, functions)?;
        let mut decoder = Decoder { core: signature.core, origins, ..Decoder::default() };
        let body = decoder.function(kernel)?;
        let rank = signature.grid.len();
        let of_kernel = parameters(kernel);
        let prefetched = signature.arguments.iter().zip(of_kernel.iter().skip(rank));
        let prefetched = prefetched.filter(|(argument, _)| argument.role == Role::Prefetch).map(|(_, ty)| *ty);
        // What a window's transform gets: the grid step and the prefetched arrays.
        let of_transform: Vec<Type> = of_kernel.iter().copied().take(rank).chain(prefetched).collect();
        if !of_kernel.iter().take(rank).all(is_i32) {
            let message = format!("@{}: its grid indices are not all i32", signature.name);
            return Err(Error::op("func.func", format!("{message} (at {})", describe_function(kernel))));
        }
        let (mut transforms, mut transform_frames) = (Vec::new(), Vec::new());
        for argument in &signature.arguments {
            let element = argument.element.data();
            if element.is_some_and(|element| !is_stored(element)) || argument.dims.contains(&0) {
                let message =
                    format!("argument `{}` of {}{:?} is not supported", argument.name, argument.element, argument.dims);
                return Err(Error::op("func.func", format!("{message} (at {})", describe_function(kernel))));
            }
            let transform = argument.window.as_ref().map(|window| {
                let named = |function: &&OperationRef| symbol(**function).is_ok_and(|name| name == window.transform);
                let function = functions.iter().find(named);
                let function = function.ok_or_else(|| Error::mosaic(format!("no function @{}", window.transform)))?;
                let code = decoder.transform(*function, &window.transform, &of_transform, window.block.len())?;
                Ok((code, place_of_function(*function).frames))
            });
            let (code, frames) = transform.transpose()?.unzip();
            transforms.push(code);
            transform_frames.push(frames.unwrap_or_default());
        }
        let mut refused = decoder.refused;
        match refused.len() {
            0 => {}
            1 => return Err(refused.remove(0)),
            _ => return Err(Error::Unsupported { errors: refused }),
        }
        let prints = body.prints();
        let fused = fuse(&body, &decoder.types);
        let work = work(&body, &|origin| decoder.origins[origin as usize].elements as u64);
        let (origins, slots) = (decoder.origins, decoder.slots.len());
        let frames = place_of_function(kernel).frames;
        let (communication, unnamed) = (Communication::of(&body, rank), body.unnamed(rank));
        Ok(Self {
            signature,
            body,
            fused,
            transforms,
            origins,
            prints,
            work,
            slots,
            aliases: vec![],
            unused_outputs: vec![],
            frames,
            transform_frames,
            communication,
            partners: vec![],
            unnamed,
        })
    }
}

/// The element types that memory may hold.
fn is_stored(element: Element) -> bool {
    match element {
        Element::Pred | Element::I64 | Element::F64 => false,
        element => element.is_float() || element.is_signed(),
    }
}

fn is_i32(r#type: &Type) -> bool {
    vector_dims(*r#type).is_empty() && scalar_element(*r#type) == Some(Element::I32)
}

/// The types of a function's parameters.
fn parameters<'c>(function: OperationRef<'c, '_>) -> Vec<Type<'c>> {
    let Some(block) = first_block(function) else { return vec![] };
    (0..block.argument_count()).filter_map(|index| Some(block.argument(index).ok()?.r#type())).collect()
}

#[derive(Default)]
struct Decoder {
    /// What runs the kernel.
    core: CoreType,
    slots: HashMap<*const std::ffi::c_void, Slot>,
    /// What each register holds, if it is a tile.
    types: Vec<Option<TileType>>,
    origins: Vec<Origin>,
    /// What the machine does not know or support, each once.
    refused: Vec<Error>,
}

impl Decoder {
    fn slot<'c>(&mut self, value: impl ValueLike<'c>) -> Slot {
        let next = self.slots.len() as Slot;
        *self.slots.entry(value.to_raw().ptr).or_insert_with(|| {
            let tile = tile(value.r#type()).ok();
            self.types.push(tile.map(|tile| TileType { element: tile.element, len: tile.len() }));
            next
        })
    }

    fn read(&mut self, value: Value) -> Use {
        Use { slot: self.slot(value), last: false }
    }

    fn refuse(&mut self, error: Error) {
        if !self.refused.contains(&error) {
            self.refused.push(error);
        }
    }

    fn function(&mut self, function: OperationRef) -> Result<Code> {
        let region = function.regions().next().ok_or_else(|| Error::op("func.func", "has no body"))?;
        let mut code = self.region(region, "func.func")?;
        liveness(&mut code);
        Ok(code)
    }

    /// The function `name`, which maps `of_transform` to the `rank` indices of a block.
    fn transform(&mut self, function: OperationRef, name: &str, of_transform: &[Type], rank: usize) -> Result<Code> {
        let code = self.function(function)?;
        let wrong =
            |what: String| Error::op("func.func", format!("@{name} {what} (at {})", describe_function(function)));
        if parameters(function) != of_transform {
            let wanted = of_transform.iter().map(printed).collect::<Vec<_>>().join(", ");
            return Err(wrong(format!("does not take ({wanted})")));
        }
        let last = first_block(function).and_then(|block| block.terminator());
        if !last.is_some_and(|last| last.operands().all(|index| is_i32(&index.r#type()))) {
            return Err(wrong("does not yield i32 indices".into()));
        }
        if code.yields.len() != rank {
            return Err(wrong(format!("yields {} indices for blocks of rank {rank}", code.yields.len())));
        }
        Ok(code)
    }

    fn region(&mut self, region: RegionRef, op: &str) -> Result<Code> {
        match region.first_block() {
            None => Ok(Code::default()),
            Some(block) if block.next_in_region().is_some() => Err(Error::op(op, "more than one block in a region")),
            Some(block) => self.block(block),
        }
    }

    fn block(&mut self, block: BlockRef) -> Result<Code> {
        let mut code = Code::default();
        for index in 0..block.argument_count() {
            let argument = block.argument(index).map_err(|error| Error::mosaic(error.to_string()))?;
            code.parameters.push(self.slot(argument));
        }
        let operations = std::iter::successors(block.first_operation(), |operation| operation.next_in_block());
        for operation in operations {
            let site = Site::new(operation, self.core);
            let Some(row) = ops::row(&site.name) else {
                self.refuse(site.error("the tile machine does not know this op"));
                for region in operation.regions() {
                    self.region(region, &site.name)?;
                }
                continue;
            };
            let decode = match row.meaning {
                Meaning::Nothing => continue,
                Meaning::Yield => {
                    code.yields = operation.operands().map(|value| self.read(value)).collect();
                    continue;
                }
                Meaning::Inst(decode) => decode,
            };
            let op = match row.operands.contains(&site.operands.len()) {
                true => decode(&site),
                false => Err(Refusal::Misfit),
            };
            let nested = |index| {
                let region = operation.regions().nth(index);
                let region = region.ok_or_else(|| site.error(&format!("region {index} is missing")))?;
                self.region(region, &site.name)
            };
            let codes = (0..row.regions).map(nested).collect::<Result<_>>()?;
            let op = match op {
                Ok(op) => op,
                Err(Refusal::Misfit) => {
                    self.refuse(site.misfit());
                    continue;
                }
                Err(Refusal::Because(reason)) => {
                    self.refuse(site.error(&reason));
                    continue;
                }
            };
            let operands = operation.operands().map(|value| self.read(value)).collect();
            let results = operation.results().map(|result| self.slot(result)).collect();
            let origin = self.origins.len() as u32;
            let place = Place::of_op(operation);
            let location = place.describe().unwrap_or_else(|| "unknown".into());
            let elements = site.result().map_or(0, |result| result.len());
            self.origins.push(Origin { op: site.name.clone(), location, frames: place.frames, elements });
            code.body.push(Inst { op, pure: row.pure, operands, codes, results, kills: vec![], origin });
        }
        Ok(code)
    }
}

/// Why an op cannot be run.
pub(super) enum Refusal {
    /// Its operands and results do not fit together.
    Misfit,
    /// In words.
    Because(String),
}

pub(super) type Decoded<T> = std::result::Result<T, Refusal>;

pub(super) fn unsupported<T>(what: impl Into<String>) -> Decoded<T> {
    Err(Refusal::Because(what.into()))
}

/// `Misfit` unless `condition`.
pub(super) fn fits(condition: bool) -> Decoded<()> {
    if condition { Ok(()) } else { Err(Refusal::Misfit) }
}

/// Element and sizes of an operand or result.
#[derive(Debug, PartialEq)]
pub(super) struct Shape {
    pub(super) element: Element,
    pub(super) dims: Vec<usize>,
}

impl Shape {
    pub(super) fn len(&self) -> usize {
        self.dims.iter().product()
    }
}

/// Element, sizes and memory of a memref. A size that is `None` is known at run time.
pub(super) struct Memory {
    pub(super) element: RefElement,
    pub(super) dims: Vec<Option<usize>>,
    pub(super) space: MemorySpace,
}

impl Memory {
    /// The number of elements, if it is known.
    pub(super) fn cells(&self) -> Option<usize> {
        self.dims.iter().copied().product()
    }

    /// Whether the sizes are those of another memref, as far as they are known.
    pub(super) fn may_have_dims_of(&self, other: &Self) -> bool {
        let same = |(a, b): (&Option<usize>, &Option<usize>)| a.is_none() || b.is_none() || a == b;
        self.dims.len() == other.dims.len() && self.dims.iter().zip(&other.dims).all(same)
    }
}

/// One op of a module: what rows of the table read.
pub(super) struct Site<'c, 'a> {
    operation: OperationRef<'c, 'a>,
    pub(super) name: String,
    /// The types of its operands.
    pub(super) operands: Vec<Type<'c>>,
    /// What runs its kernel.
    pub(super) core: CoreType,
}

impl<'c, 'a> Site<'c, 'a> {
    fn new(operation: OperationRef<'c, 'a>, core: CoreType) -> Self {
        let operands = operation.operands().map(|value| value.r#type()).collect();
        Self { operation, name: op_name(operation), operands, core }
    }

    fn error(&self, reason: &str) -> Error {
        let place = Place::of_op(self.operation).describe().unwrap_or_else(|| "unknown".into());
        Error::op(self.name.as_str(), format!("{reason} (at {place})"))
    }

    fn misfit(&self) -> Error {
        let list = |types: &[Type]| types.iter().map(printed).collect::<Vec<_>>().join(", ");
        let results: Vec<_> = self.operation.results().map(|value| value.r#type()).collect();
        self.error(&format!("({}) -> ({}) do not fit together", list(&self.operands), list(&results)))
    }

    // ---- operands and results ----

    fn operand_type(&self, index: usize) -> Decoded<Type<'c>> {
        self.operands.get(index).copied().ok_or(Refusal::Misfit)
    }

    fn result_type(&self) -> Decoded<Type<'c>> {
        self.operation.results().next().map(|result| result.r#type()).ok_or(Refusal::Misfit)
    }

    /// Operand `index`, a scalar or a tile.
    pub(super) fn shape(&self, index: usize) -> Decoded<Shape> {
        shape(self.operand_type(index)?)
    }

    /// The result, a scalar or a tile.
    pub(super) fn result(&self) -> Decoded<Shape> {
        shape(self.result_type()?)
    }

    /// Operand `index`, a tile.
    pub(super) fn tile(&self, index: usize) -> Decoded<Shape> {
        tile(self.operand_type(index)?)
    }

    /// Result `index`, a tile.
    pub(super) fn nth_result_tile(&self, index: usize) -> Decoded<Shape> {
        tile(self.operation.results().nth(index).ok_or(Refusal::Misfit)?.r#type())
    }

    /// The result, a tile.
    pub(super) fn result_tile(&self) -> Decoded<Shape> {
        tile(self.result_type()?)
    }

    /// Operand `index`, a memref.
    pub(super) fn memref(&self, index: usize) -> Decoded<Memory> {
        memref(self.operand_type(index)?)
    }

    /// The kind of core that operand `index` is memory of, where its type says so and it is not that of the kernel's own.
    pub(super) fn core_of(&self, index: usize) -> Option<CoreType> {
        CoreType::in_text(&printed(self.operands.get(index)?)).filter(|&core| core != self.core)
    }

    /// The result, a memref.
    pub(super) fn result_memref(&self) -> Decoded<Memory> {
        memref(self.result_type()?)
    }

    /// `Misfit` unless the `count` operands from `from` on are scalar integers.
    pub(super) fn scalars(&self, from: usize, count: usize) -> Decoded<()> {
        let scalars = self.operands.get(from..from + count).ok_or(Refusal::Misfit)?;
        fits(scalars.iter().all(is_i32))
    }

    /// `Misfit` unless operand `index` is one semaphore.
    pub(super) fn semaphore(&self, index: usize) -> Decoded<()> {
        let memory = self.memref(index)?;
        fits(memory.element.data().is_none() && memory.cells().is_none_or(|cells| cells == 1))
    }

    // ---- attributes ----

    pub(super) fn attribute(&self, name: &str) -> Decoded<Attribute<'c>> {
        let missing = |_| Refusal::Because(format!("attribute `{name}` is missing"));
        self.operation.attribute(name).map_err(missing)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.operation.has_attribute(name)
    }

    /// The text of a string.
    pub(super) fn string(&self, name: &str) -> Option<String> {
        let printed = self.text(name).ok()?;
        Some(printed.strip_prefix('"')?.strip_suffix('"')?.to_owned())
    }

    /// What an attribute prints as.
    pub(super) fn text(&self, name: &str) -> Decoded<String> {
        Ok(printed(&self.attribute(name)?))
    }

    /// The element type that an attribute holds.
    pub(super) fn element(&self, name: &str) -> Decoded<Element> {
        let r#type = TypeAttribute::try_from(self.attribute(name)?)
            .map_err(|_| Refusal::Because(format!("attribute `{name}` is not a type")))?;
        Ok(shape(r#type.value())?.element)
    }

    /// A flag; absent ones are off.
    pub(super) fn flag(&self, name: &str) -> bool {
        let flag = self.operation.attribute(name).ok().and_then(|flag| BoolAttribute::try_from(flag).ok());
        flag.is_some_and(|flag| flag.value())
    }

    pub(super) fn integer(&self, name: &str) -> Decoded<i64> {
        let value = IntegerAttribute::try_from(self.attribute(name)?)
            .map_err(|_| Refusal::Because(format!("attribute `{name}` is not an integer")))?;
        // SAFETY: the attribute is an integer; its type says how it is stored.
        unsafe {
            let r#type = mlir_sys::mlirAttributeGetType(value.to_raw());
            if mlir_sys::mlirTypeIsAInteger(r#type) && mlir_sys::mlirIntegerTypeIsSigned(r#type) {
                return Ok(value.signed_value());
            }
        }
        Ok(value.value())
    }

    /// A size, an index or a count.
    pub(super) fn size(&self, name: &str) -> Decoded<usize> {
        usize::try_from(self.integer(name)?).map_err(|_| Refusal::Misfit)
    }

    pub(super) fn sizes(&self, name: &str) -> Decoded<Vec<usize>> {
        let list = to_sizes(self.attribute(name)?);
        list.ok_or_else(|| Refusal::Because(format!("attribute `{name}` is not a list of sizes")))
    }

    /// `sizes`, or nothing where the attribute is absent.
    pub(super) fn optional_sizes(&self, name: &str) -> Decoded<Vec<usize>> {
        if self.has(name) { self.sizes(name) } else { Ok(vec![]) }
    }
}

fn shape(r#type: Type) -> Decoded<Shape> {
    match scalar_element(r#type) {
        Some(element) if is_stored(element) || element == Element::Pred => {
            let dims = vector_dims(r#type);
            match countable(dims.iter().copied()) {
                true => Ok(Shape { element, dims }),
                false => unsupported(format!("{} has more than 2^40 elements", printed(&r#type))),
            }
        }
        _ => unsupported(format!("values of type {} are not supported", printed(&r#type))),
    }
}

fn tile(r#type: Type) -> Decoded<Shape> {
    let shape = shape(r#type)?;
    if shape.dims.is_empty() { Err(Refusal::Misfit) } else { Ok(shape) }
}

fn memref(r#type: Type) -> Decoded<Memory> {
    let (element, dims, space) = read_memref(r#type).map_err(Refusal::Because)?;
    match countable(dims.iter().flatten().copied()) {
        true => Ok(Memory { element, dims, space }),
        false => unsupported(format!("{} has more than 2^40 elements", printed(&r#type))),
    }
}

fn to_sizes(attribute: Attribute) -> Option<Vec<usize>> {
    if let Ok(array) = DenseI32ArrayAttribute::try_from(attribute) {
        return (0..array.len()).map(|index| usize::try_from(array.element(index).ok()?).ok()).collect();
    }
    if let Some(array) = i64_array(attribute) {
        return array.into_iter().map(|value| usize::try_from(value).ok()).collect();
    }
    let array = ArrayAttribute::try_from(attribute).ok()?;
    let element = |index| usize::try_from(IntegerAttribute::try_from(array.element(index).ok()?).ok()?.value()).ok();
    (0..array.len()).map(element).collect()
}

/// The scalar of type `element` that an attribute holds.
pub(super) fn scalar(value: Attribute, element: Element) -> Option<Scalar> {
    if element.is_float() {
        return FloatAttribute::try_from(value).ok().map(|value| Scalar::Float(value.value() as f32));
    }
    IntegerAttribute::try_from(value).ok().map(|value| match element {
        Element::Pred => Scalar::Pred(value.value() != 0),
        _ => Scalar::Int(value.value() as i32),
    })
}
