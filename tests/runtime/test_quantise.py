import logging
import platform

import numpy as np
import pytest
import torch
from helpers import at_once, lively, micro_spec, noise

from dynaslim import Engine
from dynaslim.checkpoint import Checkpoint
from dynaslim.data.images import ImageDataset
from dynaslim.errors import DataError, UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime import quantise
from dynaslim.runtime.accuracy import accuracy_report
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.quantise import ActivationSampler, QuantisedSource
from dynaslim.runtime.variants import RouteVariant, SegmentVariant, segment_variants
from dynaslim.spec import GateSpec, NetSpec, StageSpec
from dynaslim.zoo import ZOO

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

BACKENDS = ("onnxruntime", "openvino")
ROUNDED = ("rounded outputs", "float outputs")
TINY = ZOO["ds_mbnet_tiny"].replace(num_classes=10)


@pytest.fixture(scope="module")
def net():
    return lively(TINY)


@pytest.fixture(scope="module")
def calibration():
    return [noise(TINY, 32, seed=seed) for seed in (2, 3)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request, net, calibration, cache):
    return Engine(
        net, backend=request.param, precision="int8", calibration=calibration, cache_dir=cache
    )


@pytest.fixture(scope="module")
def sources(net, calibration, cache):
    """For either kind of backend, on the disk that `engine` uses too."""
    return {
        kind: QuantisedSource(net, calibration, backend=backend, cache_dir=cache)
        for kind, backend in zip(ROUNDED, BACKENDS, strict=True)
    }


def _relative(a, b):
    """Root of the mean square error, in deviations of b over rows and classes."""
    return float(np.sqrt(np.square(a - b).mean()) / b.std())


def _run(content, x):
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_logits_are_near_those_of_the_network(net, engine):
    """Steps are a range of some 6 deviations over 255, or over 127 for weights of 7 bits, and the
    root mean square of a rounding is a step over sqrt(12): 0.007 of a deviation for the input of a
    convolution and for its output, 0.014 for its weights, together 0.017. After a dozen of them,
    which do not know of each other, that is 0.06; the bound leaves room for ranges that outliers
    made wide."""
    x = noise(TINY, 64, seed=9).numpy()
    for route in (TINY.cheapest_choice, TINY.widest_choice):
        with torch.inference_mode():
            expected = net(torch.from_numpy(x), route).numpy()
        error = _relative(engine.static(route)(x), expected)
        assert 1e-4 < error < 0.1, (route, error)


def test_routes_mostly_agree_with_float(net, engine):
    x = noise(TINY, 128, seed=9).numpy()
    out, expected = engine(x), Engine(net, backend="eager", cache_dir=None)(x)
    assert len(np.unique(expected.routes)) >= 3, "the test needs rows that take different routes"
    same = (out.routes == expected.routes).all(1)
    assert same.mean() > 0.9
    assert _relative(out.logits[same], expected.logits[same]) < 0.1


def test_every_variant_is_near_its_module(net, sources):
    exact = NetworkSource(net)
    for variant in segment_variants(TINY):
        x = sources["rounded outputs"].sample(variant)
        with torch.inference_mode():
            made = exact.module(variant)(torch.from_numpy(x))
        expected = (made[0] if isinstance(made, tuple) else made).numpy()
        for kind in ROUNDED:
            assert _relative(_run(sources[kind].onnx(variant), x), expected) < 0.1, (variant, kind)


def _producers(model):
    return {output: node for node in model.graph.node for output in node.output}


@pytest.mark.parametrize("kind", ROUNDED)
def test_what_is_rounded(net, sources, kind):
    for variant in (SegmentVariant(1, 0, 2), RouteVariant(TINY.widest_choice)):
        content = sources[kind].onnx(variant)
        model = onnx.load_from_string(content)
        onnx.checker.check_model(model)
        made = _producers(model)
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        readers = {}
        for node in model.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node.op_type)
        counts = {"rounded": 0, "depthwise": 0, "first": 0}
        for node in model.graph.node:
            before = [made[name].op_type for name in node.input if name in made]
            if node.op_type == "Gemm":  # of gates and the classifier
                assert "DequantizeLinear" not in before
                assert all(
                    stored[name].data_type == onnx.TensorProto.FLOAT for name in node.input[1:]
                )
            if node.op_type != "Conv":
                continue
            group = next(a.i for a in node.attribute if a.name == "group")
            if group > 1 or node.input[0] == "x":
                counts["depthwise" if group > 1 else "first"] += 1
                assert "DequantizeLinear" not in before[1:] + readers[node.output[0]]
                assert stored[node.input[1]].data_type == onnx.TensorProto.FLOAT
                continue
            counts["rounded"] += 1
            assert before == ["DequantizeLinear"] * 3  # input, weight and bias
            weight = made[node.input[1]]
            kept, scale = (stored[name] for name in weight.input[:2])
            assert kept.data_type == onnx.TensorProto.INT8
            assert scale.dims == [kept.dims[0]]  # per channel
            rounds = readers[node.output[0]] == ["QuantizeLinear"]
            assert rounds == (kind == "rounded outputs")
        first = variant.takes_images
        assert counts["first"] == first
        assert counts["rounded"] == counts["depthwise"] + (not first)
        assert len(content) < 0.6 * len(NetworkSource(net).onnx(variant))


def test_openvino_runs_them_in_integers(sources):
    core = openvino.Core()
    for kind in ROUNDED:
        model = core.read_model(sources[kind].onnx(RouteVariant(TINY.widest_choice)))
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        kinds = [
            op.get_rt_info()["runtimePrecision"].astype(str)
            for op in compiled.get_runtime_model().get_ops()
            if op.get_rt_info()["layerType"].astype(str) == "Convolution"
        ]
        assert kinds.count("u8") + kinds.count("i8") >= len(kinds) // 2 - 1, kinds


def test_onnxruntime_runs_them_in_integers(sources, tmp_path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    content = sources["rounded outputs"].onnx(RouteVariant(TINY.widest_choice))
    ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    integers = sum(
        kind in ("QLinearConv", "NhwcQLinearConv", "QLinearConv_nchwc") for kind in kinds
    )
    quantised = sum(
        node.op_type == "Conv" and node.input[0].endswith("DequantizeLinear_Output")
        for node in onnx.load_from_string(content).graph.node
    )
    assert integers == quantised > 0


@pytest.mark.parametrize("name", ["ds_resnet_cifar", "ds_mobilenet_v2"])
def test_relu_networks(name):
    """Cut-offs become part of the rounding; a residual block's sum stays float."""
    spec = ZOO[name].replace(num_classes=10)
    net, x = lively(spec), noise(spec, 16)
    source = QuantisedSource(net, [x], cache_dir=None)
    content = source.onnx(RouteVariant(spec.cheapest_choice))
    with torch.inference_mode():
        expected = net(x, spec.cheapest_choice).numpy()
    assert _relative(_run(content, x.numpy()), expected) < 0.2
    model = onnx.load_from_string(content)
    made = _producers(model)
    sources = [
        made[node.input[0]].op_type
        for node in model.graph.node
        if node.op_type in ("Relu", "Clip") and node.input[0] in made
    ]
    assert set(sources) <= {"Add", "Conv", "Gemm"}  # a Conv that is not rounded itself


def test_second_engine_neither_compiles_nor_calibrates(
    net, engine, calibration, cache, monkeypatch
):
    engine.warm_up(32)
    engine.static(TINY.widest_choice)(calibration[0])
    monkeypatch.setattr(quantise, "quantise", lambda *_, **__: pytest.fail("calibrated again"))
    monkeypatch.setattr(ActivationSampler, "at", lambda *_: pytest.fail("calibrated again"))
    batches = [torch.cat(calibration)]  # the same images, in other batches
    again = Engine(
        net, backend=engine.backend, precision="int8", calibration=batches, cache_dir=cache
    )
    again.warm_up(32)
    x = noise(TINY, 8, seed=9).numpy()
    np.testing.assert_array_equal(
        again.static(TINY.widest_choice)(x), engine.static(TINY.widest_choice)(x)
    )
    assert again.counts.compiled == []
    assert len(again.counts.cached) >= len(list(segment_variants(TINY)))


def test_key(net, calibration):
    def key(some_net=net, batches=calibration, **options):
        return QuantisedSource(some_net, batches, cache_dir=None, **options).key

    assert key() == key(batches=[batch.numpy() for batch in calibration])
    other = [calibration[0], calibration[1] + 1e-3]
    assert len({key(), key(batches=other), key(lively(TINY, seed=1)), key(images=40),
                key(backend="openvino"), NetworkSource(net).key}) == 6  # fmt: skip


def test_construction_is_lazy_and_stops_reading():
    spec = micro_spec()
    read = []

    def batches():
        for number in range(100):
            read.append(number)
            yield noise(spec, 16, seed=number)

    source = QuantisedSource(lively(spec), batches(), images=40, cache_dir=None)
    assert read == [0, 1, 2]
    assert source.onnx(SegmentVariant(1, 0, 2)) is source.onnx(SegmentVariant(1, 0, 2))
    assert source.precision == "int8"


@pytest.mark.parametrize("kept_bytes", [0, 1 << 28])
def test_sampled_activations_are_what_the_network_computes(monkeypatch, kept_bytes):
    """All images arrive at every variant, from each width before on parts of their own."""
    monkeypatch.setattr("dynaslim.runtime.quantise.KEPT_BYTES", kept_bytes)
    spec = NetSpec(
        "three gates",
        (
            StageSpec((4,), block="conv", stride=2),
            StageSpec((4, 8), gate=GateSpec((0, 1))),
            StageSpec((6, 8), gate=GateSpec((0, 1))),
            StageSpec((6, 8), gate=GateSpec((0, 1))),
        ),
        num_classes=5,
        reduction=1.0,
    )
    net, x = lively(spec, image_size=8), noise(spec, 37, image_size=8)
    sampler = ActivationSampler(NetworkSource(net), x)
    with torch.inference_mode():
        for variant in segment_variants(spec):
            rows = torch.from_numpy(np.concatenate(list(sampler.at(variant))))
            if variant.segment == 0:
                assert torch.equal(rows, x)
                continue
            possible = [net.segment(0, x, 0).features]
            for number in range(1, variant.segment):
                choices = (variant.before,) if number == variant.segment - 1 else (0, 1)
                possible = [net.segment(number, f, b).features for f in possible for b in choices]
            near = torch.stack(
                [(f[:, None] - rows[None]).abs().flatten(2).amax(2) < 1e-3 for f in possible]
            )
            assert near.any(0).sum(0).eq(1).all()
            assert near.any(0).sum(1).eq(1).all()
            shares = near.any(2).sum(1)  # of the paths
            assert len(possible) == 1 or shares.min() >= 37 // len(possible) // 3
    assert not kept_bytes or sampler._bytes > 0
    sampler.forget()
    assert sampler._bytes == 0


def test_threads(calibration):
    spec = micro_spec()
    source = QuantisedSource(lively(spec), [noise(spec, 16)], cache_dir=None)
    wanted = [*segment_variants(spec), RouteVariant(spec.smallest)]
    made = at_once(2 * len(wanted), lambda n: source.onnx(wanted[n // 2]))
    assert all(one is other for one, other in zip(made[::2], made[1::2], strict=True)), "made once"
    assert source._activations._bytes == 0, "features are let go when every segment is made"


def test_quiet_and_clean(tmp_path, monkeypatch, capfd, caplog):
    spec = micro_spec()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = list(logging.getLogger().handlers)
    with caplog.at_level(logging.DEBUG):
        QuantisedSource(lively(spec), [noise(spec, 8)], cache_dir=None).onnx(
            SegmentVariant(1, 0, 0)
        )
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert logging.getLogger().handlers == before
    assert list(tmp_path.iterdir()) == []


def test_saturates(monkeypatch):
    def flags(text, machine="x86_64"):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(quantise, "processor_flags", lambda: text)
        return quantise.saturates()

    assert flags("avx avx2 fma")
    assert flags("")  # unknown: the safe way
    assert not flags("avx2 avx_vnni")
    assert not flags("avx512f avx512_vnni amx_int8")
    assert not flags("asimd asimddp", "aarch64")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration has no images: give batches"),
        ([torch.zeros(0, 3, 32, 32)], "calibration has no images"),
        (7, "calibration of type int: give batches"),
        (torch.zeros(4, 3, 32, 32), r"batch 0 of shape \(3, 32, 32\): give batches \(rows, 3"),
        ([torch.zeros(2, 1, 32, 32)], r"batch 0 of shape \(2, 1, 32, 32\)"),
        ([torch.zeros(2, 3, 1, 1)], "1x1 px"),
        ([torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 40, 40)], "batch 1 of shape .*32 x 32"),
        ([np.zeros((2, 3, 32, 32), np.uint8)], r"batch 0 of torch\.uint8: .* normalised"),
        ([[1, 2]], "batch 0 of type list"),
        ([torch.full((2, 3, 32, 32), torch.nan)], "batch 0: row 0 has values that are not finite"),
    ],
)
def test_calibration_that_is_none(batches, message):
    with pytest.raises(UsageError, match=message):
        QuantisedSource(lively(micro_spec()), batches, cache_dir=None)


def test_refusals(monkeypatch):
    net = lively(micro_spec())
    batches = [noise(micro_spec(), 4)]
    with pytest.raises(UsageError, match="int8 runs on onnxruntime, openvino"):
        Engine(net, backend="eager", precision="int8", calibration=batches, cache_dir=None)
    with pytest.raises(UsageError, match="images 0: must be at least 1"):
        QuantisedSource(net, batches, images=0, cache_dir=None)
    with pytest.raises(UsageError, match="no torch modules; it runs on onnxruntime"):
        QuantisedSource(net, batches, cache_dir=None).module(SegmentVariant(0), torch.float32)
    with pytest.raises(RuntimeError, match=r"net\.eval"):
        QuantisedSource(lively(micro_spec()).train(), batches, cache_dir=None)


# -- accuracy ---------------------------------------------------------------------------------

PREPROCESSING = Preprocessing(32, (0.5,) * 3, (0.25,) * 3)


def _images(count, unreadable=()):
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)

    class Some(ImageDataset):
        def batches(self, batch_size, order=None):
            for x, y in super().batches(batch_size, order):
                yield x, torch.tensor([-1 if int(n) in unreadable else int(n) for n in y])

    return Some(pixels, labels, tuple("abcdefghij"), "some")


def test_accuracy_report(net, calibration, cache):
    images = _images(50)
    reference = Engine(Checkpoint(net), backend="eager", cache_dir=None)
    quantised = Engine(
        net, backend="onnxruntime", precision="int8", calibration=calibration, cache_dir=cache
    )
    report = accuracy_report(reference, quantised, images, PREPROCESSING, batch_size=16, limit=40)
    assert report["images"] == 40
    assert report["routes"] == {
        "cheapest": str(TINY.cheapest_choice),
        "widest": str(TINY.widest_choice),
    }
    assert 0.8 < report["same_route"] <= 1
    assert 0.8 < report["same_prediction"] <= 1
    assert 0 < report["largest_probability_difference"] < 0.5
    x = (images.images_NCSS[:40].float() / 255 - 0.5) / 0.25
    with torch.inference_mode():
        widest = net(x, TINY.widest_choice).argmax(1)
    right = float((widest == images.labels_N[:40]).float().mean())
    assert report["reference"]["top1_widest"] == pytest.approx(right)
    assert report["reference"]["madds"] == pytest.approx(float(reference(x).madds.mean()))
    assert report["reference"]["backend"] == "eager"
    assert report["quantised"]["precision"] == "int8"
    assert report["quantised"].keys() == report["reference"].keys()

    same = accuracy_report(reference, reference, images, PREPROCESSING)
    assert same["images"] == 50
    assert same["same_route"] == same["same_prediction"] == 1
    assert same["largest_probability_difference"] < 1e-6


def test_accuracy_report_leaves_out_what_cannot_be_read(net):
    reference = Engine(net, backend="eager", cache_dir=None)
    bad = _images(20, unreadable={1, 2})
    count = int(((bad.labels_N != 1) & (bad.labels_N != 2)).sum())
    assert accuracy_report(reference, reference, bad, PREPROCESSING)["images"] == count < 20
    with pytest.raises(DataError, match="some: none of its first 20 images can be read"):
        accuracy_report(reference, reference, _images(20, range(10)), PREPROCESSING)
    other = Engine(lively(micro_spec()), backend="eager", cache_dir=None)
    with pytest.raises(UsageError, match="ds_mbnet_tiny and micro: give two of one network"):
        accuracy_report(reference, other, bad, PREPROCESSING)
    with pytest.raises(UsageError, match="limit 0"):
        accuracy_report(reference, reference, bad, PREPROCESSING, limit=0)
