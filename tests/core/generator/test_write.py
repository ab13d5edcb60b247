"""What the files hold, whatever the texts are; and that there are all of them or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_gallery.core.generator import export_data, write
from rm_gallery.errors import UserError
from tests.core.generator.exported import export, graded, read_back

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
CASE = {"prompt": "Q", "response_a": "g", "response_b": "b", "score_a": 2, "score_b": 1}
TEXTS = [
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "nul \0 bell \a",
    "lines\n\r\n\u2028 \u2029 \x85 end",
    "\ufeff mark <|im_end|> \"quotes\" 'more' \\n \\ud83d",
    "[1, 2]",
    '{"role": "user"}',
    "x" * 10_000_000,
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_texts_arrive_as_they_are(text: str, tmp_path: Path) -> None:
    source = text[:100]
    export([{**CASE, "prompt": text, "response_a": f"a{text}", "response_b": "b", "source": source}], tmp_path)
    expected = {"prompt": text, "chosen": f"a{text}", "rejected": "b", "margin": 1.0, "source": source}
    assert read_back(tmp_path / "all.parquet") == read_back(tmp_path / "all.jsonl") == [expected]


def test_columns_have_plain_types(tmp_path: Path) -> None:
    export([{**CASE, "source": "s"}], tmp_path)
    assert [(field.name, str(field.type)) for field in pq.read_schema(tmp_path / "all.parquet")] == [
        ("prompt", "string"), ("chosen", "string"), ("rejected", "string"), ("margin", "double"), ("source", "string")
    ]  # fmt: skip


def test_one_case_with_messages_makes_all_prompts_messages(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "R"}]
    whole = {**CASE, "prompt": "", "response_a": [{"role": "assistant", "content": "g"}]}
    whole["response_b"] = [{"role": "assistant", "content": "b"}]
    rows, _ = export([CASE, {**CASE, "prompt": chat}], tmp_path)
    prompts = sorted((row["prompt"] for row in rows), key=len)
    assert prompts == [[{"role": "user", "content": "Q"}], chat]
    assert {row["chosen"] for row in rows} == {"g"}, "responses may be text beside prompts of messages"
    assert read_back(tmp_path / "all.parquet") == rows
    rows, _ = export([CASE, whole], tmp_path)
    assert sorted(row["prompt"] or "" for row in rows) == ["", "Q"]
    assert {str(row["chosen"]) for row in rows} == {str(whole["response_a"])}
    assert read_back(tmp_path / "all.parquet") == rows


def test_one_response_with_messages_makes_all_responses_messages(tmp_path: Path) -> None:
    rows, _ = export([CASE, {**CASE, "prompt": "R", "response_a": [{"role": "assistant", "content": "g"}]}], tmp_path)
    good, bad = ([{"role": "assistant", "content": text}] for text in ("g", "b"))
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(good, bad)] * 2
    assert {row["prompt"] for row in rows} == {"Q", "R"}
    assert read_back(tmp_path / "all.parquet") == rows


@pytest.mark.parametrize("other", [CASE, {**CASE, "prompt": "", "response_a": [{"role": "assistant", "content": "g"}]}])
def test_bare_texts_beside_chats_are_left_out_and_counted(other: Any, tmp_path: Path) -> None:
    bare = {**CASE, "prompt": None, "response_a": "bare"}
    if not other["prompt"]:
        other = {**other, "response_b": [{"role": "assistant", "content": "b"}]}
    rows, summary = export([bare, other, bare], tmp_path)
    assert len(rows) == 1 and "bare" not in str(rows)
    assert summary.failures == {"texts without a prompt, among cases that have one": 2}
    assert export([bare], tmp_path)[1].num_failures == 0


def test_messages_with_names_and_tool_calls_lose_nothing(tmp_path: Path) -> None:
    named = [{"role": "user", "content": "Q", "name": "Ada"}]
    call = {
        "role": "assistant",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"z": 1.5, "y": [None]}}}],
    }
    tool = {"role": "tool", "content": "42", "tool_call_id": "1"}
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {}}}]}
    cases = [{**CASE, "prompt": named, "response_a": [call, tool, {"role": "assistant", "content": "42"}]},
             {**CASE, "prompt": [{"role": "user", "content": "R"}], "response_a": [other]}]  # fmt: skip
    rows, _ = export(cases, tmp_path)
    assert {json.dumps(row["prompt"]) for row in rows} == {json.dumps(case["prompt"]) for case in cases}
    assert [call, tool, {"role": "assistant", "content": "42"}] in [row["chosen"] for row in rows]
    in_parquet = read_back(tmp_path / "all.parquet")
    assert [row["chosen"] for row in in_parquet] == [json.dumps(row["chosen"]) for row in rows], "JSON, in this order"
    assert {turn.get("name") for row in in_parquet for turn in row["prompt"]} == {"Ada", None}


@pytest.mark.parametrize(("most", "num_groups"), [(10**9, 3), (100_000, 5)])
def test_large_exports_are_written_in_parts(
    most: int, num_groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_BATCH_CHARACTERS", most)
    cases = [{**CASE, "prompt": str(n), "response_a": "x" * 200} for n in range(2500)]
    export(cases, tmp_path)
    groups = pq.ParquetFile(tmp_path / "all.parquet").metadata
    assert groups.num_rows == 2500 and groups.num_row_groups in (num_groups, num_groups + 1)
    assert read_back(tmp_path / "all.parquet") == read_back(tmp_path / "all.jsonl")


@pytest.mark.parametrize("name", ["train.parquet", "test.jsonl"])
def test_files_that_are_there_stay_unless_told(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} exists; set overwrite=True"):
        export_data(graded(40), tmp_path, formats=["parquet", "jsonl"])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]
    export_data(graded(40), tmp_path, formats=["parquet", "jsonl"], overwrite=True)
    assert len(read_back(tmp_path / name)) > 0 and len(list(tmp_path.iterdir())) == 4


def make_link(path: Path) -> None:
    (path / "out").mkdir()
    (path / "out/train.parquet").symlink_to(path / "nowhere")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: (path / "out").write_text("file"), "out is not a folder"),
        (lambda path: (path / "out/train.parquet").mkdir(parents=True), "not a regular file"),
        (make_link, "not a regular file"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(
    make: Callable[[Path], Any], what: str, tmp_path: Path
) -> None:
    make(tmp_path)
    cases = iter([CASE])
    with pytest.raises(UserError, match=what):
        export_data(cases, tmp_path / "out", overwrite=True)
    assert next(cases) is CASE


@pytest.mark.parametrize("folder", ["", None, 7, "x" * 300])
def test_what_is_no_folder_is_refused(folder: Any, in_tmp: Path) -> None:
    with pytest.raises(UserError, match="output_dir"):
        export_data([CASE], folder)
    assert not list(in_tmp.iterdir())


def test_cases_have_a_second_name(in_tmp: Path) -> None:
    cases = graded(20)
    assert str(export_data(eval_cases=cases, output_dir="a")) == str(export_data(cases, "b")).replace("b/", "a/")
    for both, how in (({}, "not set"), ({"cases": cases, "eval_cases": cases}, "both set")):
        with pytest.raises(UserError, match=f"cases and eval_cases are {how}"):
            export_data(output_dir="c", **both)
    with pytest.raises(UserError, match="output_dir is None"):
        export_data(eval_cases=cases)


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(case) + "\n" for case in graded(20)))
    before = path.read_bytes()
    with pytest.raises(UserError, match="this file is also an input"):
        export_data(path, tmp_path, formats=["jsonl"], overwrite=True)
    assert path.read_bytes() == before


FULL_DISK = """
import random, resource, sys
from rm_gallery.core.generator import export_data
from rm_gallery.errors import UserError
from tests.core.generator.exported import graded
draw = random.Random(0)
cases = [{**case, "response": draw.randbytes(200).hex()} for case in graded(600, prompts=60)]
for formats, limit in ((["parquet", "jsonl"], 4000), (["parquet", "jsonl"], 1_300_000), (["jsonl"], 400_000)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        export_data(cases, sys.argv[1], formats=formats, split_ratio={"train": 0.9, "test": 0.1}, overwrite=True)
    except UserError as error:
        print(error)
"""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("older")
    printed, errors = start(FULL_DISK, tmp_path).communicate(timeout=120)
    told = "cannot be written (File too large); free disk space or choose another folder"
    assert (printed, errors) == (f"output_dir {tmp_path}: {told}\n" * 3, "")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("train.jsonl", "older")]


KILLED = """
import sys, time
from rm_gallery.core.generator import export_data, write
from tests.core.generator.exported import graded
rest = write._write
def stop(path, suffix, *others):
    if suffix == ".jsonl" and path.name.startswith(".test"):
        print("writing", flush=True)
        time.sleep(60)
    rest(path, suffix, *others)
write._write = stop
export_data(graded(200), sys.argv[1], formats=["parquet", "jsonl"])
"""


def test_a_killed_export_leaves_no_file_under_its_name(tmp_path: Path) -> None:
    process = start(KILLED, tmp_path)
    try:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
    finally:
        process.kill()
        process.communicate()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 3 and all(name.startswith(".") and name.endswith(".tmp") for name in left)
    export_data(graded(200), tmp_path, formats=["parquet", "jsonl"])
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        "train.parquet", "train.jsonl", "test.parquet", "test.jsonl"
    }  # fmt: skip


def test_a_stopped_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write._write

    def stop(path: Path, *others: Any) -> None:
        original(path, *others)
        if path.name.startswith(".test"):
            raise KeyboardInterrupt

    monkeypatch.setattr(write, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        export_data(graded(40), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write._write

    def appear(path: Path, *others: Any) -> None:
        original(path, *others)
        (tmp_path / "test.parquet").write_text("theirs")

    monkeypatch.setattr(write, "_write", appear)
    with pytest.raises(UserError, match=r"test\.parquet: another process wrote this file during the export"):
        export_data(graded(100), tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("test.parquet", "theirs")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), pa.ArrowInvalid("too large\nfor a column")])
def test_an_error_of_a_library_becomes_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(write, "_write", fail)
    with pytest.raises(UserError, match=r"cannot be written \((No space left on device|too large for a column)\)"):
        export_data(graded(40), tmp_path)
    assert not list(tmp_path.iterdir())
