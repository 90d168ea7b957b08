"""How fast, how small and how hard to hurt the service is, beside what else people serve a classifier with.

    python benchmarks/serving.py compare    requests a second, times, CPU and memory, against the others
    python benchmarks/serving.py direct     against a loop without HTTP
    python benchmarks/serving.py cold       from the start of the process to the first right answer; sizes
    python benchmarks/serving.py decode     decoding, against the original's path
    python benchmarks/serving.py burn       while another process burns one of the cores
    python benchmarks/serving.py overload   five times as many requests as can be answered; pixel bombs
    python benchmarks/serving.py uploads    80 photographs of 12 megapixels at once
    python benchmarks/serving.py soak       20,000 requests, one in twenty bad
    python benchmarks/serving.py swaps      200 new models under load
    python benchmarks/serving.py term       SIGTERM under load, 20 times
    python benchmarks/serving.py all        everything, one after the other

Each prints one JSON object, whose `holds` puts each figure beside its bound and says whether it is kept.
`--quick` runs a reduced version, to check the program and nothing else; it says so. The others are what the
original is (FastAPI, an async handler, eager torch), LitServe and BentoML with our ONNX file and two workers;
all of them run at the same time and are asked in turn, by wrk. Each has a virtual environment of its own in
`--peers`, outside the repository, which is made at the first run and holds the model and the pictures too.
The network is a ResNet18 at 150 pixels of random weights with a fitted head; larger pictures are enlarged
photographs of ../shared/data/intel with grain. Only ratios compare between machines.
"""

import argparse
import io
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from contest import machine, say, spread
from rig import (ROOT, SIZES, Contender, Flood, Service, Talker, contenders, cpu_seconds, draw, enlarge, install,
                 make_bundles, median, megabytes, percentile, photographs, running, summary)

MIX = {"150": 0.6, "640": 0.25, "1080": 0.12, "12mp": 0.03}  # of sizes, where they are mixed


class Bench:
    """Options, and what all modes work with."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.quick = options, options.quick
        self.peers, self.work = options.peers, options.peers / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        install(self.peers)
        self.network = make_bundles(self.work, options.data)
        self.lists = draw(self.work, options.data)
        self.who = contenders(self.work, self.network["classes"])
        self.picture = self.pictures("150")[0].read_bytes()
        self.repeats = options.repeats or (1 if self.quick else 3)

    def pictures(self, size: str) -> list[Path]:
        """Return the pictures of a size."""
        return [Path(line) for line in self.lists[size].read_text().split("\n")]

    def start(self, name: str = "ours-int8", **words) -> Service:
        """Start one service alone."""
        return Service(self.peers, self.who[name], self.picture, **words)

    @contextmanager
    def alone(self, name: str = "ours-int8"):
        """Run one service while the block lasts."""
        service = self.start(name)
        try:
            yield service
        finally:
            service.stop()

    def mixed(self, more: tuple = ()) -> list[tuple[str, str, float]]:
        """Return files of mixed sizes for a flood, with their weights, and more of them."""
        found = [(str(path), size, share / len(self.pictures(size)))
                 for size, share in MIX.items() for path in self.pictures(size)]
        return found + list(more)


def bound(value: float, limit: float, least: bool = True) -> dict:
    """Put a figure beside its bound."""
    kept = value >= limit if least else value <= limit
    return {"value": round(float(value), 4), "at_least" if least else "at_most": limit, "pass": bool(kept)}


def at_most(value: float, limit: float) -> dict:
    """Put a figure beside the most that it may be."""
    return bound(value, limit, False)


# ---- compare

MAIN = ("ours-int8", "plain", "litserve-int8", "bentoml-int8")
SIDE_SHOW = ("ours-fp32", "litserve-fp32", "bentoml-fp32", "litserve-decode", "bentoml-decode")


def cells(bench: Bench) -> list[tuple[str, int, tuple[str, ...]]]:
    """List what is measured: a size, a number of clients, the services."""
    if bench.quick:
        return [(size, 8, MAIN + SIDE_SHOW) for size in ("150", "1080")] + [("12mp", 8, MAIN)]
    found = [(size, clients, MAIN + (SIDE_SHOW if clients == 8 and size in ("150", "1080") else ()))
             for size, clients in product(SIZES, (1, 8, 32))]
    return found


def same_labels(bench: Bench, services: dict[str, Service]) -> dict:
    """Compare what all say to the same pictures with what ours says with the same graph."""
    found = {}
    for size in SIZES:
        paths = bench.pictures(size)[:4 if bench.quick else 24]
        said = {name: [service.ask(path.read_bytes())[1].get("label") for path in paths]
                for name, service in services.items()}
        for name, labels in said.items():
            ours = said["ours-fp32" if name == "plain" or name.endswith("fp32") else "ours-int8"]
            found.setdefault(size, {})[name] = sum(map(str.__eq__, ours, map(str, labels))) / len(ours)
    return found


def compare(bench: Bench) -> dict:
    """Measure all services in turn."""
    table = cells(bench)
    found = {f"{size} x {clients}": {name: [] for name in names} for size, clients, names in table}
    names = list(dict.fromkeys(name for *_, names in table for name in names))
    with running(bench.peers, [bench.who[name] for name in names], bench.picture) as services:
        labels, seconds = same_labels(bench, services), bench.options.seconds
        precision = services["ours-int8"].get("/model")["precision"]
        for repeat, (size, clients, names) in product(range(bench.repeats), table):
            say(f"compare: repeat {repeat + 1}, {size}, {clients} clients")
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                run = services[name].load(bench.lists[size], clients, seconds)
                found[f"{size} x {clients}"][name].append(run | {"pss_mb": megabytes(services[name].pid)})
    same = {"same labels from the same pixels, 150": bound(min(labels["150"].values()), 1.0)}
    return {"labels_equal_to_ours": labels, "ours_int8_serves": precision, "cpu_ratios": cpu_ratios(found),
            "results": {cell: {name: summary(runs) for name, runs in rows.items()} for cell, rows in found.items()},
            "holds": hold_compare(found) | same}


def ratio(rows: dict, ours: str, theirs: str, figure: str = "per_second") -> float:
    """Return the median of the ratios, repeat by repeat."""
    pairs = [(mine[figure], other[figure]) for mine, other in zip(rows[ours], rows[theirs])]
    return median([mine / other if other else math.nan for mine, other in pairs])


def cpu_ratios(found: dict) -> dict:
    """Tell how many times our CPU time others need: it compares on a busy machine too."""
    return {cell: {name: round(ratio(rows, name, "ours-fp32" if "fp32" in name else "ours-int8", "cpu_ms"), 3)
                   for name in rows if name[:4] != "ours" and ("fp32" not in name or "ours-fp32" in rows)}
            for cell, rows in found.items()}


def hold_compare(found: dict) -> dict:
    """Compare with the bounds."""
    small, large, huge = (found.get(f"{size} x 8") for size in ("150", "1080", "12mp"))
    holds = {}
    for size, rows, least in (("150", small, 7.0), ("1080", large, 8.5), ("12mp", huge, 12.0)):
        holds[f"int8 / plain, {size}"] = bound(ratio(rows, "ours-int8", "plain"), least)
        holds[f"p99, int8 / plain, {size}"] = at_most(ratio(rows, "ours-int8", "plain", "p99_ms"), 1 / 8)
    for peer, at_small, at_large in (("litserve", 1.25, 2.0), ("bentoml", 1.4, 2.5)):
        holds[f"int8 / {peer}, 150"] = bound(ratio(small, "ours-int8", f"{peer}-int8"), at_small)
        holds[f"int8 / {peer}, 1080"] = bound(ratio(large, "ours-int8", f"{peer}-int8"), at_large)
        for size, rows in (("150", small), ("1080", large)):
            holds[f"int8 / {peer} with our decode, {size}"] = bound(
                ratio(rows, "ours-int8", f"{peer}-decode"), 1.15)
            holds[f"fp32 / {peer}, {size}"] = bound(ratio(rows, "ours-fp32", f"{peer}-fp32"), 1.0)
    return holds


# ---- direct

def direct(bench: Bench) -> dict:
    """Compare with the same work without HTTP."""
    env = {"AUTOML_CV_MODEL": str(bench.work / "int8"), "PYTHONPATH": str(ROOT), "LIST": str(bench.lists["150"])}
    talker, seconds = Talker([bench.peers / "ours/bin/python", "direct.py"], env), bench.options.seconds
    found = {"loop": [], "http x 8": [], "call": [], "http x 1": []}
    with bench.alone() as service:
        precision = service.get("/model")["precision"]
        for repeat in range(2 * bench.repeats):
            say(f"direct: repeat {repeat + 1}")
            found["loop"].append(talker(f"loop {seconds}"))
            found["http x 8"].append(service.load(bench.lists["150"], 8, seconds))
            found["call"].append(talker(f"call {seconds}"))
            found["http x 1"].append(service.load(bench.lists["150"], 1, seconds))
    talker.close()
    precisions = {run.pop("precision") for name in ("loop", "call") for run in found[name]} | {precision}
    return {"precisions": sorted(precisions), "results": {name: summary(runs) for name, runs in found.items()},
            "holds": {"http x 8 / loop": bound(ratio(found, "http x 8", "loop"), 0.92),
                      "p50, http x 1 / call": at_most(ratio(found, "http x 1", "call", "p50_ms"), 1.08)}}


# ---- cold

def run_once(bench: Bench, cpu: str) -> tuple[float, float]:
    """Return the seconds of the bare script, and its CPU seconds."""
    who, words = bench.who["litserve-int8"], ["taskset", "-c", cpu] if cpu else []
    words += [str(bench.peers / "ours/bin/python"), "once.py", str(bench.pictures("150")[0])]
    started, before = time.perf_counter(), os.times()
    with subprocess.Popen(words, env=os.environ | who.env, cwd=ROOT / "benchmarks/peers",
                          stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        seconds = time.perf_counter() - started
    after = os.times()
    return seconds, after.children_user + after.children_system - before.children_user - before.children_system


def folder_mb(folder: Path, without: tuple[str, ...] = ()) -> float:
    """Return the size of a folder's files."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files if not any(part in f"{path}|" for part in without)) / 1e6


DROPPED = ("/pip/", "/pip-", "/setuptools", "onnxruntime/transformers", "onnxruntime/quantization",
           "onnxruntime/tools", "libonnxruntime.so", "numpy/f2py", "/tests/", "/include/", ".pyi|", ".a|",
           "numpy/distutils",  # which numpy brings for Python 3.11 alone, and the image has 3.12
           "/__pycache__/", "/pkg_resources/", "/_distutils_hack/", "weights.safetensors")  # as Dockerfile


def bytecode_mb(bench: Bench) -> float:
    """Return the size of what Python compiles for a service, which is all that an image holds of that."""
    code = "import automl_cv.serve, automl_cv.leave, automl_cv.api, automl_cv.commands, jinja2"
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        subprocess.run([bench.peers / "ours/bin/python", "-c", code], env=env, check=True)
        return folder_mb(Path(folder))


def cold(bench: Bench) -> dict:
    """Measure the start, the memory after it, and what is installed."""
    names, found, idle = ("ours-int8", "ours-fp32", "plain", "litserve-int8"), {}, {}
    spent: dict[str, list[float]] = {}
    for repeat, cpu in product(range(bench.repeats), ("", "0")):
        say(f"cold: repeat {repeat + 1}, {'one core' if cpu else 'two cores'}")
        more = ", one core" if cpu else ""
        seconds, used = run_once(bench, cpu)
        found.setdefault(f"bare{more}", []).append(seconds)
        spent.setdefault(f"bare{more}", []).append(used)
        for name in names:
            service = bench.start(name, cpu=cpu)
            found.setdefault(f"{name}{more}", []).append(service.cold)
            spent.setdefault(f"{name}{more}", []).append(service.cold_cpu)
            if not cpu:
                time.sleep(1)
                idle.setdefault(name, []).append(megabytes(service.pid))
            service.stop()
    tree = folder_mb(bench.peers / "ours/lib", DROPPED) + folder_mb(ROOT / "automl_cv", DROPPED)
    sizes = {"tree_mb": tree + bytecode_mb(bench),
             **{f"{kind}_bundle_mb": folder_mb(bench.work / kind, DROPPED) for kind in ("int8", "fp32")}}
    seconds = {name: spread(values) for name, values in found.items()}
    return {"seconds": seconds, "cpu_seconds": {name: spread(values) for name, values in spent.items()},
            "idle_pss_mb": {name: spread(values) for name, values in idle.items()},
            "sizes": sizes, "holds": hold_cold(found, idle, sizes)}


def hold_cold(found: dict, idle: dict, sizes: dict) -> dict:
    """Compare with the bounds."""
    holds = {}
    for more, (other, limit) in product(("", ", one core"), (("plain", 1 / 14), ("litserve-int8", 1 / 4),
                                                             ("bare", 2.5))):
        pairs = zip(found[f"ours-int8{more}"], found[f"{other}{more}"])
        holds[f"start, int8 / {other}{more}"] = at_most(median([mine / its for mine, its in pairs]), limit)
    for other, limit in (("plain", 1 / 8), ("litserve-int8", 0.42)):
        pairs = zip(idle["ours-int8"], idle[other])
        holds[f"idle PSS, int8 / {other}"] = at_most(median([mine / its for mine, its in pairs]), limit)
    for kind in ("int8", "fp32"):
        holds[f"installed MB with model, {kind}"] = at_most(sizes["tree_mb"] + sizes[f"{kind}_bundle_mb"], 180)
    return holds


# ---- decode

def agreement(pairs: list[tuple[dict, dict]]) -> dict:
    """Compare two sets of answers."""
    gaps = [abs(a["confidence"] - b["confidence"]) for a, b in pairs if a["label"] == b["label"]]
    return {"pictures": len(pairs), "top1": sum(a["label"] == b["label"] for a, b in pairs) / len(pairs),
            "gap_mean": float(np.mean(gaps)), "gap_p99": percentile(gaps, 0.99), "gap_max": max(gaps)}


def decode(bench: Bench) -> dict:
    """Compare our decoding with the original's, and what the network makes of both."""
    env = {"AUTOML_CV_MODEL": str(bench.work / "fp32"), "PYTHONPATH": str(ROOT), "FP32": "1", "OMP_NUM_THREADS": "1",
           "LIST": str(bench.lists["150"]), "MODEL": str(bench.work / "network.pt")}
    ours = Talker([bench.peers / "ours/bin/python", "direct.py"], env)
    plain = Talker([bench.peers / "plain/bin/python", "plain_app.py", "decode"], env)
    cost, seen = {size: [] for size in ("12mp", "1080")}, []
    for size in cost:
        say(f"decode: {size}")
        for repeat, path in product(range(bench.repeats), bench.pictures(size)):
            mine, full, other = ours(f"decode {path}"), ours(f"full {path}"), plain(str(path))
            cost[size].append({"ours": mine["ms"], "full": full["ms"], "plain": other["ms"],
                               "ratio": other["ms"] / mine["ms"]})
            seen += [(mine, other, full)] if not repeat else []
    wanted = 24 if bench.quick else bench.options.pictures
    say(f"decode: {wanted} more photographs")
    for seed, (path, _) in enumerate(photographs(bench.options.data, "test", wanted)):
        file = bench.work / "one.jpg"
        file.write_bytes(enlarge(path, [(1280, 960), (1920, 1080), (2592, 1944)][seed % 3], seed))
        seen.append((ours(f"decode {file}"), plain(str(file)), ours(f"full {file}")))
    for talker in (ours, plain):
        talker.close()
    original, resized = agreement([row[:2] for row in seen]), agreement([row[::2] for row in seen])
    ratios = {size: median([row["ratio"] for row in rows]) for size, rows in cost.items()}
    return {"cpu_ms": {size: summary_short(rows) for size, rows in cost.items()}, "original": original,
            "same_resize_at_full_size": resized, "int8_gate": bench.network["int8_gate"],
            "holds": {"12mp": bound(ratios["12mp"], 6.5), "1080": bound(ratios["1080"], 3.3),
                      "top-1 agreement with the original": bound(original["top1"], 0.999),
                      "confidence from the original's, mean": at_most(original["gap_mean"], 0.01),
                      "top-1 agreement with full decoding": bound(resized["top1"], 0.999),
                      "confidence from full decoding's, mean": at_most(resized["gap_mean"], 0.01)}}


def summary_short(rows: list[dict]) -> dict:
    """Return each figure's median and ends."""
    return {name: {k: v for k, v in spread([row[name] for row in rows]).items() if k != "all"} for name in rows[0]}


# ---- burn

def burn(bench: Bench) -> dict:
    """Compare the throughput with and without another process on one core."""
    names = ("ours-int8", "plain")
    found = {name: {"quiet": [], "burnt": []} for name in names}
    with running(bench.peers, [bench.who[name] for name in names], bench.picture) as services:
        for repeat, name, state in product(range(bench.repeats), names, ("quiet", "burnt")):
            say(f"burn: repeat {repeat + 1}, {name}, {state}")
            words = ["taskset", "-c", "0", sys.executable, "-c", "while True: pass"]
            fire = subprocess.Popen(words) if state == "burnt" else None
            found[name][state].append(services[name].load(bench.lists["150"], 8, bench.options.seconds + 1))
            if fire:
                fire.kill()
                fire.wait()
    kept = {name: ratio(rows, "burnt", "quiet") for name, rows in found.items()}
    return {"results": {name: {state: summary(runs) for state, runs in rows.items()} for name, rows in found.items()},
            "kept": kept, "holds": {"throughput kept": bound(kept["ours-int8"], 0.45)}}


# ---- overload

def bomb() -> bytes:
    """Make a PNG that decodes to 400 megapixels."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    body = zlib.compress(bytes(20001) * 2000, 9) * 10
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def flooded(bench: Bench, service: Service, rate: float, seconds: float, more: tuple = ()) -> dict:
    """Ask too much for a while, and sum up what came of it."""
    probe = Flood(bench.work, port=service.port, get="/health/live", clients=1, pause=0.02, seconds=seconds)
    flood = Flood(bench.work, port=service.port, files=bench.mixed(more), rate=rate, clients=800, seconds=seconds)
    peak, end, cpu = 0.0, time.monotonic() + seconds, cpu_seconds(service.pid)
    while time.monotonic() < end:
        peak = max(peak, megabytes(service.pid))
        time.sleep(0.25)
    spent, live, seen = cpu_seconds(service.pid) - cpu, probe.wait()["records"], flood.wait()
    rows, late = seen["records"], 2.0  # the queue is full after this
    good = [row for row in rows if row["status"] == 200 and late <= row["at"] + row["seconds"] <= seconds]
    refused = [row for row in rows if row["status"] == 503 and row["at"] > late]
    statuses = {}
    for row in rows:
        key = f"{'bomb' if row['kind'] == 'bomb' else 'good'} {row['status']}"
        statuses[key] = statuses.get(key, 0) + 1
    by_size = {size: 1000 * percentile([r["seconds"] for r in refused if r["kind"] == size], 0.99) for size in MIX}
    return {"offered": len(rows) / seconds, "not_offered": seen["skipped"], "goodput": len(good) / (seconds - late),
            "statuses": statuses, "without_retry_after": sum(not row["retry"] for row in refused),
            "good_sizes": {size: sum(row["kind"] == size for row in good) for size in MIX},
            "answer_p99_ms": 1000 * percentile([row["seconds"] for row in good], 0.99),
            "refusal_p50_ms": 1000 * percentile([row["seconds"] for row in refused], 0.5),
            "refusal_p99_ms": 1000 * percentile([row["seconds"] for row in refused], 0.99),
            "refusal_p99_ms_by_size": by_size, "live_p99_ms": 1000 * percentile([r["seconds"] for r in live], 0.99),
            "live_failed": sum(row["status"] != 200 for row in live), "peak_pss_mb": peak,
            "server_cores": spent / seconds}


def overload(bench: Bench) -> dict:
    """Ask five times what can be answered, without and with pixel bombs."""
    seconds = bench.options.duration or (6 if bench.quick else 60)
    (bench.work / "bomb.png").write_bytes(bomb())
    bombs = ((str(bench.work / "bomb.png"), "bomb", 0.05),)
    with bench.alone() as service:
        calm = Flood(bench.work, port=service.port, files=bench.mixed(), clients=8, seconds=max(4, seconds / 6)).wait()
        peak = sum(row["status"] == 200 for row in calm["records"]) / calm["seconds"]
        say(f"overload: the peak is {peak:.0f}/s")
        found = {name: flooded(bench, service, 5 * peak, time, more)
                 for name, time, more in (("pictures", seconds, ()), ("with bombs", seconds / 2, bombs))}
    holds = {}
    for name, run in found.items():
        holds |= {f"goodput / peak, {name}": bound(run["goodput"] / peak, 0.95),
                  f"refusal p99 ms, {name}": at_most(run["refusal_p99_ms"], 10),
                  f"refusals without Retry-After, {name}": at_most(run["without_retry_after"], 0),
                  f"live p99 ms, {name}": at_most(run["live_p99_ms"], 25),
                  f"answers other than 200 and 503, {name}": at_most(sum(
                      count for key, count in run["statuses"].items() if key[:4] == "good"
                      and key.split()[1] not in ("200", "503")), 0)}
    return {"peak_per_second": peak, "results": found, "holds": holds}


# ---- uploads

def uploads(bench: Bench) -> dict:
    """Send 80 large photographs at once."""
    files = [(str(path), "12mp", 1.0) for path in bench.pictures("12mp")]
    runs = []
    for repeat in range(bench.repeats):
        with bench.alone() as service:
            before = peak = megabytes(service.pid)
            flood = Flood(bench.work, port=service.port, files=files, clients=80, count=80)
            while flood.process.poll() is None:
                peak = max(peak, megabytes(service.pid))
                time.sleep(0.01)
            rows = flood.wait()["records"]
        runs.append({"before_mb": before, "peak_mb": peak, "answered": sum(r["status"] == 200 for r in rows),
                     "refused": sum(r["status"] == 503 for r in rows),
                     "other": sum(r["status"] not in (200, 503) for r in rows)})
    worst = max(run["peak_mb"] for run in runs)
    return {"picture_mb": bench.pictures("12mp")[0].stat().st_size / 1e6, "results": summary(runs),
            "holds": {"peak PSS MB": at_most(worst, 256),
                      "neither answered nor refused": at_most(max(run["other"] for run in runs), 0)}}


# ---- soak

def spoil(bench: Bench) -> list[tuple[str, str, float]]:
    """Write bad uploads."""
    good, huge = self_bytes(bench, "640"), self_bytes(bench, "12mp")
    found, noise = [], random.Random(0)
    broken = bytearray(good)
    for _ in range(200):
        broken[noise.randrange(200, len(broken))] = noise.randrange(256)
    tiny = io.BytesIO()
    Image.new("RGB", (4, 4)).save(tiny, "PNG")
    for name, data in {"empty": b"", "text": b"not a picture" * 99, "cut": good[:len(good) // 3], "head": good[:300],
                       "noise": noise.randbytes(40000), "broken": bytes(broken), "bomb": bomb(), "tiny": tiny.getvalue(),
                       "large": (huge * 12)[:12 * 2**20], "gif": b"GIF89a" + noise.randbytes(500)}.items():
        path = bench.work / f"bad-{name}"
        path.write_bytes(data)
        found.append((str(path), "bad", 0.05))
    return [(path, kind, share / len(found)) for path, kind, share in found]


def self_bytes(bench: Bench, size: str) -> bytes:
    """Return one picture of a size."""
    return bench.pictures(size)[0].read_bytes()


def handles(service: Service) -> int:
    """Count the files and sockets that a service has open."""
    return len(os.listdir(f"/proc/{service.pid}/fd"))


def soak(bench: Bench) -> dict:
    """Ask for long, with bad uploads among the good."""
    total, statuses, states = 600 if bench.quick else bench.options.requests, {}, []
    files = [(str(path), "good", 0.95 / 96) for path in bench.pictures("150")] + spoil(bench)
    with bench.alone() as service:
        for part in range(10):
            say(f"soak: part {part + 1} of 10")
            for row in Flood(bench.work, port=service.port, files=files, clients=8, count=total // 10,
                             seed=part).wait()["records"]:
                key = f"{row['kind']} {row['status']}"
                statuses[key] = statuses.get(key, 0) + 1
            time.sleep(0.5)
            states.append({"pss_mb": megabytes(service.pid), "handles": handles(service)})
    warm, last = states[0], states[-1]
    wrong = sum(n for key, n in statuses.items() if key.split()[1] in ("0", "-1") or
                key.split()[1] >= "500" and key.split()[1] != "503" or key in ("bad 200", "good 400", "good 415"))
    drift = last["pss_mb"] / warm["pss_mb"] - 1
    return {"requests": sum(statuses.values()), "statuses": statuses, "states": states,
            "holds": {"wrong statuses": at_most(wrong - statuses.get("bad 200", 0), 0),
                      "memory drift after warm-up": at_most(drift, 0.05),
                      "more handles": at_most(last["handles"] - warm["handles"], 0)}}


# ---- swaps

def swaps(bench: Bench) -> dict:
    """Replace the model again and again while clients ask."""
    total = 6 if bench.quick else bench.options.swaps
    folder, versions = bench.work / "swapped", {}
    sides = [bench.work / "int8", renamed(bench)]
    place(sides[0], folder)
    who = bench.who["ours-int8"]
    service = Service(bench.peers, Contender("swapped", who.venv, who.words, who.env | {
        "AUTOML_CV_MODEL": str(folder)}), bench.picture)
    try:
        versions[service.get("/model")["version"]] = sorted(service.get("/model")["classes"])
        files = [(str(path), "good", 1.0) for path in bench.pictures("150")]
        flood = Flood(bench.work, port=service.port, files=files, clients=4, seconds=900)
        started, seen = time.monotonic(), service.get("/model")["version"]
        for turn in range(1, total + 1):
            place(sides[turn % 2], folder)
            service.process.send_signal(signal.SIGHUP)
            while (now := service.get("/model"))["version"] == seen:
                time.sleep(0.05)
            seen, versions[now["version"]] = now["version"], sorted(now["classes"])
            if turn % 20 == 0:
                say(f"swaps: {turn} of {total}")
        seconds = time.monotonic() - started
    finally:
        code = service.stop()
    rows = [row for row in flood.wait()["records"] if row["status"] != 0]  # the port closed at the end
    failed = sum(row["status"] != 200 for row in rows)
    false = sum(row["status"] == 200 and row["label"] not in versions.get(row["version"], ()) for row in rows)
    return {"swaps": total, "seconds_each": seconds / total, "requests": len(rows), "versions": len(versions),
            "exit": code, "holds": {"failed requests": at_most(failed, 0),
                                    "answers of another version than they name": at_most(false, 0)}}


def renamed(bench: Bench) -> Path:
    """Write the bundle again with other names for the classes."""
    folder = bench.work / "renamed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bench.work / "int8", folder)
    info = json.loads((folder / "model.json").read_text())
    info["classes"] = [f"new {name}" for name in info["classes"]]
    (folder / "model.json").write_text(json.dumps(info))
    return folder


def place(source: Path, folder: Path) -> None:
    """Put a bundle where another one is, as a whole."""
    fresh, old = folder.with_suffix(".fresh"), folder.with_suffix(".old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(source, fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ---- term

def term(bench: Bench) -> dict:
    """Ask it to leave while clients ask."""
    files, runs = bench.mixed(), []
    for turn in range(3 if bench.quick else bench.options.terms):
        service = bench.start()
        flood = Flood(bench.work, port=service.port, files=files, clients=8, seconds=30, seed=turn)
        time.sleep(1 + 0.05 * turn)
        service.process.terminate()
        started = time.perf_counter()
        code = service.process.wait(30)
        seconds, rows = time.perf_counter() - started, flood.wait()["records"]
        runs.append({"seconds": seconds, "exit": code, "answered": sum(row["status"] == 200 for row in rows),
                     "lost": sum(row["status"] == -1 for row in rows),
                     "other": sum(row["status"] not in (200, 503, 0, -1) for row in rows)})
        service.stop()
    return {"runs": len(runs), "results": summary(runs), "holds": {
        "lost requests": at_most(sum(run["lost"] for run in runs), 0),
        "exit other than 0": at_most(sum(run["exit"] != 0 for run in runs), 0),
        "longest exit, s": at_most(max(run["seconds"] for run in runs), 8)}}


MODES = {"compare": compare, "direct": direct, "cold": cold, "decode": decode, "burn": burn, "overload": overload,
         "uploads": uploads, "soak": soak, "swaps": swaps, "term": term}


def main() -> None:
    """Run one mode, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("mode", choices=[*MODES, "all"])
    parser.add_argument("--quick", action="store_true", help="a few requests, to check the program")
    parser.add_argument("--repeats", type=int, default=0, help="of each measurement; 3 if not given")
    parser.add_argument("--seconds", type=int, default=2, help="of each turn of compare, direct and burn")
    parser.add_argument("--duration", type=float, default=0, help="seconds of overload; 60 if not given")
    parser.add_argument("--requests", type=int, default=20_000, help="of soak")
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=300, help="of decode's agreement")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/intel")
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache/automl_cv-peers")
    options = parser.parse_args()
    options.peers = options.peers.resolve()
    bench, report = Bench(options), {"machine": machine(), "network": None, "quick": options.quick}
    report["network"] = bench.network
    for name in MODES if options.mode == "all" else [options.mode]:
        started = time.monotonic()
        report[name] = MODES[name](bench) | {"took_seconds": round(time.monotonic() - started)}
    print(json.dumps(report, indent=1, default=float))


if __name__ == "__main__":
    main()
