"""Kernels whose cores wait for each other, with planted faults, and their unbroken siblings: a SparseCore's subcores, two TensorCores.

As in `faults`, `case(broken)` is a function of arrays and its arguments, and `fault:` stands at the line where the fault has to
be named.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

CASES = []
N = 4
LANES = 8
signal = getattr(pl, "semaphore_signal", None) or pltpu.semaphore_signal
wait = getattr(pl, "semaphore_wait", None) or pltpu.semaphore_wait


def case(function):
    CASES.append(function)
    return function


def on_subcores(kernel, scratch):
    """`kernel` on four subcores of a SparseCore; each has a row of the argument and of the result."""
    rows = jax.ShapeDtypeStruct((N, LANES), jnp.int32)

    def call(x):
        mesh = plsc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore", num_cores=1, num_subcores=N)
        params = pltpu.CompilerParams(needs_layout_passes=False)
        return pl.kernel(kernel, out_type=rows, mesh=mesh, scratch_types=scratch, compiler_params=params)(x)

    return call, [np.arange(N * LANES, dtype=np.int32).reshape(N, LANES)]


def shared():
    return [pltpu.VMEM_SHARED((N, LANES), jnp.int32), pltpu.VMEM((LANES,), jnp.int32), pltpu.SemaphoreType.DMA]


def me():
    return lax.axis_index("subcore")


@case
def subcores_neighbour_not_waited_for(broken):
    def kernel(x_ref, o_ref, rows, row, sem):
        pltpu.sync_copy(x_ref.at[me()], rows.at[me()])
        if not broken:
            plsc.subcore_barrier()
        pltpu.sync_copy(rows.at[(me() + 1) % N], row)  # fault: parallel-overlap
        pltpu.sync_copy(row, o_ref.at[me()])

    return on_subcores(kernel, shared())


@case
def subcores_meet_before_their_copy_is_over(broken):
    def kernel(x_ref, o_ref, rows, row, sem):
        copy = pltpu.make_async_copy(x_ref.at[me()], rows.at[me()], sem)
        copy.start()
        if not broken:
            copy.wait()
        plsc.subcore_barrier()
        if broken:
            copy.wait()
        pltpu.sync_copy(rows.at[(me() + 1) % N], row)  # fault: parallel-overlap
        pltpu.sync_copy(row, o_ref.at[me()])

    return on_subcores(kernel, shared())


@case
def subcores_reuse_rows_too_early(broken):
    def kernel(x_ref, o_ref, rows, row, sem):
        pltpu.sync_copy(x_ref.at[me()], rows.at[me()])
        plsc.subcore_barrier()
        pltpu.sync_copy(rows.at[(me() + 1) % N], row)
        if not broken:
            plsc.subcore_barrier()
        pltpu.sync_copy(row, rows.at[me()])  # fault: parallel-overlap
        plsc.subcore_barrier()
        pltpu.sync_copy(rows.at[(me() + 1) % N], o_ref.at[me()])

    return on_subcores(kernel, shared())


@case
def subcores_all_but_one_meet(broken):
    def kernel(x_ref, o_ref, rows, row, sem):
        pltpu.sync_copy(x_ref.at[me()], rows.at[me()])

        @pl.when(jnp.logical_or(me() != 2, not broken))
        def _():
            plsc.subcore_barrier()  # fault: deadlock

        pltpu.sync_copy(rows.at[me()], o_ref.at[me()])

    return on_subcores(kernel, shared())


def on_two_cores(kernel, scratch):
    """`kernel` on both TensorCores of a device; each has a block of the argument and of the result."""
    blocks = jax.ShapeDtypeStruct((2, 8, 128), jnp.float32)

    def call(x):
        mesh = pltpu.create_tensorcore_mesh("core", num_cores=2)
        return pl.kernel(kernel, out_type=blocks, mesh=mesh, scratch_types=scratch)(x)

    return call, [np.arange(2 * 8 * 128, dtype=np.float32).reshape(2, 8, 128)]


def exchange():
    return [pltpu.HBM((2, 8, 128), jnp.float32), pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.REGULAR]


@case
def cores_signal_before_the_copy_is_over(broken):
    def kernel(x_ref, o_ref, blocks, sem, ready):
        mine = lax.axis_index("core")
        copy = pltpu.make_async_copy(x_ref.at[mine], blocks.at[mine], sem)
        copy.start()
        if not broken:
            copy.wait()
        signal(ready, 1, core_index=1 - mine)
        if broken:
            copy.wait()
        wait(ready, 1)
        pltpu.sync_copy(blocks.at[1 - mine], o_ref.at[mine])  # fault: parallel-overlap

    return on_two_cores(kernel, exchange())


@case
def cores_signal_themselves(broken):
    def kernel(x_ref, o_ref, blocks, sem, ready):
        mine = lax.axis_index("core")
        pltpu.sync_copy(x_ref.at[mine], blocks.at[mine])
        signal(ready, 1, core_index=mine if broken else 1 - mine)
        wait(ready, 1)
        pltpu.sync_copy(blocks.at[1 - mine], o_ref.at[mine])  # fault: parallel-overlap

    return on_two_cores(kernel, exchange())


@case
def cores_wait_for_a_signal_too_many(broken):
    def kernel(x_ref, o_ref, blocks, sem, ready):
        mine = lax.axis_index("core")
        signal(ready, 1, core_index=1 - mine)
        wait(ready, 2 if broken else 1)  # fault: deadlock
        pltpu.sync_copy(x_ref.at[mine], o_ref.at[mine])

    return on_two_cores(kernel, exchange())
