"""What `rm-gallery rank` writes: the best responses of each prompt, rankings, or preference pairs, from saved rewards.

Two passes over the input, both in constant memory but for about 30 bytes per response: the first collects rewards, and
hashes of prompts and responses; the second keeps the texts of the responses that are written, until the last row of
their prompt is read.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow, Dropped, UserError
from rm_gallery.schema import Message, PreferenceGroup
from rm_gallery.scoring.parts import Parts, row_rewards
from rm_gallery.scoring.tables import InputTable, input_schema, json_value, with_rewards

LAYOUTS, PAIRINGS = ("best", "ranked", "pairs"), ("best_worst", "all")
_OWN = {
    "best": ("prompt", "response", "reward", "rank", "index", "num_responses"),
    "ranked": ("prompt", "responses", "rewards", "ranks", "indices"),
    "pairs": ("prompt", "chosen", "rejected", "reward_chosen", "reward_rejected", "margin"),
}
_TOOLS = "tools"
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_BATCH_ROWS = 4096  # of parquet output


@dataclass(frozen=True)
class Ranking:
    """Which responses are written, and how."""

    layout: str = "best"
    """`best`: a row per response; `ranked`: a row per prompt; `pairs`: a row per preference pair."""
    top: int | None = None
    """Responses per prompt, of the highest rewards; None for one (`best`) or all (`ranked`)."""
    min_reward: float | None = None
    """Lowest reward of a response; in pairs, of the chosen one."""
    min_quantile: float | None = None
    """The same as a quantile of all rewards of the file, 0 to 1."""
    pairs: str | None = None
    """`best_worst` (default) or `all` pairs of a prompt."""
    min_margin: float | None = None
    """Lowest difference of the rewards of a pair; equal rewards are never a pair."""
    columns: tuple[str, ...] = ()
    """Columns of the input that are copied: of the row of the response, of the best one or of the chosen one."""

    def check(self) -> None:
        """Raise UserError for values that do not fit together."""
        if self.layout not in LAYOUTS:
            raise UserError(f"--layout {self.layout}: must be one of {', '.join(LAYOUTS)}")
        if self.pairs is not None and self.pairs not in PAIRINGS:
            raise UserError(f"--pairs {self.pairs}: must be one of {', '.join(PAIRINGS)}")
        if self.layout == "pairs" and self.top is not None:
            raise UserError("--top is for --layout best and ranked; use --pairs and --min-margin, or remove it")
        if self.layout != "pairs" and (self.pairs, self.min_margin) != (None, None):
            raise UserError(f"--pairs and --min-margin are for --layout pairs, not {self.layout}; remove them")
        if self.top is not None and self.top < 1:
            raise UserError(f"--top {self.top}: must be at least 1")
        if self.min_quantile is not None and not 0 <= self.min_quantile <= 1:
            raise UserError(f"--min-quantile {self.min_quantile}: must be between 0 and 1, e.g. 0.9 for the best tenth")
        for name, value in (("reward", self.min_reward), ("margin", self.min_margin)):
            if value is not None and not np.isfinite(value):
                raise UserError(f"--min-{name} {value}: must be a finite number")
        own = next((name for name in self.columns if name in (*_OWN[self.layout], _TOOLS)), None)
        if own is not None:
            raise UserError(f"--columns {own}: the output has a column of this name; rename that of the input")

    @property
    def num_kept(self) -> int | None:
        """Responses per prompt at most."""
        return 1 if self.layout == "best" and self.top is None else self.top


@dataclass
class RankCounts:
    """What a ranked file was made of."""

    prompts: int = 0
    responses: int = 0
    """Different responses with a reward."""
    rows: int = 0
    """Rows of the output."""
    empty: Dropped = field(default_factory=Dropped)
    """Prompts without a row in the output."""

    def as_record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> RankCounts:
        """From what `as_record` gives."""
        return cls(**{**record, "empty": Dropped(**record["empty"])})

    def __str__(self) -> str:
        text = f"{self.rows} rows from {self.responses} responses to {self.prompts} prompts"
        return text + (f"; {self.empty.total} prompts without a row: {self.empty.describe()}" * bool(self.empty.total))


@dataclass(frozen=True)
class _Response:
    """A response that is written, once its prompt is complete."""

    prompt: str | list[Message]
    text: str | list[Message]
    index: int
    """Number of the response among those of its prompt, in the order of the file."""
    tools: str | None
    columns: dict[str, Any]


class _Index:
    """Rewards and hashes of all responses of a file, R in its order."""

    def __init__(self, table: InputTable, parts: Parts) -> None:
        keys, texts, rows, rewards = array("q"), array("q"), array("q"), array("f")
        self.are_texts, self.plain_fault, self.have_tools = True, "", False
        for row, prompt, responses, tools, found in _scored(table, parts):
            key = _hash([prompt, tools]) if table.base_columns == ("reward",) else row.index
            keys.extend([key] * len(responses))
            rows.extend([row.index] * len(responses))
            texts.extend(map(_hash, responses))
            rewards.extend(found)
            self._note_form(row, prompt, responses)
            self.have_tools |= bool(tools)
        self.rewards, self.rows = np.array(rewards, np.float64), np.array(rows, np.int64)
        self._texts = np.array(texts, np.int64)
        _, first, group, sizes = np.unique(
            np.array(keys, np.int64), return_index=True, return_inverse=True, return_counts=True
        )
        self.num_prompts = len(first)
        self.group = group
        self._order, self._starts = np.argsort(group, kind="stable"), np.append(0, np.cumsum(sizes))

    def _note_form(self, row: Row, prompt: Any, responses: Sequence[Any]) -> None:
        cells = [item for value in row.values.values() for item in (value if isinstance(value, list) else [value])]
        strings = {item for item in cells if isinstance(item, str)}
        texts = [_as_text(prompt, "user"), *(_as_text(each, "assistant") for each in responses)]
        self.are_texts &= all(text == "" or (text is not None and text in strings) for text in texts)
        for turns in (prompt, *responses):
            for turn in turns if not isinstance(turns, str) else ():
                is_plain = set(turn) <= {"role", "content"} and isinstance(turn.get("content"), str | None)
                self.plain_fault = self.plain_fault or ("" if is_plain else row.where)

    def members(self, group: int) -> np.ndarray:
        """The responses of a prompt in the order of the file, the first of equal ones."""
        found = self._order[self._starts[group] : self._starts[group + 1]]
        _, first = np.unique(self._texts[found], return_index=True)
        return found[np.sort(first)]

    def last(self) -> np.ndarray:
        """[R] whether a response is the last one of its prompt."""
        is_last = np.zeros(len(self.group), bool)
        is_last[self._order[self._starts[1:] - 1]] = True
        return is_last


def write_ranked(table: InputTable, output: Path, parts: Parts, ranking: Ranking, *, parquet: bool) -> RankCounts:
    """Write the responses that `ranking` selects, in the order in which their prompts are complete.

    Raises UserError for columns that the input does not have, and for messages that do not fit into parquet.
    """
    missing = [name for name in ranking.columns if name not in table.columns]
    if missing:
        raise UserError(
            f"{table.file.name}: --columns {missing[0]}: no such column (columns: {', '.join(table.columns)})"
        )
    index = _Index(table, parts)
    if parquet and not index.are_texts and index.plain_fault:
        raise UserError(
            f"{index.plain_fault}: has messages with more than role and content text, which one parquet type does not "
            "hold; name an --output that ends in .jsonl"
        )
    counts = RankCounts(index.num_prompts)
    rows = _output_rows(table, parts, ranking, index, counts)
    if parquet:
        _write_parquet(output, rows, _schema(table, ranking, index))
    else:
        with output.open("w", encoding="utf-8") as file:
            for row in rows:
                values = ", ".join(f"{json.dumps(name)}: {_json(value)}" for name, value in row.items())
                file.write("{" + values + "}\n")
    return counts


def _scored(table: InputTable, parts: Parts) -> Iterator[tuple[Row, str | list[Message], list[Any], Any, list[float]]]:
    """(row, prompt, responses, tools, rewards) of each row that has rewards."""
    reader = table.reader("chat")
    for chunk, (taken,) in with_rewards(table, [parts]):
        for row, rewards in zip(chunk.rows(), row_rewards(taken, table.base_columns), strict=True):
            if not rewards:
                continue
            try:
                group = reader.read(row)
            except BadRow as error:
                raise UserError(f"{row.where}: cannot be ranked: {error}") from error
            prompt, responses = _split(group)
            if not prompt and table.base_columns == ("reward",):
                raise UserError(
                    f"{row.where}: a response without a prompt, so which responses to compare is not known; name the "
                    "column of the prompt with data.prompt_key, or put the responses of a prompt into one list"
                )
            yield row, prompt, responses, group.metadata.get("tools"), rewards


def _split(group: PreferenceGroup) -> tuple[Any, list[Any]]:
    """Prompt and responses; a conversation ends with its response."""
    if not group.prompt and len(group.responses) == 1 and not isinstance(group.responses[0], str):
        [turns] = group.responses
        return list(turns[:-1]), [list(turns[-1:])]
    prompt = group.prompt if isinstance(group.prompt, str) else list(group.prompt)
    return prompt, [each if isinstance(each, str) else list(each) for each in group.responses]


def _output_rows(
    table: InputTable, parts: Parts, ranking: Ranking, index: _Index, counts: RankCounts
) -> Iterator[dict[str, Any]]:
    lowest = _threshold(ranking, index, counts)
    needed = np.zeros(len(index.rewards), bool)
    for group in range(index.num_prompts):
        selected, reason = _select(ranking, index, index.members(group), lowest)
        needed[[position for each in selected for position in each]] = True
        if reason:
            counts.empty.add(reason, f"{table.file.name}:{index.rows[index.members(group)[0]]}")
    is_last, held, position = index.last(), dict[int, _Response](), 0
    seen: dict[int, int] = {}
    for row, prompt, responses, tools, _ in _scored(table, parts):
        for response in responses:
            group = int(index.group[position])
            number = seen.get(group, 0)
            seen[group] = number + 1
            if needed[position]:
                held[position] = _Response(
                    (_as_text(prompt, "user") or "") if index.are_texts else prompt,
                    (_as_text(response, "assistant") or "") if index.are_texts else response,
                    number,
                    json.dumps(tools, ensure_ascii=False) if tools else None,
                    {name: row.values.get(name) for name in ranking.columns},
                )
            if is_last[position]:
                del seen[group]
                for made in _rows_of(ranking, index, group, lowest, held):
                    counts.rows += 1
                    yield made
            position += 1


def _threshold(ranking: Ranking, index: _Index, counts: RankCounts) -> float:
    """The lowest reward that is written."""
    distinct = [index.rewards[index.members(group)] for group in range(index.num_prompts)]
    counts.responses = sum(map(len, distinct))
    lowest = -np.inf if ranking.min_reward is None else ranking.min_reward
    if ranking.min_quantile is None or not distinct:
        return lowest
    return max(lowest, float(np.quantile(np.concatenate(distinct), ranking.min_quantile)))


def _select(ranking: Ranking, index: _Index, members: np.ndarray, lowest: float) -> tuple[list[tuple[int, ...]], str]:
    """The responses of a prompt that are written, by falling reward, or its pairs; with the reason if there is none."""
    rewards = index.rewards[members]
    order = members[np.argsort(-rewards, kind="stable")]  # stable: the first of equal rewards comes first
    if ranking.layout != "pairs":
        kept: list[tuple[int, ...]] = [(int(position),) for position in order if index.rewards[position] >= lowest]
        return kept[: ranking.num_kept], "" if kept else "below the lowest reward"
    if len(order) < 2:
        return [], "one response"
    candidates: Any = [(order[0], order[-1])] if ranking.pairs != "all" else combinations(order, 2)
    above = [(int(a), int(b)) for a, b in candidates if index.rewards[a] >= lowest]
    margins = [(pair, index.rewards[pair[0]] - index.rewards[pair[1]]) for pair in above]
    kept_pairs = [pair for pair, margin in margins if margin > 0 and margin >= (ranking.min_margin or 0.0)]
    reason = "chosen below the lowest reward" if not above else "margin below the lowest"
    if above and not any(margin > 0 for _, margin in margins):
        reason = "equal rewards"
    return list(kept_pairs), "" if kept_pairs else reason


def _rows_of(
    ranking: Ranking, index: _Index, group: int, lowest: float, held: dict[int, _Response]
) -> Iterator[dict[str, Any]]:
    members = index.members(group)
    selected, _ = _select(ranking, index, members, lowest)
    found = {position: held.pop(position) for position in {position for each in selected for position in each}}
    if ranking.layout == "pairs":
        for a, b in selected:
            chosen, margin = index.rewards[a], index.rewards[a] - index.rewards[b]
            values = (found[a].prompt, found[a].text, found[b].text, chosen, index.rewards[b], margin)
            yield _row("pairs", values, found[a], index)
        return
    positions = [position for (position,) in selected]
    ranks = [1 + int((index.rewards[members] > index.rewards[position]).sum()) for position in positions]
    if ranking.layout == "best":
        for position, rank in zip(positions, ranks, strict=True):
            own = found[position]
            values = (own.prompt, own.text, index.rewards[position], rank, own.index, len(members))
            yield _row("best", values, own, index)
    elif positions:
        listed = [found[position] for position in positions]
        rewards = [index.rewards[position] for position in positions]
        indices = [each.index for each in listed]
        yield _row(
            "ranked", (listed[0].prompt, [each.text for each in listed], rewards, ranks, indices), listed[0], index
        )


def _row(layout: str, values: Sequence[Any], response: _Response, index: _Index) -> dict[str, Any]:
    tools = {_TOOLS: response.tools} if index.have_tools else {}
    return {**dict(zip(_OWN[layout], values, strict=True)), **tools, **response.columns}


def _schema(table: InputTable, ranking: Ranking, index: _Index) -> pa.Schema:
    text = pa.string() if index.are_texts else _MESSAGES
    types = {
        "prompt": text, "response": text, "chosen": text, "rejected": text, "responses": pa.list_(text),
        "rewards": pa.list_(pa.float32()), "ranks": pa.list_(pa.int32()), "indices": pa.list_(pa.int32()),
        "rank": pa.int32(), "index": pa.int32(), "num_responses": pa.int32(),
    }  # fmt: skip
    fields = [(name, types.get(name, pa.float32())) for name in _OWN[ranking.layout]]
    fields += [(_TOOLS, pa.string())] * index.have_tools
    given = input_schema(table) if ranking.columns else None
    return pa.schema([*fields, *((name, given.field(name).type) for name in ranking.columns if given is not None)])


def _write_parquet(output: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema) -> None:
    with pq.ParquetWriter(output, schema) as writer:
        while batch := list(islice(rows, _BATCH_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))


def _as_text(turns: Any, role: str) -> str | None:
    """The text of one turn of a role, or of no turn; None for anything else."""
    if isinstance(turns, str) or not turns:
        return turns or ""
    is_text = len(turns) == 1 and set(turns[0]) == {"role", "content"} and turns[0]["role"] == role
    return turns[0]["content"] if is_text and isinstance(turns[0]["content"], str) else None


def _hash(value: Any) -> int:
    digest = hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def _json(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return json_value(float(value))
    if isinstance(value, list) and value and isinstance(value[0], float):
        return json_value([*map(float, value)])
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if _is_unicode(text) else json.dumps(value, default=str)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a surrogate alone, which JSON has as an escape
        return False
    return True
