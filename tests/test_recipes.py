import re
from pathlib import Path

import pytest
import yaml

from dynaslim.errors import UsageError
from dynaslim.recipes import GateRecipe, SupernetRecipe, load_recipe, recipe_from_dict
from dynaslim.zoo import get_spec

ROOT = Path(__file__).parents[1]
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
def test_bad_files_say_what_is_wrong(tmp_path, text, message):
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
