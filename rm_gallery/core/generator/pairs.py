"""Pairs: scored groups become rows, in units that are not divided between splits.

Every choice depends on content and seed alone, never on the order of the cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

from rm_gallery.core.generator.cases import ScoredGroup, ScoredResponse, group_key
from rm_gallery.core.generator.summary import ExportOptions, ExportSummary
from rm_gallery.data.formats import hash_prompt
from rm_gallery.data.formats.rankings import MAX_RESPONSES
from rm_gallery.errors import UserError

MAX_PAIRS = 10_000_000  # of one prompt, and of all rows: about 2 GB of records besides the texts


class Unit(NamedTuple):
    """Rows that must be in the same split: those of one prompt; without a prompt, those that share a response."""

    key: int
    """Hash of the prompt, 64 bits."""
    rows: list[ScoredGroup]
    """A pair is a group of two responses, the chosen one first."""


def make_units(groups: Iterable[ScoredGroup], options: ExportOptions, summary: ExportSummary) -> list[Unit]:
    """All rows, shuffled by the seed; counts in `summary` what gives no row. Raises UserError for too many pairs."""
    by_prompt: dict[int | None, list[ScoredGroup]] = {}
    for group in groups:
        by_prompt.setdefault(group.prompt_key, []).append(group)
    units: list[Unit] = []
    num_rows = 0
    for key, same_prompt in by_prompt.items():
        merged = [_deduplicated(group, summary) for group in _merge_singles(same_prompt, summary)]
        if options.layout == "groups":
            rows = _groups(merged, options, summary)
        else:
            rows = _limited(_pairs(merged, options, summary), options, summary, by_case=key is None)
        num_rows += len(rows)
        _check_number(num_rows, "in all", "set max_pairs_per_prompt, pairs='best_worst', or export in parts")
        units += _connected(rows) if key is None else [Unit(key, rows)] if rows else []
    for unit in units:
        unit.rows.sort(key=lambda row: _shuffled(options.seed, (_row_key(row), row.case_key)))
    return sorted(units, key=lambda unit: _shuffled(options.seed, unit.key))


def _shuffled(seed: int, key: object) -> int:
    """Sort key of a shuffle. Seed 0 orders prompts as `data.val_fraction` does, by their hash."""
    return key if seed == 0 and isinstance(key, int) else hash_prompt(f"{seed} {key}")


def _row_key(row: ScoredGroup) -> tuple[int, ...]:
    """Equal for rows that compare the same responses in the same order."""
    return tuple(response.key for response in row.responses)


def _check_number(count: int, what: str, hint: str) -> None:
    if count > MAX_PAIRS:
        raise UserError(f"{count:,} pairs {what}, the limit is {MAX_PAIRS:,}; {hint}")


def _merge_singles(groups: list[ScoredGroup], summary: ExportSummary) -> list[ScoredGroup]:
    """The groups of one prompt; those with a single response become one group together, if there are two or more."""
    singles = [group for group in groups if len(group.responses) == 1]
    several = [group for group in groups if len(group.responses) > 1]
    if len(singles) < 2:
        summary.unpaired += len(singles)
        return several
    prompt = singles[0].prompt
    for group in singles:
        if group.prompt != prompt:  # they may differ in white space
            prompt = min(prompt, group.prompt, key=repr)
    responses = sorted((group.responses[0] for group in singles), key=lambda each: (-each.score, each.key))
    return [*several, ScoredGroup(prompt, singles[0].prompt_key, responses, is_rank=False)]


def _deduplicated(group: ScoredGroup, summary: ExportSummary) -> ScoredGroup:
    """The group without repeated responses of equal score."""
    kept: dict[tuple[int, float], ScoredResponse] = {}
    for response in group.responses:
        mark = (response.key, response.score)
        if mark in kept:
            summary.duplicates += 1
            response = min(kept[mark], response, key=lambda each: (each.source or "", repr(each.text)))
        kept[mark] = response
    case_key = hash_prompt(repr((group.is_rank, sorted(kept))))
    return group._replace(responses=list(kept.values()), case_key=case_key)


def _compare(group: ScoredGroup, options: ExportOptions, summary: ExportSummary) -> Iterator[ScoredGroup]:
    """The pairs of a group that have a better and a worse response."""
    ordered = sorted(group.responses, key=lambda each: (-each.score, each.key))
    if options.pairs == "best_worst" and len(ordered) > 1:
        ordered = [ordered[0], ordered[-1]]
    num_pairs = len(ordered) * (len(ordered) - 1) // 2
    _check_number(num_pairs, f"of one prompt with {len(ordered):,} responses", "set pairs='best_worst'")
    for better, worse in combinations(ordered, 2):
        difference = better.score - worse.score
        if better.key == worse.key:
            summary.identical += 1
        elif better.score == worse.score:
            summary.ties += 1
        elif difference < options.min_difference and not math.isclose(difference, options.min_difference):
            summary.too_close += 1
        else:
            yield group._replace(responses=[better, worse])


def _pairs(groups: Iterable[ScoredGroup], options: ExportOptions, summary: ExportSummary) -> list[ScoredGroup]:
    """The distinct pairs of one prompt (or of all cases without one); of equal pairs the largest margin is kept."""
    kept: dict[tuple[int, ...], ScoredGroup] = {}
    for group in groups:
        for pair in _compare(group, options, summary):
            key = _row_key(pair)
            if key in kept:
                summary.duplicates += 1
                pair = max(kept[key], pair, key=_preference)
            kept[key] = pair
    in_both_directions = [key for key in kept if key[::-1] in kept]
    summary.contradictions += len(in_both_directions) // 2
    for key in in_both_directions if options.contradictions == "drop" else ():
        del kept[key]
    return list(kept.values())


def _preference(pair: ScoredGroup) -> tuple[float, int, str]:
    margin = -math.inf if pair.margin is None else pair.margin
    return margin, pair.case_key, repr((pair.source, pair.prompt, [each.text for each in pair.responses]))


def _limited(
    pairs: list[ScoredGroup], options: ExportOptions, summary: ExportSummary, *, by_case: bool
) -> list[ScoredGroup]:
    """A random sample of at most `max_pairs_per_prompt` pairs, of all together or of each case."""
    limit = options.max_pairs_per_prompt
    if limit is None or len(pairs) <= limit:
        return pairs
    parts: dict[int, list[ScoredGroup]] = {}
    for pair in sorted(pairs, key=lambda pair: _shuffled(options.seed, ("limit", _row_key(pair)))):
        parts.setdefault(pair.case_key if by_case else 0, []).append(pair)
    kept = [pair for part in parts.values() for pair in part[:limit]]
    summary.over_limit += len(pairs) - len(kept)
    return kept


def _groups(groups: Iterable[ScoredGroup], options: ExportOptions, summary: ExportSummary) -> list[ScoredGroup]:
    """The distinct groups with a better and a worse response; of two scores of one response the higher is kept."""
    kept: dict[int, ScoredGroup] = {}
    compared: set[tuple[int, ...]] = set()
    for group in groups:
        best: dict[int, ScoredResponse] = {}
        for response in group.responses:
            best[response.key] = max(best.get(response.key, response), response, key=lambda each: each.score)
        summary.identical += len(group.responses) - len(best)
        group = group._replace(responses=list(best.values()), where="")
        pairs = [_row_key(pair) for pair in _compare(group, options, summary)]
        if not pairs:
            continue
        compared.update(pairs)
        if len(best) > MAX_RESPONSES:
            raise UserError(
                f"a prompt has {len(best):,} responses, and a row of layout='groups' holds at most {MAX_RESPONSES}; "
                "set layout='pairs'"
            )
        if group.case_key in kept:
            summary.duplicates += 1
            group = min(kept[group.case_key], group, key=repr)
        kept[group.case_key] = group
    summary.contradictions += sum(key[::-1] in compared for key in compared) // 2
    return list(kept.values())


def _connected(rows: list[ScoredGroup]) -> list[Unit]:
    """Rows without a prompt, in units that share no response, no case and no text that may be a prompt."""
    parent: dict[object, object] = {}

    def root(key: object) -> object:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    keys = [group_key(row) for row in rows]
    for row, row_key in zip(rows, keys, strict=True):
        own = root(("case", row.case_key))
        for key in (*_row_key(row), row_key):
            parent[root(key)] = own
    units: dict[object, Unit] = {}
    for row, row_key in zip(rows, keys, strict=True):
        case = root(("case", row.case_key))
        earlier = units.get(case, Unit(row_key, []))
        earlier.rows.append(row)
        units[case] = earlier._replace(key=min(earlier.key, row_key))
    return list(units.values())
