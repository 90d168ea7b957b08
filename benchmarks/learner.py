"""The learner against plain loops: pictures per second of training, with everything that belongs to it.

`plain` is what every tutorial writes: Pillow decodes and resizes each file in every epoch, flips, ToTensor, Normalize,
NCHW in float32, AdamW. `memory` is the bound: the learner's network in bfloat16 and channels_last over an array that
lies in memory, without augmentation, averaging, checks or time keeping. `learner` is `train_one_epoch` over the
decode-once cache with flip, averaged weights and all checks, and with frozen norms where pretrained weights can be had
(AUTOML_CV_WEIGHTS), as it trains them; `frozen` in the report says so. Each is a process of its own, so that settings of
the one do not help the other; they take turns over the same files on the same two cores. CPU seconds are the figure to
trust where the machine has other work to do.

Usage: python benchmarks/learner.py FOLDER [REPEATS] [BACKBONE:SIZE ...]     FOLDER has class folders
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

COUNT, BATCH, CASES = 128, 64, ("resnet18:150", "mobilenet_v2:160")


def list_files(folder: Path) -> list[tuple[Path, int]]:
    """Return some files of every class, in a mixed order."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    chosen = [(path, label) for label, room in enumerate(classes)
              for path in sorted(room.iterdir())[:-(-COUNT // len(classes))]]
    return sorted(chosen, key=lambda row: row[0].name)[:COUNT]


def plain(folder: Path, backbone: str, size: int) -> Callable[[], None]:
    """Return a pass over the files as tutorials write it, with threads that sleep while they wait."""
    import torch
    from automl_cv.compat import torchvision
    from automl_cv.models import MEAN, STD
    from PIL import Image
    from torchvision import transforms
    files = list_files(folder)
    change = transforms.Compose([transforms.Resize((size, size)), transforms.RandomHorizontalFlip(),
                                 transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    model = getattr(torchvision.models, backbone)(num_classes=6).train()
    optimizer = torch.optim.AdamW(model.parameters())

    def epoch() -> None:
        order = torch.randperm(len(files)).tolist()
        for start in range(0, len(files), BATCH):
            rows = [files[index] for index in order[start:start + BATCH]]
            pictures = torch.stack([change(Image.open(path).convert("RGB")) for path, _ in rows])
            loss = torch.nn.functional.cross_entropy(model(pictures), torch.tensor([label for _, label in rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
    return epoch


def memory(folder: Path, backbone: str, size: int) -> Callable[[], None]:
    """Return a pass over an array in memory: the least that training this network in bfloat16 costs."""
    import numpy as np
    import torch
    from automl_cv.machine import has_bfloat16, keep_memory
    from automl_cv.models import create_model
    from PIL import Image
    keep_memory()
    files = list_files(folder)
    array = np.stack([np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path, _ in files])
    labels, model = torch.tensor([label for _, label in files]), create_model(backbone, 6, False).train()
    optimizer, fast = torch.optim.AdamW(model.parameters()), has_bfloat16(torch.device("cpu"))

    def epoch() -> None:
        for index in torch.randperm(len(files)).split(BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                logits = model(torch.from_numpy(array[index.numpy()]))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits.float(), labels[index]).backward()
            optimizer.step()
    return epoch


def learner(folder: Path, backbone: str, size: int) -> Callable[[], None]:
    """Return a pass of the learner over the cache."""
    import numpy as np
    import pandas as pd
    from automl_cv.cache import Images, decode_rows
    from automl_cv.core import hash_file
    from automl_cv.learner import start_training, train_one_epoch
    from automl_cv.models import weights_trouble
    from automl_cv.recipe import Config
    from automl_cv.transforms import make_policy
    files = list_files(folder)
    rows = pd.DataFrame({"path": [path.relative_to(folder).as_posix() for path, _ in files],
                         "sha256": [hash_file(path) for path, _ in files]})
    targets = np.array([label for _, label in files])
    images = Images(decode_rows(str(folder), rows, make_policy("standard", size)), targets)
    pretrained = not weights_trouble(backbone)
    config = Config(backbone=backbone, pretrained=pretrained, norm="frozen" if pretrained else "batch", size=size,
                    batch_size=BATCH, epochs=1000)
    training = start_training(config, images, 6)

    def epoch() -> None:
        train_one_epoch(training, images)
        training.history.append({})
        training.losses = []
    return epoch


def serve(kind: str, folder: str, backbone: str, size: str) -> None:
    """Do one pass for each line on stdin and print its wall and CPU seconds."""
    epoch = {"plain": plain, "memory": memory, "learner": learner}[kind](Path(folder), backbone, int(size))
    epoch()  # memory, primitives, page cache
    print("ready", flush=True)
    for _ in sys.stdin:
        used, started = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), time.monotonic()
        epoch()
        cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - used
        print(json.dumps({"wall": time.monotonic() - started, "cpu": cpu}), flush=True)


def take_turns(folder: str, case: str, repeats: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Let the contenders do one pass after the other."""
    words = [sys.executable, __file__, "--serve"]
    running = {kind: subprocess.Popen([*words, kind, folder, *case.split(":")], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True) for kind in ("plain", "memory", "learner")}
    try:
        for process in running.values():
            while (line := process.stdout.readline()) != "ready\n":
                assert line, "a contender ended early"
        for _ in range(repeats):
            for kind, process in running.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                while not (line := process.stdout.readline()).startswith("{"):  # the learner tells how far it is
                    assert line, "a contender ended early"
                yield kind, json.loads(line)
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def compare(folder: str, case: str, repeats: int) -> dict[str, object]:
    """Measure one network and return medians, spreads and ratios."""
    from automl_cv.models import weights_trouble
    found: dict[str, list[dict[str, float]]] = {"plain": [], "memory": [], "learner": []}
    for kind, row in take_turns(folder, case, repeats):
        found[kind].append(row)
    report: dict[str, object] = {"frozen": not weights_trouble(case.split(":")[0])}
    for kind, rows in found.items():
        speeds, costs = [COUNT / row["wall"] for row in rows], [1000 * row["cpu"] / COUNT for row in rows]
        report[kind] = {"pictures_per_second": round(statistics.median(speeds), 1),
                        "spread": [round(min(speeds), 1), round(max(speeds), 1)],
                        "cpu_ms_per_picture": round(statistics.median(costs), 1),
                        "cpu_spread": [round(min(costs), 1), round(max(costs), 1)]}
    for other in ("plain", "memory"):
        report[f"learner_over_{other}"] = {
            unit: round(statistics.median(a[unit] / b[unit] for a, b in zip(found[other], found["learner"])), 2)
            for unit in ("wall", "cpu")}
    return report


def main(folder: str, repeats: str = "3", *cases: str) -> dict[str, object]:
    """Measure every case and print JSON."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    report = {"pictures": COUNT, "batch": BATCH} | {
        case: compare(folder, case, int(repeats)) for case in cases or CASES}
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1] == "--serve" else main(*sys.argv[1:])
