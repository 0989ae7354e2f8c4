"""Plain sub-networks and segments as ONNX graphs: batch, height and width stay dynamic.

Written layer by layer rather than traced: the plain forms have eight kinds of layers, a graph takes
milliseconds where tracing takes seconds (a network of four gates has 53 segment forms), and the
nodes are those that backends fuse best. Parity with the modules is tested for every form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from dynaslim.errors import check
from dynaslim.runtime.extract import PlainGate, PlainHead, PlainResidual, PlainShortcut
from dynaslim.runtime.libraries import require

if TYPE_CHECKING:
    import onnx

OPSET: Final = 17
"""Old enough for the runtimes of several years, and all that these layers need."""
IR_VERSION: Final = 8
"""What goes with the opset."""
FEATURES: Final = "features"
GATE_LOGITS: Final = "gate_logits"
LOGITS: Final = "logits"
INPUT: Final = "x"


class _Graph:
    """Nodes and weights of a graph while it is written."""

    def __init__(self, prefix: str = "") -> None:
        self.helper = require("onnx").helper
        self.numpy_helper = require("onnx.numpy_helper")
        self.prefix = prefix
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self._count = 0

    def name(self, kind: str) -> str:
        self._count += 1
        return f"{self.prefix}{kind}_{self._count}"

    def node(
        self, kind: str, inputs: Sequence[str], *, out: str | None = None, **attributes: Any
    ) -> str:
        name = self.name(kind)
        out = out or f"{name}_out"
        self.nodes.append(self.helper.make_node(kind, list(inputs), [out], name=name, **attributes))
        return out

    def constant(self, value: Tensor | np.ndarray, what: str) -> str:
        name = self.name(what)
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        array = np.ascontiguousarray(array)
        self.initializers[name] = self.numpy_helper.from_array(array, name)
        return name

    # -- layers -------------------------------------------------------------------------------

    def layers(self, layers: Sequence[nn.Module], x: str) -> str:
        for layer in layers:
            x = self.layer(layer, x)
        return x

    def layer(self, layer: nn.Module, x: str) -> str:
        match layer:
            case nn.Identity():
                return x
            case nn.Sequential():
                return self.layers(list(layer), x)
            case nn.Conv2d():
                return self.conv(layer, x)
            case nn.SiLU():
                return self.node("Mul", [x, self.node("Sigmoid", [x])])
            case nn.ReLU():
                return self.node("Relu", [x])
            case nn.ReLU6():
                low, high = (self.constant(np.array(v, np.float32), "bound") for v in (0.0, 6.0))
                return self.node("Clip", [x, low, high])
            case nn.MaxPool2d():
                return self.node(
                    "MaxPool",
                    [x],
                    kernel_shape=[layer.kernel_size] * 2,
                    strides=[layer.stride] * 2,
                    pads=[layer.padding] * 4,
                )
            case PlainResidual():
                short = self.layer(layer.shortcut, x)
                return self.layer(layer.act, self.node("Add", [short, self.layer(layer.body, x)]))
            case PlainShortcut():
                return self.node("Add", [x, self.layer(layer.body, x)])
            case PlainGate():
                return self.gate(layer, x)
            case PlainHead():
                return self.linear(layer.classifier, self.pooled(x))
        raise AssertionError(f"no ONNX form of {type(layer).__name__}")

    def conv(self, conv: nn.Conv2d, x: str) -> str:
        assert conv.bias is not None
        pad = int(conv.padding[0])
        return self.node(
            "Conv",
            [x, self.constant(conv.weight, "weight"), self.constant(conv.bias, "bias")],
            kernel_shape=list(conv.kernel_size),
            strides=list(conv.stride),
            pads=[pad] * 4,
            group=conv.groups,
        )

    def linear(self, linear: nn.Linear, x: str, out: str | None = None) -> str:
        inputs = [x, self.constant(linear.weight, "weight")]
        if linear.bias is not None:
            inputs.append(self.constant(linear.bias, "bias"))
        return self.node("Gemm", inputs, out=out, transB=1)

    def pooled(self, x: str) -> str:
        return self.node("Flatten", [self.node("GlobalAveragePool", [x])])

    def gate(self, gate: PlainGate, x: str) -> str:
        hidden = self.node("Relu", [self.linear(gate.reduce, self.pooled(x))])
        scale = self.linear(gate.expand, hidden)
        if gate.sigmoid:
            scale = self.node("Sigmoid", [scale])
        else:
            one = self.constant(np.array(1, np.float32), "one")
            scale = self.node("Add", [self.node("Tanh", [scale]), one])
        axes = self.constant(np.array([2, 3], np.int64), "axes")
        scaled = self.node("Mul", [x, self.node("Unsqueeze", [scale, axes])])
        if gate.slimming is not None:
            self.linear(gate.slimming, hidden, out=self.prefix + GATE_LOGITS)
        return scaled


def to_onnx(plain: nn.Sequential, *, in_channels: int, name: str) -> onnx.ModelProto:
    """A plain segment or sub-network as an ONNX model.

    Input `x` (batch, in_channels, height, width), all but the channels dynamic. Outputs as the
    module's: `features` and `gate_logits` where it ends in a gate that decides, `logits` where it
    ends in the classifier, else `features` alone.

    Raises:
        UsageError: if the package `onnx` is not installed, or the weights are not float32.
    """
    onnx = require("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    for weight in plain.parameters():
        check(weight.dtype == torch.float32, f"{name}: weights of {weight.dtype}, not float32")
    graph = _Graph()
    out = graph.layers(list(plain), INPUT)
    last = plain[-1]
    result = LOGITS if isinstance(last, PlainHead) else FEATURES
    graph.nodes.append(helper.make_node("Identity", [out], [result], name="result"))
    outputs = [
        helper.make_tensor_value_info(LOGITS, kind, ["batch", last.classifier.out_features])
        if isinstance(last, PlainHead)
        else helper.make_tensor_value_info(FEATURES, kind, ["batch", None, None, None])
    ]
    if isinstance(last, PlainGate) and last.slimming is not None:
        shape = ["batch", last.slimming.out_features]
        outputs.append(helper.make_tensor_value_info(GATE_LOGITS, kind, shape))
    x = helper.make_tensor_value_info(INPUT, kind, ["batch", in_channels, "height", "width"])
    made = helper.make_graph(
        graph.nodes, name, [x], outputs, initializer=list(graph.initializers.values())
    )
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="dynaslim"
    )
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    return model
