"""Recipes: what a training run does, as frozen data with its checks.

A recipe says everything that decides the numbers and nothing of the machine: how many processes,
which device and where the files go are told to the run. No torch here, so that help is fast.
"""

from dynaslim.recipes.data import AugmentRecipe, DataRecipe
from dynaslim.recipes.files import load_recipe, recipe_from_dict
from dynaslim.recipes.gate import ExpectedRecipe, GateRecipe, Objective, SgsRecipe
from dynaslim.recipes.supernet import OptimRecipe, SupernetRecipe, Target

__all__ = [
    "AugmentRecipe",
    "DataRecipe",
    "ExpectedRecipe",
    "GateRecipe",
    "Objective",
    "OptimRecipe",
    "SgsRecipe",
    "SupernetRecipe",
    "Target",
    "load_recipe",
    "recipe_from_dict",
]
