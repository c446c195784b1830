"""Writes scaled_sums.mlir: a Pallas kernel with double-buffered copies of its own, lowered for TPU by JAX 0.10.2.

Run in this folder: `python scaled_sums.py`; JAX 0.12 writes scaled_sums_0_12.mlir, whose locations are apart. No TPU is needed.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def kernel(counts, x_hbm, out, buffers, semaphores):
    def copy(i, slot):
        return pltpu.make_async_copy(x_hbm.at[pl.ds(i * 8, 8)], buffers.at[slot], semaphores.at[slot])

    n = counts[0]
    copy(0, 0).start()

    def body(i, total):
        slot = jax.lax.rem(i, 2)

        @pl.when(i + 1 < n)
        def _():
            copy(i + 1, 1 - slot).start()

        copy(i, slot).wait()
        tile = buffers[slot]
        return total + jnp.where(tile > 0, tile, 0.5 * tile)

    total = jax.lax.fori_loop(0, n, body, jnp.zeros((8, 128), jnp.float32))
    out[...] = total * counts[1].astype(jnp.float32)


def scaled_sums(counts, x):
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec((8, 128), lambda i, counts: (0, 0)),
            scratch_shapes=[pltpu.VMEM((2, 8, 128), jnp.float32), pltpu.SemaphoreType.DMA((2,))],
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=8 << 20),
        name="scaled_sums",
    )(counts, x)


if __name__ == "__main__":
    shapes = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((64, 128), jnp.float32)
    lowered = jax.jit(scaled_sums).trace(*shapes).lower(lowering_platforms=("tpu",))
    with open("scaled_sums_0_12.mlir" if jax.__version__.startswith("0.12.") else "scaled_sums.mlir", "w") as file:
        file.write(lowered.as_text())
