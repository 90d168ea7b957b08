"""The decode-once cache against plain torchvision: filling it, and reading an epoch back.

The reference is what a torchvision user writes: ImageFolder, Resize, and a DataLoader with batches of 64, by
two workers or in a plain loop: both are tried once, and the faster one is kept. `plain` ends in ToTensor, as
every tutorial does. `plain_bytes` leaves the pictures as bytes, which is the least that such a pass can do.
`v2_bytes` resizes tensors, with vector instructions that Pillow lacks. All sides use the same files, the same
side and the same two cores, take turns, and find the files in memory. `first_epoch` is what a new process
pays: opening, checksums, reading. Where other programs share the cores, CPU seconds tell more than wall
seconds.

Usage: python benchmarks/cache.py FOLDER [REPEATS]     FOLDER has class folders; larger photographs are drawn
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from automl_cv import store
from automl_cv.batches import plan_batches
from automl_cv.cache import Rows, decode_rows
from automl_cv.compat import v2
from automl_cv.core import hash_file
from automl_cv.pixels import Policy
from automl_cv.scenes import CLASSES, draw_scene
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor, Resize, ToTensor

BATCH, POLICY = 64, Policy()
SIDE = (POLICY.store, POLICY.store)
PLAIN = {"plain": Compose([Resize(SIDE), ToTensor()]), "plain_bytes": Compose([Resize(SIDE), PILToTensor()]),
         "v2_bytes": v2.Compose([v2.ToImage(), v2.Resize(SIDE, antialias=True)])}


def used() -> float:
    """Return the CPU seconds of this process and of the children that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Run something and return its wall and CPU seconds."""
    cpu, started = used(), time.monotonic()
    work()
    return {"wall": time.monotonic() - started, "cpu": used() - cpu}


def draw_photographs(folder: Path, count: int) -> Path:
    """Draw pictures of 1920 x 1080 with a camera's noise, as JPEG."""
    random = np.random.default_rng(0)
    for number in range(count):
        label = CLASSES[number % len(CLASSES)]
        drawn = draw_scene(label, number, 270).resize((1920, 1080), Image.Resampling.BICUBIC)
        scene = np.asarray(drawn, np.float32)
        noisy = np.clip(scene + random.normal(0, 5, scene.shape), 0, 255).astype(np.uint8)
        path = folder / label / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)
    return folder


def list_rows(folder: Path) -> pd.DataFrame:
    """Return what step 1 knows of each file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return pd.DataFrame({"path": [path.relative_to(folder).as_posix() for path in paths],
                         "sha256": [hash_file(path) for path in paths]})


def plain_pass(folder: Path, change: Compose, workers: int) -> None:
    """Go through a folder once, as a training with torchvision does in every epoch."""
    for _ in DataLoader(ImageFolder(folder, change), batch_size=BATCH, num_workers=workers):
        pass


def read_epoch(pictures: Rows, epoch: int) -> None:
    """Read every picture once in shuffled batches, as `batches.iterate_batches` does."""
    for index in plan_batches(len(pictures), BATCH, 0, epoch):
        pictures[np.sort(index)]


def measure_once(folder: Path, rows: pd.DataFrame, workers: int) -> dict[str, dict[str, float]]:
    """Let every side do its work once."""
    found = {name: timed(lambda: plain_pass(folder, change, workers)) for name, change in PLAIN.items()}
    with tempfile.TemporaryDirectory() as home:
        os.environ["AUTOML_CV_HOME"] = home
        found["build"] = timed(lambda: decode_rows(str(folder), rows, POLICY))
        store._blocks.clear()  # what a new process knows
        found["first_epoch"] = timed(lambda: read_epoch(decode_rows("", rows, POLICY), 0))
        pictures = decode_rows("", rows, POLICY)
        found["epoch"] = timed(lambda: read_epoch(pictures, 1))
    return found


def summarise(values: list[float], digits: int) -> dict[str, object]:
    """Return the median, the least and the most."""
    return {"median": round(statistics.median(values), digits),
            "spread": [round(min(values), digits), round(max(values), digits)]}


def compare(folder: Path, repeats: int) -> dict[str, object]:
    """Measure a folder several times and return medians, spreads and ratios."""
    rows = list_rows(folder)
    tried = {workers: timed(lambda: plain_pass(folder, PLAIN["plain_bytes"], workers)) for workers in (0, 2)}
    workers = min(tried, key=lambda workers: tried[workers]["wall"])
    runs = [measure_once(folder, rows, workers) for _ in range(repeats)]
    report: dict[str, object] = {"pictures": len(rows), "side": POLICY.store,
                                 "policy_version": POLICY.version,
                                 "reference": "ImageFolder, Resize, PILToTensor (plain_bytes)",
                                 "reference_workers": workers, "reference_workers_tried": tried}
    for name in runs[0]:
        report[name] = {kind: summarise([run[name][kind] for run in runs], 3) for kind in ("wall", "cpu")}
    for ours in ("build", "first_epoch", "epoch"):
        report[f"{ours}_faster_than"] = {
            name: {kind: summarise([run[name][kind] / run[ours][kind] for run in runs], 2)
                   for kind in ("wall", "cpu")} for name in PLAIN}
    return report


def main(folder: str, repeats: int = 3) -> dict[str, object]:
    """Measure the small pictures of a folder and drawn large ones, and print JSON."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as room:
        large = draw_photographs(Path(room), 2 * BATCH)  # a batch for each worker
        report = {"given": compare(Path(folder), repeats), "drawn 1080p": compare(large, repeats)}
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
