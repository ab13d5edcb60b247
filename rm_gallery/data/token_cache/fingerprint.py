"""The fingerprint of token data, by which a run recognizes the data that it resumes with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np


class Fingerprint:
    """Hash of what the model sees of token data, updated chunk by chunk; independent of chunk boundaries."""

    _SEEN = (
        "tokens", "prefix", "num_responses", "tail", "num_comparisons", "better", "worse", "weight", "margin",
        "p_better",
    )  # fmt: skip
    _NONE = {
        "score": np.nan, "rank": np.nan, "rating_weight": 1.0, "attributes": np.nan, "tied": 0, "span_response": -1,
        "span_first": -1, "span_last": -1,
    }  # fmt: skip
    """What data without ratings, ties and spans have: they keep the hash that they had before these were stored."""

    def __init__(self) -> None:
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in (*self._SEEN, *self._NONE)}
        self._found = set(self._SEEN)

    def add(self, arrays: Mapping[str, np.ndarray]) -> Fingerprint:
        for name, digest in self._digests.items():
            array = np.ascontiguousarray(arrays[name])
            digest.update(array.data)
            if name in self._NONE and not np.array_equal(
                array, np.full_like(array, self._NONE[name]), equal_nan=array.dtype.kind == "f"
            ):
                self._found.add(name)
        return self

    def hexdigest(self) -> str:
        seen = b"".join(each.digest() for name, each in self._digests.items() if name in self._found)
        return hashlib.blake2b(seen).hexdigest()[:16]
