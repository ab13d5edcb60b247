"""`rm-gallery score`: as many rows out as in, in order; every source and layout; several files and models; resume."""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_gallery.cli import main
from rm_gallery.data.sources import resolve_entries
from rm_gallery.errors import UserError
from rm_gallery.scoring import RewardScorer, workers
from rm_gallery.scoring import score_files as score_files_module
from rm_gallery.scoring.jobs import name_models
from rm_gallery.scoring.score_files import ScoreOptions, score_files
from rm_gallery.scoring.tables import ScoreDataConfig, open_table, read_group
from tests import forks
from tests.data.damage import SAMPLES
from tests.data.sources.writing import PAIRS, WRITERS, write
from tests.small import chat_pairs, make_model, text_pairs, write_pairs


class Stopped(Exception):
    """Stands for a power cut."""


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stop_after(parts: int) -> Any:
    left = iter(range(parts - 1))

    def hook(_: int) -> None:
        if next(left, None) is None:
            raise Stopped

    return hook


@pytest.fixture
def options(in_tmp: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> ScoreOptions:
    """200 pairs to score into `out.parquet`, in parts of 64, 64, 64 and 8 rows."""
    monkeypatch.setattr(score_files_module, "_MAX_ROWS", 64)
    write_pairs(in_tmp / "pairs.parquet", [{**row, "number": n} for n, row in enumerate(text_pairs(200))])
    return ScoreOptions((str(text_folder),), ("pairs.parquet",), "out.parquet", device="cpu")


def test_pairs_keep_their_rows_and_get_two_columns(options: ScoreOptions, text_scorer: RewardScorer) -> None:
    (scored,) = score_files(options)
    assert (scored.num_rows, scored.was_there) == (200, False)
    found = pq.read_table("out.parquet")
    given = pq.read_table("pairs.parquet")
    assert found.select(given.column_names) == given
    expected = text_scorer.score_pairs(given.to_pylist())
    for name, side in (("reward_chosen", 0), ("reward_rejected", 1)):
        assert found[name].to_pylist() == pytest.approx([pair[side] for pair in expected], abs=1e-4)
    assert sorted(path.name for path in Path().iterdir() if not path.name.endswith(".lock")) == [
        ".out.parquet.score.json", "out.parquet", "pairs.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_where_it_stopped(options: ScoreOptions, parts: int, in_tmp: Path) -> None:
    score_files(ScoreOptions(**{**vars(options), "output": "whole.parquet"}))
    with pytest.raises(Stopped):
        score_files(options, on_part=stop_after(parts))
    assert not (in_tmp / "out.parquet").exists()
    done: list[int] = []
    score_files(options, on_part=done.append)
    assert sum(done) == 200 - 64 * parts
    assert Path("out.parquet").read_bytes() == Path("whole.parquet").read_bytes()
    assert score_files(options, on_part=done.append)[0].was_there


def score_one_part(options: ScoreOptions) -> None:
    score_files_module._MAX_ROWS = 64
    score_files(options, on_part=lambda rows: time.sleep(60))


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was_killed(options: ScoreOptions, in_tmp: Path) -> None:
    process = forks.start(score_one_part, options, log=in_tmp / "log")
    try:
        deadline = time.monotonic() + 60
        while not list(in_tmp.glob(".out.parquet.parts/*/[0-9]*.parquet")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done: list[int] = []
    assert score_files(options, on_part=done.append)[0].num_rows == 200
    assert sum(done) == 200 - 64, "the part that was written is kept"
    assert not list(in_tmp.glob(".out.parquet.parts*"))


def test_another_model_or_input_never_takes_the_parts(
    options: ScoreOptions, chat_folder: Path, text_scorer: RewardScorer
) -> None:
    with pytest.raises(Stopped):
        score_files(options, on_part=stop_after(1))
    done: list[int] = []
    with pytest.raises(Stopped):
        score_files(ScoreOptions(**{**vars(options), "models": (str(chat_folder),)}), on_part=stop_after(1))
    write_pairs(Path("pairs.parquet"), text_pairs(70, seed=9))
    score_files(options, on_part=done.append)
    assert sum(done) == 70
    expected = [chosen for chosen, _ in text_scorer.score_pairs(text_pairs(70, seed=9))]
    assert pq.read_table("out.parquet")["reward_chosen"].to_pylist() == pytest.approx(expected, abs=1e-4)


def test_what_is_not_its_own_output_is_never_overwritten(options: ScoreOptions) -> None:
    Path("out.parquet").write_text("mine")
    with pytest.raises(UserError, match=r"out\.parquet: exists, and was not made of this input"):
        score_files(options)
    with pytest.raises(UserError, match="is the input itself"):
        score_files(ScoreOptions(**{**vars(options), "output": "pairs.parquet"}))
    assert Path("out.parquet").read_text() == "mine"


def test_rows_that_cannot_be_scored_have_null_and_a_count(
    in_tmp: Path, text_folder: Path, text_scorer: RewardScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [
        {"prompt": "Why?", "response": "So.", "big": 12345678901234567890},
        {"prompt": "Why?", "response": None},
        "this is no JSON",
        {"response": 7},
        {"prompt": "Why?", "response": b"\\ud800".decode("unicode_escape")},
        {},
        {"response": "last"},
    ]
    write_lines(in_tmp / "rows.jsonl", rows)
    assert main(["score", "--model", str(text_folder), "rows.jsonl", "--output", "out", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "out/rows.jsonl: 7 rows" in printed
    assert "global_step_1: 5 without a reward: 2 null response (first: rows.jsonl:1), " in printed
    assert "1 text with a lone surrogate (first: rows.jsonl:4)" in printed
    lines = (in_tmp / "out/rows.jsonl").read_text().splitlines()
    assert lines[0].startswith('{"prompt": "Why?", "response": "So.", "big": 12345678901234567890, "reward": ')
    assert lines[2:4] == ['{"unreadable_line": "this is no JSON", "reward": null}', '{"response": 7, "reward": null}']
    assert lines[5] == '{"reward": null}'
    rewards = [json.loads(line)["reward"] for line in lines]
    expected = text_scorer.score([text_scorer.build_group(*each) for each in (("Why?", ["So."]), (None, ["last"]))])
    assert [rewards[0], rewards[6]] == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert rewards[1:6] == [None] * 5


def test_messages_responses_and_files_in_folders(in_tmp: Path, chat_folder: Path, chat_scorer: RewardScorer) -> None:
    pairs = chat_pairs(5)
    chats = [[*row["prompt"], {"role": "assistant", "content": row["chosen"]}] for row in pairs]
    (in_tmp / "in").mkdir()
    write_pairs(in_tmp / "in/a.parquet", [{"messages": chat} for chat in chats])
    many = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], "x"]} for row in pairs]
    write_lines(in_tmp / "in/b.jsonl", [*many, {"prompt": "a", "responses": []}])
    write_lines(in_tmp / "c.jsonl", pairs)
    options = ScoreOptions((str(chat_folder),), ("in", "c.jsonl"), "out", device="cpu")
    assert [scored.output for scored in score_files(options)] == [
        Path(f"out/{n}") for n in ("a.parquet", "b.jsonl", "c.jsonl")
    ]
    chosen = [first for first, _ in chat_scorer.score_pairs(pairs)]
    rejected = [second for _, second in chat_scorer.score_pairs(pairs)]
    assert pq.read_table("out/a.parquet")["reward"].to_pylist() == pytest.approx(chosen, abs=1e-4)
    listed = [row["rewards"] for row in read_lines(Path("out/b.jsonl"))]
    assert [each[:2] for each in listed[:5]] == [pytest.approx(p, abs=1e-4) for p in zip(chosen, rejected, strict=True)]
    assert listed[5] == []
    assert [row["reward_rejected"] for row in read_lines(Path("out/c.jsonl"))] == pytest.approx(rejected, abs=1e-4)


@pytest.mark.slow
def test_several_models_have_their_names_before_their_columns(
    options: ScoreOptions, text_folder: Path, chat_folder: Path, in_tmp: Path
) -> None:
    first, second = in_tmp / "run1", in_tmp / "run2"
    for folder, source in ((first, text_folder), (second, chat_folder)):
        shutil.copytree(source, folder / "global_step_1")
    models = tuple(str(folder / "global_step_1") for folder in (first, second))
    assert name_models(models) == ["run1/global_step_1", "run2/global_step_1"]
    assert name_models(["a/x", "b/y"]) == ["x", "y"]
    with pytest.raises(Stopped):  # in the second model
        score_files(ScoreOptions(**{**vars(options), "models": models}), on_part=stop_after(6))
    done: list[int] = []
    score_files(ScoreOptions(**{**vars(options), "models": models}), on_part=done.append)
    assert sum(done) == 72
    score_files(ScoreOptions(**{**vars(options), "models": models[1:], "output": "second.parquet"}))
    found = pq.read_table("out.parquet")
    assert found.column_names[-4:] == [
        f"run{n}/global_step_1/reward_{side}" for n in (1, 2) for side in ("chosen", "rejected")
    ]
    alone = pq.read_table("second.parquet")["reward_chosen"].to_pylist()
    assert found["run2/global_step_1/reward_chosen"].to_pylist() == pytest.approx(alone, abs=1e-4)


def test_memory_stays_flat_since_rows_are_read_as_they_are_needed(
    in_tmp: Path, options: ScoreOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.Table.from_pylist(text_pairs(100))
    pq.write_table(pa.concat_tables([table] * 20), "pairs.parquet", row_group_size=300)
    sizes: list[int] = []

    def count(chunk: Any, *rest: Any) -> Any:
        sizes.append(len(chunk))
        return [([0.0, 0.0], None)] * len(chunk)

    monkeypatch.setattr(workers, "score_rows", count)
    monkeypatch.setattr(score_files_module, "_MAX_ROWS", 128)
    with pytest.raises(Stopped):
        score_files(options, on_part=stop_after(5))
    score_files(options)
    assert max(sizes) <= 128 and sum(sizes) == 2000
    assert pq.read_metadata("out.parquet").num_rows == 2000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lost.parquet"], "lost.parquet: no such file or folder"),
        (["notes.txt"], "INPUT=notes.txt: files that end in .txt are not read"),
        (["empty.jsonl"], "empty.jsonl: the file has no rows"),
        (["other.jsonl"], "other.jsonl: no known format in the columns a, b"),
        (["broken.parquet"], "broken.parquet: cannot be read as parquet"),
        (["scored.jsonl"], "scored.jsonl: already has a column 'reward'; rename it"),
        (["good.jsonl", "other.jsonl"], "other.jsonl: no known format"),
        (["good.jsonl", "good.jsonl"], "good.jsonl is listed twice; list it once"),
        (["good.jsonl", "data.chosenkey=a"], "data.chosenkey: unknown key. Did you mean 'data.chosen_key'?"),
        (["good.jsonl", "data.val_files=b.jsonl"], "data.val_files: score reads the files that it gets as arguments"),
        (["good.jsonl", "data.max_length=9"], "data.max_length: score uses every text in full; remove it"),
        (["good.jsonl", "trainer.seed=1"], "trainer.seed: a key of train, which scoring does not depend on; remove it"),
        (["{path: good.jsonl, weight: 2}"], "score takes paths as separate arguments, without weights"),
        (["good.jsonl", "data.custom_cls.name=A"], "data.custom_cls: score reads no custom class"),
        (["good.jsonl", "data.response_key=answer"], "good.jsonl: no column 'answer'"),
        (["good.jsonl", "data.split=test"], "INPUT=good.jsonl: split"),
        (["late.jsonl"], "late.jsonl:40: already has a column 'reward'; rename it"),
        (["good.jsonl", "bad.jsonl", "data.bad_rows=error"], "bad.jsonl:1: null response; fix the row"),
        (["good.jsonl", "--model", "model"], "--model has the same folder twice"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    in_tmp: Path, text_folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp / "model").symlink_to(text_folder)
    for name, content in (("notes.txt", "a"), ("empty.jsonl", "\n"), ("broken.parquet", "PAR1")):
        (in_tmp / name).write_text(content)
    write_lines(in_tmp / "other.jsonl", [{"a": 1, "b": 2}])
    write_lines(in_tmp / "good.jsonl", [{"response": "a"}])
    write_lines(in_tmp / "scored.jsonl", [{"response": "a", "reward": 1.0}])
    write_lines(in_tmp / "late.jsonl", [{"response": "a"}] * 40 + [{"response": "a", "reward": 1.0}])
    write_lines(in_tmp / "bad.jsonl", [{"response": "a"}, {"response": None}])
    assert main(["score", "--model", "model", "--output", "out", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rm-gallery: error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not list((in_tmp / "out").glob("[!.]*.parquet")) + list((in_tmp / "out").glob("[!.g]*"))


def test_a_model_that_cannot_be_used_is_named(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(in_tmp / "good.jsonl", [{"response": "a"}])
    assert main(["score", "--output", "out", "good.jsonl", "--model", "./nowhere"]) == 2
    assert "model=./nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("./nowhere", "model=./nowhere: no such folder"),
        ("adapter", "model=adapter: the folder holds an adapter"),
        ("headless", "model=headless: "),
        ("empty", "model=empty: "),
    ],
)
def test_every_model_is_checked_before_the_first_scores(
    options: ScoreOptions, second: str, message: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / "adapter").mkdir()
    (in_tmp / "adapter/adapter_config.json").write_text("{}")
    (in_tmp / "empty").mkdir()
    make_model("qwen2", in_tmp / "headless")
    monkeypatch.setattr(score_files_module, "_score_table", None)
    with pytest.raises(UserError, match=message):
        score_files(replace(options, models=(*options.models, second)))


def test_the_folder_of_a_run_is_scored_with_its_chosen_checkpoint(options: ScoreOptions, in_tmp: Path) -> None:
    shutil.copytree(options.models[0], in_tmp / "run/global_step_1")
    (in_tmp / "run/global_step_1/manifest.json").touch()
    score_files(replace(options, models=("run",)))
    assert score_files(replace(options, models=("run/global_step_1",)))[0].was_there, "the same checkpoint"
    with pytest.raises(UserError, match="the same folder twice"):
        score_files(replace(options, models=("run", "run/global_step_1"), output="two.parquet"))


def test_a_hub_model_without_a_network_ends_at_once(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(in_tmp / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # refuses connections
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    write_lines(in_tmp / "x.jsonl", [{"response": "a"}])
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it waits {seconds} s to try again"))
    assert main(["score", "--model", "org/none", "x.jsonl", "--output", "out"]) == 2
    sentence = (
        f"model=org/none: no such folder (working directory {in_tmp}), and no model of this name in the cache of the "
        "hub while http://127.0.0.1:9 cannot be reached ([Errno 111] Connection refused); give a model folder"
    )
    assert f"rm-gallery: error: {sentence}\n" in capsys.readouterr().err
    with pytest.raises(UserError) as error:
        RewardScorer.from_folder("org/none")
    assert str(error.value) == sentence


def test_ctrl_c_says_that_it_goes_on(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(score_files_module, "score_files", interrupt)
    assert main(["score", "a.jsonl", "--output", "out", "b.jsonl", "--model", "m"]) == 130
    assert capsys.readouterr().err == "rm-gallery: stopped by Ctrl-C; rerun the command to resume\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rewards_and_keeps_its_columns(
    name: str, in_tmp: Path, text_folder: Path, text_scorer: RewardScorer
) -> None:
    rows = [{**row, "note": f"n{number}"} for number, row in enumerate(PAIRS)]
    write(in_tmp / name, rows, like=name)
    assert main(["score", "--model", str(text_folder), name, "--output", "out", "--device", "cpu"]) == 0
    (output,) = [path for path in (in_tmp / "out").iterdir() if not path.name.startswith(".")]
    is_json = "json" in name
    assert output.name == name.split(".")[0] + (
        ".ndjson" if name == "a.ndjson" else ".jsonl" if is_json else ".parquet"
    )
    found = read_lines(output) if is_json else pq.read_table(output).to_pylist()
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    expected = text_scorer.score_pairs(rows)
    for column, side in (("reward_chosen", 0), ("reward_rejected", 1)):
        assert [row[column] for row in found] == pytest.approx([pair[side] for pair in expected], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_every_layout_of_training_is_scored(name: str, chat_scorer: RewardScorer, in_tmp: Path) -> None:
    write_lines(in_tmp / "a.jsonl", [SAMPLES[name].row])
    table = open_table(resolve_entries("a.jsonl", key="INPUT")[0], ScoreDataConfig())
    [row] = table.rows()
    group = read_group(row, table.reader("chat"), chat_scorer.inputs)
    is_pair = {"chosen", "rejected"} <= SAMPLES[name].row.keys() and name != "lists"
    assert table.reward_columns == (("reward_chosen", "reward_rejected") if is_pair else ("rewards",))
    assert len(chat_scorer.score([group])[0]) == len(group.responses) >= 2


def test_files_of_the_same_name_have_outputs_of_their_own(in_tmp: Path, text_folder: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(PAIRS)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk("saved")
    for name in ("x/0.csv", "y/0.csv", "y/1.csv"):
        (in_tmp / name).parent.mkdir(exist_ok=True)
        write(in_tmp / name, PAIRS)
    command = ["score", "--model", str(text_folder), "--device", "cpu", "--output", "out"]
    assert main([*command, "saved", "?/*.csv"]) == 0
    found = sorted(str(path.relative_to("out")) for path in Path("out").glob("**/[!.]*.parquet"))
    assert found == ["1.parquet", *(f"{each}/data-00000-of-00001.parquet" for each in ("test", "train")),
                     "x/0.parquet", "y/0.parquet"]  # fmt: skip


def test_columns_have_the_names_that_settings_give(in_tmp: Path, text_folder: Path) -> None:
    rows = [{"better": row["chosen"], "worse": row["rejected"]} for row in PAIRS]
    write(in_tmp / "pairs.csv", PAIRS)
    write(in_tmp / "other.csv", rows)
    command = ["score", "--model", str(text_folder), "--device", "cpu", "--output"]
    assert main([*command, "a.parquet", "pairs.csv"]) == 0
    settings = ["data.chosen_key=better", "data.rejected_key=worse"]
    assert main([*command, "b.parquet", settings[0], "other.csv", settings[1]]) == 0
    first, second = (
        pq.read_table(path).select(["reward_chosen", "reward_rejected"]) for path in ("a.parquet", "b.parquet")
    )
    assert first == second
    assert main([*command, "b.parquet", "other.csv", "data.chosen_key=worse", "data.rejected_key=better"]) == 2


def test_tools_reach_the_chat_template(in_tmp: Path, chat_scorer: RewardScorer) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    write_lines(in_tmp / "a.jsonl", [{"prompt": "1 + 1?", "response": "2", "tools": json.dumps(tools)}])
    table = open_table(resolve_entries("a.jsonl", key="INPUT")[0], ScoreDataConfig())
    group = read_group(next(table.rows()), table.reader("chat"), chat_scorer.inputs)
    assert group.metadata == {"tools": tools}


def test_the_suffix_of_the_output_decides_its_kind(in_tmp: Path, text_folder: Path) -> None:
    write_lines(in_tmp / "a.jsonl", [{"response": "a", "n": 1}, "no JSON", {"response": "b", "n": 2.5, "m": [1]}])
    write(in_tmp / "a.parquet", PAIRS)
    write_lines(in_tmp / "mixed.jsonl", [{"response": "a", "n": 1}, {"response": "b", "n": "two"}])
    command = ["score", "--model", str(text_folder), "--device", "cpu", "--output"]
    assert main([*command, "b.parquet", "a.jsonl"]) == 0
    rows = pq.read_table("b.parquet").to_pylist()
    assert [(row["response"], row["n"], row["m"], row["reward"] is None) for row in rows] == [
        ("a", 1.0, None, False), (None, None, None, True), ("b", 2.5, [1], False),
    ]  # fmt: skip
    assert main([*command, "b.jsonl", "a.parquet"]) == 0
    assert [row["chosen"] for row in read_lines(Path("b.jsonl"))] == [row["chosen"] for row in PAIRS]
    assert main([*command, "c.parquet", "mixed.jsonl"]) == 2
    assert main([*command, "c.jsonl", "mixed.jsonl"]) == 0


def test_a_run_without_any_reward_ends_with_status_2(
    in_tmp: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(in_tmp / "a.jsonl", [{"response": None}, {"response": ""}])
    assert main(["score", "--model", str(text_folder), "a.jsonl", "--output", "out", "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert "2 without a reward: 1 null response (first: a.jsonl:0), 1 text without a token" in printed.out
    assert "no row has a reward" in printed.err
