"""Shared test helpers: networks whose gates choose varied routes, and small data on disk."""

import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dynaslim import Engine, cli
from dynaslim.checkpoint import Checkpoint
from dynaslim.cost import CostTable
from dynaslim.data.images import ImageDataset
from dynaslim.nn import SlimNet
from dynaslim.nn.gate import Gate
from dynaslim.nn.layers import SlimBatchNorm2d
from dynaslim.runtime.budget import BudgetCurve, BudgetPoint
from dynaslim.runtime.budget_search import fit_curve
from dynaslim.runtime.calibrate_budget import answer_paths
from dynaslim.runtime.router import Routed
from dynaslim.spec import GateSpec, NetSpec, Route, StageSpec
from dynaslim.zoo import ZOO

SHARED = Path(__file__).parents[2] / "shared"

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the folder ../shared with reference files is not here"
)

ZOO_NAMES = sorted(ZOO)


MIRROR = {"supernet": {"augment": {"mirror": True}}}
"""A recipe that allows mirror images."""

METRICS = {
    "images": 40,
    "routes": [
        {"widths": [4, 4, 6], "madds": 11786, "top1": 0.5},
        {"widths": [4, 12, 10], "madds": 16932, "top1": 0.625},
    ],
    "dynamic": {"mean_madds": 14000.4, "top1": 0.6},
}
"""Metrics of the micro network, as an evaluation stores them in a checkpoint."""


def micro_spec(**changes: object) -> NetSpec:
    """The micro network's spec: two gates, a separate teacher, few channels."""
    spec = NetSpec(
        "micro",
        (
            StageSpec((4, 6), block="conv", stride=2),
            StageSpec((4, 8, 12), gate=GateSpec((0, 2))),
            StageSpec((6, 8, 10), stride=2, gate=GateSpec((0, 1, 2))),
        ),
        num_classes=5,
        reduction=1.0,  # enough hidden features for `lively` to set the gates' directions
    )
    return spec.replace(**changes)


def lively(spec: NetSpec, seed: int = 0, image_size: int | None = None) -> SlimNet:
    """A network in evaluation mode with no default values, whose gates choose varied routes.

    BN statistics differ per width and are far from (0, 1). The slimming heads are set so that rows
    of noise spread over the choices (a freshly initialised gate treats all rows alike).
    """
    torch.manual_seed(seed)
    net = SlimNet(spec).eval()
    for module in net.modules():
        if isinstance(module, SlimBatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.weight, 0.7, 1.3)
        if isinstance(module, Gate):
            nn.init.normal_(module.expand_weight, std=0.3)
            nn.init.normal_(module.reduce_bias, std=0.3)
    x = noise(spec, 32, image_size=image_size, seed=seed + 1)
    gated = [m for m in net.modules() if isinstance(m, Gate) and m.slimming_weight is not None]
    for gate in gated:
        _spread(net, gate, x)
    return net


def _spread(net: SlimNet, gate: Gate, x: torch.Tensor) -> None:
    """Centre the gate's logits on the rows of x along several routes, so that choices vary."""
    seen = []
    handle = gate.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0]))
    with torch.no_grad():
        for index in net.spec.gates[0].choices:
            net(x, net.spec.routes[index])
        handle.remove()
        hidden = torch.stack([gate.hidden(features.mean((2, 3))) for features in seen])
        weight = gate.slimming_weight
        nn.init.normal_(weight)
        # orthogonal to the mean of each route, so that no choice wins on average along any route;
        # before the first gate all routes are the same
        _, sizes, directions = torch.linalg.svd(hidden.mean(1), full_matrices=False)
        means = directions[sizes > 1e-4 * sizes[0]].T
        assert hidden.shape[2] > means.shape[1], "too few hidden features: nothing would be left"
        weight -= weight @ means @ means.T
        weight *= 3 / (hidden @ weight.T).std()


def noise(
    spec: NetSpec, rows: int, *, image_size: int | None = None, seed: int = 0
) -> torch.Tensor:
    """Rows of noise that differ in level and roughness."""
    size = image_size or max(32, spec.total_stride)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, spec.in_channels, size, size, generator=generator)
    level = torch.randn(rows, spec.in_channels, 1, 1, generator=generator)
    return x * torch.rand(rows, 1, 1, 1, generator=generator) * 2 + level


@cache
def lively_net(name: str, most_blocks: int | None = None) -> SlimNet:
    """The micro network or a zoo entry with ten classes, made `lively`; shared, do not modify.

    With `most_blocks`, stages have that many blocks at most: as many kinds of blocks and variants,
    whose export takes less time.
    """
    spec = micro_spec() if name == "micro" else ZOO[name].replace(num_classes=10)
    if most_blocks is not None:
        stages = (replace(s, blocks=min(most_blocks, s.blocks)) for s in spec.stages)
        spec = spec.replace(stages=tuple(stages))
    return lively(spec)


def row_by_row(net: SlimNet, x: torch.Tensor, routes: list[Route]) -> torch.Tensor:
    """The network's answer for every row alone, along the row's route."""
    with torch.inference_mode():
        return torch.cat([net(x[b : b + 1], route) for b, route in enumerate(routes)])


def assert_rows_close(made: object, expected: object, tolerance: float = 2e-5) -> None:
    """Assert that logits are equal, to a tolerance relative to the largest of them."""
    made, expected = (torch.as_tensor(value) for value in (made, expected))
    assert made.shape == expected.shape
    assert made.dtype == torch.float32
    worst = ((made - expected).abs().amax(1) / expected.abs().max()).nan_to_num(torch.inf)
    assert worst.max() <= tolerance, f"rows {(worst > tolerance).nonzero().flatten().tolist()}"


@cache
def curved(name: str) -> tuple[Engine, torch.Tensor]:
    """An engine with a budget curve, and its calibration images; the widest route is right."""
    net = lively_net(name)
    x = noise(net.spec, 80)
    labels = Engine(net, backend="eager")(x, shift=-1e6).logits.argmax(1)
    curve = fit_curve(answer_paths(net, [(x, labels)]))
    return Engine(Checkpoint(net, recipe=MIRROR, budget=curve.to_dict()), backend="eager"), x


def forced(engine: Engine, x: torch.Tensor, options_BG: np.ndarray) -> Routed:
    """Run rows along the given options, whatever the gates choose."""
    images = engine.router.backend.arrays.images(x)
    return engine.router.routed(images, lambda gate, _, rows: options_BG[rows, gate], None)


def altered(*path: str | int, value: Any = None, left_out: bool = False) -> Callable[[Any], None]:
    """A function that sets or deletes the value at a path in nested data."""

    def alter(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if left_out:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return alter


def for_backends(*names: str) -> pytest.MarkDecorator:
    """Run a test for each of these backends; skip those whose library is not installed."""
    return pytest.mark.parametrize(
        "backend",
        [
            pytest.param(
                name,
                marks=pytest.mark.skipif(
                    name != "eager" and find_spec(name) is None, reason=f"{name} is not installed"
                ),
            )
            for name in names
        ],
    )


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    """Encode an image, or its pixels (height, width[, 3]), as a file."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int = 0, size: tuple[int, int] = (28, 28), mode: str = "L") -> bytes:
    """An encoded picture of noise."""
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return encoded(rng.integers(0, 256, shape, dtype=np.uint8))


def bright_pngs(count: int) -> list[bytes]:
    """Pictures of 16 px in four classes in turn; the brightness depends on the class."""
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 60, (16, 16, 3)) + n % 4 * 60 for n in range(count)]
    return [encoded(one.astype(np.uint8)) for one in pixels]


def write_levels(folder: Path, count: int, name: str = "level") -> None:
    """Write the pictures of `bright_pngs`, with a folder for each class."""
    for n, picture in enumerate(bright_pngs(count)):
        (folder / f"{name} {n % 4}").mkdir(parents=True, exist_ok=True)
        (folder / f"{name} {n % 4}" / f"{n:03}.png").write_bytes(picture)


def output_of(logits: np.ndarray, **known: np.ndarray) -> SimpleNamespace:
    """An engine's output for fakes: along one route unless given otherwise."""
    rows = len(logits)
    plain = {
        "routes": np.zeros((rows, 1), np.int64),
        "madds": np.ones(rows),
        "escalated": np.zeros(rows, bool),
        "mirrored": np.zeros(rows, bool),
    }
    return SimpleNamespace(logits=logits, **plain | known)


def run_ok(capsys, *argv: object) -> str:
    """Run a command line that must succeed; returns its standard output."""
    code = cli.run([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def fails(capsys, argv: Sequence[object], code: int, message: str, notes=False) -> None:
    """Assert that a command line prints only one line, with the message, on stderr.

    With `notes`, the message is a pattern, and other lines may precede it.
    """
    assert cli.run([str(a) for a in argv]) == code
    out, err = capsys.readouterr()
    if notes:
        assert re.search(message, err), err
        assert "Traceback" not in err
    else:
        assert message in err
        assert len(err.strip().splitlines()) == 1, err
        assert out == ""


def start_dynaslim(
    argv: list[str],
    threads: str = "1",
    run: Sequence[str] = ("-m", "dynaslim"),
    **options: object,
) -> subprocess.Popen[str]:
    """Start the command line in a separate process, which can be watched, signalled and killed."""
    return subprocess.Popen(
        [sys.executable, *run, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        **options,
    )


def run_python(script: str, *argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in a separate Python process; fails if it does."""
    command = [sys.executable, "-c", script, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done


def wait_for_steps(process: subprocess.Popen[str], metrics: Path, steps: int) -> None:
    """Wait until a training has written `steps` steps to its metrics file."""

    def there() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return metrics.exists() and metrics.read_text().count('"train"') >= steps

    until(there, 120)


def spawn_two(worker: Callable[..., None], *args: object, seconds: float = 120) -> None:
    """Run `worker(rank, *args)` in two processes; fails if they have not ended in time."""
    processes = torch.multiprocessing.spawn(_run_and_exit, (worker, *args), nprocs=2, join=False)
    deadline = time.monotonic() + seconds
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("the two processes did not end")


def _run_and_exit(rank: int, worker: Callable[..., None], *args: object) -> None:
    """Run a worker and exit at once: a gloo thread may abort a normal interpreter shutdown."""
    worker(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def at_once(count: int, run: Callable[[int], Any]) -> list[Any]:
    """The results of `run(n)` in `count` threads that start together."""
    barrier = threading.Barrier(count)

    def start(n: int) -> Any:
        barrier.wait(timeout=60)
        return run(n)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for a condition; fails if it does not hold in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.002)


def ready(client: Any, path: str = "/readyz") -> None:
    """Wait until a server is ready."""
    until(lambda: client.get(path).status_code == 200)


def form(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    """The files of a multipart request."""
    return [("images", (f"{n}.png", image)) for n, image in enumerate(images)]


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def write_parquet(
    folder: Path,
    images: Sequence[bytes | None],
    classes: int | Sequence[str] | None,
    split: str = "test",
    labels: Sequence[int | None] | None = None,
) -> Path:
    """Write a parquet file of images in the hub's format.

    `classes` is a number of classes or their names, or None for labels that are plain numbers.
    Without `labels`, images get the classes in turn.
    """
    names = [f"class {n}" for n in range(classes)] if isinstance(classes, int) else classes
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=list(names))
    rows = {
        "image": [image and {"bytes": image, "path": None} for image in images],
        "label": [n % len(names) for n in range(len(images))] if labels is None else labels,
    }
    features = datasets.Features({"image": datasets.Image(decode=True), "label": label})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def join(rank: int, port: int) -> None:
    """Become one of two processes of a gloo group."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    torch.set_num_threads(1)


def leave() -> None:
    """Leave the group together: leaving first would cut off the other's last message."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def ddp_worker(rank: int, port: int, folder: str) -> None:
    """Run one of two gloo processes: gradients of half a batch, averaged by DDP."""
    join(rank, port)
    spec = micro_spec()
    net = lively(spec)
    for parameter in net.slimming_parameters():
        parameter.requires_grad_(False)
    wrapped = nn.parallel.DistributedDataParallel(net)
    x = noise(spec, 8)[rank * 4 : rank * 4 + 4]  # in evaluation mode, BN treats rows independently
    for route in (spec.largest, spec.routes[0]):
        wrapped(x, route).square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in net.parameters()], f"{folder}/grads.pt")
    leave()


def toy_images(count=96, classes=5, seed=0):
    """Pictures whose brightness depends on the class; learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    level = (labels * 255 // classes)[:, None, None, None]
    noise_ = torch.randint(0, 40, (count, 3, 16, 16), generator=generator)
    return ImageDataset((level + noise_).to(torch.uint8), labels, tuple("abcde"[:classes]), "toy")


@contextmanager
def running(package, *flags, script="from dynaslim import cli; cli.main()", backend="onnxruntime"):
    """Start a server of one or several models and wait until ready; yields process and address."""
    models = map(str, package if isinstance(package, list) else [package])
    command = [sys.executable, "-c", script, "serve", *models, "--port", "0", *flags]
    process = subprocess.Popen(
        [*command, "--backend", backend, "--workers", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+(?=/ )", line)
        assert found, (line, process.stderr.read())
        yield process, found[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def forced_curve(spec: NetSpec, side: int) -> BudgetCurve:
    """Three points for a network of two gates, each sending all images along one path."""
    table = CostTable.from_madds(spec, side)

    def point(path: tuple[int, ...], shift: float, top1: float) -> BudgetPoint:
        madds = table.route_cost(path)
        share = madds / table.widest_cost
        return BudgetPoint(shift, None, None, madds, share, None, top1, 0.0)

    # shifts so large that all images take the path
    points = (point((0, 0), 1e6, 0.5), point((0, 1), 40.0, 0.6), point((1, 2), -1e6, 0.9))
    return BudgetCurve(
        image_size_px=side,
        images=100,
        widest_madds=table.widest_cost,
        widest_ms=None,
        widest_top1=0.9,
        cheapest_madds=points[0].madds,
        cheapest_ms=None,
        cheapest_top1=0.5,
        points=points,
        gate_points=points,
    )


# the number of texts on a page, and the lowest contrast between a text and its background (WCAG)
CONTRAST = """left_out => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
  const light = colour => {
    const [r, g, b] = colour.map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement)
      layers.unshift(rgba(getComputedStyle(e).backgroundColor));
    return layers.reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (!element.getClientRects().length) continue;
    if (element.closest(`title, style, noscript${left_out}`)) continue;
    const style = getComputedStyle(element);
    let below = behind(element);
    const share = element.closest("g.in");
    if (share) {  // on a bar of the same route
      const bar = share.closest("svg").querySelector(`.part.${share.classList[1]} path`);
      const fill = getComputedStyle(bar).fill;
      if (fill.startsWith("url")) continue;
      below = rgba(fill);
    }
    const colour = over(rgba(element.closest("svg") ? style.fill : style.color), below);
    found.push([ratio(colour, below), element.outerHTML.slice(0, 120)]);
  }
  return [found.length, ...found.sort((a, b) => a[0] - b[0])[0]];
}"""
