"""Forms of a network in memory."""

from __future__ import annotations

import copy
import hashlib
import threading
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dynaslim.graph import AnySpec
from dynaslim.nn.graph_net import GraphNet
from dynaslim.nn.net import ElasticNet, SlimNet
from dynaslim.runtime.extract import extract, extract_segment
from dynaslim.runtime.forms import Form, Precision, form_shape
from dynaslim.runtime.graph_forms import plain_form
from dynaslim.runtime.graph_forms import to_onnx as graph_onnx
from dynaslim.runtime.onnx_graph import FEATURES, GATE_LOGITS, LOGITS, to_onnx


class NetworkForms:
    """A network's forms, from a copy of its weights: what becomes of it later does not matter.

    Forms of one segment at one width share the memory of all that they have in common.

    Raises:
        RuntimeError: if the network is in training mode.
    """

    def __init__(self, net: ElasticNet, precision: Precision = "fp32") -> None:
        if net.training:
            raise RuntimeError("the engine needs running statistics: call net.eval() first")
        self._net = copy.deepcopy(net)
        self._precision: Precision = precision
        self._shared: dict[torch.dtype, dict[Any, list[nn.Module]]] = {}
        self._lock = threading.Lock()
        self.spec = net.spec

    has_modules = True

    @property
    def precision(self) -> Precision:
        """What the programs compute in."""
        return self._precision

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._net.device

    @cached_property
    def key(self) -> str:
        """Digest of spec, weights and precision."""
        digest = hashlib.sha256(f"{self.spec} {self._precision}".encode())
        for name, tensor in sorted(self._net.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            values = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def module(self, form: Form, dtype: torch.dtype = torch.float32) -> nn.Module:
        """As `FormSource.module`."""
        if isinstance(self._net, GraphNet):
            return plain_form(self._net, form).to(dtype)
        assert isinstance(self._net, SlimNet)
        if form.route is not None:
            return extract(self._net, form.route).to(dtype)
        with self._lock:  # forms share layers, those of one type
            shared = self._shared.setdefault(dtype, {})
            return extract_segment(
                self._net, form.segment, form.before, form.choice, shared=shared
            ).to(dtype)

    def onnx(self, form: Form) -> bytes:
        """As `FormSource.onnx`."""
        if isinstance(self._net, GraphNet):
            shape = form_shape(self.spec, form, self.spec.image_size)
            example = torch.zeros(2, *shape.row_in)
            return graph_onnx(
                plain_form(self._net, form), example, _outputs(self.spec, form), form.name
            )
        plain = self.module(form)
        assert isinstance(plain, nn.Sequential)
        channels = self.spec.in_channels
        if form.route is None and form.segment > 0:
            first = next(m for m in plain.modules() if isinstance(m, nn.Conv2d))
            channels = first.in_channels
        made: bytes = to_onnx(plain, in_channels=channels, name=form.name).SerializeToString()
        return made


def _outputs(spec: AnySpec, form: Form) -> tuple[str, ...]:
    last = form.route is not None or form.segment == len(spec.gates)
    return (LOGITS,) if last else (FEATURES, GATE_LOGITS)
