"""Forms of a network in memory."""

from __future__ import annotations

import copy
import hashlib
import threading
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dynaslim.nn.net import SlimNet
from dynaslim.runtime.extract import extract, extract_segment
from dynaslim.runtime.forms import Form, Precision
from dynaslim.runtime.onnx_graph import to_onnx


class NetworkForms:
    """A network's forms, from a copy of its weights: what becomes of it later does not matter.

    Forms of one segment at one width share the memory of all that they have in common.

    Raises:
        RuntimeError: if the network is in training mode.
    """

    def __init__(self, net: SlimNet, precision: Precision = "fp32") -> None:
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
        return self._net.classifier.weight.device

    @cached_property
    def key(self) -> str:
        """Digest of spec, weights and precision."""
        digest = hashlib.sha256(f"{self.spec} {self._precision}".encode())
        for name, tensor in sorted(self._net.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            values = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def module(self, form: Form, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """As `FormSource.module`."""
        if form.route is not None:
            return extract(self._net, form.route).to(dtype)
        with self._lock:  # forms share layers, those of one type
            shared = self._shared.setdefault(dtype, {})
            return extract_segment(
                self._net, form.segment, form.before, form.choice, shared=shared
            ).to(dtype)

    def onnx(self, form: Form) -> bytes:
        """As `FormSource.onnx`."""
        plain = self.module(form)
        channels = self.spec.in_channels
        if form.route is None and form.segment > 0:
            first = next(m for m in plain.modules() if isinstance(m, nn.Conv2d))
            channels = first.in_channels
        made: bytes = to_onnx(plain, in_channels=channels, name=form.name).SerializeToString()
        return made
