#!/usr/bin/env python3
"""Load on `pagoda serve`, by OpenAI's own client, over loopback: many streams at once, of random lengths, some of which go away
half-way, and some malformed requests between them. Every whole answer is compared with what `pagoda sample` yields.

    scripts/serve_load.py [--requests 10000] [--streams 200] [--seed 1] [--binary target/release/pagoda]

Then tokens/s of whole answers to requests for as many samples as there are slots, beside `pagoda sample` of the same samples in
the same slots, in turns.

Needs the package openai (`make serve-load` makes a venv). Prints one JSON object; exit code 1 if anything was lost, mixed up or
left behind.
"""
import argparse, asyncio, concurrent.futures, json, os, random, re, statistics, subprocess, sys, tempfile, threading, time
import urllib.request

import openai

MODEL = "examples/models/tiny-llama-kjv"
MOST = 64  # new tokens


def sampled(binary, case):
    """What one prompt yields under a seed."""
    flags = ["--temperature", case["temperature"], "--top-p", case["top_p"], "--seed", case["seed"]]
    command = [binary, "sample", "--json", "--model", MODEL, "--prompt", case["prompt"], "--max-new-tokens", MOST, *flags]
    return json.loads(subprocess.run([str(part) for part in command], check=True, capture_output=True).stdout)["text"]


def engine(slots):
    # A prefill call takes as long as its size, however few rows it has: `pagoda sample` would take a smaller one.
    return ["--max-seqs", str(slots), "--max-rounds", "8", "--max-seq-len", "256", "--max-prefill-size", str(8 * slots)]


def serve(binary, slots, queue):
    command = [binary, "serve", "--model", MODEL, "--port", "0", "--max-queue", str(queue), *engine(slots)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r" at (http://\S+)", line):
            threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
            return process, found[1]
    sys.exit("the server did not start")


def metric(url, name):
    text = urllib.request.urlopen(url + "/metrics").read().decode()
    return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])


def memory(process):
    """MiB that the server has resident."""
    return int(open(f"/proc/{process.pid}/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def load(url, cases, args, process):
    draw = random.Random(args.seed)
    client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=600)
    counts = dict(whole=0, streamed=0, cancelled=0, malformed=0)
    wrong, tokens, memories = [], 0, []
    plans = []
    for _ in range(args.requests):
        kind = draw.choices(["whole", "streamed", "cancelled", "malformed"], [0.25, 0.60, 0.10, 0.05])[0]
        plans.append((kind, draw.randrange(len(cases)), draw.randint(1, MOST), draw.random()))
    queue = iter(plans)

    async def one(kind, index, length, share):
        nonlocal tokens
        case = cases[index]
        body = dict(model="tiny-llama-kjv", prompt=case["prompt"], max_tokens=length, temperature=case["temperature"],
                    top_p=case["top_p"], seed=case["seed"])
        if kind == "malformed":
            body[draw.choice(["temperature", "top_p"])] = 7
            try:
                await client.completions.create(**body)
                wrong.append((kind, "was answered"))
            except openai.BadRequestError:
                counts[kind] += 1
            return
        if kind == "whole":
            answer = await client.completions.create(**body)
            text, reason = answer.choices[0].text, answer.choices[0].finish_reason
            tokens += answer.usage.completion_tokens
        else:
            stream = await client.completions.create(**body, stream=True)
            text, reason, pieces = "", None, 0
            async for piece in stream:
                text, reason = text + piece.choices[0].text, piece.choices[0].finish_reason
                pieces += 1
                if kind == "cancelled" and pieces >= 1 + share * length / 16:
                    await stream.close()
                    break
            tokens += length if kind == "streamed" else 0
        counts[kind] += 1
        # Fewer tokens are the beginning of the same text; a text that stopped is all of it.
        expected = case["text"]
        same = text == expected if reason == "stop" or length == MOST and reason else expected.startswith(text)
        if not same or (kind != "cancelled" and reason is None):
            wrong.append((kind, case["seed"], length, reason, text, expected))

    async def worker():
        for at, plan in enumerate(queue):
            try:
                await one(*plan)
            except Exception as error:  # noqa: BLE001: whatever it is, it is counted
                wrong.append((plan[0], repr(error)))
            if sum(counts.values()) % 1000 == 0:
                memories.append(round(memory(process), 1))

    started = time.monotonic()
    await asyncio.gather(*(worker() for _ in range(args.streams)))
    seconds = time.monotonic() - started
    return counts, wrong, tokens, seconds, memories


def throughput(url, args, requests=50, prompt="And the LORD said unto Moses,", length=32):
    """Tokens/s of the server and of `pagoda sample`, medians of five turns. Requests come without the client's package, which takes
    more time than the tiny model."""

    def answer(seed):
        body = dict(model="tiny-llama-kjv", prompt=prompt, max_tokens=length, temperature=0.9, seed=seed, n=args.slots)
        request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))["usage"]["completion_tokens"]

    def served():
        started = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            tokens = sum(pool.map(answer, range(requests)))
        return tokens / (time.monotonic() - started)

    def sampled():
        with tempfile.TemporaryDirectory() as folder:
            command = [args.binary, "sample", "--model", MODEL, "--prompt", prompt, "--max-new-tokens", str(length)]
            command += ["--n-generations", str(requests * args.slots), "--temperature", "0.9", "--out", folder + "/out"]
            said = subprocess.run(command + engine(args.slots), check=True, capture_output=True, text=True).stderr
        return float(re.search(r"round_avg_tok_s=(\S+)", said)[1])

    served()
    turns = [(served(), sampled()) for _ in range(5)]
    server, sample = (statistics.median(side) for side in zip(*turns))
    return dict(serve=round(server), sample=round(sample), ratio=round(server / sample, 3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--binary", default="target/release/pagoda")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    draw = random.Random(args.seed)
    words = ["And the LORD said", "Blessed are", "In the beginning", "Hear, O Israel", "Then answered", "The king"]
    cases = [dict(prompt=" ".join(draw.choices(words, k=draw.randint(1, 3))), seed=draw.randrange(1 << 32),
                  temperature=draw.choice([0, 0.7, 1.0]), top_p=draw.choice([1, 0.9])) for _ in range(args.cases)]
    for case in cases:
        case["text"] = sampled(args.binary, case)
    process, url = serve(args.binary, args.slots, max(args.streams, 4 * args.slots))
    try:
        before = memory(process)
        counts, wrong, tokens, seconds, memories = asyncio.run(load(url, cases, args, process))
        deadline = time.monotonic() + 30
        while metric(url, "pagoda_pages_used") and time.monotonic() < deadline:
            time.sleep(0.05)
        report = dict(counts=counts, wrong=len(wrong), examples=wrong[:5], seconds=round(seconds, 2),
                      tokens_per_second=round(tokens / seconds, 1), pages_used=metric(url, "pagoda_pages_used"),
                      memory_mib=dict(before=round(before, 1), during=memories, after=round(memory(process), 1)))
        report["throughput"] = throughput(url, args)
    finally:
        process.terminate()
        ended = process.wait(60)
    report["exit_code"] = ended
    print(json.dumps(report, indent=2))
    sys.exit(bool(wrong or report["pages_used"] or ended or sum(counts.values()) != args.requests))


if __name__ == "__main__":
    main()
