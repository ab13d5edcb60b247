"""Tests that run the user's specification as it is written, but for names of models and data, and sizes.

The text lies outside the repository, in ../shared/spec; without it these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest

SPEC = Path(__file__).parents[3] / "shared/spec/bradley_terry.md"


@pytest.fixture(scope="session")
def spec() -> str:
    """The whole text of the specification."""
    if not SPEC.is_file():
        pytest.skip(f"the specification is not here ({SPEC.parent.parent.name}/spec/{SPEC.name} beside the checkout)")
    return SPEC.read_text(encoding="utf-8")
