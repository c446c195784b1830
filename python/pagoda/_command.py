"""The program `pagoda`: where it is, and how it is run."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any


class PagodaError(RuntimeError):
    """The program could not do what it was asked to; the message says what to change."""


def find_pagoda() -> str:
    """The path of the program: `PAGODA_BIN`, or the one that this package brought along, or the one on the PATH."""
    if chosen := os.environ.get("PAGODA_BIN"):
        return chosen
    name = "pagoda" + (sysconfig.get_config_var("EXE") or "")
    folders = [sysconfig.get_path("scripts"), Path(sys.executable).parent]
    if sysconfig.get_default_scheme() != "posix_user":
        folders.append(sysconfig.get_path("scripts", "posix_user" if os.name == "posix" else "nt_user"))
    for folder in folders:
        path = Path(folder, name)
        if path.is_file():
            return str(path)
    if found := shutil.which(name):
        return found
    raise PagodaError("the program pagoda is not installed: pip install it again, or set PAGODA_BIN to its path")


def environment() -> dict[str, str]:
    """This process's environment, with the plugins that are installed as Python packages."""
    variables = dict(os.environ)
    for variable, package, file in [
        ("PAGODA_PLUGIN_CPU", "xla_plugins", "xla_cpu_pjrt/xla_cpu_pjrt.so"),
        ("PAGODA_PLUGIN_TPU", "libtpu", "libtpu.so"),
    ]:
        if variable in variables:
            continue
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder, file)
            if path.is_file():
                variables[variable] = str(path)
    return variables


def call(*words: str) -> tuple[int, Any, str]:
    """Runs `pagoda` with these words and `--json`: its exit code, what it printed, and what it said on standard error."""
    done = subprocess.run(
        [find_pagoda(), *words, "--json"], env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    try:
        answer = json.loads(done.stdout) if done.stdout.strip() else None
    except json.JSONDecodeError:
        answer = None
    return done.returncode, answer, done.stderr
