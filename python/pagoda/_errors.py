"""What a check raises: errors whose traceback ends at the kernel's own source line."""

import ast
import types
from typing import Any, NoReturn

from pagoda._command import PagodaError


class _AtKernel(PagodaError):
    """An error of a kernel, with the source lines that led to it.

    Attributes:
      kernel: the kernel's name.
      file, line, function: the innermost line of the user's sources; None where the module does not say.
      explanation: everything that `pagoda run --json` says beside: `lines`, `call`, `buffer`, `history`, `again`.
      command: the command that shows it again, where `module.mlir` holds what `pagoda.lower` gives.
    """

    def __init__(self, message: str, kernel: str, explanation: dict[str, Any] | None):
        self.kernel = kernel
        self.explanation = explanation or {}
        # Where the kernel is called says more than nothing.
        call = self.explanation.get("call")
        lines = self.explanation.get("lines") or ([call] if call else [])
        first = lines[0] if lines else {}
        self.file, self.line, self.function = first.get("file"), first.get("line"), first.get("function")
        self.command = self.explanation.get("again")
        self._lines = lines
        super().__init__("\n".join([f"{self.file}:{self.line}: {message}" if first else message, *self._more()]))

    def _more(self):
        if dma := getattr(self, "dma", None):
            yield f"  order   DMAs {dma}"
        if buffer := self.explanation.get("buffer"):
            yield f"  buffer  {buffer}"
        for at, past in enumerate(self.explanation.get("history", [])[:6]):
            where = f" at {past['location']}" if past.get("location") else ""
            yield f"  {'' if at else 'before':6}  {past['what']}{where}, grid step {past['grid_step']}{'' if at else ' (the last first)'}"

    def raise_at_kernel(self) -> NoReturn:
        """Raises this error from within the kernel's source lines, so that tracebacks and debuggers show them."""
        call = self.explanation.get("call")
        outer = [call] if call and call not in self._lines else []
        run = _raising(self)
        for line in self._lines + outer:
            run = _calling(run, line)
        try:
            run()
        except type(self):
            raise self.with_traceback(_without_this_file(self.__traceback__)) from None
        raise self


class PagodaFault(_AtKernel):
    """What would be undefined behaviour on a TPU: a race, a read of memory that nobody wrote, an index out of bounds, ...

    Attributes, beside those of every error of a kernel:
      kind: `read-in-flight`, `unwritten-read`, `out-of-bounds`, `parallel-overlap`, ...
      buffer, index, grid_step: the element and when; op: what the kernel did there.
      dma: the order of DMAs that showed it.
    """

    def __init__(self, report: dict[str, Any], message: str):
        fault = report["fault"]
        self.kind, self.op, self.buffer = fault["kind"], fault["op"], fault["buffer"]
        self.index, self.grid_step = fault["index"], fault["grid_step"]
        self.dma = report.get("dma")
        super().__init__(message, fault["kernel"], report.get("explanation"))


class PagodaMismatch(_AtKernel, AssertionError):
    """A result that is not as expected, or that depends on when DMAs land.

    Attributes, beside those of every error of a kernel:
      output, index, mismatches, elements: the result, its first element that is off, how many are, of how many.
    """

    def __init__(self, report: dict[str, Any], expectation: dict[str, Any] | None, message: str):
        expectation = expectation or {}
        self.output = expectation.get("output")
        self.index = (expectation.get("first") or {}).get("index")
        self.mismatches, self.elements = expectation.get("mismatches"), expectation.get("elements")
        super().__init__(message, report["kernel"], expectation.get("explanation"))


def _raising(error):
    def run():
        raise error

    return run


def _calling(run, line):
    """A function that calls `run` from a line of a source file."""
    try:
        number, text = int(line["line"]), line.get("text") or ""
        tree = ast.parse("run()")
        for node in ast.walk(tree):
            if hasattr(node, "lineno"):
                # All of the line, so that no part of it is underlined.
                node.lineno = node.end_lineno = number
                node.col_offset, node.end_col_offset = len(text) - len(text.lstrip()), len(text.rstrip())
        code = compile(tree, line["file"], "exec").replace(co_name=line.get("function") or "kernel")
    except (ValueError, MemoryError):
        return run
    return lambda: exec(code, {"run": run})


def _without_this_file(traceback):
    """The frames of a traceback that are in other files."""
    kept = []
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename != __file__:
            kept.append(traceback)
        traceback = traceback.tb_next
    chain = None
    for entry in reversed(kept):
        chain = types.TracebackType(chain, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return chain
