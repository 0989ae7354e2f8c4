"""A package's manifest that was altered, by chance or on purpose; packages behind links."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import forced_curve, lively_net, micro_spec, noise

from dynaslim import Checkpoint, Engine, Preprocessing
from dynaslim.errors import UsageError
from dynaslim.runtime.budget import BudgetCurve, BudgetPoint
from dynaslim.runtime.export import export_package
from dynaslim.runtime.package import (
    MANIFEST,
    MOST_BYTES,
    WEIGHTS,
    PackageError,
    manifest_digest,
    open_package,
    with_weights,
)
from dynaslim.runtime.variants import SegmentVariant

EARLIER = Path(__file__).parents[1] / "fixtures" / "package_v1"
PREPARED = Preprocessing(32)


DEFAULTS = {
    field.name
    for kind in (BudgetCurve, BudgetPoint)
    for field in dataclasses.fields(kind)
    if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
}
"""Fields of a curve that may be left out."""


def _curve():
    """One whose second point escalates."""
    curve = forced_curve(micro_spec(), 32)
    points = [dataclasses.replace(point, top1_selecting=point.top1) for point in curve.points]
    points[1] = dataclasses.replace(points[1], tau=0.2, escalate_to=(1, 2), escalated=0.25)
    return dataclasses.replace(curve, points=tuple(points), reporting_images=50)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package with all that one can hold; not to be changed."""
    folder = tmp_path_factory.mktemp("manifests") / "micro"
    checkpoint = Checkpoint(
        lively_net("micro"),
        class_names=tuple(f"class {n}" for n in range(5)),
        preprocessing=PREPARED,
        budget=_curve().to_dict(),
        metrics={"val": {"top1": 0.7}},
    )
    export_package(checkpoint, folder, notes={"made": "for a test"})
    return folder


@pytest.fixture
def copied(package, tmp_path):
    """A package that a test may damage."""
    return Path(shutil.copytree(package, tmp_path / "copy"))


def _refused(folder, text):
    """The one line with which a package of this manifest is refused; None if it is accepted."""
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    (folder / MANIFEST).write_bytes(text)
    try:
        open_package(folder)
    except PackageError as error:
        message = str(error)
        assert message.startswith(str(folder)), message
        assert message.isprintable(), message
        assert len(message) < 600, message
        return message
    return None


def _hashed(manifest):
    """A manifest whose hash fits, as one who means harm would write it."""
    return {**manifest, "sha256": manifest_digest(manifest)}


def _places(value, path=()):
    """Where every value of a manifest stands, containers too."""
    if path:
        yield path
    for key, held in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(held, dict | list):
            yield from _places(held, (*path, key))
        else:
            yield (*path, key)


def _at(manifest, path):
    for key in path:
        manifest = manifest[key]
    return manifest


def _with(manifest, path, value):
    made = copy.deepcopy(manifest)
    _at(made, path[:-1])[path[-1]] = value
    return made


def _without(manifest, path):
    made = copy.deepcopy(manifest)
    del _at(made, path[:-1])[path[-1]]
    return made


def _alterations(manifest, path):
    """What a value may be altered to: a little, in type, and by what is hostile."""
    value = _at(manifest, path)
    others = [None, "", "x", 0, -1, 1, 1.5, 2**63, True, False, [], {}, [value], {"x": value}]
    if isinstance(value, str):
        others += [value + " ", value[1:], value.upper(), f"\x1b[2J{value}"]
    elif isinstance(value, int | float):
        others += [value + 1, value * 1.0000001, -value, str(value)]
    elif isinstance(value, list):
        others += [value[1:], value[::-1], [*value, *value[:1]]]
    elif value is not None:
        others += [{**value, "unknown": 1}]
    for other in others:
        if json.dumps(other) != json.dumps(value):
            yield _with(manifest, path, other)
    yield _without(manifest, path)


def test_no_value_of_a_manifest_can_be_altered(copied):
    manifest = json.loads((copied / MANIFEST).read_text())
    altered = 0
    for path in _places(manifest):
        for other in _alterations(manifest, path):
            altered += 1
            assert _refused(copied, json.dumps(other)) is not None, (path, _at(other, path[:-1]))
    assert altered > 3000
    assert _refused(copied, json.dumps(manifest)) is None, "what is not altered is taken"
    spaced = json.dumps(manifest, indent=7, sort_keys=True)
    assert _refused(copied, spaced) is None, "spaces and order are no values"


def test_values_that_cannot_be_are_refused_with_a_hash_that_fits(copied):
    """Every value as one of another type, hostile, and left out; notes and metrics are free."""
    manifest = json.loads((copied / MANIFEST).read_text())
    may_be_null = [("class_names",), ("preprocessing",), ("budget",)]
    tried = 0
    for path in _places(manifest):
        if path[0] in ("metrics", "notes", "sha256") and len(path) > 1:
            continue
        value = _at(manifest, path)
        wrong = ["\x1b[2J", {"x": 1}, [[1]], True if value is not True else 3]
        if path not in may_be_null and value is not None and path[0] != "budget":
            wrong.append(None)
        if isinstance(value, int | float) and path[0] != "budget":
            wrong += [2**63, -1e300, str(value)]
        elif isinstance(value, str):
            wrong += [5, value + "\n"]
        if isinstance(value, bool):
            wrong = [other for other in wrong if not isinstance(other, bool)] + [3]
        if path == ("sha256",):
            wrong = ["0" * 64, None, 5]
        if value in (None, {}) or path[0] in ("metrics", "notes"):
            wrong = [other for other in wrong if not isinstance(other, dict)]
        if path[-1] == "gate" and value is not None:
            wrong.remove(None)  # a network of one gate less, which then has other forms
            assert _refused(copied, json.dumps(_hashed(_with(manifest, path, None))))
        for other in wrong:
            made = _with(manifest, path, other)
            made = made if path == ("sha256",) else _hashed(made)
            tried += 1
            assert _refused(copied, json.dumps(made)) is not None, (path, other)
        if path[0] == "budget" and path[-1] in DEFAULTS:
            continue  # curves of earlier versions have none
        if not isinstance(path[-1], int):
            made = _without(manifest, path)
            made = made if path == ("sha256",) else _hashed(made)
            assert _refused(copied, json.dumps(made)) is not None, (path, "left out")
    assert tried > 500


def _prepared(**changes):
    return {"preprocessing": {**PREPARED.to_dict(), **changes}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "package version 3, this dynaslim reads versions 1 to 2; install"),
        ({"version": True}, "package version True, this dynaslim reads"),
        ({"version": 1}, "not valid: has no 'routes'"),
        ({"format": "other"}, "not the manifest of a dynaslim package"),
        ({"precision": "fp64"}, "precision 'fp64': invalid enum value|precision: .*'fp64'"),
        ({"spec": {"name": "x"}}, "not valid: spec: has no 'stages'"),
        ({"forms": {}}, "forms: has no 'segment0_0_0'"),
        ({"files": {}}, r"segment0_0_0\.onnx is not among its files"),
        ({"files": 3}, "files 3: expected object, got int"),
        ({"class_names": ["a", "b"]}, "manifest.json: .*class_names: must be a list of 5 names"),
        ({"class_names": "abcde"}, "class_names 'abcde': expected array | null, got str"),
        ({"class_names": [1, 2, 3, 4, 5]}, r"class_names\[0\] 1: expected str, got int"),
        ({"class_names": ["\x1b[2J", *"abcd"]}, r"text '\\x1b\[2J': has the control character"),
        ({"class_names": ["\u202eexe", *"abcd"]}, "has the control character"),
        ({"class_names": ["a" * 2000, *"abcd"]}, "expected str of length <= 1000"),
        ({"budget": {}}, "manifest.json: budget curve: has no 'image_size_px'"),
        ({"budget": 3}, "budget 3: expected object | null, got int"),
        ({"more": 1}, "unknown field more"),
        (_prepared(mean=[2**63, 0, 0]), "mean .*: must be that of values in 0..1"),
        (_prepared(mean=["0.5", 0, 0]), r"preprocessing.mean\[0\] '0.5': expected float, got str"),
        (_prepared(mean=[True, 0, 0]), "expected float, got bool"),
        (_prepared(std=[0, 0, 0]), "std .*: must be positive"),
        (_prepared(std=[1e-40] * 3), "std .*: must be positive"),
        (_prepared(mean=[0.5], std=[0.5]), "preprocessing: is for 1 channels, micro takes 3"),
        (_prepared(image_size_px=0), "image_size_px 0"),
        (_prepared(image_size_px=1 << 40), "image_size_px 1099511627776: must be"),
        (_prepared(image_size_px=1), "image size 1x1 px: micro divides it by 4"),
        (_prepared(crop_fraction=2), "crop_fraction 2.0: must be above 0 and at most 1"),
    ],
)
def test_a_manifest_that_is_not_valid(copied, change, message):
    manifest = json.loads((copied / MANIFEST).read_text())
    refusal = _refused(copied, json.dumps(_hashed({**manifest, **change})))
    assert re.search(message, refusal), refusal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"format": ' + '{"x":' * 100_000, "nested too deeply"),
        ('{"format": ' + "9" * 5000 + "}", "a number of 5000 digits: must have at most 20"),
        ('{"format": NaN}', "NaN: must be a finite number"),
        ('{"format": 1e999}', "1e999: must be a finite number"),
        ('{"format": "dynaslim-package", "format": "x"}', "has the key 'format' twice"),
        ('{"format": "\\ud800"}', "has the control character"),
        ('{"\\u001b]0;x": 1}', "has the control character"),
        ("{", "not JSON"),
        ("[]", "not the manifest of a dynaslim package"),
        ('"' + "x" * MOST_BYTES + '"', "larger than 16 MB, which no manifest is"),
        (b'\xff\xfe{"x": 1}', "not JSON: 'utf-8' codec can't decode"),
    ],
)
def test_hostile_text(copied, text, message):
    assert message in _refused(copied, text)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "more.onnx"])
def test_a_manifest_cannot_name_other_files(copied, name):
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    assert "is not a file of the package" in _refused(copied, json.dumps(_hashed(manifest)))
    del manifest["files"][name]
    manifest["forms"]["segment0_0_0"] = name
    assert "forms: segment0_0_0 is in" in _refused(copied, json.dumps(_hashed(manifest)))


def test_names_that_no_terminal_should_show_are_not_exported(tmp_path):
    names = ("a", "b", "c", "d", "\x1b[31mred")
    with pytest.raises(UsageError, match="has the control character"):
        export_package(Checkpoint(lively_net("micro"), class_names=names), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fine = ("naïve", "日本語", "a\u200db", "crème brûlée 🍮", "x\u00a0y")
    export_package(Checkpoint(lively_net("micro"), class_names=fine), tmp_path / "out")
    assert open_package(tmp_path / "out").class_names == fine


# -- of earlier versions --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_package_of_version_1_opens_and_answers(backend):
    engine = Engine.from_package(EARLIER, backend=backend, cache_dir=None)
    x = noise(micro_spec(), 9).numpy()
    theirs = Engine(lively_net("micro"), backend="eager", cache_dir=None)(x)
    ours = engine(x)
    assert ours.routes.tolist() == theirs.routes.tolist()
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-3 * abs(theirs.logits).max())
    assert engine.class_names == tuple(f"class {n}" for n in range(5))


def test_a_package_of_version_1_is_validated_too(tmp_path):
    folder = Path(shutil.copytree(EARLIER, tmp_path / "copy"))
    manifest = json.loads((folder / MANIFEST).read_text())
    assert _refused(folder, json.dumps(manifest)) is None
    for path in _places(manifest):
        if path[0] in ("metrics", "notes", "routes", "input", "parity") and len(path) > 1:
            continue
        if not isinstance(path[-1], int):
            assert _refused(folder, json.dumps(_without(manifest, path))) is not None, path
        refusal = _refused(folder, json.dumps(_with(manifest, path, {"x": "\x1b"})))
        assert refusal is not None, path


# -- behind links ---------------------------------------------------------------------------------


@pytest.fixture
def linked(package, tmp_path):
    """A package as the hub's cache has it: a link for each file, to one named by a number."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(package.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    return snapshot


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "auto"])
def test_a_package_behind_links_answers(backend, cache, package, linked, tmp_path):
    x = noise(micro_spec(), 9).numpy()
    options = {"backend": backend, "cache_dir": tmp_path / "cache" if cache else None}
    expected = Engine.from_package(package, backend="onnxruntime", cache_dir=None)(x)
    for folder in (linked, package, linked):  # programs of one serve the other
        out = Engine.from_package(folder, **options)(x)
        assert out.routes.tolist() == expected.routes.tolist()
        np.testing.assert_allclose(out.logits, expected.logits, atol=1e-4)


def test_a_link_to_a_folder(package, tmp_path):
    (tmp_path / "link").symlink_to(package)
    source = open_package(tmp_path / "link").source
    assert source.onnx(SegmentVariant(0)) == package.resolve() / "segment0_0_0.onnx"


def test_what_links_lead_to_is_checked(linked, tmp_path):
    target = (linked / WEIGHTS).resolve()
    content = target.read_bytes()
    target.write_bytes(bytes(len(content)))
    with pytest.raises(PackageError, match=f"{WEIGHTS}: does not match its SHA-256"):
        open_package(linked)
    target.write_bytes(content)
    package = open_package(linked)
    other = tmp_path / "other"
    other.write_bytes(bytes(len(content)))
    (linked / WEIGHTS).unlink()
    (linked / WEIGHTS).symlink_to(other)  # after the check: what was checked is what is opened
    assert onnx.load_from_string(package.source.onnx(SegmentVariant(1, 0, 0))).graph.initializer
    target.unlink()
    with pytest.raises(PackageError, match=f"{WEIGHTS}: missing; its package is not complete"):
        package.source.onnx(SegmentVariant(0))
    (linked / WEIGHTS).unlink()
    (linked / WEIGHTS).symlink_to(linked / WEIGHTS)
    with pytest.raises(PackageError, match=f"{WEIGHTS}: missing"):
        open_package(linked)


def test_weights_inside_are_those_that_were_outside(package):
    for path in package.glob("*.onnx"):
        whole = onnx.load_from_string(with_weights(path.read_bytes(), package / WEIGHTS))
        expected = onnx.load(path)  # which reads the file of weights
        onnx.checker.check_model(whole)
        assert whole.graph.node == expected.graph.node
        for ours, theirs in zip(whole.graph.initializer, expected.graph.initializer, strict=True):
            assert ours.name == theirs.name
            np.testing.assert_array_equal(
                onnx.numpy_helper.to_array(ours), onnx.numpy_helper.to_array(theirs)
            )
