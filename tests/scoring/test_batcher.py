"""Calls from many tasks and threads: right answers, few packs, no call that harms another, a thread that ends."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RewardScorer
from tests.small import chat_pairs, text_pairs

TEXTS = [row[side] for row in text_pairs(100, seed=3) for side in ("chosen", "rejected")]
WORKER = "rm-gallery-scorer"


def single(text: str) -> PreferenceGroup:
    return PreferenceGroup("", [text])


def workers() -> int:
    return sum(thread.name == WORKER for thread in threading.enumerate())


def hold_first_pack(scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """(set when the worker is in its first pack, to be set to let it go on)."""
    entered, release = threading.Event(), threading.Event()
    run = scorer.engine.run

    def slow(pack: Any, **given: Any) -> Any:
        entered.set()
        assert release.wait(20)
        return run(pack, **given)

    monkeypatch.setattr(scorer.engine, "run", slow)
    return entered, release


def test_200_tasks_are_answered_right_and_in_few_packs(text_scorer: RewardScorer) -> None:
    expected = [rewards[0] for rewards in text_scorer.score([single(text) for text in TEXTS])]
    in_one_call, text_scorer.engine.num_packs = text_scorer.engine.num_packs, 0

    async def ask() -> list[list[list[float]]]:
        return await asyncio.gather(*(text_scorer.ascore([single(text)]) for text in TEXTS))

    assert [rewards[0][0] for rewards in asyncio.run(ask())] == pytest.approx(expected, abs=1e-4)
    assert text_scorer.engine.num_packs <= in_one_call + 3


def test_event_loops_in_many_threads_share_one_worker(text_scorer: RewardScorer) -> None:
    expected = [rewards[0] for rewards in text_scorer.score([single(text) for text in TEXTS])]
    text_scorer.engine.num_packs, before = 0, workers()
    found: dict[int, list[float]] = {}

    async def ask(texts: list[str]) -> list[float]:
        return [rewards[0][0] for rewards in await asyncio.gather(*(text_scorer.ascore([single(t)]) for t in texts))]

    def run(index: int) -> None:
        found[index] = asyncio.run(ask(TEXTS[index * 40 : index * 40 + 40]))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reward for index in range(5) for reward in found[index]] == pytest.approx(expected, abs=1e-4)
    assert workers() == before + 1
    assert text_scorer.engine.num_packs < 40


def test_async_twins_give_what_the_others_give(chat_scorer: RewardScorer) -> None:
    pairs = chat_pairs(5)
    chats = [[*row["prompt"], {"role": "assistant", "content": row["chosen"]}] for row in pairs]

    async def ask() -> tuple[list[tuple[float, float]], list[float]]:
        return await chat_scorer.ascore_pairs(pairs), await chat_scorer.ascore_messages(chats)

    found = asyncio.run(ask())
    assert sum(found[0], ()) == pytest.approx(sum(chat_scorer.score_pairs(pairs), ()), abs=1e-4)
    assert found[1] == pytest.approx([chosen for chosen, _ in found[0]], abs=1e-4)
    assert found[1] == pytest.approx(chat_scorer.score_messages(chats), abs=1e-4)


def test_a_bad_call_fails_alone(text_scorer: RewardScorer) -> None:
    bad = [single(""), single("\ud800"), PreferenceGroup("", [None]), PreferenceGroup((), [], style="text")]  # type: ignore[list-item]

    async def ask() -> list[Any]:
        calls = [[single(text)] for text in TEXTS[:10]]
        for place, group in enumerate(bad):
            calls.insert(place * 3, [single("fine"), group])
        return await asyncio.gather(*map(text_scorer.ascore, calls), return_exceptions=True)

    found = asyncio.run(ask())
    failed = [each for each in found if isinstance(each, BaseException)]
    assert all(isinstance(each, UserError) and "group 1: the text cannot be scored" in str(each) for each in failed)
    assert len(failed) == 4
    answers = [each[0][0] for each in found if isinstance(each, list)]
    assert answers == pytest.approx([r[0] for r in text_scorer.score([single(t) for t in TEXTS[:10]])], abs=1e-4)


def test_a_model_that_fails_on_one_text_fails_one_call(
    text_scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = text_scorer.engine.run

    def picky(pack: Any) -> Any:
        if any(len(part.tails[0]) == 1 for part in pack):
            raise RuntimeError("the kernel does not like it")
        return run(pack)

    monkeypatch.setattr(text_scorer.engine, "run", picky)

    async def ask() -> list[Any]:
        calls = [text_scorer.ascore([single(text)]) for text in [*TEXTS[:5], "x", *TEXTS[5:10]]]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(ask())
    assert [isinstance(each, RuntimeError) for each in found] == [False] * 5 + [True] + [False] * 5


def test_a_cancelled_call_leaves_the_others_alone(text_scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = text_scorer.score([single(text) for text in TEXTS[:20]])
    text_scorer.engine.num_packs = 0
    entered, release = hold_first_pack(text_scorer, monkeypatch)

    async def ask() -> list[Any]:
        first = asyncio.create_task(text_scorer.ascore([single("first")]))
        await asyncio.to_thread(entered.wait, 20)
        tasks = [asyncio.create_task(text_scorer.ascore([single(text)])) for text in TEXTS[:40]]
        await asyncio.sleep(0)
        for task in [first, *tasks[20:]]:
            task.cancel()
        await asyncio.sleep(0)
        release.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(ask())
    assert [each[0][0] for each in found[:20]] == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert all(isinstance(each, asyncio.CancelledError) for each in found[20:])
    assert asyncio.run(text_scorer.ascore([single("again")]))[0]


def test_close_ends_the_thread_and_answers_who_still_waits(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = workers()
    scorer = RewardScorer.from_folder(text_folder, device="cpu")
    assert workers() == before, "no thread before it is needed"
    entered, release = hold_first_pack(scorer, monkeypatch)

    async def ask() -> list[Any]:
        first = asyncio.create_task(scorer.ascore([single("first")]))
        await asyncio.to_thread(entered.wait, 20)
        second = asyncio.create_task(scorer.ascore([single("second")]))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(scorer.close))
        await asyncio.sleep(0.05)
        release.set()
        await closing
        return await asyncio.gather(first, second, return_exceptions=True)

    first, second = asyncio.run(ask())
    assert isinstance(first, list), "the pack that ran is answered"
    assert isinstance(second, RuntimeError) and "closed" in str(second)
    assert workers() == before
    scorer.close()
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(scorer.ascore([single("late")]))
    assert scorer.score([single("still")])[0]


def test_a_scorer_that_nobody_holds_ends_its_thread(text_folder: Path) -> None:
    gc.collect()  # scorers of earlier tests
    before = workers()
    scorer = RewardScorer.from_folder(text_folder, device="cpu")
    asyncio.run(scorer.ascore([single("a")]))
    assert workers() == before + 1
    del scorer
    gc.collect()
    assert workers() == before


@pytest.mark.slow
def test_a_process_ends_without_close(text_folder: Path) -> None:
    program = (
        "import asyncio, sys; from rm_gallery.scoring import RewardScorer\n"
        "scorer = RewardScorer.from_folder(sys.argv[1], device='cpu')\n"
        "print(asyncio.run(scorer.ascore_messages([[{'role': 'user', 'content': 'a'}]])))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(
        [sys.executable, "-c", program, str(text_folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert (ran.returncode, ran.stderr, ran.stdout[0]) == (0, "", "[")


def test_many_threads_may_score_at_once(text_scorer: RewardScorer) -> None:
    groups = [single(text) for text in TEXTS[:30]]
    expected = [each[0] for each in text_scorer.score(groups)]
    found: list[list[float]] = []
    threads = [
        threading.Thread(target=lambda: found.append([each[0] for each in text_scorer.score(groups)])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [pytest.approx(expected, abs=1e-4)] * 4
