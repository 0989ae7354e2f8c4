"""A run's folder: recipe, environment, metrics, TensorBoard, snapshot, checkpoints, results.

Only the first of several processes writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from dynaslim._files import naming, write_atomic
from dynaslim.distributed import broadcast, rank, world_size
from dynaslim.errors import CheckpointError, UsageError
from dynaslim.runtime.cache import processor_name
from dynaslim.version import __version__

SNAPSHOT: Final = "snapshot.safetensors"
METRICS: Final = "metrics.jsonl"
TRAINED_ON: Final = "trained_on.txt"
"""File with the `digest` of every training image's file, one per line."""
_FORMAT: Final = "dynaslim-snapshot"
_VERSION: Final = 1
_FIXED: Final = {"model", "init", "optim.name", "objective", "targets", "choices", "supernet"}
"""Fields of a recipe that a resumed run cannot change."""


class RunFolder:
    """The folder of one run; use it as a context manager, so that its files are closed.

    Raises:
        UsageError: if the folder holds a run and `resume` is off, or a run of another stage or
            (without `force`) with another recipe, or if another process uses the folder.
        OSError: if it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        stage: str,
        recipe: Mapping[str, Any],
        *,
        resume: bool = False,
        force: bool = False,
    ) -> None:
        self.path = path
        self.stage = stage
        self.recipe = dict(recipe)
        self.is_main = rank() == 0
        self.state: dict[str, Any] | None = None
        """The state of the last snapshot, if the run is resumed."""
        self._board: Any = None
        self._lock = FileLock(path / ".lock", timeout=0)  # released even by a crash
        # the first process decides for all: on a shared disk the others may see files later
        problem = broadcast(self._prepare(resume, force) if self.is_main else None)
        if problem is not None:
            raise problem
        self.state = broadcast(self.state)

    def _prepare(self, resume: bool, force: bool) -> Exception | None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            return UsageError(
                f"{self.path}: another process trains in this folder; wait for it, or name another"
            )
        except OSError as error:
            return error
        try:
            # a run that failed before its first step has nothing to resume or to lose
            if self.file(SNAPSHOT).exists() or read_metrics(self.path):
                if not resume:
                    raise UsageError(
                        f"{self.path}: holds a run already; go on with it by --resume, or name "
                        f"another folder"
                    )
                if self.file(SNAPSHOT).exists():
                    self.state = self._read_state(force)
            self._write_start()
        except (UsageError, CheckpointError, OSError) as error:
            self._lock.release()
            return error
        return None

    def _read_state(self, force: bool) -> dict[str, Any]:
        found = read_snapshot(self.file(SNAPSHOT))
        if found["stage"] != self.stage:
            raise UsageError(
                f"{self.path}: holds a run of stage {found['stage']}, this is {self.stage}"
            )
        changed = _differences(found["recipe"], self.recipe, self.path.parent)
        fixed = [line for line in changed if line.split(" ", 1)[0] in _FIXED]
        if fixed:
            raise UsageError(
                f"{self.path}: {'; '.join(fixed)}; that makes another run: name another folder"
            )
        if changed and not force:
            raise UsageError(
                f"{self.path}: the recipe is not the one this run was started with: "
                f"{'; '.join(changed)}. Go on nevertheless with --force, or name another folder"
            )
        state: dict[str, Any] = found["state"]
        return state

    def _write_start(self) -> None:
        import yaml

        text = yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)
        write_atomic(self.file("recipe.yaml"), text.encode())
        seen = []
        if self.state is not None and self.file("environment.json").exists():
            seen = json.loads(self.file("environment.json").read_text())
        write_json(self.file("environment.json"), [*seen, environment()])
        kept = []
        if self.state is not None:
            # steps after the snapshot are repeated and logged again
            until = {"train": self.state["step"], "val": self.state.get("validated", 0)}
            lines = read_metrics(self.path)
            # the teacher is logged at step 0
            kept = [line for line in lines if line["step"] <= until.get(line["kind"], 0)]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomic(self.file(METRICS), text.encode())

    def file(self, name: str) -> Path:
        return self.path / name

    def __enter__(self) -> RunFolder:
        if self.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self._thread_hook = threading.excepthook
            threading.excepthook = self._on_thread_error
            step = None if self.state is None else self.state["step"] + 1
            self._board = SummaryWriter(str(self.file("tensorboard")), purge_step=step)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._board is not None:
            # the first failed write has been reported already
            with contextlib.suppress(OSError):
                self._board.close()
            threading.excepthook = self._thread_hook
        self._lock.release()

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """Do not print an OSError of TensorBoard's thread, which its next call raises."""
        if not isinstance(args.exc_value, OSError):
            self._thread_hook(args)

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add a line to the metrics file, and its numbers to TensorBoard."""
        if not self.is_main:
            return
        with naming(self.file(METRICS)), open(self.file(METRICS), "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)
            elif isinstance(value, list) and value and isinstance(value[0], int | float):
                for number, item in enumerate(value):
                    self._board.add_scalar(f"{kind}/{name}/{number}", item, step)

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Write a snapshot that the run can be resumed from."""
        if self.is_main:
            whole = {"stage": self.stage, "recipe": self.recipe, "state": state}
            save_snapshot(self.file(SNAPSHOT), whole)


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint of a run's best evaluation, or the last one of a run without evaluations."""
    best = folder / "best.safetensors"
    return best if best.exists() else folder / "last.safetensors"


def record_trained_on(folder: Path, digests: Iterable[str]) -> None:
    """Record in a folder which images its checkpoints were trained on."""
    write_atomic(folder / TRAINED_ON, "".join(f"{one}\n" for one in sorted(digests)).encode())


def trained_on(checkpoint: Path) -> frozenset[str]:
    """Digests of the images that the run of a checkpoint trained on; empty if not recorded."""
    try:
        return frozenset((checkpoint.parent / TRAINED_ON).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return frozenset()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file that have a kind and a step; none if it cannot be read."""
    try:
        content = (path / METRICS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for raw in content.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:  # such as a last line that a crash cut short
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and "kind" in line:
            lines.append(line)
    return lines


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def environment() -> dict[str, Any]:
    """Versions and hardware of the run."""
    cuda = torch.cuda.is_available()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "dynaslim": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        if cuda
        else [],
        "processes": world_size(),
    }


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], around: Path, prefix: str = ""
) -> list[str]:
    """The differences between two recipes, except files that moved along with the run."""
    found = []
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, around, f"{prefix}{key}.")
        elif old != new and not _moved(old, new, around):
            found.append(f"{prefix}{key} was {old!r}, is {new!r}")
    return found


def _moved(old: Any, new: Any, around: Path) -> bool:
    """Whether `new` is a file below the folder `around`, and `old` its path before a move."""
    if not (isinstance(old, str) and isinstance(new, str) and Path(new).is_relative_to(around)):
        return False
    inside = Path(new).relative_to(around).parts
    elsewhere = Path(old).parts[-len(inside) :] == inside
    return bool(inside) and elsewhere and Path(new).exists() and not Path(old).exists()


# -- snapshots ------------------------------------------------------------------------------------
# A snapshot is the whole training state (nested dicts, lists, plain values and tensors) in one
# safetensors file, without pickle: tensors have numbered names, the rest is JSON in the metadata.


def save_snapshot(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a state to a file atomically.

    Raises:
        CheckpointError: if a tensor has values that are not finite: no run could resume from them.
        OSError: if the file cannot be written; an older file of that name is unchanged.
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: not saved, tensor {name} has values that are not finite"
            )
    meta = {"format": _FORMAT, "version": _VERSION, "state": packed}
    write_atomic(path, safetensors.torch.save(tensors, {"dynaslim": json.dumps(meta)}))


def read_snapshot(path: str | Path) -> dict[str, Any]:
    """The state that `save_snapshot` wrote, on the CPU.

    Raises:
        CheckpointError: if the file is not a snapshot, is truncated, or has another version.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            meta = json.loads((file.metadata() or {}).get("dynaslim", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable snapshot ({error})") from None
    if meta.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not a snapshot of a training run")
    if meta.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: snapshot version {meta.get('version')}, this dynaslim reads {_VERSION}"
        )
    state: dict[str, Any] = _unpack(meta["state"], tensors)
    return state


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        # as pairs: an optimizer's keys are numbers, which JSON would make strings
        return {"items": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(item, tensors) for item in value]}
    return {"value": value}


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = packed.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "items":
            return {key: _unpack(item, tensors) for key, item in content}
        case "list":
            return [_unpack(item, tensors) for item in content]
    return content
