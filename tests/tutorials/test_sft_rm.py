"""sft_rm.sh: the launcher of run_bt.sh with the recipe's own values."""

from __future__ import annotations

from pathlib import Path

from tests.tutorials import test_run_bt
from tests.tutorials.test_run_bt import RECIPE, Seen

SFT = RECIPE.with_name("sft")


def run(tmp_path: Path, *arguments: str, **variables: str) -> Seen:
    return test_run_bt.run(tmp_path, *arguments, script=SFT / "sft_rm.sh", **variables)


def test_it_trains_with_the_values_of_the_recipe(tmp_path: Path) -> None:
    seen = run(tmp_path, "optim.lr=1e-5", WORLD_SIZE="2", RANK="1", MASTER_ADDR="node0", TRAIN_FILE="a.parquet")
    assert seen.status == 0, seen.errors
    assert (seen.option("nnodes"), seen.option("node_rank")) == ("2", "1")
    assert str(RECIPE / "trainer.py") in seen.launch[0]
    assert seen.launch[0][seen.launch[0].index("--config") + 1] == str(SFT / "sft.yaml")
    wanted = {
        "objective.name": "sft", "data.train_files": "a.parquet", "data.train_batch_size": "96", "optim.lr": "1e-5",
        "data.max_length": "8192", "data.micro_batch_size_per_gpu": "12", "trainer.project_name": "rm-gallery-sft",
    }  # fmt: skip
    assert {key: seen.setting(key) for key in wanted} == wanted
    refused = run(tmp_path, NNODES="2", NODE_RANK="2", MASTER_ADDR="node0")
    assert refused.status == 2 and refused.errors.startswith("sft_rm.sh: error: NODE_RANK=2")
