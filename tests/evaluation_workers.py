"""Images to evaluate on, and the worker of the processes in tests/test_evaluation_processes.py."""

import dataclasses
from pathlib import Path

import torch
from helpers import join, leave, lively, micro_spec, noise

from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import normalise
from dynaslim.evaluation import evaluate
from dynaslim.preprocessing import Preprocessing
from dynaslim.spec import NetSpec, StageSpec

PRE = Preprocessing(16, mean=(0.5,) * 3, std=(0.125,) * 3)


def noise_images(count, classes=5):
    """The noise of `helpers` as pixels, with random labels."""
    pixels = (noise(micro_spec(), count, image_size=16) * 32 + 128).clamp(0, 255).to(torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(0))
    return ImageDataset(pixels, labels, tuple(f"c{n}" for n in range(classes)), "noise")


def opinionated(spec):
    """A `lively` network whose answers on noise images spread over the classes."""
    net = lively(spec, image_size=16)
    with torch.inference_mode():
        x = normalise(noise_images(64).images_NCSS, PRE)
    with torch.no_grad():
        net.classifier.weight *= 100
        net.classifier.bias -= net(x, spec.smallest).mean(0)
    return net


@dataclasses.dataclass(frozen=True)
class PartlyReadable(ImageDataset):
    """Simulates a set on disk with images that do not decode; one may raise another error."""

    unreadable: tuple[int, ...] = ()
    explosive: int = -1
    places: tuple[str, ...] = ()

    @property
    def where(self):
        return self.places

    def batches(self, batch_size, order=None):
        assert order is not None
        loaded = super().batches(batch_size, order)
        for rows, (pixels, labels) in zip(torch.split(order, batch_size), loaded, strict=True):
            if self.explosive in rows:
                raise RuntimeError("the disk is gone")
            bad = torch.isin(rows, torch.tensor(self.unreadable, dtype=torch.int64))
            yield pixels.masked_fill(bad[:, None, None, None], 0), labels.masked_fill(bad, -1)


def partly_readable(count, *unreadable, explosive=-1):
    """`noise_images` in which the given rows are returned with a negative label."""
    fields = vars(noise_images(count))
    return PartlyReadable(**fields, unreadable=unreadable, explosive=explosive)


def plain_spec():
    """A network without gates."""
    return NetSpec("plain", (StageSpec((4,), block="conv"), StageSpec((4,))), num_classes=5)


def cases():
    """Name -> (network, images, options of `evaluate`)."""
    gated = opinionated(micro_spec())
    sixteen = {"batch_size": 16}
    return {
        "three batches for two, the last uneven": (gated, noise_images(45), sixteen),
        "one batch for two": (gated, noise_images(10), sixteen),
        "views": (gated, noise_images(35), {**sixteen, "views": 3}),
        "bf16": (gated, noise_images(35), {**sixteen, "bf16": True}),
        # all images of a process's only batch, and single images
        "skipped": (gated, partly_readable(45, 3, *range(16, 32), 40), sixteen),
        "no gates": (opinionated(plain_spec()), noise_images(45), sixteen),
    }


def failures():
    """The same for evaluations that fail, for a reason that only one of two processes has."""
    broken = opinionated(micro_spec())
    with torch.no_grad():
        broken.classifier.bias[2] = float("nan")
    gated = opinionated(micro_spec())
    sixteen = {"batch_size": 16}
    return {
        "not finite": (broken, noise_images(10), sixteen),
        "disk": (gated, partly_readable(45, explosive=20), sixteen),
        "nothing": (gated, partly_readable(3, 0, 1, 2), sixteen),
    }


def worker(rank: int, port: int, folder: str) -> None:
    """Run one of two gloo processes: every case alone, then all cases together."""
    torch.set_num_threads(1)
    alone = {
        name: evaluate(net, images, PRE, **options)
        for name, (net, images, options) in cases().items()
    }
    join(rank, port)
    done = []
    together = {
        name: evaluate(net, images, PRE, on_batch=done.append, **options)
        for name, (net, images, options) in cases().items()
    }
    raised = {}
    for name, (net, images, options) in failures().items():
        try:
            evaluate(net, images, PRE, **options)
        except Exception as error:
            raised[name] = (type(error).__name__, str(error))
    torch.save((alone, together, done, raised), Path(folder) / f"{rank}.pt")
    leave()
