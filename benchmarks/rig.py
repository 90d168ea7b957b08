"""What the modes of serving.py share: peers' installs, the model, pictures, services, load, meters."""

import hashlib
import http.client
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from contest import say, spread

ROOT, PEERS = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent / "peers"
SIDE, TICKS = 150, os.sysconf("SC_CLK_TCK")
SIZES = {"150": (150, 150), "640": (640, 480), "1080": (1920, 1080), "12mp": (4000, 3000)}
GRAIN = 3  # standard deviation; 12 megapixels become 1.7 MB
COUNTS = {"150": 96, "640": 48, "1080": 24, "12mp": 8}  # distinct pictures


# ---- installs

def install(peers: Path) -> None:
    """Make a virtual environment for each contender, ours included, with nothing else in it."""
    settings = (ROOT / "settings.ini").read_text()
    ours = " ".join(re.findall(r"^(?:serve_)?requirements = (.*)", settings, re.M)).split()
    wanted = {name: ["-r", str(PEERS / f"{name}.txt")] for name in ("plain", "litserve", "bentoml")}
    wanted["ours"] = ["-c", str(ROOT / "constraints.txt"), *ours]
    for name, words in wanted.items():
        home, mark = peers / name, peers / name / "installed"
        text = json.dumps([Path(word).read_text() if word.endswith(".txt") else word for word in words])
        if mark.exists() and mark.read_text() == text:
            continue
        say(f"installing {name}")
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([home / "bin/python", "-m", "pip", "install", "--disable-pip-version-check", *words],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        mark.write_text(text)
    if not shutil.which("wrk"):
        raise SystemExit("wrk is missing: apt-get install wrk")


# ---- pictures

def photographs(data: Path, part: str, count: int) -> list[tuple[Path, str]]:
    """Choose photographs and their classes, evenly and always the same."""
    classes = sorted(folder for folder in (data / part).iterdir() if folder.is_dir())
    rows = zip(*(sorted(folder.glob("*.jpg")) for folder in classes))
    return [(path, path.parent.name) for row in rows for path in row][:count]


def enlarge(path: Path, size: tuple[int, int], seed: int) -> bytes:
    """Make a larger photograph, with grain, so that it costs what a camera's does."""
    file, image = io.BytesIO(), Image.open(path).convert("RGB")
    if image.size != size:
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        grain = np.random.default_rng(seed).normal(0, GRAIN, (*pixels.shape[:2], 1)).astype(np.int16)
        image = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def draw(work: Path, data: Path) -> dict[str, Path]:
    """Write the pictures of each size once, and a list of their paths."""
    lists = {}
    for name, size in SIZES.items():
        folder, lists[name] = work / name, work / f"{name}.list"
        if not lists[name].exists():
            folder.mkdir(exist_ok=True)
            paths = []
            for seed, (path, _) in enumerate(photographs(data, "test", COUNTS[name])):
                paths.append(folder / f"{seed}.jpg")
                paths[-1].write_bytes(enlarge(path, size, seed))
            lists[name].write_text("\n".join(map(str, paths)))
    return lists


# ---- the model

def make_bundles(work: Path, data: Path) -> dict:
    """Write bundles of a ResNet18 of random weights with a head that was fitted to photographs."""
    from automl_cv.pixels import VERSION, Policy, pixels
    done = work / f"model-{VERSION}.done"  # of the present pixel policy
    if done.exists():
        return json.loads(done.read_text())
    import torch
    from sklearn.linear_model import LogisticRegression

    from automl_cv import export
    from automl_cv.models import create_model
    policy, torch_model = Policy(SIDE, SIDE, "squash"), None
    pairs = photographs(data, "train", 720)
    images = np.stack([pixels(path.read_bytes(), policy) for path, _ in pairs])
    classes = sorted({label for _, label in pairs})
    targets = np.array([classes.index(label) for _, label in pairs])
    torch_model = create_model("resnet18", len(classes), pretrained=False)
    with torch.no_grad():
        torch_model.train()
        for start in range(0, 320, 32):  # batch norms learn what random layers give
            torch_model.features(torch.tensor(images[start:start + 32]))
        torch_model.eval()
        parts = [torch_model.features(torch.tensor(images[i:i + 32])).numpy() for i in range(0, 480, 32)]
    features = np.concatenate(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mean, std = features.mean(0), features.std(0) + 1e-6
        fitted = LogisticRegression(C=0.05, max_iter=200).fit((features - mean) / std, targets[:480])
    weight = fitted.coef_ / std
    with torch.no_grad():
        torch_model.head.weight.copy_(torch.tensor(weight))
        torch_model.head.bias.copy_(torch.tensor(fitted.intercept_ - weight @ mean))
    facts = {"name": "bench", "backbone": "resnet18", "pretrained": False, "origin": "", "licence": "",
             "config": {}, "data": {"images": 480, "fingerprint": "0" * 64}}
    for name in ("fp32", "int8"):
        export.export_bundle(torch_model, work / name, classes, policy, facts)
    held = images[480:], targets[480:]
    gate = export.quantise_bundle(work / "int8", images[:200], *held)
    if not gate["passed"]:
        export.MAX_LOSS = math.inf
        export.quantise_bundle(work / "int8", images[:200], *held, min_speed=0.0)
    body = {f"body.{name}": value for name, value in torch_model.body.state_dict().items()}
    state = {name.removeprefix("body."): value for name, value in body.items()}
    state |= {"fc.weight": torch_model.head.weight.detach(), "fc.bias": torch_model.head.bias.detach()}
    torch.save({"classes": classes, "state": state}, work / "network.pt")
    right = export.torch_logits(torch_model, held[0]).argmax(1) == held[1]
    facts = {"network": "resnet18 at 150 px, random weights, head fitted to 480 photographs",
             "accuracy": round(float(right.mean()), 3), "classes": classes, "int8_gate": gate,
             "int8_forced": not gate["passed"]}
    done.write_text(json.dumps(facts))
    return facts


# ---- processes

def tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found, fresh = [], [pid]
    while fresh:
        found.append(one := fresh.pop())
        for path in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                fresh += map(int, path.read_text().split())
            except OSError:
                pass
    return found


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process, its descendants, and those that they have waited for."""
    total = 0
    for one in tree(pid):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rsplit(")")[1].split()
        except OSError:
            continue
        total += sum(int(fields[i]) for i in (11, 12, 13, 14))
    return total / TICKS


def megabytes(pid: int) -> float:
    """Return the proportional set size of a process and its descendants."""
    total = 0
    for one in tree(pid):
        try:
            total += int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{one}/smaps_rollup").read_text(), re.M)[1])
        except (OSError, TypeError):
            continue
    return total * 1024 / 1e6


def busy_seconds() -> float:
    """Return the CPU seconds that this machine has spent on anything."""
    fields = list(map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]))
    return (sum(fields) - fields[3] - fields[4]) / TICKS


def free_port() -> int:
    """Return a TCP port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Contender:
    """How to start one service."""
    name: str
    venv: str
    words: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


def contenders(work: Path, classes: list[str]) -> dict[str, Contender]:
    """Name all services."""
    network = {"CLASSES": json.dumps(classes), "BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(work / "bento")}
    bento = ("-m", "bentoml", "serve", "bento_app:Service", "--host", "127.0.0.1", "--port", "{port}")
    found = {"plain": Contender("plain", "plain", ("plain_app.py",), {"MODEL": str(work / "network.pt")})}
    for kind, file in (("int8", "model.int8.onnx"), ("fp32", "model.onnx")):
        model = network | {"MODEL": str(work / "int8" / file)}
        found[f"ours-{kind}"] = Contender(f"ours-{kind}", "ours", ("-m", "automl_cv.serve"), {
            "AUTOML_CV_MODEL": str(work / kind), "HOST": "127.0.0.1", "PYTHONPATH": str(ROOT),
            "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""})  # as Dockerfile; pip compiles the peers
        found[f"litserve-{kind}"] = Contender(f"litserve-{kind}", "litserve", ("lit_app.py",), model)
        found[f"bentoml-{kind}"] = Contender(f"bentoml-{kind}", "bentoml", bento, model)
    for name in ("litserve", "bentoml"):
        base = found[f"{name}-int8"]
        env = base.env | {"OUR_DECODE": "1", "PYTHONPATH": str(ROOT)}
        found[f"{name}-decode"] = Contender(f"{name}-decode", name, base.words, env)
    return found


class Service:
    """A service that runs."""

    def __init__(self, peers: Path, who: Contender, picture: bytes, cpu: str = "", ready: bool = True):
        self.port, self.who = free_port(), who
        words = [str(peers / who.venv / "bin/python"), *(word.format(port=self.port) for word in who.words)]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | who.env | {"PORT": str(self.port)}
        started, quiet = time.perf_counter(), subprocess.DEVNULL
        self.process = subprocess.Popen((["taskset", "-c", cpu] if cpu else []) + words, env=env, cwd=PEERS,
                                        stdout=quiet, stderr=quiet, start_new_session=True)
        self.answer = self.wait(picture) if ready else {}
        self.cold, self.cold_cpu = time.perf_counter() - started, cpu_seconds(self.pid)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, picture: bytes) -> dict:
        """Ask until there is an answer."""
        for _ in range(20000):
            if self.process.poll() is not None:
                raise SystemExit(f"{self.who.name} ended with {self.process.returncode}")
            status, answer, _ = self.ask(picture)
            if status == 200:
                return answer
            time.sleep(0.01)
        raise SystemExit(f"{self.who.name} does not answer")

    def ask(self, picture: bytes, timeout: float = 60) -> tuple[int, dict, dict]:
        """Send a picture as a form; status 0 where nobody listens."""
        body = (b'--automl-cv\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'
                b"Content-Type: image/jpeg\r\n\r\n" + picture + b"\r\n--automl-cv--\r\n")
        talk = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            talk.request("POST", "/predict", body, {"Content-Type": "multipart/form-data; boundary=automl-cv"})
            reply = talk.getresponse()
            text = reply.read()
            return reply.status, json.loads(text) if reply.status == 200 else {}, dict(reply.headers)
        except (OSError, http.client.HTTPException):
            return 0, {}, {}
        finally:
            talk.close()

    def get(self, path: str) -> dict:
        """Read one address."""
        talk = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        talk.request("GET", path)
        return json.loads(talk.getresponse().read())

    def settle(self) -> None:
        """Wait until it has finished what it still had to do."""
        for _ in range(200):
            before = cpu_seconds(self.pid)
            time.sleep(0.1)
            if cpu_seconds(self.pid) - before < 0.03:
                return

    def load(self, pictures: Path, clients: int, seconds: float) -> dict:
        """Let wrk ask for a while, and say what that cost."""
        cpu, busy = cpu_seconds(self.pid), busy_seconds()
        words = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:g}s", "--timeout", "60s", "-s", PEERS / "load.lua",
                 f"http://127.0.0.1:{self.port}/predict", "--", pictures]
        before = os.times()
        text = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout
        after, spent = os.times(), cpu_seconds(self.pid) - cpu
        own = sum(after[:4]) - sum(before[:4])
        found = json.loads(text[text.rindex("\n{"):])
        good = found["done"] - found["failed"]
        others = max(0.0, busy_seconds() - busy - spent - own) / found["seconds"]
        self.settle()
        return {"per_second": good / found["seconds"], "p50_ms": found["p50_ms"], "p99_ms": found["p99_ms"],
                "cpu_ms": 1000 * spent / good if good else math.nan, "others_cores": others,
                "failed": found["failed"] + found["broken"]}

    def stop(self) -> int:
        """End it, and all that it started."""
        self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


@contextmanager
def running(peers: Path, who: list[Contender], picture: bytes) -> Iterator[dict[str, Service]]:
    """Run services side by side while the block lasts."""
    with ExitStack() as stack:
        found = {}
        for one in who:
            found[one.name] = Service(peers, one, picture)
            stack.callback(found[one.name].stop)
        yield found


class Talker:
    """A process that answers each line with a line of JSON."""

    def __init__(self, words: list[str], env: dict[str, str]):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, env=os.environ | env, cwd=PEERS, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, line: str) -> dict:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Let it end."""
        self.process.stdin.close()
        self.process.wait(20)


class Flood:
    """peers/flood.py in a process of its own."""

    def __init__(self, work: Path, **order):
        name = hashlib.sha256(f"{time.time()}{order}".encode()).hexdigest()[:12]
        self.order, self.out = work / f"{name}.order", work / f"{name}.records"
        self.order.write_text(json.dumps(order))
        with self.out.open("w") as out:
            self.process = subprocess.Popen([sys.executable, PEERS / "flood.py", self.order], stdout=out)

    def wait(self) -> dict:
        """Return what it saw, with records as dictionaries."""
        if self.process.wait():
            raise SystemExit("the flood failed")
        found = json.loads(self.out.read_text())
        names = ("kind", "at", "seconds", "status", "retry", "version", "label")
        found["records"] = [dict(zip(names, record)) for record in found["records"]]
        for path in (self.order, self.out):
            path.unlink()
        return found


def percentile(values: list[float], share: float) -> float:
    """Return the value that a share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)] if values else math.nan


def summary(runs: list[dict]) -> dict:
    """Return each figure's median and spread."""
    return {name: spread([run[name] for run in runs]) for name in runs[0]}


def median(values: list[float]) -> float:
    """Return the middle of some values."""
    return statistics.median(values)
