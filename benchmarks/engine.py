"""What the engine reaches in a budget, beside what a competent user reaches without it (benchmarks/plain.py).

    python benchmarks/engine.py reference [--minutes 5] [--full]  the original's protocol: accuracy, CPU time
    python benchmarks/engine.py anytime [--minutes 1 5 15]        first bundle, better ones, keeping to --time
    python benchmarks/engine.py quality [--minutes 5 15 30]       the test folder, against a plain fine-tune
    python benchmarks/engine.py small [--counts 10 50 200]        few pictures, against fine-tune and probe
    python benchmarks/engine.py scratch [--minutes 2]             drawn pictures, no weights at all
    python benchmarks/engine.py resume [--kills 20]               killed at random: the same bits at the end?

Each prints one JSON object, whose `holds` compares the figures with what the project promises. `--quick` runs
a reduced version in a few minutes, to check the program and nothing else; it says so. Contenders take turns
on the same two cores, in processes of their own, so that wall and CPU seconds hold everything from the first
import to the last answer; ours starts from an empty workspace every time. Everybody answers the whole test
folder. Only ratios and CPU seconds compare between machines.

Needs ../shared/data/intel and ../shared/weights, or --data and --weights (AUTOML_CV_WEIGHTS). `automl-cv run`
gets --time, --backbone, --size and --seed; everything else is left at its default.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from contest import (CLI, ROOT, abstaining, ask, draw, environment, judge, machine, mcnemar, metered,
                     run_ours, run_plain, say, show, spread, thin, workspace)

SHARED = ROOT.parent / "shared"
TRIALS, EPOCHS = 10, 5.5  # of the original's search; the epochs are the mean of its draws from 1 to 10
WANTED = {5: 0.92, 15: 0.935, 30: 0.94}  # test accuracy after so many minutes


def measure_epochs(options: argparse.Namespace) -> list[dict]:
    """Measure an epoch of the original's protocol with the network at hand, and with ResNet18."""
    words, found = ["epoch", "--batches", str(options.batches), "--threads", "1", "--network"], []
    for more in ([options.network], ["resnet18", "--weights", ""]):  # weights don't change the cost
        with workspace() as room:
            found.append(run_plain(options, options.data, room, [*words, *more]))
    return found


def original(options: argparse.Namespace, measured: list[list[dict]]) -> dict[str, object]:
    """Put the cost of the original's protocol together, and its accuracy as far as it is known."""
    words = ["final", "--network", options.network, *(["--batches", "1"] if options.quick else [])]
    with workspace() as room:
        full = run_plain(options, options.data, room, words) if options.full else {}
    cost = [spread([epoch["epoch_cpu_seconds"] for epoch in epochs]) for epochs in zip(*measured)]
    epochs = TRIALS * EPOCHS + full.get("best_epoch", EPOCHS)
    return {"network": options.network, "epoch_cpu_seconds": cost[0], "resnet18_epoch_cpu_seconds": cost[1],
            "measured_share_of_an_epoch": measured[0][0]["measured_share"], "epochs": epochs,
            "cpu_seconds": cost[0]["median"] * epochs, "accuracy": full.get("accuracy", options.accuracy),
            "final_training": {name: full[name] for name in ("history", "settings", "wall", "cpu") if full},
            "note": "Ten trials of 5.5 epochs, the mean draw, and a final training, extrapolated from a part "
                    "of an epoch, with one thread: two wait for each other, which costs CPU time, on a busy "
                    "machine up to four times as much. The accuracy is the final training's best epoch on "
                    "the test folder; null where neither --full nor --accuracy gave it."}


def reference(options: argparse.Namespace) -> dict[str, object]:
    """Compare CPU time with the original's protocol, and accuracy with its final training."""
    measured, runs = [], []
    for seed in range(options.seeds):
        measured.append(measure_epochs(options))
        with workspace() as room:
            runs.append(run_ours(options, options.data, room, 60 * options.minutes[0], seed))
    theirs, ours = original(options, measured), [show(run) for run in runs]
    ratios = spread([theirs["cpu_seconds"] / run["cpu"] for run in ours])
    accuracy, wanted = spread([run["accuracy"] for run in ours]), theirs["accuracy"]
    return {"original": theirs, "ours": ours, "cpu_ratio": ratios, "accuracy": accuracy,
            "holds": {"cpu ratio >= 50": ratios["median"] >= 50,
                      "accuracy >= the original's": wanted is not None and accuracy["median"] >= wanted}}


def validation_score(info: dict) -> float | None:
    """Read a bundle's accuracy on validation pictures; None where it does not say."""
    found = info.get("validation") or {}
    return found.get(found.get("metric", "accuracy"))


class Watcher:
    """Notes each bundle that appears in a folder, keeps a copy, and counts the looks that found none."""

    def __init__(self, folder: Path, kept: Path):
        self.folder, self.kept = folder, kept
        self.started, self.seen, self.missing = time.monotonic(), [], 0

    def look(self) -> None:
        """Look once."""
        try:
            info = json.loads((self.folder / "model.json").read_text())
            name, seconds = info["files"]["model.onnx"][:12], time.monotonic() - self.started
            if not self.seen or name != self.seen[-1]["model"]:
                shutil.copytree(self.folder, self.kept / name, dirs_exist_ok=True)
                self.seen.append({"seconds": round(seconds, 1), "model": name,
                                  "backbone": info.get("backbone"), "validation": validation_score(info)})
        except FileNotFoundError:
            self.missing += bool(self.seen)
        except OSError:  # replaced while it was copied: the next look sees the new one
            pass

    def __call__(self, process: subprocess.Popen) -> list[dict]:
        """Look ten times a second until a process ends."""
        while process.poll() is None:
            self.look()
            time.sleep(0.1)
        self.look()
        return self.seen


def watch_once(options: argparse.Namespace, minutes: float, seed: int) -> dict[str, object]:
    """Run once under a watcher, then let every bundle that was there answer the test folder."""
    with workspace() as room:
        watcher = Watcher(room / "run/model", room / "kept")
        run = run_ours(options, options.data, room, 60 * minutes, seed, watcher)
        for bundle in run["seen"]:
            bundle["test"] = judge(ask(room / "kept" / bundle["model"], options.data, room))["accuracy"]
    scores, over = [bundle["validation"] for bundle in run["seen"]], round(run["wall"] - 60 * minutes, 1)
    return {"minutes": minutes, "seed": seed, **show(run), "over_seconds": over,
            "first_bundle_seconds": run["seen"][0]["seconds"], "bundles": run["seen"],
            "looks_without_a_bundle": watcher.missing, "validation_known": None not in scores,
            "validation_never_falls": None not in scores and scores == sorted(scores)}


def anytime(options: argparse.Namespace) -> dict[str, object]:
    """Watch runs of several budgets."""
    plan = [(minutes, seed) for seed in range(options.seeds) for minutes in options.minutes]
    runs = [watch_once(options, *pair) for pair in plan]
    kept = [run["over_seconds"] <= max(0.02 * 60 * run["minutes"], 5.0) for run in runs]
    return {"runs": runs, "first_bundle_seconds": spread([run["first_bundle_seconds"] for run in runs]),
            "over_seconds": spread([run["over_seconds"] for run in runs]),
            "holds": {"first bundle <= 60 s": max(run["first_bundle_seconds"] for run in runs) <= 60,
                      "validation never falls": all(run["validation_never_falls"] for run in runs),
                      "never without one later": not any(run["looks_without_a_bundle"] for run in runs),
                      "over by <= 2 % or 5 s": all(kept)}}


def duel(options: argparse.Namespace, minutes: float, seed: int) -> dict[str, object]:
    """Give ours and the plain fine-tune the same time; who goes first alternates."""
    words, found = ["finetune", "--seconds", f"{60 * minutes:.0f}", "--network", options.network], {}
    with workspace() as room:
        for name in ("plain", "ours") if seed % 2 else ("ours", "plain"):
            found[name] = (run_ours(options, options.data, room, 60 * minutes, seed) if name == "ours"
                           else run_plain(options, options.data, room, words, seed))
    return {"seed": seed, **{name: show(run) for name, run in found.items()},
            "abstaining": abstaining(found["ours"]),
            "paired": mcnemar(found["ours"]["answers"], found["plain"]["answers"])}


def compare(runs: list[dict], side: str) -> dict[str, dict]:
    """Return medians and spreads of one side."""
    names = ("accuracy", "calibration_error", "coverage_at_99", "wall", "cpu")
    return {name: spread([run[side][name] for run in runs]) for name in names}


def quality(options: argparse.Namespace) -> dict[str, object]:
    """Compare accuracy on the test folder after the same time."""
    report, holds = {}, {}
    for minutes in options.minutes:
        runs = [duel(options, minutes, seed) for seed in range(options.seeds)]
        ours, plain = compare(runs, "ours"), compare(runs, "plain")
        report[f"{minutes:g} minutes"] = {"ours": ours, "plain": plain, "runs": runs}
        wanted = WANTED.get(minutes, 0.0)
        holds[f"{minutes:g} minutes"] = {
            f"accuracy >= {wanted}": ours["accuracy"]["median"] >= wanted,
            "accuracy >= plain": ours["accuracy"]["median"] >= plain["accuracy"]["median"],
            "calibration error <= 0.015": ours["calibration_error"]["median"] <= 0.015,
            "99 % accuracy at coverage >= 0.8": ours["coverage_at_99"]["median"] >= 0.8}
    return {"budgets": report, "holds": holds,
            "note": "coverage_at_99 is the most that any threshold reaches on the test folder; `abstaining` "
                    "is what the bundle's own gives, chosen without it. The plain fine-tune plans its "
                    "schedule for the same time and is judged after it, at no cost."}


def cell(options: argparse.Namespace, count: int, seed: int) -> dict[str, object]:
    """Train everybody on the same few pictures of each class; who goes first rotates."""
    words = {"finetune": ["finetune", "--seconds", f"{options.seconds:.0f}", "--network", options.network],
             "probe": ["probe", "--network", options.network]}
    names, found = ["ours", *words], {}
    with workspace() as room:
        data = thin(options.data, room, count, 12 if options.quick else 0, seed)
        for name in names[seed % 3:] + names[:seed % 3]:
            found[name] = (run_ours(options, data, room, options.seconds, seed) if name == "ours"
                           else run_plain(options, data, room, words[name], seed))
    return {"seed": seed, **{name: show(found[name]) for name in names},
            "paired": {name: mcnemar(found["ours"]["answers"], found[name]["answers"]) for name in words}}


def small(options: argparse.Namespace) -> dict[str, object]:
    """Compare accuracy on the test folder after training on few pictures."""
    report, leads = {}, {}
    for count in options.counts:
        runs = [cell(options, count, seed) for seed in range(options.seeds)]
        scores = {name: [run[name]["accuracy"] for run in runs] for name in ("ours", "finetune", "probe")}
        report[f"{count} per class"] = {name: spread(scores[name]) for name in scores} | {"runs": runs}
        for name in ("finetune", "probe"):
            lead = np.mean(scores["ours"]) - np.mean(scores[name])
            leads[f"{count} per class, {name}"] = round(float(lead), 4)
    return {"seconds": options.seconds, "cells": report, "mean_lead": leads,
            "holds": {"at least equal in each cell": min(leads.values()) >= 0,
                      "better in most": sum(lead > 0 for lead in leads.values()) > len(leads) / 2}}


def scratch_once(options: argparse.Namespace, seed: int) -> dict[str, object]:
    """Train ours and two plain networks on the same drawn pictures, nobody with weights."""
    words = ["finetune", "--size", str(options.size), "--lr", "3e-3", "--epochs", "200",
             "--seconds", f"{60 * options.minutes[0]:.0f}"]
    with workspace() as room:
        data = draw(room / "data", *((12, 6) if options.quick else (200, 100)))
        ours = run_ours(options, data, room, 60 * options.minutes[0], seed)
        plain = {name: run_plain(options, data, room, [*words, "--network", name], seed)
                 for name in ("cnn", "resnet18")}
    return {"seed": seed, "ours": show(ours), "plain": {name: show(run) for name, run in plain.items()},
            "says_so": "from scratch" in (ours["told"] + json.dumps(ours["bundle"])).lower(),
            "paired": {name: mcnemar(ours["answers"], run["answers"]) for name, run in plain.items()}}


def scratch(options: argparse.Namespace) -> dict[str, object]:
    """Compare accuracy without weights at equal time; the better of two plain networks counts."""
    options.weights = ""
    runs = [scratch_once(options, seed) for seed in range(options.seeds)]
    ours = spread([run["ours"]["accuracy"] for run in runs])
    best = spread([max(plain["accuracy"] for plain in run["plain"].values()) for run in runs])
    return {"seconds": 60 * options.minutes[0], "ours": ours, "best_plain": best, "runs": runs,
            "holds": {"says so": all(run["says_so"] for run in runs),
                      "more accurate than the plain loop": ours["median"] > best["median"]}}


def begin(options: argparse.Namespace, room: Path) -> subprocess.Popen:
    """Start a run without a time limit, or resume the one that is there."""
    out = room / "run"
    words = ["run", options.demo, "--out", str(out), "--time", "none", "--backbone", "small_cnn", "--scratch",
             "--size", "64", "--json"]
    words = ["resume", str(out), "--json"] if (out / "request.json").exists() else words
    return subprocess.Popen([*CLI, *words], env=environment(room, ""), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def outcome(run: Path) -> dict[str, object]:
    """Return what must not depend on kills: every epoch's figures, the weights that ship, the search."""
    results, trained = (json.loads((run / f"{name}.json").read_text()) for name in ("results", "train"))
    epochs = [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in trained["history"]]
    shipped = hashlib.sha256((run / "model/weights.safetensors").read_bytes()).hexdigest()
    return {"epochs": epochs, "shipped": shipped[:16], "trials": results.get("trials"),
            "config": results.get("config")}


def live_on(options: argparse.Namespace, longest: float, kills: int, moments: random.Random) -> dict:
    """Kill a run at random moments and resume it until it ends, or was killed so often and is let be."""
    done = []
    with workspace() as room:
        while True:
            process, moment = begin(options, room), moments.uniform(0, longest)
            try:
                code = process.wait(moment if len(done) < kills else None)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done.append(round(moment, 1))
                say(f"kill {len(done)} of {kills} after {moment:.1f} s")
        return {"exit": code, "killed_after_seconds": done} | (outcome(room / "run") if code == 0 else {})


def resume(options: argparse.Namespace) -> dict[str, object]:
    """Kill runs at random moments and compare how they end with a run that nobody killed."""
    names, moments, runs, done = ("epochs", "shipped", "trials", "config"), random.Random(0), [], 0
    with metered() as cost:
        expected = live_on(options, 0.0, 0, moments)
    again = live_on(options, 0.0, 0, moments)
    while done < options.kills and all(run["exit"] == 0 for run in [expected, *runs]):
        runs.append(live_on(options, cost["wall"], options.kills - done, moments))
        runs[-1]["same"] = {name: runs[-1].get(name) == expected[name] for name in names}
        done += len(runs[-1]["killed_after_seconds"])
    held = {name: done >= options.kills and all(run["same"][name] for run in runs) for name in names}
    return {"kills": done, "seconds_without_a_kill": round(cost["wall"], 1), "expected": expected,
            "repeatable_without_a_kill": again == expected, "runs": runs,
            "holds": {"weights equal to the bit": bool(expected.get("epochs")) and held["epochs"] and held["shipped"],
                      "no trial lost or repeated": held["trials"]}}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, object]]] = {
    "reference": reference, "anytime": anytime, "quality": quality, "small": small, "scratch": scratch,
    "resume": resume}
MINUTES = {"reference": [5.0], "anytime": [1.0, 5.0, 15.0], "quality": [5.0, 15.0, 30.0], "scratch": [2.0]}


def parse() -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    weights = os.environ.get("AUTOML_CV_WEIGHTS") or str(SHARED / "weights")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, default=SHARED / "data/intel", help="has train/ and test/CLASS")
    parser.add_argument("--weights", default=weights, help="folder with ImageNet weights")
    parser.add_argument("--quick", action="store_true", help="a reduced version, to check the program")
    parser.add_argument("--seeds", type=int, help="repeats; 3, and 5 for small")
    parser.add_argument("--minutes", type=float, nargs="+", help="budgets; reference and scratch have one")
    parser.add_argument("--backbone", default="mobilenet_v2", help="of ours; empty leaves it to automl-cv")
    parser.add_argument("--size", type=int, default=0, help="side of our input; 0 leaves it to automl-cv")
    parser.add_argument("--network", default="mobilenet_v2", help="of the contenders")
    parser.add_argument("--batches", type=int, default=12, help="of reference: part of an epoch; 0 for all")
    parser.add_argument("--full", action="store_true", help="of reference: the final training too, for hours")
    parser.add_argument("--accuracy", type=float, help="of reference: the original's, from an earlier --full")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 50, 200], help="of small: per class")
    parser.add_argument("--seconds", type=float, default=120.0, help="of small: the budget")
    parser.add_argument("--kills", type=int, default=20, help="of resume")
    parser.add_argument("--demo", default="demo:40", help="of resume: the drawn pictures")
    return parser.parse_args()


def reduce(options: argparse.Namespace, room: Path) -> None:
    """Cut everything to what runs in a few minutes."""
    options.minutes, options.seeds, options.seconds, options.size = [1 / 3], 1, 20.0, 32
    options.counts, options.kills, options.demo, options.batches = [4], 2, "demo:6", 1
    if options.part in ("reference", "anytime", "quality"):
        options.data = thin(options.data, room, 12, 12)


def main() -> None:
    """Run one benchmark on the first two cores and print its report."""
    options = parse()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    options.seeds = options.seeds or (5 if options.part == "small" else 3)
    options.minutes = options.minutes or MINUTES.get(options.part, [])
    if options.part == "scratch":
        options.backbone, options.size = "small_cnn", options.size or 64
    report = {"benchmark": options.part, "machine": machine()}
    with workspace() as room, metered() as cost:
        if options.quick:
            reduce(options, room)
            report["QUICK"] = "Reduced to check the program. The figures and `holds` mean nothing."
        report |= PARTS[options.part](options)
    print(json.dumps(report | {"cost": {name: round(value) for name, value in cost.items()}}, indent=2))


if __name__ == "__main__":
    main()
