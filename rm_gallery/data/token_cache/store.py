"""Token store: token data as a folder of flat files, written once chunk by chunk, and memory-mapped.

The folder is written atomically: under a temporary name, `store.json` last, then renamed. `store.json` has the SHA-256
of every block of every file and of itself; `open_store` verifies all of them before it maps a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from rm_gallery.data.custom import CustomFacts
from rm_gallery.data.token_cache.arrays import ARRAYS, STARTS, TokenChunk, TokenData
from rm_gallery.data.token_cache.fingerprint import Fingerprint
from rm_gallery.errors import Dropped
from rm_gallery.files import replace
from rm_gallery.schema import InputStyle

RECORD_NAME = "store.json"
_START_TYPE = np.int64
_BLOCK_BYTES = 16 << 20
_HASH_THREADS = 4


class DamagedStore(Exception):
    """A store that is not what was written; the message names the file and the fault."""


@dataclass(frozen=True)
class Facts:
    """Metadata of a store."""

    style: InputStyle
    has_text_prompts: bool
    formats: list[str]
    """The format of each file and the reason, as sentences."""
    num_rows: int
    """Rows read, including dropped ones."""
    held_out: int
    """Groups on the other side of `data.val_fraction`."""


class _BlockHashes:
    """SHA-256 of each block of a file, updated as the file is written."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._block, self._room = hashlib.sha256(), _BLOCK_BYTES

    def update(self, data: memoryview) -> None:
        while len(data):
            part, data = data[: self._room], data[self._room :]
            self._block.update(part)
            self._room -= len(part)
            if not self._room:
                self._done.append(self._block.hexdigest())
                self._block, self._room = hashlib.sha256(), _BLOCK_BYTES

    def hexdigests(self) -> list[str]:
        return [*self._done, self._block.hexdigest()] if self._room < _BLOCK_BYTES else self._done


class StoreWriter:
    """Writes a store atomically: `folder` exists after `finish`, and without it no file remains."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        self._counts = dict.fromkeys([*ARRAYS, *STARTS], 0)
        self._ends = dict.fromkeys(STARTS, 0)
        self._files: dict[str, BinaryIO] = {}
        self._hashes = {name: _BlockHashes() for name in self._counts}
        self._names: dict[str, dict[str, int]] = {"file": {}, "source": {}}
        self._fingerprint = Fingerprint()
        self._stack = ExitStack()

    def __enter__(self) -> StoreWriter:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.parent.glob(f"{self.folder.name}.tmp-*"):
            shutil.rmtree(left_over)
        self._temporary.mkdir()
        for name in self._counts:
            self._files[name] = self._stack.enter_context((self._temporary / f"{name}.bin").open("wb"))
        for name in STARTS:
            self._write(name, np.zeros(1, _START_TYPE))
        return self

    def append(self, chunk: TokenChunk) -> None:
        """Append the groups of a chunk."""
        arrays = dict(chunk.arrays)
        for kind, names in (("file", chunk.files), ("source", chunk.sources)):
            known = self._names[kind]
            numbers = np.array([known.setdefault(name, len(known)) for name in names], ARRAYS[kind])
            arrays[kind] = numbers[arrays[kind]] if len(numbers) else arrays[kind]
        self._fingerprint.add(arrays)
        for name, array in arrays.items():
            self._write(name, array)
        for name, counted in STARTS.items():
            ends = self._ends[name] + np.cumsum(arrays[counted], dtype=_START_TYPE)
            self._write(name, ends)
            self._ends[name] = int(ends[-1]) if len(ends) else self._ends[name]

    def _write(self, name: str, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).view(np.uint8).data
        self._hashes[name].update(data)
        self._files[name].write(data)
        self._counts[name] += len(array)

    def finish(self, facts: Facts, dropped: Dropped, custom: CustomFacts | None = None) -> None:
        """Write the metadata and rename the folder."""
        self._stack.close()
        record = {
            "folder": self.folder.name,
            "facts": asdict(facts),
            "custom": asdict(custom or CustomFacts()),
            "dropped": {"counts": dropped.counts, "examples": dropped.examples},
            "counts": self._counts,
            "names": {kind: list(names) for kind, names in self._names.items()},
            "fingerprint": self._fingerprint.hexdigest(),
            "hashes": {name: hashes.hexdigests() for name, hashes in self._hashes.items()},
        }
        signed = json.dumps({"sha256": _hash_of(record), "record": record})
        (self._temporary / RECORD_NAME).write_text(signed, encoding="utf-8")
        replace(self._temporary, self.folder)  # an existing folder is damaged, or it would have been used

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.close()
        except OSError:  # closing fails again on a full disk; the first error is the useful one
            if kind is None:
                raise
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


@dataclass(frozen=True)
class Store:
    """An open store."""

    data: TokenData
    facts: Facts
    dropped: Dropped
    custom: CustomFacts
    """What the custom class did with the rows; empty without one."""


def open_store(folder: Path) -> Store | None:
    """Verify a store and map its files; None if there is none.

    Raises DamagedStore for one that cannot be read or is not what was written.
    """
    if not folder.exists():
        return None
    try:
        record = _read_record(folder)
        names = [*ARRAYS, *STARTS]
        _verify(folder, {name: _size_of(name, record["counts"][name]) for name in names}, record["hashes"])
        facts = Facts(**record["facts"])
        data = TokenData(
            {name: _mapped(folder / f"{name}.bin", name, record["counts"][name]) for name in names},
            files=record["names"]["file"],
            sources=record["names"]["source"],
            style=facts.style,
            has_text_prompts=facts.has_text_prompts,
            fingerprint=record["fingerprint"],
        )
        return Store(data, facts, Dropped(**record["dropped"]), CustomFacts(**record["custom"]))
    except OSError as error:
        raise DamagedStore(f"{Path(error.filename or folder).name}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedStore(f"{RECORD_NAME} is not what was written") from error


def _read_record(folder: Path) -> dict[str, Any]:
    if not (folder / RECORD_NAME).is_file():  # opening a named pipe would wait for its writer
        raise DamagedStore(f"{RECORD_NAME} is missing")
    signed = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    record: dict[str, Any] = signed["record"]
    if signed["sha256"] != _hash_of(record):
        raise ValueError
    if record["folder"] != folder.name:
        raise DamagedStore(f"it holds the tokens of {record['folder']}")
    return record


def _hash_of(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _size_of(name: str, count: int) -> int:
    return count * np.dtype(ARRAYS.get(name, _START_TYPE)).itemsize


def _verify(folder: Path, sizes: Mapping[str, int], hashes: Mapping[str, list[str]]) -> None:
    """Compare every block with its hash. Files are read, not mapped: an I/O error on a mapped file ends the process."""
    blocks = []
    for name, size in sizes.items():
        found = (folder / f"{name}.bin").stat().st_size
        if found != size:
            raise DamagedStore(f"{name}.bin has {found} bytes instead of {size}")
        starts = range(0, size, _BLOCK_BYTES)
        blocks += [(name, start, digest) for start, digest in zip(starts, hashes[name], strict=True)]

    def is_intact(block: tuple[str, int, str]) -> bool:
        name, start, digest = block
        with (folder / f"{name}.bin").open("rb", buffering=0) as file:
            file.seek(start)
            return hashlib.sha256(file.read(_BLOCK_BYTES)).hexdigest() == digest

    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        for (name, _, _), intact in zip(blocks, pool.map(is_intact, blocks), strict=True):
            if not intact:
                raise DamagedStore(f"{name}.bin is not what was written")


def _mapped(file: Path, name: str, count: int) -> np.ndarray:
    kind: Any = ARRAYS.get(name, _START_TYPE)
    # asarray: slicing a plain array is faster than slicing np.memmap
    return np.asarray(np.memmap(file, kind, mode="r", shape=(count,))) if count else np.zeros(0, kind)
