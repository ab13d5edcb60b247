"""The table of benchmarks/strategies.py: every way to share the work follows the loss curve of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.strategies import CASES, run_table

ALL = tuple(case.name for case in CASES)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("ddp", "fsdp2"), pytest.param(ALL, marks=pytest.mark.slow)], ids=["two", "all"])
def test_a_strategy_gives_the_run_of_one_process(names: tuple[str, ...], tmp_path: Path) -> None:
    """30 float32 steps at 1e-4; expected is about 1e-6. One test, so that one worker of pytest makes the table."""
    cases = tuple(case for case in CASES if case.name in names)
    table = run_table(tmp_path, cases)
    assert tuple(table) == cases
    assert len(cases) == len(names)
    close = {
        case.name: difference.loss < 2e-5
        and difference.grad_norm < 1e-3
        and difference.validation < 2e-5
        and difference.weights < 1e-5
        for case, difference in table.items()
    }
    assert all(close.values()), table
