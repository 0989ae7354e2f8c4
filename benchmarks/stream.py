"""Savings and errors of `predict --stream --same-frame` on a synthetic sequence (docs/predict.md).

    python benchmarks/stream.py --data cifar10/test.parquet --json benchmarks/results/stream.json

The sequence shows each photograph for 40 frames, filmed by a simulated camera that drifts and zooms
slowly, flickers a little and has noise; a frame is a JPEG of 96 px. Every threshold gets the same
frames. Takes three minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from dynaslim.bench.timing import hardware
from dynaslim.predict import open_engine
from dynaslim.predict_stream import Stream, StreamOptions, StreamRow, Waiting, start_reader

SIDE = 96
THRESHOLDS = (None, 4.0, 8.0, 16.0, 32.0)


def sequence(data: Path, scenes: int, frames: int, speed: float) -> Iterator[tuple[bytes, int]]:
    """Yield JPEGs and their labels; `speed` is that of the camera, in frame pixels per frame."""
    rows = datasets.Dataset.from_parquet(str(data), cache_dir=None).shuffle(seed=0)
    column = next(n for n, f in rows.features.items() if isinstance(f, datasets.Image))
    label = next(n for n, f in rows.features.items() if isinstance(f, datasets.ClassLabel))
    rng = np.random.default_rng(0)
    for row in rows.select(range(scenes)):
        picture = row[column].convert("RGB")
        width, height = picture.size
        side = min(width, height)
        angle = rng.uniform(0, 2 * np.pi)
        for number in range(frames):
            away = speed * number * side / SIDE
            room = side * (0.92 - 0.0005 * number)  # the camera's field of view
            left = np.clip((width - room) / 2 + away * np.cos(angle), 0, width - room)
            top = np.clip((height - room) / 2 + away * np.sin(angle), 0, height - room)
            box = (left, top, left + room, top + room)
            seen = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
            light = rng.normal(0, 1)
            noisy = np.asarray(seen, np.float32) + light + rng.normal(0, 3, (SIDE, SIDE, 1))
            buffer = io.BytesIO()
            pixels = noisy.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
            yield buffer.getvalue(), row[label]


def answers(engine: Any, frames: list[bytes], same_frame: float | None) -> list[StreamRow]:
    waiting = Waiting()
    start_reader(lambda: all(map(waiting.put, frames)) or None, waiting)
    rows = Stream(engine, StreamOptions(same_frame=same_frame)).answers(waiting)
    return [row for row in rows if isinstance(row, StreamRow)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="photographs, a parquet file")
    parser.add_argument("--model", default="cifar10")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    engine = open_engine(options.model, batch_size=1)
    runs: list[dict[str, Any]] = []
    for speed in (0.0, 0.1, 0.5):
        frames, labels = zip(
            *sequence(options.data, options.scenes, options.frames, speed), strict=True
        )
        every: list[StreamRow] = []
        inside = np.arange(1, len(frames)) % options.frames > 0  # pairs of the same scene
        for threshold in THRESHOLDS:
            rows = answers(engine, list(frames), threshold)
            every = every or rows
            kept = np.array([row.same for row in rows])
            classes = np.array([row.prediction.label for row in rows])
            first = np.array([row.prediction.label for row in every])
            runs.append(
                {
                    "pixels_per_frame": speed,
                    "threshold": threshold,
                    "kept": float(kept.mean()),
                    "agreement": float((classes == first).mean()),
                    # how often neighbouring frames agree if every frame runs
                    "neighbours_agree": float((first[1:] == first[:-1])[inside].mean()),
                    "top1": float((classes == np.array(labels)).mean()),
                }
            )
            print(json.dumps(runs[-1]), flush=True)
    result = {
        "model": options.model,
        "scenes": options.scenes,
        "frames_of_a_scene": options.frames,
        "hardware": hardware(),
        "runs": runs,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
