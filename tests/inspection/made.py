"""Groups and files for the tests of what show-data shows."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rm_gallery.data.dropped import Dropped
from rm_gallery.inspection.encoders import Encoder, WordEncoder
from rm_gallery.inspection.load import prompt_key
from rm_gallery.inspection.survey import Side, Survey, survey
from rm_gallery.inspection.suspicious import flags_of
from rm_gallery.inspection.table import Table, TableBuilder
from rm_gallery.inspection.views import view_of
from rm_gallery.schema import Comparison, PreferenceGroup


def pair(prompt: str, chosen: str, rejected: str, *, row: int = 0, source: str = "") -> PreferenceGroup:
    """A chat pair of f.parquet."""
    return PreferenceGroup(
        [{"role": "user", "content": prompt}],
        [[{"role": "assistant", "content": text}] for text in (chosen, rejected)],
        (Comparison(0, 1),),
        "chat",
        f"f.parquet:{row}",
        source,
    )


def pairs(*texts: tuple[str, str, str]) -> list[PreferenceGroup]:
    """Pairs in rows 0, 1, ..."""
    return [pair(*each, row=row) for row, each in enumerate(texts)]


def table_of(groups: Sequence[PreferenceGroup]) -> Table:
    builder = TableBuilder(prompt_key, flags_of)
    for group in groups:
        builder.add(group, view_of(group))
    return builder.finish()


def survey_of(groups: Sequence[PreferenceGroup], encoder: Encoder | None = None, *, name: str = "training") -> Survey:
    side = Side(name, ("f.parquet",), groups, Dropped())
    return survey(side, encoder or WordEncoder(), prompt_key=prompt_key, num_samples=2, seed=0)


def words(count: int, *, seed: int) -> str:
    """Made-up words, no two texts alike."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(count))
