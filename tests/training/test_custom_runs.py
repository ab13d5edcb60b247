"""Training with `data.custom_cls`: what is counted, what stops a run in one sentence, what the checkpoint says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rm_gallery.cli import main
from rm_gallery.modeling.export import InputRecord, read_record
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer
from rm_gallery.training.config import load_config
from tests.small import text_pairs, write_pairs

BASE = "from tutorials.cookbooks.training_reward_model.base import BaseTrainDataset\n\nclass Mine(BaseTrainDataset):\n"
NUMBERED = "    def _build_messages(self, example):\n        return [{'role': 'user', 'content': str(example['n'])}]\n"
OWN = (
    "    def _apply_chat_template(self, messages):\n"
    "        return ''.join(m['role'] + ': ' + m['content'] + chr(10) for m in messages) + 'bot: '\n"
)


@pytest.fixture(autouse=True)
def train_file(in_tmp: Path) -> Path:
    return write_pairs(in_tmp / "train.parquet", [{"n": n, **pair} for n, pair in enumerate(text_pairs(8))])


def run(command: str, body: str, model: Path, *overrides: str) -> int:
    Path("mine.py").write_text(BASE + body)
    return main([command, *settings(model), *overrides])


def settings(model: Path) -> list[str]:
    return [
        "data.custom_cls.path=mine.py", "data.custom_cls.name=Mine", f"model.partial_pretrain={model}",
        "model.fsdp_config.model_dtype=fp32", "data.train_files=train.parquet", "data.max_length=200",
        "data.train_batch_size=4", "trainer.total_training_steps=1", "trainer.default_local_dir=out",
        "trainer.experiment_name=bt",
        "trainer.logger=[]", "trainer.device=cpu",
    ]  # fmt: skip


def errors(printed: str) -> list[str]:
    return [line.removeprefix("rm-gallery: error: ") for line in printed.splitlines() if line.startswith("rm-gallery")]


def test_rows_without_a_group_are_counted_by_reason(qwen2_folder: Path) -> None:
    body = (
        NUMBERED + "    def build_group(self, row):\n"
        "        if row['n'] in (2, 5):\n            return None, 'no votes'\n"
        "        row['chosen'] = '' if row['n'] == 7 else row['chosen']\n"
        "        return None if row['n'] == 3 else super().build_group(row)\n"
    )
    assert run("train", body, qwen2_folder) == 0
    data = json.loads(Path("out/bt/run.json").read_text())["data"]["train"]
    assert data["groups"] == 4
    assert data["dropped"] == {
        "no votes": {"rows": 2, "first": "train.parquet:2"},
        "dropped by build_group": {"rows": 1, "first": "train.parquet:3"},
        "empty chosen": {"rows": 1, "first": "train.parquet:7"},
    }


def test_a_row_without_group_stops_under_bad_rows_error(qwen2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "    def build_group(self, row):\n        return None, 'no votes'\n"
    assert run("train", body, qwen2_folder, "data.bad_rows=error") == 2
    assert errors(capsys.readouterr().err) == [
        "train.parquet:0: no votes; fix the row, or set data.bad_rows=drop to drop it"
    ]


@pytest.mark.parametrize("command", ["train", "validate-config"])
@pytest.mark.parametrize("hook", ["_build_messages", "_apply_chat_template"])
def test_a_hook_that_raises_stops_with_one_sentence(
    command: str, hook: str, qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = f"    def {hook}(self, value):\n        return 1 / 0\n"
    assert run(command, body, qwen2_folder) == 2
    assert errors(capsys.readouterr().err) == [
        f"train.parquet:0: Mine.{hook} raised ZeroDivisionError: division by zero (mine.py:5); fix the hook"
    ]
    assert not Path("out").exists()


def test_debug_shows_where_the_hook_failed(qwen2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "    def _build_messages(self, example):\n        return example['question']\n"
    assert run("train", body, qwen2_folder, "--debug") == 2
    printed = capsys.readouterr().err
    assert "return example['question']" in printed
    assert len(errors(printed)) == 1


def test_a_file_that_is_missing_or_broken_is_one_sentence(
    qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate-config", *settings(qwen2_folder)]) == 2
    assert errors(capsys.readouterr().err) == [
        f"data.custom_cls.path=mine.py: no such file (working directory {Path.cwd()})"
    ]
    assert run("validate-config", "    1 / 0\n", qwen2_folder) == 2
    [sentence] = errors(capsys.readouterr().err)
    assert sentence.startswith("data.custom_cls.path=mine.py: cannot be imported, ZeroDivisionError: ")
    assert run("validate-config", NUMBERED, qwen2_folder, "data.input_style=text", "data.format=prompt") == 2
    assert errors(capsys.readouterr().err) == [
        "data.input_style=text: data.custom_cls returns messages; remove one of the two",
        "data.format=prompt: data.custom_cls reads the rows; remove one of the two",
    ]
    assert run("validate-config", NUMBERED, qwen2_folder) == 0


def test_a_format_of_its_own_is_said_in_training_and_in_scoring(
    qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("validate-config", NUMBERED + OWN, qwen2_folder) == 0
    assert "data.custom_cls: _apply_chat_template differs from the chat template " in capsys.readouterr().err
    assert run("train", NUMBERED + OWN, qwen2_folder) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("W ")]
    [warning] = [line for line in warnings if "no validation data" not in line]
    assert "data.train_files: data.custom_cls: _apply_chat_template differs from the chat template " in warning
    checkpoint = Path("out/bt/global_step_1")
    assert read_record(checkpoint) == InputRecord("chat", max_length=200, own_rendering=True)
    with RewardScorer.from_folder(checkpoint, device="cpu") as scorer:
        assert "rendered in its own way" in capsys.readouterr().err
        [row] = text_pairs(1)
        text = f"user: 0\nbot: {row['chosen']}<|im_end|>\n"
        [part] = scorer.engine.encode([PreferenceGroup("", [text])])[0]  # type: ignore[union-attr]
    from rm_gallery.data.config import Side
    from rm_gallery.data.tokenization.tokenizer import load_tokenizer
    from rm_gallery.training.data_setup import load_side

    config = load_config(None, settings(qwen2_folder))
    group = load_side(Side("data.train_files"), config.data, load_tokenizer(str(qwen2_folder))).data[0]
    assert part.tails[0].tolist() == [*group.prefix.tolist(), *group.tails[0].tolist()]
