"""state.json and rank_N.json: every value of another type is refused in words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.errors import UserError
from rm_gallery.training.checkpoint.facts import read_ranks, read_run
from rm_gallery.training.checkpoint.state import Progress, random_state

NAMES = ["state.json", "rank_0.json"]
PROGRESS = Progress(7, 2, 1, True, {"val/accuracy": 0.5, "val/loss": float("nan")}, 3, 0.75)
RUN = {
    "progress": PROGRESS.as_dict(), "fixed": {"trainer.seed": 0}, "config": {"optim": {"lr": 1e-3}}, "total_steps": 9,
    "world_size": 1, "origin": None,
}  # fmt: skip
BAD: list[Any] = [None, "7", [], {}, -1, 10**30, 1.5, True, float("nan"), [[[[]]]], {"a": {"b": []}}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "global_step_7"
    (folder / "training_state").mkdir(parents=True)
    write(folder, "state.json", RUN)
    write(folder, "rank_0.json", {"random": random_state(), "sums": {"loss": 1.5}})
    return folder


def write(folder: Path, name: str, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "training_state" / name).write_text(text, encoding="utf-8")


def places(value: Any) -> Iterator[tuple[str, ...]]:
    """Paths to every value of nested dictionaries, but those of free form."""
    yield ()
    for key, each in value.items() if isinstance(value, dict) else ():
        if key not in ("fixed", "config"):
            yield from ((key, *rest) for rest in places(each))
        else:
            yield (key,)


def changed(value: Any, place: tuple[str, ...], new: Any) -> Any:
    return new if not place else {**value, place[0]: changed(value[place[0]], place[1:], new)}


def test_what_a_run_writes_is_read(folder: Path) -> None:
    saved = read_run(folder, NAMES)
    assert (saved.progress.step, saved.progress.best_accuracy, saved.total_steps) == (7, 0.75, 9)
    assert read_ranks(folder, 1, NAMES)[0].sums == {"loss": 1.5}


ALLOWED: dict[str, list[Any]] = {
    "progress.last_val": [{}],
    "progress.last_val.val/accuracy": [-1, 10**30, 1.5, "nan"],
    "progress.last_val.val/loss": [-1, 10**30, 1.5, "nan"],
    "progress.best_accuracy": [-1, 10**30, 1.5, "nan"],
    "progress.highest_accuracy": [None, -1, 10**30, 1.5, "nan"],
    "progress.last_val_step": [None],
    "fixed": [{}, {"a": {"b": []}}],
    "config": [{}, {"a": {"b": []}}],
    "total_steps": [10**30],
    "origin": [None, "7"],
}


@pytest.mark.parametrize("place", [place for place in places(RUN) if place[1:2] != ("last_loss",)])
@pytest.mark.slow
def test_another_type_of_any_value_is_refused(place: tuple[str, ...], folder: Path) -> None:
    name = ".".join(place)
    for bad in BAD:
        if str(bad) in map(str, ALLOWED.get(name, [])) or (name == "progress.bad_steps" and bad is None):
            continue
        write(folder, "state.json", changed(RUN, place, bad))
        if bad is True and name in ("progress.validation_pending",):
            continue
        with pytest.raises(UserError, match=r"global_step_7: training_state/state\.json cannot be used \(") as caught:
            read_run(folder, NAMES)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("progress", "step"), 6, "progress.step is 6, unlike the folder's name: rename the folder"),
        (("progress", "step"), 10, "must be in ascending order"),
        (("progress", "best_step"), 8, "progress.best_step=8 is no step of the run"),
        (("progress", "best_step"), None, "only one of progress.best_step and progress.best_accuracy is set"),
        (("world_size",), 10**9, "world_size=1000000000, but the manifest lists 1 files rank_N.json"),
        (("progress",), {**RUN["progress"], "new": 1}, "progress.new: Unexpected keyword argument"),  # type: ignore[dict-item]
        (("progress", "last_val"), {"val/loss": "x" * 9999}, 'should be a valid number, not "xxx'),
    ],
)
def test_values_that_contradict_each_other_are_named(
    place: tuple[str, ...], value: Any, sentence: str, folder: Path
) -> None:
    write(folder, "state.json", changed(RUN, place, value))
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_run(folder, NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", ["", "[]", "null", "5", "[" * 99_999, '{"progress":' * 9999, "{", '"\ud800"'[:1]])
def test_a_file_of_other_content_is_refused(name: str, content: str, folder: Path) -> None:
    write(folder, name, content)
    with pytest.raises(UserError, match=rf"training_state/{re.escape(name)} cannot be used \("):
        read_ranks(folder, read_run(folder, NAMES).world_size, NAMES)


def test_a_file_that_the_manifest_does_not_list_is_not_read(folder: Path) -> None:
    with pytest.raises(UserError, match=r"state\.json cannot be used \(the manifest does not list it\)"):
        read_run(folder, ["rank_0.json"])
    with pytest.raises(UserError, match=r"state\.json cannot be used \(world_size=1, but the manifest lists 0 files"):
        read_run(folder, ["state.json"])


@pytest.mark.parametrize("generator", ["python", "numpy", "torch"])
def test_random_states_of_other_content_are_refused_and_change_nothing(generator: str, folder: Path) -> None:
    state = random_state()
    numpy = state["numpy"]
    bad: list[Any] = [*BAD, "AAAA", [3, [0] * 5, None], [3, ["a"] * 625, None], [9, [0] * 625, None]]
    bad += [["MT19937", numpy[1], position, 0, 0.0] for position in (-1, 10**6, "3")]
    bad += [["MT19937", numpy[1][:5], 0, 0, 0.0], ["other", *numpy[1:]], ["MT19937", [-1] * 624, 0, 0, 0.0]]
    for value in bad:
        write(folder, "rank_0.json", {"random": {**state, generator: value}, "sums": {}})
        with pytest.raises(UserError, match=r"rank_0\.json cannot be used \(random is not the state of the generators"):
            read_ranks(folder, 1, NAMES)
    assert random_state() == state
