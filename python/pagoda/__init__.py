"""Pallas TPU kernels on a CPU: run, checked for races and undefined behaviour, and certified by the TPU's own compiler.

    import pagoda

    out = pagoda.run(fn, *args)                         # lowers for TPU with jax.export, runs, returns arrays
    pagoda.check(fn, *args, expect=reference, dma="all")  # raises PagodaFault or PagodaMismatch at the kernel's own line
    pagoda.certify(fn, *args, chip="v5p")               # VMEM by buffer, spills, static cycles: from libtpu

All of it is done by the program `pagoda`, which this package brings along; JAX is needed to lower a function, and for nothing
else.
"""

from importlib import metadata as _metadata

from pagoda._command import PagodaError, find_pagoda
from pagoda._errors import PagodaFault, PagodaMismatch
from pagoda._api import Certificate, Kernel, certify, check, lower, run

try:
    __version__ = _metadata.version("pagoda")
except _metadata.PackageNotFoundError:  # the module of a checkout
    __version__ = "0+checkout"

# Tracebacks name them as people import them.
for _error in (PagodaError, PagodaFault, PagodaMismatch):
    _error.__module__ = __name__
del _error

__all__ = [
    "Certificate",
    "Kernel",
    "PagodaError",
    "PagodaFault",
    "PagodaMismatch",
    "certify",
    "check",
    "find_pagoda",
    "lower",
    "run",
]
