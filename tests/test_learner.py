"""A training as processes see it: kill -9 and SIGTERM."""
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.torch import save_file

from automl_cv.cache import Images
from automl_cv.core import AutomlError
from automl_cv.learner import fit
from automl_cv.recipe import Config
from automl_cv.zoo import small_cnn

KILLS = int(os.environ.get("AUTOML_CV_KILLS", "3"))  # at random moments of one training
CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from automl_cv import learner
from automl_cv.cache import Images
from automl_cv.core import AutomlError, stop_on_signals
from automl_cv.features import weights_key
from automl_cv.recipe import Config

path, learner.SAVE_SECONDS = Path(sys.argv[1]), float(sys.argv[2])  # the shorter, the more there is to find
targets = np.arange(128) % 2
array = np.random.default_rng(0).integers(0, 120, (128, 70, 70, 3)) + 60 * targets[:, None, None, None]
images = Images(array.astype(np.uint8), targets.astype(np.int64))
config = Config(backbone="small_cnn", pretrained=False, size=64, epochs=3, batch_size=16, lr=5e-3,
                augmentation="trivial", strength=0.3)
print("ready", flush=True)
with stop_on_signals():
    try:
        training = learner.fit(config, images, None, 2, path)
    except AutomlError as error:
        print(json.dumps({"code": error.code}))
        sys.exit(error.exit_code)
print(json.dumps({"steps": training.step, "key": weights_key(training.averaged),
                  "loss": training.history[-1]["train_loss"]}))
"""


def start_child(path, pause=0.05):
    """Start a training in a process, at its first step or behind its checkpoint."""
    command = [sys.executable, "-c", CHILD, str(path), str(pause)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def start(tmp_path):
    """Return a function that starts or continues this test's training."""
    return functools.partial(start_child, tmp_path / "checkpoint.pt")


def finish(process):
    """Wait for a training and return what it printed last."""
    out, _ = process.communicate(timeout=120)
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return what an uninterrupted training ends with, and how many seconds it took."""
    process, started = start_child(tmp_path_factory.mktemp("whole") / "checkpoint.pt", 1e9), time.monotonic()
    return finish(process), time.monotonic() - started


def test_killed_trainings_end_with_the_weights_of_an_uninterrupted_one(start, whole):
    (expected, duration), draw = whole, random.Random(0)
    for _ in range(KILLS):
        process = start()
        time.sleep(draw.uniform(0.1, 0.9) * duration / KILLS)
        process.kill()
        process.wait()
    assert finish(start()) == expected


def test_a_terminated_training_saves_its_step_and_exits_in_time(start, whole, tmp_path):
    process, path = start(), tmp_path / "checkpoint.pt"
    while not path.exists() and process.poll() is None:  # after its first steps
        time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert finish(process) == {"code": "interrupted"}
    assert process.returncode == 4
    assert time.monotonic() - started < 8  # what a container platform waits
    assert finish(start()) == whole[0]


def test_a_training_does_not_go_on_without_the_weights_that_it_began_with(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (16, 36, 36, 3), np.uint8)
    images, path = Images(noise, np.arange(16) % 2), tmp_path / "checkpoint.pt"
    config = Config(backbone="small_cnn", size=32, epochs=1, batch_size=8, norm="frozen")
    save_file(small_cnn(1000).state_dict(), tmp_path / "small_cnn.safetensors")
    monkeypatch.setenv("AUTOML_CV_WEIGHTS", str(tmp_path))
    fit(config, images, None, 2, path)
    monkeypatch.delenv("AUTOML_CV_WEIGHTS")
    with pytest.raises(AutomlError, match="began otherwise: file small_cnn.safetensors"):
        fit(config, images, None, 2, path)


def test_checkpoint_that_finds_no_room_says_so(tmp_path):
    code = ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            f"from automl_cv.commands import told\nwith told():\n    exec({CHILD!r})")
    command = [sys.executable, "-c", code, str(tmp_path / "train.pt"), "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 5
    assert done.stderr == ("error: A file could not be read or written: [Errno 27] File too large. "
                           "Check space and rights. [disk_trouble]\n")
    assert os.listdir(tmp_path) == []
