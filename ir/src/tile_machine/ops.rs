//! The ops that the tile machine knows: one table, an op a row.
//!
//! A row has all that is known of an op: how many operands it takes, how many regions it has, whether dropping it is
//! harmless, and the function that reads its attributes, checks its operands and makes the instruction. What the
//! instruction then does stands in `exec`. To teach the machine an op, add a row, here and in the table below.
//!
//! Sources: MLIR's documentation of its dialects, `tpu_ops.td` of `jaxlib/mosaic`, and where both leave a question, JAX's own
//! tests, which TPUs pass. The files that test an op are in `ir/tests/cases`.
#![doc = include_str!("ops.md")]

use std::{collections::HashMap, ops::RangeInclusive, sync::LazyLock};

use melior::ir::{Attribute, AttributeLike};

use super::{
    decode::{Decoded, Memory, Refusal, Shape, Site, fits, scalar, unsupported},
    mxu::MxuOp,
    program::{Extent, Mask, Op, Permutation, RowDmas, Target},
    sparse::{OfMask, PackFormat},
    tile::{self, Binary, Compare, Conversion, MatmulShape, Reduction, RotationStride, Strides, Tile, Unary},
};
use crate::{
    context::printed,
    element::Element,
    mosaic::{CoreType, MemorySpace, RefElement},
};

/// What is known of an op.
pub(super) struct Row {
    name: &'static str,
    /// How many operands it may have.
    pub(super) operands: RangeInclusive<usize>,
    /// How many regions it has.
    pub(super) regions: usize,
    /// Whether dropping it changes nothing but its results.
    pub(super) pure: bool,
    pub(super) meaning: Meaning,
}

/// What an op becomes.
pub(super) enum Meaning {
    /// An instruction.
    Inst(fn(&Site) -> Decoded<Op>),
    /// The end of a block, which yields its operands.
    Yield,
    /// Nothing: it is for profilers and debuggers.
    Nothing,
}

/// The row of an op.
pub(super) fn row(name: &str) -> Option<&'static Row> {
    static BY_NAME: LazyLock<HashMap<&str, &Row>> = LazyLock::new(|| ROWS.iter().map(|row| (row.name, row)).collect());
    BY_NAME.get(name).copied()
}

type Decode = fn(&Site) -> Decoded<Op>;

/// An op whose results are all that it does.
const fn pure(name: &'static str, operands: RangeInclusive<usize>, decode: Decode) -> Row {
    Row { name, operands, regions: 0, pure: true, meaning: Meaning::Inst(decode) }
}

/// An op that changes memory or semaphores, or may fault in a way that must be seen.
const fn effect(name: &'static str, operands: RangeInclusive<usize>, decode: Decode) -> Row {
    Row { pure: false, ..pure(name, operands, decode) }
}

/// An op with regions.
const fn nesting(name: &'static str, operands: RangeInclusive<usize>, regions: usize, decode: Decode) -> Row {
    Row { regions, ..effect(name, operands, decode) }
}

const fn yields(name: &'static str) -> Row {
    Row { name, operands: ANY, regions: 0, pure: false, meaning: Meaning::Yield }
}

const fn ignored(name: &'static str) -> Row {
    Row { name, operands: ANY, regions: 0, pure: false, meaning: Meaning::Nothing }
}

const ANY: RangeInclusive<usize> = 0..=usize::MAX;

static ROWS: &[Row] = &[
    // Scalars and tiles, element by element.
    pure("arith.constant", 0..=0, constant),
    pure("arith.addf", 2..=2, |op| binary(op, Binary::Add)),
    pure("arith.addi", 2..=2, |op| binary(op, Binary::Add)),
    pure("arith.subf", 2..=2, |op| binary(op, Binary::Sub)),
    pure("arith.subi", 2..=2, |op| binary(op, Binary::Sub)),
    pure("arith.mulf", 2..=2, |op| binary(op, Binary::Mul)),
    pure("arith.muli", 2..=2, |op| binary(op, Binary::Mul)),
    pure("arith.mulsi_extended", 2..=2, |op| multiply_in_full(op, true)),
    pure("arith.mului_extended", 2..=2, |op| multiply_in_full(op, false)),
    pure("arith.divf", 2..=2, |op| binary(op, Binary::Div)),
    pure("arith.divsi", 2..=2, |op| binary(op, Binary::Div)),
    pure("arith.divui", 2..=2, |op| binary(op, Binary::DivUnsigned)),
    pure("arith.remf", 2..=2, |op| binary(op, Binary::Rem)),
    pure("arith.remsi", 2..=2, |op| binary(op, Binary::Rem)),
    pure("arith.remui", 2..=2, |op| binary(op, Binary::RemUnsigned)),
    pure("arith.maximumf", 2..=2, |op| binary(op, Binary::Max)),
    pure("arith.minimumf", 2..=2, |op| binary(op, Binary::Min)),
    pure("arith.maxnumf", 2..=2, |op| binary(op, Binary::MaxNumber)),
    pure("arith.minnumf", 2..=2, |op| binary(op, Binary::MinNumber)),
    pure("arith.maxsi", 2..=2, |op| binary(op, Binary::Max)),
    pure("arith.minsi", 2..=2, |op| binary(op, Binary::Min)),
    pure("arith.maxui", 2..=2, |op| binary(op, Binary::MaxUnsigned)),
    pure("arith.minui", 2..=2, |op| binary(op, Binary::MinUnsigned)),
    pure("arith.andi", 2..=2, |op| binary(op, Binary::And)),
    pure("arith.ori", 2..=2, |op| binary(op, Binary::Or)),
    pure("arith.xori", 2..=2, |op| binary(op, Binary::Xor)),
    pure("arith.shli", 2..=2, |op| binary(op, Binary::Shl)),
    pure("arith.shrsi", 2..=2, |op| binary(op, Binary::ShrSigned)),
    pure("arith.shrui", 2..=2, |op| binary(op, Binary::ShrUnsigned)),
    pure("math.powf", 2..=2, |op| binary(op, Binary::Pow)),
    pure("math.atan2", 2..=2, |op| binary(op, Binary::Atan2)),
    pure("arith.negf", 1..=1, |op| unary(op, Unary::Neg)),
    pure("math.absf", 1..=1, |op| unary(op, Unary::Abs)),
    pure("math.absi", 1..=1, |op| unary(op, Unary::Abs)),
    pure("math.exp", 1..=1, |op| unary(op, Unary::Exp)),
    pure("math.exp2", 1..=1, |op| unary(op, Unary::Exp2)),
    pure("math.log", 1..=1, |op| unary(op, Unary::Log)),
    pure("math.log2", 1..=1, |op| unary(op, Unary::Log2)),
    pure("math.log1p", 1..=1, |op| unary(op, Unary::Log1p)),
    pure("math.tanh", 1..=1, |op| unary(op, Unary::Tanh)),
    pure("math.sin", 1..=1, |op| unary(op, Unary::Sin)),
    pure("math.cos", 1..=1, |op| unary(op, Unary::Cos)),
    pure("math.tan", 1..=1, |op| unary(op, Unary::Tan)),
    pure("math.sqrt", 1..=1, |op| unary(op, Unary::Sqrt)),
    pure("math.rsqrt", 1..=1, |op| unary(op, Unary::Rsqrt)),
    pure("math.floor", 1..=1, |op| unary(op, Unary::Floor)),
    pure("math.ceil", 1..=1, |op| unary(op, Unary::Ceil)),
    pure("math.round", 1..=1, |op| unary(op, Unary::Round)),
    pure("math.roundeven", 1..=1, |op| unary(op, Unary::RoundEven)),
    pure("math.erf", 1..=1, |op| unary(op, Unary::Erf)),
    pure("math.ctlz", 1..=1, |op| unary(op, Unary::LeadingZeros)),
    pure("math.ctpop", 1..=1, |op| unary(op, Unary::CountOnes)),
    pure("tpu.logistic", 1..=1, |op| unary(op, Unary::Logistic)),
    pure("tpu.reduce_precision", 1..=1, reduce_precision),
    pure("tpu.weird", 1..=1, weird),
    pure("tpu.reciprocal", 1..=1, reciprocal),
    pure("arith.cmpi", 2..=2, |op| compare(op, &INTEGER_PREDICATES)),
    pure("arith.cmpf", 2..=2, |op| compare(op, &FLOAT_PREDICATES)),
    pure("arith.select", 3..=3, |_| Ok(Op::Select)),
    // Conversions.
    pure("arith.extf", 1..=1, |op| convert(op, true)),
    pure("arith.truncf", 1..=1, |op| convert(op, true)),
    pure("arith.sitofp", 1..=1, |op| convert(op, true)),
    pure("arith.uitofp", 1..=1, |op| convert(op, false)),
    pure("arith.fptosi", 1..=1, |op| convert(op, true)),
    pure("arith.fptoui", 1..=1, |op| convert(op, false)),
    pure("arith.extsi", 1..=1, |op| convert(op, true)),
    pure("arith.extui", 1..=1, |op| convert(op, false)),
    pure("arith.trunci", 1..=1, |op| convert(op, true)),
    pure("tpu.extf", 1..=1, |op| convert_rounded(op, true, true, true)),
    pure("tpu.truncf", 1..=1, |op| convert_rounded(op, true, true, true)),
    pure("tpu.sitofp", 1..=1, |op| convert_rounded(op, false, true, true)),
    pure("tpu.uitofp", 1..=1, |op| convert_rounded(op, false, true, false)),
    pure("tpu.fptosi", 1..=1, |op| convert_rounded(op, true, false, true)),
    pure("tpu.fptoui", 1..=1, |op| convert_rounded(op, true, false, false)),
    pure("arith.index_cast", 1..=1, |_| Ok(Op::Same)),
    pure("arith.index_castui", 1..=1, |_| Ok(Op::Same)),
    pure("arith.bitcast", 1..=1, bitcast),
    pure("tpu.bitcast", 1..=1, bitcast),
    pure("tpu.pack_elementwise", 1..=usize::MAX, pack),
    pure("tpu.unpack_elementwise", 1..=1, unpack),
    pure("tpu.stochastic_convert", 2..=2, round_stochastically),
    pure("tpu.stochastic_convert_elementwise", 2..=2, round_stochastically_to_bits),
    // Random bits. Those of the hardware are not public: a run draws them from the seed.
    effect("tpu.prng_set_seed_32", ANY, |op| op.scalars(0, op.operands.len()).map(|()| Op::Seed)),
    effect("tpu.prng_random_bits", 0..=0, random_bits),
    // Tiles as wholes.
    pure("vector.broadcast", 1..=1, broadcast),
    pure("vector.shape_cast", 1..=1, |_| Ok(Op::Same)),
    pure("tpu.reshape", 1..=1, reshape),
    pure("tpu.relayout", 1..=1, |_| Ok(Op::Same)),
    pure("vector.bitcast", 1..=1, bitcast_lanes),
    pure("vector.transpose", 1..=1, transpose),
    pure("tpu.transpose", 1..=1, transpose),
    pure("vector.extract_strided_slice", 1..=1, slice),
    pure("vector.extract", 1..=usize::MAX, extract),
    pure("tpu.concatenate", 1..=usize::MAX, concatenate),
    pure("tpu.repeat", 1..=1, repeat),
    pure("tpu.dynamic_rotate", 2..=2, rotate),
    pure("tpu.dynamic_gather", 2..=2, gather),
    pure("tpu.reduce_index", 1..=1, reduce_index),
    pure("tpu.iota", 0..=0, iota),
    pure("vector.multi_reduction", 2..=2, reduce),
    pure("tpu.matmul", 3..=3, matmul),
    effect("tpu.matmul_push_rhs", 1..=1, push_rhs),
    effect("tpu.matmul_acc_lhs", 1..=1, multiply_lhs),
    effect("tpu.matmul_pop", 0..=0, pop_sum),
    // A SparseCore's tiles.
    pure("tpu.scan", 1..=2, scan),
    pure("tpu.scan_count", 2..=2, occurrences),
    pure("tpu.sort", 2..=3, sort),
    pure("tpu.all_reduce", 1..=1, of_mask),
    pure("tpu.pack_subelements", 1..=usize::MAX, pack_lanes),
    pure("tpu.unpack_subelements", 1..=1, unpack_lanes),
    // Memory.
    pure("vector.load", 1..=usize::MAX, load),
    pure("tpu.vector_load", 1..=usize::MAX, load),
    pure("tpu.strided_load", 1..=usize::MAX, load),
    pure("tpu.load", 1..=usize::MAX, |op| all_sublanes(op).and_then(|()| load(op))),
    effect("tpu.store", 2..=usize::MAX, |op| all_sublanes(op).and_then(|()| store(op))),
    pure("tpu.vector_expand_load", 2..=usize::MAX, |op| load_dense(op, Some("expand_dim"))),
    effect("tpu.vector_compress_store", 3..=usize::MAX, |op| store_dense(op, Some("compress_dim"))),
    pure("tpu.expand_load_vreg", 2..=usize::MAX, |op| load_dense(op, None)),
    effect("tpu.compress_store_vreg", 3..=usize::MAX, |op| store_dense(op, None)),
    pure("tpu.vector_load_idx", 2..=usize::MAX, load_indexed),
    effect("tpu.vector_store_idx", 3..=usize::MAX, store_indexed),
    effect("vector.store", 2..=usize::MAX, store),
    effect("tpu.vector_store", 2..=usize::MAX, store),
    effect("tpu.strided_store", 2..=usize::MAX, store),
    pure("memref.load", 1..=usize::MAX, load_scalar),
    effect("memref.store", 2..=usize::MAX, store_scalar),
    pure("tpu.memref_slice", 1..=usize::MAX, slice_memref),
    pure("tpu.memref_squeeze", 1..=1, squeeze_memref),
    pure("tpu.erase_memref_layout", 1..=1, same_memref),
    pure("tpu.assume_layout", 1..=1, same_memref),
    pure("memref.cast", 1..=1, same_memref),
    pure("memref.memory_space_cast", 1..=1, |op| {
        let (memory, result) = (op.memref(0)?, op.result_memref()?);
        fits(memory.element == result.element && memory.may_have_dims_of(&result))?;
        Ok(Op::Same)
    }),
    pure("tpu.memref_reshape", 1..=1, reshape_memref),
    pure("tpu.memref_bitcast", 1..=1, bitcast_memref),
    effect("memref.alloca", 0..=0, allocate),
    // DMAs and semaphores.
    effect("tpu.sem_alloc", 0..=0, allocate),
    effect("tpu.sem_barrier", 0..=0, barrier_semaphore),
    effect("tpu.enqueue_dma", 3..=usize::MAX, start_dma),
    effect("tpu.wait_dma2", 3..=usize::MAX, |op| wait_dma(op, 0, 2)),
    effect("tpu.wait_dma", 2..=usize::MAX, |op| if op.has("wait_target") { wait_side(op) } else { wait_dma(op, 0, 1) }),
    effect("tpu.enqueue_indirect_dma", 4..=5, start_row_dmas),
    effect("tpu.wait_indirect_dma", 3..=3, |op| wait_dma(op, 0, if gathers(op, [1, 2])? { 2 } else { 1 })),
    effect("tpu.sem_signal", 2..=usize::MAX, signal),
    effect("tpu.sem_wait", 2..=2, wait_semaphore),
    pure("tpu.sem_read", 1..=1, read_semaphore),
    effect("tpu.barrier", 1..=1, |op| {
        op.scalars(0, 1)?;
        Ok(Op::Barrier)
    }),
    effect("tpu.fetch_and_add_sync", 3..=usize::MAX, fetch_and_add),
    effect("tpu.assume_multiple", 1..=1, assume_multiple),
    effect("cf.assert", 1..=1, |op| Ok(Op::Assert(op.text("msg")?))),
    // The grid and the devices.
    pure("tpu.iteration_bound", 0..=0, |op| Ok(Op::GridSize(op.size("dim")?))),
    pure("tpu.device_id", 0..=0, |_| Ok(Op::DeviceId)),
    // Control flow.
    nesting("scf.if", 1..=1, 2, |_| Ok(Op::If)),
    nesting("scf.for", 3..=usize::MAX, 1, |_| Ok(Op::For)),
    nesting("scf.while", ANY, 2, |_| Ok(Op::While)),
    nesting("tpu.region", 0..=0, 1, |_| Ok(Op::Region)),
    nesting("tpu.trace", 0..=0, 1, |_| Ok(Op::Region)),
    yields("func.return"),
    yields("scf.yield"),
    yields("scf.condition"),
    yields("tpu.yield"),
    effect("tpu.trace_start", 0..=0, |op| Ok(Op::RegionStart(op.string("message").unwrap_or_default()))),
    effect("tpu.trace_stop", 0..=0, |_| Ok(Op::RegionStop)),
    ignored("tpu.trace_value"),
    effect("tpu.log", ANY, print),
    effect("tpu.log_buffer", 1..=1, |op| {
        op.memref(0)?;
        print(op)
    }),
    ignored("tpu.delay"),
];

// ---- element by element ----

fn constant(op: &Site) -> Decoded<Op> {
    let shape = op.result()?;
    let value = op.attribute("value")?;
    let unreadable = || Refusal::Because(format!("a constant that is written {} is not supported", printed(&value)));
    if shape.dims.is_empty() {
        return scalar(value, shape.element).map(Op::Scalar).ok_or_else(unreadable);
    }
    let raw = value.to_raw();
    // SAFETY: each getter is called on an attribute of the kind that it is for.
    unsafe {
        if !mlir_sys::mlirAttributeIsADenseElements(raw) {
            return Err(unreadable());
        }
        if mlir_sys::mlirDenseElementsAttrIsSplat(raw) {
            let splat = Attribute::from_raw(mlir_sys::mlirDenseElementsAttrGetSplatValue(raw));
            let splat = scalar(splat, shape.element).ok_or_else(unreadable)?;
            return Ok(Op::Constant(tile::splat(splat, shape.len())));
        }
        let bits = (0..shape.len() as isize).map(|index| match shape.element {
            Element::F32 => Some(mlir_sys::mlirDenseElementsAttrGetFloatValue(raw, index).to_bits()),
            Element::I32 => Some(mlir_sys::mlirDenseElementsAttrGetInt32Value(raw, index) as u32),
            Element::Pred => Some(u32::from(mlir_sys::mlirDenseElementsAttrGetBoolValue(raw, index))),
            _ => None,
        });
        let bits = match (shape.element, shape.element.bytes()) {
            (Element::F32 | Element::I32 | Element::Pred, _) => bits.collect::<Option<Vec<u32>>>(),
            (_, width @ 1..=2) => {
                let data = mlir_sys::mlirDenseElementsAttrGetRawData(raw).cast::<u8>();
                let data = std::slice::from_raw_parts(data, shape.len() * width);
                let element = |bytes: &[u8]| bytes.iter().rev().fold(0, |bits, &byte| bits << 8 | u32::from(byte));
                Some(data.chunks_exact(width).map(element).collect())
            }
            _ => None,
        };
        let bits = bits.ok_or_else(unreadable)?;
        Ok(Op::Constant(tile::from_bits(shape.element, bits)))
    }
}

fn unary(op: &Site, how: Unary) -> Decoded<Op> {
    Ok(Op::Unary { op: how, element: op.result()?.element })
}

fn binary(op: &Site, how: Binary) -> Decoded<Op> {
    Ok(Op::Binary { op: how, element: op.result()?.element })
}

fn multiply_in_full(op: &Site, signed: bool) -> Decoded<Op> {
    let Shape { element, .. } = op.result()?;
    fits(element.is_integer() && element.bits() <= 32)?;
    Ok(Op::MultiplyInFull { element, signed })
}

fn reciprocal(op: &Site) -> Decoded<Op> {
    let x = op.tile(0)?;
    fits(x.element.is_float() && x == op.result_tile()?)?;
    unary(op, Unary::Reciprocal)
}

/// The predicates of `arith.cmpi`, in MLIR's order.
const INTEGER_PREDICATES: [Compare; 10] = {
    use Compare::*;
    [Eq, Ne, Lt, Le, Gt, Ge, UnsignedLt, UnsignedLe, UnsignedGt, UnsignedGe]
};

/// The predicates of `arith.cmpf`, in MLIR's order.
///
/// Of the seventh, `one`, MLIR says "ordered and unequal". Mosaic takes it for plain inequality: JAX lowers `!=` to it, and
/// its tests hold TPUs to NaN != x.
const FLOAT_PREDICATES: [Compare; 16] = {
    use Compare::*;
    [
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
    ]
};

fn compare(op: &Site, predicates: &[Compare]) -> Decoded<Op> {
    let predicate = op.size("predicate")?;
    let known = predicates.get(predicate).copied().map(Op::Compare);
    known.ok_or_else(|| Refusal::Because(format!("predicate {predicate} is not supported")))
}

/// `signed` is how integers are read and made.
fn convert(op: &Site, signed: bool) -> Decoded<Op> {
    let (x, result) = (op.shape(0)?, op.result()?);
    fits(x.dims == result.dims)?;
    Ok(Op::Convert(Conversion { from: x.element, to: result.element, signed, nearest: false }))
}

/// Conversions of the `tpu` dialect say how they round to integers. To floats they round to nearest even.
fn convert_rounded(op: &Site, from_float: bool, to_float: bool, signed: bool) -> Decoded<Op> {
    let (x, result) = (op.shape(0)?, op.result()?);
    fits(x.dims == result.dims && x.element.is_float() == from_float && result.element.is_float() == to_float)?;
    let mode = if op.has("rounding_mode") { op.text("rounding_mode")? } else { String::new() };
    let nearest = mode.contains("to_nearest_even") || mode.starts_with('1');
    if to_float && op.has("rounding_mode") && !nearest {
        return unsupported(format!("rounding mode {mode} to a float is not supported"));
    }
    Ok(Op::Convert(Conversion { from: x.element, to: result.element, signed, nearest }))
}

/// Narrow elements are packed along the second-minor dimension, the first row in the low bits.
fn bitcast(op: &Site) -> Decoded<Op> {
    let (x, result) = (op.shape(0)?, op.result()?);
    let same_width = x.element.bits() == result.element.bits();
    if let ([], []) = (x.dims.as_slice(), result.dims.as_slice()) {
        fits(same_width)?;
        return Ok(Op::Bitcast { dims: vec![], from: x.element, to: result.element });
    }
    let (Some(minor), Some(same)) = (x.dims.last(), result.dims.last()) else { return Err(Refusal::Misfit) };
    let rows = x.dims.len().checked_sub(2).map(|rows| x.dims[rows] * x.element.bits());
    let whole = same_width || rows.is_some_and(|bits| bits.is_multiple_of(result.element.bits()));
    let bits = |shape: &Shape| shape.len() * shape.element.bits();
    fits(whole && minor == same && bits(&x) == bits(&result))?;
    Ok(Op::Bitcast { dims: x.dims, from: x.element, to: result.element })
}

// ---- tiles as wholes ----

fn broadcast(op: &Site) -> Decoded<Op> {
    Ok(Op::Broadcast { from: op.shape(0)?.dims, to: op.result()?.dims })
}

fn reshape(op: &Site) -> Decoded<Op> {
    let (x, result) = (op.tile(0)?, op.result_tile()?);
    fits(x.len() == result.len() && x.element == result.element)?;
    Ok(Op::Same)
}

fn transpose(op: &Site) -> Decoded<Op> {
    let (x, result) = (op.tile(0)?, op.result_tile()?);
    let permutation = op.sizes("permutation")?;
    let mut sorted = permutation.clone();
    sorted.sort_unstable();
    fits(sorted.into_iter().eq(0..x.dims.len()) && x.element == result.element)?;
    fits(permutation.iter().map(|&dim| x.dims[dim]).eq(result.dims))?;
    Ok(Op::Transpose { dims: x.dims, permutation })
}

fn slice(op: &Site) -> Decoded<Op> {
    let dims = op.shape(0)?.dims;
    let (mut offsets, mut steps) = (op.sizes("offsets")?, op.sizes("strides")?);
    // Those of the minor dimensions may be left out: they are taken whole.
    offsets.resize(dims.len(), 0);
    steps.resize(dims.len(), 1);
    Ok(Op::Slice { dims, offsets, sizes: op.result()?.dims, steps })
}

fn extract(op: &Site) -> Decoded<Op> {
    let dims = op.shape(0)?.dims;
    let position = op.sizes("static_position")?;
    let strides = tile::strides(&dims);
    if op.result()?.dims.is_empty() {
        return Ok(Op::Extract { index: position.iter().zip(&strides).map(|(index, stride)| index * stride).sum() });
    }
    let rest = &dims[position.len()..];
    let offsets = position.iter().copied().chain(rest.iter().map(|_| 0)).collect();
    let sizes = position.iter().map(|_| 1).chain(rest.iter().copied()).collect();
    Ok(Op::Slice { steps: vec![1; dims.len()], offsets, sizes, dims })
}

/// Checks tiles that come after each other along `dim`, all of them `times` times; the sizes of each that comes.
fn one_after_another(op: &Site, dim: usize, times: usize) -> Decoded<Vec<Vec<usize>>> {
    let result = op.result_tile()?;
    let tiles = (0..op.operands.len()).map(|index| op.tile(index)).collect::<Decoded<Vec<_>>>()?;
    fits(dim < result.dims.len())?;
    for tile in &tiles {
        fits(tile.element == result.element && tile.dims.len() == result.dims.len())?;
        fits(tile.dims.iter().zip(&result.dims).enumerate().all(|(at, (a, b))| at == dim || a == b))?;
    }
    let length: usize = tiles.iter().map(|tile| tile.dims[dim]).sum();
    fits(length.checked_mul(times) == Some(result.dims[dim]))?;
    let sizes = (0..times).flat_map(|_| tiles.iter().map(|tile| tile.dims.clone()));
    Ok(sizes.collect())
}

fn concatenate(op: &Site) -> Decoded<Op> {
    let dim = op.size("dimension")?;
    Ok(Op::Concatenate { sizes: one_after_another(op, dim, 1)?, dim })
}

fn repeat(op: &Site) -> Decoded<Op> {
    let (dim, times) = (op.size("dimension")?, op.size("times")?);
    Ok(Op::Concatenate { sizes: one_after_another(op, dim, times)?, dim })
}

fn rotate(op: &Site) -> Decoded<Op> {
    let (x, dim) = (op.tile(0)?, op.size("dimension")?);
    op.scalars(1, 1)?;
    fits(x == op.result_tile()? && dim < x.dims.len())?;
    let stride = match op.has("stride") {
        true => Some(RotationStride { dim: op.size("stride_dimension")?, by: op.integer("stride")? }),
        false => None,
    };
    fits(stride.is_none_or(|stride| stride.dim < x.dims.len() && stride.dim != dim))?;
    Ok(Op::Rotate { dims: x.dims, dim, stride })
}

/// Indices counted along the dimensions `over`, the first of them outermost.
fn iota(op: &Site) -> Decoded<Op> {
    let (Shape { element, dims }, over) = (op.result_tile()?, op.sizes("dimensions")?);
    fits(over.iter().all(|&dim| dim < dims.len()) && !element.is_float())?;
    let strides = tile::strides(&dims);
    let index = |at: usize| over.iter().fold(0, |total, &dim| total * dims[dim] + at / strides[dim] % dims[dim]);
    let len: usize = dims.iter().product();
    let indices: Tile = tile::from_bits(element, (0..len).map(|at| index(at) as u32).collect());
    Ok(Op::Constant(indices))
}

fn reduce(op: &Site) -> Decoded<Op> {
    let kind = op.text("kind")?;
    let how = match kind.trim_start_matches("#vector.kind<").trim_end_matches('>') {
        "add" => Reduction::Sum,
        "mul" => Reduction::Product,
        "maxui" => Reduction::MaxUnsigned,
        "minui" => Reduction::MinUnsigned,
        "and" => Reduction::And,
        "or" => Reduction::Or,
        "xor" => Reduction::Xor,
        "maximumf" | "maxsi" => Reduction::Max,
        "minimumf" | "minsi" => Reduction::Min,
        "maxnumf" => Reduction::MaxNumber,
        "minnumf" => Reduction::MinNumber,
        _ => return unsupported(format!("kind {kind} is not supported")),
    };
    let Shape { element, dims } = op.tile(0)?;
    Ok(Op::Reduce { how, element, dims, over: op.sizes("reduction_dims")? })
}

/// The integer lists in a text like `#tpu.dot_dimension_numbers<[1], [0], ...>`.
fn bracketed(text: &str) -> Vec<Vec<usize>> {
    let lists = text.split('[').skip(1).filter_map(|rest| rest.split(']').next());
    lists.map(|list| list.split(',').filter_map(|number| number.trim().parse().ok()).collect()).collect()
}

fn matmul(op: &Site) -> Decoded<Op> {
    let (lhs, rhs, sum) = (op.tile(0)?, op.tile(1)?, op.tile(2)?);
    fits(sum == op.result_tile()? && ![lhs.element, rhs.element, sum.element].contains(&Element::Pred))?;
    // Integers beside floats are converted to them; a sum of integers is one of products of integers.
    let exact_as_float = |side: &Shape| side.element.is_float() || side.element.bits() <= 16;
    fits(match sum.element.is_float() {
        true => exact_as_float(&lhs) && exact_as_float(&rhs),
        false => !lhs.element.is_float() && !rhs.element.is_float(),
    })?;
    let fp32 = op.has("precision") && op.text("precision")?.contains("fp32");
    let elements = [lhs.element, rhs.element];
    let to = sum.element;
    let (lhs, rhs, sum) = (lhs.dims, rhs.dims, sum.dims);
    let numbers = match op.has("dimension_numbers") {
        true => bracketed(&op.text("dimension_numbers")?),
        false => {
            let (l, r) = (usize::from(!op.flag("transpose_lhs")), usize::from(op.flag("transpose_rhs")));
            vec![vec![l], vec![r], vec![1 - l], vec![1 - r], vec![0, 1 - l, 1, 1 - r], vec![], vec![]]
        }
    };
    let [contract_l, contract_r, free_l, free_r, order, batch_l, batch_r] = numbers.as_slice() else {
        return unsupported(format!("dimension numbers {numbers:?}"));
    };
    let covers = |dims: &[usize], lists: [&Vec<usize>; 3]| {
        let mut all: Vec<usize> = lists.into_iter().flatten().copied().collect();
        all.sort_unstable();
        all.into_iter().eq(0..dims.len())
    };
    let sizes = |dims: &[usize], list: &[usize]| -> Vec<usize> { list.iter().map(|&dim| dims[dim]).collect() };
    let standard =
        batch_l.iter().chain(free_l).flat_map(|&dim| [0, dim]).chain(free_r.iter().flat_map(|&dim| [1, dim]));
    let fit = covers(&lhs, [batch_l, free_l, contract_l])
        && covers(&rhs, [batch_r, free_r, contract_r])
        && sizes(&lhs, batch_l) == sizes(&rhs, batch_r)
        && sizes(&lhs, contract_l) == sizes(&rhs, contract_r)
        && [sizes(&lhs, batch_l), sizes(&lhs, free_l), sizes(&rhs, free_r)].concat() == sum
        && standard.eq(order.iter().copied())
        && ![&lhs, &rhs].into_iter().flatten().any(|&size| size == 0);
    if !fit {
        return unsupported(format!("{lhs:?} x {rhs:?} + {sum:?} with dimension numbers {numbers:?}"));
    }
    // A product with a vector is not one for the MXU: JAX's `test_sum_of_two_matmuls` holds TPUs to the precision of f32.
    let exact = fp32 || free_l.is_empty() || free_r.is_empty();
    let round = elements.map(|element| element == Element::F32 && !exact);
    let (arrange_l, [batch_stride_l, row_l, column_l]) = three_strides(&lhs, [batch_l, free_l, contract_l]);
    let (arrange_r, [batch_stride_r, row_r, column_r]) = three_strides(&rhs, [batch_r, contract_r, free_r]);
    let product = |dims: &[usize], list: &[usize]| sizes(dims, list).iter().product();
    let shape = MatmulShape {
        batch: product(&lhs, batch_l),
        m: product(&lhs, free_l),
        n: product(&rhs, free_r),
        k: product(&lhs, contract_l),
        lhs: Strides { batch: batch_stride_l, row: row_l, column: column_l },
        rhs: Strides { batch: batch_stride_r, row: row_r, column: column_r },
        to,
    };
    Ok(Op::Matmul { shape, round, arrange: [arrange_l, arrange_r], elements })
}

/// A tile of two dimensions of numbers: its sizes and its type.
fn matrix(tile: &Shape) -> Decoded<([usize; 2], Element)> {
    fits(tile.element != Element::Pred)?;
    Ok((tile.dims.as_slice().try_into().map_err(|_| Refusal::Misfit)?, tile.element))
}

fn push_rhs(op: &Site) -> Decoded<Op> {
    let (sizes, element) = matrix(&op.tile(0)?)?;
    let register = if op.has("staging_register") { op.size("staging_register")? } else { 0 };
    let unit = op.size("mxu_index")?;
    Ok(Op::Mxu(MxuOp::Push { unit, register, sizes, element, turned: op.flag("transpose") }))
}

fn multiply_lhs(op: &Site) -> Decoded<Op> {
    let (sizes, element) = matrix(&op.tile(0)?)?;
    let register = op.has("load_staged_rhs").then(|| op.size("load_staged_rhs")).transpose()?;
    let (unit, address) = (op.size("mxu_index")?, op.size("acc")?);
    Ok(Op::Mxu(MxuOp::Multiply { unit, address, sizes, element, register }))
}

fn pop_sum(op: &Site) -> Decoded<Op> {
    let (sizes, element) = matrix(&op.result_tile()?)?;
    fits(matches!(element, Element::F32 | Element::I32))?;
    let (unit, address) = (op.size("mxu_index")?, op.size("acc")?);
    Ok(Op::Mxu(MxuOp::Pop { unit, address, sizes, element }))
}

/// Three groups of dimensions as one dimension each: their strides, and the permutation to apply before where the dimensions of
/// a group do not follow each other in memory.
fn three_strides(dims: &[usize], groups: [&Vec<usize>; 3]) -> (Option<Permutation>, [usize; 3]) {
    fn of_groups(dims: &[usize], groups: [&Vec<usize>; 3]) -> Option<[usize; 3]> {
        let strides = tile::strides(dims);
        let mut result = [0; 3];
        for (group, result) in groups.into_iter().zip(&mut result) {
            let group: Vec<usize> = group.iter().copied().filter(|&dim| dims[dim] != 1).collect();
            let follows = |pair: &[usize]| strides[pair[0]] == dims[pair[1]] * strides[pair[1]];
            if !group.windows(2).all(follows) {
                return None;
            }
            *result = group.last().map_or(0, |&dim| strides[dim]);
        }
        Some(result)
    }
    if let Some(strides) = of_groups(dims, groups) {
        return (None, strides);
    }
    let order = groups.into_iter().flatten().copied().collect();
    let size = |group: &Vec<usize>| group.iter().map(|&dim| dims[dim]).product::<usize>();
    let [_, rows, columns] = groups.map(size);
    (Some(Permutation { dims: dims.to_vec(), order }), [rows * columns, columns, 1])
}

fn reduce_precision(op: &Site) -> Decoded<Op> {
    let (x, result) = (op.shape(0)?, op.result()?);
    let bits = |name| u32::try_from(op.size(name)?).map_err(|_| Refusal::Misfit);
    let (exponent_bits, mantissa_bits) = (bits("exponent_bits")?, bits("mantissa_bits")?);
    fits(x == result && x.element.is_float() && (1..=8).contains(&exponent_bits) && mantissa_bits <= 23)?;
    // A range that is as wide keeps its smallest numbers.
    let own = match x.element {
        Element::F16 | Element::F8E5M2 => 5,
        Element::F8E4M3Fn | Element::F8E4M3B11Fnuz => 4,
        _ => 8,
    };
    Ok(Op::ReducePrecision { exponent_bits: (exponent_bits < own).then_some(exponent_bits), mantissa_bits })
}

fn weird(op: &Site) -> Decoded<Op> {
    let (x, result) = (op.shape(0)?, op.result()?);
    fits(x.element.is_float() && x.dims == result.dims && result.element == Element::Pred)?;
    Ok(Op::Weird)
}

/// The index along `axis` of the greatest or least element.
fn reduce_index(op: &Site) -> Decoded<Op> {
    let (x, dim, result) = (op.tile(0)?, op.size("axis")?, op.result()?);
    fits(dim < x.dims.len() && !x.dims.contains(&0))?;
    let mut dims = x.dims.clone();
    dims.remove(dim);
    fits(result.element == Element::I32 && dims == result.dims)?;
    let kind = op.text("kind")?;
    // An enum of the dialect, or its number.
    let greatest = match kind.trim_start_matches("#tpu.reduction_kind<").trim_end_matches('>') {
        "arg_max" | "3 : i32" => true,
        "arg_min" | "4 : i32" => false,
        _ => return unsupported(format!("kind {kind} is not supported")),
    };
    Ok(Op::ReduceIndex { dims: x.dims, dim, greatest })
}

/// Operands: the source, the indices.
fn gather(op: &Site) -> Decoded<Op> {
    let (x, indices, result) = (op.tile(0)?, op.tile(1)?, op.result_tile()?);
    let over = op.sizes("dimensions")?;
    fits(x.element == result.element && indices.dims == result.dims && x.dims.len() == result.dims.len())?;
    let kept_fit = (0..x.dims.len()).all(|dim| over.contains(&dim) || result.dims[dim] <= x.dims[dim]);
    fits(over.iter().all(|&dim| dim < x.dims.len()) && kept_fit && !x.dims.contains(&0))?;
    fits(!indices.element.is_float() && indices.element != Element::Pred)?;
    Ok(Op::Gather { dims: x.dims, over, index_dims: result.dims })
}

fn pack(op: &Site) -> Decoded<Op> {
    let (x, result, to) = (op.tile(0)?, op.result_tile()?, op.element("target_type")?);
    let sources = (0..op.operands.len()).map(|index| op.tile(index)).collect::<Decoded<Vec<_>>>()?;
    fits(sources.iter().all(|source| *source == x) && x.dims == result.dims)?;
    fits(result.element.bits() == x.element.bits() && sources.len() * to.bits() == x.element.bits())?;
    fits(x.element.is_float() == to.is_float() && result.element.is_integer())?;
    Ok(Op::Pack { from: x.element, to, result: result.element, len: x.len() })
}

fn unpack(op: &Site) -> Decoded<Op> {
    let (x, result, part) = (op.tile(0)?, op.result_tile()?, op.element("source_type")?);
    let index = op.size("index")?;
    fits(x.element.is_integer() && x.dims == result.dims && part.bits() < x.element.bits())?;
    fits(index < x.element.bits() / part.bits() && part.is_float() == result.element.is_float())?;
    Ok(Op::Unpack { from: x.element, part, index, to: result.element })
}

/// Operands: the tile, random bits.
fn round_stochastically(op: &Site) -> Decoded<Op> {
    let (x, random, result) = (op.tile(0)?, op.tile(1)?, op.result_tile()?);
    fits(x.element == Element::F32 && random.element == Element::I32 && result.element.is_float())?;
    fits(x.dims == random.dims && x.dims == result.dims)?;
    Ok(Op::RoundStochastically { to: result.element, as_bits: false })
}

/// As [`round_stochastically`]; the result are bits in the low places of 32.
fn round_stochastically_to_bits(op: &Site) -> Decoded<Op> {
    let (x, random, result, to) = (op.tile(0)?, op.tile(1)?, op.result_tile()?, op.element("dst_type")?);
    fits(x.element == Element::F32 && random.element == Element::I32 && result.element == Element::I32)?;
    fits(x.dims == random.dims && x.dims == result.dims && to.is_float())?;
    Ok(Op::RoundStochastically { to, as_bits: true })
}

fn random_bits(op: &Site) -> Decoded<Op> {
    let result = op.result_tile()?;
    fits(result.element.is_integer())?;
    Ok(Op::RandomBits { element: result.element, len: result.len() })
}

// ---- memory ----

/// The extent of a load or store of a tile in VMEM, with its steps; a load may read the same rows again (a step of 0).
fn extent(op: &Site, memory: &Memory, tile: &Shape, is_load: bool) -> Decoded<Extent> {
    let steps = op.optional_sizes("strides")?;
    fits(memory.element == RefElement::Data(tile.element) && memory.space == MemorySpace::Vmem)?;
    // A SparseCore's tile is of one element along the first dimensions that it does not have.
    let missing = memory.dims.len().checked_sub(tile.dims.len()).ok_or(Refusal::Misfit)?;
    fits((missing == 0 || op.core != CoreType::TensorCore) && !tile.dims.contains(&0))?;
    let sizes: Vec<usize> = std::iter::repeat_n(1, missing).chain(tile.dims.iter().copied()).collect();
    fits(steps.is_empty() || (steps.len() == sizes.len() && (is_load || !steps.contains(&0))))?;
    Ok(Extent { sizes, steps })
}

/// Operands: the memref, an index per dimension, perhaps a mask.
fn load(op: &Site) -> Decoded<Op> {
    let (memory, result) = (op.memref(0)?, op.result_tile()?);
    let extent = extent(op, &memory, &result, true)?;
    let rank = memory.dims.len();
    op.scalars(1, rank)?;
    let mask = mask(op, 1 + rank, &result.dims)?;
    Ok(Op::Load { extent, to: result.element, mask })
}

/// The last operand of a load or store, number `at`, if it is there.
fn mask(op: &Site, at: usize, dims: &[usize]) -> Decoded<Option<Mask>> {
    match op.operands.len() - at {
        0 => return Ok(None),
        1 => fits(op.tile(at)? == Shape { element: Element::Pred, dims: dims.to_vec() })?,
        _ => return Err(Refusal::Misfit),
    }
    Ok(Some(Mask::Gaps))
}

/// Operands: the tile, the memref, an index per dimension, perhaps a mask.
fn store(op: &Site) -> Decoded<Op> {
    let (value, memory) = (op.tile(0)?, op.memref(1)?);
    let extent = extent(op, &memory, &value, false)?;
    let rank = memory.dims.len();
    op.scalars(2, rank)?;
    let mask = mask(op, 2 + rank, &value.dims)?;
    Ok(Op::Store { extent, add: op.flag("add"), mask })
}

/// `Misfit` unless `dim`, along which the lanes of a mask follow each other, is the minor one, and all others have one element.
fn minor_alone(op: &Site, dim: Option<&str>, extent: &Extent) -> Decoded<()> {
    let last = extent.sizes.len() - 1;
    fits(dim.map(|dim| op.size(dim)).transpose()?.is_none_or(|dim| dim == last))?;
    fits(extent.steps.iter().all(|&step| step == 1))?;
    if extent.sizes[..last].iter().any(|&size| size != 1) {
        return unsupported("lanes of several rows that follow each other are not supported");
    }
    Ok(())
}

/// The lanes of the mask lie one after another along `dim`, if the op does not always mean the minor one.
fn load_dense(op: &Site, dim: Option<&str>) -> Decoded<Op> {
    match load(op)? {
        Op::Load { extent, to, mask: Some(_) } => {
            minor_alone(op, dim, &extent)?;
            Ok(Op::Load { extent, to, mask: Some(Mask::Dense) })
        }
        _ => Err(Refusal::Misfit),
    }
}

fn store_dense(op: &Site, dim: Option<&str>) -> Decoded<Op> {
    match store(op)? {
        Op::Store { extent, add, mask: Some(_) } => {
            minor_alone(op, dim, &extent)?;
            Ok(Op::Store { extent, add, mask: Some(Mask::Dense) })
        }
        _ => Err(Refusal::Misfit),
    }
}

/// Of a memref in VMEM, operand `base`: a tile of indices of the sizes of `tile` for each dimension, and perhaps a mask.
fn lanes_of(op: &Site, base: usize, tile: &Shape) -> Decoded<usize> {
    let memory = op.memref(base)?;
    let rank = memory.dims.len();
    fits(memory.element == RefElement::Data(tile.element) && memory.space == MemorySpace::Vmem && rank > 0)?;
    fits(matches!(op.operands.len() - base - 1, operands if operands == rank || operands == rank + 1))?;
    for at in base + 1..op.operands.len() {
        let element = if at <= base + rank { Element::I32 } else { Element::Pred };
        fits(op.tile(at)? == Shape { element, dims: tile.dims.clone() })?;
    }
    Ok(rank)
}

fn load_indexed(op: &Site) -> Decoded<Op> {
    let result = op.result_tile()?;
    Ok(Op::LoadIndexed { rank: lanes_of(op, 0, &result)?, to: result.element })
}

fn store_indexed(op: &Site) -> Decoded<Op> {
    Ok(Op::StoreIndexed { rank: lanes_of(op, 1, &op.tile(0)?)?, add: op.flag("add") })
}

// ---- a SparseCore's tiles ----

/// What stands in the brackets of an enum of the dialect, such as `#tpu.reduction_kind<sum>`.
fn enum_case(text: &str) -> &str {
    text.split_once('<').and_then(|(_, rest)| rest.strip_suffix('>')).unwrap_or(text)
}

fn minor(tile: &Shape) -> usize {
    tile.dims.last().copied().unwrap_or(1)
}

/// `Misfit` unless operand `index`, if it is there, is a mask for `tile`.
fn perhaps_mask(op: &Site, index: usize, tile: &Shape) -> Decoded<()> {
    fits(op.operands.len() <= index || op.tile(index)? == Shape { element: Element::Pred, dims: tile.dims.clone() })
}

/// Operands: the tile, perhaps a mask. Integers have no sign where the kind does not say.
fn scan(op: &Site) -> Decoded<Op> {
    let (x, result) = (op.tile(0)?, op.result_tile()?);
    perhaps_mask(op, 1, &x)?;
    fits(x.dims == result.dims && x.element.is_float() == result.element.is_float())?;
    fits(x.element == result.element || x.element == Element::Pred)?;
    fits(result.element != Element::Pred)?;
    if op.has("dimension") {
        fits(op.size("dimension")? + 1 == x.dims.len())?;
    }
    let kind = op.text("kind")?;
    let how = match (enum_case(&kind), x.element.is_float()) {
        ("sum", _) => Reduction::Sum,
        ("max" | "maxf", true) | ("maxsi", false) => Reduction::Max,
        ("min" | "minf", true) | ("minsi", false) => Reduction::Min,
        ("max" | "maxui", false) => Reduction::MaxUnsigned,
        ("min" | "minui", false) => Reduction::MinUnsigned,
        _ => return unsupported(format!("kind {kind} is not supported")),
    };
    Ok(Op::Scan { how, element: result.element, lanes: minor(&x) })
}

/// Operands: mask, tile. Results: which lanes are the last with their value, and the counts.
fn occurrences(op: &Site) -> Decoded<Op> {
    let x = op.tile(1)?;
    let [last, counts] = [op.nth_result_tile(0)?, op.nth_result_tile(1)?];
    fits(op.tile(0)? == Shape { element: Element::Pred, dims: x.dims.clone() } && op.tile(0)? == last)?;
    fits(counts == Shape { element: Element::I32, dims: x.dims.clone() })?;
    Ok(Op::Occurrences { lanes: minor(&x) })
}

/// Operands: keys, values, perhaps a mask. Results: a mask, keys, values.
fn sort(op: &Site) -> Decoded<Op> {
    let (keys, values) = (op.tile(0)?, op.tile(1)?);
    perhaps_mask(op, 2, &keys)?;
    fits(keys.dims == values.dims && op.nth_result_tile(1)? == keys && op.nth_result_tile(2)? == values)?;
    fits(op.nth_result_tile(0)? == Shape { element: Element::Pred, dims: keys.dims.clone() })?;
    fits(keys.element != Element::Pred)?;
    Ok(Op::Sort { lanes: minor(&keys), descending: op.flag("descending") })
}

fn of_mask(op: &Site) -> Decoded<Op> {
    let (mask, result, kind) = (op.tile(0)?, op.result_tile()?, op.text("kind")?);
    fits(mask.element == Element::Pred && mask.dims.len() == 1)?;
    fits(result.element == Element::I32 && result.dims.len() == 1)?;
    let what = match enum_case(&kind) {
        "sum" => OfMask::Count,
        "find_first_set" => OfMask::FirstSet,
        _ => return unsupported(format!("kind {kind} is not supported")),
    };
    Ok(Op::OfMask { what, lanes: result.len() })
}

fn pack_format(op: &Site) -> Decoded<PackFormat> {
    let format = op.text("pack_format")?;
    match enum_case(&format) {
        "compressed" => Ok(PackFormat::Compressed),
        "interleaved" => Ok(PackFormat::Interleaved),
        _ => unsupported(format!("format {format} is not supported")),
    }
}

fn pack_lanes(op: &Site) -> Decoded<Op> {
    let (x, result, positions) = (op.tile(0)?, op.result_tile()?, op.sizes("positions")?);
    let (from, to) = (x.element, result.element);
    for index in 1..op.operands.len() {
        fits(op.tile(index)? == x)?;
    }
    fits(from.is_float() == to.is_float() && to.bits() < from.bits() && from.bits() <= 32)?;
    let ratio = from.bits() / to.bits();
    fits(positions.len() == op.operands.len() && positions.iter().all(|&position| position < ratio))?;
    fits(result.len() == ratio * x.len())?;
    Ok(Op::PackLanes { positions, format: pack_format(op)?, elements: [from, to], len: result.len() })
}

fn unpack_lanes(op: &Site) -> Decoded<Op> {
    let (x, result, index) = (op.tile(0)?, op.result_tile()?, op.size("index")?);
    let (from, to) = (x.element, result.element);
    fits(from.is_float() == to.is_float() && from.bits() < to.bits() && to.bits() <= 32)?;
    let ratio = to.bits() / from.bits();
    fits(index < ratio && x.len() == ratio * result.len())?;
    let signed = !op.flag("unsigned_integers");
    Ok(Op::UnpackLanes { index, format: pack_format(op)?, elements: [from, to], signed })
}

/// The bits of a tile, whose minor dimension alone has another size.
fn bitcast_lanes(op: &Site) -> Decoded<Op> {
    let (x, result) = (op.tile(0)?, op.result_tile()?);
    fits(x.len() * x.element.bits() == result.len() * result.element.bits() && x.dims.len() == result.dims.len())?;
    let rows = |tile: &Shape| tile.len() / minor(tile).max(1);
    fits(rows(&x) == rows(&result) && x.element != Element::Pred && result.element != Element::Pred)?;
    Ok(Op::Bitcast { dims: vec![1], from: x.element, to: result.element })
}

/// Registers are loaded and stored whole.
fn all_sublanes(op: &Site) -> Decoded<()> {
    let stride = if op.has("sublane_stride") { op.size("sublane_stride")? } else { 1 };
    match stride != 1 || op.text("sublane_mask")?.contains("false") {
        true => unsupported("sublanes that are left out are not supported"),
        false => Ok(()),
    }
}

/// The extent of one element of the memref `base`, whose indices are the last operands.
fn element(op: &Site, base: usize) -> Decoded<Extent> {
    let memory = op.memref(base)?;
    let rank = memory.dims.len();
    fits(memory.space == MemorySpace::Smem && op.operands.len() == base + 1 + rank)?;
    fits(memory.element.data().is_some())?;
    op.scalars(base + 1, rank)?;
    Ok(Extent { sizes: vec![1; rank], steps: vec![] })
}

fn load_scalar(op: &Site) -> Decoded<Op> {
    Ok(Op::LoadScalar { extent: element(op, 0)? })
}

fn store_scalar(op: &Site) -> Decoded<Op> {
    Ok(Op::StoreScalar { extent: element(op, 1)? })
}

/// Operands: the memref, an index per dimension, a size for each that the type does not say.
fn slice_memref(op: &Site) -> Decoded<Op> {
    let (memory, result) = (op.memref(0)?, op.result_memref()?);
    fits(memory.element == result.element && memory.space == result.space)?;
    fits(memory.dims.len() == result.dims.len())?;
    let operands = result.dims.len() + result.dims.iter().filter(|size| size.is_none()).count();
    fits(op.operands.len() == 1 + operands)?;
    op.scalars(1, operands)?;
    Ok(Op::SliceRef { sizes: result.dims })
}

/// Operand 0 and the result, which are the same memory in the same order.
fn same_memory(op: &Site) -> Decoded<(Memory, Memory)> {
    let (memory, result) = (op.memref(0)?, op.result_memref()?);
    let cells = memory.cells().is_none() || result.cells().is_none() || memory.cells() == result.cells();
    fits(memory.element == result.element && memory.space == result.space && cells)?;
    Ok((memory, result))
}

fn squeeze_memref(op: &Site) -> Decoded<Op> {
    let (memory, result) = same_memory(op)?;
    let mut wanted = result.dims.iter().rev().peekable();
    let mut keep = vec![];
    for (dim, size) in memory.dims.iter().enumerate().rev() {
        if wanted.next_if_eq(&size).is_some() {
            keep.push(dim);
        } else {
            fits(*size == Some(1))?;
        }
    }
    fits(wanted.next().is_none())?;
    keep.reverse();
    Ok(Op::SqueezeRef { keep })
}

fn same_memref(op: &Site) -> Decoded<Op> {
    let (memory, result) = same_memory(op)?;
    fits(memory.may_have_dims_of(&result))?;
    Ok(Op::Same)
}

fn reshape_memref(op: &Site) -> Decoded<Op> {
    let (_, result) = same_memory(op)?;
    fits(result.dims.iter().filter(|size| size.is_none()).count() <= 1)?;
    Ok(Op::ReshapeRef { dims: result.dims })
}

fn bitcast_memref(op: &Site) -> Decoded<Op> {
    let (memory, result) = (op.memref(0)?, op.result_memref()?);
    let (RefElement::Data(from), RefElement::Data(to)) = (memory.element, result.element) else {
        return Err(Refusal::Misfit);
    };
    fits(memory.space == result.space && memory.space != MemorySpace::Smem)?;
    let mut expected = Memory { dims: memory.dims.clone(), ..memory };
    if to.bits() != from.bits() {
        let rows = memory.dims.len().checked_sub(2).ok_or(Refusal::Misfit)?;
        if let Some(rows) = &mut expected.dims[rows] {
            fits((*rows * from.bits()).is_multiple_of(to.bits()))?;
            *rows = *rows * from.bits() / to.bits();
        }
    }
    fits(expected.may_have_dims_of(&result))?;
    Ok(Op::BitcastRef { to })
}

/// The result: a buffer or semaphores of its own.
fn allocate(op: &Site) -> Decoded<Op> {
    let Memory { element, dims, space } = op.result_memref()?;
    let of_semaphores = element.data().is_none();
    fits(of_semaphores == (space == MemorySpace::Semaphore) && of_semaphores == (op.name == "tpu.sem_alloc"))?;
    let Some(dims) = dims.into_iter().collect::<Option<Vec<usize>>>().filter(|dims| !dims.contains(&0)) else {
        return unsupported("a buffer of no size, or of one that is not known");
    };
    let cells = dims.iter().try_fold(1_usize, |cells, &size| cells.checked_mul(size));
    fits(cells.is_some_and(|cells| cells <= 1 << 40))?;
    Ok(Op::Allocate { element, dims, space })
}

fn barrier_semaphore(op: &Site) -> Decoded<Op> {
    let memory = op.result_memref()?;
    fits(memory.element == RefElement::Semaphore && memory.cells() == Some(1))?;
    Ok(Op::BarrierSemaphore)
}

// ---- DMAs and semaphores ----

/// How many operands each of `count` parts of an op has: those that may be left out are there or not. The last is the subcore's,
/// which ops of a TensorCore lack.
fn segments(op: &Site, count: usize) -> Decoded<Vec<usize>> {
    let mut segments = op.sizes("operandSegmentSizes")?;
    fits(segments.len() <= count && segments.len() + 1 >= count && segments.iter().all(|&size| size <= 1))?;
    fits(segments.iter().sum::<usize>() == op.operands.len())?;
    segments.resize(count, 0);
    Ok(segments)
}

/// The device, the core and the subcore that an op goes to: its operands from `at` on, as far as they are there. `memory` is
/// an operand that is theirs.
fn target(op: &Site, at: usize, [device, core, subcore]: [usize; 3], memory: usize) -> Decoded<Target> {
    op.scalars(at, device + core + subcore)?;
    Ok(Target { device: device > 0, core: core > 0, subcore: subcore > 0, of: op.core_of(memory) })
}

/// Operands: source, its semaphore, destination, its semaphore, device, core; of the semaphores the second, and source and
/// destination, are always there.
fn start_dma(op: &Site) -> Decoded<Op> {
    let parts = match op.has("operandSegmentSizes") {
        true => segments(op, 7)?,
        false => vec![1, 0, 1, 1, 0, 0, 0],
    };
    let &[1, own, 1, 1, device, core, subcore] = parts.as_slice() else { return Err(Refusal::Misfit) };
    fits(op.operands.len() == 3 + own + device + core + subcore)?;
    let (source, destination) = (op.memref(0)?, op.memref(1 + own)?);
    fits(source.element == destination.element && source.element.data().is_some())?;
    fits(source.may_have_dims_of(&destination))?;
    op.semaphore(2 + own)?;
    if own == 0 {
        // A DMA within the device has one semaphore.
        return if device + core + subcore == 0 { Ok(Op::StartDma) } else { Err(Refusal::Misfit) };
    }
    op.semaphore(1)?;
    Ok(Op::StartRemoteDma(target(op, 4, [device, core, subcore], 3)?))
}

/// Whether rows of a source are chosen, and not of a destination; both are operands. The chosen ones are of the array that is
/// not in a subcore's own VMEM, or of the larger one.
fn gathers(op: &Site, [source, destination]: [usize; 2]) -> Decoded<bool> {
    let own = |at: usize| Ok(op.memref(at)?.space == MemorySpace::Vmem);
    Ok(match [own(source)?, own(destination)?] {
        [true, false] => false,
        [false, true] => true,
        _ => op.memref(source)?.cells() >= op.memref(destination)?.cells(),
    })
}

/// Operands: source, destination, numbers of rows, semaphore, the number that stands for no row.
fn start_row_dmas(op: &Site) -> Decoded<Op> {
    let [source, destination] = &[op.memref(0)?, op.memref(1)?];
    fits(source.element == destination.element && source.element.data().is_some())?;
    fits(source.dims.len() == destination.dims.len() && source.dims.get(1..) == destination.dims.get(1..))?;
    let numbers = match op.memref(2) {
        Ok(memory) => memory.dims,
        Err(_) => op.tile(2)?.dims.into_iter().map(Some).collect(),
    };
    let gathers = gathers(op, [0, 1])?;
    let rows = if gathers { destination } else { source };
    fits(numbers.len() == 1 && numbers[0] == rows.dims[0])?;
    op.semaphore(3)?;
    op.scalars(4, op.operands.len() - 4)?;
    Ok(Op::StartRowDmas(RowDmas { gathers, adds: op.flag("add") }))
}

/// Operands: semaphore, ..., and what has its bytes.
fn wait_dma(op: &Site, semaphore: usize, bytes_of: usize) -> Decoded<Op> {
    op.semaphore(semaphore)?;
    fits(op.memref(bytes_of)?.element.data().is_some())?;
    Ok(Op::WaitDma { semaphore, bytes_of })
}

/// Operands: those of the DMA. It has arrived, or has left, as `wait_target` says.
fn wait_side(op: &Site) -> Decoded<Op> {
    let &[1, own, 1, arrives, device, core, subcore] = segments(op, 7)?.as_slice() else {
        return Err(Refusal::Misfit);
    };
    fits(op.operands.len() == 2 + own + arrives + device + core + subcore)?;
    match op.flag("wait_target") {
        true if arrives == 1 => wait_dma(op, 2 + own, 1 + own),
        false if own == 1 => wait_dma(op, 1, 0),
        _ => Err(Refusal::Misfit),
    }
}

/// Operands: semaphore, amount, device, core, subcore.
fn signal(op: &Site) -> Decoded<Op> {
    let parts = match op.has("operandSegmentSizes") {
        true => segments(op, 5)?,
        false => vec![1, 1, 0, 0, 0],
    };
    let &[1, 1, device, core, subcore] = parts.as_slice() else { return Err(Refusal::Misfit) };
    fits(op.operands.len() == 2 + device + core + subcore)?;
    op.semaphore(0)?;
    op.scalars(1, 1)?;
    Ok(Op::Signal(target(op, 2, [device, core, subcore], 0)?))
}

/// Operands: what is printed.
fn print(op: &Site) -> Decoded<Op> {
    let formatted = op.has("formatted") && op.text("formatted")? != "false";
    Ok(Op::Print { text: op.string("tag").unwrap_or_default(), formatted })
}

/// Operands: semaphore, amount.
fn wait_semaphore(op: &Site) -> Decoded<Op> {
    op.semaphore(0)?;
    op.scalars(1, 1)?;
    Ok(Op::WaitSemaphore)
}

fn read_semaphore(op: &Site) -> Decoded<Op> {
    op.semaphore(0)?;
    Ok(Op::ReadSemaphore)
}

/// Operands: memref, indices, amount, subcore. The result: what was there.
fn fetch_and_add(op: &Site) -> Decoded<Op> {
    let memory = op.memref(0)?;
    fits(memory.element == RefElement::Data(Element::I32) && memory.space == MemorySpace::Smem)?;
    let rank = memory.dims.len();
    if op.operands.len() != 3 + rank {
        return unsupported("without a subcore");
    }
    op.scalars(1, rank + 2)?;
    fits(op.result()?.element == Element::I32)?;
    Ok(Op::FetchAndAdd)
}

fn assume_multiple(op: &Site) -> Decoded<Op> {
    op.scalars(0, 1)?;
    match i32::try_from(op.integer("multiple")?) {
        Ok(multiple) if multiple > 0 => Ok(Op::AssumeMultiple(multiple)),
        _ => Err(Refusal::Misfit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The documentation has every op once, and names a file of cases that has it.
    #[test]
    fn every_op_is_documented_and_tested() {
        let rows =
            include_str!("ops.md").lines().skip(2).map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
        let mut known: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        for row in rows {
            let [_, op, what, source, file, _] = row.as_slice() else { panic!("{row:?}") };
            let op = op.trim_matches('`');
            let at = known.iter().position(|known| *known == op);
            known.swap_remove(at.unwrap_or_else(|| panic!("`{op}` is not in the table, or twice in ops.md")));
            assert!(!what.is_empty() && !source.is_empty(), "{op}");
            let path = format!("{}/tests/cases/{file}", env!("CARGO_MANIFEST_DIR"));
            let cases = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            // Functions end in `return`.
            assert!(cases.contains(op.trim_start_matches("func.")), "{file} has no {op}");
        }
        assert!(known.is_empty(), "ops.md lacks {known:?}");
    }
}
