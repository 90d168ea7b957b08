"""MLflow's database is made once, however many processes ask for it."""

import os
import signal
import time
from multiprocessing import get_context

import pytest

from automl_cv.core import AutomlError
from automl_cv.tracking import connect


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


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "postgresql+psycopg://me@127.0.0.1:9/none", "carrier://pigeon"])
def test_server_that_does_not_answer_is_said_in_words(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(AutomlError) as caught:
        connect()
    assert caught.value.code == "source_unreachable" and "MLFLOW_TRACKING_URI" in str(caught.value)
