"""What arrives at each segment when images are routed: the features that a form sees.

A form's input has the statistics of the path that led to it. All paths would be too many, so every
image takes one path, drawn once and for all gates such that each choice gets its share of images:
the forms behind a width see all images, those of each width before it on parts of their own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynaslim.runtime.forms import AnyForm, Form, RouteForm
from dynaslim.runtime.network_forms import NetworkForms

ROWS: Final = 16
"""Images that are run at once: 9 MB at 224 px, and features of a few times that."""
KEPT_BYTES: Final = 256 * 2**20
"""Features that are kept for the next form; others are computed again."""


class Part(NamedTuple):
    """Images of a batch that leave a segment at the same width."""

    width: int
    """Its index."""
    rows: np.ndarray
    """Which of the batch."""
    features: Tensor


class ActivationSampler:
    """Float features of the segments of a network, for images (N, C, H, W), float32, on the CPU."""

    def __init__(self, forms: NetworkForms, images: Tensor) -> None:
        self._forms = forms
        self._images = images
        self._paths = [
            np.array(gate.choices)[
                np.random.default_rng(number).permutation(len(images)) % len(gate.choices)
            ]
            for number, gate in enumerate(forms.spec.gates)
        ]
        self._kept: OrderedDict[tuple[int, ...], list[Part]] = OrderedDict()
        self._bytes = 0

    def at(self, form: AnyForm) -> Iterator[np.ndarray]:
        """What a form takes, in batches (B, C, H, W): one row for every image."""
        for start in range(0, len(self._images), ROWS):
            if isinstance(form, RouteForm) or form.takes_images:
                yield self._images[start : start + ROWS].numpy()
            else:
                part = self._leaving(form.segment - 1, form.before, start)[0]
                yield part.features.cpu().numpy()

    def forget(self) -> None:
        """Let go of the features that were kept."""
        self._kept.clear()
        self._bytes = 0

    def _leaving(self, segment: int, width: int, start: int) -> list[Part]:
        """Features behind a segment at one width, of a batch that comes to it along its paths: one
        part, its rows in the order of those paths' widths.
        """

        def compute() -> list[Part]:
            rows = np.arange(len(self._images[start : start + ROWS]))
            if segment == 0:
                return [Part(0, rows, self._run(Form(0), self._images[start : start + ROWS]))]
            run = [
                self._run(Form(segment, part.width, width), part.features)
                for part in self._along_paths(segment - 1, start)
            ]
            return [Part(width, rows, torch.cat(run))]

        return self._once((segment, start, width), compute)

    def _along_paths(self, segment: int, start: int) -> list[Part]:
        """Features behind a segment, each image at the width that its path takes there."""
        if segment == 0:
            return self._leaving(0, 0, start)

        def compute() -> list[Part]:
            path = self._paths[segment - 1][start : start + ROWS]
            found: dict[int, list[Part]] = {}
            for before in self._along_paths(segment - 1, start):
                for width in np.unique(path[before.rows]).tolist():
                    mine = np.flatnonzero(path[before.rows] == width)
                    x = before.features[torch.from_numpy(mine).to(before.features.device)]
                    made = self._run(Form(segment, before.width, width), x)
                    found.setdefault(width, []).append(Part(width, before.rows[mine], made))
            return [
                Part(
                    width,
                    np.concatenate([part.rows for part in parts]),
                    torch.cat([part.features for part in parts]),
                )
                for width, parts in sorted(found.items())
            ]

        return self._once((segment, start), compute)

    @torch.inference_mode()
    def _run(self, form: Form, x: Tensor) -> Tensor:
        made = self._forms.module(form)(x.to(self._forms.device))
        features: Tensor = made[0] if isinstance(made, tuple) else made
        return features

    def _once(self, key: tuple[int, ...], compute: Callable[[], list[Part]]) -> list[Part]:
        """Features that are kept, or are from now on: those asked for least lately make room."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = compute()
        self._kept[key] = made
        self._bytes += _bytes(made)
        while self._bytes > KEPT_BYTES:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        return made


def _bytes(parts: list[Part]) -> int:
    return sum(part.features.nbytes for part in parts)
