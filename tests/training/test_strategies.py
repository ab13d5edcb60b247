"""The table of benchmarks/strategies.py: every way to share the work follows the loss curve of one process."""

from __future__ import annotations

from pathlib import Path

from benchmarks.strategies import CASES, run_table


def test_a_strategy_gives_the_run_of_one_process(tmp_path: Path) -> None:
    """30 float32 steps at 1e-4; expected is about 1e-6. One test, so that one worker of pytest makes the table."""
    table = run_table(tmp_path)
    assert tuple(table) == CASES
    close = {
        case.name: difference.loss < 2e-5
        and difference.grad_norm < 1e-3
        and difference.validation < 2e-5
        and difference.weights < 1e-5
        for case, difference in table.items()
    }
    assert all(close.values()), table
