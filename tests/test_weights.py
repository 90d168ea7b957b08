"""Starting weights from a real file: the one way to a pretrained network on a machine without a network."""
from pathlib import Path

import pytest

from automl_cv.models import create_model

WEIGHTS = Path(__file__).parents[1].parent / "shared" / "weights"


@pytest.mark.skipif(not WEIGHTS.exists(), reason="NO REAL WEIGHTS ARE LOADED: ../shared/weights is absent")
def test_mobilenet_starts_pretrained_from_a_local_file(monkeypatch):
    monkeypatch.setenv("AUTOML_CV_WEIGHTS", str(WEIGHTS))
    model = create_model("mobilenet_v2", 6)
    assert model.pretrained is True
    assert model.origin == "file mobilenet_v2.imagenet.safetensors"


def test_no_weights_anywhere_says_so_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AUTOML_CV_WEIGHTS", str(tmp_path))
    models = [create_model("small_cnn", 6) for _ in range(3)]
    assert [model.pretrained for model in models] == [False, False, False]
    assert capsys.readouterr().out.count("TRAINS FROM SCRATCH") == 1
