"""The table of benchmarks/strategies.py: every way to share the work follows the loss curve of one process."""

from __future__ import annotations

import pytest

from benchmarks.strategies import CASES, Case, Difference, run_table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Difference]:
    return run_table(tmp_path_factory.mktemp("strategies"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_strategy_gives_the_run_of_one_process(case: Case, table: dict[Case, Difference]) -> None:
    """30 float32 steps at 1e-4; expected is about 1e-6."""
    difference = table[case]
    assert difference.loss < 2e-5
    assert difference.grad_norm < 1e-3
    assert difference.validation < 2e-5
    assert difference.weights < 1e-5
