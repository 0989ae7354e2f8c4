"""Resolves the name of a model to a checkpoint, an exported package or an architecture.

    runs/x/last.safetensors     a checkpoint file
    runs/x                      the folder of a run, or of `save_pretrained`: the checkpoint in it
    hf://user/model@v1          a repository on the hub: its checkpoint, downloaded
    cifar10                     a network that ships with dynaslim (`dynaslim.shipped`)
    package                     the folder of an exported package
    imagenet                    a package that is made on first use (`MADE_ON_FIRST_USE`)
    ds_mbnet, net.yaml          an architecture of the zoo, or a spec file

A file or a package takes precedence over a shipped network of the same name; other folders, such as
one of images, do not. This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, NamedTuple

from dynaslim import shipped
from dynaslim.errors import CheckpointError, DynaslimError, HubError, first_line
from dynaslim.zoo import ZOO, get_spec, is_spec_file

Kind = Literal["checkpoint", "package", "architecture"]
KINDS: Final[tuple[Kind, ...]] = ("checkpoint", "package", "architecture")

WEIGHTS: Final = "model.safetensors"
"""The checkpoint in a folder of `save_pretrained`; the file name is the hub's convention."""
MANIFEST: Final = "manifest.json"
"""The file by which a folder is recognised as an exported package."""
_RUN_CHECKPOINTS: Final = ("last", "best", "last_live", "checkpoint")
"""Checkpoints of a run of stage I, in order of preference, and the demo's."""
MADE_ON_FIRST_USE: Final[dict[str, Callable[[], Path]]] = {}
"""Functions that make the packages of these names on first use; `dynaslim.cli` adds them."""
_ADDRESS: Final = re.compile(r"hf:/+(?P<name>[^@]+)(?:@(?P<revision>.+))?")


class Model(NamedTuple):
    """The model that a name refers to."""

    kind: Kind
    path: Path
    """The checkpoint file, the package's folder, or the architecture's name or spec file."""


def find_model(name: str | Path, kinds: tuple[Kind, ...] = KINDS) -> Model:
    """Find the model of a name among the given kinds; downloads from the hub if needed.

    For a run with several gates, the result is the checkpoint of the middle one.

    Raises:
        CheckpointError: if there is no such model.
        UsageError: for an unknown architecture.
        HubError: if the hub cannot be reached and its cache does not have the checkpoint.
    """
    text, path = str(name), Path(name)
    if "architecture" in kinds and (text in ZOO or is_spec_file(text)):
        return Model("architecture", path)
    if "package" in kinds and is_package(path):
        return Model("package", path)
    if "package" in kinds and text in MADE_ON_FIRST_USE and not path.exists():
        return Model("package", MADE_ON_FIRST_USE[text]())
    if text in shipped.names() and not path.is_file():
        return Model("checkpoint", shipped.path(text))
    if (address := _ADDRESS.fullmatch(text)) is not None:
        return Model("checkpoint", download(address["name"], revision=address["revision"]))
    inside = [path / WEIGHTS] if is_saved_folder(path) else run_checkpoints(path)
    if inside:
        return Model("checkpoint", inside[len(inside) // 2])
    if path.is_file():
        return Model("checkpoint", path)
    if "architecture" in kinds and not (path.exists() or path.suffix or len(path.parts) > 1):
        get_spec(text)  # raises an error that lists the architectures
    what = "is a folder without a checkpoint" if path.is_dir() else "no such file"
    expected = ["a checkpoint (.safetensors)", "the folder of a run"]
    expected += ["an exported package"] * ("package" in kinds)
    expected += ["an architecture (see dynaslim models)"] * ("architecture" in kinds)
    if shipped.names():
        expected.append(f"the name of a model that ships ({', '.join(shipped.names())})")
    listed = f"{', '.join(expected[:-1])}, or {expected[-1]}"
    raise CheckpointError(f"{path}: {what}; expected {listed}")


def checkpoint_file(name: str | Path) -> Path:
    """The checkpoint file of a name; raises the errors of `find_model`."""
    return find_model(name, ("checkpoint",)).path


def run_or_checkpoint(name: str | Path) -> Path:
    """The path itself if it is the folder of a run, else the checkpoint file of the name.

    Raises:
        CheckpointError, HubError: as in `find_model`.
    """
    path = Path(name)
    is_folder = path.is_dir() and not is_saved_folder(path)
    return path if is_folder and str(name) not in shipped.names() else checkpoint_file(name)


def is_package(path: str | Path) -> bool:
    """Whether the path is a folder with a package's manifest, valid or not."""
    return (Path(path) / MANIFEST).is_file()


def is_saved_folder(path: str | Path) -> bool:
    """Whether a path is a folder that `save_pretrained` wrote."""
    return (Path(path) / WEIGHTS).is_file()


def is_hub_address(path: str | Path) -> bool:
    """Whether a path is a hub address such as hf://user/model or hf://user/model@v1."""
    return _ADDRESS.fullmatch(str(path)) is not None  # a `Path` collapses the two slashes to one


def run_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run's folder: those of all gates, or else the one of its network.

    Gates are in the order of their targets. The list is empty for any other folder.
    """
    gates = sorted(Path(folder).glob("gate*.safetensors"))
    others = (Path(folder) / f"{name}.safetensors" for name in _RUN_CHECKPOINTS)
    return gates or [file for file in others if file.is_file()][:1]


# -- the hub --------------------------------------------------------------------------------------


def download(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Download the checkpoint of a repository such as "user/model" to the hub's cache.

    Raises:
        HubError: if it is neither in the cache nor available from the hub.
    """
    with plain_hub_errors(name):
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(
            name,
            WEIGHTS,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return Path(file)


@contextmanager
def plain_hub_errors(name: str) -> Iterator[None]:
    """Turn errors of the hub's library into a `HubError` with a message of one line."""
    from huggingface_hub import errors

    try:
        yield
    except DynaslimError:
        raise
    except Exception as error:
        # the first match wins: some of these classes are subclasses of others
        reasons = {
            errors.HFValidationError: "not a name on the hub, give one such as user/model",
            errors.GatedRepoError: "access must be granted on its page first, see hf auth",
            errors.RepositoryNotFoundError: "not on the hub, or private: log in (hf auth login) "
            "or give a token",
            errors.RevisionNotFoundError: "has no such revision",
            (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled): "the hub is not reached "
            "(offline?), and no folder or cache has it",
            errors.EntryNotFoundError: f"has no {WEIGHTS}: no network of dynaslim",
            errors.HfHubHTTPError: f"the hub says: {first_line(error)}",
            errors.LocalTokenNotFoundError: "log in first (hf auth login) or give a token",
        }
        for kinds, reason in reasons.items():
            if isinstance(error, kinds):
                raise HubError(f"{name}: {reason}") from None
        # the HTTP library below huggingface_hub depends on its version, and so do the errors
        if type(error).__module__.partition(".")[0] not in ("httpx", "requests"):
            raise
        raise HubError(f"{name}: the hub is not reached: {first_line(error)}") from None
