"""`pytest --pagoda`, in a pytest of its own."""

import importlib.metadata

pytest_plugins = ["pytester"]

TESTS = """
import jax, jax.numpy as jnp, numpy as np, pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

def call(kernel, **more):
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=True, **more)

def right(x_ref, o_ref):
    o_ref[...] = x_ref[...] + 1

def reads_scratch(x_ref, o_ref, scratch_ref):
    o_ref[...] = x_ref[...] + 0 * jnp.nan_to_num(scratch_ref[...])

X = jnp.ones((8, 128))

def test_right():
    np.testing.assert_array_equal(jax.jit(call(right))(X), X + 1)
    np.testing.assert_array_equal(jax.vmap(call(right))(jnp.stack([X, X])), jnp.stack([X, X]) + 1)

def test_fault():
    call(reads_scratch, scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)])(X).block_until_ready()

MARK

def test_marked():
    call(reads_scratch, scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)])(X).block_until_ready()
"""


def run(pytester, mark, *flags, tests=TESTS):
    pytester.makepyfile(test_kernels=tests.replace("MARK", mark))
    # An installed package brings the plugin, and pytest takes none twice.
    installed = any(point.value == "pagoda.pytest_plugin" for point in importlib.metadata.entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "pagoda.pytest_plugin"]
    return pytester.runpytest_subprocess(*plugin, "-p", "no:cacheprovider", *flags)


def test_faults_fail_tests_at_the_kernels_line(pytester):
    result = run(pytester, "", "--pagoda", "--pagoda-dma", "all")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*test_kernels.py:12: kernel `reads_scratch`: read of unwritten memory*"])
    result.stdout.fnmatch_lines([">*scratch_ref[[]...[]])*"])


def test_without_the_flag_nothing_changes(pytester):
    run(pytester, "").assert_outcomes(passed=3)


def test_a_test_alone_is_marked(pytester):
    result = run(pytester, "@pytest.mark.pagoda(dma='early')")
    result.assert_outcomes(passed=2, failed=1)


SPARSE_CORE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

def shifted(x):
    mesh = plsc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore", num_cores=1, num_subcores=4)

    def kernel(x_ref, o_ref, rows):
        me = jax.lax.axis_index("subcore")
        pltpu.sync_copy(x_ref.at[me], rows.at[me])
        plsc.subcore_barrier()
        pltpu.sync_copy(rows.at[(me + 1) % 4], o_ref.at[me])

    scratch = [pltpu.VMEM_SHARED((4, 8), jnp.int32)]
    return pl.kernel(kernel, out_type=jax.ShapeDtypeStruct((4, 8), jnp.int32), mesh=mesh, scratch_types=scratch)(x)

def test_shifted():
    x = jnp.arange(32, dtype=jnp.int32).reshape(4, 8)
    np.testing.assert_array_equal(shifted(x), jnp.roll(x, -1, 0))
"""


def test_kernels_of_a_sparse_core_run(pytester):
    run(pytester, "", "--pagoda", tests=SPARSE_CORE).assert_outcomes(passed=1)


def test_mistakes_of_marks_and_flags_are_named(pytester):
    run(pytester, "@pytest.mark.pagoda(dmas='all')").stdout.fnmatch_lines(["*takes dma=ORDER*not*dmas*"])
    run(pytester, "@pytest.mark.pagoda(dma='never')").stdout.fnmatch_lines(["*dma='never': give late, early*"])
    run(pytester, "", "--pagoda-dma", "foo").stderr.fnmatch_lines(["*--pagoda-dma foo: give late*"])
