"""POST /v2/models/NAME/infer: the Open Inference Protocol with Triton's binary tensors.

Suffixes: B images, C channels, G gates, K likeliest classes, N classes, S side in pixels.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, get_args

import numpy as np
from pydantic import ValidationError

from dynaslim.predict import Answer
from dynaslim.runtime.triton import OUTPUTS
from dynaslim.serve.batcher import WorkItem
from dynaslim.serve.endpoint import Call, Reply, bad_parameter
from dynaslim.serve.http import (
    ANSWER_HEADERS,
    JSON_HEADERS,
    BodyReader,
    HTTPError,
    decode_base64,
    encode_json,
)
from dynaslim.serve.schemas import (
    InferInput,
    InferOutput,
    InferRequest,
    InferResponse,
    ModelMetadata,
    OutputName,
    OutputTensor,
    infer_request,
)
from dynaslim.serve.service import ServedModel

VERSION: Final = "1"
"""The only version of every model."""
EXTENSIONS: Final = ["binary_tensor_data", "classification", "parameters", "model_repository"]
DATATYPES: Final = {"image": "BYTES", "pixels": "UINT8", "x": "FP32"}
_DTYPES: Final = {"UINT8": np.uint8, "FP32": np.float32}
_NUMPY: Final = {"FP32": "<f4", "INT64": "<i8", "FP64": "<f8", "BOOL": "?", "BYTES": "O"}
_AT_ONCE: Final = 1 << 18
"""A longer body (in bytes) is parsed in a thread, because it would block the event loop."""
_NUMBERS: Final = 1_000_000
"""Most values in JSON; each takes up to 32 bytes of memory while it is parsed."""
_RANGE: Final = 10.0
"""Largest absolute value of a normalised tensor, as a multiple of the largest pixel's."""
Rows = Sequence[bytes] | np.ndarray


def describe(model: ServedModel) -> ModelMetadata:
    """The model's metadata for clients; a request must have exactly one of the inputs."""
    spec, side = model.engine.spec, model.info.side
    image = [-1, spec.in_channels, side, side]
    shapes = {"logits": [-1, spec.num_classes], "choices": [-1, len(spec.gates)]}
    shapes |= {"label": [-1, -1], "confidence": [-1, -1]}
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": "dynaslim",
        "inputs": [
            {"name": name, "datatype": kind, "shape": [-1] if name == "image" else image}
            for name, kind in DATATYPES.items()
        ],
        "outputs": [
            {"name": name, "datatype": kind, "shape": shapes.get(name, [-1])}
            for name, kind in OUTPUTS.items()
        ],
    }


def check_version(path_params: Mapping[str, str]) -> None:
    """Raise `HTTPError` if a path names a version that models do not have."""
    version = path_params.get("version", VERSION)
    if version != VERSION:
        raise HTTPError(404, "not_found", f"version {version!r:.60}: there is {VERSION}")


class InferCall(Call):
    """A request to /v2/models/NAME/infer."""

    async def answer(self) -> Reply:
        check_version(self._scope["path_params"])
        _check_type(self._reader)
        body = await self._read(self._service.options.deadline_ms)
        if len(body) <= _AT_ONCE:
            request, rows = self._parse(body)
        else:
            request, rows = await asyncio.get_running_loop().run_in_executor(
                self._service.decoders, self._parse, body
            )
        del body
        parameters = request.parameters
        if parameters.timeout:
            deadline_ms = min(parameters.deadline_ms, parameters.timeout / 1000)
            parameters = parameters.model_copy(update={"deadline_ms": deadline_ms})
        setting, count, start = self._setting(parameters), len(rows), partial(self._start, rows)
        del rows
        item = await self._run(count, parameters, setting, start)
        return self._reply(request, item)

    def _start(self, rows: Rows, item: WorkItem) -> None:
        for number, row in enumerate(rows):
            if isinstance(row, np.ndarray):
                self._model.batcher.put(item, number, row)
            else:
                self._service.decoders.submit(self._decode, item, row, number)

    # -- the request --------------------------------------------------------------------------

    def _parse(self, body: bytes) -> tuple[InferRequest, Rows]:
        json_length = self._reader.json_length
        limited = infer_request(self._service.options.deadline_ms)
        if json_length is None:
            length = len(body)
        elif json_length.isdigit() and len(json_length) < 16 and int(json_length) <= len(body):
            length = int(json_length)
        else:
            raise _unreadable(
                f"Inference-Header-Content-Length {json_length.decode('latin-1'):.40}: must be a "
                f"number of bytes, at most the body's {len(body)}"
            )
        if not length and json_length is not None:  # the body is one image
            return limited(inputs=[_ONE_IMAGE]), [body]
        head = body[:length]
        if head.count(b",") > _NUMBERS:
            raise HTTPError(
                413,
                "body_too_large",
                f"the JSON has more than {_NUMBERS} values; send tensors in binary form",
            )
        try:
            request = limited.model_validate_json(head)
        except ValidationError as error:
            raise invalid_body(error) from None
        (tensor,) = request.inputs
        size = tensor.parameters.binary_data_size
        if length + (size or 0) != len(body):
            raise _unreadable(
                f"{len(body) - length} bytes follow the JSON, and binary_data_size is {size}"
            )
        if (size is None) == (tensor.data is None):
            raise _bad(tensor, "give either data or binary_data_size")
        for output in request.outputs:
            if output.parameters.classification is not None and output.name != "logits":
                raise bad_parameter(f"output {output.name}: classification is for logits")
        return request, self._rows(tensor, memoryview(body)[length:])

    def _rows(self, tensor: InferInput, binary: memoryview) -> Rows:
        """The images of an input: a list of files, or uint8 or float32 (B, C, S, S)."""
        pre, most = self._model.batcher.preprocessing, self._service.options.max_images
        shape, kind = tensor.shape, DATATYPES[tensor.name]
        if tensor.datatype != kind:
            raise _bad(tensor, f"datatype {tensor.datatype}: must be {kind}")
        image = [pre.channels, pre.image_size_px, pre.image_size_px]
        # Triton's clients often send files with shape [n, 1]
        if shape[1:] not in ([[], [1]] if kind == "BYTES" else [image]):
            wanted = [-1] if kind == "BYTES" else [-1, *image]
            raise _bad(tensor, f"shape {shape}: must be {wanted}, -1 for the number of images")
        if not shape[0]:
            raise HTTPError(422, "no_images", f"input {tensor.name}: shape {shape} has no images")
        if shape[0] > most:
            raise HTTPError(
                413, "too_many_images", f"a request may have at most {most} images, not {shape[0]}"
            )
        if kind == "BYTES":
            return _files(tensor, binary)
        made = _numbers(tensor, binary)
        if kind == "FP32":
            ends = [(end - m) / s for m, s in zip(pre.mean, pre.std, strict=True) for end in (0, 1)]
            limit = _RANGE * max(map(abs, ends))
            if not (made.min() >= -limit and made.max() <= limit):  # false for NaN
                raise _bad(
                    tensor,
                    f"values must be within {limit:.3g} of 0; normalised pixels are from "
                    f"{min(ends):.3g} to {max(ends):.3g}",
                )
        return made

    # -- the answer ---------------------------------------------------------------------------

    def _reply(self, request: InferRequest, item: WorkItem) -> Reply:
        answers = [answer for answer in item.answers if answer is not None]
        wanted = request.outputs or _ALL
        tensors: list[OutputTensor] = []
        binary: list[bytes] = []
        for output in wanted:
            as_binary = output.parameters.binary_data
            if as_binary is None:
                as_binary = request.parameters.binary_data_output
            tensor, content = self._output(output, answers, as_binary)
            tensors.append(tensor)
            binary += content
        response: InferResponse = {
            "model_name": self._model.name,
            "model_version": VERSION,
            "outputs": tensors,
        }
        if request.id is not None:
            response["id"] = request.id
        if item.used is not None:
            response["parameters"] = {"budget": item.setting.requested, "budget_used": item.used}
        head = encode_json(response)
        if not binary:
            return Reply(len(answers), head, JSON_HEADERS)
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"inference-header-content-length", str(len(head)).encode()),
            *ANSWER_HEADERS,
        ]
        return Reply(len(answers), b"".join([head, *binary]), headers)

    def _output(
        self, output: InferOutput, answers: Sequence[Answer], as_binary: bool
    ) -> tuple[OutputTensor, list[bytes]]:
        """An output tensor and a list with its binary content, if any."""
        name, count = output.name, output.parameters.classification
        values: Any
        if count is not None:
            kind, values = "BYTES", [self._classified(answer, count) for answer in answers]
        else:
            kind, values = OUTPUTS[name], [self._value(name, answer) for answer in answers]
        array = np.array(values, _NUMPY[kind])
        tensor: OutputTensor = {"name": name, "datatype": kind, "shape": list(array.shape)}
        if not as_binary:
            tensor["data"] = array.ravel().tolist()
            return tensor, []
        content = b"".join(map(_prefixed, array.flat)) if kind == "BYTES" else array.tobytes()
        tensor["parameters"] = {"binary_data_size": len(content)}
        return tensor, [content]

    def _value(self, name: OutputName, answer: Answer) -> Any:
        match name:
            case "logits":
                return answer.logits
            case "label":
                return [index for index, _ in answer.top]
            case "confidence":
                return [probability for _, probability in answer.top]
            case "route":
                return self._model.info.route(answer.choices).route
            case "choices":
                return answer.choices
            case "madds":
                return answer.madds
            case "escalated":
                return answer.escalated

    def _classified(self, answer: Answer, count: int) -> list[str]:
        names, logits_N = self._model.engine.class_names, answer.logits
        best = np.argsort(-logits_N, kind="stable")[:count].tolist()
        return [f"{logits_N[n]:f}:{n}" + ("" if names is None else f":{names[n]}") for n in best]


_ALL: Final = [InferOutput(name=name) for name in get_args(OutputName)]
_ONE_IMAGE: Final = InferInput(name="image", datatype="BYTES", shape=[1])


def _check_type(reader: BodyReader) -> None:
    if reader.encoding not in (b"", b"identity"):
        shown = reader.encoding.decode("latin-1")
        raise HTTPError(415, "content_type", f"content encoding {shown:.40}: send it uncompressed")
    kind = reader.type.partition(b";")[0].strip().lower()
    # Triton's client sends no content type
    if kind not in (b"", b"application/json", b"application/octet-stream"):
        raise HTTPError(
            415,
            "content_type",
            f"content type {kind.decode('latin-1'):.40}: send application/json, or "
            f"application/octet-stream with Inference-Header-Content-Length",
        )


def invalid_body(error: ValidationError) -> HTTPError:
    """The first validation error of a request, as one line."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return _unreadable(f"not JSON: {first['ctx']['error']}")
    if first["type"] == "value_error":
        return bad_parameter(str(first["ctx"]["error"]))
    where = ".".join(map(str, first["loc"])) or "body"
    given = "" if first["type"] == "missing" else f" {first['input']!r:.60}"
    return bad_parameter(f"{where}{given}: {first['msg']}")


def _unreadable(message: str) -> HTTPError:
    return HTTPError(400, "body_unreadable", message)


def _bad(tensor: InferInput, message: str) -> HTTPError:
    return HTTPError(422, "bad_body", f"input {tensor.name}: {message}")


def _files(tensor: InferInput, binary: memoryview) -> list[bytes]:
    """The elements of a BYTES tensor: base64 in JSON, or binary, each preceded by its length."""
    count = tensor.shape[0]
    files = list(_split(tensor, binary)) if tensor.data is None else _decoded(tensor, tensor.data)
    if len(files) != count:
        raise _bad(tensor, f"{len(files)} images, and shape {tensor.shape}")
    return files


def _split(tensor: InferInput, binary: memoryview) -> Iterator[bytes]:
    at, end = 0, len(binary)
    while at < end:
        if at + 4 > end:
            raise _bad(tensor, "the last length is cut off")
        (length,) = struct.unpack_from("<I", binary, at)
        at += 4 + length
        if at > end:
            raise _bad(tensor, f"an image of {length} bytes is cut off")
        yield bytes(binary[at - length : at])


def _decoded(tensor: InferInput, data: list[Any]) -> list[bytes]:
    flat = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in data]
    files = []
    for number, text in enumerate(flat):
        if not isinstance(text, str):
            raise _bad(tensor, f"data {text!r:.40}: must be images in base64")
        files.append(decode_base64(text, number))
    return files


def _prefixed(text: str) -> bytes:
    """An element of a binary BYTES tensor: its length, then its content."""
    content = text.encode("utf-8", "replace")
    return struct.pack("<I", len(content)) + content


def _numbers(tensor: InferInput, binary: memoryview) -> np.ndarray:
    """The numbers of a tensor as an array of its shape."""
    shape, dtype = tensor.shape, _DTYPES[tensor.datatype]
    if tensor.data is None:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if len(binary) != size:
            raise _bad(tensor, f"{len(binary)} bytes: shape {shape} takes {size}")
        return np.frombuffer(binary, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    try:
        given = np.array(tensor.data)
    except (ValueError, OverflowError):  # rows of different lengths
        given = np.array(None)
    kinds = "iu" if dtype is np.uint8 else "iuf"
    if given.dtype.kind not in kinds or list(given.shape) not in (shape, [math.prod(shape)]):
        raise _bad(tensor, f"data: must be {math.prod(shape)} numbers, flat or of shape {shape}")
    if dtype is np.uint8 and not (given.min() >= 0 and given.max() <= 255):
        raise _bad(tensor, "data: must be whole numbers from 0 to 255")
    return given.astype(dtype).reshape(shape)
