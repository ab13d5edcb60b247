"""Rows of an export: cases become pairs, or groups of scored responses, in units that a split must not tear apart.

Nothing here depends on the order of the cases: what is chosen or put first is so by content and seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple, TypeAlias

from rm_gallery.core.generator.cases import Answer, Case
from rm_gallery.core.generator.options import ExportOptions
from rm_gallery.core.generator.texts import Text, shared_beginning
from rm_gallery.errors import UserError


class Contest(NamedTuple):
    """Responses that may be compared with each other."""

    key: bytes
    """The same for the same responses with the same scores."""
    prompt: Text
    answers: list[Answer]
    is_rank: bool


class Pair(NamedTuple):
    """One row of layout `pairs`."""

    prompt: Text
    chosen: Answer
    rejected: Answer
    margin: float | None
    """Difference of the scores; None where these are places."""
    contest: bytes

    @property
    def source(self) -> str | None:
        return self.chosen.source if self.chosen.source == self.rejected.source else None

    @property
    def answers(self) -> list[Answer]:
        return [self.chosen, self.rejected]

    @property
    def key(self) -> bytes:
        return self.chosen.key + self.rejected.key


class Group(NamedTuple):
    """One row of layout `groups`."""

    key: bytes
    prompt: Text
    answers: list[Answer]
    is_rank: bool

    @property
    def contest(self) -> bytes:
        return self.key

    @property
    def source(self) -> str | None:
        return self.answers[0].source if len({answer.source for answer in self.answers}) == 1 else None


Row: TypeAlias = Pair | Group


class Unit(NamedTuple):
    """Rows that belong on one side of a split: those of one prompt, or without a prompt those that share responses."""

    key: bytes
    rows: list[Row]


MAX_RESPONSES = 256  # of one row: all of them are compared with each other when it is read
MAX_PAIRS = 10_000_000  # of one prompt, and of all that are kept: about 2 GB of records beside the texts


@dataclass
class Tally:
    """What became of the comparisons that gave no row."""

    ties: int = 0
    too_close: int = 0
    identical: int = 0
    duplicates: int = 0
    contradictions: int = 0
    over_limit: int = 0
    unpaired: int = 0


def make_units(cases: Iterable[Case], options: ExportOptions, tally: Tally) -> list[Unit]:
    """All rows, in an order that seed and content decide. Raises UserError when there are too many."""
    by_prompt: dict[bytes, list[Case]] = {}
    for case in cases:
        by_prompt.setdefault(case.prompt_key, []).append(case)
    units: list[Unit] = []
    num_rows = 0
    for key, group in by_prompt.items():
        contests = [_contest(case.prompt, case.answers, case.is_rank, tally) for case in group if len(case.answers) > 1]
        contests += _contest_of_singles([case for case in group if len(case.answers) == 1], tally)
        found: list[Row] = []
        if options.layout == "groups":
            found += _groups(contests, options, tally)
        else:
            found += _limited(_pairs(contests, options, tally), options, tally, by_contest=not key)
        num_rows += len(found)
        _check_number(num_rows, "in all", "set max_pairs_per_prompt, take pairs='best_worst', or export in parts")
        units += [Unit(key, found)] if key and found else _connected(found)
    for unit in units:
        unit.rows.sort(key=lambda row: _shuffled(options.seed, row.key))
    return sorted(units, key=lambda unit: _shuffled(options.seed, unit.key))


def _shuffled(seed: int, key: bytes, purpose: bytes = b"order") -> bytes:
    """Sorting by this is a shuffle that only seed and keys decide."""
    return _digest(b"%d %b %b" % (seed, purpose, key))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _check_number(count: int, what: str, way_out: str) -> None:
    if count > MAX_PAIRS:
        raise UserError(f"there would be {count:,} pairs {what}, more than {MAX_PAIRS:,}; {way_out}")


def _contest(prompt: Text, answers: list[Answer], is_rank: bool, tally: Tally) -> Contest:
    """Without answers that are there twice with the same score."""
    kept: dict[tuple[bytes, float], Answer] = {}
    for answer in answers:
        mark = (answer.key, answer.score)
        tally.duplicates += mark in kept
        kept[mark] = _first_by_content(kept.get(mark, answer), answer)
    key = _digest(repr((is_rank, sorted(kept))).encode())
    return Contest(key, prompt, list(kept.values()), is_rank)


def _contest_of_singles(cases: list[Case], tally: Tally) -> list[Contest]:
    """One contest of all cases of a prompt that hold a single response; none when there is only one."""
    if len(cases) < 2:
        tally.unpaired += len(cases)
        return []
    prompt = cases[0].prompt
    for case in cases[1:]:
        if case.prompt != prompt:  # other white space, or messages for a text
            prompt = min(prompt, case.prompt, key=repr)
    answers = sorted((case.answers[0] for case in cases), key=lambda answer: (-answer.score, answer.key))
    return [_contest(prompt, answers, False, tally)]


def _first_by_content(one: Answer, other: Answer) -> Answer:
    """Of two answers of equal content and score always the same one."""
    if one[:3] == other[:3] and one.source == other.source:
        return one
    return min(one, other, key=lambda answer: (answer.source or "", repr(answer.text)))


def _compare(contest: Contest, options: ExportOptions, tally: Tally) -> Iterator[Pair]:
    """The pairs of one contest that have a better and a worse response."""
    ordered = sorted(contest.answers, key=lambda answer: (-answer.score, answer.key))
    if options.pairs == "best_worst":
        ordered = [ordered[0], ordered[-1]] if len(ordered) > 1 else []
    num_pairs = len(ordered) * (len(ordered) - 1) // 2
    _check_number(num_pairs, f"of one prompt with {len(ordered):,} responses", "take pairs='best_worst'")
    for better, worse in combinations(ordered, 2):
        difference = better.score - worse.score
        if better.key == worse.key:
            tally.identical += 1
        elif better.score == worse.score:
            tally.ties += 1
        elif difference < options.min_difference and not math.isclose(difference, options.min_difference):
            tally.too_close += 1
        else:
            yield Pair(contest.prompt, better, worse, None if contest.is_rank else difference, contest.key)


def _pairs(contests: Iterable[Contest], options: ExportOptions, tally: Tally) -> list[Pair]:
    """The pairs of one prompt (or of all cases without one), each once."""
    kept: dict[bytes, Pair] = {}
    for contest in contests:
        for pair in _compare(contest, options, tally):
            earlier = kept.get(pair.key)
            tally.duplicates += earlier is not None
            kept[pair.key] = pair if earlier is None else max(earlier, pair, key=_preference)
    both_ways = [mark for mark in kept if mark[16:] + mark[:16] in kept]
    tally.contradictions += len(both_ways) // 2
    for mark in both_ways if options.contradictions == "drop" else ():
        del kept[mark]
    return list(kept.values())


def _preference(pair: Pair) -> tuple[float, bytes, str]:
    """Of equal pairs the one with the largest margin stays; the rest decides where that is equal."""
    margin = -math.inf if pair.margin is None else pair.margin
    return margin, pair.contest, repr((pair.source, pair.prompt, pair.chosen.text, pair.rejected.text))


def _limited(pairs: list[Pair], options: ExportOptions, tally: Tally, *, by_contest: bool) -> list[Pair]:
    """At most the allowed number of pairs, drawn by the seed, of all together or of each contest."""
    limit = options.max_pairs_per_prompt
    if limit is None or len(pairs) <= limit:
        return pairs
    parts: dict[bytes, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: _shuffled(options.seed, pair.key, b"limit")):
        parts.setdefault(pair.contest if by_contest else b"", []).append(pair)
    kept = [pair for part in parts.values() for pair in part[:limit]]
    tally.over_limit += len(pairs) - len(kept)
    return kept


def _groups(contests: Iterable[Contest], options: ExportOptions, tally: Tally) -> list[Group]:
    """One row per contest that has a better and a worse response; of two scores of one response the higher holds."""
    kept: dict[bytes, Group] = {}
    either_way: set[bytes] = set()
    for contest in contests:
        best: dict[bytes, Answer] = {}
        for answer in contest.answers:
            best[answer.key] = max(best.get(answer.key, answer), answer, key=lambda answer: answer.score)
        tally.identical += len(contest.answers) - len(best)
        contest = contest._replace(answers=list(best.values()))
        ways = [pair.key for pair in _compare(contest, options, tally)]
        if not ways:
            continue
        either_way.update(ways)
        if len(best) > MAX_RESPONSES:
            raise UserError(
                f"a prompt has {len(best):,} responses, and a row of layout='groups' holds at most {MAX_RESPONSES}; "
                "take layout='pairs'"
            )
        group = Group(contest.key, contest.prompt, contest.answers, contest.is_rank)
        tally.duplicates += contest.key in kept
        kept[contest.key] = min(kept[contest.key], group, key=repr) if contest.key in kept else group
    tally.contradictions += sum(way[16:] + way[:16] in either_way for way in either_way) // 2
    return list(kept.values())


def _connected(rows: list[Row]) -> list[Unit]:
    """Rows without a prompt, in units that share no response, no case, and no beginning that may be a prompt."""
    parent: dict[bytes, bytes] = {}

    def root(key: bytes) -> bytes:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    for row in rows:
        own = root(row.contest)
        texts = [answer.text for answer in row.answers if isinstance(answer.text, str)]
        beginning = shared_beginning(texts) if len(texts) == len(row.answers) else ""
        for key in (*(answer.key for answer in row.answers), *([beginning.encode()] if beginning else ())):
            parent[root(key)] = own
    parts: dict[bytes, list[Row]] = {}
    for row in rows:
        parts.setdefault(root(row.contest), []).append(row)
    return [Unit(min(answer.key for row in part for answer in row.answers), part) for part in parts.values()]
