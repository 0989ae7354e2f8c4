"""The `VariantSource` of a network in memory."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dynaslim.checkpoint import stored
from dynaslim.nn.net import ElasticNet, SlimNet
from dynaslim.runtime.checkpoint_source import network_key
from dynaslim.runtime.extract import Shared, extract, extract_segment
from dynaslim.runtime.onnx_graph import FEATURES, GATE_LOGITS, LOGITS, to_onnx
from dynaslim.runtime.variants import Precision, RouteVariant, Variant
from dynaslim.spec import NetSpec, Route


class NetworkSource:
    """A network's variants, from a copy of its weights, so that later changes have no effect.

    Variants of a segment with the same width share the memory of the layers they have in common.

    Raises:
        RuntimeError: if the network is in training mode.
    """

    def __init__(self, net: ElasticNet, precision: Precision = "fp32") -> None:
        assert isinstance(net, SlimNet)
        if net.training:
            raise RuntimeError("the engine needs running statistics: call net.eval() first")
        self._net = copy.deepcopy(net)
        self.precision: Precision = precision
        self._shared: dict[torch.dtype, Shared] = {}
        self._lock = threading.Lock()
        self.spec = net.spec

    has_modules = True

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._net.device

    @cached_property
    def key(self) -> str:
        """Digest of spec, weights and precision."""
        return network_key(self.spec, self.precision, stored(self._net.state_dict()))

    def module(self, variant: Variant, dtype: torch.dtype = torch.float32) -> nn.Module:
        if isinstance(variant, RouteVariant):
            return self._extracted(extract, variant.route, dtype=dtype)
        return self._extracted(extract_segment, *variant, dtype=dtype)

    def trunk(self) -> nn.Module:
        """Segment 0 without its gate's logits."""
        return self._extracted(extract_segment, 0, 0, 0, decide=False)

    def tail(self, route: Route) -> nn.Module:
        """A route without segment 0."""
        return self._extracted(extract, route, behind_trunk=True)

    def _extracted(
        self,
        cut_out: Callable[..., nn.Module],
        *args: Any,
        dtype: torch.dtype = torch.float32,
        **named: Any,
    ) -> nn.Module:
        with self._lock:  # modules of the same dtype share weights
            shared = self._shared.setdefault(dtype, {})
            return cut_out(self._net, *args, shared=shared, **named).to(dtype)

    def onnx(self, variant: Variant) -> bytes:
        spec = self.spec
        any_size = isinstance(spec, NetSpec)
        size = (spec.total_stride,) * 2 if any_size else spec.image_size
        shape = variant.shape(spec, size)
        example = torch.zeros(2, *shape.row_in, device=self.device)
        outputs = (LOGITS,) if len(shape.output_rows) == 1 else (FEATURES, GATE_LOGITS)
        return to_onnx(self.module(variant), example, outputs, variant.name, any_size=any_size)
