"""A routed network in Triton's Python backend: the class that an exported `model.py` imports.

A request is a batch of images. Requests that Triton passes together and that have the same
parameters run as one batch of the engine. No torch is needed.

Suffixes: B images, C channels, G gates, N classes, S side in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dynaslim.data.decode import decode_image
from dynaslim.errors import DynaslimError, UsageError, check
from dynaslim.preprocessing import normalise_pixels
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.escalation import probabilities
from dynaslim.runtime.options import RoutedOutput

OUTPUTS: Final = {
    "logits": "FP32",
    "label": "INT64",
    "confidence": "FP32",
    "route": "BYTES",
    "choices": "INT64",
    "madds": "FP64",
    "escalated": "BOOL",
}
"""Names and datatypes of the outputs, in Triton as in the server's Open Inference Protocol."""
_PARAMETERS: Final = ("budget", "escalate")


class _Setting(NamedTuple):
    """The parameters of a request."""

    budget: str | None
    escalate: Any


class TritonModel:
    """Base class of `TritonPythonModel` in `model.py`, which sets the package's folder."""

    package: Path
    """The folder of the package."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open and compile the package; `args` are those of the Python backend."""
        config = json.loads(args["model_config"])
        given = {
            key: value.get("string_value", "")
            for key, value in config.get("parameters", {}).items()
        }
        workers = given.get("workers", "")
        self._engine = Engine.from_package(
            self.package,
            backend=given.get("backend") or "onnxruntime",
            workers=int(workers) if workers else None,
            max_batch=config["max_batch_size"],
        )
        self._engine.warm_up()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response per request, with its outputs or an error."""
        import triton_python_backend_utils as pb_utils

        made: list[Any] = [None] * len(requests)
        together: dict[_Setting, list[tuple[int, np.ndarray]]] = {}
        for number, request in enumerate(requests):
            try:
                setting = _setting(json.loads(request.parameters() or "{}"))
                together.setdefault(setting, []).append((number, self._images(pb_utils, request)))
            except DynaslimError as error:
                made[number] = _failed(pb_utils, error)
        for setting, members in together.items():
            numbers = [number for number, _ in members]
            try:
                output = self._engine(
                    np.concatenate([x_BCSS for _, x_BCSS in members]),
                    budget=setting.budget,
                    escalate=setting.escalate,
                )
            except DynaslimError as error:
                for number in numbers:
                    made[number] = _failed(pb_utils, error)
                continue
            ends = np.cumsum([len(x_BCSS) for _, x_BCSS in members])
            columns = {name: np.split(v, ends[:-1]) for name, v in self._outputs(output).items()}
            for place, number in enumerate(numbers):
                wanted = requests[number].requested_output_names()
                tensors = [pb_utils.Tensor(name, columns[name][place]) for name in wanted]
                made[number] = pb_utils.InferenceResponse(output_tensors=tensors)
        return made

    def finalize(self) -> None:
        """Stop the engine's threads."""
        self._engine.close()

    def _images(self, pb_utils: Any, request: Any) -> np.ndarray:
        """The normalised images (B, C, S, S) of a request."""
        pre = self._engine.preprocessing
        given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in ("x", "image")}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        check(len(tensors) == 1, f"inputs {', '.join(tensors) or 'none'}: give x or image")
        ((name, tensor),) = tensors.items()
        array: np.ndarray = tensor.as_numpy()
        if name == "x":
            finite = bool(np.isfinite(array).all())
            check(finite, "input x: has values that are not finite")  # would fail the whole batch
            return array
        # the only limit is Pillow's own, 179 million pixels
        if pre is None:
            raise UsageError("input image: the package has no preprocessing; send x")
        files = array.ravel()
        pixels = [decode_image(bytes(file), pre, f"image {n}") for n, file in enumerate(files)]
        return normalise_pixels(np.stack(pixels), pre)

    def _outputs(self, output: RoutedOutput) -> dict[str, np.ndarray]:
        logits_BN = np.asarray(output.logits, np.float32)
        choices_BG = np.asarray(output.routes, np.int64)
        routes = [str(self._engine.route_of(row)).encode() for row in choices_BG]
        return {
            "logits": logits_BN,
            "label": logits_BN.argmax(1)[:, None],
            "confidence": probabilities(logits_BN).max(1)[:, None],
            "route": np.array(routes, object)[:, None],
            "choices": choices_BG,
            "madds": np.asarray(output.madds, np.float64)[:, None],
            "escalated": np.asarray(output.escalated, bool)[:, None],
        }


def _setting(parameters: Mapping[str, Any]) -> _Setting:
    for name in parameters:
        check(name in _PARAMETERS, f"parameter {name!r:.60}: there are {', '.join(_PARAMETERS)}")
    budget, escalate = parameters.get("budget"), parameters.get("escalate", "auto")
    return _Setting(
        None if budget is None else str(budget), None if escalate == "never" else escalate
    )


def _failed(pb_utils: Any, error: DynaslimError) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))
