//! Writes new keys and values into the paged cache, in place where the buffer is donated or carried by a loop.
//!
//! One scatter of whole tokens (all rows of one, contiguous in a page). On XLA's CPU it costs 2 us for 8
//! rows and 5 us for 64, whatever the cache's size; a chain of `dynamic_update_slice` copies the cache per row. A scatter of
//! *one* row is rewritten by that compiler into such an update, and copies the cache too (21 ms for 64 MiB), so a single
//! row travels with a row of padding.

use pagoda_ir::{
    Context, Element, HostTensor, Result, TensorType,
    stablehlo::{Builder, Direction, Module, ScatterDims, Tensor},
};

use super::{batch::Batch, problem::Problem, reference};
use crate::{
    check::{CheckError, Runner, check_module},
    named::{Argument, Arguments, Arrays, Named},
};

/// The KV buffer (donated), `k`, `v` (`[tokens, kv_heads, head_dim]` each), `slots` (`i32[tokens]`, as
/// [`KvLayout`](super::KvLayout) counts them), and with several layers `first_page`.
pub fn arguments(problem: &Problem) -> Arguments {
    Arguments::new([
        Argument::donated("kv_pages", problem.kv_pages_type(), 0),
        Argument::input("k", problem.new_kv_type()),
        Argument::input("v", problem.new_kv_type()),
        Argument::input("slots", TensorType::new(Element::I32, &[problem.tokens])),
        Argument::input("first_page", TensorType::scalar(Element::I32)).when(problem.layers > 1),
    ])
}

/// The KV buffer with `k` and `v` written at `slots`; `args` are those of [`arguments`]. Rows with a slot outside the layer
/// (-1 for padding) write nothing; two rows with the same slot leave one of them there.
///
/// # Errors
/// When an operand does not have the problem's type.
pub fn emit<'c, 'a>(b: &Builder<'c, 'a>, problem: &Problem, args: &Named<Tensor<'c, 'a>>) -> Result<Tensor<'c, 'a>> {
    let (tokens, layout) = (problem.tokens, problem.kv_layout());
    let (kv_pages, slots) = (args["kv_pages"], args["slots"]);
    let buffer = layout.buffer_type();
    let rows = layout.tokens(b, args["k"], args["v"])?;
    let [token_rows, width] = layout.token_dims();
    let by_token = b.reshape(kv_pages, &[buffer.dims[0] * problem.page_size, token_rows, width])?;

    let ints = |value: usize| b.splat(Element::I32, &[tokens], value as f64);
    let in_layer =
        b.and(b.compare(slots, Direction::Ge, ints(0)?)?, b.compare(slots, Direction::Lt, ints(layout.slots())?)?)?;
    let shifted = match args.get("first_page") {
        Some(&page) => {
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

/// A module whose `main` takes [`arguments`], the KV buffer donated.
///
/// # Errors
/// None for a valid problem, unless MLIR fails.
pub fn module<'c>(context: &'c Context, problem: &Problem) -> Result<Module<'c>> {
    let arguments = arguments(problem);
    let module = Module::new(context, "kv_write");
    module.function("main", &arguments.types(), |b, args| {
        Ok(vec![emit(b, problem, &arguments.name(args.iter().copied()))?])
    })?;
    module.donate("main", 0, 0)?;
    Ok(module)
}

/// Writes `k` and `v` of the batch's rows through `runner`, and compares the whole buffer: what is not written stays as it
/// was, NaN included.
///
/// # Errors
/// As [`crate::check()`].
///
/// # Panics
/// When the metadata among `inputs` is not a batch of the problem.
pub fn check(
    problem: &Problem,
    inputs: &Arrays,
    [k, v]: [&HostTensor; 2],
    runner: &dyn Runner,
) -> std::result::Result<(), CheckError> {
    let slots = Batch::of(problem, inputs).expect("a batch of the problem").kv_slots(problem.tokens);
    let slots = HostTensor::new(&[problem.tokens], &slots);
    let first_page = inputs.get("first_page");
    let arrays: Vec<_> = [&inputs["kv_pages"], k, v, &slots].into_iter().chain(first_page).cloned().collect();
    let results = [("kv_pages", problem.kv_pages_type())].into_iter().collect();
    let context = Context::new();
    let expected = [reference::written(problem, inputs, k, v)];
    check_module(&module(&context, problem)?, &arrays, &results, &expected, runner)
}
