"""The corpus of bad inputs: every archive, every folder and every picture as a file of a data set."""
import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from automl_cv.cli import cli

CORPUS = Path(__file__).resolve().parents[2] / "shared/corpus"
WEIGHTS = CORPUS.parent / "weights"
pytestmark = pytest.mark.skipif(not CORPUS.exists(), reason="THE CORPUS OF BAD INPUTS IS ABSENT: ../shared/corpus")
DEEP = ("planted",)  # keys that say what lies in a case, not what a check without a network answers


def rows(kind):
    """Read the right answers of one kind."""
    if not CORPUS.exists():
        return []
    with (CORPUS / "expected.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["kind"] == kind]


@pytest.fixture(scope="module")
def corpus(maker, tmp_path_factory):
    """Let the corpus' own generator write it."""
    folder = tmp_path_factory.mktemp("corpus") / "all"
    maker.write_corpus(folder)
    return folder


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    """Keep what a check writes out of the checkout."""
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path / "home"))


def check(path, *words):
    """Check a data set: exit status and the JSON."""
    found = CliRunner().invoke(cli, ["check", str(path), "--json", *words])
    assert "Traceback" not in found.stderr
    return found.exit_code, json.loads(found.stdout)


@pytest.mark.parametrize("kind, row", [pytest.param(kind, row, id=row["case"]) for kind in ("archive", "dataset")
                                       for row in rows(kind)])
def test_case(corpus, tmp_path, kind, row):
    expected = json.loads(row["dataset_outcome"])
    status, found = check(corpus / f"{kind}s" / row["case"], "--out", str(tmp_path / "out"))
    assert {key: found.get(key) for key in expected if key not in DEEP} == {
        key: value for key, value in expected.items() if key not in DEEP}
    assert status == (3 if expected["outcome"] == "rejected" else 0)
    if status == 0:
        assert found["found"] == found["used"] + found["quarantined"] + found["ignored"]
        assert (tmp_path / "out/report.html").stat().st_size > 0


def test_pictures_as_files_of_a_data_set(corpus, tmp_path):
    folder = tmp_path / "data"
    (folder / "cat").mkdir(parents=True)
    for path in (corpus / "images").iterdir():
        (folder / "cat" / path.name).write_bytes(path.read_bytes())
    for path in (corpus / "datasets/D03_wrapping_folder/my_dataset/dog").iterdir():
        (folder / "dog").mkdir(exist_ok=True)
        (folder / "dog" / path.name).write_bytes(path.read_bytes())
    _, found = check(folder)
    unused = {row["path"]: row["status"] for row in found["unused"]}
    expected = {row["case"]: row["dataset_outcome"] for row in rows("image") if (folder / "cat" / row["case"]).exists()}
    expected["59_heic.heic"] = "used"  # the extra is installed here; without it the file is quarantined
    assert len(expected) == 65
    assert {name: unused.get(f"cat/{name}", "used") for name in expected} == expected


@pytest.mark.skipif(not WEIGHTS.exists(), reason="NO REAL WEIGHTS ARE USED: ../shared/weights is absent")
def test_wrong_labels_are_found(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOML_CV_WEIGHTS", str(WEIGHTS))
    data = corpus / "datasets/D14_wrong_labels"
    _, found = check(data, "--deep", "--backbone", "mobilenet_v2", "--out", str(tmp_path / "out"))
    listed = [f["paths"][0] for f in found["findings"] if f["kind"] == "mislabels"][:12]
    planted = [row["file"] for row in json.loads((data / "truth.json").read_text())["wrong_labels"]]
    assert len(set(listed) & set(planted)) >= 5
