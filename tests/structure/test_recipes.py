"""Recipes and configuration agree: every key is a field, every field does something."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from pathlib import Path

import pytest

from tests.structure.recipes import Key, all_fields, fields_of, names_read, shell_keys, unknown_part, yaml_keys
from tests.structure.tree import ROOT, at, fail_on, files_under

CONFIG_FILE = ROOT / "rm_gallery/training/config.py"

# Keys that are accepted and checked but change nothing, with the reason. Empty is best.
CHECKED_ONLY: dict[str, str] = {}


@pytest.fixture(scope="module")
def train_config() -> type:
    config = importlib.import_module("rm_gallery.training.config").TrainConfig
    assert isinstance(config, type)
    return config


def _recipes() -> list[Path]:
    """YAML files that set our keys; a manifest of Kubernetes has keys of its own."""
    found = files_under(["tutorials"], ".yaml", ".yml")
    return [path for path in found if "\napiVersion:" not in path.read_text(encoding="utf-8")]


def _recipe_keys(config: type) -> list[Key]:
    in_yaml = [key for path in _recipes() for key in yaml_keys(path)]
    scripts = [*files_under(["tutorials", "benchmarks"], ".sh"), ROOT / "Makefile"]
    in_scripts = [key for path in scripts for key in shell_keys(path, set(fields_of(config)))]
    return in_yaml + in_scripts


def test_every_recipe_key_is_a_config_field(train_config: type) -> None:
    problems = [
        f"{key.where} sets {key}: {part!r} is no field of the configuration; correct the name, "
        f"or add the field to the dataclass that reads it"
        for key in _recipe_keys(train_config)
        if (part := unknown_part(key, train_config))
    ]
    fail_on(problems)


def test_no_recipe_sets_a_key_twice() -> None:
    problems = []
    for path in _recipes():
        keys = yaml_keys(path)
        counts = Counter(key.path for key in keys)
        problems += [
            f"{key.where} sets {key} again: keep one of the lines" for key in keys[::-1] if counts[key.path] > 1
        ]
    fail_on(problems)


def test_every_config_field_is_read(train_config: type) -> None:
    read = names_read("rm_gallery")
    fields = list(all_fields(train_config))
    problems = [
        f"{_definition(owner, name)} {key} is read nowhere in rm_gallery (a check does not count, getattr neither): "
        "use it, delete it, or give the reason in CHECKED_ONLY of tests/structure/test_recipes.py"
        for key, owner, name in fields
        if name not in read and key not in CHECKED_ONLY
    ]
    problems += [
        f"{at(Path(__file__).resolve())} CHECKED_ONLY names {key}, which is no field, or is read: delete it"
        for key in CHECKED_ONLY
        if not any(key == known and name not in read for known, _, name in fields)
    ]
    fail_on(problems)


def _definition(owner: type, field: str) -> str:
    """file:line of the field, in the class that declares it."""
    owner = next(base for base in owner.__mro__ if field in inspect.get_annotations(base))
    path = Path(inspect.getsourcefile(owner) or "")
    lines, start = inspect.getsourcelines(owner)
    offset = next((i for i, line in enumerate(lines) if line.strip().startswith(f"{field}:")), 0)
    return at(path.resolve(), start + offset)
