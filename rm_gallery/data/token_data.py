"""Token data: all groups of a data set, by number.

Their arrays may lie in memory or be mapped from files (`token_store.py`): nothing here copies them whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rm_gallery.data.token_arrays import PER_COMPARISON, Fingerprint, make_chunk, with_starts
from rm_gallery.data.token_group import Origin, TokenGroup
from rm_gallery.schema import Comparison, InputStyle

# N groups, R responses, C comparisons, T tokens; each count is over the whole data set


@dataclass(frozen=True, slots=True)
class GroupSizes:
    """What planning needs to know of the groups; each is [N] int32 or int64, perhaps mapped from a file."""

    tokens: np.ndarray
    """Tokens of the group, the common prefix counted once."""
    longest_text: np.ndarray
    """Tokens of its longest whole text, prefix and response."""
    num_responses: np.ndarray
    num_comparisons: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, groups: np.ndarray) -> GroupSizes:
        """Those of some groups, in this order."""
        return GroupSizes(
            self.tokens[groups], self.longest_text[groups], self.num_responses[groups], self.num_comparisons[groups]
        )


class TokenData:
    """All groups of a data set; `data[i]` is the i-th `TokenGroup`."""

    def __init__(
        self, arrays: Mapping[str, np.ndarray], *, files: Sequence[str], sources: Sequence[str], style: InputStyle,
        has_text_prompts: bool = False, fingerprint: str | None = None,
    ) -> None:  # fmt: skip
        """arrays: those of `ARRAYS` and `STARTS`. fingerprint: if it is known already, since it takes a while."""
        self._arrays = arrays
        self.files, self.sources = files, sources
        """Names that `file` and `source` of a group are numbers into."""
        self.style = style
        self.has_text_prompts = has_text_prompts
        """Style `text`: whether a prompt stood before the responses, joined directly."""
        self._fingerprint = fingerprint
        self.sizes = GroupSizes(
            tokens=arrays["group_tokens"],
            longest_text=arrays["longest_text"],
            num_responses=arrays["num_responses"],
            num_comparisons=arrays["num_comparisons"],
        )

    @classmethod
    def from_groups(
        cls, groups: Iterable[tuple[TokenGroup, Origin]], style: InputStyle = "text", *, has_text_prompts: bool = False
    ) -> TokenData:
        """Token data in memory."""
        chunk = make_chunk(groups)
        return cls(
            with_starts(chunk.arrays),
            files=chunk.files,
            sources=chunk.sources,
            style=style,
            has_text_prompts=has_text_prompts,
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> TokenGroup:
        arrays = self._arrays
        start, prefix = int(arrays["token_start"][index]), int(arrays["prefix"][index])
        tails = arrays["tail"][arrays["response_start"][index] : arrays["response_start"][index + 1]]
        tokens = np.asarray(arrays["tokens"][start : int(arrays["token_start"][index + 1])])
        bounds = prefix + np.cumsum(np.concatenate([[0], tails]))
        parts = [tokens[first:last] for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
        return TokenGroup(tokens[:prefix], parts, self._comparisons(index))

    def _comparisons(self, index: int) -> list[Comparison]:
        first, last = (int(self._arrays["comparison_start"][place]) for place in (index, index + 1))
        columns = [self._arrays[name][first:last].tolist() for name in PER_COMPARISON]
        return [
            Comparison(better, worse, weight, _or_none(margin), _or_none(p_better))
            for better, worse, weight, margin, p_better in zip(*columns, strict=True)
        ]

    @property
    def tokens(self) -> np.ndarray:
        """[T] int32: of every group its common prefix, then its responses' own tokens."""
        return self._arrays["tokens"]

    @property
    def num_tokens(self) -> int:
        """Of all groups, shared prompts counted once."""
        return len(self.tokens)

    @property
    def num_comparisons(self) -> int:
        return len(self._arrays["better"])

    @property
    def tail_lengths(self) -> np.ndarray:
        """[R] int32: tokens of each response behind the common prefix, group after group."""
        return self._arrays["tail"]

    @property
    def prefix_lengths(self) -> np.ndarray:
        """[N] int32: tokens of the common prefix of each group."""
        return self._arrays["prefix"]

    @property
    def prompt_hashes(self) -> np.ndarray:
        """[N] uint64: the same number for groups of the same prompt."""
        return self._arrays["prompt_hash"]

    def pair_lengths(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Each comparison of these groups: its group, and tokens of the common prefix and of the two responses.

        Each [C] int64, C comparisons of these groups.
        """
        arrays = self._arrays
        counts = self.sizes.num_comparisons[groups].astype(np.int64)
        owner = np.repeat(groups, counts)
        ends = np.cumsum(counts)
        index = np.arange(len(owner)) + np.repeat(arrays["comparison_start"][groups] - (ends - counts), counts)
        first = arrays["response_start"][owner]
        better, worse = (arrays["tail"][first + arrays[side][index]].astype(np.int64) for side in ("better", "worse"))
        return owner, arrays["prefix"][owner].astype(np.int64), better, worse

    @property
    def source_numbers(self) -> np.ndarray:
        """[N] int32: numbers into `sources`."""
        return self._arrays["source"]

    @property
    def file_numbers(self) -> np.ndarray:
        """[N] int32: numbers into `files`."""
        return self._arrays["file"]

    def where(self, index: int) -> str:
        """`file:row` of a group."""
        return f"{self.files[int(self._arrays['file'][index])]}:{int(self._arrays['row'][index])}"

    def metadata(self, index: int) -> dict[str, Any]:
        """What the group's row brought along (its ground truth, say)."""
        first, last = (int(self._arrays["metadata_start"][place]) for place in (index, index + 1))
        return json.loads(self._arrays["metadata"][first:last].tobytes()) if last > first else {}

    def unused_labels(self) -> list[str]:
        """Which of margins and soft labels any comparison carries."""
        names = {"margin": "margins", "p_better": "soft labels"}
        return [label for name, label in names.items() if not np.isnan(self._arrays[name]).all()]

    def fingerprint(self) -> str:
        """Hash of everything the model sees: tokens, where responses begin and end, comparisons."""
        if self._fingerprint is None:
            self._fingerprint = Fingerprint().add(self._arrays).hexdigest()
        return self._fingerprint


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
