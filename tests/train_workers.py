"""What the processes of the distributed training tests run; spawned, so importable by name."""

import os
import random
from datetime import timedelta

import torch
import torch.distributed as dist
from helpers import lively, micro_spec, noise

from dynaslim.cost import CostTable
from dynaslim.recipes import SgsRecipe
from dynaslim.train import recalibrate
from dynaslim.train.sampling import sandwich_routes
from dynaslim.train.step import gate_step, supernet_step
from dynaslim.train.teacher import make_teacher

ROWS = 12


def join(rank, processes, port):
    """Become one of the processes of a gloo group."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=processes, timeout=timedelta(seconds=60))
    torch.set_num_threads(1)


def leave():
    """Leave it together: who goes first would cut the others' last exchange off."""
    dist.barrier()
    dist.destroy_process_group()


def one_step(rows):
    """A stage-I step on some rows of a batch, BN's batch statistics out of the way."""
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


def step_worker(rank, port, folder):
    """Half a batch each; counts the messages."""
    join(rank, 2, port)
    reduce, sizes = dist.all_reduce, []

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    half = ROWS // 2
    losses, grads, state = one_step(slice(rank * half, (rank + 1) * half))
    torch.save((losses, grads, state, sizes), f"{folder}/{rank}.pt")
    leave()


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


def gate_worker(rank, port, folder):
    """Half a batch each, with noise and without."""
    join(rank, 2, port)
    half = ROWS // 2
    own = slice(rank * half, (rank + 1) * half)
    torch.save([gate_step_of(own, gumbel) for gumbel in (False, True)], f"{folder}/{rank}.pt")
    leave()


def calibration_worker(rank, port, folder):
    """Every second batch each."""
    join(rank, 2, port)
    net = lively(micro_spec(), image_size=16)
    batches = [noise(net.spec, 8, image_size=16, seed=s) for s in range(5)]
    recalibrate(net, batches[rank::2])
    torch.save(net.state_dict(), f"{folder}/{rank}.pt")
    leave()


def nan_worker(rank, port, folder):
    """A loss that is not finite in one process alone stops both."""
    join(rank, 2, port)
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
        said = ""
    except ValueError as error:
        said = str(error)
    torch.save(said, f"{folder}/{rank}.pt")
    leave()
