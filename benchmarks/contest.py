"""What the benchmarks of engine.py share: metered processes, answers to the test folder, figures, data."""

import argparse
import csv
import json
import os
import platform
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

ROOT = Path(__file__).resolve().parents[1]
CLI = [sys.executable, "-c", "from automl_cv.cli import main; main()"]
PLAIN = [sys.executable, str(ROOT / "benchmarks/plain.py")]
Answers = dict[str, tuple[str, str, float]]  # CLASS/FILE to true class, what was said, and its confidence


def say(text: str) -> None:
    """Tell a waiting person what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def machine() -> dict[str, object]:
    """Describe what the figures depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"^model name\s*: (.*)", info, re.M) or [platform.machine()]
    return {"cpu": names[0], "cores_used": len(os.sched_getaffinity(0)), "cores": os.cpu_count(),
            "avx512_bf16": "avx512_bf16" in info, "load_before": round(os.getloadavg()[0], 1)}


def spread(values: list[float]) -> dict[str, object]:
    """Return the median, the ends and all of some figures."""
    rounded = [round(float(value), 4) for value in values]
    return {"median": statistics.median(rounded), "low": min(rounded), "high": max(rounded), "all": rounded}


@contextmanager
def workspace() -> Iterator[Path]:
    """Make an empty folder and take it away."""
    with tempfile.TemporaryDirectory(prefix="engine-") as room:
        yield Path(room)


def environment(room: Path, weights: str) -> dict[str, str]:
    """Return the variables of a process that starts from nothing, with two threads and perhaps weights."""
    known = os.environ | {"AUTOML_CV_HOME": str(room / "home"), "AUTOML_CV_WEIGHTS": weights,
                          "TORCH_HOME": str(room / "torch"), "OMP_NUM_THREADS": "2"}
    known.pop("MLFLOW_TRACKING_URI", None)
    return known


@contextmanager
def metered() -> Iterator[dict[str, float]]:
    """Fill in the wall and CPU seconds of the processes that are started and waited for."""
    before, started, found = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), {}
    yield found
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["wall"] = time.monotonic() - started
    found["cpu"] = sum(after[:2]) - sum(before[:2])


def finish(process: subprocess.Popen[str], out: Path, err: Path) -> dict:
    """Wait for a process and return the JSON that it printed."""
    if process.wait():
        words, told = " ".join(process.args[-12:]), err.read_text()[-1500:]
        raise SystemExit(f"{words}\nended with {process.returncode}:\n{told}")
    text = out.read_text()
    return json.loads(text[text.index("{"):])


def call(command: list[str], room: Path, weights: str, watch: Callable | None = None) -> dict:
    """Run a command that prints JSON; return that, its cost, what it told people, and what a watcher saw."""
    out, err = room / "stdout", room / "stderr"
    with metered() as cost, out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, env=environment(room, weights), stdout=stdout, stderr=stderr,
                                   text=True)
        seen = watch(process) if watch else None
        found = finish(process, out, err)
    return found | cost | {"told": err.read_text(), "seen": seen}


def run_ours(options: argparse.Namespace, data: Path, room: Path, seconds: float, seed: int,
             watch: Callable | None = None) -> dict:
    """Run `automl-cv run` into a folder of the room and judge its bundle on the whole test folder."""
    say(f"automl-cv, {seconds:.0f} s, seed {seed}")
    words = ["--time", f"{seconds:.0f}s", "--out", str(room / "run"), "--seed", str(seed), "--json"]
    words += ["--backbone", options.backbone] if options.backbone else []
    words += ["--size", str(options.size)] if options.size else []
    found = call([*CLI, "run", str(data), *words], room, options.weights, watch)
    return found | {"answers": ask(room / "run/model", data, room),
                    "bundle": json.loads((room / "run/model/model.json").read_text())}


def run_plain(options: argparse.Namespace, data: Path, room: Path, words: list[str], seed: int = 0) -> dict:
    """Run a contender of plain.py; `answers` are its answers to the test folder."""
    say(f"plain {' '.join(words)}, seed {seed}")
    table = room / "plain.csv"
    words = [words[0], str(data), "--weights", options.weights, "--seed", str(seed), "--answers", str(table),
             *words[1:]]
    found = call([*PLAIN, *words], room, options.weights)
    return found | {"answers": read_answers(table) if table.exists() else {}}


def ask(bundle: Path, data: Path, room: Path) -> Answers:
    """Let a bundle answer the test folder in a process of its own."""
    table = room / "answers.csv"
    subprocess.run([*CLI, "predict", str(bundle), str(data / "test"), "--csv", str(table)], check=True,
                   env=environment(room, ""), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return read_answers(table)


def read_answers(table: Path) -> Answers:
    """Read the answers about each picture; a picture without one counts as wrong."""
    with table.open(newline="") as file:
        rows = [(Path(row["file"]), row["label"], row["confidence"]) for row in csv.DictReader(file)]
    return {f"{path.parent.name}/{path.name}": (path.parent.name, label, float(sure or 0))
            for path, label, sure in rows}


def judge(answers: Answers) -> dict[str, object]:
    """Return accuracy with Wilson's interval, calibration error, and the coverage at 99 % accuracy."""
    right = np.array([truth == said for truth, said, _ in answers.values()])
    sure = np.array([confidence for *_, confidence in answers.values()])
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return {"accuracy": float(right.mean()), "interval": [round(interval.low, 4), round(interval.high, 4)],
            "pictures": len(right), "calibration_error": calibration_error(sure, right),
            "coverage_at_99": coverage(sure, right)}


def calibration_error(sure: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error over bins of equal width."""
    place = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = [abs((sure[place == b] - right[place == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / len(right))


def coverage(sure: np.ndarray, right: np.ndarray, wanted: float = 0.99) -> float:
    """Return the largest share of pictures, the surest first, whose answers are that accurate."""
    order = np.argsort(-sure, kind="stable")
    accuracy = right[order].cumsum() / np.arange(1, len(right) + 1)
    return float(np.flatnonzero(accuracy >= wanted).max(initial=-1) + 1) / len(right)


def abstaining(run: dict) -> dict[str, float | None]:
    """Return what the bundle's own threshold for abstention gives on the test folder, where it has one."""
    threshold = run["bundle"].get("thresholds", {}).get("abstain")
    if threshold is None:
        return {"threshold": None}
    kept = [truth == said for truth, said, sure in run["answers"].values() if sure >= threshold]
    return {"threshold": threshold, "coverage": len(kept) / len(run["answers"]),
            "accuracy": float(np.mean(kept)) if kept else None}


def mcnemar(ours: Answers, others: Answers) -> dict[str, float]:
    """Count the pictures that one side alone gets right, with the exact test of their being as many."""
    if ours.keys() != others.keys():
        raise SystemExit("The contenders answered different pictures.")
    pairs = [(ours[name][0] == ours[name][1], others[name][0] == others[name][1]) for name in ours]
    better, worse = pairs.count((True, False)), pairs.count((False, True))
    p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return {"only_ours_right": better, "only_theirs_right": worse, "p": round(p, 4)}


def show(run: dict) -> dict[str, object]:
    """Return what a report says about one run of anybody."""
    kept = {name: round(run[name], 1) for name in ("wall", "cpu")} | judge(run["answers"])
    return kept | {name: run[name] for name in ("epochs", "network") if name in run}


def thin(data: Path, room: Path, train: int, test: int = 0, seed: int = 0) -> Path:
    """Link so many random pictures of each class of the training and of the test folder; 0 for all."""
    for split, count in (("train", train), ("test", test)):
        for label in sorted(path for path in (data / split).iterdir() if path.is_dir()):
            files, target = sorted(label.iterdir()), room / "data" / split / label.name
            target.mkdir(parents=True)
            chosen = random.Random(f"{seed} {label.name}").sample(files, min(count or len(files), len(files)))
            for path in chosen:
                link(path, target / path.name)
    return room / "data"


def link(path: Path, target: Path) -> None:
    """Give a file a second name, or copy it to another disk."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def draw(folder: Path, train: int, test: int) -> Path:
    """Draw the demo's scenes, so many of each class."""
    from automl_cv.scenes import write_scenes
    write_scenes(folder / "train", train, seed=0)
    write_scenes(folder / "test", test, seed=1)
    return folder
