"""Samples: a few groups as the model sees them, in pieces, with the common prefix apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rm_gallery.data.tokenization.token_group import split_prefix
from rm_gallery.errors import BadRow
from rm_gallery.inspection.encoders import Encoder, Piece
from rm_gallery.schema import PreferenceGroup

HEAD_PIECES = 90
TAIL_PIECES = 40
MAX_RESPONSES = 8


@dataclass(frozen=True)
class Stretch:
    """The common prefix, or what one response has behind it."""

    label: str
    length: int
    """In tokens or words, all of it."""
    head: tuple[Piece, ...]
    tail: tuple[Piece, ...]
    """The end of a long stretch; what lies between head and tail is not shown."""
    num_hidden: int


@dataclass(frozen=True)
class Sample:
    """One group."""

    where: str
    source: str
    prefix: Stretch
    responses: tuple[Stretch, ...]
    num_hidden_responses: int


def make_sample(group: PreferenceGroup, encoder: Encoder) -> Sample:
    """Pieces of a group that `measure` has kept."""
    texts = encoder.encode([group])[0]
    assert not isinstance(texts, BadRow), "it was kept"
    split = split_prefix(*encoder.fit(texts, group))
    labels = _labels(group)[:MAX_RESPONSES]
    tails = split.tails[:MAX_RESPONSES]
    return Sample(
        group.where,
        group.source,
        _stretch("both" if len(group.responses) == 2 else "all", split.prefix.tolist(), group, encoder),
        tuple(_stretch(label, tail.tolist(), group, encoder) for label, tail in zip(labels, tails, strict=True)),
        len(split.tails) - len(tails),
    )


def _labels(group: PreferenceGroup) -> list[str]:
    """chosen and rejected for a pair; `response 1` and so on with their wins for more."""
    if len(group.responses) == 2 and len(group.comparisons) == 1:
        return ["chosen" if index == group.comparisons[0].better else "rejected" for index in range(2)]
    wins = [sum(each.better == index for each in group.comparisons) for index in range(len(group.responses))]
    losses = [sum(each.worse == index for each in group.comparisons) for index in range(len(group.responses))]
    return [f"response {index + 1}, +{wins[index]} -{losses[index]}" for index in range(len(group.responses))]


def _stretch(label: str, ids: Sequence[int], group: PreferenceGroup, encoder: Encoder) -> Stretch:
    if len(ids) <= HEAD_PIECES + TAIL_PIECES:
        return Stretch(label, len(ids), tuple(encoder.pieces(ids, group)), (), 0)
    head, tail = ids[:HEAD_PIECES], ids[-TAIL_PIECES:]
    return Stretch(
        label,
        len(ids),
        tuple(encoder.pieces(head, group)),
        tuple(encoder.pieces(tail, group)),
        len(ids) - HEAD_PIECES - TAIL_PIECES,
    )
