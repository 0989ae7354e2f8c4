"""Checkpoints: one self-describing safetensors file.

The tensors are the network's state dict. The file's metadata has one JSON object under the key
`dynaslim`: format and version, spec, class names, preprocessing, metrics, recipe, a budget curve if
there is one, and a SHA-256 of this object and the tensors. Reading rebuilds the network from the
spec and runs no code from the file. Writing is atomic.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynaslim._files import write_atomic
from dynaslim.errors import CheckpointError, UsageError
from dynaslim.graph import spec_from_dict
from dynaslim.model_names import checkpoint_file
from dynaslim.nn.net import ElasticNet, SlimNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.zoo import get_spec

FORMAT: Final = "dynaslim-checkpoint"
VERSION: Final = 1


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
        """Whether the recipe treats a mirror image as being of the same class.

        True if `augment.mirror` is true in every stage of the recipe; False without any stage.
        """
        stages = [self.recipe.get(stage) for stage in ("supernet", "gate")]
        found = [
            stage["augment"]
            for stage in stages
            if isinstance(stage, Mapping) and isinstance(stage.get("augment"), Mapping)
        ]
        return bool(found) and all(augment.get("mirror") is True for augment in found)

    def needed_preprocessing(self, path: str | Path) -> Preprocessing:
        """How pictures are prepared for the network; `path` is where it was read from.

        Raises:
            CheckpointError: if the checkpoint does not contain it.
        """
        if self.preprocessing is None:
            raise CheckpointError(f"{path}: does not say how images are prepared (preprocessing)")
        return self.preprocessing

    def __post_init__(self) -> None:
        spec = self.net.spec
        if self.class_names is not None and len(self.class_names) != spec.num_classes:
            raise UsageError(
                f"{len(self.class_names)} class names do not fit {spec.num_classes} classes"
            )
        if self.preprocessing is not None:
            spec.check_image_size(*(self.preprocessing.image_size_px,) * 2)
        if self.preprocessing is not None and self.preprocessing.channels != spec.in_channels:
            raise UsageError(
                f"preprocessing for {self.preprocessing.channels} channels does not fit a network "
                f"of {spec.in_channels} input channels"
            )


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
    meta["sha256"] = _digest(meta, tensors)
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
    meta, tensors = _read_verified(checkpoint_file(path))
    try:
        spec = spec_from_dict(meta["spec"])
        names = meta["class_names"]
        pre = meta["preprocessing"]
        budget = meta.get("budget")  # not in files without one
        if not isinstance(budget, dict | None):
            raise UsageError(f"budget {budget!r:.60}: expected an object")
        with _Unfilled():
            net = SlimNet(spec, device="meta")
        _check_tensors(path, net, tensors)
        # copied: in the file tensors are only aligned to 8 bytes, and the alignment of weights
        # changes the last bit of a convolution's result
        own = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        net.load_state_dict(own, assign=True)
        for parameter in net.parameters():
            parameter.requires_grad_(True)
        return Checkpoint(
            net=net.eval(),
            class_names=None if names is None else tuple(names),
            preprocessing=None if pre is None else Preprocessing.from_dict(pre),
            metrics=dict(meta["metrics"]),
            recipe=dict(meta["recipe"]),
            budget=budget,
        )
    except (UsageError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its description is not valid: {error}") from None


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


def _digest(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    described = {key: value for key, value in meta.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_verified(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if "dynaslim" not in header:
                raise CheckpointError(f"{path}: a safetensors file, but not a dynaslim checkpoint")
            meta = json.loads(header["dynaslim"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint, truncated or of another format ({error}); a "
            f"released DS-Net file is read with: dynaslim import-official {path} OUT"
        ) from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a dynaslim checkpoint")
    version = meta.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {version}, this dynaslim reads version {VERSION}; "
            f"install the dynaslim that wrote it or a newer one"
        )
    if meta.get("sha256") != _digest(meta, tensors):
        raise CheckpointError(f"{path}: its content does not match its SHA-256: altered or damaged")
    return meta, tensors


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
