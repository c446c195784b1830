"""JAX functions lowered for TPU. Whatever of this package needs JAX is here, and it is imported when it is used."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import threading
from typing import Any, Callable

from pagoda._command import PagodaError

_state = threading.local()


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A function at its arguments."""

    # The StableHLO module.
    text: str
    # How many devices it is for.
    devices: int
    # The arrays that the module takes: arguments that it does not use are not among them.
    inputs: list[Any]
    # Which of all arguments these are.
    kept: list[int]
    # Shapes and types of what it returns.
    outputs: list[Any]
    # The authors' names of kernels' arguments, by the kernel's number.
    names: dict[int, list[str]]
    flatten: Callable[[Any], list[Any]]
    unflatten: Callable[[list[Any]], Any]


def jax_modules():
    """JAX and what of it is not public but needed."""
    try:
        import jax
        import jax.export
        from jax._src import source_info_util
        from jax._src.interpreters import mlir
        from jax._src.pallas import pallas_call
        import jax.experimental.pallas.tpu  # noqa: F401 (registers the lowering for TPU)
    except ImportError as error:
        raise PagodaError(f"JAX is needed to lower a function: pip install 'pagoda[jax]' ({error})") from error
    # What a lowering asks of the TPU that is not there, a v5p's core answers.
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.pallas.mosaic import tpu_info

        v5p = functools.partial(tpu_info.get_tpu_info_for_chip, tpu_info.ChipVersion.TPU_V5P, 1)
        tpu_info.registry.setdefault("cpu", v5p)
        # SparseCore kernels ask whether there is one at all.
        if not getattr(tpu_info, "_pagoda_has_a_tpu", False):
            has_a_tpu = tpu_info.is_tpu_device
            tpu_info.is_tpu_device = lambda: getattr(_state, "compiled", False) or has_a_tpu()
            tpu_info._pagoda_has_a_tpu = True
    # And what a mesh of its cores asks of a device: it has one.
    with contextlib.suppress(RuntimeError):  # where JAX_PLATFORMS leaves the CPU out, there is a TPU to ask
        device = jax.devices("cpu")[0]
        if not hasattr(device, "num_cores"):
            type(device).num_cores = property(lambda self: 1)
    # Lines of this package are nobody's kernel.
    source_info_util.register_exclusion(os.path.dirname(__file__))
    return jax, mlir, pallas_call


def lower(fn, args, kwargs) -> Lowered:
    """Lowers `fn(*args, **kwargs)` for TPU."""
    jax, _, _ = jax_modules()
    jitted = fn if hasattr(fn, "lower") and hasattr(fn, "trace") else jax.jit(fn)
    with compiled_for_tpu():
        exported = jax.export.export(jitted, platforms=["tpu"])(*args, **kwargs)
        names = kernel_names(jax, jitted, args, kwargs)
    leaves, _ = jax.tree.flatten((args, kwargs))
    text = str(exported.mlir_module())
    return Lowered(
        text=text,
        devices=max(exported.nr_devices, _devices_of_meshes(text)),
        inputs=[leaves[at] for at in exported.module_kept_var_idx],
        kept=list(exported.module_kept_var_idx),
        outputs=list(exported.out_avals),
        names=names if len(names) == text.count("stablehlo.custom_call @tpu_custom_call") else {},
        flatten=jax.tree.leaves,
        unflatten=lambda arrays: jax.tree.unflatten(exported.out_tree, arrays),
    )


def _devices_of_meshes(text: str) -> int:
    """Devices of the largest mesh of a module: one that is lowered for an abstract mesh counts as one partition."""
    meshes = re.findall(r"^\s*sdy\.mesh @\w+ = <\[(.*?)\]", text, re.MULTILINE)
    return max((math.prod(int(size) for size in re.findall(r"=(\d+)", axes)) for axes in meshes), default=1)


@contextlib.contextmanager
def compiled_for_tpu():
    """Has `pallas_call` compiled for TPU, whatever its `interpret` says."""
    jax, mlir, pallas_call = jax_modules()
    if not getattr(pallas_call, "_pagoda_lowers_for_tpu", False):
        default = pallas_call._pallas_call_lowering

        def rule(ctx, *nodes, interpret, **params):
            return default(ctx, *nodes, interpret=interpret and not getattr(_state, "compiled", False), **params)

        mlir.register_lowering(pallas_call.pallas_call_p, rule, platform="tpu")
        pallas_call._pagoda_lowers_for_tpu = True
    before = getattr(_state, "compiled", False)
    _state.compiled = True
    try:
        yield
    finally:
        _state.compiled = before


def kernel_names(jax, jitted, args, kwargs) -> dict[int, list[str]]:
    """The names of the arguments of each kernel, as its author gave them, in the order of the calls."""
    try:
        jaxpr = jitted.trace(*args, **kwargs).jaxpr
        found = list(_pallas_calls(getattr(jaxpr, "jaxpr", jaxpr)))
        return {at: _argument_names(eqn.params["jaxpr"]) for at, eqn in enumerate(found)}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}  # another JAX: the names in the sources do


def _argument_names(jaxpr):
    names = [str(name) for name in jaxpr.debug_info.arg_names]
    if len(names) != len(jaxpr.invars) or len(set(names)) != len(names) or not all(names):
        raise ValueError("not a name for each")
    if any(set(name) & set(",= ") for name in names):
        raise ValueError("a name that is not one word")
    return names


def _pallas_calls(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
            continue
        for param in eqn.params.values():
            for inner in param if isinstance(param, (list, tuple)) else [param]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _pallas_calls(inner)
