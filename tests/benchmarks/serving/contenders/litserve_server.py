"""LitServe: an upload for each image; copies of the model are worker processes."""

# No annotations from the future: LitServe takes that of ``request`` as it is.

import litserve
from fastapi import UploadFile
from model import PORT, WORKERS, Model


class Classify(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = Model()

    def decode_request(self, request: UploadFile):
        return self.model.prepare(request.file.read())

    def predict(self, pixels):
        return self.model.labels(pixels)[0]

    def encode_response(self, label: str):
        return {"label": label}


if __name__ == "__main__":
    server = litserve.LitServer(Classify(), accelerator="cpu", workers_per_device=WORKERS)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning")
