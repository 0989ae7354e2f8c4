"""Specs in files: what stands for a name of the zoo."""

import json

import pytest
from helpers import ZOO_NAMES, micro_spec

import dynaslim
from dynaslim import cli
from dynaslim.errors import UsageError
from dynaslim.zoo import ZOO, get_spec, write_spec

BY_HAND = """
name: mine
num_classes: 3
stages:
  - {widths: [4], block: conv, stride: 2}
  - widths: [4, 8]
    gate: {choices: [0, 1]}
"""


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_a_file_gives_the_spec_back(name, tmp_path):
    path = write_spec(tmp_path / f"{name}.yaml", ZOO[name])
    assert get_spec(str(path)) == ZOO[name]
    assert get_spec(str(path), num_classes=3) == ZOO[name].replace(num_classes=3)
    assert "kernel: 3" not in path.read_text(), "defaults are left out"


def test_written_by_hand(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(BY_HAND)
    net = dynaslim.create_model(str(path))
    assert net.spec.name == "mine"
    assert [route.widths for route in net.spec.routing_space] == [(4, 4), (4, 8)]
    assert net.classifier.out_features == 3


def test_info_of_a_file_is_that_of_the_entry(tmp_path, capsys):
    path = write_spec(tmp_path / "again.yaml", ZOO["ds_mbnet_tiny"])
    printed = []
    for model in (str(path), "ds_mbnet_tiny"):
        assert cli.run(["info", model, "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]


def test_profile_takes_a_file(tmp_path, capsys):
    path = write_spec(tmp_path / "micro.yaml", micro_spec())
    table = tmp_path / "table.json"
    argv = ["profile", str(path), str(table), "--backend", "eager", "--batch-size", "1"]
    assert cli.run([*argv, "--rounds", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ms"]) == 9
    assert json.loads(table.read_text())["model"] == "micro"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected the spec of a network"),
        ("epochs: 3\n", "expected the spec of a network"),
        ("a: [1,\n", "not YAML"),
        ("name: a\nstages: []\n", "a network needs at least one stage"),
        (
            "name: a\nstages: [{block: conv}]\n",
            "not a network spec: stages\\[0\\]: has no 'widths'",
        ),
        ("name: a\nwidth: 3\nstages: [{widths: [4], block: conv}]\n", "width"),
    ],
)
def test_errors_of_bad_files_name_the_cause(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        get_spec(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_name_that_is_none(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere.yaml: cannot be read: No such file"):
        get_spec(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(UsageError, match=r"a spec file is called \.yaml or \.yml"):
        write_spec(tmp_path / "spec.json", micro_spec())
    with pytest.raises(UsageError, match=r"did you mean ds_mbnet\?.* or name a file of a spec"):
        get_spec("ds_mbnett")
