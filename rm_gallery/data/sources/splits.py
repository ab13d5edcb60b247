"""Splits of a dataset: from the YAML of a README or from file names, by the rules of the `datasets` library."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rm_gallery.data.sources.config import Role
from rm_gallery.data.sources.records import data_files
from rm_gallery.errors import UserError, nearest

log = logging.getLogger(__name__)

Splits = dict[str, list[str]]
"""Paths by split; the split '' has all files if their names have no splits."""

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORD = re.compile(rf"(?<![A-Za-z])({'|'.join(word for words in _KEYWORDS.values() for word in words)})(?![A-Za-z])")
_SPLIT_OF_WORD = {word: split for split, words in _KEYWORDS.items() for word in words}
_SHARD = re.compile(r"(?:data/)?(?P<split>\w[\w.]*)-\d{5}-of-\d{5}[^/]*")
_CONVERTED = re.compile(r"(?P<subset>[^/]+)/(?P<split>[^/]+)/\d{4}\.parquet")


@dataclass(frozen=True)
class Layout:
    """Subsets of a dataset, each with its splits."""

    subsets: dict[str, Splits]
    default: str | None
    """The subset to use if none is named; None if one must be named."""


def layout_of(paths: Sequence[str], readme: str = "") -> Layout:
    """Subsets and splits of a dataset, from the `configs` in the YAML block of its README, else from file names."""
    found = data_files(paths)
    configs = _configs(readme)
    if configs:
        subsets = {str(config["config_name"]): _config_splits(config, found) for config in configs}
        flagged = [str(config["config_name"]) for config in configs if config.get("default") is True]
        return _layout({name: splits for name, splits in subsets.items() if splits}, flagged)
    converted = [_CONVERTED.fullmatch(path) for path in found]
    if found and all(converted):  # conversion by the hub, revision refs/convert/parquet
        subsets = {}
        for match in converted:
            assert match is not None
            subsets.setdefault(match["subset"], {}).setdefault(match["split"], []).append(match[0])
        return _layout(subsets, [])
    return _layout({"default": splits_by_name(found)} if found else {}, [])


def _layout(subsets: dict[str, Splits], flagged: Sequence[str]) -> Layout:
    default = next((name for name in (*flagged, "default") if name in subsets), None)
    return Layout(subsets, next(iter(subsets)) if len(subsets) == 1 else default)


def _configs(readme: str) -> list[Mapping[str, Any]]:
    """`configs` in the YAML block at the start of a README."""
    import yaml

    block = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", readme.replace("\r\n", "\n"), re.DOTALL)
    if block is None:
        return []
    try:
        header = yaml.safe_load(block[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        log.warning("README.md: its YAML block cannot be read (%s); file names decide the splits", error)
        return []
    configs = header.get("configs") if isinstance(header, dict) else None
    configs = configs if isinstance(configs, list) else []
    return [config for config in configs if isinstance(config, dict) and "config_name" in config]


def _config_splits(config: Mapping[str, Any], paths: Sequence[str]) -> Splits:
    folder = str(config.get("data_dir") or "").strip("./")
    if folder:
        paths = [path for path in paths if path.startswith(f"{folder}/")]
    patterns = config.get("data_files")
    if patterns is None:
        start = f"{folder}/" if folder else ""
        inside = splits_by_name([path.removeprefix(start) for path in paths])
        return {split: [start + path for path in each] for split, each in inside.items()}
    found: Splits = {}
    for split, pattern in _patterns(patterns):
        full = f"{folder}/{pattern}" if folder else pattern
        matching = [path for path in matching_paths(full, paths) if path not in found.get(split, ())]
        if matching:
            found.setdefault(split, []).extend(matching)
    return found


def _patterns(value: Any) -> list[tuple[str, str]]:
    """(split, pattern) pairs of `data_files`: a pattern, a list, a mapping by split, or a list of split and path."""
    if isinstance(value, str):
        return [("train", value)]
    if isinstance(value, dict):
        return [(str(split), pattern) for split, each in value.items() for _, pattern in _patterns(each)]
    if not isinstance(value, list):
        return []
    found = []
    for each in value:
        if isinstance(each, dict) and "path" in each:
            found += [(str(each.get("split", "train")), pattern) for _, pattern in _patterns(each["path"])]
        elif isinstance(each, str):
            found.append(("train", each))
    return found


def matching_paths(pattern: str, paths: Sequence[str]) -> list[str]:
    """Paths that match a glob pattern, sorted; `*` stays within a folder, `**` does not."""
    from fsspec.utils import glob_translate

    pattern = re.sub(r"^(\./|/)+", "", pattern)
    expression = re.compile(glob_translate(pattern))
    return sorted(path for path in paths if path == pattern or expression.match(path))


def splits_by_name(paths: Sequence[str]) -> Splits:
    """Splits by folder and file names; {'': all} if the names have none, {} for no paths.

    Shards come first (`train_sft-00000-of-00002.parquet`, where any word is a split), then folders named after a split
    (`val/a.csv`), then files (`my_test.jsonl`). Files without a split in their name are dropped if others have one.
    """
    in_data = [path for path in paths if path.startswith("data/") and _SHARD.fullmatch(path)]
    are_shards = in_data or (paths if all(_SHARD.fullmatch(path) for path in paths) else [])
    found: Splits = {}
    for path in are_shards:
        match = _SHARD.fullmatch(path)
        assert match is not None
        found.setdefault(match["split"], []).append(path)
    if len(found) > 1 or any(_WORD.search(split) for split in found):
        return found
    for word_of in (_folder_word, _file_word):
        found = {}
        for path in paths:
            if word := word_of(PurePosixPath(path.lower())):
                found.setdefault(_SPLIT_OF_WORD[word], []).append(path)
        if found:
            return found
    return {"": list(paths)} if paths else {}


def _folder_word(path: PurePosixPath) -> str:
    """The split word in the innermost folder that has one; '' for none."""
    return next((match[1] for part in reversed(path.parts[:-1]) if (match := _WORD.search(part))), "")


def _file_word(path: PurePosixPath) -> str:
    """The first split word in the name of a file; '' for none."""
    match = _WORD.search(path.name)
    return match[1] if match else ""


def choose_subset(layout: Layout, subset: str | None, what: str) -> Splits:
    """The splits of a subset; raises UserError, naming the subsets, for an unknown or ambiguous one."""
    names = ", ".join(layout.subsets)
    chosen = layout.default if subset is None else subset
    if chosen is None:
        raise UserError(
            f"{what}: holds several subsets ({names}); choose one in an entry, e.g. {{path: ..., subset: ...}}"
        )
    if chosen not in layout.subsets:
        raise UserError(f"{what}: has no subset {chosen!r}; it has {names}.{nearest(chosen, layout.subsets)}")
    return layout.subsets[chosen]


def choose_split(splits: Splits, wanted: str | None, role: Role, what: str) -> list[str]:
    """Files of the wanted split, else of the default: `train`; `validation` or `test`; or all, by role.

    Raises UserError, naming the splits, if there is none of that name.
    """
    if wanted is None and role == "all":
        return [path for paths in splits.values() for path in paths]
    names = {split or "train": paths for split, paths in splits.items()}
    tried = (wanted,) if wanted is not None else ("train",) if role == "train" else ("validation", "test")
    for split in tried:
        if split in names:
            return names[split]
        alike = [name for name in names if _SPLIT_OF_WORD.get(name) == _SPLIT_OF_WORD.get(split, split)]
        if len(alike) == 1:
            return names[alike[0]]
    asked = " or ".join(repr(split) for split in tried)
    hint = "" if wanted is None else nearest(wanted, names)
    held_out = role == "val" or (wanted is not None and _SPLIT_OF_WORD.get(wanted) in ("validation", "test"))
    rest = ", or leave data.val_files empty and set data.val_fraction to hold out a share" if held_out else ""
    raise UserError(
        f"{what}: has no split {asked}; it has {', '.join(sorted(names))}.{hint} Name one of these as split{rest}"
    )


def report_choice(
    chosen: Sequence[str], names: Sequence[str], split: str | None, what: str, *, level: int = logging.WARNING
) -> None:
    """Log which files or splits are read and which are not.

    split: the one that was named, if any, which needs no warning. level: otherwise.
    """
    rest = [name for name in names if name not in chosen]
    if rest:
        hint = "; name a split to choose others" if split is None else ""
        log.log(
            level if split is None else logging.INFO, "%s: reading %s, not %s%s", what, some(chosen), some(rest), hint
        )


def some(names: Sequence[str]) -> str:
    """The first three of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
