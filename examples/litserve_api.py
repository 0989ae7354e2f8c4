"""Serve a model with LitServe; waiting requests share the engine's batches.

    python examples/litserve_api.py MODEL [PORT]

MODEL: a checkpoint or a package (no torch). POST /predict takes {"image": BASE64, "budget": 0.6}.
"""

import base64
import sys

import litserve
from fastapi import HTTPException

from dynaslim.data.decode import decode_image
from dynaslim.errors import DynaslimError
from dynaslim.predict import open_engine
from dynaslim.serve import Batcher


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.engine = open_engine(sys.argv[1])
        self.engine.warm_up()
        self.batcher = Batcher(self.engine)

    def decode_request(self, request: dict) -> list:
        try:
            content = base64.b64decode(str(request.get("image")))
            pixels = decode_image(content, self.engine.preprocessing, "image")
            return [self.batcher.submit([pixels], budget=request.get("budget"))]
        except (DynaslimError, ValueError) as error:
            raise HTTPException(400, str(error)) from None

    def batch(self, inputs: list) -> list:
        return [one for (one,) in inputs]

    def predict(self, futures: list) -> list[dict]:
        answers = [one.result().answers[0] for one in futures]
        route = self.engine.route_of
        return [{"top": a.top, "route": str(route(a.choices)), "madds": a.madds} for a in answers]

    def unbatch(self, output: list[dict]) -> list[dict]:
        return output


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: litserve_api.py MODEL [PORT]")
    server = litserve.LitServer(Classifier(max_batch_size=32, batch_timeout=0.003))
    server.run(port=int((*sys.argv, 8000)[2]), host="127.0.0.1", generate_client_file=False)
