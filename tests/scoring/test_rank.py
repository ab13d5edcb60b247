"""`rm-gallery rank`: best responses, rankings and pairs, by rewards that a small server reads from the texts."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rm_gallery import rank
from rm_gallery.cli import main
from rm_gallery.errors import UserError
from rm_gallery.scoring import RewardScorer
from rm_gallery.scoring import score_files as score_files_module
from rm_gallery.scoring.ranking import Ranking
from rm_gallery.scoring.score_files import ScoreOptions, score_files
from tests.scoring.reward_server import RewardServer
from tests.scoring.test_score_files import Stopped, read_lines, stop_after, write_lines


def reward(conversation: Any) -> float:
    """The number at the end of a response; not finite without one."""
    word = conversation[-1]["content"].split()[-1]
    return float(word) if word.lstrip("-").replace(".", "").isdigit() else float("nan")


@pytest.fixture
def url(in_tmp: Path) -> Iterator[str]:
    with RewardServer("vllm", reward) as server:
        yield server.url


def lists(*rows: list[str]) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "responses": row, "id": n} for n, row in enumerate(rows)]


def ranked(url: str, rows: list[Any], output: str = "out.jsonl", **options: Any) -> list[dict[str, Any]]:
    rank(write_lines(Path("in.jsonl"), rows), url, output, **options)
    return read_lines(Path(output)) if output.endswith("l") else pq.read_table(output).to_pylist()


ROWS = lists(["a 1", "b 3", "c 3", "b 3"], ["d 2"], ["e 0", "none", "f 5"], ["g -1", "h -1"])


def test_the_best_response_of_each_prompt_and_what_has_none(url: str) -> None:
    found = ranked(url, ROWS, columns=["id"])
    assert found == [
        {"prompt": "question 0", "response": "b 3", "reward": 3.0, "rank": 1, "index": 1, "num_responses": 3, "id": 0},
        {"prompt": "question 1", "response": "d 2", "reward": 2.0, "rank": 1, "index": 0, "num_responses": 1, "id": 1},
        {"prompt": "question 3", "response": "g -1", "reward": -1, "rank": 1, "index": 0, "num_responses": 2, "id": 3},
    ]
    (again,) = rank("in.jsonl", url, "out.jsonl", columns=["id"])
    assert again.was_there
    assert str(again).splitlines() == [
        "out.jsonl: 3 rows from 6 responses to 3 prompts, already scored",
        f"  {url.partition('//')[2]}: 1 without a reward: 1 reward that is not finite (first: in.jsonl:2)",
    ]


def test_rankings_and_pairs(url: str) -> None:
    found = ranked(url, ROWS, layout="ranked")
    assert [(row["responses"], row["rewards"], row["ranks"], row["indices"]) for row in found] == [
        (["b 3", "c 3", "a 1"], [3, 3, 1], [1, 1, 3], [1, 2, 0]),
        (["d 2"], [2], [1], [0]),
        (["g -1", "h -1"], [-1, -1], [1, 1], [0, 1]),
    ]
    found = ranked(url, ROWS, "pairs.jsonl", layout="pairs", pairs="all")
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in found] == [("b 3", "a 1", 2), ("c 3", "a 1", 2)]
    (counts,) = rank("in.jsonl", url, "pairs.jsonl", layout="pairs", pairs="all")
    assert counts.ranked is not None
    assert counts.ranked.empty.counts == {"one response": 1, "equal rewards": 1}


@pytest.mark.slow
def test_the_rewards_of_a_scored_file_are_used_without_a_model(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    singles = [{"prompt": row["prompt"], "response": text} for row in ROWS[:2] for text in row["responses"]]
    pairs = [{"prompt": "p", "chosen": "a 2", "rejected": "b 1"}, {"prompt": "q", "chosen": "a 1", "rejected": "b 5"}]
    shapes = {"rewards": ROWS[:2] + ROWS[3:], "reward": singles, "pairs": pairs}
    for name, rows in shapes.items():
        source = write_lines(Path(f"{name}.jsonl"), rows)
        for scored in (f"{name}-scored.jsonl", f"{name}-scored.parquet"):
            score_files(ScoreOptions((url,), (str(source),), scored))
            for layout in ("best", "ranked", "pairs"):
                rank(source, url, f"{scored}-{layout}-model.jsonl", layout=layout)
                output, column = f"{scored}-{layout}.jsonl", name.replace("pairs", "reward")
                arguments = ["rank", "--rewards", column, scored, "--output", output, "--layout", layout]
                assert main(arguments) == 0
                assert read_lines(Path(output)) == read_lines(Path(f"{scored}-{layout}-model.jsonl"))
    assert "100" not in capsys.readouterr().out  # rewards are not labels to agree with


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"rewards": [1, None]}, "in.jsonl:1: --rewards rewards: no reward; remove the row, or rank with --model"),
        ({}, "in.jsonl:1: --rewards rewards: no reward"),
        ({"rewards": None}, "in.jsonl:1: --rewards rewards: no reward"),
        ({"rewards": [1, True]}, "True is not a finite number"),
        ({"rewards": [1, float("nan")]}, "nan is not a finite number"),
        ({"rewards": [1, 2, 3]}, "3 rewards for 2 responses; fix the row"),
    ],
)
def test_rows_without_rewards_are_refused(row: dict[str, Any], error: str, in_tmp: Path) -> None:
    rows = [
        {"prompt": "p", "responses": ["a", "b"], "rewards": [1, 2]},
        {"prompt": "q", "responses": ["a", "b"], **row},
    ]
    write_lines(Path("in.jsonl"), rows)
    with pytest.raises(UserError, match=re.escape(error)):
        rank("in.jsonl", None, "out.jsonl", rewards="rewards")
    with pytest.raises(UserError, match=r"--rewards x: no column 'x' \(columns: prompt, responses, rewards\)"):
        rank("in.jsonl", None, "out.jsonl", rewards="x")
    with pytest.raises(UserError, match="rank needs --model, or --rewards"):
        rank("in.jsonl", None, "out.jsonl")
    with pytest.raises(UserError, match="--tokenizer is for --model"):
        rank("in.jsonl", None, "out.jsonl", rewards="rewards", tokenizer="x")
    assert not Path("out.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_a_prompt_in_any_order_give_what_lists_give(url: str, seed: int) -> None:
    draw = random.Random(seed)
    rows = lists(*([f"r{k} {draw.randint(2, 8)}" for k in range(draw.randint(1, 5))] for _ in range(12)))
    single = [{"prompt": row["prompt"], "response": each} for row in rows for each in row["responses"]]
    draw.shuffle(single)
    order = {row["prompt"]: [each["response"] for each in single if each["prompt"] == row["prompt"]] for row in rows}
    cases: list[dict[str, Any]] = [
        {"top": 2}, {"layout": "ranked", "min_quantile": 0.5}, {"layout": "pairs", "pairs": "all", "min_margin": 2.0},
    ]  # fmt: skip
    for number, options in enumerate(cases):
        as_lists = ranked(
            url, [{"prompt": key, "responses": each} for key, each in order.items()], f"a{number}.jsonl", **options
        )
        as_rows = ranked(url, single, f"b{number}.jsonl", **options)
        key = json.dumps
        assert sorted(as_rows, key=key) == sorted(as_lists, key=key)
        as_parquet = ranked(url, single, f"c{number}.parquet", **options)
        assert as_parquet == as_rows


@pytest.mark.slow
def test_thresholds(url: str) -> None:
    rows = lists(*([f"x {2 * n}", f"y {2 * n + 1}"] for n in range(10)))  # rewards 0 to 19
    assert [row["reward"] for row in ranked(url, rows, "a.jsonl", top=2, min_quantile=0.9)] == [19, 18]
    assert [row["reward"] for row in ranked(url, rows, "b.jsonl", min_reward=16.5)] == [17, 19]
    found = ranked(url, rows, "c.jsonl", layout="pairs", min_quantile=0.9)  # the chosen one is above it
    assert [(row["chosen"], row["rejected"]) for row in found] == [("y 19", "x 18")]
    with pytest.raises(UserError, match=r"d.jsonl: no rows: 10 margin below the lowest.*; lower the threshold"):
        ranked(url, rows, "d.jsonl", layout="pairs", min_margin=1.5)


@pytest.mark.slow
def test_messages_tools_and_conversations_keep_their_form(url: str) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("It is 2", "It is 3")]
    rows = [{"prompt": chat, "responses": answers}]
    (found,) = ranked(url, rows, "a.jsonl", layout="pairs")
    assert (found["prompt"], found["chosen"], found["rejected"]) == (chat, answers[1], answers[0])
    (found,) = ranked(url, rows, "a.parquet", layout="pairs")
    assert (found["prompt"], found["chosen"], found["rejected"]) == (chat, answers[1], answers[0])
    conversations = [{"messages": [*chat, *answer]} for answer in answers]
    (best,) = ranked(url, conversations, "b.jsonl")
    assert (best["prompt"], best["response"]) == (chat, answers[1])
    one_turn = [{"prompt": [chat[1]], "responses": answers}]  # messages of one turn stay messages
    (best,) = ranked(url, one_turn, "c.jsonl")
    assert (best["prompt"], best["response"]) == ([chat[1]], answers[1])
    called = [{"role": "assistant", "content": "2", "tool_calls": []}, {"role": "assistant", "content": "It is 1"}]
    with pytest.raises(UserError, match=r"in.jsonl:0: has messages with more than role and content"):
        ranked(url, [{"prompt": chat, "responses": [called, answers[0]]}], "d.parquet")


@pytest.mark.slow
def test_pairs_of_a_file_are_ranked_too(url: str) -> None:
    found = ranked(url, [{"prompt": "p", "chosen": "a 1", "rejected": "b 2"}], layout="pairs")
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in found] == [("b 2", "a 1", 1)]


@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_same_bytes(
    in_tmp: Path, chat_folder: Path, chat_scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_files_module, "_MAX_ROWS", 16)
    draw = random.Random(0)
    rows = [{"prompt": f"q {n // 4}", "response": f"answer {draw.random():.4f}"} for n in range(100)]
    write_lines(in_tmp / "in.jsonl", rows)
    options = ScoreOptions((str(chat_folder),), ("in.jsonl",), "out.jsonl", device="cpu", ranking=Ranking(top=2))
    rank("in.jsonl", chat_folder, "whole.jsonl", top=2, device="cpu")
    with pytest.raises(Stopped):
        score_files(options, on_part=stop_after(3))
    assert not Path("out.jsonl").exists()
    computed: list[int] = []
    score_files(options, on_part=computed.append)
    assert sum(computed) == 100 - 3 * 16
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    for start, first in zip(range(0, 100, 4), read_lines(Path("out.jsonl"))[::2], strict=True):
        group = chat_scorer.build_group(rows[start]["prompt"], [row["response"] for row in rows[start : start + 4]])
        (rewards,) = chat_scorer.score([group])
        assert first["response"] == group.responses[rewards.index(max(rewards))][0]["content"]  # type: ignore[index]
        assert first["reward"] == pytest.approx(max(rewards), abs=1e-4)


@pytest.mark.slow
def test_train_reads_pairs_and_rankings(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = lists(*([f"bad {n}.0", f"good {n}.5", f"fine {n}.25"] for n in range(8)))
    write_lines(Path("in.jsonl"), rows)
    for layout in ("pairs", "ranked"):
        arguments = ["--model", url, "in.jsonl", "--output", f"{layout}.parquet", "--layout", layout]
        assert main(["rank", *arguments]) == 0
        assert main(["show-data", f"data.train_files={layout}.parquet"]) == 0
        shown = capsys.readouterr().out
        assert "8 " in shown
        assert "not read" not in shown


@pytest.mark.slow
def test_trl_reads_pairs_as_texts_or_as_conversations(url: str) -> None:
    trl = pytest.importorskip("trl.data_utils", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    chat = [{"role": "user", "content": "1 + 1?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("It is 2", "It is 3")]
    for name, rows, is_chat in (
        ("texts", lists(["a 1", "b 2"]), False),
        ("chats", [{"prompt": chat, "responses": answers}], True),
    ):
        for suffix in ("jsonl", "parquet"):
            ranked(url, rows, f"{name}.{suffix}", layout="pairs")
            kind = "json" if suffix == "jsonl" else suffix
            [row] = datasets.load_dataset(kind, data_files=f"{name}.{suffix}", split="train")
            assert trl.is_conversational(row) is is_chat
            assert trl.maybe_extract_prompt(row)["chosen"] == row["chosen"]


@pytest.mark.slow
def test_the_page_runs_as_written(in_tmp: Path, chat_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_tmp / "runs").mkdir()
    (in_tmp / "runs/rm").symlink_to(chat_folder)
    write_lines(in_tmp / "samples.jsonl", lists(*([f"{n} a", f"{n} b b", f"{n} c c c"] for n in range(6))))
    assert main(["score", "--model", "runs/rm", "samples.jsonl", "--output", "scored.jsonl"]) == 0
    page = (Path(__file__).parents[2] / "docs/ranking.md").read_text()
    [commands] = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for command in commands.splitlines():
        program, *arguments = shlex.split(command, comments=True)
        assert (program, main(arguments)) == ("rm-gallery", 0)
    assert [len(read_lines(Path(f"{name}.jsonl"))) for name in ("best", "rankings")] == [6, 6]
    [snippet] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(snippet, "ranking.md", "exec"), {})
    assert "pairs.jsonl: " in capsys.readouterr().out


@pytest.mark.slow
def test_ensembles_and_arguments(in_tmp: Path, chat_folder: Path, text_folder: Path) -> None:
    write_lines(Path("in.jsonl"), lists(["a", "b", "c"]))
    copy = in_tmp / "copy"
    copy.symlink_to(chat_folder)
    rank("in.jsonl", f"{chat_folder}+{copy}", "both.jsonl", device="cpu", layout="ranked")
    rank("in.jsonl", chat_folder, "one.jsonl", device="cpu", layout="ranked")
    assert read_lines(Path("both.jsonl"))[0]["responses"] == read_lines(Path("one.jsonl"))[0]["responses"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model": [chat_folder, copy]}, "combine several models with --ensemble"),
        ({"layout": "worst"}, "--layout worst: must be one of best, ranked, pairs"),
        ({"layout": "pairs", "top": 2}, "--top is for --layout best and ranked"),
        ({"min_margin": 1.0}, "are for --layout pairs, not best"),
        ({"top": 0}, "--top 0: must be at least 1"),
        ({"min_quantile": 90.0}, "must be between 0 and 1"),
        ({"columns": ["reward"]}, "--columns reward: the output has a column of this name"),
        ({"columns": ["absent"]}, "--columns absent: no such column"),
        ({"tokenizer": str(chat_folder)}, "it is for models behind servers"),
    ]
    for options, text in wrong:
        with pytest.raises(UserError, match=text):
            rank("in.jsonl", **{"model": chat_folder, "output": "x.jsonl", "device": "cpu", **options})
    write_lines(Path("bare.jsonl"), [{"response": "a"}, {"response": "b"}])
    with pytest.raises(UserError, match=r"bare.jsonl:0: a response without a prompt"):
        rank("bare.jsonl", chat_folder, "x.jsonl", device="cpu")
