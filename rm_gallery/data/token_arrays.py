"""Token arrays: how groups are laid out in flat arrays, in memory and in files alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rm_gallery.data.token_group import Origin, TokenGroup

# N groups, R responses, C comparisons, T tokens; each count is over the whole data set or chunk

# What token data consist of: name -> type, by what it has one item for.
PER_GROUP = {
    "prefix": np.int32, "num_responses": np.int32, "num_comparisons": np.int32, "group_tokens": np.int32,
    "longest_text": np.int32, "file": np.int32, "row": np.int64, "source": np.int32, "prompt_hash": np.uint64,
    "metadata_bytes": np.int32,
}  # fmt: skip
PER_RESPONSE = {"tail": np.int32}
PER_COMPARISON = {
    "better": np.int32, "worse": np.int32, "weight": np.float32, "margin": np.float32, "p_better": np.float32,
}  # fmt: skip
ARRAYS = {**PER_GROUP, **PER_RESPONSE, **PER_COMPARISON, "tokens": np.int32, "metadata": np.uint8}
# Where a group's items begin in the arrays of the others, one more than there are groups; int64.
STARTS = {
    "token_start": "group_tokens", "response_start": "num_responses", "comparison_start": "num_comparisons",
    "metadata_start": "metadata_bytes",
}  # fmt: skip


@dataclass
class TokenChunk:
    """Some groups as the arrays of `ARRAYS`; `file` and `source` are numbers into the chunk's own lists of names."""

    arrays: dict[str, np.ndarray]
    files: list[str]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.arrays["prefix"])


def make_chunk(groups: Iterable[tuple[TokenGroup, Origin]]) -> TokenChunk:
    """Groups with their origins as arrays."""
    files: dict[str, int] = {}
    sources: dict[str, int] = {}
    per_group: list[tuple[int, ...]] = []
    tails: list[int] = []
    comparisons: list[tuple[float, ...]] = []
    tokens: list[np.ndarray] = []
    metadata: list[bytes] = []
    for group, origin in groups:
        lengths = [len(tail) for tail in group.tails]
        note = json.dumps(dict(origin.metadata), default=str).encode() if origin.metadata else b""
        per_group.append(
            (
                len(group.prefix), len(lengths), len(group.comparisons), len(group.prefix) + sum(lengths),
                len(group.prefix) + max(lengths), files.setdefault(origin.file, len(files)), origin.row,
                sources.setdefault(origin.source, len(sources)), origin.prompt_hash, len(note),
            )
        )  # fmt: skip
        tails += lengths
        comparisons += [
            (each.better, each.worse, each.weight, _or_nan(each.margin), _or_nan(each.p_better))
            for each in group.comparisons
        ]
        tokens += [group.prefix, *group.tails]
        metadata.append(note)
    arrays = {
        **_columns(PER_GROUP, per_group),
        **_columns(PER_COMPARISON, comparisons),
        "tail": np.array(tails, np.int32),
        "tokens": np.concatenate(tokens).astype(np.int32, copy=False) if tokens else np.zeros(0, np.int32),
        "metadata": np.frombuffer(b"".join(metadata), np.uint8),
    }
    return TokenChunk(arrays, list(files), list(sources))


def _columns(types: Mapping[str, Any], rows: list[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    columns = list(zip(*rows, strict=True)) or [()] * len(types)
    return {name: np.array(column, kind) for (name, kind), column in zip(types.items(), columns, strict=True)}


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def with_starts(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays together with those of `STARTS`."""
    starts = {
        name: np.concatenate([[0], np.cumsum(arrays[counted], dtype=np.int64)]) for name, counted in STARTS.items()
    }
    return {**arrays, **starts}


class Fingerprint:
    """Hash of what the model sees of token data, fed chunk after chunk; how they were cut does not matter."""

    _SEEN = ("tokens", "prefix", "num_responses", "tail", "num_comparisons", *PER_COMPARISON)

    def __init__(self) -> None:
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in self._SEEN}

    def add(self, arrays: Mapping[str, np.ndarray]) -> Fingerprint:
        for name, digest in self._digests.items():
            digest.update(np.ascontiguousarray(arrays[name]).data)
        return self

    def hexdigest(self) -> str:
        return hashlib.blake2b(b"".join(each.digest() for each in self._digests.values())).hexdigest()[:16]
