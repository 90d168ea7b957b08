"""What runs the graph of a real service: requests run together, and OpenVINO where that is installed."""
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from automl_cv.predict import Predictor
from automl_cv.sessions import has_openvino

COLOURS = ("red", "lime", "blue", "yellow", "gray", "purple")


def ask_many(server, plain, count=120):
    """Send pictures from many threads; return the probabilities of each in order."""
    with httpx.Client(trust_env=False, timeout=60) as client, ThreadPoolExecutor(24) as threads:
        def one(i):
            picture = plain(COLOURS[i % len(COLOURS)])
            answer = client.post(f"{server.url}/predict?probabilities=true", files={"file": picture}).json()
            return [share["probability"] for share in answer["probabilities"]]
        return list(threads.map(one, range(count)))


def test_requests_together_get_their_own_answers(start, bundle, plain):
    predictor = Predictor(bundle)
    wanted = [predictor.predict(plain(colour)).probabilities.tolist() for colour in COLOURS]
    with start(bundle, AUTOML_CV_BATCH="8") as server:
        facts = httpx.get(f"{server.url}/model", trust_env=False).json()
        found = ask_many(server, plain)
    assert facts["batch"] == 8 and facts["workers"] > 8 and facts["engine"].split()[0] in ("onnxruntime", "openvino")
    for i, shares in enumerate(found):
        assert shares == pytest.approx(wanted[i % len(COLOURS)], abs=1e-5)


def test_each_alone_unless_asked(start, bundle):
    with start(bundle) as server:
        assert httpx.get(f"{server.url}/model", trust_env=False).json()["batch"] == 1


if has_openvino():  # an extra that no other test needs; ci.yml installs it for these
    @pytest.fixture(scope="module")
    def mish(tmp_path_factory):
        """Return the bundle of a network of Mish, which OpenVINO has in one piece and onnxruntime in four."""
        import torch
        from automl_cv.export import export_bundle
        from automl_cv.pixels import Policy
        from torch import nn

        class Body(nn.Module):
            """A network without training."""

            def __init__(self):
                super().__init__()
                layers = [nn.Sequential(nn.Conv2d(64, 64, 1), nn.Mish()) for _ in range(6)]
                self.body, self.head = nn.Sequential(nn.Conv2d(3, 64, 1), *layers), nn.Linear(64, 3)

            def features(self, images):
                """Return a feature of each channel."""
                return self.body(images.permute(0, 3, 1, 2).float() / 255).mean(dim=(2, 3))

            def forward(self, images):
                """Return logits."""
                return self.head(self.features(images))

        torch.manual_seed(0)
        facts = {"name": "mish", "backbone": "mish", "pretrained": False, "origin": "made by hand",
                 "licence": "Apache-2.0", "config": {}, "data": {"images": 0, "fingerprint": "0" * 64}}
        folder = tmp_path_factory.mktemp("mish") / "model"
        export_bundle(Body().eval(), folder, ["a", "b", "c"], Policy(96, 112), facts)
        return folder

    def test_openvino_answers_where_it_is_faster(start, mish, plain):
        predictor = Predictor(mish)
        wanted = [predictor.predict(plain(colour)).probabilities.tolist() for colour in COLOURS]
        with start(mish) as server:
            facts = httpx.get(f"{server.url}/model", trust_env=False).json()
            found = ask_many(server, plain, 36)
        assert facts["engine"].startswith("openvino 20") and facts["precision"] == "fp32"
        for i, shares in enumerate(found):
            assert shares == pytest.approx(wanted[i % len(COLOURS)], abs=1e-5)
