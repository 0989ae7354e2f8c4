"""Networks on the hub, without a network: round trips through folders, a stand-in for the hub."""

import copy
import json
import os
import pickle
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from helpers import METRICS, forced_curve, lively, micro_spec, noise, run_python
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

import dynaslim
from dynaslim.checkpoint import Checkpoint, read, save
from dynaslim.cli import VERBS
from dynaslim.errors import CheckpointError, HubError, UsageError
from dynaslim.interop.hub import Pretrained
from dynaslim.model_names import is_hub_address
from dynaslim.nn import SlimNet
from dynaslim.predict import open_engine
from dynaslim.preprocessing import Preprocessing

NAMES = tuple(f"class {n}" for n in range(5))
RECIPE = {
    "supernet": {"epochs": 3, "data": {"path": "/home/someone/sets/shapes"}},
    "gate": {"targets": (0.4, 0.6), "supernet": "../runs/last.safetensors"},
}


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(
        lively(micro_spec(), image_size=16),
        NAMES,
        Preprocessing(16, crop_fraction=0.875),
        METRICS,
        RECIPE,
        forced_curve(micro_spec(), 16).to_dict(),
    )


def _header(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def _same_network(made, net):
    x = noise(net.spec, 3, image_size=16)
    assert not made.training
    with torch.inference_mode():
        for route in (*net.spec.routing_space, net.spec.largest):
            assert torch.equal(made(x, route), net(x, route))


def test_networks_and_checkpoints_have_the_methods():
    for name in ("save_pretrained", "push_to_hub", "from_pretrained"):
        for kind in (Checkpoint, SlimNet):
            assert getattr(kind, name).__doc__ == getattr(Pretrained, name).__doc__


def test_a_checkpoint_comes_back_whole(checkpoint, tmp_path):
    folder = checkpoint.save_pretrained(tmp_path / "micro")
    assert folder == tmp_path / "micro"
    files = {file.name for file in folder.iterdir()}
    assert files == {"model.safetensors", "config.json", "README.md"}
    made = Checkpoint.from_pretrained(folder)
    _same_network(made.net, checkpoint.net)
    assert made.class_names == NAMES
    assert made.preprocessing == checkpoint.preprocessing
    assert made.metrics == METRICS
    assert made.budget == checkpoint.budget
    assert made.recipe["gate"]["targets"] == [0.4, 0.6]
    assert type(made) is Checkpoint
    # it is our own checkpoint, and any other reader of those reads it
    assert read(folder / "model.safetensors").class_names == NAMES
    assert read(folder).class_names == NAMES
    assert open_engine(folder, "eager").class_names == NAMES
    assert Checkpoint.from_pretrained(folder / "model.safetensors").class_names == NAMES


def test_a_network_alone(checkpoint, tmp_path):
    net = checkpoint.net
    folder = net.save_pretrained(tmp_path / "bare")
    made = SlimNet.from_pretrained(folder)
    assert type(made) is SlimNet
    _same_network(made, net)
    assert Checkpoint.from_pretrained(folder).class_names is None
    folder = made.save_pretrained(
        tmp_path / "described", class_names=NAMES, preprocessing=Preprocessing(16)
    )
    again = Checkpoint.from_pretrained(str(folder))
    assert (again.class_names, again.preprocessing) == (NAMES, Preprocessing(16))
    _same_network(again.net, net)


def test_the_card(checkpoint, tmp_path):
    folder = checkpoint.save_pretrained(
        tmp_path / "micro", license="apache-2.0", dataset="user/shapes"
    )
    header = _header(folder)
    assert header["library_name"] == "dynaslim"
    assert header["pipeline_tag"] == "image-classification"
    assert header["license"] == "apache-2.0"
    assert header["datasets"] == ["user/shapes"]
    assert {"dynaslim", "pytorch"} <= set(header["tags"])
    [entry] = header["model-index"]
    assert entry["name"] == "micro"
    [result] = entry["results"]
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"name": "user/shapes", "type": "user/shapes", "split": "test"}
    assert result["metrics"][:2] == [
        {"type": "accuracy", "value": 0.6, "name": "top-1, dynamic"},
        {"type": "madds", "value": 14000, "name": "multiply-adds per image, dynamic"},
    ]
    assert len(result["metrics"]) == 6
    # the hub's own reader takes it
    assert ModelCard.load(folder / "README.md").data.eval_results[0].metric_value == 0.6

    card = (folder / "README.md").read_text()
    assert "| route 4-12-10 | 0.02 M | 62.50% |" in card
    assert "| **dynamic** (by the gates) | 0.01 M | 60.00% |" in card
    assert "| 0.8 | 0.01 M | 60.00% |" in card
    assert "| 0.6 |" not in card  # cheaper than the cheapest route
    assert "shorter side resized to 18 px" in card
    assert "5 classes: class 0, class 1" in card
    assert "epochs: 3" in card
    assert "someone" not in card  # folders of the machine stay there
    assert "path: shapes" in card
    assert "supernet: last.safetensors" in card
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"]["3"] == "class 3"
    assert config["spec"]["name"] == "micro"


def test_the_instructions_of_the_card_work(checkpoint, tmp_path, monkeypatch):
    folder = checkpoint.save_pretrained(tmp_path / "micro")
    card = (folder / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("Engine(checkpoint)", "Engine(checkpoint, backend='eager')")
    names = {"x": noise(checkpoint.net.spec, 2, image_size=16)}
    exec(code, names)
    assert len(names["madds"]) == 2
    commands = re.findall(r"^    dynaslim (\S+) (\S+)", card, re.MULTILINE)
    assert {verb for verb, _ in commands} == {"info", "predict", "serve"} <= set(VERBS)
    assert {file for _, file in commands} == {"model.safetensors"}


def test_a_card_of_a_network_without_metadata(tmp_path):
    folder = lively(micro_spec(), image_size=16).save_pretrained(tmp_path / "bare")
    header = _header(folder)
    assert header["library_name"] == "dynaslim"
    assert "model-index" not in header
    assert "license" not in header
    card = (folder / "README.md").read_text()
    assert "has neither preprocessing nor names of classes" in card
    for section in ("## Results", "## Budgets", "## Training"):
        assert section not in card


def test_held_out_images_are_called_so(checkpoint, tmp_path):
    folder = checkpoint.save_pretrained(tmp_path / "micro", metrics={"val": METRICS})
    [result] = _header(folder)["model-index"][0]["results"]
    assert result["dataset"] == {"name": "shapes", "type": "shapes", "split": "validation"}
    assert "Top-1 on 40 held-out images" in (folder / "README.md").read_text()


def test_a_card_that_was_written_by_hand_stays(checkpoint, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    checkpoint.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


# -- the hub --------------------------------------------------------------------------------------


class _Hub:
    """In place of the hub's client: keeps what it is given."""

    def __init__(self):
        self.repos = []
        self.files = {}
        self.token = None
        self.options = None

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.repos.append((repo_id, private))
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
        self.options = options
        return f"https://hub.example/{repo_id}/commit/1"


@pytest.fixture
def fake_hub(monkeypatch):
    fake = _Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def test_push(checkpoint, fake_hub, tmp_path):
    address = checkpoint.push_to_hub(
        "user/micro", private=True, token="secret", branch="v1", license="mit", message="first"
    )
    assert address == "https://hub.example/user/micro/commit/1"
    assert fake_hub.repos == [("user/micro", True)]
    assert fake_hub.token == "secret"
    assert fake_hub.options["commit_message"] == "first"
    assert fake_hub.options["revision"] == "v1"
    assert set(fake_hub.files) == {"model.safetensors", "config.json", "README.md"}
    card = fake_hub.files["README.md"].decode()
    assert 'from_pretrained("user/micro")' in card
    assert "dynaslim predict hf://user/micro photos" in card
    assert "license: mit" in card
    assert "secret" not in card
    (tmp_path / "model.safetensors").write_bytes(fake_hub.files["model.safetensors"])
    _same_network(SlimNet.from_pretrained(tmp_path), checkpoint.net)


def test_a_network_is_pushed_with_given_metadata(checkpoint, fake_hub):
    checkpoint.net.push_to_hub("user/micro", class_names=NAMES)
    assert json.loads(fake_hub.files["config.json"])["id2label"]["4"] == "class 4"


def test_nothing_is_sent_of_what_cannot_be_saved(checkpoint, fake_hub):
    broken = copy.deepcopy(checkpoint.net)
    with torch.no_grad():
        broken.classifier.bias[0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        broken.push_to_hub("user/micro")
    with pytest.raises(UsageError, match="not a field of a checkpoint"):
        checkpoint.net.push_to_hub("user/micro", clas_names=NAMES)
    assert fake_hub.repos == []


def test_download(checkpoint, monkeypatch, tmp_path):
    """A repository by name, revision and address, as far as the hub's client."""
    checkpoint.save_pretrained(tmp_path / "there")
    requests = []

    def hf_hub_download(repo_id, filename, revision=None, **options):
        requests.append((repo_id, filename, revision))
        return str(tmp_path / "there" / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    made = Checkpoint.from_pretrained("user/micro", revision="v1")
    assert made.class_names == NAMES
    assert ("user/micro", "model.safetensors", "v1") in requests
    requests.clear()
    assert dynaslim.load("hf://user/micro@v2").spec == checkpoint.net.spec
    assert dynaslim.read(Path("hf://user/micro")).class_names == NAMES
    assert dynaslim.Engine.from_checkpoint("hf://user/micro", backend="eager").class_names == NAMES
    assert requests == [
        ("user/micro", "model.safetensors", "v2"),
        ("user/micro", "model.safetensors", None),
        ("user/micro", "model.safetensors", None),
    ]


def test_addresses():
    assert is_hub_address("hf://user/model")
    assert is_hub_address(Path("hf://user/model@v1"))
    for path in ("user/model", "hf", "hf:", "runs/hf:/x.safetensors", "/hf:/user/model"):
        assert not is_hub_address(path)


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user/model", "user/model: the hub is not reached (offline?)"),
        ("model", "model: the hub is not reached (offline?)"),
        ("no/such/folder", "no/such/folder: no such folder, and no name on the hub"),
        ("a b", "a b: no such folder, and no name on the hub"),
        ("user--x/..", "user--x/..: not a name on the hub"),
    ],
)
def test_nothing_of_that_name(name, message, tmp_path, monkeypatch):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError) as caught:
        SlimNet.from_pretrained(name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_folders_that_are_none(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HubError, match=r"empty: holds no model\.safetensors"):
        SlimNet.from_pretrained(tmp_path / "empty")
    folder = checkpoint.save_pretrained(tmp_path / "micro")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable checkpoint"):
        SlimNet.from_pretrained(folder)
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{")  # for other tools; it is not read back
    _same_network(SlimNet.from_pretrained(folder), checkpoint.net)
    with pytest.raises(UsageError, match="is a file; name a folder to write"):
        checkpoint.save_pretrained(weights)
    with pytest.raises(UsageError, match="2 class names do not fit 5 classes"):
        checkpoint.net.save_pretrained(tmp_path / "new", class_names=("a", "b"))
    assert not (tmp_path / "new").exists()


def test_what_the_hub_refuses(checkpoint, fake_hub, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "HfApi", HfApi)
        with pytest.raises(HubError, match=r"^user/micro: the hub is not reached \(offline"):
            checkpoint.push_to_hub("user/micro")

    def refuse(*_, **__):
        response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
        raise RepositoryNotFoundError("404\nmore lines", response=response)

    monkeypatch.setattr(fake_hub, "create_repo", refuse)
    with pytest.raises(HubError, match=r"user/micro: not on the hub, or private: log in"):
        checkpoint.push_to_hub("user/micro")

    lost = type("ConnectError", (Exception,), {"__module__": "httpx"})
    monkeypatch.setattr(fake_hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(lost("no")))
    with pytest.raises(HubError, match="user/micro: the hub is not reached: no"):
        checkpoint.push_to_hub("user/micro")

    def own(*_, **__):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(fake_hub, "create_repo", own)
    with pytest.raises(KeyError):
        checkpoint.push_to_hub("user/micro")


def test_networks_stay_as_light_as_they_were(checkpoint, tmp_path):
    """The hub's library is imported when it is used, and leaves nothing on a network."""
    path = save(tmp_path / "micro.safetensors", checkpoint)
    script = (
        "import sys, dynaslim, dynaslim.nn, dynaslim.checkpoint\n"
        f"net = dynaslim.load({str(path)!r})\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        f"net.save_pretrained({str(tmp_path / 'folder')!r})\n"
        "assert 'huggingface_hub' in sys.modules\n"
    )
    run_python(script)
    net = SlimNet.from_pretrained(tmp_path / "folder")
    assert set(vars(net)) == set(vars(SlimNet(net.spec)))
    _same_network(pickle.loads(pickle.dumps(net)), checkpoint.net)
