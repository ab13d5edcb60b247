"""Whole runs of several processes: resumed, moved to another number of processes, and robbed of one of them."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import make_model
from tests.training.rank_runs import Act, Run, run_all
from tests.training.short_runs import assert_same_run, rows, settings, write_data

FSDP2, DDP = ("model.strategy=fsdp2",), ("model.strategy=ddp",)
LONG = (
    "trainer.total_epochs=10",
    "optim.lr=1e-4",
    "optim.warmup_steps_ratio=0.1",
    "data.max_tokens_per_micro_batch=600",
)


@pytest.fixture(autouse=True)
def data(in_tmp: Path) -> None:
    write_data()


def run(model: Path, name: str, *overrides: str, **more: Any) -> Run:
    return Run(settings(model, name, *overrides), **more)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("qwen2", (*FSDP2, "trainer.async_save=true", "trainer.save_freq=2"), marks=pytest.mark.slow),
        pytest.param("qwen2", (*FSDP2, "model.fsdp_config.model_dtype=bf16"), marks=pytest.mark.slow),
        pytest.param("bert", (*DDP, "model.dropout=0.3", "trainer.log_freq=4"), marks=pytest.mark.slow),
    ],
)
def test_a_run_of_two_processes_that_was_stopped_is_the_one_that_was_not(
    kind: str, options: tuple[str, ...], in_tmp: Path
) -> None:
    """The signal comes to one rank alone. Dropout draws apart in each, and a log line spans both starts."""
    model = make_model(kind, in_tmp / kind)
    done = run_all(
        [
            run(model, "whole", *options),
            run(model, "parts", *options, act=Act(rank=1, step=3, what="SIGTERM")),
            run(model, "parts", *options),
        ],
        in_tmp,
    )
    assert [each.status for each in done] == [[0, 0], [143, 143], [0, 0]], "\n".join(each.log for each in done)
    assert_same_run(Path("runs/parts"), Path("runs/whole"))


@pytest.mark.slow
@pytest.mark.parametrize("others", [("one",), pytest.param(("one", "ddp", "four"), marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_from_the_same_weights_gradients_and_losses(
    others: tuple[str, ...], in_tmp: Path, qwen2_folder: Path
) -> None:
    """30 steps at 1e-4: all of them on two processes, or 12 there and the rest on one or four, or another strategy."""
    runs = [
        run(qwen2_folder, "whole", *LONG, *FSDP2),
        run(qwen2_folder, "stopped", *LONG, *FSDP2, act=Act(rank=0, step=12, what="SIGTERM")),
    ]
    settings_of = {"same": (2, FSDP2), "one": (1, ()), "ddp": (2, DDP), "four": (4, FSDP2)}
    for name in ("same", *others):
        ranks, options = settings_of[name]
        more = {"gradients": in_tmp / f"gradients-{name}.pt", "copy": ("runs/stopped", f"runs/{name}")}
        runs.append(run(qwen2_folder, name, *LONG, *options, ranks=ranks, **more))
    done = run_all(runs, in_tmp)
    status = [{0}, {143}, *[{0}] * (1 + len(others))]
    assert [set(each.status) for each in done] == status, "\n".join(each.log for each in done)
    expected = torch.load(in_tmp / "gradients-same.pt")
    losses = {row["step"]: row["train/loss"] for row in rows(Path("runs/whole")) if "train/loss" in row}
    assert len(losses) == 30
    for name in others:
        found = torch.load(in_tmp / f"gradients-{name}.pt")
        assert found.keys() == expected.keys()
        assert max(float((found[each] - expected[each]).abs().max()) for each in found) < 1e-5, name
        other = {row["step"]: row["train/loss"] for row in rows(Path("runs") / name) if "train/loss" in row}
        assert other == pytest.approx(losses, abs=1e-4), name
    assert f"resuming with {settings_of[others[-1]][0]} processes, saved by 2: RNG states are" in done[-1].log


@pytest.mark.slow
def test_a_killed_and_a_hung_process_end_the_others_in_words(in_tmp: Path, qwen2_folder: Path) -> None:
    """No launcher is there to help: the processes find out for themselves. Both runs wait, so they run at once."""
    kill, hang = (Act(rank=1, step=2, what=what) for what in ("SIGKILL", "hang"))
    done = run_all(
        [
            run(qwen2_folder, "killed", *FSDP2, act=kill),
            run(qwen2_folder, "hung", *DDP, "trainer.timeout_seconds=3", act=hang),
        ],
        in_tmp,
        at_once=True,
    )
    killed, hung = done
    host = socket.gethostname()
    assert killed.status == [2, -9], killed.log
    assert killed.seconds is not None
    assert killed.seconds < 30
    assert f"rank 1 on {host} stopped answering" in killed.log
    assert all(hung.status), hung.log
    assert hung.seconds is not None
    assert hung.seconds < 30
    assert f"rank 1 on {host} has not moved for 3 s, while the others wait for it" in hung.log


CUSTOM = """
from tutorials.cookbooks.training_reward_model.base import BaseTrainDataset

class Mine(BaseTrainDataset):
    def _build_messages(self, example):
        return [{"role": "user", "content": "About: " + example["chosen"][:10]}]
"""


@pytest.mark.slow
def test_a_class_of_the_users_own_reads_the_same_on_several_processes(in_tmp: Path, qwen2_folder: Path) -> None:
    """Each rank loads the class; the plans agree, and the losses are those of one process."""
    Path("mine.py").write_text(CUSTOM)
    options = ("data.custom_cls.path=mine.py", "data.custom_cls.name=Mine", "optim.lr=1e-4", "data.max_length=200")
    done = run_all(
        [
            run(qwen2_folder, "one", *options, ranks=1),
            run(qwen2_folder, "two", *options, *FSDP2, f"data.cache_dir={in_tmp / 'other-cache'}"),
        ],
        in_tmp,
    )
    assert [set(each.status) for each in done] == [{0}, {0}], "\n".join(each.log for each in done)
    losses = [
        [row["train/loss"] for row in rows(Path("runs") / name) if "train/loss" in row] for name in ("one", "two")
    ]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
