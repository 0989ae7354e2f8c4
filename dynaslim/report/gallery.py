"""Pictures in a report: the images that a network found hardest and easiest, by route.

Pixels are those that the network sees; a picture is inside the page, as a data URI.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from PIL import Image

from dynaslim.data.images import ImageDataset
from dynaslim.evaluation import Evaluation
from dynaslim.report import text
from dynaslim.report.numbers import Details

EACH: Final = 6
"""Pictures in a row."""
_SIDE: Final = 128
"""Larger pictures are made smaller: they are shown at half of it or so."""


@dataclass(frozen=True)
class Shot:
    """One picture, and what the network said of it."""

    uri: str
    right: bool
    label: str
    answer: str
    confidence: str
    small: bool
    """Of few pixels, which are to be seen as they are."""
    alt: str


@dataclass(frozen=True)
class Strip:
    """Pictures that have something in common."""

    title: str
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class RouteGallery:
    """The hardest and the easiest images of a route."""

    route: int
    """Its number in `Evaluation.taken`."""
    strips: tuple[Strip, ...]


def make_gallery(
    evaluation: Evaluation,
    details: Details,
    images: ImageDataset,
    names: Sequence[str],
    routes: Sequence[int],
) -> tuple[tuple[RouteGallery, ...], Strip | None]:
    """Galleries of these routes (numbers in `Evaluation.taken`), and the most confident mistakes.

    A route with few images shows each once: the hardest first, then the easiest of those left.
    """
    margin_N = details.margin_N
    wanted: dict[int, tuple[list[int], list[int]]] = {}
    for route in routes:
        own = torch.nonzero(evaluation.taken_number == route).flatten()
        order = own[margin_N[own].argsort(stable=True)].tolist()
        hard = order[:EACH]
        wanted[route] = hard, order[len(hard) :][-EACH:][::-1]
    wrong = torch.nonzero(evaluation.predictions != evaluation.labels).flatten()
    mistakes = wrong[evaluation.confidence[wrong].argsort(descending=True, stable=True)]
    bold = mistakes[: 2 * EACH].tolist()

    needed = sorted(
        {place for pair in wanted.values() for part in pair for place in part} | {*bold}
    )
    shots = _shots(evaluation, images, names, needed)
    galleries = tuple(
        RouteGallery(
            route,
            tuple(
                Strip(title, tuple(shots[place] for place in places))
                for title, places in (("hardest", hard), ("easiest", easy))
                if places
            ),
        )
        for route, (hard, easy) in wanted.items()
    )
    strip = Strip("most confident mistakes", tuple(shots[place] for place in bold))
    return galleries, strip if bold else None


def _shots(
    evaluation: Evaluation, images: ImageDataset, names: Sequence[str], places: Sequence[int]
) -> dict[int, Shot]:
    """The pictures of some evaluated images by their place in the evaluation."""
    found: dict[int, Shot] = {}
    at = torch.tensor(places, dtype=torch.int64)
    batches = images.batches(64, evaluation.rows[at])
    pixels = itertools.chain.from_iterable(batch.numpy() for batch, _ in batches)
    for place, pixels_CSS in zip(places, pixels, strict=True):
        label = names[int(evaluation.labels[place])]
        answer = names[int(evaluation.predictions[place])]
        right = bool(evaluation.labels[place] == evaluation.predictions[place])
        found[place] = Shot(
            uri=data_uri(pixels_CSS),
            right=right,
            label=label,
            answer=answer,
            confidence=text.percent(float(evaluation.confidence[place]), 0),
            small=pixels_CSS.shape[-1] <= _SIDE // 2,
            alt=f"{label}, answered right" if right else f"{label}, taken for {answer}",
        )
    return found


def data_uri(pixels_CSS: np.ndarray) -> str:
    """uint8 pixels (1 or 3, S, S) as a data URI: PNG of small pictures, JPEG of others."""
    grey = pixels_CSS.shape[0] == 1
    picture = Image.fromarray(pixels_CSS[0] if grey else pixels_CSS.transpose(1, 2, 0))
    buffer = io.BytesIO()
    if max(picture.size) <= _SIDE // 2:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
