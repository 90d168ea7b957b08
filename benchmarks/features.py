"""The feature bank against raw loops over arrays in memory, of onnxruntime and of torch in bfloat16.

The raw loops have their network ready and their pictures in one array; they keep the features in memory. The
bank pays for everything: hashing the weights, reading pictures from the decode-once cache, writing blocks,
reading them back. `setup` is the export, paid once however many pictures there are; `found` is what it costs
to ask again. All take turns, on the same pictures and the same threads.

Usage: python benchmarks/features.py FOLDER [BACKBONE] [SIZE] [COUNT] [REPEATS]     FOLDER has class folders
"""

import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from automl_cv import engines
from automl_cv.cache import Images, decode_rows
from automl_cv.core import hash_file
from automl_cv.cost import has_bfloat16, light_batch
from automl_cv.engines import engine_speeds, make_extractor, plan_extraction
from automl_cv.features import bank_folder, feature_bank
from automl_cv.models import create_model
from automl_cv.pixels import Policy


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Run something and return its wall and CPU seconds."""
    cpu, started = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), time.monotonic()
    work()
    return time.monotonic() - started, sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - cpu


def loop(extract: Callable[[np.ndarray], np.ndarray], pictures: np.ndarray, batch: int) -> np.ndarray:
    """Do what everybody writes."""
    return np.concatenate([extract(pictures[i:i + batch]) for i in range(0, len(pictures), batch)])


def middle(values: list[float]) -> dict[str, float]:
    """Return median and spread."""
    return {"median": round(statistics.median(values), 4), "least": round(min(values), 4),
            "most": round(max(values), 4)}


def main(folder: str, backbone: str = "mobilenet_v2", size: str = "160", count: str = "1000",
         repeats: str = "3") -> None:
    """Measure and print JSON."""
    os.environ["AUTOML_CV_HOME"] = tempfile.mkdtemp()
    side, model = int(size), create_model(backbone, 6)
    files = sorted(Path(folder).glob("*/*"))
    chosen = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:int(count)]]
    rows = pd.DataFrame({"path": [path.relative_to(folder).as_posix() for path in chosen],
                         "sha256": [hash_file(path) for path in chosen]})
    images = Images(decode_rows(folder, rows, Policy(side, side)), np.zeros(len(rows)))
    pictures, batch = images.array[:], light_batch(model, side)
    engine, bfloat16 = plan_extraction(model, side, len(images))
    bank = bank_folder(model, side, "plain", bfloat16)
    raw = {"onnxruntime": make_extractor(model, side, "onnxruntime"),
           "torch": make_extractor(model, side, "torch", has_bfloat16(torch.device("cpu")))}
    work = {f"raw_{name}": lambda extract=extract: loop(extract, pictures, batch)
            for name, extract in raw.items()}
    work |= {"setup": lambda: (engines._last.clear(), make_extractor(model, side, engine, bfloat16)),
             "bank": lambda: feature_bank(model, images, side),
             "found": lambda: feature_bank(model, images, side)}
    loop(raw["onnxruntime"], pictures[:batch], batch), loop(raw["torch"], pictures[:batch], batch)
    seconds = {name: [] for name in work}
    for _ in range(int(repeats)):
        shutil.rmtree(bank, ignore_errors=True)
        for name, call in work.items():
            seconds[name].append(timed(call))
    wall, cpu = ({name: [pair[i] for pair in pairs] for name, pairs in seconds.items()} for i in (0, 1))
    own = f"raw_{engine}"
    share = {kind: {"with_setup": middle([a / (b + c) for a, b, c
                                          in zip(took[own], took["bank"], took["setup"])]),
                    "without_setup": middle([a / b for a, b in zip(took[own], took["bank"])])}
             for kind, took in (("wall", wall), ("cpu", cpu))}
    print(json.dumps({"backbone": backbone, "size": side, "pictures": len(images), "batch": batch,
                      "weights": model.origin, "threads": torch.get_num_threads(), "engine": engine,
                      "bfloat16": bfloat16, "trial": engine_speeds(model, side), "bank_over_raw_loop": share,
                      "wall_seconds": {name: middle(values) for name, values in wall.items()},
                      "cpu_seconds": {name: middle(values) for name, values in cpu.items()}}, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
