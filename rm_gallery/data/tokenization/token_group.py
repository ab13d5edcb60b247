"""Token groups: one prompt and its responses as token ids, with the common prefix split off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rm_gallery.errors import BadRow
from rm_gallery.schema import Comparison


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """One group as tokens: the common prefix once, then each response's own tokens."""

    prefix: np.ndarray
    """[P] int32, P >= 0."""
    tails: list[np.ndarray]
    """K arrays int32, each with at least one token."""
    comparisons: Sequence[Comparison]

    def sizes(self) -> tuple[int, int, int, int]:
        """Tokens with the prefix counted once, tokens of the longest text, responses, comparisons."""
        tails = [len(tail) for tail in self.tails]
        return len(self.prefix) + sum(tails), len(self.prefix) + max(tails), len(tails), len(self.comparisons)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a group came from, as its token data keeps it."""

    file: str = ""
    row: int = 0
    source: str = ""
    prompt_hash: int = 0
    """The same number for the same prompt; see `formats.hash_prompt`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def split_prefix(texts: Sequence[Sequence[int] | np.ndarray], comparisons: Sequence[Comparison]) -> TokenGroup:
    """Split the longest common prefix off, leaving every response at least one token of its own.

    Example: [1 2 3 4] and [1 2 3] give prefix [1 2], tails [3 4] and [3].
    Raises BadRow for a text without a token, which no reward can be read from.
    """
    arrays = [np.asarray(ids, np.int32) for ids in texts]
    size = min(len(array) for array in arrays) - 1
    if size < 0:
        raise BadRow("text without a token")
    first = arrays[0][:size]
    for array in arrays[1:]:
        differs = np.flatnonzero(array[:size] != first[:size])
        size = int(differs[0]) if len(differs) else size
    if len(arrays) == 1:
        size = 0  # nothing to share: the whole text is the response's own
    return TokenGroup(arrays[0][:size], [array[size:] for array in arrays], comparisons)
