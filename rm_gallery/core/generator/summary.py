"""ExportOptions: settings of an export. ExportSummary: what it wrote, and what it dropped and why."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from rm_gallery.errors import UserError, nearest

DEFAULT_SPLIT = {"train": 0.8, "test": 0.2}

_MAX_REASONS = 20
_SIDE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # becomes the name of a file

Format = Literal["parquet", "jsonl"]
Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _as_tuple(formats: Any) -> Any:
    names = (formats,) if isinstance(formats, str) else formats
    return tuple(dict.fromkeys(names)) if isinstance(names, list | tuple) else names


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(strict=True))
class ExportOptions:
    """The options of `export_data`, which documents them. Build it with `create`."""

    formats: Annotated[tuple[Format, ...], Field(min_length=1), BeforeValidator(_as_tuple)] = ("parquet",)
    split_ratio: Annotated[Mapping[str, Share], Field(min_length=1)] = field(
        default_factory=lambda: dict(DEFAULT_SPLIT)
    )
    """Side -> its share of the rows; the shares add up to 1."""
    seed: int = 0
    layout: Literal["pairs", "groups"] = "pairs"
    pairs: Literal["all", "best_worst"] = "all"
    min_difference: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_pairs_per_prompt: Annotated[int, Field(ge=1)] | None = None
    contradictions: Literal["keep", "drop"] = "keep"
    source: Annotated[str, Field(min_length=1)] | None = None
    overwrite: bool = False

    @classmethod
    def create(cls, **values: Any) -> ExportOptions:
        """Raises UserError that names the option and the value."""
        try:
            options = cls(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name, *inner = map(str, first["loc"])
            where = name + "".join(f"[{key}]" for key in inner if key != "[key]")
            given, expected = first["input"], first.get("ctx", {}).get("expected", "")
            hint = nearest(given, re.findall(r"'(\w+)'", expected)) if isinstance(given, str) else ""
            raise UserError(f"{where}={given!r}: {first['msg'].replace('Input should', 'must')}.{hint}") from None
        options._check()
        return options

    def _check(self) -> None:
        for name in self.split_ratio:
            if not _SIDE.fullmatch(name):
                raise UserError(f"split_ratio[{name!r}]: not a valid file name; use letters, digits, '_', '-' and '.'")
        if len({name.lower() for name in self.split_ratio}) < len(self.split_ratio):
            raise UserError(
                f"split_ratio: {', '.join(self.split_ratio)} differ only in case, and many file systems ignore case; "
                "rename one"
            )
        total = math.fsum(self.split_ratio.values())
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise UserError(
                f"split_ratio adds up to {total:g}, must be 1: shares of the rows, e.g. train 0.8, test 0.2"
            )
        if self.layout == "groups" and (
            self.pairs != "all" or self.min_difference or self.max_pairs_per_prompt or self.contradictions != "keep"
        ):
            raise UserError(
                "layout='groups' writes all responses to a prompt in one row: pairs, min_difference, "
                "max_pairs_per_prompt and contradictions='drop' do not apply; remove them or set layout='pairs'"
            )


@dataclass(frozen=True)
class Side:
    """One side of the split."""

    wanted: float
    """Requested share of the rows, 0 to 1."""
    num_rows: int
    num_prompts: int
    """Prompts; without prompts, sets of rows that share a response."""
    files: tuple[Path, ...]
    """Empty when the side has no rows."""


@dataclass
class ExportSummary:
    """Counts of an export; `str(summary)` is the report that the command line prints."""

    num_cases: int = 0
    sides: dict[str, Side] = field(default_factory=dict)
    ties: int = 0
    """Pairs of responses with equal scores."""
    too_close: int = 0
    """Pairs whose scores differ by less than `min_difference`."""
    identical: int = 0
    """Pairs of one response that has two different scores."""
    duplicates: int = 0
    """Repeated pairs, scored responses or groups."""
    contradictions: int = 0
    """Pairs of responses to one prompt that are preferred in both directions."""
    contradictions_dropped: bool = False
    over_limit: int = 0
    """Pairs beyond `max_pairs_per_prompt`."""
    unpaired: int = 0
    """Single responses whose prompt has no other response."""
    failures: dict[str, int] = field(default_factory=dict)
    """Reason -> number of cases and responses that cannot be used."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first place where it occurred."""
    layout: str = "pairs"

    @property
    def num_rows(self) -> int:
        return sum(side.num_rows for side in self.sides.values())

    @property
    def num_failures(self) -> int:
        return sum(self.failures.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that were written."""
        return tuple(file for side in self.sides.values() for file in side.files)

    @property
    def empty_sides(self) -> tuple[str, ...]:
        return tuple(name for name, side in self.sides.items() if not side.num_rows)

    def __str__(self) -> str:
        lines = [f"{self.num_rows:,} {self.layout} from {self.num_cases:,} cases"]
        for name, side in self.sides.items():
            share = side.num_rows / self.num_rows if self.num_rows else 0.0
            files = ", ".join(map(str, side.files)) or "EMPTY, no file is written: too few prompts for this split"
            lines.append(
                f"  {name}: {side.num_rows:,} ({share:.1%}, requested {side.wanted:.1%}) of {side.num_prompts:,} "
                f"prompts: {files}"
            )
        return "\n".join(lines + [f"  {line}" for line in self.dropped()])

    def dropped(self) -> list[str]:
        """One line for each reason why comparisons, responses or cases give no row, with the count."""
        kept = "both dropped" if self.contradictions_dropped else "both kept"
        counted = {
            "ties": self.ties,
            "pairs with scores closer than min_difference": self.too_close,
            "pairs of one response that has two scores": self.identical,
            "duplicates": self.duplicates,
            f"contradictions (pairs preferred in both directions; {kept})": self.contradictions,
            "pairs above max_pairs_per_prompt": self.over_limit,
            "single responses without another response to their prompt": self.unpaired,
        }
        lines = [f"{count:,} {what}" for what, count in counted.items() if count]
        ordered = sorted(self.failures.items(), key=lambda item: (-item[1], item[0]))
        lines += [
            f"{count:,} dropped: {reason} (first: {self.examples[reason]})" for reason, count in ordered[:_MAX_REASONS]
        ]
        if rest := ordered[_MAX_REASONS:]:
            lines.append(f"{sum(count for _, count in rest):,} dropped for {len(rest)} other reasons")
        return lines
