import re
from pathlib import Path

import pytest
import yaml

from dynaslim.errors import UsageError
from dynaslim.recipes import (
    AugmentRecipe,
    DataRecipe,
    ExpectedRecipe,
    GateRecipe,
    OptimRecipe,
    SgsRecipe,
    SupernetRecipe,
    load_recipe,
    recipe_from_dict,
)
from dynaslim.zoo import get_spec

ROOT = Path(__file__).parents[1]
FROZEN = {"dropout": 0.0, "target": "labels", "trunk_views": 1}  # the trunk
FILES = sorted((ROOT / "recipes").glob("*.yaml"))


def _kind(path):
    return {"supernet": SupernetRecipe, "gate": GateRecipe}[path.stem.rsplit("_", 1)[1]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_comes_back(path):
    recipe = load_recipe(_kind(path), path)
    assert recipe_from_dict(_kind(path), recipe.to_dict()) == recipe
    through_yaml = yaml.safe_load(yaml.safe_dump(recipe.to_dict()))
    assert recipe_from_dict(_kind(path), through_yaml) == recipe
    if isinstance(recipe, SupernetRecipe):
        size = recipe.data.image_size_px
        get_spec(recipe.model).check_image_size(size, size)


def test_there_are_pairs_of_recipes():
    stems = {path.stem for path in FILES}
    assert {"imagenet_ds_mbnet_supernet", "imagenet_ds_mbnet_gate"} <= stems
    assert all(stem.replace("_supernet", "_gate") in stems for stem in stems)


def test_imagenet_is_the_papers():
    supernet = load_recipe(SupernetRecipe, ROOT / "recipes" / "imagenet_ds_mbnet_supernet.yaml")
    assert (supernet.epochs, supernet.batch_size, supernet.optim.lr) == (150, 512, 0.08)
    assert supernet.optim.warmup_share * supernet.epochs == pytest.approx(5, abs=0.01)
    gate = load_recipe(GateRecipe, ROOT / "recipes" / "imagenet_ds_mbnet_gate.yaml")
    assert (gate.epochs, gate.sgs.cost_weight, gate.sgs.cost_scale) == (30, 0.5, 1e9)
    assert (gate.optim.lr, gate.optim.weight_decay) == (0.08, 0.01)


@pytest.mark.parametrize("document", ["README.md", "docs/training.md"])
def test_recipes_and_flags_in_documents_exist(document):
    text = (ROOT / document).read_text()
    for path in re.findall(r"recipes/\w+\.yaml", text):
        assert (ROOT / path).exists(), path
    flat = _flags(SupernetRecipe().to_dict()) | _flags(GateRecipe().to_dict())
    for flag in re.findall(r"--((?:optim|data|augment|sgs|expected)\.[\w-]+)", text):
        assert flag.replace("-", "_") in flat, flag


def _flags(values, prefix=""):
    found = set()
    for key, value in values.items():
        found |= _flags(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\nlearning_rate: 1\n", "learning_rate"),
        ("optim:\n  speed: 1\n", "speed"),
        ("epochs: many\n", "epochs"),
        ("epochs: 0\n", "epochs 0: must be at least 1"),
        ("- 1\n- 2\n", "expected keys and values"),
        ("a: [1,\n", "not YAML"),
    ],
)
def test_errors_of_bad_files_name_the_cause(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(SupernetRecipe, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_recipe(GateRecipe, tmp_path / "nowhere.yaml")


def test_a_nested_group_keeps_its_parents_defaults():
    """Changing one field of the gate's optimizer must not bring the supernet's others in."""
    recipe = recipe_from_dict(GateRecipe, {"optim": {"clip_norm": 1.0}})
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.clip_norm) == (0.08, 0.01, 1)


@pytest.mark.parametrize("value", [0.4, "0.4", (0.4,), [0.4], "0.4,"])
def test_targets_are_numbers_however_written(value):
    assert GateRecipe(targets=value).targets == (0.4,)


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        (SupernetRecipe, {"epochs": 0}, "epochs 0"),
        (SupernetRecipe, {"batch_size": 1}, "batch_size 1: BN needs at least 2"),
        (SupernetRecipe, {"dropout": 1.0}, "dropout 1.0"),
        (SupernetRecipe, {"ema_decay": 1.0}, "ema_decay 1.0"),
        (
            SupernetRecipe,
            {"target": "labels", "label_weight": 0.5},
            "label_weight and label_warmup",
        ),
        (SupernetRecipe, {"label_warmup": 2}, "label_warmup 2"),
        (SupernetRecipe, {"label_weight": -1}, "label_weight -1"),
        (SupernetRecipe, {**FROZEN, "augment": AugmentRecipe(mixup=0.2)}, "need the images"),
        (SupernetRecipe, {**FROZEN, "compile": True}, "leave one of the two out"),
        (SupernetRecipe, {"patience": 0}, "patience 0"),
        (SupernetRecipe, {"trunk_views": -1}, "trunk_views -1"),
        (OptimRecipe, {"lr": 0.0}, "lr 0.0"),
        (OptimRecipe, {"accumulate": 0}, "accumulate 0"),
        (OptimRecipe, {"clip_norm": 0.0}, "clip_norm 0.0"),
        (OptimRecipe, {"warmup_share": 1.0}, "warmup_share 1.0"),
        (SgsRecipe, {"tau": 0.0}, "tau 0.0"),
        (SgsRecipe, {"easy_share": 1.0}, "easy_share 1.0"),
        (SgsRecipe, {"cost_scale": 0.0}, "cost_scale 0.0"),
        (GateRecipe, {"targets": "0.4,x"}, "targets 0.4,x: expected numbers such as 0.4,0.6,0.8"),
        (GateRecipe, {"targets": (0.4, 1.2)}, "each above 0, at most 1"),
        (GateRecipe, {"augment": AugmentRecipe(mixup=0.2)}, "no route of its own"),
        (DataRecipe, {"load": "stream"}, "a stream holds nothing back"),
        (DataRecipe, {"mean": (0.5,)}, "give both or neither"),
        (ExpectedRecipe, {"views": 0}, "views 0"),
    ],
)
def test_recipes_check_themselves(recipe, change, message):
    with pytest.raises(UsageError, match=message):
        recipe(**change)
