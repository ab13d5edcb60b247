"""docs/exporting.md: its snippets run, and print what it says."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.core.generator.export import main
from rm_gallery.core.generator.summary import ExportSummary
from tests.core.generator.exported import read_back

PAGE = Path(__file__).parents[3] / "docs/exporting.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_snippets_run_one_after_the_other(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    first, second = blocks("python")
    exec(compile(first, str(PAGE), "exec"), names)
    assert capsys.readouterr().out == blocks("text")[0]
    exec(compile(second, str(PAGE), "exec"), names)
    assert len(read_back(Path("judged/train.parquet"))) == 24
    for name in ("cases", "samples"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in names[name]))
    before = {path: path.read_bytes() for path in in_tmp.rglob("*.parquet")}
    commands = [shlex.split(block.replace("\\\n", " ")) for block in blocks("bash")]
    for command in commands[1:]:
        assert command[:2] == ["rm-gallery", "export-data"]
        assert main(command[2:]) == 0
    assert {path: path.read_bytes() for path in in_tmp.rglob("*.parquet")} == before, "the command line does the same"
    assert "rm-gallery train" in " ".join(commands[0])


def test_the_page_explains_every_number_of_the_summary() -> None:
    explained = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(ExportSummary)}
    assert fields - explained == {"num_cases", "sides", "contradictions_dropped", "examples", "layout"}
