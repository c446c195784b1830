#!/usr/bin/env python3
"""JAX's own Pallas TPU tests, run on the tile machine instead of a TPU.

Every `pallas_call` (and `pl.kernel`) that a test makes is lowered for TPU as JAX lowers it, and its custom call runs on the tile
machine in the test's own process, through a callback. The test's own assertions are the reference: they compare with NumPy, with
XLA or with another kernel, within the tolerances that hold for a TPU.

    JAX_SRC=path/to/jax scripts/jax_suite.py [--only GLOB] [--out DIR] [--minutes M] [--failed | --again] [FILE...]

needs a Python with jax 0.10.2, absl-py, pytest and hypothesis, and a checkout of JAX's tests of the same version, which
stays outside this repository. Prints how many modules were lowered, opened, decoded and run, how many tests agree, and the rest by
cause. FILEs are tests of other packages, which PYTHONPATH finds; then these alone are run. What was tested before is not tested again, so that a run may be stopped and goes on where it was. Tests of several devices
have eight of the host's, which meet at every call. No kernel of it ever ran on a TPU here.
"""

import argparse
import ast
import collections
import contextlib
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import select
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
CALL = os.environ.get("PAGODA_CALL", str(ROOT / "target/debug/examples/call"))
FILES = [
    "pallas_test.py",
    "ops_test.py",
    "indexing_test.py",
    "pallas_vmap_test.py",
    "tpu_pallas_test.py",
    "tpu_ops_test.py",
    "tpu_pallas_pipeline_test.py",
    "tpu_pallas_async_test.py",
    "tpu_pallas_memory_space_test.py",
    "tpu_pallas_random_test.py",
    "tpu_pallas_state_test.py",
    "tpu_pallas_mpmd_test.py",
    "tpu_sparsecore_pallas_test.py",
    "tpu_sparsecore_pallas_debug_check_test.py",
    "tpu_sparsecore_pallas_distributed_test.py",
    "tpu_fusible_matmul_test.py",
    "tpu_fusible_matmul_with_stateful_fusions_test.py",
    "tpu_gmm_test.py",
    "tpu_splash_attention_kernel_test.py",
    "tpu_splash_attention_kernel_sharded_test.py",
    "tpu_paged_attention_kernel_test.py",
    "tpu_ragged_paged_attention_test.py",
    "tpu_pallas_call_print_test.py",
    "tpu_side_effects_test.py",
    "tpu_trace_value_test.py",
    "tpu_all_gather_test.py",
    "tpu_pallas_distributed_test.py",
]
# Where a shard_map's devices are the host's.
DEVICES = 8
# The TPU that tests and lowerings ask about, by the name that Pagoda has for it.
Chip = collections.namedtuple("Chip", "version generation variant kind")
CHIPS = {
    "v5p": Chip("TPU_V5P", 5, "p", "TPU v5p"),
    "v6e": Chip("TPU_V6E", 6, "e", "TPU v6 lite"),
    "tpu7x": Chip("TPU_7X", 7, "x", "TPU7x"),
}
# Elements by NumPy's names.
ELEMENTS = {
    "bool": "pred", "float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64",
    "float8_e4m3fn": "f8e4m3fn", "float8_e5m2": "f8e5m2", "float8_e4m3b11fnuz": "f8e4m3b11fnuz", "float8_e8m0fnu": "f8e8m0fnu",
    **{f"{sign}int{bits}": f"{'u' if sign else 'i'}{bits}" for sign in ("", "u") for bits in (2, 4, 8, 16, 32, 64)},
}


def plugin():
    """In the process of the tests: TPU lowerings on the CPU, and a record of each call and each test."""
    import jax
    import numpy as np
    # Helpers of tests that the wheel leaves out are in the checkout.
    import jax._src.pallas
    for package in (jax._src, jax._src.pallas):
        package.__path__.append(str(pathlib.Path(os.environ["JAX_SRC"]) / package.__name__.replace(".", "/")))
    from jax._src import test_util as jtu
    from jax._src import tpu_custom_call
    from jax._src.interpreters import mlir
    from jax._src.pallas import pallas_call
    from jax._src.pallas.mosaic import pallas_call_registration, tpu_info

    # A few examples of each property: kernels, not draws, are what is counted.
    import hypothesis
    from jax._src import hypothesis_test_util
    hypothesis.settings.register_profile("suite", max_examples=5, deadline=None, database=None, derandomize=True,
                                         suppress_health_check=list(hypothesis.HealthCheck))
    hypothesis_test_util.setup = lambda *a, **k: hypothesis.settings.load_profile("suite")
    # Tests that do not ask for it, too.
    hypothesis_test_util.setup()

    records = open(os.environ["PAGODA_RECORDS"], "a", buffering=1)
    keep = pathlib.Path(os.environ["PAGODA_KEEP"])
    current = {"test": "?"}
    chip = CHIPS[os.environ["PAGODA_CHIP"]]
    info = tpu_info.get_tpu_info_for_chip(getattr(tpu_info.ChipVersion, chip.version), 1)

    def record(**what):
        records.write(json.dumps({"test": current["test"], **what}) + "\n")

    # What tests and lowerings ask of a device.
    jtu.device_under_test = lambda: "tpu"
    jtu.is_device_tpu = lambda version=None, variant="": version in (None, chip.generation) and variant in ("", chip.variant)
    # The fused MoE asks for a TPU 7, and uses nothing that a v5p lacks.
    jtu.is_device_tpu_at_least = lambda version: version <= (7 if "fused_moe" in current["test"] else chip.generation)
    jtu.is_cloud_tpu = lambda: True
    jtu.is_cloud_tpu_at_least = lambda *date: True
    jtu.if_cloud_tpu_at_least = lambda *date: True
    jtu.is_cloud_tpu_older_than = lambda *date: False
    jtu.get_tpu_version = lambda: chip.generation
    import jax._src.cloud_tpu_init as cloud_tpu_init
    for name in ("is_cloud_tpu_older_than",):
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("jax") and hasattr(module, name):
                setattr(module, name, lambda *a, **k: False)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("jax"):
            if getattr(module, "get_tpu_info", None) is not None:
                module.get_tpu_info = lambda: info
            if getattr(module, "is_tpu_device", None) is not None:
                module.is_tpu_device = lambda: True
    tpu_info.get_tpu_info = lambda: info
    tpu_info.is_tpu_device = lambda: True
    tpu_info.get_device_kind = lambda: chip.kind
    tpu_info.get_num_device_cores = lambda: 1
    import jax.experimental.pallas.tpu as pltpu
    pltpu.get_tpu_info = lambda: info

    from jax._src.pallas.mosaic import core as tpu_core
    mesh_of = tpu_core.create_tensorcore_mesh
    tpu_core.create_tensorcore_mesh = lambda axis_name, devices=None, num_cores=None: mesh_of(axis_name, num_cores=num_cores or 1)
    pltpu.create_tensorcore_mesh = tpu_core.create_tensorcore_mesh

    import threading
    machine = Machine()
    meeting = Meeting(threading.Condition())
    # A program may run its calls at once; there is one machine, and one folder for each module.
    one_call = threading.Lock()

    def of_type(aval):
        return [ELEMENTS[np.dtype(aval.dtype).name], list(aval.shape)]

    count = collections.Counter()

    def custom_call(ctx, *in_nodes, config, kernel_name, out_avals, input_output_aliases, **_):
        """The custom call of a kernel as a callback to the tile machine."""
        text = config.to_json()
        text = text.decode() if isinstance(text, bytes) else text
        mesh = getattr(ctx.module_context.axis_context, "mesh", None)
        devices = mesh.size if config.has_communication and mesh is not None else 1
        call = {
            "kernel": kernel_name,
            "operands": [of_type(aval) for aval in ctx.avals_in],
            "results": [of_type(aval) for aval in ctx.avals_out],
            "aliases": [list(pair) for pair in input_output_aliases],
            "devices": devices,
            "races": bool(RACES.search(current["test"])),
        }
        digest = hashlib.sha256((text + json.dumps(call)).encode()).hexdigest()[:16]
        folder = keep / digest
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(text)
        (folder / "call.json").write_text(json.dumps(call))
        record(event="lowered", module=digest, kernel=kernel_name)
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in ctx.avals_out]

        def run_all(operands):
            """Operands of every device to results of every device."""
            with one_call:
                (folder / "operands.bin").write_bytes(b"".join(np.ascontiguousarray(x).tobytes() for own in operands for x in own))
                report = machine.run(folder)
                record(event="run", module=digest, kernel=kernel_name, **report)
                if report["got"] != "ran":
                    raise RuntimeError(f"pagoda: {report}")
                data, results, at = (folder / "results.bin").read_bytes(), [], 0
            for _ in operands:
                own = []
                for shape in shapes:
                    dtype = np.dtype(shape.dtype)
                    size = int(np.prod(shape.shape)) * dtype.itemsize
                    own.append(np.frombuffer(data[at : at + size], dtype).reshape(shape.shape))
                    at += size
                results.append(own)
            return results

        def run(*operands):
            if devices == 1:
                return run_all([operands])[0]
            return meeting.meet(digest, devices, int(operands[0]), operands[1:], run_all)

        def call_back(*operands):
            # Called again it is another call: a kernel may have side effects.
            return jax.pure_callback(run, shapes, *operands)

        if devices == 1:
            return mlir.lower_fun(call_back, multiple_results=True)(ctx, *in_nodes)
        from jax._src import core as jax_core
        from jax._src.lib.mlir.dialects import hlo
        number = jax_core.ShapedArray((), np.dtype("uint32"))
        return mlir.lower_fun(call_back, multiple_results=True)(
            ctx.replace(avals_in=[number, *ctx.avals_in]), hlo.partition_id(), *in_nodes)

    tpu_custom_call._tpu_custom_call_lowering = custom_call
    interpreted = pallas_call._pallas_call_lowering

    def lowering(ctx, *in_nodes, interpret, **params):
        if interpret:
            return interpreted(ctx, *in_nodes, interpret=interpret, **params)
        try:
            return pallas_call_registration.pallas_call_tpu_lowering_rule(ctx, *in_nodes, interpret=False, **params)
        except Exception as error:
            record(event="not lowered", error=f"{type(error).__name__}: {error}"[:300])
            raise

    mlir.register_lowering(pallas_call.pallas_call_p, lowering, platform="cpu")
    try:
        from jax._src.pallas import mpmd
        mlir.register_lowering(mpmd.mpmd_map_p, mpmd._mpmd_map_tpu_lowering, platform="cpu")
    except (ImportError, AttributeError) as error:
        record(event="no mpmd", error=str(error))

    # XLA on a TPU multiplies f32 in one bf16 pass unless asked for more; so do the references of the tests here.
    from jax._src.lax import lax as lax_internal

    def dot_general(ctx, lhs, rhs, *, precision, **params):
        default = precision in (None, jax.lax.Precision.DEFAULT, (jax.lax.Precision.DEFAULT,) * 2)
        rounds = default and all(aval.dtype == np.float32 for aval in ctx.avals_in)

        def product(lhs, rhs):
            if rounds:
                lhs, rhs = (jax.lax.reduce_precision(x, 8, 7) for x in (lhs, rhs))
            highest = (jax.lax.Precision.HIGHEST,) * 2 if rounds else precision
            return lax_internal.dot_general_p.bind(lhs, rhs, precision=highest, **params)

        if rounds:
            return mlir.lower_fun(product, multiple_results=False)(ctx, lhs, rhs)
        return lax_internal._dot_general_lower(ctx, lhs, rhs, precision=precision, platform="cpu", **params)

    mlir.register_lowering(lax_internal.dot_general_p, dot_general, platform="cpu")

    # Which backend and device they are on, packages ask of JAX, and JAX of itself.
    def by_jax():
        return sys._getframe(2).f_globals.get("__name__", "").startswith("jax.")

    backend, device = jax.default_backend, type(jax.devices("cpu")[0])
    jax.default_backend = lambda: backend() if by_jax() else "tpu"
    platform = device.platform
    device.platform = property(lambda self: platform.__get__(self) if by_jax() else "tpu")
    device.device_kind = property(lambda self: chip.kind)
    device.num_cores = property(lambda self: 1)

    # The serving stack's kernels stand alone; their package wants a serving stack.
    if serving := os.environ.get("SERVING_SRC"):
        import importlib
        import logging
        import types

        def stub(name, **members):
            module = sys.modules[name] = types.ModuleType(name)
            module.__dict__.update(members)
            return module

        # Of which the kernels under test need nothing.
        gmm_v2 = "tokamax._src.ops.experimental.gmm_v2.gmm_v2"
        try:
            importlib.import_module(gmm_v2)
        except ImportError:
            for known in [name for name in sys.modules if name.startswith("tokamax")]:
                del sys.modules[known]
            parts = gmm_v2.split(".")
            for depth in range(1, len(parts) + 1):
                stub(".".join(parts[:depth]), __path__=[], gmm_v2=None)
        package = stub("tpu_inference")
        package.__path__ = [str(pathlib.Path(serving) / "tpu_inference")]
        package.logger = stub("tpu_inference.logger", init_logger=logging.getLogger)
        # Which TPU they are on, they ask of JAX's devices.
        jax.devices = lambda *a, of=jax.devices, **k: [types.SimpleNamespace(device_kind=chip.kind, platform="tpu", num_cores=1)]\
            if sys._getframe(1).f_globals.get("__name__", "").startswith("tpu_inference") else of(*a, **k)
        package.utils = stub("tpu_inference.utils", jax=jax, jnp=jax.numpy)
        # Of its helpers, those that stand without the serving stack.
        for node in ast.parse((pathlib.Path(serving) / "tpu_inference/utils.py").read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.Assign)):
                with contextlib.suppress(NameError, ImportError):
                    exec(compile(ast.Module([node], []), "utils.py", "exec"), package.utils.__dict__)
        package.utils.get_device_name = lambda *a: chip.kind
        # The host's devices have no place in a torus to order them by: they are a line.
        auto = jax.sharding.AxisType.Auto
        package.utils.make_optimized_mesh = lambda shape, names, devices=None: jax.make_mesh(
            shape, names, (auto,) * len(names), devices=devices)
        type(jax.devices("cpu")[0]).coords = property(lambda device: (device.id, 0, 0))
        try:
            package.envs = importlib.import_module("tpu_inference.envs")
        except ImportError as error:
            record(event="no envs", error=str(error))

    class Plugin:
        def pytest_collection_modifyitems(self, config, items):
            """At most so many variants of a test, spread over its parameters; none of those that need gigabytes, or are done."""
            done = set(json.loads(os.environ.get("PAGODA_DONE", "[]")))
            items[:] = [item for item in items if item.nodeid not in done]
            variants = int(os.environ.get("PAGODA_VARIANTS", "0"))
            families = collections.defaultdict(list)
            for item in items:
                families[re.sub(r"(\d+|_\w*?(float|int|bool)\w*)$", "", item.nodeid)].append(item)
            for family in families.values():
                step = len(family) / variants if variants and len(family) > variants else 1
                chosen = {id(family[int(at * step)]) for at in range(variants)} if step > 1 else {id(x) for x in family}
                for item in family:
                    if id(item) not in chosen or "large_array" in item.nodeid:
                        items.remove(item)

        def pytest_runtest_logstart(self, nodeid, location):
            current["test"] = nodeid
            record(event="begin")

        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                text = str(report.longrepr) if report.outcome == "failed" else ""
                if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                    text = report.longrepr[2]
                errors = [line for line in text.splitlines() if line.startswith("E  ")]
                record(event="test", outcome=report.outcome, error="\n".join(errors[:16])[:1500] or text[-300:])

    return Plugin()


class Machine:
    """The tile machine's process, which lives until it dies of a call."""

    SECONDS = 600

    def __init__(self):
        self.process = None

    def run(self, folder):
        """The report of the call in a folder."""
        if self.process is None:
            self.errors = tempfile.TemporaryFile()
            self.process = subprocess.Popen([CALL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        line = b""
        try:
            self.process.stdin.write(f"{folder}\n".encode())
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], self.SECONDS)
            if ready:
                line = self.process.stdout.readline()
            return json.loads(line)
        except (ValueError, BrokenPipeError):
            self.process.kill()
            code = self.process.wait()
            self.process = None
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines()
            if code == -9 and not line:
                return {"got": "decoded", "fault": "time", "error": f"it does not end within {self.SECONDS} s"}
            return {"got": "panic", "error": (said or ["?"])[-1][:300], "rc": code}


class Meeting:
    """Where the devices of a call meet: each brings its operands, the last runs them all."""

    def __init__(self, condition):
        self.condition = condition
        self.calls, self.count = {}, collections.Counter()

    def meet(self, module, devices, me, operands, run):
        with self.condition:
            self.count[module, me] += 1
            call = self.calls.setdefault((module, self.count[module, me]), {})
            call[me] = operands
            if len(call) == devices:
                try:
                    call["results"] = run([call[at] for at in range(devices)])
                except Exception as error:
                    call["error"] = error
                self.condition.notify_all()
            elif not self.condition.wait_for(lambda: "results" in call or "error" in call, timeout=900):
                call["error"] = RuntimeError(f"device {me} waits for others")
            if "error" in call:
                raise RuntimeError(str(call["error"]))
            return call["results"][me]


def inside(arguments):
    """The process of one file's tests."""
    import pytest

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # What the tests compare with rounds where it says so, as a TPU's does.
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_allow_excess_precision=false"]
    if any("distributed" in argument or "all_gather" in argument for argument in arguments):
        flags.append(f"--xla_force_host_platform_device_count={DEVICES}")
        # A device's callback waits for all others, on one of XLA's threads; copies of large operands want more of them.
        os.environ.setdefault("NPROC", str(8 * DEVICES))
    os.environ["XLA_FLAGS"] = " ".join(flags)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--noconftest", "--import-mode=importlib", "--tb=short", *arguments], plugins=[plugin()]))


def cause(error):
    """The kind of an error, without its numbers and places."""
    error = re.sub(r"\(at .*", "", error or "")
    error = re.sub(r"kernel `[^`]*`: ", "", error)
    error = re.sub(r"\s+", " ", error)
    found = re.search(r"(tpu|arith|math|vector|memref|scf|cf)\.\w+: (the tile machine does not know|\()", error)
    if found:
        op = found.group(0).split(":")[0]
        return f"{op}: not known" if "know" in found.group(0) else f"{op}: form not supported"
    return re.sub(r"\d+", "N", error)[:110]


# Tests that look at the compiler, not at values: what it refuses, what it fuses, what memory it takes.
OF_COMPILER = re.compile(r"(MosaicError|Exception) not raised|Regex didn't match|fused_computation|: \d{6,} != 0")
# Results in bf16 that are to be equal, of sums in f32 whose order differs (23 of 4 million elements are the next number); one
# element of a right operand in bf16 (so one column of results) whose `tanh` lies between two numbers; and products of products, whose
# reference leaves it to a TPU's product of f32 to round what is between (products in f64, rounded there, give the kernel's numbers).
# So it is with splash attention's backward pass, one of whose 131,072 elements differs: 0.20897 of 0.18227, and 0.20891 in f64.
# And f8 codes to the bit, of a scale that XLA's CPU multiplies by 1/448 where the kernel divides (NumPy gives the kernel's codes).
ROUNDED = re.compile(r"ExcessPrecisionTest::test_matmul_(f32_out_fused_downcast|out_bf16_with)|rhs_transpose_add_transpose"
                     r"|FusibleMatmulTest::test_dot_(transpose_)?dot_fusion|SplashAttentionTest::test_splash_attention_bwd38$"
                     r"|RopeQuantTest::test_matches_reference")
# Tests of kernels that are wrong on purpose; and JAX's test of the barrier semaphore, which waits for its left neighbour and signals
# the right one, whether or not that has entered the kernel: a race, and named as one. And tpu-inference's GDN v3 with speculative
# tokens, which takes the size of a DMA from behind the end of a table in SMEM; and its grouped matmul of sizes that are not whole
# tiles, which takes zeros of the weight for what lies in the padding of x, but what lies there of x as it is: here a NaN.
# And JAX's copy with signals between cores, whose 16 subcores copy a row each of 8.
INTENDED = re.compile(r"test_copy_with_cross_core_signaling|vmem_oom|test_vmem_limit|disable_bounds_check|RemoteDMATest::test_barrier_semaphore$"
                      r"|gdn_attention_v3_test.*test_spec_mode_checkpoints"
                      r"|GmmTest::test_gmm_implicit_padding")
# Kernels of tpu-inference with a race that is named and then ignored, so that their values are compared, with DMAs early.
# - The fused MoE: a local copy of an expert's results signals a semaphore that is waited for when all experts are done, and the
#   second expert after it writes over them.
# - The fused GDN, decoding and recurrent: the state of the next block (sequence) is fetched into the buffer whose store, begun one
#   block before, is waited for one block later.
# - The compressed cache's store (and Pallas's pipeline of buffers that are input and output): a block is copied into the buffer whose
#   copy out has not been waited for.
# - MLA v2: the word that holds the last old keys of f8 and the first new ones is written while the fetch of the next queries' old keys,
#   which ends with that word, flies.
# - RPA v3 with context parallelism: new keys are shuffled into one buffer for both sets of KV buffers, while the copy of the other
#   set flies from it.
# - MLA with a sliding window: each block of queries copies the new keys to the cache, the same ones, while the copy before flies.
# Of JAX:
# - The reduce-scatter of a SparseCore's two programs: a device writes to its neighbour's rows for the second time when nothing has
#   said that the neighbour is done with the first.
# And of sglang-jax (besides its fused MoE, whose gathers for two buffers share a semaphore):
# - The fused GDN, which is tpu-inference's.
# - The gated linear attention: the state of a dummy sequence is fetched while the store of the dummy before it flies to the same slot.
RACES = re.compile(r"test_mpmd_reduce_scatter|fused_moe_v[12]_test|fused_gdn_kernel_test|mla_swa_test|compress_store_test"
                   r"|ragged_paged_attention_kernel_cp_test|mla_v2_test"
                   r"|gdn_fused_chunk_parallel_prefill|simple_gla_fused_test.*mixed_init_and_dummy")


def kind(name, test):
    """What became of a test whose kernels all ran."""
    error = test.get("error") or ""
    if test["outcome"] == "passed":
        return "agree"
    if OF_COMPILER.search(error):
        return "of the compiler"
    worst = {of: float(found.group(1)) for of in ("absolute", "relative")
             if (found := re.search(rf"Max {of} difference[^:]*: ([0-9.e+-]+|nan|inf)", error))}
    # XLA's CPU lacks a product that the test compares with.
    if "UNIMPLEMENTED: Unsupported element type for DotThunk" in error:
        return "without a reference"
    # The sums of f32 in another order, or one rounding less.
    if worst.get("relative", 1) < 1e-5 or worst.get("absolute", 1) < 2e-4 or ROUNDED.search(name):
        return "close"
    return "wrong" if test["outcome"] == "failed" else test["outcome"]


def tested(records, failed):
    """The tests that need not be run again: of those that were, all or the ones that passed."""
    outcomes = {}
    for line in records.read_text().splitlines() if records.exists() else []:
        event = json.loads(line)
        if event["event"] == "test":
            outcomes[event["test"]] = event["outcome"]
    return sorted(test for test, outcome in outcomes.items() if not failed or outcome != "failed")


def summary(records):
    # Of a test that was run again, the last time counts.
    attempts = {}
    for line in (line for path in records for line in path.read_text().splitlines()):
        event = json.loads(line)
        if event["event"] == "begin":
            attempts[event["test"]] = []
        else:
            attempts.setdefault(event["test"], []).append(event)
    calls, tests, lowered = {}, {}, {}
    not_lowered = collections.Counter()
    for event in (event for events in attempts.values() for event in events):
        match event["event"]:
            case "lowered":
                lowered.setdefault(event["module"], event)
            case "run":
                known = calls.setdefault(event["module"], event)
                if known["got"] == "ran" and event["got"] != "ran":
                    calls[event["module"]] = event
            case "not lowered":
                not_lowered[cause(event["error"])] += 1
            case "test":
                tests[event["test"]] = {**event, "calls": tests.get(event["test"], {}).get("calls", [])}
        if event["event"] == "run":
            tests.setdefault(event["test"], {"outcome": "?"}).setdefault("calls", []).append(event)
    got = collections.Counter(call["got"] for call in calls.values())
    print(f"modules: {len(lowered)} lowered, {len(calls)} called, {sum(got.values()) - got['nowhere'] - got['panic']} opened,"
          f" {got['decoded'] + got['ran']} decoded, {got['ran']} run; panics: {got['panic']}")
    ignored = collections.Counter(kind for call in calls.values() for kind in call.get("ignored", []))
    print(f"  of those that ran, with these faults ignored: {dict(ignored)}")
    races = sorted({call["kernel"] for call in calls.values() if call.get("race")})
    print(f"  of those that ran, with a race that was named: {races}")
    judged = {name: test for name, test in tests.items() if test.get("calls") and not INTENDED.search(name)}
    ran = {name: test for name, test in judged.items() if all(call["got"] == "ran" for call in test["calls"])}
    kinds = collections.Counter(kind(name, test) for name, test in ran.items())
    aside = kinds["of the compiler"] + kinds["without a reference"]
    values = len(judged) - aside
    right = kinds["agree"] + kinds["close"]
    print(f"tests of a kernel's values: {values}; all of their kernels run: {len(ran) - aside};"
          f" agree: {right} ({100 * right / max(1, values):.1f}%), of them {kinds['close']} to rounding; wrong: {kinds['wrong']};"
          f" not judged: {kinds['of the compiler']} of the compiler, {kinds['without a reference']} whose reference XLA's CPU has not")
    print("\nmodules that do not run, by cause:")
    causes = collections.Counter(cause(call.get("error")) for call in calls.values() if call["got"] != "ran")
    for what, many in causes.most_common():
        print(f"  {many:4}  {what}")
    print("\ntests whose kernels run and that fail:")
    for name, test in sorted(ran.items()):
        if kind(name, test) in ("wrong", "close"):
            first = (test.get("error") or "").replace("\n", " ")[:200]
            print(f"  {kind(name, test)}: {name.split('::', 1)[-1]}: {first}")
    print("\nnot lowered by JAX:")
    for what, many in not_lowered.most_common(15):
        print(f"  {many:4}  {what}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=pathlib.Path, metavar="FILE", help="tests of other packages, instead of JAX's")
    parser.add_argument("--only", default="*", help="files of tests/pallas to run, a glob")
    parser.add_argument("--tests", default="", help="pytest's -k")
    parser.add_argument("--out", default=str(ROOT / "target/jax-suite"), help="where records and modules go")
    parser.add_argument("--chip", choices=CHIPS, default="v5p", help="the TPU that tests and lowerings ask about")
    parser.add_argument("--minutes", type=float, default=60, help="the most that one file may take")
    parser.add_argument("--variants", type=int, default=0, help="the most variants of one test; 0 for all")
    parser.add_argument("--summary", action="store_true", help="print the table of the records that are there")
    parser.add_argument("--again", action="store_true", help="begin anew, whatever was tested before")
    parser.add_argument("--failed", action="store_true", help="test again what did not agree")
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    if not arguments.summary:
        source = pathlib.Path(os.environ.get("JAX_SRC") or sys.exit("set JAX_SRC to a checkout of JAX 0.10.2"))
        out.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PAGODA_KEEP": str(out / "modules"), "JAX_PLATFORMS": "cpu", "PAGODA_CHIP": arguments.chip,
                       "PAGODA_VARIANTS": str(arguments.variants)}
        paths = [source / "tests/pallas" / file for file in FILES]
        if arguments.files:
            paths = [path.resolve() for path in arguments.files]
        # Kernels of vllm-project/tpu-inference, all that it tests.
        elif serving := os.environ.get("SERVING_SRC"):
            paths += sorted((pathlib.Path(serving) / "tests/kernels").glob("**/*_test.py"))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [serving, os.environ.get("PYTHONPATH")]))
        for path in paths:
            # Files of several packages have the same name.
            file = f"{path.parent.name}.{path.name}" if arguments.files else path.name
            if not fnmatch.fnmatch(file, arguments.only) or not path.exists():
                continue
            print(f"{file} ...", file=sys.stderr, flush=True)
            records = out / f"{file}.records.jsonl"
            if arguments.again:
                records.unlink(missing_ok=True)
            done = tested(records, arguments.failed)
            environment.update(PAGODA_RECORDS=str(records), PAGODA_DONE=json.dumps(done))
            more = ["-k", arguments.tests] if arguments.tests else []
            command = [sys.executable, __file__, "--inside", str(path), *more]
            try:
                with open(out / f"{file}.log", "a") as log:
                    subprocess.run(command, env=environment, cwd=path.parent, stdout=log, stderr=log, timeout=60 * arguments.minutes)
            except subprocess.TimeoutExpired:
                print(f"{file}: stopped after {arguments.minutes} minutes", file=sys.stderr)
    summary(sorted(out.glob("**/*records.jsonl")))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2:])
    else:
        main()
