"""The learner on a GPU, against loops over noise that lies there already.

`synthetic` is the bound that the learner is measured against: the same network in bfloat16 and channels_last, a fused
AdamW, one batch of noise on the GPU, no pictures to read, no augmentation, no averaged weights, no checks. `recorded` is
the same loop as one CUDA graph, optimizer and all: what the card can do. `learner` is `train_one_epoch` over the
decode-once cache of real files, whose pictures are kept on the GPU; `streamed` the same where they do not fit there, and
each batch is gathered and copied. MobileNetV2's learner is short of the pictures that make cuDNN worth waiting for, unless
the case ends in `:long`. All take turns in one process, an epoch each. Before that, what a CPU cannot show is
checked: a recorded step gives the gradients of one that is not, a step that cannot be recorded goes on, memory that runs
out halves the batch, and a training that was stopped goes on.

Usage: python benchmarks/gpu.py FOLDER [REPEATS] [BACKBONE:SIZE:BATCH[:long] ...]     FOLDER has class folders
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from automl_cv import gpu
from automl_cv.cache import Images, decode_rows
from automl_cv.core import AutomlError, hash_file
from automl_cv.gpu import Replay
from automl_cv.learner import evaluate, fit, start_training, train_one_epoch, train_step
from automl_cv.models import create_model
from automl_cv.recipe import Config
from automl_cv.transforms import make_policy

CASES = ("resnet18:160:64", "resnet50:224:64", "mobilenet_v2:160:64", "mobilenet_v2:160:64:long")
EPOCH = 8192  # pictures; where there are fewer, each comes several times
GPU = torch.device("cuda")


def read_images(folder: Path, size: int) -> Images:
    """Decode all pictures, or find them decoded."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(path, label) for label, room in enumerate(classes) for path in sorted(room.iterdir())]
    rows = pd.DataFrame({"path": [path.relative_to(folder).as_posix() for path, _ in files],
                         "sha256": [hash_file(path) for path, _ in files]})
    targets = np.array([label for _, label in files])
    return Images(decode_rows(str(folder), rows, make_policy("standard", size)), targets)


def configure(case: str) -> Config:
    """Return how the learner trains: from random weights, so that no weights are needed."""
    backbone, size, batch, *long = case.split(":")
    return Config(backbone=backbone, pretrained=False, size=int(size), batch_size=int(batch),
                  epochs=1000 if long else 50)


def synthetic(config: Config, steps: int, recorded: bool) -> Callable[[], None]:
    """Return some steps of the loop over noise."""
    model = create_model(config.backbone, 6, False).to(GPU).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, capturable=recorded)
    pictures = torch.randint(256, (config.batch_size, config.size, config.size, 3), dtype=torch.uint8, device=GPU)
    labels = torch.randint(6, (config.batch_size,), device=GPU)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(pictures)
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    for _ in range(3):
        step()
    if recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay

    def epoch(kept: object = (model, optimizer, pictures, labels)) -> None:  # a recording uses their memory
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return epoch


def learner(config: Config, images: Images, share: float) -> Callable[[], None]:
    """Return an epoch of the learner, whose pictures may take a share of the free memory."""
    training = start_training(config, images, 6)

    def epoch() -> None:
        gpu.SHARE = share
        gpu._kept.clear() if not share else None
        train_one_epoch(training, images)
        training.history.append({})
        training.losses = []
        torch.cuda.synchronize()
    return epoch


def compare(folder: Path, case: str, repeats: int) -> dict[str, object]:
    """Let the contenders take turns and return medians, spreads and ratios."""
    config = configure(case)
    images = read_images(folder, config.size)
    images = images.take(np.arange(EPOCH) % len(images))
    steps = -(-len(images) // config.batch_size)
    makers = {"synthetic": lambda: synthetic(config, steps, False), "recorded": lambda: synthetic(config, steps, True),
              "learner": lambda: learner(config, images, 1 / 4), "streamed": lambda: learner(config, images, 0.0)}
    contenders, found = {name: make() for name, make in makers.items()}, {name: [] for name in makers}
    for turn in range(repeats + 1):
        for name, epoch in contenders.items():
            started = time.monotonic()
            epoch()
            if turn:  # the first is not counted: libraries choose, graphs are recorded
                found[name].append(len(images) / (time.monotonic() - started))
    report = {name: {"pictures_per_second": round(statistics.median(speeds)),
                     "spread": [round(min(speeds)), round(max(speeds))]} for name, speeds in found.items()}
    ratios = {f"{name}_over_{other}": round(statistics.median(a / b for a, b in zip(found[name], found[other])), 3)
              for name in ("learner", "streamed") for other in ("synthetic", "recorded")}
    return {**report, **ratios}


def same_gradients() -> float:
    """Return the largest difference between weights after ten steps with and without recordings, as a share."""
    config, random = configure("resnet18:64:32"), np.random.default_rng(0)
    config = replace(config, optimizer="sgd", lr=0.01)
    pictures = [torch.from_numpy(random.integers(0, 256, (32, 64, 64, 3), np.uint8)) for _ in range(10)]
    targets = [torch.from_numpy(random.integers(0, 6, 32)) for _ in range(10)]
    noise, weights = Images(np.zeros((320, 64, 64, 3), np.uint8), np.zeros(320, int)), []
    for seen in (10**9, gpu.SEEN):
        gpu.SEEN, training = seen, start_training(config, noise, 6)
        for batch in zip(pictures, targets):
            train_step(training, *batch)
        assert bool(training.replay.recordings) == (seen < 10)
        weights.append(torch.cat([p.detach().flatten() for p in training.model.parameters()]))
    return float((weights[0] - weights[1]).norm() / weights[0].norm())


def goes_on_unrecorded() -> bool:
    """Tell whether a step that waits for its result goes on without a recording, and trains the same."""
    weight = torch.nn.Parameter(torch.tensor([2.0], device=GPU))

    def step(numbers: torch.Tensor) -> torch.Tensor:
        loss = (weight * numbers).square().sum()
        loss.backward()
        return loss.detach() * (1 if loss.item() > 0 else 2)  # asks for the value: cannot be recorded

    replay, found = Replay(step, [weight]), []
    for _ in range(5):
        weight.grad = None
        found.append((replay(torch.tensor([1.0, 2.0], device=GPU)).item(), weight.grad.item()))
    torch.rand(3, device=GPU)  # the generator has to be usable again
    return list(replay.recordings.values()) == [None] and found == [(20.0, 20.0)] * 5


def goes_on_with_less_memory() -> int:
    """Return how many of 256 pictures at a time remain where 4 GB are left of the card."""
    images = Images(np.random.default_rng(0).integers(0, 256, (512, 176, 176, 3), np.uint8), np.arange(512) % 6)
    torch.cuda.empty_cache()
    ballast = torch.empty(torch.cuda.mem_get_info()[0] - 4 * 2**30, dtype=torch.uint8, device=GPU)
    training = start_training(configure("resnet50:160:256"), images, 6)
    for _ in range(3):
        train_one_epoch(training, images)
        training.history.append({})
        training.losses = []
    del ballast
    return training.micro


def goes_on_after_a_stop(folder: Path) -> dict[str, float]:
    """Return the accuracies of a training, and of the same one stopped after the first of two epochs."""
    config = replace(configure("resnet18:96:64"), epochs=3, norm="batch")
    images = read_images(folder, 96)
    held = images.sample(1000, seed=1)

    def stop(training: object) -> None:
        if len(training.history) == 1:
            raise AutomlError("interrupted", "Stopped.", "")

    found = {}
    with tempfile.TemporaryDirectory() as room:
        whole = fit(config, images, held, 6)
        found["whole"] = whole.history[-1]["accuracy"]
        try:
            fit(config, images, held, 6, Path(room, "checkpoint"), on_epoch=stop)
        except AutomlError:
            pass
        resumed = fit(config, images, held, 6, Path(room, "checkpoint"))
        found |= {"resumed": resumed.history[-1]["accuracy"], "epochs": len(resumed.history)}
    again = evaluate(resumed.averaged, held, 96).argmax(1)
    assert np.isclose((again == held.targets).mean(), found["resumed"], atol=2e-3)
    return found


def main(folder: str, repeats: str = "5", *cases: str) -> dict[str, object]:
    """Check, measure every case and print JSON."""
    report = {"card": torch.cuda.get_device_name(), "torch": torch.__version__,
              "checks": {"weights_differ_by": same_gradients(), "goes_on_unrecorded": goes_on_unrecorded(),
                         "pictures_at_a_time": goes_on_with_less_memory(),
                         "accuracy": goes_on_after_a_stop(Path(folder))}}
    print(json.dumps(report, indent=2), flush=True)
    report |= {case: compare(Path(folder), case, int(repeats)) for case in cases or CASES}
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main(*sys.argv[1:])
