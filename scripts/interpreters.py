#!/usr/bin/env python3
"""Times kernels on the tile machine beside JAX's two interpreters of Pallas kernels.

    scripts/interpreters.py [--only GLOB] [--repeat N]

needs a Python with jax 0.10.2, and `cargo build --release -p pagoda-ir --example call`. For each kernel it prints, in milliseconds,
the median of N runs (after the first, which traces and compiles): of the tile machine's `Program::run`; of JAX's TPU interpreter
(`pltpu.InterpretParams()`), which models memories and DMAs too; and of its generic interpreter (`interpret=True`), which XLA compiles
to plain loops and which models neither. Then how far the results are apart.
"""

import argparse
import contextlib
import fnmatch
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CALL = os.environ.get("PAGODA_CALL", str(ROOT / "target/release/examples/call"))

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
import numpy as np
from jax._src import tpu_custom_call
from jax._src.interpreters import mlir
from jax._src.pallas import pallas_call
from jax._src.pallas.mosaic import pallas_call_registration
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

KERNELS = {}


def kernel(name):
    def add(make):
        KERNELS[name] = make
        return make

    return add


def draw(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), dtype)


def matmul(size, block, block_k):
    from jax.experimental.pallas.ops.tpu.matmul import matmul

    fn = functools.partial(matmul, block_shape=(block, block), block_k=block_k)
    return fn, [draw(size, size, dtype=jnp.bfloat16, seed=seed) for seed in (1, 2)]


@kernel("matmul 512^3 bf16, 64 steps")
def _():
    return matmul(512, 128, 128)


@kernel("matmul 1024^3 bf16, 64 steps")
def _():
    return matmul(1024, 256, 256)


def flash(length, dtype=jnp.bfloat16):
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    return functools.partial(flash_attention, causal=True), [draw(1, 2, length, 128, dtype=dtype, seed=seed) for seed in (1, 2, 3)]


@kernel("flash attention 1x2x256x128 bf16")
def _():
    return flash(256)


@kernel("flash attention 1x2x512x128 bf16")
def _():
    return flash(512)


@kernel("paged attention, 4 sequences")
def _():
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    pages = [draw(2, 32, 16, 128, seed=seed) for seed in (1, 2)]
    lengths = jnp.asarray([3, 40, 77, 128], jnp.int32)
    table = jnp.asarray(np.random.default_rng(0).permutation(32).reshape(4, 8), jnp.int32)
    fn = functools.partial(paged_attention, pages_per_compute_block=4)
    return fn, [draw(4, 8, 128), *pages, lengths, table]


@kernel("stream of 64 DMAs")
def _():
    def body(x_ref, o_ref, buffer, sems):
        def copy(i):
            rows = pl.ds(pl.multiple_of(8 * i, 8), 8)
            return pltpu.make_async_copy(x_ref.at[rows], buffer.at[i % 2], sems.at[i % 2])

        o_ref[...] = jnp.zeros_like(o_ref)
        copy(0).start()

        def turn(i, _):
            @pl.when(i < 63)
            def _():
                copy(i + 1).start()

            copy(i).wait()
            o_ref[...] += buffer[i % 2]
            return 0

        jax.lax.fori_loop(0, 64, turn, 0)

    call = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
        scratch_shapes=[pltpu.VMEM((2, 8, 128), jnp.float32), pltpu.SemaphoreType.DMA((2,))],
    )
    return call, [draw(512, 128)]


@kernel("vadd, 64 steps")
def _():
    def body(x_ref, y_ref, o_ref):
        o_ref[...] = x_ref[...] + y_ref[...]

    block = pl.BlockSpec((8, 512), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    call = pl.pallas_call(body, out_shape=shape, grid=(64,), in_specs=[block, block], out_specs=block)
    return call, [draw(512, 512), draw(512, 512, seed=1)]


@kernel("threefry 256x1024")
def _():
    from jax.experimental.pallas.ops.tpu.random import threefry

    fn = functools.partial(threefry.threefry_2x32_count, shape=(256, 1024), unpadded_shape=(256, 1024), block_size=(256, 256))
    return fn, [jnp.asarray([1, 2], jnp.uint32)]


@kernel("gelu 1024x1024, 16 steps")
def _():
    def body(x_ref, o_ref):
        o_ref[...] = jax.nn.gelu(x_ref[...])

    block = pl.BlockSpec((64, 1024), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    return pl.pallas_call(body, out_shape=shape, grid=(16,), in_specs=[block], out_specs=block), [draw(1024, 1024)]


@kernel("softmax of rows 1024x1024 f32, 8 steps")
def _():
    def body(x_ref, o_ref):
        x = x_ref[...]
        exp = jnp.exp(x - x.max(axis=1, keepdims=True))
        o_ref[...] = exp / exp.sum(axis=1, keepdims=True)

    block = pl.BlockSpec((128, 1024), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    return pl.pallas_call(body, out_shape=shape, grid=(8,), in_specs=[block], out_specs=block), [draw(1024, 1024)]


@kernel("flash attention 1x8x2048x128 bf16")
def _():
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    return functools.partial(flash_attention, causal=True), [draw(1, 8, 2048, 128, dtype=jnp.bfloat16, seed=seed) for seed in (1, 2, 3)]


@kernel("matmul 512^3 int8, 64 steps")
def _():
    from jax.experimental.pallas.ops.tpu.matmul import matmul

    x, y = (jnp.asarray(np.random.default_rng(seed).integers(-128, 128, (512, 512)), jnp.int8) for seed in (1, 2))
    return functools.partial(matmul, block_shape=(128, 128), block_k=128, out_dtype=jnp.int32), [x, y]


# ---- how they are run ----

NAMES = {np.dtype(x).name: y for x, y in [("float32", "f32"), ("int32", "i32"), ("uint32", "u32"), ("int8", "i8"), ("bool", "pred")]}
NAMES["bfloat16"] = "bf16"
mode, calls = None, []
default = pallas_call._pallas_call_lowering


def rule(ctx, *nodes, interpret, **params):
    if mode != "tile machine":
        return default(ctx, *nodes, interpret=interpret if mode == "TPU" else True, **params)
    return pallas_call_registration.pallas_call_tpu_lowering_rule(ctx, *nodes, interpret=False, **params)


def custom_call(ctx, *nodes, config, input_output_aliases, **_):
    """Runs the call's kernel on the tile machine, and keeps its folder."""
    text = config.to_json()
    of_type = lambda aval: [NAMES[np.dtype(aval.dtype).name], list(aval.shape)]
    call = {
        "operands": [of_type(aval) for aval in ctx.avals_in],
        "results": [of_type(aval) for aval in ctx.avals_out],
        "aliases": [list(pair) for pair in input_output_aliases],
        "repeat": arguments.repeat,
    }
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ctx.avals_out]

    def run(*operands):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            (folder / "config.json").write_text(text.decode() if isinstance(text, bytes) else text)
            (folder / "call.json").write_text(json.dumps(call))
            (folder / "operands.bin").write_bytes(b"".join(np.ascontiguousarray(x).tobytes() for x in operands))
            report = json.loads(subprocess.run([CALL, folder], capture_output=True, check=True, text=True).stdout)
            if report["got"] != "ran":
                raise RuntimeError(f"the tile machine: {report}")
            calls.append(report.get("times") or [report["seconds"]])
            data, results = (folder / "results.bin").read_bytes(), []
            for shape in shapes:
                size = int(np.prod(shape.shape)) * np.dtype(shape.dtype).itemsize
                results.append(np.frombuffer(data[:size], shape.dtype).reshape(shape.shape))
                data = data[size:]
            return results

    return mlir.lower_fun(lambda *operands: jax.pure_callback(run, shapes, *operands), multiple_results=True)(ctx, *nodes)


def timed(fn, args, repeat):
    """The result, and the median time of runs after the first."""
    jitted = jax.jit(lambda *args: fn(*args))
    result = jax.block_until_ready(jitted(*args))
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        jax.block_until_ready(jitted(*args))
        times.append(time.perf_counter() - began)
    return jax.tree.leaves(result), statistics.median(times)


def measure(name):
    global mode
    outcome = {}
    for mode in ["tile machine", "TPU", "generic"]:
        jax.clear_caches()
        calls.clear()
        interpreted = pltpu.force_tpu_interpret_mode() if mode == "TPU" else contextlib.nullcontext()
        try:
            with interpreted:
                fn, args = KERNELS[name]()
                # Of the tile machine, the runs are counted that `call` repeats.
                result, seconds = timed(fn, args, 1 if mode == "tile machine" else arguments.repeat)
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            outcome[mode] = (None, None, f"{type(error).__name__} {said}"[:90])
            continue
        if mode == "tile machine":
            seconds = sum(statistics.median(times) for times in calls[: len(calls) // 2])
        outcome[mode] = (seconds, result, None)
    ours, result, error = outcome["tile machine"]
    if error:
        return f"| {name} | {error} | | | | | |"
    cells, apart = [name, f"{1e3 * ours:.2f}"], 0.0
    for label in ("TPU", "generic"):
        seconds, other, error = outcome[label]
        cells += [error or f"{1e3 * seconds:.2f}", "" if error else f"{seconds / ours:.1f}"]
        if not error:
            differences = [np.abs(np.float64(x) - np.float64(y)).max() for x, y in zip(result, other)]
            apart = max(apart, *differences)
    return "| " + " | ".join([*cells, f"{apart:.1e}"]) + " |"


def main():
    tpu_custom_call._tpu_custom_call_lowering = custom_call
    mlir.register_lowering(pallas_call.pallas_call_p, rule, platform="cpu")
    print("| kernel | tile machine, ms | TPU interpreter | ratio | generic interpreter | ratio | apart |")
    print("|---|---|---|---|---|---|---|")
    for name in KERNELS:
        if fnmatch.fnmatch(name, arguments.only):
            print(measure(name), flush=True)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", default="*", metavar="GLOB")
parser.add_argument("--repeat", type=int, default=7, metavar="N")
arguments = parser.parse_args()

if __name__ == "__main__":
    sys.exit(main())
