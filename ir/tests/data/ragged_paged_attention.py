"""Writes ragged_paged_attention.mlir: JAX's own ragged paged attention kernel, lowered for TPU v5p by JAX 0.10.2.

Run in this folder: `JAX_PLATFORMS=cpu python ragged_paged_attention.py`. No TPU is needed: JAX is told that there is one.
"""

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic import tpu_info
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM = 24, 8, 2, 128
PAGES, PAGE_SIZE, MAX_SEQS, PAGES_PER_SEQ = 16, 16, 4, 4


def attention(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs):
    return ragged_paged_attention(
        q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs,
        sm_scale=HEAD_DIM**-0.5, num_kv_pages_per_block=2, num_queries_per_block=8,
    )


if __name__ == "__main__":
    tpu_info.get_device_kind = lambda: "TPU v5p"
    tpu_info.get_num_device_cores = lambda: 2
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")
    shapes = [
        jax.ShapeDtypeStruct((TOKENS, Q_HEADS, HEAD_DIM), jnp.bfloat16),
        jax.ShapeDtypeStruct((PAGES, PAGE_SIZE, 2 * KV_HEADS, HEAD_DIM), jnp.bfloat16),
        jax.ShapeDtypeStruct((MAX_SEQS,), jnp.int32),
        jax.ShapeDtypeStruct((MAX_SEQS, PAGES_PER_SEQ), jnp.int32),
        jax.ShapeDtypeStruct((MAX_SEQS + 1,), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    ]
    lowered = jax.jit(attention).trace(*shapes).lower(lowering_platforms=("tpu",))
    with open("ragged_paged_attention.mlir", "w") as file:
        file.write(lowered.as_text())
