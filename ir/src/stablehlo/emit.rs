//! How an op, its attributes and its regions become MLIR; the checks that every op shares.

use std::{marker::PhantomData, mem::ManuallyDrop, rc::Rc};

use melior::ir::{
    Attribute, Block, BlockLike, Identifier, Location, Region, RegionLike, Type, Value, ValueLike,
    attribute::{BoolAttribute, DenseI64ArrayAttribute, IntegerAttribute},
    operation::{OperationBuilder, OperationLike},
    r#type::IntegerType,
};
use mlir_sys::{
    MlirBlock, mlirBlockArgumentGetOwner, mlirBlockEqual, mlirOpResultGetOwner, mlirOperationGetBlock,
    mlirValueIsAOpResult,
};

use super::{Builder, Scope, Shared, Tensor};
use crate::{
    context::diagnosed,
    error::{Error, Result},
    shape::TensorType,
};

/// Every StableHLO op that the [`Builder`] can emit, sorted (`return` apart, which ends regions).
pub const OPS: &[&str] = &[
    "abs",
    "add",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "and",
    "atan2",
    "bitcast_convert",
    "broadcast_in_dim",
    "case",
    "cbrt",
    "ceil",
    "clamp",
    "collective_permute",
    "compare",
    "concatenate",
    "constant",
    "convert",
    "cosine",
    "count_leading_zeros",
    "custom_call",
    "divide",
    "dot_general",
    "dynamic_slice",
    "dynamic_update_slice",
    "exponential",
    "exponential_minus_one",
    "floor",
    "gather",
    "if",
    "iota",
    "is_finite",
    "log",
    "log_plus_one",
    "logistic",
    "maximum",
    "minimum",
    "multiply",
    "negate",
    "not",
    "optimization_barrier",
    "or",
    "pad",
    "partition_id",
    "popcnt",
    "power",
    "reduce",
    "reduce_precision",
    "reduce_scatter",
    "reduce_window",
    "remainder",
    "replica_id",
    "reshape",
    "reverse",
    "rng_bit_generator",
    "round_nearest_afz",
    "round_nearest_even",
    "rsqrt",
    "scatter",
    "select",
    "shift_left",
    "shift_right_arithmetic",
    "shift_right_logical",
    "sign",
    "sine",
    "slice",
    "sort",
    "sqrt",
    "subtract",
    "tan",
    "tanh",
    "transpose",
    "while",
    "xor",
];

/// The body of an op, and what it returns.
///
/// It is never dropped, only moved into its op: a body that failed, or whose op was refused, is leaked on purpose,
/// because a [`Tensor`] of it may still be reachable (closures can carry it out) and must not dangle.
pub(super) struct Body<'c> {
    region: ManuallyDrop<Region<'c>>,
    pub(super) results: Vec<TensorType>,
}

impl<'c> Body<'c> {
    pub(super) fn into_region(self) -> Region<'c> {
        ManuallyDrop::into_inner(self.region)
    }
}

/// What a body may use from outside itself.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Captures {
    /// Values of the regions around it.
    Allowed,
    /// Nothing.
    Refused,
}

/// Writes a body with its own builder; `terminator` ends it.
pub(super) fn write_body<'c, 'a>(
    context: &'c melior::Context,
    shared: &Rc<Shared>,
    outer: &[Scope],
    isolated: Option<&'static str>,
    terminator: &'static str,
    arguments: &[TensorType],
    body: impl FnOnce(&Builder<'c, 'a>, &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>>,
) -> Result<Body<'c>>
where
    'c: 'a,
{
    let location = Location::unknown(context);
    let types: Vec<_> = arguments.iter().map(|r#type| (r#type.to_mlir(context), location)).collect();
    // Leaked unless the body is complete, also when `body` panics: see `Body`.
    let region = ManuallyDrop::new(Region::new());
    let block = region.append_block(Block::new(&types));
    let mut scopes = outer.to_vec();
    scopes.push(Scope { block: block.to_raw(), isolated });
    let builder = Builder { context, block, scopes, location, shared: Rc::clone(shared), function: PhantomData };
    let arguments = (0..arguments.len())
        .map(|index| Tensor::new(block.argument(index).expect("the block was made with these arguments").into()))
        .collect::<Vec<_>>();
    let results = body(&builder, &arguments)?;
    builder.operation(terminator, &results, &[], &[], Vec::new())?;
    Ok(Body { region, results: results.iter().map(|result| result.ty()).collect() })
}

impl<'c, 'a> Builder<'c, 'a> {
    /// Emits `stablehlo.{op}`.
    pub(super) fn emit_all(
        &self,
        op: &'static str,
        operands: &[Tensor<'c, 'a>],
        attributes: &[(&str, Attribute<'c>)],
        results: &[TensorType],
        bodies: Vec<Body<'c>>,
    ) -> Result<Vec<Tensor<'c, 'a>>> {
        debug_assert!(OPS.contains(&op), "{op} is missing in OPS");
        self.operation(&format!("stablehlo.{op}"), operands, attributes, results, bodies)
    }

    /// Emits `stablehlo.{op}` with one result and no region.
    pub(super) fn emit(
        &self,
        op: &'static str,
        operands: &[Tensor<'c, 'a>],
        attributes: &[(&str, Attribute<'c>)],
        result: TensorType,
    ) -> Result<Tensor<'c, 'a>> {
        Ok(self.emit_all(op, operands, attributes, &[result], Vec::new())?[0])
    }

    /// Appends the operation `name` to the block.
    pub(super) fn operation(
        &self,
        name: &str,
        operands: &[Tensor<'c, 'a>],
        attributes: &[(&str, Attribute<'c>)],
        results: &[TensorType],
        bodies: Vec<Body<'c>>,
    ) -> Result<Vec<Tensor<'c, 'a>>> {
        for operand in operands {
            self.check_visible(name, *operand)?;
        }
        let operands: Vec<Value<'c, 'a>> = operands.iter().map(|tensor| tensor.value).collect();
        let attributes: Vec<_> =
            attributes.iter().map(|(name, value)| (Identifier::new(self.context, name), *value)).collect();
        let results: Vec<Type<'c>> = results.iter().map(|r#type| r#type.to_mlir(self.context)).collect();
        let operation = OperationBuilder::new(name, self.location)
            .add_operands(&operands)
            .add_attributes(&attributes)
            .add_results(&results)
            .add_regions_vec(bodies.into_iter().map(Body::into_region).collect())
            .build()
            .map_err(|error| Error::op(name, error.to_string()))?;
        let operation = self.block.append_operation(operation);
        Ok(operation.results().map(|result| Tensor::new(result.into())).collect())
    }

    /// Whether the block that is being written may use `tensor`.
    fn check_visible(&self, name: &str, tensor: Tensor<'c, 'a>) -> Result<()> {
        let owner = owner(tensor);
        let mut isolated = None;
        for scope in self.scopes.iter().rev() {
            // SAFETY: both blocks live: scopes are open, and the block of a tensor lives as long as the tensor.
            if unsafe { mlirBlockEqual(scope.block, owner) } {
                return match isolated {
                    None => Ok(()),
                    Some(op) => Err(Error::op(
                        format!("stablehlo.{op}"),
                        format!(
                            "its body uses a value of type {} from outside in {name}; this body may only use its own \
                             arguments and what it computes: build constants inside it",
                            tensor.ty()
                        ),
                    )),
                };
            }
            isolated = isolated.or(scope.isolated);
        }
        let message = format!(
            "uses a value of type {} of a body that has ended; return it from that body's op instead",
            tensor.ty()
        );
        Err(Error::op(name, message))
    }

    /// Writes a body of `stablehlo.{op}`.
    pub(super) fn body(
        &self,
        op: &'static str,
        captures: Captures,
        arguments: &[TensorType],
        body: impl FnOnce(&Builder<'c, 'a>, &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>>,
    ) -> Result<Body<'c>> {
        let isolated = (captures == Captures::Refused).then_some(op);
        let named = |b: &Builder<'c, 'a>, arguments: &[Tensor<'c, 'a>]| body(&b.at(self.location), arguments);
        write_body(self.context, &self.shared, &self.scopes, isolated, "stablehlo.return", arguments, named)
    }

    /// `array<i64: ...>`
    pub(super) fn i64_array(&self, values: &[usize]) -> Attribute<'c> {
        let values: Vec<i64> = values.iter().map(|&value| value as i64).collect();
        DenseI64ArrayAttribute::new(self.context, &values).into()
    }

    /// `n : i64`
    pub(super) fn i64(&self, value: usize) -> Attribute<'c> {
        IntegerAttribute::new(IntegerType::new(self.context, 64).into(), value as i64).into()
    }

    /// `n : i32`
    pub(super) fn i32(&self, value: usize) -> Attribute<'c> {
        IntegerAttribute::new(IntegerType::new(self.context, 32).into(), value as i64).into()
    }

    /// `true` or `false`
    pub(super) fn bool(&self, value: bool) -> Attribute<'c> {
        BoolAttribute::new(self.context, value).into()
    }

    /// An attribute of a dialect that LLVM does not ship, from its text.
    pub(super) fn parse(&self, text: &str) -> Result<Attribute<'c>> {
        let (attribute, diagnostics) = diagnosed(self.context, || Attribute::parse(self.context, text));
        attribute.ok_or_else(|| Error::Text { text: text.to_owned(), diagnostics })
    }
}

/// The block that defines `tensor`.
fn owner(tensor: Tensor) -> MlirBlock {
    let value = tensor.value.to_raw();
    // SAFETY: the value lives, and is an op's result (whose op is in a block: the builder appends what it builds) or
    // else a block's argument.
    unsafe {
        if mlirValueIsAOpResult(value) {
            mlirOperationGetBlock(mlirOpResultGetOwner(value))
        } else {
            mlirBlockArgumentGetOwner(value)
        }
    }
}

/// `[1, 2]`, as StableHLO's attributes spell lists of dimensions.
pub(super) fn list(values: &[usize]) -> String {
    format!("{values:?}")
}

/// Refuses when `condition` does not hold.
pub(super) fn ensure(condition: bool, op: &str, message: impl FnOnce() -> String) -> Result<()> {
    if condition { Ok(()) } else { Err(Error::op(format!("stablehlo.{op}"), message())) }
}

/// Refuses dimensions that are out of range or named twice.
pub(super) fn ensure_dims(op: &str, what: &str, dims: &[usize], rank: usize) -> Result<()> {
    for (index, &dim) in dims.iter().enumerate() {
        ensure(dim < rank, op, || format!("{what} = {dims:?}: dimension {dim} is not below the rank {rank}"))?;
        ensure(!dims[..index].contains(&dim), op, || format!("{what} = {dims:?}: dimension {dim} is named twice"))?;
    }
    Ok(())
}

/// `f32[8], i32[]`
pub(super) fn types(types: &[TensorType]) -> String {
    types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
