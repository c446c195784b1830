"""run, check and certify, as people call them."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import pagoda
from pagoda import _command, _lowering


def double_kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...] * 2


def double(x):
    call = pl.pallas_call(
        double_kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0] // 8,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
        interpret=True,
    )
    return call(x)


def around(x, y, *, scale):
    """Two kernels, and what XLA does around them."""
    inner = double(x * scale + y)
    return {"sum": jnp.sum(double(inner)), "inner": inner, "rows": jnp.argmax(inner, axis=0)}


X = np.random.default_rng(3).uniform(-2, 2, (16, 128)).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32], ids=lambda dtype: dtype.__name__)
def test_a_kernel_alone(dtype):
    x = jnp.asarray(X * 10, dtype)
    out = pagoda.run(double, x)
    assert isinstance(out, np.ndarray) and out.dtype == x.dtype
    np.testing.assert_array_equal(out, np.asarray(x) * 2)


def test_a_program_around_kernels():
    scaled = functools.partial(around, scale=3.0)
    out = pagoda.run(scaled, X, X + 1, dma="all")
    inner = 2 * (3 * X + X + 1)
    np.testing.assert_allclose(out["inner"], inner, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(out["sum"], 2 * inner.sum(), rtol=1e-4)
    np.testing.assert_array_equal(out["rows"], np.argmax(out["inner"], axis=0))
    assert out["sum"].shape == () and out["rows"].dtype == np.int32


def test_a_kernel_on_a_mesh_of_cores():
    """A mesh asks the device how many cores it has, and here is no TPU to ask."""

    def body(x_ref, o_ref):
        def scoped(buffer, semaphore):
            pltpu.async_copy(x_ref, buffer, semaphore).wait()
            buffer[...] *= 2
            pltpu.async_copy(buffer, o_ref, semaphore).wait()

        pl.run_scoped(scoped, pltpu.VMEM(X.shape, jnp.float32), pltpu.SemaphoreType.DMA)

    def fn(x):
        # Since JAX 0.12 a class.
        mesh = getattr(pltpu, "TensorCoreMesh", None) or pltpu.create_tensorcore_mesh
        return pl.kernel(body, jax.ShapeDtypeStruct(x.shape, x.dtype), mesh=mesh(axis_name="core"))(x)

    np.testing.assert_array_equal(pagoda.run(fn, X), X * 2)


def test_arguments_that_are_not_used_are_left_out():
    np.testing.assert_array_equal(pagoda.run(lambda unused, x: double(x), X + 1, X), X * 2)


def test_what_is_as_expected_passes():
    out = pagoda.check(jax.jit(double), X, expect=lambda x: 2 * x, rtol=0, atol=0)
    np.testing.assert_array_equal(out, X * 2)
    pagoda.check(double, X, expect=X.astype(np.float64) * 2)


def test_a_wrong_value_is_named_at_the_line_that_wrote_it():
    wrong = np.array(X * 2)
    wrong[9, 5] += 1
    with pytest.raises(pagoda.PagodaMismatch) as caught:
        pagoda.check(double, X, expect=wrong)
    error = caught.value
    assert isinstance(error, AssertionError)
    assert (error.index, error.mismatches, error.elements) == ([9, 5], 1, X.size)
    line = double_kernel.__code__.co_firstlineno + 1
    assert (error.file, error.line, error.function) == (__file__, line, "double_kernel"), str(error)
    assert "rtol 0.01" in str(error)


def test_faults_have_a_history():
    def kernel(x_ref, o_ref, scratch_ref, sem):
        scratch_ref[...] = jnp.zeros((8, 128), jnp.float32)
        copy = pltpu.make_async_copy(x_ref, scratch_ref, sem)
        copy.start()
        o_ref[...] = scratch_ref[...]
        copy.wait()

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
    )
    with pytest.raises(pagoda.PagodaFault, match="read of a buffer whose DMA is in flight") as caught:
        pagoda.run(call, X[:8])
    fault = caught.value
    first = kernel.__code__.co_firstlineno
    assert (fault.kind, fault.buffer, fault.line) == ("read-in-flight", "scratch_ref", first + 4)
    past = fault.explanation["history"]
    assert "DMA 0 from `x_ref` to `scratch_ref`" in past[0]["what"] and past[0]["frames"][0]["line"] == first + 3
    assert "written by" in past[1]["what"] and past[1]["frames"][0]["line"] == first + 1
    assert fault.explanation["call"]["file"] == __file__


def test_bad_input_says_what_to_change():
    with pytest.raises(pagoda.PagodaError, match="is not an order of DMAs: use early, late"):
        pagoda.run(double, X, dma="sideways")
    with pytest.raises(pagoda.PagodaError, match="2 arrays are expected of a function that returns 1"):
        pagoda.check(double, X, expect=(X, X))


def test_the_program_is_there():
    done = subprocess.run([sys.executable, "-m", "pagoda", "--help"], capture_output=True, text=True, check=True)
    assert "inspect" in done.stdout and os.path.isfile(pagoda.find_pagoda())


def test_libtpu_certifies():
    try:
        certificate = pagoda.certify(double, X, chip="v5p")
    except pagoda.PagodaError as error:
        if "libtpu" not in str(error) or "tpu-tools" not in str(error):
            raise
        pytest.skip(f"libtpu is not installed: {error}")
    assert certificate.compiles, certificate
    (kernel,) = certificate.kernels
    assert sum(size for _, size in kernel.buffers) >= 4 * 8 * 128 * 4 and kernel.spills == 0 and kernel.cycles > 0
    assert "static cycles" in str(certificate)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(expect=None), "expect gives None"),
        (dict(expect=lambda x: None), "expect gives None"),
        (dict(expect=np.zeros((4, 128), np.float32)), "float32[8, 128], and float32[4, 128] is expected"),
        (dict(expect=np.zeros((8, 128), np.complex64)), "of real numbers"),
        (dict(expect=lambda x: x, dma=None), "dma is None"),
        (dict(expect=lambda x: x, options="--counts"), "give a list of words, such as ['--counts']"),
    ],
)
def test_mistakes_are_named(wrong, said):
    with pytest.raises(pagoda.PagodaError) as caught:
        pagoda.check(double, np.ones((8, 128), np.float32), **wrong)
    assert said in str(caught.value), caught.value


def test_a_function_without_kernels_is_refused():
    with pytest.raises(pagoda.PagodaError, match="calls no Pallas TPU kernel"):
        pagoda.run(lambda x: x + 1, np.ones(8, np.float32))


def test_bytecode_runs_as_text_does(tmp_path):
    with _lowering.compiled_for_tpu():
        exported = jax.export.export(jax.jit(functools.partial(around, scale=2.0)), platforms=["tpu"])(X, X)
    expected = pagoda.run(around, X, X, scale=2.0)
    module = tmp_path / "around.bc"
    module.write_bytes(exported.mlir_module_serialized)
    np.save(tmp_path / "x.npy", X)
    words = ["--input", f"0={tmp_path}/x.npy", "--input", f"1={tmp_path}/x.npy", "--output", str(tmp_path / "out")]
    code, reports, said = _command.call("run", str(module), *words)
    assert code == 0, said
    arrays = [np.load(output["file"]) for output in reports[-1]["outputs"]]
    for array, leaf in zip(arrays, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(array, leaf)


def test_what_a_kernel_prints_is_printed(capsys):
    def kernel(n_ref, x_ref, o_ref):
        pl.debug_print("n is {}", n_ref[0])
        o_ref[...] = x_ref[...] + 1.0

    def add(n, x):
        smem = pl.BlockSpec(memory_space=pltpu.SMEM)
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), in_specs=[smem, pl.BlockSpec()])(n, x)

    pagoda.run(add, np.array([5], np.int32), X)
    assert "n is 5" in capsys.readouterr().err
