"""Preference pairs whose report is known by hand, and the report of the command as plain values."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.cli import main
from tests.small import write_pairs


def pair(prompt: str, chosen: str, rejected: str, **extra: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected, **extra}


def flipped(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(count)) + "."


def plain_rows(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Pairs that have nothing in common."""
    draw = random.Random(seed)
    return [pair(words(draw, 4), words(draw, 12), words(draw, 12)) for _ in range(count)]


class Report:
    """The JSON of `rm-gallery show-data`."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.splits: list[dict[str, Any]] = values["splits"]
        self.train = self.splits[0]
        self.leakage = by_key(values["leakage"])
        self.baselines = {(each["key"], each["on"]): each for each in values["baselines"]["baselines"]}
        self.notes: list[str] = values["baselines"]["notes"]
        self.summary = [(each["level"], each["text"]) for each in values["summary"]]
        self.length_bias = {each["unit"]: each for each in self.train["length_bias"]}

    def level(self, words: str) -> str | None:
        """Severity of the summary line that contains these words; None without one."""
        return next((level for level, text in self.summary if words in text), None)


class Show:
    """Runs the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def text(self, *arguments: str) -> str:
        self._capsys.readouterr()
        assert main(["show-data", *arguments]) == 0
        return self._capsys.readouterr().out

    def __call__(self, *arguments: str) -> Report:
        return Report(json.loads(self.text(*arguments, "--json")))

    def of(
        self, train: Sequence[dict[str, Any]], val: Sequence[dict[str, Any]] | None = None, *arguments: str
    ) -> Report:
        """The report of these rows, written to train.parquet and val.parquet."""
        return self(*files(train, val), *arguments)

    def error(self, *arguments: str) -> str:
        """The message of a command that ends with status 2."""
        self._capsys.readouterr()
        assert main(["show-data", *arguments]) == 2
        error = self._capsys.readouterr().err
        assert error.count("rm-gallery: error:") == 1
        return error.partition("rm-gallery: error: ")[2].strip()


def files(train: Sequence[dict[str, Any]], val: Sequence[dict[str, Any]] | None = None) -> list[str]:
    """Configuration of these rows, written to train.parquet and val.parquet in the working directory."""
    write_pairs(Path("train.parquet"), train)
    if val is None:
        return ["data.train_files=train.parquet"]
    write_pairs(Path("val.parquet"), val)
    return ["data.train_files=train.parquet", "data.val_files=val.parquet"]


def by_key(findings: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["key"]: each for each in findings}


def counts(findings: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Those that occur."""
    return {each["key"]: each["count"] for each in findings if each["count"]}
