"""One stage-I step against its ideal and against the straightforward way.

    python benchmarks/train_step.py --json benchmarks/results/train_step.json

The arms run in turn within one process on the same batch and routes, each with tensors in torch's
default memory format and in channels_last:

- ours: `supernet_step`, with the optimizer and the averaged network;
- ideal: plain torch networks of each width, forward and backward, and the teacher's forward passes;
- naive: sliced weights, separate passes, and a loop over the state to update the averaged network.

Ratios are for our step in channels_last, the recipes' default: against the faster of the two
ideals, and against the naive way in the default format, as one would write it (and, beside it, in
channels_last). `ideal` has no optimizer and no averaged network. The naive way does not reduce
gradients in its four passes, which would cost nothing in one process, and runs the teacher once for
each of its three predictions. Memory is the peak of a step's tensors, including all that lives
between steps, and the resident memory of the process, which includes malloc's fragmentation; three
processes each, sorted.

`--converted` compares the same MobileNet from the zoo and converted from plain torch instead: their
training steps, and batches in the engine along the narrowest and the widest route, in CPU seconds
of one thread, so that other load on the machine matters less.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import plain_network
from torch import Tensor, autograd, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from dynaslim.conversion import convert
from dynaslim.cost import madds
from dynaslim.nn import SlimNet
from dynaslim.runs.folder import environment
from dynaslim.runtime.engine import Engine
from dynaslim.spec import GateSpec, Route
from dynaslim.train.step import Sandwich, parameter_groups, sandwich_routes, supernet_step
from dynaslim.train.teacher import make_teacher
from dynaslim.zoo import get_spec

Arm = Callable[[Sandwich, int], None]


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(net.parameters(), 1e-4)
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def ours(net: SlimNet, x: Tensor, labels: Tensor) -> Arm:
    """The package's step."""
    teacher, optimizer = make_teacher(net, 0.997), sgd(net)

    def run(routes: Sandwich, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        supernet_step(
            net,
            teacher,
            optimizer,
            x,
            labels,
            routes,
            label_smoothing=0.1,
            dropout=0.2,
            generator=generator,
            step=step,
        )

    return run


def ideal(net: SlimNet, x: Tensor, labels: Tensor) -> Arm:
    """Plain networks of the same widths: forward and backward passes only."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    built: dict[Route, nn.Module] = {}
    for route in dict.fromkeys((*net.spec.routes, net.spec.largest)):
        built[route] = plain_network(net.spec, route).to(memory_format=layout)  # type: ignore[call-overload]
        # a network's first pass is slower, so it runs here, untimed
        autograd.backward(F.cross_entropy(built[route](x), labels))

    def plain(route: Route) -> nn.Module:
        return built[route]

    def run(routes: Sandwich, step: int) -> None:
        for network in built.values():
            network.zero_grad()
        with torch.no_grad():
            targets = [
                plain(route).eval()(x).softmax(1) for route in (routes.largest, *routes.randoms)
            ]
        mean = torch.stack(targets).mean(0)
        goals = [labels, *[targets[0]] * len(routes.randoms), mean]
        assert routes.smallest is not None
        for route, goal in zip(
            (routes.largest, *routes.randoms, routes.smallest), goals, strict=True
        ):
            autograd.backward(F.cross_entropy(plain(route).train()(x), goal))

    return run


def naive(net: SlimNet, x: Tensor, labels: Tensor) -> Arm:
    """The method in its straightforward implementation."""
    optimizer = sgd(net)
    averaged = copy.deepcopy(net).eval()

    def run(routes: Sandwich, step: int) -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            targets = [averaged(x, route).softmax(1) for route in (routes.largest, *routes.randoms)]
        mean = torch.stack(targets).mean(0)
        goals = [labels, *[targets[0]] * len(routes.randoms), mean]
        for route, goal in zip(
            (routes.largest, *routes.randoms, routes.smallest), goals, strict=True
        ):
            loss = F.cross_entropy(net(x, route), goal)
            autograd.backward(loss)
            loss.item()
        optimizer.step()
        with torch.no_grad():
            current = net.state_dict()
            for name, value in averaged.state_dict().items():
                if value.is_floating_point():
                    value.copy_(0.997 * value + 0.003 * current[name])

    return run


def largest_alone(net: SlimNet, x: Tensor, labels: Tensor) -> Arm:
    """A plain training step of the largest network, the reference for memory."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    plain = plain_network(net.spec, net.spec.largest).to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = sgd(plain)

    def run(routes: Sandwich, step: int) -> None:
        optimizer.zero_grad()
        autograd.backward(F.cross_entropy(plain(x), labels))
        optimizer.step()

    return run


ARMS = {"ours": ours, "ideal": ideal, "naive": naive, "largest_alone": largest_alone}


def make(options: argparse.Namespace) -> tuple[SlimNet, Tensor, Tensor]:
    torch.manual_seed(0)
    net = SlimNet(get_spec(options.model)).train()
    size = options.image_size
    x = torch.randn(options.batch_size, net.spec.in_channels, size, size)
    if options.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, net.spec.num_classes, (options.batch_size,))
    return net, x, labels


def measure_time(options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds: each arm once per round, on the same routes."""
    arms: dict[str, Arm] = {}
    for kind in ("ours", "ideal", "naive"):
        for layout in ("", "_channels_last"):
            options.channels_last = bool(layout)
            arms[kind + layout] = ARMS[kind](*make(options))
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    spec = get_spec(options.model)
    for step in range(options.warm_up + options.rounds):
        routes = sandwich_routes(spec, random.Random(step))
        # each round starts with another arm, so that no arm always runs first or last
        at = step % len(names)
        for name in names[at:] + names[:at]:
            start = time.perf_counter()
            arms[name](routes, step)
            spent = time.perf_counter() - start
            if step >= options.warm_up:
                times[name].append(spent)
    ideals = min(times["ideal"], times["ideal_channels_last"], key=statistics.median)
    ours = times["ours_channels_last"]

    def ratio(above: list[float], below: list[float]) -> dict[str, float]:
        return spread([a / b for a, b in zip(above, below, strict=True)])

    return {
        **{f"{name}_ms": spread([t * 1e3 for t in values]) for name, values in times.items()},
        "ours_over_ideal": ratio(ours, ideals),
        "naive_over_ours": ratio(times["naive"], ours),
        "naive_channels_last_over_ours": ratio(times["naive_channels_last"], ours),
        "naive_over_ours_both_default_format": ratio(times["naive"], times["ours"]),
    }


def same_network(model: str) -> tuple[SlimNet, SlimNet]:
    """A network of one gate and four widths: from the zoo, and converted from plain torch."""
    wide = get_spec(model)
    behind = wide.gated_stages[0]
    stages = tuple(
        replace(
            stage,
            widths=tuple(stage.widths[-1] * quarter // 4 for quarter in (1, 2, 3, 4))
            if number >= behind
            else stage.widths[-1:],
            gate=GateSpec((0, 1, 2, 3)) if stage.gate else None,
        )
        for number, stage in enumerate(wide.stages)
    )
    zoo = SlimNet(wide.replace(stages=stages))
    plain = plain_network(zoo.spec, zoo.spec.largest).eval()
    layers = sum(3 * s.blocks if s.block == "depthwise_separable" else 1 for s in stages[:behind])
    example = torch.randn(2, zoo.spec.in_channels, 128, 128)
    whole = [name for name, _ in plain.named_modules() if name.endswith(".reduce")]  # as in the zoo
    converted = convert(plain, example, gate_at=[str(layers)], protect=whole)
    for own, other in zip(zoo.spec.routes, converted.spec.routes, strict=True):
        assert madds(zoo.spec, own, 128, pooling=False) == madds(converted.spec, other, 128)
    return zoo, converted


def _run_numbered(step: Arm, routes: Sequence[Sandwich], number: int) -> None:
    step(routes[number], number)


def _run_batch(engine: Engine, images: np.ndarray, number: int) -> None:
    engine(images)


def measure_converted(options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds of both networks: a training step, and batches in the engine."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    nets = same_network(options.model)
    x = torch.randn(options.batch_size, 3, 128, 128)
    labels = torch.randint(0, nets[0].spec.num_classes, (options.batch_size,))
    images = x.numpy()
    engines = []
    for net in nets:
        for choice in (0, 3):  # all rows take this option, since hidden features are not negative
            (head,) = net.eval().slimming_parameters()
            with torch.no_grad():
                head.zero_()[choice] = 1.0
            engines.append(Engine(net, backend="onnxruntime", workers=1))
            assert (engines[-1](images).routes == choice).all()
    x = x.contiguous(memory_format=torch.channels_last)
    for net in nets:
        net.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = [ours(net, x, labels) for net in nets]
    arms: dict[str, Callable[[int], Any]] = {}
    for name, net, step in zip(("zoo", "converted"), nets, steps, strict=True):
        routes = [sandwich_routes(net.spec, random.Random(k)) for k in range(options.rounds + 8)]
        arms[f"{name} step"] = partial(_run_numbered, step, routes)
    for name, pair in (("zoo", engines[:2]), ("converted", engines[2:])):
        for route, engine in zip(("narrowest", "widest"), pair, strict=True):
            arms[f"{name} {route}"] = partial(_run_batch, engine, images)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for k in range(options.warm_up + options.rounds):
        for name, run in arms.items() if k % 2 else reversed(arms.items()):
            start = time.process_time()
            run(k)
            times[name].append(time.process_time() - start)
    found = {}
    for what in ("step", "narrowest", "widest"):
        pairs = zip(times[f"converted {what}"], times[f"zoo {what}"], strict=True)
        found[f"converted_over_zoo_{what}"] = spread([a / b for a, b in pairs][options.warm_up :])
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and count."""
    low, median, high = statistics.quantiles(values, n=4)
    return {
        "median": round(median, 4),
        "quartile_low": round(low, 4),
        "quartile_high": round(high, 4),
        "n": len(values),
    }


def resident(field: str) -> int:
    """Resident memory of the process, now (VmRSS) or at its peak (VmHWM), in KiB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1])


def held_tensors() -> int:
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory_of(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of one arm in this process: tensors, and resident memory."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which includes the parent's
    options.channels_last = True
    net, x, labels = make(options)
    arm = ARMS[options.memory_of](net, x, labels)
    if options.memory_of == "largest_alone":
        del net
    spec = get_spec(options.model)
    for step in range(3):
        arm(sandwich_routes(spec, random.Random(step)), step)
    peak = resident("VmHWM")
    gc.collect()
    held = held_tensors()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        arm(sandwich_routes(spec, random.Random(3)), 3)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return {
        "tensors_mib": round((held + most) / 2**20, 1),
        "resident_mib": round((peak - before) / 1024, 1),
    }


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each arm in separate processes."""
    found: dict[str, Any] = {}
    for name in ("ours", "naive", "largest_alone"):
        command = [sys.executable, __file__, "--memory-of", name, "--model", options.model]
        command += ["--image-size", str(options.image_size)]
        command += ["--batch-size", str(options.batch_size)]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(3)
        ]
        for kind in ("tensors_mib", "resident_mib"):
            found[f"{name}_{kind}"] = sorted(run[kind] for run in runs)
    for kind in ("tensors", "resident"):
        ours, alone = (found[f"{name}_{kind}_mib"][1] for name in ("ours", "largest_alone"))
        found[f"ours_over_largest_alone_{kind}"] = round(ours / alone, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ds_mbnet")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result there too")
    parser.add_argument("--converted", action="store_true", help="the same network, converted")
    parser.add_argument("--memory-of", choices=list(ARMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(memory_of(options)))
        return
    if options.converted:
        print(json.dumps(measure_converted(options), indent=2))
        return
    hardware = {k: v for k, v in environment().items() if k not in ("started", "command")}
    result = {
        "benchmark": "train_step",
        "model": options.model,
        "image_size_px": options.image_size,
        "batch_size": options.batch_size,
        "hardware": hardware,
        "time": measure_time(options),
        "memory": measure_memory(options),
    }
    text = json.dumps(result, indent=2)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
