#!/usr/bin/env python3
"""Regenerates the peers' static cycles that `make tpu-static` prints: benches/peers/tpu_static.json, and grid.json there.

  scripts/peers.py [--only matmul|xla|v2|v3|gmm ...] [--quick] [--jobs N] [--dir DIR]
  scripts/peers.py --grid N [--seed S] [--chip v5p|v6e ...]      the first N points of the seeded grid, v3 at each

No TPU is needed: libtpu compiles each peer for v5p, one child process per point (benches/peers/tpu_static.py), and its
static profile says how many cycles the kernel takes. Tiles are searched by climbing: from those that the file names, one
rung of one ladder up or down at a time, while that is faster. --quick measures the named tiles only. JAX's grouped matmul
is measured on v5p and v6e at the two choices of tiles that a rough model of its cycles has first. A point of the grid
(drawn as benches/common/grid.rs draws it) is measured at six choices of tiles, within the chip's default limit as
far as can be foreseen, the first with accumulators of either type; what stands around v3's kernel (rotary embedding, its own copies of q, K, V
and the output) is measured beside it.

Every measured point is kept in DIR/points (DIR: .pagoda/peers), so a run that was stopped goes on where it was; a figure
changes in the file once its search is done. libtpu is the one that `make tpu-tools` fetched; jax is installed into the
venv DIR. No registry has tpu-inference (v3): PAGODA_TPU_INFERENCE=CHECKOUT names it, and its figures stay as they are
without. The file's "from" says what a figure was measured by; one line is one figure.
"""
import argparse, json, math, os, re, signal, subprocess, sys, tempfile, threading, time, venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benches/peers/tpu_static.json"
GRID = ROOT / "benches/peers/grid.json"
CHILD = ROOT / "benches/peers/tpu_static.py"
PLUGINS = ROOT / ".pagoda/plugins"
JAX = "0.10.2"
# MiB of v5p's 64; the compiler keeps some for itself.
LARGEST = 60
SECONDS, GIB = 1800, 8  # that a point may take
# A chip's default limit, MiB; HBM bytes per cycle of a device; flop per cycle of a core (kernels/src/chips.rs).
CHIPS = {"v5p": (16, 2.765e12 / 1.75e9, 131072), "v6e": (32, 1.64e12 / 1.75e9, 524288)}

# What the bench prints: a figure's name, its peer, and the MiB of VMEM that its kernel may take; the least first, for a
# search with more room starts at what was found with less, too.
PRODUCT_FIGURES = [("xla", "xla", LARGEST), ("pallas_16mib", "pallas", 16), ("pallas_any", "pallas", LARGEST)]
BATCH_FIGURES = [("v2_16mib", "v2", 16), ("v2_any", "v2", LARGEST), ("v3_16mib", "v3", 16), ("v3_any", "v3", LARGEST),
                 ("v3_f32_16mib", "v3_f32", 16)]
ONLY = {"matmul": {"xla", "pallas"}, "gmm": {"gmm"}, "xla": {"xla"}, "v2": {"v2"}, "v3": {"v3", "v3_f32"}}


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
    """How the peer's ops start in libtpu's reports; of a program of XLA's own, all count."""
    if "lengths" not in shape and peer.startswith("v3"):  # its other launch is idle
        return "RPAd-" if shape["q_len"] == 1 else "RPAm-"
    return {"pallas": "matmul", "gmm": "gmm", "v2": "ragged_paged_attention_kernel", "v3": "RPA", "v3_f32": "RPA", "v3_hd64": "RPA"}.get(peer, "")


def read_reports(folder, name):
    """{op: [cycles, MiB]} of the ops whose names start with `name`; None where libtpu wrote none."""
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
                taken[op] = round(sum(blocks) / 2**20, 2)
    ops = [op for op in dict.fromkeys([*cycles, *taken]) if op.startswith(name)]
    return {op: [cycles.get(op), taken.get(op)] for op in ops}


# What takes no time of its own in a program of XLA's.
FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all"}


def program_cycles(folder, rate):
    """{"cycles", "unknown"} of a program of XLA's: each op's estimate, as often as libtpu says that it is there. One that it
    has no estimate of (`dma-general`, where it dies) counts as the bytes that pass at the memory's rate: "unknown" of them."""
    estimates = {}
    for path in sorted(folder.glob("*_static_llo_profile.textproto")):
        for op, count, times in re.findall(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)\s+num_equivalent_hlos: (\d+)[^}]*}',
                                           path.read_text()):
            estimates[op] = (int(count), int(times))
    programs = sorted(folder.glob("*-TLP-hlo.txt"))
    if not programs:
        return None
    entry = programs[-1].read_text(errors="replace").split("\nENTRY ")[1].split("\n}")[0]
    ops = re.findall(r"^  (?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, |$)", entry, re.M)
    types = {name: kind for name, kind, _, _ in ops}

    def size(kind):
        total = 0
        for element, dims, order, tile in re.findall(r"([a-z]+\d+)\[([\d,]*)\](?:{([\d,]*)(?::T\(([\d,]+)\))?)?", kind):
            sizes = [int(of) for of in dims.split(",") if of]
            minor = [sizes[int(at)] for at in order.split(",")] if order else sizes[::-1]
            for at, unit in enumerate(int(of) for of in tile.split(",")[::-1]) if tile else ():
                if at < len(minor):
                    minor[at] = -(-minor[at] // unit) * unit
            total += int(math.prod(minor) * int(re.search(r"\d+", element)[0]) / 8)
        return total

    cycles = sum(count * times for count, times in estimates.values())
    # An estimate speaks for equal ops, too.
    spoken = [(types.get(op), times - 1) for op, (_, times) in estimates.items() if times > 1]
    unknown = []
    for name, kind, opcode, operands in ops:
        if opcode in FREE or name in estimates:
            continue
        equal = next((at for at, (its, left) in enumerate(spoken) if its == kind and left), None)
        if equal is not None:
            spoken[equal] = (kind, spoken[equal][1] - 1)
            continue
        passed = size(kind) + sum(size(types.get(of, "")) for of in re.findall(r"%([\w.-]+)", operands))
        unknown.append(round(passed / rate))
    return {"cycles": cycles + sum(unknown), "mib": None, "unknown": [len(unknown), sum(unknown)]}


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
        return self.points("v5p", case, shape, [(peer, tiles)])[0]

    def points(self, chip, case, shape, asked):
        """As `point`, of several peers and tiles of one case, in one child as far as it lives. What has several launches
        has "ops" beside: {name: [cycles, mib]}."""
        def kept(peer, tiles):
            words = json.dumps(tiles, separators=(",", ":")) if isinstance(tiles, dict) else "x".join(map(str, tiles))
            versions = [self.version(peer), f"jax {JAX}", f"libtpu {self.libtpu_version}"]
            name = "_".join(tag for tag in [peer, case, re.sub(r"[^0-9a-z,x]", "", words), *versions] if tag)
            return self.folder / "points" / (name.replace(" ", "-") + ".json")

        results = {}
        for number, (peer, tiles) in enumerate(asked):
            if kept(peer, tiles).exists():
                results[number] = json.loads(kept(peer, tiles).read_text())
        while missing := [number for number in range(len(asked)) if number not in results]:
            start = time.monotonic()
            points = [{"peer": asked[at][0], "chip": chip, "shape": shape, "tiles": asked[at][1], "limit": LARGEST}
                      for at in missing]
            for at, result in zip(missing, self.measure(chip, points)):
                # Kept are what was compiled and what does not fit; a quieter machine, or a mended one, may do the rest.
                again = result.pop("again", False)
                results[at] = result
                if not again:
                    kept(*asked[at]).write_text(json.dumps(result))
                said = result.get("error") or f"{result['cycles']} cycles @ {result['mib']} MiB"
                say(f"  {case} {asked[at][0]} {asked[at][1]}: {said}")
            say(f"  ({time.monotonic() - start:.0f} s)")
        return [results[number] for number in range(len(asked))]

    def measure(self, chip, points):
        """Results of the first points: all, or up to the one that the child died of."""
        with tempfile.TemporaryDirectory(prefix="pagoda-peers-") as name:
            folder = Path(name)
            for part in ("dumps", "done", "tmp"):
                (folder / part).mkdir()
            peers = {point["peer"] for point in points}
            flags = ["--xla_jf_dump_to=dumps", "--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_pass_label_regex=vmem_report",
                     "--xla_jf_dump_static_llo_profile_to=dumps", "--xla_tpu_check_llo_types=false"]
            if "xla" not in peers:  # XLA places no operand in VMEM beside the kernel: what it takes is its own
                generation = "gf" if chip == "v6e" else "vf"
                flags.append(f"--xla_{generation}_vmem_memory_space_assignment=false")
            if peers & {"pallas", "gmm"}:
                flags.append(f"--xla_tpu_scoped_vmem_limit_kib={LARGEST << 10}")
            environment = dict(os.environ, TMPDIR=str(folder / "tmp"), LIBTPU_INIT_ARGS=" ".join(flags),
                               TPU_LIBRARY_PATH=str(self.libtpu.resolve()), TPU_MIN_LOG_LEVEL="3", TPU_SKIP_MDS_QUERY="1",
                               TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", TPU_ACCELERATOR_TYPE="v5p-8",
                               ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu", PYTHONDONTWRITEBYTECODE="1")
            if self.tpu_inference:
                environment["PAGODA_TPU_INFERENCE"] = str(self.tpu_inference)
            request = {"chip": chip, "points": points}
            with open(folder / "log", "wb") as log:
                child = subprocess.Popen([self.python, CHILD, json.dumps(request)], cwd=folder, env=environment,
                                         stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                self.children.add(child)
                stopped = wait(child, folder / "done")
                self.children.remove(child)
            log = (folder / "log").read_text(errors="replace")
            said = log.strip().splitlines() or [f"exit status {child.returncode}"]
            results = []
            for number, point in enumerate(points):
                done = folder / "done" / str(number)
                if done.exists():
                    error = done / "error"
                    results.append(self.result(done, point, error.read_text() if error.exists() else ""))
                elif stopped:
                    return [*results, {"error": stopped, "again": True}]
                else:  # libtpu may die after it has written its reports
                    return [*results, self.result(folder / "dumps", point, said[-1][:300])]
            return results

    def result(self, folder, point, error):
        if point["peer"] in ("before", "after"):
            rate = CHIPS[point["chip"]][1]
            return program_cycles(folder, rate) or {"error": (error or "libtpu wrote no program").strip()[-300:], "again": True}
        if "RESOURCE_EXHAUSTED" in error:
            needs = re.search(r"(Scoped allocation with size|Used) \S+ (and limit|of) \S+", error)
            return {"error": f"does not fit: {needs[0] if needs else 'RESOURCE_EXHAUSTED'}"}
        peer = point["peer"]
        ops = read_reports(folder, kernel_name(peer, point["shape"]))
        cycles, taken = ([of[at] for of in ops.values() if of[at] is not None] for at in (0, 1))
        if not cycles or (not taken and peer not in ("xla", "before", "after")):
            lines = error.strip().splitlines() or ["libtpu wrote no estimate"]
            return {"error": lines[-1][:300], "again": bool(error)}
        launches = {op: of for op, of in ops.items() if of[0] is not None}
        several = {"ops": launches} if len(launches) > 1 else {}
        return {"cycles": sum(cycles), "mib": max(taken) if taken else None, **several}


def wait(child, done):
    """Waits for a child within its limits, the time for each point anew; says what it ran out of."""
    deadline, count = time.monotonic() + SECONDS, 0
    while child.poll() is None:
        time.sleep(0.2)
        if (finished := len(list(done.iterdir()))) > count:
            deadline, count = time.monotonic() + SECONDS, finished
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


def write(file, data):
    # Innermost objects, the figures, on one line each.
    text = re.sub(r"{[^{}]*}", lambda object: " ".join(object[0].split()), json.dumps(data, indent=1))
    new = file.with_suffix(".new")
    new.write_text(text + "\n")
    os.replace(new, file)


# A chip's matrix units: how many a core has, their side; its cores; what a copy takes beside its bytes, and bytes of it a cycle.
UNITS = {"v5p": (4, 128, 2, 678, 1236), "v6e": (4, 256, 1, 557, 772)}


def group_tiles(shape, chip, limit):
    """Two choices of the grouped matmul's tiles that should fit, those of which the model below expects least."""
    m, k, n, sizes = (shape[name] for name in ("m", "k", "n", "sizes"))
    units, side, cores, latency, rate = UNITS[chip]
    ends = [sum(sizes[:at + 1]) for at in range(len(sizes))]
    groups = [(end - size, end) for end, size in zip(ends, sizes) if size]

    def parts(size):
        return [part for part in range(128, size, 128) if size % part == 0 or part % 512 == 0] + [size]

    def cost(tiles):
        tm, tk, tn = tiles
        visits = sum(-(-end // tm) - first // tm for first, end in groups)
        steps = -(-n // tn) * visits * -(-k // tk) / (cores if -(-n // tn) > 1 else 1)
        work = -(-tk // side) * -(-tn // side) * max(tm, 0.67 * side) / units + 0.6 * tm * tn / 1024 + 300
        copy = latency + max(tk * tn, tm * tk if tk < k else 0) * 2 / rate
        return steps * max(work, (work + copy) / 2)

    rows = [rows for rows in (8, 16, 32, 64, 128, 256, 512, 1024) if m % rows == 0]
    choices = [(tm, tk, tn) for tm in rows for tk in parts(k) for tn in parts(n)
               if 2 * 2 * (tm * tk + tk * tn + tm * tn) + 8 * tm * tn <= 0.9 * limit * 2**20]
    choices.sort(key=cost)
    # No more than two of as many rows.
    fair = [of for of in choices if [other for other in choices if other[0] == of[0]].index(of) < 2]
    return fair[:2]


def run_groups(peers, options):
    """JAX's grouped matmul within each chip's default limit."""
    data = json.loads(FILE.read_text())
    for case in data["groups"]:
        for chip in options.chip or CHIPS:
            if options.case and case["name"] not in options.case:
                continue
            limit = CHIPS[chip][0]
            tiles = group_tiles(case["shape"], chip, limit)
            results = peers.points(chip, f"groups-{chip}-{case['name']}", case["shape"], [("gmm", list(of)) for of in tiles])
            found = [(result["cycles"], result["mib"], of) for result, of in zip(results, tiles) if "cycles" in result]
            found = [of for of in found if of[1] <= limit]
            if not found:
                say(f"{case['name']} on {chip}: nothing fits")
                continue
            cycles, mib, best = min(found)
            case["figures"][chip] = {"cycles": cycles, "mib": mib, "tiles": list(best), "peer": peers.version("gmm"),
                                     "libtpu": peers.libtpu_version, "from": "scripts/peers.py", "points": len(found)}
            say(f"{case['name']} on {chip}: {cycles} at {best}")
            write(FILE, data)


class Choices:
    """The numbers that a case is drawn from (kernels/src/choices.rs): SplitMix64 of a seed."""

    def __init__(self, seed):
        self.state = seed

    def within(self, first, last):
        mask = (1 << 64) - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        mixed = ((self.state ^ (self.state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        return first + (((mixed ^ (mixed >> 31)) * (last - first + 1)) >> 64)

    def one_of(self, values):
        return values[self.within(0, len(values) - 1)]


KINDS = ["prompt", "chunk", "decode", "mixed"]
HEADS = [(8, 1), (16, 2), (28, 4), (32, 8), (40, 8), (64, 8), (16, 16), (48, 8)]


def grid_point(seed, index):
    """Sizes and lengths of a point, as benches/common/grid.rs draws them; tests/peers.rs compares."""
    choices = Choices(seed << 32 | index)
    kind = KINDS[index % 4]
    q_heads, kv_heads = HEADS[(seed + index + index // 8) % 8]  # each with each kind in 32 points
    head_dim, page = choices.one_of([128, 64, 256]), choices.one_of([128, 16, 32, 64, 256])

    def prompts(most, rows, longest):
        count = choices.within(1, most)
        drawn = [(choices.within(rows // 16, rows // count), choices.within(0, longest)) for _ in range(count)]
        return [[q_len, q_len + context] for q_len, context in drawn]

    def decode(most, longest):
        return [[1, choices.within(100, longest)] for _ in range(choices.within(4, most))]

    lengths = {
        "prompt": lambda: prompts(4, 1024, 0),
        "chunk": lambda: prompts(2, 512, 3000),
        "decode": lambda: decode(32, 4000),
        "mixed": lambda: [*decode(16, 2000), *prompts(2, 256, 500)],
    }[kind]()
    longest = max(kv_len for _, kv_len in lengths)
    return kind, {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page, "lengths": lengths,
                  "max_seqs": len(lengths), "pages_per_seq": -(-longest // page),
                  "tokens": -(-sum(q_len for q_len, _ in lengths) // 8) * 8}


def grid_tiles(shape, chip):
    """Candidates of v3's mixed launch and of its decode launch, rows and tokens fetched, then computed at a time: six,
    which should stay within the chip's default limit where as many do."""
    heads, page = shape["kv_heads"], shape["page_size"]
    group, dim = shape["q_heads"] // heads, -(-shape["head_dim"] // 128) * 128
    group += group % 2
    longest_q = max(q_len for q_len, _ in shape["lengths"])
    longest_kv = max(kv_len for _, kv_len in shape["lengths"])
    packed = shape["head_dim"] == 64  # a token's K and V share 128 lanes

    def tiles(rows, fetched, computed):
        queries = max(1, rows // (1 << (group - 1).bit_length()))
        while queries >= 2 * longest_q:
            queries //= 2
        fetched = min(max(fetched, page), -(-longest_kv // page) * page)
        computed = min(max(computed, page), fetched)
        return (queries, fetched, queries, computed if fetched % computed == 0 else fetched)

    def mib(tiles):
        queries, fetched, _, computed = tiles
        rows = queries * group
        kv = 2 * fetched * (heads + heads % 2 if packed else 2 * heads + 2) * dim * 2
        return 1.1 * (kv + heads * rows * (8 * dim + 4 * (256 + dim)) + 24 * rows * computed) / 2**20

    def chosen(ladder):
        candidates = list(dict.fromkeys(tiles(*rungs) for rungs in ladder))
        limit = CHIPS[chip][0]
        inside = [of for of in candidates if mib(of) <= limit][:6]
        beyond = [of for of in candidates if limit < mib(of) <= LARGEST]
        return inside + beyond[:6 - len(inside)]

    mixed = [(256, 512, 256), (256, 512, 512), (512, 256, 256), (512, 512, 256), (128, 512, 512), (512, 512, 512),
             (128, 1024, 512), (512, 128, 128), (256, 256, 256), (128, 256, 256), (1024, 256, 256), (64, 512, 512),
             (64, 256, 256), (128, 128, 128), (64, 128, 128), (32, 256, 256), (32, 128, 128)]
    decode = [(1, size, size) for size in (512, 1024, 256, 768, 1536, 2048, 384, 128, 640, 3072, 4096)]
    return chosen(mixed), chosen(decode)


def measure_grid(peers, chip, seed, index):
    """The figures of a point: v3's best within the chip's default limit and within any, and what stands around it."""
    kind, shape = grid_point(seed, index)
    case = f"grid-{chip}-{seed}-{index}"
    mixed, decode = grid_tiles(shape, chip)
    if kind == "decode":
        mixed = []
    elif kind != "mixed":
        decode = []
    if shape["head_dim"] == 64:  # one launch
        candidates = [("v3_hd64", [queries, tokens]) for queries, tokens, *_ in mixed or [(8, *of[1:]) for of in decode]]
        if mixed and decode:
            candidates += [("v3_hd64", [mixed[0][0], tokens]) for _, tokens, *_ in decode[:2]]
        candidates = [(peer, list(tiles)) for peer, tiles in dict.fromkeys((peer, tuple(tiles)) for peer, tiles in candidates)]
    else:
        count = max(len(mixed), len(decode))
        pairs = [{name: list(of[at % len(of)]) for name, of in (("decode", decode), ("mixed", mixed)) if of}
                 for at in range(count)]
        # Accumulators in f32, which is faster as a rule; in bf16 where it is not.
        candidates = [("v3_f32", pair) for pair in pairs] + [("v3", pairs[0])]
    around = [("before", []), ("after", [])]
    *results, before, after = peers.points(chip, case, shape, [*candidates, *around])
    if candidates[-1][0] == "v3" and results[-1].get("cycles", float("inf")) < results[0].get("cycles", float("inf")):
        others = [("v3", pair) for _, pair in candidates[1:-1]]
        candidates += others
        results += peers.points(chip, case, shape, others)

    limit, _, flop_rate = CHIPS[chip]
    # No core multiplies faster: an estimate below that lost count of a loop.
    seen = sum(q_len * (kv_len - (q_len - 1) / 2) for q_len, kv_len in shape["lengths"])
    least = 4 * shape["head_dim"] * shape["q_heads"] * seen / flop_rate

    def best(limit):
        """Of each launch the best tiles on their own."""
        launches = {}
        for (peer, tiles), result in zip(candidates, results):
            if result.get("cycles", 0) < least:
                continue
            for op, (cycles, mib) in result.get("ops", {"RPA": [result["cycles"], result["mib"]]}).items():
                launch = "decode" if op.startswith("RPAd") else "mixed" if op.startswith("RPAm") else "both"
                its = tiles[launch] if isinstance(tiles, dict) and launch in tiles else None if isinstance(tiles, dict) else tiles
                known = launches.get(launch)
                mib = mib or 0  # an idle one may take none
                if mib <= limit and (not known or cycles < known["cycles"]):
                    launches[launch] = {"cycles": cycles, "mib": mib, "tiles": its, "peer": peer}
        wanted = 1 if shape["head_dim"] == 64 else 2
        if len(launches) < wanted:
            return None
        return {"cycles": sum(of["cycles"] for of in launches.values()), "mib": max(of["mib"] for of in launches.values()),
                "tiles": {launch: of["tiles"] for launch, of in launches.items() if of["tiles"]},
                "peer": "/".join(sorted({of["peer"] for of in launches.values()})), "points": len(candidates)}

    around = {"before": before["cycles"], "after": after["cycles"], "without_estimate": [before["unknown"], after["unknown"]]}
    batch = ",".join(f"{q_len}/{kv_len}" for q_len, kv_len in shape["lengths"])
    sizes = {name: shape[name] for name in ("q_heads", "kv_heads", "head_dim", "page_size")}
    return {"chip": chip, "seed": seed, "index": index, "kind": kind, **sizes, "lengths": batch,
            "default_limit": best(limit), "any_limit": best(LARGEST), "around": around}


def run_grid(peers, pool, options):
    if peers.commit is None:
        sys.exit("peers: PAGODA_TPU_INFERENCE is not set: the grid is of v3")
    data = json.loads(GRID.read_text()) if GRID.exists() else {"points": []}
    versions = {"libtpu": peers.libtpu_version, "jax": JAX, "tpu_inference": peers.commit, "from": "scripts/peers.py"}
    if data["points"] and any(data.get(name) != version for name, version in versions.items()):
        sys.exit(f"peers: {GRID} is of other versions than {versions}: move it away")
    known = {(point["chip"], point["seed"], point["index"]) for point in data["points"]}
    wanted = [(chip, options.seed, index) for index in range(options.grid) for chip in options.chip or CHIPS]
    lock = threading.Lock()

    def measure(name):
        point = measure_grid(peers, *name)
        with lock:
            points = sorted([*data["points"], point], key=lambda of: (of["chip"], of["seed"], of["index"]))
            data.update(versions, points=points)
            write(GRID, data)
        best = point["default_limit"]
        say(f"grid {name[0]} {name[2]} ({point['kind']}): {best and best['cycles']} and {point['around']} around")

    failures = []
    for name, done in [(name, pool.submit(measure, name)) for name in wanted if name not in known]:
        try:
            done.result()
        except Exception as error:  # the others may be measured
            failures.append(f"{name}: {type(error).__name__}: {error}")
    if failures:
        sys.exit("peers: " + "\npeers: ".join(failures))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=ONLY, help="these peers; may be given more than once")
    parser.add_argument("--case", action="append", help="these products or batches, e.g. 1024x1024x1024 or decode8")
    parser.add_argument("--quick", action="store_true", help="measure at the tiles that the file names; no search")
    parser.add_argument("--grid", type=int, help="measure the first N points of the grid")
    parser.add_argument("--seed", type=int, default=1, help="the grid's seed")
    parser.add_argument("--chip", action="append", choices=CHIPS, help="chips of the grid; may be given more than once")
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
            if options.grid:
                run_grid(peers, pool, options)
            else:
                run(peers, pool, wanted, options)
                if "gmm" in wanted:
                    run_groups(peers, options)
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
            write(FILE, data)


if __name__ == "__main__":
    main()
