"""The length policy: what happens to texts with more tokens than `data.max_length`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rm_gallery.data.dropped import BadRow
from rm_gallery.errors import UserError
from rm_gallery.schema import Comparison, PreferenceGroup


@dataclass(frozen=True)
class LengthConfig:
    """Part of `data`: what happens to texts that are too long."""

    __pydantic_config__ = {"extra": "forbid"}

    max_length: int = 4096
    """Most tokens of one prompt with one response."""
    filter_overlong_prompts: bool = True
    """Leave out, and count, a group with a text longer than `max_length`; nothing is ever cut then."""
    truncation: Literal["error", "left", "right"] = "error"
    """Without that filter: stop at the first such text, or keep its last (`left` is cut) or first tokens."""


def fit_length(
    texts: list[list[int]], group: PreferenceGroup, tokenizer: Any, config: LengthConfig
) -> tuple[list[list[int]], Sequence[Comparison]]:
    """The same texts under the length policy, and the comparisons whose sides still differ.

    Raises BadRow for a group that the policy leaves out, and for one whose comparisons all have equal sides.
    """
    longest = max(map(len, texts), default=0)
    if longest <= config.max_length:
        fitted = texts
    elif config.filter_overlong_prompts:
        raise BadRow(f"longer than data.max_length={config.max_length}")
    elif config.truncation == "error":
        raise UserError(
            f"{group.where}: a text of {longest} tokens is longer than data.max_length={config.max_length}; raise it, "
            "set data.filter_overlong_prompts=true to leave such rows out, or data.truncation=left|right to cut them"
        )
    else:
        fitted = [_cut(ids, tokenizer, config) for ids in texts]
    differing = [each for each in group.comparisons if fitted[each.better] != fitted[each.worse]]
    if group.comparisons and not differing:
        cut = " after truncation" if longest > config.max_length else " as tokens"
        raise BadRow(f"chosen equal to rejected{cut}")
    return fitted, differing


def _cut(ids: list[int], tokenizer: Any, config: LengthConfig) -> list[int]:
    """At most `max_length` tokens; the special tokens that open and close a bare text stay where they are."""
    excess = len(ids) - config.max_length
    if excess <= 0:
        return ids
    special = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    head = 1 if ids[0] in special else 0
    tail = 1 if ids[-1] in closing and config.max_length > head + 1 else 0
    body = ids[head : len(ids) - tail]
    body = body[excess:] if config.truncation == "left" else body[: len(body) - excess]
    return ids[:head] + body + ids[len(ids) - tail :]
