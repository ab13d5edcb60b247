"""The formats by name. To add one: write `read` and `compare`, and add an entry here."""

from __future__ import annotations

from typing import Literal

from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.labelled import (
    compare_arena,
    compare_helpsteer2,
    compare_saferlhf,
    compare_shp,
    compare_summaries,
    rate_attributes,
    rate_helpsteer2,
    rate_lists,
    read_arena,
    read_helpsteer2,
    read_rated_conversation,
    read_saferlhf,
    read_shp,
    read_summaries,
    read_swift,
)
from rm_gallery.data.formats.pairs import (
    COMMON_COLUMNS,
    Column,
    Format,
    compare_lists,
    compare_pair,
    read_conversations,
    read_lists,
    read_prompted,
    read_texts,
)
from rm_gallery.data.formats.rankings import (
    compare_completions,
    compare_helpsteer3,
    compare_nested,
    compare_ranks,
    compare_scores,
    rate_ranks,
    rate_scores,
    read_completions,
    read_conversation,
    read_helpsteer3,
    read_nested,
    read_responses,
    read_single,
)
from rm_gallery.data.formats.single import read_one_response, read_preferred, read_turns
from rm_gallery.errors import UserError, nearest

_PROMPT = Column("prompt_key", "cell")
_PAIR = (Column("chosen_key", "cell", needed=True), Column("rejected_key", "cell", needed=True))
_PAIR_LABELS = (Column("margin_key", "number", is_label=True), Column("p_chosen_key", "number", is_label=True))
_RESPONSES = (Column("responses_key", "list", needed=True), _PROMPT)

_PAIR_READERS: dict[str, Format] = {
    "text": Format("chosen and rejected as raw texts", read_texts, compare_pair, (*_PAIR, _PROMPT, *_PAIR_LABELS)),
    "messages": Format(
        "chosen and rejected as lists of messages", read_conversations, compare_pair, (*_PAIR, _PROMPT, *_PAIR_LABELS)
    ),
    "json": Format(
        "chosen and rejected as JSON strings of lists of messages",
        read_conversations,
        compare_pair,
        (*_PAIR, _PROMPT, *_PAIR_LABELS),
    ),
    "prompt": Format(
        "a prompt with chosen and rejected",
        read_prompted,
        compare_pair,
        (Column("prompt_key", "cell", needed=True), *_PAIR, *_PAIR_LABELS),
    ),
    "lists": Format(
        "chosen and rejected as lists of responses",
        read_lists,
        compare_lists,
        (
            Column("chosen_key", "responses", needed=True),
            Column("rejected_key", "responses", needed=True),
            _PROMPT,
        ),
    ),
}
_SWIFT = Format(
    "a conversation with a rejected response",
    read_swift,
    compare_pair,
    (Column("columns.messages", "cell", needed=True), Column("columns.rejected_response", "cell", needed=True)),
)


def _label(key: str, holds: Literal["index", "name"]) -> Column:
    return Column(f"columns.{key}", holds, needed=True, is_label=True)


def _two(first: str, second: str) -> tuple[Column, ...]:
    return Column(f"columns.{first}", "cell", needed=True), Column(f"columns.{second}", "cell", needed=True), _PROMPT


_LABELLED_READERS: dict[str, Format] = {
    "saferlhf": Format(
        "two responses with the id of the better one",
        read_saferlhf,
        compare_saferlhf,
        (*_two("response_0", "response_1"), _label("better_response_id", "index")),
    ),
    "shp": Format(
        "two comments with a label",
        read_shp,
        compare_shp,
        (*_two("human_ref_A", "human_ref_B"), _label("labels", "index")),
    ),
    "arena": Format(
        "two conversations or responses with a winner",
        read_arena,
        compare_arena,
        (*_two("conversation_a", "conversation_b"), _label("winner", "name")),
    ),
    "summaries": Format(
        "summaries with a choice",
        read_summaries,
        compare_summaries,
        (
            Column("columns.summaries", "list", needed=True),
            Column("columns.info", "record"),
            _label("choice", "index"),
        ),
    ),
}
_PUBLISHED_READERS: dict[str, Format] = {
    "helpsteer3": Format(
        "two responses with an overall preference",
        read_helpsteer3,
        compare_helpsteer3,
        (
            Column("columns.context", "cell", needed=True, may_be_null=True),
            Column("columns.response1", "cell", needed=True),
            Column("columns.response2", "cell", needed=True),
            Column("columns.overall_preference", "number", needed=True, is_label=True),
            Column("columns.individual_preference", "list", is_label=True),
        ),
    ),
    "nested": Format(
        "input, and output with a label or score for each response",
        read_nested,
        compare_nested,
        (Column("columns.input", "cell", needed=True), Column("columns.output", "list", needed=True)),
    ),
    "completions": Format(
        "completions with scores",
        read_completions,
        compare_completions,
        (Column("columns.completions", "list", needed=True), Column("columns.instruction", "cell"), _PROMPT),
    ),
}
READERS: dict[str, Format] = {
    **_PAIR_READERS,
    "scored": Format(
        "responses with scores",
        read_responses,
        compare_scores,
        (*_RESPONSES, Column("scores_key", "list", needed=True, is_label=True)),
        rate=rate_scores,
    ),
    "ranked": Format(
        "responses with ranks",
        read_responses,
        compare_ranks,
        (*_RESPONSES, Column("ranks_key", "list", needed=True, is_label=True)),
        rate=rate_ranks,
    ),
    **_PUBLISHED_READERS,
    "swift": _SWIFT,
    **_LABELLED_READERS,
    "helpsteer2": Format(
        "rows of one response with its helpfulness",
        read_helpsteer2,
        compare_helpsteer2,
        (
            Column("columns.response", "cell", needed=True),
            Column("columns.helpfulness", "number", needed=True, is_label=True),
            Column("prompt_key", "cell", needed=True),
        ),
        rate=rate_helpsteer2,
        joins_rows=True,
    ),
}
"""`auto` takes the first in this order whose columns a file has; the first three differ by what these hold."""
CONVERSATION_READERS: dict[str, Format] = {
    "conversation": Format("a conversation", read_turns, None, (Column("columns.messages", "cell", needed=True),)),
    "response": Format(
        "one response to a prompt", read_one_response, None, (Column("columns.response", "cell", needed=True), _PROMPT)
    ),
    "chosen": Format(
        "the preferred response of a pair", read_preferred, None, (Column("chosen_key", "cell", needed=True), _PROMPT)
    ),
}
"""The same for supervised fine-tuning."""
RATED_READERS: dict[str, Format] = {
    "helpsteer2": Format(
        "rows of one response with its attributes",
        read_helpsteer2,
        None,
        (
            Column("columns.response", "cell", needed=True),
            Column("prompt_key", "cell", needed=True),
            Column("attributes_key", "record", is_label=True),
        ),
        rate=rate_attributes,
        joins_rows=True,
    ),
    "conversation": Format(
        "messages that end with a response, with its attributes",
        read_rated_conversation,
        None,
        (
            Column("columns.messages", "cell", needed=True),
            Column("attributes_key", "record", is_label=True),
        ),
        rate=rate_attributes,
    ),
    "scored": Format(
        "a list of responses with a list of numbers per attribute", read_responses, None, _RESPONSES, rate=rate_lists
    ),
}
"""The same with `model.attributes`."""
UNLABELED_READERS: dict[str, Format] = {
    **_PAIR_READERS,
    "swift": _SWIFT,
    "conversation": Format(
        "messages that end with the response", read_conversation, None, (Column("messages_key", "cell", needed=True),)
    ),
    "responses": Format("a list of responses", read_responses, None, _RESPONSES),
    "response": Format("one response", read_single, None, (Column("response_key", "cell", needed=True), _PROMPT)),
    **_PUBLISHED_READERS,
    **_LABELLED_READERS,
}
"""The same for a `ResponsesConfig`."""


def find_format(name: str, config: FormatConfig) -> Format:
    """The format of this name; UserError for one that does not exist."""
    known = formats_for(config)
    if name not in known:
        raise UserError(f"data.format={name}: must be auto or one of {', '.join(known)}.{nearest(name, known)}")
    return known[name]


def formats_for(config: FormatConfig) -> dict[str, Format]:
    """The formats that `auto` tries, in order."""
    if not config.has_preferences:
        return UNLABELED_READERS
    if config.lm_targets == "assistant":
        return CONVERSATION_READERS
    return RATED_READERS if config.attributes else READERS


def columns_of(name: str, config: FormatConfig, *, common: bool = True) -> list[Column]:
    """The columns of a format; without labels where no preferences are read."""
    columns = find_format(name, config).columns + (COMMON_COLUMNS if common else ())
    bound = [column.bind(config) for column in columns if config.has_preferences or not column.is_label]
    # A text `history` may be the prompt; raw texts have no turns before them.
    skipped = ["system_key", "history_key"] if name == "text" else []
    if config.prompt_key == config.history_key:
        skipped.append("history_key")
    return [column for column in bound if column.key not in skipped]


def needed_columns(name: str, config: FormatConfig) -> list[Column]:
    """The columns without which a file is not in this format."""
    return [column for column in columns_of(name, config, common=False) if column.needed]
