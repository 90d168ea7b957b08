"""Our predictor without HTTP. Reads one order a line, and answers each with a line of JSON.

    loop SECONDS   classify the listed pictures in a loop, in as many threads as cores
    call SECONDS   classify them one at a time
    decode FILE    decode one picture as the service does, and classify it
    full FILE      the same from a decoding at full size
"""

import json
import os
import statistics
import sys
import threading
import time
from itertools import cycle
from pathlib import Path

from automl_cv.pixels import centre_crop, decode, to_square
from automl_cv.predict import Predictor, cores, fastest, judge

predictor = Predictor(Path(os.environ["AUTOML_CV_MODEL"])) if os.environ.get("FP32") else fastest(
    Path(os.environ["AUTOML_CV_MODEL"]))
pictures = [Path(line).read_bytes() for line in Path(os.environ["LIST"]).read_text().split("\n") if line]


def loop(seconds: float, workers: int) -> dict[str, object]:
    """Classify pictures for a while."""
    end, times = time.perf_counter() + seconds, []

    def work(start: int) -> None:
        for data in cycle(pictures[start:] + pictures[:start]):
            started = time.perf_counter()
            if started > end:
                return
            predictor.predict(data)
            times.append(1000 * (time.perf_counter() - started))

    threads = [threading.Thread(target=work, args=(n * len(pictures) // workers,)) for n in range(workers)]
    started, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"per_second": len(times) / (time.perf_counter() - started), "p50_ms": statistics.median(times),
            "cpu_ms": 1000 * (time.process_time() - cpu) / len(times), "precision": predictor.precision}


def one(path: str, whole: bool) -> dict[str, object]:
    """Decode and classify one picture."""
    data, policy = Path(path).read_bytes(), predictor.policy
    started = time.process_time()
    if whole:
        square = to_square(decode(data)[0], policy.store, policy.fit, policy.version)
        image = centre_crop(square, policy.size)
    else:
        image = predictor.decode(data)[0]
    spent, found = 1000 * (time.process_time() - started), judge(predictor, image)
    return {"ms": spent, "label": found.label, "confidence": found.confidence}


for line in sys.stdin:
    order, value = line.split(maxsplit=1)
    if order in ("loop", "call"):
        answer = loop(float(value), cores() if order == "loop" else 1)
    else:
        answer = one(value.strip(), order == "full")
    print(json.dumps(answer), flush=True)
