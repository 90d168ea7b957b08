"""The head search against scikit-learn's cross_val_score with two jobs, on the same features and folds.

The grid: 167 penalties x three normalisations x two class weightings = 1,002 configurations, five folds each.
Ours runs all of it. scikit-learn runs a stated sample of it, drawn evenly from the grid, and its time is
multiplied up to the whole grid: `reference_extrapolated` is that estimate, not a measurement. The sides take
turns. For speed scikit-learn keeps its default tolerance, which stops early; for the agreement of the
log-loss it is run to a tight one.

Usage: python benchmarks/heads.py [FEATURES.npz] [REPEATS] [SAMPLE] [PENALTIES] FEATURES.npz holds `features`
float16 [N, D] and `targets` int64 [N]; without it, or for `-`, features of the same shape as MobileNetV2's on
8,741 pictures are drawn.
"""

import json
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from automl_cv.heads import HeadConfig, head_grid, search_heads

STEPS = {"none": [], "standard": [StandardScaler()], "unit": [Normalizer()]}


def used() -> float:
    """Return the CPU seconds of this process and of the children that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def timed(work: Callable[[], object]) -> tuple[dict[str, float], object]:
    """Run something and return its wall and CPU seconds, and what it gave."""
    cpu, started = used(), time.monotonic()
    result = work()
    return {"wall": time.monotonic() - started, "cpu": used() - cpu}, result


def draw_features() -> tuple[np.ndarray, np.ndarray]:
    """Draw correlated, skewed features of six overlapping classes, as a pooled ReLU leaves them."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 6, 8741)
    hidden = rng.normal(size=(8741, 200)) * np.geomspace(2, 0.2, 200)
    hidden += 0.5 * rng.normal(size=(6, 200))[targets]
    mixed = hidden @ rng.normal(size=(200, 1280)) / 14 + 0.3 * rng.normal(size=(8741, 1280))
    return np.maximum(mixed, 0).astype(np.float16), targets


def reference(config: HeadConfig, tight: bool) -> Pipeline:
    """Return scikit-learn's version of a configuration."""
    weight = "balanced" if config.balance == "weights" else None
    settings = {"tol": 1e-7, "max_iter": 5000} if tight else {}
    return make_pipeline(*STEPS[config.normalise],
                         LogisticRegression(C=config.penalty, class_weight=weight, **settings))


def cross_validate(configs: list[HeadConfig], features: np.ndarray, targets: np.ndarray, folds: np.ndarray,
                   tight: bool = False) -> list[float]:
    """Return the out-of-fold log-loss of each configuration, as scikit-learn finds it."""
    x, sizes = features.astype(np.float64 if tight else np.float32), np.bincount(folds)
    scores = [cross_val_score(reference(config, tight), x, targets, cv=PredefinedSplit(folds), n_jobs=2,
                              scoring="neg_log_loss") for config in configs]
    return [float(-(score * sizes).sum() / sizes.sum()) for score in scores]


def summary(runs: list[dict[str, float]], factor: float = 1.0) -> dict[str, object]:
    """Return median and spread of wall and CPU seconds."""
    return {kind: {"median": round(factor * statistics.median(run[kind] for run in runs), 2),
                   "spread": [round(factor * pick(run[kind] for run in runs), 2) for pick in (min, max)]}
            for kind in ("wall", "cpu")}


def main(path: str = "-", repeats: int = 3, sample: int = 6, penalties: int = 167) -> None:
    """Measure both sides in turn and print JSON."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    if path == "-":
        features, targets = draw_features()
    else:
        with np.load(path) as stored:
            features, targets = stored["features"], stored["targets"]
    folds = np.random.default_rng(0).permutation(len(targets)) % 5
    grid = [config for config in head_grid(penalties=penalties, others=False) if config.balance != "logits"]
    picked = np.linspace(0, len(grid) - 1, sample).round().astype(int)
    some = [grid[number] for number in picked]
    ours, theirs, classes = [], [], int(targets.max()) + 1
    for _ in range(repeats):
        seconds, (table, _) = timed(lambda: search_heads(features, targets, classes, folds, grid))
        ours.append(seconds)
        theirs.append(timed(lambda: cross_validate(some, features, targets, folds))[0])
    exact = cross_validate(some, features, targets, folds, tight=True)
    factor = len(grid) / sample
    ratio = {kind: round(statistics.median(b[kind] * factor / a[kind] for a, b in zip(ours, theirs)), 1)
             for kind in ("wall", "cpu")}
    print(json.dumps({
        "shape": features.shape, "configurations": len(grid), "folds": 5, "load": os.getloadavg(),
        "ours": summary(ours), "reference_sample": sample, "reference_measured": summary(theirs),
        "reference_extrapolated": summary(theirs, factor), "faster": ratio,
        "loss_gap": [round(abs(a - b), 6) for a, b in zip(table.loss[picked], exact)]}, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
