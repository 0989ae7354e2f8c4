"""What `evaluate` records of each image: views, classes, images it skipped, and the table."""

import dataclasses

import pytest
import torch
from evaluation_workers import PRE, noise_images, opinionated, partly_readable, plain_spec
from helpers import lively, micro_spec
from pyarrow import parquet

from dynaslim import Engine
from dynaslim.cost import madds
from dynaslim.data.images import ImageDataset
from dynaslim.data.transforms import normalise
from dynaslim.errors import DataError, UsageError
from dynaslim.evaluation import evaluate, write_table
from dynaslim.zoo import get_spec


@pytest.fixture(scope="module")
def net():
    return opinionated(micro_spec())


def _views_by_hand(x):
    """The ten views of 16 px images, moved by one pixel."""
    up, down, left, right = (torch.zeros_like(x) for _ in range(4))
    up[:, :, :-1] = x[:, :, 1:]
    down[:, :, 1:] = x[:, :, :-1]
    left[..., :-1] = x[..., 1:]
    right[..., 1:] = x[..., :-1]
    return [v for image in (x, up, down, left, right) for v in (image, image.flip(-1))]


@pytest.mark.parametrize("views", [2, 5, 10])
def test_views_are_averaged_as_probabilities(net, views):
    spec = net.spec
    images = noise_images(30)
    labels = images.labels_N
    result = evaluate(net, images, PRE, batch_size=16, views=views)
    seen = _views_by_hand(normalise(images.images_NCSS, PRE))[:views]
    with torch.inference_mode():
        for metrics, route in zip(result.routes, spec.routes, strict=True):
            mean = torch.stack([net(v, route).softmax(1) for v in seen]).mean(0)
            loss = -mean.gather(1, labels[:, None]).log().mean()
            assert metrics.loss == pytest.approx(loss.item(), rel=1e-5)
            assert metrics.top1 == pytest.approx((mean.argmax(1) == labels).float().mean().item())
            assert metrics.madds == views * madds(spec, route, 16)
        routed = [Engine(net, backend="eager")(v) for v in seen]
    mean = torch.stack([out.logits.softmax(1) for out in routed]).mean(0)
    assert torch.equal(result.predictions, mean.argmax(1))
    torch.testing.assert_close(result.confidence, mean.amax(1))
    cost = torch.stack([out.madds for out in routed]).sum(0)
    assert torch.equal(result.madds, cost)
    assert result.dynamic.mean_madds == pytest.approx(cost.mean().item())
    assert torch.equal(result.choices, routed[0].routes)
    assert any(not torch.equal(out.routes, routed[0].routes) for out in routed), "views may differ"


def test_view_refusals(net):
    for views in (0, -1, 11):
        with pytest.raises(UsageError, match=f"views {views}: must be from 1 to 10"):
            evaluate(net, noise_images(4), PRE, views=views)
    with pytest.raises(UsageError, match="batch_size 0"):
        evaluate(net, noise_images(4), PRE, batch_size=0)


def test_bf16_runs_under_autocast_with_losses_in_float32(net):
    images = noise_images(40)
    plain, low = (evaluate(net, images, PRE, bf16=bf16) for bf16 in (False, True))
    with torch.inference_mode():
        x = normalise(images.images_NCSS, PRE)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x, net.spec.smallest)
        assert logits.dtype == torch.bfloat16
        loss = torch.nn.functional.cross_entropy(logits.float(), images.labels_N).item()
    assert low.routes[0].loss == pytest.approx(loss, rel=1e-6)
    assert low.routes[0].loss != plain.routes[0].loss
    assert low.dynamic.loss == pytest.approx(plain.dynamic.loss, rel=0.1)
    assert low.confidence.dtype == torch.float32


def test_equal_scores_go_to_the_lower_class():
    """So top-1 and top-5 agree with the prediction, which bf16 makes matter."""
    blank = lively(micro_spec(num_classes=8), image_size=16)
    with torch.no_grad():
        blank.classifier.weight.zero_()
        blank.classifier.bias.zero_()
    images = noise_images(60, 8)
    result = evaluate(blank, images, PRE)
    assert not result.predictions.any()
    for metrics in (*result.routes, result.dynamic):
        assert metrics.top1 == (images.labels_N == 0).sum() / 60
        assert metrics.top5 == (images.labels_N < 5).sum() / 60


def test_classes_add_up_to_the_whole(net):
    images = noise_images(50)
    images.labels_N[images.labels_N == 3] = 4  # a class without images
    result = evaluate(net, images, PRE, batch_size=16)
    dynamic = result.dynamic
    classes = result.per_class
    assert [(c.index, c.name) for c in classes] == [(n, f"c{n}") for n in range(5)]
    assert [c.images for c in classes] == torch.bincount(images.labels_N, minlength=5).tolist()
    empty = classes[3]
    assert (empty.images, empty.top1, empty.mean_madds) == (0, None, None)
    assert empty.route_shares == (0.0,) * len(dynamic.route_shares)
    full = [c for c in classes if c.images]
    assert sum(c.images * c.top1 for c in full) == pytest.approx(50 * dynamic.top1)
    assert sum(c.images * c.mean_madds for c in full) == pytest.approx(50 * dynamic.mean_madds)
    for number, share in enumerate(dynamic.route_shares):
        taken = sum(c.images * c.route_shares[number] for c in full)
        assert taken == pytest.approx(50 * share.share)
    routed = Engine(net, backend="eager")(normalise(images.images_NCSS, PRE))
    ours = images.labels_N == 1
    right = (routed.logits.argmax(1) == 1)[ours]
    assert classes[1].top1 == right.sum() / ours.sum()
    assert classes[1].mean_madds == pytest.approx(routed.madds[ours].mean().item())
    routes = [Engine(net).route_of(row).widths for row in routed.routes[ours]]
    for share, of_class in zip(dynamic.route_shares, classes[1].route_shares, strict=True):
        assert of_class == routes.count(share.widths) / len(routes)
    assert len({c.top1 for c in full}) > 1, "the test needs classes that differ"


def test_classes_share_the_unused_routes_of_one_gate():
    one_gate = lively(get_spec("ds_mbnet_tiny").replace(num_classes=5))
    images = noise_images(20)
    images = dataclasses.replace(images, pixels=images.images_NCSS.repeat(1, 1, 2, 2))
    pre = dataclasses.replace(PRE, image_size_px=32)
    result = evaluate(one_gate, images, pre)
    assert [r.widths for r in result.taken] == [s.widths for s in result.dynamic.route_shares]
    assert all(len(c.route_shares) == 4 for c in result.per_class)
    for row, number in zip(result.choices, result.taken_number, strict=True):
        assert Engine(one_gate).route_of(row) == result.taken[number]


def test_without_gates_classes_are_of_the_widest_route():
    """Whatever the order in which routes are requested."""
    spec = plain_spec()
    spec = spec.replace(stages=(dataclasses.replace(spec.stages[0], widths=(4, 8)), spec.stages[1]))
    plain = opinionated(spec)
    assert spec.largest != spec.smallest
    images = noise_images(30)
    result = evaluate(plain, images, PRE, routes=(spec.largest, spec.smallest), views=2)
    assert result.dynamic is None
    assert result.taken == (spec.largest,)
    right = sum(c.images * c.top1 for c in result.per_class)
    assert right == pytest.approx(30 * result.routes[0].top1)
    assert result.routes[0].top1 != result.routes[1].top1, "the test needs routes that differ"
    assert {c.mean_madds for c in result.per_class} == {2 * madds(spec, spec.largest, 16)}
    assert all(c.route_shares == () for c in result.per_class)
    assert set(result.madds.tolist()) == {2 * madds(spec, spec.largest, 16)}


def test_gates_can_be_left_alone(net):
    """What a supernet is measured by before its gates have learnt anything."""
    images = noise_images(30)
    full, routes_only = (evaluate(net, images, PRE, dynamic=dynamic) for dynamic in (True, False))
    assert routes_only.dynamic is None
    assert routes_only.routes == full.routes
    assert routes_only.choices.shape == (30, 0)
    assert routes_only.taken == (net.spec.routes[-1],)
    right = sum(c.images * c.top1 for c in routes_only.per_class)
    assert right == pytest.approx(30 * full.routes[-1].top1)
    assert all(c.route_shares == () for c in routes_only.per_class)
    assert not torch.equal(routes_only.predictions, full.predictions), "the test needs that"


def test_skipped_images_are_in_no_result(net):
    """They count as if the set had been without them, and rows are those that are left."""
    bad = [0, *range(16, 32), 44]
    good = torch.tensor([row for row in range(45) if row not in bad])
    done = []
    result = evaluate(net, partly_readable(45, *bad), PRE, batch_size=16, on_batch=done.append)
    without = evaluate(net, noise_images(45).subset(good), PRE, batch_size=16)
    assert (result.images, result.skipped) == (27, 18)
    assert done == [16, 16, 13], "progress is of all images"
    assert torch.equal(result.rows, good)
    assert torch.equal(result.labels, noise_images(45).labels_N[good])
    assert torch.equal(result.predictions, without.predictions)
    assert torch.equal(result.choices, without.choices)
    assert [r.top1 for r in result.routes] == [r.top1 for r in without.routes]
    assert result.dynamic.loss == pytest.approx(without.dynamic.loss)
    assert result.dynamic.mean_madds == without.dynamic.mean_madds
    assert [c.images for c in result.per_class] == [c.images for c in without.per_class]
    with pytest.raises(DataError, match="noise: none of its 2 images can be read"):
        evaluate(net, partly_readable(2, 0, 1), PRE)


def test_batches_that_lose_images_are_refused(net):
    class Leaky(ImageDataset):
        def batches(self, batch_size, order=None):
            return ((pixels[1:], labels[1:]) for pixels, labels in super().batches(8, order))

    with pytest.raises(DataError, match="noise: gave 7 images for a batch of 8"):
        evaluate(net, Leaky(**vars(noise_images(16))), PRE, batch_size=8)


def test_table_has_what_became_of_each_image(net, tmp_path):
    where = tuple(f"folder/{n}.png" for n in range(20))
    images = dataclasses.replace(partly_readable(20, 2, 7), places=where)
    result = evaluate(net, images, PRE)
    path = write_table(tmp_path / "deep" / "images.parquet", result, images)
    assert [file.name for file in path.parent.iterdir()] == ["images.parquet"]
    table = parquet.read_table(path)
    assert {field.name: str(field.type) for field in table.schema} == {
        "file": "string",
        "label": "int64",
        "label_name": "string",
        "prediction": "int64",
        "prediction_name": "string",
        "right": "bool",
        "route": "string",
        "confidence": "float",
        "madds": "double",
    }
    rows = table.to_pylist()
    kept = [n for n in range(20) if n not in (2, 7)]
    assert [row["file"] for row in rows] == [where[n] for n in kept]
    routed = Engine(net, backend="eager")(normalise(images.images_NCSS[kept], PRE))
    for number, row in enumerate(rows):
        label, prediction = int(images.labels_N[kept[number]]), int(routed.logits[number].argmax())
        assert (row["label"], row["label_name"]) == (label, f"c{label}")
        assert (row["prediction"], row["prediction_name"]) == (prediction, f"c{prediction}")
        assert row["right"] == (label == prediction)
        assert row["route"] == str(Engine(net).route_of(routed.routes[number]))
        assert row["confidence"] == pytest.approx(routed.logits[number].softmax(0).max().item())
        assert row["madds"] == routed.madds[number]
    assert sum(row["right"] for row in rows) / 18 == result.dynamic.top1
    assert len({row["route"] for row in rows}) > 1
    assert len({row["right"] for row in rows}) == 2


def test_table_of_images_from_nowhere(tmp_path):
    class Unnamed(ImageDataset):
        def check_fits(self, preprocessing, num_classes):
            """A source that does not know its classes."""

    plain = opinionated(plain_spec())
    images = Unnamed(**{**vars(noise_images(6)), "class_names": ()})
    result = evaluate(plain, images, PRE)
    assert {c.name for c in result.per_class} == {None}
    rows = parquet.read_table(write_table(tmp_path / "t.parquet", result, images)).to_pylist()
    assert [row["file"] for row in rows] == [f"row {n}" for n in range(6)]
    assert {row["label_name"] for row in rows} == {row["prediction_name"] for row in rows} == {None}
    assert {row["route"] for row in rows} == {"4-4"}


def test_table_is_of_the_images_evaluated(net, tmp_path):
    result = evaluate(net, noise_images(8), PRE)
    with pytest.raises(UsageError, match="noise: has 9 images, the evaluation is of 8"):
        write_table(tmp_path / "t.parquet", result, noise_images(9))
    assert not list(tmp_path.iterdir())
