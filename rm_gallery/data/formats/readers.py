"""The formats by name."""

from __future__ import annotations

from rm_gallery.data.formats.draft import Format
from rm_gallery.data.formats.helpsteer3 import helpsteer3_columns, read_helpsteer3
from rm_gallery.data.formats.nested import completions_columns, nested_columns, read_completions, read_nested
from rm_gallery.data.formats.pairs import (
    pair_columns,
    prompted_columns,
    read_conversations,
    read_prompted,
    read_texts,
)
from rm_gallery.data.formats.ranked import ranked_columns, read_ranked, read_scored, scored_columns

READERS: dict[str, Format] = {
    "text": Format("chosen and rejected as bare texts", read_texts, pair_columns),
    "messages": Format("chosen and rejected as lists of messages", read_conversations, pair_columns),
    "json": Format("chosen and rejected as JSON strings of lists of messages", read_conversations, pair_columns),
    "prompt": Format("a prompt with chosen and rejected", read_prompted, prompted_columns),
    "scored": Format("responses with scores", read_scored, scored_columns),
    "ranked": Format("responses with ranks", read_ranked, ranked_columns),
    "helpsteer3": Format("two responses with an overall preference", read_helpsteer3, helpsteer3_columns),
    "nested": Format("input, and output with a label or score for each response", read_nested, nested_columns),
    "completions": Format("completions with scores", read_completions, completions_columns),
}
"""In this order `auto` takes the first whose columns a file has; the first three differ by what these hold."""
