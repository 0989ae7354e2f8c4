"""Export of plain sub-networks and segments to ONNX by PyTorch's exporter, with a dynamic batch."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from dynaslim.errors import UsageError, check, first_line
from dynaslim.runtime.libraries import require

if TYPE_CHECKING:
    import onnx

OPSET: Final = 17
"""Old enough for runtimes of several years ago, and sufficient for these layers."""
IR_VERSION: Final = 8
"""The ONNX IR version that belongs to the opset."""
FEATURES: Final = "features"
GATE_LOGITS: Final = "gate_logits"
LOGITS: Final = "logits"
INPUT: Final = "x"

_LOCK = threading.Lock()
"""Held during export, because the exporter has global state."""


def to_onnx(
    plain: nn.Module,
    example: Tensor,
    outputs: Sequence[str],
    name: str,
    *,
    any_size: bool,
    opset: int = OPSET,
) -> bytes:
    """Export a plain module as an ONNX model with input `x`, the given outputs and graph name.

    `example` is an input (B, C, H, W). B is dynamic; with `any_size`, so are height and width.

    Raises:
        UsageError: if the package `onnx` is not installed, weights are not float32, or an operation
            cannot be exported to ONNX.
    """
    onnx = require("onnx")
    for weight in filter(Tensor.is_floating_point, plain.parameters()):
        check(weight.dtype == torch.float32, f"{name}: weights of {weight.dtype}, not float32")
    buffer = io.BytesIO()
    axes = {key: {0: "batch"} for key in (INPUT, *outputs)}
    if any_size:
        axes[INPUT] |= {2: "height", 3: "width"}
        if FEATURES in axes:
            axes[FEATURES] |= {2: "features_height", 3: "features_width"}
    try:
        with _LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                plain,
                (example,),
                buffer,  # type: ignore[arg-type]
                input_names=[INPUT],
                output_names=list(outputs),
                dynamic_axes=axes,
                opset_version=opset,
                dynamo=False,
            )
    except Exception as error:
        raise UsageError(f"{name}: no ONNX form: {first_line(error)}") from None
    model = onnx.load_from_string(buffer.getvalue())
    model.graph.name, model.ir_version = name, IR_VERSION
    _give_weights_back(model.graph)
    made: bytes = model.SerializeToString()
    return made


def _give_weights_back(graph: onnx.GraphProto) -> None:
    """Give every layer its own weight: the exporter merges equal ones, using `Identity` nodes."""
    weights = {weight.name: weight for weight in graph.initializer}
    copies = [n for n in graph.node if n.op_type == "Identity" and n.input[0] in weights]
    for node in copies:
        graph.initializer.add().CopyFrom(weights[node.input[0]])
        graph.initializer[-1].name = node.output[0]
        graph.node.remove(node)
