"""Read checkpoints of the released DS-Net code without executing code from them.

The release saves DS-MBNet with `torch.save`: `state_dict` (its keys may start with `module.`),
`state_dict_ema` and an `argparse.Namespace` of its options. The loader accepts only tensors and
that Namespace; anything else in the pickle is refused by name.
"""

from __future__ import annotations

import argparse
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynaslim.checkpoint import Checkpoint
from dynaslim.errors import CheckpointError
from dynaslim.nn.gate import Gate
from dynaslim.nn.layers import SlimBatchNorm2d
from dynaslim.nn.net import SlimNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.zoo import get_spec

_GATE = {
    "reduce_weight": "conv_reduce.weight",
    "reduce_bias": "conv_reduce.bias",
    "expand_weight": "conv_expand.weight",
    "expand_bias": "conv_expand.bias",
    "slimming_weight": "gate.0.weight",
}
_PARTS = {
    "depthwise.conv": "conv_dw",
    "depthwise.bn": "bn1",
    "gate": "gate",
    "pointwise.conv": "conv_pw",
    "pointwise.bn": "bn2",
}


_HARMLESS = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace|torch\.(Size|device|\w*Storage)"
    r"|torch\._utils\._rebuild_(tensor_v2|parameter)"
)


def from_official(path: str | Path, ema: bool = False) -> SlimNet:
    """Load the network of a released DS-MBNet checkpoint, in evaluation mode.

    The number of classes is taken from the classifier, and the number K of gate choices from the
    slimming head: the gate chooses among the first K widths, as in the release. With `ema`, the
    averaged weights are loaded.

    Raises:
        CheckpointError: if the file cannot be read, holds pickled objects other than tensors and
            a Namespace, lacks the requested weights, or is not a DS-MBNet.
    """
    state = read_official(path, ema=ema)
    try:
        num_classes = state["classifier.weight"].shape[0]
        choices = state["blocks.3.first_block.gate.gate.0.weight"].shape[0]
    except (KeyError, IndexError):
        raise CheckpointError(
            f"{path}: not a released DS-MBNet: it lacks classifier.weight or the slimming head "
            f"blocks.3.first_block.gate.gate.0.weight"
        ) from None
    spec = get_spec("ds_mbnet", num_classes=num_classes)
    if not 1 <= choices <= spec.num_widths:
        raise CheckpointError(
            f"{path}: its gate has {choices} choices, DS-MBNet has {spec.num_widths} widths"
        )
    net = SlimNet(spec.with_choices(range(choices))).eval()
    unread = set(state)

    def take(key: str, into: Tensor) -> None:
        if key not in state:
            raise CheckpointError(f"{path}: not a released DS-MBNet: it has no {key}")
        value = state[key]
        # the gates' 1x1 convolutions are linear layers here
        flat = value[..., 0, 0] if value.ndim == into.ndim + 2 else value
        if flat.shape != into.shape:
            got, needed = tuple(value.shape), tuple(into.shape)
            raise CheckpointError(f"{path}: {key} has shape {got}, DS-MBNet needs {needed}")
        into.copy_(flat)
        unread.discard(key)

    with torch.no_grad():
        for name, module in net.named_modules():
            released = _released_name(name)
            if name.endswith(".conv"):
                take(f"{released}.weight", net.tensor(f"{name}.weight"))
            elif isinstance(module, SlimBatchNorm2d):
                _take_batch_norm(take, f"{released}.aux_bn", module)
            elif isinstance(module, Gate):
                for ours, theirs in _GATE.items():
                    if (parameter := getattr(module, ours)) is not None:
                        take(f"{released}.{theirs}", parameter)
        take("classifier.weight", net.tensor("classifier.weight"))
        take("classifier.bias", net.tensor("classifier.bias"))
    if unread:
        raise CheckpointError(f"{path}: not a released DS-MBNet: unknown tensor {min(unread)}")
    return net


def import_official(path: str | Path, *, ema: bool = False) -> Checkpoint:
    """Like `from_official`, plus the preprocessing that the release uses for ImageNet at 224 px."""
    return Checkpoint(
        net=from_official(path, ema),
        preprocessing=Preprocessing(image_size_px=224, crop_fraction=0.875),
        recipe={"imported_from": Path(path).name, "weights": "ema" if ema else "live"},
    )


def read_official(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The state dict of a released checkpoint, its keys without the prefix `module.`."""
    source = Path(path)
    if not source.is_file():
        what = "is a folder, not a file" if source.is_dir() else "no such file"
        raise CheckpointError(f"{path}: {what}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickle protocols, which are refused anyway
            content: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception:  # the restricted loader raises many exception types for damaged files
        raise CheckpointError(f"{path}: {_refusal(source)}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    key = "state_dict_ema" if ema else "state_dict"
    state = content.get(key)
    if not isinstance(state, Mapping):
        found = ", ".join(map(str, content)) or "nothing"
        raise CheckpointError(f"{path}: has no {key} (it has: {found})")
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: {key} holds values that are not tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _refusal(source: Path) -> str:
    foreign = [name for name in _pickled_names(source) if not _HARMLESS.fullmatch(name)]
    if foreign:
        return f"refused: its pickle needs {foreign[0]}, and only tensors are read from it"
    return "not a readable torch checkpoint: truncated, damaged or of another format"


def _pickled_names(source: Path) -> list[str]:
    """Names that a file's pickle imports, found by reading its opcodes; nothing is executed.

    They are needed for the error message: the restricted loader does not always name what it
    refused.
    """
    names: list[str] = []
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                inner = [n for n in archive.namelist() if n.endswith("data.pkl")]
                content = archive.read(inner[0]) if inner else b""
        else:
            content = source.read_bytes()
        stream = io.BytesIO(content)
        while stream.tell() < len(content):  # older files hold several pickles in a row
            strings: list[str] = []
            memo: dict[int, str] = {}
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else ""
                elif opcode.name.endswith("PUT") and isinstance(argument, int):
                    memo[argument] = strings[-1] if strings else ""
                elif opcode.name.endswith("GET") and isinstance(argument, int):
                    strings.append(memo.get(argument, ""))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # damaged files raise many exception types; keep what was found
        return names
    return names


def _take_batch_norm(take: Callable[[str, Tensor], None], prefix: str, bn: SlimBatchNorm2d) -> None:
    channels = bn.slot_channels
    for slot, width in enumerate(channels):
        # the first slot of this width: in the release the teacher shares that of the last width
        key = f"{prefix}.{channels.index(width)}"
        take(f"{key}.running_mean", bn.running_mean[slot, :width])
        take(f"{key}.running_var", bn.running_var[slot, :width])
        take(f"{key}.num_batches_tracked", bn.num_batches_tracked[slot])
    last = f"{prefix}.{channels.index(channels[-1])}"
    take(f"{last}.weight", bn.weight)
    take(f"{last}.bias", bn.bias)


def _released_name(name: str) -> str:
    """A module's name in the release: stages.1.0.depthwise.bn -> blocks.0.first_block.bn1."""
    if name.startswith("stages.0."):
        return {"conv": "conv_stem", "bn": "bn1"}.get(name.rsplit(".", 1)[1], "")
    found = re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", name)
    if not found:
        return ""
    stage, block, part = int(found[1]), int(found[2]), found[3]
    where = f"residual_blocks.{block - 1}" if block else "first_block"
    return f"blocks.{stage - 1}.{where}.{_PARTS.get(part, '')}"
