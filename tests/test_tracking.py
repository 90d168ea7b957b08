"""MLflow's database is made once, however many processes ask for it, and a bundle is registered once."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from mlflow.artifacts import download_artifacts

from automl_cv.core import AutomlError, read_json
from automl_cv.tracking import connect, tracking_uri


def test_two_processes_make_the_database_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    fork = get_context("fork")
    start, found = fork.Barrier(2), fork.Queue()

    def ask():
        start.wait()
        found.put(connect()[1])

    workers = [fork.Process(target=ask) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert found.get(timeout=9) == found.get(timeout=9) == connect()[1]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_killed_while_it_makes_the_database(tmp_path, monkeypatch, share):
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    worker = get_context("fork").Process(target=connect)
    worker.start()
    while not any(path.stat().st_size > share * 700_000 for path in tmp_path.rglob("mlflow.db")):
        assert worker.is_alive()
        time.sleep(0.002)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert worker.exitcode == -signal.SIGKILL and connect()[1] == connect()[1]
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.lock"}


KILLED = """
import os, signal, sys
from automl_cv import data, evaluate, plan, tracking, train

def register(*told):
    tracking.register(*told)
    os.kill(os.getpid(), signal.SIGKILL)

evaluate.register, plan.SMALL = register, 0  # what is not small is judged, and offered, after each epoch
data.run_step(sys.argv[1], "demo:4")
train.run_step(sys.argv[1], epochs=1)
try:
    evaluate.run_step(sys.argv[1], min_accuracy=1.1)
except tracking.AutomlError as error:
    assert (error.code, list(tracking.connect()[0].search_model_versions())) == ("below_gate", [])
evaluate.run_step(sys.argv[1])
"""


def test_registered_once_and_only_behind_the_gate(tmp_path, monkeypatch):
    from automl_cv.evaluate import run_step

    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    folder = str(tmp_path / "runs/r")
    assert subprocess.run([sys.executable, "-c", KILLED, folder], timeout=100).returncode == -signal.SIGKILL
    client = connect()[0]
    assert [one.version for one in client.search_model_versions("name = 'automl_cv'")] == [1]
    accuracy = run_step(folder)["final"]["accuracy"]
    (version,) = client.search_model_versions("name = 'automl_cv'")
    assert client.get_model_version_by_alias("automl_cv", "champion").version == version.version == 1
    kept = Path(download_artifacts(artifact_uri=version.source, tracking_uri=tracking_uri(), dst_path=str(tmp_path)))
    assert read_json(kept / "model.json")["metrics"]["accuracy"] == accuracy
    assert "Not evaluated yet" not in (kept / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "postgresql+psycopg://me@127.0.0.1:9/none", "carrier://pigeon"])
def test_server_that_does_not_answer_is_said_in_words(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(AutomlError) as caught:
        connect()
    assert caught.value.code == "source_unreachable" and "MLFLOW_TRACKING_URI" in str(caught.value)
