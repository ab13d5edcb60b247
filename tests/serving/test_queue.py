"""The queue of a model: packs, turns of clients, places, and what happens when it stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.token_cache.arrays import GroupSizes
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.scoring import RewardScorer
from rm_gallery.scoring.shared_prefixes import share_prefixes
from rm_gallery.serving.limits import Limits, Refused
from rm_gallery.serving.queue import ScoringQueue
from rm_gallery.serving.served import Member, RenderedText, Truncation


class Engine:
    """Stands in for a model: the reward of a text is the sum of its tokens. Packs wait while `gate` is closed."""

    def __init__(self, budget: int = 100) -> None:
        self.packer = Packer(budget)
        self.packs: list[list[TokenGroup]] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.fails: Callable[[TokenGroup], bool] = lambda group: False

    def plan(self, parts: Any) -> list[list[int]]:
        return self.packer.pack_by_length(GroupSizes.from_rows(part.sizes() for part in parts))

    def run(self, pack: list[TokenGroup]) -> list[list[float]]:
        self.packs.append(pack)
        self.entered.set()
        self.gate.wait()
        if any(map(self.fails, pack)):
            raise RuntimeError("out of order")
        return [[float(group.prefix.sum() + tail.sum()) for tail in group.tails] for group in pack]


def text(*ids: int, size: int = 10) -> np.ndarray:
    """These tokens, then 1s up to the size."""
    return np.array([*ids, *[1] * (size - len(ids))], np.int32)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def queue(engine: Engine) -> Iterator[ScoringQueue]:
    found = ScoringQueue(engine, 100)  # type: ignore[arg-type]
    yield found
    engine.gate.set()
    found.close()


def submit(queue: ScoringQueue, texts: list[np.ndarray], client: str) -> Any:
    queue.reserve(len(texts))
    return queue.submit(texts, client)


def hold(engine: Engine, queue: ScoringQueue) -> Any:
    """Keep the model busy with one text, so that what follows waits."""
    engine.gate.clear()
    engine.entered.clear()
    future = submit(queue, [text(9)], "first")
    engine.entered.wait()
    return future


def test_texts_that_wait_are_packed_together_and_a_free_model_does_not_wait(
    engine: Engine, queue: ScoringQueue
) -> None:
    assert submit(queue, [text(5)], "a").result() == [14.0]
    hold(engine, queue)
    futures = [submit(queue, [text(number, 2, 3)], "a") for number in range(5, 10)]
    engine.gate.set()
    assert [future.result() for future in futures] == [[12.0 + number] for number in range(5, 10)]
    assert [len(pack) for pack in engine.packs] == [1, 1, 5]


def test_texts_of_a_prompt_share_its_tokens_across_requests(engine: Engine, queue: ScoringQueue) -> None:
    prompt = range(20, 50)
    hold(engine, queue)
    futures = [submit(queue, [text(*prompt, number, size=40)], client) for number, client in enumerate("abcab")]
    engine.gate.set()
    sums = [sum(prompt) + number + 9.0 for number in range(5)]
    assert [future.result() for future in futures] == [[each] for each in sums]
    assert engine.packs[-1][0].sizes()[:3] == (30 + 5 * 10, 40, 5)
    assert (queue.counts.tokens, queue.counts.computed) == (10 + 5 * 40, 10 + 80)


def test_a_client_with_few_texts_does_not_wait_for_one_with_many(engine: Engine, queue: ScoringQueue) -> None:
    hold(engine, queue)
    many = submit(queue, [text(number, size=60) for number in range(50)], "many")
    few = submit(queue, [text(100 + number, size=60) for number in range(2)], "few")
    packs: list[int] = []
    few.add_done_callback(lambda _: packs.append(len(engine.packs)))
    engine.gate.set()
    few.result()
    assert packs[0] < 25
    assert len(many.result()) == 50


def test_a_full_queue_refuses_and_a_client_that_leaves_frees_its_places(engine: Engine, queue: ScoringQueue) -> None:
    hold(engine, queue)
    waiting = submit(queue, [text(5)] * 99, "a")
    with pytest.raises(Refused, match="--max-waiting is 100") as error:
        submit(queue, [text(6)], "b")
    assert error.value.status == 429
    assert int(error.value.headers["Retry-After"]) >= 1
    assert waiting.cancel()
    assert queue.num_waiting == 1
    other = submit(queue, [text(6)], "b")
    engine.gate.set()
    assert other.result() == [15.0]
    assert sum(len(group.tails) for pack in engine.packs for group in pack) == 2  # what was cancelled is not computed
    with pytest.raises(CancelledError):
        waiting.result()


def test_a_failure_is_that_of_its_request(engine: Engine, queue: ScoringQueue) -> None:
    hold(engine, queue)
    engine.fails = lambda group: any(7 in tail for tail in group.tails)
    good, bad = submit(queue, [text(5)], "a"), submit(queue, [text(7)], "b")
    engine.gate.set()
    assert good.result() == [14.0]
    with pytest.raises(RuntimeError, match="out of order"):
        bad.result()
    engine.fails = lambda group: False
    assert submit(queue, [text(7)], "b").result() == [16.0]


def test_close_finishes_what_was_accepted(engine: Engine, queue: ScoringQueue) -> None:
    hold(engine, queue)
    futures = [submit(queue, [text(number)] * 3, "a") for number in range(5)]
    closing = threading.Thread(target=queue.close)
    closing.start()
    engine.gate.set()
    closing.join()
    assert all(len(future.result()) == 3 for future in futures)
    with pytest.raises(Refused, match="stopping"):
        submit(queue, [text(5)], "a")


def test_share_prefixes() -> None:
    def sizes(*texts: np.ndarray, budget: int = 1000) -> list[tuple[tuple[int, ...], list[list[int]]]]:
        return [(each.tokens.sizes()[:3], each.members) for each in share_prefixes(texts, Packer(budget))]

    long = [text(*range(50), number, size=100) for number in (2, 3, 4)]
    assert sizes(*long) == [((50 + 3 * 50, 100, 3), [[0], [1], [2]])]
    assert sizes(long[0], long[1], long[0]) == [((150, 100, 2), [[0, 2], [1]])]  # equal texts are computed once
    assert sizes(long[0], long[1], budget=120) == [((100, 100, 1), [[0]]), ((100, 100, 1), [[1]])]
    # A few common tokens, such as the start of a template, are not worth a wide group.
    assert len(sizes(text(*range(15), 2, size=30), text(*range(15), 3, size=30))) == 2
    # A system prompt in common does not split the texts of a prompt.
    other = text(*range(20), 99, size=100)
    assert sorted(each[0] for each in sizes(*long, other)) == [(100, 100, 1), (200, 100, 3)]
    # The reward of a text that begins another is read at its last token, which is not shared.
    assert sizes(long[0], long[0][:60]) == [((59 + 1 + 41, 100, 2), [[1], [0]])]


def test_requests_are_tokenized_together_and_a_large_one_apart(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = Member(RewardScorer.from_folder(chat_folder, device="cpu"), Limits())
    engine, gate = member.scorer.engine, threading.Event()
    calls: list[int] = []
    tokenize = engine.tokenize

    def count(groups: Sequence[Any]) -> list[list[list[int]] | Exception]:
        calls.append(len(groups))
        return tokenize(groups)

    monkeypatch.setattr(engine, "tokenize", count)

    async def ask(*sizes: int) -> list[list[np.ndarray]]:
        requests = [[RenderedText(f"{size} {number}") for number in range(size)] for size in sizes]
        found = [asyncio.ensure_future(member.encode(each, Truncation())) for each in requests]
        await asyncio.sleep(0)  # each is in the line now
        gate.set()
        return await asyncio.gather(*found)

    member._tokenizer.submit(gate.wait)
    together = asyncio.run(ask(1, 2, 100, 3))
    assert calls == [3, 100, 3]
    alone = [asyncio.run(ask(size))[0] for size in (1, 2, 100, 3)]
    assert [[each.tolist() for each in texts] for texts in together] == [[e.tolist() for e in t] for t in alone]
    member.close(finish=True)
