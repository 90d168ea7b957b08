"""MLflow's database is made once, however many processes ask for it."""

from multiprocessing import get_context

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
