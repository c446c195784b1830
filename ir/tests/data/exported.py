"""Writes exported.mlir and exported.bc: a program around a Pallas kernel, exported for TPU by JAX 0.10.2, as text and bytecode.
exported_0_12.bc is what JAX 0.12.0.1 writes as exported.bc.

Run in this folder; no TPU is needed. So that the modules name no path of a machine:

    python -c "exec(compile(open('exported.py').read(), 'ir/tests/data/exported.py', 'exec'), {'__name__': '__main__'})"
"""

import jax
import jax.export
import jax.numpy as jnp
from jax.experimental import pallas as pl


def kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...] * x_ref[...]


def program(x, y):
    z = x * 2 + y
    square = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), input_output_aliases={0: 0}
    )(z)
    return {"a": jnp.sum(square), "b": square}


if __name__ == "__main__":
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    exported = jax.export.export(jax.jit(program), platforms=["tpu"])(shape, shape)
    with open("exported.mlir", "w") as file:
        file.write(str(exported.mlir_module()))
    with open("exported.bc", "wb") as file:
        file.write(exported.mlir_module_serialized)
