"""The split: whole prompts, near to the shares, by the seed."""

from __future__ import annotations

import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.core.generator import export_data
from rm_gallery.data.formats import hash_prompt, is_wanted, prompt_key
from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup
from tests.core.generator.exported import both_sides, export, graded, read_back


def test_each_side_is_as_near_to_its_share_as_an_order_of_prompts_allows(tmp_path: Path) -> None:
    for seed in range(3):
        cases = graded(300, prompts=60, seed=seed)
        _, summary = export(cases, tmp_path, split_ratio={"train": 0.7, "val": 0.2, "test": 0.1}, seed=seed)
        largest = max(Counter(row["prompt"] for file in summary.files for row in read_back(file)).values())
        for side, share in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
            assert abs(summary.sides[side].num_rows - share * summary.num_rows) <= largest


def test_a_prompt_stays_on_its_side_when_cases_are_added(tmp_path: Path) -> None:
    cases = graded(200, prompts=50)
    more = [{"prompt": f"Added {n}?", "response": str(m), "score": m} for n in range(50) for m in range(3)]
    export_data(cases, tmp_path / "a")
    export_data(cases + more, tmp_path / "b")
    before, after = ({row["prompt"] for row in both_sides(tmp_path / name)[1]} for name in "ab")
    assert len(before & after) >= 0.6 * len(before)


def test_with_seed_0_the_test_side_has_the_prompts_that_val_fraction_holds_out(tmp_path: Path) -> None:
    cases = [{"prompt": f"Question {n}?", "responses": ["a", "b"], "scores": [1, 2]} for n in range(200)]
    export_data(cases, tmp_path)
    groups = [PreferenceGroup([{"role": "user", "content": case["prompt"]}], (), style="chat") for case in cases]
    hashes = [hash_prompt(prompt_key(group)) for group in groups]
    held_out = {case["prompt"] for case, key in zip(cases, hashes, strict=True) if is_wanted(key, ("val", 0.2))}
    test = {row["prompt"] for row in both_sides(tmp_path)[1]}
    assert test <= held_out or held_out <= test


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
    assert summary.sides["test"].num_rows == pytest.approx(0.3 * summary.num_rows, rel=0.1)


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
    assert summary.sides["test"].num_rows == pytest.approx(0.4 * summary.num_rows, rel=0.1)


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
    assert summary.empty_sides == ("test",) and "test: 0 (0.0%, requested 20.0%) of 0 prompts: EMPTY" in str(summary)
    assert summary.files == (tmp_path / "train.parquet",) == tuple(tmp_path.iterdir())
    assert [record.message for record in caplog.records] == [
        "split_ratio: 'test' has no rows and no file; there are too few prompts for this split"
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
        [0.5, 0.25, 0.25], abs=0.05
    )


@pytest.mark.parametrize(
    ("split", "what"),
    [
        ({}, "should have at least 1 item"),
        ([0.8, 0.2], "split_ratio=.*: must be a valid dictionary"),
        ({"train": 0.8}, r"adds up to 0\.8"),
        ({"train": 80, "test": 20}, "adds up to 100"),
        ({"train": 1.0, "test": 0.0}, r"split_ratio\[test\]=0.0: must be greater than 0"),
        ({"train": 1.5, "test": -0.5}, "must be greater than 0"),
        ({"train": float("nan"), "test": 0.5}, "must be a finite number"),
        ({"train": True}, "must be a valid number"),
        ({"train": "0.8", "test": 0.2}, "must be a valid number"),
        ({"../train": 0.5, "test": 0.5}, "not a valid file name"),
        ({"": 1.0}, "not a valid file name"),
        ({3: 1.0}, "must be a valid string"),
        ({"Test": 0.5, "test": 0.5}, "differ only in case"),
    ],
)
def test_a_split_that_cannot_be_is_refused(split: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what):
        export_data(graded(4), tmp_path / "out", split_ratio=split)
    assert not (tmp_path / "out").exists()
