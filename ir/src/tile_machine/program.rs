//! From MLIR to instructions: every op is known and every size is checked before anything runs.

use std::collections::{HashMap, HashSet};

use melior::ir::{
    Attribute, AttributeLike, BlockLike, BlockRef, Module, RegionLike, RegionRef, Type, Value, ValueLike,
    attribute::{BoolAttribute, DenseI32ArrayAttribute, FloatAttribute, IntegerAttribute},
    operation::{OperationLike, OperationRef},
};

use super::tile::{self, Binary, Compare, MatmulShape, Reduction, Scalar, Strides, Tile, Unary};
use crate::{
    context::printed,
    element::Element,
    error::{Error, Result},
    mosaic::{MemorySpace, RefElement, Role, Signature, describe},
};

/// A register.
pub(super) type Slot = u32;

/// A register that an instruction reads; `last` when nothing reads it afterwards.
#[derive(Clone, Copy, Debug)]
pub(super) struct Use {
    pub(super) slot: Slot,
    pub(super) last: bool,
}

/// A sequence of instructions with parameters and results.
#[derive(Debug, Default)]
pub(super) struct Code {
    pub(super) parameters: Vec<Slot>,
    pub(super) body: Vec<Inst>,
    pub(super) yields: Vec<Use>,
}

#[derive(Debug)]
pub(super) struct Inst {
    pub(super) op: Op,
    pub(super) results: Vec<Slot>,
    /// Registers that die here without being an operand that dies.
    pub(super) kills: Vec<Slot>,
    /// Index into [`Program::origins`].
    pub(super) origin: u32,
}

/// Where an instruction comes from.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub(super) op: String,
    pub(super) location: String,
}

/// A box in a memref: an index per dimension, sizes, and steps where they are not 1.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) base: Use,
    pub(super) indices: Vec<Use>,
    pub(super) sizes: Vec<usize>,
    pub(super) steps: Vec<usize>,
}

#[derive(Debug)]
pub(super) enum Op {
    Scalar(Scalar),
    Constant(Tile),
    Unary {
        op: Unary,
        element: Element,
        x: Use,
    },
    Binary {
        op: Binary,
        element: Element,
        x: Use,
        y: Use,
    },
    Compare {
        op: Compare,
        x: Use,
        y: Use,
    },
    Select {
        condition: Use,
        then: Use,
        otherwise: Use,
    },
    Convert {
        from: Element,
        to: Element,
        signed: bool,
        x: Use,
    },
    Broadcast {
        x: Use,
        from: Vec<usize>,
        to: Vec<usize>,
    },
    /// The same elements under other sizes.
    Same {
        x: Use,
    },
    Transpose {
        x: Use,
        dims: Vec<usize>,
        permutation: Vec<usize>,
    },
    Slice {
        x: Use,
        dims: Vec<usize>,
        offsets: Vec<usize>,
        sizes: Vec<usize>,
        steps: Vec<usize>,
    },
    Concatenate {
        tiles: Vec<Use>,
        sizes: Vec<Vec<usize>>,
        dim: usize,
    },
    Rotate {
        x: Use,
        amount: Use,
        dims: Vec<usize>,
        dim: usize,
    },
    Reduce {
        how: Reduction,
        element: Element,
        x: Use,
        initial: Use,
        dims: Vec<usize>,
        over: Vec<usize>,
    },
    Bitcast {
        x: Use,
        dims: Vec<usize>,
        from: Element,
        to: Element,
    },
    Extract {
        x: Use,
        index: usize,
    },
    Matmul {
        shape: MatmulShape,
        lhs: Use,
        rhs: Use,
        accumulator: Use,
        round: [bool; 2],
    },
    Load {
        place: Place,
        to: Element,
    },
    Store {
        place: Place,
        value: Use,
        mask: Option<Use>,
        add: bool,
    },
    LoadScalar {
        place: Place,
    },
    StoreScalar {
        place: Place,
        value: Use,
    },
    SliceRef {
        place: Place,
    },
    SqueezeRef {
        base: Use,
        dims: Vec<usize>,
    },
    ReshapeRef {
        base: Use,
        dims: Vec<usize>,
    },
    BitcastRef {
        base: Use,
        to: Element,
        ratio: usize,
    },
    StartCopy {
        source: Use,
        destination: Use,
        semaphore: Use,
    },
    WaitCopy {
        semaphore: Use,
        destination: Use,
    },
    Signal {
        semaphore: Use,
        amount: Use,
    },
    WaitSemaphore {
        semaphore: Use,
        amount: Use,
    },
    ReadSemaphore {
        semaphore: Use,
    },
    AssumeMultiple {
        x: Use,
        multiple: i32,
    },
    If {
        condition: Use,
        then: Code,
        otherwise: Code,
    },
    For {
        low: Use,
        high: Use,
        step: Use,
        initial: Vec<Use>,
        body: Code,
    },
    While {
        initial: Vec<Use>,
        before: Code,
        after: Code,
    },
    Region {
        body: Code,
    },
}

impl Op {
    /// Whether dropping it changes nothing but its results.
    fn pure(&self) -> bool {
        !matches!(
            self,
            Self::Store { .. }
                | Self::StoreScalar { .. }
                | Self::StartCopy { .. }
                | Self::WaitCopy { .. }
                | Self::Signal { .. }
                | Self::WaitSemaphore { .. }
                | Self::AssumeMultiple { .. }
                | Self::If { .. }
                | Self::For { .. }
                | Self::While { .. }
                | Self::Region { .. }
        )
    }

    fn uses(&mut self, mut f: impl FnMut(&mut Use)) {
        match self {
            Self::Scalar(_) | Self::Constant(_) | Self::Region { .. } => {}
            Self::Unary { x, .. }
            | Self::Convert { x, .. }
            | Self::Broadcast { x, .. }
            | Self::Same { x }
            | Self::Transpose { x, .. }
            | Self::Slice { x, .. }
            | Self::Bitcast { x, .. }
            | Self::Extract { x, .. }
            | Self::AssumeMultiple { x, .. } => f(x),
            Self::Binary { x, y, .. } | Self::Compare { x, y, .. } => [x, y].into_iter().for_each(f),
            Self::Select { condition, then, otherwise } => [condition, then, otherwise].into_iter().for_each(f),
            Self::Concatenate { tiles, .. } => tiles.iter_mut().for_each(f),
            Self::Rotate { x, amount, .. } => [x, amount].into_iter().for_each(f),
            Self::Reduce { x, initial, .. } => [x, initial].into_iter().for_each(f),
            Self::Matmul { lhs, rhs, accumulator, .. } => [lhs, rhs, accumulator].into_iter().for_each(f),
            Self::Load { place, .. } | Self::LoadScalar { place } | Self::SliceRef { place } => place.uses(f),
            Self::Store { place, value, mask, .. } => {
                f(value);
                mask.iter_mut().for_each(&mut f);
                place.uses(f);
            }
            Self::StoreScalar { place, value } => {
                f(value);
                place.uses(f);
            }
            Self::SqueezeRef { base, .. } | Self::ReshapeRef { base, .. } | Self::BitcastRef { base, .. } => f(base),
            Self::StartCopy { source, destination, semaphore } => {
                [source, destination, semaphore].into_iter().for_each(f);
            }
            Self::WaitCopy { semaphore, destination } => [semaphore, destination].into_iter().for_each(f),
            Self::Signal { semaphore, amount } | Self::WaitSemaphore { semaphore, amount } => {
                [semaphore, amount].into_iter().for_each(f);
            }
            Self::ReadSemaphore { semaphore } => f(semaphore),
            Self::If { condition, .. } => f(condition),
            Self::For { low, high, step, initial, .. } => {
                [low, high, step].into_iter().for_each(&mut f);
                initial.iter_mut().for_each(f);
            }
            Self::While { initial, .. } => initial.iter_mut().for_each(f),
        }
    }

    fn codes(&mut self) -> Vec<&mut Code> {
        match self {
            Self::If { then, otherwise, .. } => vec![then, otherwise],
            Self::While { before, after, .. } => vec![before, after],
            Self::For { body, .. } | Self::Region { body } => vec![body],
            _ => vec![],
        }
    }
}

impl Place {
    fn uses(&mut self, mut f: impl FnMut(&mut Use)) {
        f(&mut self.base);
        self.indices.iter_mut().for_each(f);
    }
}

/// A decoded kernel. It holds no MLIR, so that it can be sent to and shared with other threads.
#[derive(Debug)]
pub struct Program {
    pub(super) signature: Signature,
    pub(super) body: Code,
    /// The transform of each argument's window.
    pub(super) transforms: Vec<Option<Code>>,
    pub(super) origins: Vec<Origin>,
    pub(super) slots: usize,
    pub(super) aliases: Vec<(usize, usize)>,
    pub(super) unused_outputs: Vec<usize>,
}

impl Program {
    /// Decodes the kernel of a Mosaic module in readable form (see [`wire`](crate::mosaic::wire) for the other).
    ///
    /// # Errors
    /// Names the first op that the machine does not know, or whose form it does not support.
    pub fn decode(module: &Module) -> Result<Self> {
        let signature = Signature::read(module)?;
        let mut decoder = Decoder { slots: HashMap::new(), origins: vec![] };
        let kernel = crate::mosaic::kernel_function(module)?;
        let body = decoder.function(kernel)?;
        let rank = signature.grid.len();
        let of_kernel = parameters(kernel);
        let prefetched = signature.arguments.iter().zip(of_kernel.iter().skip(rank));
        let prefetched = prefetched.filter(|(argument, _)| argument.role == Role::Prefetch).map(|(_, ty)| *ty);
        // What a window's transform gets: the grid step and the prefetched arrays.
        let of_transform: Vec<Type> = of_kernel.iter().copied().take(rank).chain(prefetched).collect();
        let scalar = |ty: &Type| shape(kernel, *ty).is_ok_and(|s| s.dims.is_empty() && s.element == Element::I32);
        if !of_kernel.iter().take(rank).all(scalar) {
            return Err(Error::op("func.func", format!("@{}: its grid indices are not all i32", signature.name)));
        }
        let functions = crate::mosaic::functions(module);
        let mut transforms = Vec::new();
        for argument in &signature.arguments {
            let element = argument.element.data();
            if element.is_some_and(|element| {
                !matches!(element, Element::I8 | Element::I16 | Element::I32 | Element::Bf16 | Element::F32)
            }) || argument.dims.contains(&0)
            {
                let message =
                    format!("argument `{}` of {}{:?} is not supported", argument.name, argument.element, argument.dims);
                return Err(Error::op("func.func", message));
            }
            let transform = argument.window.as_ref().map(|window| {
                let named = |function: &&OperationRef| {
                    crate::mosaic::symbol(**function).is_ok_and(|name| name == window.transform)
                };
                let function = functions.iter().find(named);
                let function = function.ok_or_else(|| Error::mosaic(format!("no function @{}", window.transform)))?;
                let code = decoder.function(*function)?;
                if parameters(*function) != of_transform {
                    let wanted = of_transform.iter().map(printed).collect::<Vec<_>>().join(", ");
                    return Err(Error::op("func.func", format!("@{} does not take ({wanted})", window.transform)));
                }
                let last = function.region(0).ok().and_then(|region| region.first_block()?.terminator());
                if !last.is_some_and(|last| well_formed(last, "func.return")) {
                    return Err(Error::op("func.func", format!("@{} does not yield i32 indices", window.transform)));
                }
                if code.yields.len() != window.block.len() {
                    let message =
                        format!("yields {} indices for blocks of rank {}", code.yields.len(), window.block.len());
                    return Err(Error::op("func.func", format!("@{} {message}", window.transform)));
                }
                Ok(code)
            });
            transforms.push(transform.transpose()?);
        }
        let (origins, slots) = (decoder.origins, decoder.slots.len());
        Ok(Self { signature, body, transforms, origins, slots, aliases: vec![], unused_outputs: vec![] })
    }

    /// Lets output `output` live in the memory of input `input`, as the custom call says (both counted from 0).
    pub fn with_aliases(mut self, aliases: &[(usize, usize)]) -> Self {
        self.aliases = aliases.to_vec();
        self
    }

    /// Says which outputs (counted from 0) nobody reads after the call: a kernel may use them as scratch memory. What
    /// they hold at the end is no fault, be it unwritten or written by several `parallel` steps.
    pub fn with_unused_outputs(mut self, outputs: &[usize]) -> Self {
        self.unused_outputs = outputs.to_vec();
        self
    }

    /// The kernel's grid and arguments.
    pub fn signature(&self) -> &Signature {
        &self.signature
    }
}

/// The types of a function's parameters.
fn parameters<'c>(function: OperationRef<'c, '_>) -> Vec<Type<'c>> {
    let Some(block) = function.region(0).ok().and_then(|region| region.first_block()) else { return vec![] };
    (0..block.argument_count()).filter_map(|index| Some(block.argument(index).ok()?.r#type())).collect()
}

struct Decoder {
    slots: HashMap<*const std::ffi::c_void, Slot>,
    origins: Vec<Origin>,
}

/// Element and sizes of an operand or result.
#[derive(PartialEq)]
struct Shape {
    element: Element,
    dims: Vec<usize>,
}

impl Shape {
    fn len(&self) -> usize {
        self.dims.iter().product()
    }
}

impl Decoder {
    fn slot<'c>(&mut self, value: impl ValueLike<'c>) -> Slot {
        let next = self.slots.len() as Slot;
        *self.slots.entry(value.to_raw().ptr).or_insert(next)
    }

    fn function(&mut self, function: OperationRef) -> Result<Code> {
        let region = function.region(0).map_err(|error| Error::op("func.func", error.to_string()))?;
        let mut code = self.region(region, "func.func")?;
        liveness(&mut code);
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
            let name = crate::mosaic::op_name(operation);
            match name.as_str() {
                "func.return" | "scf.yield" | "scf.condition" | "tpu.yield" => {
                    code.yields = operation.operands().map(|value| self.read(value)).collect();
                }
                "tpu.trace_start" | "tpu.trace_stop" | "tpu.trace_value" | "tpu.log" | "tpu.delay" => {}
                "tpu.trace" => {
                    let body = self.nested(operation, 0)?;
                    self.push(&mut code, operation, &name, Op::Region { body });
                }
                _ => {
                    let op = self.op(operation, &name)?;
                    self.push(&mut code, operation, &name, op);
                }
            }
        }
        Ok(code)
    }

    fn push(&mut self, code: &mut Code, operation: OperationRef, name: &str, op: Op) {
        let results = operation.results().map(|result| self.slot(result)).collect();
        let origin = self.origins.len() as u32;
        self.origins.push(Origin { op: name.to_owned(), location: describe(operation.location()) });
        code.body.push(Inst { op, results, kills: vec![], origin });
    }

    fn read(&mut self, value: Value) -> Use {
        Use { slot: self.slot(value), last: false }
    }

    fn operand(&mut self, operation: OperationRef, index: usize) -> Result<Use> {
        let value = operation.operand(index).map_err(|_| lacks(operation, &format!("operand {index}")))?;
        Ok(self.read(value))
    }

    fn nested(&mut self, operation: OperationRef, index: usize) -> Result<Code> {
        let region = operation.region(index).map_err(|_| lacks(operation, &format!("region {index}")))?;
        self.region(region, &crate::mosaic::op_name(operation))
    }

    fn op(&mut self, operation: OperationRef, name: &str) -> Result<Op> {
        use Binary::*;
        if !well_formed(operation, name) {
            let types = |values: Vec<Type>| values.iter().map(printed).collect::<Vec<_>>().join(", ");
            let operands = types(operation.operands().map(|value| value.r#type()).collect());
            let results = types(operation.results().map(|value| value.r#type()).collect());
            let at = describe(operation.location());
            return Err(Error::op(name, format!("({operands}) -> ({results}) do not fit together (at {at})")));
        }
        let unsupported =
            |message: String| Error::op(name, format!("{message} (at {})", describe(operation.location())));
        let x = |decoder: &mut Self| decoder.operand(operation, 0);
        let y = |decoder: &mut Self| decoder.operand(operation, 1);
        let unary =
            |decoder: &mut Self, op| Ok(Op::Unary { op, element: result_shape(operation)?.element, x: x(decoder)? });
        let binary = |decoder: &mut Self, op| {
            let element = result_shape(operation)?.element;
            Ok(Op::Binary { op, element, x: x(decoder)?, y: y(decoder)? })
        };
        let convert = |decoder: &mut Self, signed| {
            let (from, to) = (operand_shape(operation, 0)?.element, result_shape(operation)?.element);
            Ok(Op::Convert { from, to, signed, x: x(decoder)? })
        };
        match name {
            "arith.constant" => constant(operation),
            "arith.addf" | "arith.addi" => binary(self, Add),
            "arith.subf" | "arith.subi" => binary(self, Sub),
            "arith.mulf" | "arith.muli" => binary(self, Mul),
            "arith.divf" | "arith.divsi" => binary(self, Div),
            "arith.remf" | "arith.remsi" => binary(self, Rem),
            "arith.maximumf" | "arith.maxsi" => binary(self, Max),
            "arith.minimumf" | "arith.minsi" => binary(self, Min),
            "arith.maxnumf" => binary(self, MaxNumber),
            "arith.minnumf" => binary(self, MinNumber),
            "arith.andi" => binary(self, And),
            "arith.ori" => binary(self, Or),
            "arith.xori" => binary(self, Xor),
            "arith.shli" => binary(self, Shl),
            "arith.shrsi" => binary(self, ShrSigned),
            // Narrow integers are held sign-extended.
            "arith.shrui" if result_shape(operation)?.element != Element::I32 => {
                Err(unsupported("a logical shift of narrow integers".into()))
            }
            "arith.shrui" => binary(self, ShrUnsigned),
            "math.powf" => binary(self, Pow),
            "arith.negf" => unary(self, Unary::Neg),
            "math.absf" | "math.absi" => unary(self, Unary::Abs),
            "math.exp" => unary(self, Unary::Exp),
            "math.exp2" => unary(self, Unary::Exp2),
            "math.log" => unary(self, Unary::Log),
            "math.log1p" => unary(self, Unary::Log1p),
            "math.tanh" => unary(self, Unary::Tanh),
            "math.sin" => unary(self, Unary::Sin),
            "math.cos" => unary(self, Unary::Cos),
            "math.sqrt" => unary(self, Unary::Sqrt),
            "math.rsqrt" => unary(self, Unary::Rsqrt),
            "math.floor" => unary(self, Unary::Floor),
            "math.ceil" => unary(self, Unary::Ceil),
            "math.roundeven" => unary(self, Unary::RoundEven),
            "math.erf" => unary(self, Unary::Erf),
            "tpu.reciprocal" => unary(self, Unary::Reciprocal),
            "arith.extf" | "arith.truncf" | "arith.sitofp" | "arith.fptosi" | "arith.extsi" | "arith.trunci"
            | "tpu.truncf" | "tpu.extf" | "tpu.sitofp" => convert(self, true),
            "arith.extui" | "arith.uitofp" => convert(self, false),
            "arith.index_cast" | "arith.index_castui" => Ok(Op::Same { x: x(self)? }),
            "arith.cmpi" | "arith.cmpf" => {
                let predicate = integer(operation, "predicate")?;
                let op = comparison(name, predicate).ok_or_else(|| unsupported(format!("predicate {predicate}")))?;
                Ok(Op::Compare { op, x: x(self)?, y: y(self)? })
            }
            "arith.select" => {
                Ok(Op::Select { condition: x(self)?, then: y(self)?, otherwise: self.operand(operation, 2)? })
            }
            "vector.broadcast" => {
                let (from, to) = (operand_shape(operation, 0)?.dims, result_shape(operation)?.dims);
                Ok(Op::Broadcast { x: x(self)?, from, to })
            }
            "vector.shape_cast" | "tpu.reshape" => Ok(Op::Same { x: x(self)? }),
            "vector.transpose" | "tpu.transpose" => {
                let dims = operand_shape(operation, 0)?.dims;
                Ok(Op::Transpose { x: x(self)?, dims, permutation: sizes(operation, "permutation")? })
            }
            "vector.extract_strided_slice" => {
                let dims = operand_shape(operation, 0)?.dims;
                let (mut offsets, mut steps) = (sizes(operation, "offsets")?, sizes(operation, "strides")?);
                // Those of the minor dimensions may be left out: they are taken whole.
                offsets.resize(dims.len(), 0);
                steps.resize(dims.len(), 1);
                Ok(Op::Slice { x: x(self)?, dims, offsets, sizes: result_shape(operation)?.dims, steps })
            }
            "vector.extract" => {
                let Shape { dims, .. } = operand_shape(operation, 0)?;
                let position = sizes(operation, "static_position")?;
                let strides = tile::strides(&dims);
                let offset = position.iter().zip(&strides).map(|(index, stride)| index * stride).sum();
                match result_shape(operation)?.dims {
                    sizes if sizes.is_empty() => Ok(Op::Extract { x: x(self)?, index: offset }),
                    _ => {
                        let offsets = position.iter().copied().chain(vec![0; dims.len() - position.len()]).collect();
                        let taken = position.iter().map(|_| 1).chain(dims[position.len()..].iter().copied()).collect();
                        Ok(Op::Slice { x: x(self)?, steps: vec![1; dims.len()], offsets, sizes: taken, dims })
                    }
                }
            }
            "tpu.concatenate" => {
                let count = operation.operand_count();
                let tiles = (0..count).map(|index| self.operand(operation, index)).collect::<Result<_>>()?;
                let sizes = (0..count).map(|index| Ok(operand_shape(operation, index)?.dims)).collect::<Result<_>>()?;
                Ok(Op::Concatenate { tiles, sizes, dim: integer(operation, "dimension")? as usize })
            }
            "tpu.repeat" => {
                let times = integer(operation, "times")? as usize;
                let (x, dims) = (x(self)?, operand_shape(operation, 0)?.dims);
                let dim = integer(operation, "dimension")? as usize;
                Ok(Op::Concatenate { tiles: vec![x; times], sizes: vec![dims; times], dim })
            }
            "tpu.dynamic_rotate" => {
                if operation.has_attribute("stride") {
                    return Err(unsupported("a rotation with a stride".into()));
                }
                let dims = operand_shape(operation, 0)?.dims;
                let dim = integer(operation, "dimension")? as usize;
                Ok(Op::Rotate { x: x(self)?, amount: y(self)?, dims, dim })
            }
            "tpu.iota" => {
                let Shape { element, dims } = result_shape(operation)?;
                let over = sizes(operation, "dimensions")?;
                Ok(Op::Constant(iota(element, &dims, &over)))
            }
            "vector.multi_reduction" => {
                let kind = printed(&attribute(operation, "kind")?);
                let how = match kind.trim_start_matches("#vector.kind<").trim_end_matches('>') {
                    "add" => Reduction::Sum,
                    "mul" => Reduction::Product,
                    "maximumf" | "maxsi" => Reduction::Max,
                    "minimumf" | "minsi" => Reduction::Min,
                    "maxnumf" => Reduction::MaxNumber,
                    "minnumf" => Reduction::MinNumber,
                    _ => return Err(unsupported(format!("kind {kind}"))),
                };
                let Shape { element, dims } = operand_shape(operation, 0)?;
                let over = sizes(operation, "reduction_dims")?;
                if result_shape(operation)?.dims.is_empty() {
                    return Err(unsupported("a reduction to a scalar".into()));
                }
                Ok(Op::Reduce { how, element, x: x(self)?, initial: y(self)?, dims, over })
            }
            "tpu.bitcast" | "arith.bitcast" => {
                let Shape { element: from, dims } = operand_shape(operation, 0)?;
                let to = result_shape(operation)?.element;
                match dims.is_empty() {
                    true => Err(unsupported("bits of a scalar".into())),
                    false => Ok(Op::Bitcast { x: x(self)?, dims, from, to }),
                }
            }
            "tpu.matmul" => self.matmul(operation),
            "vector.load" | "tpu.vector_load" | "tpu.strided_load" => {
                let Shape { element, dims } = result_shape(operation)?;
                let indices = operation.operand_count() - 1;
                if segments(operation).is_some_and(|segments| segments.last() == Some(&1)) {
                    return Err(unsupported("a masked load".into()));
                }
                let place = self.place(operation, 0, 1..1 + indices, dims)?;
                Ok(Op::Load { place, to: element })
            }
            "tpu.vector_store" | "tpu.strided_store" | "vector.store" => {
                let Shape { dims, .. } = operand_shape(operation, 0)?;
                let rank = crate::mosaic::read_memref(operand_type(operation, 1)?).map_err(&unsupported)?.1.len();
                let mask = match operation.operand_count() > 2 + rank {
                    true => Some(self.operand(operation, 2 + rank)?),
                    false => None,
                };
                let add = operation.attribute("add").ok().and_then(|add| BoolAttribute::try_from(add).ok());
                let place = self.place(operation, 1, 2..2 + rank, dims)?;
                Ok(Op::Store { place, value: x(self)?, mask, add: add.is_some_and(|add| add.value()) })
            }
            "memref.load" => {
                let indices = operation.operand_count() - 1;
                Ok(Op::LoadScalar { place: self.place(operation, 0, 1..1 + indices, vec![1; indices])? })
            }
            "memref.store" => {
                let indices = operation.operand_count() - 2;
                let place = self.place(operation, 1, 2..2 + indices, vec![1; indices])?;
                Ok(Op::StoreScalar { place, value: x(self)? })
            }
            "tpu.memref_slice" => {
                let (_, dims, _) = crate::mosaic::read_memref(result_type(operation)?).map_err(&unsupported)?;
                let indices = operation.operand_count() - 1;
                if indices != dims.len() {
                    return Err(unsupported("dynamic sizes".into()));
                }
                Ok(Op::SliceRef { place: self.place(operation, 0, 1..1 + indices, dims)? })
            }
            "tpu.memref_squeeze" | "tpu.memref_reshape" | "memref.cast" | "tpu.erase_memref_layout" => {
                let (_, dims, _) = crate::mosaic::read_memref(result_type(operation)?).map_err(&unsupported)?;
                Ok(match name {
                    "tpu.memref_reshape" => Op::ReshapeRef { base: x(self)?, dims },
                    _ => Op::SqueezeRef { base: x(self)?, dims },
                })
            }
            "tpu.memref_bitcast" => {
                let (from, _, _) = crate::mosaic::read_memref(operand_type(operation, 0)?).map_err(&unsupported)?;
                let (to, _, _) = crate::mosaic::read_memref(result_type(operation)?).map_err(&unsupported)?;
                match (from, to) {
                    (RefElement::Data(from), RefElement::Data(to)) if to.bytes() >= from.bytes() => {
                        Ok(Op::BitcastRef { base: x(self)?, to, ratio: to.bytes() / from.bytes() })
                    }
                    _ => Err(unsupported(format!("from {from} to the narrower {to}"))),
                }
            }
            "tpu.enqueue_dma" => {
                if operation.operand_count() != 3 {
                    return Err(unsupported("a copy to another device or core".into()));
                }
                Ok(Op::StartCopy { source: x(self)?, destination: y(self)?, semaphore: self.operand(operation, 2)? })
            }
            "tpu.wait_dma2" => Ok(Op::WaitCopy { semaphore: x(self)?, destination: self.operand(operation, 2)? }),
            "tpu.wait_dma" => Ok(Op::WaitCopy { semaphore: x(self)?, destination: y(self)? }),
            "tpu.sem_signal" => {
                if operation.operand_count() != 2 {
                    return Err(unsupported("a signal to another device or core".into()));
                }
                Ok(Op::Signal { semaphore: x(self)?, amount: y(self)? })
            }
            "tpu.sem_wait" => Ok(Op::WaitSemaphore { semaphore: x(self)?, amount: y(self)? }),
            "tpu.sem_read" => Ok(Op::ReadSemaphore { semaphore: x(self)? }),
            "tpu.assume_multiple" => {
                Ok(Op::AssumeMultiple { x: x(self)?, multiple: integer(operation, "multiple")? as i32 })
            }
            "scf.if" => {
                let (then, otherwise) = (self.nested(operation, 0)?, self.nested(operation, 1)?);
                Ok(Op::If { condition: x(self)?, then, otherwise })
            }
            "scf.for" => {
                let initial = (3..operation.operand_count()).map(|index| self.operand(operation, index));
                let initial = initial.collect::<Result<_>>()?;
                let (low, high, step) = (x(self)?, y(self)?, self.operand(operation, 2)?);
                Ok(Op::For { low, high, step, initial, body: self.nested(operation, 0)? })
            }
            "scf.while" => {
                let initial = operation.operands().map(|value| self.read(value)).collect();
                Ok(Op::While { initial, before: self.nested(operation, 0)?, after: self.nested(operation, 1)? })
            }
            "tpu.region" => Ok(Op::Region { body: self.nested(operation, 0)? }),
            _ => Err(Error::op(
                name,
                format!("the tile machine does not know this op (at {})", describe(operation.location())),
            )),
        }
    }

    fn place(
        &mut self,
        operation: OperationRef,
        base: usize,
        indices: std::ops::Range<usize>,
        sizes: Vec<usize>,
    ) -> Result<Place> {
        let indices = indices.map(|index| self.operand(operation, index)).collect::<Result<Vec<_>>>()?;
        let steps = operation.attribute("strides").ok().and_then(to_sizes).unwrap_or_default();
        if indices.len() != sizes.len() || sizes.contains(&0) {
            let message = format!("{} indices for {} dimensions", indices.len(), sizes.len());
            return Err(Error::op(crate::mosaic::op_name(operation), message));
        }
        Ok(Place { base: self.operand(operation, base)?, indices, sizes, steps })
    }

    fn matmul(&mut self, operation: OperationRef) -> Result<Op> {
        let op = "tpu.matmul";
        let (lhs, rhs) = (operand_shape(operation, 0)?, operand_shape(operation, 1)?);
        let exact = operation.attribute("precision").is_ok_and(|precision| printed(&precision).contains("fp32"));
        let round = [&lhs, &rhs].map(|side| side.element == Element::F32 && !exact);
        let (lhs, rhs) = (lhs.dims, rhs.dims);
        let flag = |name: &str| {
            let flag = operation.attribute(name).ok().and_then(|flag| BoolAttribute::try_from(flag).ok());
            flag.is_some_and(|flag| flag.value())
        };
        let numbers = match operation.attribute("dimension_numbers") {
            Ok(numbers) => bracketed(&printed(&numbers)),
            Err(_) => {
                let (l, r) = (usize::from(!flag("transpose_lhs")), usize::from(flag("transpose_rhs")));
                vec![vec![l], vec![r], vec![1 - l], vec![1 - r], vec![0, 1 - l, 1, 1 - r], vec![], vec![]]
            }
        };
        let [contract_l, contract_r, free_l, free_r, order, batch_l, batch_r] = numbers.as_slice() else {
            return Err(Error::op(op, format!("dimension numbers {numbers:?}")));
        };
        let one = |dims: &'_ Vec<usize>| if let [dim] = dims.as_slice() { Some(*dim) } else { None };
        let batches = (batch_l.as_slice(), batch_r.as_slice());
        let (Some(k_l), Some(k_r), Some(m), Some(n)) = (one(contract_l), one(contract_r), one(free_l), one(free_r))
        else {
            return Err(Error::op(op, format!("more than one contracted or free dimension on a side: {numbers:?}")));
        };
        let standard: Vec<usize> = batch_l.iter().flat_map(|&dim| [0, dim]).chain([0, m, 1, n]).collect();
        if batches.0.len() > 1 || batches.0.len() != batches.1.len() || *order != standard {
            return Err(Error::op(
                op,
                format!("dimension numbers {numbers:?}: at most one batch dimension, which leads"),
            ));
        }
        let sum = operand_shape(operation, 2)?.dims;
        let size = |dims: &[usize], dim: usize| dims.get(dim).copied().unwrap_or(0);
        let batch = batch_l.first().map(|&dim| size(&lhs, dim));
        let expected: Vec<usize> = batch.into_iter().chain([size(&lhs, m), size(&rhs, n)]).collect();
        let ranks = (lhs.len(), rhs.len()) == (2 + batch_l.len(), 2 + batch_r.len());
        let batches = batch == batch_r.first().map(|&dim| size(&rhs, dim));
        let inner = size(&lhs, k_l) == size(&rhs, k_r);
        if !ranks || !batches || !inner || sum != expected || sum.contains(&0) || size(&lhs, k_l) == 0 {
            return Err(Error::op(op, format!("{lhs:?} x {rhs:?} + {sum:?} with dimension numbers {numbers:?}")));
        }
        let (strides_l, strides_r) = (tile::strides(&lhs), tile::strides(&rhs));
        let batch_stride = |strides: &[usize], dims: &[usize]| dims.first().map_or(0, |&dim| strides[dim]);
        let shape = MatmulShape {
            batch: batch_l.first().map_or(1, |&dim| lhs[dim]),
            m: lhs[m],
            n: rhs[n],
            k: lhs[k_l],
            lhs: Strides { batch: batch_stride(&strides_l, batch_l), row: strides_l[m], column: strides_l[k_l] },
            rhs: Strides { batch: batch_stride(&strides_r, batch_r), row: strides_r[k_r], column: strides_r[n] },
        };
        let (lhs, rhs) = (self.operand(operation, 0)?, self.operand(operation, 1)?);
        Ok(Op::Matmul { shape, lhs, rhs, accumulator: self.operand(operation, 2)?, round })
    }
}

/// Whether operands and results of an op that MLIR does not know, and so did not check, are of the kinds and sizes that
/// running it takes for granted. MLIR checked the ops that it knows, but for what the machine wants beyond that.
fn well_formed(operation: OperationRef, name: &str) -> bool {
    let types: Vec<Type> = operation.operands().map(|value| value.r#type()).collect();
    let result = operation.results().next().map(|value| value.r#type());
    let tile_of = |r#type: Type| Some(shape(operation, r#type).ok()?).filter(|shape| !shape.dims.is_empty());
    let tile = |index: usize| tile_of(*types.get(index)?);
    let memref = |index: usize| crate::mosaic::read_memref(*types.get(index)?).ok();
    let result_tile = || tile_of(result?);
    let result_memref = || crate::mosaic::read_memref(result?).ok();
    // All operands from `from` on, `count` of them, are scalar integers.
    let scalars = |from: usize, count: usize| {
        let rest = types.get(from..from + count).unwrap_or_default();
        let scalar =
            |r#type: &Type| shape(operation, *r#type).is_ok_and(|s| s.dims.is_empty() && s.element == Element::I32);
        rest.len() == count && rest.iter().all(scalar)
    };
    let semaphore =
        |index: usize| memref(index).is_some_and(|(element, dims, _)| element.data().is_none() && dims.is_empty());
    let number = |name: &str| integer(operation, name).ok().and_then(|number| usize::try_from(number).ok());
    let check = || -> Option<bool> {
        Some(match name {
            "vector.load" | "tpu.vector_load" | "tpu.strided_load" => {
                let ((element, dims, space), result) = (memref(0)?, result_tile()?);
                let steps = operation.attribute("strides").ok().and_then(to_sizes).unwrap_or_default();
                let steps = steps.is_empty() || (steps.len() == dims.len() && !steps.contains(&0));
                element == RefElement::Data(result.element)
                    && space == MemorySpace::Vmem
                    && dims.len() == result.dims.len()
                    && scalars(1, dims.len())
                    && steps
            }
            "vector.store" | "tpu.vector_store" | "tpu.strided_store" => {
                let (value, (element, dims, space)) = (tile(0)?, memref(1)?);
                let steps = operation.attribute("strides").ok().and_then(to_sizes).unwrap_or_default();
                let steps = steps.is_empty() || (steps.len() == dims.len() && !steps.contains(&0));
                let mask = match types.len() - 2 - dims.len().min(types.len() - 2) {
                    0 => true,
                    1 => tile(2 + dims.len())
                        .is_some_and(|mask| mask.element == Element::Pred && mask.dims == value.dims),
                    _ => false,
                };
                let sizes = dims.len() == value.dims.len() && scalars(2, dims.len());
                element == RefElement::Data(value.element) && space == MemorySpace::Vmem && sizes && steps && mask
            }
            "memref.load" | "memref.store" => {
                let (element, dims, space) = memref(usize::from(name == "memref.store"))?;
                let wide = matches!(element, RefElement::Data(Element::I32 | Element::F32));
                wide && space == MemorySpace::Smem && scalars(types.len() - dims.len(), dims.len())
            }
            "tpu.memref_slice" => {
                let ((element, whole, space), (result, dims, to)) = (memref(0)?, result_memref()?);
                element == result
                    && space == to
                    && whole.len() == dims.len()
                    && !dims.contains(&0)
                    && scalars(1, dims.len())
            }
            "tpu.memref_squeeze" | "tpu.memref_reshape" | "tpu.erase_memref_layout" => {
                let ((element, from, space), (result, to, same)) = (memref(0)?, result_memref()?);
                element == result && space == same && from.iter().product::<usize>() == to.iter().product::<usize>()
            }
            "tpu.memref_bitcast" => {
                let ((from, mut dims, space), (to, result, same)) = (memref(0)?, result_memref()?);
                let (from, to, rows) = (from.data()?.bytes(), to.data()?.bytes(), dims.len().checked_sub(2)?);
                let fits = (dims[rows] * from).is_multiple_of(to);
                dims[rows] = dims[rows] * from / to;
                fits && dims == result && space == same && space != MemorySpace::Smem
            }
            "tpu.enqueue_dma" if types.len() == 3 => {
                let ((from, source, _), (to, destination, _)) = (memref(0)?, memref(1)?);
                from == to && from.data().is_some() && source == destination && semaphore(2)
            }
            "tpu.wait_dma2" => memref(2)?.0.data().is_some() && semaphore(0),
            "tpu.wait_dma" => memref(1)?.0.data().is_some() && semaphore(0),
            "tpu.sem_signal" | "tpu.sem_wait" => semaphore(0) && scalars(1, 1),
            "tpu.sem_read" => semaphore(0),
            "tpu.assume_multiple" => scalars(0, 1) && number("multiple").is_some_and(|multiple| multiple > 0),
            "tpu.matmul" => {
                let (lhs, rhs, sum, result) = (tile(0)?, tile(1)?, tile(2)?, result_tile()?);
                let kind = |shape: &Shape| (shape.element.is_float(), shape.element == Element::Pred);
                let kinds = kind(&lhs) == kind(&rhs) && kind(&lhs) == kind(&sum) && kind(&lhs) != (false, true);
                kinds && sum == result
            }
            "tpu.concatenate" | "tpu.repeat" => {
                let (mut total, result, dim) = (tile(0)?, result_tile()?, number("dimension")?);
                let along = |shape: &Shape| shape.dims.get(dim).copied();
                let tiles = (0..types.len()).map(tile).collect::<Option<Vec<_>>>()?;
                let sizes = tiles.iter().map(along).sum::<Option<usize>>()?;
                total.dims[dim] = if name == "tpu.repeat" { sizes * number("times")? } else { sizes };
                let same = |tile: &Shape| {
                    let others = |(at, (a, b)): (usize, (&usize, &usize))| at == dim || a == b;
                    tile.element == result.element
                        && tile.dims.len() == result.dims.len()
                        && tile.dims.iter().zip(&result.dims).enumerate().all(others)
                };
                total.dims == result.dims && tiles.iter().all(same)
            }
            "tpu.dynamic_rotate" => {
                let (x, result) = (tile(0)?, result_tile()?);
                x.dims == result.dims
                    && x.element == result.element
                    && scalars(1, 1)
                    && number("dimension")? < x.dims.len()
            }
            "tpu.iota" => {
                let over = sizes(operation, "dimensions").ok()?;
                let result = result_tile()?;
                over.iter().all(|&dim| dim < result.dims.len()) && !result.element.is_float()
            }
            "tpu.bitcast" => {
                let (x, result) = (tile(0)?, result_tile()?);
                let (minor, rest) = (x.dims.last()?, result.dims.last()?);
                let whole = x.element.bytes() == result.element.bytes()
                    || x.dims.len() >= 2
                        && (x.dims[x.dims.len() - 2] * x.element.bytes()).is_multiple_of(result.element.bytes());
                let bytes = |shape: &Shape| shape.len() * shape.element.bytes();
                whole && minor == rest && bytes(&x) == bytes(&result)
            }
            "tpu.transpose" => {
                let (x, result) = (tile(0)?, result_tile()?);
                let permutation = sizes(operation, "permutation").ok()?;
                let mut sorted = permutation.clone();
                sorted.sort_unstable();
                let permutes = sorted.iter().copied().eq(0..x.dims.len());
                permutes && permutation.iter().map(|&dim| x.dims[dim]).eq(result.dims) && x.element == result.element
            }
            "tpu.reshape" => tile(0)?.len() == result_tile()?.len() && tile(0)?.element == result_tile()?.element,
            "tpu.reciprocal" => tile(0)? == result_tile()? && tile(0)?.element.is_float(),
            "tpu.truncf" | "tpu.extf" | "tpu.sitofp" => {
                let (x, result) = (tile(0)?, result_tile()?);
                let from_float = name != "tpu.sitofp";
                x.dims == result.dims && x.element.is_float() == from_float && result.element.is_float()
            }
            "func.return" => scalars(0, types.len()),
            _ => true,
        })
    };
    check().unwrap_or(false)
}

/// Marks where each register is read for the last time, and drops pure instructions that nobody reads.
fn liveness(code: &mut Code) {
    fn outer_uses(code: &mut Code, uses: &mut HashSet<Slot>) {
        for inst in &mut code.body {
            inst.op.uses(|read| {
                uses.insert(read.slot);
            });
            inst.op.codes().into_iter().for_each(|code| outer_uses(code, uses));
        }
        uses.extend(code.yields.iter().map(|read| read.slot));
    }
    let mut own: HashSet<Slot> = code.parameters.iter().copied().collect();
    own.extend(code.body.iter().flat_map(|inst| &inst.results));
    let mut read_later = HashSet::new();
    for read in code.yields.iter_mut().rev() {
        read.last = own.contains(&read.slot) && read_later.insert(read.slot);
    }
    let mut kept = Vec::with_capacity(code.body.len());
    for mut inst in std::mem::take(&mut code.body).into_iter().rev() {
        if inst.op.pure() && !inst.results.iter().any(|slot| read_later.contains(slot)) {
            continue;
        }
        inst.kills = inst.results.iter().copied().filter(|slot| !read_later.contains(slot)).collect();
        let mut nested = HashSet::new();
        inst.op.codes().into_iter().for_each(|code| outer_uses(code, &mut nested));
        for slot in nested {
            if own.contains(&slot) && read_later.insert(slot) {
                inst.kills.push(slot);
            }
        }
        let mut reads = Vec::new();
        inst.op.uses(|read| reads.push(read.slot));
        let dying: HashSet<Slot> =
            reads.iter().copied().filter(|slot| own.contains(slot) && read_later.insert(*slot)).collect();
        let last_read: HashMap<Slot, usize> = reads.iter().enumerate().map(|(at, &slot)| (slot, at)).collect();
        let mut at = 0;
        inst.op.uses(|read| {
            read.last = dying.contains(&read.slot) && last_read[&read.slot] == at;
            at += 1;
        });
        inst.op.codes().into_iter().for_each(liveness);
        kept.push(inst);
    }
    kept.reverse();
    code.body = kept;
}

fn lacks(operation: OperationRef, what: &str) -> Error {
    Error::op(crate::mosaic::op_name(operation), format!("{what} is missing (at {})", describe(operation.location())))
}

fn attribute<'c>(operation: OperationRef<'c, '_>, name: &str) -> Result<Attribute<'c>> {
    operation.attribute(name).map_err(|_| lacks(operation, &format!("attribute `{name}`")))
}

fn integer(operation: OperationRef, name: &str) -> Result<i64> {
    let value = IntegerAttribute::try_from(attribute(operation, name)?);
    let value = value.map_err(|_| lacks(operation, &format!("integer attribute `{name}`")))?;
    // SAFETY: the attribute is an integer; its type tells how it is stored.
    unsafe {
        let r#type = mlir_sys::mlirAttributeGetType(value.to_raw());
        if mlir_sys::mlirTypeIsAInteger(r#type) && mlir_sys::mlirIntegerTypeIsSigned(r#type) {
            return Ok(value.signed_value());
        }
    }
    Ok(value.value())
}

fn to_sizes(attribute: Attribute) -> Option<Vec<usize>> {
    if let Ok(array) = DenseI32ArrayAttribute::try_from(attribute) {
        return (0..array.len()).map(|index| usize::try_from(array.element(index).ok()?).ok()).collect();
    }
    if let Some(array) = crate::mosaic::i64_array(attribute) {
        return array.into_iter().map(|value| usize::try_from(value).ok()).collect();
    }
    let array = melior::ir::attribute::ArrayAttribute::try_from(attribute).ok()?;
    let element = |index| usize::try_from(IntegerAttribute::try_from(array.element(index).ok()?).ok()?.value()).ok();
    (0..array.len()).map(element).collect()
}

fn sizes(operation: OperationRef, name: &str) -> Result<Vec<usize>> {
    to_sizes(attribute(operation, name)?).ok_or_else(|| lacks(operation, &format!("array attribute `{name}`")))
}

fn segments(operation: OperationRef) -> Option<Vec<usize>> {
    to_sizes(operation.attribute("operandSegmentSizes").ok()?)
}

fn operand_type<'c>(operation: OperationRef<'c, '_>, index: usize) -> Result<Type<'c>> {
    Ok(operation.operand(index).map_err(|_| lacks(operation, &format!("operand {index}")))?.r#type())
}

fn result_type<'c>(operation: OperationRef<'c, '_>) -> Result<Type<'c>> {
    Ok(operation.result(0).map_err(|_| lacks(operation, "the result"))?.r#type())
}

fn shape(operation: OperationRef, r#type: Type) -> Result<Shape> {
    let element = crate::mosaic::scalar_element(r#type).filter(|element| {
        matches!(element, Element::Pred | Element::I8 | Element::I16 | Element::I32 | Element::Bf16 | Element::F32)
    });
    let element = element.ok_or_else(|| {
        Error::op(crate::mosaic::op_name(operation), format!("values of type {} are not supported", printed(&r#type)))
    })?;
    Ok(Shape { element, dims: crate::mosaic::vector_dims(r#type) })
}

fn operand_shape(operation: OperationRef, index: usize) -> Result<Shape> {
    shape(operation, operand_type(operation, index)?)
}

fn result_shape(operation: OperationRef) -> Result<Shape> {
    shape(operation, result_type(operation)?)
}

fn constant(operation: OperationRef) -> Result<Op> {
    let shape = result_shape(operation)?;
    let value = attribute(operation, "value")?;
    let number = |value: Attribute| match shape.element.is_float() {
        true => FloatAttribute::try_from(value).ok().map(|value| Scalar::Float(value.value() as f32)),
        false => IntegerAttribute::try_from(value).ok().map(|value| match shape.element {
            Element::Pred => Scalar::Pred(value.value() != 0),
            _ => Scalar::Int(value.value() as i32),
        }),
    };
    let unsupported = || lacks(operation, &format!("a readable value, not {},", printed(&value)));
    if shape.dims.is_empty() {
        return number(value).map(Op::Scalar).ok_or_else(unsupported);
    }
    let raw = value.to_raw();
    // SAFETY: each getter is called on an attribute of the kind that it is for.
    unsafe {
        if !mlir_sys::mlirAttributeIsADenseElements(raw) {
            return Err(unsupported());
        }
        if mlir_sys::mlirDenseElementsAttrIsSplat(raw) {
            let splat = Attribute::from_raw(mlir_sys::mlirDenseElementsAttrGetSplatValue(raw));
            return number(splat).map(|scalar| Op::Constant(tile::splat(scalar, shape.len()))).ok_or_else(unsupported);
        }
        let bits = (0..shape.len() as isize).map(|index| match shape.element {
            Element::F32 => Some(mlir_sys::mlirDenseElementsAttrGetFloatValue(raw, index).to_bits()),
            Element::I32 => Some(mlir_sys::mlirDenseElementsAttrGetInt32Value(raw, index) as u32),
            Element::Pred => Some(u32::from(mlir_sys::mlirDenseElementsAttrGetBoolValue(raw, index))),
            _ => None,
        });
        let bits = bits.collect::<Option<Vec<u32>>>().ok_or_else(unsupported)?;
        Ok(Op::Constant(tile::from_bits(shape.element, bits)))
    }
}

/// Indices counted along the dimensions `over`, the first of them outermost.
fn iota(element: Element, dims: &[usize], over: &[usize]) -> Tile {
    let strides = tile::strides(dims);
    let len: usize = dims.iter().product();
    let index = |at: usize| over.iter().fold(0, |total, &dim| total * dims[dim] + at / strides[dim] % dims[dim]);
    tile::from_bits(element, (0..len).map(|at| index(at) as u32).collect())
}

fn comparison(name: &str, predicate: i64) -> Option<Compare> {
    use Compare::*;
    const INTEGER: [Compare; 10] = [Eq, Ne, Lt, Le, Gt, Ge, UnsignedLt, UnsignedLe, UnsignedGt, UnsignedGe];
    // Of `one` MLIR says "ordered and unequal". Mosaic takes it for plain inequality: JAX lowers `!=` to it, and its tests
    // hold TPUs to NaN != x.
    const FLOAT: [Compare; 16] = [
        Never,
        Eq,
        Gt,
        Ge,
        Lt,
        Le,
        Ne,
        Ordered,
        UnorderedEq,
        UnorderedGt,
        UnorderedGe,
        UnorderedLt,
        UnorderedLe,
        Ne,
        Unordered,
        Always,
    ];
    let table: &[Compare] = if name == "arith.cmpi" { &INTEGER } else { &FLOAT };
    table.get(usize::try_from(predicate).ok()?).copied()
}

/// The integer lists in a text like `#tpu.dot_dimension_numbers<[1], [0], ...>`.
fn bracketed(text: &str) -> Vec<Vec<usize>> {
    let lists = text.split('[').skip(1).filter_map(|rest| rest.split(']').next());
    lists.map(|list| list.split(',').filter_map(|number| number.trim().parse().ok()).collect()).collect()
}
