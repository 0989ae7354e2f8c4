"""Networks on the hub: a repository is a folder of checkpoint, `config.json` and model card.

What `Checkpoint` and `SlimNet` offer by `dynaslim.pretrained`. The hub's own mixin moves the files;
ours says what they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.repocard import ModelCard
from huggingface_hub.repocard_data import EvalResult, ModelCardData

from dynaslim._files import write_atomic
from dynaslim.checkpoint import Checkpoint, read
from dynaslim.checkpoint import save as save_checkpoint
from dynaslim.errors import DynaslimError, UsageError
from dynaslim.interop.card import card_text, dataset_of, measured
from dynaslim.nn.net import SlimNet
from dynaslim.pretrained import WEIGHTS
from dynaslim.version import __version__

TAGS: Final = ["dynaslim", "dynamic-slimmable-network", "slimmable", "pytorch"]
TASK: Final = "image-classification"
CONFIG: Final = "config.json"
_NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HubError(DynaslimError):
    """The hub cannot be reached, or has not what is asked for, or does not allow it."""


def save(
    model: Checkpoint | SlimNet,
    folder: str | Path,
    *,
    license: str | None = None,
    dataset: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """As `Pretrained.save_pretrained`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; name a folder to write")
    hub_model = HubModel(_checkpoint(model, about))
    card = {"repo": folder.resolve().name, "license": license, "dataset": dataset}
    hub_model.save_pretrained(folder, model_card_kwargs=card)
    return folder


def push(
    model: Checkpoint | SlimNet,
    repo: str,
    *,
    about: Mapping[str, Any] | None = None,
    license: str | None = None,
    dataset: str | None = None,
    message: str,
    **options: Any,
) -> str:
    """As `Pretrained.push_to_hub`; options are those of the hub's mixin."""
    hub_model = HubModel(_checkpoint(model, about))
    with TemporaryDirectory() as folder:
        # a network that cannot be saved leaves no empty repository behind
        save_checkpoint(Path(folder) / WEIGHTS, hub_model.checkpoint)
    card = {"repo": repo, "license": license, "dataset": dataset}
    with _plain_errors(repo):
        commit = hub_model.push_to_hub(
            repo, commit_message=message, model_card_kwargs=card, **options
        )
    return str(commit)


def load(
    kind: type[Checkpoint] | type[SlimNet],
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Checkpoint | SlimNet:
    """As `Pretrained.from_pretrained`; options are those of the hub's mixin."""
    if Path(name).is_file():
        checkpoint = read(name, device=device)
        return checkpoint if issubclass(kind, Checkpoint) else checkpoint.net
    if Path(name).is_dir() and not (Path(name) / WEIGHTS).is_file():
        raise HubError(f"{name}: holds no {WEIGHTS}, which save_pretrained writes")
    if not Path(name).exists() and not _NAME.fullmatch(str(name)):
        raise HubError(f"{name}: no such folder, and no name on the hub such as user/model")
    with _plain_errors(str(name)):
        model: HubModel = HubModel.from_pretrained(name, device=device, **options)
    return model.checkpoint if issubclass(kind, Checkpoint) else model.checkpoint.net


def download(name: str, revision: str | None = None) -> Path:
    """The checkpoint of a repository, in the hub's cache.

    Raises:
        HubError: as `load`.
    """
    with _plain_errors(name):
        return Path(hf_hub_download(name, WEIGHTS, revision=revision))


def _checkpoint(model: Checkpoint | SlimNet, about: Mapping[str, Any] | None) -> Checkpoint:
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(model)
    try:
        return replace(checkpoint, **about) if about else checkpoint
    except TypeError as error:  # a field that there is not
        raise UsageError(f"not a field of a checkpoint: {error}") from None


class HubModel(  # type: ignore[call-arg]  # mypy does not follow the hub's library
    ModelHubMixin,  # type: ignore[misc]
    library_name="dynaslim",
    pipeline_tag=TASK,
    tags=TAGS,
    paper_url="https://arxiv.org/abs/2103.13258",
):
    """A checkpoint as the hub's mixin wants its models."""

    # set, or the mixin would copy the arguments of every instance into a configuration of its own
    _hub_mixin_config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def _save_pretrained(self, save_directory: Path) -> None:
        save_checkpoint(save_directory / WEIGHTS, self.checkpoint)
        content = json.dumps(_config(self.checkpoint), indent=2, allow_nan=False) + "\n"
        write_atomic(save_directory / CONFIG, content.encode())

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, device: torch.device | str = "cpu", **options: Any
    ) -> HubModel:
        folder = Path(model_id)
        if folder.is_dir():
            return cls(read(folder / WEIGHTS, device=device))
        return cls(read(hf_hub_download(model_id, WEIGHTS, **options), device=device))

    def generate_model_card(
        self, *, repo: str, license: str | None = None, dataset: str | None = None
    ) -> Any:
        """The card, with what the hub wants to know above it."""
        data = self._card_data(license, dataset)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(self.checkpoint, repo=repo)}")

    def _card_data(self, license: str | None, dataset: str | None) -> Any:
        checkpoint = self.checkpoint
        name = dataset or dataset_of(checkpoint.recipe)
        results = [
            EvalResult(
                task_type=TASK,
                dataset_type=name or "unknown",
                dataset_name=name or "unknown",
                dataset_split="validation" if result.split == "held-out" else result.split,
                metric_type=kind,
                metric_name=label,
                metric_value=value,
            )
            for result in measured(checkpoint.metrics)
            for kind, label, value in _metrics(result)
        ]
        return ModelCardData(
            model_name=checkpoint.net.spec.name,
            library_name="dynaslim",
            pipeline_tag=TASK,
            tags=self._hub_mixin_info.model_card_data.tags,
            license=license,
            datasets=[dataset] if dataset else None,
            eval_results=results or None,
        )


def _metrics(result: Any) -> Iterator[tuple[str, str, float]]:
    """Kind, name and value of what was measured: the dynamic mode first."""
    if result.dynamic is not None:
        cost, top1 = result.dynamic
        yield "accuracy", "top-1, dynamic", round(top1, 6)
        yield "madds", "multiply-adds per image, dynamic", round(cost)
    for route, cost, top1 in result.routes:
        yield "accuracy", f"top-1, route {route}", round(top1, 6)
        yield "madds", f"multiply-adds, route {route}", round(cost)


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What other tools may want to know without reading the checkpoint; it is not read back."""
    spec, pre, names = checkpoint.net.spec, checkpoint.preprocessing, checkpoint.class_names
    return {
        "library_name": "dynaslim",
        "dynaslim_version": __version__,
        "weights": WEIGHTS,
        "architecture": spec.name,
        "num_classes": spec.num_classes,
        "id2label": None if names is None else {str(n): name for n, name in enumerate(names)},
        "preprocessing": None if pre is None else pre.to_dict(),
        "spec": spec.to_dict(),
    }


@contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    """The hub's errors as one line that says what would be right."""
    try:
        yield
    except DynaslimError:
        raise
    except HFValidationError:
        raise HubError(f"{name}: not a name on the hub, give one such as user/model") from None
    except GatedRepoError:
        raise HubError(f"{name}: access must be granted on its page first, see hf auth") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{name}: not on the hub, or private: log in (hf auth login) or give a token"
        ) from None
    except RevisionNotFoundError:
        raise HubError(f"{name}: has no such revision") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise HubError(
            f"{name}: the hub is not reached (offline?), and no folder or cache has it"
        ) from None
    except EntryNotFoundError:
        raise HubError(f"{name}: has no {WEIGHTS}: no network of dynaslim") from None
    except HfHubHTTPError as error:
        raise HubError(f"{name}: the hub says: {_first_line(error)}") from None
    except LocalTokenNotFoundError:
        raise HubError(f"{name}: log in first (hf auth login) or give a token") from None
    except json.JSONDecodeError as error:
        raise HubError(f"{name}: its {CONFIG} is not JSON: {error}") from None
    except Exception as error:
        # the library that the hub's speaks HTTP with is another by its version, and so its errors
        if type(error).__module__.partition(".")[0] not in ("httpx", "requests"):
            raise
        raise HubError(f"{name}: the hub is not reached: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
