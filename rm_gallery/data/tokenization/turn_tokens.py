"""Turn tokens: the added tokens of a tokenizer with which a content could forge a turn.

Decided by comparing renderings of probe conversations, not by names. Example, ChatML with reasoning: the template
writes `<|im_end|>` and `<|im_start|>` between turns, so they are turn tokens. It writes `<think>` and `</think>` only
after the header of an assistant turn, and looks for them in contents, so they are part of contents.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from rm_gallery.schema import Message

TryRender: TypeAlias = Callable[[Sequence[Message]], str | None]
"""A conversation rendered by the chat template; None if the template rejects it."""

_MARKS = ("Marka", "Markb", "Markc", "Markd")
_HIDDEN = "\U000f6a13"


def turn_tokens(tokenizer: Any, render: TryRender) -> list[str]:
    """Tokens that contents must not produce, ordered by id.

    All special tokens and those that the template writes around turns, except tokens of contents: those that it looks
    for in contents, and those not special that it writes only inside assistant turns. A token that begins or ends a
    turn is always one.
    """
    added = [token for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.content]
    named = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    pattern = one_of([token.content for token in added])
    around, boundary, inside = _places(render, pattern)
    special = {token.content for token in added if token.special}
    open_ones = (special | around) - boundary - named - (inside - special)
    in_template = _named_in_template(tokenizer, pattern)
    named_tags = [token.content for token in added if token.content in in_template]
    tags = _looked_for(open_ones, named_tags, render)
    control = boundary | named | (open_ones - tags)
    return [token.content for token in added if token.content in control]


def added_controls(tokenizer: Any, turns: Sequence[str]) -> list[str]:
    """Control tokens of raw texts, which have no template: all special tokens and the turn tokens, ordered by id."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    return [each.content for _, each in added if each.content and (each.special or each.content in turns)]


def one_of(texts: Sequence[str]) -> re.Pattern[str]:
    """A pattern that matches the longest of these texts; it matches nothing if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _places(render: TryRender, pattern: re.Pattern[str]) -> tuple[set[str], set[str], set[str]]:
    """(tokens anywhere around contents, those that begin or end a turn, those only inside assistant turns)."""
    roles = ("user", "assistant", "user", "assistant")
    between = _between(render, roles)
    if between is None:  # the template rejects this conversation or does not write it as it is
        found = set(pattern.findall(render(_messages(roles[:3])) or render(_messages(roles[:1])) or ""))
        return found, found, set()
    lead, to_answer, to_question, to_last, closing = (pattern.findall(text) for text in between)
    boundary = {*to_question, *closing}
    inside = [[token for token in tokens if token not in boundary] for tokens in (to_answer, to_last)]
    first = {tokens[0] for tokens in inside if tokens}
    doubtful = set() if boundary - {*closing} else first  # no token begins user turns: does one begin these?
    if to_question and to_question[-1] not in to_answer:  # each role begins with a token of its own
        boundary |= first
    around = boundary.union(lead, *inside)
    system = _between(render, ("system", "user", "assistant"))
    if system is not None:
        begins = {*pattern.findall(system[0])[-1:], *pattern.findall(system[1])}
        boundary |= begins - set().union(*inside)
    return around | boundary, boundary, set().union(*inside) - boundary - doubtful


def _messages(roles: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=False)]


def _between(render: TryRender, roles: Sequence[str]) -> list[str] | None:
    """What the template writes before, between and after the contents of a conversation with these roles."""
    text = render(_messages(roles)) or ""
    marks = _MARKS[: len(roles)]
    found = re.split("|".join(marks), text)
    return found if re.findall("|".join(marks), text) == list(marks) else None


def _named_in_template(tokenizer: Any, pattern: re.Pattern[str]) -> set[str]:
    template = tokenizer.chat_template
    source = "\n".join(template.values()) if isinstance(template, dict) else template or ""
    return set(pattern.findall(source))


def _looked_for(candidates: set[str], named: Sequence[str], render: TryRender) -> set[str]:
    """The candidates that change what the template writes when contents hold them, alone or with another tag.

    named: all tags in the template, ordered by id, where the two tags of a pair follow each other.
    """
    pairs = [*itertools.pairwise(named), *((second, first) for first, second in itertools.pairwise(named))]
    probes = [(tag, "") for tag in named] + pairs
    found: set[str] = set()
    for first, second in probes if candidates.intersection(named) else ():
        for content in (f"{first}x{second}", f"a{first}x{second}b"):
            for tag in candidates.intersection((first, second)) - found:
                if _changes(tag, content, render):
                    found.add(tag)
    return found


def _changes(tag: str, content: str, render: TryRender) -> bool:
    """Whether the template reads the tag in this content of a user or an assistant turn, as text it does not copy."""
    for contents in (("a", content, "b", content), (content, "b")):
        messages = [
            {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, contents, strict=False)
        ]
        hidden = [{**message, "content": message["content"].replace(tag, _HIDDEN)} for message in messages]
        plain, masked = render(messages), render(hidden)
        if plain is not None and masked is not None and masked.replace(_HIDDEN, tag) != plain:
            return True
    return False
