"""A network's answers along every route for every image, computed once and stored in a file.

Suffixes: N images, B rows of a batch, R routes, C classes, F features.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynaslim._files import write_atomic
from dynaslim.checkpoint import Checkpoint
from dynaslim.cost import CostTable
from dynaslim.data import ImageDataset, load_images, open_source
from dynaslim.data.images import holdout
from dynaslim.data.transforms import readable_batches
from dynaslim.errors import UsageError
from dynaslim.nn.net import SlimNet
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.calibrate_budget import PathAnswers
from dynaslim.runtime.escalation import averaged, margins
from dynaslim.runtime.opinion_pool import OpinionPool
from dynaslim.spec import NetSpec
from results.plan import static_spec


@dataclass(frozen=True)
class Table:
    """The answers of one network on one set of images. The network has one gate; a single route
    counts as a network whose gate has one choice.

    `costs_R` and `trunk` are multiply-adds; `trunk` includes the gate behind it.
    """

    spec: NetSpec
    image_size_px: int
    logits_NRC: npt.NDArray[np.float32]
    labels_N: npt.NDArray[np.int64]
    gate_logits_NR: npt.NDArray[np.float32]
    """Outputs of the checkpoint's slimming head."""
    hidden_NF: npt.NDArray[np.float32]
    """Inputs of the slimming head."""
    mean_NF: npt.NDArray[np.float32]
    """Means of the trunk's output channels over the pixels."""
    deviation_NF: npt.NDArray[np.float32]
    """Standard deviations of the trunk's output channels over the pixels."""
    mirrored_NC: npt.NDArray[np.float32] | None = None
    """Logits of the widest route for the mirror images; None if mirror images may be of other
    classes, and in tables of earlier versions."""

    @cached_property
    def correct_NR(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.logits_NRC.argmax(2) == self.labels_N[:, None])

    @cached_property
    def top1_R(self) -> list[float]:
        return [float(v) for v in self.correct_NR.mean(0)]

    @cached_property
    def losses_NR(self) -> npt.NDArray[np.float64]:
        """Cross-entropy in nats."""
        scaled = self.logits_NRC.astype(np.float64)
        scaled -= scaled.max(2, keepdims=True)
        own = np.take_along_axis(scaled, self.labels_N[:, None, None], 2)[..., 0]
        return np.asarray(np.log(np.exp(scaled).sum(2)) - own, np.float64)

    @cached_property
    def costs_R(self) -> list[float]:
        """Multiply-adds of every route, cheapest first."""
        table = CostTable.from_madds(self.spec, self.image_size_px)
        return [table.route_cost((k,)) for k in range(len(self.spec.gates[0].choices))]

    @cached_property
    def trunk(self) -> float:
        """Multiply-adds that are not spent again when an image escalates."""
        return float(CostTable.from_madds(self.spec, self.image_size_px).segments[0][0][0])

    @cached_property
    def margins_NR(self) -> npt.NDArray[np.float32]:
        """The margin of every route's answer."""
        shape = self.logits_NRC.shape
        found: npt.NDArray[np.float32] = margins(self.logits_NRC.reshape(-1, shape[2]))
        return found.reshape(shape[:2])

    def route(self, k: int) -> Table:
        """The table of one route, as if it were a separate network."""
        stages = static_spec(self.spec, k)
        one = self.logits_NRC[:, k : k + 1]
        return replace(self, spec=stages, logits_NRC=one, mirrored_NC=None)

    @property
    def seen_once(self) -> Table:
        return replace(self, mirrored_NC=None)

    def with_head(self, weight_RF: npt.NDArray[np.float32]) -> Table:
        return replace(self, gate_logits_NR=self.hidden_NF @ weight_RF.T)

    @cached_property
    def paths(self) -> PathAnswers:
        """The same answers in the form that the runtime's budget search takes."""
        opinions_NAC = self.logits_NRC
        if self.mirrored_NC is not None:
            second_look_NC = averaged(self.logits_NRC[:, -1], self.mirrored_NC)
            opinions_NAC = np.concatenate([self.logits_NRC, second_look_NC[:, None]], 1)
        classes_NA = opinions_NAC.argmax(2)
        pool = OpinionPool()
        pool.add(classes_NA, opinions_NAC.swapaxes(0, 1), self.labels_N)
        right_NA, expected_NA = classes_NA == self.labels_N[:, None], pool.probabilities()
        routes = len(self.costs_R)
        return PathAnswers(
            self.spec,
            self.image_size_px,
            (self.gate_logits_NR[None],),
            self.correct_NR,
            self.margins_NR,
            expected_NA[:, :routes],
            None if self.mirrored_NC is None else right_NA[:, routes],
            None if self.mirrored_NC is None else expected_NA[:, routes],
        )

    def rows(self, rows: npt.NDArray[Any]) -> Table:
        return replace(self, **{name: array[rows] for name, array in self._arrays().items()})

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        found = {name: getattr(self, name) for name in (*_ARRAYS, "mirrored_NC")}
        return {name: array for name, array in found.items() if array is not None}

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        about = json.dumps({"spec": self.spec.to_dict(), "image_size_px": self.image_size_px})
        arrays: dict[str, Any] = self._arrays()
        np.savez(buffer, about=np.array(about), **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> Table:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            names = (*_ARRAYS, *(("mirrored_NC",) if "mirrored_NC" in file else ()))
            arrays = {name: file[name] for name in names}
        return cls(NetSpec.from_dict(about["spec"]), about["image_size_px"], **arrays)


_ARRAYS = ("logits_NRC", "labels_N", "gate_logits_NR", "hidden_NF", "mean_NF", "deviation_NF")


@torch.inference_mode()
def answer(checkpoint: Checkpoint, images: ImageDataset, batch_size: int = 250) -> Table:
    """Run a network along all its uniform routes, and along the widest on mirror images.

    The trunk runs once for all routes.

    Raises:
        UsageError: for a network of several gates, or a checkpoint without preprocessing.
    """
    net, spec, pre = checkpoint.net.eval(), checkpoint.net.spec, checkpoint.preprocessing
    if len(spec.gates) != 1 or pre is None or not isinstance(net, SlimNet):
        raise UsageError(f"{spec.name}: a table needs one gate, and how images are prepared")
    names = (*_ARRAYS, *(("mirrored_NC",) if checkpoint.mirror else ()))
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    for x, labels in readable_batches(images, pre, batch_size):
        before, gate = net.run_segment(0, x, 0, 0).out, net.gate(0)
        mean_BC = before.mean((2, 3))
        scaled, gate_logits = gate(before, decide=True)
        assert gate_logits is not None
        tails = [net.segment(1, scaled, k).features for k in spec.gates[0].choices]
        values = {
            "logits_NRC": torch.stack(tails, 1),
            "labels_N": labels,
            "gate_logits_NR": gate_logits,
            "hidden_NF": gate.hidden(mean_BC),
            "mean_NF": mean_BC,
            "deviation_NF": before.std((2, 3), correction=0),
        }
        if checkpoint.mirror:
            values["mirrored_NC"] = net(x.flip(3), spec.widest_choice)
        for name, value in values.items():
            parts[name].append(value.numpy())
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return Table(spec, pre.image_size_px, **joined)


def images_of(data: str, split: str, pre: Preprocessing, val_share: float = 0.1) -> ImageDataset:
    """Load a split: `train` (without held-out images), `held_out` (of train), or `test`."""
    source = open_source(data, "test" if split == "test" else "train")
    everything = load_images(source, pre)
    if split == "test":
        return everything
    train, held = holdout(everything.labels_N, val_share)
    return everything.subset(held if split == "held_out" else train)
