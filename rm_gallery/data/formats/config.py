"""Keys of `data` that say how a row is read: the format, the columns, and what becomes of rows that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class CustomClassConfig:
    """`data.custom_cls`: a class of the user's own that says how a row is read."""

    __pydantic_config__ = {"extra": "forbid"}

    path: str | None = None
    """Python file that defines the class, relative to the working directory."""
    name: str | None = None
    """Name of the class in that file."""


@dataclass(frozen=True)
class PublishedColumns:
    """`data.columns`: names of the columns that formats of published data sets have; null reads no such column."""

    __pydantic_config__ = {"extra": "forbid"}

    context: str | None = "context"
    """helpsteer3: the conversation before the responses, as messages or text."""
    response1: str | None = "response1"
    """helpsteer3: the first response."""
    response2: str | None = "response2"
    """helpsteer3: the second response."""
    overall_preference: str | None = "overall_preference"
    """helpsteer3: from -3 (the first response is much better) to 3 (the second is); 0 is a tie."""
    individual_preference: str | None = "individual_preference"
    """helpsteer3: list of `{score: ...}`, one for each person; gives the share of people who agree."""
    input: str | None = "input"
    """nested: the conversation before the responses, as messages or text."""
    output: str | None = "output"
    """nested: list of responses, each with a label or score, perhaps inside `answer`."""
    instruction: str | None = "instruction"
    """completions: the prompt."""
    completions: str | None = "completions"
    """completions: list of responses, each with scores."""
    score: str | None = None
    """nested, completions: the field of a response that holds its score; by default the first of `label`,
    `is_preferred`, `preference`, `preference_score`, `score`, `reward`, `fine-grained_score`, `overall_score`."""


@dataclass(frozen=True)
class ColumnNames:
    """Part of `data`: names of the columns that are read; null reads no such column."""

    __pydantic_config__ = {"extra": "forbid"}

    prompt_key: str | None = "prompt"
    """Column of the prompt; a file without it has the prompt inside its responses. null reads no prompt column."""
    chosen_key: str | None = "chosen"
    """Column of the preferred response."""
    rejected_key: str | None = "rejected"
    """Column of the other response."""
    responses_key: str | None = "responses"
    """Column of a list of responses to one prompt."""
    scores_key: str | None = "scores"
    """Column of one score for each of them: higher is better, and equal scores are not compared."""
    ranks_key: str | None = "ranks"
    """Column of one rank for each of them: 1 is best, and equal ranks are not compared."""
    margin_key: str | None = "margin"
    """Column of how much better the chosen response is."""
    weight_key: str | None = "weight"
    """Column of a factor on the row's loss; without the column, or where it is empty, 1."""
    p_chosen_key: str | None = "p_chosen"
    """Column of the share of people who prefer the chosen response, 0 to 1."""
    source_key: str | None = "source"
    """Column that names the data set a row belongs to, for metrics by source."""
    tools_key: str | None = "tools"
    """Column of tool definitions, as a list or its JSON, for the chat template."""


@dataclass(frozen=True)
class FormatConfig(ColumnNames):
    """Part of `data`: how a row is read."""

    format: Literal[
        "auto", "text", "messages", "json", "prompt", "scored", "ranked", "helpsteer3", "nested", "completions"
    ] = "auto"
    """What rows look like; `auto` finds out from the columns and first rows of each file, and says what it chose."""
    input_style: Literal["auto", "text", "chat"] = "auto"
    """`chat` renders messages with the chat template, `text` takes strings as they are. `auto`: chat for messages and
    for a string prompt with string responses when the tokenizer has a chat template; text otherwise."""
    bad_rows: Literal["drop", "error"] = "drop"
    """What a row that cannot be used does: `drop` leaves it out and counts it, `error` stops there."""
    columns: PublishedColumns = field(default_factory=PublishedColumns)
    custom_cls: CustomClassConfig = field(default_factory=CustomClassConfig)
