"""Checkpoints: one self-describing safetensors file.

The tensors are the network's state dict. The file's metadata has one JSON object under the key
`dynaslim`: format and version, spec, class names, preprocessing, metrics, recipe, a budget curve if
there is one, and a SHA-256 of this object and the tensors. Reading rebuilds the network from the
spec and runs no code from the file. Writing is atomic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynaslim._files import write_atomic
from dynaslim.checkpoint_content import (
    FORMAT,
    VERSION,
    Content,
    StoredTensor,
    check_description,
    description_digest,
    may_mirror,
    read_content,
)
from dynaslim.errors import CheckpointError, UsageError
from dynaslim.nn.net import ElasticNet, SlimNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.zoo import get_spec


@dataclass(frozen=True)
class Checkpoint:
    """A network with everything needed to use it and to trace how it was trained."""

    # added by `dynaslim.interop.hub`
    save_pretrained: ClassVar[Callable[..., Path]]
    push_to_hub: ClassVar[Callable[..., str]]
    from_pretrained: ClassVar[Callable[..., Checkpoint]]

    net: ElasticNet
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] | None = None
    """`BudgetCurve.to_dict` (`dynaslim.runtime.budget`); only valid for these weights."""

    @property
    def mirror(self) -> bool:
        """Whether the recipe treats a mirror image as being of the same class."""
        return may_mirror(self.recipe)

    def needed_preprocessing(self, path: str | Path) -> Preprocessing:
        """How pictures are prepared for the network; `path` is where it was read from.

        Raises:
            CheckpointError: if the checkpoint does not contain it.
        """
        if self.preprocessing is None:
            raise CheckpointError(f"{path}: does not say how images are prepared (preprocessing)")
        return self.preprocessing

    def __post_init__(self) -> None:
        check_description(self.net.spec, self.class_names, self.preprocessing)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SlimNet:
    """Create a network of the zoo with random weights.

    Raises:
        UsageError: for an unknown name or a class count below 1.
    """
    return SlimNet(get_spec(name, num_classes=num_classes), device=device, dtype=dtype)


def save(path: str | Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically.

    Raises:
        CheckpointError: if the network is a cascade or a package; if a weight or a BN statistic is
            not finite; or if metrics, recipe or budget are not finite JSON values.
        OSError: if the file cannot be written; an existing file of that name stays unchanged.
    """
    if not checkpoint.net.has_weights:
        raise CheckpointError(
            f"{path}: not saved, {checkpoint.net.spec.name} is a cascade or a package, which is "
            f"written as a package (dynaslim.runtime.export.export_package)"
        )
    tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.net.state_dict().items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: not saved, {name} has values that are not finite")
    pre = checkpoint.preprocessing
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "spec": checkpoint.net.spec.to_dict(),
        "class_names": checkpoint.class_names,
        "preprocessing": None if pre is None else pre.to_dict(),
        "metrics": dict(checkpoint.metrics),
        "recipe": dict(checkpoint.recipe),
    }
    if checkpoint.budget is not None:
        meta["budget"] = dict(checkpoint.budget)
    # through JSON once, so that the hash equals a reader's (tuples become lists)
    try:
        meta = json.loads(json.dumps(meta, allow_nan=False))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not saved, metrics or recipe, or budget: {error}") from None
    meta["sha256"] = description_digest(meta, stored(tensors))
    return write_atomic(path, safetensors.torch.save(tensors, {"dynaslim": json.dumps(meta)}))


def read(path: str | Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint that `save` wrote; the network is in evaluation mode.

    `path` is a file, the folder of a run or of `save_pretrained`, the name of a model that ships
    with dynaslim (`dynaslim.shipped`), or a hub address such as hf://user/model.

    Raises:
        CheckpointError: if the file is missing, truncated or altered, has another format or
            version, or its tensors do not fit its spec.
        HubError: if the hub cannot be reached or has no checkpoint at the address.
    """
    return checkpoint_of(read_content(path), path, device=device)


def checkpoint_of(
    content: Content, path: str | Path, *, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Rebuild the network of a file's content; `path` is where it was read from.

    Raises:
        CheckpointError: if the tensors do not fit the spec.
    """
    try:
        with _Unfilled():
            net = SlimNet(content.spec, device="meta")
    except (UsageError, TypeError) as error:
        raise CheckpointError(f"{path}: its description is not valid: {error}") from None
    tensors = {name: _tensor(entry) for name, entry in content.tensors.items()}
    _check_tensors(path, net, tensors)
    # copied: the buffers are not aligned, and the alignment of weights changes the last bit of a
    # convolution's result
    own = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
    net.load_state_dict(own, assign=True)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    return Checkpoint(
        net=net.eval(),
        class_names=content.class_names,
        preprocessing=content.preprocessing,
        metrics=content.metrics,
        recipe=content.recipe,
        budget=content.budget,
    )


class _Unfilled(TorchFunctionMode):
    """Skips `nn.init`, which has no effect on the meta device and imports torch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return None
        return func(*args, **(kwargs or {}))


def load(
    path: str | Path, *, num_classes: int | None = None, device: torch.device | str = "cpu"
) -> ElasticNet:
    """Load the network of a checkpoint, in evaluation mode; `read` returns the rest as well.

    Raises:
        CheckpointError: as in `read`, or if `num_classes` differs from the checkpoint's.
        HubError: as in `read`.
    """
    net = read(path, device=device).net
    if num_classes is not None and num_classes != net.spec.num_classes:
        raise CheckpointError(
            f"{path}: has {net.spec.num_classes} classes, not the {num_classes} asked for"
        )
    return net


def keeps_classifier(checkpoint: Checkpoint, class_names: Sequence[str]) -> bool:
    """Whether `with_classes` keeps the checkpoint's classifier."""
    as_many = len(class_names) == checkpoint.net.spec.num_classes
    return as_many and checkpoint.class_names in (None, tuple(class_names))


def with_classes(checkpoint: Checkpoint, class_names: Sequence[str]) -> ElasticNet:
    """A copy of the network for training on these classes; in evaluation mode.

    The checkpoint's classifier is kept if its class names are the same in the same order, or if it
    has no names but the same number of classes. Otherwise the classifier is initialised anew, from
    torch's global random generator.
    """
    spec = checkpoint.net.spec.replace(num_classes=len(class_names))
    same = keeps_classifier(checkpoint, class_names)
    state = checkpoint.net.state_dict()
    net = SlimNet(spec, device=next(iter(state.values())).device)
    if not same:
        head = f"{spec.classifier}."
        state = {k: v for k, v in state.items() if not k.startswith(head)}
    net.load_state_dict(state, strict=same)
    return net.eval()


def stored(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Tensors on any device as they are stored in a file."""
    found = {}
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        found[name] = StoredTensor(str(tensor.dtype), tuple(tensor.shape), values)
    return found


def _tensor(entry: StoredTensor) -> Tensor:
    dtype: torch.dtype = getattr(torch, entry.dtype.removeprefix("torch."))
    if not entry.values:  # which frombuffer refuses
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(entry.values, dtype=dtype).reshape(entry.shape)


def _check_tensors(path: str | Path, net: ElasticNet, tensors: Mapping[str, Tensor]) -> None:
    own = net.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: has no tensor {name} of shape {shape}")
        if tuple(tensors[name].shape) != shape:
            got = tuple(tensors[name].shape)
            raise CheckpointError(f"{path}: {name} has shape {got}, its spec needs {shape}")
        if tensors[name].is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(f"{path}: {name} has type {tensors[name].dtype}")
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise CheckpointError(f"{path}: has a tensor {extra[0]} that its spec does not have")
