"""What an answer costs over HTTP, beside the plain service that this project grew from.

    python benchmarks/serving.py [--requests 150] [--repeats 3] [--clients 8] [--data FOLDER]

The contender is what the original is: FastAPI, an async handler, Pillow and eager torch. Both serve the same
ResNet18 at 150 pixels, with random weights: they cost the same as any. The two take turns, each in a process
of its own, and answer the same pictures. Prints one JSON object: CPU milliseconds of the server for each
request, requests a second, the median and the worst hundredth of the times, and megabytes, as medians of the
repeats. CPU milliseconds compare on a machine that has other work; seconds don't.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from PIL import Image

SIDE, CLASSES = 150, ["a", "b", "c", "d", "e", "f"]
OURS = ("-m", "automl_cv.serve")


def plain_service(port: int) -> None:
    """Serve as the original does."""
    import torch
    import uvicorn
    from fastapi import FastAPI, UploadFile

    from automl_cv.compat import torchvision  # or it cannot be imported beside a torch without GPUs

    transforms = torchvision.transforms

    app, network = FastAPI(), torchvision.models.resnet18(num_classes=len(CLASSES)).eval()
    prepare = transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.ToTensor(),
                                  transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])

    @app.get("/health/ready")
    async def ready() -> str:
        return "ready"

    @app.post("/predict")
    async def predict(file: UploadFile) -> dict[str, object]:
        image = prepare(Image.open(io.BytesIO(await file.read())).convert("RGB"))
        with torch.no_grad():
            shares = network(image[None]).softmax(1)[0]
        return {"label": CLASSES[int(shares.argmax())], "confidence": float(shares.max())}

    uvicorn.run(app, port=port, log_level="warning")


def make_bundle(folder: Path) -> Path:
    """Write a bundle with the same network."""
    from automl_cv.export import export_bundle
    from automl_cv.models import create_model
    from automl_cv.pixels import Policy

    facts = {"name": "bench", "backbone": "resnet18", "pretrained": False, "origin": "", "licence": "",
             "config": {}, "data": {"images": 0, "fingerprint": "0" * 64}}
    model = create_model("resnet18", len(CLASSES), pretrained=False).eval()
    export_bundle(model, folder, CLASSES, Policy(SIDE, SIDE), facts)
    return folder


def draw(sides: tuple[int, int], count: int) -> list[bytes]:
    """Draw JPEGs of noise that is smooth enough to look like photographs to a decoder."""
    found = []
    for seed in range(count):
        file, coarse = io.BytesIO(), Image.effect_noise((sides[0] // 8, sides[1] // 8), 80 + seed)
        coarse.resize(sides, Image.Resampling.BICUBIC).convert("RGB").save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def spent(pid: int) -> tuple[float, float]:
    """Return a process's CPU seconds and its resident megabytes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()
    ticks = sum(int(fields[i]) for i in (11, 12)) / os.sysconf("SC_CLK_TCK")
    return ticks, int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def wait(url: str) -> None:
    """Wait until a service answers."""
    for _ in range(1200):
        try:
            return httpx.get(f"{url}/health/ready", trust_env=False).raise_for_status() and None
        except httpx.HTTPError:
            time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


def measure(command: tuple[str, ...], port: int, pictures: list[bytes], options: argparse.Namespace) -> dict:
    """Run one service and ask it for every picture, several clients at once."""
    env = os.environ | {"PORT": str(port), "AUTOML_CV_MODEL": options.bundle, "HOST": "127.0.0.1"}
    process = subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait(url)
        with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:

            def ask(index: int) -> float:
                started = time.perf_counter()
                picture = pictures[index % len(pictures)]
                client.post("/predict", files={"file": ("a.jpg", picture)}).raise_for_status()
                return time.perf_counter() - started

            with ThreadPoolExecutor(options.clients) as pool:
                list(pool.map(ask, range(20)))
                before, started = spent(process.pid)[0], time.perf_counter()
                times = sorted(pool.map(ask, range(options.requests)))
                seconds, (after, memory) = time.perf_counter() - started, spent(process.pid)
    finally:
        process.terminate()
        process.wait(20)
    return {"cpu_ms": 1000 * (after - before) / len(times), "per_second": len(times) / seconds,
            "p50_ms": 1000 * statistics.median(times), "p99_ms": 1000 * times[int(0.99 * len(times))], "mb": memory}


def main() -> None:
    """Let the two take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--sides", nargs="*", default=["150x150", "1920x1080"])
    parser.add_argument("--plain", type=int, default=0, help="serve the contender at this port")
    options = parser.parse_args()
    if options.plain:
        return plain_service(options.plain)
    options.bundle = str(make_bundle(Path(tempfile.mkdtemp()) / "model"))
    report = {}
    for size in options.sides:
        pictures, found = draw(tuple(map(int, size.split("x"))), 8), {"ours": [], "plain": []}
        for turn in range(options.repeats):
            for name, words in (("ours", OURS), ("plain", (__file__, "--plain", "{port}"))):
                port = 20000 + os.getpid() % 20000 + 2 * turn + (name == "plain")
                command = tuple(word.format(port=port) for word in words)
                found[name].append(measure(command, port, pictures, options))
        medians = {name: {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
                   for name, runs in found.items()}
        ratio = {key: round(medians["plain"][key] / medians["ours"][key], 2) for key in medians["ours"]}
        report[size] = medians | {"plain_to_ours": ratio}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
