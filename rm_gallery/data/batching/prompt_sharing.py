"""Prompt sharing: groups of the same prompt in a step are computed together; a group above the token budget is split.

In: the groups of one step. Out: units. Each comparison of the step is in exactly one unit, and the loss is a sum over
comparisons, so it does not change.

Example, two groups with the same prompt of 4 tokens: chosen a (2 tokens) over rejected b (3), and a over c (1). Apart
they take (4 + 2 + 3) + (4 + 2 + 1) = 16 tokens. The merged unit has the prompt and a once: 4 + 2 + 3 + 1 = 10 tokens,
responses a, b, c and comparisons a > b, a > c.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rm_gallery.data.batching.bin_packing import Packer, Packs
from rm_gallery.data.token_cache.arrays import GroupSizes, TokenData
from rm_gallery.data.tokenization.token_group import Span, TokenGroup, split_prefix
from rm_gallery.schema import Comparison, Rating

# N groups of one step, U units, K responses of a group

# Plans that are tried, as (divisor, guided). A merged unit costs at most 1 / (divisor x micro-batches) of the step, so
# that units can still be balanced: of the remaining cost if guided, else of the whole step. Example, divisor 2, a step
# of cost 800 in 4 micro-batches: at most 100 per unit; if guided, at most 50 once half the step is merged.
_PLANS = ((2, True), (8, True), (2, False))
# Without guidance the last units are as large as the first, so the ranks may be uneven: such a plan must be faster by
# this fraction.
_MIN_GAIN = 0.03
# Maximum tokens of a unit over those of its longest text. One more prefix would save little by then, while attention
# over a wide group is expensive.
_MAX_TEXTS = 8


@dataclass(frozen=True, slots=True)
class Part:
    """A group of the data, or some of its comparisons."""

    group: int
    comparisons: tuple[int, ...] | None = None
    """Indices of comparisons; None for all. Ratings and rankings are never separated."""


@dataclass(frozen=True)
class PlannedGroup:
    """A unit: one group, some comparisons of one, or several groups of the same prompt, computed as one group."""

    parts: tuple[Part, ...]
    tokens: int
    longest_text: int
    num_responses: int
    num_comparisons: int


@dataclass(frozen=True)
class StepPlan:
    """The micro-batches of one optimizer step."""

    units: list[PlannedGroup]
    packs: Packs
    """Indices of units."""
    num_comparisons: int
    """Comparisons over all ranks, known attributes of ratings, rankings, or target tokens of conversations: the divisor
    of the loss sum."""
    num_targets: int = 0
    """Target tokens of the language-model loss, over all ranks."""

    def load(self, data: TokenData, pack: Sequence[int]) -> list[TokenGroup]:
        """The tokens of a micro-batch."""
        return [load_unit(data, self.units[number]) for number in pack]


def plan_step(data: TokenData, groups: np.ndarray, packer: Packer, *, share_prompts: bool = True) -> StepPlan:
    """The micro-batches of the step with these groups. A pure function of its arguments, the same on every rank.

    share_prompts: merge groups of the same prompt if the step is then estimated to be faster. Fewer tokens are not
    enough, since large units are harder to balance over ranks.
    """
    apart = [unit for group in groups.tolist() for unit in _unshared(data, group, packer)]
    best = apart, packer.pack(sizes_of(apart))
    prompts = _same_prompts(data, groups, packer) if share_prompts else []
    if prompts:
        texts = [sorted((_Texts.of(data, group) for group in members), key=_Texts.order) for members in prompts]
        repeated = {group for members in prompts for group in members}
        alone = {unit.parts[0].group: unit for unit in apart}
        others = [unit for unit in apart if unit.parts[0].group not in repeated]
        least = packer.step_cost(best[1], sizes_of(apart))
        total = int(packer.costs(sizes_of(apart)).sum())
        count = sum(map(len, best[1]))
        for divisor, guided in _PLANS:
            merged = _merge(texts, packer, total, divisor * count, guided=guided)
            units = others + [unit if len(unit.parts) > 1 else alone[unit.parts[0].group] for unit in merged]
            packs = packer.pack(sizes_of(units))
            cost = packer.step_cost(packs, sizes_of(units))
            if cost < least * (1 if guided else 1 - _MIN_GAIN):
                best, least = (units, packs), cost
    targets = 0 if data.target_counts is None else int(data.target_counts[groups].sum())
    return StepPlan(*best, int(data.loss_counts[groups].sum()), targets)


def sizes_of(units: Sequence[PlannedGroup]) -> GroupSizes:
    """Each [U] int64."""
    return GroupSizes.from_rows(
        (unit.tokens, unit.longest_text, unit.num_responses, unit.num_comparisons) for unit in units
    )


def load_unit(data: TokenData, unit: PlannedGroup) -> TokenGroup:
    """The tokens of a unit."""
    if len(unit.parts) == 1 and unit.parts[0].comparisons is None:
        return data[unit.parts[0].group]
    return _join((data[part.group], part.comparisons) for part in unit.parts)


def _join(parts: Iterable[tuple[TokenGroup, Sequence[int] | None]]) -> TokenGroup:
    """One group of the responses that are compared, rated, or have spans: each distinct text once, with their prefix.

    Spans of equal texts are all kept, so that the text counts as often as the data have it.
    """
    numbers: dict[bytes, int] = {}  # a whole text -> its index in the joined group
    texts: list[np.ndarray] = []
    comparisons: list[Comparison] = []
    ratings: list[Rating] = []
    spans: list[Span] = []
    for part, (group, kept) in enumerate(parts):
        own: dict[int, int] = {}  # index of a response in its group -> in the joined group

        def place(response: int, group: TokenGroup = group, own: dict[int, int] = own) -> int:
            if response not in own:
                text = np.concatenate([group.prefix, group.tails[response]])
                own[response] = numbers.setdefault(text.tobytes(), len(numbers))
                if len(numbers) > len(texts):
                    texts.append(text)
            return own[response]

        for each in group.comparisons if kept is None else [group.comparisons[number] for number in kept]:
            comparisons.append(replace(each, better=place(each.better), worse=place(each.worse)))
        ratings += [replace(each, response=place(each.response), group=part) for each in group.ratings]
        spans += [
            replace(each, response=place(each.response))
            for each in group.spans
            if kept is None or each.comparison in kept
        ]
    return split_prefix(texts, comparisons, ratings, spans)


def _tokens(unit: PlannedGroup, packer: Packer) -> int:
    return packer.count_tokens(unit.tokens, unit.longest_text, unit.num_responses)


# --- One group: whole, or split by comparisons


def _unshared(data: TokenData, group: int, packer: Packer) -> list[PlannedGroup]:
    """The group itself, or pieces within the budget, as far as single comparisons fit."""
    sizes = data.sizes
    whole = PlannedGroup(
        (Part(group),),
        int(sizes.tokens[group]),
        int(sizes.longest_text[group]),
        int(sizes.num_responses[group]),
        int(sizes.num_comparisons[group]),
    )
    if (
        _tokens(whole, packer) <= packer.token_budget
        or whole.num_comparisons < 2
        or data.unit != "pairs"
        or data.is_ranked
    ):
        return [whole]
    tokens = data[group]
    pieces = [Part(group, piece) for piece in cut_comparisons(tokens, packer)]
    return [PlannedGroup((piece,), *_join([(tokens, piece.comparisons)]).sizes()) for piece in pieces]


def cut_comparisons(group: TokenGroup, packer: Packer) -> list[tuple[int, ...]]:
    """Indices of comparisons, each in one piece; every piece repeats the common prefix.

    Greedy: a piece starts with the first remaining comparison and adds, while the budget allows, the response with the
    most remaining comparisons to the responses inside per token.

    Example, 4 responses of 1 token after a prefix of 2, budget 5 (so 3 responses per piece), all 6 comparisons
    0-1, 0-2, 0-3, 1-2, 1-3, 2-3: the pieces are [0-1 0-2 1-2], [0-3 1-3] and [2-3], by index (0, 1, 3), (2, 4), (5,).
    """
    tails = np.array([len(tail) for tail in group.tails], np.int64)
    left = dict(enumerate(group.comparisons))
    between = np.zeros((len(tails), len(tails)), np.int64)  # [K, K] remaining comparisons
    for each in group.comparisons:
        between[[each.better, each.worse], [each.worse, each.better]] += 1
    pieces = []
    while left:
        first = next(iter(left.values()))
        inside = np.zeros(len(tails), bool)
        inside[[first.better, first.worse]] = True
        while True:
            gains = between[inside].sum(0)
            if packer.padded:
                longest = len(group.prefix) + np.maximum(tails, tails[inside].max())
                cost = longest * (inside.sum() + 1)
            else:
                cost = len(group.prefix) + tails[inside].sum() + tails
            fits = ~inside & (gains > 0) & (cost <= packer.token_budget)
            if not fits.any():
                break
            inside[int(np.argmax(np.where(fits, gains / tails, 0)))] = True
        piece = [number for number, each in left.items() if inside[each.better] and inside[each.worse]]
        between[np.ix_(inside, inside)] = 0
        for number in piece:
            del left[number]
        pieces.append(tuple(piece))
    return pieces


def split_responses(group: TokenGroup, packer: Packer) -> list[TokenGroup]:
    """A group without comparisons as parts that fit the token budget; a single response above it is a part alone.

    Responses keep their order, and every part repeats the common prefix.

    Example, budget 10, prefix of 4 tokens, tails of 3, 2, 5 and 9 tokens: parts with tails [3 2] (4 + 5 = 9 tokens),
    [5] (4 + 5 = 9) and [9] (4 + 9 = 13, alone).
    """
    if packer.count_tokens(*group.sizes()[:3]) <= packer.token_budget:
        return [group]
    prefix = len(group.prefix)
    parts: list[list[np.ndarray]] = []
    tokens = longest = 0
    for tail in group.tails:
        tokens, longest = tokens + len(tail), max(longest, prefix + len(tail))
        if not parts or packer.count_tokens(tokens, longest, len(parts[-1]) + 1) > packer.token_budget:
            parts.append([])
            tokens, longest = prefix + len(tail), prefix + len(tail)
        parts[-1].append(tail)
    return [TokenGroup(group.prefix, tails, ()) for tails in parts]


# --- Several groups of the same prompt


def _same_prompts(data: TokenData, groups: np.ndarray, packer: Packer) -> list[list[int]]:
    """The groups of each prompt that occurs several times, most frequent first; without groups above the budget."""
    small = packer.tokens(data.sizes.of(groups)) <= packer.token_budget
    usable = groups[small & (data.sizes.num_comparisons[groups] > 0)]
    _, prompt, counts = np.unique(data.prompt_hashes[usable], return_inverse=True, return_counts=True)
    order = np.argsort(prompt, kind="stable")
    members = [each.tolist() for each in np.split(usable[order], np.cumsum(counts)[:-1]) if len(each) > 1]
    return sorted(members, key=len, reverse=True)


@dataclass(frozen=True)
class _Texts:
    """Groups to compute together, as the distinct whole texts of their comparisons."""

    groups: tuple[int, ...]
    texts: dict[bytes, int]
    """The bytes of a text's token ids -> its number of tokens."""
    prefix: np.ndarray
    """Common prefix of all texts; every text has at least one token more."""
    num_comparisons: int

    @classmethod
    def of(cls, data: TokenData, number: int) -> _Texts:
        group = _join([(data[number], None)])
        head = group.prefix.tobytes()
        texts = {head + tail.tobytes(): len(group.prefix) + len(tail) for tail in group.tails}
        prefix = group.prefix if len(group.tails) > 1 else group.tails[0][:-1]  # which a single text may share
        return cls((number,), texts, prefix, group.sizes()[3])

    def order(self) -> bytes:
        """Sort key that puts groups with a common prefix next to each other."""
        return min(self.texts)

    def merge(self, other: _Texts) -> _Texts:
        """Both together; their common prefix is that of the two prefixes."""
        size = min(len(self.prefix), len(other.prefix))
        differs = np.flatnonzero(self.prefix[:size] != other.prefix[:size])
        prefix = self.prefix[: int(differs[0]) if len(differs) else size]
        return _Texts(
            self.groups + other.groups, self.texts | other.texts, prefix, self.num_comparisons + other.num_comparisons
        )

    def unit(self) -> PlannedGroup:
        lengths = self.texts.values()
        tokens = sum(lengths) - (len(lengths) - 1) * len(self.prefix)
        parts = tuple(Part(group) for group in self.groups)
        return PlannedGroup(parts, tokens, max(lengths), len(lengths), self.num_comparisons)


def _merge(
    prompts: Sequence[Sequence[_Texts]], packer: Packer, left: int, divisor: int, *, guided: bool
) -> list[PlannedGroup]:
    """Merge neighboring groups of a prompt while that costs less than computing them apart and units stay small.

    A unit costs at most 1 / `divisor` of the step. guided: of the remaining cost, so that the last units are small and
    even out the micro-batches (Polychronopoulos and Kuck 1987, "Guided self-scheduling").
    left: cost of all groups of the step apart.
    """
    units: list[PlannedGroup] = []
    for texts in prompts:
        cost = apart = _cost(texts[0].unit(), packer)
        together = texts[0]
        for each in texts[1:]:
            both, own = together.merge(each), _cost(each.unit(), packer)
            unit = both.unit()
            joint = _cost(unit, packer)
            room = min(packer.token_budget, _MAX_TEXTS * unit.longest_text)
            if _tokens(unit, packer) <= room and joint <= left // divisor and joint < cost + own:
                together, cost, apart = both, joint, apart + own
            else:
                units.append(together.unit())
                left -= apart if guided else 0
                together, cost, apart = each, own, own
        units.append(together.unit())
        left -= apart if guided else 0
    return units


def _cost(unit: PlannedGroup, packer: Packer) -> int:
    return packer.cost(_tokens(unit, packer), unit.longest_text)
