"""Keys of `data` on how a row is read: the format, the columns, and what happens to bad rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal


@dataclass(frozen=True)
class CustomClassConfig:
    """`data.custom_cls`: a user-defined class that reads rows."""

    __pydantic_config__ = {"extra": "forbid"}

    path: str | None = None
    """Python file that defines the class, relative to the working directory."""
    name: str | None = None
    """Name of the class in that file."""


@dataclass(frozen=True)
class PublishedColumns:
    """`data.columns`: names of columns in the formats of published datasets; null reads no such column."""

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
    """helpsteer3: list of `{score: ...}`, one per annotator; gives the share of annotators who agree."""
    input: str | None = "input"
    """nested: the conversation before the responses, as messages or text. Elsewhere: text that follows the
    instruction, on a new line; the prompt in a file without another one."""
    output: str | None = "output"
    """nested: list of responses, each with a label or score, optionally inside `answer`."""
    instruction: str | None = "instruction"
    """The prompt in a file without the column of `data.prompt_key`."""
    completions: str | None = "completions"
    """completions: list of responses, each with scores."""
    response_0: str | None = "response_0"
    """saferlhf: the first response."""
    response_1: str | None = "response_1"
    """saferlhf: the second response."""
    better_response_id: str | None = "better_response_id"
    """saferlhf: 0 if the first response is better, 1 if the second is; `safer_response_id` trains on safety instead."""
    human_ref_A: str | None = "human_ref_A"
    """shp: the first response."""
    human_ref_B: str | None = "human_ref_B"
    """shp: the second response."""
    labels: str | None = "labels"
    """shp: 1 if the first response is better, 0 if the second is."""
    conversation_a: str | None = "conversation_a"
    """arena: the first response, or the whole conversation with it; `response_a` in a file without this column."""
    conversation_b: str | None = "conversation_b"
    """arena: the second; `response_b` in a file without this column."""
    winner: str | None = "winner"
    """arena: `model_a` or `model_b` (or `a`, `b`, or the value of the column `model_a` or `model_b`), or a tie;
    in a file without this column, `winner_model_a`, `winner_model_b` and `winner_tie`, one of which is 1."""
    summaries: str | None = "summaries"
    """summaries: list of `{text: ...}`."""
    choice: str | None = "choice"
    """summaries: index of the best summary, from 0."""
    info: str | None = "info"
    """summaries: the prompt, as `{title: ..., post: ...}`, or with `article` in place of `post`."""
    messages: str | None = "messages"
    """swift: the conversation that ends with the chosen response; conversation: the conversation."""
    rejected_response: str | None = "rejected_response"
    """swift: the rejected response; `rejected_messages` in a file without this column."""
    response: str | None = "response"
    """helpsteer2, response: the response of a row; consecutive rows with the same prompt are one group."""
    helpfulness: str | None = "helpfulness"
    """helpsteer2: its score, higher is better."""
    score: str | None = None
    """nested, completions: the field of a response that holds its score; by default the first of `label`,
    `is_preferred`, `preference`, `preference_score`, `score`, `reward`, `fine-grained_score`, `overall_score`."""


@dataclass(frozen=True)
class ColumnNames:
    """Part of `data`: names of the columns that are read; null reads no such column."""

    __pydantic_config__ = {"extra": "forbid"}

    prompt_key: str | None = "prompt"
    """Column of the prompt. A row without it has the prompt in the first of `instruction` (with `input`), `question`,
    `query`, `input`, `context`, `messages`, `conversations`, `conversation`, `trajectory` and `history` (text), or
    inside its responses. null reads no prompt column."""
    system_key: str | None = "system"
    """Column of the system turn before the prompt."""
    history_key: str | None = "history"
    """Column of earlier turns, before the prompt: messages, or pairs of what the user and the assistant said."""
    chosen_key: str | None = "chosen"
    """Column of the preferred response. A file without both columns may have `chosen_response` and `rejected_response`,
    `response` and `rejected_response`, or `preferred_output` and `non_preferred_output`."""
    rejected_key: str | None = "rejected"
    """Column of the rejected response."""
    responses_key: str | None = "responses"
    """Column of a list of responses to one prompt."""
    scores_key: str | None = "scores"
    """Column of one score per response: higher is better, and equal scores are ties."""
    ranks_key: str | None = "ranks"
    """Column of one rank per response: 1 is best, and equal ranks are ties."""
    margin_key: str | None = "margin"
    """Column of how much better the chosen response is."""
    weight_key: str | None = "weight"
    """Column of a factor on the loss of the row; 1 without the column or where it is empty."""
    p_chosen_key: str | None = "p_chosen"
    """Column of the share of annotators who prefer the chosen response, 0 to 1."""
    source_key: str | None = "source"
    """Column that names the dataset of a row, for metrics by source."""
    attributes_key: str | None = "attributes"
    """With `model.attributes`: column of an object with a number for each name, for names without their own column."""
    tools_key: str | None = "tools"
    """Column of tool definitions, as a list or its JSON, for the chat template."""


@dataclass(frozen=True)
class MultiturnConfig:
    """`data.multiturn`: names that other trainers use for the columns of conversations (`objective.name=sft`)."""

    __pydantic_config__ = {"extra": "forbid"}

    enable: bool | None = None
    """true: rows are conversations in one column, as `data.format=conversation`. Null and false: `data.format`."""
    messages_key: str | None = None
    """Column of the conversation, in place of `data.columns.messages`."""
    tools_key: str | None = None
    """Column of tool definitions, in place of `data.tools_key`."""


@dataclass(frozen=True)
class TargetsConfig:
    """Part of `data`: which tokens a language-model loss is computed for."""

    __pydantic_config__ = {"extra": "forbid"}

    lm_targets: Literal["none", "assistant", "chosen"] = "none"
    """Set from `objective`: `assistant` reads conversations, and their assistant turns are targets; `chosen` reads
    preferences, and the assistant turns of preferred responses are targets."""


@dataclass(frozen=True)
class FormatConfig(ColumnNames, TargetsConfig):
    """Part of `data`: how a row is read."""

    has_preferences: ClassVar[bool] = True
    """Whether a row must say which response is better."""

    format: Literal[
        "auto", "text", "messages", "json", "prompt", "lists", "scored", "ranked", "helpsteer3", "nested",
        "completions", "swift", "saferlhf", "shp", "arena", "summaries", "helpsteer2", "conversation", "response",
        "chosen"
    ] = "auto"  # fmt: skip
    """Format of the rows; `auto` detects it from the columns and first rows of each file, and logs its choice."""
    input_style: Literal["auto", "text", "chat"] = "auto"
    """`chat` renders messages with the chat template, `text` uses strings as they are. `auto`: chat for messages, and
    for a string prompt with string responses if the tokenizer has a chat template; text otherwise."""
    attributes: list[str] = field(default_factory=list)
    """Set from `model.attributes`: rows of one response each, with a number for each name, are read, and no
    preferences."""
    ties: bool = False
    """Set from `objective.name`: rows that say that two responses are equally good are tied comparisons. Otherwise they
    are dropped and counted, and equal scores or ranks are not compared."""
    bad_rows: Literal["drop", "error"] = "drop"
    """What to do with a bad row: `drop` drops and counts it, `error` stops at it."""
    columns: PublishedColumns = field(default_factory=PublishedColumns)
    multiturn: MultiturnConfig = field(default_factory=MultiturnConfig)
    custom_cls: CustomClassConfig = field(default_factory=CustomClassConfig)

    @property
    def compares(self) -> bool:
        """Whether rows are read as comparisons between responses."""
        return self.has_preferences and not self.attributes and self.lm_targets != "assistant"


@dataclass(frozen=True)
class ResponsesConfig(FormatConfig):
    """How rows are read for scoring: every layout that training accepts, without its labels, and three more.

    These are `responses` (prompt, list of responses), `response` (prompt, one response) and `conversation` (messages).
    """

    has_preferences: ClassVar[bool] = False
    response_key: str | None = "response"
    """Column of a single response."""
    messages_key: str | None = "messages"
    """Column of a conversation whose last turn is the response."""
