"""`--processes` and `--engine ray`: the files of one process, also when workers are killed, and resumed ones."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from rm_gallery.cli import main
from rm_gallery.errors import UserError
from rm_gallery.scoring import score_files as score_files_module
from rm_gallery.scoring import workers
from rm_gallery.scoring.model_folder import ModelFolder
from rm_gallery.scoring.parts import Block
from rm_gallery.scoring.score_files import ScoreOptions, score_files
from rm_gallery.scoring.workers import Pool
from tests.scoring.test_score_files import Stopped, write_lines


class FakePool(Pool):
    """Workers without processes; those of `dying` blocks die, as often as it says."""

    def __init__(self, count: int, dying: dict[int, int]) -> None:
        super().__init__(None, count)  # type: ignore[arg-type]
        self.dying, self.started, self.sent = dying, 0, 0

    def start(self, number: int) -> Any:
        self.started += 1
        return f"{number} {self.started}"

    def send(self, worker: Any, job: Any, rows: list[Any]) -> Any:
        self.sent += 1
        return self.sent, worker, rows[0]

    def wait(self, sent: Any) -> Any:
        chosen = random.Random(self.sent).choice(sent)
        if self.dying.get(chosen[2], 0):
            self.dying[chosen[2]] -= 1
            return [(chosen, None)]
        return [(chosen, [([float(chosen[2])], None)])]

    def stop(self, worker: Any) -> None:
        pass


def test_every_block_is_scored_once_though_workers_die() -> None:
    pool = FakePool(3, {2: 1, 5: 2})
    made = (Block(start, [start], [0]) for start in range(9))  # type: ignore[list-item]
    found = list(pool.score(None, made))  # type: ignore[arg-type]
    assert sorted((block.start, results[0][0]) for block, results in found) == [(n, [float(n)]) for n in range(9)]
    assert pool.started == 3 + 3
    with pytest.raises(UserError, match="3 workers died while they scored rows 4 to 4"):
        list(FakePool(2, {4: 9}).score(None, (Block(n, [n], [0]) for n in range(9))))  # type: ignore[arg-type, list-item]


@pytest.fixture
def options(in_tmp: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> ScoreOptions:
    """240 rows to score into `out.jsonl`, in parts of 8 rows; `one.jsonl` is the output of one process."""
    monkeypatch.setattr(score_files_module, "_MAX_ROWS", 8)
    rows: list[dict[str, Any]] = [
        {"prompt": f"question {n}", "responses": [f"answer {n} {k} " * (n % 5 + 1) for k in range(3)]}
        for n in range(240)
    ]
    rows[17] = {"prompt": "no responses"}
    write_lines(in_tmp / "in.jsonl", rows)
    found = ScoreOptions((str(chat_folder),), ("in.jsonl",), "out.jsonl", device="cpu")
    score_files(replace(found, output="one.jsonl"))
    return found


def assert_same(output: str) -> None:
    """Every row of `one.jsonl`, in order, with the same rewards."""
    assert Path(output).read_bytes() == Path("one.jsonl").read_bytes()


def children(name: str) -> list[psutil.Process]:
    """Processes that this one started and whose command line or name has `name`."""
    found = []
    for each in psutil.Process().children(recursive=True):
        try:
            if name in " ".join([each.name(), *each.cmdline()]):
                found.append(each)
        except psutil.Error:
            continue
    return found


@contextmanager
def killing(name: str, parts: Callable[[], int]) -> Iterator[list[int]]:
    """Kills one worker with SIGKILL as soon as some parts are written."""
    killed: list[int] = []
    stopped = threading.Event()

    def kill() -> None:
        while not stopped.is_set():
            found = children(name)
            if found and parts() >= 2:
                os.kill(found[0].pid, signal.SIGKILL)
                killed.append(found[0].pid)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        stopped.set()
        thread.join()


@pytest.mark.slow
def test_two_processes_write_the_file_of_one_though_one_is_killed_and_the_command_is_stopped(
    options: ScoreOptions,
) -> None:
    done: list[int] = []

    def stop(rows: int) -> None:
        done.append(rows)
        if len(done) == 20:
            raise Stopped

    with killing("spawn_main", lambda: len(done)) as killed, pytest.raises(Stopped):
        score_files(replace(options, processes=2), on_part=stop)
    assert len(killed) == 1
    assert not children("spawn_main")
    (scored,) = score_files(options, on_part=done.append)  # one process resumes what two began
    assert sum(done) == 240
    assert scored.unscored[Path(options.models[0]).name].total == 1
    assert_same("out.jsonl")


@pytest.mark.slow
def test_errors_of_workers_and_options_are_sentences(options: ScoreOptions, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["score", "--model", options.models[0], "in.jsonl", "--output", "x.jsonl", "--device", "cpu"]
    for added, text in (
        (["--processes", "0"], "--processes 0: must be at least 1"),
        (["--engine", "spark"], "--engine spark: must be local or ray"),
    ):
        assert main([*arguments, *added]) == 2
        assert text in capsys.readouterr().err
    spec = workers.WorkerSpec(options, ModelFolder(options.models[0]), ["other"])
    error = workers.Worker(spec).score(None, [])  # type: ignore[arg-type]  # it is not read
    assert "differs from that of the command" in str(error)
    pool = FakePool(2, {})
    pool.wait = lambda sent: [(sent[0], error)]  # type: ignore[method-assign]
    with pytest.raises(UserError, match="differs from that of the command"):
        list(pool.score(None, iter([Block(0, [0], [0])])))  # type: ignore[arg-type, list-item]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray
def test_workers_of_ray_write_the_file_of_one_process_though_one_is_killed_and_the_command_is_stopped(
    options: ScoreOptions,
) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        done: list[int] = []

        def stop(rows: int) -> None:
            done.append(rows)
            if len(done) == 20:
                raise Stopped

        on_ray = replace(options, engine="ray", processes=2)
        with killing("ray::Worker", lambda: len(done)) as killed, pytest.raises(Stopped):
            score_files(on_ray, on_part=stop)
        assert len(killed) == 1
        score_files(replace(on_ray, processes=1), on_part=done.append)
        assert sum(done) == 240
        assert_same("out.jsonl")
        with pytest.raises(UserError, match="--processes 3: the Ray cluster has 2 CPUs"):
            score_files(replace(on_ray, processes=3, output="c.jsonl"))
    finally:
        ray.shutdown()
