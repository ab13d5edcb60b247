"""Texts that begin alike, from any calls, become token groups: their common beginning is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.tokenization.token_group import TokenGroup, split_prefix

_MIN_SHARED = 16  # tokens
_MIN_SHARE = 8  # a text joins a group if it saves at least 1 / 8 of its tokens; attention over wide groups costs too


@dataclass(frozen=True)
class SharedGroup:
    """A token group, and which of the texts its responses are."""

    tokens: TokenGroup
    members: list[list[int]]
    """Of each response: the indices of the texts that have its tokens, at least one."""


@dataclass
class _Open:
    """A group that texts may still join."""

    texts: list[np.ndarray]
    members: list[list[int]]
    shared: int
    """Tokens that its texts have in common."""
    tokens: int
    """Of all texts, the common ones once."""


def share_prefixes(texts: Sequence[np.ndarray], packer: Packer) -> list[SharedGroup]:
    """The texts as groups within the token budget; equal texts are one response.

    Texts are sorted by their tokens, so that those with a common beginning are neighbors; each joins the group before
    it if that saves tokens. A model that pads computes whole texts: a group for each.

    Example, a prompt of 500 tokens with responses of 100, 120 and 90 from three calls: one group of 810 tokens instead
    of 1,810. A text that shares only the first 20 tokens stays apart.
    """
    order = sorted(range(len(texts)), key=lambda index: texts[index].astype(">i4").tobytes())
    groups: list[_Open] = []
    for index in order:
        text = texts[index]
        last = groups[-1] if groups else None
        common = 0 if last is None else common_tokens(last.texts[-1], text)
        if last is not None and common == len(text) == len(last.texts[-1]):
            last.members[-1].append(index)
        elif last is not None and not packer.padded and _joins(last, common, len(text), packer.token_budget):
            shared = min(last.shared, common)
            last.tokens += len(text) - shared + (last.shared - shared) * (len(last.texts) - 1)
            last.shared = shared
            last.texts.append(text)
            last.members.append([index])
        else:
            groups.append(_Open([text], [[index]], len(text), len(text)))
    return [SharedGroup(split_prefix(each.texts, ()), each.members) for each in groups]


def _joins(group: _Open, common: int, length: int, budget: int) -> bool:
    """Whether a text of this length, with this many tokens in common with the group's last one, is to join it."""
    shared = min(group.shared, common)
    given_up = (group.shared - shared) * (len(group.texts) - 1)  # by the texts inside, which share less from then on
    saved = shared - given_up
    return shared >= _MIN_SHARED and saved * _MIN_SHARE >= length and group.tokens + length - saved <= budget


def common_tokens(one: np.ndarray, other: np.ndarray) -> int:
    """Number of tokens with which both begin."""
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size
