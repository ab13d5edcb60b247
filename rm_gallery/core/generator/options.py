"""ExportOptions: how judged answers become files, checked before anything is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from rm_gallery.errors import UserError, nearest

FORMATS = ("parquet", "jsonl")
LAYOUTS = ("pairs", "groups")
DEFAULT_SPLIT: Mapping[str, float] = {"train": 0.8, "test": 0.2}

_SIDE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # becomes the name of a file


@dataclass(frozen=True)
class ExportOptions:
    """What `export_data` was asked for."""

    formats: tuple[str, ...]
    split: Mapping[str, float]
    """Side -> its share of the rows; the shares add up to 1."""
    seed: int
    layout: Literal["pairs", "groups"]
    pairs: Literal["all", "best_worst"]
    min_difference: float
    max_pairs_per_prompt: int | None
    contradictions: Literal["keep", "drop"]
    source: str | None
    overwrite: bool

    @classmethod
    def create(
        cls,
        *,
        formats: Any,
        split_ratio: Any,
        seed: Any,
        layout: Any,
        pairs: Any,
        min_difference: Any,
        max_pairs_per_prompt: Any,
        contradictions: Any,
        source: Any,
        overwrite: Any,
    ) -> ExportOptions:
        """Raises UserError, naming the option, for a value that cannot be."""
        _one_of("layout", layout, LAYOUTS)
        _one_of("pairs", pairs, ("all", "best_worst"))
        _one_of("contradictions", contradictions, ("keep", "drop"))
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise UserError(f"seed is {seed!r}: it must be a whole number")
        if not _is_number(min_difference) or min_difference < 0:
            raise UserError(f"min_difference is {min_difference!r}: it must be a number of at least 0")
        limit = max_pairs_per_prompt
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise UserError(f"max_pairs_per_prompt is {limit!r}: it must be a whole number of at least 1, or None")
        if source is not None and (not isinstance(source, str) or not source):
            raise UserError(f"source is {source!r}: it must be a text, the name of the data set")
        if layout == "groups" and (pairs != "all" or min_difference or limit is not None or contradictions != "keep"):
            raise UserError(
                "layout='groups' writes all responses to a prompt in one row, so pairs, min_difference, "
                "max_pairs_per_prompt and contradictions='drop' have nothing to choose from; leave them out, "
                "or take layout='pairs'"
            )
        return cls(
            _formats(formats),
            _split(split_ratio),
            seed,
            layout,
            pairs,
            float(min_difference),
            limit,
            contradictions,
            source,
            bool(overwrite),
        )


def _formats(formats: Any) -> tuple[str, ...]:
    names = (formats,) if isinstance(formats, str) else formats
    if not isinstance(names, Sequence) or not names:
        raise UserError(f"formats is {formats!r}: it must be a list of {' and '.join(FORMATS)}, with at least one")
    for name in names:
        _one_of("formats", name, FORMATS)
    return tuple(dict.fromkeys(cast("Sequence[str]", names)))


def _split(split: Any) -> dict[str, float]:
    if not isinstance(split, Mapping) or not split:
        raise UserError(f"split_ratio is {split!r}: it must give each side its share, as {dict(DEFAULT_SPLIT)}")
    for name, share in split.items():
        if not isinstance(name, str) or not _SIDE.fullmatch(name):
            raise UserError(f"split_ratio has the side {name!r}, which is no name for a file; use letters and digits")
        if not _is_number(share) or share <= 0:
            raise UserError(
                f"split_ratio gives {name!r} the share {share!r}: it must be a number above 0; leave out a side that "
                "is to get nothing"
            )
    if len({name.lower() for name in split}) < len(split):
        raise UserError(f"split_ratio names {', '.join(split)}: on many disks two of these are the same file")
    total = math.fsum(split.values())
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise UserError(
            f"split_ratio adds up to {total:g}, and must to 1: the shares of all rows, as train 0.8, test 0.2"
        )
    return {name: share / total for name, share in split.items()}


def _one_of(option: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        hint = nearest(value, known) if isinstance(value, str) else ""
        raise UserError(f"{option} has {value!r}, one of {', '.join(known)} is wanted.{hint}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
