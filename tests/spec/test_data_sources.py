"""The specification's "Option 1: Use existing datasets": its two names as written, from a stand-in of the hub."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from rm_gallery.cli import main
from tests.data.sources.stand_in import StandIn
from tests.spec.text import tab_blocks


@pytest.fixture
def names(spec: str) -> dict[str, str]:
    """TRAIN_FILE and VAL_FILE of the specification."""
    [block] = tab_blocks(spec, "Option 1: Use existing datasets", "bash")
    words = (shlex.split(line)[0] for line in block.splitlines() if line and not line.startswith("#"))
    return dict(word.split("=") for word in words)


def train(model: Path, *words: str) -> int:
    return main(["train", f"model.partial_pretrain={model}", "data.max_length=128", "data.train_batch_size=8", *words,
                 "trainer.total_training_steps=1", "trainer.default_local_dir=out",
                 "trainer.experiment_name=bt"])  # fmt: skip


def test_the_training_file_is_the_split_of_that_name(site: StandIn, names: dict[str, str], qwen2_folder: Path) -> None:
    assert train(qwen2_folder, f"data.train_files={names['TRAIN_FILE']}", "data.val_fraction=0.25") == 0
    facts = json.loads(Path("out/bt/run.json").read_text())["data"]
    assert facts["train"]["groups"] + facts["val"]["groups"] == 40
    assert facts["train"]["held_out"] == facts["val"]["groups"] > 0
    assert len(facts["train"]["files"]) == 2
    assert [each.partition(",")[0] for each in facts["train"]["formats"]] == ["text"]


def test_a_missing_split_names_those_that_exist_and_the_way_to_hold_out_a_share(
    site: StandIn, names: dict[str, str], qwen2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"data.train_files={names['TRAIN_FILE']}", f"data.val_files={names['VAL_FILE']}"]
    assert train(qwen2_folder, *files) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"rm-gallery: error: data.val_files={names['VAL_FILE']}: ")
    assert "train" in error and "data.val_fraction" in error
