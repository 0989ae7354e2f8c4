"""Recipes from files and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dynaslim._files import read_yaml
from dynaslim.errors import UsageError
from dynaslim.recipes.gate import GateRecipe
from dynaslim.recipes.supernet import SupernetRecipe

Recipe = TypeVar("Recipe", SupernetRecipe, GateRecipe)


def load_recipe(kind: type[Recipe], path: str | Path) -> Recipe:
    """Read a recipe from a YAML file; what it does not say takes the defaults.

    Raises:
        UsageError: if the file cannot be read, has keys that a recipe has not, or values that do
            not fit.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected keys and values of a recipe")
    try:
        return recipe_from_dict(kind, data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def recipe_from_dict(kind: type[Recipe], data: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        UsageError: for unknown keys or values that do not fit.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "recipe")
    try:
        parsed = parser.parse_object({"recipe": dict(data)})
    except (jsonargparse.ArgumentError, TypeError, KeyError) as error:
        raise UsageError(_first_lines(str(error))) from None
    built: Recipe = parser.instantiate(parsed).recipe
    return built


def _first_lines(text: str) -> str:
    return " ".join(text.replace("recipe.", "").split())
