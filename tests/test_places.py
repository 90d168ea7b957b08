"""A bundle in a bucket, served for real: emulators of both stores, a new version by SIGHUP, a damaged one refused."""
import os
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest

from automl_cv.core import read_json, write_json
from test_remote import bucket, emulators  # noqa: F401  fixtures


@pytest.fixture
def stored(bucket, bundle, tmp_path):  # noqa: F811
    """Return a bucket, a way to put a bundle of some name in it, and the bundle's address."""
    def put(name):
        copied = tmp_path / name
        shutil.copytree(bundle, copied)
        write_json(copied / "model.json", read_json(copied / "model.json") | {"name": name})
        for path in copied.iterdir():
            bucket.put(f"models/now/{path.name}", path.read_bytes())
        return f"{bucket.url}/models/now"
    return bucket, put, put("first")


def name_of(server):
    """Ask a service which model it serves."""
    return httpx.get(f"{server.url}/model", trust_env=False).json().get("name")


def test_address_is_served_and_swapped(stored, start, plain):
    bucket, put, where = stored  # noqa: F811
    with start(where) as server:
        assert httpx.post(f"{server.url}/predict", files={"file": plain("red")}, trust_env=False).json()["label"] == "red"
        assert name_of(server) == "first"
        put("second")
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 30
        while name_of(server) != "second" and time.monotonic() < end:
            time.sleep(0.1)
        assert name_of(server) == "second"
        bucket.put("models/now/model.onnx", b"half of it")
        server.process.send_signal(signal.SIGHUP)
        time.sleep(2)
        assert name_of(server) == "second"
    assert "bundle_damaged: The bundle's model.onnx is not the file" in server.log.read_text()


def test_address_is_loaded_once_for_each_signal(stored, start):
    bucket, put, where = stored  # noqa: F811
    asked = []  # for the list of the bundle's files, which each load begins with
    bucket.proxy.fault = lambda path, span: "prefix=" in path and asked.append(path) or ""
    with start(where, AUTOML_CV_WATCH="0.1") as server:  # which is for folders: the copy changes with each load
        for loads, name in enumerate(("first", "second", "third"), 1):
            if name != "first":
                put(name)
                server.process.send_signal(signal.SIGHUP)
            end = time.monotonic() + 30
            while name_of(server) != name and time.monotonic() < end:
                time.sleep(0.05)
            assert (name_of(server), len(asked)) == (name, loads)


def test_address_is_predicted_with(stored, plain, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/sky.png").write_bytes(plain("blue"))
    code = "from automl_cv.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "predict", stored[2], str(tmp_path / "pictures")], env=os.environ,
                          text=True, capture_output=True, timeout=100)
    assert done.returncode == 0 and "sky.png,blue,0.9" in done.stdout, done.stderr


def test_missing_address_is_not_ready(stored, start):
    with start(f"{stored[0].url}/models/absent") as server:
        answer = httpx.get(f"{server.url}/health/ready", trust_env=False)
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert "source_not_found: There is nothing at" in server.log.read_text()


def test_alias_is_served_however_its_slashes_are_written(bundle, start, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path / "home"))
    from automl_cv.core import Run
    from automl_cv.tracking import register, tracked_step
    with tracked_step(Run(tmp_path / "home/runs/shop"), "train", {}) as record:
        register(record, bundle, "colours")
    code = "from automl_cv.cli import main; main()"
    for alias in ("models:/colours@champion", "models://colours@champion"):
        with start("", ("-c", code, "serve", alias, "--port", "{port}")) as server:
            answer = httpx.post(f"{server.url}/predict", files={"file": plain("red")}, trust_env=False)
        assert answer.json().get("label") == "red", server.log.read_text()
