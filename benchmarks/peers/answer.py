"""What LitServe and BentoML are given: the ONNX file, and Pillow or our decode function before it."""

import io
import json
import os

import numpy as np
import onnxruntime
from PIL import Image

SIDE = 150


class Network:
    """An ONNX graph with one thread, as two workers on two cores want it."""

    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["MODEL"], options, ["CPUExecutionProvider"])
        self.classes, self.decode = json.loads(os.environ["CLASSES"]), plain
        if os.environ.get("OUR_DECODE"):
            from automl_cv.pixels import Policy, pixels
            policy = Policy(SIDE, SIDE, "squash")
            self.decode = lambda data: pixels(data, policy)

    def answer(self, data: bytes) -> dict[str, object]:
        """Name the class of one picture."""
        logits = self.session.run(["logits"], {"images": self.decode(data)[None]})[0][0]
        shares = np.exp(logits - logits.max())
        best = int(shares.argmax())
        return {"label": self.classes[best], "confidence": float(shares[best] / shares.sum())}


def plain(data: bytes) -> np.ndarray:
    """Decode as most people do."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
