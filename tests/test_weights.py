"""Starting weights from a real file: the one way to a pretrained network on a machine without a network."""
import io
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from automl_cv.convolutions import fold_norms
from automl_cv.models import Classifier, create_model, weights_trouble, _warn
from automl_cv.race import useful_sizes
from automl_cv.space import small_size
from automl_cv.zoo import ZOO

WEIGHTS = Path(__file__).parents[1].parent / "shared" / "weights"


@pytest.mark.skipif(not WEIGHTS.exists(), reason="NO REAL WEIGHTS ARE LOADED: ../shared/weights is absent")
def test_mobilenet_starts_pretrained_from_a_local_file(monkeypatch):
    monkeypatch.setenv("AUTOML_CV_WEIGHTS", str(WEIGHTS))
    model = create_model("mobilenet_v2", 6)
    assert model.pretrained is True
    assert model.origin == "file mobilenet_v2.imagenet.safetensors"


def test_no_weights_anywhere_says_so_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AUTOML_CV_WEIGHTS", str(tmp_path))
    _warn.cache_clear()  # another test of this process may have been told
    models = [create_model("small_cnn", 6) for _ in range(3)]
    assert [model.pretrained for model in models] == [False, False, False]
    assert capsys.readouterr().out.count("TRAINS FROM SCRATCH") == 1


def run_onnx(model: Classifier, images: torch.Tensor) -> np.ndarray:
    """Export a network with the tracing exporter, from a batch of two, and run it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images[:2],), file, dynamo=False, opset_version=20, input_names=["images"],
                          dynamic_axes={"images": {0: "n"}})
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


@pytest.mark.parametrize("name", ZOO)
def test_every_backbone_loads_a_file_runs_and_exports(name, monkeypatch, tmp_path):
    if ZOO[name].source == "timm" and not find_spec("timm"):
        pytest.skip("BACKBONES OF timm ARE NOT TESTED: the extra is absent")
    made, size = create_model(name, 3, pretrained=False, seed=1).eval(), min(ZOO[name].sizes)
    save_file({key: value.contiguous() for key, value in made.body.state_dict().items()},
              tmp_path / f"{name}.safetensors")
    monkeypatch.setenv("AUTOML_CV_WEIGHTS", str(tmp_path))
    model = create_model(name, 3, seed=2).eval()
    assert (model.pretrained, model.origin) == (True, f"file {name}.safetensors")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8))
    with torch.inference_mode():
        features, logits = model.features(images), model(images)
        assert torch.equal(features, made.features(images))
    assert features.shape == (3, model.head.in_features)
    assert np.allclose(run_onnx(model, images), logits.numpy(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "vit_b_16", "dinov2_s"])
def test_a_backbone_takes_the_sizes_that_are_chosen_for_it(name):
    if ZOO[name].source == "timm" and not find_spec("timm"):
        pytest.skip("BACKBONES OF timm ARE NOT TESTED: the extra is absent")
    model = create_model(name, 3, pretrained=False).eval()
    assert (fold_norms(model) > 0) == (name == "resnet18")
    wanted = [useful_sizes(name, 500, size)[0] for size in (16, 100, 160)]
    for size in {*wanted, small_size(224, name) or max(ZOO[name].sizes)}:
        with torch.inference_mode():
            assert model(torch.zeros(1, size, size, 3, dtype=torch.uint8)).shape == (1, 3)


def test_every_backbone_without_weights_gives_a_reason_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOML_CV_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert [name for name in ZOO if not weights_trouble(name)] == []
    assert "AUTOML_CV_OFFLINE" in weights_trouble("resnet18")
    assert weights_trouble("small_cnn") == "this backbone has no pretrained weights"
