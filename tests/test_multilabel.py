"""A whole run on pictures with several labels, as a process: what it writes, what it serves, what it predicts."""
import csv
import io
import json
import os
import subprocess
import sys

import httpx
import pytest
from mlflow import MlflowClient

from automl_cv.core import Run
from automl_cv.elements import ELEMENTS, draw_elements, name_elements

TINY = ("--backbone", "small_cnn", "--scratch", "--size", "32", "--batch-size", "16", "--trials", "2",
        "--max-epochs", "2", "--time", "none")


def automl_cv(home, *words):
    """Run the command line to its end: exit status, stdout, stderr."""
    command = [sys.executable, "-c", "from automl_cv.cli import main; main()", *map(str, words)]
    done = subprocess.run(command, env=os.environ | {"AUTOML_CV_HOME": str(home)}, text=True, capture_output=True,
                          timeout=300)
    return done.returncode, done.stdout, done.stderr


def landscape(seed):
    """Encode a landscape that no run has seen."""
    file = io.BytesIO()
    draw_elements(seed)[0].save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return the workspace of the run."""
    return tmp_path_factory.mktemp("multilabel")


@pytest.fixture(scope="module")
def done(home):
    """Run all six steps: the run, and what the command printed."""
    status, out, err = automl_cv(home, "run", "demo-multi:120", "--out", home / "runs/multi", *TINY)
    assert status == 0, err
    return Run(home / "runs/multi"), out


def test_results_never_call_map_an_accuracy(done):
    run, out = done
    results = run.read("results")
    for name, split in (("baseline", "validation"), ("tuned", "validation"), ("final", "test")):
        entry = results[name]
        assert (entry["metric"], entry["split"]) == ("map", split)
        assert 0 <= entry["low"] <= entry["map"] <= entry["high"] <= 1
        assert {"micro_f1", "macro_f1", "exact", "images"} <= set(entry)
    assert '"accuracy"' not in json.dumps(results)
    assert "mAP  95 % interval" in out and "test mAP" in out and "accuracy" not in out
    assert list(results["baselines"]) == ["majority", "linear_pixels", "linear_probe_untrained",
                                           "best_head_untrained", "fine_tune"]
    assert (results["data"]["task"], results["config"]["task"]) == ("multilabel", "multilabel")
    assert len(run.read("openings")) == 1


def test_results_have_a_row_for_each_label(done):
    final, classes = done[0].read("results")["final"], done[0].read("data")["classes"]
    assert classes == sorted(classes) and set(classes) <= set(ELEMENTS)
    assert [row["label"] for row in final["classes"]] == classes
    for row in final["classes"]:
        assert set(row) == {"label", "precision", "recall", "f1", "images", "average_precision", "threshold"}
        assert (row["average_precision"] is None) == (row["images"] == 0) and 0 <= row["threshold"] <= 1
    assert final["parity"]["max_difference"] <= 1e-4 and 0 <= final["calibration_error"] <= 1


def test_bundle_has_a_temperature_and_a_threshold_for_each_label(done):
    info = json.loads((done[0].bundle / "model.json").read_text())
    assert (info["task"], info["metrics"]["metric"]) == ("multilabel", "map")
    assert len(info["temperature"]) == len(info["thresholds"]["labels"]) == len(info["classes"])
    assert info["thresholds"].pop("ood") > 0 and "ood.npz" in info["files"]
    assert all(0 < value < 1 for value in info["thresholds"]["labels"]) and min(info["temperature"]) > 0
    assert info["validation"] == done[0].read("train")["validation"]
    card = (done[0].bundle / "MODEL_CARD.md").read_text()
    assert "Mean average precision" in card and "Accuracy" not in card


def test_mlflow_has_every_figure(done, home):
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    parent, experiment = done[0].read("mlflow"), client.get_experiment_by_name("automl_cv")
    steps = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent['run_id']}'")
    metrics = next(step.data.metrics for step in steps if step.info.run_name == "evaluate")
    final = done[0].read("results")["final"]
    assert {name: metrics[name] for name in ("map", "low", "high", "micro_f1", "macro_f1", "exact")} == pytest.approx(
        {name: final[name] for name in ("map", "low", "high", "micro_f1", "macro_f1", "exact")})
    assert metrics["threshold_0"] == pytest.approx(final["classes"][0]["threshold"])


def test_pictures_are_drawn(done):
    for name in ("final_model_confusion_matrix", "final_model_misclassified_images"):
        assert (done[0].path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_served_labels_are_those_over_their_thresholds(done, start):
    info = json.loads((done[0].bundle / "model.json").read_text())
    with start(done[0].bundle) as server:
        for seed in range(10_000, 10_005):
            files = {"file": landscape(seed)}
            answer = httpx.post(f"{server.url}/predict?top_k=99", files=files, trust_env=False).json()
            plain = httpx.post(f"{server.url}/predict", files=files, trust_env=False).json()
            assert list(plain) == ["label", "confidence", "class_index", "labels", "uncertain", "reason", "outlier"]
            shares = {share["label"]: share["probability"] for share in answer["top_k"]}
            over = [{"label": name, "probability": shares[name]} for name, least
                    in zip(info["classes"], info["thresholds"]["labels"]) if shares[name] >= least]
            assert plain["labels"] == over
            assert (plain["label"], plain["confidence"]) == max(shares.items(), key=lambda pair: pair[1])
            assert info["classes"][plain["class_index"]] == plain["label"]
        assert httpx.get(f"{server.url}/model", trust_env=False).json()["task"] == "multilabel"
        page = httpx.get(server.url, trust_env=False).text
        assert "none of the labels" in page and "This looks like" not in page


def test_csv_joins_labels(done, home, tmp_path):
    (tmp_path / "a.png").write_bytes(landscape(10_000))
    (tmp_path / "b.txt").write_text("no picture")
    table = tmp_path / "answers.csv"
    status, _, err = automl_cv(home, "predict", done[0].bundle, tmp_path / "a.png", tmp_path / "b.txt", "--csv", table)
    assert status == 0, err
    with table.open(newline="") as file:
        good, bad = csv.DictReader(file)
    assert list(good)[:3] == ["file", "label", "confidence"] and list(good)[-1] == "error"
    assert set(filter(None, good["label"].split("|"))) <= set(ELEMENTS) and 0 < float(good["confidence"]) <= 1
    assert (bad["label"], bad["confidence"], bad["error"]) == ("", "", "not_an_image")


def test_gate_looks_at_map(done, home):
    results = done[0].read("results")
    code = ("import sys; from automl_cv.core import AutomlError\nfrom automl_cv.evaluate import run_step\n"
            "try: run_step(sys.argv[1], 1.01)\nexcept AutomlError as error: print(error.code, error)")
    found = subprocess.run([sys.executable, "-c", code, str(done[0].path)], capture_output=True, text=True,
                           env=os.environ | {"AUTOML_CV_HOME": str(home)})
    assert f"below_gate The test mAP {results['final']['map']:.4f} is below the gate 1.0100." in found.stdout


def test_labels_belong_to_their_pictures(done):
    """Even a linear model on raw pixels beats by far what ranks no picture before another."""
    scores = done[0].read("results")["baselines"]
    assert scores["linear_pixels"]["map"] > scores["majority"]["map"] + 0.15


def test_demo_has_pictures_without_any_label():
    assert [] in [name_elements(seed) for seed in range(120)]
