"""Token store: token data as a folder of flat files, written once chunk by chunk, and memory-mapped.

The folder is written atomically: under a temporary name, `store.json` last, then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from rm_gallery.data.custom import CustomFacts
from rm_gallery.data.token_cache.arrays import ARRAYS, STARTS, Fingerprint, TokenChunk, TokenData
from rm_gallery.errors import Dropped
from rm_gallery.files import replace
from rm_gallery.schema import InputStyle

RECORD_NAME = "store.json"
_START_TYPE = np.int64


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


class StoreWriter:
    """Writes a store atomically: `folder` exists after `finish`, and without it no file remains."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        self._counts = dict.fromkeys([*ARRAYS, *STARTS], 0)
        self._ends = dict.fromkeys(STARTS, 0)
        self._files: dict[str, BinaryIO] = {}
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
        self._files[name].write(np.ascontiguousarray(array).data)
        self._counts[name] += len(array)

    def finish(self, facts: Facts, dropped: Dropped, custom: CustomFacts | None = None) -> None:
        """Write the metadata and rename the folder."""
        self._stack.close()
        record = {
            "facts": asdict(facts),
            "custom": asdict(custom or CustomFacts()),
            "dropped": {"counts": dropped.counts, "examples": dropped.examples},
            "counts": self._counts,
            "names": {kind: list(names) for kind, names in self._names.items()},
            "fingerprint": self._fingerprint.hexdigest(),
        }
        (self._temporary / RECORD_NAME).write_text(json.dumps(record), encoding="utf-8")
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
    """Memory-map a store; None if there is none or it is incomplete."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        arrays = {name: _mapped(folder / f"{name}.bin", name, count) for name, count in record["counts"].items()}
        facts = Facts(**record["facts"])
        data = TokenData(
            arrays,
            files=record["names"]["file"],
            sources=record["names"]["source"],
            style=facts.style,
            has_text_prompts=facts.has_text_prompts,
            fingerprint=record["fingerprint"],
        )
        return Store(data, facts, Dropped(**record["dropped"]), CustomFacts(**record["custom"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mapped(file: Path, name: str, count: int) -> np.ndarray:
    kind: Any = ARRAYS.get(name, _START_TYPE)
    size = count * np.dtype(kind).itemsize
    if file.stat().st_size != size:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, not {size}")
    # asarray: slicing a plain array is faster than slicing np.memmap
    return np.asarray(np.memmap(file, kind, mode="r", shape=(count,))) if count else np.zeros(0, kind)
