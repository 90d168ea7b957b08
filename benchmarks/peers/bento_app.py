"""BentoML with two workers: bentoml serve bento_app:Service"""

from pathlib import Path

import bentoml
from answer import Network


@bentoml.service(workers=2, traffic={"timeout": 120}, metrics={"enabled": True})
class Service:
    """One picture in, one class out."""

    def __init__(self):
        self.network = Network()

    @bentoml.api(route="/predict")
    def predict(self, file: Path) -> dict:
        return self.network.answer(file.read_bytes())
