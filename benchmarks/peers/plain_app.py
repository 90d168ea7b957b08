"""The plain service, written again as the original is: FastAPI, an async handler, Pillow, eager torch.

    MODEL=network.pt PORT=8001 python plain_app.py            serve
    MODEL=network.pt python plain_app.py decode LIST_OF_PATHS  only prepare pictures; prints milliseconds
"""

import io
import json
import os
import sys
import time

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image

try:
    from torchvision import models, transforms
except RuntimeError:  # beside a torch without GPUs its library lacks operators, which nobody calls here
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision import models, transforms

SIDE = 150
saved = torch.load(os.environ["MODEL"])
app, classes = FastAPI(), saved["classes"]
network = models.resnet18(num_classes=len(classes))
network.load_state_dict(saved["state"])
network.eval()
prepare = transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.ToTensor(),
                              transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])


@app.get("/health/live")
async def live() -> str:
    """Say that the process runs."""
    return "live"


@app.post("/predict")
async def predict(file: UploadFile) -> dict[str, object]:
    """Name the class of one picture."""
    image = prepare(Image.open(io.BytesIO(await file.read())).convert("RGB"))
    with torch.no_grad():
        shares = network(image[None]).softmax(1)[0]
    return {"label": classes[int(shares.argmax())], "confidence": float(shares.max())}


def decode(names: list[str]) -> None:
    """Prepare pictures and print what each cost and what the network says, one JSON line each."""
    for name in names:
        with open(name, "rb") as file:
            data = file.read()
        started = time.process_time()
        image = prepare(Image.open(io.BytesIO(data)).convert("RGB"))
        spent = time.process_time() - started
        with torch.no_grad():
            shares = network(image[None]).softmax(1)[0].numpy().astype(np.float64)
        print(json.dumps({"ms": 1000 * spent, "label": classes[int(shares.argmax())],
                          "confidence": float(shares.max())}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["decode"]:
        torch.set_num_threads(1)
        for line in sys.stdin:
            decode(line.split("\n")[:1])
    else:
        uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning")
