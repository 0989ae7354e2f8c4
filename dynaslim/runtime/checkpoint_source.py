"""The `VariantSource` of a checkpoint file. Imports torch only if a program is not compiled yet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dynaslim.checkpoint_content import (
    Content,
    StoredTensor,
    add_tensors,
    may_mirror,
    read_content,
)
from dynaslim.graph import AnySpec
from dynaslim.runtime.cache import open_cache
from dynaslim.runtime.variants import OpenModel, Precision, Variant

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dynaslim.runtime.network_source import NetworkSource


def network_key(spec: AnySpec, precision: Precision, tensors: Mapping[str, StoredTensor]) -> str:
    """Digest of a network's spec, precision and tensors; the same from a file and from memory."""
    digest = hashlib.sha256(f"{spec} {precision}".encode())
    add_tensors(digest, tensors)
    return digest.hexdigest()


class CheckpointSource:
    """The variants of a file's network, which is built when a variant is first needed."""

    precision: Precision = "fp32"
    has_modules: Final = True

    def __init__(self, content: Content, path: str | Path) -> None:
        self._content: Content | None = content
        self._path = path
        self.spec = content.spec
        self.key = network_key(self.spec, self.precision, content.tensors)

    @cached_property
    def network(self) -> NetworkSource:
        """The source of the network in memory.

        Raises:
            CheckpointError: if the tensors do not fit the spec.
        """
        from dynaslim.checkpoint import checkpoint_of
        from dynaslim.runtime.network_source import NetworkSource

        assert self._content is not None
        made = NetworkSource(checkpoint_of(self._content, self._path).net)
        self._content = None  # its tensors are copied
        return made

    def module(self, variant: Variant, dtype: torch.dtype) -> nn.Module:
        return self.network.module(variant, dtype)

    def onnx(self, variant: Variant) -> bytes:
        return self.network.onnx(variant)


def open_checkpoint(path: str | Path, cache_dir: str | Path | None) -> OpenModel:
    """Read a checkpoint to run it; without torch if programs of it are in the cache.

    Raises:
        CheckpointError, HubError: as `dynaslim.read`.
    """
    content = read_content(path)
    source = CheckpointSource(content, path)
    cache = open_cache(source.key, cache_dir)
    if cache is None or not cache.folder.is_dir():
        _ = source.network  # programs are compiled only from tensors that fit
    return OpenModel(
        source,
        content.class_names,
        content.preprocessing,
        content.budget,
        may_mirror(content.recipe),
    )
