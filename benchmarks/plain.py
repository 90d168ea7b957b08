"""The contenders of benchmarks/engine.py: what a competent user writes without this project.

    python benchmarks/plain.py epoch DATA [--batches 12]      an epoch of the original's protocol, or a part
    python benchmarks/plain.py final DATA [--epochs 10]       the original's final training: takes hours
    python benchmarks/plain.py search DATA                    all of the original's protocol: takes a day
    python benchmarks/plain.py finetune DATA [--seconds 300]  arrays in memory, AdamW, one-cycle, EMA, flips
    python benchmarks/plain.py probe DATA                     frozen features and logistic regression

DATA has train/CLASS and test/CLASS. Each prints one JSON object; --answers FILE keeps what was said about
each test picture, in the columns of `automl-cv predict --csv`. Nothing of automl_cv is imported.

`search` is the protocol of the project that this one grew from: plain PyTorch from a folder, pictures scaled
to 150 x 150, a flip and a rotation by up to 10 degrees, batches of 32, float32, and three numbers searched by
Optuna in ten whole trainings: Adam, SGD or RMSprop, a learning rate from 1e-5 to 1e-2, 1 to 10 epochs; then
the best once more. Every epoch is judged on the test folder, so the search tunes on it: that is its flaw, and
a part of what it reaches. `epoch` and `final` are its parts. The original had ResNet18; the default here is
the network whose weights are at hand. `--network resnet18 --weights ""` costs what the original cost.
"""

import time

STARTED = time.monotonic()  # a time limit counts from here, because importing torch takes seconds

import argparse
import copy
import csv
import json
import math
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

try:
    import torchvision
except RuntimeError:  # its wheel was built for a GPU's torch and finds its operators missing in a CPU's
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for kind in ("nms", "qnms"):
        LIBRARY.define(f"{kind}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
from torchvision import transforms
from torchvision.datasets import ImageFolder

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHTS = os.environ.get("AUTOML_CV_WEIGHTS") or str(SHARED / "weights")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRIALS = 10  # of the search
MEAN_EPOCHS = 5.5  # of a trial: Optuna's first ten are uniform draws from 1 to 10, whatever they find
EMA = 0.99


def used() -> float:
    """Return the CPU seconds of this process and of the children that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def has_bfloat16() -> bool:
    """Tell whether bfloat16 is computed rather than emulated."""
    flags = Path("/proc/cpuinfo")
    known = flags.read_text().split() if flags.exists() else []
    return DEVICE.type == "cuda" or "avx512_bf16" in known or "amx_bf16" in known


def small_cnn() -> nn.Sequential:
    """Build what people write where there are no weights: three stages of convolutions, a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip((3, 32, 64, 128), (32, 64, 128, 256)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
                   nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 1000))


def build(network: str, classes: int, weights: str) -> nn.Module:
    """Build a network with a new last layer, from the weights in a folder, or from scratch without one."""
    model = small_cnn() if network == "cnn" else getattr(torchvision.models, network)()
    if weights:
        found = sorted(Path(weights).glob(f"{network}[.-]*"))
        if not found:
            raise SystemExit(f"No weights of {network} in {weights}; --weights '' trains from scratch.")
        load = load_file if found[0].suffix == ".safetensors" else torch.load
        model.load_state_dict(load(found[0]))
    name, last = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]
    model.set_submodule(name, nn.Linear(last.in_features, classes))
    return model.to(DEVICE)


def open_folder(data: Path, split: str, *augmentations: object) -> ImageFolder:
    """Open a split as the original does."""
    to_tensor = transforms.ToTensor(), transforms.Normalize(MEAN, STD)
    steps = transforms.Resize((150, 150)), *augmentations, *to_tensor
    return ImageFolder(data / split, transforms.Compose(steps))


def original_loaders(options: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    """Load training and test folder as the original does, or a random part of each.

    Without workers: of 65 CPU-ms a picture, decoding is 1.6, and on two cores a worker makes the threads of a
    step wait for each other, which costs CPU time.
    """
    augmentations, parts = (transforms.RandomHorizontalFlip(), transforms.RandomRotation(10)), []
    for part in (open_folder(options.data, "train", *augmentations), open_folder(options.data, "test")):
        count = min(len(part), 32 * options.batches or len(part))
        parts.append(Subset(part, torch.randperm(len(part))[:count].tolist()))
    return DataLoader(parts[0], batch_size=32, shuffle=True), DataLoader(parts[1], batch_size=32)


def one_epoch(model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> None:
    """Train on every picture once."""
    model.train()
    for images, targets in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images.to(DEVICE)), targets.to(DEVICE))
        loss.backward()
        optimizer.step()


@torch.no_grad()
def judge(model: nn.Module, loader: DataLoader) -> np.ndarray:
    """Return the probabilities of a folder's pictures, float32 [N, C]."""
    model.eval()
    return torch.cat([model(images.to(DEVICE)).softmax(1).cpu() for images, _ in loader]).numpy()


def original_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """Build one of the original's three optimizers."""
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}
    return kinds[options.optimizer](model.parameters(), lr=options.lr)


def timed(work: Callable[[], object], pictures: int, whole: int) -> dict[str, float]:
    """Do a part of some work; return its wall and CPU seconds, and both for the whole."""
    cpu, started = used(), time.monotonic()
    work()
    wall, cpu, scale = time.monotonic() - started, used() - cpu, whole / pictures
    return {"pictures": pictures, "wall": wall, "cpu": cpu, "whole_wall": wall * scale,
            "whole_cpu": cpu * scale}


def epoch(options: argparse.Namespace) -> dict[str, object]:
    """Measure an epoch of the original's and its judging on the test folder; extrapolate to the protocol."""
    whole = [len(open_folder(options.data, split)) for split in ("train", "test")]
    train, test = original_loaders(options)
    model = build(options.network, len(train.dataset.dataset.classes), options.weights)
    optimizer = original_optimizer(model, options)
    model(torch.zeros(2, 3, 150, 150, device=DEVICE))  # memory and kernels
    parts = {"train": timed(lambda: one_epoch(model, train, optimizer), len(train.dataset), whole[0]),
             "judge": timed(lambda: judge(model, test), len(test.dataset), whole[1])}
    cost = {kind: sum(part[f"whole_{kind}"] for part in parts.values()) for kind in ("wall", "cpu")}
    epochs = (TRIALS + 1) * MEAN_EPOCHS
    return {"network": options.network, **parts, "measured_share": round(len(train.dataset) / whole[0], 3),
            "epoch_wall_seconds": cost["wall"], "epoch_cpu_seconds": cost["cpu"], "protocol_epochs": epochs,
            "protocol_cpu_hours": cost["cpu"] * epochs / 3600,
            "note": f"Extrapolated: {TRIALS} trials and a final training, {MEAN_EPOCHS} epochs each."}


def train_original(options: argparse.Namespace) -> dict[str, object]:
    """Train once as the original does; the best of its epochs on the test folder is its figure."""
    torch.manual_seed(options.seed)
    train, test = original_loaders(options)
    files, targets = zip(*(test.dataset.dataset.samples[i] for i in test.dataset.indices))
    model = build(options.network, len(train.dataset.dataset.classes), options.weights)
    optimizer, history, best = original_optimizer(model, options), [], np.zeros(0)
    for _ in range(options.epochs):
        one_epoch(model, train, optimizer)
        answers = judge(model, test)
        history.append(float((answers.argmax(1) == np.array(targets)).mean()))
        best = answers if history[-1] == max(history) else best
    write_answers(options.answers, files, best, train.dataset.dataset.classes)
    return {"network": options.network, "accuracy": max(history), "best_epoch": 1 + int(np.argmax(history)),
            "history": history, "settings": f"{options.optimizer}, {options.lr:.2g}, {options.epochs} epochs"}


def search(options: argparse.Namespace) -> dict[str, object]:
    """Do all of the original's protocol: ten whole trainings, and the best of them once more."""
    import optuna

    def objective(trial: optuna.Trial) -> float:
        options.optimizer = trial.suggest_categorical("optimizer", ["adam", "sgd", "rmsprop"])
        options.lr = trial.suggest_float("lr", 1e-5, 1e-2, log=True)
        options.epochs = trial.suggest_int("epochs", 1, 10)
        return train_original(options)["accuracy"]
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=options.seed))
    study.optimize(objective, n_trials=TRIALS)
    vars(options).update(study.best_params)
    trials = [trial.params | {"accuracy": trial.value} for trial in study.trials]
    return train_original(options) | {"trials": trials}


def read_split(data: Path, split: str, side: int) -> tuple[list[str], np.ndarray, Tensor, list[str]]:
    """Decode a split once: files, uint8 [N, 3, side, side], classes int64 [N], and their names."""
    def decode(path: str) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR))
    folder = ImageFolder(data / split)
    files = [path for path, _ in folder.samples]
    with ThreadPoolExecutor(2) as pool:
        images = np.stack(list(pool.map(decode, files))).transpose(0, 3, 1, 2)
    return files, np.ascontiguousarray(images), torch.tensor(folder.targets), folder.classes


def normalise(images: np.ndarray | Tensor) -> Tensor:
    """Turn uint8 [N, 3, S, S] into what a network expects, channels last."""
    mean, std = (255 * torch.tensor(part).view(1, 3, 1, 1) for part in (MEAN, STD))
    floats = (torch.as_tensor(images).float() - mean) / std
    return floats.to(DEVICE, memory_format=torch.channels_last, non_blocking=True)


def augment(images: np.ndarray, size: int, random: np.random.Generator) -> Tensor:
    """Crop each picture at a random place and flip half of them."""
    room = images.shape[2] - size + 1
    places = zip(images, random.integers(room, size=len(images)), random.integers(room, size=len(images)))
    cropped = np.stack([image[:, y:y + size, x:x + size] for image, y, x in places])
    flipped = random.random(len(images)) < 0.5
    cropped[flipped] = cropped[flipped, :, :, ::-1]
    return normalise(cropped)


def batches(count: int, size: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield shuffled batches of indices, epoch after epoch, the pictures that fill no batch left out."""
    while True:
        order = random.permutation(count)
        yield from order[:max(1, count // size) * size].reshape(-1, min(count, size))


def one_cycle(progress: float) -> float:
    """Return the learning rate's factor: up in a fifth of the way, then down along a cosine."""
    if progress < 0.2:
        return progress / 0.2
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.2) / 0.8)))


@torch.no_grad()
def average(mean: nn.Module, model: nn.Module, step: int) -> None:
    """Move the averaged weights towards the network's, faster in the first steps."""
    pairs = zip(mean.state_dict().values(), model.state_dict().values())
    kept = [(a, b) for a, b in pairs if a.is_floating_point()]
    torch._foreach_lerp_(*map(list, zip(*kept)), 1 - min(EMA, (1 + step) / (10 + step)))


@torch.inference_mode()
def answer(model: nn.Module, images: np.ndarray, size: int) -> np.ndarray:
    """Return the probabilities of pictures' middles and their mirrors, float32 [N, C]."""
    model.eval()
    edge, parts = (images.shape[2] - size) // 2, []
    for start in range(0, len(images), 128):
        batch = normalise(images[start:start + 128, :, edge:edge + size, edge:edge + size])
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=has_bfloat16()):
            logits = model(batch), model(batch.flip(3))
        parts.append(sum(part.float().softmax(1) for part in logits).cpu() / 2)
    return torch.cat(parts).numpy()


def write_answers(path: str, files: list[str], answers: np.ndarray, classes: list[str]) -> None:
    """Write what was said about each picture."""
    rows = [[name, classes[row.argmax()], f"{row.max():.6f}", ""] for name, row in zip(files, answers)]
    if path:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["file", "label", "confidence", "error"], *rows])


def train_until(model: nn.Module, images: np.ndarray, targets: Tensor,
                options: argparse.Namespace) -> tuple[nn.Module, int]:
    """Train until the time limit or the epochs are over; return the averaged network and the steps."""
    random, begun, step, progress = np.random.default_rng(options.seed), time.monotonic(), 0, 0.0
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": options.decay},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer, mean = torch.optim.AdamW(groups, lr=options.lr), copy.deepcopy(model)
    limit = max(1.0, STARTED + options.seconds - begun) if options.seconds else math.inf
    steps, bf16 = options.epochs * max(1, len(images) // options.batch), has_bfloat16()
    model.train()
    for index in batches(len(images), options.batch, random):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * one_cycle(progress)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            logits = model(augment(images[index], options.size, random))
        loss = nn.functional.cross_entropy(logits.float(), targets[index].to(DEVICE), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        average(mean, model, step)
        progress = max(step / steps, (time.monotonic() - begun) / limit)
        if progress >= 1:
            return mean, step


def finetune(options: argparse.Namespace) -> dict[str, object]:
    """Fine-tune with a schedule planned for the time limit, and judge on the test folder after it."""
    torch.manual_seed(options.seed)
    side = round(1.1 * options.size)
    _, images, targets, classes = read_split(options.data, "train", side)
    options.batch = 64 if len(images) >= 2000 else 16
    model = build(options.network, len(classes), options.weights).to(memory_format=torch.channels_last)
    mean, steps = train_until(model, images, targets, options)
    trained, epochs = time.monotonic() - STARTED, steps * min(options.batch, len(images)) / len(images)
    files, pictures, truth, _ = read_split(options.data, "test", side)
    answers = answer(mean, pictures, options.size)
    write_answers(options.answers, files, answers, classes)
    return {"network": options.network, "accuracy": float((answers.argmax(1) == truth.numpy()).mean()),
            "epochs": round(epochs, 2), "trained_until_seconds": trained}


@torch.inference_mode()
def extract(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Run a frozen network over pictures, float32 [N, D]."""
    model.eval()
    parts = []
    for start in range(0, len(images), 64):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=has_bfloat16()):
            parts.append(model(normalise(images[start:start + 64])).float().cpu())
    return torch.cat(parts).numpy()


def probe(options: argparse.Namespace) -> dict[str, object]:
    """Fit logistic regression to frozen features, its strength cross-validated where there is little data."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    _, images, targets, classes = read_split(options.data, "train", options.size)
    files, pictures, truth, _ = read_split(options.data, "test", options.size)
    model = build(options.network, len(classes), options.weights)
    name = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]
    model.set_submodule(name, nn.Identity())
    model.to(memory_format=torch.channels_last)
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300, tol=1e-3))
    if len(images) <= 3000:
        regression = GridSearchCV(regression, {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}, cv=3,
                                  scoring="neg_log_loss")
    regression.fit(extract(model, images), targets.numpy())
    answers = regression.predict_proba(extract(model, pictures))
    write_answers(options.answers, files, answers, classes)
    return {"network": options.network, "accuracy": float((answers.argmax(1) == truth.numpy()).mean())}


CONTENDERS = {"epoch": epoch, "final": train_original, "search": search, "finetune": finetune, "probe": probe}


def parse() -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("data", type=Path, help="a folder with train/CLASS and test/CLASS")
    parser.add_argument("--network", default="mobilenet_v2", help="of torchvision.models, or cnn")
    parser.add_argument("--weights", default=WEIGHTS, help="folder; empty trains from scratch")
    parser.add_argument("--answers", default="", help="CSV file for what was said about each test picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="1 measures CPU time on a busy machine best")
    parser.add_argument("--batches", type=int, default=0, help="a part, of the original; 0 for all")
    parser.add_argument("--optimizer", default="adam", choices=("adam", "sgd", "rmsprop"))
    parser.add_argument("--lr", type=float, help="1e-4 for final, 5e-4 for finetune")
    parser.add_argument("--epochs", type=int, help="10 for final; of finetune the most, 30")
    parser.add_argument("--seconds", type=float, default=0.0, help="of finetune, from the start; 0: no limit")
    parser.add_argument("--size", type=int, help="side of the input: 160 for finetune, 192 for probe")
    parser.add_argument("--decay", type=float, default=0.05, help="of finetune, weight decay")
    return parser.parse_args()


def main() -> None:
    """Run one contender."""
    options = parse()
    torch.set_num_threads(options.threads)
    known = {"finetune": (5e-4, 30, 160), "probe": (0.0, 0, 192)}.get(options.contender, (1e-4, 10, 150))
    for name, value in zip(("lr", "epochs", "size"), known):
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    found = CONTENDERS[options.contender](options)
    print(json.dumps(found | {"wall_seconds": time.monotonic() - STARTED, "cpu_seconds": used()}))


if __name__ == "__main__":
    main()
