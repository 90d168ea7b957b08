"""Whole runs as processes: papermill, kill -9, Ctrl-C, resume, a budget, and data that is no data."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile

import nbformat
import optuna
import pytest
from PIL import Image
from typer.testing import CliRunner

from automl_cv.champion import Candidate, write_row
from automl_cv.cli import cli
from automl_cv.core import AutomlError, Run, atomic_folder
from automl_cv.items import open_folder
from automl_cv.steps import run_notebook
from automl_cv.scenes import CLASSES, draw_scene

TINY = ("--backbone", "small_cnn", "--scratch", "--size", "32", "--batch-size", "8", "--trials", "3",
        "--max-epochs", "3", "--time", "none")


def automl_cv(home, *words):
    """Start the command line as a user does."""
    env = os.environ | {"AUTOML_CV_HOME": str(home)}
    command = [sys.executable, "-c", "from automl_cv.cli import main; main()", *map(str, words)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def call(home, *words):
    """Run the command line to its end: exit status, stdout, stderr."""
    process = automl_cv(home, *words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def read_until(process, pattern):
    """Read lines until one matches, and return all of them."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError(f"{pattern!r} never came:\n{''.join(lines)}\n{process.stderr.read()}")


def kill_after(process, pattern, number=signal.SIGKILL):
    """Send a signal once a line has come, and return the whole output."""
    seen = read_until(process, pattern)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return seen + out, err


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Run, kill -9 in tuning, resume, kill -9 in the final training, resume: the outputs of the three."""
    home = tmp_path_factory.mktemp("killed")
    folder = home / "runs/killed"
    first, _ = kill_after(automl_cv(home, "run", "demo:15", "--out", folder, *TINY), r"trial 0 epoch 2/")
    second, _ = kill_after(automl_cv(home, "resume", folder), r"^  epoch 1/\d+: loss \S+ \d+ pictures")
    third = call(home, "resume", folder)
    return home, Run(folder), first, second, third


def test_killed_in_tuning_goes_on_behind_its_last_epoch(killed):
    home, run, first, second, _ = killed
    assert "trial 0 epoch 1/" in first
    assert "trial 0 epoch" not in second
    assert "1/6 data" not in second and "2/6 baseline" not in second
    study = optuna.load_study(study_name=run.read("study")["name"], storage=f"sqlite:///{home}/optuna.db")
    states = [trial.state.name for trial in study.trials]
    assert sum(state in ("COMPLETE", "PRUNED") for state in states) == 3
    dead = [trial for trial in study.trials if trial.state.name == "FAIL"]
    assert [trial.number for trial in dead] == [0]
    after = next(trial for trial in study.trials if trial.user_attrs.get("continues") == 0)
    assert after.params == dead[0].params and list(after.intermediate_values) == [1, 2, 3]
    assert f"trial {after.number} epoch 3/3" in second and f"trial {after.number} epoch 2/" not in second


def test_killed_in_training_goes_on_behind_its_last_epoch(killed):
    _, run, _, second, (status, out, err) = killed
    assert status == 0, err
    assert "3/6 tune" not in out and "4/6 train" in out
    after = out.split("4/6 train")[1]
    done = [int(n) for n in re.findall(r"^  epoch (\d+)/", second.split("4/6 train")[1], re.M)]
    again = [int(n) for n in re.findall(r"^  epoch (\d+)/", after, re.M)]
    assert not set(done) & set(again)
    epochs = [entry["epoch"] for entry in run.read("train")["history"]]
    assert epochs == list(range(1, len(epochs) + 1))


def test_results_name_their_split(killed):
    results = json.loads((killed[1].path / "results.json").read_text())
    assert [results[name]["split"] for name in ("baseline", "tuned", "final")] == ["validation", "validation", "test"]
    assert all(results[n]["low"] <= results[n]["accuracy"] <= results[n]["high"] for n in ("baseline", "tuned", "final"))
    assert results["pretrained"] is False
    assert len(killed[1].read("openings")) == 1


def test_interrupt_once_stops_cleanly_and_says_how_to_go_on(tmp_path):
    process = automl_cv(tmp_path, "run", "demo:15", "--out", tmp_path / "runs/r", *TINY)
    _, err = kill_after(process, "2/6 baseline", signal.SIGINT)
    assert process.returncode == 4
    assert f"resume {tmp_path / 'runs/r'}" in err and "[interrupted]" in err and "Traceback" not in err


def test_notebooks_run_with_parameters(tmp_path):
    folder = tmp_path / "runs/papermill"
    words = ("run", "demo:10", "--out", folder, "--notebooks", *TINY[:-6], "--trials", "2", "--max-epochs", "1",
             "--time", "none")
    kill_after(automl_cv(tmp_path, *words), "^3/6 tune")
    Run(folder).write("openings", [{"at": "before", "purpose": "evaluate"}])  # whoever judged it may search on
    rival = {"metric": "accuracy", "accuracy": 0.99, "low": 0.9, "high": 1.0, "loss": 9.0, "images": 50}
    write_row(Run(folder), Candidate("rival", "head", "small_cnn", 32, rival))  # who lost by its log-loss
    status, out, err = call(tmp_path, "resume", folder)
    assert status == 0, err
    assert [entry["at"] == "before" for entry in Run(folder).read("openings")] == [True, False]
    names = ["01_data", "02_baseline", "03_tune", "04_train", "05_evaluate", "06_serve"]
    assert sorted(path.stem for path in (folder / "notebooks").iterdir()) == names
    cells = nbformat.read(folder / "notebooks/03_tune.ipynb", 4).cells
    injected = next(cell.source for cell in cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert "trials = 2" in injected and "max_epochs = 1" in injected
    assert json.loads((folder / "results.json").read_text())["final"]["split"] == "test"


def test_notebooks_run_where_nothing_is_trained(tmp_path):
    run = Run(tmp_path / "runs/r")
    assert call(tmp_path, "check", "demo:10", "--out", run.path)[0] == 0
    plan = {"backbone": "small_cnn", "pretrained": False, "size": 32}
    run_notebook("baseline", plan | {"epochs": 0, "seconds": 1.0}, run)
    assert "fine_tune" not in run.read("baseline")["scores"]
    run_notebook("tune", plan | {"trials": 0}, run)
    assert run.read("tune")["trials"] == {}


def test_run_keeps_its_split(tmp_path, killed):
    """A check into a run's folder would seal another test split, of pictures that were trained on."""
    folder = killed[1].path
    before = (folder / "manifest.parquet").read_bytes()
    status, _, err = call(tmp_path, "check", "demo:5", "--out", folder)
    assert (status, "[run_exists]" in err) == (2, True)
    assert (folder / "manifest.parquet").read_bytes() == before


def test_call_that_found_no_data_leaves_the_folder_free(tmp_path):
    words = ("--out", tmp_path / "r", "--backbone", "small_cnn", "--scratch", "--size", "32", "--time", "5s")
    assert call(tmp_path, "run", tmp_path / "typo", *words)[0] == 3
    status, out, err = call(tmp_path, "run", "demo:6", *words)
    assert status == 0, err
    assert json.loads((tmp_path / "r/request.json").read_text())["source"] == "demo:6"
    assert call(tmp_path, "run", "demo:6", *words)[0] == 2


def test_two_processes_do_not_share_a_run(tmp_path):
    folder = tmp_path / "r"
    process = automl_cv(tmp_path, "run", "demo:6", "--out", folder, *TINY)
    read_until(process, "^2/6 baseline")
    status, _, err = call(tmp_path, "resume", folder)
    assert (status, err) == (2, "error: Another process works on this run. Let it finish. [run_exists]\n")
    process.kill()
    process.communicate()


def test_reader_that_leaves_ends_a_check_without_a_word(tmp_path):
    process = automl_cv(tmp_path, "check", "demo:24")
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 141)


def test_decisions_are_never_overwritten(tmp_path):
    folder = tmp_path / "data"
    for label in CLASSES[:2]:
        (folder / label).mkdir(parents=True)
        for seed in range(8):
            draw_scene(label, seed).save(folder / label / f"{seed}.png")
    Image.new("RGB", (64, 64)).save(folder / CLASSES[0] / "black.png")
    first, out = tmp_path / "out/review.csv", tmp_path / "out"
    assert call(tmp_path, "check", folder, "--out", out)[0] == 0
    text = first.read_text(encoding="utf-8-sig")
    assert "dark,warning,buildings/black.png" in text
    edited = "\ufeff" + text.replace(",quarantine,", ", Keep ,").replace(",look,", ",quarantine,")
    first.write_text(edited, encoding="utf-8")
    counts = []
    for _ in range(2):
        status, said, err = call(tmp_path, "check", folder, "--out", out, "--apply", first)
        assert (status, "review-2.csv, edit" in said) == (0, True), err
        counts.append(said.splitlines()[0])
    assert counts[0] == counts[1] and first.read_text(encoding="utf-8") == edited
    assert call(tmp_path, "check", folder, "--out", out)[0] == 0 and first.read_text(encoding="utf-8") == edited


def test_names_that_are_no_text(tmp_path):
    folder = os.fsencode(tmp_path / "data")
    for label in CLASSES[:2]:
        os.makedirs(folder + b"/" + label.encode())
        for seed in range(4):
            with open(folder + b"/" + label.encode() + b"/caf\xe9%d.png" % seed, "wb") as file:
                draw_scene(label, seed).save(file, "PNG")
    status, out, err = call(tmp_path, "check", tmp_path / "data", "--json")
    assert status == 0, err
    assert json.loads(out)["used"] == 8
    status, _, err = call(tmp_path, "check", tmp_path / "data", "--out", os.fsdecode(folder + b"\xff"))
    assert (status, err) == (2, "error: The folder's name is not UTF-8. Choose another --out. "
                                "[wrong_parameter_type]\n")


def test_notebook_refuses_parameters_that_it_does_not_know(tmp_path):
    for params, code in (({"epoch": 3}, "unknown_parameter"), ({"epochs": "3"}, "wrong_parameter_type")):
        with pytest.raises(AutomlError) as caught:
            run_notebook("train", params, Run(tmp_path))
        assert caught.value.code == code


def test_run_of_another_version_is_not_resumed(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/request.json").write_text('{"source": "demo:4", "wish": 1}')
    status, out, err = call(tmp_path, "resume", tmp_path / "r")
    assert (status, "[run_not_found]" in err, "another version" in err) == (2, True, True)
    (tmp_path / "r/request.json").write_text('{"source"')
    status, out, err = call(tmp_path, "resume", tmp_path / "r")
    assert (status, "[run_not_found]" in err, "is damaged" in err) == (2, True, True)


def test_budget_ends_a_training_of_ten_thousand_epochs(tmp_path):
    status, out, err = call(tmp_path, "run", "demo:30", "--out", tmp_path / "runs/r", "--backbone", "small_cnn",
                            "--scratch", "--size", "48", "--time", "45s", "--trials", "100", "--epochs", "10000")
    assert status == 0, err
    assert len(Run(tmp_path / "runs/r").read("train")["history"]) < 10_000
    assert json.loads((tmp_path / "runs/r/results.json").read_text())["time"]["budget"] == 45


def test_run_searches_with_two_processes(tmp_path):
    status, out, err = call(tmp_path, "run", "demo:10", "--out", tmp_path / "runs/r", *TINY, "--workers", 2)
    assert status == 0, err
    run = Run(tmp_path / "runs/r")
    assert run.read("steps")["tune"]["params"]["workers"] == 2 and "a worker ended" not in out
    study = optuna.load_study(study_name=run.read("study")["name"], storage=f"sqlite:///{tmp_path}/optuna.db")
    assert sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials) == 3
    assert sum(run.read("tune")["trials"].values()) == 3


def test_run_refuses_a_space_before_any_work(tmp_path):
    status, out, err = call(tmp_path, "run", "demo:10", "--out", tmp_path / "runs/r", *TINY, "--space", "wild")
    assert (status, "[unknown_parameter]" in err, "data" in out) == (2, True, False)
    assert not list((tmp_path / "runs/r").iterdir())


def test_run_refuses_a_metric_of_another_task_before_the_folder_is_taken(tmp_path):
    words = "run", "demo-multi:10", "--out", tmp_path / "r", *TINY, "--metric", "balanced_accuracy"
    status, out, err = call(tmp_path, *words)
    assert (status, out) == (2, "1/6 data\n")
    assert err == ("error: There is no metric 'balanced_accuracy'. Choose one of map, macro_f1, loss. "
                   "[unknown_parameter]\n")
    assert not (tmp_path / "r/data.json").exists()


def test_run_folder_is_not_overwritten(tmp_path):
    (tmp_path / "request.json").write_text("{}")
    status, _, err = call(tmp_path, "run", "demo:5", "--out", tmp_path)
    assert (status, "[run_exists]" in err) == (2, True)


def picture(path, colour="red"):
    """Save a plain picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(path, "PNG")


def bad_data(folder, case):
    """Make data that cannot be used."""
    if case == "missing":
        return folder / "absent"
    if case == "broken zip":
        (folder / "data.zip").write_bytes(b"PK\3\4 and nothing more")
        return folder / "data.zip"
    for name in {"one class": ["cat/1.png", "cat/2.png"], "no class folders": ["1.png", "2.png"], "empty": []}[case]:
        picture(folder / "data" / name, "red" if "1" in name else "blue")
    (folder / "data").mkdir(exist_ok=True)
    return folder / "data"


@pytest.mark.parametrize("case, code", [("missing", "source_not_found"), ("empty", "no_usable_image"),
                                        ("one class", "one_class_only"), ("no class folders", "no_class_folders"),
                                        ("broken zip", "bad_archive")])
def test_bad_data_has_a_code_and_exit_status_3(tmp_path, case, code):
    found = CliRunner().invoke(cli, ["check", str(bad_data(tmp_path, case))])
    assert found.exit_code == 3
    assert f"[{code}]" in found.stderr and "Traceback" not in found.stderr and found.stderr.count("\n") == 1


def test_check_names_every_file_that_is_not_used(tmp_path):
    for label in ("cat", "dog"):
        for number in range(4):
            picture(tmp_path / "data" / label / f"{number}.png", (number * 60, 80 if label == "cat" else 160, 9))
    (tmp_path / "data/cat/text.jpg").write_text("no picture")
    (tmp_path / "data/cat/copy.png").write_bytes((tmp_path / "data/cat/0.png").read_bytes())
    picture(tmp_path / "data/.hidden/1.png")
    status, out, _ = call(tmp_path, "check", tmp_path / "data", "--json")
    found = json.loads(out.splitlines()[-1])
    assert status == 0
    assert (found["found"], found["used"], found["quarantined"], found["ignored"]) == (11, 8, 2, 1)
    assert {row["path"]: row["reason"] for row in found["unused"]} == {
        "cat/text.jpg": "not_an_image", "cat/copy.png": "duplicate", ".hidden/1.png": "system_file"}
    assert (found["classes"], found["class_order"]) == (2, ["cat", "dog"])


def test_original_layout_and_zip(tmp_path):
    for split, count in (("seg_train", 6), ("seg_test", 2)):
        for index, label in enumerate(("glacier", "sea")):
            for number in range(count):
                picture(tmp_path / "data" / split / split / label / f"{number}.png", (number, index * 90, count))
    picture(tmp_path / "data/seg_pred/seg_pred/1.png", "white")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in sorted((tmp_path / "data").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path))
    for source in ("data", "data.zip"):
        found = json.loads(CliRunner().invoke(cli, ["check", str(tmp_path / source), "--json"]).stdout)
        assert found["class_order"] == ["glacier", "sea"]
        assert found["splits"] == {"train": 10, "validation": 2, "test": 4, "unlabelled": 1}


def test_damaged_bundle_is_refused(tmp_path, bundle):
    for name in ("model.json", "model.onnx"):
        (tmp_path / name).write_bytes((bundle / name).read_bytes())
    picture(tmp_path / "a.png")
    status, _, err = call(tmp_path, "predict", tmp_path, tmp_path / "a.png")
    assert (status, "[bundle_damaged]" in err, "Traceback" in err) == (3, True, False)
    status, _, err = call(tmp_path, "serve", tmp_path)
    assert (status, "[bundle_damaged]" in err, "Traceback" in err) == (3, True, False)


def test_replaced_folder_is_there_at_every_moment(tmp_path):
    folder, seen, done = tmp_path / "model", [], threading.Event()
    folder.mkdir()

    def look():
        while not done.is_set():
            seen.append(folder.exists())
    watcher = threading.Thread(target=look)
    watcher.start()
    for turn in range(300):
        with atomic_folder(folder) as draft:
            (draft / str(turn)).touch()
    done.set()
    watcher.join()
    assert len(seen) > 300 and all(seen)
    assert [path.name for path in folder.iterdir()] == ["299"] and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_classes_of_three_pictures_are_enough_for_a_run(tmp_path):
    for label in CLASSES[:2]:
        for number in range(3):
            path = tmp_path / "photos" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_scene(label, number, 64).save(path)
    words = ("--backbone", "small_cnn", "--scratch", "--size", "32", "--time", "25s")
    status, out, err = call(tmp_path, "run", tmp_path / "photos", "--out", tmp_path / "run", *words)
    assert (status, "Traceback" in err) == (0, False) and "test, 2 pictures" in out


def test_storage_that_is_none_is_refused_before_any_work(tmp_path):
    status, _, err = call(tmp_path, "run", "demo:4", "--out", tmp_path / "run", "--storage", "postgres")
    assert (status, "[wrong_parameter_type]" in err, "Traceback" in err) == (2, True, False)


def test_files_that_come_and_go_do_not_stop_the_listing(tmp_path):
    for number in range(40):
        picture(tmp_path / f"cat/{number}.png")
    done = threading.Event()

    def pass_by():
        while not done.is_set():
            (tmp_path / "cat/passing").touch()
            (tmp_path / "cat/passing").unlink()
    passer = threading.Thread(target=pass_by)
    passer.start()
    try:
        found = [[item.name for item in open_folder(tmp_path) if item.reason != "unreadable"] for _ in range(300)]
    finally:
        done.set()
        passer.join()
    assert all(set(names) - {"cat/passing"} == {f"cat/{number}.png" for number in range(40)} for names in found)
