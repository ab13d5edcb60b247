"""Token groups: one prompt and its responses as token ids, with their common prefix stored once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rm_gallery.errors import BadRow
from rm_gallery.schema import Comparison, Rating


@dataclass(frozen=True, slots=True)
class Span:
    """Target tokens of the language-model loss: `first` to `last` (exclusive) of the whole text of a response.

    The first token of a text has no token before it that predicts it, so `first` is at least 1.
    """

    response: int
    first: int
    last: int
    comparison: int | None = None
    """The comparison of the group that it belongs to, as its preferred response; None in conversations."""
    weight: float = 1.0
    """Factor of the loss of these tokens."""


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """One group as tokens: the common prefix once, and the remaining tokens of each response."""

    prefix: np.ndarray
    """[P] int32, P >= 0."""
    tails: list[np.ndarray]
    """K int32 arrays, each with at least one token."""
    comparisons: Sequence[Comparison]
    ratings: Sequence[Rating] = ()
    spans: Sequence[Span] = ()
    """Target tokens of the language-model loss; a span that is listed twice counts twice."""

    def sizes(self) -> tuple[int, int, int, int]:
        """(tokens with the prefix counted once, tokens of the longest text, responses, comparisons or ratings).

        Each conversation (a response with spans, without comparisons) counts as one.
        Example: a prefix of 4 tokens, tails of 2 and 3 and one comparison give (9, 7, 2, 1).
        """
        tails = [len(tail) for tail in self.tails]
        return (
            len(self.prefix) + sum(tails),
            len(self.prefix) + max(tails),
            len(tails),
            len(self.comparisons or self.ratings) or (len(tails) if self.spans else 0),
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """Provenance of a group in token data."""

    file: str = ""
    row: int = 0
    source: str = ""
    prompt_hash: int = 0
    """Equal for equal prompts; see `formats.hash_prompt`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def split_prefix(
    texts: Sequence[Sequence[int] | np.ndarray], comparisons: Sequence[Comparison], ratings: Sequence[Rating] = (),
    spans: Sequence[Span] = (),
) -> TokenGroup:  # fmt: skip
    """The group with the longest common prefix of its texts split off; every tail keeps at least one token.

    [1 2 3 4] and [1 2 5] give the prefix [1 2] with tails [3 4] and [5]. [1 2 3 4] and [1 2 3] give the prefix [1 2]
    with tails [3 4] and [3]: the reward of the second text is read at its last token, which must not be shared. A
    single text has an empty prefix.
    Raises BadRow for a text without tokens, which has no reward.
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
        size = 0  # nothing to share
    return TokenGroup(arrays[0][:size], [array[size:] for array in arrays], comparisons, ratings, spans)


def ranks_of(comparisons: Sequence[Comparison]) -> dict[int, int]:
    """Rank of each response that is compared, 0 for the best: comparisons in the longest chain above it.

    Tied responses have the same rank. Example: 2 > 0, 2 > 1, 0 > 3, 1 > 3 and 2 > 3 give {2: 0, 0: 1, 1: 1, 3: 2}.
    Empty for comparisons in a circle.
    """
    ranks = {response: 0 for each in comparisons for response in (each.better, each.worse)}
    for _ in range(len(ranks) + 1):
        changed = False
        for each in comparisons:
            if ranks[each.worse] <= ranks[each.better]:
                ranks[each.worse], changed = ranks[each.better] + 1, True
        if not changed:
            return ranks
    return {}


def largest_tie(comparisons: Sequence[Comparison]) -> int:
    """The most responses of a ranking that are tied and better than others."""
    counts = Counter(ranks_of(comparisons).values())
    return max((count for rank, count in counts.items() if rank < max(counts)), default=0)


def is_ranking(group: TokenGroup) -> bool:
    """Whether every two compared responses of different rank and text are compared, with one weight for all."""
    ranks, compared = ranks_of(group.comparisons), {(each.better, each.worse) for each in group.comparisons}
    return bool(ranks) and len({each.weight for each in group.comparisons}) == 1 and all(
        (i, j) in compared or np.array_equal(group.tails[i], group.tails[j])
        for i in ranks for j in ranks if ranks[i] < ranks[j]
    )  # fmt: skip
