"""Loads a configuration: a YAML file with `key=value` overrides becomes a checked dataclass.

    load(kind, file, overrides)     compose, then build: what commands call
    compose(kind, file, overrides)  Hydra: defaults lists, override grammar, interpolation -> nested plain values
    build(kind, values)             pydantic types, then checks across fields -> the dataclass

What the file or an override reads from the environment, `${oc.env:NAME}`, is kept as that text for saving
(`from_environment` of the dataclass, `to_save`), so that a secret is in no file and a saved configuration can be
read back.

Problems are `Problem(key, text)` records. All of them are collected and raised as one UserError, one a line.
No other module imports Hydra or OmegaConf.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from rm_gallery.errors import Problem, UserError, nearest
from rm_gallery.safe_text import HIDDEN, redact, register_variable

Config = TypeVar("Config")


def load(
    kind: type[Config],
    file: str | None,
    overrides: Sequence[str],
    *,
    settings: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    prepare: Callable[[dict[str, Any]], Iterable[Problem]] | None = None,
    check: Callable[[Config], Iterable[Problem]] | None = None,
    ignore: Collection[str] = (),
) -> Config:
    """Read a YAML file, apply overrides, check everything, and return the dataclass `kind`.

    file: path of the YAML file, or None to start from the defaults of the dataclass.
    settings: values by dotted key, e.g. `{"optim.lr": 1e-5}`; they replace those of the file and the overrides.
    aliases: short keys of overrides, e.g. `{"data": "data.train_files"}`.
    prepare, check, ignore: see `build`.
    Raises UserError that lists all problems, one a line.
    """
    values = compose(kind, file, [_expand_alias(override, aliases or {}) for override in overrides])
    for key, value in (settings or {}).items():
        _set(values, key, value)
    config = build(kind, values, prepare=prepare, check=check, ignore=ignore)
    texts = {
        key: text
        for key, text in getattr(values, "from_environment", {}).items()
        if not any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in settings or {})
    }
    if texts and FROM_ENVIRONMENT in {each.name for each in fields(config)}:  # type: ignore[arg-type]
        config = replace(config, **{FROM_ENVIRONMENT: texts})  # type: ignore[type-var]
    return config


FROM_ENVIRONMENT = "from_environment"
"""Field of a configuration that can be saved: dotted key -> its text before interpolation. Not a key itself."""


class Composed(dict[str, Any]):
    """Nested plain values, and of the keys that read the environment also the text before interpolation."""

    from_environment: dict[str, Any]


def to_save(values: Mapping[str, Any], from_environment: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain values without secrets: what was read from the environment as `${oc.env:NAME}`, and no credentials.

    from_environment: see `FROM_ENVIRONMENT`.
    """
    saved = deepcopy(dict(values))
    for key, text in from_environment.items():
        *sections, name = key.split(".")
        section = saved
        for each in sections:
            section = section[each]
        section[name] = text
    return redact(saved)


def build(
    kind: type[Config],
    values: Mapping[str, Any],
    *,
    prepare: Callable[[dict[str, Any]], Iterable[Problem]] | None = None,
    check: Callable[[Config], Iterable[Problem]] | None = None,
    ignore: Collection[str] = (),
) -> Config:
    """The dataclass from nested plain values.

    prepare: normalizes the values in place before types are checked; problems it returns replace those of pydantic.
    check: contradictions between fields, missing files, values out of range.
    ignore: keys and sections whose problems from `check` are dropped. Unknown keys and wrong types are always problems.
    Raises UserError that lists every problem, one a line.
    """
    from pydantic import TypeAdapter, ValidationError

    known = known_keys(kind)
    # An empty section in a YAML file is null: it keeps its defaults.
    values = {key: deepcopy(value) for key, value in values.items() if value is not None or not _is_section(known, key)}
    first = [
        *(prepare(values) if prepare else ()), *_booleans_for_numbers(values, known), *_hidden_credentials(values),
    ]  # fmt: skip
    if FROM_ENVIRONMENT in values:
        first.append(Problem(FROM_ENVIRONMENT, f"{FROM_ENVIRONMENT}: unknown key"))
    problems = {problem.key: problem for problem in reversed(first)}
    for key in problems:
        _remove(values, key)
    adapter = TypeAdapter(kind)
    try:
        config = adapter.validate_python(values)
    except ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for found in error.errors(include_url=False):
            by_key.setdefault(_key_of(found, known), []).append(found)
        for key, (first_found, *others) in by_key.items():
            problems.setdefault(key, Problem(key, _describe(key, first_found, others, values, known)))
        # Drop the keys that are wrong and check the rest, to report all problems at once.
        for key in problems:
            _remove(values, key)
        try:
            config = adapter.validate_python(values)
        except ValidationError:  # a key without a default is wrong
            raise _error(problems.values()) from None
    done = (*problems, *ignore)
    rest = [found for found in (check(config) if check else ()) if not any(found.is_about(key) for key in done)]
    if problems or rest:
        raise _error([*problems.values(), *rest])
    return config


def _error(problems: Iterable[Problem]) -> UserError:
    return UserError("\n".join(problem.text for problem in problems))


def problem_of(key: str, check: Callable[[], object]) -> Iterator[Problem]:
    """The UserError that `check` raises, if any, as a problem of this key."""
    try:
        check()
    except UserError as error:
        yield Problem(key, str(error))


def known_keys(kind: type, prefix: str = "") -> dict[str, Any]:
    """Every key of a configuration with its type, sections included, e.g. `model.fsdp_config.model_dtype`."""
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for each in fields(kind):
        if each.name == FROM_ENVIRONMENT:
            continue
        found[prefix + each.name] = hints[each.name]
        if is_dataclass(hints[each.name]):
            found.update(known_keys(hints[each.name], f"{prefix}{each.name}."))
    return found


def text_keys_of(kind: type) -> set[str]:
    """Keys whose values are text, also in a list. Those of names with values are not: `{name: value}` is no text."""
    keys = known_keys(kind).items()
    return {key for key, hint in keys if str in (hint, *get_args(hint)) and get_origin(hint) not in (Mapping, dict)}


def to_yaml(values: Mapping[str, Any]) -> str:
    """Nested plain values as YAML text, which `load` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))


def compose(kind: type, file: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Nested plain values of a YAML file with overrides applied, as Hydra composes them; not checked yet.

    Hydra accepts only keys that are in the file. Here an override may also add a key; `build` rejects unknown ones.
    Hydra writes no files in this mode.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = None if file is None else Path(file).expanduser().absolute()
    if path is not None and not path.is_file():
        raise UserError(f"{file}: no such configuration file (working directory {Path.cwd()})")
    if path is not None and path.suffix != ".yaml":
        raise UserError(f"{file}: the name of a configuration file must end with .yaml; rename it")
    text_keys = text_keys_of(kind)
    folder = None if path is None else path.parent
    list_keys = {key for key, hint in known_keys(kind).items() if hint == tuple[str, ...]}
    arguments = [_for_hydra(override, folder, text_keys, list_keys) for override in overrides]
    try:
        with initialize_config_dir(str(folder or Path(__file__).parent), version_base="1.3", job_name="rm-gallery"):
            composed = hydra_compose(None if path is None else path.stem, arguments)
        container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        raw = OmegaConf.to_container(composed, resolve=False)
    except OverrideParseException as error:
        override = error.override.removeprefix("++")
        raise UserError(
            f"{override}: cannot be read; close its brackets, or quote it if it is text, as in 'key=\"a b, c\"'"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_describe_hydra(error, file)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text ({error}); recreate it") from error
    except Exception as error:  # invalid YAML raises an error of the YAML library
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
        raise
    assert isinstance(container, dict)
    values = Composed({str(key): value for key, value in container.items()})
    values.from_environment = dict(_from_environment(raw, container))
    return values


_VARIABLE = re.compile(r"oc\.env\s*:\s*['\"]?([^,}\s'\"]+)")


def _from_environment(raw: Any, resolved: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, text before interpolation) of every key that reads the environment, directly or from another key."""
    for name in _VARIABLE.findall(repr(raw)):
        register_variable(name)

    def merged(raw: Any, resolved: Any) -> Any:
        if isinstance(raw, dict) and isinstance(resolved, dict):
            return {key: merged(raw[key], resolved[key]) for key in raw}
        if isinstance(raw, list) and isinstance(resolved, list):
            return [merged(*pair) for pair in zip(raw, resolved, strict=True)]
        reads = isinstance(raw, str) and "${" in raw and ("oc.env" in raw or redact(resolved) != resolved)
        return raw if reads else resolved

    def walk(raw: Any, resolved: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in raw.items():
            if isinstance(value, dict) and isinstance(resolved[key], dict):
                yield from walk(value, resolved[key], f"{prefix}{key}.")
            elif (text := merged(value, resolved[key])) != resolved[key]:
                yield f"{prefix}{key}", text

    yield from walk(raw, resolved, "")


def _expand_alias(override: str, aliases: Mapping[str, str]) -> str:
    key, equals, value = override.partition("=")
    return f"{aliases.get(key, key)}{equals}{value}"


def _for_hydra(override: str, folder: Path | None, text_keys: Collection[str], list_keys: Collection[str]) -> str:
    """`key=value` as Hydra's `++key=value`, which sets a key whether or not it is in the file.

    text_keys: keys whose values are text, so that `~/data`, `a=b` and `123` need no quotes.
    list_keys: keys whose values are lists of names, so that `console,wandb` needs no brackets.
    """
    key, equals, value = override.partition("=")
    if not re.fullmatch(r"(\+{0,2}|~)[A-Za-z_][\w./@:-]*", key) or not (equals or key.startswith("~")):
        raise UserError(f"{override!r}: an override is written key=value without spaces, e.g. optim.lr=1e-6")
    is_config_group = folder is not None and (folder / key).is_dir()
    if not re.fullmatch(r"[\w.-]+", key) or key.startswith("hydra.") or is_config_group:
        return override
    if key in list_keys and "," in value and re.fullmatch(r"[\w, -]+", value):
        return f"++{key}=[{value}]"
    has_grammar = value.startswith(("'", '"', "[")) or "," in value or "${" in value
    if key in text_keys and value not in ("", "null") and not has_grammar:
        escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + (found[2] and '\\"'), value)
        return f'++{key}="{escaped}"'
    return f"++{override}"


def _describe_hydra(error: Exception, file: str | None) -> str:
    text = " ".join(str(error).split()).partition(" See https://")[0].partition(" object_type=")[0]
    text = text.replace("++", "")
    if "Ambiguous value" in text:
        override = text.partition("'")[2].partition("' 1.")[0]
        key, _, value = override.partition("=")
        return f"{override}: write a list as {key}=[{value}], and quote text with a comma, as in '{key}=\"{value}\"'"
    if "must be a DictConfig" in text:
        return f"{file}: the file must contain keys with values, e.g. `optim: {{lr: 1e-6}}`"
    return f"{file or 'configuration'}: {text}"


def _is_section(known: Mapping[str, Any], key: str) -> bool:
    return is_dataclass(known.get(key))


def _booleans_for_numbers(values: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[Problem]:
    """true and false where a number belongs; pydantic would read them as 1 and 0."""
    for key, hint in known.items():
        value = _value_at(values, key)
        if isinstance(value, bool) and {int, float} & {hint, *get_args(hint)}:
            yield Problem(key, f"{key}={str(value).lower()}: must be a number")


def _hidden_credentials(values: Any, key: str = "") -> Iterator[Problem]:
    """Texts of a saved configuration whose credentials were replaced when it was written."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _hidden_credentials(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _hidden_credentials(value, key)
    elif isinstance(values, str) and (values == HIDDEN or f"{HIDDEN}@" in values or f"={HIDDEN}" in values):
        yield Problem(
            key,
            f"{key}={values}: a credential was removed when this was saved; set it again, e.g. as ${{oc.env:NAME}} to "
            "read the variable NAME of the environment",
        )


def _value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[name] = value


def _remove(values: dict[str, Any], key: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.get(section, {})
    values.pop(name, None)


def _key_of(found: Any, known: Mapping[str, Any]) -> str:
    """The key of an error of pydantic, which appends list positions and names of union members."""
    parts = [str(part) for part in found["loc"]]
    if found["type"] == "unexpected_keyword_argument":
        return ".".join(parts)
    while ".".join(parts) not in known and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def _describe(key: str, found: Any, others: Sequence[Any], values: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """The message for an error of pydantic, with key and value as they are written on the command line.

    others: further errors of the key: of the other members of a union, or of other items of a list.
    """
    if found["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key{_nearest_key(key, list(known))}"
    value = _value_at(values, key)
    if found["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", str(found["ctx"]["expected"]))
        is_union = str(found["loc"][-1]).startswith("literal[")
        more = [f"or {_requirement(each).removeprefix('must be ')}" for each in others[:1] if is_union]
        return f"{key}={value}: must be one of {', '.join([*choices, *more])}.{nearest(str(value), choices)}"
    what = _requirement(found)
    return f"{key}={value!r}: {what[0].lower()}{what[1:]}"


def _requirement(found: Any) -> str:
    """What an error of pydantic asks for, in our words."""
    what: str = found["msg"].replace("Input should be ", "must be ").replace("Tuple", "tuple").partition(", ")[0]
    for theirs, ours in (
        ("a valid string", "text; put quotes around it"), ("a valid number", "a number"), ("a valid tuple", "a list"),
        ("a valid integer", "an integer"), ("a valid boolean", "true or false"), ("Field required", "too short"),
        ("a valid list", "a list"), ("a valid dictionary", "names with values, {name: value}"),
        ("tuple", "list"), (" after validation", ""), ("a dictionary or an instance of", "a section with the keys of"),
    ):  # fmt: skip
        what = what.replace(theirs, ours)
    return what


def _nearest_key(path: str, known: Sequence[str]) -> str:
    """'. Did you mean X?': a sibling with a similar name or one that contains it, else the same name elsewhere,
    else all siblings."""
    section, _, name = path.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    hint = nearest(name, (key.rpartition(".")[2] for key in siblings)).partition("'")[2].partition("'")[0]
    similar = [key for key in siblings if key.rpartition(".")[2] == hint]
    containing = [key for key in siblings if len(name) > 2 and name in key.rpartition(".")[2]]
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    found = similar or containing or elsewhere
    return f". Did you mean {found[0]!r}?" if found else f"; known here: {', '.join(siblings)}"
