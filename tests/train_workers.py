"""Workers of the distributed training tests; importable, because processes are spawned."""

import random

import torch
import torch.distributed as dist
from helpers import join, leave, lively, micro_spec, noise

from dynaslim.cost import CostTable
from dynaslim.recipes import SgsRecipe
from dynaslim.train import recalibrate
from dynaslim.train.step import gate_step, sandwich_routes, supernet_step
from dynaslim.train.teacher import make_teacher

ROWS = 12


def one_step(rows):
    """A stage-I step on some rows of a batch, with BN in evaluation mode."""
    net = lively(micro_spec(), image_size=16)
    teacher = make_teacher(lively(micro_spec(), seed=7, image_size=16), 0.5).eval()
    x, labels = noise(net.spec, ROWS, image_size=16), torch.arange(ROWS) % 5
    losses = supernet_step(
        net,
        teacher,
        torch.optim.SGD(net.parameters(), lr=0.1),
        x[rows],
        labels[rows],
        sandwich_routes(net.spec, random.Random(3)),
        label_smoothing=0.1,
        dropout=0.3,
        generator=torch.Generator().manual_seed(5),
        step=0,
    )
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return losses, grads, net.state_dict()


def worker(rank, port, folder, run):
    """Run one of two gloo processes; saves the result of `run(rank)`."""
    join(rank, port)
    torch.save(run(rank), f"{folder}/{rank}.pt")
    leave()


def half(rank):
    """The rows of a process."""
    return slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)


def step(rank):
    """A step with half a batch per process; counts the messages."""
    reduce, sizes = dist.all_reduce, []

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    return *one_step(half(rank)), sizes


def gate_step_of(rows, gumbel):
    """A stage-II step on some rows of a batch."""
    net = lively(micro_spec(), image_size=16)
    heads = net.slimming_parameters()
    net.requires_grad_(False)
    for head in heads:
        head.requires_grad_(True)
    x, labels = noise(net.spec, ROWS, image_size=16), torch.arange(ROWS) % 5
    losses = gate_step(
        net,
        torch.optim.SGD(heads, lr=0.1),
        x[rows],
        labels[rows],
        CostTable.from_madds(net.spec, 16),
        SgsRecipe(gumbel=gumbel, easy_share=0.4, cost_weight=5.0),
        cost_scale=1e4,
        generator=torch.Generator().manual_seed(5),
        step=0,
    )
    return losses, [head.grad for head in heads]


def gate_steps(rank):
    """Steps with half a batch per process, with and without Gumbel noise."""
    return [gate_step_of(half(rank), gumbel) for gumbel in (False, True)]


def calibration(rank):
    """Calibration with every second batch in each process."""
    net = lively(micro_spec(), image_size=16)
    batches = [noise(net.spec, 8, image_size=16, seed=s) for s in range(5)]
    recalibrate(net, batches[rank::2])
    return net.state_dict()


def not_finite(rank):
    """A loss that is not finite in one process stops both."""
    net = lively(micro_spec(), image_size=16)
    teacher = make_teacher(net, 0.5)
    x = noise(net.spec, 4, image_size=16)
    if rank == 1:
        x[0] = float("nan")
    try:
        supernet_step(
            net,
            teacher,
            torch.optim.SGD(net.parameters(), lr=0.1),
            x,
            torch.arange(4),
            sandwich_routes(net.spec, random.Random(3)),
            label_smoothing=0.1,
            dropout=0.0,
            generator=None,
            step=4,
        )
    except ValueError as error:
        return str(error)
    return ""
