"""The short form of benchmarks/faults.py: a run that is killed at random comes out as one that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import Course, run_course
from tests import forks


@pytest.mark.slow
def test_a_run_that_is_killed_twice_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    """Under torchrun --max-restarts, any rank, in steps and in a save."""
    outcome = run_course(
        tmp_path,
        Course(kills=2, steps=40, save_freq=3),
        start=lambda arguments, log: forks.torchrun(*arguments, log=log),
    )
    assert sum(outcome.kills.values()) == 2
    assert outcome.differing_rows == []
    assert outcome.same_metrics
    assert outcome.same_weights
    assert outcome.steps_once
