"""A slimmable network out of a wide one: the same answers, and the channels worth keeping first."""

import copy

import pytest
import torch
from helpers import ZOO_NAMES, assert_rows_close, lively, micro_spec, noise

from dynaslim.errors import UsageError
from dynaslim.nn import SlimNet
from dynaslim.nn.layers import SlimBatchNorm2d
from dynaslim.nn.sorting import channel_groups, slimmable, sort_channels, widest_only
from dynaslim.spec import TEACHER_INDEX, StageSpec
from dynaslim.zoo import ZOO


@pytest.fixture(params=["micro", *ZOO_NAMES], scope="module")
def pair(request):
    """A zoo entry, and its largest network alone, which is not to be changed."""
    spec = micro_spec() if request.param == "micro" else ZOO[request.param]
    spec = spec.replace(num_classes=7)
    net = lively(widest_only(spec))
    for module in net.modules():
        if isinstance(module, SlimBatchNorm2d):
            module.num_batches_tracked.fill_(9)
    return spec, net


def _answers(net, x, route):
    with torch.inference_mode():
        return net(x, route)


def test_at_full_width_it_answers_as_the_wide_network(pair):
    spec, wide = pair
    x = noise(spec, 4)
    net = slimmable(wide, spec.replace(num_classes=3), [x])
    assert net.spec == spec
    assert not net.training
    assert_rows_close(_answers(net, x, spec.largest), _answers(wide, x, spec.largest), 1e-5)
    for name, ours in net.named_modules():
        theirs = wide.get_submodule(name)
        if name.endswith(".conv"):
            assert not torch.equal(ours.weight, theirs.weight), "not sorted"
        if isinstance(ours, SlimBatchNorm2d):  # every slot has the wide network's statistics
            assert (ours.num_batches_tracked == 9).all()
            for name in ("running_mean", "running_var"):
                values, (row,) = getattr(ours, name), getattr(theirs, name)
                assert torch.equal(values, values[:1].expand_as(values))
                assert torch.equal(values[0].sort().values, row.sort().values)


def test_groups_are_all_there_is_and_do_not_overlap(pair):
    spec, wide = pair
    net, x = copy.deepcopy(wide), noise(spec, 2)
    groups = channel_groups(net)
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        channels = group.carriers[0][0].shape[0]
        group.reorder(torch.randperm(channels, generator=generator))
    assert_rows_close(_answers(net, x, spec.largest), _answers(wide, x, spec.largest), 1e-5)
    axes = [(id(t), axis) for group in groups for t, axis in group.carriers]
    axes += [(id(t), axis) for group in groups for t, axis in group.consumers]
    assert len(axes) == len(set(axes)), "an axis in two groups"
    # not in any: the images' channels, classes, hidden features of gates and the slots of BN
    expected = -2  # the stem's columns, the classifier's bias
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if not name.endswith(("num_batches_tracked", "slimming_weight", "reduce_bias")):
            expected += 1
        expected += name.endswith(".conv.weight") and tensor.shape[1] > 1
    assert len(axes) == expected


def _with_dead_channels(spec, wide):
    """A wide network in which as many channels are alive as the smallest route has, anywhere.

    Dead ones have the larger filters and columns, so that no norm of weights finds them.
    """
    net = copy.deepcopy(wide)
    norms = [m for m in SlimNet(spec, device="meta").modules() if isinstance(m, SlimBatchNorm2d)]
    ours = [m for m in net.modules() if isinstance(m, SlimBatchNorm2d)]
    slots = {id(m.weight): n.slot_channels for m, n in zip(ours, norms, strict=True)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in channel_groups(net):
            (widths,) = {slots[id(t)] for t, _ in group.carriers if id(t) in slots}
            dead = torch.randperm(max(widths), generator=generator)[min(widths) :]
            for tensor, axis in group.carriers:
                if tensor.ndim == 1:
                    tensor[dead] = 0
                elif axis == 0:
                    tensor[dead] *= 3
            for weight, axis in group.consumers:
                assert axis == 1
                weight[:, dead] *= 3
    return net


def test_dead_channels_come_last(pair):
    """Where the rest is dead, the smallest route answers as the wide network does."""
    spec, wide = pair[0], _with_dead_channels(*pair)
    x = noise(spec, 4)
    expected = _answers(wide, x, spec.largest)
    net = slimmable(wide, spec, [x])  # by x itself: a channel that is silent on it may be last too
    assert_rows_close(_answers(net, x, spec.smallest), expected, 1e-5)

    def off(other):
        return (_answers(other, x, spec.smallest) - expected).abs().max() / expected.abs().max()

    unsorted, generator = slimmable(wide, spec, [x]), torch.Generator().manual_seed(0)
    for group in channel_groups(unsorted):
        group.reorder(torch.randperm(group.units, generator=generator))
    assert off(unsorted) > 0.01
    for group in channel_groups(unsorted):
        filters = [t.detach().flatten(1).norm(dim=1) for t, _ in group.carriers if t.ndim == 4]
        group.reorder(torch.stack(filters).sum(0).argsort(descending=True))
    assert off(unsorted) > 0.01, "by the norm of the filters"


def test_importance_is_summed_over_the_layers_that_read_a_channel():
    """By what its operations read, on a residual block behind another."""
    stages = (StageSpec((6,), block="conv"), StageSpec((8,), "basic", 2))
    spec = micro_spec(stages=stages, attention_at="gated", activation="relu")
    net, batches = lively(spec), [noise(spec, 4, seed=seed) for seed in (1, 2)]
    sort_channels(net, batches)
    powers = {}

    def record(step, args, _):
        if step.name.endswith(("conv", "classifier")):
            power = args[0].square().mean([a for a in range(args[0].ndim) if a != 1])
            powers[step.name] = powers.get(step.name, 0) + power

    for x in batches:
        with torch.inference_mode():
            net.run_segment(0, x, 0, TEACHER_INDEX, watch=record)

    def importance(layer):
        weight = net.tensor(f"{layer}.weight").detach()
        return (powers[layer] * weight.square().transpose(0, 1).flatten(1).sum(1)).sqrt()

    first, second = "stages.1.0", "stages.1.1"
    for values in (
        importance(f"{first}.body.0.conv") + importance(f"{first}.shortcut.conv"),
        importance(f"{first}.body.1.conv"),
        importance(f"{second}.body.0.conv") + importance("classifier"),
        importance(f"{second}.body.1.conv"),
    ):
        assert (values.diff() <= 1e-4 * values[:-1]).all(), values
        assert values[0] > 1.05 * values[-1]


def test_by_activations_there_must_be_images():
    net = lively(micro_spec())
    with pytest.raises(UsageError, match="images: at least one is needed to sort channels by"):
        sort_channels(net, [])
