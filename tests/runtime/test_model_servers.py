"""Model repositories as their servers read them; the servers themselves are not here."""

import importlib.util
import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import openvino
import pytest
from google.protobuf import json_format, text_format
from helpers import lively, micro_spec, png

from dynaslim.checkpoint import Checkpoint
from dynaslim.errors import UsageError
from dynaslim.preprocessing import Preprocessing
from dynaslim.runtime.engine import Engine
from dynaslim.runtime.model_servers import export_ovms, export_triton

CLASSES = tuple("abcde")


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(lively(micro_spec(), image_size=16), CLASSES, Preprocessing(16))


@pytest.fixture(scope="module")
def images():
    """Normalised images (B, C, S, S) that the gates can distinguish."""
    rng = np.random.default_rng(0)
    rough = rng.standard_normal((12, 3, 16, 16)) * rng.uniform(0, 2, (12, 1, 1, 1))
    return (rough + rng.standard_normal((12, 3, 1, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def expected(checkpoint, images):
    """What the engine answers."""
    found = Engine(checkpoint.net, backend="onnxruntime", cache_dir=None)(images)
    assert len({tuple(row) for row in found.routes.tolist()}) > 2, "the test needs several routes"
    return found


def row_by_row(run, images):
    """Logits and choices of images that are run one by one."""
    logits, choices = zip(*(run(row[None]) for row in images), strict=True)
    return np.concatenate(logits), np.concatenate(choices)


def test_openvino_runs_what_its_server_reads(checkpoint, images, expected, tmp_path):
    assert export_ovms(checkpoint, tmp_path / "models") < 1e-4
    config = json.loads((tmp_path / "models" / "config.json").read_text())
    ((model,),) = [[one["config"] for one in config["model_config_list"]]]
    assert model == {"name": "micro", "base_path": "micro"}
    place = tmp_path / "models" / model["base_path"]
    assert [file.relative_to(place).as_posix() for file in place.rglob("*.*")] == ["1/model.onnx"]
    compiled = openvino.Core().compile_model(place / "1" / "model.onnx", "CPU")
    assert [(one.any_name, list(one.shape)) for one in compiled.inputs] == [("x", [1, 3, 16, 16])]

    def run(x):
        made = compiled({"x": x})
        return made["logits"], made["choices"]

    logits, choices = row_by_row(run, images)
    assert choices.tolist() == expected.routes.tolist()
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=2e-4)


def test_a_repository_of_several_models(checkpoint, tmp_path):
    export_ovms(checkpoint, tmp_path, "first")
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "config.json").read_text()), "monitoring": 1})
    )
    export_ovms(checkpoint, tmp_path, "second")
    config = json.loads((tmp_path / "config.json").read_text())
    assert [one["config"]["name"] for one in config["model_config_list"]] == ["first", "second"]
    assert config["monitoring"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "first", "second"]
    with pytest.raises(UsageError, match="first: is there already; remove it, or give another"):
        export_ovms(checkpoint, tmp_path, "first")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="not a config of OpenVINO Model Server"):
        export_ovms(checkpoint, tmp_path, "third")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json: not JSON"):
        export_ovms(checkpoint, tmp_path, "third")
    assert not (tmp_path / "third").exists()
    with pytest.raises(UsageError, match="is a file; name a folder"):
        export_ovms(checkpoint, tmp_path / "config.json")
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*")), "nothing is left behind"


# -- Triton ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("triton") / "models"
    assert export_triton(checkpoint, root, "digits") < 1e-4
    return root


@pytest.fixture(scope="module")
def config_class():
    """The message of a `config.pbtxt`, of Triton's client; what imports gRPC is left out."""
    client = importlib.util.find_spec("tritonclient")
    if client is None:
        pytest.skip("tritonclient is not installed: its schema checks the config")
    path = f"{client.submodule_search_locations[0]}/grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig


def config_of(repository, name, config_class):
    """A model's config; text_format refuses fields and values that the schema does not have."""
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), config_class())


def test_the_layout_of_a_triton_repository(repository):
    found = {path.relative_to(repository).as_posix() for path in repository.rglob("*.*")}
    files = {name for name in found if name.startswith("digits/1/package/")}
    assert "digits/1/package/manifest.json" in files
    assert found - files == {
        "digits/config.pbtxt", "digits/labels.txt", "digits/1/model.py",
        "digits_single/config.pbtxt", "digits_single/1/model.onnx",
    }  # fmt: skip
    assert (repository / "digits" / "labels.txt").read_text().split() == list(CLASSES)


def test_triton_s_configs_fit_its_schema_and_the_models(repository, config_class, checkpoint):
    config = config_of(repository, "digits", config_class)
    assert (config.name, config.backend, config.max_batch_size) == ("digits", "python", 32)
    assert config.HasField("dynamic_batching")
    assert [(one.kind, one.count) for one in config.instance_group] == [(2, 1)]  # KIND_CPU
    inputs = {one.name: (one.data_type, list(one.dims), one.optional) for one in config.input}
    assert inputs == {"x": (11, [3, 16, 16], True), "image": (13, [1], True)}  # FP32, STRING
    assert config.output[0].label_filename == "labels.txt"
    single = config_of(repository, "digits_single", config_class)
    assert (single.name, single.platform) == ("digits_single", "onnxruntime_onnx")
    session = onnxruntime.InferenceSession(repository / "digits_single" / "1" / "model.onnx")
    assert [(one.name, list(one.dims)) for one in single.input] == [
        (one.name, one.shape) for one in session.get_inputs()
    ]
    assert [(one.name, list(one.dims)) for one in single.output] == [
        (one.name, one.shape) for one in session.get_outputs()
    ]


class Tensor:
    """As `pb_utils.Tensor` is documented."""

    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class Request:
    """As `pb_utils.InferenceRequest` is documented."""

    def __init__(self, parameters=None, outputs=("logits", "route"), **inputs):
        self._inputs = [Tensor(name, array) for name, array in inputs.items()]
        self._parameters, self._outputs = parameters, list(outputs)

    def inputs(self):
        return self._inputs

    def parameters(self):
        return json.dumps(self._parameters or {})

    def requested_output_names(self):
        return self._outputs


@pytest.fixture
def triton(repository, config_class, monkeypatch):
    """The model as Triton's Python backend has it: loaded by its file, with a stand-in module."""
    stand_in = SimpleNamespace(
        Tensor=Tensor,
        TritonError=lambda message: SimpleNamespace(message=lambda: message),
        InferenceResponse=lambda output_tensors, error=None: SimpleNamespace(
            output_tensors=lambda: output_tensors, error=lambda: error
        ),
        get_input_tensor_by_name=lambda request, name: next(
            (one for one in request.inputs() if one.name() == name), None
        ),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    monkeypatch.setenv("DYNASLIM_CACHE", str(repository.parent / "cache"))
    place = repository / "digits"
    model = runpy.run_path(str(place / "1" / "model.py"))["TritonPythonModel"]()
    config = config_of(repository, "digits", config_class)
    written = json_format.MessageToDict(config, preserving_proto_field_name=True)
    model.initialize(
        {
            "model_config": json.dumps(written),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_repository": str(place),
            "model_version": "1",
            "model_name": "digits",
        }
    )
    yield model
    model.finalize()


def outputs_of(response):
    assert response.error() is None, response.error().message()
    return {one.name(): one.as_numpy() for one in response.output_tensors()}


def test_triton_s_python_model_routes_the_requests_of_a_batch(
    triton, repository, config_class, checkpoint, images, expected
):
    config = config_of(repository, "digits", config_class)
    kinds = {"TYPE_FP32": "f4", "TYPE_FP64": "f8", "TYPE_INT64": "i8", "TYPE_BOOL": "?"}
    names = [one.name for one in config.output]
    parts = (images[:1], images[1:6], images[6:])
    calls, engine = [], triton._engine
    triton._engine = Counted(engine, calls)
    responses = triton.execute([Request(x=part, outputs=names) for part in parts])
    triton._engine = engine
    assert calls == [12], "all requests are one batch"
    made = [outputs_of(response) for response in responses]
    for one in config.output:
        for part, outputs in zip(parts, made, strict=True):
            array = outputs[one.name]
            assert list(array.shape) == [len(part), *one.dims]
            kind = config_class.DESCRIPTOR.file.enum_types_by_name["DataType"]
            name = kind.values_by_number[one.data_type].name
            assert array.dtype == (object if name == "TYPE_STRING" else kinds[name])
    whole = {name: np.concatenate([outputs[name] for outputs in made]) for name in names}
    np.testing.assert_allclose(whole["logits"], expected.logits, rtol=0, atol=2e-4)
    assert whole["choices"].tolist() == expected.routes.tolist()
    assert whole["madds"][:, 0].tolist() == expected.madds.tolist()
    assert whole["label"][:, 0].tolist() == expected.logits.argmax(1).tolist()
    routes = [str(checkpoint.net.spec.route_at(path)) for path in expected.routes.tolist()]
    assert [text.decode() for text in whole["route"][:, 0]] == routes


class Counted:
    """An engine that notes the size of its batches."""

    def __init__(self, engine, calls):
        self._engine, self._calls = engine, calls

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def __call__(self, x, **options):
        self._calls.append(len(x))
        return self._engine(x, **options)


def test_triton_s_python_model_takes_files_and_names_what_is_wrong(triton, images):
    file = png(0, (20, 20), "RGB")
    files = np.array([[file], [file]], object)
    bad = images[:1].copy()
    bad[0, 0, 0, 0] = np.nan
    responses = triton.execute(
        [
            Request(image=files),
            Request(image=np.array([[file], [b"no picture"]], object)),
            Request(x=bad),
            Request(),
            Request(x=images[:1], image=files[:1]),
            Request(x=images[:1], parameters={"budget": "0.5"}),
            Request(x=images[:1], parameters={"top_k": 3}),
            Request(x=images[:1], parameters={"escalate": "never"}, outputs=["logits"]),
        ]
    )
    assert outputs_of(responses[0])["logits"].shape == (2, 5)
    assert list(outputs_of(responses[7])) == ["logits"]
    messages = [one.error().message() for one in responses[1:7]]
    wanted = [
        "image 1: not an image", "input x: has values that are not finite",
        "inputs none: give x or image", "inputs x, image: give x or image",
        "no budget curve", "parameter 'top_k': there are budget, escalate",
    ]  # fmt: skip
    for message, part in zip(messages, wanted, strict=True):
        assert part in message
        assert "\n" not in message
