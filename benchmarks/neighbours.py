"""What two settings of the learner buy: kept memory, and threads that sleep while they wait.

    python benchmarks/neighbours.py [REPEATS]

Trains MobileNetV2 at 160 pixels for a few steps in processes of their own, with and without the settings,
alone and beside one busy process, alternating. Prints JSON: pictures per second and CPU milliseconds per
picture, medians and spread. Run it on an otherwise idle machine.
"""

import json
import os
import statistics
import subprocess
import sys

CHILD = """
import os, resource, sys, time
import torch
from automl_cv.machine import keep_memory
from automl_cv.models import create_model
if sys.argv[1] == "engine":
    keep_memory()
model = create_model("mobilenet_v2", 6, pretrained=False).train()
images = torch.randint(0, 256, (64, 160, 160, 3), dtype=torch.uint8)
targets = torch.randint(0, 6, (64,))
def step():
    torch.nn.functional.cross_entropy(model(images), targets).backward()
step(); step()
cpu = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
before, started = cpu(), time.monotonic()
for _ in range(3): step()
print(192 / (time.monotonic() - started), 1000 * (cpu() - before) / 192)
"""


def measure(contender: str, busy: bool) -> tuple[float, float]:
    """Return pictures per second and CPU milliseconds per picture of one process."""
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE" if contender == "engine" else ""}
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        done = subprocess.run([sys.executable, "-c", CHILD, contender], env=env, text=True,
                              capture_output=True, check=True)
    finally:
        if neighbour:
            neighbour.kill()
            neighbour.wait()
    speed, cpu = map(float, done.stdout.split())
    return speed, cpu


def main(repeats: int = 3) -> None:
    """Alternate all contenders and print what was found."""
    cases = [(contender, busy) for busy in (False, True) for contender in ("plain", "engine")]
    found: dict[tuple[str, bool], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            found[case].append(measure(*case))
    report = {}
    for (contender, busy), rows in found.items():
        speeds, cpus = zip(*rows)
        report[f"{contender}, {'one busy neighbour' if busy else 'alone'}"] = {
            "pictures_per_second": round(statistics.median(speeds), 1),
            "spread": [round(min(speeds), 1), round(max(speeds), 1)],
            "cpu_ms_per_picture": round(statistics.median(cpus), 1)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
