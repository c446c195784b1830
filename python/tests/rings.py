"""Kernels of several devices with planted faults, and their unbroken siblings: collectives on a ring.

As in `faults`, `case(broken)` is a function of arrays and its arguments, and `fault:` stands at the line where the fault has to
be named. Arrays are sharded along their first dimension over four devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CASES = []
F32 = jnp.float32
N = 4
MESH = jax.sharding.AbstractMesh((N,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
P = jax.sharding.PartitionSpec
HBM = pl.BlockSpec(memory_space=pl.ANY)
VMEM = pl.BlockSpec(memory_space=pltpu.VMEM)
DMA = pltpu.SemaphoreType.DMA
REGULAR = pltpu.SemaphoreType.REGULAR
BLOCK = (8, 128)
signal = getattr(pl, "semaphore_signal", None) or pltpu.semaphore_signal
wait = getattr(pl, "semaphore_wait", None) or pltpu.semaphore_wait


def case(function):
    CASES.append(function)
    return function


def on_ring(kernel, out, scratch, inputs=1, outputs=1, out_spec=HBM, in_spec=HBM, barrier=True, rows=8, **more):
    """`kernel` on every device, each with blocks of its own."""
    shapes = [jax.ShapeDtypeStruct(out, F32)] * outputs
    call = pl.pallas_call(
        kernel,
        out_shape=shapes if outputs > 1 else shapes[0],
        in_specs=[in_spec] * inputs,
        out_specs=[out_spec] * outputs if outputs > 1 else out_spec,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(collective_id=0) if barrier else None,
        **more,
    )
    fn = jax.jit(jax.shard_map(call, mesh=MESH, in_specs=(P("x"),) * inputs, out_specs=P("x"), check_vma=False))
    sharding = jax.sharding.NamedSharding(MESH, P("x"))
    random = np.random.default_rng(0)
    arrays = [random.uniform(-2, 2, (rows * N, 128)).astype(np.float32) for _ in range(inputs)]
    fn = functools.partial(_sharded, fn, sharding)
    return fn, arrays


def _sharded(fn, sharding, *arrays):
    return fn(*(jax.lax.with_sharding_constraint(array, sharding) for array in arrays))


def me():
    return lax.axis_index("x")


def right():
    return lax.rem(me() + 1, N)


def left():
    return lax.rem(me() + N - 1, N)


def to(source, target, send, recv, device):
    return pltpu.make_async_remote_copy(
        source, target, send, recv, device_id=(device,), device_id_type=pl.DeviceIdType.MESH
    )


def tell(semaphore, device, amount=1):
    signal(semaphore, amount, device_id=(device,), device_id_type=pl.DeviceIdType.MESH)


def enter(*neighbours):
    barrier = pltpu.get_barrier_semaphore()
    for neighbour in neighbours:
        tell(barrier, neighbour)
    wait(barrier, len(neighbours))


# ---- to the right ----


@case
def permute_recv_not_waited(broken):
    def kernel(x_ref, o_ref, send, recv):
        copy = to(x_ref, o_ref, send, recv, right())
        copy.start()  # fault: semaphore-unbalanced
        copy.wait_send()
        if not broken:
            copy.wait_recv()

    return on_ring(kernel, BLOCK, [DMA, DMA], barrier=False)


@case
def permute_send_not_waited(broken):
    def kernel(x_ref, o_ref, send, recv):
        copy = to(x_ref, o_ref, send, recv, right())
        copy.start()  # fault: semaphore-unbalanced
        copy.wait_recv()
        if not broken:
            copy.wait_send()

    return on_ring(kernel, BLOCK, [DMA, DMA], barrier=False)


@case
def permute_off_the_end(broken):
    def kernel(x_ref, o_ref, send, recv):
        copy = to(x_ref, o_ref, send, recv, me() + 1 if broken else right())
        copy.start()  # fault: out-of-bounds
        copy.wait()

    return on_ring(kernel, BLOCK, [DMA, DMA], barrier=False)


@case
def permute_one_does_not_send(broken):
    def kernel(x_ref, o_ref, send, recv):
        copy = to(x_ref, o_ref, send, recv, right())

        @pl.when(me() != (2 if broken else N))
        def _():
            copy.start()
            copy.wait_send()

        copy.wait_recv()  # fault: deadlock

    return on_ring(kernel, BLOCK, [DMA, DMA], barrier=False)


@case
def permute_waits_before_it_sends(broken):
    def kernel(x_ref, o_ref, send, recv):
        copy = to(x_ref, o_ref, send, recv, right())
        if not broken:
            copy.start()
        copy.wait_recv()  # fault: deadlock
        if broken:
            copy.start()
        copy.wait_send()

    return on_ring(kernel, BLOCK, [DMA, DMA], barrier=False)


@case
def permute_result_read_early(broken):
    def kernel(x_ref, o_ref, landing, send, recv):
        copy = to(x_ref, landing, send, recv, right())
        copy.start()
        if not broken:
            copy.wait_recv()
        o_ref[...] = 2 * landing[...]  # fault: read-in-flight
        if broken:
            copy.wait_recv()
        copy.wait_send()

    return on_ring(kernel, BLOCK, [pltpu.VMEM(BLOCK, F32), DMA, DMA], in_spec=VMEM, out_spec=VMEM, barrier=False)


@case
def permute_source_overwritten(broken):
    def kernel(x_ref, o_ref, source, send, recv):
        source[...] = x_ref[...]
        copy = to(source, o_ref, send, recv, right())
        copy.start()
        if not broken:
            copy.wait_send()
        source[...] = jnp.zeros(BLOCK, F32)  # fault: overwrite-in-flight
        if broken:
            copy.wait_send()
        copy.wait_recv()

    return on_ring(kernel, BLOCK, [pltpu.VMEM(BLOCK, F32), DMA, DMA], in_spec=VMEM, barrier=False)


@case
def permute_all_to_one(broken):
    def kernel(x_ref, o_ref, send, recv):
        copy = to(x_ref, o_ref, send, recv, 0 * me() if broken else right())
        copy.start()  # fault: device-race
        copy.wait()

    return on_ring(kernel, BLOCK, [DMA, DMA], barrier=False)


# ---- barriers ----


@case
def barrier_with_the_wrong_neighbour(broken):
    def kernel(x_ref, o_ref, send, recv):
        # Whoever has signalled is there: that must be the one that is sent to.
        barrier = pltpu.get_barrier_semaphore()
        tell(barrier, right() if broken else left())
        wait(barrier, 1)
        copy = to(x_ref, o_ref, send, recv, right())
        copy.start()  # fault: device-race
        copy.wait()

    return on_ring(kernel, BLOCK, [DMA, DMA])


@case
def barrier_waits_for_one_of_two(broken):
    def kernel(x_ref, o_ref, send, recv):
        barrier = pltpu.get_barrier_semaphore()
        tell(barrier, left())
        tell(barrier, right())
        wait(barrier, 1 if broken else 2)
        copy = to(x_ref, o_ref, send, recv, right())
        copy.start()  # fault: device-race
        copy.wait()
        if broken:
            wait(barrier, 1)

    return on_ring(kernel, BLOCK, [DMA, DMA])


@case
def barrier_waits_for_one_too_many(broken):
    def kernel(x_ref, o_ref, send, recv):
        barrier = pltpu.get_barrier_semaphore()
        for other in range(N):
            tell(barrier, jnp.int32(other))
        wait(barrier, N + 1 if broken else N)  # fault: deadlock
        copy = to(x_ref, o_ref, send, recv, right())
        copy.start()
        copy.wait()

    return on_ring(kernel, BLOCK, [DMA, DMA])


@case
def barrier_signal_left_over(broken):
    def kernel(x_ref, o_ref, send, recv):
        barrier = pltpu.get_barrier_semaphore()
        amount = 2 if broken else 1
        signal(barrier, amount, device_id=left(), device_id_type=pl.DeviceIdType.LOGICAL)  # fault: semaphore-unbalanced
        wait(barrier, 1)
        copy = to(x_ref, o_ref, send, recv, right())
        copy.start()
        copy.wait()

    return on_ring(kernel, BLOCK, [DMA, DMA])


# ---- all-gather: every step passes on what the one before has brought ----


def gather(kernel):
    scratch = [DMA, DMA, DMA((N - 1,))]
    return on_ring(kernel, (N, *BLOCK), scratch)


def keep_own(x_ref, o_ref, copy_sem):
    copy = pltpu.make_async_copy(x_ref, o_ref.at[me()], copy_sem)
    copy.start()
    return copy


@case
def gather_passed_on_early(broken):
    def kernel(x_ref, o_ref, copy_sem, send, recv):
        enter(left(), right())
        keep_own(x_ref, o_ref, copy_sem).wait()
        before = None
        for step in range(N - 1):
            slot = lax.rem(me() + N - step, N)
            copy = to(o_ref.at[slot], o_ref.at[slot], send, recv.at[step], right())
            copy.start()  # fault: read-in-flight
            if before is not None:
                before.wait_recv()
            copy.wait_send()
            if broken:
                before = copy
            else:
                copy.wait_recv()

    return gather(kernel)


@case
def gather_own_block_not_there(broken):
    def kernel(x_ref, o_ref, copy_sem, send, recv):
        enter(left(), right())
        own = keep_own(x_ref, o_ref, copy_sem)
        if not broken:
            own.wait()
        for step in range(N - 1):
            slot = lax.rem(me() + N - step, N)
            copy = to(o_ref.at[slot], o_ref.at[slot], send, recv.at[step], right())
            copy.start()  # fault: read-in-flight
            copy.wait()
        if broken:
            own.wait()

    return gather(kernel)


@case
def gather_step_too_few(broken):
    def kernel(x_ref, o_ref, copy_sem, send, recv):  # fault: output-never-written
        enter(left(), right())
        keep_own(x_ref, o_ref, copy_sem).wait()
        for step in range(N - 2 if broken else N - 1):
            slot = lax.rem(me() + N - step, N)
            copy = to(o_ref.at[slot], o_ref.at[slot], send, recv.at[step], right())
            copy.start()
            copy.wait()

    return gather(kernel)


@case
def gather_slot_of_the_receiver(broken):
    def kernel(x_ref, o_ref, copy_sem, send, recv):
        keep_own(x_ref, o_ref, copy_sem).wait()
        enter(left(), right())
        for step in range(N - 1):
            slot = lax.rem(me() + N - step, N)
            # To where the receiver has its own block, which it may be sending.
            target = right() if broken else slot
            copy = to(o_ref.at[slot], o_ref.at[target], send, recv.at[step], right())
            copy.start()  # fault: read-in-flight
            copy.wait()

    return gather(kernel)


@case
def gather_semaphore_shared(broken):
    def kernel(x_ref, o_ref, copy_sem, send, recv):
        # Two blocks come at once, from either side: a wait on one semaphore does not say which is there.
        enter(left(), right())
        keep_own(x_ref, o_ref, copy_sem).wait()
        one = to(x_ref, o_ref.at[me()], send, recv.at[0], right())
        other = to(x_ref, o_ref.at[me()], send, recv.at[0 if broken else 1], left())
        one.start()
        other.start()
        one.wait_recv()
        across = to(o_ref.at[left()], o_ref.at[left()], send, recv.at[2], right())
        across.start()  # fault: read-in-flight
        other.wait_recv()
        across.wait_recv()
        for copy in (one, other, across):
            copy.wait_send()

    return gather(kernel)


# ---- all-reduce: blocks go around, through two slots ----


def reduce(kernel):
    scratch = [pltpu.VMEM((2, *BLOCK), F32), DMA((2,)), DMA((2,)), REGULAR]
    return on_ring(kernel, BLOCK, scratch, in_spec=VMEM, out_spec=VMEM)


@case
def reduce_without_handshake(broken):
    def kernel(x_ref, o_ref, slots, send, recv, free):
        enter(left(), right())
        slots[0] = x_ref[...]
        o_ref[...] = x_ref[...]
        for step in range(N - 1):
            here, there = step % 2, (step + 1) % 2
            if step > 0 and not broken:
                wait(free, 1)
            copy = to(slots.at[here], slots.at[there], send.at[here], recv.at[there], right())
            copy.start()  # fault: device-race
            copy.wait()
            if step < N - 2 and not broken:
                tell(free, left())
            o_ref[...] += slots[there]

    return reduce(kernel)


@case
def reduce_slot_freed_early(broken):
    def kernel(x_ref, o_ref, slots, send, recv, free):
        enter(left(), right())
        slots[0] = x_ref[...]
        o_ref[...] = x_ref[...]
        for step in range(N - 1):
            here, there = step % 2, (step + 1) % 2
            if step > 0:
                wait(free, 1)
            copy = to(slots.at[here], slots.at[there], send.at[here], recv.at[there], right())
            copy.start()  # fault: device-race
            # The slot that is sent from is free when it is sent, and not before.
            if step < N - 2 and broken:
                tell(free, left())
            copy.wait()
            if step < N - 2 and not broken:
                tell(free, left())
            o_ref[...] += slots[there]

    return reduce(kernel)


@case
def reduce_frees_the_wrong_neighbour(broken):
    def kernel(x_ref, o_ref, slots, send, recv, free):
        enter(left(), right())
        slots[0] = x_ref[...]
        o_ref[...] = x_ref[...]
        for step in range(N - 1):
            here, there = step % 2, (step + 1) % 2
            if step > 0:
                wait(free, 1)
            copy = to(slots.at[here], slots.at[there], send.at[here], recv.at[there], right())
            copy.start()  # fault: device-race
            copy.wait()
            if step < N - 2:
                tell(free, right() if broken else left())
            o_ref[...] += slots[there]

    return reduce(kernel)


@case
def reduce_one_slot(broken):
    def kernel(x_ref, o_ref, slots, send, recv, free):
        slots[0] = x_ref[...]
        enter(left(), right())
        o_ref[...] = x_ref[...]
        for step in range(N - 1):
            here, there = (0, 0) if broken else (step % 2, (step + 1) % 2)
            if step > 0:
                wait(free, 1)
            copy = to(slots.at[here], slots.at[there], send.at[here], recv.at[there], right())
            copy.start()  # fault: read-in-flight
            copy.wait()
            if step < N - 2:
                tell(free, left())
            o_ref[...] += slots[there]

    return reduce(kernel)


@case
def reduce_wrong_semaphore(broken):
    def kernel(x_ref, o_ref, slots, send, recv, free):
        enter(left(), right())
        slots[0] = x_ref[...]
        o_ref[...] = x_ref[...]
        for step in range(N - 1):
            here, there = step % 2, (step + 1) % 2
            if step > 0:
                wait(free, 1)
            copy = to(slots.at[here], slots.at[there], send.at[here], recv.at[there], right())
            copy.start()
            copy.wait_send()
            pltpu.make_async_copy(slots.at[there], slots.at[there], recv.at[here if broken else there]).wait()  # fault: deadlock
            if step < N - 2:
                tell(free, left())
            o_ref[...] += slots[there]

    return reduce(kernel)


# ---- all-to-all ----


@case
def exchange_on_one_semaphore(broken):
    def kernel(x_ref, o_ref, own_ref, copy_sem, send, recv):
        enter(*(lax.rem(me() + by, N) for by in range(1, N)))
        copies = [to(x_ref, o_ref.at[me()], send, recv, lax.rem(me() + by, N)) for by in range(N)]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait_send()
        # Only when all have come is any of them known to be there.
        for copy in copies[1:] if broken else copies:
            copy.wait_recv()
        read = pltpu.make_async_copy(o_ref.at[me()], own_ref, copy_sem)
        read.start()  # fault: read-in-flight
        read.wait()
        if broken:
            copies[0].wait_recv()

    return on_ring(kernel, (N, *BLOCK), [pltpu.VMEM(BLOCK, F32), DMA, DMA, DMA])
