import multiprocessing
from dataclasses import replace
from itertools import islice

import datasets
import pytest
import torch
from helpers import png, write_parquet

from dynaslim import distributed
from dynaslim.data import load_images, open_source
from dynaslim.data import source as source_module
from dynaslim.data.feed import ImageFeed, StreamFeed, open_training
from dynaslim.data.images import ImageDataset, channel_statistics, holdout
from dynaslim.data.source import fetched
from dynaslim.errors import DataError, TrainingError, UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.recipes import AugmentRecipe, DataRecipe
from dynaslim.seeds import step_seed

SIZE = 8
GREY = Preprocessing(SIZE, (0.5,), (0.25,))
PLAIN, RESIZED = AugmentRecipe(), AugmentRecipe(crop="resized", scale_min=0.2)
KINDS = ["memory", "disk", "stream"]
COUNT, BATCH = 22, 4  # five whole batches and two images over


def _folder(root, count=COUNT, classes=3, broken=()):
    for n in range(count):
        folder = root / "train" / f"class {n % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        content = png(n, (12, 10))
        (folder / f"{n:03}.png").write_bytes(content[:50] if n in broken else content)
    return root


def _table(root, count=COUNT, classes=3, broken=()):
    images = [png(n, (12, 10)) for n in range(count)]
    return write_parquet(
        root, [i[:50] if n in broken else i for n, i in enumerate(images)], classes, "train"
    ).parent


@pytest.fixture(autouse=True)
def _no_sleep(monkeypatch):
    """Datasets sleeps five seconds when it closes a stream of parquet."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


STORES = [_folder, _table]


def _feed(kind, path, augment=PLAIN, workers=0, limit=0.0, **options):
    if kind == "memory":
        images = load_images(open_source(path, "train"), GREY, corrupt_limit=limit)
        return ImageFeed(images, BATCH, 7)
    if kind == "disk":
        images = ImageDataset.of(open_source(path, "train"), GREY, corrupt_limit=limit)
        return ImageFeed(images, BATCH, 7, augment=augment, workers=workers)
    stream = open_stream(path, "train")
    return StreamFeed(
        stream, GREY, augment, BATCH, 7, workers, buffer=6, corrupt_limit=limit, **options
    )


def open_stream(path, split="train"):
    return open_source(path, split, streaming=True)


def _same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for (x, y), (x_, y_) in zip(first, second, strict=True):
        assert torch.equal(x, x_)
        assert torch.equal(y, y_)


def _keys(batches):
    return [tuple(image.flatten().tolist()) for x, _ in batches for image in x]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("augment", [PLAIN, RESIZED])
def test_a_resumed_feed_gives_the_batches_of_a_straight_one(tmp_path, kind, store, augment):
    path = store(tmp_path)
    feed = _feed(kind, path, augment)
    assert feed.steps_per_epoch == 5
    straight = list(feed.batches(0, 12))
    assert len(straight) == 12
    for start, stop in ((1, 4), (4, 6), (5, 12), (11, 12)):
        _same(_feed(kind, path, augment).batches(start, stop), straight[start:stop])
    for x, y in straight:
        assert x.shape == (BATCH, 1, SIZE, SIZE)
        assert x.dtype == torch.uint8
        assert y.dtype == torch.int64
    assert list(feed.batches(3, 3)) == []


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_takes_every_image_at_most_once_with_its_label(tmp_path, kind, store):
    path = store(tmp_path)
    images = load_images(open_source(path, "train"), GREY)
    known = dict(zip(_keys([(images.images_NCSS, None)]), images.labels_N.tolist(), strict=True))
    feed = _feed(kind, path)
    epochs = [list(feed.batches(e * 5, e * 5 + 5)) for e in range(2)]
    for epoch in epochs:
        keys = _keys(epoch)
        assert len(set(keys)) == 20
        assert [known[k] for k in keys] == torch.cat([y for _, y in epoch]).tolist()
    assert _keys(epochs[0]) != _keys(epochs[1]), "each epoch has its own order"
    assert _keys(epochs[0]) != _keys(feed.batches(0, 5, purpose="calibrate"))


def test_the_order_of_training_stays_as_it_was(tmp_path):
    path = _table(tmp_path)
    labels = load_images(open_source(path, "train"), GREY).labels_N
    generator = torch.Generator().manual_seed(step_seed(7, 1, "order"))
    order = torch.randperm(COUNT, generator=generator)
    for kind in ("memory", "disk"):
        seen = torch.cat([y for _, y in _feed(kind, path).batches(5, 10)])
        assert torch.equal(seen, labels[order[:20]])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["disk", "stream"])
def test_workers_change_nothing(tmp_path, kind, workers):
    path = _table(tmp_path, broken=(3, 4))
    feed = _feed(kind, path, RESIZED, workers, limit=0.5)
    alone = _feed(kind, path, RESIZED, 0, limit=0.5)
    state = torch.random.get_rng_state()
    _same(feed.batches(2, 9), alone.batches(2, 9))
    assert feed.skipped.lines == alone.skipped.lines
    assert torch.equal(torch.random.get_rng_state(), state)
    # one that is not read to its end leaves nothing behind
    next(iter(feed.batches(0, 10)))
    assert not multiprocessing.active_children()


def _as_processes(monkeypatch, count):
    """Be each of so many processes in turn."""
    monkeypatch.setattr(distributed, "world_size", lambda: count)
    monkeypatch.setattr(source_module, "world_size", lambda: count)
    for rank in range(count):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(source_module, "rank", lambda rank=rank: rank)
        yield rank


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("augment", [PLAIN, RESIZED])
def test_processes_together_see_what_one_sees(tmp_path, monkeypatch, kind, augment):
    path = _table(tmp_path, broken=(5,))
    one = list(_feed(kind, path, augment, limit=0.5).batches(3, 8))
    parts = []
    for _ in _as_processes(monkeypatch, 2):
        feed = _feed(kind, path, augment, limit=0.5)
        assert feed.batch_size == BATCH
        assert feed.steps_per_epoch == len(list(feed.batches(0, 5)))
        parts.append(list(feed.batches(3, 8)))
    assert all(len(y) == BATCH // 2 for part in parts for _, y in part)
    joined = [
        (torch.cat([x0, x1]), torch.cat([y0, y1]))
        for (x0, y0), (x1, y1) in zip(*parts, strict=True)
    ]
    _same(joined, one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_cannot_be_divided(tmp_path, monkeypatch, kind):
    path = _table(tmp_path)
    for _ in _as_processes(monkeypatch, 3):
        with pytest.raises(UsageError, match="batch_size 4: cannot be divided evenly among 3"):
            _feed(kind, path)


def _tables(root, counts):
    """A parquet file of so many images for each count."""
    for number, count in enumerate(counts):
        images = [png(100 * number + n, (12, 10)) for n in range(count)]
        write_parquet(root, images, 3, f"train-{number}")
    return root


@pytest.mark.parametrize("counts", [(10, 10, 10, 10), (40,), None])
def test_processes_share_a_stream(tmp_path, monkeypatch, counts):
    """By files, by rows where there are too few files, by numbers in a folder of images."""
    path = _folder(tmp_path, 40) if counts is None else _tables(tmp_path, counts)
    parts = []
    for _ in _as_processes(monkeypatch, 2):
        feed = _feed("stream", path, RESIZED)
        assert feed.steps_per_epoch == 10
        straight = list(feed.batches(0, 20))
        assert all(len(y) == 2 for _, y in straight)
        _same(_feed("stream", path, RESIZED).batches(13, 20), straight[13:])
        parts.append(list(_feed("stream", path).batches(0, 20)))
    for epoch in (slice(0, 10), slice(10, 20)):
        first, second = (set(_keys(part[epoch])) for part in parts)
        assert len(first) == len(second) == 20
        assert not first & second


def test_a_process_reads_its_own_files_alone(tmp_path, monkeypatch):
    path = _tables(tmp_path, (6, 6, 6, 6))
    whole = {png(100 * number + n, (12, 10)): number for number in range(4) for n in range(6)}
    seen = []
    for _ in _as_processes(monkeypatch, 2):
        for seed in range(6):
            entries = list(islice(open_stream(path).shuffled(seed, 3, share=12), 12))
            assert len({e.content for e in entries}) == 12
            seen.append((seed, frozenset(whole[e.content] for e in entries)))
    assert all(len(files) == 2 for _, files in seen)
    for seed in range(6):
        first, second = (files for s, files in seen if s == seed)
        assert not first & second
    assert len({files for _, files in seen}) > 2, "other files in other epochs"


def test_shares_of_a_stream_that_differ_in_size(tmp_path, monkeypatch):
    """Three files for two processes: the one with a single file starts it again."""
    path = _tables(tmp_path, (8, 8, 8))
    sizes = []
    for _ in _as_processes(monkeypatch, 2):
        feed = _feed("stream", path)
        straight = list(feed.batches(0, 6))
        sizes.append(len(set(_keys(straight))))
        _same(_feed("stream", path).batches(5, 6), straight[5:])
    assert sorted(sizes) == [8, 12]


def test_a_stream_that_ends_early_on_a_process(tmp_path, monkeypatch):
    path = _tables(tmp_path, (8, 8))
    for _ in _as_processes(monkeypatch, 2):
        stream = replace(open_stream(path), num_images=None)
        feed = StreamFeed(stream, GREY, PLAIN, BATCH, 0, num_images=40)
        with pytest.raises(DataError, match="ended after 8 images, where 20 were to be"):
            list(feed.batches(0, 10))


def test_a_stream_is_resumed_by_as_many_processes(tmp_path, monkeypatch):
    path = _table(tmp_path)
    one = _feed("stream", path).state()
    before = {"skipped": one["skipped"]}  # of an earlier version
    _feed("stream", path).load_state(before)
    for _ in _as_processes(monkeypatch, 2):
        feed = _feed("stream", path)
        feed.load_state(feed.state())
        for state in (one, before):
            with pytest.raises(UsageError, match="with the order of 1, this is 2; resume it with"):
                feed.load_state(state)
            _feed("disk", path).load_state(state)


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_images_for_a_batch(tmp_path, kind):
    path = _table(tmp_path, count=3)
    with pytest.raises(TrainingError, match="3 images do not fill one batch of 4"):
        _feed(kind, path)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", ["disk", "stream"])
def test_a_corrupt_image_is_replaced_and_counted_once(tmp_path, kind, store):
    good = _feed(kind, store(tmp_path / "good"))
    feed = _feed(kind, store(tmp_path / "bad", broken=(5, 6)), limit=0.5)
    clean, mended = (list(f.batches(0, 15)) for f in (good, feed))
    # same places, same order: only where the two were, another image stands
    if kind == "disk" or store is _table:
        differ = sum(a != b for a, b in zip(_keys(clean), _keys(mended), strict=True))
        assert 2 <= differ <= 6
    assert feed.skipped.count == 2
    assert all("not an image that can be decoded" in line for line in feed.skipped.lines)
    if store is _folder:
        assert {line.split(": ")[0][-7:] for line in feed.skipped.lines} == {"005.png", "006.png"}
    fresh = _feed(kind, tmp_path / "bad", limit=0.5)
    _same(fresh.batches(7, 15), mended[7:])
    assert set(_keys(mended)) <= set(_keys(clean)) | set(_keys(good.batches(0, 40)))


def test_the_next_image_of_the_order_stands_in(tmp_path):
    path = _table(tmp_path, broken=(5,))
    source = open_source(path, "train")
    feed = _feed("disk", path, limit=0.5)
    generator = torch.Generator().manual_seed(step_seed(7, 0, "order"))
    order = torch.randperm(COUNT, generator=generator).tolist()
    place = order.index(5)
    order[place] = order[(place + 1) % COUNT]
    seen = torch.cat([y for _, y in feed.batches(0, 5)]).tolist()
    assert seen == [source[row].label for row in order[:20]]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_corrupt_images_are_an_error_that_names_them(tmp_path, workers):
    path = _folder(tmp_path, broken=(2, 5, 8))
    feed = _feed("disk", path, workers=workers, limit=0.1)
    with pytest.raises(DataError) as caught:
        list(feed.batches(0, 10))
    message = str(caught.value)
    assert (
        "3 of 22 images (13.64%) cannot be read, more than the 10.00% of corrupt_limit" in message
    )
    assert "class 2/002.png: not an image that can be decoded" in message
    assert "Traceback" not in message
    with pytest.raises(DataError, match=r"3 of 22 images .*class 2/005.png: not an image"):
        load_images(open_source(path, "train"), GREY, corrupt_limit=0.1)


def test_a_stream_judges_its_corrupt_images_at_the_end_of_the_epoch(tmp_path):
    path = _table(tmp_path, broken=range(0, 22, 4))
    feed = _feed("stream", path, limit=0.1)
    assert len(list(zip(range(4), feed.batches(0, 6), strict=False))) == 4, "too early to judge"
    feed.skipped.check()
    assert feed.skipped.count > 0.1 * feed.skipped.images
    feed = _feed("stream", path, limit=0.1)
    with pytest.raises(DataError, match=r"of 20 images \(\d\d.00%\) cannot be read"):
        list(feed.batches(0, 6))
    feed = _feed("stream", path, limit=0.4)
    assert len(list(feed.batches(0, 12))) == 12
    assert feed.skipped.images == 22, "no image is counted twice"


def test_nothing_decodes(tmp_path):
    path = _table(tmp_path, broken=range(COUNT))
    for kind in ("disk", "stream"):
        with pytest.raises(DataError, match="no image"):
            list(_feed(kind, path, limit=1.0).batches(0, 1))


def test_images_in_memory_without_the_corrupt_ones(tmp_path):
    path = _folder(tmp_path, broken=(5,))
    calls = []
    images = load_images(
        open_source(path, "train"), GREY, corrupt_limit=0.1, on_image=lambda: calls.append(1)
    )
    assert len(images) == len(images.where) == COUNT - 1
    assert len(calls) == COUNT
    assert "class 2/005.png: not an image" in images.skipped.lines[0]
    assert images.skipped.count == 1
    assert not any(place.endswith("005.png") for place in images.where)
    feed = ImageFeed(images, BATCH, 0)
    assert feed.skipped.count == 1
    assert feed.skipped.images == COUNT
    # what belongs to an image stays with it
    for row in (0, 9, 20):
        number = int(images.where[row][-7:-4])
        assert images.labels_N[row] == number % 3
    part = images.subset(torch.tensor([3, 1])).relabelled([2, 1, 0], list("cba"))
    assert list(part.where) == [images.where[3], images.where[1]]
    assert part.skipped.lines == images.skipped.lines
    assert part.labels_N.tolist() == [2 - int(images.labels_N[row]) for row in (3, 1)]


def test_files_that_go_missing_count_as_corrupt(tmp_path):
    path = _folder(tmp_path)
    source = open_source(path, "train")
    (path / "train" / "class 0" / "003.png").unlink()
    images = load_images(source, GREY, corrupt_limit=0.1)
    assert "003.png: cannot be read: No such file" in images.skipped.lines[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_label_is_an_error_and_not_corrupt(tmp_path, kind):
    labels = [0, 1, -1, 0, 1, 0, 1, 0]
    write_parquet(tmp_path, [png(n) for n in range(8)], "ab", "train", labels)
    with pytest.raises(DataError, match="label -1 is none of the 2 classes"):
        list(_feed(kind, tmp_path, limit=1.0).batches(0, 2))


def test_a_stream_that_ends_early(tmp_path):
    stream = replace(open_stream(_table(tmp_path), "train"), num_images=None)
    with pytest.raises(UsageError, match=r"give --data\.stream_images"):
        StreamFeed(stream, GREY, PLAIN, BATCH, 0)
    feed = StreamFeed(stream, GREY, PLAIN, BATCH, 0, num_images=30)
    batches = feed.batches(4, 7)
    next(batches)
    with pytest.raises(DataError, match="ended after 22 images, where 30 were to be"):
        next(batches)


def test_a_stream_of_several_tables(tmp_path):
    _table(tmp_path, count=9)
    write_parquet(tmp_path, [png(n) for n in range(100, 113)], 3, "train-1")
    stream = open_stream(tmp_path, "train")
    assert stream.num_images == 22
    orders = [[e.content for e in stream.shuffled(seed, 4)] for seed in (1, 2, 1)]
    assert len(set(orders[0])) == 22
    assert orders[0] == orders[2] != orders[1]
    assert [e.content for e in stream.shuffled(1, 4, 15)] == orders[0][15:]
    with pytest.raises(DataError, match="has no split 'test', only 'train'"):
        open_stream(tmp_path, "test")
    (tmp_path / "train-2.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        open_stream(tmp_path, "train")


def test_a_stream_whose_reading_fails(tmp_path):
    path = _table(tmp_path)
    stream = open_stream(path, "train")
    table = path / "train.parquet"
    content = bytearray(table.read_bytes())
    content[4:2000] = bytes(1996)
    table.write_bytes(content)
    with pytest.raises(DataError, match="reading stopped"):
        list(StreamFeed(stream, GREY, PLAIN, BATCH, 0).batches(0, 5))
    table.write_bytes(content[:100])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        open_stream(path, "train")
    with pytest.raises(DataError, match="no/such/set: no such file or folder"):
        open_stream("no/such/set")


def test_a_stream_from_the_hub(tmp_path, monkeypatch):
    path = _table(tmp_path)
    write_parquet(path, [png(n) for n in range(4)], 3, "validation")
    real, requests = datasets.load_dataset, []

    def load_dataset(name, **options):
        if name == "parquet":
            return real(name, **options)
        requests.append((name, options))
        tables = {s: str(path / f"{s}.parquet") for s in ("train", "validation")}
        return real("parquet", data_files=tables, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    recipe = DataRecipe(
        "owner/many", val_split="test", load="stream", image_size_px=SIZE, shuffle_buffer=6
    )
    with pytest.raises(UsageError, match="owner/many: does not say how many images it has"):
        _open(recipe)
    training = _open(replace(recipe, stream_images=COUNT))
    assert requests[0] == ("owner/many", {"streaming": True})
    _same(training.feed.batches(0, 7), _feed("stream", path).batches(0, 7))
    ((x, labels),) = training.validation.batches(8)
    assert labels.tolist() == [0, 1, 2, 0]
    assert torch.equal(x, load_images(fetched(str(path), "test"), GREY).images_NCSS)


def test_holdout():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (1003,), generator=generator) ** 2 // 6
    train, held_back = holdout(labels, 0.1)
    assert len(held_back) == 100
    assert torch.equal(torch.cat([train, held_back]).sort().values, torch.arange(1003))
    assert torch.equal(train, train.sort().values)
    for c in labels.unique():
        in_class = int((labels == c).sum())
        assert abs(int((labels[held_back] == c).sum()) - 0.1 * in_class) <= 1
    again = holdout(labels, 0.1)
    assert torch.equal(again[0], train)
    assert torch.equal(again[1], held_back)
    assert not torch.equal(holdout(labels, 0.1, 1)[1], held_back)
    assert len(holdout(labels, 0.0)[1]) == 0
    # a part of a class's rows that does not follow from their order
    assert (held_back.diff() != held_back.diff()[0]).any()


def test_holdout_stays_the_same():
    """Recorded: a run that is resumed by a later version must not train on what it chooses by."""
    assert holdout(torch.arange(12) % 2, 0.25)[1].tolist() == [0, 2, 7]


def _open(recipe, augment=PLAIN, **changes):
    options = {"batch_size": BATCH, "seed": 7, "workers": 0, "channels": 1, **changes}
    return open_training(recipe, augment, **options)


@pytest.mark.parametrize("store", STORES)
def test_training_from_memory_and_from_disk_agree(tmp_path, store):
    path = str(store(tmp_path, 40))
    recipe = DataRecipe(path, image_size_px=SIZE, mean=(0.5,), std=(0.25,))
    memory, disk = _open(recipe), _open(replace(recipe, load="disk"))
    _same(memory.feed.batches(0, 20), disk.feed.batches(0, 20))
    _same(memory.validation.batches(3), disk.validation.batches(3))
    assert len(memory.validation) == len(disk.validation) == 4
    assert list(disk.validation.where) == list(memory.validation.where)
    assert memory.preprocessing == disk.preprocessing == GREY
    assert memory.class_names == disk.class_names == ("class 0", "class 1", "class 2")
    assert memory.feed.name == disk.feed.name == path
    pixels, _ = next(iter(memory.feed.batches(0, 1)))
    assert memory.augment(pixels, 1).shape == pixels.shape
    seen = set(_keys(memory.feed.batches(0, 9)))
    assert not seen & set(_keys(memory.validation.batches(9)))


def test_training_with_a_split_to_choose_by(tmp_path):
    path = _table(tmp_path)
    write_parquet(path, [png(n) for n in range(50, 56)], 3, "validation")
    recipe = DataRecipe(str(path), image_size_px=SIZE, val_split="test")
    for load in KINDS:
        training = _open(replace(recipe, load=load))
        assert training.feed.steps_per_epoch == 5
        assert len(training.validation) == 6
        if load == "memory":
            assert (training.preprocessing.mean, training.preprocessing.std) == channel_statistics(
                training.feed.images
            )
        else:
            assert training.preprocessing.mean == (0.449,)
    write_parquet(path, [png(n) for n in range(6)], 2, "validation")
    for load in KINDS:
        with pytest.raises(DataError, match="has 2 classes, the training split has 3"):
            _open(replace(recipe, load=load))


def test_classes_of_the_other_split_are_renumbered(tmp_path):
    for split, names in (("train", "ab"), ("test", "ba")):
        write_parquet(tmp_path, [png(n) for n in range(4)], names, split)
    recipe = DataRecipe(str(tmp_path), image_size_px=SIZE, val_split="test")
    for load in KINDS:
        training = _open(replace(recipe, load=load))
        assert training.validation.class_names == ("a", "b")
        assert torch.cat([y for _, y in training.validation.batches(3)]).tolist() == [1, 0, 1, 0]


def test_training_that_cannot_be_opened(tmp_path):
    path = str(_table(tmp_path))
    with pytest.raises(UsageError, match=r"name the images: --data\.path PATH"):
        _open(DataRecipe())
    with pytest.raises(UsageError, match="the network has 1 input channels"):
        _open(DataRecipe(path, mean=(0.5,) * 3, std=(0.5,) * 3))
    for load in ("memory", "disk"):
        with pytest.raises(UsageError, match=r"val_share 0.01: of 22 images it holds none out"):
            _open(DataRecipe(path, image_size_px=SIZE, val_share=0.01, load=load))
    assert _open(DataRecipe(path, image_size_px=SIZE, val_share=0.0)).validation is None


def test_random_crops_at_decoding_keep_the_detail(tmp_path):
    """A part of the picture at its own resolution, not a part of a small copy of it."""
    folder = tmp_path / "train" / "only"
    folder.mkdir(parents=True)
    for n in range(8):
        (folder / f"{n}.png").write_bytes(png(n, (64, 64)))
    feed = _feed("disk", tmp_path, AugmentRecipe(crop="resized", scale_min=0.02))
    assert feed.resized
    rough = torch.cat([x for x, _ in feed.batches(0, 10)]).float().std((1, 2, 3))
    small = torch.cat([x for x, _ in _feed("disk", tmp_path).batches(0, 2)]).float().std((1, 2, 3))
    assert rough.max() > 1.5 * small.max()
    first, second = (next(feed.batches(step, step + 1))[0] for step in (0, 2))
    assert not set(_keys([(first, 0)])) & set(_keys([(second, 0)])), "new crops every epoch"


def test_images_on_disk_for_evaluation(tmp_path):
    path = _folder(tmp_path, broken=(4, 10))
    source = open_source(path, "train")
    images = ImageDataset.of(source, GREY, workers=2, corrupt_limit=0.1)
    memory = load_images(source, GREY, corrupt_limit=0.1)
    batches = list(images.batches(5))
    assert [len(y) for _, y in batches] == [5, 5, 5, 5, 2]
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    broken = [n for n, place in enumerate(images.where) if place[-7:-4] in ("004", "010")]
    assert (y < 0).nonzero().flatten().tolist() == broken
    assert not x[y < 0].any()
    assert torch.equal(x[y >= 0], memory.images_NCSS)
    assert torch.equal(y[y >= 0], memory.labels_N)
    assert images.skipped.count == 2
    assert images.name == memory.name
    order = torch.tensor([3, 0, 9])
    ((x_, y_),) = images.batches(3, order)
    assert torch.equal(x_, x[order])
    assert torch.equal(y_, y[order])
    part = images.subset(torch.tensor([5, 2])).relabelled([2, 0, 1], ["x", "y", "z"])
    assert len(part) == 2
    assert list(part.where) == [images.where[5], images.where[2]]
    assert part.class_names == ("x", "y", "z")
    ((_, renumbered),) = part.batches(4)
    assert renumbered.tolist() == [[2, 0, 1][y[row]] for row in (5, 2)]
    images.check_fits(GREY, 3)
    with pytest.raises(DataError, match="has 3 classes, the network has 4"):
        images.check_fits(GREY, 4)
    with pytest.raises(
        DataError, match=r"of shape \(1, 8, 8\), the preprocessing says \(3, 8, 8\)"
    ):
        images.check_fits(Preprocessing(SIZE), 3)
    strict = ImageDataset.of(source, GREY)  # 1 %, as everywhere
    with pytest.raises(DataError, match=r"2 of 22 images .*class 1/0(04|10).png"):
        list(strict.batches(5))


def test_images_without_places_stay_so():
    images = ImageDataset(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4), ("a",) * 4)
    assert images.subset(torch.tensor([1])).where == ()


@pytest.mark.parametrize("store", STORES)
def test_an_image_that_does_not_decode_moves_none_between_training_and_choosing(tmp_path, store):
    """Budgets and reports find those held out again from the set's labels alone."""
    path = str(store(tmp_path, 40, broken=(3,)))
    held_back = holdout(open_source(path, "train").labels(), 0.25)[1]
    whole = load_images(open_source(path, "train"), GREY, corrupt_limit=0.1)
    recipe = DataRecipe(
        path, image_size_px=SIZE, mean=(0.5,), std=(0.25,), val_share=0.25, corrupt_limit=0.1
    )
    names = [name for name, row in zip(whole.where, whole.rows, strict=True) if row in held_back]
    for load in ("memory", "disk"):
        validation = _open(replace(recipe, load=load)).validation
        assert [name for name in validation.where if name in whole.where] == names, load
