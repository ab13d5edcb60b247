"""The allocator keeps what was freed; a processor without units for bfloat16 is found out."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rm_gallery.distributed.cpu import bf16_slowdown, keep_freed_memory
from rm_gallery.training import setup
from tests import forks
from tests.training.short_runs import train, write_data


def pages() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def make_and_free(keep: bool, path: Path) -> None:
    """Tensors as of twelve steps; writes the pages that the last eight fetched. Each is above 32 MiB.

    Smaller ones glibc keeps by itself, once it has seen them.
    """
    assert not keep or keep_freed_memory()
    for step in range(12):
        if step == 4:
            before = pages()
        layers = [torch.ones(size) for size in (9_000_000, 10_000_000, 9_500_000)]
        del layers
    path.write_text(str(pages() - before))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
@pytest.mark.slow
def test_tensors_are_made_of_the_memory_of_freed_ones(tmp_path: Path) -> None:
    found = {}
    for keep in (False, True):
        log = tmp_path / f"{keep}.log"
        process = forks.start(make_and_free, keep, tmp_path / f"{keep}", log=log)
        assert forks.finish([process]) == [0], log.read_text()
        found[keep] = int((tmp_path / f"{keep}").read_text())
    # Kept memory is fetched once more at most (the heap may still grow), where a step fetches all of it, eight times.
    assert found[True] < found[False] / 3, "pages fetched anew"


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    assert not keep_freed_memory()


def test_it_is_a_ratio_of_times() -> None:
    assert 0 < bf16_slowdown() < 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "slowdown", "said"), [("bf16", 8.71, True), ("bf16", 0.3, False), ("fp32", 8.7, False)]
)
def test_a_run_says_which_type_is_faster(
    in_tmp: Path, qwen2_folder: Path, monkeypatch: Any, capsys: Any, dtype: str, slowdown: float, said: bool
) -> None:
    write_data()
    monkeypatch.setattr(setup, "bf16_slowdown", lambda: slowdown)
    train(qwen2_folder, "run", f"model.fsdp_config.model_dtype={dtype}", "trainer.total_training_steps=1")
    sentence = "matrices 8.7 times slower in bf16 than in fp32; model.fsdp_config.model_dtype=fp32 trains faster here"
    assert (sentence in capsys.readouterr().err) == said


@pytest.mark.slow
@pytest.mark.parametrize(("units", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_the_default_dtype_is_bf16_where_the_processor_has_units_for_it(
    in_tmp: Path, qwen2_folder: Path, monkeypatch: Any, units: bool, dtype: str
) -> None:
    write_data()
    monkeypatch.setattr(setup, "bf16_slowdown", lambda: 1.0)
    monkeypatch.setattr(setup, "has_bf16_units", lambda: units)
    run = train(qwen2_folder, "run", "model.fsdp_config.model_dtype=auto", "trainer.total_training_steps=1")
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["fsdp_config"]["model_dtype"] == dtype
