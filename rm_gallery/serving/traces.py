"""Traces: the reward after each token of a response, which is that of the text if it ended there.

A packed decoder has all of them from one forward pass. Of other models the text is scored as often as it has tokens,
cut after each; where that would be too much, after every second, third, ... one. An ensemble combines those of its
members, which must read the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rm_gallery.serving.limits import bad_request
from rm_gallery.serving.served import Conversation, Item, Member, Places, ServedModel, Truncation

MAX_TOKENS = 1 << 16
"""Of the texts of a request, and of the cut texts that are scored for it."""
_MAX_CUTS = 512
_MAX_CHARACTER_TOKENS = 8
"""Tokens of a character, with those of a broken one."""


@dataclass(frozen=True)
class Trace:
    """The reward after each piece of a response: a token, or several where not every token is read."""

    start: int
    """Tokens of the text before the first one listed: the prompt. 0 if the start of the response is not found."""
    num_tokens: int
    """Of the text."""
    before: float | None
    """The reward after the token before the first one listed; None if there is none."""
    pieces: list[str]
    rewards: list[float]
    """The last one is the reward of the text."""


async def trace(model: ServedModel, items: Sequence[Item], count: int, client: str) -> list[Trace]:
    """The traces of `count` texts. Raises Refused as `ServedModel.score`, and for texts that are too long."""
    found = []
    for member in model.members:
        if member.scorer.engine.has_token_rewards:
            found.append(await _from_one_pass(member, items, count, client))
        else:
            found.append(await _from_cuts(member, items, count, client))
    first, *others = found
    for other in others:
        if [(each.start, each.pieces) for each in other] != [(each.start, each.pieces) for each in first]:
            raise bad_request(
                "the models of this ensemble read the texts as different tokens, so it has no reward after each of "
                "them; serve one of them under a name of its own"
            )
    return first if not others else [_combined(model, traces) for traces in zip(*found, strict=True)]


def _combined(model: ServedModel, traces: Sequence[Trace]) -> Trace:
    first = traces[0]
    befores = [each.before for each in traces if each.before is not None]
    rewards = [reward for reward, _ in model.reduction.of([each.rewards for each in traces])]
    before = model.reduction.of([[each] for each in befores])[0][0] if befores else None
    return Trace(first.start, first.num_tokens, before, first.pieces, rewards)


async def _from_one_pass(member: Member, items: Sequence[Item], count: int, client: str) -> list[Trace]:
    async with Places([member], count) as places:
        texts = await member.encode(items, Truncation())
        _check_tokens(sum(map(len, texts)))
        [rewards] = await places.submit([texts], client, every_token=True)

    def describe() -> list[Trace]:
        return [
            Trace(start, len(text), values[start - 1] if start else None, _pieces(member, text, start), values[start:])
            for text, values, start in zip(texts, rewards, _starts(member, items, texts), strict=True)
        ]

    return await member.run_beside(describe)


async def _from_cuts(member: Member, items: Sequence[Item], count: int, client: str) -> list[Trace]:
    async with Places([member], count):
        texts = await member.encode(items, Truncation())
    _check_tokens(sum(map(len, texts)))
    closings, starts = await member.run_beside(
        lambda: ([_closing(member, text) for text in texts], _starts(member, items, texts))
    )
    starts = [  # of an empty response, its last token before the closing ones
        min(start, len(text) - closing - 1) for start, text, closing in zip(starts, texts, closings, strict=True)
    ]
    ends = _ends(texts, starts, closings, min(_MAX_CUTS, member.queue.max_waiting))
    cuts = [
        np.concatenate([text[:end], text[len(text) - closing :]])
        for text, closing, each in zip(texts, closings, ends, strict=True)
        for end in each
    ]
    async with Places([member], len(cuts)) as places:
        [rewards] = await places.submit([cuts], client)
    values = iter(rewards)

    def describe() -> list[Trace]:
        found = []
        for text, start, each in zip(texts, starts, ends, strict=True):
            read = [next(values) for _ in each]
            whole = _pieces(member, text, start)
            bounds = [start, *(end for end in each if end > start)]
            bounds[-1] = len(text)  # the closing tokens belong to the last piece
            pieces = ["".join(whole[low - start : high - start]) for low, high in pairwise(bounds)]
            before = read.pop(0) if each[0] == start else None
            found.append(Trace(start, len(text), before, pieces, read))
        return found

    return await member.run_beside(describe)


def _check_tokens(count: int) -> None:
    if count > MAX_TOKENS:
        raise bad_request(f"the texts have {count} tokens, a trace at most {MAX_TOKENS}; send fewer texts")


def _closing(member: Member, text: np.ndarray) -> int:
    """The number of tokens that end every text of the model, such as [SEP], which a cut text keeps."""
    engine = member.scorer.engine
    plain, whole = engine.tokenizer("a", add_special_tokens=False)["input_ids"], engine.tokenizer("a")["input_ids"]
    appended: list[int] = next((whole[at + 1 :] for at, each in enumerate(whole) if plain and each == plain[-1]), [])
    for closing in ([*appended, *engine.source.closing_ids], list(engine.source.closing_ids), appended):
        if closing and len(text) > len(closing) and text[len(text) - len(closing) :].tolist() == closing:
            return len(closing)
    return 0


def _ends(
    texts: Sequence[np.ndarray], starts: Sequence[int], closings: Sequence[int], max_cuts: int
) -> list[list[int]]:
    """The numbers of tokens after which each text is cut: after the prompt, and after every n-th token of the response.

    The last one is the whole text without its closing tokens. n is 1, or large enough for all cut texts together to be
    within `MAX_TOKENS` and `max_cuts`, if any number is.
    """
    wholes = [len(text) - closing for text, closing in zip(texts, closings, strict=True)]
    step = 1
    while True:
        found = []
        for whole, start in zip(wholes, starts, strict=True):
            ends = list(range(whole, start, -step))[::-1] or [whole]
            found.append([start, *ends] if 0 < start < ends[0] else ends)
        tokens = sum(end + closing for ends, closing in zip(found, closings, strict=True) for end in ends)
        too_many = max(tokens / MAX_TOKENS, sum(map(len, found)) / max_cuts)
        if too_many <= 1 or all(len(ends) <= 2 for ends in found):
            return found
        step = max(step + 1, math.floor(step * too_many))


def _starts(member: Member, items: Sequence[Item], texts: Sequence[np.ndarray]) -> list[int]:
    """The first token of each response; 0 for a text that is not known to have a prompt."""
    found: list[int] = []
    scorer = member.scorer
    for item in items:
        if not isinstance(item, Conversation):
            found.append(0)
            continue
        if item.responses is None:  # the last turn is the response
            group = scorer.inputs.group(item.messages[:-1], [item.messages[-1:]], item.tools)
        else:
            group = scorer.inputs.group(item.messages, item.responses, item.tools)
        own = [text.tolist() for text in texts[len(found) : len(found) + len(group.responses)]]
        found += [start or 0 for start in scorer.engine.response_starts(own, group)]
    return found


def _pieces(member: Member, ids: np.ndarray, start: int) -> list[str]:
    """The text of each token from `start` on. One that ends inside a character has "": the last has all of it."""
    tokenizer, pieces = member.scorer.engine.tokenizer, []
    before, pending = [int(each) for each in ids[max(start - 1, 0) : start]], list[int]()
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    for number, token in enumerate(ids[start:].tolist(), start + 1):
        pending.append(token)
        # With the token before it, since some tokenizers drop the space at the start of a text.
        known, whole = tokenizer.decode(before, **options), tokenizer.decode([*before, *pending], **options)
        if whole.endswith("\ufffd") and len(pending) < _MAX_CHARACTER_TOKENS and number < len(ids):
            pieces.append("")
            continue
        pieces.append(whole[len(known) :] if whole.startswith(known) else tokenizer.decode(pending, **options))
        before, pending = pending[-1:] if not whole.endswith("\ufffd") else [], []
    return pieces
