"""LitServe with two workers."""

import os

import litserve
from answer import Network
from fastapi import Request


class Api(litserve.LitAPI):
    """One picture in, one class out."""

    def setup(self, device):
        self.network = Network()

    def decode_request(self, request: Request):
        return request["file"].file.read()

    def predict(self, data):
        return self.network.answer(data)

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=2,
                                fast_queue=os.environ.get("FAST_QUEUE") == "1")
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning")
