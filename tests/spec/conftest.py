"""Tests that run the user's specification as it is written, but for names of models and data, and sizes.

The text lies outside the repository, in ../shared/spec; without it these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.sources.stand_in import Repository, StandIn, serving
from tests.small import text_pairs, write_pairs

SPEC = Path(__file__).parents[3] / "shared/spec"


def _read(name: str) -> str:
    if not (SPEC / name).is_file():
        pytest.skip(f"the specification is not here ({SPEC.parent.name}/spec/{name} beside the checkout)")
    return (SPEC / name).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def spec() -> str:
    """The whole text of the specification."""
    return _read("bradley_terry.md")


@pytest.fixture(scope="session")
def linked_pages() -> str:
    """Facts about the pages that the specification links to."""
    return _read("linked_pages.md")


@pytest.fixture
def site(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A hub with the specification's data set: two files of training pairs, no test split."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(in_tmp / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    files = {
        f"data/train-0000{number}-of-00002-9d1f.parquet": write_pairs(
            in_tmp / f"{number}.parquet", text_pairs(20, seed=number)
        ).read_bytes()
        for number in range(2)
    }
    with serving() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        state.repositories["hendrydong/preference_700K"] = Repository({"main": files})
        yield state
