#!/usr/bin/env python3
"""Regenerates the peers' static cycles that `make tpu-static` prints: benches/peers/tpu_static.json.

  scripts/peers.py [--only matmul|xla|v2|v3 ...] [--quick] [--jobs N] [--dir DIR]

No TPU is needed: libtpu compiles each peer for v5p, one child process per point (benches/peers/tpu_static.py), and its
static profile says how many cycles the kernel takes. Tiles are searched by climbing: from those that the file names, one
rung of one ladder up or down at a time, while that is faster. --quick measures the named tiles only.

Every measured point is kept in DIR/points (DIR: .pagoda/peers), so a run that was stopped goes on where it was; a figure
changes in the file once its search is done. libtpu is the one that `make tpu-tools` fetched; jax is installed into the
venv DIR. No registry has tpu-inference (v3): PAGODA_TPU_INFERENCE=CHECKOUT names it, and its figures stay as they are
without. The file's "from" says what a figure was measured by; one line is one figure.
"""
import argparse, json, os, re, signal, subprocess, sys, tempfile, time, venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benches/peers/tpu_static.json"
CHILD = ROOT / "benches/peers/tpu_static.py"
PLUGINS = ROOT / ".pagoda/plugins"
JAX = "0.10.2"
# MiB of v5p's 64; the compiler keeps some for itself.
LARGEST = 60
SECONDS, GIB = 1800, 8  # that a child may take

# What the bench prints: a figure's name, its peer, and the MiB of VMEM that its kernel may take; the least first, for a
# search with more room starts at what was found with less, too.
PRODUCT_FIGURES = [("xla", "xla", LARGEST), ("pallas_16mib", "pallas", 16), ("pallas_any", "pallas", LARGEST)]
BATCH_FIGURES = [("v2_16mib", "v2", 16), ("v2_any", "v2", LARGEST), ("v3_16mib", "v3", 16), ("v3_any", "v3", LARGEST),
                 ("v3_f32_16mib", "v3_f32", 16)]
ONLY = {"matmul": {"xla", "pallas"}, "xla": {"xla"}, "v2": {"v2"}, "v3": {"v3", "v3_f32"}}


def say(text):
    print(f"peers: {text}", file=sys.stderr, flush=True)


def ladders(peer, shape):
    """The values that each tile is tried at."""
    if peer == "xla":
        return []
    if peer == "pallas":
        rungs = [8, 128, 256, 512, 1024, 2048, 4096]
        return [[rung for rung in rungs if shape[size] % rung == 0] for size in ("m", "n", "k")]
    if peer == "v2":
        return [[8, 16, 32, 64, 128], [1, 2, 4, 8, 12, 18, 36]]
    if shape["q_len"] == 1:
        kv = [256, 384, 512, 768, 1152, 1536, 2304, 4608]
        return [[1], kv, [1], kv]
    queries, kv = [16, 32, 64, 128, 256], [128, 256, 512, 1024, 2048]
    return [queries, kv, queries, kv]


def neighbours(tiles, peer, rungs):
    """Tiles one rung away."""
    found = []
    for at, ladder in enumerate(rungs):
        here = ladder.index(tiles[at])
        for rung in ladder[max(here - 1, 0):here] + ladder[here + 1:here + 2]:
            there = [*tiles[:at], rung, *tiles[at + 1:]]
            if peer.startswith("v3"):  # what it computes at a time divides what it fetches
                there[2:] = [min(fetched, computed) for fetched, computed in zip(there, there[2:])]
                if any(fetched % computed for fetched, computed in zip(there, there[2:])):
                    continue
            found.append(tuple(there))
    return dict.fromkeys(found)


def kernel_name(peer, shape):
    """How the peer's op starts in libtpu's reports; XLA's own dot is whatever its program consists of."""
    v3 = "RPAd-" if shape.get("q_len") == 1 else "RPAm-"
    return {"xla": "", "pallas": "matmul", "v2": "ragged_paged_attention_kernel", "v3": v3, "v3_f32": v3}[peer]


def read_reports(folder, name):
    """(cycles, MiB) of the ops whose names start with `name`; None where libtpu wrote none."""
    cycles, taken = {}, {}
    for path in sorted(folder.glob("*_static_llo_profile.textproto")):
        # An estimate without its closing brace was cut.
        for op, count in re.findall(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)[^}]*}', path.read_text()):
            cycles[op] = int(count)
    for path in sorted(folder.glob("*-vmem_report.html")):  # once per stage: the last one counts
        html = path.read_text()
        start = html.find("{", html.find("const DATA"))
        for op, report in json.JSONDecoder().raw_decode(html, start)[0]["hlo_breakdowns"].items():
            blocks = [block["block_size"] for block in report["blocks"] if block["block_type"] == "SCOPED"]
            if not op.startswith("<") and blocks:
                taken[op] = sum(blocks)
    mine = [[count for op, count in of.items() if op.startswith(name)] for of in (cycles, taken)]
    return tuple(sum(counts) if counts else None for counts in mine)


class Peers:
    """What can be measured here, and how."""

    def __init__(self, folder):
        self.folder = folder
        self.children = set()
        self.libtpu = PLUGINS / "libtpu/libtpu.so"
        version = PLUGINS / "libtpu.version"
        if not (self.libtpu.exists() and version.exists()):
            sys.exit(f"peers: no libtpu in {PLUGINS}: run make tpu-tools")
        self.libtpu_version = version.read_text().split()[0]
        self.python = folder / "bin/python"
        has = "import jax, sys; sys.exit(jax.__version__ != sys.argv[1])"
        if not self.python.exists() or subprocess.run([self.python, "-c", has, JAX], stderr=subprocess.DEVNULL).returncode:
            say(f"setting up jax {JAX} in {folder}")
            venv.create(folder, with_pip=True)
            subprocess.run([self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"jax=={JAX}",
                            "numpy"], check=True, stdout=sys.stderr)
        (folder / "points").mkdir(exist_ok=True)
        self.tpu_inference = self.commit = None
        if checkout := os.environ.get("PAGODA_TPU_INFERENCE"):
            self.tpu_inference = Path(checkout).resolve()
            describe = ["git", "-C", checkout, "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"]
            answer = subprocess.run(describe, capture_output=True, text=True)
            if answer.returncode or not (self.tpu_inference / "tpu_inference/kernels/ragged_paged_attention/v3").is_dir():
                sys.exit(f"peers: PAGODA_TPU_INFERENCE = {checkout}: not a checkout of tpu-inference: clone it there")
            self.commit = answer.stdout.strip()

    def version(self, peer):
        """Of a peer that can be measured here; None otherwise."""
        if peer.startswith("v3"):
            return self.commit and f"tpu-inference {self.commit}"
        return f"libtpu {self.libtpu_version}" if peer == "xla" else f"jax {JAX}"

    def point(self, peer, case, shape, tiles):
        """{"cycles", "mib"} of a peer at some tiles, or {"error"}; measured once."""
        tags = [peer, case, "x".join(map(str, tiles)), self.version(peer), f"jax {JAX}", f"libtpu {self.libtpu_version}"]
        kept = self.folder / "points" / ("_".join(tag for tag in tags if tag).replace(" ", "-") + ".json")
        if kept.exists():
            return json.loads(kept.read_text())
        start = time.monotonic()
        result = self.measure(peer, shape, tiles)
        # Kept are what was compiled and what does not fit; a quieter machine, or a mended one, may do the rest.
        if not result.pop("again", False):
            kept.write_text(json.dumps(result))
        said = result.get("error") or f"{result['cycles']} cycles @ {result['mib']} MiB"
        say(f"  {' '.join(map(str, [case, peer, *tiles]))}: {said} ({time.monotonic() - start:.0f} s)")
        return result

    def measure(self, peer, shape, tiles):
        with tempfile.TemporaryDirectory(prefix="pagoda-peers-") as name:
            folder = Path(name)
            (folder / "dumps").mkdir()
            (folder / "tmp").mkdir()
            flags = ["--xla_jf_dump_to=dumps", "--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_pass_label_regex=vmem_report",
                     "--xla_jf_dump_static_llo_profile_to=dumps", "--xla_tpu_check_llo_types=false"]
            if peer != "xla":  # XLA places no operand in VMEM beside the kernel: what it takes is its own
                flags.append("--xla_vf_vmem_memory_space_assignment=false")
            if peer == "pallas":
                flags.append(f"--xla_tpu_scoped_vmem_limit_kib={LARGEST << 10}")
            environment = dict(os.environ, TMPDIR=str(folder / "tmp"), LIBTPU_INIT_ARGS=" ".join(flags),
                               TPU_LIBRARY_PATH=str(self.libtpu.resolve()), TPU_MIN_LOG_LEVEL="3", TPU_SKIP_MDS_QUERY="1",
                               TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", TPU_ACCELERATOR_TYPE="v5p-8",
                               ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu", PYTHONDONTWRITEBYTECODE="1")
            if self.tpu_inference:
                environment["PAGODA_TPU_INFERENCE"] = str(self.tpu_inference)
            point = {"peer": peer, "shape": shape, "tiles": tiles, "limit": LARGEST}
            with open(folder / "log", "wb") as log:
                child = subprocess.Popen([self.python, CHILD, json.dumps(point)], cwd=folder, env=environment,
                                         stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                self.children.add(child)
                stopped = wait(child)
                self.children.remove(child)
            if stopped:
                return {"error": stopped, "again": True}
            log = (folder / "log").read_text(errors="replace")
            if "RESOURCE_EXHAUSTED" in log:
                needs = re.search(r"(Scoped allocation with size|Used) \S+ (and limit|of) \S+", log)
                return {"error": f"does not fit: {needs[0] if needs else 'RESOURCE_EXHAUSTED'}"}
            # libtpu may die after it has written its reports.
            cycles, taken = read_reports(folder / "dumps", kernel_name(peer, shape))
            if cycles is None or (taken is None and peer != "xla"):
                said = log.strip().splitlines() or [f"exit status {child.returncode}"]
                return {"error": said[-1][:300], "again": True}
            return {"cycles": cycles, "mib": taken and round(taken / 2**20, 2)}


def wait(child):
    """Waits for a child within its limits; says what it ran out of."""
    deadline = time.monotonic() + SECONDS
    while child.poll() is None:
        time.sleep(0.2)
        try:
            pages = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue  # it has just ended
        over_time = time.monotonic() > deadline
        if over_time or pages * os.sysconf("SC_PAGE_SIZE") > GIB << 30:
            child.kill()
            child.wait()
            return f"not done after {SECONDS} s" if over_time else f"took more than {GIB} GiB of memory"
    return None


def search(peers, pool, peer, limit, case, shape, starts, quick):
    """The fastest tiles within `limit` MiB that climbing finds, and how many it looked at; None if nothing fits."""
    rungs = ladders(peer, shape)
    if not starts and rungs and quick:
        return None
    starts = starts or [tuple(ladder[len(ladder) // 2] for ladder in rungs)]
    rungs = [sorted({*ladder, *known}) for ladder, known in zip(rungs, zip(*starts))]

    def cost(tiles):
        """What does not fit comes after what does, and the larger the later."""
        point = peers.point(peer, case, shape, tiles)
        if "error" in point:
            return float("inf"), float("inf")
        return max(0, (point["mib"] or 0) - limit), point["cycles"]

    seen = {tiles: cost(tiles) for tiles in starts}
    tiles = min(seen, key=seen.get)
    while not quick:
        new = [there for there in neighbours(tiles, peer, rungs) if there not in seen]
        seen.update(zip(new, pool.map(cost, new)))
        best = min(seen, key=seen.get)
        if best == tiles:
            break
        tiles = best
    return None if seen[tiles][0] > 0 else (tiles, len(seen))


def write(data):
    # Innermost objects, the figures, on one line each.
    text = re.sub(r"{[^{}]*}", lambda object: " ".join(object[0].split()), json.dumps(data, indent=1))
    new = FILE.with_suffix(".new")
    new.write_text(text + "\n")
    os.replace(new, FILE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=ONLY, help="these peers; may be given more than once")
    parser.add_argument("--case", action="append", help="these products or batches, e.g. 1024x1024x1024 or decode8")
    parser.add_argument("--quick", action="store_true", help="measure at the tiles that the file names; no search")
    parser.add_argument("--jobs", type=int, default=1, help="children at once, some GiB and a core each")
    parser.add_argument("--dir", type=Path, default=ROOT / ".pagoda/peers", help="venv and measured points")
    options = parser.parse_args()
    wanted = set().union(*(ONLY[name] for name in options.only or ONLY))
    peers = Peers(options.dir.resolve())
    if peers.commit is None and wanted & ONLY["v3"]:
        say("PAGODA_TPU_INFERENCE is not set: the figures of v3 stay as they are")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            run(peers, pool, wanted, options)
        finally:
            for child in list(peers.children):
                child.kill()
            pool.shutdown(cancel_futures=True)


def run(peers, pool, wanted, options):
    data = json.loads(FILE.read_text())
    cases = [(case, PRODUCT_FIGURES) for case in data["products"]] + [(case, BATCH_FIGURES) for case in data["batches"]]
    for case, figures in cases:
        name, shape = case["name"], case["shape"]
        for figure, peer, limit in figures:
            if peer not in wanted or not peers.version(peer) or (options.case and name not in options.case):
                continue
            old = case["figures"].get(figure)
            was = old["cycles"] if old else "none"
            less = [case["figures"].get(other) for other, its, room in figures if its == peer and room <= limit]
            starts = dict.fromkeys(tuple(known["tiles"]) for known in less if known and known["tiles"])
            found = search(peers, pool, peer, limit, name, shape, starts, options.quick)
            if not found:
                say(f"{name} {figure}: {'nothing fits' if starts else 'no tiles are named'}; it stays {was}")
                continue
            tiles, points = found
            point = peers.point(peer, name, shape, tiles)
            # It was measured at better tiles, that nobody wrote down; a change of method moves a figure by less.
            if old and tiles and not old["tiles"] and point["cycles"] > 1.001 * was:
                say(f"{name} {figure}: {point['cycles']} at {tiles} is the best found; it stays {was}")
                continue
            case["figures"][figure] = {
                "cycles": point["cycles"], "mib": point["mib"], "tiles": list(tiles) or None, "peer": peers.version(peer),
                "libtpu": peers.libtpu_version, "from": "scripts/peers.py", "points": points}
            say(f"{name} {figure}: {point['cycles']}, " + ("as before" if point["cycles"] == was else f"was {was}"))
            write(data)


if __name__ == "__main__":
    main()
