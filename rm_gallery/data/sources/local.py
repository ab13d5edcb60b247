"""Local files: expanding paths, folders and globs, the identity of a file, and the splits of a dataset.

Splits come from the YAML of a README or from file names, here and on the hub, by the rules of the `datasets` library.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rm_gallery.data.sources.config import FileEntry, Role, refuse_keys
from rm_gallery.data.sources.records import DataFile, checked_kind, data_files, kind_of, of_one_kind
from rm_gallery.errors import UserError, nearest

log = logging.getLogger(__name__)

LOCAL_SCHEMES = ("file", "local")
_END_BYTES = 64 << 10


def local_path(text: str) -> Path:
    """The path that a text names, without the schemes `file` and `local`; `~` is the home folder."""
    scheme, mark, rest = text.partition("://")
    return Path(rest if mark and scheme in LOCAL_SCHEMES else text).expanduser()


def exists_here(text: str) -> bool:
    """Whether a text, taken literally and not as a glob, names a file, folder or link on this machine."""
    try:
        return os.path.lexists(local_path(text))
    except (OSError, ValueError):  # too long a name, a NUL byte in it
        return False


def expand_local(entry: FileEntry, split: str | None, role: Role, what: str) -> list[Path]:
    """Data files that a local path names, in order.

    split: the split of a folder with several, or None for the default of `role`.
    what: start of messages. Raises UserError for a path that does not exist or names no data.
    """
    refuse_keys(entry, what, "subset", "revision")
    try:
        found = _expand(entry, split, role, what)
    except OSError as error:  # too long a name, or a folder without read permission
        raise UserError(f"{what[:150]}: cannot be looked up ({error.strerror}); choose another path") from error
    if not found:
        raise UserError(f"{what}: no such file or folder (working directory {Path.cwd()})")
    return found


def _expand(entry: FileEntry, split: str | None, role: Role, what: str) -> list[Path]:
    path = local_path(entry.path)
    if path.is_dir():
        return _expand_folder(path, split, role, what)
    if path.is_file():
        checked_kind(path.name, what=what)
        refuse_keys(entry, what, "split")
        return [path]
    if path.exists():
        raise UserError(f"{what}: neither a file nor a folder; write the rows to a file and name it")
    if path.is_symlink():
        raise UserError(f"{what}: a broken symbolic link (to {os.readlink(path)}); name the file itself")
    return _expand_glob(path, entry, what) if has_pattern(entry.path) else []


def has_pattern(text: str) -> bool:
    """Whether a path contains a wildcard."""
    return any(mark in text for mark in "*?[")


def _expand_glob(path: Path, entry: FileEntry, what: str) -> list[Path]:
    names = _without_loops(sorted(glob.glob(str(path), recursive=True)))
    matching, skipped = _regular_files(Path(), names)
    _warn_of_skipped(skipped, what)
    if not matching:
        raise UserError(f"{what}: no file matches the pattern (working directory {Path.cwd()})")
    # Only the names count: the pattern itself may be in a hidden folder.
    found = [name for name in matching if data_files([Path(name).name])]
    if not found:
        checked_kind(matching[0], what=f"{what}: matches only {Path(matching[0]).name}")
    refuse_keys(entry, what, "split")
    return [Path(name) for name in of_one_kind(found, what=what, where=f"{Path(found[0]).parent}/")]


def _expand_folder(folder: Path, split: str | None, role: Role, what: str) -> list[Path]:
    splits = _saved_json(folder, "dataset_dict.json", "splits", what)
    if splits is not None:  # what DatasetDict.save_to_disk writes
        names = choose_split({str(name): [str(name)] for name in splits}, split, role, what)
        return [path for name in names for path in _expand_saved(folder / name, what)]
    if (folder / "state.json").is_file():  # what Dataset.save_to_disk writes
        return _expand_saved(folder, what)
    found, skipped = _regular_files(folder, [each.name for each in folder.iterdir()])
    if not data_files(found):
        found, skipped = _regular_files(folder, list(_names_below(folder)))
    _warn_of_skipped(skipped, what)
    names = data_files(found)
    if not names:
        raise UserError(f"{what}: the folder has no data file (parquet, JSON lines, CSV, Arrow); name one that does")
    by_split = splits_by_name(names)
    if split is not None or (len(by_split) > 1 and role != "all"):
        chosen = choose_split(by_split, split, role, what)
        log.info("%s: %d of %d files, those of one split", what, len(chosen), len(names))
        names = chosen
    if role != "all":
        names = of_one_kind(names, what=what, where=f"{folder}/")
    return [folder / name for name in names]


def _names_below(folder: Path) -> Iterator[str]:
    """Names like those of data files in the subfolders, each folder once however many symbolic links lead to it.

    Raises OSError for a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(each for each in folders if not each.startswith((".", "__")))
        if real not in seen:
            yield from (Path(parent, name).relative_to(folder).as_posix() for name in names if kind_of(name))
        seen.add(real)


def _without_loops(names: Sequence[str]) -> list[str]:
    """The names without those of the same file in a folder that a symbolic link repeats."""
    places = {(os.path.realpath(os.path.dirname(name)), os.path.basename(name)): name for name in reversed(names)}
    kept = set(places.values())
    return [name for name in names if name in kept]


def _regular_files(folder: Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The regular files, and what else is named like a data file: opening a pipe would wait for its writer."""
    files, others = [], []
    for name in names:
        path = folder / name
        if path.is_file():
            files.append(name)
        elif data_files([path.name]):
            others.append(f"{name} ({_type_of(path)})")
    return files, others


def _type_of(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a broken symbolic link" if path.is_symlink() else "cannot be looked up"
    types = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((label for matches, label in types if matches(mode)), "a device")


def _warn_of_skipped(skipped: Sequence[str], what: str) -> None:
    if skipped:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        log.warning("%s: skipped %s%s: not a regular file", what, ", ".join(skipped[:3]), more)


def _expand_saved(folder: Path, what: str) -> list[Path]:
    """Arrow files of one split that `save_to_disk` wrote; the folder may also hold files of an earlier save."""
    listed = _saved_json(folder, "state.json", "_data_files", what)
    try:
        names = [str(each["filename"]) for each in listed] if listed is not None else None
    except (KeyError, TypeError):
        names = None
    if names is None:
        raise UserError(f"{what}: {folder.name}/state.json does not list the data files; save the dataset again")
    if not names:
        raise UserError(f"{what}: the saved dataset is empty; choose another")
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise UserError(f"{what}: {missing} is missing from {folder.name}; save or copy the dataset again")
    return [folder / name for name in names]


def _saved_json(folder: Path, name: str, key: str, what: str) -> list[Any] | None:
    """The list under `key` in a JSON file of `save_to_disk`, or None without such a file."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        value = found.get(key) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise UserError(f"{what}: {name} is damaged; save the dataset again")
    return value


def identity_of(path: Path) -> str:
    """Hash of the path, size, times of the last modification and status change, and both ends of a file.

    Programs can set the modification time but not the status change time (ctime), so that an edit in the middle that
    keeps size and modification time is noticed too. A change of permissions or links then counts as an edit.
    """
    digest = hashlib.sha256()
    facts = path.stat()
    times = f"{facts.st_mtime_ns}\0{facts.st_ctime_ns}"
    digest.update(f"{path.absolute()}\0{facts.st_size}\0{times}\0".encode(errors="surrogateescape"))
    with path.open("rb") as file:
        digest.update(file.read(_END_BYTES))
        if facts.st_size > _END_BYTES:
            file.seek(max(_END_BYTES, facts.st_size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


def version_of(path: Path) -> str:
    """Size, modification time and inode of a file: whether it is still the same while it is read."""
    facts = path.stat()
    return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"


def check_unchanged(file: DataFile) -> None:
    """Raise OSError if a local file changed since it was resolved, as its rows would be of two versions.

    A file that was deleted can still be read to its end.
    """
    try:
        changed = version_of(Path(file.path)) != file.version
    except FileNotFoundError:
        return
    if changed:
        raise OSError("the file changed during this run; run again when its writer is done")


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
