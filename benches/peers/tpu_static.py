"""One peer kernel at one choice of tiles, compiled ahead of time for a v5p that need not be there: the child of scripts/peers.py.

  PYTHON tpu_static.py '{"peer": "v2", "shape": {...}, "tiles": [32, 4], "limit": 60}'      limit in MiB of VMEM

libtpu leaves its reports where LIBTPU_INIT_ARGS asks for them; the parent reads them, also when libtpu dies after it has
written them. This file lowers and compiles, and nothing else. It holds no kernel of its own: each peer is called through
its own module, and what is changed in one is said beside the change.

What the cycles of attention depend on (lengths, rows, sequences) is stored into the prefetched scalars at the kernel's
first step, so that the compiler resolves every loop and estimates that batch. Page indices stay run-time values: no loop
depends on them. A launch has as many query rows as the batch: v2 would take a step for each block of rows that nobody has
(decode8 in a launch of 1024 rows: 278844 cycles where 239687 do).
"""
import functools, importlib, json, os, resource, sys, types

import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies

BF16 = jnp.bfloat16
# The model of benches/tpu_static.rs: 32 query and 8 KV heads of 128, pages of 128 tokens, 36 pages for each of 8 sequences.
Q_HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES, SEQUENCES = 32, 8, 128, 128, 36, 8


def xla(shape, tiles, limit):
    m, k, n = shape["m"], shape["k"], shape["n"]
    return jnp.dot, [(m, k), (k, n)]


def pallas(shape, tiles, limit):
    """JAX's matmul; it takes no VMEM limit, so the parent raises the compiler's default."""
    from jax.experimental.pallas.ops.tpu.matmul import matmul

    bm, bn, bk = tiles
    m, k, n = shape["m"], shape["k"], shape["n"]
    return lambda x, y: matmul(x, y, block_shape=(bm, bn), block_k=bk), [(m, k), (k, n)]


def metadata(shape):
    """kv_lens [SEQUENCES], page_indices [SEQUENCES, PAGES] in order, cu_q_lens [SEQUENCES + 1], all int32."""
    sequences, at = shape["sequences"], np.arange(SEQUENCES + 1)
    kv_lens = np.where(at[:-1] < sequences, shape["kv_len"], 0)
    rows = np.minimum(at, sequences) * shape["q_len"]
    pages = np.arange(SEQUENCES * PAGES).reshape(SEQUENCES, PAGES)
    return [array.astype(np.int32) for array in (kv_lens, pages, rows)]


def baked(kernel, constants, grid_dims):
    """`kernel` after stores of constants into its first refs (None: left as they come), at the first step of its grid."""

    def body(*refs, **options):
        first = functools.reduce(jnp.logical_and, [pl.program_id(dim) == 0 for dim in range(grid_dims)])

        @pl.when(first)
        def _():
            for ref, constant in zip(refs, constants):
                for index, value in np.ndenumerate([] if constant is None else constant):
                    ref[index] = jnp.int32(value)

        return kernel(*refs, **options)

    return body


def v2(shape, tiles, limit):
    """JAX's ragged paged attention; tiles are query rows and KV pages of a block."""
    peer = importlib.import_module("jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel")
    queries, pages = tiles
    kv_lens, page_indices, rows = metadata(shape)
    count = np.array([shape["sequences"]], np.int32)
    sequence_and_buffer = np.zeros(2, np.int32)  # as its wrapper starts them
    constants = [kv_lens, None, rows, sequence_and_buffer, count]
    peer.ragged_paged_attention_kernel = baked(peer.ragged_paged_attention_kernel, constants, grid_dims=2)

    def attention(q, kv):
        return peer.ragged_paged_attention(
            q, kv, kv_lens, page_indices, rows, count, sm_scale=HEAD_DIM**-0.5,
            num_queries_per_block=queries, num_kv_pages_per_block=pages, vmem_limit_bytes=limit << 20)

    tokens = shape["sequences"] * shape["q_len"]
    return attention, [(tokens, Q_HEADS, HEAD_DIM), (SEQUENCES * PAGES, PAGE, 2 * KV_HEADS, HEAD_DIM)]


def v3(shape, tiles, limit, f32=False):
    """tpu-inference's ragged paged attention; tiles are query rows and KV tokens fetched, then those computed at a time."""
    folder = os.environ["PAGODA_TPU_INFERENCE"]
    # The package's own __init__ wants vLLM; its kernels do not.
    package = types.ModuleType("tpu_inference")
    package.__path__ = [os.path.join(folder, "tpu_inference")]
    sys.modules["tpu_inference"] = package
    where = "tpu_inference.kernels.ragged_paged_attention.v3"
    # It asks JAX's first device, which here is the CPU.
    importlib.import_module(f"{where}.util").get_tpu_version = lambda: 5
    peer = importlib.import_module(f"{where}.kernel")
    if f32:
        f32_accumulators(peer)

    kv_lens, page_indices, rows = metadata(shape)
    sequences, decode = shape["sequences"], shape["q_len"] == 1
    ends = np.array([sequences * decode, sequences * decode, sequences], np.int32)  # of decode, prefill, mixed
    state = [np.zeros(3, np.int32), np.full(4, -1, np.int32), np.full(6, -1, np.int32)]  # as its wrapper starts it
    kernel = peer._ragged_paged_attention_kernel
    peer._ragged_paged_attention_kernel = baked(kernel, [kv_lens, None, rows, ends, *state], grid_dims=1)

    def attention(q, kv, cache):
        # q, K and V as its kernel takes them. What it does to them before and after are copies of XLA's, which the
        # compiler cannot estimate ("dma-general") and which its figure leaves out.
        peer.prepare_inputs = lambda *_: (q, kv)
        peer.prepare_outputs = lambda out, *_: out
        shapes = [jnp.zeros((kv.shape[0], heads, HEAD_DIM), BF16) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]
        idle = (1, PAGE, 1, PAGE)  # its other launch has no sequence to work on
        return peer.ragged_paged_attention.__wrapped__(
            *shapes, cache, kv_lens, page_indices.ravel(), rows, ends, sm_scale=HEAD_DIM**-0.5,
            d_block_sizes=tuple(tiles) if decode else idle, m_block_sizes=idle if decode else tuple(tiles),
            vmem_limit_bytes=limit << 20, out_dtype=jnp.float32 if f32 else None)

    tokens = sequences * shape["q_len"]
    cache = peer.get_kv_cache_shape(SEQUENCES * PAGES, PAGE, KV_HEADS, HEAD_DIM, BF16)
    return attention, [(KV_HEADS, tokens, Q_HEADS // KV_HEADS // 2, 2, HEAD_DIM), (tokens, KV_HEADS, 2, HEAD_DIM), cache]


def f32_accumulators(peer):
    """v3 whose max, sum and accumulator are f32, as those of its output's type are, with its own approximate reciprocal."""
    with open(peer.__file__) as file:
        source = file.read()
    for old, new in [("lax.div(acc, l)).astype(out_dtype)", "lax.div(acc, l)).astype(q_dtype)"),
                     ("(l.dtype == jnp.float32 and out_dtype != jnp.float32)", "l.dtype == jnp.float32")]:
        if source.count(old) != 1:
            sys.exit(f"tpu-inference's v3 kernel has `{old}` {source.count(old)} times, not once: use commit b8692ff")
        source = source.replace(old, new)
    exec(compile(source, peer.__file__, "exec"), peer.__dict__)


PEERS = {"xla": xla, "pallas": pallas, "v2": v2, "v3": v3, "v3_f32": functools.partial(v3, f32=True)}


def main():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))  # a dying libtpu can fill the disk
    point = json.loads(sys.argv[1])
    device = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("device",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # Under the mesh, Pallas lowers for the mesh's device.
    with jax.sharding.set_mesh(mesh):
        function, shapes = PEERS[point["peer"]](point["shape"], point["tiles"], point["limit"])
        arguments = [jax.ShapeDtypeStruct(shape, BF16, sharding=place) for shape in shapes]
        # v3 writes into q and the cache.
        donated = (0, 2) if len(shapes) == 3 else ()
        jax.jit(function, donate_argnums=donated).lower(*arguments).compile()


if __name__ == "__main__":
    main()
