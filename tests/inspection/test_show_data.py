"""The command: mistakes are one sentence, and only its own reports are overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rm_gallery.cli import main
from tests.inspection.data import Show, files, pair, plain_rows


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data.train_files=nowhere.parquet"], "data.train_files=nowhere.parquet: no such file"),
        (["--html", "nowhere/r.html"], "is in a folder that does not exist"),
        (["--html", "."], "is a folder"),
        (["--html", "train.parquet"], "is not a report of this command"),
        (["--samples", "-1"], "--samples=-1: must be at least 0"),
        (["data.val_fraction=2"], "data.val_fraction=2.0: must be at least 0"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str, show: Show) -> None:
    assert sentence in show.error(*files(plain_rows(3, seed=0)), *arguments)


@pytest.mark.slow
def test_a_report_replaces_a_report_and_nothing_else(show: Show) -> None:
    arguments = [*files(plain_rows(3, seed=0)), "--html", "report.html"]
    Path("report.html").write_text("<html>my own page</html>")
    show.error(*arguments)
    assert Path("report.html").read_text() == "<html>my own page</html>"
    Path("report.html").unlink()
    show.text(*arguments)
    first = Path("report.html").read_text()
    show.text(*arguments, "--samples", "0")
    assert len(Path("report.html").read_text()) < len(first)
    assert sorted(path.name for path in Path().iterdir()) == ["report.html", "train.parquet"]


@pytest.mark.slow
def test_lengths_are_those_of_training(show: Show, qwen2_folder: Path) -> None:
    from rm_gallery.data.config import Side
    from rm_gallery.data.tokenization.tokenizer import load_tokenizer
    from rm_gallery.training.config import load_config
    from rm_gallery.training.data_setup import load_side

    rows = [pair("q" * number, "a" * 40, "b" * 30) for number in range(1, 61)]
    words = [f"model.partial_pretrain={qwen2_folder}", *files(rows), "data.max_length=130"]
    report = show(*words)
    config = load_config(None, words)
    data = load_side(Side("data.train_files"), config.data, load_tokenizer(str(qwen2_folder))).data
    assert report.values["unit"] == "tokens"
    assert report.train["num_groups"] == len(data)
    cost = report.train["cost"]
    assert cost["packed"] == data.num_tokens
    assert cost["separate"] == int(data.num_tokens + data.prefix_lengths.sum())
    assert cost["padded_max"] == 2 * 130 * len(data)
    assert report.train["lengths"]["num_beyond"] == 60 - len(data) > 0


@pytest.mark.slow
def test_micro_batches_are_those_of_the_plan_of_training(show: Show, qwen2_folder: Path) -> None:
    """Pairs of few prompts, so that steps share prompts; a source with weight 2; the last step is not full."""
    from rm_gallery.data.batching.bin_packing import Packer, attention_length
    from rm_gallery.data.batching.plan import Plan
    from rm_gallery.data.batching.prompt_sharing import sizes_of
    from rm_gallery.data.config import Side, mixture_of
    from rm_gallery.data.tokenization.tokenizer import load_tokenizer
    from rm_gallery.training.config import load_config
    from rm_gallery.training.data_setup import load_side

    rows = [pair("q" * (number % 3 + 20), f"a{number}", f"b{number}") for number in range(60)]
    files(rows, plain_rows(12, seed=0))
    words = [
        f"model.partial_pretrain={qwen2_folder}", "data.train_files=[{path: train.parquet, weight: 2}, val.parquet]",
        "data.max_length=256", "data.max_tokens_per_micro_batch=700", "data.train_batch_size=16", "trainer.seed=3",
    ]  # fmt: skip
    cost = show(*words).train["cost"]
    config = load_config(None, words)
    side = load_side(Side("data.train_files"), config.data, load_tokenizer(str(qwen2_folder)))
    mixture = mixture_of(side.data, side.files, config.data)
    packer = Packer(700, attention_length=attention_length(32))
    plan = Plan(side.data.sizes, config.data, packer, seed=3, mixture=mixture, prompts=side.data.prompt_hashes)
    steps = [plan.step(side.data, groups) for groups in plan.epoch_steps(0)]
    assert len(steps) == 9, "132 pairs an epoch"
    packs = [len(step.packs[0]) for step in steps]
    tokens = sum(int(packer.pack_tokens(step.packs[0], sizes_of(step.units)).sum()) for step in steps)
    assert cost["micro_batches"] == sum(packs) / len(steps)
    assert cost["fill"] == pytest.approx(tokens / (700 * sum(packs)))
    assert cost["shared"] < cost["packed"], "several pairs of a prompt are computed together"


@pytest.mark.slow
def test_neither_torch_nor_transformers_is_loaded_without_a_model(show: Show) -> None:
    """In a process of its own, since this one has loaded both."""
    program = (
        "import sys; from rm_gallery.cli import main; assert main(['show-data', *sys.argv[1:]]) == 0; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, *files(plain_rows(3, seed=0)), "--html", "report.html"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_an_unknown_option_is_refused(show: Show) -> None:
    with pytest.raises(SystemExit):
        main(["show-data", "--pdf", "x"])
