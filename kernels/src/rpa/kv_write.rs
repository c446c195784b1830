//! Writes new keys and values into the paged cache, in place where the buffer is donated or carried by a loop.
//!
//! One scatter of whole token rows (`[2 * kv_heads, head_dim]`, contiguous in a page). On XLA's CPU it costs 2 us for 8
//! rows and 5 us for 64, whatever the cache's size; a chain of `dynamic_update_slice` copies the cache per row. A scatter of
//! *one* row is rewritten by that compiler into such an update, and copies the cache too (21 ms for 64 MiB), so a single
//! row travels with a row of padding.

use pagoda_ir::{
    Context, Element, Result, TensorType,
    stablehlo::{Builder, Direction, Module, ScatterDims, Tensor},
};

use super::problem::Problem;

/// The KV buffer with `k` and `v` (each `[tokens, kv_heads, head_dim]`) written at `slots` (`i32[tokens]`, `page *
/// page_size + offset` within the layer). Rows with a slot outside the layer (-1 for padding) write nothing; two rows
/// with the same slot leave one of them there. `first_page` (`i32[]`) is where the layer's pages begin in the buffer.
///
/// # Errors
/// When an operand does not have the problem's type.
pub fn emit<'c, 'a>(
    b: &Builder<'c, 'a>,
    problem: &Problem,
    kv_pages: Tensor<'c, 'a>,
    k: Tensor<'c, 'a>,
    v: Tensor<'c, 'a>,
    slots: Tensor<'c, 'a>,
    first_page: Option<Tensor<'c, 'a>>,
) -> Result<Tensor<'c, 'a>> {
    let (tokens, heads, dim) = (problem.tokens, problem.kv_heads, problem.head_dim);
    let buffer = problem.kv_pages_type();
    let halves = [tokens, heads, 1, dim];
    let rows = b.concatenate(&[b.reshape(k, &halves)?, b.reshape(v, &halves)?], 2)?;
    let rows = b.reshape(rows, &[tokens, 2 * heads, dim])?;
    let by_token = b.reshape(kv_pages, &[buffer.dims[0] * problem.page_size, 2 * heads, dim])?;

    let ints = |value: usize| b.splat(Element::I32, &[tokens], value as f64);
    let in_layer = b.and(
        b.compare(slots, Direction::Ge, ints(0)?)?,
        b.compare(slots, Direction::Lt, ints(problem.pages * problem.page_size)?)?,
    )?;
    let shifted = match first_page {
        Some(page) => {
            let first_slot = b.multiply(page, b.scalar(Element::I32, problem.page_size as f64)?)?;
            b.add(slots, b.broadcast_to(first_slot, &[tokens])?)?
        }
        None => slots,
    };
    // A slot beyond the buffer: the scatter skips it.
    let nowhere = ints(buffer.dims[0] * problem.page_size)?;
    let mut slots = b.select(in_layer, shifted, nowhere)?;
    let mut rows = rows;
    if tokens == 1 {
        slots = b.concatenate(&[slots, nowhere], 0)?;
        rows = b.concatenate(&[rows, rows], 0)?;
    }
    let dims = ScatterDims {
        update_window_dims: &[1, 2],
        inserted_window_dims: &[0],
        scatter_dims_to_operand_dims: &[0],
        index_vector_dim: 1,
        ..ScatterDims::default()
    };
    let written = b.scatter(by_token, slots, rows, dims, |_, _, new| Ok(new))?;
    b.reshape(written, &buffer.dims)
}

/// A module whose `main` takes the KV buffer (donated), `k`, `v`, `slots` and, with several layers, `first_page`.
///
/// # Errors
/// None for a valid problem, unless MLIR fails.
pub fn module<'c>(context: &'c Context, problem: &Problem) -> Result<Module<'c>> {
    let mut types = vec![
        problem.kv_pages_type(),
        problem.new_kv_type(),
        problem.new_kv_type(),
        TensorType::new(Element::I32, &[problem.tokens]),
    ];
    if problem.layers > 1 {
        types.push(TensorType::scalar(Element::I32));
    }
    let module = Module::new(context, "kv_write");
    module.function("main", &types, |b, args| {
        Ok(vec![emit(b, problem, args[0], args[1], args[2], args[3], args.get(4).copied())?])
    })?;
    module.donate("main", 0, 0)?;
    Ok(module)
}
