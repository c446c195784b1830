"""`pytest --pagoda`: every kernel (`pallas_call`, `pl.kernel`) that a test calls on the CPU runs on Pagoda's tile machine, interpreted
or not.

A test alone is marked with `@pytest.mark.pagoda`, or `@pytest.mark.pagoda(dma="all")`. A fault fails the test, at the
kernel's own line.
"""

import contextlib
import functools
import re

import pytest

ORDERS = re.compile(r"late|early|all|random(:\d+)?")


def pytest_addoption(parser):
    group = parser.getgroup("pagoda", "Pallas kernels on Pagoda's tile machine")
    group.addoption("--pagoda", action="store_true", help="run every pallas_call of the tests on the tile machine")
    group.addoption("--pagoda-dma", default="late", metavar="ORDER", help="late, early, random:SEED or all [late]")


def pytest_configure(config):
    order = config.getoption("--pagoda-dma")
    if not ORDERS.fullmatch(order):
        raise pytest.UsageError(f"--pagoda-dma {order}: give late, early, random:SEED or all")
    config.addinivalue_line("markers", "pagoda(dma='late', options=()): run this test's pallas_calls on the tile machine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    marker = item.get_closest_marker("pagoda")
    if marker is None and not item.config.getoption("--pagoda"):
        return (yield)
    given = {"dma": item.config.getoption("--pagoda-dma"), **(marker.kwargs if marker else {})}
    if unknown := (set(given) - {"dma", "options"}) or (marker and marker.args):
        pytest.fail(f"@pytest.mark.pagoda takes dma=ORDER and options=[...], not {sorted(map(str, unknown))}", pytrace=False)
    if not ORDERS.fullmatch(str(given["dma"])):
        pytest.fail(f"@pytest.mark.pagoda: dma={given['dma']!r}: give late, early, random:SEED or all", pytrace=False)
    with on_tile_machine(**given) as faults:
        try:
            result = yield
        except BaseException:
            # JAX wraps what a callback raises in an error of its own.
            if faults:
                raise faults[0] from None
            raise
        if faults:
            raise faults[0]
        return result


@contextlib.contextmanager
def on_tile_machine(dma="late", options=()):
    """Within it, kernels on the CPU run on the tile machine. Yields the errors that they met."""
    from pagoda import _api, _lowering

    jax, mlir, pallas_call = _lowering.jax_modules()
    import numpy as np

    errors = []

    def rule(primitive, ctx, *nodes, interpret, **params):
        del interpret
        avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ctx.avals_in]
        results = tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ctx.avals_out)

        def kernel(*operands):
            return primitive.bind(*operands, interpret=False, **params)

        lowered = _lowering.lower(kernel, avals, {})

        def host(*operands):
            import dataclasses

            try:
                arrays = [np.asarray(operand) for operand in operands]
                called = dataclasses.replace(lowered, inputs=[arrays[at] for at in lowered.kept])
                outputs = _api.run_lowered(called, dma=dma, options=options)
                return tuple(np.asarray(output) for output in outputs)
            except Exception as error:
                errors.append(error)
                raise

        def callback(*operands):
            return jax.pure_callback(host, results, *operands, vmap_method="sequential")

        return mlir.lower_fun(callback, multiple_results=True)(ctx, *nodes)

    # What was compiled before, or is now, must not be taken for the other.
    jax.clear_caches()
    primitives = [pallas_call.pallas_call_p]
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.pallas import mpmd

        primitives.append(mpmd.mpmd_map_p)
    # What was there before for the CPU alone.
    table = mlir._platform_specific_lowerings["cpu"]
    before = {primitive: table.get(primitive) for primitive in primitives}
    for primitive in primitives:
        mlir.register_lowering(primitive, functools.partial(rule, primitive), platform="cpu")
    try:
        yield errors
    finally:
        for primitive, known in before.items():
            table.pop(primitive, None)
            if known is not None:
                table[primitive] = known
        jax.clear_caches()
