"""What the data step costs and finds, each figure beside its reference in the same run. Prints JSON.

    python benchmarks/data.py [scan] [grow] [kill] [twins] [cache] [faults] [--repeats 3] [--pictures 0]

Without words all parts run.

scan    the whole photograph set in ../shared/data/intel checked end to end, cold and again, its copies counted
grow    1,000, 10,000 and 100,000 drawn files in up to 1,000 classes: seconds, CPU seconds and memory of a scan
kill    a check killed at random moments, then the same command: is the manifest the same, was anything read twice
twins   the search for near-duplicates among 1,000 to 100,000 drawn thumbnails, a hundredth of them planted copies;
        medians of --repeats, and up to 10,000 beside a search that leaves nothing out
cache   benchmarks/cache.py: building and reading the decoded pictures against torchvision
faults  benchmarks/faults.py: planted near-duplicates and wrong labels, in all pictures or in --pictures of them (from
        600 on)

Needs ../shared/data for scan, cache and faults. Only ratios and CPU seconds compare between machines.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
INTEL = ROOT.parent / "shared/data/intel"
CLI = [sys.executable, "-c", "from automl_cv.cli import main; main()"]


def check(data: Path, home: Path) -> dict[str, float]:
    """Run `automl-cv check` as a process: what it printed, and what it cost."""
    env = os.environ | {"AUTOML_CV_HOME": str(home)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([*CLI, "check", str(data), "--json"], env=env, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout) | {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(cpu, 1)}


def manifest(home: Path) -> bytes:
    """Read the manifest that a check left."""
    return next(home.glob("checks/*/manifest.parquet")).read_bytes()


def scan() -> dict[str, object]:
    """Check the photographs cold, then again when nothing changed; the reference reads and decodes them plainly."""
    with tempfile.TemporaryDirectory() as room:
        started = time.monotonic()
        for path in INTEL.rglob("*.jpg"):
            np.asarray(Image.open(path).convert("RGB"))
        reference = time.monotonic() - started
        cold, warm = check(INTEL, Path(room)), check(INTEL, Path(room))
        hashes = pd.read_parquet(io.BytesIO(manifest(Path(room)))).sha256
    names = ("found", "used", "quarantined", "ignored", "duplicates", "leaked", "conflicts", "near_duplicate_groups")
    return {"cold": {k: cold[k] for k in ("seconds", "cpu_seconds")}, "byte_identical_pairs": int(hashes.duplicated().sum()),
            "unchanged": {k: warm[k] for k in ("seconds", "cpu_seconds")},
            "plain_decode_seconds": round(reference, 1), **{name: cold[name] for name in names}}


def draw_files(folder: Path, count: int) -> None:
    """Write small distinct pictures, a hundred to a class."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class_{number // 100:04d}" / f"{number:06d}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        field = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
        field.save(path, "JPEG", quality=80)


SCAN = """
import json, resource, sys, time
from automl_cv.items import CORES
from automl_cv.scan import scan
from automl_cv.sources import open_source
started = time.monotonic()
rows = len(scan(open_source(sys.argv[1])))
own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
cpu, peak = sum(own[:2]) + sum(others[:2]), own.ru_maxrss + CORES * others.ru_maxrss  # at most: of the largest child
print(json.dumps({"files": rows, "seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(cpu, 1),
                  "peak_mb": peak // 1024}))
"""


def grow() -> list[dict[str, float]]:
    """Scan ever more files, each time from nothing."""
    found = []
    with tempfile.TemporaryDirectory() as room:
        for count in (1_000, 10_000, 100_000):
            draw_files(Path(room, "data"), count)
            env = os.environ | {"AUTOML_CV_HOME": str(Path(room, f"home{count}"))}
            done = subprocess.run([sys.executable, "-c", SCAN, str(Path(room, "data"))], env=env, capture_output=True,
                                  text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def kill(times: int = 10) -> dict[str, object]:
    """Kill a check at random moments until it has been killed often, let it finish, and compare."""
    with tempfile.TemporaryDirectory() as room:
        draw_files(Path(room, "data"), 12_000)
        check(Path(room, "data"), Path(room, "whole"))
        env = os.environ | {"AUTOML_CV_HOME": str(Path(room, "killed"))}
        known, moments = [0], random.Random(0)
        for _ in range(times):
            process = subprocess.Popen([*CLI, "check", str(Path(room, "data")), "--json"], env=env,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and seen(Path(room, "killed")) <= known[-1]:  # it still loads its modules
                time.sleep(0.05)
            time.sleep(moments.uniform(0, 1))
            process.send_signal(signal.SIGKILL)
            process.wait()
            known.append(seen(Path(room, "killed")))
        check(Path(room, "data"), Path(room, "killed"))
        same = manifest(Path(room, "killed")) == manifest(Path(room, "whole"))
    return {"kills": times, "files_known_after_each": known, "never_fewer": known == sorted(known), "same_manifest": same}


def seen(home: Path) -> int:
    """Count the files that a killed scan had finished."""
    import sqlite3
    path = home / "cache/scan.db"
    if not path.exists():
        return 0
    with sqlite3.connect(path) as database:
        try:
            return database.execute("SELECT count(*) FROM seen").fetchone()[0]
        except sqlite3.OperationalError:  # killed before the tables were made
            return 0


TWINS = """
import json, resource, sys, time
import numpy as np
from PIL import Image
from automl_cv import twins
count, twins.SKIP = int(sys.argv[1]), float(sys.argv[2] or twins.SKIP)
rng, copies = np.random.default_rng(0), count // 100

def thumb(image, box=None):
    return np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC, box, 2.0))

def change(image, kind):  # a window of 80 to 100 % of each side, mirrored, or with noise as of a poor JPEG
    side = rng.uniform(51.2, 64)
    left, top = rng.uniform(0, 64 - side, 2)
    if kind == "mirrored":
        return thumb(image)[:, ::-1]
    if kind == "noisy":
        return np.clip(thumb(image) + rng.normal(0, 3, (16, 16, 3)), 0, 255).astype(np.uint8)
    return thumb(image, (left, top, left + side, top + side))

thumbs, planted = np.empty((count + 3 * copies, 16, 16, 3), np.uint8), []
for i in range(count):
    image = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    thumbs[i] = thumb(image)
    for kind in ("cropped", "mirrored", "noisy") if i < copies else ():
        thumbs[count + len(planted)] = change(image, kind)
        planted.append((kind, i))
before, drawn = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pairs = twins.list_candidates(thumbs)
found = {frozenset(pair) for pair in zip(pairs["first"], pairs["second"])}
hits = [(kind, frozenset((i, count + n)) in found) for n, (kind, i) in enumerate(planted)]
print(json.dumps({"cpu_seconds": time.process_time() - before, "pairs": len(pairs),
                  "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "drawn_mb": drawn // 1024,
                  "recall": {kind: sum(hit for k, hit in hits if k == kind) / copies for kind, _ in planted[:3]}}))
"""


def search(count: int, skip: str) -> dict[str, float]:
    """Look for copies among drawn thumbnails in a process of its own."""
    done = subprocess.run([sys.executable, "-c", TWINS, str(count), skip], stdout=subprocess.PIPE, text=True,
                          check=True)
    return json.loads(done.stdout)


def twins(repeats: int = 3) -> list[dict[str, object]]:
    """Search ever more thumbnails as the product does, and up to 10,000 through all branches."""
    rows = []
    for count in (1_000, 10_000, 40_000, 100_000):
        for name, skip in (("product", ""), ("all_branches", "0")):
            if name == "product" or count <= 10_000:
                runs = [search(count, skip) for _ in range(repeats)]
                cpu = statistics.median(run["cpu_seconds"] for run in runs)
                rows.append({"pictures": count, "search": name} | runs[0]
                            | {"cpu_seconds": round(cpu, 1), "cpu_ms_per_picture": round(1000 * cpu / count, 2)})
    return rows


def other(name: str, *words: str) -> object:
    """Run another benchmark and take its JSON."""
    command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout[done.stdout.index("{"):])


def sample(folder: Path, count: int) -> None:
    """Copy some of the photographs, evenly spread."""
    paths = sorted(INTEL.rglob("*.jpg"))
    for path in [paths[i * len(paths) // count] for i in range(min(count, len(paths)))]:
        place = folder / path.relative_to(INTEL)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def faults(pictures: int = 0) -> dict[str, object]:
    """Plant near-duplicates and wrong labels and look for them."""
    with tempfile.TemporaryDirectory() as room:
        sample(Path(room), pictures)
        data = Path(room) if pictures else INTEL
        return {"near_duplicates": other("faults", "twins", str(data)),
                "mislabels": other("faults", "mislabels", str(data / "train"))}


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="PART")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=0)
    given = parser.parse_args()
    parts = {"scan": scan, "grow": grow, "kill": kill, "twins": lambda: twins(given.repeats),
             "cache": lambda: other("cache", str(INTEL / "train")), "faults": lambda: faults(given.pictures)}
    if unknown := set(given.words) - set(parts):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    print(json.dumps({name: parts[name]() for name in given.words or parts}, indent=2))


if __name__ == "__main__":
    main()
