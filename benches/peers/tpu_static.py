"""Peer kernels at choices of tiles, compiled ahead of time for a TPU that need not be there: the child of scripts/peers.py.

  PYTHON tpu_static.py '{"chip": "v5p", "points": [{"peer": "v2", "shape": {...}, "tiles": [32, 4], "limit": 60}]}'

The limit is in MiB of VMEM. libtpu leaves its reports in the folder that LIBTPU_INIT_ARGS names; those of point N are
moved to done/N, and what it refused is written to done/N/error. The parent reads them, also when libtpu dies after it has
written them. This file lowers and compiles, and nothing else. It holds no kernel of its own: each peer is called through
its own module, and what is changed in one is said beside the change.

What the cycles of attention depend on (lengths, rows, sequences) is stored into the prefetched scalars at the kernel's
first step, so that the compiler resolves every loop and estimates that batch. Page indices stay run-time values: no loop
depends on them. A launch has as many query rows as the batch: v2 would take a step for each block of rows that nobody has
(decode8 in a launch of 1024 rows: 278844 cycles where 239687 do).
"""
import functools, importlib, json, os, resource, shutil, sys, traceback, types

import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

BF16 = jnp.bfloat16
TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CHIP = json.loads(sys.argv[1])["chip"]


class Model:
    """What attention works on: sizes of a `shape`, which are those of benches/tpu_static.rs where it does not say."""

    def __init__(self, shape):
        equal = [[shape.get("q_len"), shape.get("kv_len")]] * shape.get("sequences", 0)
        self.lengths = shape.get("lengths", equal)  # [q_len, kv_len] of each sequence, decode rows first
        self.q_heads, self.kv_heads = shape.get("q_heads", 32), shape.get("kv_heads", 8)
        self.head_dim, self.page = shape.get("head_dim", 128), shape.get("page_size", 128)
        self.sequences = shape.get("max_seqs", 8)
        self.pages = shape.get("pages_per_seq", 36)
        self.tokens = shape.get("tokens") or sum(q_len for q_len, _ in self.lengths)
        self.decode = sum(q_len == 1 for q_len, _ in self.lengths)

    def metadata(self):
        """kv_lens [sequences], page_indices [sequences, pages] in order, cu_q_lens [sequences + 1], all int32."""
        idle = self.sequences - len(self.lengths)
        kv_lens = [kv_len for _, kv_len in self.lengths] + [0] * idle
        rows = np.cumsum([0] + [q_len for q_len, _ in self.lengths] + [0] * idle)
        pages = np.arange(self.sequences * self.pages).reshape(self.sequences, self.pages)
        return [np.array(array, np.int32) for array in (kv_lens, pages, rows)]


def xla(shape, tiles, limit):
    m, k, n = shape["m"], shape["k"], shape["n"]
    return jnp.dot, [(m, k), (k, n)]


def pallas(shape, tiles, limit):
    """JAX's matmul; it takes no VMEM limit, so the parent raises the compiler's default."""
    from jax.experimental.pallas.ops.tpu.matmul import matmul

    bm, bn, bk = tiles
    m, k, n = shape["m"], shape["k"], shape["n"]
    return lambda x, y: matmul(x, y, block_shape=(bm, bn), block_k=bk), [(m, k), (k, n)]


@jax.tree_util.register_pytree_node_class
class Known:
    """A prefetched array of known numbers, of which a kernel's index maps know all: read from scalar memory, the compiler takes
    a block for the same as the last one, and leaves its copy out of the estimate."""

    def __init__(self, numbers):
        self.numbers = tuple(int(number) for number in numbers)

    def tree_flatten(self):
        return (), self.numbers

    @classmethod
    def tree_unflatten(cls, numbers, _):
        return cls(numbers)

    @property
    def size(self):
        return len(self.numbers)

    def __getitem__(self, index):
        for shift in range(8):
            if all(number == at >> shift for at, number in enumerate(self.numbers)):
                return jax.lax.shift_right_logical(index, jnp.int32(shift)) if shift else index
        steps = {later - number for number, later in zip(self.numbers, self.numbers[1:])}
        if len(steps) == 1:
            return self.numbers[0] + index * steps.pop()
        value = jnp.int32(self.numbers[0])
        for at in range(1, len(self.numbers)):
            if self.numbers[at] != self.numbers[at - 1]:
                value = jnp.where(index >= at, jnp.int32(self.numbers[at]), value)
        return value


def gmm(shape, tiles, limit):
    """JAX's grouped matmul (megablox), bf16 throughout; tiles are of m, k and n. Its list of work is made of the groups' sizes
    here, so that its grid has as many steps as they need, and is known to its index maps. It takes no VMEM limit, as `pallas`."""
    # The package has a function of the module's name.
    peer = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    sizes = np.array(shape["sizes"], np.int32)
    m, k, n = shape["m"], shape["k"], shape["n"]
    with jax.sharding.set_mesh(jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("device",))):
        metadata, count = peer.make_group_metadata(
            group_sizes=jnp.array(sizes), m=m, tm=tiles[0], start_group=jnp.int32(0), num_nonzero_groups=len(sizes),
            visit_empty_groups=False)
        offsets, groups, rows = [np.asarray(array) for array in metadata]
        count = int(count)
    original = peer.make_group_metadata
    peer.make_group_metadata = lambda **_: ((Known(offsets), Known(groups[:count]), Known(rows[:count])), count)
    transposed = shape.get("transposed", False)

    def gmm(x, w):
        result = peer.gmm.__wrapped__(x, w, jnp.array(sizes), preferred_element_type=BF16, tiling=tuple(tiles),
                                      transpose_rhs=transposed)
        peer.make_group_metadata = original
        return result

    return gmm, [(m, k), (len(sizes), n, k) if transposed else (len(sizes), k, n)]


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
    model = Model(shape)
    kv_lens, page_indices, rows = model.metadata()
    count = np.array([len(model.lengths)], np.int32)
    sequence_and_buffer = np.zeros(2, np.int32)  # as its wrapper starts them
    constants = [kv_lens, None, rows, sequence_and_buffer, count]
    peer.ragged_paged_attention_kernel = baked(peer.ragged_paged_attention_kernel, constants, grid_dims=2)

    def attention(q, kv):
        return peer.ragged_paged_attention(
            q, kv, kv_lens, page_indices, rows, count, sm_scale=model.head_dim**-0.5,
            num_queries_per_block=queries, num_kv_pages_per_block=pages, vmem_limit_bytes=limit << 20)

    cache = (model.sequences * model.pages, model.page, 2 * model.kv_heads, model.head_dim)
    return attention, [(model.tokens, model.q_heads, model.head_dim), cache]


WHERE = "tpu_inference.kernels.ragged_paged_attention.v3"


def tpu_inference(module):
    """A fresh copy of a module of v3: kernels are changed in place."""
    # The package's own __init__ wants vLLM; its kernels do not.
    package = types.ModuleType("tpu_inference")
    package.__path__ = [os.path.join(os.environ["PAGODA_TPU_INFERENCE"], "tpu_inference")]
    sys.modules["tpu_inference"] = package
    # The tables of tuned tiles, which are not asked, import vLLM's logger and a device's name.
    for name, needs in [("logger", "init_logger"), ("utils", "get_device_name")]:
        stub = types.ModuleType(f"tpu_inference.{name}")
        setattr(stub, needs, lambda *_: None)
        sys.modules[stub.__name__] = stub
    # It asks JAX's first device, which here is the CPU.
    importlib.import_module(f"{WHERE}.util").get_tpu_version = lambda: int(CHIP[1])
    sys.modules.pop(f"{WHERE}.{module}", None)
    return importlib.import_module(f"{WHERE}.{module}")


# As its wrappers start them: semaphores, blocks of the output and of the KV that are on their way.
STATE = [np.zeros(3, np.int32), np.full(4, -1, np.int32), np.full(6, -1, np.int32)]


def v3(shape, tiles, limit, f32=False):
    """tpu-inference's ragged paged attention; tiles are query rows and KV tokens fetched, then those computed at a time,
    of the one launch that has work, or {"decode": ..., "mixed": ...}."""
    peer = tpu_inference("kernel")
    if f32:
        f32_accumulators(peer)
    model = Model(shape)
    kv_lens, page_indices, rows = model.metadata()
    ends = np.array([model.decode, model.decode, len(model.lengths)], np.int32)  # of decode, prefill, mixed
    kernel = peer._ragged_paged_attention_kernel
    peer._ragged_paged_attention_kernel = baked(kernel, [kv_lens, None, rows, ends, *STATE], grid_dims=1)
    idle = (1, model.page, 1, model.page)  # a launch that has no sequence to work on
    if not isinstance(tiles, dict):
        tiles = {"decode" if model.decode else "mixed": tiles}
    heads, group, dim = model.kv_heads, even(model.q_heads // model.kv_heads), lanes(model.head_dim)

    def attention(q, kv, cache):
        # q, K and V as its kernel takes them. What it does to them before and after are copies of XLA's: see `around`.
        peer.prepare_inputs = lambda *_: (q, kv)
        peer.prepare_outputs = lambda out, *_: out
        kinds = (model.q_heads, heads, heads)
        shapes = [jnp.zeros((model.tokens, heads, model.head_dim), BF16) for heads in kinds]
        return peer.ragged_paged_attention.__wrapped__(
            *shapes, cache, kv_lens, page_indices.ravel(), rows, ends, sm_scale=model.head_dim**-0.5,
            d_block_sizes=tuple(tiles.get("decode") or idle), m_block_sizes=tuple(tiles.get("mixed") or idle),
            vmem_limit_bytes=limit << 20, out_dtype=jnp.float32 if f32 else None)

    cache = peer.get_kv_cache_shape(model.sequences * model.pages, model.page, heads, model.head_dim, BF16)
    kv = (model.tokens, even(2 * heads) // 2, 2, dim)
    return attention, [(heads, model.tokens, group // 2, 2, dim), kv, cache]


def v3_hd64(shape, tiles, limit):
    """Its form for heads of 64, whose accumulators are f32; tiles are query rows and KV tokens of a block."""
    peer = tpu_inference("kernel_hd64")
    model = Model(shape)
    kv_lens, page_indices, rows = model.metadata()

    class Pltpu:
        """Its grid is a value of the program; here a number, so that the estimate knows it."""

        def __getattr__(self, name):
            return getattr(pltpu, name)

        def PrefetchScalarGridSpec(self, *, grid, **options):
            return pltpu.PrefetchScalarGridSpec(grid=(len(model.lengths),), **options)

    peer.pltpu = Pltpu()
    ends = np.array([model.decode, model.decode, len(model.lengths)], np.int32)
    kernel = peer._ragged_paged_attention_kernel
    peer._ragged_paged_attention_kernel = baked(kernel, [kv_lens, None, rows, ends, *STATE], grid_dims=1)
    heads, group = model.kv_heads, even(model.q_heads // model.kv_heads)

    def attention(q, kv, cache):
        peer.prepare_inputs = lambda *_: (q, kv, None)
        peer.prepare_outputs = lambda out, *_: out
        kinds = (model.q_heads, heads, heads)
        shapes = [jnp.zeros((model.tokens, heads, model.head_dim), BF16) for heads in kinds]
        return peer.ragged_paged_attention_hd64.__wrapped__(
            *shapes, cache, kv_lens, page_indices.ravel(), rows, ends, sm_scale=model.head_dim**-0.5,
            num_queries_per_block=tiles[0], num_kv_pages_per_block=tiles[1] // model.page,
            vmem_limit_bytes=limit << 20)

    cache = peer.get_kv_cache_shape(model.sequences * model.pages, model.page, heads, model.head_dim, BF16)
    return attention, [(heads, model.tokens, group // 2, 2, 128), (model.tokens, even(heads) // 2, 2, 128), cache]


def before(shape, tiles, limit):
    """What stands between the projections' outputs and v3's kernel: rotary embedding, and its own copies."""
    model = Model(shape)
    peer = tpu_inference("kernel_hd64" if model.head_dim == 64 else "kernel")

    def function(qkv, cos_sin):
        ends = np.cumsum([model.q_heads, model.kv_heads]) * model.head_dim
        q, k, v = [x.reshape(model.tokens, -1, model.head_dim) for x in jnp.split(qkv, ends, axis=1)]
        cos, sin = jnp.split(cos_sin[:, None, :], 2, axis=-1)

        def rotate(x):
            low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
            return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(BF16)

        return peer.prepare_inputs(rotate(q), rotate(k), v)[:2]

    columns = (model.q_heads + 2 * model.kv_heads) * model.head_dim
    return function, [(model.tokens, columns), jax.ShapeDtypeStruct((model.tokens, model.head_dim), jnp.float32)]


def after(shape, tiles, limit):
    """What stands between v3's kernel and the output projection's input."""
    model = Model(shape)
    peer = tpu_inference("kernel_hd64" if model.head_dim == 64 else "kernel")
    group = model.q_heads // model.kv_heads

    def function(out):
        return peer.prepare_outputs(out, group, model.head_dim).reshape(model.tokens, -1)

    return function, [(model.kv_heads, model.tokens, even(group) // 2, 2, lanes(model.head_dim))]


def even(count):
    """Rows of bf16 come in pairs."""
    return count + count % 2


def lanes(dim):
    return -(-dim // 128) * 128


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


PEERS = {"xla": xla, "pallas": pallas, "gmm": gmm, "v2": v2, "v3": v3, "v3_f32": functools.partial(v3, f32=True), "v3_hd64": v3_hd64,
         "before": before, "after": after}


def main():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))  # a dying libtpu can fill the disk
    points = json.loads(sys.argv[1])["points"]
    device = topologies.get_topology_desc(TOPOLOGIES[CHIP], "tpu").devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("device",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # Under the mesh, Pallas lowers for the mesh's device.
    with jax.sharding.set_mesh(mesh):
        for number, point in enumerate(points):
            error = None
            try:
                function, shapes = PEERS[point["peer"]](point["shape"], point["tiles"], point["limit"])
                types = [(shape, BF16) if isinstance(shape, tuple) else (shape.shape, shape.dtype) for shape in shapes]
                arguments = [jax.ShapeDtypeStruct(*of, sharding=place) for of in types]
                # v3 writes into q and the cache.
                donated = (0, 2) if len(shapes) == 3 else ()
                jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
            except Exception:
                error = traceback.format_exc()
            partial, done = f"done/{number}.partial", f"done/{number}"
            os.makedirs(partial)
            for name in os.listdir("dumps"):
                shutil.move(f"dumps/{name}", partial)
            if error:
                with open(f"{partial}/error", "w") as file:
                    file.write(error)
            os.rename(partial, done)


if __name__ == "__main__":
    main()
