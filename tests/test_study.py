"""One study, several processes, two databases: nothing is lost or done twice, and killed workers are replaced."""
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import optuna
import pytest

from automl_cv.core import AutomlError, Run, check_stop, read_json, write_bytes
from automl_cv.study import open_study, run_trials
from automl_cv.trials import finished_trials, promote_paused
from conftest import free_port

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
EPOCHS = 9


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Run a PostgreSQL of our own, not as root, which it refuses, and return the URL of its database."""
    if not POSTGRES:
        pytest.skip("NO STUDY IS SHARED ON POSTGRESQL: Debian's postgresql is not installed")
    pytest.importorskip("psycopg", reason="THE PACKAGE psycopg IS ABSENT")
    folder, port = Path(tempfile.mkdtemp(prefix="pg-")), free_port()
    who = {}
    if os.getuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        who = {"user": "postgres" if "postgres" in names else "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(folder, who["user"])

    def call(program: str, *words: str) -> None:
        subprocess.run([POSTGRES[-1] / program, *words], check=True, cwd=folder, stdout=subprocess.DEVNULL, **who)

    call("initdb", "-D", "data", "-U", "search", "-A", "trust", "--no-sync")
    call("pg_ctl", "-D", "data", "-w", "-l", "log", "-o",
         f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off", "start")
    try:
        yield f"postgresql://search@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", "data", "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a database, of each kind in turn."""
    return f"sqlite:///{tmp_path}/optuna.db" if request.param == "sqlite" else request.getfixturevalue("postgres")


def work(folder: str, url: str, wanted: str, hold: str = "0", crowd: str = "1", heartbeat: str = "10",
         host: str = "") -> None:
    """Be a worker: `train` by counting to nine, with a line in the log and a checkpoint for each epoch.

    In its epoch number `hold`, whichever trial that falls into, it stands still until it is killed or stopped.
    It begins when there are `crowd` workers.
    """
    study = open_study(Run(Path(folder)), url, heartbeat=int(heartbeat))
    left = int(hold)
    Path(folder, f"ready-{os.getpid()}").touch()
    while len(list(Path(folder).glob("ready-*"))) < int(crowd):
        time.sleep(0.01)

    def objective(trial: optuna.Trial) -> float:
        nonlocal left
        if host:  # as if this process ran on another machine
            trial.set_user_attr("owner", [host, os.getpid()])
        x = trial.suggest_float("x", 0, 1)
        trial.set_user_attr("epochs", EPOCHS)
        checkpoint = Path(folder, f"{x!r}.txt")
        for epoch in range(int(checkpoint.read_text()) + 1 if checkpoint.exists() else 1, EPOCHS + 1):
            check_stop()
            with Path(folder, "log").open("a") as log:
                log.write(f"{x!r} {epoch} {os.getpid()}\n")
            left -= 1
            if left == 0:
                with suppress(AutomlError):
                    while True:
                        check_stop()
                        time.sleep(0.01)
            write_bytes(checkpoint, str(epoch).encode())
            trial.report(x * epoch, epoch)
            if trial.should_prune():
                trial.set_user_attr("paused", epoch)
                raise optuna.TrialPruned
        return x

    run_trials(study, objective, int(wanted), lambda: promote_paused(study) or True)


def lead(words: list[str]) -> None:
    """Be the process that a user starts: work beside two helpers, as `automl-cv tune --workers 3` does."""
    from automl_cv.commands import stop_on_signals, told
    from automl_cv.workers import helpers

    with told(), stop_on_signals(), helpers(2, "test_study:help_work", words):
        work(*words)


def help_work(words: list[str]) -> None:
    """Be a helper."""
    work(*words)


def start(folder: Path, *words: object) -> subprocess.Popen[bytes]:
    """Start a worker."""
    env = os.environ | {"AUTOML_CV_HOME": str(folder)}
    return subprocess.Popen([sys.executable, __file__, str(folder), *map(str, words)], env=env)


def read_log(folder: Path) -> list[tuple[str, int, int]]:
    """Return what was trained: configuration, epoch, process."""
    lines = (folder / "log").read_text().split("\n")[:-1] if (folder / "log").exists() else []
    return [(x, int(epoch), int(pid)) for x, epoch, pid in map(str.split, lines)]


def await_hold(folder: Path, worker: subprocess.Popen[bytes], hold: int) -> str:
    """Wait until a worker stands still, and return the configuration of its trial."""
    end = time.monotonic() + 120
    while len(mine := [x for x, _, pid in read_log(folder) if pid == worker.pid]) < hold:
        assert worker.poll() is None and time.monotonic() < end, "the worker never came to train"
        time.sleep(0.01)
    return mine[-1]


def kill_in_training(folder: Path, worker: subprocess.Popen[bytes], hold: int) -> str:
    """Kill a worker in the epoch in which it stands still, and return the configuration of its trial."""
    x = await_hold(folder, worker, hold)
    worker.kill()
    worker.wait()
    return x


def check(folder: Path, url: str, wanted: int, killed: list[str]) -> optuna.Study:
    """Check that every configuration was finished once, and that only what a kill cut off was done again."""
    study = open_study(Run(folder), url)
    done = finished_trials(study)
    assert len(done) == wanted == len({trial.params["x"] for trial in done})
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    finals = {repr(trial.params["x"]) for trial in done}
    assert set(killed) <= finals
    times = Counter((x, epoch) for x, epoch, _ in read_log(folder))
    assert {x for x, _ in times} == finals
    again: Counter[str] = Counter()
    for (x, _), count in times.items():
        again[x] += count - 1
    assert again <= Counter(killed)  # a kill costs one epoch, and a configuration that goes on can be killed again
    complete = [repr(trial.params["x"]) for trial in done if trial.state.name == "COMPLETE"]
    assert complete and all((x, epoch) in times for x in complete for epoch in range(1, EPOCHS + 1))
    return study


def test_workers_that_race_finish_exactly_what_is_wanted(tmp_path, url):
    workers = [start(tmp_path, url, 14, 0, 4) for _ in range(4)]
    assert [worker.wait(300) for worker in workers] == [0, 0, 0, 0]
    check(tmp_path, url, 14, [])
    assert len({pid for _, _, pid in read_log(tmp_path)}) > 1


def test_killed_workers_lose_nothing(tmp_path, url):
    held = [(start(tmp_path, url, 8, hold), hold) for hold in (2, 3)]
    for worker, hold in held:
        await_hold(tmp_path, worker, hold)
    free = start(tmp_path, url, 8)
    killed = [kill_in_training(tmp_path, worker, hold) for worker, hold in held]
    assert [worker.wait(300) for worker in (free, start(tmp_path, url, 8))] == [0, 0]
    study = check(tmp_path, url, 8, killed)
    failed = [trial for trial in study.trials if trial.state.name == "FAIL" and "spare" not in trial.user_attrs]
    assert {repr(trial.params["x"]) for trial in failed} == set(killed)


def test_lone_worker_that_is_killed_tries_what_it_would_have_tried(tmp_path, url):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    for folder in (killed, straight):
        folder.mkdir()
    cut = [kill_in_training(killed, start(killed, url, 9, hold), hold) for hold in (5, 1, 11, 4)]
    assert [start(killed, url, 9).wait(300), start(straight, url, 9).wait(300)] == [0, 0]
    ends = [[(trial.params["x"], trial.value) for trial in finished_trials(check(folder, url, 9, again))]
            for folder, again in ((killed, cut), (straight, []))]
    assert ends[0] == ends[1]


def test_worker_of_another_machine_is_missed_by_its_heartbeat(tmp_path, url):
    killed = kill_in_training(tmp_path, start(tmp_path, url, 3, 2, 1, 1, "elsewhere"), 2)
    assert start(tmp_path, url, 3, 0, 1, 1).wait(300) == 0
    check(tmp_path, url, 3, [killed])


def test_paused_trial_that_two_workers_continue_at_once_is_trained_once(tmp_path, url):
    fork = get_context("fork")
    both = fork.Barrier(2)

    def train(trial: optuna.Trial) -> float:
        x, again = trial.suggest_float("x", 0, 1), "continues" in trial.user_attrs
        with Path(tmp_path, "log").open("a") as log:
            log.write(f"{x!r} {2 if again else 1} {os.getpid()}\n")
        trial.set_user_attr("epochs", EPOCHS)
        trial.report(x, 1)
        if not trial.number:
            trial.set_user_attr("paused", 1)
            raise optuna.TrialPruned
        return x

    def go_on() -> None:
        study = open_study(Run(tmp_path), url)
        assert promote_paused(study, lambda trial: both.wait(60) >= 0)  # both have seen an empty queue
        both.wait(60)
        run_trials(study, train, 2)

    run_trials(open_study(Run(tmp_path), url), train, 1)
    workers = [fork.Process(target=go_on) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    study = open_study(Run(tmp_path), url)
    assert [trial.user_attrs.get("continues") for trial in study.trials[:3]] == [None, 0, 0]
    assert study.trials[2].user_attrs["spare"] and study.trials[2].params == {}
    trained = [(x, epoch) for x, epoch, _ in read_log(tmp_path)]
    first = repr(study.trials[0].params["x"])
    assert trained[0] == (first, 1) and trained.count((first, 2)) == 1 and len(trained) == 3  # one is another one


def test_interrupt_ends_all_workers_and_the_next_call_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    url = f"sqlite:///{tmp_path}/optuna.db"

    def call(hold: int) -> subprocess.Popen[str]:
        code = "import sys; from test_study import lead; lead(sys.argv[1:])"
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path), url, "8", str(hold), "3"], text=True,
                                stderr=subprocess.PIPE, start_new_session=True)

    first, end = call(2), time.monotonic() + 120
    try:
        while list((busy := Counter(pid for _, _, pid in read_log(tmp_path))).values()) != [2, 2, 2]:
            assert first.poll() is None and time.monotonic() < end, busy
            time.sleep(0.01)
    finally:
        os.killpg(first.pid, signal.SIGINT)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 4 and first.pid in busy
    assert said == ("\nStopping at the next safe point. Press Ctrl-C again to stop at once.\n"
                    "error: Stopped as you asked. What was finished is saved. [interrupted]\n")
    for worker in busy:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    assert call(0).wait(120) == 0
    check(tmp_path, url, 8, [])


def test_step_is_finished_by_the_worker_that_is_left(tmp_path, postgres, monkeypatch):
    from automl_cv.data import run_step as scan_step  # slow to import, and the workers above don't need them
    from automl_cv.tracking import connect

    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    folder = tmp_path / "runs/shared"
    scan_step(str(folder), "demo:10")
    connect()  # as the baseline has done; MLflow cannot make its tables in two processes at once
    code = f"from automl_cv.tune import run_step; run_step({str(folder)!r}, trials=4, max_epochs=3, storage={postgres!r})"
    first, second = (subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE) for _ in range(2))
    assert any(" epoch 1/" in line for line in first.stdout)
    first.kill()
    first.wait()
    second.communicate(timeout=300)
    assert second.returncode == 0
    study = open_study(Run(folder), postgres)
    assert len(finished_trials(study)) == 4
    found = Run(folder).read("tune")
    assert sum(found["trials"].values()) == 4 and found["config"] == study.trials[found["best_trial"]].user_attrs["config"]


def test_one_command_starts_workers_that_share_the_study(tmp_path, monkeypatch):
    from automl_cv.core import home
    from automl_cv.data import run_step as scan_step

    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    folder = tmp_path / "runs/shared"
    scan_step(str(folder), "demo:10")
    Run(folder).write("request", {"source": "demo:10", "backbone": "small_cnn", "pretrained": False, "size": 32})

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        code = "from automl_cv.cli import main; main()"
        return subprocess.run([sys.executable, "-c", code, *words], text=True, capture_output=True, timeout=500)

    early = call("tune", str(folder))
    assert early.returncode != 0 and "step_missing" in early.stderr and "Traceback" not in early.stderr
    from automl_cv.baseline import run_step as baseline_step
    baseline_step(str(folder), epochs=0)
    Run(folder).write("steps", {"data": {"finished": "x"}, "baseline": {"finished": "x"}})
    done = call("tune", str(folder), "--workers", "3", "--trials", "5", "--max-epochs", "1")
    assert done.returncode == 0, done.stderr
    study = open_study(Run(folder), f"sqlite:///{home() / 'optuna.db'}")
    trials = finished_trials(study)
    assert len(trials) == 5 and "a worker ended" not in done.stdout  # such short ones may all be the leader's
    assert "finished" not in Run(folder).read("steps")["tune"] and "resume" in done.stdout
    assert sum(Run(folder).read("tune")["trials"].values()) == 5


if __name__ == "__main__":
    work(*sys.argv[1:])


def test_trial_that_ships_says_what_it_learned_from(tmp_path, monkeypatch):
    from automl_cv import tune
    from automl_cv.data import run_step as scan_step

    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "is_small", lambda run: False)  # else a trial ships nothing
    run = Run(tmp_path / "runs/half")
    scan_step(str(run.path), "demo:10")
    run.write("baseline", {"origin": "no network"})
    tune.run_step(str(run.path), trials=1, max_epochs=1, trial_share=0.5)
    facts = read_json(run.bundle / "model.json")
    assert facts["candidate"] == "small_cnn 32 trial 0"
    assert (run.read("data")["splits"]["train"], facts["data"]["images"], facts["origin"]) == (42, 21, "no network")
