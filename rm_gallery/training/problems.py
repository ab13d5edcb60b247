"""What is wrong with a configuration, as pydantic found it, in sentences with the key as people write it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from rm_gallery.errors import nearest


def known_keys(config: type, prefix: str = "") -> dict[str, Any]:
    """Every key of the configuration with its type, sections too, as `model.fsdp_config.model_dtype`."""
    hints = get_type_hints(config)
    found: dict[str, Any] = {}
    for each in fields(config):
        found[prefix + each.name] = hints[each.name]
        if is_dataclass(hints[each.name]):
            found.update(known_keys(hints[each.name], f"{prefix}{each.name}."))
    return found


def key_of(problem: Any, known: Mapping[str, Any]) -> str:
    """The key that a problem is about; pydantic appends list positions and names of union members."""
    parts = [str(part) for part in problem["loc"]]
    if problem["type"] == "unexpected_keyword_argument":
        return ".".join(parts)
    while ".".join(parts) not in known and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def sentence(key: str, problem: Any, values: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """A problem that pydantic found, with the key as people write it."""
    if problem["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key{_nearest_key(key, list(known))}"
    value: Any = values
    for part in key.split("."):
        value = value[part]
    if problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", str(problem["ctx"]["expected"]))
        return f"{key}={value}: must be one of {', '.join(choices)}.{nearest(str(value), choices)}"
    what = problem["msg"].replace("Input should be ", "must be ").replace("Tuple", "tuple").partition(", ")[0]
    for theirs, ours in (
        ("a valid string", "text; put quotes around it"), ("a valid number", "a number"), ("a valid tuple", "a list"),
        ("a valid integer", "a whole number"), ("a valid boolean", "true or false"), ("Field required", "too short"),
        ("tuple", "list"), (" after validation", ""), ("a dictionary or an instance of", "a section of keys, as"),
    ):  # fmt: skip
        what = what.replace(theirs, ours)
    return f"{key}={value!r}: {what[0].lower()}{what[1:]}"


def _nearest_key(path: str, known: Sequence[str]) -> str:
    """'. Did you mean X?': a sibling that looks alike or holds the name, else the same name elsewhere, else all."""
    section, _, name = path.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    hint = nearest(name, (key.rpartition(".")[2] for key in siblings)).partition("'")[2].partition("'")[0]
    alike = [key for key in siblings if key.rpartition(".")[2] == hint]
    holding = [key for key in siblings if len(name) > 2 and name in key.rpartition(".")[2]]
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    found = alike or holding or elsewhere
    return f". Did you mean {found[0]!r}?" if found else f"; known here: {', '.join(siblings)}"
