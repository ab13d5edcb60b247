"""The split: whole prompts, near to the shares, by the seed."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.core.generator import export_data
from rm_gallery.core.generator.export import split_units
from rm_gallery.errors import UserError
from tests.core.generator.exported import both_sides, export, graded, read_back


def filled(sizes: Sequence[int], sides: Sequence[int], num_sides: int) -> list[int]:
    return [sum(size for size, side in zip(sizes, sides, strict=True) if side == which) for which in range(num_sides)]


def distance(sizes: Sequence[int], sides: Sequence[int], shares: Sequence[float]) -> float:
    rows = filled(sizes, sides, len(shares))
    return sum(abs(share * sum(sizes) - have) for share, have in zip(shares, rows, strict=True))


@pytest.mark.parametrize("shares", [(0.8, 0.2), (0.5, 0.5), (0.9, 0.1), (0.6, 0.3, 0.1)])
def test_few_units_are_split_as_well_as_can_be(shares: tuple[float, ...]) -> None:
    draw = random.Random(len(shares))
    for _ in range(25):
        sizes = [draw.choice([1, 1, 2, 3, 7, 12]) for _ in range(draw.randint(1, 5))]
        best = min(distance(sizes, way, shares) for way in itertools.product(range(len(shares)), repeat=len(sizes)))
        assert distance(sizes, split_units(sizes, shares), shares) == pytest.approx(best), sizes


@pytest.mark.parametrize("shares", [(0.8, 0.2), (0.34, 0.33, 0.33), (0.98, 0.02)])
def test_many_units_miss_the_shares_by_less_than_a_row(shares: tuple[float, ...]) -> None:
    draw = random.Random(0)
    for _ in range(10):
        sizes = [1] * 30 + [draw.randint(1, 20) for _ in range(100)]
        draw.shuffle(sizes)
        rows = filled(sizes, split_units(sizes, shares), len(shares))
        assert all(abs(share * sum(sizes) - have) < 1 for share, have in zip(shares, rows, strict=True))


def test_a_side_gets_its_part_of_large_and_small_units() -> None:
    sizes = [10] * 50 + [1] * 500
    sides = split_units(sizes, [0.8, 0.2])
    assert filled([10] * 50, sides[:50], 2) == [400, 100]
    assert filled([1] * 500, sides[50:], 2) == [400, 100]


def test_one_unit_larger_than_a_share_goes_where_it_hurts_least() -> None:
    assert split_units([60, *[1] * 40], [0.5, 0.5]) == [0, *[1] * 40]
    assert split_units([5], [0.3, 0.7]) == [1]


def test_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    as_chat: dict[str, Any] = {"response_a": "yes", "response_b": "no", "score_a": 1, "score_b": 2}
    cases = graded(200, prompts=40)
    cases += [{**case, "prompt": f"\n{case['prompt']}  ", "response": f"{case['response']}!"} for case in cases]
    cases += [{**as_chat, "prompt": [{"role": "user", "content": f"Question {n}? "}]} for n in range(40)]
    cases += [
        {"response_a": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "why?"}],
         "response_b": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "so."}],
         "score_a": 1, "score_b": 2}
        for n in range(40)
    ]  # fmt: skip
    _, summary = export(cases, tmp_path, split_ratio={"train": 0.7, "test": 0.3})
    sides = [
        {"".join(turn["content"].strip() for turn in row["prompt"]) for row in rows} for rows in both_sides(tmp_path)
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40 == sum(side.num_prompts for side in summary.sides.values())
    assert summary.sides["test"].num_rows == pytest.approx(0.3 * summary.num_rows, abs=1)


def test_without_prompts_no_text_is_on_both_sides(tmp_path: Path) -> None:
    draw = random.Random(0)
    cases: list[dict[str, Any]] = [
        {"response_a": f"{draw.randrange(150)} ", "response_b": str(draw.randrange(150)), "score_a": 2, "score_b": 1}
        for _ in range(80)
    ]
    chain = [{"response_a": f"c{n}", "response_b": f"c{n + 1}", "score_a": 1, "score_b": 2} for n in range(20)]
    _, summary = export(cases + chain, tmp_path, split_ratio={"train": 0.6, "test": 0.4})
    sides = [{row[name].strip() for row in rows for name in ("chosen", "rejected")} for rows in both_sides(tmp_path)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert len([side for side in sides if "c0" in side or "c20" in side]) == 1, "connected pairs stay together"
    assert summary.sides["test"].num_rows == pytest.approx(0.4 * summary.num_rows, abs=1)


def test_texts_with_the_prompt_in_front_are_split_by_it(tmp_path: Path) -> None:
    cases = [
        {"response_a": f"Human: question {n % 12}\n\nAssistant: {n}a", "score_a": 1,
         "response_b": f"Human: question {n % 12}\n\nAssistant: {n}b", "score_b": 2}
        for n in range(60)
    ]  # fmt: skip
    export(cases, tmp_path, split_ratio={"train": 0.75, "test": 0.25})
    train, test = ({row["chosen"].partition("\n")[0] for row in rows} for rows in both_sides(tmp_path))
    assert (len(train), len(test)) == (9, 3) and not train & test


def test_the_seed_decides_what_goes_where(tmp_path: Path) -> None:
    found = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2**70)):
        export_data(graded(100, prompts=30), tmp_path / folder, seed=seed)
        found.append({row["prompt"] for row in read_back(tmp_path / folder / "test.parquet")})
    assert found[0] == found[1] and len({frozenset(prompts) for prompts in found}) == 3


def test_an_empty_side_is_said_and_has_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    cases = [{"prompt": "Q", "response": str(n), "score": n} for n in range(5)]
    summary = export_data(cases, tmp_path)
    assert summary.empty_sides == ("test",) and "test: 0 (0.0%, asked 20.0%) of 0 prompts: EMPTY" in str(summary)
    assert summary.files == (tmp_path / "train.parquet",) == tuple(tmp_path.iterdir())
    assert [record.message for record in caplog.records] == [
        "the side 'test' is empty, and has no file: there are too few prompts to split so"
    ]


def test_an_old_file_of_a_side_that_is_empty_now_goes(tmp_path: Path) -> None:
    export_data(graded(40), tmp_path)
    assert (tmp_path / "test.parquet").exists()
    export_data([{"prompt": "Q", "responses": ["a", "b"], "scores": [1, 2]}], tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["train.parquet"]


def test_sides_have_any_name_and_number(tmp_path: Path) -> None:
    split = {"train": 0.5, "val": 0.25, "held-out.2": 0.25}
    summary = export_data(graded(100, prompts=40), tmp_path, split_ratio=split, formats="jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held-out.2.jsonl", "train.jsonl", "val.jsonl"]
    assert [side.num_rows / summary.num_rows for side in summary.sides.values()] == pytest.approx(
        [0.5, 0.25, 0.25], abs=0.02
    )


@pytest.mark.parametrize(
    ("split", "what"),
    [
        ({}, "must give each side its share"),
        ([0.8, 0.2], "must give each side its share"),
        ({"train": 0.8}, r"adds up to 0\.8"),
        ({"train": 80, "test": 20}, "adds up to 100"),
        ({"train": 1.0, "test": 0.0}, "leave out a side"),
        ({"train": 1.5, "test": -0.5}, "leave out a side"),
        ({"train": float("nan"), "test": 0.5}, "must be a number"),
        ({"train": True}, "must be a number"),
        ({"train": "0.8", "test": 0.2}, "must be a number"),
        ({"../train": 0.5, "test": 0.5}, "no name for a file"),
        ({"": 1.0}, "no name for a file"),
        ({3: 1.0}, "no name for a file"),
        ({"Test": 0.5, "test": 0.5}, "the same file"),
    ],
)
def test_a_split_that_cannot_be_is_refused(split: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what):
        export_data(graded(4), tmp_path / "out", split_ratio=split)
    assert not (tmp_path / "out").exists()
