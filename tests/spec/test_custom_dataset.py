"""The specification's section "Custom Dataset", run as written from a folder of the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rm_gallery.cli import main
from rm_gallery.data.config import Side
from rm_gallery.data.custom import CustomReader
from rm_gallery.data.sources import SourceConfig, read_rows, resolve_files
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.modeling.export import InputRecord, read_record
from rm_gallery.schema import Message
from rm_gallery.scoring import RewardScorer
from rm_gallery.training.config import TrainConfig, load_config
from rm_gallery.training.data_setup import load_side
from tests.small import make_model, text_pairs, write_pairs
from tests.spec.text import code_blocks
from tests.templates import TEMPLATES, make_templated

KEY = "data.train_files"


@pytest.fixture
def folder(spec: str, in_tmp: Path) -> Path:
    """Where the user stands: the specification's class and YAML, and rows with a query, a label and a source."""
    [code] = code_blocks(spec, "Creating a Custom Dataset Class", "python")
    [settings] = code_blocks(spec, "Using Custom Dataset", "yaml")
    (in_tmp / "custom_bt_dataset.py").write_text(code)
    (in_tmp / "trainer.yaml").write_text(settings)
    rows = [
        {"query": f" Question {n}?", **pair, "label": f"label {n}", "source": "made" if n % 2 else "other"}
        for n, pair in enumerate(text_pairs(12))
    ]
    write_pairs(in_tmp / "train.parquet", rows[:8])
    write_pairs(
        in_tmp / "val.parquet", [{key: row[key] for key in ("query", "chosen", "rejected")} for row in rows[8:]]
    )
    return in_tmp


def arguments(model: Path) -> list[str]:
    return [
        "--config", "trainer.yaml", f"model.partial_pretrain={model}", "model.fsdp_config.model_dtype=fp32",
        "data.train_files=train.parquet", "data.val_files=val.parquet", "data.max_length=200",
        "data.train_batch_size=4", "trainer.total_training_steps=2", "trainer.default_local_dir=out",
        "trainer.experiment_name=bt",
    ]  # fmt: skip


def conversations(file: str) -> list[list[Message]]:
    """Both conversations of each row, as a person would write them down."""
    return [
        [{"role": "user", "content": row.values["query"]}, {"role": "assistant", "content": row.values[key]}]
        for row in read_rows(resolve_files(SourceConfig(file), key=KEY), key=KEY)
        for key in ("chosen", "rejected")
    ]


def trained_tokens(config: TrainConfig) -> list[list[int]]:
    """Every text of the training file as the trainer reads it."""
    tokenizer = load_tokenizer(config.model.partial_pretrain)
    data = load_side(Side("data.train_files"), config.data, tokenizer).data
    return [
        [*group.prefix.tolist(), *tail.tolist()]
        for group in map(data.__getitem__, range(len(data)))
        for tail in group.tails
    ]


def scored_tokens(scorer: RewardScorer, messages: list[list[Message]]) -> list[list[int]]:
    encoded = scorer.engine.encode([scorer.inputs.conversation(each) for each in messages])
    return [[*part.prefix.tolist(), *part.tails[0].tolist()] for parts in encoded for part in parts]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "template", [TEMPLATES[0], *(pytest.param(each, marks=pytest.mark.slow) for each in TEMPLATES[1:])]
)
def test_training_sees_the_tokens_that_scoring_the_messages_gives(
    template: str, folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("qwen2", tmp_path_factory.mktemp("model"))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    make_templated(template).save_pretrained(model)
    assert main(["train", *arguments(model)]) == 0
    printed = capsys.readouterr().err
    assert "8 comparisons as chat" in printed and "custom_cls" not in printed, "no warning"
    checkpoint = folder / "out/bt/global_step_2"
    expected = InputRecord("chat", max_length=200)
    if template.startswith("none"):
        expected = InputRecord("text", append_eos=True, max_length=200, separator="\n\n")
    record = read_record(checkpoint)
    assert record is not None
    assert replace(record, reward_mean=None, reward_std=None) == expected
    config = load_config("trainer.yaml", arguments(model)[2:])
    messages = conversations("train.parquet")
    with RewardScorer.from_folder(checkpoint, device="cpu") as scorer:
        assert scored_tokens(scorer, messages) == trained_tokens(config)
        assert len(set(scorer.score_messages(messages))) > 1


def test_sources_and_ground_truth_are_those_of_the_hooks(folder: Path, qwen2_folder: Path) -> None:
    config = load_config("trainer.yaml", arguments(qwen2_folder)[2:])
    reader = CustomReader.from_config(config.data, load_tokenizer(str(qwen2_folder)))
    groups = [reader.read(row) for row in read_rows(resolve_files(SourceConfig("train.parquet"), key=KEY), key=KEY)]
    assert [group.source for group in groups] == ["other", "made"] * 4
    assert [group.metadata for group in groups] == [{"ground_truth": f"label {number}"} for number in range(8)]
    for row in read_rows(resolve_files(SourceConfig("val.parquet"), key=KEY), key=KEY):
        group = reader.read(row)
        assert (group.source, group.metadata) == ("custom", {"ground_truth": ""}), "the specification's defaults"


def test_the_class_works_alone(folder: Path, qwen2_folder: Path) -> None:
    from rm_gallery.data.custom import load_custom_class
    from rm_gallery.data.formats import CustomClassConfig

    dataset_class = load_custom_class(CustomClassConfig("custom_bt_dataset.py", "CustomBTDataset"))
    tokenizer = load_tokenizer(str(qwen2_folder))
    dataset = dataset_class("train.parquet", tokenizer)
    assert len(dataset) == 8
    assert dataset[3].source == "made"
    assert dataset.texts(3) == [
        tokenizer.apply_chat_template(each, tokenize=False) for each in conversations("train.parquet")[6:8]
    ]
