"""docs/custom-datasets.md: every example on the page runs as it is written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rm_gallery.cli import main
from tests.small import make_model, text_pairs, write_pairs

PAGE = Path(__file__).parents[2] / "docs/custom-datasets.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the page, a small model, and data of the two kinds that it speaks of."""
    folder = tmp_path_factory.mktemp("page")
    make_model("qwen2", folder / "model")
    for text in [*blocks("python"), *blocks("yaml")]:
        if name := re.match(r"# (\w+\.(?:py|yaml))\n", text):
            (folder / name[1]).write_text(text)
    pairs = [{"query": f"Question {n}?", **pair, "label": n, "origin": "made"} for n, pair in enumerate(text_pairs(6))]
    write_pairs(folder / "train.parquet", pairs)
    votes = [[1, 2, 3], [3, 3], [2, 0]]
    rows = [{"question": "Why?", "answers": [f"a{n}" for n in range(len(each))], "votes": each} for each in votes]
    write_pairs(folder / "votes.parquet", rows)
    return folder


@pytest.mark.slow
def test_the_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    commands = [line for text in blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    assert len(commands) == 3
    for command in commands:
        program, *arguments = shlex.split(command)
        assert (program, main(arguments)) == ("rm-gallery", 0)
    assert (
        "dropped 1 of 3 rows: 1 all answers have the same number of votes (first: votes.parquet:1)"
        in capsys.readouterr().err
    )
    assert (folder / "checkpoints/bt/votes/global_step_2").is_dir()


def test_the_notebook_example_shows_what_the_model_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    [code] = [text for text in blocks("python") if not text.startswith("# ")]
    exec(compile(code, str(PAGE), "exec"), {})
    [rows, source, chosen, rejected] = capsys.readouterr().out.splitlines()
    assert (rows, source) == ("6 rows", "made 3")
    for text in (chosen, rejected):
        assert text.startswith(
            "'<|im_start|>system\\nAnswer in one sentence.<|im_end|>\\n<|im_start|>user\\nQuestion 3?"
        )
        assert text.endswith("end<|im_end|>\\n'")


def test_the_error_on_the_page_is_the_one_that_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    wrong = (folder / "my_dataset.py").read_text().replace('example["query"]', 'example["question"]')
    (folder / "wrong").mkdir()
    (folder / "wrong/my_dataset.py").write_text(wrong)
    arguments = ["--config", "my_trainer.yaml", "model.partial_pretrain=./model", "trainer.experiment_name=wrong"]
    assert main(["train", *arguments, "data.custom_cls.path=wrong/my_dataset.py"]) == 2
    [sentence] = blocks("text")
    assert capsys.readouterr().err.splitlines()[-1] == sentence.rstrip("\n")
