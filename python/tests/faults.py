"""Pallas kernels with planted faults, and their unbroken siblings.

Every function makes a case: `case(broken)` is a function of arrays and its arguments. The comment `fault:` stands at the line
where the fault has to be named, behind it the kind of the fault.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CASES = []
F32 = jnp.float32


def case(function):
    CASES.append(function)
    return function


def array(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-2, 2, shape).astype(np.float32)


def params(*semantics, **more):
    return pltpu.CompilerParams(dimension_semantics=semantics or None, **more)


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


HBM = pl.BlockSpec(memory_space=pltpu.HBM)
DMA = pltpu.SemaphoreType.DMA
REGULAR = pltpu.SemaphoreType.REGULAR
signal = getattr(pl, "semaphore_signal", None) or pltpu.semaphore_signal
wait = getattr(pl, "semaphore_wait", None) or pltpu.semaphore_wait


# ---- a stream: blocks of an array in HBM are summed, the next one copied while one is added ----


def stream(kernel, blocks=4):
    call = pl.pallas_call(
        kernel,
        out_shape=shape(8, 128),
        in_specs=[HBM],
        scratch_shapes=[pltpu.VMEM((2, 8, 128), F32), DMA((2,))],
    )
    return call, [array(8 * blocks, 128)]


@case
def stream_wait_removed(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        o_ref[...] = jnp.zeros((8, 128), F32)
        for i in range(4):
            copy = pltpu.make_async_copy(x_ref.at[pl.ds(8 * i, 8)], buffer.at[i % 2], sems.at[i % 2])
            copy.start()
            if not (broken and i == 2):
                copy.wait()
            o_ref[...] += buffer[i % 2]  # fault: read-in-flight

    return stream(kernel)


@case
def stream_slot_reused(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        def copy(i):
            slot = 0 if broken else i % 2
            return pltpu.make_async_copy(x_ref.at[pl.ds(8 * i, 8)], buffer.at[slot], sems.at[i % 2])

        o_ref[...] = jnp.zeros((8, 128), F32)
        copy(0).start()
        for i in range(4):
            if i < 3:
                copy(i + 1).start()  # fault: overwrite-in-flight
            copy(i).wait()
            o_ref[...] += buffer[0 if broken else i % 2]

    return stream(kernel)


@case
def stream_wrong_semaphore(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        def copy(i, sem):
            return pltpu.make_async_copy(x_ref.at[pl.ds(8 * i, 8)], buffer.at[i % 2], sems.at[sem])

        copy(0, 0).start()
        copy(1, 1).start()
        copy(0, 1 if broken else 0).wait()
        first = buffer[0]  # fault: read-in-flight
        copy(1, 0 if broken else 1).wait()
        o_ref[...] = first + buffer[1]

    return stream(kernel)


@case
def stream_one_copy_too_many(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        def copy(i):
            return pltpu.make_async_copy(x_ref.at[pl.ds(8 * i, 8)], buffer.at[i % 2], sems.at[i % 2])

        o_ref[...] = jnp.zeros((8, 128), F32)
        copy(0).start()

        @pl.loop(0, 4)
        def _(i):
            @pl.when(i + 1 < (5 if broken else 4))
            def _():
                start = pl.multiple_of(8 * (i + 1), 8)
                slot = (i + 1) % 2
                pltpu.make_async_copy(x_ref.at[pl.ds(start, 8)], buffer.at[slot], sems.at[slot]).start()  # fault: out-of-bounds

            slot = i % 2
            pltpu.make_async_copy(x_ref.at[pl.ds(0, 8)], buffer.at[slot], sems.at[slot]).wait()
            o_ref[...] += buffer[slot]

    return stream(kernel)


@case
def stream_one_wait_too_many(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        copy = pltpu.make_async_copy(x_ref.at[pl.ds(0, 8)], buffer.at[0], sems.at[0])
        copy.start()
        copy.wait()
        if broken:
            copy.wait()  # fault: deadlock
        o_ref[...] = buffer[0]

    return stream(kernel)


@case
def stream_destination_stored_in_flight(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        copy = pltpu.make_async_copy(x_ref.at[pl.ds(0, 8)], buffer.at[0], sems.at[0])
        copy.start()
        if broken:
            buffer[0] = jnp.zeros((8, 128), F32)  # fault: overwrite-in-flight
        copy.wait()
        o_ref[...] = buffer[0]

    return stream(kernel)


@case
def stream_waits_for_half(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        pltpu.make_async_copy(x_ref.at[pl.ds(0, 8)], buffer.at[0], sems.at[0]).start()
        rows = 4 if broken else 8
        half = buffer.at[0, pl.ds(0, rows)]
        pltpu.make_async_copy(x_ref.at[pl.ds(0, rows)], half, sems.at[0]).wait()
        o_ref[...] = buffer[0]  # fault: read-in-flight

    return stream(kernel)


# ---- a matmul over a grid ----


def matmul(kernel, out_map=lambda i, j, k: (i, j), a_map=lambda i, j, k: (i, k), semantics=("parallel", "parallel", "arbitrary")):
    call = pl.pallas_call(
        kernel,
        out_shape=shape(256, 256),
        grid=(2, 2, 2),
        in_specs=[pl.BlockSpec((128, 128), a_map), pl.BlockSpec((128, 128), lambda i, j, k: (k, j))],
        out_specs=pl.BlockSpec((128, 128), out_map),
        scratch_shapes=[pltpu.VMEM((128, 128), F32)],
        compiler_params=params(*semantics),
    )
    return call, [array(256, 256), array(256, 256, seed=1)]


def matmul_kernel(a_ref, b_ref, o_ref, acc_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    acc_ref[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=F32)

    @pl.when(pl.program_id(2) == 1)
    def _():
        o_ref[...] = acc_ref[...]


@case
def matmul_accumulator_never_zeroed(broken):
    def kernel(a_ref, b_ref, o_ref, acc_ref):
        if not broken:

            @pl.when(pl.program_id(2) == 0)
            def _():
                acc_ref[...] = jnp.zeros_like(acc_ref)

        acc_ref[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=F32)  # fault: unwritten-read

        @pl.when(pl.program_id(2) == 1)
        def _():
            o_ref[...] = acc_ref[...]

    return matmul(kernel)


@case
def matmul_zeroed_in_the_first_tile_only(broken):
    def kernel(a_ref, b_ref, o_ref, acc_ref):
        first = pl.program_id(2) == 0
        if broken:
            first = first & (pl.program_id(0) == 0) & (pl.program_id(1) == 0)

        @pl.when(first)
        def _():
            acc_ref[...] = jnp.zeros_like(acc_ref)

        acc_ref[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=F32)  # fault: unwritten-read

        @pl.when(pl.program_id(2) == 1)
        def _():
            o_ref[...] = acc_ref[...]

    return matmul(kernel)


@case
def matmul_result_never_stored(broken):
    def kernel(a_ref, b_ref, o_ref, acc_ref):  # fault: output-never-written
        @pl.when(pl.program_id(2) == 0)
        def _():
            acc_ref[...] = jnp.zeros_like(acc_ref)

        acc_ref[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=F32)
        if not broken:
            o_ref[...] = acc_ref[...]

    return matmul(kernel)


@case
def matmul_output_map_ignores_j(broken):
    def out_map(i, j, k):
        return (i, 0 * j if broken else j)  # fault: parallel-overlap

    return matmul(matmul_kernel, out_map=out_map)


@case
def matmul_block_out_of_bounds(broken):
    def a_map(i, j, k):
        return (i, k + (1 if broken else 0))  # fault: out-of-bounds

    return matmul(matmul_kernel, a_map=a_map)


@case
def matmul_reduction_declared_parallel(broken):
    def call(a, b):
        semantics = ("parallel", "parallel", "parallel" if broken else "arbitrary")
        kernel = pl.pallas_call(
            matmul_kernel,
            out_shape=shape(256, 256),
            grid=(2, 2, 2),
            in_specs=[
                pl.BlockSpec((128, 128), lambda i, j, k: (i, k)),
                pl.BlockSpec((128, 128), lambda i, j, k: (k, j)),
            ],
            out_specs=pl.BlockSpec((128, 128), lambda i, j, k: (i, j)),
            scratch_shapes=[pltpu.VMEM((128, 128), F32)],
            compiler_params=params(*semantics),
        )
        return kernel(a, b)  # fault: parallel-overlap

    return call, [array(256, 256), array(256, 256, seed=1)]


@case
def matmul_too_much_vmem(broken):
    def kernel(a_ref, b_ref, o_ref, acc_ref, more_ref):  # fault: memory-exceeded
        more_ref[...] = jnp.zeros((8, 128), F32) if not broken else more_ref[...]
        o_ref[...] = jnp.dot(a_ref[...], b_ref[...], preferred_element_type=F32)

    call = pl.pallas_call(
        kernel,
        out_shape=shape(128, 128),
        scratch_shapes=[pltpu.VMEM((128, 128), F32), pltpu.VMEM((64 * 1024 if broken else 8, 128), F32)],
    )
    return call, [array(128, 128), array(128, 128, seed=1)]


# ---- results that the kernel copies out itself ----


def writeback(kernel):
    call = pl.pallas_call(
        kernel,
        out_shape=shape(32, 128),
        in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)],
        out_specs=HBM,
        scratch_shapes=[pltpu.VMEM((2, 8, 128), F32), DMA((2,))],
    )
    return call, [array(32, 128)]


@case
def writeback_buffer_reused_before_sent(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        def send(i):
            return pltpu.make_async_copy(buffer.at[i % 2], o_ref.at[pl.ds(8 * i, 8)], sems.at[i % 2])

        for i in range(4):
            if i >= 2 and not broken:
                send(i - 2).wait()
            buffer[i % 2] = x_ref[pl.ds(8 * i, 8)] * 2  # fault: overwrite-in-flight
            send(i).start()
        for i in range(2, 4):
            send(i).wait()

    return writeback(kernel)


@case
def writeback_last_wait_missing(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        for i in range(4):
            buffer[0] = x_ref[pl.ds(8 * i, 8)] * 2
            send = pltpu.make_async_copy(buffer.at[0], o_ref.at[pl.ds(8 * i, 8)], sems.at[0])
            send.start()  # fault: semaphore-unbalanced
            if not (broken and i == 3):
                send.wait()

    return writeback(kernel)


@case
def writeback_of_nothing(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        for i in range(4):
            if not (broken and i == 0):
                buffer[0] = x_ref[pl.ds(8 * i, 8)]
            send = pltpu.make_async_copy(buffer.at[0], o_ref.at[pl.ds(8 * i, 8)], sems.at[0])
            send.start()  # fault: unwritten-read
            send.wait()

    return writeback(kernel)


# ---- rows gathered by indices in SMEM ----


def gather(kernel, indices, rows=8):
    call = pl.pallas_call(
        kernel,
        out_shape=shape(8, 128),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[HBM],
            out_specs=pl.BlockSpec((8, 128), lambda i, indices: (0, 0)),
            scratch_shapes=[pltpu.VMEM((8, 128), F32), DMA],
        ),
    )
    return call, [np.asarray(indices, np.int32), array(64, 128)]


@case
def gather_bad_index_in_the_data(broken):
    def kernel(indices_ref, x_ref, o_ref, rows_ref, sem):
        for i in range(8):
            row = indices_ref[i]
            copy = pltpu.make_async_copy(x_ref.at[pl.ds(row, 1)], rows_ref.at[pl.ds(i, 1)], sem)
            copy.start()  # fault: out-of-bounds
            copy.wait()
        o_ref[...] = rows_ref[...]

    return gather(kernel, [3, 1, 4, 1, 5, 9, 2, 64 if broken else 6])


@case
def gather_smem_index_off_by_one(broken):
    def kernel(indices_ref, x_ref, o_ref, rows_ref, sem):
        @pl.loop(0, 8)
        def _(i):
            row = indices_ref[i + (1 if broken else 0)]  # fault: out-of-bounds
            copy = pltpu.make_async_copy(x_ref.at[pl.ds(row, 1)], rows_ref.at[pl.ds(i, 1)], sem)
            copy.start()
            copy.wait()

        o_ref[...] = rows_ref[...]

    return gather(kernel, [3, 1, 4, 1, 5, 9, 2, 6])


@case
def gather_last_row_missed(broken):
    def kernel(indices_ref, x_ref, o_ref, rows_ref, sem):  # fault: output-never-written
        for i in range(7 if broken else 8):
            copy = pltpu.make_async_copy(x_ref.at[pl.ds(indices_ref[i], 1)], o_ref.at[pl.ds(i, 1)], sem)
            copy.start()
            copy.wait()

    return gather(kernel, [3, 1, 4, 1, 5, 9, 2, 6])


# ---- semaphores that count ----


def handshake(kernel):
    call = pl.pallas_call(kernel, out_shape=shape(8, 128), scratch_shapes=[REGULAR])
    return call, [array(8, 128)]


@case
def handshake_signals_too_little(broken):
    def kernel(x_ref, o_ref, sem):
        signal(sem, 1 if broken else 2)
        wait(sem, 2)  # fault: deadlock
        o_ref[...] = x_ref[...]

    return handshake(kernel)


@case
def handshake_signal_left_over(broken):
    def kernel(x_ref, o_ref, sem):
        signal(sem, 1)
        o_ref[...] = x_ref[...]
        wait(sem, 1)
        if broken:
            signal(sem, 1)  # fault: semaphore-unbalanced

    return handshake(kernel)


# ---- single accesses ----


@case
def load_past_the_end(broken):
    def kernel(start_ref, x_ref, o_ref):
        o_ref[...] = x_ref[pl.ds(start_ref[0], 8)]  # fault: out-of-bounds

    call = pl.pallas_call(
        kernel,
        out_shape=shape(8, 128),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.VMEM)],
    )
    return call, [np.array([9 if broken else 8], np.int32), array(16, 128)]


@case
def store_past_the_end(broken):
    def kernel(start_ref, x_ref, o_ref):
        o_ref[...] = jnp.zeros((16, 128), F32)
        o_ref[pl.ds(start_ref[0], 8)] = x_ref[...]  # fault: out-of-bounds

    call = pl.pallas_call(
        kernel,
        out_shape=shape(16, 128),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.VMEM)],
    )
    return call, [np.array([-1 if broken else 8], np.int32), array(8, 128)]


def read(ref):
    return ref[...]  # fault: unwritten-read


@case
def scratch_read_by_a_helper(broken, helper=read):
    def kernel(x_ref, o_ref, scratch_ref):
        if not broken:
            scratch_ref[...] = x_ref[...]
        o_ref[...] = x_ref[...] + helper(scratch_ref)

    call = pl.pallas_call(kernel, out_shape=shape(8, 128), scratch_shapes=[pltpu.VMEM((8, 128), F32)])
    return call, [array(8, 128)]


@case
def output_read_before_it_is_written(broken):
    def kernel(x_ref, o_ref):
        if not broken:
            o_ref[...] = x_ref[...]
        o_ref[...] = x_ref[...] + o_ref[...]  # fault: unwritten-read

    return pl.pallas_call(kernel, out_shape=shape(8, 128)), [array(8, 128)]


@case
def parameters_bound_beforehand(broken):
    def kernel(x_ref, o_ref, scratch_ref, *, rows):
        scratch_ref[pl.ds(0, rows)] = x_ref[pl.ds(0, rows)]
        o_ref[...] = scratch_ref[...]  # fault: unwritten-read

    call = pl.pallas_call(
        functools.partial(kernel, rows=8 if broken else 16),
        out_shape=shape(16, 128),
        scratch_shapes=[pltpu.VMEM((16, 128), F32)],
    )
    return call, [array(16, 128)]


@case
def promise_of_a_multiple(broken):
    def kernel(start_ref, x_ref, o_ref):
        start = pl.multiple_of(start_ref[0], 8)  # fault: broken-assumption
        o_ref[...] = x_ref[pl.ds(start, 8)]

    call = pl.pallas_call(
        kernel,
        out_shape=shape(8, 128),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.VMEM)],
    )
    return call, [np.array([4 if broken else 8], np.int32), array(16, 128)]


@case
def division_by_zero(broken):
    def kernel(n_ref, x_ref, o_ref):
        rows = jax.lax.div(jnp.int32(16), n_ref[0])  # fault: division-by-zero
        o_ref[...] = x_ref[...] * rows.astype(F32)

    call = pl.pallas_call(
        kernel,
        out_shape=shape(8, 128),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.VMEM)],
    )
    return call, [np.array([0 if broken else 4], np.int32), array(8, 128)]


@case
def smem_scratch_read_before_it_is_written(broken):
    def kernel(x_ref, o_ref, count_ref):
        if not broken:
            count_ref[0] = 3
        o_ref[...] = x_ref[...] * count_ref[0].astype(F32)  # fault: unwritten-read

    call = pl.pallas_call(kernel, out_shape=shape(8, 128), scratch_shapes=[pltpu.SMEM((1,), jnp.int32)])
    return call, [array(8, 128)]


@case
def copy_of_too_many_rows(broken):
    def kernel(rows_ref, x_ref, o_ref, buffer, sem):
        rows = rows_ref[0]
        buffer[...] = jnp.zeros((16, 128), F32)
        copy = pltpu.make_async_copy(x_ref.at[pl.ds(0, rows)], buffer.at[pl.ds(0, rows)], sem)  # fault: out-of-bounds
        copy.start()
        copy.wait()
        o_ref[...] = buffer[...]

    call = pl.pallas_call(
        kernel,
        out_shape=shape(16, 128),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), HBM],
        scratch_shapes=[pltpu.VMEM((16, 128), F32), DMA],
    )
    return call, [np.array([24 if broken else 8], np.int32), array(32, 128)]


# ---- scopes ----


def scoped(kernel):
    return pl.pallas_call(kernel, out_shape=shape(8, 128), in_specs=[HBM]), [array(8, 128)]


@case
def scope_ends_with_a_copy_in_flight(broken):
    def kernel(x_ref, o_ref):
        def body(buffer, sem):
            copy = pltpu.make_async_copy(x_ref, buffer, sem)
            copy.start()  # fault: semaphore-unbalanced
            if broken:
                o_ref[...] = jnp.zeros((8, 128), F32)
            else:
                copy.wait()
                o_ref[...] = buffer[...]

        pl.run_scoped(body, pltpu.VMEM((8, 128), F32), DMA)

    return scoped(kernel)


@case
def scope_takes_too_much_vmem(broken):
    def kernel(x_ref, o_ref):
        def body(buffer):
            buffer[pl.ds(0, 8)] = jnp.ones((8, 128), F32)
            o_ref[...] = buffer[pl.ds(0, 8)]

        pl.run_scoped(body, pltpu.VMEM((64 * 1024 if broken else 8, 128), F32))  # fault: memory-exceeded

    return scoped(kernel)


# ---- blocks ----


@case
def output_block_written_in_the_first_step_only(broken):
    def kernel(x_ref, o_ref):  # fault: output-never-written
        @pl.when(pl.program_id(0) == 0 if broken else pl.program_id(0) >= 0)
        def _():
            o_ref[...] = x_ref[...]

    block = pl.BlockSpec((8, 128), lambda i: (i, 0))
    return pl.pallas_call(kernel, out_shape=shape(32, 128), grid=(4,), in_specs=[block], out_specs=block), [array(32, 128)]


@case
def output_accumulated_over_the_outer_dimension(broken):
    def kernel(x_ref, o_ref):
        k = pl.program_id(0 if broken else 1)

        @pl.when(k == 0)
        def _():
            o_ref[...] = jnp.zeros((8, 128), F32)

        o_ref[...] += x_ref[0]  # fault: unwritten-read

    outer = (lambda k, i: (k, i, 0), lambda k, i: (i, 0)) if broken else (lambda i, k: (k, i, 0), lambda i, k: (i, 0))
    call = pl.pallas_call(
        kernel,
        out_shape=shape(32, 128),
        grid=(2, 4) if broken else (4, 2),
        in_specs=[pl.BlockSpec((1, 8, 128), outer[0])],
        out_specs=pl.BlockSpec((8, 128), outer[1]),
    )
    return call, [array(2, 32, 128)]


@case
def block_table_points_outside(broken):
    def kernel(table_ref, x_ref, o_ref):
        o_ref[...] = x_ref[...]

    call = pl.pallas_call(
        kernel,
        out_shape=shape(32, 128),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 128), lambda i, table: (table[i], 0))],  # fault: out-of-bounds
            out_specs=pl.BlockSpec((8, 128), lambda i, table: (i, 0)),
        ),
    )
    return call, [np.array([2, 0, 4 if broken else 3, 1], np.int32), array(32, 128)]


@case
def copy_ahead_crosses_a_parallel_step(broken):
    def kernel(x_ref, o_ref, buffer, sem):
        i = pl.program_id(0)

        def copy(i):
            return pltpu.make_async_copy(x_ref.at[pl.ds(pl.multiple_of(8 * i, 8), 8)], buffer.at[i % 2], sem)

        @pl.when(i == 0)
        def _():
            copy(i).start()

        copy(i).wait()

        @pl.when(i < 3)
        def _():
            copy(i + 1).start()  # fault: semaphore-unbalanced

        o_ref[...] = buffer[i % 2]

    call = pl.pallas_call(
        kernel,
        out_shape=shape(32, 128),
        grid=(4,),
        in_specs=[HBM],
        out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
        scratch_shapes=[pltpu.VMEM((2, 8, 128), F32), DMA],
        compiler_params=params("parallel" if broken else "arbitrary"),
    )
    return call, [array(32, 128)]


# ---- copies that meet in HBM ----


@case
def two_copies_into_the_same_rows(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        for i in range(2):
            buffer[i] = x_ref[pl.ds(8 * i, 8)]
            rows = pl.ds(0 if broken else 8 * i, 8)
            pltpu.make_async_copy(buffer.at[i], o_ref.at[rows], sems.at[i]).start()  # fault: overwrite-in-flight
        for i in range(2):
            pltpu.make_async_copy(buffer.at[i], o_ref.at[pl.ds(8 * i, 8)], sems.at[i]).wait()
        buffer[0] = jnp.zeros((8, 128), F32)
        for i in range(2, 4):
            rest = pltpu.make_async_copy(buffer.at[0], o_ref.at[pl.ds(8 * i, 8)], sems.at[0])
            rest.start()
            rest.wait()

    return writeback(kernel)


@case
def rows_read_back_before_they_are_there(broken):
    def kernel(x_ref, o_ref, buffer, sems):
        buffer[0] = x_ref[pl.ds(0, 8)]
        for i in range(4):
            rows = o_ref.at[pl.ds(8 * i, 8)]
            there = pltpu.make_async_copy(buffer.at[0], rows, sems.at[0])
            there.start()
            if not broken:
                there.wait()
            back = pltpu.make_async_copy(rows, buffer.at[1], sems.at[1])
            back.start()  # fault: read-in-flight
            back.wait()
            if broken:
                there.wait()

    return writeback(kernel)


@case
def block_of_an_alias_that_another_core_wrote(broken):
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] + 1

    def call(x):
        kernel_call = pl.pallas_call(
            kernel,
            out_shape=shape(32, 128),
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i // 2 if broken else i, 0))],  # fault: parallel-overlap
            out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
            input_output_aliases={0: 0},
            compiler_params=params("parallel"),
        )
        return kernel_call(x)

    return call, [array(32, 128)]
