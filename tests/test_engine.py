"""Choosing a model in whole runs: the leaderboard, limits, metrics, and backbones whose weights cannot be had."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from test_weights import WEIGHTS

QUICK = ("--size", "32", "--batch-size", "8", "--trials", "1", "--max-epochs", "1", "--time", "none")
SCRATCH = ("--backbone", "small_cnn", "--scratch")


def call(home, *words, **env):
    """Run the command line to its end: exit status, stdout, stderr."""
    command = [sys.executable, "-c", "from automl_cv.cli import main; main()", *map(str, words)]
    env = os.environ | {"AUTOML_CV_HOME": str(home), "AUTOML_CV_OFFLINE": "1"} | env
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=400)
    return done.returncode, done.stdout, done.stderr


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("engine")
    status, _, err = call(home, "run", "demo:24", "--out", home / "run", *SCRATCH, *QUICK, "--metric", "loss")
    assert status == 0, err
    return home / "run"


def test_bundle_holds_the_best_of_the_leaderboard(finished):
    rows = [row for row in read(finished, "leaderboard.json") if row["figures"]]
    stages = {row["stage"] for row in rows}
    assert {"race", "head", "fine-tune"} <= stages
    best = min(rows, key=lambda row: row["figures"]["loss"])
    info = read(finished, "model/model.json")
    assert rows[0]["name"] == best["name"] == info["candidate"]
    assert info["validation"]["loss"] == best["figures"]["loss"]
    assert (finished / "leaderboard.png").stat().st_size > 5000


def test_metric_is_written_down(finished):
    assert {row["figures"]["metric"] for row in read(finished, "leaderboard.json") if row["figures"]} == {"loss"}
    assert read(finished, "plan.json")["backbone"] == "small_cnn"


def test_metric_of_another_task_is_refused(tmp_path):
    status, _, err = call(tmp_path, "run", "demo:6", "--out", tmp_path / "run", *SCRATCH, *QUICK, "--metric", "map")
    assert status == 2 and "There is no metric 'map'. Choose one of accuracy, balanced_accuracy" in err
    assert "Traceback" not in err


def test_no_model_within_the_limits(tmp_path):
    status, out, err = call(tmp_path, "run", "demo:6", "--out", tmp_path / "run", *SCRATCH, *QUICK,
                            "--max-size-mb", "0.001")
    assert "small_cnn 32 has 1.7 MB, 0.001 are allowed" in out and "  race" not in out and "3/6" not in out
    assert status == 1 and "[no_model_fits]" in err and "0.001 are allowed" in err
    assert not (tmp_path / "run/model").exists()


def test_backbones_without_weights_are_named_and_nothing_pretends(tmp_path):
    status, out, err = call(tmp_path, "run", "demo:6", "--out", tmp_path / "run", *QUICK, AUTOML_CV_WEIGHTS="",
                            TORCH_HOME=str(tmp_path / "empty"), HF_HOME=str(tmp_path / "none"))
    assert status == 0, err
    assert "TRAINS FROM SCRATCH" in out + err
    reasons = {row["name"]: row["reason"] for row in read(tmp_path / "run", "leaderboard.json")}
    assert reasons["resnet18"] and reasons["vit_b_16"]
    info = read(tmp_path / "run", "model/model.json")
    assert (info["backbone"], info["pretrained"]) == ("small_cnn", False)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="NO BACKBONES RACE: ../shared/weights is absent")
def test_auto_races_the_backbones_whose_weights_are_there_and_few_pictures_get_what_they_need(tmp_path):
    status, out, err = call(tmp_path, "run", "demo:20", "--out", tmp_path / "run", "--time", "none", "--epochs", "2",
                            "--max-epochs", "1", AUTOML_CV_WEIGHTS=str(WEIGHTS), TORCH_HOME=str(tmp_path / "empty"))
    assert status == 0, err
    entrants = read(tmp_path / "run", "baseline.json")["entrants"]
    assert {(entry["backbone"], entry["size"]) for entry in entrants} == {
        ("mobilenet_v2", 160), ("mobilenet_v2", 192)}
    info = read(tmp_path / "run", "model/model.json")
    assert (info["backbone"], info["pretrained"]) == ("mobilenet_v2", True)
    rows = read(tmp_path / "run", "leaderboard.json")
    trained = next(row for row in rows if row["stage"] == "fine-tune")["figures"]
    assert (trained["folds"], trained["averaged"]) == (5, 5) and "trial" not in {row["stage"] for row in rows}
    config = read(tmp_path / "run", "train.json")["config"] | read(tmp_path / "run", "tune.json")["config"]
    assert (config["batch_size"], config["lr"], config["label_smoothing"]) == (16, 2e-4, 0.1)


@pytest.mark.parametrize("kind", ["mlp", "knn", "pair"])
def test_every_kind_of_head_is_judged_as_a_bundle(finished, tmp_path, kind, monkeypatch):
    """What the head search finds is exported, served in light code, and answers like torch on the test split."""
    from automl_cv.bundles import Shipment, write_bundle
    from automl_cv.core import Run
    from automl_cv.evaluate import run_step
    from automl_cv.heads import HeadConfig
    from automl_cv.layers import VIEWS, with_head
    from automl_cv.learner import Config
    from automl_cv.models import create_model
    from automl_cv.probes import search_head
    from automl_cv.race import Track
    monkeypatch.setenv("AUTOML_CV_HOME", str(finished.parent))
    run = Run(shutil.copytree(finished, tmp_path / "run"))
    heads = {"mlp": HeadConfig("mlp", size=16, banks=("plain",)), "knn": HeadConfig("knn", size=5, banks=("plain",)),
             "pair": HeadConfig(banks=VIEWS)}
    track, model = Track(run, False, "standard", "", 0), create_model("small_cnn", 6, pretrained=False)
    found = search_head(track, model, 32, grid=(heads[kind],))
    write_bundle(run, with_head(model, found.head), Config(backbone="small_cnn", pretrained=False, size=32), run.bundle,
                 Shipment(kind, *found.answers, train=track.images("train", 32)))
    results = run_step(str(run.path))
    assert results["final"]["accuracy"] > 0.2  # of random filters
    assert results["final"]["parity"]["changed_labels"] == 0
    assert (run.path / "final_model_misclassified_images.png").exists()
