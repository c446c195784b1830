"""`run`, `check`, `certify`: functions lowered by JAX, handed to the program `pagoda`."""

import contextlib
import dataclasses
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pagoda import _command, _lowering
from pagoda._command import PagodaError
from pagoda._errors import PagodaFault, PagodaMismatch

# What the MXU does to f32 operands, and bf16 to results, is within these.
RTOL = ATOL = 1e-2


def lower(fn, *args, **kwargs) -> str:
    """The StableHLO module, as text, that `fn(*args, **kwargs)` is on a TPU."""
    return _lowering.lower(fn, args, kwargs).text


def run(fn, *args, dma: str = "late", options=(), **kwargs):
    """Runs `fn(*args, **kwargs)` as on a TPU: its Pallas kernels on the tile machine, what stands around them on the CPU.

    Args:
      fn: a function of arrays, jitted or not, that calls Pallas TPU kernels; `interpret=True` is ignored.
      dma: when DMAs land: "late", "early", "random:SEED", or "all", one after the other.
      options: more words for `pagoda run`, such as ["--allow-unwritten-outputs"].

    Returns:
      what `fn` returns, with NumPy arrays.

    Raises:
      PagodaFault: the kernel did what would be undefined behaviour on a TPU.
      PagodaMismatch: with dma="all", the results depend on when DMAs land.
      PagodaError: it cannot be run; the message says why.
    """
    return run_lowered(_lowering.lower(fn, args, kwargs), dma=dma, options=options)


def check(fn, *args, expect, dma: str = "all", rtol: float | None = None, atol: float | None = None, options=(), **kwargs):
    """Runs `fn` as `run` does, with every order of DMAs, and holds its results against those of `expect`.

    Args:
      expect: a function of the same arguments, or what it would return.
      rtol, atol: tolerances, as in numpy.testing.assert_allclose [default: 1e-2 each, which is what f32 operands of the MXU
        need; 0 when no result is a float].

    Products of f32 are of operands rounded to bf16, as the MXU multiplies them unless the kernel asks for
    `precision=jax.lax.Precision.HIGHEST`: deep ones are off by more than 1e-2 of a reference in f32.

    Returns and raises:
      as `run`, and PagodaMismatch where a result is not as expected.
    """
    expected = expect(*args, **kwargs) if callable(expect) else expect
    if expected is None:
        raise PagodaError("expect gives None: give the arrays that are expected, or a function that returns them")
    lowered = _lowering.lower(fn, args, kwargs)
    return run_lowered(lowered, dma=dma, options=options, expected=expected, rtol=rtol, atol=atol)


def run_lowered(lowered: "_lowering.Lowered", *, dma="late", options=(), expected=None, rtol=None, atol=None):
    if not isinstance(dma, str):
        raise PagodaError(f"dma is {dma!r}: give 'late', 'early', 'random:SEED' or 'all'")
    if isinstance(options, str):
        raise PagodaError(f"options is the string {options!r}: give a list of words, such as {options.split()}")
    if "tpu_custom_call" not in lowered.text:
        raise PagodaError("the function calls no Pallas TPU kernel")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pagoda-")))
        module = folder / "module.mlir"
        module.write_text(lowered.text)
        words = ["run", str(module), "--dma", dma, "--output", str(folder / "out"), *options]
        if lowered.devices > 1:
            words += ["--devices", str(lowered.devices)]
        for at, array in enumerate(lowered.inputs):
            words += ["--input", f"{at}={_saved(folder / f'in{at}.npy', array)}"]
        for kernel, names in lowered.names.items():
            words += ["--names", f"{kernel}={','.join(names)}"]
        if expected is not None:
            words += _expecting(lowered, expected, folder, rtol, atol)
        code, reports, said = _command.call(*words)
        # The folder is gone when somebody reads this.
        said = said.replace(f"{folder}/", "")
        for line in said.splitlines():
            if line.startswith("print: "):
                print(line.removeprefix("print: "), file=sys.stderr)
        if reports is None or code > 1:
            raise PagodaError(said.strip().removeprefix("error: ") or f"pagoda ended with code {code}")
        _raise_first(reports, said)
        if code != 0:
            raise PagodaError(said.strip())
        files = [output["file"] for output in reports[-1]["outputs"]]
        arrays = [_typed(np.load(file), aval) for file, aval in zip(files, lowered.outputs, strict=True)]
        return lowered.unflatten(arrays)


def _expecting(lowered, expected, folder, rtol, atol):
    leaves = lowered.flatten(expected)
    if len(leaves) != len(lowered.outputs):
        raise PagodaError(f"{len(leaves)} arrays are expected of a function that returns {len(lowered.outputs)}")
    floats = any(np.issubdtype(_wide(np.zeros((), aval.dtype)).dtype, np.floating) for aval in lowered.outputs)
    words = []
    if leaves:
        words += ["--rtol", str((RTOL if floats else 0) if rtol is None else rtol)]
        words += ["--atol", str((ATOL if floats else 0) if atol is None else atol)]
    for at, (leaf, aval) in enumerate(zip(leaves, lowered.outputs)):
        array = np.asarray(leaf)
        if array.shape != aval.shape or np.iscomplexobj(array):
            wanted, given = (f"{of.dtype}{list(of.shape)}" for of in (aval, array))
            raise PagodaError(f"result {at} is {wanted}, and {given} is expected: give an array of the result's sizes, of real numbers")
        # A reference may work in another precision; integers have to be the result's.
        if array.dtype != aval.dtype and not np.issubdtype(_wide(array).dtype, np.floating):
            array = array.astype(aval.dtype)
        words += ["--expect", f"{at}={_saved(folder / f'expect{at}.npy', array)}"]
    return words


def _raise_first(reports, said):
    """Raises the first thing that is wrong."""
    message = next((line for line in said.splitlines() if line.startswith("error: ")), "").removeprefix("error: ")
    for report in reports:
        for of in [report, *report.get("expectations", [])]:
            if (of.get("explanation") or {}).get("again"):
                # Files of a folder that is gone: `module.mlir` is what `lower` gives.
                of["explanation"]["again"] = re.sub(r"/\S*/pagoda-[^/\s]+/", "", of["explanation"]["again"])
        if report.get("fault"):
            PagodaFault(report, message).raise_at_kernel()
        for wrong in report.get("expectations", []):
            if not wrong["agrees"]:
                PagodaMismatch(report, wrong, message).raise_at_kernel()
        if report.get("order_dependent"):
            PagodaMismatch(report, None, report["order_dependent"]).raise_at_kernel()


def _wide(array):
    """The array in a type that NumPy's files have: bf16 and narrower floats as float32, which loses nothing."""
    if array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8", "float6", "float4")):
        return array.astype(np.float32)
    if array.dtype.name in ("int4", "int2"):
        return array.astype(np.int8)
    if array.dtype.name in ("uint4", "uint2"):
        return array.astype(np.uint8)
    return array


def _saved(path, array):
    np.save(path, np.ascontiguousarray(_wide(np.asarray(array))).reshape(np.shape(array)))
    return path


def _typed(array, aval):
    return array if array.dtype == aval.dtype else array.astype(aval.dtype)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """VMEM of one kernel, in bytes."""

    name: str
    # Every buffer: its name or kind, and its bytes.
    buffers: list[tuple[str, int]]
    # Register spills; they are in VMEM too.
    spills: int
    # The compiler's static estimate; None where it has none.
    cycles: int | None


@dataclasses.dataclass(frozen=True)
class Certificate:
    """libtpu's answer to a program."""

    compiles: bool
    # The compiler's version, as it names itself, and the chip.
    compiler: str
    chip: str
    kernels: list[Kernel]
    # Why it does not compile.
    problem: str | None
    # All of it, as `pagoda certify --json` prints it.
    report: dict[str, Any]

    def __str__(self):
        head = f"compiles for {self.chip}" if self.compiles else f"does not compile for {self.chip}: {self.problem}"
        lines = [f"{head} ({self.compiler})"]
        for kernel in self.kernels:
            cycles = "no static cycles" if kernel.cycles is None else f"{kernel.cycles} static cycles"
            lines.append(f"  {kernel.name}: {sum(b for _, b in kernel.buffers)} bytes of VMEM, {kernel.spills} spilled, {cycles}")
            lines += [f"    {bytes:>12}  {name}" for name, bytes in kernel.buffers]
        return "\n".join(lines)


def certify(fn, *args, chip: str = "v5p", options=(), **kwargs) -> Certificate:
    """Compiles `fn(*args, **kwargs)` with libtpu, the TPU's own compiler, for one host of `chip`; no TPU is needed.

    Raises:
      PagodaError: libtpu is not installed, refuses the program or does not answer.
    """
    lowered = _lowering.lower(fn, args, kwargs)
    with tempfile.TemporaryDirectory(prefix="pagoda-") as folder:
        module = Path(folder, "module.mlir")
        module.write_text(lowered.text)
        code, report, said = _command.call("certify-module", str(module), "--chip", chip, *options)
    if "plugin `tpu` was not found" in said:
        raise PagodaError("libtpu is not installed: pip install 'pagoda[certify]', or set PAGODA_PLUGIN_TPU to its libtpu.so")
    if report is None or code > 1:
        raise PagodaError(said.strip().removeprefix("error: ") or f"pagoda ended with code {code}")
    cycles = {op["op"]: op["cycles"] for op in report["cycles"]}
    kernels = [
        Kernel(
            kernel["name"],
            [(buffer["tag"], buffer["bytes"]) for buffer in kernel["allocations"]],
            sum(buffer["bytes"] for buffer in kernel["allocations"] if "spill" in buffer["kind"].lower()),
            cycles.get(kernel["name"]),
        )
        for kernel in report["kernels"]
    ]
    verdict = report["verdict"]
    compiles = verdict["verdict"] == "compiles"
    problem = None if compiles else ", ".join(f"{key} {value}" for key, value in verdict.items() if key != "verdict")
    return Certificate(compiles, report["compiler"], chip, kernels, problem, report)
