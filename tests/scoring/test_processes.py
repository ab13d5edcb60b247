"""Scorers across processes: forked, pickled, copied. And models whose rewards are not numbers."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import multiprocessing
import os
import pickle
import select
import shutil
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.core.models.local import LocalRewardModel, TextGenerator
from rm_gallery.errors import BadRow, UserError
from rm_gallery.scoring import RewardScorer
from rm_gallery.scoring.loading import load_folder
from rm_gallery.scoring.model_folder import choose_checkpoint
from tests import forks
from tests.small import text_pairs

PAIRS: Any = text_pairs(6)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_fork(scorer: RewardScorer, *, seconds: float = 20.0) -> Any:
    """What a forked process gets for PAIRS, sync and async."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            found = [scorer.score_pairs(PAIRS), asyncio.run(scorer.ascore_pairs(PAIRS))]
            os.write(writing, json.dumps(found).encode())
        except BaseException as error:
            os.write(writing, json.dumps(str(error)).encode())
        finally:
            os._exit(0)
    try:
        assert select.select([reading], [], [], seconds)[0], "the forked process hangs"
        return json.loads(os.read(reading, 1 << 16))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def test_a_forked_process_scores_whatever_other_threads_do(text_scorer: RewardScorer) -> None:
    expected = text_scorer.score_pairs(PAIRS)
    asyncio.run(text_scorer.ascore_pairs(PAIRS))  # the worker thread runs, but not in the forked process
    holding = threading.Event()

    def hold() -> None:
        with text_scorer.engine._lock, text_scorer.engine._tokenizer_lock:
            holding.set()
            time.sleep(0.1)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    for found in in_fork(text_scorer):
        assert [tuple(pair) for pair in found] == [pytest.approx(pair, abs=1e-4) for pair in expected]
    thread.join()
    assert asyncio.run(text_scorer.ascore_pairs(PAIRS)) == [pytest.approx(pair, abs=1e-4) for pair in expected]


def test_a_model_on_a_gpu_says_that_a_fork_cannot_use_it(
    text_scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_scorer.engine, "device", torch.device("cuda"))
    [*_, said] = [in_fork(text_scorer)]
    assert said.startswith("the model is on a GPU, which a forked process cannot use: load it in this process")


def test_a_generator_says_that_a_fork_cannot_use_it() -> None:
    generator = TextGenerator(torch.nn.Linear(1, 1), None)
    generator._process = -1
    with pytest.raises(UserError, match="loaded before this process was forked; make the OpenAIChatModel in it"):
        asyncio.run(generator.agenerate([], {}))


def test_a_scorer_of_a_folder_is_pickled_by_its_folder(text_folder: Path, in_tmp: Path) -> None:
    shutil.copytree(text_folder, "model")
    scorer = RewardScorer.from_folder("model", device="cpu", token_budget=77)
    expected = scorer.score_pairs(PAIRS)
    pickled = pickle.dumps(scorer)
    assert len(pickled) < 2000
    os.chdir("/")  # the folder was relative
    for other in (pickle.loads(pickled), copy.deepcopy(scorer)):
        assert other.score_pairs(PAIRS) == expected and other is not scorer
        assert (other.folder, other.engine.packer.token_budget) == ("model", 77)
    (in_tmp / "model" / "config.json").touch()
    with pytest.raises(UserError, match="model=model: the folder changed after the scorer was loaded"):
        pickle.loads(pickled)
    in_memory = RewardScorer(scorer.engine.source)
    for act in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match=r"in memory cannot be pickled or copied; make it with RewardScorer\.from"):
            act(in_memory)
    assert in_memory.score_pairs(PAIRS)


def test_a_local_chat_model_is_pickled_without_its_weights(text_folder: Path) -> None:
    model = OpenAIChatModel(str(text_folder), is_local=True, device="cpu")
    assert model.reward_scorer is not None
    other = pickle.loads(pickle.dumps(model))
    assert isinstance(other._local, LocalRewardModel) and other._local._engine is None
    assert other.reward_scorer.score_pairs(PAIRS) == model.reward_scorer.score_pairs(PAIRS)


def score_there(scorer: RewardScorer) -> list[tuple[float, float]]:
    return scorer.score_pairs(PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_process_pools_take_a_scorer(text_folder: Path, method: str) -> None:
    scorer = RewardScorer.from_folder(text_folder, device="cpu")
    expected = scorer.score_pairs(PAIRS)
    # The fork server of a process is started once: here as tests that fork from it need it.
    context = forks.server() if method == "forkserver" else multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(score_there, scorer).result(120)
    assert found == [pytest.approx(pair, abs=1e-4) for pair in expected]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_data_loader_workers_take_a_scorer(text_folder: Path, method: str) -> None:
    scorer = RewardScorer.from_folder(text_folder, device="cpu")
    loader: Any = torch.utils.data.DataLoader(
        PAIRS, batch_size=3, num_workers=1, collate_fn=scorer.score_pairs, multiprocessing_context=method
    )
    found = [pair for batch in loader for pair in batch]
    assert found == [pytest.approx(pair, abs=1e-4) for pair in scorer.score_pairs(PAIRS)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(text_folder: Path, value: float) -> None:
    source = load_folder(text_folder, device="cpu")
    with torch.no_grad():
        source.model.head.weight[0, 3] = value  # type: ignore[union-attr,operator,index]
    with pytest.raises(UserError, match=r"model=.*: 1 of \d+ weights have values that are not finite \(first: score\."):
        RewardScorer(source)


def test_a_reward_that_is_not_finite_is_an_error_of_its_row(
    text_scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = text_scorer.engine._run

    def spoil(*arguments: Any) -> list[list[float]]:
        return [[float("nan"), 1.0] if len(each) == 2 else each for each in run(*arguments)]

    monkeypatch.setattr(text_scorer.engine, "_run", spoil)
    groups = [text_scorer.build_group("a", ["b"]), text_scorer.build_group("a", ["b", "c"])]
    good, bad = text_scorer.score_each(groups)
    assert isinstance(good, list) and isinstance(bad, BadRow)
    message = "group 1: the text cannot be scored: reward that is not finite"
    with pytest.raises(UserError, match=message):
        text_scorer.score(groups)
    with pytest.raises(UserError, match=message):
        asyncio.run(text_scorer.ascore(groups))
    with pytest.raises(UserError, match=r"f\.jsonl:7: the text cannot be scored"):
        text_scorer.score([replace(groups[1], where="f.jsonl:7")])


def test_the_folder_of_a_run_gives_its_best_or_newest_complete_checkpoint(
    in_tmp: Path, text_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rm_gallery")
    for name in ("global_step_9", "global_step_10", "global_step_125", "best"):
        (in_tmp / "run" / name).mkdir(parents=True)
        (in_tmp / "run" / name / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"model=run: the folder of a run without a complete checkpoint \(global_step_125"
    ):
        RewardScorer.from_folder("run")
    for name in ("global_step_9", "global_step_10"):
        (in_tmp / "run" / name / "manifest.json").touch()
    assert choose_checkpoint("run", key="model") == "run/global_step_10"
    for named, chosen in (("global_step_9", 9), ("global_step_125", 10), ("../other", 10)):
        (in_tmp / "run" / "best.json").write_text(json.dumps({"checkpoint": named, "step": 9}))
        assert choose_checkpoint("run", key="model") == f"run/global_step_{chosen}"
    assert [record.getMessage() for record in caplog.records][:3] == [
        "run: the folder of a run; using run/global_step_10, its newest checkpoint",
        "run: the folder of a run; using run/global_step_9, its best checkpoint (best.json)",
        "run/best.json: names no complete checkpoint of the run; it is ignored",
    ]
    (in_tmp / "run" / "best.json").unlink()
    shutil.copytree(text_folder, "run/global_step_200")
    (in_tmp / "run" / "global_step_200" / "manifest.json").touch()
    scorer = RewardScorer.from_folder("run")
    assert scorer.folder == "run/global_step_200"
    assert pickle.loads(pickle.dumps(scorer)).folder == "run/global_step_200"
    (in_tmp / "run" / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"use a checkpoint in it, e.g. run/global_step_200"):
        OpenAIChatModel("run", is_local=True)


def test_the_folder_of_another_trainer_gives_its_newest_checkpoint(in_tmp: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-125"):
        (in_tmp / "run" / name).mkdir(parents=True)
        (in_tmp / "run" / name / "config.json").write_text("{}")
    assert choose_checkpoint("run", key="model") == "run/checkpoint-125"
