"""Every planted fault is named, at its line, with default flags; the unbroken siblings are clean under every order of DMAs."""

import inspect

import pytest

import cores
import faults
import pagoda
import rings

CASES = faults.CASES + rings.CASES + cores.CASES


def expected(function):
    """Line and kind of the fault of a case: in its own source, or in that of its helper."""
    for of in [function, *(p.default for p in inspect.signature(function).parameters.values() if callable(p.default))]:
        lines, first = inspect.getsourcelines(of)
        for at, line in enumerate(lines):
            if "# fault: " in line:
                return first + at, line.split("# fault: ")[1].strip()
    raise AssertionError(f"{function.__name__} does not say where its fault is")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_fault_is_named(case):
    fn, args = case(True)
    line, kind = expected(case)
    with pytest.raises(pagoda.PagodaFault) as caught:
        pagoda.run(fn, *args)
    fault = caught.value
    file = inspect.getsourcefile(case)
    assert (fault.kind, fault.file, fault.line) == (kind, file, line), str(fault)
    # The traceback ends in the kernel.
    frames = [frame.frame.code.path.name if hasattr(frame, "frame") else "" for frame in caught.traceback]
    lines = [(str(entry.path), entry.lineno + 1) for entry in caught.traceback]
    assert (file, line) in lines, (frames, lines)
    assert fault.command and "pagoda run" in fault.command


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_sibling_is_clean(case):
    fn, args = case(False)
    pagoda.run(fn, *args, dma="all")
