"""Serve a model with Ray Serve; in each replica, waiting requests share the engine's batches.

    python examples/ray_serve.py MODEL [IMAGES...]

MODEL: a checkpoint or a package (no torch). Prints the images' answers; without images, it serves:
curl --data-binary @cat.jpg http://127.0.0.1:8000/?budget=0.6 (needs pip install 'ray[serve]')
"""

import asyncio
import sys
from pathlib import Path

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from dynaslim.data.decode import decode_image
from dynaslim.errors import DynaslimError
from dynaslim.predict import open_engine
from dynaslim.serve import Batcher


@serve.deployment(max_ongoing_requests=64)
class Classifier:
    def __init__(self, model: str) -> None:
        self.engine = open_engine(model, workers=1)  # use one replica per core instead
        self.engine.warm_up()
        self.batcher = Batcher(self.engine)

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            return JSONResponse(await self.classify(await request.body(), **request.query_params))
        except (DynaslimError, TypeError) as error:  # a wrong image, budget or parameter
            return JSONResponse({"error": str(error)}, 400)

    async def classify(self, content: bytes, budget: str | None = None) -> dict:
        pixels = decode_image(content, self.engine.preprocessing, "image")
        future = self.batcher.submit([pixels], budget=budget)
        answer = (await asyncio.wrap_future(future)).answers[0]
        route = str(self.engine.route_of(answer.choices))
        return {"top": answer.top, "route": route, "madds": answer.madds}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: ray_serve.py MODEL [IMAGES...]")
    classify = serve.run(Classifier.bind(str(Path(sys.argv[1]).absolute()))).classify.remote
    for one in [classify(Path(file).read_bytes()) for file in sys.argv[2:]]:
        print(one.result())
    serve.shutdown() if sys.argv[2:] else serve.run_forever()
